//! Power that goes away, nodes that begin anew, and what another machine has left under the node's name: in a new boot nothing
//! is believed before it has been seen.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use e2e::{
    CHANGE, await_event, await_that, bound_to_vfio, cc_status, events, node, registers_say, the_labels_never_lied,
    touched,
};
use lab::Node;
use lab::node::{CC_MODE, CC_MODE_STATE, CC_READY_STATE, NODE};
use lab_devices::Fault;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// The deploy label of one of the operator's components, which are paused during a change.
const DEPLOY: &str = "nvidia.com/gpu.deploy.vfio-manager";

const DEVICES_FILE: &str = "/run/nvidia/ccnode/devices.json";

fn devices_file(node: &Node) -> Result<Value> {
    Ok(serde_json::from_slice(&node.guest.get_file(DEVICES_FILE)?)?)
}

fn boot_id(node: &Node) -> Result<String> {
    Ok(String::from_utf8(node.guest.get_file("/proc/sys/kernel/random/boot_id")?)?.trim().to_owned())
}

fn resets(node: &Node) -> Result<Vec<u64>> {
    Ok(touched(node)?.into_iter().map(|(resets, _)| resets).collect())
}

fn start(node: &mut Node) -> Result<()> {
    node.start_vfio_manager()?;
    node.start_cc_manager()
}

/// What was written to the node object since it had `before` entries of history: the first of it says "not ready", and
/// nothing else.
fn the_first_word_is_silence(node: &Node, before: usize) -> Result<()> {
    let history = node.api.history(NODE);
    let [old, first, ..] = &history[before - 1..] else { bail!("nothing was written: {history:#?}") };
    ensure!(first.user.contains("cc-manager"), "{first:#?}");
    let mut wanted = old.labels.clone();
    wanted.insert(CC_READY_STATE.to_owned(), String::new());
    ensure!((&first.labels, &first.annotations) == (&wanted, &old.annotations), "{first:#?} after {old:#?}");
    Ok(())
}

/// The annotation and the file tell of this node object and this boot, and of no change under way.
fn all_is_of_this_boot(node: &Node, mode: &str) -> Result<()> {
    let (boot_id, status, file) = (boot_id(node)?, cc_status(node), devices_file(node)?);
    let uid = node.api.get("nodes", "", NODE).context("no node")?["metadata"]["uid"].clone();
    for told in [&status, &file] {
        ensure!(told["bootId"] == boot_id[..] && told["nodeUid"] == uid, "{told:#} in boot {boot_id} of {uid}");
        let devices = told["devices"].as_array().context("no devices")?;
        ensure!(devices.len() == 2 && devices.iter().all(|device| device["activeMode"] == mode), "{told:#}");
    }
    ensure!(file["transition"].is_null() && status["result"] == "applied", "{file:#}{status:#}");
    ensure!(!node.api.annotations(NODE).contains_key("ccnode.dev/transition"), "the journal is closed");
    Ok(())
}

#[test]
fn power_lost_in_the_middle_of_a_change_the_next_boot_finishes_it() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off"), (DEPLOY, "true")])? else { return Ok(()) };
    start(&mut node)?;
    node.await_state("off", "false", CHANGE)?;
    // One is slower than the other, so that the change is still under way when the first has booted.
    node.guest.fleet().set_fault("gpu1", Fault::BootSlow(1500))?;
    let ready = |node: &Node| node.api.labels(NODE).remove(CC_READY_STATE).unwrap_or_default();
    for (event, mode, word) in
        [("transition_started", "on", "true"), ("device_staged", "off", "false"), ("device_booted", "on", "true")]
    {
        let what = || format!("to {mode}, without power at {event}");
        let seen = events(&node, event)?;
        node.ask_for(mode)?;
        await_event(&node, event, seen)?;
        node.power_cycle().with_context(what)?;
        ensure!(ready(&node).is_empty(), "{}: ready is {:?}", what(), ready(&node));
        assert_eq!(node.api.labels(NODE)[DEPLOY], "paused-for-cc-mode-change", "{}", what());
        start(&mut node)?;
        node.await_state(mode, word, CHANGE).with_context(what)?;
        registers_say(&node, mode).with_context(what)?;
        all_is_of_this_boot(&node, mode).with_context(what)?;
        assert_eq!(node.api.labels(NODE)[DEPLOY], "true", "{}", what());
    }
    // At rest: the labels are of another boot until every device has been looked at.
    node.power_cycle()?;
    let (before, after_boot) = (node.api.history(NODE).len(), resets(&node)?);
    assert_eq!(ready(&node), "true", "nobody has taken it back yet");
    start(&mut node)?;
    await_that("written", &node, || Ok(node.api.history(NODE).len() > before + 1))?;
    node.await_state("on", "true", CHANGE)?;
    the_first_word_is_silence(&node, before)?;
    assert_eq!(resets(&node)?, after_boot, "it was right, and nobody reset it");
    all_is_of_this_boot(&node, "on")?;
    bound_to_vfio(&node)?;
    the_labels_never_lied(&node)
}

#[test]
fn what_another_machine_has_left_under_the_nodes_name_is_not_believed() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "on")])? else { return Ok(()) };
    start(&mut node)?;
    node.await_state("on", "true", CHANGE)?;
    let (file, status) = (node.guest.get_file(DEVICES_FILE)?, cc_status(&node));
    let old_uid = status["nodeUid"].as_str().context("no UID")?.to_owned();

    // The machine that comes up under this name has GPUs that are off. It finds a node object of its own with the labels and
    // annotations of the other one, a change to yet another mode among them, and the other one's file.
    node.stop_agent("cc-manager", Signal::SIGTERM)?;
    let off = node.guest.run(&["ccnode", "mode", "set", "off", "--yes", "--standalone"], CHANGE)?;
    ensure!(off.success(), "{}{}", off.text(), off.error_text());
    node.power_cycle()?;
    let uid = node.api.replace_node(NODE)?;
    ensure!(uid != old_uid);
    node.api.set_annotation(NODE, "ccnode.dev/cc-status", Some(&status.to_string()))?;
    let journal = json!({
        "schema": 1, "nodeUid": old_uid, "bootId": status["bootId"], "target": "devtools",
        "startedAt": "2026-01-01T00:00:00Z", "labels": {DEPLOY: "false"},
    });
    node.api.set_annotation(NODE, "ccnode.dev/transition", Some(&journal.to_string()))?;
    let labels = node.api.labels(NODE);
    assert_eq!((&labels[CC_MODE_STATE][..], &labels[CC_READY_STATE][..]), ("on", "true"), "as the other one was");
    node.guest.put_file(&file, DEVICES_FILE, 0o644)?;
    registers_say(&node, "off")?;
    let (before, after_boot) = (node.api.history(NODE).len(), resets(&node)?);
    start(&mut node)?;
    await_that("the other one's word is gone", &node, || Ok(cc_status(&node)["nodeUid"] == uid[..]))?;
    node.await_state("on", "true", CHANGE)?;
    the_first_word_is_silence(&node, before)?;
    registers_say(&node, "on")?;
    all_is_of_this_boot(&node, "on")?;
    let once: Vec<u64> = after_boot.iter().map(|resets| resets + 1).collect();
    assert_eq!(resets(&node)?, once, "one reset each, from what they are and not from what the file says");
    assert!(!node.api.labels(NODE).contains_key(DEPLOY), "no journal of another's");

    // Deleted and made again in the same boot, with the agent running and without it: all is told anew, of the new object, and
    // nothing is reset.
    let before = resets(&node)?;
    node.api.delete("nodes", "", NODE, None)?;
    node.api.add_node(NODE, &[(CC_MODE, "on")])?;
    node.await_state("on", "true", CHANGE)?;
    await_that("told anew", &node, || Ok(all_is_of_this_boot(&node, "on").is_ok()))
        .with_context(|| format!("{:#}{:#}", cc_status(&node), devices_file(&node).unwrap_or_default()))?;
    assert_eq!(resets(&node)?, before);
    node.stop_agent("cc-manager", Signal::SIGTERM)?;
    node.api.replace_node(NODE)?;
    let before = resets(&node)?;
    node.start_cc_manager()?;
    await_that("told anew", &node, || Ok(all_is_of_this_boot(&node, "on").is_ok()))
        .with_context(|| format!("{:#}{:#}", cc_status(&node), devices_file(&node).unwrap_or_default()))?;
    node.await_state("on", "true", CHANGE)?;
    assert_eq!(resets(&node)?, before);
    let uids: BTreeSet<String> = node.api.history(NODE).into_iter().map(|entry| entry.uid).collect();
    assert_eq!(uids.len(), 4);
    registers_say(&node, "on")
}
