//! What a pod was given stays its own, whatever restarts around it.

use std::collections::BTreeSet;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, PGPU, STEP, gpu_bdfs, node};
use lab::Node;
use lab::node::CC_MODE;
use nix::sys::signal::Signal;
use serde_json::Value;

fn gpu_of(node: &Node, pod: &str) -> Result<String> {
    let resolved = node.look_json(&["lab-kubelet", "resolve", &format!("default/{pod}")])?;
    let devices = resolved["devices"].as_array().context("no devices")?;
    ensure!(devices.len() == 1, "{resolved:#}");
    Ok(devices[0]["bdfs"][0].as_str().context("no BDF")?.to_owned())
}

/// The kubelet knows each GPU once and as healthy, and the CDI folder has one file of ours with each GPU once.
fn all_is_in_order(node: &Node, cdi: &[u8]) -> Result<()> {
    node.await_allocatable(PGPU, 2, STEP)?;
    let dump = node.kubelet()?;
    let devices = dump["resources"][PGPU]["devices"].as_array().context("the kubelet knows no such resource")?;
    let ids: Vec<&str> = devices.iter().filter_map(|device| device["id"].as_str()).collect();
    let bdfs = gpu_bdfs(node)?;
    ensure!(ids.len() == bdfs.len() && ids.iter().all(|id| bdfs.contains(*id)), "{dump:#}");
    ensure!(devices.iter().all(|device| device["health"] == "Healthy"), "{dump:#}");
    let files = node.look(&["ls", "-A", "/var/run/cdi"])?.text();
    assert_eq!(files.trim(), "nvidia.com-pgpu.yaml");
    ensure!(node.guest.get_file("/var/run/cdi/nvidia.com-pgpu.yaml")? == cdi, "the CDI file has changed");
    Ok(())
}

/// A time that is another in each run.
fn some_time(most: Duration) -> Duration {
    let chance = u32::try_from(RandomState::new().hash_one(()) % 1000).unwrap_or_default();
    most * chance / 1000
}

#[test]
fn restarts_of_kubelet_and_plugin_lose_no_allocation() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_all()?;
    node.await_state("off", "false", CHANGE)?;
    node.await_allocatable(PGPU, 2, STEP)?;
    node.create_pod("first", PGPU, 1)?;
    node.await_pod("first", "Running", STEP)?;
    let given = gpu_of(&node, "first")?;
    let cdi = node.guest.get_file("/var/run/cdi/nvidia.com-pgpu.yaml")?;

    for _ in 0..10 {
        node.look(&["lab-kubelet", "ctl", "restart"])?;
        // The next one may come before the plugin is known again.
        std::thread::sleep(some_time(Duration::from_millis(1500)));
    }
    all_is_in_order(&node, &cdi)?;
    assert_eq!(gpu_of(&node, "first")?, given);

    // Without its plugin the kubelet gives nothing away, and the pod that runs stays as it is.
    node.stop_agent("device-plugin", Signal::SIGKILL)?;
    node.await_allocatable(PGPU, 0, STEP)?;
    assert_eq!(gpu_of(&node, "first")?, given);
    node.start_device_plugin()?;
    all_is_in_order(&node, &cdi)?;
    assert_eq!(gpu_of(&node, "first")?, given);

    // Both at once.
    node.look(&["lab-kubelet", "ctl", "stop"])?;
    node.stop_agent("device-plugin", Signal::SIGKILL)?;
    node.start_device_plugin()?;
    node.look(&["lab-kubelet", "ctl", "start"])?;
    all_is_in_order(&node, &cdi)?;

    // The free GPU is all that is left to give.
    node.create_pod("second", PGPU, 1)?;
    node.await_pod("second", "Running", STEP)?;
    let both: BTreeSet<String> = [given, gpu_of(&node, "second")?].into();
    assert_eq!(both, gpu_bdfs(&node)?);
    node.create_pod("third", PGPU, 1)?;
    let third = node.await_pod("third", "Failed", STEP)?;
    ensure!(third["status"]["reason"] != Value::Null, "{}", third["status"]);
    Ok(())
}
