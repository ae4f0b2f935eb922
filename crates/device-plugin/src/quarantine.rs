//! Units that no pod has and that are in use all the same: a virtual machine that outlives its pod, a program of somebody
//! else's. The next pod's virtual machine would be refused the device. Pure: facts and time are given.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hw_probe::{Bdf, Holders, Inventory, PciFunction};
use tokio::time::Instant;

use crate::checkpoint::Given;
use crate::pods::Pods;
use crate::units::{Fault, Unit};

/// How long a unit must have been in use without a pod before it is held back: what looks for a moment (another agent, a
/// tool), a virtual machine that is just ending, and a pod that the kubelet does not tell of yet are no reason.
pub const SETTLED: Duration = Duration::from_secs(10);

/// What can be seen of a unit's use.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Use {
    No,
    By(String),
    Unseen,
}

#[derive(Debug)]
struct Record {
    since: Instant,
    by: String,
}

/// Units that are in use without a pod, and since when.
#[derive(Debug)]
pub struct Quarantine {
    settled: Duration,
    units: BTreeMap<Bdf, Record>,
    /// Those of them that are held back, and who has them.
    held: BTreeMap<Bdf, String>,
    /// Devices that were seen suspended on VFIO: of these, and of no others, being awake means being used.
    sleepers: BTreeSet<(Bdf, Option<u64>)>,
    /// Units of which it cannot be seen whether they are in use.
    unseen: BTreeSet<Bdf>,
    /// Units that a pod has under another name than their present one.
    otherwise: BTreeMap<Bdf, Given>,
}

impl Quarantine {
    /// Holds units back that have been in use without a pod for `settled` ([`SETTLED`]).
    pub fn new(settled: Duration) -> Self {
        Self {
            settled,
            units: BTreeMap::new(),
            held: BTreeMap::new(),
            sleepers: BTreeSet::new(),
            unseen: BTreeSet::new(),
            otherwise: BTreeMap::new(),
        }
    }

    /// Takes over what an agent before this one, of this boot, has held back: its devices count as seen asleep, so that being
    /// awake is being used, until they sleep or nobody is seen to hold them.
    pub fn inherit(&mut self, held: &BTreeSet<Bdf>, inventory: &Inventory, now: Instant) {
        for bdf in held {
            let Some(function) = inventory.get(*bdf) else { continue };
            self.sleepers.insert((*bdf, function.instance));
            let by = "a process that was seen before this agent started".to_owned();
            // Nobody waits for what was waited for already.
            let since = now.checked_sub(self.settled).unwrap_or(now);
            self.units.insert(*bdf, Record { since, by: by.clone() });
            self.held.insert(*bdf, by);
        }
    }

    /// Notes who sleeps.
    pub fn watch(&mut self, inventory: &Inventory) {
        self.sleepers.retain(|(bdf, instance)| {
            inventory.get(*bdf).is_some_and(|function| function.instance == *instance && function.is_vfio_bound())
        });
        let sleeping = inventory.functions.iter().filter(|function| function.is_vfio_bound() && is_suspended(function));
        self.sleepers.extend(sleeping.map(|function| (function.bdf, function.instance)));
    }

    /// Whether it matters who holds VFIO's nodes: some unit has no pod. A device that sleeps may be held by its group file all
    /// the same, which wakes nothing.
    pub fn asks(units: &[Unit], pods: &Pods, inventory: &Inventory) -> bool {
        pods.are_known() && units.iter().any(|unit| pods.of(unit, units, inventory).is_none())
    }

    /// Takes new facts: who has the devices by the kubelet, and who holds them by `/proc` where that was looked at. Whether
    /// anything is to be told anew.
    pub fn step(&mut self, now: Instant, units: &[Unit], facts: &Facts<'_>) -> bool {
        self.unseen.clear();
        for unit in units {
            let has_pod = facts.pods.of(unit, units, facts.inventory).is_some();
            match self.use_of(unit, facts) {
                Use::By(by) if facts.pods.are_known() && !has_pod => {
                    self.units.entry(unit.bdf).or_insert_with(|| Record { since: now, by: String::new() }).by = by;
                }
                Use::Unseen => {
                    self.units.remove(&unit.bdf);
                    if !has_pod {
                        self.unseen.insert(unit.bdf);
                    }
                }
                _ => {
                    self.units.remove(&unit.bdf);
                }
            }
        }
        self.units.retain(|bdf, _| units.iter().any(|unit| unit.bdf == *bdf));
        let settled = self.units.iter().filter(|(_, record)| now >= record.since + self.settled);
        let held = settled.map(|(bdf, record)| (*bdf, record.by.clone())).collect();
        let otherwise = units.iter().filter_map(|unit| {
            let given = facts.pods.otherwise(unit, units, facts.inventory)?;
            Some((unit.bdf, given.clone()))
        });
        let otherwise = otherwise.collect();
        let before = (std::mem::replace(&mut self.held, held), std::mem::replace(&mut self.otherwise, otherwise));
        (&before.0, &before.1) != (&self.held, &self.otherwise)
    }

    /// Holds back the units in quarantine that nothing else speaks against.
    pub fn settle(&self, units: &mut [Unit]) {
        for unit in units.iter_mut().filter(|unit| unit.fault.is_none()) {
            let held = self.held.get(&unit.bdf).map(|by| Fault::Held { bdf: unit.bdf, by: by.clone() });
            let otherwise = || {
                let Given { resource, id, pod } = self.otherwise.get(&unit.bdf)?.clone();
                Some(Fault::GivenOtherwise { bdf: unit.bdf, resource, id, pod })
            };
            unit.fault = held.or_else(otherwise);
        }
    }

    /// How many units are held back.
    pub fn count(&self) -> usize {
        self.held.len()
    }

    /// Units without a pod of which it cannot be seen whether they are in use.
    pub fn unseen(&self) -> &BTreeSet<Bdf> {
        &self.unseen
    }

    fn use_of(&self, unit: &Unit, facts: &Facts<'_>) -> Use {
        let mut members = functions(unit, facts.inventory).peekable();
        if members.peek().is_none() {
            return Use::No;
        }
        let nodes: BTreeSet<String> = members.flat_map(nodes).collect();
        let holders =
            facts.holders.map(|holders| (holders, holders.list.iter().find(|holder| nodes.contains(&holder.node))));
        if let Some((_, Some(holder))) = holders {
            let pid = holder.pid.map_or_else(String::new, |pid| format!("pid {pid} "));
            let pod = holder.pod_uid.as_ref().map_or_else(String::new, |uid| format!(" of pod {uid}"));
            return Use::By(format!("{pid}({}){pod}", holder.comm));
        }
        if functions(unit, facts.inventory).all(is_suspended) {
            return Use::No;
        }
        if holders.is_some_and(|(holders, _)| holders.limit.is_none()) {
            return Use::No;
        }
        let tells = |function: &PciFunction| {
            let is_free_to_sleep = function.power.control.as_deref() == Some("auto");
            is_free_to_sleep && self.sleepers.contains(&(function.bdf, function.instance))
        };
        let is_awake = |function: &PciFunction| function.power.runtime_status.as_deref() == Some("active");
        if functions(unit, facts.inventory).any(|function| tells(function) && is_awake(function)) {
            return Use::By(
                "a process that is not seen (the device is awake, and VFIO lets an unused one sleep)".into(),
            );
        }
        Use::Unseen
    }
}

/// What is known at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The functions.
    pub inventory: &'a Inventory,
    /// The kubelet's word.
    pub pods: &'a Pods,
    /// What `/proc` shows; none where it was not looked at.
    pub holders: Option<&'a Holders>,
}

/// The functions of a unit that VFIO has.
fn functions<'a>(unit: &'a Unit, inventory: &'a Inventory) -> impl Iterator<Item = &'a PciFunction> {
    unit.functions.iter().filter_map(|bdf| inventory.get(*bdf)).filter(|function| function.is_vfio_bound())
}

/// The nodes by which a function can be held, whichever of them it is offered by.
fn nodes(function: &PciFunction) -> impl Iterator<Item = String> {
    let group = function.iommu_group.map(|group| format!("/dev/vfio/{group}"));
    let cdev = function.vfio_cdev.as_ref().map(|cdev| format!("/dev/vfio/devices/{}", cdev.name));
    group.into_iter().chain(cdev)
}

fn is_suspended(function: &PciFunction) -> bool {
    function.power.runtime_status.as_deref() == Some("suspended")
}

#[cfg(test)]
mod tests {
    use hw_probe::Holder;
    use hw_probe::testing::FakeSysfs;

    use super::*;

    const GPU: &str = "0000:41:00.0";

    fn node() -> FakeSysfs {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci").cdev(17);
        fake
    }

    fn holder(node: &str) -> Holder {
        Holder { node: node.into(), pid: Some(7), comm: "qemu".into(), cgroup: None, pod_uid: Some("uid".into()) }
    }

    /// What is seen at one look: after how many seconds, power (control, status), the pod, who holds which node (none: `/proc`
    /// was not looked at), and whether all processes are seen.
    type Look = (u64, [&'static str; 2], Option<&'static str>, Option<&'static [&'static str]>, bool);

    /// The fault of the unit after each look, `-` for none, and `?` where its use cannot be seen.
    fn through(looks: &[Look]) -> Vec<String> {
        let fake = node();
        let mut quarantine = Quarantine::new(SETTLED);
        let mut now = Instant::now();
        let mut seen = Vec::new();
        for (seconds, [control, status], pod, held, sees_all) in looks {
            now += Duration::from_secs(*seconds);
            let _ = fake.get(GPU).power(control, status, "D0");
            let inventory = Inventory::scan(&fake.root());
            let given = |pod: &str| Given { resource: "nvidia.com/pgpu".into(), id: GPU.into(), pod: pod.into() };
            let pods = match *pod {
                Some("?") => Pods::Unknown("not mounted".into()),
                pod => Pods::Told(pod.map(given).into_iter().collect()),
            };
            let holders = held.map(|held| Holders {
                list: held.iter().map(|node| holder(node)).collect(),
                limit: (!sees_all).then(|| "Only some".into()),
            });
            let units = [Unit::sample(GPU)];
            quarantine.watch(&inventory);
            let facts = Facts { inventory: &inventory, pods: &pods, holders: holders.as_ref() };
            quarantine.step(now, &units, &facts);
            let mut units = units;
            quarantine.settle(&mut units);
            let fault = units[0].fault.as_ref().map_or_else(|| "-".into(), ToString::to_string);
            seen.push(if quarantine.unseen().is_empty() { fault } else { "?".into() });
        }
        seen
    }

    const AWAKE: [&str; 2] = ["auto", "active"];
    const ASLEEP: [&str; 2] = ["auto", "suspended"];
    const KEPT: [&str; 2] = ["on", "active"];

    #[test]
    fn a_unit_whose_pod_is_gone_is_held_back_while_a_process_has_it() {
        let cdev = Some(&["/dev/vfio/devices/vfio17"][..]);
        let seen = through(&[
            (0, AWAKE, Some("ns/a"), cdev, true),
            (60, AWAKE, Some("ns/a"), cdev, true),
            (5, AWAKE, None, cdev, true),
            (5, AWAKE, None, cdev, true),
            (5, AWAKE, None, cdev, true),
            (5, AWAKE, None, Some(&[]), true),
            (5, AWAKE, None, Some(&["/dev/vfio/5"]), true),
            (10, AWAKE, None, Some(&["/dev/vfio/5"]), true),
            (5, AWAKE, Some("ns/b"), Some(&["/dev/vfio/5"]), true),
            (5, ASLEEP, None, Some(&["/dev/vfio/5"]), true),
            (10, ASLEEP, None, Some(&["/dev/vfio/5"]), true),
        ]);
        let held = "0000:41:00.0 is held by pid 7 (qemu) of pod uid, though the kubelet has given it to no pod";
        let is_held: Vec<bool> = seen.iter().map(|text| text.starts_with(held)).collect();
        assert_eq!(is_held, [false, false, false, false, true, false, false, true, false, false, true], "{seen:?}");
        assert!(seen.iter().zip(is_held).all(|(text, is_held)| is_held || text == "-"), "{seen:?}");
    }

    #[test]
    fn what_was_held_back_stays_so_over_a_restart_until_it_is_let_go() {
        let fake = node();
        let bdf = GPU.parse().unwrap();
        let step = |quarantine: &mut Quarantine, status, pods: &Pods| {
            let _ = fake.get(GPU).power("auto", status, "D0");
            let inventory = Inventory::scan(&fake.root());
            let mut units = [Unit::sample(GPU)];
            quarantine.watch(&inventory);
            quarantine.step(Instant::now(), &units, &Facts { inventory: &inventory, pods, holders: None });
            quarantine.settle(&mut units);
            units[0].fault.as_ref().map(Fault::code)
        };
        let none = Pods::Told(Vec::new());
        let mut quarantine = Quarantine::new(SETTLED);
        assert_eq!(step(&mut quarantine, "active", &none), None, "nothing can be told of it");
        quarantine.inherit(&BTreeSet::from([bdf]), &Inventory::scan(&fake.root()), Instant::now());
        for (status, fault) in [("active", Some("held")), ("active", Some("held")), ("suspended", None)] {
            assert_eq!(step(&mut quarantine, status, &none), fault, "{status}");
        }
        assert_eq!(step(&mut quarantine, "active", &none), None, "it is in use for a moment only");
    }

    #[test]
    fn a_unit_that_a_pod_has_under_another_name_is_given_to_nobody_else() {
        let fake = node();
        let inventory = Inventory::scan(&fake.root());
        let mut quarantine = Quarantine::new(SETTLED);
        let given = |resource: &str, id: &str| Given { resource: resource.into(), id: id.into(), pod: "ns/a".into() };
        for (given, fault) in [
            (given("nvidia.com/pgpu", GPU), None),
            (given("nvidia.com/GH100", GPU), Some("given-otherwise")),
            (given("nvidia.com/pgpu", "17"), Some("given-otherwise")),
            (given("nvidia.com/pgpu", "18"), None),
        ] {
            let (mut units, pods) = ([Unit::sample(GPU)], Pods::Told(vec![given.clone()]));
            let facts = Facts { inventory: &inventory, pods: &pods, holders: None };
            let before = quarantine.otherwise.is_empty();
            let has_news = quarantine.step(Instant::now(), &units, &facts);
            quarantine.settle(&mut units);
            assert_eq!(units[0].fault.as_ref().map(Fault::code), fault, "{given:?}");
            assert!(has_news || before == quarantine.otherwise.is_empty(), "{given:?}");
        }
    }

    #[test]
    fn power_tells_where_processes_are_not_seen_and_only_of_what_has_been_seen_to_sleep() {
        let some: Option<&[&str]> = Some(&[]);
        // Never seen to sleep: nothing can be told.
        assert_eq!(through(&[(0, AWAKE, None, some, false), (60, AWAKE, None, some, false)]), ["?", "?"]);
        // Slept, and is awake without a pod.
        let seen = through(&[
            (0, ASLEEP, None, some, false),
            (60, AWAKE, None, some, false),
            (9, AWAKE, None, some, false),
            (1, AWAKE, None, some, false),
            (5, ASLEEP, None, None, false),
        ]);
        assert_eq!(seen[..3], ["-", "-", "-"]);
        assert!(seen[3].contains("a process that is not seen"), "{seen:?}");
        assert_eq!(seen[4], "-");
        // Kept awake by somebody else: its being awake says nothing.
        assert_eq!(through(&[(0, ASLEEP, None, some, false), (60, KEPT, None, some, false)]), ["-", "?"]);
        // All processes are seen, and none holds it: awake or not, it is free.
        assert_eq!(through(&[(0, ASLEEP, None, some, true), (60, AWAKE, None, some, true)]), ["-", "-"]);
    }

    #[test]
    fn where_pods_are_not_known_nothing_is_held_back() {
        let held = Some(&["/dev/vfio/5"][..]);
        assert_eq!(through(&[(0, AWAKE, Some("?"), held, true), (60, AWAKE, Some("?"), held, true)]), ["-", "-"]);
        // What was held stays so only while it is known.
        let seen =
            through(&[(0, AWAKE, None, held, true), (10, AWAKE, None, held, true), (5, AWAKE, Some("?"), held, true)]);
        assert!(seen[1].contains("held") && seen[2] == "-", "{seen:?}");
    }

    #[test]
    fn processes_are_looked_at_only_where_it_matters() {
        let fake = node();
        let units = [Unit::sample(GPU)];
        let given = Given { resource: "nvidia.com/pgpu".into(), id: GPU.into(), pod: "ns/a".into() };
        let asks =
            |given: &[Given]| Quarantine::asks(&units, &Pods::Told(given.to_vec()), &Inventory::scan(&fake.root()));
        assert!(asks(&[]));
        assert!(!asks(std::slice::from_ref(&given)), "a pod has it");
        assert!(!Quarantine::asks(&units, &Pods::Unknown("?".into()), &Inventory::scan(&fake.root())));
        let _ = fake.get(GPU).power("auto", "suspended", "D3hot");
        assert!(asks(&[]), "its group may be held while it sleeps");
    }
}
