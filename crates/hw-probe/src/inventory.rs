//! The scan of a node.

use serde::{Deserialize, Serialize};

use crate::{Bdf, HostFacts, PciFunction, SysRoot};

/// Everything the scan found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// The host.
    pub host: HostFacts,
    /// Every PCI function, by address.
    pub functions: Vec<PciFunction>,
    /// What could not be read, function by function: the rest of the node is still told.
    pub problems: Vec<Problem>,
}

/// One thing that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The function concerned, or none for the node.
    pub bdf: Option<Bdf>,
    /// Path below the root.
    pub path: String,
    /// What happened, for people.
    pub message: String,
}

impl Inventory {
    /// Scans the node. It opens no device and wakes none; the one read that the kernel may hold up (`driver_override`,
    /// while a reset or an unbind is under way) is given up after one second and noted as a problem. Never fails: what cannot be read is in [`Inventory::problems`], and a function that vanishes
    /// while it is being read is left out.
    pub fn scan(root: &SysRoot) -> Self {
        let mut problems = Vec::new();
        let host = HostFacts::read_noting(root, &mut problems);
        let functions = crate::scan::functions(root, &mut problems);
        Self { host, functions, problems }
    }

    /// NVIDIA GPUs, by address. Virtual functions are not GPUs of the node and are left out.
    pub fn gpus(&self) -> impl Iterator<Item = &PciFunction> {
        self.functions.iter().filter(|function| function.is_gpu() && !function.is_virtual_function)
    }

    /// NVSwitches, by address.
    pub fn nvswitches(&self) -> impl Iterator<Item = &PciFunction> {
        self.functions.iter().filter(|function| function.is_nvswitch())
    }

    /// The function at `bdf`.
    pub fn get(&self, bdf: Bdf) -> Option<&PciFunction> {
        self.functions.iter().find(|function| function.bdf == bdf)
    }

    /// All functions in an IOMMU group, bridges included.
    pub fn group_members(&self, group: u32) -> impl Iterator<Item = &PciFunction> {
        self.functions.iter().filter(move |function| function.iommu_group == Some(group))
    }

    /// The members of an IOMMU group that keep VFIO from taking it: bound to a driver that is neither a VFIO driver nor
    /// one the kernel lets share the group (`pcieport` of bridges, `pci-stub`). A member without a driver does not block.
    pub fn group_blockers(&self, group: u32) -> impl Iterator<Item = &PciFunction> {
        self.group_members(group).filter(|member| {
            let harmless = |driver: &str| matches!(driver, "pcieport" | "pci-stub") || member.is_vfio_bound();
            member.driver.as_deref().is_some_and(|driver| !harmless(driver))
        })
    }
}
