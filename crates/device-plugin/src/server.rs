//! What the kubelet asks one resource: the gRPC service of the device plugin interface, v1beta1.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use kubelet_api::device_plugin::{
    AllocateRequest, AllocateResponse, ContainerAllocateResponse, ContainerPreferredAllocationRequest,
    ContainerPreferredAllocationResponse, Device, DevicePluginOptions, DeviceSpec, Empty, ListAndWatchResponse,
    NumaNode, PreStartContainerRequest, PreStartContainerResponse, PreferredAllocationRequest,
    PreferredAllocationResponse, TopologyInfo, device_plugin_server::DevicePlugin,
};
use kubelet_api::{HEALTHY, UNHEALTHY};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use crate::metrics::PluginMetrics;
use crate::names::ResourceName;
use crate::units::{Unit, order_of};

/// The units of one resource at one moment.
pub type Snapshot = Arc<Vec<Unit>>;

/// What the plugin offers beyond listing and allocating.
pub(crate) fn options() -> DevicePluginOptions {
    DevicePluginOptions { pre_start_required: false, get_preferred_allocation_available: true }
}

/// The service for one resource.
#[derive(Debug)]
pub struct Service {
    resource: ResourceName,
    units: watch::Receiver<Snapshot>,
    metrics: PluginMetrics,
    streams: watch::Sender<usize>,
    stop: watch::Receiver<bool>,
}

impl Service {
    /// Serves `units`; counts open ListAndWatch streams in `streams`, and ends them when `stop` becomes true.
    pub(crate) fn new(
        resource: ResourceName,
        units: watch::Receiver<Snapshot>,
        metrics: PluginMetrics,
        streams: watch::Sender<usize>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        Self { resource, units, metrics, streams, stop }
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
        let answers = requests.iter().map(|request| preferred(&units, request));
        Ok(Response::new(PreferredAllocationResponse { container_responses: answers.collect::<Result<_, _>>()? }))
    }

    async fn allocate(&self, request: Request<AllocateRequest>) -> Result<Response<AllocateResponse>, Status> {
        let units = self.units.borrow().clone();
        let requests = request.into_inner().container_requests;
        let ids: Vec<&[String]> = requests.iter().map(|request| request.devices_ids.as_slice()).collect();
        let result = allocate(&self.resource, &units, &ids);
        self.metrics.allocation(&self.resource, result.is_ok());
        match result {
            Ok(response) => {
                let ids = ids.concat().join(",");
                tracing::info!(event = "allocated", resource = %self.resource, ids, "Units were allocated to a pod");
                Ok(Response::new(response))
            }
            Err(status) => {
                tracing::warn!(
                    event = "allocation_refused", resource = %self.resource, code = ?status.code(),
                    reason = status.message(), "An allocation was refused"
                );
                Err(status)
            }
        }
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
fn shown(id: &str) -> String {
    let short: String = id.chars().take(64).collect();
    format!("{short:?}{}", if short.len() < id.len() { "..." } else { "" })
}

fn allocate(resource: &ResourceName, units: &[Unit], requests: &[&[String]]) -> Result<AllocateResponse, Status> {
    if requests.is_empty() {
        return Err(Status::invalid_argument(format!("The request for {resource} names no container")));
    }
    let known: BTreeMap<&str, &Unit> = units.iter().map(|unit| (unit.id.as_str(), unit)).collect();
    let mut given: BTreeSet<&str> = BTreeSet::new();
    let mut container_responses = Vec::new();
    for ids in requests {
        if ids.is_empty() {
            return Err(Status::invalid_argument(format!("The request for {resource} names no device")));
        }
        let mut nodes: Vec<&str> = Vec::new();
        for id in *ids {
            let Some(unit) = known.get(id.as_str()) else {
                return Err(Status::not_found(format!("There is no device {} of {resource} on this node", shown(id))));
            };
            if !given.insert(&unit.id) {
                return Err(Status::invalid_argument(format!("Device {} of {resource} is asked for twice", unit.id)));
            }
            if let Some(fault) = &unit.fault {
                return Err(Status::failed_precondition(format!(
                    "Device {} of {resource} cannot be used: {fault} ({})",
                    unit.id,
                    fault.code()
                )));
            }
            for node in &unit.nodes {
                // All legacy units share the container's node; it is named once.
                if !nodes.contains(&node.as_str()) {
                    nodes.push(node);
                }
            }
        }
        let device = |node: &str| DeviceSpec {
            container_path: node.to_owned(),
            host_path: node.to_owned(),
            permissions: "mrw".to_owned(),
        };
        container_responses
            .push(ContainerAllocateResponse { devices: nodes.into_iter().map(device).collect(), ..Default::default() });
    }
    Ok(AllocateResponse { container_responses })
}

/// Which of the available IDs to take: those that must be, then the NUMA nodes that these are on, then the node that
/// holds the rest with the fewest left over, so that big requests find whole nodes later. The same question gets the
/// same answer.
fn preferred(
    units: &[Unit],
    request: &ContainerPreferredAllocationRequest,
) -> Result<ContainerPreferredAllocationResponse, Status> {
    let available: BTreeSet<&str> = request.available_device_ids.iter().map(String::as_str).collect();
    let must: BTreeSet<&str> = request.must_include_device_ids.iter().map(String::as_str).collect();
    let size = usize::try_from(request.allocation_size)
        .map_err(|_| Status::invalid_argument(format!("The allocation size is {}", request.allocation_size)))?;
    if let Some(id) = must.difference(&available).next() {
        return Err(Status::invalid_argument(format!("Device {} must be included but is not available", shown(id))));
    }
    if must.len() > size || available.len() < size {
        return Err(Status::invalid_argument(format!(
            "{size} devices are asked for, {} must be included, {} are available",
            must.len(),
            available.len()
        )));
    }
    let numa: BTreeMap<&str, Option<u32>> =
        units.iter().map(|unit| (unit.id.as_str(), unit.numa.first().copied())).collect();
    let node_of = |id: &str| numa.get(id).copied().flatten();

    let mut chosen: Vec<&str> = must.iter().copied().collect();
    let near: BTreeSet<u32> = chosen.iter().filter_map(|id| node_of(id)).collect();
    // Free IDs by node; those without a node, or that we do not know, come last.
    let mut free: BTreeMap<Option<u32>, Vec<&str>> = BTreeMap::new();
    for id in available.difference(&must) {
        free.entry(node_of(id)).or_default().push(id);
    }
    for ids in free.values_mut() {
        ids.sort_by(|a, b| order_of(a).cmp(&order_of(b)));
    }
    while chosen.len() < size {
        let wanted = size - chosen.len();
        let best = free.iter().map(|(node, ids)| (*node, ids.len())).min_by_key(|&(node, count)| {
            let far = node.is_none_or(|node| !near.contains(&node));
            // The tightest node that is large enough, else the largest.
            let fit = if count >= wanted { (false, count) } else { (true, usize::MAX - count) };
            (far, node.is_none(), fit, node)
        });
        let Some(ids) = best.and_then(|(node, _)| free.remove(&node)) else { break };
        chosen.extend(ids.into_iter().take(wanted));
    }
    chosen.sort_by(|a, b| order_of(a).cmp(&order_of(b)));
    Ok(ContainerPreferredAllocationResponse { device_ids: chosen.into_iter().map(str::to_owned).collect() })
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::units::Backend;

    /// Units `0`, `1`, ... on the given NUMA nodes.
    fn units(nodes: &[Option<u32>]) -> Vec<Unit> {
        let unit = |(number, node): (usize, &Option<u32>)| Unit {
            id: number.to_string(),
            resource: "pgpu".parse().unwrap(),
            bdf: "0000:41:00.0".parse().unwrap(),
            ids: (0x10de, 0x2330),
            functions: Vec::new(),
            backend: Backend::Iommufd,
            nodes: Vec::new(),
            numa: node.iter().copied().collect(),
            fault: None,
        };
        nodes.iter().enumerate().map(unit).collect()
    }

    fn ask(units: &[Unit], available: &[&str], must: &[&str], size: i32) -> Result<Vec<String>, Code> {
        let texts = |ids: &[&str]| ids.iter().map(ToString::to_string).collect();
        let request = ContainerPreferredAllocationRequest {
            available_device_ids: texts(available),
            must_include_device_ids: texts(must),
            allocation_size: size,
        };
        preferred(units, &request).map(|response| response.device_ids).map_err(|status| status.code())
    }

    #[test]
    fn preferred_allocation() {
        // Available, must include, how many -> expected.
        type Case<'a> = (&'a [&'a str], &'a [&'a str], i32, &'a [&'a str]);
        // 0..4 on node 0, 4..8 on node 1, 8 and 9 on none.
        let nodes: Vec<Option<u32>> = (0..10).map(|n| [Some(0), Some(1), None].get(n / 4).copied().flatten()).collect();
        let units = units(&nodes);
        let all = ["9", "8", "7", "6", "5", "4", "3", "2", "1", "0"];
        let cases: &[Case] = &[
            (&all, &[], 0, &[]),
            (&all, &[], 1, &["0"]),
            (&all, &[], 4, &["0", "1", "2", "3"]),
            (&all, &[], 6, &["0", "1", "2", "3", "4", "5"]),
            (&all, &[], 10, &["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]),
            // What must be comes first and draws its node along.
            (&all, &["5"], 2, &["4", "5"]),
            (&all, &["5", "0"], 3, &["0", "1", "5"]),
            (&all, &["9"], 2, &["0", "9"]),
            // The tightest node that is large enough.
            (&["0", "1", "2", "6", "7"], &[], 2, &["6", "7"]),
            (&["0", "1", "2", "6", "7"], &[], 3, &["0", "1", "2"]),
            (&["0", "1", "2", "6", "7"], &[], 4, &["0", "1", "2", "6"]),
            // Unknown IDs are the last resort; the same ID twice is one.
            (&["zzz", "8", "3"], &[], 1, &["3"]),
            (&["zzz", "3", "3"], &[], 2, &["3", "zzz"]),
        ];
        for (available, must, size, expected) in cases {
            assert_eq!(ask(&units, available, must, *size).unwrap(), *expected, "{available:?} {must:?} {size}");
        }
    }

    #[test]
    fn questions_without_an_answer_are_refused() {
        let units = units(&[Some(0), Some(0)]);
        for (available, must, size) in [
            (&["0", "1"][..], &[][..], -1),
            (&["0", "1"], &[], 3),
            (&["0", "0"], &[], 2),
            (&["0", "1"], &["0", "1"], 1),
            (&["0"], &["1"], 1),
        ] {
            assert_eq!(ask(&units, available, must, size), Err(Code::InvalidArgument), "{available:?} {must:?} {size}");
        }
        let many: Vec<String> = (0..10_000).map(|n| n.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(ask(&units, &many, &[], 10_000).unwrap().len(), 10_000);
    }
}
