//! Facts of the host that decide whether a GPU can go into a confidential virtual machine.

use serde::{Deserialize, Serialize};

use crate::sysfs::{Node, excerpt};
use crate::{Problem, SysRoot};

/// The host, as far as its file systems tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// `kernel/random/boot_id`: changes with every boot.
    pub boot_id: Option<String>,
    /// Kernel release, as `uname -r` prints it.
    pub kernel_release: Option<String>,
    /// Trusted execution environment that the host's kernel can give to virtual machines.
    pub tee: Tee,
    /// Kernel lockdown.
    pub lockdown: Lockdown,
    /// IOMMU.
    pub iommu: IommuState,
    /// Whether `/dev/iommu` exists (iommufd).
    pub dev_iommu: bool,
    /// Whether `/dev/vfio/vfio` exists (the group API's container).
    pub dev_vfio: bool,
}

/// CPU technology for confidential virtual machines, judged by KVM's module parameters (operator-contract 5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tee {
    /// `kvm_amd` says `sev_snp`.
    SevSnp,
    /// `kvm_intel` says `tdx`.
    Tdx,
    /// Neither.
    None,
}

/// Kernel lockdown mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lockdown {
    /// No restriction.
    None,
    /// BARs cannot be mapped through sysfs.
    Integrity,
    /// Integrity, and no reading of kernel memory either.
    Confidentiality,
    /// securityfs is not mounted or the kernel has no lockdown: the absence of the file proves nothing
    /// (h200-observed).
    Unknown,
}

/// Whether the kernel runs an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IommuState {
    /// There are IOMMU groups.
    On,
    /// There is none: VFIO cannot work.
    Off,
}

impl HostFacts {
    /// Reads the facts below `root`. What cannot be read counts as absent; [`crate::Inventory::scan`] says why.
    pub fn read(root: &SysRoot) -> Self {
        Self::read_noting(root, &mut Vec::new())
    }

    pub(crate) fn read_noting(root: &SysRoot, problems: &mut Vec<Problem>) -> Self {
        let mut node = Node::new(root, "", None);
        let facts = Self {
            boot_id: node.word("proc/sys/kernel/random/boot_id"),
            kernel_release: node.word("proc/sys/kernel/osrelease"),
            tee: Tee::read(&mut node),
            lockdown: Lockdown::read(&mut node),
            iommu: IommuState::read(&mut node),
            dev_iommu: node.exists("dev/iommu"),
            dev_vfio: node.exists("dev/vfio/vfio"),
        };
        problems.append(&mut node.problems);
        facts
    }
}

impl Tee {
    fn read(node: &mut Node) -> Self {
        let mut says_yes = |path| node.text(path).is_some_and(|text| matches!(text.as_str(), "Y" | "y" | "1"));
        if says_yes("sys/module/kvm_amd/parameters/sev_snp") {
            Self::SevSnp
        } else if says_yes("sys/module/kvm_intel/parameters/tdx") {
            Self::Tdx
        } else {
            Self::None
        }
    }
}

impl Lockdown {
    /// The file lists all modes with the active one in brackets: `none [integrity] confidentiality`.
    fn read(node: &mut Node) -> Self {
        const PATH: &str = "sys/kernel/security/lockdown";
        let Some(text) = node.text(PATH) else { return Self::Unknown };
        let active = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
        match active {
            Some("none") => Self::None,
            Some("integrity") => Self::Integrity,
            Some("confidentiality") => Self::Confidentiality,
            _ => {
                node.note(PATH, format!("Has no known mode in brackets: {:?}", excerpt(&text)));
                Self::Unknown
            }
        }
    }
}

impl IommuState {
    /// VFIO's no-IOMMU mode makes groups too, but they protect nothing, and confidential guests cannot use them.
    fn read(node: &mut Node) -> Self {
        const GROUPS: &str = "sys/kernel/iommu_groups";
        let groups = node.entries(GROUPS);
        let real = |group: &String| node.text(&format!("{GROUPS}/{group}/name")).as_deref() != Some("vfio-noiommu");
        if groups.iter().any(real) { Self::On } else { Self::Off }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSysfs;

    #[test]
    fn an_empty_tree_tells_nothing_and_fails_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let facts = HostFacts::read(&SysRoot::at(dir.path()));
        let expected = HostFacts {
            boot_id: None,
            kernel_release: None,
            tee: Tee::None,
            lockdown: Lockdown::Unknown,
            iommu: IommuState::Off,
            dev_iommu: false,
            dev_vfio: false,
        };
        assert_eq!(facts, expected);
    }

    #[test]
    fn kvm_parameters_name_the_tee() {
        for (path, text, tee) in [
            ("sys/module/kvm_amd/parameters/sev_snp", "Y\n", Tee::SevSnp),
            ("sys/module/kvm_amd/parameters/sev_snp", "1\n", Tee::SevSnp),
            ("sys/module/kvm_amd/parameters/sev_snp", "N\n", Tee::None),
            ("sys/module/kvm_intel/parameters/tdx", "y", Tee::Tdx),
            ("sys/module/kvm_intel/parameters/tdx", "", Tee::None),
            ("sys/module/kvm_intel/parameters/tdx", "Yes", Tee::None),
        ] {
            let fake = FakeSysfs::new();
            fake.file(path, text);
            assert_eq!(HostFacts::read(&fake.root()).tee, tee, "{path}: {text:?}");
        }
    }

    #[test]
    fn the_bracketed_word_is_the_lockdown() {
        for (text, lockdown) in [
            ("[none] integrity confidentiality\n", Lockdown::None),
            ("none [integrity] confidentiality\n", Lockdown::Integrity),
            ("none integrity [confidentiality]\n", Lockdown::Confidentiality),
            ("none integrity confidentiality\n", Lockdown::Unknown),
            ("", Lockdown::Unknown),
        ] {
            let fake = FakeSysfs::new();
            fake.file("sys/kernel/security/lockdown", text);
            assert_eq!(HostFacts::read(&fake.root()).lockdown, lockdown, "{text:?}");
        }
    }

    #[test]
    fn groups_without_an_iommu_do_not_count() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:41:00.0", 0x2330).group(0);
        assert_eq!(HostFacts::read(&fake.root()).iommu, IommuState::On);
        fake.file("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n");
        assert_eq!(HostFacts::read(&fake.root()).iommu, IommuState::Off);
    }
}
