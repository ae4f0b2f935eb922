//! A host: drives a device by the documents, through any bus.

use std::time::Duration;

use crate::kind::Transport;
use crate::trace::{Space, Words};
use crate::{DeviceSpec, Fault, Model, ModelKind};

/// Offsets of the EMEM registers of channel 0; those of channel c are 8c further (gpu-cc-protocol section 4.8).
pub(super) const CONTROL: u64 = 0x8f_2ac0;
pub(super) const DATA: u64 = 0x8f_2ac4;
pub(super) const Q_HEAD: u64 = 0x8f_2c00;
pub(super) const Q_TAIL: u64 = 0x8f_2c04;
pub(super) const M_HEAD: u64 = 0x8f_2c80;
pub(super) const M_TAIL: u64 = 0x8f_2c84;

/// The registers of the MNOC mailbox, port 0 (gpu-cc-protocol section 4.9).
pub(super) const RECV_INFO: u64 = 0x8f_1f84;
pub(super) const RECV_WDATA: u64 = 0x8f_1f88;
pub(super) const SEND_INFO: u64 = 0x8f_1f04;
pub(super) const SEND_RDATA: u64 = 0x8f_1f08;

pub(super) const BOOT_0: u64 = 0;
pub(super) const GPU_BOOT: u64 = 0x2_00bc;
pub(super) const GPU_STATUS: u64 = 0x11_82cc;
pub(super) const GB20X_BOOT: u64 = 0xad_00bc;
pub(super) const BLACKWELL_STATUS: u64 = 0x590;

/// A way to a device.
pub(super) trait Bus {
    fn read(&mut self, space: Space, offset: u64, data: &mut [u8]);
    fn write(&mut self, space: Space, offset: u64, data: &[u8]);
    fn wait(&mut self, ms: u64);

    fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.read(Space::Bar0, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn put(&mut self, offset: u64, value: u32) {
        self.write(Space::Bar0, offset, &value.to_le_bytes());
    }

    fn config(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.read(Space::Config, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn enable_memory(&mut self) {
        self.write(Space::Config, 0x04, &[0x02, 0x00]);
    }

    /// A function-level reset, with memory decode switched on again after it.
    fn flr(&mut self) {
        let control = u16::try_from(self.config(0x68) & 0xffff).unwrap() | 0x8000;
        self.write(Space::Config, 0x68, &control.to_le_bytes());
        self.enable_memory();
    }

    fn wait_for_boot(&mut self, register: u64) -> bool {
        (0..500).any(|_| {
            self.wait(10);
            self.get(register) == 0xff
        })
    }

    /// Puts a request on the queue and rings.
    fn send(&mut self, channel: u64, words: &[u32]) {
        let (base, step) = (u32::try_from(channel * 0x400).unwrap(), 8 * channel);
        self.put(CONTROL + step, base | 0x0300_0000);
        for word in words {
            self.put(DATA + step, *word);
        }
        self.put(Q_TAIL + step, base + 4 * (u32::try_from(words.len()).unwrap() - 1));
        self.put(Q_HEAD + step, base);
    }

    /// Waits for a reply for 50 ms and takes it; nothing if none came.
    fn receive(&mut self, channel: u64) -> Option<Vec<u32>> {
        let (base, step) = (u32::try_from(channel * 0x400).unwrap(), 8 * channel);
        (0..50).find(|_| {
            self.wait(1);
            self.get(M_HEAD + step) != self.get(M_TAIL + step)
        })?;
        let (head, tail) = (self.get(M_HEAD + step), self.get(M_TAIL + step));
        self.put(CONTROL + step, base | 0x0300_0000);
        let reply = (head..=tail).step_by(4).map(|_| self.get(DATA + step)).collect();
        self.put(M_TAIL + step, head);
        Some(reply)
    }

    /// Whether the firmware is talked to by MNOC rather than by EMEM.
    fn by_mnoc(&self) -> bool {
        false
    }

    /// Waits for bits of a register for 50 ms.
    fn wait_bits(&mut self, register: u64, bits: u32) -> bool {
        (0..50).any(|_| {
            let met = self.get(register) & bits == bits;
            if !met {
                self.wait(1);
            }
            met
        })
    }

    /// Sends a message through the MNOC mailbox; false if it was never ready, or had no credit.
    fn send_mnoc(&mut self, words: &[u32]) -> bool {
        if !self.wait_bits(RECV_INFO, 1 << 24) {
            return false;
        }
        self.put(RECV_INFO, 1 << 20 | u32::try_from(words.len() * 4).unwrap());
        for (index, word) in words.iter().enumerate() {
            if index % 16 == 0 && !self.wait_bits(RECV_INFO, 1 << 26) {
                return false;
            }
            self.put(RECV_WDATA, *word);
        }
        true
    }

    /// Takes the next message from the MNOC mailbox; nothing if none came within 50 ms.
    fn receive_mnoc(&mut self) -> Option<Vec<u32>> {
        if !self.wait_bits(SEND_INFO, 1 << 24) {
            return None;
        }
        let size = self.get(SEND_INFO) & 0xf_ffff;
        Some((0..size.div_ceil(4)).map(|_| self.get(SEND_RDATA)).collect())
    }

    /// One exchange on channel 2 or by MNOC, in the notation of section 6.4.
    fn prc(&mut self, command: u32, value: Option<u32>) -> String {
        let request: Vec<u32> = [0xc000_0000, 0x1310_de7e, command].into_iter().chain(value).collect();
        let reply = if self.by_mnoc() {
            if self.send_mnoc(&request) { self.receive_mnoc() } else { None }
        } else {
            self.send(2, &request);
            self.receive(2)
        };
        Words(&request, reply.as_deref()).to_string()
    }

    fn read_knob(&mut self, knob: u32) -> String {
        self.prc(knob << 16 | 0x020c, None)
    }

    fn write_knob(&mut self, knob: u32, value: u32) -> String {
        self.prc(knob << 16 | 0x020d, Some(value))
    }

    /// Carries out exchanges given in the notation of section 6.4, and checks each of them.
    fn follow(&mut self, exchanges: &str) {
        for expected in exchanges.split(", ") {
            let words = expected.split("->").next().unwrap();
            let mut words = words.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap());
            let command = words.next().unwrap();
            assert_eq!(self.prc(command, words.next()), expected, "in {exchanges}");
        }
    }
}

/// A model with a clock that only `wait` moves.
pub(super) struct Bench {
    pub(super) model: Model,
    pub(super) now: Duration,
}

impl Bench {
    /// Powered, memory decode on, still booting.
    pub(super) fn new(spec: DeviceSpec) -> Bench {
        let now = Duration::from_secs(1000);
        let mut bench = Bench { model: Model::new(spec, now), now };
        bench.enable_memory();
        bench
    }

    /// Booted, all defaults.
    pub(super) fn of(kind: ModelKind) -> Bench {
        Bench::ready(DeviceSpec::new("dev0", kind))
    }

    /// Booted.
    pub(super) fn ready(spec: DeviceSpec) -> Bench {
        let mut bench = Bench::new(spec);
        bench.wait(400);
        bench
    }

    pub(super) fn gpu() -> Bench {
        Bench::ready(DeviceSpec::new("gpu0", ModelKind::H100))
    }

    pub(super) fn switch() -> Bench {
        Bench::ready(DeviceSpec::new("nvsw0", ModelKind::Ls10))
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        self.model.set_fault(self.now, fault);
    }

    pub(super) fn status(&mut self) -> crate::DeviceStatus {
        self.model.status(self.now)
    }

    /// The host did nothing that no document allows for.
    pub(super) fn assert_clean(&mut self) {
        let status = self.status();
        assert_eq!((status.stray, status.host_errors), (vec![], vec![]));
    }
}

impl Bus for Bench {
    fn by_mnoc(&self) -> bool {
        self.model.spec().model.chip().transport() == Some(Transport::Mnoc)
    }

    fn read(&mut self, space: Space, offset: u64, data: &mut [u8]) {
        self.model.read(self.now, space, offset, data);
    }

    fn write(&mut self, space: Space, offset: u64, data: &[u8]) {
        self.model.write(self.now, space, offset, data);
    }

    fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }
}
