//! The MNOC mailbox: how a Blackwell GPU's FSP is spoken to (gpu-cc-protocol section 4.9). Its registers are named from
//! the FSP's side: it receives requests and sends replies.
//!
//! As with the EMEM queues (`emem`), nothing in a reply says which request it answers. Therefore whatever waits is read
//! out and dropped before a request is sent, and after a request without a proper answer the late one gets its time first.

use std::time::Duration;

use crate::access::{Bar0, read_sane};
use crate::clock::{Clock, Wait, millis};
use crate::error::Fault;
use crate::mailbox::{Link, State, judge};

/// Requests: size and flags of the message.
const RECEIVE_INFO: u32 = 0x8f_1f84;
/// Requests: the next dword of the message.
const RECEIVE_DATA: u32 = 0x8f_1f88;
/// Replies: size and flags of the message.
const SEND_INFO: u32 = 0x8f_1f04;
/// Replies: each read takes the next dword.
const SEND_DATA: u32 = 0x8f_1f08;

/// The message's size in bytes.
const SIZE: u32 = 0xf_ffff;
/// Written with a size: a message of that size follows.
const TRIGGER: u32 = 1 << 20;
/// Receiving: a message may begin. Sending: one waits.
const READY: u32 = 1 << 24;
/// Something went wrong on this side.
const ERROR: u32 = 1 << 25;
/// Receiving: the next block of dwords may be written.
const CREDIT: u32 = 1 << 26;

/// Dwords to a block.
const BLOCK: usize = 16;
/// The longest message that port 0 takes, in bytes (gpu-cc-protocol section 4.2).
const LARGEST: u32 = 4160;
/// Messages that are read out and dropped before a mailbox that always has another one counts as broken.
const MOST_STALE: usize = 16;

/// Attaching: for a message of a former user to arrive, or its request to be taken.
const ATTACH: Wait = Wait::new(Duration::from_secs(5), Duration::from_millis(1));
/// Sending: for the mailbox to take a message.
const SEND: Wait = Wait::new(Duration::from_secs(5), Duration::from_millis(1));
/// Sending: for a block's credit.
const BLOCK_CREDIT: Wait = Wait::new(Duration::from_secs(1), Duration::from_millis(1));
/// Receiving: for the reply.
const RECEIVE: Wait = Wait::new(Duration::from_secs(5), Duration::from_millis(1));

/// The mailbox. Holds no register access of its own, so that it cannot outlive a mapping.
#[derive(Debug)]
pub(crate) struct Mnoc;

impl Link for Mnoc {
    fn attach(&self, bar0: &dyn Bar0, clock: &dyn Clock, state: State) -> Result<(), Fault> {
        let idle = |info: u32| state == State::Unknown && info & READY != 0;
        if !idle(read_sane(bar0, RECEIVE_INFO)?) {
            let late = ATTACH.poll(clock, || {
                let settled = read_sane(bar0, SEND_INFO)? & READY != 0 || idle(read_sane(bar0, RECEIVE_INFO)?);
                Ok(settled.then_some(()))
            })?;
            tracing::debug!(settled = late.is_some(), "waited for the mailbox's former user");
        }
        Ok(())
    }

    fn send(&self, bar0: &dyn Bar0, clock: &dyn Clock, request: &[u32]) -> Result<(), Fault> {
        drain(bar0)?;
        let mut info = read_sane(bar0, RECEIVE_INFO)?;
        let failed = |what, info| Err(Fault::MnocError { what, info });
        if info & ERROR != 0 {
            return failed("its receiving side has the error bit set", info);
        }
        let mut poll = |wait: Wait, flag: u32| {
            let set = wait.poll(clock, || {
                info = read_sane(bar0, RECEIVE_INFO)?;
                Ok((info & flag != 0).then_some(()))
            })?;
            Ok::<_, Fault>((set.is_some(), info))
        };
        if let (false, info) = poll(SEND, READY)? {
            return failed("it does not take a request", info);
        }
        let size = u32::try_from(request.len() * 4).unwrap_or(u32::MAX);
        debug_assert!(size <= LARGEST, "a request is of one message");
        bar0.write32(RECEIVE_INFO, size & SIZE | TRIGGER)?;
        for block in request.chunks(BLOCK) {
            if let (false, info) = poll(BLOCK_CREDIT, CREDIT)? {
                return failed("it gives no credit for the rest of a request", info);
            }
            for dword in block {
                bar0.write32(RECEIVE_DATA, *dword)?;
            }
        }
        match read_sane(bar0, RECEIVE_INFO)? {
            info if info & ERROR != 0 => failed("it reports an error of the request", info),
            _ => Ok(()),
        }
    }

    fn receive(&self, bar0: &dyn Bar0, clock: &dyn Clock) -> Result<Vec<u32>, Fault> {
        let mut info = 0;
        let arrived = RECEIVE.poll(clock, || {
            info = read_sane(bar0, SEND_INFO)?;
            Ok((info & READY != 0).then_some(()))
        })?;
        match (arrived, info & ERROR != 0) {
            (None, true) => Err(Fault::MnocError { what: "its sending side has the error bit set and no reply", info }),
            (None, false) => {
                let mailbox = format!("mailbox {SEND_INFO:#x} reads {info:08x}");
                Err(Fault::FspNoResponse { mailbox, waited_ms: millis(RECEIVE.timeout) })
            }
            (Some(()), _) => {
                let reply = take(bar0, info)?;
                let after = read_sane(bar0, SEND_INFO)?;
                if after & ERROR != 0 {
                    return Err(Fault::MnocError { what: "it reports an error of the reply", info: after });
                }
                judge(SEND_DATA, reply)
            }
        }
    }
}

/// Reads out and drops every message that waits.
fn drain(bar0: &dyn Bar0) -> Result<(), Fault> {
    for _ in 0..MOST_STALE {
        let info = read_sane(bar0, SEND_INFO)?;
        if info & READY == 0 {
            return Ok(());
        }
        let dropped = take(bar0, info)?;
        tracing::debug!(dwords = dropped.len(), "dropped a message that nobody asked for");
    }
    Err(Fault::MnocError { what: "it never runs out of messages", info: read_sane(bar0, SEND_INFO)? })
}

/// Reads the message that `info` tells of.
fn take(bar0: &dyn Bar0, info: u32) -> Result<Vec<u32>, Fault> {
    let size = info & SIZE;
    if size == 0 || size > LARGEST {
        return Err(Fault::MnocError { what: "it tells of a message of impossible size", info });
    }
    // The data may rightly look like bus errors; the reply's own shape is checked instead.
    (0..size.div_ceil(4)).map(|_| bar0.read32(SEND_DATA)).collect()
}
