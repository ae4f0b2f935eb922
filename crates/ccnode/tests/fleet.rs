//! `ccnode fleet` against a stand-in of the API server.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

mod cluster;

use agent_core::state::{CcStatus, DeviceStatus};
use ccnode::args::Args;
use clap::Parser as _;
use node_object::{annotations, labels};
use serde_json::{Value, json};

use crate::cluster::Cluster;

const FLEET: &str = "fleet";

impl Cluster {
    /// A node whose cc-manager has said this; `verified` of its two GPUs.
    fn node(&self, name: &str, (wanted, state, ready): (&str, &str, &str), verified: usize) {
        let given = [(labels::CC_MODE, wanted), (labels::CC_MODE_STATE, state), (labels::CC_READY_STATE, ready)];
        let uid = self.api.add_node(name, &given).unwrap()["metadata"]["uid"].as_str().unwrap().to_owned();
        let device = |index: usize| -> DeviceStatus {
            let mut device = json!({"bdf": format!("0000:4{index}:00.0"), "ids": "10de:2330"});
            if index < verified {
                device["verifiedAt"] = jiff::Timestamp::now().to_string().into();
                device["activeMode"] = wanted.into();
                device["configuredMode"] = wanted.into();
            }
            serde_json::from_value(device).unwrap()
        };
        let status = CcStatus {
            schema: 1,
            node_uid: uid,
            boot_id: "11111111-2222-4333-8444-555555555555".into(),
            wanted: wanted.into(),
            result: "applied".into(),
            since: Some(jiff::Timestamp::now()),
            error: None,
            holders: Vec::new(),
            devices: (0..2).map(device).collect(),
        };
        let text = serde_json::to_string(&status).unwrap();
        self.api.set_annotation(name, annotations::CC_STATUS, Some(&text)).unwrap();
    }
}

#[test]
fn every_node_with_gpus_has_a_line() {
    let cluster = Cluster::new();
    cluster.api.add_node("cpu-1", &[]).unwrap();
    assert_eq!(cluster.run(FLEET, &[]).0, 0);
    cluster.node("gpu-1", ("on", "on", "true"), 2);
    let (code, out, notes) = cluster.run(FLEET, &[]);
    assert_eq!((code, notes.as_str()), (0, ""), "{out}");
    assert_eq!(out.lines().count(), 2, "{out}");

    cluster.node("gpu-2", ("off", "failed", ""), 1);
    cluster.api.add_node("gpu-3", &[("nvidia.com/gpu.present", "true")]).unwrap();
    let (code, out, _) = cluster.run(FLEET, &[]);
    assert_eq!(code, 1, "{out}");
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<Vec<String>> = out.lines().map(words).collect();
    assert_eq!(lines[0], ["NODE", "STATUS", "SINCE", "WANTED", "STATE", "READY", "VERIFIED", "WHY"]);
    let names: Vec<&str> = lines[1..].iter().map(|line| line[0].as_str()).collect();
    assert_eq!(names, ["gpu-1", "gpu-2", "gpu-3"], "{out}");
    assert_eq!((lines[1][1].as_str(), &lines[1][3..9]), ("READY", &words("on on true 2 of 2")[..]), "{out}");
    assert!(out.contains("failed  -      1 of 2"), "{out}");
    assert!(out.lines().last().unwrap().contains("(default)"), "{out}");

    let (_, out, _) = cluster.run(FLEET, &["--json"]);
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(answer["schema"], 1);
    assert_eq!(answer["nodes"][0]["verdict"], "ready");
    assert_eq!(answer["nodes"][2]["devices"], Value::Null);
}

#[test]
fn a_large_fleet_comes_in_pages() {
    let cluster = Cluster::new();
    for index in 0..501 {
        cluster.api.add_node(&format!("gpu-{index:03}"), &[("nvidia.com/gpu.present", "true")]).unwrap();
    }
    let (_, out, _) = cluster.run(FLEET, &[]);
    assert_eq!(out.lines().count(), 502);
    assert_eq!(cluster.api.count("list", "nodes"), 2);
}

#[test]
fn who_may_not_list_nodes_is_told_so() {
    let cluster = Cluster::new();
    cluster.api.set_rules(&cluster.token, Vec::new());
    let (code, out, notes) = cluster.run(FLEET, &[]);
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(notes.contains("your role needs list on nodes"), "{notes}");
}

#[test]
fn an_empty_kubeconfig_is_none_to_every_command_that_takes_one() {
    for words in [&["fleet"][..], &["status"], &["cleanup"], &["drain-holders", "gpu-7"]] {
        let words = [&["ccnode"], words, &["--kubeconfig="]].concat();
        assert!(Args::try_parse_from(&words).is_ok(), "{words:?}");
    }
}
