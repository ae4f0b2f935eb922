//! What the node object is told, and how.

use agent_core::state::{DeviceRecord, ErrorRecord, SCHEMA};
use gpu_firmware::Mode;
use hw_probe::Bdf;
use node_object::{Change, annotations, labels};
use serde::Serialize;

/// How the last attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Every device is verified in the mode.
    Applied(Mode),
    /// An attempt failed, or what was asked for is impossible.
    Failed,
    /// No attempt could begin, because devices are in use or the state file cannot be written: the mode is what it was.
    NotBegun,
}

impl Verdict {
    fn word(&self) -> &'static str {
        match self {
            Self::Applied(_) => "applied",
            Self::Failed => "failed",
            Self::NotBegun => "not-begun",
        }
    }

    /// `cc.mode.state`, where it is to be written.
    pub(crate) fn mode_state(&self) -> Option<&'static str> {
        match self {
            Self::Applied(mode) => Some(mode.as_str()),
            Self::Failed => Some("failed"),
            Self::NotBegun => None,
        }
    }

    /// `cc.ready.state` (operator-contract section 2.1).
    pub(crate) fn ready_state(&self) -> &'static str {
        match self {
            Self::Applied(Mode::On | Mode::Ppcie) => "true",
            Self::Applied(Mode::Off) => "false",
            Self::Applied(Mode::Devtools) | Self::Failed | Self::NotBegun => "",
        }
    }
}

/// The annotation `ccnode.dev/cc-status`. It holds nothing that changes while the truth does not.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status<'a> {
    schema: u32,
    node_uid: &'a str,
    boot_id: &'a str,
    wanted: &'a str,
    result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a ErrorRecord>,
    devices: Vec<Device<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Device<'a> {
    bdf: Bdf,
    ids: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    subsystem: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    configured_mode: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    active_mode: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verified_at: Option<jiff::Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a ErrorRecord>,
}

/// Everything a publication is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) node_uid: &'a str,
    pub(crate) boot_id: &'a str,
    pub(crate) wanted: &'a str,
    pub(crate) error: Option<&'a ErrorRecord>,
    pub(crate) devices: &'a [DeviceRecord],
}

/// What is to stand on the node object until the next attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Publication {
    pub(crate) verdict: Verdict,
    status: String,
}

impl Publication {
    pub(crate) fn new(verdict: Verdict, facts: Facts<'_>) -> Self {
        let Facts { node_uid, boot_id, wanted, error, devices } = facts;
        let devices = devices
            .iter()
            .map(|record| Device {
                bdf: record.bdf,
                ids: &record.identity.ids,
                subsystem: record.identity.subsystem.as_deref(),
                configured_mode: record.configured_mode.as_deref(),
                active_mode: record.active_mode.as_deref(),
                verified_at: record.verified_at,
                error: record.error.as_ref(),
            })
            .collect();
        let status = Status { schema: SCHEMA, node_uid, boot_id, wanted, result: verdict.word(), error, devices };
        // A struct of texts and numbers always has a JSON form.
        let status = serde_json::to_string(&status).unwrap_or_default();
        Self { verdict, status }
    }

    /// The one patch: both labels together, and the annotation.
    pub(crate) fn change(&self) -> Change {
        let change = Change::new()
            .label(labels::CC_READY_STATE, self.verdict.ready_state())
            .annotation(annotations::CC_STATUS, &*self.status);
        match self.verdict.mode_state() {
            Some(state) => change.label(labels::CC_MODE_STATE, state),
            None => change,
        }
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
        ] {
            assert_eq!((verdict.mode_state(), verdict.ready_state()), (state, ready), "{verdict:?}");
        }
    }

    #[test]
    fn the_status_is_the_same_while_the_truth_is() {
        let error = ErrorRecord { code: "InUse".to_owned(), message: "0000:41:00.0: in use".to_owned() };
        let facts = Facts { node_uid: "u", boot_id: "b", wanted: "on", error: Some(&error), devices: &[] };
        let one = Publication::new(Verdict::NotBegun, facts);
        assert_eq!(one, Publication::new(Verdict::NotBegun, facts));
        assert_eq!(
            one.status,
            r#"{"schema":1,"nodeUid":"u","bootId":"b","wanted":"on","result":"not-begun","error":{"code":"InUse","message":"0000:41:00.0: in use"},"devices":[]}"#
        );
        let change = one.change();
        assert_eq!(change.labels.len(), 1, "a change that did not begin leaves cc.mode.state alone");
    }
}
