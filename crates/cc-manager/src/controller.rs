//! The loop: watch the node, plan, act, publish.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use agent_core::backoff::Backoff;
use agent_core::hostfile::HostDir;
use agent_core::http::StateDump;
use agent_core::metrics::Metrics;
use agent_core::readiness;
use agent_core::shutdown::Shutdown;
use agent_core::state::{DeviceRecord, DevicesFile, ErrorRecord, HolderRecord, Origin, Transition};
use agent_core::text::chain;
use agent_core::uevents::DeviceEvents;
use gpu_firmware::{Cost, Mode};
use hw_probe::{Bdf, Inventory, PciFunction, Problem, SysRoot, Tee};
use node_object::{Change, Event, Events, NodeClient, NodeError, NodeState, NodeView, annotations, labels, operands};
use tokio::time::Instant;

use crate::allocations;
use crate::audit;
use crate::executor::{self, DeviceFault, DeviceResult, Firmware};
use crate::metrics::Counters;
use crate::plan::{self, Action, Source, Wanted};
use crate::publish::{Facts, Journal, Publication, Verdict};
use crate::releases::{Power, Releases};

/// What the command line decides.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Mode without a label; empty does nothing then.
    pub default_mode: String,
    /// Created after the first attempt; empty creates none.
    pub readiness_file: PathBuf,
    /// Directory of `devices.json`.
    pub state_dir: PathBuf,
    /// Time between looks at the devices when nothing happens.
    pub resync: Duration,
    /// First delay after a failure.
    pub retry_min: Duration,
    /// Longest delay after a failure.
    pub retry_max: Duration,
    /// How long a change may go on after the end was asked for.
    pub grace: Duration,
    /// The modes that may be asked for.
    pub allowed: Vec<Mode>,
    /// Whether a node that was ready for confidential pods and lost its TEE is left as it is, as a failure.
    pub hold_without_tee: bool,
    /// Nothing is done and nothing is said that others read.
    pub only_observe: bool,
    /// Least time between a change that reset devices and the next one to another mode.
    pub hold_down: Duration,
    /// How often to look, while a device is in use, whether it has been let go.
    pub release_poll: Duration,
    /// Socket of the kubelet's pod-resources service; where it is not there, nothing is known of pods.
    pub pod_resources: PathBuf,
    /// Least time between two patches of the node that tell of one failure that goes on.
    pub patch_pause: Duration,
    /// How the operator's components are paused during a change; none pauses none.
    pub pausing: Option<Pausing>,
    /// How long to wait for devices in use, with the node withdrawn; zero leaves everything as it is until they are free.
    pub busy_wait: Duration,
}

/// How the operator's components are paused during a change.
#[derive(Clone, Debug)]
pub struct Pausing {
    /// The namespace of their pods.
    pub namespace: String,
    /// How long to wait for the pods to end and for the kubelet to offer no GPU any more, before the change is given up and
    /// everything put back.
    pub patience: Duration,
}

/// The agent's loop, over a firmware that tests can replace.
pub struct Controller<F> {
    settings: Settings,
    node: NodeClient,
    firmware: Arc<F>,
    root: SysRoot,
    events: Events,
    counters: Counters,
    node_seen: readiness::Guard,
    first_attempt: readiness::Guard,
    dump: StateDump,
    memory: Memory,
}

/// What this process remembers between two rounds; all of it can be lost at any time.
struct Memory {
    /// The label's value of the last round; none before the first.
    label: Option<String>,
    /// The last value of the annotation that asks to try again.
    retry_word: Option<String>,
    /// The UID of the node object of the last round.
    node_uid: String,
    /// What stands, or is to stand, on the node object.
    publication: Option<Publication>,
    /// The last `devices.json`, should the file be lost.
    known: Option<DevicesFile>,
    /// Whether the file says the same.
    on_disk: bool,
    /// Whether the readiness file has been made.
    attempted: bool,
    /// When to look again.
    next_round: Instant,
    /// When to try the publication again; none when it stands.
    next_publish: Option<Instant>,
    retry: Backoff,
    api_retry: Backoff,
    /// What was last written of a failure, and when.
    told_failure: Option<(&'static str, Instant)>,
    /// What became of each device in the last attempt that is on record.
    audited: Vec<(Bdf, Option<String>)>,
    /// The devices of the last round, and when to look whether these are others by now.
    seen: Seen,
    look_at: Option<Instant>,
    /// When devices were last reset by us.
    last_reset: Option<Instant>,
    /// When each device was seen to be in use.
    releases: Releases,
    /// Devices that are in use and in the way of a change.
    awaited: Vec<Bdf>,
    /// When to look at the devices' power again.
    next_poll: Instant,
    /// What was last said of the scan, and what of the plan since the label's last change, so that it is said once.
    problems: Vec<Problem>,
    said: BTreeSet<String>,
    /// The error that the last event was about.
    told: Option<ErrorRecord>,
}

/// The devices of a round: of each, which one it is, and its driver.
#[derive(Debug, Default)]
struct Seen(BTreeMap<Bdf, (Option<u64>, Option<String>)>);

impl Seen {
    fn of(inventory: &Inventory) -> Self {
        let devices = inventory.gpus().chain(inventory.nvswitches());
        Self(devices.map(|device| (device.bdf, (device.instance, device.driver.clone()))).collect())
    }

    fn instances(&self) -> Vec<(Bdf, Option<u64>)> {
        self.0.iter().map(|(bdf, (instance, _))| (*bdf, *instance)).collect()
    }
}

impl Memory {
    /// Whether the last attempt was one to bring devices to this mode, and failed.
    fn is_failing_in(&self, mode: Mode) -> bool {
        let failed = self.publication.as_ref().filter(|publication| publication.verdict == Verdict::Failed);
        failed.is_some_and(|publication| publication.status.wanted == mode.as_str())
    }

    /// Somebody wants something: what was waited with is done at once, and what was said is said again.
    fn begin_anew(&mut self) {
        self.retry.reset();
        self.said.clear();
        self.told_failure = None;
        self.audited.clear();
    }

    /// What is shown to people who look for a reason.
    fn dump(&self, node: &str) -> String {
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

/// How a round ended.
enum Round {
    /// Nothing to do until something happens.
    Rest,
    /// To be tried again after a growing delay.
    Retry,
    /// To be tried again after this delay: it is too early for it.
    Later(Duration),
    /// The API server did not take what must be there before hardware is touched.
    ApiFailed(NodeError),
    /// The end was asked for.
    Ended,
}

impl<F: Firmware> Controller<F> {
    /// A controller that has done nothing yet.
    pub fn new(
        settings: Settings,
        node: NodeClient,
        firmware: Arc<F>,
        root: SysRoot,
        events: Events,
        readiness: &readiness::Registry,
        metrics: &Metrics,
    ) -> Self {
        let memory = Memory {
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
            told_failure: None,
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
        };
        Self {
            node_seen: readiness.register("node-watch"),
            first_attempt: readiness.register("first-attempt"),
            counters: Counters::register(metrics),
            settings,
            node,
            firmware,
            root,
            events,
            dump: StateDump::default(),
            memory,
        }
    }

    /// Shows what it knows and is about to do there.
    #[must_use]
    pub fn with_dump(mut self, dump: StateDump) -> Self {
        self.dump = dump;
        self
    }

    /// Works until shutdown. A change that is under way then is given the grace.
    pub async fn run(mut self, shutdown: Shutdown) {
        let mut view = self.node.subscribe();
        let mut device_events = DeviceEvents::subscribe();
        loop {
            let current = view.borrow_and_update().clone();
            match current {
                NodeView::Present(node) => {
                    self.node_seen.ready();
                    let grace = self.settings.grace;
                    if crate::within_grace(self.step(&node, &shutdown), &shutdown, grace).await.is_none() {
                        tracing::warn!(
                            event = "interrupted",
                            "Change is not finished within the grace; the next start will finish it"
                        );
                        return;
                    }
                }
                NodeView::Unknown => {}
                NodeView::Absent => self.node_seen.not_ready(),
            }
            self.poll_releases();
            self.dump.show(self.memory.dump(self.node.name()));
            let Memory { next_round, next_poll, next_publish, look_at, .. } = self.memory;
            let wake = [Some(next_poll), next_publish, look_at].into_iter().flatten().fold(next_round, Instant::min);
            let present = view.borrow().node().is_some();
            tokio::select! {
                () = shutdown.wait() => return,
                // The sender lives in `self.node`, so this is always a change.
                _ = view.changed() => {}
                () = device_events.changed() => {
                    device_events.drain();
                    self.memory.look_at.get_or_insert_with(|| Instant::now() + SETTLED);
                }
                () = tokio::time::sleep_until(wake), if present => {}
            }
        }
    }

    /// One turn of the loop: a round if it is due, and the publication if it does not stand.
    async fn step(&mut self, node: &NodeState, shutdown: &Shutdown) {
        let label = node.label(labels::CC_MODE).unwrap_or_default();
        let relabelled = self.memory.label.as_deref() != Some(label);
        if relabelled {
            tracing::info!(event = "label_seen", label = labels::CC_MODE, value = label, "Wanted mode seen");
            self.memory.label = Some(label.to_owned());
            self.memory.begin_anew();
        }
        let retry_word = node.annotation(annotations::RETRY);
        if self.memory.retry_word.as_deref() != retry_word {
            self.memory.retry_word = retry_word.map(ToOwned::to_owned);
            if retry_word.is_some() && !relabelled {
                tracing::info!(event = "retry_asked", annotation = annotations::RETRY, "Asked to try again");
                self.memory.begin_anew();
                self.memory.next_round = Instant::now();
            }
        }
        if self.memory.look_at.is_some_and(|at| Instant::now() >= at) {
            self.memory.look_at = None;
            self.look_for_other_devices().await;
        }
        // A node object that was made again knows nothing of what the old one was told.
        let renewed = self.memory.node_uid != node.uid;
        self.memory.node_uid.clone_from(&node.uid);
        if relabelled || renewed || Instant::now() >= self.memory.next_round {
            let round = self.round(node, shutdown).await;
            self.counters.round();
            let delay = match round {
                Round::Ended => {
                    // What was begun and not touched is put back; without a word to say this does nothing.
                    self.publish().await;
                    return;
                }
                Round::Rest => {
                    self.memory.retry.reset();
                    self.settings.resync
                }
                Round::Retry => {
                    let delay = self.memory.retry.next_delay();
                    self.counters.retried();
                    tracing::info!(event = "retry", retry_in_ms = millis(delay), "Will try again");
                    delay
                }
                Round::Later(delay) => delay,
                Round::ApiFailed(ref error) => {
                    self.api_delay(error, "Node object cannot be changed, nothing is touched")
                }
            };
            self.memory.next_round = Instant::now() + delay;
            if !matches!(round, Round::ApiFailed(_)) {
                self.attempted();
            }
        }
        self.publish().await;
    }

    /// The kernel says that devices came, went or changed drivers: another set of devices is no matter for later, and a change
    /// that waits for a driver to let go may be possible now.
    async fn look_for_other_devices(&mut self) {
        let root = self.root.clone();
        let Ok(inventory) = tokio::task::spawn_blocking(move || Inventory::scan(&root)).await else { return };
        let (before, now) = (&self.memory.seen, Seen::of(&inventory));
        if before.instances() != now.instances() {
            tracing::info!(event = "devices_changed", "Devices have come or gone");
            self.memory.next_round = Instant::now();
        } else if self.memory.awaited.iter().any(|bdf| before.0.get(bdf) != now.0.get(bdf)) {
            tracing::info!(event = "devices_changed", "A device that was in the way of a change has another driver");
            self.memory.next_round = Instant::now();
        }
    }

    /// Looks, every now and then, whether a device that was in use has been let go. If so it is to be looked at again: its user
    /// may have changed its knobs. It is not offered until then. A device that was in the way of a change is tried at once.
    fn poll_releases(&mut self) {
        let now = Instant::now();
        if now < self.memory.next_poll {
            return;
        }
        let Some(known) = self.memory.known.as_ref() else {
            self.memory.next_poll = now + self.settings.resync;
            return;
        };
        let powers: BTreeMap<Bdf, Power> = known
            .devices
            .iter()
            .filter_map(|record| {
                let folder = self.root.function(record.bdf).join("power");
                let word = |name: &str| Some(std::fs::read_to_string(folder.join(name)).ok()?.trim_end().to_owned());
                let suspended = word("runtime_status")? == "suspended";
                let kept_awake = word("control").as_deref() == Some("on");
                let awake_ms = word("runtime_active_time").and_then(|text| text.parse().ok());
                Some((record.bdf, Power { suspended, kept_awake, awake_ms }))
            })
            .collect();
        let released = self.memory.releases.see(&powers);
        let awaited = &self.memory.awaited;
        let often = self.memory.releases.any_awake() || !awaited.is_empty();
        self.memory.next_poll = now + if often { self.settings.release_poll } else { self.settings.resync };
        if !awaited.is_empty() && awaited.iter().all(|bdf| powers.get(bdf).is_some_and(|power| power.suspended)) {
            tracing::info!(event = "released", "Devices that were in the way of a change are free");
            self.memory.awaited.clear();
            self.memory.next_round = now;
        }
        if released.is_empty() || self.settings.only_observe {
            return;
        }
        for bdf in &released {
            tracing::info!(event = "released", device = %bdf, "Device was in use and is no longer: to be verified again");
        }
        self.counters.released(released.len());
        if let Some(mut file) = self.memory.known.take() {
            plan::doubt(&mut file.devices, &released);
            let state = StateDir {
                path: self.settings.state_dir.clone(),
                boot_id: file.origin.boot_id.clone(),
                node_uid: file.origin.node_uid.clone().unwrap_or_default(),
            };
            self.store(&state, file.transition, file.devices);
        }
        self.memory.next_round = now;
    }

    /// A device is in use, or we have just had it.
    fn look_at_power_soon(&mut self) {
        self.memory.next_poll = self.memory.next_poll.min(Instant::now() + self.settings.release_poll);
    }

    /// Brings the node object to what the last round found; retried by time and by every change of the node.
    async fn publish(&mut self) {
        let Some(publication) = &self.memory.publication else { return };
        if self.is_superseded() {
            // The next round is due at once: the gate is not opened in between.
            return;
        }
        if let Some(at) = self.too_early_to_repeat(publication) {
            self.memory.next_publish = Some(at);
            return;
        }
        let labels: Vec<&str> = operands::labels().collect();
        let mut written = false;
        let compute = |node: &NodeState| {
            let change = publication.change(node);
            written |= !change.missing_from(node).is_empty();
            change
        };
        match self.node.update((&labels, &[]), compute).await {
            Ok(_) => {
                self.memory.next_publish = None;
                self.memory.api_retry.reset();
                if written {
                    let failure = publication.failure().map(|word| (word, Instant::now()));
                    self.memory.told_failure = failure;
                    let state = publication.verdict.mode_state().unwrap_or("(unchanged)");
                    let ready = publication.verdict.ready_state();
                    tracing::info!(event = "published", step = "publish", state, ready, "Node object is up to date");
                }
            }
            Err(error) => {
                let delay = self.api_delay(&error, "Result cannot be published yet");
                self.memory.next_publish = Some(Instant::now() + delay);
            }
        }
    }

    /// When a failure that goes on may be told of in other words, if that is later than now: nothing but the words would change,
    /// and every change of a node object is news for a whole cluster.
    fn too_early_to_repeat(&self, publication: &Publication) -> Option<Instant> {
        let (_, told_at) = self.memory.told_failure.filter(|(word, _)| publication.failure() == Some(word))?;
        let view = self.node.view();
        let change = view.node().map(|node| publication.change(node).missing_from(node))?;
        let only_words =
            change.labels.is_empty() && change.annotations.keys().all(|name| name == annotations::CC_STATUS);
        let at = told_at + self.settings.patch_pause;
        (only_words && !change.is_empty() && Instant::now() < at).then_some(at)
    }

    /// Whether another mode is wanted by now than the round was about.
    fn is_superseded(&self) -> bool {
        let view = self.node.view();
        let label = view.node().map(|node| node.label(labels::CC_MODE).unwrap_or_default());
        label.is_some_and(|label| self.memory.label.as_deref() != Some(label))
    }

    fn api_delay(&mut self, error: &NodeError, what: &str) -> Duration {
        self.counters.patch_failed();
        let delay = self.memory.api_retry.next_delay().max(error.retry_after().unwrap_or_default());
        tracing::warn!(code = error.code(), retry_in_ms = millis(delay), "{what}: {}", error.line());
        delay
    }

    /// The readiness file follows the first attempt, even a failed one (operator-contract section 5.4).
    fn attempted(&mut self) {
        if self.memory.attempted {
            return;
        }
        self.memory.attempted = true;
        self.first_attempt.ready();
        let path = &self.settings.readiness_file;
        if path.as_os_str().is_empty() {
            return;
        }
        match executor::create_readiness_file(path) {
            Ok(()) => tracing::info!(event = "readiness_file", path = %path.display(), "Readiness file is there"),
            Err(error) => {
                tracing::error!(code = "ReadinessFile", path = %path.display(), "Readiness file cannot be made: {error:#}");
            }
        }
    }

    /// Observe, plan, act.
    async fn round(&mut self, node: &NodeState, shutdown: &Shutdown) -> Round {
        let root = self.root.clone();
        let inventory = match tokio::task::spawn_blocking(move || Inventory::scan(&root)).await {
            Ok(inventory) => inventory,
            Err(error) => {
                tracing::error!(code = "Interrupted", "Scan of the devices ended without a result: {error}");
                return Round::Retry;
            }
        };
        self.tell_problems(&inventory);
        self.memory.seen = Seen::of(&inventory);
        let boot_id = inventory.host.boot_id.clone().unwrap_or_default();
        let state = StateDir { path: self.settings.state_dir.clone(), boot_id, node_uid: node.uid.clone() };
        let (known, on_disk) = state.load(self.memory.known.take());
        self.memory.known.clone_from(&known);
        self.memory.on_disk = on_disk;

        // The first act in a new boot: whatever the labels say, they say it of another boot.
        let has_gpus = inventory.gpus().next().is_some();
        let ready = node.label(labels::CC_READY_STATE);
        if known.is_none() && !self.settings.only_observe && (has_gpus || ready.is_some_and(|ready| !ready.is_empty()))
        {
            match self.withdraw(shutdown).await {
                Ok(()) => {}
                Err(round) => return round,
            }
        }

        let (default, allowed) = (&self.settings.default_mode, &self.settings.allowed);
        let wanted = plan::wanted(self.memory.label.as_deref(), default, inventory.host.tee, allowed);
        let (mode, source) = match wanted {
            Wanted::Mode(mode, source) => (mode, source),
            Wanted::Nothing => {
                self.say(tracing::Level::INFO, "Neither label nor default asks for a mode: nothing to do");
                return self.undo(node, shutdown).await;
            }
            Wanted::Unknown(text, source) => {
                let error = plan::unknown_mode(&text, source);
                return self.refuse(&state, &text, &error, plan::records(&inventory, None, known.as_ref(), &[]));
            }
            Wanted::NotAllowed(mode, source) => {
                let error = plan::not_allowed(mode, source, allowed);
                let records = plan::records(&inventory, None, known.as_ref(), &[]);
                return self.refuse(&state, mode.as_str(), &error, records);
            }
        };
        let (mode_state, status) = (node.label(labels::CC_MODE_STATE), node.annotation(annotations::CC_STATUS));
        let asks_for_off = mode == Mode::Off && source == Source::Label;
        if self.settings.hold_without_tee && !asks_for_off && plan::tee_lost(inventory.host.tee, mode_state, status) {
            let records = plan::records(&inventory, None, known.as_ref(), &[]);
            return self.refuse(&state, mode.as_str(), &plan::tee_lost_error(), records);
        }
        if source == Source::Label && mode != Mode::Off && inventory.host.tee == Tee::None {
            self.say(
                tracing::Level::WARN,
                "This host has no TEE (SEV-SNP, TDX): the label is obeyed, but no confidential VM can start here",
            );
        }

        let action = plan::plan(&inventory, mode, known.as_ref());
        if self.settings.only_observe {
            return self.observe(mode, &action, &inventory, known.as_ref(), &state);
        }
        match action {
            Action::NoGpus => self.without_gpus(node, &state, known.as_ref(), shutdown).await,
            Action::Blind(error) => {
                let devices = known.map_or_else(Vec::new, |known| known.devices);
                self.refuse(&state, mode.as_str(), &error, plan::withheld(devices));
                Round::Retry
            }
            Action::Impossible(faults) => {
                let error = ErrorRecord {
                    code: "Unsupported".to_owned(),
                    message: format!(
                        "Mode {mode} is not possible on this node, nothing is changed: {}",
                        lines(&faults)
                    ),
                };
                let mut records = plan::records(&inventory, Some(mode), known.as_ref(), &[]);
                plan::apply_faults(&mut records, &faults);
                self.refuse(&state, mode.as_str(), &error, plan::withheld(records))
            }
            Action::Settled { refused } => {
                let mut records = plan::records(&inventory, Some(mode), known.as_ref(), &[]);
                plan::apply_faults(&mut records, &refused);
                self.found_right(mode, &refused, &state, records)
            }
            Action::Change { devices, whole, refused } => {
                if let Some(delay) = self.held_down(&inventory, known.as_ref()) {
                    let text =
                        format!("Mode {mode} is wanted too soon after another change: it waits for the hold-down");
                    self.say(tracing::Level::WARN, &text);
                    return Round::Later(delay);
                }
                let change = Attempt { mode, source, devices, whole, refused };
                Box::pin(self.change(change, &state, &inventory, known.as_ref(), shutdown)).await
            }
        }
    }

    /// There is no GPU: nothing to do, and nothing to tell unless there were some.
    async fn without_gpus(
        &mut self,
        node: &NodeState,
        state: &StateDir,
        known: Option<&DevicesFile>,
        shutdown: &Shutdown,
    ) -> Round {
        self.say(tracing::Level::INFO, "This node has no NVIDIA GPU: nothing to do");
        if known.is_some_and(|known| !known.devices.is_empty()) {
            // They were here in this boot: what the node object says of them is not true any more.
            if let Err(round) = self.withdraw(shutdown).await {
                return round;
            }
            self.keep(state, Vec::new());
        }
        self.undo(node, shutdown).await
    }

    /// Takes up what a change that was cut short left paused, where nothing is to be done that would do so at its end.
    async fn undo(&mut self, node: &NodeState, shutdown: &Shutdown) -> Round {
        self.memory.publication = None;
        let is_left = node.annotation(annotations::TRANSITION).is_some() || operands::any_paused(node);
        if !is_left || self.settings.only_observe {
            return Round::Rest;
        }
        let labels: Vec<&str> = operands::labels().collect();
        let change = |node: &NodeState| operands::take_up(node, shut()).without_annotation(annotations::TRANSITION);
        let updated = tokio::select! {
            updated = self.node.update((&labels, &[]), change) => updated,
            () = shutdown.wait() => return Round::Ended,
        };
        match updated {
            Ok(_) => {
                self.memory.api_retry.reset();
                tracing::info!(event = "undone", "What a change that was cut short had paused runs again");
                Round::Rest
            }
            Err(error) => Round::ApiFailed(error),
        }
    }

    /// How much longer a change of a node that is well must wait, so that a label that flips does not reset devices all the
    /// time.
    fn held_down(&self, inventory: &Inventory, known: Option<&DevicesFile>) -> Option<Duration> {
        plan::standing(inventory, known)?;
        let left = self.settings.hold_down.checked_sub(self.memory.last_reset?.elapsed())?;
        (!left.is_zero()).then_some(left)
    }

    /// Says what would be done, and does nothing.
    fn observe(
        &mut self,
        mode: Mode,
        action: &Action,
        inventory: &Inventory,
        known: Option<&DevicesFile>,
        state: &StateDir,
    ) -> Round {
        let list = |devices: &[PciFunction]| {
            devices.iter().map(|device| device.bdf.to_string()).collect::<Vec<_>>().join(", ")
        };
        let plan = match action {
            Action::NoGpus => None,
            Action::Blind(error) => Some(error.clone()),
            Action::Impossible(faults) => Some(format!("Mode {mode} is not possible: {}", lines(faults))).map(observed),
            Action::Settled { .. } => Some(observed(format!("Every device is verified in mode {mode}"))),
            Action::Change { devices, .. } => Some(observed(format!(
                "Would be verified, and brought to mode {mode} where they are not: {}",
                list(devices)
            ))),
        };
        if let Some(plan) = &plan {
            self.say(tracing::Level::INFO, &plan.message);
        }
        let records = plan::withheld(plan::records(inventory, Some(mode), known, &[]));
        self.conclude(Verdict::Observed, state.facts(mode.as_str(), plan.as_ref(), &records));
        Round::Rest
    }

    /// One attempt to bring devices to a mode.
    async fn change(
        &mut self,
        attempt: Attempt,
        state: &StateDir,
        inventory: &Inventory,
        known: Option<&DevicesFile>,
        shutdown: &Shutdown,
    ) -> Round {
        let Attempt { mode, source, ref devices, whole, ref refused } = attempt;
        if state.boot_id.is_empty() {
            let message =
                "The kernel's boot id cannot be read, so nothing verified could be told from an earlier boot's";
            let error = ErrorRecord { code: "NoBootId".to_owned(), message: message.to_owned() };
            self.refuse(state, mode.as_str(), &error, Vec::new());
            return Round::Retry;
        }
        // What the node is, should nothing come of this.
        let before = Before::of(inventory, mode, known);

        if before.standing == Some(mode) && devices.iter().all(|device| self.memory.releases.is_in_use(device.bdf)) {
            // In use again before it could be looked at: it will be when it is let go.
            return self.rest_until_released(mode, state, &before);
        }

        match self.look(mode, devices, known).await {
            Some(Ok(Some(results))) if results.iter().all(|result| result.result.is_ok()) => {
                let mut records = plan::records(inventory, Some(mode), known, devices);
                plan::apply_faults(&mut records, refused);
                plan::apply_results(&mut records, &results);
                return self.found_right(mode, refused, state, records);
            }
            Some(Ok(Some(results))) if known.is_some() => self.tell_drift(known, devices, &results),
            Some(Err(faults)) if faults.iter().all(|fault| fault.busy) && before.standing == Some(mode) => {
                for fault in &faults {
                    self.memory.releases.found_in_use(fault.bdf);
                }
                return self.rest_until_released(mode, state, &before);
            }
            Some(Err(faults)) if faults.iter().all(|fault| fault.busy) && self.settings.busy_wait.is_zero() => {
                return self.hold(mode, &faults, state, before);
            }
            Some(Err(faults)) if !faults.iter().all(|fault| fault.busy) => {
                let records = plan::records(inventory, Some(mode), known, devices);
                return self.ended(&attempt, Err(faults), Duration::ZERO, state, records, before);
            }
            Some(Ok(_) | Err(_)) | None => {}
        }
        if shutdown.is_requested() {
            return Round::Ended;
        }

        if let Err(round) = self.begin(state, mode, whole, shutdown).await {
            return round;
        }
        let mut records = plan::records(inventory, Some(mode), known, devices);
        plan::apply_faults(&mut records, refused);
        // What an earlier attempt left over is changed without taking the devices that are right from their users.
        let transition = whole.then(|| Transition {
            target: mode.to_string(),
            step: "changing".to_owned(),
            started_at: jiff::Timestamp::now(),
        });
        let mut journal = records.clone();
        if !whole {
            plan::forget(&mut journal, &devices.iter().map(|device| device.bdf).collect::<Vec<_>>());
        }
        if !self.store(state, transition, journal) {
            let error = state.unwritable("so no device is touched");
            self.conclude(Verdict::NotBegun, state.facts(mode.as_str(), Some(&error), &records));
            return Round::Retry;
        }

        tracing::info!(
            event = "transition_started",
            step = "begin",
            mode = %mode,
            source = %source,
            devices = devices.len(),
            "Change of mode begins"
        );
        let begun = Instant::now();
        let ready = tokio::select! {
            ready = self.others_are_out_of_the_way(devices, whole) => ready,
            () = shutdown.wait() => Err(InTheWay::Ending),
            () = self.superseded() => Err(InTheWay::Superseded),
            never = self.keep_shut() => match never {},
        };
        match ready {
            Ok(()) => {}
            Err(InTheWay::Others(error)) => return self.give_up(mode, &error, &[], state, before),
            Err(InTheWay::Devices(faults)) => return self.hold(mode, &faults, state, before),
            Err(InTheWay::Ending) => return self.put_back(mode, state, before),
            Err(InTheWay::Superseded) => {
                // Nothing was touched. The next round, due at once, goes on with what was begun or ends it.
                self.store(state, None, plan::withheld(plan::records(inventory, Some(mode), known, &[])));
                return Round::Later(Duration::ZERO);
            }
        }

        self.memory.awaited.clear();
        self.counters.held(&[]);
        for device in devices {
            self.memory.releases.touched(device.bdf);
        }
        let outcome = tokio::select! {
            outcome = executor::apply(&self.firmware, devices.clone(), mode, shutdown) => outcome,
            never = self.keep_shut() => match never {},
        };
        self.look_at_power_soon();
        self.ended(&attempt, outcome, begun.elapsed(), state, records, before)
    }

    /// Before anybody is disturbed: whether the devices can be had now (`Err` if not), and, where nothing is known of them,
    /// whether they are in the mode already (`Some` result for each).
    async fn look(&mut self, mode: Mode, devices: &[PciFunction], known: Option<&DevicesFile>) -> Looked {
        let pods = self.pods_of(devices).await;
        let looked = devices.to_vec();
        // What a pod is about to open is not opened in front of it.
        let is_unknown = pods.is_empty() && plan::any_unknown(known, devices);
        // Where looking resets them, that is not done without the others out of the way.
        let look = move |firmware: &F| match firmware.is_free(&looked)? {
            Cost::Nothing if is_unknown => firmware.verify(&looked, mode).map(Some),
            Cost::Nothing | Cost::Resets => Ok(None),
        };
        let found = executor::look(&self.firmware, look).await;
        if matches!(found, Some(Ok(Some(_)))) {
            for device in devices {
                self.memory.releases.touched(device.bdf);
            }
            self.look_at_power_soon();
        }
        if pods.is_empty() {
            return found;
        }
        let mut faults = found.and_then(Result::err).unwrap_or_default();
        allocations::name_pods(&mut faults, &pods);
        Some(Err(faults))
    }

    /// Devices whose users may have changed them are in use again: the others are verified in the mode, and these are looked at
    /// when they are let go.
    fn rest_until_released(&mut self, mode: Mode, state: &StateDir, before: &Before) -> Round {
        self.look_at_power_soon();
        if !self.keep(state, before.records.clone()) {
            return Round::Retry;
        }
        self.conclude(Verdict::Applied(mode), state.facts(mode.as_str(), None, &before.records));
        Round::Rest
    }

    /// The pods that the kubelet has given some of these devices to, as far as it can be asked.
    async fn pods_of(&mut self, devices: &[PciFunction]) -> BTreeMap<Bdf, String> {
        match allocations::pods(&self.settings.pod_resources, devices).await {
            Ok(pods) => pods,
            Err(error) => {
                let socket = self.settings.pod_resources.display();
                let text = format!("Cannot tell which pods have GPUs, going by the devices alone: {socket}: {error}");
                self.say(tracing::Level::WARN, &text);
                BTreeMap::new()
            }
        }
    }

    /// What comes of an attempt that touched devices, or tried to.
    fn ended(
        &mut self,
        attempt: &Attempt,
        outcome: Result<Vec<DeviceResult>, Vec<DeviceFault>>,
        took: Duration,
        state: &StateDir,
        mut records: Vec<DeviceRecord>,
        before: Before,
    ) -> Round {
        let Attempt { mode, refused, .. } = attempt;
        let (mode, took_ms) = (*mode, millis(took));
        let results = outcome.as_ref().cloned().unwrap_or_default();
        let (mut verdict, mut error) = match outcome {
            Ok(results) => {
                self.memory.last_reset = Some(Instant::now());
                plan::apply_results(&mut records, &results);
                let failed = results.iter().filter_map(|result| result.result.as_ref().err());
                if failed.clone().any(|fault| fault.untouched) {
                    // Told to end, and ended before anything was lost: the next start begins anew. Should another device's
                    // knobs not have been put back, what was known of it is not known any more.
                    let failed: Vec<Bdf> = results
                        .iter()
                        .filter(|result| result.result.as_ref().is_err_and(|fault| !fault.untouched))
                        .map(|result| result.bdf)
                        .collect();
                    let mut before = before;
                    if !failed.is_empty() {
                        before.standing = None;
                        plan::forget(&mut before.records, &failed);
                    }
                    return self.put_back(mode, state, before);
                }
                let faults: Vec<&DeviceFault> = failed.chain(refused).collect();
                tell_results(&results);
                match first_error(&faults, "Not every device was brought to", mode) {
                    None => (Verdict::Applied(mode), None),
                    error => (Verdict::Failed, error),
                }
            }
            // Somebody was quicker than we.
            Err(faults) if faults.iter().all(|fault| fault.busy) => return self.hold(mode, &faults, state, before),
            Err(faults) => {
                plan::apply_faults(&mut records, &faults);
                for DeviceFault { bdf, error, .. } in &faults {
                    tell_fault(*bdf, "own", error);
                }
                let faults: Vec<&DeviceFault> = faults.iter().collect();
                (Verdict::Failed, first_error(&faults, "Not every device can be owned, so none is brought to", mode))
            }
        };
        if self.is_superseded() {
            // Verified, but not in what is wanted by now: the next round decides.
            records = plan::withheld(records);
        }
        if !self.store(state, None, records.clone()) && matches!(verdict, Verdict::Applied(_)) {
            // The others still read of a transition: a gate that is open now would lead pods to a node that offers nothing.
            verdict = Verdict::Failed;
            error = Some(state.unwritable("so the other agents cannot be told that every device is verified"));
        }
        let result = if matches!(verdict, Verdict::Applied(_)) { "applied" } else { "failed" };
        self.counters.transition(mode, result);
        tracing::info!(event = "transition_ended", step = "end", mode = %mode, result, took_ms, "Change of mode has ended");
        let round = if matches!(verdict, Verdict::Applied(_)) { Round::Rest } else { Round::Retry };
        self.conclude(verdict, state.facts(mode.as_str(), error.as_ref(), &records));
        if results.is_empty() {
            // None was touched: no change for the record.
            return round;
        }
        self.counters.took(result, took);
        let became =
            |result: &DeviceResult| (result.bdf, result.result.as_ref().err().map(|fault| fault.error.code.clone()));
        let audited: Vec<_> = results.iter().map(became).collect();
        if result == "failed" && audited == self.memory.audited {
            // The same failure again is no news, and would drive the others out of what is kept.
            return round;
        }
        self.memory.audited = audited;
        let asked_by = self.node.view().node().and_then(|node| node.mode_set_by.clone());
        let asked_by = asked_by.as_deref().filter(|_| attempt.source == Source::Label);
        let change = audit::Change {
            node: self.node.name(),
            boot_id: &state.boot_id,
            asked_by,
            from: before.standing,
            to: mode,
            result,
            took_ms,
        };
        audit::Line::of(change, &results).record(&state.path);
        if matches!(round, Round::Rest) {
            let devices = results.iter().map(|result| result.bdf.to_string()).collect::<Vec<_>>().join(", ");
            let text = format!("In mode {mode}, verified after {took_ms} ms: {devices}");
            self.events.tell(Event {
                is_warning: false,
                reason: "CCModeChanged".to_owned(),
                action: "Change",
                note: text,
            });
        }
        round
    }

    /// Tells of devices that had to be looked at again, and are not what they were. What is known to be in another mode, or
    /// to have failed, is to be changed: that is no news.
    fn tell_drift(&self, known: Option<&DevicesFile>, devices: &[PciFunction], results: &[DeviceResult]) {
        for (device, DeviceResult { bdf, result }) in devices.iter().zip(results) {
            if let Err(fault) = result
                && plan::is_withdrawn(known, device)
            {
                self.counters.drifted();
                let note = fault.error.message.clone();
                self.events.tell(Event { is_warning: true, reason: "Drift".to_owned(), action: "Verify", note });
                let code = &fault.error.code;
                tracing::warn!(event = "drift", device = %bdf, code, "Device is not as it should be: {}", fault.error.message);
            }
        }
    }

    /// Every device that can be is verified in the mode.
    fn found_right(
        &mut self,
        mode: Mode,
        refused: &[DeviceFault],
        state: &StateDir,
        records: Vec<DeviceRecord>,
    ) -> Round {
        // Whoever was in the way of another mode is in nobody's way any more.
        self.memory.awaited.clear();
        self.counters.held(&[]);
        let faults: Vec<&DeviceFault> = refused.iter().collect();
        if let Some(error) = first_error(&faults, "Not every device can be in", mode) {
            return self.refuse(state, mode.as_str(), &error, records);
        }
        if !self.keep(state, records.clone()) {
            let error = state.unwritable("so the other agents cannot be told that every device is verified");
            self.conclude(Verdict::NotBegun, state.facts(mode.as_str(), Some(&error), &records));
            return Round::Retry;
        }
        self.say(tracing::Level::INFO, &format!("Every device is verified in mode {mode}"));
        self.conclude(Verdict::Applied(mode), state.facts(mode.as_str(), None, &records));
        Round::Rest
    }

    /// Devices are in use, so none was touched: the node stays what it is, and offers what it offers.
    fn hold(&mut self, mode: Mode, faults: &[DeviceFault], state: &StateDir, before: Before) -> Round {
        for DeviceFault { bdf, error, .. } in faults {
            if self.memory.said.insert(error.message.clone()) {
                tell_fault(*bdf, "own", error);
            }
        }
        let lines: Vec<&DeviceFault> = faults.iter().collect();
        match first_error(&lines, "Not every device can be owned, so none is brought to", mode) {
            Some(error) => self.give_up(mode, &error, faults, state, before),
            None => Round::Retry,
        }
    }

    /// Told to end before any device was reset: the node is what it was, and its components run again.
    fn put_back(&mut self, mode: Mode, state: &StateDir, before: Before) -> Round {
        tracing::info!(event = "transition_stopped", mode = %mode, "Change was stopped before its resets, and is put back");
        let message = format!(
            "The agent was told to end before the change to mode {mode} had reset a device; everything was put back; the \
             agent's next start makes the change"
        );
        let error = ErrorRecord { code: "Stopped".to_owned(), message };
        self.give_up(mode, &error, &[], state, before);
        Round::Ended
    }

    /// An attempt ends before any device was touched.
    fn give_up(
        &mut self,
        mode: Mode,
        error: &ErrorRecord,
        faults: &[DeviceFault],
        state: &StateDir,
        before: Before,
    ) -> Round {
        self.memory.awaited = faults.iter().filter(|fault| fault.busy).map(|fault| fault.bdf).collect();
        self.memory.awaited.iter().for_each(|bdf| self.memory.releases.found_in_use(*bdf));
        self.look_at_power_soon();
        let Before { standing, mut records } = before;
        plan::note_faults(&mut records, faults);
        self.counters.transition(mode, "busy");
        // The others may still read of a transition: then no gate is opened over it.
        let kept = self.keep(state, records.clone());
        let verdict = standing.filter(|_| kept).map_or(Verdict::NotBegun, Verdict::Held);
        let holders: Vec<HolderRecord> = faults.iter().flat_map(|fault| fault.holders.clone()).collect();
        self.counters.held(&holders);
        self.conclude(verdict, Facts { holders: &holders, ..state.facts(mode.as_str(), Some(error), &records) });
        Round::Retry
    }

    /// The one patch that begins a change: the gate is shut, the journal written, the operator's components are paused.
    async fn begin(&mut self, state: &StateDir, mode: Mode, whole: bool, shutdown: &Shutdown) -> Result<(), Round> {
        let journal = Journal::begin(&state.boot_id, mode);
        let pause = self.settings.pausing.is_some();
        let reads: Vec<&str> = if whole && pause { operands::labels().collect() } else { Vec::new() };
        // A retry of what an earlier attempt left over disturbs nobody but the devices concerned: it has nothing to put back,
        // and says nothing new of a node whose gate is shut.
        let is_repetition = self.memory.is_failing_in(mode);
        let is_quiet = |node: &NodeState| {
            is_repetition && !(pause && (operands::any_to_pause(node) || operands::any_paused(node)))
        };
        let change = |node: &NodeState| if whole && !is_quiet(node) { journal.change(node, pause) } else { shut() };
        let begun = tokio::select! {
            begun = self.node.update((&reads, &[]), change) => begun,
            () = shutdown.wait() => return Err(Round::Ended),
        };
        self.forget_publication();
        match begun {
            Ok(_) => {
                self.memory.api_retry.reset();
                if whole && !is_repetition {
                    let note = format!("Change to mode {mode} begins; the node is not ready for GPU pods");
                    let reason = "CCModeChanging".to_owned();
                    self.events.tell(Event { is_warning: false, reason, action: "Change", note });
                }
                tracing::info!(event = "withdrawn", step = "withdraw", ready = "", "Node is not ready for GPU pods");
                Ok(())
            }
            Err(error) => Err(Round::ApiFailed(error)),
        }
    }

    /// Waits until nobody is in the way of a change: no pod of a paused component is left, the kubelet offers no GPU of this
    /// node, and, where that is to be waited for, no device is in use.
    async fn others_are_out_of_the_way(&self, devices: &[PciFunction], whole: bool) -> Result<(), InTheWay> {
        if let Some(pausing) = self.settings.pausing.as_ref().filter(|_| whole) {
            self.components_are_gone(pausing).await?;
        }
        let patience = self.settings.busy_wait;
        let deadline = Instant::now() + patience;
        loop {
            let looked = devices.to_vec();
            let found = executor::look(&self.firmware, move |firmware| firmware.is_free(&looked)).await;
            let mut faults = found.and_then(Result::err).unwrap_or_default();
            // A socket that cannot be asked was told of before.
            let pods = allocations::pods(&self.settings.pod_resources, devices).await.unwrap_or_default();
            allocations::name_pods(&mut faults, &pods);
            if faults.is_empty() || !faults.iter().all(|fault| fault.busy) {
                // What is no matter of use comes out when they are owned.
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(InTheWay::Devices(faults));
            }
            tokio::time::sleep(BUSY_POLL.min(patience)).await;
        }
    }

    /// Waits for the pods of the paused components, and then for the kubelet.
    async fn components_are_gone(&self, pausing: &Pausing) -> Result<(), InTheWay> {
        let Pausing { namespace, patience } = pausing;
        let left = std::sync::Mutex::new(Vec::new());
        let mut tell = |now| *left.lock().unwrap_or_else(PoisonError::into_inner) = now;
        let node = self.node.view().node().cloned().unwrap_or_default();
        let waited = tokio::time::timeout(*patience, async {
            if operands::any_paused(&node) {
                let is_one = |labels: &BTreeMap<String, String>| operands::is_paused_pod(&node, labels);
                self.node.pods_gone(namespace, is_one, &mut tell).await?;
            }
            self.node.none_allocatable(|resource| resource.starts_with("nvidia.com/"), &mut tell).await
        });
        let waited = waited.await;
        let left = left.into_inner().unwrap_or_else(PoisonError::into_inner).join(", ");
        let error = match waited {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => ErrorRecord {
                code: error.code().to_owned(),
                message: format!("Cannot tell whether the operator's components have stopped: {}", error.line()),
            },
            Err(_) => ErrorRecord {
                code: "OperandsStillThere".to_owned(),
                message: format!(
                    "Not gone after {} s: {left}; nothing was changed, the paused components run again; look at what keeps these \
                     pods of namespace {namespace} (or the kubelet's resources) on the node",
                    patience.as_secs()
                ),
            },
        };
        tracing::warn!(event = "given_up", step = "pause", code = error.code, "{}", error.message);
        Err(InTheWay::Others(error))
    }

    /// Returns when another mode is wanted than this round is about.
    async fn superseded(&self) {
        let mut view = self.node.subscribe();
        while !self.is_superseded() {
            // The sender lives in `self.node`, so this is always a change.
            let _ = view.changed().await;
        }
    }

    /// Shuts the node's gate again whenever somebody opens it: a person, another agent, or a patch of our own that the API
    /// server had given up for lost.
    async fn keep_shut(&self) -> Infallible {
        let is_open = |node: &Arc<NodeState>| node.label(labels::CC_READY_STATE).is_some_and(|ready| !ready.is_empty());
        let mut view = self.node.subscribe();
        loop {
            if view.borrow_and_update().node().is_some_and(is_open) {
                tracing::warn!(
                    event = "withdrawn",
                    step = "withdraw",
                    "Node was made ready during a change: withdrawn again"
                );
                if let Err(error) = self.node.merge(&shut()).await {
                    self.counters.patch_failed();
                    tracing::warn!(code = error.code(), "Node is not withdrawn yet: {}", error.line());
                    tokio::time::sleep(GUARD_RETRY).await;
                    continue;
                }
            }
            // The sender lives in `self.node`, so this is always a change.
            let _ = view.changed().await;
        }
    }

    /// Makes sure that the node's gate is shut before anything is done.
    async fn withdraw(&mut self, shutdown: &Shutdown) -> Result<(), Round> {
        let shut = shut();
        let merged = tokio::select! {
            merged = self.node.merge(&shut) => merged,
            () = shutdown.wait() => return Err(Round::Ended),
        };
        self.forget_publication();
        match merged {
            Ok(written) => {
                self.memory.api_retry.reset();
                if written.is_some() {
                    tracing::info!(
                        event = "withdrawn",
                        step = "withdraw",
                        ready = "",
                        "Node is not ready for GPU pods"
                    );
                }
                Ok(())
            }
            Err(error) => Err(Round::ApiFailed(error)),
        }
    }

    /// Whatever stood on the node before would open the gate again.
    fn forget_publication(&mut self) {
        self.memory.publication = None;
        self.memory.next_publish = None;
    }

    /// What is asked for cannot be begun: nothing is touched, and no device is in what is wanted.
    fn refuse(&mut self, state: &StateDir, wanted: &str, error: &ErrorRecord, records: Vec<DeviceRecord>) -> Round {
        if self.memory.said.insert(error.message.clone()) {
            tracing::error!(event = "refused", code = error.code, "{}", error.message);
        }
        self.conclude(Verdict::Failed, state.facts(wanted, Some(error), &records));
        if self.keep(state, records) { Round::Rest } else { Round::Retry }
    }

    /// Decides what is to stand on the node object until the next attempt.
    fn conclude(&mut self, verdict: Verdict, facts: Facts<'_>) {
        let verdict = if self.settings.only_observe { Verdict::Observed } else { verdict };
        let error = facts.error;
        if let Some(error) =
            error.filter(|error| verdict != Verdict::Observed && self.memory.told.as_ref() != Some(*error))
        {
            let (reason, note) = (error.code.clone(), error.message.clone());
            self.events.tell(Event { is_warning: true, reason, action: "Change", note });
        }
        self.memory.told = error.cloned();
        self.memory.publication = Some(Publication::new(verdict, facts));
    }

    /// Sees to it that `devices.json` says this, and that no transition is under way; whether it does.
    fn keep(&mut self, state: &StateDir, devices: Vec<DeviceRecord>) -> bool {
        if self.settings.only_observe {
            return true;
        }
        let known = self.memory.known.as_ref();
        let is_of_this_node = |known: &DevicesFile| known.origin.node_uid.as_deref() == Some(&state.node_uid);
        let stands =
            known.is_some_and(|known| known.transition.is_none() && known.devices == devices && is_of_this_node(known));
        (stands && self.memory.on_disk) || self.store(state, None, devices)
    }

    /// Replaces `devices.json`, and says whether that went well.
    fn store(&mut self, state: &StateDir, transition: Option<Transition>, devices: Vec<DeviceRecord>) -> bool {
        let origin = Origin::now(state.boot_id.clone(), Some(state.node_uid.clone()));
        let file = DevicesFile { origin, transition, devices };
        let stored = HostDir::open(&state.path).map_err(Into::into).and_then(|dir| file.store(&dir));
        if let Err(error) = &stored {
            tracing::error!(code = "StateFile", "{}", chain(error));
        }
        self.counters.devices(&file);
        self.memory.known = Some(file);
        self.memory.on_disk = stored.is_ok();
        self.memory.on_disk
    }

    /// Logs once what does not change from round to round.
    fn say(&mut self, level: tracing::Level, text: &str) {
        if self.memory.said.insert(text.to_owned()) {
            if level == tracing::Level::WARN {
                tracing::warn!("{text}");
            } else {
                tracing::info!("{text}");
            }
        }
    }

    fn tell_problems(&mut self, inventory: &Inventory) {
        if inventory.problems != self.memory.problems {
            for Problem { bdf, path, message } in &inventory.problems {
                let device = bdf.map(|bdf| bdf.to_string()).unwrap_or_default();
                tracing::warn!(code = "SysfsUnreadable", device, path, "Scan: {path}: {message}");
            }
            self.memory.problems.clone_from(&inventory.problems);
        }
    }
}

/// How long the kernel's events are collected: they come in bursts.
const SETTLED: Duration = Duration::from_millis(500);

/// How often devices in use are tried again while everybody else is kept away from them.
const BUSY_POLL: Duration = Duration::from_secs(5);

/// What a look at devices found; none when it ended without a result.
type Looked = Option<Result<Option<Vec<DeviceResult>>, Vec<DeviceFault>>>;

/// What a node is before a change is attempted.
struct Before {
    /// The mode that every device is verified in.
    standing: Option<Mode>,
    records: Vec<DeviceRecord>,
}

impl Before {
    fn of(inventory: &Inventory, wanted: Mode, known: Option<&DevicesFile>) -> Self {
        let standing = plan::standing(inventory, known);
        Self { standing, records: plan::records(inventory, Some(standing.unwrap_or(wanted)), known, &[]) }
    }
}

/// What keeps a change from being made.
enum InTheWay {
    /// Components that do not stop, or cannot be seen to.
    Others(ErrorRecord),
    /// Devices that stay in use.
    Devices(Vec<DeviceFault>),
    /// Another mode is wanted by now.
    Superseded,
    /// We were told to end.
    Ending,
}

/// How long after a failure the gate is tried to be shut again while devices are being changed.
const GUARD_RETRY: Duration = Duration::from_secs(1);

/// What is told by somebody who only looks.
fn observed(message: String) -> ErrorRecord {
    ErrorRecord { code: "Observed".to_owned(), message }
}

/// The change that shuts the node's gate.
fn shut() -> Change {
    Change::new().label(labels::CC_READY_STATE, "")
}

/// What is to be changed, and why.
struct Attempt {
    mode: Mode,
    source: Source,
    devices: Vec<PciFunction>,
    whole: bool,
    /// Devices that cannot be in the mode, while the others can.
    refused: Vec<DeviceFault>,
}

/// Where `devices.json` is, and what it says of its origin.
struct StateDir {
    path: PathBuf,
    boot_id: String,
    node_uid: String,
}

impl StateDir {
    /// What is to be told of the node.
    fn facts<'a>(&'a self, wanted: &'a str, error: Option<&'a ErrorRecord>, devices: &'a [DeviceRecord]) -> Facts<'a> {
        Facts { node_uid: &self.node_uid, boot_id: &self.boot_id, wanted, error, holders: &[], devices }
    }

    fn unwritable(&self, so: &str) -> ErrorRecord {
        let message = format!(
            "devices.json in {} cannot be written, {so}; the log has the cause; make it a directory of root's alone with \
             space left",
            self.path.display()
        );
        ErrorRecord { code: "StateFile".to_owned(), message }
    }

    /// What has been verified in this boot: the file's word, or what we remember of it if it is lost; and whether it was
    /// the file's.
    fn load(&self, memory: Option<DevicesFile>) -> (Option<DevicesFile>, bool) {
        let memory = memory.filter(|file| file.origin.boot_id == self.boot_id && !self.boot_id.is_empty());
        let file = match HostDir::open_existing(&self.path) {
            Ok(Some(dir)) => DevicesFile::load(&dir, &self.boot_id),
            Ok(None) => Ok(None),
            Err(error) => Err(error.into()),
        };
        match file {
            Ok(Some(file)) => (Some(file), true),
            Ok(None) => (memory, false),
            Err(error) => {
                tracing::warn!(code = "StateFile", "What was verified cannot be read: {}", chain(&error));
                (memory, false)
            }
        }
    }
}

/// One error for the node: the first device's code, and all devices' lines.
fn first_error(faults: &[&DeviceFault], what: &str, mode: Mode) -> Option<ErrorRecord> {
    let first = faults.first()?;
    let lines: Vec<&str> = faults.iter().map(|fault| fault.error.message.as_str()).collect();
    let message = format!("{what} mode {mode}: {}", lines.join(" | "));
    Some(ErrorRecord { code: first.error.code.clone(), message })
}

fn tell_results(results: &[DeviceResult]) {
    for DeviceResult { bdf, result } in results {
        if let Err(fault) = result {
            tell_fault(*bdf, "change", &fault.error);
        }
    }
}

fn tell_fault(bdf: hw_probe::Bdf, step: &'static str, error: &ErrorRecord) {
    tracing::error!(event = "device_failed", device = %bdf, step, code = error.code, "{}", error.message);
}

fn lines(faults: &[DeviceFault]) -> String {
    faults.iter().map(|fault| fault.error.message.as_str()).collect::<Vec<_>>().join(" | ")
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
