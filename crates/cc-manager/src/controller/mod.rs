//! The loop: watch the node, plan, act, publish. An attempt to change devices is in [`transition`].

mod bystanders;
mod devices;
mod memory;
mod state_dir;
mod transition;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent_core::hostfile::HostDir;
use agent_core::http::StateDump;
use agent_core::metrics::Metrics;
use agent_core::readiness;
use agent_core::shutdown::Shutdown;
use agent_core::state::{DeviceRecord, DevicesFile, ErrorRecord, Origin, Transition};
use agent_core::text::chain;
use agent_core::uevents::DeviceEvents;
use gpu_firmware::Mode;
use hw_probe::{Inventory, PciFunction, Problem, SysRoot, Tee};
use node_object::{Change, Event, Events, NodeClient, NodeError, NodeState, NodeView, annotations, labels, operands};
use tokio::time::Instant;

use self::memory::{Memory, Seen};
use self::state_dir::StateDir;
use self::transition::Attempt;
use crate::executor::{self, DeviceFault, Firmware};
use crate::metrics::Counters;
use crate::plan::{self, Action, Source, Wanted};
use crate::publish::{Facts, Publication, Verdict};

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
    /// Resources of the kubelet that may stay: their devices are no GPUs, whatever their names say.
    pub others: Vec<String>,
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
        let memory = Memory::new(&settings);
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
                    match publication.failure() {
                        Some(failure) => drop(self.memory.told_failures.insert(failure, Instant::now())),
                        None => self.memory.told_failures.clear(),
                    }
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

    /// When a failure that was told before may be told of again, if that is later than now: nothing but the words would change,
    /// and every change of a node object is news for a whole cluster. A failure with another code is told at once.
    fn too_early_to_repeat(&self, publication: &Publication) -> Option<Instant> {
        let told_at = *self.memory.told_failures.get(&publication.failure()?)?;
        let view = self.node.view();
        let change = view.node().map(|node| publication.change(node).missing_from(node))?;
        let only_words =
            change.labels.is_empty() && change.annotations.keys().all(|name| name == annotations::CC_STATUS);
        let at = told_at + self.settings.patch_pause;
        (only_words && !change.is_empty() && Instant::now() < at).then_some(at)
    }

    /// Whether another mode is wanted by now than the round was about, or the node object was made again: nothing of what was
    /// begun on the old one stands on the new one.
    fn is_superseded(&self) -> bool {
        let is_other = |node: &Arc<NodeState>| {
            let label = node.label(labels::CC_MODE).unwrap_or_default();
            self.memory.label.as_deref() != Some(label) || self.memory.node_uid != node.uid
        };
        self.node.view().node().is_some_and(is_other)
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

/// What is told by somebody who only looks.
fn observed(message: String) -> ErrorRecord {
    ErrorRecord { code: "Observed".to_owned(), message }
}

/// The change that shuts the node's gate.
fn shut() -> Change {
    Change::new().label(labels::CC_READY_STATE, "")
}

/// One error for the node: the first device's code, and all devices' lines.
fn first_error(faults: &[&DeviceFault], what: &str, mode: Mode) -> Option<ErrorRecord> {
    let first = faults.first()?;
    let lines: Vec<&str> = faults.iter().map(|fault| fault.error.message.as_str()).collect();
    let message = format!("{what} mode {mode}: {}", lines.join(" | "));
    Some(ErrorRecord { code: first.error.code.clone(), message })
}

fn lines(faults: &[DeviceFault]) -> String {
    faults.iter().map(|fault| fault.error.message.as_str()).collect::<Vec<_>>().join(" | ")
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
