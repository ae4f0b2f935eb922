//! Health beyond the look of one moment: devices that work less well than they could, and units that come and go.
//! Pure: what was seen, and the time, are given.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use hw_probe::{AerCounts, Bdf, Inventory, Link, PciFunction};
use tokio::time::Instant;

use crate::units::{Fault, Unit};

/// Something about a device that does not keep it from being used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remark {
    /// Fewer lanes than it and the port above it have.
    Width {
        /// Lanes in use.
        now: u8,
        /// Lanes that could be.
        could: u8,
    },
    /// Slower than it and the port above it can.
    Speed {
        /// Speed in tenths of GT/s.
        now: u32,
        /// Speed that could be.
        could: u32,
    },
    /// Errors of the link by which transactions were lost, since this agent looks.
    Errors {
        /// How many were fatal.
        fatal: u64,
        /// How many were not.
        nonfatal: u64,
    },
}

impl Remark {
    /// A stable code for logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Width { .. } => "link-width",
            Self::Speed { .. } => "link-speed",
            Self::Errors { .. } => "link-errors",
        }
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let speed = |tenths: u32| format!("{}.{} GT/s", tenths / 10, tenths % 10);
        match self {
            Self::Width { now, could } => write!(f, "The link has {now} of {could} lanes; reseat the device"),
            Self::Speed { now, could } => {
                write!(
                    f,
                    "The link runs at {} of {}; reseat the device if it stays so at work",
                    speed(*now),
                    speed(*could)
                )
            }
            Self::Errors { fatal, nonfatal } => write!(
                f,
                "The link had {fatal} fatal and {nonfatal} other uncorrected errors while this agent has looked; see the \
                 kernel log"
            ),
        }
    }
}

/// What is to be remarked of a link. The speed only of a device that is at work: an idle one may slow its link down.
pub fn link(inventory: &Inventory, main: &PciFunction) -> Vec<Remark> {
    let Some(link) = &main.link else { return Vec::new() };
    let above = main.upstream.first().and_then(|port| inventory.get(*port)?.link.as_ref());
    let mut remarks = Vec::new();
    let could = above.map(|port| port.max_width).filter(|width| *width > 0).unwrap_or(u8::MAX).min(link.max_width);
    if link.width > 0 && link.width < could {
        remarks.push(Remark::Width { now: link.width, could });
    }
    let is_at_work = main.power.runtime_status.as_deref() == Some("active");
    let could = [Some(&link.max_speed), above.map(|port| &port.max_speed)];
    let could = could.into_iter().flatten().filter_map(|text| tenths(text)).min();
    if let (true, Some(now), Some(could)) = (is_at_work, tenths(&link.speed), could)
        && now < could
    {
        remarks.push(Remark::Speed { now, could });
    }
    remarks
}

/// `32.0 GT/s PCIe` as 320.
fn tenths(speed: &str) -> Option<u32> {
    let (whole, tenth) = speed.split(' ').next()?.split_once('.')?;
    let tenth: u32 = tenth.parse().ok().filter(|tenth| *tenth < 10)?;
    whole.parse::<u32>().ok()?.checked_mul(10)?.checked_add(tenth)
}

/// Whether the link is down: no lane of those that there are. What has no lanes at all has no link.
pub fn is_down(link: &Link) -> bool {
    link.width == 0 && link.max_width > 0
}

/// What the kernel had counted of each device when this agent saw it first.
#[derive(Debug, Default)]
pub struct Errors(BTreeMap<Bdf, (Option<u64>, AerCounts)>);

impl Errors {
    /// What has been counted since. Counters that went back are those of another device, or of one that was put in again.
    pub fn since(&mut self, main: &PciFunction, now: AerCounts) -> Option<Remark> {
        let first = self.0.entry(main.bdf).or_insert((main.instance, now));
        if first.0 != main.instance || now.fatal < first.1.fatal || now.nonfatal < first.1.nonfatal {
            *first = (main.instance, now);
        }
        let (fatal, nonfatal) = (now.fatal - first.1.fatal, now.nonfatal - first.1.nonfatal);
        (fatal + nonfatal > 0).then_some(Remark::Errors { fatal, nonfatal })
    }

    /// Forgets what is not there any more.
    pub fn keep(&mut self, is_there: impl Fn(Bdf) -> bool) {
        self.0.retain(|bdf, _| is_there(*bdf));
    }
}

/// When a unit that comes and goes is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlapRule {
    /// As many falls within the window; 0: never.
    pub limit: usize,
    /// The window, and for how long it must be quiet afterwards.
    pub window: Duration,
}

impl Default for FlapRule {
    fn default() -> Self {
        Self { limit: 5, window: Duration::from_mins(10) }
    }
}

/// How a unit was at the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Well,
    /// By its own fault: silent, not ready, without power or link, or gone from the bus.
    Ill,
    /// For a reason that others have given.
    HeldBack,
}

#[derive(Debug)]
struct Record {
    ids: (u16, u16),
    state: State,
    falls: VecDeque<Instant>,
    cause: &'static str,
    is_held: bool,
}

/// The falls of every unit from well to ill.
#[derive(Debug, Default)]
pub struct Flaps {
    rule: FlapRule,
    units: BTreeMap<Bdf, Record>,
}

/// A unit fell ill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fall {
    /// Its GPU or switch.
    pub bdf: Bdf,
    /// Code of the fault.
    pub cause: &'static str,
}

/// Cause of a unit whose function has left the bus.
const GONE: &str = "gone";

impl Flaps {
    /// Nothing has been seen yet.
    pub fn new(rule: FlapRule) -> Self {
        Self { rule, units: BTreeMap::new() }
    }

    /// Takes the units as a look has found them, holds back those that come and go, and tells which fell since the last look.
    pub fn settle(&mut self, now: Instant, units: &mut [Unit]) -> Vec<Fall> {
        let Self { rule, units: records } = self;
        let mut falls = Vec::new();
        for unit in units.iter_mut() {
            let (state, cause) = match &unit.fault {
                None => (State::Well, ""),
                Some(fault) if is_own(fault) => (State::Ill, fault.code()),
                Some(_) => (State::HeldBack, ""),
            };
            let fresh = || Record { ids: unit.ids, state, falls: VecDeque::new(), cause: "", is_held: false };
            let record = records.entry(unit.bdf).or_insert_with(fresh);
            if record.ids != unit.ids {
                *record = fresh();
            }
            if record.step(state, cause, now) {
                falls.push(Fall { bdf: unit.bdf, cause });
            }
            record.judge(*rule, now);
            if record.is_held && unit.fault.is_none() {
                unit.fault = Some(Fault::Flapping { bdf: unit.bdf, falls: record.falls.len(), cause: record.cause });
            }
        }
        for (bdf, record) in records.iter_mut().filter(|(bdf, _)| !units.iter().any(|unit| unit.bdf == **bdf)) {
            if record.step(State::Ill, GONE, now) {
                falls.push(Fall { bdf: *bdf, cause: GONE });
            }
            record.judge(*rule, now);
        }
        records.retain(|bdf, record| !record.falls.is_empty() || units.iter().any(|unit| unit.bdf == *bdf));
        falls
    }
}

impl Record {
    /// Whether it fell.
    fn step(&mut self, state: State, cause: &'static str, now: Instant) -> bool {
        let fell = self.state == State::Well && state == State::Ill;
        self.state = state;
        if fell {
            self.cause = cause;
            self.falls.push_back(now);
        }
        fell
    }

    /// A held unit is let go when it has been quiet for a whole window.
    fn judge(&mut self, rule: FlapRule, now: Instant) {
        let last = self.falls.back().copied();
        if last.is_none_or(|last| now >= last + rule.window) {
            self.falls.clear();
            self.is_held = false;
        }
        if !self.is_held {
            while self.falls.front().is_some_and(|first| now >= *first + rule.window) {
                self.falls.pop_front();
            }
            self.is_held = rule.limit > 0 && self.falls.len() >= rule.limit;
        }
        // More than that are not told, and nothing may grow without end.
        while self.falls.len() > rule.limit.max(1) * 2 {
            self.falls.pop_front();
        }
    }
}

/// Whether a fault is the device's own, as opposed to what agents and people do with it.
fn is_own(fault: &Fault) -> bool {
    matches!(
        fault,
        Fault::Dead(_) | Fault::NotReady { .. } | Fault::Unreadable { .. } | Fault::Cold(_) | Fault::LinkDown(_)
    )
}

#[cfg(test)]
mod tests {
    use hw_probe::testing::FakeSysfs;

    use super::*;

    const GPU: &str = "0000:41:00.0";
    const PORT: &str = "0000:40:01.0";

    #[test]
    fn a_link_is_measured_by_what_both_ends_can() {
        // Device now and at most, port at most, power -> remarks
        type Case<'a> = (&'a str, u8, Option<(&'a str, u8)>, &'a str, &'a [Remark]);
        let slow = Remark::Speed { now: 25, could: 320 };
        let cases: &[Case] = &[
            ("32.0 GT/s PCIe", 16, None, "active", &[]),
            ("32.0 GT/s PCIe", 8, None, "active", &[Remark::Width { now: 8, could: 16 }]),
            ("2.5 GT/s PCIe", 16, None, "active", std::slice::from_ref(&slow)),
            ("2.5 GT/s PCIe", 16, None, "suspended", &[]),
            ("2.5 GT/s PCIe", 4, None, "active", &[Remark::Width { now: 4, could: 16 }, slow.clone()]),
            // A slot that has no more.
            ("16.0 GT/s PCIe", 8, Some(("16.0 GT/s PCIe", 8)), "active", &[]),
            (
                "8.0 GT/s PCIe",
                4,
                Some(("16.0 GT/s PCIe", 8)),
                "active",
                &[Remark::Width { now: 4, could: 8 }, Remark::Speed { now: 80, could: 160 }],
            ),
            // A port that says nothing, and a link that is down, which is told otherwise.
            ("Unknown", 16, Some(("Unknown", 0)), "active", &[]),
            ("32.0 GT/s PCIe", 0, None, "active", &[]),
        ];
        for (speed, width, port, status, remarks) in cases {
            let fake = FakeSysfs::new();
            fake.bridge(PORT);
            if let Some((speed, width)) = port {
                fake.get(PORT).link(speed, *width);
            }
            let gpu = fake.below(PORT).gpu(GPU, 0x2330).link("32.0 GT/s PCIe", 16).power("auto", status, "D0");
            let _ = gpu.attr("current_link_speed", format!("{speed}\n"));
            let _ = gpu.attr("current_link_width", format!("{width}\n"));
            let inventory = Inventory::scan(&fake.root());
            assert_eq!(
                link(&inventory, inventory.get(gpu.bdf()).unwrap()),
                *remarks,
                "{speed} {width} {port:?} {status}"
            );
        }
    }

    #[test]
    fn speeds_are_numbers_or_nothing() {
        for (text, value) in [
            ("32.0 GT/s PCIe", Some(320)),
            ("2.5 GT/s", Some(25)),
            ("Unknown", None),
            ("", None),
            ("1.55 GT/s", None),
            ("-1.0 GT/s", None),
            ("4294967295.9", None),
        ] {
            assert_eq!(tenths(text), value, "{text}");
        }
    }

    #[test]
    fn errors_count_from_the_first_look_at_a_device() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330);
        let inventory = Inventory::scan(&fake.root());
        let mut gpu = inventory.functions.first().unwrap().clone();
        let mut errors = Errors::default();
        let counts = |fatal, nonfatal| AerCounts { correctable: 9, nonfatal, fatal };
        for (now, remark) in [
            (counts(7, 7), None),
            (counts(7, 7), None),
            (counts(8, 9), Some(Remark::Errors { fatal: 1, nonfatal: 2 })),
            (counts(8, 9), Some(Remark::Errors { fatal: 1, nonfatal: 2 })),
            (counts(0, 9), None),
            (counts(1, 9), Some(Remark::Errors { fatal: 1, nonfatal: 0 })),
        ] {
            assert_eq!(errors.since(&gpu, now), remark, "{now:?}");
        }
        gpu.instance = Some(99);
        assert_eq!(errors.since(&gpu, counts(1, 12)), None, "it was put in again");
        errors.keep(|_| false);
        assert_eq!(errors.since(&gpu, counts(5, 12)), None);
    }

    /// One unit through a series of looks, each so many seconds after the last: whether it may be allocated, `held` where only
    /// its past speaks against it, and how often it has fallen in all.
    fn through(rule: FlapRule, looks: &[(u64, &str)]) -> Vec<(&'static str, usize)> {
        let bdf: Bdf = GPU.parse().unwrap();
        let mut flaps = Flaps::new(rule);
        let (mut now, mut falls, mut seen) = (Instant::now(), 0, Vec::new());
        for (seconds, what) in looks {
            now += Duration::from_secs(*seconds);
            let fault = match *what {
                "dead" => Some(Fault::Dead(bdf)),
                "unbound" => Some(Fault::NotVfio { bdf, driver: None }),
                "changing" => Some(Fault::Transition { target: "on".into(), step: "reset".into() }),
                _ => None,
            };
            let mut units = if *what == "gone" { vec![] } else { vec![Unit { fault, ..Unit::sample(GPU) }] };
            falls += flaps.settle(now, &mut units).len();
            let state = match units.first().map(|unit| &unit.fault) {
                None => "gone",
                Some(None) => "well",
                Some(Some(Fault::Flapping { .. })) => "held",
                Some(Some(_)) => "ill",
            };
            seen.push((state, falls));
        }
        seen
    }

    #[test]
    fn a_unit_that_comes_and_goes_is_held_until_it_has_been_quiet() {
        let rule = FlapRule { limit: 2, window: Duration::from_secs(100) };
        let looks = [
            (0, "well"),
            (1, "dead"),
            (1, "well"),
            (1, "dead"),
            (1, "dead"),
            (1, "well"),
            (50, "well"),
            (1, "dead"),
            (99, "well"),
            (1, "well"),
            (1, "dead"),
            (1, "well"),
        ];
        assert_eq!(
            through(rule, &looks),
            [
                ("well", 0),
                ("ill", 1),
                ("well", 1),
                ("ill", 2),
                ("ill", 2),
                ("held", 2),
                ("held", 2),
                // Falls while it is held count, and keep it held.
                ("ill", 3),
                ("held", 3),
                ("well", 3),
                ("ill", 4),
                ("well", 4),
            ]
        );
    }

    #[test]
    fn slow_falls_and_what_others_do_hold_nothing_back() {
        let rule = FlapRule { limit: 2, window: Duration::from_secs(100) };
        let slow: Vec<(u64, &str)> = (0..20).map(|n| (60, if n % 2 == 0 { "well" } else { "dead" })).collect();
        assert!(through(rule, &slow).iter().all(|(state, _)| *state != "held"));
        for others in ["unbound", "changing"] {
            let looks = [
                (1, "well"),
                (1, others),
                (1, "well"),
                (1, others),
                (1, "dead"),
                (1, "well"),
                (1, others),
                (1, "well"),
            ];
            assert_eq!(through(rule, &looks).last(), Some(&("well", 0)), "{others}");
        }
        let gone = [(1, "well"), (1, "gone"), (1, "well"), (1, "gone"), (1, "gone"), (1, "well"), (100, "well")];
        assert_eq!(
            through(rule, &gone),
            [("well", 0), ("gone", 1), ("well", 1), ("gone", 2), ("gone", 2), ("held", 2), ("well", 2)]
        );
        let never = FlapRule { limit: 0, ..rule };
        let fast: Vec<(u64, &str)> = (0..100).map(|n| (1, if n % 2 == 0 { "well" } else { "dead" })).collect();
        assert_eq!(through(never, &fast).last(), Some(&("ill", 50)));
        assert!(through(never, &fast).iter().all(|(state, _)| *state != "held"));
    }

    #[test]
    fn another_device_at_the_address_begins_anew_and_memory_ends() {
        let mut flaps = Flaps::new(FlapRule { limit: 1, window: Duration::from_secs(10) });
        let now = Instant::now();
        flaps.settle(now, &mut [Unit::sample(GPU)]);
        assert_eq!(flaps.settle(now, &mut []), [Fall { bdf: GPU.parse().unwrap(), cause: "gone" }]);
        let mut other = [Unit { ids: (0x10de, 0x2331), ..Unit::sample(GPU) }];
        assert!(flaps.settle(now, &mut other).is_empty());
        assert_eq!(other[0].fault, None);
        flaps.settle(now, &mut []);
        assert_eq!(flaps.units.len(), 1);
        flaps.settle(now + Duration::from_secs(10), &mut []);
        assert!(flaps.units.is_empty());
    }
}
