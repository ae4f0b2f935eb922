//! Whole-kubelet tests with a toy plugin.

mod with_api_server;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kubelet_api::device_plugin as dp;
use kubelet_api::pod_resources as pr;
use kubelet_api::pod_resources::pod_resources_lister_client::PodResourcesListerClient;
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::control::{self, Command};
use super::toy::{self, Toy};
use super::{Config, Container, Error, Kubelet, Pod};

const R: &str = "nvidia.com/pgpu";
const SOON: Duration = Duration::from_secs(10);

/// A kubelet in a folder of its own.
struct Lab {
    folder: tempfile::TempDir,
    kubelet: Arc<Kubelet>,
}

impl Lab {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(adjust: impl FnOnce(&mut Config)) -> Self {
        Self::with_client(None, adjust).await
    }

    async fn with_client(client: Option<kube::Client>, adjust: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let kubelet = start(folder.path(), client, adjust).await;
        Self { folder, kubelet }
    }

    fn plugin_dir(&self) -> PathBuf {
        self.folder.path().join("dp")
    }

    /// Serves a toy on a socket in the plugin folder.
    fn serve(&self, toy: &Arc<Toy>, socket: &str) {
        toy.serve(&self.plugin_dir().join(socket)).unwrap();
    }

    async fn register(&self, version: &str, endpoint: &str, resource: &str) -> Result<(), Status> {
        toy::register(&self.plugin_dir(), version, endpoint, resource, None).await
    }

    async fn plug_in(&self, toy: Toy) -> Arc<Toy> {
        let toy = Arc::new(toy);
        self.serve(&toy, "p.sock");
        self.register("v1beta1", "p.sock", R).await.unwrap();
        toy
    }

    /// Capacity and allocatable.
    fn counts(&self) -> (u64, u64) {
        let resource = &self.kubelet.dump()["resources"][R];
        (resource["capacity"].as_u64().unwrap_or(0), resource["allocatable"].as_u64().unwrap_or(0))
    }

    async fn wait(&self, count: usize) {
        self.kubelet.wait_allocatable(R, count, SOON).await.unwrap();
    }

    /// What the runtimes take for the machine.
    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Makes device 0 a CDI device with a VFIO group of one function.
    fn add_cdi_spec(&self) {
        let root = self.root();
        fs::create_dir_all(root.join("var/run/cdi")).unwrap();
        fs::create_dir_all(root.join("sys/kernel/iommu_groups/0/devices/0000:41:00.0")).unwrap();
        let spec = r#"{"cdiVersion":"0.5.0","kind":"nvidia.com/pgpu","devices":[{"name":"0","containerEdits":{"deviceNodes":[{"path":"/dev/vfio/0"}]}}]}"#;
        fs::write(root.join("var/run/cdi/x.json"), spec).unwrap();
    }

    async fn await_running(&self) {
        let deadline = tokio::time::Instant::now() + SOON;
        while self.kubelet.dump()["pods"][0]["phase"] != "Running" {
            assert!(tokio::time::Instant::now() < deadline, "{}", self.kubelet.dump()["pods"]);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn admit(&self, name: &str, count: usize) -> super::Outcome {
        self.kubelet.admit(pod(name, count)).await.unwrap()
    }

    async fn lister(&self) -> PodResourcesListerClient<tonic::transport::Channel> {
        let socket = self.folder.path().join("pr/s");
        PodResourcesListerClient::new(kubelet_api::socket::connect(&socket, SOON).await.unwrap())
    }

    /// Ids of a pod's first container.
    fn ids(&self, name: &str) -> Vec<String> {
        let dump = self.kubelet.dump();
        let pod = dump["pods"].as_array().unwrap().iter().find(|pod| pod["name"] == name).unwrap().clone();
        serde_json::from_value(pod["containers"][0]["allocations"][R]["ids"].clone()).unwrap_or_default()
    }

    /// Methods called so far, without the streams.
    fn calls(&self) -> Vec<String> {
        let dump = self.kubelet.dump();
        let calls = dump["calls"].as_array().unwrap().iter();
        calls
            .map(|call| call["method"].as_str().unwrap().to_owned())
            .filter(|method| method != "ListAndWatch")
            .collect()
    }
}

async fn start(folder: &Path, client: Option<kube::Client>, adjust: impl FnOnce(&mut Config)) -> Arc<Kubelet> {
    let mut config = Config::new("node", folder.join("dp"), folder.join("pr/s"));
    config.dial_deadline = Duration::from_millis(300);
    config.root = folder.join("root");
    fs::create_dir_all(config.root.join("dev/vfio")).unwrap();
    for id in 0..4 {
        fs::write(config.root.join(format!("dev/vfio/{id}")), "").unwrap();
    }
    adjust(&mut config);
    Kubelet::start(config, client).await.unwrap()
}

fn pod(name: &str, count: usize) -> Pod {
    let container = Container { name: "main".into(), limits: [(R.to_owned(), count)].into(), restartable: false };
    Pod {
        uid: format!("uid-{name}"),
        namespace: "n".into(),
        name: name.into(),
        runtime_class: String::new(),
        init_containers: vec![],
        containers: vec![container],
    }
}

#[tokio::test]
async fn registration_is_refused_with_the_real_texts() {
    let lab = Lab::new().await;
    let cases = [
        (
            ("v1", "p.sock", R),
            r#"requested API version "v1" is not supported by kubelet. Supported version is ["v1beta1"]"#,
        ),
        (("v1beta1", "p.sock", "noslash"), r#"the ResourceName "noslash" is invalid"#),
        (("v1beta1", "p.sock", "kubernetes.io/x"), r#"the ResourceName "kubernetes.io/x" is invalid"#),
        (("v1beta1", "gone.sock", R), "failed to dial device plugin: context deadline exceeded"),
    ];
    for ((version, endpoint, resource), text) in cases {
        let before = std::time::Instant::now();
        let status = lab.register(version, endpoint, resource).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unknown, text));
        let waited = before.elapsed() >= Duration::from_millis(300);
        assert_eq!(waited, endpoint == "gone.sock", "only an absent endpoint takes the whole deadline");
    }
    let toy = Arc::new(Toy::new(&[]));
    toy.fails("GetDevicePluginOptions", Status::unimplemented("no options"));
    lab.serve(&toy, "p.sock");
    let status = lab.register("v1beta1", "p.sock", R).await.unwrap_err();
    assert_eq!(status.code(), Code::Unknown);
    assert_eq!(
        status.message(),
        "failed to get device plugin options: rpc error: code = Unimplemented desc = no options"
    );
    assert_eq!(lab.kubelet.dump()["resources"][R]["registrations"], 3, "refused ones count too");
}

#[tokio::test]
async fn a_plugin_that_serves_late_is_found_within_the_deadline() {
    let lab = Lab::with(|config| config.dial_deadline = SOON).await;
    let toy = Arc::new(Toy::new(&[("0", true)]));
    let (registered, ()) = tokio::join!(lab.register("v1beta1", "p.sock", R), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        lab.serve(&toy, "p.sock");
    });
    registered.unwrap();
    lab.wait(1).await;
}

#[tokio::test]
async fn health_and_loss_of_the_plugin_show_in_allocatable_alone() {
    let lab = Lab::new().await;
    let toy = lab.plug_in(Toy::new(&[("0", true), ("1", true), ("2", true), ("3", true)])).await;
    lab.wait(4).await;
    toy.has(&[("0", true), ("1", false), ("2", true), ("3", false)]);
    lab.wait(2).await;
    assert_eq!(lab.counts(), (4, 2));
    toy.end();
    lab.wait(0).await;
    assert_eq!(lab.counts(), (4, 0));
    lab.plug_in(Toy::new(&[("0", true)])).await;
    lab.wait(1).await;
    assert_eq!(lab.counts(), (1, 1));
}

#[tokio::test]
async fn a_lost_plugin_leaves_the_books_after_the_grace_period() {
    let lab = Lab::with(|config| config.stop_grace = Duration::from_millis(50)).await;
    let toy = lab.plug_in(Toy::new(&[("0", true)])).await;
    lab.wait(1).await;
    toy.end();
    lab.wait(0).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(lab.counts(), (0, 0));
}

#[tokio::test]
async fn a_second_registration_takes_over_and_the_end_of_the_first_stream_takes_it_down() {
    let lab = Lab::new().await;
    let old = lab.plug_in(Toy::new(&[("0", true)])).await;
    lab.wait(1).await;
    let new = Arc::new(Toy::new(&[("0", true), ("1", true)]));
    lab.serve(&new, "q.sock");
    lab.register("v1beta1", "q.sock", R).await.unwrap();
    lab.wait(2).await;
    assert_eq!(lab.admit("a", 1).await.phase, "Running");
    let call = lab.kubelet.dump()["calls"].as_array().unwrap().iter().rfind(|c| c["method"] == "Allocate").cloned();
    assert_eq!(call.unwrap()["socket"], "q.sock");
    // The real kubelet's handling goes by the resource name alone.
    old.end();
    lab.wait(0).await;
    let outcome = lab.admit("b", 1).await;
    assert_eq!((outcome.phase.as_str(), outcome.reason.as_str()), ("Failed", "UnexpectedAdmissionError"));
    new.has(&[("0", true), ("1", true), ("2", true)]);
    lab.wait(3).await;
    assert_eq!(
        lab.admit("c", 1).await.message,
        "Pod was rejected: Allocate failed due to endpoint nvidia.com/pgpu has been stopped, which is unexpected"
    );
}

#[tokio::test]
async fn calls_for_a_pod_come_in_the_real_order() {
    let lab = Lab::new().await;
    let mut toy = Toy::new(&[("0", true), ("1", true), ("2", true)]);
    toy.options = dp::DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true };
    toy.preferred = vec!["2".into(), "0".into()];
    lab.plug_in(toy).await;
    lab.wait(3).await;
    assert_eq!(lab.admit("a", 2).await.phase, "Running");
    assert_eq!(
        lab.calls(),
        ["GetDevicePluginOptions", "Register", "GetPreferredAllocation", "Allocate", "PreStartContainer"]
    );
    assert_eq!(lab.ids("a"), ["0", "2"]);
    let dump = lab.kubelet.dump();
    let nodes = &dump["pods"][0]["containers"][0]["allocations"][R]["response"]["devices"];
    assert_eq!(nodes[0], json!({"container_path": "/dev/vfio/0", "host_path": "/dev/vfio/0", "permissions": "mrw"}));
    let holders: Vec<&Value> =
        dump["resources"][R]["devices"].as_array().unwrap().iter().map(|device| &device["allocated_to"]).collect();
    assert_eq!(holders, [&json!("n/a/main"), &Value::Null, &json!("n/a/main")]);
}

#[tokio::test]
async fn pods_are_rejected_for_the_real_reasons_and_leave_no_trace() {
    let lab = Lab::new().await;
    let toy = lab.plug_in(Toy::new(&[("0", true)])).await;
    lab.wait(1).await;
    toy.fails("Allocate", Status::internal("group is not viable"));
    let outcome = lab.admit("a", 1).await;
    assert_eq!((outcome.phase.as_str(), outcome.reason.as_str()), ("Failed", "UnexpectedAdmissionError"));
    assert_eq!(
        outcome.message,
        "Pod was rejected: Allocate failed due to rpc error: code = Internal desc = group is not viable, which is unexpected"
    );
    toy.works();
    assert_eq!(lab.admit("b", 1).await.phase, "Running", "the failed one holds nothing");
    assert_eq!(
        lab.admit("c", 1).await.message,
        "Pod was rejected: Allocate failed due to requested number of devices unavailable for nvidia.com/pgpu. Requested: 1, Available: 0, which is unexpected"
    );
    lab.kubelet.remove("n", "b").await.unwrap();
    assert_eq!(lab.admit("d", 1).await.phase, "Running", "the removed one's device is free");
    assert!(matches!(lab.kubelet.admit(pod("d", 1)).await, Err(Error::PodExists(_))));
    assert!(matches!(lab.kubelet.remove("n", "nobody").await, Err(Error::NoPod(_))));
    let mut unknown = pod("e", 1);
    unknown.containers[0].limits = [("other.io/thing".to_owned(), 1)].into();
    assert_eq!(lab.kubelet.admit(unknown).await.unwrap().phase, "Running", "not the device manager's business");
}

#[tokio::test]
async fn a_container_that_cannot_be_readied_waits_with_its_devices() {
    let lab = Lab::with(|config| config.container_retry = Duration::from_millis(20)).await;
    let mut toy = Toy::new(&[("0", true)]);
    toy.options.pre_start_required = true;
    toy.fails("PreStartContainer", Status::unavailable("not yet"));
    let toy = lab.plug_in(toy).await;
    lab.wait(1).await;
    let outcome = lab.admit("a", 1).await;
    assert_eq!((outcome.phase.as_str(), outcome.reason.as_str()), ("Pending", "CreateContainerConfigError"));
    assert!(outcome.message.ends_with("rpc error: code = Unavailable desc = not yet"), "{}", outcome.message);
    assert_eq!(lab.ids("a"), ["0"]);
    lab.kubelet.restart(Duration::ZERO).await.unwrap();
    lab.serve(&toy, "p.sock");
    lab.register("v1beta1", "p.sock", R).await.unwrap();
    toy.works();
    lab.await_running().await;
}

#[tokio::test]
async fn a_container_waits_for_what_its_runtime_does_not_find() {
    let node = "failed to generate container spec: lstat /dev/vfio/0: no such file or directory";
    let name = "CDI device injection failed: unresolvable CDI devices nvidia.com/pgpu=0";
    let shim = "Failed to create pod sandbox: CDI device nvidia.com/pgpu=0 is unresolvable: no spec defines it";
    for (class, cdi, node_is_there, reason, message) in [
        ("", false, false, "CreateContainerError", node),
        ("", true, true, "CreateContainerError", name),
        ("kata-qemu-nvidia-gpu-snp", false, true, "ContainerCreating", shim),
    ] {
        let lab = Lab::with(|config| config.container_retry = Duration::from_millis(20)).await;
        let mut toy = Toy::new(&[("0", true)]);
        toy.cdi = cdi.then(|| R.to_owned());
        lab.plug_in(toy).await;
        lab.wait(1).await;
        if !node_is_there {
            fs::remove_file(lab.root().join("dev/vfio/0")).unwrap();
        }
        let pod = Pod { runtime_class: class.into(), ..pod("a", 1) };
        let outcome = lab.kubelet.admit(pod).await.unwrap();
        assert_eq!(
            (outcome.phase.as_str(), outcome.reason.as_str()),
            ("Pending", reason),
            "{class}: {}",
            outcome.message
        );
        assert_eq!(outcome.message, message);
        assert_eq!(lab.ids("a"), ["0"]);
        // When it is there, the pod runs.
        lab.add_cdi_spec();
        fs::write(lab.root().join("dev/vfio/0"), "").unwrap();
        lab.await_running().await;
    }
}

#[tokio::test]
async fn kata_needs_nothing_for_a_pod_without_devices() {
    let lab = Lab::new().await;
    let pod = Pod { runtime_class: "kata-qemu".into(), ..pod("a", 0) };
    assert_eq!(lab.kubelet.admit(pod).await.unwrap().phase, "Running");
}

#[tokio::test]
async fn a_restart_wipes_sockets_and_keeps_allocations() {
    let lab = Lab::new().await;
    let toy = Arc::new(Toy::new(&[("0", true), ("1", true)]));
    lab.serve(&toy, "p.sock");
    lab.register("v1beta1", "p.sock", R).await.unwrap();
    lab.wait(2).await;
    assert_eq!(lab.admit("a", 1).await.phase, "Running");
    let held = lab.ids("a");
    let kubelet_sock = lab.plugin_dir().join("kubelet.sock");
    fs::write(lab.plugin_dir().join("DEPRECATION"), "").unwrap();
    let identity =
        |path: &Path| fs::metadata(path).map(|found| (found.ino(), found.ctime(), found.ctime_nsec())).unwrap();
    let before = identity(&kubelet_sock);

    lab.kubelet.stop().await.unwrap();
    assert!(lab.plugin_dir().join("p.sock").exists() && kubelet_sock.exists(), "a killed kubelet leaves all behind");
    assert!(kubelet_api::socket::connect(&kubelet_sock, SOON).await.is_err());
    assert!(matches!(lab.kubelet.admit(pod("x", 1)).await, Err(Error::Stopped)));
    lab.kubelet.resume().await.unwrap();

    assert!(!lab.plugin_dir().join("p.sock").exists());
    assert!(lab.plugin_dir().join("DEPRECATION").exists());
    assert_ne!(identity(&kubelet_sock), before);
    assert_eq!(lab.counts(), (0, 0));
    assert_eq!(lab.ids("a"), held);
    assert!(lab.admit("b", 1).await.message.contains("no healthy devices present"));

    lab.serve(&toy, "p.sock");
    lab.register("v1beta1", "p.sock", R).await.unwrap();
    lab.wait(2).await;
    assert_eq!(lab.admit("c", 1).await.phase, "Running");
    assert_ne!(lab.ids("c"), held);
}

#[tokio::test]
async fn the_checkpoint_outlives_the_process() {
    let lab = Lab::new().await;
    lab.plug_in(Toy::new(&[("0", true), ("1", true)])).await;
    lab.wait(2).await;
    lab.admit("a", 1).await;
    lab.kubelet.stop().await.unwrap();
    let Some(checkpoint) = super::checkpoint::read(&lab.plugin_dir()).unwrap() else { panic!("no checkpoint") };
    assert_eq!(checkpoint.resources, [R]);
    assert_eq!(checkpoint.pods.keys().collect::<Vec<_>>(), ["uid-a"]);
    // Another process, with nobody to tell it of the pod: the resource is known, its devices are not.
    let kubelet = start(lab.folder.path(), None, |_| {}).await;
    assert_eq!(kubelet.dump()["resources"][R]["capacity"], 0);
    let damaged = fs::read_to_string(lab.plugin_dir().join("kubelet_internal_checkpoint")).unwrap().replace('0', "1");
    kubelet.stop().await.unwrap();
    fs::write(lab.plugin_dir().join("kubelet_internal_checkpoint"), damaged).unwrap();
    kubelet.resume().await.unwrap();
    assert_eq!(kubelet.dump()["resources"], json!({}), "a damaged checkpoint is as good as none");
}

#[tokio::test]
async fn pod_resources_tell_devices_one_by_one() {
    let lab = Lab::new().await;
    let toy = Toy::new(&[("0", true), ("1", false)]);
    toy.devices.send_modify(|devices| {
        devices[0].topology = Some(dp::TopologyInfo { nodes: vec![dp::NumaNode { id: 1 }] });
    });
    lab.plug_in(toy).await;
    lab.wait(1).await;
    lab.admit("a", 1).await;
    lab.admit("b", 1).await;
    let mut lister = lab.lister().await;
    let numa = Some(pr::TopologyInfo { nodes: vec![pr::NumaNode { id: 1 }] });
    let device = pr::ContainerDevices { resource_name: R.into(), device_ids: vec!["0".into()], topology: numa };
    let container = pr::ContainerResources { name: "main".into(), devices: vec![device.clone()], ..Default::default() };
    let expected =
        pr::PodResources { name: "a".into(), namespace: "n".into(), containers: vec![container], ..Default::default() };
    let all_pods = lister.list(pr::ListPodResourcesRequest {}).await.unwrap().into_inner().pod_resources;
    assert_eq!(all_pods, std::slice::from_ref(&expected), "the rejected pod is not active");
    let request = |name: &str| pr::GetPodResourcesRequest { pod_name: name.into(), pod_namespace: "n".into() };
    let got = lister.get(request("a")).await.unwrap().into_inner();
    assert_eq!(got.pod_resources, Some(expected));
    let rejected = lister.get(request("b")).await.unwrap().into_inner().pod_resources.unwrap();
    assert!(rejected.containers[0].devices.is_empty());
    let status = lister.get(request("z")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unknown, "pod z in namespace n not found"));
    let all = lister.get_allocatable_resources(pr::AllocatableResourcesRequest {}).await.unwrap().into_inner();
    assert_eq!(all.devices, [device]);
}

#[tokio::test]
async fn without_the_gate_get_is_disabled() {
    let lab = Lab::with(|config| config.pod_resources_get = false).await;
    let status = lab.lister().await.get(pr::GetPodResourcesRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unknown, "PodResources API Get method disabled"));
}

#[tokio::test]
async fn init_containers_hand_their_devices_on() {
    let lab = Lab::new().await;
    lab.plug_in(Toy::new(&[("0", true)])).await;
    lab.wait(1).await;
    let mut both = pod("a", 1);
    both.init_containers.push(Container { name: "init".into(), ..both.containers[0].clone() });
    assert_eq!(lab.kubelet.admit(both).await.unwrap().phase, "Running");
    lab.kubelet.remove("n", "a").await.unwrap();
    let mut sidecar = pod("b", 1);
    sidecar.init_containers.push(Container { name: "side".into(), restartable: true, ..sidecar.containers[0].clone() });
    assert!(lab.kubelet.admit(sidecar).await.unwrap().message.contains("Requested: 1, Available: 0"));
}

#[tokio::test]
async fn faults_cut_streams_and_delay_registrations() {
    let lab = Lab::new().await;
    lab.plug_in(Toy::new(&[("0", true)])).await;
    lab.wait(1).await;
    lab.kubelet.drop_stream(R).unwrap();
    lab.wait(0).await;
    assert!(matches!(lab.kubelet.drop_stream(R), Err(Error::NoPlugin(_))));
    lab.kubelet.set_register_delay(Duration::from_millis(200));
    let before = std::time::Instant::now();
    lab.register("v1beta1", "p.sock", R).await.unwrap();
    assert!(before.elapsed() >= Duration::from_millis(200));
    lab.wait(1).await;
}

#[tokio::test]
async fn the_control_socket_does_all_of_it() {
    let lab = Lab::new().await;
    let socket = lab.folder.path().join("c");
    tokio::spawn(control::serve(lab.kubelet.clone(), kubelet_api::socket::listen(&socket).unwrap()));
    lab.plug_in(Toy::new(&[("0", true)])).await;
    let wait = |count, timeout_ms| Command::WaitAllocatable { resource: R.into(), count, timeout_ms };
    control::ask(&socket, &wait(1, 5000)).await.unwrap();
    let error = control::ask(&socket, &wait(2, 50)).await.unwrap_err();
    assert_eq!(error, "nvidia.com/pgpu has 1 allocatable, not 2, after 50ms");
    let admitted = control::ask(&socket, &Command::Admit { pod: pod("a", 1) }).await.unwrap();
    assert_eq!(admitted["phase"], "Running");
    control::ask(&socket, &Command::Restart { down_ms: 0 }).await.unwrap();
    let dump = control::ask(&socket, &Command::Dump).await.unwrap();
    assert_eq!((&dump["starts"], &dump["resources"][R]["capacity"]), (&json!(2), &json!(0)));
    control::ask(&socket, &Command::Stop).await.unwrap();
    assert_eq!(control::ask(&socket, &Command::Stop).await.unwrap_err(), "The kubelet is stopped");
    control::ask(&socket, &Command::Start).await.unwrap();
    let remove = Command::Remove { namespace: "n".into(), name: "a".into() };
    control::ask(&socket, &remove).await.unwrap();
    assert_eq!(control::ask(&socket, &remove).await.unwrap_err(), "Pod n/a is not there");
}

#[tokio::test]
async fn resolve_goes_from_a_pod_to_its_functions() {
    let lab = Lab::new().await;
    lab.plug_in(Toy::new(&[("0", true)])).await;
    lab.wait(1).await;
    lab.admit("a", 1).await;
    lab.admit("none", 0).await;
    let root = lab.root();
    let socket = lab.folder.path().join("pr/s");
    let error = super::resolve(&socket, &root, "n/a").await.unwrap_err();
    assert_eq!(error.to_string(), "CDI device nvidia.com/pgpu=0 is unresolvable: no spec defines it");
    lab.add_cdi_spec();
    let resolved = super::resolve(&socket, &root, "n/a").await.unwrap();
    assert_eq!(resolved.devices[0].bdfs, ["0000:41:00.0"]);
    assert_eq!(resolved.devices[0].cdi, "nvidia.com/pgpu=0");
    assert!(matches!(super::resolve(&socket, &root, "n/none").await, Err(super::ResolveError::NoDevices { .. })));
    let error = super::resolve(&socket, &root, "n/z").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "GetPodResources failed for pod(z) in namespace(n): rpc error: code = Unknown desc = pod z in namespace n not found"
    );
    assert!(matches!(super::resolve(&socket, &root, "noslash").await, Err(super::ResolveError::Name(_))));
}
