//! One attempt to bring devices to a mode, from the first look to what is concluded.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use agent_core::shutdown::Shutdown;
use agent_core::state::{DeviceRecord, DevicesFile, ErrorRecord, HolderRecord, Transition};
use gpu_firmware::{Cost, Mode};
use hw_probe::{Bdf, Inventory, PciFunction};
use node_object::{Event, NodeState, operands};
use tokio::time::Instant;

use super::bystanders::InTheWay;
use super::state_dir::StateDir;
use super::{Controller, Round, first_error, millis, shut};
use crate::allocations;
use crate::audit;
use crate::executor::{self, DeviceFault, DeviceResult, Firmware};
use crate::plan::{self, Source};
use crate::publish::{Facts, Journal, Verdict};

/// What a look at devices found; none when it ended without a result.
pub(super) type Looked = Option<Result<Option<Vec<DeviceResult>>, Vec<DeviceFault>>>;

/// What a node is before a change is attempted.
pub(super) struct Before {
    /// The mode that every device is verified in.
    pub(super) standing: Option<Mode>,
    pub(super) records: Vec<DeviceRecord>,
}

impl Before {
    pub(super) fn of(inventory: &Inventory, wanted: Mode, known: Option<&DevicesFile>) -> Self {
        let standing = plan::standing(inventory, known);
        Self { standing, records: plan::records(inventory, Some(standing.unwrap_or(wanted)), known, &[]) }
    }
}

/// What is to be changed, and why.
pub(super) struct Attempt {
    pub(super) mode: Mode,
    pub(super) source: Source,
    pub(super) devices: Vec<PciFunction>,
    pub(super) whole: bool,
    /// Devices that cannot be in the mode, while the others can.
    pub(super) refused: Vec<DeviceFault>,
}

impl<F: Firmware> Controller<F> {
    /// One attempt to bring devices to a mode.
    pub(super) async fn change(
        &mut self,
        attempt: Attempt,
        state: &StateDir,
        inventory: &Inventory,
        known: Option<&DevicesFile>,
        shutdown: &Shutdown,
    ) -> Round {
        let Attempt { mode, source, ref devices, whole, ref refused } = attempt;
        if state.boot_id.is_empty() {
            let message =
                "The kernel's boot id cannot be read, so nothing verified could be told from an earlier boot's";
            let error = ErrorRecord { code: "NoBootId".to_owned(), message: message.to_owned() };
            self.refuse(state, mode.as_str(), &error, Vec::new());
            return Round::Retry;
        }
        // What the node is, should nothing come of this.
        let before = Before::of(inventory, mode, known);

        if before.standing == Some(mode) && devices.iter().all(|device| self.memory.releases.is_in_use(device.bdf)) {
            // In use again before it could be looked at: it will be when it is let go.
            return self.rest_until_released(mode, state, &before);
        }

        match self.look(mode, devices, known).await {
            Some(Ok(Some(results))) if results.iter().all(|result| result.result.is_ok()) => {
                let mut records = plan::records(inventory, Some(mode), known, devices);
                plan::apply_faults(&mut records, refused);
                plan::apply_results(&mut records, &results);
                plan::all_or_none(Some(mode), &mut records);
                return self.found_right(mode, refused, state, records);
            }
            Some(Ok(Some(results))) if known.is_some() => self.tell_drift(known, devices, &results),
            Some(Err(faults)) if faults.iter().all(|fault| fault.busy) && before.standing == Some(mode) => {
                for fault in &faults {
                    self.memory.releases.found_in_use(fault.bdf, self.is_suspended(fault.bdf));
                }
                return self.rest_until_released(mode, state, &before);
            }
            Some(Err(faults)) if faults.iter().all(|fault| fault.busy) && self.settings.busy_wait.is_zero() => {
                return self.hold(mode, &faults, state, before);
            }
            Some(Err(faults)) if !faults.iter().all(|fault| fault.busy) => {
                let records = plan::records(inventory, Some(mode), known, devices);
                return self.ended(&attempt, Err(faults), Duration::ZERO, state, records, before);
            }
            Some(Ok(_) | Err(_)) | None => {}
        }
        if shutdown.is_requested() {
            return Round::Ended;
        }

        if let Err(round) = self.begin(state, mode, whole, shutdown).await {
            return round;
        }
        let mut records = plan::records(inventory, Some(mode), known, devices);
        plan::apply_faults(&mut records, refused);
        // What an earlier attempt left over is changed without taking the devices that are right from their users.
        let transition = whole.then(|| Transition {
            target: mode.to_string(),
            step: "changing".to_owned(),
            started_at: jiff::Timestamp::now(),
        });
        let mut journal = records.clone();
        if !whole {
            plan::forget(&mut journal, &devices.iter().map(|device| device.bdf).collect::<Vec<_>>());
        }
        if !self.store(state, transition, journal) {
            let error = state.unwritable("so no device is touched");
            self.conclude(Verdict::NotBegun, state.facts(mode.as_str(), Some(&error), &records));
            return Round::Retry;
        }

        tracing::info!(
            event = "transition_started",
            step = "begin",
            mode = %mode,
            source = %source,
            devices = devices.len(),
            "Change of mode begins"
        );
        let begun = Instant::now();
        let ready = tokio::select! {
            ready = self.others_are_out_of_the_way(devices, whole) => ready,
            () = shutdown.wait() => Err(InTheWay::Ending),
            () = self.superseded() => Err(InTheWay::Superseded),
            never = self.keep_shut() => match never {},
        };
        match ready {
            Ok(()) => {}
            Err(InTheWay::Others(error)) => return self.give_up(mode, &error, &[], state, before),
            Err(InTheWay::Devices(faults)) => return self.hold(mode, &faults, state, before),
            Err(InTheWay::Ending) => return self.put_back(mode, state, before),
            Err(InTheWay::Superseded) => {
                // Nothing was touched. The next round, due at once, goes on with what was begun or ends it.
                self.store(state, None, plan::withheld(plan::records(inventory, Some(mode), known, &[])));
                return Round::Later(Duration::ZERO);
            }
        }

        self.memory.awaited.clear();
        self.counters.held(&[]);
        for device in devices {
            self.memory.releases.touched(device.bdf);
        }
        let (outcome, took, pods) = tokio::select! {
            changed = self.change_devices(mode, devices, shutdown, begun) => changed,
            never = self.keep_shut() => match never {},
        };
        self.look_at_power_soon();
        let round = self.ended(&attempt, outcome, took, state, records, before);
        // One device can be used though another has failed, but for protected PCIe.
        if mode != Mode::Ppcie || matches!(round, Round::Rest) {
            self.tell_early_pods(mode, &pods);
        }
        round
    }

    /// What came of the devices, how long after `begun`, and which pods have those that were changed.
    async fn change_devices(
        &self,
        mode: Mode,
        devices: &[PciFunction],
        shutdown: &Shutdown,
        begun: Instant,
    ) -> (Result<Vec<DeviceResult>, Vec<DeviceFault>>, Duration, BTreeMap<Bdf, String>) {
        let outcome = executor::apply(&self.firmware, devices.to_vec(), mode, shutdown).await;
        let took = begun.elapsed();
        // Asked before the gate is opened: then none of them was admitted in view of the new mode.
        let mut pods = allocations::pods(&self.settings.pod_resources, devices).await.unwrap_or_default();
        let changed = outcome.iter().flatten().filter(|result| result.result.is_ok());
        let changed: BTreeSet<Bdf> = changed.map(|result| result.bdf).collect();
        pods.retain(|bdf, _| changed.contains(bdf));
        (outcome, took, pods)
    }

    /// Tells of pods that were given a device before it was changed, and have not begun to use it: their virtual machines
    /// will find another mode than the one the node was in when the pods were admitted.
    fn tell_early_pods(&self, mode: Mode, pods: &BTreeMap<Bdf, String>) {
        for pod in pods.values().collect::<BTreeSet<_>>() {
            let devices = pods.iter().filter(|(_, of)| *of == pod).map(|(bdf, _)| bdf.to_string()).collect::<Vec<_>>();
            let note = format!(
                "Pod {pod} was admitted before the change, and its virtual machine will find mode {mode}: {}; its workload \
                 sees the mode by attestation alone; delete the pod if it is not to run in this mode",
                devices.join(", ")
            );
            tracing::warn!(event = "early_pod", pod, mode = %mode, "{note}");
            let reason = "PodAdmittedBeforeChange".to_owned();
            self.events.tell(Event { is_warning: true, reason, action: "Change", note });
        }
    }

    /// Before anybody is disturbed: whether the devices can be had now (`Err` if not), and, where nothing is known of them,
    /// whether they are in the mode already (`Some` result for each).
    pub(super) async fn look(&mut self, mode: Mode, devices: &[PciFunction], known: Option<&DevicesFile>) -> Looked {
        let pods = self.pods_of(devices).await;
        let looked = devices.to_vec();
        // What a pod is about to open is not opened in front of it.
        let is_unknown = pods.is_empty() && plan::any_unknown(known, devices);
        // Where looking resets them, that is not done without the others out of the way.
        let look = move |firmware: &F| match firmware.is_free(&looked)? {
            Cost::Nothing if is_unknown => firmware.verify(&looked, mode).map(Some),
            Cost::Nothing | Cost::Resets => Ok(None),
        };
        let found = executor::look(&self.firmware, look).await;
        if matches!(found, Some(Ok(Some(_)))) {
            for device in devices {
                self.memory.releases.touched(device.bdf);
            }
            self.look_at_power_soon();
        }
        if pods.is_empty() {
            return found;
        }
        let mut faults = found.and_then(Result::err).unwrap_or_default();
        allocations::name_pods(&mut faults, &pods);
        Some(Err(faults))
    }

    /// Devices whose users may have changed them are in use again: the others are verified in the mode, and these are looked at
    /// when they are let go.
    pub(super) fn rest_until_released(&mut self, mode: Mode, state: &StateDir, before: &Before) -> Round {
        self.look_at_power_soon();
        if !self.keep(state, before.records.clone()) {
            return Round::Retry;
        }
        self.conclude(Verdict::Applied(mode), state.facts(mode.as_str(), None, &before.records));
        Round::Rest
    }

    /// What comes of an attempt that touched devices, or tried to.
    pub(super) fn ended(
        &mut self,
        attempt: &Attempt,
        outcome: Result<Vec<DeviceResult>, Vec<DeviceFault>>,
        took: Duration,
        state: &StateDir,
        mut records: Vec<DeviceRecord>,
        before: Before,
    ) -> Round {
        let Attempt { mode, refused, .. } = attempt;
        let (mode, took_ms) = (*mode, millis(took));
        let results = outcome.as_ref().cloned().unwrap_or_default();
        let (mut verdict, mut error) = match outcome {
            Ok(results) => {
                self.memory.last_reset = Some(Instant::now());
                plan::apply_results(&mut records, &results);
                plan::all_or_none(Some(mode), &mut records);
                let failed = results.iter().filter_map(|result| result.result.as_ref().err());
                if failed.clone().any(|fault| fault.untouched) {
                    // Told to end, and ended before anything was lost: the next start begins anew. Should another device's
                    // knobs not have been put back, what was known of it is not known any more.
                    let failed: Vec<Bdf> = results
                        .iter()
                        .filter(|result| result.result.as_ref().is_err_and(|fault| !fault.untouched))
                        .map(|result| result.bdf)
                        .collect();
                    let mut before = before;
                    if !failed.is_empty() {
                        before.standing = None;
                        plan::forget(&mut before.records, &failed);
                    }
                    return self.put_back(mode, state, before);
                }
                let faults: Vec<&DeviceFault> = failed.chain(refused).collect();
                tell_results(&results);
                match first_error(&faults, "Not every device was brought to", mode) {
                    None => (Verdict::Applied(mode), None),
                    error => (Verdict::Failed, error),
                }
            }
            // Somebody was quicker than we.
            Err(faults) if faults.iter().all(|fault| fault.busy) => return self.hold(mode, &faults, state, before),
            Err(faults) => {
                plan::apply_faults(&mut records, &faults);
                for DeviceFault { bdf, error, .. } in &faults {
                    tell_fault(*bdf, "own", error);
                }
                let faults: Vec<&DeviceFault> = faults.iter().collect();
                (Verdict::Failed, first_error(&faults, "Not every device can be owned, so none is brought to", mode))
            }
        };
        if self.is_superseded() {
            // Verified, but not in what is wanted by now: the next round decides.
            records = plan::withheld(records);
        }
        if !self.store(state, None, records.clone()) && matches!(verdict, Verdict::Applied(_)) {
            // The others still read of a transition: a gate that is open now would lead pods to a node that offers nothing.
            verdict = Verdict::Failed;
            error = Some(state.unwritable("so the other agents cannot be told that every device is verified"));
        }
        let result = if matches!(verdict, Verdict::Applied(_)) { "applied" } else { "failed" };
        self.counters.transition(mode, result);
        tracing::info!(event = "transition_ended", step = "end", mode = %mode, result, took_ms, "Change of mode has ended");
        let round = if matches!(verdict, Verdict::Applied(_)) { Round::Rest } else { Round::Retry };
        self.conclude(verdict, state.facts(mode.as_str(), error.as_ref(), &records));
        if results.is_empty() {
            // None was touched: no change for the record.
            return round;
        }
        self.counters.took(result, took);
        let became =
            |result: &DeviceResult| (result.bdf, result.result.as_ref().err().map(|fault| fault.error.code.clone()));
        let audited: Vec<_> = results.iter().map(became).collect();
        if result == "failed" && audited == self.memory.audited {
            // The same failure again is no news, and would drive the others out of what is kept.
            return round;
        }
        self.memory.audited = audited;
        let asked_by = self.node.view().node().and_then(|node| node.mode_set_by.clone());
        let asked_by = asked_by.as_deref().filter(|_| attempt.source == Source::Label);
        let change = audit::Change {
            node: self.node.name(),
            boot_id: &state.boot_id,
            asked_by,
            from: before.standing,
            to: mode,
            result,
            took_ms,
        };
        audit::Line::of(change, &results).record(&state.path);
        if matches!(round, Round::Rest) {
            let devices = results.iter().map(|result| result.bdf.to_string()).collect::<Vec<_>>().join(", ");
            let text = format!("In mode {mode}, verified after {took_ms} ms: {devices}");
            self.events.tell(Event {
                is_warning: false,
                reason: "CCModeChanged".to_owned(),
                action: "Change",
                note: text,
            });
        }
        round
    }

    /// Tells of devices that had to be looked at again, and are not what they were. What is known to be in another mode, or
    /// to have failed, is to be changed: that is no news.
    pub(super) fn tell_drift(&self, known: Option<&DevicesFile>, devices: &[PciFunction], results: &[DeviceResult]) {
        for (device, DeviceResult { bdf, result }) in devices.iter().zip(results) {
            if let Err(fault) = result
                && plan::is_withdrawn(known, device)
            {
                self.counters.drifted();
                let note = fault.error.message.clone();
                self.events.tell(Event { is_warning: true, reason: "Drift".to_owned(), action: "Verify", note });
                let code = &fault.error.code;
                tracing::warn!(event = "drift", device = %bdf, code, "Device is not as it should be: {}", fault.error.message);
            }
        }
    }

    /// Devices are in use, so none was touched: the node stays what it is, and offers what it offers.
    pub(super) fn hold(&mut self, mode: Mode, faults: &[DeviceFault], state: &StateDir, before: Before) -> Round {
        for DeviceFault { bdf, error, .. } in faults {
            if self.memory.said.insert(error.message.clone()) {
                tell_fault(*bdf, "own", error);
            }
        }
        let lines: Vec<&DeviceFault> = faults.iter().collect();
        match first_error(&lines, "Not every device can be owned, so none is brought to", mode) {
            Some(error) => self.give_up(mode, &error, faults, state, before),
            None => Round::Retry,
        }
    }

    /// Told to end before any device was reset: the node is what it was, and its components run again.
    pub(super) fn put_back(&mut self, mode: Mode, state: &StateDir, before: Before) -> Round {
        tracing::info!(event = "transition_stopped", mode = %mode, "Change was stopped before its resets, and is put back");
        let message = format!(
            "The agent was told to end before the change to mode {mode} had reset a device; everything was put back; the \
             agent's next start makes the change"
        );
        let error = ErrorRecord { code: "Stopped".to_owned(), message };
        self.give_up(mode, &error, &[], state, before);
        Round::Ended
    }

    /// An attempt ends before any device was touched.
    pub(super) fn give_up(
        &mut self,
        mode: Mode,
        error: &ErrorRecord,
        faults: &[DeviceFault],
        state: &StateDir,
        before: Before,
    ) -> Round {
        // Of one that is held asleep nothing will tell the release: it is tried again after the delay.
        self.memory.awaited.clear();
        for DeviceFault { bdf, .. } in faults.iter().filter(|fault| fault.busy) {
            let asleep = self.is_suspended(*bdf);
            self.memory.releases.found_in_use(*bdf, asleep);
            if !asleep {
                self.memory.awaited.push(*bdf);
            }
        }
        self.look_at_power_soon();
        let Before { standing, mut records } = before;
        plan::note_faults(&mut records, faults);
        self.counters.transition(mode, "busy");
        // The others may still read of a transition: then no gate is opened over it.
        let kept = self.keep(state, records.clone());
        let verdict = standing.filter(|_| kept).map_or(Verdict::NotBegun, Verdict::Held);
        let holders: Vec<HolderRecord> = faults.iter().flat_map(|fault| fault.holders.clone()).collect();
        self.counters.held(&holders);
        self.conclude(verdict, Facts { holders: &holders, ..state.facts(mode.as_str(), Some(error), &records) });
        Round::Retry
    }

    /// The one patch that begins a change: the gate is shut, the journal written, the operator's components are paused.
    pub(super) async fn begin(
        &mut self,
        state: &StateDir,
        mode: Mode,
        whole: bool,
        shutdown: &Shutdown,
    ) -> Result<(), Round> {
        let journal = Journal::begin(&state.boot_id, mode);
        let pause = self.settings.pausing.is_some();
        let reads: Vec<&str> = if whole && pause { operands::labels().collect() } else { Vec::new() };
        // A retry of what an earlier attempt left over disturbs nobody but the devices concerned: it has nothing to put back,
        // and says nothing new of a node whose gate is shut.
        let is_repetition = self.memory.is_failing_in(mode);
        let is_quiet = |node: &NodeState| {
            is_repetition && !(pause && (operands::any_to_pause(node) || operands::any_paused(node)))
        };
        let change = |node: &NodeState| if whole && !is_quiet(node) { journal.change(node, pause) } else { shut() };
        let begun = tokio::select! {
            begun = self.node.update((&reads, &[]), change) => begun,
            () = shutdown.wait() => return Err(Round::Ended),
        };
        self.forget_publication();
        match begun {
            Ok(_) => {
                self.memory.api_retry.reset();
                if whole && !is_repetition {
                    let note = format!("Change to mode {mode} begins; the node is not ready for GPU pods");
                    let reason = "CCModeChanging".to_owned();
                    self.events.tell(Event { is_warning: false, reason, action: "Change", note });
                }
                tracing::info!(event = "withdrawn", step = "withdraw", ready = "", "Node is not ready for GPU pods");
                Ok(())
            }
            Err(error) => Err(Round::ApiFailed(error)),
        }
    }
}

pub(super) fn tell_results(results: &[DeviceResult]) {
    for DeviceResult { bdf, result } in results {
        if let Err(fault) = result {
            tell_fault(*bdf, "change", &fault.error);
        }
    }
}

pub(super) fn tell_fault(bdf: hw_probe::Bdf, step: &'static str, error: &ErrorRecord) {
    tracing::error!(event = "device_failed", device = %bdf, step, code = error.code, "{}", error.message);
}
