//! Stand-ins for tests of this crate: a clock, a Hopper GPU of few words, and a tree of sysfs's links. The virtual
//! devices of the lab are written apart from this crate; this one only moves its parts.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use hw_probe::testing::FakeSysfs;
use hw_probe::{Architecture, Bdf, DeviceKind, Inventory, Model, PciFunction, SysRoot};
use nix::errno::Errno;

use crate::access::{Access, BackEnd, Bar0, Reset};
use crate::chip::GH100;
use crate::clock::Clock;
use crate::device::Device;
use crate::error::Fault;
use crate::knob::{self, Knob};
use crate::mode::Mode;
use crate::ownership::Places;

/// A clock that passes time only when told to sleep.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeClock(Arc<AtomicU64>);

impl Clock for FakeClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }

    fn sleep(&self, duration: Duration) {
        self.0.fetch_add(u64::try_from(duration.as_nanos()).unwrap(), Ordering::SeqCst);
    }
}

/// Something wrong or odd with the device.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Quirk {
    Stuck {
        register: u32,
        value: u32,
    },
    DropReplies,
    IgnoresRequests,
    /// As `IgnoresRequests`, until it is reset.
    WedgedUntilReset,
    Reply(Vec<u32>),
    Latency(Duration),
    ReplyAt {
        head: u32,
        tail: u32,
    },
    Garbage,
    UnknownKnob(Knob),
    /// Writes of the knob get an error code.
    DenyWrite(Knob),
    /// Writes of the knob are answered well and do nothing.
    IgnoreWrite(Knob),
    /// The knob's permission reads 0.
    Forbid(Knob),
    BootTime(Duration),
    BusErrorsFor(Duration),
    NotReadyFor(Duration),
    ConfigDead,
    AllOnes,
    ModeStuck,
    ResetFails(Errno),
    DiesAtReset,
    /// Boots once, and after a reset no more.
    HangsAtReset,
    /// The same, until a bus reset.
    HangsUntilBusReset,
}

struct State {
    config: Vec<u32>,
    knobs: BTreeMap<u16, u16>,
    status: u32,
    window: [u32; 256],
    control: u32,
    pointers: [u32; 4],
    reply: Option<(Duration, Vec<u32>)>,
    up_since: Duration,
    quirks: Vec<Quirk>,
    reads: usize,
    writes: Vec<(u32, u32)>,
    requests: Vec<String>,
    resets: u32,
}

/// The device; clones are handles on the same one.
#[derive(Clone)]
pub(crate) struct FakeGpu {
    state: Arc<Mutex<State>>,
    pub(crate) clock: FakeClock,
    bdf: Bdf,
}

const BASE: u32 = 0x800;
const POINTERS: [u32; 4] = [0x8f_2c10, 0x8f_2c14, 0x8f_2c90, 0x8f_2c94];

impl FakeGpu {
    pub(crate) fn new() -> Self {
        Self::at("0000:41:00.0")
    }

    pub(crate) fn at(bdf: &str) -> Self {
        let mut config = vec![0; 1024];
        config[0] = 0x2330_10de;
        config[1] = 0x6;
        config[0x34 / 4] = 0x40;
        // LTR, then the vendor-specific capability, as a real H200 has them; the list starts with an entry of id 0.
        config[0x100 / 4] = 0x12c1_0000;
        config[0x12c / 4] = 0x2a41_0018;
        config[0x2a4 / 4] = 0x0001_000b;
        config[0x2a8 / 4] = 0x0141_0001;
        let state = State {
            config,
            knobs: (1..=47)
                .map(|knob| (knob, u16::from(matches!(knob, 1 | 3 | 5 | 7 | 9 | 33 | 35 | 44 | 46))))
                .collect(),
            status: 0,
            window: [0; 256],
            control: 0,
            pointers: [0; 4],
            reply: None,
            up_since: Duration::ZERO,
            quirks: Vec::new(),
            reads: 0,
            writes: Vec::new(),
            requests: Vec::new(),
            resets: 0,
        };
        Self { state: Arc::new(Mutex::new(state)), clock: FakeClock::default(), bdf: bdf.parse().unwrap() }
    }

    pub(crate) fn in_mode(mode: Mode) -> Self {
        let gpu = Self::new();
        gpu.put_in_mode(mode);
        gpu
    }

    pub(crate) fn put_in_mode(&self, mode: Mode) {
        for knob in GH100.knobs {
            self.set_knob(*knob, 0);
        }
        for (knob, value) in knob::vector(&GH100, mode) {
            self.set_knob(knob, value);
        }
        self.state().latch();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn bdf(&self) -> Bdf {
        self.bdf
    }

    pub(crate) fn bar0(&self) -> Box<dyn Bar0> {
        Box::new(self.clone())
    }

    pub(crate) fn back_end(&self) -> Self {
        self.clone()
    }

    pub(crate) fn device(&self) -> Device {
        let function = function(&self.bdf.to_string());
        Device::with_back_end(&function, Box::new(self.clone()), Arc::new(self.clock.clone())).unwrap()
    }

    pub(crate) fn quirk(&self, quirk: Quirk) {
        self.state().quirks.push(quirk);
    }

    pub(crate) fn clear_quirks(&self) {
        self.state().quirks.clear();
    }

    /// Begins to boot now, under the quirks it has.
    pub(crate) fn power_up(&self) {
        self.state().up_since = self.clock.now();
    }

    pub(crate) fn knob(&self, knob: Knob) -> u16 {
        self.state().knobs[&knob.0]
    }

    pub(crate) fn set_knob(&self, knob: Knob, value: u16) {
        self.state().knobs.insert(knob.0, value);
    }

    pub(crate) fn set_effective(&self, status: u32) {
        self.state().status = status;
    }

    pub(crate) fn effective_bits(&self) -> u32 {
        self.state().status & 0x23
    }

    pub(crate) fn set_config(&self, offset: u16, value: u32) {
        self.state().config[usize::from(offset) / 4] = value;
    }

    pub(crate) fn preset(&self, registers: &[(u32, u32)]) {
        for (register, value) in registers {
            let index = POINTERS.iter().position(|pointer| pointer == register).unwrap();
            self.state().pointers[index] = *value;
        }
    }

    pub(crate) fn leave_message(&self, dwords: &[u32]) {
        self.state().deliver(dwords);
    }

    pub(crate) fn writes(&self) -> Vec<(u32, u32)> {
        self.state().writes.clone()
    }

    pub(crate) fn reads(&self) -> usize {
        self.state().reads
    }

    pub(crate) fn resets(&self) -> u32 {
        self.state().resets
    }

    /// Requests as text: `8->1` a read and its answer, `8:=1` a write, `8!1e3` an error.
    pub(crate) fn requests(&self) -> String {
        self.state().requests.join(" ")
    }

    /// Whether what was booted with and what is pending are both `mode`.
    pub(crate) fn requests_after_reset_are_vector_of(&self, mode: Mode) -> Result<(), (Knob, u16)> {
        let state = self.state();
        match knob::vector(&GH100, mode).into_iter().find(|(knob, value)| state.knobs[&knob.0] != *value) {
            None if (GH100.decode)(state.status) == mode => Ok(()),
            None => Err((Knob(0), 0)),
            Some((knob, _)) => Err((knob, state.knobs[&knob.0])),
        }
    }
}

impl State {
    fn has(&self, quirk: &Quirk) -> bool {
        self.quirks.contains(quirk)
    }

    fn find<T>(&self, pick: impl Fn(&Quirk) -> Option<T>) -> Option<T> {
        self.quirks.iter().rev().find_map(pick)
    }

    fn latch(&mut self) {
        let knob = |knob: Knob| u32::from(self.knobs[&knob.0]);
        self.status = knob(Knob::CCM) | knob(Knob::CCD) << 1 | knob(Knob::PPCIE) << 5;
    }

    fn deliver(&mut self, dwords: &[u32]) {
        if dwords.is_empty() {
            return;
        }
        self.window[..dwords.len()].copy_from_slice(dwords);
        let last = u32::try_from(dwords.len() - 1).unwrap();
        (self.pointers[2], self.pointers[3]) = self
            .find(|quirk| if let Quirk::ReplyAt { head, tail } = quirk { Some((*head, *tail)) } else { None })
            .unwrap_or((BASE, BASE + 4 * last));
    }

    /// The FSP at work: one request in, one reply out.
    fn serve(&mut self, now: Duration) {
        let length = usize::try_from((self.pointers[1] - self.pointers[0]) / 4 + 1).unwrap();
        if self.has(&Quirk::IgnoresRequests) || self.has(&Quirk::WedgedUntilReset) {
            return;
        }
        let request = self.window[..length].to_vec();
        self.pointers[0] = self.pointers[1];
        assert_eq!(request[..2], [0xc000_0000, 0x1310_de7e]);
        let id = Knob((request[2] >> 16) as u16);
        let known = self.knobs.contains_key(&id.0) && !self.has(&Quirk::UnknownKnob(id));
        let (text, error, payload) = match (request[2] & 0xffff, request.get(3)) {
            _ if !known => (format!("{}!1e3", id.0), 0x1e3, None),
            (0x020c, None) => {
                let forbidden = self.has(&Quirk::Forbid(Knob(id.0 + 1)));
                let value = if forbidden { 0 } else { self.knobs[&id.0] };
                let garbage = if self.has(&Quirk::Garbage) { 0xdead_0000 } else { 0 };
                (format!("{}->{value}", id.0), 0, Some(u32::from(value) | garbage))
            }
            (0x020d, Some(_)) if self.has(&Quirk::DenyWrite(id)) => (format!("{}!77", id.0), 0x77, None),
            (0x020d, Some(value)) => {
                if !self.has(&Quirk::IgnoreWrite(id)) {
                    self.knobs.insert(id.0, u16::try_from(*value).unwrap());
                }
                (format!("{}:={value}", id.0), 0, None)
            }
            _ => panic!("not a request: {request:x?}"),
        };
        self.requests.push(text);
        if self.has(&Quirk::DropReplies) {
            return;
        }
        let reply = [0xc000_0000, 0x1510_de7e, 3, 0x13, error].into_iter().chain(payload).collect();
        let reply = self
            .find(|quirk| if let Quirk::Reply(reply) = quirk { Some(reply.clone()) } else { None })
            .unwrap_or(reply);
        let latency = self.find(|quirk| if let Quirk::Latency(latency) = quirk { Some(*latency) } else { None });
        self.reply = Some((now + latency.unwrap_or(Duration::from_micros(300)), reply));
    }

    fn boot_register(&self, up: Duration) -> u32 {
        let time = self.find(|quirk| if let Quirk::BootTime(time) = quirk { Some(*time) } else { None });
        if up >= time.unwrap_or_default() { 0xff } else { 0 }
    }
}

impl Bar0 for FakeGpu {
    fn read32(&self, register: u32) -> Result<u32, Fault> {
        let now = self.clock.now();
        let mut state = self.state();
        state.reads += 1;
        if state.reply.as_ref().is_some_and(|(due, _)| *due <= now)
            && let Some((_, reply)) = state.reply.take()
        {
            state.deliver(&reply);
        }
        if state.has(&Quirk::AllOnes) {
            return Ok(u32::MAX);
        }
        let stuck = state.find(|quirk| match quirk {
            Quirk::Stuck { register: at, value } if *at == register => Some(*value),
            _ => None,
        });
        let up = now.saturating_sub(state.up_since);
        let errors = state.find(|quirk| if let Quirk::BusErrorsFor(time) = quirk { Some(*time) } else { None });
        if let Some(value) = stuck {
            return Ok(value);
        }
        if errors.is_some_and(|time| up < time) {
            return Ok(0xbadf_0042);
        }
        if let Some(index) = POINTERS.iter().position(|pointer| *pointer == register) {
            return Ok(state.pointers[index]);
        }
        Ok(match register {
            0 => 0x1800_00a1,
            0x2_00bc => state.boot_register(up),
            0x2_0120 => 0,
            0x11_82cc => state.status,
            0x8f_0320..=0x8f_032c => 0xf0 + (register - 0x8f_0320) / 4,
            0x8f_2ad4 => {
                assert!(state.control & 1 << 25 != 0, "reads must count up");
                let offset = state.control & 0xfffc;
                state.control += 4;
                state.window[usize::try_from((offset - BASE) / 4).unwrap()]
            }
            other => panic!("stray read of {other:#x}"),
        })
    }

    fn write32(&self, register: u32, value: u32) -> Result<(), Fault> {
        let now = self.clock.now();
        let mut state = self.state();
        state.writes.push((register, value));
        if let Some(index) = POINTERS.iter().position(|pointer| *pointer == register) {
            state.pointers[index] = value;
            if index == 0 && state.pointers[0] != state.pointers[1] {
                state.serve(now);
            }
            return Ok(());
        }
        match register {
            0x8f_2ad0 => state.control = value,
            0x8f_2ad4 => {
                assert!(state.control & 1 << 24 != 0, "writes must count up");
                let offset = state.control & 0xfffc;
                state.control += 4;
                state.window[usize::try_from((offset - BASE) / 4).unwrap()] = value;
            }
            other => panic!("stray write of {other:#x}"),
        }
        Ok(())
    }
}

impl Reset for FakeGpu {
    fn reset(&mut self) -> Result<(), Fault> {
        let now = self.clock.now();
        let mut state = self.state();
        if let Some(errno) = state.find(|quirk| if let Quirk::ResetFails(errno) = quirk { Some(*errno) } else { None })
        {
            return Err(Fault::ResetFailed { errno: errno as i32, methods: "flr".into() });
        }
        state.resets += 1;
        if state.has(&Quirk::DiesAtReset) {
            state.quirks.push(Quirk::ConfigDead);
        }
        state.quirks.retain(|quirk| *quirk != Quirk::WedgedUntilReset);
        if state.has(&Quirk::HangsAtReset) || state.has(&Quirk::HangsUntilBusReset) {
            state.quirks.push(Quirk::BootTime(Duration::MAX));
        }
        if !state.has(&Quirk::ModeStuck) {
            state.latch();
        }
        (state.pointers, state.control, state.reply, state.up_since) = ([0; 4], 0, None, now);
        Ok(())
    }

    fn bus_reset(&mut self) -> Result<(), Fault> {
        let is_possible = {
            let mut state = self.state();
            let is_possible = state.has(&Quirk::HangsUntilBusReset);
            state.quirks.retain(|quirk| !matches!(quirk, Quirk::HangsUntilBusReset | Quirk::BootTime(_)));
            is_possible
        };
        if is_possible { self.reset() } else { Err(Fault::ResetUnavailable { methods: "flr".into() }) }
    }
}

impl BackEnd for FakeGpu {
    fn access(&self) -> Access {
        Access::Sysfs
    }

    fn config32(&self, offset: u16) -> Result<u32, Fault> {
        let state = self.state();
        if state.has(&Quirk::ConfigDead) {
            return Ok(u32::MAX);
        }
        let not_ready = state.find(|quirk| if let Quirk::NotReadyFor(time) = quirk { Some(*time) } else { None });
        if offset == 0 && not_ready.is_some_and(|time| self.clock.now() < state.up_since + time) {
            return Ok(0xffff_0001);
        }
        let path = || Path::new("config").to_owned();
        state.config.get(usize::from(offset) / 4).copied().ok_or_else(|| Fault::Io {
            action: "read",
            path: path(),
            errno: 0,
        })
    }

    fn bar0(&mut self) -> Result<Box<dyn Bar0>, Fault> {
        Ok(Box::new(self.clone()))
    }
}

/// Registers that answer whatever comes next.
pub(crate) struct Noise(Mutex<(usize, Vec<u32>)>);

impl Noise {
    pub(crate) fn new(words: Vec<u32>) -> Self {
        Self(Mutex::new((0, words)))
    }
}

impl Bar0 for Noise {
    fn read32(&self, _: u32) -> Result<u32, Fault> {
        let mut state = self.0.lock().unwrap();
        state.0 += 1;
        Ok(state.1[state.0 % state.1.len()])
    }

    fn write32(&self, _: u32, _: u32) -> Result<(), Fault> {
        Ok(())
    }
}

/// A model called Testing, otherwise like an H100 of the table.
pub(crate) fn model(architecture: Architecture, chip: &str) -> Model {
    let h100 = Model::lookup(DeviceKind::Gpu, 0x2330, Some(0x16c1)).unwrap();
    Model { name: "Testing".into(), architecture, chip: chip.into(), ..h100 }
}

/// A Hopper GPU as a scan tells of it, without driver and group.
pub(crate) fn function(bdf: &str) -> PciFunction {
    static SCANNED: OnceLock<PciFunction> = OnceLock::new();
    let scan = || {
        let sysfs = FakeSysfs::new();
        let gpu = sysfs.gpu("0000:41:00.0", 0x2330).bdf();
        Inventory::scan(&sysfs.root()).get(gpu).unwrap().clone()
    };
    PciFunction { bdf: bdf.parse().unwrap(), ..SCANNED.get_or_init(scan).clone() }
}

/// Places below `root`, with a run folder that may hold locks.
pub(crate) fn places(root: &Path) -> Places {
    let run = root.join("run");
    fs::create_dir(&run).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o755)).unwrap();
    Places::at(SysRoot::at(root), "testing")
}

/// A fake sysfs with the folders beside it that ownership needs.
pub(crate) struct Tree {
    pub(crate) sysfs: FakeSysfs,
    pub(crate) places: Places,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let sysfs = FakeSysfs::new();
        let places = places(sysfs.path());
        Self { sysfs, places }
    }

    /// Adds an H100 and returns what a scan says of it.
    pub(crate) fn function(&self, bdf: &str, driver: Option<&str>, group: Option<u32>) -> PciFunction {
        let gpu = self.sysfs.gpu(bdf, 0x2330).resource_file(0, 16 << 20);
        if let Some(driver) = driver {
            let _ = gpu.driver(driver);
        }
        if let Some(group) = group {
            let _ = gpu.group(group);
        }
        Inventory::scan(&self.sysfs.root()).get(gpu.bdf()).unwrap().clone()
    }
}
