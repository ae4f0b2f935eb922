//! When a device was in use and is no longer: the moment to look whether its user has left it as it was. No I/O.
//!
//! The kernel tells nobody that a virtual machine has let go of a device. But a device that nobody has open is suspended
//! after a moment, and one that is suspended is not in use (virtual-gpu-rig section 6, fact 1), unless somebody holds its group
//! and has not opened it. How long it has been awake in all is counted by the kernel, so that a use between two looks is seen,
//! too. A device without runtime power management never shows any of this.

use std::collections::{BTreeMap, BTreeSet};

use hw_probe::{Bdf, RuntimePower};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Awake, and it may be our own doing.
    Unclear,
    /// Suspended, having been awake for so long.
    Idle(Option<u64>),
    /// Awake, and not by us.
    InUse,
    /// Suspended, and in use all the same: whoever has its group has not opened it. It was awake for so long before.
    HeldAsleep(Option<u64>),
}

/// What has been seen of each device.
#[derive(Debug, Default)]
pub(crate) struct Releases {
    states: BTreeMap<Bdf, State>,
    /// Devices of which nothing is to be seen soon.
    kept_awake: BTreeSet<Bdf>,
}

impl Releases {
    /// Takes in the power of every device; those that are not named are forgotten. Returns the devices that were in use and
    /// are no longer.
    pub(crate) fn see(&mut self, powers: &BTreeMap<Bdf, RuntimePower>) -> Vec<Bdf> {
        self.states.retain(|bdf, _| powers.contains_key(bdf));
        self.kept_awake = powers.iter().filter(|(_, power)| power.kept_awake).map(|(bdf, _)| *bdf).collect();
        let mut released = Vec::new();
        for (bdf, RuntimePower { suspended, awake_ms, .. }) in powers {
            // Awake when we see it for the first time: somebody may have had it before we started.
            let state = self.states.entry(*bdf).or_insert(State::Idle(*awake_ms));
            *state = match (*state, suspended) {
                (State::InUse, true) => {
                    released.push(*bdf);
                    State::Idle(*awake_ms)
                }
                (State::Idle(before) | State::HeldAsleep(before), true)
                    if before.zip(*awake_ms).is_some_and(|(before, now)| now > before) =>
                {
                    released.push(*bdf);
                    State::Idle(*awake_ms)
                }
                (State::HeldAsleep(before), true) => State::HeldAsleep(before.or(*awake_ms)),
                (State::Idle(_) | State::Unclear, true) => State::Idle(*awake_ms),
                (State::Unclear, false) => State::Unclear,
                (State::Idle(_) | State::InUse | State::HeldAsleep(_), false) => State::InUse,
            };
        }
        released
    }

    /// Whether any device may be let go soon, so that it is worth looking often.
    pub(crate) fn any_awake(&self) -> bool {
        let is_awake =
            |(bdf, state): (&Bdf, &State)| !matches!(state, State::Idle(_)) && !self.kept_awake.contains(bdf);
        self.states.iter().any(is_awake)
    }

    /// The devices that are in use, as far as their power tells.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = Bdf> {
        self.states.iter().filter(|(_, state)| **state == State::InUse).map(|(bdf, _)| *bdf)
    }

    /// Whether this device is.
    pub(crate) fn is_in_use(&self, bdf: Bdf) -> bool {
        self.states.get(&bdf) == Some(&State::InUse)
    }

    /// The device was found in use, and suspended at that moment or not. If it was, and has not been seen awake before, its
    /// being suspended says nothing of its release until it is.
    pub(crate) fn found_in_use(&mut self, bdf: Bdf, suspended: bool) {
        let seen_awake = self.is_in_use(bdf);
        self.states.insert(bdf, if suspended && !seen_awake { State::HeldAsleep(None) } else { State::InUse });
    }

    /// We have woken the device ourselves.
    pub(crate) fn touched(&mut self, bdf: Bdf) {
        self.states.insert(bdf, State::Unclear);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn power(suspended: bool, awake_ms: Option<u64>) -> RuntimePower {
        RuntimePower { suspended, kept_awake: false, awake_ms }
    }

    #[test]
    fn a_release_is_told_once_and_our_own_touch_is_none() {
        let bdf: Bdf = "0000:41:00.0".parse().unwrap();
        let mut releases = Releases::default();
        // s: suspended, a: awake.
        let see = |releases: &mut Releases, text: &str| -> String {
            let mut see = |suspended| !releases.see(&[(bdf, power(suspended, None))].into()).is_empty();
            text.chars().map(|state| state == 's').map(&mut see).map(|told| if told { '!' } else { '.' }).collect()
        };
        // Awake from the start may be anybody.
        assert_eq!(see(&mut releases, "aassaaassas"), "..!....!..!");
        assert!(!releases.any_awake());
        releases.touched(bdf);
        assert_eq!(see(&mut releases, "aaassas"), "......!");
        releases.touched(bdf);
        releases.found_in_use(bdf, false);
        assert!(releases.any_awake() && releases.in_use().eq([bdf]));
        assert_eq!(see(&mut releases, "as"), ".!", "found in use after all");
        releases.found_in_use(bdf, true);
        assert_eq!(see(&mut releases, "sssas"), "....!", "held without being open, and then opened");
        assert_eq!(see(&mut releases, "a"), ".");
        releases.found_in_use(bdf, true);
        assert_eq!(see(&mut releases, "s"), "!", "let go just after it was found in use");
    }

    #[test]
    fn a_use_between_two_looks_is_told_by_the_time_awake() {
        let bdf: Bdf = "0000:41:00.0".parse().unwrap();
        let mut releases = Releases::default();
        let see =
            |releases: &mut Releases, awake_ms| !releases.see(&[(bdf, power(true, Some(awake_ms)))].into()).is_empty();
        assert_eq!([0, 0, 700, 700].map(|awake| see(&mut releases, awake)), [false, false, true, false]);
        releases.touched(bdf);
        assert_eq!([900, 900, 901].map(|awake| see(&mut releases, awake)), [false, false, true], "ours is none");
        releases.found_in_use(bdf, true);
        assert_eq!([901, 901, 999, 999].map(|awake| see(&mut releases, awake)), [false, false, true, false]);
    }

    #[test]
    fn a_device_that_is_kept_awake_is_not_looked_at_often_and_not_forgotten() {
        let bdf: Bdf = "0000:41:00.0".parse().unwrap();
        let mut releases = Releases::default();
        let mut see = |power| (!releases.see(&[(bdf, power)].into()).is_empty(), releases.any_awake());
        let kept = RuntimePower { suspended: false, kept_awake: true, awake_ms: None };
        assert_eq!([power(false, None), kept, kept].map(&mut see), [(false, true), (false, false), (false, false)]);
        assert_eq!(see(power(true, None)), (true, false), "it was in use");
    }
}
