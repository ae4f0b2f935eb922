//! All that is known of a node, as `--json` shows it and `doctor` judges it.

use hw_probe::acs::{Port, Ports};
use hw_probe::config::Liveness;
use hw_probe::registers::{self, Registers};
use hw_probe::{
    Bdf, Condition, Fault, Holders, HostDetails, HostFacts, Inventory, NVIDIA, PciFunction, Problem, SysRoot,
    Unclassified, holders, pci_ids_name,
};
use serde::Serialize;

use crate::cc::{CcState, Nvml, NvmlFacts, OpenNvml, is_nvmls};
use crate::node::NodeFiles;

/// What `ccnode probe --json` prints. Within a schema number fields are only added; a field that changes its meaning or goes
/// away makes a new number.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Schema of this document.
    pub schema: u32,
    /// The host.
    pub host: HostFacts,
    /// The evidence about the host.
    pub host_details: HostDetails,
    /// Who holds VFIO and NVIDIA device nodes.
    pub holders: Holders,
    /// What the files of kubelet, containerd and CDI say.
    pub node: NodeFiles,
    /// Every NVIDIA function, by address.
    pub devices: Vec<Device>,
    /// Functions that may be NVIDIA's, too, but of which it cannot be told what they are.
    pub unclassified: Vec<Unclassified>,
    /// What could not be read, of whatever function.
    pub problems: Vec<Problem>,
    /// Those of them because of which it is not known which GPUs and NVSwitches the node has.
    #[serde(skip)]
    pub doubts: Vec<Problem>,
}

/// An NVIDIA function.
#[derive(Debug, Serialize)]
pub struct Device {
    /// What sysfs and the device table say.
    #[serde(flatten)]
    pub function: PciFunction,
    /// The PCI ID repository's text for its device id.
    pub pci_ids_name: Option<&'static str>,
    /// What its configuration space answers now; none when it cannot be read.
    pub liveness: Option<Liveness>,
    /// What keeps it from being used.
    pub faults: Vec<Fault>,
    /// The ports above it, nearest first.
    pub ports: Vec<Port>,
    /// All functions of its IOMMU group, itself included.
    pub group_members: Vec<Bdf>,
    /// Those of them whose driver keeps VFIO from taking the group, other than itself.
    pub group_blockers: Vec<Blocker>,
    /// Those of them that are neither bridges nor functions of the same card.
    pub group_strangers: Vec<Bdf>,
    /// In which mode it is, and who says so; none of functions that have no modes.
    pub cc: Option<CcState>,
    /// What its registers say, where that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registers: Option<Registers>,
    /// What NVIDIA's management library says, where that was asked and answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvml: Option<NvmlFacts>,
}

/// What is asked besides files.
#[derive(Clone, Copy, Default)]
pub struct Ask {
    /// The registers of idle devices.
    pub registers: bool,
    /// NVIDIA's management library, about GPUs that its driver has.
    pub nvml: Option<OpenNvml>,
}

/// A function that keeps VFIO from taking an IOMMU group.
#[derive(Debug, Serialize)]
pub struct Blocker {
    /// The function.
    pub bdf: Bdf,
    /// Its driver.
    pub driver: String,
}

impl Report {
    /// The schema number of this version.
    pub const SCHEMA: u32 = 1;

    /// Scans the node, and asks nothing but files.
    pub fn read(root: &SysRoot) -> Self {
        Self::asking(root, &Ask::default())
    }

    /// Scans the node.
    pub fn asking(root: &SysRoot, ask: &Ask) -> Self {
        let inventory = Inventory::scan(root);
        let host_details = HostDetails::read(root, &inventory);
        let mut problems = inventory.problems.clone();
        let nvidia = inventory.functions.iter().filter(|function| function.vendor == NVIDIA);
        let mut ports = Ports::default();
        let mut devices: Vec<Device> =
            nvidia.map(|function| Device::read(root, &inventory, function, &mut ports, &mut problems)).collect();
        let (holders, node) = (holders(root), NodeFiles::read(root));
        let nvml = ask.nvml.filter(|_| devices.iter().any(|device| is_nvmls(&device.function))).map(|open| open());
        for device in &mut devices {
            device.ask(root, ask, &holders, nvml.as_ref());
        }
        let doubts = inventory.doubts().cloned().collect();
        let unclassified = inventory.unclassified.into_iter().filter(Unclassified::may_be_nvidia).collect();
        let (schema, host) = (Self::SCHEMA, inventory.host);
        Self { schema, host, host_details, holders, node, devices, unclassified, problems, doubts }
    }

    /// The GPUs; virtual functions are none.
    pub fn gpus(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(|device| device.function.is_gpu() && !device.function.is_virtual_function)
    }

    /// The GPUs and NVSwitches.
    pub fn parts(&self) -> impl Iterator<Item = &Device> {
        let whole = |device: &&Device| !device.function.is_virtual_function;
        self.devices.iter().filter(whole).filter(|device| device.function.is_gpu() || device.function.is_nvswitch())
    }
}

impl Device {
    fn read(
        root: &SysRoot,
        inventory: &Inventory,
        function: &PciFunction,
        ports: &mut Ports,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let bdf = function.bdf;
        let members: Vec<&PciFunction> =
            function.iommu_group.map_or_else(Vec::new, |group| inventory.group_members(group).collect());
        let strange = inventory
            .unclassified
            .iter()
            .filter(|other| function.iommu_group.is_some() && other.iommu_group == function.iommu_group);
        let blockers = {
            let known = members.iter().filter(|member| member.bdf != bdf && member.blocks_its_group());
            let strange = strange.clone().filter(|other| other.blocks_its_group());
            let all =
                known.map(|other| (other.bdf, &other.driver)).chain(strange.map(|other| (other.bdf, &other.driver)));
            all.map(|(bdf, driver)| Blocker { bdf, driver: driver.clone().unwrap_or_default() }).collect()
        };
        let slot = |bdf: Bdf| Bdf { function: 0, ..bdf };
        let is_bridge = |member: &PciFunction| member.class >> 8 == 0x0604;
        let known = members.iter().filter(|member| !is_bridge(member)).map(|member| member.bdf);
        let strangers = known.chain(strange.clone().map(|other| other.bdf)).filter(|other| slot(*other) != slot(bdf));
        let Condition { liveness, faults } = Condition::read(root, function);
        for fault in &faults {
            if let Fault::ConfigUnreadable { cause } = fault {
                let path = format!("sys/bus/pci/devices/{bdf}/config");
                problems.push(Problem { bdf: Some(bdf), path, message: format!("Cannot be read: {cause}") });
            }
        }
        Self {
            pci_ids_name: pci_ids_name(function.vendor, function.device),
            liveness,
            faults,
            ports: ports.above(root, function),
            group_members: members
                .iter()
                .map(|member| member.bdf)
                .chain(strange.clone().map(|other| other.bdf))
                .collect(),
            group_blockers: blockers,
            group_strangers: strangers.collect(),
            cc: None,
            registers: None,
            nvml: None,
            function: function.clone(),
        }
    }

    /// Finds out the mode, as far as it may be asked for.
    fn ask(&mut self, root: &SysRoot, ask: &Ask, holders: &Holders, nvml: Option<&Result<Box<dyn Nvml>, String>>) {
        let function = &self.function;
        if ask.registers && (function.is_gpu() || function.is_nvswitch()) {
            let condition = Condition { liveness: self.liveness, faults: self.faults.clone() };
            self.registers = Some(registers::read(root, function, &condition, holders));
        }
        let answer = nvml.filter(|_| is_nvmls(function)).map(|nvml| match nvml {
            Ok(nvml) => nvml.ask(function.bdf),
            Err(reason) => Err(reason.clone()),
        });
        self.cc = CcState::of(function, self.registers.as_ref(), answer.as_ref());
        self.nvml = answer.and_then(Result::ok);
    }

    /// Product name with the board's form, for people.
    pub fn product(&self) -> String {
        product(&self.function)
    }
}

/// Product name with the board's form, for people.
pub(crate) fn product(function: &PciFunction) -> String {
    function.product()
}
