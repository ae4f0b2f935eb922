//! What a virtual machine does to a GPU that it holds, and what cc-manager makes of it: it waits, touches nothing, and finds
//! out when the GPU is let go.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::{
    CHANGE, STEP, await_event, await_registers, await_that, cc_status, events, hold_group, is_in, node, node_with,
    registers_say, release, the_labels_never_lied, touched,
};
use lab::node::{CC_MODE, CC_READY_STATE, NODE};
use lab::{Boot, Node};
use lab_devices::{BootState, ModelKind};
use lab_vm::{Add, Kernel};
use nix::sys::signal::Signal;

/// Writes a knob of a Hopper GPU over EMEM channel 2, as whoever owns the GPU can (gpu-cc-protocol section 6.4).
const WRITE_KNOB: &str = r"
dev=/sys/bus/pci/devices/BDF
echo on > $dev/power/control; sleep 0.1; printf '\006' | dd of=$dev/config bs=1 seek=4 count=1 conv=notrunc 2>/dev/null
bar=$(head -n1 $dev/resource | cut -d' ' -f1)
w() { devmem $((bar + $1)) 32 $2; }
w 0x8f2ad0 0x03000800
for word in 0xC0000000 0x1310DE7E KNOB020D VALUE; do w 0x8f2ad4 $word; done
w 0x8f2c14 0x80c; w 0x8f2c10 0x800
sleep 0.2; w 0x8f2c94 0x800
";

/// Writes a knob of a GPU from another process of the guest, while somebody holds it; and does more. The GPU stays awake, as
/// one that is open does, until [`let_sleep`].
fn tamper(node: &Node, name: &str, knob: u16, value: u16, more: &str) -> Result<()> {
    let bdf = node.guest.bdf(name)?;
    let script = WRITE_KNOB.replace("KNOB", &format!("0x{knob:04X}")).replace("VALUE", &value.to_string());
    let script = format!("{script}{more}").replace("BDF", &bdf);
    let output = node.guest.shell(&script, STEP)?;
    ensure!(output.success(), "{}{}", output.text(), output.error_text());
    let found = node.device(name)?.knobs.get(&knob).copied();
    ensure!(found == Some(value), "knob {knob} of {name} is {found:?}");
    Ok(())
}

/// The GPU is not open any more.
fn let_sleep(node: &Node, name: &str) -> Result<()> {
    let bdf = node.guest.bdf(name)?;
    node.look(&["sh", "-c", &format!("echo auto > /sys/bus/pci/devices/{bdf}/power/control")]).map(drop)
}

#[test]
fn a_change_that_waits_for_a_vm_undoes_what_the_vm_has_done() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "on")])? else { return Ok(()) };
    node.start_vfio_manager()?;
    let waits = [("CCNODE_ON_BUSY", "wait"), ("CCNODE_RETRY_MIN", "500ms"), ("CCNODE_RETRY_MAX", "2s")];
    node.start_agent(&["cc-manager"], &waits)?;
    node.await_state("on", "true", CHANGE)?;
    hold_group(&mut node, "gpu1")?;
    let before = touched(&node)?;
    node.ask_for("off")?;
    await_that("withdrawn", &node, || Ok(node.api.labels(NODE)[CC_READY_STATE].is_empty()))?;
    await_event(&node, "transition_started", 0)?;
    // The guest asks for developer's tools and resets its GPU, and so is in that mode.
    tamper(&node, "gpu1", 6, 1, "echo 1 > $dev/reset; sleep 1")?;
    let word = node.device("gpu1")?.status_word;
    ensure!(word & 0x3 == 0x3, "the guest is in {word:#x}");
    // Longer than the time between two looks at what is held.
    std::thread::sleep(Duration::from_secs(6));
    let [free, held] = touched(&node)?[..] else { bail!("not two GPUs") };
    assert_eq!(free, before[0], "the other one waits as well");
    assert_eq!(held, (before[1].0 + 1, before[1].1 + 1), "the guest's reset and request, and no other");
    is_in("gpu0", ModelKind::H100, &node.device("gpu0")?, "on")?;
    ensure!(node.api.labels(NODE)[CC_READY_STATE].is_empty(), "nothing is promised meanwhile");
    release(&node)?;
    let_sleep(&node, "gpu1")?;
    node.await_state("off", "false", CHANGE)?;
    registers_say(&node, "off")?;
    assert_eq!(touched(&node)?[0].0, free.0 + 1, "one reset");
    assert_eq!(touched(&node)?[1].0, held.0 + 1, "one reset");
    the_labels_never_lied(&node)
}

#[test]
fn a_knob_that_waits_for_its_reset_is_found_when_the_gpu_is_let_go() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    hold_group(&mut node, "gpu1")?;
    let before = touched(&node)?;
    tamper(&node, "gpu1", 8, 1, "")?;
    node.ask_for("on")?;
    await_that("refused", &node, || Ok(cc_status(&node)["error"]["code"] == "InUse"))?;
    let labels = node.api.labels(NODE);
    assert_eq!(labels[CC_READY_STATE], "false", "the node stays what it is");
    node.ask_for("off")?;
    await_that("back", &node, || Ok(cc_status(&node)["wanted"] == "off"))?;
    assert_eq!(touched(&node)?, [before[0], (before[1].0, before[1].1 + 1)], "nothing but the guest's request");
    let seen = events(&node, "drift")?;
    release(&node)?;
    let_sleep(&node, "gpu1")?;
    await_event(&node, "drift", seen)?;
    await_registers(&node, "off")?;
    node.await_state("off", "false", CHANGE)?;
    assert_eq!(touched(&node)?[0], before[0], "the other one is not touched");
    the_labels_never_lied(&node)
}

#[test]
fn a_gpu_let_go_by_its_character_device_is_found_in_what_its_last_reset_made_of_it() -> Result<()> {
    let with_own = |boot: &mut Boot| {
        boot.kernel = Some(Kernel::NoGroup);
        boot.adds.push(Add { host: env!("CARGO_BIN_EXE_lab-own").into(), guest: "/usr/bin/lab-own".into() });
    };
    let Some(mut node) = node_with("h100x2", &[(CC_MODE, "on")], with_own)? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("on", "true", CHANGE)?;
    let bdf = node.guest.bdf("gpu1")?;
    let before = touched(&node)?;
    let hold = format!("mkdir -m 755 /tmp/other; sleep 1000 | exec lab-own hold auto /tmp/other {bdf}");
    node.start_agent(&["sh", "-c", &hold], &[])?;
    node.agent("sh")?.process.wait_output(STEP, |text| text.contains("held")).with_context(|| node.logs())?;
    // Whoever opens a device that way resets it, and once more when it is closed: that is when the knob takes effect.
    let opened = touched(&node)?;
    ensure!(opened[1].0 > before[1].0, "{before:?} {opened:?}");
    // A request before it has booted would be one against the protocol.
    await_that("booted", &node, || Ok(node.device("gpu1")?.boot == BootState::Ready))?;
    tamper(&node, "gpu1", 8, 0, "")?;
    is_in("gpu0", ModelKind::H100, &node.device("gpu0")?, "on")?;
    node.ask_for("off")?;
    await_that("refused", &node, || Ok(cc_status(&node)["error"]["code"] == "InUse"))?;
    node.ask_for("on")?;
    await_that("back", &node, || Ok(cc_status(&node)["wanted"] == "on"))?;
    assert_eq!((touched(&node)?[0], touched(&node)?[1].0), (before[0], opened[1].0), "nothing is reset for a change");
    let seen = events(&node, "device_verified")?;
    node.stop_agent("sh", Signal::SIGKILL)?;
    let_sleep(&node, "gpu1")?;
    await_event(&node, "device_verified", seen)?;
    await_registers(&node, "on")?;
    node.await_state("on", "true", CHANGE)?;
    assert_eq!(touched(&node)?[0], before[0], "the other one is not touched");
    Ok(())
}
