//! The loop: look at the node, derive the units, write the CDI files, tell the kubelet. On every event, and on a poll.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent_core::hostfile::HostDir;
use agent_core::http::StateDump;
use agent_core::metrics::Metrics;
use agent_core::readiness::{Guard, Registry};
use agent_core::shutdown::Shutdown;
use agent_core::state::{ErrorRecord, FileProblem, Origin, UNITS_DIR, UnitRecord, UnitsFile};
use agent_core::text::chain;
use agent_core::uevents::DeviceEvents;
use hw_probe::{AerCounts, Bdf, Holders, holders};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle, JoinSet, spawn_blocking, yield_now};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::cdi::{CdiFolder, Problem, Resolver, render};
use crate::checkpoint::{self, Book, Decision, Lately};
use crate::features::FeatureFile;
use crate::health::{self, Errors, FlapRule, Flaps, Remark};
use crate::metrics::PluginMetrics;
use crate::names::ResourceName;
use crate::observe::{ObserveError, Places, observe};
use crate::plugin::Plugin;
use crate::pods::{self, Listener, Pods};
use crate::quarantine::{Facts, Quarantine, SETTLED};
use crate::server::{Manner, Role, Snapshot};
use crate::units::{Fault, Observation, Policy, Unit, units, withdrawn};
use crate::watch::FolderWatch;

/// How long one look at the node may take before its units are withdrawn.
const LOOK: Duration = Duration::from_secs(30);
/// Events come in bursts (a rebind is four): one look for all of them.
const SETTLE: Duration = Duration::from_millis(50);
/// How long a CDI file keeps a device after the kubelet was told that it is of no use: no longer than a stream needs to
/// hear it.
const LINGER: Duration = Duration::from_millis(500);
/// How long the plugins may take to end.
const END: Duration = Duration::from_secs(5);

/// What the agent runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the node is looked at.
    pub places: Places,
    /// What is wanted.
    pub policy: Policy,
    /// How the kubelet's requests are answered.
    pub manner: Manner,
    /// Folder of the CDI files.
    pub cdi_dir: PathBuf,
    /// The other folder that CDI libraries read, which counts less.
    pub cdi_static_dir: PathBuf,
    /// The kubelet's device plugin folder.
    pub plugin_dir: PathBuf,
    /// Longest time between two looks at the node.
    pub poll: Duration,
    /// What is looked at besides sysfs, and where it is told.
    pub looks: Looks,
}

/// What is looked at besides sysfs, and where what was found is told besides to the kubelet.
#[derive(Clone, Debug)]
pub struct Looks {
    /// Whether units are called as the kubelet's book asks for, by their addresses or by numbers; else the policy says.
    pub ids_by_book: bool,
    /// When a unit that comes and goes is held back.
    pub flaps: FlapRule,
    /// For how long a unit must be in use without a pod before it is held back.
    pub settled: Duration,
    /// Socket of the kubelet's pod-resources service; empty, or where it is not there, its book has to do.
    pub pod_resources: PathBuf,
    /// Feature file for Node Feature Discovery.
    pub features_file: FeatureFile,
    /// Where the units are shown on request.
    pub state: StateDump,
}

impl Default for Looks {
    /// Sysfs and the kubelet's book are all that is looked at.
    fn default() -> Self {
        Self {
            ids_by_book: false,
            flaps: FlapRule::default(),
            settled: SETTLED,
            pod_resources: PathBuf::new(),
            features_file: FeatureFile::default(),
            state: StateDump::default(),
        }
    }
}

/// Why the agent ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// A part of it failed: there is nothing left that would be worth keeping alive.
    #[error("The task that serves a resource failed")]
    Task(#[from] JoinError),
    /// The same, without a reason.
    #[error("The task that serves a resource ended by itself")]
    Ended,
}

/// Runs until the shutdown.
pub async fn run(
    config: Config,
    shutdown: Shutdown,
    readiness: Registry,
    metrics: &Metrics,
) -> Result<(), ControllerError> {
    // A folder that is not there cannot be watched, and cc-manager's first word would be heard a poll late. Where we may
    // not make it, the poll is all there is.
    if let Err(error) = HostDir::open(&config.places.state_dir) {
        tracing::info!(reason = chain(&error), "The folder of devices.json is not there and cannot be made");
    }
    let Looks { flaps, settled, .. } = config.looks;
    let mut controller = Controller {
        state: FolderWatch::new(&config.places.state_dir),
        seen: None,
        metrics: PluginMetrics::register(metrics),
        scanned: readiness.register("scan"),
        cdi: CdiFolder::new(&config.cdi_dir),
        resolver: Resolver::new([config.cdi_static_dir.clone(), config.cdi_dir.clone()]),
        changes: FolderWatch::new(&config.cdi_dir),
        leaving: BTreeMap::new(),
        problems: BTreeMap::new(),
        config,
        shutdown,
        readiness,
        units: Vec::new(),
        resources: BTreeMap::new(),
        tasks: JoinSet::new(),
        pending: None,
        trouble: None,
        said: BTreeMap::new(),
        ids: None,
        book: Book::Absent,
        lately: Lately::default(),
        flaps: Flaps::new(flaps),
        errors: Errors::default(),
        remarks: BTreeMap::new(),
        quarantine: Quarantine::new(settled),
        pods: Pods::Unknown("not asked yet".into()),
        listener: Listener::default(),
        looked: Vec::new(),
        written: None,
    };
    // The loop is large, and whoever runs it should not have to be.
    let ended = Box::pin(controller.work()).await;
    controller.shutdown.trigger();
    let Controller { mut tasks, resources, .. } = controller;
    drop(resources);
    let deadline = Instant::now() + END;
    while let Ok(Some(_)) = timeout_at(deadline, tasks.join_next()).await {}
    ended
}

/// What one look finds.
struct Sight {
    seen: Observation,
    book: Book,
    errors: BTreeMap<Bdf, AerCounts>,
}

/// Looks at the node and at the kubelet's book. Blocks.
fn look(places: &Places, plugin_dir: &std::path::Path) -> Result<Sight, ObserveError> {
    let seen = observe(places)?;
    let mains = seen.inventory.gpus().chain(seen.inventory.nvswitches());
    let errors = mains.filter_map(|main| Some((main.bdf, AerCounts::read(&places.root, main.bdf)?))).collect();
    Ok(Sight { book: Book::read(plugin_dir), errors, seen })
}

type Look = JoinHandle<Result<Sight, ObserveError>>;

/// How waiting for something ended.
enum Waited<T> {
    Done(T),
    /// A device or cc-manager has news: it is time to look.
    News,
    /// The shutdown.
    Over,
}

struct Controller {
    config: Config,
    cdi: CdiFolder,
    resolver: Resolver,
    /// The folder of the CDI files.
    changes: FolderWatch,
    /// Units that the kubelet was told are of no use, and that the CDI files have until then.
    leaving: BTreeMap<(ResourceName, String), (Instant, Unit)>,
    /// CDI files of others by which Kata may start no pod, as they were told last.
    problems: BTreeMap<PathBuf, Problem>,
    shutdown: Shutdown,
    readiness: Registry,
    scanned: Guard,
    metrics: PluginMetrics,
    /// The folder of `devices.json`.
    state: FolderWatch,
    /// What was seen last, with cc-manager's word of now.
    seen: Option<Observation>,
    /// What the kubelet was told last.
    units: Vec<Unit>,
    resources: BTreeMap<ResourceName, watch::Sender<Snapshot>>,
    tasks: JoinSet<()>,
    /// A look that has not come back: no second thread is sent after it.
    pending: Option<Look>,
    /// What was logged last as being in the way.
    trouble: Option<String>,
    /// What was logged last of other things, by topic.
    said: BTreeMap<&'static str, String>,
    /// By which kind of ID units are called, where the kubelet's book decides.
    ids: Option<Decision>,
    book: Book,
    lately: Lately,
    flaps: Flaps,
    errors: Errors,
    remarks: BTreeMap<Bdf, Vec<Remark>>,
    quarantine: Quarantine,
    pods: Pods,
    listener: Listener,
    /// The units as the last look has found them, without those that are held back for their use.
    looked: Vec<Unit>,
    /// What was written for people last.
    written: Option<UnitsFile>,
}

impl Controller {
    async fn work(&mut self) -> Result<(), ControllerError> {
        let mut devices = DeviceEvents::subscribe();
        loop {
            let next = Instant::now() + self.config.poll;
            self.state.arm();
            let watched = self.changes.arm();
            let (places, plugin_dir) = (self.config.places.clone(), self.config.plugin_dir.clone());
            let look = self.pending.take().unwrap_or_else(|| spawn_blocking(move || look(&places, &plugin_dir)));
            let (looked, heard) = self.hearing(look_within(look)).await;
            let Some((looked, pending)) = looked else { return Ok(()) };
            self.pending = pending;
            self.apply(looked);
            // The kubelet first: it waits for this, and nobody waits for what follows.
            yield_now().await;
            // What was seen is older than what cc-manager has said meanwhile.
            let next = match self.learn(&mut devices).await {
                Waited::Over => return Ok(()),
                Waited::News => {
                    self.show();
                    Instant::now()
                }
                Waited::Done(()) if heard => Instant::now(),
                Waited::Done(()) => next,
            };
            // The folder of CDI files may have been made just now, and could not be watched before.
            let made = self.changes.arm() && !watched;
            let next = if made { Instant::now() } else { next };
            let next = self.leaving.values().map(|(until, _)| *until).chain([next]).min().unwrap_or(next);
            let woken = async {
                tokio::select! {
                    () = devices.changed() => {}
                    () = self.changes.changed() => {}
                    () = sleep(next.saturating_duration_since(Instant::now())) => {}
                }
            };
            tokio::select! {
                () = self.shutdown.wait() => return Ok(()),
                ended = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    if self.shutdown.is_requested() {
                        return Ok(());
                    }
                    return match ended {
                        Some(Err(error)) => Err(error.into()),
                        _ => Err(ControllerError::Ended),
                    };
                }
                () = self.state.changed() => self.hear(),
                () = woken => {}
            }
            if self.hearing(sleep(SETTLE)).await.0.is_none() {
                return Ok(());
            }
            devices.drain();
        }
    }

    /// Waits for `work`, and meanwhile acts on each word of cc-manager; tells whether there was one. None: the shutdown.
    async fn hearing<T>(&mut self, work: impl Future<Output = T>) -> (Option<T>, bool) {
        tokio::pin!(work);
        let mut heard = false;
        loop {
            tokio::select! {
                done = &mut work => return (Some(done), heard),
                () = self.shutdown.wait() => return (None, heard),
                () = self.state.changed() => {
                    self.hear();
                    heard = true;
                }
            }
        }
    }

    /// As [`Self::hearing`], and an event of a device ends the waiting, too.
    async fn waiting<T>(&mut self, devices: &mut DeviceEvents, work: impl Future<Output = T>) -> Waited<T> {
        tokio::select! {
            () = devices.changed() => Waited::News,
            (done, heard) = self.hearing(work) => match done {
                None => Waited::Over,
                Some(_) if heard => Waited::News,
                Some(done) => Waited::Done(done),
            },
        }
    }

    /// Learns who has the devices, after the kubelet was told: nobody waits for these answers.
    async fn learn(&mut self, devices: &mut DeviceEvents) -> Waited<()> {
        // What is not seen is not judged anew.
        if self.trouble.is_some() {
            self.show();
            return Waited::Done(());
        }
        let socket = self.config.looks.pod_resources.clone();
        self.pods = match self.waiting(devices, async move { pods::ask(&socket).await }).await {
            Waited::Done(Some(Ok(answer))) => self.listener.hear(Instant::now(), answer, &self.book),
            Waited::Done(Some(Err(why))) => {
                self.once("pod-resources", &why, |why| {
                    tracing::warn!(
                        reason = why,
                        "The kubelet does not tell which pod has which device; its book has to do"
                    );
                });
                Pods::by_book(&self.book)
            }
            Waited::Done(None) => Pods::by_book(&self.book),
            Waited::News => return Waited::News,
            Waited::Over => return Waited::Over,
        };
        let Some(seen) = &self.seen else { return Waited::Done(()) };
        let held: Option<Holders> = if Quarantine::asks(&self.looked, &self.pods, &seen.inventory) {
            let root = self.config.places.root.clone();
            match self.waiting(devices, spawn_blocking(move || holders(&root))).await {
                Waited::Done(holders) => holders.ok(),
                Waited::News => return Waited::News,
                Waited::Over => return Waited::Over,
            }
        } else {
            None
        };
        let Some(seen) = &self.seen else { return Waited::Done(()) };
        let facts = Facts { inventory: &seen.inventory, pods: &self.pods, holders: held.as_ref() };
        let has_news = self.quarantine.step(Instant::now(), &self.looked, &facts);
        if has_news {
            let mut now = self.looked.clone();
            self.quarantine.settle(&mut now);
            // What cc-manager has said meanwhile still counts.
            let mut now = withdrawn(&self.config.policy, seen, &now);
            self.write_cdi(&mut now);
            self.tell(now);
        }
        self.show();
        self.say_what_is_not_seen();
        Waited::Done(())
    }

    fn say_what_is_not_seen(&mut self) {
        if let Pods::Unknown(why) = &self.pods {
            let why = why.clone();
            self.once("pods", &why, |why| {
                tracing::info!(
                    reason = why,
                    "It is not known which pod has which device: a device that outlives its pod in use is not held back"
                );
            });
        }
        if let Some(blind) = self.blind() {
            self.once("use", &blind, |blind| {
                tracing::info!(reason = blind, "It cannot be seen whether some units are in use");
            });
        }
    }

    /// Why it cannot be seen of some units whether they are in use.
    fn blind(&self) -> Option<String> {
        let units: Vec<String> = self.quarantine.unseen().iter().map(ToString::to_string).collect();
        (!units.is_empty() && self.pods.are_known()).then(|| {
            format!(
                "{}: the processes of the host are not seen (that takes hostPID and CAP_SYS_PTRACE), and the device was not seen \
                 to sleep on VFIO since this agent started",
                units.join(", ")
            )
        })
    }

    /// Logs what is new on a topic.
    fn once(&mut self, topic: &'static str, text: &str, log: impl FnOnce(&str)) {
        if self.said.get(topic).is_none_or(|said| said != text) {
            log(text);
            self.said.insert(topic, text.to_owned());
        }
    }

    /// cc-manager's word has changed: what it takes away is withdrawn now, before the node is looked at again.
    fn hear(&mut self) {
        let Some(seen) = &mut self.seen else { return };
        seen.hear(&self.config.places);
        let now = withdrawn(&self.config.policy, seen, &self.units);
        self.tell(now);
        self.show();
    }

    /// From what was seen to what Kata finds and the kubelet hears, in this order: what is advertised can be resolved.
    fn apply(&mut self, looked: Result<Sight, String>) {
        let mut now = match looked {
            Ok(sight) => {
                self.say(None);
                self.scanned.ready();
                self.judge(sight)
            }
            Err(why) => {
                self.say(Some(why.clone()));
                let blind = |unit: &Unit| Unit { fault: Some(Fault::Unobserved(why.clone())), ..unit.clone() };
                self.units.iter().map(blind).collect()
            }
        };
        self.write_cdi(&mut now);
        self.tell(now);
    }

    /// The units by what a look has found, and by what is remembered of former looks.
    fn judge(&mut self, Sight { mut seen, book, errors }: Sight) -> Vec<Unit> {
        // The look took its time, and its word of cc-manager may be an old one.
        seen.hear(&self.config.places);
        self.book = book;
        self.choose_ids(&mut seen);
        self.remark(&seen, &errors);
        self.write_features(&seen);
        let mut now = units(&self.config.policy, &seen, &self.units);
        for fall in self.flaps.settle(Instant::now(), &mut now) {
            self.metrics.fell(fall);
        }
        self.quarantine.watch(&seen.inventory);
        self.looked.clone_from(&now);
        self.quarantine.settle(&mut now);
        self.seen = Some(seen);
        now
    }

    /// By which kind of ID units are called from now on. Nothing is awaited between this and [`Self::publish`], so that no
    /// allocation comes between.
    fn choose_ids(&mut self, seen: &mut Observation) {
        let ours = checkpoint::resources(&self.config.policy, &seen.inventory);
        if !self.config.looks.ids_by_book {
            let scheme = self.config.policy.scheme;
            if let Some(given) = checkpoint::contradiction(&self.book, &ours, scheme) {
                let text = format!("pod {} has device {} of {}", given.pod, given.id, given.resource);
                self.once("ids", &text, |text| {
                    tracing::warn!(
                        reason = text,
                        "Units are called otherwise than a pod's device is, as --device-id-scheme asks: that device is offered \
                         twice until the pod has ended"
                    );
                });
            }
            self.metrics.called(scheme, "chosen");
            return;
        }
        let lately = self.lately.all();
        let decision = checkpoint::decide(&self.book, &lately, &ours, self.ids.as_ref());
        let text = decision.why.to_string();
        self.once("ids", &text, |reason| {
            tracing::info!(event = "id_scheme", scheme = decision.scheme.word(), reason, "How units are called");
        });
        self.config.policy.scheme = decision.scheme;
        seen.given = self.book.given().iter().map(|given| (given.resource.clone(), given.id.clone())).collect();
        seen.given.extend(lately);
        self.metrics.called(decision.scheme, decision.why.code());
        self.ids = Some(decision);
    }

    /// Notes what is to be remarked of devices that can be used, and logs what is new of it.
    fn remark(&mut self, seen: &Observation, errors: &BTreeMap<Bdf, AerCounts>) {
        let mut remarks: BTreeMap<Bdf, Vec<Remark>> = BTreeMap::new();
        for main in seen.inventory.gpus().chain(seen.inventory.nvswitches()) {
            let mut of_main = health::link(&seen.inventory, main);
            of_main.extend(errors.get(&main.bdf).and_then(|counts| self.errors.since(main, *counts)));
            let before = self.remarks.get(&main.bdf).map(Vec::as_slice).unwrap_or_default();
            for remark in of_main.iter().filter(|remark| !before.contains(remark)) {
                tracing::warn!(
                    event = "device_remark", bdf = %main.bdf, code = remark.code(), reason = %remark,
                    "The device works less well than it could"
                );
            }
            if !of_main.is_empty() {
                remarks.insert(main.bdf, of_main);
            }
        }
        self.errors.keep(|bdf| seen.inventory.get(bdf).is_some());
        self.metrics.remarked(&remarks, errors);
        self.remarks = remarks;
    }

    /// Keeps the feature file as the node is.
    fn write_features(&mut self, seen: &Observation) {
        let file = &self.config.looks.features_file;
        match file.sync(&seen.inventory) {
            Ok(true) => {
                tracing::info!(event = "features", path = %file.path().display(), "The node's features are told anew");
            }
            Ok(false) => {}
            Err(why) => self.once("features", &why, |why| {
                tracing::warn!(reason = why, "The feature file for Node Feature Discovery is left as it is");
            }),
        }
    }

    /// Shows people what the kubelet is told, and why: on request, and in a file that the host sees.
    fn show(&mut self) {
        let file = self.file();
        self.metrics
            .allocated(file.units.iter().filter_map(|unit| Some((&*unit.resource, &*unit.id, unit.pod.as_deref()?))));
        self.metrics.quarantined(self.quarantine.count());
        let folder = self.config.plugin_dir.join(UNITS_DIR);
        let is_told = self.written.as_ref().is_some_and(|written| written.says_as(&file));
        if is_told && folder.join(agent_core::state::UNITS_FILE).exists() {
            return;
        }
        if let Ok(text) = serde_json::to_string(&file) {
            self.config.looks.state.show(text);
        }
        // Without the kubelet's folder there is no kubelet either.
        let stored = match HostDir::open_existing(&self.config.plugin_dir) {
            Ok(None) => return,
            Ok(Some(_)) => HostDir::open(&folder).map_err(Into::into).and_then(|folder| file.store(&folder)),
            Err(error) => Err(error.into()),
        };
        match stored {
            Ok(()) => self.written = Some(file),
            Err(error) => self.once("units-file", &chain(&error), |why| {
                tracing::info!(reason = why, "What the kubelet is told cannot be written down for ccnode status");
            }),
        }
    }

    fn file(&self) -> UnitsFile {
        let inventory = self.seen.as_ref().map(|seen| &seen.inventory);
        let boot_id = inventory.and_then(|inventory| inventory.host.boot_id.clone()).unwrap_or_default();
        let record = |unit: &Unit| {
            let remarks = unit.functions.iter().filter_map(|bdf| self.remarks.get(bdf)).flatten();
            UnitRecord {
                resource: unit.resource.to_string(),
                id: unit.id.clone(),
                bdf: unit.bdf,
                functions: unit.functions.clone(),
                nodes: unit.nodes.clone(),
                numa: unit.numa.iter().copied().collect(),
                healthy: unit.fault.is_none(),
                error: unit
                    .fault
                    .as_ref()
                    .map(|fault| ErrorRecord { code: fault.code().to_owned(), message: fault.to_string() }),
                pod: inventory.and_then(|inventory| self.pods.of(unit, inventory)).map(str::to_owned),
                remarks: remarks.map(ToString::to_string).collect(),
            }
        };
        UnitsFile {
            origin: Origin::now(boot_id, None),
            ids: self.config.policy.scheme.word().to_owned(),
            ids_reason: self.ids.as_ref().map_or_else(|| "--device-id-scheme".to_owned(), |ids| ids.why.to_string()),
            pods: self.pods.source(),
            blind: self.blind(),
            cdi_problems: self.problems.iter().map(file_problem).collect(),
            units: self.units.iter().map(record).collect(),
        }
    }

    /// Tells the log what is new, and the kubelet.
    fn tell(&mut self, now: Vec<Unit>) {
        for unit in &now {
            let before = self.units.iter().find(|before| before.id == unit.id && before.bdf == unit.bdf);
            // By cause and not by words: the steps of a mode change are one piece of news.
            let cause = |unit: &Unit| unit.fault.as_ref().map(Fault::code);
            if before.is_none_or(|before| cause(before) != cause(unit)) {
                tell(unit);
            }
        }
        for gone in self.units.iter().filter(|before| !now.iter().any(|unit| unit.id == before.id)) {
            tracing::info!(
                event = "unit_gone", unit = gone.id, bdf = %gone.bdf, resource = %gone.resource,
                "The unit is no longer on this node under this ID"
            );
        }
        self.units = now;
        self.metrics.told(&self.units);
        self.publish();
    }

    /// Writes what is new before the kubelet is told of it, and keeps what goes until the kubelet has heard.
    fn write_cdi(&mut self, now: &mut [Unit]) {
        if self.config.manner.role == Role::Kubevirt {
            return;
        }
        let stays = |unit: &Unit| now.iter().any(|now| named(now) == named(unit) && !now.nodes.is_empty());
        let until = Instant::now() + LINGER;
        for unit in self.units.iter().filter(|unit| !unit.nodes.is_empty() && !stays(unit)) {
            self.leaving.entry(named(unit)).or_insert_with(|| (until, unit.clone()));
        }
        self.leaving.retain(|_, (until, unit)| *until > Instant::now() && !stays(unit));
        let mut by_resource: BTreeMap<ResourceName, Vec<Unit>> = BTreeMap::new();
        for unit in now.iter().filter(|unit| !unit.nodes.is_empty()).chain(self.leaving.values().map(|(_, unit)| unit))
        {
            by_resource.entry(unit.resource.clone()).or_default().push(unit.clone());
        }
        let files: BTreeMap<ResourceName, String> =
            by_resource.iter().filter_map(|(name, units)| Some((name.clone(), render(name, units)?))).collect();
        let synced = self.cdi.sync(&files);
        for (resource, path) in &synced.written {
            let devices: Vec<&str> =
                by_resource.get(resource).into_iter().flatten().map(|unit| unit.id.as_str()).collect();
            let devices = devices.join(",");
            tracing::info!(event = "cdi_written", path = %path.display(), devices, %resource, "CDI file written");
        }
        for path in &synced.removed {
            tracing::info!(event = "cdi_removed", path = %path.display(), "Stale CDI file removed");
        }
        let resolved = self.resolver.check(now);
        for unit in now.iter_mut().filter(|unit| unit.fault.is_none()) {
            unit.fault = if let Some(error) = synced.failed.get(&unit.resource) {
                Some(Fault::NoCdi(error.clone()))
            } else {
                resolved.failed.get(&named(unit)).cloned().map(Fault::CdiConflict)
            };
        }
        let is_new = |(path, problem): &(&PathBuf, &Problem)| self.problems.get(*path) != Some(problem);
        for (path, problem) in resolved.problems.iter().filter(is_new) {
            tracing::warn!(
                event = "cdi_problem", path = %path.display(), code = problem.code(), reason = %problem,
                "A CDI file of this node may keep every Kata pod from starting"
            );
        }
        for path in self.problems.keys().filter(|path| !resolved.problems.contains_key(*path)) {
            tracing::info!(event = "cdi_problem_gone", path = %path.display(), "Nothing is wrong with this CDI file any more");
        }
        self.metrics.cdi_problems(&resolved.problems);
        self.problems = resolved.problems;
    }

    /// Hands each resource its units, and brings a resource to life that has none yet.
    fn publish(&mut self) {
        let mut lists: BTreeMap<ResourceName, Vec<Unit>> =
            self.resources.keys().map(|name| (name.clone(), Vec::new())).collect();
        for unit in &self.units {
            lists.entry(unit.resource.clone()).or_default().push(unit.clone());
        }
        for (resource, list) in lists {
            if let Some(sender) = self.resources.get(&resource) {
                sender.send_if_modified(|told| {
                    let news = **told != list;
                    if news {
                        *told = Arc::new(list);
                    }
                    news
                });
            } else {
                let (sender, units) = watch::channel(Arc::new(list));
                let plugin = Plugin {
                    resource: resource.clone(),
                    units,
                    folder: self.config.plugin_dir.clone(),
                    manner: self.config.manner,
                    shutdown: self.shutdown.clone(),
                    ready: self.readiness.register(resource.to_string()),
                    metrics: self.metrics.clone(),
                    lately: self.lately.clone(),
                };
                self.tasks.spawn(plugin.run());
                self.resources.insert(resource, sender);
            }
        }
    }

    /// Logs what is in the way once, and once that it is not any more.
    fn say(&mut self, trouble: Option<String>) {
        if self.trouble == trouble {
            return;
        }
        if let Some(reason) = &trouble {
            tracing::error!(reason, "The node cannot be observed; its units are withdrawn");
        } else {
            tracing::info!("The node can be observed again");
        }
        self.trouble = trouble;
    }
}

/// Waits for a look, and hands it back where it is late: no second thread is sent after it.
async fn look_within(mut look: Look) -> (Result<Sight, String>, Option<Look>) {
    match timeout(LOOK, &mut look).await {
        Err(_) => (Err(format!("Reading sysfs has not come back within {LOOK:?}")), Some(look)),
        Ok(Ok(Ok(sight))) => (Ok(sight), None),
        Ok(Ok(Err(error))) => (Err(chain(&error)), None),
        Ok(Err(error)) => (Err(chain(&error)), None),
    }
}

fn file_problem((path, problem): (&PathBuf, &Problem)) -> FileProblem {
    let error = ErrorRecord { code: problem.code().to_owned(), message: problem.to_string() };
    FileProblem { path: path.display().to_string(), error }
}

/// What the kubelet and CDI call it.
fn named(unit: &Unit) -> (ResourceName, String) {
    (unit.resource.clone(), unit.id.clone())
}

fn tell(unit: &Unit) {
    let (unit_id, bdf, resource) = (&unit.id, unit.bdf, &unit.resource);
    match &unit.fault {
        None => tracing::info!(
            event = "unit_health", unit = unit_id, %bdf, %resource, healthy = true, reason = "",
            numa = ?unit.numa, nodes = unit.nodes.join(","), "The unit can be allocated"
        ),
        Some(fault) => tracing::warn!(
            event = "unit_health", unit = unit_id, %bdf, %resource, healthy = false, reason = %fault, code = fault.code(),
            "The unit cannot be allocated"
        ),
    }
}
