//! `ccnode probe`: what is on this node.

use std::fmt::Write as _;
use std::io::Write;

use anyhow::{Context as _, ensure};
use hw_probe::config::{Liveness, liveness};
use hw_probe::{
    Bdf, CcEnable, DeviceKind, FormFactor, HostFacts, Inventory, IommuState, Lockdown, NVIDIA, PciFunction, Problem,
    SysRoot, Tee, pci_ids_name,
};
use serde::Serialize;

use crate::args::ProbeArgs;
use crate::table;

/// What `--json` prints. Within a schema number fields are only added; a field that changes its meaning or goes away makes a
/// new number.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Schema of this document.
    pub schema: u32,
    /// The host.
    pub host: HostFacts,
    /// Every NVIDIA function, by address.
    pub devices: Vec<Device>,
    /// What could not be read, of whatever function.
    pub problems: Vec<Problem>,
}

/// An NVIDIA function.
#[derive(Debug, Serialize)]
pub struct Device {
    /// What sysfs and the device table say.
    #[serde(flatten)]
    pub function: PciFunction,
    /// The PCI ID repository's text for its device id.
    pub pci_ids_name: Option<&'static str>,
    /// What its configuration space answers now; none when it cannot be read.
    pub liveness: Option<Liveness>,
    /// All functions of its IOMMU group, itself included.
    pub group_members: Vec<Bdf>,
    /// Those of them whose driver keeps VFIO from taking the group, other than itself.
    pub group_blockers: Vec<Blocker>,
}

/// A function that keeps VFIO from taking an IOMMU group.
#[derive(Debug, Serialize)]
pub struct Blocker {
    /// The function.
    pub bdf: Bdf,
    /// Its driver.
    pub driver: String,
}

impl Report {
    /// The schema number of this version.
    pub const SCHEMA: u32 = 1;

    /// Scans the node.
    pub fn read(root: &SysRoot) -> Self {
        let inventory = Inventory::scan(root);
        let mut problems = inventory.problems.clone();
        let nvidia = inventory.functions.iter().filter(|function| function.vendor == NVIDIA);
        let devices = nvidia.map(|function| Device::read(root, &inventory, function, &mut problems)).collect();
        Self { schema: Self::SCHEMA, host: inventory.host, devices, problems }
    }
}

impl Device {
    fn read(root: &SysRoot, inventory: &Inventory, function: &PciFunction, problems: &mut Vec<Problem>) -> Self {
        let bdf = function.bdf;
        let group = function.iommu_group;
        let answer = liveness(root, bdf).map_err(|error| {
            let cause = std::error::Error::source(&error)
                .map_or_else(|| "Is too short".into(), |cause| format!("Cannot be read: {cause}"));
            problems.push(Problem {
                bdf: Some(bdf),
                path: format!("sys/bus/pci/devices/{bdf}/config"),
                message: cause,
            });
        });
        let blocker =
            |blocker: &PciFunction| Blocker { bdf: blocker.bdf, driver: blocker.driver.clone().unwrap_or_default() };
        Self {
            pci_ids_name: pci_ids_name(function.vendor, function.device),
            liveness: answer.ok(),
            group_members: group
                .map_or_else(Vec::new, |group| inventory.group_members(group).map(|member| member.bdf).collect()),
            group_blockers: group.map_or_else(Vec::new, |group| {
                inventory.group_blockers(group).filter(|member| member.bdf != bdf).map(blocker).collect()
            }),
            function: function.clone(),
        }
    }
}

/// Runs the command.
pub fn run(args: &ProbeArgs, out: &mut impl Write, notes: &mut impl Write) -> anyhow::Result<()> {
    let ProbeArgs { json, root } = args;
    ensure!(
        root.join("sys").is_dir(),
        "{}: There is no directory sys in it; --root takes the root directory of a node or of a recorded tree",
        root.display()
    );
    let report = Report::read(&SysRoot::at(root));
    if *json {
        let mut text = serde_json::to_string_pretty(&report).context("The report cannot be put into JSON")?;
        text.push('\n');
        out.write_all(text.as_bytes())?;
    } else {
        out.write_all(human(&report).as_bytes())?;
        for problem in &report.problems {
            writeln!(notes, "warning: {}", line(problem))?;
        }
    }
    Ok(())
}

fn line(problem: &Problem) -> String {
    let Problem { bdf, path, message } = problem;
    let text = match bdf {
        Some(bdf) => format!("{bdf}: {path}: {message}"),
        None => format!("{path}: {message}"),
    };
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// The report for people.
fn human(report: &Report) -> String {
    let mut text = host(&report.host);
    if report.devices.is_empty() {
        text.push_str("No NVIDIA device on this node\n");
    } else {
        let heads = ["BDF", "PRODUCT", "KIND", "DRIVER", "GROUP", "VFIO", "NUMA", "POWER", "CC", "PPCIE"];
        let mut rows = vec![heads.map(str::to_owned)];
        rows.extend(report.devices.iter().map(row));
        text.push_str(&table::align(&rows));
    }
    for remark in remarks(report) {
        // A string takes any text.
        let _ = writeln!(text, "{remark}");
    }
    text
}

fn host(host: &HostFacts) -> String {
    let HostFacts { boot_id: _, kernel_release, tee, lockdown, iommu, dev_iommu, dev_vfio } = host;
    let tee = match tee {
        Tee::SevSnp => "SEV-SNP",
        Tee::Tdx => "TDX",
        Tee::None => "none",
    };
    let lockdown = match lockdown {
        Lockdown::None => "none",
        Lockdown::Integrity => "integrity",
        Lockdown::Confidentiality => "confidentiality",
        Lockdown::Unknown => "unknown",
    };
    let iommu = match iommu {
        IommuState::On => "on",
        IommuState::Off => "off",
    };
    let present = |present: &bool| if *present { "present" } else { "absent" };
    let kernel = kernel_release.as_deref().unwrap_or("unknown");
    let nodes = format!("/dev/iommu {}, /dev/vfio/vfio {}", present(dev_iommu), present(dev_vfio));
    format!("Host: kernel {kernel}, TEE {tee}, lockdown {lockdown}, IOMMU {iommu}, {nodes}\n")
}

fn row(device: &Device) -> [String; 10] {
    let function = &device.function;
    let number = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let [cc, ppcie] = capability(function);
    [
        function.bdf.to_string(),
        product(function),
        kind(function),
        function.driver.clone().unwrap_or_else(|| "-".into()),
        number(function.iommu_group),
        vfio_node(function),
        number(function.numa_node),
        power(function),
        cc.into(),
        ppcie.into(),
    ]
}

fn product(function: &PciFunction) -> String {
    let name = function.name.clone().unwrap_or_else(|| format!("{:04x}:{:04x}", function.vendor, function.device));
    match function.model.as_ref().and_then(|model| model.form_factor) {
        Some(FormFactor::Pcie) => name + " PCIe",
        Some(FormFactor::Sxm) => name + " SXM",
        None => name,
    }
}

fn kind(function: &PciFunction) -> String {
    let kind = match function.kind {
        DeviceKind::Gpu => "gpu",
        DeviceKind::NvSwitch => "nvswitch",
        DeviceKind::NvidiaOther | DeviceKind::Foreign => "other",
    };
    if function.is_virtual_function { format!("{kind} vf") } else { kind.into() }
}

fn vfio_node(function: &PciFunction) -> String {
    match (&function.vfio_cdev, function.iommu_group) {
        (Some(cdev), _) => cdev.name.clone(),
        (None, Some(group)) if function.is_vfio_bound() => format!("group {group}"),
        _ => "-".into(),
    }
}

/// The power state and, where it adds something, whether runtime power management put the function there.
fn power(function: &PciFunction) -> String {
    let state = function.power.state.as_deref().unwrap_or("-");
    match function.power.runtime_status.as_deref() {
        Some(status) if status != "active" && status != "unsupported" => format!("{state} {status}"),
        _ => state.to_owned(),
    }
}

/// What the model can do by its ids: CC and PPCIe.
fn capability(function: &PciFunction) -> [&'static str; 2] {
    match (&function.model, function.kind) {
        (Some(model), _) => {
            let cc = match model.cc_enable {
                CcEnable::Yes => "yes",
                CcEnable::No => "no",
                CcEnable::OffOnly => "off only",
                CcEnable::BySubsystem => "unknown",
            };
            [cc, if model.ppcie { "yes" } else { "no" }]
        }
        (None, DeviceKind::Gpu | DeviceKind::NvSwitch) => ["unknown", "unknown"],
        (None, DeviceKind::NvidiaOther | DeviceKind::Foreign) => ["-", "-"],
    }
}

/// What a reader of the table should know besides, with its cure.
fn remarks(report: &Report) -> Vec<String> {
    let mut remarks = Vec::new();
    let any = !report.devices.is_empty();
    if any && report.host.iommu == IommuState::Off {
        remarks.push("IOMMU: The kernel has no IOMMU groups, so VFIO cannot work; turn the IOMMU on in firmware and kernel, or this is a guest without one".into());
    }
    match report.host.lockdown {
        Lockdown::Integrity | Lockdown::Confidentiality if any => {
            remarks.push("Lockdown: BARs cannot be mapped through sysfs; GPUs are reached through vfio-pci, which lockdown allows".into());
        }
        _ => {}
    }
    for device in &report.devices {
        let bdf = device.function.bdf;
        match device.liveness {
            Some(Liveness::Silent) => remarks.push(format!(
                "{bdf}: Configuration space reads all ones: the device is off the bus; what else is shown is the kernel's memory of it"
            )),
            Some(Liveness::Other(0x0001)) => {
                remarks.push(format!("{bdf}: The device is not ready yet after a reset"));
            }
            Some(Liveness::Other(vendor)) => remarks.push(format!(
                "{bdf}: Configuration space answers vendor id {vendor:#06x} instead of {:#06x}",
                device.function.vendor
            )),
            Some(Liveness::Answers | Liveness::Asleep) | None => {}
        }
        if let Some(group) = device.function.iommu_group {
            for Blocker { bdf: member, driver } in &device.group_blockers {
                remarks.push(format!(
                    "{bdf}: VFIO cannot take IOMMU group {group} while {member} in it is bound to {driver}; unbind {member} or bind it to vfio-pci"
                ));
            }
        }
    }
    remarks
}
