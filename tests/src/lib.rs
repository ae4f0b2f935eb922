//! End-to-end scenarios, by behaviour, run inside the lab.
//!
//! Each test boots a node of its own: a real kernel in QEMU, virtual GPUs that speak the firmware protocol, and stand-ins of
//! API server and kubelet. They are skipped, with a message, where kernel and QEMU have not been prepared or
//! `CCNODE_LAB=off`; with `CCNODE_LAB=require` that is a failure instead.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::node::{CC_MODE_STATE, CC_READY_STATE, NODE};
use lab::{Boot, Node};
use lab_devices::{Kind, TraceEvent, trace};
use lab_vm::{Artifacts, Cache, Wanted};
use serde_json::Value;

/// Time for a change of modes of all GPUs, on a busy machine.
pub const CHANGE: Duration = Duration::from_mins(1);

/// Time for a single step.
pub const STEP: Duration = Duration::from_secs(30);

/// The resource of all GPUs.
pub const PGPU: &str = "nvidia.com/pgpu";

/// Whether scenarios run here; says why not.
pub fn lab_is_here() -> Result<bool> {
    let setting = env::var("CCNODE_LAB").unwrap_or_default();
    if setting == "off" {
        eprintln!("skipped: CCNODE_LAB=off");
        return Ok(false);
    }
    let here = Artifacts::present(&Cache::from_env()?, &Wanted::everything()).is_some();
    match (here, setting.as_str()) {
        (true, _) => Ok(true),
        (false, "require") => bail!("Kernel and QEMU of the lab are not prepared; run: cargo lab prepare"),
        (false, _) => {
            eprintln!("skipped: kernel and QEMU of the lab are not prepared; run: cargo lab prepare");
            Ok(false)
        }
    }
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

/// The bits of a GPU's status register that say its mode: CC, devtools, PPCIe (gpu-cc-protocol section 3).
pub const MODE_BITS: u32 = 0x23;

/// What a GH100 is when it is in a mode: the status register, and the knobs 45, 10, 8 and 6 (gpu-cc-protocol section 6.1).
///
/// An error for what is no mode: a node that says `failed` may not pass for one that is off.
pub fn expected(mode: &str) -> Result<(u32, [(u16, u16); 4])> {
    Ok(match mode {
        "on" => (0x01, [(45, 0), (10, 2), (8, 1), (6, 0)]),
        "devtools" => (0x03, [(45, 0), (10, 0), (8, 1), (6, 1)]),
        "off" => (0x00, [(45, 0), (10, 0), (8, 0), (6, 0)]),
        other => bail!("{other:?} is no mode that a GPU can be in"),
    })
}

/// Every virtual GPU has booted in `mode`, its knobs say so too, and nobody spoke to it against the protocol.
pub fn registers_say(node: &Node, mode: &str) -> Result<()> {
    let (word, knobs) = expected(mode)?;
    for name in node.gpus() {
        let status = node.device(&name)?;
        ensure!(
            status.status_word & MODE_BITS == word,
            "{name}: status register {:#x}, wanted {word:#x}",
            status.status_word
        );
        for (knob, value) in knobs {
            ensure!(
                status.knobs.get(&knob) == Some(&value),
                "{name}: knob {knob} is {:?}, wanted {value}",
                status.knobs.get(&knob)
            );
        }
        ensure!(status.stray_count == 0, "{name}: accesses to registers that are none: {:x?}", status.stray);
        ensure!(status.host_error_count == 0, "{name}: breaches of the protocol: {:?}", status.host_errors);
    }
    Ok(())
}

/// Every access to every virtual device since the trace was last cleared; an error if some were not kept.
pub fn whole_trace(node: &Node) -> Result<Vec<TraceEvent>> {
    ensure!(!node.guest.fleet().trace_overflowed(), "the trace is not whole");
    Ok(node.trace())
}

/// At no moment did the node object promise what a device did not keep: whenever the ready state was `"true"` or
/// `"false"`, every GPU had last booted in the mode that the state label named. Needs the trace of the whole run.
pub fn the_labels_never_lied(node: &Node) -> Result<()> {
    let (now, trace_now, trace) = (Instant::now(), node.guest.fleet().micros(), whole_trace(node)?);
    let mut looked_at = 0;
    for entry in node.api.history(NODE) {
        let label = |key: &str| entry.labels.get(key).map(String::as_str).unwrap_or_default();
        if label(CC_READY_STATE).is_empty() {
            continue;
        }
        let age = u64::try_from(now.saturating_duration_since(entry.at).as_micros())?;
        let at = trace_now.saturating_sub(age);
        for name in node.gpus() {
            let booted = trace
                .iter()
                .rfind(|event| event.kind == Kind::Ready && *event.device == name[..] && event.micros <= at);
            let word = booted.with_context(|| format!("{name} has never booted"))?.value;
            let wanted = expected(label(CC_MODE_STATE)).with_context(|| format!("{:?}", entry.labels))?.0;
            ensure!(
                word & u64::from(MODE_BITS) == u64::from(wanted),
                "{:?} while {name} runs with {word:#x}",
                entry.labels
            );
            looked_at += 1;
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
