//! What all parts of the kubelet stand-in share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kubelet_api::device_plugin as dp;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tracing::warn;

use super::Config;
use super::checkpoint;
use super::devices::{Counts, Manager};
use super::pods::Record;

/// Calls kept for `dump`.
const MAX_CALLS: usize = 20_000;

/// Troubles that can be switched on while the kubelet runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Wait before a registration is looked at.
    pub(crate) register_delay: Duration,
    /// Wait before a registered plugin is listened to.
    pub(crate) listen_delay: Duration,
    /// Time between a pod's deletion and its end.
    pub(crate) stop_delay: Duration,
    /// The kubelet has not heard of its pods since its start.
    pub(crate) is_unaware: bool,
}

/// A connection to a plugin.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) socket: String,
    /// Ends its ListAndWatch stream from our side.
    pub(crate) cut: Arc<Notify>,
}

/// Everything that changes.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "four facts that have nothing to do with one another")]
pub(crate) struct State {
    pub(crate) manager: Manager,
    /// Pods on this node by UID; they outlive a kubelet restart, as containers do.
    pub(crate) pods: BTreeMap<String, Record>,
    /// UIDs of pods whose end is under way.
    pub(crate) ending: BTreeSet<String>,
    /// The checkpoint is of this boot, so what the API server calls running still runs.
    pub(crate) same_boot: bool,
    /// Whether the kubelet knows all its pods, so that others' devices may be freed.
    pub(crate) sources_ready: bool,
    pub(crate) clients: BTreeMap<String, Vec<Client>>,
    /// Channel to the newest plugin of each resource.
    pub(crate) channels: BTreeMap<String, Channel>,
    pub(crate) registrations: BTreeMap<String, u64>,
    pub(crate) calls: Vec<Value>,
    pub(crate) faults: Faults,
    pub(crate) starts: u64,
    pub(crate) running: bool,
    /// No checkpoint was found: the node counts as new, and old capacities on its object as stale.
    pub(crate) fresh_node: bool,
}

impl State {
    /// UIDs of pods that keep their devices.
    pub(crate) fn active(&self) -> BTreeSet<String> {
        self.pods.iter().filter(|(_, record)| record.phase.is_active()).map(|(uid, _)| uid.clone()).collect()
    }

    /// Whether it tells of its pods.
    pub(crate) fn is_aware(&self) -> bool {
        self.sources_ready || !self.faults.is_unaware
    }

    /// Frees devices of pods that are gone or at their end.
    pub(crate) fn free_inactive(&mut self) {
        if self.sources_ready {
            let active = self.active();
            self.manager.free_inactive(&active);
        }
    }
}

/// Shared by all tasks of one kubelet.
pub(crate) struct Shared {
    pub(crate) config: Config,
    state: Mutex<State>,
    /// Bumped on every change.
    pub(crate) changed: watch::Sender<u64>,
    /// Tasks of the current run.
    tasks: Mutex<JoinSet<()>>,
    /// Pods are admitted one after another.
    pub(crate) admission: tokio::sync::Mutex<()>,
}

impl Shared {
    pub(crate) fn new(config: Config) -> Arc<Self> {
        let state = State {
            faults: Faults {
                register_delay: config.register_delay,
                stop_delay: config.stop_delay,
                ..Faults::default()
            },
            ..State::default()
        };
        Arc::new(Self {
            config,
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            tasks: Mutex::default(),
            admission: tokio::sync::Mutex::default(),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and tells everyone who waits.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.changed.send_modify(|version| *version += 1);
        result
    }

    /// Runs a task until the kubelet stops.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(ended) = tasks.try_join_next() {
            if let Err(error) = ended
                && error.is_panic()
            {
                warn!(%error, "A task of the kubelet failed");
            }
        }
        tasks.spawn(task);
    }

    /// Takes the tasks of the current run, to end them.
    pub(crate) fn take_tasks(&self) -> JoinSet<()> {
        std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn plugin_socket(&self, endpoint: &str) -> PathBuf {
        self.config.plugin_dir.join(endpoint)
    }

    pub(crate) fn save(&self) {
        if let Err(error) = checkpoint::write(&self.config.plugin_dir, &self.state().manager) {
            warn!(error = %super::chain(&error), "Failed to write the checkpoint");
        }
    }

    pub(crate) fn counts(&self) -> BTreeMap<String, Counts> {
        self.state().manager.counts(Instant::now(), self.config.stop_grace)
    }

    /// Notes a call to or from a plugin.
    pub(crate) fn log_call(
        &self,
        method: &str,
        resource: &str,
        socket: &str,
        request: &Value,
        answer: Result<Value, String>,
    ) {
        let (response, error) = match answer {
            Ok(response) => (response, Value::Null),
            Err(error) => (Value::Null, Value::String(error)),
        };
        let call = json!({
            "time": Timestamp::now().to_string(), "method": method, "resource": resource, "socket": socket,
            "request": request, "response": response, "error": error,
        });
        self.change(|state| {
            if state.calls.len() >= MAX_CALLS {
                state.calls.remove(0);
            }
            state.calls.push(call);
        });
    }
}

/// What a plugin's Allocate gave one container.
pub(crate) fn response_json(response: &dp::ContainerAllocateResponse) -> Value {
    json!({
        "envs": response.envs,
        "annotations": response.annotations,
        "mounts": response.mounts.iter().map(|mount| json!({
            "container_path": mount.container_path, "host_path": mount.host_path, "read_only": mount.read_only,
        })).collect::<Vec<_>>(),
        "devices": response.devices.iter().map(|device| json!({
            "container_path": device.container_path,
            "host_path": device.host_path,
            "permissions": device.permissions,
        })).collect::<Vec<_>>(),
        "cdi_devices": response.cdi_devices.iter().map(|device| &device.name).collect::<Vec<_>>(),
    })
}

/// A device list as its plugin sent it.
pub(crate) fn devices_json(devices: &[dp::Device]) -> Value {
    devices
        .iter()
        .map(|device| {
            let numa = device.topology.as_ref().map(|t| t.nodes.iter().map(|node| node.id).collect::<Vec<_>>());
            json!({"id": device.id, "health": device.health, "numa": numa})
        })
        .collect()
}

/// Everything, for `dump`.
pub(crate) fn dump(shared: &Shared) -> Value {
    let counts = shared.counts();
    let mut state = shared.state();
    state.free_inactive();
    let state = &*state;
    let names: BTreeSet<&String> =
        counts.keys().chain(state.manager.devices.keys()).chain(state.registrations.keys()).collect();
    let resources: serde_json::Map<String, Value> = names
        .into_iter()
        .map(|resource| {
            let counts = counts.get(resource).copied().unwrap_or_default();
            let known = counts.capacity > 0;
            let devices: Vec<Value> = state
                .manager
                .devices
                .get(resource)
                .into_iter()
                .flatten()
                .filter(|_| known)
                .map(|(id, device)| {
                    let holder = state.manager.holder(resource, id).map(|(uid, container)| {
                        let pod = state.pods.get(uid).map_or_else(|| uid.to_owned(), |r| r.pod.full_name());
                        format!("{pod}/{container}")
                    });
                    let usable = state.manager.healthy.get(resource).is_some_and(|healthy| healthy.contains(id));
                    json!({
                        "id": id, "health": device.health, "allocatable": usable, "numa": device.numa,
                        "allocated_to": holder,
                    })
                })
                .collect();
            let endpoint = state.manager.endpoints.get(resource).map(|endpoint| {
                json!({
                    "socket": endpoint.socket,
                    "stopped": endpoint.stopped.is_some(),
                    "pre_start_required": endpoint.options.is_some_and(|o| o.pre_start_required),
                    "get_preferred_allocation_available":
                        endpoint.options.is_some_and(|o| o.get_preferred_allocation_available),
                })
            });
            let value = json!({
                "capacity": counts.capacity, "allocatable": counts.allocatable,
                "registrations": state.registrations.get(resource).copied().unwrap_or_default(),
                "endpoint": endpoint, "devices": devices,
            });
            (resource.clone(), value)
        })
        .collect();
    let pods: Vec<Value> = state.pods.iter().map(|(uid, record)| pod_json(state, uid, record)).collect();
    json!({
        "running": state.running, "starts": state.starts, "resources": resources, "pods": pods, "calls": state.calls,
    })
}

fn pod_json(state: &State, uid: &str, record: &Record) -> Value {
    let containers: Vec<Value> = record
        .pod
        .init_containers
        .iter()
        .chain(&record.pod.containers)
        .map(|container| {
            let allocations: serde_json::Map<String, Value> = state
                .manager
                .container(uid, &container.name)
                .into_iter()
                .flatten()
                .map(|(resource, allocation)| {
                    let value = json!({"ids": allocation.ids(), "response": response_json(&allocation.response)});
                    (resource.clone(), value)
                })
                .collect();
            json!({"name": container.name, "allocations": allocations})
        })
        .collect();
    let mut value = json!({
        "namespace": record.pod.namespace, "name": record.pod.name, "uid": uid, "containers": containers,
        "since": record.since.to_string(),
    });
    if let (Value::Object(pod), Ok(Value::Object(phase))) = (&mut value, serde_json::to_value(&record.phase)) {
        pod.extend(phase);
    }
    value
}
