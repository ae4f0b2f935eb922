//! Pods that have devices of the node, and their eviction.

use std::collections::BTreeMap;

use kube::api::{ListParams, PostParams};
use kube::core::Request;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::client::{NodeClient, build};
use crate::error::NodeError;
use crate::state::Metadata;

/// A pod of the node that asks for devices and has not ended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID: another UID is another pod under the same name.
    pub uid: String,
    /// `Pending`, `Running` or `Unknown`.
    pub phase: String,
    /// Whether it is to end already.
    pub is_ending: bool,
    /// The devices that it asks for: quantity by resource, of all its containers.
    pub devices: BTreeMap<String, u64>,
}

/// What became of an eviction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// The pod ends, within its grace period.
    Begun,
    /// The pod was gone already.
    Gone,
    /// A disruption budget forbids it for now; the API server's words.
    Blocked(String),
}

#[derive(Debug, Default, Deserialize)]
struct List {
    #[serde(default)]
    items: Option<Vec<Item>>,
}

#[derive(Debug, Default, Deserialize)]
struct Item {
    #[serde(default)]
    metadata: PodMetadata,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodMetadata {
    #[serde(flatten)]
    plain: Metadata,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    deletion_timestamp: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default)]
    node_name: String,
    #[serde(default)]
    containers: Option<Vec<Container>>,
    #[serde(default)]
    init_containers: Option<Vec<Container>>,
}

#[derive(Debug, Default, Deserialize)]
struct Container {
    #[serde(default)]
    resources: Resources,
}

#[derive(Debug, Default, Deserialize)]
struct Resources {
    /// Of devices requests and limits are the same, and limits are always there.
    #[serde(default)]
    limits: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
struct Status {
    #[serde(default)]
    phase: String,
}

impl NodeClient {
    /// The pods of this node, of all namespaces, that ask for devices that satisfy `concerned`, sorted.
    pub async fn pods_with(&self, concerned: impl Fn(&str) -> bool) -> Result<Vec<Pod>, NodeError> {
        let params = ListParams::default().fields(&format!("spec.nodeName={}", self.name));
        let verb = "list the pods of";
        let request = Request::new("/api/v1/pods").list(&params).map_err(|error| self.error(verb, build(error)))?;
        let list: List = self.timed(verb, self.client.request(request)).await?;
        let ours = list.items.unwrap_or_default().into_iter().filter(|item| item.spec.node_name == *self.name);
        let mut pods: Vec<Pod> = ours.filter_map(|item| pod(item, &concerned)).collect();
        pods.sort_unstable();
        Ok(pods)
    }

    /// Evicts a pod, by the API that honours disruption budgets; `grace` in seconds, by default the pod's own.
    pub async fn evict(&self, pod: &Pod, grace: Option<u32>) -> Result<Eviction, NodeError> {
        let Pod { namespace, name, uid, .. } = pod;
        let verb = "evict a pod of";
        // Not the library's: that names the options in a way that the API server does not read.
        let mut body = json!({
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"namespace": namespace, "name": name},
            "deleteOptions": {"preconditions": {"uid": uid}},
        });
        if let Some(grace) = grace {
            body["deleteOptions"]["gracePeriodSeconds"] = grace.into();
        }
        let body = serde_json::to_vec(&body).map_err(|error| self.error(verb, kube::Error::SerdeError(error)))?;
        let request = Request::new(format!("/api/v1/namespaces/{namespace}/pods/{name}/eviction"))
            .create(&PostParams::default(), body)
            .map_err(|error| self.error(verb, build(error)))?;
        match self.timed::<Value>(verb, self.client.request(request)).await {
            Ok(_) => Ok(Eviction::Begun),
            Err(error) => match (error.status(), &error) {
                // Gone, or another pod has its name by now.
                (Some(404 | 409), _) => Ok(Eviction::Gone),
                (Some(429), NodeError::Api { source, .. }) => Ok(Eviction::Blocked(words(source))),
                _ => Err(error),
            },
        }
    }
}

/// What the API server says, with what it says of the cause: which budget.
fn words(error: &kube::Error) -> String {
    let kube::Error::Api(status) = error else { return error.to_string() };
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let causes = causes.map(|cause| cause.message.as_str()).filter(|message| !message.is_empty());
    [status.message.as_str()].into_iter().chain(causes).collect::<Vec<_>>().join(" ")
}

/// The pod, if it asks for devices and has not ended.
fn pod(item: Item, concerned: impl Fn(&str) -> bool) -> Option<Pod> {
    let Item { metadata, spec, status } = item;
    if matches!(status.phase.as_str(), "Succeeded" | "Failed") {
        return None;
    }
    let mut devices = BTreeMap::new();
    let containers = spec.containers.into_iter().chain(spec.init_containers).flatten();
    for (resource, quantity) in containers.flat_map(|container| container.resources.limits.unwrap_or_default()) {
        if concerned(&resource) {
            // Of devices there are whole ones only.
            let sum: &mut u64 = devices.entry(resource).or_default();
            *sum = sum.saturating_add(quantity.parse().unwrap_or(0));
        }
    }
    devices.retain(|_, quantity| *quantity > 0);
    let PodMetadata { plain, namespace, deletion_timestamp } = metadata;
    (!devices.is_empty()).then(|| Pod {
        namespace,
        name: plain.name.unwrap_or_default(),
        uid: plain.uid.unwrap_or_default(),
        phase: status.phase,
        is_ending: deletion_timestamp.is_some(),
        devices,
    })
}
