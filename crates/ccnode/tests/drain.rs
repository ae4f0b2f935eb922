//! `ccnode drain-holders` against a stand-in of the API server.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::fs;

use ccnode::args::Args;
use clap::Parser as _;
use lab_kube::api_server::{ApiServer, ApiServerConfig, Rule};
use serde_json::{Value, json};
use tempfile::TempDir;

const NODE: &str = "gpu-7";

struct Bench {
    api: ApiServer,
    folder: TempDir,
    token: String,
}

impl Bench {
    /// Nodes with pods that ask for GPUs, and with pods that do not concern us.
    fn new() -> Self {
        let api = ApiServer::start(ApiServerConfig::default()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let token = api.add_identity("person", &[], Rule::cluster_admin());
        fs::write(folder.path().join("kubeconfig"), api.kubeconfig(&token, "127.0.0.1")).unwrap();
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
        Self { api, folder, token }
    }

    fn run(&self, line: &[&str]) -> (u8, String, String) {
        let kubeconfig = self.folder.path().join("kubeconfig");
        let common = ["ccnode", "drain-holders", "--kubeconfig", kubeconfig.to_str().unwrap()];
        let args = Args::try_parse_from([&common, line].concat()).unwrap();
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        let code = ccnode::run(&args, &mut out, &mut notes, false);
        (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
    }

    fn pod(&self, namespace: &str, name: &str) -> Value {
        self.api.get("pods", namespace, name).unwrap_or_default()
    }
}

#[test]
fn they_are_listed_and_left_alone() {
    let bench = Bench::new();
    let (code, out, notes) = bench.run(&[NODE]);
    assert_eq!(code, 0, "{notes}");
    let table = "NAMESPACE  POD      PHASE    DEVICES\n\
                 batch      job-1    Pending  1 nvidia.com/GH100_H100\n\
                 ml         train-0  Running  2 nvidia.com/pgpu\n";
    assert_eq!((out.as_str(), notes.as_str()), (table, "Nothing was evicted; --yes does it\n"));
    assert_eq!(bench.api.count("create", "pods/eviction"), 0);
}

#[test]
fn they_are_evicted_as_far_as_their_budgets_allow() {
    let bench = Bench::new();
    bench.api.block_eviction("ml", "train-0", None, Some(1));
    let (code, out, notes) = bench.run(&[NODE, "--yes", "--grace-period", "7"]);
    assert_eq!((code, notes.as_str()), (1, ""), "{out}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "batch/job-1: evicted, and ends within its grace period");
    assert!(lines[1].starts_with("ml/train-0: not evicted: Cannot evict pod as it would violate"), "{out}");
    assert!(lines[1].contains("The disruption budget train-0-budget needs 1"), "{out}");
    assert_eq!(bench.pod("batch", "job-1")["metadata"]["deletionGracePeriodSeconds"], 7);
    // Later it is allowed; the other one is on its way, and is not evicted twice.
    let (code, out, _) = bench.run(&[NODE, "--yes"]);
    assert_eq!(code, 0, "{out}");
    assert_eq!(out, "batch/job-1: ends already\nml/train-0: evicted, and ends within its grace period\n");
    assert_eq!(bench.api.count("create", "pods/eviction"), 3);
    bench.api.finish_pod_deletion("batch", "job-1").unwrap();
    bench.api.finish_pod_deletion("ml", "train-0").unwrap();
    let (code, out, _) = bench.run(&[NODE, "--yes"]);
    assert_eq!((code, out.as_str()), (0, "No pod of node gpu-7 asks for nvidia.com/* resources\n"));
    assert!(bench.pod("ml", "elsewhere")["metadata"]["deletionTimestamp"].is_null());
}

#[test]
fn what_cannot_be_done_is_told() {
    let bench = Bench::new();
    for (line, code, words) in [(&["gpu-9"][..], 2, "gpu-9 does not exist"), (&["../pods"], 2, "is no name of a node")]
    {
        let (found, out, notes) = bench.run(line);
        assert_eq!((found, out.as_str()), (code, ""), "{notes}");
        assert!(notes.contains(words), "{notes}");
    }
    // A user who may look and not evict.
    bench.api.set_rules(&bench.token, vec![Rule::new("", &["nodes", "pods"], &["get", "list"])]);
    let (code, out, _) = bench.run(&[NODE, "--yes"]);
    assert_eq!((code, out.matches("not evicted: ").count()), (1, 2), "{out}");
    assert!(out.contains("forbids you to evict a pod of node gpu-7; your role needs"), "{out}");
    bench.api.set_rules(&bench.token, vec![Rule::new("", &["nodes"], &["get", "list"])]);
    let (code, _, notes) = bench.run(&[NODE]);
    assert_eq!((code, notes.contains("forbids you to list the pods of node gpu-7")), (2, true), "{notes}");
}
