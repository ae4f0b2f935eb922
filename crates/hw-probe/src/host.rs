//! Facts of the host that decide whether a GPU can go into a confidential virtual machine.

use serde::{Deserialize, Serialize};

use crate::SysRoot;

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
    /// Reads the facts below `root`.
    pub fn read(_root: &SysRoot) -> Self {
        Self {
            boot_id: None,
            kernel_release: None,
            tee: Tee::None,
            lockdown: Lockdown::Unknown,
            iommu: IommuState::Off,
            dev_iommu: false,
            dev_vfio: false,
        }
    }
}
