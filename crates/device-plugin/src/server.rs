//! What the kubelet asks one resource: the gRPC service of the device plugin interface, v1beta1.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, StreamExt};
use hw_probe::Bdf;
use kubelet_api::device_plugin::{
    AllocateRequest, AllocateResponse, CdiDevice, ContainerAllocateResponse, ContainerPreferredAllocationRequest,
    ContainerPreferredAllocationResponse, Device, DevicePluginOptions, DeviceSpec, Empty, ListAndWatchResponse,
    NumaNode, PreStartContainerRequest, PreStartContainerResponse, PreferredAllocationRequest,
    PreferredAllocationResponse, TopologyInfo, device_plugin_server::DevicePlugin,
};
use kubelet_api::{HEALTHY, UNHEALTHY};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use crate::checkpoint::Lately;
use crate::metrics::PluginMetrics;
use crate::names::ResourceName;
use crate::preferred::preferred;
use crate::units::{Backend, BackendChoice, Unit};

/// Longest name part of an annotation's key.
const KEY: usize = 63;

/// The units of one resource at one moment.
pub type Snapshot = Arc<Vec<Unit>>;

/// Whose plugin this is in the place of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Kata's: nodes of one interface, and CDI files.
    #[default]
    Kata,
    /// KubeVirt's: resources by model, nodes of both interfaces and the addresses in the environment, no CDI files.
    Kubevirt,
}

/// What becomes of a request for a part of a protected PCIe domain, whose GPUs and switches are of use all together only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PpciePolicy {
    /// It is refused.
    Enforce,
    /// It is granted, logged and counted.
    #[default]
    Warn,
    /// It is granted.
    Off,
}

/// How requests are answered.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// In whose place.
    pub role: Role,
    /// Whether an answer names CDI devices beside the nodes.
    pub cdi_in_allocate: bool,
    /// What becomes of parts of a protected PCIe domain.
    pub ppcie: PpciePolicy,
    /// Which interface the node is set to.
    pub backend: BackendChoice,
}

impl Default for Manner {
    fn default() -> Self {
        Self { role: Role::Kata, cdi_in_allocate: false, ppcie: PpciePolicy::Warn, backend: BackendChoice::Auto }
    }
}

/// What the plugin offers beyond listing and allocating.
pub(crate) fn options() -> DevicePluginOptions {
    DevicePluginOptions { pre_start_required: false, get_preferred_allocation_available: true }
}

/// The service for one resource.
#[derive(Debug)]
pub struct Service {
    resource: ResourceName,
    units: watch::Receiver<Snapshot>,
    manner: Manner,
    metrics: PluginMetrics,
    lately: Lately,
    streams: watch::Sender<usize>,
    stop: watch::Receiver<bool>,
}

impl Service {
    /// Serves `units`, and notes what it allocates in `lately`; counts open ListAndWatch streams in `streams`, and ends them
    /// when `stop` becomes true.
    pub(crate) fn new(
        resource: ResourceName,
        units: watch::Receiver<Snapshot>,
        manner: Manner,
        metrics: PluginMetrics,
        lately: Lately,
        streams: watch::Sender<usize>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        Self { resource, units, manner, metrics, lately, streams, stop }
    }
}

/// Counts one open stream for as long as it lives.
struct Counted(watch::Sender<usize>);

impl Counted {
    fn new(streams: watch::Sender<usize>) -> Self {
        streams.send_modify(|count| *count += 1);
        Self(streams)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

#[tonic::async_trait]
impl DevicePlugin for Service {
    async fn get_device_plugin_options(&self, _: Request<Empty>) -> Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(options()))
    }

    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<ListAndWatchResponse, Status>> + Send>>;

    async fn list_and_watch(&self, _: Request<Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let counted = Counted::new(self.streams.clone());
        let mut stop = self.stop.clone();
        let stopped = async move {
            // A sender that is gone means the same as the word to stop.
            let _ = stop.wait_for(|stop| *stop).await;
        };
        let mut sent: Option<ListAndWatchResponse> = None;
        let stream = WatchStream::new(self.units.clone())
            .filter_map(move |units| {
                let _held = &counted;
                let list = list(&units);
                // The kubelet does not hear reasons: a list that differs in nothing else is no news.
                let news = (sent.as_ref() != Some(&list)).then(|| {
                    sent = Some(list.clone());
                    Ok(list)
                });
                std::future::ready(news)
            })
            .take_until(Box::pin(stopped));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        let units = self.units.borrow().clone();
        let requests = request.into_inner().container_requests;
        let answers = requests.iter().map(|request| prefer(&units, request));
        Ok(Response::new(PreferredAllocationResponse { container_responses: answers.collect::<Result<_, _>>()? }))
    }

    async fn allocate(&self, request: Request<AllocateRequest>) -> Result<Response<AllocateResponse>, Status> {
        let begun = Instant::now();
        let units = self.units.borrow().clone();
        let request = request.into_inner();
        let result = allocate(&self.resource, &units, &request, self.manner);
        let is_given = result.is_ok();
        let answer = match result {
            Ok(Allocation { response, partial }) => {
                if let Some(partial) = partial {
                    self.metrics.partial(&self.resource);
                    tracing::warn!(event = "partial_domain", resource = %self.resource, reason = %partial, "A part of the domain was allocated");
                }
                let ids: Vec<&str> = request
                    .container_requests
                    .iter()
                    .flat_map(|request| &request.devices_ids)
                    .map(String::as_str)
                    .collect();
                self.lately.note(&self.resource, ids.iter().copied());
                let ids = ids.join(",");
                tracing::info!(event = "allocated", resource = %self.resource, ids, "Units were allocated to a pod");
                Ok(Response::new(response))
            }
            Err(refusal) => {
                if matches!(refusal, Refusal::Partial(_)) {
                    self.metrics.partial(&self.resource);
                }
                let status = refusal.status();
                tracing::warn!(
                    event = "allocation_refused", resource = %self.resource, code = ?status.code(),
                    reason = status.message(), "An allocation was refused"
                );
                Err(status)
            }
        };
        self.metrics.allocation(&self.resource, is_given, begun.elapsed());
        answer
    }

    async fn pre_start_container(
        &self,
        _: Request<PreStartContainerRequest>,
    ) -> Result<Response<PreStartContainerResponse>, Status> {
        Ok(Response::new(PreStartContainerResponse {}))
    }
}

/// The whole list, as the kubelet gets it.
fn list(units: &[Unit]) -> ListAndWatchResponse {
    let device = |unit: &Unit| Device {
        id: unit.id.clone(),
        health: if unit.is_healthy() { HEALTHY } else { UNHEALTHY }.to_owned(),
        topology: (!unit.numa.is_empty())
            .then(|| TopologyInfo { nodes: unit.numa.iter().map(|&node| NumaNode { id: i64::from(node) }).collect() }),
    };
    ListAndWatchResponse { devices: units.iter().map(device).collect() }
}

/// An ID as it may appear in a message: the kubelet shows it in the pod's event, so that it must be short and plain.
pub(crate) fn shown(id: &str) -> String {
    let short: String = id.chars().take(64).collect();
    format!("{short:?}{}", if short.len() < id.len() { "..." } else { "" })
}

/// A request for some of the units that are of use all together only.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{asked} of the {all} devices of {resource} are asked for, and the node is in protected PCIe, where GPUs and NVSwitches \
     are of use all together only; ask for all of both in one container of one pod"
)]
pub struct Partial {
    resource: ResourceName,
    asked: usize,
    all: usize,
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No container.
    #[error("The request for {0} names no container")]
    NoContainer(ResourceName),
    /// A container without devices.
    #[error("The request for {0} names no device")]
    NoDevice(ResourceName),
    /// An ID that is not on this node.
    #[error("There is no device {} of {resource} on this node", shown(.id))]
    Unknown {
        /// The resource.
        resource: ResourceName,
        /// As it was asked for.
        id: String,
    },
    /// One ID, two times.
    #[error("Device {id} of {resource} is asked for twice")]
    Twice {
        /// The resource.
        resource: ResourceName,
        /// The ID.
        id: String,
    },
    /// A unit that cannot be used.
    #[error("Device {id} of {resource} cannot be used: {cause} ({code})")]
    Unusable {
        /// The resource.
        resource: ResourceName,
        /// The ID.
        id: String,
        /// Why.
        cause: String,
        /// A stable word for it.
        code: &'static str,
    },
    /// A part of the domain.
    #[error(transparent)]
    Partial(#[from] Partial),
}

impl Refusal {
    /// As the kubelet hears it, and shows it in the pod's event.
    pub fn status(&self) -> Status {
        let text = self.to_string();
        match self {
            Self::NoContainer(_) | Self::NoDevice(_) | Self::Twice { .. } => Status::invalid_argument(text),
            Self::Unknown { .. } => Status::not_found(text),
            Self::Unusable { .. } | Self::Partial(_) => Status::failed_precondition(text),
        }
    }
}

/// What is given.
#[derive(Clone, Debug)]
pub struct Allocation {
    /// For the kubelet.
    pub response: AllocateResponse,
    /// Set where less than the domain is given, and policy says to tell.
    pub partial: Option<Partial>,
}

/// Pure: the answer to a request for units of `resource`, of which `units` are there at this moment.
pub fn allocate(
    resource: &ResourceName,
    units: &[Unit],
    request: &AllocateRequest,
    manner: Manner,
) -> Result<Allocation, Refusal> {
    if request.container_requests.is_empty() {
        return Err(Refusal::NoContainer(resource.clone()));
    }
    let known: BTreeMap<&str, &Unit> = units.iter().map(|unit| (unit.id.as_str(), unit)).collect();
    let mut given: BTreeSet<&str> = BTreeSet::new();
    let mut container_responses = Vec::new();
    for request in &request.container_requests {
        if request.devices_ids.is_empty() {
            return Err(Refusal::NoDevice(resource.clone()));
        }
        let mut chosen: Vec<&Unit> = Vec::new();
        for id in &request.devices_ids {
            let Some(&unit) = known.get(id.as_str()) else {
                return Err(Refusal::Unknown { resource: resource.clone(), id: id.clone() });
            };
            if !given.insert(&unit.id) {
                return Err(Refusal::Twice { resource: resource.clone(), id: unit.id.clone() });
            }
            if let Some(fault) = &unit.fault {
                return Err(Refusal::Unusable {
                    resource: resource.clone(),
                    id: unit.id.clone(),
                    cause: fault.to_string(),
                    code: fault.code(),
                });
            }
            chosen.push(unit);
        }
        container_responses.push(container(resource, &chosen, manner));
    }
    let is_part = given.len() < units.len() && units.iter().any(|unit| unit.ppcie);
    let partial = Partial { resource: resource.clone(), asked: given.len(), all: units.len() };
    let partial = match manner.ppcie {
        PpciePolicy::Enforce if is_part => return Err(partial.into()),
        PpciePolicy::Warn if is_part => Some(partial),
        _ => None,
    };
    Ok(Allocation { response: AllocateResponse { container_responses }, partial })
}

fn container(resource: &ResourceName, units: &[&Unit], manner: Manner) -> ContainerAllocateResponse {
    // All legacy units share the container's node; it is named once.
    let mut nodes: Vec<String> = Vec::new();
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for node in units.iter().flat_map(|unit| unit_nodes(unit, manner)).chain(extended_memory(units, manner)) {
        if seen.insert(node.clone()) {
            nodes.push(node);
        }
    }
    let devices = nodes.into_iter().map(|node| DeviceSpec {
        container_path: node.clone(),
        host_path: node,
        permissions: "mrw".to_owned(),
    });
    let mut response = ContainerAllocateResponse { devices: devices.collect(), ..Default::default() };
    if manner.role == Role::Kubevirt {
        let addresses: Vec<String> = units.iter().map(|unit| unit.bdf.to_string()).collect();
        response.envs.insert(environment(resource), addresses.join(","));
    } else if manner.cdi_in_allocate {
        let names: Vec<String> = units.iter().map(|unit| format!("{resource}={}", unit.id)).collect();
        response.annotations.insert(annotation(resource), names.join(","));
        response.cdi_devices = names.into_iter().map(|name| CdiDevice { name }).collect();
    }
    response
}

fn unit_nodes(unit: &Unit, manner: Manner) -> Vec<String> {
    match (manner.role, manner.backend, unit.backend) {
        (Role::Kubevirt, BackendChoice::Auto, _) => unit.all_nodes.clone(),
        (Role::Kubevirt, _, Backend::Iommufd) => {
            unit.nodes.iter().cloned().chain(std::iter::once("/dev/iommu".to_owned())).collect()
        }
        (Role::Kata, ..) | (Role::Kubevirt, _, Backend::Legacy) => unit.nodes.clone(),
    }
}

/// KubeVirt's virtual machines get the extended memory whose GPUs they have all: with fewer, two of them would share it.
fn extended_memory(units: &[&Unit], manner: Manner) -> BTreeSet<String> {
    if manner.role == Role::Kata {
        return BTreeSet::new();
    }
    let given: BTreeSet<Bdf> = units.iter().flat_map(|unit| &unit.functions).copied().collect();
    let whole = units.iter().flat_map(|unit| &unit.egm).filter(|egm| egm.gpus.is_subset(&given));
    whole.map(|egm| egm.node.clone()).collect()
}

/// The variable in which virt-launcher looks for addresses: it makes the name from the resource's in this way, and leaves
/// hyphens as they are.
fn environment(resource: &ResourceName) -> String {
    format!("PCI_RESOURCE_{}", resource.to_string().to_uppercase().replace(['/', '.'], "_"))
}

/// The key under which runtimes without CDI fields look for CDI devices; one a resource, as a container may have several.
fn annotation(resource: &ResourceName) -> String {
    let name = format!("ccnode_{}", resource.class());
    if name.len() <= KEY {
        format!("cdi.k8s.io/{name}")
    } else {
        format!("cdi.k8s.io/ccnode_{:016x}", digest(resource))
    }
}

/// Tells long names apart where they do not fit.
pub(crate) fn digest(resource: &ResourceName) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    resource.class().bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

fn prefer(
    units: &[Unit],
    request: &ContainerPreferredAllocationRequest,
) -> Result<ContainerPreferredAllocationResponse, Status> {
    let (available, must) = (&request.available_device_ids, &request.must_include_device_ids);
    let chosen = preferred(units, available, must, request.allocation_size)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    Ok(ContainerPreferredAllocationResponse { device_ids: chosen.into_iter().map(str::to_owned).collect() })
}

#[cfg(test)]
mod tests {
    use kubelet_api::device_plugin::ContainerAllocateRequest;

    use super::*;
    use crate::units::{Egm, Fault};

    fn pgpu() -> ResourceName {
        "pgpu".parse().unwrap()
    }

    fn ask(ids: &[&[&str]]) -> AllocateRequest {
        let texts = |ids: &&[&str]| ids.iter().map(ToString::to_string).collect();
        AllocateRequest {
            container_requests: ids.iter().map(|ids| ContainerAllocateRequest { devices_ids: texts(ids) }).collect(),
        }
    }

    /// A unit with nodes of both interfaces, at hand by `backend`.
    fn unit(bdf: &str, number: u32, backend: Backend) -> Unit {
        let group = vec!["/dev/vfio/vfio".to_owned(), format!("/dev/vfio/{number}")];
        let own = format!("/dev/vfio/devices/vfio{number}");
        let all = group.iter().cloned().chain([own.clone(), "/dev/iommu".into()]).collect();
        let nodes = if backend == Backend::Legacy { group } else { vec![own] };
        Unit { backend, nodes, all_nodes: all, ..Unit::sample(bdf) }
    }

    fn answer(units: &[Unit], manner: Manner) -> ContainerAllocateResponse {
        let ids: Vec<&str> = units.iter().map(|unit| unit.id.as_str()).collect();
        let given = allocate(&units[0].resource, units, &ask(&[&ids]), manner).unwrap();
        given.response.container_responses.into_iter().next().unwrap()
    }

    fn paths(response: &ContainerAllocateResponse) -> Vec<&str> {
        assert!(response.devices.iter().all(|d| d.container_path == d.host_path && d.permissions == "mrw"));
        response.devices.iter().map(|device| device.host_path.as_str()).collect()
    }

    #[test]
    fn cdi_names_are_given_only_when_asked_for_and_beside_the_nodes() {
        let units = [unit("0000:01:00.0", 1, Backend::Iommufd), unit("0000:02:00.0", 2, Backend::Iommufd)];
        let plain = answer(&units, Manner::default());
        assert!(plain.cdi_devices.is_empty() && plain.annotations.is_empty() && plain.envs.is_empty());
        let with = answer(&units, Manner { cdi_in_allocate: true, ..Manner::default() });
        assert_eq!(paths(&with), paths(&plain));
        let names: Vec<&str> = with.cdi_devices.iter().map(|device| device.name.as_str()).collect();
        assert_eq!(names, ["nvidia.com/pgpu=0000:01:00.0", "nvidia.com/pgpu=0000:02:00.0"]);
        assert_eq!(with.annotations.len(), 1);
        assert_eq!(with.annotations["cdi.k8s.io/ccnode_pgpu"], names.join(","));

        let long = |last: &str| annotation(&format!("{}{last}", "A".repeat(62)).parse().unwrap());
        assert_ne!(long("1"), long("2"), "a container may have both");
        assert!(long("1").len() <= "cdi.k8s.io/".len() + KEY);
    }

    #[test]
    fn kubevirt_gets_addresses_and_the_nodes_of_both_interfaces() {
        // Choice, interface of the units -> nodes
        let all = ["/dev/vfio/vfio", "/dev/vfio/1", "/dev/vfio/devices/vfio1", "/dev/iommu", "/dev/vfio/2"];
        let cases: &[(BackendChoice, Backend, Vec<&str>)] = &[
            (BackendChoice::Auto, Backend::Iommufd, [&all[..], &["/dev/vfio/devices/vfio2"]].concat()),
            (BackendChoice::Legacy, Backend::Legacy, vec!["/dev/vfio/vfio", "/dev/vfio/1", "/dev/vfio/2"]),
            (
                BackendChoice::Iommufd,
                Backend::Iommufd,
                vec!["/dev/vfio/devices/vfio1", "/dev/iommu", "/dev/vfio/devices/vfio2"],
            ),
        ];
        for (choice, backend, nodes) in cases {
            let name: ResourceName = "GH100_H100-SXM5".parse().unwrap();
            let mut units = [unit("0000:01:00.0", 1, *backend), unit("0000:02:00.0", 2, *backend)];
            for unit in &mut units {
                unit.resource = name.clone();
            }
            let manner = Manner { role: Role::Kubevirt, backend: *choice, cdi_in_allocate: true, ..Manner::default() };
            let response = answer(&units, manner);
            assert_eq!(paths(&response), *nodes, "{choice:?}");
            assert_eq!(response.envs.len(), 1);
            assert_eq!(response.envs["PCI_RESOURCE_NVIDIA_COM_GH100_H100-SXM5"], "0000:01:00.0,0000:02:00.0");
            assert!(response.cdi_devices.is_empty() && response.annotations.is_empty(), "there are no CDI files");
        }
    }

    #[test]
    fn extended_memory_goes_to_who_has_all_its_gpus_and_to_kubevirt_alone() {
        let egm = |node: &str, gpus: &[&str]| Egm {
            node: node.into(),
            gpus: gpus.iter().map(|gpu| gpu.parse().unwrap()).collect(),
        };
        let all = ["0008:01:00.0", "0009:01:00.0", "0018:01:00.0"];
        let (near, far) = (egm("/dev/egm4", &all[..2]), egm("/dev/egm5", &all[2..]));
        let unit = |id: &str, egm: &Egm| Unit { egm: vec![egm.clone()], ..Unit::sample(id) };
        let units = [unit(all[0], &near), unit(all[1], &near), unit(all[2], &far)];
        let cases: &[(Role, &[&str], &[&str])] = &[
            (Role::Kubevirt, &all, &["/dev/egm4", "/dev/egm5"]),
            (Role::Kubevirt, &all[..2], &["/dev/egm4"]),
            (Role::Kubevirt, &all[1..], &["/dev/egm5"]),
            (Role::Kubevirt, &all[..1], &[]),
            (Role::Kata, &all, &[]),
        ];
        for (role, ids, nodes) in cases {
            let manner = Manner { role: *role, ..Manner::default() };
            let given = allocate(&pgpu(), &units, &ask(&[ids]), manner).unwrap();
            assert_eq!(paths(&given.response.container_responses[0]), *nodes, "{role:?} {ids:?}");
        }
        // The GPUs of one memory in two containers are not all in one.
        let manner = Manner { role: Role::Kubevirt, ..Manner::default() };
        let given = allocate(&pgpu(), &units, &ask(&[&all[..1], &all[1..2]]), manner).unwrap();
        assert!(given.response.container_responses.iter().all(|response| response.devices.is_empty()));
    }

    #[test]
    fn parts_of_a_protected_domain_are_told_or_refused() {
        let units = |ppcie| -> Vec<Unit> {
            let unit = |n: u8| Unit { ppcie, ..Unit::sample(&format!("0000:0{n}:00.0")) };
            (1..=3).map(unit).collect()
        };
        let (all, some) = (["0000:01:00.0", "0000:02:00.0", "0000:03:00.0"], ["0000:02:00.0"]);
        // In protected PCIe, policy, asked for -> told, refused
        let cases: &[(bool, PpciePolicy, &[&str], bool, bool)] = &[
            (true, PpciePolicy::Warn, &all, false, false),
            (true, PpciePolicy::Warn, &some, true, false),
            (true, PpciePolicy::Enforce, &all, false, false),
            (true, PpciePolicy::Enforce, &some, false, true),
            (true, PpciePolicy::Off, &some, false, false),
            (false, PpciePolicy::Enforce, &some, false, false),
            (false, PpciePolicy::Warn, &some, false, false),
        ];
        for &(protected, ppcie, ids, told, refused) in cases {
            let result = allocate(&pgpu(), &units(protected), &ask(&[ids]), Manner { ppcie, ..Manner::default() });
            let case = format!("{protected} {ppcie:?} {ids:?}: {result:?}");
            assert_eq!(result.is_err(), refused, "{case}");
            assert_eq!(result.is_ok_and(|given| given.partial.is_some()), told, "{case}");
        }
        let enforce = Manner { ppcie: PpciePolicy::Enforce, ..Manner::default() };
        let status = allocate(&pgpu(), &units(true), &ask(&[&some]), enforce).unwrap_err().status();
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        assert!(status.message().starts_with("1 of the 3 devices of nvidia.com/pgpu"), "{}", status.message());
        // One that is dead is missing in the domain, and is not a reason to make do with the others.
        let mut units = units(true);
        units[0].fault = Some(Fault::Dead(units[0].bdf));
        assert!(allocate(&pgpu(), &units, &ask(&[&all[1..]]), enforce).is_err());
        assert!(
            allocate(&pgpu(), &units[1..], &ask(&[&all[1..2], &all[2..]]), enforce).is_ok(),
            "two containers at once"
        );
    }
}
