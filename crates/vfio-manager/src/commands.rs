//! The commands around the loop: what they print, and how they end.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_core::http::StateDump;
use agent_core::metrics::Metrics;
use agent_core::readiness;
use agent_core::shutdown::Shutdown;
use agent_core::uevents::DeviceEvents;
use agent_core::work::Work;
use anyhow::{Context, bail};
use hw_probe::{Bdf, Inventory};
use serde_json::json;

use crate::args::{BindArgs, Cli, Command, LockArgs, PlanArgs, RunArgs, UnbindArgs, Which};
use crate::binding::{Action, Policy, Step};
use crate::controller::{Keeper, Told};
use crate::driver_manager;
use crate::executor::{BindError, Outcome};
use crate::manager::Manager;
use crate::metrics::BindingMetrics;
use crate::validations::{self, StatusFiles};

/// How long `bind` waits for another agent's lock: as long as a change of modes may take. It is run once, so that what it
/// leaves undone stays undone.
const BIND_LOCK: Duration = Duration::from_mins(2);

/// How long `unbind` does: it is a hook, and its pod has 30 s to end (operator-contract section 6.1).
const UNBIND_LOCK: Duration = Duration::from_secs(5);

/// How long a look of the daemon does: another one follows.
const LOOK_LOCK: Duration = Duration::from_secs(1);

/// How long a step that has begun may go on after a signal.
const END: Duration = Duration::from_secs(5);

/// The program, with the words of its command line; the first may be `driver-manager`.
pub fn start(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::from_words(words) {
        Ok(cli) => cli,
        Err(error) => {
            // A standard stream that is closed must not hide the exit code.
            let _ = error.print();
            // Bad usage is 1, not the parser's 2 (operator-contract section 6.4).
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    if let Err(error) = agent_core::logs::init(&cli.logs) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    run(cli).unwrap_or_else(|error| {
        eprintln!("vfio-manager: {error:#}");
        ExitCode::FAILURE
    })
}

/// Runs the command line.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Bind(args) => bind(args),
        Command::Unbind(args) => unbind(args),
        Command::Plan(args) => plan(args),
        Command::DriverManager(args) => driver_manager::run(args),
        Command::Run(args) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let result = runtime.block_on(daemon(args));
            runtime.shutdown_timeout(END);
            result
        }
    }
}

fn bind(BindArgs { which, policy, strict, dry_run, host }: BindArgs) -> anyhow::Result<ExitCode> {
    let Which { all, device_id } = which;
    let wanted = Policy { only: device_id, ..policy.policy(&host, false) };
    let manager = Manager::host(host, policy.cc_mode_file, BIND_LOCK);
    must_be_selectable(manager.inventory()?.as_ref(), device_id)?;
    if dry_run {
        print!("{}", plan_table(&manager.look_to_bind(&wanted)?.steps));
        return Ok(ExitCode::SUCCESS);
    }
    let look = manager.settled(|| manager.look_to_bind(&wanted))?;
    let outcomes = manager.act(&look, None)?;
    tell(&outcomes);
    // The operator's pod runs `vfio-manage bind --all && sleep`: a truthful code would crash-loop it over one dead GPU,
    // so there the contract fixes 0 (operator-contract section 6.4).
    Ok(exit_code(!strict && all || is_right(&outcomes)))
}

fn unbind(
    UnbindArgs { which, unbind_nvswitches, strict, deadline, dry_run, lock, host }: UnbindArgs,
) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let Which { all, device_id } = which;
    let LockArgs { daemon_lock } = lock;
    let manager = Manager::host(host, None, UNBIND_LOCK.min(deadline / 2));
    if all && !dry_run && held_by_daemon(&daemon_lock) {
        // Called as the hook of a pod that is being replaced: the next one will want the very same bindings, unless the node
        // is for something else from now on.
        let Some(workload) = validations::other_workload(&manager.validations) else {
            println!(
                "vfio-manager runs in this container: all bindings are left as they are for the one that follows it"
            );
            return Ok(ExitCode::SUCCESS);
        };
        println!("This node's workload is {workload}: idle devices are given back");
        let mark = given_back(&daemon_lock);
        // Or the daemon would bind at once what is given back here.
        File::create(&mark).with_context(|| {
            format!("{} cannot be made, by which the daemon knows, so everything is left bound", mark.display())
        })?;
    }
    let policy = Policy { nvswitches: unbind_nvswitches, only: device_id, ..Policy::default() };
    must_be_selectable(manager.inventory()?.as_ref(), device_id)?;
    if dry_run {
        print!("{}", plan_table(&manager.look_to_unbind(&policy)?.steps));
        return Ok(ExitCode::SUCCESS);
    }
    // A change of modes is not waited for when all are to be given back: as a hook this is called when cc-manager has paused
    // its pod for that very change, and what is bound is as good for it.
    let look = || manager.look_to_unbind(&policy);
    let look = if all { look()? } else { manager.settled(look)? };
    let outcomes = manager.act(&look, Some(deadline.saturating_sub(begun.elapsed())))?;
    tell(&outcomes);
    println!("{}", left_text(&outcomes));
    // That a held device stays bound is what `--all` promises, and no failure.
    let failed = |outcome: &Outcome| match &outcome.result {
        Ok(_) => false,
        Err(BindError::Held { .. } | BindError::InTransition { .. }) => strict || !all,
        Err(_) => true,
    };
    Ok(exit_code(!outcomes.iter().any(failed)))
}

/// The file by which the hook tells the daemon of its pod that the devices are given back.
fn given_back(daemon_lock: &Path) -> PathBuf {
    let mut name = daemon_lock.as_os_str().to_owned();
    name.push(".given-back");
    name.into()
}

/// What `unbind` has given back, and what it left.
fn left_text(outcomes: &[Outcome]) -> String {
    let given =
        outcomes.iter().filter(|outcome| outcome.step.action == Action::Unbind && outcome.result.is_ok()).count();
    let mut left: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for outcome in outcomes {
        if let Err(error) = &outcome.result {
            left.entry(error.code()).or_default().push(outcome.step.bdf.to_string());
        }
    }
    let left: Vec<String> = left.iter().map(|(code, bdfs)| format!("{code} {}", bdfs.join(" "))).collect();
    let left = if left.is_empty() { "nothing".into() } else { left.join("; ") };
    format!("Given back: {given}. Left as it was: {left}")
}

fn plan(PlanArgs { json, policy, host }: PlanArgs) -> anyhow::Result<ExitCode> {
    let wanted = policy.policy(&host, false);
    let manager = Manager::host(host, policy.cc_mode_file, BIND_LOCK);
    let look = manager.look_to_bind(&wanted)?;
    if json {
        let plan = json!({
            "schema": 1,
            "mode": look.knowledge.mode,
            "underOperator": wanted.under_operator,
            "steps": look.steps,
        });
        println!("{plan:#}");
    } else {
        print!("{}", plan_table(&look.steps));
    }
    Ok(ExitCode::SUCCESS)
}

fn is_right(outcomes: &[Outcome]) -> bool {
    outcomes.iter().all(|outcome| outcome.result.is_ok())
}

fn exit_code(is_right: bool) -> ExitCode {
    if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tell(outcomes: &[Outcome]) {
    let mut told = Told::default();
    for outcome in outcomes {
        told.tell(outcome);
    }
    print!("{}", outcome_table(outcomes));
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
    RunArgs { policy, mode, once, status_files, poll_interval, health, lock, host }: RunArgs,
) -> anyhow::Result<ExitCode> {
    let wanted = policy.policy(&host, status_files);
    let LockArgs { daemon_lock } = lock;
    let manager = Manager::host(host, policy.cc_mode_file, if once { BIND_LOCK } else { LOOK_LOCK });
    let only_observe = mode == Work::Observe;
    let mut status = (status_files && !only_observe).then(|| StatusFiles::new(manager.validations.clone()));
    if once && only_observe {
        print!("{}", plan_table(&manager.look_to_bind(&wanted)?.steps));
        return Ok(ExitCode::SUCCESS);
    }
    if once {
        let look = manager.settled(|| manager.look_to_bind(&wanted))?;
        let outcomes = manager.act(&look, None)?;
        tell(&outcomes);
        if let Some(status) = &mut status {
            status.say(is_right(&outcomes)).context("The validator's status files cannot be written")?;
        }
        return Ok(exit_code(is_right(&outcomes)));
    }
    // Held for the life of the process: `unbind --all` in the same container sees it.
    let _lock = take_daemon_lock(&daemon_lock)?;
    // Of a daemon that has ended: this one binds.
    let mark = given_back(&daemon_lock);
    match std::fs::remove_file(&mark) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{} cannot be removed", mark.display()));
        }
        _ => {}
    }
    let manager = manager.until_given_back(mark);
    let shutdown = Shutdown::on_signals()?;
    let readiness = readiness::Registry::default();
    let looked = readiness.register("first look at the node");
    let exposed = Metrics::new();
    let metrics = BindingMetrics::register(&exposed);
    let dump = StateDump::default();
    let endpoint = match health.addr()? {
        Some(addr) => Some(agent_core::http::bind(addr, readiness, exposed).await?.with_state(dump.clone())),
        None => None,
    };
    let serving = async {
        match endpoint {
            Some(server) => server.serve(shutdown.clone()).await,
            None => shutdown.wait().await,
        }
    };
    let keeper = Keeper {
        manager: Arc::new(manager),
        policy: wanted,
        only_observe,
        poll_interval,
        metrics,
        dump,
        status: status.map(Mutex::new),
    };
    let keeping = async {
        let result = keeper.keep(DeviceEvents::subscribe(), &shutdown, &looked).await;
        // Its failure is the agent's: the endpoint must not go on alone.
        shutdown.trigger();
        result
    };
    let (result, ()) = tokio::join!(keeping, serving);
    result.map(|()| ExitCode::SUCCESS)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_by_code_and_address() {
        let bdf = |bus| Bdf { domain: 0, bus, device: 0, function: 0 };
        let outcome = |bus, action, result| {
            let step = Step { bdf: bdf(bus), action, reason: String::new() };
            Outcome { step, result }
        };
        let held = |bus| Err(BindError::Held { bdf: bdf(bus), held_by: vec!["pid 7 (qemu)".into()] });
        let mut outcomes = vec![
            outcome(1, Action::Unbind, Ok(None)),
            outcome(2, Action::Leave, Ok(None)),
            outcome(3, Action::Unbind, Ok(Some("nouveau".into()))),
        ];
        assert_eq!(left_text(&outcomes), "Given back: 2. Left as it was: nothing");
        outcomes.extend([4, 5].map(|bus| outcome(bus, Action::Unbind, held(bus))));
        outcomes.push(outcome(6, Action::Unbind, Err(BindError::Unfinished { bdf: bdf(6), seconds: 20 })));
        assert_eq!(
            left_text(&outcomes),
            "Given back: 2. Left as it was: DeviceHeld 0000:04:00.0 0000:05:00.0; Unfinished 0000:06:00.0"
        );
    }

    #[test]
    fn a_daemon_is_known_by_its_lock_and_only_while_it_lives() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("lock");
        assert!(!held_by_daemon(&path));
        let lock = take_daemon_lock(&path).unwrap();
        assert!(held_by_daemon(&path));
        let second = take_daemon_lock(&path).unwrap_err().to_string();
        assert!(second.contains(&format!("(process {})", std::process::id())), "{second}");
        drop(lock);
        assert!(!held_by_daemon(&path));
        assert_eq!(given_back(&path), place.path().join("lock.given-back"));
    }
}
