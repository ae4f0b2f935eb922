//! The `sysfs` back end: BAR0 through `resource0`, one reset through the kernel's `reset` file.
//!
//! Power is pinned on and memory decoding enabled while it lives, and both are put back when it goes. It must live
//! under ownership of the device, which it keeps alive. A process that is killed puts nothing back: the device stays awake
//! and decoding, which harms nobody, until its driver or the next user says otherwise.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use crate::access::{Access, BackEnd, Bar0, Reset};
use crate::clock::{Clock, Wait, millis};
use crate::error::{Fault, methods_text};
use crate::mmap::MappedBar0;
use crate::ownership::OwnedDevice;

/// How long a reset may take. The kernel itself waits up to 60 s for a function to answer after FLR (gpu-cc-protocol
/// section 7.1), and longer, trying other ways, when it never does (virtual-gpu-rig section 6, fact 7).
pub(crate) const RESET_TIMEOUT: Duration = Duration::from_secs(65);

/// How long waking up may take: link training after D3cold included.
const WAKE: Wait = Wait::new(Duration::from_secs(10), Duration::from_millis(10));

/// Rest after the way from D3hot to D0, before registers may be used (gpu-cc-protocol section 1.3).
const D0_SETTLE: Duration = Duration::from_millis(10);

/// Offset of COMMAND in configuration space.
const COMMAND: u64 = 0x04;

/// COMMAND: the function answers memory accesses.
const COMMAND_MEMORY: u16 = 0x2;

/// The kernel's word for a reset of the bus that the device is alone on.
const BUS: &str = "bus";

/// Most that is read of a text file in sysfs.
const TEXT_LIMIT: u64 = 4096;

/// The back end. Every file is named in its errors.
pub(crate) struct SysfsBackEnd {
    folder: PathBuf,
    bar0: Option<(u8, u64)>,
    driver: Option<String>,
    config: File,
    /// Shared with a reset under way: what was changed is put back by whoever ends last.
    guard: Arc<Guard>,
    /// A reset that did not end in time is still under way in the kernel; whatever touches the device would wait for it.
    abandoned: bool,
}

impl SysfsBackEnd {
    /// Wakes the device up and opens its configuration space.
    pub(crate) fn open(device: OwnedDevice, clock: &dyn Clock) -> Result<Self, Fault> {
        let folder = device.folder();
        let function = device.function();
        let bar0 = function.bars.iter().find(|bar| bar.number == 0 && !bar.io).map(|bar| (bar.number, bar.size));
        let driver = function.driver.clone();
        let path = folder.join("config");
        let config = File::open(&path).map_err(|error| Fault::from_io("open", &path, &error))?;
        let guard = Guard::awake(device, clock)?;
        Ok(Self { folder, bar0, driver, config, guard, abandoned: false })
    }

    /// Sets COMMAND's memory bit if it is not set.
    fn enable_memory(&self) -> Result<(), Fault> {
        let path = self.folder.join("config");
        let mut command = [0; 2];
        self.config.read_exact_at(&mut command, COMMAND).map_err(|error| config_fault(&path, &error))?;
        let command = u16::from_le_bytes(command);
        if command == u16::MAX || command & COMMAND_MEMORY != 0 {
            return Ok(());
        }
        write_command(&path, command | COMMAND_MEMORY).map_err(|error| write_config_fault(&path, &error))?;
        self.guard.changed().memory_was_off = true;
        Ok(())
    }

    fn reset_methods(&self) -> String {
        reset_methods(&self.folder)
    }

    fn reset_within(&mut self, timeout: Duration) -> Result<(), Fault> {
        if self.abandoned {
            return Err(Fault::ResetTimeout { waited_ms: millis(RESET_TIMEOUT) });
        }
        let path = self.folder.join("reset");
        match bounded_write(path.clone(), "1", timeout, Arc::clone(&self.guard)) {
            Ok(()) => Ok(()),
            Err(WriteError::Late) => {
                self.abandoned = true;
                Err(Fault::ResetTimeout { waited_ms: millis(timeout) })
            }
            Err(WriteError::Io(error)) => Err(reset_fault(&path, &error, self.reset_methods())),
            Err(error @ WriteError::NoThread(_)) => Err(file_fault("write", &path, error)),
        }
    }

    fn bus_reset_within(&mut self, timeout: Duration) -> Result<(), Fault> {
        let before = self.reset_methods();
        if !before.split_whitespace().any(|method| method == BUS) {
            let reason = format!("the kernel offers none for it (reset methods: {})", methods_text(&before));
            return Err(Fault::BusResetUnavailable { reason });
        }
        let path = self.folder.join("reset_method");
        self.guard.changed().reset_method = Some(before);
        // The kernel takes the method only if nobody else is on the bus.
        match bounded_write(path.clone(), BUS, WAKE.timeout, Arc::clone(&self.guard)) {
            Ok(()) => {}
            Err(WriteError::Io(error)) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
                self.guard.changed().reset_method = None;
                let reason = "the kernel refuses it: other devices are on its bus".into();
                return Err(Fault::BusResetUnavailable { reason });
            }
            Err(error) => return Err(file_fault("write", &path, error)),
        }
        let result = self.reset_within(timeout);
        // While the kernel is still at it the guard puts the method back, when it is done.
        if !self.abandoned {
            self.guard.restore_reset_method();
        }
        result
    }
}

impl Reset for SysfsBackEnd {
    fn reset(&mut self) -> Result<(), Fault> {
        self.guard.device.changed()?;
        self.reset_within(RESET_TIMEOUT)
    }

    fn bus_reset(&mut self) -> Result<(), Fault> {
        self.guard.device.changed()?;
        self.bus_reset_within(RESET_TIMEOUT)
    }
}

impl BackEnd for SysfsBackEnd {
    fn access(&self) -> Access {
        Access::Sysfs
    }

    fn config32(&self, offset: u16) -> Result<u32, Fault> {
        if self.abandoned {
            return Err(Fault::ResetTimeout { waited_ms: millis(RESET_TIMEOUT) });
        }
        let mut dword = [0; 4];
        let path = || self.folder.join("config");
        self.config.read_exact_at(&mut dword, u64::from(offset)).map_err(|error| config_fault(&path(), &error))?;
        Ok(u32::from_le_bytes(dword))
    }

    fn bar0(&mut self) -> Result<Box<dyn Bar0>, Fault> {
        let (number, size) = self.bar0.ok_or(Fault::NoBar0)?;
        self.enable_memory()?;
        let path = self.folder.join(format!("resource{number}"));
        Ok(Box::new(MappedBar0::open(&path, size, self.driver.as_deref())?))
    }
}

/// Text of `reset_method`; empty when there is none.
pub(crate) fn reset_methods(folder: &Path) -> String {
    read_text(&folder.join("reset_method")).ok().flatten().unwrap_or_default()
}

/// Puts back what was changed, and keeps the device owned until then.
pub(crate) struct Guard {
    folder: PathBuf,
    changed: Mutex<Changed>,
    device: OwnedDevice,
}

#[derive(Default)]
struct Changed {
    /// Text of `power/control` before.
    power_control: Option<String>,
    /// Whether memory decoding was off before.
    memory_was_off: bool,
    /// Text of `reset_method` before.
    reset_method: Option<String>,
}

impl Guard {
    /// Pins the device's power on and waits until it is active.
    pub(crate) fn awake(device: OwnedDevice, clock: &dyn Clock) -> Result<Arc<Self>, Fault> {
        let folder = device.folder();
        let path = folder.join("power/control");
        let status_path = folder.join("power/runtime_status");
        let guard = Arc::new(Self { folder, changed: Mutex::default(), device });
        let Some(before) = read_text(&path)? else { return Ok(guard) };
        let asleep = read_text(&status_path)?.is_some_and(|status| status != "active");
        if before != "on" {
            guard.changed().power_control = Some(before);
            // The write resumes the device and takes its lock, which a reset under way may hold.
            let written = bounded_write(path.clone(), "on", WAKE.timeout, Arc::clone(&guard));
            written.map_err(|error| file_fault("write", &path, error))?;
        }
        let mut last = String::new();
        let awake = WAKE.poll(clock, || {
            last = read_text(&status_path)?.unwrap_or_default();
            // No word, or no runtime power management: it is always on.
            Ok(matches!(last.as_str(), "active" | "unsupported" | "").then_some(()))
        })?;
        if awake.is_none() {
            return Err(Fault::PowerStuck { status: last, waited_ms: millis(WAKE.timeout) });
        }
        if asleep {
            clock.sleep(D0_SETTLE);
        }
        Ok(guard)
    }

    /// The device that is kept owned.
    pub(crate) fn device(&self) -> &OwnedDevice {
        &self.device
    }

    fn restore_reset_method(&self) {
        let Some(text) = self.changed().reset_method.take() else { return };
        let path = self.folder.join("reset_method");
        if let Err(error) = write_text(&path, &text) {
            let device = self.device.bdf();
            tracing::warn!(%device, path = %path.display(), %error, "cannot put back the reset methods {text:?}");
        }
    }

    fn changed(&self) -> std::sync::MutexGuard<'_, Changed> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.restore_reset_method();
        let changed = std::mem::take(self.changed.get_mut().unwrap_or_else(PoisonError::into_inner));
        let device = self.device.bdf();
        if changed.memory_was_off {
            let path = self.folder.join("config");
            let restore = || -> io::Result<()> {
                let mut command = [0; 2];
                File::open(&path)?.read_exact_at(&mut command, COMMAND)?;
                let command = u16::from_le_bytes(command);
                if command == u16::MAX { Ok(()) } else { write_command(&path, command & !COMMAND_MEMORY) }
            };
            if let Err(error) = restore() {
                tracing::warn!(%device, path = %path.display(), %error, "cannot turn memory decoding off again");
            }
        }
        if let Some(text) = changed.power_control {
            let path = self.folder.join("power/control");
            if let Err(error) = write_text(&path, &text) {
                tracing::warn!(%device, path = %path.display(), %error, "cannot put back runtime power management");
            }
        }
    }
}

/// Why a write has no good end.
pub(crate) enum WriteError {
    /// It has not ended yet.
    Late,
    /// The kernel's answer.
    Io(io::Error),
    /// There was no thread to do it.
    NoThread(io::Error),
}

/// Writes on a thread of its own, and waits for it until `timeout`. A write that is late goes on: only the kernel can end
/// it. Its thread keeps `kept`, so that the device stays owned until then.
pub(crate) fn bounded_write<K: Send + 'static>(
    path: PathBuf,
    text: impl AsRef<str> + Send + 'static,
    timeout: Duration,
    kept: K,
) -> Result<(), WriteError> {
    match bounded("sysfs write", timeout, kept, move || write_text(&path, text.as_ref())) {
        Ok(result) => result.map_err(WriteError::Io),
        Err(Unfinished::Late) => Err(WriteError::Late),
        Err(Unfinished::NoThread(error)) => Err(WriteError::NoThread(error)),
        Err(Unfinished::Panicked) => Err(WriteError::Io(io::Error::other("the writing thread panicked"))),
    }
}

/// Why something that was begun on a thread of its own has no result.
#[derive(Debug)]
pub(crate) enum Unfinished {
    /// It goes on.
    Late,
    /// There was no thread to do it.
    NoThread(io::Error),
    /// It panicked.
    Panicked,
}

/// Does something that the kernel may take long for on a thread of its own, and waits for it until `timeout`. When that is
/// late it goes on, for only the kernel can end it. The thread keeps `kept` until then.
pub(crate) fn bounded<K: Send + 'static, T: Send + 'static>(
    name: &str,
    timeout: Duration,
    kept: K,
    act: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unfinished> {
    let (sender, receiver) = mpsc::channel();
    let work = move || {
        let result = act();
        // First let go of the device, so that the waiter is its last owner.
        drop(kept);
        let _ = sender.send(result);
    };
    std::thread::Builder::new().name(name.into()).spawn(work).map_err(Unfinished::NoThread)?;
    receiver.recv_timeout(timeout).map_err(|error| match error {
        RecvTimeoutError::Timeout => Unfinished::Late,
        RecvTimeoutError::Disconnected => Unfinished::Panicked,
    })
}

fn write_text(path: &Path, text: &str) -> io::Result<()> {
    // No create, no truncate: the file is the kernel's.
    OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

fn write_command(path: &Path, command: u16) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all_at(&command.to_le_bytes(), COMMAND)
}

/// A text file of sysfs, without white space around; none when there is no such file.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>, Fault> {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(TEXT_LIMIT).read_to_end(&mut bytes)) {
        Ok(_) => Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::from_io("read", path, &error)),
    }
}

pub(crate) fn file_fault(action: &'static str, path: &Path, error: WriteError) -> Fault {
    match error {
        WriteError::Late => Fault::Io { action, path: path.to_owned(), errno: Errno::ETIMEDOUT as i32 },
        WriteError::Io(error) => Fault::from_io(action, path, &error),
        WriteError::NoThread(error) => Fault::Interrupted { what: format!("cannot start a thread: {error}") },
    }
}

pub(crate) fn config_fault(path: &Path, error: &io::Error) -> Fault {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        // Without rights the kernel shows 64 bytes only (gpu-cc-protocol section 1.2).
        return Fault::PermissionDenied { path: path.to_owned(), errno: Errno::EACCES as i32 };
    }
    Fault::from_io("read", path, error)
}

fn write_config_fault(path: &Path, error: &io::Error) -> Fault {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM) => Fault::Lockdown { path: path.to_owned() },
        _ => Fault::from_io("write", path, error),
    }
}

fn reset_fault(path: &Path, error: &io::Error, methods: String) -> Fault {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENOTTY) => Fault::ResetUnavailable { methods },
        Some(Errno::EACCES) => Fault::from_io("open", path, error),
        errno => Fault::ResetFailed { errno: errno.unwrap_or(Errno::EIO) as i32, methods },
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use hw_probe::PciFunction;

    use super::*;
    use crate::fake::{FakeClock, Tree};
    use crate::ownership::Ownership;

    /// A bound GPU with runtime power management on and memory decoding off.
    fn gpu(tree: &Tree) -> PciFunction {
        let function = tree.function("0000:41:00.0", Some("vfio-pci"), Some(12));
        let _ = tree.sysfs.get(function.bdf).power("auto", "active", "D0").patch_config(4, &[0x04, 0x05]);
        function
    }

    fn open(tree: &Tree, function: &PciFunction) -> Result<SysfsBackEnd, Fault> {
        let ownership = Ownership::take(std::slice::from_ref(function), &tree.places).unwrap();
        SysfsBackEnd::open(ownership.devices()[0].clone(), &FakeClock::default())
    }

    #[test]
    fn power_and_memory_decoding_are_put_back() {
        let tree = Tree::new();
        let function = gpu(&tree);
        let folder = tree.places.root.function(function.bdf);
        let control = || fs::read_to_string(folder.join("power/control")).unwrap();
        let command = || fs::read(folder.join("config")).unwrap()[4..6].to_vec();
        let mut back = open(&tree, &function).unwrap();
        // A plain file keeps what follows the text written over its start; sysfs does not.
        assert!(control().starts_with("on"));
        assert_eq!(command(), [0x04, 0x05]);
        let bar0 = back.bar0().unwrap();
        assert_eq!(command(), [0x06, 0x05]);
        bar0.write32(0, 7).unwrap();
        assert_eq!(bar0.read32(0), Ok(7));
        drop(bar0);
        assert_eq!(back.config32(0), Ok(0x2330_10de));
        assert_eq!(back.config32(4095).unwrap_err().code(), "PermissionDenied");
        drop(back);
        assert!(control().starts_with("auto"));
        assert_eq!(command(), [0x04, 0x05]);
        assert!(Ownership::take(&[function], &tree.places).is_ok(), "and the device is free");
    }

    #[test]
    fn a_device_that_does_not_wake_up_is_an_error_in_time() {
        let tree = Tree::new();
        let function = gpu(&tree);
        let folder = tree.places.root.function(function.bdf);
        fs::write(folder.join("power/runtime_status"), "suspended\n").unwrap();
        let fault = open(&tree, &function).err().unwrap();
        match &fault {
            Fault::PowerStuck { status, waited_ms: 10_000 } if status == "suspended" => {}
            other => panic!("{other}"),
        }
        // Without runtime power management there is nothing to wait for.
        fs::remove_dir_all(folder.join("power")).unwrap();
        assert!(open(&tree, &function).is_ok());
    }

    #[test]
    fn the_reset_file_gets_a_one() {
        let tree = Tree::new();
        let function = gpu(&tree);
        let reset = tree.places.root.function(function.bdf).join("reset");
        let mut back = open(&tree, &function).unwrap();
        back.reset().unwrap();
        assert_eq!(fs::read_to_string(&reset).unwrap(), "1");
        fs::remove_file(&reset).unwrap();
        assert_eq!(back.reset(), Err(Fault::ResetUnavailable { methods: "flr bus".into() }));
    }

    #[test]
    fn a_bus_reset_is_asked_for_by_its_name_and_the_methods_are_put_back() {
        let tree = Tree::new();
        let function = gpu(&tree);
        let folder = tree.places.root.function(function.bdf);
        let methods = || fs::read_to_string(folder.join("reset_method")).unwrap();
        let mut back = open(&tree, &function).unwrap();
        back.bus_reset().unwrap();
        assert_eq!((methods(), fs::read_to_string(folder.join("reset")).unwrap()), ("flr bus\n".into(), "1".into()));

        // Opening a pipe for writing waits for a reader. A reset that does not end keeps the method until it does.
        fs::remove_file(folder.join("reset")).unwrap();
        nix::unistd::mkfifo(&folder.join("reset"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(back.bus_reset_within(Duration::from_millis(20)), Err(Fault::ResetTimeout { waited_ms: 20 }));
        // A plain file keeps what follows the text written over its start; sysfs does not.
        assert_eq!(methods(), "bus bus\n");
        drop(back);
        assert_eq!(methods(), "bus bus\n");
        assert_eq!(fs::read_to_string(folder.join("reset")).unwrap(), "1");
        while methods() != "flr bus\n" {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_bus_reset_that_the_kernel_does_not_offer_is_not_tried() {
        for methods in ["flr", "flr cxl_bus", ""] {
            let tree = Tree::new();
            let function = gpu(&tree);
            let _ = tree.sysfs.get(function.bdf).reset_methods(methods);
            let mut back = open(&tree, &function).unwrap();
            let fault = back.bus_reset().unwrap_err();
            assert_eq!(fault.code(), "BusResetUnavailable");
            let named = if methods.is_empty() { "none" } else { methods };
            assert!(fault.to_string().contains(named), "{fault}");
            if !methods.is_empty() {
                assert_eq!(tree.sysfs.get(function.bdf).read("reset"), "");
                assert_eq!(tree.sysfs.get(function.bdf).read("reset_method"), format!("{methods}\n"));
            }
        }
    }

    #[test]
    fn a_device_that_is_no_longer_ours_is_not_reset() {
        let tree = Tree::new();
        let function = gpu(&tree);
        let mut back = open(&tree, &function).unwrap();
        let _ = tree.sysfs.get(function.bdf).driver("nvidia");
        assert_eq!(back.reset().unwrap_err().code(), "OwnershipChanged");
        assert_eq!(back.bus_reset().unwrap_err().code(), "OwnershipChanged");
        assert_eq!(fs::read_to_string(tree.places.root.function(function.bdf).join("reset")).unwrap(), "");
    }

    #[test]
    fn a_reset_that_does_not_end_is_left_to_the_kernel_and_the_device_stays_owned() {
        let tree = Tree::new();
        let function = gpu(&tree);
        let folder = tree.places.root.function(function.bdf);
        // Opening a pipe for writing waits for a reader, as the kernel's reset waits for the device.
        fs::remove_file(folder.join("reset")).unwrap();
        nix::unistd::mkfifo(&folder.join("reset"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut back = open(&tree, &function).unwrap();
        let timeout = Duration::from_millis(20);
        assert_eq!(back.reset_within(timeout), Err(Fault::ResetTimeout { waited_ms: 20 }));
        assert_eq!(back.reset_within(timeout).unwrap_err().code(), "ResetTimeout", "and is not tried again");
        assert_eq!(back.config32(0).unwrap_err().code(), "ResetTimeout", "nothing that would wait for it is touched");
        drop(back);
        assert!(fs::read_to_string(folder.join("power/control")).unwrap().starts_with("on"));
        let take = || Ownership::take(std::slice::from_ref(&function), &tree.places);
        assert_eq!(take().unwrap_err().0[0].code(), "LockHeld");
        // The reset ends at last: what was changed is put back, and the device is free.
        assert_eq!(fs::read_to_string(folder.join("reset")).unwrap(), "1");
        while let Err(refused) = take() {
            assert_eq!(refused.0[0].code(), "LockHeld");
            std::thread::yield_now();
        }
        assert!(fs::read_to_string(folder.join("power/control")).unwrap().starts_with("auto"));
    }

    #[test]
    fn resets_refused_by_the_kernel_have_their_own_errors() {
        let table = [
            (Errno::ENOTTY, "ResetUnavailable"),
            (Errno::ENOENT, "ResetUnavailable"),
            (Errno::EAGAIN, "ResetFailed"),
            (Errno::EIO, "ResetFailed"),
            (Errno::EACCES, "PermissionDenied"),
        ];
        for (errno, code) in table {
            assert_eq!(reset_fault(Path::new("reset"), &errno.into(), String::new()).code(), code);
        }
        assert_eq!(write_config_fault(Path::new("config"), &Errno::EPERM.into()).code(), "Lockdown");
    }

    #[test]
    fn a_device_without_bar0_says_so() {
        let tree = Tree::new();
        let mut function = gpu(&tree);
        function.bars.clear();
        let mut back = open(&tree, &function).unwrap();
        assert_eq!(back.bar0().err(), Some(Fault::NoBar0));
    }
}
