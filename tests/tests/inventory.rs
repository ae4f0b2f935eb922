//! What `ccnode probe` and `cargo lab run` say of a whole baseboard under a real kernel.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Context, Result};
use e2e::lab_is_here;
use serde_json::Value;

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
    let on_node = |node: u64| gpus.iter().filter(|gpu| gpu["numa_node"].as_u64() == Some(node)).count();
    assert_eq!((on_node(0), on_node(1)), (4, 4));
    assert_eq!(probe["problems"].as_array().map(Vec::len), Some(0), "{}", probe["problems"]);
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
    let output = lab(&["--timeout", "8", "--", "sleep", "1000"])?;
    assert_eq!(output.status.code(), Some(124), "{}", String::from_utf8_lossy(&output.stderr));
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
