//! The scan of a node.

use serde::{Deserialize, Serialize};

use crate::scan::DEVICES;
use crate::{Bdf, HostFacts, PciFunction, SysRoot, Unclassified};

/// Everything the scan found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// The host.
    pub host: HostFacts,
    /// Every PCI function, by address, save those of `unclassified`.
    pub functions: Vec<PciFunction>,
    /// Functions of which it cannot be told what they are, by address. No agent touches them.
    pub unclassified: Vec<Unclassified>,
    /// What could not be read, by function and path, the node's own first: the rest of the node is still told.
    pub problems: Vec<Problem>,
}

/// One thing that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
    /// while a reset or an unbind is under way) is given up after one second and noted as a problem. Never fails: what cannot be read is
    /// in [`Inventory::problems`], and a function that vanishes while it is being read is left out.
    pub fn scan(root: &SysRoot) -> Self {
        let mut problems = Vec::new();
        let host = HostFacts::read_noting(root, &mut problems);
        let (functions, unclassified) = crate::scan::functions(root, &mut problems);
        // In an order of their own and each once, so that two scans of the same are equal.
        problems.sort_unstable();
        problems.dedup();
        Self { host, functions, unclassified, problems }
    }

    /// Those of the problems because of which it is not known which GPUs and NVSwitches the node has: functions that may be one
    /// and cannot be told apart, or the bus itself.
    pub fn doubts(&self) -> impl Iterator<Item = &Problem> {
        let foreign = |bdf| self.unclassified.iter().any(|found| found.bdf == bdf && !found.may_be_nvidia());
        self.problems.iter().filter(move |problem| match problem.bdf {
            Some(bdf) => self.get(bdf).is_none() && !foreign(bdf),
            None => problem.path == DEVICES,
        })
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

    /// The members of an IOMMU group that keep VFIO from taking it ([`PciFunction::blocks_its_group`]).
    pub fn group_blockers(&self, group: u32) -> impl Iterator<Item = &PciFunction> {
        self.group_members(group).filter(|member| member.blocks_its_group())
    }
}
