//! What the plugin tells is true: the whole agent on a fake sysfs against the lab's kubelet, with its book of allocations and
//! its pod-resources service.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail the test that calls them"
)]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent_core::hostfile::HostDir;
use agent_core::metrics::Metrics;
use agent_core::readiness::Registry;
use agent_core::shutdown::Shutdown;
use agent_core::state::{UNITS_DIR, UnitRecord, UnitsFile};
use common::{PGPU, config};
use device_plugin::controller::{Config, ControllerError, Looks, run};
use device_plugin::features::FeatureFile;
use device_plugin::health::FlapRule;
use device_plugin::units::IdScheme;
use hw_probe::Inventory;
use hw_probe::testing::FakeSysfs;
use lab_kube::kubelet::{self, Container, Kubelet, Pod};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(20);
const FIRST: &str = "0000:41:00.0";
const SECOND: &str = "0000:c1:00.0";

/// A node with two GPUs on VFIO and a kubelet.
struct Node {
    fake: FakeSysfs,
    kubelet: Arc<Kubelet>,
}

/// The plugin at work.
struct Plugin {
    task: JoinHandle<Result<(), ControllerError>>,
    shutdown: Shutdown,
    metrics: Metrics,
}

impl Node {
    async fn new() -> Self {
        let fake = FakeSysfs::new();
        fake.gpu(FIRST, 0x2330).group(5).numa(0).driver("vfio-pci").cdev(0).power("auto", "suspended", "D3hot");
        fake.gpu(SECOND, 0x2330).group(6).numa(1).driver("vfio-pci").cdev(1).power("auto", "suspended", "D3hot");
        let config = kubelet::Config {
            root: fake.path().into(),
            register_node: false,
            ..kubelet::Config::new("node", fake.path().join("plugins"), fake.path().join("pod-resources/kubelet.sock"))
        };
        let kubelet = Kubelet::start(config, None).await.unwrap();
        Self { fake, kubelet }
    }

    fn plugin_dir(&self) -> PathBuf {
        self.fake.path().join("plugins")
    }

    /// What is looked at in these tests, IDs by the kubelet's book.
    fn looks(&self) -> Looks {
        Looks {
            ids_by_book: true,
            settled: Duration::from_millis(200),
            pod_resources: self.fake.path().join("pod-resources/kubelet.sock"),
            features_file: FeatureFile::new(self.fake.path().join("features.d/ccnode")),
            ..Looks::default()
        }
    }

    fn start(&self, scheme: IdScheme, looks: Looks) -> Plugin {
        let state_dir = self.fake.path().join("state");
        let config = Config { looks, ..config(&self.fake, state_dir, self.plugin_dir(), scheme) };
        let (shutdown, metrics) = (Shutdown::manual(), Metrics::new());
        let (stop, counted) = (shutdown.clone(), metrics.clone());
        let task = tokio::spawn(async move { run(config, stop, Registry::default(), &counted).await });
        Plugin { task, shutdown, metrics }
    }

    /// `id health`, as the kubelet heard it last.
    fn list(&self) -> Vec<String> {
        let dump = self.kubelet.dump();
        let devices = dump["resources"][PGPU]["devices"].as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        devices.iter().map(|device| format!("{} {}", text(&device["id"]), text(&device["health"]))).collect()
    }

    /// Waits until a plugin that is connected has told this.
    async fn hears(&self, expected: &[&str]) {
        let healthy = expected.iter().filter(|line| line.ends_with(" Healthy")).count();
        let holds = || self.list() == expected && self.kubelet.dump()["resources"][PGPU]["allocatable"] == healthy;
        until(&format!("{expected:?}"), holds, || format!("{:#}", self.kubelet.dump())).await;
    }

    /// Ends a plugin, and waits until the kubelet has noticed.
    async fn end(&self, plugin: Plugin) {
        plugin.end().await;
        self.kubelet.wait_allocatable(PGPU, 0, PATIENCE).await.unwrap();
    }

    /// Admits a pod with one GPU; gives the ID that it got.
    async fn pod(&self, name: &str) -> String {
        let limits = [(PGPU.to_owned(), 1)].into();
        let pod = Pod {
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            name: name.into(),
            runtime_class: String::new(),
            init_containers: Vec::new(),
            containers: vec![Container { name: "main".into(), limits, restartable: false }],
        };
        let outcome = self.kubelet.admit(pod).await.unwrap();
        assert_ne!(outcome.phase, "Failed", "{outcome:?}");
        self.id_of(name)
    }

    fn id_of(&self, name: &str) -> String {
        let dump = self.kubelet.dump();
        let pod = dump["pods"].as_array().unwrap().iter().find(|pod| pod["name"] == name).unwrap().clone();
        pod["containers"][0]["allocations"][PGPU]["ids"][0].as_str().unwrap().to_owned()
    }

    /// What is written for `ccnode status`.
    fn told(&self) -> Option<UnitsFile> {
        let boot = Inventory::scan(&self.fake.root()).host.boot_id.unwrap();
        UnitsFile::load(&HostDir::open_existing(self.plugin_dir().join(UNITS_DIR)).ok()??, &boot).unwrap()
    }

    /// The record of a unit, when it says what is expected.
    async fn tells(&self, id: &str, what: &str, holds: impl Fn(&UnitRecord) -> bool) {
        let told = || self.told().is_some_and(|file| file.units.iter().any(|unit| unit.id == id && holds(unit)));
        until(what, told, || format!("{:#?}", self.told())).await;
    }
}

impl Plugin {
    async fn end(self) {
        self.shutdown.trigger();
        timeout(PATIENCE, self.task).await.expect("The agent ends in time").unwrap().unwrap();
    }

    fn counts(&self, line: &str) -> bool {
        self.metrics.encode().unwrap().lines().any(|found| found == line)
    }

    async fn comes_to_count(&self, line: &str) {
        until(line, || self.counts(line), || self.metrics.encode().unwrap()).await;
    }
}

async fn until(what: &str, holds: impl Fn() -> bool, why: impl Fn() -> String) {
    let waited = timeout(PATIENCE, async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "Did not come true: {what}\n{}", why());
}

const BY_NUMBER: &[&str] = &["0 Healthy", "1 Healthy"];
const BY_ADDRESS: &[&str] = &["0000:41:00.0 Healthy", "0000:c1:00.0 Healthy"];

#[tokio::test]
async fn units_keep_the_numbers_that_pods_have_until_the_last_of_them_has_ended() {
    let node = Node::new().await;
    // What the reference's plugin tells.
    let reference = node.start(IdScheme::Iommu, Looks::default());
    node.hears(BY_NUMBER).await;
    let first = node.pod("first").await;
    node.end(reference).await;

    let ours = node.start(IdScheme::Pci, node.looks());
    node.hears(BY_NUMBER).await;
    assert!(ours.counts("ccnode_plugin_id_scheme{scheme=\"iommu\",reason=\"given\"} 1"));
    let file = node.told().unwrap();
    assert!(file.ids == "iommu" && file.ids_reason.contains("pod uid-first has device"), "{file:?}");
    // The other one is given by its number, too: the reference may come back at any time.
    let second = node.pod("second").await;
    assert_eq!([first.as_str(), second.as_str()].iter().copied().collect::<std::collections::BTreeSet<_>>().len(), 2);
    node.end(ours).await;
    let reference = node.start(IdScheme::Iommu, Looks::default());
    node.hears(BY_NUMBER).await;
    assert_eq!((node.id_of("first"), node.id_of("second")), (first, second));
    node.end(reference).await;

    // The last pod ends while ours runs: a running kubelet takes the new IDs, each GPU once.
    let ours = node.start(IdScheme::Pci, node.looks());
    node.hears(BY_NUMBER).await;
    node.kubelet.remove("default", "first").await.unwrap();
    sleep(Duration::from_millis(300)).await;
    assert_eq!(node.list(), BY_NUMBER);
    node.kubelet.remove("default", "second").await.unwrap();
    node.hears(BY_ADDRESS).await;
    ours.comes_to_count("ccnode_plugin_id_scheme{scheme=\"pci\",reason=\"free\"} 1").await;
    let third = node.pod("third").await;
    assert!(BY_ADDRESS.contains(&&*format!("{third} Healthy")), "{third}");
    node.end(ours).await;

    // A book that cannot be read may hold anything.
    std::fs::write(node.plugin_dir().join("kubelet_internal_checkpoint"), "{\"Data\":").unwrap();
    let ours = node.start(IdScheme::Pci, node.looks());
    node.hears(BY_NUMBER).await;
    ours.comes_to_count("ccnode_plugin_id_scheme{scheme=\"iommu\",reason=\"unreadable\"} 1").await;
    node.end(ours).await;
}

#[tokio::test]
async fn a_number_that_was_just_allocated_stays_though_the_book_does_not_have_it() {
    let node = Node::new().await;
    let reference = node.start(IdScheme::Iommu, Looks::default());
    node.hears(BY_NUMBER).await;
    node.pod("first").await;
    node.end(reference).await;
    let ours = node.start(IdScheme::Pci, node.looks());
    node.hears(BY_NUMBER).await;
    node.pod("second").await;
    for pod in ["first", "second"] {
        node.kubelet.remove("default", pod).await.unwrap();
    }
    ours.comes_to_count("ccnode_plugin_id_scheme{scheme=\"iommu\",reason=\"lately\"} 1").await;
    assert_eq!(node.list(), BY_NUMBER);
    node.end(ours).await;
}

#[tokio::test]
async fn a_unit_that_is_held_without_a_pod_is_in_quarantine_until_it_is_let_go() {
    let node = Node::new().await;
    let plugin = node.start(IdScheme::Pci, node.looks());
    node.hears(BY_ADDRESS).await;
    let id = node.pod("vm").await;
    let (held, free) = if id == FIRST { (FIRST, SECOND) } else { (SECOND, FIRST) };
    node.tells(held, "the pod is told", |unit| unit.pod.as_deref() == Some("default/vm")).await;
    plugin
        .comes_to_count(&format!("ccnode_plugin_unit_pod{{resource=\"{PGPU}\",unit=\"{held}\",pod=\"default/vm\"}} 1"))
        .await;

    // Its virtual machine runs; the pod ends, and the virtual machine does not.
    let cdev = if held == FIRST { "/dev/vfio/devices/vfio0" } else { "/dev/vfio/devices/vfio1" };
    node.fake.process(4711, "qemu-system-x86", "0::/x\n", &[cdev]);
    let _ = node.fake.get(held).power("auto", "active", "D0");
    sleep(Duration::from_millis(600)).await;
    assert_eq!(node.list(), BY_ADDRESS, "a unit that a pod has is healthy while it is used");
    node.kubelet.remove("default", "vm").await.unwrap();
    plugin.comes_to_count("ccnode_plugin_quarantined_units 1").await;
    node.tells(held, "the holder is named", |unit| {
        unit.error.as_ref().is_some_and(|error| {
            error.code == "held" && error.message.contains("pid 4711 (qemu-system-x86)") && unit.pod.is_none()
        })
    })
    .await;
    let mut expected = [format!("{held} Unhealthy"), format!("{free} Healthy")];
    expected.sort();
    node.hears(&[&expected[0], &expected[1]]).await;
    assert_eq!(node.pod("next").await, free, "the next pod gets another one");

    std::fs::remove_dir_all(node.fake.path().join("proc/4711")).unwrap();
    // VFIO lets a device sleep that nobody uses any more.
    let _ = node.fake.get(held).power("auto", "suspended", "D3hot");
    node.hears(BY_ADDRESS).await;
    plugin.comes_to_count("ccnode_plugin_quarantined_units 0").await;
    node.end(plugin).await;
}

#[tokio::test]
async fn a_kubelet_that_does_not_know_its_pods_yet_takes_no_unit_from_them() {
    let node = Node::new().await;
    let plugin = node.start(IdScheme::Pci, node.looks());
    node.hears(BY_ADDRESS).await;
    let id = node.pod("vm").await;
    let cdev = if id == FIRST { "/dev/vfio/devices/vfio0" } else { "/dev/vfio/devices/vfio1" };
    node.fake.process(4711, "qemu-system-x86", "0::/x\n", &[cdev]);
    let _ = node.fake.get(&*id).power("auto", "active", "D0");

    node.kubelet.set_unaware(true);
    node.kubelet.restart(Duration::from_millis(50)).await.unwrap();
    node.hears(BY_ADDRESS).await;
    node.tells(&id, "the pod is that of the book", |unit| unit.pod.as_deref() == Some("uid-vm")).await;
    let is_told = || node.told().is_some_and(|file| file.pods.contains("does not tell yet"));
    until("it is told that the kubelet may not know all", is_told, || format!("{:?}", node.told())).await;
    // Many looks, and five times as long as a unit must be in use without a pod.
    sleep(Duration::from_secs(1)).await;
    assert_eq!(node.list(), BY_ADDRESS);
    assert!(plugin.counts("ccnode_plugin_quarantined_units 0"));

    node.kubelet.set_unaware(false);
    node.tells(&id, "the pod is told", |unit| unit.pod.as_deref() == Some("default/vm")).await;
    node.kubelet.remove("default", "vm").await.unwrap();
    plugin.comes_to_count("ccnode_plugin_quarantined_units 1").await;
    node.end(plugin).await;
}

#[tokio::test]
async fn without_the_pod_resources_service_the_kubelets_book_tells_the_pods() {
    let node = Node::new().await;
    let looks = Looks { pod_resources: PathBuf::new(), ..node.looks() };
    let plugin = node.start(IdScheme::Pci, looks);
    node.hears(BY_ADDRESS).await;
    let id = node.pod("vm").await;
    node.tells(&id, "the pod is told by its UID", |unit| unit.pod.as_deref() == Some("uid-vm")).await;
    assert!(node.told().unwrap().pods.contains("checkpoint"));
    node.end(plugin).await;
}

#[tokio::test]
async fn a_unit_that_comes_and_goes_is_held_back_and_comes_back_by_itself() {
    let node = Node::new().await;
    let rule = FlapRule { limit: 3, window: Duration::from_secs(10) };
    let plugin = node.start(IdScheme::Pci, Looks { flaps: rule, ..node.looks() });
    node.hears(BY_ADDRESS).await;
    for fall in 1..=3 {
        let _ = node.fake.get(FIRST).patch_config(0, &[0xff; 4]);
        plugin
            .comes_to_count(&format!("ccnode_plugin_health_flaps_total{{device=\"{FIRST}\",cause=\"dead\"}} {fall}"))
            .await;
        // The kubelet hears later than it is counted: what it had heard before must not be taken for a return.
        node.hears(&["0000:41:00.0 Unhealthy", "0000:c1:00.0 Healthy"]).await;
        let _ = node.fake.get(FIRST).patch_config(0, &[0xde, 0x10, 0x30, 0x23]);
        if fall < 3 {
            node.hears(BY_ADDRESS).await;
        }
    }
    node.tells(FIRST, "held back", |unit| unit.error.as_ref().is_some_and(|error| error.code == "flapping")).await;
    assert_eq!(node.list(), ["0000:41:00.0 Unhealthy", "0000:c1:00.0 Healthy"]);
    node.hears(BY_ADDRESS).await;
    node.end(plugin).await;
}

#[tokio::test]
async fn a_link_that_is_worse_than_it_could_be_is_told_and_one_that_is_down_is_a_fault() {
    let node = Node::new().await;
    let gpu = node.fake.get(FIRST).link("32.0 GT/s PCIe", 16).power("auto", "active", "D0");
    let count = |fatal: u32, nonfatal: u32| {
        let _ = gpu
            .attr("aer_dev_correctable", "TOTAL_ERR_COR 2\n")
            .attr("aer_dev_nonfatal", format!("TOTAL_ERR_NONFATAL {nonfatal}\n"))
            .attr("aer_dev_fatal", format!("TOTAL_ERR_FATAL {fatal}\n"));
    };
    count(1, 0);
    let plugin = node.start(IdScheme::Pci, node.looks());
    node.hears(BY_ADDRESS).await;
    plugin.comes_to_count(&format!("ccnode_plugin_device_link_errors{{device=\"{FIRST}\",kind=\"fatal\"}} 1")).await;
    let _ = gpu.attr("current_link_width", "4\n");
    count(1, 3);
    node.tells(FIRST, "both are remarked, and nothing is taken away", |unit| {
        unit.healthy
            && unit.remarks.len() == 2
            && unit.remarks[0].contains("4 of 16 lanes")
            && unit.remarks[1].contains("0 fatal and 3 other")
    })
    .await;
    assert!(plugin.counts(&format!("ccnode_plugin_device_remarks{{device=\"{FIRST}\",kind=\"link-width\"}} 1")));
    let _ = gpu.attr("current_link_width", "0\n");
    node.tells(FIRST, "down", |unit| unit.error.as_ref().is_some_and(|error| error.code == "link-down")).await;
    node.hears(&["0000:41:00.0 Unhealthy", "0000:c1:00.0 Healthy"]).await;
    let _ = gpu.attr("current_link_width", "16\n");
    node.hears(BY_ADDRESS).await;
    node.end(plugin).await;
}

#[tokio::test]
async fn what_is_told_to_people_follows_and_is_written_again_where_it_is_lost() {
    let node = Node::new().await;
    let plugin = node.start(IdScheme::Pci, node.looks());
    node.hears(BY_ADDRESS).await;
    node.tells(SECOND, "whole", |unit| {
        unit.healthy && unit.numa == [1] && unit.nodes == ["/dev/vfio/devices/vfio1"] && unit.resource == PGPU
    })
    .await;
    let first = node.told().unwrap().origin.written_at;
    sleep(Duration::from_millis(200)).await;
    assert_eq!(node.told().unwrap().origin.written_at, first, "nothing changed, nothing written");
    let features = node.fake.path().join("features.d/ccnode");
    assert!(std::fs::read_to_string(&features).unwrap().contains("ccnode.dev/gpu.count=2\n"));

    std::fs::remove_dir_all(node.plugin_dir().join(UNITS_DIR)).unwrap();
    node.tells(SECOND, "written again", |unit| unit.healthy).await;
    node.kubelet.restart(Duration::from_millis(50)).await.unwrap();
    node.hears(BY_ADDRESS).await;
    node.fake.remove(FIRST);
    node.hears(&["0000:c1:00.0 Healthy"]).await;
    until(
        "the label follows",
        || std::fs::read_to_string(&features).is_ok_and(|text| text.contains("gpu.count=1\n")),
        || std::fs::read_to_string(&features).unwrap_or_default(),
    )
    .await;
    node.end(plugin).await;
}
