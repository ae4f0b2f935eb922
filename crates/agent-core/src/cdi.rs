//! CDI files: by what those of the device plugin are known, and what makes a file one that Kata's Go runtime refuses, and with
//! it every pod that has devices (operator-contract sections 7.7 and 10).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer};

/// Versions that the CDI library of Kata's Go runtime knows, oldest first.
const KNOWN: [&str; 4] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0"];

/// When a hook may run.
const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// Vendor part of every resource name and CDI kind (operator-contract section 7.5).
pub const VENDOR: &str = "nvidia.com";

/// Newest version that the CDI library of Kata's Go runtime knows is 0.6.0; oldest that lets a device name begin with a
/// digit is this.
pub const VERSION: &str = "0.5.0";

/// Longest file that is read to see whether it has changed or is ours, in bytes.
pub const LONGEST: u64 = 1 << 20;

/// CDI's rule for device names: letters, digits, `_`, `-`, `.` and `:`, a letter or digit at both ends.
pub fn is_device_name(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    ends(text.chars().next())
        && ends(text.chars().next_back())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':'))
}

/// `nvidia.com-pgpu.yaml.rest` as `pgpu` and `.rest`.
pub fn class_and_rest(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix(VENDOR)?.strip_prefix('-')?.split_once(".yaml")
}

/// Whether a file is one that this program or the reference wrote: its shape, line by line, with nothing in it but
/// VFIO nodes. Everything else under a similar name (a container toolkit's, an administrator's) is foreign.
pub fn is_ours(kind: &str, text: &str) -> bool {
    let Some(body) = text.strip_prefix(&format!("---\ncdiVersion: {VERSION}\nkind: {kind}\ndevices:\n")) else {
        return false;
    };
    !body.is_empty()
        && body.lines().all(|line| {
            let line = line.trim_start();
            matches!(line, "containerEdits:" | "deviceNodes:")
                || line.strip_prefix("- name: ").is_some_and(|name| is_device_name(name.trim_matches('"')))
                || line.strip_prefix("- path: ").is_some_and(|path| path.starts_with("/dev/vfio/"))
        })
}

/// A CDI file, read as strictly as Kata's Go runtime reads it: a field that its library does not know makes it none.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// Version of the format.
    pub cdi_version: String,
    /// Vendor and class of its devices.
    pub kind: String,
    #[serde(default, deserialize_with = "or_default")]
    annotations: BTreeMap<String, String>,
    /// Its devices.
    #[serde(default, deserialize_with = "or_default")]
    pub devices: Vec<Device>,
    #[serde(default, deserialize_with = "or_default")]
    container_edits: Edits,
}

/// A device of a CDI file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// What it is called within its kind.
    pub name: String,
    #[serde(default, deserialize_with = "or_default")]
    annotations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "or_default")]
    container_edits: Edits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Edits {
    #[serde(default, deserialize_with = "or_default")]
    env: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    device_nodes: Vec<Node>,
    #[serde(default, deserialize_with = "or_default")]
    hooks: Vec<Hook>,
    #[serde(default, deserialize_with = "or_default")]
    mounts: Vec<Mount>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Node {
    #[serde(deserialize_with = "or_default")]
    path: String,
    #[serde(deserialize_with = "or_default")]
    host_path: String,
    #[serde(deserialize_with = "or_default")]
    r#type: String,
    #[serde(deserialize_with = "or_default")]
    permissions: String,
    #[serde(rename = "major")]
    _major: Option<i64>,
    #[serde(rename = "minor")]
    _minor: Option<i64>,
    #[serde(rename = "fileMode")]
    _file_mode: Option<u32>,
    #[serde(rename = "uid")]
    _uid: Option<u32>,
    #[serde(rename = "gid")]
    _gid: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Hook {
    #[serde(rename = "hookName", deserialize_with = "or_default")]
    moment: String,
    #[serde(deserialize_with = "or_default")]
    path: String,
    #[serde(deserialize_with = "or_default")]
    env: Vec<String>,
    #[serde(rename = "args", deserialize_with = "or_default")]
    _args: Vec<String>,
    #[serde(rename = "timeout")]
    _timeout: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Mount {
    #[serde(deserialize_with = "or_default")]
    host_path: String,
    #[serde(deserialize_with = "or_default")]
    container_path: String,
    #[serde(deserialize_with = "or_default")]
    r#type: String,
    #[serde(rename = "options", deserialize_with = "or_default")]
    _options: Vec<String>,
}

/// As Go reads it: a field without value is as if it were not there.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Device {
    /// The device nodes of the host that it stands for.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        let nodes = self.container_edits.device_nodes.iter();
        nodes.map(|node| if node.host_path.is_empty() { node.path.as_str() } else { node.host_path.as_str() })
    }
}

impl Spec {
    /// Why Kata's Go runtime refuses it; none when it is valid. What the file says of its containers' environment is not shown.
    pub fn trouble(&self) -> Option<String> {
        let told = self.cdi_version.strip_prefix('v').unwrap_or(&self.cdi_version);
        let Some(version) = KNOWN.iter().position(|known| *known == told) else {
            let version = &self.cdi_version;
            return Some(format!(
                "Has version {version:?}, which Kata's Go runtime does not know: it knows 0.3.0 to 0.6.0"
            ));
        };
        let vendor_and_class = self.kind.split_once('/');
        if !vendor_and_class.is_some_and(|(vendor, class)| is_kind_name(vendor) && is_kind_name(class)) {
            return Some(format!("Has kind {:?}, which is not of the form vendor/class", self.kind));
        }
        let mut different = BTreeSet::new();
        for Device { name, .. } in &self.devices {
            if !is_device_name(name) {
                return Some(format!("Names a device {name:?}, which is no name of one"));
            }
            if !different.insert(name) {
                return Some("Names a device twice".into());
            }
        }
        if let Some(empty) = self.devices.iter().find(|device| device.container_edits.is_empty()) {
            return Some(format!("Has nothing to give for device {:?}", empty.name));
        }
        if let Some(trouble) = self.edits().find_map(Edits::trouble) {
            return Some(trouble.into());
        }
        let (needed, what) = self.least_version();
        let needs = KNOWN.get(needed).filter(|_| version < needed)?;
        Some(format!("Has version {}, and {what} needs {needs}", self.cdi_version))
    }

    fn edits(&self) -> impl Iterator<Item = &Edits> {
        self.devices.iter().map(|device| &device.container_edits).chain([&self.container_edits])
    }

    /// The oldest version, by its place in [`KNOWN`], that has what the file uses, and what of it is so new.
    fn least_version(&self) -> (usize, &'static str) {
        let is_annotated = !self.annotations.is_empty() || self.devices.iter().any(|it| !it.annotations.is_empty());
        let has_dot = self.kind.split_once('/').is_some_and(|(_, class)| class.contains('.'));
        let has_digit = self.devices.iter().any(|it| !it.name.starts_with(|c: char| c.is_ascii_alphabetic()));
        let has_host_path = self.edits().flat_map(|edits| &edits.device_nodes).any(|node| !node.host_path.is_empty());
        let has_mount_type = self.edits().flat_map(|edits| &edits.mounts).any(|mount| !mount.r#type.is_empty());
        let uses = [
            (is_annotated, 3, "an annotation"),
            (has_dot, 3, "a class with a dot"),
            (has_digit, 2, "the name of a device that begins with a digit"),
            (has_host_path, 2, "hostPath of a device node"),
            (has_mount_type, 1, "the type of a mount"),
        ];
        uses.into_iter().find(|(is_used, ..)| *is_used).map_or((0, ""), |(_, version, what)| (version, what))
    }
}

impl Edits {
    fn is_empty(&self) -> bool {
        self.env.is_empty() && self.device_nodes.is_empty() && self.hooks.is_empty() && self.mounts.is_empty()
    }

    fn trouble(&self) -> Option<&'static str> {
        let variables = self.env.iter().chain(self.hooks.iter().flat_map(|hook| &hook.env));
        let is_node = |node: &Node| {
            ["", "b", "c", "u", "p"].contains(&node.r#type.as_str())
                && node.permissions.chars().all(|c| "rwm".contains(c))
        };
        let troubles = [
            (
                variables.clone().any(|variable| variable.find('=').is_none_or(|at| at == 0)),
                "Has an environment variable without name or value",
            ),
            (self.device_nodes.iter().any(|node| node.path.is_empty()), "Has a device node without path"),
            (
                !self.device_nodes.iter().all(is_node),
                "Has a device node of a type other than b, c, u and p, or with permissions other than r, w and m",
            ),
            (!self.hooks.iter().all(|hook| HOOKS.contains(&hook.moment.as_str())), "Has a hook of an unknown name"),
            (self.hooks.iter().any(|hook| hook.path.is_empty()), "Has a hook without path"),
            (
                self.mounts.iter().any(|mount| mount.host_path.is_empty() || mount.container_path.is_empty()),
                "Has a mount without its two paths",
            ),
        ];
        troubles.into_iter().find(|(is_so, _)| *is_so).map(|(_, words)| words)
    }
}

/// CDI's rule for vendors and classes: a letter first, a letter or digit last, and `_`, `-` and `.` between.
fn is_kind_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A valid file of one device, changed.
    fn judged(change: impl FnOnce(&mut Value)) -> Option<String> {
        let mut file = json!({
            "cdiVersion": "0.5.0", "kind": "a.b/c",
            "devices": [{"name": "x", "containerEdits": {"deviceNodes": [{"path": "/dev/x"}]}}],
        });
        change(&mut file);
        match serde_json::from_value::<Spec>(file) {
            Ok(spec) => spec.trouble(),
            Err(error) => Some(error.to_string()),
        }
    }

    #[test]
    fn each_trouble_has_its_words_and_a_valid_file_has_none() {
        type Change = fn(&mut Value);
        let cases: &[(&str, Change)] = &[
            ("", |_| {}),
            ("", |file| {
                file["containerEdits"] = json!({
                    "env": ["A=", "B=c=d"], "mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "bind"}],
                    "hooks": [{"hookName": "createRuntime", "path": "/bin/x", "args": ["x"], "timeout": 1}],
                });
            }),
            ("", |file| file["kind"] = "a.b/c_d-e".into()),
            ("does not know", |file| file["cdiVersion"] = "1.0.0".into()),
            ("does not know", |file| file["cdiVersion"] = "0.3".into()),
            ("missing field", |file| drop(file.as_object_mut().unwrap().remove("kind"))),
            ("unknown field", |file| file["surprise"] = 1.into()),
            ("unknown field", |file| file["containerEdits"] = json!({"intelRdt": {}})),
            ("vendor/class", |file| file["kind"] = "ab".into()),
            ("vendor/class", |file| file["kind"] = "/b".into()),
            ("vendor/class", |file| file["kind"] = "a.b/c/d".into()),
            ("vendor/class", |file| file["kind"] = "a.b/1c".into()),
            ("a class with a dot needs 0.6.0", |file| file["kind"] = "a.b/c.d".into()),
            // The library refuses it in some versions, and not in others.
            ("", |file| file["devices"] = json!([])),
            ("", |file| file["cdiVersion"] = "v0.5.0".into()),
            ("", |file| {
                file["annotations"] = Value::Null;
                file["containerEdits"] = json!({"env": null, "hooks": null, "mounts": null, "deviceNodes": null});
                file["devices"][0]["annotations"] = Value::Null;
                file["devices"][0]["containerEdits"]["deviceNodes"][0] =
                    json!({"path": "/dev/x", "hostPath": null, "type": null, "permissions": null, "major": null});
            }),
            ("twice", |file| {
                let device = file["devices"][0].clone();
                file["devices"].as_array_mut().unwrap().push(device);
            }),
            ("no name of one", |file| file["devices"][0]["name"] = "a b".into()),
            ("needs 0.5.0", |file| {
                file["cdiVersion"] = "0.4.0".into();
                file["devices"][0]["name"] = "0".into();
            }),
            ("hostPath of a device node needs 0.5.0", |file| {
                file["cdiVersion"] = "0.4.0".into();
                file["devices"][0]["containerEdits"]["deviceNodes"][0]["hostPath"] = "/dev/y".into();
            }),
            ("an annotation needs 0.6.0", |file| file["annotations"] = json!({"a": "b"})),
            ("an annotation needs 0.6.0", |file| file["devices"][0]["annotations"] = json!({"a": "b"})),
            ("type of a mount needs 0.4.0", |file| {
                file["cdiVersion"] = "0.3.0".into();
                file["containerEdits"] = json!({"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "bind"}]});
            }),
            ("nothing to give", |file| file["devices"][0]["containerEdits"] = json!({"env": []})),
            ("without name or value", |file| file["containerEdits"] = json!({"env": ["A"]})),
            ("without name or value", |file| file["containerEdits"] = json!({"env": ["=A"]})),
            ("without name or value", |file| {
                file["containerEdits"] = json!({"hooks": [{"hookName": "prestart", "path": "/x", "env": ["A"]}]});
            }),
            ("node without path", |file| {
                file["devices"][0]["containerEdits"]["deviceNodes"][0] = json!({"hostPath": "/dev/x"});
            }),
            ("of a type", |file| file["devices"][0]["containerEdits"]["deviceNodes"][0]["type"] = "x".into()),
            ("with permissions", |file| {
                file["devices"][0]["containerEdits"]["deviceNodes"][0]["permissions"] = "rx".into();
            }),
            ("unknown name", |file| file["containerEdits"] = json!({"hooks": [{"hookName": "later", "path": "/x"}]})),
            ("hook without path", |file| file["containerEdits"] = json!({"hooks": [{"hookName": "poststop"}]})),
            ("two paths", |file| file["containerEdits"] = json!({"mounts": [{"hostPath": "/a"}]})),
        ];
        for (words, change) in cases {
            let found = judged(change);
            assert_eq!(found.is_some(), !words.is_empty(), "{words:?}: {found:?}");
            assert!(found.as_ref().is_none_or(|found| found.contains(words)), "{words}: {found:?}");
        }
    }
}
