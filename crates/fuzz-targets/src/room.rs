//! A fake tree in memory with a healthy device, which must be told right whatever is wrong beside it.

use std::path::Path;
use std::rc::Rc;

use hw_probe::testing::FakeSysfs;
use hw_probe::{Bdf, Condition, Inventory, PciFunction};
use tempfile::TempDir;

/// The healthy GPU, and the port above it.
pub(crate) const HEALTHY: &str = "0000:01:00.0";
const PORT: &str = "0000:00:01.0";

/// A tree, and what a scan says of the healthy devices alone.
pub(crate) struct Room {
    pub(crate) fake: Rc<FakeSysfs>,
    calm: Inventory,
    _folder: TempDir,
}

impl Room {
    pub(crate) fn new() -> Self {
        // In memory where there is such a place: a target makes and removes thousands of files.
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
        let folder = folder.expect("A temporary directory can be made");
        let fake = FakeSysfs::in_dir(folder.path());
        fake.bridge(PORT);
        fake.load_driver("vfio-pci");
        fake.below(PORT).gpu(HEALTHY, 0x2330).group(1).numa(0).driver_override("vfio-pci");
        fake.bind(HEALTHY, "vfio-pci").expect("A healthy GPU can be bound");
        let calm = Inventory::scan(&fake.root());
        assert_eq!((calm.functions.len(), calm.problems.as_slice()), (2, &[][..]));
        Self { fake: Rc::new(fake), calm, _folder: folder }
    }

    /// What is known of the healthy GPU.
    pub(crate) fn healthy(&self) -> &PciFunction {
        function(&self.calm, HEALTHY)
    }

    /// The healthy devices are told as ever, and answer.
    pub(crate) fn check_healthy(&self, now: &Inventory) {
        for healthy in &self.calm.functions {
            assert_eq!(now.get(healthy.bdf), Some(healthy), "a healthy device is told otherwise");
        }
        let condition = Condition::read(&self.fake.root(), self.healthy());
        assert!(condition.faults.is_empty() && condition.liveness.is_some(), "{condition:?}");
    }
}

/// A function that must be there.
pub(crate) fn function<'a>(inventory: &'a Inventory, bdf: &str) -> &'a PciFunction {
    let bdf = Bdf::try_from(bdf).expect("Targets use valid PCI addresses");
    inventory.get(bdf).unwrap_or_else(|| panic!("{bdf} is not told: {:?}", inventory.problems))
}
