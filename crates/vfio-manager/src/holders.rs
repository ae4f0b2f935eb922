//! Who holds the devices that are on VFIO: their virtual machines, as far as /proc shows them.

use std::collections::BTreeMap;

use hw_probe::{Bdf, Inventory, SysRoot};

/// How many processes hold each device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HoldersOfDevices {
    counts: BTreeMap<Bdf, usize>,
    is_whole: bool,
}

impl HoldersOfDevices {
    /// Looks at what the processes have open. It takes a while on a node with many.
    pub(crate) fn look(root: &SysRoot, inventory: &Inventory) -> Self {
        let found = hw_probe::holders(root);
        let mut counts = BTreeMap::new();
        for function in inventory.functions.iter().filter(|function| function.is_vfio_bound()) {
            let group = function.iommu_group.map(|group| format!("/dev/vfio/{group}"));
            let cdev = function.vfio_cdev.as_ref().map(|cdev| format!("/dev/vfio/devices/{}", cdev.name));
            let nodes = [group, cdev];
            let holds = found.list.iter().filter(|holder| nodes.iter().flatten().any(|node| *node == holder.node));
            let mut processes: Vec<_> = holds.map(|holder| holder.pid).collect();
            processes.sort_unstable();
            processes.dedup();
            if !processes.is_empty() {
                counts.insert(function.bdf, processes.len());
            }
        }
        Self { counts, is_whole: found.limit.is_none() }
    }

    /// The number of those that are seen to hold this device.
    pub(crate) fn count(&self, bdf: Bdf) -> usize {
        self.counts.get(&bdf).copied().unwrap_or(0)
    }

    /// Whether every process of the node was looked at.
    pub(crate) fn is_whole(&self) -> bool {
        self.is_whole
    }

    #[cfg(test)]
    pub(crate) fn of_test(counts: &[(Bdf, usize)], is_whole: bool) -> Self {
        Self { counts: counts.iter().copied().collect(), is_whole }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;

    #[test]
    fn a_process_counts_once_for_each_device_that_it_holds() {
        let fake = FakeSysfs::new();
        let [held, by_two, free, other] = ["0000:41:00.0", "0000:42:00.0", "0000:43:00.0", "0000:44:00.0"];
        fake.gpu(held, 0x2330).group(5).driver("vfio-pci").cdev(0);
        fake.gpu(by_two, 0x2330).group(6).driver("vfio-pci").cdev(1);
        fake.gpu(free, 0x2330).group(7).driver("vfio-pci").cdev(2);
        fake.gpu(other, 0x2330).group(8).driver("nvidia");
        fake.process(9, "qemu", "0::/x\n", &["/dev/vfio/5", "/dev/vfio/devices/vfio0", "/dev/vfio/6", "/dev/nvidia0"]);
        fake.process(10, "qemu", "0::/y\n", &["/dev/vfio/devices/vfio1"]);
        let holders = HoldersOfDevices::look(&fake.root(), &Inventory::scan(&fake.root()));
        let counts = [held, by_two, free, other].map(|bdf| holders.count(bdf.parse().unwrap()));
        assert_eq!(counts, [1, 2, 0, 0]);
        assert!(holders.is_whole());
    }
}
