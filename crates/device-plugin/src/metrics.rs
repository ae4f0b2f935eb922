//! What the agent counts. Labels are the node's resources and fixed words: nothing grows with time or with pods.

use std::collections::BTreeMap;

use agent_core::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::names::ResourceName;
use crate::units::{Fault, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UnitLabels {
    resource: String,
    /// `healthy` or `unhealthy`.
    health: &'static str,
    /// Code of the cause; empty for healthy ones.
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabel {
    resource: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AllocationLabels {
    resource: String,
    /// `given` or `refused`.
    result: &'static str,
}

/// Units by health, registrations and allocations. Clones count together.
#[derive(Clone, Debug, Default)]
pub(crate) struct PluginMetrics {
    units: Family<UnitLabels, Gauge>,
    registrations: Family<ResourceLabel, Counter>,
    allocations: Family<AllocationLabels, Counter>,
}

impl PluginMetrics {
    pub(crate) fn register(registry: &Metrics) -> Self {
        let metrics = Self::default();
        registry.register(
            "plugin_units",
            "Units by resource, health and cause, as the kubelet is told",
            metrics.units.clone(),
        );
        registry.register(
            "plugin_registrations",
            "Registrations that the kubelet took, by resource",
            metrics.registrations.clone(),
        );
        registry.register(
            "plugin_allocations",
            "Allocations that the kubelet asked for, by resource and result",
            metrics.allocations.clone(),
        );
        metrics
    }

    /// What the kubelet is told from now on.
    pub(crate) fn told(&self, units: &[Unit]) {
        let mut counts: BTreeMap<(&ResourceName, &'static str), i64> = BTreeMap::new();
        for unit in units {
            *counts.entry((&unit.resource, unit.fault.as_ref().map_or("", Fault::code))).or_default() += 1;
        }
        self.units.clear();
        for ((resource, code), count) in counts {
            let health = if code.is_empty() { "healthy" } else { "unhealthy" };
            self.units.get_or_create(&UnitLabels { resource: resource.to_string(), health, code }).set(count);
        }
    }

    pub(crate) fn registered(&self, resource: &ResourceName) {
        self.registrations.get_or_create(&ResourceLabel { resource: resource.to_string() }).inc();
    }

    pub(crate) fn allocation(&self, resource: &ResourceName, given: bool) {
        let result = if given { "given" } else { "refused" };
        self.allocations.get_or_create(&AllocationLabels { resource: resource.to_string(), result }).inc();
    }
}
