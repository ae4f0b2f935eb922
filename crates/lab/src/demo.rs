//! The road, end to end, as a timeline that a person can follow.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab_devices::{Kind, TraceEvent};
use serde::Serialize;
use serde_json::{Value, json};

use crate::boot::Boot;
use crate::node::{Agent, CC_MODE, CC_MODE_STATE, CC_READY_STATE, NODE, Node, field};
use crate::timeline::Timeline;

/// What the pods ask for.
const RESOURCE: &str = "nvidia.com/pgpu";

/// The pod of the demo.
const POD: &str = "model";

/// Time that the whole change of modes may take.
const CHANGE: Duration = Duration::from_mins(1);

/// Time for a single step of the agents and the kubelet.
const STEP: Duration = Duration::from_secs(30);

/// Low bits of the status register of a GPU that runs with CC on (gpu-cc-protocol section 6.4, example 5).
const CC_ON: u32 = 0x01;

/// The bits of the status register that say the mode: CC, devtools, PPCIe.
const MODE_BITS: u32 = 0x23;

/// The exact state of a device.
#[derive(Serialize)]
struct State {
    name: String,
    bdf: String,
    mode: &'static str,
    register: String,
    knobs: String,
    resets: u64,
}

/// Boots the node, walks the road and prints the timeline. Succeeds only if the pod got one of the GPUs and the registers of
/// every device say that CC is on.
pub fn run(topology: &str, as_json: bool) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let mut node = Node::start(Boot::new(topology)?, &[(CC_MODE, "off")])?;
    let mut timeline = Timeline::default();
    let outcome = road(&mut node, &mut timeline);
    observed(&node, &mut timeline);
    let devices: Vec<State> = node.gpus().iter().map(|name| state(&node, name)).collect::<Result<_, _>>()?;
    if as_json {
        println!("{}", serde_json::to_string_pretty(&json!({"timeline": timeline.moments(), "devices": devices}))?);
    } else {
        println!("The road, on {topology} (kernel {}; seconds since its boot began):\n", node.guest.kernel_release());
        print!("{}", timeline.render());
        println!("\nAt the end:");
        for State { name, bdf, mode, register, knobs, resets } in &devices {
            println!("  {name}  {bdf}  mode {mode} (register {register})  knobs {knobs}  {resets} resets");
        }
    }
    let plugged = outcome.map_err(|error| error.context(node.logs()))?;
    ensure!(
        devices.iter().any(|device| device.bdf == plugged),
        "The pod would get {plugged}, which is none of the GPUs"
    );
    for State { name, mode, register, .. } in &devices {
        ensure!(*mode == "on", "{name}: The status register is {register}: CC is not on");
    }
    if !as_json {
        println!("Done in {:.1} s.", began.elapsed().as_secs_f64());
    }
    Ok(ExitCode::SUCCESS)
}

/// The road itself, with the moments that nobody logs; the address of the device that Kata would plug in.
fn road(node: &mut Node, timeline: &mut Timeline) -> anyhow::Result<String> {
    node.start_all()?;
    node.await_state("off", "false", CHANGE)?;
    let count = node.gpus().len();
    node.await_allocatable(RESOURCE, count, STEP)?;
    node.ask_for("on")?;
    node.await_state("on", "true", CHANGE)?;
    node.await_allocatable(RESOURCE, count, STEP)?;
    timeline.add(node.started().elapsed(), "person", format!("creates pod {POD}: 1 of {RESOURCE}"));
    node.create_pod(POD, RESOURCE, 1)?;
    node.await_pod(POD, "Running", STEP)?;
    timeline.add(node.started().elapsed(), "kubelet", format!("pod {POD} is Running"));
    let resolved = node.look_json(&["lab-kubelet", "resolve", &format!("default/{POD}")])?;
    let told =
        |what: &str| resolved.pointer(what).and_then(Value::as_str).with_context(|| format!("No {what}: {resolved}"));
    let devices = resolved["devices"].as_array().map_or(0, Vec::len);
    ensure!(devices == 1, "The pod has {devices} devices: {resolved}");
    let (bdf, path, cdi) = (told("/devices/0/bdfs/0")?, told("/devices/0/nodes/0")?, told("/devices/0/cdi")?);
    let plugged = format!("resolves CDI device {cdi}: would plug {bdf} into the virtual machine by {path}");
    timeline.add(node.started().elapsed(), "kata", plugged);
    Ok(bdf.to_owned())
}

fn state(node: &Node, name: &str) -> anyhow::Result<State> {
    let status = node.device(name)?;
    let knobs: Vec<String> = [6, 8, 10, 45]
        .iter()
        .filter_map(|knob| status.knobs.get(knob).map(|value| format!("{knob}={value}")))
        .collect();
    let mode = match status.status_word & MODE_BITS {
        0 => "off",
        CC_ON => "on",
        3 => "devtools",
        0x20 => "ppcie",
        _ => "invalid",
    };
    Ok(State {
        name: name.to_owned(),
        bdf: node.guest.bdf(name)?,
        mode,
        register: format!("{:#04x}", status.status_word),
        knobs: knobs.join(" "),
        resets: status.flrs,
    })
}

/// Adds what happened as three others saw it: the node object, the agents' logs and the devices.
fn observed(node: &Node, timeline: &mut Timeline) {
    let started = node.started();
    let since = |at: Instant| at.saturating_duration_since(started);
    timeline.add(Duration::ZERO, "lab", "boots a node with virtual GPUs");
    labels(node, timeline, since);
    for agent in node.agents() {
        agent_moments(agent, timeline, since);
    }
    // The clock of the trace began with the fleet; both are read now to bring them together.
    let (trace_now, now) = (Duration::from_micros(node.guest.fleet().micros()), since(Instant::now()));
    let offset = now.saturating_sub(trace_now);
    let from = node.agents().first().map_or(Duration::ZERO, |agent| since(agent.started()));
    device_moments(&node.trace(), offset, from, timeline);
}

fn labels(node: &Node, timeline: &mut Timeline, since: impl Fn(Instant) -> Duration) {
    let mut before = std::collections::BTreeMap::new();
    for entry in node.api.history(NODE) {
        for key in [CC_MODE, CC_MODE_STATE, CC_READY_STATE] {
            let value = entry.labels.get(key);
            if value != before.get(key) {
                let actor = if key == CC_MODE { "person" } else { "node object" };
                let value = value.map_or_else(|| "none".to_owned(), |value| format!("{value:?}"));
                timeline.add(since(entry.at), actor, format!("{key} = {value}"));
            }
        }
        before = entry.labels;
    }
}

fn agent_moments(agent: &Agent, timeline: &mut Timeline, since: impl Fn(Instant) -> Duration) {
    for (at, line) in agent.log() {
        if let Some(text) = serde_json::from_str(&line).ok().and_then(|line| told(&line)) {
            timeline.add(since(at), &agent.name, text);
        }
    }
}

/// A log line as a step of the road; none for what is no step of it.
fn told(line: &Value) -> Option<String> {
    let get = |name| shown(line, name).unwrap_or_default();
    let (device, unit, resource) = (get("device"), get("unit"), get("resource"));
    Some(match field(line, "event")? {
        "label_seen" => format!("sees the label: {}", get("value")),
        "withdrawn" => "closes the node for GPU pods".to_owned(),
        "transition_started" => format!("begins the change to {} of {} devices", get("mode"), get("devices")),
        "device_owned" => format!("owns {device} by its VFIO group file"),
        "device_staged" => {
            format!("{device}: knobs staged and read back, {} written; runs with {}", get("writes"), get("booted_with"))
        }
        "device_reset" => format!("{device}: was reset"),
        "device_booted" => format!("{device}: has booted"),
        "device_verified" => format!("{device}: verified, register and knobs"),
        "device_failed" => format!("{device}: {}", get("message")),
        "published" => format!("published: state {}, ready {:?}", get("state"), get("ready")),
        "device_bound" => format!("{device}: bound to {}", get("driver")),
        "registered" => format!("registered {resource} with the kubelet, {} units", get("units")),
        "cdi_written" => format!("wrote {} for {}", get("path"), get("devices")),
        "unit_health" if get("healthy") == "true" => format!("offers {unit} as {resource} ({})", get("nodes")),
        "unit_health" => format!("withdraws {unit}: {}", get("code")),
        "allocated" => format!("Allocate: {} of {resource}", get("ids")),
        _ => return None,
    })
}

/// A field of a log line, whatever its type.
fn shown(line: &Value, name: &str) -> Option<String> {
    let value = line.get("fields").and_then(|fields| fields.get(name)).or_else(|| line.get(name))?;
    Some(value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned))
}

/// Knob writes, resets and boots, as the devices themselves saw them, from when the first agent was started.
fn device_moments(trace: &[TraceEvent], offset: Duration, from: Duration, timeline: &mut Timeline) {
    for event in trace {
        let at = Duration::from_micros(event.micros) + offset;
        if at < from {
            continue;
        }
        let what = match event.kind {
            Kind::Flr => "function-level reset".to_owned(),
            Kind::BusReset => "bus reset".to_owned(),
            Kind::Ready => format!("booted; status register {:#04x}", event.value),
            _ => continue,
        };
        timeline.add(at, event.device.to_string(), what);
    }
    for device in devices(trace) {
        for rpc in lab_devices::trace::rpcs(trace, &device) {
            let at = Duration::from_micros(rpc.micros) + offset;
            let [_, _, command, value] = rpc.request.as_slice() else { continue };
            if at >= from && command & 0xff == 0x0d {
                timeline.add(at, &device, format!("knob {} staged: {value}", command >> 16));
            }
        }
    }
}

fn devices(trace: &[TraceEvent]) -> std::collections::BTreeSet<String> {
    trace.iter().map(|event| event.device.to_string()).collect()
}
