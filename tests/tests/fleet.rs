//! What `ccnode probe` says of every kind of node that the lab can be: names, kinds, groups, capabilities.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use e2e::{STEP, lab_is_here};
use lab::Boot;
use lab_vm::{Guest, Topology};
use serde_json::{Value, json};

/// A booted node and what `ccnode probe` says of it.
struct Seen {
    guest: Guest,
    probe: Value,
    /// The names of the virtual devices by their PCI addresses.
    names: BTreeMap<String, String>,
}

/// Boots a topology and looks at it; none where scenarios do not run.
fn look(topology: &str) -> Result<Option<Seen>> {
    if !lab_is_here()? {
        return Ok(None);
    }
    look_at(Boot::new(topology)?).map(Some)
}

fn look_at(boot: Boot) -> Result<Seen> {
    let guest = boot.guest()?;
    let topology = &guest.topology().name;
    eprintln!("{topology}: {:?}", guest.boot_times());
    let devices = guest.topology().devices.iter().map(|device| device.spec.name.clone());
    let names = devices.map(|name| Ok((guest.bdf(&name)?, name))).collect::<Result<_>>()?;
    let probe = probe(&guest)?;
    ensure!(probe["problems"] == json!([]), "{topology}: {:#}", probe["problems"]);
    for device in probe["devices"].as_array().context("probe tells no devices")? {
        // Of a chip that no table knows that is said; see the mixed node.
        let is_known = device["kind"] != "gpu" || !device["model"].is_null();
        ensure!(device["liveness"] == "answers", "{topology}: {device:#}");
        ensure!(!is_known || device["faults"] == json!([]), "{topology}: {device:#}");
    }
    Ok(Seen { guest, probe, names })
}

fn probe(guest: &Guest) -> Result<Value> {
    let output = guest.run(&["ccnode", "probe", "--json"], STEP)?;
    ensure!(output.success(), "{}", output.error_text());
    serde_json::from_slice(&output.stdout).context("ccnode probe printed no JSON")
}

impl Seen {
    fn devices(&self) -> Result<&[Value]> {
        Ok(self.probe["devices"].as_array().context("probe tells no devices")?)
    }

    /// What is said of a virtual device, by the device's name.
    fn device(&self, name: &str) -> Result<&Value> {
        let bdf = self.guest.bdf(name)?;
        self.devices()?.iter().find(|device| device["bdf"] == *bdf).with_context(|| format!("{name} is not told of"))
    }

    /// Name, kind, chip, whether CC can be enabled, PPCIe: of all devices, by the names of the virtual ones.
    fn table(&self) -> Result<BTreeMap<String, [Value; 5]>> {
        let row = |device: &Value| {
            let bdf = device["bdf"].as_str().unwrap_or_default();
            let name = self.names.get(bdf).with_context(|| format!("{bdf} is none of ours"))?.clone();
            let model = &device["model"];
            let row = [&device["name"], &device["kind"], &model["chip"], &model["cc_enable"], &model["ppcie"]];
            Ok((name, row.map(Clone::clone)))
        };
        self.devices()?.iter().map(row).collect()
    }

    /// The virtual devices that share an IOMMU group with this one, itself included.
    fn group(&self, name: &str) -> Result<BTreeSet<&str>> {
        let members = self.device(name)?["group_members"].as_array().context("no group")?;
        Ok(members.iter().filter_map(|bdf| Some(self.names.get(bdf.as_str()?)?.as_str())).collect())
    }

    /// Number of IOMMU groups of what is told of.
    fn groups(&self) -> Result<usize> {
        let groups: BTreeSet<u64> =
            self.devices()?.iter().filter_map(|device| device["iommu_group"].as_u64()).collect();
        Ok(groups.len())
    }

    fn on_node(&self, node: u64) -> Result<usize> {
        Ok(self.devices()?.iter().filter(|device| device["numa_node"] == node).count())
    }
}

/// As [`Seen::table`] has it.
fn table<const N: usize>(rows: [(&str, [Value; 5]); N]) -> BTreeMap<String, [Value; 5]> {
    rows.into_iter().map(|(name, row)| (name.to_owned(), row)).collect()
}

fn hopper(name: &str) -> [Value; 5] {
    [json!(name), json!("gpu"), json!("gh100"), json!("yes"), json!(true)]
}

fn rtx_pro() -> [Value; 5] {
    [json!("RTX-PRO-6000"), json!("gpu"), json!("gb202"), json!("yes"), json!(false)]
}

#[test]
fn two_h100s_are_told_whole() -> Result<()> {
    let Some(seen) = look("h100x2")? else { return Ok(()) };
    let host = &seen.probe["host"];
    let facts = ["iommu", "lockdown", "tee", "dev_iommu", "dev_vfio"].map(|fact| host[fact].clone());
    assert_eq!(facts, [json!("on"), json!("none"), json!("none"), json!(true), json!(true)]);
    assert_eq!(seen.table()?, table([("gpu0", hopper("H100")), ("gpu1", hopper("H100"))]));
    for name in ["gpu0", "gpu1"] {
        let device = seen.device(name)?;
        let ids = ["vendor", "device", "class", "revision"].map(|id| device[id].as_u64());
        assert_eq!(ids, [Some(0x10de), Some(0x2330), Some(0x03_0200), Some(0xa1)]);
        for (what, is) in [
            ("driver", Value::Null),
            ("driver_override", Value::Null),
            ("vfio_cdev", Value::Null),
            ("numa_node", Value::Null),
            ("is_virtual_function", json!(false)),
            ("reset_methods", json!(["flr", "bus"])),
            ("group_blockers", json!([])),
            ("group_strangers", json!([])),
        ] {
            assert_eq!(device[what], is, "{name}: {what}");
        }
        let bars = device["bars"].as_array().context("no BARs")?;
        let bars: Vec<_> = bars.iter().map(|bar| [&bar["number"], &bar["size"]].map(Value::as_u64)).collect();
        assert_eq!(bars, [[Some(0), Some(16 << 20)], [Some(2), Some(64 << 20)], [Some(4), Some(32 << 20)]]);
        assert_eq!(device["ports"][0]["role"], "root");
        assert_eq!(seen.group(name)?, [name].into());
    }
    assert_eq!(seen.groups()?, 2);
    Ok(())
}

#[test]
fn an_hgx_h200_has_gpus_and_switches_that_take_part_in_protected_pcie() -> Result<()> {
    let Some(seen) = look("h200x8-nvswitch")? else { return Ok(()) };
    let switch = [json!("NVSwitch_gen3"), json!("nvswitch"), json!("ls10"), json!("no"), json!(true)];
    let table = seen.table()?;
    assert_eq!(table.len(), 12);
    for (name, row) in &table {
        assert_eq!(*row, if name.starts_with("gpu") { hopper("H200") } else { switch.clone() }, "{name}");
    }
    assert_eq!((seen.groups()?, seen.on_node(0)?, seen.on_node(1)?), (12, 6, 6));
    Ok(())
}

#[test]
fn an_hgx_b200_has_gpus_behind_a_bar_firewall() -> Result<()> {
    let Some(seen) = look("b200x8")? else { return Ok(()) };
    for device in seen.devices()? {
        let row = [&device["name"], &device["kind"], &device["model"]["chip"], &device["model"]["cc_enable"]];
        assert_eq!(row, [&json!("B200"), &json!("gpu"), &json!("gb100"), &json!("yes")]);
        assert_eq!(device["model"]["ppcie"], false);
        assert_eq!(device["model"]["fsp_transport"], "mnoc-port0");
        assert_eq!(device["liveness"], "answers");
        assert_eq!(device["bars"].as_array().map(Vec::len), Some(3), "all BARs have found their place: {device:#}");
    }
    assert_eq!((seen.devices()?.len(), seen.groups()?, seen.on_node(0)?, seen.on_node(1)?), (8, 8, 4, 4));
    Ok(())
}

#[test]
fn grace_blackwell_gpus_are_off_only_by_their_ids() -> Result<()> {
    let Some(seen) = look("gb200")? else { return Ok(()) };
    for (name, bit) in [("gpu0", true), ("gpu1", true), ("gpu2", false), ("gpu3", false)] {
        let device = seen.device(name)?;
        assert_eq!((&device["name"], &device["model"]["has_c2c"]), (&json!("GB200"), &json!(true)));
        assert_eq!(device["model"]["cc_enable"], "off-only", "the ids do not tell of the firmware's bit");
        let word = seen.guest.fleet().status(name)?.status_word;
        assert_eq!(word >> 8 & 1, u32::from(bit), "{name}: {word:#x}");
    }
    assert_eq!((seen.devices()?.len(), seen.groups()?), (4, 4));
    Ok(())
}

#[test]
fn a_board_with_audio_is_one_group_of_two_functions() -> Result<()> {
    let Some(seen) = look("rtx-pro-6000")? else { return Ok(()) };
    let audio = [Value::Null, json!("nvidia-other"), Value::Null, Value::Null, Value::Null];
    let rows = [("gpu0", rtx_pro()), ("audio0", audio.clone()), ("gpu1", rtx_pro()), ("audio1", audio)];
    assert_eq!(seen.table()?, table(rows));
    for (gpu, audio) in [("gpu0", "audio0"), ("gpu1", "audio1")] {
        assert_eq!(seen.group(gpu)?, [gpu, audio].into());
        assert_eq!(seen.device(audio)?["class"], 0x04_0300);
        assert_eq!(seen.guest.bdf(audio)?, seen.guest.bdf(gpu)?.replace(".0", ".1"), "one slot");
    }
    assert_eq!(seen.groups()?, 2);
    Ok(())
}

#[test]
fn generations_side_by_side_are_told_apart_and_the_unknown_one_is_told() -> Result<()> {
    let Some(seen) = look("mixed")? else { return Ok(()) };
    let a100 = [json!("GA100 [A100 SXM4 40GB]"), json!("gpu"), json!("ga100"), json!("no"), json!(false)];
    let unknown = [Value::Null, json!("gpu"), Value::Null, Value::Null, Value::Null];
    let rows = [("gpu0", hopper("H100")), ("gpu1", rtx_pro()), ("gpu2", a100), ("gpu3", unknown)];
    assert_eq!(seen.table()?, table(rows));
    assert_eq!(seen.groups()?, 4);
    assert_eq!(seen.device("gpu3")?["faults"], json!([{ "fault": "unknown-chip", "device": 0x3f00 }]));
    Ok(())
}

#[test]
fn without_acs_two_gpus_and_a_stranger_share_a_group() -> Result<()> {
    let Some(seen) = look("acs-off")? else { return Ok(()) };
    assert_eq!(seen.table()?, table([("gpu0", hopper("H100")), ("gpu1", hopper("H100"))]));
    assert_eq!(seen.group("gpu0")?, ["gpu0", "gpu1", "nic0"].into());
    assert_eq!(seen.groups()?, 1);
    Ok(())
}

#[test]
fn without_an_iommu_there_are_no_groups() -> Result<()> {
    let Some(seen) = look("no-iommu")? else { return Ok(()) };
    assert_eq!(seen.probe["host"]["iommu"], "off");
    assert_eq!(seen.table()?, table([("gpu0", hopper("H100")), ("gpu1", hopper("H100"))]));
    for name in ["gpu0", "gpu1"] {
        assert_eq!(seen.device(name)?["iommu_group"], Value::Null);
    }
    Ok(())
}

#[test]
fn models_that_no_shipped_topology_has_are_told() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let models = ["h200", "gh200", "b300", "gb300", "lr10"];
    let text: String = models.map(|model| format!("[[device]]\nname = '{model}'\nmodel = '{model}'\n")).concat();
    let mut boot = Boot::new("h100x2")?;
    boot.topology = Topology::parse("models", &text)?;
    let seen = look_at(boot)?;
    let gpu = |name: &str, chip: &str, enable: &str, ppcie: bool| {
        [json!(name), json!("gpu"), json!(chip), json!(enable), json!(ppcie)]
    };
    let rows = [
        ("h200", hopper("H200")),
        ("gh200", gpu("GH200", "gh100", "off-only", true)),
        ("b300", gpu("B300", "gb110", "yes", false)),
        ("gb300", gpu("GB300", "gb110", "off-only", false)),
        ("lr10", [json!("LR10"), json!("nvswitch"), json!("lr10"), json!("no"), json!(false)]),
    ];
    assert_eq!(seen.table()?, table(rows));
    assert_eq!(seen.device("gh200")?["reset_methods"], json!(["flr"]), "the kernel resets no bus for this device id");
    assert_eq!(seen.device("h200")?["reset_methods"], json!(["flr", "bus"]));
    Ok(())
}

#[test]
fn lockdown_is_told() -> Result<()> {
    let Some(seen) = look("lockdown")? else { return Ok(()) };
    assert_eq!((&seen.probe["host"]["lockdown"], &seen.probe["host"]["iommu"]), (&json!("integrity"), &json!("on")));
    // It is a real one: the kernel refuses root's writes to config space.
    let write = format!("printf '\\006' | dd of=/sys/bus/pci/devices/{}/config bs=1 seek=4", seen.guest.bdf("gpu0")?);
    let refused = seen.guest.shell(&write, STEP)?;
    assert!(refused.error_text().contains("Operation not permitted"), "{}", refused.error_text());
    assert_eq!(seen.table()?, table([("gpu0", hopper("H100")), ("gpu1", hopper("H100"))]));
    Ok(())
}

#[test]
fn a_kernel_without_iommufd_is_told() -> Result<()> {
    let Some(seen) = look("stock-kernel")? else { return Ok(()) };
    let host = &seen.probe["host"];
    assert_eq!((&host["dev_iommu"], &host["dev_vfio"]), (&json!(false), &json!(true)));
    assert!(host["kernel_release"].as_str().is_some_and(|release| release.contains("deb")), "{host}");
    assert_eq!(seen.table()?, table([("gpu0", hopper("H100")), ("gpu1", hopper("H100"))]));
    assert_eq!(seen.groups()?, 2);
    Ok(())
}

#[test]
fn devices_that_go_away_are_still_told() -> Result<()> {
    let Some(mut seen) = look("mixed")? else { return Ok(()) };
    for (name, fault) in [("gpu0", "off-bus:both"), ("gpu1", "d3cold"), ("gpu2", "off-bus:config:1")] {
        seen.guest.fleet().set_fault(name, fault.parse()?)?;
    }
    seen.probe = probe(&seen.guest)?;
    for (name, liveness) in [("gpu0", "silent"), ("gpu1", "silent"), ("gpu3", "answers")] {
        assert_eq!(seen.device(name)?["liveness"], liveness, "{name}");
    }
    assert_eq!(seen.device("gpu0")?["name"], "H100");
    // It answered once more, and that was used up.
    seen.probe = probe(&seen.guest)?;
    assert_eq!(seen.device("gpu2")?["liveness"], "silent");
    seen.guest.fleet().clear_faults("gpu1")?;
    seen.probe = probe(&seen.guest)?;
    assert_eq!(seen.device("gpu1")?["liveness"], "answers");
    Ok(())
}
