//! A change of mode of all devices of a node, without Kubernetes: stage all, reset all in parallel, wait, verify all.
//!
//! A device that fails stops nobody else, and makes the node's outcome a failure. A device that is right already is
//! not reset. Interrupted anywhere, the next run finishes: what is to be done comes from the devices alone.
//!
//! Two failures are given a second chance, once each. A firmware mailbox that does not work any more is emptied by a reset
//! (gpu-cc-protocol section 10.2), and the device is then staged anew. A device that does not come back after its reset
//! is given a bus reset, where the kernel knows one that concerns no other device.

use std::fmt;
use std::ops::ControlFlow;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use hw_probe::Bdf;

use crate::chip::Support;
use crate::device::{Device, Observed, Staged};
use crate::error::{Error, Fault};
use crate::knob::{KnobState, KnobWrite};
use crate::mode::{Effective, Mode};
use crate::ownership::{OwnedDevice, Ownership};

/// Something that happened to a device on its way.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The device.
    pub bdf: Bdf,
    /// When.
    pub at: SystemTime,
    /// What.
    pub what: Milestone,
}

/// The steps of a device's way.
#[derive(Clone, Debug, PartialEq)]
pub enum Milestone {
    /// It is being looked at.
    Begun,
    /// A knob was written and read back.
    Written(KnobWrite),
    /// All its knobs are those of the target.
    Staged {
        /// The mode it booted with.
        effective: Effective,
        /// How many knobs were written.
        writes: usize,
        /// Whether it will be reset.
        reset_needed: bool,
    },
    /// Its firmware's mailbox does not work; it will be reset, and then staged again.
    MailboxStuck {
        /// What is wrong with it.
        error: Error,
    },
    /// Its reset was asked for.
    ResetBegun,
    /// The kernel has reset it.
    ResetDone,
    /// It did not come back after its reset; a bus reset was asked for.
    BusResetBegun {
        /// How it did not come back.
        error: Error,
    },
    /// It has booted again.
    Booted,
    /// It is in the target mode, effective and knobs.
    Verified,
    /// It will not get there.
    Failed {
        /// Why.
        error: Error,
    },
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.bdf)?;
        match &self.what {
            Milestone::Begun => f.write_str("begun"),
            Milestone::Written(write) => write!(f, "knob {write}"),
            Milestone::Staged { effective, writes, reset_needed } => {
                let reset = if *reset_needed { "reset needed" } else { "no reset needed" };
                write!(f, "staged, {writes} knobs written, booted with {effective}, {reset}")
            }
            Milestone::MailboxStuck { error } => write!(f, "to be reset and staged again: {}", error.fault),
            Milestone::ResetBegun => f.write_str("reset begun"),
            Milestone::ResetDone => f.write_str("reset done"),
            Milestone::BusResetBegun { error } => write!(f, "bus reset begun: {}", error.fault),
            Milestone::Booted => f.write_str("booted"),
            Milestone::Verified => f.write_str("verified"),
            Milestone::Failed { error } => write!(f, "failed: {}", error.fault),
        }
    }
}

/// Whoever wants to know how far a transaction is. Called from the devices' threads, which wait for it.
pub trait Observer: Sync {
    /// Something happened.
    fn progress(&self, progress: &Progress);

    /// Whether to stop where nothing has been lost yet: until the first reset. The devices then get back the knobs they
    /// had ([`Fault::Stopped`]). A transaction whose resets have begun goes on to its end.
    fn is_stopping(&self) -> bool {
        false
    }
}

impl<F: Fn(&Progress) + Sync> Observer for F {
    fn progress(&self, progress: &Progress) {
        self(progress);
    }
}

/// A device that has reached the target.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceDone {
    /// Its own mode in the node's target: a switch of a node with CC is off.
    pub mode: Mode,
    /// The mode it booted with: the same.
    pub effective: Effective,
    /// Its knobs: the target's.
    pub knobs: Vec<KnobState>,
    /// The knobs that were written.
    pub written: Vec<KnobWrite>,
    /// Whether it was reset.
    pub was_reset: bool,
    /// When it was verified.
    pub verified_at: SystemTime,
    /// Time from the transaction's start to its verification.
    pub took: Duration,
}

/// How it went with one device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceOutcome {
    /// The device.
    pub bdf: Bdf,
    /// What became of it.
    pub result: Result<DeviceDone, Error>,
}

/// How it went with all of them.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeOutcome {
    /// The mode that was wanted of the node.
    pub target: Mode,
    /// One outcome a device, in the order of the ownership.
    pub devices: Vec<DeviceOutcome>,
    /// Time for everything.
    pub took: Duration,
}

impl NodeOutcome {
    /// Whether every device was verified in the target mode. True of no devices at all.
    pub fn all_verified(&self) -> bool {
        self.devices.iter().all(|device| device.result.is_ok())
    }

    /// The errors, of those devices that have one.
    pub fn errors(&self) -> impl Iterator<Item = &Error> {
        self.devices.iter().filter_map(|device| device.result.as_ref().err())
    }
}

/// A change of mode of devices that are ours.
#[derive(Debug)]
pub struct Transaction<'a> {
    devices: &'a [OwnedDevice],
}

impl<'a> Transaction<'a> {
    /// One over all devices of `ownership`.
    pub fn new(ownership: &'a Ownership) -> Self {
        Self { devices: ownership.devices() }
    }

    /// Brings every device to its own mode in the node's mode `target`, or says of each why not. Returns when all are done;
    /// every wait within has a deadline.
    pub fn run(&self, target: Mode, observer: &dyn Observer) -> NodeOutcome {
        let openers = self.devices.iter().map(|owned| {
            let open = move || {
                // Before the device is woken up: whether this mode is for it.
                let supported = Support::of(owned.function()).and_then(|support| support.target(target));
                supported.map_err(|fault| Error::new(owned.bdf(), fault))?;
                Device::open(owned)
            };
            (owned.bdf(), open)
        });
        change_devices(openers.collect(), target, observer)
    }
}

impl Transaction<'_> {
    /// Reads of every device whether it is in its own mode in the node's mode `target`; nothing is written or reset.
    pub fn verify(&self, target: Mode, observer: &dyn Observer) -> NodeOutcome {
        let start = Instant::now();
        let devices = self.devices.iter().map(|owned| (owned.bdf(), owned)).collect();
        let verified = parallel(devices, |bdf, owned: &OwnedDevice| {
            let mut device = Device::open(owned)?;
            let Observed { effective, knobs, .. } = device.verify(target)?;
            device.release()?;
            observer.progress(&Progress { bdf, at: SystemTime::now(), what: Milestone::Verified });
            done(&device, target, effective, knobs, Vec::new(), false, start)
        });
        let devices = verified.into_iter().map(|(bdf, result)| DeviceOutcome { bdf, result }).collect();
        NodeOutcome { target, devices, took: start.elapsed() }
    }
}

/// What [`Transaction::run`] does, over devices however they are opened: each is opened by its function, in a thread of its
/// own, and closed when it is done.
pub fn change_devices<F>(devices: Vec<(Bdf, F)>, target: Mode, observer: &dyn Observer) -> NodeOutcome
where
    F: FnOnce() -> Result<Device, Error> + Send,
{
    let start = Instant::now();
    let tell = |bdf: Bdf, what: Milestone| {
        let progress = Progress { bdf, at: SystemTime::now(), what };
        tracing::debug!("{progress}");
        observer.progress(&progress);
    };
    let stage = |bdf: Bdf, open: F| {
        tell(bdf, Milestone::Begun);
        let mut device = open()?;
        let staged = stage(&mut device, target, observer, &|what| tell(bdf, what))?;
        let Staged { effective, reset_needed, .. } = staged;
        tell(bdf, Milestone::Staged { effective, writes: staged.written.len(), reset_needed });
        Ok((device, staged))
    };
    let finish = |bdf: Bdf, (mut device, staged): (Device, Staged)| {
        let Staged { mut effective, mut knobs, written, reset_needed } = staged;
        let tell = |what| tell(bdf, what);
        if reset_needed {
            reset(&mut device, &tell)?;
            Observed { effective, knobs, .. } = device.verify(target)?;
        }
        // Without a reset, staging has read the effective mode and every knob of the target, and found them right. Closing
        // an opened device resets it once more; it must have come back before anybody calls it verified.
        device.release()?;
        tell(Milestone::Verified);
        done(&device, target, effective, knobs, written, reset_needed, start)
    };
    let undo = |bdf: Bdf, (mut device, staged): (Device, Staged)| {
        let undone = device.unstage(&staged.written)?;
        Err(Error::new(bdf, Fault::Stopped { undone }))
    };
    // All are staged before any is reset: a device that cannot be staged is known before the first goes down.
    let staged = parallel(devices, stage);
    let is_stopping = observer.is_stopping();
    let finished = parallel(staged, |bdf, staged: Result<(Device, Staged), Error>| {
        let result = staged.and_then(|staged| if is_stopping { undo(bdf, staged) } else { finish(bdf, staged) });
        result.inspect_err(|error| tell(bdf, Milestone::Failed { error: error.clone() }))
    });
    let devices = finished.into_iter().map(|(bdf, result)| DeviceOutcome { bdf, result }).collect();
    NodeOutcome { target, devices, took: start.elapsed() }
}

/// What is told of a device that has been verified just now.
fn done(
    device: &Device,
    target: Mode,
    effective: Effective,
    knobs: Vec<KnobState>,
    written: Vec<KnobWrite>,
    was_reset: bool,
    start: Instant,
) -> Result<DeviceDone, Error> {
    let mode = device.support().target(target).map_err(|fault| Error::new(device.bdf(), fault))?;
    let (verified_at, took) = (SystemTime::now(), start.elapsed());
    Ok(DeviceDone { mode, effective, knobs, written, was_reset, verified_at, took })
}

/// Stages a device, after a reset if its mailbox turns out not to work.
fn stage(
    device: &mut Device,
    target: Mode,
    observer: &dyn Observer,
    tell: &dyn Fn(Milestone),
) -> Result<Staged, Error> {
    let attempt = |device: &mut Device| {
        if observer.is_stopping() {
            return Err(Error::new(device.bdf(), Fault::Stopped { undone: 0 }));
        }
        device.stage(target, &mut |write| {
            tell(Milestone::Written(*write));
            if observer.is_stopping() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    let error = match attempt(device) {
        Err(error) if error.fault.is_mailbox_stuck() && !observer.is_stopping() => error,
        other => return other,
    };
    tell(Milestone::MailboxStuck { error });
    reset(device, tell)?;
    attempt(device)
}

/// Resets a device and waits until it has booted; tries a bus reset if it does not.
fn reset(device: &mut Device, tell: &dyn Fn(Milestone)) -> Result<(), Error> {
    tell(Milestone::ResetBegun);
    device.reset()?;
    tell(Milestone::ResetDone);
    let booted = match device.wait_boot() {
        Err(error) if error.fault.is_missing_after_reset() => {
            tell(Milestone::BusResetBegun { error: error.clone() });
            match device.bus_reset() {
                Ok(()) => {
                    tell(Milestone::ResetDone);
                    device.wait_boot()
                }
                Err(refused) => {
                    tracing::warn!(device = %device.bdf(), "no bus reset: {}", refused.fault);
                    Err(error)
                }
            }
        }
        other => other,
    };
    booted.inspect(|()| tell(Milestone::Booted))
}

/// Does `act` with all items at once, each on a thread of its own, and returns what came of each, in order.
pub(crate) fn parallel<I: Send, T: Send>(
    items: Vec<(Bdf, I)>,
    act: impl Fn(Bdf, I) -> Result<T, Error> + Sync,
) -> Vec<(Bdf, Result<T, Error>)> {
    let act = &act;
    thread::scope(|scope| {
        let threads: Vec<_> = items
            .into_iter()
            .map(|(bdf, item)| {
                let work = move || {
                    let _span = tracing::info_span!("device", device = %bdf).entered();
                    act(bdf, item)
                };
                (bdf, thread::Builder::new().name(bdf.to_string()).spawn_scoped(scope, work))
            })
            .collect();
        let interrupted = |bdf, what| Err(Error::new(bdf, Fault::Interrupted { what }));
        let result = |(bdf, thread): (Bdf, std::io::Result<thread::ScopedJoinHandle<'_, Result<T, Error>>>)| {
            let result = match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| interrupted(bdf, "its thread panicked".into())),
                Err(error) => interrupted(bdf, format!("cannot start a thread: {error}")),
            };
            (bdf, result)
        };
        threads.into_iter().map(result).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::fake::{FakeGpu, Quirk};

    fn transact(gpus: &[FakeGpu], target: Mode) -> (NodeOutcome, Vec<Progress>) {
        let seen = Mutex::new(Vec::new());
        let observer = |progress: &Progress| seen.lock().unwrap().push(progress.clone());
        let openers = gpus.iter().map(|gpu| (gpu.bdf(), || Ok(gpu.device()))).collect();
        let outcome = change_devices(openers, target, &observer);
        (outcome, seen.into_inner().unwrap())
    }

    fn three() -> Vec<FakeGpu> {
        ["0000:41:00.0", "0000:61:00.0", "0000:81:00.0"].map(FakeGpu::at).into()
    }

    #[test]
    fn every_device_gets_there_in_the_same_steps() {
        let gpus = three();
        let (outcome, seen) = transact(&gpus, Mode::On);
        assert!(outcome.all_verified(), "{outcome:?}");
        for gpu in &gpus {
            let steps: Vec<String> = seen
                .iter()
                .filter(|progress| progress.bdf == gpu.bdf())
                .map(|progress| progress.to_string()[14..].to_owned())
                .collect();
            let expected = [
                "begun",
                "knob BAR0_DECOUPLER (10) 0 -> 2",
                "knob CCM (8) 0 -> 1",
                "staged, 2 knobs written, booted with off, reset needed",
                "reset begun",
                "reset done",
                "booted",
                "verified",
            ];
            assert_eq!(steps, expected);
            assert_eq!(gpu.resets(), 1);
        }
        let staged = seen.iter().rposition(|progress| matches!(progress.what, Milestone::Staged { .. })).unwrap();
        let reset = seen.iter().position(|progress| progress.what == Milestone::ResetBegun).unwrap();
        assert!(staged < reset, "all are staged before any is reset");
    }

    #[test]
    fn what_is_right_already_is_neither_written_nor_reset() {
        let gpus = three();
        for gpu in &gpus {
            gpu.put_in_mode(Mode::Devtools);
        }
        gpus[1].put_in_mode(Mode::Off);
        let (outcome, _) = transact(&gpus, Mode::Devtools);
        assert!(outcome.all_verified());
        assert_eq!(gpus.iter().map(FakeGpu::resets).collect::<Vec<_>>(), [0, 1, 0]);
        let done = |index: usize| outcome.devices[index].result.as_ref().unwrap();
        assert_eq!((done(0).was_reset, done(0).written.len(), done(0).effective), (false, 0, Effective::Devtools));
        assert_eq!((done(1).was_reset, done(1).written.len()), (true, 2));
    }

    #[test]
    fn pending_knobs_are_not_mistaken_for_the_mode() {
        let gpus = three();
        // Staged `on` and interrupted before the reset; then `off` is wanted again: effective is off already.
        gpus[0].device().stage(Mode::On, &mut |_| ControlFlow::Continue(())).unwrap();
        let (outcome, _) = transact(&gpus, Mode::Off);
        assert!(outcome.all_verified());
        assert_eq!(gpus[0].requests_after_reset_are_vector_of(Mode::Off), Ok(()));
        // And the other way: knobs say `on`, the device has not been reset.
        gpus[1].device().stage(Mode::On, &mut |_| ControlFlow::Continue(())).unwrap();
        let (outcome, _) = transact(&gpus, Mode::On);
        assert!(outcome.all_verified());
        assert!(outcome.devices[1].result.as_ref().unwrap().was_reset);
    }

    #[test]
    fn one_failure_stops_nobody_else_and_fails_the_node() {
        let table = [
            (Quirk::UnknownKnob(crate::Knob::CCM), "KnobUnsupported", 0),
            // Once to free its mailbox, in vain.
            (Quirk::DropReplies, "FspNoResponse", 1),
            (Quirk::ResetFails(nix::errno::Errno::EIO), "ResetFailed", 0),
            (Quirk::DiesAtReset, "OffBus", 1),
            (Quirk::HangsAtReset, "BootTimeout", 1),
            (Quirk::ModeStuck, "VerifyFailed", 1),
        ];
        for (quirk, code, resets) in table {
            let gpus = three();
            gpus[1].quirk(quirk);
            let (outcome, seen) = transact(&gpus, Mode::On);
            assert!(!outcome.all_verified());
            let results: Vec<Option<&str>> =
                outcome.devices.iter().map(|device| device.result.as_ref().err().map(Error::code)).collect();
            assert_eq!(results, [None, Some(code), None]);
            assert_eq!(outcome.errors().map(|error| error.bdf).collect::<Vec<_>>(), [gpus[1].bdf()]);
            assert_eq!(gpus.iter().map(FakeGpu::resets).collect::<Vec<_>>(), [1, resets, 1], "{code}");
            let last = seen.iter().rfind(|progress| progress.bdf == gpus[1].bdf()).unwrap();
            assert!(matches!(&last.what, Milestone::Failed { error } if error.code() == code), "{last}");
        }
    }

    #[test]
    fn a_panicking_device_is_a_failed_device() {
        let gpus = three();
        let observer = |progress: &Progress| {
            assert!(progress.bdf != gpus[2].bdf() || progress.what != Milestone::ResetDone, "on purpose");
        };
        let openers = gpus.iter().map(|gpu| (gpu.bdf(), || Ok(gpu.device()))).collect();
        let outcome = change_devices(openers, Mode::On, &observer);
        let codes: Vec<_> = outcome.errors().map(Error::code).collect();
        assert_eq!(codes, ["Interrupted"]);
    }

    #[test]
    fn a_second_chance_is_given_where_a_reset_may_help() {
        let staged = ["knob BAR0_DECOUPLER (10) 0 -> 2", "knob CCM (8) 0 -> 1"];
        let once = ["staged, 2 knobs written, booted with off, reset needed", "reset begun", "reset done"];
        let stuck =
            "to be reset and staged again: Firmware did not answer within 5000 ms: message queue head 0x0, tail 0x0";
        let late = "bus reset begun: Did not finish booting within 5000 ms: register 0x200bc reads 00000000, wanted \
                    000000ff; FSP status 000000f0 000000f1 000000f2 000000f3";
        let wedged = [&["begun", stuck][..], &once[1..], &["booted"], &staged, &once, &["booted", "verified"]].concat();
        let hung = [&["begun"][..], &staged, &once, &[late, "reset done", "booted", "verified"]].concat();
        for (quirk, steps) in [(Quirk::WedgedUntilReset, wedged), (Quirk::HangsUntilBusReset, hung)] {
            let gpu = FakeGpu::new();
            gpu.quirk(quirk.clone());
            let (outcome, seen) = transact(std::slice::from_ref(&gpu), Mode::On);
            assert!(outcome.all_verified(), "{quirk:?}: {outcome:?}");
            let found: Vec<String> = seen.iter().map(|progress| progress.to_string()[14..].to_owned()).collect();
            assert_eq!(found, steps, "{quirk:?}");
            assert_eq!(gpu.resets(), 2);
        }
    }

    /// Stops the transaction once `after` knobs have been written.
    struct StopAfter {
        after: usize,
        seen: Mutex<Vec<Progress>>,
    }

    impl Observer for StopAfter {
        fn progress(&self, progress: &Progress) {
            self.seen.lock().unwrap().push(progress.clone());
        }

        fn is_stopping(&self) -> bool {
            let seen = self.seen.lock().unwrap();
            seen.iter().filter(|progress| matches!(progress.what, Milestone::Written(_))).count() >= self.after
        }
    }

    #[test]
    fn until_the_first_reset_it_can_be_stopped_without_a_trace() {
        for from in [Mode::Off, Mode::Devtools] {
            for after in 0..=2 {
                let gpus = [FakeGpu::in_mode(from)];
                let observer = StopAfter { after, seen: Mutex::default() };
                let openers = gpus.iter().map(|gpu| (gpu.bdf(), || Ok(gpu.device()))).collect();
                let outcome = change_devices(openers, Mode::On, &observer);
                let result = outcome.devices[0].result.as_ref().unwrap_err();
                assert_eq!(*result.fault, Fault::Stopped { undone: after }, "{from}");
                assert_eq!(gpus[0].requests_after_reset_are_vector_of(from), Ok(()), "{from} {after}");
                assert_eq!(gpus[0].resets(), 0);
            }
        }
    }

    #[test]
    fn a_mode_that_no_device_has_touches_none() {
        let tree = crate::fake::Tree::new();
        let without_cc = |mut function: hw_probe::PciFunction| {
            function.model.as_mut().unwrap().cc_enable = hw_probe::CcEnable::OffOnly;
            function
        };
        let functions =
            ["0000:41:00.0", "0000:61:00.0"].map(|bdf| without_cc(tree.function(bdf, Some("vfio-pci"), Some(12))));
        let ownership = Ownership::take(&functions, &tree.places).unwrap();
        let outcome = Transaction::new(&ownership).run(Mode::Ppcie, &|_: &Progress| {});
        let codes: Vec<_> = outcome.errors().map(Error::code).collect();
        assert_eq!(codes, ["Unsupported", "Unsupported"]);
    }
}
