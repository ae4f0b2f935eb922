//! CDI specs as the library in Kata's shim reads them: strictly, and all of them or none.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

/// Spec folders, lowest priority first.
pub(crate) const FOLDERS: [&str; 2] = ["etc/cdi", "var/run/cdi"];

/// Spec versions that the library in Kata's Go shim knows, oldest first.
const VERSIONS: [&str; 4] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0"];

/// Moments at which a hook may run.
const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// Why the specs on this machine are of no use.
#[derive(Debug, Error)]
pub enum Error {
    #[error("Cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("CDI spec {} does not parse: {reason}", path.display())]
    Parse { path: PathBuf, reason: String },
    #[error("CDI spec {} is invalid: {reason}", path.display())]
    Invalid { path: PathBuf, reason: String },
    #[error("CDI device {device} is defined in both {} and {}", first.display(), second.display())]
    Conflict { device: String, first: PathBuf, second: PathBuf },
}

/// A device and the spec it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) spec: PathBuf,
    /// Host paths of its device nodes.
    pub(crate) nodes: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    cdi_version: String,
    kind: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    devices: Vec<SpecDevice>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SpecDevice {
    name: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Edits {
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    device_nodes: Vec<Node>,
    #[serde(default)]
    hooks: Vec<Hook>,
    #[serde(default)]
    mounts: Vec<Mount>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Node {
    #[serde(default)]
    path: String,
    #[serde(default)]
    host_path: String,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default, rename = "major")]
    _major: Option<i64>,
    #[serde(default, rename = "minor")]
    _minor: Option<i64>,
    #[serde(default, rename = "fileMode")]
    _file_mode: Option<u32>,
    #[serde(default)]
    permissions: String,
    #[serde(default, rename = "uid")]
    _uid: Option<u32>,
    #[serde(default, rename = "gid")]
    _gid: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Hook {
    #[serde(default, rename = "hookName")]
    moment: String,
    #[serde(default)]
    path: String,
    #[serde(default, rename = "args")]
    _args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    #[serde(default, rename = "timeout")]
    _timeout: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Mount {
    #[serde(default)]
    host_path: String,
    #[serde(default)]
    container_path: String,
    #[serde(default, rename = "options")]
    _options: Vec<String>,
    #[serde(default, rename = "type")]
    kind: String,
}

/// Reads every spec below `root`. One bad spec fails the whole; so do two files of one folder with the same device. A
/// device of a later folder replaces one of an earlier folder.
pub(crate) fn load(root: &Path) -> Result<BTreeMap<String, Device>, Error> {
    let mut all = BTreeMap::new();
    for folder in FOLDERS {
        let mut here: BTreeMap<String, Device> = BTreeMap::new();
        for path in specs(&root.join(folder))? {
            let text = fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
            for (name, nodes) in parse(&path, &text)? {
                if let Some(other) = here.insert(name.clone(), Device { spec: path.clone(), nodes }) {
                    return Err(Error::Conflict { device: name, first: other.spec, second: path });
                }
            }
        }
        all.extend(here);
    }
    Ok(all)
}

/// Spec files of one folder, in name order: files ending in .json or .yaml, not those in sub-folders.
fn specs(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Read { path: folder.into(), source };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let spec = path.extension().is_some_and(|extension| extension == "yaml" || extension == "json");
        if spec && !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Fully qualified device names of a spec, with their nodes.
fn parse(path: &Path, text: &str) -> Result<Vec<(String, Vec<String>)>, Error> {
    let spec: Spec =
        serde_saphyr::from_str(text).map_err(|error| Error::Parse { path: path.into(), reason: error.to_string() })?;
    check(&spec).map_err(|reason| Error::Invalid { path: path.into(), reason })?;
    Ok(spec
        .devices
        .iter()
        .map(|device| {
            let nodes = device
                .container_edits
                .device_nodes
                .iter()
                .chain(&spec.container_edits.device_nodes)
                .map(|node| if node.host_path.is_empty() { node.path.clone() } else { node.host_path.clone() })
                .collect();
            (format!("{}={}", spec.kind, device.name), nodes)
        })
        .collect())
}

fn check(spec: &Spec) -> Result<(), String> {
    let version = VERSIONS.iter().position(|version| *version == spec.cdi_version);
    let Some(version) = version else { return Err(format!("unknown version {:?}", spec.cdi_version)) };
    let (vendor, class) =
        spec.kind.split_once('/').ok_or_else(|| format!("kind {:?} is not vendor/class", spec.kind))?;
    check_name("vendor", vendor, "_-.", false)?;
    check_name("class", class, "_-.", false)?;
    check_edits(&spec.container_edits)?;
    let mut seen = Vec::new();
    for device in &spec.devices {
        check_name("device name", &device.name, "_-.:", true)?;
        if seen.contains(&&device.name) {
            return Err(format!("device {:?} is there twice", device.name));
        }
        seen.push(&device.name);
        let edits = &device.container_edits;
        if edits.env.is_empty() && edits.device_nodes.is_empty() && edits.hooks.is_empty() && edits.mounts.is_empty() {
            return Err(format!("device {:?} has no edits", device.name));
        }
        check_edits(edits)?;
    }
    let (needed, what) = minimum(spec, class);
    if version < needed {
        return Err(format!("version {} is too old for {what}, which needs {}", spec.cdi_version, VERSIONS[needed]));
    }
    Ok(())
}

/// The oldest version, as an index into [`VERSIONS`], that has everything the spec uses.
fn minimum(spec: &Spec, class: &str) -> (usize, &'static str) {
    let edits = || spec.devices.iter().map(|device| &device.container_edits).chain([&spec.container_edits]);
    if !spec.annotations.is_empty() || spec.devices.iter().any(|device| !device.annotations.is_empty()) {
        return (3, "annotations");
    }
    if class.contains('.') {
        return (3, "a class with a dot");
    }
    if spec.devices.iter().any(|device| !device.name.starts_with(|c: char| c.is_ascii_alphabetic())) {
        return (2, "a device name that begins with a digit");
    }
    if edits().flat_map(|edits| &edits.device_nodes).any(|node| !node.host_path.is_empty()) {
        return (2, "hostPath of a device node");
    }
    if edits().flat_map(|edits| &edits.mounts).any(|mount| !mount.kind.is_empty()) {
        return (1, "the type of a mount");
    }
    (0, "")
}

/// Names begin with a letter (device names with a digit, too), end with a letter or digit, and have only those and
/// `inner` between.
fn check_name(what: &str, name: &str, inner: &str, digit_first: bool) -> Result<(), String> {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || digit_first && c.is_ascii_digit());
    let last = name.chars().last().is_some_and(|c| c.is_ascii_alphanumeric());
    let all = name.chars().all(|c| c.is_ascii_alphanumeric() || inner.contains(c));
    if first && last && all { Ok(()) } else { Err(format!("{what} {name:?} is not allowed")) }
}

fn check_edits(edits: &Edits) -> Result<(), String> {
    for env in edits.env.iter().chain(edits.hooks.iter().flat_map(|hook| &hook.env)) {
        if env.find('=').is_none_or(|at| at == 0) {
            return Err(format!("environment variable {env:?} has no value"));
        }
    }
    for node in &edits.device_nodes {
        if node.path.is_empty() {
            return Err("a device node has no path".into());
        }
        if !["", "b", "c", "u", "p"].contains(&node.kind.as_str()) {
            return Err(format!("device node {} has type {:?}", node.path, node.kind));
        }
        if !node.permissions.chars().all(|c| "rwm".contains(c)) {
            return Err(format!("device node {} has permissions {:?}", node.path, node.permissions));
        }
    }
    for hook in &edits.hooks {
        if !HOOKS.contains(&hook.moment.as_str()) {
            return Err(format!("hook name {:?} is unknown", hook.moment));
        }
        if hook.path.is_empty() {
            return Err("a hook has no path".into());
        }
    }
    if edits.mounts.iter().any(|mount| mount.host_path.is_empty() || mount.container_path.is_empty()) {
        return Err("a mount lacks a path".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "---\ncdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices:\n    - name: \"0\"\n      containerEdits:\n        deviceNodes:\n            - path: /dev/vfio/devices/vfio0\n";

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn good_specs_give_devices_and_other_files_are_left_alone() {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "var/run/cdi/nvidia.com-pgpu.yaml", GOOD);
        put(root.path(), "var/run/cdi/spec.123.tmp", "not: [a spec");
        put(root.path(), "var/run/cdi/notes.yml", "not: [a spec");
        put(
            root.path(),
            "etc/cdi/other.json",
            r#"{"cdiVersion":"0.3.0","kind":"x.io/y","devices":[{"name":"a","containerEdits":{"env":["A=B"]}}]}"#,
        );
        let devices = load(root.path()).unwrap();
        assert_eq!(devices.keys().collect::<Vec<_>>(), ["nvidia.com/pgpu=0", "x.io/y=a"]);
        assert_eq!(devices["nvidia.com/pgpu=0"].nodes, ["/dev/vfio/devices/vfio0"]);
    }

    #[test]
    fn the_same_device_twice_is_a_conflict_in_one_folder_and_an_override_across_folders() {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "etc/cdi/a.yaml", GOOD);
        put(root.path(), "var/run/cdi/b.yaml", GOOD);
        assert!(load(root.path()).unwrap()["nvidia.com/pgpu=0"].spec.ends_with("b.yaml"));
        put(root.path(), "var/run/cdi/c.yaml", GOOD);
        let error = load(root.path()).unwrap_err().to_string();
        assert!(error.starts_with("CDI device nvidia.com/pgpu=0 is defined in both"), "{error}");
    }

    #[test]
    fn bad_specs_are_named_with_the_reason() {
        let cases = [
            ("not yaml", "{", "does not parse"),
            ("unknown field", &format!("{GOOD}surprise: 1\n"), "does not parse"),
            ("newer version", &GOOD.replace("0.5.0", "0.7.0"), "unknown version \"0.7.0\""),
            ("too old", &GOOD.replace("0.5.0", "0.4.0"), "too old for a device name that begins with a digit"),
            ("kind", &GOOD.replace("nvidia.com/pgpu", "pgpu"), "is not vendor/class"),
            ("dotted class", &GOOD.replace("/pgpu", "/p.gpu"), "too old for a class with a dot"),
            ("class", &GOOD.replace("/pgpu", "/pgpu/x"), "class \"pgpu/x\" is not allowed"),
            ("name", &GOOD.replace("\"0\"", "\"a b\""), "device name \"a b\" is not allowed"),
            ("no path", &GOOD.replace("path: /dev/vfio/devices/vfio0", "hostPath: /dev/x"), "no path"),
            (
                "no edits",
                &GOOD.replace("deviceNodes:\n            - path: /dev/vfio/devices/vfio0", "env: []"),
                "no edits",
            ),
        ];
        for (what, text, expected) in cases {
            let root = tempfile::tempdir().unwrap();
            put(root.path(), "var/run/cdi/x.yaml", text);
            let error = load(root.path()).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("x.yaml"), "{what}: {error}");
        }
    }
}
