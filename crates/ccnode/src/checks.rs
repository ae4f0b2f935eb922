//! The checks of `ccnode doctor`: from facts to findings, without I/O once the facts are read.

use std::collections::BTreeSet;

use agent_core::hostfile::HostDir;
use agent_core::state::{BindingsFile, DEVICES_FILE, DevicesFile, STATE_DIR, StateError, Transition, state_dir};
use agent_core::text::chain;
use hw_probe::acs::Acs;
use hw_probe::{
    Architecture, CcEnable, Fault, Holder, IommuState, Lockdown, ModuleState, PciFunction, Problem, SysRoot, Tee,
};
use serde::{Deserialize, Serialize};

use crate::node::Socket;
use crate::pod_resources::{Get, get};
use crate::report::{Ask, Blocker, Device, Report};
use crate::source::Source;

/// Most lines of evidence of one check.
const MOST_LINES: usize = 24;

/// What the checks judge.
#[derive(Debug)]
pub struct Facts {
    /// The node.
    pub report: Report,
    /// What the kubelet's pod resources service answered.
    pub get: Get,
    /// Whether the tree has the files of kubelet, containerd and CDI at all: one that was recorded of sys and proc has none.
    pub has_node_files: bool,
    /// What cc-manager and vfio-manager have written for each other in this boot.
    pub exchanged: Exchanged,
}

/// What the files that cc-manager and vfio-manager write for each other say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Exchanged {
    /// Whether there are any, or why they cannot be used.
    pub(crate) found: Result<bool, String>,
    under_way: Option<UnderWay>,
}

/// A change of modes under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct UnderWay {
    change: Transition,
    /// When cc-manager last wrote of it.
    written_at: jiff::Timestamp,
    /// Whether that was long ago when it was read.
    is_forgotten: bool,
}

impl Exchanged {
    /// Reads them below the root.
    pub fn read(root: &SysRoot, report: &Report) -> Self {
        let boot_id = report.host.boot_id.as_deref().unwrap_or_default();
        let load = || -> Result<_, StateError> {
            // Someone may name the root by a way that goes up again.
            let root = root.join("");
            let root = root.canonicalize().unwrap_or(root);
            let Some(dir) = HostDir::open_existing(state_dir(&root))? else {
                return Ok((false, None));
            };
            let bindings = BindingsFile::load(&dir, boot_id)?;
            let devices = DevicesFile::load(&dir, boot_id)?;
            Ok((bindings.is_some() || devices.is_some(), devices))
        };
        let (found, devices) = match load() {
            Ok((found, devices)) => (Ok(found), devices),
            Err(error) => (Err(chain(&error)), None),
        };
        let under_way = devices.and_then(|file| {
            let written_at = file.origin.written_at;
            let is_forgotten = jiff::Timestamp::now().duration_since(written_at) >= LONG_CHANGE;
            Some(UnderWay { change: file.transition?, written_at, is_forgotten })
        });
        Self { found, under_way }
    }
}

impl Facts {
    /// Reads the node; asks the kubelet if its socket is there.
    pub fn read(source: &Source) -> Self {
        let (report, root) = (source.report(&Ask::default()), source.root());
        if let Some(live) = source.live() {
            let exchanged = live.exchanged.clone().unwrap_or_else(|| Exchanged::read(root, &report));
            return Self { report, get: live.get.clone(), has_node_files: live.has_node_files, exchanged };
        }
        let exchanged = Exchanged::read(root, &report);
        let socket = &report.node.kubelet.pod_resources_socket;
        let get = if socket.present {
            get(&root.join(socket.path.trim_start_matches('/')))
        } else {
            Get::NotAsked { cause: format!("{} is not there", socket.path) }
        };
        Self { report, get, has_node_files: root.is_host() || root.join("var").is_dir(), exchanged }
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// There is nothing to check, or nothing to be seen.
    NotApplicable,
    /// Nothing to do.
    Ok,
    /// Something to look at, which is not in the way.
    Warning,
    /// Something in the way.
    Failed,
}

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check.
    pub id: &'static str,
    /// What it is about.
    pub title: &'static str,
    /// How it ended.
    pub result: Outcome,
    /// What was seen, a line for each thing or device.
    pub evidence: Vec<String>,
    /// What to do; none when there is nothing to do.
    pub cure: Option<String>,
}

/// A check.
#[derive(Debug)]
pub struct Check {
    /// Its stable name.
    pub id: &'static str,
    /// What it is about, in a few words.
    pub title: &'static str,
    /// What it is about, why that matters, and how it is seen.
    pub explanation: &'static str,
    judge: fn(&Facts) -> Verdict,
}

/// Runs every check.
pub fn examine(facts: &Facts) -> Vec<Finding> {
    let finding = |check: &Check| {
        let Verdict { result, mut evidence, cure } = (check.judge)(facts);
        if evidence.len() > MOST_LINES {
            let more = evidence.len() - MOST_LINES;
            evidence.truncate(MOST_LINES);
            evidence.push(format!("and {more} more"));
        }
        Finding { id: check.id, title: check.title, result, evidence, cure }
    };
    CHECKS.iter().map(finding).collect()
}

struct Verdict {
    result: Outcome,
    evidence: Vec<String>,
    cure: Option<String>,
}

fn ok(evidence: impl Into<String>) -> Verdict {
    Verdict { result: Outcome::Ok, evidence: vec![evidence.into()], cure: None }
}

fn not_applicable(evidence: impl Into<String>) -> Verdict {
    Verdict { result: Outcome::NotApplicable, evidence: vec![evidence.into()], cure: None }
}

fn warning(evidence: impl Into<String>, cure: impl Into<String>) -> Verdict {
    Verdict { result: Outcome::Warning, evidence: vec![evidence.into()], cure: Some(cure.into()) }
}

fn failed(evidence: impl Into<String>, cure: impl Into<String>) -> Verdict {
    Verdict { result: Outcome::Failed, evidence: vec![evidence.into()], cure: Some(cure.into()) }
}

/// One line for each device that is ill; the gravest decides.
fn each(
    ill: impl IntoIterator<Item = (Outcome, String)>,
    healthy: impl Into<String>,
    cure: impl Into<String>,
) -> Verdict {
    let ill: Vec<(Outcome, String)> = ill.into_iter().collect();
    match ill.iter().map(|(result, _)| *result).max() {
        None => ok(healthy),
        Some(result) => Verdict {
            result,
            evidence: ill.into_iter().map(|(_, line)| line).collect(),
            cure: (result > Outcome::Ok).then(|| cure.into()),
        },
    }
}

/// The checks, in the order in which they are told: host, devices, node.
pub const CHECKS: [Check; 28] = [
    Check {
        id: "tee",
        title: "Confidential virtual machines",
        explanation: "A confidential container runs in a virtual machine whose memory the host cannot read: AMD SEV-SNP or Intel TDX. KVM says in \
            sys/module/kvm_amd/parameters/sev_snp or sys/module/kvm_intel/parameters/tdx whether it can make such machines; what CPU and firmware \
            say besides is shown as evidence. Without one of the two, cc-manager turns the GPUs' CC mode off by default.",
        judge: tee,
    },
    Check {
        id: "iommu",
        title: "IOMMU",
        explanation: "VFIO hands a GPU to a virtual machine only behind an IOMMU. The kernel shows one as groups in sys/kernel/iommu_groups; \
            groups of VFIO's no-IOMMU mode protect nothing and do not count.",
        judge: iommu,
    },
    Check {
        id: "lockdown",
        title: "Kernel lockdown",
        explanation: "A locked-down kernel (Secure Boot, usually) refuses to map the registers of a PCI device from user space, so that the CC mode of a GPU \
            cannot be read or changed through sysfs. Reading is from sys/kernel/security/lockdown. Where that file is missing, which proves nothing, \
            a BAR is mapped without access and at once unmapped: EPERM is the answer of a locked-down kernel.",
        judge: lockdown,
    },
    Check {
        id: "nvidia-driver",
        title: "NVIDIA or nouveau driver on the host",
        explanation: "A GPU that the host's own driver uses can neither be given to a virtual machine nor have its mode changed. ccnode never takes a GPU \
            from the nvidia driver: that driver belongs into the guest.",
        judge: nvidia_driver,
    },
    Check {
        id: "vfio-driver",
        title: "vfio-pci in the kernel",
        explanation: "GPUs are handed over by the kernel's vfio-pci driver, as a module or built in.",
        judge: vfio_driver,
    },
    Check {
        id: "vfio-nodes",
        title: "VFIO device nodes",
        explanation: "Virtual machines reach GPUs through /dev/vfio/<group> and /dev/vfio/vfio, or on kernels with iommufd through /dev/vfio/devices/vfioN and \
            /dev/iommu. One of the two ways is needed.",
        judge: vfio_nodes,
    },
    Check {
        id: "address-width",
        title: "Huge BARs and the CPU's address width",
        explanation: "A GPU's memory window can be hundreds of GiB. It must lie below the highest physical address of the CPU, or nobody can reach it.",
        judge: address_width,
    },
    Check {
        id: "gpu-bus",
        title: "Devices answer",
        explanation: "Configuration space is read from the device itself. All ones, at its ids or at 0xf0, mean that the device is off the bus although sysfs still \
            shows the kernel's memory of it. 0x0001 means that it has not come back from a reset.",
        judge: gpu_bus,
    },
    Check {
        id: "gpu-power",
        title: "Devices have power",
        explanation: "A device in D3cold has no power. Reading anything of it would make the kernel wake it, so ccnode does not ask it. GPUs have been seen to stay \
            there after confidential pods came and went often.",
        judge: gpu_power,
    },
    Check {
        id: "gpu-security-fault",
        title: "Security fault",
        explanation: "Hopper and Blackwell GPUs lock themselves after a security fault and show a word in configuration space that is 0 in health. Bits whose \
            meaning is public are named.",
        judge: gpu_security_fault,
    },
    Check {
        id: "gpu-firewall",
        title: "BAR firewall",
        explanation: "Blackwell GPUs keep BAR0 closed after a reset until their firmware has booted. A firewall that stays closed means firmware that does not boot.",
        judge: gpu_firewall,
    },
    Check {
        id: "gpu-bar0",
        title: "BAR0 has an address",
        explanation: "Without an address for BAR0 no register can be reached. The platform's firmware assigns it; large windows need 64-bit addresses.",
        judge: gpu_bar0,
    },
    Check {
        id: "gpu-reset",
        title: "Devices can be reset",
        explanation: "A new CC mode takes effect with a reset of the function, and VFIO resets a device between two virtual machines.",
        judge: gpu_reset,
    },
    Check {
        id: "gpu-model",
        title: "Models are known",
        explanation: "What a model can do, and where its registers are, is in the device table. A chip that is not there is left alone.",
        judge: gpu_model,
    },
    Check {
        id: "gpu-cc",
        title: "GPUs with confidential computing",
        explanation: "Confidential computing needs Hopper or newer. Parts that hang on a Grace CPU by NVLink-C2C can be turned off only.",
        judge: gpu_cc,
    },
    Check {
        id: "gpu-driver",
        title: "GPUs are bound to VFIO",
        explanation: "vfio-manager binds the GPUs and NVSwitches of a node that is to run virtual machines to vfio-pci. Only such GPUs are offered to the kubelet.",
        judge: gpu_driver,
    },
    Check {
        id: "exchanged-files",
        title: "Files of cc-manager and vfio-manager",
        explanation: "In /run/nvidia/ccnode cc-manager says what it is changing (devices.json) and vfio-manager what devices were before (bindings.json). \
            vfio-manager binds nothing where it cannot write there, and nothing while a change of modes is under way.",
        judge: exchanged_files,
    },
    Check {
        id: "iommu-group",
        title: "IOMMU groups are viable",
        explanation: "VFIO takes an IOMMU group only whole: every function in it must have a VFIO driver, or none.",
        judge: iommu_group,
    },
    Check {
        id: "acs",
        title: "Isolation by the ports above (ACS)",
        explanation: "Functions share an IOMMU group when a port above them would let them reach each other unseen. Access control services (ACS) of root ports and \
            switches prevent that; firmware turns them on.",
        judge: acs,
    },
    Check {
        id: "gpu-link",
        title: "PCI Express links",
        explanation: "A link with fewer lanes than device and slot have works slowly, and often tells of a bad contact. Speed is not judged: idle links slow down.",
        judge: gpu_link,
    },
    Check {
        id: "holders",
        title: "Who holds device nodes",
        explanation: "A process that holds /dev/nvidia* keeps the host's driver busy. One that holds /dev/vfio/* is a virtual machine with a GPU, as it should be; ccnode \
            changes nothing of such a GPU. Processes are seen in proc, all of them only as root in the host's PID namespace.",
        judge: holders,
    },
    Check {
        id: "unreadable",
        title: "All could be read",
        explanation: "Files of sysfs about NVIDIA devices that could not be read or understood. Where it cannot even be told what a function is, it may be a \
            GPU that no other check and no agent sees; cc-manager changes no mode on such a node.",
        judge: unreadable,
    },
    Check {
        id: "kubelet-socket",
        title: "Kubelet's socket for device plugins",
        explanation: "The device plugin registers at /var/lib/kubelet/device-plugins/kubelet.sock. The kubelet makes it when it starts.",
        judge: kubelet_socket,
    },
    Check {
        id: "pod-resources-socket",
        title: "Kubelet's pod resources socket",
        explanation: "Kata asks at /var/lib/kubelet/pod-resources/kubelet.sock which devices the kubelet gave to a pod, before the pod's virtual machine starts.",
        judge: pod_resources_socket,
    },
    Check {
        id: "pod-resources-get",
        title: "Kubelet's pod resources Get",
        explanation: "Kata's question is the method Get. It is behind the kubelet's feature gate KubeletPodResourcesGet, which is on by default since Kubernetes 1.34. \
            doctor asks it for a pod that does not exist, and expects to be told so.",
        judge: pod_resources_get,
    },
    Check {
        id: "cdi-directory",
        title: "CDI directory",
        explanation: "The device plugin writes CDI files to /var/run/cdi, in which Kata looks up the devices of a pod (and in /etc/cdi).",
        judge: cdi_directory,
    },
    Check {
        id: "cdi-files",
        title: "CDI files",
        explanation: "One invalid file, or two that define the same device, make Kata's Go runtime fail every GPU pod of the node. It knows versions 0.3.0 to 0.6.0.",
        judge: cdi_files,
    },
    Check {
        id: "kata-runtime",
        title: "Kata in containerd",
        explanation: "Runtime classes such as kata-qemu-nvidia-gpu-snp name a handler that containerd's configuration must have; kata-deploy puts it there. Runtime classes \
            themselves are objects of the cluster, which the node's files do not show.",
        judge: kata_runtime,
    },
];

// ---- the host

fn tee(facts: &Facts) -> Verdict {
    let tee = &facts.report.host_details.tee;
    let name = match tee.tee {
        Tee::SevSnp => Some("SEV-SNP"),
        Tee::Tdx => Some("TDX"),
        Tee::None => None,
    };
    let parameters: Vec<String> =
        tee.kvm_parameters.iter().map(|parameter| format!("{} says {}", parameter.path, parameter.value)).collect();
    if let Some(name) = name {
        let versions: Vec<String> =
            tee.versions.iter().map(|version| format!("{} says {}", version.path, version.value)).collect();
        let versions = if versions.is_empty() { "not readable in sysfs".into() } else { versions.join(", ") };
        let evidence = vec![format!("{name}: {}", parameters.join(", ")), format!("Versions: {versions}")];
        return Verdict { result: Outcome::Ok, evidence, cure: None };
    }
    let mut evidence = parameters;
    if evidence.is_empty() {
        evidence.push("KVM has neither a parameter sev_snp nor tdx".into());
    }
    let flags = if tee.cpu_flags.is_empty() { "none of them".into() } else { tee.cpu_flags.join(" ") };
    evidence.push(format!(
        "CPU {}, flags {flags}; /dev/kvm {}, /dev/sev {}",
        tee.cpu_vendor.as_deref().unwrap_or("unknown"),
        presence(tee.dev_kvm),
        presence(tee.dev_sev)
    ));
    let cure = if facts.report.host_details.hypervisor {
        "this is a virtual machine itself; confidential pods need the bare host"
    } else {
        match tee.cpu_vendor.as_deref() {
            Some("AuthenticAMD") => {
                "turn SEV-SNP on in the firmware setup, the IOMMU too and not in passthrough mode, and use a kernel whose kvm_amd has SEV-SNP"
            }
            Some("GenuineIntel") => {
                "turn TDX on in the firmware setup, and load kvm_intel with tdx=1 on a kernel that has it"
            }
            _ => "use a host with AMD SEV-SNP or Intel TDX, turned on in its firmware setup and in KVM",
        }
    };
    Verdict { result: Outcome::Failed, evidence, cure: Some(cure.into()) }
}

fn presence(present: bool) -> &'static str {
    if present { "present" } else { "absent" }
}

fn iommu(facts: &Facts) -> Verdict {
    let details = &facts.report.host_details;
    let words: Vec<&str> =
        details.command_line.iter().map(String::as_str).filter(|word| word.contains("iommu")).collect();
    let words = if words.is_empty() { String::new() } else { format!("; kernel command line: {}", words.join(" ")) };
    if facts.report.host.iommu == IommuState::On {
        return ok(format!("{} groups{words}", details.iommu_groups));
    }
    let argument = match details.tee.cpu_vendor.as_deref() {
        Some("AuthenticAMD") => "amd_iommu=on",
        Some("GenuineIntel") => "intel_iommu=on",
        _ => "intel_iommu=on (Intel) or amd_iommu=on (AMD)",
    };
    failed(
        format!("The kernel has no IOMMU groups{words}"),
        format!(
            "turn the IOMMU (VT-d, AMD-Vi) on in the firmware setup and boot with {argument}; a virtual machine needs a virtual IOMMU"
        ),
    )
}

fn lockdown(facts: &Facts) -> Verdict {
    let found = &facts.report.host_details.lockdown;
    let active = match found.mode {
        Lockdown::None => return ok(format!("None: {}", found.evidence)),
        Lockdown::Unknown => return not_applicable(format!("Not known: {}", found.evidence)),
        Lockdown::Integrity => "integrity",
        Lockdown::Confidentiality => "confidentiality",
    };
    let evidence = format!("Active ({active}): {}", found.evidence);
    if facts.report.parts().all(|part| part.function.is_vfio_bound()) {
        warning(
            evidence,
            "nothing while GPUs stay on vfio-pci, which lockdown allows; to change modes through sysfs, turn Secure Boot or lockdown= off",
        )
    } else {
        failed(evidence, "bind the GPUs to vfio-pci, which lockdown allows, or turn Secure Boot or lockdown= off")
    }
}

fn nvidia_driver(facts: &Facts) -> Verdict {
    const NAMES: [&str; 2] = ["nvidia", "nouveau"];
    let holds = |part: &Device| {
        let driver = part.function.driver.as_deref().filter(|driver| NAMES.contains(driver))?;
        Some((Outcome::Failed, format!("{}: Bound to {driver}", part.function.bdf)))
    };
    let bound: Vec<_> = facts.report.parts().filter_map(holds).collect();
    let loaded: Vec<&str> =
        NAMES.into_iter().filter(|name| facts.report.host_details.module(name).is_present()).collect();
    let cure = "take the GPU driver off this host (under the GPU Operator: driver.enabled=false for this node), keep it from loading, and reboot or unload it";
    if bound.is_empty() && !loaded.is_empty() {
        return warning(format!("Loaded, with no GPU bound to it: {}", loaded.join(", ")), cure);
    }
    each(bound, "Neither is loaded", cure)
}

fn vfio_driver(facts: &Facts) -> Verdict {
    if let Some(part) = facts.report.parts().find(|part| part.function.is_vfio_bound()) {
        return ok(format!("In use by {}", part.function.bdf));
    }
    match facts.report.host_details.module("vfio_pci") {
        ModuleState::Loaded => ok("Loaded"),
        ModuleState::BuiltIn => ok("Built into the kernel"),
        ModuleState::Available => warning(
            "On disk, not loaded",
            "vfio-manager loads it where it may; else load it at boot: echo vfio-pci > /etc/modules-load.d/vfio-pci.conf",
        ),
        ModuleState::Missing => failed(
            "The kernel has no module vfio_pci",
            "install the kernel's module package that has vfio-pci, or use a kernel with CONFIG_VFIO_PCI",
        ),
        ModuleState::Unknown => not_applicable("The kernel's list of modules is not seen here"),
    }
}

fn vfio_nodes(facts: &Facts) -> Verdict {
    let host = &facts.report.host;
    let details = &facts.report.host_details;
    let in_kernel =
        details.module("vfio_pci").is_present() || facts.report.parts().any(|part| part.function.is_vfio_bound());
    let seen = format!("/dev/iommu {}, /dev/vfio/vfio {}", presence(host.dev_iommu), presence(host.dev_vfio));
    match (host.dev_iommu || host.dev_vfio, in_kernel) {
        (true, _) => ok(seen),
        (false, false) => not_applicable(format!("{seen}; vfio-pci is not loaded")),
        (false, true) => {
            failed(seen, "load vfio_iommu_type1 or iommufd; in a container, mount the host's /dev or give --root")
        }
    }
}

fn address_width(facts: &Facts) -> Verdict {
    let Some(bits) = facts.report.host_details.physical_address_bits else {
        return not_applicable("proc/cpuinfo does not tell the width of physical addresses");
    };
    let mut largest = 0_u64;
    let mut beyond = Vec::new();
    for part in facts.report.parts() {
        for bar in part.function.bars.iter().filter(|bar| !bar.io) {
            largest = largest.max(bar.size);
            let last = bar.start.saturating_add(bar.size.saturating_sub(1));
            if last.checked_shr(bits.into()).unwrap_or(0) > 0 {
                let line = format!("{}: BAR{} ends at {last:#x}, beyond {bits} bits", part.function.bdf, bar.number);
                beyond.push((Outcome::Failed, line));
            }
        }
    }
    each(
        beyond,
        format!("{bits} bits; the largest BAR has {} MiB", largest >> 20),
        "set the highest MMIO address in the firmware setup below the CPU's limit; for a virtual machine, give it the host's address width",
    )
}

// ---- the devices

/// A line for each device with such a fault.
fn with_fault(facts: &Facts, fits: impl Fn(&Fault) -> Option<Outcome>) -> Vec<(Outcome, String)> {
    let lines = facts.report.devices.iter().flat_map(|device| {
        device.faults.iter().filter_map(|fault| Some((fits(fault)?, format!("{}: {fault}", device.function.bdf))))
    });
    lines.collect()
}

fn parts(facts: &Facts) -> String {
    let gpus = facts.report.gpus().count();
    let switches = facts.report.parts().count() - gpus;
    let count = |number: usize, one: &str, many: &str| format!("{number} {}", if number == 1 { one } else { many });
    match switches {
        0 => count(gpus, "GPU", "GPUs"),
        _ => format!("{} and {}", count(gpus, "GPU", "GPUs"), count(switches, "NVSwitch", "NVSwitches")),
    }
}

fn gpu_bus(facts: &Facts) -> Verdict {
    let ill = with_fault(facts, |fault| match fault {
        Fault::OffBus | Fault::OtherDevice { .. } | Fault::ConfigUnreadable { .. } | Fault::ConfigBroken => {
            Some(Outcome::Failed)
        }
        Fault::NotReady => Some(Outcome::Warning),
        _ => None,
    });
    let reset_only = ill.iter().all(|(result, _)| *result == Outcome::Warning);
    let cure = if reset_only {
        "wait: devices come back from a reset within seconds"
    } else {
        "drain the node and power it off and on; if it comes again, reseat or replace the board, and look for AER errors in the kernel's log"
    };
    let verb = if facts.report.parts().count() == 1 { "answers" } else { "answer" };
    each(ill, format!("{} {verb} in configuration space", parts(facts)), cure)
}

fn gpu_power(facts: &Facts) -> Verdict {
    let asleep = with_fault(facts, |fault| (*fault == Fault::D3cold).then_some(Outcome::Failed));
    each(
        asleep,
        format!("{}, none in D3cold", parts(facts)),
        "keep the ports above from cutting power (echo 0 > d3cold_allowed of the device, power/control=on of its port); if it does not wake, power the node off and on",
    )
}

fn gpu_security_fault(facts: &Facts) -> Verdict {
    let faults = with_fault(facts, |fault| matches!(fault, Fault::SecurityFault { .. }).then_some(Outcome::Failed));
    let readable = |part: &&Device| part.liveness == Some(hw_probe::config::Liveness::Answers);
    if faults.is_empty() && !facts.report.parts().any(|part| readable(&part)) {
        return not_applicable("No device answers");
    }
    each(faults, "No device shows one", "power the node off and on; if it comes again, ask NVIDIA with the word shown")
}

fn gpu_firewall(facts: &Facts) -> Verdict {
    if !facts.report.parts().any(|part| part.function.model.as_ref().is_some_and(|model| model.bar_firewall.is_some()))
    {
        return not_applicable("No device of this node has one");
    }
    let closed = with_fault(facts, |fault| (*fault == Fault::FirewallClosed).then_some(Outcome::Failed));
    each(closed, "Open", "wait a minute and ask again; if it stays closed, reset the GPU or power the node off and on")
}

fn gpu_bar0(facts: &Facts) -> Verdict {
    let without = with_fault(facts, |fault| (*fault == Fault::NoBar0).then_some(Outcome::Failed));
    each(
        without,
        format!("{} with an address for BAR0", parts(facts)),
        "turn Above 4G Decoding (64-bit MMIO) on in the firmware setup, or boot with pci=realloc",
    )
}

fn gpu_reset(facts: &Facts) -> Verdict {
    let without = with_fault(facts, |fault| (*fault == Fault::NoReset).then_some(Outcome::Failed));
    let methods: BTreeSet<&str> =
        facts.report.parts().filter_map(|part| part.function.reset_methods.first().map(String::as_str)).collect();
    let methods: Vec<&str> = methods.into_iter().collect();
    each(
        without,
        format!("By {}", methods.join(", ")),
        "let the kernel use the reset it knows: echo default > reset_method of the device; a virtual machine needs a device that is passed with FLR",
    )
}

fn gpu_model(facts: &Facts) -> Verdict {
    let unknown = with_fault(facts, |fault| matches!(fault, Fault::UnknownChip { .. }).then_some(Outcome::Warning));
    let names: BTreeSet<String> = facts.report.parts().map(Device::product).collect();
    let names: Vec<String> = names.into_iter().collect();
    each(unknown, names.join(", "), "update ccnode; until then such a device is left alone")
}

fn gpu_cc(facts: &Facts) -> Verdict {
    let judge = |gpu: &Device| {
        let model = gpu.function.model.as_ref()?;
        let bdf = gpu.function.bdf;
        let why = match model.cc_enable {
            CcEnable::Yes => return None,
            CcEnable::No if model.architecture < Architecture::Hopper => "is older than Hopper",
            CcEnable::No => "cannot be put into CC mode",
            CcEnable::OffOnly => "hangs on a Grace CPU by NVLink-C2C: its CC mode can be turned off only",
            CcEnable::BySubsystem => "may or may not be able to: its subsystem id is not in the device table",
        };
        Some((Outcome::Warning, format!("{bdf}: {} {why}", gpu.product())))
    };
    let cannot: Vec<_> = facts.report.gpus().filter_map(judge).collect();
    let known = facts.report.gpus().filter(|gpu| gpu.function.model.is_some()).count();
    if known == 0 {
        return not_applicable("No GPU of a known model");
    }
    let all = cannot.len() == known;
    let mut verdict = each(
        cannot,
        format!("{known} of {} can", facts.report.gpus().count()),
        "keep confidential pods off these GPUs; H100, H200, B200, B300 and RTX PRO 6000 Blackwell Server Edition can",
    );
    if all {
        verdict.result = Outcome::Failed;
    }
    verdict
}

fn gpu_driver(facts: &Facts) -> Verdict {
    let judge = |part: &Device| {
        let PciFunction { bdf, driver, .. } = &part.function;
        match driver.as_deref() {
            _ if part.function.is_vfio_bound() => None,
            None => Some((Outcome::Warning, format!("{bdf}: {} has no driver", part.product()))),
            Some(driver) => Some((Outcome::Failed, format!("{bdf}: {} is bound to {driver}", part.product()))),
        }
    };
    let unbound: Vec<_> = facts.report.parts().filter_map(judge).collect();
    each(
        unbound,
        format!("{} on VFIO", parts(facts)),
        "run vfio-manager on this node, which binds them (label nvidia.com/gpu.workload.config=vm-passthrough under the GPU Operator), or: vfio-manage bind --all",
    )
}

/// cc-manager writes at every step of a change; one of the steps may wait for pods to end.
const LONG_CHANGE: jiff::SignedDuration = jiff::SignedDuration::from_mins(10);

fn exchanged_files(facts: &Facts) -> Verdict {
    let Exchanged { found, under_way } = &facts.exchanged;
    match found {
        Err(trouble) => {
            return failed(
                trouble.clone(),
                format!(
                    "make {STATE_DIR} a directory of root's alone, mode 0755, and remove a file that cannot be read; run as root"
                ),
            );
        }
        Ok(false) => return not_applicable(format!("There are none of this boot in {STATE_DIR}")),
        Ok(true) => {}
    }
    let Some(UnderWay { change, written_at, is_forgotten }) = under_way else {
        return ok("No change of modes is under way");
    };
    let evidence = format!(
        "{DEVICES_FILE}: Changing the mode to {} (at {}, since {}), last written {written_at}",
        change.target, change.step, change.started_at
    );
    if !is_forgotten {
        return ok(evidence);
    }
    warning(
        evidence,
        format!(
            "see cc-manager's log for what it waits for, and start it if it does not run: it ends the change. If it is gone for good, \
             remove {STATE_DIR}/{DEVICES_FILE}: until then vfio-manager binds nothing and the device plugin offers nothing"
        ),
    )
}

fn iommu_group(facts: &Facts) -> Verdict {
    if facts.report.host.iommu == IommuState::Off {
        return not_applicable("There is no IOMMU");
    }
    let mut ill = Vec::new();
    for part in facts.report.parts() {
        let bdf = part.function.bdf;
        let Some(group) = part.function.iommu_group else {
            ill.push((Outcome::Failed, format!("{bdf}: Is in no IOMMU group")));
            continue;
        };
        for Blocker { bdf: member, driver } in &part.group_blockers {
            ill.push((Outcome::Failed, format!("{bdf}: {member} in its IOMMU group {group} is bound to {driver}")));
        }
    }
    each(
        ill,
        format!("{}, each in a viable group", parts(facts)),
        "unbind those functions or bind them to vfio-pci (vfio-manager does that for a GPU's own audio function); for strangers in the group see the check acs",
    )
}

fn acs(facts: &Facts) -> Verdict {
    if facts.report.host.iommu == IommuState::Off {
        return not_applicable("There is no IOMMU");
    }
    let mut ill = Vec::new();
    for part in facts.report.parts().filter(|part| !part.group_strangers.is_empty()) {
        let strangers: Vec<String> = part.group_strangers.iter().map(ToString::to_string).collect();
        let ports: Vec<String> = part
            .ports
            .iter()
            .filter(|port| port.acs.lets_neighbours_mix())
            .map(|port| match &port.acs {
                Acs::Off { missing } => format!("{} lacks {}", port.bdf, missing.join(" and ")),
                _ => format!("{} has no ACS", port.bdf),
            })
            .collect();
        let ports = if ports.is_empty() { "no port is seen to lack ACS".into() } else { ports.join(", ") };
        let line = format!("{}: Shares its IOMMU group with {}: {ports}", part.function.bdf, strangers.join(", "));
        ill.push((Outcome::Warning, line));
    }
    each(
        ill,
        "No GPU or NVSwitch shares its IOMMU group with another card",
        "turn ACS on in the firmware setup (on some boards it hides under AER); devices of one group go to one virtual machine together",
    )
}

fn gpu_link(facts: &Facts) -> Verdict {
    let judge = |part: &Device| {
        let link = part.function.link.as_ref()?;
        let bdf = part.function.bdf;
        if link.width == 0 {
            return Some((Outcome::Failed, format!("{bdf}: The link is down")));
        }
        let fewer = link.width < link.max_width;
        fewer.then(|| (Outcome::Warning, format!("{bdf}: {} of {} lanes", link.width, link.max_width)))
    };
    if facts.report.parts().all(|part| part.function.link.is_none()) {
        return not_applicable("No device tells of its link");
    }
    let narrow: Vec<_> = facts.report.parts().filter_map(judge).collect();
    each(
        narrow,
        "Every link has all its lanes",
        "reseat the board or its riser, and look for AER errors in the kernel's log",
    )
}

fn holders(facts: &Facts) -> Verdict {
    let found = &facts.report.holders;
    let line = |holder: &Holder| {
        let Holder { node, pid, comm, pod_uid, .. } = holder;
        let pod = pod_uid.as_ref().map_or_else(String::new, |uid| format!(", pod {uid}"));
        let pid = pid.map_or_else(String::new, |pid| format!(" (pid {pid}{pod})"));
        format!("{node} is held by {comm}{pid}")
    };
    let driven = found.list.iter().any(|holder| holder.node.starts_with("/dev/nvidia"));
    let mut evidence: Vec<String> = found.list.iter().map(line).collect();
    if evidence.is_empty() {
        match &found.limit {
            None => return ok("Nobody holds any"),
            Some(limit) => return not_applicable(format!("Nobody is seen to hold any. {limit}")),
        }
    }
    evidence.extend(found.limit.clone());
    let cure = driven.then(|| "stop these processes: they keep the host's GPU driver from being unloaded".to_owned());
    Verdict { result: if driven { Outcome::Warning } else { Outcome::Ok }, evidence, cure }
}

fn unreadable(facts: &Facts) -> Verdict {
    let Report { devices, problems, doubts, .. } = &facts.report;
    let ours: BTreeSet<_> = devices.iter().map(|device| device.function.bdf).collect();
    let concerns = |bdf: &Option<hw_probe::Bdf>| bdf.is_none_or(|bdf| ours.contains(&bdf));
    let lesser = problems.iter().filter(|problem| concerns(&problem.bdf) && !doubts.contains(problem));
    let line = |result| move |problem: &Problem| (result, format!("{}: {}", problem.path, problem.message));
    each(
        doubts.iter().map(line(Outcome::Failed)).chain(lesser.map(line(Outcome::Warning))),
        "Nothing was in the way",
        "run as root on the host itself; a file that stays unreadable tells of a sick device or kernel",
    )
}

// ---- the node

fn no_node_files(facts: &Facts) -> Option<Verdict> {
    (!facts.has_node_files).then(|| not_applicable("The tree has no files of the node besides sys, proc and dev"))
}

fn socket(facts: &Facts, socket: &Socket) -> Verdict {
    no_node_files(facts).unwrap_or_else(|| match &socket.trouble {
        Some(trouble) => failed(format!("{}: {trouble}", socket.path), "run as root; if the path is wrong, fix the mount"),
        None if socket.present => ok(socket.path.clone()),
        None if facts.report.node.kubelet.folder => failed(
            format!("{} is not there", socket.path),
            "start the kubelet, and see its log: it makes the socket when it starts; in a container, mount the folder",
        ),
        None => failed(
            "There is no /var/lib/kubelet: no kubelet has run here",
            "join the node to a cluster; where the kubelet's root folder is elsewhere, link it; in a container, mount it",
        ),
    })
}

fn kubelet_socket(facts: &Facts) -> Verdict {
    socket(facts, &facts.report.node.kubelet.plugin_socket)
}

fn pod_resources_socket(facts: &Facts) -> Verdict {
    socket(facts, &facts.report.node.kubelet.pod_resources_socket)
}

fn pod_resources_get(facts: &Facts) -> Verdict {
    match &facts.get {
        Get::Answers => ok("It answers"),
        Get::NotAsked { cause } => not_applicable(format!("Not asked: {cause}")),
        Get::Disabled { message } => failed(
            format!("The kubelet refuses it: {message}"),
            "set the kubelet's feature gate KubeletPodResourcesGet=true (on by default since Kubernetes 1.34) and restart it",
        ),
        Get::Fails { message } => {
            warning(format!("No answer: {message}"), "see the kubelet's log; run as root on the host itself")
        }
    }
}

fn cdi_directory(facts: &Facts) -> Verdict {
    no_node_files(facts).unwrap_or_else(|| {
        // The last is the folder of agents.
        match facts.report.node.cdi.last() {
            Some(folder) if folder.present => ok(format!("{}: {} files", folder.path, folder.files.len())),
            Some(folder) => failed(
                format!("{} is not there", folder.path),
                "run the device plugin, which makes it; its pod needs the folder as a hostPath of type DirectoryOrCreate",
            ),
            None => not_applicable("Not looked at"),
        }
    })
}

fn cdi_files(facts: &Facts) -> Verdict {
    if let Some(verdict) = no_node_files(facts) {
        return verdict;
    }
    let files = || facts.report.node.cdi.iter().flat_map(|folder| folder.files.iter().map(move |file| (folder, file)));
    let ill = files().filter_map(|(folder, file)| {
        let trouble = file.trouble.as_ref()?;
        Some((Outcome::Failed, format!("{}/{}: {trouble}", folder.path, file.file)))
    });
    if files().next().is_none() {
        return not_applicable("There are none");
    }
    let kinds: BTreeSet<&str> = files().filter_map(|(_, file)| file.cdi_kind.as_deref()).collect();
    let kinds: Vec<&str> = kinds.into_iter().collect();
    each(ill, kinds.join(", "), "repair or remove these files: one that is invalid fails every GPU pod of the node")
}

fn kata_runtime(facts: &Facts) -> Verdict {
    if let Some(verdict) = no_node_files(facts) {
        return verdict;
    }
    let kata = &facts.report.node.kata;
    if !kata.troubles.is_empty() {
        let lines = kata.troubles.iter().map(|trouble| (Outcome::Warning, trouble.clone()));
        return each(
            lines,
            "",
            "repair the configuration; containerd --config FILE config dump shows what it makes of it",
        );
    }
    let cdi = match kata.enable_cdi {
        Some(on) => format!("; enable_cdi = {on} (Kata looks CDI files up by itself)"),
        None => String::new(),
    };
    if !kata.runtimes.is_empty() {
        return ok(format!("{}{cdi}", kata.runtimes.join(", ")));
    }
    let evidence = if kata.containerd_files.is_empty() {
        "/etc/containerd/config.toml is not there, so its handlers are not seen".to_owned()
    } else {
        format!("No handler of Kata in {}", kata.containerd_files.join(", "))
    };
    warning(
        evidence,
        "install Kata with kata-deploy and its NVIDIA GPU handlers; where containerd is configured elsewhere, look there",
    )
}
