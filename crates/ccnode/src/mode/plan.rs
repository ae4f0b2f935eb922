//! `ccnode mode plan`, and the plan that `mode set` shows.

use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, bail};
use gpu_firmware::{Error, Fault, Knob, KnobState, Mode, NodePlan, Part, Support};
use hw_probe::{Bdf, DeviceKind, PciFunction};
use serde::Serialize;

use super::args::{NodeArgs, PlanArgs};
use super::look::{self, Look, Sight, Source, clock};
use super::{ErrorView, Node, SCHEMA, addresses, census, manager};
use crate::report::product;
use crate::{FAILED, SUCCESS, printable, table};

/// Whether a device will be reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Reset {
    Yes,
    No,
    /// If a knob turns out to differ, or the device booted with another mode.
    IfNeeded,
}

/// A knob that is to have a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct KnobStep {
    knob: Knob,
    name: Option<&'static str>,
    /// Its value now; none when that is not known, and the knob is written if it differs.
    from: Option<u16>,
    to: u16,
    reason: &'static str,
}

/// What is to become of one device.
#[derive(Debug)]
pub(super) struct DevicePlan {
    pub(super) look: Look,
    pub(super) part: Part,
    writes: Vec<KnobStep>,
    reset: Reset,
    /// Whether the model leaves it to the firmware whether the mode can be had, and the firmware was not asked.
    depends_on_firmware: bool,
    /// What keeps it, or the whole node, from being changed.
    pub(super) obstacle: Option<Error>,
}

/// What is to become of the devices that are meant.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) target: Mode,
    pub(super) devices: Vec<DevicePlan>,
    /// Whether all devices of the node are meant.
    whole: bool,
    own: bool,
}

impl Plan {
    /// Makes the plan for the chosen devices; an error where there is none to be made.
    pub(super) fn make(node: &Node, args: &NodeArgs, target: Mode, own: bool) -> anyhow::Result<Self> {
        if target == Mode::Ppcie && !args.devices.is_empty() {
            bail!("Mode ppcie is of all GPUs and NVSwitches of a node together; leave --device out");
        }
        if let Some(trouble) = node.blind() {
            bail!(
                "Cannot tell which devices this node has: {}; check that /sys is mounted and readable, and the kernel log",
                printable(&trouble)
            );
        }
        if node.chosen.is_empty() {
            bail!("No NVIDIA GPU or NVSwitch on this node");
        }
        let mut parts = NodePlan::of(&node.inventory, target);
        let is_chosen = |bdf: Bdf| node.chosen.iter().any(|function| function.bdf == bdf);
        let whole = parts.devices.iter().all(|device| is_chosen(device.function.bdf));
        parts.devices.retain(|device| is_chosen(device.function.bdf));
        // What is refused touches nothing.
        let sight = if parts.is_possible() { Sight::Registers } else { Sight::Records };
        let mut looks = node.look(sight);
        if own {
            looks = look::owning(node.places("plan"), looks, Some(target));
        }
        let devices = parts.devices.into_iter().filter_map(|device| {
            let look = looks.iter().find(|look| look.function.bdf == device.function.bdf)?;
            Some(DevicePlan::of(look.clone(), device.part))
        });
        Ok(Self { target, devices: devices.collect(), whole, own })
    }

    /// The devices to be owned and brought to a mode.
    pub(super) fn functions(&self) -> Vec<PciFunction> {
        let with_mode = self.devices.iter().filter(|device| matches!(device.part, Part::Mode(_)));
        with_mode.map(|device| device.look.function.clone()).collect()
    }

    /// Why devices cannot be in what the mode asks of them.
    pub(super) fn refusals(&self) -> Vec<Error> {
        let refused = self.devices.iter().filter_map(|device| match &device.part {
            Part::Refused(fault) => Some(Error::new(device.look.function.bdf, fault.clone())),
            Part::Mode(_) | Part::AlwaysOff => None,
        });
        refused.collect()
    }

    /// Whether it may be begun in spite of refusals: a mode other than off is one of all devices that are meant.
    pub(super) fn is_possible(&self) -> bool {
        self.target == Mode::Off || self.refusals().is_empty()
    }

    fn is_clear(&self) -> bool {
        self.refusals().is_empty() && self.devices.iter().all(|device| device.obstacle.is_none())
    }

    /// The plan for people. Devices with which the same is done are told of together.
    pub(super) fn human(&self) -> String {
        let functions = || self.devices.iter().map(|device| &device.look.function);
        let whose = if self.whole { "this node" } else { "a part of this node" };
        let mut text = format!("Mode {} for {whose}: {}\n", self.target, census(functions()));
        let mut groups: Vec<(String, String, Vec<&PciFunction>)> = Vec::new();
        for device in &self.devices {
            let function = &device.look.function;
            let (head, body) = (device.head(), device.body());
            match groups.iter_mut().find(|(other_head, other_body, _)| (other_head, other_body) == (&head, &body)) {
                Some((.., functions)) => functions.push(function),
                None => groups.push((head, body, vec![function])),
            }
        }
        // A string takes any text.
        for (head, body, functions) in groups {
            let bdfs: Vec<Bdf> = functions.iter().map(|function| function.bdf).collect();
            let _ = write!(text, "\n{} x {}\n{}{}", bdfs.len(), printable(&head), addresses(&bdfs, "  "), body);
        }
        text.push('\n');
        if !self.is_possible() {
            text.push_str("Refused: a mode other than off is one of all these devices, so none is touched.\n");
        } else if !self.functions().is_empty() {
            text.push_str(
                "All are owned before any is touched, or none is. All knobs are staged, each read back, before the first \
                 reset;\nthen all are reset at once, and each is verified: mode and knobs.\n",
            );
            if !self.own && self.devices.iter().any(|device| device.reset == Reset::IfNeeded) {
                text.push_str(
                    "Knobs are read under ownership alone; ccnode mode plan --own reads them for an exact plan.\n",
                );
            }
        }
        text
    }
}

impl DevicePlan {
    fn of(look: Look, part: Part) -> Self {
        let mut obstacle = look.error.clone();
        let (Part::Mode(mode), Ok(support)) = (&part, Support::of(&look.function)) else {
            // A refusal or a device that is left alone: who has it does not matter.
            let (writes, reset) = (Vec::new(), Reset::No);
            return Self { look, part, writes, reset, depends_on_firmware: false, obstacle: None };
        };
        let mode = *mode;
        let knobs = look.known_knobs();
        let now = |knob: Knob| knobs.iter().rfind(|state| state.knob == knob);
        let steps = gpu_firmware::steps(support.chip, mode);
        let writes: Vec<KnobStep> = steps
            .iter()
            .filter_map(|step| {
                let (knob, to) = (step.knob, step.value?);
                let from = match now(knob) {
                    // What the firmware does not know is not written.
                    Some(KnobState { value: None, .. }) => return None,
                    Some(KnobState { value: Some(from), .. }) if *from == to => return None,
                    Some(KnobState { value: from, .. }) => *from,
                    None => None,
                };
                Some(KnobStep { knob, name: knob.name(), from, to, reason: gpu_firmware::reason(mode, knob, to) })
            })
            .collect();
        let is_other = look.active.value.map(|active| active != mode);
        let reset = if writes.iter().any(|write| write.from.is_some()) || is_other == Some(true) {
            Reset::Yes
        } else if writes.is_empty() && is_other == Some(false) {
            Reset::No
        } else {
            Reset::IfNeeded
        };
        let permissions = look.permissions.value.as_deref().unwrap_or_default();
        let is_denied = |knob: Knob| {
            let permission = knob.permission()?;
            let is_zero = permissions.iter().any(|state| state.knob == permission && state.value == Some(0));
            is_zero.then_some(Fault::InBandDenied { knob, permission })
        };
        if let Some(fault) = writes.iter().find_map(|write| is_denied(write.knob)) {
            obstacle = obstacle.or(Some(Error::new(look.function.bdf, fault)));
        }
        let was_asked = look.knobs.source == Some(Source::Device);
        let depends_on_firmware = support.depends_on_firmware(mode) && !was_asked;
        Self { look, part, writes, reset, depends_on_firmware, obstacle }
    }

    fn head(&self) -> String {
        let product = product(&self.look.function);
        match &self.part {
            Part::Mode(mode) => format!("{product} -> {mode}"),
            Part::AlwaysOff => format!("{product}: always off, nothing to do"),
            Part::Refused(_) => format!("{product}: refused"),
        }
    }

    /// What is done, a line each.
    fn body(&self) -> String {
        if let Part::Refused(fault) = &self.part {
            return format!("  {}; {}\n", printable(&fault.to_string()), fault.remedy());
        }
        if self.part == Part::AlwaysOff {
            return String::new();
        }
        let mut text = format!("  now: {}\n", self.now());
        if let Some(error) = &self.obstacle {
            // A string takes any text.
            let _ = writeln!(text, "  in the way: {}; {}", printable(&error.fault.to_string()), error.remedy());
        }
        if self.depends_on_firmware {
            text.push_str("  only if the firmware offers it, as these models have NVLink-C2C: --own asks\n");
        }
        let mut rows: Vec<[String; 3]> = Vec::new();
        for write in &self.writes {
            let KnobStep { knob, from, to, reason, .. } = write;
            let named = if knob.name().is_some() { knob.to_string() } else { format!("knob {knob}") };
            let (what, why) = match from {
                Some(from) => (format!("{named} {from} -> {to}"), (*reason).to_owned()),
                None => (format!("{named} = {to}"), format!("if it is not {to} already: {reason}")),
            };
            rows.push([format!("  {:>2}", rows.len() + 1), what, why]);
        }
        let because = match self.reset {
            Reset::Yes if self.writes.is_empty() => "the knobs are right, and take effect at a reset",
            Reset::Yes => "knobs take effect at a reset",
            Reset::IfNeeded => "if a knob was written, or it booted with another mode: knobs take effect at a reset",
            Reset::No if self.look.knobs.source == Some(Source::Device) => {
                text.push_str("  nothing to do: it is so already, mode and knobs\n");
                return text;
            }
            Reset::No => {
                text.push_str("  nothing to do, if it still is as it was verified: the knobs are read again\n");
                return text;
            }
        };
        rows.push([format!("  {:>2}", rows.len() + 1), "reset".into(), because.into()]);
        text.push_str(&table::align(&rows));
        text
    }

    /// What it is now, and how that is known.
    fn now(&self) -> String {
        let Look { active, configured, .. } = &self.look;
        let Some(mode) = active.value else { return "unknown".into() };
        let from = match (active.source, active.at) {
            (Some(Source::Record), Some(at)) => format!(" (verified {})", clock(at)),
            _ => String::new(),
        };
        match configured.value.filter(|configured| *configured != mode.as_str()) {
            Some(look::INCOMPLETE) => format!("{mode}{from}, with knobs of no mode"),
            Some(configured) => format!("{mode}{from}, with the knobs of {configured}"),
            None => format!("{mode}{from}"),
        }
    }
}

/// What `--json` prints.
#[derive(Serialize)]
pub(super) struct Answer<'a> {
    schema: u32,
    target: Mode,
    /// Whether `mode set` could begin, as far as can be told.
    possible: bool,
    /// What tells that cc-manager manages this node.
    cc_manager: Option<String>,
    devices: Vec<DeviceView<'a>>,
}

#[derive(Serialize)]
struct DeviceView<'a> {
    bdf: Bdf,
    kind: DeviceKind,
    product: String,
    /// Its own mode in the node's; none when it is refused.
    mode: Option<Mode>,
    active: Option<gpu_firmware::Effective>,
    configured: Option<&'static str>,
    writes: &'a [KnobStep],
    reset: Reset,
    error: Option<ErrorView<'a>>,
}

/// Runs the command; the exit code.
pub(super) fn run(args: &PlanArgs, out: &mut impl Write, notes: &mut impl Write) -> anyhow::Result<u8> {
    let PlanArgs { target, node: node_args, own } = args;
    let node = Node::read(node_args)?;
    let plan = Plan::make(&node, node_args, *target, *own)?;
    let path: &Path = &node.path();
    let manager = manager::evidence(path, node.inventory.host.boot_id.as_deref());
    if node_args.json {
        let refusals = plan.refusals();
        let view = |device: &'_ DevicePlan| {
            let mode = match device.part {
                Part::Mode(mode) => Some(mode),
                Part::AlwaysOff => Some(Mode::Off),
                Part::Refused(_) => None,
            };
            (mode, device.look.function.bdf)
        };
        let devices = plan.devices.iter().map(|device| {
            let (mode, bdf) = view(device);
            let error = device.obstacle.as_ref().or_else(|| refusals.iter().find(|error| error.bdf == bdf));
            DeviceView {
                bdf,
                kind: device.look.function.kind,
                product: product(&device.look.function),
                mode,
                active: device.look.active.value,
                configured: device.look.configured.value,
                writes: &device.writes,
                reset: device.reset,
                error: error.map(ErrorView::of),
            }
        });
        let answer = Answer {
            schema: SCHEMA,
            target: *target,
            possible: plan.is_clear(),
            cc_manager: manager.as_ref().map(|evidence| evidence.what.clone()),
            devices: devices.collect(),
        };
        let text = serde_json::to_string_pretty(&answer).context("The plan cannot be put into JSON")?;
        writeln!(out, "{text}")?;
    } else {
        out.write_all(plan.human().as_bytes())?;
        if let Some(evidence) = manager {
            writeln!(notes, "warning: {}", printable(&evidence.advice(*target)))?;
        }
    }
    Ok(if plan.is_clear() { SUCCESS } else { FAILED })
}
