//! What the daemon counts.

use agent_core::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::binding::Action;
use crate::executor::{BindError, Outcome};
use crate::holders::HoldersOfDevices;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DriverLabels {
    wanted: String,
    driver: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ActionLabels {
    action: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabel {
    device: String,
}

/// Devices by driver, actions, failures by code, and who is in the way.
#[derive(Clone, Default)]
pub(crate) struct BindingMetrics {
    devices: Family<DriverLabels, Gauge>,
    actions: Family<ActionLabels, Counter>,
    failures: Family<CodeLabel, Counter>,
    blocked: Gauge,
    holders: Family<DeviceLabel, Gauge>,
}

impl BindingMetrics {
    pub(crate) fn register(registry: &Metrics) -> Self {
        let metrics = Self::default();
        registry.register(
            "vfio_devices",
            "Devices that are to be on VFIO, by the driver that is wanted and the one they have",
            metrics.devices.clone(),
        );
        registry.register("vfio_actions", "Devices acted on by this process, by result", metrics.actions.clone());
        registry.register(
            "vfio_failures",
            "Devices found not as wanted, by error code, one a look",
            metrics.failures.clone(),
        );
        registry.register("vfio_blocked_writes", "Writes to sysfs that have not returned", metrics.blocked.clone());
        registry.register(
            "vfio_device_holders",
            "Processes that hold a device on VFIO, or are in the way of one that is to be there, as far as they are seen",
            metrics.holders.clone(),
        );
        metrics
    }

    /// Counts what has been done.
    pub(crate) fn count(&self, outcome: &Outcome) {
        if let Err(BindError::Observed { .. }) = &outcome.result {
            return;
        }
        if let Err(error) = &outcome.result {
            self.failures.get_or_create(&CodeLabel { code: error.code() }).inc();
        }
        let action = match outcome.step.action {
            Action::Bind { .. } => "bind",
            Action::Unbind => "unbind",
            Action::Leave | Action::Wait | Action::Refuse => return,
        };
        let result = if outcome.result.is_ok() { "done" } else { "failed" };
        self.actions.get_or_create(&ActionLabels { action, result }).inc();
    }

    /// Shows how the devices are, and who holds them by the last look at that.
    pub(crate) fn record<'a>(&self, outcomes: impl Iterator<Item = &'a Outcome>, held: &HoldersOfDevices) {
        self.devices.clear();
        self.holders.clear();
        for outcome in outcomes {
            let (wanted, driver) = drivers(outcome);
            self.devices.get_or_create(&DriverLabels { wanted, driver }).inc();
            let in_the_way = outcome.result.as_ref().err().map(BindError::held_by).unwrap_or_default().len();
            let count = in_the_way.max(held.count(outcome.step.bdf));
            // Where not all processes are seen, none that is seen is no word on how many there are.
            if count > 0 || held.is_whole() {
                let label = DeviceLabel { device: outcome.step.bdf.to_string() };
                self.holders.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
    }

    pub(crate) fn set_blocked(&self, writes: usize) {
        self.blocked.set(i64::try_from(writes).unwrap_or(i64::MAX));
    }
}

/// The driver that is wanted, and the one that the device has as far as that is known.
fn drivers(outcome: &Outcome) -> (String, String) {
    let has = |driver: &Option<String>| driver.clone().unwrap_or_else(|| "none".into());
    let found = match &outcome.result {
        Ok(driver) | Err(BindError::Observed { driver, .. }) => has(driver),
        Err(_) => "unknown".into(),
    };
    let wanted = match &outcome.step.action {
        Action::Bind { module } if outcome.result.is_err() => module.clone(),
        Action::Refuse | Action::Wait => "vfio".into(),
        _ => found.clone(),
    };
    (wanted, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binding::Step;
    use hw_probe::Bdf;

    fn bdf(bus: u8) -> Bdf {
        Bdf { domain: 0, bus, device: 0, function: 0 }
    }

    fn outcome(bus: u8, action: Action, result: Result<Option<String>, BindError>) -> Outcome {
        Outcome { step: Step { bdf: bdf(bus), action, reason: String::new() }, result }
    }

    #[test]
    fn devices_are_counted_by_wanted_and_actual_driver_and_failures_by_code() {
        let registry = Metrics::new();
        let metrics = BindingMetrics::register(&registry);
        let bind = || Action::Bind { module: "vfio_pci".into() };
        let held_by = vec!["pid 7 (x)".to_owned(), "pid 8 (y)".to_owned()];
        let outcomes = [
            outcome(1, Action::Leave, Ok(Some("vfio-pci".into()))),
            outcome(2, bind(), Ok(Some("vfio-pci".into()))),
            outcome(3, bind(), Err(BindError::InUse { bdf: bdf(3), driver: "nvidia".into(), held_by })),
            outcome(4, Action::Refuse, Err(BindError::Refused { bdf: bdf(4), reason: String::new() })),
        ];
        for outcome in &outcomes {
            metrics.count(outcome);
        }
        let held = HoldersOfDevices::of_test(&[(bdf(2), 1)], true);
        metrics.record(outcomes.iter(), &held);
        metrics.set_blocked(1);
        let text = registry.encode().unwrap();
        for line in [
            "ccnode_vfio_devices{wanted=\"vfio-pci\",driver=\"vfio-pci\"} 2\n",
            "ccnode_vfio_devices{wanted=\"vfio_pci\",driver=\"unknown\"} 1\n",
            "ccnode_vfio_devices{wanted=\"vfio\",driver=\"unknown\"} 1\n",
            "ccnode_vfio_actions_total{action=\"bind\",result=\"done\"} 1\n",
            "ccnode_vfio_actions_total{action=\"bind\",result=\"failed\"} 1\n",
            "ccnode_vfio_failures_total{code=\"DeviceInUse\"} 1\n",
            "ccnode_vfio_blocked_writes 1\n",
            "ccnode_vfio_device_holders{device=\"0000:03:00.0\"} 2\n",
            "ccnode_vfio_device_holders{device=\"0000:02:00.0\"} 1\n",
            "ccnode_vfio_device_holders{device=\"0000:01:00.0\"} 0\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        // Without hostPID.
        metrics.record(outcomes.iter(), &HoldersOfDevices::of_test(&[(bdf(2), 1)], false));
        let text = registry.encode().unwrap();
        let holders: Vec<&str> = text.lines().filter(|line| line.starts_with("ccnode_vfio_device_holders{")).collect();
        assert_eq!(holders.len(), 2, "{holders:?}");
        assert!(!text.contains("0000:01:00.0"), "{text}");
    }

    #[test]
    fn every_metric_is_in_the_documentation() {
        let registry = Metrics::new();
        let metrics = BindingMetrics::register(&registry);
        // A family without members is not shown.
        let bind = Action::Bind { module: "vfio_pci".into() };
        let one = outcome(1, bind, Err(BindError::Gone { bdf: bdf(1) }));
        metrics.count(&one);
        metrics.record(std::iter::once(&one), &HoldersOfDevices::of_test(&[], true));
        let page = include_str!("../../../docs/operations.md");
        let text = registry.encode().unwrap();
        let names: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        assert_eq!(names.len(), 5, "{text}");
        for name in names {
            assert!(page.contains(name.trim_end_matches("_total")), "{name} in docs/operations.md");
        }
    }
}
