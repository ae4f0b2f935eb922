//! A stand-in of the kubelet: its device manager, its pod-resources service, and as much of the rest as a device plugin
//! and a pod with devices can see. It keeps to the real kubelet's rules and texts; where it is kinder, that is a bug.

pub mod args;
pub mod control;
pub mod toy;

mod admission;
mod cdi;
mod checkpoint;
mod controller;
mod devices;
mod names;
mod pod_resources;
mod pods;
mod registration;
mod resolve;
mod sandbox;
mod state;

#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kubelet_api::device_plugin::registration_server::RegistrationServer;
use kubelet_api::pod_resources::pod_resources_lister_server::PodResourcesListerServer;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::server::Router;
use tonic::{Code, Status};
use tracing::{info, warn};

use devices::Manager;
use state::Shared;

pub use pods::{Container, Pod};
pub use resolve::{Error as ResolveError, Resolved, ResolvedDevice, resolve};

/// What Go's gRPC says of a call that ran out of time.
const DEADLINE_EXCEEDED: &str = "rpc error: code = DeadlineExceeded desc = context deadline exceeded";

/// How long running calls may go on when the kubelet stops.
const STOP_DEADLINE: Duration = Duration::from_secs(1);

/// How the kubelet is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of its node.
    pub node: String,
    /// Folder of the plugins' sockets, kubelet.sock and the checkpoint.
    pub plugin_dir: PathBuf,
    /// Socket of the pod-resources service.
    pub pod_resources: PathBuf,
    /// Where the runtimes find device nodes, CDI specs and sysfs.
    pub root: PathBuf,
    /// Feature gate KubeletPodResourcesGet.
    pub pod_resources_get: bool,
    /// How long a registering plugin is dialled.
    pub dial_deadline: Duration,
    /// How long a resource outlives its plugin with zero allocatable.
    pub stop_grace: Duration,
    /// Pause before a container that could not be created is tried again.
    pub container_retry: Duration,
    /// Time between two looks at the node's status.
    pub node_status_frequency: Duration,
    /// Create the node object where it is missing.
    pub register_node: bool,
    /// Decides the arbitrary order in which devices are handed out.
    pub seed: u64,
    /// Fault: wait before looking at a registration.
    pub register_delay: Duration,
    /// Fault: time between a pod's deletion and its end.
    pub stop_delay: Duration,
}

impl Config {
    /// The real kubelet's values, with the sockets in the folders given.
    pub fn new(node: impl Into<String>, plugin_dir: impl Into<PathBuf>, pod_resources: impl Into<PathBuf>) -> Self {
        Self {
            node: node.into(),
            plugin_dir: plugin_dir.into(),
            pod_resources: pod_resources.into(),
            root: "/".into(),
            pod_resources_get: true,
            dial_deadline: Duration::from_secs(10),
            stop_grace: Duration::from_mins(5),
            container_retry: Duration::from_secs(10),
            node_status_frequency: Duration::from_secs(10),
            register_node: true,
            seed: 0,
            register_delay: Duration::ZERO,
            stop_delay: Duration::ZERO,
        }
    }
}

/// Why the kubelet could not do as asked.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the texts say it")]
pub enum Error {
    #[error("Cannot prepare {}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("Cannot serve")]
    Socket(#[from] kubelet_api::socket::Error),
    #[error("The kubelet is stopped")]
    Stopped,
    #[error("The kubelet is running already")]
    Running,
    #[error("Pod {0} is there already")]
    PodExists(String),
    #[error("Pod {0} is not there")]
    NoPod(String),
    #[error("No plugin of {0} is connected")]
    NoPlugin(String),
    #[error("{resource} has {allocatable} allocatable, not {wanted}, after {waited:?}")]
    NotAllocatable { resource: String, allocatable: usize, wanted: usize, waited: Duration },
}

/// What came of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The pod's UID.
    pub uid: String,
    /// Pending, Running or Failed.
    pub phase: String,
    /// Empty for a running pod.
    pub reason: String,
    /// Empty for a running pod.
    pub message: String,
}

/// A kubelet that can be stopped and started again, as by its service manager.
pub struct Kubelet {
    shared: Arc<Shared>,
    client: Option<kube::Client>,
    servers: Mutex<Option<Servers>>,
}

struct Servers {
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Kubelet {
    /// Starts a kubelet; with a client, one that takes its pods from the API server and reports there.
    pub async fn start(config: Config, client: Option<kube::Client>) -> Result<Arc<Self>, Error> {
        let kubelet = Arc::new(Self { shared: Shared::new(config), client, servers: Mutex::default() });
        kubelet.resume().await?;
        Ok(kubelet)
    }

    /// Starts it again after [`Self::stop`]: sockets in the plugin folder are wiped, kubelet.sock and the pod-resources
    /// socket made anew, allocations read from the checkpoint. Running pods are as they were.
    pub async fn resume(&self) -> Result<(), Error> {
        let mut servers = self.servers.lock().await;
        if servers.is_some() {
            return Err(Error::Running);
        }
        let config = &self.shared.config;
        let plugin_dir = &config.plugin_dir;
        make_folder(plugin_dir)?;
        if let Some(folder) = config.pod_resources.parent() {
            make_folder(folder)?;
        }
        let checkpoint = match checkpoint::read(plugin_dir) {
            Ok(checkpoint) => checkpoint,
            Err(error) => {
                warn!(error = %chain(&error), "Going on without the checkpoint");
                None
            }
        };
        let fresh_node = checkpoint.is_none();
        let checkpoint = checkpoint.unwrap_or_default();
        let now = Instant::now();
        let standalone = self.client.is_none();
        self.shared.change(|state| {
            state.manager = Manager::restore(checkpoint.pods, checkpoint.resources, config.seed, now);
            state.clients.clear();
            state.channels.clear();
            state.ending.clear();
            // What had not started goes through admission again, as every pod does that the runtime does not know.
            state.pods.retain(|_, record| !(record.api && matches!(record.phase, pods::Phase::Pending { .. })));
            state.same_boot = checkpoint.boot_id == checkpoint::boot_id();
            state.fresh_node = fresh_node;
            state.sources_ready = standalone && !state.faults.is_unaware;
            state.starts += 1;
            state.running = true;
        });
        wipe_sockets(plugin_dir)?;
        let registry = RegistrationServer::new(registration::Registry(self.shared.clone()));
        let lister = PodResourcesListerServer::new(pod_resources::Lister(self.shared.clone()));
        let registration_socket = plugin_dir.join(kubelet_api::KUBELET_SOCKET);
        let stop = watch::Sender::new(false);
        let mut tasks = JoinSet::new();
        for (path, router) in [
            (&registration_socket, tonic::transport::Server::builder().add_service(registry)),
            (&config.pod_resources, tonic::transport::Server::builder().add_service(lister)),
        ] {
            let listener = kubelet_api::socket::listen(path)?;
            tasks.spawn(serve(router, listener, stop.subscribe(), path.clone()));
        }
        if let Some(client) = &self.client {
            controller::spawn(&self.shared, client);
        }
        admission::resume_waiting(&self.shared);
        *servers = Some(Servers { stop, tasks });
        info!(plugin_dir = %plugin_dir.display(), "Kubelet started");
        Ok(())
    }

    /// Stops it as a killed process stops: nobody is told, sockets stay behind with nobody at them, pods run on.
    pub async fn stop(&self) -> Result<(), Error> {
        let mut servers = self.servers.lock().await.take().ok_or(Error::Stopped)?;
        self.shared.change(|state| state.running = false);
        self.shared.take_tasks().shutdown().await;
        servers.stop.send_replace(true);
        let ended = async { while servers.tasks.join_next().await.is_some() {} };
        let _ = timeout(STOP_DEADLINE, ended).await;
        servers.tasks.shutdown().await;
        // Channels to plugins close with the state that holds them.
        self.shared.change(|state| state.channels.clear());
        info!("Kubelet stopped");
        Ok(())
    }

    /// Stops it, stays away for `down`, and starts it again.
    pub async fn restart(&self, down: Duration) -> Result<(), Error> {
        self.stop().await?;
        tokio::time::sleep(down).await;
        self.resume().await
    }

    /// Everything it knows, as JSON: resources, devices, pods, allocations, and the calls to and from plugins.
    pub fn dump(&self) -> Value {
        state::dump(&self.shared)
    }

    /// Admits a pod that is not from the API server. An empty UID is filled in.
    pub async fn admit(&self, mut pod: Pod) -> Result<Outcome, Error> {
        let (name, taken) = {
            let state = self.shared.state();
            if !state.running {
                return Err(Error::Stopped);
            }
            let taken = state.pods.values().any(|record| {
                record.pod.full_name() == pod.full_name() && record.phase.is_active() || record.pod.uid == pod.uid
            });
            (pod.full_name(), taken)
        };
        if taken {
            return Err(Error::PodExists(name));
        }
        if pod.uid.is_empty() {
            pod.uid = format!("{}-{}", pod.name, jiff::Timestamp::now().as_nanosecond());
        }
        let uid = pod.uid.clone();
        // A rejected predecessor of the same name makes way, as if it had been deleted.
        self.shared.change(|state| state.pods.retain(|_, record| record.pod.full_name() != name));
        admission::admit(&self.shared, pod, false).await;
        self.outcome(&uid).ok_or(Error::NoPod(name))
    }

    fn outcome(&self, uid: &str) -> Option<Outcome> {
        let state = self.shared.state();
        let (phase, reason, message) = match &state.pods.get(uid)?.phase {
            pods::Phase::Pending { reason, message } => ("Pending", reason.clone(), message.clone()),
            pods::Phase::Running => ("Running", String::new(), String::new()),
            pods::Phase::Failed { reason, message } => ("Failed", reason.clone(), message.clone()),
            pods::Phase::Done => ("Succeeded", String::new(), String::new()),
        };
        Some(Outcome { uid: uid.to_owned(), phase: phase.to_owned(), reason, message })
    }

    /// Ends a pod and frees its devices.
    pub async fn remove(&self, namespace: &str, name: &str) -> Result<(), Error> {
        let delay = {
            let state = self.shared.state();
            if !state.running {
                return Err(Error::Stopped);
            }
            state.faults.stop_delay
        };
        tokio::time::sleep(delay).await;
        let uid = {
            let state = self.shared.state();
            let mut pods = state.pods.iter();
            pods.find(|(_, record)| record.pod.namespace == namespace && record.pod.name == name)
                .map(|(uid, _)| uid.clone())
        };
        admission::forget(&self.shared, &uid.ok_or_else(|| Error::NoPod(format!("{namespace}/{name}")))?);
        Ok(())
    }

    /// Waits until exactly `count` devices of `resource` are allocatable.
    pub async fn wait_allocatable(&self, resource: &str, count: usize, limit: Duration) -> Result<(), Error> {
        let mut changed = self.shared.changed.subscribe();
        let allocatable = || {
            let running = self.shared.state().running;
            self.shared.counts().get(resource).filter(|_| running).map_or(0, |counts| counts.allocatable)
        };
        let reached = async {
            // Nobody bumps the version when a grace period ends, but that takes nothing from allocatable.
            while allocatable() != count {
                if changed.changed().await.is_err() {
                    return;
                }
            }
        };
        timeout(limit, reached).await.map_err(|_| Error::NotAllocatable {
            resource: resource.to_owned(),
            allocatable: allocatable(),
            wanted: count,
            waited: limit,
        })
    }

    /// Fault: ends the ListAndWatch streams of a resource from the kubelet's side.
    pub fn drop_stream(&self, resource: &str) -> Result<(), Error> {
        let state = self.shared.state();
        let clients = state.clients.get(resource).ok_or_else(|| Error::NoPlugin(resource.to_owned()))?;
        for client in clients {
            client.cut.notify_one();
        }
        Ok(())
    }

    /// Fault: waits that long before it looks at a registration.
    pub fn set_register_delay(&self, delay: Duration) {
        self.shared.change(|state| state.faults.register_delay = delay);
    }

    /// Fault: waits that long after a registration before it listens to the plugin.
    pub fn set_listen_delay(&self, delay: Duration) {
        self.shared.change(|state| state.faults.listen_delay = delay);
    }

    /// Fault: knows none of its pods from its next start on, until this is taken back; its checkpoint has their devices.
    pub fn set_unaware(&self, is_unaware: bool) {
        self.shared.change(|state| {
            state.faults.is_unaware = is_unaware;
            state.sources_ready = state.sources_ready || !is_unaware;
        });
    }

    /// Fault: pods take that long to end once they are deleted.
    pub fn set_stop_delay(&self, delay: Duration) {
        self.shared.change(|state| state.faults.stop_delay = delay);
    }
}

async fn serve(router: Router, listener: UnixListener, mut stop: watch::Receiver<bool>, path: PathBuf) {
    let stopped = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    if let Err(error) = kubelet_api::socket::serve(router, listener, stopped).await {
        warn!(socket = %path.display(), error = %chain(&error), "Serving ended");
    }
}

fn make_folder(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|source| Error::Folder { path: path.into(), source })
}

/// Deletes every socket in the folder, as the kubelet does when it starts. Other files stay.
fn wipe_sockets(folder: &Path) -> Result<(), Error> {
    let failed = |source| Error::Folder { path: folder.into(), source };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if fs::metadata(&path).is_ok_and(|found| found.file_type().is_socket()) {
            fs::remove_file(&path).map_err(|source| Error::Folder { path, source })?;
        }
    }
    Ok(())
}

/// A gRPC error as Go prints it, which is how it ends up in the real kubelet's texts.
fn go_error(status: &Status) -> String {
    let code = match status.code() {
        Code::Ok => "OK".to_owned(),
        Code::Cancelled => "Canceled".to_owned(),
        code => format!("{code:?}"),
    };
    format!("rpc error: code = {code} desc = {}", status.message())
}

/// An error with all its sources on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
