//! `ccnode mode get`.

use std::fmt::Write as _;
use std::io::Write;

use anyhow::Context as _;
use gpu_firmware::{Effective, KnobState};
use hw_probe::{Bdf, DeviceKind};
use serde::Serialize;

use super::args::GetArgs;
use super::look::{self, Fact, Look, Sight, Source, clock};
use super::{ErrorView, Node, SCHEMA};
use crate::report::product;
use crate::{FAILED, SUCCESS, printable, table};

/// What `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    schema: u32,
    devices: Vec<DeviceView<'a>>,
}

#[derive(Serialize)]
struct DeviceView<'a> {
    bdf: Bdf,
    kind: DeviceKind,
    product: String,
    driver: Option<&'a str>,
    active: &'a Fact<Effective>,
    configured: &'a Fact<&'static str>,
    knobs: &'a Fact<Vec<KnobState>>,
    permissions: &'a Fact<Vec<KnobState>>,
    error: Option<ErrorView<'a>>,
}

/// Runs the command; the exit code.
pub(super) fn run(args: &GetArgs, out: &mut impl Write, notes: &mut impl Write) -> anyhow::Result<u8> {
    let GetArgs { node: node_args, own } = args;
    let node = Node::read(node_args)?;
    if let Some(trouble) = node.blind() {
        writeln!(notes, "warning: There may be more devices: {}", printable(&trouble))?;
    }
    let mut looks = node.look(Sight::Registers);
    if *own {
        looks = look::owning(node.places("get"), looks, None);
    }
    if node_args.json {
        let devices = looks.iter().map(view).collect();
        let answer = Answer { schema: SCHEMA, devices };
        let text = serde_json::to_string_pretty(&answer).context("The answer cannot be put into JSON")?;
        writeln!(out, "{text}")?;
    } else {
        out.write_all(human(&looks, *own).as_bytes())?;
    }
    let failed = *own && looks.iter().any(|look| look.error.is_some());
    Ok(if failed { FAILED } else { SUCCESS })
}

fn view(look: &Look) -> DeviceView<'_> {
    let Look { function, active, configured, knobs, permissions, error } = look;
    DeviceView {
        bdf: function.bdf,
        kind: function.kind,
        product: product(function),
        driver: function.driver.as_deref(),
        active,
        configured,
        knobs,
        permissions,
        error: error.as_ref().map(ErrorView::of),
    }
}

fn human(looks: &[Look], own: bool) -> String {
    if looks.is_empty() {
        return "No NVIDIA GPU or NVSwitch on this node\n".into();
    }
    let heads = ["BDF", "PRODUCT", "DRIVER", "ACTIVE", "KNOWN FROM", "CONFIGURED", "KNOWN FROM"];
    let mut rows = vec![heads.map(str::to_owned)];
    rows.extend(looks.iter().map(|look| {
        let [active, active_from] = cells(&look.active);
        let [configured, configured_from] = cells(&look.configured);
        let driver = look.function.driver.clone().unwrap_or_else(|| "-".into());
        let product = product(&look.function);
        [look.function.bdf.to_string(), product, driver, active, active_from, configured, configured_from]
    }));
    let mut text = table::align(&rows);
    if own {
        let heads = ["BDF", "KNOBS", "THE HOST MAY CHANGE"];
        let mut rows = vec![heads.map(str::to_owned)];
        let asked = looks.iter().filter(|look| look.knobs.value.is_some());
        rows.extend(asked.map(|look| {
            let knobs = look.knobs.value.as_deref().unwrap_or_default();
            let permissions = look.permissions.value.as_deref().unwrap_or_default();
            [look.function.bdf.to_string(), states(knobs), permitted(permissions)]
        }));
        if rows.len() > 1 {
            text.push('\n');
            text.push_str(&table::align(&rows));
        }
    }
    let mut remarks: Vec<(String, Vec<Bdf>)> = Vec::new();
    let mut remark = |text: String, bdf: Bdf| match remarks.iter_mut().find(|(other, _)| *other == text) {
        Some((_, bdfs)) => bdfs.push(bdf),
        None => remarks.push((text, vec![bdf])),
    };
    for look in looks {
        let bdf = look.function.bdf;
        if let Some(error) = &look.error {
            remark(format!("{}; {}", error.fault, error.remedy()), bdf);
        } else {
            for (name, reason) in [("Active mode", &look.active.reason), ("Configured mode", &look.configured.reason)] {
                if let Some(reason) = reason {
                    remark(format!("{name} unknown: {reason}"), bdf);
                }
            }
        }
    }
    for (line, bdfs) in remarks {
        let all = bdfs.len() == looks.len() && bdfs.len() > 1;
        let names: Vec<String> = bdfs.iter().map(ToString::to_string).collect();
        let whose = if all { "All".into() } else { names.join(" ") };
        // A string takes any text.
        let _ = writeln!(text, "{whose}: {}", printable(&line));
    }
    text
}

/// A fact's value, and where and when it is from.
fn cells<T: ToString>(fact: &Fact<T>) -> [String; 2] {
    let value = fact.value.as_ref().map_or_else(|| "unknown".into(), ToString::to_string);
    let at = fact.at.map(clock).unwrap_or_default();
    let from = match fact.source {
        None => "-".into(),
        Some(Source::Model) => "model".into(),
        Some(Source::Register) => "register, now".into(),
        Some(Source::Device) => "device, now".into(),
        Some(Source::Record) => format!("record of {at}"),
    };
    [value, from]
}

fn states(knobs: &[KnobState]) -> String {
    knobs.iter().map(|state| state.to_string().replace(" = ", "=")).collect::<Vec<_>>().join(", ")
}

/// Which knobs may be changed, by their permissions: the knob of a permission is the one after it.
fn permitted(permissions: &[KnobState]) -> String {
    let denied: Vec<String> =
        permissions.iter().filter(|state| state.value == Some(0)).map(|state| (state.knob.0 + 1).to_string()).collect();
    if denied.is_empty() { "all".into() } else { format!("all but {}", denied.join(", ")) }
}
