//! The record of everything that reached the virtual devices.
//!
//! # File format
//!
//! JSON lines, one [`TraceEvent`] each, in the order in which the server saw them:
//!
//! ```json
//! {"micros":1204113,"device":"gpu0","kind":"write","space":"bar0","offset":"0x8f2c10","width":4,"value":"0x800"}
//! {"micros":1205020,"device":"gpu0","kind":"rpc","space":"device","offset":"0x2","width":0,"value":"0x0","note":"0008020C->0"}
//! ```
//!
//! * `micros`: microseconds since the fleet was started, from a clock that never runs backwards. A device is brought
//!   up to date when it is next touched, so `ready` and `rpc` lines carry the earlier time at which they became due.
//! * `kind`: `read`, `write`, `flr`, `bus-reset`, `power-on`, `ready` (the value is the latched status word) or `rpc`
//!   (the offset is the EMEM channel or MNOC port, the value the error code of the reply, the note the words).
//! * `space`: `bar0`, `bar2`, `bar4`, `config`, or `device` for what concerns the device as a whole.
//! * `width`: bytes of the access; `value`: its first eight bytes, little-endian, as the device answered or was told.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::emem::{self, EmemRegister};
use crate::mnoc::{self, MnocRegister};

/// Events kept in memory. Those after it are counted as overflow; the file, if any, has them all.
pub const MEMORY_EVENTS: usize = 2_000_000;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A read by the host.
    Read,
    /// A write by the host.
    Write,
    /// A function-level reset began.
    Flr,
    /// A bus reset began.
    BusReset,
    /// Power was applied, or a new connection began.
    PowerOn,
    /// Boot completed.
    Ready,
    /// FSP took a request.
    Rpc,
}

/// Where it happened.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Space {
    /// The register BAR.
    Bar0,
    /// A GPU's framebuffer BAR.
    Bar2,
    /// A GPU's third BAR.
    Bar4,
    /// PCI configuration space.
    Config,
    /// Not an access: the device as a whole.
    Device,
}

/// One line of the trace.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TraceEvent {
    /// Microseconds since the fleet was started.
    pub micros: u64,
    /// Name of the device.
    #[serde(with = "name")]
    pub device: Arc<str>,
    /// What happened.
    pub kind: Kind,
    /// Where.
    pub space: Space,
    /// Byte offset of an access; channel of an RPC.
    #[serde(with = "hex")]
    pub offset: u64,
    /// Bytes of an access.
    pub width: u32,
    /// First eight bytes of an access; status word on `Ready`; error code on `Rpc`.
    #[serde(with = "hex")]
    pub value: u64,
    /// More, for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<Box<str>>,
}

mod name {
    use super::{Arc, Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Arc<str>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<str>, D::Error> {
        String::deserialize(from).map(Arc::from)
    }
}

mod hex {
    use serde::de::Error;

    use super::{Deserialize, Deserializer, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde fixes the signature")]
    pub(super) fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:#x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        text.strip_prefix("0x")
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| D::Error::custom(format!("{text:?} is not a hexadecimal number with 0x")))
    }
}

struct Inner {
    events: Vec<TraceEvent>,
    overflowed: bool,
    file: Option<BufWriter<File>>,
}

/// Collects events of all devices of a fleet.
pub(crate) struct Trace {
    start: Instant,
    limit: usize,
    inner: Mutex<Inner>,
}

impl Trace {
    pub(crate) fn new(file: Option<&Path>, limit: usize) -> io::Result<Trace> {
        let file = file.map(File::create).transpose()?.map(BufWriter::new);
        let inner = Inner { events: Vec::new(), overflowed: false, file };
        Ok(Trace { start: Instant::now(), limit, inner: Mutex::new(inner) })
    }

    /// Model time: since the trace was begun.
    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn record(&self, event: TraceEvent) {
        let mut inner = self.lock();
        if let Some(file) = &mut inner.file {
            let flush = !matches!(event.kind, Kind::Read | Kind::Write);
            let written = serde_json::to_writer(&mut *file, &event)
                .map_err(io::Error::from)
                .and_then(|()| file.write_all(b"\n"))
                .and_then(|()| if flush { file.flush() } else { Ok(()) });
            if let Err(error) = written {
                tracing::error!(%error, "Trace file cannot be written, and gets no more events");
                inner.file = None;
            }
        }
        if inner.events.len() < self.limit {
            inner.events.push(event);
        } else {
            inner.overflowed = true;
        }
    }

    pub(crate) fn with<R>(&self, look: impl FnOnce(&[TraceEvent]) -> R) -> R {
        look(&self.lock().events)
    }

    pub(crate) fn overflowed(&self) -> bool {
        self.lock().overflowed
    }

    pub(crate) fn clear(&self) {
        let mut inner = self.lock();
        inner.events.clear();
        inner.overflowed = false;
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        self.lock().file.as_mut().map_or(Ok(()), BufWriter::flush)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Microseconds of a time since the start.
pub(crate) fn micros(at: Duration) -> u64 {
    u64::try_from(at.as_micros()).unwrap_or(u64::MAX)
}

/// One exchange with FSP, put together from the accesses of the host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rpc {
    /// When the doorbell was rung: microseconds since the fleet was started.
    pub micros: u64,
    /// The EMEM channel, or the MNOC port.
    pub channel: u8,
    /// The dwords that the host wrote, MCTP and NVDM headers first.
    pub request: Vec<u32>,
    /// The dwords that the host read; empty if it read none.
    pub reply: Vec<u32>,
}

/// The form of gpu-cc-protocol section 6.4: dword 2, a written value, and for a read the value of the reply.
///
/// `0008020C->0`, `000A020D 2`; an error is `0008020C->!1e3`, a reply that was not read `0008020C->?`.
impl fmt::Display for Rpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        display(f, &self.request, Some(&self.reply).filter(|reply| !reply.is_empty()).map(Vec::as_slice))
    }
}

/// The text form of an exchange.
pub(crate) struct Words<'a>(pub(crate) &'a [u32], pub(crate) Option<&'a [u32]>);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        display(f, self.0, self.1)
    }
}

fn display(f: &mut fmt::Formatter<'_>, request: &[u32], reply: Option<&[u32]>) -> fmt::Result {
    match request {
        [_, _, command] => write!(f, "{command:08X}")?,
        [_, _, command, value] => write!(f, "{command:08X} {value:X}")?,
        _ => write!(f, "{request:08X?}")?,
    }
    match reply {
        None => f.write_str("->?"),
        Some([_, _, _, _, 0]) => Ok(()),
        Some([_, _, _, _, 0, value]) => write!(f, "->{:X}", value & 0xffff),
        Some([_, _, _, _, code]) => write!(f, "->!{code:x}"),
        Some(words) => write!(f, "->{words:08X?}"),
    }
}

/// Puts together the exchanges of one device from its accesses to the mailbox, in the order of their doorbells.
///
/// On EMEM an exchange begins with a write to the head of a command queue after data was written, and ends with the write
/// to the tail of the message queue, or with the next doorbell. On MNOC it begins with the announcement of a message and
/// ends with the next one. Only 32-bit accesses are looked at.
pub fn rpcs(events: &[TraceEvent], device: &str) -> Vec<Rpc> {
    let mut emem = EmemReader::default();
    let mut mnoc = MnocReader::default();
    let mut found: Vec<Rpc> = Vec::new();
    for event in events.iter().filter(|event| &*event.device == device) {
        if matches!(event.kind, Kind::Flr | Kind::BusReset | Kind::PowerOn) {
            emem = EmemReader::default();
            mnoc = MnocReader::default();
        }
        let (Space::Bar0, 4, Ok(offset)) = (event.space, event.width, u32::try_from(event.offset)) else { continue };
        let value = u32::try_from(event.value).unwrap_or(u32::MAX);
        if let Some((channel, register)) = emem::decode(offset) {
            emem.take(event, channel, register, value, &mut found);
        } else if let Some(register) = mnoc::decode(offset) {
            mnoc.take(event, register, value, &mut found);
        }
    }
    found
}

/// What is under way in the MNOC mailbox.
#[derive(Default)]
struct MnocReader {
    /// Dwords of the request that are still to come.
    announced: usize,
    /// Dwords of the reply that are still to come, once its size was read.
    expected: Option<usize>,
    open: Option<usize>,
}

impl MnocReader {
    fn take(&mut self, event: &TraceEvent, register: MnocRegister, value: u32, found: &mut Vec<Rpc>) {
        let dwords = |size: u32| usize::try_from(size.div_ceil(4)).unwrap_or(0);
        match (event.kind, register) {
            (Kind::Write, MnocRegister::ReceiveInfo) => {
                if let Some(size) = mnoc::announced(value) {
                    *self = MnocReader { announced: dwords(size), expected: None, open: Some(found.len()) };
                    let (micros, channel) = (event.micros, mnoc::PORT);
                    found.push(Rpc { micros, channel, request: Vec::new(), reply: Vec::new() });
                }
            }
            (Kind::Write, MnocRegister::ReceiveData) => {
                if let Some(at) = self.open.filter(|_| self.announced > 0) {
                    self.announced -= 1;
                    found[at].request.push(value);
                    found[at].micros = event.micros;
                }
            }
            (Kind::Read, MnocRegister::SendInfo) => {
                self.expected = self.expected.or(mnoc::waiting(value).map(dwords));
            }
            (Kind::Read, MnocRegister::SendData) => {
                if let Some(at) = self.open {
                    found[at].reply.push(value);
                    // What comes after is a reply that nobody asked for.
                    if self.expected.is_some_and(|expected| found[at].reply.len() >= expected) {
                        self.open = None;
                    }
                }
            }
            _ => {}
        }
    }
}

/// What is under way on the EMEM channels.
#[derive(Default)]
struct EmemReader {
    written: [Vec<u32>; 8],
    open: [Option<usize>; 8],
}

impl EmemReader {
    fn take(&mut self, event: &TraceEvent, channel: u8, register: EmemRegister, value: u32, found: &mut Vec<Rpc>) {
        let at = usize::from(channel);
        match (event.kind, register) {
            (Kind::Write, EmemRegister::Control) => {
                self.written[at].clear();
                // A reply that is read again from the start is one reply.
                if let Some(rpc) = self.open[at] {
                    found[rpc].reply.clear();
                }
            }
            (Kind::Write, EmemRegister::Data) => self.written[at].push(value),
            (Kind::Write, EmemRegister::QueueHead) if !self.written[at].is_empty() => {
                self.open[at] = Some(found.len());
                let request = std::mem::take(&mut self.written[at]);
                found.push(Rpc { micros: event.micros, channel, request, reply: Vec::new() });
            }
            (Kind::Read, EmemRegister::Data) => {
                if let Some(rpc) = self.open[at] {
                    found[rpc].reply.push(value);
                }
            }
            (Kind::Write, EmemRegister::MessageTail) => self.open[at] = None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(kind: Kind, offset: u64, value: u64) -> TraceEvent {
        let (device, space) = (Arc::from("gpu0"), Space::Bar0);
        TraceEvent { micros: offset, device, kind, space, offset, width: 4, value, note: None }
    }

    #[test]
    fn a_line_reads_back_as_the_event_that_was_written() {
        let event = TraceEvent { note: Some("hello".into()), ..access(Kind::Write, 0x8f_2c10, 0x800) };
        let line = serde_json::to_string(&event).unwrap();
        assert!(
            line.contains(r#""kind":"write","space":"bar0","offset":"0x8f2c10","width":4,"value":"0x800""#),
            "{line}"
        );
        assert_eq!(serde_json::from_str::<TraceEvent>(&line).unwrap(), event);
    }

    #[test]
    fn memory_is_bounded_and_says_so_and_the_file_has_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.jsonl");
        let trace = Trace::new(Some(&path), 2).unwrap();
        for value in 0..3 {
            trace.record(access(Kind::Read, 0, value));
        }
        trace.flush().unwrap();
        assert!(trace.overflowed());
        assert_eq!(trace.with(<[_]>::len), 2);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
        trace.clear();
        assert!(!trace.overflowed());
        assert_eq!(trace.with(<[_]>::len), 0);
    }

    #[test]
    fn exchanges_are_put_together_from_the_data_window() {
        let write = |offset, value| access(Kind::Write, offset, value);
        let read = |offset, value| access(Kind::Read, offset, value);
        let mut events = vec![write(0x8f_2ad0, 0x0300_0800)];
        events.extend([0xc000_0000, 0x1310_de7e, 0x0008_020c].map(|word| write(0x8f_2ad4, word)));
        events.extend([write(0x8f_2c14, 0x808), write(0x8f_2c10, 0x800), read(0x8f_2c90, 0x800)]);
        // Another device in between is left out.
        events.push(TraceEvent { device: Arc::from("gpu1"), ..write(0x8f_2ad4, 7) });
        events.push(write(0x8f_2ad0, 0x0300_0800));
        let reply = [0xc000_0000, 0x1510_de7e, 3, 0x13, 0, 0xabcd_0001];
        events.extend(reply.map(|word| read(0x8f_2ad4, word)));
        events.push(write(0x8f_2c94, 0x800));
        // A second request that is never answered.
        events.push(write(0x8f_2ad0, 0x0300_0800));
        events.extend([0xc000_0000, 0x1310_de7e, 0x000a_020d, 2].map(|word| write(0x8f_2ad4, word)));
        events.extend([write(0x8f_2c14, 0x80c), write(0x8f_2c10, 0x800)]);

        let found = rpcs(&events, "gpu0");
        assert_eq!(found[0].request, [0xc000_0000, 0x1310_de7e, 0x0008_020c]);
        assert_eq!(found[0].reply, reply.map(|word| u32::try_from(word).unwrap()));
        assert_eq!(found.iter().map(Rpc::to_string).collect::<Vec<_>>(), ["0008020C->1", "000A020D 2->?"]);
    }

    #[test]
    fn errors_and_odd_replies_show() {
        let text = |reply: &[u32]| Words(&[0, 0, 0x002d_020c], Some(reply)).to_string();
        assert_eq!(text(&[0, 0, 0, 0, 0x1e3]), "002D020C->!1e3");
        assert_eq!(text(&[1]), "002D020C->[00000001]");
    }
}
