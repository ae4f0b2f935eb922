//! The chart as it is committed rendered: of its sources, what Kubernetes takes, with the rights that the agents ask for and no
//! others, policies that allow and refuse what they should, and dashboards of metrics that there are.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cel::extractors::This;
use e2e::rendered::{Rendering, deploy};
use gpu_firmware::Mode;
use in_process::{Change, PATIENCE, World};
use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use lab_kube::api_server::{ApiServer, ApiServerConfig, Rule, View};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

mod in_process;

/// Kinds of others than Kubernetes, for which it has no types.
const FOREIGN: [&str; 4] = ["NodeFeatureRule", "PodMonitor", "PrometheusRule", "SecurityContextConstraints"];

const AGENTS: [&str; 3] = ["cc-manager", "vfio-manager", "device-plugin"];

// -- what Kubernetes takes -------------------------------------------------------------------------------------------

/// What is in `given` and not in `kept`.
fn lost(given: &Value, kept: &Value, path: &str, found: &mut Vec<String>) {
    match (given, kept) {
        (Value::Object(given), Value::Object(kept)) => {
            for (key, value) in given {
                match kept.get(key) {
                    Some(other) => lost(value, other, &format!("{path}.{key}"), found),
                    // Optional lists and maps are left out when they are empty.
                    None if *value == json!([]) || *value == json!({}) || value.is_null() => {}
                    None => found.push(format!("{path}.{key}")),
                }
            }
        }
        (Value::Array(given), Value::Array(kept)) if given.len() == kept.len() => {
            for (index, (value, other)) in given.iter().zip(kept).enumerate() {
                lost(value, other, &format!("{path}[{index}]"), found);
            }
        }
        _ if given == kept => {}
        _ => found.push(format!("{path}: {given} became {kept}")),
    }
}

fn round_trip<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Vec<String>> {
    let typed: T = serde_json::from_value(object.clone())?;
    let mut found = Vec::new();
    lost(object, &serde_json::to_value(typed)?, "", &mut found);
    Ok(found)
}

/// Reads the object by Kubernetes' own type; what of it that type does not know. None for foreign kinds.
fn unknown_to_kubernetes(object: &Value) -> Result<Option<Vec<String>>> {
    let kind = object["kind"].as_str().unwrap_or_default();
    let found = match kind {
        "ClusterRole" => round_trip::<ClusterRole>(object),
        "ClusterRoleBinding" => round_trip::<ClusterRoleBinding>(object),
        "ConfigMap" => round_trip::<ConfigMap>(object),
        "DaemonSet" => round_trip::<DaemonSet>(object),
        "Job" => round_trip::<Job>(object),
        "Namespace" => round_trip::<Namespace>(object),
        "NetworkPolicy" => round_trip::<NetworkPolicy>(object),
        "Pod" => round_trip::<Pod>(object),
        "Role" => round_trip::<Role>(object),
        "RoleBinding" => round_trip::<RoleBinding>(object),
        "RuntimeClass" => round_trip::<RuntimeClass>(object),
        "ServiceAccount" => round_trip::<ServiceAccount>(object),
        "ValidatingAdmissionPolicy" => round_trip::<ValidatingAdmissionPolicy>(object),
        "ValidatingAdmissionPolicyBinding" => round_trip::<ValidatingAdmissionPolicyBinding>(object),
        _ if FOREIGN.contains(&kind) => return Ok(None),
        _ => anyhow::bail!("{kind} is a kind that nobody expects"),
    };
    found.map(Some).with_context(|| format!("{kind} {}", object["metadata"]["name"]))
}

#[test]
fn kubernetes_types_take_every_object_and_lose_nothing() -> Result<()> {
    let mut read = 0;
    for file in [
        "rendered/default.yaml",
        "rendered/observe.yaml",
        "rendered/everything.yaml",
        "kustomize/base/ccnode.yaml",
        "policies/gpu-operator.yaml",
        "samples/vectoradd.yaml",
        "samples/ppcie.yaml",
        "samples/blackwell.yaml",
        "samples/attestation.yaml",
    ] {
        for object in Rendering::read(file)?.objects {
            if let Some(lost) = unknown_to_kubernetes(&object)? {
                ensure!(lost.is_empty(), "{file}: {} {}: {lost:?}", object["kind"], object["metadata"]["name"]);
                read += 1;
            }
        }
    }
    assert!(read > 80, "{read} objects");
    // It would see a field that there is none of, wherever it is.
    let rendering = Rendering::read("rendered/default.yaml")?;
    let mut daemon_set = rendering.object("DaemonSet", "ccnode-cc-manager")?.clone();
    daemon_set["spec"]["template"]["spec"]["containers"][0]["securityContext"]["priviliged"] = json!(true);
    let lost = unknown_to_kubernetes(&daemon_set)?.unwrap_or_default();
    assert_eq!(lost, [".spec.template.spec.containers[0].securityContext.priviliged"]);
    Ok(())
}

#[test]
fn the_committed_renderings_are_of_these_sources() -> Result<()> {
    let root = deploy().join("..");
    let list = std::fs::read_to_string(deploy().join("rendered/sources.sha256"))?;
    let mut listed = BTreeSet::new();
    for line in list.lines() {
        let (digest, path) = line.split_once("  ").context("not a line of sha256sum's")?;
        let found = ring::digest::digest(&ring::digest::SHA256, &std::fs::read(root.join(path))?);
        let found: Vec<String> = found.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let found = found.concat();
        ensure!(found == digest, "{path} is not what was rendered: run hack/check-deploy --write");
        listed.insert(path.to_owned());
    }
    let mut folders = vec![deploy().join("helm/ccnode")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(deploy())?.display().to_string();
            ensure!(
                listed.contains(&format!("deploy/{name}")),
                "{name} was not rendered: run hack/check-deploy --write"
            );
        }
    }
    Ok(())
}

// -- rights ----------------------------------------------------------------------------------------------------------

/// Group, resource, verb and namespace of each request, and whether it was refused.
type Asked = BTreeSet<(String, String, String, Option<String>)>;

fn granted(rules: &[Rule]) -> Asked {
    let mut all = Asked::new();
    for rule in rules {
        for (group, resource) in rule.api_groups.iter().zip(&rule.resources) {
            for verb in &rule.verbs {
                all.insert((group.clone(), resource.clone(), verb.clone(), rule.namespace.clone()));
            }
        }
    }
    all
}

fn requests(world: &World, refused: bool) -> Asked {
    let records = world.api.requests().into_iter().filter(|record| record.user == in_process::AGENT);
    let wanted = records.filter(|record| (record.code == 403) == refused);
    let kinds = wanted.map(|record| {
        let namespace = Some(record.namespace).filter(|name| !name.is_empty());
        (record.group, record.resource, record.verb, namespace)
    });
    kinds.collect()
}

/// What cc-manager's service account may do beside the operator, and, but for the components' pods, without it.
#[test]
fn cc_manager_asks_for_all_that_the_chart_grants_and_for_nothing_else() -> Result<()> {
    let rules = Rendering::read("rendered/everything.yaml")?.rules("ccnode-cc-manager")?;
    let mut world = World::with_rights(rules.clone())?;
    world.prepare(Change { to: Mode::On, is_new_boot: false })?;
    let agent = world.start(None)?;
    world.until_settled(Mode::On)?;
    let wanted = granted(&rules);
    let deadline = Instant::now() + PATIENCE;
    while requests(&world, false) != wanted && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(requests(&world, false), wanted);
    assert_eq!(requests(&world, true), Asked::new(), "refused");
    world.kill(agent)?;
    world.nothing_false_was_said()?;

    let alone = granted(&Rendering::read("rendered/default.yaml")?.rules("ccnode-cc-manager")?);
    let pods = |(_, resource, _, _): &&(String, String, String, Option<String>)| resource == "pods";
    assert_eq!(alone, wanted.iter().filter(|asked| !pods(asked)).cloned().collect());
    for agent in ["vfio-manager", "device-plugin"] {
        let rendering = Rendering::read("rendered/everything.yaml")?;
        assert_eq!(rendering.rules(&format!("ccnode-{agent}"))?, []);
        assert_eq!(rendering.container(agent)?.pod["automountServiceAccountToken"], false);
    }
    Ok(())
}

#[test]
fn every_verb_that_is_taken_from_cc_manager_is_missed() -> Result<()> {
    let rules = Rendering::read("rendered/everything.yaml")?.rules("ccnode-cc-manager")?;
    let mut missed = 0;
    for (index, rule) in rules.iter().enumerate() {
        for verb in &rule.verbs {
            let mut rest = rules.clone();
            rest[index].verbs.retain(|other| other != verb);
            let mut world = World::with_rights(rest)?;
            world.prepare(Change { to: Mode::On, is_new_boot: false })?;
            let agent = world.start(None)?;
            let refused = |view: View<'_>| {
                let records = view.requests().iter();
                let mut refused = records.filter(|record| record.user == in_process::AGENT && record.code == 403);
                refused.any(|record| record.verb == *verb && rule.resources.contains(&record.resource)).then_some(())
            };
            let noticed = world.api.wait_for(PATIENCE, refused);
            noticed.with_context(|| format!("nobody misses {verb} of {:?}", rule.resources))?;
            world.kill(agent)?;
            missed += 1;
        }
    }
    assert_eq!(missed, granted(&rules).len());
    Ok(())
}

// -- policies --------------------------------------------------------------------------------------------------------

/// What the API server makes of a request by one policy.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Allowed,
    Refused(String),
}

struct Policies(Rendering);

/// Who asks for what.
struct Ask<'a> {
    user: &'a str,
    groups: &'a [&'a str],
    node: Option<&'a str>,
    operation: &'a str,
    resource: &'a str,
    old: Value,
    new: Value,
}

fn sum(This(list): This<Arc<Vec<cel::Value>>>) -> Result<cel::Value, cel::ExecutionError> {
    let mut total = 0;
    for item in list.iter() {
        match item {
            cel::Value::Int(number) => total += number,
            other => return Err(cel::ExecutionError::function_error("sum", format!("{other:?} is no number"))),
        }
    }
    Ok(cel::Value::Int(total))
}

impl Policies {
    /// The first refusal of all policies.
    fn judge(&self, ask: &Ask<'_>) -> Result<Verdict> {
        for policy in self.0.of_kind("ValidatingAdmissionPolicy") {
            if let refused @ Verdict::Refused(_) = judge(policy, ask)? {
                return Ok(refused);
            }
        }
        Ok(Verdict::Allowed)
    }
}

fn evaluate(expression: &Value, context: &cel::Context<'_, '_>) -> Result<cel::Value> {
    let text = expression.as_str().context("not an expression")?;
    let program = cel::Program::compile(text).map_err(|error| anyhow::anyhow!("{text}: {error}"))?;
    program.execute(context).map_err(|error| anyhow::anyhow!("{text}: {error}"))
}

fn judge(policy: &Value, ask: &Ask<'_>) -> Result<Verdict> {
    let spec = &policy["spec"];
    let rules = spec["matchConstraints"]["resourceRules"].as_array().context("no rules")?;
    let has = |list: &Value, item: &str| list.as_array().is_some_and(|list| list.iter().any(|other| other == item));
    if !rules.iter().any(|rule| has(&rule["operations"], ask.operation) && has(&rule["resources"], ask.resource)) {
        return Ok(Verdict::Allowed);
    }
    // Empty fields are left out of what the expressions see.
    let mut request = json!({"operation": ask.operation, "userInfo": {"username": ask.user, "groups": ask.groups}});
    let named = if ask.new.is_null() { &ask.old } else { &ask.new };
    request["name"] = named["metadata"]["name"].clone();
    if let Some((_, subresource)) = ask.resource.split_once('/') {
        request["subResource"] = subresource.into();
    }
    if let Some(node) = ask.node {
        request["userInfo"]["extra"] = json!({"authentication.kubernetes.io/node-name": [node]});
    }
    let mut context = cel::Context::default();
    context.add_function("sum", sum).map_err(|error| anyhow::anyhow!("sum: {error}"))?;
    for (name, value) in [("object", &ask.new), ("oldObject", &ask.old), ("request", &request)] {
        context.add_variable(name, value).map_err(|error| anyhow::anyhow!("{name}: {error}"))?;
    }
    for condition in spec["matchConditions"].as_array().into_iter().flatten() {
        if evaluate(&condition["expression"], &context)? != cel::Value::Bool(true) {
            return Ok(Verdict::Allowed);
        }
    }
    let mut variables = HashMap::<String, cel::Value>::new();
    for variable in spec["variables"].as_array().into_iter().flatten() {
        context.add_variable_from_value("variables", variables.clone());
        // They are made when they are asked for: one that cannot be is no trouble to those that do not ask.
        if let Ok(value) = evaluate(&variable["expression"], &context) {
            variables.insert(variable["name"].as_str().context("no name")?.to_owned(), value);
        }
    }
    context.add_variable_from_value("variables", variables);
    for validation in spec["validations"].as_array().into_iter().flatten() {
        match evaluate(&validation["expression"], &context) {
            Ok(cel::Value::Bool(true)) => {}
            Ok(cel::Value::Bool(false)) => {
                let said = match &validation["messageExpression"] {
                    Value::Null => None,
                    expression => match evaluate(expression, &context)? {
                        cel::Value::String(text) => Some(text.to_string()),
                        other => anyhow::bail!("{other:?} is no message"),
                    },
                };
                let message = said.or_else(|| validation["message"].as_str().map(ToOwned::to_owned));
                return Ok(Verdict::Refused(message.context("no message")?));
            }
            // failurePolicy: Fail
            Ok(other) => anyhow::bail!("{} is {other:?}", validation["expression"]),
            Err(error) => return Ok(Verdict::Refused(format!("error: {error:#}"))),
        }
    }
    Ok(Verdict::Allowed)
}

fn node_object(name: &str, labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> Value {
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let mut node = json!({"metadata": {"name": name}, "spec": {"podCIDR": "10.0.0.0/24"}});
    // Without labels the field is left out.
    for (field, pairs) in [("labels", map(labels)), ("annotations", map(annotations))] {
        if !pairs.is_empty() {
            node["metadata"][field] = json!(pairs);
        }
    }
    node
}

const KUBELET: (&str, &[&str]) = ("system:node:n1", &["system:nodes", "system:authenticated"]);
const ADMIN: (&str, &[&str]) = ("kubernetes-admin", &["system:masters", "system:authenticated"]);
const MODE_ADMIN: (&str, &[&str]) = ("ada", &["ccnode:mode-admins", "system:authenticated"]);
const SOMEBODY: (&str, &[&str]) = ("eve", &["system:authenticated"]);
const PLUGIN: (&str, &[&str]) = ("system:serviceaccount:ccnode:ccnode-device-plugin", &["system:serviceaccounts"]);
const CC_MANAGER: (&str, &[&str]) = ("system:serviceaccount:ccnode:ccnode-cc-manager", &["system:serviceaccounts"]);
const CLEANUP: (&str, &[&str]) = ("system:serviceaccount:ccnode:ccnode-cleanup", &["system:serviceaccounts"]);
const THEIR_CC_MANAGER: (&str, &[&str]) =
    ("system:serviceaccount:gpu-operator:nvidia-cc-manager", &["system:serviceaccounts"]);
const THEIR_VFIO_MANAGER: (&str, &[&str]) =
    ("system:serviceaccount:gpu-operator:nvidia-vfio-manager", &["system:serviceaccounts"]);

const MODE: &str = "nvidia.com/cc.mode";
const STATE: &str = "nvidia.com/cc.mode.state";
const READY: &str = "nvidia.com/cc.ready.state";
const DEPLOY_LABEL: &str = "nvidia.com/gpu.deploy.vfio-manager";

/// A write of node n1: who, on which node the token is, old and new value of one label or annotation.
type Written<'a> = ((&'a str, &'a [&'a str]), Option<&'a str>, &'a str, Option<&'a str>, Option<&'a str>);

fn written(policies: &Policies, write: &Written<'_>, resource: &str) -> Result<Verdict> {
    let ((user, groups), node, key, old, new) = *write;
    let object = |value: Option<&str>| {
        let pair = value.map(|value| (key, value));
        let pairs: Vec<(&str, &str)> = pair.into_iter().chain([("kubernetes.io/hostname", "n1")]).collect();
        if key.starts_with("ccnode.dev/") { node_object("n1", &[], &pairs) } else { node_object("n1", &pairs, &[]) }
    };
    policies.judge(&Ask { user, groups, node, operation: "UPDATE", resource, old: object(old), new: object(new) })
}

/// Each is refused with these words, or allowed.
fn all_are(policies: &Policies, writes: &[(Written<'_>, Option<&str>)]) -> Result<()> {
    for (write, refused) in writes {
        for resource in ["nodes", "nodes/status"] {
            let found = written(policies, write, resource)?;
            match (&found, refused) {
                (Verdict::Allowed, None) => {}
                (Verdict::Refused(message), Some(words)) if message.contains(words) => {}
                // No agent writes a node's status.
                (Verdict::Refused(message), _) if resource != "nodes" && message.contains("their status") => {}
                _ => anyhow::bail!("{write:?} of {resource}: {found:?}, and not {refused:?}"),
            }
        }
    }
    Ok(())
}

#[test]
fn modes_are_for_a_group_and_states_for_cc_manager() -> Result<()> {
    let policies = Policies(Rendering::read("rendered/default.yaml")?);
    let (mode, state) = (Some("cc.mode is set by members"), Some("written by cc-manager alone"));
    all_are(
        &policies,
        &[
            ((MODE_ADMIN, None, MODE, None, Some("on")), None),
            ((MODE_ADMIN, None, MODE, Some("on"), None), None),
            ((ADMIN, None, MODE, Some("on"), Some("off")), None),
            ((SOMEBODY, None, MODE, Some("on"), Some("off")), mode),
            ((SOMEBODY, None, MODE, Some("on"), None), mode),
            ((SOMEBODY, None, MODE, Some("on"), Some("on")), None),
            ((SOMEBODY, None, "example.org/x", None, Some("y")), None),
            ((KUBELET, Some("n1"), MODE, None, Some("off")), mode),
            ((KUBELET, Some("n1"), READY, Some(""), Some("true")), state),
            ((KUBELET, Some("n1"), "example.org/x", None, Some("y")), None),
            ((SOMEBODY, None, STATE, Some("off"), Some("on")), state),
            ((SOMEBODY, None, READY, Some("true"), None), state),
            ((MODE_ADMIN, None, READY, Some(""), Some("true")), state),
            ((PLUGIN, Some("n1"), STATE, None, Some("on")), state),
            ((ADMIN, None, READY, Some("true"), Some("")), None),
            ((CLEANUP, Some("n1"), READY, Some("true"), Some("")), None),
            ((SOMEBODY, None, "ccnode.dev/cc-status", None, Some("{}")), state),
            ((SOMEBODY, None, "ccnode.dev/transition", Some("{}"), None), state),
            ((SOMEBODY, None, "ccnode.dev/retry", None, Some("1")), None),
            ((THEIR_CC_MANAGER, Some("n1"), STATE, None, Some("on")), state),
        ],
    )?;
    // A kubelet that joins brings no such labels along; one that pretends to be of both groups is a kubelet still.
    let both: &[&str] = &["system:nodes", "system:masters"];
    for (groups, labels, refused) in [
        (KUBELET.1, &[(MODE, "off")][..], true),
        (KUBELET.1, &[(READY, "true")], true),
        (KUBELET.1, &[("kubernetes.io/hostname", "n1")], false),
        (KUBELET.1, &[], false),
        (both, &[(MODE, "off")], true),
        (ADMIN.1, &[(MODE, "off")], false),
    ] {
        let new = node_object("n1", labels, &[]);
        let (operation, resource) = ("CREATE", "nodes");
        let ask = Ask { user: KUBELET.0, groups, node: None, operation, resource, old: Value::Null, new };
        let found = policies.judge(&ask)?;
        ensure!((found != Verdict::Allowed) == refused, "{groups:?} {labels:?}: {found:?}");
        ensure!(!matches!(&found, Verdict::Refused(message) if message.starts_with("error")), "{found:?}");
    }
    Ok(())
}

#[test]
fn an_agent_changes_its_own_node_and_its_own_keys() -> Result<()> {
    let policies = Policies(Rendering::read("rendered/default.yaml")?);
    let (here, there) = (Some("n1"), Some("n2"));
    let not_here = Some("this token is of node n2, and not of n1");
    all_are(
        &policies,
        &[
            ((CC_MANAGER, here, STATE, Some("off"), Some("on")), None),
            ((CC_MANAGER, here, READY, Some("true"), Some("")), None),
            ((CC_MANAGER, here, "ccnode.dev/cc-status", None, Some("{}")), None),
            ((CC_MANAGER, here, "ccnode.dev/transition", Some("{}"), None), None),
            ((CC_MANAGER, there, STATE, Some("off"), Some("on")), not_here),
            ((CC_MANAGER, there, READY, Some("off"), Some("true")), not_here),
            ((CC_MANAGER, None, STATE, Some("off"), Some("on")), Some("this token is of node (none)")),
            ((CC_MANAGER, here, MODE, Some("off"), Some("on")), Some("no other labels")),
            ((CC_MANAGER, here, "node-role.kubernetes.io/control-plane", None, Some("")), Some("no other labels")),
            ((CC_MANAGER, here, "kubernetes.io/os", Some("linux"), None), Some("no other labels")),
            // It pauses the operator's components only where it is told to.
            ((CC_MANAGER, here, DEPLOY_LABEL, Some("true"), Some("paused")), Some("no other labels")),
            ((CC_MANAGER, here, "ccnode.dev/retry", None, Some("1")), Some("no other annotations")),
        ],
    )?;
    let paused = Policies(Rendering::read("rendered/everything.yaml")?);
    all_are(&paused, &[((CC_MANAGER, here, DEPLOY_LABEL, Some("true"), Some("paused")), None)])?;

    let (user, groups) = CC_MANAGER;
    let [old, mut new] = [(); 2].map(|()| node_object("n1", &[], &[]));
    new["spec"]["unschedulable"] = json!(true);
    for (operation, old, new, words) in [
        ("UPDATE", old.clone(), new.clone(), "no node's spec"),
        ("DELETE", old.clone(), Value::Null, "neither makes nor deletes"),
        ("CREATE", Value::Null, new, "neither makes nor deletes"),
    ] {
        let found = policies.judge(&Ask { user, groups, node: here, operation, resource: "nodes", old, new })?;
        ensure!(matches!(&found, Verdict::Refused(message) if message.contains(words)), "{operation}: {found:?}");
    }
    Ok(())
}

#[test]
fn the_operators_agents_are_bound_by_the_same() -> Result<()> {
    let (here, there) = (Some("n1"), Some("n2"));
    let (alone, state) = (Some("changes its own node alone"), Some("written by cc-manager alone"));
    let writes = [
        ((THEIR_CC_MANAGER, here, STATE, None, Some("on")), None),
        ((THEIR_CC_MANAGER, here, DEPLOY_LABEL, Some("true"), Some("paused-for-cc-mode-change")), None),
        ((THEIR_CC_MANAGER, there, STATE, None, Some("on")), alone),
        ((THEIR_CC_MANAGER, here, MODE, None, Some("on")), Some("no other labels")),
        ((THEIR_VFIO_MANAGER, here, DEPLOY_LABEL, Some("paused-for-driver-upgrade"), Some("true")), None),
        ((THEIR_VFIO_MANAGER, here, "nvidia.com/gpu.deploy.driver", None, Some("pre-installed")), None),
        ((THEIR_VFIO_MANAGER, there, DEPLOY_LABEL, None, Some("")), alone),
        ((THEIR_VFIO_MANAGER, here, READY, Some(""), Some("true")), Some("no other labels")),
        ((SOMEBODY, None, READY, Some(""), Some("true")), state),
        ((SOMEBODY, None, DEPLOY_LABEL, Some("true"), Some("false")), None),
    ];
    for file in ["policies/gpu-operator.yaml", "rendered/everything.yaml"] {
        all_are(&Policies(Rendering::read(file)?), &writes).context(file)?;
    }
    let own = [((CC_MANAGER, here, STATE, None, Some("on")), state)];
    all_are(&Policies(Rendering::read("policies/gpu-operator.yaml")?), &own)
}

#[test]
fn a_pod_gets_the_whole_board_or_nothing_of_it() -> Result<()> {
    let policies = Policies(Rendering::read("rendered/default.yaml")?);
    let container = |[gpus, switches]: [u32; 2]| {
        let mut limits = serde_json::Map::new();
        for (name, count) in [("nvidia.com/pgpu", gpus), ("nvidia.com/nvswitch", switches)] {
            if count > 0 {
                limits.insert(name.to_owned(), count.to_string().into());
            }
        }
        if limits.is_empty() { json!({"name": "c"}) } else { json!({"name": "c", "resources": {"limits": limits}}) }
    };
    let judge = |first: &[[u32; 2]], containers: &[[u32; 2]], selector: Option<(&str, &str)>| {
        let list = |items: &[[u32; 2]]| -> Value { items.iter().map(|item| container(*item)).collect() };
        let mut new = json!({"metadata": {"name": "p"}, "spec": {"containers": list(containers)}});
        if !first.is_empty() {
            new["spec"]["initContainers"] = list(first);
        }
        if let Some((key, value)) = selector {
            new["spec"]["nodeSelector"] = json!({key: value});
        }
        let (user, groups) = SOMEBODY;
        let old = Value::Null;
        policies.judge(&Ask { user, groups, node: None, operation: "CREATE", resource: "pods", old, new })
    };
    let (ppcie, on) = (Some((STATE, "ppcie")), Some((STATE, "on")));
    for (first, containers, selector, allowed) in [
        (&[][..], &[[0, 0]][..], None, true),
        (&[], &[[1, 0]], None, true),
        (&[], &[[8, 0]], None, true),
        (&[], &[[8, 0]], on, true),
        (&[], &[[0, 0]], ppcie, true),
        (&[], &[[8, 4]], None, true),
        (&[], &[[8, 4]], ppcie, true),
        (&[], &[[8, 0], [0, 4]], None, true),
        (&[], &[[4, 2], [4, 2], [0, 0]], ppcie, true),
        (&[[8, 4]], &[[0, 0]], None, true),
        (&[[8, 4]], &[[8, 4]], None, true),
        (&[], &[[8, 0]], ppcie, false),
        (&[], &[[1, 0]], ppcie, false),
        (&[], &[[1, 0]], Some((MODE, "ppcie")), false),
        (&[], &[[0, 4]], None, false),
        (&[], &[[8, 3]], None, false),
        (&[], &[[7, 4]], None, false),
        (&[], &[[8, 4], [8, 4]], None, false),
        (&[], &[[1, 1]], on, false),
        (&[[0, 1]], &[[8, 0]], None, false),
        (&[[1, 0]], &[[0, 0]], ppcie, false),
    ] {
        let found = judge(first, containers, selector)?;
        let is_so = match &found {
            Verdict::Allowed => allowed,
            Verdict::Refused(message) => !allowed && message.contains("nvidia.com/pgpu: 8 and nvidia.com/nvswitch: 4"),
        };
        ensure!(is_so, "{first:?} {containers:?} {selector:?}: {found:?}");
    }
    // Node affinity: whoever can come to no other nodes selects these.
    let by = |operator: &str, values: &[&str]| json!({"key": STATE, "operator": operator, "values": values});
    let zone = json!({"key": "topology.kubernetes.io/zone", "operator": "Exists"});
    for (terms, allowed) in [
        (json!([{"matchExpressions": [zone, by("In", &["ppcie"])]}]), false),
        (
            json!([{"matchExpressions": [by("In", &["ppcie"])]}, {"matchExpressions": [by("In", &["ppcie"]), zone]}]),
            false,
        ),
        (json!([{"matchExpressions": [by("In", &["ppcie"])]}, {"matchExpressions": [zone]}]), true),
        (json!([{"matchExpressions": [by("In", &["on", "ppcie"])]}]), true),
        (json!([{"matchExpressions": [by("NotIn", &["ppcie"])]}]), true),
        (json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]), true),
    ] {
        let affinity =
            json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}});
        let new = json!({"metadata": {"name": "p"}, "spec": {"containers": [container([1, 0])], "affinity": affinity}});
        let (user, groups) = SOMEBODY;
        let old = Value::Null;
        let ask = Ask { user, groups, node: None, operation: "CREATE", resource: "pods", old, new };
        let found = policies.judge(&ask)?;
        ensure!((found == Verdict::Allowed) == allowed, "{terms}: {found:?}");
        ensure!(!matches!(&found, Verdict::Refused(message) if message.starts_with("error")), "{found:?}");
    }
    let sample = Rendering::read("samples/ppcie.yaml")?.objects.remove(0);
    let (user, groups) = SOMEBODY;
    let ask = Ask { user, groups, node: None, operation: "CREATE", resource: "pods", old: Value::Null, new: sample };
    assert_eq!(policies.judge(&ask)?, Verdict::Allowed);
    Ok(())
}

// -- metrics ---------------------------------------------------------------------------------------------------------

/// An agent that runs on this machine, which has no GPU.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn page(port: u16) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The metrics of an agent that is started with command and environment of its DaemonSet, but for the places on the host.
fn exposed(agent: &str, kubeconfig: &Path, here: &Path) -> Result<String> {
    let container = Rendering::read("rendered/everything.yaml")?.container(agent)?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let (program, arguments) = container.argv.split_first().context("no command")?;
    let folder = |name: &str| here.join(agent).join(name);
    for name in ["plugins", "cdi", "state", "root/sys", "validations"] {
        std::fs::create_dir_all(folder(name))?;
    }
    let mut command = Command::new(lab::programs::built()?.join(program));
    command.args(arguments).env_clear().envs(container.env);
    command.env("NODE_NAME", in_process::NODE).env("HEALTH_ADDR", format!("127.0.0.1:{port}"));
    for (name, path) in [
        ("KUBECONFIG", kubeconfig.to_owned()),
        ("CCNODE_STATE_DIR", folder("state")),
        ("CCNODE_POD_RESOURCES", folder("none")),
        ("VFIO_VALIDATIONS_DIR", folder("validations")),
        ("VFIO_MANAGER_LOCK", folder("lock")),
        ("HOST_ROOT", folder("root")),
        ("KUBELET_PLUGIN_DIR", folder("plugins")),
        ("CDI_DIR", folder("cdi")),
        ("CCNODE_ROOT", folder("root")),
    ] {
        command.env(name, path);
    }
    // Whatever this machine has is not touched.
    command.env("CCNODE_MODE", "observe").env("VFIO_SELECT", "bdf=ffff:ff:1f.7");
    let log = std::fs::File::create(folder("log"))?;
    let mut running = Running(command.stdout(log.try_clone()?).stderr(log).stdin(Stdio::null()).spawn()?);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match page(port) {
            Ok(text) if text.contains("# EOF") => return Ok(text),
            answer => {
                let log = std::fs::read_to_string(folder("log"))?;
                ensure!(running.0.try_wait()?.is_none(), "{agent} has ended: {log}");
                ensure!(Instant::now() < deadline, "{agent} shows no metrics: {answer:?}\n{log}");
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Names of the series that a page of metrics is of.
fn series(page: &str) -> impl Iterator<Item = String> {
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    types.flat_map(|(name, kind)| {
        let endings: &[&str] = match kind {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        endings.iter().map(move |ending| format!("{name}{ending}")).collect::<Vec<_>>()
    })
}

/// What an agent's source has of its metrics: the text of its files.
fn metrics_sources(crate_name: &str) -> String {
    let folder = deploy().join("../crates").join(crate_name).join("src");
    // One of the two is there.
    ["metrics.rs", "counts.rs"].iter().filter_map(|file| std::fs::read_to_string(folder.join(file)).ok()).collect()
}

/// The series that an agent's source registers. Metrics with labels are on no page before something has happened.
fn registered(crate_name: &str) -> Result<BTreeSet<String>> {
    let text = metrics_sources(crate_name);
    let mut found = BTreeSet::new();
    for call in text.split(".register(").skip(1) {
        let call = call.split_once(");").context("a call without end")?.0;
        let Some(name) = call.trim_start().strip_prefix('"').and_then(|rest| rest.split('"').next()) else { continue };
        let field = call.rsplit_once(".clone()").and_then(|(before, _)| before.rsplit('.').next());
        let field = field.with_context(|| format!("which field is {name}?"))?;
        let mut lines = text.lines().map(str::trim);
        // A label may be called as a series is.
        let is_series = |kind: &&str| ["Histogram", "Counter", "Gauge"].iter().any(|series| kind.contains(series));
        let kind = lines.find_map(|line| {
            line.strip_prefix("pub ").unwrap_or(line).strip_prefix(field)?.strip_prefix(": ").filter(is_series)
        });
        let kind = kind.with_context(|| format!("of what type is {field}?"))?;
        let endings: &[&str] = match kind {
            _ if kind.contains("Histogram") => &["_bucket", "_sum", "_count"],
            _ if kind.contains("Counter") => &["_total"],
            _ => &[""],
        };
        found.extend(endings.iter().map(|ending| format!("ccnode_{name}{ending}")));
    }
    ensure!(!found.is_empty(), "{crate_name} registers nothing");
    Ok(found)
}

/// Fields of the label sets in an agent's source.
fn label_names(crate_name: &str) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for part in metrics_sources(crate_name).split("EncodeLabelSet)]").skip(1) {
        let body = part.split_once('{').and_then(|(_, rest)| rest.split_once('}')).context("not a label set")?.0;
        let fields = body.lines().map(str::trim).filter(|line| !line.starts_with("//"));
        names.extend(fields.filter_map(|line| Some(line.split_once(':')?.0.trim_start_matches("pub ").to_owned())));
    }
    Ok(names)
}

/// All words of an expression that stand where a metric's name does, with the labels of its selector.
fn selectors(expression: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    for (at, _) in expression.match_indices("ccnode_") {
        let rest = &expression[at..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let body = rest[end..].strip_prefix('{').and_then(|body| body.split_once('}')).map_or("", |(body, _)| body);
        let mut is_quoted = false;
        let matchers = body.split(|c: char| {
            is_quoted ^= c == '"';
            c == ',' && !is_quoted
        });
        let name = |matcher: &str| matcher.trim().split(['=', '!']).next().unwrap_or_default().to_owned();
        found.push((rest[..end].to_owned(), matchers.map(name).filter(|name| !name.is_empty()).collect()));
    }
    found
}

/// The labels after `by` and `on`.
fn groupings(expression: &str) -> Vec<String> {
    let lists = ["by (", "on ("].into_iter().flat_map(|word| expression.split(word).skip(1));
    let lists = lists.filter_map(|rest| rest.split_once(')'));
    lists.flat_map(|(list, _)| list.split(',').map(|name| name.trim().to_owned()).collect::<Vec<_>>()).collect()
}

fn texts_of<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                match value {
                    Value::String(text) if name == key => found.push(text),
                    _ => texts_of(value, key, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| texts_of(item, key, found)),
        _ => {}
    }
}

#[test]
fn dashboards_and_alerts_are_of_metrics_that_the_agents_expose() -> Result<()> {
    let here = tempfile::tempdir()?;
    let api = ApiServer::start(ApiServerConfig::default())?;
    let rules = Rendering::read("rendered/default.yaml")?.rules("ccnode-cc-manager")?;
    let token = api.add_identity(in_process::AGENT, &["system:serviceaccounts"], rules);
    let kubeconfig = here.path().join("kubeconfig");
    std::fs::write(&kubeconfig, api.kubeconfig(&token, "127.0.0.1"))?;
    api.add_node(in_process::NODE, &[])?;
    let (mut known, mut labels) = (BTreeSet::new(), BTreeMap::new());
    for (start, source) in [
        ("ccnode_cc_", "cc-manager"),
        ("ccnode_vfio_", "vfio-manager"),
        ("ccnode_plugin_", "device-plugin"),
        ("ccnode_api_", "node-object"),
    ] {
        known.extend(registered(source)?);
        labels.insert(start, label_names(source)?);
    }
    assert!(known.contains("ccnode_cc_transition_duration_seconds_bucket"), "{known:?}");
    // What is read from the sources is what runs.
    let mut live = BTreeSet::new();
    for agent in AGENTS {
        live.extend(series(&exposed(agent, &kubeconfig, here.path())?));
    }
    let unknown: Vec<&String> = live.difference(&known).collect();
    assert!(unknown.is_empty() && live.len() >= 8, "{unknown:?} of {live:?}");

    // Of the PodMonitor, and of histograms.
    let of_all = ["node", "agent", "le"];
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(deploy().join("dashboards/ccnode.json"))?)?;
    let alerts = Rendering::read("dashboards/alerts.yaml")?.objects;
    let mut expressions = Vec::new();
    texts_of(&dashboard, "expr", &mut expressions);
    let panels = expressions.len();
    texts_of(&dashboard, "query", &mut expressions);
    for alert in &alerts {
        texts_of(alert, "expr", &mut expressions);
    }
    assert!(panels > 20 && expressions.len() > panels + 10, "{}", expressions.len());
    let mut seen = BTreeSet::new();
    for expression in expressions {
        let mut possible: BTreeSet<&str> = of_all.into_iter().collect();
        for (name, matched) in selectors(expression) {
            ensure!(known.contains(&name), "{expression}: there is no {name}, but {known:?}");
            let (_, own) = labels.iter().find(|(start, _)| name.starts_with(**start)).context("whose is it?")?;
            possible.extend(own.iter().map(String::as_str));
            for label in matched {
                ensure!(of_all.contains(&&*label) || own.contains(&label), "{expression}: {name} has no label {label}");
            }
            seen.insert(name);
        }
        for label in groupings(expression) {
            ensure!(possible.contains(&*label), "{expression}: nothing has a label {label}");
        }
    }
    assert!(seen.len() > 15, "{seen:?}");
    Ok(())
}

#[test]
fn selectors_and_groupings_are_found() {
    let expression = r#"sum by (a, b) (rate(ccnode_x_total{c="1,x", d!~"2|3"}[5m])) unless on (e) ccnode_y"#;
    let found = selectors(expression);
    assert_eq!(found[0], ("ccnode_x_total".to_owned(), vec!["c".to_owned(), "d".to_owned()]));
    assert_eq!(found[1], ("ccnode_y".to_owned(), vec![]));
    assert_eq!(groupings(expression), ["a", "b", "e"]);
    assert!(label_names("node-object").unwrap().contains("verb"));
}
