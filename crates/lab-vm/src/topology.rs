//! Which devices a guest has and where they sit, as a TOML file says.
//!
//! ```toml
//! [vm]                      # optional, like each of its fields
//! memory_mib = 1024
//! cpus = 2
//! kernel = "iommufd"        # or "no-group", "stock"
//! command_line = ""         # added to the kernel's
//! iommu = true              # false: the machine has no IOMMU
//!
//! [[switch]]                # a PCIe switch on a root port
//! name = "plx0"
//! numa = 0                  # optional
//! shared_group = false      # true: all devices below it share one IOMMU group
//!
//! [[device]]                # the fields of lab_devices::DeviceSpec, and:
//! name = "gpu0"
//! model = "h100"
//! switch = "plx0"           # optional: below this switch, else on a root port of its own
//! numa = 0                  # optional, and only without a switch
//! absent = false            # true: its slot is empty until it is plugged in. So is that of a device which answers
//!                           # nothing from the start (faults d3cold, config-all-ones, off-bus:config, off-bus:both).
//!
//! [[device]]
//! name = "audio0"
//! model = "rtx-pro-6000-audio"
//! function_of = "gpu0"      # instead of switch and numa: another function of that device's slot
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use lab_devices::{DeviceSpec, Fault};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use toml::{Spanned, Table, Value};

use crate::artifacts::Kernel;

/// Topologies that come with the lab: name and text.
const SHIPPED: [(&str, &str); 11] = [
    ("acs-off", include_str!("../topologies/acs-off.toml")),
    ("b200x8", include_str!("../topologies/b200x8.toml")),
    ("gb200", include_str!("../topologies/gb200.toml")),
    ("h100x2", include_str!("../topologies/h100x2.toml")),
    ("h200x8-nvswitch", include_str!("../topologies/h200x8-nvswitch.toml")),
    ("hgx-h100", include_str!("../topologies/hgx-h100.toml")),
    ("lockdown", include_str!("../topologies/lockdown.toml")),
    ("mixed", include_str!("../topologies/mixed.toml")),
    ("no-iommu", include_str!("../topologies/no-iommu.toml")),
    ("rtx-pro-6000", include_str!("../topologies/rtx-pro-6000.toml")),
    ("stock-kernel", include_str!("../topologies/stock-kernel.toml")),
];

/// As many CPUs as the guest's kernel is built for.
const MAX_CPUS: u32 = 8;
/// More would not fit the bus numbers that one machine has.
const MAX_NUMA: u32 = 4;
/// Slots of a bus, less those of the machine's own devices.
const MAX_PORTS: usize = 24;
/// Functions of one slot.
const MAX_SHARED: usize = 8;

/// Why a topology cannot be used.
#[derive(Debug, Error)]
pub enum TopologyError {
    /// Neither shipped nor a file.
    #[error("No topology {name}: there are {}, and it is not a file either", shipped().collect::<Vec<_>>().join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The file cannot be read.
    #[error("Cannot read topology {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or not of the expected form; the message shows the line.
    #[error("Topology {topology}, line {line}: {message}")]
    Invalid {
        /// Its name.
        topology: String,
        /// Line in the file, from 1.
        line: usize,
        /// What is wrong there, naming the field.
        message: String,
    },
}

/// Names of the topologies that come with the lab.
pub fn shipped() -> impl Iterator<Item = &'static str> {
    SHIPPED.iter().map(|(name, _)| *name)
}

/// The virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vm {
    /// Memory in MiB. The root file system lives in it, too.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Kernel.
    pub kernel: Kernel,
    /// Added to the kernel's command line.
    pub command_line: String,
    /// Whether the machine has an IOMMU.
    pub iommu: bool,
}

impl Default for Vm {
    fn default() -> Self {
        Self { memory_mib: 1024, cpus: 2, kernel: Kernel::Iommufd, command_line: String::new(), iommu: true }
    }
}

/// A PCIe switch.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// Its name.
    pub name: String,
    /// NUMA node of its root port.
    #[serde(default)]
    pub numa: Option<u32>,
    /// Whether its devices share one IOMMU group; each has its own (with its port in it) otherwise.
    #[serde(default)]
    pub shared_group: bool,
}

/// Where a device sits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On a root port of its own, near a NUMA node if given.
    RootPort {
        /// The node.
        numa: Option<u32>,
    },
    /// Below a switch.
    Switch {
        /// The switch's name.
        name: String,
    },
    /// In the slot of another device, as a further function: functions of a slot share one IOMMU group.
    Function {
        /// The name of the device that is function 0, which comes earlier in the topology.
        of: String,
        /// The function, from 1.
        number: u8,
    },
}

/// A virtual device and its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    /// What it is.
    pub spec: DeviceSpec,
    /// Where.
    pub place: Place,
    /// Whether its slot is empty at the start.
    pub absent: bool,
}

/// A checked topology.
#[derive(Clone, Debug, PartialEq)]
pub struct Topology {
    /// Shipped name, or the file's.
    pub name: String,
    /// The machine.
    pub vm: Vm,
    /// PCIe switches.
    pub switches: Vec<Switch>,
    /// Virtual devices.
    pub devices: Vec<Device>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    vm: Option<Spanned<Vm>>,
    #[serde(default, rename = "switch")]
    switches: Vec<Spanned<Switch>>,
    #[serde(default, rename = "device")]
    devices: Vec<Spanned<Table>>,
}

impl Topology {
    /// A topology by its shipped name, or else from a file.
    ///
    /// # Errors
    ///
    /// [`TopologyError`].
    pub fn load(name: &str) -> Result<Self, TopologyError> {
        if let Some((_, text)) = SHIPPED.iter().find(|(shipped, _)| *shipped == name) {
            return Self::parse(name, text);
        }
        let path = Path::new(name);
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy(), &text),
            // A bare word is a misspelt name rather than a lost file.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.components().count() < 2 => {
                Err(TopologyError::Unknown { name: name.to_owned() })
            }
            Err(source) => Err(TopologyError::Read { path: path.to_owned(), source }),
        }
    }

    /// Reads and checks a topology's text.
    ///
    /// # Errors
    ///
    /// [`TopologyError::Invalid`], with the line.
    pub fn parse(name: &str, text: &str) -> Result<Self, TopologyError> {
        let at = |span: Option<Range<usize>>, message: String| {
            let before = span.map_or("", |span| text.get(..span.start).unwrap_or_default());
            let line = before.bytes().filter(|&byte| byte == b'\n').count() + 1;
            TopologyError::Invalid { topology: name.to_owned(), line, message }
        };
        let raw: Raw = toml::from_str(text).map_err(|error| at(error.span(), error.message().to_owned()))?;
        let Raw { vm, switches, devices } = raw;

        let vm_span = vm.as_ref().map(Spanned::span);
        let vm = vm.map(Spanned::into_inner).unwrap_or_default();
        check_vm(&vm).map_err(|message| at(vm_span.clone(), message))?;

        let mut names = BTreeSet::new();
        let mut below: BTreeMap<String, usize> = BTreeMap::new();
        let mut known = Vec::new();
        for switch in switches {
            let span = switch.span();
            let switch = switch.into_inner();
            check_name(&switch.name, &mut names)
                .and_then(|()| check_numa(switch.numa, &vm))
                .map_err(|message| at(Some(span), format!("switch {}: {message}", switch.name)))?;
            below.insert(switch.name.clone(), 0);
            known.push(switch);
        }

        let mut placed = Vec::new();
        for device in devices {
            let span = device.span();
            let device = read_device(device.into_inner(), &vm).and_then(|mut device| {
                check_name(&device.spec.name, &mut names)?;
                if let Place::Function { of, number } = &mut device.place {
                    *number = next_function(&placed, of)?;
                }
                if let Place::Switch { name } = &device.place {
                    let shared = known.iter().find(|switch| switch.name == *name).map(|switch| switch.shared_group);
                    let (Some(shared), Some(count)) = (shared, below.get_mut(name)) else {
                        return Err(format!("switch: there is no switch {name}"));
                    };
                    *count += 1;
                    let most = if shared { MAX_SHARED } else { MAX_PORTS };
                    if *count > most {
                        return Err(format!("switch: more than {most} devices below {name}"));
                    }
                }
                Ok(device)
            });
            placed.push(device.map_err(|message| at(Some(span), format!("device: {message}")))?);
        }
        let topology = Self { name: name.to_owned(), vm, switches: known, devices: placed };
        topology.check_ports().map_err(|message| at(None, message))?;
        Ok(topology)
    }

    /// Number of NUMA nodes; 0 if no device has one.
    pub fn numa_nodes(&self) -> u32 {
        let devices = self.devices.iter().filter_map(|device| match device.place {
            Place::RootPort { numa } => numa,
            Place::Switch { .. } | Place::Function { .. } => None,
        });
        self.switches.iter().filter_map(|switch| switch.numa).chain(devices).max().map_or(0, |highest| highest + 1)
    }

    /// Whether the slot of this device has further functions, or is another's.
    pub fn shares_slot(&self, device: &Device) -> bool {
        let further = |other: &Device| matches!(&other.place, Place::Function { of, .. } if *of == device.spec.name);
        matches!(device.place, Place::Function { .. }) || self.devices.iter().any(further)
    }

    fn check_ports(&self) -> Result<(), String> {
        let mut ports: BTreeMap<Option<u32>, usize> = BTreeMap::new();
        for switch in &self.switches {
            *ports.entry(switch.numa).or_default() += 1;
        }
        for device in &self.devices {
            if let Place::RootPort { numa } = device.place {
                *ports.entry(numa).or_default() += 1;
            }
        }
        match ports.values().max() {
            Some(&count) if count > MAX_PORTS => {
                Err(format!("{count} root ports at one host bridge, at most {MAX_PORTS} fit"))
            }
            _ => Ok(()),
        }
    }
}

/// The number of the next function in the slot of device `of`.
fn next_function(placed: &[Device], of: &str) -> Result<u8, String> {
    match placed.iter().find(|device| device.spec.name == of) {
        None => return Err(format!("function_of: there is no device {of} before this one")),
        Some(Device { place: Place::Function { .. }, .. }) => {
            return Err(format!("function_of: {of} is a further function itself"));
        }
        Some(Device { absent: true, .. }) => return Err(format!("function_of: {of} is absent")),
        Some(_) => {}
    }
    let taken =
        placed.iter().filter(|device| matches!(&device.place, Place::Function { of: other, .. } if other == of));
    match u8::try_from(1 + taken.count()) {
        Ok(number) if usize::from(number) < MAX_SHARED => Ok(number),
        _ => Err(format!("function_of: the slot of {of} has no more than {MAX_SHARED} functions")),
    }
}

fn check_vm(vm: &Vm) -> Result<(), String> {
    if !(1..=MAX_CPUS).contains(&vm.cpus) {
        return Err(format!("vm: cpus = {} is not from 1 to {MAX_CPUS}", vm.cpus));
    }
    if !(256..=65536).contains(&vm.memory_mib) {
        return Err(format!("vm: memory_mib = {} is not from 256 to 65536", vm.memory_mib));
    }
    Ok(())
}

/// Names become QEMU ids and file names.
fn check_name(name: &str, names: &mut BTreeSet<String>) -> Result<(), String> {
    let fits = name.len() <= 32
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if !fits {
        return Err(format!(
            "name {name:?} does not begin with a letter, or has more than 32 of letters, digits, - and _"
        ));
    }
    if names.insert(name.to_owned()) { Ok(()) } else { Err(format!("name {name} is taken")) }
}

fn check_numa(numa: Option<u32>, vm: &Vm) -> Result<(), String> {
    match numa {
        Some(node) if node >= MAX_NUMA => Err(format!("numa = {node} is not from 0 to {}", MAX_NUMA - 1)),
        // A node needs a CPU to be a node that anything runs on.
        Some(node) if node >= vm.cpus => Err(format!("numa = {node} needs vm.cpus of at least {}", node + 1)),
        _ => Ok(()),
    }
}

/// Takes our own fields out of the table; the rest is the device's.
fn read_device(mut table: Table, vm: &Vm) -> Result<Device, String> {
    let label = table.get("name").and_then(Value::as_str).unwrap_or("without a name").to_owned();
    let read = |table: &mut Table| {
        let numa: Option<u32> = take(table, "numa")?;
        let switch: Option<String> = take(table, "switch")?;
        let function_of: Option<String> = take(table, "function_of")?;
        let absent: bool = take(table, "absent")?.unwrap_or_default();
        check_numa(numa, vm)?;
        let place = match (switch, numa, function_of) {
            (None, numa, None) => Place::RootPort { numa },
            (Some(name), None, None) => Place::Switch { name },
            (Some(_), Some(_), None) => {
                return Err("numa and switch exclude each other: give the switch the node".to_owned());
            }
            // The number is found when the others are known.
            (None, None, Some(of)) => Place::Function { of, number: 0 },
            (_, _, Some(_)) => {
                return Err("function_of excludes numa and switch: it sits where that device sits".to_owned());
            }
        };
        let table = std::mem::take(table);
        let spec: DeviceSpec =
            Value::Table(table).try_into().map_err(|error: toml::de::Error| error.message().to_owned())?;
        spec.validate().map_err(|error| error.to_string())?;
        let absent = absent || spec.faults.iter().any(Fault::hides);
        if absent && matches!(place, Place::Function { .. }) {
            return Err("absent is for whole slots, and function_of shares one".to_owned());
        }
        Ok(Device { spec, place, absent })
    };
    read(&mut table).map_err(|message| format!("{label}: {message}"))
}

fn take<T: DeserializeOwned>(table: &mut Table, field: &str) -> Result<Option<T>, String> {
    let Some(value) = table.remove(field) else { return Ok(None) };
    value.try_into().map(Some).map_err(|error: toml::de::Error| format!("{field}: {}", error.message()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_topologies_are_what_their_names_say() {
        let small = Topology::load("h100x2").unwrap();
        assert_eq!((small.devices.len(), small.numa_nodes()), (2, 0));
        let board = Topology::load("hgx-h100").unwrap();
        let switches = board.devices.iter().filter(|device| device.spec.model.is_switch()).count();
        assert_eq!((board.devices.len() - switches, switches, board.numa_nodes()), (8, 4, 2));
        assert!(board.devices.iter().all(|device| matches!(device.place, Place::RootPort { numa: Some(_) })));
        for name in shipped() {
            let topology = Topology::load(name).unwrap();
            assert!(topology.devices.len() >= 2, "{name}");
        }
        assert!(shipped().is_sorted());
    }

    #[test]
    fn functions_of_a_slot_are_counted() {
        let device = |name: &str, more: &str| format!("[[device]]\nname = '{name}'\nmodel = 'nic'\n{more}\n");
        let functions = |count: usize| -> String {
            let more = (1..=count).map(|n| device(&format!("f{n}"), "function_of = 'a'"));
            device("a", "") + &more.collect::<String>()
        };
        let topology = Topology::parse("t", &functions(7)).unwrap();
        assert_eq!(topology.devices[7].place, Place::Function { of: "a".into(), number: 7 });
        for (text, part) in [
            (functions(8), "no more than 8 functions"),
            (device("a", "function_of = 'a'"), "there is no device a before this one"),
            (functions(1) + &device("b", "function_of = 'f1'"), "f1 is a further function itself"),
            (functions(0) + &device("b", "function_of = 'a'\nnuma = 0"), "function_of excludes"),
            (functions(0) + &device("b", "function_of = 'a'\nabsent = true"), "absent is for whole slots"),
            (functions(0) + &device("b", "function_of = 'a'\nfaults = ['d3cold']"), "absent is for whole slots"),
            (device("a", "absent = true") + &device("b", "function_of = 'a'"), "a is absent"),
        ] {
            let error = Topology::parse("t", &text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn all_fields_arrive() {
        let text = "[vm]\nmemory_mib = 512\ncpus = 4\nkernel = 'no-group'\ncommand_line = 'quiet'\niommu = false\n\
                    [[switch]]\nname = 'plx'\nnuma = 1\nshared_group = true\n\
                    [[device]]\nname = 'a'\nmodel = 'h200'\nboot_ms = 7\nswitch = 'plx'\nknobs = { 8 = 1 }\n";
        let topology = Topology::parse("t", text).unwrap();
        let (kernel, command_line) = (Kernel::NoGroup, "quiet".into());
        assert_eq!(topology.vm, Vm { memory_mib: 512, cpus: 4, kernel, command_line, iommu: false });
        assert_eq!(topology.switches, [Switch { name: "plx".into(), numa: Some(1), shared_group: true }]);
        assert_eq!(topology.devices[0].place, Place::Switch { name: "plx".into() });
        assert_eq!(topology.devices[0].spec.boot.as_millis(), 7);
        assert_eq!(topology.devices[0].spec.knobs[&8], 1);
        assert_eq!(topology.numa_nodes(), 2);
        assert_eq!(Topology::parse("empty", "").unwrap().vm, Vm::default());
    }

    #[test]
    fn errors_name_the_line_and_the_field() {
        let device = |more: &str| format!("[[device]]\nname = 'a'\nmodel = 'h100'\n{more}\n");
        let cases: Vec<(String, usize, &str)> = vec![
            ("x".into(), 1, "expected"),
            ("[vm]\ncpus = 'two'\n".into(), 2, "expected u32"),
            ("[vm]\n\ncores = 2\n".into(), 3, "unknown field `cores`"),
            ("[vm]\nkernel = 'windows'\n".into(), 2, "unknown variant `windows`"),
            ("\n[vm]\ncpus = 0\n".into(), 2, "cpus = 0"),
            ("[vm]\ncpus = 9\n".into(), 1, "cpus = 9"),
            ("[vm]\nmemory_mib = 16\n".into(), 1, "memory_mib = 16"),
            ("[[devices]]\nname = 'a'\n".into(), 1, "unknown field `devices`"),
            ("device = 3\n".into(), 1, "invalid type"),
            (device("") + &device(""), 5, "name a is taken"),
            (device("modle = 'x'"), 1, "unknown field `modle`"),
            ("[[device]]\nname = 'a'\n".into(), 1, "device: a: missing field `model`"),
            ("[[device]]\nmodel = 'h100'\n".into(), 1, "device: without a name: missing field `name`"),
            ("[[device]]\nname = 'a'\nmodel = 'h300'\n".into(), 1, "unknown variant `h300`"),
            ("[[device]]\nname = '../x'\nmodel = 'h100'\n".into(), 1, "../x"),
            ("[[device]]\nname = '0'\nmodel = 'h100'\n".into(), 1, "does not begin with a letter"),
            (device("numa = 2"), 1, "needs vm.cpus of at least 3"),
            (device("numa = 9"), 1, "numa = 9 is not from 0 to 3"),
            (device("numa = -1"), 1, "numa: invalid value"),
            (device("switch = 3"), 1, "switch: invalid type"),
            (device("switch = 'none'"), 1, "there is no switch none"),
            ("[[switch]]\nname = 's'\n".to_owned() + &device("switch = 's'\nnuma = 0"), 3, "exclude each other"),
            ("[[switch]]\nname = 's'\n[[switch]]\nname = 's'\n".into(), 3, "switch s: name s is taken"),
            ("[[switch]]\nname = 's'\nports = 3\n".into(), 3, "unknown field `ports`"),
            (device("knobs = { 99 = 1 }"), 1, "no knob 99"),
            (device("bar2_mib = 3"), 1, "BAR2"),
        ];
        for (text, line, part) in cases {
            let error = Topology::parse("t", &text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("Topology t, line {line}: ")), "{text:?}: {error}");
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }

    #[test]
    fn too_many_devices_in_one_place_are_refused() {
        let many = |count: usize, more: &str| -> String {
            let devices = (0..count).map(|n| format!("[[device]]\nname = 'd{n}'\nmodel = 'h100'\n{more}\n"));
            devices.collect::<Vec<_>>().concat()
        };
        assert!(Topology::parse("t", &many(MAX_PORTS, "")).is_ok());
        let error = Topology::parse("t", &many(MAX_PORTS + 1, "")).unwrap_err().to_string();
        assert!(error.contains("25 root ports"), "{error}");
        let switch = "[[switch]]\nname = 's'\nshared_group = true\n";
        assert!(Topology::parse("t", &(switch.to_owned() + &many(8, "switch = 's'"))).is_ok());
        let error = Topology::parse("t", &(switch.to_owned() + &many(9, "switch = 's'"))).unwrap_err().to_string();
        assert!(error.contains("more than 8 devices below s"), "{error}");
    }

    #[test]
    fn a_name_or_a_path_is_loaded() {
        let error = Topology::load("h100x3").unwrap_err().to_string();
        assert!(error.starts_with("No topology h100x3: there are acs-off, b200x8, gb200, h100x2, "), "{error}");
        assert!(error.ends_with(", stock-kernel, and it is not a file either"), "{error}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        assert!(matches!(Topology::load(path.to_str().unwrap()), Err(TopologyError::Read { .. })));
        fs::write(&path, "[[device]]\nname = 'a'\nmodel = 'ls10'\n").unwrap();
        assert_eq!(Topology::load(path.to_str().unwrap()).unwrap().name, "mine");
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(matches!(Topology::load(path.to_str().unwrap()), Err(TopologyError::Read { .. })));
    }

    #[test]
    fn no_text_upsets_the_reader() {
        let (_, text) = SHIPPED.iter().find(|(name, _)| *name == "acs-off").unwrap();
        for cut in (0..text.len()).step_by(7) {
            let _ = Topology::parse("t", &text[..cut]);
            let _ = Topology::parse("t", &format!("{}\u{fe}= [{}", &text[..cut], &text[cut..]));
        }
    }
}
