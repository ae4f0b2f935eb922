//! What is counted.

use agent_core::metrics::Metrics;
use gpu_firmware::Mode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

/// Labels of the transition counter.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Transition {
    target: &'static str,
    result: &'static str,
}

/// Labels of the per-device gauges.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Device {
    device: String,
    mode: String,
}

/// The agent's own metrics.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counters {
    transitions: Family<Transition, Counter>,
    verified: Family<Device, Gauge>,
    api_failures: Counter,
    released: Counter,
    drifted: Counter,
}

impl Counters {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        let counters = Self::default();
        metrics.register(
            "cc_transitions",
            "Attempts to change the mode of this node's GPUs, by target and result",
            counters.transitions.clone(),
        );
        metrics.register(
            "cc_device_verified_mode",
            "1 for the mode in which each device was last verified in this boot",
            counters.verified.clone(),
        );
        metrics.register(
            "cc_node_patch_failures",
            "Patches of the node object that failed and were tried again",
            counters.api_failures.clone(),
        );
        metrics.register(
            "cc_releases",
            "Devices that were in use, were let go, and were therefore to be verified again",
            counters.released.clone(),
        );
        metrics.register(
            "cc_drifts",
            "Devices that were found in another mode than they were to be in, without a change having been asked for",
            counters.drifted.clone(),
        );
        counters
    }

    pub(crate) fn drifted(&self) {
        self.drifted.inc();
    }

    pub(crate) fn released(&self, devices: usize) {
        self.released.inc_by(u64::try_from(devices).unwrap_or(u64::MAX));
    }

    pub(crate) fn transition(&self, target: Mode, result: &'static str) {
        self.transitions.get_or_create(&Transition { target: target.as_str(), result }).inc();
    }

    pub(crate) fn patch_failed(&self) {
        self.api_failures.inc();
    }

    /// Replaces the per-device values: devices that went are not told any more.
    pub(crate) fn devices(&self, file: &agent_core::state::DevicesFile) {
        self.verified.clear();
        for record in &file.devices {
            if let Some(mode) = &record.active_mode {
                let labels = Device { device: record.bdf.to_string(), mode: mode.clone() };
                self.verified.get_or_create(&labels).set(1);
            }
        }
    }
}
