//! What cc-manager costs the API server: a list and a watch at its start, two patches a change, and nothing at rest.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, STEP, WITH_METRICS, await_rounds, node, registers_say, the_labels_never_lied};
use lab::Node;
use lab::node::{CC_MODE, NAMESPACE, NODE};
use lab_kube::api_server::{Fault, FaultAction, OpenWatch, RequestRecord};
use serde_json::json;

const DEPLOY: &str = "nvidia.com/gpu.deploy.vfio-manager";
const POD: &str = "nvidia-vfio-manager";

/// Verb, resource, how much of the objects is asked for, and whether it was refused.
fn kind(request: &RequestRecord) -> String {
    let form = if request.accept.contains("as=PartialObjectMetadata") { "metadata of " } else { "" };
    let refused = if (200..300).contains(&request.code) { "" } else { ", refused" };
    format!("{} {form}{}{refused}", request.verb, request.resource)
}

/// What has been asked for. Events are apart: the operator's role does not allow them, and they are given up.
#[derive(Default)]
struct Requests {
    seen: usize,
}

impl Requests {
    fn since(&self, node: &Node) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for request in node.api.requests().iter().skip(self.seen).filter(|request| request.resource != "events") {
            *counts.entry(kind(request)).or_default() += 1;
        }
        counts
    }

    /// Since the last call, exactly this was asked for. An answer is counted a moment after it was given.
    fn are(&mut self, node: &Node, wanted: &[(&str, usize)]) -> Result<()> {
        let wanted = wanted.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect();
        let deadline = Instant::now() + STEP;
        while self.since(node) != wanted && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let found = self.since(node);
        ensure!(found == wanted, "{found:#?} and not {wanted:#?}\n{}", node.logs());
        self.seen = node.api.requests().len();
        Ok(())
    }
}

/// Waits until exactly these watches are open: the resource, and whether of metadata alone.
fn await_watches(node: &Node, wanted: &[(&str, bool)]) -> Result<()> {
    let open = |watch: &&OpenWatch| wanted.contains(&(&watch.resource, watch.metadata_only));
    let reached = node.api.wait_for(STEP, |view| {
        let watches = view.open_watches();
        (watches.len() == wanted.len() && watches.iter().all(open)).then_some(())
    });
    reached.with_context(|| {
        let watches = node.api.view(|view| format!("{:?}", view.open_watches()));
        format!("{wanted:?} are not the open watches, but {watches}\n{}", node.logs())
    })
}

fn offers(node: &Node, count: &str) -> Result<()> {
    let status = json!({"status": {"allocatable": {"nvidia.com/pgpu": count}}});
    node.api.merge("nodes/status", "", NODE, &status).map(drop).context("the kubelet's word")
}

fn change(node: &Node, mode: &str, ready: &str) -> Result<()> {
    node.ask_for(mode)?;
    node.await_state(mode, ready, CHANGE)?;
    registers_say(node, mode)
}

#[test]
fn a_change_is_two_patches_and_a_wait_for_others_one_list_and_one_watch_each() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_agent(&["cc-manager"], &[("CCNODE_RESYNC", "20ms"), WITH_METRICS])?;
    node.await_state("off", "false", CHANGE)?;
    let mut requests = Requests::default();
    // In a new boot the gate is shut before anything is looked at, and opened after it.
    let start = [("list metadata of nodes", 1), ("watch metadata of nodes", 1), ("patch metadata of nodes", 2)];
    requests.are(&node, &start)?;
    await_watches(&node, &[("nodes", true)])?;

    // Looks at a node that is right cost nothing.
    await_rounds(&node, 50)?;
    requests.are(&node, &[])?;

    // There is nobody to wait for, which one look tells.
    change(&node, "on", "true")?;
    requests.are(&node, &[("list nodes", 1), ("patch metadata of nodes", 2)])?;

    node.api.create("namespaces", json!({"metadata": {"name": NAMESPACE}}))?;
    let pod = json!({
        "metadata": {"name": "component", "namespace": NAMESPACE, "labels": {"app": POD}},
        "spec": {"nodeName": NODE, "containers": [{"name": "main", "image": "example/component"}]},
    });
    node.api.create("pods", pod)?;
    node.api.set_label(NODE, DEPLOY, Some("true"))?;
    offers(&node, "2")?;
    node.ask_for("off")?;
    await_watches(&node, &[("nodes", true), ("pods", true)])?;
    // Whatever else happens to the node meanwhile makes no request.
    for number in 0..20 {
        node.api.set_label(NODE, "example.com/noise", Some(&number.to_string()))?;
    }
    node.api.delete("pods", NAMESPACE, "component", Some(0))?;
    await_watches(&node, &[("nodes", true), ("nodes", false)])?;
    offers(&node, "0")?;
    node.await_state("off", "false", CHANGE)?;
    await_watches(&node, &[("nodes", true)])?;
    let pods = [("list metadata of pods", 1), ("watch metadata of pods", 1)];
    let kubelet = [("list nodes", 1), ("watch nodes", 1)];
    let patches = ("patch metadata of nodes", 2);
    requests.are(&node, &[&pods[..], &kubelet[..], &[patches]].concat())?;

    // Of two patches each is refused once: each is computed anew from what is read again.
    for skipped in [0, 1] {
        let conflict = FaultAction::Status { code: 409, retry_after: None };
        node.api.inject(Fault::new(conflict).verb("patch").resource("nodes").skip(skipped));
    }
    change(&node, "on", "true")?;
    let again = [("patch metadata of nodes, refused", 2), ("list metadata of nodes", 2)];
    requests.are(&node, &[&pods[..1], &kubelet[..1], &[patches], &again[..]].concat())?;

    await_rounds(&node, 50)?;
    requests.are(&node, &[])?;
    ensure!(node.agent("cc-manager")?.is_running());
    the_labels_never_lied(&node)
}
