//! Every fault of the virtual devices against every change of mode, set before it, after the knobs are staged, and after the
//! reset: the change succeeds all the same or fails with the error that the table names, in time, without a breach of
//! protocol; a second device in the same transaction notices nothing; and without the fault the next change succeeds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use gpu_firmware::{Clock, Milestone, Mode, forbidden};
use lab_devices::fault::FORMS;
use lab_devices::{DeviceSpec, Fault, Firmware, ModelKind};

use common::{Gpu, at_milestone, change, change_observed, fleet};

/// When the fault is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum When {
    Before,
    Staged,
    Reset,
}

const WHEN: [When; 3] = [When::Before, When::Staged, When::Reset];

/// A change of mode of a device.
struct Change {
    kind: ModelKind,
    firmware: Firmware,
    from: Mode,
    to: Mode,
}

impl Change {
    fn is_switch(&self) -> bool {
        self.kind.is_switch()
    }

    fn is_mnoc(&self) -> bool {
        !matches!(self.kind, ModelKind::H100 | ModelKind::Ls10)
    }

    /// Whether the knob of confidential computing changes.
    fn moves_ccm(&self) -> bool {
        let is_cc = |mode| matches!(mode, Mode::On | Mode::Devtools);
        is_cc(self.from) != is_cc(self.to)
    }
}

/// What comes of a fault: none if the change succeeds, else the error's code.
type Outcome = Option<&'static str>;

const FINE: Outcome = None;

/// What comes of a fault set at each moment: the same of every change, or what depends on it.
enum Row {
    Always([Outcome; 3]),
    Depends(fn(&Change) -> [Outcome; 3]),
}

use Row::{Always, Depends};

/// The same whenever the fault is set.
const fn all(code: &'static str) -> Row {
    Always([Some(code); 3])
}

const fn fine() -> Row {
    Always([FINE; 3])
}

/// What can stop a change before its first reset, and nothing after that.
const fn staging(outcome: Outcome) -> [Outcome; 3] {
    [outcome, FINE, FINE]
}

const TABLE: [(&str, Row); 42] = [
    // Booting. The device has booted before: what a fault does to boots shows after the reset.
    ("boot-never-completes", all("BootTimeout")),
    ("boot-slow:2000", fine()),
    ("boot-slow:30000", all("BootTimeout")),
    ("pri-error-after-reset:2000", fine()),
    ("pri-error-after-reset:60000", all("PriError")),
    ("firewall-stuck", all("FirewallClosed")),
    ("recovery", all("Recovery")),
    ("recovery:blank", all("Recovery")),
    ("security-fault:0x40000000", all("SecFault")),
    ("no-flr", fine()),
    // Presence and power.
    ("bar-all-ones", all("Bar0Dead")),
    ("config-all-ones", all("OffBus")),
    ("off-bus:both", all("OffBus")),
    ("off-bus:both:40", all("OffBus")),
    ("off-bus:bar0", all("Bar0Dead")),
    ("off-bus:bar0:20", all("Bar0Dead")),
    ("off-bus:config:4", all("OffBus")),
    ("lost-in-reset", Always([Some("OffBus"), Some("OffBus"), FINE])),
    ("d3cold", all("OffBus")),
    ("d3hot-at-start", fine()),
    // The firmware's mailbox.
    ("fsp-no-reply", all("FspNoResponse")),
    ("fsp-late-reply:2000", fine()),
    ("fsp-late-reply:7000", all("FspNoResponse")),
    ("fsp-queue-stuck", all("FspNoResponse")),
    ("fsp-short-reply", all("FspProtocol")),
    ("fsp-mistyped-reply", all("FspProtocol")),
    ("fsp-stale-reply", fine()),
    ("fsp-duplicate-reply", fine()),
    ("fsp-split-pointers", fine()),
    ("fsp-clean-high-half", fine()),
    ("mnoc-receive-error", all("MnocError")),
    ("mnoc-send-error", all("MnocError")),
    ("mnoc-credit-gap:500", fine()),
    ("mnoc-credit-gap:3000", all("MnocError")),
    // Knobs and what comes of them.
    ("fsp-error-code:8:0x202", all("FspError")),
    ("fsp-error-code:*:0x1e3", Depends(no_knobs)),
    ("fsp-error-code:45:0x1e3", Depends(no_ppcie_knob)),
    ("knob-write-ignored", Always(staging(Some("KnobMismatch")))),
    ("permission-knob-zero:7", Depends(ccm_forbidden)),
    ("permission-knob-zero:*", Always(staging(Some("InBandDenied")))),
    ("mode-unchanged-after-reset", all("VerifyFailed")),
    ("effective-state-2", all("InvalidDevtoolsOnly")),
];

/// Firmware that knows no knob any more. A switch's may lack any (gpu-cc-protocol section 13, question 14), so that there
/// it shows in what the switch boots with.
fn no_knobs(change: &Change) -> [Outcome; 3] {
    let before = Some("KnobUnsupported");
    if change.is_switch() && change.to == Mode::Off {
        [before, FINE, FINE]
    } else {
        [before, Some("VerifyFailed"), Some("VerifyFailed")]
    }
}

/// Firmware that does not know protected PCIe's knob any more: Hopper's does without, unless that mode is on or wanted.
fn no_ppcie_knob(change: &Change) -> [Outcome; 3] {
    let is_ppcie = |mode| mode == Mode::Ppcie;
    match (change.is_mnoc(), is_ppcie(change.from), is_ppcie(change.to)) {
        (true, ..) | (_, false, false) => [FINE; 3],
        (_, true, _) => [Some("KnobUnsupported"), FINE, FINE],
        (_, false, true) => [Some("KnobUnsupported"), Some("VerifyFailed"), Some("VerifyFailed")],
    }
}

/// The host may not change CCM. The switch's firmware has no such permission.
fn ccm_forbidden(change: &Change) -> [Outcome; 3] {
    staging(if change.moves_ccm() && !change.is_switch() { Some("InBandDenied") } else { FINE })
}

/// How long a device may take at most, in model time: what it takes in health, and the waits that its outcome allows for.
fn deadline(change: &Change, fault: Fault, outcome: Outcome, requests: u32) -> Duration {
    let seconds = Duration::from_secs;
    // Configuration space and boot, 5 s each on Hopper and LS10, 10 s on Blackwell, and the firewall's 15 s.
    let boot = if change.is_mnoc() { seconds(10 + 15 + 10) } else { seconds(5 + 5) };
    // The mailbox's former user, the command queue or the mailbox with its credit, the reply.
    let exchange = if change.is_mnoc() { seconds(5 + 5 + 1 + 5) } else { seconds(5 + 1 + 5) };
    let slack = Duration::from_millis(100);
    let health = Duration::from_secs(1) + requests * Duration::from_millis(12);
    let waits = match (outcome, fault) {
        // The faults that pass: each request is slower, or the boots before and after the reset.
        (None, Fault::FspLateReply(ms) | Fault::MnocCreditGap(ms)) => requests * Duration::from_millis(ms),
        (None, Fault::BootSlow(ms) | Fault::PriErrorAfterReset(ms)) => 2 * Duration::from_millis(ms),
        (Some("FspNoResponse" | "MnocError" | "FspBusy"), _) => 2 * exchange,
        // After the reset, and once more after a bus reset.
        (Some("BootTimeout" | "PriError" | "FirewallClosed" | "Bar0Dead" | "Recovery" | "OffBus"), _) => 2 * boot,
        _ => Duration::ZERO,
    };
    health + waits + slack
}

#[derive(Default)]
struct Counts {
    faults: usize,
    transitions: usize,
    cases: usize,
    outcomes: BTreeMap<&'static str, usize>,
}

/// Every fault and moment against every change of these devices.
fn matrix(of: impl Fn(&DeviceSpec) -> bool) -> Counts {
    let mut counts = Counts::default();
    let mut wrong = Vec::new();
    for (spec, modes) in fleet().into_iter().filter(|(spec, _)| of(spec)) {
        let faults: Vec<_> = TABLE.iter().filter(|(text, _)| fault(text).applies_to(spec.model)).collect();
        counts.faults = counts.faults.max(faults.len());
        let pairs = modes.iter().flat_map(|from| modes.iter().map(move |to| (*from, *to)));
        for (from, to) in pairs.filter(|(from, to)| from != to) {
            let change = Change { kind: spec.model, firmware: spec.firmware, from, to };
            let alone = Gpu::in_mode(spec.clone(), from);
            assert!(common::change(&[&alone], to).all_verified());
            counts.transitions += 1;
            for ((text, row), when) in faults.iter().flat_map(|fault| WHEN.map(|when| (*fault, when))) {
                let outcomes = match row {
                    Always(outcomes) => *outcomes,
                    Depends(of) => of(&change),
                };
                let expected = outcomes[when as usize];
                if let Err(what) = check(&spec, &change, text, when, expected, &alone) {
                    let firmware = change.firmware;
                    wrong.push(format!("{} {firmware:?} {from} -> {to}, {text} {when:?}: {what}", spec.model));
                }
                *counts.outcomes.entry(expected.unwrap_or("succeeds")).or_default() += 1;
                counts.cases += 1;
            }
        }
    }
    let Counts { faults, transitions, cases, outcomes } = &counts;
    println!("{faults} faults, {transitions} transitions, {cases} cases: {outcomes:?}");
    assert!(wrong.is_empty(), "{} of {cases} cases:\n{}", wrong.len(), wrong.join("\n"));
    counts
}

fn fault(text: &str) -> Fault {
    text.parse().unwrap()
}

/// One case; what is wrong with it.
fn check(spec: &DeviceSpec, of: &Change, text: &str, when: When, expected: Outcome, alone: &Gpu) -> Result<(), String> {
    let sick = Gpu::in_mode(spec.clone(), of.from);
    let healthy = Gpu::in_mode(spec.clone(), of.from).at("0000:61:00.0");
    let set = || {
        sick.fault(text);
        if text == "d3hot-at-start" && when == When::Before {
            sick.with_model(lab_devices::Model::power_on);
            sick.boot();
        }
    };
    if when == When::Before {
        set();
    }
    let start = sick.clock.now();
    let is_it: fn(&Milestone) -> bool = match when {
        When::Before => |_| false,
        When::Staged => |what| matches!(what, Milestone::Staged { .. }),
        When::Reset => |what| *what == Milestone::ResetDone,
    };
    let outcome = change_observed(&[&sick, &healthy], of.to, &at_milestone(sick.bdf, is_it, set));
    let ensure = |is_right: bool, what: &dyn Fn() -> String| if is_right { Ok(()) } else { Err(what()) };

    let found = outcome.devices[0].result.as_ref().err();
    ensure(found.map(gpu_firmware::Error::code) == expected, &|| format!("expected {expected:?}, found {found:?}"))?;
    let took = sick.clock.now().saturating_sub(start);
    let requests = u32::try_from(sick.requests().len()).unwrap();
    let limit = deadline(of, fault(text), expected, requests);
    ensure(took <= limit, &|| format!("took {took:?} of {limit:?}"))?;
    let boots = sick.latched();
    ensure(boots.iter().all(|vector| forbidden(vector).is_none()), &|| format!("forbidden boots: {boots:?}"))?;
    let status = sick.status();
    ensure((status.stray_count, status.host_error_count) == (0, 0), &|| {
        format!("stray {:?}, breaches {:?}", status.stray, status.host_errors)
    })?;

    // The other device: there, with the same accesses at the same times as if it were alone.
    ensure(outcome.devices[1].result.is_ok(), &|| format!("the healthy device: {:?}", outcome.devices[1]))?;
    ensure(healthy.status() == alone.status(), &|| format!("the healthy device is {:?}", healthy.status()))?;
    let (found, wanted) = [&healthy, alone].map(|gpu| (gpu.clock.now(), gpu.reads(), gpu.changes())).into();
    ensure(found == wanted, &|| format!("the healthy device took {found:?}, alone {wanted:?}"))?;

    sick.clear_faults();
    let next = change(&[&sick], of.to);
    ensure(next.all_verified(), &|| format!("without the fault: {next:?}"))?;
    let boots = sick.latched();
    ensure(boots.iter().all(|vector| forbidden(vector).is_none()), &|| format!("forbidden boots then: {boots:?}"))
}

#[test]
fn the_table_has_every_fault() {
    let name = |text: &str| text.split(':').next().unwrap().to_owned();
    for form in FORMS {
        // `recovery` and `recovery:blank` are two faults; all others differ by their arguments.
        let is_in = |(text, _): &(&str, Row)| name(text) == name(form) && (form != "recovery:blank" || *text == form);
        assert!(TABLE.iter().any(is_in), "{form} is not in the table");
    }
    for (text, _) in &TABLE {
        assert_eq!(fault(text).to_string().split(':').next(), text.split(':').next());
    }
}

#[test]
fn hopper_under_every_fault() {
    let counts = matrix(|spec| spec.model == ModelKind::H100 && spec.firmware == Firmware::Current);
    assert_eq!(counts.transitions, 12);
    assert!(counts.outcomes.len() > 10);
}

#[test]
fn hopper_with_old_firmware_under_every_fault() {
    assert_eq!(matrix(|spec| spec.model == ModelKind::H100 && spec.firmware == Firmware::Old).transitions, 6);
}

#[test]
fn blackwell_under_every_fault() {
    assert_eq!(matrix(|spec| spec.model == ModelKind::B200).transitions, 6);
}

#[test]
fn workstation_blackwell_under_every_fault() {
    assert_eq!(matrix(|spec| spec.model == ModelKind::RtxPro6000).transitions, 6);
}

#[test]
fn the_switch_under_every_fault() {
    assert_eq!(matrix(|spec| spec.model == ModelKind::Ls10).transitions, 2);
}
