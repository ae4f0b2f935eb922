//! A node in one process: the real controller of cc-manager and the real firmware transaction, over virtual GPUs in model
//! time, a fake sysfs and the stand-in of the API server, with an imaginary operator and kubelet around them.
//!
//! An agent can be stopped at each of its API requests and at each step of its firmware. One that is killed does nothing
//! afterwards; the API server, the devices, sysfs and the state directory stay for the next one.

#![allow(dead_code, unused_imports, reason = "each of the test files uses its own part of this")]

mod parts;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agent_core::shutdown::Shutdown;
use anyhow::{Context, Result, anyhow, ensure};
use cc_manager::{DeviceFault, DeviceResult, Firmware};
use e2e::{mode_bits, vector};
use gpu_firmware::{Cost, Milestone, Mode, Observer, Progress, change_devices};
use hw_probe::PciFunction;
use hw_probe::testing::FakeSysfs;
use lab_devices::BootState;
use lab_kube::api_server::{ApiServer, ApiServerConfig, Fault, FaultAction, HistoryEntry, RequestRecord, Rule, View};
use node_object::annotations;
use node_object::labels::{CC_MODE, CC_MODE_STATE, CC_READY_STATE};
use parts::virtual_gpu::Gpu;
pub(crate) use parts::{Change, Kept, ROUND_TRIP};
use parts::{OPERANDS, Parts, RESOURCE, ready_state};
use serde_json::{Value, json};

pub(crate) const NODE: &str = "gpu-1";
pub(crate) const AGENT: &str = "system:serviceaccount:gpu-operator:nvidia-cc-manager";
const OPERATOR: &str = "gpu-operator";
/// Time for a node to become what it is to be, and for an agent to reach a point or its end.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A failed thread of the test has poisoned it, and that is its failure alone.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// -- what is true ----------------------------------------------------------------------------------------------------

/// Compares what the node object promises with what the devices have booted with.
struct Truth {
    gpus: Vec<Gpu>,
    /// Whether the labels are this boot's. Until its first write they are the last boot's, and nobody's fault.
    is_this_boot: AtomicBool,
    looks: AtomicUsize,
    lies: Mutex<Vec<String>>,
}

impl Truth {
    /// Sees a write of the node.
    fn see_write(&self, entry: &HistoryEntry) {
        if entry.deleted {
            return;
        }
        if entry.user == AGENT && !self.is_this_boot.swap(true, Ordering::SeqCst) {
            let ready = entry.labels.get(CC_READY_STATE).map(String::as_str);
            if ready != Some("") {
                lock(&self.lies).push(format!("the first write in a boot makes {CC_READY_STATE} {ready:?}"));
            }
        }
        self.see(&entry.labels, true);
    }

    /// Looks at node object and devices at one moment. During a boot a device is in no mode, which only a write must heed:
    /// what it has booted with is seen afterwards.
    fn see(&self, labels: &BTreeMap<String, String>, is_write: bool) {
        if !self.is_this_boot.load(Ordering::SeqCst) {
            return;
        }
        self.looks.fetch_add(1, Ordering::Relaxed);
        let label = |key: &str| labels.get(key).map(String::as_str).unwrap_or_default();
        let (state, ready) = (label(CC_MODE_STATE), label(CC_READY_STATE));
        if ready.is_empty() {
            return;
        }
        let named = state.parse::<Mode>().ok().filter(|mode| ready_state(*mode) == ready);
        for gpu in &self.gpus {
            let status = gpu.status();
            if status.boot != BootState::Ready && !is_write {
                continue;
            }
            let word = named.and_then(|mode| vector(gpu.kind, mode.as_str())).map(|(word, _)| word);
            let is_true = status.boot == BootState::Ready && word == Some(status.status_word & mode_bits(gpu.kind));
            if !is_true {
                let found = format!("{:?} with {:#x}", status.boot, status.status_word);
                lock(&self.lies).push(format!("state {state:?} and ready {ready:?} while {} is {found}", gpu.bdf));
            }
        }
    }

    /// Looks at the node when its devices begin to be changed: nobody offers them, and whoever did has gone.
    fn see_touch(&self, view: View<'_>) {
        let offered = offered(view).unwrap_or_default();
        let labels = view.labels(NODE);
        // A node that was made again in this moment is not paused, and the next round's business.
        let is_paused = OPERANDS.iter().all(|(label, _)| labels.get(*label).is_some_and(|value| value != "true"));
        if is_paused && (!view.list("pods").is_empty() || !["", "0"].contains(&offered.as_str())) {
            let pods = view.list("pods").len();
            lock(&self.lies)
                .push(format!("devices are changed while {pods} components run and {offered:?} are offered"));
        }
    }
}

// -- firmware --------------------------------------------------------------------------------------------------------

/// The steps of an agent's firmware, in the order in which they come. The agent can be stopped at one of them.
#[derive(Default)]
struct Steps {
    state: Mutex<StepState>,
    changed: Condvar,
}

#[derive(Default)]
struct StepState {
    taken: Vec<String>,
    stops_at: Option<usize>,
    is_stopped: bool,
    is_dead: bool,
    /// Calls of the firmware that have not returned.
    running: usize,
}

/// The agent is dead: nothing more is done in its name.
struct Dead;

impl Steps {
    /// Takes a step, once nobody is stopped at another.
    fn step(&self, what: impl fmt::Display) -> Result<(), Dead> {
        let mut state = lock(&self.state);
        if state.stops_at == Some(state.taken.len()) {
            state.is_stopped = true;
            state.stops_at = None;
            self.changed.notify_all();
        }
        while state.is_stopped && !state.is_dead {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.is_dead {
            return Err(Dead);
        }
        state.taken.push(what.to_string());
        Ok(())
    }

    /// Waits until this is so.
    fn until(&self, what: &str, is_so: impl Fn(&StepState) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = lock(&self.state);
        while !is_so(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "{what}: not in time, after the steps {:?}", state.taken);
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut StepState)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }
}

/// The firmware as one agent drives it.
struct VirtualFirmware {
    gpus: Vec<Gpu>,
    steps: Arc<Steps>,
    shutdown: Shutdown,
    truth: Arc<Truth>,
    api: Arc<ApiServer>,
}

/// A call of the firmware, until it returns.
struct Call<'a>(&'a Steps);

impl<'a> Call<'a> {
    fn begin(steps: &'a Steps) -> Self {
        steps.change(|state| state.running += 1);
        Self(steps)
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.change(|state| state.running -= 1);
    }
}

/// Makes a step of each milestone.
struct EachMilestone<'a> {
    firmware: &'a VirtualFirmware,
    stop: &'a AtomicBool,
}

impl Observer for EachMilestone<'_> {
    fn progress(&self, progress: &Progress) {
        self.firmware.look();
        // Whoever is dead finds out at the next access.
        if !matches!(progress.what, Milestone::Failed { .. }) {
            let _ = self.firmware.steps.step(progress);
        }
        // What was told to the agent at this step has reached the transaction when it goes on.
        let deadline = Instant::now() + PATIENCE;
        while self.firmware.shutdown.is_requested() && !self.is_stopping() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl VirtualFirmware {
    fn look(&self) {
        self.api.view(|view| self.truth.see(&view.labels(NODE), false));
    }
}

impl Firmware for VirtualFirmware {
    fn is_free(&self, _: &[PciFunction]) -> Result<Cost, Vec<DeviceFault>> {
        let _call = Call::begin(&self.steps);
        self.steps.step("look").map(|()| Cost::Nothing).map_err(|Dead| Vec::new())
    }

    fn verify(&self, devices: &[PciFunction], target: Mode) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        let _call = Call::begin(&self.steps);
        self.steps.step("verify").map_err(|Dead| Vec::new())?;
        Ok(parts::verified(&self.gpus, devices, target))
    }

    fn apply(
        &self,
        devices: &[PciFunction],
        target: Mode,
        stop: &AtomicBool,
    ) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        let _call = Call::begin(&self.steps);
        self.steps.step("own").map_err(|Dead| Vec::new())?;
        self.api.view(|view| self.truth.see_touch(view));
        let openers = parts::those(&self.gpus, devices).map(|gpu| (gpu.bdf, || gpu.open())).collect();
        let outcome = change_devices(openers, target, &EachMilestone { firmware: self, stop });
        self.steps.step("done").map_err(|Dead| Vec::new())?;
        Ok(outcome.devices.iter().map(|outcome| parts::changed(target, outcome)).collect())
    }
}

// -- operator and kubelet --------------------------------------------------------------------------------------------

/// The imaginary operator and kubelet of the node: a pod for each component whose deploy label is `true`, and GPUs on offer
/// as long as there are pods. They take their leave only once somebody watches for it, so that every change waits for them
/// in the same requests.
struct Cluster {
    api: Arc<ApiServer>,
    requests: usize,
    version: u64,
    pods_watched: bool,
    node_watched: bool,
    is_slow: Arc<AtomicBool>,
}

/// How long operator and kubelet think about it before they take their leave, when they are slow.
const SLOW: Duration = Duration::from_millis(50);

impl Cluster {
    fn run(&mut self, is_over: &AtomicBool) {
        while !is_over.load(Ordering::SeqCst) {
            let (requests, version) = (self.requests, self.version);
            let news = self.api.wait_for(Duration::from_millis(100), |view| {
                let is_news = view.requests().len() > requests || view.resource_version() > version;
                is_news.then(|| {
                    for request in view.requests().iter().skip(requests).filter(|request| request.code == 200) {
                        self.pods_watched |= (request.verb.as_str(), request.resource.as_str()) == ("watch", "pods");
                        self.node_watched |= (request.verb.as_str(), request.resource.as_str()) == ("watch", "nodes");
                    }
                    (view.requests().len(), view.resource_version())
                })
            });
            if let Some((requests, version)) = news {
                (self.requests, self.version) = (requests, version);
                self.act();
            }
        }
    }

    fn act(&mut self) {
        let api = Arc::clone(&self.api);
        let (labels, pods, offered) =
            api.view(|view| (view.labels(NODE), view.list("pods").len(), offered(view).unwrap_or_default()));
        if labels.is_empty() {
            return;
        }
        // Whoever makes a node gets its components deployed. The node may be gone again by now, as may a pod.
        let absent: Vec<&str> =
            OPERANDS.iter().map(|(label, _)| *label).filter(|label| !labels.contains_key(*label)).collect();
        for label in &absent {
            let _ = api.set_label(NODE, label, Some("true"));
        }
        if !absent.is_empty() {
            // That is news.
            return;
        }
        if OPERANDS.iter().all(|(label, _)| labels.get(*label).is_some_and(|value| value == "true")) {
            (self.pods_watched, self.node_watched) = (false, false);
            if pods == 0 {
                for (_, app) in OPERANDS {
                    let _ = api.add_pod(OPERATOR, app, NODE, &[("app", app)]);
                }
            }
            if offered != "2" {
                Self::offer(&api, "2");
            }
        } else if pods > 0 && self.pods_watched {
            self.take_time();
            self.node_watched = false;
            for (_, app) in OPERANDS {
                let _ = api.delete("pods", OPERATOR, app, Some(0));
            }
        } else if pods == 0 && offered != "0" && self.node_watched {
            self.take_time();
            Self::offer(&api, "0");
        }
    }

    fn take_time(&self) {
        if self.is_slow.load(Ordering::SeqCst) {
            std::thread::sleep(SLOW);
        }
    }

    fn offer(api: &ApiServer, count: &str) {
        let _ = api.merge("nodes/status", "", NODE, &json!({"status": {"allocatable": {RESOURCE: count}}}));
    }
}

fn offered(view: View<'_>) -> Option<String> {
    Some(view.get("nodes", "", NODE)?["status"]["allocatable"][RESOURCE].as_str()?.to_owned())
}

// -- the node --------------------------------------------------------------------------------------------------------

/// Where an agent is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// At its request of this number, before it takes effect or before it is answered.
    Request(usize, When),
    /// At the step of its firmware of this number.
    Step(usize),
}

/// When a request is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    BeforeEffect,
    BeforeAnswer,
}

/// How many requests an agent makes for a change, and how many steps its firmware takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) requests: usize,
    pub(crate) watches: usize,
    pub(crate) steps: usize,
}

/// A request that an agent has made.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) verb: String,
    pub(crate) resource: String,
    pub(crate) code: u16,
}

/// An agent.
pub(crate) struct Agent {
    pub(crate) shutdown: Shutdown,
    steps: Arc<Steps>,
    killed: tokio::sync::oneshot::Sender<()>,
    ended: mpsc::Receiver<Result<()>>,
    thread: JoinHandle<()>,
}

/// The node and all around it.
pub(crate) struct World {
    pub(crate) api: Arc<ApiServer>,
    here: tempfile::TempDir,
    sysfs: FakeSysfs,
    gpus: Vec<Gpu>,
    truth: Arc<Truth>,
    boots: u32,
    is_slow: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Agent {
    /// Waits until it has ended by itself.
    pub(crate) fn ended(self) -> Result<()> {
        self.ended.recv_timeout(PATIENCE).map_err(|_| anyhow!("the agent does not end"))??;
        self.thread.join().map_err(|_| anyhow!("the agent's thread panicked"))
    }

    /// Lets it go on from the step at which it is stopped.
    pub(crate) fn go_on(&self) {
        self.steps.change(|state| state.is_stopped = false);
    }
}

impl World {
    /// A node whose devices are in mode off, and nobody has said so yet.
    pub(crate) fn new() -> Result<Self> {
        Self::with_rights(Rule::operator_cc_manager(OPERATOR))
    }

    /// The same, with an agent that may do this.
    pub(crate) fn with_rights(rights: Vec<Rule>) -> Result<Self> {
        let here = tempfile::tempdir()?;
        let (sysfs, gpus) = parts::two_gpus();
        let truth = Arc::new(Truth {
            gpus: gpus.clone(),
            is_this_boot: AtomicBool::new(false),
            looks: AtomicUsize::new(0),
            lies: Mutex::default(),
        });
        let api = Arc::new(ApiServer::start(ApiServerConfig::default())?);
        let token = api.add_identity(AGENT, &["system:serviceaccounts"], rights);
        std::fs::write(here.path().join("kubeconfig"), api.kubeconfig(&token, "127.0.0.1"))?;
        let of_write = Arc::clone(&truth);
        api.on_node_write(move |entry| of_write.see_write(entry));
        api.add_node(NODE, &[(CC_MODE, "off")])?;
        let is_over = Arc::new(AtomicBool::new(false));
        let is_slow = Arc::new(AtomicBool::new(false));
        let mut cluster = Cluster {
            api: Arc::clone(&api),
            requests: 0,
            version: 0,
            pods_watched: false,
            node_watched: false,
            is_slow: Arc::clone(&is_slow),
        };
        let ends = Arc::clone(&is_over);
        let cluster = std::thread::spawn(move || cluster.run(&ends));
        let (ends, looked_at, looks) = (Arc::clone(&is_over), Arc::clone(&api), Arc::clone(&truth));
        let sampler = std::thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                looked_at.view(|view| looks.see(&view.labels(NODE), false));
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let threads = vec![cluster, sampler];
        Ok(Self { api, here, sysfs, gpus, truth, boots: 0, is_slow, is_over, threads })
    }

    /// The same, once an agent has found it so.
    pub(crate) fn settled() -> Result<Self> {
        let world = Self::new()?;
        let agent = world.start(None)?;
        world.until_settled(Mode::Off)?;
        world.kill(agent)?;
        Ok(world)
    }

    /// Whether operator and kubelet take their time from now on.
    pub(crate) fn slow_down(&self, is_slow: bool) {
        self.is_slow.store(is_slow, Ordering::SeqCst);
    }

    fn state_dir(&self) -> PathBuf {
        parts::state_dir(self.here.path())
    }

    /// What is to happen is wanted, and nobody is there yet who does it.
    pub(crate) fn prepare(&mut self, change: Change) -> Result<()> {
        if change.is_new_boot {
            self.boots += 1;
            self.truth.is_this_boot.store(false, Ordering::SeqCst);
            parts::boot(&self.sysfs, &self.gpus, self.here.path(), self.boots)?;
        }
        self.api.set_label(NODE, CC_MODE, Some(change.to.as_str()))?;
        Ok(())
    }

    /// Starts an agent, which is to stop at `point`.
    pub(crate) fn start(&self, point: Option<Point>) -> Result<Agent> {
        self.start_with(point, PATIENCE)
    }

    /// The same; it waits this long for an answer.
    pub(crate) fn start_with(&self, point: Option<Point>, answer: Duration) -> Result<Agent> {
        let steps = Arc::new(Steps::default());
        match point {
            Some(Point::Request(number, when)) => {
                let action = match when {
                    When::BeforeEffect => FaultAction::HoldBefore,
                    When::BeforeAnswer => FaultAction::HoldAfterCommit,
                };
                self.api.inject(Fault::new(action).user(AGENT).skip(number));
            }
            Some(Point::Step(number)) => steps.change(|state| state.stops_at = Some(number)),
            None => {}
        }
        let shutdown = Shutdown::manual();
        let firmware = VirtualFirmware {
            gpus: self.gpus.clone(),
            steps: Arc::clone(&steps),
            shutdown: shutdown.clone(),
            truth: Arc::clone(&self.truth),
            api: Arc::clone(&self.api),
        };
        let agent = Parts {
            firmware,
            root: self.sysfs.root(),
            place: self.here.path().to_owned(),
            node: NODE.to_owned(),
            namespace: OPERATOR.to_owned(),
            patience: PATIENCE,
            answer,
            retries: [Duration::from_millis(5), Duration::from_millis(20)],
            shutdown: shutdown.clone(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (killed, kill) = tokio::sync::oneshot::channel();
        let (tell, ended) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let result = runtime.block_on(async {
                tokio::select! {
                    result = agent.run() => result,
                    _ = kill => Ok(()),
                }
            });
            runtime.shutdown_background();
            // Whoever has killed it may not wait for it.
            let _ = tell.send(result);
        });
        Ok(Agent { shutdown, steps, killed, ended, thread })
    }

    /// Waits until the agent has come to the point at which it is to stop.
    pub(crate) fn until_stopped(&self, agent: &Agent, point: Point) -> Result<()> {
        match point {
            Point::Request(..) => self
                .api
                .wait_for(PATIENCE, |view| (view.held() > 0).then_some(()))
                .with_context(|| format!("no request to hold; {}", self.told())),
            Point::Step(_) => agent.steps.until("not stopped", |state| state.is_stopped),
        }
    }

    /// Kills the agent where it is. When this returns, nothing more is done in its name.
    pub(crate) fn kill(&self, agent: Agent) -> Result<()> {
        // It may have ended by itself.
        let _ = agent.killed.send(());
        agent.ended.recv_timeout(PATIENCE).map_err(|_| anyhow!("the agent does not die"))??;
        agent.thread.join().map_err(|_| anyhow!("the agent's thread panicked"))?;
        self.gpus.iter().for_each(|gpu| gpu.dies_at(0));
        agent.steps.change(|state| state.is_dead = true);
        agent.steps.until("firmware's threads do not end", |state| state.running == 0)?;
        for gpu in &self.gpus {
            gpu.succeed();
        }
        self.api.clear_faults();
        self.until_disconnected()
    }

    /// Waits until no request of an agent that is gone is on its way any more.
    fn until_disconnected(&self) -> Result<()> {
        let is_alone = |view: View<'_>| (view.connections() == 0).then_some(());
        self.api.wait_for(PATIENCE, is_alone).context("connections of an agent that is gone stay open")
    }

    /// Asks the agent to end where it is, and waits until it has.
    pub(crate) fn terminate(&self, agent: Agent) -> Result<()> {
        agent.shutdown.trigger();
        self.api.release();
        agent.go_on();
        let steps = Arc::clone(&agent.steps);
        agent.ended()?;
        steps.change(|state| state.is_dead = true);
        self.api.clear_faults();
        self.until_disconnected()?;
        steps.until("firmware goes on after the agent's end", |state| state.running == 0)
    }

    /// Somebody else resets the devices, and what is staged takes effect.
    pub(crate) fn reset_devices(&self) {
        for gpu in &self.gpus {
            gpu.function_reset();
            gpu.boot();
        }
    }

    /// Waits until the node is in `mode` and says so, with its components at work.
    pub(crate) fn until_settled(&self, mode: Mode) -> Result<()> {
        let is_settled = |view: View<'_>| {
            let labels = view.labels(NODE);
            let says = |key: &str, value: &str| labels.get(key).is_some_and(|found| found == value);
            let node = view.get("nodes", "", NODE)?;
            let status: Value = serde_json::from_str(view.annotation(NODE, annotations::CC_STATUS)?).ok()?;
            let is_so = self.truth.is_this_boot.load(Ordering::SeqCst)
                && says(CC_MODE_STATE, mode.as_str())
                && says(CC_READY_STATE, ready_state(mode))
                && OPERANDS.iter().all(|(label, _)| says(label, "true"))
                && view.annotation(NODE, annotations::TRANSITION).is_none()
                && (&status["wanted"], &status["result"]) == (&mode.as_str().into(), &"applied".into())
                && status["nodeUid"] == node["metadata"]["uid"]
                && view.list("pods").len() == OPERANDS.len()
                && offered(view).as_deref() == Some("2");
            is_so.then_some(())
        };
        self.api.wait_for(PATIENCE, is_settled).with_context(|| format!("not in mode {mode}; {}", self.told()))?;
        parts::are_in(&self.gpus, mode)?;
        let uid = self.api.get("nodes", "", NODE).unwrap_or_default()["metadata"]["uid"].clone();
        parts::are_noted_in(&self.gpus, mode, self.here.path(), uid.as_str())
    }

    /// The agent that has settled the node still follows it: it puts back what somebody takes away.
    pub(crate) fn is_still_followed(&self, mode: Mode) -> Result<()> {
        self.api.set_annotation(NODE, annotations::CC_STATUS, None)?;
        self.until_settled(mode).context("nobody puts the status back")
    }

    /// No label has said what is not so.
    pub(crate) fn nothing_false_was_said(&self) -> Result<()> {
        let lies = lock(&self.truth.lies);
        ensure!(lies.is_empty(), "lies: {lies:#?}");
        Ok(())
    }

    /// How often node object and devices have been compared.
    pub(crate) fn looks(&self) -> usize {
        self.truth.looks.load(Ordering::Relaxed)
    }

    /// The requests of all agents but for the first ones.
    pub(crate) fn requests_since(&self, before: usize) -> Vec<Request> {
        let of = |request: &RequestRecord| Request {
            verb: request.verb.clone(),
            resource: request.resource.clone(),
            code: request.code,
        };
        self.api.view(|view| view.requests().iter().skip(before).map(of).collect())
    }

    /// Waits until agents have made so many requests in all.
    pub(crate) fn until_requested(&self, count: usize) -> Result<()> {
        let is_so = |view: View<'_>| (view.requests().len() >= count).then_some(());
        self.api.wait_for(PATIENCE, is_so).with_context(|| format!("not {count} requests; {}", self.told()))
    }

    /// Waits until an agent watches the node, after so many requests.
    pub(crate) fn until_watched(&self, before: usize) -> Result<()> {
        let is_watch = |request: &&RequestRecord| (&*request.verb, &*request.resource) == ("watch", "nodes");
        let is_so = |view: View<'_>| view.requests().iter().skip(before).find(is_watch).map(drop);
        self.api.wait_for(PATIENCE, is_so).context("nobody watches the node")
    }

    /// Makes this change in peace, and tells how much there was to do.
    pub(crate) fn extent(&mut self, change: Change) -> Result<Extent> {
        let before = self.requests_since(0).len();
        self.prepare(change)?;
        let agent = self.start(None)?;
        self.until_settled(change.to)?;
        // Events come after the result.
        let mut requests = self.requests_since(before);
        while self
            .api
            .wait_for(Duration::from_millis(200), |view| {
                (view.requests().len() > before + requests.len()).then_some(())
            })
            .is_some()
        {
            requests = self.requests_since(before);
        }
        let watches = requests.iter().filter(|request| request.verb == "watch").count();
        let steps = lock(&agent.steps.state).taken.len();
        self.kill(agent)?;
        Ok(Extent { requests: requests.len(), watches, steps })
    }

    /// What can be seen from outside, for messages.
    fn told(&self) -> String {
        let requests = self.requests_since(0);
        let last = &requests[requests.len().saturating_sub(25)..];
        let node = self.api.get("nodes", "", NODE).unwrap_or_default();
        let (metadata, offered) = (&node["metadata"], &node["status"]["allocatable"]);
        let devices: Vec<_> = self.gpus.iter().map(|gpu| format!("{:#x}", gpu.status().status_word)).collect();
        format!(
            "devices {devices:?}, uid {}, labels {:#}, annotations {:#}, allocatable {offered}, last requests {last:?}",
            metadata["uid"], metadata["labels"], metadata["annotations"]
        )
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            // A thread that has panicked has told so.
            let _ = thread.join();
        }
    }
}
