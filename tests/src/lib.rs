//! End-to-end scenarios, by behaviour, run inside the lab.
//!
//! Each test boots a node of its own: a real kernel in QEMU, virtual GPUs that speak the firmware protocol, and stand-ins of
//! API server and kubelet. They are skipped, with a message, where kernel and QEMU have not been prepared or
//! `CCNODE_LAB=off`; with `CCNODE_LAB=require` that is a failure instead.

#![forbid(unsafe_code)]

pub mod containers;
pub mod contract;
pub mod rendered;

use std::collections::BTreeSet;
use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::node::{CC_MODE_STATE, CC_READY_STATE, NODE};
use lab::{Boot, Node};
use lab_devices::{DeviceStatus, Kind, ModelKind, Space, TraceEvent, trace};
use lab_kube::api_server::HistoryEntry;
use lab_vm::{Artifacts, Cache, Wanted};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Time for a change of modes of all GPUs, on a busy machine.
pub const CHANGE: Duration = Duration::from_mins(1);

/// Time for a single step.
pub const STEP: Duration = Duration::from_secs(30);

/// The resource of all GPUs.
pub const PGPU: &str = "nvidia.com/pgpu";

/// Whether scenarios run here; says why not.
pub fn lab_is_here() -> Result<bool> {
    lab_has(&Wanted::everything())
}

/// The same where not all of it is needed.
pub fn lab_has(wanted: &Wanted) -> Result<bool> {
    let setting = env::var("CCNODE_LAB").unwrap_or_default();
    if setting == "off" {
        eprintln!("skipped: CCNODE_LAB=off");
        return Ok(false);
    }
    let here = Artifacts::present(&Cache::from_env()?, wanted).is_some();
    match (here, setting.as_str()) {
        (true, _) => Ok(true),
        (false, "require") => bail!("Kernel and QEMU of the lab are not prepared; run: cargo lab prepare"),
        (false, _) => {
            eprintln!("skipped: kernel and QEMU of the lab are not prepared; run: cargo lab prepare");
            Ok(false)
        }
    }
}

/// Whatever lets cc-manager tell its metrics to [`metric`].
pub const WITH_METRICS: (&str, &str) = ("HEALTH_ADDR", "127.0.0.1:9400");

/// The value of one of cc-manager's metrics that has no labels.
pub fn metric(node: &Node, name: &str) -> Result<u64> {
    let text = node.look(&["wget", "-q", "-O", "-", "http://127.0.0.1:9400/metrics"])?.text();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.with_context(|| format!("there is no metric {name} in\n{text}"))?.parse().context("it is no number")
}

/// Waits until cc-manager has looked at the node so many more times.
pub fn await_rounds(node: &Node, rounds: u64) -> Result<()> {
    const ROUNDS: &str = "ccnode_cc_rounds_total";
    let (before, deadline) = (metric(node, ROUNDS)?, Instant::now() + CHANGE);
    while metric(node, ROUNDS)? < before + rounds {
        ensure!(Instant::now() < deadline, "{} of {rounds} rounds\n{}", metric(node, ROUNDS)? - before, node.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Waits until the running cc-manager has logged this event more than `seen` times.
pub fn await_event(node: &Node, event: &str, seen: usize) -> Result<()> {
    let deadline = Instant::now() + CHANGE;
    while node.agent("cc-manager")?.events(event).len() <= seen {
        ensure!(Instant::now() < deadline, "no event {event}\n{}", node.logs());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// How often the running cc-manager has logged this event.
pub fn events(node: &Node, event: &str) -> Result<usize> {
    Ok(node.agent("cc-manager")?.events(event).len())
}

/// Starts a process that holds a device's VFIO group, as a virtual machine does. [`release`] ends it.
pub fn hold_group(node: &mut Node, name: &str) -> Result<()> {
    let bdf = node.guest.bdf(name)?;
    let link = format!("/sys/bus/pci/devices/{bdf}/iommu_group");
    let hold = format!("exec 3<>/dev/vfio/$(basename $(readlink {link})) && echo held && exec sleep 1000");
    node.start_agent(&["sh", "-c", &hold], &[])?;
    node.agent("sh")?.process.wait_output(STEP, |text| text.contains("held")).with_context(|| node.logs())
}

/// Ends the process that holds a device.
pub fn release(node: &Node) -> Result<()> {
    node.stop_agent("sh", Signal::SIGKILL)
}

/// How often each device was reset, in whatever way, and how many requests its firmware took.
pub fn touched(node: &Node) -> Result<Vec<(u64, u64)>> {
    let counts = |name: &str| node.device(name).map(|device| (device.flrs + device.bus_resets, device.rpcs));
    devices(node).into_iter().map(|(name, _)| counts(name)).collect()
}

/// What stands in the annotation `ccnode.dev/cc-status`; null if nothing does.
pub fn cc_status(node: &Node) -> Value {
    let text = node.api.annotations(NODE).remove("ccnode.dev/cc-status").unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// Waits until `done`; `what` says for what.
pub fn await_that(what: &str, node: &Node, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + CHANGE;
    while !done()? {
        ensure!(Instant::now() < deadline, "not in time: {what}; {:?}\n{}", node.api.labels(NODE), node.logs());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Waits until the devices are in a mode, as [`registers_say`]; what keeps them from it, if they do not get there.
pub fn await_registers(node: &Node, mode: &str) -> Result<()> {
    let deadline = Instant::now() + CHANGE;
    while let Err(error) = registers_say(node, mode) {
        if Instant::now() >= deadline {
            return Err(error.context(format!("not in time in mode {mode}; {}", node.logs())));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Boots a node of this topology, with these labels; none where scenarios do not run.
pub fn node(topology: &str, labels: &[(&str, &str)]) -> Result<Option<Node>> {
    node_with(topology, labels, |_| {})
}

/// The same for a guest that is not quite as its topology says.
pub fn node_with(topology: &str, labels: &[(&str, &str)], change: impl FnOnce(&mut Boot)) -> Result<Option<Node>> {
    if !lab_is_here()? {
        return Ok(None);
    }
    let mut boot = Boot::new(topology)?;
    change(&mut boot);
    Node::start(boot, labels).map(Some)
}

/// The status register's bits of a mode, and the knobs that it fixes.
pub type Vector = (u32, &'static [(u16, u16)]);

/// What a device of this model is in a mode of its own (gpu-cc-protocol sections 3 and 6.1).
pub fn vector(model: ModelKind, own: &str) -> Option<Vector> {
    use ModelKind::{B200, Gb200, H100, H200, Ls10, RtxPro6000};
    Some(match (model, own) {
        (H100 | H200 | Ls10, "off") => (0x00, &[(45, 0), (10, 0), (8, 0), (6, 0)]),
        (H100 | H200, "on") => (0x01, &[(45, 0), (10, 2), (8, 1), (6, 0), (2, 0), (4, 0), (34, 0)]),
        (H100 | H200, "devtools") => (0x03, &[(45, 0), (10, 0), (8, 1), (6, 1), (2, 0), (4, 0), (34, 0)]),
        (H100 | H200, "ppcie") => (0x20, &[(45, 1), (10, 2), (8, 0), (6, 0), (2, 0), (4, 0), (34, 0)]),
        (Ls10, "ppcie") => (0x01, &[(45, 1), (10, 0), (8, 0), (6, 0), (2, 0), (4, 0), (34, 0)]),
        (B200 | Gb200 | RtxPro6000, "off") => (0x00, &[(8, 0), (6, 0)]),
        (B200 | Gb200 | RtxPro6000, "on") => (0x01, &[(8, 1), (6, 0)]),
        (B200 | Gb200 | RtxPro6000, "devtools") => (0x03, &[(8, 1), (6, 1)]),
        _ => return None,
    })
}

/// The bits of a device's status register that say its mode.
pub fn mode_bits(model: ModelKind) -> u32 {
    match model {
        ModelKind::H100 | ModelKind::H200 => 0x23,
        ModelKind::Ls10 => 0x01,
        _ => 0x03,
    }
}

/// A device's own mode in the node's: switches have protected PCIe alone.
pub fn own_mode(model: ModelKind, mode: &str) -> &str {
    if model.is_switch() && mode != "ppcie" { "off" } else { mode }
}

/// The device booted in this mode of its own, and its knobs say so too.
///
/// An error for what is no mode: a node that says `failed` may not pass for one that is off.
pub fn is_in(name: &str, model: ModelKind, status: &DeviceStatus, own: &str) -> Result<()> {
    let (bits, knobs) = vector(model, own).with_context(|| format!("{name} has no mode {own:?}"))?;
    ensure!(
        status.status_word & mode_bits(model) == bits,
        "{name}: status register {:#x}, wanted {bits:#x}",
        status.status_word
    );
    for (knob, value) in knobs {
        // A knob that the firmware does not know is off.
        let found = status.knobs.get(knob).copied().unwrap_or(0);
        ensure!(found == *value, "{name}: knob {knob} is {found}, wanted {value}");
    }
    Ok(())
}

/// Nobody spoke to the device against the protocol.
pub fn is_untroubled(name: &str, status: &DeviceStatus) -> Result<()> {
    ensure!(status.stray_count == 0, "{name}: accesses to registers that are none: {:x?}", status.stray);
    ensure!(status.host_error_count == 0, "{name}: breaches of the protocol: {:?}", status.host_errors);
    Ok(())
}

/// The GPUs and NVSwitches of the node's topology that are plugged in, with their models.
pub fn devices(node: &Node) -> Vec<(&str, ModelKind)> {
    let specs = node.guest.topology().devices.iter().map(|device| &device.spec);
    let parts = specs.filter(|spec| spec.model.is_gpu() || spec.model.is_switch());
    parts.map(|spec| (&*spec.name, spec.model)).filter(|(name, _)| node.guest.bdf(name).is_ok()).collect()
}

/// Whether a device of this model has no mode, and so is off for ever.
fn is_always_off(model: ModelKind) -> bool {
    matches!(model, ModelKind::A100 | ModelKind::Lr10)
}

/// Every virtual GPU and NVSwitch has booted in its own mode in the node's `mode`, its knobs say so too, and nobody spoke to
/// it against the protocol.
pub fn registers_say(node: &Node, mode: &str) -> Result<()> {
    for (name, model) in devices(node) {
        let (status, own) = (node.device(name)?, own_mode(model, mode));
        if !(is_always_off(model) && own == "off") {
            is_in(name, model, &status, own)?;
        }
        is_untroubled(name, &status)?;
    }
    Ok(())
}

/// What the guest's processes did to the registers of devices, or to devices as a whole.
pub fn touches(events: &[TraceEvent]) -> Vec<&TraceEvent> {
    let touches = |event: &&TraceEvent| {
        event.space == Space::Bar0 || matches!(event.kind, Kind::Flr | Kind::BusReset | Kind::Rpc | Kind::PowerOn)
    };
    events.iter().filter(touches).collect()
}

/// Every access to every virtual device since the trace was last cleared; an error if some were not kept.
pub fn whole_trace(node: &Node) -> Result<Vec<TraceEvent>> {
    ensure!(!node.guest.fleet().trace_overflowed(), "the trace is not whole");
    Ok(node.trace())
}

/// At no moment did the node object promise what a device did not keep: as long as the ready state was `"true"` or
/// `"false"`, every GPU and NVSwitch had last booted in its own mode in the one that the state label named, and booted in no
/// other. Needs the trace of the whole run.
pub fn the_labels_never_lied(node: &Node) -> Result<()> {
    let (now, trace_now, trace) = (Instant::now(), node.guest.fleet().micros(), whole_trace(node)?);
    let (history, devices) = (node.api.history(NODE), devices(node));
    let boots: Vec<&TraceEvent> = trace.iter().filter(|event| event.kind == Kind::Ready).collect();
    let moment = |entry: &HistoryEntry| -> Result<u64> {
        let age = u64::try_from(now.saturating_duration_since(entry.at).as_micros())?;
        Ok(trace_now.saturating_sub(age))
    };
    let mut looked_at = 0;
    for (index, entry) in history.iter().enumerate() {
        let label = |key: &str| entry.labels.get(key).map(String::as_str).unwrap_or_default();
        if label(CC_READY_STATE).is_empty() || entry.deleted {
            continue;
        }
        let since = moment(entry)?;
        let until = history.get(index + 1).map(moment).transpose()?.unwrap_or(trace_now);
        for &(name, model) in &devices {
            let own = own_mode(model, label(CC_MODE_STATE));
            if is_always_off(model) && own == "off" {
                continue;
            }
            let (bits, _) = vector(model, own).with_context(|| format!("{name}: {:?}", entry.labels))?;
            let boots = || boots.iter().filter(|event| *event.device == *name);
            let latched = boots().rfind(|event| event.micros <= since);
            let latched = latched.with_context(|| format!("{name} has never booted"))?;
            let later = boots().filter(|event| since < event.micros && event.micros <= until);
            for boot in std::iter::once(latched).chain(later) {
                ensure!(
                    boot.value & u64::from(mode_bits(model)) == u64::from(bits),
                    "{:?} while {name} runs with {:#x}",
                    entry.labels,
                    boot.value
                );
                looked_at += 1;
            }
        }
    }
    ensure!(looked_at > 0, "the node was never ready");
    Ok(())
}

/// The CDI file of the GPUs is, to the letter, the one of operator-contract section 7.7: every GPU, by its address, with
/// the device nodes that `nodes` names.
pub fn the_cdi_file_is(node: &Node, nodes: impl Fn(&str) -> Result<Vec<String>>) -> Result<()> {
    let device = |bdf: &String| -> Result<String> {
        let nodes: Vec<String> = nodes(bdf)?.iter().map(|path| format!("            - path: {path}\n")).collect();
        let nodes = nodes.concat();
        Ok(format!("    - name: \"{bdf}\"\n      containerEdits:\n        deviceNodes:\n{nodes}"))
    };
    let devices: String = gpu_bdfs(node)?.iter().map(device).collect::<Result<_>>()?;
    let wanted = format!("---\ncdiVersion: 0.5.0\nkind: {PGPU}\ndevices:\n{devices}");
    let text = String::from_utf8(node.guest.get_file("/var/run/cdi/nvidia.com-pgpu.yaml")?)?;
    ensure!(text == wanted, "the CDI file is\n{text}\nand not\n{wanted}");
    Ok(())
}

/// The PCI addresses of the virtual GPUs.
pub fn gpu_bdfs(node: &Node) -> Result<BTreeSet<String>> {
    node.gpus().iter().map(|name| Ok(node.guest.bdf(name)?)).collect()
}

/// Every GPU is bound to vfio-pci, as `ccnode probe` sees it.
pub fn bound_to_vfio(node: &Node) -> Result<()> {
    let probe = node.look_json(&["ccnode", "probe", "--json"])?;
    let devices = probe["devices"].as_array().context("probe tells no devices")?;
    let gpus: Vec<&Value> = devices.iter().filter(|device| device["kind"] == "gpu").collect();
    ensure!(gpus.len() == node.gpus().len(), "probe sees {} GPUs", gpus.len());
    for gpu in gpus {
        ensure!(gpu["driver"] == "vfio-pci", "{} is on {}", gpu["bdf"], gpu["driver"]);
    }
    Ok(())
}

/// Waits until every GPU is bound to vfio-pci.
pub fn bound_in_time(node: &Node) -> Result<()> {
    await_that("every GPU is bound", node, || Ok(bound_to_vfio(node).is_ok()))
}

/// The exchanges with the firmware of one device among these events, in the notation of gpu-cc-protocol section 6.4.
pub fn exchanges(events: &[TraceEvent], device: &str) -> Vec<String> {
    trace::rpcs(events, device).iter().map(ToString::to_string).collect()
}

/// The events of a device up to its first reset, and those after it.
pub fn around_reset(events: &[TraceEvent], device: &str) -> Result<(Vec<TraceEvent>, Vec<TraceEvent>)> {
    let own: Vec<TraceEvent> = events.iter().filter(|event| &*event.device == device).cloned().collect();
    let reset =
        own.iter().position(|event| event.kind == Kind::Flr).with_context(|| format!("{device} was not reset"))?;
    let (before, after) = own.split_at(reset);
    Ok((before.to_vec(), after.to_vec()))
}
