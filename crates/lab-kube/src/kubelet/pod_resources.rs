//! The pod-resources service.

use std::collections::BTreeMap;
use std::sync::Arc;

use kubelet_api::pod_resources as pr;
use kubelet_api::pod_resources::pod_resources_lister_server::PodResourcesLister;
use tonic::{Request, Response, Status};

use super::devices::NO_NUMA;
use super::pods::Pod;
use super::state::{Shared, State};

/// The service on the pod-resources socket.
pub(crate) struct Lister(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl PodResourcesLister for Lister {
    async fn list(
        &self,
        _: Request<pr::ListPodResourcesRequest>,
    ) -> Result<Response<pr::ListPodResourcesResponse>, Status> {
        let mut state = self.0.state();
        state.free_inactive();
        // It has not heard of its pods yet.
        let is_aware = state.is_aware();
        let active = state.pods.values().filter(|record| is_aware && record.phase.is_active());
        let pod_resources = active.map(|record| of_pod(&state, &record.pod)).collect();
        Ok(Response::new(pr::ListPodResourcesResponse { pod_resources }))
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<pr::AllocatableResourcesRequest>,
    ) -> Result<Response<pr::AllocatableResourcesResponse>, Status> {
        let state = self.0.state();
        let mut devices = Vec::new();
        for (resource, healthy) in &state.manager.healthy {
            for (id, device) in state.manager.devices.get(resource).into_iter().flatten() {
                if healthy.contains(id) {
                    match &device.numa {
                        None => devices.push(entry(resource, id, None)),
                        // A topology without nodes hides the device, as it does in the real kubelet.
                        Some(nodes) => devices.extend(nodes.iter().map(|node| entry(resource, id, Some(*node)))),
                    }
                }
            }
        }
        Ok(Response::new(pr::AllocatableResourcesResponse { devices, ..Default::default() }))
    }

    async fn get(
        &self,
        request: Request<pr::GetPodResourcesRequest>,
    ) -> Result<Response<pr::GetPodResourcesResponse>, Status> {
        if !self.0.config.pod_resources_get {
            return Err(Status::unknown("PodResources API Get method disabled"));
        }
        let pr::GetPodResourcesRequest { pod_name, pod_namespace } = request.into_inner();
        let state = self.0.state();
        let found =
            state.pods.values().find(|record| record.pod.name == pod_name && record.pod.namespace == pod_namespace);
        let Some(record) = found.filter(|_| state.is_aware()) else {
            return Err(Status::unknown(format!("pod {pod_name} in namespace {pod_namespace} not found")));
        };
        Ok(Response::new(pr::GetPodResourcesResponse { pod_resources: Some(of_pod(&state, &record.pod)) }))
    }
}

fn of_pod(state: &State, pod: &Pod) -> pr::PodResources {
    let containers = pod
        .lasting_containers()
        .map(|container| {
            let mut devices = Vec::new();
            for (resource, allocation) in state.manager.container(&pod.uid, &container.name).into_iter().flatten() {
                // By id first: a device on several nodes has one entry for each, side by side.
                let mut by_id: BTreeMap<&String, Vec<i64>> = BTreeMap::new();
                for (node, ids) in &allocation.devices {
                    for id in ids {
                        by_id.entry(id).or_default().push(*node);
                    }
                }
                for (id, nodes) in by_id {
                    devices
                        .extend(nodes.into_iter().map(|node| entry(resource, id, (node != NO_NUMA).then_some(node))));
                }
            }
            pr::ContainerResources { name: container.name.clone(), devices, ..Default::default() }
        })
        .collect();
    pr::PodResources { name: pod.name.clone(), namespace: pod.namespace.clone(), containers, ..Default::default() }
}

fn entry(resource: &str, id: &str, node: Option<i64>) -> pr::ContainerDevices {
    pr::ContainerDevices {
        resource_name: resource.to_owned(),
        device_ids: vec![id.to_owned()],
        topology: node.map(|id| pr::TopologyInfo { nodes: vec![pr::NumaNode { id }] }),
    }
}
