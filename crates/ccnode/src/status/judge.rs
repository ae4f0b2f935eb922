//! The verdict: from facts to one line. No I/O.

use agent_core::state::{CcStatus, DevicesFile, ErrorRecord, HolderRecord};
use hw_probe::Bdf;
use jiff::Timestamp;
use node_object::{labels, operands};
use serde::Serialize;

use super::facts::{Answer, Facts, Host, Manager, NodeFacts, Records};
use super::units;
use crate::agents::is_name;
use crate::mode::census;

/// What the node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every device is verified in the wanted mode, and the labels say so.
    Ready,
    /// A change is under way.
    Changing,
    /// Something is in the way.
    NotReady,
    /// It cannot be told.
    Unknown,
}

/// The verdict and its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Judgement {
    pub(super) verdict: Verdict,
    /// Since when it is so, where that is known.
    pub(super) since: Option<Timestamp>,
    /// Why, and what to do.
    pub(super) reason: String,
    /// A change under way: its target and its step.
    pub(super) transition: Option<Change>,
}

/// A change under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Change {
    pub(super) target: String,
    pub(super) step: Option<String>,
    pub(super) started_at: Timestamp,
}

impl Verdict {
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::Changing => "CHANGING",
            Self::NotReady => "NOT READY",
            Self::Unknown => "UNKNOWN",
        }
    }
}

impl Judgement {
    fn of(verdict: Verdict, since: Option<Timestamp>, reason: impl Into<String>) -> Self {
        Self { verdict, since, reason: reason.into(), transition: None }
    }

    /// The first line.
    pub(super) fn line(&self, now: Timestamp) -> String {
        let since = self.since.map(|since| format!(" {}", age(since, now))).unwrap_or_default();
        format!("{}{since}: {}", self.verdict.words(), self.reason)
    }
}

/// How long ago, in its largest unit; the future is now.
pub(super) fn age(at: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(at.as_second()).max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Judges. What is found first, in this order, decides: what cannot be told, a change under way, devices that are missing, what
/// cc-manager says on the node object, what it wrote on the host, the labels.
pub(super) fn judge(facts: &Facts) -> Judgement {
    let unknown = |why: String| Judgement::of(Verdict::Unknown, None, why);
    match &facts.node {
        Answer::NotAsked(why) | Answer::Failed(why) if facts.host.is_none() => {
            return unknown(format!("neither host files nor node object can be seen: {why}"));
        }
        _ => {}
    }
    if let Some(host) = &facts.host {
        if let Some(blind) = &host.blind {
            return unknown(format!(
                "it cannot be told which GPUs this node has: {blind}; do: see that /sys is readable"
            ));
        }
        if let Records::Unreadable(why) = &host.records {
            return unknown(format!(
                "what was verified cannot be read: {why}; do: run as root, on the host or with --root"
            ));
        }
    }
    if let Some(judgement) = under_way(facts) {
        return judgement;
    }
    let checks = [missing, by_node, by_host, by_labels];
    checks.iter().find_map(|check| check(facts)).unwrap_or_else(|| ready(facts))
}

fn manager(facts: &Facts) -> &Manager {
    facts.host.as_ref().map_or(&Manager::NotSeen, |host| &host.manager)
}

fn not_ready(since: Option<Timestamp>, reason: impl Into<String>) -> Judgement {
    Judgement::of(Verdict::NotReady, since, reason)
}

fn under_way(facts: &Facts) -> Option<Judgement> {
    let on_host =
        facts.host.as_ref().and_then(Host::file).and_then(|file| file.transition.as_ref()).map(|transition| {
            let (target, step) = (transition.target.clone(), Some(transition.step.clone()));
            Change { target, step, started_at: transition.started_at }
        });
    let journal = match facts.node().map(|node| &node.transition) {
        Some(Err(why)) if on_host.is_none() => {
            return Some(not_ready(None, format!("{why}; do: ccnode cleanup, where cc-manager does not replace it")));
        }
        Some(Ok(journal)) => journal.as_ref(),
        _ => None,
    };
    let on_node = journal.map(|journal| {
        let (target, started_at) = (journal.target.clone(), journal.started_at);
        Change { target, step: None, started_at }
    });
    let boot_id = facts.host.as_ref().and_then(|host| host.boot_id.as_deref());
    let is_old = journal.is_some_and(|journal| boot_id.is_some_and(|boot_id| journal.boot_id != boot_id));
    let was_on_host = on_host.is_some();
    let change = on_host.or(on_node)?;
    let Change { target, step, started_at } = &change;
    let mut judgement = if *manager(facts) == Manager::Gone {
        let cure = "start cc-manager, which finishes it, or ccnode cleanup where it is gone for good";
        let reason = format!("a change to mode {target} was cut short, and cc-manager does not run here; do: {cure}");
        not_ready(Some(*started_at), reason)
    } else {
        let step = step.as_ref().map(|step| format!(" ({step})")).unwrap_or_default();
        let before = if is_old && !was_on_host { ", begun before this boot; cc-manager finishes it" } else { "" };
        Judgement::of(Verdict::Changing, Some(*started_at), format!("to mode {target}{step}{before}"))
    };
    judgement.transition = Some(change);
    Some(judgement)
}

fn missing(facts: &Facts) -> Option<Judgement> {
    let host = facts.host.as_ref()?;
    let told = facts.current_status().map(|status| status.devices.as_slice()).unwrap_or_default();
    let mut gone = host.gone();
    gone.extend(told.iter().map(|device| device.bdf).filter(|bdf| !host.parts.iter().any(|part| part.bdf == *bdf)));
    gone.sort_unstable();
    gone.dedup();
    if let Some(first) = gone.first() {
        let more = more(gone.len());
        let reason = format!(
            "{first}{more} verified in this boot, and not there any more; do: ccnode doctor, and the kernel's log"
        );
        return Some(not_ready(None, reason));
    }
    let none = host.parts.is_empty();
    none.then(|| not_ready(None, "there is no NVIDIA GPU or NVSwitch on this node; do: ccnode probe"))
}

/// What cc-manager says on the node object.
fn by_node(facts: &Facts) -> Option<Judgement> {
    let node = facts.node()?;
    let status = match (&node.status, facts.current_status()) {
        (Err(why), _) => {
            return Some(Judgement::of(Verdict::Unknown, None, format!("{why}; do: see cc-manager's log")));
        }
        (Ok(_), Some(status)) => status,
        (Ok(told), None) => return Some(nothing_told(facts, told.is_some())),
    };
    let since = status.since;
    let asked = node.state.label(labels::CC_MODE).filter(|label| !label.is_empty());
    if let Some(asked) = asked.filter(|asked| *asked != status.wanted) {
        let what = format!("the label asks for mode {asked}, and cc-manager still says {:?}", status.wanted);
        return Some(match manager(facts) {
            Manager::Gone => not_ready(None, format!("{what} and does not run here; do: start cc-manager")),
            Manager::Runs(_) | Manager::NotSeen => {
                let cure = "do: wait for the hold-down and for devices in use, or see cc-manager's log";
                Judgement::of(Verdict::Changing, None, format!("{what}; {cure}"))
            }
        });
    }
    match status.result.as_str() {
        "applied" => {
            let errors = errors(status);
            if let Some(reason) = first(&errors) {
                return Some(not_ready(since, reason));
            }
            status
                .devices
                .is_empty()
                .then(|| not_ready(since, "cc-manager tells of no device; do: ccnode probe on the node"))
        }
        "failed" => Some(not_ready(since, failure(status))),
        "not-begun" => Some(not_ready(since, held(facts, status).unwrap_or_else(|| failure(status)))),
        "observed" => {
            let what = status.error.as_ref().map_or("", |error| error.message.as_str());
            let reason =
                format!("cc-manager only observes this node (CCNODE_MODE=observe) and answers for nothing: {what}");
            Some(Judgement::of(Verdict::Unknown, since, reason))
        }
        other => {
            let reason =
                format!("cc-manager says {other:?}, which this version of ccnode does not know; do: use its own");
            Some(Judgement::of(Verdict::Unknown, since, reason))
        }
    }
}

fn nothing_told(facts: &Facts, has_old: bool) -> Judgement {
    let what =
        if has_old { "cc-manager has told nothing of this boot" } else { "cc-manager has told nothing of this node" };
    match manager(facts) {
        Manager::Gone => not_ready(None, format!("{what}, and does not run here; do: start cc-manager")),
        Manager::Runs(agent) => not_ready(
            None,
            format!(
                "{what}; do: see the log of process {} ({}), and whether it reaches the API server",
                agent.pid, agent.name
            ),
        ),
        Manager::NotSeen => not_ready(None, format!("{what}; do: see whether it runs, and its log")),
    }
}

/// Every error of the node, the devices' own first.
fn errors(status: &CcStatus) -> Vec<&ErrorRecord> {
    let own = status.devices.iter().filter_map(|device| device.error.as_ref());
    own.chain(&status.error).collect()
}

/// The first error; the others are told below the table.
fn first(errors: &[&ErrorRecord]) -> Option<String> {
    Some(errors.first()?.message.clone())
}

fn failure(status: &CcStatus) -> String {
    let unsaid = || format!("mode {} is not applied, and cc-manager does not say why; do: see its log", status.wanted);
    first(&errors(status)).unwrap_or_else(unsaid)
}

/// Who is in the way of a change, and what can be done about it.
fn held(facts: &Facts, status: &CcStatus) -> Option<String> {
    let in_use = |code: &str| matches!(code, "InUse" | "LockHeld");
    let mut holders = status.holders.clone();
    if holders.is_empty() && status.error.as_ref().is_some_and(|error| in_use(&error.code)) {
        let host = facts.host.as_ref()?;
        holders = host.parts.iter().flat_map(|part| host.holders_of(part)).collect();
    }
    let holder = holders.first()?;
    let mut devices: Vec<Bdf> = holders.iter().map(|holder| holder.bdf).collect();
    devices.sort_unstable();
    devices.dedup();
    let mut whose: Vec<String> = holders.iter().map(name).collect();
    whose.sort_unstable();
    whose.dedup();
    let others =
        if whose.len() > 1 { format!(" and {}", count(whose.len() - 1, "other", "others")) } else { String::new() };
    let cure = match (pod_of(holder), holder.pid) {
        (Some((namespace, pod)), _) => format!("kubectl delete pod -n {namespace} {pod}"),
        (None, Some(pid)) => format!("stop what process {pid} is"),
        (None, None) => "stop what uses it".to_owned(),
    };
    Some(format!(
        "{}{} held by {}{others}; do: {cure}, or wait: mode {} follows when all are free",
        holder.bdf,
        more(devices.len()),
        name(holder),
        status.wanted
    ))
}

/// Namespace and name of a holder's pod, if they are such.
fn pod_of(holder: &HolderRecord) -> Option<(&str, &str)> {
    let (namespace, pod) = holder.pod.as_deref()?.split_once('/')?;
    (is_name(namespace) && is_name(pod)).then_some((namespace, pod))
}

/// A holder for people.
pub(super) fn name(holder: &HolderRecord) -> String {
    match (&holder.pod, holder.pid, &holder.comm) {
        (Some(pod), Some(pid), _) => format!("{pod} (pid {pid})"),
        (Some(pod), None, _) => pod.clone(),
        (None, Some(pid), Some(comm)) => format!("pid {pid} ({comm})"),
        (None, Some(pid), None) => format!("pid {pid}"),
        (None, None, Some(comm)) => comm.clone(),
        (None, None, None) => "somebody".to_owned(),
    }
}

/// What the host's own records say.
fn by_host(facts: &Facts) -> Option<Judgement> {
    let host = facts.host.as_ref()?;
    let file = match &host.records {
        Records::Read(file) => file,
        // In a container that does not see the file the node object has the same.
        Records::Absent if facts.current_status().is_some() && host.manager != Manager::Gone => return None,
        Records::Absent | Records::Unreadable(_) => {
            let what = "no device was verified in this boot";
            return Some(not_ready(
                None,
                match &host.manager {
                    Manager::Runs(agent) => {
                        format!("{what}; do: see the log of process {} ({})", agent.pid, agent.name)
                    }
                    Manager::Gone => format!("{what}, and cc-manager does not run here; do: start cc-manager"),
                    Manager::NotSeen => format!("{what}; do: see whether cc-manager runs, and its log"),
                },
            ));
        }
    };
    let since = Some(file.origin.written_at);
    let find = |bdf: Bdf| file.devices.iter().find(|record| record.bdf == bdf);
    if let Some(error) = host.parts.iter().find_map(|part| file.record(part)?.error.as_ref()) {
        return Some(not_ready(since, error.message.clone()));
    }
    host.parts.iter().find_map(|part| {
        let bdf = part.bdf;
        let reason = match (file.record(part), find(bdf)) {
            (Some(record), _) if record.usable => return None,
            (Some(record), _) => match (&record.active_mode, record.verified_at) {
                (Some(mode), Some(_)) => {
                    format!("{bdf} is verified in mode {mode}, which is not what is wanted; do: see cc-manager's log")
                }
                _ => format!("{bdf} is not verified; do: wait for cc-manager, or see its log"),
            },
            (None, Some(_)) => {
                format!("{bdf} is not the device that was verified; do: wait for cc-manager, which looks again")
            }
            (None, None) => format!("{bdf} was not verified in this boot; do: wait for cc-manager, or see its log"),
        };
        Some(not_ready(since, reason))
    })
}

/// Whether the labels say what the devices are.
fn by_labels(facts: &Facts) -> Option<Judgement> {
    let NodeFacts { state, .. } = facts.node()?;
    let status = facts.current_status()?;
    let open = match status.wanted.as_str() {
        "on" | "ppcie" => "true",
        "off" => "false",
        _ => "",
    };
    let cure = match manager(facts) {
        Manager::Gone => "start cc-manager, which puts it right",
        Manager::Runs(_) | Manager::NotSeen => "wait for cc-manager, which puts it right, or see its log",
    };
    for (label, wanted) in [(labels::CC_MODE_STATE, status.wanted.as_str()), (labels::CC_READY_STATE, open)] {
        let found = state.label(label);
        if found.unwrap_or_default() != wanted {
            let found = found.map_or_else(|| "is absent".to_owned(), |found| format!("says {found:?}"));
            let reason = format!("every device is in mode {}, and label {label} {found}; do: {cure}", status.wanted);
            return Some(not_ready(None, reason));
        }
    }
    let paused = operands::all_paused(state).next()?;
    Some(not_ready(None, format!("{paused} is paused although no change is under way; do: {cure}, or ccnode cleanup")))
}

fn ready(facts: &Facts) -> Judgement {
    let status = facts.current_status();
    let file = facts.host.as_ref().and_then(Host::file);
    let mode = status.map_or_else(|| file.map_or_else(String::new, own_mode), |status| status.wanted.clone());
    let devices = match &facts.host {
        Some(host) => census(host.parts.iter()),
        None => count(status.map_or(0, |status| status.devices.len()), "device", "devices"),
    };
    let verified = file.and_then(|file| file.devices.iter().filter_map(|record| record.verified_at).max());
    let since = status.and_then(|status| status.since).or(verified);
    Judgement::of(Verdict::Ready, since, format!("mode {mode}, {devices} verified"))
}

/// The mode that the devices are in, by their records: switches are off in all modes but one.
fn own_mode(file: &DevicesFile) -> String {
    let mut modes: Vec<&str> = file.devices.iter().filter_map(|record| record.active_mode.as_deref()).collect();
    modes.sort_unstable();
    modes.dedup();
    if modes.len() > 1 {
        modes.retain(|mode| *mode != "off");
    }
    if modes.is_empty() { "unknown".to_owned() } else { modes.join(" and ") }
}

/// What nobody may take the labels for.
pub(super) const NO_PROOF: &str = "The host is outside the trusted base: nvidia.com/cc.ready.state=true is a scheduling hint, and only \
                                   attestation inside the virtual machine is proof";

/// What else is to be told.
pub(super) fn remarks(facts: &Facts, verdict: Verdict) -> Vec<String> {
    let mut remarks = facts.remarks.clone();
    if let Some(host) = &facts.host {
        if host.manager == Manager::Gone {
            remarks.push("cc-manager does not run here: nothing keeps this node in its mode".to_owned());
        }
        if let (Records::Absent, Some(_)) = (&host.records, facts.current_status()) {
            remarks.push("devices.json is not to be seen here: modes are those of the node object".to_owned());
        }
        if let (Some(_), None) = (facts.status(), facts.current_status()) {
            remarks.push("What the node object says of the devices is of another boot".to_owned());
        }
        for part in host.parts.iter().filter(|part| verdict == Verdict::Ready && !part.is_vfio_bound()) {
            let driver = part.driver.as_deref().unwrap_or("none");
            remarks
                .push(format!("{}: Not offered: its driver is {driver}, and vfio-manager binds it to VFIO", part.bdf));
        }
        remarks.extend(units::remarks(host));
    }
    let open = facts.node().and_then(|node| node.state.label(labels::CC_READY_STATE));
    if let Some(open) = open.filter(|open| !open.is_empty() && verdict != Verdict::Ready) {
        remarks.push(format!("Label {} says {open:?} meanwhile: pods come here by it", labels::CC_READY_STATE));
    }
    if open == Some("true") && verdict == Verdict::Ready {
        remarks.push(NO_PROOF.to_owned());
    }
    remarks
}

fn more(devices: usize) -> String {
    if devices > 1 { format!(" and {} more", devices - 1) } else { String::new() }
}

fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
