//! What the device plugin tells is what is there: on every topology, through both VFIO interfaces and under every kind of name,
//! as the kubelet and as Kata see it; when devices fail, vanish and return; and around a change of modes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, PGPU, STEP, await_that, gpu_bdfs, hold_group, node, registers_say, release, whole_trace};
use lab::Node;
use lab::node::{CC_MODE, field};
use lab_devices::fault::FORMS;
use lab_devices::{Fault, ModelKind, trace};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A unit as it should be: the functions that VFIO has of one IOMMU group with a GPU or switch in it, by address.
#[derive(Debug)]
struct Expected {
    group: u64,
    /// The GPU or switch; the first where there are more.
    lead: Value,
    /// Every function on VFIO, GPUs and switches first.
    functions: Vec<Value>,
}

/// How the plugin is started.
#[derive(Clone, Copy, Debug)]
struct Setting {
    backend: &'static str,
    /// GPUs and switches; none: unset.
    aliases: Option<[&'static str; 2]>,
    ids: &'static str,
}

const SETTINGS: [Setting; 4] = [
    Setting { backend: "auto", aliases: None, ids: "auto" },
    Setting { backend: "legacy", aliases: Some(["tee", "fabric"]), ids: "auto" },
    Setting { backend: "auto", aliases: Some(["", ""]), ids: "auto" },
    Setting { backend: "auto", aliases: None, ids: "iommu" },
];

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The units that the guest's kernel has, as `ccnode probe` tells of its devices.
fn expected(node: &Node) -> Result<(bool, Vec<Expected>)> {
    let probe = node.look_json(&["ccnode", "probe", "--json"])?;
    let devices = probe["devices"].as_array().context("no devices")?;
    let is_main = |device: &Value| device["kind"] == "gpu" || device["kind"] == "nvswitch";
    let on_vfio = |device: &&Value| text(&device["driver"]).contains("vfio");
    let mut groups: BTreeMap<u64, Vec<Value>> = BTreeMap::new();
    for device in devices.iter().filter(on_vfio) {
        groups.entry(device["iommu_group"].as_u64().context("no group")?).or_default().push(device.clone());
    }
    let units = groups.into_iter().filter_map(|(group, mut functions)| {
        functions.sort_by_key(|function| (!is_main(function), text(&function["bdf"])));
        let lead = functions.first().filter(|first| is_main(first))?.clone();
        Some(Expected { group, lead, functions })
    });
    Ok((probe["host"]["dev_iommu"] == true, units.collect()))
}

impl Setting {
    fn uses_cdevs(self, has_iommufd: bool) -> bool {
        self.backend == "auto" && has_iommufd
    }

    /// The name of a unit's resource (operator-contract section 7.5).
    fn resource(self, unit: &Expected) -> String {
        let kind = usize::from(unit.lead["kind"] == "nvswitch");
        let name = match self.aliases {
            None => ["pgpu", "nvswitch"][kind].to_owned(),
            Some(["", ""]) => match unit.lead["pci_ids_name"].as_str() {
                Some(name) => {
                    let joined = name.to_uppercase().split_whitespace().collect::<Vec<_>>().join("_");
                    joined.replace(['/', '.'], "_").replace(['[', ']'], "")
                }
                None => format!("GPU_{:04X}", unit.lead["device"].as_u64().unwrap_or_default()),
            },
            Some(aliases) => aliases[kind].to_owned(),
        };
        format!("nvidia.com/{name}")
    }

    fn id(self, unit: &Expected, has_iommufd: bool) -> String {
        match self.ids {
            "iommu" if self.uses_cdevs(has_iommufd) => text(&unit.lead["vfio_cdev"]["name"]).replace("vfio", ""),
            "iommu" => unit.group.to_string(),
            _ => text(&unit.lead["bdf"]),
        }
    }

    fn nodes(self, unit: &Expected, has_iommufd: bool) -> Vec<String> {
        if self.uses_cdevs(has_iommufd) {
            let cdev = |function: &Value| format!("/dev/vfio/devices/{}", text(&function["vfio_cdev"]["name"]));
            unit.functions.iter().map(cdev).collect()
        } else {
            vec![format!("/dev/vfio/{}", unit.group)]
        }
    }

    fn start(self, node: &mut Node) -> Result<()> {
        let mut env = vec![("VFIO_BACKEND", self.backend), ("DEVICE_ID_SCHEME", self.ids), ("POLL_INTERVAL", "1h")];
        if let Some([gpus, switches]) = self.aliases {
            env.extend([("P_GPU_ALIAS", gpus), ("NVSWITCH_ALIAS", switches)]);
        }
        node.start_agent(&["device-plugin"], &env)
    }
}

/// `id health` of every device that the kubelet knows of a resource.
fn kubelets_list(node: &Node, resource: &str) -> Result<BTreeSet<String>> {
    let dump = node.kubelet()?;
    let devices = dump["resources"][resource]["devices"].as_array().cloned().unwrap_or_default();
    Ok(devices.iter().map(|device| format!("{} {}", text(&device["id"]), text(&device["health"]))).collect())
}

/// The kubelet's list, the CDI folder, and what Kata would plug in for pods that take everything.
fn all_agree(node: &Node, setting: Setting, has_iommufd: bool, units: &[Expected]) -> Result<()> {
    let mut by_resource: BTreeMap<String, Vec<&Expected>> = BTreeMap::new();
    for unit in units {
        by_resource.entry(setting.resource(unit)).or_default().push(unit);
    }
    for (resource, units) in &by_resource {
        node.await_allocatable(resource, units.len(), STEP)?;
        let told = kubelets_list(node, resource)?;
        let wanted: BTreeSet<String> =
            units.iter().map(|unit| format!("{} Healthy", setting.id(unit, has_iommufd))).collect();
        ensure!(told == wanted, "{resource}: {told:?}, not {wanted:?}");
    }
    // Where nothing was ever to be written the folder is not made.
    let listed = node.guest.shell("ls -A /var/run/cdi 2>/dev/null || true", STEP)?.text();
    let files: BTreeSet<String> = listed.split_whitespace().map(ToOwned::to_owned).collect();
    let wanted: BTreeSet<String> = by_resource.keys().map(|name| format!("{}.yaml", name.replace('/', "-"))).collect();
    ensure!(files == wanted, "CDI files {files:?}, not {wanted:?}");
    for (number, (resource, units)) in by_resource.iter().enumerate() {
        let pod = format!("all-{number}-{}", node.api.resource_version());
        node.create_pod(&pod, resource, units.len())?;
        node.await_pod(&pod, "Running", STEP)?;
        let resolved = node.look_json(&["lab-kubelet", "resolve", &format!("default/{pod}")])?;
        let devices = resolved["devices"].as_array().context("no devices")?;
        ensure!(devices.len() == units.len(), "{resolved:#}");
        for unit in units {
            let id = setting.id(unit, has_iommufd);
            let device =
                devices.iter().find(|device| device["id"] == *id).with_context(|| format!("{id}: {resolved:#}"))?;
            let list =
                |name: &str| -> Vec<String> { device[name].as_array().into_iter().flatten().map(text).collect() };
            ensure!(list("nodes") == setting.nodes(unit, has_iommufd), "{device:#}");
            let plugged = list("bdfs");
            let is_plugged = |function: &Value| plugged.contains(&text(&function["bdf"]));
            ensure!(unit.functions.iter().all(is_plugged), "{device:#}, not {unit:#?}");
        }
        node.api.delete("pods", "default", &pod, Some(0))?;
    }
    Ok(())
}

fn is_offered_as_it_is(topology: &str, count: usize) -> Result<()> {
    let Some(mut node) = node(topology, &[])? else { return Ok(()) };
    node.guest.shell("BIND_NVSWITCHES=true vfio-manager run --once", CHANGE)?;
    node.start_kubelet()?;
    let (has_iommufd, units) = expected(&node)?;
    ensure!(units.len() == count, "{count} units are expected: {units:#?}");
    for setting in SETTINGS {
        setting.start(&mut node)?;
        if count == 0 {
            // Nothing is registered and nothing written; wait for its first look.
            await_that("the plugin has looked", &node, || {
                Ok(!node.agent("device-plugin")?.events("started").is_empty())
            })?;
        }
        all_agree(&node, setting, has_iommufd, &units)
            .with_context(|| format!("{topology} {setting:?}\n{}", node.logs()))?;
        node.stop_agent("device-plugin", Signal::SIGTERM)?;
        // What is left in place for pods that start later is of another setting now.
        node.guest.shell("rm -f /var/run/cdi/*", STEP)?;
    }
    Ok(())
}

#[test]
fn two_gpus_are_offered_as_they_are() -> Result<()> {
    is_offered_as_it_is("h100x2", 2)
}

#[test]
fn gpus_with_audio_are_offered_as_they_are() -> Result<()> {
    is_offered_as_it_is("rtx-pro-6000", 2)
}

#[test]
fn a_mixed_node_is_offered_as_it_is() -> Result<()> {
    is_offered_as_it_is("mixed", 4)
}

#[test]
fn two_gpus_in_one_group_are_offered_as_one() -> Result<()> {
    is_offered_as_it_is("acs-off", 1)
}

#[test]
fn a_kernel_without_iommufd_offers_groups() -> Result<()> {
    is_offered_as_it_is("stock-kernel", 2)
}

#[test]
fn a_locked_down_kernel_offers_the_same() -> Result<()> {
    is_offered_as_it_is("lockdown", 2)
}

#[test]
fn without_an_iommu_nothing_is_offered() -> Result<()> {
    is_offered_as_it_is("no-iommu", 0)
}

#[test]
fn grace_gpus_are_offered_as_they_are() -> Result<()> {
    is_offered_as_it_is("gb200", 4)
}

#[test]
fn a_blackwell_board_is_offered_as_it_is() -> Result<()> {
    is_offered_as_it_is("b200x8", 8)
}

#[test]
fn a_hopper_board_with_switches_is_offered_as_it_is() -> Result<()> {
    is_offered_as_it_is("hgx-h100", 12)
}

#[test]
fn a_second_hopper_board_with_switches_is_offered_as_it_is() -> Result<()> {
    is_offered_as_it_is("h200x8-nvswitch", 12)
}

/// Waits until the kubelet's list is this.
fn hears(node: &Node, what: &str, wanted: &[String]) -> Result<()> {
    let wanted: BTreeSet<String> = wanted.iter().cloned().collect();
    await_that(what, node, || Ok(kubelets_list(node, PGPU)? == wanted))
        .with_context(|| format!("{wanted:?}, not {:?}", kubelets_list(node, PGPU)))
}

/// A fault of this form.
fn example(form: &str) -> String {
    let values =
        [("MS", "60000"), ("KNOB:CODE", "8:0x202"), ("KNOB", "7"), ("WORD", "0x40001000"), ("PART:ACCESSES", "both")];
    values.iter().fold(form.to_owned(), |text, (name, value)| text.replace(name, value))
}

/// Whether a fault of the lab shows in what can be read of an idle device: its configuration space.
fn shows(form: &str) -> bool {
    matches!(form.split(':').next(), Some("config-all-ones" | "off-bus" | "d3cold"))
}

#[test]
fn the_kubelet_hears_of_death_return_and_absence() -> Result<()> {
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.guest.shell("vfio-manager run --once", CHANGE)?;
    node.start_kubelet()?;
    let bdfs: Vec<String> = ["gpu0", "gpu1"].iter().map(|name| node.guest.bdf(name)).collect::<Result<_, _>>()?;
    let [sick, other] = bdfs.as_slice() else { return Err(anyhow::anyhow!("two GPUs")) };
    let (well, ill) = (format!("{sick} Healthy"), format!("{sick} Unhealthy"));
    let other = format!("{other} Healthy");

    // No event tells of a death: the poll finds it.
    node.start_agent(&["device-plugin"], &[("POLL_INTERVAL", "200ms"), ("FLAP_LIMIT", "0")])?;
    hears(&node, "both", &[well.clone(), other.clone()])?;
    let (mut shown, mut hidden) = (0, 0);
    for form in FORMS {
        let fault: Fault = example(form).parse()?;
        // What is wrong from the start cannot come later.
        if matches!(fault, Fault::NoFlr | Fault::D3hotAtStart) || !fault.applies_to(ModelKind::H100) {
            continue;
        }
        node.guest.fleet().set_fault("gpu0", fault)?;
        if shows(form) {
            hears(&node, form, &[ill.clone(), other.clone()])?;
            shown += 1;
        } else {
            // Longer than a poll takes.
            std::thread::sleep(Duration::from_millis(300));
            hidden += 1;
            ensure!(kubelets_list(&node, PGPU)?.contains(&well), "{form}: what does not show is no reason");
        }
        node.guest.fleet().clear_faults("gpu0")?;
        hears(&node, &format!("after {form}"), &[well.clone(), other.clone()])?;
    }
    eprintln!("{shown} faults were told, {hidden} do not show on an idle device");
    ensure!(shown == 3, "the faults that show have other names now: {FORMS:?}");
    node.stop_agent("device-plugin", Signal::SIGTERM)?;

    // Events alone: no poll comes in this hour.
    node.start_agent(&["device-plugin"], &[("POLL_INTERVAL", "1h")])?;
    hears(&node, "both", &[well.clone(), other.clone()])?;
    for _ in 0..2 {
        let begun = Instant::now();
        node.guest.unplug("gpu0", STEP)?;
        hears(&node, "unplugged", std::slice::from_ref(&other))?;
        let gone = begun.elapsed();
        node.guest.plug("gpu0")?;
        // It comes without a driver, and is offered once it is bound.
        let is_found = format!("test -e /sys/bus/pci/devices/{sick}");
        await_that("found", &node, || Ok(node.guest.shell(&is_found, STEP)?.success()))?;
        await_that("bound", &node, || Ok(node.guest.shell("vfio-manager run --once", STEP)?.success()))?;
        let begun = Instant::now();
        hears(&node, "plugged", &[well.clone(), other.clone()])?;
        eprintln!(
            "heard of the loss {gone:?} after it was asked for, of the return {:?} after the binding",
            begun.elapsed()
        );
    }
    let unbind = format!("echo {sick} > /sys/bus/pci/drivers/vfio-pci/unbind");
    node.guest.shell(&unbind, STEP)?;
    hears(&node, "unbound", &[ill, other.clone()])?;
    node.guest.shell("vfio-manager run --once", STEP)?;
    hears(&node, "bound again", &[well, other])
}

#[test]
fn a_device_that_outlives_its_pod_in_use_is_in_quarantine_and_status_says_so() -> Result<()> {
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.guest.shell("vfio-manager run --once", CHANGE)?;
    node.start_kubelet()?;
    node.start_agent(&["device-plugin"], &[("POLL_INTERVAL", "500ms")])?;
    node.await_allocatable(PGPU, 2, STEP)?;
    let status =
        |node: &Node| -> Result<String> { Ok(node.guest.run(&["ccnode", "status", "--offline"], STEP)?.text()) };
    let row = |node: &Node, bdf: &str| -> Result<String> {
        let text = status(node)?;
        Ok(text.lines().find(|line| line.starts_with(PGPU) && line.contains(bdf)).unwrap_or_default().to_owned())
    };
    node.create_pod("vm", PGPU, 1)?;
    node.await_pod("vm", "Running", STEP)?;
    let resolved = node.look_json(&["lab-kubelet", "resolve", "default/vm"])?;
    let bdf = text(&resolved["devices"][0]["bdfs"][0]);
    let name = if node.guest.bdf("gpu0")? == bdf { "gpu0" } else { "gpu1" };
    // Its virtual machine starts, and stays when the pod is gone.
    hold_group(&mut node, name)?;
    await_that("the pod is told", &node, || Ok(row(&node, &bdf)?.ends_with("healthy  default/vm")))?;
    node.api.delete("pods", "default", "vm", Some(0))?;
    await_that("quarantine", &node, || Ok(row(&node, &bdf)?.contains("  held")))?;
    node.await_allocatable(PGPU, 1, STEP)?;
    let pid = node.agent("sh")?.process.pid();
    let told = status(&node)?;
    let by = format!("{bdf} is held by pid {pid} (");
    ensure!(told.contains(&by), "{told}");
    // An agent that starts anew meanwhile does not offer it, not for a moment.
    node.stop_agent("device-plugin", Signal::SIGKILL)?;
    node.start_agent(&["device-plugin"], &[("POLL_INTERVAL", "500ms")])?;
    let causes = |node: &Node| -> Result<Vec<String>> {
        let told = node.agent("device-plugin")?.events("unit_health").into_iter();
        let own = told.filter(|(_, line)| field(line, "bdf") == Some(&bdf));
        Ok(own.map(|(_, line)| field(&line, "code").unwrap_or_default().to_owned()).collect())
    };
    node.await_allocatable(PGPU, 1, STEP)?;
    await_that("quarantine again", &node, || Ok(status(&node)?.contains(&by) && row(&node, &bdf)?.contains("  held")))?;
    assert_eq!(causes(&node)?, ["held"]);
    node.create_pod("next", PGPU, 1)?;
    node.await_pod("next", "Running", STEP)?;
    let next = node.look_json(&["lab-kubelet", "resolve", "default/next"])?;
    ensure!(next["devices"][0]["bdfs"][0] != *bdf, "{next:#}");
    node.api.delete("pods", "default", "next", Some(0))?;
    release(&node)?;
    node.await_allocatable(PGPU, 2, STEP)?;
    await_that("healthy", &node, || Ok(row(&node, &bdf)?.contains("  healthy")))?;
    assert_eq!(causes(&node)?, ["held", ""]);
    // An agent that starts anew says the same at once.
    node.stop_agent("device-plugin", Signal::SIGKILL)?;
    node.start_agent(&["device-plugin"], &[("POLL_INTERVAL", "500ms")])?;
    node.await_allocatable(PGPU, 2, STEP)
}

#[test]
fn units_are_withdrawn_before_the_first_write_and_a_pod_of_before_keeps_its_device() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_kubelet()?;
    node.start_vfio_manager()?;
    // The kubelet cannot be asked which pods have GPUs until the change is under way: under the operator never.
    let socket = "/run/late-kubelet.sock";
    node.start_agent(
        &["cc-manager"],
        &[("CCNODE_POD_RESOURCES", socket), ("CCNODE_RETRY_MIN", "500ms"), ("CCNODE_RESYNC", "10s")],
    )?;
    node.start_device_plugin()?;
    node.await_state("off", "false", CHANGE)?;
    node.await_allocatable(PGPU, 2, STEP)?;
    // Admitted, and its virtual machine not yet started.
    node.create_pod("early", PGPU, 1)?;
    node.await_pod("early", "Running", STEP)?;
    let resolve = |node: &Node| node.look_json(&["lab-kubelet", "resolve", "default/early"]);
    let before = resolve(&node)?;
    let group = {
        let bdf = text(&before["devices"][0]["bdfs"][0]);
        let link = node.look(&["readlink", &format!("/sys/bus/pci/devices/{bdf}/iommu_group")])?.text();
        link.trim().rsplit('/').next().unwrap_or_default().to_owned()
    };
    let open = |node: &Node| node.guest.shell(&format!("exec 3<>/dev/vfio/{group}"), STEP);
    ensure!(open(&node)?.success(), "a virtual machine would get it");

    for name in node.gpus() {
        node.guest.fleet().set_fault(&name, Fault::BootSlow(3000))?;
    }
    node.guest.fleet().clear_trace();
    node.ask_for("on")?;
    await_that("withdrawn", &node, || Ok(kubelets_list(&node, PGPU)?.iter().all(|line| line.ends_with(" Unhealthy"))))?;
    // Its virtual machine starts in the middle: Kata finds the device, and the kernel refuses it.
    await_that("owned", &node, || {
        let output = open(&node)?;
        Ok(!output.success() && output.error_text().contains("busy"))
    })?;
    assert_eq!(resolve(&node)?, before, "the CDI file has it all the time");
    node.look(&["ln", "-s", kubelet_api::POD_RESOURCES_SOCKET, socket])?;
    node.await_state("on", "true", CHANGE)?;
    node.await_allocatable(PGPU, 2, STEP)?;
    registers_say(&node, "on")?;
    assert_eq!(resolve(&node)?, before);
    await_that("free again", &node, || Ok(open(&node)?.success()))?;
    // What starts now runs in another mode than the node was in when the pod was admitted.
    let told = node.agent("cc-manager")?.events("early_pod");
    let pods: Vec<_> = told.iter().map(|(_, line)| (field(line, "pod"), field(line, "mode"))).collect();
    assert_eq!(pods, [(Some("default/early"), Some("on"))]);
    it_was_withdrawn_first(&node)
}

/// Every unit was withdrawn before the first knob was written, and was offered again after the last device had booted.
fn it_was_withdrawn_first(node: &Node) -> Result<()> {
    let trace = whole_trace(node)?;
    let (now, trace_now) = (Instant::now(), node.guest.fleet().micros());
    let at = |micros: u64| now.checked_sub(Duration::from_micros(trace_now.saturating_sub(micros))).unwrap_or(now);
    let names = node.gpus();
    let rpcs = names.iter().flat_map(|name| trace::rpcs(&trace, name));
    let writes = rpcs.filter(|rpc| rpc.request.get(2).is_some_and(|word| word & 0xff == 0x0d));
    let first = at(writes.map(|rpc| rpc.micros).min().context("no knob was written")?);
    let booted = trace.iter().filter(|event| event.kind == lab_devices::Kind::Ready).map(|event| event.micros).max();
    let booted = at(booted.context("no device has booted")?);
    let events = node.agent("device-plugin")?.events("unit_health");
    for bdf in gpu_bdfs(node)? {
        let own: Vec<(Instant, bool)> = events
            .iter()
            .filter(|(_, line)| field(line, "bdf") == Some(&bdf))
            .map(|(at, line)| (*at, field(line, "code") == Some("in-transition")))
            .collect();
        let (withdrawn, _) = own
            .iter()
            .find(|(at, is_out)| *is_out && *at < first)
            .with_context(|| format!("{bdf} was not withdrawn before the first write\n{}", node.logs()))?;
        let back = own.iter().rfind(|(_, is_out)| !is_out).map(|(at, _)| *at);
        ensure!(back.is_some_and(|back| back > booted), "{bdf} was offered before it had booted\n{}", node.logs());
        eprintln!("{bdf}: withdrawn {:?} before the first write", first.saturating_duration_since(*withdrawn));
    }
    Ok(())
}
