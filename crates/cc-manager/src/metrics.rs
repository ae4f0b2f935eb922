//! What is counted.

use std::time::Duration;

use agent_core::metrics::Metrics;
use agent_core::state::{DevicesFile, HolderRecord};
use gpu_firmware::Mode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

/// Labels of the transition counter.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Transition {
    target: &'static str,
    result: &'static str,
}

/// Labels of the time that a transition took.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ending {
    result: &'static str,
}

/// Labels of the gauges of a device's mode.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceMode {
    device: String,
    mode: String,
}

/// Labels of the gauges of a device.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Device {
    device: String,
}

/// Upper bounds of the buckets of a transition's time, in seconds: from one device at its best to components that take minutes
/// to stop.
const SECONDS: [f64; 12] = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0];

/// The agent's own metrics.
#[derive(Clone, Debug)]
pub(crate) struct Counters {
    rounds: Counter,
    transitions: Family<Transition, Counter>,
    transition_seconds: Family<Ending, Histogram, fn() -> Histogram>,
    active: Family<DeviceMode, Gauge>,
    configured: Family<DeviceMode, Gauge>,
    usable: Family<Device, Gauge>,
    holders: Family<Device, Gauge>,
    retries: Counter,
    api_failures: Counter,
    released: Counter,
    drifted: Counter,
}

impl Counters {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        let counters = Self {
            transitions: Family::default(),
            transition_seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            active: Family::default(),
            configured: Family::default(),
            usable: Family::default(),
            holders: Family::default(),
            rounds: Counter::default(),
            retries: Counter::default(),
            api_failures: Counter::default(),
            released: Counter::default(),
            drifted: Counter::default(),
        };
        metrics.register(
            "cc_rounds",
            "Looks at the node and its devices, whether there was anything to do or not",
            counters.rounds.clone(),
        );
        metrics.register(
            "cc_transitions",
            "Attempts to change the mode of this node's GPUs, by target and result",
            counters.transitions.clone(),
        );
        metrics.register(
            "cc_transition_duration_seconds",
            "Time from the beginning of a change (node withdrawn) to its end, where devices were touched",
            counters.transition_seconds.clone(),
        );
        metrics.register(
            "cc_device_active_mode",
            "1 for the mode that each device had booted with when it was last verified in this boot",
            counters.active.clone(),
        );
        metrics.register(
            "cc_device_configured_mode",
            "1 for the mode that the knobs of each device asked for when it was last verified in this boot",
            counters.configured.clone(),
        );
        metrics.register(
            "cc_device_usable",
            "Whether each device is verified in the mode that is wanted, and may be offered",
            counters.usable.clone(),
        );
        metrics.register(
            "cc_device_holders",
            "Processes and pods that have each device which is in the way of a change",
            counters.holders.clone(),
        );
        metrics.register("cc_retries", "Attempts that failed and are tried again", counters.retries.clone());
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

    pub(crate) fn round(&self) {
        self.rounds.inc();
    }

    pub(crate) fn drifted(&self) {
        self.drifted.inc();
    }

    pub(crate) fn retried(&self) {
        self.retries.inc();
    }

    pub(crate) fn released(&self, devices: usize) {
        self.released.inc_by(u64::try_from(devices).unwrap_or(u64::MAX));
    }

    pub(crate) fn transition(&self, target: Mode, result: &'static str) {
        self.transitions.get_or_create(&Transition { target: target.as_str(), result }).inc();
    }

    /// How long a transition that touched devices has taken.
    pub(crate) fn took(&self, result: &'static str, time: Duration) {
        self.transition_seconds.get_or_create(&Ending { result }).observe(time.as_secs_f64());
    }

    pub(crate) fn patch_failed(&self) {
        self.api_failures.inc();
    }

    /// Who has devices that are in the way of a change; none where nothing is in the way.
    pub(crate) fn held(&self, holders: &[HolderRecord]) {
        self.holders.clear();
        for holder in holders {
            self.holders.get_or_create(&Device { device: holder.bdf.to_string() }).inc();
        }
    }

    /// Replaces the per-device values: devices that went are not told any more.
    pub(crate) fn devices(&self, file: &DevicesFile) {
        for family in [&self.active, &self.configured] {
            family.clear();
        }
        self.usable.clear();
        for record in &file.devices {
            let device = record.bdf.to_string();
            for (family, mode) in [(&self.active, &record.active_mode), (&self.configured, &record.configured_mode)] {
                if let Some(mode) = mode {
                    family.get_or_create(&DeviceMode { device: device.clone(), mode: mode.clone() }).set(1);
                }
            }
            self.usable.get_or_create(&Device { device }).set(i64::from(record.usable));
        }
    }
}
