//! The whole road with the three agents: label, registers, bindings, kubelet and CDI file after each change.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use e2e::containers::{self, Account, Running};
use e2e::rendered::{Container, Rendering};
use e2e::{
    CHANGE, PGPU, STEP, bound_to_vfio, gpu_bdfs, lab_is_here, node, registers_say, the_cdi_file_is,
    the_labels_never_lied, whole_trace,
};
use lab::Node;
use lab::node::{CC_MODE, CC_READY_STATE, NODE};
use nix::sys::signal::Signal;

/// A pod that asks for all GPUs gets them, and Kata would plug in exactly those.
fn a_pod_gets_all_gpus(node: &Node, name: &str) -> Result<()> {
    let bdfs = gpu_bdfs(node)?;
    node.create_pod(name, PGPU, bdfs.len())?;
    node.await_pod(name, "Running", STEP)?;
    let resolved = node.look_json(&["lab-kubelet", "resolve", &format!("default/{name}")])?;
    let devices = resolved["devices"].as_array().context("no devices")?;
    let plugged: BTreeSet<String> =
        devices.iter().filter_map(|device| device["bdfs"][0].as_str().map(ToOwned::to_owned)).collect();
    ensure!(plugged == bdfs, "Kata would plug {plugged:?}, not {bdfs:?}");
    for device in devices {
        let node = device["nodes"][0].as_str().unwrap_or_default();
        ensure!(node.starts_with("/dev/vfio/devices/vfio"), "{device}");
    }
    node.api.delete("pods", "default", name, Some(0))?;
    Ok(())
}

/// The CDI file that the plugin wrote names every GPU with the VFIO device that the kernel made of it.
fn the_cdi_file_is_right(node: &Node) -> Result<()> {
    the_cdi_file_is(node, |bdf| {
        let cdev = node.look(&["ls", &format!("/sys/bus/pci/devices/{bdf}/vfio-dev")])?.text();
        Ok(vec![format!("/dev/vfio/devices/{}", cdev.trim())])
    })
}

/// What the kubelet was told: every GPU by its address, healthy, and with nothing else beside them.
fn the_kubelet_knows_all_gpus(node: &Node) -> Result<()> {
    let dump = node.kubelet()?;
    let devices = dump["resources"][PGPU]["devices"].as_array().context("the kubelet knows no such resource")?;
    let ids: BTreeSet<String> =
        devices.iter().filter_map(|device| device["id"].as_str().map(ToOwned::to_owned)).collect();
    ensure!(ids == gpu_bdfs(node)?, "{dump:#}");
    ensure!(devices.iter().all(|device| device["health"] == "Healthy"), "{dump:#}");
    Ok(())
}

fn arrives(node: &Node, mode: &str, ready: &str) -> Result<()> {
    node.await_state(mode, ready, CHANGE)?;
    registers_say(node, mode)?;
    bound_to_vfio(node)?;
    node.await_allocatable(PGPU, node.gpus().len(), STEP)?;
    the_kubelet_knows_all_gpus(node)?;
    the_cdi_file_is_right(node)?;
    a_pod_gets_all_gpus(node, &format!("pod-{mode}-{}", node.api.resource_version()))
}

/// After each request for another mode the gate is closed before the first knob is written.
fn the_gate_closed_first(node: &Node) -> Result<()> {
    let (history, trace) = (node.api.history(NODE), whole_trace(node)?);
    let (now, trace_now) = (std::time::Instant::now(), node.guest.fleet().micros());
    let writes: Vec<u64> = node
        .gpus()
        .iter()
        .flat_map(|name| lab_devices::trace::rpcs(&trace, name))
        .filter(|rpc| rpc.request.get(2).is_some_and(|word| word & 0xff == 0x0d))
        .map(|rpc| rpc.micros)
        .collect();
    ensure!(!writes.is_empty(), "no knob was ever written");
    for write in writes {
        let age = std::time::Duration::from_micros(trace_now.saturating_sub(write));
        let last = history.iter().rfind(|entry| now.saturating_duration_since(entry.at) > age);
        let ready = last.and_then(|entry| entry.labels.get(CC_READY_STATE));
        ensure!(ready.is_some_and(String::is_empty), "a knob was written while {CC_READY_STATE} was {ready:?}");
    }
    Ok(())
}

#[test]
fn off_on_devtools_off() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_all()?;
    arrives(&node, "off", "false")?;
    let resets =
        |node: &Node| -> Result<Vec<u64>> { node.gpus().iter().map(|name| Ok(node.device(name)?.flrs)).collect() };
    let before = resets(&node)?;
    for (mode, ready) in [("on", "true"), ("devtools", ""), ("off", "false")] {
        node.ask_for(mode)?;
        arrives(&node, mode, ready).with_context(|| format!("on the way to {mode}\n{}", node.logs()))?;
    }
    let after = resets(&node)?;
    let counts: Vec<u64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    assert_eq!(counts, [3, 3], "one reset a device and change, and no other");
    the_labels_never_lied(&node)?;
    the_gate_closed_first(&node)?;
    assert!(node.guest.get_file("/run/nvidia/validations/.cc-manager-ctr-ready").is_ok());
    assert!(node.agents().iter().all(lab::node::Agent::is_running), "{}", node.logs());
    Ok(())
}

/// The scenario asks for one mode after the other.
const QUICK: [(&str, &str); 3] = [("CCNODE_HOLD_DOWN", "1ms"), ("CCNODE_RELEASE_POLL", "1s"), ("POLL_INTERVAL", "1s")];

/// Starts an agent as the chart does; what is quicker here than on a node is told in the same place.
fn start_of_the_chart(node: &mut Node, rendering: &Rendering, name: &str) -> Result<(Container, Running)> {
    let container = rendering.container(name)?;
    let has_token = container.pod["automountServiceAccountToken"] == true;
    let account = has_token.then(|| Account::of(node, rendering, &format!("ccnode-{name}"))).transpose()?;
    let mut config = containers::config(node, &container, account.as_ref())?;
    let env = config["process"]["env"].as_array_mut().context("no environment")?;
    env.extend(QUICK.map(|(name, value)| format!("{name}={value}").into()));
    let running = Running::start(node, name, &container, &config)?;
    Ok((container, running))
}

/// The agents have what their manifests give them, and no more.
fn they_are_confined(node: &Node, agents: &[(Container, Running)]) -> Result<()> {
    for (container, running) in agents {
        let name = &container.manifest["name"];
        let field = |field: &str| running.status(node, field);
        let held = u64::from_str_radix(&field("CapEff")?, 16)?;
        ensure!(u64::from_str_radix(&field("CapBnd")?, 16)? == held, "{name} could have more");
        // SYS_MODULE is 16, SYS_CHROOT 18.
        let wanted = match name.as_str() {
            Some("device-plugin") => Some(0),
            Some("vfio-manager") => Some(1 << 16 | 1 << 18),
            _ => None,
        };
        let is_privileged = wanted.is_none();
        ensure!(wanted.is_none_or(|wanted| held == wanted), "{name} has {held:x}");
        ensure!(!is_privileged || held & 1 << 21 != 0, "{name} has {held:x}");
        ensure!(field("Seccomp")? == if is_privileged { "0" } else { "2" }, "{name}: {}", field("Seccomp")?);
        ensure!(field("NoNewPrivs")? == if is_privileged { "0" } else { "1" }, "{name}: {}", field("NoNewPrivs")?);
        let root = format!("/proc/{}/root", running.pid(node)?);
        let is_refused = |path: &str| node.guest.shell(&format!("! touch {root}{path} 2>/dev/null"), STEP);
        for path in ["/x", "/usr/bin/x", "/etc/x"] {
            ensure!(is_refused(path)?.success(), "{name} can write {path}");
        }
        for mount in container.manifest["volumeMounts"].as_array().into_iter().flatten() {
            let place = mount["mountPath"].as_str().context("no place")?;
            let lines = String::from_utf8(node.guest.get_file(&format!("/proc/{}/mountinfo", running.pid(node)?))?)?;
            let line = lines.lines().rfind(|line| line.split(' ').nth(4) == Some(place));
            let line = line.with_context(|| format!("{name} has no {place}: {lines}"))?;
            let is_read_only =
                line.split(' ').nth(5).is_some_and(|options| options.split(',').any(|word| word == "ro"));
            ensure!(is_read_only == (mount["readOnly"] == true), "{name}: {line}");
        }
    }
    Ok(())
}

#[test]
fn off_on_off_with_the_agents_as_the_chart_starts_them() -> Result<()> {
    let Some(mut node) = lab_with_containers()? else { return Ok(()) };
    let rendering = Rendering::read("rendered/default.yaml")?;
    node.start_kubelet()?;
    let mut agents = Vec::new();
    // In any order: the first to come waits until vfio-manager has loaded VFIO's modules.
    for name in ["cc-manager", "device-plugin", "vfio-manager"] {
        agents.push(start_of_the_chart(&mut node, &rendering, name)?);
    }
    arrives(&node, "off", "false").with_context(|| node.logs())?;
    they_are_confined(&node, &agents)?;
    for (mode, ready) in [("on", "true"), ("off", "false")] {
        node.ask_for(mode)?;
        arrives(&node, mode, ready).with_context(|| format!("on the way to {mode}\n{}", node.logs()))?;
    }
    for (container, running) in &agents {
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            running.probe(&node, container, probe).with_context(|| node.logs())?;
        }
    }
    the_labels_never_lied(&node)?;
    the_gate_closed_first(&node)?;
    assert!(node.guest.get_file("/run/nvidia/validations/.cc-manager-ctr-ready").is_err(), "nobody waits for it here");
    assert!(node.agents().iter().all(lab::node::Agent::is_running), "{}", node.logs());
    // As a kubelet ends a pod.
    for (_, running) in &agents {
        node.stop_agent(&running.path(), Signal::SIGTERM)?;
    }
    Ok(())
}

/// A node whose container runtime starts what manifests say, with VFIO's modules not loaded yet.
fn lab_with_containers() -> Result<Option<Node>> {
    if !lab_is_here()? {
        return Ok(None);
    }
    let mut boot = lab::Boot::new("h100x2")?;
    boot.without_vfio_modules = true;
    containers::install(&mut boot)?;
    Node::start(boot, &[(CC_MODE, "off")]).map(Some)
}
