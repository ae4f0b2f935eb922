//! `ccnode status`: whether the node is what it is wanted to be, and what to do if not.

mod facts;
pub mod fleet;
mod judge;
mod units;

use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

use agent_core::state::{ErrorRecord, HolderRecord};
use anyhow::{Context as _, ensure};
use hw_probe::{Bdf, DeviceKind, PciFunction, pci_ids_name};
use jiff::Timestamp;
use node_object::{labels, operands};
use serde::Serialize;

use crate::cluster::ClusterArgs;
use crate::report::product;
use crate::source::Source;
use crate::{COULD_NOT_RUN, FAILED, SUCCESS, printable, table};
use facts::{Answer, Facts, Host, Manager, Records};
use judge::{Change, Judgement, age};

pub(crate) use facts::says_boot;
pub use judge::Verdict;
pub(crate) use units::folder as units_folder;

/// Flags of `ccnode status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Print JSON (schema 1, see docs/status.md) instead of a line and a table.
    #[arg(long, env = "CCNODE_JSON")]
    pub json: bool,
    /// Go by the node object alone: this machine is another one.
    #[arg(long, conflicts_with = "offline")]
    pub remote: bool,
    /// The node object.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Read sys, proc, dev and run below this directory: a host's root mounted into a container, or a recorded tree.
    #[arg(long, value_name = "DIR", env = "CCNODE_ROOT", default_value = "/")]
    pub root: PathBuf,
}

/// Schema of what `--json` prints. Within a schema number fields are only added.
pub const SCHEMA: u32 = 1;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Answers<'a> {
    schema: u32,
    verdict: Verdict,
    since: Option<Timestamp>,
    /// Why, and what to do.
    reason: &'a str,
    /// The line that people get.
    line: &'a str,
    transition: Option<&'a Change>,
    node: NodeView<'a>,
    host: Option<HostView<'a>>,
    devices: &'a [Row],
    /// What the kubelet is told; none from afar.
    kubelet: Option<units::View<'a>>,
    remarks: &'a [String],
}

#[derive(Debug, Serialize)]
struct NodeView<'a> {
    name: Option<&'a str>,
    /// `seen`, `failed` or `not-asked`.
    answer: &'static str,
    trouble: Option<&'a str>,
    mode: Option<&'a str>,
    mode_state: Option<&'a str>,
    ready_state: Option<&'a str>,
    /// Deploy labels that are paused.
    paused: Vec<&'a str>,
    /// What cc-manager says; none when it has said nothing of this boot.
    wanted: Option<&'a str>,
    result: Option<&'a str>,
    error: Option<&'a ErrorRecord>,
}

#[derive(Debug, Serialize)]
struct HostView<'a> {
    boot_id: Option<&'a str>,
    /// `runs`, `gone` or `not-seen`.
    cc_manager: &'static str,
    cc_manager_pid: Option<u32>,
    /// `read`, `absent` or `unreadable`.
    records: &'static str,
    records_at: Option<Timestamp>,
    /// Why there may be more holders than are seen.
    holders_limit: Option<&'a str>,
}

/// What is known of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Row {
    bdf: Bdf,
    kind: Option<DeviceKind>,
    product: String,
    driver: Option<String>,
    /// The driver that it had before vfio-manager took it.
    former_driver: Option<String>,
    configured: Option<String>,
    active: Option<String>,
    verified_at: Option<Timestamp>,
    /// Whether it may be offered to the kubelet; none where the host is not seen.
    offered: Option<bool>,
    held_by: Vec<HolderRecord>,
    error: Option<ErrorRecord>,
}

/// Runs the command; the exit code.
pub fn run(args: &StatusArgs, out: &mut impl Write) -> anyhow::Result<u8> {
    let StatusArgs { json, remote, cluster, root } = args;
    // Files of the node are opened by absolute paths.
    let source = Source::open(&root.canonicalize().unwrap_or_else(|_| root.clone()))?;
    ensure!(source.live().is_none(), "{}: A bundle has no status; ccnode probe and doctor replay it", root.display());
    let facts = Facts::read(source.root(), cluster, *remote)?;
    let text = if *json { as_json(&facts)? } else { human(&facts) };
    out.write_all(text.as_bytes())?;
    Ok(match judge::judge(&facts).verdict {
        Verdict::Ready => SUCCESS,
        Verdict::Changing | Verdict::NotReady => FAILED,
        Verdict::Unknown => COULD_NOT_RUN,
    })
}

/// The line, the table, each error, and what else is to be told.
fn human(facts: &Facts) -> String {
    let judgement = judge::judge(facts);
    let mut text = format!("{}\n", printable(&judgement.line(facts.now)));
    let rows = rows(facts);
    if !rows.is_empty() {
        let heads = ["BDF", "PRODUCT", "DRIVER", "CONFIGURED", "ACTIVE", "VERIFIED", "OFFERED", "HELD BY", "ERROR"];
        let mut cells = vec![heads.map(str::to_owned)];
        cells.extend(rows.iter().map(|row| row.cells(facts.now)));
        text.push_str(&table::align(&cells));
    }
    text.push_str(&facts.host.as_ref().map(units::table).unwrap_or_default());
    let mut lines: Vec<String> = rows.iter().filter_map(|row| Some(row.error.as_ref()?.message.clone())).collect();
    // The node's own error repeats those of the devices.
    let whole = facts.current_status().and_then(|status| status.error.as_ref()).filter(|_| lines.is_empty());
    lines.extend(whole.map(|error| error.message.clone()));
    lines.extend(facts.host.iter().flat_map(units::errors));
    lines.extend(judge::remarks(facts, judgement.verdict).into_iter().map(|remark| format!("note: {remark}")));
    for line in lines {
        // A string takes any text.
        let _ = writeln!(text, "{}", printable(&line));
    }
    text
}

fn as_json(facts: &Facts) -> anyhow::Result<String> {
    let judgement = judge::judge(facts);
    let (line, rows) = (judgement.line(facts.now), rows(facts));
    let remarks = judge::remarks(facts, judgement.verdict);
    let Judgement { verdict, since, reason, transition } = &judgement;
    let answer = Answers {
        schema: SCHEMA,
        verdict: *verdict,
        since: *since,
        reason,
        line: &line,
        transition: transition.as_ref(),
        node: node_view(facts),
        host: facts.host.as_ref().map(host_view),
        devices: &rows,
        kubelet: facts.host.as_ref().map(units::View::of),
        remarks: &remarks,
    };
    let mut text = serde_json::to_string_pretty(&answer).context("The answer cannot be put into JSON")?;
    text.push('\n');
    Ok(text)
}

fn node_view(facts: &Facts) -> NodeView<'_> {
    let (answer, trouble) = match &facts.node {
        Answer::Node(_) => ("seen", None),
        Answer::Failed(line) => ("failed", Some(line.as_str())),
        Answer::NotAsked(why) => ("not-asked", Some(why.as_str())),
    };
    let state = facts.node().map(|node| &*node.state);
    let label = |name| state.and_then(|state| state.label(name));
    let status = facts.current_status();
    NodeView {
        name: facts.name.as_deref(),
        answer,
        trouble,
        mode: label(labels::CC_MODE),
        mode_state: label(labels::CC_MODE_STATE),
        ready_state: label(labels::CC_READY_STATE),
        paused: state.map(|state| operands::all_paused(state).collect()).unwrap_or_default(),
        wanted: status.map(|status| status.wanted.as_str()),
        result: status.map(|status| status.result.as_str()),
        error: status.and_then(|status| status.error.as_ref()),
    }
}

fn host_view(host: &Host) -> HostView<'_> {
    let cc_manager_pid = if let Manager::Runs(agent) = &host.manager { Some(agent.pid) } else { None };
    let (records, records_at) = match &host.records {
        Records::Read(file) => ("read", Some(file.origin.written_at)),
        Records::Absent => ("absent", None),
        Records::Unreadable(_) => ("unreadable", None),
    };
    HostView {
        boot_id: host.boot_id.as_deref(),
        cc_manager: host.manager.word(),
        cc_manager_pid,
        records,
        records_at,
        holders_limit: host.holders.limit.as_deref(),
    }
}

/// One row a device: those of the host, else those that the node object names.
fn rows(facts: &Facts) -> Vec<Row> {
    if let Some(host) = &facts.host {
        return host.parts.iter().map(|part| Row::of_part(facts, host, part)).collect();
    }
    let Some(status) = facts.current_status() else { return Vec::new() };
    let rows = status.devices.iter().map(|device| Row {
        bdf: device.bdf,
        kind: None,
        product: named(&device.ids),
        driver: None,
        former_driver: None,
        configured: device.configured_mode.clone(),
        active: device.active_mode.clone(),
        verified_at: device.verified_at,
        offered: None,
        held_by: told_holders(facts, device.bdf),
        error: device.error.clone(),
    });
    rows.collect()
}

impl Row {
    fn of_part(facts: &Facts, host: &Host, part: &PciFunction) -> Self {
        let bdf = part.bdf;
        let record = host.file().and_then(|file| file.record(part));
        // Where the file is not seen the node object has the same.
        let told = facts.current_status().filter(|_| host.file().is_none());
        let told = told.and_then(|status| status.devices.iter().find(|device| device.bdf == bdf));
        let [configured, active] = [
            record.map_or_else(|| told?.configured_mode.clone(), |record| record.configured_mode.clone()),
            record.map_or_else(|| told?.active_mode.clone(), |record| record.active_mode.clone()),
        ];
        let binding = host.bindings.as_ref().and_then(|file| file.devices.iter().find(|record| record.bdf == bdf));
        let is_changing = host.file().is_some_and(|file| file.transition.is_some());
        Self {
            bdf,
            kind: Some(part.kind),
            product: product(part),
            driver: part.driver.clone(),
            former_driver: binding.and_then(|binding| binding.driver.clone()),
            configured,
            active,
            verified_at: record.map_or_else(|| told?.verified_at, |record| record.verified_at),
            offered: record.map(|record| record.usable && !is_changing && part.is_vfio_bound()),
            held_by: with_pods(host.holders_of(part), told_holders(facts, bdf)),
            error: record.map_or_else(|| told?.error.clone(), |record| record.error.clone()),
        }
    }

    fn cells(&self, now: Timestamp) -> [String; 9] {
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        let offered = match self.offered {
            Some(true) => "yes",
            Some(false) => "no",
            None => "-",
        };
        let mut held_by: Vec<String> = self.held_by.iter().map(judge::name).collect();
        if held_by.len() > 2 {
            let more = held_by.len() - 2;
            held_by.truncate(2);
            held_by.push(format!("{more} more"));
        }
        [
            self.bdf.to_string(),
            self.product.clone(),
            or_dash(&self.driver),
            or_dash(&self.configured),
            or_dash(&self.active),
            self.verified_at.map_or_else(|| "-".to_owned(), |at| format!("{} ago", age(at, now))),
            offered.to_owned(),
            if held_by.is_empty() { "-".to_owned() } else { held_by.join(", ") },
            self.error.as_ref().map_or_else(|| "-".to_owned(), |error| error.code.clone()),
        ]
    }
}

/// The holders that cc-manager named.
fn told_holders(facts: &Facts, bdf: Bdf) -> Vec<HolderRecord> {
    let told = facts.current_status().map(|status| status.holders.as_slice()).unwrap_or_default();
    told.iter().filter(|holder| holder.bdf == bdf).cloned().collect()
}

/// The holders that are seen now, with the pods that cc-manager knew them by; what it knew where none is seen.
fn with_pods(mut seen: Vec<HolderRecord>, told: Vec<HolderRecord>) -> Vec<HolderRecord> {
    for holder in &mut seen {
        let same = told.iter().find(|other| other.pid.is_some() && other.pid == holder.pid);
        if let Some(pod) = same.and_then(|same| same.pod.clone()) {
            holder.pod = Some(pod);
        }
    }
    if seen.is_empty() { told } else { seen }
}

/// The name of a device of which only the ids are known.
fn named(ids: &str) -> String {
    let number = |text| u16::from_str_radix(text, 16).ok();
    let name = ids.split_once(':').and_then(|(vendor, device)| pci_ids_name(number(vendor)?, number(device)?));
    name.map_or_else(|| ids.to_owned(), ToOwned::to_owned)
}

#[cfg(test)]
mod tests;
