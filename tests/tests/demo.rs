//! The demo as a person runs it: the road is there, step by step, with a time each.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use e2e::lab_is_here;
use serde_json::Value;

/// Who does what, in this order, from the label on.
const ROAD: [(&str, &str); 13] = [
    ("person", "nvidia.com/cc.mode = \"on\""),
    ("cc-manager", "sees the label: on"),
    ("node object", "nvidia.com/cc.ready.state = \"\""),
    ("gpu0", "knob 8 staged: 1"),
    ("gpu0", "function-level reset"),
    ("gpu0", "booted; status register 0x01"),
    ("cc-manager", "verified, register and knobs"),
    ("node object", "nvidia.com/cc.ready.state = \"true\""),
    ("device-plugin", "offers "),
    ("person", "creates pod model"),
    ("device-plugin", "Allocate: "),
    ("kubelet", "pod model is Running"),
    ("kata", "resolves CDI device nvidia.com/pgpu="),
];

#[test]
fn the_demo_shows_the_road_step_by_step_and_whose_gpu_the_pod_got() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let output = Command::new(lab::programs::built()?.join("lab")).args(["demo", "--json"]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout)?;
    let timeline = told["timeline"].as_array().context("no timeline")?;
    let times: Vec<f64> =
        timeline.iter().map(|moment| moment["seconds"].as_f64().context("no time")).collect::<Result<_>>()?;
    assert!(times.is_sorted(), "{times:?}");

    let is = |moment: &Value, (actor, text): (&str, &str)| {
        moment["actor"] == actor && moment["text"].as_str().is_some_and(|told| told.contains(text))
    };
    // What the agents do before the label: bind, write the CDI file, register.
    for step in [("vfio-manager", "bound to vfio-pci"), ("device-plugin", "registered nvidia.com/pgpu")] {
        ensure!(timeline.iter().any(|moment| is(moment, step)), "{step:?} is not told: {told:#}");
    }
    // When a change is done, the labels and the offer to the kubelet come as they come.
    for beside in ["offers ", "nvidia.com/cc.ready.state = \"true\""] {
        let mut rest = timeline.iter();
        for step in ROAD.into_iter().filter(|(_, text)| *text != beside) {
            ensure!(rest.any(|moment| is(moment, step)), "{step:?} is not told in its place: {told:#}");
        }
    }

    let plugged = timeline.last().and_then(|moment| moment["text"].as_str()).context("no end")?;
    let devices = told["devices"].as_array().context("no devices")?;
    assert_eq!(devices.len(), 2);
    let is_plugged = |device: &&Value| device["bdf"].as_str().is_some_and(|bdf| plugged.contains(bdf));
    assert_eq!(devices.iter().filter(is_plugged).count(), 1, "{plugged}");
    for device in devices {
        assert_eq!((device["mode"].as_str(), device["register"].as_str()), (Some("on"), Some("0x01")), "{device}");
    }
    Ok(())
}
