//! The eight mixtures of our agents and NVIDIA's on one node: each change of modes is completed, or refused with a reason; and
//! what pods then get is what the device plugin of the mixture makes of it.
//!
//! NVIDIA's are stand-ins made from operator-contract sections 5.4, 6.5 to 6.10 and 7.3 to 7.8, with the faults that matter beside
//! ours: its cc-manager resets whatever there is, does not wait for vfio-manager and leaves the plugin running, its vfio-manager
//! unbinds by hand, its device plugin (`lab-kata-plugin`) looks at its start and never again: it keeps offering, under the numbers
//! of then, what is being reset, is unbound, or has another number now.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{
    CHANGE, PGPU, STEP, await_that, bound_to_vfio, cc_status, gpu_bdfs, hold_group, lab_is_here, registers_say, release,
};
use lab::node::{CC_MODE, CC_MODE_STATE, CC_READY_STATE, NAMESPACE, NODE};
use lab::{Boot, Node};
use lab_vm::Add;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// NVIDIA's device plugin.
const THEIR_PLUGIN: &str = "lab-kata-plugin";

const MARKER: &str = "paused-for-cc-mode-change";

/// Whose agents run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Ours,
    Theirs,
}

use By::{Ours, Theirs};

/// What the operator runs as a pod of a DaemonSet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Component {
    VfioManager,
    Validator,
    DevicePlugin,
}

use Component::{DevicePlugin, Validator, VfioManager};

impl Component {
    /// Its deploy label, and label and name of its pods.
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            VfioManager => ("nvidia.com/gpu.deploy.vfio-manager", "name", "nvidia-vfio-manager"),
            Validator => ("nvidia.com/gpu.deploy.sandbox-validator", "app", "nvidia-sandbox-validator"),
            DevicePlugin => (
                "nvidia.com/gpu.deploy.kata-sandbox-device-plugin",
                "app",
                "nvidia-kata-sandbox-device-plugin-daemonset",
            ),
        }
    }
}

const COMPONENTS: [Component; 3] = [VfioManager, Validator, DevicePlugin];

/// What NVIDIA's cc-manager pauses: not the plugin.
const THEY_PAUSE: [&str; 5] = [
    "nvidia.com/gpu.deploy.vfio-manager",
    "nvidia.com/gpu.deploy.vgpu-manager",
    "nvidia.com/gpu.deploy.sandbox-validator",
    "nvidia.com/gpu.deploy.sandbox-device-plugin",
    "nvidia.com/gpu.deploy.vgpu-device-manager",
];

/// `vfio-manage bind --all` of NVIDIA's (sections 6.5 to 6.7), for one device and its audio function.
const THEY_BIND: &str = "modprobe vfio-pci; for d in BDF $(ls /sys/bus/pci/devices/BDF | sed -n 's/^consumer:pci://p'); do \
    test \"$(basename $(readlink /sys/bus/pci/devices/$d/driver) 2>/dev/null)\" = vfio-pci && continue; \
    echo > /sys/bus/pci/devices/$d/driver_override; test -e /sys/bus/pci/devices/$d/driver && echo $d > /sys/bus/pci/devices/$d/driver/unbind; \
    echo vfio-pci > /sys/bus/pci/devices/$d/driver_override; echo $d > /sys/bus/pci/drivers/vfio-pci/bind; done; true";

/// `vfio-manage unbind --all` of NVIDIA's (section 6.8).
const THEY_UNBIND: &str = "for d in BDF $(ls /sys/bus/pci/devices/BDF | sed -n 's/^consumer:pci://p'); do \
    echo > /sys/bus/pci/devices/$d/driver_override; test -e /sys/bus/pci/devices/$d/driver && echo $d > /sys/bus/pci/devices/$d/driver/unbind; \
    done; true";

/// One knob of a Blackwell GPU written behind everybody's back, and a reset (gpu-cc-protocol section 4.9), as NVIDIA's cc-manager does.
const THEY_CHANGE: &str = r"
dev=/sys/bus/pci/devices/BDF
echo on > $dev/power/control; sleep 0.1; printf '\006' | dd of=$dev/config bs=1 seek=4 count=1 conv=notrunc 2>/dev/null
bar=$(head -n1 $dev/resource | cut -d' ' -f1)
w() { devmem $((bar + $1)) 32 $(($2)); }
w 0x8f1f84 $((0x100000 + 16)); for word in 0xC0000000 0x1310DE7E 0x0008020D VALUE; do w 0x8f1f88 $word; done
sleep 0.2; echo 1 > $dev/reset; sleep 0.5; echo auto > $dev/power/control
";

struct World {
    node: Node,
    by: [By; 3],
    runs: Vec<Component>,
    /// The numbers that the GPUs had when NVIDIA's plugin looked.
    seen: BTreeSet<String>,
}

/// A node with its kubelet, where all three of the operator's pods are to run.
fn world(cc: By) -> Result<Option<World>> {
    if !lab_is_here()? {
        return Ok(None);
    }
    let mut labels = vec![(CC_MODE, "off")];
    labels.extend(COMPONENTS.map(|component| (component.names().0, "true")));
    let mut boot = Boot::new("rtx-pro-6000")?;
    let guest = format!("/usr/bin/{THEIR_PLUGIN}").into();
    boot.programs.push(Add { host: env!("CARGO_BIN_EXE_lab-kata-plugin").into(), guest });
    let mut node = Node::start(boot, &labels)?;
    node.api.create("namespaces", json!({"metadata": {"name": NAMESPACE}}))?;
    node.look(&["sh", "-c", "mkdir -p /host && mount --rbind / /host"])?;
    node.start_kubelet()?;
    Ok(Some(World { node, by: [cc; 3], runs: Vec::new(), seen: BTreeSet::new() }))
}

impl World {
    fn sh(&self, script: &str) -> Result<()> {
        self.node.look(&["sh", "-c", script]).map(drop)
    }

    /// A script for each GPU.
    fn each(&self, script: &str) -> Result<()> {
        gpu_bdfs(&self.node)?.iter().try_for_each(|bdf| self.sh(&script.replace("BDF", bdf)))
    }

    fn label(&self, name: &str) -> String {
        self.node.api.labels(NODE).remove(name).unwrap_or_default()
    }

    fn start(&mut self, component: Component) -> Result<()> {
        let [_, vfio, plugin] = self.by;
        let (_, key, name) = component.names();
        match (component, vfio, plugin) {
            (VfioManager, Ours, _) => {
                self.node.look(&["driver-manager", "uninstall_driver"])?;
                self.node.start_agent(&["vfio-manager", "run"], &[("HOST_ROOT", "/host")])?;
            }
            (VfioManager, Theirs, _) => {
                self.each(THEY_UNBIND)?;
                self.each(THEY_BIND)?;
            }
            (DevicePlugin, _, Ours) => {
                // Under the operator it sees nothing of what cc-manager writes.
                let argv = ["device-plugin", "--cc-gate=off", "--state-dir=/run/elsewhere", "--device-id-scheme=pci"];
                self.node.start_agent(&argv, &[("POLL_INTERVAL", "1s")])?;
            }
            (DevicePlugin, _, Theirs) => {
                let gpus = gpu_bdfs(&self.node)?;
                self.seen =
                    self.numbers()?.into_iter().filter(|(_, bdf)| gpus.contains(bdf)).map(|(id, _)| id).collect();
                self.node.start_agent(&[THEIR_PLUGIN], &[])?;
                let agent = self.node.agent(THEIR_PLUGIN)?;
                agent.process.wait_output(STEP, |text| text.contains("found")).with_context(|| self.node.logs())?;
            }
            (Validator, ..) => {}
        }
        self.node.api.create(
            "pods",
            json!({
                "metadata": {"name": name, "namespace": NAMESPACE, "labels": {key: name}},
                "spec": {"nodeName": NODE, "containers": [{"name": "main", "image": "example/component"}]},
            }),
        )?;
        self.runs.push(component);
        Ok(())
    }

    /// The hook of its pod, and its end.
    fn stop(&mut self, component: Component) -> Result<()> {
        let [_, vfio, plugin] = self.by;
        match (component, vfio, plugin) {
            (VfioManager, Ours, _) => {
                self.sh("vfio-manage unbind --all")?;
                self.node.stop_agent("vfio-manager", Signal::SIGTERM)?;
            }
            (VfioManager, Theirs, _) => self.each(THEY_UNBIND)?,
            (DevicePlugin, _, Ours) => self.node.stop_agent("device-plugin", Signal::SIGTERM)?,
            (DevicePlugin, _, Theirs) => {
                // It handles no signal, and leaves everything behind.
                self.node.stop_agent(THEIR_PLUGIN, Signal::SIGKILL)?;
                self.sh(
                    "test -S /var/lib/kubelet/device-plugins/sandbox-pgpu.sock -a -f /var/run/cdi/nvidia.com-pgpu.yaml",
                )?;
                self.node.await_allocatable(PGPU, 0, STEP)?;
            }
            (Validator, ..) => {}
        }
        self.node.api.delete("pods", NAMESPACE, component.names().2, Some(0))?;
        self.runs.retain(|other| *other != component);
        Ok(())
    }

    /// What the DaemonSet controller does: pods run where the deploy label is `true`.
    fn sync(&mut self) -> Result<()> {
        for component in COMPONENTS {
            let wanted = self.label(component.names().0) == "true";
            match (wanted, self.runs.contains(&component)) {
                // The init container of its pod waits until the GPUs are bound.
                (true, false)
                    if (component, self.by[2]) == (DevicePlugin, Theirs) && bound_to_vfio(&self.node).is_err() => {}
                (true, false) => self.start(component)?,
                (false, true) => self.stop(component)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Until everything runs that is to run, and the GPUs are bound.
    fn settles(&mut self) -> Result<()> {
        let deadline = Instant::now() + CHANGE;
        while self.runs.len() < COMPONENTS.len() || bound_to_vfio(&self.node).is_err() {
            self.sync()?;
            ensure!(Instant::now() < deadline, "{:?}: {:?}\n{}", self.by, self.runs, self.node.logs());
        }
        Ok(())
    }

    /// A change by NVIDIA's cc-manager, from its pause to its labels.
    fn they_change(&mut self, mode: &str) -> Result<()> {
        let before: Vec<(&str, String)> = THEY_PAUSE.iter().map(|name| (*name, self.label(name))).collect();
        for (name, value) in &before {
            let paused = if value == "true" { MARKER } else { value };
            self.node.api.set_label(NODE, name, Some(paused))?;
        }
        // Its wait is for pods with another label than vfio-manager's: the DaemonSet controller may be as late as it likes.
        self.sync()?;
        self.offer_during_the_change().context("during the change")?;
        self.each(&THEY_CHANGE.replace("VALUE", if mode == "on" { "1" } else { "0" }))?;
        self.node.api.set_label(NODE, CC_MODE_STATE, Some(mode))?;
        self.node.api.set_label(NODE, CC_READY_STATE, Some(if mode == "on" { "true" } else { "false" }))?;
        before.iter().try_for_each(|(name, value)| Ok(self.node.api.set_label(NODE, name, Some(value))?))
    }

    /// Everything is as asked, on the node object, in the GPUs, in sysfs and at the kubelet.
    fn arrives(&mut self, mode: &str) -> Result<()> {
        let ready = if mode == "on" { "true" } else { "false" };
        let deadline = Instant::now() + CHANGE;
        loop {
            self.sync()?;
            let done = self.label(CC_MODE_STATE) == mode
                && self.label(CC_READY_STATE) == ready
                && COMPONENTS.iter().all(|component| self.label(component.names().0) == "true")
                && self.runs.len() == COMPONENTS.len();
            if done {
                break;
            }
            ensure!(Instant::now() < deadline, "{:?}: {:?}\n{}", self.by, self.node.api.labels(NODE), self.node.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
        let (node, count) = (&self.node, self.node.gpus().len());
        registers_say(node, mode)?;
        await_that("bound", node, || Ok(bound_to_vfio(node).is_ok()))?;
        node.await_allocatable(PGPU, count, CHANGE).with_context(|| node.logs())?;
        self.offer_of_the_bound().with_context(|| format!("{:?}, {mode}", self.by))
    }

    /// The function behind each number of VFIO's devices, now.
    fn numbers(&self) -> Result<BTreeMap<String, String>> {
        let text = self.node.look(&["sh", "-c", "cd /sys/bus/pci/devices && ls -d */vfio-dev/vfio* || true"])?.text();
        let lines = text.lines().map(|line| line.split_once("/vfio-dev/vfio").with_context(|| format!("{line:?}")));
        lines.map(|line| line.map(|(bdf, number)| (number.to_owned(), bdf.to_owned()))).collect()
    }

    /// The IDs that the kubelet would give away.
    fn offered(&self) -> Result<BTreeSet<String>> {
        let dump = self.node.kubelet()?;
        let devices = dump["resources"][PGPU]["devices"].as_array().context("the kubelet has no devices")?;
        let usable = devices.iter().filter(|device| device["allocatable"] == true);
        Ok(usable.filter_map(|device| device["id"].as_str().map(str::to_owned)).collect())
    }

    /// A pod takes all that is offered: the functions that Kata plugs in for each ID, or why it cannot.
    fn plugged(&self) -> Result<Result<BTreeMap<String, Vec<String>>, String>> {
        let (node, pod, all) = (&self.node, "default/taker", format!("{PGPU}={}", self.offered()?.len()));
        // Where a node is missing the pod does not start; what it was given is its own all the same.
        node.guest.run(&["lab-kubelet", "ctl", "admit", pod, "--limit", &all], STEP)?;
        let resolved = node.guest.run(&["lab-kubelet", "resolve", pod], STEP)?;
        node.look(&["lab-kubelet", "ctl", "remove", pod])?;
        if !resolved.success() {
            return Ok(Err(resolved.error_text()));
        }
        let resolved: Value = serde_json::from_slice(&resolved.stdout)?;
        let devices = resolved["devices"].as_array().context("resolve tells no devices")?;
        let device =
            |device: &Value| Ok((device["id"].as_str().context("no ID")?.to_owned(), strings(&device["bdfs"])));
        Ok(Ok(devices.iter().map(device).collect::<Result<_>>()?))
    }

    /// Our vfio-manager leaves the GPUs bound when its pod is replaced, so that plugins do not see the change, nor do pods. Of
    /// NVIDIA's they are unbound: our plugin withdraws them, NVIDIA's offers them as before, and a pod that takes one gets stuck.
    fn offer_during_the_change(&self) -> Result<()> {
        let (node, count) = (&self.node, self.node.gpus().len());
        match self.by {
            [_, Ours, _] => {
                node.await_allocatable(PGPU, count, CHANGE)?;
                self.offer_of_the_bound()
            }
            [_, Theirs, Ours] => node.await_allocatable(PGPU, 0, CHANGE),
            [_, Theirs, Theirs] => {
                node.await_allocatable(PGPU, count, CHANGE)?;
                let (offered, plugged) = (self.offered()?, self.plugged()?);
                ensure!(offered == self.seen, "offered: {offered:?}, seen: {:?}", self.seen);
                ensure!(plugged.as_ref().is_err_and(|text| text.contains("does not exist")), "{plugged:?}");
                Ok(())
            }
        }
    }

    /// Our plugin names GPUs by their addresses, NVIDIA's by the numbers of its start. They are the same after every change of
    /// modes: our vfio-manager leaves GPUs bound, NVIDIA's binds them in the same order again.
    fn offer_of_the_bound(&self) -> Result<()> {
        let (gpus, numbers) = (gpu_bdfs(&self.node)?, self.numbers()?);
        let (offered, plugged) = (self.offered()?, self.plugged()?.map_err(anyhow::Error::msg)?);
        ensure!(plugged.keys().eq(&offered), "offered: {offered:?}, plugged in: {plugged:?}");
        if self.by[2] == Ours {
            ensure!(offered == gpus && plugged.iter().all(|(id, bdfs)| bdfs.contains(id)), "{plugged:?}");
            return Ok(());
        }
        let has_number =
            |(id, bdfs): (&String, &Vec<String>)| numbers.get(id).is_some_and(|bdf| *bdfs == [bdf.as_str()]);
        ensure!(offered == self.seen && plugged.iter().all(has_number), "{plugged:?}, numbers: {numbers:?}");
        let plugged: BTreeSet<String> = plugged.into_values().flatten().collect();
        ensure!(plugged == gpus, "{plugged:?}, GPUs: {gpus:?}");
        Ok(())
    }

    /// How often NVIDIA's plugin was started.
    fn their_starts(&self) -> usize {
        self.node.agents().iter().filter(|agent| agent.name == THEIR_PLUGIN).count()
    }
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

fn mixture(world: &mut World, by: [By; 3]) -> Result<()> {
    world.by = by;
    let [cc, _, plugin] = by;
    world.node.ask_for("off")?;
    world.sync()?;
    if cc == Ours {
        world.node.start_cc_manager()?;
    } else {
        world.settles()?;
        world.they_change("off")?;
    }
    world.arrives("off")?;
    let starts = world.their_starts();
    if cc == Ours {
        // As a virtual machine does.
        hold_group(&mut world.node, "gpu0")?;
        world.node.ask_for("on")?;
        let deadline = Instant::now() + CHANGE;
        while cc_status(&world.node)["error"]["code"] != "InUse" {
            world.sync()?;
            ensure!(Instant::now() < deadline, "{by:?}: not refused\n{}", world.node.logs());
        }
        registers_say(&world.node, "off")?;
        release(&world.node)?;
    } else {
        world.node.ask_for("on")?;
        world.they_change("on")?;
    }
    world.arrives("on")?;
    world.node.ask_for("off")?;
    if cc == Theirs {
        world.they_change("off")?;
    }
    world.arrives("off")?;
    let again = if (cc, plugin) == (Ours, Theirs) { 2 } else { 0 };
    ensure!(world.their_starts() == starts + again, "NVIDIA's plugin was started {} times", world.their_starts());
    if cc == Ours {
        world.node.stop_agent("cc-manager", Signal::SIGTERM)?;
    }
    for component in COMPONENTS {
        world.stop(component)?;
    }
    Ok(())
}

/// One after the other on one node, so that each also finds what the one before has left.
fn mixtures_with(cc: By) -> Result<()> {
    let Some(mut world) = world(cc)? else { return Ok(()) };
    for (vfio, plugin) in [(Theirs, Theirs), (Theirs, Ours), (Ours, Theirs), (Ours, Ours)] {
        let begun = Instant::now();
        mixture(&mut world, [cc, vfio, plugin]).with_context(|| format!("{cc:?}, {vfio:?}, {plugin:?}"))?;
        eprintln!("{cc:?}, {vfio:?}, {plugin:?}: {:.1} s", begun.elapsed().as_secs_f64());
    }
    Ok(())
}

#[test]
fn our_cc_manager_works_with_everybodys_agents() -> Result<()> {
    mixtures_with(Ours)
}

#[test]
fn nvidias_cc_manager_works_with_everybodys_agents() -> Result<()> {
    mixtures_with(Theirs)
}

#[test]
fn nvidias_plugin_offers_the_numbers_of_its_start_whatever_has_them_now() -> Result<()> {
    let Some(mut world) = world(Theirs)? else { return Ok(()) };
    world.settles()?;
    world.node.await_allocatable(PGPU, 2, STEP)?;
    let [gpu0, gpu1, audio0] = ["gpu0", "gpu1", "audio0"].map(|name| world.node.guest.bdf(name));
    let (gpu0, gpu1, audio0) = (gpu0?, gpu1?, audio0?);
    let only = |bdf: &String| vec![bdf.clone()];
    let ids = ["0", "2"].map(str::to_owned);
    ensure!(world.seen.iter().eq(&ids), "{:?}", world.seen);
    let [first, second] = ids;
    // In which order functions are bound again, and what then has the numbers 0 and 2.
    let cases: [(&[&str], Option<[&String; 2]>); 4] = [
        (&["gpu0", "audio0", "gpu1", "audio1"], Some([&gpu0, &gpu1])),
        (&["gpu1", "audio0", "gpu0", "audio1"], Some([&gpu1, &gpu0])),
        (&["gpu0", "audio0"], None),
        (&["audio0", "gpu0", "gpu1", "audio1"], Some([&audio0, &gpu1])),
    ];
    for (order, wanted) in cases {
        world.each(THEY_UNBIND)?;
        for name in order {
            let bdf = world.node.guest.bdf(name)?;
            let bind = "echo vfio-pci > /sys/bus/pci/devices/BDF/driver_override; echo BDF > /sys/bus/pci/drivers/vfio-pci/bind";
            world.sh(&bind.replace("BDF", &bdf))?;
        }
        ensure!(world.offered()? == world.seen, "{order:?}: {:?}", world.offered()?);
        let plugged = world.plugged()?;
        let as_it_is = match wanted {
            Some([at_first, at_second]) => {
                let wanted = BTreeMap::from([(first.clone(), only(at_first)), (second.clone(), only(at_second))]);
                plugged.as_ref().is_ok_and(|plugged| *plugged == wanted)
            }
            None => plugged.as_ref().is_err_and(|text| text.contains("/dev/vfio/devices/vfio2 does not exist")),
        };
        ensure!(as_it_is, "{order:?}: {plugged:?}");
    }
    // A new pod of the plugin looks again.
    world.stop(DevicePlugin)?;
    world.sync()?;
    world.node.await_allocatable(PGPU, 2, STEP)?;
    ensure!(world.seen.iter().eq(["1", "2"]), "{:?}", world.seen);
    world.offer_of_the_bound()
}
