//! The reading side: everything that [`crate::units`] decides by, gathered at one moment. No device is opened, none is
//! woken, nothing is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_core::hostfile::HostDir;
use agent_core::state::{DEVICES_FILE, DevicesFile};
use agent_core::text::chain;
use hw_probe::config::liveness_of_each;
use hw_probe::{Bdf, Inventory, SysRoot};

use crate::units::{Egm, Observation, Verdicts};

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
    let mains = inventory.gpus().chain(inventory.nvswitches()).map(|main| main.bdf);
    let answers = liveness_of_each(root, mains).into_iter();
    Ok(Observation {
        iommufd: has_device(root, "misc", "iommu", "dev/iommu"),
        container: has_device(root, "misc", "vfio", "dev/vfio/vfio"),
        groups: groups(&inventory, root),
        alive: answers.map(|(bdf, answer)| (bdf, answer.map_err(|error| chain(&error)))).collect(),
        verdicts: verdicts(&places.state_dir, inventory.host.boot_id.as_deref()),
        given: BTreeSet::new(),
        wrong_nodes: wrong_nodes(&inventory, root),
        egm: egm(root),
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
    numbers(&class.join(name).join("dev")).is_some()
}

/// Major and minor number in a `dev` file. Nothing has major number 0.
fn numbers(dev: &Path) -> Option<(u64, u64)> {
    let text = std::fs::read_to_string(dev).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    (major != 0).then_some((major.into(), minor.into()))
}

/// Nodes of VFIO that are not the devices that sysfs tells of. Only where `/dev` is the kernel's own: a container's is a copy
/// from the time of its start, which says nothing of the host's. A node that is missing is not told here.
fn wrong_nodes(inventory: &Inventory, root: &SysRoot) -> BTreeMap<String, String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !is_the_kernels(&mounts, &root.join("dev")) {
        return BTreeMap::new();
    }
    let mains = || inventory.gpus().chain(inventory.nvswitches());
    let groups: BTreeSet<u32> = mains().filter_map(|main| main.iommu_group).collect();
    let class = |name: &str| root.join("sys/class").join(name).join("dev");
    let group = |group: u32| Some((format!("/dev/vfio/{group}"), numbers(&class(&format!("vfio/{group}")))?));
    let cdevs = inventory.functions.iter().filter_map(|function| {
        let cdev = function.vfio_cdev.as_ref()?;
        Some((format!("/dev/vfio/devices/{}", cdev.name), (cdev.major.into(), cdev.minor.into())))
    });
    let container = numbers(&class("misc/vfio")).map(|numbers| ("/dev/vfio/vfio".to_owned(), numbers));
    let told = container.into_iter().chain(groups.into_iter().filter_map(group)).chain(cdevs);
    told.filter_map(|(node, numbers)| Some((node.clone(), mistake(root, &node, numbers)?))).collect()
}

/// Whether the last file system that was mounted at `folder` is devtmpfs, by mountinfo (proc(5)).
fn is_the_kernels(mounts: &str, folder: &Path) -> bool {
    let mut of_folder = mounts.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        (mount.split(' ').nth(4)? == folder.to_str()?).then(|| file_system.split(' ').next())
    });
    of_folder.next_back().flatten() == Some("devtmpfs")
}

/// What is wrong with a node that should have these numbers, if it is there.
fn mistake(root: &SysRoot, node: &str, (major, minor): (u64, u64)) -> Option<String> {
    let found = std::fs::symlink_metadata(root.join(node.trim_start_matches('/'))).ok()?;
    if !found.file_type().is_char_device() {
        return Some("it is no character device".into());
    }
    let device = found.rdev();
    let numbers = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    (numbers != (major, minor)).then(|| format!("it is {}:{} instead of {major}:{minor}", numbers.0, numbers.1))
}

fn groups(inventory: &Inventory, root: &SysRoot) -> BTreeSet<u32> {
    let groups: BTreeSet<u32> =
        inventory.gpus().chain(inventory.nvswitches()).filter_map(|main| main.iommu_group).collect();
    let has_node = |group: &u32| has_device(root, "vfio", &group.to_string(), &format!("dev/vfio/{group}"));
    groups.into_iter().filter(has_node).collect()
}

/// The extended memories whose device the kernel has made, by node. Their GPUs stand in `gpu_devices`; a driver that has no such
/// file has a link to each GPU beside its other files.
fn egm(root: &SysRoot) -> Vec<Egm> {
    let class = root.join("sys/class/egm");
    let Ok(entries) = std::fs::read_dir(&class) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut found: Vec<Egm> = names
        .filter(|name| name.starts_with("egm") && numbers(&class.join(name).join("dev")).is_some())
        .filter_map(|name| {
            let folder = class.join(&name);
            let gpus: BTreeSet<Bdf> = match std::fs::read_to_string(folder.join("gpu_devices")) {
                // One that cannot be understood may be anybody's: then nobody has all of them.
                Ok(text) => text.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?,
                Err(_) => linked(&folder),
            };
            (!gpus.is_empty()).then(|| Egm { node: format!("/dev/{name}"), gpus })
        })
        .collect();
    found.sort_by(|a, b| a.node.cmp(&b.node));
    found
}

/// The entries of a folder that are addresses.
fn linked(folder: &Path) -> BTreeSet<Bdf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return BTreeSet::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
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

#[cfg(test)]
mod tests {
    use hw_probe::testing::FakeSysfs;

    use super::*;

    #[test]
    fn only_the_kernels_own_dev_is_believed() {
        let host = "25 1 0:5 / /dev rw,nosuid shared:2 - devtmpfs udev rw,size=4k\n";
        let pod = "700 699 0:80 / /dev rw,nosuid - tmpfs tmpfs rw\n701 700 0:5 / /dev/vfio rw - devtmpfs udev rw\n";
        let is_the_kernels = |text: &str| super::is_the_kernels(text, Path::new("/dev"));
        assert!(is_the_kernels(host));
        assert!(!is_the_kernels(pod));
        assert!(!is_the_kernels(&format!("{host}{pod}")), "what was mounted last is seen");
        assert!(!is_the_kernels("") && !is_the_kernels("25 1 - devtmpfs\n") && !is_the_kernels(" - \n"));
    }

    #[test]
    fn a_node_of_another_kind_or_number_is_a_mistake_and_a_missing_one_is_none() {
        let fake = FakeSysfs::new();
        fake.file("dev/vfio/5", "a file");
        assert_eq!(mistake(&fake.root(), "/dev/vfio/5", (243, 0)).unwrap(), "it is no character device");
        assert_eq!(mistake(&fake.root(), "/dev/vfio/6", (243, 0)), None);
        let host = SysRoot::host();
        assert_eq!(mistake(&host, "/dev/null", (1, 3)), None);
        assert_eq!(mistake(&host, "/dev/null", (1, 5)).unwrap(), "it is 1:3 instead of 1:5");
    }

    #[test]
    fn extended_memory_is_that_of_the_gpus_it_names() {
        let fake = FakeSysfs::new();
        assert_eq!(egm(&fake.root()), []);
        let device = |name: &str, gpus: Option<&str>| {
            fake.file(format!("sys/class/egm/{name}/dev"), "240:4\n");
            fake.file(format!("sys/class/egm/{name}/egm_size"), "0x7000000000\n");
            if let Some(gpus) = gpus {
                fake.file(format!("sys/class/egm/{name}/gpu_devices"), gpus);
            }
        };
        device("egm5", Some("0018:01:00.0 0019:01:00.0\n"));
        device("egm4", None);
        for gpu in ["0008:01:00.0", "0009:01:00.0"] {
            fake.file(format!("sys/class/egm/egm4/{gpu}"), "");
        }
        device("egm6", None);
        device("egm7", Some("0008:01:00.0 and more\n"));
        device("other", Some("0008:01:00.0\n"));
        fake.file("sys/class/egm/egm8/gpu_devices", "0008:01:00.0\n");
        let of = |node: &str, gpus: [&str; 2]| Egm {
            node: node.into(),
            gpus: gpus.into_iter().map(|gpu| gpu.parse().unwrap()).collect(),
        };
        let expected =
            [of("/dev/egm4", ["0008:01:00.0", "0009:01:00.0"]), of("/dev/egm5", ["0018:01:00.0", "0019:01:00.0"])];
        assert_eq!(egm(&fake.root()), expected, "what has no GPUs, cannot be understood, or is no device is none");
    }

    #[test]
    fn numbers_are_those_of_a_device_or_none() {
        let fake = FakeSysfs::new();
        let read = |text: &str| {
            fake.file("dev-file", text);
            numbers(&fake.path().join("dev-file"))
        };
        assert_eq!(read("243:7\n"), Some((243, 7)));
        for nothing in ["0:0\n", "", "243", "a:b", "-1:0", "4294967296:0"] {
            assert_eq!(read(nothing), None, "{nothing:?}");
        }
    }
}
