//! `ccnode drain-holders` against a stand-in of the API server.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

mod cluster;

use lab_kube::api_server::Rule;
use serde_json::{Value, json};

use crate::cluster::Cluster;

const DRAIN: &str = "drain-holders";
const NODE: &str = "gpu-7";

impl Cluster {
    /// Nodes with pods that ask for GPUs, and with pods that do not concern us.
    fn with_pods() -> Self {
        let cluster = Self::new();
        let api = &cluster.api;
        for node in [NODE, "gpu-8"] {
            api.add_node(node, &[]).unwrap();
        }
        for namespace in ["ml", "batch"] {
            api.create("namespaces", json!({"metadata": {"name": namespace}})).unwrap();
        }
        let pgpu = |count: &str| json!({"nvidia.com/pgpu": count});
        for (namespace, name, node, phase, limits) in [
            ("ml", "train-0", NODE, "Running", pgpu("2")),
            ("batch", "job-1", NODE, "Pending", json!({"nvidia.com/GH100_H100": "1", "cpu": "500m"})),
            ("ml", "elsewhere", "gpu-8", "Running", pgpu("1")),
            ("ml", "over", NODE, "Succeeded", pgpu("1")),
            ("ml", "without", NODE, "Running", json!({"cpu": "1"})),
            ("ml", "none", NODE, "Running", pgpu("0")),
        ] {
            let spec = json!({"nodeName": node, "containers": [
                {"name": "main", "image": "none", "resources": {"limits": limits}}]});
            let metadata = json!({"namespace": namespace, "name": name});
            api.create("pods", json!({"metadata": metadata, "spec": spec, "status": {"phase": phase}})).unwrap();
        }
        cluster
    }

    fn pod(&self, namespace: &str, name: &str) -> Value {
        self.api.get("pods", namespace, name).unwrap_or_default()
    }
}

#[test]
fn they_are_listed_and_left_alone() {
    let cluster = Cluster::with_pods();
    let (code, out, notes) = cluster.run(DRAIN, &[NODE]);
    assert_eq!(code, 0, "{notes}");
    let table = "NAMESPACE  POD      PHASE    DEVICES\n\
                 batch      job-1    Pending  1 nvidia.com/GH100_H100\n\
                 ml         train-0  Running  2 nvidia.com/pgpu\n";
    assert_eq!((out.as_str(), notes.as_str()), (table, "Nothing was evicted; --yes does it\n"));
    assert_eq!(cluster.api.count("create", "pods/eviction"), 0);
}

#[test]
fn they_are_evicted_as_far_as_their_budgets_allow() {
    let cluster = Cluster::with_pods();
    cluster.api.block_eviction("ml", "train-0", None, Some(1));
    let (code, out, notes) = cluster.run(DRAIN, &[NODE, "--yes", "--grace-period", "7"]);
    assert_eq!((code, notes.as_str()), (1, ""), "{out}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "batch/job-1: evicted, and ends within its grace period");
    assert!(lines[1].starts_with("ml/train-0: not evicted: Cannot evict pod as it would violate"), "{out}");
    assert!(lines[1].contains("The disruption budget train-0-budget needs 1"), "{out}");
    assert_eq!(cluster.pod("batch", "job-1")["metadata"]["deletionGracePeriodSeconds"], 7);
    // Later it is allowed; the other one is on its way, and is not evicted twice.
    let (code, out, _) = cluster.run(DRAIN, &[NODE, "--yes"]);
    assert_eq!(code, 0, "{out}");
    assert_eq!(out, "batch/job-1: ends already\nml/train-0: evicted, and ends within its grace period\n");
    assert_eq!(cluster.api.count("create", "pods/eviction"), 3);
    cluster.api.finish_pod_deletion("batch", "job-1").unwrap();
    cluster.api.finish_pod_deletion("ml", "train-0").unwrap();
    let (code, out, _) = cluster.run(DRAIN, &[NODE, "--yes"]);
    assert_eq!(
        (code, out.as_str()),
        (0, "No pod of node gpu-7 asks for GPUs or NVSwitches (nvidia.com/*, without network cards)\n")
    );
    assert!(cluster.pod("ml", "elsewhere")["metadata"]["deletionTimestamp"].is_null());
}

#[test]
fn what_cannot_be_done_is_told() {
    let cluster = Cluster::with_pods();
    for (line, code, words) in [(&["gpu-9"][..], 2, "gpu-9 does not exist"), (&["../pods"], 2, "is no name of a node")]
    {
        let (found, out, notes) = cluster.run(DRAIN, line);
        assert_eq!((found, out.as_str()), (code, ""), "{notes}");
        assert!(notes.contains(words), "{notes}");
    }
    // A user who may look and not evict.
    cluster.api.set_rules(&cluster.token, vec![Rule::new("", &["nodes", "pods"], &["get", "list"])]);
    let (code, out, _) = cluster.run(DRAIN, &[NODE, "--yes"]);
    assert_eq!((code, out.matches("not evicted: ").count()), (1, 2), "{out}");
    assert!(out.contains("forbids you to evict a pod of node gpu-7; your role needs"), "{out}");
    cluster.api.set_rules(&cluster.token, vec![Rule::new("", &["nodes"], &["get", "list"])]);
    let (code, _, notes) = cluster.run(DRAIN, &[NODE]);
    assert_eq!((code, notes.contains("forbids you to list the pods of node gpu-7")), (2, true), "{notes}");
}
