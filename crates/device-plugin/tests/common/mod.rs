//! A node with a kubelet that keeps to the real one's rules, where Kata pods come and go.

#![allow(dead_code, reason = "each test takes what it needs")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent_core::metrics::Metrics;
use agent_core::readiness::Registry;
use agent_core::shutdown::Shutdown;
use device_plugin::controller::{Config, ControllerError, Looks, run};
use device_plugin::observe::Places;
use device_plugin::server::Manner;
use device_plugin::units::{BackendChoice, CcGate, IdScheme, Policy};
use hw_probe::testing::FakeSysfs;
use lab_kube::kubelet::{self, Container, Kubelet, Outcome, Pod, Resolved, resolve};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

pub(crate) const PGPU: &str = "nvidia.com/pgpu";

/// Longer than anything takes, on a machine that does much else.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Numbers that look arbitrary and are the same in every run.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// One below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A node: its devices, its kubelet, and where both meet.
pub(crate) struct World {
    pub(crate) fake: FakeSysfs,
    pub(crate) kubelet: Arc<Kubelet>,
    pub(crate) metrics: Metrics,
    place: tempfile::TempDir,
    pods: usize,
}

/// A plugin in this process.
pub(crate) struct Agent {
    shutdown: Shutdown,
    pub(crate) readiness: Registry,
    task: JoinHandle<Result<(), ControllerError>>,
}

impl Agent {
    pub(crate) async fn end(self) {
        self.shutdown.trigger();
        self.task.await.unwrap().unwrap();
    }
}

/// What a plugin on this node runs with, and a look every 50 ms.
pub(crate) fn config(fake: &FakeSysfs, state_dir: PathBuf, plugin_dir: PathBuf, scheme: IdScheme) -> Config {
    Config {
        places: Places { root: fake.root(), state_dir },
        policy: Policy {
            gpu: "pgpu".parse().unwrap(),
            nvswitch: "nvswitch".parse().unwrap(),
            scheme,
            backend: BackendChoice::Auto,
            gate: CcGate::Off,
        },
        manner: Manner::default(),
        cdi_dir: fake.path().join("var/run/cdi"),
        cdi_static_dir: fake.path().join("etc/cdi"),
        plugin_dir,
        poll: Duration::from_millis(50),
        looks: Looks::default(),
    }
}

impl World {
    /// A node with so many GPUs on vfio-pci, two a NUMA node, and a running kubelet.
    pub(crate) async fn new(gpus: u32) -> Self {
        let fake = FakeSysfs::new();
        for number in 0..gpus {
            fake.gpu(gpu(number).as_str(), 0x2330).group(number + 10).numa(number / 2).driver("vfio-pci").cdev(number);
        }
        let place = tempfile::tempdir().unwrap();
        let config = kubelet::Config {
            root: fake.path().to_owned(),
            container_retry: Duration::from_millis(50),
            ..kubelet::Config::new("node-a", place.path().join("plugins"), place.path().join("pod-resources.sock"))
        };
        let kubelet = Kubelet::start(config, None).await.unwrap();
        Self { fake, kubelet, metrics: Metrics::new(), place, pods: 0 }
    }

    pub(crate) fn plugins(&self) -> PathBuf {
        self.place.path().join("plugins")
    }

    pub(crate) fn cdi_dir(&self) -> PathBuf {
        self.fake.path().join("var/run/cdi")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.place.path().join("state")
    }

    pub(crate) fn config(&self, scheme: IdScheme) -> Config {
        config(&self.fake, self.state_dir(), self.plugins(), scheme)
    }

    pub(crate) fn start(&self, config: Config) -> Agent {
        let (shutdown, readiness, metrics) = (Shutdown::manual(), Registry::default(), self.metrics.clone());
        let (stop, ready) = (shutdown.clone(), readiness.clone());
        let task = tokio::spawn(async move { run(config, stop, ready, &metrics).await });
        Agent { shutdown, readiness, task }
    }

    /// Waits until so many GPUs can be allocated.
    pub(crate) async fn allocatable(&self, count: usize) {
        if let Err(error) = self.kubelet.wait_allocatable(PGPU, count, PATIENCE).await {
            panic!("{error}\n{:#}", self.kubelet.dump());
        }
    }

    /// Admits a Kata pod that wants so many GPUs.
    pub(crate) async fn pod(&mut self, gpus: usize) -> (String, Outcome) {
        let name = format!("pod-{}", self.pods);
        self.pods += 1;
        (name.clone(), self.kubelet.admit(kata_pod(&name, gpus)).await.unwrap())
    }

    /// The same, where it must run.
    pub(crate) async fn running_pod(&mut self, gpus: usize) -> String {
        let (name, outcome) = self.pod(gpus).await;
        assert_eq!(outcome.phase, "Running", "{outcome:?}\n{:#}", self.kubelet.dump());
        name
    }

    pub(crate) async fn remove(&self, pod: &str) {
        self.kubelet.remove("default", pod).await.unwrap();
    }

    /// What Kata's shim would make of a pod now.
    pub(crate) async fn resolve(&self, pod: &str) -> Result<Resolved, String> {
        let socket = self.place.path().join("pod-resources.sock");
        resolve(&socket, self.fake.path(), &format!("default/{pod}")).await.map_err(|error| format!("{error:?}"))
    }

    /// IDs of a running pod, each of which resolves to its function.
    pub(crate) async fn ids(&self, pod: &str) -> Vec<String> {
        let resolved = self.resolve(pod).await.unwrap_or_else(|error| panic!("{error}\n{:#}", self.kubelet.dump()));
        let mut ids: Vec<String> = resolved.devices.into_iter().map(|device| device.id).collect();
        ids.sort();
        ids
    }

    /// Every GPU is given to one pod each, and resolves to a function of its own; one more pod gets none. Then the pods are
    /// taken away again. `running` are pods that have one already.
    pub(crate) async fn every_gpu_is_given_once(&mut self, gpus: usize, running: &[String]) {
        let mut pods = running.to_vec();
        while pods.len() < gpus {
            pods.push(self.running_pod(1).await);
        }
        let (extra, outcome) = self.pod(1).await;
        assert_eq!(outcome.phase, "Failed", "one GPU too many was given: {outcome:?}\n{:#}", self.kubelet.dump());
        let mut functions = Vec::new();
        for pod in &pods {
            functions.extend(self.resolve(pod).await.unwrap().devices.into_iter().flat_map(|device| device.bdfs));
        }
        functions.sort();
        functions.dedup();
        assert_eq!(functions.len(), gpus, "{functions:?}");
        for pod in pods.iter().filter(|pod| !running.contains(pod)).chain([&extra]) {
            self.remove(pod).await;
        }
    }

    /// What the kubelet knows of the GPUs.
    pub(crate) fn resource(&self) -> Value {
        self.kubelet.dump()["resources"][PGPU].clone()
    }

    pub(crate) fn registrations(&self) -> u64 {
        self.resource()["registrations"].as_u64().unwrap_or(0)
    }
}

pub(crate) fn gpu(number: u32) -> String {
    format!("0000:{:02x}:00.0", 0x41 + number)
}

pub(crate) fn kata_pod(name: &str, gpus: usize) -> Pod {
    let limits = [(PGPU.to_owned(), gpus)].into();
    Pod {
        uid: String::new(),
        namespace: "default".into(),
        name: name.into(),
        runtime_class: "kata-qemu-nvidia-gpu".into(),
        init_containers: Vec::new(),
        containers: vec![Container { name: "main".into(), limits, restartable: false }],
    }
}

pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "Did not come true: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}
