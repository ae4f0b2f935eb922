//! The whole agent on a fake sysfs against a minimal kubelet on real sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests fail the test that calls them")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_core::hostfile::HostDir;
use agent_core::metrics::Metrics;
use agent_core::readiness::Registry;
use agent_core::shutdown::Shutdown;
use agent_core::state::{DeviceRecord, DevicesFile, Identity, Origin, Transition};
use device_plugin::controller::{Config, ControllerError, run};
use device_plugin::observe::Places;
use device_plugin::units::{BackendChoice, CcGate, IdScheme, Policy};
use hw_probe::testing::FakeSysfs;
use kubelet_api::device_plugin::{
    AllocateRequest, AllocateResponse, ContainerAllocateRequest, ContainerPreferredAllocationRequest, Device, Empty,
    PreStartContainerRequest, PreferredAllocationRequest, RegisterRequest,
    device_plugin_client::DevicePluginClient,
    registration_server::{Registration, RegistrationServer},
};
use kubelet_api::socket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

const PATIENCE: Duration = Duration::from_secs(20);

/// What the kubelet knows.
#[derive(Default)]
struct Known {
    registrations: Vec<RegisterRequest>,
    lists: BTreeMap<String, Vec<Device>>,
    refuse: bool,
}

#[derive(Clone)]
struct Kubelet {
    folder: PathBuf,
    known: Arc<Mutex<Known>>,
    stop: watch::Receiver<bool>,
    hang_up: watch::Receiver<()>,
}

#[tonic::async_trait]
impl Registration for Kubelet {
    /// As the real one: dials back, asks for the options, and then listens.
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        let request = request.into_inner();
        if self.known.lock().unwrap().refuse {
            return Err(Status::unknown("requested API version is not supported"));
        }
        let channel = socket::connect(&self.folder.join(&request.endpoint), Duration::from_secs(5))
            .await
            .map_err(|error| Status::unknown(error.to_string()))?;
        let mut client = DevicePluginClient::new(channel);
        client.get_device_plugin_options(Empty {}).await?;
        let resource = request.resource_name.clone();
        self.known.lock().unwrap().registrations.push(request);
        let (known, mut stop, mut hang_up) = (self.known.clone(), self.stop.clone(), self.hang_up.clone());
        hang_up.mark_unchanged();
        tokio::spawn(async move {
            let mut stream = client.list_and_watch(Empty {}).await.unwrap().into_inner();
            loop {
                tokio::select! {
                    _ = stop.wait_for(|stop| *stop) => return,
                    _ = hang_up.changed() => return,
                    list = stream.message() => {
                        let Ok(Some(list)) = list else {
                            known.lock().unwrap().lists.remove(&resource);
                            return;
                        };
                        known.lock().unwrap().lists.insert(resource.clone(), list.devices);
                    }
                };
            }
        });
        Ok(Response::new(Empty {}))
    }
}

/// A kubelet that runs.
struct Running {
    known: Arc<Mutex<Known>>,
    stop: watch::Sender<bool>,
    hang_up: watch::Sender<()>,
    task: JoinHandle<Result<(), socket::Error>>,
}

impl Running {
    /// Starts as the real one does: wipes the folder of sockets, then opens its own.
    fn start(folder: &Path) -> Self {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            std::fs::remove_file(entry.path()).unwrap();
        }
        let (stop, stopped) = watch::channel(false);
        let (hang_up, silence) = watch::channel(());
        let known = Arc::new(Mutex::new(Known::default()));
        let kubelet =
            Kubelet { folder: folder.to_owned(), known: known.clone(), stop: stopped.clone(), hang_up: silence };
        let listener = socket::listen(&folder.join("kubelet.sock")).unwrap();
        let router = tonic::transport::Server::builder().add_service(RegistrationServer::new(kubelet));
        let mut stopped = stopped;
        let task = tokio::spawn(socket::serve(router, listener, async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }));
        Self { known, stop, hang_up, task }
    }

    async fn end(self) {
        self.stop.send_replace(true);
        timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
    }

    fn registrations(&self) -> usize {
        self.known.lock().unwrap().registrations.len()
    }

    /// `id:health`, as the kubelet heard it last; none while it listens to nobody.
    fn list(&self, resource: &str) -> Option<Vec<String>> {
        let known = self.known.lock().unwrap();
        known
            .lists
            .get(resource)
            .map(|list| list.iter().map(|device| format!("{} {}", device.id, device.health)).collect())
    }

    async fn hears(&self, resource: &str, expected: &[&str]) {
        until(&format!("{resource} {expected:?}"), || self.list(resource).is_some_and(|list| list == expected)).await;
    }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let waited = timeout(PATIENCE, async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "Did not come true: {what}");
}

struct Node {
    fake: FakeSysfs,
    place: tempfile::TempDir,
    shutdown: Shutdown,
    readiness: Registry,
    metrics: Metrics,
    poll: Duration,
}

impl Node {
    /// Two GPUs, one on each NUMA node, bound to vfio-pci.
    fn new() -> Self {
        let fake = FakeSysfs::new();
        fake.gpu("0000:41:00.0", 0x2330).group(5).numa(0).driver("vfio-pci").cdev(0);
        fake.gpu("0000:c1:00.0", 0x2330).group(6).numa(1).driver("vfio-pci").cdev(1);
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir(place.path().join("plugins")).unwrap();
        Self {
            fake,
            place,
            shutdown: Shutdown::manual(),
            readiness: Registry::default(),
            metrics: Metrics::new(),
            poll: Duration::from_millis(50),
        }
    }

    fn plugins(&self) -> PathBuf {
        self.place.path().join("plugins")
    }

    fn cdi(&self, resource: &str) -> Option<String> {
        std::fs::read_to_string(self.place.path().join(format!("cdi/nvidia.com-{resource}.yaml"))).ok()
    }

    fn start(&self, backend: BackendChoice) -> JoinHandle<Result<(), ControllerError>> {
        let config = Config {
            places: Places { root: self.fake.root(), state_dir: self.place.path().join("state") },
            policy: Policy {
                gpu: "pgpu".parse().unwrap(),
                nvswitch: "nvswitch".parse().unwrap(),
                scheme: IdScheme::Pci,
                backend,
                gate: CcGate::Off,
            },
            cdi_dir: self.place.path().join("cdi"),
            plugin_dir: self.plugins(),
            poll: self.poll,
        };
        let (shutdown, readiness, metrics) = (self.shutdown.clone(), self.readiness.clone(), self.metrics.clone());
        tokio::spawn(async move { run(config, shutdown, readiness, &metrics).await })
    }

    async fn client(&self) -> DevicePluginClient<Channel> {
        let path = self.plugins().join("sandbox-pgpu.sock");
        DevicePluginClient::new(socket::connect(&path, Duration::from_secs(5)).await.unwrap())
    }

    async fn end(&self, agent: JoinHandle<Result<(), ControllerError>>) {
        self.shutdown.trigger();
        timeout(PATIENCE, agent).await.expect("The agent ends in time").unwrap().unwrap();
    }
}

fn allocate(ids: &[&str]) -> AllocateRequest {
    let ids = ids.iter().map(ToString::to_string).collect();
    AllocateRequest { container_requests: vec![ContainerAllocateRequest { devices_ids: ids }] }
}

const BOTH: &[&str] = &["0000:41:00.0 Healthy", "0000:c1:00.0 Healthy"];

#[tokio::test]
async fn units_are_registered_listed_changed_and_withdrawn() {
    let node = Node::new();
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);

    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    {
        let known = kubelet.known.lock().unwrap();
        let registration = &known.registrations[0];
        assert_eq!(registration.version, "v1beta1");
        assert_eq!(registration.endpoint, "sandbox-pgpu.sock");
        assert_eq!(registration.resource_name, "nvidia.com/pgpu");
        assert!(registration.options.as_ref().unwrap().get_preferred_allocation_available);
        let numa: Vec<i64> =
            known.lists["nvidia.com/pgpu"].iter().map(|device| device.topology.as_ref().unwrap().nodes[0].id).collect();
        assert_eq!(numa, [0, 1]);
    }
    until("ready", || node.readiness.is_ready()).await;
    let text = node.cdi("pgpu").expect("The file was there before the kubelet heard");
    assert!(text.contains("kind: nvidia.com/pgpu") && text.contains("- name: \"0000:c1:00.0\""), "{text}");
    assert_eq!(kubelet.list("nvidia.com/nvswitch"), None, "a resource without units is not registered");

    // Unbound, dead, gone, back.
    node.fake.get("0000:41:00.0").no_driver();
    kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Healthy"]).await;
    assert!(!node.cdi("pgpu").unwrap().contains("0000:41:00.0"), "what has no node cannot be resolved");
    node.fake.get("0000:c1:00.0").patch_config(0, &[0xff; 4]);
    kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Unhealthy"]).await;
    node.fake.remove("0000:41:00.0");
    kubelet.hears("nvidia.com/pgpu", &["0000:c1:00.0 Unhealthy"]).await;
    node.fake.remove("0000:c1:00.0");
    node.fake.gpu("0000:02:00.0", 0x2330).group(9);
    kubelet.hears("nvidia.com/pgpu", &[]).await;
    assert_eq!(node.cdi("pgpu"), None);
    node.fake.get("0000:02:00.0").driver("vfio-pci").cdev(4);
    kubelet.hears("nvidia.com/pgpu", &["0000:02:00.0 Healthy"]).await;

    // A switch appears: a second resource, live.
    node.fake.nvswitch("0000:81:00.0").group(7).driver("vfio-pci").cdev(2);
    kubelet.hears("nvidia.com/nvswitch", &["0000:81:00.0 Healthy"]).await;
    assert_eq!(kubelet.registrations(), 2, "a change of the list is no reason to register again");

    node.end(agent).await;
    assert!(node.cdi("pgpu").is_some(), "a pod that was admitted before may start after");
    assert!(!node.plugins().join("sandbox-pgpu.sock").exists());
    until("the streams have ended", || kubelet.list("nvidia.com/pgpu").is_none()).await;
    kubelet.end().await;
}

#[tokio::test]
async fn allocation_gives_nodes_and_refuses_what_it_must() {
    for (backend, nodes) in [
        (BackendChoice::Auto, vec!["/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"]),
        (BackendChoice::Legacy, vec!["/dev/vfio/vfio", "/dev/vfio/5", "/dev/vfio/6"]),
    ] {
        let node = Node::new();
        let kubelet = Running::start(&node.plugins());
        let agent = node.start(backend);
        kubelet.hears("nvidia.com/pgpu", BOTH).await;
        let mut client = node.client().await;

        let AllocateResponse { container_responses } =
            client.allocate(allocate(&["0000:41:00.0", "0000:c1:00.0"])).await.unwrap().into_inner();
        assert_eq!(container_responses.len(), 1);
        let response = &container_responses[0];
        let given: Vec<&str> = response.devices.iter().map(|device| device.host_path.as_str()).collect();
        assert_eq!(given, nodes);
        assert!(response.devices.iter().all(|device| device.container_path == device.host_path));
        assert!(response.devices.iter().all(|device| device.permissions == "mrw"));
        assert!(response.envs.is_empty() && response.mounts.is_empty());
        assert!(response.annotations.is_empty() && response.cdi_devices.is_empty());
        client.pre_start_container(PreStartContainerRequest::default()).await.unwrap();

        node.fake.get("0000:c1:00.0").no_driver();
        kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Healthy", "0000:c1:00.0 Unhealthy"]).await;
        let many: Vec<String> = (0..10_000).map(|number| format!("{number}")).collect();
        let huge = "x".repeat(1 << 20);
        let refusals: Vec<(AllocateRequest, Code, &str)> = vec![
            (allocate(&["0000:c1:00.0"]), Code::FailedPrecondition, "bound to no driver"),
            (allocate(&["0000:41:00.0", "7"]), Code::NotFound, "no device \"7\" of nvidia.com/pgpu"),
            (allocate(&["0000:41:00.0", "0000:41:00.0"]), Code::InvalidArgument, "asked for twice"),
            (allocate(&[]), Code::InvalidArgument, "names no device"),
            (AllocateRequest::default(), Code::InvalidArgument, "names no container"),
            (allocate(&many.iter().map(String::as_str).collect::<Vec<_>>()), Code::NotFound, "no device \"0\""),
            (allocate(&[&huge]), Code::NotFound, "xxx\"..."),
        ];
        for (request, code, words) in refusals {
            let status = client.allocate(request).await.unwrap_err();
            assert_eq!(status.code(), code, "{}", status.message());
            assert!(status.message().contains(words), "{}", status.message());
            assert!(status.message().len() < 300, "short enough for an event");
        }
        let oversized = "x".repeat(8 << 20);
        assert!(client.allocate(allocate(&[&oversized])).await.is_err());
        node.client().await.allocate(allocate(&["0000:41:00.0"])).await.expect("The plugin has survived");
        node.end(agent).await;
        kubelet.end().await;
    }
}

#[tokio::test]
async fn preferences_are_answered_over_the_wire() {
    let node = Node::new();
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    let request = |must: &[&str], size| PreferredAllocationRequest {
        container_requests: vec![ContainerPreferredAllocationRequest {
            available_device_ids: vec!["0000:c1:00.0".into(), "0000:41:00.0".into()],
            must_include_device_ids: must.iter().map(ToString::to_string).collect(),
            allocation_size: size,
        }],
    };
    let mut client = node.client().await;
    let answer = client.get_preferred_allocation(request(&["0000:c1:00.0"], 1)).await.unwrap().into_inner();
    assert_eq!(answer.container_responses[0].device_ids, ["0000:c1:00.0"]);
    let status = client.get_preferred_allocation(request(&[], -1)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    node.end(agent).await;
    kubelet.end().await;
}

#[tokio::test]
async fn a_kubelet_that_comes_late_refuses_restarts_or_loses_us_is_told_again() {
    let node = Node::new();
    let agent = node.start(BackendChoice::Auto);
    until("the socket is served before there is a kubelet", || node.plugins().join("sandbox-pgpu.sock").exists()).await;
    assert!(!node.readiness.is_ready());

    let mut kubelet = Running::start(&node.plugins());
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    for round in 0..20 {
        // Now with the old one ended in order, now with both at once as after a crash.
        let old = std::mem::replace(&mut kubelet, Running::start(&node.plugins()));
        if round % 2 == 0 {
            old.end().await;
        } else {
            old.task.abort();
        }
        kubelet.hears("nvidia.com/pgpu", BOTH).await;
    }

    // Our socket alone is removed.
    let before = kubelet.registrations();
    std::fs::remove_file(node.plugins().join("sandbox-pgpu.sock")).unwrap();
    until("registered again", || kubelet.registrations() > before).await;
    kubelet.hears("nvidia.com/pgpu", BOTH).await;

    // A kubelet that refuses is asked again, and with growing patience.
    kubelet.known.lock().unwrap().refuse = true;
    std::fs::remove_file(node.plugins().join("sandbox-pgpu.sock")).unwrap();
    kubelet.known.lock().unwrap().lists.clear();
    sleep(Duration::from_millis(300)).await;
    kubelet.known.lock().unwrap().refuse = false;
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    node.end(agent).await;
    kubelet.end().await;
}

#[tokio::test]
async fn a_kubelet_that_stops_to_listen_is_registered_with_again() {
    let node = Node::new();
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    until("ready", || node.readiness.is_ready()).await;
    // The streams end on the kubelet's side; its registration service lives on.
    let before = kubelet.registrations();
    kubelet.hang_up.send_replace(());
    until("not ready", || !node.readiness.is_ready()).await;
    until("registered again", || kubelet.registrations() > before).await;
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    until("ready again", || node.readiness.is_ready()).await;
    node.end(agent).await;
    kubelet.end().await;
}

/// `devices.json` with all GPUs verified, and a change of modes under way or not.
fn cc_manager_says(node: &Node, changing: bool) {
    let inventory = hw_probe::Inventory::scan(&node.fake.root());
    let record = |gpu: &hw_probe::PciFunction| DeviceRecord {
        bdf: gpu.bdf,
        identity: Identity::of(gpu),
        configured_mode: Some("on".into()),
        active_mode: Some("on".into()),
        verified_at: Some(jiff::Timestamp::now()),
        usable: !changing,
        error: None,
    };
    let transition = || Transition { target: "on".into(), step: "changing".into(), started_at: jiff::Timestamp::now() };
    DevicesFile {
        origin: Origin::now(inventory.host.boot_id.clone().unwrap(), None),
        transition: changing.then(transition),
        devices: inventory.gpus().map(record).collect(),
    }
    .store(&HostDir::open(node.place.path().join("state")).unwrap())
    .unwrap();
}

#[tokio::test]
async fn cc_managers_word_is_heard_without_a_poll_and_counted() {
    let node = Node { poll: Duration::from_hours(1), ..Node::new() };
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    // The first word comes after the start, when there was no folder for it yet.
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    for _ in 0..5 {
        cc_manager_says(&node, true);
        kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Unhealthy"]).await;
        let status = node.client().await.allocate(allocate(&["0000:41:00.0"])).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        // The word may come while the node is being looked at; the last one counts.
        cc_manager_says(&node, false);
        cc_manager_says(&node, true);
        cc_manager_says(&node, false);
        kubelet.hears("nvidia.com/pgpu", BOTH).await;
    }
    node.client().await.allocate(allocate(&["0000:41:00.0"])).await.unwrap();
    let text = node.metrics.encode().unwrap();
    for line in [
        "ccnode_plugin_units{resource=\"nvidia.com/pgpu\",health=\"healthy\",code=\"\"} 2",
        "ccnode_plugin_registrations_total{resource=\"nvidia.com/pgpu\"} 1",
        "ccnode_plugin_allocations_total{resource=\"nvidia.com/pgpu\",result=\"given\"} 1",
        "ccnode_plugin_allocations_total{resource=\"nvidia.com/pgpu\",result=\"refused\"} 5",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
    }
    assert!(!text.contains("unhealthy"), "{text}");
    node.end(agent).await;
    kubelet.end().await;
}

#[tokio::test]
async fn without_a_cdi_file_nothing_is_offered() {
    let node = Node::new();
    std::fs::write(node.place.path().join("cdi"), "a file in the place of the folder").unwrap();
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Unhealthy"]).await;
    let status = node.client().await.allocate(allocate(&["0000:41:00.0"])).await.unwrap_err();
    assert!(status.message().contains("CDI file could not be written"), "{}", status.message());
    std::fs::remove_file(node.place.path().join("cdi")).unwrap();
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    node.end(agent).await;
    kubelet.end().await;
}

#[tokio::test]
async fn an_unreadable_sysfs_withdraws_what_was_offered() {
    let node = Node::new();
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    let (sys, hidden) = (node.fake.path().join("sys"), node.fake.path().join("hidden"));
    std::fs::rename(&sys, &hidden).unwrap();
    kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Unhealthy"]).await;
    assert!(node.cdi("pgpu").is_some(), "what is not seen is not gone");
    std::fs::rename(&hidden, &sys).unwrap();
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    node.end(agent).await;
    kubelet.end().await;
}

#[tokio::test]
async fn another_plugin_on_the_same_socket_is_not_fought() {
    let node = Node::new();
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    until("ready", || node.readiness.is_ready()).await;

    let path = node.plugins().join("sandbox-pgpu.sock");
    let other = socket::listen(&path).unwrap();
    let registrations = kubelet.registrations();
    until("standing back", || !node.readiness.is_ready()).await;
    sleep(Duration::from_millis(200)).await;
    assert_eq!(kubelet.registrations(), registrations);
    timeout(PATIENCE, other.accept()).await.expect("The other was asked whether it lives").unwrap();

    drop(other);
    std::fs::remove_file(&path).unwrap();
    until("registered again", || kubelet.registrations() > registrations).await;
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    node.end(agent).await;
    kubelet.end().await;
}
