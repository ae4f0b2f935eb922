//! `ccnode drain-holders`: the pods that have a node's GPUs, and their eviction.

use std::io::Write;
use std::path::PathBuf;

use agent_core::resources::may_be_gpus;
use anyhow::ensure;
use node_object::{Eviction, NodeError, Pod};

use crate::{FAILED, SUCCESS, agents, cluster, printable, table};

/// Flags of `ccnode drain-holders`.
#[derive(Debug, clap::Args)]
pub struct DrainArgs {
    /// The node.
    #[arg(value_name = "NODE")]
    pub node: String,
    /// Evict them; else they are only listed.
    #[arg(long, short)]
    pub yes: bool,
    /// How long a pod may take to end, in seconds; by default its own grace period.
    #[arg(long, value_name = "SECONDS")]
    pub grace_period: Option<u32>,
    /// Kubeconfig file; a pod's service account comes first.
    #[arg(long, value_name = "FILE", env = "KUBECONFIG", value_parser = agent_core::text::path)]
    pub kubeconfig: Option<PathBuf>,
}

/// Runs the command; the exit code.
pub fn run(args: &DrainArgs, out: &mut impl Write, notes: &mut impl Write) -> anyhow::Result<u8> {
    let DrainArgs { node, yes, grace_period, kubeconfig } = args;
    ensure!(agents::is_name(node), "{node:?} is no name of a node");
    let runtime = cluster::runtime()?;
    let line = |error: NodeError| anyhow::anyhow!("{}", printable(&told(&error)));
    let client = runtime.block_on(cluster::client(node, kubeconfig.as_deref())).map_err(line)?;
    // Of a node that does not exist there would be no pods.
    runtime.block_on(client.get()).map_err(line)?;
    let pods = runtime.block_on(client.pods_with(may_be_gpus)).map_err(line)?;
    if pods.is_empty() {
        writeln!(out, "No pod of node {node} asks for GPUs or NVSwitches (nvidia.com/*, without network cards)")?;
        return Ok(SUCCESS);
    }
    if !yes {
        out.write_all(list(&pods).as_bytes())?;
        writeln!(notes, "Nothing was evicted; --yes does it")?;
        return Ok(SUCCESS);
    }
    let mut left = 0;
    for pod in &pods {
        let Pod { namespace, name, is_ending, .. } = pod;
        // They go into the request's path.
        let is_usable = !is_ending && agents::is_name(namespace) && agents::is_name(name);
        let what = match is_usable.then(|| runtime.block_on(client.evict(pod, *grace_period))) {
            None if *is_ending => "ends already".to_owned(),
            Some(Ok(Eviction::Begun)) => "evicted, and ends within its grace period".to_owned(),
            Some(Ok(Eviction::Gone)) => "gone".to_owned(),
            Some(Ok(Eviction::Blocked(why))) => {
                left += 1;
                format!("not evicted: {why} Try again later, or see its PodDisruptionBudget")
            }
            Some(Err(error)) => {
                left += 1;
                format!("not evicted: {}", told(&error))
            }
            None => {
                left += 1;
                "not evicted: that is no name of a pod".to_owned()
            }
        };
        writeln!(out, "{}", printable(&format!("{namespace}/{name}: {what}")))?;
        out.flush()?;
    }
    Ok(if left > 0 { FAILED } else { SUCCESS })
}

/// An error with the cure for a person's rights rather than an agent's.
fn told(error: &NodeError) -> String {
    match error {
        NodeError::Forbidden { node, verb, .. } => format!(
            "The API server forbids you to {verb} node {node}; your role needs list on nodes and pods, and create on pods/eviction"
        ),
        error => error.line(),
    }
}

fn list(pods: &[Pod]) -> String {
    let heads = ["NAMESPACE", "POD", "PHASE", "DEVICES"];
    let mut rows = vec![heads.map(str::to_owned)];
    rows.extend(pods.iter().map(|pod| {
        let Pod { namespace, name, uid: _, phase, is_ending, devices } = pod;
        let devices: Vec<String> =
            devices.iter().map(|(resource, quantity)| format!("{quantity} {resource}")).collect();
        let phase = if *is_ending { "Terminating" } else { phase };
        [namespace.clone(), name.clone(), phase.to_owned(), devices.join(", ")]
    }));
    table::align(&rows)
}
