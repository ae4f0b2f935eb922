//! The commands: look, plan, act, tell.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use agent_core::backoff::Backoff;
use agent_core::hostfile::HostDir;
use agent_core::metrics::Metrics;
use agent_core::readiness;
use agent_core::shutdown::Shutdown;
use agent_core::state::{BindingsFile, Origin, STATE_DIR, state_dir as state_dir_under};
use agent_core::uevents::DeviceEvents;
use anyhow::{Context, bail};
use gpu_firmware::Places;
use hw_probe::{Bdf, Inventory, PciFunction, SysRoot};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::args::{BindArgs, Cli, Command, HostArgs, LockArgs, RunArgs, UnbindArgs, Which};
use crate::binding::{Action, Policy, Step, plan_bind, plan_unbind};
use crate::executor::{BindError, Executor, Outcome, records, without_returned};
use crate::metrics::BindingMetrics;
use crate::modalias::VfioAliases;

/// How long `bind` waits for another agent's lock: as long as a change of modes may take. It is run once, so that what it
/// leaves undone stays undone.
const BIND_LOCK: Duration = Duration::from_mins(2);

/// How long `unbind` does: it is a hook, and its pod has 30 s to end (operator-contract section 6.1).
const UNBIND_LOCK: Duration = Duration::from_secs(5);

/// How long a look of the daemon does: another one follows.
const LOOK_LOCK: Duration = Duration::from_secs(1);

/// First and longest pause before the next look while something is not as wanted.
const RETRY: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];

/// Events come in bursts (a rebind is four): one look for all of them.
const SETTLE: Duration = Duration::from_millis(50);

/// How long a step that has begun may go on after a signal.
const END: Duration = Duration::from_secs(5);

/// Runs the command line.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Bind(args) => bind(args),
        Command::Unbind(args) => unbind(args),
        Command::Run(args) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let result = runtime.block_on(daemon(args));
            runtime.shutdown_timeout(END);
            result
        }
    }
}

fn bind(
    BindArgs { which, bind_nvswitches, take_from_driver, strict, dry_run, host }: BindArgs,
) -> anyhow::Result<ExitCode> {
    let Which { all, device_id } = which;
    let manager = Manager::new(host, BIND_LOCK);
    let policy = Policy { nvswitches: bind_nvswitches, take_from_driver, only: device_id };
    let inventory = manager.inventory()?;
    must_be_selectable(&inventory, device_id)?;
    let steps = manager.plan_bind(&inventory, &policy);
    if dry_run {
        print!("{}", plan_table(&steps));
        return Ok(ExitCode::SUCCESS);
    }
    let outcomes = manager.act(&inventory, steps)?;
    tell_changes(&mut BTreeMap::new(), &outcomes);
    print!("{}", outcome_table(&outcomes));
    // The operator's pod runs `vfio-manage bind --all && sleep`: a truthful code would crash-loop it over one dead GPU,
    // so there the contract fixes 0 (operator-contract section 6.4).
    let wrong = outcomes.iter().any(|outcome| outcome.result.is_err());
    Ok(if wrong && (strict || !all) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn unbind(
    UnbindArgs { which, unbind_nvswitches, strict, dry_run, lock, host }: UnbindArgs,
) -> anyhow::Result<ExitCode> {
    let Which { all, device_id } = which;
    let LockArgs { daemon_lock } = lock;
    if all && held_by_daemon(&daemon_lock) {
        // Called as the hook of a pod that is being replaced: the next one will want the very same bindings.
        println!("vfio-manager runs in this container: all bindings are left as they are for the one that follows it");
        return Ok(ExitCode::SUCCESS);
    }
    let manager = Manager::new(host, UNBIND_LOCK);
    let policy = Policy { nvswitches: unbind_nvswitches, take_from_driver: false, only: device_id };
    let inventory = manager.inventory()?;
    must_be_selectable(&inventory, device_id)?;
    let steps = plan_unbind(&inventory, &policy);
    if dry_run {
        print!("{}", plan_table(&steps));
        return Ok(ExitCode::SUCCESS);
    }
    let outcomes = manager.act(&inventory, steps)?;
    tell_changes(&mut BTreeMap::new(), &outcomes);
    print!("{}", outcome_table(&outcomes));
    // A held device that stays bound is what `--all` promises, and no failure.
    let failed = |outcome: &Outcome| match &outcome.result {
        Ok(_) => false,
        Err(BindError::Held { .. }) => strict || !all,
        Err(_) => true,
    };
    Ok(if outcomes.iter().any(failed) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn must_be_selectable(inventory: &Inventory, device: Option<Bdf>) -> anyhow::Result<()> {
    let Some(bdf) = device else { return Ok(()) };
    match inventory.get(bdf) {
        None => bail!("{bdf}: No such PCI function on this node; `ccnode probe` lists the NVIDIA devices"),
        Some(function) if function.is_gpu() && function.is_virtual_function => {
            bail!("{bdf}: It is an SR-IOV virtual function; only whole GPUs are bound")
        }
        Some(function) if function.is_gpu() || function.is_nvswitch() => Ok(()),
        Some(function) => bail!(
            "{bdf}: It is no NVIDIA GPU or NVSwitch ({:04x}:{:04x}, class {:06x})",
            function.vendor,
            function.device,
            function.class
        ),
    }
}

async fn daemon(
    RunArgs { bind_nvswitches, take_from_driver, once, poll_interval, health, lock, host }: RunArgs,
) -> anyhow::Result<ExitCode> {
    let policy = Policy { nvswitches: bind_nvswitches, take_from_driver, only: None };
    let LockArgs { daemon_lock } = lock;
    let manager = Arc::new(Manager::new(host, if once { BIND_LOCK } else { LOOK_LOCK }));
    if once {
        let outcomes = manager.reconcile(&policy)?;
        tell_changes(&mut BTreeMap::new(), &outcomes);
        print!("{}", outcome_table(&outcomes));
        let wrong = outcomes.iter().any(|outcome| outcome.result.is_err());
        return Ok(if wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS });
    }
    // Held for the life of the process: `unbind --all` in the same container sees it.
    let _lock = take_daemon_lock(&daemon_lock)?;
    let shutdown = Shutdown::on_signals()?;
    let readiness = readiness::Registry::default();
    let looked = readiness.register("first look at the node");
    let exposed = Metrics::new();
    let metrics = BindingMetrics::register(&exposed);
    let endpoint = match health.addr()? {
        Some(addr) => Some(agent_core::http::bind(addr, readiness, exposed).await?),
        None => None,
    };
    let serving = async {
        match endpoint {
            Some(server) => server.serve(shutdown.clone()).await,
            None => shutdown.wait().await,
        }
    };
    let keeping = async {
        let result = keep_bound(&manager, &policy, poll_interval, &shutdown, &looked, &metrics).await;
        // Its failure is the agent's: the endpoint must not go on alone.
        shutdown.trigger();
        result
    };
    let (result, ()) = tokio::join!(keeping, serving);
    result.map(|()| ExitCode::SUCCESS)
}

/// Looks, plans and acts at start, after every change on the bus, and on a slow poll, until shutdown.
async fn keep_bound(
    manager: &Arc<Manager>,
    policy: &Policy,
    poll_interval: Duration,
    shutdown: &Shutdown,
    looked_once: &readiness::Guard,
    metrics: &BindingMetrics,
) -> anyhow::Result<()> {
    let mut events = DeviceEvents::subscribe();
    let mut retry = Backoff::new(RETRY[0], RETRY[1].min(poll_interval));
    let mut last = BTreeMap::new();
    let mut trouble = None;
    loop {
        let (worker, wanted) = (Arc::clone(manager), policy.clone());
        let work = tokio::task::spawn_blocking(move || worker.reconcile(&wanted));
        let looked = tokio::select! {
            looked = work => looked?,
            // Killed in the middle or not: what is on disk and on the bus is enough for the next one to go on from.
            () = shutdown.wait() => break,
        };
        let all_right = match &looked {
            Ok(outcomes) => {
                metrics.record(outcomes);
                tell_changes(&mut last, outcomes);
                trouble = None;
                outcomes.iter().all(|outcome| outcome.result.is_ok())
            }
            Err(error) => {
                let text = format!("{error:#}");
                if trouble.as_ref() != Some(&text) {
                    warn!(event = "look_failed", "{text}");
                    trouble = Some(text);
                }
                false
            }
        };
        looked_once.ready();
        let pause = if all_right {
            retry.reset();
            poll_interval
        } else {
            retry.next_delay()
        };
        tokio::select! {
            () = shutdown.wait() => break,
            () = sleep(pause) => {}
            () = events.changed() => {
                sleep(SETTLE).await;
                events.drain();
            }
        }
    }
    info!("ending; all bindings stay as they are");
    Ok(())
}

/// One line a device whose state is another than at the last look, so that a steady node is a silent one. What was done
/// is told by the one who did it.
fn tell_changes(last: &mut BTreeMap<Bdf, String>, outcomes: &[Outcome]) {
    let mut now = BTreeMap::new();
    for outcome in outcomes {
        let bdf = outcome.step.bdf;
        let state = match &outcome.result {
            Ok(driver) => driver.as_deref().unwrap_or("no driver").to_owned(),
            Err(error) => agent_core::text::chain(error),
        };
        if last.get(&bdf) != Some(&state) {
            match &outcome.result {
                Ok(_) if outcome.step.action == Action::Leave => {
                    info!(event = "device_seen", device = %bdf, reason = outcome.step.reason, "{state}");
                }
                Ok(_) => {}
                Err(error) => warn!(event = "device_failed", device = %bdf, code = error.code(), "{state}"),
            }
        }
        now.insert(bdf, state);
    }
    *last = now;
}

/// What every command works with.
struct Manager {
    root: SysRoot,
    host_root: PathBuf,
    state_dir: PathBuf,
    executor: Executor,
}

impl Manager {
    fn new(HostArgs { host_root, state_dir, lock_timeout, write_timeout }: HostArgs, lock_default: Duration) -> Self {
        let root = SysRoot::host();
        let host_root = agent_core::host_root(host_root);
        let mut places = Places::at(root.clone(), "vfio-manager");
        // Where the host's /run is not mounted, its place is below the host's root.
        places.run = host_root.join("run");
        let state_dir = if state_dir == Path::new(STATE_DIR) { state_dir_under(&host_root) } else { state_dir };
        let executor = Executor::new(places, host_root.clone(), lock_timeout.unwrap_or(lock_default), write_timeout);
        Self { root, host_root, state_dir, executor }
    }

    fn inventory(&self) -> anyhow::Result<Inventory> {
        let inventory = Inventory::scan(&self.root);
        if inventory.functions.is_empty() {
            bail!(
                "No PCI function can be seen below {}; mount the host's /sys into this container",
                self.root.join("sys/bus/pci/devices").display()
            );
        }
        for problem in &inventory.problems {
            warn!(path = problem.path, device = problem.bdf.map(tracing::field::display), "{}", problem.message);
        }
        Ok(inventory)
    }

    fn plan_bind(&self, inventory: &Inventory, policy: &Policy) -> Vec<Step> {
        let release = inventory.host.kernel_release.as_deref().unwrap_or_default();
        // Over a megabyte of text: read only when there is something to bind.
        let aliases = LazyCell::new(|| VfioAliases::read(&[PathBuf::from("/"), self.host_root.clone()], release));
        plan_bind(inventory, policy, |function: &PciFunction| aliases.choose(function.modalias.as_deref()))
    }

    fn reconcile(&self, policy: &Policy) -> anyhow::Result<Vec<Outcome>> {
        let inventory = self.inventory()?;
        let steps = self.plan_bind(&inventory, policy);
        self.act(&inventory, steps)
    }

    /// Carries out the steps, with what the devices were before on disk before any of them is touched.
    fn act(&self, inventory: &Inventory, steps: Vec<Step>) -> anyhow::Result<Vec<Outcome>> {
        if steps.iter().all(|step| matches!(step.action, Action::Leave | Action::Refuse)) {
            return Ok(self.executor.run(inventory, steps, &no_records(inventory)));
        }
        let dir = HostDir::open(&self.state_dir)
            .with_context(|| format!("The state directory {} cannot be used", self.state_dir.display()))?;
        let boot_id = inventory.host.boot_id.as_deref().context("The kernel's boot id cannot be read")?;
        let prior = BindingsFile::load(&dir, boot_id).unwrap_or_else(|error| {
            // Written whole or not at all, so this is somebody's hand. Without it nothing is known of former drivers, which
            // is what it would be on a new node.
            warn!(
                "What the devices were before cannot be read and is recorded anew: {}",
                agent_core::text::chain(&error)
            );
            None
        });
        let prior = prior.unwrap_or_else(|| no_records(inventory));
        let prior = match records(inventory, &steps, &prior, jiff::Timestamp::now()) {
            Some(file) => stored(&dir, file)?,
            None => prior,
        };
        let outcomes = self.executor.run(inventory, steps, &prior);
        if let Some(file) = without_returned(&outcomes, &prior) {
            stored(&dir, file)?;
        }
        Ok(outcomes)
    }
}

fn no_records(inventory: &Inventory) -> BindingsFile {
    BindingsFile { origin: Origin::now(inventory.host.boot_id.clone().unwrap_or_default(), None), devices: Vec::new() }
}

fn stored(dir: &HostDir, mut file: BindingsFile) -> anyhow::Result<BindingsFile> {
    file.origin.written_at = jiff::Timestamp::now();
    file.store(dir).context("What the devices were before cannot be recorded, so nothing was touched")?;
    Ok(file)
}

/// Whether a `run` of this container holds its lock.
fn held_by_daemon(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

fn take_daemon_lock(path: &Path) -> anyhow::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path);
    let mut file =
        file.with_context(|| format!("The lock {} cannot be made; choose another with --daemon-lock", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Who it is, as far as it could write that down.
            let _ = (&file).take(32).read_to_string(&mut holder);
            let holder: String = holder.chars().filter(char::is_ascii_digit).collect();
            let holder = if holder.is_empty() { holder } else { format!(" (process {holder})") };
            bail!("Another vfio-manager{holder} holds {}; only one can run here", path.display())
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("The lock {} cannot be taken", path.display()));
        }
    }
    // For people only: a lock without a name is as good a lock.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

fn plan_table(steps: &[Step]) -> String {
    table(steps.iter().map(|step| (step.bdf, step.action.to_string(), step.reason.clone())))
}

fn outcome_table(outcomes: &[Outcome]) -> String {
    table(outcomes.iter().map(|outcome| match &outcome.result {
        Ok(driver) => {
            (outcome.step.bdf, driver.clone().unwrap_or_else(|| "no driver".into()), outcome.step.reason.clone())
        }
        Err(error) => (outcome.step.bdf, error.code().into(), agent_core::text::chain(error)),
    }))
}

fn table(rows: impl Iterator<Item = (Bdf, String, String)>) -> String {
    let mut rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return "No NVIDIA GPU on this node\n".into();
    }
    rows.sort();
    let width = rows.iter().map(|(_, result, _)| result.len()).max().unwrap_or_default();
    let mut text = String::new();
    for (bdf, result, reason) in rows {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{bdf}  {result:width$}  {reason}");
    }
    text
}
