//! The loop: look at the node, derive the units, write the CDI files, tell the kubelet. On every event, and on a poll.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent_core::hostfile::HostDir;
use agent_core::metrics::Metrics;
use agent_core::readiness::{Guard, Registry};
use agent_core::shutdown::Shutdown;
use agent_core::text::chain;
use agent_core::uevents::DeviceEvents;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle, JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::cdi::{CdiFolder, Resolver, render};
use crate::metrics::PluginMetrics;
use crate::names::ResourceName;
use crate::observe::{ObserveError, Places, observe};
use crate::plugin::Plugin;
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
    let mut controller = Controller {
        state: FolderWatch::new(&config.places.state_dir),
        seen: None,
        metrics: PluginMetrics::register(metrics),
        scanned: readiness.register("scan"),
        cdi: CdiFolder::new(&config.cdi_dir),
        resolver: Resolver::new([config.cdi_static_dir.clone(), config.cdi_dir.clone()]),
        changes: FolderWatch::new(&config.cdi_dir),
        leaving: BTreeMap::new(),
        broken: BTreeMap::new(),
        config,
        shutdown,
        readiness,
        units: Vec::new(),
        resources: BTreeMap::new(),
        tasks: JoinSet::new(),
        pending: None,
        trouble: None,
    };
    let ended = controller.work().await;
    controller.shutdown.trigger();
    let Controller { mut tasks, resources, .. } = controller;
    drop(resources);
    let deadline = Instant::now() + END;
    while let Ok(Some(_)) = timeout_at(deadline, tasks.join_next()).await {}
    ended
}

type Look = JoinHandle<Result<Observation, ObserveError>>;

struct Controller {
    config: Config,
    cdi: CdiFolder,
    resolver: Resolver,
    /// The folder of the CDI files.
    changes: FolderWatch,
    /// Units that the kubelet was told are of no use, and that the CDI files have until then.
    leaving: BTreeMap<(ResourceName, String), (Instant, Unit)>,
    /// CDI files that do not parse, as they were logged last.
    broken: BTreeMap<PathBuf, String>,
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
}

impl Controller {
    async fn work(&mut self) -> Result<(), ControllerError> {
        let mut devices = DeviceEvents::subscribe();
        loop {
            let next = Instant::now() + self.config.poll;
            self.state.arm();
            let watched = self.changes.arm();
            let places = self.config.places.clone();
            let look = self.pending.take().unwrap_or_else(|| spawn_blocking(move || observe(&places)));
            let (looked, heard) = self.hearing(look_within(look)).await;
            let Some((looked, pending)) = looked else { return Ok(()) };
            self.pending = pending;
            self.apply(looked);
            // What was seen is older than what cc-manager has said meanwhile.
            // So is the folder of CDI files that has just been made, and could not be watched before.
            let made = self.changes.arm() && !watched;
            let next = if heard || made { Instant::now() } else { next };
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

    /// cc-manager's word has changed: what it takes away is withdrawn now, before the node is looked at again.
    fn hear(&mut self) {
        let Some(seen) = &mut self.seen else { return };
        seen.hear(&self.config.places);
        let now = withdrawn(&self.config.policy, seen, &self.units);
        self.tell(now);
    }

    /// From what was seen to what Kata finds and the kubelet hears, in this order: what is advertised can be resolved.
    fn apply(&mut self, looked: Result<Observation, String>) {
        let mut now = match looked {
            Ok(mut seen) => {
                self.say(None);
                self.scanned.ready();
                // The look took its time, and its word of cc-manager may be an old one.
                seen.hear(&self.config.places);
                let units = units(&self.config.policy, &seen, &self.units);
                self.seen = Some(seen);
                units
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
        for (path, reason) in resolved.problems.iter().filter(|(path, reason)| self.broken.get(*path) != Some(reason)) {
            tracing::warn!(
                event = "cdi_broken", path = %path.display(), reason,
                "A CDI file does not parse, which may keep every Kata pod on this node from starting; repair or remove it"
            );
        }
        self.metrics.cdi_problems(resolved.problems.len());
        self.broken = resolved.problems;
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
async fn look_within(mut look: Look) -> (Result<Observation, String>, Option<Look>) {
    match timeout(LOOK, &mut look).await {
        Err(_) => (Err(format!("Reading sysfs has not come back within {LOOK:?}")), Some(look)),
        Ok(Ok(Ok(observation))) => (Ok(observation), None),
        Ok(Ok(Err(error))) => (Err(chain(&error)), None),
        Ok(Err(error)) => (Err(chain(&error)), None),
    }
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
