//! Pure: from what was observed and what is wanted to the units that the kubelet is told of.
//!
//! A unit is one GPU or NVSwitch with every function of its IOMMU group that is not a bridge, because the group is what
//! the kernel gives away as a whole. Two GPUs in one group are one unit for the same reason.

use std::collections::{BTreeMap, BTreeSet};

use agent_core::state::DevicesFile;
use hw_probe::config::Liveness;
use hw_probe::{Bdf, Inventory, PciFunction, pci_ids_name};

use crate::health::is_down;
use crate::names::{Naming, ResourceName, resource_name};

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Names of GPUs.
    pub gpu: Naming,
    /// Names of NVSwitches.
    pub nvswitch: Naming,
    /// What a unit's ID is.
    pub scheme: IdScheme,
    /// Which VFIO interface a device is handed over by.
    pub backend: BackendChoice,
    /// Whether cc-manager's word is needed.
    pub gate: CcGate,
}

impl Policy {
    /// How a GPU or switch is named.
    pub fn naming(&self, main: &PciFunction) -> &Naming {
        if main.is_nvswitch() { &self.nvswitch } else { &self.gpu }
    }
}

/// What a unit's ID is: the kubelet's device ID and the CDI device name alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdScheme {
    /// The PCI address, which stays the same across rebinds and reboots.
    Pci,
    /// The reference's: the number of the VFIO device node or of the IOMMU group. It moves.
    Iommu,
}

impl IdScheme {
    /// Its name on the command line and in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pci => "pci",
            Self::Iommu => "iommu",
        }
    }
}

/// Which VFIO interface is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendChoice {
    /// iommufd where the kernel has it and the device has a node, else the group.
    Auto,
    /// Per-device nodes only.
    Iommufd,
    /// Group nodes only.
    Legacy,
}

/// Whether a device needs cc-manager's word before it is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CcGate {
    /// No word, or one from another boot: not healthy.
    Require,
    /// The word counts where there is one; otherwise the plugin goes by its own checks.
    Off,
}

/// What was seen of the node at one moment.
#[derive(Clone, Debug)]
pub struct Observation {
    /// The PCI functions.
    pub inventory: Inventory,
    /// Whether the kernel offers `/dev/iommu`.
    pub iommufd: bool,
    /// Whether the kernel offers `/dev/vfio/vfio`.
    pub container: bool,
    /// Groups that have a node `/dev/vfio/<group>`.
    pub groups: BTreeSet<u32>,
    /// What each GPU and switch answered, or why it could not be asked.
    pub alive: BTreeMap<Bdf, Result<Liveness, String>>,
    /// cc-manager's word.
    pub verdicts: Verdicts,
    /// Resource and ID of what pods have, where units are called by that.
    pub given: BTreeSet<(String, String)>,
    /// Device nodes in a `/dev` of the kernel's own that are not what sysfs says, and how.
    pub wrong_nodes: BTreeMap<String, String>,
    /// Memory of the host that GPUs use as their own.
    pub egm: Vec<Egm>,
}

/// Extended GPU memory of a Grace node: memory of a CPU socket that the GPUs of that socket use as their own. Only who has all
/// of them may have it (operator-contract section 8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Egm {
    /// Its device node, `/dev/egm4`.
    pub node: String,
    /// The GPUs.
    pub gpus: BTreeSet<Bdf>,
}

/// cc-manager's word on the devices.
#[derive(Clone, Debug)]
pub enum Verdicts {
    /// There is none that counts, and why.
    Unknown(String),
    /// The file, of this boot.
    Known(DevicesFile),
}

/// Which VFIO interface a unit is handed over by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// `/dev/vfio/devices/vfioN`.
    Iommufd,
    /// `/dev/vfio/<group>` with `/dev/vfio/vfio`.
    Legacy,
}

/// One thing that the kubelet can hand out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Device ID for the kubelet, device name for CDI.
    pub id: String,
    /// The resource it is counted under.
    pub resource: ResourceName,
    /// The GPU or switch; the first by address where a group has more.
    pub bdf: Bdf,
    /// Vendor and device id of it: another device at the same address is another unit.
    pub ids: (u16, u16),
    /// Every function that goes along, the GPU or switch first.
    pub functions: Vec<Bdf>,
    /// Interface that the nodes belong to.
    pub backend: Backend,
    /// Device nodes that the virtual machine needs, in order; empty while there are none.
    pub nodes: Vec<String>,
    /// Nodes of both interfaces, as far as the kernel offers them: the container's and the group's, the functions' own,
    /// and iommufd's. KubeVirt opens what it likes.
    pub all_nodes: Vec<String>,
    /// The extended memories that its functions share in.
    pub egm: Vec<Egm>,
    /// NUMA nodes.
    pub numa: BTreeSet<u32>,
    /// The bridges above the GPU or switch, nearest first.
    pub upstream: Vec<Bdf>,
    /// Whether cc-manager has verified it in protected PCIe, where GPUs and switches are of use all together only.
    pub ppcie: bool,
    /// Why it cannot be used, if it cannot.
    pub fault: Option<Fault>,
}

impl Unit {
    /// One that no more is known of than what it is: what else there is of it is to be found.
    pub(crate) fn bare(id: String, resource: ResourceName, bdf: Bdf, ids: (u16, u16)) -> Self {
        Self {
            id,
            resource,
            bdf,
            ids,
            functions: vec![bdf],
            backend: Backend::Iommufd,
            nodes: Vec::new(),
            all_nodes: Vec::new(),
            egm: Vec::new(),
            numa: BTreeSet::new(),
            upstream: Vec::new(),
            ppcie: false,
            fault: None,
        }
    }

    /// Whether a pod may get it.
    pub fn is_healthy(&self) -> bool {
        self.fault.is_none()
    }

    /// Key for a stable order of IDs: numbers by value, then texts.
    pub fn order(&self) -> (u64, &str) {
        order_of(&self.id)
    }
}

#[cfg(test)]
impl Unit {
    /// A healthy H100 of `nvidia.com/pgpu` on iommufd, without nodes: what a test wants otherwise, it sets.
    pub(crate) fn sample(id: &str) -> Self {
        let bdf = id.parse().unwrap_or("0000:41:00.0".parse().unwrap());
        Self::bare(id.into(), "pgpu".parse().unwrap(), bdf, (0x10de, 0x2330))
    }
}

/// Key for a stable order of IDs: numbers by value, then texts.
pub fn order_of(id: &str) -> (u64, &str) {
    (id.parse().unwrap_or(u64::MAX), id)
}

/// Why a unit cannot be used. The text goes to logs and to the pod that asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A mode change is under way.
    #[error("The node is changing to CC mode {target} (step: {step})")]
    Transition {
        /// Wanted mode.
        target: String,
        /// How far it has come.
        step: String,
    },
    /// The driver is none or not VFIO.
    #[error("{bdf} is bound to {driver}, not to a VFIO driver; vfio-manager binds it", driver = .driver.as_deref().unwrap_or("no driver"))]
    NotVfio {
        /// The function.
        bdf: Bdf,
        /// Its driver.
        driver: Option<String>,
    },
    /// No IOMMU.
    #[error("{0} is in no IOMMU group; turn the IOMMU on in firmware and kernel command line")]
    NoGroup(Bdf),
    /// Another driver works in the group, and the kernel would refuse to give the group away.
    #[error("IOMMU group {group} also holds {bdf} with driver {driver}; unbind it or bind it to a VFIO driver")]
    NotViable {
        /// The group.
        group: u32,
        /// The other function.
        bdf: Bdf,
        /// Its driver.
        driver: String,
    },
    /// A device node is missing.
    #[error("The kernel offers no {0}")]
    NoNode(String),
    /// A device node is there and is another device's.
    #[error(
        "{node} is not the device that the kernel tells of: {cause}; remove it, and let udev or a reboot make it again"
    )]
    WrongNode {
        /// The node.
        node: String,
        /// What is wrong with it.
        cause: String,
    },
    /// In D3cold without having been suspended by its driver.
    #[error("{0} has lost its power (D3cold), though its driver has not suspended it")]
    Cold(Bdf),
    /// Reads of configuration space give ones.
    #[error("{0} does not answer: it is off the bus, or its link is down")]
    Dead(Bdf),
    /// Reads of configuration space give another vendor.
    #[error("{bdf} is not ready: its vendor id reads {vendor:#06x}")]
    NotReady {
        /// The function.
        bdf: Bdf,
        /// What was read.
        vendor: u16,
    },
    /// Configuration space answers, and the link has no lanes.
    #[error("{0} has lost its link: no lane is in use; reseat it, and look for link errors in the kernel log")]
    LinkDown(Bdf),
    /// Configuration space cannot be read.
    #[error("{bdf}: configuration space cannot be read: {cause}")]
    Unreadable {
        /// The function.
        bdf: Bdf,
        /// What the kernel said.
        cause: String,
    },
    /// cc-manager says no.
    #[error("{bdf} is held back by cc-manager: {cause}")]
    NotUsable {
        /// The function.
        bdf: Bdf,
        /// Its words.
        cause: String,
    },
    /// cc-manager says nothing, and its word is required.
    #[error("cc-manager has not verified {bdf} in this boot: {cause}")]
    NotVerified {
        /// The function.
        bdf: Bdf,
        /// What is missing.
        cause: String,
    },
    /// The node could not be looked at.
    #[error("The node could not be observed: {0}")]
    Unobserved(String),
    /// Well now, and has fallen ill too often for that to be relied upon.
    #[error(
        "{bdf} has come and gone {falls} times (last cause: {cause}); it is offered again when it has been quiet for a while"
    )]
    Flapping {
        /// The GPU or switch.
        bdf: Bdf,
        /// How often.
        falls: usize,
        /// Code of the last fault.
        cause: &'static str,
    },
    /// In use without a pod.
    #[error("{bdf} is held by {by}, though the kubelet has given it to no pod; it is offered again when it is let go")]
    Held {
        /// The GPU or switch.
        bdf: Bdf,
        /// Who has it.
        by: String,
    },
    /// A pod has it under a name or an ID that it does not have any more.
    #[error(
        "{bdf} is with pod {pod} as {id} of {resource}, which it is called no more; it is offered again when the pod has ended"
    )]
    GivenOtherwise {
        /// The GPU or switch.
        bdf: Bdf,
        /// Its resource then.
        resource: String,
        /// Its ID then.
        id: String,
        /// The pod.
        pod: String,
    },
    /// The CDI file is not there, so Kata could not find the device.
    #[error("The CDI file could not be written: {0}")]
    NoCdi(String),
    /// Another file stands in the way of Kata's finding the device.
    #[error("{0}")]
    CdiConflict(String),
    /// Another file lets Kata find no device at all.
    #[error("{0}")]
    CdiBroken(String),
}

impl Fault {
    /// A stable code for logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Transition { .. } => "in-transition",
            Self::NotVfio { .. } => "not-vfio",
            Self::NoGroup(_) => "no-iommu-group",
            Self::NotViable { .. } => "group-not-viable",
            Self::NoNode(_) => "no-vfio-node",
            Self::WrongNode { .. } => "wrong-vfio-node",
            Self::Cold(_) => "d3cold",
            Self::Dead(_) => "dead",
            Self::NotReady { .. } => "not-ready",
            Self::LinkDown(_) => "link-down",
            Self::Unreadable { .. } => "config-unreadable",
            Self::NotUsable { .. } => "cc-not-usable",
            Self::NotVerified { .. } => "cc-not-verified",
            Self::Unobserved(_) => "unobserved",
            Self::Flapping { .. } => "flapping",
            Self::Held { .. } => "held",
            Self::GivenOtherwise { .. } => "given-otherwise",
            Self::NoCdi(_) => "no-cdi",
            Self::CdiConflict(_) => "cdi-conflict",
            Self::CdiBroken(_) => "cdi-broken",
        }
    }
}

/// The units of the node. `before` is what the last call gave: a unit once offered stays listed, with its fault, until
/// its function leaves PCI.
pub fn units(policy: &Policy, seen: &Observation, before: &[Unit]) -> Vec<Unit> {
    let mut units: Vec<Unit> =
        candidates(&seen.inventory).into_iter().filter_map(|group| unit(policy, seen, before, &group)).collect();
    // What is on the bus and cannot be told what it is has not left it.
    let unclassified = before.iter().filter_map(|unit| {
        let found = seen.inventory.unclassified.iter().find(|found| found.bdf == unit.bdf)?;
        Some(Unit { fault: Some(Fault::Unobserved(found.to_string())), ..unit.clone() })
    });
    let unclassified: Vec<Unit> = unclassified.collect();
    // Another GPU of its group is no unit beside it.
    units.retain(|unit| unclassified.iter().all(|lost| !lost.functions.contains(&unit.bdf)));
    units.extend(unclassified);
    settle_ids(&mut units);
    units.sort_by(|a, b| (&a.resource, a.order()).cmp(&(&b.resource, b.order())));
    units
}

/// `units` as they are to be told at once when cc-manager has spoken and the node has not been looked at since: what its
/// word takes away is taken away, and nothing is given back. That waits for the look.
pub fn withdrawn(policy: &Policy, seen: &Observation, units: &[Unit]) -> Vec<Unit> {
    let heard = self::units(policy, seen, units);
    let fault = |unit: &Unit| heard.iter().find(|now| now.bdf == unit.bdf && now.ids == unit.ids)?.fault.clone();
    units.iter().map(|unit| Unit { fault: unit.fault.clone().or_else(|| fault(unit)), ..unit.clone() }).collect()
}

/// GPUs and switches, those that share an IOMMU group together, each list by address.
fn candidates(inventory: &Inventory) -> Vec<Vec<&PciFunction>> {
    let mut mains: Vec<&PciFunction> =
        inventory.gpus().chain(inventory.nvswitches().filter(|switch| !switch.is_virtual_function)).collect();
    mains.sort_by_key(|main| main.bdf);
    let mut groups: Vec<Vec<&PciFunction>> = Vec::new();
    for main in mains {
        let shared = groups.iter_mut().find(|group| {
            main.iommu_group.is_some() && group.first().is_some_and(|first| first.iommu_group == main.iommu_group)
        });
        match shared {
            Some(group) => group.push(main),
            None => groups.push(vec![main]),
        }
    }
    groups
}

fn unit(policy: &Policy, seen: &Observation, before: &[Unit], mains: &[&PciFunction]) -> Option<Unit> {
    let lead = *mains.first()?;
    let known = before.iter().find(|unit| unit.bdf == lead.bdf && unit.ids == (lead.vendor, lead.device));
    if known.is_none() && !mains.iter().any(|main| main.is_vfio_bound()) {
        return None;
    }
    let mut members = mains.to_vec();
    if let Some(group) = lead.iommu_group {
        let others = seen.inventory.group_members(group).filter(|other| !is_bridge(other));
        members.extend(others.filter(|other| mains.iter().all(|main| main.bdf != other.bdf)));
    }
    let bound: Vec<&PciFunction> = members.iter().copied().filter(|member| member.is_vfio_bound()).collect();
    let backend = backend(policy.backend, seen, &bound);
    let nodes = if bound.is_empty() { Err(None) } else { nodes(backend, seen, lead, &bound).map_err(Some) };
    let fault = transition(seen)
        .or_else(|| binding(mains))
        .or_else(|| viability(&seen.inventory, lead))
        .or_else(|| nodes.as_ref().err().cloned().flatten())
        .or_else(|| nodes.as_ref().ok().and_then(|nodes| nodes.iter().find_map(|node| wrong_node(seen, node))))
        .or_else(|| mains.iter().find_map(|main| liveness(seen, main)))
        .or_else(|| mains.iter().find_map(|main| link(main)))
        .or_else(|| mains.iter().find_map(|main| verdict(policy.gate, seen, main)));
    let resource = resource_name(policy.naming(lead), lead, pci_ids_name(lead.vendor, lead.device));
    Some(Unit {
        id: id(policy.scheme, backend, lead)
            .map(|id| as_given(&seen.given, &resource, lead, id))
            .or_else(|| known.map(|unit| unit.id.clone()))
            .unwrap_or_else(|| lead.bdf.to_string()),
        resource,
        bdf: lead.bdf,
        ids: (lead.vendor, lead.device),
        functions: members.iter().map(|member| member.bdf).collect(),
        backend,
        nodes: nodes.unwrap_or_default(),
        all_nodes: all_nodes(seen, lead, &bound),
        egm: seen
            .egm
            .iter()
            .filter(|egm| members.iter().any(|member| egm.gpus.contains(&member.bdf)))
            .cloned()
            .collect(),
        upstream: lead.upstream.clone(),
        ppcie: is_ppcie(seen, lead),
        numa: mains.iter().filter_map(|main| main.numa_node).collect(),
        fault,
    })
}

/// Host and PCI-to-PCI bridges: they carry no driver that would stand in the way of VFIO, and are never handed over.
/// An NVSwitch is of another sub-class (0x0680).
fn is_bridge(function: &PciFunction) -> bool {
    matches!(function.class >> 8, 0x0600 | 0x0604 | 0x0609)
}

/// One decision for the whole unit: a virtual machine cannot take half a group through one interface and half through
/// the other.
fn backend(choice: BackendChoice, seen: &Observation, bound: &[&PciFunction]) -> Backend {
    match choice {
        BackendChoice::Iommufd => Backend::Iommufd,
        BackendChoice::Auto if seen.iommufd && bound.iter().all(|member| member.vfio_cdev.is_some()) => {
            Backend::Iommufd
        }
        BackendChoice::Auto | BackendChoice::Legacy => Backend::Legacy,
    }
}

fn nodes(
    backend: Backend,
    seen: &Observation,
    lead: &PciFunction,
    bound: &[&PciFunction],
) -> Result<Vec<String>, Fault> {
    match backend {
        Backend::Iommufd if !seen.iommufd => Err(Fault::NoNode("/dev/iommu".into())),
        Backend::Iommufd => bound
            .iter()
            .map(|member| match &member.vfio_cdev {
                // Nothing that VFIO makes has major number 0: such a `dev` file is not one.
                Some(cdev) if cdev.major != 0 => Ok(format!("/dev/vfio/devices/{}", cdev.name)),
                _ => Err(Fault::NoNode(format!("VFIO device node for {}", member.bdf))),
            })
            .collect(),
        Backend::Legacy => {
            let group = lead.iommu_group.ok_or(Fault::NoGroup(lead.bdf))?;
            if !seen.container {
                Err(Fault::NoNode("/dev/vfio/vfio".into()))
            } else if !seen.groups.contains(&group) {
                Err(Fault::NoNode(format!("/dev/vfio/{group}")))
            } else {
                Ok(vec!["/dev/vfio/vfio".into(), format!("/dev/vfio/{group}")])
            }
        }
    }
}

fn all_nodes(seen: &Observation, lead: &PciFunction, bound: &[&PciFunction]) -> Vec<String> {
    let group = nodes(Backend::Legacy, seen, lead, bound).unwrap_or_default();
    let own = nodes(Backend::Iommufd, seen, lead, bound).unwrap_or_default();
    let iommufd = (!own.is_empty()).then(|| "/dev/iommu".to_owned());
    if bound.is_empty() { Vec::new() } else { group.into_iter().chain(own).chain(iommufd).collect() }
}

fn id(scheme: IdScheme, backend: Backend, lead: &PciFunction) -> Option<String> {
    match (scheme, backend) {
        (IdScheme::Pci, _) => Some(lead.bdf.to_string()),
        (IdScheme::Iommu, _) if !lead.is_vfio_bound() => None,
        (IdScheme::Iommu, Backend::Iommufd) => {
            lead.vfio_cdev.as_ref().and_then(|cdev| cdev.name.strip_prefix("vfio")).map(str::to_owned)
        }
        (IdScheme::Iommu, Backend::Legacy) => lead.iommu_group.map(|group| group.to_string()),
    }
}

/// Where units go by numbers, one that a pod has by its address, and by that alone, stays called so.
fn as_given(given: &BTreeSet<(String, String)>, resource: &ResourceName, lead: &PciFunction, id: String) -> String {
    let has = |id: &str| given.contains(&(resource.to_string(), id.to_owned()));
    let address = lead.bdf.to_string();
    if has(&address) && !has(&id) { address } else { id }
}

/// Numbers of device nodes and of groups come from two counters and may meet, and a number that an unbound device had
/// may have gone to another. The usable one keeps the number; the other is called by its address.
fn settle_ids(units: &mut [Unit]) {
    let mut taken: BTreeSet<String> = BTreeSet::new();
    let mut order: Vec<usize> = (0..units.len()).collect();
    order.sort_by_key(|&at| (units[at].nodes.is_empty(), units[at].bdf));
    for at in order {
        if !taken.insert(units[at].id.clone()) {
            units[at].id = units[at].bdf.to_string();
            taken.insert(units[at].id.clone());
        }
    }
}

fn transition(seen: &Observation) -> Option<Fault> {
    match &seen.verdicts {
        Verdicts::Known(DevicesFile { transition: Some(under_way), .. }) => {
            Some(Fault::Transition { target: under_way.target.clone(), step: under_way.step.clone() })
        }
        _ => None,
    }
}

fn binding(mains: &[&PciFunction]) -> Option<Fault> {
    let other = mains.iter().find(|main| !main.is_vfio_bound())?;
    Some(Fault::NotVfio { bdf: other.bdf, driver: other.driver.clone() })
}

/// The kernel gives a group away only when no other driver does DMA in it.
fn viability(inventory: &Inventory, lead: &PciFunction) -> Option<Fault> {
    let Some(group) = lead.iommu_group else { return Some(Fault::NoGroup(lead.bdf)) };
    let unclassified = inventory.unclassified.iter().filter(|other| other.iommu_group == Some(group));
    let blockers = inventory.group_blockers(group).map(|other| (other.bdf, &other.driver));
    let all =
        blockers.chain(unclassified.filter(|other| other.blocks_its_group()).map(|other| (other.bdf, &other.driver)));
    let (bdf, driver) = all.min()?;
    Some(Fault::NotViable { group, bdf, driver: driver.clone().unwrap_or_default() })
}

fn liveness(seen: &Observation, main: &PciFunction) -> Option<Fault> {
    let bdf = main.bdf;
    match seen.alive.get(&bdf) {
        Some(Ok(Liveness::Answers)) => None,
        Some(Ok(Liveness::Silent)) => Some(Fault::Dead(bdf)),
        Some(&Ok(Liveness::Other(vendor))) => Some(Fault::NotReady { bdf, vendor }),
        // vfio-pci suspends a device that nobody has opened, and a platform may then cut the slot's power. It is idle and
        // not dead: opening it wakes it. It is not asked, since that would wake it, too. Cold while the kernel believes
        // that it runs is another matter.
        Some(Ok(Liveness::Asleep)) if main.power.runtime_status.as_deref() == Some("suspended") => None,
        Some(Ok(Liveness::Asleep)) => Some(Fault::Cold(bdf)),
        Some(Err(cause)) => Some(Fault::Unreadable { bdf, cause: cause.clone() }),
        None => Some(Fault::Unreadable { bdf, cause: "Not read".into() }),
    }
}

fn is_ppcie(seen: &Observation, main: &PciFunction) -> bool {
    let Verdicts::Known(file) = &seen.verdicts else { return false };
    file.record(main).is_some_and(|record| record.active_mode.as_deref() == Some("ppcie"))
}

/// A device that answers though no lane is in use is about to be lost. The link of one that sleeps may rest.
fn link(main: &PciFunction) -> Option<Fault> {
    let sleeps = main.power.runtime_status.as_deref() == Some("suspended");
    (!sleeps && main.link.as_ref().is_some_and(is_down)).then_some(Fault::LinkDown(main.bdf))
}

fn wrong_node(seen: &Observation, node: &str) -> Option<Fault> {
    seen.wrong_nodes.get(node).map(|cause| Fault::WrongNode { node: node.to_owned(), cause: cause.clone() })
}

fn verdict(gate: CcGate, seen: &Observation, main: &PciFunction) -> Option<Fault> {
    let bdf = main.bdf;
    let missing = |cause: &str| match gate {
        CcGate::Require => Some(Fault::NotVerified { bdf, cause: cause.to_owned() }),
        CcGate::Off => None,
    };
    match &seen.verdicts {
        Verdicts::Unknown(why) => missing(why),
        Verdicts::Known(file) => match file.record(main) {
            None => missing("It has no record of this device"),
            Some(record) if record.usable => None,
            Some(record) => Some(Fault::NotUsable {
                bdf,
                cause: record.error.as_ref().map_or_else(
                    || "It is not verified in the wanted mode".into(),
                    |error| format!("{} ({})", error.message, error.code),
                ),
            }),
        },
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_code_is_explained_once_and_no_other_is() {
        let source = include_str!("units.rs");
        let body = source.split("pub fn code(&self)").nth(1).unwrap().split("\n    }\n").next().unwrap();
        let codes: Vec<&str> = body.lines().filter_map(|line| line.split_once("=> \"")?.1.split('"').next()).collect();
        assert!(codes.len() > 12 && codes.contains(&"held") && codes.contains(&"no-cdi"), "{codes:?}");
        let page = include_str!("../../../docs/troubleshooting.md");
        let page = page.split("## Codes of device-plugin").nth(1).unwrap().split("\n## ").next().unwrap();
        let rows: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
        for code in &codes {
            assert_eq!(rows.iter().filter(|row| row == &code).count(), 1, "{code} in docs/troubleshooting.md");
        }
        let left: Vec<&&str> = rows.iter().filter(|row| !codes.contains(row)).collect();
        assert!(left.is_empty(), "docs/troubleshooting.md explains codes that nothing has: {left:?}");
    }
}
