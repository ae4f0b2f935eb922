//! What the node object is told, and how.

use std::collections::BTreeMap;

use agent_core::state::{CcStatus, DeviceRecord, DeviceStatus, ErrorRecord, HolderRecord, SCHEMA};
use gpu_firmware::Mode;
use node_object::{Change, NodeState, annotations, labels, operands};
use serde::{Deserialize, Serialize};

/// How the last attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Every device is verified in the mode.
    Applied(Mode),
    /// An attempt failed, or what was asked for is impossible.
    Failed,
    /// No attempt could begin, because devices are in use or the state file cannot be written: the mode is what it was, and
    /// not known of every device.
    NotBegun,
    /// Only looked at: nothing that others read is said.
    Observed,
    /// No attempt could begin, because devices are in use; every device is verified in this other mode, and stays offered.
    Held(Mode),
}

impl Verdict {
    fn word(&self) -> &'static str {
        match self {
            Self::Applied(_) => "applied",
            Self::Failed => "failed",
            Self::NotBegun | Self::Held(_) => "not-begun",
            Self::Observed => "observed",
        }
    }

    /// `cc.mode.state`, where it is to be written.
    pub(crate) fn mode_state(&self) -> Option<&'static str> {
        match self {
            Self::Applied(mode) | Self::Held(mode) => Some(mode.as_str()),
            Self::Failed => Some("failed"),
            Self::NotBegun | Self::Observed => None,
        }
    }

    /// `cc.ready.state` (operator-contract section 2.1).
    pub(crate) fn ready_state(&self) -> &'static str {
        match self {
            Self::Applied(Mode::On | Mode::Ppcie) | Self::Held(Mode::On | Mode::Ppcie) => "true",
            Self::Applied(Mode::Off) | Self::Held(Mode::Off) => "false",
            Self::Applied(Mode::Devtools)
            | Self::Held(Mode::Devtools)
            | Self::Failed
            | Self::NotBegun
            | Self::Observed => "",
        }
    }
}

/// Everything a publication is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) node_uid: &'a str,
    pub(crate) boot_id: &'a str,
    pub(crate) wanted: &'a str,
    pub(crate) error: Option<&'a ErrorRecord>,
    pub(crate) holders: &'a [HolderRecord],
    pub(crate) devices: &'a [DeviceRecord],
}

/// What is to stand on the node object until the next attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Publication {
    pub(crate) verdict: Verdict,
    /// With the time when it became so, should it not stand already.
    pub(crate) status: CcStatus,
}

impl Publication {
    pub(crate) fn new(verdict: Verdict, facts: Facts<'_>) -> Self {
        let Facts { node_uid, boot_id, wanted, error, holders, devices } = facts;
        let status = CcStatus {
            schema: SCHEMA,
            node_uid: node_uid.to_owned(),
            boot_id: boot_id.to_owned(),
            wanted: wanted.to_owned(),
            result: verdict.word().to_owned(),
            since: Some(jiff::Timestamp::now()),
            error: error.cloned(),
            holders: holders.to_vec(),
            devices: devices.iter().map(DeviceStatus::from).collect(),
        };
        Self { verdict, status }
    }

    /// The result's word and the code, if there is an error to be told.
    pub(crate) fn failure(&self) -> Option<(&'static str, String)> {
        self.status.error.as_ref().map(|error| (self.verdict.word(), error.code.clone()))
    }

    /// The annotation's text, with the time since when the node is what it is.
    fn status(&self, node: &NodeState) -> String {
        let standing = node.annotation(annotations::CC_STATUS);
        let standing = standing.and_then(|text| serde_json::from_str::<CcStatus>(text).ok());
        let is_same = |standing: &CcStatus| {
            let key = |status: &CcStatus| {
                (status.node_uid.clone(), status.boot_id.clone(), status.wanted.clone(), status.result.clone())
            };
            key(standing) == key(&self.status)
        };
        let since = standing.filter(is_same).and_then(|standing| standing.since).or(self.status.since);
        // A struct of texts and numbers always has a JSON form.
        serde_json::to_string(&CcStatus { since, ..self.status.clone() }).unwrap_or_default()
    }

    /// The one patch: both labels together, the annotation, the components taken up again, no change under way.
    pub(crate) fn change(&self, node: &NodeState) -> Change {
        if self.verdict == Verdict::Observed {
            return Change::new().annotation(annotations::CC_STATUS, self.status(node));
        }
        let change = operands::take_up(node, Change::new())
            .without_annotation(annotations::TRANSITION)
            .label(labels::CC_READY_STATE, self.verdict.ready_state())
            .annotation(annotations::CC_STATUS, self.status(node));
        match self.verdict.mode_state() {
            Some(state) => change.label(labels::CC_MODE_STATE, state),
            None => change,
        }
    }
}

/// The annotation `ccnode.dev/transition`: what is under way, should we not live to end it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Journal {
    schema: u32,
    node_uid: String,
    boot_id: String,
    /// The wanted mode.
    target: String,
    started_at: jiff::Timestamp,
    /// The components' deploy labels before they were paused.
    labels: BTreeMap<String, String>,
}

impl Journal {
    /// One that begins now.
    pub(crate) fn begin(boot_id: &str, target: Mode) -> Self {
        Self {
            schema: SCHEMA,
            node_uid: String::new(),
            boot_id: boot_id.to_owned(),
            target: target.to_string(),
            started_at: jiff::Timestamp::now(),
            labels: BTreeMap::new(),
        }
    }

    /// The patch that begins a change: the gate is shut, the journal written, and the components are paused if `pause`.
    pub(crate) fn change(&self, node: &NodeState, pause: bool) -> Change {
        // Of a change that was cut short, what the labels were before it is still what they were.
        let before = node.annotation(annotations::TRANSITION).and_then(|text| serde_json::from_str::<Self>(text).ok());
        let labels = match before.filter(|before| before.node_uid == node.uid && operands::any_paused(node)) {
            Some(before) => before.labels,
            None => operands::present(node),
        };
        let journal = Self { node_uid: node.uid.clone(), labels, ..self.clone() };
        let change = Change::new()
            .label(labels::CC_READY_STATE, "")
            .annotation(annotations::TRANSITION, serde_json::to_string(&journal).unwrap_or_default());
        if pause { operands::pause(node, change) } else { change }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_follow_the_contract() {
        for (verdict, state, ready) in [
            (Verdict::Applied(Mode::On), Some("on"), "true"),
            (Verdict::Applied(Mode::Ppcie), Some("ppcie"), "true"),
            (Verdict::Applied(Mode::Off), Some("off"), "false"),
            (Verdict::Applied(Mode::Devtools), Some("devtools"), ""),
            (Verdict::Failed, Some("failed"), ""),
            (Verdict::NotBegun, None, ""),
            (Verdict::Observed, None, ""),
            (Verdict::Held(Mode::On), Some("on"), "true"),
            (Verdict::Held(Mode::Off), Some("off"), "false"),
            (Verdict::Held(Mode::Devtools), Some("devtools"), ""),
        ] {
            assert_eq!((verdict.mode_state(), verdict.ready_state()), (state, ready), "{verdict:?}");
        }
    }

    #[test]
    fn the_status_is_the_same_while_the_truth_is() {
        let error = ErrorRecord { code: "InUse".to_owned(), message: "0000:41:00.0: in use".to_owned() };
        let bdf = "0000:41:00.0".parse().unwrap();
        let holders = [HolderRecord { bdf, pid: Some(4711), comm: None, pod: Some("ns/name".to_owned()) }];
        let facts =
            Facts { node_uid: "u", boot_id: "b", wanted: "on", error: Some(&error), holders: &holders, devices: &[] };
        let told = |change: &Change| change.annotations[annotations::CC_STATUS].clone().unwrap();
        let mut node = NodeState::default();
        let first = Publication::new(Verdict::NotBegun, facts).change(&node);
        let since = serde_json::from_str::<CcStatus>(&told(&first)).unwrap().since.unwrap();
        assert_eq!(
            told(&first),
            format!(
                r#"{{"schema":1,"nodeUid":"u","bootId":"b","wanted":"on","result":"not-begun","since":"{since}","error":{{"code":"InUse","message":"0000:41:00.0: in use"}},"holders":[{{"bdf":"0000:41:00.0","pid":4711,"pod":"ns/name"}}],"devices":[]}}"#
            )
        );
        assert_eq!(first.labels.len(), 1, "a change that did not begin leaves cc.mode.state alone");

        // Found again later: not a byte is another one. Another error: since when the node waits is the same.
        node.annotations.insert(annotations::CC_STATUS.to_owned(), told(&first));
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(told(&Publication::new(Verdict::NotBegun, facts).change(&node)), told(&first));
        let other = Publication::new(Verdict::NotBegun, Facts { error: None, ..facts }).change(&node);
        assert_eq!(serde_json::from_str::<CcStatus>(&told(&other)).unwrap().since, Some(since));
        let later = Publication::new(Verdict::Failed, facts).change(&node);
        assert_ne!(serde_json::from_str::<CcStatus>(&told(&later)).unwrap().since, Some(since));

        let seen = Publication::new(Verdict::Observed, facts).change(&NodeState::default());
        assert_eq!(
            (seen.labels.len(), seen.annotations.len()),
            (0, 1),
            "whoever only looks says nothing that others read"
        );
    }

    const VFIO: &str = "nvidia.com/gpu.deploy.vfio-manager";

    #[test]
    fn a_journal_keeps_the_labels_of_before_the_first_attempt() {
        let mut node = NodeState { uid: "u".to_owned(), ..NodeState::default() };
        node.labels.insert(VFIO.to_owned(), "true".to_owned());
        let journal = Journal::begin("b", Mode::On);
        let first = journal.change(&node, true);
        assert_eq!(first.labels[labels::CC_READY_STATE].as_deref(), Some(""));
        assert_eq!(first.labels[VFIO].as_deref(), Some("paused-for-cc-mode-change"));
        let told = |change: &Change| {
            serde_json::from_str::<Journal>(change.annotations[annotations::TRANSITION].as_deref().unwrap()).unwrap()
        };
        assert_eq!((told(&first).labels[VFIO].as_str(), told(&first).node_uid.as_str()), ("true", "u"));
        // The same after a crash: the label now says "paused", the journal still says "true".
        node.labels.insert(VFIO.to_owned(), "paused-for-cc-mode-change".to_owned());
        node.annotations
            .insert(annotations::TRANSITION.to_owned(), first.annotations[annotations::TRANSITION].clone().unwrap());
        assert_eq!(told(&journal.change(&node, true)).labels[VFIO], "true");
        // A journal of another node under the same name says nothing.
        node.uid = "other".to_owned();
        assert_eq!(told(&journal.change(&node, true)).labels[VFIO], "paused-for-cc-mode-change");

        let last = Publication::new(
            Verdict::Failed,
            Facts { node_uid: "u", boot_id: "b", wanted: "on", error: None, holders: &[], devices: &[] },
        )
        .change(&node);
        assert_eq!(last.labels[VFIO].as_deref(), Some("true"));
        assert_eq!(last.annotations[annotations::TRANSITION], None);
        assert!(!journal.change(&node, false).labels.contains_key(VFIO));
    }
}
