//! What can be made wrong with a virtual device, at start or while it runs.
//!
//! The text form is a name and its arguments, joined by colons: `boot-never-completes`, `boot-slow:2000`,
//! `fsp-error-code:8:0x202`, `fsp-error-code:*:0x202`. Times are milliseconds of model time.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One thing that is wrong with a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Fault {
    /// The boot register stays 0 after the next reset (`boot-never-completes`).
    BootNeverCompletes,
    /// Boots take this many milliseconds longer (`boot-slow:MS`).
    BootSlow(u64),
    /// Every BAR reads all ones and ignores writes (`bar-all-ones`).
    BarAllOnes,
    /// Config space reads all ones and ignores writes, FLR included (`config-all-ones`).
    ConfigAllOnes,
    /// FSP takes requests, acts on them, and answers none (`fsp-no-reply`).
    FspNoReply,
    /// Replies come this many milliseconds late (`fsp-late-reply:MS`).
    FspLateReply(u64),
    /// Replies are cut to four dwords (`fsp-short-reply`).
    FspShortReply,
    /// Replies carry a wrong NVDM type (`fsp-mistyped-reply`).
    FspMistypedReply,
    /// Reads and writes of a knob fail with a code (`fsp-error-code:KNOB:CODE`, `*` for every knob).
    FspErrorCode {
        /// The knob; none means all.
        knob: Option<u16>,
        /// The error code in the reply.
        code: u32,
    },
    /// FSP never takes a request from the queue (`fsp-queue-stuck`).
    FspQueueStuck,
    /// The tail of a new message is visible one read before its head (`fsp-split-pointers`): gpu-cc-protocol
    /// section 4.8, hardening (a).
    FspSplitPointers,
    /// BAR0 answers 0xbadf words for this many milliseconds after a reset (`pri-error-after-reset:MS`).
    PriErrorAfterReset(u64),
    /// Knob writes succeed and change nothing (`knob-write-ignored`).
    KnobWriteIgnored,
    /// A reset does not move the effective mode (`mode-unchanged-after-reset`).
    ModeUnchangedAfterReset,
}

/// A text that is not a fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is not a fault; faults are boot-never-completes, boot-slow:MS, bar-all-ones, config-all-ones, fsp-no-reply, \
     fsp-late-reply:MS, fsp-short-reply, fsp-mistyped-reply, fsp-error-code:KNOB:CODE, fsp-queue-stuck, \
     fsp-split-pointers, pri-error-after-reset:MS, knob-write-ignored, mode-unchanged-after-reset"
)]
pub struct FaultError(String);

impl Fault {
    /// Whether setting `other` replaces this fault: the same kind, and of the same knob.
    pub fn replaced_by(&self, other: &Fault) -> bool {
        match (self, other) {
            (Fault::FspErrorCode { knob: mine, .. }, Fault::FspErrorCode { knob: theirs, .. }) => mine == theirs,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::BootNeverCompletes => f.write_str("boot-never-completes"),
            Fault::BootSlow(ms) => write!(f, "boot-slow:{ms}"),
            Fault::BarAllOnes => f.write_str("bar-all-ones"),
            Fault::ConfigAllOnes => f.write_str("config-all-ones"),
            Fault::FspNoReply => f.write_str("fsp-no-reply"),
            Fault::FspLateReply(ms) => write!(f, "fsp-late-reply:{ms}"),
            Fault::FspShortReply => f.write_str("fsp-short-reply"),
            Fault::FspMistypedReply => f.write_str("fsp-mistyped-reply"),
            Fault::FspErrorCode { knob: Some(knob), code } => write!(f, "fsp-error-code:{knob}:{code:#x}"),
            Fault::FspErrorCode { knob: None, code } => write!(f, "fsp-error-code:*:{code:#x}"),
            Fault::FspQueueStuck => f.write_str("fsp-queue-stuck"),
            Fault::FspSplitPointers => f.write_str("fsp-split-pointers"),
            Fault::PriErrorAfterReset(ms) => write!(f, "pri-error-after-reset:{ms}"),
            Fault::KnobWriteIgnored => f.write_str("knob-write-ignored"),
            Fault::ModeUnchangedAfterReset => f.write_str("mode-unchanged-after-reset"),
        }
    }
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let error = || FaultError(text.chars().take(64).collect());
        let mut fields = text.split(':');
        let name = fields.next().unwrap_or_default();
        let arguments: Vec<&str> = fields.collect();
        let fault = match (name, arguments.as_slice()) {
            ("boot-never-completes", []) => Fault::BootNeverCompletes,
            ("boot-slow", [ms]) => Fault::BootSlow(ms.parse().map_err(|_| error())?),
            ("bar-all-ones", []) => Fault::BarAllOnes,
            ("config-all-ones", []) => Fault::ConfigAllOnes,
            ("fsp-no-reply", []) => Fault::FspNoReply,
            ("fsp-late-reply", [ms]) => Fault::FspLateReply(ms.parse().map_err(|_| error())?),
            ("fsp-short-reply", []) => Fault::FspShortReply,
            ("fsp-mistyped-reply", []) => Fault::FspMistypedReply,
            ("fsp-error-code", [knob, code]) => Fault::FspErrorCode {
                knob: if *knob == "*" { None } else { Some(knob.parse().map_err(|_| error())?) },
                code: number(code).ok_or_else(error)?,
            },
            ("fsp-queue-stuck", []) => Fault::FspQueueStuck,
            ("fsp-split-pointers", []) => Fault::FspSplitPointers,
            ("pri-error-after-reset", [ms]) => Fault::PriErrorAfterReset(ms.parse().map_err(|_| error())?),
            ("knob-write-ignored", []) => Fault::KnobWriteIgnored,
            ("mode-unchanged-after-reset", []) => Fault::ModeUnchangedAfterReset,
            _ => return Err(error()),
        };
        Ok(fault)
    }
}

impl TryFrom<String> for Fault {
    type Error = FaultError;

    fn try_from(text: String) -> Result<Self, FaultError> {
        text.parse()
    }
}

impl From<Fault> for String {
    fn from(fault: Fault) -> String {
        fault.to_string()
    }
}

/// Decimal, or hexadecimal with `0x`.
fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_parses_as_it_prints() {
        let all = [
            Fault::BootNeverCompletes,
            Fault::BootSlow(5000),
            Fault::BarAllOnes,
            Fault::ConfigAllOnes,
            Fault::FspNoReply,
            Fault::FspLateReply(7000),
            Fault::FspShortReply,
            Fault::FspMistypedReply,
            Fault::FspErrorCode { knob: Some(8), code: 0x202 },
            Fault::FspErrorCode { knob: None, code: 0x9e },
            Fault::FspQueueStuck,
            Fault::FspSplitPointers,
            Fault::PriErrorAfterReset(200),
            Fault::KnobWriteIgnored,
            Fault::ModeUnchangedAfterReset,
        ];
        for fault in all {
            assert_eq!(fault.to_string().parse(), Ok(fault));
            assert_eq!(serde_json::from_str::<Fault>(&serde_json::to_string(&fault).unwrap()).unwrap(), fault);
        }
    }

    #[test]
    fn half_a_fault_is_refused() {
        for text in ["", "boot-slow", "boot-slow:x", "boot-slow:1:2", "fsp-error-code:8", "fsp-error-code:8:0xg", "bar"]
        {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_newer_fault_replaces_only_its_like() {
        let code = |knob| Fault::FspErrorCode { knob, code: 1 };
        assert!(Fault::BootSlow(1).replaced_by(&Fault::BootSlow(2)));
        assert!(code(Some(8)).replaced_by(&Fault::FspErrorCode { knob: Some(8), code: 2 }));
        assert!(!code(Some(8)).replaced_by(&code(Some(6))));
        assert!(!Fault::BootSlow(1).replaced_by(&Fault::FspNoReply));
    }
}
