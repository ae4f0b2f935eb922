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
}

impl From<Object> for NodeState {
    fn from(Object { metadata }: Object) -> Self {
        Self {
            uid: metadata.uid.unwrap_or_default(),
            resource_version: metadata.resource_version.unwrap_or_default(),
            labels: metadata.labels.unwrap_or_default(),
            annotations: metadata.annotations.unwrap_or_default(),
        }
    }
}
