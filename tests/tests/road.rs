//! The whole road with the three agents: label, registers, bindings, kubelet and CDI file after each change.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use e2e::rendered::{Container, Rendering};
use e2e::{
    CHANGE, PGPU, STEP, bound_to_vfio, gpu_bdfs, node, registers_say, the_cdi_file_is, the_labels_never_lied,
    whole_trace,
};
use lab::Node;
use lab::node::{CC_MODE, CC_READY_STATE, NODE};

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

/// What a container runtime does with a container of the chart, as far as the guest can: a root of its own, read-only but for
/// the mounts of its manifest, and `/dev` with the host's devices for a privileged one alone. One that drops all capabilities is
/// root in a user namespace of its own, and has no network: it has no capability over the machine at all.
fn in_its_container(name: &str, container: &Container) -> Result<Vec<String>> {
    let root = format!("/run/pods/{name}");
    let mut steps = vec![
        format!(
            "set -e; r={root}; mkdir -p $r; mount -t tmpfs -o mode=755 none $r; mkdir -p $r/usr/bin $r/proc $r/dev"
        ),
        "mount --bind /usr/bin $r/usr/bin; ln -s usr/bin $r/bin; mount --rbind /proc $r/proc".to_owned(),
    ];
    let is_privileged = container.manifest["securityContext"]["privileged"] == true;
    steps.push(if is_privileged {
        "mount --rbind /dev $r/dev".to_owned()
    } else {
        "for d in null zero urandom; do touch $r/dev/$d; mount --bind /dev/$d $r/dev/$d; done".to_owned()
    });
    for mount in container.manifest["volumeMounts"].as_array().context("no mounts")? {
        let mut volumes = container.pod["volumes"].as_array().into_iter().flatten();
        let volume = volumes.find(|volume| volume["name"] == mount["name"]).context("a mount without volume")?;
        let place = mount["mountPath"].as_str().context("no path")?;
        steps.push(match volume["hostPath"]["path"].as_str() {
            Some(host) => format!("mkdir -p {host} $r{place}; mount --rbind {host} $r{place}"),
            None => format!("mkdir -p $r{place}; mount -t tmpfs none $r{place}"),
        });
        if mount["readOnly"] == true {
            steps.push(format!("mount -o remount,bind,ro $r{place}"));
        }
    }
    if container.pod["automountServiceAccountToken"] == true {
        let place = "/var/run/secrets/kubernetes.io/serviceaccount";
        steps.push(format!("mkdir -p $r{place}; mount --bind {place} $r{place}"));
    }
    let argv = container.argv.join(" ");
    steps.push(format!("mount -o remount,ro $r; ! touch $r/x 2>/dev/null; exec chroot $r {argv}"));
    let script = steps.join("; ");
    let around: &[&str] = if is_privileged { &["unshare", "-m"] } else { &["unshare", "-n", "unshare", "-r", "-m"] };
    Ok(around.iter().copied().chain(["sh", "-c", &script]).map(ToOwned::to_owned).collect())
}

#[test]
fn off_on_off_with_the_agents_as_the_chart_starts_them() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    let rendering = Rendering::read("rendered/default.yaml")?;
    // Modules are loaded with capabilities, which these have none of.
    node.look(&["modprobe", "vfio-pci"])?;
    node.start_kubelet()?;
    for name in ["vfio-manager", "cc-manager", "device-plugin"] {
        let container = rendering.container(name)?;
        let argv = in_its_container(name, &container)?;
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let env: Vec<(&str, &str)> = container.env.iter().map(|(name, value)| (&**name, &**value)).collect();
        // The scenario asks for one mode after the other.
        let quick = [("CCNODE_HOLD_DOWN", "1ms"), ("CCNODE_RELEASE_POLL", "1s"), ("POLL_INTERVAL", "1s")];
        node.start_agent(&argv, &[env, quick.to_vec()].concat())?;
    }
    arrives(&node, "off", "false").with_context(|| node.logs())?;
    for (mode, ready) in [("on", "true"), ("off", "false")] {
        node.ask_for(mode)?;
        arrives(&node, mode, ready).with_context(|| format!("on the way to {mode}\n{}", node.logs()))?;
    }
    the_labels_never_lied(&node)?;
    the_gate_closed_first(&node)?;
    assert!(node.guest.get_file("/run/nvidia/validations/.cc-manager-ctr-ready").is_err(), "nobody waits for it here");
    assert!(node.agents().iter().all(lab::node::Agent::is_running), "{}", node.logs());
    Ok(())
}
