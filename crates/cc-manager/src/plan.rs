//! What is to be done. No I/O: from the label, the host and what has been verified to one action.

use std::fmt;

use agent_core::state::{DeviceRecord, DevicesFile, ErrorRecord, Identity};
use gpu_firmware::{Mode, NodePlan, Part};
use hw_probe::{Bdf, Inventory, PciFunction, Tee};
use node_object::labels;

use crate::executor::{DeviceFault, DeviceResult};

/// Where the wanted mode comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The node's label.
    Label,
    /// The default of the command line.
    Default,
    /// The default, overruled because the host has no TEE.
    NoTee,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Label => "label",
            Self::Default => "default",
            Self::NoTee => "default, forced off because this host has no TEE",
        })
    }
}

/// What the node is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// In this mode.
    Mode(Mode, Source),
    /// As it is: no label and an empty default.
    Nothing,
    /// Something that is no mode.
    Unknown(String, Source),
    /// A mode that this node may not be asked for.
    NotAllowed(Mode, Source),
}

/// The label if it is not empty, else the default, which is off without TEE (operator-contract section 5.4); `allowed` are
/// the modes that may be asked for.
pub(crate) fn wanted(label: Option<&str>, default: &str, tee: Tee, allowed: &[Mode]) -> Wanted {
    let (text, source) = match label.filter(|text| !text.is_empty()) {
        Some(text) => (text, Source::Label),
        None if default.is_empty() => return Wanted::Nothing,
        None if tee == Tee::None && default != Mode::Off.as_str() => (Mode::Off.as_str(), Source::NoTee),
        None => (default, Source::Default),
    };
    match text.parse() {
        Ok(mode) if !allowed.contains(&mode) => Wanted::NotAllowed(mode, source),
        Ok(mode) => Wanted::Mode(mode, source),
        Err(_) => Wanted::Unknown(text.to_owned(), source),
    }
}

/// The error of a value that is no mode.
pub(crate) fn unknown_mode(text: &str, source: Source) -> ErrorRecord {
    let allowed = Mode::ALL.map(Mode::as_str).join(", ");
    let text: String = text.chars().take(64).collect();
    let message = match source {
        Source::Label => format!(
            "Label {} asks for {text:?}, which is no mode; nothing is changed; set it to one of: {allowed}",
            labels::CC_MODE
        ),
        Source::Default | Source::NoTee => format!(
            "The default mode (--default-cc-mode, DEFAULT_CC_MODE) is {text:?}, which is no mode; nothing is changed; set \
             it to one of: {allowed}"
        ),
    };
    ErrorRecord { code: "UnknownMode".to_owned(), message }
}

/// The error of a mode that this node may not be asked for.
pub(crate) fn not_allowed(mode: Mode, source: Source, allowed: &[Mode]) -> ErrorRecord {
    let allowed: Vec<&str> = allowed.iter().map(|mode| mode.as_str()).collect();
    let message = format!(
        "Mode {mode} ({source}) is not one of those allowed on this node ({}); nothing is changed; ask for one of them, or \
         change --allowed-modes (CCNODE_ALLOWED_MODES)",
        allowed.join(", ")
    );
    ErrorRecord { code: "ModeNotAllowed".to_owned(), message }
}

/// Code of a node that lost its TEE.
pub(crate) const TEE_LOST: &str = "TEELost";

/// Whether the node was ready for confidential pods before, by what stands on it, and its host has no TEE now. What stands is
/// the mode's state, or that this was found before.
pub(crate) fn tee_lost(tee: Tee, mode_state: Option<&str>, status: Option<&str>) -> bool {
    let was_confidential = [Mode::On, Mode::Ppcie].iter().any(|mode| mode_state == Some(mode.as_str()));
    let was_found = || status.is_some_and(|status| status.contains(&format!("\"code\":\"{TEE_LOST}\"")));
    tee == Tee::None && (was_confidential || was_found())
}

/// The error of that.
pub(crate) fn tee_lost_error() -> ErrorRecord {
    ErrorRecord {
        code: TEE_LOST.to_owned(),
        message: "This node was verified for confidential pods, and KVM on its host has no TEE (SEV-SNP, TDX) any more; \
                  nothing is changed; turn it on again in the firmware's setup and the kernel's parameters, or ask for mode \
                  off by the label nvidia.com/cc.mode"
            .to_owned(),
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// There is no GPU: nothing to do and nothing to tell.
    NoGpus,
    /// PCI devices cannot be listed, or one cannot be told apart: which GPUs there are is not known.
    Blind(ErrorRecord),
    /// These devices cannot be in that mode; nothing is touched.
    Impossible(Vec<DeviceFault>),
    /// Every device has been verified in the mode in this boot.
    Settled {
        /// But for these, which cannot be.
        refused: Vec<DeviceFault>,
    },
    /// These devices are to be owned, changed and verified.
    Change {
        /// The devices, by address.
        devices: Vec<PciFunction>,
        /// Whether it is the whole node rather than what an earlier attempt left over.
        whole: bool,
        /// Those that cannot be in the mode.
        refused: Vec<DeviceFault>,
    },
}

/// Decides.
pub(crate) fn plan(inventory: &Inventory, mode: Mode, known: Option<&DevicesFile>) -> Action {
    let no_gpus = inventory.gpus().next().is_none();
    // A function that is there and could not be told apart may be a GPU, in whatever mode.
    let blind = inventory.problems.iter().find(|problem| match problem.bdf {
        Some(bdf) => inventory.get(bdf).is_none(),
        None => no_gpus,
    });
    if let Some(problem) = blind {
        let message = format!(
            "Cannot tell which GPUs this node has: {}: {}; nothing is changed; check that /sys is mounted and readable, \
             and the kernel log",
            problem.path, problem.message
        );
        return Action::Blind(ErrorRecord { code: "SysfsUnreadable".to_owned(), message });
    }
    if no_gpus {
        return Action::NoGpus;
    }
    let node = NodePlan::of(inventory, mode);
    let refused: Vec<DeviceFault> = node.refusals().iter().map(DeviceFault::from).collect();
    if !node.is_possible() {
        return Action::Impossible(refused);
    }
    // A transition that was begun and not ended says nothing of any device.
    let known = known.filter(|known| known.transition.is_none());
    let is_right = |function: &PciFunction, own: Mode| {
        known.and_then(|known| known.record(function)).is_some_and(|record| is_verified(record, own))
    };
    let all = || node.modes().map(|(function, _)| function.clone());
    let left: Vec<PciFunction> = node
        .modes()
        .filter(|(function, own)| !is_right(function, *own))
        .map(|(function, _)| function.clone())
        .collect();
    if left.is_empty() {
        return Action::Settled { refused };
    }
    // Protected PCIe is one thing of all devices; the other modes are each device's own.
    let whole = mode == Mode::Ppcie || left.len() == all().count();
    let devices = if whole { all().collect() } else { left };
    Action::Change { devices, whole, refused }
}

fn is_verified(record: &DeviceRecord, mode: Mode) -> bool {
    let is = |text: &Option<String>| text.as_deref() == Some(mode.as_str());
    is(&record.configured_mode) && is(&record.active_mode) && record.verified_at.is_some()
}

/// The mode that every device has been verified in, whatever is wanted now; those that were in use since then count as what
/// they were.
pub(crate) fn standing(inventory: &Inventory, known: Option<&DevicesFile>) -> Option<Mode> {
    let mut known = known?.clone();
    for record in &mut known.devices {
        if record.error.is_none() && record.active_mode.is_some() {
            record.verified_at = record.verified_at.or(Some(known.origin.written_at));
        }
    }
    let is_settled =
        |mode: &Mode| matches!(plan(inventory, *mode, Some(&known)), Action::Settled { refused } if refused.is_empty());
    Mode::ALL.into_iter().find(is_settled)
}

/// Whether nothing is known of some of these devices, so that they must be looked at before it can be said whether they are
/// to be changed.
pub(crate) fn any_unknown(known: Option<&DevicesFile>, devices: &[PciFunction]) -> bool {
    let known = known.filter(|known| known.transition.is_none());
    let is_known =
        |function| known.and_then(|known| known.record(function)).is_some_and(|record| record.verified_at.is_some());
    !devices.iter().all(is_known)
}

/// Whether a device that nothing was wrong with is to be looked at again, since somebody had it.
pub(crate) fn is_withdrawn(known: Option<&DevicesFile>, device: &PciFunction) -> bool {
    let known = known.filter(|known| known.transition.is_none());
    let record = known.and_then(|known| known.record(device));
    record.is_some_and(|record| record.verified_at.is_none() && record.active_mode.is_some() && record.error.is_none())
}

/// The records of a node where `mode` is wanted (none: something that is no mode) while `changing` are in transition.
///
/// This is the one place that says which devices may be offered: those verified in the mode that is wanted now.
pub(crate) fn records(
    inventory: &Inventory,
    mode: Option<Mode>,
    known: Option<&DevicesFile>,
    changing: &[PciFunction],
) -> Vec<DeviceRecord> {
    // A transition that was begun and not ended says nothing of any device.
    let known = known.filter(|known| known.transition.is_none());
    let mut records: Vec<DeviceRecord> = NodePlan::of(inventory, mode.unwrap_or(Mode::Off))
        .devices
        .iter()
        .map(|device| {
            let function = &device.function;
            let mut record = known
                .and_then(|known| known.record(function))
                .cloned()
                .unwrap_or_else(|| blank(function, &device.part));
            let changes = changing.iter().any(|other| other.bdf == function.bdf);
            let is_right = mode.is_some()
                && match &device.part {
                    Part::Mode(own) => is_verified(&record, *own),
                    // What is always off needs no verification to be what is asked for.
                    Part::AlwaysOff => true,
                    Part::Refused(_) => false,
                };
            record.usable = is_right && !changes;
            if record.usable {
                // An error of an attempt to leave the mode is over.
                record.error = None;
            }
            record
        })
        .collect();
    all_or_none(mode, &mut records);
    records
}

/// Protected PCIe is one thing of all devices: while one is not in it, none may be offered.
pub(crate) fn all_or_none(mode: Option<Mode>, records: &mut [DeviceRecord]) {
    if mode == Some(Mode::Ppcie) && records.iter().any(|record| !record.usable) {
        for record in records {
            record.usable = false;
        }
    }
}

/// The records of devices of which nothing new is known, when none may be offered.
pub(crate) fn withheld(records: impl IntoIterator<Item = DeviceRecord>) -> Vec<DeviceRecord> {
    records.into_iter().map(|record| DeviceRecord { usable: false, ..record }).collect()
}

fn blank(function: &PciFunction, part: &Part) -> DeviceRecord {
    let mode = (*part == Part::AlwaysOff).then(|| Mode::Off.to_string());
    DeviceRecord {
        bdf: function.bdf,
        identity: Identity::of(function),
        configured_mode: mode.clone(),
        active_mode: mode,
        verified_at: None,
        usable: false,
        error: None,
    }
}

/// Somebody had these devices, and may have changed them: they are not offered until they have been looked at. What they were is
/// still told.
pub(crate) fn doubt(records: &mut [DeviceRecord], released: &[Bdf]) {
    for bdf in released {
        if let Some(record) = find(records, *bdf) {
            record.verified_at = None;
            record.usable = false;
        }
    }
}

/// What the file says while devices are being changed without a node-wide transition: nothing of those devices. Should
/// we be killed, nobody may take an old record for the truth.
pub(crate) fn forget(records: &mut [DeviceRecord], changing: &[Bdf]) {
    for bdf in changing {
        if let Some(record) = find(records, *bdf) {
            record.configured_mode = None;
            record.active_mode = None;
            record.verified_at = None;
            record.usable = false;
        }
    }
}

/// Puts what became of the devices into their records.
pub(crate) fn apply_results(records: &mut [DeviceRecord], results: &[DeviceResult]) {
    for DeviceResult { bdf, result } in results {
        let Some(record) = find(records, *bdf) else { continue };
        match result {
            Ok(verified) => {
                record.configured_mode = Some(verified.configured.clone());
                record.active_mode = Some(verified.active.clone());
                record.verified_at = Some(verified.at);
                record.usable = true;
                record.error = None;
            }
            Err(fault) if fault.untouched => record.usable = false,
            Err(fault) => {
                // Half changed: what was known of it is not known any more.
                record.configured_mode = None;
                record.active_mode = None;
                record.verified_at = None;
                record.usable = false;
                record.error = Some(fault.error.clone());
            }
        }
    }
}

/// Puts errors of devices that were not touched into their records: what was known of them stays.
pub(crate) fn apply_faults(records: &mut [DeviceRecord], faults: &[DeviceFault]) {
    for fault in faults {
        if let Some(record) = find(records, fault.bdf) {
            record.usable = false;
            record.error = Some(fault.error.clone());
        }
    }
}

/// Notes errors of devices that stay as they are, offered or not.
pub(crate) fn note_faults(records: &mut [DeviceRecord], faults: &[DeviceFault]) {
    for fault in faults {
        if let Some(record) = find(records, fault.bdf) {
            record.error = Some(fault.error.clone());
        }
    }
}

fn find(records: &mut [DeviceRecord], bdf: Bdf) -> Option<&mut DeviceRecord> {
    records.iter_mut().find(|record| record.bdf == bdf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_core::state::{Origin, Transition};
    use hw_probe::testing::FakeSysfs;

    const H100: u16 = 0x2331;
    const A100: u16 = 0x20b5;
    const UNKNOWN: u16 = 0x3f00;

    #[test]
    fn the_wanted_mode() {
        use Source::{Default, Label, NoTee};
        use Tee::{None as NoTees, SevSnp, Tdx};
        let unknown = |text: &str, source| Wanted::Unknown(text.to_owned(), source);
        for (label, default, tee, result) in [
            (Some("on"), "off", SevSnp, Wanted::Mode(Mode::On, Label)),
            (Some("ppcie"), "on", Tdx, Wanted::Mode(Mode::Ppcie, Label)),
            (Some("devtools"), "on", NoTees, Wanted::Mode(Mode::Devtools, Label)),
            (Some(""), "on", Tdx, Wanted::Mode(Mode::On, Default)),
            (None, "on", Tdx, Wanted::Mode(Mode::On, Default)),
            (None, "on", NoTees, Wanted::Mode(Mode::Off, NoTee)),
            (None, "off", NoTees, Wanted::Mode(Mode::Off, Default)),
            (None, "", NoTees, Wanted::Nothing),
            (None, "", Tdx, Wanted::Nothing),
            (Some("On"), "on", Tdx, unknown("On", Label)),
            (Some("enabled"), "on", NoTees, unknown("enabled", Label)),
            (None, "maybe", Tdx, unknown("maybe", Default)),
            (None, "maybe", NoTees, Wanted::Mode(Mode::Off, NoTee)),
        ] {
            assert_eq!(wanted(label, default, tee, &Mode::ALL), result, "{label:?} {default:?} {tee:?}");
        }
    }

    #[test]
    fn only_allowed_modes_may_be_asked_for() {
        let of = |label, default| wanted(label, default, Tee::Tdx, &[Mode::On, Mode::Off]);
        assert_eq!(of(Some("off"), "on"), Wanted::Mode(Mode::Off, Source::Label));
        assert_eq!(of(Some("devtools"), "on"), Wanted::NotAllowed(Mode::Devtools, Source::Label));
        assert_eq!(of(None, "ppcie"), Wanted::NotAllowed(Mode::Ppcie, Source::Default));
        assert_eq!(of(Some("x"), "on"), Wanted::Unknown("x".to_owned(), Source::Label));
        let message = not_allowed(Mode::Devtools, Source::Label, &[Mode::On, Mode::Off]).message;
        assert!(message.contains("devtools (label)") && message.contains("on, off"), "{message}");
    }

    #[test]
    fn a_lost_tee_is_known_by_what_the_node_was() {
        let found = serde_json::to_string(&tee_lost_error()).unwrap();
        for (tee, state, status, lost) in [
            (Tee::None, Some("on"), None, true),
            (Tee::None, Some("ppcie"), None, true),
            (Tee::None, Some("failed"), Some(found.as_str()), true),
            (Tee::None, Some("failed"), Some("{}"), false),
            (Tee::None, Some("off"), None, false),
            (Tee::None, None, None, false),
            (Tee::SevSnp, Some("on"), Some(found.as_str()), false),
        ] {
            assert_eq!(tee_lost(tee, state, status), lost, "{tee:?} {state:?}");
        }
    }

    #[test]
    fn every_code_has_a_row_in_the_documentation() {
        fn sources(folder: &std::path::Path) -> Vec<String> {
            let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
            entries
                .flat_map(
                    |path| {
                        if path.is_dir() { sources(&path) } else { vec![std::fs::read_to_string(&path).unwrap()] }
                    },
                )
                .collect()
        }
        fn code_of(line: &str) -> Option<&str> {
            let (_, rest) = line
                .split_once("code: \"")
                .or_else(|| line.split_once("code = \""))
                .or_else(|| line.split_once("TEE_LOST: &str = \""))?;
            rest.split('"').next()
        }
        let sources = sources(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")));
        let is_code = |code: &&str| !code.is_empty() && code.chars().all(|letter| letter.is_ascii_alphabetic());
        let codes: std::collections::BTreeSet<&str> = sources
            .iter()
            .flat_map(|source| source.split("#[cfg(test)]").next().unwrap_or_default().lines())
            .filter_map(code_of)
            .filter(is_code)
            .collect();
        assert!(codes.len() > 8 && codes.contains(TEE_LOST), "{codes:?}");
        let page = include_str!("../../../docs/troubleshooting.md").split("## Codes of cc-manager").nth(1).unwrap();
        let missing: Vec<&&str> = codes.iter().filter(|code| !page.contains(&format!("`{code}`"))).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn an_unknown_mode_names_the_label_and_the_allowed_values() {
        let error = unknown_mode("bananas", Source::Label);
        for part in ["nvidia.com/cc.mode", "bananas", "off, on, devtools, ppcie"] {
            assert!(error.message.contains(part), "{}", error.message);
        }
        assert!(unknown_mode("x", Source::Default).message.contains("DEFAULT_CC_MODE"));
    }

    fn inventory(gpus: &[(&str, u16)]) -> Inventory {
        let fake = FakeSysfs::new();
        for (index, (bdf, device)) in gpus.iter().enumerate() {
            fake.gpu(*bdf, *device).group(u32::try_from(index).unwrap() + 1);
        }
        Inventory::scan(&fake.root())
    }

    fn verified(inventory: &Inventory, mode: &str) -> DevicesFile {
        let devices = inventory
            .gpus()
            .map(|gpu| DeviceRecord {
                configured_mode: Some(mode.to_owned()),
                active_mode: Some(mode.to_owned()),
                verified_at: Some(jiff::Timestamp::UNIX_EPOCH),
                usable: true,
                ..blank(gpu, &Part::Mode(Mode::Off))
            })
            .collect();
        DevicesFile { origin: Origin::now("boot", None), transition: None, devices }
    }

    const A: &str = "0000:41:00.0";
    const B: &str = "0000:42:00.0";

    fn changes(action: &Action) -> Option<(Vec<String>, bool)> {
        match action {
            Action::Change { devices, whole, .. } => {
                Some((devices.iter().map(|device| device.bdf.to_string()).collect(), *whole))
            }
            _ => None,
        }
    }

    #[test]
    fn what_is_verified_in_this_boot_is_left_alone() {
        let both = inventory(&[(A, H100), (B, H100)]);
        let all = vec![A.to_owned(), B.to_owned()];
        assert_eq!(changes(&plan(&both, Mode::On, None)), Some((all.clone(), true)), "nothing is known");
        let mut known = verified(&both, "on");
        assert_eq!(plan(&both, Mode::On, Some(&known)), Action::Settled { refused: vec![] });
        assert_eq!(changes(&plan(&both, Mode::Off, Some(&known))), Some((all.clone(), true)), "another mode");

        known.transition = Some(Transition {
            target: "on".to_owned(),
            step: "changing".to_owned(),
            started_at: jiff::Timestamp::UNIX_EPOCH,
        });
        assert_eq!(changes(&plan(&both, Mode::On, Some(&known))), Some((all, true)), "an interrupted transition");
        known.transition = None;

        let only_b = Some((vec![B.to_owned()], false));
        for (what, spoil) in [
            ("configured", (|record| record.configured_mode = Some("off".to_owned())) as fn(&mut DeviceRecord)),
            ("active", |record| record.active_mode = None),
            ("never read", |record| record.verified_at = None),
            ("another model", |record| record.identity.ids = "10de:2335".to_owned()),
            ("another device", |record| record.identity.instance = Some(0)),
            ("another address", |record| record.bdf = "0000:99:00.0".parse().unwrap()),
        ] {
            let mut known = known.clone();
            spoil(&mut known.devices[1]);
            assert_eq!(changes(&plan(&both, Mode::On, Some(&known))), only_b, "{what}");
        }
    }

    #[test]
    fn what_cannot_be_in_the_mode_is_named_before_anything_is_touched() {
        let mixed = inventory(&[(A, H100), (B, A100)]);
        for mode in [Mode::On, Mode::Devtools] {
            let Action::Impossible(faults) = plan(&mixed, mode, None) else { panic!("{mode}") };
            assert_eq!(faults.len(), 1);
            assert!(faults[0].error.message.contains(B), "{}", faults[0].error.message);
        }
        assert_eq!(
            changes(&plan(&mixed, Mode::Off, None)),
            Some((vec![A.to_owned()], true)),
            "off needs only the H100"
        );
        assert_eq!(plan(&inventory(&[(B, A100)]), Mode::Off, None), Action::Settled { refused: vec![] });
    }

    #[test]
    fn off_goes_on_without_those_that_nobody_knows() {
        let mixed = inventory(&[(A, H100), (B, UNKNOWN)]);
        assert!(matches!(plan(&mixed, Mode::On, None), Action::Impossible(faults) if faults.len() == 1));
        let Action::Change { devices, whole: true, refused } = plan(&mixed, Mode::Off, None) else { panic!() };
        assert_eq!((devices.len(), devices[0].bdf.to_string().as_str()), (1, A));
        assert!(refused[0].error.code == "UnknownDevice" && refused[0].bdf.to_string() == B);
        let mut known = verified(&mixed, "off");
        assert_eq!(plan(&mixed, Mode::Off, Some(&known)), Action::Settled { refused });
        // Not even a record of its own makes it one that may be offered.
        known.devices[1].verified_at = Some(jiff::Timestamp::UNIX_EPOCH);
        let usable: Vec<bool> =
            records(&mixed, Some(Mode::Off), Some(&known), &[]).iter().map(|record| record.usable).collect();
        assert_eq!(usable, [true, false]);
    }

    #[test]
    fn switches_have_a_mode_of_their_own() {
        let fake = FakeSysfs::new();
        fake.gpu(A, H100).group(1);
        fake.nvswitch(B).group(2);
        let node = Inventory::scan(&fake.root());
        let all = vec![A.to_owned(), B.to_owned()];
        for mode in Mode::ALL {
            assert_eq!(changes(&plan(&node, mode, None)), Some((all.clone(), true)), "{mode}");
        }
        let mut known = verified(&node, "on");
        known.devices.push(DeviceRecord {
            configured_mode: Some("off".to_owned()),
            active_mode: Some("off".to_owned()),
            verified_at: Some(jiff::Timestamp::UNIX_EPOCH),
            ..blank(node.nvswitches().next().unwrap(), &Part::Mode(Mode::Off))
        });
        assert_eq!(plan(&node, Mode::On, Some(&known)), Action::Settled { refused: vec![] });
        assert!(records(&node, Some(Mode::On), Some(&known), &[]).iter().all(|record| record.usable));
        assert_eq!(changes(&plan(&node, Mode::Ppcie, Some(&known))), Some((all, true)));
        assert_eq!(changes(&plan(&node, Mode::Off, Some(&known))), Some((vec![A.to_owned()], false)));
    }

    #[test]
    fn no_gpus_and_no_sysfs_are_different_things() {
        assert_eq!(plan(&inventory(&[]), Mode::On, None), Action::NoGpus);
        let empty = tempfile::tempdir().unwrap();
        let blind = Inventory::scan(&hw_probe::SysRoot::at(empty.path()));
        assert!(matches!(plan(&blind, Mode::On, None), Action::Blind(error) if error.code == "SysfsUnreadable"));
    }

    #[test]
    fn a_function_that_cannot_be_told_apart_may_be_a_gpu() {
        let fake = FakeSysfs::new();
        fake.gpu(A, H100).group(1);
        fake.gpu(B, H100).group(2).attr("class", "nonsense\n");
        let Action::Blind(error) = plan(&Inventory::scan(&fake.root()), Mode::On, None) else { panic!("not blind") };
        assert!(error.code == "SysfsUnreadable" && error.message.contains(B), "{}", error.message);
    }

    #[test]
    fn only_what_is_verified_in_the_wanted_mode_may_be_offered() {
        let both = inventory(&[(A, H100), (B, A100)]);
        let gpus: Vec<PciFunction> = both.gpus().cloned().collect();
        let mut interrupted = verified(&both, "off");
        interrupted.transition = Some(Transition {
            target: "off".to_owned(),
            step: "changing".to_owned(),
            started_at: jiff::Timestamp::UNIX_EPOCH,
        });
        let mut half = verified(&both, "off");
        half.devices[0].configured_mode = Some("on".to_owned());
        let mut unread = verified(&both, "off");
        unread.devices[0].verified_at = None;
        let mut replaced = verified(&both, "off");
        replaced.devices[0].identity.ids = "10de:2335".to_owned();
        let mut put_back = verified(&both, "off");
        put_back.devices[0].identity.instance = Some(0);
        let mut failed = verified(&both, "off");
        failed.devices[0].error = Some(ErrorRecord { code: "InUse".to_owned(), message: String::new() });
        let known = verified(&both, "off");
        let changing = &gpus[..];
        // What is known, what is wanted, what is being changed, and which of the H100 and the A100 may be offered.
        for (what, known, mode, changing, usable) in [
            ("verified", Some(&known), Some(Mode::Off), &[][..], [true, true]),
            ("another mode", Some(&known), Some(Mode::On), &[], [false, false]),
            ("no mode", Some(&known), None, &[], [false, false]),
            ("in transition", Some(&known), Some(Mode::Off), changing, [false, false]),
            ("nothing known", None, Some(Mode::Off), &[], [false, true]),
            ("interrupted", Some(&interrupted), Some(Mode::Off), &[], [false, true]),
            ("other knobs", Some(&half), Some(Mode::Off), &[], [false, true]),
            ("never read", Some(&unread), Some(Mode::Off), &[], [false, true]),
            ("another model", Some(&replaced), Some(Mode::Off), &[], [false, true]),
            ("put back", Some(&put_back), Some(Mode::Off), &[], [false, true]),
            ("an old error", Some(&failed), Some(Mode::Off), &[], [true, true]),
        ] {
            let records = records(&both, mode, known, changing);
            assert_eq!(records.iter().map(|record| record.usable).collect::<Vec<_>>(), usable, "{what}");
            assert!(records.iter().all(|record| !record.usable || record.error.is_none()), "{what}");
        }
    }

    #[test]
    fn records_follow_the_devices() {
        let both = inventory(&[(A, H100), (B, A100)]);
        let gpus: Vec<PciFunction> = both.gpus().cloned().collect();
        let before = records(&both, Some(Mode::Off), None, &gpus[..1]);
        assert_eq!(before.iter().map(|record| record.usable).collect::<Vec<_>>(), [false, true]);

        let known = verified(&both, "off");
        let mut after = records(&both, Some(Mode::On), Some(&known), &gpus);
        assert!(after.iter().all(|record| !record.usable && record.active_mode.as_deref() == Some("off")));
        let fault = DeviceFault {
            bdf: gpus[1].bdf,
            busy: false,
            untouched: false,
            error: ErrorRecord { code: "BootTimeout".to_owned(), message: String::new() },
            holders: Vec::new(),
        };
        let results = [
            DeviceResult {
                bdf: gpus[0].bdf,
                result: Ok(crate::Verified {
                    configured: "on".to_owned(),
                    active: "on".to_owned(),
                    at: jiff::Timestamp::UNIX_EPOCH,
                }),
            },
            DeviceResult { bdf: gpus[1].bdf, result: Err(fault.clone()) },
        ];
        apply_results(&mut after, &results);
        assert!(after[0].usable && is_verified(&after[0], Mode::On));
        assert!(!after[1].usable && after[1].active_mode.is_none() && after[1].error.as_ref() == Some(&fault.error));

        let mut untouched = records(&both, Some(Mode::On), Some(&known), &gpus);
        apply_faults(&mut untouched, &[fault]);
        assert_eq!(untouched[1].active_mode.as_deref(), Some("off"), "what was known of an untouched device stays");
        assert!(!untouched[1].usable);

        // Busy on the way from off to on, and the label is set back to off: nothing is wrong with it in off.
        let known = DevicesFile { devices: untouched, ..known };
        assert_eq!(plan(&both, Mode::Off, Some(&known)), Action::Settled { refused: vec![] });
        let settled = records(&both, Some(Mode::Off), Some(&known), &[]);
        assert!(settled.iter().all(|record| record.usable && record.error.is_none()));
    }

    #[test]
    fn protected_pcie_is_offered_whole_or_not_at_all() {
        let both = inventory(&[(A, H100), (B, H100)]);
        let usable = |mode, broken: bool| {
            let mut records = verified(&both, "ppcie").devices;
            if broken {
                records[1].usable = false;
            }
            all_or_none(mode, &mut records);
            records.iter().map(|record| record.usable).collect::<Vec<_>>()
        };
        assert_eq!(usable(Some(Mode::Ppcie), false), [true, true]);
        assert_eq!(usable(Some(Mode::Ppcie), true), [false, false]);
        assert_eq!(usable(Some(Mode::On), true), [true, false], "the others are as good as before");
    }
}
