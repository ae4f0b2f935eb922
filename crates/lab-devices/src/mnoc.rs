//! The mailbox of Blackwell's firmware processor: MNOC port 0 (gpu-cc-protocol sections 4.9 and 10.4). Names are from
//! the firmware's side: RECEIVE is from host to firmware. This module moves words; what they mean is the model's business.

use std::collections::VecDeque;
use std::time::Duration;

use crate::model::HostError;
use crate::undecided;

/// The port that is used.
pub(crate) const PORT: u8 = 0;

const SIZE: u32 = 0x000f_ffff;
/// In RECV_INFO, written: begin a message.
const TRIGGER: u32 = 1 << 20;
/// In RECV_INFO, read: a message may begin. In SEND_INFO: a message waits.
const READY: u32 = 1 << 24;
const ERROR: u32 = 1 << 25;
/// In RECV_INFO, read: data may be written.
const CREDIT: u32 = 1 << 26;
/// Interrupt enable and status; no interrupt is ever raised here.
const INTERRUPTS: u32 = 0xc000_0000;
/// Credit is looked for again after as many bytes.
const CREDIT_BLOCK: usize = 64;

/// One of the four registers of the port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MnocRegister {
    ReceiveInfo,
    ReceiveData,
    SendInfo,
    SendData,
}

/// The register at a BAR0 offset.
pub(crate) fn decode(offset: u32) -> Option<MnocRegister> {
    match offset {
        0x8f_1f84 => Some(MnocRegister::ReceiveInfo),
        0x8f_1f88 => Some(MnocRegister::ReceiveData),
        0x8f_1f04 => Some(MnocRegister::SendInfo),
        0x8f_1f08 => Some(MnocRegister::SendData),
        _ => None,
    }
}

/// The size in bytes that a write to RECV_INFO announces; none if it begins no message.
pub(crate) fn announced(value: u32) -> Option<u32> {
    (value & TRIGGER != 0).then_some(value & SIZE)
}

/// The size in bytes of the message that a value of SEND_INFO says is waiting.
pub(crate) fn waiting(value: u32) -> Option<u32> {
    (value & READY != 0).then_some(value & SIZE)
}

/// What faults do to the mailbox.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Ills {
    /// The error bit of the receiving side is set.
    pub(crate) receive_error: bool,
    /// Credit is away for so long at the beginning of each block.
    pub(crate) credit_gap: Duration,
}

/// A message on its way in.
struct Incoming {
    /// Dwords announced.
    dwords: usize,
    words: Vec<u32>,
    /// When the block under way began.
    block_at: Duration,
}

/// A message on its way out.
struct Outgoing {
    at: Duration,
    words: VecDeque<u32>,
    size: u32,
}

#[derive(Default)]
pub(crate) struct Mnoc {
    incoming: Option<Incoming>,
    /// Whole requests, and when the last dword of each came. More than one only where a new message may begin before the
    /// request before it was taken.
    requests: VecDeque<(Duration, Vec<u32>)>,
    replies: VecDeque<Outgoing>,
    /// The message that the host can read.
    shown: Option<Outgoing>,
    send_error: bool,
}

impl Mnoc {
    pub(crate) fn reset(&mut self) {
        *self = Mnoc::default();
    }

    /// How many whole requests wait to be taken.
    pub(crate) fn waiting_requests(&self) -> usize {
        self.requests.len()
    }

    fn ready(&self) -> bool {
        self.incoming.is_none() && (undecided::MNOC_READY_WHILE_REQUEST_WAITS || self.requests.is_empty())
    }

    fn credit(&self, now: Duration, ills: Ills) -> bool {
        match &self.incoming {
            Some(incoming) => now >= incoming.block_at.saturating_add(ills.credit_gap),
            None => undecided::MNOC_CREDIT_WHEN_IDLE && self.ready(),
        }
    }

    /// The value of a register, without the side effects of reading it.
    pub(crate) fn peek(&self, now: Duration, register: MnocRegister, ills: Ills) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        match register {
            MnocRegister::ReceiveInfo => {
                bit(self.ready(), READY) | bit(self.credit(now, ills), CREDIT) | bit(ills.receive_error, ERROR)
            }
            MnocRegister::ReceiveData => 0,
            MnocRegister::SendInfo => {
                self.shown.as_ref().map_or(0, |message| READY | message.size & SIZE) | bit(self.send_error, ERROR)
            }
            MnocRegister::SendData => {
                let next = self.shown.as_ref().and_then(|message| message.words.front());
                next.copied().unwrap_or(undecided::MNOC_EMPTY_READ)
            }
        }
    }

    pub(crate) fn read(
        &mut self,
        now: Duration,
        register: MnocRegister,
        ills: Ills,
        errors: &mut Vec<HostError>,
    ) -> u32 {
        let value = self.peek(now, register, ills);
        if register == MnocRegister::SendData {
            match &mut self.shown {
                Some(message) => {
                    message.words.pop_front();
                    if message.words.is_empty() {
                        self.shown = None;
                    }
                }
                None => errors.push(HostError::MnocEmptyRead { port: PORT }),
            }
        }
        value
    }

    /// Writes a register; false if it is not one to write.
    pub(crate) fn write(
        &mut self,
        now: Duration,
        register: MnocRegister,
        value: u32,
        ills: Ills,
        errors: &mut Vec<HostError>,
    ) -> bool {
        match register {
            MnocRegister::ReceiveInfo => {
                if let Some(size) = announced(value) {
                    self.begin(now, size, errors);
                    return true;
                }
                value & !INTERRUPTS == 0
            }
            MnocRegister::ReceiveData => {
                self.data(now, value, ills, errors);
                true
            }
            MnocRegister::SendInfo => value & !INTERRUPTS == 0,
            MnocRegister::SendData => false,
        }
    }

    fn begin(&mut self, now: Duration, size: u32, errors: &mut Vec<HostError>) {
        if !self.ready() {
            errors.push(HostError::MnocNotReady { port: PORT });
            return;
        }
        if size == 0 || size > undecided::MNOC_LARGEST_MESSAGE {
            errors.push(HostError::MnocBadSize { port: PORT, size });
            return;
        }
        if self.shown.is_some() {
            errors.push(HostError::ResponseNotConsumed { channel: PORT });
        }
        let dwords = usize::try_from(size.div_ceil(4)).unwrap_or(usize::MAX);
        self.incoming = Some(Incoming { dwords, words: Vec::new(), block_at: now });
    }

    fn data(&mut self, now: Duration, value: u32, ills: Ills, errors: &mut Vec<HostError>) {
        let credit = self.credit(now, ills);
        let Some(incoming) = &mut self.incoming else {
            errors.push(HostError::MnocUnexpectedData { port: PORT });
            return;
        };
        if !credit {
            errors.push(HostError::MnocNoCredit { port: PORT });
            return;
        }
        incoming.words.push(value);
        if incoming.words.len() >= incoming.dwords {
            let words = std::mem::take(&mut incoming.words);
            self.incoming = None;
            self.requests.push_back((now, words));
        } else if (incoming.words.len() * 4).is_multiple_of(CREDIT_BLOCK) {
            incoming.block_at = now;
        }
    }

    /// Takes the request that has been waiting for `latency` since it was whole and since `ready_at`. Returns the time of
    /// taking it, and its words.
    pub(crate) fn take_request(
        &mut self,
        now: Duration,
        ready_at: Duration,
        latency: Duration,
    ) -> Option<(Duration, Vec<u32>)> {
        let due = |whole_at: Duration| whole_at.max(ready_at).saturating_add(latency);
        let (whole_at, words) = self.requests.pop_front_if(|(whole_at, _)| due(*whole_at) <= now)?;
        Some((due(whole_at), words))
    }

    /// Leaves a reply to be shown at `at`, or when the host has read those before it.
    pub(crate) fn reply(&mut self, at: Duration, words: Vec<u32>) {
        let size = u32::try_from(words.len().saturating_mul(4)).unwrap_or(SIZE);
        if !words.is_empty() {
            self.replies.push_back(Outgoing { at, words: words.into(), size });
        }
    }

    /// The reply that was due got lost, and the host is told so.
    pub(crate) fn fail(&mut self) {
        self.send_error = true;
    }

    /// Shows the next reply that is due, once the host has read the one before it.
    pub(crate) fn deliver(&mut self, now: Duration) {
        if self.shown.is_none()
            && let Some(message) = self.replies.pop_front_if(|message| message.at <= now)
        {
            self.shown = Some(message);
            if undecided::MNOC_SEND_ERROR_CLEARS_WITH_NEXT_REPLY {
                self.send_error = false;
            }
        }
    }
}
