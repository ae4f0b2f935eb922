//! When a device was in use and is no longer: the moment to look whether its user has left it as it was. No I/O.
//!
//! The kernel tells nobody that a virtual machine has let go of a device. But a device that nobody has open is suspended
//! after a moment, and one that is suspended is not in use (virtual-gpu-rig section 6, fact 1). A device without runtime power
//! management never shows it, and one that was in use for less than the time between two looks is missed.

use std::collections::BTreeMap;

use hw_probe::Bdf;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Awake, and it may be our own doing.
    Unclear,
    /// Suspended.
    Idle,
    /// Awake, and not by us.
    InUse,
}

/// What has been seen of each device.
#[derive(Debug, Default)]
pub(crate) struct Releases(BTreeMap<Bdf, State>);

impl Releases {
    /// Takes in which devices are suspended now; those that are not named are forgotten. Returns the devices that were in use
    /// and are no longer.
    pub(crate) fn see(&mut self, suspended: &BTreeMap<Bdf, bool>) -> Vec<Bdf> {
        self.0.retain(|bdf, _| suspended.contains_key(bdf));
        let mut released = Vec::new();
        for (bdf, suspended) in suspended {
            // Awake when we see it for the first time: somebody may have had it before we started.
            let state = self.0.entry(*bdf).or_insert(State::Idle);
            *state = match (*state, suspended) {
                (State::InUse, true) => {
                    released.push(*bdf);
                    State::Idle
                }
                (_, true) => State::Idle,
                (State::Unclear, false) => State::Unclear,
                (State::Idle | State::InUse, false) => State::InUse,
            };
        }
        released
    }

    /// The device was found in use.
    pub(crate) fn in_use(&mut self, bdf: Bdf) {
        self.0.insert(bdf, State::InUse);
    }

    /// We have woken the device ourselves.
    pub(crate) fn touched(&mut self, bdf: Bdf) {
        self.0.insert(bdf, State::Unclear);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_told_once_and_our_own_touch_is_none() {
        let bdf: Bdf = "0000:41:00.0".parse().unwrap();
        let mut releases = Releases::default();
        let see = |releases: &mut Releases, text: &str| -> String {
            let mut see = |suspended| !releases.see(&[(bdf, suspended)].into()).is_empty();
            text.chars().map(|state| state == 's').map(&mut see).map(|told| if told { '!' } else { '.' }).collect()
        };
        // s: suspended, a: awake. Awake from the start may be anybody.
        assert_eq!(see(&mut releases, "aassaaassas"), "..!....!..!");
        releases.touched(bdf);
        assert_eq!(see(&mut releases, "aaassas"), "......!");
        releases.touched(bdf);
        releases.in_use(bdf);
        assert_eq!(see(&mut releases, "as"), ".!", "found in use after all");
    }
}
