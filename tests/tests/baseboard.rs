//! A whole HGX H100 baseboard: eight GPUs change together, in the time of one.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{
    CHANGE, PGPU, STEP, await_that, cc_status, devices, exchanges, gpu_bdfs, is_in, node_with, own_mode, registers_say,
    the_labels_never_lied, touched, touches, whole_trace,
};
use lab::node::{CC_MODE, CC_READY_STATE, NODE};
use lab::{Boot, Node};
use lab_devices::{DeviceSpec, Fault, Kind, ModelKind};
use lab_vm::topology::{Device, Place};
use serde_json::Value;

#[test]
fn eight_gpus_are_reset_in_parallel_and_offered_with_their_numa_nodes() -> Result<()> {
    // Slow enough for a busy machine to begin all resets before the first device is up again.
    let slow = |boot: &mut Boot| {
        for device in &mut boot.topology.devices {
            device.spec.boot = Duration::from_secs(3);
        }
    };
    let Some(mut node) = node_with("hgx-h100", &[(CC_MODE, "off")], slow)? else { return Ok(()) };
    node.start_all()?;
    node.await_state("off", "false", CHANGE)?;
    node.await_allocatable(PGPU, 8, STEP)?;
    let begun = node.guest.fleet().micros();
    node.ask_for("on")?;
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")?;
    the_labels_never_lied(&node)?;

    let mut trace = whole_trace(&node)?;
    // A switch of a node with CC is off, as it has been since it was made; that was verified, and nothing was set.
    for switch in (0..4).map(|number| format!("nvswitch{number}")) {
        let said = exchanges(&trace, &switch);
        assert!(!said.is_empty() && said.iter().all(|word| word.ends_with("020C->0")), "{switch}: {said:?}");
        let was_reset = trace.iter().any(|event| event.kind == Kind::Flr && *event.device == switch[..]);
        assert!(!was_reset, "{switch} was reset");
    }
    trace.retain(|event| event.micros >= begun);
    let of = |kind: Kind| trace.iter().filter(move |event| event.kind == kind && event.device.starts_with("gpu"));
    assert_eq!(of(Kind::Flr).count(), 8, "one reset each");
    let last_reset = of(Kind::Flr).map(|event| event.micros).max().context("no reset")?;
    let first_boot = of(Kind::Ready).map(|event| event.micros).min().context("no boot")?;
    assert!(last_reset < first_boot, "the last reset began {} us after a device had booted", last_reset - first_boot);

    node.await_allocatable(PGPU, 8, STEP)?;
    let dump = node.kubelet()?;
    let devices = dump["resources"][PGPU]["devices"].as_array().context("no devices")?;
    for numa in [0, 1] {
        let count = devices.iter().filter(|device| device["numa"] == serde_json::json!([numa])).count();
        assert_eq!(count, 4, "NUMA node {numa}: {dump:#}");
    }
    // A pod of four stays on one socket.
    node.create_pod("half", PGPU, 4)?;
    node.await_pod("half", "Running", STEP)?;
    let resolved = node.look_json(&["lab-kubelet", "resolve", "default/half"])?;
    let plugged: Vec<String> = resolved["devices"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|device| device["bdfs"][0].as_str().map(ToOwned::to_owned))
        .collect();
    assert_eq!(plugged.len(), 4);
    let all = gpu_bdfs(&node)?;
    assert!(plugged.iter().all(|bdf| all.contains(bdf)));
    let probe = node.look_json(&["ccnode", "probe", "--json"])?;
    let numa_of = |bdf: &str| {
        let devices = probe["devices"].as_array()?;
        devices.iter().find(|device| device["bdf"] == bdf)?["numa_node"].as_u64()
    };
    let nodes: std::collections::BTreeSet<Option<u64>> = plugged.iter().map(|bdf| numa_of(bdf)).collect();
    assert_eq!(nodes.len(), 1, "{plugged:?} are on {nodes:?}");
    Ok(())
}

/// Devices that boot quickly.
fn quick(boot: &mut Boot) {
    for device in &mut boot.topology.devices {
        device.spec.boot = Duration::from_millis(200);
    }
}

/// By how many resets each device is ahead of `before`.
fn resets_since(node: &Node, before: &[(u64, u64)]) -> Result<Vec<u64>> {
    Ok(touched(node)?.iter().zip(before).map(|((now, _), (before, _))| now - before).collect())
}

/// What the agents may offer, by `devices.json`: these devices and no other.
fn usable(node: &Node) -> Result<BTreeSet<String>> {
    let file: Value = serde_json::from_slice(&node.guest.get_file("/run/nvidia/ccnode/devices.json")?)?;
    let records = file["devices"].as_array().context("no devices")?.iter();
    let usable = records.filter(|record| record["usable"] == true);
    Ok(usable.filter_map(|record| record["bdf"].as_str().map(ToOwned::to_owned)).collect())
}

/// The node is `failed`, and says so of this device alone.
fn is_failed_for(node: &Node, name: &str, wanted: &str) -> Result<()> {
    let bdf = node.guest.bdf(name)?;
    let of_it = || {
        let status = cc_status(node);
        let said = status["error"]["message"].as_str().unwrap_or_default();
        let others = devices(node).into_iter().filter_map(|(other, _)| node.guest.bdf(other).ok());
        let named: Vec<String> = others.filter(|bdf| said.contains(bdf)).collect();
        status["wanted"] == wanted && status["result"] == "failed" && named == [bdf.clone()]
    };
    await_that("failed for it alone", node, || Ok(of_it())).with_context(|| format!("{:#}", cc_status(node)))?;
    node.await_state("failed", "", CHANGE)
}

#[test]
fn gpus_and_switches_go_into_protected_pcie_and_back_and_a_broken_gpu_keeps_them_out() -> Result<()> {
    let Some(mut node) = node_with("hgx-h100", &[(CC_MODE, "on")], quick)? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")?;
    for (mode, ready) in [("off", "false"), ("ppcie", "true"), ("off", "false")] {
        let before = touched(&node)?;
        let is_to_change =
            |name: &str, model| Ok(is_in(name, model, &node.device(name)?, own_mode(model, mode)).is_err());
        let changed: Vec<u64> = devices(&node)
            .into_iter()
            .map(|(name, model)| is_to_change(name, model).map(u64::from))
            .collect::<Result<_>>()?;
        node.ask_for(mode)?;
        node.await_state(mode, ready, CHANGE)?;
        registers_say(&node, mode).with_context(|| node.logs())?;
        assert_eq!(resets_since(&node, &before)?, changed, "{mode}: one reset of each device that changes");
        assert_eq!(usable(&node)?.len(), 12, "{mode}");
    }

    // One of them does not answer: the mode of all is not reached, and off is each device's own.
    let broken = node.guest.bdf("gpu5")?;
    node.guest.fleet().set_fault("gpu5", Fault::FspNoReply)?;
    node.ask_for("ppcie")?;
    is_failed_for(&node, "gpu5", "ppcie")?;
    assert_eq!(usable(&node)?, BTreeSet::new(), "protected PCIe is one thing of all devices");
    node.ask_for("off")?;
    is_failed_for(&node, "gpu5", "off")?;
    for (name, model) in devices(&node).into_iter().filter(|(name, _)| *name != "gpu5") {
        is_in(name, model, &node.device(name)?, "off")?;
        ensure!(usable(&node)?.contains(&node.guest.bdf(name)?), "{name} is as good as before");
    }
    ensure!(!usable(&node)?.contains(&broken));
    node.guest.fleet().clear_faults("gpu5")?;
    node.await_state("off", "false", CHANGE)?;
    registers_say(&node, "off")?;
    assert_eq!(usable(&node)?.len(), 12);
    the_labels_never_lied(&node)
}

#[test]
fn a_blackwell_board_goes_on_and_off_and_a_gpu_that_can_only_be_off_is_named() -> Result<()> {
    // An A100 lies ready to be put into the place of another GPU.
    let with_spare = |boot: &mut Boot| {
        quick(boot);
        let spec = DeviceSpec::new("spare", ModelKind::A100);
        boot.topology.devices.push(Device { spec, place: Place::RootPort { numa: Some(1) }, absent: true });
    };
    let Some(mut node) = node_with("b200x8", &[(CC_MODE, "on")], with_spare)? else { return Ok(()) };
    node.start_vfio_manager()?;
    let settings = [("CCNODE_RESYNC", "1s"), ("CCNODE_RETRY_MIN", "500ms"), ("CCNODE_RETRY_MAX", "2s")];
    node.start_agent(&["cc-manager"], &settings)?;
    for (mode, ready) in [("on", "true"), ("off", "false")] {
        let before = touched(&node)?;
        node.ask_for(mode)?;
        node.await_state(mode, ready, CHANGE)?;
        registers_say(&node, mode).with_context(|| node.logs())?;
        assert_eq!(resets_since(&node, &before)?, [1; 8], "{mode}: one reset each");
        assert_eq!(usable(&node)?, gpu_bdfs(&node)?, "{mode}");
    }
    the_labels_never_lied(&node)?;

    node.guest.unplug("gpu7", STEP)?;
    node.guest.plug("spare")?;
    await_that("eight again", &node, || Ok(cc_status(&node)["devices"].as_array().is_some_and(|all| all.len() == 8)))?;
    node.await_state("off", "false", CHANGE)?;
    let old = node.guest.bdf("spare")?;
    await_that("offered", &node, || Ok(usable(&node)?.len() == 8 && usable(&node)?.contains(&old)))?;
    node.guest.fleet().clear_trace();
    node.ask_for("on")?;
    is_failed_for(&node, "spare", "on")?;
    assert_eq!(usable(&node)?, BTreeSet::new());
    let trace = whole_trace(&node)?;
    ensure!(touches(&trace).is_empty(), "on is of all or none: {:?}", touches(&trace));
    node.ask_for("off")?;
    node.await_state("off", "false", CHANGE)?;
    registers_say(&node, "off")?;
    assert_eq!(usable(&node)?.len(), 8);
    assert_eq!(node.api.labels(NODE)[CC_READY_STATE], "false");
    Ok(())
}
