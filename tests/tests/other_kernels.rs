//! The road on kernels that offer VFIO otherwise: by groups only, and without groups.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, PGPU, STEP, bound_to_vfio, gpu_bdfs, lab_is_here, registers_say, the_cdi_file_is};
use lab::node::CC_MODE;
use lab::{Boot, Node};
use lab_vm::Kernel;
use nix::sys::signal::Signal;

fn node_with(kernel: Kernel, mode: &str) -> Result<Option<Node>> {
    if !lab_is_here()? {
        return Ok(None);
    }
    let boot = Boot { kernel: Some(kernel), ..Boot::new("h100x2")? };
    Node::start(boot, &[(CC_MODE, mode)]).map(Some)
}

fn cdi_file(node: &Node) -> Result<String> {
    Ok(String::from_utf8(node.guest.get_file("/var/run/cdi/nvidia.com-pgpu.yaml")?)?)
}

/// Where the guest's kernel put a device: its IOMMU group.
fn group(node: &Node, bdf: &str) -> Result<String> {
    let link = format!("basename $(readlink /sys/bus/pci/devices/{bdf}/iommu_group)");
    Ok(node.look(&["sh", "-c", &link])?.text().trim().to_owned())
}

/// Debian's own kernel: no iommufd, so that devices are handed over by their groups.
#[test]
fn a_kernel_without_iommufd_hands_over_groups() -> Result<()> {
    let Some(mut node) = node_with(Kernel::Stock, "off")? else { return Ok(()) };
    node.look(&["sh", "-c", "test ! -e /dev/iommu"])?;
    node.start_all()?;
    node.await_state("off", "false", CHANGE)?;
    node.ask_for("on")?;
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")?;
    bound_to_vfio(&node)?;
    node.await_allocatable(PGPU, 2, STEP)?;

    let bdfs = gpu_bdfs(&node)?;
    let nodes = |bdf: &str| Ok(vec!["/dev/vfio/vfio".to_owned(), format!("/dev/vfio/{}", group(&node, bdf)?)]);
    the_cdi_file_is(&node, nodes)?;

    node.create_pod("both", PGPU, 2)?;
    node.await_pod("both", "Running", STEP)?;
    let resolved = node.look_json(&["lab-kubelet", "resolve", "default/both"])?;
    let mut plugged = BTreeSet::new();
    for device in resolved["devices"].as_array().context("no devices")? {
        let bdf = device["bdfs"][0].as_str().context("no BDF")?;
        assert_eq!(device["nodes"], serde_json::json!([format!("/dev/vfio/{}", group(&node, bdf)?)]));
        plugged.insert(bdf.to_owned());
    }
    assert_eq!(plugged, bdfs);
    Ok(())
}

/// Without group files devices are held by their character devices, which resets them; they are offered all the same.
#[test]
fn a_kernel_without_group_files_changes_modes_and_offers_character_devices() -> Result<()> {
    let Some(mut node) = node_with(Kernel::NoGroup, "on")? else { return Ok(()) };
    node.start_kubelet()?;
    node.start_vfio_manager()?;
    // Nobody has said anything of the devices yet.
    node.start_agent(&["device-plugin", "--cc-gate=off"], &[("POLL_INTERVAL", "1s")])?;
    node.await_allocatable(PGPU, 2, STEP)?;
    bound_to_vfio(&node)?;
    ensure!(cdi_file(&node)?.contains("path: /dev/vfio/devices/vfio"), "{}", cdi_file(&node)?);

    node.start_cc_manager()?;
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")?;
    bound_to_vfio(&node)?;
    node.await_allocatable(PGPU, 2, STEP)?;

    // One that is held keeps the node in the mode that it is in, and that is offered.
    let bdf = node.guest.bdf("gpu1")?;
    let hold = format!("exec 3<>/dev/vfio/devices/$(ls /sys/bus/pci/devices/{bdf}/vfio-dev); echo held; sleep 1000");
    node.start_agent(&["sh", "-c", &hold], &[])?;
    node.agent("sh")?.process.wait_output(STEP, |text| text.contains("held"))?;
    node.ask_for("off")?;
    node.agent("cc-manager")?.process.wait_output(STEP, |text| text.contains("InUse") && text.contains(&bdf))?;
    node.await_state("on", "true", STEP)?;
    node.await_allocatable(PGPU, 2, STEP)?;
    registers_say(&node, "on")?;

    // With the gate of our chart nothing is ever offered, not even while the file is not there.
    node.stop_agent("device-plugin", Signal::SIGTERM)?;
    node.stop_agent("cc-manager", Signal::SIGTERM)?;
    node.look(&["rm", "/run/nvidia/ccnode/devices.json"])?;
    node.start_device_plugin()?;
    node.agent("device-plugin")?.process.wait_output(STEP, |text| text.contains("cc-not-verified"))?;
    node.agent("device-plugin")?.process.wait_output(STEP, |text| text.contains("\"registered\""))?;
    node.await_allocatable(PGPU, 0, STEP)?;
    Ok(())
}
