//! cc-manager in one process: its real controller and firmware transaction, over virtual GPUs in model time and a fake sysfs,
//! with an API server of the test's choice.

#![allow(dead_code, reason = "each of the test files uses its own part of this")]

#[path = "../in_process/parts.rs"]
pub(crate) mod parts;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_core::shutdown::Shutdown;
use anyhow::{Context, Result, ensure};
use cc_manager::{DeviceFault, DeviceResult, Firmware};
use gpu_firmware::{Cost, Mode, Observer, Progress, change_devices};
use hw_probe::PciFunction;
use hw_probe::testing::FakeSysfs;
use parts::Parts;
use parts::virtual_gpu::Gpu;

use crate::real_kube::PATIENCE;

/// Looks at the cluster in the moment in which devices begin to be changed; what is wrong then.
pub(crate) type Look = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// Told the mode that all devices have booted with when that is over, if they have; what is wrong then.
pub(crate) type Ended = Arc<dyn Fn(Option<Mode>) -> Result<()> + Send + Sync>;

/// For whoever does not ask when devices have been changed.
pub(crate) fn nobody_is_told() -> Ended {
    Arc::new(|_| Ok(()))
}

struct VirtualFirmware {
    gpus: Vec<Gpu>,
    look: Look,
    ended: Ended,
    wrong: Arc<Mutex<Vec<String>>>,
}

/// Tells a transaction of nothing but its end.
struct Quiet<'a>(&'a AtomicBool);

impl Observer for Quiet<'_> {
    fn progress(&self, _: &Progress) {}

    fn is_stopping(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl VirtualFirmware {
    fn note(&self, found: Result<()>) {
        if let Err(error) = found {
            self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{error:#}"));
        }
    }
}

impl Firmware for VirtualFirmware {
    fn is_free(&self, _: &[PciFunction]) -> Result<Cost, Vec<DeviceFault>> {
        Ok(Cost::Nothing)
    }

    fn verify(&self, devices: &[PciFunction], target: Mode) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        Ok(parts::verified(&self.gpus, devices, target))
    }

    fn apply(
        &self,
        devices: &[PciFunction],
        target: Mode,
        stop: &AtomicBool,
    ) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        self.note((self.look)());
        let openers = parts::those(&self.gpus, devices).map(|gpu| (gpu.bdf, || gpu.open())).collect();
        let outcome = change_devices(openers, target, &Quiet(stop));
        self.note((self.ended)(parts::booted_mode(&self.gpus)));
        Ok(outcome.devices.iter().map(|outcome| parts::changed(target, outcome)).collect())
    }
}

/// A node's hardware, and what its agent leaves there.
pub(crate) struct Hardware {
    here: tempfile::TempDir,
    sysfs: FakeSysfs,
    gpus: Vec<Gpu>,
    wrong: Arc<Mutex<Vec<String>>>,
    boots: AtomicU32,
}

/// How an agent is started.
pub(crate) struct Start<'a> {
    pub(crate) kubeconfig: &'a str,
    pub(crate) node: &'a str,
    pub(crate) namespace: &'a str,
    /// How long it waits for an answer.
    pub(crate) answer: Duration,
    pub(crate) look: Look,
    pub(crate) ended: Ended,
}

/// What an agent logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An agent that runs.
pub(crate) struct Agent {
    shutdown: Shutdown,
    log: Log,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Agent {
    /// What it has logged so far, but for what its firmware says.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&self.log.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Asks it to end, and waits until it has.
    pub(crate) async fn end(self) -> Result<()> {
        // The thread ends its runtime, for which this one is not needed.
        tokio::task::spawn_blocking(move || {
            self.shutdown.trigger();
            self.thread.join().map_err(|_| anyhow::anyhow!("the agent's thread panicked"))?
        })
        .await?
    }
}

impl Hardware {
    /// Two GPUs in mode off.
    pub(crate) fn new() -> Result<Self> {
        let (sysfs, gpus) = parts::two_gpus();
        Ok(Self { here: tempfile::tempdir()?, sysfs, gpus, wrong: Arc::default(), boots: AtomicU32::new(0) })
    }

    /// Lets the machine boot anew, with its devices in mode off; the boot's id. No agent runs.
    pub(crate) fn boot(&self) -> Result<String> {
        let times = self.boots.fetch_add(1, Ordering::Relaxed) + 1;
        parts::boot(&self.sysfs, &self.gpus, self.here.path(), times)
    }

    /// The agent has noted of the devices of this node on its host that they are in this mode.
    pub(crate) fn is_noted_in(&self, mode: Mode, node_uid: Option<&str>) -> Result<()> {
        parts::are_noted_in(&self.gpus, mode, self.here.path(), node_uid)
    }

    pub(crate) fn start(&self, start: Start<'_>) -> Result<Agent> {
        let Start { kubeconfig, node, namespace, answer, look, ended } = start;
        let (place, shutdown, log) = (self.here.path().to_owned(), Shutdown::manual(), Log::default());
        std::fs::write(place.join("kubeconfig"), kubeconfig)?;
        let agent = Parts {
            firmware: VirtualFirmware { gpus: self.gpus.clone(), look, ended, wrong: Arc::clone(&self.wrong) },
            root: self.sysfs.root(),
            place,
            node: node.to_owned(),
            namespace: namespace.to_owned(),
            patience: PATIENCE,
            answer,
            retries: [Duration::from_millis(20), Duration::from_millis(200)],
            shutdown: shutdown.clone(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let written = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || written.clone()).finish();
        let thread = std::thread::spawn(move || {
            let result = tracing::subscriber::with_default(subscriber, || runtime.block_on(agent.run()));
            runtime.shutdown_background();
            result
        });
        Ok(Agent { shutdown, log, thread })
    }

    /// Every device has booted in this mode, and nothing was wrong when it was changed.
    pub(crate) fn is_in(&self, mode: Mode) -> Result<()> {
        parts::are_in(&self.gpus, mode).context("against the protocol, or in another mode")?;
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(wrong.is_empty(), "when devices were changed: {wrong:#?}");
        Ok(())
    }
}
