//! Who asks, and what they may do: bearer tokens and RBAC rules.

use super::resources::RequestInfo;
use super::status::{ApiError, GroupResource};

/// One RBAC rule: what a role of the real server would hold, with the binding's reach.
///
/// `*` is understood in groups, resources and verbs. A subresource is written `nodes/status`, as in RBAC.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// API groups; `""` is the core group.
    pub api_groups: Vec<String>,
    /// Plural resource names, subresources as `pods/eviction`.
    pub resources: Vec<String>,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection` or `*`.
    pub verbs: Vec<String>,
    /// Object names that the rule is limited to; empty means every name.
    pub resource_names: Vec<String>,
    /// The namespace of a Role; None for a ClusterRole bound cluster-wide.
    pub namespace: Option<String>,
}

fn strings(items: &[&str]) -> Vec<String> {
    items.iter().map(|item| (*item).to_owned()).collect()
}

impl Rule {
    /// A cluster-wide rule over resources of one group.
    pub fn new(group: &str, resources: &[&str], verbs: &[&str]) -> Self {
        Self {
            api_groups: vec![group.to_owned()],
            resources: strings(resources),
            verbs: strings(verbs),
            ..Self::default()
        }
    }

    /// The same rule within one namespace only.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// The same rule for these object names only.
    #[must_use]
    pub fn named(mut self, names: &[&str]) -> Self {
        self.resource_names = strings(names);
        self
    }

    /// Everything everywhere, as `cluster-admin` has it.
    pub fn cluster_admin() -> Vec<Self> {
        vec![Self::new("*", &["*"], &["*"])]
    }

    /// What the operator grants cc-manager (operator-contract section 5.2).
    pub fn operator_cc_manager(namespace: &str) -> Vec<Self> {
        vec![
            Self::new("", &["pods"], &["get", "list", "watch"]).in_namespace(namespace),
            Self::new("", &["nodes"], &["get", "list", "patch", "watch"]),
        ]
    }

    /// What the operator grants vfio-manager (operator-contract section 6.2).
    pub fn operator_vfio_manager() -> Vec<Self> {
        vec![
            Self::new("", &["nodes"], &["get", "list", "patch", "watch"]),
            Self::new("", &["pods"], &["get", "list", "watch"]),
            Self::new("", &["pods/eviction"], &["create"]),
        ]
    }

    /// What the operator grants the Kata device plugin (operator-contract section 7.2).
    pub fn operator_device_plugin(namespace: &str) -> Vec<Self> {
        vec![
            Self::new("", &["pods"], &["create", "get", "list", "watch", "delete"]).in_namespace(namespace),
            Self::new("", &["nodes", "pods"], &["get"]),
        ]
    }

    /// What the node authorizer lets one kubelet do, as far as nodes, pods and events go.
    pub fn kubelet(node: &str) -> Vec<Self> {
        vec![
            Self::new("", &["nodes"], &["get", "watch", "update", "patch"]).named(&[node]),
            Self::new("", &["nodes"], &["create"]),
            Self::new("", &["nodes/status"], &["update", "patch"]).named(&[node]),
            Self::new("", &["pods"], &["get", "list", "watch", "create", "delete"]),
            Self::new("", &["pods/status"], &["update", "patch"]),
            Self::new("", &["pods/eviction"], &["create"]),
            Self::new("", &["events"], &["create", "update", "patch"]),
        ]
    }

    fn allows(&self, info: &RequestInfo) -> bool {
        let any = |list: &[String], wanted: &str| list.iter().any(|item| item == "*" || item == wanted);
        let resource = self.resources.iter().any(|item| {
            item == "*"
                || *item == info.full_resource()
                || (!info.subresource.is_empty() && item.strip_prefix("*/") == Some(&info.subresource))
        });
        resource
            && any(&self.api_groups, &info.group)
            && any(&self.verbs, &info.verb)
            && (self.resource_names.is_empty() || self.resource_names.contains(&info.name))
            && self.namespace.as_ref().is_none_or(|namespace| *namespace == info.namespace)
    }
}

/// An authenticated (or anonymous) user.
#[derive(Debug, Clone, Default)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) groups: Vec<String>,
    pub(crate) rules: Vec<Rule>,
}

impl User {
    pub(crate) fn anonymous() -> Self {
        Self {
            name: "system:anonymous".to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
            rules: Vec::new(),
        }
    }

    fn is_anonymous(&self) -> bool {
        self.name == "system:anonymous"
    }

    /// The node whose kubelet this is, by name and group as the node authorizer reads them.
    pub(crate) fn node(&self) -> Option<&str> {
        let name = self.name.strip_prefix("system:node:")?;
        self.groups.iter().any(|group| group == "system:nodes").then_some(name)
    }

    pub(crate) fn may(&self, info: &RequestInfo) -> bool {
        if info.resource.is_empty() {
            let public = ["/healthz", "/livez", "/readyz", "/version"];
            let discovery = info.path == "/api"
                || info.path == "/apis"
                || info.path.starts_with("/api/")
                || info.path.starts_with("/apis/");
            let reads = info.verb == "get";
            return reads && (public.contains(&info.path.as_str()) || (discovery && !self.is_anonymous()))
                || self.rules.iter().any(|rule| rule.resources == ["*"] && rule.verbs == ["*"]);
        }
        // Every authenticated user may ask what it may do (role system:basic-user).
        let self_review = info.group == "authorization.k8s.io" && info.resource == "selfsubjectaccessreviews";
        (self_review && info.verb == "create" && !self.is_anonymous()) || self.rules.iter().any(|r| r.allows(info))
    }

    /// Refuses in the real server's words.
    pub(crate) fn authorize(&self, info: &RequestInfo) -> Result<(), ApiError> {
        if self.may(info) {
            return Ok(());
        }
        let why = if info.resource.is_empty() {
            format!("User {:?} cannot {} path {:?}", self.name, info.verb, info.path)
        } else {
            let place = if info.namespace.is_empty() {
                "at the cluster scope".to_owned()
            } else {
                format!("in the namespace {:?}", info.namespace)
            };
            format!(
                "User {:?} cannot {} resource {:?} in API group {:?} {place}",
                self.name,
                info.verb,
                info.full_resource(),
                info.group
            )
        };
        Err(ApiError::forbidden(GroupResource { group: &info.group, resource: &info.resource }, &info.name, &why))
    }
}
