//! `ccnode status` over fake trees and a stand-in of the API server: which sources it goes by, and how it ends.

#![allow(clippy::panic, clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::fs;
use std::time::{Duration, Instant};

use agent_core::hostfile::HostDir;
use agent_core::state::{CcStatus, DeviceRecord, DeviceStatus, DevicesFile, Identity, Origin, state_dir};
use ccnode::args::Args;
use clap::Parser as _;
use hw_probe::Inventory;
use hw_probe::testing::FakeSysfs;
use lab_kube::api_server::{ApiServer, ApiServerConfig, Fault, FaultAction, Rule};
use node_object::{annotations, labels};
use serde_json::Value;

const A: &str = "0000:41:00.0";
const BOOT: &str = "11111111-2222-4333-8444-555555555555";
const NODE: &str = "gpu-7";

/// A node with one GPU in mode on, and the API server that knows it.
struct Bench {
    fake: FakeSysfs,
    api: ApiServer,
}

impl Bench {
    fn new(host_name: &str) -> Self {
        let fake = FakeSysfs::new();
        fake.gpu(A, 0x2330).group(12).driver("vfio-pci");
        fake.file("proc/sys/kernel/hostname", host_name);
        fake.process(7, "cc-manager", "", &[]);
        let record = |gpu: &hw_probe::PciFunction| DeviceRecord {
            bdf: gpu.bdf,
            identity: Identity::of(gpu),
            configured_mode: Some("on".into()),
            active_mode: Some("on".into()),
            verified_at: Some(jiff::Timestamp::now()),
            usable: true,
            error: None,
        };
        let devices: Vec<DeviceRecord> = Inventory::scan(&fake.root()).gpus().map(record).collect();
        let api = ApiServer::start(ApiServerConfig::default()).unwrap();
        let state = [(labels::CC_MODE, "on"), (labels::CC_MODE_STATE, "on"), (labels::CC_READY_STATE, "true")];
        let uid = api.add_node(NODE, &state).unwrap()["metadata"]["uid"].as_str().unwrap().to_owned();
        let token = api.add_identity("person", &[], Rule::cluster_admin());
        fs::write(fake.path().join("kubeconfig"), api.kubeconfig(&token, "127.0.0.1")).unwrap();
        let status = CcStatus {
            schema: 1,
            node_uid: uid,
            boot_id: BOOT.into(),
            wanted: "on".into(),
            result: "applied".into(),
            since: Some(jiff::Timestamp::now()),
            error: None,
            holders: Vec::new(),
            devices: devices.iter().map(DeviceStatus::from).collect(),
        };
        api.set_annotation(NODE, annotations::CC_STATUS, Some(&serde_json::to_string(&status).unwrap())).unwrap();
        let file = DevicesFile { origin: Origin::now(BOOT, None), transition: None, devices };
        file.store(&HostDir::open(state_dir(fake.path())).unwrap()).unwrap();
        Self { fake, api }
    }

    /// Exit code, standard output and standard error.
    fn run(&self, line: &[&str]) -> (u8, String, String) {
        let (root, kubeconfig) = (self.fake.path(), self.fake.path().join("kubeconfig"));
        let common =
            ["ccnode", "status", "--root", root.to_str().unwrap(), "--kubeconfig", kubeconfig.to_str().unwrap()];
        let args = Args::try_parse_from([&common, line].concat()).unwrap();
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        let code = ccnode::run(&args, &mut out, &mut notes, false);
        (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
    }

    fn json(&self, line: &[&str]) -> Value {
        let (_, out, notes) = self.run(&[line, &["--json"]].concat());
        serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{notes}"))
    }
}

#[test]
fn the_machine_and_its_node_object_are_told_of_together() {
    let bench = Bench::new(NODE);
    let (code, out, notes) = bench.run(&[]);
    assert_eq!((code, notes.as_str()), (0, ""), "{out}");
    assert!(out.starts_with("READY ") && out.contains(": mode on, 1 GPU verified\n"), "{out}");
    bench.api.set_label(NODE, labels::CC_READY_STATE, Some("")).unwrap();
    let (code, out, _) = bench.run(&[]);
    assert_eq!((code, out.starts_with("NOT READY: ")), (1, true), "{out}");
    let told = bench.json(&[]);
    assert_eq!((&told["node"]["answer"], &told["host"]["cc_manager_pid"]), (&"seen".into(), &7.into()));
    let verbs: Vec<String> = bench.api.requests().into_iter().map(|request| request.verb).collect();
    assert_eq!(verbs, ["list", "list", "list"], "one request each, and none that writes");
}

#[test]
fn two_machines_are_never_mixed() {
    // The name is asked for, and the machine has another one: the boot id proves that it is the same.
    let bench = Bench::new("laptop");
    assert_eq!(bench.json(&["--node", NODE])["host"]["boot_id"], BOOT);
    assert_eq!(bench.json(&["--node", NODE, "--remote"])["host"], Value::Null);
    // Without that proof, the node object alone.
    bench.fake.file("proc/sys/kernel/random/boot_id", "another-boot\n");
    let (code, out, _) = bench.run(&["--node", NODE]);
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("mode on, 1 device verified\n") && out.contains("GH100"), "{out}");
    assert!(out.contains("note: Nothing here says that this machine is node gpu-7: the node object alone"), "{out}");
    assert_eq!(bench.json(&["--node", NODE])["host"], Value::Null);
    // What cc-manager here was told is proof, too: then the object speaks of an earlier boot.
    bench.fake.file("proc/7/environ", format!("NODE_NAME={NODE}\0"));
    let (code, out, _) = bench.run(&[]);
    assert_eq!(code, 1, "{out}");
    assert!(out.starts_with("NOT READY: cc-manager has told nothing of this boot; do: "), "{out}");
}

#[test]
fn without_an_api_server_the_host_speaks_alone() {
    let bench = Bench::new(NODE);
    let alone = |line: &[&str], why: &str| {
        let (code, out, notes) = bench.run(line);
        assert_eq!((code, notes.as_str()), (0, ""), "{out}");
        let note = out.lines().last().unwrap();
        assert!(note.starts_with("note: By the host's files alone, so that the wanted mode is not known: "), "{out}");
        assert!(note.contains(why), "{out}");
        assert_eq!(out.lines().filter(|line| line.starts_with("note: ")).count(), 1, "{out}");
    };
    alone(&["--offline"], "--offline");
    assert!(bench.api.requests().is_empty());
    bench.api.inject(Fault::new(FaultAction::Status { code: 503, retry_after: None }).verb("list"));
    alone(&[], "Cannot list node gpu-7");
    bench.api.set_down(true);
    alone(&[], "Cannot list node gpu-7");
    // Of a node that nothing here speaks of, nothing can be told.
    let (code, out, _) = bench.run(&["--node", "gpu-8"]);
    assert_eq!((code, out.starts_with("UNKNOWN: ")), (2, true), "{out}");
    bench.fake.file("proc/sys/kernel/hostname", "not a name");
    alone(&[], "give --node");
}

#[test]
fn a_silent_api_server_is_not_waited_for() {
    let bench = Bench::new(NODE);
    bench.api.inject(Fault::new(FaultAction::Delay(Duration::from_mins(5))).verb("list"));
    let begun = Instant::now();
    let (code, out, _) = bench.run(&[]);
    assert!(begun.elapsed() < Duration::from_mins(2), "{:?}", begun.elapsed());
    assert_eq!(code, 0);
    assert!(out.contains(" within 5 s"), "{out}");
}

#[test]
fn what_has_no_status_is_refused() {
    let bench = Bench::new(NODE);
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().to_str().unwrap();
    for (root, words) in [(nowhere, "There is no directory sys in it"), ("/nonexistent", "There is no directory sys")] {
        let args = Args::try_parse_from(["ccnode", "status", "--offline", "--root", root]).unwrap();
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        assert_eq!(ccnode::run(&args, &mut out, &mut notes, false), 2);
        let notes = String::from_utf8(notes).unwrap();
        assert!(notes.contains(words) && out.is_empty(), "{notes}");
    }
    assert!(Args::try_parse_from(["ccnode", "status", "--remote", "--offline"]).is_err());
    // A file that cannot be believed is no reason to call a node ready.
    fs::write(state_dir(bench.fake.path()).join("devices.json"), "{").unwrap();
    let (code, out, _) = bench.run(&["--offline"]);
    assert_eq!((code, out.starts_with("UNKNOWN: what was verified cannot be read: ")), (2, true), "{out}");
}
