//! A whole HGX H100 baseboard: eight GPUs change together, in the time of one.

use std::time::Duration;

use anyhow::{Context, Result};
use e2e::{CHANGE, PGPU, STEP, exchanges, gpu_bdfs, node_with, registers_say, the_labels_never_lied, whole_trace};
use lab::Boot;
use lab::node::CC_MODE;
use lab_devices::Kind;

#[test]
fn eight_gpus_are_reset_in_parallel_and_offered_with_their_numa_nodes() -> Result<()> {
    // Slow enough for a busy machine to begin all resets before the first device is up again.
    let slow = |boot: &mut Boot| {
        for device in &mut boot.topology.devices {
            device.spec.boot = Duration::from_secs(3);
        }
    };
    let Some(mut node) = node_with("hgx-h100", &[(CC_MODE, "off")], slow)? else { return Ok(()) };
    node.start_all()?;
    node.await_state("off", "false", CHANGE)?;
    node.await_allocatable(PGPU, 8, STEP)?;
    let begun = node.guest.fleet().micros();
    node.ask_for("on")?;
    node.await_state("on", "true", CHANGE)?;
    registers_say(&node, "on")?;
    the_labels_never_lied(&node)?;

    let mut trace = whole_trace(&node)?;
    // A switch of a node with CC is off, as it has been since it was made; that was verified, and nothing was set.
    for switch in (0..4).map(|number| format!("nvswitch{number}")) {
        let said = exchanges(&trace, &switch);
        assert!(!said.is_empty() && said.iter().all(|word| word.ends_with("020C->0")), "{switch}: {said:?}");
        let was_reset = trace.iter().any(|event| event.kind == Kind::Flr && *event.device == switch[..]);
        assert!(!was_reset, "{switch} was reset");
    }
    trace.retain(|event| event.micros >= begun);
    let of = |kind: Kind| trace.iter().filter(move |event| event.kind == kind && event.device.starts_with("gpu"));
    assert_eq!(of(Kind::Flr).count(), 8, "one reset each");
    let last_reset = of(Kind::Flr).map(|event| event.micros).max().context("no reset")?;
    let first_boot = of(Kind::Ready).map(|event| event.micros).min().context("no boot")?;
    assert!(last_reset < first_boot, "the last reset began {} us after a device had booted", last_reset - first_boot);

    node.await_allocatable(PGPU, 8, STEP)?;
    let dump = node.kubelet()?;
    let devices = dump["resources"][PGPU]["devices"].as_array().context("no devices")?;
    for numa in [0, 1] {
        let count = devices.iter().filter(|device| device["numa"] == serde_json::json!([numa])).count();
        assert_eq!(count, 4, "NUMA node {numa}: {dump:#}");
    }
    // A pod of four stays on one socket.
    node.create_pod("half", PGPU, 4)?;
    node.await_pod("half", "Running", STEP)?;
    let resolved = node.look_json(&["lab-kubelet", "resolve", "default/half"])?;
    let plugged: Vec<String> = resolved["devices"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|device| device["bdfs"][0].as_str().map(ToOwned::to_owned))
        .collect();
    assert_eq!(plugged.len(), 4);
    let all = gpu_bdfs(&node)?;
    assert!(plugged.iter().all(|bdf| all.contains(bdf)));
    let probe = node.look_json(&["ccnode", "probe", "--json"])?;
    let numa_of = |bdf: &str| {
        let devices = probe["devices"].as_array()?;
        devices.iter().find(|device| device["bdf"] == bdf)?["numa_node"].as_u64()
    };
    let nodes: std::collections::BTreeSet<Option<u64>> = plugged.iter().map(|bdf| numa_of(bdf)).collect();
    assert_eq!(nodes.len(), 1, "{plugged:?} are on {nodes:?}");
    Ok(())
}
