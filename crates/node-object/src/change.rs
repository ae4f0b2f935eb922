//! Changes of metadata and the patches that make them. No I/O.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::NodeState;

/// Labels and annotations to set (`Some`) or to remove (`None`); all others stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Labels by name.
    pub labels: BTreeMap<String, Option<String>>,
    /// Annotations by name.
    pub annotations: BTreeMap<String, Option<String>>,
}

impl Change {
    /// A change of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a label.
    #[must_use]
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(name.into(), Some(value.into()));
        self
    }

    /// Removes a label.
    #[must_use]
    pub fn without_label(mut self, name: impl Into<String>) -> Self {
        self.labels.insert(name.into(), None);
        self
    }

    /// Sets an annotation.
    #[must_use]
    pub fn annotation(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.annotations.insert(name.into(), Some(value.into()));
        self
    }

    /// Removes an annotation.
    #[must_use]
    pub fn without_annotation(mut self, name: impl Into<String>) -> Self {
        self.annotations.insert(name.into(), None);
        self
    }

    /// Whether there is nothing to change.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.annotations.is_empty()
    }

    /// The part of the change that `state` does not have yet.
    #[must_use]
    pub fn missing_from(&self, state: &NodeState) -> Self {
        let differing = |wanted: &BTreeMap<String, Option<String>>, present: &BTreeMap<String, String>| {
            wanted
                .iter()
                .filter(|(name, value)| present.get(*name) != value.as_ref())
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect()
        };
        Self {
            labels: differing(&self.labels, &state.labels),
            annotations: differing(&self.annotations, &state.annotations),
        }
    }

    /// The merge patch (RFC 7386) of just these keys.
    pub(crate) fn merge_patch(&self) -> Value {
        let mut metadata = serde_json::Map::new();
        for (field, entries) in [("labels", &self.labels), ("annotations", &self.annotations)] {
            if !entries.is_empty() {
                metadata.insert(field.to_owned(), json!(entries));
            }
        }
        json!({ "metadata": metadata })
    }

    /// The JSON Patch (RFC 6902) that makes this change only if the node is still the one in `state`, and every value
    /// named here or in `read` is still what it is there.
    pub(crate) fn json_patch(&self, state: &NodeState, read: &Reads) -> Value {
        let mut tests = vec![json!({"op": "test", "path": "/metadata/uid", "value": state.uid})];
        let mut operations = Vec::new();
        // `test` cannot say "absent"; the object's version stands in for that.
        let mut absent_read = false;
        for (field, entries, present, also) in [
            ("labels", &self.labels, &state.labels, &read.labels),
            ("annotations", &self.annotations, &state.annotations, &read.annotations),
        ] {
            let names: BTreeSet<&String> = entries.keys().chain(also).collect();
            for name in names {
                match present.get(name) {
                    Some(value) => tests.push(json!({"op": "test", "path": pointer(field, name), "value": value})),
                    None => absent_read = true,
                }
            }
            if present.is_empty() && entries.values().any(Option::is_some) {
                operations.push(json!({"op": "add", "path": format!("/metadata/{field}"), "value": {}}));
            }
            for (name, value) in entries {
                match value {
                    Some(value) => operations.push(json!({"op": "add", "path": pointer(field, name), "value": value})),
                    None if present.contains_key(name) => {
                        operations.push(json!({"op": "remove", "path": pointer(field, name)}));
                    }
                    None => {}
                }
            }
        }
        if absent_read {
            tests.push(json!({"op": "test", "path": "/metadata/resourceVersion", "value": state.resource_version}));
        }
        tests.append(&mut operations);
        Value::Array(tests)
    }
}

/// Names of labels and annotations that a change was computed from without changing them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reads {
    pub(crate) labels: Vec<String>,
    pub(crate) annotations: Vec<String>,
}

fn pointer(field: &str, name: &str) -> String {
    format!("/metadata/{field}/{}", name.replace('~', "~0").replace('/', "~1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> NodeState {
        NodeState {
            uid: "u1".to_owned(),
            resource_version: "7".to_owned(),
            labels: BTreeMap::from([("a/x".to_owned(), "1".to_owned()), ("b~".to_owned(), "2".to_owned())]),
            annotations: BTreeMap::new(),
            mode_set_by: None,
        }
    }

    #[test]
    fn only_what_differs_is_changed() {
        let change = Change::new()
            .label("a/x", "1")
            .label("b~", "3")
            .without_label("absent")
            .without_annotation("absent")
            .annotation("n", "v");
        assert_eq!(change.missing_from(&state()), Change::new().label("b~", "3").annotation("n", "v"));
        assert!(Change::new().label("a/x", "1").missing_from(&state()).is_empty());
    }

    #[test]
    fn a_merge_patch_names_just_the_keys() {
        let change = Change::new().label("a/x", "").without_label("b~");
        assert_eq!(change.merge_patch(), json!({"metadata": {"labels": {"a/x": "", "b~": null}}}));
        assert_eq!(Change::new().merge_patch(), json!({"metadata": {}}));
    }

    #[test]
    fn a_json_patch_tests_every_value_read() {
        let change = Change::new().label("a/x", "9").without_label("b~");
        assert_eq!(
            change.json_patch(&state(), &Reads::default()),
            json!([
                {"op": "test", "path": "/metadata/uid", "value": "u1"},
                {"op": "test", "path": "/metadata/labels/a~1x", "value": "1"},
                {"op": "test", "path": "/metadata/labels/b~0", "value": "2"},
                {"op": "add", "path": "/metadata/labels/a~1x", "value": "9"},
                {"op": "remove", "path": "/metadata/labels/b~0"},
            ])
        );
        let reads = Reads { labels: vec!["a/x".to_owned()], annotations: Vec::new() };
        assert_eq!(
            Change::new().annotation("n", "v").json_patch(&state(), &reads),
            json!([
                {"op": "test", "path": "/metadata/uid", "value": "u1"},
                {"op": "test", "path": "/metadata/labels/a~1x", "value": "1"},
                {"op": "test", "path": "/metadata/resourceVersion", "value": "7"},
                {"op": "add", "path": "/metadata/annotations", "value": {}},
                {"op": "add", "path": "/metadata/annotations/n", "value": "v"},
            ])
        );
    }
}
