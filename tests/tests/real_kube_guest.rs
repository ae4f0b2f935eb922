//! The agents on a real kernel with virtual GPUs, asking a real API server: real controllers end the pods of what they pause, and
//! bring back what a driver-manager has left paused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "real_kube/agent.rs"]
mod agent;
#[path = "real_kube/operator.rs"]
mod operator;
mod real_kube;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent::Look;
use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, is_in, is_untroubled, lab_has};
use gpu_firmware::Mode;
use lab::Boot;
use lab_devices::{BootState, DeviceStatus};
use lab_kube::api_server::Rule;
use lab_vm::{Command, Guest, Kernel, Process, Wanted};
use nix::sys::signal::Signal;
use operator::{Components, OPERATOR, want};
use real_kube::{Account, Cluster, NODE, audited, run};
use serde_json::Value;

/// Debian's: where nothing but these tests is wanted, none has to be built.
const KERNEL: Kernel = Kernel::Stock;

/// The marker of a driver-manager that has paused a component.
const PAUSED: &str = "paused-for-driver-upgrade";

/// The guest, which stands for the machine of the kubelet's node.
struct Machine(Arc<Guest>);

impl Machine {
    /// Boots in the cluster's network: QEMU shows the guest its host's loopback as 10.0.2.2, and the server's certificate has that.
    async fn boot() -> Result<Self> {
        let boot = || Boot { kernel: Some(KERNEL), ..Boot::new("h100x2")? }.guest();
        let guest = tokio::task::spawn_blocking(boot).await??;
        Ok(Self(Arc::new(guest)))
    }

    /// Calls the guest where the test's own tasks need not wait for it.
    async fn ask<T: Send + 'static>(&self, what: impl FnOnce(&Guest) -> Result<T> + Send + 'static) -> Result<T> {
        let guest = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || what(&guest)).await?
    }

    /// A change in which nobody is there while GPUs boot, and after which all components run again.
    async fn changes(&self, cluster: &Cluster, components: &Components, mode: Mode) -> Result<()> {
        let before = components.running().await?;
        let looks = Looks::begin(Arc::clone(&self.0), components.look());
        want(&cluster.admin, NODE, Some(mode)).await?;
        components.until_settled(mode).await?;
        let looked = looks.end()?;
        ensure!(looked > 0, "nobody looked while GPUs booted");
        self.ask(move |guest| are_in(guest, mode)).await?;
        let after = components.running().await?;
        let kept: Vec<_> = after.iter().filter(|(name, uid)| before.get(*name) == Some(*uid)).collect();
        ensure!(after.len() == before.len() && kept.is_empty(), "{kept:?} of {after:?} were never ended");
        println!("{mode}: {} pods ended and came back; looked {looked} times while GPUs booted", after.len());
        Ok(())
    }

    /// Starts a program with the rights of an account.
    async fn start(&self, argv: &'static [&'static str], account: &Account, namespace: &str) -> Result<Process> {
        let path = format!("/etc/lab/{}.conf", argv[0]);
        let mut kubeconfig: Value = serde_json::from_str(&account.kubeconfig)?;
        let server = &mut kubeconfig["clusters"][0]["cluster"]["server"];
        *server = server.as_str().unwrap_or_default().replace("//127.0.0.1:", "//10.0.2.2:").into();
        let command = Command::new(argv.iter().copied())
            .env("NODE_NAME", NODE)
            .env("KUBECONFIG", &path)
            .env("OPERATOR_NAMESPACE", namespace)
            .env("HOST_ROOT", "/")
            .env("CCNODE_HOLD_DOWN", "1ms")
            .env("CCNODE_RETRY_MIN", "500ms")
            .env("CCNODE_RETRY_MAX", "2s");
        self.ask(move |guest| {
            guest.put_file(kubeconfig.to_string().as_bytes(), &path, 0o600)?;
            Ok(guest.spawn(command)?)
        })
        .await
    }
}

/// What agents have said.
fn said(agents: &[&Process]) -> String {
    let texts = agents.iter().flat_map(|agent| [agent.output().text(), agent.output().error_text()]);
    texts.collect::<Vec<_>>().join("\n")
}

/// Asks agents to end, in order.
fn end(agents: &[&Process]) -> Result<()> {
    agents.iter().try_for_each(|agent| {
        agent.signal(Signal::SIGTERM)?;
        let status = agent.wait(CHANGE)?;
        ensure!(status.success(), "{status}");
        Ok(())
    })
}

fn statuses(guest: &Guest) -> Result<Vec<(String, lab_devices::ModelKind, DeviceStatus)>> {
    let gpus = guest.topology().devices.iter().map(|device| &device.spec).filter(|spec| spec.model.is_gpu());
    gpus.map(|spec| Ok((spec.name.clone(), spec.model, guest.fleet().status(&spec.name)?))).collect()
}

/// Every GPU has booted in this mode.
fn are_in(guest: &Guest, mode: Mode) -> Result<()> {
    for (name, model, status) in statuses(guest)? {
        is_in(&name, model, &status, mode.as_str())?;
        is_untroubled(&name, &status)?;
    }
    Ok(())
}

/// Looks at the cluster whenever a GPU boots, until it is over.
struct Looks {
    is_over: Arc<AtomicBool>,
    found: Arc<Mutex<Vec<Result<()>>>>,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Looks {
    fn begin(guest: Arc<Guest>, look: Look) -> Self {
        let (is_over, found) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (ends, finds) = (Arc::clone(&is_over), Arc::clone(&found));
        let thread = std::thread::spawn(move || {
            let boots = || Ok::<_, anyhow::Error>(statuses(&guest)?.iter().any(|gpu| gpu.2.boot != BootState::Ready));
            while !ends.load(Ordering::Relaxed) {
                if boots()? {
                    let seen = look();
                    // Whatever was seen after the boot was of no change.
                    if boots()? {
                        finds.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
                    }
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        });
        Self { is_over, found, thread }
    }

    /// How often it looked; an error if it ever saw what should not be.
    fn end(self) -> Result<usize> {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the thread that looks panicked"))??;
        let found = std::mem::take(&mut *self.found.lock().unwrap_or_else(PoisonError::into_inner));
        let count = found.len();
        found.into_iter().collect::<Result<Vec<()>>>().context("while GPUs booted")?;
        Ok(count)
    }
}

#[test]
#[ignore = "needs a real kubelet and the lab: hack/test --real-kube"]
fn agents_on_a_real_kernel_pause_what_real_controllers_then_end() -> Result<()> {
    if !lab_has(&Wanted::kernel(KERNEL))? {
        return Ok(());
    }
    run(async {
        let cluster = Cluster::real().await?;
        let namespace = cluster.namespace().await?;
        let account = async |name: &str, rules: &[Rule]| cluster.account_named(&namespace, name, rules).await;
        let cc_manager = account("nvidia-cc-manager", &Rule::operator_cc_manager(&namespace)).await?;
        let vfio_manager = account("nvidia-vfio-manager", &Rule::operator_vfio_manager()).await?;
        want(&cluster.admin, NODE, Some(Mode::Off)).await?;
        let components = Components::on_the_kubelets_node(&cluster, &namespace).await?;
        components.until_running(true).await?;

        // A driver-manager has paused them all, and did not come to its end.
        components.label(|_| Some(PAUSED)).await?;
        components.until_running(false).await?;
        let machine = Machine::boot().await?;
        let driver_manager = machine.start(&["driver-manager", "uninstall_driver"], &vfio_manager, &namespace).await?;
        let told = machine
            .ask(move |_| {
                let status = driver_manager.wait(CHANGE)?;
                let output = driver_manager.output();
                ensure!(status.success(), "{status}: {}{}", output.text(), output.error_text());
                Ok(output.text())
            })
            .await?;
        ensure!(told.contains("Pauses left by another driver-manager are lifted: "), "{told}");
        components.until_running(true).await.context("driver-manager lifts the pauses")?;

        let vfio = machine.start(&["vfio-manager", "run"], &vfio_manager, &namespace).await?;
        let cc = machine.start(&["cc-manager"], &cc_manager, &namespace).await?;
        let logs = || said(&[&vfio, &cc]);
        components.until_settled(Mode::Off).await.with_context(logs)?;
        for mode in [Mode::On, Mode::Off] {
            machine.changes(&cluster, &components, mode).await.with_context(logs)?;
        }
        end(&[&cc, &vfio]).with_context(logs)?;
        // driver-manager has looked at its node and written it once; vfio-manager asks nothing, whatever it may.
        let asked = audited(&vfio_manager)?;
        println!("audit: driver-manager and vfio-manager: {asked:?}");
        ensure!(
            asked == [("list nodes", 1), ("patch nodes", 1)].map(|(what, count)| (what.to_owned(), count)).into(),
            "{asked:?}"
        );
        want(&cluster.admin, NODE, None).await?;
        components.remove().await
    })
}

#[test]
#[ignore = "needs a real kubelet and the lab: hack/test --real-kube"]
fn the_charts_own_rights_are_enough_for_agents_on_a_real_kernel() -> Result<()> {
    if !lab_has(&Wanted::kernel(KERNEL))? {
        return Ok(());
    }
    run(async {
        let cluster = Cluster::real().await?;
        let account = operator::charts_account(&cluster).await?;
        want(&cluster.admin, NODE, Some(Mode::Off)).await?;
        let components = Components::on_the_kubelets_node(&cluster, OPERATOR).await?;
        components.until_running(true).await?;
        let machine = Machine::boot().await?;
        // The chart gives vfio-manager no token.
        let vfio = Command::new(["vfio-manager", "run"]).env("NODE_NAME", NODE).env("HOST_ROOT", "/");
        let vfio = machine.ask(move |guest| Ok(guest.spawn(vfio)?)).await?;
        let cc = machine.start(&["cc-manager"], &account, OPERATOR).await?;
        let logs = || said(&[&vfio, &cc]);
        components.until_settled(Mode::Off).await.with_context(logs)?;
        let before = audited(&account)?;
        for mode in [Mode::On, Mode::Off] {
            machine.changes(&cluster, &components, mode).await.with_context(logs)?;
        }
        end(&[&cc, &vfio]).with_context(logs)?;
        let asked = audited(&account)?;
        println!("audit: two changes in the guest with the chart's rights: {asked:?}, of that before: {before:?}");
        // Before 1.22 a server finds events about nodes invalid; a patch that met another's is computed anew.
        let is_right = |what: &str| !what.contains(", ") || ["create events, 422", "patch nodes, 422"].contains(&what);
        ensure!(asked.keys().all(|what| is_right(what)) && asked.contains_key("list pods"), "{asked:?}");
        want(&cluster.admin, NODE, None).await?;
        components.remove().await
    })
}
