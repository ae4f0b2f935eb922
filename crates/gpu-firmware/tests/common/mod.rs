//! A virtual device of the lab with the little that the kernel does around it, in one process and in model time.
//!
//! Device and driver were written apart from each other, from the same protocol specification: what one of them misread
//! shows in these tests. Each device has a clock of its own, which passes when somebody sleeps, so that a transaction over
//! several devices takes each of them its own time.

#![allow(dead_code, reason = "each of the test files uses its own part of this")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use gpu_firmware::{
    Access, BackEnd, Bar0, Chip, Clock, Device, Error, Fault, Knob, KnobState, Milestone, Mode, NodeOutcome, Observer,
    Progress, Reset, Support, SystemClock, change_devices, vector,
};
use hw_probe::testing::FakeSysfs;
use hw_probe::{Bdf, Inventory, PciFunction};
use lab_devices::model::ModelEvent;
use lab_devices::{DeviceSpec, DeviceStatus, Firmware, Model, ModelKind, Space};

/// What stands for configuration space where registers are told apart.
pub(crate) const CONFIG: u32 = u32::MAX;

/// Model time, which passes when somebody sleeps. It notes how long, and after which register was read.
#[derive(Clone, Default)]
pub(crate) struct ModelClock(Arc<ClockState>);

#[derive(Default)]
struct ClockState {
    nanos: AtomicU64,
    /// The register that was read last.
    last_read: AtomicU32,
    /// The longest single sleep after a read of each register.
    longest: Mutex<BTreeMap<u32, Duration>>,
    sleeps: AtomicU64,
    /// Whether this is the time of the day, for measurements.
    is_real: bool,
}

impl ModelClock {
    /// The machine's own time.
    pub(crate) fn real() -> Self {
        Self(Arc::new(ClockState { is_real: true, ..ClockState::default() }))
    }

    /// Lets time pass in which the driver does nothing.
    pub(crate) fn pass(&self, duration: Duration) {
        if self.0.is_real {
            return SystemClock.sleep(duration);
        }
        self.0.nanos.fetch_add(u64::try_from(duration.as_nanos()).unwrap(), Ordering::SeqCst);
    }

    /// The longest single sleep of the driver after a read of each register.
    pub(crate) fn longest_sleeps(&self) -> BTreeMap<u32, Duration> {
        self.0.longest.lock().unwrap().clone()
    }

    pub(crate) fn sleeps(&self) -> u64 {
        self.0.sleeps.load(Ordering::SeqCst)
    }
}

impl Clock for ModelClock {
    fn now(&self) -> Duration {
        if self.0.is_real {
            return SystemClock.now();
        }
        Duration::from_nanos(self.0.nanos.load(Ordering::SeqCst))
    }

    fn sleep(&self, duration: Duration) {
        let mut longest = self.0.longest.lock().unwrap();
        let longest = longest.entry(self.0.last_read.load(Ordering::SeqCst)).or_default();
        *longest = duration.max(*longest);
        self.0.sleeps.fetch_add(1, Ordering::SeqCst);
        self.pass(duration);
    }
}

/// A device.
#[derive(Clone)]
pub(crate) struct Gpu {
    pub(crate) kind: ModelKind,
    pub(crate) bdf: Bdf,
    pub(crate) clock: ModelClock,
    access: Access,
    state: Arc<Mutex<State>>,
}

/// The device and what has passed between it and the driver.
struct State {
    model: Model,
    /// The knobs as they were at each moment: those of the model, event by event.
    knobs: BTreeMap<u16, u16>,
    /// The knobs at the end of each boot, which then became the mode.
    latched: Vec<Vec<KnobState>>,
    requests: Vec<String>,
    /// Whether requests and boots are not noted.
    is_quiet: bool,
    reads: u64,
    /// Register writes, and calls that change something: writes of configuration space, resets.
    changes: u64,
    /// The process dies when it is about to make the change of this number.
    dies_at: Option<u64>,
    /// Every access, where they are noted.
    journal: Option<Vec<Step>>,
}

/// An access: when, of what, where, and what was written.
pub(crate) type Step = (Duration, Space, u64, Option<u32>);

const COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u32 = 0x2;
/// The power state, in the power-management capability of a real H200 (h200-observed).
const PMCSR: u64 = 0x44;
const POWER_STATE: u32 = 0x3;
/// DEVCTL of the PCI Express capability, which a real H200 has at 0x60 (h200-observed).
const DEVCTL: u64 = 0x68;
const INITIATE_FLR: u32 = 1 << 15;
const DEVCAP: u64 = 0x64;
const HAS_FLR: u32 = 1 << 28;

impl Gpu {
    /// One that has just been powered up.
    pub(crate) fn new(spec: DeviceSpec) -> Self {
        Self::with_clock(spec, ModelClock::default())
    }

    /// The same, in time of this kind.
    pub(crate) fn with_clock(spec: DeviceSpec, clock: ModelClock) -> Self {
        let kind = spec.model;
        let mut model = Model::new(spec, clock.now());
        model.power_on(clock.now());
        let state = State {
            knobs: model.knobs().clone(),
            model,
            latched: Vec::new(),
            requests: Vec::new(),
            is_quiet: false,
            reads: 0,
            changes: 0,
            dies_at: None,
            journal: None,
        };
        let bdf = function(kind).bdf;
        Self { kind, bdf, clock, access: Access::Sysfs, state: Arc::new(Mutex::new(state)) }
    }

    pub(crate) fn healthy() -> Self {
        Self::new(DeviceSpec::new("gpu0", ModelKind::H100))
    }

    /// One that has booted in this mode.
    pub(crate) fn in_mode(spec: DeviceSpec, mode: Mode) -> Self {
        let knobs = vector(chip(spec.model), mode).into_iter().filter(|(_, value)| *value != 0);
        let gpu = Self::new(DeviceSpec { knobs: knobs.map(|(knob, value)| (knob.0, value)).collect(), ..spec });
        gpu.boot();
        gpu
    }

    /// The same device, reached this way: over sysfs nothing happens to it but what is asked for, over VFIO the kernel resets
    /// it when it is opened, when it is closed, and so when the process dies.
    pub(crate) fn by(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// The same device at another address.
    pub(crate) fn at(self, bdf: &str) -> Self {
        Self { bdf: bdf.parse().unwrap(), ..self }
    }

    /// Gives it the time that a boot takes.
    pub(crate) fn boot(&self) {
        self.clock.pass(Duration::from_secs(1));
        self.status();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Does something with the model, and notes what came of it.
    pub(crate) fn with_model<T>(&self, act: impl FnOnce(&mut Model, Duration) -> T) -> T {
        let mut state = self.state();
        let result = act(&mut state.model, self.clock.now());
        state.settle();
        result
    }

    pub(crate) fn read(&self, space: Space, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.with_model(|model, now| model.read(now, space, offset, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write(&self, space: Space, offset: u64, value: u32) {
        if let Some(journal) = &mut self.state().journal {
            journal.push((self.clock.now(), space, offset, Some(value)));
        }
        self.with_model(|model, now| model.write(now, space, offset, &value.to_le_bytes()));
    }

    /// Opens it.
    pub(crate) fn open(&self) -> Result<Device, Error> {
        let fail = |fault| Error::new(self.bdf, fault);
        self.change(|| self.wake()).map_err(fail)?;
        if self.access == Access::Vfio {
            self.change(|| self.function_reset()).map_err(fail)?;
        }
        let function = PciFunction { bdf: self.bdf, ..function(self.kind) };
        Device::with_back_end(
            &function,
            Box::new(OpenGpu { gpu: self.clone(), is_open: self.access == Access::Vfio }),
            Arc::new(self.clock.clone()),
        )
    }

    pub(crate) fn device(&self) -> Device {
        self.open().unwrap()
    }

    /// What the kernel does when power is forced on.
    fn wake(&self) {
        self.write(Space::Config, PMCSR, self.read(Space::Config, PMCSR) & !POWER_STATE);
    }

    /// What the kernel does: FLR, or a bus reset where there is none, and COMMAND as it was.
    pub(crate) fn function_reset(&self) {
        if self.read(Space::Config, DEVCAP) & HAS_FLR == 0 {
            return self.reset_bus();
        }
        let command = self.read(Space::Config, COMMAND);
        self.write(Space::Config, DEVCTL, self.read(Space::Config, DEVCTL) | INITIATE_FLR);
        self.wait_and_restore(command);
    }

    /// What the kernel does on a bus with this device alone.
    fn reset_bus(&self) {
        let command = self.read(Space::Config, COMMAND);
        self.with_model(Model::bus_reset);
        self.wake();
        self.wait_and_restore(command);
    }

    fn wait_and_restore(&self, command: u32) {
        while self.read(Space::Config, 0) & 0xffff == 1 {
            self.clock.pass(Duration::from_millis(10));
        }
        self.write(Space::Config, COMMAND, command);
    }

    pub(crate) fn fault(&self, text: &str) {
        self.with_model(|model, now| model.set_fault(now, text.parse().unwrap()));
    }

    pub(crate) fn clear_faults(&self) {
        self.with_model(Model::clear_faults);
    }

    pub(crate) fn status(&self) -> DeviceStatus {
        self.with_model(Model::status)
    }

    /// Gives it other knobs, which become the mode at its next reset.
    pub(crate) fn set_knobs(&self, knobs: &BTreeMap<u16, u16>) {
        let mut state = self.state();
        assert_eq!(state.model.restore_knobs(knobs), Vec::<u16>::new());
        state.knobs = state.model.knobs().clone();
    }

    /// The requests since the last call: dword 2, and what was written or answered.
    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state().requests)
    }

    /// The knobs at the end of each boot since the last call.
    pub(crate) fn latched(&self) -> Vec<Vec<KnobState>> {
        std::mem::take(&mut self.state().latched)
    }

    pub(crate) fn reads(&self) -> u64 {
        self.state().reads
    }

    pub(crate) fn changes(&self) -> u64 {
        self.state().changes
    }

    /// Lets the process die instead of making the change of this number, counted from the beginning.
    pub(crate) fn dies_at(&self, number: u64) {
        self.state().dies_at = Some(number);
    }

    /// Whether the process has died; from here on another one drives the device.
    pub(crate) fn succeed(&self) -> bool {
        let mut state = self.state();
        let died = state.is_dead();
        state.dies_at = None;
        died
    }

    /// Ends noting requests, knobs and boots: for measurements.
    pub(crate) fn quiet(self) -> Self {
        self.state().is_quiet = true;
        self
    }

    /// Begins to note every access.
    pub(crate) fn note(&self) {
        self.state().journal = Some(Vec::new());
    }

    pub(crate) fn journal(&self) -> Vec<Step> {
        self.state().journal.take().unwrap_or_default()
    }

    /// Stages, resets, waits and verifies, without the second chances of a node's transaction.
    pub(crate) fn set(&self, mode: Mode) -> Result<(), Error> {
        self.set_watched(mode, |_| {})
    }

    /// The same; `staged` is called before the reset.
    pub(crate) fn set_watched(&self, mode: Mode, staged: impl FnOnce(&Self)) -> Result<(), Error> {
        let mut device = self.device();
        device.stage(mode, &mut |_| std::ops::ControlFlow::Continue(()))?;
        staged(self);
        device.reset()?;
        device.wait_boot()?;
        device.verify(mode).map(drop)
    }

    pub(crate) fn assert_clean(&self) {
        let status = self.status();
        assert_eq!((status.stray_count, status.host_error_count), (0, 0), "{status:#?}");
    }

    /// Counts a change and makes it, unless the process is dead or dies of it.
    fn change<T>(&self, act: impl FnOnce() -> T) -> Result<T, Fault> {
        {
            let mut state = self.state();
            state.alive()?;
            state.changes += 1;
            state.alive()?;
        }
        Ok(act())
    }

    fn look(&self, space: Space, offset: u64) -> Result<u32, Fault> {
        let register = if space == Space::Config { CONFIG } else { u32::try_from(offset).unwrap() };
        self.clock.0.last_read.store(register, Ordering::SeqCst);
        let (mut state, now, mut bytes) = (self.state(), self.clock.now(), [0; 4]);
        state.alive()?;
        state.reads += 1;
        if let Some(journal) = &mut state.journal {
            journal.push((now, space, offset, None));
        }
        state.model.read(now, space, offset, &mut bytes);
        state.settle();
        Ok(u32::from_le_bytes(bytes))
    }
}

impl State {
    fn is_dead(&self) -> bool {
        self.dies_at.is_some_and(|at| self.changes > at)
    }

    /// An error if the process is dead. It cannot see it; this is how it ends without doing anything more.
    fn alive(&self) -> Result<(), Fault> {
        if self.is_dead() { Err(Fault::Interrupted { what: "killed".into() }) } else { Ok(()) }
    }

    /// Takes note of what has happened in the model.
    fn settle(&mut self) {
        for (_, event) in self.model.take_events() {
            match event {
                _ if self.is_quiet => {}
                ModelEvent::KnobChanged { knob, value } => drop(self.knobs.insert(knob, value)),
                ModelEvent::Ready(_) => self.latched.push(knob_states(&self.knobs)),
                ModelEvent::Rpc { request, reply, .. } => self.requests.push(rpc_text(&request, reply.as_deref())),
                _ => {}
            }
        }
    }
}

fn rpc_text(request: &[u32], reply: Option<&[u32]>) -> String {
    match (request, reply) {
        ([_, _, command, value], _) => format!("{command:08X} {value}"),
        ([_, _, command], Some([_, _, _, _, 0, value])) => format!("{command:08X}->{}", value & 0xffff),
        ([_, _, command], Some([_, _, _, _, error])) => format!("{command:08X}!{error:x}"),
        (request, reply) => format!("{request:08X?}?{reply:08X?}"),
    }
}

pub(crate) fn knob_states(knobs: &BTreeMap<u16, u16>) -> Vec<KnobState> {
    knobs.iter().map(|(knob, value)| KnobState { knob: Knob(*knob), value: Some(*value) }).collect()
}

/// The device as it was opened.
struct OpenGpu {
    gpu: Gpu,
    /// Whether closing it resets it.
    is_open: bool,
}

impl OpenGpu {
    fn close(&mut self) -> Result<bool, Fault> {
        let was_open = std::mem::take(&mut self.is_open);
        if was_open {
            self.gpu.change(|| self.gpu.function_reset())?;
        }
        Ok(was_open)
    }
}

impl Drop for OpenGpu {
    fn drop(&mut self) {
        // A dead process closes nothing; what the kernel does in its stead is the test's business.
        let _ = self.close();
    }
}

impl Bar0 for Gpu {
    fn read32(&self, register: u32) -> Result<u32, Fault> {
        self.look(Space::Bar0, register.into())
    }

    fn write32(&self, register: u32, value: u32) -> Result<(), Fault> {
        let (mut state, now) = (self.state(), self.clock.now());
        state.alive()?;
        state.changes += 1;
        state.alive()?;
        if let Some(journal) = &mut state.journal {
            journal.push((now, Space::Bar0, register.into(), Some(value)));
        }
        state.model.write(now, Space::Bar0, register.into(), &value.to_le_bytes());
        state.settle();
        Ok(())
    }
}

impl Reset for OpenGpu {
    fn reset(&mut self) -> Result<(), Fault> {
        self.gpu.change(|| self.gpu.function_reset())
    }

    fn bus_reset(&mut self) -> Result<(), Fault> {
        self.gpu.change(|| self.gpu.reset_bus())
    }
}

impl BackEnd for OpenGpu {
    fn access(&self) -> Access {
        self.gpu.access
    }

    fn release(&mut self) -> Result<bool, Fault> {
        self.close()
    }

    fn config32(&self, offset: u16) -> Result<u32, Fault> {
        self.gpu.look(Space::Config, offset.into())
    }

    fn bar0(&mut self) -> Result<Box<dyn Bar0>, Fault> {
        let command = self.gpu.look(Space::Config, COMMAND)?;
        self.gpu.change(|| self.gpu.write(Space::Config, COMMAND, command | COMMAND_MEMORY))?;
        Ok(Box::new(self.gpu.clone()))
    }
}

/// The device as a scan would tell of it.
pub(crate) fn function(kind: ModelKind) -> PciFunction {
    static SCANNED: Mutex<BTreeMap<ModelKind, PciFunction>> = Mutex::new(BTreeMap::new());
    let scan = || {
        let sysfs = FakeSysfs::new();
        let function = sysfs.function("0000:41:00.0", kind.vendor_id(), kind.device_id(), kind.class());
        let bdf = function.subsystem(kind.vendor_id(), kind.subsystem_id()).bdf();
        Inventory::scan(&sysfs.root()).get(bdf).unwrap().clone()
    };
    SCANNED.lock().unwrap().entry(kind).or_insert_with(scan).clone()
}

pub(crate) fn chip(kind: ModelKind) -> &'static Chip {
    Support::of(&function(kind)).unwrap().chip
}

/// The modes that devices of this kind have of their own.
pub(crate) fn modes(kind: ModelKind) -> Vec<Mode> {
    let all = if kind.is_switch() { &[Mode::Off, Mode::Ppcie][..] } else { &Mode::ALL };
    let support = Support::of(&function(kind)).unwrap();
    all.iter().copied().filter(|mode| support.target(*mode).is_ok()).collect()
}

/// A device of each chip and firmware that is told apart, and the modes it can be in. Old firmware of a Blackwell lacks
/// knobs that nothing here touches.
pub(crate) fn fleet() -> Vec<(DeviceSpec, Vec<Mode>)> {
    use Firmware::{Current, Old};
    use ModelKind::{B200, Gb200, H100, Ls10, RtxPro6000};
    let kinds = [(H100, Current), (H100, Old), (B200, Current), (Gb200, Current), (RtxPro6000, Current)];
    let device = |(kind, firmware): (ModelKind, Firmware)| {
        let bmsai = kind.has_c2c();
        let spec = DeviceSpec { firmware, bmsai, ..DeviceSpec::new("gpu0", kind) };
        let has_mode = |mode: &Mode| firmware == Current || *mode != Mode::Ppcie;
        (spec, modes(kind).into_iter().filter(has_mode).collect())
    };
    kinds.into_iter().chain([(Ls10, Current), (Ls10, Old)]).map(device).collect()
}

/// The node's transaction over these devices.
pub(crate) fn change(gpus: &[&Gpu], target: Mode) -> NodeOutcome {
    change_observed(gpus, target, &|_: &Progress| {})
}

pub(crate) fn change_observed(gpus: &[&Gpu], target: Mode, observer: &dyn Observer) -> NodeOutcome {
    let openers = gpus.iter().map(|gpu| (gpu.bdf, || gpu.open()));
    change_devices(openers.collect(), target, observer)
}

/// Does something at the first milestone of a device that is like this one.
pub(crate) fn at_milestone(bdf: Bdf, is_it: fn(&Milestone) -> bool, act: impl Fn() + Sync) -> impl Observer {
    let done = std::sync::Once::new();
    move |progress: &Progress| {
        if progress.bdf == bdf && is_it(&progress.what) {
            done.call_once(&act);
        }
    }
}

/// How many knobs belong to the vector of some mode of this kind of device.
pub(crate) fn vector_knobs(kind: ModelKind) -> usize {
    let knobs = modes(kind).into_iter().flat_map(|mode| vector(chip(kind), mode));
    knobs.map(|(knob, _)| knob).collect::<std::collections::BTreeSet<_>>().len()
}
