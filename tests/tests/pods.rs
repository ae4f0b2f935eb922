//! Pods of the chart: what they need of a node, and what they leave on it when they go.

use anyhow::{Context, Result, ensure};
use e2e::containers::{self, Account, Running};
use e2e::rendered::{Container, Rendering};
use e2e::{CHANGE, STEP, await_that, cc_status, lab_is_here, registers_say, touched};
use lab::Node;
use lab::node::{CC_MODE, CC_MODE_STATE, CC_READY_STATE, NODE};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Nobody waits longer than the node takes.
const QUICK: [&str; 4] = ["CCNODE_HOLD_DOWN=1ms", "CCNODE_RETRY_MIN=500ms", "CCNODE_RETRY_MAX=1s", "POLL_INTERVAL=1s"];

fn lab_with_containers() -> Result<Option<Node>> {
    if !lab_is_here()? {
        return Ok(None);
    }
    let mut boot = lab::Boot::new("h100x2")?;
    containers::install(&mut boot)?;
    Node::start(boot, &[(CC_MODE, "off")]).map(Some)
}

fn account_of(node: &Node, rendering: &Rendering, container: &Container) -> Result<Option<Account>> {
    let has_token = container.pod["automountServiceAccountToken"] == true;
    let name = container.pod["serviceAccountName"].as_str().context("no service account")?;
    has_token.then(|| Account::of(node, rendering, name)).transpose()
}

fn start(node: &mut Node, rendering: &Rendering, container: &Container, name: &str) -> Result<Running> {
    let account = account_of(node, rendering, container)?;
    let mut config = containers::config(node, container, account.as_ref())?;
    let env = config["process"]["env"].as_array_mut().context("no environment")?;
    env.extend(QUICK.map(Value::from));
    Running::start(node, name, container, &config)
}

/// Waits for the container's end: its exit code and what it said.
fn ended(node: &Node, running: &Running) -> Result<(i32, String)> {
    let agent = node.agent(&running.path())?;
    let code = agent.process.wait(CHANGE).with_context(|| node.logs())?.code();
    let lines: Vec<String> = agent.log().into_iter().map(|(_, line)| line).collect();
    Ok((code, lines.join("\n")))
}

/// Files of ours on the node, but for the locks.
fn files(node: &Node) -> Result<Vec<String>> {
    let script = "find /run/nvidia/ccnode /var/lib/kubelet/device-plugins/ccnode /run/cdi -type f ! -path '*/locks/*'";
    Ok(node.look(&["sh", "-c", script])?.text().lines().map(str::to_owned).collect())
}

#[test]
fn what_the_chart_runs_when_it_goes_cleans_up_the_node_and_sees_that_all_are_clean() -> Result<()> {
    let Some(mut node) = lab_with_containers()? else { return Ok(()) };
    let rendering = Rendering::read("rendered/default.yaml")?;
    node.start_kubelet()?;
    let mut agents = Vec::new();
    for name in ["vfio-manager", "cc-manager", "device-plugin"] {
        let container = rendering.container(name)?;
        agents.push(start(&mut node, &rendering, &container, name)?);
    }
    node.await_state("off", "false", CHANGE)?;
    node.await_allocatable(e2e::PGPU, 2, STEP)?;
    let left = files(&node)?;
    for name in ["devices.json", "bindings.json", "units.json", "nvidia.com-pgpu.yaml"] {
        ensure!(left.iter().any(|path| path.ends_with(name)), "no {name} in {left:?}");
    }
    let before = touched(&node)?;

    // helm test
    let test = rendering.container_of("Pod", "ccnode-test", "status")?;
    let test = start(&mut node, &rendering, &test, "test")?;
    let (code, said) = ended(&node, &test)?;
    ensure!(code == 0 && said.starts_with("READY"), "{code}: {said}");

    // The agents' pods end while those of the hook have begun.
    let container = rendering.container_of("DaemonSet", "ccnode-cleanup", "cleanup")?;
    let cleanup = start(&mut node, &rendering, &container, "cleanup")?;
    let waiting = rendering.container_of("Job", "ccnode-cleanup-wait", "wait")?;
    let wait = start(&mut node, &rendering, &waiting, "wait")?;
    for running in &agents {
        ensure!(!cc_status(&node).is_null(), "cleaned up beside an agent\n{}", node.logs());
        ensure!(node.agent(&cleanup.path())?.is_running() && node.agent(&wait.path())?.is_running(), "{}", node.logs());
        node.stop_agent(&running.path(), Signal::SIGTERM)?;
    }
    let (code, said) = ended(&node, &cleanup)?;
    // It tells on two streams, whose lines come in any order.
    ensure!(code == 0 && said.lines().any(|line| line == "Cleaned up"), "{code}: {said}");
    let (code, said) = ended(&node, &wait)?;
    ensure!(code == 0 && said == "Every node is cleaned up", "{code}: {said}");
    let annotations = node.api.annotations(NODE);
    ensure!(!annotations.keys().any(|key| key.starts_with("ccnode.dev/")), "{annotations:?}");
    let labels = node.api.labels(NODE);
    ensure!(labels.get(CC_MODE).is_some_and(|mode| mode == "off"), "what a person asked for stays: {labels:?}");
    ensure!(labels.get(CC_READY_STATE).is_some_and(String::is_empty), "{labels:?}");
    ensure!(!labels.contains_key(CC_MODE_STATE), "{labels:?}");
    // Who had a device before is known for as long as it is on VFIO.
    ensure!(files(&node)? == ["/run/nvidia/ccnode/bindings.json"], "{:?}", files(&node)?);
    ensure!(touched(&node)? == before, "a device was touched");

    // What the pod goes on with, and the hook once more, on a node that is clean.
    let stays = rendering.container_of("DaemonSet", "ccnode-cleanup", "stay")?;
    let stay = start(&mut node, &rendering, &stays, "stay")?;
    await_that("it says what it sees", &node, || Ok(!node.agent(&stay.path())?.log().is_empty()))?;
    let again = start(&mut node, &rendering, &container, "again")?;
    let (code, said) = ended(&node, &again)?;
    ensure!(code == 0 && said.lines().any(|line| line == "Nothing to clean up"), "{code}: {said}");
    ensure!(node.agent(&stay.path())?.is_running(), "{}", node.logs());
    Ok(())
}

#[test]
fn what_the_chart_runs_to_observe_tells_what_would_be_done_and_changes_nothing() -> Result<()> {
    let Some(mut node) = lab_with_containers()? else { return Ok(()) };
    let rendering = Rendering::read("rendered/observe.yaml")?;
    node.ask_for("on")?;
    node.start_kubelet()?;
    let bindings = |node: &Node| -> Result<String> {
        let script =
            "cd /sys/bus/pci/devices; for d in *; do echo $d $(readlink $d/driver) $(cat $d/driver_override); done";
        Ok(node.look(&["sh", "-c", script])?.text())
    };
    let (before, labels, bound) = (touched(&node)?, node.api.labels(NODE), bindings(&node)?);
    let mut agents = Vec::new();
    for name in ["vfio-manager", "cc-manager", "device-plugin"] {
        let container = rendering.container(name)?;
        agents.push((start(&mut node, &rendering, &container, name)?, container));
    }
    let gpus = e2e::gpu_bdfs(&node)?;
    let vfio_manager = agents[0].0.path();
    await_that("vfio-manager tells what it would bind", &node, || {
        let told = node.agent(&vfio_manager)?.events("device_observed");
        let told = told.iter().filter_map(|(_, line)| lab::node::field(line, "device").map(str::to_owned));
        Ok(told.collect::<std::collections::BTreeSet<String>>() == gpus)
    })?;
    await_that("cc-manager tells what it would do", &node, || Ok(cc_status(&node).to_string().contains("Observed")))?;
    let units = "/var/lib/kubelet/device-plugins/ccnode/units.json";
    await_that("device-plugin tells what it would offer", &node, || Ok(node.guest.get_file(units).is_ok()))?;
    for (running, container) in &agents {
        await_that("the kubelet's probes are content", &node, || {
            Ok(["startupProbe", "livenessProbe", "readinessProbe"]
                .iter()
                .all(|probe| running.probe(&node, container, probe).is_ok()))
        })?;
        node.stop_agent(&running.path(), Signal::SIGTERM)?;
    }
    // They have ended: whatever they would have done is done.
    ensure!(touched(&node)? == before, "a device was touched");
    ensure!(node.api.labels(NODE) == labels, "{:?}", node.api.labels(NODE));
    ensure!(bindings(&node)? == bound, "{}", bindings(&node)?);
    let annotations = node.api.annotations(NODE);
    let ours: Vec<&String> = annotations.keys().filter(|key| key.starts_with("ccnode.dev/")).collect();
    ensure!(ours == ["ccnode.dev/cc-status"], "{ours:?}");
    let dump = node.kubelet()?;
    ensure!(dump["resources"].as_object().is_none_or(serde_json::Map::is_empty), "{dump:#}");
    let written = node.look(&[
        "sh",
        "-c",
        "find /run/nvidia/ccnode /var/run/cdi /var/lib/kubelet/device-plugins/ccnode -type f",
    ])?;
    ensure!(written.text().trim() == units, "{}", written.text());
    Ok(())
}

/// Takes from what a runtime is told everything that a privileged container has more than others, but for its device nodes.
fn unprivileged(privileged: &Value, container: &Container, capabilities: &[&str]) -> Result<Value> {
    let mut config = privileged.clone();
    let mut manifest = container.clone();
    manifest.manifest["securityContext"] = json!({
        "capabilities": {"drop": ["ALL"], "add": capabilities}, "seccompProfile": {"type": "RuntimeDefault"},
        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
    });
    let (held, filter) = containers::confinement(&manifest.manifest["securityContext"])?;
    config["process"]["capabilities"] = json!({"bounding": held, "effective": held, "permitted": held});
    config["process"]["noNewPrivileges"] = true.into();
    config["linux"]["seccomp"] = filter;
    config["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
    Ok(config)
}

#[test]
fn it_is_the_device_rules_of_a_container_that_cc_manager_is_privileged_for() -> Result<()> {
    let Some(mut node) = lab_with_containers()? else { return Ok(()) };
    let rendering = Rendering::read("rendered/default.yaml")?;
    node.start_vfio_manager()?;
    e2e::bound_in_time(&node)?;
    let container = rendering.container("cc-manager")?;
    let account = account_of(&node, &rendering, &container)?;
    let mut privileged = containers::config(&node, &container, account.as_ref())?;
    let env = privileged["process"]["env"].as_array_mut().context("no environment")?;
    env.extend(QUICK.map(Value::from));

    // Every capability, no filter of system calls, every device node of the host: all that a manifest can ask for beside.
    let mut config = privileged.clone();
    config["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
    let before = touched(&node)?;
    let refused = Running::start(&mut node, "refused", &container, &config)?;
    await_that("the refusal is told", &node, || Ok(cc_status(&node).to_string().contains("PermissionDenied")))?;
    ensure!(node.api.labels(NODE).get(CC_MODE_STATE).is_none_or(|state| state != "off"), "{:?}", node.api.labels(NODE));
    ensure!(touched(&node)? == before, "a device was touched");
    node.stop_agent(&refused.path(), Signal::SIGTERM)?;

    // With the devices' rule, which no manifest can ask for, it needs one capability of all, for the whole of configuration space.
    for (name, capabilities) in [("ruled", &[][..]), ("capable", &["SYS_ADMIN"])] {
        let mut config = unprivileged(&privileged, &container, capabilities)?;
        let devices = privileged["linux"]["devices"].as_array().into_iter().flatten();
        let of_vfio =
            devices.filter(|device| device["path"].as_str().is_some_and(|path| path.starts_with("/dev/vfio/")));
        let rules = of_vfio.map(|device| {
            json!({"allow": true, "type": "c", "major": device["major"], "minor": device["minor"], "access": "rw"})
        });
        let rules: Vec<Value> = std::iter::once(json!({"allow": false, "access": "rwm"})).chain(rules).collect();
        ensure!(rules.len() > 2, "no device of VFIO's: {rules:?}");
        config["linux"]["resources"]["devices"] = rules.into();
        let running = Running::start(&mut node, name, &container, &config)?;
        if capabilities.is_empty() {
            await_that("its refusal is told", &node, || {
                let status = cc_status(&node).to_string();
                Ok(status.contains("PermissionDenied") && status.contains("/config"))
            })?;
        } else {
            node.await_state("off", "false", CHANGE)?;
            node.ask_for("on")?;
            node.await_state("on", "true", CHANGE)?;
            registers_say(&node, "on")?;
        }
        node.stop_agent(&running.path(), Signal::SIGTERM)?;
    }
    Ok(())
}
