//! The operator's components on a node: DaemonSets that follow its deploy labels, whose pods the real controllers make and delete.

#![allow(dead_code, reason = "each of the test files uses its own part of this")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::rendered::Rendering;
use gpu_firmware::Mode;
use node_object::annotations;
use node_object::labels::{CC_MODE, CC_MODE_STATE, CC_READY_STATE};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::agent::Look;
use crate::agent::parts::{OPERANDS, PLUGIN, RESOURCE, ready_state};
use crate::real_kube::{Account, Api, Cluster, IMAGE, JSON, MERGE, NODE, kubelet_folder, plugin, register};

/// The namespace in which the chart expects the operator's components.
pub(crate) const OPERATOR: &str = "gpu-operator";

/// The chart's rendering for nodes with the operator's components, which cc-manager pauses.
pub(crate) fn chart() -> Result<Rendering> {
    Rendering::read("rendered/everything.yaml")
}

/// cc-manager's account of the chart, with the chart's accounts, roles and bindings applied as they are.
pub(crate) async fn charts_account(cluster: &Cluster) -> Result<Account> {
    const RIGHTS: [&str; 5] = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];
    let chart = chart()?;
    cluster.namespace_named(OPERATOR).await?;
    let mut applied = 0;
    for object in RIGHTS.iter().flat_map(|kind| chart.of_kind(kind)) {
        cluster.apply(object).await?;
        applied += 1;
    }
    ensure!(applied >= 12, "the chart has {applied} accounts, roles and bindings");
    cluster.account_of("ccnode", "ccnode-cc-manager").await
}

/// Asks for a mode by a node's label, or for none.
pub(crate) async fn want(api: &Api, node: &str, mode: Option<Mode>) -> Result<()> {
    let labels = json!({"metadata": {"labels": {CC_MODE: mode.map(Mode::as_str)}}});
    api.patch(&format!("/api/v1/nodes/{node}"), MERGE, &labels).await?.is(200).map(drop)
}

/// Label of the node whose components are in a namespace: those of another test are nobody's here.
const OF: &str = "contract.ccnode.dev/namespace";

/// The DaemonSet of a component, whose pods have so many seconds for their end.
fn daemon_set(label: &str, name: &str, namespace: &str, grace: u32) -> Value {
    let labels = json!({"app": name});
    json!({
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "nodeSelector": {label: "true", OF: namespace}, "hostNetwork": true, "automountServiceAccountToken": false,
                    "tolerations": [{"operator": "Exists"}],
                    "terminationGracePeriodSeconds": grace,
                    "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never"}],
                },
            },
        },
    })
}

/// How many GPUs a node offers.
fn offered(node: &Value) -> &str {
    node["status"]["allocatable"][RESOURCE].as_str().unwrap_or("0")
}

/// Who serves the plugin's socket as long as the plugin's pod runs, as the pod itself would.
async fn plugin_of_the_pod(api: &Api, pods: &str) -> Result<()> {
    let folder = kubelet_folder()?.join("device-plugins");
    let path = format!("{pods}?labelSelector=app%3D{PLUGIN}");
    let mut served = None;
    loop {
        let pods = api.get(&path).await?.is(200)?;
        let runs = pods["items"].as_array().is_some_and(|pods| {
            pods.iter().any(|pod| pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null())
        });
        match served.take() {
            None if runs => {
                let _ = std::fs::remove_file(folder.join("rig.sock"));
                let toy = plugin(&[("0", true), ("1", true)]).served(&folder.join("rig.sock"))?;
                register(&folder, kubelet_api::VERSION, "rig.sock", RESOURCE).await?;
                served = Some(toy);
            }
            Some(toy) if !runs => toy.end().await?,
            other => served = other,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Nobody runs on a node, and no GPU is offered.
pub(crate) struct Quiet {
    pods: String,
    node: String,
    path: String,
}

impl Quiet {
    pub(crate) async fn is_so(&self, api: &Api) -> Result<()> {
        let (pods, node) = (running(api, &self.pods, &self.node).await?, api.get(&self.path).await?.is(200)?);
        ensure!(pods.is_empty(), "these run: {pods:?}");
        ensure!(offered(&node) == "0", "{} GPUs are offered", offered(&node));
        Ok(())
    }
}

/// The components on one node.
pub(crate) struct Components {
    api: Api,
    kubeconfig: String,
    node: String,
    namespace: String,
    /// Those whose labels are on the node.
    operands: Vec<(&'static str, &'static str)>,
    /// Those of them that have a DaemonSet.
    deployed: Vec<(&'static str, &'static str)>,
    /// Serves the socket of the plugin's pod, where a kubelet runs pods.
    plugin: Option<JoinHandle<Result<()>>>,
}

impl Components {
    /// All of them on the node of the real kubelet.
    pub(crate) async fn on_the_kubelets_node(cluster: &Cluster, namespace: &str) -> Result<Self> {
        let mut components = Self::deploy(cluster, NODE, namespace, [&OPERANDS; 2], 30).await?;
        let (api, pods) = (components.api.clone(), components.pods());
        components.plugin = Some(tokio::spawn(async move { plugin_of_the_pod(&api, &pods).await }));
        Ok(components)
    }

    /// Two of them on a node that no kubelet keeps, where pods never run. That of the one is made and deleted by the real
    /// controller, that of the other is [`Components::linger`]'s.
    pub(crate) async fn on_a_bare_node(cluster: &Cluster, node: &str, namespace: &str) -> Result<Self> {
        let status = json!({"status": Self::room()});
        cluster.admin.patch(&format!("/api/v1/nodes/{node}/status"), MERGE, &status).await?.is(200)?;
        // Nobody would confirm the end of a pod: it does not wait for that.
        Self::deploy(cluster, node, namespace, [&[OPERANDS[0], OPERANDS[5]], &[OPERANDS[5]]], 0).await
    }

    async fn deploy(
        cluster: &Cluster,
        node: &str,
        namespace: &str,
        [operands, deployed]: [&[(&'static str, &'static str)]; 2],
        grace: u32,
    ) -> Result<Self> {
        let components = Self {
            api: cluster.admin.clone(),
            kubeconfig: cluster.admin_kubeconfig.clone(),
            node: node.to_owned(),
            namespace: namespace.to_owned(),
            operands: operands.to_vec(),
            deployed: deployed.to_vec(),
            plugin: None,
        };
        components.patch_labels(json!({OF: namespace})).await?;
        components.label(|_| Some("true")).await?;
        for (label, name) in deployed {
            let answer = components.api.post(&components.sets(), &daemon_set(label, name, namespace, grace)).await?;
            // Of a run that was ended on the way.
            ensure!([201, 409].contains(&answer.code), "{name}: {:#}", answer.body);
        }
        Ok(components)
    }

    fn sets(&self) -> String {
        format!("/apis/apps/v1/namespaces/{}/daemonsets", self.namespace)
    }

    fn pods(&self) -> String {
        format!("/api/v1/namespaces/{}/pods", self.namespace)
    }

    fn node_path(&self) -> String {
        format!("/api/v1/nodes/{}", self.node)
    }

    /// Gives each deploy label a value, or takes it away.
    pub(crate) async fn label(&self, value: impl Fn(&str) -> Option<&'static str>) -> Result<()> {
        let labels: BTreeMap<&str, Option<&str>> =
            self.operands.iter().map(|(label, _)| (*label, value(label))).collect();
        self.patch_labels(json!(labels)).await
    }

    async fn patch_labels(&self, labels: Value) -> Result<()> {
        self.api.patch(&self.node_path(), MERGE, &json!({"metadata": {"labels": labels}})).await?.is(200).map(drop)
    }

    /// Whether all of them are deployed by this node, as the labels have it.
    pub(crate) fn are_wanted(&self, node: &Value) -> bool {
        self.operands.iter().all(|(label, _)| node["metadata"]["labels"][*label] == "true")
    }

    /// The pods of the components on the node, by component, with their UIDs.
    pub(crate) async fn running(&self) -> Result<BTreeMap<String, String>> {
        running(&self.api, &self.pods(), &self.node).await
    }

    /// Waits until there is a pod of each component, which runs where a kubelet is, or of none.
    pub(crate) async fn until_running(&self, are_there: bool) -> Result<()> {
        let wanted: BTreeSet<&str> = self.deployed.iter().filter(|_| are_there).map(|(_, name)| *name).collect();
        let is_so = |pods: &Value| {
            let pods = pods["items"].as_array().map(Vec::as_slice).unwrap_or_default();
            let names: BTreeSet<&str> =
                pods.iter().filter_map(|pod| pod["metadata"]["labels"]["app"].as_str()).collect();
            let is_at_work = |pod: &Value| {
                pod["spec"]["nodeName"] == self.node.as_str()
                    && pod["metadata"]["deletionTimestamp"].is_null()
                    && (self.plugin.is_none() || pod["status"]["phase"] == "Running")
            };
            let run = pods.iter().all(is_at_work);
            names == wanted && pods.len() == wanted.len() && run
        };
        self.api.until(&self.pods(), |answer| is_so(&answer.body).then_some(())).await
    }

    /// Waits until the node is in this mode, says so, and its components are at work.
    pub(crate) async fn until_settled(&self, mode: Mode) -> Result<()> {
        let is_so = |node: &Value| {
            let metadata = &node["metadata"];
            metadata["labels"][CC_MODE_STATE] == mode.as_str()
                && metadata["labels"][CC_READY_STATE] == ready_state(mode)
                && self.are_wanted(node)
                && metadata["annotations"][annotations::TRANSITION].is_null()
                && (self.plugin.is_none() || offered(node) == "2")
        };
        self.api.until(&self.node_path(), |answer| is_so(&answer.body).then_some(())).await?;
        self.until_running(true).await.context("the components do not come back")
    }

    /// Asked from the firmware's own thread in the moment in which devices are changed: nobody runs, and no GPU is offered.
    pub(crate) fn look(&self) -> Look {
        let (kubeconfig, quiet) = (self.kubeconfig.clone(), self.quiet());
        Arc::new(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { quiet.is_so(&Api::new(&kubeconfig).await?).await })
        })
    }

    /// What is to be so in that moment.
    pub(crate) fn quiet(&self) -> Quiet {
        Quiet { pods: self.pods(), node: self.node.clone(), path: self.node_path() }
    }

    /// Where the pod is of the component that no controller deploys.
    pub(crate) fn lingering(&self) -> String {
        format!("{}/{}", self.pods(), OPERANDS[0].1)
    }

    /// Makes that pod, if it is not there: it stays until the test deletes it.
    pub(crate) async fn linger(&self) -> Result<()> {
        let (_, name) = OPERANDS[0];
        let pod = json!({
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "nodeName": self.node, "hostNetwork": true, "automountServiceAccountToken": false,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never"}],
            },
        });
        let answer = self.api.post(&self.pods(), &pod).await?;
        ensure!([201, 409].contains(&answer.code), "{name}: {:#}", answer.body);
        Ok(())
    }

    /// The labels by which the components of this test come to a node.
    pub(crate) fn place(&self) -> [(&'static str, &str); 1] {
        [(OF, &self.namespace)]
    }

    /// What a kubelet says of a node with room for the components.
    pub(crate) fn room() -> Value {
        let room = json!({"pods": "10"});
        json!({"capacity": room, "allocatable": room})
    }

    /// Whoever makes a node gets its components deployed.
    pub(crate) async fn label_where_absent(&self) -> Result<()> {
        loop {
            let node = self.api.get(&self.node_path()).await?.is(200)?;
            let labels = &node["metadata"]["labels"];
            let absent = self.operands.iter().map(|(label, _)| *label).filter(|label| labels[*label].is_null());
            let operation = |op: &str, label: &str, value: Value| {
                let path = format!("/metadata/labels/{}", label.replace('/', "~1"));
                json!({"op": op, "path": path, "value": value})
            };
            let patch: Vec<Value> = absent
                .flat_map(|label| [operation("test", label, Value::Null), operation("add", label, json!("true"))])
                .collect();
            if patch.is_empty() {
                return Ok(());
            }
            let answer = self.api.patch(&self.node_path(), JSON, &json!(patch)).await?;
            // Somebody was faster.
            ensure!([200, 422].contains(&answer.code), "{:#}", answer.body);
        }
    }

    /// Takes them away again, and their labels.
    pub(crate) async fn remove(&self) -> Result<()> {
        self.label(|_| None).await?;
        self.patch_labels(json!({OF: null})).await?;
        for (_, name) in &self.deployed {
            self.api.delete(&format!("{}/{name}", self.sets())).await?.is(200)?;
        }
        self.until_running(false).await?;
        if let Some(plugin) = &self.plugin {
            plugin.abort();
        }
        Ok(())
    }
}

async fn running(api: &Api, pods: &str, node: &str) -> Result<BTreeMap<String, String>> {
    let pods = api.get(&format!("{pods}?fieldSelector=spec.nodeName%3D{node}")).await?.is(200)?;
    let of = |pod: &Value, path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    Ok(pods.iter().map(|pod| (of(pod, "/metadata/labels/app"), of(pod, "/metadata/uid"))).collect())
}
