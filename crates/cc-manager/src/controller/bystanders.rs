//! Everybody else who must be out of the way while devices are changed: the operator's components, pods and virtual machines, and
//! whoever writes to the node object meanwhile.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use agent_core::resources::may_be_gpus;
use agent_core::state::ErrorRecord;
use hw_probe::{Bdf, PciFunction};
use node_object::{NodeState, labels, operands};
use tokio::time::Instant;

use super::{Controller, Pausing, millis, shut};
use crate::allocations;
use crate::executor::{self, DeviceFault, Firmware};

/// What keeps a change from being made.
pub(super) enum InTheWay {
    /// Components that do not stop, or cannot be seen to.
    Others(ErrorRecord),
    /// Devices that stay in use.
    Devices(Vec<DeviceFault>),
    /// Another mode is wanted by now.
    Superseded,
    /// We were told to end.
    Ending,
}

/// How often devices in use are tried again while everybody else is kept away from them.
pub(super) const BUSY_POLL: Duration = Duration::from_secs(5);

/// How long after a failure the gate is tried to be shut again while devices are being changed.
pub(super) const GUARD_RETRY: Duration = Duration::from_secs(1);

impl<F: Firmware> Controller<F> {
    /// The pods that the kubelet has given some of these devices to, as far as it can be asked.
    pub(super) async fn pods_of(&mut self, devices: &[PciFunction]) -> BTreeMap<Bdf, String> {
        match allocations::pods(&self.settings.pod_resources, devices).await {
            Ok(pods) => pods,
            Err(error) => {
                let socket = self.settings.pod_resources.display();
                let text = format!(
                    "Cannot tell which pods have GPUs, going by the devices alone: {socket}: {error}; check that the kubelet \
                     runs and its socket is mounted, or turn this off by an empty --pod-resources (CCNODE_POD_RESOURCES)"
                );
                self.say(tracing::Level::WARN, &text);
                BTreeMap::new()
            }
        }
    }

    /// Waits until nobody is in the way of a change: no pod of a paused component is left, the kubelet offers no GPU of this
    /// node, and, where that is to be waited for, no device is in use.
    pub(super) async fn others_are_out_of_the_way(&self, devices: &[PciFunction], whole: bool) -> Result<(), InTheWay> {
        if let Some(pausing) = self.settings.pausing.as_ref().filter(|_| whole) {
            self.components_are_gone(pausing).await?;
        }
        let patience = self.settings.busy_wait;
        let deadline = Instant::now() + patience;
        loop {
            let looked = devices.to_vec();
            let found = executor::look(&self.firmware, move |firmware| firmware.is_free(&looked)).await;
            let mut faults = found.and_then(Result::err).unwrap_or_default();
            // A socket that cannot be asked was told of before.
            let pods = allocations::pods(&self.settings.pod_resources, devices).await.unwrap_or_default();
            allocations::name_pods(&mut faults, &pods);
            if faults.is_empty() || !faults.iter().all(|fault| fault.busy) {
                // What is no matter of use comes out when they are owned.
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(InTheWay::Devices(faults));
            }
            tokio::time::sleep(BUSY_POLL.min(patience)).await;
        }
    }

    /// Waits for the pods of the paused components, and then for the kubelet.
    pub(super) async fn components_are_gone(&self, pausing: &Pausing) -> Result<(), InTheWay> {
        let Pausing { namespace, patience, others } = pausing;
        let left = std::sync::Mutex::new(Vec::new());
        let mut tell = |now: Vec<String>| {
            let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
            if !now.is_empty() && *left != now {
                tracing::info!(
                    event = "waiting",
                    step = "pause",
                    patience_ms = millis(*patience),
                    "Waiting until these are gone: {}",
                    now.join(", ")
                );
            }
            *left = now;
        };
        let node = self.node.view().node().cloned().unwrap_or_default();
        let waited = tokio::time::timeout(*patience, async {
            if operands::any_paused(&node) {
                let is_one = |labels: &BTreeMap<String, String>| operands::is_paused_pod(&node, labels);
                self.node.pods_gone(namespace, is_one, &mut tell).await?;
            }
            let may_be_ours = |resource: &str| may_be_gpus(resource) && !others.iter().any(|other| other == resource);
            self.node.none_allocatable(may_be_ours, &mut tell).await
        });
        let waited = waited.await;
        let left = left.into_inner().unwrap_or_else(PoisonError::into_inner).join(", ");
        let error = match waited {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => ErrorRecord {
                code: error.code().to_owned(),
                message: format!("Cannot tell whether the operator's components have stopped: {}", error.line()),
            },
            Err(_) => ErrorRecord {
                code: "OperandsStillThere".to_owned(),
                message: format!(
                    "Not gone after {} s: {left}; nothing was changed, the paused components run again; look at what keeps these \
                     pods of namespace {namespace} on the node; a resource that stays is offered by a plugin that no deploy \
                     label pauses; if its devices are no GPUs, name it in --other-resources (CCNODE_OTHER_RESOURCES)",
                    patience.as_secs()
                ),
            },
        };
        tracing::warn!(event = "given_up", step = "pause", code = error.code, "{}", error.message);
        Err(InTheWay::Others(error))
    }

    /// Returns when another mode is wanted than this round is about, or of another node object.
    pub(super) async fn superseded(&self) {
        let mut view = self.node.subscribe();
        while !self.is_superseded() {
            // The sender lives in `self.node`, so this is always a change.
            let _ = view.changed().await;
        }
    }

    /// Shuts the node's gate again whenever somebody opens it: a person, another agent, or a patch of our own that the API
    /// server had given up for lost.
    pub(super) async fn keep_shut(&self) -> Infallible {
        let is_open = |node: &Arc<NodeState>| node.label(labels::CC_READY_STATE).is_some_and(|ready| !ready.is_empty());
        let mut view = self.node.subscribe();
        loop {
            if view.borrow_and_update().node().is_some_and(is_open) {
                tracing::warn!(
                    event = "withdrawn",
                    step = "withdraw",
                    "Node was made ready during a change: withdrawn again"
                );
                if let Err(error) = self.node.merge(&shut()).await {
                    self.counters.patch_failed();
                    tracing::warn!(code = error.code(), "Node is not withdrawn yet: {}", error.line());
                    tokio::time::sleep(GUARD_RETRY).await;
                    continue;
                }
            }
            // The sender lives in `self.node`, so this is always a change.
            let _ = view.changed().await;
        }
    }
}
