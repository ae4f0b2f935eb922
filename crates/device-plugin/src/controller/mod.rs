//! The loop: look at the node, derive the units, write the CDI files, tell the kubelet. On every event, and on a poll.

mod cdi_files;
mod judge;
mod look;
mod show;
mod tell;
mod users;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use agent_core::hostfile::HostDir;
use agent_core::http::StateDump;
use agent_core::metrics::Metrics;
use agent_core::readiness::{Guard, Registry};
use agent_core::shutdown::Shutdown;
use agent_core::state::UnitsFile;
use agent_core::text::chain;
use agent_core::uevents::DeviceEvents;
use hw_probe::Bdf;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet, spawn_blocking, yield_now};
use tokio::time::{Instant, sleep, timeout_at};

use self::look::{Look, Sight, look, look_within};
use crate::cdi::{CdiFolder, Problem, Resolver};
use crate::checkpoint::{Book, Decision, Lately};
use crate::features::FeatureFile;
use crate::health::{Errors, FlapRule, Flaps, Remark};
use crate::metrics::PluginMetrics;
use crate::names::ResourceName;
use crate::observe::Places;
use crate::plugin::Aside;
use crate::pods::{Listener, Pods};
use crate::quarantine::{Quarantine, SETTLED};
use crate::server::{Manner, Snapshot};
use crate::units::{Fault, Observation, Policy, Unit, withdrawn};
use crate::watch::FolderWatch;

/// Events come in bursts (a rebind is four): one look for all of them.
const SETTLE: Duration = Duration::from_millis(50);
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
    /// Whether nothing is offered: what would be is in log, metrics and `units.json` alone.
    pub only_observe: bool,
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
            only_observe: false,
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
    if !config.looks.only_observe
        && let Err(error) = HostDir::open(&config.places.state_dir)
    {
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
        aside: Aside::default(),
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
    /// Resources that another process serves: what Kata finds of them is the other's to say.
    aside: Aside,
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
        let mut aside = self.aside.subscribe();
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
                    _ = aside.changed() => {}
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
                if self.seen.is_none() {
                    // Nothing was offered yet, and the files of the agent before us are all that admitted pods have.
                    return;
                }
                let blind = |unit: &Unit| Unit { fault: Some(Fault::Unobserved(why.clone())), ..unit.clone() };
                self.units.iter().map(blind).collect()
            }
        };
        self.write_cdi(&mut now);
        self.tell(now);
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
