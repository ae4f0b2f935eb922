//! Agents on a node that is right: restarts and looks touch nothing, write nothing and cost little memory.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{
    CHANGE, PGPU, STEP, WITH_METRICS, await_rounds, await_that, cc_status, exchanges, hold_group, node, registers_say,
    release, the_labels_never_lied, touched, touches, whole_trace,
};
use lab::Node;
use lab::node::{CC_MODE, NODE};
use lab_devices::{Kind, Space, TraceEvent};
use nix::sys::signal::Signal;

const RESTARTS: usize = 50;
const ROUNDS: u64 = 1000;
const ATTEMPTS: u64 = 100;

/// No VFIO device was opened, and nobody came near a device.
///
/// Whoever opens a VFIO device resets it (virtual-gpu-rig section 6), so a trace without resets is one without opening.
fn nothing_is_touched(node: &Node, what: &str) -> Result<()> {
    let trace = whole_trace(node)?;
    let touches = touches(&trace);
    ensure!(touches.is_empty(), "{what}: {touches:?}\n{}", node.logs());
    Ok(())
}

/// The files of VFIO that a process has open.
fn vfio_files(node: &Node) -> Result<String> {
    let pid = node.agent("cc-manager")?.process.pid();
    let links = node.guest.shell(&format!("ls -l /proc/{pid}/fd"), STEP)?.text();
    Ok(links.lines().filter(|line| line.contains("vfio")).collect())
}

/// Fifty restarts, and a thousand looks at what is there, one every few milliseconds.
fn restarts_and_looks(node: &mut Node, what: &str) -> Result<()> {
    let begun = Instant::now();
    let version = node.api.resource_version();
    node.api.clear_requests();
    node.guest.fleet().clear_trace();
    for restart in 0..RESTARTS {
        node.start_cc_manager()?;
        let attempted = node.agent("cc-manager")?.process.wait_output(STEP, |text| text.contains("readiness_file"));
        attempted.with_context(|| node.logs())?;
        let signal = if restart % 2 == 0 { Signal::SIGKILL } else { Signal::SIGTERM };
        node.stop_agent("cc-manager", signal)?;
    }
    nothing_is_touched(node, &format!("{RESTARTS} restarts, {what}"))?;
    println!("{what}: {RESTARTS} restarts in {:?}", begun.elapsed());
    let begun = Instant::now();
    node.start_agent(&["cc-manager"], &[("CCNODE_RESYNC", "1ms"), WITH_METRICS])?;
    node.agent("cc-manager")?.process.wait_output(STEP, |text| text.contains("readiness_file"))?;
    for _ in 0..4 {
        await_rounds(node, ROUNDS / 4)?;
        ensure!(vfio_files(node)?.is_empty(), "{what}: {}", vfio_files(node)?);
    }
    nothing_is_touched(node, &format!("{ROUNDS} looks, {what}"))?;
    println!("{what}: {ROUNDS} looks in {:?}", begun.elapsed());
    assert_eq!(node.api.resource_version(), version, "{what}: the node object was written\n{}", node.logs());
    assert_eq!(node.api.count("patch", "nodes"), 0, "{what}: a patch was sent in vain");
    node.stop_agent("cc-manager", Signal::SIGTERM)
}

/// The accesses to a GPU's registers, without the firmware's mailbox, and its exchanges with the firmware.
fn one_look(trace: &[TraceEvent], name: &str) -> Result<()> {
    let said = exchanges(trace, name);
    ensure!(!said.is_empty() && said.iter().all(|word| word.contains("020C->")), "{name}: {said:?}");
    let distinct: BTreeSet<&String> = said.iter().collect();
    ensure!(distinct.len() == said.len(), "{name} was asked twice: {said:?}");
    let own = || trace.iter().filter(|event| *event.device == *name);
    ensure!(own().any(|event| event.space == Space::Bar0 && event.kind == Kind::Read), "{name} was not read");
    ensure!(!own().any(|event| matches!(event.kind, Kind::Flr | Kind::BusReset | Kind::PowerOn)), "{name} was reset");
    Ok(())
}

/// A node whose GPUs are on vfio-pci and have been verified once.
fn settled() -> Result<Option<Node>> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(None) };
    node.start_vfio_manager()?;
    node.agent("vfio-manager")?.process.wait_output(STEP, |text| text.matches("device_bound").count() == 2)?;
    node.guest.fleet().clear_trace();
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    node.stop_agent("cc-manager", Signal::SIGTERM)?;
    Ok(Some(node))
}

#[test]
fn a_node_at_rest_is_touched_once_a_boot_whatever_the_restarts_and_looks() -> Result<()> {
    let Some(mut node) = settled()? else { return Ok(()) };
    // The one verification of each device in this boot: owned, by the group's file and the registers, without opening it.
    let trace = whole_trace(&node)?;
    for name in node.gpus() {
        one_look(&trace, &name)?;
    }
    let before = touched(&node)?;
    restarts_and_looks(&mut node, "idle")?;
    assert_eq!(touched(&node)?, before);

    // Between two looks it sleeps: at most a bookmark of the API server's wakes it, once a minute.
    node.start_agent(&["cc-manager"], &[("CCNODE_RESYNC", "10m"), ("CCNODE_RELEASE_POLL", "1s")])?;
    node.agent("cc-manager")?.process.wait_output(STEP, |text| text.contains("readiness_file"))?;
    std::thread::sleep(Duration::from_secs(4));
    let woken = figure(&node, "cc-manager", "voluntary_ctxt_switches")?;
    std::thread::sleep(Duration::from_secs(10));
    let woken = figure(&node, "cc-manager", "voluntary_ctxt_switches")? - woken;
    println!("idle: woken {woken} times in 10 s");
    ensure!(woken <= 2, "woken {woken} times while nothing happened");
    registers_say(&node, "off")
}

#[test]
fn a_held_node_is_not_touched_whatever_the_restarts_looks_and_attempts() -> Result<()> {
    let Some(mut node) = settled()? else { return Ok(()) };
    let before = touched(&node)?;
    hold_group(&mut node, "gpu1")?;
    restarts_and_looks(&mut node, "held")?;

    // Attempts at what cannot be done: the holder is asked for, not the device.
    node.start_agent(&["cc-manager"], &[("CCNODE_RETRY_MIN", "1ms"), ("CCNODE_RETRY_MAX", "1ms"), WITH_METRICS])?;
    node.agent("cc-manager")?.process.wait_output(STEP, |text| text.contains("readiness_file"))?;
    node.ask_for("on")?;
    await_that("refused", &node, || Ok(cc_status(&node)["error"]["code"] == "InUse"))?;
    await_rounds(&node, 1)?;
    node.api.clear_requests();
    await_rounds(&node, ATTEMPTS)?;
    nothing_is_touched(&node, "refused")?;
    assert_eq!((touched(&node)?, node.api.count("patch", "nodes")), (before, 0), "{}", node.logs());
    registers_say(&node, "off")?;
    node.await_state("off", "false", STEP)?;
    release(&node)?;
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")
}

/// A figure of an agent's `/proc/PID/status`; sizes are in KiB.
fn figure(node: &Node, agent: &str, field: &str) -> Result<u64> {
    let pid = node.agent(agent)?.process.pid();
    let status = String::from_utf8(node.guest.get_file(&format!("/proc/{pid}/status"))?)?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let text = line.with_context(|| format!("no {field} in\n{status}"))?;
    text.trim().trim_end_matches(" kB").parse().context("no number")
}

/// The most that cc-manager may take after a change and some hundred looks, in KiB, in the build that scenarios use: half as
/// much again as was measured.
const MOST: [(&str, u64); 2] = [("RssAnon", 5376), ("VmRSS", 24576)];

#[test]
fn a_change_and_some_hundred_looks_leave_little_in_memory() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_agent(&["cc-manager"], &[("CCNODE_RESYNC", "10ms"), ("CCNODE_HOLD_DOWN", "1ms"), WITH_METRICS])?;
    node.await_state("off", "false", CHANGE)?;
    for (mode, ready) in [("on", "true"), ("off", "false"), ("on", "true")] {
        node.ask_for(mode)?;
        node.await_state(mode, ready, CHANGE)?;
    }
    await_rounds(&node, 200)?;
    // Threads that did the firmware's work end after a while.
    std::thread::sleep(Duration::from_secs(12));
    for (field, most) in MOST {
        let found = figure(&node, "cc-manager", field)?;
        println!("{field} {found} KiB");
        ensure!(found <= most, "{field} is {found} KiB, more than {most}");
    }
    // It does not grow with the looks.
    let before = figure(&node, "cc-manager", "RssAnon")?;
    await_rounds(&node, 200)?;
    let after = figure(&node, "cc-manager", "RssAnon")?;
    println!("RssAnon {after} KiB after 200 more looks");
    ensure!(after < before + 256, "{before} KiB became {after} KiB");
    registers_say(&node, "on")?;
    the_labels_never_lied(&node)?;
    assert_eq!(node.api.labels(NODE).get(CC_MODE).map(String::as_str), Some("on"));
    Ok(())
}

/// The same for vfio-manager, over a board of twelve devices.
const MOST_OF_VFIO_MANAGER: [(&str, u64); 2] = [("RssAnon", 3840), ("VmRSS", 17080)];

#[test]
fn vfio_manager_at_rest_keeps_little_in_memory_and_sleeps() -> Result<()> {
    let Some(mut node) = node("hgx-h100", &[])? else { return Ok(()) };
    let devices = node.gpus().len() + 4;
    let seconds = |node: &Node, command: &str| -> Result<f64> {
        let script = format!(
            "read a _ < /proc/uptime; {command} > /tmp/out 2>&1 || exit 1; read b _ < /proc/uptime; echo $a $b"
        );
        let text = node.look(&["sh", "-c", &script])?.text();
        let times: Vec<f64> = text.split_whitespace().flat_map(str::parse).collect();
        let [before, after] = times[..] else { anyhow::bail!("{text}") };
        Ok(after - before)
    };
    // Loads the driver, so that it does not count.
    node.look(&["modprobe", "vfio-pci"])?;
    let first = node.guest.bdf("gpu0")?;
    let look = seconds(&node, "vfio-manager plan")?;
    let one = seconds(&node, &format!("vfio-manage bind -d {first}"))?;
    node.look(&["vfio-manage", "unbind", "--all"])?;
    let all = seconds(&node, "vfio-manage bind --all --strict --bind-nvswitches")?;
    println!(
        "a look {look:.2} s; one device bound in {one:.2} s, {devices} in {all:.2} s, the look at the node included"
    );
    node.look(&["vfio-manage", "unbind", "--all", "--unbind-nvswitches"])?;

    let many = ["vfio-manager", "run", "--bind-nvswitches", "--poll-interval", "100ms"];
    node.start_agent(&many, &[WITH_METRICS])?;
    let bound = |text: &str| text.matches("device_bound").count() == devices;
    node.agent("vfio-manager")?.process.wait_output(STEP, bound).with_context(|| node.logs())?;
    std::thread::sleep(Duration::from_secs(20));
    let before = figure(&node, "vfio-manager", "RssAnon")?;
    std::thread::sleep(Duration::from_secs(20));
    let after = figure(&node, "vfio-manager", "RssAnon")?;
    println!("RssAnon {before} KiB, {after} KiB after 20 s more of looks");
    ensure!(after < before + 512, "{before} KiB became {after} KiB");
    node.stop_agent("vfio-manager", Signal::SIGTERM)?;

    node.start_agent(&["vfio-manager", "run", "--bind-nvswitches", "--poll-interval", "10m"], &[WITH_METRICS])?;
    let seen = |text: &str| text.matches("device_seen").count() == devices;
    node.agent("vfio-manager")?.process.wait_output(STEP, seen).with_context(|| node.logs())?;
    // The threads that did the look end after a while.
    std::thread::sleep(Duration::from_secs(12));
    for (field, most) in MOST_OF_VFIO_MANAGER {
        let found = figure(&node, "vfio-manager", field)?;
        println!("{field} {found} KiB");
        ensure!(found <= most, "{field} is {found} KiB, more than {most}");
    }
    node.guest.fleet().clear_trace();
    let woken = figure(&node, "vfio-manager", "voluntary_ctxt_switches")?;
    std::thread::sleep(Duration::from_secs(10));
    let woken = figure(&node, "vfio-manager", "voluntary_ctxt_switches")? - woken;
    println!("woken {woken} times in 10 s");
    ensure!(node.trace().is_empty(), "devices are read while nothing happens: {:?}", node.trace());
    Ok(())
}

/// The same for device-plugin, over two GPUs.
const MOST_OF_DEVICE_PLUGIN: [(&str, u64); 2] = [("RssAnon", 2432), ("VmRSS", 19840)];

#[test]
fn device_plugin_at_rest_looks_with_its_poll_and_sleeps_between() -> Result<()> {
    const REST: Duration = Duration::from_secs(20);
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.look(&["vfio-manager", "run", "--once"])?;
    node.start_kubelet()?;
    // One that does not come in this time, and its own (5 s): looks at the node. Between them it looks whether its socket is
    // still there, every 15 s.
    for (poll, looks) in [(Some("1h"), 0), (None, 5)] {
        let env: Vec<(&str, &str)> = poll.map(|poll| ("POLL_INTERVAL", poll)).into_iter().collect();
        node.start_agent(&["device-plugin"], &env)?;
        node.await_allocatable(PGPU, 2, STEP)?;
        // What the first look has set off comes to its end.
        std::thread::sleep(Duration::from_secs(4));
        // Whoever writes one makes a new one.
        let files = "ls -i /var/run/cdi/* /var/lib/kubelet/device-plugins/ccnode/*";
        let written = node.look(&["sh", "-c", files])?.text();
        node.guest.fleet().clear_trace();
        let woken = figure(&node, "device-plugin", "voluntary_ctxt_switches")?;
        std::thread::sleep(REST);
        let woken = figure(&node, "device-plugin", "voluntary_ctxt_switches")? - woken;
        let trace = whole_trace(&node)?;
        println!("poll {poll:?}: woken {woken} times in {REST:?}, {} accesses to devices", trace.len());
        ensure!(woken <= 4 + looks * 8, "woken {woken} times with poll {poll:?}");
        let is_look = |event: &TraceEvent| event.space == Space::Config && event.kind == Kind::Read;
        ensure!(trace.iter().all(is_look), "devices are touched: {trace:?}");
        ensure!(trace.is_empty() == (looks == 0), "it does not look, though its poll is due");
        ensure!(u64::try_from(trace.len())? <= looks * 20, "{} accesses in {looks} looks", trace.len());
        ensure!(node.look(&["sh", "-c", files])?.text() == written, "a file was written in vain");
        for (field, most) in MOST_OF_DEVICE_PLUGIN {
            let found = figure(&node, "device-plugin", field)?;
            println!("{field} {found} KiB");
            ensure!(found <= most, "{field} is {found} KiB, more than {most}");
        }
        node.stop_agent("device-plugin", Signal::SIGTERM)?;
    }
    Ok(())
}
