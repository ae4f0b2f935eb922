//! Knobs: settings of the device's security processor that outlive resets and take effect at the next one.

use std::fmt;

use serde::Serialize;

use crate::chip::{Chip, Family};
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

/// The steps that bring `chip` to `target`, in the order that no interruption can turn into a [`forbidden`] vector
/// (gpu-cc-protocol section 6.2, with the complete vectors of section 6.3): PPCIe and the unnamed knobs first, then the
/// decoupler, then CCM before CCD when confidential computing is wanted and CCD before CCM when it is not; PPCIE = 1 last.
///
/// The first step of Hopper's CC modes reads PPCIE, and that of PPCIe reads CCM: a firmware too old for the mode says so
/// there, before anything is written.
pub fn steps(chip: &Chip, target: Mode) -> Vec<Step> {
    let unnamed = [Knob::K2, Knob::K4, Knob::K34].map(|knob| Step::set(knob, 0));
    let no_ppcie = Step::set(Knob::PPCIE, 0);
    let decoupler = |value| Step::set(Knob::BAR0_DECOUPLER, value);
    let ccm = |value| Step::set(Knob::CCM, value);
    let ccd = |value| Step::set(Knob::CCD, value);
    let is_devtools = u16::from(target == Mode::Devtools);
    let mut steps = Vec::with_capacity(8);
    match (chip.family, target) {
        (Family::Blackwell, Mode::On | Mode::Devtools) => steps.extend([ccm(1), ccd(is_devtools)]),
        // Blackwell has no PPCIe mode (`Support::target`); its knobs are then those of off.
        (Family::Blackwell, Mode::Off | Mode::Ppcie) => steps.extend([ccd(0), ccm(0)]),
        (Family::Hopper, Mode::On | Mode::Devtools) => {
            steps.push(Step::look(Knob::PPCIE));
            steps.extend(unnamed);
            steps.push(no_ppcie);
            steps.push(decoupler(if target == Mode::On { chip.decoupler_on } else { 0 }));
            steps.extend([ccm(1), ccd(is_devtools)]);
        }
        // Neither has a switch a CC mode: it is off while the GPUs are in one.
        (Family::Hopper, Mode::Off) | (Family::Switch, Mode::Off | Mode::On | Mode::Devtools) => {
            steps.extend([no_ppcie, decoupler(0), ccd(0), ccm(0)]);
        }
        (Family::Hopper | Family::Switch, Mode::Ppcie) => {
            steps.push(Step::look(Knob::CCM));
            steps.extend(unnamed);
            steps.extend([ccd(0), ccm(0), decoupler(chip.decoupler_on), Step::set(Knob::PPCIE, 1)]);
        }
    }
    steps
}

/// Why a change to `target`, a mode of a device of its own, gives `knob` the value `to`, for people.
pub fn reason(target: Mode, knob: Knob, to: u16) -> &'static str {
    match (knob, to, target) {
        (Knob::CCM, 0, Mode::Ppcie) | (Knob::PPCIE, 0, Mode::On | Mode::Devtools) => {
            "confidential computing and protected PCIe exclude each other"
        }
        (Knob::CCM, 0, _) => "turns confidential computing off",
        (Knob::CCM, _, _) => "turns confidential computing on",
        (Knob::PPCIE, 0, _) => "turns protected PCIe off",
        (Knob::PPCIE, _, _) => "turns protected PCIe on, last of all",
        (Knob::CCD, 0, _) => "closes the developer's tools",
        (Knob::CCD, _, _) => "opens the developer's tools",
        (Knob::BAR0_DECOUPLER, 0, _) => "takes the filter before BAR0 away: this mode has none",
        (Knob::BAR0_DECOUPLER, _, _) => "puts the filter before BAR0 in place, as this mode has it",
        (Knob::K2 | Knob::K4 | Knob::K34, 0, _) => "has no name; is 0 with confidential computing or protected PCIe",
        _ => "belongs to this mode",
    }
}

/// The knobs that make up `target` on `chip`, and their values.
pub fn vector(chip: &Chip, target: Mode) -> Vec<(Knob, u16)> {
    steps(chip, target).into_iter().filter_map(|step| Some((step.knob, step.value?))).collect()
}

/// Whether a firmware that does not know `knob` can still have it at `wanted` (none: it is only looked at).
pub(crate) fn may_be_absent(chip: &Chip, target: Mode, knob: Knob, wanted: Option<u16>) -> bool {
    // A Hopper firmware without one of PPCIe's knobs is too old for PPCIe.
    let strict = chip.family == Family::Hopper && target == Mode::Ppcie;
    chip.optional.contains(&knob) && wanted.is_none_or(|wanted| wanted == 0) && !strict
}

/// Whether `knobs` are those of `target`: each knob of its vector was read and has its value. One that the firmware does
/// not know counts as 0 where it may be missing (PPCIE on Hopper, any on a switch).
pub fn matches(chip: &Chip, target: Mode, knobs: &[KnobState]) -> bool {
    vector(chip, target).into_iter().all(|(knob, wanted)| {
        knobs.iter().rfind(|state| state.knob == knob).is_some_and(|state| match state.value {
            Some(value) => value == wanted,
            None => may_be_absent(chip, target, knob, Some(wanted)),
        })
    })
}

/// The mode that `knobs` ask for at the next reset, when they are a complete vector of one.
pub fn configured(chip: &Chip, knobs: &[KnobState]) -> Option<Mode> {
    let modes: &[Mode] = match chip.family {
        Family::Hopper => &Mode::ALL,
        Family::Blackwell => &[Mode::Off, Mode::On, Mode::Devtools],
        Family::Switch => &[Mode::Off, Mode::Ppcie],
    };
    modes.iter().copied().find(|mode| matches(chip, *mode, knobs))
}

/// What no reset may make effective: one knob on together with another one on or off, and what that would be.
struct Forbidden {
    on: Knob,
    with: (Knob, bool),
    what: &'static str,
}

/// The forbidden vectors. Whatever is not listed is allowed between two modes: CCM without the decoupler (confidential,
/// without the filter before BAR0), and the decoupler alone, both of which section 6.2 writes on its way; what firmware makes
/// of the latter is not known, and nothing relies on it.
const FORBIDDEN: [Forbidden; 2] = [
    Forbidden {
        on: Knob::CCD,
        with: (Knob::CCM, false),
        what: "developer's tools without confidential computing (state 2)",
    },
    Forbidden { on: Knob::CCM, with: (Knob::PPCIE, true), what: "confidential computing together with protected PCIe" },
];

/// What a vector would be that no reset may make effective; none for those that are allowed between two modes. Knobs that
/// are not in `knobs` or that the firmware does not know count as 0.
pub fn forbidden(knobs: &[KnobState]) -> Option<&'static str> {
    let is_on = |knob| knobs.iter().rfind(|state| state.knob == knob).is_some_and(|state| state.value > Some(0));
    FORBIDDEN.iter().find(|row| is_on(row.on) && is_on(row.with.0) == row.with.1).map(|row| row.what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chip::{GB10X, GB20X, GH100, LS10};

    fn text(chip: &Chip, target: Mode) -> String {
        let steps = steps(chip, target);
        let words: Vec<String> = steps
            .iter()
            .map(|step| step.value.map_or_else(|| step.knob.0.to_string(), |value| format!("{}={value}", step.knob.0)))
            .collect();
        words.join(" ")
    }

    /// The modes that a device of this chip can have.
    fn modes(chip: &Chip) -> Vec<Mode> {
        Mode::ALL.into_iter().filter(|mode| configured(chip, &complete(chip, *mode)) == Some(*mode)).collect()
    }

    /// Every knob of the chip as it is in a mode.
    fn complete(chip: &Chip, mode: Mode) -> Vec<KnobState> {
        let vector = vector(chip, mode);
        let value = |knob| vector.iter().find(|(other, _)| *other == knob).map_or(0, |(_, value)| *value);
        chip.knobs.iter().map(|knob| KnobState { knob: *knob, value: Some(value(*knob)) }).collect()
    }

    const CHIPS: [&Chip; 4] = [&GH100, &GB10X, &GB20X, &LS10];

    #[test]
    fn orders_are_those_of_section_6_2() {
        let table: [(&Chip, Mode, &str); 10] = [
            (&GH100, Mode::On, "45 2=0 4=0 34=0 45=0 10=2 8=1 6=0"),
            (&GH100, Mode::Devtools, "45 2=0 4=0 34=0 45=0 10=0 8=1 6=1"),
            (&GH100, Mode::Off, "45=0 10=0 6=0 8=0"),
            (&GH100, Mode::Ppcie, "8 2=0 4=0 34=0 6=0 8=0 10=2 45=1"),
            (&GB10X, Mode::On, "8=1 6=0"),
            (&GB20X, Mode::Devtools, "8=1 6=1"),
            (&GB20X, Mode::Off, "6=0 8=0"),
            (&LS10, Mode::Ppcie, "8 2=0 4=0 34=0 6=0 8=0 10=0 45=1"),
            (&LS10, Mode::Off, "45=0 10=0 6=0 8=0"),
            (&LS10, Mode::On, "45=0 10=0 6=0 8=0"),
        ];
        for (chip, target, expected) in table {
            assert_eq!(text(chip, target), expected, "{} {target}", chip.name);
        }
    }

    #[test]
    fn a_vector_matches_its_own_mode_alone() {
        assert_eq!(CHIPS.map(|chip| modes(chip).len()), [4, 3, 3, 2]);
        for chip in CHIPS {
            for mode in modes(chip) {
                let mut knobs = complete(chip, mode);
                let others = modes(chip).into_iter().filter(|other| *other != mode);
                assert!(others.into_iter().all(|other| !matches(chip, other, &knobs)));
                knobs.retain(|state| state.knob != Knob::CCD);
                assert!(!matches(chip, mode, &knobs), "an unread knob proves nothing");
            }
        }
    }

    #[test]
    fn what_may_be_absent_counts_as_off_and_never_as_on() {
        let without = |chip, mode, knob| -> Vec<KnobState> {
            let absent = |state: KnobState| KnobState { value: state.value.filter(|_| state.knob != knob), ..state };
            complete(chip, mode).into_iter().map(absent).collect()
        };
        for mode in [Mode::Off, Mode::On, Mode::Devtools] {
            assert!(matches(&GH100, mode, &without(&GH100, mode, Knob::PPCIE)), "{mode}");
            assert!(!matches(&GH100, mode, &without(&GH100, mode, Knob::CCM)), "{mode}");
        }
        assert!(!matches(&GH100, Mode::Ppcie, &without(&GH100, Mode::Ppcie, Knob::PPCIE)));
        for knob in [Knob::CCM, Knob::CCD, Knob::BAR0_DECOUPLER, Knob::K34] {
            assert!(matches(&LS10, Mode::Ppcie, &without(&LS10, Mode::Ppcie, knob)), "{knob}");
        }
        assert!(!matches(&LS10, Mode::Ppcie, &without(&LS10, Mode::Ppcie, Knob::PPCIE)));
        assert!(!matches(&GB10X, Mode::Off, &without(&GB10X, Mode::Off, Knob::CCD)));
    }

    #[test]
    fn every_knob_that_is_written_has_a_permission() {
        for (chip, mode) in CHIPS.into_iter().flat_map(|chip| Mode::ALL.map(|mode| (chip, mode))) {
            for (knob, _) in vector(chip, mode) {
                assert_eq!(knob.permission(), Some(Knob(knob.0 - 1)));
                assert!(chip.knobs.contains(&knob), "{knob} is looked at");
            }
        }
    }

    /// Whatever the knobs are, as long as they are allowed, every knob written on the way to any mode leaves them allowed:
    /// a change may be cut short anywhere.
    #[test]
    fn no_step_leads_to_a_forbidden_vector() {
        let mut transitions = 0;
        for chip in CHIPS {
            let values = |knob: &Knob| if *knob == Knob::BAR0_DECOUPLER { vec![0, 1, 2] } else { vec![0, 1] };
            let mut starts: Vec<Vec<KnobState>> = vec![Vec::new()];
            for knob in chip.knobs {
                let with = |start: Vec<KnobState>| {
                    let state = |value| KnobState { knob: *knob, value: Some(value) };
                    values(knob).into_iter().map(move |value| [start.clone(), vec![state(value)]].concat())
                };
                starts = starts.into_iter().flat_map(with).collect();
            }
            for (start, target) in
                starts.iter().flat_map(|start| modes(chip).into_iter().map(move |mode| (start, mode)))
            {
                let mut knobs = start.clone();
                for (knob, value) in vector(chip, target) {
                    let was_forbidden = forbidden(&knobs).is_some();
                    let state = knobs.iter_mut().find(|state| state.knob == knob).unwrap();
                    state.value = Some(value);
                    assert!(was_forbidden || forbidden(&knobs).is_none(), "{} {target}: {start:?}", chip.name);
                }
                assert_eq!((configured(chip, &knobs), forbidden(&knobs)), (Some(target), None));
                transitions += 1;
            }
        }
        // Chips by their vectors and modes: 2^6 * 3 * 4, 2 * (2^2 * 3), 2^6 * 3 * 2.
        assert_eq!(transitions, 768 + 24 + 384);
    }

    #[test]
    fn every_step_has_a_reason_of_its_own() {
        for (chip, mode) in CHIPS.into_iter().flat_map(|chip| modes(chip).into_iter().map(move |mode| (chip, mode))) {
            for (knob, to) in vector(chip, mode) {
                assert_ne!(reason(mode, knob, to), "belongs to this mode", "{} {mode} {knob}", chip.name);
            }
        }
        assert_eq!(reason(Mode::On, Knob::CCM, 1), "turns confidential computing on");
        for (target, knob) in [(Mode::On, Knob::PPCIE), (Mode::Ppcie, Knob::CCM)] {
            assert!(reason(target, knob, 0).contains("exclude each other"));
        }
    }

    #[test]
    fn forbidden_vectors_are_the_two_that_no_mode_has() {
        let state = |knobs: &[(Knob, u16)]| -> Vec<KnobState> {
            knobs.iter().map(|(knob, value)| KnobState { knob: *knob, value: Some(*value) }).collect()
        };
        assert!(forbidden(&state(&[(Knob::CCD, 1)])).unwrap().contains("state 2"));
        assert!(forbidden(&state(&[(Knob::CCM, 1), (Knob::PPCIE, 1)])).unwrap().contains("protected PCIe"));
        for allowed in [&[][..], &[(Knob::BAR0_DECOUPLER, 2)], &[(Knob::CCM, 1)], &[(Knob::CCM, 1), (Knob::CCD, 1)]] {
            assert_eq!(forbidden(&state(allowed)), None, "{allowed:?}");
        }
    }
}
