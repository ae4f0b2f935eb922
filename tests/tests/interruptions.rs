//! cc-manager ended, deaf, or overtaken in the middle of a change: it finishes at the next start, and never says what is
//! not so.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{
    CHANGE, PGPU, STEP, await_event, bound_to_vfio, events, gpu_bdfs, node, registers_say, the_labels_never_lied,
    whole_trace,
};
use lab::Node;
use lab::node::{CC_MODE, CC_MODE_STATE, CC_READY_STATE, NODE};
use lab_devices::{Fault, Kind};
use lab_kube::api_server;
use nix::sys::signal::Signal;
use serde_json::Value;

const DEVICES_FILE: &str = "/run/nvidia/ccnode/devices.json";

fn ready_state(mode: &str) -> &'static str {
    match mode {
        "on" => "true",
        "off" => "false",
        _ => "",
    }
}

fn resets(node: &Node) -> Result<Vec<u64>> {
    node.gpus().iter().map(|name| Ok(node.device(name)?.flrs)).collect()
}

/// By how many resets each GPU is ahead of `before`.
fn resets_since(node: &Node, before: &[u64]) -> Result<Vec<u64>> {
    Ok(resets(node)?.iter().zip(before).map(|(now, before)| now - before).collect())
}

fn devices_file(node: &Node) -> Result<Value> {
    Ok(serde_json::from_slice(&node.guest.get_file(DEVICES_FILE)?)?)
}

fn nothing_is_usable(file: &Value) -> bool {
    file["devices"].as_array().is_some_and(|devices| devices.iter().all(|device| device["usable"] == false))
}

fn ready(node: &Node) -> Option<String> {
    node.api.labels(NODE).get(CC_READY_STATE).cloned()
}

/// No label ever lied, and no GPU ever booted with developer's tools and without confidential computing.
fn nothing_false_was_said(node: &Node) -> Result<()> {
    for boot in whole_trace(node)?.iter().filter(|event| event.kind == Kind::Ready) {
        ensure!(boot.value & 0b11 != 0b10, "{} booted with {:#x}", boot.device, boot.value);
    }
    the_labels_never_lied(node)
}

/// Pauses of 0 to 40 ms that are the same in every run.
struct Pauses(u64);

impl Pauses {
    fn next(&mut self) -> Duration {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_millis((self.0 >> 33) % 41)
    }
}

#[test]
fn killed_anywhere_it_finishes_at_the_next_start() -> Result<()> {
    const EVENTS: [&str; 4] = ["transition_started", "device_staged", "device_reset", "device_booted"];
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    // One is slower than the other, so that the change is still under way when the first has booted.
    node.guest.fleet().set_fault("gpu1", Fault::BootSlow(700))?;
    let bdfs = gpu_bdfs(&node)?;
    let mut pauses = Pauses(0x0cc);
    let (mut kills, mut under_way, mut reset_by_others) = (0, 0, 0);
    let there_and_back = |mode| EVENTS.into_iter().flat_map(move |event| [(event, mode), (event, "off")]);
    for (event, mode) in there_and_back("on").chain(there_and_back("devtools")) {
        let what = || format!("to {mode}, killed at {event}");
        let (seen, before) = (events(&node, event)?, resets(&node)?);
        node.ask_for(mode)?;
        await_event(&node, event, seen)?;
        std::thread::sleep(pauses.next());
        node.stop_agent("cc-manager", Signal::SIGKILL)?;
        kills += 1;
        let counts = resets_since(&node, &before)?;
        ensure!(counts.iter().all(|count| *count <= 1), "{}: {counts:?} resets in one attempt", what());
        let file = devices_file(&node)?;
        if file["transition"].is_object() {
            under_way += 1;
            ensure!(ready(&node).as_deref() == Some(""), "{}: ready is {:?}", what(), ready(&node));
            ensure!(nothing_is_usable(&file), "{}: {file:#}", what());
        }
        if kills % 2 == 0 {
            // Somebody else resets the GPUs meanwhile, and the knobs take effect as they are.
            for bdf in &bdfs {
                let reset = format!("echo 1 > /sys/bus/pci/devices/{bdf}/reset");
                ensure!(node.guest.shell(&reset, STEP)?.success(), "{reset} failed");
            }
            reset_by_others += 1;
        }
        let before = resets(&node)?;
        node.start_cc_manager()?;
        node.await_state(mode, ready_state(mode), CHANGE).with_context(what)?;
        registers_say(&node, mode).with_context(what)?;
        let counts = resets_since(&node, &before)?;
        ensure!(counts.iter().all(|count| *count <= 1), "{}: {counts:?} resets to finish", what());
    }
    nothing_false_was_said(&node)?;
    println!("{kills} kills, {under_way} in the middle of a change, {reset_by_others} followed by a foreign reset");
    assert!(under_way >= 8, "only {under_way} of {kills} kills came in the middle of a change");
    bound_to_vfio(&node)
}

#[test]
fn asked_to_end_it_ends_in_time_and_leaves_the_truth() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    let end = |node: &Node| -> Result<Duration> {
        let begun = Instant::now();
        node.stop_agent("cc-manager", Signal::SIGTERM)?;
        ensure!(node.agent("cc-manager")?.process.status().is_some_and(lab_vm::Status::success), "{}", node.logs());
        Ok(begun.elapsed())
    };
    // Idle: at once, and nothing is said or done.
    let (labels, before) = (node.api.labels(NODE), resets(&node)?);
    let took = end(&node)?;
    ensure!(took < Duration::from_secs(2), "ended after {took:?}");
    node.start_cc_manager()?;
    await_event(&node, "label_seen", 0)?;
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!((node.api.labels(NODE), resets(&node)?), (labels, before), "a restart touches nothing");
    // In the middle of a change that ends within the grace: it is finished and published.
    node.guest.fleet().set_fault("gpu1", Fault::BootSlow(2000))?;
    node.ask_for("on")?;
    await_event(&node, "device_reset", 0)?;
    end(&node)?;
    let labels = node.api.labels(NODE);
    assert_eq!(labels.get(CC_MODE_STATE).map(String::as_str), Some("on"), "{}", node.logs());
    assert_eq!(ready(&node).as_deref(), Some("true"));
    registers_say(&node, "on")?;
    // In the middle of one that does not: it ends with the grace, says nothing, and the next start finishes.
    node.start_agent(&["cc-manager"], &[("CCNODE_GRACE", "500ms")])?;
    await_event(&node, "label_seen", 0)?;
    node.ask_for("off")?;
    await_event(&node, "device_reset", 0)?;
    let took = end(&node)?;
    ensure!(took < Duration::from_millis(1900), "ended after {took:?}");
    assert_eq!(ready(&node).as_deref(), Some(""));
    let file = devices_file(&node)?;
    ensure!(file["transition"].is_object() && nothing_is_usable(&file), "{file:#}");
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    registers_say(&node, "off")?;
    nothing_false_was_said(&node)
}

#[test]
fn the_last_of_many_labels_wins_and_an_absent_api_server_is_waited_for() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_all()?;
    node.await_state("off", "false", CHANGE)?;
    for last in ["on", "off"] {
        for flip in 0..10 {
            node.ask_for(["on", "devtools", "off"][flip % 3])?;
            std::thread::sleep(Duration::from_millis(100));
        }
        node.ask_for(last)?;
        node.await_state(last, ready_state(last), CHANGE)?;
        registers_say(&node, last)?;
        node.await_allocatable(PGPU, 2, STEP)?;
    }
    // The API server goes away while the GPUs are being reset: the result is told when it is back.
    node.guest.fleet().set_fault("gpu1", Fault::BootSlow(700))?;
    let seen = events(&node, "device_reset")?;
    let ended = events(&node, "transition_ended")?;
    node.ask_for("on")?;
    await_event(&node, "device_reset", seen)?;
    node.api.set_down(true);
    await_event(&node, "transition_ended", ended)?;
    std::thread::sleep(Duration::from_secs(1));
    let before = resets(&node)?;
    node.api.set_down(false);
    node.await_state("on", "true", CHANGE)?;
    // It answers, with refusals and cut connections.
    for (mode, code) in [("off", 409), ("on", 422), ("off", 503)] {
        let seen = events(&node, "device_reset")?;
        node.ask_for(mode)?;
        await_event(&node, "device_reset", seen)?;
        let action = api_server::FaultAction::Status { code, retry_after: None };
        node.api.inject(api_server::Fault::new(action).verb("patch").resource("nodes").times(2));
        node.api
            .inject(api_server::Fault::new(api_server::FaultAction::CutAfterCommit).verb("patch").resource("nodes"));
        node.api.cut_connections();
        node.await_state(mode, ready_state(mode), CHANGE)?;
        registers_say(&node, mode)?;
        node.api.clear_faults();
    }
    assert_eq!(resets_since(&node, &before)?, [3, 3], "no change was made twice for want of an answer");
    nothing_false_was_said(&node)
}

#[test]
fn a_gpu_without_driver_is_held_while_it_is_changed_and_bound_afterwards() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    for name in node.gpus() {
        node.guest.fleet().set_fault(&name, Fault::BootSlow(2000))?;
    }
    let before = resets(&node)?;
    node.ask_for("on")?;
    node.start_cc_manager()?;
    await_event(&node, "device_reset", 0)?;
    node.start_vfio_manager()?;
    // cc-manager has bound it for the time being. When it has given it back, vfio-manager binds it for good.
    let count = |text: &str, event: &str| text.matches(&format!("\"{event}\"")).count();
    let log = &node.agent("vfio-manager")?.process;
    log.wait_output(STEP, |text| count(text, "device_seen") == 2).with_context(|| node.logs())?;
    ensure!(events(&node, "device_verified")? == 0, "vfio-manager came too late\n{}", node.logs());
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")?;
    assert_eq!(resets_since(&node, &before)?, [1, 1]);
    log.wait_output(STEP, |text| count(text, "device_bound") == 2).with_context(|| node.logs())?;
    bound_to_vfio(&node).with_context(|| node.logs())?;
    nothing_false_was_said(&node)
}

#[test]
fn a_gpu_that_was_taken_out_and_put_back_is_verified_again() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "on")])? else { return Ok(()) };
    node.start_kubelet()?;
    node.start_vfio_manager()?;
    node.start_agent(&["cc-manager"], &[("CCNODE_RESYNC", "2s")])?;
    node.start_device_plugin()?;
    node.await_state("on", "true", CHANGE)?;
    node.await_allocatable(PGPU, 2, STEP)?;
    let bdf = node.guest.bdf("gpu1")?;
    let verified_at = |node: &Node| -> Result<String> {
        let file = devices_file(node)?;
        let record = file["devices"].as_array().and_then(|all| all.iter().find(|one| one["bdf"] == bdf[..]).cloned());
        Ok(record.map_or_else(String::new, |record| record["verifiedAt"].to_string()))
    };
    let (begun, before) = (events(&node, "transition_started")?, verified_at(&node)?);
    ensure!(!before.is_empty(), "it has not been verified");
    let replug = format!("echo 1 > /sys/bus/pci/devices/{bdf}/remove; echo 1 > /sys/bus/pci/rescan");
    ensure!(node.guest.shell(&replug, STEP)?.success(), "{replug} failed");
    let deadline = Instant::now() + CHANGE;
    while verified_at(&node)? == before || verified_at(&node)?.is_empty() {
        ensure!(Instant::now() < deadline, "{}", node.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    node.await_state("on", "true", CHANGE)?;
    node.await_allocatable(PGPU, 2, STEP)?;
    ensure!(events(&node, "transition_started")? == begun, "it was right, and looked at without a change");
    registers_say(&node, "on")?;
    nothing_false_was_said(&node)
}
