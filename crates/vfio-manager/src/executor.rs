//! Performs the planned steps through sysfs: every write that may block has a deadline and a thread of its own, every
//! result is read back, and nothing is taken from a device that is or may be held.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use agent_core::state::{BindingRecord, BindingsFile, DEVICES_FILE, Identity, STATE_DIR};
use gpu_firmware::{DeviceLock, Fault, Places, SystemClock, group_holders, group_is_free};
use hw_probe::{Bdf, Inventory, PciFunction, RuntimePower};
use tracing::{info, warn};

use crate::binding::{Action, Step};
use crate::driver::Drivers;

/// Time in which the kernel makes the driver link after a successful probe.
const LINK_DEADLINE: Duration = Duration::from_secs(2);

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
    /// The plan says that the device is not touched before a change of modes has ended.
    #[error(
        "{bdf}: Not touched yet: {reason}; it goes on when that has ended (if cc-manager is gone for good, remove its \
         {STATE_DIR}/{DEVICES_FILE})"
    )]
    InTransition {
        /// The device.
        bdf: Bdf,
        /// Which change.
        reason: String,
    },
    /// Processes use the device through the driver that it is to be taken from.
    #[error("{bdf}: Not taken from {driver}: it is used by {}; stop them first", .held_by.join(", "))]
    InUse {
        /// The device.
        bdf: Bdf,
        /// Its driver.
        driver: String,
        /// Who.
        held_by: Vec<String>,
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
    #[error("{bdf}: The write to {path} has not returned in {seconds} s: {}; it goes on in the kernel, and nothing else is done to the device until it returns", busy(.held_by), path = .path.display())]
    Blocked {
        /// The device.
        bdf: Bdf,
        /// The file.
        path: PathBuf,
        /// The deadline that passed.
        seconds: u64,
        /// Who keeps the device, as far as /proc shows.
        held_by: Vec<String>,
    },
    /// The work on the device has not ended.
    #[error("{bdf}: What was begun has not ended in {seconds} s; it is not waited for any longer, look again later")]
    Unfinished {
        /// The device.
        bdf: Bdf,
        /// How long it was waited for.
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
    /// The driver has the device, and the kernel made nothing by which it could be used.
    #[error(
        "{bdf}: {driver} has it, yet there is neither a VFIO character device nor a file of its IOMMU group; the kernel log of the \
         node has the reason"
    )]
    NoVfioNode {
        /// The device.
        bdf: Bdf,
        /// The VFIO driver.
        driver: String,
    },
    /// Nothing is done, since nothing is to be done but to tell.
    #[error("{bdf}: Only observed: it has driver {}, and would be acted on ({would}): {reason}", .driver.as_deref().unwrap_or("none"))]
    Observed {
        /// The device.
        bdf: Bdf,
        /// The driver that it has.
        driver: Option<String>,
        /// What would be done.
        would: Action,
        /// Why.
        reason: String,
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
            Self::InTransition { .. } => "DeviceInTransition",
            Self::InUse { .. } => "DeviceInUse",
            Self::Held { .. } => "DeviceHeld",
            Self::PerhapsHeld { .. } => "DevicePerhapsHeld",
            Self::Lock(error) => error.code(),
            Self::Changed { .. } => "DeviceChanged",
            Self::NoDriver { .. } => "NoVfioDriver",
            Self::Write { .. } => "SysfsWriteFailed",
            Self::Blocked { .. } => "SysfsWriteBlocked",
            Self::Unfinished { .. } => "Unfinished",
            Self::NotBound { .. } => "NotBound",
            Self::NoVfioNode { .. } => "NoVfioNode",
            Self::Observed { .. } => "Observed",
            Self::Gone { .. } => "DeviceGone",
        }
    }

    /// Who is in the way, as far as /proc shows.
    pub fn held_by(&self) -> &[String] {
        match self {
            Self::InUse { held_by, .. } | Self::Held { held_by, .. } | Self::Blocked { held_by, .. } => held_by,
            _ => &[],
        }
    }
}

/// What comes of a step that does nothing; none where it does something.
fn without_act(inventory: &Inventory, step: &Step) -> Option<Result<Option<String>, BindError>> {
    let (bdf, reason) = (step.bdf, step.reason.clone());
    let function = || inventory.get(bdf).ok_or(BindError::Gone { bdf });
    match &step.action {
        Action::Leave => Some(function().map(|function| function.driver.clone())),
        Action::Refuse => Some(Err(BindError::Refused { bdf, reason })),
        Action::Wait => Some(Err(BindError::InTransition { bdf, reason })),
        Action::Bind { .. } | Action::Unbind => None,
    }
}

/// What comes of a step where nothing is to be done.
pub fn observed(inventory: &Inventory, step: Step) -> Outcome {
    let result = without_act(inventory, &step).unwrap_or_else(|| {
        let driver = inventory.get(step.bdf).and_then(|function| function.driver.clone());
        Err(BindError::Observed { bdf: step.bdf, driver, would: step.action.clone(), reason: step.reason.clone() })
    });
    Outcome { step, result }
}

fn busy(held_by: &[String]) -> String {
    match held_by {
        [] => "something keeps the device busy".into(),
        held_by => format!("{} keep it busy", held_by.join(", ")),
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

/// What is done with each outcome as it comes.
pub type Heard = Arc<dyn Fn(Outcome) + Send + Sync>;

/// Whether the group of this number is free at this moment. The tests put a holder in its place.
pub(crate) type GroupIsFree = Arc<dyn Fn(u32) -> Result<bool, Fault> + Send + Sync>;

/// Writes that have not returned, by device: the file.
type Writing = Arc<Mutex<BTreeMap<Bdf, PathBuf>>>;

/// The driver of each module that the steps need, or why there is none: found by the first step that needs it.
type Found = Arc<Mutex<BTreeMap<String, Arc<OnceLock<Result<String, String>>>>>>;

/// Carries out steps. Clones share what is under way.
#[derive(Clone)]
pub struct Executor {
    places: Places,
    drivers: Drivers,
    lock_timeout: Duration,
    write_timeout: Duration,
    write: SysfsWrite,
    group_is_free: GroupIsFree,
    /// Held while a group is asked for: two functions of one group must not take each other for a virtual machine.
    asking: Arc<Mutex<()>>,
    writing: Writing,
}

impl Executor {
    /// An executor over the running kernel.
    pub fn new(places: Places, host_root: PathBuf, lock_timeout: Duration, write_timeout: Duration) -> Self {
        let drivers = Drivers::new(places.root.clone(), host_root);
        let (write, writing): (SysfsWrite, _) = (Arc::new(write_sysfs), Arc::default());
        let asked = places.clone();
        let group_is_free: GroupIsFree = Arc::new(move |group| group_is_free(group, &asked));
        let asking = Arc::default();
        Self { places, drivers, lock_timeout, write_timeout, write, group_is_free, asking, writing }
    }

    /// The same over another kernel.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn with_kernel(self, write: SysfsWrite) -> Self {
        Self { write, ..self }
    }

    /// How it writes.
    #[cfg(test)]
    pub(crate) fn kernel(&self) -> SysfsWrite {
        Arc::clone(&self.write)
    }

    /// The same with another deadline of writes.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn with_write_timeout(self, write_timeout: Duration) -> Self {
        Self { write_timeout, ..self }
    }

    /// The same with another kernel's word on who holds a group.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn with_groups(self, group_is_free: GroupIsFree) -> Self {
        Self { group_is_free, ..self }
    }

    /// The same with another loader of modules.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn with_load(self, load: crate::driver::Load) -> Self {
        Self { drivers: self.drivers.with_load(load), ..self }
    }

    /// The devices to which a write has not returned, and the file.
    pub fn blocked(&self) -> Vec<(Bdf, PathBuf)> {
        let writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        writing.iter().map(|(bdf, path)| (*bdf, path.clone())).collect()
    }

    /// Carries out all steps, devices in parallel, and waits for them, for `patience` at most. The driver and override of each
    /// device that is about to be taken must be in `prior` before; see [`records`].
    pub fn run(
        &self,
        inventory: &Arc<Inventory>,
        steps: &[Step],
        prior: &Arc<BindingsFile>,
        patience: Option<Duration>,
    ) -> Vec<Outcome> {
        let (done, wait) = mpsc::channel();
        let begun = Instant::now();
        let heard: Heard = Arc::new(move |outcome| {
            // Nobody waits any more when the patience has ended.
            let _ = done.send(outcome);
        });
        self.start(inventory, steps, prior, &heard);
        // What the steps hold of it is all that is left: when the last has ended there is nothing to wait for.
        drop(heard);
        let mut outcomes: BTreeMap<Bdf, Outcome> = BTreeMap::new();
        while outcomes.len() < steps.len() {
            let next = match patience {
                Some(patience) => wait.recv_timeout(patience.saturating_sub(begun.elapsed())).ok(),
                None => wait.recv().ok(),
            };
            let Some(outcome) = next else { break };
            outcomes.insert(outcome.step.bdf, outcome);
        }
        let missing = steps.iter().filter(|step| !outcomes.contains_key(&step.bdf)).cloned();
        let seconds = begun.elapsed().as_secs();
        let missing: Vec<_> = missing
            .map(|step| Outcome { result: Err(BindError::Unfinished { bdf: step.bdf, seconds }), step })
            .collect();
        outcomes.into_values().chain(missing).collect()
    }

    /// Begins all steps, each that does something on a thread of its own: one that blocks does not stop the others.
    pub fn start(&self, inventory: &Arc<Inventory>, steps: &[Step], prior: &Arc<BindingsFile>, heard: &Heard) {
        let found = Found::default();
        for step in steps.iter().cloned() {
            let bdf = step.bdf;
            if let Some(result) = without_act(inventory, &step) {
                heard(Outcome { step, result });
                continue;
            }
            let (executor, found, heard_of_it) = (self.clone(), Arc::clone(&found), Arc::clone(heard));
            let (inventory, prior, its) = (Arc::clone(inventory), Arc::clone(prior), step.clone());
            let work = move || {
                let result = executor.act(&inventory, &its, &found, &prior);
                if let Ok(driver) = &result {
                    let driver = driver.as_deref().unwrap_or("none");
                    info!(event = "device_bound", device = %bdf, driver, reason = its.reason, "device is as wanted");
                }
                heard_of_it(Outcome { step: its, result });
            };
            if let Err(error) = thread::Builder::new().name(bdf.to_string()).spawn(work) {
                warn!(device = %bdf, %error, "no thread can be started for the device");
                heard(Outcome { step, result: Err(BindError::Unfinished { bdf, seconds: 0 }) });
            }
        }
    }

    fn act(
        &self,
        inventory: &Inventory,
        step: &Step,
        found: &Found,
        prior: &BindingsFile,
    ) -> Result<Option<String>, BindError> {
        let bdf = step.bdf;
        let function = inventory.get(bdf).ok_or(BindError::Gone { bdf })?;
        if let Some((_, path)) = self.blocked().into_iter().find(|(blocked, _)| *blocked == bdf) {
            return Err(self.blocked_by(function, &path));
        }
        if let Action::Bind { module } = &step.action {
            let driver = self.driver_of(module, found);
            let driver = driver.map_err(|reason| BindError::NoDriver { bdf, module: module.clone(), reason })?;
            let lock = self.lock(bdf)?;
            return self.bind(function, &driver, &lock).map(Some);
        }
        let lock = self.lock(bdf)?;
        let record = prior.devices.iter().find(|record| record.bdf == bdf);
        self.unbind(function, record.filter(|record| record.identity == Identity::of(function)), &lock)
    }

    /// Each module is looked for and loaded once, and waited for by those alone that need it.
    fn driver_of(&self, module: &str, found: &Found) -> Result<String, String> {
        let cell = {
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(found.entry(module.to_owned()).or_default())
        };
        cell.get_or_init(|| self.drivers.driver_of(module)).clone()
    }

    fn lock(&self, bdf: Bdf) -> Result<Arc<DeviceLock>, BindError> {
        let lock = DeviceLock::take_within(bdf, &self.places, self.lock_timeout, &SystemClock);
        lock.map(Arc::new).map_err(BindError::Lock)
    }

    fn bind(&self, function: &PciFunction, driver: &str, lock: &Arc<DeviceLock>) -> Result<String, BindError> {
        let bdf = function.bdf;
        let device = self.places.root.function(bdf);
        let current = self.unchanged_driver(function)?;
        if let Some(old) = &current {
            let held_by = self.users_of(function);
            // Its driver would wait for them, perhaps for ever.
            if !held_by.is_empty() {
                return Err(BindError::InUse { bdf, driver: old.clone(), held_by });
            }
        }
        self.write(function, lock, &device.join("driver_override"), &format!("{driver}\n"))?;
        if let Some(old) = current {
            info!(event = "unbinding", device = %bdf, driver = old, "taking the device from its driver");
            self.write(function, lock, &device.join("driver/unbind"), &bdf.to_string())?;
        }
        self.write(function, lock, &self.places.root.join("sys/bus/pci/drivers_probe"), &bdf.to_string())?;
        self.await_driver(bdf, driver)?;
        self.await_node(function, driver)
    }

    fn unbind(
        &self,
        function: &PciFunction,
        record: Option<&BindingRecord>,
        lock: &Arc<DeviceLock>,
    ) -> Result<Option<String>, BindError> {
        let bdf = function.bdf;
        let device = self.places.root.function(bdf);
        let current = self.unchanged_driver(function)?;
        // Before anything is written: a held device keeps its override, too. One without driver nobody holds.
        if current.is_some() {
            self.must_be_free(function)?;
        }
        let before = record.and_then(|record| record.driver_override.as_deref()).unwrap_or_default();
        // An empty line clears the override; otherwise the next probe would bring the VFIO driver back.
        self.write(function, lock, &device.join("driver_override"), &format!("{before}\n"))?;
        if current.is_some() {
            // And directly before the act, so that the window in which a virtual machine could come in between is short.
            self.must_be_free(function)?;
            self.write(function, lock, &device.join("driver/unbind"), &bdf.to_string())?;
        }
        let Some(driver) = record.and_then(|record| record.driver.as_deref()) else { return Ok(None) };
        let bind = self.places.root.join("sys/bus/pci/drivers").join(driver).join("bind");
        if !bind.exists() {
            warn!(device = %bdf, driver, "the driver that the device had before is not loaded; it stays driverless");
            return Ok(None);
        }
        self.write(function, lock, &bind, &bdf.to_string())?;
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
        // Our own files of a group are seen in /proc as well as others'.
        let _alone = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = (self.group_is_free)(group);
        let cdev = function.vfio_cdev.as_ref().map(|cdev| cdev.name.as_str());
        let held_by = || group_holders(group, cdev, &self.places).iter().map(ToString::to_string).collect::<Vec<_>>();
        match asked {
            // Who has opened the character device, and has not bound it yet, keeps nobody out of the group; the kernel would
            // wait for it all the same.
            Ok(true) => match held_by() {
                held_by if held_by.is_empty() => Ok(()),
                held_by => Err(BindError::Held { bdf, held_by }),
            },
            Ok(false) => Err(BindError::Held { bdf, held_by: held_by() }),
            Err(fault @ Fault::NoGroupFile { .. }) => match held_by() {
                held_by if !held_by.is_empty() => Err(BindError::Held { bdf, held_by }),
                _ if self.is_suspended(bdf) => Ok(()),
                _ => unknown(fault.to_string()),
            },
            Err(fault) => unknown(fault.to_string()),
        }
    }

    fn is_suspended(&self, bdf: Bdf) -> bool {
        RuntimePower::read(&self.places.root, bdf).is_some_and(|power| power.suspended)
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

    /// A VFIO driver has made what virtual machines use the device by: its character device, or the file of its group. In a
    /// container /dev is of no use for this; the kernel's own list of the files is.
    fn await_node(&self, function: &PciFunction, driver: &str) -> Result<String, BindError> {
        let bdf = function.bdf;
        let root = &self.places.root;
        let cdevs = root.function(bdf).join("vfio-dev");
        let has_cdev = || fs::read_dir(&cdevs).is_ok_and(|mut entries| entries.next().is_some());
        let class = root.join("sys/class/vfio");
        let folder = if class.is_dir() { class } else { self.places.dev_vfio.clone() };
        let has_group = || function.iommu_group.is_some_and(|group| folder.join(group.to_string()).exists());
        let deadline = Instant::now() + LINK_DEADLINE;
        while !has_cdev() && !has_group() {
            if Instant::now() >= deadline {
                return Err(BindError::NoVfioNode { bdf, driver: driver.into() });
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(driver.into())
    }

    /// The processes that keep the device busy, by what /proc shows: those with its VFIO files open, and under NVIDIA's driver
    /// those with its own file open, or with any of that driver where its number is not known.
    fn users_of(&self, function: &PciFunction) -> Vec<String> {
        let is_its: Box<dyn Fn(&str) -> bool> = if function.is_vfio_bound() {
            let group = function.iommu_group.map(|group| format!("/dev/vfio/{group}"));
            let cdev = function.vfio_cdev.as_ref().map(|cdev| format!("/dev/vfio/devices/{}", cdev.name));
            Box::new(move |node| [&group, &cdev].into_iter().flatten().any(|own| own == node))
        } else if function.driver.as_deref() == Some("nvidia") {
            let minor = self.nvidia_minor(function.bdf);
            let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            Box::new(move |node| {
                let number = node.strip_prefix("/dev/nvidia").filter(|number| is_number(number));
                number.is_some_and(|number| minor.as_deref().is_none_or(|minor| minor == number))
            })
        } else {
            return Vec::new();
        };
        let mut found: Vec<String> = hw_probe::holders(&self.places.root)
            .list
            .iter()
            .filter(|holder| is_its(&holder.node))
            .map(|holder| {
                let pod = holder.pod_uid.as_ref().map_or_else(String::new, |uid| format!(" of pod {uid}"));
                format!("pid {} ({}){pod}", holder.pid.unwrap_or_default(), holder.comm)
            })
            .collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// The number of the device's file, as NVIDIA's driver tells it.
    fn nvidia_minor(&self, bdf: Bdf) -> Option<String> {
        let path = self.places.root.join(format!("proc/driver/nvidia/gpus/{bdf}/information"));
        let text = fs::read_to_string(path).ok()?;
        text.lines().find_map(|line| Some(line.strip_prefix("Device Minor:")?.trim().to_owned()))
    }

    fn blocked_by(&self, function: &PciFunction, path: &Path) -> BindError {
        let (bdf, path, seconds) = (function.bdf, path.to_owned(), self.write_timeout.as_secs());
        BindError::Blocked { bdf, path, seconds, held_by: self.users_of(function) }
    }

    /// Writes on a thread of its own: `unbind` returns only when the driver lets go, which may be never. The thread keeps the
    /// device's lock for as long.
    fn write(&self, function: &PciFunction, lock: &Arc<DeviceLock>, path: &Path, value: &str) -> Result<(), BindError> {
        let bdf = function.bdf;
        let (done, wait) = mpsc::channel();
        let (write, owned, text) = (Arc::clone(&self.write), path.to_owned(), value.to_owned());
        let (writing, lock) = (Arc::clone(&self.writing), Arc::clone(lock));
        let set = move |path: Option<PathBuf>, writing: &Writing| {
            let mut writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
            match path {
                Some(path) => writing.insert(bdf, path),
                None => writing.remove(&bdf),
            };
        };
        set(Some(owned.clone()), &self.writing);
        let work = move || {
            let result = write(&owned, &text);
            set(None, &writing);
            drop(lock);
            // Nobody waits any more when the deadline has passed.
            let _ = done.send(result);
        };
        if let Err(source) = thread::Builder::new().name(format!("{bdf} write")).spawn(work) {
            set(None, &self.writing);
            return Err(BindError::Write { bdf, path: path.into(), source });
        }
        match wait.recv_timeout(self.write_timeout) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(BindError::Write { bdf, path: path.into(), source }),
            Err(_) => Err(self.blocked_by(function, path)),
        }
    }
}

fn write_sysfs(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
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
    use crate::binding::{Knowledge, Policy, plan_bind, plan_unbind};
    use crate::testing::Kernel;
    use agent_core::state::Origin;
    use hw_probe::testing::FakeSysfs;
    use std::sync::Mutex;

    const GPU: &str = "0000:41:00.0";
    const OTHER: &str = "0000:42:00.0";

    fn bind(kernel: &Kernel, executor: &Executor) -> Vec<Outcome> {
        let inventory = kernel.inventory();
        let steps = plan_bind(&inventory, &Policy::default(), &Knowledge::default(), |_| "vfio_pci".into());
        executor.run(&inventory, &steps, &empty(), None)
    }

    fn empty() -> Arc<BindingsFile> {
        Arc::new(BindingsFile { origin: Origin::now("boot", None), devices: Vec::new() })
    }

    #[test]
    fn a_driverless_gpu_is_bound_and_a_second_run_writes_nothing() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let outcomes = bind(&kernel, &kernel.executor());
        assert_eq!(outcomes[0].result.as_ref().unwrap().as_deref(), Some("vfio-pci"));
        let writes = kernel.writes.lock().unwrap().clone();
        let expected = [
            format!("sys/bus/pci/devices/{GPU}/driver_override = vfio-pci"),
            format!("sys/bus/pci/drivers_probe = {GPU}"),
        ];
        assert_eq!(writes, expected);
        bind(&kernel, &kernel.executor());
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
        let outcomes = bind(&kernel, &kernel.executor().with_kernel(refusing));
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
        let outcomes = bind(&kernel, &executor);
        assert_eq!(outcomes[0].result.as_ref().unwrap_err().code(), "SysfsWriteBlocked");
        // While it hangs, the next look does not send another after it.
        let again = Instant::now();
        assert_eq!(bind(&kernel, &executor)[0].result.as_ref().unwrap_err().code(), "SysfsWriteBlocked");
        assert!(again.elapsed() < Duration::from_millis(150), "{:?}", again.elapsed());
    }

    #[test]
    fn what_changed_since_the_look_is_not_touched() {
        let kernel = Kernel::new();
        kernel.fake.load_driver("nvidia");
        kernel.fake.gpu(GPU, 0x2330).group(5);
        kernel.fake.gpu(OTHER, 0x2330).group(6).driver("vfio-pci");
        let inventory = kernel.inventory();
        let bind = plan_bind(&inventory, &Policy::default(), &Knowledge::default(), |_| "vfio_pci".into());
        let unbind = plan_unbind(&inventory, &Policy::default(), &Knowledge::default());
        // The nvidia driver was loaded meanwhile, and has taken both.
        kernel.fake.get(GPU).driver("nvidia");
        kernel.fake.get(OTHER).driver("nvidia");
        for (steps, at) in [(bind, 0), (unbind, 1)] {
            let outcomes = kernel.executor().run(&inventory, &steps, &empty(), None);
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
        let outcomes = bind(&kernel, &executor);
        let error = outcomes[0].result.as_ref().unwrap_err();
        assert_eq!(error.code(), "LockHeld");
        assert!(error.to_string().contains("cc-manager"), "{error}");
        let freed = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(lock);
        });
        let patient = Executor { lock_timeout: Duration::from_secs(10), ..executor };
        assert!(bind(&kernel, &patient)[0].result.is_ok());
        freed.join().unwrap();
    }

    #[test]
    fn a_probe_that_binds_nothing_is_noticed() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let silent: SysfsWrite = Arc::new(|_, _| Ok(()));
        let outcomes = bind(&kernel, &kernel.executor().with_kernel(silent));
        let error = outcomes[0].result.as_ref().unwrap_err();
        assert_eq!(error.code(), "NotBound");
        assert!(error.to_string().contains("its driver is none, not vfio-pci"), "{error}");
    }

    #[test]
    fn a_kernel_without_the_module_says_so() {
        let kernel = Kernel::over(FakeSysfs::new());
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let outcomes = bind(&kernel, &kernel.executor());
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
            let mut prior = (*empty()).clone();
            prior.devices.push(BindingRecord {
                bdf: GPU.parse().unwrap(),
                identity: Identity::of(inventory.get(GPU.parse().unwrap()).unwrap()),
                driver: driver.map(Into::into),
                driver_override: None,
                taken_at: jiff::Timestamp::now(),
            });
            let prior = Arc::new(prior);
            let steps = plan_unbind(&inventory, &Policy::default(), &Knowledge::default());
            let outcomes = kernel.executor().run(&inventory, &steps, &prior, None);
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
            let steps = plan_unbind(&inventory, &Policy::default(), &Knowledge::default());
            kernel.executor().run(&inventory, &steps, &empty(), None).remove(0).result
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
        let steps = plan_bind(&inventory, &Policy::default(), &Knowledge::default(), |_| "vfio_pci".into());
        let now = jiff::Timestamp::now();
        let first = records(&inventory, &steps, &empty(), now).unwrap();
        assert_eq!(first.devices.len(), 1);
        assert!(records(&inventory, &steps, &first, now).is_none());
        let mut other = first.clone();
        other.devices[0].identity.ids = "10de:ffff".into();
        assert_eq!(records(&inventory, &steps, &other, now).unwrap().devices, first.devices);
    }

    /// Binds so many devices, with writes that take 200 ms each and wait until all devices are at it; how long it takes.
    fn time_to_bind(devices: u8) -> Duration {
        let kernel = Kernel::new();
        let wanted = usize::from(devices);
        for bus in 0..devices {
            kernel.fake.gpu(Bdf { domain: 0, bus: 0x40 + bus, device: 0, function: 0 }, 0x2330).group(bus.into());
        }
        let (write, under_way) = (kernel.write(), Arc::new((Mutex::new(0), std::sync::Condvar::new())));
        // One tree of files: what the kernel does to it is done one by one, and only the waiting is at once.
        let tree = Mutex::new(());
        let waiting: SysfsWrite = Arc::new(move |path, value| {
            if path.ends_with("drivers_probe") {
                let (count, changed) = &*under_way;
                *count.lock().unwrap() += 1;
                changed.notify_all();
                let long = Duration::from_mins(1);
                let all = changed.wait_timeout_while(count.lock().unwrap(), long, |count| *count < wanted).unwrap();
                assert!(!all.1.timed_out(), "only {} writes are under way", *all.0);
            }
            thread::sleep(Duration::from_millis(200));
            let _one = tree.lock().unwrap();
            write(path, value)
        });
        let executor = kernel.executor().with_kernel(waiting);
        let executor = Executor { write_timeout: Duration::from_secs(90), ..executor };
        let begun = Instant::now();
        let outcomes = bind(&kernel, &executor);
        let took = begun.elapsed();
        let bound = outcomes.iter().filter(|outcome| outcome.result.as_ref().is_ok_and(Option::is_some)).count();
        assert_eq!(bound, wanted, "{outcomes:?}");
        took
    }

    #[test]
    fn sixteen_devices_are_bound_at_the_same_time() {
        let (one, sixteen) = (time_to_bind(1), time_to_bind(16));
        eprintln!("two writes of 200 ms a device: one in {one:?}, sixteen in {sixteen:?}");
    }

    #[test]
    fn a_write_that_blocks_keeps_its_lock_and_lets_the_others_go_on() {
        let kernel = Kernel::new();
        kernel.fake.load_driver("nvidia");
        kernel.fake.gpu(GPU, 0x2330).group(5).driver("nvidia");
        kernel.fake.gpu(OTHER, 0x2330).group(6);
        let (release, gate) = mpsc::channel::<()>();
        let (write, gate) = (kernel.write(), Mutex::new(gate));
        let blocking: SysfsWrite = Arc::new(move |path, value| {
            if path.ends_with("unbind") {
                // Until the test ends it.
                let _ = gate.lock().unwrap().recv();
            }
            write(path, value)
        });
        let executor = kernel.executor().with_kernel(blocking);
        let look = || {
            let inventory = kernel.inventory();
            let policy = Policy { take_from_driver: true, ..Policy::default() };
            let steps = plan_bind(&inventory, &policy, &Knowledge::default(), |_| "vfio_pci".into());
            executor.run(&inventory, &steps, &empty(), None)
        };
        // The first look and the next find it blocked, the other device is bound at once.
        for round in 0..2 {
            let outcomes = look();
            assert_eq!(outcomes[0].result.as_ref().unwrap_err().code(), "SysfsWriteBlocked", "{round}");
            assert_eq!(outcomes[1].result.as_ref().unwrap().as_deref(), Some("vfio-pci"), "{round}");
        }
        assert_eq!(executor.blocked().len(), 1);
        let places = Places::at(kernel.fake.root(), "cc-manager");
        let error = DeviceLock::take(GPU.parse().unwrap(), &places).unwrap_err();
        assert_eq!(error.code(), "LockHeld", "the kernel is still at work on it");
        release.send(()).unwrap();
        drop(release);
        let deadline = Instant::now() + Duration::from_secs(30);
        while !executor.blocked().is_empty() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(look()[0].result.as_ref().unwrap().as_deref(), Some("vfio-pci"));
    }

    #[test]
    fn a_gpu_that_is_used_through_nvidias_driver_is_not_taken_and_its_users_are_named() {
        for (minor, used, taken) in
            [("0", "/dev/nvidia0", false), ("", "/dev/nvidia7", false), ("0", "/dev/nvidia7", true)]
        {
            let kernel = Kernel::new();
            kernel.fake.load_driver("nvidia");
            kernel.fake.gpu(GPU, 0x2330).group(5).driver("nvidia");
            kernel.fake.process(7, "dcgm", "0::/x\n", &["/dev/nvidiactl", used]);
            if !minor.is_empty() {
                let text = format!("Model: \t\t H100\nDevice Minor: \t {minor}\n");
                kernel.fake.file(format!("proc/driver/nvidia/gpus/{GPU}/information"), text);
            }
            let inventory = kernel.inventory();
            let policy = Policy { take_from_driver: true, ..Policy::default() };
            let steps = plan_bind(&inventory, &policy, &Knowledge::default(), |_| "vfio_pci".into());
            let result = kernel.executor().run(&inventory, &steps, &empty(), None).remove(0).result;
            if taken {
                assert_eq!(result.unwrap().as_deref(), Some("vfio-pci"), "{used}");
                continue;
            }
            let error = result.unwrap_err();
            assert_eq!((error.code(), error.held_by().len()), ("DeviceInUse", 1), "{used}");
            assert!(error.to_string().contains("pid 7 (dcgm)"), "{error}");
            assert!(kernel.writes.lock().unwrap().is_empty(), "{used}");
        }
    }

    #[test]
    fn a_driver_that_makes_no_vfio_file_is_noticed() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let (fake, write) = (Arc::clone(&kernel.fake), kernel.write());
        let halfway: SysfsWrite = Arc::new(move |path, value| {
            write(path, value)?;
            if path.ends_with("drivers_probe") {
                fake.get(GPU).no_cdev();
                fake.remove_file("dev/vfio/5");
            }
            Ok(())
        });
        let outcomes = bind(&kernel, &kernel.executor().with_kernel(halfway));
        assert_eq!(outcomes[0].result.as_ref().unwrap_err().code(), "NoVfioNode");
    }

    #[test]
    fn a_module_is_loaded_once_for_all_devices() {
        let kernel = Kernel::over(FakeSysfs::new());
        for bus in 0x41..0x45 {
            kernel.fake.gpu(Bdf { domain: 0, bus, device: 0, function: 0 }, 0x2330).group(bus.into());
        }
        let loads = Arc::new(Mutex::new(0));
        let (fake, count) = (Arc::clone(&kernel.fake), Arc::clone(&loads));
        let executor = kernel.executor().with_load(Arc::new(move |module| {
            *count.lock().unwrap() += 1;
            fake.load_driver(&module.replace('_', "-"));
            Ok(String::new())
        }));
        assert!(bind(&kernel, &executor).iter().all(|outcome| outcome.result.is_ok()));
        assert_eq!(*loads.lock().unwrap(), 1);
    }

    #[test]
    fn what_is_not_done_in_time_is_told_as_such() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let slow: SysfsWrite = Arc::new(|_, _| {
            thread::sleep(Duration::from_secs(2));
            Ok(())
        });
        let executor = Executor { write_timeout: Duration::from_mins(1), ..kernel.executor().with_kernel(slow) };
        let inventory = kernel.inventory();
        let steps = plan_bind(&inventory, &Policy::default(), &Knowledge::default(), |_| "vfio_pci".into());
        let outcomes = executor.run(&inventory, &steps, &empty(), Some(Duration::from_millis(100)));
        assert_eq!(outcomes[0].result.as_ref().unwrap_err().code(), "Unfinished");
    }

    #[test]
    fn what_was_not_given_back_to_the_end_is_given_back_by_the_next_run() {
        let kernel = Kernel::new();
        kernel.fake.load_driver("nouveau");
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let inventory = kernel.inventory();
        let bdf = GPU.parse().unwrap();
        let mut prior = (*empty()).clone();
        prior.devices.push(BindingRecord {
            bdf,
            identity: Identity::of(inventory.get(bdf).unwrap()),
            driver: Some("nouveau".into()),
            driver_override: None,
            taken_at: jiff::Timestamp::now(),
        });
        let knowledge = Knowledge { recorded: [(bdf, Some("nouveau".into()))].into(), ..Knowledge::default() };
        let steps = plan_unbind(&inventory, &Policy::default(), &knowledge);
        let outcomes = kernel.executor().run(&inventory, &steps, &Arc::new(prior), None);
        assert_eq!(outcomes[0].result.as_ref().unwrap().as_deref(), Some("nouveau"));
    }

    #[test]
    fn a_held_group_is_left_as_it_is() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci").driver_override("vfio-pci");
        kernel.fake.process(9, "qemu", "0::/x\n", &["/dev/vfio/5"]);
        let inventory = kernel.inventory();
        let steps = plan_unbind(&inventory, &Policy::default(), &Knowledge::default());
        let executor = kernel.executor().with_groups(Arc::new(|_| Ok(false)));
        let outcomes = executor.run(&inventory, &steps, &empty(), None);
        let error = outcomes[0].result.as_ref().unwrap_err();
        assert_eq!(error.code(), "DeviceHeld");
        assert!(error.to_string().contains("pid 9 (qemu)"), "{error}");
        assert!(kernel.writes.lock().unwrap().is_empty());
    }

    #[test]
    fn who_has_only_opened_the_character_device_is_a_holder_too() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci").driver_override("vfio-pci").cdev(3);
        kernel.fake.process(9, "qemu", "0::/x\n", &["/dev/vfio/devices/vfio3"]);
        let inventory = kernel.inventory();
        let steps = plan_unbind(&inventory, &Policy::default(), &Knowledge::default());
        // And where there are no group files.
        let answers: [fn() -> Result<bool, Fault>; 2] = [|| Ok(true), || Err(Fault::NoGroupFile { group: Some(5) })];
        for answer in answers {
            let executor = kernel.executor().with_groups(Arc::new(move |_| answer()));
            let outcomes = executor.run(&inventory, &steps, &empty(), None);
            let error = outcomes[0].result.as_ref().unwrap_err();
            assert_eq!(error.code(), "DeviceHeld");
            assert!(error.to_string().contains("pid 9 (qemu)"), "{error}");
        }
        assert!(kernel.writes.lock().unwrap().is_empty());
    }

    #[test]
    fn functions_of_one_group_do_not_take_each_other_for_a_virtual_machine() {
        const FUNCTIONS: u8 = 8;
        let kernel = Kernel::new();
        for function in 0..FUNCTIONS {
            let bdf = Bdf { domain: 0, bus: 0x41, device: 0, function };
            kernel.fake.gpu(bdf, 0x2330).group(5).driver_override("vfio-pci");
            kernel.fake.drivers_probe(bdf);
        }
        // As the kernel does: a second open is refused while there is a first.
        let open = Mutex::new(());
        let executor = kernel.executor().with_groups(Arc::new(move |_| {
            let Ok(_file) = open.try_lock() else { return Ok(false) };
            thread::sleep(Duration::from_millis(5));
            Ok(true)
        }));
        let inventory = kernel.inventory();
        let steps = plan_unbind(&inventory, &Policy::default(), &Knowledge::default());
        let outcomes = executor.run(&inventory, &steps, &empty(), None);
        assert_eq!(outcomes.len(), usize::from(FUNCTIONS));
        assert!(outcomes.iter().all(|outcome| matches!(outcome.result, Ok(None))), "{outcomes:?}");
    }
}
