//! What the process remembers between two rounds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use agent_core::backoff::Backoff;
use agent_core::state::{DevicesFile, ErrorRecord};
use gpu_firmware::Mode;
use hw_probe::{Bdf, Inventory, Problem};
use tokio::time::Instant;

use super::Settings;
use crate::publish::{Publication, Verdict};
use crate::releases::Releases;

/// What this process remembers between two rounds; all of it can be lost at any time.
pub(super) struct Memory {
    /// The label's value of the last round; none before the first.
    pub(super) label: Option<String>,
    /// The last value of the annotation that asks to try again.
    pub(super) retry_word: Option<String>,
    /// The UID of the node object of the last round.
    pub(super) node_uid: String,
    /// What stands, or is to stand, on the node object.
    pub(super) publication: Option<Publication>,
    /// The last `devices.json`, should the file be lost.
    pub(super) known: Option<DevicesFile>,
    /// Whether the file says the same.
    pub(super) on_disk: bool,
    /// Whether the readiness file has been made.
    pub(super) attempted: bool,
    /// When to look again.
    pub(super) next_round: Instant,
    /// When to try the publication again; none when it stands.
    pub(super) next_publish: Option<Instant>,
    pub(super) retry: Backoff,
    pub(super) api_retry: Backoff,
    /// The failures that were written since the last success, by result and code, and when each was.
    pub(super) told_failures: BTreeMap<(&'static str, String), Instant>,
    /// What became of each device in the last attempt that is on record.
    pub(super) audited: Vec<(Bdf, Option<String>)>,
    /// The devices of the last round, and when to look whether these are others by now.
    pub(super) seen: Seen,
    pub(super) look_at: Option<Instant>,
    /// When devices were last reset by us.
    pub(super) last_reset: Option<Instant>,
    /// When each device was seen to be in use.
    pub(super) releases: Releases,
    /// Devices that are in use and in the way of a change.
    pub(super) awaited: Vec<Bdf>,
    /// When to look at the devices' power again.
    pub(super) next_poll: Instant,
    /// What was last said of the scan, and what of the plan since the label's last change, so that it is said once.
    pub(super) problems: Vec<Problem>,
    pub(super) said: BTreeSet<String>,
    /// The error that the last event was about.
    pub(super) told: Option<ErrorRecord>,
}

/// The devices of a round: of each, which one it is, and its driver.
#[derive(Debug, Default)]
pub(super) struct Seen(pub(super) BTreeMap<Bdf, (Option<u64>, Option<String>)>);

impl Seen {
    pub(super) fn of(inventory: &Inventory) -> Self {
        let devices = inventory.gpus().chain(inventory.nvswitches());
        Self(devices.map(|device| (device.bdf, (device.instance, device.driver.clone()))).collect())
    }

    pub(super) fn instances(&self) -> Vec<(Bdf, Option<u64>)> {
        self.0.iter().map(|(bdf, (instance, _))| (*bdf, *instance)).collect()
    }
}

impl Memory {
    /// Nothing yet.
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            label: None,
            retry_word: None,
            node_uid: String::new(),
            publication: None,
            known: None,
            on_disk: false,
            attempted: false,
            next_round: Instant::now(),
            next_publish: None,
            retry: Backoff::new(settings.retry_min, settings.retry_max),
            api_retry: Backoff::new(Duration::from_millis(500).min(settings.retry_min), Duration::from_secs(30)),
            told_failures: BTreeMap::new(),
            audited: Vec::new(),
            seen: Seen::default(),
            look_at: None,
            last_reset: None,
            releases: Releases::default(),
            awaited: Vec::new(),
            next_poll: Instant::now() + settings.release_poll,
            problems: Vec::new(),
            said: BTreeSet::new(),
            told: None,
        }
    }

    /// Whether the last attempt was one to bring devices to this mode, and failed.
    pub(super) fn is_failing_in(&self, mode: Mode) -> bool {
        let failed = self.publication.as_ref().filter(|publication| publication.verdict == Verdict::Failed);
        failed.is_some_and(|publication| publication.status.wanted == mode.as_str())
    }

    /// Somebody wants something: what was waited with is done at once, and what was said is said again.
    pub(super) fn begin_anew(&mut self) {
        self.retry.reset();
        self.said.clear();
        self.told_failures.clear();
        self.audited.clear();
    }

    /// What is shown to people who look for a reason.
    pub(super) fn dump(&self, node: &str) -> String {
        let clock = |at: Instant| {
            let (now, here) = (jiff::Timestamp::now(), Instant::now());
            let shifted = match at.checked_duration_since(here) {
                Some(ahead) => now.checked_add(ahead),
                None => now.checked_sub(here - at),
            };
            shifted.ok().map(|at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
        };
        let publication = self.publication.as_ref();
        let dump = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "node": node,
            "label": self.label,
            "toBePublished": publication.map(|publication| &publication.status),
            "isPublished": publication.is_some() && self.next_publish.is_none(),
            "devicesFile": self.known,
            "devicesFileIsOnDisk": self.on_disk,
            "inUse": self.releases.in_use().map(|bdf| bdf.to_string()).collect::<Vec<_>>(),
            "inTheWay": self.awaited.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "lastReset": self.last_reset.and_then(clock),
            "nextRound": clock(self.next_round),
            "nextLookAtPower": clock(self.next_poll),
            "nextPublication": self.next_publish.and_then(clock),
            "problems": self.problems.iter().map(|problem| format!("{}: {}", problem.path, problem.message)).collect::<Vec<_>>(),
        });
        dump.to_string()
    }
}
