//! What goes wrong is told as it is, and never as a mode that a device is not in.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, PGPU, STEP, exchanges, is_in, node, registers_say, the_labels_never_lied, whole_trace};
use lab::Node;
use lab::node::{Agent, CC_MODE, CC_MODE_STATE, CC_READY_STATE, NODE, field};
use lab_devices::{Fault, ModelKind};
use nix::sys::signal::Signal;
use serde_json::Value;

fn all_run(node: &Node) -> Result<()> {
    ensure!(node.agents().iter().all(Agent::is_running), "an agent ended\n{}", node.logs());
    Ok(())
}

/// Waits for a line of an agent that has all of these words: a log comes a moment after the labels.
fn log_has(node: &Node, agent: &str, words: &[&str]) -> Result<()> {
    let has_line = |text: &str| text.lines().any(|line| words.iter().all(|word| line.contains(word)));
    let found = node.agent(agent)?.process.wait_output(STEP, has_line);
    found.with_context(|| format!("no line of {agent} has all of {words:?}\n{}", node.logs()))
}

#[test]
fn a_gpu_that_never_boots_ends_in_failed_and_recovers() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_all()?;
    node.await_state("off", "false", CHANGE)?;
    node.await_allocatable(PGPU, 2, STEP)?;
    node.guest.fleet().set_fault("gpu1", Fault::BootNeverCompletes)?;
    node.ask_for("on")?;
    node.await_state("failed", "", CHANGE)?;
    let bdf = node.guest.bdf("gpu1")?;
    log_has(&node, "cc-manager", &[&bdf, "0x200bc", "BootTimeout"])?;
    // The healthy sibling was changed and verified, and is offered; the dead one is not.
    let healthy = node.device("gpu0")?;
    assert_eq!(healthy.status_word & 0x23, 0x01);
    node.await_allocatable(PGPU, 1, STEP)?;
    all_run(&node)?;
    let history = node.api.history(NODE);
    let asked = history.iter().position(|entry| entry.labels.get(CC_MODE).is_some_and(|mode| mode == "on"));
    for entry in &history[asked.context("never asked")?..] {
        let ready = entry.labels.get(CC_READY_STATE).map(String::as_str);
        ensure!(ready != Some("true"), "ready while a GPU is dead: {:?}", entry.labels);
        ensure!(entry.labels.get(CC_MODE_STATE).is_none_or(|state| state != "on"), "{:?}", entry.labels);
    }
    // When the cause is gone, the agent finishes by itself.
    node.guest.fleet().clear_faults("gpu1")?;
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")?;
    node.await_allocatable(PGPU, 2, STEP)
}

/// How often cc-manager has said of a device that it failed, and for this reason.
fn failures(node: &Node, bdf: &str, code: &str) -> Result<usize> {
    let failed = node.agent("cc-manager")?.events("device_failed");
    let is_it = |line: &Value| field(line, "device") == Some(bdf) && field(line, "code") == Some(code);
    Ok(failed.iter().filter(|(_, line)| is_it(line)).count())
}

#[test]
fn replies_that_are_missing_late_short_or_mistyped_are_failures_and_change_nothing() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_all()?;
    node.await_state("off", "false", CHANGE)?;
    let bdf = node.guest.bdf("gpu1")?;
    let mut was = "off";
    for (fault, code, mode, ready) in [
        (Fault::FspNoReply, "FspNoResponse", "on", "true"),
        // Firmware has 5 s to answer (gpu-cc-protocol section 9).
        (Fault::FspLateReply(8000), "FspNoResponse", "off", "false"),
        (Fault::FspShortReply, "FspProtocol", "on", "true"),
        (Fault::FspMistypedReply, "FspProtocol", "off", "false"),
    ] {
        let (what, seen) = (format!("{fault} on the way to {mode}"), failures(&node, &bdf, code)?);
        node.guest.fleet().set_fault("gpu1", fault)?;
        node.ask_for(mode)?;
        node.await_state("failed", "", CHANGE).with_context(|| what.clone())?;
        let deadline = Instant::now() + STEP;
        while failures(&node, &bdf, code)? <= seen {
            ensure!(Instant::now() < deadline, "{what}: {code} is not said of {bdf}\n{}", node.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
        // The healthy one is in the new mode and offered; the other one is in its old mode, and is not.
        node.await_allocatable(PGPU, 1, STEP).with_context(|| what.clone())?;
        for (name, mode) in [("gpu0", mode), ("gpu1", was)] {
            is_in(name, ModelKind::H100, &node.device(name)?, mode).with_context(|| what.clone())?;
        }
        node.guest.fleet().clear_faults("gpu1")?;
        node.await_state(mode, ready, CHANGE).with_context(|| what.clone())?;
        registers_say(&node, mode).with_context(|| what.clone())?;
        node.await_allocatable(PGPU, 2, STEP).with_context(|| what.clone())?;
        was = mode;
    }
    the_labels_never_lied(&node)?;
    all_run(&node)
}

#[test]
fn a_gpu_that_nobody_knows_makes_the_node_failed_and_only_itself_unusable() -> Result<()> {
    let Some(mut node) = node("mixed", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_all()?;
    // Off is each device's own: a Hopper, a Blackwell, and one that has no other mode are off, and offered.
    node.await_state("failed", "", CHANGE)?;
    let unknown = node.guest.bdf("gpu3")?;
    log_has(&node, "cc-manager", &[&unknown, "UnknownDevice"])?;
    node.await_allocatable(PGPU, 3, STEP)?;
    let file: Value = serde_json::from_slice(&node.guest.get_file("/run/nvidia/ccnode/devices.json")?)?;
    let devices = file["devices"].as_array().context("devices.json has no devices")?;
    assert_eq!(devices.len(), 4);
    for device in devices {
        assert_eq!(device["usable"], device["bdf"] != unknown[..], "{device}");
    }
    // On is of all or none: nothing is written to any of them.
    node.ask_for("on")?;
    node.await_allocatable(PGPU, 0, STEP)?;
    node.await_state("failed", "", CHANGE)?;
    let trace = whole_trace(&node)?;
    for name in node.gpus() {
        let said = exchanges(&trace, &name);
        assert!(said.iter().all(|word| word.contains("020C->")), "{name}: {said:?}");
        assert_eq!(node.device(&name)?.flrs, 0, "{name} was reset");
    }
    all_run(&node)
}

#[test]
fn an_unknown_mode_touches_nothing() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    let before: Vec<u64> = node.gpus().iter().map(|name| Ok(node.device(name)?.rpcs)).collect::<Result<_>>()?;
    node.ask_for("On")?;
    node.await_state("failed", "", CHANGE)?;
    log_has(&node, "cc-manager", &["UnknownMode", "On", "devtools"])?;
    let after: Vec<u64> = node.gpus().iter().map(|name| Ok(node.device(name)?.rpcs)).collect::<Result<_>>()?;
    assert_eq!(before, after, "no request went to any device");
    registers_say(&node, "off")?;
    node.ask_for("off")?;
    node.await_state("off", "false", CHANGE)?;
    all_run(&node)
}

#[test]
fn a_gpu_that_a_process_holds_is_not_touched() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    let bdf = node.guest.bdf("gpu1")?;
    // As a virtual machine does, by the file of its IOMMU group.
    let hold = format!(
        "exec 3<>/dev/vfio/$(basename $(readlink /sys/bus/pci/devices/{bdf}/iommu_group)) && echo held && sleep 1000"
    );
    node.start_agent(&["sh", "-c", &hold], &[])?;
    node.agent("sh")?.process.wait_output(STEP, |text| text.contains("held"))?;
    let flrs =
        |node: &Node| -> Result<Vec<u64>> { node.gpus().iter().map(|name| Ok(node.device(name)?.flrs)).collect() };
    let before = flrs(&node)?;
    node.ask_for("on")?;
    let refused =
        node.agent("cc-manager")?.process.wait_output(CHANGE, |text| text.contains("InUse") && text.contains(&bdf));
    refused.with_context(|| node.logs())?;
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(flrs(&node)?, before, "no device was reset, the free one neither");
    registers_say(&node, "off")?;
    let ready = node.api.labels(NODE).get(CC_READY_STATE).cloned();
    ensure!(ready.as_deref() != Some("true"), "ready is {ready:?}");
    // `unbind --all` leaves the held device bound as well, and says who holds it.
    node.stop_agent("vfio-manager", Signal::SIGTERM)?;
    let unbind = node.guest.run(&["vfio-manage", "unbind", "--all"], STEP)?;
    assert!(unbind.success(), "{}{}", unbind.text(), unbind.error_text());
    ensure!(unbind.text().contains("DeviceHeld"), "{}", unbind.text());
    let probe = node.look_json(&["ccnode", "probe", "--json"])?;
    let drivers: Vec<_> =
        probe["devices"].as_array().into_iter().flatten().map(|device| device["driver"].clone()).collect();
    assert_eq!(drivers, [serde_json::Value::Null, "vfio-pci".into()]);
    node.start_vfio_manager()?;
    // When the holder is gone, the change happens by itself.
    node.stop_agent("sh", Signal::SIGKILL)?;
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")
}

#[test]
fn a_node_object_that_is_not_there_and_a_kubelet_that_is_late_are_waited_for() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.api.delete("nodes", "", NODE, None)?;
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.start_device_plugin()?;
    node.agent("cc-manager")?.process.wait_output(STEP, |text| text.contains(NODE) && text.contains("NodeAbsent"))?;
    node.api.add_node(NODE, &[(CC_MODE, "on")])?;
    node.await_state("on", "true", CHANGE)?;
    all_run(&node)?;
    node.start_kubelet()?;
    node.await_allocatable(PGPU, 2, STEP)?;
    // A kubelet that restarts forgets its plugins; ours comes back by itself.
    node.look(&["lab-kubelet", "ctl", "restart"])?;
    node.await_allocatable(PGPU, 2, STEP)?;
    registers_say(&node, "on")
}
