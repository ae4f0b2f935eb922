//! What a person wants to know of the host besides [`crate::HostFacts`]: the evidence, not the verdict.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::mmap::map_without_access;
use crate::sysfs::{Node, excerpt, read_head};
use crate::{Inventory, Lockdown, SysRoot, Tee};

/// Evidence about the host. Reading it opens no device; see [`LockdownFinding`] for the one thing that is tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDetails {
    /// Confidential virtual machines.
    pub tee: TeeEvidence,
    /// Kernel lockdown.
    pub lockdown: LockdownFinding,
    /// IOMMU groups, those of VFIO's no-IOMMU mode left out.
    pub iommu_groups: u32,
    /// Words of the kernel's command line that concern IOMMU, VFIO, lockdown, TEE and GPU drivers.
    pub command_line: Vec<String>,
    /// Width of physical addresses in bits, as the CPU says.
    pub physical_address_bits: Option<u8>,
    /// Whether the CPU says that it is a virtual one.
    pub hypervisor: bool,
    /// The kernel modules that matter here, in a fixed order.
    pub modules: Vec<Module>,
}

/// What the host's kernel and CPU say of confidential virtual machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TeeEvidence {
    /// The verdict, by KVM's module parameters alone.
    pub tee: Tee,
    /// The CPU's vendor, `AuthenticAMD` or `GenuineIntel`.
    pub cpu_vendor: Option<String>,
    /// Those of the CPU's flags that concern it: `sev`, `sev_es`, `sev_snp`, `tdx_host_platform`, `tme`.
    pub cpu_flags: Vec<String>,
    /// KVM's parameters that exist, with their text.
    pub kvm_parameters: Vec<Parameter>,
    /// Whether `/dev/kvm` exists.
    pub dev_kvm: bool,
    /// Whether `/dev/sev` exists (the AMD secure processor's driver has started).
    pub dev_sev: bool,
    /// Versions of firmware and modules that sysfs shows, with their paths: AMD's secure processor (the boot loader's and the
    /// trusted environment's, since Linux 6.11) and Intel's TDX module (kernels with a `tdx_host` device). The version of the
    /// SEV-SNP interface itself is told by `/dev/sev` alone, which is not opened here.
    pub versions: Vec<Parameter>,
}

/// A module parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameter {
    /// Path below the root.
    pub path: String,
    /// Its text.
    pub value: String,
}

/// Lockdown and how it is known.
///
/// Without a lockdown file the running machine is asked: a page of a BAR of a function that no VFIO driver holds is mapped
/// without access and unmapped at once. The kernel refuses that with `EPERM` before all else when it is locked down;
/// no register is touched either way, but a refusal leaves a line in the kernel's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockdownFinding {
    /// The mode; `integrity` means at least that where it is inferred.
    pub mode: Lockdown,
    /// Whether it is inferred rather than read.
    pub inferred: bool,
    /// How it is known, or why not.
    pub evidence: String,
}

/// A kernel module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// Where it is.
    pub state: ModuleState,
}

/// Whether a module's code is in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModuleState {
    /// Loaded.
    Loaded,
    /// Part of the kernel.
    BuiltIn,
    /// On disk, not loaded.
    Available,
    /// Neither in the kernel nor on disk.
    Missing,
    /// Not in the kernel as far as is seen, and the kernel's list of modules cannot be read.
    Unknown,
}

impl ModuleState {
    /// Whether its code is in the running kernel.
    pub fn is_present(self) -> bool {
        matches!(self, Self::Loaded | Self::BuiltIn)
    }
}

/// Modules told of, in this order.
pub(crate) const MODULES: [&str; 9] =
    ["vfio", "vfio_pci", "vfio_iommu_type1", "iommufd", "kvm_amd", "kvm_intel", "ccp", "nvidia", "nouveau"];

/// A kernel's lists of modules are larger than attributes, and bounded all the same.
const MOST_OF_A_LIST: u64 = 8 << 20;

impl HostDetails {
    /// Reads the evidence below `root`; `inventory` is of the same node.
    pub fn read(root: &SysRoot, inventory: &Inventory) -> Self {
        let mut node = Node::new(root, "", None);
        let command_line = read_text(&root.join("proc/cmdline"), 64 << 10);
        let cpu = read_text(&root.join("proc/cpuinfo"), 64 << 10);
        let words = hints(&command_line);
        let groups = node.entries("sys/kernel/iommu_groups");
        let real = |group: &&String| {
            node.text(&format!("sys/kernel/iommu_groups/{group}/name")).as_deref() != Some("vfio-noiommu")
        };
        let iommu_groups = u32::try_from(groups.iter().filter(real).count()).unwrap_or(u32::MAX);
        Self {
            tee: TeeEvidence::read(&mut node, &cpu, inventory),
            lockdown: LockdownFinding::read(root, inventory, &words),
            iommu_groups,
            command_line: words,
            physical_address_bits: cpu_line(&cpu, "address sizes")
                .and_then(|sizes| sizes.split_once(" bits physical")?.0.trim().parse().ok()),
            hypervisor: cpu_line(&cpu, "flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            modules: modules(root, inventory.host.kernel_release.as_deref()),
        }
    }

    /// The state of one of the modules that are told.
    pub fn module(&self, name: &str) -> ModuleState {
        self.modules.iter().find(|module| module.name == name).map_or(ModuleState::Unknown, |module| module.state)
    }
}

fn read_text(path: &Path, most: u64) -> String {
    String::from_utf8_lossy(&read_head(path, most).unwrap_or_default()).into_owned()
}

/// The words of a kernel's command line that are told; all others may be anybody's secrets.
pub(crate) fn hints(command_line: &str) -> Vec<String> {
    command_line.split_whitespace().filter(|word| is_hint(word)).map(excerpt).collect()
}

fn is_hint(word: &str) -> bool {
    const KEYS: [&str; 14] = [
        "iommu",
        "intel_iommu",
        "amd_iommu",
        "iommu.passthrough",
        "iommu.strict",
        "lockdown",
        "kvm_amd.sev",
        "kvm_amd.sev_es",
        "kvm_amd.sev_snp",
        "kvm_intel.tdx",
        "mem_encrypt",
        "modprobe.blacklist",
        "module_blacklist",
        "pcie_acs_override",
    ];
    let key = word.split('=').next().unwrap_or(word);
    KEYS.contains(&key) || key.starts_with("vfio") || key.starts_with("nouveau.") || key.starts_with("pci=")
}

/// The value of the first line of `/proc/cpuinfo` with this name.
fn cpu_line<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim_end() == name).then_some(value.trim())
    })
}

/// KVM's parameters that concern confidential virtual machines.
pub(crate) const PARAMETERS: [&str; 4] = [
    "sys/module/kvm_amd/parameters/sev",
    "sys/module/kvm_amd/parameters/sev_es",
    "sys/module/kvm_amd/parameters/sev_snp",
    "sys/module/kvm_intel/parameters/tdx",
];

/// CPU flags that concern them.
const FLAGS: [&str; 5] = ["sev", "sev_es", "sev_snp", "tdx_host_platform", "tme"];

/// Those lines of `/proc/cpuinfo` from which anything is told, once each, with those flags only.
pub(crate) fn cpu_facts(text: &str) -> String {
    let mut facts = String::new();
    for name in ["vendor_id", "flags", "address sizes"] {
        let Some(value) = cpu_line(text, name) else { continue };
        let told = |flag: &&str| *flag == "hypervisor" || FLAGS.contains(flag);
        let value = match name {
            "flags" => value.split(' ').filter(told).collect::<Vec<_>>().join(" "),
            _ => excerpt(value),
        };
        facts.extend([name, "\t: ", &value, "\n"]);
    }
    facts
}

impl TeeEvidence {
    fn read(node: &mut Node, cpu: &str, inventory: &Inventory) -> Self {
        let flags = cpu_line(cpu, "flags").unwrap_or_default();
        let mut parameter = |path: &str| {
            let value = excerpt(&node.word(path)?);
            Some(Parameter { path: path.to_owned(), value })
        };
        let kvm_parameters = PARAMETERS.iter().filter_map(|path| parameter(path)).collect();
        let secure_processors = inventory.functions.iter().filter(|function| function.driver.as_deref() == Some("ccp"));
        let versions = secure_processors
            .flat_map(|function| {
                let file = |name| format!("sys/bus/pci/devices/{}/{name}", function.bdf);
                [file("bootloader_version"), file("tee_version")]
            })
            .chain(["sys/devices/faux/tdx_host/version".to_owned()]);
        let versions = versions.filter_map(|path| parameter(&path)).collect();
        Self {
            tee: inventory.host.tee,
            kvm_parameters,
            versions,
            cpu_vendor: cpu_line(cpu, "vendor_id").map(excerpt),
            cpu_flags: flags.split(' ').filter(|flag| FLAGS.contains(flag)).map(str::to_owned).collect(),
            dev_kvm: node.exists("dev/kvm"),
            dev_sev: node.exists("dev/sev"),
        }
    }
}

impl LockdownFinding {
    fn read(root: &SysRoot, inventory: &Inventory, command_line: &[String]) -> Self {
        let mode = inventory.host.lockdown;
        if mode != Lockdown::Unknown {
            return Self { mode, inferred: false, evidence: "sys/kernel/security/lockdown".into() };
        }
        let hint = command_line.iter().find(|word| word.starts_with("lockdown="));
        let hint = hint.map_or_else(String::new, |word| format!("; the kernel's command line has {word}"));
        let no_file = "There is no lockdown file";
        if !root.is_running() {
            let evidence = format!("{no_file}, and a recorded tree cannot be asked{hint}");
            return Self { mode, inferred: false, evidence };
        }
        let Some((bdf, path)) = candidate(root, inventory) else {
            let evidence = format!("{no_file}, and no function has a BAR that may be tried{hint}");
            return Self { mode, inferred: false, evidence };
        };
        let (mode, inferred, what) = judge(&map_without_access(&path));
        Self { mode, inferred, evidence: format!("{no_file}; {bdf}: {what}{hint}") }
    }
}

/// What the answer to the attempt says: the kernel checks lockdown before it checks whether the BAR is taken.
fn judge(answer: &io::Result<()>) -> (Lockdown, bool, String) {
    match answer.as_ref().map_err(|error| error.raw_os_error().map(Errno::from_raw)) {
        Ok(()) => (Lockdown::None, true, "a BAR may be mapped".into()),
        Err(Some(Errno::EINVAL)) => (Lockdown::None, true, "mapping a BAR failed only because a driver has it".into()),
        Err(Some(Errno::EPERM)) => {
            (Lockdown::Integrity, true, "mapping a BAR is refused with EPERM: the kernel is locked down".into())
        }
        Err(Some(Errno::EACCES)) => (Lockdown::Unknown, false, "a BAR may be tried by root alone".into()),
        Err(errno) => {
            let cause = errno.map_or_else(|| "an unknown error".into(), |errno| errno.to_string());
            (Lockdown::Unknown, false, format!("mapping a BAR failed with {cause}"))
        }
    }
}

/// A function whose BAR may be tried: none that a VFIO driver has, one without a driver before others.
fn candidate(root: &SysRoot, inventory: &Inventory) -> Option<(crate::Bdf, std::path::PathBuf)> {
    let fits = inventory.functions.iter().filter(|function| !function.is_vfio_bound() && !function.is_virtual_function);
    let bar = |function: &&crate::PciFunction| {
        let bar = function.bars.iter().find(|bar| !bar.io && bar.size >= 4096)?;
        let path = root.function(function.bdf).join(format!("resource{}", bar.number));
        path.exists().then_some((function.bdf, path))
    };
    let (idle, bound): (Vec<_>, Vec<_>) = fits.partition(|function| function.driver.is_none());
    idle.iter().chain(&bound).find_map(bar)
}

/// One of the lists of modules that a kernel comes with (`modules.dep`).
pub(crate) fn module_list(root: &SysRoot, release: &str, name: &str) -> Option<String> {
    // A release that is no plain name would lead out of the folder.
    if release.contains('/') || release.starts_with('.') {
        return None;
    }
    ["lib/modules", "usr/lib/modules"].iter().find_map(|folder| {
        let path = root.join(folder).join(release).join(name);
        Some(String::from_utf8_lossy(&read_head(&path, MOST_OF_A_LIST).ok()?).into_owned())
    })
}

fn modules(root: &SysRoot, release: Option<&str>) -> Vec<Module> {
    let list = |name: &str| module_list(root, release?, name);
    let (built_in, on_disk) = (list("modules.builtin"), list("modules.dep"));
    let state = |name: &str| {
        let directory = root.join("sys/module").join(name);
        if directory.join("initstate").exists() {
            return ModuleState::Loaded;
        }
        if directory.exists() || built_in.as_deref().is_some_and(|list| lists(list, name)) {
            return ModuleState::BuiltIn;
        }
        match on_disk.as_deref() {
            Some(list) if lists(list, name) => ModuleState::Available,
            Some(_) => ModuleState::Missing,
            None => ModuleState::Unknown,
        }
    };
    MODULES.iter().map(|name| Module { name: (*name).to_owned(), state: state(name) }).collect()
}

/// Lines start with the path of a module: `kernel/drivers/vfio/pci/vfio-pci.ko.xz: ...`. Hyphens and underscores are one.
fn lists(list: &str, name: &str) -> bool {
    list.lines().any(|line| listed(line).is_some_and(|(_, found)| found == name))
}

/// Path and name of the module that a line is about.
pub(crate) fn listed(line: &str) -> Option<(&str, String)> {
    let path = line.split(':').next().unwrap_or(line);
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split_once(".ko").map(|(stem, _)| (path, stem.replace('-', "_")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSysfs;

    fn read(fake: &FakeSysfs) -> HostDetails {
        HostDetails::read(&fake.root(), &Inventory::scan(&fake.root()))
    }

    #[test]
    fn an_empty_host_has_no_evidence() {
        let fake = FakeSysfs::new();
        fake.lockdown(Lockdown::Unknown);
        let details = read(&fake);
        assert_eq!((details.iommu_groups, details.physical_address_bits, details.hypervisor), (0, None, false));
        assert_eq!(details.command_line, Vec::<String>::new());
        assert!(details.modules.iter().all(|module| module.state == ModuleState::Unknown));
        assert_eq!(details.lockdown.mode, Lockdown::Unknown);
        assert!(details.lockdown.evidence.contains("recorded tree"), "{}", details.lockdown.evidence);
        assert_eq!((details.tee.tee, details.tee.cpu_vendor), (Tee::None, None));
    }

    #[test]
    fn the_evidence_of_an_amd_host() {
        let fake = FakeSysfs::new();
        fake.hgx_h100();
        fake.file(
            "proc/cmdline",
            "BOOT_IMAGE=/vmlinuz root=UUID=1 amd_iommu=on iommu=pt lockdown=integrity quiet vfio-pci.ids=10de:2330\n",
        );
        let cpu = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu hypervisor sev sev_es sev_snp sme\n\
                   address sizes\t: 52 bits physical, 57 bits virtual\n";
        fake.file("proc/cpuinfo", format!("{cpu}\n{}", "x".repeat(100_000)));
        fake.file("sys/module/kvm_amd/parameters/sev", "Y\n");
        fake.file("dev/sev", "");
        fake.function("0000:c5:00.1", 0x1022, 0x14ca, 0x10_8000)
            .driver("ccp")
            .attr("bootloader_version", "00.2d.00.77\n");
        fake.get("0000:c5:00.1").attr("tee_version", "\n");
        fake.function("0000:c6:00.1", 0x1022, 0x14ca, 0x10_8000).attr("tee_version", "1\n");
        let details = read(&fake);
        assert_eq!(details.command_line, ["amd_iommu=on", "iommu=pt", "lockdown=integrity", "vfio-pci.ids=10de:2330"]);
        assert_eq!((details.physical_address_bits, details.hypervisor), (Some(52), true));
        assert_eq!(details.iommu_groups, 34);
        let tee = details.tee;
        assert_eq!((tee.tee, tee.cpu_vendor.as_deref()), (Tee::SevSnp, Some("AuthenticAMD")));
        assert_eq!(tee.cpu_flags, ["sev", "sev_es", "sev_snp"]);
        let parameters: Vec<_> =
            tee.kvm_parameters.iter().map(|found| (found.path.as_str(), found.value.as_str())).collect();
        assert_eq!(
            parameters,
            [("sys/module/kvm_amd/parameters/sev", "Y"), ("sys/module/kvm_amd/parameters/sev_snp", "Y")]
        );
        assert_eq!((tee.dev_sev, tee.dev_kvm), (true, false));
        let version = |path: &str, value: &str| Parameter { path: path.to_owned(), value: value.to_owned() };
        let bootloader = version("sys/bus/pci/devices/0000:c5:00.1/bootloader_version", "00.2d.00.77");
        assert_eq!(tee.versions, [bootloader], "none where the file is empty or another driver has the device");
        let expected =
            LockdownFinding { mode: Lockdown::None, inferred: false, evidence: "sys/kernel/security/lockdown".into() };
        assert_eq!(details.lockdown, expected);
    }

    #[test]
    fn the_tdx_module_tells_its_version_where_the_kernel_shows_it() {
        let fake = FakeSysfs::new();
        fake.tee(Tee::Tdx);
        assert_eq!(read(&fake).tee.versions, []);
        fake.file("sys/devices/faux/tdx_host/version", "1.5.16\n");
        let path = "sys/devices/faux/tdx_host/version".to_owned();
        assert_eq!(read(&fake).tee.versions, [Parameter { path, value: "1.5.16".into() }]);
    }

    #[test]
    fn modules_are_loaded_built_in_available_or_missing() {
        let fake = FakeSysfs::new();
        fake.module("nvidia", false).module("iommufd", true);
        fake.file("lib/modules/6.12.0-fake/modules.builtin", "kernel/drivers/vfio/vfio.ko\n");
        fake.file(
            "lib/modules/6.12.0-fake/modules.dep",
            "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/x/nouveau.ko\nkernel/arch/x86/kvm/kvm-amd.ko:\n",
        );
        let details = read(&fake);
        for (name, state) in [
            ("vfio", ModuleState::BuiltIn),
            ("vfio_pci", ModuleState::Available),
            ("vfio_iommu_type1", ModuleState::Missing),
            ("iommufd", ModuleState::BuiltIn),
            ("kvm_amd", ModuleState::Available),
            ("nvidia", ModuleState::Loaded),
            ("nouveau", ModuleState::Missing),
            ("no_such", ModuleState::Unknown),
        ] {
            assert_eq!(details.module(name), state, "{name}");
        }
    }

    #[test]
    fn the_kernels_refusal_tells_the_lockdown() {
        let errno = |errno: Errno| Err(io::Error::from(errno));
        for (answer, mode, inferred) in [
            (Ok(()), Lockdown::None, true),
            (errno(Errno::EINVAL), Lockdown::None, true),
            (errno(Errno::EPERM), Lockdown::Integrity, true),
            (errno(Errno::EACCES), Lockdown::Unknown, false),
            (errno(Errno::EIO), Lockdown::Unknown, false),
            (Err(io::Error::other("odd")), Lockdown::Unknown, false),
        ] {
            let (found, was_inferred, text) = judge(&answer);
            assert_eq!((found, was_inferred), (mode, inferred), "{text}");
        }
    }

    #[test]
    fn no_vfio_device_is_tried_and_an_idle_one_before_a_driven_one() {
        let fake = FakeSysfs::new();
        let bar = |at: &str| fake.gpu(at, 0x2330).resource_file(0, 4096);
        bar("0000:01:00.0").driver("vfio-pci");
        let scan = || candidate(&fake.root(), &Inventory::scan(&fake.root())).map(|found| found.0.to_string());
        assert_eq!(scan(), None);
        bar("0000:02:00.0").driver("nvidia");
        assert_eq!(scan().as_deref(), Some("0000:02:00.0"));
        bar("0000:03:00.0");
        assert_eq!(scan().as_deref(), Some("0000:03:00.0"));
        bar("0000:00:04.0").bars(&[(0, 0xe000, 32, 0x4_0101)]);
        assert_eq!(scan().as_deref(), Some("0000:03:00.0"));
    }
}
