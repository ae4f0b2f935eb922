//! The knob store: persistent settings of the firmware processor. It outlives every reset.

use std::collections::{BTreeMap, BTreeSet};

use crate::undecided;

pub(crate) const CCD: u16 = 6;
pub(crate) const CCM: u16 = 8;
pub(crate) const DECOUPLER: u16 = 10;
pub(crate) const PPCIE: u16 = 45;

/// Knobs whose left neighbour (id - 1) says whether they may be changed in-band (gpu-cc-protocol section 4.10).
const GUARDED: [u16; 9] = [2, 4, 6, 8, 10, 34, 36, 45, 47];

/// Why a knob access was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// The firmware has no such knob.
    Unknown,
    /// A permission knob forbids the write.
    Denied,
}

/// The knobs that exist on one device, with their values.
#[derive(Clone, Debug)]
pub(crate) struct Knobs {
    values: BTreeMap<u16, u16>,
}

impl Knobs {
    /// Permission knobs at 1, all others at 0, except as `initial` says. Initial values of absent knobs are dropped.
    pub(crate) fn new(ids: &BTreeSet<u16>, initial: &BTreeMap<u16, u16>) -> Knobs {
        let default = |id: u16| u16::from(is_permission(id));
        let value = |id: u16| initial.get(&id).copied().unwrap_or_else(|| default(id));
        Knobs { values: ids.iter().map(|&id| (id, value(id))).collect() }
    }

    pub(crate) fn read(&self, id: u16) -> Result<u16, Refusal> {
        self.values.get(&id).copied().ok_or(Refusal::Unknown)
    }

    /// Whether a write in-band would be taken.
    pub(crate) fn may_write(&self, id: u16) -> Result<(), Refusal> {
        self.read(id)?;
        let denied = if is_permission(id) {
            !undecided::PERMISSION_KNOBS_WRITABLE_IN_BAND
        } else {
            GUARDED.contains(&id) && self.values.get(&(id - 1)) == Some(&0)
        };
        if denied { Err(Refusal::Denied) } else { Ok(()) }
    }

    /// Sets a knob that exists, whatever its permission; true if its value changed.
    pub(crate) fn set(&mut self, id: u16, value: u16) -> bool {
        self.values.get_mut(&id).is_some_and(|old| std::mem::replace(old, value) != value)
    }

    pub(crate) fn values(&self) -> &BTreeMap<u16, u16> {
        &self.values
    }

    /// The value of a knob as one bit of a status word.
    pub(crate) fn bit(&self, id: u16) -> u32 {
        u32::from(self.values.get(&id).copied().unwrap_or(0) != 0)
    }
}

/// Whether this knob says whether the next one may be changed in-band.
pub(crate) fn is_permission(id: u16) -> bool {
    GUARDED.contains(&id.wrapping_add(1))
}
