//! A device plugin whose devices and answers the test decides, and which remembers what it was asked.

use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::Stream;
use kubelet_api::device_plugin as dp;
use kubelet_api::device_plugin::device_plugin_server::{DevicePlugin, DevicePluginServer};
use kubelet_api::device_plugin::registration_client::RegistrationClient;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status};

/// A call of the kubelet, with the device IDs in it.
pub(crate) type Call = (&'static str, Vec<String>);

/// What the plugin is asked and answers.
struct Service {
    devices: watch::Sender<Vec<dp::Device>>,
    end: watch::Sender<bool>,
    calls: Arc<Mutex<Vec<Call>>>,
    cdi: Option<String>,
}

/// The plugin while it is served.
pub(crate) struct Toy {
    devices: watch::Sender<Vec<dp::Device>>,
    end: watch::Sender<bool>,
    calls: Arc<Mutex<Vec<Call>>>,
    task: JoinHandle<Result<(), kubelet_api::socket::Error>>,
}

/// Devices by ID and health.
fn list(devices: &[(&str, bool)]) -> Vec<dp::Device> {
    let health = |healthy| if healthy { kubelet_api::HEALTHY } else { kubelet_api::UNHEALTHY };
    devices
        .iter()
        .map(|(id, healthy)| dp::Device { id: (*id).into(), health: health(*healthy).into(), topology: None })
        .collect()
}

impl Service {
    fn called(&self, what: &'static str, mut ids: Vec<String>) {
        ids.sort();
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push((what, ids));
    }
}

#[tonic::async_trait]
impl DevicePlugin for Service {
    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<dp::ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<dp::Empty>,
    ) -> Result<Response<dp::DevicePluginOptions>, Status> {
        Ok(Response::new(options()))
    }

    async fn list_and_watch(&self, _: Request<dp::Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        self.called("ListAndWatch", Vec::new());
        let (devices, end) = (self.devices.subscribe(), self.end.subscribe());
        let stream = futures::stream::unfold((devices, end, true), |(mut devices, mut end, is_first)| async move {
            if !is_first {
                tokio::select! {
                    changed = devices.changed() => changed.ok()?,
                    _ = end.wait_for(|end| *end) => return None,
                }
            }
            let list = devices.borrow_and_update().clone();
            Some((Ok(dp::ListAndWatchResponse { devices: list }), (devices, end, false)))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<dp::PreferredAllocationRequest>,
    ) -> Result<Response<dp::PreferredAllocationResponse>, Status> {
        let prefer = |request: dp::ContainerPreferredAllocationRequest| {
            let mut ids = request.available_device_ids;
            ids.sort();
            self.called("GetPreferredAllocation", ids.clone());
            // The last ones, which nobody would take by chance all the time.
            let size = usize::try_from(request.allocation_size).unwrap_or_default().min(ids.len());
            dp::ContainerPreferredAllocationResponse { device_ids: ids.split_off(ids.len() - size) }
        };
        let container_responses = request.into_inner().container_requests.into_iter().map(prefer).collect();
        Ok(Response::new(dp::PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(&self, request: Request<dp::AllocateRequest>) -> Result<Response<dp::AllocateResponse>, Status> {
        let answer = |request: dp::ContainerAllocateRequest| {
            let device = |id: &String| dp::DeviceSpec {
                container_path: format!("/dev/contract-{id}"),
                host_path: "/dev/null".into(),
                permissions: "rw".into(),
            };
            let cdi = |id: &String| Some(dp::CdiDevice { name: format!("{}={id}", self.cdi.as_ref()?) });
            let answer = dp::ContainerAllocateResponse {
                devices: request.devices_ids.iter().map(device).collect(),
                cdi_devices: request.devices_ids.iter().filter_map(cdi).collect(),
                ..Default::default()
            };
            self.called("Allocate", request.devices_ids);
            answer
        };
        let container_responses = request.into_inner().container_requests.into_iter().map(answer).collect();
        Ok(Response::new(dp::AllocateResponse { container_responses }))
    }

    async fn pre_start_container(
        &self,
        request: Request<dp::PreStartContainerRequest>,
    ) -> Result<Response<dp::PreStartContainerResponse>, Status> {
        self.called("PreStartContainer", request.into_inner().devices_ids);
        Ok(Response::new(dp::PreStartContainerResponse {}))
    }
}

fn options() -> dp::DevicePluginOptions {
    dp::DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true }
}

/// Asks the kubelet of this folder to take a plugin.
pub(crate) async fn register(folder: &Path, version: &str, endpoint: &str, resource: &str) -> Result<(), Status> {
    let socket = folder.join(kubelet_api::KUBELET_SOCKET);
    let channel = kubelet_api::socket::connect(&socket, Duration::from_secs(10))
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let request = dp::RegisterRequest {
        version: version.into(),
        endpoint: endpoint.into(),
        resource_name: resource.into(),
        options: Some(options()),
    };
    RegistrationClient::new(channel).register(request).await.map(drop)
}

impl Toy {
    /// Serves these devices at a socket of the kubelet's folder; Allocate answers CDI names of the kind, if there is one.
    pub(crate) fn serve(folder: &Path, endpoint: &str, devices: &[(&str, bool)], cdi: Option<&str>) -> Result<Self> {
        let (devices, end) = (watch::Sender::new(list(devices)), watch::Sender::new(false));
        let calls = Arc::default();
        let service = Service {
            devices: devices.clone(),
            end: end.clone(),
            calls: Arc::clone(&calls),
            cdi: cdi.map(str::to_owned),
        };
        let listener = kubelet_api::socket::listen(&folder.join(endpoint))?;
        let router = tonic::transport::Server::builder().add_service(DevicePluginServer::new(service));
        let mut ends = end.subscribe();
        let task = tokio::spawn(kubelet_api::socket::serve(router, listener, async move {
            let _ = ends.wait_for(|end| *end).await;
        }));
        Ok(Self { devices, end, calls, task })
    }

    pub(crate) fn has(&self, devices: &[(&str, bool)]) {
        self.devices.send_replace(list(devices));
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it, as a plugin that dies.
    pub(crate) async fn end(self) -> Result<()> {
        self.end.send_replace(true);
        tokio::time::timeout(super::PATIENCE, self.task).await.context("the plugin does not end")???;
        Ok(())
    }
}
