//! The EMEM queues: how a Hopper GPU's FSP is spoken to (gpu-cc-protocol section 4.8).
//!
//! Replies carry neither tag nor knob number, so a reply that came late cannot be told from the right one. Therefore
//! everything that waits in the queue is dropped before a request is sent; after a request without a proper answer
//! nothing is sent until the late answer had its time; every write is read back (`device`); and a mode counts as
//! verified only by what is read after a reset, which empties the queues, or what was read in full without any of this
//! having happened.

use std::time::Duration;

use crate::access::{Bar0, read_sane};
use crate::clock::{Clock, Wait, millis};
use crate::error::Fault;
use crate::mailbox::{Link, State, judge};

/// Bytes of a channel's window.
const WINDOW: u32 = 0x400;
/// EMEMC: the address counts up with every write (bit 24) and read (bit 25) of the data register.
const AUTO_INCREMENT: u32 = 0b11 << 24;

/// Attaching: for a message of a former user to arrive.
const ATTACH: Wait = Wait::new(Duration::from_secs(5), Duration::from_millis(10));
/// Sending: for the command queue to be empty.
const SEND: Wait = Wait::new(Duration::from_secs(1), Duration::from_millis(1));
/// Receiving: for the reply.
const RECEIVE: Wait = Wait::new(Duration::from_secs(5), Duration::from_millis(10));

/// Registers of one channel.
#[derive(Clone, Copy, Debug)]
struct Registers {
    base: u32,
    control: u32,
    data: u32,
    queue_head: u32,
    queue_tail: u32,
    message_head: u32,
    message_tail: u32,
}

impl Registers {
    const fn of(channel: u32) -> Self {
        let step = 8 * channel;
        Self {
            base: channel * WINDOW,
            control: 0x8f_2ac0 + step,
            data: 0x8f_2ac4 + step,
            queue_head: 0x8f_2c00 + step,
            queue_tail: 0x8f_2c04 + step,
            message_head: 0x8f_2c80 + step,
            message_tail: 0x8f_2c84 + step,
        }
    }
}

/// One channel. Holds no register access of its own, so that it cannot outlive a mapping.
#[derive(Debug)]
pub(crate) struct Emem {
    registers: Registers,
}

/// Head and tail of a queue; it is empty when they are equal.
type Pointers = (u32, u32);

impl Emem {
    pub(crate) const fn new(channel: u32) -> Self {
        Self { registers: Registers::of(channel) }
    }

    fn commands(&self, bar0: &dyn Bar0) -> Result<Pointers, Fault> {
        Ok((read_sane(bar0, self.registers.queue_head)?, read_sane(bar0, self.registers.queue_tail)?))
    }

    fn messages(&self, bar0: &dyn Bar0) -> Result<Pointers, Fault> {
        Ok((read_sane(bar0, self.registers.message_head)?, read_sane(bar0, self.registers.message_tail)?))
    }
}

impl Link for Emem {
    /// Leaves both queues empty. When they are not at the start, or an answer may still be on its way, that answer gets
    /// its time first, so that it does not come after the next request.
    fn attach(&self, bar0: &dyn Bar0, clock: &dyn Clock, state: State) -> Result<(), Fault> {
        let empty = |(head, tail)| head == tail;
        if state == State::Unknown && empty(self.commands(bar0)?) && empty(self.messages(bar0)?) {
            return Ok(());
        }
        let late = ATTACH.poll(clock, || Ok(Some(self.messages(bar0)?).filter(|pointers| !empty(*pointers))))?;
        tracing::debug!(message = late.is_some(), "emptied the firmware's queues");
        let Registers { base, queue_head, queue_tail, message_head, message_tail, .. } = self.registers;
        for register in [queue_tail, queue_head, message_tail, message_head] {
            bar0.write32(register, base)?;
        }
        Ok(())
    }

    fn send(&self, bar0: &dyn Bar0, clock: &dyn Clock, request: &[u32]) -> Result<(), Fault> {
        let mut queue = (0, 0);
        let ready = SEND.poll(clock, || {
            let (head, tail) = self.messages(bar0)?;
            if head != tail {
                tracing::debug!(head, tail, "dropped a message that nobody asked for");
                bar0.write32(self.registers.message_tail, head)?;
            }
            queue = self.commands(bar0)?;
            Ok((head == tail && queue.0 == queue.1).then_some(()))
        })?;
        if ready.is_none() {
            return Err(Fault::FspBusy { head: queue.0, tail: queue.1 });
        }
        let Registers { base, control, data, queue_head, queue_tail, .. } = self.registers;
        debug_assert!(request.len() * 4 <= WINDOW as usize, "a request is of one packet");
        bar0.write32(control, base | AUTO_INCREMENT)?;
        let mut last = base;
        for (offset, dword) in (0..WINDOW).step_by(4).zip(request) {
            bar0.write32(data, *dword)?;
            last = base + offset;
        }
        // The tail is the last dword's place, and goes first: writing the head rings the bell.
        bar0.write32(queue_tail, last)?;
        bar0.write32(queue_head, base)
    }

    fn receive(&self, bar0: &dyn Bar0, clock: &dyn Clock) -> Result<Vec<u32>, Fault> {
        let Registers { base, control, data, message_tail, .. } = self.registers;
        let mut seen = (0, 0);
        // The two pointers are not written at once: a pair counts when it makes sense and is still the same on a second look.
        let size = RECEIVE.poll(clock, || {
            seen = self.messages(bar0)?;
            let plausible = reply_size(base, seen);
            Ok(if plausible.is_some() && self.messages(bar0)? == seen { plausible } else { None })
        })?;
        let Some(size) = size else {
            let mailbox = format!("message queue head {:#x}, tail {:#x}", seen.0, seen.1);
            return Err(Fault::FspNoResponse { mailbox, waited_ms: millis(RECEIVE.timeout) });
        };
        bar0.write32(control, base | AUTO_INCREMENT)?;
        // The data window may rightly hold words that look like bus errors; the reply's own shape is checked instead.
        let reply = (0..size / 4).map(|_| bar0.read32(data)).collect::<Result<Vec<u32>, Fault>>()?;
        bar0.write32(message_tail, base)?;
        judge(data, reply)
    }
}

/// Bytes of the message between the pointers, if they can be those of a message: it starts at the channel's base, ends
/// in the window, and is of whole dwords.
fn reply_size(base: u32, (head, tail): Pointers) -> Option<u32> {
    let plausible = head == base && tail > head && tail < base + WINDOW && (tail - head).is_multiple_of(4);
    plausible.then(|| tail - head + 4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chip::Mailbox;
    use crate::fake::{FakeClock, FakeGpu, Noise, Quirk};
    use crate::knob::Knob;
    use crate::mailbox::Fsp;
    use crate::message::Request;

    fn fsp() -> Fsp {
        Fsp::new(Mailbox::Emem(2))
    }

    fn read_ccm(gpu: &FakeGpu, emem: &mut Fsp) -> Result<Option<u16>, Fault> {
        let request = Request::Read(Knob::CCM);
        let reply = emem.exchange(&*gpu.bar0(), &gpu.clock, &request.dwords())?;
        request.reply(&reply)
    }

    #[test]
    fn the_register_trace_is_that_of_example_1() {
        let gpu = FakeGpu::new();
        assert_eq!(read_ccm(&gpu, &mut fsp()), Ok(Some(0)));
        assert_eq!(
            gpu.writes(),
            [
                (0x8f_2ad0, 0x0300_0800),
                (0x8f_2ad4, 0xc000_0000),
                (0x8f_2ad4, 0x1310_de7e),
                (0x8f_2ad4, 0x0008_020c),
                (0x8f_2c14, 0x808),
                (0x8f_2c10, 0x800),
                (0x8f_2ad0, 0x0300_0800),
                (0x8f_2c94, 0x800),
            ]
        );
    }

    #[test]
    fn faults_of_the_firmware_have_their_own_errors() {
        let head = 0x8f_2c10;
        let table = [
            (Quirk::DropReplies, "FspNoResponse"),
            (Quirk::IgnoresRequests, "FspNoResponse"),
            (Quirk::Stuck { register: head + 4, value: 0x80c }, "FspBusy"),
            (Quirk::Stuck { register: head, value: u32::MAX }, "Bar0Dead"),
            (Quirk::Stuck { register: head, value: 0xbadf_0001 }, "PriError"),
            (Quirk::Stuck { register: 0x8f_2c90, value: u32::MAX }, "Bar0Dead"),
            (Quirk::Stuck { register: 0x8f_2c94, value: 0xbadf_0001 }, "PriError"),
            (Quirk::Stuck { register: 0x8f_2ad4, value: u32::MAX }, "Bar0Dead"),
            (Quirk::Stuck { register: 0x8f_2ad4, value: 0xbadf_5040 }, "PriError"),
            (Quirk::Stuck { register: 0x8f_2ad4, value: 0 }, "FspProtocol"),
            (Quirk::Reply(vec![]), "FspNoResponse"),
            (Quirk::Reply(vec![0xc000_0000, 0x1510_de7e, 3]), "FspProtocol"),
            (Quirk::Reply(vec![0xc000_0000, 0x1410_de7e, 3, 0x13, 0, 1]), "FspProtocol"),
            (Quirk::Reply(vec![0xc000_0000, 0x1510_de7e, 3, 0x13, 0]), "FspProtocol"),
            (Quirk::Reply(vec![0xc000_0000, 0x1510_de7e, 3, 0x13, 0x202]), "FspError"),
            (Quirk::Latency(Duration::from_secs(6)), "FspNoResponse"),
            (Quirk::ReplyAt { head: 0x800, tail: 0xc00 }, "FspNoResponse"),
            (Quirk::ReplyAt { head: 0x800, tail: 0x813 }, "FspNoResponse"),
            (Quirk::ReplyAt { head: 0x814, tail: 0x800 }, "FspNoResponse"),
            (Quirk::ReplyAt { head: 0, tail: 0x814 }, "FspNoResponse"),
        ];
        for (quirk, code) in table {
            let gpu = FakeGpu::new();
            gpu.quirk(quirk.clone());
            let found = read_ccm(&gpu, &mut fsp()).unwrap_err();
            assert_eq!(found.code(), code, "{quirk:?}: {found}");
            let limit = ATTACH.timeout + SEND.timeout + RECEIVE.timeout + Duration::from_millis(30);
            assert!(gpu.clock.now() <= limit, "{quirk:?} took {:?}", gpu.clock.now());
        }
    }

    #[test]
    fn a_stale_message_is_not_taken_for_the_reply() {
        let gpu = FakeGpu::new();
        gpu.set_knob(Knob::CCM, 1);
        gpu.leave_message(&[0xc000_0000, 0x1510_de7e, 3, 0x13, 0, 0]);
        assert_eq!(read_ccm(&gpu, &mut fsp()), Ok(Some(1)));

        // The same in the middle of a conversation.
        let mut emem = fsp();
        assert_eq!(read_ccm(&gpu, &mut emem), Ok(Some(1)));
        gpu.leave_message(&[0xc000_0000, 0x1510_de7e, 3, 0x13, 0, 0]);
        assert_eq!(read_ccm(&gpu, &mut emem), Ok(Some(1)));
    }

    #[test]
    fn a_late_reply_is_not_taken_for_the_next_one() {
        let gpu = FakeGpu::new();
        let mut emem = fsp();
        gpu.set_knob(Knob::CCM, 0);
        gpu.quirk(Quirk::Latency(Duration::from_secs(8)));
        assert_eq!(read_ccm(&gpu, &mut emem).unwrap_err().code(), "FspNoResponse");
        gpu.clear_quirks();
        // The old reply (0) arrives three seconds from now; the next question's answer is 1.
        gpu.set_knob(Knob::CCM, 1);
        assert_eq!(read_ccm(&gpu, &mut emem), Ok(Some(1)));
    }

    #[test]
    fn a_slow_reply_is_waited_for() {
        let gpu = FakeGpu::new();
        gpu.quirk(Quirk::Latency(Duration::from_millis(4_900)));
        assert_eq!(read_ccm(&gpu, &mut fsp()), Ok(Some(0)));
    }

    #[test]
    fn a_request_that_nobody_took_is_cleared_at_attach() {
        let gpu = FakeGpu::new();
        gpu.preset(&[(0x8f_2c10, 2048), (0x8f_2c14, 2060)]);
        assert_eq!(read_ccm(&gpu, &mut fsp()), Ok(Some(0)));
        assert_eq!(gpu.writes()[..4], [(0x8f_2c14, 0x800), (0x8f_2c10, 0x800), (0x8f_2c94, 0x800), (0x8f_2c90, 0x800)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Registers that answer anything at all: the exchange ends, within its budget, and believes no reply of a
        /// wrong shape.
        #[test]
        fn any_register_contents_end_in_an_answer_or_an_error(words in prop::collection::vec(adversarial(), 1..40)) {
            let clock = FakeClock::default();
            let noise = Noise::new(words);
            let mut emem = fsp();
            let request = Request::Read(Knob::CCM);
            for _ in 0..3 {
                let before = clock.now();
                if let Ok(reply) = emem.exchange(&noise, &clock, &request.dwords()) {
                    prop_assert!(reply.len() >= 2 && reply.len() <= 256);
                    if let Ok(value) = request.reply(&reply) {
                        prop_assert!(value.is_some() && reply.len() == 6);
                    }
                }
                let limit = ATTACH.timeout + SEND.timeout + RECEIVE.timeout + Duration::from_millis(30);
                prop_assert!(clock.now() <= before + limit);
            }
        }
    }

    /// Words that a hostile device would choose.
    fn adversarial() -> impl Strategy<Value = u32> {
        prop_oneof![
            any::<u32>(),
            Just(u32::MAX),
            Just(0),
            Just(0x800),
            (0x7f0_u32..0xc10),
            Just(0xbadf_0000),
            Just(0xc000_0000),
            Just(0x1510_de7e),
            Just(0x13),
        ]
    }
}
