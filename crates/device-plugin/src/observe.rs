//! The reading side: everything that [`crate::units`] decides by, gathered at one moment. No device is opened, none is
//! woken, nothing is sent.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use agent_core::hostfile::HostDir;
use agent_core::state::{DEVICES_FILE, DevicesFile};
use agent_core::text::chain;
use hw_probe::config::liveness;
use hw_probe::{Inventory, SysRoot};

use crate::units::{Observation, Verdicts};

/// Where to look.
#[derive(Clone, Debug)]
pub struct Places {
    /// The node's file systems.
    pub root: SysRoot,
    /// Folder of `devices.json`.
    pub state_dir: PathBuf,
}

/// Why there is no observation.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// Every node has PCI functions: none means that sysfs could not be read.
    #[error("No PCI functions below {}{}; is /sys mounted?", path.display(), .problem)]
    Nothing {
        /// Where they should be.
        path: PathBuf,
        /// What the scan said of it.
        problem: String,
    },
}

/// Looks at the node. Blocks: the kernel may take its time over a device that no longer answers.
pub fn observe(places: &Places) -> Result<Observation, ObserveError> {
    let root = &places.root;
    let inventory = Inventory::scan(root);
    if inventory.functions.is_empty() {
        let problem = inventory.problems.first().map_or_else(String::new, |problem| format!(" ({})", problem.message));
        return Err(ObserveError::Nothing { path: root.join("sys/bus/pci/devices"), problem });
    }
    let mains = || inventory.gpus().chain(inventory.nvswitches());
    Ok(Observation {
        iommufd: has_device(root, "misc", "iommu", "dev/iommu"),
        container: has_device(root, "misc", "vfio", "dev/vfio/vfio"),
        groups: groups(&inventory, root),
        alive: mains().map(|main| (main.bdf, liveness(root, main.bdf).map_err(|error| chain(&error)))).collect(),
        verdicts: verdicts(&places.state_dir, inventory.host.boot_id.as_deref()),
        inventory,
    })
}

impl Observation {
    /// Reads cc-manager's word anew and leaves the rest as it was: a file in memory, read in no time.
    pub fn hear(&mut self, places: &Places) {
        self.verdicts = verdicts(&places.state_dir, self.inventory.host.boot_id.as_deref());
    }
}

/// Whether the kernel has made the character device `name` of `class`. In a container /dev is a copy from the time of
/// its start; sysfs is always the kernel's own word, and /dev (`node`) counts only in a tree that has no such class.
fn has_device(root: &SysRoot, class: &str, name: &str, node: &str) -> bool {
    let class = root.join("sys/class").join(class);
    if !class.is_dir() {
        return root.join(node).exists();
    }
    let text = std::fs::read_to_string(class.join(name).join("dev")).unwrap_or_default();
    text.trim().split_once(':').is_some_and(|(major, minor)| {
        major.parse::<u32>().is_ok_and(|major| major != 0) && minor.parse::<u32>().is_ok()
    })
}

fn groups(inventory: &Inventory, root: &SysRoot) -> BTreeSet<u32> {
    let groups: BTreeSet<u32> =
        inventory.gpus().chain(inventory.nvswitches()).filter_map(|main| main.iommu_group).collect();
    let has_node = |group: &u32| has_device(root, "vfio", &group.to_string(), &format!("dev/vfio/{group}"));
    groups.into_iter().filter(has_node).collect()
}

fn verdicts(state_dir: &Path, boot_id: Option<&str>) -> Verdicts {
    let path = state_dir.join(DEVICES_FILE);
    let Some(boot_id) = boot_id else { return Verdicts::Unknown("The kernel's boot id cannot be read".into()) };
    let loaded = match HostDir::open_existing(state_dir) {
        Ok(Some(folder)) => DevicesFile::load(&folder, boot_id),
        Ok(None) => Ok(None),
        Err(error) => Err(error.into()),
    };
    match loaded {
        Ok(Some(file)) => Verdicts::Known(file),
        Ok(None) => Verdicts::Unknown(format!("{} is absent or of another boot", path.display())),
        Err(error) => Verdicts::Unknown(chain(&error)),
    }
}
