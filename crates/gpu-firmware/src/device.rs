//! One device: what mode it is in, changing its knobs, resetting it, waiting for it.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use hw_probe::{Bdf, PciFunction};
use serde::Serialize;

use crate::access::{self, Access, BackEnd, Bar0, capability_word, is_pri_error, read_sane};
use crate::chip::{BOOT_0, BOOT_0_SECURITY_FAULT, BOOTED, Chip, FIREWALL, FSP_STATUS, Support};
use crate::clock::{Clock, SystemClock, Wait, millis};
use crate::error::{Error, Fault};
use crate::knob::{self, Knob, KnobState, KnobWrite, Step};
use crate::mailbox::Fsp;
use crate::message::Request;
use crate::mode::{Effective, Mode};
use crate::ownership::OwnedDevice;

/// Word of configuration space that is all ones when the device is gone, even behind a hypervisor that emulates the rest
/// (gpu-cc-protocol section 1.2).
const LIVENESS: u16 = 0xf0;

/// Byte of configuration space with the first capability's offset; all ones when the device is gone.
const CAPABILITIES: u16 = 0x34;

/// How long the recovery flag of a booted device may answer with bus errors before it is done without.
const RECOVERY: Wait = Wait::new(Duration::from_millis(100), Duration::from_millis(10));

/// A device as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Observed {
    /// The mode it booted with.
    pub effective: Effective,
    /// The mode its knobs ask for at the next reset, when they are the complete vector of one.
    pub configured: Option<Mode>,
    /// The knobs, in the order they were read.
    pub knobs: Vec<KnobState>,
    /// PMC_BOOT_0.
    pub boot0: u32,
}

/// The outcome of staging.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Staged {
    /// The mode the device booted with.
    pub effective: Effective,
    /// The knobs as they are now: those of the wanted mode.
    pub knobs: Vec<KnobState>,
    /// What was changed, in order; each was read back.
    pub written: Vec<KnobWrite>,
    /// Whether a reset is needed: something was written, or the device booted with another mode than is wanted.
    pub reset_needed: bool,
}

/// A device under ownership. Dropping it puts back power and memory decoding, and ends the ownership it was opened with
/// unless somebody else shares it.
pub struct Device {
    // Dropped in this order: the registers first.
    bar0: Option<Box<dyn Bar0>>,
    back: Box<dyn BackEnd>,
    clock: Arc<dyn Clock>,
    bdf: Bdf,
    /// Device and vendor id as the first dword of configuration space has them.
    ids: u32,
    support: Support,
    fsp: Fsp,
    boot0: u32,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("bdf", &self.bdf).field("support", &self.support).finish_non_exhaustive()
    }
}

impl Device {
    /// Opens an owned device, the way that its ownership allows: wakes it up, and touches no register yet. As an opened VFIO
    /// device it has been reset by that.
    pub fn open(owned: &OwnedDevice) -> Result<Self, Error> {
        let fail = |fault| Error::new(owned.bdf(), fault);
        // Before anything is changed: whether it can be driven at all.
        Support::of(owned.function()).map_err(fail)?;
        let back = access::open(owned, &SystemClock).map_err(fail)?;
        Self::with_back_end(owned.function(), back, Arc::new(SystemClock))
    }

    /// Opens the device that `back` reaches.
    pub fn with_back_end(function: &PciFunction, back: Box<dyn BackEnd>, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let support = Support::of(function).map_err(|fault| Error::new(function.bdf, fault))?;
        Ok(Self {
            bar0: None,
            back,
            clock,
            bdf: function.bdf,
            ids: u32::from(function.device) << 16 | u32::from(function.vendor),
            fsp: Fsp::new(support.chip.mailbox),
            support,
            boot0: 0,
        })
    }

    /// Its address.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// What can be done with it.
    pub fn support(&self) -> &Support {
        &self.support
    }

    /// The way it is reached.
    pub fn access(&self) -> Access {
        self.back.access()
    }

    /// Waits until the device has booted: configuration space answers, the BAR firewall is open, no security fault, BAR0
    /// answers, boot complete, not in recovery (gpu-cc-protocol sections 1.6 and 5). Takes no longer than twice the chip's
    /// boot budget (Hopper and LS10: 5 s, Blackwell: 10 s), the first of the two for configuration space, and on Blackwell
    /// 15 s for the firewall.
    pub fn wait_boot(&mut self) -> Result<(), Error> {
        self.boot().map_err(|fault| self.fail(fault))
    }

    /// The mode the device booted with. Waits for its boot if nobody has yet.
    pub fn effective(&mut self) -> Result<Effective, Error> {
        self.read_effective().map_err(|fault| self.fail(fault))
    }

    /// The mode the device booted with, and every knob that has to do with modes.
    pub fn observe(&mut self) -> Result<Observed, Error> {
        self.look().map_err(|fault| self.fail(fault))
    }

    /// The permission knobs of the knobs that [`Device::observe`] reads, in that order; 0 forbids a change from the host.
    pub fn permissions(&mut self) -> Result<Vec<KnobState>, Error> {
        let permissions = self.chip().knobs.iter().filter_map(|knob| knob.permission());
        permissions.map(|knob| self.knob_state(knob).map_err(|fault| self.fail(fault))).collect()
    }

    /// Whether the device can be brought to `mode`: its model tells, and for some its status register. Changes nothing.
    pub fn can_be(&mut self, mode: Mode) -> Result<(), Error> {
        let check = |device: &mut Self| {
            let mode = device.support.target(mode)?;
            let status = device.status()?;
            device.support.allows(mode, status)
        };
        check(self).map_err(|fault| self.fail(fault))
    }

    /// Brings the knobs to those of `mode`, the device's own, writing only what differs, each write followed by reading it
    /// back. The mode takes effect at the next reset.
    ///
    /// `on_write` is told of each write as it has been read back, and says whether to go on. If not, what was written is
    /// written back at the next allowed vector and the error is [`Fault::Stopped`]. After any other error the writes told
    /// are all that was changed, but for the knob that the error names.
    pub fn stage(
        &mut self,
        mode: Mode,
        on_write: &mut dyn FnMut(&KnobWrite) -> ControlFlow<()>,
    ) -> Result<Staged, Error> {
        self.support.target(mode).and_then(|mode| self.stage_knobs(mode, on_write)).map_err(|fault| self.fail(fault))
    }

    /// Writes back what [`Device::stage`] has written. The reverse way leads through the same vectors as the way there, so
    /// it is as safe to interrupt. Returns the number of knobs.
    pub fn unstage(&mut self, written: &[KnobWrite]) -> Result<usize, Error> {
        self.write_back(written).map_err(|fault| self.fail(fault))
    }

    /// Resets the device, unless its configuration space does not answer: resetting a dead device would block for
    /// minutes. What was known of its registers and queues is forgotten.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.reset_with(|back| back.reset()).map_err(|fault| self.fail(fault))
    }

    /// Resets a device by its bus that did not come back from [`Device::reset`].
    pub fn bus_reset(&mut self) -> Result<(), Error> {
        self.reset_with(|back| back.bus_reset()).map_err(|fault| self.fail(fault))
    }

    /// Gives up what is open of the device, to be called when it is verified. Closing a VFIO device resets it again, which
    /// activates the knobs that were just verified; then this waits until configuration space answers, no longer than the
    /// chip's boot budget. Afterwards no register can be reached.
    pub fn release(&mut self) -> Result<(), Error> {
        self.do_release().map_err(|fault| self.fail(fault))
    }

    /// Whether the device is in `mode`, its own, effective and knobs; if not, an error that says what it is in.
    pub fn verify(&mut self, mode: Mode) -> Result<Observed, Error> {
        self.do_verify(mode).map_err(|fault| self.fail(fault))
    }

    fn chip(&self) -> &'static Chip {
        self.support.chip
    }

    /// The error of a fault. A dead BAR0 of a device whose configuration space is dead too is a device off the bus.
    fn fail(&self, fault: Fault) -> Error {
        let fault = match fault {
            Fault::Bar0Dead { .. } => match self.back.config32(0) {
                Ok(u32::MAX) => Fault::OffBus { what: "configuration space and BAR0 read all ones".into() },
                Err(gone @ Fault::OffBus { .. }) => gone,
                _ => fault,
            },
            fault => fault,
        };
        Error::new(self.bdf, fault)
    }

    /// `Some` when configuration space answers, with the ids that the scan saw.
    fn config_alive(&self) -> Result<Option<()>, Fault> {
        let ids = self.back.config32(0)?;
        // Vendor 0xffff: nothing answers. Vendor 1: "not ready yet", which no device has as its id.
        if matches!(ids & 0xffff, 0xffff | 0x0001) {
            return Ok(None);
        }
        if ids != self.ids {
            return Err(Fault::DeviceChanged { expected: self.ids, found: ids });
        }
        let gone = self.back.config32(LIVENESS)? & 0xffff == 0xffff || self.back.config32(CAPABILITIES)? & 0xff == 0xff;
        Ok((!gone).then_some(()))
    }

    /// The security-fault word of configuration space, if it can be found.
    fn fault_word(&self) -> Option<u32> {
        let word = self.chip().fault_word?;
        capability_word(&*self.back, word.capability, word.offset).ok().flatten()
    }

    /// Waits until the BAR firewall is open. Where its word cannot be found, BAR0 itself tells.
    fn firewall(&self) -> Result<(), Fault> {
        let Some((word, closed)) = self.chip().firewall else { return Ok(()) };
        let mut last = 0;
        let open = FIREWALL.poll(&*self.clock, || {
            last = capability_word(&*self.back, word.capability, word.offset)?.unwrap_or(0);
            Ok((last & closed == 0).then_some(()))
        })?;
        open.ok_or(Fault::FirewallClosed { word: last, waited_ms: millis(FIREWALL.timeout) })
    }

    /// Waits until configuration space answers.
    fn await_config(&self) -> Result<(), Fault> {
        let budget = self.chip().boot_wait;
        if budget.poll(&*self.clock, || self.config_alive())?.is_none() {
            let what = format!("configuration space does not answer for {} ms", millis(budget.timeout));
            return Err(Fault::OffBus { what });
        }
        Ok(())
    }

    fn boot(&mut self) -> Result<(), Fault> {
        self.bar0 = None;
        let (chip, clock) = (self.chip(), Arc::clone(&self.clock));
        let budget = chip.boot_wait;
        self.await_config()?;
        let fault_word = self.fault_word();
        if let Some(word) = fault_word.filter(|word| *word != 0) {
            // Which bits mean a lockdown is not public for every chip; BOOT_0 decides.
            tracing::warn!(device = %self.bdf, "the security-fault word reads {word:08x}");
        }
        self.firewall()?;
        let bar0 = self.back.bar0()?;
        let start = clock.now();
        let left = || Wait { timeout: budget.timeout.saturating_sub(clock.now().saturating_sub(start)), ..budget };

        let mut boot0 = 0;
        let sane = left().poll(&*clock, || {
            boot0 = bar0.read32(BOOT_0)?;
            if BOOT_0_SECURITY_FAULT.contains(&boot0) {
                return Err(Fault::SecFault { boot0, fault_word });
            }
            Ok((boot0 != 0 && boot0 != u32::MAX && !is_pri_error(boot0)).then_some(()))
        })?;
        if sane.is_none() {
            return Err(match boot0 {
                u32::MAX => Fault::Bar0Dead { register: BOOT_0 },
                0 => Fault::Recovery { register: BOOT_0, value: 0 },
                value => Fault::PriError { register: BOOT_0, value },
            });
        }

        let mut last = 0;
        let booted = left().poll(&*clock, || {
            last = bar0.read32(chip.boot)?;
            Ok((last == BOOTED).then_some(()))
        })?;
        if booted.is_none() {
            return Err(boot_timeout(chip, &*bar0, last));
        }

        let register = chip.recovery.register;
        match read_patiently(&*bar0, &*clock, RECOVERY, register) {
            Ok(value) if (chip.recovery.is_on)(value) => return Err(Fault::Recovery { register, value }),
            Ok(_) => {}
            // Which registers the BAR0 decoupler of a GPU with CC on hides is not known (section 13, question 8). A device
            // that says it has booted is not held back by a flag that it does not show.
            Err(fault) => tracing::warn!(device = %self.bdf, %fault, "cannot read the recovery flag"),
        }
        // The status must be readable as well before anybody calls the device booted.
        read_patiently(&*bar0, &*clock, left(), chip.status)?;
        tracing::debug!(device = %self.bdf, boot0 = format_args!("{boot0:08x}"), "booted");
        self.boot0 = boot0;
        self.bar0 = Some(bar0);
        Ok(())
    }

    /// The registers of a booted device.
    fn booted(&mut self) -> Result<&dyn Bar0, Fault> {
        if self.bar0.is_none() {
            self.boot()?;
        }
        self.bar0.as_deref().ok_or(Fault::NoBar0)
    }

    fn status(&mut self) -> Result<u32, Fault> {
        let register = self.chip().status;
        read_sane(self.booted()?, register)
    }

    fn read_effective(&mut self) -> Result<Effective, Fault> {
        Ok((self.chip().decode)(self.status()?))
    }

    /// Sends a request about a knob; returns the value if it was a read.
    fn ask(&mut self, request: Request) -> Result<Option<u16>, Fault> {
        self.booted()?;
        let bar0 = self.bar0.as_deref().ok_or(Fault::NoBar0)?;
        let dwords = self.fsp.exchange(bar0, &*self.clock, &request.dwords())?;
        let reply = request.reply(&dwords);
        tracing::trace!(device = %self.bdf, ?request, ?reply, "firmware");
        if let Err(Fault::FspProtocol { .. }) = reply {
            self.fsp.distrust();
            // Half a reply may be that of a device that is gone since; then that is what is wrong.
            self.status()?;
        }
        reply
    }

    fn read_knob(&mut self, knob: Knob) -> Result<u16, Fault> {
        let value = self.ask(Request::Read(knob))?;
        value.ok_or(Fault::FspProtocol { reason: "a knob read brought no value", dwords: Vec::new() })
    }

    /// The knob and its value; none when the firmware does not know it.
    fn knob_state(&mut self, knob: Knob) -> Result<KnobState, Fault> {
        match self.read_knob(knob) {
            Ok(value) => Ok(KnobState { knob, value: Some(value) }),
            Err(Fault::KnobUnsupported { .. }) => Ok(KnobState { knob, value: None }),
            Err(fault) => Err(fault),
        }
    }

    /// Whether every step that would change something may be taken from the host: a knob that already has its value needs no
    /// permission, and a permission that the firmware does not know forbids nothing.
    fn permitted(&mut self, steps: &[Step]) -> Result<(), Fault> {
        for Step { knob, value } in steps.iter().copied() {
            let (Some(wanted), Some(permission)) = (value, knob.permission()) else { continue };
            let is_denied = self.knob_state(permission)?.value == Some(0);
            if is_denied && self.knob_state(knob)?.value.is_some_and(|value| value != wanted) {
                return Err(Fault::InBandDenied { knob, permission });
            }
        }
        Ok(())
    }

    fn write_knob(&mut self, write: KnobWrite) -> Result<(), Fault> {
        let KnobWrite { knob, to, .. } = write;
        self.ask(Request::Write(knob, to))?;
        match self.read_knob(knob)? {
            read if read == to => {
                tracing::info!(device = %self.bdf, "knob {write}");
                Ok(())
            }
            read => Err(Fault::KnobMismatch { knob, wrote: to, read }),
        }
    }

    fn stage_knobs(
        &mut self,
        mode: Mode,
        on_write: &mut dyn FnMut(&KnobWrite) -> ControlFlow<()>,
    ) -> Result<Staged, Fault> {
        let status = self.status()?;
        self.support.allows(mode, status)?;
        let chip = self.chip();
        let effective = (chip.decode)(status);
        let mut knobs: Vec<KnobState> = Vec::new();
        let mut written = Vec::new();
        let mut stop = false;
        let steps = knob::steps(chip, mode);
        for (index, step) in steps.iter().enumerate() {
            let knob = step.knob;
            // What the firmware has once said that it does not know is not asked for again.
            if knobs.iter().any(|state| state.knob == knob && state.value.is_none()) {
                continue;
            }
            let mut now = self.knob_state(knob)?;
            match (now.value, step.value) {
                // A knob that is missing counts as 0, but not against what the device has booted with.
                (None, wanted)
                    if !knob::may_be_absent(chip, mode, knob, wanted)
                        || (knob == Knob::PPCIE && effective.has_ppcie()) =>
                {
                    return Err(Fault::KnobUnsupported { knob });
                }
                (Some(from), Some(to)) if from != to => {
                    if written.is_empty() {
                        // Before the first write, for all that may follow: a change that cannot be ended is not begun.
                        self.permitted(&steps[index..])?;
                    }
                    if written.is_empty() || knob::forbidden(&knobs).is_none() {
                        self.safe_point()?;
                    }
                    let write = KnobWrite { knob, from, to };
                    self.write_knob(write)?;
                    stop |= on_write(&write).is_break();
                    written.push(write);
                    now.value = Some(to);
                }
                _ => {}
            }
            knobs.retain(|state| state.knob != knob);
            knobs.push(now);
            if stop && knob::forbidden(&knobs).is_none() {
                return Err(Fault::Stopped { undone: self.write_back(&written)? });
            }
        }
        let reset_needed = !written.is_empty() || effective != mode;
        Ok(Staged { effective, knobs, written, reset_needed })
    }

    fn write_back(&mut self, written: &[KnobWrite]) -> Result<usize, Fault> {
        for KnobWrite { knob, from, to } in written.iter().rev().copied() {
            self.write_knob(KnobWrite { knob, from: to, to: from })?;
        }
        Ok(written.len())
    }

    fn look(&mut self) -> Result<Observed, Fault> {
        let effective = self.read_effective()?;
        let chip = self.chip();
        let knobs = chip.knobs.iter().map(|knob| self.knob_state(*knob)).collect::<Result<Vec<KnobState>, Fault>>()?;
        Ok(Observed { effective, configured: knob::configured(chip, &knobs), knobs, boot0: self.boot0 })
    }

    fn reset_with(&mut self, reset: impl FnOnce(&mut dyn BackEnd) -> Result<(), Fault>) -> Result<(), Fault> {
        self.safe_point()?;
        self.bar0 = None;
        self.fsp = Fsp::new(self.chip().mailbox);
        if self.config_alive()?.is_none() {
            return Err(Fault::OffBus { what: "configuration space does not answer; not reset".into() });
        }
        reset(&mut *self.back)
    }

    fn do_release(&mut self) -> Result<(), Fault> {
        self.bar0 = None;
        if !self.back.release()? {
            return Ok(());
        }
        self.await_config()?;
        match self.fault_word() {
            Some(word) if word != 0 => tracing::warn!(device = %self.bdf, "the security-fault word reads {word:08x}"),
            _ => {}
        }
        Ok(())
    }

    /// An error if somebody waits for the device. Asked before each reset, and before each write of a knob unless the knobs
    /// as they are must not be activated.
    fn safe_point(&self) -> Result<(), Fault> {
        if self.back.release_requested() { Err(Fault::ReleaseRequested) } else { Ok(()) }
    }

    fn do_verify(&mut self, mode: Mode) -> Result<Observed, Fault> {
        let mode = self.support.target(mode)?;
        let observed = self.look()?;
        let Observed { effective, knobs, .. } = &observed;
        if *effective == Effective::InvalidDevtoolsOnly {
            return Err(Fault::InvalidDevtoolsOnly { want: mode });
        }
        if *effective != mode || !knob::matches(self.chip(), mode, knobs) {
            return Err(Fault::VerifyFailed { want: mode, effective: *effective, knobs: knobs.clone() });
        }
        // What was read last may have been all ones, and a knob of any value where the mode does not name it.
        self.config_alive()?
            .ok_or_else(|| Fault::OffBus { what: "configuration space does not answer any more".into() })?;
        Ok(observed)
    }
}

/// Reads a register of a device that has just booted: bus errors are tried again until `left` is over.
fn read_patiently(bar0: &dyn Bar0, clock: &dyn Clock, left: Wait, register: u32) -> Result<u32, Fault> {
    let mut last = None;
    let value = left.poll(clock, || match read_sane(bar0, register) {
        Err(fault @ Fault::PriError { .. }) => {
            last = Some(fault);
            Ok(None)
        }
        other => other.map(Some),
    })?;
    match (value, last) {
        (Some(value), _) => Ok(value),
        (None, Some(fault)) => Err(fault),
        (None, None) => read_sane(bar0, register),
    }
}

/// What a boot that did not end in time looks like. Reads that fail here hide nothing.
fn boot_timeout(chip: &Chip, bar0: &dyn Bar0, last: u32) -> Fault {
    let register = chip.recovery.register;
    if let Ok(value) = read_sane(bar0, register)
        && (chip.recovery.is_on)(value)
    {
        return Fault::Recovery { register, value };
    }
    if last == u32::MAX {
        return Fault::Bar0Dead { register: chip.boot };
    }
    let fsp_status = [0, 4, 8, 12].map(|offset| bar0.read32(FSP_STATUS + offset).ok());
    // The budget rather than a measurement, so that the same failure has the same text each time.
    let waited_ms = millis(chip.boot_wait.timeout);
    Fault::BootTimeout { register: chip.boot, last, wanted: BOOTED, waited_ms, fsp_status }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::{FakeGpu, Quirk};

    fn stage(device: &mut Device, mode: Mode) -> Result<Staged, Error> {
        device.stage(mode, &mut |_| ControlFlow::Continue(()))
    }

    /// Stages, resets and verifies.
    fn change(gpu: &FakeGpu, mode: Mode) -> Result<Staged, Error> {
        let mut device = gpu.device();
        let staged = stage(&mut device, mode)?;
        device.reset()?;
        device.wait_boot()?;
        device.verify(mode)?;
        Ok(staged)
    }

    #[test]
    fn requests_are_those_of_examples_5_to_8_with_each_write_read_back() {
        // In brackets the permissions of what may follow, before the first write.
        let on = "45->0 2->0 4->0 34->0 45->0 10->0 [9->1 7->1 5->1] 10:=2 10->2 8->0 8:=1 8->1 6->0";
        let devtools = "45->0 2->0 4->0 34->0 45->0 10->0 8->0 [7->1 5->1] 8:=1 8->1 6->0 6:=1 6->1";
        let off = "45->0 10->2 [9->1 5->1 7->1] 10:=0 10->0 6->0 8->1 8:=0 8->0";
        let off_from_devtools = "45->0 10->0 6->1 [5->1 7->1] 6:=0 6->0 8->1 8:=0 8->0";
        let ppcie = "8->0 2->0 4->0 34->0 6->0 8->0 10->0 [9->1 44->1] 10:=2 10->2 45->0 45:=1 45->1";
        for (from, to, expected) in [
            (Mode::Off, Mode::On, on),
            (Mode::Off, Mode::Devtools, devtools),
            (Mode::On, Mode::Off, off),
            (Mode::Devtools, Mode::Off, off_from_devtools),
            (Mode::Off, Mode::Ppcie, ppcie),
        ] {
            let gpu = FakeGpu::in_mode(from);
            let mut device = gpu.device();
            assert_eq!(device.effective().unwrap(), from);
            let staged = stage(&mut device, to).unwrap();
            assert_eq!(gpu.requests(), expected.replace(['[', ']'], ""), "{from} -> {to}");
            assert!(staged.reset_needed);
            assert_eq!(device.effective().unwrap(), from, "knobs take effect at the reset");
            device.reset().unwrap();
            device.wait_boot().unwrap();
            assert_eq!(device.verify(to).unwrap().configured, Some(to));
            assert_eq!((gpu.effective_bits(), gpu.resets()), (expected_bits(to), 1));
        }
    }

    /// 0x1182cc & 0x23 as examples 5 to 7 have it.
    fn expected_bits(mode: Mode) -> u32 {
        match mode {
            Mode::Off => 0,
            Mode::On => 1,
            Mode::Devtools => 3,
            Mode::Ppcie => 0x20,
        }
    }

    #[test]
    fn every_vector_and_state_converges_in_one_change() {
        let knobs = [Knob::CCM, Knob::CCD, Knob::PPCIE, Knob::K2, Knob::K4, Knob::K34];
        for bits in 0..1_u16 << (knobs.len() + 1) {
            for effective in [0, 1, 2, 3, 0x20, 0x21] {
                for target in Mode::ALL {
                    let gpu = FakeGpu::new();
                    for (index, knob) in knobs.into_iter().enumerate() {
                        gpu.set_knob(knob, bits >> index & 1);
                    }
                    gpu.set_knob(Knob::BAR0_DECOUPLER, (bits >> knobs.len() & 1) * 2);
                    gpu.set_effective(effective);
                    let staged = change(&gpu, target).unwrap();
                    for write in &staged.written {
                        assert_ne!(write.from, write.to);
                    }
                    let mut device = gpu.device();
                    let again = stage(&mut device, target).unwrap();
                    assert_eq!((again.written, again.reset_needed), (vec![], false), "twice changes nothing");
                }
            }
        }
    }

    #[test]
    fn off_clears_ppcie_first_and_old_firmware_has_none() {
        let gpu = FakeGpu::in_mode(Mode::Ppcie);
        let staged = change(&gpu, Mode::Off).unwrap();
        assert_eq!(staged.written[0].to_string(), "PPCIE (45) 1 -> 0");
        assert!(
            gpu.requests().starts_with("45->1 44->1 9->1 5->1 7->1 45:=0 45->0 10->2 10:=0 10->0 6->0 8->0"),
            "{}",
            gpu.requests()
        );

        for (target, expected) in [
            (Mode::On, "45!1e3 2->0 4->0 34->0 10->0 9->1 7->1 5->1 10:=2 10->2 8->0 8:=1 8->1 6->0"),
            (Mode::Off, "45!1e3 10->0 6->0 8->0"),
        ] {
            let gpu = FakeGpu::new();
            gpu.quirk(Quirk::UnknownKnob(Knob::PPCIE));
            let mut device = gpu.device();
            stage(&mut device, target).unwrap();
            assert_eq!(gpu.requests(), expected);
            device.reset().unwrap();
            device.verify(target).unwrap();
        }
    }

    #[test]
    fn a_change_that_the_host_may_not_make_is_not_begun() {
        for (quirk, code, told) in [
            (Quirk::Forbid(Knob::CCM), "InBandDenied", 0),
            (Quirk::Forbid(Knob::BAR0_DECOUPLER), "InBandDenied", 0),
            (Quirk::DenyWrite(Knob::CCM), "FspError", 1),
            (Quirk::IgnoreWrite(Knob::CCM), "KnobMismatch", 1),
            (Quirk::UnknownKnob(Knob::CCM), "KnobUnsupported", 1),
            (Quirk::UnknownKnob(Knob::K34), "KnobUnsupported", 0),
        ] {
            let gpu = FakeGpu::new();
            gpu.quirk(quirk.clone());
            let mut writes = 0;
            let on_write = &mut |_: &KnobWrite| {
                writes += 1;
                ControlFlow::Continue(())
            };
            let error = gpu.device().stage(Mode::On, on_write).unwrap_err();
            assert_eq!((error.code(), writes), (code, told), "{quirk:?}");
            assert!(error.to_string().starts_with("0000:41:00.0: "), "{error}");
            assert_eq!(gpu.knob(Knob::BAR0_DECOUPLER), 2 * told, "{quirk:?}");
        }
        // What need not be changed needs no permission, and neither does a knob whose permission is not known.
        for quirk in [Quirk::Forbid(Knob::CCD), Quirk::Forbid(Knob::PPCIE), Quirk::UnknownKnob(Knob(7))] {
            let gpu = FakeGpu::new();
            gpu.quirk(quirk);
            change(&gpu, Mode::On).unwrap();
        }
    }

    #[test]
    fn stopping_puts_back_what_was_written() {
        for (from, to, writes) in
            [(Mode::Off, Mode::On, 2), (Mode::On, Mode::Devtools, 2), (Mode::Ppcie, Mode::Devtools, 4)]
        {
            for stop_at in 1..=writes {
                let gpu = FakeGpu::in_mode(from);
                let mut left = stop_at;
                let on_write = &mut |_: &KnobWrite| {
                    left -= 1;
                    if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                let error = gpu.device().stage(to, on_write).unwrap_err();
                assert_eq!(*error.fault, Fault::Stopped { undone: stop_at }, "{from} -> {to}");
                assert_eq!(gpu.requests_after_reset_are_vector_of(from), Ok(()), "{from} -> {to} at {stop_at}");
            }
        }
        // Out of a forbidden vector it first goes on to one that is allowed.
        let gpu = FakeGpu::new();
        gpu.set_knob(Knob::CCD, 1);
        let error = gpu.device().stage(Mode::Off, &mut |_| ControlFlow::Break(())).unwrap_err();
        assert_eq!(*error.fault, Fault::Stopped { undone: 1 });
        let mut device = gpu.device();
        let staged = stage(&mut device, Mode::Off).unwrap();
        assert_eq!(device.unstage(&staged.written), Ok(1));
        assert_eq!(gpu.knob(Knob::CCD), 1);
    }

    #[test]
    fn boots_are_waited_for_and_failures_named() {
        let ms = Duration::from_millis;
        let table: [(&[Quirk], Option<&str>); 18] = [
            (&[Quirk::BootTime(ms(400))], None),
            (&[Quirk::BootTime(ms(4_990))], None),
            (&[Quirk::BusErrorsFor(ms(3_000))], None),
            (&[Quirk::NotReadyFor(ms(4_000)), Quirk::BootTime(ms(4_500))], None),
            (&[Quirk::BootTime(ms(5_100))], Some("BootTimeout")),
            (&[Quirk::BusErrorsFor(ms(9_000))], Some("PriError")),
            (&[Quirk::NotReadyFor(ms(9_000))], Some("OffBus")),
            (&[Quirk::Stuck { register: 0x0, value: u32::MAX }], Some("Bar0Dead")),
            (&[Quirk::Stuck { register: 0x0, value: u32::MAX }, Quirk::ConfigDead], Some("OffBus")),
            (&[Quirk::Stuck { register: 0x0, value: 0xbadf_0200 }], Some("SecFault")),
            (&[Quirk::Stuck { register: 0x0, value: 0xbad0_0200 }], Some("SecFault")),
            (&[Quirk::Stuck { register: 0x0, value: 0 }], Some("Recovery")),
            (&[Quirk::Stuck { register: 0x2_0120, value: 1 << 30 }], Some("Recovery")),
            (&[Quirk::Stuck { register: 0x2_0120, value: 0xbadf_3000 }], None),
            (&[Quirk::Stuck { register: 0x2_0120, value: 1 << 30 }, Quirk::BootTime(ms(9_000))], Some("Recovery")),
            (&[Quirk::Stuck { register: 0x2_00bc, value: u32::MAX }], Some("Bar0Dead")),
            (&[Quirk::Stuck { register: 0x11_82cc, value: 0xbadf_0000 }], Some("PriError")),
            (&[Quirk::Stuck { register: 0x11_82cc, value: u32::MAX }], Some("Bar0Dead")),
        ];
        for (quirks, code) in table {
            let gpu = FakeGpu::new();
            for quirk in quirks {
                gpu.quirk(quirk.clone());
            }
            gpu.power_up();
            let found = gpu.device().wait_boot().map_err(|error| error.code());
            assert_eq!(found, code.map_or(Ok(()), Err), "{quirks:?}");
            assert!(gpu.clock.now() <= Duration::from_millis(10_040), "{quirks:?}: {:?}", gpu.clock.now());
        }
    }

    #[test]
    fn a_boot_timeout_tells_the_registers() {
        let gpu = FakeGpu::new();
        gpu.quirk(Quirk::BootTime(Duration::from_mins(1)));
        gpu.power_up();
        let error = gpu.device().wait_boot().unwrap_err();
        let Fault::BootTimeout { register, last, wanted, fsp_status, waited_ms } = *error.fault else {
            panic!("{error}")
        };
        assert_eq!((register, last, wanted), (0x2_00bc, 0, 0xff));
        assert_eq!(fsp_status, [Some(0xf0), Some(0xf1), Some(0xf2), Some(0xf3)]);
        assert_eq!(waited_ms, 5_000);
    }

    #[test]
    fn a_security_fault_tells_the_word_of_configuration_space() {
        let gpu = FakeGpu::new();
        gpu.quirk(Quirk::Stuck { register: 0, value: 0xbadf_0200 });
        gpu.set_config(0x2b4, 0x4000_0001);
        let error = gpu.device().wait_boot().unwrap_err();
        assert_eq!(*error.fault, Fault::SecFault { boot0: 0xbadf_0200, fault_word: Some(0x4000_0001) });
        assert_eq!(gpu.clock.now(), Duration::ZERO, "it is never waited out");
    }

    #[test]
    fn another_device_at_the_address_is_not_touched() {
        let gpu = FakeGpu::new();
        gpu.set_config(0, 0x2901_10de);
        assert_eq!(gpu.device().wait_boot().unwrap_err().code(), "DeviceChanged");
        assert_eq!(gpu.device().reset().unwrap_err().code(), "DeviceChanged");
        assert_eq!((gpu.reads(), gpu.writes().len(), gpu.resets()), (0, 0, 0));
    }

    #[test]
    fn a_dead_device_is_not_reset() {
        let gpu = FakeGpu::new();
        gpu.quirk(Quirk::ConfigDead);
        assert_eq!(gpu.device().reset().unwrap_err().code(), "OffBus");
        assert_eq!(gpu.resets(), 0);
    }

    #[test]
    fn verification_wants_effective_and_knobs() {
        let gpu = FakeGpu::in_mode(Mode::On);
        gpu.device().verify(Mode::On).unwrap();
        assert_eq!(gpu.device().verify(Mode::Off).unwrap_err().code(), "VerifyFailed");
        gpu.set_knob(Knob::PPCIE, 1);
        let error = gpu.device().verify(Mode::On).unwrap_err();
        assert!(
            error.to_string().contains("Asked for on, found on with knobs")
                && error.to_string().contains("PPCIE (45) = 1"),
            "{error}"
        );
        gpu.set_knob(Knob::PPCIE, 0);
        gpu.set_effective(2);
        assert_eq!(gpu.device().verify(Mode::On).unwrap_err().code(), "InvalidDevtoolsOnly");
        // A device whose mode does not move with the reset.
        let gpu = FakeGpu::new();
        gpu.quirk(Quirk::ModeStuck);
        assert_eq!(change(&gpu, Mode::On).unwrap_err().code(), "VerifyFailed");
    }

    #[test]
    fn ppcie_needs_firmware_that_knows_it() {
        for knob in [Knob::PPCIE, Knob::CCM, Knob::K2] {
            let gpu = FakeGpu::new();
            gpu.quirk(Quirk::UnknownKnob(knob));
            let error = stage(&mut gpu.device(), Mode::Ppcie).unwrap_err();
            assert_eq!(*error.fault, Fault::KnobUnsupported { knob });
        }
    }

    #[test]
    fn garbage_in_the_high_half_of_a_value_is_masked() {
        let gpu = FakeGpu::in_mode(Mode::On);
        gpu.quirk(Quirk::Garbage);
        gpu.device().verify(Mode::On).unwrap();
    }

    #[test]
    fn falling_off_the_bus_in_the_middle_is_named() {
        let gpu = FakeGpu::new();
        let mut device = gpu.device();
        device.wait_boot().unwrap();
        gpu.quirk(Quirk::ConfigDead);
        gpu.quirk(Quirk::AllOnes);
        assert_eq!(stage(&mut device, Mode::On).unwrap_err().code(), "OffBus");
    }

    proptest! {
        /// Whatever the device's registers hold, staging ends, and success means that the knobs are right.
        #[test]
        fn staging_never_believes_a_broken_device(
            register in prop::sample::select(vec![0, 0x2_00bc, 0x2_0120, 0x11_82cc, 0x8f_2c10, 0x8f_2c14, 0x8f_2c90, 0x8f_2c94, 0x8f_2ad4]),
            value: u32,
        ) {
            let gpu = FakeGpu::new();
            gpu.quirk(Quirk::Stuck { register, value });
            if let Ok(staged) = stage(&mut gpu.device(), Mode::On) {
                prop_assert_ne!(register, 0x8f_2ad4);
                prop_assert!(knob::matches(&crate::chip::GH100, Mode::On, &staged.knobs));
                prop_assert_eq!((gpu.knob(Knob::CCM), gpu.knob(Knob::BAR0_DECOUPLER)), (1, 2));
            }
        }
    }
}
