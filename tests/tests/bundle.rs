//! A bundle of a node under a real kernel, replayed on the host and as a topology; and the registers that `probe` reads on request.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use e2e::{STEP, lab_is_here, node};
use lab::node::NODE;
use lab::{Boot, Node};
use lab_devices::{Fault, Kind, Space};
use serde_json::{Value, json};

/// The host's own `ccnode`.
fn ccnode(args: &[&str]) -> Result<Output> {
    let program: PathBuf = lab::programs::built()?.join("ccnode");
    Command::new(program).args(args).output().context("ccnode cannot be started")
}

fn replayed(command: &str, bundle: &Path) -> Result<Value> {
    let output = ccnode(&[command, "--json", "--root", bundle.to_str().context("no text")?])?;
    let notes = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code().is_some_and(|code| code < 2), "{notes}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Makes a bundle in the guest and brings it out.
fn bundle(node: &Node, to: &Path) -> Result<PathBuf> {
    node.look(&["ccnode", "bundle", "--output", "/tmp/bundle.tar.gz"])?;
    let path = to.join("bundle.tar.gz");
    std::fs::write(&path, node.guest.get_file("/tmp/bundle.tar.gz")?)?;
    Ok(path)
}

/// What is of the live node alone.
fn without_live(mut report: Value) -> Value {
    report["host"]["boot_id"] = Value::Null;
    for holder in report["holders"]["list"].as_array_mut().into_iter().flatten() {
        for field in ["pid", "cgroup", "pod_uid"] {
            holder[field] = Value::Null;
        }
    }
    report
}

#[test]
fn a_bundle_tells_elsewhere_what_the_node_tells() -> Result<()> {
    let Some(node) = node("h100x2", &[])? else { return Ok(()) };
    node.look(&["vfio-manage", "bind", "--all"])?;
    node.guest.fleet().set_fault("gpu1", "security-fault:0x40000000".parse::<Fault>()?)?;
    // Without its file, lockdown is what only the running kernel can tell.
    node.look(&["sh", "-c", "umount /sys/kernel/security"])?;
    node.guest.fleet().clear_trace();
    let folder = tempfile::tempdir()?;
    let path = bundle(&node, folder.path())?;
    for event in node.trace() {
        let harmless = event.kind == Kind::Read && event.space == Space::Config;
        ensure!(harmless, "{} saw {:?} at {:?} {:#x}", event.device, event.kind, event.space, event.offset);
    }
    let probe = node.look_json(&["ccnode", "probe", "--json"])?;
    assert_eq!(replayed("probe", &path)?, without_live(probe));
    let output = node.guest.run(&["ccnode", "doctor", "--json"], STEP)?;
    let doctor: Value = serde_json::from_slice(&output.stdout)?;
    let again = replayed("doctor", &path)?;
    assert_eq!(again, doctor);
    let failed: BTreeSet<&str> = again["checks"]
        .as_array()
        .context("no checks")?
        .iter()
        .filter(|check| check["result"] == "failed")
        .filter_map(|check| check["id"].as_str())
        .collect();
    assert!(failed.contains("gpu-security-fault"), "{failed:?}");

    let text = Command::new("tar").args(["-xzOf"]).arg(&path).output()?;
    ensure!(text.status.success() && text.stdout.len() > 10_000, "tar cannot read it");
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(!text.contains(NODE), "the node's name is in it");
    Ok(())
}

#[test]
fn a_bundle_of_a_baseboard_boots_as_a_topology() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("hgx.tar.gz");
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/hgx-h100");
    let (path_text, tree) = (path.to_str().context("no text")?, tree.to_str().context("no text")?);
    let made = ccnode(&["bundle", "--output", path_text, "--root", tree])?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let node = Node::start(Boot::new(path_text)?, &[])?;
    let probe = node.look_json(&["ccnode", "probe", "--json"])?;
    let there = replayed("probe", &path)?;
    let devices = |report: &Value, kind: &str| -> Result<Vec<Value>> {
        let all = report["devices"].as_array().context("no devices")?;
        Ok(all.iter().filter(|device| device["kind"] == kind).cloned().collect())
    };
    for (kind, count) in [("gpu", 8), ("nvswitch", 4)] {
        let (here, there) = (devices(&probe, kind)?, devices(&there, kind)?);
        assert_eq!((here.len(), there.len()), (count, count), "{kind}");
        let models = |list: &[Value]| list.iter().map(|device| device["model"]["name"].to_string()).collect::<Vec<_>>();
        assert_eq!(models(&here), models(&there));
        let numa = |list: &[Value], node: u64| list.iter().filter(|device| device["numa_node"] == node).count();
        assert_eq!([0, 1].map(|node| numa(&here, node)), [0, 1].map(|node| numa(&there, node)), "{kind}");
        for device in &here {
            assert_eq!(device["upstream"].as_array().map(Vec::len), Some(3), "{}", device["bdf"]);
        }
        let switches =
            |list: &[Value]| list.iter().map(|device| device["upstream"][1].to_string()).collect::<BTreeSet<_>>().len();
        assert_eq!(switches(&here), switches(&there), "{kind}");
    }
    Ok(())
}

#[test]
fn registers_are_read_of_idle_devices_alone() -> Result<()> {
    let Some(node) = node("h100x2", &[])? else { return Ok(()) };
    let registers = || -> Result<Vec<Value>> {
        node.guest.fleet().clear_trace();
        let probe = node.look_json(&["ccnode", "probe", "--json", "--registers"])?;
        let devices = probe["devices"].as_array().context("no devices")?.clone();
        for event in node.trace() {
            ensure!(event.kind == Kind::Read, "{} saw {:?} at {:#x}", event.device, event.kind, event.offset);
        }
        Ok(devices)
    };
    let touched = || -> BTreeSet<u64> {
        node.trace().iter().filter(|event| event.space != Space::Config).map(|event| event.offset).collect()
    };
    // Free of drivers and awake.
    let devices = registers()?;
    for device in &devices {
        let found = &device["registers"];
        assert_eq!((&found["state"], &found["boot_0"]), (&json!("read"), &json!(0x1800_00a1)), "{device:#}");
        assert_eq!((&found["boot_scratch"], &device["cc"]["mode"]), (&json!(0xff), &json!("off")), "{device:#}");
        assert_eq!(device["cc"]["source"], "registers");
    }
    assert_eq!(touched(), BTreeSet::from([0, 0x2_00bc, 0x11_82cc]));
    // Idle on VFIO they sleep, and are not woken.
    node.look(&["vfio-manage", "bind", "--all"])?;
    let devices = registers()?;
    for device in &devices {
        assert_eq!(device["power"]["runtime_status"], "suspended", "{device:#}");
        let reason = device["registers"]["reason"].as_str().context("no reason")?;
        assert_eq!(reason, "asleep; use `ccnode mode get --own`");
        assert_eq!((&device["cc"]["mode"], &device["cc"]["reason"]), (&Value::Null, &json!(reason)));
    }
    assert_eq!(touched(), BTreeSet::new());
    Ok(())
}
