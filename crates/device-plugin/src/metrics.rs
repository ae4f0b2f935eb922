//! What the agent counts. Labels are the node's resources and fixed words: nothing grows with time or with pods.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use agent_core::metrics::Metrics;
use hw_probe::{AerCounts, Bdf};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::cdi::Problem;
use crate::health::{Fall, Remark};
use crate::names::ResourceName;
use crate::units::{Fault, IdScheme, Unit};

const ALLOCATION_SECONDS: [f64; 8] = [0.000_01, 0.000_02, 0.000_05, 0.000_1, 0.001, 0.01, 0.1, 1.0];
/// Anybody may write files: so many are named.
const FILES: usize = 16;
const REGISTER_SECONDS: [f64; 8] = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0];

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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlapLabels {
    device: String,
    /// Code of the fault, or `gone`.
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PodLabels {
    resource: String,
    unit: String,
    pod: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabels {
    device: String,
    /// Of a remark or an error.
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FileLabels {
    file: String,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SchemeLabels {
    scheme: &'static str,
    reason: &'static str,
}

/// Units by health, registrations and allocations. Clones count together.
#[derive(Clone, Debug)]
pub(crate) struct PluginMetrics {
    units: Family<UnitLabels, Gauge>,
    known: Family<ResourceLabel, Gauge>,
    registrations: Family<ResourceLabel, Counter>,
    allocations: Family<AllocationLabels, Counter>,
    allocation_seconds: Family<ResourceLabel, Histogram, fn() -> Histogram>,
    partial_domains: Family<ResourceLabel, Counter>,
    register_seconds: Family<ResourceLabel, Histogram, fn() -> Histogram>,
    kubelet_restarts: Family<ResourceLabel, Counter>,
    cdi_problems: Gauge,
    cdi_problem: Family<FileLabels, Gauge>,
    flaps: Family<FlapLabels, Counter>,
    quarantined: Gauge,
    pods: Family<PodLabels, Gauge>,
    remarks: Family<DeviceLabels, Gauge>,
    errors: Family<DeviceLabels, Gauge>,
    scheme: Family<SchemeLabels, Gauge>,
}

impl PluginMetrics {
    pub(crate) fn register(registry: &Metrics) -> Self {
        let metrics = Self {
            units: Family::default(),
            known: Family::default(),
            registrations: Family::default(),
            allocations: Family::default(),
            allocation_seconds: Family::new_with_constructor(|| Histogram::new(ALLOCATION_SECONDS)),
            partial_domains: Family::default(),
            register_seconds: Family::new_with_constructor(|| Histogram::new(REGISTER_SECONDS)),
            kubelet_restarts: Family::default(),
            cdi_problems: Gauge::default(),
            cdi_problem: Family::default(),
            flaps: Family::default(),
            quarantined: Gauge::default(),
            pods: Family::default(),
            remarks: Family::default(),
            errors: Family::default(),
            scheme: Family::default(),
        };
        registry.register(
            "plugin_units",
            "Units by resource, health and cause, as the kubelet is told",
            metrics.units.clone(),
        );
        registry.register(
            "plugin_registered",
            "1 while the kubelet has the resource registered and listens, 0 while it does not",
            metrics.known.clone(),
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
        registry.register(
            "plugin_allocation_seconds",
            "Time from an allocation's arrival to its answer, by resource",
            metrics.allocation_seconds.clone(),
        );
        registry.register(
            "plugin_partial_domains",
            "Allocations of a part of a protected PCIe domain, given or refused, by resource",
            metrics.partial_domains.clone(),
        );
        registry.register(
            "plugin_register_seconds",
            "Time from the kubelet's appearance to its taking the registration, by resource",
            metrics.register_seconds.clone(),
        );
        registry.register(
            "plugin_kubelet_restarts",
            "Times that another kubelet was found in the place of the one that knew of the resource",
            metrics.kubelet_restarts.clone(),
        );
        registry.register(
            "plugin_cdi_problem_files",
            "CDI files on the node, of whomever, that may keep every Kata pod from starting",
            metrics.cdi_problems.clone(),
        );
        registry.register(
            "plugin_cdi_problem",
            "1 for each of these files, with its path and what is wrong with it; the first 16 by path",
            metrics.cdi_problem.clone(),
        );
        registry.register(
            "plugin_health_flaps",
            "How often a unit that could be allocated fell ill or vanished, by device and cause",
            metrics.flaps.clone(),
        );
        registry.register(
            "plugin_quarantined_units",
            "Units that are in use without a pod, and so are held back",
            metrics.quarantined.clone(),
        );
        registry.register("plugin_unit_pod", "1 for each unit that a pod has, with that pod", metrics.pods.clone());
        registry.register(
            "plugin_device_remarks",
            "1 for each thing by which a device works less well than it could",
            metrics.remarks.clone(),
        );
        registry.register(
            "plugin_device_link_errors",
            "Errors of the device's link that the kernel has counted, by kind",
            metrics.errors.clone(),
        );
        registry.register("plugin_id_scheme", "1 for the kind of ID that units have, and why", metrics.scheme.clone());
        metrics
    }

    /// A unit fell ill.
    pub(crate) fn fell(&self, fall: Fall) {
        self.flaps.get_or_create(&FlapLabels { device: fall.bdf.to_string(), cause: fall.cause }).inc();
    }

    /// How many units are held back for being in use without a pod.
    pub(crate) fn quarantined(&self, count: usize) {
        self.quarantined.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Resource, unit and pod of every unit that a pod has.
    pub(crate) fn allocated<'a>(&self, units: impl Iterator<Item = (&'a str, &'a str, &'a str)>) {
        self.pods.clear();
        for (resource, unit, pod) in units {
            let labels = PodLabels { resource: resource.to_owned(), unit: unit.to_owned(), pod: pod.to_owned() };
            self.pods.get_or_create(&labels).set(1);
        }
    }

    /// What is to be remarked of devices, and the errors of their links.
    pub(crate) fn remarked(&self, remarks: &BTreeMap<Bdf, Vec<Remark>>, errors: &BTreeMap<Bdf, AerCounts>) {
        let labels = |bdf: &Bdf, kind| DeviceLabels { device: bdf.to_string(), kind };
        self.remarks.clear();
        for (bdf, remark) in remarks.iter().flat_map(|(bdf, remarks)| remarks.iter().map(move |remark| (bdf, remark))) {
            self.remarks.get_or_create(&labels(bdf, remark.code())).set(1);
        }
        self.errors.clear();
        for (bdf, AerCounts { correctable, nonfatal, fatal }) in errors {
            for (kind, count) in [("correctable", correctable), ("nonfatal", nonfatal), ("fatal", fatal)] {
                self.errors.get_or_create(&labels(bdf, kind)).set(i64::try_from(*count).unwrap_or(i64::MAX));
            }
        }
    }

    /// By which kind of ID units are called, and why.
    pub(crate) fn called(&self, scheme: IdScheme, reason: &'static str) {
        self.scheme.clear();
        self.scheme.get_or_create(&SchemeLabels { scheme: scheme.word(), reason }).set(1);
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

    /// Whether the kubelet has the resource registered and listens.
    pub(crate) fn known(&self, resource: &ResourceName, is_known: bool) {
        self.known.get_or_create(&ResourceLabel { resource: resource.to_string() }).set(is_known.into());
    }

    pub(crate) fn registered(&self, resource: &ResourceName, after: Duration) {
        let label = ResourceLabel { resource: resource.to_string() };
        self.registrations.get_or_create(&label).inc();
        self.register_seconds.get_or_create(&label).observe(after.as_secs_f64());
    }

    pub(crate) fn kubelet_restarted(&self, resource: &ResourceName) {
        self.kubelet_restarts.get_or_create(&ResourceLabel { resource: resource.to_string() }).inc();
    }

    pub(crate) fn allocation(&self, resource: &ResourceName, given: bool, took: Duration) {
        let result = if given { "given" } else { "refused" };
        let resource = resource.to_string();
        self.allocations.get_or_create(&AllocationLabels { resource: resource.clone(), result }).inc();
        self.allocation_seconds.get_or_create(&ResourceLabel { resource }).observe(took.as_secs_f64());
    }

    pub(crate) fn partial(&self, resource: &ResourceName) {
        self.partial_domains.get_or_create(&ResourceLabel { resource: resource.to_string() }).inc();
    }

    /// CDI files of others that are in Kata's way.
    pub(crate) fn cdi_problems(&self, files: &BTreeMap<PathBuf, Problem>) {
        self.cdi_problems.set(i64::try_from(files.len()).unwrap_or(i64::MAX));
        self.cdi_problem.clear();
        for (path, problem) in files.iter().take(FILES) {
            let labels = FileLabels { file: path.display().to_string(), code: problem.code() };
            self.cdi_problem.get_or_create(&labels).set(1);
        }
    }
}
