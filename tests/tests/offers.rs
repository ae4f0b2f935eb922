//! What the device plugin tells is what is there: on every topology, through both VFIO interfaces and under every kind of name,
//! as the kubelet and as Kata see it; when devices fail, vanish and return; and around a change of modes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{
    CHANGE, PGPU, STEP, await_that, bound_in_time, cc_status, devices, hold_group, is_in, lab_is_here, node, own_mode,
    release, vector, whole_trace,
};
use lab::node::field;
use lab::{Boot, Node};
use lab_devices::fault::FORMS;
use lab_devices::{Fault, Kind, ModelKind, TraceEvent, trace};
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

const PLAIN: Setting = Setting { backend: "auto", aliases: None, ids: "auto" };
const GROUPS: Setting = Setting { backend: "legacy", aliases: Some(["tee", "fabric"]), ids: "auto" };
const MODELS: Setting = Setting { backend: "auto", aliases: Some(["", ""]), ids: "auto" };
const NUMBERS: Setting = Setting { backend: "auto", aliases: None, ids: "iommu" };

const SETTINGS: [Setting; 4] = [PLAIN, GROUPS, MODELS, NUMBERS];

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

    fn start(self, node: &mut Node, gate: &str) -> Result<()> {
        let mut env = vec![("VFIO_BACKEND", self.backend), ("DEVICE_ID_SCHEME", self.ids), ("POLL_INTERVAL", "1h")];
        env.push(("CC_GATE", gate));
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

/// A change of modes that cc-manager makes while the plugin runs in one of its settings.
#[derive(Clone, Copy, Debug)]
struct Change {
    setting: Setting,
    /// The mode that cc-manager has verified before, and whose word the plugin needs then; none: cc-manager comes with the
    /// change, finds GPUs in mode on, and the plugin has offered all without it.
    from: Option<&'static str>,
    to: &'static str,
}

const fn change(setting: Setting, from: &'static str, to: &'static str) -> Change {
    Change { setting, from: Some(from), to }
}

/// Every topology stands still in every setting, and then changes its modes in these. Between them every setting meets several
/// topologies, and so does each back end: what is `auto` is groups where the kernel has no iommufd.
const TOPOLOGIES: &[(&str, usize, &[Change])] = &[
    ("h100x2", 2, &[change(GROUPS, "off", "on")]),
    ("rtx-pro-6000", 2, &[change(PLAIN, "off", "on")]),
    // On is of all or none, and neither an A100 nor a GPU that nobody knows can be on.
    ("mixed", 4, &[Change { setting: MODELS, from: None, to: "off" }]),
    ("acs-off", 1, &[change(GROUPS, "off", "on")]),
    ("stock-kernel", 2, &[change(PLAIN, "off", "on"), change(MODELS, "on", "off"), change(NUMBERS, "off", "devtools")]),
    ("lockdown", 2, &[change(NUMBERS, "off", "on")]),
    ("no-iommu", 0, &[change(PLAIN, "off", "on")]),
    ("gb200", 4, &[change(NUMBERS, "off", "on")]),
    ("b200x8", 8, &[change(MODELS, "off", "on")]),
    // All of it is in protected PCIe, and of the GPUs alone there is mode on: their switches stay as they are.
    ("hgx-h100", 12, &[change(GROUPS, "off", "ppcie")]),
    ("h200x8-nvswitch", 12, &[change(PLAIN, "off", "on")]),
];

/// The socket at which cc-manager looks for the kubelet's pods: not there before a change is under way, as under the operator
/// always, since it would not begin a change of devices that a pod has.
const LATE_SOCKET: &str = "/run/late-kubelet.sock";

fn is_offered_as_it_is(topology: &str) -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let &(_, count, changes) =
        TOPOLOGIES.iter().find(|(name, ..)| *name == topology).with_context(|| format!("no row of {topology}"))?;
    let mut boot = Boot::new(topology)?;
    for device in &mut boot.topology.devices {
        // Without it a Grace GPU cannot be changed.
        device.spec.bmsai = device.spec.model == ModelKind::Gb200;
        if let Some((_, knobs)) = vector(device.spec.model, "on").filter(|_| changes.iter().any(|it| it.from.is_none()))
        {
            device.spec.knobs = knobs.iter().copied().collect();
        }
    }
    let mut node = Node::start(boot, &[])?;
    node.guest.shell("BIND_NVSWITCHES=true vfio-manager run --once", CHANGE)?;
    node.start_kubelet()?;
    let (has_iommufd, units) = expected(&node)?;
    ensure!(units.len() == count, "{count} units are expected: {units:#?}");
    for setting in SETTINGS {
        setting.start(&mut node, "off")?;
        if count == 0 {
            // Nothing is registered and nothing written; wait for its first look.
            await_that("the plugin has looked", &node, || {
                Ok(!node.agent("device-plugin")?.events("started").is_empty())
            })?;
        }
        all_agree(&node, setting, has_iommufd, &units)
            .with_context(|| format!("{topology} {setting:?}\n{}", node.logs()))?;
        stop_plugin(&node)?;
    }
    node.start_agent(&["vfio-manager", "run"], &[("BIND_NVSWITCHES", "true")])?;
    for &change in changes {
        goes_through(&mut node, has_iommufd, &units, change)
            .with_context(|| format!("{topology} {change:?}\n{}", node.logs()))?;
        // Its virtual machine ends, and its pod with it.
        if let Ok(sandbox) = node.agent("sh") {
            sandbox.process.signal(Signal::SIGKILL)?;
        }
        for pod in node.api.list("pods") {
            node.api.delete("pods", "default", &text(&pod["metadata"]["name"]), Some(0))?;
        }
        stop_plugin(&node)?;
    }
    Ok(())
}

fn stop_plugin(node: &Node) -> Result<()> {
    node.stop_agent("device-plugin", Signal::SIGTERM)?;
    // What is left in place for pods that start later is of another setting now.
    node.look(&["sh", "-c", "rm -f /var/run/cdi/*"]).map(drop)
}

/// Starts cc-manager as under our chart, which lets it write events.
fn start_cc_manager(node: &mut Node) -> Result<()> {
    node.allow_events();
    let env = [("CCNODE_POD_RESOURCES", LATE_SOCKET), ("CCNODE_RETRY_MIN", "500ms"), ("CCNODE_RESYNC", "10s")];
    node.start_agent(&["cc-manager"], &env)
}

/// Waits until the kubelet has heard of each unit what it is to hear, and of no other.
fn await_health(
    what: &str,
    node: &Node,
    setting: Setting,
    has_iommufd: bool,
    units: &[Expected],
    is_well: impl Fn(&Expected) -> bool,
) -> Result<()> {
    let wanted: BTreeSet<String> = units
        .iter()
        .map(|unit| {
            let health = if is_well(unit) { kubelet_api::HEALTHY } else { kubelet_api::UNHEALTHY };
            format!("{} {} {health}", setting.resource(unit), setting.id(unit, has_iommufd))
        })
        .collect();
    let mut told = BTreeSet::new();
    await_that(what, node, || {
        let dump = node.kubelet()?;
        // A setting of before has left its resources to the kubelet.
        let served =
            dump["resources"].as_object().into_iter().flatten().filter(|(_, of)| of["endpoint"]["stopped"] == false);
        told = served
            .flat_map(|(resource, of)| {
                let devices = of["devices"].as_array().into_iter().flatten();
                devices.map(move |device| format!("{resource} {} {}", text(&device["id"]), text(&device["health"])))
            })
            .collect();
        Ok(told == wanted)
    })
    .with_context(|| format!("{wanted:#?}, not {told:#?}"))
}

/// All CDI files, with their names.
fn cdi_files(node: &Node) -> Result<String> {
    let show = "cd /var/run/cdi 2>/dev/null || exit 0; for file in *; do test -e \"$file\" && echo \"$file\" && cat \"$file\"; done; true";
    Ok(node.look(&["sh", "-c", show])?.text())
}

/// One change of modes: what changes is withdrawn before it is touched, and is back when all of it has been verified; what does
/// not change stays; CDI and what Kata finds are the same all the time; a pod of before whose virtual machine starts in the
/// middle is refused its device, tried again, and gets the new mode, of which it is told.
fn goes_through(node: &mut Node, has_iommufd: bool, units: &[Expected], change: Change) -> Result<()> {
    let Change { setting, from, to } = change;
    node.look(&["rm", "-f", LATE_SOCKET])?;
    node.ask_for(from.unwrap_or(to))?;
    if let Some(from) = from {
        if node.agent("cc-manager").is_err() {
            start_cc_manager(node)?;
        }
        node.await_state(from, ready_state(from), CHANGE)?;
    }
    setting.start(node, if from.is_some() { "require" } else { "off" })?;

    let was = from.unwrap_or("on");
    let parts: Vec<(String, ModelKind)> =
        devices(node).into_iter().map(|(name, model)| (name.to_owned(), model)).collect();
    let models: BTreeMap<String, ModelKind> =
        parts.iter().map(|(name, model)| Ok((node.guest.bdf(name)?, *model))).collect::<Result<_>>()?;
    let model = |unit: &Expected| models.get(&text(&unit.lead["bdf"])).copied().unwrap_or(ModelKind::UnknownGpu);
    let changes = |model: ModelKind| own_mode(model, was) != own_mode(model, to);
    let is_known = |model: ModelKind| vector(model, "off").is_some();
    let stays = |unit: &Expected| !changes(model(unit));
    let touched: Vec<&(String, ModelKind)> =
        parts.iter().filter(|(_, model)| changes(*model) && is_known(*model)).collect();
    let is_well_after = |unit: &Expected| model(unit) != ModelKind::UnknownGpu;

    await_health("all are offered", node, setting, has_iommufd, units, |_| true)?;
    let cdi = cdi_files(node)?;
    // Admitted, and its virtual machine not yet started.
    let pod = format!("early-{}", node.api.resource_version());
    let resolve = |node: &Node| node.look_json(&["lab-kubelet", "resolve", &format!("default/{pod}")]);
    let early = units.iter().find(|unit| is_known(model(unit)) && !stays(unit));
    let mut found = Value::Null;
    if let Some(unit) = early {
        let resource = setting.resource(unit);
        let count = units.iter().filter(|other| setting.resource(other) == resource).count();
        node.await_allocatable(&resource, count, STEP)?;
        node.create_pod(&pod, &resource, 1)?;
        node.await_pod(&pod, "Running", STEP)?;
        found = resolve(node)?;
    }

    for (name, _) in &touched {
        // Until it is let go on.
        node.guest.fleet().set_fault(name, Fault::BootSlow(600_000))?;
    }
    node.guest.fleet().clear_trace();
    match from {
        Some(_) => node.ask_for(to)?,
        None => start_cc_manager(node)?,
    }
    await_health("withdrawn", node, setting, has_iommufd, units, stays)?;
    await_that("owned", node, || Ok(first_touch(&whole_trace(node)?, &touched).is_some()))?;
    // Its time stands still, so that nobody need hurry.
    node.agent("cc-manager")?.process.signal(Signal::SIGSTOP)?;
    ensure!(cdi_files(node)? == cdi, "the CDI files have changed from\n{cdi}\nto\n{}", cdi_files(node)?);
    if early.is_some() {
        ensure!(resolve(node)? == found, "Kata finds {:#}, not {found:#}", resolve(node)?);
        // Kata finds the device, and the kernel refuses it.
        node.start_agent(&["sh", "-c", &format!("exec lab-kubelet sandbox default/{pod}")], &[])?;
        let is_refused = |text: &str| text.matches("refused: ").count() > 1 && text.contains("busy");
        node.agent("sh")?.process.wait_output(STEP, is_refused)?;
    }
    node.look(&["ln", "-s", kubelet_api::POD_RESOURCES_SOCKET, LATE_SOCKET])?;
    let let_go = Instant::now();
    for (name, _) in &touched {
        node.guest.fleet().clear_faults(name)?;
    }
    node.agent("cc-manager")?.process.signal(Signal::SIGCONT)?;

    match from {
        Some(_) => node.await_state(to, ready_state(to), CHANGE)?,
        None => node.await_state("failed", "", CHANGE)?,
    }
    await_health("back", node, setting, has_iommufd, units, is_well_after)?;
    ensure!(cdi_files(node)? == cdi, "the CDI files have changed from\n{cdi}\nto\n{}", cdi_files(node)?);
    for (name, model) in &touched {
        is_in(name, *model, &node.device(name)?, own_mode(*model, to))?;
    }
    if early.is_some() {
        ensure!(resolve(node)? == found, "Kata finds {:#}, not {found:#}", resolve(node)?);
        node.agent("sh")?.process.wait_output(STEP, |text| text.contains("started"))?;
        it_was_told_once(node, &pod, to)?;
        await_health("in use", node, setting, has_iommufd, units, is_well_after)?;
    }
    let first = first_touch(&whole_trace(node)?, &touched).map_or(let_go, |micros| moment(node, micros));
    it_was_withdrawn_first(node, units, [first, let_go], stays, is_well_after)
}

/// What the gate says of a node in this mode.
fn ready_state(mode: &str) -> &'static str {
    match mode {
        "on" | "ppcie" => "true",
        "off" => "false",
        _ => "",
    }
}

/// When an event of the trace was.
fn moment(node: &Node, micros: u64) -> Instant {
    let age = Duration::from_micros(node.guest.fleet().micros().saturating_sub(micros));
    Instant::now().checked_sub(age).unwrap_or_else(Instant::now)
}

/// When the first knob was written, or the first device reset, which is what opening one does.
fn first_touch(trace: &[TraceEvent], devices: &[&(String, ModelKind)]) -> Option<u64> {
    let rpcs = devices.iter().flat_map(|(name, _)| trace::rpcs(trace, name));
    let writes = rpcs.filter(|rpc| rpc.request.get(2).is_some_and(|word| word & 0xff == 0x0d)).map(|rpc| rpc.micros);
    let is_reset = |event: &&TraceEvent| matches!(event.kind, Kind::Flr | Kind::BusReset);
    writes.chain(trace.iter().filter(is_reset).map(|event| event.micros)).min()
}

/// An event of the node tells of the pod that was admitted before, and one alone.
fn it_was_told_once(node: &Node, pod: &str, mode: &str) -> Result<()> {
    let told = || -> Vec<String> {
        let events = node.api.list("events").into_iter();
        let early = events.filter(|event| event["reason"] == "PodAdmittedBeforeChange");
        early.map(|event| text(&event["message"])).filter(|note| note.contains(&format!("default/{pod} "))).collect()
    };
    await_that("the event", node, || Ok(!told().is_empty()))?;
    let notes = told();
    ensure!(notes.len() == 1 && notes[0].contains(&format!("mode {mode}")), "{notes:#?}");
    let logged = node.agent("cc-manager")?.events("early_pod");
    let logged = logged.iter().filter(|(_, line)| field(line, "pod") == Some(&format!("default/{pod}")));
    ensure!(logged.count() == 1, "{}", node.logs());
    Ok(())
}

/// Every unit that changes was withdrawn before the first touch, and not offered again before the devices were let boot; every
/// other one was well all the time.
fn it_was_withdrawn_first(
    node: &Node,
    units: &[Expected],
    [first, let_go]: [Instant; 2],
    stays: impl Fn(&Expected) -> bool,
    is_well_after: impl Fn(&Expected) -> bool,
) -> Result<()> {
    let events = node.agent("device-plugin")?.events("unit_health");
    // Where others stay it is no change of the node.
    let cause = if units.iter().any(&stays) { "cc-not-usable" } else { "in-transition" };
    for unit in units {
        let bdf = text(&unit.lead["bdf"]);
        let own: Vec<(Instant, Option<&str>)> = events
            .iter()
            .filter(|(_, line)| field(line, "bdf") == Some(&bdf))
            .map(|(at, line)| (*at, field(line, "code")))
            .collect();
        if stays(unit) {
            ensure!(matches!(own[..], [(_, None)]), "{bdf} was not well all the time: {own:?}");
            continue;
        }
        let (withdrawn, _) = own
            .iter()
            .find(|(at, code)| *code == Some(cause) && *at < first)
            .with_context(|| format!("{bdf} was not withdrawn before the first touch: {own:?}"))?;
        let back: Vec<Instant> =
            own.iter().filter(|(at, code)| code.is_none() && at > withdrawn).map(|(at, _)| *at).collect();
        ensure!(back.iter().all(|at| *at > let_go), "{bdf} was offered before it had booted: {own:?}");
        ensure!(back.is_empty() != is_well_after(unit), "{bdf}: {own:?}");
        eprintln!("{bdf}: withdrawn {:?} before the first touch", first.saturating_duration_since(*withdrawn));
    }
    Ok(())
}

#[test]
fn two_gpus_are_offered_as_they_are() -> Result<()> {
    is_offered_as_it_is("h100x2")
}

#[test]
fn gpus_with_audio_are_offered_as_they_are() -> Result<()> {
    is_offered_as_it_is("rtx-pro-6000")
}

#[test]
fn a_mixed_node_is_offered_as_it_is() -> Result<()> {
    is_offered_as_it_is("mixed")
}

#[test]
fn two_gpus_in_one_group_are_offered_as_one() -> Result<()> {
    is_offered_as_it_is("acs-off")
}

#[test]
fn a_kernel_without_iommufd_offers_groups() -> Result<()> {
    is_offered_as_it_is("stock-kernel")
}

#[test]
fn a_locked_down_kernel_offers_the_same() -> Result<()> {
    is_offered_as_it_is("lockdown")
}

#[test]
fn without_an_iommu_nothing_is_offered() -> Result<()> {
    is_offered_as_it_is("no-iommu")
}

#[test]
fn grace_gpus_are_offered_as_they_are() -> Result<()> {
    is_offered_as_it_is("gb200")
}

#[test]
fn a_blackwell_board_is_offered_as_it_is() -> Result<()> {
    is_offered_as_it_is("b200x8")
}

#[test]
fn a_hopper_board_with_switches_is_offered_as_it_is() -> Result<()> {
    is_offered_as_it_is("hgx-h100")
}

#[test]
fn a_second_hopper_board_with_switches_is_offered_as_it_is() -> Result<()> {
    is_offered_as_it_is("h200x8-nvswitch")
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
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.start_kubelet()?;
    node.start_vfio_manager()?;
    bound_in_time(&node)?;
    let (has_iommufd, units) = expected(&node)?;
    goes_through(&mut node, has_iommufd, &units, change(PLAIN, "off", "on")).with_context(|| node.logs())?;
    // Its virtual machine has the device now: the next change waits for its end, and the other agents see who has it.
    let early = node.api.list("pods").first().map(|pod| text(&pod["metadata"]["name"])).context("no pod")?;
    let table = node.look(&["ccnode", "status", "--offline"])?.text();
    let is_told = |line: &str| line.starts_with(PGPU) && line.ends_with(&format!("healthy  default/{early}"));
    ensure!(table.lines().any(is_told), "{table}");
    node.guest.fleet().clear_trace();
    node.ask_for("off")?;
    await_that("refused", &node, || Ok(cc_status(&node)["error"]["code"] == "InUse"))?;
    let reason = cc_status(&node)["error"]["message"].to_string();
    ensure!(reason.contains(&format!("default/{early}")), "{reason}");
    await_health("nothing is withdrawn for it", &node, PLAIN, has_iommufd, &units, |_| true)?;
    ensure!(e2e::touches(&whole_trace(&node)?).is_empty(), "a device was touched\n{}", node.logs());
    release(&node)?;
    node.api.delete("pods", "default", &early, Some(0))?;
    node.await_state("off", "false", CHANGE)?;
    await_health("offered again", &node, PLAIN, has_iommufd, &units, |_| true)
}
