//! Faults that a scenario injects into chosen requests.

use std::time::Duration;

use super::resources::RequestInfo;

/// What happens to a request that a fault takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultAction {
    /// Answered with this code and its usual `Status`, without effect on the store.
    Status {
        /// The HTTP code, such as 409, 410, 429, 500 or 503.
        code: u16,
        /// The `Retry-After` header in seconds.
        retry_after: Option<u32>,
    },
    /// Answered with exactly this, without effect on the store.
    Raw {
        /// The HTTP code.
        code: u16,
        /// The `Content-Type` header.
        content_type: String,
        /// The body.
        body: Vec<u8>,
    },
    /// The connection is cut before the request has any effect.
    CutBefore,
    /// The request takes effect, and then the connection is cut without an answer.
    CutAfterCommit,
    /// The request waits, still without effect, until [`ApiServer::release`](super::ApiServer::release). When its
    /// connection ends before that, it never has any.
    HoldBefore,
    /// The request takes effect, and its answer waits until [`ApiServer::release`](super::ApiServer::release).
    HoldAfterCommit,
    /// The request is served after this time.
    Delay(Duration),
    /// The answer comes in pieces of `chunk` bytes with a pause before each; works on watches too.
    SlowBody {
        /// Bytes per piece.
        chunk: usize,
        /// The pause before each piece.
        pause: Duration,
    },
    /// The answer's body is cut after this many bytes, without a proper end.
    CutBodyAfter(usize),
    /// A watch begins and at once gets an ERROR event with code 410.
    WatchGone,
    /// A watch is cut, in the middle of a line, after this many events.
    WatchCut {
        /// Whole events sent before the cut.
        after_events: usize,
    },
    /// After this many events a watch gets a bookmark that is older than what it was sent, and ends in order. A watch that
    /// does not allow bookmarks just ends.
    StaleBookmark {
        /// Whole events sent before the bookmark.
        after_events: usize,
        /// By how many versions it is too old.
        behind: u64,
    },
}

/// A fault and the requests it is for. A filter that is not set matches every request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    action: FaultAction,
    verb: Option<String>,
    resource: Option<String>,
    name: Option<String>,
    user: Option<String>,
    skip: usize,
    times: Option<usize>,
}

impl Fault {
    /// A fault for the next request of any kind; narrow it with the methods below.
    pub fn new(action: FaultAction) -> Self {
        Self { action, verb: None, resource: None, name: None, user: None, skip: 0, times: Some(1) }
    }

    /// Only requests of this verb: `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`.
    #[must_use]
    pub fn verb(mut self, verb: &str) -> Self {
        self.verb = Some(verb.to_owned());
        self
    }

    /// Only requests for this resource: `nodes`, `nodes/status`, `pods/eviction`.
    #[must_use]
    pub fn resource(mut self, resource: &str) -> Self {
        self.resource = Some(resource.to_owned());
        self
    }

    /// Only requests for the object of this name.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// Only requests of this user.
    #[must_use]
    pub fn user(mut self, user: &str) -> Self {
        self.user = Some(user.to_owned());
        self
    }

    /// Lets this many matching requests pass first.
    #[must_use]
    pub fn skip(mut self, count: usize) -> Self {
        self.skip = count;
        self
    }

    /// Takes this many requests instead of one.
    #[must_use]
    pub fn times(mut self, count: usize) -> Self {
        self.times = Some(count);
        self
    }

    /// Takes every matching request until the faults are cleared.
    #[must_use]
    pub fn always(mut self) -> Self {
        self.times = None;
        self
    }
}

/// Names an injected fault, to ask later how often it struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FaultId(u64);

#[derive(Debug, Default)]
pub(crate) struct Faults {
    next: u64,
    rules: Vec<(FaultId, Fault, usize, usize)>,
}

impl Faults {
    pub(crate) fn add(&mut self, fault: Fault) -> FaultId {
        self.next += 1;
        let id = FaultId(self.next);
        self.rules.push((id, fault, 0, 0));
        id
    }

    /// Stops all faults; their counts stay readable.
    pub(crate) fn clear(&mut self) {
        for (_, fault, _, hits) in &mut self.rules {
            fault.times = Some(*hits);
        }
    }

    pub(crate) fn hits(&self, id: FaultId) -> usize {
        self.rules.iter().find(|(have, ..)| *have == id).map_or(0, |(.., hits)| *hits)
    }

    /// The first fault that is for this request and not used up.
    pub(crate) fn take(&mut self, info: &RequestInfo, user: &str) -> Option<FaultAction> {
        for (_, fault, seen, hits) in &mut self.rules {
            let fits = fault.verb.as_ref().is_none_or(|verb| *verb == info.verb)
                && fault.resource.as_ref().is_none_or(|resource| *resource == info.full_resource())
                && fault.name.as_ref().is_none_or(|name| *name == info.name)
                && fault.user.as_ref().is_none_or(|wanted| wanted == user)
                && fault.times.is_none_or(|times| *hits < times);
            if !fits {
                continue;
            }
            *seen += 1;
            if *seen > fault.skip {
                *hits += 1;
                return Some(fault.action.clone());
            }
        }
        None
    }
}
