//! One virtual device as a state machine over model time (gpu-cc-protocol section 10.2).
//!
//! Nothing here sleeps or asks for the time: every entry point is given `now`, a time since any fixed point, and the
//! model catches up with what has become due since the last call. A time that runs backwards is taken as no time.
//!
//! ```text
//! reset -> ConfigRetry (config dword 0 = 0xffff0001) -> Firewalled (Blackwell: BAR0 all ones, firewall bit 1)
//!       -> Booting (boot register 0) -> Ready (boot register 0xff)
//! ```
//!
//! On entering `Ready` the effective mode is latched from the knobs; until then the status register keeps what it
//! had. Knobs survive every reset.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::config_space::{self, ConfigEffect, ConfigSpace};
use crate::emem::Emem;
use crate::fault::Fault;
use crate::kind::{Chip, ModelKind, Transport};
use crate::knobs::{self, Knobs, Refusal};
use crate::mnoc::{self, Ills, Mnoc, MnocRegister};
use crate::registers::{self, Register};
use crate::spec::DeviceSpec;
use crate::trace::Space;
use crate::undecided;

/// MCTP header of a message of one packet (section 4.2).
const MCTP_SINGLE: u32 = 0xc000_0000;
/// NVDM header of a PRC command (section 4.3).
const NVDM_PRC: u32 = 0x1310_de7e;
/// NVDM type of a PRC command.
const PRC: u32 = 0x13;
/// NVDM type of a reply.
const RESPONSE: u8 = 0x15;
/// Reply code of a knob that does not exist (section 4.6).
const UNKNOWN_KNOB: u32 = 0x1e3;

const BOOTED: u32 = 0xff;
/// Config dword 0 of a function that is not ready to be configured.
const CONFIG_RETRY: u32 = 0xffff_0001;

/// Stray accesses and host errors beyond this many are counted and not listed.
const LISTED: usize = 256;

/// Where a device is between a reset and working.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootState {
    /// Config space does not answer yet.
    ConfigRetry,
    /// Config space answers, and the BAR firewall of a Blackwell GPU keeps BAR0 shut.
    Firewalled,
    /// Config space and BAR0 answer; the boot register reads 0.
    Booting,
    /// The boot register reads 0xff.
    Ready,
}

/// A BAR access that no document allows for: an unlisted BAR0 offset, a write to a read-only register, or anything
/// in another BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct StrayAccess {
    /// Which BAR.
    pub space: Space,
    /// Byte offset in it.
    pub offset: u64,
    /// The value, if it was a write.
    pub written: Option<u32>,
}

/// A breach of protocol by whoever drives the device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case", tag = "error")]
pub enum HostError {
    /// A doorbell while the request before it had not been taken from the command queue.
    RequestBeforeConsumption {
        /// The channel.
        channel: u8,
    },
    /// A doorbell while a reply lay unacknowledged in the message queue; an MNOC message begun while one waited.
    ResponseNotConsumed {
        /// The channel, or the MNOC port.
        channel: u8,
    },
    /// A doorbell, or a whole MNOC message, before boot-complete.
    RequestBeforeBoot {
        /// The channel, or the MNOC port.
        channel: u8,
    },
    /// A doorbell with pointers outside the channel's window, not aligned, or backwards.
    BadQueuePointers {
        /// The channel.
        channel: u8,
        /// Head of the command queue.
        head: u32,
        /// Tail of the command queue.
        tail: u32,
    },
    /// A data access through one channel's port outside that channel's window.
    OutsideWindow {
        /// The channel.
        channel: u8,
        /// Byte address in EMEM.
        address: u32,
    },
    /// An MNOC message begun while the mailbox was not ready for one. It is ignored.
    MnocNotReady {
        /// The port.
        port: u8,
    },
    /// An MNOC message of no bytes, or of more than the port takes. It is ignored.
    MnocBadSize {
        /// The port.
        port: u8,
        /// Bytes announced.
        size: u32,
    },
    /// A dword written to the MNOC mailbox that no message announced. It is ignored.
    MnocUnexpectedData {
        /// The port.
        port: u8,
    },
    /// A dword written to the MNOC mailbox without credit. It is lost.
    MnocNoCredit {
        /// The port.
        port: u8,
    },
    /// A read from the MNOC mailbox when no message waited.
    MnocEmptyRead {
        /// The port.
        port: u8,
    },
    /// A request that is not a PRC command as section 4 has it.
    BadRequest {
        /// The channel, or the MNOC port.
        channel: u8,
        /// The dwords.
        words: Vec<u32>,
    },
    /// A BAR0 access that is not an aligned 32-bit one.
    OddAccess {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        width: usize,
        /// Whether it was a write.
        write: bool,
    },
}

/// What a device is doing and what has been done to it. Counts run from the start of the model.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DeviceStatus {
    /// What it imitates.
    pub model: ModelKind,
    /// Boot progress.
    pub boot: BootState,
    /// The latched status word: Hopper 0x1182cc = CCM | CCD<<1 | PPCIE<<5; Blackwell 0x590 = CCM | CCD<<1 |
    /// decoupler<<2 | BMSAI<<8; LS10 0x28c50 = PPCIE; 0 for all others.
    pub status_word: u32,
    /// Every knob that exists, with its persistent value.
    pub knobs: BTreeMap<u16, u16>,
    /// Function-level resets (config writes of DEVCTL bit 15).
    pub flrs: u64,
    /// Bus resets (vfio-user DEVICE_RESET; a machine reset is one too).
    pub bus_resets: u64,
    /// Requests that FSP has taken.
    pub rpcs: u64,
    /// Number of stray accesses.
    pub stray_count: u64,
    /// The first of them.
    pub stray: Vec<StrayAccess>,
    /// Number of protocol breaches by the host.
    pub host_error_count: u64,
    /// The first of them.
    pub host_errors: Vec<HostError>,
    /// What is wrong with the device now.
    pub faults: Vec<Fault>,
}

/// Something that happened inside the device, for the trace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ModelEvent {
    /// Power was applied, or a new connection began.
    PowerOn,
    /// A function-level reset began.
    FunctionReset,
    /// A bus reset began.
    BusReset,
    /// Boot completed with this status word.
    Ready(u32),
    /// FSP took a request; the reply is none where a fault or a malformed request leaves it out.
    Rpc {
        /// The channel, or the MNOC port.
        channel: u8,
        /// Dwords of the request.
        request: Vec<u32>,
        /// Dwords of the reply.
        reply: Option<Vec<u32>>,
    },
    /// A knob has a new persistent value.
    KnobChanged {
        /// The knob.
        knob: u16,
        /// Its value.
        value: u16,
    },
}

/// A virtual device.
pub struct Model {
    spec: DeviceSpec,
    faults: Vec<Fault>,
    config: ConfigSpace,
    knobs: Knobs,
    emem: Emem,
    mnoc: Mnoc,
    garbage: u64,
    /// Accesses that were answered since the `off-bus` fault was set.
    answered: u64,
    /// Whether a reset was its last.
    lost: bool,
    now: Duration,
    reset_at: Duration,
    /// When BAR0 became reachable after the last reset.
    open_at: Option<Duration>,
    ready_at: Option<Duration>,
    status_word: u32,
    function_scratch: u32,
    bus_scratch: u32,
    flrs: u64,
    bus_resets: u64,
    rpcs: u64,
    stray_count: u64,
    stray: Vec<StrayAccess>,
    host_error_count: u64,
    host_errors: Vec<HostError>,
    events: Vec<(Duration, ModelEvent)>,
}

impl Model {
    /// A device to which power is applied at `now`.
    pub fn new(spec: DeviceSpec, now: Duration) -> Model {
        let mut model = Model {
            faults: spec.faults.clone(),
            config: ConfigSpace::new(&spec),
            knobs: Knobs::new(&spec.knob_ids(), &spec.knobs),
            emem: Emem::new(registers::channels(spec.model)),
            mnoc: Mnoc::default(),
            // Xorshift needs a state other than 0.
            garbage: config_space::name_hash(&spec.name) | 1,
            answered: 0,
            lost: false,
            now,
            reset_at: now,
            open_at: None,
            ready_at: None,
            status_word: 0,
            function_scratch: 0,
            bus_scratch: 0,
            flrs: 0,
            bus_resets: 0,
            rpcs: 0,
            stray_count: 0,
            stray: Vec::new(),
            host_error_count: 0,
            host_errors: Vec::new(),
            events: Vec::new(),
            spec,
        };
        model.power_on(now);
        model
    }

    /// What the device was made from.
    pub fn spec(&self) -> &DeviceSpec {
        &self.spec
    }

    /// Takes knob values from an earlier run, before the device is used. Knobs that do not exist are left out and
    /// returned. The mode they stand for becomes effective when the boot in progress completes.
    pub fn restore_knobs(&mut self, values: &BTreeMap<u16, u16>) -> Vec<u16> {
        let mut unknown = Vec::new();
        for (&id, &value) in values {
            if self.knobs.read(id).is_ok() {
                self.knobs.set(id, value);
            } else {
                unknown.push(id);
            }
        }
        unknown
    }

    /// Every knob that exists, with its persistent value.
    pub fn knobs(&self) -> &BTreeMap<u16, u16> {
        self.knobs.values()
    }

    /// A power cycle: everything but the knobs starts afresh.
    pub fn power_on(&mut self, now: Duration) {
        self.advance(now);
        self.status_word = 0;
        self.reset_bus();
        self.begin_boot(ModelEvent::PowerOn);
    }

    /// A bus reset, which is what vfio-user's DEVICE_RESET stands for.
    pub fn bus_reset(&mut self, now: Duration) {
        self.advance(now);
        self.bus_resets += 1;
        self.reset_bus();
        self.begin_boot(ModelEvent::BusReset);
    }

    fn reset_bus(&mut self) {
        self.config.bus_reset();
        self.bus_scratch = 0;
        if self.has(&Fault::D3hotAtStart) {
            self.config.sleep();
        }
    }

    fn function_reset(&mut self) {
        self.flrs += 1;
        self.lost |= self.has(&Fault::LostInReset);
        self.config.function_reset();
        self.begin_boot(ModelEvent::FunctionReset);
    }

    /// What every reset clears.
    fn begin_boot(&mut self, event: ModelEvent) {
        self.function_scratch = 0;
        self.emem.reset();
        self.mnoc.reset();
        self.reset_at = self.now;
        self.open_at = None;
        self.ready_at = None;
        self.event(self.now, event);
    }

    /// Makes something wrong, instead of an earlier fault of the same kind.
    pub fn set_fault(&mut self, now: Duration, fault: Fault) {
        self.advance(now);
        self.faults.retain(|old| !old.replaced_by(&fault));
        self.faults.push(fault);
        match fault {
            Fault::OffBus { .. } => self.answered = 0,
            Fault::FspStaleReply if self.ready_at.is_some() => self.leave_stale_reply(self.now),
            _ => {}
        }
        self.advance(now);
    }

    /// Makes everything right again.
    pub fn clear_faults(&mut self, now: Duration) {
        self.advance(now);
        let was_off = self.has(&Fault::D3cold) || self.lost;
        self.faults.clear();
        if was_off {
            self.lost = false;
            self.power_on(now);
        }
        self.advance(now);
    }

    /// What is happening, at `now`.
    pub fn status(&mut self, now: Duration) -> DeviceStatus {
        self.advance(now);
        DeviceStatus {
            model: self.spec.model,
            boot: match self.ready_at {
                Some(_) => BootState::Ready,
                None if self.config_retries() => BootState::ConfigRetry,
                None if self.open_at.is_none() => BootState::Firewalled,
                None => BootState::Booting,
            },
            status_word: self.status_word,
            knobs: self.knobs.values().clone(),
            flrs: self.flrs,
            bus_resets: self.bus_resets,
            rpcs: self.rpcs,
            stray_count: self.stray_count,
            stray: self.stray.clone(),
            host_error_count: self.host_error_count,
            host_errors: self.host_errors.clone(),
            faults: self.faults.clone(),
        }
    }

    /// What has happened since the last call, each with the model time at which it did.
    pub fn take_events(&mut self) -> Vec<(Duration, ModelEvent)> {
        std::mem::take(&mut self.events)
    }

    /// Reads `data.len()` bytes. Whatever the hardware would not answer reads all ones.
    pub fn read(&mut self, now: Duration, space: Space, offset: u64, data: &mut [u8]) {
        self.advance(now);
        if self.is_gone(space) {
            data.fill(0xff);
            return;
        }
        match space {
            Space::Config => self.read_config(offset, data),
            Space::Bar0 => self.read_bar0(offset, data),
            Space::Bar2 | Space::Bar4 => {
                data.fill(0xff);
                if self.bars_answer() {
                    self.stray(space, offset, None);
                }
            }
            Space::Device => data.fill(0xff),
        }
    }

    /// Writes bytes. Whatever the hardware would not take is dropped.
    pub fn write(&mut self, now: Duration, space: Space, offset: u64, data: &[u8]) {
        self.advance(now);
        if self.is_gone(space) {
            return;
        }
        match space {
            Space::Config => self.write_config(offset, data),
            Space::Bar0 => self.write_bar0(offset, data),
            Space::Bar2 | Space::Bar4 => {
                if self.bars_answer() {
                    self.stray(space, offset, Some(first_dword(data)));
                }
            }
            Space::Device => {}
        }
    }

    /// Lets everything happen that is due by `now`.
    pub fn advance(&mut self, now: Duration) {
        self.now = self.now.max(now);
        self.boot();
        self.refresh_config();
        let Some(ready_at) = self.ready_at.filter(|_| self.firmware_works()) else { return };
        if !self.has(&Fault::FspQueueStuck) {
            while let Some((channel, at, words)) = self.emem.take_request(self.now, ready_at, self.spec.fsp_latency) {
                self.serve(channel, at, words);
            }
            while let Some((at, words)) = self.mnoc.take_request(self.now, ready_at, self.spec.fsp_latency) {
                self.serve(mnoc::PORT, at, words);
            }
        }
        self.emem.deliver(self.now, self.has(&Fault::FspSplitPointers));
        self.mnoc.deliver(self.now);
    }

    /// Goes on from the last reset as far as time and faults allow.
    fn boot(&mut self) {
        if self.has(&Fault::D3cold) {
            return;
        }
        if self.open_at.is_none() {
            let shut = self.spec.model.chip().has_firewall();
            let firewall = if shut { self.spec.firewall } else { Duration::ZERO };
            let due = self.reset_at.saturating_add(self.spec.config_retry).saturating_add(firewall);
            if self.now >= due && !(shut && self.has(&Fault::FirewallStuck)) {
                self.open_at = Some(due);
            }
        }
        let Some(open_at) = self.open_at else { return };
        if self.ready_at.is_none() && !self.has(&Fault::BootNeverCompletes) && !self.recovers() {
            let slow = self.fault_ms(|fault| if let Fault::BootSlow(ms) = fault { Some(*ms) } else { None });
            let due = open_at.saturating_add(self.spec.boot).saturating_add(slow);
            if self.now >= due {
                self.ready_at = Some(due);
                self.latch();
                self.event(due, ModelEvent::Ready(self.status_word));
                if self.has(&Fault::FspStaleReply) {
                    self.leave_stale_reply(due);
                }
            }
        }
    }

    fn recovers(&self) -> bool {
        self.faults.iter().any(|fault| matches!(fault, Fault::Recovery { .. }))
    }

    /// The security-fault word; none on a device that has had no security fault.
    fn security_fault(&self) -> Option<u32> {
        self.faults.iter().find_map(|fault| if let Fault::SecurityFault(word) = fault { Some(*word) } else { None })
    }

    fn firmware_works(&self) -> bool {
        !self.recovers() && self.security_fault().is_none() && !self.has(&Fault::D3cold)
    }

    /// Brings the dwords of config space that the device itself changes up to date.
    fn refresh_config(&mut self) {
        let no_flr = self.has(&Fault::NoFlr);
        let capabilities = config_space::DEVCAP_FLR & if no_flr { !(1 << 28) } else { u32::MAX };
        self.config.set(config_space::DEVCAP, capabilities);
        let firewall = u32::from(self.open_at.is_none());
        let fault = self.security_fault().unwrap_or(0);
        match self.spec.model.chip() {
            Chip::Hopper => self.config.set(config_space::VSEC_FAULT, fault),
            Chip::Gb20x => {
                self.config.set(config_space::VSEC_FAULT, fault);
                self.config.set(config_space::VSEC_FIREWALL, firewall << 24);
            }
            Chip::Gb10x => {
                let mailbox = u32::from(self.ready_at.is_some() && self.firmware_works());
                let flags = firewall << 20 | mailbox << 19 | u32::from(self.recovers()) << 17;
                self.config.set(config_space::DVSEC_FLAGS, flags);
                self.config.set(config_space::DVSEC_FAULT, fault);
            }
            Chip::Bare | Chip::Laguna | Chip::Other => {}
        }
    }

    /// The effective mode becomes what the knobs say.
    fn latch(&mut self) {
        if self.has(&Fault::ModeUnchangedAfterReset) {
            return;
        }
        let mode = if self.has(&Fault::EffectiveState2) {
            2
        } else {
            self.knobs.bit(knobs::CCM) | self.knobs.bit(knobs::CCD) << 1
        };
        let decoupler = self.spec.decoupler_in_status && self.knobs.read(knobs::DECOUPLER) == Ok(2);
        self.status_word = match self.spec.model.chip() {
            Chip::Hopper => mode | self.knobs.bit(knobs::PPCIE) << 5,
            Chip::Gb10x | Chip::Gb20x => mode | u32::from(decoupler) << 2 | u32::from(self.spec.bmsai) << 8,
            Chip::Laguna => self.knobs.bit(knobs::PPCIE),
            Chip::Bare | Chip::Other => 0,
        };
    }

    /// Whether an access finds nothing, because the device has fallen off the bus or has no power; counts those that it
    /// still answers.
    fn is_gone(&mut self, space: Space) -> bool {
        let off = self.faults.iter().find_map(|fault| match fault {
            Fault::OffBus { part, after } if part.covers(space) => Some(*after),
            _ => None,
        });
        if let Some(after) = off {
            if self.answered >= after {
                return true;
            }
            self.answered += 1;
        }
        self.has(&Fault::D3cold) || self.lost
    }

    fn config_retries(&self) -> bool {
        self.now < self.reset_at.saturating_add(self.spec.config_retry)
    }

    fn bars_answer(&self) -> bool {
        !self.has(&Fault::BarAllOnes) && !self.config_retries() && self.config.decodes_memory()
    }

    fn pri_errors(&self) -> bool {
        let window = self.fault_ms(|fault| if let Fault::PriErrorAfterReset(ms) = fault { Some(*ms) } else { None });
        self.now < self.reset_at.saturating_add(window)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if self.has(&Fault::ConfigAllOnes) {
            data.fill(0xff);
        } else if self.config_retries() {
            for (at, byte) in config_space::addresses(offset).zip(data) {
                *byte = CONFIG_RETRY.to_le_bytes().get(at).copied().unwrap_or(0xff);
            }
        } else {
            self.config.read(offset, data);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.has(&Fault::ConfigAllOnes) || self.config_retries() {
            return;
        }
        if self.config.write(offset, data) == ConfigEffect::FunctionReset && !self.has(&Fault::NoFlr) {
            self.function_reset();
        }
        self.refresh_config();
    }

    /// Splits an access into the dwords it touches.
    fn read_bar0(&mut self, offset: u64, data: &mut [u8]) {
        if !self.bars_answer() {
            data.fill(0xff);
            return;
        }
        if self.open_at.is_none() {
            for (at, byte) in config_space::addresses(offset).zip(data) {
                *byte = self.spec.firewall_read.to_le_bytes()[at & 3];
            }
            return;
        }
        self.check_width(offset, data.len(), false);
        let mut done = 0;
        while done < data.len() {
            let Some((register, skip)) = self.dword_of(offset, done) else {
                data[done..].fill(0xff);
                return;
            };
            let word = self.read_register(register).to_le_bytes();
            let count = (4 - skip).min(data.len() - done);
            data[done..done + count].copy_from_slice(&word[skip..skip + count]);
            done += count;
        }
    }

    fn write_bar0(&mut self, offset: u64, data: &[u8]) {
        if !self.bars_answer() || self.open_at.is_none() {
            return;
        }
        self.check_width(offset, data.len(), true);
        let mut done = 0;
        while done < data.len() {
            let Some((register, skip)) = self.dword_of(offset, done) else { return };
            let count = (4 - skip).min(data.len() - done);
            let mut word = if count == 4 { [0; 4] } else { self.peek_register(register).to_le_bytes() };
            word[skip..skip + count].copy_from_slice(&data[done..done + count]);
            self.write_register(register, u32::from_le_bytes(word));
            done += count;
        }
    }

    /// The aligned offset of the dword that holds byte `offset + done`, and where in it that byte is; none past BAR0.
    fn dword_of(&self, offset: u64, done: usize) -> Option<(u32, usize)> {
        let at = offset.checked_add(u64::try_from(done).ok()?).filter(|at| *at < self.spec.bar_size(0))?;
        let at = u32::try_from(at).ok()?;
        Some((at & !3, usize::try_from(at & 3).ok()?))
    }

    fn check_width(&mut self, offset: u64, width: usize, write: bool) {
        if width != 4 || !offset.is_multiple_of(4) {
            self.host_error(HostError::OddAccess { offset, width, write });
        }
    }

    /// What every register reads as, if none of them answers by itself.
    fn overlay(&self) -> Option<u32> {
        if self.security_fault().is_some() {
            return Some(undecided::SECURITY_FAULT_BOOT_0);
        }
        self.pri_errors().then_some(undecided::PRI_ERROR)
    }

    fn ills(&self) -> Ills {
        Ills {
            receive_error: self.has(&Fault::MnocReceiveError),
            credit_gap: self.fault_ms(|fault| if let Fault::MnocCreditGap(ms) = fault { Some(*ms) } else { None }),
        }
    }

    fn peek_register(&self, offset: u32) -> u32 {
        if let Some(value) = self.overlay() {
            return value;
        }
        let booted = self.ready_at.is_some() && !self.recovers();
        match registers::lookup(self.spec.model, offset) {
            None if self.spec.model.chip() == Chip::Other => undecided::OTHER_FUNCTION_READ,
            None => undecided::PRI_ERROR,
            Some(Register::Boot0) if self.has(&Fault::Recovery { blank: true }) => 0,
            Some(Register::Boot0) => self.spec.boot_0.or(self.spec.model.boot_0()).unwrap_or(undecided::PRI_ERROR),
            Some(Register::Constant(value)) => value,
            Some(Register::Boot) if booted => BOOTED,
            Some(Register::C2c) if booted => undecided::C2C_STATUS_UP,
            Some(Register::Boot | Register::C2c | Register::Sink) => 0,
            Some(Register::Status) => self.status_word,
            Some(Register::Recovery(active, _)) if self.recovers() => active,
            Some(Register::Recovery(_, healthy)) => healthy,
            Some(Register::FunctionScratch) => self.function_scratch,
            Some(Register::BusScratch) => self.bus_scratch,
            Some(Register::Emem(channel, register)) => self.emem.peek(channel, register),
            Some(Register::Mnoc(register)) => self.mnoc.peek(self.now, register, self.ills()),
        }
    }

    fn read_register(&mut self, offset: u32) -> u32 {
        if let Some(value) = self.overlay() {
            return value;
        }
        let mut errors = Vec::new();
        let value = match registers::lookup(self.spec.model, offset) {
            Some(Register::Emem(channel, register)) => self.emem.read(channel, register, &mut errors),
            Some(Register::Mnoc(register)) => {
                let value = self.mnoc.read(self.now, register, self.ills(), &mut errors);
                // A reply that waited behind the one just read shows at once.
                self.mnoc.deliver(self.now);
                value
            }
            None => {
                self.stray(Space::Bar0, u64::from(offset), None);
                self.peek_register(offset)
            }
            Some(_) => self.peek_register(offset),
        };
        self.host_errors(errors);
        value
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        if self.overlay().is_some() {
            return;
        }
        match registers::lookup(self.spec.model, offset) {
            Some(Register::FunctionScratch) => self.function_scratch = value,
            Some(Register::BusScratch) => self.bus_scratch = value,
            Some(Register::Sink) => {}
            Some(Register::Emem(channel, register)) => {
                let mut errors = Vec::new();
                let before = self.emem.is_rung(channel);
                self.emem.write(self.now, channel, register, value, &mut errors);
                if self.ready_at.is_none() && !before && self.emem.is_rung(channel) {
                    errors.push(HostError::RequestBeforeBoot { channel });
                }
                self.host_errors(errors);
                // A latency of nothing means at once, not at the next access.
                self.advance(self.now);
            }
            Some(Register::Mnoc(register)) => self.write_mnoc(offset, register, value),
            Some(
                Register::Boot0
                | Register::Constant(_)
                | Register::Boot
                | Register::C2c
                | Register::Status
                | Register::Recovery(..),
            )
            | None => self.stray(Space::Bar0, u64::from(offset), Some(value)),
        }
    }

    fn write_mnoc(&mut self, offset: u32, register: MnocRegister, value: u32) {
        let mut errors = Vec::new();
        let before = self.mnoc.waiting_requests();
        let ills = self.ills();
        if !self.mnoc.write(self.now, register, value, ills, &mut errors) {
            self.stray(Space::Bar0, u64::from(offset), Some(value));
        }
        if self.ready_at.is_none() && self.mnoc.waiting_requests() > before {
            errors.push(HostError::RequestBeforeBoot { channel: mnoc::PORT });
        }
        self.host_errors(errors);
        self.advance(self.now);
    }

    /// FSP takes a request and answers it.
    fn serve(&mut self, channel: u8, at: Duration, words: Vec<u32>) {
        self.rpcs += 1;
        let reply = self.answer(channel, at, &words).filter(|_| !self.has(&Fault::FspNoReply));
        if let Some(reply) = &reply {
            let late = self.fault_ms(|fault| if let Fault::FspLateReply(ms) = fault { Some(*ms) } else { None });
            let at = at.saturating_add(late);
            let copies = if self.has(&Fault::FspDuplicateReply) { 2 } else { 1 };
            for copy in 0..copies {
                match self.spec.model.chip().transport() {
                    Some(Transport::Emem) => self.emem.reply(channel, at, reply.clone(), copy > 0),
                    Some(Transport::Mnoc) if self.has(&Fault::MnocSendError) => self.mnoc.fail(),
                    Some(Transport::Mnoc) => self.mnoc.reply(at, reply.clone()),
                    None => {}
                }
            }
        }
        self.event(at, ModelEvent::Rpc { channel, request: words, reply });
    }

    /// Puts a reply into the mailbox that nobody asked for.
    fn leave_stale_reply(&mut self, at: Duration) {
        let header = NVDM_PRC & 0x00ff_ffff | u32::from(RESPONSE) << 24;
        let words = vec![MCTP_SINGLE, header, undecided::REPLY_TASK_ID, PRC, 0, undecided::STALE_REPLY_VALUE];
        match self.spec.model.chip().transport() {
            Some(Transport::Emem) => self.emem.reply(2, at, words, false),
            Some(Transport::Mnoc) => self.mnoc.reply(at, words),
            None => {}
        }
    }

    /// The reply to a request (sections 4.4 to 4.6); none to what is not a PRC command at all.
    fn answer(&mut self, channel: u8, at: Duration, words: &[u32]) -> Option<Vec<u32>> {
        let done = match *words {
            [MCTP_SINGLE, NVDM_PRC, command, ref arguments @ ..] => Some(self.prc(at, command, arguments)),
            _ => None,
        };
        if !matches!(done, Some(Some(_))) {
            self.host_error(HostError::BadRequest { channel, words: words.to_vec() });
        }
        let (code, payload) = match done?.unwrap_or(Err(undecided::UNKNOWN_COMMAND_ERROR)) {
            Ok(payload) => (0, payload),
            Err(code) => (code, None),
        };
        let kind = if self.has(&Fault::FspMistypedReply) { undecided::MISTYPED_REPLY_NVDM } else { RESPONSE };
        let header = NVDM_PRC & 0x00ff_ffff | u32::from(kind) << 24;
        let mut reply = vec![MCTP_SINGLE, header, undecided::REPLY_TASK_ID, PRC, code];
        reply.extend(payload);
        if self.has(&Fault::FspShortReply) {
            reply.truncate(4);
        }
        Some(reply)
    }

    /// Carries out a PRC command: its payload, an error code, or none for what the documents do not know.
    fn prc(&mut self, at: Duration, command: u32, arguments: &[u32]) -> Option<Result<Option<u32>, u32>> {
        let knob = u16::try_from(command >> 16).ok()?;
        let result = match (command & 0xffff, arguments) {
            (0x020c, []) => match self.forced_error(knob) {
                Some(code) => Err(code),
                None => match self.knobs.read(knob) {
                    Ok(_) if self.forced_zero(knob) => Ok(Some(self.noise() << 16)),
                    Ok(value) => Ok(Some(u32::from(value) | self.noise() << 16)),
                    Err(refusal) => Err(self.code(refusal)),
                },
            },
            (0x020d, [value]) => {
                let value = u16::try_from(*value).ok()?;
                match (self.forced_error(knob), self.knobs.may_write(knob)) {
                    (Some(code), _) => Err(code),
                    (None, Ok(())) if knob.checked_sub(1).is_some_and(|guard| self.forced_zero(guard)) => {
                        Err(self.code(Refusal::Denied))
                    }
                    (None, Err(refusal)) => Err(self.code(refusal)),
                    (None, Ok(())) => {
                        if !self.has(&Fault::KnobWriteIgnored) && self.knobs.set(knob, value) {
                            self.event(at, ModelEvent::KnobChanged { knob, value });
                        }
                        Ok(None)
                    }
                }
            }
            // Couple the next bus reset to a fundamental reset. Every bus reset of the model clears as much anyway.
            (0x0104, []) if knob == 1 && self.spec.model.chip() == Chip::Hopper => Ok(None),
            _ => return None,
        };
        Some(result)
    }

    fn code(&self, refusal: Refusal) -> u32 {
        match refusal {
            Refusal::Unknown => UNKNOWN_KNOB,
            Refusal::Denied => self.spec.denied_write_error,
        }
    }

    /// The code that a fault makes every access to this knob fail with; a fault of one knob goes before one of all.
    fn forced_error(&self, id: u16) -> Option<u32> {
        let of = |wanted: Option<u16>| {
            self.faults.iter().find_map(|fault| match fault {
                Fault::FspErrorCode { knob, code } if *knob == wanted => Some(*code),
                _ => None,
            })
        };
        of(Some(id)).or_else(|| of(None))
    }

    /// Whether a fault makes this permission knob read 0.
    fn forced_zero(&self, id: u16) -> bool {
        knobs::is_permission(id)
            && self.faults.iter().any(|fault| match fault {
                Fault::PermissionKnobZero(knob) => knob.is_none_or(|knob| knob == id),
                _ => false,
            })
    }

    /// The next 16 bits of garbage, never 0, the same in every run.
    fn noise(&mut self) -> u32 {
        if self.has(&Fault::FspCleanHighHalf) {
            return 0;
        }
        self.garbage ^= self.garbage << 13;
        self.garbage ^= self.garbage >> 7;
        self.garbage ^= self.garbage << 17;
        u32::try_from(self.garbage >> 48).unwrap_or(0) | 1
    }

    fn has(&self, fault: &Fault) -> bool {
        self.faults.contains(fault)
    }

    fn fault_ms(&self, pick: impl Fn(&Fault) -> Option<u64>) -> Duration {
        self.faults.iter().find_map(pick).map_or(Duration::ZERO, Duration::from_millis)
    }

    fn event(&mut self, at: Duration, event: ModelEvent) {
        self.events.push((at, event));
    }

    fn stray(&mut self, space: Space, offset: u64, written: Option<u32>) {
        self.stray_count += 1;
        if self.stray.len() < LISTED {
            self.stray.push(StrayAccess { space, offset, written });
        }
    }

    fn host_errors(&mut self, errors: Vec<HostError>) {
        for error in errors {
            self.host_error(error);
        }
    }

    fn host_error(&mut self, error: HostError) {
        self.host_error_count += 1;
        if self.host_errors.len() < LISTED {
            self.host_errors.push(error);
        }
    }
}

/// The first bytes of a write, as a little-endian dword.
fn first_dword(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}
