//! A topology like the node of a bundle (`ccnode bundle`), as far as the lab can play it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use ccnode::report::{Ask, Device, Report};
use ccnode::source::Source;
use hw_probe::{Bdf, DeviceKind, Fault, IommuState, Lockdown, PciFunction};
use lab_devices::ModelKind;
use lab_vm::Topology;

/// NUMA nodes, and devices of a slot or port, that a topology can have; [`Topology::parse`] has the last word.
const MOST_NUMA: usize = 4;
const MOST_PORTS: usize = 24;
const MOST_SHARED: usize = 8;

/// A topology file's text, with what it cannot play in its comments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// The text.
    pub toml: String,
    /// What is different from the node, a line for each thing.
    pub differences: Vec<String>,
}

/// Whether this names a bundle rather than a topology.
pub fn is_bundle(name: &str) -> bool {
    [".tar.gz", ".tgz"].iter().any(|end| name.ends_with(end))
}

/// The topology of the node that the bundle at `path` is of.
pub fn topology_of(path: &Path) -> anyhow::Result<Replay> {
    let replay = Replay::of(&Source::open(path)?.report(&Ask::default()));
    Topology::parse("bundle", &replay.toml).context("The lab cannot play this node")?;
    Ok(replay)
}

impl Replay {
    /// The topology of a node.
    pub fn of(report: &Report) -> Self {
        let mut plan = Plan::default();
        plan.devices(report);
        plan.host(report);
        plan.render()
    }
}

#[derive(Default)]
struct Plan {
    vm: Vec<String>,
    /// Switches by upstream port: name, NUMA node, whether its devices share an IOMMU group.
    switches: BTreeMap<Bdf, Switch>,
    devices: Vec<Playable>,
    numa: BTreeMap<u32, usize>,
    differences: Vec<String>,
}

#[derive(Default)]
struct Switch {
    name: String,
    numa: Option<usize>,
    groups: Vec<Option<u32>>,
}

struct Playable {
    name: String,
    bdf: Option<Bdf>,
    model: ModelKind,
    place: String,
}

impl Plan {
    fn differ(&mut self, line: impl Into<String>) {
        self.differences.push(line.into());
    }

    fn devices(&mut self, report: &Report) {
        let whole = || report.devices.iter().filter(|device| !device.function.is_virtual_function);
        let parts = || whole().filter(|device| device.function.is_gpu() || device.function.is_nvswitch());
        for node in parts().filter_map(|device| device.function.numa_node).collect::<BTreeSet<_>>() {
            let number = self.numa.len();
            self.numa.insert(node, number);
        }
        let mut strangers = BTreeMap::new();
        for device in parts() {
            let first =
                self.devices.iter().find(|found| found.bdf.is_some_and(|bdf| same_slot(bdf, device.function.bdf)));
            let first = first.map(|found| found.name.clone());
            self.part(device, first);
            strangers.extend(device.group_strangers.iter().map(|bdf| (*bdf, device.function.bdf)));
        }
        for device in whole().filter(|device| device.function.kind == DeviceKind::NvidiaOther) {
            self.other(&device.function);
        }
        for device in report.devices.iter().filter(|device| device.function.is_virtual_function) {
            self.differ(format!("{}: A virtual function is not played", device.function.bdf));
        }
        let own: BTreeSet<Bdf> = report.devices.iter().map(|device| device.function.bdf).collect();
        for (stranger, neighbour) in strangers.into_iter().filter(|(stranger, _)| !own.contains(stranger)) {
            self.stranger(stranger, neighbour, report);
        }
    }

    fn part(&mut self, device: &Device, first: Option<String>) {
        let function = &device.function;
        let (model, exact) = model(function);
        let prefix = if function.is_nvswitch() { "nvswitch" } else { "gpu" };
        let count = self.devices.iter().filter(|found| found.name.starts_with(prefix)).count();
        let name = format!("{prefix}{count}");
        if !exact {
            self.differ(format!(
                "{name} ({}): {} ({:04x}:{:04x}, subsystem {:04x}) is played as {model}",
                function.bdf,
                device.product(),
                function.vendor,
                function.device,
                function.subsystem_device.unwrap_or(0),
            ));
        }
        if let Some(driver) = function.driver.as_deref().filter(|_| !function.is_vfio_bound()) {
            self.differ(format!("{name} ({}): Its driver {driver} is not in the lab", function.bdf));
        }
        for fault in &device.faults {
            self.fault(&name, function.bdf, fault);
        }
        let place = match first {
            Some(first) => format!("function_of = \"{first}\"\n"),
            None => self.place(function, &name),
        };
        self.devices.push(Playable { name, bdf: Some(function.bdf), model, place });
    }

    fn fault(&mut self, name: &str, bdf: Bdf, fault: &Fault) {
        let command = match fault {
            Fault::OffBus | Fault::ConfigBroken => Some("off-bus:both".to_owned()),
            Fault::SecurityFault { word, .. } => Some(format!("security-fault:{word:#x}")),
            Fault::D3cold => Some("d3cold".to_owned()),
            Fault::FirewallClosed => Some("firewall-stuck".to_owned()),
            // The model says it.
            Fault::UnknownChip { .. } => return,
            _ => None,
        };
        self.differ(match command {
            Some(command) => format!("{name} ({bdf}): Is healthy here; when it runs: cargo lab fault {name} {command}"),
            None => format!("{name} ({bdf}): Is healthy here; there it has the fault {}", fault.code()),
        });
    }

    /// Below the nearest PCIe switch (downstream port, upstream port, and more above), else on a root port of its own.
    fn place(&mut self, function: &PciFunction, name: &str) -> String {
        let numa = function.numa_node.and_then(|node| self.numa.get(&node).copied());
        if numa.is_some_and(|number| number >= MOST_NUMA) {
            self.differ(format!(
                "{name} ({}): Its NUMA node is left out, at most {MOST_NUMA} can be played",
                function.bdf
            ));
        }
        let numa = numa.filter(|number| *number < MOST_NUMA);
        let [_, upstream, _, above @ ..] = function.upstream.as_slice() else {
            return numa.map_or_else(String::new, |number| format!("numa = {number}\n"));
        };
        if !above.is_empty() {
            self.differ(format!("{name} ({}): Only the nearest of the PCIe switches above it is played", function.bdf));
        }
        let count = self.switches.len();
        let switch = self.switches.entry(*upstream).or_insert_with(|| Switch {
            name: format!("plx{count}"),
            numa,
            groups: Vec::new(),
        });
        let (switch_name, switch_numa) = (switch.name.clone(), switch.numa);
        switch.groups.push(function.iommu_group);
        if switch_numa != numa {
            self.differ(format!("{name} ({}): Its NUMA node is that of its switch here", function.bdf));
        }
        format!("switch = \"{switch_name}\"\n")
    }

    /// The audio function of a board that can be played; all else of NVIDIA's is left out.
    fn other(&mut self, function: &PciFunction) {
        let board = self.devices.iter().find(|found| found.bdf.is_some_and(|bdf| same_slot(bdf, function.bdf)));
        let board = board.filter(|found| found.model == ModelKind::RtxPro6000 && function.class >> 8 == 0x0403);
        let Some(board) = board.map(|found| found.name.clone()) else {
            self.differ(format!(
                "{}: {:04x}:{:04x}, class {:06x}, is not played",
                function.bdf, function.vendor, function.device, function.class
            ));
            return;
        };
        let name = format!("{board}-audio");
        let place = format!("function_of = \"{board}\"\n");
        self.devices.push(Playable { name, bdf: Some(function.bdf), model: ModelKind::RtxPro6000Audio, place });
    }

    /// Another vendor's function in the IOMMU group of one of ours.
    fn stranger(&mut self, bdf: Bdf, neighbour: Bdf, report: &Report) {
        let beside =
            report.devices.iter().find(|device| device.function.bdf == neighbour).map(|device| &device.function);
        let switch = beside
            .and_then(|function| self.switches.get_mut(function.upstream.get(1)?))
            .filter(|_| beside.is_some_and(|function| function.upstream.len() > 2));
        let count = self.devices.iter().filter(|found| found.model == ModelKind::Nic).count();
        let name = format!("nic{count}");
        let Some(switch) = switch else {
            self.differ(format!("{bdf}: Shares the IOMMU group of {neighbour}, and is not played"));
            return;
        };
        switch.groups.push(beside.and_then(|function| function.iommu_group));
        let place = format!("switch = \"{}\"\n", switch.name);
        self.differ(format!(
            "{name} ({bdf}): A foreign function in the IOMMU group of {neighbour} is played as a network card"
        ));
        self.devices.push(Playable { name, bdf: None, model: ModelKind::Nic, place });
    }

    fn host(&mut self, report: &Report) {
        let nodes = self.numa.len().min(MOST_NUMA);
        self.vm.push(format!("memory_mib = {}", if self.devices.len() > 4 { 1536 } else { 1024 }));
        self.vm.push(format!("cpus = {}", nodes.max(2)));
        if report.host.iommu == IommuState::Off {
            self.vm.push("iommu = false".into());
        }
        let bound: Vec<&Device> = report.parts().filter(|part| part.function.is_vfio_bound()).collect();
        let cdevs = bound.iter().any(|part| part.function.vfio_cdev.is_some());
        if !bound.is_empty() && !cdevs {
            self.vm.push("kernel = \"stock\"".into());
        } else if cdevs && !report.host.dev_vfio {
            self.vm.push("kernel = \"no-group\"".into());
        }
        match report.host_details.lockdown.mode {
            Lockdown::Integrity => self.vm.push("command_line = \"lockdown=integrity\"".into()),
            Lockdown::Confidentiality => self.vm.push("command_line = \"lockdown=confidentiality\"".into()),
            Lockdown::None | Lockdown::Unknown => {}
        }
        let kernel = report.host.kernel_release.as_deref().unwrap_or("unknown");
        self.differ(format!(
            "The kernel is the lab's, not {kernel}; there is no TEE; addresses and group numbers are others"
        ));
        self.differ("BAR2 of each GPU has 64 MiB; what runs on the node besides is not played");
        self.separate();
        self.limit();
    }

    /// Which switches keep their devices apart; and groups that span more than one place.
    fn separate(&mut self) {
        let mut differences = Vec::new();
        for switch in self.switches.values() {
            let groups: BTreeSet<_> = switch.groups.iter().flatten().collect();
            if switch.shares() && groups.len() > 1 {
                differences.push(format!(
                    "{}: All of its devices share one IOMMU group here, there only some do",
                    switch.name
                ));
            }
        }
        self.differences.append(&mut differences);
    }

    /// Leaves out what does not fit.
    fn limit(&mut self) {
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        let shared: BTreeSet<String> = self
            .switches
            .values()
            .filter(|switch| switch.shares())
            .map(|switch| format!("switch = \"{}\"\n", switch.name))
            .collect();
        // Switches sit on root ports, too.
        for switch in self.switches.values() {
            *places.entry(switch.numa.map_or_else(String::new, |number| format!("numa = {number}\n"))).or_default() +=
                1;
        }
        let mut dropped: Vec<String> = Vec::new();
        let mut lines = Vec::new();
        self.devices.retain(|device| {
            let count = places.entry(device.place.clone()).or_default();
            *count += 1;
            let function_of = device.place.starts_with("function_of");
            let most = if function_of {
                MOST_SHARED - 1
            } else if shared.contains(&device.place) {
                MOST_SHARED
            } else {
                MOST_PORTS
            };
            let orphan = dropped.iter().any(|name| device.place == format!("function_of = \"{name}\"\n"));
            let fits = *count <= most && !orphan;
            if !fits {
                lines.push(format!("{}: Left out: no more than {most} fit there", device.name));
                dropped.push(device.name.clone());
            }
            fits
        });
        self.differences.append(&mut lines);
    }

    fn render(self) -> Replay {
        let mut toml = String::from("# Made from a bundle by cargo lab topology-of. Not as on that node:\n");
        // A string takes any text.
        for line in &self.differences {
            let clean: String = line.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
            let _ = writeln!(toml, "# - {clean}");
        }
        let _ = writeln!(toml, "\n[vm]\n{}", self.vm.join("\n"));
        for switch in self.switches.values() {
            let _ = writeln!(toml, "\n[[switch]]\nname = \"{}\"", switch.name);
            if let Some(number) = switch.numa {
                let _ = writeln!(toml, "numa = {number}");
            }
            if switch.shares() {
                toml.push_str("shared_group = true\n");
            }
        }
        for device in &self.devices {
            let was = device.bdf.map_or_else(String::new, |bdf| format!("# {bdf}\n"));
            let _ = write!(
                toml,
                "\n{was}[[device]]\nname = \"{}\"\nmodel = \"{}\"\n{}",
                device.name, device.model, device.place
            );
        }
        Replay { toml, differences: self.differences }
    }
}

impl Switch {
    fn shares(&self) -> bool {
        let groups: Vec<u32> = self.groups.iter().flatten().copied().collect();
        groups.iter().collect::<BTreeSet<_>>().len() < groups.len()
    }
}

fn same_slot(one: Bdf, other: Bdf) -> bool {
    Bdf { function: 0, ..one } == Bdf { function: 0, ..other }
}

/// The model by ids, and whether it is the very one; else the nearest relative.
fn model(function: &PciFunction) -> (ModelKind, bool) {
    let same = |kind: &ModelKind| {
        kind.vendor_id() == function.vendor
            && kind.device_id() == function.device
            && (kind.is_gpu() == function.is_gpu())
    };
    if let Some(kind) = ModelKind::ALL.into_iter().find(same) {
        // The board decides by its subsystem where the models of the lab stand for boards.
        let board =
            kind.is_switch() || function.model.is_none() || function.subsystem_device == Some(kind.subsystem_id());
        let plain = kind == ModelKind::A100;
        return (kind, board || plain);
    }
    let c2c = function.model.as_ref().is_some_and(|model| model.has_c2c == Some(true));
    let near = match (function.model.as_ref().map(|model| model.chip.as_str()), c2c) {
        (Some("gh100"), false) => ModelKind::H100,
        (Some("gh100"), true) => ModelKind::Gh200,
        (Some("gb100" | "gb102"), false) => ModelKind::B200,
        (Some("gb100" | "gb102"), true) => ModelKind::Gb200,
        (Some("gb110" | "gb112"), false) => ModelKind::B300,
        (Some("gb110" | "gb112"), true) => ModelKind::Gb300,
        (Some("ls10"), _) => ModelKind::Ls10,
        (Some("lr10"), _) => ModelKind::Lr10,
        (Some(chip), _) if chip.starts_with("gb2") => ModelKind::RtxPro6000,
        (None, _) if function.is_nvswitch() => ModelKind::Ls10,
        (None, _) => ModelKind::UnknownGpu,
        (Some(_), _) => ModelKind::A100,
    };
    (near, false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;
    use lab_vm::topology::Place;

    fn replay(fake: &FakeSysfs) -> (Topology, Replay) {
        let replay = Replay::of(&Report::read(&fake.root()));
        let topology = Topology::parse("t", &replay.toml).unwrap_or_else(|error| panic!("{error}\n{}", replay.toml));
        (topology, replay)
    }

    #[test]
    fn a_baseboard_keeps_its_devices_nodes_and_switches() {
        let fake = FakeSysfs::new();
        fake.hgx_h100();
        let (topology, replay) = replay(&fake);
        let of = |model: ModelKind| topology.devices.iter().filter(|device| device.spec.model == model).count();
        assert_eq!((of(ModelKind::H100), of(ModelKind::Ls10), topology.devices.len()), (8, 4, 12));
        assert_eq!((topology.switches.len(), topology.numa_nodes()), (5, 2));
        assert!(topology.switches.iter().all(|switch| !switch.shared_group && switch.numa.is_some()));
        let below = |name: &str| {
            topology.devices.iter().filter(|device| device.place == Place::Switch { name: name.into() }).count()
        };
        assert_eq!(["plx0", "plx1", "plx2", "plx3", "plx4"].map(below), [4, 2, 2, 2, 2]);
        assert_eq!(replay.differences.len(), 2, "{:?}", replay.differences);
        assert_eq!(topology.vm.kernel, lab_vm::Kernel::Iommufd);
    }

    #[test]
    fn what_cannot_be_played_is_said() {
        let fake = FakeSysfs::new();
        fake.lockdown(Lockdown::Integrity);
        fake.bridge("0000:02:00.0");
        fake.below("0000:02:00.0").bridge("0000:03:00.0");
        for device in 0..3 {
            fake.below("0000:03:00.0").bridge(format!("0000:04:{device:02x}.0").as_str());
        }
        fake.below("0000:04:00.0").gpu("0000:05:00.0", 0x2331).group(5).driver("nvidia");
        fake.below("0000:04:01.0").gpu("0000:06:00.0", 0x2330).group(5).config(&[0xff; 4096]);
        fake.below("0000:04:02.0").function("0000:07:00.0", 0x15b3, 0x1021, 0x02_0000).group(5);
        fake.gpu("0000:11:00.0", 0x2bb5).class(0x03_0000).subsystem(0x10de, 0x204e).group(6);
        fake.function("0000:11:00.1", 0x10de, 0x22e8, 0x04_0300).group(6);
        fake.gpu("0000:21:00.0", 0x9999).numa(7).patch_config(0x2b4, &[1]);
        fake.gpu("0000:22:00.0", 0x26b9).numa(3);
        fake.function("0000:23:00.0", 0x10de, 0x1ad8, 0x0c_0330);
        let (topology, replay) = replay(&fake);
        let found: Vec<(&str, ModelKind)> =
            topology.devices.iter().map(|device| (device.spec.name.as_str(), device.spec.model)).collect();
        assert_eq!(
            found,
            [
                ("gpu0", ModelKind::H100),
                ("gpu1", ModelKind::H100),
                ("gpu2", ModelKind::RtxPro6000),
                ("gpu3", ModelKind::UnknownGpu),
                ("gpu4", ModelKind::A100),
                ("gpu2-audio", ModelKind::RtxPro6000Audio),
                ("nic0", ModelKind::Nic),
            ]
        );
        assert!(topology.switches.len() == 1 && topology.switches[0].shared_group);
        assert_eq!(topology.devices[3].place, Place::RootPort { numa: Some(1) });
        assert_eq!(topology.vm.command_line, "lockdown=integrity");
        for words in [
            "gpu0 (0000:05:00.0): H100 PCIe (10de:2331, subsystem 1626) is played as h100",
            "gpu0 (0000:05:00.0): Its driver nvidia is not in the lab",
            "gpu1 (0000:06:00.0): Is healthy here; when it runs: cargo lab fault gpu1 off-bus:both",
            "nic0 (0000:07:00.0): A foreign function in the IOMMU group of 0000:0",
            "(0000:21:00.0)",
            "is played as a100",
            "0000:23:00.0: 10de:1ad8, class 0c0330, is not played",
        ] {
            assert!(replay.differences.iter().any(|line| line.contains(words)), "{words}: {:#?}", replay.differences);
            assert!(replay.toml.contains(words), "{words}");
        }
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let fake = FakeSysfs::new();
        for bus in 1..=30_u8 {
            fake.gpu(format!("0000:{bus:02x}:00.0").as_str(), 0x2335).numa(u32::from(bus % 6));
            fake.gpu(format!("0000:{:02x}:00.0", bus + 0x40).as_str(), 0x2335);
        }
        let (topology, replay) = replay(&fake);
        assert!(topology.devices.len() < 60 && topology.numa_nodes() == 4);
        assert!(replay.differences.iter().any(|line| line.contains("Left out: no more than 24 fit there")));
        assert!(replay.differences.iter().any(|line| line.contains("NUMA node is left out, at most 4")));
        assert!(replay.toml.contains("iommu = false"));
    }

    type Case = (fn(&FakeSysfs), lab_vm::Kernel);

    #[test]
    fn kernels_follow_the_way_that_vfio_goes() {
        let bound = |fake: &FakeSysfs| _ = fake.gpu("0000:01:00.0", 0x2335).group(1).driver("vfio-pci");
        let cases: [Case; 3] = [
            (|_| {}, lab_vm::Kernel::Stock),
            (|fake| _ = fake.get("0000:01:00.0").cdev(0), lab_vm::Kernel::Iommufd),
            (
                |fake| {
                    fake.get("0000:01:00.0").cdev(0);
                    fake.remove_file("dev/vfio/vfio");
                },
                lab_vm::Kernel::NoGroup,
            ),
        ];
        for (act, kernel) in cases {
            let fake = FakeSysfs::new();
            bound(&fake);
            act(&fake);
            assert_eq!(replay(&fake).0.vm.kernel, kernel);
        }
    }

    #[test]
    fn bundles_are_known_by_their_names() {
        assert!(is_bundle("a/node.tar.gz") && is_bundle("x.tgz") && !is_bundle("hgx-h100") && !is_bundle("x.toml"));
    }
}
