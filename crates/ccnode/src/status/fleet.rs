//! `ccnode fleet`: every node with NVIDIA GPUs in one line, by the node objects alone.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::anyhow;
use jiff::Timestamp;
use node_object::{NodeError, NodeState, annotations, labels};
use serde::Serialize;

use super::SCHEMA;
use super::facts::{Answer, Facts, NodeFacts};
use super::judge::{Verdict, age, judge};
use crate::{FAILED, SUCCESS, cluster, printable, table};

/// The operator's label of nodes with GPUs.
const GPU_PRESENT: &str = "nvidia.com/gpu.present";

/// Flags of `ccnode fleet`.
#[derive(Debug, clap::Args)]
pub struct FleetArgs {
    /// Print JSON (schema 1) instead of a table.
    #[arg(long, env = "CCNODE_JSON")]
    pub json: bool,
    /// Kubeconfig file; a pod's service account comes first.
    #[arg(long, value_name = "FILE", env = "KUBECONFIG", value_parser = agent_core::text::path)]
    pub kubeconfig: Option<PathBuf>,
}

/// One node.
#[derive(Debug, Serialize)]
struct Line {
    node: String,
    verdict: Verdict,
    since: Option<Timestamp>,
    /// Label of the wanted mode; none where the default holds.
    mode: Option<String>,
    mode_state: Option<String>,
    ready_state: Option<String>,
    /// Devices that cc-manager has verified, and all that it tells of; none where it has said nothing.
    verified: Option<usize>,
    devices: Option<usize>,
    reason: String,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Answers<'a> {
    schema: u32,
    nodes: &'a [Line],
}

/// Runs the command; the exit code.
pub fn run(args: &FleetArgs, out: &mut impl Write) -> anyhow::Result<u8> {
    let FleetArgs { json, kubeconfig } = args;
    let nodes = cluster::runtime()?.block_on(async {
        let client = node_object::connect(kubeconfig.as_deref()).await?;
        node_object::nodes(&client, cluster::PATIENCE).await
    });
    let nodes = nodes.map_err(|error| anyhow!("{}", printable(&told(&error))))?;
    let now = Timestamp::now();
    let ours = nodes.into_iter().filter(|(_, state)| is_ours(state));
    let lines: Vec<Line> = ours.map(|(name, state)| line(name, state, now)).collect();
    if *json {
        let answers = Answers { schema: SCHEMA, nodes: &lines };
        writeln!(out, "{}", serde_json::to_string_pretty(&answers)?)?;
    } else if lines.is_empty() {
        writeln!(out, "No node has NVIDIA GPUs, by its labels and by what cc-manager says")?;
    } else {
        out.write_all(as_table(&lines, now).as_bytes())?;
    }
    Ok(if lines.iter().all(|line| line.verdict == Verdict::Ready) { SUCCESS } else { FAILED })
}

fn is_ours(state: &NodeState) -> bool {
    let of_mode = [labels::CC_MODE, labels::CC_MODE_STATE, labels::CC_READY_STATE];
    state.label(GPU_PRESENT) == Some("true")
        || of_mode.iter().any(|name| state.label(name).is_some())
        || state.annotation(annotations::CC_STATUS).is_some()
}

fn line(name: String, state: NodeState, now: Timestamp) -> Line {
    let label = |name| state.label(name).filter(|value| !value.is_empty()).map(str::to_owned);
    let [mode, mode_state, ready_state] = [labels::CC_MODE, labels::CC_MODE_STATE, labels::CC_READY_STATE].map(label);
    let node = Answer::Node(Box::new(NodeFacts::of(Arc::new(state))));
    let facts = Facts { now, host: None, name: Some(name.clone()), node, remarks: Vec::new() };
    let devices = facts.status().map(|status| status.devices.as_slice());
    let is_verified =
        |device: &&agent_core::state::DeviceStatus| device.verified_at.is_some() && device.error.is_none();
    let judgement = judge(&facts);
    Line {
        node: name,
        verdict: judgement.verdict,
        since: judgement.since,
        mode,
        mode_state,
        ready_state,
        verified: devices.map(|devices| devices.iter().filter(is_verified).count()),
        devices: devices.map(<[_]>::len),
        reason: judgement.reason,
    }
}

fn as_table(lines: &[Line], now: Timestamp) -> String {
    let heads = ["NODE", "STATUS", "SINCE", "WANTED", "STATE", "READY", "VERIFIED", "WHY"];
    let mut rows = vec![heads.map(str::to_owned)];
    let dash = || "-".to_owned();
    rows.extend(lines.iter().map(|line| {
        let Line { node, verdict, since, mode, mode_state, ready_state, verified, devices, reason } = line;
        let verified = verified.zip(*devices).map(|(verified, devices)| format!("{verified} of {devices}"));
        [
            node.clone(),
            verdict.words().to_owned(),
            since.map_or_else(dash, |since| age(since, now)),
            mode.clone().unwrap_or_else(|| "(default)".to_owned()),
            mode_state.clone().unwrap_or_else(dash),
            ready_state.clone().unwrap_or_else(dash),
            verified.unwrap_or_else(dash),
            reason.clone(),
        ]
    }));
    table::align(&rows)
}

/// An error with the cure for a person's rights rather than an agent's.
fn told(error: &NodeError) -> String {
    match error {
        NodeError::Forbidden { .. } => {
            "The API server forbids you to list nodes; your role needs list on nodes".to_owned()
        }
        error => error.line(),
    }
}
