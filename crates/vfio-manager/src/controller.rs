//! The loop of the daemon: it looks, plans, acts, and tells, at start, after every change on the bus, and on a slow poll.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_core::backoff::Backoff;
use agent_core::http::StateDump;
use agent_core::readiness;
use agent_core::shutdown::Shutdown;
use agent_core::state::{BindingsFile, DEVICES_FILE};
use agent_core::text::chain;
use agent_core::uevents::DeviceEvents;
use hw_probe::{Bdf, PciFunction};
use serde_json::json;
use tokio::sync::mpsc::unbounded_channel;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use crate::binding::{Action, Knowledge, Policy, PolicyError, Step};
use crate::executor::{BindError, Heard, Outcome, observed};
use crate::holders::HoldersOfDevices;
use crate::manager::{Look, Manager};
use crate::metrics::BindingMetrics;
use crate::validations::StatusFiles;

/// First and longest pause before the next look while something is not as wanted.
const RETRY: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];

/// Events come in bursts (a rebind is four): one look for all of them.
const SETTLE: Duration = Duration::from_millis(50);

/// How often it is seen whether other agents have written something: no event of the kernel tells of it.
const FILES: Duration = Duration::from_secs(2);

/// What wakes the loop up.
pub(crate) trait Changes {
    /// Waits for a change on the bus.
    async fn changed(&mut self);
    /// Forgets the changes that have come so far.
    fn drain(&mut self);
}

impl Changes for DeviceEvents {
    async fn changed(&mut self) {
        self.changed().await;
    }

    fn drain(&mut self) {
        self.drain();
    }
}

/// What the loop works by.
pub(crate) struct Keeper {
    pub(crate) manager: Arc<Manager>,
    pub(crate) policy: Policy,
    /// Whether nothing is done but to say what would be.
    pub(crate) only_observe: bool,
    pub(crate) poll_interval: Duration,
    pub(crate) metrics: BindingMetrics,
    pub(crate) dump: StateDump,
    /// The validator's files, where they are written in its place.
    pub(crate) status: Option<Mutex<StatusFiles>>,
}

/// What the loop remembers between looks.
#[derive(Default)]
struct Memory {
    /// The last outcome of each device.
    devices: BTreeMap<Bdf, Outcome>,
    /// The GPUs among them, and those that have no outcome yet.
    gpus: BTreeSet<Bdf>,
    /// Devices whose step has not ended: nothing else is begun with them.
    running: BTreeMap<Bdf, Step>,
    /// Those that the last look passed over because of that: they are looked at again when their step has ended.
    passed_over: BTreeSet<Bdf>,
    /// What was last said of each device.
    told: Told,
    /// What was last said of a look that failed.
    trouble: Option<String>,
    /// What was last said of the status files.
    status_trouble: Option<String>,
    given_back: bool,
    /// Who holds the devices that are as wanted, and when that was last looked at.
    holders: HoldersOfDevices,
    holders_at: Option<Instant>,
    knowledge: Knowledge,
    looked_at: Option<jiff::Timestamp>,
}

impl Keeper {
    /// Keeps everything bound until shutdown. A device that blocks holds up nothing but itself.
    pub(crate) async fn keep(
        &self,
        mut events: impl Changes,
        shutdown: &Shutdown,
        looked_once: &readiness::Guard,
    ) -> anyhow::Result<()> {
        let mut files = Files::new(&self.manager);
        let (sender, mut outcomes) = unbounded_channel();
        let heard: Heard = Arc::new(move |outcome| {
            // The loop has ended: nobody asks any more.
            let _ = sender.send(outcome);
        });
        let mut holders = None;
        let mut memory = Memory::default();
        let mut retry = Backoff::new(RETRY[0], RETRY[1].min(self.poll_interval));
        loop {
            let (manager, policy, only_observe) = (Arc::clone(&self.manager), self.policy.clone(), self.only_observe);
            let work = tokio::task::spawn_blocking(move || {
                let look = manager.look_to_bind(&policy)?;
                let prior = if only_observe { None } else { Some(manager.prepare(&look)?) };
                anyhow::Ok((look, prior))
            });
            let look = tokio::select! {
                look = work => look?,
                // Killed in the middle or not: what is on disk and on the bus is enough for the next one to go on from.
                () = shutdown.wait() => break,
            };
            let mut is_wrong = match look {
                Ok((look, prior)) => {
                    self.begin(&mut memory, &look, prior.as_ref(), &heard);
                    // At most once a poll, and never before what is to be done has begun: it reads all of /proc.
                    if memory.holders_at.is_none_or(|at| at.elapsed() >= self.poll_interval) {
                        memory.holders_at = Some(Instant::now());
                        let (root, inventory) = (self.manager.root.clone(), Arc::clone(&look.inventory));
                        holders = Some(tokio::task::spawn_blocking(move || HoldersOfDevices::look(&root, &inventory)));
                    }
                    false
                }
                // A command line that cannot be followed: better known at once than looked for in a log.
                Err(error) if memory.looked_at.is_none() && error.is::<PolicyError>() => return Err(error),
                Err(error) => {
                    let text = format!("{error:#}");
                    if memory.trouble.as_ref() != Some(&text) {
                        let code = error.downcast_ref().map(PolicyError::code);
                        warn!(event = "look_failed", code, "{text}");
                        memory.trouble = Some(text);
                    }
                    true
                }
            };
            looked_once.ready();
            let mut next = Instant::now() + if is_wrong { retry.next_delay() } else { self.poll_interval };
            loop {
                if outcomes.is_empty() {
                    self.show(&memory);
                    self.say(&mut memory);
                }
                tokio::select! {
                    () = shutdown.wait() => {
                        info!("ending; all bindings stay as they are");
                        return Ok(());
                    }
                    Some(outcome) = outcomes.recv() => {
                        if outcome.result.is_err() && !is_wrong {
                            is_wrong = true;
                            next = next.min(Instant::now() + retry.next_delay());
                        }
                        if memory.passed_over.contains(&outcome.step.bdf) {
                            next = next.min(Instant::now() + SETTLE);
                        }
                        self.hear(&mut memory, outcome);
                    }
                    found = ended(&mut holders) => {
                        memory.holders = found?;
                        self.metrics.record(memory.devices.values(), &memory.holders);
                    }
                    () = sleep_until(next) => break,
                    () = events.changed() => {
                        sleep(SETTLE).await;
                        events.drain();
                        break;
                    }
                    () = files.changed() => break,
                }
            }
            if !is_wrong && memory.running.is_empty() {
                retry.reset();
            }
        }
        info!("ending; all bindings stay as they are");
        Ok(())
    }

    /// Begins the steps of a look, save those of devices that are still at work; without a record of what devices were before
    /// they are only told.
    fn begin(&self, memory: &mut Memory, look: &Look, prior: Option<&Arc<BindingsFile>>, heard: &Heard) {
        memory.trouble = None;
        memory.knowledge = look.knowledge.clone();
        memory.looked_at = Some(jiff::Timestamp::now());
        memory.given_back = look.given_back;
        let is_wanted = |bdf: &Bdf| look.steps.iter().any(|step| step.bdf == *bdf);
        memory.devices.retain(|bdf, _| is_wanted(bdf));
        memory.told.retain(is_wanted);
        let is_gpu = |step: &&Step| look.inventory.get(step.bdf).is_none_or(PciFunction::is_gpu);
        memory.gpus = look.steps.iter().filter(is_gpu).map(|step| step.bdf).collect();
        let Some(prior) = prior else {
            for step in &look.steps {
                self.hear(memory, observed(&look.inventory, step.clone()));
            }
            return;
        };
        let is_running = |step: &&Step| memory.running.contains_key(&step.bdf);
        memory.passed_over = look.steps.iter().filter(is_running).map(|step| step.bdf).collect();
        let steps: Vec<Step> = look.steps.iter().filter(|step| !is_running(step)).cloned().collect();
        let acts = steps.iter().filter(|step| step.action.is_act());
        memory.running.extend(acts.map(|step| (step.bdf, step.clone())));
        self.metrics.record(memory.devices.values(), &memory.holders);
        self.manager.executor.start(&look.inventory, &steps, prior, heard);
    }

    fn hear(&self, memory: &mut Memory, outcome: Outcome) {
        memory.running.remove(&outcome.step.bdf);
        memory.told.tell(&outcome);
        self.metrics.count(&outcome);
        memory.devices.insert(outcome.step.bdf, outcome);
        self.metrics.record(memory.devices.values(), &memory.holders);
    }

    /// What is known and under way, for people, and the number of writes that have not returned.
    fn show(&self, memory: &Memory) {
        let blocked = self.manager.executor.blocked();
        self.metrics.set_blocked(blocked.len());
        let device = |outcome: &Outcome| {
            let error = outcome.result.as_ref().err();
            json!({
                "bdf": outcome.step.bdf,
                "action": outcome.step.action.to_string(),
                "reason": outcome.step.reason,
                "driver": outcome.result.as_ref().ok().and_then(Option::as_ref),
                "code": error.map(BindError::code),
                "error": error.map(|error| chain(error)),
                "heldBy": error.map(BindError::held_by).unwrap_or_default(),
            })
        };
        let state = json!({
            "lookedAt": memory.looked_at,
            "trouble": memory.trouble,
            "mode": memory.knowledge.mode,
            "transition": memory.knowledge.transition,
            "devices": memory.devices.values().map(device).collect::<Vec<_>>(),
            "underWay": memory.running.values().collect::<Vec<_>>(),
            "blockedWrites": blocked.iter().map(|(bdf, path)| json!({"bdf": bdf, "path": path})).collect::<Vec<_>>(),
        });
        self.dump.show(state.to_string());
    }

    /// Says in the validator's place whether every GPU is on VFIO.
    fn say(&self, memory: &mut Memory) {
        let Some(status) = &self.status else { return };
        let is_bound = |bdf: &Bdf| {
            let outcome = memory.devices.get(bdf);
            !memory.running.contains_key(bdf) && outcome.is_some_and(|outcome| matches!(outcome.result, Ok(Some(_))))
        };
        let is_ready = memory.looked_at.is_some() && !memory.given_back && memory.gpus.iter().all(is_bound);
        let said = status.lock().unwrap_or_else(PoisonError::into_inner).say(is_ready);
        let trouble = said.err().map(|error| chain(&error));
        if trouble != memory.status_trouble {
            if let Some(text) = &trouble {
                warn!(code = "StatusFiles", "The validator's status files cannot be kept: {text}");
            }
            memory.status_trouble = trouble;
        }
    }
}

/// Waits for a task, where there is one, and for ever where there is none.
async fn ended<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    let Some(handle) = task else { return std::future::pending().await };
    let result = handle.await;
    *task = None;
    result
}

/// One line a device whose state is another than the last time, so that a steady node is a silent one. What was done is told
/// by the one who did it.
#[derive(Default)]
pub(crate) struct Told(BTreeMap<Bdf, String>);

impl Told {
    pub(crate) fn tell(&mut self, outcome: &Outcome) {
        let bdf = outcome.step.bdf;
        let state = match &outcome.result {
            Ok(driver) => driver.as_deref().unwrap_or("no driver").to_owned(),
            Err(error) => chain(error),
        };
        if self.0.get(&bdf) != Some(&state) {
            match &outcome.result {
                Ok(_) if outcome.step.action == Action::Leave => {
                    info!(event = "device_seen", device = %bdf, reason = outcome.step.reason, "{state}");
                }
                Ok(_) => {}
                Err(BindError::Observed { .. }) => {
                    info!(event = "device_observed", device = %bdf, reason = outcome.step.reason, "{state}");
                }
                Err(error) => warn!(event = "device_failed", device = %bdf, code = error.code(), "{state}"),
            }
        }
        self.0.insert(bdf, state);
    }

    fn retain(&mut self, is_wanted: impl Fn(&Bdf) -> bool) {
        self.0.retain(|bdf, _| is_wanted(bdf));
    }
}

/// The files of other agents that decide what is wanted.
struct Files {
    paths: Vec<PathBuf>,
    seen: Vec<Stamp>,
}

/// What is another when a file was written: its time, its number, its size.
type Stamp = Option<(i64, i64, u64, u64)>;

impl Files {
    fn new(manager: &Manager) -> Self {
        let mut paths = vec![manager.state_dir.join(DEVICES_FILE)];
        paths.extend(manager.mode_file.clone());
        let seen = paths.iter().map(|path| stamp(path)).collect();
        Self { paths, seen }
    }

    async fn changed(&mut self) {
        loop {
            sleep(FILES).await;
            let now: Vec<Stamp> = self.paths.iter().map(|path| stamp(path)).collect();
            if now != self.seen {
                self.seen = now;
                return;
            }
        }
    }
}

fn stamp(path: &Path) -> Stamp {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.mtime(), meta.mtime_nsec(), meta.ino(), meta.size()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use agent_core::metrics::Metrics;
    use tokio::sync::Notify;

    use super::*;
    use crate::executor::SysfsWrite;
    use crate::testing::Kernel;
    use crate::validations::folder;

    const GPU: &str = "0000:41:00.0";
    const OTHER: &str = "0000:42:00.0";

    #[derive(Clone, Default)]
    struct Bell(Arc<Notify>);

    impl Changes for Bell {
        async fn changed(&mut self) {
            self.0.notified().await;
        }

        fn drain(&mut self) {}
    }

    /// A keeper whose poll never comes.
    fn keeper(kernel: &Kernel, write: Option<SysfsWrite>) -> (Keeper, Metrics) {
        let executor = kernel.executor();
        let executor = match write {
            Some(write) => executor.with_kernel(write),
            None => executor,
        };
        let exposed = Metrics::new();
        let policy = Policy { take_from_driver: true, ..Policy::default() };
        let keeper = Keeper {
            manager: Arc::new(kernel.manager(executor)),
            policy,
            only_observe: false,
            poll_interval: Duration::from_hours(1),
            metrics: BindingMetrics::register(&exposed),
            dump: StateDump::default(),
            status: Some(Mutex::new(StatusFiles::new(folder(kernel.fake.path())))),
        };
        (keeper, exposed)
    }

    async fn until(what: &str, is_so: impl Fn() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_mins(1), "{what}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Keeps while `during` goes on.
    async fn while_kept(keeper: &Keeper, bell: &Bell, during: impl Future<Output = ()>) {
        let shutdown = Shutdown::manual();
        let looked = readiness::Registry::default().register("look");
        let (kept, ()) = tokio::join!(keeper.keep(bell.clone(), &shutdown, &looked), async {
            during.await;
            shutdown.trigger();
        });
        kept.unwrap();
    }

    #[tokio::test]
    async fn what_is_plugged_in_is_bound_at_the_kernels_event() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let (keeper, _) = keeper(&kernel, None);
        let bell = Bell::default();
        let ready = folder(kernel.fake.path()).join("vfio-pci-ready");
        while_kept(&keeper, &bell, async {
            let bound = |bdf: &str| kernel.driver(bdf).as_deref() == Some("vfio-pci");
            until("bound at start", || bound(GPU) && ready.exists()).await;
            let mut longest = Duration::ZERO;
            // Plugged in; and taken out and put back into another group.
            for (bdf, group, comes_back) in [(OTHER, 6, false), (GPU, 9, true), (OTHER, 5, true)] {
                if comes_back {
                    kernel.fake.remove(bdf);
                }
                kernel.fake.gpu(bdf, 0x2330).group(group);
                let begun = Instant::now();
                bell.0.notify_one();
                until("bound at the event", || bound(bdf)).await;
                longest = longest.max(begun.elapsed());
            }
            eprintln!("bound at most {longest:?} after the event");
            until("said to be ready", || ready.exists()).await;
        })
        .await;
        assert!(ready.exists(), "a restart withdraws nothing");
    }

    #[tokio::test]
    async fn what_is_only_observed_is_told_and_left_as_it_is() {
        let kernel = Kernel::new();
        kernel.fake.load_driver("nouveau");
        kernel.fake.gpu(GPU, 0x2330).group(5);
        kernel.fake.gpu(OTHER, 0x2330).group(6).driver("nouveau");
        let (keeper, exposed) = keeper(&kernel, None);
        let keeper = Keeper { only_observe: true, status: None, ..keeper };
        let before = files(&kernel.fake.path().join("run"));
        let bell = Bell::default();
        let shown = || exposed.encode().unwrap();
        while_kept(&keeper, &bell, async {
            let is_told = |line: &str| shown().contains(line);
            until("the first is told", || is_told("ccnode_vfio_devices{wanted=\"vfio-pci\",driver=\"none\"} 1\n"))
                .await;
            until("the other is told", || is_told("ccnode_vfio_devices{wanted=\"vfio-pci\",driver=\"nouveau\"} 1\n"))
                .await;
            // A person binds one by hand: that is seen as well.
            kernel.fake.get(GPU).driver("vfio-pci").driver_override("vfio-pci");
            bell.0.notify_one();
            until("seen", || is_told("ccnode_vfio_devices{wanted=\"vfio-pci\",driver=\"vfio-pci\"} 1\n")).await;
        })
        .await;
        assert!(kernel.writes.lock().unwrap().is_empty(), "{:?}", kernel.writes.lock().unwrap());
        assert_eq!(files(&kernel.fake.path().join("run")), before, "no record, no lock, no status file");
        assert!(!shown().contains("ccnode_vfio_failures_total{"), "{}", shown());
        let told = observed(
            &kernel.inventory(),
            Step {
                bdf: OTHER.parse().unwrap(),
                action: Action::Bind { module: "vfio_pci".into() },
                reason: "a GPU".into(),
            },
        );
        let error = told.result.unwrap_err();
        let words =
            "0000:42:00.0: Only observed: it has driver nouveau, and would be acted on (bind to vfio_pci): a GPU";
        assert_eq!((error.code(), error.to_string().as_str()), ("Observed", words));
    }

    /// All paths below a folder.
    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> = Vec::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path.clone());
                }
                found.push(path);
            }
        }
        found.sort();
        found
    }

    #[tokio::test]
    async fn restarts_touch_nothing_while_a_virtual_machine_holds_a_group() {
        let kernel = Kernel::new();
        for (bdf, group) in [(GPU, 5), (OTHER, 6)] {
            kernel.fake.gpu(bdf, 0x2330).group(group).driver_override("vfio-pci");
            kernel.fake.drivers_probe(bdf);
        }
        kernel.held.lock().unwrap().insert(5);
        let ready = folder(kernel.fake.path()).join("vfio-pci-ready");
        for _ in 0..20 {
            let (keeper, exposed) = keeper(&kernel, None);
            // The files are said anew by each.
            let _ = fs::remove_file(&ready);
            while_kept(&keeper, &Bell::default(), async {
                until("looked", || ready.exists()).await;
            })
            .await;
            let text = exposed.encode().unwrap();
            let line = "ccnode_vfio_devices{wanted=\"vfio-pci\",driver=\"vfio-pci\"} 2\n";
            assert!(text.contains(line), "{text}");
        }
        let writes = kernel.writes.lock().unwrap().clone();
        assert!(writes.is_empty(), "{writes:?}");
        eprintln!("20 restarts, {} writes", writes.len());
    }

    #[tokio::test]
    async fn holders_of_bound_devices_are_counted_once_a_poll() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5).driver_override("vfio-pci");
        kernel.fake.drivers_probe(GPU);
        kernel.fake.process(9, "qemu", "0::/x\n", &["/dev/vfio/5"]);
        let (keeper, exposed) = keeper(&kernel, None);
        let bell = Bell::default();
        while_kept(&keeper, &bell, async {
            let says = |line: &str| exposed.encode().unwrap().contains(line);
            let counted = format!("ccnode_vfio_device_holders{{device=\"{GPU}\"}} 1\n");
            until("counted", || says(&counted)).await;
            // It ends, and a look for another reason does not read all of /proc again.
            fs::remove_dir_all(kernel.fake.path().join("proc/9")).unwrap();
            kernel.fake.gpu(OTHER, 0x2330).group(6);
            bell.0.notify_one();
            until("looked again", || kernel.driver(OTHER).is_some()).await;
            assert!(says(&counted), "{}", exposed.encode().unwrap());
        })
        .await;
    }

    #[tokio::test]
    async fn a_device_that_blocks_is_told_and_the_others_go_on() {
        let kernel = Kernel::new();
        kernel.fake.load_driver("nouveau");
        kernel.fake.gpu(GPU, 0x2330).group(5).driver("nouveau");
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let (write, gate) = (kernel.write(), Mutex::new(gate));
        let blocking: SysfsWrite = Arc::new(move |path, value| {
            if path.ends_with("unbind") {
                // Until the test ends it.
                let _ = gate.lock().unwrap().recv();
            }
            write(path, value)
        });
        let (keeper, exposed) = keeper(&kernel, Some(blocking));
        let bell = Bell::default();
        let ready = folder(kernel.fake.path()).join("vfio-pci-ready");
        while_kept(&keeper, &bell, async {
            let says = |line: &str| exposed.encode().unwrap().contains(line);
            until("blocked", || says("ccnode_vfio_failures_total{code=\"SysfsWriteBlocked\"}")).await;
            assert!(says("ccnode_vfio_blocked_writes 1\n"));
            // It hangs on, and what is plugged in meanwhile is bound.
            kernel.fake.gpu(OTHER, 0x2330).group(6);
            bell.0.notify_one();
            until("the other is bound", || kernel.driver(OTHER).as_deref() == Some("vfio-pci")).await;
            assert_eq!(kernel.driver(GPU).as_deref(), Some("nouveau"));
            assert!(!ready.exists());
            release.send(()).unwrap();
            drop(release);
            until("bound in the end", || kernel.driver(GPU).as_deref() == Some("vfio-pci") && ready.exists()).await;
            until("none blocked", || says("ccnode_vfio_blocked_writes 0\n")).await;
        })
        .await;
        let unbinds = kernel.writes.lock().unwrap().iter().filter(|line| line.contains("unbind")).count();
        assert_eq!(unbinds, 1, "no second one is sent after it");
    }

    /// A person may take a device away between the end of its step and the next look, and the kernel's event of it may be one
    /// of those that were forgotten.
    #[tokio::test]
    async fn a_device_that_was_at_work_during_a_look_is_looked_at_again() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let (write, gate) = (kernel.write(), Mutex::new(gate));
        let probing = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let probed = Arc::clone(&probing);
        let slow: SysfsWrite = Arc::new(move |path, value| {
            if path.ends_with("drivers_probe") && value == GPU {
                probed.store(true, std::sync::atomic::Ordering::SeqCst);
                // Until the test ends it.
                let _ = gate.lock().unwrap().recv();
            }
            write(path, value)
        });
        let (keeper, exposed) = keeper(&kernel, Some(slow));
        let executor =
            kernel.executor().with_kernel(keeper.manager.executor.kernel()).with_write_timeout(Duration::from_mins(2));
        let keeper = Keeper { manager: Arc::new(kernel.manager(executor)), ..keeper };
        let bell = Bell::default();
        while_kept(&keeper, &bell, async {
            until("at work", || probing.load(std::sync::atomic::Ordering::SeqCst)).await;
            kernel.fake.gpu(OTHER, 0x2330).group(6);
            bell.0.notify_one();
            let bound = "ccnode_vfio_actions_total{action=\"bind\",result=\"done\"} 1\n";
            until("looked meanwhile", || exposed.encode().unwrap().contains(bound)).await;
            // Nobody rings for what happens now.
            kernel.fake.unbind(OTHER).unwrap();
            release.send(()).unwrap();
            until("looked again", || kernel.driver(OTHER).is_some() && kernel.driver(GPU).is_some()).await;
        })
        .await;
    }

    #[tokio::test]
    async fn what_the_hook_has_given_back_is_not_bound_again() {
        let kernel = Kernel::new();
        let mark = kernel.fake.path().join("given-back");
        let (keeper, _) = keeper(&kernel, None);
        let manager = kernel.manager(kernel.executor()).until_given_back(mark.clone());
        let keeper = Keeper { manager: Arc::new(manager), ..keeper };
        let bell = Bell::default();
        let ready = folder(kernel.fake.path()).join("vfio-pci-ready");
        kernel.fake.bridge("0000:40:00.0");
        while_kept(&keeper, &bell, async {
            until("looked", || ready.exists()).await;
            fs::write(&mark, "").unwrap();
            kernel.fake.gpu(GPU, 0x2330).group(5);
            bell.0.notify_one();
            until("looked again", || !ready.exists()).await;
        })
        .await;
        assert_eq!(kernel.driver(GPU), None);
        assert!(kernel.writes.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_policy_that_cannot_be_followed_ends_the_daemon() {
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let (keeper, _) = keeper(&kernel, None);
        let policy = Policy { selection: "numa=7".parse().unwrap(), under_operator: true, ..Policy::default() };
        let keeper = Keeper { policy, ..keeper };
        let looked = readiness::Registry::default().register("look");
        let kept = keeper.keep(Bell::default(), &Shutdown::manual(), &looked).await;
        assert!(kept.unwrap_err().to_string().contains("--select numa=7 leaves out 0000:41:00.0"));
    }

    #[tokio::test]
    async fn a_change_of_modes_is_waited_for_and_its_end_is_seen() {
        use agent_core::hostfile::HostDir;
        use agent_core::state::{DevicesFile, Origin, Transition};
        let kernel = Kernel::new();
        kernel.fake.gpu(GPU, 0x2330).group(5);
        let (keeper, exposed) = keeper(&kernel, None);
        let folder = HostDir::open(&keeper.manager.state_dir).unwrap();
        let boot_id = kernel.inventory().host.boot_id.clone().unwrap();
        let transition =
            Transition { target: "on".into(), step: "own".into(), started_at: jiff::Timestamp::UNIX_EPOCH };
        let mut file =
            DevicesFile { origin: Origin::now(boot_id, None), transition: Some(transition), devices: Vec::new() };
        file.store(&folder).unwrap();
        while_kept(&keeper, &Bell::default(), async {
            let waits = "ccnode_vfio_failures_total{code=\"DeviceInTransition\"}";
            until("waited", || exposed.encode().unwrap().contains(waits)).await;
            assert_eq!(kernel.driver(GPU), None);
            file.transition = None;
            file.store(&folder).unwrap();
            until("bound", || kernel.driver(GPU).as_deref() == Some("vfio-pci")).await;
        })
        .await;
    }
}
