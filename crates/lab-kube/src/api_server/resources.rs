//! The table of resources, and how a path names them.

use http::Method;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::events::v1 as events;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::selector::FieldSelector;
use super::status::GroupResource;

/// One resource in one group version. To add a resource, add a row to [`RESOURCES`].
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is one column of a table")]
pub(crate) struct ResourceType {
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) resource: &'static str,
    pub(crate) singular: &'static str,
    pub(crate) short: &'static [&'static str],
    pub(crate) kind: &'static str,
    pub(crate) namespaced: bool,
    /// Where objects are kept; two group versions of one kind share it.
    pub(crate) storage: &'static str,
    pub(crate) subresources: &'static [&'static str],
    pub(crate) fields: &'static [&'static str],
    pub(crate) delete_collection: bool,
    /// PUT on a name that is not there creates it.
    pub(crate) create_on_update: bool,
    /// DELETE answers with the object instead of a Status.
    pub(crate) returns_deleted: bool,
    /// Reads and writes the object through its type: wrong types fail, unknown fields fall away.
    canonical: fn(Value) -> Result<Value, serde_json::Error>,
}

fn canonical<T: DeserializeOwned + Serialize>(value: Value) -> Result<Value, serde_json::Error> {
    serde_json::to_value(serde_json::from_value::<T>(value)?)
}

const EVENT_FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
];

/// Every resource that the stand-in serves.
pub(crate) static RESOURCES: &[ResourceType] = &[
    ResourceType {
        group: "",
        version: "v1",
        resource: "nodes",
        singular: "node",
        short: &["no"],
        kind: "Node",
        namespaced: false,
        storage: "nodes",
        subresources: &["status"],
        fields: &["metadata.name", "spec.unschedulable"],
        delete_collection: true,
        create_on_update: false,
        returns_deleted: false,
        canonical: canonical::<core::Node>,
    },
    ResourceType {
        group: "",
        version: "v1",
        resource: "pods",
        singular: "pod",
        short: &["po"],
        kind: "Pod",
        namespaced: true,
        storage: "pods",
        subresources: &["status", "eviction"],
        fields: &[
            "metadata.name",
            "metadata.namespace",
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        delete_collection: true,
        create_on_update: false,
        returns_deleted: true,
        canonical: canonical::<core::Pod>,
    },
    ResourceType {
        group: "",
        version: "v1",
        resource: "events",
        singular: "event",
        short: &["ev"],
        kind: "Event",
        namespaced: true,
        storage: "events",
        subresources: &[],
        fields: EVENT_FIELDS,
        delete_collection: true,
        create_on_update: true,
        returns_deleted: false,
        canonical: canonical::<core::Event>,
    },
    ResourceType {
        group: "events.k8s.io",
        version: "v1",
        resource: "events",
        singular: "event",
        short: &["ev"],
        kind: "Event",
        namespaced: true,
        storage: "events",
        subresources: &[],
        fields: &[
            "metadata.name",
            "metadata.namespace",
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "regarding.apiVersion",
            "regarding.resourceVersion",
            "regarding.fieldPath",
            "reason",
            "reportingController",
            "type",
        ],
        delete_collection: true,
        create_on_update: true,
        returns_deleted: false,
        canonical: canonical::<events::Event>,
    },
    ResourceType {
        group: "",
        version: "v1",
        resource: "namespaces",
        singular: "namespace",
        short: &["ns"],
        kind: "Namespace",
        namespaced: false,
        storage: "namespaces",
        subresources: &["status"],
        fields: &["metadata.name", "status.phase"],
        delete_collection: false,
        create_on_update: false,
        returns_deleted: true,
        canonical: canonical::<core::Namespace>,
    },
];

/// Names that differ between core/v1 and events.k8s.io/v1 events.
const EVENT_NAMES: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

impl ResourceType {
    pub(crate) fn find(group: &str, version: &str, resource: &str) -> Option<&'static Self> {
        RESOURCES.iter().find(|r| r.group == group && r.version == version && r.resource == resource)
    }

    /// The row that keeps objects in their stored form, by plural name.
    pub(crate) fn stored(resource: &str) -> Option<&'static Self> {
        RESOURCES.iter().find(|r| r.group.is_empty() && r.resource == resource)
    }

    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }

    pub(crate) fn gr(&self) -> GroupResource<'static> {
        GroupResource { group: self.group, resource: self.resource }
    }

    /// Through the type of this group version, and then without empty maps, as the real server prints objects.
    pub(crate) fn canonical(&self, value: Value) -> Result<Value, String> {
        let mut value = (self.canonical)(value).map_err(|e| e.to_string())?;
        if let Some(meta) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            for field in ["labels", "annotations", "finalizers", "ownerReferences"] {
                let empty = match meta.get(field) {
                    Some(Value::Object(map)) => map.is_empty(),
                    Some(Value::Array(list)) => list.is_empty(),
                    _ => false,
                };
                if empty {
                    meta.remove(field);
                }
            }
        }
        Ok(value)
    }

    /// From the form of this group version to the stored form.
    pub(crate) fn to_stored(&self, value: Value) -> Value {
        self.convert(value, false, "v1")
    }

    /// From the stored form to the form of this group version.
    pub(crate) fn to_wire(&self, value: &Value) -> Value {
        self.convert(value.clone(), true, &self.api_version())
    }

    fn convert(&self, mut value: Value, to_wire: bool, api_version: &str) -> Value {
        if self.group != "events.k8s.io" {
            return value;
        }
        if let Some(object) = value.as_object_mut() {
            for (stored, wire) in EVENT_NAMES {
                let (from, to) = if to_wire { (stored, wire) } else { (wire, stored) };
                if let Some(field) = object.remove(from) {
                    object.insert(to.to_owned(), field);
                }
            }
            object.insert("apiVersion".into(), api_version.into());
        }
        value
    }

    /// The row of discovery documents, one per resource and subresource.
    pub(crate) fn discovery(&self) -> Vec<Value> {
        let mut verbs = vec!["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
        if !self.delete_collection {
            verbs.retain(|verb| *verb != "deletecollection");
        }
        let mut rows = vec![json!({
            "name": self.resource, "singularName": self.singular, "namespaced": self.namespaced, "kind": self.kind,
            "verbs": verbs, "shortNames": self.short,
        })];
        for sub in self.subresources {
            let name = format!("{}/{sub}", self.resource);
            rows.push(if *sub == "eviction" {
                json!({"name": name, "singularName": "", "namespaced": self.namespaced, "group": "policy",
                       "version": "v1", "kind": "Eviction", "verbs": ["create"]})
            } else {
                json!({"name": name, "singularName": "", "namespaced": self.namespaced, "kind": self.kind,
                       "verbs": ["get", "patch", "update"]})
            });
        }
        rows
    }
}

/// The query string, decoded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(Vec<(String, String)>);

/// Percent-decoding; a malformed escape stays as it is.
fn decode(text: &str, plus: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16));
        match (bytes[i], hex(i + 1), hex(i + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
                i += 2;
            }
            (b'+', ..) if plus => out.push(b' '),
            (other, ..) => out.push(other),
        }
        i += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Query {
    pub(crate) fn parse(text: &str) -> Self {
        Self(
            text.split('&')
                .filter(|pair| !pair.is_empty())
                .map(|pair| {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decode(key, true), decode(value, true))
                })
                .collect(),
        )
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self, key: &str) -> &str {
        self.get(key).unwrap_or_default()
    }

    /// A flag as the real server converts it: present counts as true unless it reads `0` or `false`.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| !matches!(value.to_lowercase().as_str(), "0" | "false"))
    }
}

/// What a request asks for, read from method, path and query as the real server's RequestInfo does it.
#[derive(Debug, Clone, Default)]
pub(crate) struct RequestInfo {
    pub(crate) path: String,
    pub(crate) verb: String,
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) namespace: String,
    /// Empty for paths that name no resource.
    pub(crate) resource: String,
    pub(crate) subresource: String,
    pub(crate) name: String,
}

impl RequestInfo {
    pub(crate) fn parse(method: &Method, path: &str, query: &Query) -> Self {
        let mut info = Self { path: path.to_owned(), verb: method.as_str().to_lowercase(), ..Self::default() };
        let parts: Vec<String> =
            path.split('/').filter(|part| !part.is_empty()).map(|part| decode(part, false)).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let rest = match parts.as_slice() {
            ["api", version, rest @ ..] if !rest.is_empty() => {
                (*version).clone_into(&mut info.version);
                rest
            }
            ["apis", group, version, rest @ ..] if !rest.is_empty() => {
                (*group).clone_into(&mut info.group);
                (*version).clone_into(&mut info.version);
                rest
            }
            _ => return info,
        };
        let rest = match rest {
            // A namespace itself, or its own subresource.
            ["namespaces", name] | ["namespaces", name, "status" | "finalize"] => {
                (*name).clone_into(&mut info.namespace);
                rest
            }
            ["namespaces", name, more @ ..] if !more.is_empty() => {
                (*name).clone_into(&mut info.namespace);
                more
            }
            other => other,
        };
        rest.first().copied().unwrap_or_default().clone_into(&mut info.resource);
        rest.get(1).copied().unwrap_or_default().clone_into(&mut info.name);
        info.subresource = rest.get(2..).unwrap_or_default().join("/");
        info.set_verb(method, query);
        info
    }

    fn set_verb(&mut self, method: &Method, query: &Query) {
        let verb = match *method {
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if self.name.is_empty() => "deletecollection",
            Method::DELETE => "delete",
            Method::GET | Method::HEAD if !self.name.is_empty() => "get",
            Method::GET | Method::HEAD => {
                // A selector for one name makes it a request for that name, which resourceNames rules see.
                if let Some(name) = FieldSelector::parse(query.text("fieldSelector"))
                    .ok()
                    .and_then(|selector| selector.exact("metadata.name").map(str::to_owned))
                {
                    self.name = name;
                }
                if query.flag("watch") { "watch" } else { "list" }
            }
            _ => return,
        };
        verb.clone_into(&mut self.verb);
    }

    pub(crate) fn full_resource(&self) -> String {
        if self.subresource.is_empty() {
            self.resource.clone()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        }
    }
}

/// Answers for `/version`, `/api`, `/apis` and below; None if the path is none of them.
pub(crate) fn discovery(path: &str) -> Option<Value> {
    let group = |name: &str| {
        json!({
            "name": name,
            "versions": [{"groupVersion": format!("{name}/v1"), "version": "v1"}],
            "preferredVersion": {"groupVersion": format!("{name}/v1"), "version": "v1"},
        })
    };
    let list = |group: &str, version: &str| {
        let rows: Vec<Value> = RESOURCES
            .iter()
            .filter(|r| r.group == group && r.version == version)
            .flat_map(ResourceType::discovery)
            .collect();
        let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": rows})
    };
    let trimmed = path.trim_end_matches('/');
    Some(match trimmed {
        "/version" => json!({
            "major": "1", "minor": "36", "gitVersion": "v1.36.0+lab", "gitCommit": "", "gitTreeState": "",
            "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "", "platform": "linux/amd64",
        }),
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1",
                          "groups": [group("events.k8s.io"), group("authorization.k8s.io")]}),
        "/api/v1" => list("", "v1"),
        "/apis/events.k8s.io" | "/apis/authorization.k8s.io" => {
            let mut answer = group(trimmed.trim_start_matches("/apis/"));
            answer["kind"] = "APIGroup".into();
            answer["apiVersion"] = "v1".into();
            answer
        }
        "/apis/events.k8s.io/v1" => list("events.k8s.io", "v1"),
        "/apis/authorization.k8s.io/v1" => json!({
            "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "authorization.k8s.io/v1",
            "resources": [{"name": "selfsubjectaccessreviews", "singularName": "selfsubjectaccessreview",
                           "namespaced": false, "kind": "SelfSubjectAccessReview", "verbs": ["create"]}],
        }),
        _ => return None,
    })
}

/// The object reduced to its metadata.
pub(crate) fn partial(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| Value::Object(Map::new())),
    })
}
