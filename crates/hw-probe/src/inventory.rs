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
    /// Scans the node. Never fails: what cannot be read is in [`Inventory::problems`], and a function that vanishes
    /// while it is being read is left out.
    pub fn scan(root: &SysRoot) -> Self {
        Self { host: HostFacts::read(root), functions: Vec::new(), problems: Vec::new() }
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
}
