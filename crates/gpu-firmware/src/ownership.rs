//! Exclusive ownership of devices through VFIO, where possible without side effects on them.
//!
//! Holding `/dev/vfio/<group>` keeps every other VFIO user out, group and cdev alike, opens no device and so resets
//! none (virtual-gpu-rig section 6, fact 14). All group files and locks are taken before any device is touched, and driver
//! and group of each device are looked at again after that and before each reset.
//!
//! A kernel without group files has character devices only. Such a device is held by opening it, which resets it; the kernel
//! refuses that with `EINVAL`, before the reset, while somebody else has it open. What can be known without opening comes
//! first: processes that have such a node open are looked for before any is opened, and devices that are awake, and so
//! perhaps held, are tried before those that sleep, which nobody has open.
//!
//! A device without driver is bound to vfio-pci while it is ours, so that it can be held at all, and is left without driver
//! and with its former `driver_override` afterwards. Where that cannot be (no IOMMU group, vfio-pci not loaded) it is held by
//! its lock alone. A process that is killed leaves it bound to vfio-pci.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use hw_probe::{Bdf, PciFunction, SysRoot, VfioCdev};
use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::{Mode as FileMode, SFlag, major, makedev, minor, mknod};

use crate::access::{self, Access, Choice};
use crate::clock::{Clock, SystemClock, Wait};
use crate::error::{Error, Fault, Holder};
use crate::ioctl;
use crate::lock::{DeviceLock, RETRY as LOCK_RETRY};
use crate::sysfs::{bounded_write, file_fault, read_text};
use crate::transition::parallel;
use crate::vfio::{self, VfioDevice};

/// Where ownership is taken, and by whom.
#[derive(Clone, Debug)]
pub struct Places {
    /// The tree with `sys` and `proc`.
    pub root: SysRoot,
    /// The folder of VFIO's nodes; missing nodes are made in it. The node `iommu` is beside it.
    pub dev_vfio: PathBuf,
    /// The folder that outlives processes but not the boot; the locks are in `nvidia/ccnode/locks` below it. It must be
    /// the same one for every role on the host.
    pub run: PathBuf,
    /// What this process calls itself in its locks (`cc-manager`).
    pub role: String,
    /// The way to the devices.
    pub access: Access,
}

impl Places {
    /// The places of the running machine.
    pub fn host(role: impl Into<String>) -> Self {
        Self::at(SysRoot::host(), role)
    }

    /// The same places below `root`.
    pub fn at(root: SysRoot, role: impl Into<String>) -> Self {
        Self {
            dev_vfio: root.join("dev/vfio"),
            run: root.join("run"),
            root,
            role: role.into(),
            access: Access::default(),
        }
    }

    /// The same places with that way to the devices.
    #[must_use]
    pub fn with_access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// The IOMMU's node, in whose context character devices are opened.
    fn dev_iommu(&self) -> PathBuf {
        self.dev_vfio.with_file_name("iommu")
    }
}

/// How a device is owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// By its VFIO group file, of this group: the kernel keeps everybody else out.
    Group(u32),
    /// By its opened character device, on a kernel without group files: the kernel keeps everybody else out, and has reset
    /// the device for it.
    Cdev,
    /// By the lock of this crate alone, because no driver is bound: keeps out those who ask for the lock, nobody else.
    LockOnly,
}

/// Devices that are ours until this is dropped.
#[derive(Debug)]
pub struct Ownership {
    devices: Vec<OwnedDevice>,
}

/// Why ownership was not taken: one error for each device that could not be had. No register has been touched, and nothing
/// was reset, except that on a kernel without group files devices that could be had may have been opened before one that
/// could not.
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
        let mut claims = all(functions, |function| Owned::claim(function, places))?;
        // Every lock is ours now. What can be held without touching anything is, and what cannot be held is known of as
        // far as it shows, before the first device is touched.
        let mut groups = Groups::new();
        open_groups(&mut claims, &mut groups)?;
        all(&claims, Owned::look_free)?;
        all_at_once(&mut claims, Owned::borrow_driver)?;
        open_groups(&mut claims, &mut groups)?;
        open_cdevs(&mut claims, places)?;

        let bdfs: Arc<[Bdf]> = claims.iter().map(|claim| claim.function.bdf).collect();
        let groups: BTreeMap<u32, Weak<GroupFile>> =
            groups.iter().map(|(number, group)| (*number, Arc::downgrade(group))).collect();
        let own = |mut claim: Owned| {
            (claim.party, claim.party_groups) = (Arc::clone(&bdfs), groups.clone());
            OwnedDevice(Arc::new(claim))
        };
        let devices: Vec<OwnedDevice> = claims.into_iter().map(own).collect();
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
        unlocked_within(patience, clock, || Self::take(functions, places))
    }

    /// Whether [`Ownership::take`] would succeed now, as far as can be told without touching a device, and what taking and
    /// reading the devices would do to them. Waits for locks as [`Ownership::take_within`] does.
    pub fn look_within(
        functions: &[PciFunction],
        places: &Places,
        patience: Duration,
        clock: &dyn Clock,
    ) -> Result<Cost, Refused> {
        unlocked_within(patience, clock, || Self::look(functions, places))
    }

    fn look(functions: &[PciFunction], places: &Places) -> Result<Cost, Refused> {
        let mut claims = all(functions, |function| Owned::claim(function, places))?;
        open_groups(&mut claims, &mut Groups::new())?;
        all(&claims, Owned::look_free)?;
        let has_group_files = places.root.join("sys/class/misc/vfio").exists();
        let is_quiet = |claim: &Owned| {
            let function = &claim.function;
            let held_quietly = claim.group.is_some()
                || function.iommu_group.is_none()
                || (function.driver.is_none() && has_group_files);
            held_quietly && places.access != Access::Vfio && !access::is_locked_down(&places.root, function)
        };
        Ok(if claims.iter().all(is_quiet) { Cost::Nothing } else { Cost::Resets })
    }

    /// The devices, in the order they were asked for.
    pub fn devices(&self) -> &[OwnedDevice] {
        &self.devices
    }
}

/// What taking devices and reading what they are in does to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// Nothing.
    Nothing,
    /// They are opened through VFIO, which resets them and activates the knobs they have then.
    Resets,
}

/// Makes the attempt again, for up to `patience`, while nothing but locks is in the way.
fn unlocked_within<T>(
    patience: Duration,
    clock: &dyn Clock,
    mut attempt: impl FnMut() -> Result<T, Refused>,
) -> Result<T, Refused> {
    let mut last = Refused(Vec::new());
    let is_lock = |error: &Error| matches!(*error.fault, Fault::LockHeld { .. });
    let done = Wait::new(patience, LOCK_RETRY).poll(clock, || match attempt() {
        Err(refused) if refused.0.iter().all(is_lock) => {
            last = refused;
            Ok(None)
        }
        other => other.map(Some),
    })?;
    done.ok_or(last)
}

/// Does something with each item; all results, or all errors.
fn all<I, T>(items: impl IntoIterator<Item = I>, act: impl Fn(I) -> Result<T, Error>) -> Result<Vec<T>, Refused> {
    sort(items.into_iter().map(act))
}

/// All results, or all errors.
fn sort<T>(outcomes: impl IntoIterator<Item = Result<T, Error>>) -> Result<Vec<T>, Refused> {
    let mut results = Vec::new();
    let mut errors = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(result) => results.push(result),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(results) } else { Err(Refused(errors)) }
}

/// Group files that are held, by group. Groups may have several of our devices and are opened once.
type Groups = BTreeMap<u32, Arc<GroupFile>>;

/// Opens the group file of every device that can be held by one and is not yet.
fn open_groups(claims: &mut [Owned], groups: &mut Groups) -> Result<(), Refused> {
    let mut refused = Vec::new();
    for claim in claims.iter_mut().filter(|claim| claim.group.is_none()) {
        let fail = |fault| Error::new(claim.function.bdf, fault);
        let number = match claim.grip().map_err(fail) {
            Ok(Grip::Group(number)) => number,
            Ok(_) => continue,
            Err(error) => {
                refused.push(error);
                continue;
            }
        };
        if let Some(group) = groups.get(&number) {
            claim.group = Some(Arc::clone(group));
            continue;
        }
        match GroupFile::open(number, claim.cdev_name(), &claim.places).map(Arc::new) {
            Ok(group) => {
                groups.insert(number, Arc::clone(&group));
                claim.group = Some(group);
            }
            Err(fault) => refused.push(fail(fault)),
        }
    }
    if refused.is_empty() { Ok(()) } else { Err(Refused(refused)) }
}

/// Opens the character device of every device that is held by one, several at once: the kernel resets each.
fn open_cdevs(claims: &mut [Owned], places: &Places) -> Result<(), Refused> {
    let grips = all(claims.iter(), |claim| claim.grip().map_err(|fault| Error::new(claim.function.bdf, fault)))?;
    let mut waiting: Vec<&mut Owned> = claims
        .iter_mut()
        .zip(grips)
        .filter(|(claim, grip)| claim.group.is_none() && *grip == Grip::Cdev)
        .map(|(claim, _)| claim)
        .collect();
    let Some(first) = waiting.first() else { return Ok(()) };
    let iommu = open_iommu(places).map_err(|fault| Refused(vec![Error::new(first.function.bdf, fault)]))?;
    for claim in &mut waiting {
        claim.iommu = Some(Arc::clone(&iommu));
    }
    // Whoever is awake may be held. If one is, no sleeper is woken, and so reset, in vain.
    let (asleep, awake): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|claim| claim.is_asleep());
    for wave in [awake, asleep] {
        all_at_once(wave, |claim| {
            let device = claim.open_cdev(Arc::clone(&claim.lock))?;
            *claim.opened() = Some(device);
            Ok(())
        })?;
    }
    Ok(())
}

/// Does something that takes its time with several devices at once; all errors, if there are any.
fn all_at_once<'a>(
    claims: impl IntoIterator<Item = &'a mut Owned>,
    act: impl Fn(&mut Owned) -> Result<(), Fault> + Sync,
) -> Result<(), Refused> {
    let claims = claims.into_iter().map(|claim| (claim.function.bdf, claim)).collect();
    let done = parallel(claims, |bdf, claim: &mut Owned| act(claim).map_err(|fault| Error::new(bdf, fault)));
    sort(done.into_iter().map(|(_, result)| result)).map(drop)
}

fn open_iommu(places: &Places) -> Result<Arc<File>, Fault> {
    let path = places.dev_iommu();
    make_node(&path, &places.root.join("sys/class/misc/iommu/dev"))?;
    let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path);
    open.map(Arc::new).map_err(|error| vfio::node_fault(&path, &error))
}

/// What a device can be held by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grip {
    /// The file of this group.
    Group(u32),
    /// Its character device.
    Cdev,
    /// Nothing but its lock.
    Lock,
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
    now.vfio_cdev = cdev(&folder.join("vfio-dev"))?;
    Ok(now)
}

/// The character device that is listed in this folder.
fn cdev(folder: &Path) -> Result<Option<VfioCdev>, Fault> {
    let Some(entry) = fs::read_dir(folder).ok().and_then(|mut entries| entries.next()).and_then(Result::ok) else {
        return Ok(None);
    };
    let name = entry.file_name().to_string_lossy().into_owned();
    let Some((major, minor)) = numbers(&entry.path().join("dev"))? else { return Ok(None) };
    let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    Ok(Some(VfioCdev { name, major: number(major), minor: number(minor) }))
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
    group: Option<Arc<GroupFile>>,
    /// The context of its character device, when it is held by that.
    iommu: Option<Arc<File>>,
    /// Its character device, opened; taken by whoever works on the device.
    opened: Mutex<Option<VfioDevice>>,
    /// The driver that it has for as long as it is ours.
    loan: Option<Loan>,
    /// Last of what is let go, so that whoever waits for it finds the rest free.
    lock: Arc<DeviceLock>,
    places: Places,
    /// All that was taken together with it.
    party: Arc<[Bdf]>,
    party_groups: BTreeMap<u32, Weak<GroupFile>>,
}

impl Owned {
    /// Takes the lock and looks whether the device can be had at all.
    fn claim(function: &PciFunction, places: &Places) -> Result<Self, Error> {
        let fail = |fault| Error::new(function.bdf, fault);
        let lock = Arc::new(DeviceLock::take(function.bdf, places)?);
        let function = refresh(function, &places.root).map_err(fail)?;
        if let Some(driver) = function.driver.clone().filter(|_| !function.is_vfio_bound()) {
            return Err(fail(Fault::InUse { driver: Some(driver), group: None, holders: Vec::new() }));
        }
        let (places, opened) = (places.clone(), Mutex::default());
        let (party, party_groups) = (Arc::default(), BTreeMap::new());
        Ok(Self { function, group: None, iommu: None, opened, loan: None, lock, places, party, party_groups })
    }

    fn cdev_name(&self) -> Option<&str> {
        self.function.vfio_cdev.as_ref().map(|cdev| cdev.name.as_str())
    }

    fn cdev_path(&self) -> PathBuf {
        self.places.dev_vfio.join("devices").join(self.cdev_name().unwrap_or("none"))
    }

    fn folder(&self) -> PathBuf {
        self.places.root.function(self.function.bdf)
    }

    /// What the device can be held by as it is now.
    fn grip(&self) -> Result<Grip, Fault> {
        let places = &self.places;
        let has_file =
            |group: &u32| class_folder(*group, places).exists() || places.dev_vfio.join(group.to_string()).exists();
        let has_cdev = || places.dev_iommu().exists() || places.root.join("sys/class/misc/iommu/dev").exists();
        match (self.function.is_vfio_bound(), self.function.iommu_group) {
            // No driver: there is a group file only if another device of the group is bound to VFIO.
            (false, Some(group)) if class_folder(group, places).exists() => Ok(Grip::Group(group)),
            (false, _) => Ok(Grip::Lock),
            (true, Some(group)) if has_file(&group) => Ok(Grip::Group(group)),
            // Opening it claims its BARs, so that they cannot be reached through sysfs.
            (true, Some(_)) if self.cdev_name().is_some() && has_cdev() && places.access != Access::Sysfs => {
                Ok(Grip::Cdev)
            }
            (true, group) => Err(Fault::NoGroupFile { group }),
        }
    }

    /// Looks whether somebody has the character device open, when that is what the device will be held by. Nothing else
    /// says so without a reset.
    fn look_free(&self) -> Result<(), Error> {
        let fail = |fault| Error::new(self.function.bdf, fault);
        if self.group.is_some() || self.grip().map_err(fail)? != Grip::Cdev {
            return Ok(());
        }
        match cdev_holders(&self.function, &self.places) {
            holders if holders.is_empty() => Ok(()),
            holders => Err(fail(Fault::InUse { driver: None, group: self.function.iommu_group, holders })),
        }
    }

    fn is_asleep(&self) -> bool {
        is_asleep(&self.folder())
    }

    /// Opens the character device, which resets the device. A thread that does not end in time keeps `kept`.
    fn open_cdev<K: Send + 'static>(&self, kept: K) -> Result<VfioDevice, Fault> {
        let iommu = self.iommu.clone().ok_or(Fault::NoGroupFile { group: self.function.iommu_group })?;
        let path = self.cdev_path();
        make_node(&path, &self.folder().join("vfio-dev").join(self.cdev_name().unwrap_or("none")).join("dev"))?;
        vfio::check_alive(&self.folder())?;
        let (function, places) = (self.function.clone(), self.places.clone());
        let cannot = move |errno| {
            let group = function.iommu_group;
            let members = group.map_or_else(Vec::new, |group| members_of_the_host(group, &places.root));
            match group {
                Some(group) if errno == Errno::EBUSY && !members.is_empty() => Fault::GroupNotViable { group, members },
                _ => Fault::InUse { driver: None, group, holders: cdev_holders(&function, &places) },
            }
        };
        vfio::open_bounded(kept, move || VfioDevice::open_by_cdev(&path, &iommu, cannot))
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, Option<VfioDevice>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Binds a device without driver to vfio-pci, if that can be.
    fn borrow_driver(&mut self) -> Result<(), Fault> {
        let driver = self.places.root.join("sys/bus/pci/drivers").join(VFIO_PCI);
        if self.function.driver.is_some() || self.function.iommu_group.is_none() || !driver.exists() {
            return Ok(());
        }
        let Some(loan) = Loan::take(self)? else { return Ok(()) };
        self.loan = Some(loan);
        self.function = refresh(&self.function, &self.places.root)?;
        if matches!(self.grip(), Err(Fault::NoGroupFile { .. })) {
            // Bound, it could not be held in any way that serves; without driver its lock holds it.
            self.give_back_driver();
            self.function = refresh(&self.function, &self.places.root)?;
        }
        Ok(())
    }

    /// Leaves a device whose driver was ours without driver again, unless somebody has changed that or may have it open.
    fn give_back_driver(&mut self) {
        let Some(loan) = self.loan.take() else { return };
        let device = self.function.bdf;
        let left = |why: &str| tracing::warn!(%device, "left bound to {VFIO_PCI}: {why}");
        // While the group file is held nobody else can open the device. Otherwise it must be seen that nobody has: the kernel
        // would ask whoever has it open to let it go, and wait.
        if self.group.is_none() && !self.is_free_within(&SystemClock) {
            return left("it is or may be open by somebody");
        }
        match loan.give_back(self) {
            Ok(None) => tracing::debug!(%device, "without driver again"),
            Ok(Some(why)) => left(&why),
            Err(fault) => left(&fault.to_string()),
        }
    }

    fn is_free_within(&self, clock: &dyn Clock) -> bool {
        // VFIO puts a device to sleep in the moment after the last has closed it.
        let look = || {
            let free = matches!(device_use(&self.function, &self.places), Ok(Use::Free));
            Ok::<_, ()>(free.then_some(()))
        };
        matches!(IDLE.poll(clock, look), Ok(Some(())))
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let opened = self.opened().take();
        if let Some(device) = opened
            && let Err(fault) = vfio::close(device, Arc::clone(&self.lock))
        {
            tracing::warn!(device = %self.function.bdf, %fault, "closing it");
        }
        self.give_back_driver();
    }
}

/// The driver that devices without driver are held by.
const VFIO_PCI: &str = "vfio-pci";

/// How long a driver may take to be bound or unbound when nobody has the device open.
const BIND: Duration = Duration::from_secs(10);

/// How long the kernel may take to show what a bind or unbind has come to.
const LINK: Wait = Wait::new(Duration::from_secs(1), Duration::from_millis(10));

/// How long a closed device may take to fall asleep.
const IDLE: Wait = Wait::new(Duration::from_secs(1), Duration::from_millis(10));

/// A device without driver that has vfio-pci for a while.
#[derive(Debug)]
struct Loan {
    /// Text of `driver_override` before; empty when there was none.
    driver_override: String,
}

impl Loan {
    /// Binds the device; none if the kernel does not, and then it is as it was.
    fn take(device: &Owned) -> Result<Option<Self>, Fault> {
        let (folder, bdf) = (device.folder(), device.function.bdf);
        let path = folder.join("driver_override");
        let Some(before) = read_text(&path)? else { return Ok(None) };
        let loan = Self { driver_override: if before == "(null)" { String::new() } else { before } };
        write(device, &path, VFIO_PCI.into())?;
        let probed = write(device, &device.places.root.join("sys/bus/pci/drivers_probe"), bdf.to_string());
        // The write succeeds whatever comes of it (virtual-gpu-rig section 6, fact 3).
        let bound = probed.and_then(|()| await_driver(&folder, Some(VFIO_PCI)));
        if let Ok(true) = bound {
            tracing::info!(device = %bdf, "bound to {VFIO_PCI} for as long as it is ours");
            return Ok(Some(loan));
        }
        write(device, &path, loan.driver_override)?;
        bound?;
        tracing::warn!(device = %bdf, "the kernel does not bind it to {VFIO_PCI}; held by its lock alone");
        Ok(None)
    }

    /// Unbinds the device, and restores its override. Says why not, if it is no longer as we made it.
    fn give_back(self, device: &Owned) -> Result<Option<String>, Fault> {
        let folder = device.folder();
        let path = folder.join("driver_override");
        let driver = link_name(&folder.join("driver"))?;
        if driver.as_deref() != Some(VFIO_PCI) {
            let driver = driver.as_deref().unwrap_or("none").to_owned();
            return Ok(Some(format!("its driver is {driver} by now")));
        }
        match read_text(&path)? {
            Some(text) if text == VFIO_PCI => {}
            other => return Ok(Some(format!("its driver_override is {other:?} by now"))),
        }
        write(device, &path, self.driver_override)?;
        write(device, &folder.join("driver/unbind"), device.function.bdf.to_string())?;
        let gone = await_driver(&folder, None)?;
        Ok((!gone).then(|| "the kernel took the request and did not do it".into()))
    }
}

/// Whether the driver link becomes this one.
fn await_driver(folder: &Path, wanted: Option<&str>) -> Result<bool, Fault> {
    let path = folder.join("driver");
    let look = || Ok((link_name(&path)?.as_deref() == wanted).then_some(()));
    Ok(LINK.poll(&SystemClock, look)?.is_some())
}

/// Writes a line to a file of sysfs that may block. An empty line is written as a line end, which clears an override.
fn write(device: &Owned, path: &Path, text: String) -> Result<(), Fault> {
    let written = bounded_write(path.to_owned(), text + "\n", BIND, Arc::clone(&device.lock));
    written.map_err(|error| file_fault("write", path, error))
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
        match &self.0.group {
            Some(file) => Hold::Group(file.group),
            None if self.0.iommu.is_some() => Hold::Cdev,
            None => Hold::LockOnly,
        }
    }

    /// The way it will be reached, and why. Changes nothing and touches no register.
    pub fn choice(&self) -> Result<Choice, Error> {
        access::choose(self).map_err(|fault| Error::new(self.bdf(), fault))
    }

    /// The device's folder in sysfs.
    pub(crate) fn folder(&self) -> PathBuf {
        self.0.folder()
    }

    pub(crate) fn places(&self) -> &Places {
        &self.0.places
    }

    /// The group file that it is held by.
    pub(crate) fn group_file(&self) -> Option<Arc<GroupFile>> {
        self.0.group.clone()
    }

    /// The file of a group of one of the devices that were taken together with it.
    pub(crate) fn group_of(&self, group: u32) -> Option<Arc<GroupFile>> {
        self.0.party_groups.get(&group).and_then(Weak::upgrade)
    }

    /// All devices that were taken together, it among them.
    pub(crate) fn party(&self) -> &[Bdf] {
        &self.0.party
    }

    /// Its opened character device, which is closed by whoever takes it.
    pub(crate) fn take_opened(&self) -> Option<VfioDevice> {
        self.0.opened().take()
    }

    /// Opens its character device anew.
    pub(crate) fn open_cdev<K: Send + 'static>(&self, kept: K) -> Result<VfioDevice, Fault> {
        self.0.open_cdev(kept)
    }

    /// Whether driver and group are still those of when ownership was taken; anything else is
    /// [`Fault::OwnershipChanged`].
    pub fn recheck(&self) -> Result<(), Error> {
        self.changed().map_err(|fault| Error::new(self.bdf(), fault))
    }

    pub(crate) fn changed(&self) -> Result<(), Fault> {
        let before = &self.0.function;
        let now = refresh(before, &self.0.places.root)?;
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

/// A held group file. Holding it is all that is done with it, until a device of the group must be opened.
#[derive(Debug)]
pub(crate) struct GroupFile {
    group: u32,
    path: PathBuf,
    file: File,
    places: Places,
    /// What VFIO wants a group to be in before it opens its devices. Stays for as long as the group is held.
    container: Mutex<Option<OwnedFd>>,
}

impl GroupFile {
    fn open(group: u32, cdev: Option<&str>, places: &Places) -> Result<Self, Fault> {
        let path = places.dev_vfio.join(group.to_string());
        make_node(&path, &class_folder(group, places).join("dev"))?;
        match OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path) {
            Ok(file) => Ok(Self { group, path, file, places: places.clone(), container: Mutex::default() }),
            Err(error) => {
                let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
                let holders = || holders(group, cdev, places);
                Err(open_fault(group, &path, errno, holders))
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the group into a container of its own, for type 1 IOMMUs, if it is in none yet.
    pub(crate) fn set_container(&self) -> Result<(), Fault> {
        let mut container = self.container.lock().unwrap_or_else(PoisonError::into_inner);
        if container.is_some() {
            return Ok(());
        }
        let path = self.places.dev_vfio.join("vfio");
        make_node(&path, &self.places.root.join("sys/class/misc/vfio/dev"))?;
        let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path);
        let file = open.map_err(|error| vfio::node_fault(&path, &error))?;
        let refused = |action, path: &Path, errno: Errno| Fault::VfioRefused {
            action,
            path: path.to_owned(),
            errno: errno as i32,
        };
        ioctl::set_container(self.as_fd(), file.as_fd()).map_err(|errno| match errno {
            Errno::EBUSY | Errno::EPERM => {
                let members = members_of_the_host(self.group, &self.places.root);
                Fault::GroupNotViable { group: self.group, members }
            }
            _ => refused("take into a container", &self.path, errno),
        })?;
        let kind = ioctl::set_iommu(file.as_fd());
        kind.map_err(|errno| refused("set the IOMMU type of", &path, errno))?;
        *container = Some(file.into());
        Ok(())
    }
}

impl AsFd for GroupFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The members of a group that have a driver other than a VFIO driver, ports aside, with that driver.
fn members_of_the_host(group: u32, root: &SysRoot) -> Vec<(Bdf, String)> {
    let folder = root.join(format!("sys/kernel/iommu_groups/{group}/devices"));
    let mut members: Vec<(Bdf, String)> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let bdf: Bdf = entry.file_name().to_str()?.parse().ok()?;
            let driver = link_name(&root.function(bdf).join("driver")).ok().flatten()?;
            let vfio = driver.contains("vfio") || root.function(bdf).join("vfio-dev").exists();
            (!vfio && driver != "pcieport").then_some((bdf, driver))
        })
        .collect();
    members.sort_unstable();
    members
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

/// Major and minor number in a `dev` file of sysfs; none when there is no such file.
fn numbers(path: &Path) -> Result<Option<(u64, u64)>, Fault> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let parse = || {
                let (major, minor) = text.trim().split_once(':')?;
                Some((major.parse::<u64>().ok()?, minor.parse::<u64>().ok()?))
            };
            let expected = "major and minor number";
            let found = || text.chars().take(64).collect();
            let numbers =
                parse().ok_or_else(|| Fault::UnexpectedContent { path: path.to_owned(), found: found(), expected })?;
            Ok(Some(numbers))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::from_io("read", path, &error)),
    }
}

/// Sees to it that `path` is the character device of the numbers in `numbers_path`. The kernel makes it in the host's /dev; a
/// container's own /dev may lack it, or have one left from a former device of that name.
fn make_node(path: &Path, numbers_path: &Path) -> Result<(), Fault> {
    // Without the kernel's word for it a node is only opened, never made.
    let Some(numbers) = numbers(numbers_path)? else { return Ok(()) };
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
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Err(fail(Errno::EINVAL)) };
    fs::create_dir_all(folder).map_err(|error| Fault::from_io("make", folder, &error))?;
    // Under another name first: a node appears at its place whole, whoever else is making it.
    let temporary = folder.join(format!(".{}.{}", name.display(), std::process::id()));
    let _ = fs::remove_file(&temporary);
    mknod(&temporary, SFlag::S_IFCHR, FileMode::from_bits_truncate(0o600), makedev(numbers.0, numbers.1))
        .map_err(fail)?;
    fs::rename(&temporary, path).map_err(|error| Fault::from_io("make", path, &error))?;
    tracing::info!(path = %path.display(), major = numbers.0, minor = numbers.1, "made a node of VFIO's");
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

/// Whether somebody uses a device through VFIO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// Nobody does: its group file could be opened, or it sleeps.
    Free,
    /// Somebody does, as far as can be seen these.
    Held(Vec<Holder>),
    /// There is no group file, the device is awake, and nobody is seen to have it open.
    Unknown,
}

/// Whether somebody uses a device through VFIO, as far as can be told without opening it. Where there are group files
/// as [`group_is_free`], with what that says of polls. An error is a group file that cannot be tried.
pub fn device_use(function: &PciFunction, places: &Places) -> Result<Use, Fault> {
    let cdev = function.vfio_cdev.as_ref().map(|cdev| cdev.name.as_str());
    match function.iommu_group.map(|group| (group, GroupFile::open(group, cdev, places))) {
        Some((_, Ok(_))) => return Ok(Use::Free),
        Some((_, Err(Fault::InUse { holders, .. }))) => return Ok(Use::Held(holders)),
        None | Some((_, Err(Fault::NoGroupFile { .. }))) => {}
        Some((_, Err(fault))) => return Err(fault),
    }
    let holders = cdev_holders(function, places);
    if !holders.is_empty() {
        return Ok(Use::Held(holders));
    }
    // Opening a device wakes it, and it sleeps no more until it is closed (virtual-gpu-rig section 6, fact 1).
    Ok(if is_asleep(&places.root.function(function.bdf)) { Use::Free } else { Use::Unknown })
}

/// The processes that can be seen to have a device's character device open.
fn cdev_holders(function: &PciFunction, places: &Places) -> Vec<Holder> {
    // No group of that number has a file.
    let group = function.iommu_group.unwrap_or(u32::MAX);
    holders(group, function.vfio_cdev.as_ref().map(|cdev| cdev.name.as_str()), places)
}

fn is_asleep(folder: &Path) -> bool {
    matches!(read_text(&folder.join("power/runtime_status")), Ok(Some(status)) if status == "suspended")
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
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use hw_probe::Inventory;
    use hw_probe::testing::FakeSysfs;

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
    fn a_look_says_what_it_would_do_and_does_nothing() {
        let look = |tree: &Tree, gpu: &PciFunction| {
            let cost =
                Ownership::look_within(std::slice::from_ref(gpu), &tree.places, Duration::ZERO, &FakeClock::default());
            assert!(
                Ownership::take(std::slice::from_ref(gpu), &tree.places).is_ok() || cost.is_err(),
                "nothing is kept"
            );
            cost.map_err(|refused| refused.0[0].code())
        };
        let bound = |tree: &Tree| tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        let tree = Tree::new();
        assert_eq!(look(&tree, &bound(&tree)), Ok(Cost::Nothing));
        let tree = Tree::new();
        tree.sysfs.lockdown(hw_probe::Lockdown::Integrity);
        assert_eq!(look(&tree, &bound(&tree)), Ok(Cost::Resets));
        let mut tree = Tree::new();
        tree.places.access = Access::Vfio;
        assert_eq!(look(&tree, &bound(&tree)), Ok(Cost::Resets));
        let tree = Tree::new();
        assert_eq!(look(&tree, &tree.function("0000:41:00.0", None, None)), Ok(Cost::Nothing));
        let tree = Tree::new();
        assert_eq!(look(&tree, &tree.function("0000:41:00.0", Some("nvidia"), Some(12))), Err("InUse"));
        let tree = Tree::new();
        let gpu = bound(&tree);
        let _lock = DeviceLock::take(gpu.bdf, &tree.places).unwrap();
        assert_eq!(look(&tree, &gpu), Err("LockHeld"));
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

    /// Ends the kernel however the test ends.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// Does `act` while a kernel does what is written to the files of the bus.
    fn with_kernel<T>(sysfs: &FakeSysfs, act: impl FnOnce() -> T) -> T {
        let stop = AtomicBool::new(false);
        let take = |path: &str| {
            let path = sysfs.path().join(path);
            let text = fs::read_to_string(&path).unwrap_or_default();
            if text.ends_with('\n') {
                fs::write(&path, "").unwrap();
            }
            text.trim_end().parse::<Bdf>().ok()
        };
        let serve = || {
            while !stop.load(Ordering::Relaxed) {
                if let Some(bdf) = take("sys/bus/pci/drivers_probe") {
                    sysfs.drivers_probe(bdf);
                }
                if let Some(bdf) = take("sys/bus/pci/drivers/vfio-pci/unbind") {
                    sysfs.unbind(bdf).unwrap();
                }
                thread::sleep(Duration::from_millis(1));
            }
        };
        thread::scope(|scope| {
            scope.spawn(serve);
            let _stop = Stop(&stop);
            act()
        })
    }

    /// A plain file keeps what follows the text written over its start; sysfs does not.
    fn override_of(tree: &Tree, bdf: Bdf) -> String {
        let text = tree.sysfs.get(bdf).read("driver_override");
        text.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn a_device_without_driver_is_bound_while_it_is_ours() {
        for before in ["", "pci-stub"] {
            let tree = Tree::new();
            tree.sysfs.load_driver("vfio-pci");
            let gpu = tree.function("0000:41:00.0", None, Some(12));
            let _ = tree.sysfs.get(gpu.bdf).driver_override(before);
            // The fake makes it after the driver's link, when the kernel has done both.
            tree.sysfs.file("dev/vfio/12", "");
            with_kernel(&tree.sysfs, || {
                let ownership = Ownership::take(std::slice::from_ref(&gpu), &tree.places).unwrap();
                let device = &ownership.devices()[0];
                assert_eq!(device.hold(), Hold::Group(12));
                assert_eq!(device.function().driver.as_deref(), Some("vfio-pci"));
                assert_eq!(override_of(&tree, gpu.bdf), "vfio-pci");
                assert_eq!(device.recheck(), Ok(()));
            });
            assert_eq!(link_name(&tree.sysfs.get(gpu.bdf).path().join("driver")), Ok(None));
            assert_eq!(override_of(&tree, gpu.bdf), before);
        }
    }

    #[test]
    fn what_somebody_else_has_changed_meanwhile_is_left() {
        for (driver, driver_override) in [("vfio-pci", "another"), ("nvidia", "vfio-pci")] {
            let tree = Tree::new();
            tree.sysfs.load_driver("vfio-pci");
            let gpu = tree.function("0000:41:00.0", None, Some(12));
            tree.sysfs.file("dev/vfio/12", "");
            with_kernel(&tree.sysfs, || {
                let ownership = Ownership::take(std::slice::from_ref(&gpu), &tree.places).unwrap();
                assert_eq!(ownership.devices()[0].hold(), Hold::Group(12));
                // The last of what the fake does at a bind, of which the driver's link is the first.
                while tree.sysfs.get(gpu.bdf).read("power/runtime_status") != "suspended\n" {
                    thread::yield_now();
                }
                let _ = tree.sysfs.get(gpu.bdf).driver(driver).driver_override(driver_override);
                drop(ownership);
            });
            assert_eq!(link_name(&tree.sysfs.get(gpu.bdf).path().join("driver")), Ok(Some(driver.to_owned())));
            assert_eq!(override_of(&tree, gpu.bdf), driver_override);
        }
    }

    #[test]
    fn a_device_that_the_kernel_does_not_bind_is_held_by_its_lock_and_as_it_was() {
        let tree = Tree::new();
        tree.sysfs.load_driver("vfio-pci");
        let gpu = tree.function("0000:41:00.0", None, Some(12));
        let _ = tree.sysfs.get(gpu.bdf).driver_override("pci-stub");
        let ownership = Ownership::take(std::slice::from_ref(&gpu), &tree.places).unwrap();
        assert_eq!(ownership.devices()[0].hold(), Hold::LockOnly);
        assert_eq!(override_of(&tree, gpu.bdf), "pci-stub");
        assert_eq!(tree.sysfs.read("sys/bus/pci/drivers_probe"), "0000:41:00.0\n", "it was asked to");
    }

    /// A GPU on a kernel without group files.
    fn by_cdev(tree: &Tree, bdf: &str, number: u32, group: u32) -> PciFunction {
        let gpu = tree.function(bdf, Some("vfio-pci"), Some(group));
        let _ = tree.sysfs.get(gpu.bdf).cdev(number).power("auto", "suspended", "D3hot");
        fs::remove_file(tree.places.dev_vfio.join(group.to_string())).unwrap();
        Inventory::scan(&tree.places.root).get(gpu.bdf).unwrap().clone()
    }

    #[test]
    fn a_held_character_device_refuses_before_anything_is_touched() {
        let tree = Tree::new();
        tree.sysfs.load_driver("vfio-pci").process(77, "qemu-system-x86", "0::/\n", &["/dev/vfio/devices/vfio1"]);
        let driverless = tree.function("0000:40:00.0", None, Some(11));
        let gpus = [driverless, by_cdev(&tree, "0000:41:00.0", 0, 12), by_cdev(&tree, "0000:42:00.0", 1, 13)];
        let Refused(errors) = Ownership::take(&gpus, &tree.places).unwrap_err();
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["0000:42:00.0: In use: VFIO group 13 is held by pid 77 (qemu-system-x86)"]);
        assert_eq!(tree.sysfs.read("sys/bus/pci/drivers_probe"), "");
        // Through sysfs alone it could not be held at all.
        let places = tree.places.clone().with_access(Access::Sysfs);
        assert_eq!(Ownership::take(&gpus[1..2], &places).unwrap_err().0[0].code(), "NoGroupFile");
    }

    #[test]
    fn a_refusal_gives_back_what_was_bound() {
        let tree = Tree::new();
        tree.sysfs.load_driver("vfio-pci");
        let driverless = tree.function("0000:40:00.0", None, Some(11));
        tree.sysfs.file("dev/vfio/11", "");
        let gpus = [driverless, by_cdev(&tree, "0000:41:00.0", 0, 12)];
        with_kernel(&tree.sysfs, || {
            let Refused(errors) = Ownership::take(&gpus, &tree.places).unwrap_err();
            let [error] = &errors[..] else { panic!("{errors:?}") };
            // There is no such device, and who may not make nodes cannot even try.
            assert_eq!(error.bdf, gpus[1].bdf);
            assert!(matches!(error.code(), "VfioRefused" | "PermissionDenied"), "{error}");
            assert!(error.to_string().contains("/dev/vfio/devices/vfio0"), "{error}");
        });
        assert_eq!(link_name(&tree.sysfs.get(gpus[0].bdf).path().join("driver")), Ok(None));
        assert_eq!(override_of(&tree, gpus[0].bdf), "");
    }

    #[test]
    fn use_is_told_by_group_file_sleep_and_holders() {
        let tree = Tree::new();
        let grouped = tree.function("0000:40:00.0", Some("vfio-pci"), Some(11));
        assert_eq!(device_use(&grouped, &tree.places), Ok(Use::Free));
        let asleep = by_cdev(&tree, "0000:41:00.0", 0, 12);
        assert_eq!(device_use(&asleep, &tree.places), Ok(Use::Free));
        let _ = tree.sysfs.get(asleep.bdf).power("auto", "active", "D0");
        assert_eq!(device_use(&asleep, &tree.places), Ok(Use::Unknown));
        tree.sysfs.process(77, "qemu", "0::/\n", &["/dev/vfio/devices/vfio0"]);
        let holder = Holder { pid: 77, comm: "qemu".into() };
        assert_eq!(device_use(&asleep, &tree.places), Ok(Use::Held(vec![holder])));
    }

    #[test]
    fn members_of_a_group_that_the_host_uses_are_named() {
        let tree = Tree::new();
        tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        tree.function("0000:42:00.0", Some("nvidia"), Some(12));
        tree.function("0000:43:00.0", None, Some(12));
        let _ = tree.sysfs.bridge("0000:40:01.0").group(12);
        let members = members_of_the_host(12, &tree.places.root);
        assert_eq!(members, [("0000:42:00.0".parse().unwrap(), "nvidia".to_owned())]);
        let text = Fault::GroupNotViable { group: 12, members }.to_string();
        assert_eq!(text, "IOMMU group 12 cannot be opened by VFIO: 0000:42:00.0 is on driver nvidia");
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
