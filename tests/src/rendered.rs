//! What is committed of the chart's renderings (`deploy/rendered`), as tests need it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use lab_kube::api_server::Rule;
use serde_json::Value;

/// The folder `deploy` of this repository.
pub fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Objects that were rendered together.
#[derive(Clone, Debug)]
pub struct Rendering {
    /// All of them.
    pub objects: Vec<Value>,
}

/// How one agent's container is started.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its command and arguments.
    pub argv: Vec<String>,
    /// Its environment, as far as the values are in the manifest.
    pub env: Vec<(String, String)>,
    /// The whole container.
    pub manifest: Value,
    /// The pod that it is in.
    pub pod: Value,
}

fn texts(value: &Value) -> Vec<String> {
    let items = value.as_array().into_iter().flatten();
    items.filter_map(|item| item.as_str().map(ToOwned::to_owned)).collect()
}

impl Rendering {
    /// Reads a file below `deploy`.
    pub fn read(path: &str) -> Result<Self> {
        let file = deploy().join(path);
        let text = std::fs::read_to_string(&file).with_context(|| format!("{} cannot be read", file.display()))?;
        let parts: Vec<Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("{} is no YAML", file.display()))?;
        let objects: Vec<Value> = parts.into_iter().filter(|part| !part.is_null()).collect();
        ensure!(!objects.is_empty(), "{} has no object", file.display());
        Ok(Self { objects })
    }

    /// The object of this kind and name.
    pub fn object(&self, kind: &str, name: &str) -> Result<&Value> {
        let found = self.objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
        found.with_context(|| format!("there is no {kind} {name}"))
    }

    /// The objects of a kind.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects.iter().filter(move |object| object["kind"] == kind)
    }

    /// What roles and bindings allow a service account.
    pub fn rules(&self, service_account: &str) -> Result<Vec<Rule>> {
        let mut rules = Vec::new();
        for binding in self.objects.iter().filter(|object| {
            let kind = object["kind"].as_str().unwrap_or_default();
            ["RoleBinding", "ClusterRoleBinding"].contains(&kind)
        }) {
            let mut subjects = binding["subjects"].as_array().into_iter().flatten();
            if !subjects.any(|subject| subject["kind"] == "ServiceAccount" && subject["name"] == service_account) {
                continue;
            }
            let [kind, name] = ["kind", "name"].map(|key| binding["roleRef"][key].as_str().unwrap_or_default());
            let namespace = binding["metadata"]["namespace"].as_str();
            for rule in self.object(kind, name)?["rules"].as_array().into_iter().flatten() {
                rules.push(Rule {
                    api_groups: texts(&rule["apiGroups"]),
                    resources: texts(&rule["resources"]),
                    verbs: texts(&rule["verbs"]),
                    resource_names: texts(&rule["resourceNames"]),
                    namespace: namespace.map(ToOwned::to_owned),
                });
            }
        }
        Ok(rules)
    }

    /// The container of an agent.
    pub fn container(&self, agent: &str) -> Result<Container> {
        self.container_of("DaemonSet", &format!("ccnode-{agent}"), agent)
    }

    /// A container of a DaemonSet, a Job or a pod, whether it runs on or comes before the others.
    pub fn container_of(&self, kind: &str, owner: &str, name: &str) -> Result<Container> {
        let spec = &self.object(kind, owner)?["spec"];
        let pod = if kind == "Pod" { spec } else { &spec["template"]["spec"] };
        let mut containers =
            [&pod["initContainers"], &pod["containers"]].into_iter().filter_map(Value::as_array).flatten();
        let manifest = containers.find(|item| item["name"] == name).context("its pod has no such container")?;
        let argv = [&manifest["command"], &manifest["args"]].into_iter().flat_map(texts).collect();
        let variables = manifest["env"].as_array().into_iter().flatten();
        let text = |value: &Value| value.as_str().map(ToOwned::to_owned);
        let env = variables.filter_map(|item| Some((text(&item["name"])?, text(&item["value"])?))).collect();
        Ok(Container { argv, env, manifest: manifest.clone(), pod: pod.clone() })
    }
}
