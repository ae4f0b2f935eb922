//! Pods as the kubelet sees them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use serde::{Deserialize, Serialize};

use super::names::is_extended_resource;

/// What of a pod matters to the device manager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// Unique over the life of the cluster.
    #[serde(default)]
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// RuntimeClass; empty for the node's default.
    #[serde(default)]
    pub runtime_class: String,
    /// Init containers, in order.
    #[serde(default)]
    pub init_containers: Vec<Container>,
    /// Containers.
    pub containers: Vec<Container>,
}

/// One container's extended resources.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// Name.
    pub name: String,
    /// Limits of extended resources, in whole units.
    #[serde(default)]
    pub limits: BTreeMap<String, usize>,
    /// An init container that keeps running beside the others (a sidecar).
    #[serde(default)]
    pub restartable: bool,
}

impl Pod {
    /// Takes a pod from the API. `None` where it lacks a name or UID, or asks for a part of a device.
    pub(crate) fn from_api(pod: &core::Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        let containers = |list: &[core::Container]| list.iter().map(Container::from_api).collect::<Option<Vec<_>>>();
        Some(Self {
            uid: pod.metadata.uid.clone()?,
            namespace: pod.metadata.namespace.clone()?,
            name: pod.metadata.name.clone()?,
            runtime_class: spec.runtime_class_name.clone().unwrap_or_default(),
            init_containers: containers(spec.init_containers.as_deref().unwrap_or_default())?,
            containers: containers(&spec.containers)?,
        })
    }

    /// NAMESPACE/NAME.
    pub(crate) fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Whether Kata makes its sandbox.
    pub(crate) fn is_kata(&self) -> bool {
        self.runtime_class.starts_with("kata-")
    }

    /// Containers that run for as long as the pod does, as the pod-resources service lists them.
    pub(crate) fn lasting_containers(&self) -> impl Iterator<Item = &Container> {
        self.init_containers.iter().filter(|container| container.restartable).chain(&self.containers)
    }
}

impl Container {
    fn from_api(container: &core::Container) -> Option<Self> {
        let mut limits = BTreeMap::new();
        for (resource, quantity) in container.resources.iter().flat_map(|r| &r.limits).flatten() {
            if is_extended_resource(resource) {
                limits.insert(resource.clone(), quantity.0.parse().ok()?);
            }
        }
        let restartable = container.restart_policy.as_deref() == Some("Always");
        Some(Self { name: container.name.clone(), limits, restartable })
    }
}

/// How far a pod has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "phase")]
pub(crate) enum Phase {
    /// Not started: admission is under way, or a container cannot be created yet.
    Pending { reason: String, message: String },
    /// All containers run.
    Running,
    /// Rejected at admission.
    Failed { reason: String, message: String },
    /// Ended, says the API server.
    Done,
}

impl Phase {
    /// Whether the pod still has a claim on its devices.
    pub(crate) fn is_active(&self) -> bool {
        matches!(self, Self::Pending { .. } | Self::Running)
    }
}

/// A pod and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) pod: Pod,
    pub(crate) phase: Phase,
    /// When the kubelet took it.
    pub(crate) since: Timestamp,
    /// Its status belongs to the API server.
    pub(crate) api: bool,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn api(limits: &serde_json::Value) -> core::Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {
                "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
                "containers": [{"name": "c", "resources": {"limits": limits}}],
            },
        }))
        .unwrap()
    }

    #[test]
    fn only_extended_resources_count() {
        let pod = Pod::from_api(&api(&json!({"cpu": "500m", "memory": "1Gi", "nvidia.com/pgpu": "2"}))).unwrap();
        assert_eq!(pod.containers[0].limits, [("nvidia.com/pgpu".to_owned(), 2)].into());
        assert_eq!(pod.lasting_containers().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["s", "c"]);
        assert_eq!(Pod::from_api(&api(&json!({"nvidia.com/pgpu": "500m"}))), None);
    }
}
