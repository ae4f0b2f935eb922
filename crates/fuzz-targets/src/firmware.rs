//! A device whose registers answer what the bytes say: its mailbox, and if they wish its other registers and its
//! configuration space.
//!
//! Behind it is a virtual device that works, so that a lie can come at any point of a conversation that has gone well so
//! far. The first byte says which device and what is done with it, the second how far it may lie; each later byte says how
//! the next read is answered: honestly, or with what follows.

use std::cell::OnceCell;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use gpu_firmware::{
    Access, BackEnd, Bar0, Clock, Device, Effective, Fault, KnobState, Mode, Progress, Reset, Support, change_devices,
};
use hw_probe::testing::FakeSysfs;
use hw_probe::{Inventory, PciFunction};
use lab_devices::{DeviceSpec, Model, ModelKind, Space};

/// One of each chip that is told apart.
const KINDS: [ModelKind; 4] = [ModelKind::H100, ModelKind::B200, ModelKind::RtxPro6000, ModelKind::Ls10];

/// What is answered as it is.
const HONEST: std::ops::RangeInclusive<u8> = 0..=0xa0;

thread_local! {
    static FUNCTIONS: OnceCell<Vec<PciFunction>> = const { OnceCell::new() };
}

/// Whatever the device answers, what is done with it ends in time and after so many reads, and no knob has a value that was
/// not the answer to the question for it. What is done with an honest one succeeds.
pub fn firmware(data: &[u8]) {
    let (setup, answers) = data.split_first().map_or((0, data), |(first, rest)| (*first, rest));
    let kind = KINDS[usize::from(setup & 0b11)];
    let function =
        FUNCTIONS.with(|cell| cell.get_or_init(|| KINDS.map(function).into())[usize::from(setup & 0b11)].clone());
    let is_honest = answers.iter().skip(1).all(|byte| HONEST.contains(byte));
    let liar = Liar(Arc::new(Mutex::new(State::new(kind, answers))));
    let open = || Device::with_back_end(&function, Box::new(liar.clone()), Arc::new(liar.clone()));
    let modes: Vec<Mode> = {
        let support = Support::of(&function).expect("Every kind can be driven");
        let of_its_own = |mode: &Mode| support.target(*mode).is_ok_and(|own| own == *mode);
        Mode::ALL.into_iter().filter(of_its_own).collect()
    };
    let mode = modes[usize::from(setup >> 4) % modes.len()];
    match setup >> 2 & 0b11 {
        0 | 1 => {
            let observed = open().expect("Every kind can be driven").observe();
            assert!(observed.is_ok() || !is_honest, "{observed:?}");
            let state = liar.state();
            state.check_budget(1);
            state.check_exchanges(observed.is_ok());
            if let Ok(observed) = observed {
                assert_eq!(observed.knobs, state.read_knobs(), "the knobs are those that were read");
                assert_eq!(observed.knobs.len(), state.exchanges.len());
            }
        }
        2 => {
            let mut device = open().expect("Every kind can be driven");
            let mut told = Vec::new();
            let staged = device.stage(mode, &mut |write| {
                told.push(*write);
                std::ops::ControlFlow::Continue(())
            });
            assert!(staged.is_ok() || !is_honest, "{staged:?}");
            let state = liar.state();
            state.check_budget(1);
            state.check_exchanges(staged.is_ok());
            for write in told {
                assert!(state.has_read_back(write.knob.0, write.to), "{write} was told and not read back");
            }
            if let Ok(staged) = staged {
                state.check_knobs(&staged.knobs);
                state.check_target(mode, &staged.knobs);
            }
        }
        _ => {
            let outcome = change_devices(vec![(function.bdf, open)], mode, &|_: &Progress| {});
            assert!(outcome.all_verified() || !is_honest, "{outcome:?}");
            let state = liar.state();
            // One reset to free the mailbox, one to change the mode, and a bus reset after either: three boots more.
            state.check_budget(4);
            assert!(state.resets <= 4, "{} resets", state.resets);
            state.check_exchanges(outcome.all_verified());
            if let Ok(done) = &outcome.devices[0].result {
                state.check_knobs(&done.knobs);
                state.check_target(mode, &done.knobs);
                assert_eq!(done.effective, mode);
                assert_eq!(state.last_status.map(|word| effective(kind, word)), Some(done.effective));
            }
        }
    }
}

/// What a status word means (gpu-cc-protocol section 3).
fn effective(kind: ModelKind, word: u32) -> Effective {
    let has_ppcie = kind == ModelKind::H100 && word & 0x20 != 0;
    match (kind, word & 0b11) {
        (ModelKind::Ls10, bits) if bits & 1 == 1 => Effective::Ppcie,
        (ModelKind::Ls10, _) => Effective::Off,
        (_, 0) if has_ppcie => Effective::Ppcie,
        (_, 0) => Effective::Off,
        (_, 2) => Effective::InvalidDevtoolsOnly,
        _ if has_ppcie => Effective::InvalidCcWithPpcie,
        (_, 1) => Effective::On,
        _ => Effective::Devtools,
    }
}

/// The registers of a mailbox (gpu-cc-protocol sections 4.8 and 4.9).
mod register {
    pub(super) const EMEM_CONTROL: u32 = 0x8f_2ad0;
    pub(super) const EMEM_DATA: u32 = 0x8f_2ad4;
    pub(super) const QUEUE_HEAD: u32 = 0x8f_2c10;
    pub(super) const RECV_INFO: u32 = 0x8f_1f84;
    pub(super) const RECV_DATA: u32 = 0x8f_1f88;
    pub(super) const SEND_INFO: u32 = 0x8f_1f04;
    pub(super) const SEND_DATA: u32 = 0x8f_1f08;
    /// Nothing at or above is other than the mailbox's.
    pub(super) const MAILBOX: std::ops::RangeInclusive<u32> = 0x8f_1e00..=0x8f_2fff;
}

#[derive(Clone)]
struct Liar(Arc<Mutex<State>>);

/// A request and what was read of messages after it; the first message is its answer.
#[derive(Default)]
struct Exchange {
    request: Vec<u32>,
    messages: Vec<Vec<u32>>,
    /// Whether the device was reset before the next one.
    is_last: bool,
}

/// What an answer says, by the shapes of gpu-cc-protocol sections 4.4 to 4.6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Value(u16),
    Done,
    NoSuchKnob,
    /// Another error, or no answer to this question.
    Unusable,
}

struct State {
    kind: ModelKind,
    model: Model,
    now: Duration,
    answers: Vec<u8>,
    next: usize,
    /// Whether the answers begin anew when they are used up; otherwise honesty follows.
    repeats: bool,
    /// Whether registers outside the mailbox lie as well, and configuration space.
    lies_everywhere: bool,
    exchanges: Vec<Exchange>,
    request: Vec<u32>,
    bar0_reads: u64,
    config_reads: u64,
    resets: u64,
    last_status: Option<u32>,
}

/// The first part of a reply to a knob read that is as it should be.
const REPLY: [u32; 5] = [0xc000_0000, 0x1510_de7e, 3, 0x13, 0];
const RESPONSE_TYPE: u32 = 0x15;
const REQUEST_TYPE: u32 = 0x13;
const NO_SUCH_KNOB: u32 = 0x1e3;
const KNOB_READ: u32 = 0x020c;

impl State {
    fn new(kind: ModelKind, answers: &[u8]) -> Self {
        let (flags, answers) = answers.split_first().map_or((0, answers), |(first, rest)| (*first, rest));
        let mut model = Model::new(DeviceSpec::new("liar", kind), Duration::ZERO);
        // Some are still booting when they are opened.
        let now = if flags & 4 == 0 { Duration::from_secs(1) } else { Duration::ZERO };
        model.advance(now);
        Self {
            kind,
            model,
            now,
            answers: answers.to_vec(),
            next: 0,
            repeats: flags & 1 != 0,
            lies_everywhere: flags & 2 != 0,
            exchanges: Vec::new(),
            request: Vec::new(),
            bar0_reads: 0,
            config_reads: 0,
            resets: 0,
            last_status: None,
        }
    }

    fn byte(&mut self) -> u8 {
        if self.next >= self.answers.len() && self.repeats {
            self.next = 0;
        }
        let byte = self.answers.get(self.next).copied().unwrap_or(0);
        self.next = self.next.saturating_add(1);
        byte
    }

    fn dword(&mut self) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// What is answered instead of the truth.
    fn answer(&mut self, truth: u32) -> u32 {
        let low = |byte: u8| u32::from(byte);
        match self.byte() {
            honest if HONEST.contains(&honest) => truth,
            0..=0xa8 => u32::MAX,
            0xa9..=0xb0 => 0,
            0xb1..=0xb8 => 0xbadf_0000 | low(self.byte()),
            0xb9..=0xc0 => self.dword(),
            0xc1..=0xc8 => truth ^ 1_u32.rotate_left(low(self.byte())),
            0xc9..=0xd0 => truth.wrapping_add(low(self.byte())).wrapping_sub(128),
            // Pointers into EMEM's second channel and around it.
            0xd1..=0xd8 => 0x7fc + 4 * low(self.byte()),
            // The mailbox's word: ready, sometimes an error and credit, and a size.
            0xd9..=0xe0 => {
                let flags = low(self.byte());
                1 << 24 | (flags & 3) << 25 | low(self.byte()) << 2 | flags >> 2
            }
            // Words of a reply, each in its place or out of it.
            0xe1..=0xf0 => REPLY[usize::from(self.byte()) % REPLY.len()],
            0xf1..=0xf8 => truth & 0xffff_ff00 | low(self.byte()),
            0xf9..=0xff => low(self.byte()),
        }
    }

    fn read(&mut self, space: Space, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.model.read(self.now, space, offset, &mut bytes);
        // The events of the model are of no use here.
        self.model.take_events();
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, space: Space, offset: u64, value: u32) {
        self.model.write(self.now, space, offset, &value.to_le_bytes());
    }

    fn read32(&mut self, register: u32) -> u32 {
        self.bar0_reads += 1;
        let truth = self.read(Space::Bar0, register.into());
        let lies = self.lies_everywhere || register::MAILBOX.contains(&register);
        let value = if lies { self.answer(truth) } else { truth };
        if matches!(register, register::EMEM_DATA | register::SEND_DATA)
            && let Some(message) = self.exchanges.last_mut().and_then(|exchange| exchange.messages.last_mut())
        {
            message.push(value);
        }
        if register == register::SEND_INFO {
            self.begin_message();
        }
        if matches!(register, 0x11_82cc | 0x590 | 0x2_8c50) {
            self.last_status = Some(value);
        }
        value
    }

    fn write32(&mut self, register: u32, value: u32) {
        self.write(Space::Bar0, register.into(), value);
        match register {
            register::EMEM_CONTROL => {
                self.request.clear();
                self.begin_message();
            }
            register::EMEM_DATA | register::RECV_DATA => self.request.push(value),
            // Heads are also written to empty a queue, with no request before.
            register::QUEUE_HEAD if !self.request.is_empty() => self.begin_exchange(),
            register::RECV_INFO => {
                self.request.clear();
                self.begin_exchange();
            }
            _ => {}
        }
        // On MNOC the request follows the word that announces it.
        if register == register::RECV_DATA
            && let Some(exchange) = self.exchanges.last_mut()
        {
            exchange.request.push(value);
        }
    }

    fn begin_exchange(&mut self) {
        let request = std::mem::take(&mut self.request);
        self.exchanges.push(Exchange { request, ..Exchange::default() });
    }

    /// What is read from here on is a message of its own.
    fn begin_message(&mut self) {
        if let Some(exchange) = self.exchanges.last_mut() {
            exchange.messages.retain(|message| !message.is_empty());
            exchange.messages.push(Vec::new());
        }
    }

    fn reset(&mut self) {
        self.resets += 1;
        if let Some(exchange) = self.exchanges.last_mut() {
            exchange.is_last = true;
        }
        self.model.bus_reset(self.now);
        // As the kernel restores it.
        self.write(Space::Config, 0x4, 0x2);
    }

    /// In time, and after no more reads than that many boots and the exchanges there were can take.
    fn check_budget(&self, boots: u64) {
        let seconds = |count| Duration::from_secs(count);
        let is_mnoc = !matches!(self.kind, ModelKind::H100 | ModelKind::Ls10);
        let exchanges = self.exchanges.len() as u64 + boots;
        // Configuration space, firewall, boot and status; a recovery flag that answers with bus errors. By exchange the
        // mailbox's former user, the way in, the reply.
        let (boot, exchange) = if is_mnoc { (10 + 15 + 10, 5 + 5 + 1 + 5) } else { (5 + 5, 5 + 1 + 5) };
        let limit = seconds(boots * (boot + 1) + exchanges * (exchange + 1));
        assert!(self.now <= limit, "{:?} of {limit:?} with {exchanges} exchanges", self.now);
        let most = boots * 5_000 + exchanges * 45_000;
        assert!(self.bar0_reads <= most, "{} reads of {most}", self.bar0_reads);
        // A walk over the capabilities at each look.
        let most = boots * 4_000 * 1_000;
        assert!(self.config_reads <= most, "{} reads of {most}", self.config_reads);
    }

    /// No request follows an answer that is not one, and after success all are.
    fn check_exchanges(&self, is_success: bool) {
        for (index, exchange) in self.exchanges.iter().enumerate() {
            let must_be_good = index + 1 < self.exchanges.len() || is_success;
            if must_be_good && !exchange.is_last {
                assert_ne!(exchange.answer(), Answer::Unusable, "believed: {exchange}");
            }
        }
    }

    /// What was answered to each knob read, in order.
    fn read_knobs(&self) -> Vec<KnobState> {
        self.exchanges.iter().filter_map(Exchange::knob_state).collect()
    }

    /// Each of these is the last that was read of the knob.
    fn check_knobs(&self, knobs: &[KnobState]) {
        let read = self.read_knobs();
        for state in knobs {
            let last = read.iter().rfind(|read| read.knob == state.knob);
            assert_eq!(last, Some(state), "the knobs are those that were read last");
        }
    }

    /// The knobs are those of the mode, as far as gpu-cc-protocol section 6.1 names them for every chip.
    fn check_target(&self, mode: Mode, knobs: &[KnobState]) {
        let value = |knob: u16| knobs.iter().find(|state| state.knob.0 == knob).and_then(|state| state.value);
        let (ccm, ccd, ppcie) = match mode {
            Mode::Off => (0, 0, 0),
            Mode::On => (1, 0, 0),
            Mode::Devtools => (1, 1, 0),
            Mode::Ppcie => (0, 0, 1),
        };
        for (knob, wanted) in [(8, ccm), (6, ccd), (45, ppcie)] {
            assert!(value(knob).is_none_or(|value| value == wanted), "{mode} with {knobs:?} on {}", self.kind);
        }
    }

    fn has_read_back(&self, knob: u16, value: u16) -> bool {
        self.exchanges.windows(2).any(|pair| {
            pair[0].request.get(2..) == Some(&[u32::from(knob) << 16 | 0x020d, u32::from(value)])
                && pair[0].answer() == Answer::Done
                && pair[1].knob_state().is_some_and(|read| read.knob.0 == knob && read.value == Some(value))
        })
    }
}

impl Exchange {
    fn answer(&self) -> Answer {
        let is_read = self.request.get(2).is_some_and(|command| command & 0xffff == KNOB_READ);
        let Some(reply) = self.messages.iter().find(|message| !message.is_empty()) else { return Answer::Unusable };
        let [packet, header, _, kind, error, payload @ ..] = reply.as_slice() else { return Answer::Unusable };
        if packet >> 30 != 0b11 || header >> 24 != RESPONSE_TYPE || *kind != REQUEST_TYPE {
            return Answer::Unusable;
        }
        match (error, is_read, payload) {
            (0, true, [value]) => Answer::Value((value & 0xffff) as u16),
            (0, false, []) => Answer::Done,
            (&NO_SUCH_KNOB, true, _) => Answer::NoSuchKnob,
            _ => Answer::Unusable,
        }
    }

    /// What a knob read has told.
    fn knob_state(&self) -> Option<KnobState> {
        let command = *self.request.get(2)?;
        let knob = gpu_firmware::Knob(u16::try_from(command >> 16).ok()?);
        match self.answer() {
            _ if command & 0xffff != KNOB_READ => None,
            Answer::Value(value) => Some(KnobState { knob, value: Some(value) }),
            Answer::NoSuchKnob => Some(KnobState { knob, value: None }),
            Answer::Done | Answer::Unusable => None,
        }
    }
}

impl std::fmt::Display for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x?} to {:08x?}", self.messages, self.request)
    }
}

impl Liar {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("Nobody panics with the device in hand")
    }
}

impl Clock for Liar {
    fn now(&self) -> Duration {
        self.state().now
    }

    fn sleep(&self, duration: Duration) {
        self.state().now += duration;
    }
}

impl Bar0 for Liar {
    fn read32(&self, register: u32) -> Result<u32, Fault> {
        Ok(self.state().read32(register))
    }

    fn write32(&self, register: u32, value: u32) -> Result<(), Fault> {
        self.state().write32(register, value);
        Ok(())
    }
}

impl Reset for Liar {
    fn reset(&mut self) -> Result<(), Fault> {
        self.state().reset();
        Ok(())
    }

    fn bus_reset(&mut self) -> Result<(), Fault> {
        self.reset()
    }
}

impl BackEnd for Liar {
    fn access(&self) -> Access {
        Access::Sysfs
    }

    fn config32(&self, offset: u16) -> Result<u32, Fault> {
        let mut state = self.state();
        state.config_reads += 1;
        let truth = state.read(Space::Config, offset.into());
        Ok(if state.lies_everywhere { state.answer(truth) } else { truth })
    }

    fn bar0(&mut self) -> Result<Box<dyn Bar0>, Fault> {
        self.state().write(Space::Config, 0x4, 0x2);
        Ok(Box::new(self.clone()))
    }
}

/// The device as a scan would tell of it.
fn function(kind: ModelKind) -> PciFunction {
    let fake = FakeSysfs::new();
    let function = fake.function("0000:41:00.0", kind.vendor_id(), kind.device_id(), kind.class());
    let bdf = function.subsystem(kind.vendor_id(), kind.subsystem_id()).bdf();
    Inventory::scan(&fake.root()).get(bdf).expect("A function that was made is scanned").clone()
}
