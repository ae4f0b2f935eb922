//! cc-manager in one process: its real controller and firmware transaction, over virtual GPUs in model time and a fake sysfs,
//! with an API server of the test's choice.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_core::metrics::Metrics;
use agent_core::readiness::Registry;
use agent_core::shutdown::Shutdown;
use anyhow::{Context, Result, ensure};
use cc_manager::{Controller, DeviceFault, DeviceResult, Firmware, Pausing, Settings, Verified};
use gpu_firmware::{Cost, DeviceOutcome, Error, Mode, Observer, Progress, change_devices};
use hw_probe::testing::FakeSysfs;
use hw_probe::{Bdf, PciFunction, Tee};
use lab_devices::{BootState, DeviceSpec, ModelKind};
use node_object::{Events, NodeClient, Timing};

use crate::real_kube::PATIENCE;
use crate::virtual_gpu::Gpu;

const BDFS: [&str; 2] = ["0000:41:00.0", "0000:42:00.0"];

/// Longer than any test: nothing happens because of it.
const NEVER: Duration = Duration::from_hours(1);

/// Looks at the cluster in the moment in which devices begin to be changed; what is wrong then.
pub(crate) type Look = Arc<dyn Fn() -> Result<()> + Send + Sync>;

struct VirtualFirmware {
    gpus: Vec<Gpu>,
    look: Look,
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

fn result_of(target: Mode, bdf: Bdf, outcome: Result<String, Error>) -> DeviceResult {
    let verified = |active| Verified { configured: target.to_string(), active, at: jiff::Timestamp::now() };
    DeviceResult { bdf, result: outcome.map(verified).map_err(|error| DeviceFault::from(&error)) }
}

impl VirtualFirmware {
    fn those<'a>(&'a self, devices: &'a [PciFunction]) -> impl Iterator<Item = &'a Gpu> {
        self.gpus.iter().filter(|gpu| devices.iter().any(|device| device.bdf == gpu.bdf))
    }
}

impl Firmware for VirtualFirmware {
    fn is_free(&self, _: &[PciFunction]) -> Result<Cost, Vec<DeviceFault>> {
        Ok(Cost::Nothing)
    }

    fn verify(&self, devices: &[PciFunction], target: Mode) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        let verify = |gpu: &Gpu| {
            let mut device = gpu.open()?;
            let effective = device.verify(target)?.effective;
            device.release()?;
            Ok(effective.to_string())
        };
        Ok(self.those(devices).map(|gpu| result_of(target, gpu.bdf, verify(gpu))).collect())
    }

    fn apply(
        &self,
        devices: &[PciFunction],
        target: Mode,
        stop: &AtomicBool,
    ) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        if let Err(error) = (self.look)() {
            self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{error:#}"));
        }
        let openers = self.those(devices).map(|gpu| (gpu.bdf, || gpu.open())).collect();
        let outcome = change_devices(openers, target, &Quiet(stop));
        let result = |DeviceOutcome { bdf, result }: &DeviceOutcome| {
            result_of(target, *bdf, result.clone().map(|done| done.effective.to_string()))
        };
        Ok(outcome.devices.iter().map(result).collect())
    }
}

/// A node's hardware, and what its agent leaves there.
pub(crate) struct Hardware {
    here: tempfile::TempDir,
    sysfs: FakeSysfs,
    gpus: Vec<Gpu>,
    wrong: Arc<Mutex<Vec<String>>>,
}

/// How an agent is started.
pub(crate) struct Start<'a> {
    pub(crate) kubeconfig: &'a str,
    pub(crate) node: &'a str,
    pub(crate) namespace: &'a str,
    /// How long it waits for an answer.
    pub(crate) answer: Duration,
    pub(crate) look: Look,
}

/// An agent that runs.
pub(crate) struct Agent {
    shutdown: Shutdown,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Agent {
    /// Asks it to end, and waits until it has.
    pub(crate) fn end(self) -> Result<()> {
        self.shutdown.trigger();
        self.thread.join().map_err(|_| anyhow::anyhow!("the agent's thread panicked"))?
    }
}

impl Hardware {
    /// Two GPUs in mode off.
    pub(crate) fn new() -> Result<Self> {
        let (here, sysfs) = (tempfile::tempdir()?, FakeSysfs::new());
        sysfs.tee(Tee::SevSnp);
        for (bdf, group) in BDFS.into_iter().zip(1..) {
            sysfs.gpu(bdf, ModelKind::H100.device_id()).group(group);
        }
        let gpu = |bdf| Gpu::in_mode(DeviceSpec::new("gpu", ModelKind::H100), Mode::Off).at(bdf).quiet();
        Ok(Self { here, sysfs, gpus: BDFS.into_iter().map(gpu).collect(), wrong: Arc::default() })
    }

    fn place(&self, name: &str) -> PathBuf {
        self.here.path().join(name)
    }

    pub(crate) fn start(&self, start: Start<'_>) -> Result<Agent> {
        let Start { kubeconfig, node, namespace, answer, look } = start;
        let path = self.place("kubeconfig");
        std::fs::write(&path, kubeconfig)?;
        let firmware = VirtualFirmware { gpus: self.gpus.clone(), look, wrong: Arc::clone(&self.wrong) };
        let settings = Settings {
            default_mode: "off".to_owned(),
            readiness_file: self.place("validations/.cc-manager-ctr-ready"),
            state_dir: self.place("state"),
            resync: NEVER,
            retry_min: Duration::from_millis(20),
            retry_max: Duration::from_millis(200),
            grace: PATIENCE / 2,
            allowed: Mode::ALL.to_vec(),
            hold_without_tee: false,
            only_observe: false,
            hold_down: Duration::ZERO,
            release_poll: NEVER,
            pod_resources: self.place("no-kubelet"),
            patch_pause: Duration::ZERO,
            pausing: Some(Pausing { namespace: namespace.to_owned(), patience: PATIENCE }),
            busy_wait: Duration::ZERO,
        };
        let timing = Timing {
            request: answer,
            first_delay: Duration::from_millis(20),
            last_delay: Duration::from_millis(200),
            relist_spread: Duration::from_millis(20),
            ..Timing::default()
        };
        let (node, root, shutdown) = (node.to_owned(), self.sysfs.root(), Shutdown::manual());
        let token = shutdown.clone();
        let work = async move {
            let client = node_object::connect(Some(&path)).await?;
            let node = NodeClient::new(client, node, "ccnode-cc-manager").with_timing(timing);
            let (events, sender) = Events::new(node.clone(), "cc-manager");
            let (readiness, metrics) = (Registry::default(), Metrics::new());
            let firmware = Arc::new(firmware);
            let controller = Controller::new(settings, node.clone(), firmware, root, events, &readiness, &metrics);
            tokio::select! {
                never = node.watch() => match never {},
                () = sender.run() => {}
                () = controller.run(token) => {}
            }
            Ok(())
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::spawn(move || {
            let result = runtime.block_on(work);
            runtime.shutdown_background();
            result
        });
        Ok(Agent { shutdown, thread })
    }

    /// Every device has booted in this mode, and nothing was wrong when it was changed.
    pub(crate) fn is_in(&self, mode: Mode) -> Result<()> {
        for gpu in &self.gpus {
            let (name, status) = (gpu.bdf.to_string(), gpu.status());
            ensure!(status.boot == BootState::Ready, "{name} is {:?}", status.boot);
            e2e::is_in(&name, gpu.kind, &status, mode.as_str())?;
            e2e::is_untroubled(&name, &status).context("against the protocol")?;
        }
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(wrong.is_empty(), "when devices were changed: {wrong:#?}");
        Ok(())
    }
}
