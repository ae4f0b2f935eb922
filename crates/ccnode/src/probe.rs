//! `ccnode probe`: what is on this node.

use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::{Context as _, ensure};
use hw_probe::{CcEnable, DeviceKind, Fault, HostFacts, IommuState, Lockdown, PciFunction, Problem, Tee};

use crate::args::ProbeArgs;
use crate::cc::{OpenNvml, is_nvmls};
use crate::report::{Ask, Blocker, Device, Report};
use crate::source::Source;
use crate::{nfd, nvml, printable, table, watch};

/// Runs the command.
pub fn run(args: &ProbeArgs, out: &mut impl Write, notes: &mut impl Write) -> anyhow::Result<()> {
    let ProbeArgs { json, yaml, watch, poll, registers, nfd, nfd_dir, root } = args;
    let source = Source::open(root)?;
    ensure!(!(*watch && source.live().is_some()), "{}: A bundle does not change; leave --watch out", root.display());
    // Listening starts before the first report, so that nothing falls in between.
    let follow = watch.then(|| watch::Follow::new(source.root(), *poll));
    // The library knows the running machine alone.
    let nvml: Option<OpenNvml> = source.root().is_host().then_some(nvml::open);
    let report = source.report(&Ask { registers: *registers, nvml });
    if *nfd {
        let path = nfd::write(&report, nfd_dir)?;
        writeln!(out, "{}", path.display())?;
        return Ok(());
    }
    if *yaml {
        out.write_all(serde_saphyr::to_string(&report).context("The report cannot be put into YAML")?.as_bytes())?;
    } else if *json {
        let text = if *watch { serde_json::to_string(&report) } else { serde_json::to_string_pretty(&report) };
        writeln!(out, "{}", text.context("The report cannot be put into JSON")?)?;
    } else {
        out.write_all(human(&report).as_bytes())?;
        for problem in &report.problems {
            writeln!(notes, "warning: {}", line(problem))?;
        }
    }
    if let Some(mut follow) = follow {
        let mut told = false;
        out.flush()?;
        loop {
            told = told || tell_trouble(follow.trouble(), notes)?;
            follow.turn(out, *json)?;
        }
    }
    Ok(())
}

/// Says that only the poll is left, from the start or from now on; whether it was said.
fn tell_trouble(trouble: Option<&io::Error>, notes: &mut impl Write) -> io::Result<bool> {
    if let Some(trouble) = trouble {
        writeln!(notes, "warning: The kernel's events cannot be heard, only the poll finds changes: {trouble}")?;
        notes.flush()?;
    }
    Ok(trouble.is_some())
}

fn line(problem: &Problem) -> String {
    let Problem { bdf, path, message } = problem;
    let text = match bdf {
        Some(bdf) => format!("{bdf}: {path}: {message}"),
        None => format!("{path}: {message}"),
    };
    printable(&text)
}

/// The report for people.
fn human(report: &Report) -> String {
    let mut text = host(report);
    if report.devices.is_empty() && !report.doubts.is_empty() {
        text.push_str("It cannot be told whether this node has an NVIDIA device\n");
    } else if report.devices.is_empty() {
        text.push_str("No NVIDIA device on this node; cargo lab demo shows ccnode on virtual ones\n");
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

fn host(report: &Report) -> String {
    let HostFacts { boot_id: _, kernel_release, tee, lockdown: _, iommu, dev_iommu, dev_vfio } = &report.host;
    let found = &report.host_details.lockdown;
    let tee = match tee {
        Tee::SevSnp => "SEV-SNP",
        Tee::Tdx => "TDX",
        Tee::None => "none",
    };
    let lockdown = match found.mode {
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
    let kernel = printable(kernel_release.as_deref().unwrap_or("unknown"));
    let inferred = if found.inferred { " (inferred)" } else { "" };
    let nodes = format!("/dev/iommu {}, /dev/vfio/vfio {}", present(dev_iommu), present(dev_vfio));
    format!("Host: kernel {kernel}, TEE {tee}, lockdown {lockdown}{inferred}, IOMMU {iommu}, {nodes}\n")
}

fn row(device: &Device) -> [String; 10] {
    let function = &device.function;
    let number = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let [cc, ppcie] = capability(function);
    [
        function.bdf.to_string(),
        device.product(),
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
    match report.host_details.lockdown.mode {
        Lockdown::Integrity | Lockdown::Confidentiality if any => {
            remarks.push("Lockdown: BARs cannot be mapped through sysfs; GPUs are reached through vfio-pci, which lockdown allows".into());
        }
        _ => {}
    }
    remarks.extend(report.unclassified.iter().map(|found| format!("{}: {found}", found.bdf)));
    for device in &report.devices {
        let bdf = device.function.bdf;
        for fault in &device.faults {
            // That it cannot be read is among the problems.
            if !matches!(fault, Fault::ConfigUnreadable { .. }) {
                remarks.push(format!("{bdf}: {fault}"));
            }
        }
        // Where nobody asked there is nothing to say, but of a GPU whose registers its driver keeps.
        let asked = device.registers.is_some() || is_nvmls(&device.function);
        if let Some(cc) = device.cc.as_ref().filter(|_| asked) {
            remarks.push(format!("{bdf}: {}", cc.text()));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_events_are_lost_is_told_whenever_it_happens() {
        let (mut notes, mut told) = (Vec::new(), false);
        let lost = io::Error::other("broken");
        for trouble in [None, None, Some(&lost), Some(&lost)] {
            told = told || tell_trouble(trouble, &mut notes).unwrap();
        }
        let notes = String::from_utf8(notes).unwrap();
        assert_eq!(notes, "warning: The kernel's events cannot be heard, only the poll finds changes: broken\n");
    }
}
