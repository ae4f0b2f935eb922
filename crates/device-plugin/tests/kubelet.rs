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
use device_plugin::controller::{Config, ControllerError, Looks, run};
use device_plugin::names::Naming;
use device_plugin::observe::Places;
use device_plugin::server::{Manner, PpciePolicy, Role};
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
use tonic::codegen::http::uri::PathAndQuery;
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
        let is_file = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| !kind.is_dir());
        for entry in std::fs::read_dir(folder).unwrap().flatten().filter(is_file) {
            if entry.file_name() != device_plugin::checkpoint::CHECKPOINT {
                std::fs::remove_file(entry.path()).unwrap();
            }
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
    manner: Manner,
    looks: Looks,
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
            manner: Manner::default(),
            looks: Looks::default(),
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
                gpu: match self.manner.role {
                    Role::Kata => "pgpu".parse().unwrap(),
                    Role::Kubevirt => Naming::PerModel,
                },
                nvswitch: "nvswitch".parse().unwrap(),
                scheme: IdScheme::Pci,
                backend,
                gate: CcGate::Off,
            },
            manner: self.manner,
            cdi_static_dir: self.place.path().join("etc/cdi"),
            cdi_dir: self.place.path().join("cdi"),
            plugin_dir: self.plugins(),
            poll: self.poll,
            looks: self.looks.clone(),
        };
        let (shutdown, readiness, metrics) = (self.shutdown.clone(), self.readiness.clone(), self.metrics.clone());
        tokio::spawn(async move { run(config, shutdown, readiness, &metrics).await })
    }

    /// The same as another process.
    fn anew(&mut self, backend: BackendChoice) -> JoinHandle<Result<(), ControllerError>> {
        (self.shutdown, self.readiness, self.metrics) = (Shutdown::manual(), Registry::default(), Metrics::new());
        self.start(backend)
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
    let has = |id: &str| node.cdi("pgpu").is_some_and(|text| text.contains(id));
    until("what has no node is in no file", || !has("0000:41:00.0") && has("0000:c1:00.0")).await;
    node.fake.get("0000:c1:00.0").patch_config(0, &[0xff; 4]);
    kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Unhealthy"]).await;
    node.fake.remove("0000:41:00.0");
    kubelet.hears("nvidia.com/pgpu", &["0000:c1:00.0 Unhealthy"]).await;
    node.fake.remove("0000:c1:00.0");
    node.fake.gpu("0000:02:00.0", 0x2330).group(9);
    kubelet.hears("nvidia.com/pgpu", &[]).await;
    until("the file without devices is removed", || node.cdi("pgpu").is_none()).await;
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
        // Another resource that lives as this one does, and a device that has died.
        node.fake.nvswitch("0000:05:00.0").group(7).driver("vfio-pci").cdev(2);
        node.fake.gpu("0000:d1:00.0", 0x2330).group(8).driver("vfio-pci").cdev(3).config(&[0xff; 4096]);
        kubelet.hears("nvidia.com/nvswitch", &["0000:05:00.0 Healthy"]).await;
        let ill = ["0000:41:00.0 Healthy", "0000:c1:00.0 Unhealthy", "0000:d1:00.0 Unhealthy"];
        kubelet.hears("nvidia.com/pgpu", &ill).await;
        let many: Vec<String> = (0..10_000).map(|number| format!("{number}")).collect();
        let addresses: Vec<String> =
            (0..10_000).map(|number| format!("{:04x}:{:02x}:00.0", number >> 8, number & 0xff)).collect();
        let huge = "x".repeat(1 << 20);
        let refusals: Vec<(AllocateRequest, Code, &str)> = vec![
            (allocate(&["0000:c1:00.0"]), Code::FailedPrecondition, "bound to no driver"),
            (allocate(&["0000:d1:00.0"]), Code::FailedPrecondition, "off the bus"),
            (allocate(&["0000:41:00.0", "0000:d1:00.0"]), Code::FailedPrecondition, "(dead)"),
            (allocate(&["0000:05:00.0"]), Code::NotFound, "no device \"0000:05:00.0\" of nvidia.com/pgpu"),
            (allocate(&["0000:41:00.0", "7"]), Code::NotFound, "no device \"7\" of nvidia.com/pgpu"),
            (allocate(&["0000:41:00.0", "0000:41:00.0"]), Code::InvalidArgument, "asked for twice"),
            (allocate(&[]), Code::InvalidArgument, "names no device"),
            (AllocateRequest::default(), Code::InvalidArgument, "names no container"),
            (allocate(&many.iter().map(String::as_str).collect::<Vec<_>>()), Code::NotFound, "no device \"0\""),
            (
                allocate(&addresses.iter().map(String::as_str).collect::<Vec<_>>()),
                Code::NotFound,
                "no device \"0000:00:00.0\"",
            ),
            (allocate(&[&huge]), Code::NotFound, "xxx\"..."),
        ];
        for (request, code, words) in refusals {
            let status = client.allocate(request).await.unwrap_err();
            assert_eq!(status.code(), code, "{}", status.message());
            assert!(status.message().contains(words), "{}", status.message());
            assert!(status.message().len() < 300, "short enough for an event");
        }
        let oversized = "x".repeat(8 << 20);
        let status = client.allocate(allocate(&[&oversized])).await.unwrap_err();
        assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
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

    let restarts = "ccnode_plugin_kubelet_restarts_total{resource=\"nvidia.com/pgpu\"} 20\n";
    let text = node.metrics.encode().unwrap();
    assert!(text.contains(restarts), "{text}");

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
    // A kubelet that goes removes its socket, and hangs up later.
    std::fs::remove_file(node.plugins().join("kubelet.sock")).unwrap();
    until("not ready without a kubelet", || !node.readiness.is_ready()).await;
    node.end(agent).await;
    kubelet.end().await;
}

/// `devices.json` with all GPUs verified in `mode`, and a change of modes under way or not.
fn cc_manager_says(node: &Node, mode: &str, changing: bool) {
    let inventory = hw_probe::Inventory::scan(&node.fake.root());
    let record = |gpu: &hw_probe::PciFunction| DeviceRecord {
        bdf: gpu.bdf,
        identity: Identity::of(gpu),
        configured_mode: Some(mode.into()),
        active_mode: Some(mode.into()),
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
        cc_manager_says(&node, "on", true);
        kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Unhealthy"]).await;
        let status = node.client().await.allocate(allocate(&["0000:41:00.0"])).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        // The word may come while the node is being looked at; the last one counts.
        cc_manager_says(&node, "on", false);
        cc_manager_says(&node, "on", true);
        cc_manager_says(&node, "on", false);
        kubelet.hears("nvidia.com/pgpu", BOTH).await;
    }
    node.client().await.allocate(allocate(&["0000:41:00.0"])).await.unwrap();
    let text = node.metrics.encode().unwrap();
    for line in [
        "ccnode_plugin_units{resource=\"nvidia.com/pgpu\",health=\"healthy\",code=\"\"} 2",
        "ccnode_plugin_registered{resource=\"nvidia.com/pgpu\"} 1",
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
async fn what_was_offered_before_a_restart_is_not_forgotten_nor_taken_from_admitted_pods() {
    let mut node = Node::new();
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    let offered = node.cdi("pgpu").unwrap();
    node.end(agent).await;

    // The next one cannot see the node at first.
    let (sys, hidden) = (node.fake.path().join("sys"), node.fake.path().join("hidden"));
    std::fs::rename(&sys, &hidden).unwrap();
    let agent = node.anew(BackendChoice::Auto);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(node.cdi("pgpu").as_ref(), Some(&offered), "a pod that was admitted may start now");
    std::fs::rename(&hidden, &sys).unwrap();
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    node.end(agent).await;

    // And this one finds a GPU without its driver.
    node.fake.unbind("0000:41:00.0").unwrap();
    let agent = node.anew(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Healthy"]).await;
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

    // The CDI file is the other's now, and is not written over.
    let ours = node.cdi("pgpu").unwrap();
    let file = node.place.path().join("cdi/nvidia.com-pgpu.yaml");
    let theirs = ours.replace("0000:c1:00.0", "7");
    assert_ne!(theirs, ours);
    std::fs::write(&file, &theirs).unwrap();
    node.fake.get("0000:c1:00.0").no_driver();
    sleep(Duration::from_millis(500)).await;
    assert_eq!(node.cdi("pgpu").as_ref(), Some(&theirs));
    node.fake.get("0000:c1:00.0").driver("vfio-pci").cdev(1);

    drop(other);
    std::fs::remove_file(&path).unwrap();
    until("registered again", || kubelet.registrations() > registrations).await;
    assert_eq!(node.cdi("pgpu"), Some(ours), "it is ours again before the kubelet hears of us");
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    node.end(agent).await;
    kubelet.end().await;
}

#[tokio::test]
async fn kubevirt_is_served_from_the_same_units_under_its_own_names() {
    let node = Node { manner: Manner { role: Role::Kubevirt, ..Manner::default() }, ..Node::new() };
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    let resource = "nvidia.com/GH100_H100_SXM5_80GB";
    kubelet.hears(resource, BOTH).await;
    {
        let known = kubelet.known.lock().unwrap();
        assert_eq!(known.registrations.len(), 1);
        assert_eq!(known.registrations[0].endpoint, "kubevirt-GH100_H100_SXM5_80GB.sock");
        assert_eq!(known.lists[resource][1].topology.as_ref().unwrap().nodes[0].id, 1);
    }
    let socket = node.plugins().join("kubevirt-GH100_H100_SXM5_80GB.sock");
    let mut client = DevicePluginClient::new(socket::connect(&socket, Duration::from_secs(5)).await.unwrap());
    let answer = client.allocate(allocate(&["0000:41:00.0", "0000:c1:00.0"])).await.unwrap().into_inner();
    let response = &answer.container_responses[0];
    assert_eq!(response.envs["PCI_RESOURCE_NVIDIA_COM_GH100_H100_SXM5_80GB"], "0000:41:00.0,0000:c1:00.0");
    let nodes: Vec<&str> = response.devices.iter().map(|device| device.host_path.as_str()).collect();
    assert_eq!(
        nodes,
        [
            "/dev/vfio/vfio",
            "/dev/vfio/5",
            "/dev/vfio/devices/vfio0",
            "/dev/iommu",
            "/dev/vfio/6",
            "/dev/vfio/devices/vfio1"
        ]
    );
    assert!(!node.place.path().join("cdi").exists(), "KubeVirt reads no CDI files");
    node.fake.get("0000:c1:00.0").no_driver();
    kubelet.hears(resource, &["0000:41:00.0 Healthy", "0000:c1:00.0 Unhealthy"]).await;
    node.end(agent).await;
    kubelet.end().await;
}

#[tokio::test]
async fn a_part_of_a_protected_domain_is_told_or_refused_as_cc_manager_says_what_the_mode_is() {
    for (ppcie, given) in [(PpciePolicy::Warn, true), (PpciePolicy::Enforce, false), (PpciePolicy::Off, true)] {
        let node = Node { manner: Manner { ppcie, ..Manner::default() }, ..Node::new() };
        cc_manager_says(&node, "on", false);
        let kubelet = Running::start(&node.plugins());
        let agent = node.start(BackendChoice::Auto);
        kubelet.hears("nvidia.com/pgpu", BOTH).await;
        let mut client = node.client().await;
        client.allocate(allocate(&["0000:41:00.0"])).await.expect("Outside of protected PCIe one is enough");
        cc_manager_says(&node, "ppcie", true);
        kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Unhealthy"]).await;
        cc_manager_says(&node, "ppcie", false);
        kubelet.hears("nvidia.com/pgpu", BOTH).await;
        client.allocate(allocate(&["0000:c1:00.0", "0000:41:00.0"])).await.expect("The whole is given");
        let part = client.allocate(allocate(&["0000:41:00.0"])).await;
        assert_eq!(part.is_ok(), given, "{ppcie:?}: {part:?}");
        if let Err(status) = part {
            assert!(status.message().contains("protected PCIe"), "{}", status.message());
        }
        let counted = "ccnode_plugin_partial_domains_total{resource=\"nvidia.com/pgpu\"} 1";
        let text = node.metrics.encode().unwrap();
        assert_eq!(text.contains(counted), ppcie != PpciePolicy::Off, "{text}");
        node.end(agent).await;
        kubelet.end().await;
    }
}

#[tokio::test]
async fn a_foreign_file_that_defines_a_unit_takes_it_from_kata_and_so_from_the_kubelet() {
    let node = Node { poll: Duration::from_hours(1), ..Node::new() };
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    let foreign = node.place.path().join("cdi/somebody.json");
    let text = r#"{"cdiVersion": "0.5.0", "kind": "nvidia.com/pgpu", "devices": [{"name": "0000:c1:00.0",
        "containerEdits": {"deviceNodes": [{"path": "/dev/vfio/devices/vfio1"}]}}]}"#;
    std::fs::write(&foreign, text).unwrap();
    // By two files that define one device Kata finds the others neither.
    let ill = ["0000:41:00.0 Unhealthy", "0000:c1:00.0 Unhealthy"];
    kubelet.hears("nvidia.com/pgpu", &ill).await;
    for id in ["0000:41:00.0", "0000:c1:00.0"] {
        let status = node.client().await.allocate(allocate(&[id])).await.unwrap_err();
        assert!(status.message().contains("somebody.json") && status.message().contains("cdi-conflict"), "{status:?}");
    }
    std::fs::remove_file(&foreign).unwrap();
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    // What only this agent cannot read is told, and takes nothing away.
    nix::unistd::mkfifo(&foreign, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let unread = format!("ccnode_plugin_cdi_problem{{file=\"{}\",code=\"cdi-unread\"}} 1", foreign.display());
    until("the unread file is named", || node.metrics.encode().unwrap().contains(&unread)).await;
    node.client().await.allocate(allocate(&["0000:41:00.0"])).await.unwrap();
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    std::fs::remove_file(&foreign).unwrap();
    std::fs::write(&foreign, "{").unwrap();
    kubelet.hears("nvidia.com/pgpu", &ill).await;
    let status = node.client().await.allocate(allocate(&["0000:41:00.0"])).await.unwrap_err();
    assert!(status.message().contains("somebody.json") && status.message().contains("cdi-broken"), "{status:?}");
    let broken = |count: u8| format!("ccnode_plugin_cdi_problem_files {count}\n");
    until("the broken file is counted", || node.metrics.encode().unwrap().contains(&broken(1))).await;
    let named = format!("ccnode_plugin_cdi_problem{{file=\"{}\",code=\"cdi-broken\"}} 1", foreign.display());
    until("the broken file is named", || node.metrics.encode().unwrap().contains(&named)).await;
    let told = || {
        let text = std::fs::read_to_string(node.plugins().join("ccnode/units.json")).unwrap_or_default();
        text.contains(&format!("\"path\":\"{}\",\"code\":\"cdi-broken\"", foreign.display()))
    };
    until("people are told of the file", told).await;
    std::fs::remove_file(&foreign).unwrap();
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    until("no file is broken", || node.metrics.encode().unwrap().contains(&broken(0))).await;
    assert!(!node.metrics.encode().unwrap().contains("cdi-broken"));
    until("nor do people hear of one", || !told()).await;

    // Ours is put right as soon as somebody has changed it.
    let ours = node.cdi("pgpu").unwrap();
    std::fs::write(node.place.path().join("cdi/nvidia.com-pgpu.yaml"), "kind: [").unwrap();
    until("ours is written again", || node.cdi("pgpu").as_ref() == Some(&ours)).await;
    std::fs::remove_file(node.place.path().join("cdi/nvidia.com-pgpu.yaml")).unwrap();
    until("ours is there again", || node.cdi("pgpu").as_ref() == Some(&ours)).await;
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    node.end(agent).await;
    kubelet.end().await;
}

/// Any bytes in the place of a message.
#[derive(Clone, PartialEq, prost::Message)]
struct Bytes {
    #[prost(bytes = "vec", tag = "1")]
    field: Vec<u8>,
}

#[tokio::test]
async fn frames_that_are_no_messages_get_a_status_and_do_no_harm() {
    let node = Node::new();
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    let path = node.plugins().join("sandbox-pgpu.sock");
    let mut refused = 0;
    // An ID that is not UTF-8, a container that is cut off, a field of another type, noise.
    for field in [&b"\x0a\x02\xff\xfe"[..], b"\x0a\x20\x30", b"\x08\x01", &[0xff; 64], &[0x0a; 4096]] {
        for method in ["Allocate", "GetPreferredAllocation", "NoSuchMethod"] {
            let channel = socket::connect(&path, Duration::from_secs(5)).await.unwrap();
            let mut client = tonic::client::Grpc::new(channel);
            client.ready().await.unwrap();
            let method = PathAndQuery::try_from(format!("/v1beta1.DevicePlugin/{method}")).unwrap();
            let codec = tonic_prost::ProstCodec::<Bytes, AllocateResponse>::default();
            let answer = client.unary(Request::new(Bytes { field: field.to_vec() }), method, codec).await;
            refused += usize::from(answer.is_err());
            assert!(answer.is_err(), "{field:?}");
        }
    }
    node.client().await.allocate(allocate(&["0000:41:00.0"])).await.expect("The plugin has survived");
    assert_eq!(kubelet.registrations(), 1, "and the kubelet has noticed nothing");
    eprintln!("{refused} frames refused");
    node.end(agent).await;
    kubelet.end().await;
}

#[tokio::test]
async fn what_the_kubelet_takes_for_healthy_can_be_resolved_at_every_moment() {
    let node = Node::new();
    let kubelet = Running::start(&node.plugins());
    let agent = node.start(BackendChoice::Auto);
    kubelet.hears("nvidia.com/pgpu", BOTH).await;
    let (known, cdi) = (kubelet.known.clone(), node.place.path().join("cdi/nvidia.com-pgpu.yaml"));
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let until_over = over.clone();
    let healthy = move || -> Vec<String> {
        let known = known.lock().unwrap();
        let devices = known.lists.get("nvidia.com/pgpu").into_iter().flatten();
        devices.filter(|device| device.health == "Healthy").map(|device| device.id.clone()).collect()
    };
    let watcher = std::thread::spawn(move || {
        let (mut looks, mut short) = (0, Vec::new());
        while !until_over.load(std::sync::atomic::Ordering::Relaxed) {
            let before = healthy();
            let text = std::fs::read_to_string(&cdi).unwrap_or_default();
            // What the kubelet believed before the file was read, and after.
            let after = healthy();
            short.extend(before.into_iter().filter(|id| after.contains(id) && !text.contains(id.as_str())));
            looks += 1;
            std::thread::sleep(Duration::from_micros(200));
        }
        (looks, short)
    });
    for round in 0..12_u64 {
        let gpu = node.fake.get("0000:41:00.0");
        gpu.no_driver();
        kubelet.hears("nvidia.com/pgpu", &["0000:41:00.0 Unhealthy", "0000:c1:00.0 Healthy"]).await;
        // Back before the file has changed, as it changes, and after.
        sleep(Duration::from_millis(round * 70)).await;
        gpu.driver("vfio-pci").cdev(2 + u32::try_from(round).unwrap());
        kubelet.hears("nvidia.com/pgpu", BOTH).await;
    }
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    let (looks, short) = watcher.join().unwrap();
    assert!(short.is_empty() && looks > 100, "{looks} looks: {short:?}");
    eprintln!("{looks} looks during 12 rebinds; 0 IDs that could not be resolved");
    node.end(agent).await;
    kubelet.end().await;
}
