//! Waits for what others bring about: pods of this node that end, and resources that the kubelet ceases to offer.
//!
//! Each wait is one list and one watch, closed when it is over. None has a deadline of its own: the caller knows what it
//! does when the wait is too long.

use std::collections::BTreeMap;

use agent_core::backoff::Backoff;
use futures::TryStreamExt;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::Request;
use serde::Deserialize;
use tokio::time::Instant;

use crate::client::{NodeClient, build};
use crate::error::NodeError;
use crate::state::{ListMetadata, Metadata, advance};

/// An object as far as it is looked at here: a pod without its content, or the whole node.
#[derive(Clone, Debug, Default, Deserialize)]
struct Item {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    status: Option<Status>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Status {
    #[serde(default)]
    allocatable: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
struct List {
    #[serde(default)]
    metadata: ListMetadata,
    #[serde(default)]
    items: Option<Vec<Item>>,
}

/// Some objects of one kind.
struct Selection {
    path: String,
    fields: String,
    /// Whether the objects' content is wanted too.
    whole: bool,
    /// UID of an object without which nothing is met.
    needs: Option<String>,
    /// `list` and `watch`, with what.
    verbs: [&'static str; 2],
}

impl NodeClient {
    /// Waits until no pod of `namespace` that is on this node is left whose labels satisfy `concerned`. After every change
    /// `left` is told the names of those that are.
    pub async fn pods_gone(
        &self,
        namespace: &str,
        concerned: impl Fn(&BTreeMap<String, String>) -> bool,
        left: &mut (dyn FnMut(Vec<String>) + Send),
    ) -> Result<(), NodeError> {
        let selection = Selection {
            path: format!("/api/v1/namespaces/{namespace}/pods"),
            fields: format!("spec.nodeName={}", self.name),
            whole: false,
            needs: None,
            verbs: ["list the operator's pods on", "watch the operator's pods on"],
        };
        let unmet = |item: &Item| {
            let is_one = concerned(item.metadata.labels.as_ref().unwrap_or(&BTreeMap::new()));
            if is_one { item.metadata.name.iter().cloned().collect() } else { Vec::new() }
        };
        self.until(&selection, unmet, left).await
    }

    /// Waits until this node has nothing allocatable of the resources that satisfy `concerned`. After every change `left`
    /// is told those that it has, with their quantity. A node object that was deleted, or made again, says nothing of the
    /// kubelet: then it waits on.
    pub async fn none_allocatable(
        &self,
        concerned: impl Fn(&str) -> bool,
        left: &mut (dyn FnMut(Vec<String>) + Send),
    ) -> Result<(), NodeError> {
        let selection = Selection {
            path: "/api/v1/nodes".to_owned(),
            fields: format!("metadata.name={}", self.name),
            whole: true,
            needs: self.view().node().map(|node| node.uid.clone()),
            verbs: ["list", "watch"],
        };
        let unmet = |item: &Item| {
            let allocatable = item.status.as_ref().and_then(|status| status.allocatable.as_ref());
            let some = allocatable.into_iter().flatten().filter(|(name, _)| concerned(name));
            some.filter(|(_, quantity)| *quantity != "0")
                .map(|(name, quantity)| format!("{name}: {quantity}"))
                .collect()
        };
        self.until(&selection, unmet, left).await
    }

    /// Waits until no object of the selection has anything unmet. Failures are tried again, but for a refusal.
    async fn until(
        &self,
        selection: &Selection,
        unmet: impl Fn(&Item) -> Vec<String>,
        left: &mut (dyn FnMut(Vec<String>) + Send),
    ) -> Result<(), NodeError> {
        let mut backoff = Backoff::new(self.timing.first_delay, self.timing.last_delay);
        loop {
            let mut items = BTreeMap::new();
            let mut is_met = |items: &BTreeMap<String, Item>| {
                let unmet: Vec<String> = items.values().flat_map(&unmet).collect();
                let is_met = unmet.is_empty() && selection.needs.as_ref().is_none_or(|uid| items.contains_key(uid));
                left(unmet);
                is_met
            };
            let outcome = match self.listed(selection).await {
                Ok((version, listed)) => {
                    items.extend(listed.into_iter().map(|item| (identity(&item), item)));
                    if is_met(&items) {
                        return Ok(());
                    }
                    self.followed(selection, version, &mut items, &mut is_met, &mut backoff).await
                }
                Err(error) => Err(error),
            };
            match outcome {
                Ok(()) => return Ok(()),
                Err(error @ NodeError::Forbidden { .. }) => return Err(error),
                Err(error) => {
                    let delay = backoff.next_delay().max(error.retry_after().unwrap_or_default());
                    tracing::warn!(code = error.code(), retry_in_ms = delay.as_millis(), "{}", error.line());
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    async fn listed(&self, selection: &Selection) -> Result<(String, Vec<Item>), NodeError> {
        let params = ListParams::default().fields(&selection.fields);
        let request = Request::new(selection.path.as_str());
        let request = if selection.whole { request.list(&params) } else { request.list_metadata(&params) };
        let [verb, _] = selection.verbs;
        let request = request.map_err(|error| self.error(verb, build(error)))?;
        let list: List = self.timed(verb, self.client.request(request)).await?;
        Ok((list.metadata.resource_version, list.items.unwrap_or_default()))
    }

    /// Watches from `version` on, resuming when the API server ends the watch, until `is_met`.
    async fn followed(
        &self,
        selection: &Selection,
        mut version: String,
        items: &mut BTreeMap<String, Item>,
        is_met: &mut impl FnMut(&BTreeMap<String, Item>) -> bool,
        backoff: &mut Backoff,
    ) -> Result<(), NodeError> {
        let [_, verb] = selection.verbs;
        let seconds = u32::try_from(self.timing.watch.as_secs()).unwrap_or(u32::MAX).max(1);
        let params = WatchParams::default().fields(&selection.fields).timeout(seconds);
        loop {
            let request = Request::new(selection.path.as_str());
            let request = if selection.whole {
                request.watch(&params, &version)
            } else {
                request.watch_metadata(&params, &version)
            };
            let request = request.map_err(|error| self.error(verb, build(error)))?;
            let events = self.timed(verb, self.client.request_events::<Item>(request)).await?;
            let mut events = std::pin::pin!(events);
            let after = self.timing.watch + self.timing.watch_grace;
            let (begun, deadline) = (Instant::now(), Instant::now() + after);
            while let Some(event) = tokio::time::timeout_at(deadline, events.try_next())
                .await
                .map_err(|_| NodeError::Timeout { node: self.name().to_owned(), verb, after })?
                .map_err(|error| self.error(verb, error))?
            {
                let (item, is_gone) = match event {
                    WatchEvent::Added(item) | WatchEvent::Modified(item) => (item, false),
                    WatchEvent::Deleted(item) => (item, true),
                    WatchEvent::Bookmark(bookmark) => {
                        advance(&mut version, &bookmark.metadata.resource_version);
                        continue;
                    }
                    WatchEvent::Error(status) => return Err(self.error(verb, kube::Error::Api(status))),
                };
                if let Some(newer) = &item.metadata.resource_version {
                    advance(&mut version, newer);
                }
                if is_gone {
                    items.remove(&identity(&item));
                } else {
                    items.insert(identity(&item), item);
                }
                if is_met(items) {
                    return Ok(());
                }
            }
            // Whoever ends watches at once would have us ask in a tight loop.
            if begun.elapsed() < std::time::Duration::from_secs(1) {
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }
}

fn identity(item: &Item) -> String {
    item.metadata.uid.as_ref().or(item.metadata.name.as_ref()).cloned().unwrap_or_default()
}
