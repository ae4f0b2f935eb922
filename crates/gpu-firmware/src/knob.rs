//! Knobs: settings of the device's security processor that outlive resets and take effect at the next one.

use std::fmt;

use serde::Serialize;

use crate::chip::Chip;
use crate::mode::Mode;

/// A knob by its number (gpu-cc-protocol section 4.10).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(transparent)]
pub struct Knob(pub u16);

impl Knob {
    /// Unnamed; 0 whenever CC or PPCIe is on (Hopper).
    pub const K2: Self = Self(2);
    /// Unnamed; 0 whenever CC or PPCIe is on (Hopper).
    pub const K4: Self = Self(4);
    /// Developer's tools: CC debug.
    pub const CCD: Self = Self(6);
    /// Confidential-computing mode.
    pub const CCM: Self = Self(8);
    /// BAR0 decoupler: the filter before BAR0 in CC mode; 0 or 2.
    pub const BAR0_DECOUPLER: Self = Self(10);
    /// Unnamed; 0 whenever CC or PPCIe is on (Hopper).
    pub const K34: Self = Self(34);
    /// Protected PCIe.
    pub const PPCIE: Self = Self(45);

    /// The knob that says whether this one may be changed from the host: the one before it, for the pairs known.
    pub const fn permission(self) -> Option<Self> {
        match self.0 {
            2 | 4 | 6 | 8 | 10 | 34 | 36 | 45 | 47 => Some(Self(self.0 - 1)),
            _ => None,
        }
    }

    /// Its name, where it has one.
    pub const fn name(self) -> Option<&'static str> {
        match self.0 {
            5 => Some("CCD_ALLOW_INB"),
            6 => Some("CCD"),
            7 => Some("CCM_ALLOW_INB"),
            8 => Some("CCM"),
            9 => Some("BAR0_DECOUPLER_ALLOW_INB"),
            10 => Some("BAR0_DECOUPLER"),
            44 => Some("PPCIE_ALLOW_INB"),
            45 => Some("PPCIE"),
            _ => None,
        }
    }
}

impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({})", self.0),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A knob and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KnobState {
    /// The knob.
    pub knob: Knob,
    /// Its value; none when the firmware does not know the knob.
    pub value: Option<u16>,
}

impl fmt::Display for KnobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value {
            Some(value) => write!(f, "{} = {value}", self.knob),
            None => write!(f, "{} absent", self.knob),
        }
    }
}

/// A knob that was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KnobWrite {
    /// The knob.
    pub knob: Knob,
    /// Value before.
    pub from: u16,
    /// Value written, and read back.
    pub to: u16,
}

impl fmt::Display for KnobWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} -> {}", self.knob, self.from, self.to)
    }
}

/// One step of a change: the knob is read, and written where it differs from `value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The knob.
    pub knob: Knob,
    /// The value it must have; none when it is only looked at.
    pub value: Option<u16>,
}

impl Step {
    const fn look(knob: Knob) -> Self {
        Self { knob, value: None }
    }

    const fn set(knob: Knob, value: u16) -> Self {
        Self { knob, value: Some(value) }
    }
}

/// The steps that bring `chip` to `target`, in the order that no interruption can turn into a forbidden vector
/// (gpu-cc-protocol section 6.2, with the complete vectors of section 6.3): PPCIe and the unnamed knobs first, then the
/// decoupler, then CCM before CCD when confidential computing is wanted and CCD before CCM when it is not; PPCIE = 1 last.
///
/// The first step of the CC modes reads PPCIE; a firmware that does not know that knob says so there, and the steps that
/// set it to 0 are then left out.
pub fn steps(chip: &Chip, target: Mode) -> Vec<Step> {
    let unnamed = [Knob::K2, Knob::K4, Knob::K34].map(|knob| Step::set(knob, 0));
    let no_ppcie = Step::set(Knob::PPCIE, 0);
    let decoupler = |value| Step::set(Knob::BAR0_DECOUPLER, value);
    let mut steps = Vec::with_capacity(8);
    match target {
        Mode::On | Mode::Devtools => {
            steps.push(Step::look(Knob::PPCIE));
            steps.extend(unnamed);
            steps.push(no_ppcie);
            steps.push(decoupler(if target == Mode::On { chip.decoupler_on } else { 0 }));
            steps.push(Step::set(Knob::CCM, 1));
            steps.push(Step::set(Knob::CCD, u16::from(target == Mode::Devtools)));
        }
        Mode::Off => {
            steps.push(no_ppcie);
            steps.push(decoupler(0));
            steps.push(Step::set(Knob::CCD, 0));
            steps.push(Step::set(Knob::CCM, 0));
        }
        Mode::Ppcie => {
            steps.push(Step::look(Knob::CCM));
            steps.extend(unnamed);
            steps.push(Step::set(Knob::CCD, 0));
            steps.push(Step::set(Knob::CCM, 0));
            steps.push(decoupler(chip.decoupler_on));
            steps.push(Step::set(Knob::PPCIE, 1));
        }
    }
    steps
}

/// The knobs that make up `target` on `chip`, and their values. A firmware without the PPCIE knob counts as one where it
/// is 0.
pub fn vector(chip: &Chip, target: Mode) -> Vec<(Knob, u16)> {
    steps(chip, target).into_iter().filter_map(|step| Some((step.knob, step.value?))).collect()
}

/// Whether `knobs` are those of `target`: each knob of its vector was read and has its value.
pub fn matches(chip: &Chip, target: Mode, knobs: &[KnobState]) -> bool {
    vector(chip, target).into_iter().all(|(knob, wanted)| {
        knobs.iter().rfind(|state| state.knob == knob).is_some_and(|state| match state.value {
            Some(value) => value == wanted,
            None => knob == Knob::PPCIE && wanted == 0,
        })
    })
}

/// The mode that `knobs` ask for at the next reset, when they are a complete vector of one.
pub fn configured(chip: &Chip, knobs: &[KnobState]) -> Option<Mode> {
    Mode::ALL.into_iter().find(|mode| matches(chip, *mode, knobs))
}

/// Every knob that belongs to the vector of some mode, in the order they are read for a look.
pub(crate) const ALL: [Knob; 7] =
    [Knob::CCM, Knob::CCD, Knob::BAR0_DECOUPLER, Knob::PPCIE, Knob::K2, Knob::K4, Knob::K34];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chip::GH100;

    fn text(target: Mode) -> String {
        let steps = steps(&GH100, target);
        let words: Vec<String> = steps
            .iter()
            .map(|step| step.value.map_or_else(|| step.knob.0.to_string(), |value| format!("{}={value}", step.knob.0)))
            .collect();
        words.join(" ")
    }

    #[test]
    fn orders_are_those_of_section_6_2() {
        let table = [
            (Mode::On, "45 2=0 4=0 34=0 45=0 10=2 8=1 6=0"),
            (Mode::Devtools, "45 2=0 4=0 34=0 45=0 10=0 8=1 6=1"),
            (Mode::Off, "45=0 10=0 6=0 8=0"),
            (Mode::Ppcie, "8 2=0 4=0 34=0 6=0 8=0 10=2 45=1"),
        ];
        for (target, expected) in table {
            assert_eq!(text(target), expected, "{target}");
        }
    }

    #[test]
    fn a_vector_matches_its_own_mode_alone() {
        for mode in Mode::ALL {
            let mut knobs: Vec<KnobState> =
                vector(&GH100, mode).into_iter().map(|(knob, value)| KnobState { knob, value: Some(value) }).collect();
            for knob in ALL {
                if !knobs.iter().any(|state| state.knob == knob) {
                    knobs.push(KnobState { knob, value: Some(0) });
                }
            }
            assert_eq!(configured(&GH100, &knobs), Some(mode));
            let others = Mode::ALL.into_iter().filter(|other| *other != mode);
            assert!(others.into_iter().all(|other| !matches(&GH100, other, &knobs)));
            knobs.retain(|state| state.knob != Knob::CCD);
            assert!(!matches(&GH100, mode, &knobs), "an unread knob proves nothing");
        }
    }

    #[test]
    fn absent_ppcie_is_off_and_never_on() {
        let knobs = |mode| -> Vec<KnobState> {
            vector(&GH100, mode)
                .into_iter()
                .map(|(knob, value)| KnobState { knob, value: (knob != Knob::PPCIE).then_some(value) })
                .collect()
        };
        for mode in [Mode::Off, Mode::On, Mode::Devtools] {
            assert!(matches(&GH100, mode, &knobs(mode)), "{mode}");
        }
        assert!(!matches(&GH100, Mode::Ppcie, &knobs(Mode::Ppcie)));
    }

    #[test]
    fn every_knob_that_is_written_has_a_permission() {
        for mode in Mode::ALL {
            for (knob, _) in vector(&GH100, mode) {
                assert_eq!(knob.permission(), Some(Knob(knob.0 - 1)));
            }
        }
    }
}
