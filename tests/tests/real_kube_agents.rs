//! cc-manager with a real API server, the DaemonSets of the operator and a real kubelet: what it pauses really ends, and what it
//! asks is counted in the server's own audit log.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "real_kube/agent.rs"]
mod agent;
mod real_kube;
#[path = "../../crates/gpu-firmware/tests/common/mod.rs"]
mod virtual_gpu;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use agent::{Hardware, Start};
use anyhow::{Context, Result, ensure};
use gpu_firmware::Mode;
use lab_kube::api_server::Rule;
use node_object::annotations;
use node_object::labels::{CC_MODE, CC_MODE_STATE, CC_READY_STATE};
use real_kube::toy::{Toy, register};
use real_kube::{Account, Api, Cluster, IMAGE, MERGE, NODE, PATIENCE, kubelet_folder, real, run};
use serde_json::{Value, json};

/// The deploy labels of the operator's components, and their DaemonSets. The name is also what their pods say of themselves.
const OPERANDS: [(&str, &str); 6] = [
    ("nvidia.com/gpu.deploy.vfio-manager", "nvidia-vfio-manager"),
    ("nvidia.com/gpu.deploy.vgpu-manager", "nvidia-vgpu-manager-daemonset"),
    ("nvidia.com/gpu.deploy.sandbox-validator", "nvidia-sandbox-validator"),
    ("nvidia.com/gpu.deploy.sandbox-device-plugin", "nvidia-sandbox-device-plugin-daemonset"),
    ("nvidia.com/gpu.deploy.vgpu-device-manager", "nvidia-vgpu-device-manager"),
    ("nvidia.com/gpu.deploy.kata-sandbox-device-plugin", PLUGIN),
];
const PLUGIN: &str = "nvidia-kata-sandbox-device-plugin-daemonset";
const RESOURCE: &str = "nvidia.com/pgpu";
const NODE_PATH: &str = "/api/v1/nodes/gpu-1";

fn daemon_set(label: &str, name: &str) -> Value {
    let labels = json!({"app": name});
    json!({
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "nodeSelector": {label: "true"}, "hostNetwork": true, "automountServiceAccountToken": false,
                    "tolerations": [{"operator": "Exists"}],
                    "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never"}],
                },
            },
        },
    })
}

/// Who serves the plugin's socket as long as the plugin's pod runs, as the pod itself would.
async fn plugin_of_the_pod(api: &Api, namespace: &str) -> Result<()> {
    let folder = kubelet_folder()?.join("device-plugins");
    let path = format!("/api/v1/namespaces/{namespace}/pods?labelSelector=app%3D{PLUGIN}");
    let mut served = None;
    loop {
        let pods = api.get(&path).await?.is(200)?;
        let runs = pods["items"].as_array().is_some_and(|pods| {
            pods.iter().any(|pod| pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null())
        });
        match served.take() {
            None if runs => {
                let _ = std::fs::remove_file(folder.join("rig.sock"));
                let toy = Toy::serve(&folder, "rig.sock", &[("0", true), ("1", true)], None)?;
                register(&folder, kubelet_api::VERSION, "rig.sock", RESOURCE).await?;
                served = Some(toy);
            }
            Some(toy) if !runs => toy.end().await?,
            other => served = other,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn pods_of(api: &Api, namespace: &str) -> Result<BTreeMap<String, String>> {
    let pods = api.get(&format!("/api/v1/namespaces/{namespace}/pods")).await?.is(200)?;
    let of = |pod: &Value, path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    Ok(pods.iter().map(|pod| (of(pod, "/metadata/labels/app"), of(pod, "/metadata/uid"))).collect())
}

fn offered(node: &Value) -> &str {
    node["status"]["allocatable"][RESOURCE].as_str().unwrap_or("0")
}

/// Waits until the node is in this mode, says so, and its components are at work.
async fn until_settled(api: &Api, namespace: &str, mode: Mode, ready: &str) -> Result<()> {
    let is_so = |node: &Value| {
        let metadata = &node["metadata"];
        metadata["labels"][CC_MODE_STATE] == mode.as_str()
            && metadata["labels"][CC_READY_STATE] == ready
            && OPERANDS.iter().all(|(label, _)| metadata["labels"][*label] == "true")
            && metadata["annotations"][annotations::TRANSITION].is_null()
            && offered(node) == "2"
    };
    api.until(NODE_PATH, |answer| is_so(&answer.body).then_some(())).await?;
    let run = |pods: &Value| {
        let pods = pods["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        pods.len() == OPERANDS.len() && pods.iter().all(|pod| pod["status"]["phase"] == "Running")
    };
    let path = format!("/api/v1/namespaces/{namespace}/pods");
    api.until(&path, |answer| run(&answer.body).then_some(())).await
}

/// What an account has asked, from the server's audit log: verb and resource, whether refused, and how often. The server tells of
/// a watch when it has ended.
fn audited(account: &Account) -> Result<BTreeMap<String, usize>> {
    let log = std::fs::read_to_string(real()?.join("logs/audit.log")).context("the audit log")?;
    let mut counts = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains(&account.user)) {
        let Ok(entry) = serde_json::from_str::<Value>(line) else { continue };
        let is_begin = entry["stage"] == if entry["verb"] == "watch" { "ResponseStarted" } else { "ResponseComplete" };
        if entry["user"]["username"] != account.user.as_str() || !is_begin {
            continue;
        }
        let (verb, resource) = (entry["verb"].as_str(), entry["objectRef"]["resource"].as_str());
        let refused = if entry["responseStatus"]["code"].as_u64() < Some(300) { "" } else { ", refused" };
        let what = format!("{} {}{refused}", verb.unwrap_or_default(), resource.unwrap_or_default());
        *counts.entry(what).or_default() += 1;
    }
    Ok(counts)
}

/// What has been asked since.
fn since(before: &BTreeMap<String, usize>, now: &BTreeMap<String, usize>) -> BTreeMap<String, usize> {
    let more = |(what, count): (&String, &usize)| {
        let more = count - before.get(what).copied().unwrap_or_default();
        (more > 0).then(|| (what.clone(), more))
    };
    now.iter().filter_map(more).collect()
}

#[test]
#[ignore = "needs a real kubelet: hack/test --real-kube"]
fn pausing_ends_the_operators_pods_and_a_change_is_two_patches() -> Result<()> {
    run(async {
        let cluster = Cluster::real().await?;
        let namespace = cluster.namespace().await?;
        let admin = cluster.admin.clone();
        let rules = Rule::operator_cc_manager(&namespace);
        let account = cluster.account_named(&namespace, "nvidia-cc-manager", &rules).await?;
        let sets = format!("/apis/apps/v1/namespaces/{namespace}/daemonsets");
        for (label, name) in OPERANDS {
            admin.post(&sets, &daemon_set(label, name)).await?.is(201)?;
        }
        let labels: BTreeMap<&str, &str> =
            OPERANDS.iter().map(|(label, _)| (*label, "true")).chain([(CC_MODE, "off")]).collect();
        admin.patch(NODE_PATH, MERGE, &json!({"metadata": {"labels": labels}})).await?.is(200)?;

        let watched = tokio::spawn({
            let (admin, namespace) = (admin.clone(), namespace.clone());
            async move { plugin_of_the_pod(&admin, &namespace).await }
        });
        // Asked from the firmware's own thread in the moment in which devices are changed.
        let (admin_config, place) = (std::fs::read_to_string(real()?.join("admin.kubeconfig"))?, namespace.clone());
        let look = Arc::new(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let api = Api::new(&admin_config).await?;
                let (pods, node) = (pods_of(&api, &place).await?, api.get(NODE_PATH).await?.is(200)?);
                ensure!(pods.is_empty(), "these run: {pods:?}");
                ensure!(offered(&node) == "0", "{} GPUs are offered", offered(&node));
                Ok(())
            })
        });
        let hardware = Hardware::new()?;
        let start =
            Start { kubeconfig: &account.kubeconfig, node: NODE, namespace: &namespace, answer: PATIENCE, look };
        let agent = hardware.start(start)?;
        until_settled(&admin, &namespace, Mode::Off, "false").await.context("at the start")?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut counts = audited(&account)?;
        println!("audit: the start of cc-manager: {counts:?}");

        // Watches are resumed before they end by themselves; besides, nothing is asked.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let idle = since(&counts, &audited(&account)?);
        println!("audit: 10 s at rest: {idle:?}");
        ensure!(idle.is_empty(), "at rest it asks for {idle:?}");

        for (mode, ready) in [(Mode::On, "true"), (Mode::Devtools, ""), (Mode::Off, "false")] {
            let before = pods_of(&admin, &namespace).await?;
            let wanted = json!({"metadata": {"labels": {CC_MODE: mode.as_str()}}});
            admin.patch(NODE_PATH, MERGE, &wanted).await?.is(200)?;
            until_settled(&admin, &namespace, mode, ready).await.with_context(|| format!("mode {mode}"))?;
            hardware.is_in(mode)?;
            let after = pods_of(&admin, &namespace).await?;
            ensure!(after.keys().eq(before.keys()), "{after:?} after {before:?}");
            let kept: Vec<_> = after.iter().filter(|(name, uid)| before[*name] == **uid).collect();
            ensure!(kept.is_empty(), "these pods were never ended: {kept:?}");
            // Events come after the result.
            tokio::time::sleep(Duration::from_secs(1)).await;
            let now = audited(&account)?;
            let asked = since(&counts, &now);
            println!("audit: a change to {mode}: {asked:?}");
            ensure!(asked.get("patch nodes") == Some(&2), "a change is two patches, and not {asked:?}");
            ensure!(asked.keys().all(|what| !what.contains("refused") || what.contains("events")), "{asked:?}");
            counts = now;
        }
        agent.end()?;
        watched.abort();
        let gone =
            json!({"metadata": {"labels": labels.keys().map(|key| (*key, Value::Null)).collect::<BTreeMap<_, _>>()}});
        admin.patch(NODE_PATH, MERGE, &gone).await?.is(200)?;
        for (_, name) in OPERANDS {
            admin.delete(&format!("{sets}/{name}")).await?.is(200)?;
        }
        Ok(())
    })
}
