//! The device plugin with nothing but what it needs.

use anyhow::{Context, Result};
use e2e::{CHANGE, PGPU, STEP, await_that, gpu_bdfs, node_with};
use lab::Boot;
use lab::node::CC_MODE;
use lab_vm::Add;
use nix::sys::signal::Signal;

/// What a container of it mounts, and its program. No /dev.
const PLACES: [&str; 7] = [
    "ro:/usr/bin/device-plugin",
    "ro:/proc",
    "ro:/sys",
    "ro:/run/nvidia/ccnode",
    "ro:/var/lib/kubelet/pod-resources",
    "rw:/var/lib/kubelet/device-plugins",
    "rw:/var/run/cdi",
];

#[test]
fn the_device_plugin_works_without_capabilities_on_a_read_only_root_without_devices() -> Result<()> {
    let with_confine = |boot: &mut Boot| {
        boot.adds.push(Add { host: env!("CARGO_BIN_EXE_lab-confine").into(), guest: "/usr/bin/lab-confine".into() });
    };
    let Some(mut node) = node_with("h100x2", &[(CC_MODE, "off")], with_confine)? else { return Ok(()) };
    node.start_kubelet()?;
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    node.look(&["mkdir", "-p", "/var/run/cdi"])?;
    let argv = [&["lab-confine"], &PLACES[..], &["--", "/usr/bin/device-plugin", "--cc-gate=require"]].concat();
    // No event of the kernel's is missed: a poll would come too late.
    node.start_agent(&argv, &[("POLL_INTERVAL", "10m")])?;
    node.await_allocatable(PGPU, 2, STEP).with_context(|| node.logs())?;

    let pid = node.agent("lab-confine")?.process.pid();
    let status = String::from_utf8(node.guest.get_file(&format!("/proc/{pid}/status"))?)?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), Some("0000000000000000"), "{status}");
    }
    assert_eq!(field("NoNewPrivs:"), Some("1"), "{status}");
    assert_eq!((field("Seccomp:"), field("Seccomp_filters:")), (Some("2"), Some("2")), "{status}");
    let refused = "lab-confine: a call that is in no list is refused";
    assert!(node.agent("lab-confine")?.log().iter().any(|(_, line)| line.contains(refused)), "{}", node.logs());
    let root = format!("/proc/{pid}/root");
    node.guest.shell(&format!("ls {root}; ! ls {root}/dev && ! touch {root}/x && ! touch {root}/sys/x"), STEP)?;
    let listed = node.look(&["ls", &root])?.text();
    assert_eq!(listed.split_whitespace().collect::<Vec<_>>(), ["proc", "run", "sys", "usr", "var"]);

    // Allocate, CDI, and what Kata makes of them.
    node.create_pod("first", PGPU, 2)?;
    node.await_pod("first", "Running", STEP)?;
    // Which pod has them, by the kubelet's pod-resources service: asked at the next look, for which this is a reason.
    node.look(&["touch", "/var/run/cdi/a-reason-to-look"])?;
    await_that("the units have their pod", &node, || {
        let units = String::from_utf8(node.guest.get_file("/var/lib/kubelet/device-plugins/ccnode/units.json")?)?;
        Ok(units.matches("\"pod\":\"default/first\"").count() == 2 && units.contains("pod-resources service"))
    })?;
    node.api.delete("pods", "default", "first", Some(0))?;

    // A change of modes is heard of by the file of cc-manager's.
    node.ask_for("on")?;
    node.await_allocatable(PGPU, 0, CHANGE)?;
    node.await_state("on", "true", CHANGE)?;
    node.await_allocatable(PGPU, 2, STEP)?;

    // And a GPU that loses its driver, by the kernel's event.
    node.stop_agent("vfio-manager", Signal::SIGTERM)?;
    let gpu = gpu_bdfs(&node)?.pop_first().context("there is no GPU")?;
    node.guest.shell(&format!("echo {gpu} > /sys/bus/pci/drivers/vfio-pci/unbind"), STEP)?;
    node.await_allocatable(PGPU, 1, STEP)?;
    // The file keeps it until the kubelet has heard.
    await_that("the CDI file has one GPU", &node, || {
        let cdi = String::from_utf8(node.guest.get_file("/var/run/cdi/nvidia.com-pgpu.yaml")?)?;
        Ok(cdi.matches("- name:").count() == 1)
    })?;
    node.stop_agent("lab-confine", Signal::SIGTERM)
}
