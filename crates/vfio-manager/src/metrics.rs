//! What the daemon counts.

use agent_core::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::binding::Action;
use crate::executor::Outcome;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DriverLabel {
    driver: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

/// Devices by driver, actions, and failures by code.
pub(crate) struct BindingMetrics {
    devices: Family<DriverLabel, Gauge>,
    bound: Counter,
    failures: Family<CodeLabel, Counter>,
}

impl BindingMetrics {
    pub(crate) fn register(registry: &Metrics) -> Self {
        let metrics = Self { devices: Family::default(), bound: Counter::default(), failures: Family::default() };
        registry.register(
            "vfio_devices",
            "Devices that are to be on VFIO, by the driver they have",
            metrics.devices.clone(),
        );
        registry.register("vfio_binds", "Devices bound by this process", metrics.bound.clone());
        registry.register(
            "vfio_failures",
            "Devices found not as wanted, by error code, one a look",
            metrics.failures.clone(),
        );
        metrics
    }

    pub(crate) fn record(&self, outcomes: &[Outcome]) {
        self.devices.clear();
        for outcome in outcomes {
            let driver = match &outcome.result {
                Ok(driver) => driver.as_deref().unwrap_or("none"),
                Err(error) => {
                    self.failures.get_or_create(&CodeLabel { code: error.code() }).inc();
                    "unknown"
                }
            };
            self.devices.get_or_create(&DriverLabel { driver: driver.into() }).inc();
            if matches!(outcome.step.action, Action::Bind { .. }) && outcome.result.is_ok() {
                self.bound.inc();
            }
        }
    }
}
