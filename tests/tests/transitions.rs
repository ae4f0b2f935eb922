//! What cc-manager does around a change: the operator's components, and GPUs that come back from a user.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, STEP, await_that, cc_status, node, registers_say, touched};
use lab::Node;
use lab::node::{CC_MODE, CC_READY_STATE, NAMESPACE, NODE};
use nix::sys::signal::Signal;
use serde_json::json;

const PAUSED: &str = "paused-for-cc-mode-change";

/// The deploy labels of components that run on a node for Kata, with the label and name of their pods.
const COMPONENTS: [(&str, &str, &str); 3] = [
    ("nvidia.com/gpu.deploy.vfio-manager", "name", "nvidia-vfio-manager"),
    ("nvidia.com/gpu.deploy.sandbox-validator", "app", "nvidia-sandbox-validator"),
    ("nvidia.com/gpu.deploy.kata-sandbox-device-plugin", "app", "nvidia-kata-sandbox-device-plugin-daemonset"),
];

fn run_pod(node: &Node, key: &str, name: &str) -> Result<()> {
    let labels = json!({key: name});
    let pod = json!({
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "spec": {"nodeName": NODE, "containers": [{"name": "main", "image": "example/component"}]},
    });
    node.api.create("pods", pod).map(drop).with_context(|| format!("pod {name}"))
}

#[test]
fn components_are_paused_in_one_patch_and_awaited_before_a_gpu_is_touched() -> Result<()> {
    let mut labels = vec![(CC_MODE, "off")];
    labels.extend(COMPONENTS.iter().map(|(label, ..)| (*label, "true")));
    let Some(mut node) = node("h100x2", &labels)? else { return Ok(()) };
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    node.api.create("namespaces", json!({"metadata": {"name": NAMESPACE}}))?;
    for (_, key, name) in COMPONENTS {
        run_pod(&node, key, name)?;
    }
    let before = touched(&node)?;
    node.ask_for("on")?;
    // What a DaemonSet's controller does when its node selector does not match any more, slowly.
    for (label, _, name) in COMPONENTS {
        await_that(label, &node, || Ok(node.api.labels(NODE).get(label).is_some_and(|value| value == PAUSED)))?;
        ensure!(node.api.labels(NODE).get(CC_READY_STATE).is_some_and(String::is_empty), "the gate is shut");
        std::thread::sleep(Duration::from_millis(300));
        ensure!(touched(&node)? == before, "a GPU was touched while {name} was running\n{}", node.logs());
        node.api.delete("pods", NAMESPACE, name, Some(0))?;
    }
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")?;
    for (label, ..) in COMPONENTS {
        ensure!(node.api.labels(NODE).get(label).is_some_and(|value| value == "true"), "{label} runs again");
    }
    ensure!(!node.api.annotations(NODE).contains_key("ccnode.dev/transition"), "the journal is closed");

    // Killed while it waits, it goes on with what it had begun, or puts back what it had paused.
    let (label, key, name) = COMPONENTS[0];
    run_pod(&node, key, name)?;
    node.ask_for("off")?;
    await_that(label, &node, || Ok(node.api.labels(NODE).get(label).is_some_and(|value| value == PAUSED)))?;
    node.stop_agent("cc-manager", Signal::SIGKILL)?;
    node.ask_for("on")?;
    node.start_cc_manager()?;
    await_that("put back", &node, || Ok(node.api.labels(NODE).get(label).is_some_and(|value| value == "true")))?;
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")
}

/// Speaks with a Blackwell GPU's firmware as a guest does that owns it (gpu-cc-protocol section 4.9): clears CCM, and resets.
const TAMPER: &str = r"
exec 3<>/dev/vfio/$(basename $(readlink /sys/bus/pci/devices/BDF/iommu_group)) && echo held
dev=/sys/bus/pci/devices/BDF
echo on > $dev/power/control; sleep 0.1; printf '\006' | dd of=$dev/config bs=1 seek=4 count=1 conv=notrunc 2>/dev/null
bar=$(head -n1 $dev/resource | cut -d' ' -f1)
w() { devmem $((bar + $1)) 32 $(($2)); }
read go
w 0x8f1f84 $((0x100000 + 16)); for word in 0xC0000000 0x1310DE7E 0x0008020D 0; do w 0x8f1f88 $word; done
sleep 0.2; echo 1 > $dev/reset; sleep 0.5
echo tampered
read go
echo auto > $dev/power/control; exec 3>&-; echo released; sleep 1000
";

#[test]
fn a_gpu_that_its_user_has_changed_is_repaired_when_it_is_let_go() -> Result<()> {
    let Some(mut node) = node("rtx-pro-6000", &[(CC_MODE, "on")])? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("on", "true", CHANGE)?;
    let knob = |node: &Node, name: &str| -> Result<Option<u16>> { Ok(node.device(name)?.knobs.get(&8).copied()) };
    ensure!(knob(&node, "gpu0")? == Some(1) && knob(&node, "gpu1")? == Some(1), "both are on");
    let bdf = node.guest.bdf("gpu0")?;
    let other = node.device("gpu1")?.flrs;

    let fifo = "mkfifo /tmp/go; while true; do cat /tmp/go; done | ";
    let script = format!("{fifo}sh -c '{}'", TAMPER.replace("BDF", &bdf).replace('\'', "'\\''"));
    node.start_agent(&["sh", "-c", &script], &[])?;
    let holder = |node: &Node, text: &'static str| -> Result<()> {
        node.agent("sh")?
            .process
            .wait_output(STEP, |output| output.contains(text))
            .map(drop)
            .with_context(|| node.logs())
    };
    holder(&node, "held")?;
    // A change is refused while it is in use: nothing is withdrawn, and the holder is named.
    node.ask_for("off")?;
    await_that("refused", &node, || Ok(cc_status(&node)["error"]["code"] == "InUse"))?;
    let error = cc_status(&node)["error"]["message"].as_str().unwrap_or_default().to_owned();
    ensure!(error.contains(&bdf) && error.contains("pid"), "{error}");
    ensure!(node.api.labels(NODE).get(CC_READY_STATE).is_some_and(|ready| ready == "true"), "nothing is withdrawn");
    node.ask_for("on")?;
    await_that("well again", &node, || Ok(cc_status(&node)["result"] == "applied"))?;

    node.guest.shell("echo > /tmp/go", STEP)?;
    holder(&node, "tampered")?;
    ensure!(knob(&node, "gpu0")? == Some(0), "the guest has turned CC off");
    let flrs = node.device("gpu0")?.flrs;
    node.guest.shell("echo > /tmp/go", STEP)?;
    holder(&node, "released")?;
    await_that("repaired", &node, || Ok(knob(&node, "gpu0")? == Some(1) && node.device("gpu0")?.status_word & 3 == 1))?;
    node.await_state("on", "true", CHANGE)?;
    let log = node.logs();
    ensure!(log.contains(r#""event":"drift""#), "{log}");
    ensure!(
        node.device("gpu0")?.flrs == flrs + 1 && node.device("gpu1")?.flrs == other,
        "one reset, of that GPU alone"
    );
    Ok(())
}
