//! What `ccnode doctor` says of nodes under a real kernel, and that looking touches nothing.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, PGPU, STEP, node};
use lab::Node;
use lab::node::CC_MODE;
use lab_devices::{Fault, Kind, Space};
use lab_vm::Command;
use nix::sys::signal::Signal;
use serde_json::Value;

/// Everything that is not `ok`, as `id: result`, and the whole answer.
fn doctor(node: &Node) -> Result<(BTreeSet<String>, Value)> {
    let output = node.guest.run(&["ccnode", "doctor", "--json"], STEP)?;
    let answer: Value = serde_json::from_slice(&output.stdout).context("doctor printed no JSON")?;
    let failed = answer["summary"]["failed"].as_u64().context("no summary")?;
    let code = lab_vm::exit_code(output.status.context("doctor did not end")?);
    ensure!(code == u8::from(failed > 0), "exit code {code} with {failed} failed checks");
    let checks = answer["checks"].as_array().context("no checks")?;
    let mut told = BTreeSet::new();
    for check in checks {
        let (id, result) = (check["id"].as_str().context("no id")?, check["result"].as_str().context("no result")?);
        if matches!(result, "failed" | "warning") {
            ensure!(check["cure"].as_str().is_some_and(|cure| !cure.is_empty()), "{id} has no cure");
            told.insert(format!("{id}: {result}"));
        }
    }
    Ok((told, answer))
}

fn set(lines: &[&str]) -> BTreeSet<String> {
    lines.iter().map(|line| (*line).to_owned()).collect()
}

/// The evidence of a check, as one text.
fn evidence(answer: &Value, id: &str) -> String {
    let checks = answer["checks"].as_array().into_iter().flatten();
    let lines = checks.filter(|check| check["id"] == id).filter_map(|check| check["evidence"].as_array()).flatten();
    lines.filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

/// What the lab's guest lacks when nothing runs on it.
const BARE: [&str; 6] = [
    "tee: failed",
    "gpu-driver: warning",
    "kubelet-socket: failed",
    "pod-resources-socket: failed",
    "cdi-directory: failed",
    "kata-runtime: warning",
];

/// Since the trace was cleared, no device was reset or moved, no BAR read and nothing written.
fn nothing_was_touched(node: &Node) -> Result<()> {
    for event in node.trace() {
        let harmless = event.kind == Kind::Read && event.space == Space::Config;
        ensure!(harmless, "{} saw {:?} at {:?} {:#x}", event.device, event.kind, event.space, event.offset);
    }
    Ok(())
}

#[test]
fn a_bare_node_is_told_what_it_lacks_and_nothing_is_touched() -> Result<()> {
    let Some(node) = node("h100x2", &[])? else { return Ok(()) };
    node.guest.fleet().clear_trace();
    let (told, answer) = doctor(&node)?;
    assert_eq!(told, set(&BARE), "{answer:#}");
    assert!(evidence(&answer, "lockdown").starts_with("None"), "{answer:#}");
    node.look(&["ccnode", "probe"])?;
    node.look(&["ccnode", "probe", "--yaml"])?;
    node.look(&["ccnode", "probe", "--nfd"])?;
    let features = node.guest.get_file("/etc/kubernetes/node-feature-discovery/features.d/ccnode")?;
    let features = String::from_utf8(features)?;
    assert!(
        features.contains("ccnode.dev/gpu.count=2\nccnode.dev/nvswitch.count=0\nccnode.dev/gpu.product=H100-SXM\n")
    );
    // Without a lockdown file the kernel itself is asked, which touches no register either.
    node.look(&["sh", "-c", "umount /sys/kernel/security"])?;
    let (told, answer) = doctor(&node)?;
    assert_eq!(told, set(&BARE), "{answer:#}");
    assert!(evidence(&answer, "lockdown").contains("a BAR may be mapped"), "{answer:#}");
    ensure!(node.trace().iter().any(|event| event.space == Space::Config), "the trace saw nothing at all");
    nothing_was_touched(&node)?;

    let bdf = node.guest.bdf("gpu0")?;
    node.guest.fleet().set_fault("gpu0", "off-bus:both".parse::<Fault>()?)?;
    let (told, answer) = doctor(&node)?;
    let expected = [&BARE[..], &["gpu-bus: failed"]].concat();
    assert_eq!(told, set(&expected), "{answer:#}");
    assert_eq!(
        evidence(&answer, "gpu-bus"),
        format!(
            "{bdf}: Configuration space reads all ones: the device is off the bus; what else is shown is the kernel's memory of it"
        )
    );
    node.guest.fleet().clear_faults("gpu0")?;
    let bdf = node.guest.bdf("gpu1")?;
    node.guest.fleet().set_fault("gpu1", "security-fault:0x40000000".parse::<Fault>()?)?;
    let (told, answer) = doctor(&node)?;
    let expected = [&BARE[..], &["gpu-security-fault: failed"]].concat();
    assert_eq!(told, set(&expected), "{answer:#}");
    let words = evidence(&answer, "gpu-security-fault");
    assert!(words.starts_with(&bdf) && words.contains("0x40000000"), "{words}");
    nothing_was_touched(&node)
}

#[test]
fn devices_that_sleep_on_vfio_are_looked_at_without_being_woken() -> Result<()> {
    let Some(node) = node("h100x2", &[])? else { return Ok(()) };
    node.look(&["vfio-manage", "bind", "--all"])?;
    let devices = || -> Result<Vec<Value>> {
        let probe = node.look_json(&["ccnode", "probe", "--json"])?;
        Ok(probe["devices"].as_array().context("probe tells no devices")?.clone())
    };
    let asleep =
        |device: &Value| device["power"]["runtime_status"] == "suspended" && device["power"]["state"] == "D3hot";
    let deadline = Instant::now() + STEP;
    while !devices()?.iter().all(asleep) {
        ensure!(Instant::now() < deadline, "{:#?}", devices()?);
        std::thread::sleep(Duration::from_millis(100));
    }
    // A virtual machine begins by holding the group.
    let group = devices()?[0]["iommu_group"].as_u64().context("no group")?;
    let script = format!("exec 3<>/dev/vfio/{group}; while :; do sleep 1 3>&-; done");
    let holder = node.guest.spawn(Command::new(["sh", "-c", &script]))?;
    let pid = holder.pid();
    let line = format!("/dev/vfio/{group} is held by sh (pid {pid})");
    let deadline = Instant::now() + STEP;
    while evidence(&doctor(&node)?.1, "holders") != line {
        ensure!(Instant::now() < deadline, "{}", evidence(&doctor(&node)?.1, "holders"));
        std::thread::sleep(Duration::from_millis(100));
    }

    node.guest.fleet().clear_trace();
    let (told, answer) = doctor(&node)?;
    let expected: Vec<&str> = BARE.into_iter().filter(|line| *line != "gpu-driver: warning").collect();
    assert_eq!(told, set(&expected), "{answer:#}");
    for more in ["--json", "--yaml", "--nfd"] {
        node.look(&["ccnode", "probe", more])?;
    }
    ensure!(node.trace().iter().any(|event| event.space == Space::Config), "the trace saw nothing at all");
    nothing_was_touched(&node)?;
    ensure!(devices()?.iter().all(asleep), "{:#?}", devices()?);
    holder.signal(Signal::SIGKILL)?;
    Ok(())
}

#[test]
fn a_node_with_its_agents_lacks_only_what_the_lab_cannot_have() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_all()?;
    node.await_state("off", "false", CHANGE)?;
    node.await_allocatable(PGPU, 2, STEP)?;
    let lacks = ["tee: failed", "kata-runtime: warning"];
    let (told, answer) = doctor(&node)?;
    assert_eq!(told, set(&lacks), "{answer:#}");
    assert_eq!(evidence(&answer, "pod-resources-get"), "It answers");
    assert_eq!(evidence(&answer, "cdi-files"), "nvidia.com/pgpu");

    node.stop_agent("lab-kubelet", Signal::SIGTERM)?;
    let argv = ["lab-kubelet", "run", "--kubeconfig", "/etc/lab/kubelet.conf", "--no-pod-resources-get"];
    node.start_agent(&argv, &[])?;
    let deadline = Instant::now() + STEP;
    let expected = set(&[&lacks[..], &["pod-resources-get: failed"]].concat());
    loop {
        let (told, answer) = doctor(&node)?;
        if told == expected {
            assert!(evidence(&answer, "pod-resources-get").contains("Get method disabled"), "{answer:#}");
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{told:?}\n{}", node.logs());
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn lockdown_is_told_with_and_without_its_file() -> Result<()> {
    let Some(node) = node("lockdown", &[])? else { return Ok(()) };
    node.guest.fleet().clear_trace();
    let expected = set(&[&BARE[..], &["lockdown: failed"]].concat());
    let (told, answer) = doctor(&node)?;
    assert_eq!(told, expected, "{answer:#}");
    assert_eq!(evidence(&answer, "lockdown"), "Active (integrity): sys/kernel/security/lockdown");
    node.look(&["sh", "-c", "umount /sys/kernel/security"])?;
    let (told, answer) = doctor(&node)?;
    assert_eq!(told, expected, "{answer:#}");
    assert!(evidence(&answer, "lockdown").contains("refused with EPERM"), "{answer:#}");
    let probe = node.look_json(&["ccnode", "probe", "--json"])?;
    assert_eq!(probe["host"]["lockdown"], "unknown");
    // As a container sees its host.
    node.look(&["sh", "-c", "mkdir /host && mount --rbind / /host"])?;
    let mounted = node.look_json(&["ccnode", "probe", "--json", "--root", "/host"])?;
    for probe in [probe, mounted] {
        let found = &probe["host_details"]["lockdown"];
        assert_eq!((&found["mode"], &found["inferred"]), (&"integrity".into(), &true.into()));
    }
    nothing_was_touched(&node)
}

#[test]
fn a_node_without_an_iommu_is_told_so() -> Result<()> {
    let Some(node) = node("no-iommu", &[])? else { return Ok(()) };
    let (told, answer) = doctor(&node)?;
    assert_eq!(told, set(&[&BARE[..], &["iommu: failed"]].concat()), "{answer:#}");
    assert!(evidence(&answer, "iommu").starts_with("The kernel has no IOMMU groups"), "{answer:#}");
    Ok(())
}

#[test]
fn neighbours_behind_ports_without_acs_are_told() -> Result<()> {
    let Some(node) = node("acs-off", &[])? else { return Ok(()) };
    let (told, answer) = doctor(&node)?;
    assert_eq!(told, set(&[&BARE[..], &["acs: warning"]].concat()), "{answer:#}");
    let words = evidence(&answer, "acs");
    for name in ["gpu0", "gpu1"] {
        let line = format!("{}: Shares its IOMMU group with ", node.guest.bdf(name)?);
        ensure!(words.lines().any(|found| found.starts_with(&line) && found.contains("has no ACS")), "{words}");
    }
    Ok(())
}

#[test]
fn old_and_unknown_gpus_are_told_beside_the_others() -> Result<()> {
    let Some(node) = node("mixed", &[])? else { return Ok(()) };
    node.guest.fleet().clear_trace();
    let (told, answer) = doctor(&node)?;
    assert_eq!(told, set(&[&BARE[..], &["gpu-model: warning", "gpu-cc: warning"]].concat()), "{answer:#}");
    assert!(evidence(&answer, "gpu-model").starts_with(&node.guest.bdf("gpu3")?), "{answer:#}");
    let old = evidence(&answer, "gpu-cc");
    ensure!(old.starts_with(&node.guest.bdf("gpu2")?) && old.contains("older than Hopper"), "{old}");
    assert!(evidence(&answer, "gpu-firewall").contains("Open"), "{answer:#}");
    nothing_was_touched(&node)
}

#[test]
fn a_driver_that_keeps_vfio_out_of_a_group_is_named() -> Result<()> {
    let Some(node) = node("rtx-pro-6000", &[])? else { return Ok(()) };
    let (gpu, audio) = (node.guest.bdf("gpu0")?, node.guest.bdf("audio0")?);
    let device = format!("/sys/bus/pci/devices/{audio}");
    let plant = format!(
        "modprobe uio_pci_generic && echo uio_pci_generic > {device}/driver_override && echo {audio} > /sys/bus/pci/drivers_probe &&
         [ $(basename $(readlink {device}/driver)) = uio_pci_generic ]"
    );
    node.look(&["sh", "-c", &plant])?;
    let (told, answer) = doctor(&node)?;
    assert_eq!(told, set(&[&BARE[..], &["iommu-group: failed"]].concat()), "{answer:#}");
    let words = evidence(&answer, "iommu-group");
    let line = format!("{gpu}: {audio} in its IOMMU group ");
    ensure!(words.starts_with(&line) && words.ends_with("is bound to uio_pci_generic"), "{words}");
    // The cure that is told.
    node.look(&["vfio-manage", "bind", "--all"])?;
    let (told, answer) = doctor(&node)?;
    assert!(!told.contains("iommu-group: failed") && !told.contains("gpu-driver: warning"), "{answer:#}");
    Ok(())
}

#[test]
fn changes_are_told_as_they_happen() -> Result<()> {
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    // As a container sees its host. So slow a poll that only the kernel's events can be in time.
    node.look(&["sh", "-c", "mkdir /host && mount --rbind / /host"])?;
    node.start_agent(&["ccnode", "probe", "--watch", "--json", "--poll", "10m", "--root", "/host"], &[])?;
    let lines = |node: &Node| -> Result<Vec<Value>> {
        let log = node.agent("ccnode")?.log();
        Ok(log.iter().filter_map(|(_, line)| serde_json::from_str(line).ok()).collect())
    };
    let await_lines = |node: &Node, fits: &dyn Fn(&Value) -> bool, count: usize| -> Result<()> {
        let deadline = Instant::now() + STEP;
        while lines(node)?.iter().filter(|line| fits(line)).count() < count {
            ensure!(Instant::now() < deadline, "{}", node.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    await_lines(&node, &|line| line["devices"].is_array(), 1)?;
    node.look(&["vfio-manage", "bind", "--all"])?;
    await_lines(&node, &|line| line["property"] == "driver" && line["after"] == "vfio-pci", 2)?;
    await_lines(&node, &|line| line["property"] == "vfio-cdev" && line["before"].is_null(), 2)?;
    ensure!(node.agent("ccnode")?.is_running(), "{}", node.logs());
    Ok(())
}
