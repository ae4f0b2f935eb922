//! The mailbox of the firmware processor: EMEM data windows and the command and message queues
//! (gpu-cc-protocol sections 4.8 and 10.3). This module moves words; what they mean is the model's business.

use std::collections::VecDeque;
use std::time::Duration;

use crate::model::HostError;
use crate::undecided;

/// Bytes of each channel's window.
pub(crate) const WINDOW: u32 = 0x400;
/// Dwords of EMEM: 32 blocks of 256 bytes, as the falcon register 0x8f0abc says.
const WORDS: usize = 0x20 * 0x100 / 4;

const ADDRESS: u32 = 0xfffc;
const INCREMENT_ON_WRITE: u32 = 1 << 24;
const INCREMENT_ON_READ: u32 = 1 << 25;

/// One of the six registers of a channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum EmemRegister {
    Control,
    Data,
    QueueHead,
    QueueTail,
    MessageHead,
    MessageTail,
}

/// The channel and register at a BAR0 offset, for channels 0 to 7.
pub(crate) fn decode(offset: u32) -> Option<(u8, EmemRegister)> {
    let bank = |base: u32| {
        let within = offset.checked_sub(base)?;
        let channel = u8::try_from(within / 8).ok().filter(|channel| *channel < 8)?;
        within.is_multiple_of(4).then_some((channel, within % 8 != 0))
    };
    let (channel, second, [even, odd]) = None
        .or_else(|| bank(0x8f_2ac0).map(|(c, second)| (c, second, [EmemRegister::Control, EmemRegister::Data])))
        .or_else(|| bank(0x8f_2c00).map(|(c, second)| (c, second, [EmemRegister::QueueHead, EmemRegister::QueueTail])))
        .or_else(|| {
            bank(0x8f_2c80).map(|(c, second)| (c, second, [EmemRegister::MessageHead, EmemRegister::MessageTail]))
        })?;
    Some((channel, if second { odd } else { even }))
}

/// A request that FSP has been rung for.
#[derive(Clone, Debug)]
struct Request {
    rung_at: Duration,
    /// Empty if the pointers made no sense: such a request is never taken.
    words: Vec<u32>,
}

/// A reply that is yet to be placed.
#[derive(Clone, Debug)]
struct Reply {
    at: Duration,
    words: Vec<u32>,
    /// Whether it waits until the message before it has been acknowledged, rather than overwriting it.
    patient: bool,
}

struct Channel {
    number: u8,
    control: u32,
    queue_head: u32,
    queue_tail: u32,
    message_head: u32,
    message_tail: u32,
    pending: Option<Request>,
    replies: VecDeque<Reply>,
    /// The head of a message whose tail is already visible, and shows at the next read but one.
    late_head: Option<u32>,
}

impl Channel {
    fn new(number: u8) -> Channel {
        Channel {
            number,
            control: 0,
            queue_head: 0,
            queue_tail: 0,
            message_head: 0,
            message_tail: 0,
            pending: None,
            replies: VecDeque::new(),
            late_head: None,
        }
    }

    fn base(&self) -> u32 {
        u32::from(self.number) * WINDOW
    }
}

pub(crate) struct Emem {
    words: Vec<u32>,
    channels: Vec<Channel>,
}

impl Emem {
    pub(crate) fn new(channels: &[u8]) -> Emem {
        Emem { words: vec![0; WORDS], channels: channels.iter().map(|&number| Channel::new(number)).collect() }
    }

    /// Pointers, control words and everything in flight go; so does what was in the windows.
    pub(crate) fn reset(&mut self) {
        self.words.fill(0);
        for channel in &mut self.channels {
            *channel = Channel::new(channel.number);
        }
    }

    /// Whether a request waits to be taken.
    pub(crate) fn is_rung(&self, number: u8) -> bool {
        self.channels.iter().any(|channel| channel.number == number && channel.pending.is_some())
    }

    /// The value of a register, without the side effects of reading it.
    pub(crate) fn peek(&self, number: u8, register: EmemRegister) -> u32 {
        let Some(channel) = self.channels.iter().find(|channel| channel.number == number) else {
            return undecided::PRI_ERROR;
        };
        match register {
            EmemRegister::Control => channel.control,
            EmemRegister::Data => word_at(&self.words, channel.control).unwrap_or(undecided::PRI_ERROR),
            EmemRegister::QueueHead => channel.queue_head,
            EmemRegister::QueueTail => channel.queue_tail,
            EmemRegister::MessageHead => channel.message_head,
            EmemRegister::MessageTail => channel.message_tail,
        }
    }

    pub(crate) fn read(&mut self, number: u8, register: EmemRegister, errors: &mut Vec<HostError>) -> u32 {
        let value = self.peek(number, register);
        let Some(channel) = self.channels.iter_mut().find(|channel| channel.number == number) else { return value };
        match register {
            EmemRegister::Data => {
                check_window(channel, errors);
                if channel.control & INCREMENT_ON_READ != 0 {
                    channel.control = advanced(channel.control);
                }
            }
            EmemRegister::MessageHead | EmemRegister::MessageTail => {
                if let Some(head) = channel.late_head.take() {
                    channel.message_head = head;
                }
            }
            _ => {}
        }
        value
    }

    pub(crate) fn write(
        &mut self,
        now: Duration,
        number: u8,
        register: EmemRegister,
        value: u32,
        errors: &mut Vec<HostError>,
    ) {
        let Some(channel) = self.channels.iter_mut().find(|channel| channel.number == number) else { return };
        match register {
            EmemRegister::Control => {
                channel.control = value & (ADDRESS | INCREMENT_ON_WRITE | INCREMENT_ON_READ);
            }
            EmemRegister::Data => {
                check_window(channel, errors);
                if let Some(word) = self.words.get_mut(index(channel.control)) {
                    *word = value;
                }
                if channel.control & INCREMENT_ON_WRITE != 0 {
                    channel.control = advanced(channel.control);
                }
            }
            EmemRegister::QueueTail => channel.queue_tail = value,
            EmemRegister::QueueHead => {
                channel.queue_head = value;
                if channel.queue_head == channel.queue_tail {
                    // No doorbell. A host that empties the queue by force leaves nothing to take.
                    channel.pending = None;
                } else {
                    ring(channel, &self.words, now, errors);
                }
            }
            EmemRegister::MessageHead => {
                channel.message_head = value;
                channel.late_head = None;
            }
            EmemRegister::MessageTail => channel.message_tail = value,
        }
    }

    /// Takes the next request that has been waiting for `latency` since it was rung and since `ready_at`. The command
    /// queue is empty afterwards. Returns the channel, the time of taking it, and its words.
    pub(crate) fn take_request(
        &mut self,
        now: Duration,
        ready_at: Duration,
        latency: Duration,
    ) -> Option<(u8, Duration, Vec<u32>)> {
        let due = |request: &Request| request.rung_at.max(ready_at).saturating_add(latency);
        let channel = self
            .channels
            .iter_mut()
            .find(|channel| channel.pending.as_ref().is_some_and(|r| !r.words.is_empty() && due(r) <= now))?;
        let request = channel.pending.take()?;
        channel.queue_head = channel.queue_tail;
        Some((channel.number, due(&request), request.words))
    }

    /// Leaves a reply to be placed at `at`; a patient one not before the message before it has been acknowledged.
    pub(crate) fn reply(&mut self, number: u8, at: Duration, words: Vec<u32>, patient: bool) {
        if let Some(channel) = self.channels.iter_mut().find(|channel| channel.number == number) {
            channel.replies.push_back(Reply { at, words, patient });
        }
    }

    /// Places every reply that is due: words at the channel base, tail before head.
    pub(crate) fn deliver(&mut self, now: Duration, split_pointers: bool) {
        for channel in &mut self.channels {
            loop {
                let free = channel.message_head == channel.message_tail && channel.late_head.is_none();
                let due = |reply: &mut Reply| reply.at <= now && (free || !reply.patient);
                let Some(Reply { words, .. }) = channel.replies.pop_front_if(due) else { break };
                let base = channel.base();
                for (address, word) in (base..base + WINDOW).step_by(4).zip(&words) {
                    if let Some(slot) = self.words.get_mut(index(address)) {
                        *slot = *word;
                    }
                }
                let length = u32::try_from(words.len()).unwrap_or(0).clamp(1, WINDOW / 4);
                channel.message_tail = base + 4 * (length - 1);
                if split_pointers {
                    channel.late_head = Some(base);
                } else {
                    channel.message_head = base;
                }
            }
        }
    }
}

/// A write to the queue head that leaves the queue not empty: the doorbell.
fn ring(channel: &mut Channel, words: &[u32], now: Duration, errors: &mut Vec<HostError>) {
    let number = channel.number;
    if channel.pending.is_some() {
        errors.push(HostError::RequestBeforeConsumption { channel: number });
        return;
    }
    if channel.message_head != channel.message_tail {
        errors.push(HostError::ResponseNotConsumed { channel: number });
    }
    let (head, tail) = (channel.queue_head, channel.queue_tail);
    let window = channel.base()..channel.base() + WINDOW;
    let sound = window.contains(&head)
        && window.contains(&tail)
        && head < tail
        && head.is_multiple_of(4)
        && tail.is_multiple_of(4);
    let taken = if sound {
        (head..=tail).step_by(4).filter_map(|address| word_at(words, address)).collect()
    } else {
        errors.push(HostError::BadQueuePointers { channel: number, head, tail });
        Vec::new()
    };
    channel.pending = Some(Request { rung_at: now, words: taken });
}

fn check_window(channel: &Channel, errors: &mut Vec<HostError>) {
    let address = channel.control & ADDRESS;
    if !(channel.base()..channel.base() + WINDOW).contains(&address) {
        errors.push(HostError::OutsideWindow { channel: channel.number, address });
    }
}

fn advanced(control: u32) -> u32 {
    (control & !ADDRESS) | (control.wrapping_add(4) & ADDRESS)
}

fn index(control: u32) -> usize {
    usize::try_from((control & ADDRESS) / 4).unwrap_or(usize::MAX)
}

fn word_at(words: &[u32], control: u32) -> Option<u32> {
    words.get(index(control)).copied()
}
