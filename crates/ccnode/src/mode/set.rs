//! `ccnode mode set`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use agent_core::text::chain;
use anyhow::{Context as _, bail};
use gpu_firmware::{Choice, Effective, Error, Fault, KnobWrite, Mode, NodeOutcome, Ownership, Part, Transaction};
use hw_probe::{Bdf, DeviceKind};
use serde::Serialize;
use tokio::sync::oneshot;

use super::args::SetArgs;
use super::plan::Plan;
use super::progress::{Board, Way};
use super::stop::Stop;
use super::{ErrorView, Node, SCHEMA, Terminal, manager, record};
use crate::report::product;
use crate::{COULD_NOT_RUN, FAILED, SUCCESS, printable, table};

/// What `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    schema: u32,
    target: Mode,
    /// Whether anything was begun.
    begun: bool,
    /// Whether every device is in the mode now.
    verified: bool,
    /// Whether somebody asked to stop.
    stopped: bool,
    took_ms: u64,
    devices: Vec<DeviceView<'a>>,
}

#[derive(Serialize)]
struct DeviceView<'a> {
    bdf: Bdf,
    kind: DeviceKind,
    product: String,
    result: &'static str,
    before: Option<Effective>,
    after: Option<Effective>,
    written: &'a [KnobWrite],
    resets: usize,
    took_ms: u64,
    error: Option<ErrorView<'a>>,
}

/// How it went with one device.
struct Row<'a> {
    device: &'a super::plan::DevicePlan,
    way: Way,
    after: Option<Effective>,
    error: Option<&'a Error>,
    is_verified: bool,
}

/// Runs the command; the exit code.
pub(super) fn run(
    args: &SetArgs,
    out: &mut impl Write,
    notes: &mut (impl Write + Send),
    terminal: &Terminal,
) -> anyhow::Result<u8> {
    let SetArgs { target, node: node_args, yes, access, standalone } = args;
    let node = Node::read(node_args)?;
    let (path, boot_id): (&Path, _) = (&node.path(), node.inventory.host.boot_id.as_deref());
    let plan = Plan::make(&node, node_args, *target, false)?;
    if !standalone && let Some(evidence) = manager::evidence(path, boot_id) {
        bail!("{}", printable(&evidence.advice(*target)));
    }
    if node_args.json {
        notes.write_all(plan.human().as_bytes())?;
    } else {
        out.write_all(plan.human().as_bytes())?;
        out.flush()?;
    }
    let refusals = plan.refusals();
    let functions = plan.functions();
    let json = node_args.json;
    if !plan.is_possible() {
        return not_begun(&plan, &refusals, true, out, notes, json);
    }
    if functions.is_empty() {
        // All are always off, or nothing is known of them.
        let outcome = NodeOutcome { target: *target, devices: Vec::new(), took: Duration::ZERO };
        return report(&plan, &outcome, &refusals, &BTreeMap::new(), false, out, json);
    }
    if !yes {
        terminal.confirm(notes)?;
    }
    // From here on a signal does not end the process.
    let stop = Stop::listen().context("Cannot listen for signals, so nothing is changed")?;
    let bdfs: Vec<Bdf> = functions.iter().map(|function| function.bdf).collect();
    let forget = || {
        let cannot = |error| anyhow::anyhow!("{}; others would believe it, so nothing is changed", chain(&error));
        record::forget(path, boot_id, &bdfs).map_err(cannot)
    };
    // Without group files devices are owned by opening them, which resets them and activates staged knobs.
    let has_groups = node.root.join("sys/class/vfio").exists() || !node.root.join("sys/class/vfio-dev").exists();
    if !has_groups {
        forget()?;
    }
    let ownership = match Ownership::take(&functions, &node.places("set").with_access(*access)) {
        Ok(ownership) => ownership,
        Err(refused) => return not_begun(&plan, &refused.0, has_groups, out, notes, json),
    };
    forget()?;
    for (Choice { access, why }, number) in choices(&ownership) {
        // A reader that has gone does not end what has begun.
        let _ = writeln!(notes, "Reached through {access}, {why}: {number} of {} devices", functions.len());
    }
    let board = Board::new(notes, terminal.live && !json, &functions);
    let outcome = thread::scope(|scope| {
        let (end, ended) = oneshot::channel();
        let (asked, tell) = (&board.asked, |number| board.asked_to_stop(number));
        scope.spawn(move || stop.count(asked, tell, ended));
        let outcome = Transaction::new(&ownership).run(*target, &board);
        // It may not be there any more; then nobody waits for this.
        let _ = end.send(());
        outcome
    });
    drop(ownership);
    let (ways, stopped) = (board.ways(), gpu_firmware::Observer::is_stopping(&board));
    if let Err(error) = record::tell(path, boot_id, &outcome.devices) {
        // The records were emptied, which is no lie.
        let _ = writeln!(notes, "warning: What was verified is not recorded: {}", printable(&chain(&error)));
    }
    report(&plan, &outcome, &refusals, &ways, stopped, out, json)
}

/// The ways to the devices, and how many are reached by each.
fn choices(ownership: &Ownership) -> Vec<(Choice, usize)> {
    let mut choices: Vec<(Choice, usize)> = Vec::new();
    // A device that cannot be reached fails by itself, with the reason.
    for choice in ownership.devices().iter().filter_map(|device| device.choice().ok()) {
        match choices.iter_mut().find(|(other, _)| *other == choice) {
            Some((_, number)) => *number += 1,
            None => choices.push((choice, 1)),
        }
    }
    choices
}

/// Tells why nothing was begun, and whether nothing was touched.
fn not_begun(
    plan: &Plan,
    errors: &[Error],
    is_untouched: bool,
    out: &mut impl Write,
    notes: &mut impl Write,
    json: bool,
) -> anyhow::Result<u8> {
    if json {
        let devices = plan.devices.iter().map(|device| {
            let bdf = device.look.function.bdf;
            let error = errors.iter().find(|error| error.bdf == bdf);
            DeviceView {
                bdf,
                kind: device.look.function.kind,
                product: product(&device.look.function),
                result: if error.is_some() { "refused" } else { "untouched" },
                before: device.look.active.value,
                after: device.look.active.value,
                written: &[],
                resets: 0,
                took_ms: 0,
                error: error.map(ErrorView::of),
            }
        });
        let devices = devices.collect();
        let answer = Answer {
            schema: SCHEMA,
            target: plan.target,
            begun: false,
            verified: false,
            stopped: false,
            took_ms: 0,
            devices,
        };
        print_json(&answer, out)?;
    }
    for error in errors {
        writeln!(notes, "{}", printable(&error.line()))?;
    }
    let end = if is_untouched { "Nothing was touched" } else { "No mode was changed" };
    writeln!(notes, "{end}")?;
    Ok(COULD_NOT_RUN)
}

/// Tells how it went. What became of the devices is the exit code, whether or not anybody reads the rest.
fn report(
    plan: &Plan,
    outcome: &NodeOutcome,
    refusals: &[Error],
    ways: &BTreeMap<Bdf, Way>,
    stopped: bool,
    out: &mut impl Write,
    json: bool,
) -> anyhow::Result<u8> {
    let rows: Vec<Row<'_>> = plan.devices.iter().map(|device| row(device, outcome, refusals, ways)).collect();
    let verified = rows.iter().all(|row| row.is_verified);
    let shown = if json {
        let devices = rows.iter().map(Row::view).collect();
        let took_ms = millis(outcome.took);
        let (schema, target) = (SCHEMA, plan.target);
        print_json(&Answer { schema, target, begun: true, verified, stopped, took_ms, devices }, out)
    } else {
        let end = match (verified, stopped) {
            (true, _) => "every device is verified",
            (false, true) => "stopped",
            (false, false) => "not every device is verified",
        };
        let mut text = format!("\n{}", human(&rows));
        // A string takes any text.
        let _ = writeln!(text, "Mode {}: {end}, after {:.1} s", plan.target, outcome.took.as_secs_f64());
        out.write_all(text.as_bytes()).map_err(Into::into)
    };
    let code = if verified { SUCCESS } else { FAILED };
    match shown {
        Err(error) if code == SUCCESS => Err(error),
        _ => Ok(code),
    }
}

fn row<'a>(
    device: &'a super::plan::DevicePlan,
    outcome: &'a NodeOutcome,
    refusals: &'a [Error],
    ways: &BTreeMap<Bdf, Way>,
) -> Row<'a> {
    let bdf = device.look.function.bdf;
    let way = ways.get(&bdf).cloned().unwrap_or_default();
    let result = outcome.devices.iter().find(|outcome| outcome.bdf == bdf).map(|outcome| &outcome.result);
    match (result, &device.part) {
        (Some(Ok(done)), _) => Row { device, way, after: Some(done.effective), error: None, is_verified: true },
        (Some(Err(error)), _) => {
            // Stopped, it is as it was.
            let after = if matches!(*error.fault, Fault::Stopped { .. }) { way.before } else { None };
            Row { device, way, after, error: Some(error), is_verified: false }
        }
        (None, Part::AlwaysOff) => {
            let before = Some(Effective::Off);
            Row { device, way: Way { before, ..way }, after: before, error: None, is_verified: true }
        }
        (None, Part::Mode(_) | Part::Refused(_)) => {
            let error = refusals.iter().find(|error| error.bdf == bdf);
            Row { device, way, after: None, error, is_verified: false }
        }
    }
}

impl Row<'_> {
    fn view(&self) -> DeviceView<'_> {
        let Self { device, way, after, error, is_verified } = self;
        let function = &device.look.function;
        DeviceView {
            bdf: function.bdf,
            kind: function.kind,
            product: product(function),
            result: match (is_verified, &device.part) {
                (true, Part::AlwaysOff) => "always-off",
                (true, _) => "verified",
                (false, Part::Refused(_)) => "refused",
                (false, _) => "failed",
            },
            before: way.before,
            after: *after,
            written: &way.written,
            resets: way.resets,
            took_ms: millis(way.took),
            error: error.map(ErrorView::of),
        }
    }

    fn cells(&self) -> [String; 8] {
        let Self { device, way, after, error, is_verified } = self;
        let function = &device.look.function;
        let mode = |mode: Option<Effective>| mode.map_or_else(|| "-".to_owned(), |mode| mode.to_string());
        let result = match (error, is_verified, &device.part) {
            (Some(error), ..) => error.code(),
            (None, _, Part::AlwaysOff) => "always off",
            (None, true, _) => "verified",
            (None, false, _) => "failed",
        };
        let named = |write: &KnobWrite| match write.knob.name() {
            Some(name) => format!("{name}={}", write.to),
            None => format!("{}={}", write.knob, write.to),
        };
        let written: Vec<String> = way.written.iter().map(named).collect();
        [
            function.bdf.to_string(),
            product(function),
            mode(way.before),
            mode(*after),
            if written.is_empty() { "-".into() } else { written.join(", ") },
            if way.resets == 0 { "-".into() } else { way.resets.to_string() },
            if way.took.is_zero() { "-".into() } else { format!("{:.1} s", way.took.as_secs_f64()) },
            result.to_owned(),
        ]
    }
}

fn human(rows: &[Row<'_>]) -> String {
    let heads = ["BDF", "PRODUCT", "BEFORE", "AFTER", "KNOBS WRITTEN", "RESETS", "TIME", "RESULT"];
    let mut cells = vec![heads.map(str::to_owned)];
    cells.extend(rows.iter().map(Row::cells));
    let mut text = table::align(&cells);
    for error in rows.iter().filter_map(|row| row.error) {
        // A string takes any text.
        let _ = writeln!(text, "{}", printable(&error.line()));
    }
    text
}

fn print_json(answer: &Answer<'_>, out: &mut impl Write) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(answer).context("The answer cannot be put into JSON")?;
    Ok(writeln!(out, "{text}")?)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
