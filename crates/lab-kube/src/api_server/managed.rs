//! `metadata.managedFields`: which manager owns which field, kept as the real server keeps it.
//!
//! A path is the list of its elements in their written form: `f:labels`, `k:{"type":"Ready"}`, `v:"x"`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

type Path = Vec<String>;
type Paths = BTreeSet<Path>;

/// A field that an apply wanted and that others own: (the manager in words, the field's path).
pub(crate) type Conflict = (String, String);

/// Who writes, how and when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Writer<'a> {
    pub(crate) manager: &'a str,
    pub(crate) api_version: &'a str,
    pub(crate) subresource: &'a str,
    pub(crate) time: &'a str,
}

#[derive(Debug, Clone)]
struct Entry {
    manager: String,
    apply: bool,
    api_version: String,
    subresource: String,
    time: String,
    paths: Paths,
}

impl Entry {
    fn new(writer: Writer<'_>, apply: bool) -> Self {
        Self {
            manager: writer.manager.to_owned(),
            apply,
            api_version: writer.api_version.to_owned(),
            subresource: writer.subresource.to_owned(),
            time: writer.time.to_owned(),
            paths: Paths::new(),
        }
    }

    fn is(&self, writer: Writer<'_>, apply: bool) -> bool {
        self.manager == writer.manager
            && self.apply == apply
            && self.subresource == writer.subresource
            && (apply || self.api_version == writer.api_version)
    }

    fn words(&self) -> String {
        let mut words = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            words = format!("{words} with subresource {:?}", self.subresource);
        }
        if !self.apply {
            words = format!("{words} using {}", self.api_version);
        }
        words
    }

    fn decode(value: &Value) -> Self {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let mut paths = Paths::new();
        collect(&value["fieldsV1"], &mut Vec::new(), &mut paths);
        Self {
            manager: text("manager"),
            apply: text("operation") == "Apply",
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: text("time"),
            paths,
        }
    }

    fn encode(&self) -> Value {
        let mut fields = Value::Object(Map::new());
        for path in &self.paths {
            let mut at = &mut fields;
            for element in path {
                at = &mut at[element.as_str()];
                if at.is_null() {
                    *at = json!({});
                }
            }
            // A member that has members below it is marked by a dot.
            let has_children = self.paths.range(path.clone()..).nth(1).is_some_and(|next| next.starts_with(path));
            if has_children {
                at["."] = json!({});
            }
        }
        let mut entry = json!({
            "manager": self.manager,
            "operation": if self.apply { "Apply" } else { "Update" },
            "apiVersion": self.api_version,
            "time": self.time,
            "fieldsType": "FieldsV1",
            "fieldsV1": fields,
        });
        if !self.subresource.is_empty() {
            entry["subresource"] = self.subresource.as_str().into();
        }
        entry
    }
}

fn collect(value: &Value, path: &mut Path, out: &mut Paths) {
    let Some(map) = value.as_object() else { return };
    if map.is_empty() && !path.is_empty() {
        out.insert(path.clone());
    }
    for (key, below) in map {
        if key == "." {
            out.insert(path.clone());
        } else {
            path.push(key.clone());
            collect(below, path, out);
            path.pop();
        }
    }
}

fn decode(object: &Value) -> Vec<Entry> {
    object["metadata"]["managedFields"]
        .as_array()
        .map_or_else(Vec::new, |list| list.iter().map(Entry::decode).collect())
}

fn store(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.paths.is_empty());
    entries.sort_by(|a, b| (!a.apply, &a.time, &a.manager).cmp(&(!b.apply, &b.time, &b.manager)));
    let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    if entries.is_empty() {
        meta.remove("managedFields");
    } else {
        meta.insert("managedFields".into(), entries.iter().map(Entry::encode).collect());
    }
}

/// How the elements of a list are told apart.
pub(crate) enum ListKind {
    /// By these fields of each element.
    Keyed(&'static [&'static str]),
    /// By the value itself.
    Set,
    /// Not at all: the list is one value.
    Atomic,
}

/// The lists of nodes, pods and metadata that are merged by element.
pub(crate) fn list_kind(field: &str) -> ListKind {
    match field {
        "conditions" | "addresses" => ListKind::Keyed(&["type"]),
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "env"
        | "volumes"
        | "imagePullSecrets"
        | "resourceClaims" => ListKind::Keyed(&["name"]),
        "volumeMounts" => ListKind::Keyed(&["mountPath"]),
        "volumeDevices" => ListKind::Keyed(&["devicePath"]),
        "ports" => ListKind::Keyed(&["containerPort", "protocol"]),
        "ownerReferences" => ListKind::Keyed(&["uid"]),
        "podIPs" | "hostIPs" => ListKind::Keyed(&["ip"]),
        "finalizers" => ListKind::Set,
        _ => ListKind::Atomic,
    }
}

/// The map fields whose existence is itself a field (structs have none of their own).
fn is_map(field: &str) -> bool {
    matches!(field, "labels" | "annotations" | "capacity" | "allocatable" | "nodeSelector" | "limits" | "requests")
}

fn element_key(item: &Value, keys: &[&str]) -> Option<String> {
    let mut map = Map::new();
    for key in keys {
        // The port's protocol has a default, which is all that may be missing.
        let value = match item.get(key) {
            Some(value) => value.clone(),
            None if *key == "protocol" => "TCP".into(),
            None => return None,
        };
        map.insert((*key).to_owned(), value);
    }
    Some(format!("k:{}", Value::Object(map)))
}

fn ignored(path: &[String]) -> bool {
    const META: [&str; 10] = [
        "f:name",
        "f:namespace",
        "f:uid",
        "f:resourceVersion",
        "f:creationTimestamp",
        "f:deletionTimestamp",
        "f:deletionGracePeriodSeconds",
        "f:generation",
        "f:managedFields",
        "f:selfLink",
    ];
    match path {
        [root] => root == "f:apiVersion" || root == "f:kind",
        [root, field, ..] => root == "f:metadata" && META.contains(&field.as_str()),
        [] => false,
    }
}

/// Every field of an object with its value. Containers count with `null`.
fn leaves(value: &Value, maps: bool) -> BTreeMap<Path, Value> {
    let mut out = BTreeMap::new();
    walk(value, &mut Vec::new(), "", maps, &mut out);
    out
}

fn walk(value: &Value, path: &mut Path, field: &str, maps: bool, out: &mut BTreeMap<Path, Value>) {
    if ignored(path) {
        return;
    }
    match value {
        Value::Object(map) => {
            if (map.is_empty() || (maps && is_map(field))) && !path.is_empty() {
                out.insert(path.clone(), Value::Null);
            }
            for (key, below) in map {
                path.push(format!("f:{key}"));
                walk(below, path, key, maps, out);
                path.pop();
            }
        }
        Value::Array(list) => walk_list(list, value, path, field, maps, out),
        scalar => {
            out.insert(path.clone(), scalar.clone());
        }
    }
}

fn walk_list(list: &[Value], whole: &Value, path: &mut Path, field: &str, maps: bool, out: &mut BTreeMap<Path, Value>) {
    match list_kind(field) {
        ListKind::Keyed(keys) if list.iter().all(|item| element_key(item, keys).is_some()) => {
            for item in list {
                path.push(element_key(item, keys).unwrap_or_default());
                out.insert(path.clone(), Value::Null);
                walk(item, path, "", maps, out);
                path.pop();
            }
        }
        ListKind::Set => {
            for item in list {
                path.push(format!("v:{item}"));
                out.insert(path.clone(), item.clone());
                path.pop();
            }
        }
        _ => {
            out.insert(path.clone(), whole.clone());
        }
    }
}

struct Difference {
    changed: Paths,
    removed: Paths,
}

fn difference(old: &BTreeMap<Path, Value>, new: &BTreeMap<Path, Value>) -> Difference {
    Difference {
        changed: new
            .iter()
            .filter(|(path, value)| old.get(*path) != Some(value))
            .map(|(path, _)| path.clone())
            .collect(),
        removed: old.keys().filter(|path| !new.contains_key(*path)).cloned().collect(),
    }
}

/// Records a create, update or patch: the writer owns what it changed.
pub(crate) fn update(old: Option<&Value>, new: &mut Value, writer: Writer<'_>) {
    let reset = new["metadata"]["managedFields"].as_array().is_some_and(|list| list.len() == 1 && list[0] == json!({}));
    let mut entries = if reset { Vec::new() } else { old.map(decode).unwrap_or_default() };
    let before = old.map(|object| leaves(object, true)).unwrap_or_default();
    let delta = difference(&before, &leaves(new, true));
    if !delta.changed.is_empty() || !delta.removed.is_empty() {
        for entry in &mut entries {
            let mine = entry.is(writer, false);
            entry.paths.retain(|path| !delta.removed.contains(path) && (mine || !delta.changed.contains(path)));
        }
        let own = if let Some(at) = entries.iter().position(|entry| entry.is(writer, false)) {
            &mut entries[at]
        } else {
            entries.push(Entry::new(writer, false));
            let last = entries.len() - 1;
            &mut entries[last]
        };
        let before = own.paths.len();
        own.paths.extend(delta.changed.iter().cloned());
        if before != own.paths.len() || !delta.changed.is_empty() {
            writer.time.clone_into(&mut own.time);
        }
    }
    store(new, entries);
}

fn field_path(path: &Path) -> String {
    path.iter()
        .map(|element| match element.split_once(':') {
            Some(("f", name)) => format!(".{name}"),
            Some(("k", key)) => {
                let parts: Vec<String> = serde_json::from_str::<Map<String, Value>>(key)
                    .unwrap_or_default()
                    .iter()
                    .map(|(name, value)| format!("{name}={value}"))
                    .collect();
                format!("[{}]", parts.join(","))
            }
            Some((_, value)) => format!("[={value}]"),
            None => element.clone(),
        })
        .collect()
}

/// Server-side apply: the live object with the configuration merged in, or the conflicts that forbid it.
pub(crate) fn apply(live: &Value, config: &Value, writer: Writer<'_>, force: bool) -> Result<Value, Vec<Conflict>> {
    let mut entries = decode(live);
    let wanted: Paths = leaves(config, false).into_keys().collect();
    let mut merged = live.clone();
    merge(&mut merged, config, "");
    let delta = difference(&leaves(live, true), &leaves(&merged, true));

    let mut conflicts = Vec::new();
    for entry in entries.iter_mut().filter(|entry| !entry.is(writer, true)) {
        let words = entry.words();
        let clash: Vec<Path> = entry.paths.intersection(&delta.changed).cloned().collect();
        for path in clash {
            if force {
                entry.paths.remove(&path);
            } else {
                conflicts.push((words.clone(), field_path(&path)));
            }
        }
    }
    if !conflicts.is_empty() {
        return Err(conflicts);
    }

    let at = entries.iter().position(|entry| entry.is(writer, true));
    let mut own = at.map_or_else(|| Entry::new(writer, true), |at| entries.remove(at));
    for path in own.paths.difference(&wanted) {
        if !entries.iter().any(|entry| entry.paths.iter().any(|owned| owned.starts_with(path))) {
            remove(&mut merged, path);
        }
    }
    if own.paths != wanted || own.api_version != writer.api_version {
        own = Entry::new(writer, true);
        own.paths = wanted;
    }
    entries.push(own);
    // What went away is nobody's any more.
    let left = leaves(&merged, true);
    for entry in entries.iter_mut().filter(|entry| !entry.apply) {
        entry.paths.retain(|path| left.contains_key(path));
    }
    store(&mut merged, entries);
    Ok(merged)
}

fn merge(live: &mut Value, config: &Value, field: &str) {
    match (live, config) {
        (Value::Object(live), Value::Object(config)) => {
            for (key, value) in config {
                match live.get_mut(key) {
                    Some(below) => merge(below, value, key),
                    None => {
                        live.insert(key.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(live), Value::Array(config)) => match list_kind(field) {
            ListKind::Keyed(keys) => {
                for item in config {
                    let key = element_key(item, keys);
                    match live.iter_mut().find(|have| key.is_some() && element_key(have, keys) == key) {
                        Some(have) => merge(have, item, ""),
                        None => live.push(item.clone()),
                    }
                }
            }
            ListKind::Set => {
                for item in config {
                    if !live.contains(item) {
                        live.push(item.clone());
                    }
                }
            }
            ListKind::Atomic => config.clone_into(live),
        },
        (live, config) => config.clone_into(live),
    }
}

fn remove(object: &mut Value, path: &[String]) {
    let Some((last, parents)) = path.split_last() else { return };
    let mut at = object;
    for element in parents {
        let next = match element.split_once(':') {
            Some(("f", name)) => at.get_mut(name),
            Some(("k", key)) => position(at, key).and_then(|i| at.get_mut(i)),
            _ => None,
        };
        let Some(next) = next else { return };
        at = next;
    }
    match last.split_once(':') {
        Some(("f", name)) => {
            if let Some(map) = at.as_object_mut() {
                map.remove(name);
            }
        }
        Some(("k", key)) => {
            if let (Some(i), Some(list)) = (position(at, key), at.as_array_mut()) {
                list.remove(i);
            }
        }
        Some(("v", value)) => {
            if let Some(list) = at.as_array_mut() {
                let gone: Value = serde_json::from_str(value).unwrap_or_default();
                list.retain(|item| *item != gone);
            }
        }
        _ => {}
    }
}

fn position(list: &Value, key: &str) -> Option<usize> {
    let wanted: Map<String, Value> = serde_json::from_str(key).ok()?;
    list.as_array()?.iter().position(|item| wanted.iter().all(|(name, value)| item.get(name) == Some(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(manager: &str) -> Writer<'_> {
        Writer { manager, api_version: "v1", subresource: "", time: "2026-01-01T00:00:00Z" }
    }

    fn owners(object: &Value, label: &str) -> Vec<String> {
        let path = vec!["f:metadata".to_owned(), "f:labels".to_owned(), format!("f:{label}")];
        decode(object).into_iter().filter(|e| e.paths.contains(&path)).map(|e| e.manager).collect()
    }

    fn node(labels: &Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n", "labels": labels}})
    }

    #[test]
    fn updates_move_ownership_to_the_writer_of_a_change_only() {
        let mut first = node(&json!({"a": "1", "b": "1"}));
        update(None, &mut first, writer("one"));
        assert_eq!(owners(&first, "a"), ["one"]);
        assert_eq!(
            first["metadata"]["managedFields"][0]["fieldsV1"],
            json!({"f:metadata": {"f:labels": {".": {}, "f:a": {}, "f:b": {}}}})
        );
        let mut second = first.clone();
        second["metadata"]["labels"]["a"] = "2".into();
        update(Some(&first), &mut second, writer("two"));
        assert_eq!((owners(&second, "a"), owners(&second, "b")), (vec!["two".to_owned()], vec!["one".to_owned()]));
        let mut same = second.clone();
        update(Some(&second), &mut same, writer("three"));
        assert_eq!(same, second);
    }

    #[test]
    fn apply_conflicts_forces_shares_and_prunes() {
        let mut live = node(&json!({"a": "1"}));
        update(None, &mut live, writer("kubectl-label"));
        let conflict = apply(&live, &node(&json!({"a": "2"})), writer("agent"), false).expect_err("a is owned");
        assert_eq!(conflict, [("\"kubectl-label\" using v1".to_owned(), ".metadata.labels.a".to_owned())]);

        let shared = apply(&live, &node(&json!({"a": "1", "c": "x"})), writer("agent"), false).expect("same value");
        let mut both = owners(&shared, "a");
        both.sort();
        assert_eq!(both, ["agent", "kubectl-label"]);

        let forced = apply(&shared, &node(&json!({"a": "2"})), writer("agent"), true).expect("forced");
        assert_eq!(owners(&forced, "a"), ["agent"]);
        assert_eq!(forced["metadata"]["labels"], json!({"a": "2"}), "c was the applier's alone and is pruned");

        let other = apply(&forced, &node(&json!({"a": "3"})), writer("other"), false).expect_err("applied by agent");
        assert_eq!(other[0].0, "\"agent\"");
    }
}
