//! The kubelet's business with the API server: it takes its pods from there, and reports its pods and its node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{
    Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions, WatchEvent, WatchParams,
};
use serde_json::{Map, Value, json};
use tokio::time::sleep;
use tracing::{info, warn};

use super::admission;
use super::names::is_extended_resource;
use super::pods::{Phase, Pod, Record};
use super::state::{Shared, State};

/// Pause after a failed request.
const RETRY: Duration = Duration::from_secs(1);
/// How long one watch lasts, in seconds.
const WATCH_SECONDS: u32 = 280;
/// An unchanged node status is sent again after this time, as by the real kubelet.
const REPORT_FREQUENCY: Duration = Duration::from_mins(5);

/// Starts the three loops; they end with the kubelet.
pub(crate) fn spawn(shared: &Arc<Shared>, client: &kube::Client) {
    shared.spawn(watch_pods(shared.clone(), client.clone()));
    shared.spawn(report_pods(shared.clone(), client.clone()));
    shared.spawn(report_node(shared.clone(), client.clone()));
}

async fn watch_pods(shared: Arc<Shared>, client: kube::Client) {
    let api: Api<core::Pod> = Api::all(client.clone());
    let selector = format!("spec.nodeName={}", shared.config.node);
    loop {
        let version = match api.list(&ListParams::default().fields(&selector)).await {
            Ok(list) => {
                let version = list.metadata.resource_version.clone().unwrap_or_default();
                take_list(&shared, &client, list.items).await;
                version
            }
            Err(error) => {
                warn!(error = %super::chain(&error), "Listing pods failed");
                sleep(RETRY).await;
                continue;
            }
        };
        follow_pods(&shared, &client, &api, &selector, version).await;
        sleep(RETRY).await;
    }
}

/// Watches until the server will not go on from where we are.
async fn follow_pods(
    shared: &Arc<Shared>,
    client: &kube::Client,
    api: &Api<core::Pod>,
    selector: &str,
    mut version: String,
) {
    let params = WatchParams::default().fields(selector).timeout(WATCH_SECONDS);
    loop {
        let stream = match api.watch(&params, &version).await {
            Ok(stream) => stream,
            Err(error) => return warn!(error = %super::chain(&error), "Watching pods failed"),
        };
        let mut stream = std::pin::pin!(stream);
        loop {
            let event = match stream.try_next().await {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(error) => return warn!(error = %super::chain(&error), "The watch of pods broke"),
            };
            match event {
                WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                    version = pod.metadata.resource_version.clone().unwrap_or(version);
                    take_pod(shared, client, &pod).await;
                }
                WatchEvent::Deleted(pod) => {
                    version = pod.metadata.resource_version.clone().unwrap_or(version);
                    admission::forget(shared, pod.metadata.uid.as_deref().unwrap_or_default());
                }
                WatchEvent::Bookmark(mark) => version = mark.metadata.resource_version,
                WatchEvent::Error(status) => return warn!(code = status.code, "The watch of pods must begin anew"),
            }
        }
    }
}

async fn take_list(shared: &Arc<Shared>, client: &kube::Client, pods: Vec<core::Pod>) {
    let listed: BTreeSet<&str> = pods.iter().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
    let gone: Vec<String> = {
        let state = shared.state();
        let ours = state.pods.iter().filter(|(_, record)| record.api);
        ours.filter(|(uid, _)| !listed.contains(uid.as_str())).map(|(uid, _)| uid.clone()).collect()
    };
    for uid in gone {
        admission::forget(shared, &uid);
    }
    for pod in &pods {
        take_pod(shared, client, pod).await;
    }
    shared.change(|state| state.sources_ready = true);
}

async fn take_pod(shared: &Arc<Shared>, client: &kube::Client, object: &core::Pod) {
    let Some(pod) = Pod::from_api(object) else {
        warn!(name = object.metadata.name, "A pod makes no sense: it is left alone");
        return;
    };
    if object.metadata.deletion_timestamp.is_some() {
        return end_pod(shared, client, pod);
    }
    let phase = object.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
    let known = shared.state().pods.contains_key(&pod.uid);
    match (phase, known) {
        ("Failed" | "Succeeded", true) => shared.change(|state| {
            if let Some(record) = state.pods.get_mut(&pod.uid)
                && record.phase.is_active()
            {
                record.phase = Phase::Done;
            }
            state.free_inactive();
        }),
        ("Failed" | "Succeeded", false) | (_, true) => {}
        ("Running", false) if adopts(&shared.state()) => {
            info!(pod = pod.full_name(), "Pod has been running since before the kubelet started");
            shared.change(|state| {
                let record = Record { pod: pod.clone(), phase: Phase::Running, since: Timestamp::now(), api: true };
                state.pods.insert(pod.uid.clone(), record);
            });
        }
        (_, false) => admission::admit(shared, pod, true).await,
    }
}

/// Pods found running at the start keep what they have: their containers outlived the kubelet, unless the node was
/// rebooted.
fn adopts(state: &State) -> bool {
    !state.sources_ready && state.same_boot
}

/// Ends a deleted pod's containers, frees its devices, and lets the API server drop the object.
fn end_pod(shared: &Arc<Shared>, client: &kube::Client, pod: Pod) {
    let (first, delay) = shared.change(|state| (state.ending.insert(pod.uid.clone()), state.faults.stop_delay));
    if !first {
        return;
    }
    let (task, client) = (shared.clone(), client.clone());
    shared.spawn(async move {
        sleep(delay).await;
        admission::forget(&task, &pod.uid);
        let api: Api<core::Pod> = Api::namespaced(client, &pod.namespace);
        let preconditions = Preconditions { uid: Some(pod.uid.clone()), resource_version: None };
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(preconditions),
            ..DeleteParams::default()
        };
        loop {
            match api.delete(&pod.name, &params).await {
                Ok(_) => break,
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => break,
                Err(error) => warn!(pod = pod.full_name(), error = %super::chain(&error), "Deleting a pod failed"),
            }
            sleep(RETRY).await;
        }
        info!(pod = pod.full_name(), "Pod ended");
        task.change(|state| state.ending.remove(&pod.uid));
    });
}

/// Sends a pod's status whenever it has changed.
async fn report_pods(shared: Arc<Shared>, client: kube::Client) {
    let mut changed = shared.changed.subscribe();
    let mut sent: BTreeMap<String, Value> = BTreeMap::new();
    loop {
        changed.mark_unchanged();
        let wanted: Vec<(Pod, Value)> = {
            let state = shared.state();
            sent.retain(|uid, _| state.pods.contains_key(uid));
            let ours = state.pods.values().filter(|record| record.api);
            ours.filter_map(|record| Some((record.pod.clone(), pod_status(&state, record)?))).collect()
        };
        let mut failed = false;
        for (pod, status) in wanted {
            if sent.get(&pod.uid) == Some(&status) {
                continue;
            }
            let api: Api<core::Pod> = Api::namespaced(client.clone(), &pod.namespace);
            // The UID makes the server refuse (409) if another pod has the name by now.
            let patch = json!({"metadata": {"uid": pod.uid}, "status": status});
            match api.patch_status(&pod.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                Ok(_) => {
                    sent.insert(pod.uid, status);
                }
                Err(kube::Error::Api(answer)) if answer.code == 404 || answer.code == 409 => {
                    sent.insert(pod.uid, status);
                }
                Err(error) => {
                    warn!(pod = pod.full_name(), error = %super::chain(&error), "Sending a pod's status failed");
                    failed = true;
                }
            }
        }
        if failed {
            sleep(RETRY).await;
        } else if changed.changed().await.is_err() {
            return;
        }
    }
}

/// A pod's status as it should read; `None` while there is nothing to say.
fn pod_status(state: &State, record: &Record) -> Option<Value> {
    let since = record.since.to_string();
    let start = seconds(&since);
    match &record.phase {
        Phase::Done => None,
        Phase::Pending { reason, .. } if reason.is_empty() => None,
        Phase::Failed { reason, message } => {
            Some(json!({"phase": "Failed", "reason": reason, "message": message, "startTime": start}))
        }
        Phase::Pending { reason, message } => {
            let waiting = json!({"waiting": {"reason": reason, "message": message}});
            Some(json!({
                "phase": "Pending", "startTime": start, "conditions": conditions(&start, "False"),
                "containerStatuses": container_statuses(state, record, &waiting, false),
            }))
        }
        Phase::Running => {
            let running = json!({"running": {"startedAt": start}});
            Some(json!({
                "phase": "Running", "startTime": start, "conditions": conditions(&start, "True"),
                "containerStatuses": container_statuses(state, record, &running, true),
            }))
        }
    }
}

/// A time to the second, as the API has it.
fn seconds(time: &str) -> String {
    time.split_once('.').map_or_else(|| time.to_owned(), |(whole, _)| format!("{whole}Z"))
}

fn conditions(since: &str, ready: &str) -> Value {
    let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "lastTransitionTime": since});
    json!([
        condition("PodScheduled", "True"),
        condition("Initialized", "True"),
        condition("ContainersReady", ready),
        condition("Ready", ready),
    ])
}

fn container_statuses(state: &State, record: &Record, now: &Value, up: bool) -> Value {
    record
        .pod
        .containers
        .iter()
        .map(|container| {
            let mut status = json!({
                "name": container.name, "image": "", "imageID": "", "ready": up, "started": up, "restartCount": 0,
                "state": now,
            });
            let resources: Vec<Value> = state
                .manager
                .container(&record.pod.uid, &container.name)
                .into_iter()
                .flatten()
                .map(|(resource, allocation)| {
                    let health: Vec<Value> = allocation
                        .ids()
                        .iter()
                        .map(|id| json!({"resourceID": id, "health": health(state, resource, id)}))
                        .collect();
                    json!({"name": resource, "resources": health})
                })
                .collect();
            if !resources.is_empty() {
                status["allocatedResourcesStatus"] = Value::Array(resources);
            }
            status
        })
        .collect()
}

/// Health as last listed; a device that is no longer listed passes for healthy, as in the real kubelet.
fn health(state: &State, resource: &str, id: &str) -> &'static str {
    let device = state.manager.devices.get(resource).and_then(|devices| devices.get(id));
    match device {
        Some(device) if device.health != kubelet_api::HEALTHY => kubelet_api::UNHEALTHY,
        _ => kubelet_api::HEALTHY,
    }
}

/// Sends the node's status when it has changed, and now and then anyway.
async fn report_node(shared: Arc<Shared>, client: kube::Client) {
    let api: Api<core::Node> = Api::all(client);
    let mut last_report: Option<Instant> = None;
    loop {
        match sync_node(&shared, &api, last_report).await {
            Ok(true) => last_report = Some(Instant::now()),
            Ok(false) => {}
            Err(error) => warn!(error = %super::chain(&error), "Sending the node's status failed"),
        }
        sleep(shared.config.node_status_frequency).await;
    }
}

async fn sync_node(shared: &Shared, api: &Api<core::Node>, last_report: Option<Instant>) -> Result<bool, kube::Error> {
    let name = &shared.config.node;
    let node = match api.get_opt(name).await? {
        Some(node) => node,
        None if shared.config.register_node => {
            info!(node = name, "Registering the node");
            api.create(&PostParams::default(), &new_node(name)).await?
        }
        None => return Ok(false),
    };
    let status = node.status.unwrap_or_default();
    let (capacity, allocatable) = node_resources(shared, &status);
    let same = |wanted: &Map<String, Value>, has: Option<&BTreeMap<String, _>>| {
        wanted.iter().all(|(resource, count)| {
            has.and_then(|has| has.get(resource)).is_some_and(|quantity: &Quantity| count == &json!(quantity.0))
        })
    };
    let ready = status.conditions.iter().flatten().find(|condition| condition.type_ == "Ready");
    let is_ready = ready.is_some_and(|condition| condition.status == "True");
    let due = last_report.is_none_or(|last| last.elapsed() >= REPORT_FREQUENCY);
    if is_ready && !due && same(&capacity, status.capacity.as_ref()) && same(&allocatable, status.allocatable.as_ref())
    {
        return Ok(false);
    }
    let now = seconds(&Timestamp::now().to_string());
    let since = ready.filter(|_| is_ready).and_then(|condition| condition.last_transition_time.as_ref());
    let mut conditions: Vec<Value> = status
        .conditions
        .iter()
        .flatten()
        .filter(|condition| condition.type_ != "Ready")
        .map(|condition| json!(condition))
        .collect();
    conditions.push(json!({
        "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status",
        "lastHeartbeatTime": now, "lastTransitionTime": since.map_or_else(|| json!(now), |since| json!(since)),
    }));
    let patch = json!({"status": {"capacity": capacity, "allocatable": allocatable, "conditions": conditions}});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    shared.change(|state| state.fresh_node = false);
    Ok(true)
}

/// Capacity and allocatable of the plugins' resources. Without a checkpoint the node counts as new, and extended
/// resources of unknown origin are zeroed.
fn node_resources(shared: &Shared, status: &core::NodeStatus) -> (Map<String, Value>, Map<String, Value>) {
    let counts = shared.counts();
    let (mut capacity, mut allocatable) = (Map::new(), Map::new());
    for (resource, counts) in &counts {
        capacity.insert(resource.clone(), json!(counts.capacity.to_string()));
        allocatable.insert(resource.clone(), json!(counts.allocatable.to_string()));
    }
    if shared.state().fresh_node {
        for resource in status.capacity.iter().flatten().map(|(resource, _)| resource) {
            if is_extended_resource(resource) && !counts.contains_key(resource) {
                capacity.insert(resource.clone(), json!("0"));
                allocatable.insert(resource.clone(), json!("0"));
            }
        }
    }
    (capacity, allocatable)
}

fn new_node(name: &str) -> core::Node {
    let labels = [("kubernetes.io/hostname", name), ("kubernetes.io/os", "linux"), ("kubernetes.io/arch", "amd64")];
    let mut node = core::Node::default();
    node.metadata.name = Some(name.to_owned());
    node.metadata.labels = Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
    node
}
