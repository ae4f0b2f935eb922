//! The one watch on the one node.

use std::convert::Infallible;
use std::time::Duration;

use agent_core::backoff::{Backoff, jitter};
use futures::TryStreamExt;
use kube::api::{WatchEvent, WatchParams};
use kube::core::Request;
use tokio::time::Instant;

use crate::client::{NodeClient, build};
use crate::error::NodeError;
use crate::state::{NodeState, NodeView, Object, advance};

/// After so many failures in a row on one resource version the node is listed again, whatever the errors say.
const FAILURES: u32 = 5;

impl NodeClient {
    /// Keeps [`NodeClient::subscribe`] current for as long as it is polled. Ends never: every failure is logged and
    /// tried again.
    pub async fn watch(&self) -> Infallible {
        let mut backoff = Backoff::new(self.timing.first_delay, self.timing.last_delay);
        loop {
            let before = self.view();
            match self.list().await {
                Ok((version, node)) => {
                    match node {
                        // A patch was answered meanwhile: the list may be the older of the two.
                        Some(node) if self.view() != before => drop(self.see_newer(node)),
                        // Else its word counts even if its version is lower, as after a restore of the API server's data.
                        Some(node) => self.see(NodeView::Present(node.into())),
                        None => self.see_absent(),
                    }
                    backoff.reset();
                    self.follow(version, &mut backoff).await;
                }
                Err(error) => self.wait_after(&error, &mut backoff).await,
            }
        }
    }

    /// Watches from `version` on, resuming after every end, until the node must be listed again.
    async fn follow(&self, mut version: String, backoff: &mut Backoff) {
        let mut failures = 0;
        while failures < FAILURES {
            let begun = Instant::now();
            let followed = self.follow_once(&mut version).await;
            self.counts().watch_restarted();
            match followed {
                Ok(()) if begun.elapsed() >= Duration::from_secs(1) => {
                    failures = 0;
                    backoff.reset();
                }
                // Whoever ends watches at once would have us ask in a tight loop.
                Ok(()) => tokio::time::sleep(backoff.next_delay()).await,
                Err(NodeError::Gone { .. }) => {
                    let delay = jitter(self.timing.relist_spread);
                    tracing::debug!(?delay, "Watch has fallen too far behind, listing again");
                    tokio::time::sleep(delay).await;
                    return;
                }
                Err(error) => {
                    failures += 1;
                    self.wait_after(&error, backoff).await;
                }
            }
        }
    }

    /// One watch request, until the API server ends it or it fails.
    async fn follow_once(&self, version: &mut String) -> Result<(), NodeError> {
        let seconds = u32::try_from(self.timing.watch.as_secs()).unwrap_or(u32::MAX).max(1);
        let params = WatchParams::default().fields(&format!("metadata.name={}", self.name)).timeout(seconds);
        let request = Request::new("/api/v1/nodes")
            .watch_metadata(&params, version)
            .map_err(|error| self.error("watch", build(error)))?;
        let events = self.timed("watch", self.client.request_events::<Object>(request)).await?;
        let mut events = std::pin::pin!(events);
        let deadline = Instant::now() + self.timing.watch + self.timing.watch_grace;
        loop {
            let event = match tokio::time::timeout_at(deadline, events.try_next()).await {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(error)) => return Err(self.error("watch", error)),
                Err(_) => {
                    let after = self.timing.watch + self.timing.watch_grace;
                    return Err(NodeError::Timeout { node: self.name.to_string(), verb: "watch", after });
                }
            };
            match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    if object.metadata.name.as_deref() == Some(&*self.name) {
                        let node = NodeState::from(object);
                        advance(version, &node.resource_version);
                        self.see_newer(node);
                    }
                }
                WatchEvent::Deleted(object) => {
                    advance(version, &NodeState::from(object).resource_version);
                    self.see_absent();
                }
                WatchEvent::Bookmark(bookmark) => advance(version, &bookmark.metadata.resource_version),
                WatchEvent::Error(status) => return Err(self.error("watch", kube::Error::Api(status))),
            }
        }
    }

    fn see_absent(&self) {
        let error = NodeError::Absent { node: self.name.to_string() };
        tracing::error!(code = error.code(), "{error}; waiting for it");
        self.see(NodeView::Absent);
    }

    async fn wait_after(&self, error: &NodeError, backoff: &mut Backoff) {
        let delay = backoff.next_delay().max(error.retry_after().unwrap_or_default());
        tracing::warn!(code = error.code(), retry_in_ms = delay.as_millis(), "{}", error.line());
        tokio::time::sleep(delay).await;
    }
}
