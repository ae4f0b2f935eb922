//! What `ccnode probe` and `cargo lab run` say of a whole baseboard under a real kernel.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use e2e::{STEP, exchanges, lab_is_here};
use lab::Boot;
use lab_devices::{Kind, Space, TraceEvent};
use lab_vm::topology::{Device, Place};
use serde_json::{Value, json};

fn lab(args: &[&str]) -> Result<Output> {
    let program: PathBuf = lab::programs::built()?.join("lab");
    Command::new(program).arg("run").args(args).output().context("The lab's command cannot be started")
}

#[test]
fn an_hgx_h100_is_told_with_names_groups_and_numa_nodes() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let output = lab(&["--topology", "hgx-h100", "--", "ccnode", "probe", "--json"])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let probe: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(probe["host"]["iommu"], "on");
    let devices = probe["devices"].as_array().context("devices")?;
    let of = |kind: &str| devices.iter().filter(|device| device["kind"] == kind).collect::<Vec<_>>();
    let (gpus, switches) = (of("gpu"), of("nvswitch"));
    assert_eq!((gpus.len(), switches.len()), (8, 4));
    for gpu in &gpus {
        assert_eq!((gpu["name"].as_str(), gpu["model"]["form_factor"].as_str()), (Some("H100"), Some("sxm")), "{gpu}");
        assert_eq!(gpu["model"]["architecture"], "hopper");
        assert_eq!(gpu["liveness"], "answers");
    }
    for switch in &switches {
        assert_eq!(
            (switch["name"].as_str(), switch["model"]["chip"].as_str()),
            (Some("NVSwitch_gen3"), Some("ls10")),
            "{switch}"
        );
    }
    let groups: BTreeSet<u64> = devices.iter().filter_map(|device| device["iommu_group"].as_u64()).collect();
    assert_eq!(groups.len(), 12, "every device has an IOMMU group of its own");
    assert_eq!(probe["problems"].as_array().map(Vec::len), Some(0), "{}", probe["problems"]);
    // Device by device: as the topology places it, as QEMU addresses it, and as the kernel of such a guest shows it.
    let guest = Boot::new("hgx-h100")?.guest()?;
    for Device { spec, place, .. } in &guest.topology().devices {
        let bdf = guest.bdf(&spec.name)?;
        let told = devices.iter().find(|device| device["bdf"] == *bdf).with_context(|| bdf.clone())?;
        let Place::RootPort { numa: Some(placed) } = place else { bail!("{} is placed at {place:?}", spec.name) };
        let sysfs = format!("cd /sys/bus/pci/devices/{bdf}; cat numa_node; basename $(readlink iommu_group)");
        let sysfs = guest.shell(&sysfs, STEP)?.text();
        let shown = format!("{}\n{}", told["numa_node"], told["iommu_group"]);
        assert_eq!(shown, sysfs, "{}: NUMA node and group", spec.name);
        assert_eq!(told["numa_node"], json!(placed), "{}", spec.name);
        assert_eq!(told["group_members"], json!([bdf]), "{}", spec.name);
        let kind = if spec.name.starts_with("gpu") { "gpu" } else { "nvswitch" };
        assert_eq!(told["kind"], kind, "{}", spec.name);
    }
    Ok(())
}

/// Stages the CCM knob of the first GPU by hand, over EMEM channel 2, as gpu-cc-protocol section 6.4 has it in examples 1
/// and 2, and says how its status register reads.
const STAGE_CCM: &str = "
    class=$(grep -lx 0x030200 /sys/bus/pci/devices/*/class | head -n1); dev=${class%/class}
    echo 1 > $dev/enable
    bar=$(head -n1 $dev/resource | cut -d' ' -f1)
    r() { devmem $((bar + $1)) 32; }
    w() { devmem $((bar + $1)) 32 $2; }
    w 0x8f2ad0 0x03000800
    for word in 0xC0000000 0x1310DE7E 0x0008020D 1; do w 0x8f2ad4 $word; done
    w 0x8f2c14 0x80c; w 0x8f2c10 0x800
    sleep 0.1; w 0x8f2c94 0x800
    r 0x1182cc";

#[test]
fn a_run_leaves_its_trace_and_the_next_one_finds_the_knobs() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let (trace, knobs) = (folder.path().join("trace.jsonl"), folder.path().join("knobs.json"));
    let (trace_text, knobs_text) = (trace.to_string_lossy(), knobs.to_string_lossy());
    // The knob is written in the first run, and the second begins with it.
    for status in ["0x00000000\n", "0x00000001\n"] {
        let output = lab(&["--trace", &trace_text, "--knobs", &knobs_text, "--", "sh", "-c", STAGE_CCM])?;
        assert_eq!(String::from_utf8_lossy(&output.stdout), status, "{}", String::from_utf8_lossy(&output.stderr));
        let kept: Value = serde_json::from_slice(&std::fs::read(&knobs)?)?;
        assert_eq!([&kept["gpu0"]["8"], &kept["gpu1"]], [&json!(1), &json!(null)], "{kept}");
        let lines = std::fs::read_to_string(&trace)?;
        let events = lines.lines().map(serde_json::from_str).collect::<Result<Vec<TraceEvent>, _>>()?;
        assert_eq!(exchanges(&events, "gpu0"), ["0008020D 1->?"]);
        assert!(exchanges(&events, "gpu1").is_empty());
        for name in ["gpu0", "gpu1"] {
            let is_read = |event: &&TraceEvent| event.kind == Kind::Read && *event.device == *name;
            let config = events.iter().filter(is_read).filter(|event| event.space == Space::Config).count();
            assert!(config > 0, "the kernel's own reads of {name}'s configuration space");
        }
        let last = events.iter().rfind(|event| event.space == Space::Bar0).context("no access to BAR0")?;
        assert_eq!((&*last.device, last.kind, last.offset, last.width), ("gpu0", Kind::Read, 0x11_82cc, 4));
    }
    Ok(())
}

#[test]
fn a_command_in_the_guest_has_its_exit_code_output_and_deadline() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let output = lab(&["--", "sh", "-c", "echo out; echo err >&2; exit 7"])?;
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
    assert!(String::from_utf8_lossy(&output.stderr).contains("err\n"));
    // Its time counts from its own start.
    let output = lab(&["--timeout", "2", "--", "sh", "-c", "echo started; exec sleep 1000"])?;
    assert_eq!(output.status.code(), Some(124), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "started\n");
    let output = lab(&["--", "no-such-program"])?;
    assert_eq!(output.status.code(), Some(127));
    Ok(())
}

#[test]
fn the_guest_runs_dynamically_linked_programs_of_the_host() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    // Perl is in every Debian and brings dozens of files besides its libraries.
    let folder = tempfile::tempdir()?;
    let copy = |path: &str| -> Result<()> {
        let target = folder.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(target.parent().context("no folder")?)?;
        std::fs::copy(path, &target).with_context(|| path.to_owned())?;
        Ok(())
    };
    copy("/usr/bin/perl")?;
    let libraries = Command::new("ldd").arg("/usr/bin/perl").output()?;
    let text = String::from_utf8_lossy(&libraries.stdout).into_owned();
    for path in text.split_whitespace().filter(|word| word.starts_with('/')) {
        copy(path)?;
    }
    let add = format!("{}:/", folder.path().display());
    let output = lab(&["--add", &add, "--", "perl", "-e", "print 6*7, qq(\\n)"])?;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "42\n", "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
