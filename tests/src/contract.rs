//! What a checkout of the GPU Operator runs of the agents that ccnode replaces, as facts, one a line, and how they differ from
//! golden ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Facts by the file they come from, relative to the checkout.
pub type Facts = BTreeMap<String, BTreeSet<String>>;

/// Reads golden facts: `## FILE`, then its facts.
pub fn golden(text: &str) -> Result<Facts> {
    let mut facts = Facts::new();
    let mut file = None;
    for line in text.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        if let Some(name) = line.strip_prefix("## ") {
            file = Some(name.to_owned());
            facts.entry(name.to_owned()).or_default();
        } else if !line.starts_with('#') {
            let file = file.clone().with_context(|| format!("a fact of no file: {line}"))?;
            facts.entry(file).or_default().insert(line.to_owned());
        }
    }
    Ok(facts)
}

/// A container of a DaemonSet, as its facts tell.
#[derive(Debug, Default)]
pub struct Container {
    /// `command` and `args`; nothing where the image's entry point runs.
    pub command: Vec<String>,
    /// See [`Self::command`].
    pub args: Vec<String>,
    /// Names and values.
    pub env: Vec<(String, Value)>,
    /// Names, and the fields of the pod that are the values.
    pub env_of_fields: Vec<(String, String)>,
    /// Path on the host, path in the container, and whether it is mounted read-only.
    pub mounts: Vec<(String, String, bool)>,
    /// The hook before its end.
    pub pre_stop: Vec<String>,
}

/// What facts tell of a container, which is named by its kind (`container` or `init`) and its name.
pub fn container(facts: &Facts, file: &str, name: &str) -> Result<Container> {
    let mut container = Container::default();
    let prefix = format!("{name} ");
    let of_file = facts.get(file).with_context(|| format!("no facts of {file}"))?;
    let own: Vec<&str> = of_file.iter().filter_map(|fact| fact.strip_prefix(&prefix)).collect();
    ensure!(!own.is_empty(), "{file} has no {name}");
    for fact in own {
        let (key, value) = fact.split_once(": ").with_context(|| format!("no value: {fact}"))?;
        let told = || serde_json::from_str(value).with_context(|| fact.to_owned());
        match key.split_once(' ') {
            None if key == "command" => container.command = told()?,
            None if key == "args" => container.args = told()?,
            None if key == "preStop" => container.pre_stop = told()?,
            Some(("env", variable)) => match value.strip_prefix("field ") {
                Some(field) => container.env_of_fields.push((variable.to_owned(), field.to_owned())),
                None => container.env.push((variable.to_owned(), serde_json::from_str(value)?)),
            },
            Some(("mount", place)) => {
                let host = value.strip_prefix("host ").with_context(|| format!("nothing of the host's: {fact}"))?;
                let path = host.split([' ', ',']).next().unwrap_or_default();
                container.mounts.push((path.to_owned(), place.to_owned(), host.contains(", read-only")));
            }
            // What else a runtime makes of it.
            _ => {}
        }
    }
    Ok(container)
}

/// Facts of an older release: those of a newer one, and what is told to be otherwise, as facts with `- ` and `+ ` before them.
pub fn changed(mut facts: Facts, changes: &str) -> Result<Facts> {
    for (file, changes) in golden(changes)? {
        let of_file = facts.get_mut(&file).with_context(|| format!("{file} is in no facts that could change"))?;
        for change in changes {
            let done = match change.split_at_checked(2) {
                Some(("- ", fact)) => of_file.remove(fact),
                Some(("+ ", fact)) => of_file.insert(fact.to_owned()),
                _ => anyhow::bail!("{file}: neither - nor + is before: {change}"),
            };
            ensure!(done, "{file}: this changes nothing: {change}");
        }
    }
    Ok(facts)
}

/// Kinds that run nothing and allow nothing by themselves: what they name is told by the others.
const KINDS_BESIDE: [&str; 5] =
    ["ServiceAccount", "RoleBinding", "ClusterRoleBinding", "SecurityContextConstraints", "RuntimeClass"];

/// The facts of those files of a checkout that `golden` has, and of those beside them that run or allow something.
pub fn of_checkout(checkout: &Path, golden: &Facts) -> Result<Facts> {
    ensure!(
        checkout.join("assets").is_dir(),
        "{} has no folder assets: it is no checkout of the GPU Operator; get one by: \
         git clone --depth 1 --branch v26.7.0 https://github.com/NVIDIA/gpu-operator",
        checkout.display()
    );
    let mut facts = Facts::new();
    for name in golden.keys() {
        let Ok(text) = fs::read_to_string(checkout.join(name)) else { continue };
        let object = serde_saphyr::from_str(&text).with_context(|| format!("{name} cannot be understood"))?;
        facts.insert(name.clone(), of_object(&object).with_context(|| name.clone())?);
    }
    let folders: BTreeSet<&str> = golden.keys().filter_map(|name| Some(name.rsplit_once('/')?.0)).collect();
    for folder in folders {
        // Gone with all its files, which is told of each.
        let Ok(entries) = fs::read_dir(checkout.join(folder)) else { continue };
        for entry in entries {
            let name = format!("{folder}/{}", entry?.file_name().to_string_lossy());
            if facts.contains_key(&name) {
                continue;
            }
            let text = fs::read_to_string(checkout.join(&name)).with_context(|| format!("{name} cannot be read"))?;
            let object: Value =
                serde_saphyr::from_str(&text).with_context(|| format!("{name} cannot be understood"))?;
            let kind = object["kind"].as_str().unwrap_or_default();
            if KINDS_BESIDE.contains(&kind) {
                continue;
            }
            let of_file = of_object(&object).unwrap_or_default();
            facts.insert(name, of_file.into_iter().chain([format!("an object of kind {kind}")]).collect());
        }
    }
    Ok(facts)
}

/// Releases before this one start other containers: no Kata device plugin, and NVIDIA's CUDA image with a script for vfio-manager.
pub const OLDEST: (u32, u32) = (26, 3);

/// The release whose facts are golden as they are; what older ones run otherwise is told beside them.
pub const GOLDEN: (u32, u32) = (26, 7);

/// Major and minor number of a version such as `v26.7.0`.
pub fn release(version: &str) -> Result<(u32, u32)> {
    let mut numbers = version.trim_start_matches('v').split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => anyhow::bail!("{version:?} is no version of the GPU Operator"),
    }
}

/// Refuses a release that ccnode's images are not made for, by its version.
pub fn is_supported(version: &str) -> Result<()> {
    ensure!(
        release(version)? >= OLDEST,
        "GPU Operator {version} is older than v{}.{}: it has no Kata device plugin, and runs a shell script in NVIDIA's CUDA image \
         as its vfio-manager; upgrade the operator, or install ccnode's own chart without it",
        OLDEST.0,
        OLDEST.1
    );
    Ok(())
}

/// The version of a checkout: that of its chart, or what its Makefile's variables say where the chart's is a placeholder.
pub fn version_of(checkout: &Path) -> Result<String> {
    let read = |name: &str| fs::read_to_string(checkout.join(name)).unwrap_or_default();
    let chart: Value = serde_saphyr::from_str(&read("deployments/gpu-operator/Chart.yaml")).unwrap_or_default();
    let in_chart = chart["appVersion"].as_str().filter(|version| is_version(version)).map(str::to_owned);
    let in_makefile = || {
        let text = read("versions.mk");
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix("VERSION")?.split_once('=').map(|(_, value)| value.trim().to_owned()));
        value.filter(|version| is_version(version))
    };
    in_chart.or_else(in_makefile).context("neither deployments/gpu-operator/Chart.yaml nor versions.mk tells a version")
}

fn is_version(text: &str) -> bool {
    text.trim_start_matches('v').starts_with(|first: char| first.is_ascii_digit() && first != '0' && first != '1')
}

/// Every key of a values file, down to what is no map.
pub fn keys(values: &Value) -> BTreeSet<String> {
    let below = |(name, value): (&String, &Value)| -> Vec<String> {
        match value {
            Value::Object(_) => keys(value).iter().map(|key| format!("{name}.{key}")).collect(),
            _ => vec![name.clone()],
        }
    };
    entries(values).flat_map(below).collect()
}

/// The keys of a values file that a checkout's chart does not look at.
pub fn unknown_keys(checkout: &Path, values: &Value) -> Result<Vec<String>> {
    let template = checkout.join("deployments/gpu-operator/templates/clusterpolicy.yaml");
    let text = fs::read_to_string(&template).with_context(|| format!("{} cannot be read", template.display()))?;
    // Whole names: of a key that begins as another does, or that has others below it, nothing is known.
    let is_of_a_name = |next: char| next.is_ascii_alphanumeric() || "._-".contains(next);
    let is_looked_at = |key: &String| {
        let wanted = format!(".Values.{key}");
        text.match_indices(&wanted).any(|(at, _)| !text[at + wanted.len()..].starts_with(is_of_a_name))
    };
    Ok(keys(values).into_iter().filter(|key| !is_looked_at(key)).collect())
}

/// What is in one and not in the other, with the files; empty where they agree.
pub fn differences(golden: &Facts, found: &Facts) -> String {
    let mut text = String::new();
    for (file, wanted) in golden {
        let Some(found) = found.get(file) else {
            text.extend([file.as_str(), "\n  is not there\n"]);
            continue;
        };
        let gone = wanted.difference(found).map(|fact| format!("  - {fact}\n"));
        let new = found.difference(wanted).map(|fact| format!("  + {fact}\n"));
        let lines: String = gone.chain(new).collect();
        if !lines.is_empty() {
            text.extend([file.as_str(), "\n", lines.as_str()]);
        }
    }
    for (file, facts) in found.iter().filter(|(file, _)| !golden.contains_key(*file)) {
        text.extend([file.as_str(), "\n"]);
        text.extend(facts.iter().flat_map(|fact| ["  + ", fact.as_str(), "\n"]));
    }
    text
}

fn of_object(object: &Value) -> Result<BTreeSet<String>> {
    match object["kind"].as_str() {
        Some("DaemonSet") => Ok(of_daemon_set(object)),
        Some("Role" | "ClusterRole") => Ok(of_role(object)),
        kind => anyhow::bail!("an object of kind {kind:?}"),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn of_role(role: &Value) -> BTreeSet<String> {
    let mut facts = BTreeSet::new();
    for rule in list(&role["rules"]) {
        let mut verbs: Vec<&str> = list(&rule["verbs"]).filter_map(Value::as_str).collect();
        verbs.sort_unstable();
        let names: Vec<&str> = list(&rule["resourceNames"]).filter_map(Value::as_str).collect();
        let names = if names.is_empty() { String::new() } else { format!("/{}", names.join(",")) };
        for group in list(&rule["apiGroups"]).filter_map(Value::as_str) {
            let group = if group.is_empty() { String::new() } else { format!(".{group}") };
            for resource in list(&rule["resources"]).filter_map(Value::as_str) {
                facts.insert(format!("allow {resource}{group}{names}: {}", verbs.join(" ")));
            }
        }
    }
    facts
}

fn of_daemon_set(set: &Value) -> BTreeSet<String> {
    let template = &set["spec"]["template"];
    let pod = &template["spec"];
    let mut facts = BTreeSet::new();
    for (name, value) in entries(&template["metadata"]["labels"]) {
        facts.insert(format!("pod label {name}: {value}"));
    }
    for (name, value) in entries(&pod["nodeSelector"]) {
        facts.insert(format!("node {name}: {value}"));
    }
    for (words, value) in [
        ("grace", &pod["terminationGracePeriodSeconds"]),
        ("service account", &pod["serviceAccountName"]),
        ("host network", &pod["hostNetwork"]),
        ("host PIDs", &pod["hostPID"]),
        ("priority class", &pod["priorityClassName"]),
    ] {
        if !value.is_null() {
            facts.insert(format!("{words}: {value}"));
        }
    }
    for toleration in list(&pod["tolerations"]) {
        facts.insert(format!("toleration: {toleration}"));
    }
    facts.extend(others(pod, &POD_FIELDS, ""));
    let volumes: BTreeMap<&str, &Value> =
        list(&pod["volumes"]).filter_map(|volume| Some((volume["name"].as_str()?, volume))).collect();
    for (kind, containers) in [("init", &pod["initContainers"]), ("container", &pod["containers"])] {
        for container in list(containers) {
            let name = container["name"].as_str().unwrap_or_default();
            facts.extend(of_container(container, &volumes).into_iter().map(|fact| format!("{kind} {name} {fact}")));
        }
    }
    facts
}

/// The fields of a pod and of a container that have facts of their own, or say nothing of what runs.
const POD_FIELDS: [&str; 10] = [
    "containers",
    "hostNetwork",
    "hostPID",
    "initContainers",
    "nodeSelector",
    "priorityClassName",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "tolerations",
    "volumes",
];
const CONTAINER_FIELDS: [&str; 13] = [
    "args",
    "command",
    "env",
    "image",
    "imagePullPolicy",
    "lifecycle",
    "livenessProbe",
    "name",
    "readinessProbe",
    "resources",
    "securityContext",
    "startupProbe",
    "volumeMounts",
];
const CONFINEMENT_FIELDS: [&str; 4] = ["privileged", "readOnlyRootFilesystem", "runAsUser", "seLinuxOptions"];

/// Facts of all other fields, by their names: what nobody has thought of yet.
fn others(object: &Value, known: &[&str], of: &str) -> Vec<String> {
    let new = entries(object).filter(|(name, _)| !known.contains(&name.as_str()));
    new.map(|(name, value)| format!("{of}{name}: {value}")).collect()
}

fn of_container(container: &Value, volumes: &BTreeMap<&str, &Value>) -> Vec<String> {
    // The waiting shell of the validator's image is not ours to run.
    let is_theirs = container["name"].as_str().is_some_and(|name| name.contains("validation"));
    let mut facts = Vec::new();
    for (words, value) in [
        ("command", if is_theirs { &Value::Null } else { &container["command"] }),
        ("args", if is_theirs { &Value::Null } else { &container["args"] }),
        ("preStop", &container["lifecycle"]["preStop"]["exec"]["command"]),
        ("privileged", &container["securityContext"]["privileged"]),
        ("user", &container["securityContext"]["runAsUser"]),
        ("read-only root", &container["securityContext"]["readOnlyRootFilesystem"]),
        ("SELinux", &container["securityContext"]["seLinuxOptions"]),
        ("memory limit", &container["resources"]["limits"]["memory"]),
        ("startup probe", &container["startupProbe"]),
        ("liveness probe", &container["livenessProbe"]),
        ("readiness probe", &container["readinessProbe"]),
    ] {
        if !value.is_null() {
            facts.push(format!("{words}: {value}"));
        }
    }
    facts.extend(others(container, &CONTAINER_FIELDS, ""));
    facts.extend(others(&container["securityContext"], &CONFINEMENT_FIELDS, "securityContext."));
    facts.extend(others(&container["lifecycle"], &["preStop"], "lifecycle."));
    facts.extend(others(&container["lifecycle"]["preStop"], &["exec"], "lifecycle.preStop."));
    for variable in list(&container["env"]) {
        let name = variable["name"].as_str().unwrap_or_default();
        let field = &variable["valueFrom"]["fieldRef"]["fieldPath"];
        let value = field.as_str().map_or_else(|| variable["value"].to_string(), |field| format!("field {field}"));
        facts.push(format!("env {name}: {value}"));
    }
    for mount in list(&container["volumeMounts"]) {
        let source = mount["name"].as_str().and_then(|name| volumes.get(name)).map(|volume| &volume["hostPath"]);
        let path =
            source.and_then(|host| host["path"].as_str()).map_or("nothing".to_owned(), |path| format!("host {path}"));
        let kind = source.and_then(|host| host["type"].as_str()).map(|kind| format!(" ({kind})")).unwrap_or_default();
        let read_only = if mount["readOnly"] == true { ", read-only" } else { "" };
        let propagation = mount["mountPropagation"].as_str().map(|name| format!(", {name}")).unwrap_or_default();
        let place = mount["mountPath"].as_str().unwrap_or_default();
        facts.push(format!("mount {place}: {path}{kind}{read_only}{propagation}"));
    }
    facts
}
