//! What every cc-manager in a test's own process is made of: two virtual GPUs on a fake sysfs, and the agent's real parts around
//! a firmware of the test's choice.

#![allow(dead_code, reason = "each of the users has its own need of this")]

#[path = "../../../crates/gpu-firmware/tests/common/mod.rs"]
pub(crate) mod virtual_gpu;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_core::metrics::Metrics;
use agent_core::readiness::Registry;
use agent_core::shutdown::Shutdown;
use agent_core::state::{DEVICES_FILE, DeviceRecord, DevicesFile};
use anyhow::{Result, ensure};
use cc_manager::{Controller, DeviceFault, DeviceResult, Firmware, Pausing, Settings, Verified};
use e2e::{is_in, is_untroubled, mode_bits, vector};
use gpu_firmware::{DeviceOutcome, Error, Mode};
use hw_probe::testing::FakeSysfs;
use hw_probe::{Bdf, PciFunction, SysRoot, Tee};
use lab_devices::{BootState, DeviceSpec, ModelKind};
use node_object::{Events, NodeClient, Timing};

use virtual_gpu::Gpu;

const BDFS: [&str; 2] = ["0000:41:00.0", "0000:42:00.0"];

/// What the kubelet calls GPUs.
pub(crate) const RESOURCE: &str = "nvidia.com/pgpu";

/// What the pods of the operator's plugin for Kata say of themselves.
pub(crate) const PLUGIN: &str = "nvidia-kata-sandbox-device-plugin-daemonset";

/// The deploy labels of the operator's components, and what their pods say of themselves. Were one of the labels absent, a
/// change would be computed anew whenever the kubelet writes the node's status in a bad moment.
pub(crate) const OPERANDS: [(&str, &str); 6] = [
    ("nvidia.com/gpu.deploy.vfio-manager", "nvidia-vfio-manager"),
    ("nvidia.com/gpu.deploy.vgpu-manager", "nvidia-vgpu-manager-daemonset"),
    ("nvidia.com/gpu.deploy.sandbox-validator", "nvidia-sandbox-validator"),
    ("nvidia.com/gpu.deploy.sandbox-device-plugin", "nvidia-sandbox-device-plugin-daemonset"),
    ("nvidia.com/gpu.deploy.vgpu-device-manager", "nvidia-vgpu-device-manager"),
    ("nvidia.com/gpu.deploy.kata-sandbox-device-plugin", PLUGIN),
];

/// Longer than any test: nothing happens because of it.
const NEVER: Duration = Duration::from_hours(1);

/// What the gate says of a node in this mode.
pub(crate) fn ready_state(mode: Mode) -> &'static str {
    match mode {
        Mode::On | Mode::Ppcie => "true",
        Mode::Off => "false",
        Mode::Devtools => "",
    }
}

/// What is to become of the node, from what it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) to: Mode,
    /// The machine was booted anew, with its devices in mode off: nothing that the labels say holds any more.
    pub(crate) is_new_boot: bool,
}

/// What a node keeps of its labels when it is made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// The wanted mode, which somebody sets anew.
    Mode,
    /// All, as from a backup.
    All,
}

/// Changes that lead back to where they begin.
pub(crate) const ROUND_TRIP: [Change; 5] = [
    Change { to: Mode::On, is_new_boot: false },
    Change { to: Mode::On, is_new_boot: true },
    Change { to: Mode::Off, is_new_boot: false },
    Change { to: Mode::Devtools, is_new_boot: false },
    Change { to: Mode::Off, is_new_boot: false },
];

/// Two GPUs in mode off, and the machine that they are in.
pub(crate) fn two_gpus() -> (FakeSysfs, Vec<Gpu>) {
    let sysfs = FakeSysfs::new();
    sysfs.tee(Tee::SevSnp);
    for (bdf, group) in BDFS.into_iter().zip(1..) {
        sysfs.gpu(bdf, ModelKind::H100.device_id()).group(group);
    }
    let gpu = |bdf| Gpu::in_mode(DeviceSpec::new("gpu", ModelKind::H100), Mode::Off).at(bdf).quiet();
    (sysfs, BDFS.into_iter().map(gpu).collect())
}

/// Every device has booted in this mode, its knobs say so too, and nobody spoke to it against the protocol.
pub(crate) fn are_in(gpus: &[Gpu], mode: Mode) -> Result<()> {
    for gpu in gpus {
        let (name, status) = (gpu.bdf.to_string(), gpu.status());
        ensure!(status.boot == BootState::Ready, "{name} is {:?}", status.boot);
        is_in(&name, gpu.kind, &status, mode.as_str())?;
        is_untroubled(&name, &status)?;
    }
    Ok(())
}

/// The mode that every device has booted with, if it is one and the same.
pub(crate) fn booted_mode(gpus: &[Gpu]) -> Option<Mode> {
    let has = |mode: Mode| {
        gpus.iter().all(|gpu| {
            let status = gpu.status();
            let word = vector(gpu.kind, mode.as_str()).map(|(word, _)| word);
            status.boot == BootState::Ready && word == Some(status.status_word & mode_bits(gpu.kind))
        })
    };
    Mode::ALL.into_iter().find(|mode| has(*mode))
}

/// What an agent has noted on its host of the devices of a node: all are usable in this mode, and nothing is under way.
pub(crate) fn are_noted_in(gpus: &[Gpu], mode: Mode, place: &Path, node_uid: Option<&str>) -> Result<()> {
    let file: DevicesFile = serde_json::from_slice(&std::fs::read(state_dir(place).join(DEVICES_FILE))?)?;
    ensure!(file.transition.is_none(), "devices.json tells of a transition");
    ensure!(file.origin.node_uid.as_deref() == node_uid, "devices.json is of another node");
    let is_in = |device: &DeviceRecord| device.usable && device.active_mode.as_deref() == Some(mode.as_str());
    ensure!(file.devices.len() == gpus.len() && file.devices.iter().all(is_in), "devices.json says {:?}", file.devices);
    Ok(())
}

/// Lets the machine boot anew for this time, with its devices in mode off: what an agent has left in memory is gone.
pub(crate) fn boot(sysfs: &FakeSysfs, gpus: &[Gpu], place: &Path, times: u32) -> Result<String> {
    let boot_id = format!("{times:08x}-2222-4333-8444-555555555555");
    std::fs::write(sysfs.path().join("proc/sys/kernel/random/boot_id"), format!("{boot_id}\n"))?;
    if let Err(error) = std::fs::remove_dir_all(state_dir(place)) {
        ensure!(error.kind() == ErrorKind::NotFound, "{error}");
    }
    for gpu in gpus {
        gpu.set(Mode::Off)?;
    }
    Ok(boot_id)
}

/// What of the GPUs is among these functions.
pub(crate) fn those<'a>(gpus: &'a [Gpu], devices: &'a [PciFunction]) -> impl Iterator<Item = &'a Gpu> {
    gpus.iter().filter(|gpu| devices.iter().any(|device| device.bdf == gpu.bdf))
}

/// Verifies the mode of each.
pub(crate) fn verified(gpus: &[Gpu], devices: &[PciFunction], target: Mode) -> Vec<DeviceResult> {
    let verify = |gpu: &Gpu| {
        let mut device = gpu.open()?;
        let effective = device.verify(target)?.effective;
        device.release()?;
        Ok(effective.to_string())
    };
    those(gpus, devices).map(|gpu| result_of(target, gpu.bdf, verify(gpu))).collect()
}

/// What the agent is told of a device that was changed.
pub(crate) fn changed(target: Mode, DeviceOutcome { bdf, result }: &DeviceOutcome) -> DeviceResult {
    result_of(target, *bdf, result.clone().map(|done| done.effective.to_string()))
}

fn result_of(target: Mode, bdf: Bdf, outcome: Result<String, Error>) -> DeviceResult {
    let verified = |active| Verified { configured: target.to_string(), active, at: jiff::Timestamp::now() };
    DeviceResult { bdf, result: outcome.map(verified).map_err(|error| DeviceFault::from(&error)) }
}

/// What an agent is started with.
pub(crate) struct Parts<F> {
    pub(crate) firmware: F,
    pub(crate) root: SysRoot,
    /// Where its kubeconfig is, and it keeps its files.
    pub(crate) place: PathBuf,
    pub(crate) node: String,
    /// The namespace of the components that it pauses.
    pub(crate) namespace: String,
    /// Time for components and devices.
    pub(crate) patience: Duration,
    /// How long it waits for an answer.
    pub(crate) answer: Duration,
    /// The first and the last pause before something is tried again.
    pub(crate) retries: [Duration; 2],
    pub(crate) shutdown: Shutdown,
}

/// Where an agent keeps its state below its place.
pub(crate) fn state_dir(place: &Path) -> PathBuf {
    place.join("state")
}

impl<F: Firmware + 'static> Parts<F> {
    /// The agent, until it ends in order.
    pub(crate) async fn run(self) -> Result<()> {
        let Self { firmware, root, place, node, namespace, patience, answer, retries: [first, last], shutdown } = self;
        let settings = Settings {
            default_mode: "off".to_owned(),
            readiness_file: place.join("validations/.cc-manager-ctr-ready"),
            state_dir: state_dir(&place),
            resync: NEVER,
            retry_min: first,
            retry_max: last,
            grace: patience / 2,
            allowed: Mode::ALL.to_vec(),
            hold_without_tee: false,
            only_observe: false,
            hold_down: Duration::ZERO,
            release_poll: NEVER,
            pod_resources: place.join("no-kubelet"),
            patch_pause: Duration::ZERO,
            pausing: Some(Pausing { namespace, patience, others: Vec::new() }),
            busy_wait: Duration::ZERO,
        };
        let timing =
            Timing { request: answer, first_delay: first, last_delay: last, relist_spread: first, ..Timing::default() };
        let client = node_object::connect(Some(&place.join("kubeconfig"))).await?;
        let node = NodeClient::new(client, node, "ccnode-cc-manager").with_timing(timing);
        let (events, sender) = Events::new(node.clone(), "cc-manager");
        let (readiness, metrics) = (Registry::default(), Metrics::new());
        let controller =
            Controller::new(settings, node.clone(), Arc::new(firmware), root, events, &readiness, &metrics);
        tokio::select! {
            never = node.watch() => match never {},
            () = sender.run() => {}
            () = controller.run(shutdown) => {}
        }
        Ok(())
    }
}
