//! `ccnode mode` without Kubernetes: every mode on every kind of node, by the devices' own registers and counters.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::{CHANGE, STEP, lab_is_here, node, own_mode, touches, vector};
use lab::Boot;
use lab::node::{CC_MODE, NODE};
use lab_devices::{Fault, Kind, ModelKind, Space, TraceEvent};
use lab_vm::{Command, Guest, Kernel, Process};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// A booted node.
struct Bench {
    guest: Guest,
    /// Every GPU and NVSwitch by name: model and address.
    devices: BTreeMap<String, (ModelKind, String)>,
}

/// A command that has ended.
struct Ended {
    code: i32,
    out: String,
    notes: String,
}

impl Bench {
    /// Boots a topology, changed a little; none where scenarios do not run.
    fn boot(topology: &str, change: impl FnOnce(&mut Boot)) -> Result<Option<Self>> {
        if !lab_is_here()? {
            return Ok(None);
        }
        let mut boot = Boot::new(topology)?;
        for device in &mut boot.topology.devices {
            device.spec.boot = Duration::from_millis(100);
        }
        change(&mut boot);
        let guest = boot.guest()?;
        let is_part = |model: ModelKind| model.is_gpu() || model.is_switch();
        let specs = guest.topology().devices.iter().map(|device| &device.spec).filter(|spec| is_part(spec.model));
        let devices =
            specs.map(|spec| Ok((spec.name.clone(), (spec.model, guest.bdf(&spec.name)?)))).collect::<Result<_>>()?;
        eprintln!("{topology}: {:?}", guest.boot_times());
        Ok(Some(Self { guest, devices }))
    }

    fn bdf(&self, name: &str) -> &str {
        &self.devices[name].1
    }

    /// Binds every GPU and NVSwitch to vfio-pci.
    fn bind(&self) -> Result<()> {
        for (_, bdf) in self.devices.values() {
            let bind = format!(
                "echo vfio-pci > /sys/bus/pci/devices/{bdf}/driver_override && echo {bdf} > /sys/bus/pci/drivers_probe && \
                 test -e /sys/bus/pci/drivers/vfio-pci/{bdf}"
            );
            let output = self.guest.shell(&bind, STEP)?;
            ensure!(output.success(), "{bdf} is not bound: {}", output.error_text());
        }
        Ok(())
    }

    fn ccnode(&self, words: &[&str]) -> Result<Ended> {
        let output = self.guest.run(&[&["ccnode", "mode"], words].concat(), CHANGE)?;
        let code = output.status.context("no exit code")?.code();
        Ok(Ended { code, out: output.text(), notes: output.error_text() })
    }

    /// `ccnode mode set` as a script runs it: its exit code, and what it says of the devices by their names.
    fn set(&self, mode: &str, flags: &[&str]) -> Result<(i32, BTreeMap<String, Value>)> {
        let ended = self.ccnode(&[&["set", mode, "--yes", "--standalone", "--json"], flags].concat())?;
        let answer: Value = serde_json::from_str(&ended.out)
            .with_context(|| format!("mode set {mode} printed no JSON: {}{}", ended.out, ended.notes))?;
        Ok((ended.code, self.by_name(&answer)?))
    }

    fn by_name(&self, answer: &Value) -> Result<BTreeMap<String, Value>> {
        let list = answer["devices"].as_array().context("no devices")?;
        let name =
            |bdf: &Value| self.devices.iter().find(|(_, (_, own))| *bdf == own[..]).map(|(name, _)| name.clone());
        let named = list.iter().map(|device| Some((name(&device["bdf"])?, device.clone())));
        named.collect::<Option<_>>().context("a device that is not there")
    }

    fn resets(&self) -> Result<BTreeMap<String, u64>> {
        let count = |name: &String| {
            let status = self.guest.fleet().status(name)?;
            Ok((name.clone(), status.flrs + status.bus_resets))
        };
        self.devices.keys().map(count).collect()
    }

    /// The device booted in this mode of its own, its knobs say so too, and nobody spoke to it against the protocol.
    fn is_in(&self, name: &str, own: &str) -> Result<()> {
        e2e::is_in(name, self.devices[name].0, &self.guest.fleet().status(name)?, own)?;
        self.is_untroubled(name)
    }

    fn is_untroubled(&self, name: &str) -> Result<()> {
        e2e::is_untroubled(name, &self.guest.fleet().status(name)?)
    }

    /// Goes through the modes one after the other, and asks for each twice: every device is in it then, was reset once if
    /// that changed its own mode, and not at all the second time.
    fn goes_through(&self, modes: &[&str]) -> Result<()> {
        self.goes_through_with(modes, 0)
    }

    /// The same where owning or opening a device resets it so many times besides.
    fn goes_through_with(&self, modes: &[&str], besides: u64) -> Result<()> {
        for mode in modes {
            let fleet = self.guest.fleet();
            let was_in = |name: &str, own: &str| self.is_in(name, own).is_ok();
            let right: BTreeMap<&String, bool> =
                self.devices.iter().map(|(name, (model, _))| (name, was_in(name, own_mode(*model, mode)))).collect();
            for again in [false, true] {
                let before = self.resets()?;
                fleet.clear_trace();
                let begun = Instant::now();
                let (code, said) = self.set(mode, &[])?;
                let what = || format!("{mode}, again: {again}: {said:#?}");
                ensure!(code == 0, "exit code {code}: {}", what());
                let after = self.resets()?;
                for (name, (model, _)) in &self.devices {
                    let own = own_mode(*model, mode);
                    self.is_in(name, own).with_context(what)?;
                    let resets = after[name] - before[name];
                    let wanted = u64::from(!again && !right[name]);
                    ensure!(
                        resets == wanted + besides,
                        "{name} was reset {resets} times, not {wanted} and {besides}: {}",
                        what()
                    );
                    let device = &said[name];
                    ensure!(device["result"] == "verified" && device["after"] == own, "{}", what());
                    ensure!(device["resets"] == wanted, "{}", what());
                }
                eprintln!("{mode}, again: {again}: {:?}", begun.elapsed());
            }
        }
        Ok(())
    }
}

/// Every mode of a topology, driverless and bound, in one boot each.
fn every_mode(topology: &str, modes: &[&str]) -> Result<()> {
    let Some(bench) = Bench::boot(topology, |_| {})? else { return Ok(()) };
    bench.goes_through(modes)?;
    bench.bind()?;
    bench.goes_through(modes)
}

#[test]
fn every_mode_of_hopper_with_its_switches() -> Result<()> {
    let Some(bench) = Bench::boot("hgx-h100", |_| {})? else { return Ok(()) };
    bench.goes_through(&["on", "ppcie", "devtools", "off"])?;
    bench.bind()?;
    bench.goes_through(&["ppcie", "on", "off", "ppcie"])?;

    // What it is now: from the devices, without a reset; and from nowhere without owning them.
    let before = bench.resets()?;
    let own: Value = serde_json::from_str(&bench.ccnode(&["get", "--own", "--json"])?.out)?;
    for (name, device) in bench.by_name(&own)? {
        let (model, _) = bench.devices[&name];
        for fact in ["active", "configured"] {
            ensure!(device[fact]["value"] == "ppcie" && device[fact]["source"] == "device", "{name}: {device:#}");
        }
        let (_, knobs) = vector(model, "ppcie").context("no mode ppcie")?;
        for (knob, value) in knobs {
            let knobs = device["knobs"]["value"].as_array().context("no knobs")?;
            let found = knobs.iter().find(|state| state["knob"] == *knob).context("a knob is missing")?;
            ensure!(found["value"] == *value || found["value"].is_null(), "{name}: {device:#}");
        }
        let permissions = device["permissions"]["value"].as_array().context("no permissions")?;
        ensure!(permissions.iter().all(|state| state["value"] != 0), "{name}: {device:#}");
    }
    bench.guest.fleet().clear_trace();
    let passive = bench.ccnode(&["get", "--json"])?;
    ensure!(passive.code == 0, "{}", passive.notes);
    for mode in ["on", "ppcie"] {
        let plan = bench.ccnode(&["plan", mode])?;
        ensure!(plan.code == 0 && plan.out.contains("8 x H100"), "{}{}", plan.out, plan.notes);
        ensure!(plan.out.contains("4 x NVSwitch_gen3"), "{}", plan.out);
    }
    let trace = bench.guest.fleet().trace();
    ensure!(touches(&trace).iter().all(|event| event.kind == Kind::Read), "looking has touched: {:?}", touches(&trace));

    // The plan that owns is exact.
    let plan = bench.ccnode(&["plan", "on", "--own"])?;
    for line in ["PPCIE (45) 1 -> 0", "CCM (8) 0 -> 1", "exclude each other", "knobs take effect at a reset"] {
        ensure!(plan.out.contains(line), "no {line:?} in\n{}{}", plan.out, plan.notes);
    }
    let plan = bench.ccnode(&["plan", "ppcie", "--own"])?;
    ensure!(plan.out.matches("nothing to do: it is so already").count() == 2, "{}", plan.out);
    println!("{}", plan.out);
    ensure!(bench.resets()? == before, "looking has reset a device");
    Ok(())
}

#[test]
fn every_mode_of_other_baseboards() -> Result<()> {
    every_mode("h200x8-nvswitch", &["ppcie", "devtools", "on", "off"])?;
    every_mode("b200x8", &["on", "devtools", "off"])
}

#[test]
fn every_mode_of_blackwell_workstations() -> Result<()> {
    every_mode("rtx-pro-6000", &["on", "devtools", "off"])
}

/// Where a device can only be reached by opening it, that and closing it reset it, too; and a look alone is refused.
#[test]
fn every_mode_under_lockdown_and_without_group_files() -> Result<()> {
    const MODES: [&str; 3] = ["on", "devtools", "off"];
    for (topology, kernel, why, code) in [
        ("lockdown", Kernel::Iommufd, "the kernel is locked down", "Lockdown"),
        ("h100x2", Kernel::NoGroup, "the kernel has no VFIO group files", "NoGroupFile"),
    ] {
        let Some(bench) = Bench::boot(topology, |boot| boot.kernel = Some(kernel))? else { return Ok(()) };
        // A device without driver is bound for it, and opened like the others.
        bench.goes_through_with(&MODES, 2)?;
        bench.bind()?;
        bench.goes_through_with(&MODES, 2)?;
        let before = bench.resets()?;
        let own = bench.ccnode(&["get", "--own", "--json"])?;
        assert_eq!(own.code, 1);
        for device in bench.by_name(&serde_json::from_str(&own.out)?)?.values() {
            ensure!(device["error"]["code"] == code, "{device:#}");
        }
        let plan = bench.ccnode(&["plan", "on", "--own"])?;
        ensure!(plan.code == 1, "{}", plan.out);
        ensure!(bench.resets()? == before, "a look has reset a device");
        let told = bench.ccnode(&["set", "off", "--yes", "--standalone"])?;
        ensure!(told.notes.contains(&format!("Reached through vfio, {why}: 2 of 2 devices")), "{}", told.notes);
        let told = bench.ccnode(&["set", "off", "--yes", "--standalone", "--access", "sysfs"])?;
        ensure!(told.code != 0 && (told.notes.clone() + &told.out).contains(": "), "{}{}", told.out, told.notes);
    }
    Ok(())
}

#[test]
fn protected_pcie_is_refused_off_hopper() -> Result<()> {
    let Some(bench) = Bench::boot("rtx-pro-6000", |_| {})? else { return Ok(()) };
    bench.guest.fleet().clear_trace();
    let (code, said) = bench.set("ppcie", &[])?;
    assert_eq!(code, 2);
    for device in said.values() {
        ensure!(device["result"] == "refused" && device["error"]["code"] == "Unsupported", "{device:#}");
        ensure!(device["error"]["message"].as_str().is_some_and(|text| text.contains("mode on")), "{device:#}");
    }
    let trace = bench.guest.fleet().trace();
    ensure!(touches(&trace).is_empty(), "{:?}", touches(&trace));
    Ok(())
}

#[test]
fn c2c_models_need_the_firmwares_leave() -> Result<()> {
    let Some(bench) = Bench::boot("gb200", |_| {})? else { return Ok(()) };
    // Two of the four have it.
    let plan = bench.ccnode(&["plan", "on", "--own"])?;
    ensure!(plan.code == 1 && plan.out.contains("status bit 8"), "{}{}", plan.out, plan.notes);
    let (code, said) = bench.set("on", &[])?;
    assert_eq!(code, 1);
    for name in ["gpu0", "gpu1"] {
        bench.is_in(name, "on")?;
        ensure!(said[name]["result"] == "verified", "{:#}", said[name]);
    }
    for name in ["gpu2", "gpu3"] {
        bench.is_in(name, "off")?;
        let error = &said[name]["error"];
        ensure!(
            error["code"] == "Unsupported" && error["reason"].as_str().is_some_and(|it| it.contains("bit 8")),
            "{error}"
        );
    }
    bench.goes_through(&["off"])?;

    let all = |boot: &mut Boot| boot.topology.devices.iter_mut().for_each(|device| device.spec.bmsai = true);
    let Some(bench) = Bench::boot("gb200", all)? else { return Ok(()) };
    bench.goes_through(&["on", "devtools", "off"])?;
    bench.bind()?;
    bench.goes_through(&["on", "off"])
}

#[test]
fn what_cannot_be_in_a_mode_is_named() -> Result<()> {
    let Some(bench) = Bench::boot("mixed", |_| {})? else { return Ok(()) };
    for bound in [false, true] {
        if bound {
            bench.bind()?;
        }
        bench.guest.fleet().clear_trace();
        let (code, said) = bench.set("on", &[])?;
        assert_eq!(code, 2);
        let codes = ["gpu0", "gpu1", "gpu2", "gpu3"].map(|name| said[name]["error"]["code"].clone());
        assert_eq!(codes, [json!(null), json!(null), json!("Unsupported"), json!("UnknownDevice")]);
        let trace = bench.guest.fleet().trace();
        ensure!(touches(&trace).is_empty(), "{:?}", touches(&trace));
        // The others by themselves can.
        let some = ["--device", bench.bdf("gpu0"), "--device", bench.bdf("gpu1")];
        let (code, said) = bench.set("on", &some)?;
        assert_eq!((code, said.len()), (0, 2));
        for name in ["gpu0", "gpu1"] {
            bench.is_in(name, "on")?;
        }
        // Off is each device's own.
        let (code, said) = bench.set("off", &[])?;
        assert_eq!(code, 1, "one device is not known to be off");
        let results = ["gpu0", "gpu1", "gpu2", "gpu3"].map(|name| said[name]["result"].clone());
        assert_eq!(results, ["verified", "verified", "always-off", "refused"]);
        ensure!(said["gpu3"]["error"]["code"] == "UnknownDevice", "{:#}", said["gpu3"]);
        for name in ["gpu0", "gpu1"] {
            bench.is_in(name, "off")?;
        }
        for name in ["gpu2", "gpu3"] {
            bench.is_untroubled(name)?;
            ensure!(said[name]["resets"] == 0, "{:#}", said[name]);
        }
    }
    Ok(())
}

/// A process of the guest that holds a device's VFIO group.
fn hold_group(bench: &Bench, name: &str) -> Result<Process> {
    let link = format!("basename $(readlink /sys/bus/pci/devices/{}/iommu_group)", bench.bdf(name));
    let group = bench.guest.shell(&link, STEP)?.text();
    let hold = format!("exec 9<>/dev/vfio/{group}; echo held; exec sleep 600");
    let process = bench.guest.spawn(Command::shell(&hold))?;
    process.wait_output(STEP, |text| text.contains("held"))?;
    Ok(process)
}

#[test]
fn a_device_in_use_keeps_all_from_being_touched() -> Result<()> {
    let Some(bench) = Bench::boot("hgx-h100", |_| {})? else { return Ok(()) };
    bench.bind()?;
    let holder = hold_group(&bench, "gpu5")?;
    bench.guest.fleet().clear_trace();
    let (code, said) = bench.set("on", &[])?;
    assert_eq!(code, 2);
    let error = &said["gpu5"]["error"];
    ensure!(error["code"] == "InUse", "{error}");
    let pids: Vec<i64> =
        error["holders"].as_array().into_iter().flatten().filter_map(|it| it["pid"].as_i64()).collect();
    assert_eq!(pids, [i64::from(holder.pid())], "{error}");
    ensure!(said.iter().all(|(name, device)| name == "gpu5" || device["error"].is_null()), "{said:#?}");
    // For people, too, and in plan and get.
    let pid = format!("pid {}", holder.pid());
    let told = bench.ccnode(&["set", "on", "--yes"])?;
    ensure!(
        told.code == 2 && told.notes.contains(&pid) && told.notes.contains("Nothing was touched"),
        "{}",
        told.notes
    );
    let plan = bench.ccnode(&["plan", "on"])?;
    ensure!(plan.code == 1 && plan.out.contains(&pid), "{}", plan.out);
    let get = bench.ccnode(&["get"])?;
    ensure!(get.code == 0 && get.out.contains(&pid), "{}", get.out);
    let trace = bench.guest.fleet().trace();
    let writes: Vec<&TraceEvent> = touches(&trace).into_iter().filter(|event| event.kind != Kind::Read).collect();
    ensure!(writes.is_empty(), "something was touched: {writes:?}");
    // The held one is not looked at either; the others are when owned.
    let own = bench.ccnode(&["get", "--own", "--json"])?;
    assert_eq!(own.code, 1);
    let own = bench.by_name(&serde_json::from_str(&own.out)?)?;
    ensure!(own["gpu5"]["error"]["code"] == "InUse" && own["gpu4"]["active"]["value"] == "off", "{own:#?}");
    ensure!(bench.guest.fleet().trace().iter().all(|event| *event.device != *"gpu5" || event.space != Space::Bar0));
    holder.signal(Signal::SIGKILL)?;
    holder.wait(STEP)?;
    let (code, _) = bench.set("on", &[])?;
    assert_eq!(code, 0);
    Ok(())
}

fn start(bench: &Bench, mode: &str) -> Result<Process> {
    Ok(bench.guest.spawn(Command::new(["ccnode", "mode", "set", mode, "--yes", "--standalone"]))?)
}

#[test]
fn of_two_at_once_one_works_and_the_other_names_it() -> Result<()> {
    for bound in [false, true] {
        let Some(bench) = Bench::boot("h100x2", |_| {})? else { return Ok(()) };
        if bound {
            bench.bind()?;
        }
        bench.guest.fleet().set_fault("gpu1", Fault::BootSlow(3000))?;
        let first = start(&bench, "on")?;
        first.wait_output(STEP, |text| text.contains("reset begun"))?;
        let (code, said) = bench.set("off", &[])?;
        assert_eq!(code, 2);
        let error = &said["gpu0"]["error"];
        let holder = format!("pid {} (ccnode mode set)", first.pid());
        ensure!(error["code"] == "LockHeld" && error["holder"] == holder, "{error}");
        ensure!(first.wait(CHANGE)?.success(), "{}", first.output().error_text());
        for name in ["gpu0", "gpu1"] {
            bench.is_in(name, "on")?;
        }
    }
    Ok(())
}

#[test]
fn asked_to_stop_it_stops_where_nothing_is_lost() -> Result<()> {
    // Firmware that takes its time.
    let slow = |boot: &mut Boot| {
        for device in &mut boot.topology.devices {
            device.spec.fsp_latency = Duration::from_millis(60);
        }
    };
    let Some(bench) = Bench::boot("h100x2", slow)? else { return Ok(()) };
    let before = bench.resets()?;
    let knobs = |name: &str| Ok::<_, anyhow::Error>(bench.guest.fleet().status(name)?.knobs);
    let at_first = knobs("gpu0")?;
    let first = start(&bench, "on")?;
    first.wait_output(STEP, |text| text.contains("knob BAR0_DECOUPLER (10) 0 -> 2"))?;
    first.signal(Signal::SIGINT)?;
    let code = first.wait(CHANGE)?.code();
    let (out, notes) = (first.output().text(), first.output().error_text());
    ensure!(code == 1 && notes.contains("Stopping: knobs"), "exit code {code}\n{out}\n{notes}");
    ensure!(out.contains("Stopped") && out.contains("Mode on: stopped"), "{out}");
    for name in ["gpu0", "gpu1"] {
        bench.is_in(name, "off")?;
    }
    ensure!((knobs("gpu0")?, bench.resets()?) == (at_first, before.clone()), "{out}");

    // Once resets are under way it goes on to its end.
    bench.guest.fleet().set_fault("gpu1", Fault::BootSlow(2000))?;
    let second = start(&bench, "on")?;
    second.wait_output(STEP, |text| text.contains("reset begun"))?;
    for (signal, words) in [(Signal::SIGTERM, "Too late to stop"), (Signal::SIGINT, "are not interrupted, and neither")]
    {
        second.signal(signal)?;
        second.wait_output(STEP, |text| text.contains(words))?;
    }
    ensure!(second.wait(CHANGE)?.success(), "{}", second.output().error_text());
    for name in ["gpu0", "gpu1"] {
        bench.is_in(name, "on")?;
    }
    ensure!(bench.resets()?.iter().all(|(name, count)| count - before[name] == 1));

    // Awake and used by nobody, a device shows its mode without being owned.
    let enable = format!("echo 1 > /sys/bus/pci/devices/{}/enable", bench.bdf("gpu0"));
    ensure!(bench.guest.shell(&enable, STEP)?.success(), "{enable} failed");
    bench.guest.fleet().clear_trace();
    let get = bench.by_name(&serde_json::from_str(&bench.ccnode(&["get", "--json"])?.out)?)?;
    let active = &get["gpu0"]["active"];
    ensure!(active["value"] == "on" && active["source"] == "register", "{active:#}");
    let trace = bench.guest.fleet().trace();
    ensure!(touches(&trace).iter().all(|event| event.kind == Kind::Read), "{:?}", touches(&trace));
    bench.is_in("gpu0", "on")
}

#[test]
fn on_a_node_of_cc_manager_the_label_is_told() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "on")])? else { return Ok(()) };
    node.start_cc_manager()?;
    node.await_state("on", "true", CHANGE)?;
    node.guest.fleet().clear_trace();
    let set = |node: &lab::Node, more: &[&str]| {
        node.guest.run(&[&["ccnode", "mode", "set", "off", "--yes"], more].concat(), CHANGE)
    };
    let line = format!("kubectl label node {NODE} nvidia.com/cc.mode=off --overwrite");
    for what in ["is cc-manager", "devices.json was written in this boot"] {
        let refused = set(&node, &[])?;
        let text = refused.error_text();
        ensure!(refused.status.context("no exit code")?.code() == 2, "{text}");
        ensure!(text.contains(&line) && text.contains(what), "{text}");
        if node.agent("cc-manager")?.is_running() {
            node.stop_agent("cc-manager", Signal::SIGTERM)?;
        }
    }
    // Its record is shown, with its time, while the devices cannot be asked without owning them.
    let get = node.look_json(&["ccnode", "mode", "get", "--json"])?;
    for device in get["devices"].as_array().context("no devices")? {
        let fact = &device["configured"];
        ensure!(fact["value"] == "on" && fact["source"] == "record" && fact["at"].is_string(), "{device:#}");
    }
    let trace = node.trace();
    ensure!(touches(&trace).iter().all(|event| event.kind == Kind::Read), "{:?}", touches(&trace));

    let forced = set(&node, &["--standalone"])?;
    ensure!(forced.success(), "{}{}", forced.text(), forced.error_text());
    let file: Value = serde_json::from_slice(&node.guest.get_file("/run/nvidia/ccnode/devices.json")?)?;
    for record in file["devices"].as_array().context("no records")? {
        ensure!(record["activeMode"] == "off" && record["configuredMode"] == "off", "{record:#}");
        ensure!(record["usable"] == false, "{record:#}");
    }
    // Back at work, it sees that the devices are not what the label says.
    node.start_cc_manager()?;
    let deadline = Instant::now() + CHANGE;
    while e2e::registers_say(&node, "on").is_err() {
        ensure!(Instant::now() < deadline, "{}", node.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    node.await_state("on", "true", CHANGE)
}

/// Numbers that are the same in every run.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Waits until the devices have seen so many knob writes since the trace was cleared, or the process has ended.
fn await_writes(bench: &Bench, process: &Process, wanted: u64) -> Result<()> {
    let is_write = |event: &&TraceEvent| {
        event.kind == Kind::Rpc && event.note.as_ref().is_some_and(|note| note.get(4..8) == Some("020D"))
    };
    let deadline = Instant::now() + STEP;
    loop {
        let writes = bench.guest.fleet().trace().iter().filter(is_write).count() as u64;
        if writes >= wanted || process.status().is_some() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("no {wanted} knob writes: {}", process.output().error_text());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn killed_anywhere_the_next_run_finishes() -> Result<()> {
    const KILLS: u64 = 120;
    let quick = |boot: &mut Boot| {
        for device in &mut boot.topology.devices {
            device.spec.boot = Duration::from_millis(40);
            device.spec.fsp_latency = Duration::from_millis(2);
        }
    };
    let Some(bench) = Bench::boot("h100x2", quick)? else { return Ok(()) };
    let names: Vec<&String> = bench.devices.keys().collect();
    let mut seeded = Seeded(0x0cc4);
    let (mut alive, mut between, mut reset_by_others) = (0, 0, 0);
    let begun = Instant::now();
    let mut mode = "off";
    for kill in 0..KILLS {
        if kill == KILLS / 2 {
            bench.bind()?;
        }
        let others: Vec<&str> = ["off", "on", "devtools"].into_iter().filter(|other| *other != mode).collect();
        let target = others[usize::try_from(seeded.below(2))?];
        let what = || format!("kill {kill}: from {mode} to {target}");
        bench.guest.fleet().clear_trace();
        let process = start(&bench, target)?;
        if seeded.below(2) == 0 {
            await_writes(&bench, &process, 1 + seeded.below(4))?;
            std::thread::sleep(Duration::from_micros(seeded.below(4000)));
        } else {
            std::thread::sleep(Duration::from_millis(seeded.below(250)));
        }
        alive += u64::from(process.status().is_none());
        // It may have ended just now.
        let _ = process.signal(Signal::SIGKILL);
        process.wait(STEP)?;
        between +=
            u64::from(names.iter().any(|name| bench.is_in(name, mode).is_err() && bench.is_in(name, target).is_err()));
        if seeded.below(3) == 0 {
            // Somebody else resets the GPUs meanwhile, and the knobs take effect as they are.
            for name in &names {
                let reset = format!("echo 1 > /sys/bus/pci/devices/{}/reset", bench.bdf(name));
                ensure!(bench.guest.shell(&reset, STEP)?.success(), "{reset} failed");
            }
            reset_by_others += 1;
        }
        let (code, said) = bench.set(target, &[]).with_context(what)?;
        ensure!(code == 0, "{}: {said:#?}", what());
        for name in &names {
            bench.is_in(name, target).with_context(what)?;
            ensure!(said[*name]["resets"].as_u64().is_some_and(|resets| resets <= 1), "{}: {said:#?}", what());
        }
        // No reset in between has activated a forbidden vector.
        for boot in bench.guest.fleet().trace().iter().filter(|event| event.kind == Kind::Ready) {
            let state = boot.value & 0x23;
            ensure!(matches!(state, 0 | 1 | 3), "{}: {} booted with {state:#x}", what(), boot.device);
        }
        mode = target;
    }
    println!(
        "{KILLS} kills (seed 0x0cc4): {alive} while it ran, {between} between two modes, {reset_by_others} followed by foreign \
         resets; {:?}",
        begun.elapsed()
    );
    ensure!(alive >= 100, "only {alive} of {KILLS} kills came while it ran");
    ensure!(between >= 25, "only {between} of {KILLS} kills came between two modes");
    Ok(())
}
