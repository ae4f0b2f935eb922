//! Admission and start of a pod: devices are chosen, allocated, and readied.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kubelet_api::device_plugin as dp;
use kubelet_api::device_plugin::device_plugin_client::DevicePluginClient;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Response, Status};
use tracing::{info, warn};

use super::cdi;
use super::devices::{Ask, Choice, Reusable};
use super::pods::{Container, Phase, Pod, Record};
use super::resolve::{Error as ResolveError, below, resolve};
use super::state::{Shared, response_json};

/// The real kubelet waits for Allocate and GetPreferredAllocation without end; we give up then.
const CALL_DEADLINE: Duration = Duration::from_mins(2);
/// Deadline of PreStartContainer, as in the real kubelet.
const PRE_START_DEADLINE: Duration = Duration::from_secs(30);

/// Reason in the status of a pod whose devices could not be allocated.
pub(crate) const UNEXPECTED: &str = "UnexpectedAdmissionError";
/// Reason of a container that waits because its pod has no sandbox yet. Why not is the message of an event
/// FailedCreatePodSandBox in a real cluster; here it is that of the container's status.
const NO_SANDBOX: &str = "ContainerCreating";
/// Reason of a container that waits because its configuration could not be made.
const CONFIG_ERROR: &str = "CreateContainerConfigError";
/// Reason of a container that waits because the runtime could not make it.
const CREATE_ERROR: &str = "CreateContainerError";

/// Admits a pod and starts it. The outcome is in its record; asked again about a pod it knows, it does nothing.
pub(crate) async fn admit(shared: &Arc<Shared>, pod: Pod, api: bool) {
    let _one_by_one = shared.admission.lock().await;
    let uid = pod.uid.clone();
    if shared.state().pods.contains_key(&uid) {
        return;
    }
    // The pod counts as active while it is admitted, so that nothing frees what it is being given.
    shared.change(|state| {
        let phase = Phase::Pending { reason: String::new(), message: String::new() };
        let record = Record { pod: pod.clone(), phase, since: jiff::Timestamp::now(), api };
        state.pods.insert(uid.clone(), record);
    });
    if let Err(error) = allocate_pod(shared, &pod).await {
        let message = format!("Pod was rejected: Allocate failed due to {error}, which is unexpected");
        warn!(pod = pod.full_name(), message, "Pod rejected");
        shared.change(|state| {
            set_phase(state, &uid, Phase::Failed { reason: UNEXPECTED.to_owned(), message });
            state.free_inactive();
        });
        shared.save();
        return;
    }
    start(shared, &pod).await;
}

/// Starts an admitted pod's containers; where that fails, tries again in the background.
async fn start(shared: &Arc<Shared>, pod: &Pod) {
    if try_start(shared, pod).await {
        return;
    }
    keep_trying(shared, pod.clone());
}

fn keep_trying(shared: &Arc<Shared>, pod: Pod) {
    let task = shared.clone();
    shared.spawn(async move {
        loop {
            sleep(task.config.container_retry).await;
            if !task.state().pods.get(&pod.uid).is_some_and(is_waiting) || try_start(&task, &pod).await {
                return;
            }
        }
    });
}

fn is_waiting(record: &Record) -> bool {
    matches!(record.phase, Phase::Pending { .. })
}

/// Takes up again, after a restart, the pods whose containers could not be created before it.
pub(crate) fn resume_waiting(shared: &Arc<Shared>) {
    let waiting: Vec<Pod> = {
        let state = shared.state();
        state.pods.values().filter(|record| is_waiting(record)).map(|record| record.pod.clone()).collect()
    };
    for pod in waiting {
        keep_trying(shared, pod);
    }
}

async fn try_start(shared: &Shared, pod: &Pod) -> bool {
    match create(shared, pod).await {
        Ok(()) => {
            info!(pod = pod.full_name(), "Pod running");
            shared.change(|state| set_phase(state, &pod.uid, Phase::Running));
            true
        }
        Err((reason, message)) => {
            warn!(pod = pod.full_name(), reason, message, "Container cannot be created");
            let phase = Phase::Pending { reason: reason.to_owned(), message };
            shared.change(|state| set_phase(state, &pod.uid, phase));
            false
        }
    }
}

/// Makes the pod's sandbox and containers as far as devices matter to it; else the reason and the message.
async fn create(shared: &Shared, pod: &Pod) -> Result<(), (&'static str, String)> {
    make_sandbox(shared, pod).await.map_err(|message| (NO_SANDBOX, message))?;
    pre_start_pod(shared, pod).await.map_err(|message| (CONFIG_ERROR, message))?;
    make_containers(shared, pod).map_err(|message| (CREATE_ERROR, message))
}

/// Kata's shim plugs in the pod's devices while it makes the sandbox (operator-contract section 10, steps 3 to 5). To other
/// runtimes devices matter only later.
async fn make_sandbox(shared: &Shared, pod: &Pod) -> Result<(), String> {
    if !pod.is_kata() {
        return Ok(());
    }
    match resolve(&shared.config.pod_resources, &shared.config.root, &pod.full_name()).await {
        Ok(_) | Err(ResolveError::NoDevices { .. }) => Ok(()),
        Err(error) => Err(format!("Failed to create pod sandbox: {}", super::chain(&error))),
    }
}

/// The runtime resolves the CDI names and looks at the device nodes that Allocate has answered, container by container.
fn make_containers(shared: &Shared, pod: &Pod) -> Result<(), String> {
    let root = &shared.config.root;
    for container in pod.init_containers.iter().chain(&pod.containers) {
        let (mut names, mut nodes) = (Vec::new(), Vec::new());
        for allocation in shared.state().manager.container(&pod.uid, &container.name).into_iter().flatten() {
            let response = &allocation.1.response;
            names.extend(response.cdi_devices.iter().map(|device| device.name.clone()));
            nodes.extend(response.devices.iter().map(|device| device.host_path.clone()));
        }
        if !names.is_empty() {
            let failed = |reason: String| format!("CDI device injection failed: {reason}");
            let specs = cdi::load(root).map_err(|error| failed(super::chain(&error)))?;
            names.retain(|name| !specs.contains_key(name));
            if !names.is_empty() {
                return Err(failed(format!("unresolvable CDI devices {}", names.join(", "))));
            }
        }
        if let Some(missing) = nodes.iter().find(|node| !below(root, node).exists()) {
            return Err(format!("failed to generate container spec: lstat {missing}: no such file or directory"));
        }
    }
    Ok(())
}

fn set_phase(state: &mut super::state::State, uid: &str, phase: Phase) {
    if let Some(record) = state.pods.get_mut(uid) {
        record.phase = phase;
    }
}

/// Forgets a pod: its devices are free from here on.
pub(crate) fn forget(shared: &Shared, uid: &str) {
    let known = shared.change(|state| {
        let known = state.pods.remove(uid).is_some();
        state.free_inactive();
        known
    });
    if known {
        shared.save();
    }
}

async fn allocate_pod(shared: &Shared, pod: &Pod) -> Result<(), String> {
    let mut reusable = Reusable::new();
    for container in &pod.init_containers {
        allocate_container(shared, pod, container, &reusable).await?;
        let given = given(shared, pod, container);
        if container.restartable {
            give_up(&mut reusable, given);
        } else {
            for (resource, ids) in given {
                reusable.entry(resource).or_default().extend(ids);
            }
        }
    }
    for container in &pod.containers {
        allocate_container(shared, pod, container, &reusable).await?;
        give_up(&mut reusable, given(shared, pod, container));
    }
    Ok(())
}

fn given(shared: &Shared, pod: &Pod, container: &Container) -> Reusable {
    let state = shared.state();
    let allocations = state.manager.container(&pod.uid, &container.name);
    allocations.into_iter().flatten().map(|(resource, allocation)| (resource.clone(), allocation.ids())).collect()
}

fn give_up(reusable: &mut Reusable, given: Reusable) {
    for (resource, ids) in given {
        if let Some(left) = reusable.get_mut(&resource) {
            left.retain(|id| !ids.contains(id));
        }
    }
}

async fn allocate_container(
    shared: &Shared,
    pod: &Pod,
    container: &Container,
    reusable: &Reusable,
) -> Result<(), String> {
    let none = BTreeSet::new();
    let mut booked = false;
    for (resource, count) in &container.limits {
        // The real kubelet runs pods that ask for resources it has never heard of: the scheduler has vouched for them.
        if !shared.state().manager.manages(resource) {
            continue;
        }
        shared.state().free_inactive();
        let ask = Ask { pod: &pod.uid, container: &container.name, resource, count: *count };
        let ids = choose(shared, ask, reusable.get(resource).unwrap_or(&none)).await?;
        if ids.is_empty() {
            continue;
        }
        let response = allocate(shared, pod, ask, &ids).await?;
        shared.change(|state| state.manager.book(ask, &ids, response));
        booked = true;
    }
    if booked {
        shared.save();
    }
    Ok(())
}

async fn choose(shared: &Shared, ask: Ask<'_>, reusable: &BTreeSet<String>) -> Result<BTreeSet<String>, String> {
    let choice = {
        let mut state = shared.state();
        state.manager.choose(ask, reusable).map_err(|refusal| refusal.to_string())?
    };
    match choice {
        Choice::Nothing => Ok(BTreeSet::new()),
        Choice::Chosen(ids) => Ok(ids),
        Choice::Prefer { available, chosen } => {
            let preferred = prefer(shared, ask, &available, &chosen).await?;
            let mut state = shared.state();
            state.manager.choose_rest(ask, &available, chosen, &preferred).map_err(|refusal| refusal.to_string())
        }
    }
}

/// Where calls about a resource go, unless its plugin has gone.
fn plugin(shared: &Shared, resource: &str) -> Result<(DevicePluginClient<Channel>, String), String> {
    let state = shared.state();
    let endpoint = state.manager.endpoints.get(resource).ok_or_else(|| format!("unknown Device Plugin {resource}"))?;
    let channel = state.channels.get(resource).filter(|_| endpoint.stopped.is_none());
    let channel = channel.ok_or_else(|| format!("endpoint {resource} has been stopped"))?;
    Ok((DevicePluginClient::new(channel.clone()), endpoint.socket.clone()))
}

async fn prefer(
    shared: &Shared,
    ask: Ask<'_>,
    available: &[String],
    chosen: &BTreeSet<String>,
) -> Result<Vec<String>, String> {
    let options = shared.state().manager.endpoints.get(ask.resource).and_then(|endpoint| endpoint.options);
    if !options.is_some_and(|options| options.get_preferred_allocation_available) {
        return Ok(Vec::new());
    }
    let failed = |error: String| format!("device plugin GetPreferredAllocation rpc failed with err: {error}");
    let (mut client, socket) = plugin(shared, ask.resource).map_err(failed)?;
    let request = dp::ContainerPreferredAllocationRequest {
        available_device_ids: available.iter().chain(chosen).cloned().collect(),
        must_include_device_ids: chosen.iter().cloned().collect(),
        allocation_size: i32::try_from(ask.count).unwrap_or(i32::MAX),
    };
    let logged = json!({
        "available": request.available_device_ids, "must_include": request.must_include_device_ids,
        "size": request.allocation_size,
    });
    let request = dp::PreferredAllocationRequest { container_requests: vec![request] };
    let answer = within(CALL_DEADLINE, client.get_preferred_allocation(request)).await;
    let ids = answer.map(|answer| {
        answer.container_responses.into_iter().next().map(|response| response.device_ids).unwrap_or_default()
    });
    shared.log_call("GetPreferredAllocation", ask.resource, &socket, &logged, ids.clone().map(|ids| json!(ids)));
    ids.map_err(failed)
}

async fn allocate(
    shared: &Shared,
    pod: &Pod,
    ask: Ask<'_>,
    ids: &BTreeSet<String>,
) -> Result<dp::ContainerAllocateResponse, String> {
    let answer = match plugin(shared, ask.resource) {
        Ok((mut client, socket)) => {
            let request = dp::ContainerAllocateRequest { devices_ids: ids.iter().cloned().collect() };
            let request = dp::AllocateRequest { container_requests: vec![request] };
            let answer = within(CALL_DEADLINE, client.allocate(request)).await.map(|answer| answer.container_responses);
            let logged = answer.clone().map(|responses| responses.iter().map(response_json).collect::<Value>());
            let asked = json!({"pod": pod.full_name(), "container": ask.container, "ids": ids});
            shared.log_call("Allocate", ask.resource, &socket, &asked, logged);
            answer
        }
        Err(error) => Err(error),
    };
    match answer {
        Ok(responses) => responses.into_iter().next().ok_or_else(|| {
            "no containers return in allocation response &AllocateResponse{ContainerResponses:[]*ContainerAllocateResponse{},}"
                .to_owned()
        }),
        Err(error) => {
            shared.change(|state| state.manager.rebook());
            Err(error)
        }
    }
}

async fn pre_start_pod(shared: &Shared, pod: &Pod) -> Result<(), String> {
    for container in pod.init_containers.iter().chain(&pod.containers) {
        for (resource, count) in &container.limits {
            if *count > 0 && shared.state().manager.manages(resource) {
                pre_start(shared, pod, container, resource).await?;
            }
        }
    }
    Ok(())
}

async fn pre_start(shared: &Shared, pod: &Pod, container: &Container, resource: &str) -> Result<(), String> {
    let (options, ids) = {
        let state = shared.state();
        let endpoint = state.manager.endpoints.get(resource);
        let endpoint =
            endpoint.ok_or_else(|| format!("endpoint not found in cache for a registered resource: {resource}"))?;
        let allocation = state.manager.container(&pod.uid, &container.name).and_then(|given| given.get(resource));
        (endpoint.options, allocation.map(super::devices::Allocation::ids))
    };
    if !options.is_some_and(|options| options.pre_start_required) {
        return Ok(());
    }
    let Some(ids) = ids else {
        return Err(format!(
            "no devices found allocated in local cache for pod {}, container {}, resource {resource}",
            pod.uid, container.name
        ));
    };
    let failed = |error: String| format!("device plugin PreStartContainer rpc failed with err: {error}");
    let (mut client, socket) = plugin(shared, resource).map_err(failed)?;
    let request = dp::PreStartContainerRequest { devices_ids: ids.iter().cloned().collect() };
    let answer = within(PRE_START_DEADLINE, client.pre_start_container(request)).await;
    let asked = json!({"pod": pod.full_name(), "container": container.name, "ids": ids});
    shared.log_call("PreStartContainer", resource, &socket, &asked, answer.clone().map(|_| json!({})));
    answer.map(|_| ()).map_err(failed)
}

async fn within<T>(deadline: Duration, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, String> {
    match timeout(deadline, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(super::go_error(&status)),
        Err(_) => Err(super::DEADLINE_EXCEEDED.to_owned()),
    }
}
