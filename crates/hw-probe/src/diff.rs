//! What changed between two scans.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Bdf, DeviceKind, HostFacts, Inventory, PciFunction, Problem, Unclassified};

/// One difference between two scans.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum Change {
    /// A function came.
    Appeared {
        /// The function.
        bdf: Bdf,
        /// What it is.
        kind: DeviceKind,
        /// Its name.
        name: Option<String>,
    },
    /// A function went.
    Vanished {
        /// The function.
        bdf: Bdf,
        /// What it was.
        kind: DeviceKind,
        /// Its name.
        name: Option<String>,
    },
    /// There is another device at the address, or the same one was taken out and put back: ids, class or instance differ.
    Replaced {
        /// The address.
        bdf: Bdf,
        /// What was there, as `vendor:device class`.
        before: String,
        /// What is there now.
        after: String,
    },
    /// A property of a function differs.
    Property {
        /// The function.
        bdf: Bdf,
        /// Which one.
        property: Property,
        /// Its text before; none for none.
        before: Option<String>,
        /// Its text now.
        after: Option<String>,
    },
    /// It cannot be told any more what a function is, or it can be told again, or something of such a function differs.
    Unclassified {
        /// The function.
        bdf: Bdf,
        /// What was said of it; none when it was told, or was not there.
        before: Option<String>,
        /// What is said of it now; none when it can be told, or is gone.
        after: Option<String>,
    },
    /// A fact of the host differs.
    Host {
        /// Its name, as in JSON.
        fact: String,
        /// Its text before.
        before: Option<String>,
        /// Its text now.
        after: Option<String>,
    },
    /// Something cannot be read any more.
    ProblemAppeared {
        /// What.
        problem: Problem,
    },
    /// A problem is no more.
    ProblemGone {
        /// Which.
        problem: Problem,
    },
}

/// Properties of a function that can change while it stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Property {
    /// Bound driver.
    Driver,
    /// `driver_override`.
    DriverOverride,
    /// IOMMU group.
    IommuGroup,
    /// VFIO character device.
    VfioCdev,
    /// NUMA node.
    NumaNode,
    /// Assigned BARs.
    Bars,
    /// Ways to reset it.
    ResetMethods,
    /// Power state, with runtime status and control.
    Power,
    /// Link speed and width.
    Link,
    /// The bridges above it.
    Upstream,
    /// The functions that depend on it.
    Consumers,
    /// Anything else: names, identity of virtual functions, modalias.
    Identity,
}

impl Property {
    fn text(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::DriverOverride => "driver override",
            Self::IommuGroup => "IOMMU group",
            Self::VfioCdev => "VFIO device",
            Self::NumaNode => "NUMA node",
            Self::Bars => "BARs",
            Self::ResetMethods => "reset methods",
            Self::Power => "power",
            Self::Link => "link",
            Self::Upstream => "bridges above",
            Self::Consumers => "consumers",
            Self::Identity => "identity",
        }
    }
}

impl Change {
    /// The function concerned, if it is one.
    pub fn bdf(&self) -> Option<Bdf> {
        match self {
            Self::Appeared { bdf, .. }
            | Self::Vanished { bdf, .. }
            | Self::Replaced { bdf, .. }
            | Self::Property { bdf, .. }
            | Self::Unclassified { bdf, .. } => Some(*bdf),
            Self::ProblemAppeared { problem } | Self::ProblemGone { problem } => problem.bdf,
            Self::Host { .. } => None,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".into());
        match self {
            Self::Appeared { bdf, name, .. } => write!(f, "{bdf}: Appeared: {}", name.as_deref().unwrap_or("unnamed")),
            Self::Vanished { bdf, name, .. } => write!(f, "{bdf}: Vanished: {}", name.as_deref().unwrap_or("unnamed")),
            Self::Replaced { bdf, before, after } => write!(f, "{bdf}: Another device: {before} -> {after}"),
            Self::Property { bdf, property, before, after } => {
                let (mut text, before, after) = (property.text().to_owned(), or_none(before), or_none(after));
                if let Some(first) = text.get_mut(..1) {
                    first.make_ascii_uppercase();
                }
                write!(f, "{bdf}: {text}: {before} -> {after}")
            }
            Self::Unclassified { bdf, after: Some(after), .. } => write!(f, "{bdf}: {after}"),
            Self::Unclassified { bdf, after: None, .. } => {
                write!(f, "{bdf}: Not any more a function of which it cannot be told what it is")
            }
            Self::Host { fact, before, after } => {
                write!(f, "Host: {fact}: {} -> {}", or_none(before), or_none(after))
            }
            Self::ProblemAppeared { problem } => write!(f, "{}: {}", problem.path, problem.message),
            Self::ProblemGone { problem } => write!(f, "{}: Readable again", problem.path),
        }
    }
}

impl Inventory {
    /// What changed from `old` to `new`: the host first, then the functions by address, then problems. Of two scans it is empty
    /// exactly when they are equal.
    pub fn diff(old: &Self, new: &Self) -> Vec<Change> {
        let mut changes = host(&old.host, &new.host);
        let mut bdfs: Vec<Bdf> = old.functions.iter().chain(&new.functions).map(|function| function.bdf).collect();
        bdfs.sort_unstable();
        bdfs.dedup();
        for bdf in bdfs {
            match (old.get(bdf), new.get(bdf)) {
                (None, Some(came)) => {
                    changes.push(Change::Appeared { bdf, kind: came.kind, name: came.name.clone() });
                }
                // That it is there, but no longer known for what it is, is told below.
                (Some(_), None) if new.unclassified.iter().any(|found| found.bdf == bdf) => {}
                (Some(went), None) => {
                    changes.push(Change::Vanished { bdf, kind: went.kind, name: went.name.clone() });
                }
                (Some(before), Some(after)) if before != after => function(before, after, &mut changes),
                _ => {}
            }
        }
        unclassified(&old.unclassified, &new.unclassified, &mut changes);
        let only = |these: &[Problem], those: &[Problem]| {
            these.iter().filter(|problem| !those.contains(problem)).cloned().collect::<Vec<_>>()
        };
        let (came, went) = (only(&new.problems, &old.problems), only(&old.problems, &new.problems));
        changes.extend(came.into_iter().map(|problem| Change::ProblemAppeared { problem }));
        changes.extend(went.into_iter().map(|problem| Change::ProblemGone { problem }));
        changes
    }
}

fn host(old: &HostFacts, new: &HostFacts) -> Vec<Change> {
    // Named one by one, so that a new fact is not forgotten here.
    let HostFacts { boot_id, kernel_release, tee, lockdown, iommu, dev_iommu, dev_vfio } = old;
    let facts = [
        ("boot_id", boot_id.clone(), new.boot_id.clone()),
        ("kernel_release", kernel_release.clone(), new.kernel_release.clone()),
        ("tee", Some(word(tee)), Some(word(&new.tee))),
        ("lockdown", Some(word(lockdown)), Some(word(&new.lockdown))),
        ("iommu", Some(word(iommu)), Some(word(&new.iommu))),
        ("dev_iommu", Some(dev_iommu.to_string()), Some(new.dev_iommu.to_string())),
        ("dev_vfio", Some(dev_vfio.to_string()), Some(new.dev_vfio.to_string())),
    ];
    let changed = facts.into_iter().filter(|(_, before, after)| before != after);
    changed.map(|(fact, before, after)| Change::Host { fact: fact.into(), before, after }).collect()
}

fn unclassified(old: &[Unclassified], new: &[Unclassified], changes: &mut Vec<Change>) {
    let mut bdfs: Vec<Bdf> = old.iter().chain(new).map(|found| found.bdf).collect();
    bdfs.sort_unstable();
    bdfs.dedup();
    for bdf in bdfs {
        let of = |list: &[Unclassified]| list.iter().find(|found| found.bdf == bdf).cloned();
        let (before, after) = (of(old), of(new));
        if before != after {
            let text = |found: Option<Unclassified>| {
                let Unclassified { iommu_group, .. } = found.as_ref()?;
                let group = iommu_group.map_or_else(String::new, |group| format!("; IOMMU group {group}"));
                Some(format!("{}{group}", found.as_ref()?))
            };
            changes.push(Change::Unclassified { bdf, before: text(before), after: text(after) });
        }
    }
}

/// A unit variant in lower case, as people see it.
fn word(value: &impl fmt::Debug) -> String {
    format!("{value:?}").to_lowercase()
}

fn function(old: &PciFunction, new: &PciFunction, changes: &mut Vec<Change>) {
    let bdf = old.bdf;
    let ids = |function: &PciFunction| {
        (
            function.vendor,
            function.device,
            function.subsystem_vendor,
            function.subsystem_device,
            function.class,
            function.revision,
            // The same board, taken out and put back, has another.
            function.instance,
        )
    };
    if ids(old) != ids(new) {
        let text = |function: &PciFunction| {
            let sub = function.subsystem_device.map_or_else(String::new, |id| format!(" subsystem {id:04x}"));
            let PciFunction { vendor, device, class, revision, .. } = function;
            let instance = function.instance.map_or_else(String::new, |instance| format!(" instance {instance}"));
            format!("{vendor:04x}:{device:04x} class {class:06x} revision {revision:02x}{sub}{instance}")
        };
        changes.push(Change::Replaced { bdf, before: text(old), after: text(new) });
    }
    let before = changes.len();
    let replaced = ids(old) != ids(new);
    let (one, other) = (texts(old), texts(new));
    for ((property, before), (_, after)) in one.into_iter().zip(other) {
        if before != after {
            changes.push(Change::Property { bdf, property, before, after });
        }
    }
    let told = replaced || changes.len() > before;
    if !told {
        // Equal in all that is told, and yet not equal.
        let text = |function: &PciFunction| Some(format!("{function:?}"));
        changes.push(Change::Property { bdf, property: Property::Identity, before: text(old), after: text(new) });
    }
}

fn texts(function: &PciFunction) -> [(Property, Option<String>); 12] {
    let number = |number: Option<u32>| number.map(|number| number.to_string());
    let list = |bdfs: &[Bdf]| {
        let words: Vec<String> = bdfs.iter().map(ToString::to_string).collect();
        (!words.is_empty()).then(|| words.join(" "))
    };
    let bars: Vec<String> = function
        .bars
        .iter()
        .map(|bar| format!("{}@{:#x}+{:#x}{}", bar.number, bar.start, bar.size, if bar.io { " io" } else { "" }))
        .collect();
    let power = [&function.power.state, &function.power.runtime_status, &function.power.control];
    let power: Vec<&str> = power.into_iter().flatten().map(String::as_str).collect();
    let cdev = function.vfio_cdev.as_ref().map(|cdev| format!("{} {}:{}", cdev.name, cdev.major, cdev.minor));
    let link = function
        .link
        .as_ref()
        .map(|link| format!("{} x{} of {} x{}", link.speed, link.width, link.max_speed, link.max_width));
    let identity = format!(
        "{}{}{}",
        function.name.as_deref().unwrap_or("unnamed"),
        if function.is_virtual_function { ", a virtual function" } else { "" },
        function.modalias.as_deref().map_or_else(String::new, |alias| format!(", {alias}"))
    );
    let some = |words: &[String], between: &str| (!words.is_empty()).then(|| words.join(between));
    [
        (Property::Driver, function.driver.clone()),
        (Property::DriverOverride, function.driver_override.clone()),
        (Property::IommuGroup, number(function.iommu_group)),
        (Property::VfioCdev, cdev),
        (Property::NumaNode, number(function.numa_node)),
        (Property::Bars, some(&bars, ", ")),
        (Property::ResetMethods, some(&function.reset_methods, " ")),
        (Property::Power, (!power.is_empty()).then(|| power.join(" "))),
        (Property::Link, link),
        (Property::Upstream, list(&function.upstream)),
        (Property::Consumers, list(&function.consumers)),
        (Property::Identity, Some(identity)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeFunction, FakeSysfs};
    use crate::{Lockdown, Tee};

    const GPU: &str = "0000:41:00.0";

    fn told(before: impl Fn(&FakeSysfs), act: impl Fn(&FakeSysfs)) -> Vec<String> {
        let fake = FakeSysfs::new();
        before(&fake);
        let old = Inventory::scan(&fake.root());
        assert_eq!(Inventory::diff(&old, &old), []);
        act(&fake);
        let new = Inventory::scan(&fake.root());
        let changes = Inventory::diff(&old, &new);
        let json = serde_json::to_string(&changes).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Change>>(&json).unwrap(), changes);
        changes.iter().map(|change| without_instances(&change.to_string())).collect()
    }

    /// Every tree has its own numbers.
    fn without_instances(text: &str) -> String {
        let mut words = text.split(' ');
        let mut kept = Vec::new();
        while let Some(word) = words.next() {
            if word == "instance" {
                words.next();
            } else {
                kept.push(word);
            }
        }
        kept.join(" ")
    }

    #[test]
    fn a_device_that_was_put_back_is_another() {
        let put_back = |fake: &FakeSysfs| {
            fake.remove(GPU);
            _ = fake.gpu(GPU, 0x2330);
        };
        let told = told(|fake| _ = fake.gpu(GPU, 0x2330), put_back);
        assert!(matches!(told.as_slice(), [one] if one.starts_with("0000:41:00.0: Another device: ")), "{told:?}");
    }

    #[test]
    fn each_change_of_a_function_is_told_once() {
        type Case = (for<'a> fn(FakeFunction<'a>) -> FakeFunction<'a>, &'static [&'static str]);
        let cases: [Case; 10] = [
            (|gpu| gpu, &[]),
            (|gpu| gpu.driver("nvidia"), &["0000:41:00.0: Driver: none -> nvidia"]),
            (
                |gpu| gpu.driver("vfio-pci").cdev(3),
                &["0000:41:00.0: Driver: none -> vfio-pci", "0000:41:00.0: VFIO device: none -> vfio3 511:3"],
            ),
            (|gpu| gpu.driver_override("vfio-pci"), &["0000:41:00.0: Driver override: none -> vfio-pci"]),
            (|gpu| gpu.numa(1), &["0000:41:00.0: NUMA node: none -> 1"]),
            (
                |gpu| gpu.power("auto", "suspended", "D3hot"),
                &["0000:41:00.0: Power: D0 active on -> D3hot suspended auto"],
            ),
            (|gpu| gpu.reset_methods(""), &["0000:41:00.0: Reset methods: flr bus -> none"]),
            (
                |gpu| gpu.attr("current_link_width", "8\n"),
                &[
                    "0000:41:00.0: Link: 32.0 GT/s PCIe x16 of 32.0 GT/s PCIe x16 -> 32.0 GT/s PCIe x8 of 32.0 GT/s PCIe x16",
                ],
            ),
            (
                |gpu| gpu.revision(0xa2),
                &[
                    "0000:41:00.0: Another device: 10de:2330 class 030200 revision a1 subsystem 16c1 -> 10de:2330 class 030200 revision a2 subsystem 16c1",
                ],
            ),
            (
                |gpu| gpu.attr("numa_node", "?"),
                &["sys/bus/pci/devices/0000:41:00.0/numa_node: Is not a NUMA node: \"?\""],
            ),
        ];
        for (act, expected) in cases {
            assert_eq!(told(|fake| _ = fake.gpu(GPU, 0x2330), |fake| _ = act(fake.get(GPU)),), expected);
        }
    }

    #[test]
    fn comings_and_goings_and_the_host_are_told() {
        let gpu = |fake: &FakeSysfs| _ = fake.gpu(GPU, 0x2330);
        assert_eq!(told(|_| {}, gpu), ["0000:41:00.0: Appeared: H100"]);
        assert_eq!(told(gpu, |fake| fake.remove(GPU)), ["0000:41:00.0: Vanished: H100"]);
        let host = |fake: &FakeSysfs| {
            fake.tee(Tee::Tdx).lockdown(Lockdown::Integrity).without_iommufd();
            fake.get(GPU).group(7);
        };
        assert_eq!(
            told(gpu, host),
            [
                "Host: tee: none -> tdx",
                "Host: lockdown: none -> integrity",
                "Host: iommu: off -> on",
                "Host: dev_iommu: true -> false",
                "0000:41:00.0: IOMMU group: none -> 7",
            ]
        );
        let strange = |fake: &FakeSysfs| _ = fake.get(GPU).attr("class", "?");
        let first = "0000:41:00.0: It cannot be told what this is: class cannot be read; vendor 0x10de; device 0x2330";
        let second = "sys/bus/pci/devices/0000:41:00.0/class: Is not a 24-bit class code: \"?\"";
        assert_eq!(told(gpu, strange), [first, second]);
        let both = |fake: &FakeSysfs| {
            gpu(fake);
            strange(fake);
        };
        assert_eq!(told(both, |fake| _ = fake.get(GPU).driver("x")), [format!("{first}; bound to x")]);
        assert_eq!(told(both, |fake| _ = fake.get(GPU).group(3)).len(), 2, "the host has groups now, and it is in one");
        assert_eq!(told(both, |fake| _ = fake.get(GPU).class(0x03_0200)).len(), 3, "appeared, known, readable");
        let broken = |fake: &FakeSysfs| _ = fake.gpu(GPU, 0x2330).attr("numa_node", "?");
        let cured = |fake: &FakeSysfs| _ = fake.get(GPU).numa(0);
        assert_eq!(
            told(broken, cured),
            ["0000:41:00.0: NUMA node: none -> 0", "sys/bus/pci/devices/0000:41:00.0/numa_node: Readable again",]
        );
    }
}
