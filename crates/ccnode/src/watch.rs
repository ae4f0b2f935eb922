//! `ccnode probe --watch`: changes as they happen.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::time::Duration;

use hw_probe::{Bdf, Change, Condition, Inventory, NVIDIA, SysRoot, Watch};
use serde::Serialize;

use crate::printable;
use crate::report::Report;

/// A line of `--watch --json`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    /// Schema of the report, of which this is a change.
    schema: u32,
    /// When it was seen.
    at: String,
    #[serde(flatten)]
    what: &'a Event,
}

/// Something that changed on the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Event {
    /// In what sysfs says.
    Scan(Change),
    /// In what a device answers.
    Faults {
        /// `faults`.
        change: &'static str,
        /// The device.
        bdf: Bdf,
        /// Its faults before, by name.
        before: Vec<String>,
        /// Its faults now.
        after: Vec<String>,
    },
}

impl Event {
    fn text(&self) -> String {
        let list = |faults: &[String]| if faults.is_empty() { "none".to_owned() } else { faults.join(", ") };
        match self {
            Self::Scan(change) => change.to_string(),
            Self::Faults { bdf, before, after, .. } => format!("{bdf}: Faults: {} -> {}", list(before), list(after)),
        }
    }
}

/// Follows a node.
pub struct Follow {
    root: SysRoot,
    watch: Watch,
    faults: BTreeMap<Bdf, Vec<String>>,
}

impl Follow {
    /// Starts to listen.
    pub fn new(root: &SysRoot, poll: Duration) -> Self {
        let watch = Watch::new(root.clone(), poll);
        let faults = faults(root, watch.inventory());
        Self { root: root.clone(), watch, faults }
    }

    /// Why the kernel's events are not heard, if they are not.
    pub fn trouble(&self) -> Option<&io::Error> {
        self.watch.trouble()
    }

    /// Waits for the next event, or for the poll's interval, and tells what changed of the host, of NVIDIA's devices and of
    /// those that share an IOMMU group with them.
    pub fn events(&mut self) -> Vec<Event> {
        let before = concerned(self.watch.inventory());
        let changes = self.watch.next_changes();
        let mut ours = concerned(self.watch.inventory());
        ours.extend(before);
        let concerns = |change: &Change| change.bdf().is_none_or(|bdf| ours.contains(&bdf));
        let mut events: Vec<Event> = changes.into_iter().filter(concerns).map(Event::Scan).collect();
        let now = faults(&self.root, self.watch.inventory());
        for (bdf, after) in &now {
            // The faults that a device came with are told; those that it went with are not.
            let before = self.faults.get(bdf).cloned().unwrap_or_default();
            if *after != before {
                events.push(Event::Faults { change: "faults", bdf: *bdf, before, after: after.clone() });
            }
        }
        self.faults = now;
        events
    }

    /// One turn: waits, and prints a line for each event.
    pub fn turn(&mut self, out: &mut impl Write, json: bool) -> anyhow::Result<()> {
        let events = self.events();
        let at = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        for event in &events {
            if json {
                let line = Line { schema: Report::SCHEMA, at: at.clone(), what: event };
                writeln!(out, "{}", serde_json::to_string(&line)?)?;
            } else {
                writeln!(out, "{at} {}", printable(&event.text()))?;
            }
        }
        out.flush()?;
        Ok(())
    }
}

fn faults(root: &SysRoot, inventory: &Inventory) -> BTreeMap<Bdf, Vec<String>> {
    let nvidia = inventory.functions.iter().filter(|function| function.vendor == NVIDIA);
    let names = |condition: Condition| condition.faults.iter().map(|fault| fault.code().to_owned()).collect();
    nvidia.map(|function| (function.bdf, names(Condition::read(root, function)))).collect()
}

fn concerned(inventory: &Inventory) -> BTreeSet<Bdf> {
    let nvidia = || inventory.functions.iter().filter(|function| function.vendor == NVIDIA);
    let groups: BTreeSet<u32> = nvidia().filter_map(|function| function.iommu_group).collect();
    let members = groups.into_iter().flat_map(|group| inventory.group_members(group));
    let strange = inventory.unclassified.iter().filter(|found| found.may_be_nvidia()).map(|found| found.bdf);
    members.chain(nvidia()).map(|function| function.bdf).chain(strange).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;
    use serde_json::Value;

    #[test]
    fn changes_of_ours_are_told_and_those_of_others_are_not() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu("0000:41:00.0", 0x2330).group(3);
        let neighbour = fake.function("0000:42:00.0", 0x8086, 0x1533, 0x02_0000).group(3);
        let foreign = fake.function("0000:43:00.0", 0x8086, 0x1533, 0x02_0000).group(4);
        let mut follow = Follow::new(&fake.root(), Duration::from_millis(5));
        let mut turn = |json| {
            let mut out = Vec::new();
            follow.turn(&mut out, json).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(turn(false), "");
        gpu.driver("nvidia");
        neighbour.driver("igb");
        foreign.driver("igb");
        let text = turn(false);
        let lines: Vec<&str> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(lines, ["0000:41:00.0: Driver: none -> nvidia", "0000:42:00.0: Driver: none -> igb"]);
        gpu.config(&[0xff; 4096]);
        let line: Value = serde_json::from_str(&turn(true)).unwrap();
        assert_eq!((&line["schema"], &line["change"]), (&1.into(), &"faults".into()));
        assert_eq!((&line["bdf"], &line["after"][0]), (&"0000:41:00.0".into(), &"off-bus".into()));
        fake.remove("0000:41:00.0");
        let line: Value = serde_json::from_str(&turn(true)).unwrap();
        assert_eq!((&line["change"], &line["kind"]), (&"vanished".into(), &"gpu".into()));
        assert_eq!(turn(true), "");
    }
}
