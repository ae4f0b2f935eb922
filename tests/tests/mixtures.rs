//! The eight mixtures of our agents and NVIDIA's on one node: each change of modes is completed, or refused with a reason.
//!
//! NVIDIA's are stand-ins made from operator-contract sections 5.4, 6.5 to 6.10 and 7.4, with the faults that matter beside ours: its
//! cc-manager resets whatever there is and does not wait for vfio-manager, its vfio-manager unbinds by hand, its device plugin is
//! named by numbers and knows of no change.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, PGPU, await_that, cc_status, gpu_bdfs, hold_group, lab_is_here, registers_say, release};
use lab::node::{CC_MODE, CC_MODE_STATE, CC_READY_STATE, NAMESPACE, NODE};
use lab::{Boot, Node};
use nix::sys::signal::Signal;
use serde_json::json;

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
            (DevicePlugin, _, by) => {
                let scheme = if by == Ours { "--device-id-scheme=pci" } else { "--device-id-scheme=iommu" };
                // Under the operator it sees nothing of what cc-manager writes.
                let argv = ["device-plugin", "--cc-gate=off", "--state-dir=/run/elsewhere", scheme];
                self.node.start_agent(&argv, &[("POLL_INTERVAL", "1s")])?;
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
        match (component, self.by[1]) {
            (VfioManager, Ours) => {
                self.sh("vfio-manage unbind --all")?;
                self.node.stop_agent("vfio-manager", Signal::SIGTERM)?;
            }
            (VfioManager, Theirs) => self.each(THEY_UNBIND)?,
            (DevicePlugin, _) => self.node.stop_agent("device-plugin", Signal::SIGTERM)?,
            (Validator, _) => {}
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
                (true, false) => self.start(component)?,
                (false, true) => self.stop(component)?,
                _ => {}
            }
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
        await_that("bound", node, || Ok(e2e::bound_to_vfio(node).is_ok()))?;
        node.await_allocatable(PGPU, count, CHANGE).with_context(|| node.logs())
    }
}

fn mixture(world: &mut World, by: [By; 3]) -> Result<()> {
    world.by = by;
    let cc = by[0];
    world.node.ask_for("off")?;
    world.sync()?;
    if cc == Ours {
        world.node.start_cc_manager()?;
    } else {
        world.they_change("off")?;
    }
    world.arrives("off")?;
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
    if !lab_is_here()? {
        return Ok(());
    }
    let mut labels = vec![(CC_MODE, "off")];
    labels.extend(COMPONENTS.map(|component| (component.names().0, "true")));
    let mut node = Node::start(Boot::new("rtx-pro-6000")?, &labels)?;
    node.api.create("namespaces", json!({"metadata": {"name": NAMESPACE}}))?;
    node.look(&["sh", "-c", "mkdir -p /host && mount --rbind / /host"])?;
    node.start_kubelet()?;
    let mut world = World { node, by: [cc; 3], runs: Vec::new() };
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
