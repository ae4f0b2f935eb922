//! Events about the node: what `kubectl describe node` shows.
//!
//! They are news, and nothing depends on them: one that cannot be sent is a line in the log. Under the operator the agents may
//! not write events at all; that is said once.

use std::sync::atomic::{AtomicBool, Ordering};

use kube::core::Request;
use serde_json::json;
use tokio::sync::mpsc;

use crate::NodeView;
use crate::client::{NodeClient, build};
use crate::error::NodeError;

/// Events about objects without a namespace are in this one.
const NAMESPACE: &str = "/apis/events.k8s.io/v1/namespaces/default/events";
/// Events that wait to be sent; beyond that the newest are dropped.
const WAITING: usize = 32;
/// The API server's limit of a note, in bytes.
const LONGEST_NOTE: usize = 1024;

/// One piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Whether something is wrong (`Warning`) or not (`Normal`).
    pub is_warning: bool,
    /// A stable code, in one word.
    pub reason: String,
    /// What was being done, in one word.
    pub action: &'static str,
    /// For people.
    pub note: String,
}

/// Where events are put; clones put them to the same place.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Event>);

/// What sends them, for as long as it is polled.
#[derive(Debug)]
pub struct Sender {
    node: NodeClient,
    component: &'static str,
    waiting: mpsc::Receiver<Event>,
    is_refused: AtomicBool,
}

impl Events {
    /// Events about the node, from `component`.
    pub fn new(node: NodeClient, component: &'static str) -> (Self, Sender) {
        let (sender, waiting) = mpsc::channel(WAITING);
        (Self(sender), Sender { node, component, waiting, is_refused: AtomicBool::new(false) })
    }

    /// Leaves an event to be sent. Never waits.
    pub fn tell(&self, event: Event) {
        if let Err(error) = self.0.try_send(event) {
            tracing::debug!(%error, "Event is not sent");
        }
    }
}

impl Sender {
    /// Sends what is told, until nobody is left to tell anything.
    pub async fn run(mut self) {
        while let Some(event) = self.waiting.recv().await {
            match self.send(&event).await {
                Ok(()) => {}
                Err(error @ NodeError::Forbidden { .. }) => {
                    if !self.is_refused.swap(true, Ordering::Relaxed) {
                        tracing::info!(
                            code = error.code(),
                            "Events may not be written with these rights; annotation and log have the same"
                        );
                    }
                }
                Err(error) => {
                    tracing::warn!(code = error.code(), reason = event.reason, "Event is not sent: {}", error.line());
                }
            }
        }
    }

    async fn send(&self, event: &Event) -> Result<(), NodeError> {
        let NodeView::Present(state) = self.node.view() else { return Ok(()) };
        let name = self.node.name();
        let now = jiff::Timestamp::now();
        let mut note = event.note.clone();
        note.truncate((0..=LONGEST_NOTE.min(note.len())).rev().find(|at| note.is_char_boundary(*at)).unwrap_or(0));
        let body = json!({
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": format!("{name}-"), "namespace": "default"},
            "eventTime": format!("{now:.6}"),
            "type": if event.is_warning { "Warning" } else { "Normal" },
            "reason": event.reason,
            "action": event.action,
            "note": note,
            "regarding": {"apiVersion": "v1", "kind": "Node", "name": name, "uid": state.uid},
            "reportingController": format!("ccnode.dev/{}", self.component),
            "reportingInstance": name,
        });
        let verb = "write events about";
        let bytes = serde_json::to_vec(&body).map_err(|error| self.node.error(verb, kube::Error::SerdeError(error)))?;
        let request = Request::new(NAMESPACE)
            .create(&kube::api::PostParams::default(), bytes)
            .map_err(|error| self.node.error(verb, build(error)))?;
        self.node.timed(verb, self.node.client.request::<serde_json::Value>(request)).await.map(drop)
    }
}
