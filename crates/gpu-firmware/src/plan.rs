//! What a mode of the node means for each of its devices. No I/O.

use hw_probe::{Inventory, PciFunction};

use crate::chip::Support;
use crate::error::{Error, Fault};
use crate::mode::Mode;

/// A mode of a node, device by device.
#[derive(Clone, Debug)]
pub struct NodePlan {
    /// The node's mode.
    pub target: Mode,
    /// Every GPU and NVSwitch of the node, by address.
    pub devices: Vec<PlannedDevice>,
}

/// A device and its part in the node's mode.
#[derive(Clone, Debug)]
pub struct PlannedDevice {
    /// The device.
    pub function: PciFunction,
    /// What is to become of it.
    pub part: Part,
}

/// What a mode of the node means for one device.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// It is to be brought to this mode of its own: a switch of a node with CC is off.
    Mode(Mode),
    /// It has neither CC nor protected PCIe, and is off for ever: nothing is to be done.
    AlwaysOff,
    /// It cannot be in what the node's mode asks of it.
    Refused(Fault),
}

impl NodePlan {
    /// The part of every GPU and NVSwitch of `inventory` in the mode `target`.
    pub fn of(inventory: &Inventory, target: Mode) -> Self {
        let has_switches = inventory.nvswitches().any(has_ppcie);
        let mut devices: Vec<PlannedDevice> = inventory
            .gpus()
            .chain(inventory.nvswitches())
            .map(|function| PlannedDevice { function: function.clone(), part: part(function, target, has_switches) })
            .collect();
        devices.sort_by_key(|device| device.function.bdf);
        Self { target, devices }
    }

    /// The devices that have a mode of their own in it, and which.
    pub fn modes(&self) -> impl Iterator<Item = (&PciFunction, Mode)> {
        self.devices.iter().filter_map(|device| match device.part {
            Part::Mode(mode) => Some((&device.function, mode)),
            Part::AlwaysOff | Part::Refused(_) => None,
        })
    }

    /// Why devices cannot be in it.
    pub fn refusals(&self) -> Vec<Error> {
        let refused = |device: &PlannedDevice| match &device.part {
            Part::Refused(fault) => Some(Error::new(device.function.bdf, fault.clone())),
            Part::Mode(_) | Part::AlwaysOff => None,
        };
        self.devices.iter().filter_map(refused).collect()
    }

    /// Whether it may be begun: a mode other than off is one of all devices, while off is each device's own.
    pub fn is_possible(&self) -> bool {
        self.target == Mode::Off || self.devices.iter().all(|device| !matches!(device.part, Part::Refused(_)))
    }
}

fn has_ppcie(function: &PciFunction) -> bool {
    function.model.as_ref().is_some_and(|model| model.ppcie)
}

fn part(function: &PciFunction, target: Mode, has_switches: bool) -> Part {
    let is_always_off = function.model.as_ref().is_some_and(|model| !model.cc_query && !model.ppcie);
    if is_always_off
        && !function.is_virtual_function
        && (target == Mode::Off || function.is_nvswitch())
        && target != Mode::Ppcie
    {
        return Part::AlwaysOff;
    }
    match Support::of(function).and_then(|support| Ok((support.target(target)?, support))) {
        Ok((Mode::Ppcie, support)) if !has_switches => {
            let reason = "protected PCIe is of GPUs and their NVSwitches together, and this node shows no such switch";
            Part::Refused(Fault::Unsupported { model: support.model, reason })
        }
        Ok((mode, _)) => Part::Mode(mode),
        Err(fault) => Part::Refused(fault),
    }
}

#[cfg(test)]
mod tests {
    use hw_probe::testing::FakeSysfs;

    use super::*;

    /// Names for the tables, and what they are.
    const DEVICES: [(&str, u16, u32); 7] = [
        ("h100", 0x2330, 0x03_0200),
        ("gh200", 0x2342, 0x03_0200),
        ("a100", 0x20b0, 0x03_0200),
        ("b200", 0x2901, 0x03_0200),
        ("unknown", 0x3f00, 0x03_0200),
        ("ls10", 0x22a3, 0x06_8000),
        ("lr10", 0x1af1, 0x06_8000),
    ];

    fn plan(names: &[&str], target: Mode) -> NodePlan {
        let sysfs = FakeSysfs::new();
        for (index, name) in names.iter().enumerate() {
            let bdf = format!("0000:{:02x}:00.0", index + 1);
            let (_, device, class) = DEVICES.iter().find(|(known, ..)| known == name).unwrap();
            let _ = sysfs.function(bdf.as_str(), 0x10de, *device, *class);
        }
        NodePlan::of(&Inventory::scan(&sysfs.root()), target)
    }

    #[test]
    fn each_device_has_its_own_part() {
        // Devices, and their parts in off, on, ppcie: a mode, `-` for always off, `x` for refused.
        let table: [(&[&str], [&str; 3]); 8] = [
            (&["h100", "h100", "ls10"], ["off off off", "on on off", "ppcie ppcie ppcie"]),
            (&["h100"], ["off", "on", "x"]),
            (&["a100", "lr10"], ["- -", "x -", "x x"]),
            (&["h100", "lr10"], ["off -", "on -", "x x"]),
            (&["b200", "b200"], ["off off", "on on", "x x"]),
            (&["h100", "unknown"], ["off x", "on x", "x x"]),
            (&["h100", "b200", "ls10"], ["off off off", "on on off", "ppcie x ppcie"]),
            (&["gh200"], ["off", "x", "x"]),
        ];
        for (names, expected) in table {
            for (target, expected) in [Mode::Off, Mode::On, Mode::Ppcie].into_iter().zip(expected) {
                let plan = plan(names, target);
                let parts: Vec<&str> = plan
                    .devices
                    .iter()
                    .map(|device| match &device.part {
                        Part::Mode(mode) => mode.as_str(),
                        Part::AlwaysOff => "-",
                        Part::Refused(_) => "x",
                    })
                    .collect();
                assert_eq!(parts.join(" "), expected, "{names:?} {target}");
                let refused = expected.matches('x').count();
                assert_eq!(plan.refusals().len(), refused, "{names:?} {target}");
                assert_eq!(plan.is_possible(), refused == 0 || target == Mode::Off, "{names:?} {target}");
            }
        }
    }

    #[test]
    fn refusals_give_the_reason() {
        let reason = |names: &[&str], target| plan(names, target).refusals()[0].to_string();
        for (names, target, text) in [
            (&["h100"][..], Mode::Ppcie, "shows no such switch"),
            (&["b200", "ls10"], Mode::Ppcie, "mode on"),
            (&["unknown"], Mode::Off, "Unknown device 10de:3f00"),
            (&["a100"], Mode::On, "before Hopper"),
        ] {
            let found = reason(names, target);
            assert!(found.starts_with("0000:01:00.0: ") && found.contains(text), "{found}");
        }
    }
}
