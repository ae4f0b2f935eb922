//! The values file for the GPU Operator, and the comparison of its releases with golden facts.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::contract::{changed, differences, golden, is_supported, keys, of_checkout, unknown_keys, version_of};
use lab_kube::api_server::Rule;
use serde_json::Value;

const FACTS: &str = include_str!("../../deploy/gpu-operator/contract-v26.7.txt");
const CHANGES: &str = include_str!("../../deploy/gpu-operator/contract-v26.3.txt");
const VALUES: &str = include_str!("../../deploy/gpu-operator/values.yaml");
const MANIFEST: &str = include_str!("../../Cargo.toml");
const BUILD_PROGRAM: &str = include_str!("../../hack/build-program");

/// Fields of the operator's chart (operator-contract section 12), the same in v26.3 and v26.7: those of every part with a
/// container of its own,
const OF_A_CONTAINER: [&str; 8] =
    ["enabled", "repository", "image", "version", "imagePullPolicy", "imagePullSecrets", "resources", "env"];

/// and those of each part that has to do with our agents.
const FIELDS: [(&str, &[&str]); 4] = [
    ("sandboxWorkloads", &["enabled", "defaultWorkload", "mode"]),
    ("ccManager", &["defaultMode", "args"]),
    ("vfioManager", &["args", "driverManager"]),
    ("kataSandboxDevicePlugin", &["args"]),
];

fn values() -> Result<Value> {
    Ok(serde_saphyr::from_str(VALUES)?)
}

fn version() -> Result<&'static str> {
    let package = MANIFEST.split("[workspace.package]").nth(1).context("no [workspace.package]")?;
    let line = package.lines().find_map(|line| line.strip_prefix("version = \"")).context("no version")?;
    Ok(line.trim_end_matches('"'))
}

#[test]
fn the_values_are_fields_of_the_operators_chart_and_name_whole_images() -> Result<()> {
    let values = values()?;
    for (section, fields) in values.as_object().context("no values")? {
        let (_, known) =
            FIELDS.iter().find(|(name, _)| name == section).with_context(|| format!("{section} is no section"))?;
        for field in fields.as_object().context("no fields")?.keys() {
            let is_known = known.contains(&field.as_str())
                || (section != "sandboxWorkloads" && OF_A_CONTAINER.contains(&field.as_str()));
            ensure!(is_known, "{section}.{field} is no field");
        }
    }
    for (path, image) in [
        ("/ccManager", "cc-manager"),
        ("/vfioManager", "vfio-manager"),
        ("/vfioManager/driverManager", "vfio-manager"),
        ("/kataSandboxDevicePlugin", "device-plugin"),
    ] {
        let part = values.pointer(path).with_context(|| path.to_owned())?;
        // The operator takes a part that is missing from its own defaults: NVIDIA's version of our image.
        ensure!(part["repository"].as_str().is_some_and(|text| !text.ends_with('/')), "{path}");
        assert_eq!((part["image"].as_str(), part["version"].as_str()), (Some(image), Some(version()?)), "{path}");
    }
    assert_eq!(values["vfioManager"]["args"], serde_json::json!(["exec vfio-manager run"]));
    assert_eq!(values["sandboxWorkloads"]["mode"], "kata");
    ensure!(values["ccManager"]["defaultMode"].is_null(), "the mode of nodes without a label is the site's own");
    Ok(())
}

/// What rules allow, in the form of the facts, without OpenShift's own kinds.
fn allowed<'a>(facts: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    let rules = facts.filter_map(|fact| fact.strip_prefix("allow ")).filter(|rule| !rule.contains("openshift.io"));
    rules.map(str::to_owned).collect()
}

#[test]
fn what_tests_let_agents_do_under_the_operator_is_what_it_grants() -> Result<()> {
    let facts = golden(FACTS)?;
    for (part, rules) in [
        ("state-cc-manager", Rule::operator_cc_manager("gpu-operator")),
        ("state-vfio-manager", Rule::operator_vfio_manager()),
    ] {
        let files = facts.iter().filter(|(file, _)| file.contains(&format!("/{part}/")));
        let granted = allowed(files.flat_map(|(_, facts)| facts));
        let given = rules.iter().map(|rule| {
            let mut verbs = rule.verbs.clone();
            verbs.sort();
            format!("{}: {}", rule.resources.join(","), verbs.join(" "))
        });
        assert_eq!(given.collect::<BTreeSet<_>>(), granted, "{part}");
        // A Role of the operator's namespace is no ClusterRole.
        let of_namespace = |file: &str| allowed(facts.get(&format!("assets/{part}/{file}")).into_iter().flatten());
        let namespaced = rules.iter().filter(|rule| rule.namespace.is_some()).count();
        assert_eq!(of_namespace("0200_role.yaml").len(), namespaced, "{part}");
    }
    Ok(())
}

/// The names that an image answers to, of both kinds, as hack/build-program lays them out.
fn names_of(agent: &str) -> Result<BTreeSet<String>> {
    let line = BUILD_PROGRAM
        .lines()
        .find(|line| line.trim().starts_with(&format!("{agent}) names=")))
        .context("no such image")?;
    let quoted: Vec<&str> = line.split('"').collect();
    let names = quoted.get(1).context("no names")?.split_whitespace().map(|name| format!("/usr/bin/{name}"));
    let tools = quoted
        .get(3)
        .context("no links")?
        .split_whitespace()
        .filter_map(|pair| pair.split(':').next())
        .map(|path| format!("/{path}"));
    Ok(names.chain(tools).chain([format!("/usr/bin/{agent}")]).collect())
}

#[test]
fn every_program_that_the_operator_calls_is_in_its_image() -> Result<()> {
    let mut called = 0;
    for (file, facts) in golden(FACTS)? {
        let agent = ["cc-manager", "vfio-manager", "kata-device-plugin"]
            .into_iter()
            .find(|name| file.contains(&format!("state-{name}/")));
        let agent =
            if agent == Some("kata-device-plugin") { "device-plugin" } else { agent.context("another agent")? };
        let names = names_of(agent)?;
        for fact in facts.iter().filter(|fact| fact.contains(" command: ") || fact.contains(" preStop: ")) {
            let (_, argv) = fact.split_once(": ").context("no argv")?;
            let argv: Vec<String> = serde_json::from_str(argv)?;
            let words = argv.last().context("empty")?.split_whitespace().next().unwrap_or_default();
            for program in [argv[0].as_str(), if argv.len() == 3 && argv[1] == "-c" { words } else { &argv[0] }] {
                let path = if program.starts_with('/') { program.to_owned() } else { format!("/usr/bin/{program}") };
                ensure!(names.contains(&path), "{file}: {fact}: {path} is not in the image, which has {names:?}");
                called += 1;
            }
        }
    }
    ensure!(called >= 8, "{called}");
    Ok(())
}

/// A checkout with one DaemonSet, a role and the chart.
fn checkout(folder: &Path, command: &str, version: &str) -> Result<()> {
    let put = |name: &str, text: &str| -> Result<()> {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().context("no folder")?)?;
        Ok(fs::write(path, text)?)
    };
    put(
        "assets/a/0500_daemonset.yaml",
        &format!(
            "apiVersion: apps/v1\nkind: DaemonSet\nspec:\n  template:\n    metadata: {{labels: {{name: a}}}}\n    spec:\n      \
             containers:\n      - name: main\n        command: {command}\n        env:\n        - name: NODE_NAME\n          \
             valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}\n        volumeMounts:\n        - {{name: sys, mountPath: /sys, \
             readOnly: true}}\n      volumes:\n      - name: sys\n        hostPath: {{path: /sys, type: Directory}}\n"
        ),
    )?;
    put(
        "assets/a/0200_role.yaml",
        "kind: Role\nrules:\n- apiGroups: ['']\n  resources: [pods]\n  verbs: [list, get]\n- apiGroups: [policy]\n  \
         resources: [p]\n  verbs: [use]\n  resourceNames: [x]\n",
    )?;
    let lines: Vec<String> = keys(&values()?).iter().map(|key| format!("{{{{ .Values.{key} }}}}")).collect();
    put("deployments/gpu-operator/templates/clusterpolicy.yaml", &lines.join("\n"))?;
    put("deployments/gpu-operator/Chart.yaml", &format!("version: v1.0.0-devel\nappVersion: \"{version}\"\n"))
}

#[test]
fn a_release_that_differs_is_told_by_file_and_fact() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let golden = golden(
        "# Of a test.\n## assets/a/0500_daemonset.yaml\ncontainer main command: [\"/bin/sh\",\"-c\"]\n\
         container main env NODE_NAME: field spec.nodeName\ncontainer main mount /sys: host /sys (Directory), read-only\n\
         pod label name: \"a\"\n\n## assets/a/0200_role.yaml\nallow pods: get list\nallow p.policy/x: use\n",
    )?;
    checkout(folder.path(), "['/bin/sh', '-c']", "v26.7.0")?;
    assert_eq!(differences(&golden, &of_checkout(folder.path(), &golden)?), "");
    assert_eq!(unknown_keys(folder.path(), &values()?)?, Vec::<String>::new());

    checkout(folder.path(), "['/bin/ash']", "v26.8.0")?;
    fs::remove_file(folder.path().join("assets/a/0200_role.yaml"))?;
    assert_eq!(
        differences(&golden, &of_checkout(folder.path(), &golden)?),
        "assets/a/0200_role.yaml\n  is not there\nassets/a/0500_daemonset.yaml\n  - container main command: [\"/bin/sh\",\"-c\"]\n  \
         + container main command: [\"/bin/ash\"]\n"
    );
    let mut more = values()?;
    more["ccManager"]["frob"] = 1.into();
    assert_eq!(unknown_keys(folder.path(), &more)?, ["ccManager.frob"]);

    // A name that begins as a key does is another, and so is a key below it.
    for (inside, is_known) in [("enabled", true), ("enabledToo", false), ("enabled.more", false), ("enabled-x", false)]
    {
        let text = format!("{{{{ .Values.ccManager.{inside} }}}}");
        fs::write(folder.path().join("deployments/gpu-operator/templates/clusterpolicy.yaml"), text)?;
        let values = serde_json::json!({"ccManager": {"enabled": true}});
        assert_eq!(unknown_keys(folder.path(), &values)?.is_empty(), is_known, "{inside}");
    }

    let empty = tempfile::tempdir()?;
    let error = of_checkout(empty.path(), &golden).unwrap_err().to_string();
    ensure!(error.contains("no checkout of the GPU Operator"), "{error}");
    Ok(())
}

/// A checkout with what no release has had yet.
#[test]
fn new_files_and_new_fields_are_told() -> Result<()> {
    let folder = tempfile::tempdir()?;
    checkout(folder.path(), "[a]", "v26.8.0")?;
    let golden = golden("## assets/a/0500_daemonset.yaml\n## assets/a/0200_role.yaml\n")?;
    let before = of_checkout(folder.path(), &golden)?;
    let put = |name: &str, text: &str| fs::write(folder.path().join("assets/a").join(name), text);
    let daemon_set = |pod: &str, container: &str| {
        format!("kind: DaemonSet\nspec: {{template: {{spec: {{{pod} containers: [{{name: main, {container}}}]}}}}}}\n")
    };
    put("0100_service_account.yaml", "kind: ServiceAccount\n")?;
    assert_eq!(differences(&before, &of_checkout(folder.path(), &golden)?), "", "it runs nothing and allows nothing");

    put("0400_configmap.yaml", "kind: ConfigMap\ndata: {script: 'rm -rf /'}\n")?;
    put("0600_daemonset.yaml", &daemon_set("", "command: [b]"))?;
    assert_eq!(
        differences(&before, &of_checkout(folder.path(), &golden)?),
        "assets/a/0400_configmap.yaml\n  + an object of kind ConfigMap\n\
         assets/a/0600_daemonset.yaml\n  + an object of kind DaemonSet\n  + container main command: [\"b\"]\n"
    );

    for (pod, container, told) in [
        ("runtimeClassName: nvidia,", "", "runtimeClassName: \"nvidia\""),
        ("", "envFrom: [{configMapRef: {name: x}}]", "container main envFrom: [{\"configMapRef\":{\"name\":\"x\"}}]"),
        (
            "",
            "securityContext: {capabilities: {add: [X]}}",
            "container main securityContext.capabilities: {\"add\":[\"X\"]}",
        ),
        ("", "lifecycle: {postStart: {exec: {}}}", "container main lifecycle.postStart: {\"exec\":{}}"),
        ("", "lifecycle: {preStop: {sleep: {}}}", "container main lifecycle.preStop.sleep: {}"),
        ("tolerations: [{key: a, effect: b}],", "", "toleration: {\"effect\":\"b\",\"key\":\"a\"}"),
    ] {
        put("0600_daemonset.yaml", &daemon_set(pod, container))?;
        let found = of_checkout(folder.path(), &golden)?;
        let facts = &found["assets/a/0600_daemonset.yaml"];
        ensure!(facts.contains(told), "{told} is not in {facts:?}");
    }
    Ok(())
}

/// The one word of v26.3's hook is no program of any image; all else of it is as later.
#[test]
fn v26_3_differs_from_later_releases_in_its_hook_alone() -> Result<()> {
    let (later, older) = (golden(FACTS)?, changed(golden(FACTS)?, CHANGES)?);
    assert_eq!(
        differences(&later, &older),
        "assets/state-vfio-manager/0500_daemonset.yaml\n  - container nvidia-vfio-manager preStop: \
         [\"/bin/sh\",\"-c\",\"vfio-manage unbind --all\"]\n  + container nvidia-vfio-manager preStop: \
         [\"vfio-manage unbind --all\"]\n"
    );
    for (changes, told) in [
        ("## assets/b\n- grace: 30\n", "assets/b is in no facts"),
        ("## assets/state-cc-manager/0500_daemonset.yaml\n- grace: 31\n", "changes nothing: - grace: 31"),
        ("## assets/state-cc-manager/0500_daemonset.yaml\n+ grace: 30\n", "changes nothing: + grace: 30"),
        ("## assets/state-cc-manager/0500_daemonset.yaml\ngrace: 30\n", "neither - nor +"),
    ] {
        let error = changed(golden(FACTS)?, changes).unwrap_err().to_string();
        ensure!(error.contains(told), "{error}");
    }
    Ok(())
}

#[test]
fn older_releases_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (version, is_right) in
        [("v26.3.0", true), ("v26.7.0", true), ("v27.1.2", true), ("v25.10.1", false), ("v24.9.0", false)]
    {
        checkout(folder.path(), "[a]", version)?;
        assert_eq!(version_of(folder.path())?, version);
        assert_eq!(is_supported(version).is_ok(), is_right, "{version}");
    }
    let error = is_supported("v25.10.1").unwrap_err().to_string();
    ensure!(error.contains("v25.10.1 is older than v26.3") && error.contains("upgrade the operator"), "{error}");
    ensure!(is_supported("main").is_err());
    Ok(())
}
