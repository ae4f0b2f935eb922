//! The pure core: what is on the node, and what is wanted, become ordered actions with a reason each. No I/O.

use std::collections::BTreeMap;
use std::fmt;

use agent_core::state::{DevicesFile, Transition};
use hw_probe::{Bdf, Inventory, IommuState, NVIDIA, PciFunction};
use serde::Serialize;

use crate::selection::Selection;

/// Which devices go to VFIO, and at whose cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Whether NVSwitches go too: for virtual machines that get the whole baseboard.
    pub nvswitches: Switches,
    /// Take a GPU or switch away from a driver such as `nvidia` or `nouveau`.
    pub take_from_driver: bool,
    /// Only this device, with what shares its IOMMU group.
    pub only: Option<Bdf>,
    /// Which GPUs.
    pub selection: Selection,
    /// The operator's validator looks at the GPUs afterwards.
    pub under_operator: bool,
}

/// Whether NVSwitches go to VFIO (`BIND_NVSWITCHES`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switches {
    /// When the node is in protected PCIe, or is to be, and all its GPUs and switches are capable of it.
    #[default]
    Auto,
    /// Always.
    Yes,
    /// Never.
    No,
}

/// What the other agents say of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Knowledge {
    /// The mode that is wanted of the node, as far as that is known.
    pub mode: Option<String>,
    /// The change of modes under way.
    pub transition: Option<Transition>,
    /// Devices that vfio-manager has taken and not given back, and the driver that each had before.
    pub recorded: BTreeMap<Bdf, Option<String>>,
}

/// The mode of protected PCIe, in which the switches belong to the virtual machine as well.
const PPCIE: &str = "ppcie";

impl Knowledge {
    /// What `devices.json` says, and the mode that somebody asks for, where that can be read: it is the latest word.
    pub fn from_files(
        devices: Option<&DevicesFile>,
        asked: Option<&str>,
        recorded: BTreeMap<Bdf, Option<String>>,
    ) -> Self {
        let transition = devices.and_then(|file| file.transition.clone());
        let modes =
            || devices.iter().flat_map(|file| &file.devices).filter_map(|record| record.configured_mode.as_deref());
        // Devices that differ are on their way to a mode that one of them has; `off` is what they all come from.
        let found = || modes().find(|mode| *mode != "off").or_else(|| modes().next());
        let mode = asked.or(transition.as_ref().map(|transition| transition.target.as_str())).or_else(found);
        Self { mode: mode.map(ToOwned::to_owned), transition, recorded }
    }

    /// The mode, when it is one of confidential computing, which all GPUs of a node are in together.
    fn confidential_mode(&self) -> Option<&str> {
        self.mode.as_deref().filter(|mode| *mode != "off")
    }
}

/// Why a policy is not followed at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// GPUs are left out, which the operator's validator does not accept.
    #[error(
        "--select {selection} leaves out {left}: the GPU Operator's validator waits until every GPU of the node is on VFIO; leave \
         --select out, or pass --operator no where this node has no such validator", left = list(.left)
    )]
    OperatorWantsAll {
        /// The selection.
        selection: Selection,
        /// The GPUs.
        left: Vec<Bdf>,
    },
}

impl PolicyError {
    /// The stable code of the error, the same in logs and documentation.
    pub fn code(&self) -> &'static str {
        match self {
            Self::OperatorWantsAll { .. } => "SelectionRefused",
        }
    }
}

fn list(bdfs: &[Bdf]) -> String {
    bdfs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Whether the policy can be followed on this node.
pub fn check(inventory: &Inventory, policy: &Policy) -> Result<(), PolicyError> {
    let left = left_out(inventory, policy);
    if policy.under_operator && !left.is_empty() {
        return Err(PolicyError::OperatorWantsAll { selection: policy.selection.clone(), left });
    }
    Ok(())
}

fn left_out(inventory: &Inventory, policy: &Policy) -> Vec<Bdf> {
    inventory.gpus().filter(|gpu| !policy.selection.takes(gpu)).map(|gpu| gpu.bdf).collect()
}

/// What is to be done with one function, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The function.
    pub bdf: Bdf,
    /// What to do.
    #[serde(flatten)]
    pub action: Action,
    /// Why, for people.
    pub reason: String,
}

/// What can be done with a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "kebab-case")]
pub enum Action {
    /// It is as wanted: touch nothing.
    Leave,
    /// Bind it to this VFIO module.
    Bind {
        /// Module name, as `modules.alias` spells it.
        module: String,
    },
    /// Take it from its VFIO driver and give it back what it had.
    Unbind,
    /// It is not as wanted, and not touched before a change of modes has ended.
    Wait,
    /// It is not as wanted, and must not be touched.
    Refuse,
}

impl Action {
    /// Whether something is done to the function.
    pub fn is_act(&self) -> bool {
        matches!(self, Self::Bind { .. } | Self::Unbind)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leave => f.write_str("leave"),
            Self::Bind { module } => write!(f, "bind to {module}"),
            Self::Unbind => f.write_str("unbind"),
            Self::Wait => f.write_str("wait"),
            Self::Refuse => f.write_str("refused"),
        }
    }
}

/// Base class and sub-class of PCI-to-PCI bridges: they stay with their port driver, and VFIO does not mind them.
const BRIDGE: u32 = 0x06_04;

/// Base class of PCI bridges and sub-class of host bridges.
const HOST_BRIDGE: u32 = 0x06_00;

/// The drivers that the operator's validator accepts on a GPU (operator-contract section 9).
const VALIDATORS_DRIVERS: [&str; 2] = ["vfio-pci", "nvgrace_gpu_vfio_pci"];

/// The steps that bring every device of the policy to VFIO, in the order of their addresses.
///
/// `module_for` chooses the VFIO module of a function; it is asked only for those that are to be bound. Whether another
/// agent works on a device at this very moment is not a matter of the plan: its lock says so when the step is carried out.
pub fn plan_bind(
    inventory: &Inventory,
    policy: &Policy,
    knowledge: &Knowledge,
    module_for: impl Fn(&PciFunction) -> String,
) -> Vec<Step> {
    let mut steps = BTreeMap::new();
    for bdf in policy.selection.addresses().iter().filter(|bdf| inventory.gpus().all(|gpu| gpu.bdf != **bdf)) {
        let reason = "selected by its address, and there is no such GPU on this node".into();
        steps.insert(*bdf, Step { bdf: *bdf, action: Action::Refuse, reason });
    }
    let planner = Planner { inventory, policy, module_for: &module_for };
    for device in selected(inventory, policy, knowledge) {
        if device.iommu_group.is_none() {
            let reason = match inventory.host.iommu {
                IommuState::Off => {
                    "it has no IOMMU group, because this kernel runs no IOMMU: turn on VT-d or AMD-Vi in the firmware and \
                     boot with intel_iommu=on or amd_iommu=on"
                }
                IommuState::On => {
                    "it has no IOMMU group, though the kernel runs an IOMMU: the firmware (ACPI DMAR or IVRS table) leaves \
                     this device out; a firmware update or another slot may cure it"
                }
            };
            steps.insert(device.bdf, Step { bdf: device.bdf, action: Action::Refuse, reason: reason.into() });
            continue;
        }
        steps.insert(device.bdf, planner.device(device));
        for sibling in siblings(inventory, device) {
            steps.entry(sibling.bdf).or_insert_with(|| planner.sibling(device, sibling));
        }
    }
    let steps = steps.into_values().map(|step| even(step, inventory, policy, knowledge));
    steps.map(|step| settled(step, knowledge)).collect()
}

/// The steps that give back every device of the policy that is on a VFIO driver.
///
/// Whether a device is held by a virtual machine cannot be seen in an inventory: the executor asks the kernel directly
/// before the act.
pub fn plan_unbind(inventory: &Inventory, policy: &Policy, knowledge: &Knowledge) -> Vec<Step> {
    let mut steps = BTreeMap::new();
    for device in selected(inventory, policy, knowledge) {
        let its = |function: &&PciFunction| function.vendor == NVIDIA && !function.is_gpu() && !function.is_nvswitch();
        for function in std::iter::once(device).chain(siblings(inventory, device).filter(its)) {
            let (action, reason) = give_back(function, knowledge);
            steps.entry(function.bdf).or_insert(Step { bdf: function.bdf, action, reason });
        }
    }
    steps.into_values().map(|step| settled(step, knowledge)).collect()
}

fn give_back(function: &PciFunction, knowledge: &Knowledge) -> (Action, String) {
    let before = knowledge.recorded.get(&function.bdf).and_then(Option::as_deref);
    match (function.driver.as_deref(), before) {
        (Some(driver), _) if function.is_vfio_bound() => (Action::Unbind, format!("bound to {driver}")),
        (Some(driver), _) => (Action::Leave, format!("not on VFIO but on {driver}")),
        // What was begun and not ended: killed, or refused by the kernel.
        (None, Some(before)) => (Action::Unbind, format!("no driver, and it had {before} before it was taken")),
        (None, None) => (Action::Leave, "no driver".into()),
    }
}

/// A step, unless it is for some GPUs of a node whose mode is one of all.
fn even(step: Step, inventory: &Inventory, policy: &Policy, knowledge: &Knowledge) -> Step {
    let Some(mode) = knowledge.confidential_mode() else { return step };
    let left = left_out(inventory, policy);
    if left.is_empty() || !step.action.is_act() {
        return step;
    }
    let reason = format!(
        "the mode {mode} is one of all GPUs of the node, and --select {} leaves out {}: leave --select out, or set the mode \
         off",
        policy.selection,
        list(&left)
    );
    Step { action: Action::Refuse, reason, ..step }
}

/// A step, unless it has to wait for a change of modes.
fn settled(step: Step, knowledge: &Knowledge) -> Step {
    let Some(Transition { target, step: at, started_at }) = &knowledge.transition else { return step };
    if !step.action.is_act() {
        return step;
    }
    let reason = format!("cc-manager is changing the mode to {target} (at {at}, since {started_at})");
    Step { action: Action::Wait, reason, ..step }
}

/// Whether the switches belong to the virtual machines.
fn takes_switches(inventory: &Inventory, policy: &Policy, knowledge: &Knowledge) -> bool {
    let is_capable = |device: &PciFunction| device.model.as_ref().is_some_and(|model| model.ppcie);
    match policy.nvswitches {
        Switches::Yes => true,
        Switches::No => false,
        Switches::Auto => {
            knowledge.mode.as_deref() == Some(PPCIE)
                && inventory.gpus().chain(inventory.nvswitches()).all(is_capable)
                && left_out(inventory, policy).is_empty()
        }
    }
}

fn selected<'a>(
    inventory: &'a Inventory,
    policy: &Policy,
    knowledge: &Knowledge,
) -> impl Iterator<Item = &'a PciFunction> {
    let only = policy.only;
    let switches = takes_switches(inventory, policy, knowledge);
    // What was taken is given back, and kept right until then, whatever the mode has become.
    let ours =
        |switch: &PciFunction| policy.nvswitches == Switches::Auto && knowledge.recorded.contains_key(&switch.bdf);
    let gpus = inventory.gpus().filter(|gpu| policy.selection.takes(gpu) || only == Some(gpu.bdf));
    let switches = inventory.nvswitches().filter(move |switch| switches || ours(switch) || only == Some(switch.bdf));
    let all: Vec<_> = gpus.chain(switches).filter(|device| only.is_none_or(|bdf| bdf == device.bdf)).collect();
    all.into_iter()
}

/// What else must leave its driver before the device's group can be used: the other functions of its IOMMU group, and
/// the functions that the kernel links to it as consumers, bridges excepted.
fn siblings<'a>(inventory: &'a Inventory, device: &'a PciFunction) -> impl Iterator<Item = &'a PciFunction> {
    let of_group = move |function: &PciFunction| {
        device.iommu_group.is_some() && function.iommu_group == device.iommu_group
            || device.consumers.contains(&function.bdf)
    };
    inventory.functions.iter().filter(move |function| {
        let class = function.class >> 8;
        function.bdf != device.bdf && of_group(function) && class != BRIDGE && class != HOST_BRIDGE
    })
}

struct Planner<'a, M> {
    inventory: &'a Inventory,
    policy: &'a Policy,
    module_for: &'a M,
}

impl<M: Fn(&PciFunction) -> String> Planner<'_, M> {
    fn device(&self, device: &PciFunction) -> Step {
        let bdf = device.bdf;
        let (action, reason) = match device.driver.as_deref() {
            // Whichever VFIO driver it is: changing it under a group that a virtual machine may hold gains nothing.
            Some(driver) if device.is_vfio_bound() => {
                let known = !self.policy.under_operator || !device.is_gpu() || is_validators(driver);
                let note = if known { "" } else { ", which the GPU Operator's validator does not know" };
                (Action::Leave, format!("already bound to {driver}{note}"))
            }
            None => self.bind(device, "it had no driver".into()),
            Some(driver) if self.policy.take_from_driver => self.bind(device, format!("taken from {driver}, as asked")),
            Some(driver) => (
                Action::Refuse,
                format!(
                    "the {driver} driver has it: stop what uses it and unload {driver}, or pass --take-from-driver"
                ),
            ),
        };
        Step { bdf, action, reason }
    }

    fn bind(&self, device: &PciFunction, reason: String) -> (Action, String) {
        let module = (self.module_for)(device);
        if self.policy.under_operator && device.is_gpu() && !is_validators(&module) {
            let reason = format!(
                "this kernel's driver for it is {module}, and the GPU Operator's validator accepts only {}: use an operator \
                 that knows it, or pass --operator no where this node has no such validator",
                VALIDATORS_DRIVERS.join(" and ")
            );
            return (Action::Refuse, reason);
        }
        (Action::Bind { module }, reason)
    }

    fn sibling(&self, device: &PciFunction, sibling: &PciFunction) -> Step {
        let bdf = sibling.bdf;
        let shares = format!("shares {} with {}", group(device), device.bdf);
        // Another GPU or switch of the group: it may be at work for the host.
        if sibling.is_gpu() || sibling.is_nvswitch() {
            let Step { action, reason, .. } = self.device(sibling);
            return Step { bdf, action, reason: format!("{shares}; {reason}") };
        }
        let (action, reason) = match sibling.driver.as_deref() {
            _ if sibling.is_vfio_bound() => (Action::Leave, format!("{shares}; already on VFIO")),
            _ if sibling.vendor == NVIDIA => self.bind(sibling, shares),
            None => (Action::Leave, format!("{shares}; it has no driver, which VFIO accepts")),
            Some(_) if !sibling.blocks_its_group() => (Action::Leave, format!("{shares}; VFIO accepts its driver")),
            Some(driver) => {
                let ports = self.without_acs(device);
                let reason = format!(
                    "{shares} and is on {driver}: the group cannot be given to a virtual machine until it leaves that \
                     driver or ACS separates the two{ports}"
                );
                (Action::Refuse, reason)
            }
        };
        Step { bdf, action, reason }
    }

    /// The bridges above the device, of which one must be able to separate it.
    fn without_acs(&self, device: &PciFunction) -> String {
        let above: Vec<Bdf> =
            device.upstream.iter().copied().filter(|bdf| self.inventory.get(*bdf).is_some()).collect();
        if above.is_empty() { String::new() } else { format!(" (ports above it: {})", list(&above)) }
    }
}

fn is_validators(driver: &str) -> bool {
    let plain = |name: &str| name.replace('-', "_");
    VALIDATORS_DRIVERS.iter().any(|known| plain(known) == plain(driver))
}

fn group(device: &PciFunction) -> String {
    device.iommu_group.map_or_else(|| "a device link".into(), |number| format!("IOMMU group {number}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;

    const GPU: &str = "0000:41:00.0";

    /// Rows of (address, action, part of the reason).
    fn rows(steps: &[Step]) -> Vec<(String, String, &str)> {
        steps.iter().map(|step| (step.bdf.to_string(), step.action.to_string(), step.reason.as_str())).collect()
    }

    fn plan(fake: &FakeSysfs, policy: &Policy) -> Vec<Step> {
        plan_knowing(fake, policy, &Knowledge::default())
    }

    fn plan_knowing(fake: &FakeSysfs, policy: &Policy, knowledge: &Knowledge) -> Vec<Step> {
        plan_bind(&Inventory::scan(&fake.root()), policy, knowledge, |_| "vfio_pci".into())
    }

    fn in_mode(mode: &str) -> Knowledge {
        Knowledge { mode: Some(mode.into()), ..Knowledge::default() }
    }

    #[test]
    fn what_is_done_with_a_gpu_depends_on_its_driver() {
        for (driver, take, action, reason) in [
            ("", false, "bind to vfio_pci", "had no driver"),
            ("vfio-pci", false, "leave", "already bound to vfio-pci"),
            ("nvgrace_gpu_vfio_pci", false, "leave", "already bound to nvgrace_gpu_vfio_pci"),
            ("nvidia", false, "refused", "--take-from-driver"),
            ("nouveau", true, "bind to vfio_pci", "taken from nouveau"),
        ] {
            let fake = FakeSysfs::new();
            let gpu = fake.gpu(GPU, 0x2330).group(5);
            if !driver.is_empty() {
                gpu.driver(driver);
            }
            let steps = plan(&fake, &Policy { take_from_driver: take, ..Policy::default() });
            assert_eq!(steps.len(), 1, "{driver}");
            assert_eq!(steps[0].action.to_string(), action, "{driver}");
            assert!(steps[0].reason.contains(reason), "{driver}: {}", steps[0].reason);
        }
    }

    #[test]
    fn a_gpu_without_iommu_group_is_refused_with_the_cure() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330);
        let refused = |words: &str| {
            let steps = plan(&fake, &Policy::default());
            assert_eq!(steps[0].action, Action::Refuse);
            assert!(steps[0].reason.contains(words), "{}", steps[0].reason);
        };
        refused("intel_iommu=on");
        // The IOMMU runs, for another device.
        fake.function("0000:42:00.0", 0x8086, 0x1521, 0x02_00_00).group(5);
        refused("ACPI DMAR");
    }

    #[test]
    fn a_node_on_which_all_is_right_is_not_asked_for_modules() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci");
        let steps = plan_bind(&Inventory::scan(&fake.root()), &Policy::default(), &Knowledge::default(), |_| {
            unreachable!("nothing to bind")
        });
        assert_eq!(steps[0].action, Action::Leave);
    }

    #[test]
    fn what_shares_the_group_goes_along_except_bridges_and_foreign_devices() {
        let fake = FakeSysfs::new();
        fake.bridge("0000:40:00.0").group(5);
        fake.gpu(GPU, 0x2bb5).class(0x03_00_00).group(5);
        fake.function("0000:41:00.1", 0x10de, 0x22e8, 0x04_03_00).group(5).driver("snd_hda_intel");
        fake.function("0000:42:00.0", 0x8086, 0x1521, 0x02_00_00).group(5).driver("igb");
        fake.function("0000:42:00.1", 0x8086, 0x1521, 0x02_00_00).group(5);
        fake.function("0000:43:00.0", 0x8086, 0x1521, 0x02_00_00).group(6).driver("igb");
        let steps = plan(&fake, &Policy::default());
        let found = rows(&steps);
        let expected = [
            (GPU, "bind to vfio_pci", "had no driver"),
            ("0000:41:00.1", "bind to vfio_pci", "shares IOMMU group 5 with 0000:41:00.0"),
            ("0000:42:00.0", "refused", "is on igb"),
            ("0000:42:00.1", "leave", "which VFIO accepts"),
        ];
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for ((bdf, action, reason), (wanted_bdf, wanted_action, part)) in found.iter().zip(expected) {
            assert_eq!((bdf.as_str(), action.as_str()), (wanted_bdf, wanted_action));
            assert!(reason.contains(part), "{bdf}: {reason}");
        }
    }

    #[test]
    fn switches_come_only_when_asked_for_and_virtual_functions_never() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5);
        fake.gpu("0000:41:00.4", 0x2330).group(6).virtual_function_of(GPU);
        fake.nvswitch("0000:81:00.0").group(7);
        let bdfs = |policy: &Policy| plan(&fake, policy).iter().map(|step| step.bdf.to_string()).collect::<Vec<_>>();
        assert_eq!(bdfs(&Policy::default()), [GPU]);
        assert_eq!(bdfs(&Policy { nvswitches: Switches::Yes, ..Policy::default() }), [GPU, "0000:81:00.0"]);
        let only = Policy { only: "0000:81:00.0".parse().ok(), ..Policy::default() };
        assert_eq!(bdfs(&only), ["0000:81:00.0"]);
    }

    #[test]
    fn only_what_is_on_vfio_is_unbound() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci");
        fake.gpu("0000:42:00.0", 0x2330).group(6).driver("nvidia");
        fake.gpu("0000:43:00.0", 0x2330).group(7);
        let steps = plan_unbind(&Inventory::scan(&fake.root()), &Policy::default(), &Knowledge::default());
        let actions = |steps: &[Step]| steps.iter().map(|step| step.action.to_string()).collect::<Vec<_>>();
        assert_eq!(actions(&steps), ["unbind", "leave", "leave"]);
        // One that was not given back to the end.
        let recorded = ["0000:42:00.0", "0000:43:00.0"].map(|bdf| (bdf.parse().unwrap(), Some("nouveau".into())));
        let knowledge = Knowledge { recorded: recorded.into(), ..Knowledge::default() };
        let steps = plan_unbind(&Inventory::scan(&fake.root()), &Policy::default(), &knowledge);
        assert_eq!(actions(&steps), ["unbind", "leave", "unbind"]);
    }

    #[test]
    fn switches_come_by_themselves_on_a_node_in_protected_pcie() {
        let fake = FakeSysfs::new();
        fake.hgx_h100();
        let switches = |policy: &Policy, knowledge: &Knowledge| {
            let inventory = Inventory::scan(&fake.root());
            let steps = plan_bind(&inventory, policy, knowledge, |_| "vfio_pci".into());
            steps.iter().filter(|step| inventory.get(step.bdf).unwrap().is_nvswitch()).count()
        };
        let (auto, no) = (Policy::default(), Policy { nvswitches: Switches::No, ..Policy::default() });
        assert_eq!(switches(&auto, &Knowledge::default()), 0);
        assert_eq!(switches(&auto, &in_mode("on")), 0);
        assert_eq!(switches(&auto, &in_mode("ppcie")), 4);
        assert_eq!(switches(&no, &in_mode("ppcie")), 0);
        let one: Policy = Policy { selection: "numa=1".parse().unwrap(), ..Policy::default() };
        assert_eq!(switches(&one, &in_mode("ppcie")), 0, "not all GPUs are there");
        // One that was bound is looked after when the mode has become another, and given back with the GPUs.
        let recorded = Knowledge { recorded: [("0000:05:00.0".parse().unwrap(), None)].into(), ..in_mode("off") };
        assert_eq!(switches(&auto, &recorded), 1);
        let bdf = "0000:05:00.0";
        fake.get(bdf).driver("vfio-pci");
        let given = |knowledge: &Knowledge| {
            let steps = plan_unbind(&Inventory::scan(&fake.root()), &auto, knowledge);
            steps.iter().any(|step| step.bdf.to_string() == bdf && step.action == Action::Unbind)
        };
        assert!(given(&recorded) && given(&in_mode("ppcie")) && !given(&in_mode("off")));
        // A GPU that cannot be in that mode keeps all switches out.
        fake.gpu("0000:e1:00.0", 0x2235).group(90);
        assert_eq!(switches(&auto, &in_mode("ppcie")), 0);
    }

    #[test]
    fn a_selection_leaves_gpus_alone_but_not_while_the_mode_is_one_of_all() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5);
        fake.gpu("0000:42:00.0", 0x2330).group(6).driver("nvidia");
        let policy = Policy { selection: format!("bdf={GPU},bdf=0000:99:00.0").parse().unwrap(), ..Policy::default() };
        for (knowledge, action, reason) in [
            (Knowledge::default(), "bind to vfio_pci", "had no driver"),
            (in_mode("off"), "bind to vfio_pci", "had no driver"),
            (in_mode("on"), "refused", "leaves out 0000:42:00.0"),
        ] {
            let steps = plan_knowing(&fake, &policy, &knowledge);
            let found = rows(&steps);
            assert_eq!(found.len(), 2, "{found:?}");
            assert_eq!((found[0].0.as_str(), found[0].1.as_str()), (GPU, action));
            assert!(found[0].2.contains(reason), "{found:?}");
            assert_eq!((found[1].0.as_str(), found[1].1.as_str()), ("0000:99:00.0", "refused"));
        }
        let inventory = Inventory::scan(&fake.root());
        assert_eq!(check(&inventory, &policy), Ok(()));
        let error = check(&inventory, &Policy { under_operator: true, ..policy }).unwrap_err().to_string();
        assert!(error.contains("0000:42:00.0") && error.contains("--operator no") && error.contains(GPU), "{error}");
        assert_eq!(check(&inventory, &Policy { under_operator: true, ..Policy::default() }), Ok(()));
    }

    #[test]
    fn a_driver_that_the_operators_validator_does_not_know_is_refused_there() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5);
        fake.nvswitch("0000:81:00.0").group(7);
        let policy = |under_operator| Policy { under_operator, nvswitches: Switches::Yes, ..Policy::default() };
        for (module, under_operator, actions) in [
            ("vfio_pci", true, ["bind to vfio_pci", "bind to vfio_pci"]),
            ("nvgrace_gpu_vfio_pci", true, ["bind to nvgrace_gpu_vfio_pci", "bind to nvgrace_gpu_vfio_pci"]),
            ("news_vfio_pci", true, ["refused", "bind to news_vfio_pci"]),
            ("news_vfio_pci", false, ["bind to news_vfio_pci", "bind to news_vfio_pci"]),
        ] {
            let inventory = Inventory::scan(&fake.root());
            let steps = plan_bind(&inventory, &policy(under_operator), &Knowledge::default(), |_| module.into());
            assert_eq!(steps.iter().map(|step| step.action.to_string()).collect::<Vec<_>>(), actions, "{module}");
            assert!(
                actions[0] != "refused" || steps[0].reason.contains("validator accepts only vfio-pci"),
                "{steps:?}"
            );
        }
    }

    #[test]
    fn nothing_is_bound_or_given_back_while_modes_are_changed() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5);
        fake.gpu("0000:42:00.0", 0x2330).group(6).driver("vfio-pci");
        let transition = Transition {
            target: "on".into(),
            step: "reset".into(),
            started_at: "2026-01-02T03:04:05Z".parse().unwrap(),
        };
        let knowledge = Knowledge { transition: Some(transition), ..Knowledge::default() };
        let steps = plan_knowing(&fake, &Policy::default(), &knowledge);
        assert_eq!((&steps[0].action, &steps[1].action), (&Action::Wait, &Action::Leave));
        assert!(steps[0].reason.contains("to on (at reset, since 2026-01-02T03:04:05Z)"), "{}", steps[0].reason);
        let steps = plan_unbind(&Inventory::scan(&fake.root()), &Policy::default(), &knowledge);
        assert_eq!((&steps[0].action, &steps[1].action), (&Action::Leave, &Action::Wait));
    }

    #[test]
    fn another_gpu_of_the_group_goes_along_and_is_not_taken_from_its_driver() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5);
        fake.gpu("0000:42:00.0", 0x2330).group(5).driver("nvidia");
        let only = Policy { only: GPU.parse().ok(), ..Policy::default() };
        let steps = plan(&fake, &only);
        assert_eq!(rows(&steps)[1].1, "refused");
        assert!(steps[1].reason.contains("shares IOMMU group 5") && steps[1].reason.contains("--take-from-driver"));
        fake.get("0000:42:00.0").no_driver();
        assert_eq!(rows(&plan(&fake, &only))[1].1, "bind to vfio_pci");
    }

    #[test]
    fn the_latest_word_on_the_mode_counts() {
        use agent_core::state::{DeviceRecord, Identity, Origin};
        let record = |mode: &str| DeviceRecord {
            bdf: GPU.parse().unwrap(),
            identity: Identity::default(),
            configured_mode: Some(mode.into()),
            active_mode: None,
            verified_at: None,
            usable: true,
            error: None,
        };
        let file = |target: Option<&str>, modes: &[&str]| DevicesFile {
            origin: Origin::now("boot", None),
            transition: target.map(|target| Transition {
                target: target.into(),
                step: "own".into(),
                started_at: jiff::Timestamp::UNIX_EPOCH,
            }),
            devices: modes.iter().map(|mode| record(mode)).collect(),
        };
        for (devices, asked, mode) in [
            (None, None, None),
            (None, Some("ppcie"), Some("ppcie")),
            (Some(file(None, &[])), None, None),
            (Some(file(None, &["off", "off"])), None, Some("off")),
            (Some(file(None, &["off", "on"])), None, Some("on")),
            (Some(file(Some("ppcie"), &["on"])), None, Some("ppcie")),
            (Some(file(Some("ppcie"), &["on"])), Some("off"), Some("off")),
        ] {
            let knowledge = Knowledge::from_files(devices.as_ref(), asked, BTreeMap::new());
            assert_eq!(knowledge.mode.as_deref(), mode, "{devices:?} {asked:?}");
        }
    }

    #[test]
    fn a_plan_is_told_in_json_with_its_reasons() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5);
        let value = serde_json::to_value(plan(&fake, &Policy::default())).unwrap();
        let step = serde_json::json!({
            "bdf": GPU, "action": "bind", "module": "vfio_pci", "reason": "it had no driver",
        });
        assert_eq!(value, serde_json::json!([step]));
    }
}
