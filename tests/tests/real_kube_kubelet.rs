//! What the device plugin relies on in a kubelet: one list, asked of a real one and of the stand-in. And the device plugin
//! itself with a real one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod real_kube;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hw_probe::testing::FakeSysfs;
use kubelet_api::pod_resources as pr;
use kubelet_api::pod_resources::pod_resources_lister_client::PodResourcesListerClient;
use lab_kube::api_server::{ApiServerConfig, Rule};
use lab_kube::kubelet::toy::Served;
use lab_kube::kubelet::{Config, Kubelet};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use real_kube::contract::{Entry, FIRST, OURS, entry, holds};
use real_kube::{Cluster, IMAGE, NODE, PATIENCE, kubelet_folder, plugin, register, run, script};
use serde_json::{Value, json};
use tokio::time::Instant;

/// The contract.
const CONTRACT: &[Entry<Machine>] = &[
    entry!(FIRST, another_version_and_bad_names_are_refused),
    entry!(FIRST, a_plugin_is_dialled_back_and_its_devices_are_offered),
    entry!(FIRST, sick_devices_are_counted_and_not_offered),
    entry!(FIRST, a_pod_gets_what_the_plugin_prefers_and_the_calls_come_in_order),
    entry!(FIRST, a_pod_that_wants_more_than_there_is_fails_at_admission),
    entry!(FIRST, what_a_pod_holds_is_told_by_pod_resources),
    entry!(FIRST, a_plugin_that_dies_leaves_pods_running_and_comes_back),
    entry!(FIRST, another_plugin_of_the_same_resource_takes_its_place),
    entry!(FIRST, a_restart_deletes_sockets_and_keeps_what_pods_hold, OURS),
    entry!(FIRST..=24, a_registration_is_answered_before_the_dial_back),
    entry!(25, a_registration_is_answered_after_the_dial_back),
    entry!(FIRST..=24, the_end_of_a_plugin_that_was_replaced_takes_nothing),
    entry!(25, the_end_of_a_plugin_that_was_replaced_takes_the_resource_until_the_next_list),
    entry!(FIRST..=22, pod_resources_of_one_pod_are_not_known_of),
    entry!(FIRST..=27, cdi_names_are_passed_over),
    entry!(29, an_unknown_cdi_name_keeps_a_container_from_being_made),
    // Known since 1.27, by a gate that is on from here on.
    entry!(34, pod_resources_of_one_pod_can_be_got),
    entry!(FIRST..=30, a_pods_status_does_not_name_its_devices),
    entry!(36, a_pods_status_names_its_devices_and_their_health),
];

/// The newest kubelet whose behaviour was recorded, which the stand-in follows.
const RECORDED: u32 = 36;

/// A kubelet and the API server that it reports to.
struct Machine {
    cluster: Cluster,
    stand_in: Option<(Arc<Kubelet>, tempfile::TempDir)>,
    folder: PathBuf,
    pod_resources: PathBuf,
    node: String,
    namespace: String,
}

impl Machine {
    async fn stand_in() -> Result<Self> {
        let cluster = Cluster::stand_in(ApiServerConfig::default()).await?;
        let here = tempfile::tempdir_in("/tmp")?;
        let (folder, pod_resources) = (here.path().join("dp"), here.path().join("pr/s"));
        let server = cluster.server().context("no stand-in")?;
        let token = server.add_identity(&format!("system:node:{NODE}"), &["system:nodes"], Rule::kubelet(NODE));
        let client = cluster.bearer(&token).await?.client();
        let mut config = Config::new(NODE, &folder, &pod_resources);
        config.node_status_frequency = Duration::from_millis(50);
        config.dial_deadline = Duration::from_millis(500);
        config.root = here.path().join("root");
        std::fs::create_dir_all(config.root.join("dev"))?;
        std::fs::write(config.root.join("dev/null"), "")?;
        let kubelet = Kubelet::start(config, Some(client)).await?;
        Self::with(cluster, Some((kubelet, here)), folder, pod_resources).await
    }

    async fn real() -> Result<Self> {
        let (cluster, folder) = (Cluster::real().await?, kubelet_folder()?);
        let (plugins, pod_resources) = (folder.join("device-plugins"), folder.join("pod-resources/kubelet.sock"));
        Self::with(cluster, None, plugins, pod_resources).await
    }

    async fn with(
        cluster: Cluster,
        stand_in: Option<(Arc<Kubelet>, tempfile::TempDir)>,
        folder: PathBuf,
        pod_resources: PathBuf,
    ) -> Result<Self> {
        let namespace = cluster.namespace().await?;
        let machine = Self { cluster, stand_in, folder, pod_resources, node: NODE.to_owned(), namespace };
        let is_ready = |node: &Value| {
            node["status"]["conditions"]
                .as_array()
                .is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
        };
        machine.until_node(is_ready).await?;
        Ok(machine)
    }

    async fn until_node(&self, is_so: impl Fn(&Value) -> bool) -> Result<()> {
        let path = format!("/api/v1/nodes/{}", self.node);
        self.cluster.admin.until(&path, |answer| is_so(&answer.body).then_some(())).await
    }

    /// Waits until the node says so of the resource. One that the kubelet has forgotten counts as nothing.
    async fn offers(&self, resource: &str, capacity: &str, allocatable: &str) -> Result<()> {
        let says = |node: &Value, what: &str| node["status"][what][resource].as_str().unwrap_or("0").to_owned();
        self.until_node(|node| says(node, "capacity") == capacity && says(node, "allocatable") == allocatable)
            .await
            .with_context(|| format!("{resource} is not {capacity}, of which {allocatable} may be given out"))
    }

    fn resource(&self) -> (String, String) {
        let name = self.cluster.fresh("contract");
        (format!("nvidia.com/{name}"), format!("{name}.sock"))
    }

    /// A plugin with these devices, registered.
    async fn plug_in(&self, devices: &[(&str, bool)]) -> Result<(Served, String)> {
        let (resource, endpoint) = self.resource();
        let toy = plugin(devices).served(&self.folder.join(&endpoint))?;
        register(&self.folder, kubelet_api::VERSION, &endpoint, &resource).await?;
        Ok((toy, resource))
    }

    fn pods(&self) -> String {
        format!("/api/v1/namespaces/{}/pods", self.namespace)
    }

    /// A pod that holds so many devices, given to the kubelet without a scheduler. Returns its name.
    async fn create(&self, resource: &str, count: usize) -> Result<String> {
        let name = self.cluster.fresh("pod");
        let limits = json!({resource: count.to_string()});
        let container = json!({
            "name": "main", "image": IMAGE, "imagePullPolicy": "Never",
            "resources": {"limits": limits, "requests": limits},
        });
        let pod = json!({
            "metadata": {"name": name},
            "spec": {
                "nodeName": self.node, "hostNetwork": true, "automountServiceAccountToken": false,
                "tolerations": [{"operator": "Exists"}], "restartPolicy": "Always", "containers": [container],
            },
        });
        self.cluster.admin.post(&self.pods(), &pod).await?.is(201)?;
        Ok(name)
    }

    /// Waits until a pod is in this phase, and returns its status.
    async fn until_phase(&self, name: &str, phase: &str) -> Result<Value> {
        let path = format!("{}/{name}", self.pods());
        let is_so = |body: &Value| body["status"]["phase"] == phase;
        let admin = &self.cluster.admin;
        admin.until(&path, |answer| is_so(&answer.body).then(|| answer.body["status"].clone())).await
    }

    async fn runs(&self, resource: &str, count: usize) -> Result<String> {
        let name = self.create(resource, count).await?;
        self.until_phase(&name, "Running").await.with_context(|| format!("{name} does not run"))?;
        Ok(name)
    }

    async fn remove(&self, name: &str) -> Result<()> {
        let path = format!("{}/{name}", self.pods());
        self.cluster.admin.delete(&format!("{path}?gracePeriodSeconds=1")).await?.is(200)?;
        self.cluster.admin.until(&path, |answer| (answer.code == 404).then_some(())).await
    }

    /// Which container a pod that runs has, and how often one was started anew.
    async fn container(&self, pod: &str) -> Result<Value> {
        let path = format!("{}/{pod}", self.pods());
        let pod = self.cluster.admin.get(&path).await?.is(200)?;
        let status = &pod["status"]["containerStatuses"][0];
        ensure!(status["ready"] == true && status["restartCount"] == 0, "{status:#}");
        // The stand-in has no runtime that would give its containers names.
        ensure!(self.stand_in.is_some() || status["containerID"].is_string(), "{status:#}");
        Ok(json!({"containerID": status["containerID"], "restartCount": status["restartCount"]}))
    }

    async fn lister(&self) -> Result<PodResourcesListerClient<tonic::transport::Channel>> {
        let channel = kubelet_api::socket::connect(&self.pod_resources, Duration::from_secs(10)).await?;
        Ok(PodResourcesListerClient::new(channel))
    }

    /// What a pod's container holds of a resource, as pod-resources tells.
    async fn held(&self, pod: &str, resource: &str) -> Result<BTreeSet<String>> {
        let list = self.lister().await?.list(pr::ListPodResourcesRequest {}).await?.into_inner();
        let pods = list.pod_resources.into_iter().filter(|one| one.name == pod && one.namespace == self.namespace);
        let devices = pods.flat_map(|pod| pod.containers).flat_map(|container| container.devices);
        Ok(devices.filter(|devices| devices.resource_name == resource).flat_map(|devices| devices.device_ids).collect())
    }

    /// Waits until a pod's container holds just these: a kubelet that has just started tells of no pod for a while.
    async fn holds(&self, pod: &str, resource: &str, ids: &BTreeSet<String>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let held = self.held(pod, resource).await?;
            if held == *ids {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{pod} holds {held:?}, not {ids:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn stop(&self) -> Result<()> {
        match &self.stand_in {
            Some((kubelet, _)) => Ok(kubelet.stop().await?),
            None => tokio::task::spawn_blocking(|| script(&["stop", "kubelet", "KILL"])).await?.map(drop),
        }
    }

    async fn start(&self) -> Result<()> {
        match &self.stand_in {
            Some((kubelet, _)) => kubelet.resume().await.map_err(Into::into),
            None => tokio::task::spawn_blocking(|| script(&["start", "kubelet"])).await?.map(drop),
        }?;
        // It opens its sockets a while after its start; the old ones are there, with nobody at them.
        let deadline = Instant::now() + PATIENCE;
        while self.lister().await.is_err() {
            ensure!(Instant::now() < deadline, "the kubelet does not come back");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }
}

fn ids(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(|id| (*id).to_owned()).collect()
}

const FOUR: [(&str, bool); 4] = [("0", true), ("1", true), ("2", true), ("3", true)];

async fn another_version_and_bad_names_are_refused(machine: &Machine) -> Result<()> {
    for (version, resource, text) in [
        (
            "v1",
            "nvidia.com/x",
            "requested API version \"v1\" is not supported by kubelet. Supported version is [\"v1beta1\"]",
        ),
        ("v1beta1", "noslash", "the ResourceName \"noslash\" is invalid"),
        ("v1beta1", "kubernetes.io/x", "the ResourceName \"kubernetes.io/x\" is invalid"),
        ("v1beta1", "nvidia.com/a b", "the ResourceName \"nvidia.com/a b\" is invalid"),
    ] {
        let refused = register(&machine.folder, version, "p.sock", resource).await.err();
        let refused = refused.with_context(|| format!("{version} {resource} is taken"))?;
        ensure!((refused.code(), refused.message()) == (tonic::Code::Unknown, text), "{refused:?} and not {text}");
    }
    Ok(())
}

async fn a_plugin_is_dialled_back_and_its_devices_are_offered(machine: &Machine) -> Result<()> {
    let (toy, resource) = machine.plug_in(&FOUR).await?;
    machine.offers(&resource, "4", "4").await?;
    ensure!(toy.calls() == [("ListAndWatch", vec![])], "{:?}", toy.calls());
    toy.end().await
}

async fn a_registration_is_answered_before_the_dial_back(machine: &Machine) -> Result<()> {
    let (resource, endpoint) = machine.resource();
    register(&machine.folder, kubelet_api::VERSION, &endpoint, &resource).await?;
    // There is nobody at the socket until now, and the kubelet goes on dialling.
    let toy = plugin(&FOUR).served(&machine.folder.join(&endpoint))?;
    machine.offers(&resource, "4", "4").await?;
    toy.end().await
}

async fn a_registration_is_answered_after_the_dial_back(machine: &Machine) -> Result<()> {
    let (resource, endpoint) = machine.resource();
    let refused = register(&machine.folder, kubelet_api::VERSION, &endpoint, &resource).await.err();
    let refused = refused.context("an endpoint that nobody serves is taken")?;
    let says = (refused.code(), refused.message());
    let wanted = (tonic::Code::Unknown, "failed to dial device plugin: context deadline exceeded");
    ensure!(says == wanted, "{refused:?}");
    Ok(())
}

async fn sick_devices_are_counted_and_not_offered(machine: &Machine) -> Result<()> {
    let (toy, resource) = machine.plug_in(&FOUR).await?;
    machine.offers(&resource, "4", "4").await?;
    toy.has(&[("0", true), ("1", false), ("2", true), ("3", false)]);
    machine.offers(&resource, "4", "2").await?;
    let pod = machine.runs(&resource, 2).await?;
    ensure!(machine.held(&pod, &resource).await? == ids(&["0", "2"]), "it holds a sick one");
    // A held device that falls sick stays where it is; that the others are well shows that the kubelet has the new list.
    toy.has(&[("0", false), ("1", true), ("2", true), ("3", true)]);
    machine.offers(&resource, "4", "3").await?;
    ensure!(machine.held(&pod, &resource).await? == ids(&["0", "2"]), "it has lost a device");
    machine.until_phase(&pod, "Running").await?;
    // One that is listed no more counts no more.
    toy.has(&[("2", true), ("3", true)]);
    machine.offers(&resource, "2", "2").await?;
    machine.remove(&pod).await?;
    toy.end().await
}

async fn a_pod_gets_what_the_plugin_prefers_and_the_calls_come_in_order(machine: &Machine) -> Result<()> {
    let (toy, resource) = machine.plug_in(&FOUR).await?;
    machine.offers(&resource, "4", "4").await?;
    let first = machine.runs(&resource, 2).await?;
    let second = machine.runs(&resource, 1).await?;
    let all = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    let wanted = [
        ("ListAndWatch", vec![]),
        ("GetPreferredAllocation", all(&["0", "1", "2", "3"])),
        ("Allocate", all(&["2", "3"])),
        ("PreStartContainer", all(&["2", "3"])),
        ("GetPreferredAllocation", all(&["0", "1"])),
        ("Allocate", all(&["1"])),
        ("PreStartContainer", all(&["1"])),
    ];
    ensure!(toy.calls() == wanted, "{:?}", toy.calls());
    machine.remove(&first).await?;
    machine.remove(&second).await?;
    toy.end().await
}

async fn a_pod_that_wants_more_than_there_is_fails_at_admission(machine: &Machine) -> Result<()> {
    let (toy, resource) = machine.plug_in(&FOUR[..2]).await?;
    machine.offers(&resource, "2", "2").await?;
    let holder = machine.runs(&resource, 1).await?;
    let pod = machine.create(&resource, 2).await?;
    let status = machine.until_phase(&pod, "Failed").await?;
    ensure!(status["reason"] == "UnexpectedAdmissionError", "{status:#}");
    let message = status["message"].as_str().unwrap_or_default();
    let part = format!(
        "Allocate failed due to requested number of devices unavailable for {resource}. Requested: 2, Available: 1, which is unexpected"
    );
    ensure!(message.contains(&part), "{message}");
    machine.remove(&holder).await?;
    machine.cluster.admin.delete_now(&format!("{}/{pod}", machine.pods())).await?;
    toy.end().await
}

async fn what_a_pod_holds_is_told_by_pod_resources(machine: &Machine) -> Result<()> {
    let (toy, resource) = machine.plug_in(&FOUR).await?;
    machine.offers(&resource, "4", "4").await?;
    let pod = machine.runs(&resource, 3).await?;
    ensure!(machine.held(&pod, &resource).await? == ids(&["1", "2", "3"]));
    machine.remove(&pod).await?;
    let deadline = Instant::now() + PATIENCE;
    while !machine.held(&pod, &resource).await?.is_empty() {
        ensure!(Instant::now() < deadline, "a pod that is gone holds devices");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    toy.end().await
}

async fn pod_resources_of_one_pod_are_not_known_of(machine: &Machine) -> Result<()> {
    let ask = pr::GetPodResourcesRequest { pod_name: "any".to_owned(), pod_namespace: machine.namespace.clone() };
    let refused = machine.lister().await?.get(ask).await.err().context("it is answered")?;
    ensure!(refused.code() == tonic::Code::Unimplemented, "{refused:?}");
    Ok(())
}

async fn pod_resources_of_one_pod_can_be_got(machine: &Machine) -> Result<()> {
    let (toy, resource) = machine.plug_in(&FOUR).await?;
    machine.offers(&resource, "4", "4").await?;
    let pod = machine.runs(&resource, 1).await?;
    let ask =
        |name: &str| pr::GetPodResourcesRequest { pod_name: name.to_owned(), pod_namespace: machine.namespace.clone() };
    let got = machine.lister().await?.get(ask(&pod)).await?.into_inner().pod_resources.context("no pod")?;
    ensure!(got.containers[0].devices[0].device_ids == ["3"], "{got:?}");
    ensure!(machine.lister().await?.get(ask("nobody")).await.is_err());
    machine.remove(&pod).await?;
    toy.end().await
}

async fn a_plugin_that_dies_leaves_pods_running_and_comes_back(machine: &Machine) -> Result<()> {
    let (resource, endpoint) = machine.resource();
    let toy = plugin(&FOUR).served(&machine.folder.join(&endpoint))?;
    register(&machine.folder, kubelet_api::VERSION, &endpoint, &resource).await?;
    machine.offers(&resource, "4", "4").await?;
    let pod = machine.runs(&resource, 2).await?;
    toy.end().await?;
    machine.offers(&resource, "4", "0").await?;
    machine.until_phase(&pod, "Running").await?;
    ensure!(machine.held(&pod, &resource).await? == ids(&["2", "3"]));
    let _ = std::fs::remove_file(machine.folder.join(&endpoint));
    let toy = plugin(&FOUR).served(&machine.folder.join(&endpoint))?;
    register(&machine.folder, kubelet_api::VERSION, &endpoint, &resource).await?;
    machine.offers(&resource, "4", "4").await?;
    let other = machine.runs(&resource, 2).await?;
    ensure!(machine.held(&other, &resource).await? == ids(&["0", "1"]), "a device is held twice");
    ensure!(machine.held(&pod, &resource).await? == ids(&["2", "3"]));
    machine.remove(&pod).await?;
    machine.remove(&other).await?;
    toy.end().await
}

/// A plugin of two devices, and another of four that has taken its place.
async fn replaced(machine: &Machine) -> Result<(Served, Served, String)> {
    let (old, resource) = machine.plug_in(&FOUR[..2]).await?;
    machine.offers(&resource, "2", "2").await?;
    let endpoint = machine.resource().1;
    let new = plugin(&FOUR).served(&machine.folder.join(&endpoint))?;
    register(&machine.folder, kubelet_api::VERSION, &endpoint, &resource).await?;
    machine.offers(&resource, "4", "4").await?;
    Ok((old, new, resource))
}

async fn another_plugin_of_the_same_resource_takes_its_place(machine: &Machine) -> Result<()> {
    let (old, new, resource) = replaced(machine).await?;
    let pod = machine.runs(&resource, 1).await?;
    ensure!(new.calls().iter().any(|(what, _)| *what == "Allocate"), "{:?}", new.calls());
    machine.remove(&pod).await?;
    old.end().await?;
    new.end().await
}

async fn the_end_of_a_plugin_that_was_replaced_takes_nothing(machine: &Machine) -> Result<()> {
    let (old, new, resource) = replaced(machine).await?;
    old.end().await?;
    // By the time in which a pod starts the kubelet has heard of the end.
    let pod = machine.runs(&resource, 1).await?;
    machine.offers(&resource, "4", "4").await?;
    let other = machine.runs(&resource, 3).await?;
    machine.offers(&resource, "4", "4").await?;
    machine.remove(&pod).await?;
    machine.remove(&other).await?;
    new.end().await
}

async fn the_end_of_a_plugin_that_was_replaced_takes_the_resource_until_the_next_list(machine: &Machine) -> Result<()> {
    let (old, new, resource) = replaced(machine).await?;
    old.end().await?;
    machine.offers(&resource, "4", "0").await?;
    new.has(&FOUR);
    machine.offers(&resource, "4", "4").await?;
    new.end().await
}

async fn a_restart_deletes_sockets_and_keeps_what_pods_hold(machine: &Machine) -> Result<()> {
    let (resource, endpoint) = machine.resource();
    let toy = plugin(&FOUR).served(&machine.folder.join(&endpoint))?;
    register(&machine.folder, kubelet_api::VERSION, &endpoint, &resource).await?;
    machine.offers(&resource, "4", "4").await?;
    let pod = machine.runs(&resource, 2).await?;
    let container = machine.container(&pod).await?;
    let socket = machine.folder.join(kubelet_api::KUBELET_SOCKET);
    let before = std::fs::metadata(&socket)?;
    std::fs::write(machine.folder.join("not-a-socket"), "")?;
    machine.stop().await?;
    ensure!(machine.folder.join(&endpoint).exists(), "a kubelet that ends deletes nothing");
    machine.start().await?;
    let deadline = Instant::now() + PATIENCE;
    let is_another = |now: std::fs::Metadata| (now.ino(), now.ctime_nsec()) != (before.ino(), before.ctime_nsec());
    while !std::fs::metadata(&socket).is_ok_and(is_another) {
        ensure!(Instant::now() < deadline, "the kubelet's socket is the old one");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ensure!(!machine.folder.join(&endpoint).exists(), "the plugin's socket is left");
    // Only a later kubelet tells sockets from files.
    let _ = std::fs::remove_file(machine.folder.join("not-a-socket"));
    machine.offers(&resource, "0", "0").await?;
    machine.until_phase(&pod, "Running").await?;
    let other = plugin(&FOUR).served(&machine.folder.join(&endpoint))?;
    register(&machine.folder, kubelet_api::VERSION, &endpoint, &resource).await?;
    machine.offers(&resource, "4", "4").await?;
    ensure!(machine.held(&pod, &resource).await? == ids(&["2", "3"]));
    let second = machine.runs(&resource, 2).await?;
    ensure!(machine.held(&second, &resource).await? == ids(&["0", "1"]), "a device is held twice");
    let now = machine.container(&pod).await?;
    ensure!(now == container, "the container was {container:#} and is {now:#}");
    ensure!(!other.calls().iter().any(|(what, ids)| *what == "Allocate" && ids.contains(&"2".to_owned())));
    machine.remove(&pod).await?;
    machine.remove(&second).await?;
    let _ = toy.end().await;
    other.end().await
}

/// A plugin that answers with CDI names that nobody has defined.
async fn with_unknown_cdi_names(machine: &Machine) -> Result<(Served, String)> {
    let (resource, endpoint) = machine.resource();
    let mut toy = plugin(&FOUR);
    toy.cdi = Some("nvidia.com/nobody".to_owned());
    let toy = toy.served(&machine.folder.join(&endpoint))?;
    register(&machine.folder, kubelet_api::VERSION, &endpoint, &resource).await?;
    machine.offers(&resource, "4", "4").await?;
    Ok((toy, resource))
}

async fn cdi_names_are_passed_over(machine: &Machine) -> Result<()> {
    let (toy, resource) = with_unknown_cdi_names(machine).await?;
    let pod = machine.runs(&resource, 1).await?;
    machine.remove(&pod).await?;
    toy.end().await
}

async fn an_unknown_cdi_name_keeps_a_container_from_being_made(machine: &Machine) -> Result<()> {
    let (toy, resource) = with_unknown_cdi_names(machine).await?;
    let pod = machine.create(&resource, 1).await?;
    let waiting = |body: &Value| body["status"]["containerStatuses"][0]["state"]["waiting"].clone();
    let path = format!("{}/{pod}", machine.pods());
    let is_so = |body: &Value| (waiting(body)["reason"] == "CreateContainerError").then(|| waiting(body));
    let waiting = machine.cluster.admin.until(&path, |answer| is_so(&answer.body)).await?;
    let message = waiting["message"].as_str().unwrap_or_default();
    ensure!(message.contains("CDI device injection failed: unresolvable CDI devices nvidia.com/nobody=3"), "{message}");
    machine.cluster.admin.delete_now(&path).await?;
    toy.end().await
}

async fn a_pods_status_does_not_name_its_devices(machine: &Machine) -> Result<()> {
    let (toy, resource) = machine.plug_in(&FOUR[..1]).await?;
    machine.offers(&resource, "1", "1").await?;
    let pod = machine.runs(&resource, 1).await?;
    toy.has(&[("0", false)]);
    machine.offers(&resource, "1", "0").await?;
    let status = machine.until_phase(&pod, "Running").await?;
    ensure!(status["containerStatuses"][0].get("allocatedResourcesStatus").is_none(), "{status:#}");
    machine.remove(&pod).await?;
    toy.end().await
}

async fn a_pods_status_names_its_devices_and_their_health(machine: &Machine) -> Result<()> {
    let (toy, resource) = machine.plug_in(&FOUR[..1]).await?;
    machine.offers(&resource, "1", "1").await?;
    let pod = machine.runs(&resource, 1).await?;
    let path = format!("{}/{pod}", machine.pods());
    for (healthy, health) in [(true, "Healthy"), (false, "Unhealthy")] {
        toy.has(&[("0", healthy)]);
        let wanted = json!([{"name": resource, "resources": [{"resourceID": "0", "health": health}]}]);
        let says = |body: &Value| body["status"]["containerStatuses"][0]["allocatedResourcesStatus"] == wanted;
        machine.cluster.admin.until(&path, |answer| says(&answer.body).then_some(())).await?;
    }
    machine.remove(&pod).await?;
    toy.end().await
}

async fn all(machine: Machine) -> Result<()> {
    // The stand-in's API server is of another version.
    let minor = if machine.stand_in.is_some() { RECORDED } else { machine.cluster.minor };
    holds(CONTRACT, &machine, minor, machine.cluster.is_ours()).await
}

#[test]
fn the_stand_in_keeps_the_contract() -> Result<()> {
    run(async { all(Machine::stand_in().await?).await })
}

#[test]
#[ignore = "needs a real kubelet: hack/test --real-kube"]
fn a_real_kubelet_keeps_the_contract() -> Result<()> {
    run(async { all(Machine::real().await?).await })
}

// -- the device plugin -------------------------------------------------------------------------------------------------

/// The device plugin, as a process over a fake sysfs.
struct Agent {
    process: Child,
    log: PathBuf,
}

impl Agent {
    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Asks it to end, as a kubelet asks a container, and waits until it has.
    async fn end(mut self) -> Result<()> {
        signal::kill(Pid::from_raw(self.process.id().try_into()?), Signal::SIGTERM)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait()? {
                ensure!(status.success(), "{status}: {}", self.log());
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "it does not end: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Two GPUs on each of two NUMA nodes.
const GPUS: [&str; 4] = ["0000:41:00.0", "0000:42:00.0", "0000:81:00.0", "0000:82:00.0"];

/// Why a kubelet with the policy single-numa-node refuses a pod: also where there are too few devices on all nodes together.
const NOT_OF_ONE_NODE: &str = "TopologyAffinityError";

/// A node with these GPUs, and the real kubelet.
struct Board {
    machine: Machine,
    fake: FakeSysfs,
    place: tempfile::TempDir,
    /// A kubelet remembers a resource for as long as it lives: each test has its own.
    alias: String,
    resource: String,
}

impl Board {
    async fn new() -> Result<Self> {
        let (machine, fake, place) = (Machine::real().await?, FakeSysfs::new(), tempfile::tempdir()?);
        for ((bdf, group), numa) in GPUS.into_iter().zip(11..).zip([0, 0, 1, 1]) {
            fake.gpu(bdf, 0x2330).group(group).driver_override("vfio-pci").driver("vfio-pci").numa(numa);
        }
        real_kube::make_vfio_nodes(11..15)?;
        let alias = machine.cluster.fresh("pgpu");
        let resource = format!("nvidia.com/{alias}");
        Ok(Self { machine, fake, place, alias, resource })
    }

    fn program() -> Result<PathBuf> {
        Ok(lab::programs::built()?.join("device-plugin"))
    }

    fn start(&self, program: &Path) -> Result<Agent> {
        let log = self.place.path().join(self.machine.cluster.fresh("log"));
        let mut command = Command::new(program);
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log)?);
        command
            .env("CCNODE_ROOT", self.fake.path())
            .env("CCNODE_STATE_DIR", self.place.path().join("state"))
            .env("CDI_DIR", self.place.path().join("cdi"))
            .env("KUBELET_PLUGIN_DIR", &self.machine.folder)
            .env("P_GPU_ALIAS", &self.alias)
            .env("VFIO_BACKEND", "legacy")
            .env("POLL_INTERVAL", "200ms");
        Ok(Agent { process: command.spawn().with_context(|| program.display().to_string())?, log })
    }

    /// What the CDI files say.
    fn cdi(&self) -> Result<String> {
        let files = std::fs::read_dir(self.place.path().join("cdi"))?;
        files.map(|file| Ok(std::fs::read_to_string(file?.path())?)).collect()
    }

    async fn offers(&self, capacity: &str, allocatable: &str) -> Result<()> {
        self.machine.offers(&self.resource, capacity, allocatable).await
    }

    async fn runs(&self, count: usize) -> Result<String> {
        self.machine.runs(&self.resource, count).await
    }

    async fn held(&self, pod: &str) -> Result<BTreeSet<String>> {
        self.machine.held(pod, &self.resource).await
    }

    /// A pod of so many is refused: there are not as many of one NUMA node, or none at all.
    async fn is_refused(&self, count: usize) -> Result<()> {
        let pod = self.machine.create(&self.resource, count).await?;
        let status = self.machine.until_phase(&pod, "Failed").await?;
        ensure!(status["reason"] == NOT_OF_ONE_NODE, "{count} are refused otherwise: {status:#}");
        self.machine.cluster.admin.delete_now(&format!("{}/{pod}", self.machine.pods())).await
    }

    /// Looks again and again whether a pod has its GPUs, in the container that it had, and nobody else has one of them. Ends when
    /// that is not so.
    async fn stays(&self, pod: &str, looks: &Cell<u32>) -> Result<Infallible> {
        let (held, container) = (self.held(pod).await?, self.machine.container(pod).await?);
        loop {
            let now = self.held(pod).await?;
            ensure!(now == held, "{pod} had {held:?}, and has {now:?}");
            let now = self.machine.container(pod).await?;
            ensure!(now == container, "the container was {container:#} and is {now:#}");
            let list = self.machine.lister().await?.list(pr::ListPodResourcesRequest {}).await?.into_inner();
            let devices = list.pod_resources.into_iter().flat_map(|pod| pod.containers).flat_map(|one| one.devices);
            let devices = devices.filter(|devices| devices.resource_name == self.resource);
            let given: Vec<String> = devices.flat_map(|devices| devices.device_ids).collect();
            let distinct: BTreeSet<&String> = given.iter().collect();
            ensure!(given.len() == distinct.len(), "one of {given:?} is given twice");
            looks.set(looks.get() + 1);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Does something while it is looked whether all stays as it is to stay.
async fn while_stays<T>(
    stays: impl Future<Output = Result<Infallible>>,
    act: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        wrong = stays => match wrong? {},
        done = act => done,
    }
}

#[test]
#[ignore = "needs a real kubelet: hack/test --real-kube"]
fn the_device_plugin_offers_gpus_to_a_real_kubelet_and_pods_keep_them() -> Result<()> {
    run(async {
        let board = Board::new().await?;
        let machine = &board.machine;
        let mut agent = board.start(&Board::program()?)?;
        board.offers("4", "4").await.with_context(|| agent.log())?;
        let pod = board.runs(2).await.with_context(|| agent.log())?;
        let (held, container) = (board.held(&pod).await?, machine.container(&pod).await?);

        // The kubelet goes and comes back.
        machine.stop().await?;
        machine.start().await?;
        board.offers("4", "4").await.with_context(|| agent.log())?;
        machine.holds(&pod, &board.resource, &held).await.context("the pod has lost its GPUs to a restart")?;

        // A GPU that leaves its driver is offered no more.
        let free = *GPUS.iter().find(|bdf| !held.contains(**bdf)).context("none is free")?;
        board.fake.unbind(free)?;
        board.offers("4", "3").await.with_context(|| agent.log())?;
        board.fake.bind(free, "vfio-pci")?;
        board.offers("4", "4").await.with_context(|| agent.log())?;

        // The plugin is killed, and comes back.
        agent.kill()?;
        board.offers("4", "0").await.with_context(|| agent.log())?;
        machine.until_phase(&pod, "Running").await?;
        let agent = board.start(&Board::program()?)?;
        board.offers("4", "4").await.with_context(|| agent.log())?;
        ensure!(board.held(&pod).await? == held, "the pod has lost its GPUs to the plugin's end");

        // What is left goes to another pod, and no more than that.
        let second = board.runs(2).await.with_context(|| agent.log())?;
        let others = board.held(&second).await?;
        ensure!(others.len() == 2 && others.is_disjoint(&held), "{others:?} beside {held:?}");
        board.is_refused(1).await.with_context(|| agent.log())?;
        let now = machine.container(&pod).await?;
        ensure!(now == container, "the container was {container:#} and is {now:#}");
        for name in [pod, second] {
            machine.remove(&name).await?;
        }
        agent.end().await
    })
}

/// The kubelet of `hack/real-kube` has two NUMA nodes and the policy single-numa-node. It goes by what the plugin says in its
/// lists (`TopologyInfo`), before it asks anything: without that it gives out whatever there is, as the contract's plugin shows,
/// whose three devices go to one pod.
#[test]
#[ignore = "needs a real kubelet: hack/test --real-kube"]
fn a_real_kubelet_gives_a_pod_gpus_of_one_numa_node_or_none() -> Result<()> {
    run(async {
        let board = Board::new().await?;
        let agent = board.start(&Board::program()?)?;
        board.offers("4", "4").await.with_context(|| agent.log())?;
        // There are three, and no node has them.
        board.is_refused(3).await.with_context(|| agent.log())?;
        // There are two, one of each node.
        for bdf in [GPUS[1], GPUS[2]] {
            board.fake.unbind(bdf)?;
        }
        board.offers("4", "2").await.with_context(|| agent.log())?;
        board.is_refused(2).await.with_context(|| agent.log())?;
        // There are three, two of them of one node.
        board.fake.bind(GPUS[2], "vfio-pci")?;
        board.offers("4", "3").await.with_context(|| agent.log())?;
        let second = board.runs(2).await.with_context(|| agent.log())?;
        ensure!(board.held(&second).await? == ids(&GPUS[2..]), "{:?}", board.held(&second).await?);
        board.fake.bind(GPUS[1], "vfio-pci")?;
        board.offers("4", "4").await.with_context(|| agent.log())?;
        let first = board.runs(2).await.with_context(|| agent.log())?;
        ensure!(board.held(&first).await? == ids(&GPUS[..2]), "{:?}", board.held(&first).await?);
        for pod in [first, second] {
            board.machine.remove(&pod).await?;
        }
        agent.end().await
    })
}

/// A copy of a program that has another version of the same length, which it tells. The code is the same: what differs for a
/// kubelet in an upgrade are the process and what the plugin finds from the one before.
fn of_another_version(program: &Path, folder: &Path) -> Result<(PathBuf, String)> {
    let version = env!("CARGO_PKG_VERSION");
    let next = |c: char| c.to_digit(10).and_then(|digit| char::from_digit((digit + 1) % 10, 10)).unwrap_or(c);
    let other: String = version.chars().map(next).collect();
    let copy = folder.join("device-plugin");
    std::fs::copy(program, &copy)?;
    let mut bytes = std::fs::read(&copy)?;
    let places: Vec<usize> = memchr::memmem::find_iter(&bytes, version).collect();
    for place in places {
        bytes[place..place + version.len()].copy_from_slice(other.as_bytes());
    }
    std::fs::write(&copy, bytes)?;
    let told = String::from_utf8(Command::new(&copy).arg("--version").output()?.stdout)?;
    ensure!(told.trim_end().ends_with(&other), "it tells {told:?}, and not {other}");
    Ok((copy, other))
}

#[test]
#[ignore = "needs a real kubelet: hack/test --real-kube"]
fn an_upgrade_of_the_device_plugin_takes_no_gpu_from_a_pod_of_a_real_kubelet() -> Result<()> {
    const TAKEN: &str = "The kubelet knows of this resource";
    const REPLACED: &str = "Another process has taken over the socket";
    run(async {
        let (board, program) = (Board::new().await?, Board::program()?);
        let (upgraded, version) = of_another_version(&program, board.place.path())?;
        let (looks, machine) = (Cell::new(0), &board.machine);
        let old = board.start(&program)?;
        board.offers("4", "4").await.with_context(|| old.log())?;
        let pod = board.runs(2).await.with_context(|| old.log())?;

        // As a DaemonSet does it by itself: the old one is gone before the new one is there.
        let upgrade = async {
            old.end().await?;
            board.offers("4", "0").await?;
            let new = board.start(&upgraded)?;
            board.offers("4", "4").await.with_context(|| new.log())?;
            Ok(new)
        };
        let new = while_stays(board.stays(&pod, &looks), upgrade).await?;
        ensure!(new.log().contains(&version), "it is not {version}: {}", new.log());
        let (second, before) = (board.runs(1).await.with_context(|| new.log())?, looks.get());
        ensure!(before > 0, "nobody has looked");

        // With maxSurge, and back to the first version: the new one has its place before the old one is asked to end. (To kubelets
        // from 1.25 on that is the end of the resource: see the contract.)
        let downgrade = async {
            let newest = board.start(&program)?;
            // One of the two stands back: not always the old one, which looks now and then in the moment between two sockets.
            let deadline = Instant::now() + PATIENCE;
            let has_taken = || new.log().contains(REPLACED) && newest.log().contains(TAKEN);
            while !has_taken() && !newest.log().contains(REPLACED) {
                ensure!(Instant::now() < deadline, "none stands back: {}{}", new.log(), newest.log());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            board.offers("4", "4").await.with_context(|| newest.log())?;
            let log = new.log();
            new.end().await.with_context(|| log)?;
            // A pod is given what is left, by the one that is there.
            let third = board.runs(1).await.with_context(|| newest.log())?;
            Ok((newest, third))
        };
        let (newest, third) = while_stays(board.stays(&pod, &looks), downgrade).await?;
        ensure!(looks.get() > before, "nobody has looked");
        board.offers("4", "4").await.with_context(|| newest.log())?;
        let mut all = board.held(&pod).await?;
        for other in [&second, &third] {
            all.extend(board.held(other).await?);
        }
        ensure!(all == ids(&GPUS), "{all:?} are given");
        let left: Vec<_> = GPUS.iter().filter(|id| !board.cdi().is_ok_and(|text| text.contains(**id))).collect();
        ensure!(left.is_empty(), "{left:?} are in no CDI file");
        board.is_refused(1).await.with_context(|| newest.log())?;
        println!("looked {} times", looks.get());
        for pod in [pod, second, third] {
            machine.remove(&pod).await?;
        }
        newest.end().await
    })
}
