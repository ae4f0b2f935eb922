//! A device plugin for tests of a kubelet, real or not: the test decides its devices and answers, and it remembers what it was
//! asked.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::Stream;
use kubelet_api::device_plugin as dp;
use kubelet_api::device_plugin::device_plugin_server::{DevicePlugin, DevicePluginServer};
use kubelet_api::device_plugin::registration_client::RegistrationClient;
use kubelet_api::socket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status};

/// How long a kubelet's socket is waited for.
const SOON: Duration = Duration::from_secs(10);

/// A call of the kubelet, with the device IDs in it in order.
pub type Call = (&'static str, Vec<String>);

/// The plugin.
pub struct Toy {
    /// What it says of itself.
    pub options: dp::DevicePluginOptions,
    /// Its devices. The kubelet is told of a change.
    pub devices: watch::Sender<Vec<dp::Device>>,
    /// What it prefers. Without that, the last ones, which nobody would take by chance all the time.
    pub preferred: Vec<String>,
    /// Where the nodes of a device are on the machine and in a container, by its ID.
    pub nodes: fn(&str) -> Vec<[String; 2]>,
    /// The kind of the CDI names that Allocate answers beside device nodes, if it does.
    pub cdi: Option<String>,
    fail: Mutex<BTreeMap<&'static str, Status>>,
    calls: Mutex<Vec<Call>>,
    end: watch::Sender<bool>,
}

/// Devices by ID, and whether they are healthy.
fn list(devices: &[(&str, bool)]) -> Vec<dp::Device> {
    let health = |healthy| if healthy { kubelet_api::HEALTHY } else { kubelet_api::UNHEALTHY };
    devices
        .iter()
        .map(|(id, healthy)| dp::Device { id: (*id).into(), health: health(*healthy).into(), topology: None })
        .collect()
}

impl Toy {
    /// A plugin with these devices, by ID and health, that is asked for nothing beyond what every plugin is.
    pub fn new(devices: &[(&str, bool)]) -> Self {
        let in_vfio = |id: &str| {
            let path = format!("/dev/vfio/{id}");
            vec![[path.clone(), path]]
        };
        Self {
            options: dp::DevicePluginOptions::default(),
            devices: watch::Sender::new(list(devices)),
            preferred: Vec::new(),
            nodes: in_vfio,
            cdi: None,
            fail: Mutex::default(),
            calls: Mutex::default(),
            end: watch::Sender::new(false),
        }
    }

    /// Has these devices from now on.
    pub fn has(&self, devices: &[(&str, bool)]) {
        self.devices.send_replace(list(devices));
    }

    /// Answers this to a method from now on: `GetDevicePluginOptions`, `GetPreferredAllocation`, `Allocate` or
    /// `PreStartContainer`.
    pub fn fails(&self, method: &'static str, status: Status) {
        self.fail.lock().unwrap_or_else(PoisonError::into_inner).insert(method, status);
    }

    /// Fails no more.
    pub fn works(&self) {
        self.fail.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// What it was asked, but for its options.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends its streams and whoever serves it.
    pub fn end(&self) {
        self.end.send_replace(true);
    }

    /// Serves it at a socket until it ends.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn serve(self: &Arc<Self>, socket: &Path) -> Result<JoinHandle<Result<(), socket::Error>>, socket::Error> {
        let listener = socket::listen(socket)?;
        let service = DevicePluginServer::new(Service(Arc::clone(self)));
        let router = tonic::transport::Server::builder().add_service(service);
        let mut end = self.end.subscribe();
        Ok(tokio::spawn(socket::serve(router, listener, async move {
            let _ = end.wait_for(|end| *end).await;
        })))
    }

    /// The same, for a plugin that has one socket in its life.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn served(self, socket: &Path) -> Result<Served, socket::Error> {
        let toy = Arc::new(self);
        Ok(Served { task: toy.serve(socket)?, toy })
    }

    fn called(&self, method: &'static str, mut ids: Vec<String>) -> Result<(), Status> {
        ids.sort();
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push((method, ids));
        self.is_to_fail(method)
    }

    fn is_to_fail(&self, method: &str) -> Result<(), Status> {
        let fail = self.fail.lock().unwrap_or_else(PoisonError::into_inner);
        fail.get(method).map_or(Ok(()), |status| Err(status.clone()))
    }
}

/// A plugin while it is served.
pub struct Served {
    toy: Arc<Toy>,
    task: JoinHandle<Result<(), socket::Error>>,
}

impl Served {
    /// Ends it, as a plugin that dies, and waits until it has.
    ///
    /// # Errors
    ///
    /// It was not served well, or does not end.
    pub async fn end(self) -> anyhow::Result<()> {
        self.toy.end();
        Ok(tokio::time::timeout(SOON, self.task).await???)
    }
}

impl Deref for Served {
    type Target = Toy;

    fn deref(&self) -> &Toy {
        &self.toy
    }
}

/// Asks the kubelet of a folder to take a plugin.
///
/// # Errors
///
/// What the kubelet answers, or that there is none.
pub async fn register(
    folder: &Path,
    version: &str,
    endpoint: &str,
    resource: &str,
    options: Option<dp::DevicePluginOptions>,
) -> Result<(), Status> {
    let channel = socket::connect(&folder.join(kubelet_api::KUBELET_SOCKET), SOON)
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let request = dp::RegisterRequest {
        version: version.into(),
        endpoint: endpoint.into(),
        resource_name: resource.into(),
        options,
    };
    RegistrationClient::new(channel).register(request).await.map(drop)
}

struct Service(Arc<Toy>);

#[tonic::async_trait]
impl DevicePlugin for Service {
    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<dp::ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<dp::Empty>,
    ) -> Result<Response<dp::DevicePluginOptions>, Status> {
        self.0.is_to_fail("GetDevicePluginOptions")?;
        Ok(Response::new(self.0.options))
    }

    async fn list_and_watch(&self, _: Request<dp::Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        self.0.called("ListAndWatch", Vec::new())?;
        let (devices, end) = (self.0.devices.subscribe(), self.0.end.subscribe());
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
        let mut container_responses = Vec::new();
        for request in request.into_inner().container_requests {
            let mut ids = request.available_device_ids;
            ids.sort();
            self.0.called("GetPreferredAllocation", ids.clone())?;
            let device_ids = if self.0.preferred.is_empty() {
                let size = usize::try_from(request.allocation_size).unwrap_or_default().min(ids.len());
                ids.split_off(ids.len() - size)
            } else {
                self.0.preferred.clone()
            };
            container_responses.push(dp::ContainerPreferredAllocationResponse { device_ids });
        }
        Ok(Response::new(dp::PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(&self, request: Request<dp::AllocateRequest>) -> Result<Response<dp::AllocateResponse>, Status> {
        let mut container_responses = Vec::new();
        for request in request.into_inner().container_requests {
            let device = |[host_path, container_path]: [String; 2]| dp::DeviceSpec {
                container_path,
                host_path,
                permissions: "mrw".into(),
            };
            let cdi = |id: &String| Some(dp::CdiDevice { name: format!("{}={id}", self.0.cdi.as_ref()?) });
            container_responses.push(dp::ContainerAllocateResponse {
                devices: request.devices_ids.iter().flat_map(|id| (self.0.nodes)(id)).map(device).collect(),
                cdi_devices: request.devices_ids.iter().filter_map(cdi).collect(),
                ..Default::default()
            });
            self.0.called("Allocate", request.devices_ids)?;
        }
        Ok(Response::new(dp::AllocateResponse { container_responses }))
    }

    async fn pre_start_container(
        &self,
        request: Request<dp::PreStartContainerRequest>,
    ) -> Result<Response<dp::PreStartContainerResponse>, Status> {
        self.0.called("PreStartContainer", request.into_inner().devices_ids)?;
        Ok(Response::new(dp::PreStartContainerResponse {}))
    }
}
