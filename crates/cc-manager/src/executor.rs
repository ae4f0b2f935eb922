//! Doing it: owning the devices and running the firmware transaction, off the async thread.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_core::shutdown::Shutdown;
use agent_core::state::{ErrorRecord, HolderRecord};
use gpu_firmware::{
    Cost, DeviceDone, DeviceOutcome, Fault, Milestone, Mode, NodeOutcome, Observer, Ownership, Places, Progress,
    Refused, SystemClock, Transaction,
};
use hw_probe::{Bdf, PciFunction};

/// How long a lock may be held by another role of ccnode before a device counts as busy: vfio-manager holds one for the
/// time of a bind.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// What the agent needs of the firmware crate; tests put a fake in its place.
pub trait Firmware: Send + Sync + 'static {
    /// Whether all `devices` can be owned now, as far as can be told without touching any; and whether looking at them has a
    /// cost. `Err` has one fault for each that cannot be had.
    fn is_free(&self, devices: &[PciFunction]) -> Result<Cost, Vec<DeviceFault>>;

    /// Owns all `devices`, reads what each is in, and releases them; nothing is written. `Ok` has one result a device, an
    /// error for each that is not in what `target` asks of it. `Err` as for [`Firmware::is_free`].
    fn verify(&self, devices: &[PciFunction], target: Mode) -> Result<Vec<DeviceResult>, Vec<DeviceFault>>;

    /// Owns all `devices`, brings them to `target`, verifies and releases them. Blocks until all is done; every wait
    /// within is bounded.
    ///
    /// `Ok` has one result a device. `Err` means that ownership was refused and nothing was touched; it has one fault for
    /// each device that could not be had. Once `stop` is true it ends where nothing has been lost yet: until the first reset
    /// the devices get back the knobs they had, after it everything is done to its end.
    fn apply(
        &self,
        devices: &[PciFunction],
        target: Mode,
        stop: &AtomicBool,
    ) -> Result<Vec<DeviceResult>, Vec<DeviceFault>>;
}

/// What became of one device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceResult {
    /// The device.
    pub bdf: Bdf,
    /// Verified in the target mode, or why not.
    pub result: Result<Verified, DeviceFault>,
}

/// A device as it was read under ownership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Mode that the knobs ask for.
    pub configured: String,
    /// Mode that the device booted with.
    pub active: String,
    /// When both were read.
    pub at: jiff::Timestamp,
}

/// What is wrong with one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFault {
    /// The device.
    pub bdf: Bdf,
    /// Whether it is merely in use by somebody else: to be tried again, and no failure of the device.
    pub busy: bool,
    /// Whether the device is as it was before, knobs and mode.
    pub untouched: bool,
    /// Code, and device, cause and cure in one line.
    pub error: ErrorRecord,
    /// Who has the device, as far as that can be seen.
    pub holders: Vec<HolderRecord>,
}

impl From<&gpu_firmware::Error> for DeviceFault {
    fn from(error: &gpu_firmware::Error) -> Self {
        Self {
            bdf: error.bdf,
            busy: matches!(
                *error.fault,
                Fault::InUse { .. } | Fault::LockHeld { .. } | Fault::OwnershipChanged { .. } | Fault::ReleaseRequested
            ),
            untouched: matches!(*error.fault, Fault::Stopped { .. }),
            error: ErrorRecord { code: error.code().to_owned(), message: error.line() },
            holders: match &*error.fault {
                Fault::InUse { holders, .. } => holders
                    .iter()
                    .map(|holder| HolderRecord {
                        bdf: error.bdf,
                        pid: Some(holder.pid),
                        comm: Some(holder.comm.clone()),
                        pod: None,
                    })
                    .collect(),
                _ => Vec::new(),
            },
        }
    }
}

/// The real firmware crate on this machine.
#[derive(Clone, Debug)]
pub struct GpuFirmware {
    places: Places,
}

impl GpuFirmware {
    /// On the machine that this process runs on.
    pub fn host() -> Self {
        Self { places: Places::host("cc-manager") }
    }
}

impl GpuFirmware {
    fn own(&self, devices: &[PciFunction]) -> Result<Ownership, Vec<DeviceFault>> {
        Ownership::take_within(devices, &self.places, LOCK_PATIENCE, &SystemClock).map_err(|refused| faults(&refused))
    }
}

impl Firmware for GpuFirmware {
    fn is_free(&self, devices: &[PciFunction]) -> Result<Cost, Vec<DeviceFault>> {
        Ownership::look_within(devices, &self.places, LOCK_PATIENCE, &SystemClock).map_err(|refused| faults(&refused))
    }

    fn verify(&self, devices: &[PciFunction], target: Mode) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        let ownership = self.own(devices)?;
        Ok(results(&Transaction::new(&ownership).verify(target, &Log { stop: &AtomicBool::new(false) })))
    }

    fn apply(
        &self,
        devices: &[PciFunction],
        target: Mode,
        stop: &AtomicBool,
    ) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        let ownership = self.own(devices)?;
        for device in ownership.devices() {
            let hold = format!("{:?}", device.hold());
            tracing::info!(event = "device_owned", device = %device.bdf(), step = "own", hold, "Device is ours");
        }
        Ok(results(&Transaction::new(&ownership).run(target, &Log { stop })))
    }
}

fn faults(refused: &Refused) -> Vec<DeviceFault> {
    refused.0.iter().map(DeviceFault::from).collect()
}

fn results(outcome: &NodeOutcome) -> Vec<DeviceResult> {
    let verified = |done: &DeviceDone| Verified {
        configured: done.mode.to_string(),
        active: done.effective.to_string(),
        at: jiff::Timestamp::try_from(done.verified_at).unwrap_or_else(|_| jiff::Timestamp::now()),
    };
    let result = |device: &DeviceOutcome| DeviceResult {
        bdf: device.bdf,
        result: device.result.as_ref().map(verified).map_err(DeviceFault::from),
    };
    outcome.devices.iter().map(result).collect()
}

/// Follows a transaction into the log.
struct Log<'a> {
    stop: &'a AtomicBool,
}

impl Observer for Log<'_> {
    fn progress(&self, progress: &Progress) {
        log_progress(progress);
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// The timeline for people, one line a step.
fn log_progress(progress: &Progress) {
    let device = progress.bdf;
    match &progress.what {
        Milestone::Begun => tracing::debug!(event = "device_begun", %device, step = "open", "Looking at the device"),
        Milestone::Written(write) => {
            tracing::debug!(event = "device_knob_written", %device, step = "stage", knob = %write, "Knob written");
        }
        Milestone::Staged { effective, writes, reset_needed } => tracing::info!(
            event = "device_staged",
            %device,
            step = "stage",
            writes,
            booted_with = %effective,
            reset_needed,
            "Knobs staged"
        ),
        Milestone::MailboxStuck { error } => {
            tracing::warn!(event = "device_mailbox_stuck", %device, step = "stage", code = error.code(), "Device will be reset and staged again: {error}");
        }
        Milestone::BusResetBegun { error } => {
            tracing::warn!(event = "device_bus_reset_begun", %device, step = "reset", code = error.code(), "Device did not come back, its bus is reset: {error}");
        }
        Milestone::ResetBegun => {
            tracing::debug!(event = "device_reset_begun", %device, step = "reset", "Resetting the device");
        }
        Milestone::ResetDone => tracing::info!(event = "device_reset", %device, step = "reset", "Device was reset"),
        Milestone::Booted => tracing::info!(event = "device_booted", %device, step = "boot", "Device has booted"),
        Milestone::Verified => {
            tracing::info!(event = "device_verified", %device, step = "verify", "Device is verified in the target mode");
        }
        // Told by the controller, with code and cure, together with failures of ownership.
        Milestone::Failed { error } => tracing::debug!(%device, code = error.code(), "Device failed"),
    }
}

/// Runs a piece of firmware work on a blocking thread. None when it panicked.
pub(crate) async fn look<F: Firmware, T: Send + 'static>(
    firmware: &Arc<F>,
    work: impl FnOnce(&F) -> T + Send + 'static,
) -> Option<T> {
    let firmware = Arc::clone(firmware);
    match tokio::task::spawn_blocking(move || work(&firmware)).await {
        Ok(found) => Some(found),
        Err(error) => {
            tracing::error!(code = "Interrupted", "Look at the devices ended without a result: {error}");
            None
        }
    }
}

/// Runs [`Firmware::apply`] on a blocking thread and waits for it. A panic there is a failure of every device.
pub(crate) async fn apply<F: Firmware>(
    firmware: &Arc<F>,
    devices: Vec<PciFunction>,
    target: Mode,
    shutdown: &Shutdown,
) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
    let stop = Arc::new(AtomicBool::new(shutdown.is_requested()));
    let bdfs: Vec<Bdf> = devices.iter().map(|device| device.bdf).collect();
    let firmware = Arc::clone(firmware);
    let mut work = tokio::task::spawn_blocking({
        let stop = Arc::clone(&stop);
        move || firmware.apply(&devices, target, &stop)
    });
    let done = tokio::select! {
        done = &mut work => done,
        () = shutdown.wait() => {
            stop.store(true, Ordering::Relaxed);
            work.await
        }
    };
    match done {
        Ok(outcome) => outcome,
        Err(error) => Ok(bdfs
            .into_iter()
            .map(|bdf| {
                let what = error.to_string();
                let error = gpu_firmware::Error::new(bdf, Fault::Interrupted { what });
                DeviceResult { bdf, result: Err(DeviceFault::from(&error)) }
            })
            .collect()),
    }
}

/// Creates the empty readiness file and what is missing of its directory.
pub(crate) fn create_readiness_file(path: &Path) -> anyhow::Result<()> {
    use anyhow::Context;
    let name = path.file_name().and_then(|name| name.to_str()).context("It has no file name")?;
    let parent = path.parent().context("It has no directory")?;
    agent_core::hostfile::HostDir::open(parent)?.write_atomic(name, b"", 0o644)?;
    Ok(())
}
