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

/// The facts of those files of a checkout that `golden` has.
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
    Ok(keys(values).into_iter().filter(|key| !text.contains(&format!(".Values.{key}"))).collect())
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
    ] {
        if !value.is_null() {
            facts.insert(format!("{words}: {value}"));
        }
    }
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
        ("memory limit", &container["resources"]["limits"]["memory"]),
        ("startup probe", &container["startupProbe"]),
        ("liveness probe", &container["livenessProbe"]),
        ("readiness probe", &container["readinessProbe"]),
    ] {
        if !value.is_null() {
            facts.push(format!("{words}: {value}"));
        }
    }
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
