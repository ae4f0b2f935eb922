//! Performs the planned steps through sysfs: every write that may block has a deadline and a thread of its own, every
//! result is read back, and nothing is taken from a device that is or may be held.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use agent_core::state::{BindingRecord, BindingsFile, Identity};
use gpu_firmware::{DeviceLock, Fault, Places, SystemClock, group_holders, group_is_free};
use hw_probe::{Bdf, Inventory, PciFunction};
use tracing::{info, warn};

use crate::binding::{Action, Step};

/// Time in which the kernel makes the driver link after a successful probe.
const LINK_DEADLINE: Duration = Duration::from_secs(2);

/// Time in which the host's modprobe must have loaded a module.
const MODPROBE_DEADLINE: Duration = Duration::from_secs(30);

/// Why a step did not lead where it should.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The plan itself says that the device must not be touched.
    #[error("{bdf}: Not touched: {reason}")]
    Refused {
        /// The device.
        bdf: Bdf,
        /// Cause and cure.
        reason: String,
    },
    /// A process holds the device through VFIO.
    #[error("{bdf}: Left bound: its VFIO group is held{}; it is free when that virtual machine has ended", holders(.held_by))]
    Held {
        /// The device.
        bdf: Bdf,
        /// Who, as far as /proc shows.
        held_by: Vec<String>,
    },
    /// Whether a process holds the device cannot be told.
    #[error("{bdf}: Left bound: whether a virtual machine holds it cannot be told ({reason})")]
    PerhapsHeld {
        /// The device.
        bdf: Bdf,
        /// Why not.
        reason: String,
    },
    /// Another agent works on the device, or its lock cannot be had.
    #[error("{}", .0.line())]
    Lock(gpu_firmware::Error),
    /// Somebody was faster than the plan.
    #[error(
        "{bdf}: Not touched: its driver was {before} when it was looked at and is {now} now; the next look decides anew"
    )]
    Changed {
        /// The device.
        bdf: Bdf,
        /// The driver's name or `none`.
        before: String,
        /// The driver's name or `none`.
        now: String,
    },
    /// The module cannot be loaded and its driver is not in the kernel.
    #[error(
        "{bdf}: The kernel has no driver {module}: {reason}; install the kernel's VFIO modules or load {module} on the host"
    )]
    NoDriver {
        /// The device.
        bdf: Bdf,
        /// The module.
        module: String,
        /// What modprobe said.
        reason: String,
    },
    /// sysfs refused a write.
    #[error("{bdf}: Cannot write {path}")]
    Write {
        /// The device.
        bdf: Bdf,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A write to sysfs does not return: the driver waits for somebody.
    #[error("{bdf}: The write to {path} has not returned in {seconds} s: something keeps the device busy; it goes on in the kernel, look again later", path = .path.display())]
    Blocked {
        /// The device.
        bdf: Bdf,
        /// The file.
        path: PathBuf,
        /// The deadline that passed.
        seconds: u64,
    },
    /// The kernel took every write, yet the driver link is not the wanted one.
    #[error("{bdf}: After the probe its driver is {found}, not {wanted}; the kernel log of the node has the reason")]
    NotBound {
        /// The device.
        bdf: Bdf,
        /// The driver's name or `none`.
        found: String,
        /// What was wanted.
        wanted: String,
    },
    /// The device has gone.
    #[error("{bdf}: It is no longer on the PCI bus")]
    Gone {
        /// The device.
        bdf: Bdf,
    },
}

impl BindError {
    /// The stable code of the error, the same in logs, metrics and documentation.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "BindRefused",
            Self::Held { .. } => "DeviceHeld",
            Self::PerhapsHeld { .. } => "DevicePerhapsHeld",
            Self::Lock(error) => error.code(),
            Self::Changed { .. } => "DeviceChanged",
            Self::NoDriver { .. } => "NoVfioDriver",
            Self::Write { .. } => "SysfsWriteFailed",
            Self::Blocked { .. } => "SysfsWriteBlocked",
            Self::NotBound { .. } => "NotBound",
            Self::Gone { .. } => "DeviceGone",
        }
    }
}

fn holders(held_by: &[String]) -> String {
    if held_by.is_empty() { String::new() } else { format!(" by {}", held_by.join(", ")) }
}

/// What became of one step.
#[derive(Debug)]
pub struct Outcome {
    /// The step.
    pub step: Step,
    /// The driver afterwards (none: no driver), or why it is not as wanted.
    pub result: Result<Option<String>, BindError>,
}

/// How a value is written to a file of sysfs. The tests put a small kernel in its place.
pub type SysfsWrite = Arc<dyn Fn(&Path, &str) -> io::Result<()> + Send + Sync>;

/// Carries out steps.
pub struct Executor {
    places: Places,
    host_root: PathBuf,
    lock_timeout: Duration,
    write_timeout: Duration,
    write: SysfsWrite,
    /// Devices to which a write has not returned: no second one is sent after it.
    writing: Arc<Mutex<BTreeSet<Bdf>>>,
}

impl Executor {
    /// An executor over the running kernel.
    pub fn new(places: Places, host_root: PathBuf, lock_timeout: Duration, write_timeout: Duration) -> Self {
        let (write, writing) = (Arc::new(write_sysfs), Arc::default());
        Self { places, host_root, lock_timeout, write_timeout, write, writing }
    }

    /// The same over another kernel.
    #[cfg(test)]
    #[must_use]
    pub fn with_kernel(mut self, write: SysfsWrite) -> Self {
        self.write = write;
        self
    }

    /// Carries out all steps, devices in parallel: one that blocks does not stop the others. The driver and override of
    /// each device that is about to be taken must be in `prior` before; see [`records`].
    pub fn run(&self, inventory: &Inventory, steps: Vec<Step>, prior: &BindingsFile) -> Vec<Outcome> {
        let drivers = self.load_modules(&steps);
        thread::scope(|scope| {
            let work = |step: Step| {
                let result = self.step(inventory, &step, &drivers, prior);
                if let (Action::Bind { .. } | Action::Unbind, Ok(driver)) = (&step.action, &result) {
                    let driver = driver.as_deref().unwrap_or("none");
                    info!(event = "device_bound", device = %step.bdf, driver, reason = step.reason, "device is as wanted");
                }
                Outcome { step, result }
            };
            let threads: Vec<_> = steps.into_iter().map(|step| scope.spawn(move || work(step))).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        })
    }

    /// Loads each wanted module once; the value is the driver's name in sysfs or why there is none.
    fn load_modules(&self, steps: &[Step]) -> BTreeMap<String, Result<String, String>> {
        let mut drivers = BTreeMap::new();
        for step in steps {
            if let Action::Bind { module } = &step.action
                && !drivers.contains_key(module)
            {
                drivers.insert(module.clone(), self.driver_of(module));
            }
        }
        drivers
    }

    fn driver_of(&self, module: &str) -> Result<String, String> {
        if let Some(driver) = self.registered_driver(module) {
            return Ok(driver);
        }
        let output = modprobe(&self.host_root, module)?;
        self.registered_driver(module).ok_or_else(|| format!("modprobe succeeded{output}, yet no such driver appeared"))
    }

    /// The driver as the kernel lists it: modules say `_` where some drivers say `-`.
    fn registered_driver(&self, module: &str) -> Option<String> {
        let names = [module.to_owned(), module.replace('_', "-"), module.replace('-', "_")];
        names.into_iter().find(|name| self.places.root.join("sys/bus/pci/drivers").join(name).is_dir())
    }

    fn step(
        &self,
        inventory: &Inventory,
        step: &Step,
        drivers: &BTreeMap<String, Result<String, String>>,
        prior: &BindingsFile,
    ) -> Result<Option<String>, BindError> {
        let bdf = step.bdf;
        let function = inventory.get(bdf).ok_or(BindError::Gone { bdf })?;
        match &step.action {
            Action::Leave => Ok(function.driver.clone()),
            Action::Refuse => Err(BindError::Refused { bdf, reason: step.reason.clone() }),
            Action::Bind { module } => {
                let driver = drivers.get(module).cloned().unwrap_or_else(|| Err("it was never loaded".into()));
                let driver = driver.map_err(|reason| BindError::NoDriver { bdf, module: module.clone(), reason })?;
                let _lock = self.lock(bdf)?;
                self.bind(function, &driver).map(Some)
            }
            Action::Unbind => {
                let _lock = self.lock(bdf)?;
                let record = prior.devices.iter().find(|record| record.bdf == bdf);
                self.unbind(function, record.filter(|record| record.identity == Identity::of(function)))
            }
        }
    }

    fn lock(&self, bdf: Bdf) -> Result<DeviceLock, BindError> {
        DeviceLock::take_within(bdf, &self.places, self.lock_timeout, &SystemClock).map_err(BindError::Lock)
    }

    fn bind(&self, function: &PciFunction, driver: &str) -> Result<String, BindError> {
        let bdf = function.bdf;
        let device = self.places.root.function(bdf);
        let current = self.unchanged_driver(function)?;
        self.write(bdf, &device.join("driver_override"), &format!("{driver}\n"))?;
        if let Some(old) = current {
            info!(event = "unbinding", device = %bdf, driver = old, "taking the device from its driver");
            self.write(bdf, &device.join("driver/unbind"), &bdf.to_string())?;
        }
        self.write(bdf, &self.places.root.join("sys/bus/pci/drivers_probe"), &bdf.to_string())?;
        self.await_driver(bdf, driver)
    }

    fn unbind(&self, function: &PciFunction, record: Option<&BindingRecord>) -> Result<Option<String>, BindError> {
        let bdf = function.bdf;
        let device = self.places.root.function(bdf);
        self.unchanged_driver(function)?;
        // Before anything is written: a held device keeps its override, too.
        self.must_be_free(function)?;
        let before = record.and_then(|record| record.driver_override.as_deref()).unwrap_or_default();
        // An empty line clears the override; otherwise the next probe would bring the VFIO driver back.
        self.write(bdf, &device.join("driver_override"), &format!("{before}\n"))?;
        // And directly before the act, so that the window in which a virtual machine could come in between is short.
        self.must_be_free(function)?;
        self.write(bdf, &device.join("driver/unbind"), &bdf.to_string())?;
        let Some(driver) = record.and_then(|record| record.driver.as_deref()) else { return Ok(None) };
        let bind = self.places.root.join("sys/bus/pci/drivers").join(driver).join("bind");
        if !bind.exists() {
            warn!(device = %bdf, driver, "the driver that the device had before is not loaded; it stays driverless");
            return Ok(None);
        }
        self.write(bdf, &bind, &bdf.to_string())?;
        self.await_driver(bdf, driver).map(Some)
    }

    /// The driver that the device has, if it is the one that the plan was made for: a virtual machine, a person or
    /// another agent may have come first, and what is true of one driver's devices is not of another's.
    fn unchanged_driver(&self, function: &PciFunction) -> Result<Option<String>, BindError> {
        let now = self.driver_link(function.bdf)?;
        if now == function.driver {
            return Ok(now);
        }
        let named = |driver: Option<&str>| driver.unwrap_or("none").to_owned();
        let before = named(function.driver.as_deref());
        Err(BindError::Changed { bdf: function.bdf, before, now: named(now.as_deref()) })
    }

    /// Asks the kernel whether anybody holds the device's group: it refuses a second open of the group file. Where there
    /// are no group files, only a device that sleeps is known to be idle: opening it wakes it.
    fn must_be_free(&self, function: &PciFunction) -> Result<(), BindError> {
        let bdf = function.bdf;
        let unknown = |reason: String| Err(BindError::PerhapsHeld { bdf, reason });
        let Some(group) = function.iommu_group else { return unknown("it has no IOMMU group".into()) };
        match group_is_free(group, &self.places) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let cdev = function.vfio_cdev.as_ref().map(|cdev| cdev.name.as_str());
                let held_by = group_holders(group, cdev, &self.places).iter().map(ToString::to_string).collect();
                Err(BindError::Held { bdf, held_by })
            }
            Err(Fault::NoGroupFile { .. }) if self.is_suspended(bdf) => Ok(()),
            Err(fault) => unknown(fault.to_string()),
        }
    }

    fn is_suspended(&self, bdf: Bdf) -> bool {
        let status = fs::read_to_string(self.places.root.function(bdf).join("power/runtime_status"));
        status.is_ok_and(|status| status.trim() == "suspended")
    }

    fn driver_link(&self, bdf: Bdf) -> Result<Option<String>, BindError> {
        let device = self.places.root.function(bdf);
        match fs::read_link(device.join("driver")) {
            Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
            Err(_) if device.exists() => Ok(None),
            Err(_) => Err(BindError::Gone { bdf }),
        }
    }

    fn await_driver(&self, bdf: Bdf, wanted: &str) -> Result<String, BindError> {
        let deadline = Instant::now() + LINK_DEADLINE;
        loop {
            let found = self.driver_link(bdf)?;
            match found {
                Some(name) if name == wanted => return Ok(name),
                found if Instant::now() >= deadline => {
                    let found = found.unwrap_or_else(|| "none".into());
                    return Err(BindError::NotBound { bdf, found, wanted: wanted.into() });
                }
                _ => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Writes on a thread of its own: `unbind` returns only when the driver lets go, which may be never.
    fn write(&self, bdf: Bdf, path: &Path, value: &str) -> Result<(), BindError> {
        let blocked = || BindError::Blocked { bdf, path: path.into(), seconds: self.write_timeout.as_secs() };
        let writing = move |set: &Mutex<BTreeSet<Bdf>>, begin: bool| {
            let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
            if begin { set.insert(bdf) } else { set.remove(&bdf) }
        };
        if !writing(&self.writing, true) {
            return Err(blocked());
        }
        let (done, wait) = mpsc::channel();
        let (write, owned, text) = (Arc::clone(&self.write), path.to_owned(), value.to_owned());
        let set = Arc::clone(&self.writing);
        thread::spawn(move || {
            let result = write(&owned, &text);
            writing(&set, false);
            // Nobody waits any more when the deadline has passed.
            let _ = done.send(result);
        });
        match wait.recv_timeout(self.write_timeout) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(BindError::Write { bdf, path: path.into(), source }),
            Err(_) => Err(blocked()),
        }
    }
}

fn write_sysfs(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// Loads a module with the host's own modprobe, so that it is the host's module of the host's kernel.
fn modprobe(host_root: &Path, module: &str) -> Result<String, String> {
    let mut command = if host_root == Path::new("/") {
        Command::new("modprobe")
    } else {
        let mut chroot = Command::new("chroot");
        chroot.arg(host_root).arg("modprobe");
        chroot
    };
    let mut child = command
        .arg(module)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("modprobe cannot be started ({error})"))?;
    let deadline = Instant::now() + MODPROBE_DEADLINE;
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                // Killing can only fail when it has just ended, which is as good.
                let _ = child.kill();
                return Err(format!("modprobe has not returned in {} s", MODPROBE_DEADLINE.as_secs()));
            }
            Err(error) => return Err(format!("modprobe cannot be waited for ({error})")),
        }
    }
    let output = child.wait_with_output().map_err(|error| format!("modprobe cannot be waited for ({error})"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.trim().chars().take(300).collect();
    let said = if said.is_empty() { said } else { format!(" ({said})") };
    if output.status.success() { Ok(said) } else { Err(format!("modprobe ended with {}{said}", output.status)) }
}

/// What `prior` must say before `steps` are carried out: the driver and override of each device that will be taken and
/// is not yet recorded. None when it says so already.
pub fn records(
    inventory: &Inventory,
    steps: &[Step],
    prior: &BindingsFile,
    now: jiff::Timestamp,
) -> Option<BindingsFile> {
    let mut file = prior.clone();
    for step in steps.iter().filter(|step| matches!(step.action, Action::Bind { .. })) {
        let Some(function) = inventory.get(step.bdf) else { continue };
        let identity = Identity::of(function);
        file.devices.retain(|record| record.bdf != step.bdf || record.identity == identity);
        if file.devices.iter().any(|record| record.bdf == step.bdf) {
            continue;
        }
        file.devices.push(BindingRecord {
            bdf: step.bdf,
            identity,
            driver: function.driver.clone(),
            driver_override: function.driver_override.clone(),
            taken_at: now,
        });
    }
    (file.devices != prior.devices).then_some(file)
}

/// What `prior` says after `outcomes`: devices that were given back are no longer recorded.
pub fn without_returned(outcomes: &[Outcome], prior: &BindingsFile) -> Option<BindingsFile> {
    let returned = |bdf: Bdf| {
        outcomes
            .iter()
            .any(|outcome| outcome.step.bdf == bdf && outcome.step.action == Action::Unbind && outcome.result.is_ok())
    };
    let mut file = prior.clone();
    file.devices.retain(|record| !returned(record.bdf));
    (file.devices != prior.devices).then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binding::{Policy, plan_bind, plan_unbind};
    use agent_core::state::Origin;
    use hw_probe::testing::FakeSysfs;
    use std::sync::Mutex;

    const GPU: &str = "0000:41:00.0";
    const OTHER: &str = "0000:42:00.0";

    /// A kernel over a fake tree: the writes have the effects that they have on a real one, and are recorded.
    struct Kernel {
        fake: Arc<FakeSysfs>,
        writes: Arc<Mutex<Vec<String>>>,
    }

    impl Kernel {
        fn new() -> Self {
            let fake = FakeSysfs::new();
            fake.load_driver("vfio-pci");
            Self { fake: Arc::new(fake), writes: Arc::default() }
        }

        fn write(&self) -> SysfsWrite {
            let (fake, writes) = (Arc::clone(&self.fake), Arc::clone(&self.writes));
            Arc::new(move |path, value| {
                let value = value.trim();
                let relative = path.strip_prefix(fake.path()).map_err(io::Error::other)?;
                writes.lock().unwrap().push(format!("{} = {value}", relative.display()));
                let parent = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
                match path.file_name().unwrap_or_default().to_str() {
                    Some("driver_override") => {
                        fake.get(parent.as_str()).driver_override(value);
                        Ok(())
                    }
                    Some("unbind") => fake.unbind(value),
                    Some("bind") => fake.bind(value, &parent),
                    Some("drivers_probe") => {
                        fake.drivers_probe(value);
                        Ok(())
                    }
                    _ => Err(io::Error::other("no such file in this kernel")),
                }
            })
        }

        fn executor(&self) -> Executor {
            // What the lock directory is checked for: nobody else may write there.
            std::fs::create_dir_all(self.fake.path().join("run")).unwrap();
            let places = Places::at(self.fake.root(), "vfio-manager");
            let (lock, write) = (Duration::from_millis(50), Duration::from_millis(200));
            Executor::new(places, PathBuf::from("/nonexistent"), lock, write).with_kernel(self.write())
        }

        fn inventory(&self) -> Inventory {
            Inventory::scan(&self.fake.root())
        }

        fn bind(&self, executor: &Executor) -> Vec<Outcome> {
            let inventory = self.inventory();
            let steps = plan_bind(&inventory, &Policy::default(), |_| "vfio_pci".into());
            executor.run(&inventory, steps, &empty())
        }
    }

    fn empty() -> BindingsFile {
        BindingsFile { origin: Origin::now("boot", None), devices: Vec::new() }
    }

    #[test]
    fn a_driverless_gpu_is_bound_and_a_second_run_writes_nothing() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let outcomes = kernel.bind(&kernel.executor());
        assert_eq!(outcomes[0].result.as_ref().unwrap().as_deref(), Some("vfio-pci"));
        let writes = kernel.writes.lock().unwrap().clone();
        let expected = [
            format!("sys/bus/pci/devices/{GPU}/driver_override = vfio-pci"),
            format!("sys/bus/pci/drivers_probe = {GPU}"),
        ];
        assert_eq!(writes, expected);
        kernel.bind(&kernel.executor());
        assert_eq!(kernel.writes.lock().unwrap().len(), writes.len());
    }

    #[test]
    fn one_device_that_fails_does_not_stop_the_others() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5).remove_attr("driver_override");
        kernel.fake.gpu(OTHER, 0x2330).group(6);
        let (fake, write) = (Arc::clone(&kernel.fake), kernel.write());
        let refusing: SysfsWrite = Arc::new(move |path, value| {
            if path.starts_with(fake.root().function(GPU.parse().unwrap())) {
                return Err(io::Error::from_raw_os_error(nix::libc::ENODEV));
            }
            write(path, value)
        });
        let outcomes = kernel.bind(&kernel.executor().with_kernel(refusing));
        let codes: Vec<_> = outcomes.iter().map(|outcome| outcome.result.as_ref().err().map(BindError::code)).collect();
        assert_eq!(codes, [Some("SysfsWriteFailed"), None]);
    }

    #[test]
    fn a_write_that_does_not_return_has_a_deadline() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let blocking: SysfsWrite = Arc::new(|_, _| {
            thread::sleep(Duration::from_secs(2));
            Ok(())
        });
        let executor = kernel.executor().with_kernel(Arc::clone(&blocking));
        let outcomes = kernel.bind(&executor);
        assert_eq!(outcomes[0].result.as_ref().unwrap_err().code(), "SysfsWriteBlocked");
        // While it hangs, the next look does not send another after it.
        let again = Instant::now();
        assert_eq!(kernel.bind(&executor)[0].result.as_ref().unwrap_err().code(), "SysfsWriteBlocked");
        assert!(again.elapsed() < Duration::from_millis(150), "{:?}", again.elapsed());
    }

    #[test]
    fn what_changed_since_the_look_is_not_touched() {
        let kernel = Kernel::new();
        kernel.fake.load_driver("nvidia");
        kernel.fake.gpu(GPU, 0x2330).group(5);
        kernel.fake.gpu(OTHER, 0x2330).group(6).driver("vfio-pci");
        let inventory = kernel.inventory();
        let bind = plan_bind(&inventory, &Policy::default(), |_| "vfio_pci".into());
        let unbind = plan_unbind(&inventory, &Policy::default());
        // The nvidia driver was loaded meanwhile, and has taken both.
        kernel.fake.get(GPU).driver("nvidia");
        kernel.fake.get(OTHER).driver("nvidia");
        for (steps, at) in [(bind, 0), (unbind, 1)] {
            let outcomes = kernel.executor().run(&inventory, steps, &empty());
            let error = outcomes[at].result.as_ref().unwrap_err();
            assert_eq!(error.code(), "DeviceChanged");
            assert!(error.to_string().contains("is nvidia now"), "{error}");
        }
        assert!(kernel.writes.lock().unwrap().is_empty(), "{:?}", kernel.writes.lock().unwrap());
    }

    #[test]
    fn another_agents_lock_is_waited_for_and_names_its_holder() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let executor = kernel.executor();
        let places = Places::at(kernel.fake.root(), "cc-manager");
        let lock = DeviceLock::take(GPU.parse().unwrap(), &places).unwrap();
        let outcomes = kernel.bind(&executor);
        let error = outcomes[0].result.as_ref().unwrap_err();
        assert_eq!(error.code(), "LockHeld");
        assert!(error.to_string().contains("cc-manager"), "{error}");
        let freed = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(lock);
        });
        let patient = Executor { lock_timeout: Duration::from_secs(10), ..executor };
        assert!(kernel.bind(&patient)[0].result.is_ok());
        freed.join().unwrap();
    }

    #[test]
    fn a_probe_that_binds_nothing_is_noticed() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let silent: SysfsWrite = Arc::new(|_, _| Ok(()));
        let outcomes = kernel.bind(&kernel.executor().with_kernel(silent));
        let error = outcomes[0].result.as_ref().unwrap_err();
        assert_eq!(error.code(), "NotBound");
        assert!(error.to_string().contains("its driver is none, not vfio-pci"), "{error}");
    }

    #[test]
    fn a_kernel_without_the_module_says_so() {
        let kernel = Kernel { fake: Arc::new(FakeSysfs::new()), writes: Arc::default() };
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let outcomes = kernel.bind(&kernel.executor());
        let error = outcomes[0].result.as_ref().unwrap_err();
        assert_eq!(error.code(), "NoVfioDriver");
        assert!(error.to_string().contains("vfio_pci"), "{error}");
    }

    #[test]
    fn unbind_gives_back_exactly_what_the_device_had() {
        for (driver, afterwards) in [(Some("nouveau"), Some("nouveau")), (None, None), (Some("gone"), None)] {
            let kernel = Kernel::new();
            kernel.fake.load_driver("nouveau");
            kernel.fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci").driver_override("vfio-pci");
            let inventory = kernel.inventory();
            let mut prior = empty();
            prior.devices.push(BindingRecord {
                bdf: GPU.parse().unwrap(),
                identity: Identity::of(inventory.get(GPU.parse().unwrap()).unwrap()),
                driver: driver.map(Into::into),
                driver_override: None,
                taken_at: jiff::Timestamp::now(),
            });
            let steps = plan_unbind(&inventory, &Policy::default());
            let outcomes = kernel.executor().run(&inventory, steps, &prior);
            assert_eq!(outcomes[0].result.as_ref().unwrap().as_deref(), afterwards, "{driver:?}");
            assert_eq!(kernel.inventory().gpus().next().unwrap().driver.as_deref(), afterwards);
            assert!(without_returned(&outcomes, &prior).unwrap().devices.is_empty());
        }
    }

    #[test]
    fn a_device_that_may_be_held_is_left_bound_and_untouched() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci");
        // A kernel without group files: the device alone can tell, by being asleep.
        kernel.fake.remove_file("dev/vfio/5");
        let unbind = || {
            let inventory = kernel.inventory();
            let steps = plan_unbind(&inventory, &Policy::default());
            kernel.executor().run(&inventory, steps, &empty()).remove(0).result
        };
        kernel.fake.get(GPU).power("auto", "active", "D0");
        assert_eq!(unbind().unwrap_err().code(), "DevicePerhapsHeld");
        assert_eq!(kernel.inventory().gpus().next().unwrap().driver.as_deref(), Some("vfio-pci"));
        assert!(kernel.writes.lock().unwrap().is_empty(), "{:?}", kernel.writes.lock().unwrap());
        kernel.fake.get(GPU).power("auto", "suspended", "D3hot");
        assert_eq!(unbind().unwrap(), None);
    }

    #[test]
    fn what_a_device_had_is_recorded_once_and_per_identity() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let inventory = kernel.inventory();
        let steps = plan_bind(&inventory, &Policy::default(), |_| "vfio_pci".into());
        let now = jiff::Timestamp::now();
        let first = records(&inventory, &steps, &empty(), now).unwrap();
        assert_eq!(first.devices.len(), 1);
        assert!(records(&inventory, &steps, &first, now).is_none());
        let mut other = first.clone();
        other.devices[0].identity.ids = "10de:ffff".into();
        assert_eq!(records(&inventory, &steps, &other, now).unwrap().devices, first.devices);
    }
}
