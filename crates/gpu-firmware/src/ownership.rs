//! Exclusive ownership of devices through VFIO's group files, without side effects on them.
//!
//! Holding `/dev/vfio/<group>` keeps every other VFIO user out, group and cdev alike, opens no device and so resets
//! none (virtual-gpu-rig section 6, fact 14). All group files and locks are taken before any device is touched, and driver
//! and group of each device are looked at again after that and before each reset.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hw_probe::{Bdf, PciFunction, SysRoot};
use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::{Mode as FileMode, SFlag, major, makedev, minor, mknod};

use crate::clock::{Clock, Wait};
use crate::error::{Error, Fault, Holder};
use crate::lock::{DeviceLock, RETRY as LOCK_RETRY};

/// Where ownership is taken, and by whom.
#[derive(Clone, Debug)]
pub struct Places {
    /// The tree with `sys` and `proc`.
    pub root: SysRoot,
    /// The folder of VFIO's nodes; missing nodes are made in it.
    pub dev_vfio: PathBuf,
    /// The folder that outlives processes but not the boot; the locks are in `nvidia/ccnode/locks` below it. It must be
    /// the same one for every role on the host.
    pub run: PathBuf,
    /// What this process calls itself in its locks (`cc-manager`).
    pub role: String,
}

impl Places {
    /// The places of the running machine.
    pub fn host(role: impl Into<String>) -> Self {
        Self::at(SysRoot::host(), role)
    }

    /// The same places below `root`.
    pub fn at(root: SysRoot, role: impl Into<String>) -> Self {
        Self { dev_vfio: root.join("dev/vfio"), run: root.join("run"), root, role: role.into() }
    }
}

/// How a device is owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// By its VFIO group file, of this group: the kernel keeps everybody else out.
    Group(u32),
    /// By the lock of this crate alone, because no driver is bound: keeps out those who ask for the lock, nobody else.
    LockOnly,
}

/// Devices that are ours until this is dropped.
#[derive(Debug)]
pub struct Ownership {
    devices: Vec<OwnedDevice>,
}

/// Why ownership was not taken: one error for each device that could not be had. Nothing has been touched.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused(pub Vec<Error>);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for Refused {}

impl Ownership {
    /// Takes every device of `functions`, or none. Takes no device that a driver other than a VFIO driver is bound to, and
    /// never waits for one that is in use.
    pub fn take(functions: &[PciFunction], places: &Places) -> Result<Self, Refused> {
        let claims = all(functions, |function| Claim::make(function, places))?;
        // Every lock is ours now. Groups may have several of our devices and are opened once.
        let mut groups = BTreeMap::new();
        let mut refused = Vec::new();
        for claim in &claims {
            let Some(group) = claim.group else { continue };
            if groups.contains_key(&group) {
                continue;
            }
            match GroupFile::open(group, claim.function.vfio_cdev.as_ref().map(|cdev| cdev.name.as_str()), places) {
                Ok(file) => {
                    groups.insert(group, Arc::new(file));
                }
                Err(fault) => refused.push(Error::new(claim.function.bdf, fault)),
            }
        }
        if !refused.is_empty() {
            return Err(Refused(refused));
        }
        let devices: Vec<OwnedDevice> = claims
            .into_iter()
            .map(|claim| {
                let group = claim.group.and_then(|group| groups.get(&group).cloned());
                let (root, function) = (places.root.clone(), claim.function);
                OwnedDevice(Arc::new(Owned { function, group, _lock: claim.lock, root }))
            })
            .collect();
        // A driver may have come or gone between the look and the grip.
        all(&devices, OwnedDevice::recheck)?;
        for device in &devices {
            tracing::debug!(device = %device.bdf(), hold = ?device.hold(), "owned");
        }
        Ok(Self { devices })
    }

    /// As [`Ownership::take`], but waits up to `patience` for other roles of ccnode that hold locks, for as long as nothing
    /// else is in the way: they hold them briefly.
    pub fn take_within(
        functions: &[PciFunction],
        places: &Places,
        patience: Duration,
        clock: &dyn Clock,
    ) -> Result<Self, Refused> {
        let mut last = Refused(Vec::new());
        let is_lock = |error: &Error| matches!(*error.fault, Fault::LockHeld { .. });
        let taken = Wait::new(patience, LOCK_RETRY).poll(clock, || match Self::take(functions, places) {
            Err(refused) if refused.0.iter().all(is_lock) => {
                last = refused;
                Ok(None)
            }
            other => other.map(Some),
        })?;
        taken.ok_or(last)
    }

    /// The devices, in the order they were asked for.
    pub fn devices(&self) -> &[OwnedDevice] {
        &self.devices
    }
}

/// Does something with each item; all results, or all errors.
fn all<'a, I, T>(items: &'a [I], act: impl Fn(&'a I) -> Result<T, Error>) -> Result<Vec<T>, Refused> {
    let mut results = Vec::new();
    let mut errors = Vec::new();
    for item in items {
        match act(item) {
            Ok(result) => results.push(result),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(results) } else { Err(Refused(errors)) }
}

/// A device of which we have the lock, and know which group file it needs.
struct Claim {
    function: PciFunction,
    group: Option<u32>,
    lock: DeviceLock,
}

impl Claim {
    fn make(function: &PciFunction, places: &Places) -> Result<Self, Error> {
        let fail = |fault| Error::new(function.bdf, fault);
        let lock = DeviceLock::take(function.bdf, places)?;
        let function = refresh(function, &places.root).map_err(fail)?;
        let group = match (&function.driver, function.is_vfio_bound(), function.iommu_group) {
            (Some(driver), false, _) => {
                return Err(fail(Fault::InUse { driver: Some(driver.clone()), group: None, holders: Vec::new() }));
            }
            (Some(_), true, None) => return Err(fail(Fault::NoGroupFile { group: None })),
            (Some(_), true, group) => group,
            // No driver: there is a group file only if another device of the group is bound to VFIO.
            (None, _, group) => group.filter(|group| class_folder(*group, places).exists()),
        };
        Ok(Self { function, group, lock })
    }
}

/// `function` with the driver, group and VFIO device that it has now.
fn refresh(function: &PciFunction, root: &SysRoot) -> Result<PciFunction, Fault> {
    let folder = root.function(function.bdf);
    if !folder.exists() {
        return Err(Fault::OffBus { what: format!("{} is gone", folder.display()) });
    }
    let mut now = function.clone();
    now.driver = link_name(&folder.join("driver"))?;
    now.iommu_group = link_name(&folder.join("iommu_group"))?.and_then(|name| name.parse().ok());
    now.vfio_cdev = now.vfio_cdev.filter(|cdev| folder.join("vfio-dev").join(&cdev.name).exists());
    Ok(now)
}

/// Last part of a link's target; none when there is no link.
fn link_name(path: &Path) -> Result<Option<String>, Fault> {
    match fs::read_link(path) {
        Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::from_io("read", path, &error)),
    }
}

/// A device that is ours. Clones share the ownership; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct OwnedDevice(Arc<Owned>);

#[derive(Debug)]
struct Owned {
    function: PciFunction,
    // Released in this order: the group first, so that whoever waits for the lock finds it free.
    group: Option<Arc<GroupFile>>,
    _lock: DeviceLock,
    root: SysRoot,
}

impl OwnedDevice {
    /// Its address.
    pub fn bdf(&self) -> Bdf {
        self.0.function.bdf
    }

    /// The function, with the driver and group it had when ownership was taken.
    pub fn function(&self) -> &PciFunction {
        &self.0.function
    }

    /// How it is held.
    pub fn hold(&self) -> Hold {
        self.0.group.as_ref().map_or(Hold::LockOnly, |file| Hold::Group(file.group))
    }

    /// The device's folder in sysfs.
    pub(crate) fn folder(&self) -> PathBuf {
        self.0.root.function(self.bdf())
    }

    /// Whether driver and group are still those of when ownership was taken; anything else is
    /// [`Fault::OwnershipChanged`].
    pub fn recheck(&self) -> Result<(), Error> {
        self.changed().map_err(|fault| Error::new(self.bdf(), fault))
    }

    pub(crate) fn changed(&self) -> Result<(), Fault> {
        let before = &self.0.function;
        let now = refresh(before, &self.0.root)?;
        let group = |function: &PciFunction| function.iommu_group.map(|group| group.to_string());
        for (what, before, now) in
            [("driver", before.driver.clone(), now.driver.clone()), ("iommu_group", group(before), group(&now))]
        {
            if before != now {
                return Err(Fault::OwnershipChanged { what, before, now });
            }
        }
        Ok(())
    }
}

/// A held group file. Holding it is all that is done with it.
#[derive(Debug)]
struct GroupFile {
    group: u32,
    _file: File,
}

impl GroupFile {
    fn open(group: u32, cdev: Option<&str>, places: &Places) -> Result<Self, Fault> {
        let path = places.dev_vfio.join(group.to_string());
        make_node(group, &path, places)?;
        match OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path) {
            Ok(file) => Ok(Self { group, _file: file }),
            Err(error) => {
                let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
                let holders = || holders(group, cdev, places);
                Err(open_fault(group, &path, errno, holders))
            }
        }
    }
}

/// What it means that a group file cannot be opened.
fn open_fault(group: u32, path: &Path, errno: Errno, holders: impl FnOnce() -> Vec<Holder>) -> Fault {
    match errno {
        Errno::EBUSY => Fault::InUse { driver: None, group: Some(group), holders: holders() },
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => Fault::NoGroupFile { group: Some(group) },
        Errno::EPERM | Errno::EACCES => Fault::PermissionDenied { path: path.to_owned(), errno: errno as i32 },
        _ => Fault::from_errno("open", path, errno),
    }
}

/// The group's folder in sysfs, which exists while the kernel has a group file for it.
fn class_folder(group: u32, places: &Places) -> PathBuf {
    places.root.join(format!("sys/class/vfio/{group}"))
}

/// Sees to it that `path` is the group's node. The kernel makes it in the host's /dev; a container's own /dev may lack it, or
/// have one left from a former group of that number.
fn make_node(group: u32, path: &Path, places: &Places) -> Result<(), Fault> {
    let numbers_path = class_folder(group, places).join("dev");
    let numbers = match fs::read_to_string(&numbers_path) {
        Ok(text) => {
            let parse = || {
                let (major, minor) = text.trim().split_once(':')?;
                Some((major.parse::<u64>().ok()?, minor.parse::<u64>().ok()?))
            };
            let expected = "major and minor number";
            let found = || text.chars().take(64).collect();
            parse().ok_or_else(|| Fault::UnexpectedContent { path: numbers_path, found: found(), expected })?
        }
        // Without the kernel's word for it a node is only opened, never made.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Fault::from_io("read", &numbers_path, &error)),
    };
    if let Ok(metadata) = fs::symlink_metadata(path)
        && metadata.file_type().is_char_device()
        && (major(metadata.rdev()), minor(metadata.rdev())) == numbers
    {
        return Ok(());
    }
    let fail = |errno: Errno| match errno {
        Errno::EPERM => Fault::PermissionDenied { path: path.to_owned(), errno: errno as i32 },
        _ => Fault::from_errno("make", path, errno),
    };
    fs::create_dir_all(&places.dev_vfio).map_err(|error| Fault::from_io("make", &places.dev_vfio, &error))?;
    // Under another name first: a node appears at its place whole, whoever else is making it.
    let temporary = places.dev_vfio.join(format!(".{group}.{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    mknod(&temporary, SFlag::S_IFCHR, FileMode::from_bits_truncate(0o600), makedev(numbers.0, numbers.1))
        .map_err(fail)?;
    fs::rename(&temporary, path).map_err(|error| Fault::from_io("make", path, &error))?;
    tracing::info!(path = %path.display(), major = numbers.0, minor = numbers.1, "made the group's node");
    Ok(())
}

/// Whether the group could be opened at this moment. It is opened for it, which keeps a virtual machine from starting in
/// that instant: for use once an attempt, never in a poll. A group without a group file is an error.
pub fn group_is_free(group: u32, places: &Places) -> Result<bool, Fault> {
    match GroupFile::open(group, None, places) {
        Ok(_) => Ok(true),
        Err(Fault::InUse { .. }) => Ok(false),
        Err(fault) => Err(fault),
    }
}

/// The processes that can be seen to hold the group, by its group file or by the character device `cdev` (`vfio0`).
/// Where other processes' files are hidden (another PID namespace, no rights) the list is shorter than the truth.
pub fn group_holders(group: u32, cdev: Option<&str>, places: &Places) -> Vec<Holder> {
    holders(group, cdev, places)
}

fn holders(group: u32, cdev: Option<&str>, places: &Places) -> Vec<Holder> {
    let group_suffix = format!("vfio/{group}");
    let cdev_suffix = cdev.map(|cdev| format!("vfio/devices/{cdev}"));
    let is_ours = |target: &Path| {
        target.ends_with(&group_suffix) || cdev_suffix.as_ref().is_some_and(|cdev| target.ends_with(cdev))
    };
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let mut holders: Vec<Holder> = entries(&places.root.join("proc"))
        .filter_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok()?;
            let holds = entries(&process.path().join("fd"))
                .any(|file| fs::read_link(file.path()).is_ok_and(|target| is_ours(&target)));
            let comm = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            holds.then(|| Holder { pid, comm: comm.trim_end().to_owned() })
        })
        .collect();
    holders.sort_by_key(|holder| holder.pid);
    holders
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::fake::{FakeClock, Tree, places};

    #[test]
    fn a_vfio_bound_device_is_held_by_its_group_and_lock() {
        let tree = Tree::new();
        let gpu = tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        let ownership = Ownership::take(std::slice::from_ref(&gpu), &tree.places).unwrap();
        let device = ownership.devices()[0].clone();
        assert_eq!((device.bdf(), device.hold()), (gpu.bdf, Hold::Group(12)));
        assert_eq!(DeviceLock::take(gpu.bdf, &tree.places).unwrap_err().code(), "LockHeld");
        drop(ownership);
        assert_eq!(DeviceLock::take(gpu.bdf, &tree.places).unwrap_err().code(), "LockHeld", "a clone still owns it");
        drop(device);
        assert!(DeviceLock::take(gpu.bdf, &tree.places).is_ok());
    }

    #[test]
    fn devices_of_one_group_share_its_file() {
        let tree = Tree::new();
        let both = ["0000:41:00.0", "0000:42:00.0"].map(|bdf| tree.function(bdf, Some("vfio-pci"), Some(12)));
        let ownership = Ownership::take(&both, &tree.places).unwrap();
        assert!(ownership.devices().iter().all(|device| device.hold() == Hold::Group(12)));
    }

    #[test]
    fn a_driverless_device_is_held_by_its_lock_with_or_without_an_iommu() {
        for group in [Some(12), None] {
            let tree = Tree::new();
            let gpu = tree.function("0000:41:00.0", None, group);
            let ownership = Ownership::take(std::slice::from_ref(&gpu), &tree.places).unwrap();
            assert_eq!(ownership.devices()[0].hold(), Hold::LockOnly);
            // vfio-manager takes the lock before it binds, so it cannot bind now; whoever binds without it is noticed.
            assert_eq!(DeviceLock::take(gpu.bdf, &tree.places).unwrap_err().code(), "LockHeld");
            let _ = tree.sysfs.get(gpu.bdf).driver("vfio-pci");
            assert_eq!(ownership.devices()[0].recheck().unwrap_err().code(), "OwnershipChanged");
        }
    }

    #[test]
    fn what_cannot_be_owned_is_refused_and_nothing_stays_held() {
        let tree = Tree::new();
        let good = tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        let nvidia = tree.function("0000:42:00.0", Some("nvidia"), Some(13));
        let no_group = tree.function("0000:43:00.0", Some("vfio-pci"), None);
        let no_file = tree.function("0000:44:00.0", Some("vfio-pci"), Some(15));
        fs::remove_file(tree.places.dev_vfio.join("15")).unwrap();
        let mut gone = good.clone();
        gone.bdf = "0000:45:00.0".parse().unwrap();
        // The scan saw vfio-pci; meanwhile the device has another driver.
        let mut moved = tree.function("0000:46:00.0", Some("nvidia"), Some(16));
        moved.driver = Some("vfio-pci".into());
        for (bad, code) in
            [(nvidia, "InUse"), (no_group, "NoGroupFile"), (no_file, "NoGroupFile"), (gone, "OffBus"), (moved, "InUse")]
        {
            let bdf = bad.bdf;
            let Refused(errors) = Ownership::take(&[good.clone(), bad], &tree.places).unwrap_err();
            let found: Vec<_> = errors.iter().map(|error| (error.bdf, error.code())).collect();
            assert_eq!(found, [(bdf, code)]);
            assert!(DeviceLock::take(good.bdf, &tree.places).is_ok());
        }
    }

    #[test]
    fn the_lock_of_another_role_refuses_too() {
        let tree = Tree::new();
        let gpu = tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        let _lock = DeviceLock::take(gpu.bdf, &tree.places).unwrap();
        let refused = Ownership::take(&[gpu], &tree.places).unwrap_err();
        assert_eq!(refused.0[0].code(), "LockHeld");
    }

    #[test]
    fn locks_are_waited_for_and_users_are_not() {
        let tree = Tree::new();
        let clock = FakeClock::default();
        let patience = Duration::from_secs(2);
        let gpu = tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        let nvidia = tree.function("0000:42:00.0", Some("nvidia"), Some(13));
        let lock = DeviceLock::take(gpu.bdf, &tree.places).unwrap();
        let take = |functions: &[PciFunction]| Ownership::take_within(functions, &tree.places, patience, &clock);
        assert_eq!(take(std::slice::from_ref(&gpu)).unwrap_err().0[0].code(), "LockHeld");
        assert!(clock.now() >= patience && clock.now() < patience + LOCK_RETRY * 2);
        let start = clock.now();
        let codes: Vec<_> = take(&[gpu.clone(), nvidia]).unwrap_err().0.iter().map(Error::code).collect();
        assert_eq!((codes, clock.now()), (vec!["LockHeld", "InUse"], start), "no use in waiting for the lock then");
        drop(lock);
        assert!(take(&[gpu]).is_ok());
    }

    #[test]
    fn a_missing_or_foreign_node_is_made_from_the_kernels_numbers() {
        let tree = Tree::new();
        let gpu = tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        let class = class_folder(12, &tree.places);
        fs::create_dir_all(&class).unwrap();
        fs::write(class.join("dev"), "1:3\n").unwrap();
        let node = tree.places.dev_vfio.join("12");
        for foreign in [true, false] {
            let _ = fs::remove_file(&node);
            if foreign {
                fs::write(&node, "").unwrap();
            }
            // Making nodes takes rights that a test may not have; without them that is what the error says.
            match Ownership::take(std::slice::from_ref(&gpu), &tree.places) {
                Ok(_) => {
                    let rdev = fs::metadata(&node).unwrap().rdev();
                    assert_eq!((major(rdev), minor(rdev)), (1, 3));
                }
                Err(Refused(errors)) => assert_eq!(errors[0].code(), "PermissionDenied"),
            }
        }
    }

    #[test]
    fn a_new_driver_or_group_ends_ownership() {
        let tree = Tree::new();
        let gpu = tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        let ownership = Ownership::take(std::slice::from_ref(&gpu), &tree.places).unwrap();
        let device = &ownership.devices()[0];
        assert_eq!(device.recheck(), Ok(()));
        let what = || match *device.recheck().unwrap_err().fault {
            Fault::OwnershipChanged { what, .. } => what,
            other => panic!("{other}"),
        };
        let function = tree.sysfs.get(gpu.bdf);
        let _ = function.driver("nvidia");
        assert_eq!(what(), "driver");
        let _ = function.no_driver();
        assert_eq!(what(), "driver");
        let _ = function.driver("vfio-pci").group(99);
        assert_eq!(what(), "iommu_group");
    }

    #[test]
    fn the_kernels_refusals_have_their_own_errors() {
        let path = Path::new("/dev/vfio/12");
        let holder = Holder { pid: 7, comm: "qemu".into() };
        let busy = open_fault(12, path, Errno::EBUSY, || vec![holder.clone()]);
        assert_eq!(busy, Fault::InUse { driver: None, group: Some(12), holders: vec![holder] });
        let code = |errno| open_fault(12, path, errno, Vec::new).code();
        assert_eq!(code(Errno::ENOENT), "NoGroupFile");
        assert_eq!(code(Errno::EPERM), "PermissionDenied");
        assert_eq!(code(Errno::EACCES), "PermissionDenied");
        assert_eq!(code(Errno::EMFILE), "Io");
    }

    #[test]
    fn a_node_whose_numbers_make_no_sense_is_not_made() {
        let tree = Tree::new();
        let gpu = tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        for text in ["", "10", "a:b", "10:-1"] {
            let class = class_folder(12, &tree.places);
            fs::create_dir_all(&class).unwrap();
            fs::write(class.join("dev"), text).unwrap();
            let Refused(errors) = Ownership::take(std::slice::from_ref(&gpu), &tree.places).unwrap_err();
            assert_eq!(errors[0].code(), "UnexpectedContent", "{text:?}");
        }
    }

    #[test]
    fn holders_are_found_by_group_file_and_character_device() {
        let tree = tempfile::tempdir().unwrap();
        let places = places(tree.path());
        let process = |pid: &str, comm: &str, target: &str| {
            let folder = tree.path().join("proc").join(pid);
            fs::create_dir_all(folder.join("fd")).unwrap();
            fs::write(folder.join("comm"), format!("{comm}\n")).unwrap();
            symlink("/dev/null", folder.join("fd/0")).unwrap();
            symlink(target, folder.join("fd/9")).unwrap();
        };
        process("300", "qemu-system-x86", "/dev/vfio/12");
        process("20", "cloud-hyperviso", "/dev/vfio/devices/vfio3");
        process("21", "other", "/dev/vfio/112");
        process("22", "container", "/run/rootfs/dev/vfio/1");
        process("self", "not a pid", "/dev/vfio/12");
        let pids = |cdev| group_holders(12, cdev, &places).into_iter().map(|holder| holder.pid).collect::<Vec<_>>();
        assert_eq!(pids(None), [300]);
        assert_eq!(pids(Some("vfio3")), [20, 300]);
        assert_eq!(group_holders(12, None, &places)[0].to_string(), "pid 300 (qemu-system-x86)");
    }

    #[test]
    fn a_free_group_is_free_and_a_missing_one_is_an_error() {
        let tree = Tree::new();
        tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        assert_eq!(group_is_free(12, &tree.places), Ok(true));
        assert_eq!(group_is_free(13, &tree.places).unwrap_err().code(), "NoGroupFile");
    }
}
