//! Requests about one node.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_core::backoff::Backoff;
use http::Response;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http_body_util::{Either, Full};
use hyper::body::Bytes;
use kube::api::{ListParams, Patch, PatchParams};
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Request;
use serde_json::json;
use tokio::sync::watch;
use tower::util::MapResponseLayer;

use crate::change::{Change, Reads};
use crate::counts::Counts;
use crate::error::NodeError;
use crate::state::{List, NodeState, NodeView, Object};

/// How long things may take, and how long to wait between attempts.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Deadline of a list, a patch, and of the opening of a watch.
    pub request: Duration,
    /// After this time the API server is to end a watch, and we resume it.
    pub watch: Duration,
    /// How much longer than that we wait before we take the connection for dead.
    pub watch_grace: Duration,
    /// First delay after a failure.
    pub first_delay: Duration,
    /// Longest delay after a failure.
    pub last_delay: Duration,
    /// Listing again after 410 is spread over this time: all nodes get their 410 at once.
    pub relist_spread: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(30),
            watch: Duration::from_secs(290),
            watch_grace: Duration::from_secs(20),
            first_delay: Duration::from_millis(500),
            last_delay: Duration::from_mins(1),
            relist_spread: Duration::from_mins(1),
        }
    }
}

/// One node of one cluster. Clones share what the watch sees.
#[derive(Clone)]
pub struct NodeClient {
    pub(crate) client: kube::Client,
    pub(crate) name: Arc<str>,
    manager: Arc<str>,
    pub(crate) timing: Timing,
    view: Arc<watch::Sender<NodeView>>,
    counts: Counts,
}

impl std::fmt::Debug for NodeClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeClient").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A client for the cluster: by the pod's service account where there is one, else by `kubeconfig`, else by what
/// `KUBECONFIG` or the home directory says. An empty path, and a list of files as `KUBECONFIG` may be, is left to the library,
/// which reads and merges those by itself.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<kube::Client, NodeError> {
    let kubeconfig = kubeconfig.filter(|path| is_one_file(path));
    let mut config = match kube::Config::incluster() {
        Ok(config) => config,
        Err(in_cluster) => {
            tracing::debug!(error = %in_cluster, "Not in a pod with a service account");
            let options = KubeConfigOptions::default();
            match kubeconfig {
                Some(path) => match Kubeconfig::read_from(path) {
                    Ok(file) => kube::Config::from_custom_kubeconfig(file, &options).await,
                    Err(error) => Err(error),
                },
                None => kube::Config::from_kubeconfig(&options).await,
            }
            .map_err(|source| NodeError::Config {
                kubeconfig: kubeconfig.map_or_else(
                    || "the default kubeconfig".to_owned(),
                    |path| format!("kubeconfig {}", path.display()),
                ),
                source: Box::new(source),
            })?
        }
    };
    config.connect_timeout = Some(Duration::from_secs(10));
    // Retries are ours: they back off with jitter and end with the agent.
    config.default_retry = false;
    let builder = ClientBuilder::try_from(config).map_err(|source| NodeError::Config {
        kubeconfig: "the configuration found".to_owned(),
        source: Box::new(source),
    })?;
    Ok(builder.with_layer(&MapResponseLayer::new(keep_retry_after)).build())
}

/// The metadata of all nodes of the cluster, by name, in pages; `patience` for each.
pub async fn nodes(client: &kube::Client, patience: Duration) -> Result<BTreeMap<String, NodeState>, NodeError> {
    const PAGE: u32 = 500;
    let failed = |error| NodeError::of(ALL, "list", error);
    let (mut nodes, mut params) = (BTreeMap::new(), ListParams::default().limit(PAGE));
    loop {
        let request = Request::new(NODES).list_metadata(&params).map_err(|error| failed(build(error)))?;
        let List { metadata, items } = tokio::time::timeout(patience, client.request(request))
            .await
            .map_err(|_| NodeError::Timeout { node: ALL.to_owned(), verb: "list", after: patience })?
            .map_err(failed)?;
        nodes.extend(items.unwrap_or_default().into_iter().filter_map(|item| {
            let name = item.metadata.name.clone()?;
            Some((name, NodeState::from(item)))
        }));
        match metadata.continue_token.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(nodes),
        }
    }
}

/// Stands for a node's name where all are asked for.
const ALL: &str = "(all)";

/// Whether this names one file. Empty, or a list of files as `KUBECONFIG` may be, is left to the library, which reads and merges
/// those by itself.
fn is_one_file(kubeconfig: &Path) -> bool {
    !kubeconfig.as_os_str().is_empty() && !kubeconfig.to_string_lossy().contains(':')
}

/// A server that is overloaded says so in plain text, and in a header how long to stay away; the client library keeps the
/// text alone. Such an answer becomes a `Status`, whose details it keeps.
fn keep_retry_after<B>(response: Response<B>) -> Response<Either<B, Full<Bytes>>> {
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let seconds = header(RETRY_AFTER).and_then(|text| text.trim().parse::<u32>().ok());
    let is_status = header(CONTENT_TYPE).is_some_and(|kind| kind.starts_with("application/json"));
    let code = response.status();
    let Some(seconds) = seconds.filter(|_| !is_status && !code.is_success()) else { return response.map(Either::Left) };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(), "reason": "",
        "message": format!("{code}, come back in {seconds} s"), "details": {"retryAfterSeconds": seconds},
    });
    let mut response = response.map(|_| Either::Right(Full::from(status.to_string())));
    response.headers_mut().remove(CONTENT_LENGTH);
    response
}

const NODES: &str = "/api/v1/nodes";
/// How often a patch is computed anew when the node changes under it.
const ATTEMPTS: u32 = 6;

impl NodeClient {
    /// The node `name`, written to under the field manager `manager`. Sends nothing yet.
    pub fn new(client: kube::Client, name: impl Into<Arc<str>>, manager: impl Into<Arc<str>>) -> Self {
        Self {
            client,
            name: name.into(),
            manager: manager.into(),
            timing: Timing::default(),
            view: Arc::new(watch::Sender::new(NodeView::Unknown)),
            counts: Counts::default(),
        }
    }

    /// Changes deadlines and delays.
    #[must_use]
    pub fn with_timing(mut self, timing: Timing) -> Self {
        self.timing = timing;
        self
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What has been asked of the API server so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// What is known of the node, latest first: a receiver that is slow sees only the last state. Filled by
    /// [`NodeClient::watch`] and by our own patches.
    pub fn subscribe(&self) -> watch::Receiver<NodeView> {
        self.view.subscribe()
    }

    /// What is known of the node now.
    pub fn view(&self) -> NodeView {
        self.view.borrow().clone()
    }

    pub(crate) fn see(&self, view: NodeView) {
        self.view.send_if_modified(|seen| {
            let changed = *seen != view;
            *seen = view;
            changed
        });
    }

    /// Like `see`, but never goes back to an older state of the same node: watch and patch answers race.
    pub(crate) fn see_newer(&self, node: NodeState) -> Arc<NodeState> {
        let node = Arc::new(node);
        self.view.send_if_modified(|seen| {
            let newer = seen.node().is_none_or(|old| node.is_newer_than(old));
            if newer {
                *seen = NodeView::Present(Arc::clone(&node));
            }
            newer
        });
        node
    }

    /// Reads the node's metadata, with the resource version to watch from. A list by field selector rather than a get:
    /// the version of a node that nobody has written for a while is too old to watch from, the list's never is.
    pub(crate) async fn list(&self) -> Result<(String, Option<NodeState>), NodeError> {
        let params = ListParams::default().fields(&format!("metadata.name={}", self.name));
        let request = Request::new(NODES).list_metadata(&params).map_err(|error| self.error("list", build(error)))?;
        let list: List = self.timed("list", self.client.request(request)).await?;
        let node = list.items.unwrap_or_default().into_iter().find(|item| {
            // Trusting the selector alone would make another node's label ours, should a proxy drop it.
            item.metadata.name.as_deref() == Some(&*self.name)
        });
        Ok((list.metadata.resource_version, node.map(NodeState::from)))
    }

    /// Reads the node's metadata now.
    pub async fn get(&self) -> Result<Arc<NodeState>, NodeError> {
        match self.list().await?.1 {
            Some(node) => Ok(self.see_newer(node)),
            None => Err(NodeError::Absent { node: self.name.to_string() }),
        }
    }

    /// Makes `change` by a merge patch of just those keys that differ from what is known; sends nothing when none does
    /// (then the answer is none).
    pub async fn merge(&self, change: &Change) -> Result<Option<Arc<NodeState>>, NodeError> {
        let change = match self.view().node() {
            Some(node) => change.missing_from(node),
            None => change.clone(),
        };
        if change.is_empty() {
            return Ok(None);
        }
        let patch = Patch::Merge(change.merge_patch());
        self.patch(&patch).await.map(Some)
    }

    /// Computes a change from the node as known and makes it by a JSON Patch that tests the node's UID and every value
    /// changed or named in `reads` (labels, annotations). When one of them has changed meanwhile, the node is read again
    /// and the change computed anew, a few times. Sends nothing when nothing changes.
    pub async fn update(
        &self,
        reads: (&[&str], &[&str]),
        mut compute: impl FnMut(&NodeState) -> Change,
    ) -> Result<Arc<NodeState>, NodeError> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let reads = Reads { labels: owned(reads.0), annotations: owned(reads.1) };
        let mut node = match self.view() {
            NodeView::Present(node) => node,
            NodeView::Unknown | NodeView::Absent => self.get().await?,
        };
        let mut backoff = Backoff::new(self.timing.first_delay / 5, self.timing.last_delay);
        let mut attempts = 0;
        loop {
            let change = compute(&node).missing_from(&node);
            if change.is_empty() {
                return Ok(node);
            }
            attempts += 1;
            let operations = serde_json::from_value(change.json_patch(&node, &reads))
                .map_err(|source| self.error("patch", kube::Error::SerdeError(source)))?;
            match self.patch::<()>(&Patch::Json(operations)).await {
                Err(NodeError::Api { node: name, source, .. }) if is_conflict(&source) => {
                    if attempts == ATTEMPTS {
                        return Err(NodeError::Conflict { node: name, attempts, source });
                    }
                    self.counts.conflicted();
                    tracing::debug!(attempts, error = %source, "Node changed under a patch, reading it again");
                    tokio::time::sleep(backoff.next_delay()).await;
                    node = self.get().await?;
                }
                other => return other,
            }
        }
    }

    async fn patch<P: serde::Serialize + std::fmt::Debug>(
        &self,
        patch: &Patch<P>,
    ) -> Result<Arc<NodeState>, NodeError> {
        let params = PatchParams { field_manager: Some(self.manager.to_string()), ..PatchParams::default() };
        let request = Request::new(NODES)
            .patch_metadata(&self.name, &params, patch)
            .map_err(|error| self.error("patch", build(error)))?;
        let answer: Object = self.timed("patch", self.client.request(request)).await?;
        Ok(self.see_newer(answer.into()))
    }

    pub(crate) async fn timed<T>(
        &self,
        verb: &'static str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, NodeError> {
        let answer = match tokio::time::timeout(self.timing.request, request).await {
            Ok(answer) => answer.map_err(|error| self.error(verb, error)),
            Err(_) => Err(NodeError::Timeout { node: self.name.to_string(), verb, after: self.timing.request }),
        };
        self.counts.request(verb, answer.as_ref().err());
        answer
    }

    pub(crate) fn error(&self, verb: &'static str, error: kube::Error) -> NodeError {
        NodeError::of(&self.name, verb, error)
    }
}

pub(crate) fn build(error: kube::core::request::Error) -> kube::Error {
    kube::Error::BuildRequest(error)
}

/// A failed `test` is 422 (Invalid); a lost race inside the API server is 409.
fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409 || status.code == 422)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[test]
    fn a_list_of_kubeconfigs_is_left_to_the_library() {
        for (text, is_one) in [("", false), ("/a:/b", false), ("/a", true)] {
            assert_eq!(is_one_file(Path::new(text)), is_one, "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_plain_refusal_keeps_its_time() {
        for (code, kind, header, seconds) in [
            (429, "text/plain; charset=utf-8", Some("7"), Some(7)),
            (503, "text/html", Some(" 3 "), Some(3)),
            (429, "text/plain", Some("Wed, 21 Oct 2026 07:28:00 GMT"), None),
            (429, "text/plain", None, None),
            // A Status says it itself, and a success is none.
            (429, "application/json", Some("7"), None),
            (200, "text/plain", Some("7"), None),
        ] {
            let mut response = Response::builder().status(code).header(CONTENT_TYPE, kind).header(CONTENT_LENGTH, 4);
            if let Some(header) = header {
                response = response.header(RETRY_AFTER, header);
            }
            let response = keep_retry_after(response.body(Full::<Bytes>::from("text")).unwrap());
            assert_eq!(response.status().as_u16(), code);
            let body = response.into_body().collect().await.unwrap().to_bytes();
            let status: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
            let told = status.and_then(|status| status["details"]["retryAfterSeconds"].as_u64());
            assert_eq!((told, body == "text"), (seconds, seconds.is_none()), "{code} {kind} {header:?}");
        }
    }
}
