//! One watch: events from the store as lines, bookmarks, and an orderly end.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::{Bytes, Frame};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use super::Shared;
use super::faults::FaultAction;
use super::resources::{ResourceType, partial};
use super::selector::{FieldSelector, LabelSelector};
use super::status::ApiError;
use super::store::{Change, ChangeKind, OpenWatch, State};

/// Which objects a list or a watch is about.
#[derive(Debug, Clone)]
pub(crate) struct Scope {
    pub(crate) rt: &'static ResourceType,
    pub(crate) namespace: String,
    pub(crate) labels: LabelSelector,
    pub(crate) fields: FieldSelector,
}

impl Scope {
    pub(crate) fn covers(&self, key: &super::store::Key) -> bool {
        key.0 == self.rt.storage && (self.namespace.is_empty() || key.1 == self.namespace)
    }

    /// Selectors read the form of the request's group version.
    pub(crate) fn matches(&self, object: &Value) -> bool {
        if self.rt.group.is_empty() {
            self.labels.matches(object) && self.fields.matches(object)
        } else {
            self.labels.matches(object) && self.fields.matches(&self.rt.to_wire(object))
        }
    }
}

/// How a watch was asked for.
#[derive(Debug, Clone)]
pub(crate) struct WatchRequest {
    pub(crate) user: String,
    pub(crate) scope: Scope,
    /// None or 0: begin with what is there.
    pub(crate) from: Option<u64>,
    pub(crate) bookmarks: bool,
    /// The client wants the bookmark that ends the initial events.
    pub(crate) initial_bookmark: bool,
    pub(crate) timeout: Duration,
    pub(crate) metadata_only: bool,
    pub(crate) fault: Option<FaultAction>,
}

pub(crate) struct Watcher {
    shared: Arc<Shared>,
    number: u64,
    request: WatchRequest,
    cursor: u64,
    pending: VecDeque<Bytes>,
    changed: tokio::sync::watch::Receiver<u64>,
    closing: tokio::sync::watch::Receiver<u64>,
    deadline: Instant,
    bookmark_at: Option<Instant>,
    sent: usize,
    torn: bool,
    ended: bool,
}

impl Watcher {
    pub(crate) fn new(shared: Arc<Shared>, request: WatchRequest) -> Self {
        let changed = shared.changed.subscribe();
        let closing = shared.closing.subscribe();
        let number = shared.lock().opened(OpenWatch {
            user: request.user.clone(),
            resource: request.scope.rt.resource.to_owned(),
            metadata_only: request.metadata_only,
        });
        let mut watcher = Self {
            number,
            changed,
            closing,
            deadline: Instant::now() + request.timeout,
            bookmark_at: None,
            cursor: 0,
            pending: VecDeque::new(),
            sent: 0,
            torn: false,
            ended: false,
            shared,
            request,
        };
        watcher.begin();
        watcher
    }

    fn begin(&mut self) {
        let shared = Arc::clone(&self.shared);
        let state = shared.lock();
        self.plan_bookmark();
        if matches!(self.request.fault, Some(FaultAction::WatchGone)) {
            self.fail(&ApiError::expired(format!("too old resource version: {} ({})", self.cursor, state.version)));
            return;
        }
        match self.request.from {
            None | Some(0) => {
                let scope = self.request.scope.clone();
                for (key, object) in &state.objects {
                    if scope.covers(key) && scope.matches(object) {
                        self.push("ADDED", object);
                    }
                }
                self.cursor = state.version;
                if self.request.initial_bookmark {
                    self.bookmark(true);
                }
            }
            Some(from) if from < state.compacted => {
                self.fail(&ApiError::expired(format!("too old resource version: {from} ({})", state.compacted)));
            }
            Some(from) => self.cursor = from,
        }
    }

    fn plan_bookmark(&mut self) {
        if !self.request.bookmarks {
            return;
        }
        let now = Instant::now();
        let regular = now + self.shared.config.bookmark_interval;
        // The last one comes two seconds before the watch times out.
        self.bookmark_at = match self.deadline.checked_sub(Duration::from_secs(2)) {
            Some(last) if last > now && last < regular => Some(last),
            _ => Some(regular),
        };
    }

    fn line(&mut self, kind: &str, object: &Value) {
        let mut line = json!({"type": kind, "object": object}).to_string();
        line.push('\n');
        self.pending.push_back(Bytes::from(line));
    }

    fn push(&mut self, kind: &str, object: &Value) {
        let wire = self.request.scope.rt.to_wire(object);
        let wire = if self.request.metadata_only { partial(&wire) } else { wire };
        self.line(kind, &wire);
    }

    fn bookmark(&mut self, initial_end: bool) {
        self.bookmark_of(self.cursor, initial_end);
    }

    fn bookmark_of(&mut self, version: u64, initial_end: bool) {
        let mut metadata = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let rt = self.request.scope.rt;
        let object = if self.request.metadata_only {
            json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
        } else {
            json!({"kind": rt.kind, "apiVersion": rt.api_version(), "metadata": metadata, "spec": {}, "status": {}})
        };
        self.line("BOOKMARK", &object);
    }

    fn fail(&mut self, error: &ApiError) {
        self.line("ERROR", &error.status());
        self.ended = true;
    }

    /// Queues what has happened since the cursor.
    fn catch_up(&mut self, state: &State) {
        if self.cursor < state.version
            && state.changes.front().is_some_and(|first| first.version > self.cursor + 1)
            && self.cursor < state.compacted
        {
            self.fail(&ApiError::expired(format!("too old resource version: {} ({})", self.cursor, state.compacted)));
            return;
        }
        let fresh: Vec<Change> =
            state.changes.iter().rev().take_while(|change| change.version > self.cursor).cloned().collect();
        for change in fresh.iter().rev() {
            self.consider(change);
        }
        self.cursor = self.cursor.max(state.version);
    }

    fn consider(&mut self, change: &Change) {
        let scope = &self.request.scope;
        if !scope.covers(&change.key) {
            return;
        }
        let before = change.previous.as_ref().is_some_and(|object| scope.matches(object));
        let now = change.kind != ChangeKind::Deleted && scope.matches(&change.object);
        match (before, now) {
            (false, false) => {}
            (false, true) => self.push("ADDED", &change.object),
            (true, true) => self.push("MODIFIED", &change.object),
            (true, false) => {
                // The last state that matched, under the version of the write that ended it.
                let mut last = change.previous.as_deref().cloned().unwrap_or_default();
                last["metadata"]["resourceVersion"] = change.version.to_string().into();
                self.push("DELETED", &last);
            }
        }
    }

    fn next_frame(&mut self) -> Option<Result<Frame<Bytes>, io::Error>> {
        if let Some(FaultAction::WatchCut { after_events }) = self.request.fault
            && self.sent >= after_events
        {
            if self.torn {
                self.ended = true;
                return Some(Err(io::Error::new(io::ErrorKind::ConnectionAborted, "Watch cut by an injected fault")));
            }
            self.torn = true;
            let mut line = self.pending.pop_front().unwrap_or_else(|| Bytes::from_static(b"{\"type\":\"MODIFIED\","));
            line.truncate(line.len() / 2);
            return Some(Ok(Frame::data(line)));
        }
        if let Some(FaultAction::StaleBookmark { after_events, behind }) = self.request.fault
            && self.sent >= after_events
            && self.pending.is_empty()
            && !self.ended
        {
            self.ended = true;
            if self.request.bookmarks {
                self.bookmark_of(self.cursor.saturating_sub(behind), false);
            }
            return self.pending.pop_front().map(|line| Ok(Frame::data(line)));
        }
        let line = self.pending.pop_front()?;
        self.sent += 1;
        Some(Ok(Frame::data(line)))
    }

    /// The next piece of the body; None ends it in order.
    pub(crate) async fn next(&mut self) -> Option<Result<Frame<Bytes>, io::Error>> {
        loop {
            if let Some(frame) = self.next_frame() {
                if frame.is_err() {
                    // What came before is to arrive; an error at once would throw it away.
                    tokio::time::sleep(super::FLUSH).await;
                }
                return Some(frame);
            }
            if self.ended {
                return None;
            }
            self.changed.borrow_and_update();
            {
                let shared = Arc::clone(&self.shared);
                let state = shared.lock();
                self.catch_up(&state);
            }
            if !self.pending.is_empty() || self.ended {
                continue;
            }
            let bookmark_at = self.bookmark_at.unwrap_or(self.deadline + Duration::from_hours(1));
            tokio::select! {
                changed = self.changed.changed() => if changed.is_err() { return None },
                _ = self.closing.changed() => return None,
                () = sleep_until(self.deadline) => return None,
                () = sleep_until(bookmark_at) => {
                    self.bookmark(false);
                    self.plan_bookmark_after();
                }
            }
        }
    }

    /// The bookmark before the timeout is the last one.
    fn plan_bookmark_after(&mut self) {
        let now = Instant::now();
        if self.deadline <= now + Duration::from_secs(2) {
            self.bookmark_at = None;
        } else {
            self.plan_bookmark();
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.lock().watches.remove(&self.number);
        self.shared.tell();
    }
}
