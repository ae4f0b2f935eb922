//! The pure core: what is on the node, and what is wanted, become ordered actions with a reason each. No I/O.

use std::collections::BTreeMap;
use std::fmt;

use hw_probe::{Bdf, Inventory, IommuState, PciFunction};

/// Which devices go to VFIO, and at whose cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Bind NVSwitches too (`BIND_NVSWITCHES`): for virtual machines that get the whole baseboard.
    pub nvswitches: bool,
    /// Take a GPU or switch away from a driver such as `nvidia` or `nouveau`.
    pub take_from_driver: bool,
    /// Only this device, with what shares its IOMMU group.
    pub only: Option<Bdf>,
}

/// What is to be done with one function, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The function.
    pub bdf: Bdf,
    /// What to do.
    pub action: Action,
    /// Why, for people.
    pub reason: String,
}

/// What can be done with a function.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// It is not as wanted, and must not be touched.
    Refuse,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leave => f.write_str("leave"),
            Self::Bind { module } => write!(f, "bind to {module}"),
            Self::Unbind => f.write_str("unbind"),
            Self::Refuse => f.write_str("refused"),
        }
    }
}

/// Base class and sub-class of PCI-to-PCI bridges: they stay with their port driver, and VFIO does not mind them.
const BRIDGE: u32 = 0x06_04;

/// Base class of PCI bridges and sub-class of host bridges.
const HOST_BRIDGE: u32 = 0x06_00;

/// The steps that bring every device of the policy to VFIO, in the order of their addresses.
///
/// `module_for` chooses the VFIO module of a function; it is asked only for those that are to be bound. Whether another
/// agent works on a device at this moment is not a matter of the plan: its lock says so when the step is carried out.
pub fn plan_bind(inventory: &Inventory, policy: &Policy, module_for: impl Fn(&PciFunction) -> String) -> Vec<Step> {
    let mut steps = BTreeMap::new();
    for device in selected(inventory, policy) {
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
        steps.insert(device.bdf, bind_step(device, policy.take_from_driver, &module_for));
        for sibling in siblings(inventory, device) {
            steps.entry(sibling.bdf).or_insert_with(|| sibling_step(device, sibling, &module_for));
        }
    }
    steps.into_values().collect()
}

/// The steps that give back every device of the policy that is on a VFIO driver.
///
/// Whether a device is held by a virtual machine cannot be seen in an inventory: the executor asks the kernel directly
/// before the act.
pub fn plan_unbind(inventory: &Inventory, policy: &Policy) -> Vec<Step> {
    let mut steps = BTreeMap::new();
    for device in selected(inventory, policy) {
        let group = siblings(inventory, device).filter(|function| function.vendor == NVIDIA);
        for function in std::iter::once(device).chain(group) {
            let (action, reason) = if function.is_vfio_bound() {
                (Action::Unbind, format!("bound to {}", function.driver.as_deref().unwrap_or_default()))
            } else {
                let driver = function.driver.as_deref();
                (Action::Leave, driver.map_or_else(|| "no driver".into(), |name| format!("not on VFIO but on {name}")))
            };
            steps.entry(function.bdf).or_insert(Step { bdf: function.bdf, action, reason });
        }
    }
    steps.into_values().collect()
}

const NVIDIA: u16 = 0x10de;

fn selected<'a>(inventory: &'a Inventory, policy: &Policy) -> impl Iterator<Item = &'a PciFunction> {
    let (only, nvswitches) = (policy.only, policy.nvswitches);
    let switches = inventory.nvswitches().filter(move |switch| nvswitches || only == Some(switch.bdf));
    inventory.gpus().chain(switches).filter(move |device| only.is_none_or(|bdf| bdf == device.bdf))
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
        function.bdf != device.bdf
            && of_group(function)
            && !function.is_gpu()
            && !function.is_nvswitch()
            && class != BRIDGE
            && class != HOST_BRIDGE
    })
}

fn bind_step(device: &PciFunction, take: bool, module_for: impl Fn(&PciFunction) -> String) -> Step {
    let (action, reason) = match device.driver.as_deref() {
        // Whichever VFIO driver it is: changing it under a group that a virtual machine may hold gains nothing.
        Some(driver) if device.is_vfio_bound() => (Action::Leave, format!("already bound to {driver}")),
        None => (Action::Bind { module: module_for(device) }, "it had no driver".into()),
        Some(driver) if take => (Action::Bind { module: module_for(device) }, format!("taken from {driver}, as asked")),
        Some(driver) => (
            Action::Refuse,
            format!("the {driver} driver has it: stop what uses it and unload {driver}, or pass --take-from-driver"),
        ),
    };
    Step { bdf: device.bdf, action, reason }
}

fn sibling_step(device: &PciFunction, sibling: &PciFunction, module_for: impl Fn(&PciFunction) -> String) -> Step {
    let shares = format!("shares {} with {}", group(device), device.bdf);
    let (action, reason) = match sibling.driver.as_deref() {
        _ if sibling.is_vfio_bound() => (Action::Leave, format!("{shares}; already on VFIO")),
        _ if sibling.vendor == NVIDIA => (Action::Bind { module: module_for(sibling) }, shares),
        None => (Action::Leave, format!("{shares}; it has no driver, which VFIO accepts")),
        Some(driver) => (
            Action::Refuse,
            format!(
                "{shares} and is on {driver}: the group cannot be given to a virtual machine until it leaves that \
                     driver or ACS separates the two"
            ),
        ),
    };
    Step { bdf: sibling.bdf, action, reason }
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
        plan_bind(&Inventory::scan(&fake.root()), policy, |_| "vfio_pci".into())
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
        let steps = plan_bind(&Inventory::scan(&fake.root()), &Policy::default(), |_| unreachable!("nothing to bind"));
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
        assert_eq!(bdfs(&Policy { nvswitches: true, ..Policy::default() }), [GPU, "0000:81:00.0"]);
        let only = Policy { only: "0000:81:00.0".parse().ok(), ..Policy::default() };
        assert_eq!(bdfs(&only), ["0000:81:00.0"]);
    }

    #[test]
    fn only_what_is_on_vfio_is_unbound() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci");
        fake.gpu("0000:42:00.0", 0x2330).group(6).driver("nvidia");
        fake.gpu("0000:43:00.0", 0x2330).group(7);
        let steps = plan_unbind(&Inventory::scan(&fake.root()), &Policy::default());
        let actions: Vec<String> = steps.iter().map(|step| step.action.to_string()).collect();
        assert_eq!(actions, ["unbind", "leave", "leave"]);
    }
}
