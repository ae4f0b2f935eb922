//! The `vfio` back end: an opened VFIO device, for kernels that are locked down or have no group files.
//!
//! Registers and configuration space are read and written as regions of the device's file, each access one aligned
//! `pread` or `pwrite` of a dword: where a mapping would raise SIGBUS, the kernel answers with an error.
//!
//! # Resets that come with it
//!
//! The kernel resets a device when it is opened and again when it is closed (virtual-gpu-rig section 6, fact 4), and each
//! reset activates the knobs that the device has then. One change of mode so takes three resets instead of one:
//!
//! 1. Opening activates what was pending before. That cannot be helped: the next virtual machine would have activated it
//!    as well. The device boots, and is not looked at before it has.
//! 2. The reset of the change activates the staged vector. The device boots and is verified, effective mode and
//!    knobs, while it is still open and nobody else can get at it.
//! 3. Closing resets it once more, which activates the vector that has just been verified: knobs outlast resets, and
//!    between verification and closing nobody writes any. So the mode after it is the verified one. What may still go wrong is that
//!    the device does not come back, and that is looked at after closing, in configuration space, which sysfs shows without
//!    opening anything. To read registers again would take opening it again, which resets it again, without end.
//!
//! The same holds when a transition fails or the process dies: the kernel closes the device, and the knobs as they are
//! then are activated. Therefore every knob vector on the way must be one that may be activated.
//!
//! A device held by its character device is free for others from the moment it is closed; one held by its group file
//! stays held until ownership ends.
//!
//! # Somebody wants the device back
//!
//! Whoever unbinds or unplugs an opened device waits until it is closed. The kernel says so by an interrupt, which
//! [`BackEnd::release_requested`] tells. The kernel then holds the device's lock, so that no reset would succeed.

use std::ffi::CString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use hw_probe::Bdf;
use nix::errno::Errno;
use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_bindings::bindings::vfio::{VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX};

use crate::access::{Access, BackEnd, Bar0, Reset};
use crate::clock::{Clock, SystemClock, Wait, millis};
use crate::error::Fault;
use crate::ioctl::{self, Region, ResetScope};
use crate::ownership::{GroupFile, Hold, OwnedDevice};
use crate::sysfs::{Guard, RESET_TIMEOUT, Unfinished, bounded, config_fault, reset_methods};

/// How long somebody else may hold the device's lock (a driver being probed, for instance) before a call that needs it fails.
const LOCKED: Wait = Wait::new(Duration::from_secs(5), Duration::from_millis(50));

/// Offset of COMMAND in configuration space.
const COMMAND: u16 = 0x04;

/// COMMAND: the function answers memory accesses.
const COMMAND_MEMORY: u16 = 0x2;

/// Size of a dword in bytes.
const DWORD: u64 = 4;

/// An opened device. Dropping it closes it, and so resets it; see [`close`].
pub(crate) struct VfioDevice {
    file: File,
    /// What it was opened by, for errors.
    path: PathBuf,
    config: Region,
    bar0: Region,
    /// Whether the kernel can reset it as a function.
    can_reset: bool,
    /// Signalled when somebody wants the device back; none where the kernel cannot say it.
    requests: Option<EventFd>,
    requested: AtomicBool,
}

impl fmt::Debug for VfioDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioDevice").field("path", &self.path).finish_non_exhaustive()
    }
}

impl VfioDevice {
    /// Opens a device of a group that is held. The device is reset by it.
    pub(crate) fn open_by_group(group: &GroupFile, bdf: Bdf) -> Result<Self, Fault> {
        group.set_container()?;
        let name = CString::new(bdf.to_string()).map_err(|_| refused("open", group.path(), Errno::EINVAL))?;
        let open = || unlocked(|| ioctl::device_fd(group.as_fd(), &name));
        let device = open().map_err(|errno| refused("open the device of", group.path(), errno))?;
        Self::new(File::from(device), group.path().to_owned())
    }

    /// Opens the device behind a character device, in the context of `iommu`. The device is reset by it. `in_use` says who
    /// has it, if that is why the kernel refuses.
    pub(crate) fn open_by_cdev(path: &Path, iommu: &File, in_use: impl FnOnce(Errno) -> Fault) -> Result<Self, Fault> {
        let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path);
        let file = open.map_err(|error| node_fault(path, &error))?;
        unlocked(|| ioctl::bind_iommufd(file.as_fd(), iommu.as_fd())).map_err(|errno| match errno {
            // EINVAL: the device is open; EBUSY: its group is used by somebody.
            Errno::EINVAL | Errno::EBUSY => in_use(errno),
            _ => refused("open", path, errno),
        })?;
        Self::new(file, path.to_owned())
    }

    fn new(file: File, path: PathBuf) -> Result<Self, Fault> {
        let fail = |errno| refused("describe", &path, errno);
        let config = ioctl::region(file.as_fd(), VFIO_PCI_CONFIG_REGION_INDEX).map_err(fail)?;
        let bar0 = ioctl::region(file.as_fd(), VFIO_PCI_BAR0_REGION_INDEX).map_err(fail)?;
        let can_reset = ioctl::can_reset(file.as_fd()).map_err(fail)?;
        let requests = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .and_then(|event| ioctl::watch_requests(file.as_fd(), &event).map(|()| event))
            .inspect_err(|errno| tracing::debug!(path = %path.display(), %errno, "requests for it cannot be seen"))
            .ok();
        Ok(Self { file, path, config, bar0, can_reset, requests, requested: AtomicBool::new(false) })
    }

    /// One read of a dword of a region.
    fn read(&self, region: Region, offset: u64) -> Result<u32, Errno> {
        let mut dword = [0; 4];
        match self.file.read_at(&mut dword, region.offset + offset) {
            Ok(4) => Ok(u32::from_le_bytes(dword)),
            // A second access for the rest would be another one than was asked for.
            Ok(_) => Err(Errno::EIO),
            Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32))),
        }
    }

    /// One write to a region, of a word or dword.
    fn write(&self, region: Region, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        match self.file.write_at(bytes, region.offset + offset) {
            Ok(written) if written == bytes.len() => Ok(()),
            Ok(_) => Err(Errno::EIO),
            Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32))),
        }
    }

    fn config32(&self, offset: u16) -> Result<u32, Fault> {
        let offset = u64::from(offset);
        if !offset.is_multiple_of(DWORD) || offset + DWORD > self.config.size {
            return Err(refused("read configuration space through", &self.path, Errno::EINVAL));
        }
        let fail = |errno| self.access_fault("read configuration space through", errno);
        self.read(self.config, offset).map_err(fail)
    }

    /// Sets COMMAND's memory bit if it is not set.
    fn enable_memory(&self) -> Result<(), Fault> {
        let [low, high, ..] = self.config32(COMMAND)?.to_le_bytes();
        let command = u16::from_le_bytes([low, high]);
        if command == u16::MAX || command & COMMAND_MEMORY != 0 {
            return Ok(());
        }
        let bytes = (command | COMMAND_MEMORY).to_le_bytes();
        let fail = |errno| self.access_fault("write configuration space through", errno);
        self.write(self.config, COMMAND.into(), &bytes).map_err(fail)
    }

    /// Where a register is, if it lies in BAR0 and is aligned.
    fn register(&self, register: u32) -> Result<u64, Fault> {
        let offset = u64::from(register);
        if !offset.is_multiple_of(DWORD) || offset + DWORD > self.bar0.size {
            return Err(Fault::OutsideBar0 { register, size: self.bar0.size });
        }
        Ok(offset)
    }

    fn register_fault(&self, register: u32, action: &'static str, errno: Errno) -> Fault {
        match errno {
            Errno::EIO => Fault::Bar0Closed { register },
            Errno::EBUSY => Fault::BusyRegion { path: self.path.clone(), driver: None },
            _ => self.access_fault(action, errno),
        }
    }

    fn access_fault(&self, action: &'static str, errno: Errno) -> Fault {
        match errno {
            Errno::ENODEV | Errno::ENXIO => gone(&self.path, errno),
            _ => refused(action, &self.path, errno),
        }
    }

    fn is_requested(&self) -> bool {
        if self.requests.as_ref().is_some_and(|event| event.read().is_ok()) {
            self.requested.store(true, Ordering::Relaxed);
        }
        self.requested.load(Ordering::Relaxed)
    }
}

impl AsFd for VfioDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Does something for which the kernel needs the device's lock, as often as it takes to get it.
fn unlocked<T>(mut act: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    let done = LOCKED.poll(&SystemClock, || match act() {
        Err(Errno::EAGAIN) => Ok(None),
        other => other.map(Some),
    })?;
    done.ok_or(Errno::EAGAIN)
}

fn refused(action: &'static str, path: &Path, errno: Errno) -> Fault {
    match errno {
        Errno::ENODEV => gone(path, errno),
        Errno::EPERM | Errno::EACCES => Fault::PermissionDenied { path: path.to_owned(), errno: errno as i32 },
        _ => Fault::VfioRefused { action, path: path.to_owned(), errno: errno as i32 },
    }
}

fn gone(path: &Path, errno: Errno) -> Fault {
    Fault::OffBus { what: format!("{} says {}", path.display(), errno.desc()) }
}

/// What it means that a node of VFIO's cannot be opened.
pub(crate) fn node_fault(path: &Path, error: &io::Error) -> Fault {
    refused("open", path, Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32)))
}

/// Opens a device on a thread of its own, for the kernel resets it meanwhile. The thread keeps `kept`.
pub(crate) fn open_bounded<K: Send + 'static>(
    kept: K,
    open: impl FnOnce() -> Result<VfioDevice, Fault> + Send + 'static,
) -> Result<VfioDevice, Fault> {
    bounded("vfio open", RESET_TIMEOUT, kept, open).map_err(|error| unfinished(error, RESET_TIMEOUT))?
}

/// Closes a device on a thread of its own, for the kernel resets it meanwhile. The thread keeps `kept`.
pub(crate) fn close<K: Send + 'static>(device: VfioDevice, kept: K) -> Result<(), Fault> {
    let done = bounded("vfio close", RESET_TIMEOUT, kept, move || drop(device));
    done.map_err(|error| unfinished(error, RESET_TIMEOUT))
}

fn unfinished(error: Unfinished, timeout: Duration) -> Fault {
    match error {
        Unfinished::Late => Fault::ResetTimeout { waited_ms: millis(timeout) },
        Unfinished::NoThread(error) => Fault::Interrupted { what: format!("cannot start a thread: {error}") },
        Unfinished::Panicked => Fault::Interrupted { what: "a thread panicked".into() },
    }
}

/// Whether configuration space answers, by sysfs. A dead device is neither opened nor reset: the kernel would wait for it for
/// minutes.
pub(crate) fn check_alive(folder: &Path) -> Result<(), Fault> {
    let path = folder.join("config");
    let file = File::open(&path).map_err(|error| Fault::from_io("open", &path, &error))?;
    match read_config(&file, &path, 0)? & 0xffff {
        0xffff => Err(Fault::OffBus { what: "configuration space does not answer; not opened".into() }),
        _ => Ok(()),
    }
}

fn read_config(file: &File, path: &Path, offset: u16) -> Result<u32, Fault> {
    let mut dword = [0; 4];
    file.read_exact_at(&mut dword, offset.into()).map_err(|error| config_fault(path, &error))?;
    Ok(u32::from_le_bytes(dword))
}

/// The back end.
pub(crate) struct VfioBackEnd {
    /// None once it was given up.
    device: Option<Arc<VfioDevice>>,
    /// Configuration space as sysfs shows it, for when nothing is open.
    config: File,
    config_path: PathBuf,
    /// Power is pinned on from before the device is opened until after it has been looked at for the last time: VFIO puts
    /// what it closes to sleep.
    guard: Arc<Guard>,
    /// Something that did not end in time is still under way in the kernel.
    abandoned: bool,
}

impl VfioBackEnd {
    /// Wakes the device up and opens it, which resets it. One that is held by its character device is open already.
    pub(crate) fn open(owned: OwnedDevice, clock: &dyn Clock) -> Result<Self, Fault> {
        let folder = owned.folder();
        let config_path = folder.join("config");
        let config = File::open(&config_path).map_err(|error| Fault::from_io("open", &config_path, &error))?;
        let guard = Guard::awake(owned, clock)?;
        let device = guard.device();
        device.changed()?;
        let opened = match (device.take_opened(), device.hold()) {
            (Some(opened), _) => opened,
            (None, Hold::Cdev) => device.open_cdev(Arc::clone(&guard))?,
            (None, _) => {
                check_alive(&folder)?;
                let group = device.group_file().ok_or(Fault::AccessUnavailable {
                    access: Access::Vfio,
                    reason: "it is not bound to a VFIO driver",
                })?;
                let bdf = device.bdf();
                open_bounded(Arc::clone(&guard), move || VfioDevice::open_by_group(&group, bdf))?
            }
        };
        Ok(Self { device: Some(Arc::new(opened)), config, config_path, guard, abandoned: false })
    }

    /// The opened device, if nothing is under way that whoever touches it would wait for.
    fn opened(&self) -> Result<&Arc<VfioDevice>, Fault> {
        if self.abandoned {
            return Err(Fault::ResetTimeout { waited_ms: millis(RESET_TIMEOUT) });
        }
        let reason = "it was given back";
        self.device.as_ref().ok_or(Fault::AccessUnavailable { access: Access::Vfio, reason })
    }

    /// Has the kernel reset the device, on a thread of its own.
    fn reset_by(
        &mut self,
        timeout: Duration,
        reset: impl Fn(&VfioDevice) -> Result<(), Errno> + Send + 'static,
    ) -> Result<Result<(), Errno>, Fault> {
        let device = Arc::clone(self.opened()?);
        if device.is_requested() {
            return Err(Fault::ReleaseRequested);
        }
        let act = move || {
            unlocked(|| match reset(&device) {
                // Whoever wants the device back holds its lock until he has it.
                Err(Errno::EAGAIN) if device.is_requested() => Err(Errno::ECANCELED),
                other => other,
            })
        };
        match bounded("vfio reset", timeout, Arc::clone(&self.guard), act) {
            Ok(Err(Errno::ECANCELED)) => Err(Fault::ReleaseRequested),
            Ok(result) => Ok(result),
            Err(error) => {
                self.abandoned |= matches!(error, Unfinished::Late);
                Err(unfinished(error, timeout))
            }
        }
    }

    fn reset_fault(&self, errno: Errno) -> Fault {
        let methods = reset_methods(&self.guard.device().folder());
        match errno {
            Errno::ENOTTY | Errno::EINVAL => Fault::ResetUnavailable { methods },
            Errno::ENODEV => gone(&self.config_path, errno),
            _ => Fault::ResetFailed { errno: errno as i32, methods },
        }
    }

    fn hot_reset(&mut self) -> Result<(), Fault> {
        let unavailable = |reason: String| Fault::BusResetUnavailable { reason };
        let device = self.opened()?;
        let scope = ioctl::reset_scope(device.as_fd()).map_err(|errno| match errno {
            Errno::ENODEV => unavailable("the kernel can reset neither its slot nor its bus".into()),
            Errno::EPERM => unavailable("a device on its bus has no IOMMU group".into()),
            _ => refused("look at the bus of", &device.path, errno),
        })?;
        let owned = self.guard.device();
        let groups = groups_of(&scope, owned.hold() == Hold::Cdev, owned.party(), |group| owned.group_of(group))
            .map_err(|strangers| {
                let names: Vec<_> = strangers.iter().map(ToString::to_string).collect();
                unavailable(format!("it would reset {} as well, which is not ours", names.join(", ")))
            })?;
        let reset = move |device: &VfioDevice| {
            let files: Vec<BorrowedFd<'_>> = groups.iter().map(|group| group.as_fd()).collect();
            ioctl::hot_reset(device.as_fd(), &files)
        };
        self.reset_by(RESET_TIMEOUT, reset)?.map_err(|errno| match errno {
            Errno::EINVAL | Errno::ENODEV => {
                unavailable("the kernel refuses it: a device on its bus is not bound to a VFIO driver".into())
            }
            _ => self.reset_fault(errno),
        })
    }
}

/// The group files that the kernel wants to see for a hot reset, none where it goes by character devices; or the functions in
/// its scope that are not ours.
fn groups_of<G>(
    scope: &ResetScope,
    by_cdev: bool,
    party: &[Bdf],
    held: impl Fn(u32) -> Option<G>,
) -> Result<Vec<G>, Vec<Bdf>> {
    if by_cdev {
        let strangers = || scope.functions.iter().map(|(bdf, _)| *bdf).filter(|bdf| !party.contains(bdf)).collect();
        return if scope.owned { Ok(Vec::new()) } else { Err(strangers()) };
    }
    let mut groups: Vec<u32> = scope.functions.iter().map(|(_, group)| *group).collect();
    groups.sort_unstable();
    groups.dedup();
    let files: Vec<(u32, Option<G>)> = groups.into_iter().map(|group| (group, held(group))).collect();
    let is_held = |group: u32| files.iter().any(|(other, file)| *other == group && file.is_some());
    let strangers: Vec<Bdf> =
        scope.functions.iter().filter(|(_, group)| !is_held(*group)).map(|(bdf, _)| *bdf).collect();
    if strangers.is_empty() { Ok(files.into_iter().filter_map(|(_, file)| file).collect()) } else { Err(strangers) }
}

impl Reset for VfioBackEnd {
    fn reset(&mut self) -> Result<(), Fault> {
        self.guard.device().changed()?;
        if !self.opened()?.can_reset {
            return self.hot_reset();
        }
        let result = self.reset_by(RESET_TIMEOUT, |device| ioctl::reset(device.as_fd()))?;
        result.map_err(|errno| self.reset_fault(errno))
    }

    fn bus_reset(&mut self) -> Result<(), Fault> {
        self.guard.device().changed()?;
        self.hot_reset()
    }
}

impl BackEnd for VfioBackEnd {
    fn access(&self) -> Access {
        Access::Vfio
    }

    fn config32(&self, offset: u16) -> Result<u32, Fault> {
        match &self.device {
            None if !self.abandoned => read_config(&self.config, &self.config_path, offset),
            _ => self.opened()?.config32(offset),
        }
    }

    fn bar0(&mut self) -> Result<Box<dyn Bar0>, Fault> {
        let device = self.opened()?;
        if device.bar0.size == 0 {
            return Err(Fault::NoBar0);
        }
        device.enable_memory()?;
        Ok(Box::new(VfioBar0(Arc::downgrade(device))))
    }

    fn release_requested(&self) -> bool {
        self.device.as_ref().is_some_and(|device| device.is_requested())
    }

    fn release(&mut self) -> Result<bool, Fault> {
        let Some(device) = self.device.take() else { return Ok(false) };
        // A reset that is still under way holds it as well, and closes it when it ends.
        let device = Arc::into_inner(device).filter(|_| !self.abandoned);
        let device = device.ok_or(Fault::ResetTimeout { waited_ms: millis(RESET_TIMEOUT) })?;
        close(device, Arc::clone(&self.guard)).inspect_err(|fault| {
            self.abandoned |= matches!(fault, Fault::ResetTimeout { .. });
        })?;
        Ok(true)
    }
}

impl Drop for VfioBackEnd {
    fn drop(&mut self) {
        if let Err(fault) = self.release() {
            tracing::warn!(device = %self.guard.device().bdf(), %fault, "closing it");
        }
    }
}

/// BAR0 of an opened device, for as long as it is open.
struct VfioBar0(Weak<VfioDevice>);

impl VfioBar0 {
    fn device(&self) -> Result<Arc<VfioDevice>, Fault> {
        self.0.upgrade().ok_or(Fault::AccessUnavailable { access: Access::Vfio, reason: "it was given back" })
    }
}

impl Bar0 for VfioBar0 {
    fn read32(&self, register: u32) -> Result<u32, Fault> {
        let device = self.device()?;
        let offset = device.register(register)?;
        let fail = |errno| device.register_fault(register, "read BAR0 through", errno);
        device.read(device.bar0, offset).map_err(fail)
    }

    fn write32(&self, register: u32, value: u32) -> Result<(), Fault> {
        let device = self.device()?;
        let offset = device.register(register)?;
        let fail = |errno| device.register_fault(register, "write BAR0 through", errno);
        device.write(device.bar0, offset, &value.to_le_bytes()).map_err(fail)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::*;

    /// A plain file in the place of an opened device: configuration space at 0x1000, BAR0 of 4 KiB at 0x2000.
    fn device() -> (tempfile::NamedTempFile, Arc<VfioDevice>) {
        let named = tempfile::NamedTempFile::new().unwrap();
        fs::write(named.path(), vec![0; 0x3000]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(named.path()).unwrap();
        let device = VfioDevice {
            file,
            path: "/dev/vfio/12".into(),
            config: Region { offset: 0x1000, size: 0x1000 },
            bar0: Region { offset: 0x2000, size: 0x1000 },
            can_reset: true,
            requests: Some(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()),
            requested: AtomicBool::new(false),
        };
        (named, Arc::new(device))
    }

    #[test]
    fn registers_are_words_of_the_region_and_nothing_else() {
        let (file, device) = device();
        let bar0 = VfioBar0(Arc::downgrade(&device));
        bar0.write32(0x10, 0xdead_beef).unwrap();
        assert_eq!(bar0.read32(0x10), Ok(0xdead_beef));
        assert_eq!(fs::read(file.path()).unwrap()[0x2010..0x2014], [0xef, 0xbe, 0xad, 0xde]);
        for register in [1, 2, 3, 0xffe, 0x1000, u32::MAX - 3, u32::MAX] {
            let outside = Err(Fault::OutsideBar0 { register, size: 0x1000 });
            assert_eq!(bar0.read32(register), outside);
            assert_eq!(bar0.write32(register, 0), outside.map(drop));
        }
        assert_eq!(fs::metadata(file.path()).unwrap().len(), 0x3000);
        drop(device);
        assert_eq!(bar0.read32(0).unwrap_err().code(), "AccessUnavailable");
    }

    #[test]
    fn a_register_that_the_kernel_gives_only_half_of_is_an_error() {
        let (file, device) = device();
        file.as_file().set_len(0x2012).unwrap();
        let bar0 = VfioBar0(Arc::downgrade(&device));
        assert_eq!(bar0.read32(0x10), Err(Fault::Bar0Closed { register: 0x10 }));
        for (errno, code) in [
            (Errno::EIO, "Bar0Closed"),
            (Errno::EBUSY, "BusyRegion"),
            (Errno::ENODEV, "OffBus"),
            (Errno::EPERM, "PermissionDenied"),
            (Errno::ENOMEM, "VfioRefused"),
        ] {
            assert_eq!(device.register_fault(0, "read BAR0 through", errno).code(), code);
        }
    }

    #[test]
    fn memory_decoding_is_turned_on_through_configuration_space() {
        let (file, device) = device();
        let command = || fs::read(file.path()).unwrap()[0x1004..0x1008].to_vec();
        let set = |bytes: [u8; 4]| device.write(device.config, 4, &bytes).unwrap();
        set([0x04, 0x05, 0x10, 0x00]);
        device.enable_memory().unwrap();
        assert_eq!(command(), [0x06, 0x05, 0x10, 0x00]);
        // A dead device is not written to.
        set([0xff; 4]);
        device.enable_memory().unwrap();
        assert_eq!(command(), [0xff; 4]);
        assert_eq!(device.config32(4), Ok(u32::MAX));
        for offset in [1, 0xffd, 0x1000] {
            assert_eq!(device.config32(offset).unwrap_err().code(), "VfioRefused");
        }
    }

    #[test]
    fn a_request_for_the_device_is_remembered() {
        let (_file, device) = device();
        assert!(!device.is_requested());
        device.requests.as_ref().unwrap().write(1).unwrap();
        assert!(device.is_requested());
        assert!(device.is_requested(), "though the kernel says it but every ten seconds");
    }

    #[test]
    fn a_bus_is_reset_only_if_all_of_it_is_ours() {
        let bdf = |text: &str| text.parse::<Bdf>().unwrap();
        let (gpu, audio, other) = (bdf("0000:41:00.0"), bdf("0000:41:00.1"), bdf("0000:41:01.0"));
        let scope = |functions: &[(Bdf, u32)], owned| ResetScope { functions: functions.to_vec(), owned };
        let held = |groups: &'static [u32]| move |group: u32| groups.contains(&group).then_some(group);
        let party = [gpu];
        // Its audio function is of its group, and so ours.
        let board = scope(&[(gpu, 12), (audio, 12)], false);
        assert_eq!(groups_of(&board, false, &party, held(&[12])), Ok(vec![12]));
        let shared = scope(&[(gpu, 12), (audio, 12), (other, 13)], false);
        assert_eq!(groups_of(&shared, false, &party, held(&[12])), Err(vec![other]));
        let groups: BTreeSet<u32> = groups_of(&shared, false, &party, held(&[12, 13])).unwrap().into_iter().collect();
        assert_eq!(groups, [12, 13].into());
        // By character devices the kernel says whether all is ours, and is given no files.
        assert_eq!(groups_of(&scope(&[(gpu, 1), (other, 2)], true), true, &party, held(&[])), Ok(vec![]));
        let strange = scope(&[(gpu, 1), (other, u32::MAX)], false);
        assert_eq!(groups_of(&strange, true, &party, held(&[1])), Err(vec![other]));
    }

    #[test]
    fn a_lock_of_the_kernels_is_waited_for() {
        let mut left = 3;
        let mut act = || {
            left -= 1;
            if left > 0 { Err(Errno::EAGAIN) } else { Ok(7) }
        };
        assert_eq!(unlocked(&mut act), Ok(7));
        assert_eq!(unlocked(|| Err::<(), _>(Errno::EINVAL)), Err(Errno::EINVAL));
    }

    #[test]
    fn a_dead_device_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let config = |bytes: &[u8]| fs::write(folder.path().join("config"), bytes).unwrap();
        config(&[0xde, 0x10, 0x30, 0x23]);
        assert_eq!(check_alive(folder.path()), Ok(()));
        config(&[0xff; 4]);
        assert_eq!(check_alive(folder.path()).unwrap_err().code(), "OffBus");
        config(&[]);
        assert_eq!(check_alive(folder.path()).unwrap_err().code(), "PermissionDenied");
    }
}
