//! What is known of the node.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;

/// The part of a node's metadata that agents work with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeState {
    /// UID of the object: another UID is another node under the same name.
    pub uid: String,
    /// Resource version of the object.
    pub resource_version: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Who wrote the label of the wanted mode last (the field manager), where the API server says so.
    pub mode_set_by: Option<String>,
}

impl NodeState {
    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }

    /// The value of an annotation.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }

    /// Whether this was read later than `other`, as far as resource versions tell.
    pub(crate) fn is_newer_than(&self, other: &Self) -> bool {
        match (self.resource_version.parse::<u64>(), other.resource_version.parse::<u64>()) {
            (Ok(mine), Ok(theirs)) if self.uid == other.uid => mine > theirs,
            _ => true,
        }
    }
}

/// What the watch has seen of the node so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodeView {
    /// Nothing yet: the API server has not answered.
    #[default]
    Unknown,
    /// There is no node of this name (any more).
    Absent,
    /// The node as last seen.
    Present(Arc<NodeState>),
}

impl NodeView {
    /// The node, if there is one.
    pub fn node(&self) -> Option<&Arc<NodeState>> {
        if let Self::Present(node) = self { Some(node) } else { None }
    }
}

/// An object of which only the metadata is looked at, and of that only what is needed: managedFields alone are often
/// larger than everything else of a node.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Object {
    #[serde(default)]
    pub(crate) metadata: Metadata,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Metadata {
    #[serde(default)]
    pub(crate) name: Option<String>,
    #[serde(default)]
    pub(crate) uid: Option<String>,
    #[serde(default)]
    pub(crate) resource_version: Option<String>,
    #[serde(default)]
    pub(crate) labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(crate) managed_fields: Option<Vec<ManagedFields>>,
}

/// What one writer of the object says it owns.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ManagedFields {
    #[serde(default)]
    manager: String,
    #[serde(default, rename = "fieldsV1")]
    fields_v1: Fields,
}

/// Of all fields only the label of the wanted mode is kept.
#[derive(Clone, Debug, Default, Deserialize)]
struct Fields {
    #[serde(default, rename = "f:metadata")]
    metadata: MetadataFields,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct MetadataFields {
    #[serde(default, rename = "f:labels")]
    labels: LabelFields,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct LabelFields {
    #[serde(default, rename = "f:nvidia.com/cc.mode")]
    mode: Option<serde::de::IgnoredAny>,
}

/// Moves the version to resume a watch from on to `seen`, and never back: what was seen already would be told again, and what
/// is long over would pass for the present. No server says an older version in the same watch; one behind a proxy or fallen
/// back to a stale cache might.
pub(crate) fn advance(version: &mut String, seen: &str) {
    let is_older = matches!((version.parse::<u64>(), seen.parse::<u64>()), (Ok(known), Ok(seen)) if seen < known);
    if !is_older {
        seen.clone_into(version);
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct List {
    #[serde(default)]
    pub(crate) metadata: ListMetadata,
    #[serde(default)]
    pub(crate) items: Option<Vec<Object>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListMetadata {
    #[serde(default)]
    pub(crate) resource_version: String,
    /// Where the next page begins.
    #[serde(default, rename = "continue")]
    pub(crate) continue_token: Option<String>,
}

impl From<Object> for NodeState {
    fn from(Object { metadata }: Object) -> Self {
        let mut owners = metadata.managed_fields.into_iter().flatten();
        let owner = owners.rfind(|fields| fields.fields_v1.metadata.labels.mode.is_some());
        Self {
            mode_set_by: owner.map(|fields| fields.manager),
            uid: metadata.uid.unwrap_or_default(),
            resource_version: metadata.resource_version.unwrap_or_default(),
            labels: metadata.labels.unwrap_or_default(),
            annotations: metadata.annotations.unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_never_resumed_from_further_back() {
        for (known, seen, then) in
            [("7", "8", "8"), ("7", "7", "7"), ("10", "9", "10"), ("9", "10", "10"), ("", "5", "5"), ("x", "3", "3")]
        {
            let mut version = known.to_owned();
            advance(&mut version, seen);
            assert_eq!(version, then, "{known} and then {seen}");
        }
    }

    #[test]
    fn who_asked_for_the_mode_is_told_by_the_managed_fields() {
        let object = |fields: serde_json::Value| -> NodeState {
            let object = serde_json::json!({"metadata": {"name": "n", "managedFields": fields}});
            serde_json::from_value::<Object>(object).unwrap().into()
        };
        let mode = serde_json::json!({"f:metadata": {"f:labels": {".": {}, "f:nvidia.com/cc.mode": {}}}});
        let other =
            serde_json::json!({"f:metadata": {"f:labels": {"f:nvidia.com/cc.mode.state": {}}}, "f:status": {"f:x": 1}});
        let fields = serde_json::json!([
            {"manager": "kubelet", "operation": "Update", "fieldsV1": other},
            {"manager": "kubectl-label", "operation": "Update", "time": "2026-01-01T00:00:00Z", "fieldsV1": mode},
            {"manager": "odd"},
        ]);
        assert_eq!(object(fields).mode_set_by.as_deref(), Some("kubectl-label"));
        assert_eq!(object(serde_json::json!([{"manager": "kubelet", "fieldsV1": other}])).mode_set_by, None);
        assert_eq!(object(serde_json::Value::Null).mode_set_by, None);
    }
}
