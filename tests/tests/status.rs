//! `ccnode status` and `ccnode cleanup` on a node that lives: ready, held, in the middle of a change, killed, and taken away.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, STEP, bound_to_vfio, node};
use lab::Node;
use lab::node::{CC_MODE, CC_MODE_STATE, CC_READY_STATE, NODE};
use lab_devices::Fault;
use lab_vm::Command;
use nix::sys::signal::Signal;
use serde_json::Value;

const PAUSED: &str = "nvidia.com/gpu.deploy.sandbox-validator";

/// Runs ccnode as a person on the node does, with a way to the API server: exit code, and what it says.
fn ccnode(node: &Node, line: &[&str]) -> Result<(i32, String)> {
    let command = Command::new(["ccnode"].iter().chain(line).copied())
        .env("KUBERNETES_SERVICE_HOST", "10.0.2.2")
        .env("KUBERNETES_SERVICE_PORT", node.api.address().port().to_string())
        .env("NODE_NAME", NODE);
    let process = node.guest.spawn(command)?;
    let status = process.wait(STEP)?;
    let output = process.output();
    Ok((status.code(), output.text() + &output.error_text()))
}

/// Waits for a first line that has these words.
fn await_line(node: &Node, code: i32, words: &[&str]) -> Result<String> {
    let deadline = Instant::now() + CHANGE;
    loop {
        let (found, text) = ccnode(node, &["status"])?;
        let line = text.lines().next().unwrap_or_default();
        if found == code && words.iter().all(|word| line.contains(word)) {
            return Ok(text);
        }
        ensure!(Instant::now() < deadline, "{words:?} and {code} are not said, but {found}:\n{text}\n{}", node.logs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn resets(node: &Node) -> Result<Vec<u64>> {
    node.gpus().iter().map(|name| Ok(node.device(name)?.flrs)).collect()
}

#[test]
fn the_first_line_is_true_at_every_turn_and_cleanup_leaves_nothing() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off"), (PAUSED, "true")])? else { return Ok(()) };
    await_line(&node, 1, &["NOT READY: cc-manager has told nothing of this node, and does not run here; do: start"])?;
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    let before = await_line(&node, 0, &["READY ", ": mode off, 2 GPUs verified"])?;
    ensure!(before.lines().count() == 4, "no note and no error is told of a node that is well:\n{before}");

    // One GPU is held: the line names holder and cure, and the node stays what it is.
    let bdf = node.guest.bdf("gpu1")?;
    let hold = format!(
        "exec 3<>/dev/vfio/$(basename $(readlink /sys/bus/pci/devices/{bdf}/iommu_group)) && echo held && sleep 1000"
    );
    node.start_agent(&["sh", "-c", &hold], &[])?;
    node.agent("sh")?.process.wait_output(STEP, |text| text.contains("held"))?;
    let count = resets(&node)?;
    node.ask_for("on")?;
    let pid = node.agent("sh")?.process.pid().to_string();
    let told =
        await_line(&node, 1, &["NOT READY ", &bdf, " held by pid ", &pid, "; do: stop what process ", "mode on"])?;
    let row = told.lines().find(|line| line.starts_with(&bdf)).context("no row")?;
    ensure!(row.contains(&format!("pid {pid} (")) && row.contains("InUse"), "{told}");
    ensure!(resets(&node)? == count, "looking resets nothing");

    // In the middle of the change.
    node.guest.fleet().set_fault("gpu0", Fault::BootSlow(3000))?;
    node.stop_agent("sh", Signal::SIGKILL)?;
    await_line(&node, 1, &["CHANGING ", ": to mode on"])?;
    await_line(&node, 0, &["READY ", ": mode on, 2 GPUs verified"])?;
    let told: Value = {
        let (code, text) = ccnode(&node, &["status", "--json"])?;
        ensure!(code == 0, "{text}");
        serde_json::from_str(&text)?
    };
    for device in told["devices"].as_array().context("no devices")? {
        let is = |field: &str, value: &str| device[field] == value;
        ensure!(is("active", "on") && is("configured", "on") && device["offered"] == true, "{device}");
    }

    // Killed in the middle of the next one, and taken away.
    node.ask_for("off")?;
    await_line(&node, 1, &["CHANGING ", ": to mode off"])?;
    node.stop_agent("cc-manager", Signal::SIGKILL)?;
    await_line(
        &node,
        1,
        &["NOT READY ", "a change to mode off was cut short, and cc-manager does not run here; do: start"],
    )?;
    ensure!(node.api.labels(NODE)[PAUSED] == "paused-for-cc-mode-change", "{:?}", node.api.labels(NODE));
    let (code, text) = ccnode(&node, &["cleanup", "--yes"])?;
    ensure!(code == 2 && text.contains("vfio-manager"), "not while an agent runs: {text}");
    node.stop_agent("vfio-manager", Signal::SIGTERM)?;
    let count = resets(&node)?;
    let (code, text) = ccnode(&node, &["cleanup", "--yes"])?;
    ensure!(code == 0 && text.contains("bindings.json is kept"), "{text}");
    let (labels, annotations) = (node.api.labels(NODE), node.api.annotations(NODE));
    let label = |name: &str| labels.get(name).map(String::as_str);
    assert_eq!((label(PAUSED), label(CC_MODE)), (Some("true"), Some("off")));
    assert_eq!((label(CC_READY_STATE), label(CC_MODE_STATE)), (Some(""), None));
    ensure!(annotations.keys().all(|name| !name.starts_with("ccnode.dev/")), "{annotations:?}");
    let left = node.look(&["sh", "-c", "ls -A /run/nvidia/ccnode /run/nvidia/validations"])?.text();
    ensure!(!left.contains("devices.json") && !left.contains(".jsonl") && !left.contains("ctr-ready"), "{left}");
    assert_eq!(resets(&node)?, count, "no device was reset");
    bound_to_vfio(&node)?;
    let (code, text) = ccnode(&node, &["cleanup", "--yes"])?;
    ensure!(code == 0 && text.contains("Nothing to clean up"), "{text}");

    // Installed anew it finds a node that nothing is known of, and brings it to what the label says.
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    await_line(&node, 0, &["READY ", ": mode off, 2 GPUs verified"]).map(|_| ())
}
