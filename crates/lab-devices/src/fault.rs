//! What can be made wrong with a virtual device, at start or while it runs.
//!
//! The text form is a name and its arguments, joined by colons: `boot-never-completes`, `boot-slow:2000`,
//! `fsp-error-code:8:0x202`, `fsp-error-code:*:0x202`. Times are milliseconds of model time.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::kind::{Chip, ModelKind, Transport};
use crate::trace::Space;
use crate::undecided;

/// What of a device falls off the bus.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Every BAR (`bar0`).
    Bar0,
    /// Configuration space (`config`).
    Config,
    /// All of it (`both`).
    Both,
}

impl Part {
    pub(crate) fn covers(self, space: Space) -> bool {
        match self {
            Part::Bar0 => matches!(space, Space::Bar0 | Space::Bar2 | Space::Bar4),
            Part::Config => space == Space::Config,
            Part::Both => space != Space::Device,
        }
    }
}

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
    /// Reads all ones and ignores writes, after so many more accesses to the part concerned (`off-bus:PART:ACCESSES`, or
    /// `off-bus:PART` for at once; the part is `bar0`, `config` or `both`). No reset brings it back.
    OffBus {
        /// What of the device.
        part: Part,
        /// Accesses that are still answered, counted from when the fault is set.
        after: u64,
    },
    /// Power-on and bus resets leave the device in D3hot (`d3hot-at-start`).
    D3hotAtStart,
    /// Power is away: nothing answers and no reset reaches it, until the fault is taken away, which is a power-on
    /// (`d3cold`).
    D3cold,
    /// The device is in recovery (`recovery`): the recovery flag is set, it never boots and FSP takes no request.
    /// `recovery:blank`: a GH100's PMC_BOOT_0 reads 0 as well (gpu-cc-protocol section 1.6).
    Recovery {
        /// Whether PMC_BOOT_0 reads 0.
        blank: bool,
    },
    /// Security-fault lockdown (`security-fault` or `security-fault:WORD`): PMC_BOOT_0 says so, no register answers, and the
    /// security-fault word in config space has this value.
    SecurityFault(u32),
    /// The BAR firewall does not come down after the next reset (`firewall-stuck`).
    FirewallStuck,
    /// A reply that nobody asked for lies in the mailbox, now and after each boot (`fsp-stale-reply`).
    FspStaleReply,
    /// Every reply comes once more when it has been read (`fsp-duplicate-reply`).
    FspDuplicateReply,
    /// The high half of a value that is read is 0 rather than garbage (`fsp-clean-high-half`).
    FspCleanHighHalf,
    /// A permission knob reads 0, and writes of the knob that it guards are denied (`permission-knob-zero:KNOB`, `*` for
    /// every permission knob).
    PermissionKnobZero(Option<u16>),
    /// From the next boot on the effective mode is the invalid state 2, whatever the knobs say (`effective-state-2`). For
    /// one that a change of mode repairs, start with knob 6 at 1 instead.
    EffectiveState2,
    /// The error bit of the mailbox's receiving side is set (`mnoc-receive-error`).
    MnocReceiveError,
    /// Replies are lost, and the error bit of the mailbox's sending side is set instead (`mnoc-send-error`).
    MnocSendError,
    /// Credit is away for this many milliseconds at the start of a message and of each 64 bytes of it
    /// (`mnoc-credit-gap:MS`).
    MnocCreditGap(u64),
    /// The device cannot do function-level resets (`no-flr`). A kernel learns that only when it finds the device.
    NoFlr,
    /// The next function-level reset is the device's last (`lost-in-reset`): nothing answers from then on, so that the
    /// kernel's reset fails, until the fault is taken away, which is a power-on.
    LostInReset,
}

/// A text that is not a fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not a fault; faults are {}", FORMS.join(", "))]
pub struct FaultError {
    text: String,
}

/// The text forms of all faults.
pub const FORMS: [&str; 31] = [
    "boot-never-completes",
    "boot-slow:MS",
    "bar-all-ones",
    "config-all-ones",
    "fsp-no-reply",
    "fsp-late-reply:MS",
    "fsp-short-reply",
    "fsp-mistyped-reply",
    "fsp-error-code:KNOB:CODE",
    "fsp-queue-stuck",
    "fsp-split-pointers",
    "pri-error-after-reset:MS",
    "knob-write-ignored",
    "mode-unchanged-after-reset",
    "off-bus:PART:ACCESSES",
    "d3hot-at-start",
    "d3cold",
    "recovery",
    "recovery:blank",
    "security-fault:WORD",
    "firewall-stuck",
    "fsp-stale-reply",
    "fsp-duplicate-reply",
    "fsp-clean-high-half",
    "permission-knob-zero:KNOB",
    "effective-state-2",
    "mnoc-receive-error",
    "mnoc-send-error",
    "mnoc-credit-gap:MS",
    "no-flr",
    "lost-in-reset",
];

impl Fault {
    /// Whether a device of this model can have the fault at all.
    pub fn applies_to(&self, kind: ModelKind) -> bool {
        let chip = kind.chip();
        match self {
            Fault::BarAllOnes
            | Fault::ConfigAllOnes
            | Fault::OffBus { .. }
            | Fault::D3hotAtStart
            | Fault::D3cold
            | Fault::NoFlr
            | Fault::LostInReset => true,
            Fault::PriErrorAfterReset(_) => chip != Chip::Other,
            Fault::FirewallStuck => chip.has_firewall(),
            Fault::FspSplitPointers => chip.transport() == Some(Transport::Emem),
            Fault::MnocReceiveError | Fault::MnocSendError | Fault::MnocCreditGap(_) => {
                chip.transport() == Some(Transport::Mnoc)
            }
            Fault::EffectiveState2 | Fault::SecurityFault(_) => chip.transport().is_some() && !kind.is_switch(),
            Fault::Recovery { blank: true } => chip == Chip::Hopper,
            _ => chip.transport().is_some(),
        }
    }

    /// Whether a device that has the fault from the start is not found by the machine at all.
    pub fn hides(&self) -> bool {
        use Part::{Both, Config};
        matches!(self, Fault::D3cold | Fault::ConfigAllOnes | Fault::OffBus { part: Config | Both, after: 0 })
    }

    /// Whether setting `other` replaces this fault: the same kind, and of the same knob.
    pub fn replaced_by(&self, other: &Fault) -> bool {
        match (self, other) {
            (Fault::FspErrorCode { knob: mine, .. }, Fault::FspErrorCode { knob: theirs, .. })
            | (Fault::PermissionKnobZero(mine), Fault::PermissionKnobZero(theirs)) => mine == theirs,
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
            Fault::OffBus { part, after } => {
                let part = match part {
                    Part::Bar0 => "bar0",
                    Part::Config => "config",
                    Part::Both => "both",
                };
                write!(f, "off-bus:{part}:{after}")
            }
            Fault::D3hotAtStart => f.write_str("d3hot-at-start"),
            Fault::D3cold => f.write_str("d3cold"),
            Fault::Recovery { blank: false } => f.write_str("recovery"),
            Fault::Recovery { blank: true } => f.write_str("recovery:blank"),
            Fault::SecurityFault(word) => write!(f, "security-fault:{word:#x}"),
            Fault::FirewallStuck => f.write_str("firewall-stuck"),
            Fault::FspStaleReply => f.write_str("fsp-stale-reply"),
            Fault::FspDuplicateReply => f.write_str("fsp-duplicate-reply"),
            Fault::FspCleanHighHalf => f.write_str("fsp-clean-high-half"),
            Fault::PermissionKnobZero(Some(knob)) => write!(f, "permission-knob-zero:{knob}"),
            Fault::PermissionKnobZero(None) => f.write_str("permission-knob-zero:*"),
            Fault::EffectiveState2 => f.write_str("effective-state-2"),
            Fault::MnocReceiveError => f.write_str("mnoc-receive-error"),
            Fault::MnocSendError => f.write_str("mnoc-send-error"),
            Fault::MnocCreditGap(ms) => write!(f, "mnoc-credit-gap:{ms}"),
            Fault::NoFlr => f.write_str("no-flr"),
            Fault::LostInReset => f.write_str("lost-in-reset"),
        }
    }
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let error = || FaultError { text: text.chars().take(64).collect() };
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
                knob: knob_or_all(knob).ok_or_else(error)?,
                code: number(code).ok_or_else(error)?,
            },
            ("fsp-queue-stuck", []) => Fault::FspQueueStuck,
            ("fsp-split-pointers", []) => Fault::FspSplitPointers,
            ("pri-error-after-reset", [ms]) => Fault::PriErrorAfterReset(ms.parse().map_err(|_| error())?),
            ("knob-write-ignored", []) => Fault::KnobWriteIgnored,
            ("mode-unchanged-after-reset", []) => Fault::ModeUnchangedAfterReset,
            ("off-bus", [part, after @ ..]) => {
                let part = match *part {
                    "bar0" => Part::Bar0,
                    "config" => Part::Config,
                    "both" => Part::Both,
                    _ => return Err(error()),
                };
                let after = match after {
                    [] => 0,
                    [after] => after.parse().map_err(|_| error())?,
                    _ => return Err(error()),
                };
                Fault::OffBus { part, after }
            }
            ("d3hot-at-start", []) => Fault::D3hotAtStart,
            ("d3cold", []) => Fault::D3cold,
            ("recovery", []) => Fault::Recovery { blank: false },
            ("recovery", ["blank"]) => Fault::Recovery { blank: true },
            ("security-fault", []) => Fault::SecurityFault(undecided::SECURITY_FAULT_WORD),
            ("security-fault", [word]) => Fault::SecurityFault(number(word).ok_or_else(error)?),
            ("firewall-stuck", []) => Fault::FirewallStuck,
            ("fsp-stale-reply", []) => Fault::FspStaleReply,
            ("fsp-duplicate-reply", []) => Fault::FspDuplicateReply,
            ("fsp-clean-high-half", []) => Fault::FspCleanHighHalf,
            ("permission-knob-zero", [knob]) => Fault::PermissionKnobZero(knob_or_all(knob).ok_or_else(error)?),
            ("effective-state-2", []) => Fault::EffectiveState2,
            ("mnoc-receive-error", []) => Fault::MnocReceiveError,
            ("mnoc-send-error", []) => Fault::MnocSendError,
            ("mnoc-credit-gap", [ms]) => Fault::MnocCreditGap(ms.parse().map_err(|_| error())?),
            ("no-flr", []) => Fault::NoFlr,
            ("lost-in-reset", []) => Fault::LostInReset,
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

/// A knob, or `*` for all of them.
#[expect(clippy::option_option, reason = "the outer one is a failure to parse, the inner one means every knob")]
fn knob_or_all(text: &str) -> Option<Option<u16>> {
    if text == "*" { Some(None) } else { text.parse().ok().map(Some) }
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
    use std::collections::BTreeSet;

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
            Fault::OffBus { part: Part::Bar0, after: 0 },
            Fault::OffBus { part: Part::Config, after: 7 },
            Fault::OffBus { part: Part::Both, after: 1000 },
            Fault::D3hotAtStart,
            Fault::D3cold,
            Fault::Recovery { blank: false },
            Fault::Recovery { blank: true },
            Fault::SecurityFault(0x4000_0000),
            Fault::FirewallStuck,
            Fault::FspStaleReply,
            Fault::FspDuplicateReply,
            Fault::FspCleanHighHalf,
            Fault::PermissionKnobZero(Some(7)),
            Fault::PermissionKnobZero(None),
            Fault::EffectiveState2,
            Fault::MnocReceiveError,
            Fault::MnocSendError,
            Fault::MnocCreditGap(100),
            Fault::NoFlr,
            Fault::LostInReset,
        ];
        let name = |text: &str| text.split(':').next().unwrap().to_owned();
        let [told, tried]: [BTreeSet<String>; 2] =
            [FORMS.iter().map(|form| name(form)).collect(), all.iter().map(|fault| name(&fault.to_string())).collect()];
        assert_eq!(told, tried, "every fault is told of, and tried here");
        for fault in all {
            assert_eq!(fault.to_string().parse(), Ok(fault));
            assert_eq!(serde_json::from_str::<Fault>(&serde_json::to_string(&fault).unwrap()).unwrap(), fault);
        }
    }

    #[test]
    fn every_fault_is_in_the_hardware_document() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/hardware.md");
        let document = std::fs::read_to_string(path).unwrap();
        for form in FORMS {
            assert!(document.contains(&format!("`{form}`")), "{form}");
        }
    }

    #[test]
    fn half_a_fault_is_refused() {
        for text in [
            "",
            "boot-slow",
            "boot-slow:x",
            "boot-slow:1:2",
            "fsp-error-code:8",
            "fsp-error-code:8:0xg",
            "bar",
            "off-bus",
            "off-bus:link",
            "off-bus:both:1:2",
            "off-bus:both:-1",
            "recovery:red",
            "security-fault:0xg",
            "permission-knob-zero",
            "mnoc-credit-gap",
        ] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
        assert_eq!("off-bus:both".parse(), Ok(Fault::OffBus { part: Part::Both, after: 0 }));
        assert_eq!("security-fault".parse(), Ok(Fault::SecurityFault(1 << 30)));
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
