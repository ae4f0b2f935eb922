//! Validation of metadata and of the few rules per kind that clients of this project can run into.

use serde_json::{Map, Value};

use super::resources::ResourceType;
use super::status::FieldError;

const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or \
     '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex \
     used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const NAME_PART: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end \
     with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
     '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or \
     '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
     '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const ANNOTATIONS_MAX: usize = 256 * 1024;

fn qualified_part(text: &str) -> bool {
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    first.is_ascii_alphanumeric()
        && last.is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

fn subdomain(text: &str) -> bool {
    let label = |part: &str| {
        let bytes = part.as_bytes();
        let lower = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        bytes.first().is_some_and(lower)
            && bytes.last().is_some_and(lower)
            && bytes.iter().all(|b| lower(b) || *b == b'-')
    };
    text.split('.').all(label)
}

/// Why a text is no label key, or None if it is one.
pub(crate) fn label_key_fault(key: &str) -> Option<String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if let Some(prefix) = prefix {
        if prefix.is_empty() {
            return Some("prefix part must be non-empty".to_owned());
        }
        if prefix.len() > 253 {
            return Some("prefix part must be no more than 253 characters".to_owned());
        }
        if !subdomain(prefix) {
            return Some(format!("prefix part {SUBDOMAIN}"));
        }
    }
    if name.is_empty() {
        return Some("name part must be non-empty".to_owned());
    }
    if name.len() > 63 {
        return Some("name part must be no more than 63 characters".to_owned());
    }
    (!qualified_part(name)).then(|| NAME_PART.to_owned())
}

/// Why a text is no label value, or None if it is one.
pub(crate) fn label_value_fault(value: &str) -> Option<String> {
    if value.len() > 63 {
        return Some("must be no more than 63 characters".to_owned());
    }
    (!value.is_empty() && !qualified_part(value)).then(|| LABEL_VALUE.to_owned())
}

fn name_fault(name: &str) -> Option<String> {
    if name.len() > 253 {
        return Some("must be no more than 253 characters".to_owned());
    }
    (!subdomain(name)).then(|| SUBDOMAIN.to_owned())
}

fn namespace_fault(name: &str) -> Option<String> {
    if name.len() > 63 {
        return Some("must be no more than 63 characters".to_owned());
    }
    (name.contains('.') || !subdomain(name)).then(|| {
        "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end \
         with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
         '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
            .to_owned()
    })
}

/// Labels and annotations of any object.
pub(crate) fn metadata(rt: &ResourceType, object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let meta = &object["metadata"];
    let name = meta["name"].as_str().unwrap_or_default();
    if name.is_empty() {
        errors.push(FieldError::required("metadata.name", "name or generateName is required"));
    } else {
        let fault = if rt.resource == "namespaces" { namespace_fault(name) } else { name_fault(name) };
        if let Some(fault) = fault {
            errors.push(FieldError::invalid("metadata.name", name, fault));
        }
    }
    let empty = Map::new();
    for (key, value) in meta["labels"].as_object().unwrap_or(&empty) {
        if let Some(fault) = label_key_fault(key) {
            errors.push(FieldError::invalid("metadata.labels", key, fault));
        }
        let value = value.as_str().unwrap_or_default();
        if let Some(fault) = label_value_fault(value) {
            errors.push(FieldError::invalid("metadata.labels", value, fault));
        }
    }
    let mut total = 0;
    for (key, value) in meta["annotations"].as_object().unwrap_or(&empty) {
        if let Some(fault) = label_key_fault(&key.to_lowercase()) {
            errors.push(FieldError::invalid("metadata.annotations", key, fault));
        }
        total += key.len() + value.as_str().map_or(0, str::len);
    }
    if total > ANNOTATIONS_MAX {
        errors.push(FieldError::too_long("metadata.annotations", ANNOTATIONS_MAX));
    }
    errors
}

/// What each kind adds at creation. `object` is in its stored form, `rt` the version it came in by.
pub(crate) fn create(rt: &ResourceType, object: &Value) -> Vec<FieldError> {
    match rt.storage {
        "pods" => pod(object),
        "events" => event(rt, object, true),
        _ => Vec::new(),
    }
}

fn pod(object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let containers = object["spec"]["containers"].as_array().map_or(&[][..], Vec::as_slice);
    if containers.is_empty() {
        errors.push(FieldError::required("spec.containers", ""));
    }
    for (i, container) in containers.iter().enumerate() {
        for field in ["name", "image"] {
            if container[field].as_str().unwrap_or_default().is_empty() {
                errors.push(FieldError::required(format!("spec.containers[{i}].{field}"), ""));
            }
        }
    }
    errors
}

/// `fresh`: at creation, where events.k8s.io/v1 asks for more than core/v1.
fn event(rt: &ResourceType, object: &Value, fresh: bool) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let text = |path: &str| object[path].as_str().unwrap_or_default();
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    let about = object["involvedObject"]["namespace"].as_str().unwrap_or_default();
    let has_time = !text("eventTime").is_empty();
    let about_fits = if about.is_empty() {
        namespace == "default" || (has_time && namespace == "kube-system")
    } else {
        // Events in the new shape may lie elsewhere than what they are about.
        has_time || about == namespace
    };
    if !about_fits {
        errors.push(FieldError::invalid("involvedObject.namespace", about, "does not match event.namespace"));
    }
    let controller = if rt.group.is_empty() { "reportingComponent" } else { "reportingController" };
    if has_time {
        if text("reportingComponent").is_empty() {
            errors.push(FieldError::required(controller, ""));
        } else if let Some(fault) = label_key_fault(text("reportingComponent")) {
            errors.push(FieldError::invalid(controller, text("reportingComponent"), fault));
        }
        for field in ["reportingInstance", "action", "reason"] {
            if text(field).is_empty() {
                errors.push(FieldError::required(field, ""));
            } else if text(field).len() > 128 {
                errors.push(FieldError::invalid(field, "", "can have at most 128 characters"));
            }
        }
        if text("message").len() > 1024 {
            errors.push(FieldError::invalid("message", "", "can have at most 1024 characters"));
        }
    }
    if fresh && !rt.group.is_empty() {
        if !has_time {
            errors.push(FieldError::required("eventTime", ""));
        }
        if !["Normal", "Warning"].contains(&text("type")) {
            errors.push(FieldError::invalid("type", "", format!("has invalid value: {}", text("type"))));
        }
        for field in ["firstTimestamp", "lastTimestamp"] {
            if !text(field).is_empty() {
                errors.push(FieldError::invalid(field, "", "needs to be unset"));
            }
        }
        if object["count"].as_i64().unwrap_or(0) != 0 {
            errors.push(FieldError::invalid("count", "", "needs to be unset"));
        }
        if object["source"].as_object().is_some_and(|source| !source.is_empty()) {
            errors.push(FieldError::invalid("source", "", "needs to be unset"));
        }
    }
    errors
}

/// What may not change in an update. Both objects are in their stored form.
pub(crate) fn update(rt: &ResourceType, old: &Value, new: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for field in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        let (before, after) = (&old["metadata"][field], &new["metadata"][field]);
        if before != after {
            let shown = after.as_str().map_or_else(|| after.to_string(), str::to_owned);
            errors.push(FieldError::invalid(format!("metadata.{field}"), shown, "field is immutable"));
        }
    }
    if rt.storage == "nodes" {
        let (before, after) = (&old["spec"]["providerID"], &new["spec"]["providerID"]);
        if before.is_string() && before != after {
            errors.push(FieldError::forbidden(
                "spec.providerID",
                "node updates may not change providerID except from \"\" to valid",
            ));
        }
    }
    if rt.storage == "events" {
        errors.extend(event(rt, new, false));
        if !rt.group.is_empty() {
            for field in [
                "involvedObject",
                "reason",
                "message",
                "source",
                "firstTimestamp",
                "lastTimestamp",
                "count",
                "type",
                "eventTime",
                "action",
                "related",
                "reportingComponent",
                "reportingInstance",
            ] {
                if old[field] != new[field] {
                    errors.push(FieldError::invalid(field, new[field].to_string(), "field is immutable"));
                }
            }
        }
    }
    if rt.storage == "pods" && pod_fixed_part(old) != pod_fixed_part(new) {
        errors.push(FieldError::forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,\
             `spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),\
             `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
    errors
}

fn pod_fixed_part(pod: &Value) -> Value {
    let mut spec = pod["spec"].clone();
    for list in ["containers", "initContainers"] {
        if let Some(items) = spec.get_mut(list).and_then(Value::as_array_mut) {
            for item in items {
                if let Some(container) = item.as_object_mut() {
                    container.remove("image");
                }
            }
        }
    }
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("activeDeadlineSeconds");
        spec.remove("tolerations");
    }
    spec
}

/// NodeRestriction: what the kubelet's identity may not do to node labels and taints.
pub(crate) fn node_restriction(user_node: &str, name: &str, old: Option<&Value>, new: &Value) -> Result<(), String> {
    if user_node != name {
        return Err(format!("node {user_node:?} is not allowed to modify node {name:?}"));
    }
    let empty = Map::new();
    let before = old.and_then(|o| o["metadata"]["labels"].as_object()).unwrap_or(&empty);
    let after = new["metadata"]["labels"].as_object().unwrap_or(&empty);
    let mut refused: Vec<&str> = before
        .keys()
        .chain(after.keys())
        .filter(|key| before.get(*key) != after.get(*key))
        .map(String::as_str)
        .filter(|key| restricted_label(key))
        .collect();
    refused.sort_unstable();
    refused.dedup();
    if !refused.is_empty() {
        let verb = if old.is_some() { "modify" } else { "set the following" };
        return Err(format!("is not allowed to {verb} labels: {}", refused.join(", ")));
    }
    if let Some(old) = old
        && old["spec"]["taints"] != new["spec"]["taints"]
    {
        return Err(format!("node {user_node:?} is not allowed to modify taints"));
    }
    Ok(())
}

fn restricted_label(key: &str) -> bool {
    const KUBELET: [&str; 11] = [
        "kubernetes.io/hostname",
        "kubernetes.io/os",
        "kubernetes.io/arch",
        "beta.kubernetes.io/os",
        "beta.kubernetes.io/arch",
        "beta.kubernetes.io/instance-type",
        "node.kubernetes.io/instance-type",
        "topology.kubernetes.io/zone",
        "topology.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/zone",
        "failure-domain.beta.kubernetes.io/region",
    ];
    let prefix = key.split_once('/').map_or("", |(prefix, _)| prefix);
    let within = |domain: &str| prefix == domain || prefix.ends_with(&format!(".{domain}"));
    if within("node-restriction.kubernetes.io") {
        return true;
    }
    (within("kubernetes.io") || within("k8s.io"))
        && !KUBELET.contains(&key)
        && !within("kubelet.kubernetes.io")
        && !within("node.kubernetes.io")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_follow_the_servers_charset() {
        for (key, good) in [
            ("a", true),
            ("nvidia.com/cc.mode", true),
            ("ccnode.dev/transition", true),
            ("", false),
            ("/a", false),
            ("a/", false),
            ("A.b/c", false),
            ("a/b/c", false),
            ("-a", false),
            ("a b", false),
        ] {
            assert_eq!(label_key_fault(key).is_none(), good, "{key:?}");
        }
        let long = "x".repeat(64);
        assert!(label_key_fault(&long).is_some());
        assert!(label_key_fault(&"x".repeat(63)).is_none());
        for (value, good) in [("", true), ("on", true), ("a b", false), ("_a", false), (long.as_str(), false)] {
            assert_eq!(label_value_fault(value).is_none(), good, "{value:?}");
        }
    }

    #[test]
    fn the_kubelet_may_set_vendor_labels_but_not_foreign_kubernetes_ones() {
        for (key, refused) in [
            ("nvidia.com/cc.ready.state", false),
            ("feature.node.kubernetes.io/x", false),
            ("amd.feature.node.kubernetes.io/snp", false),
            ("node.kubernetes.io/instance-type", false),
            ("topology.kubernetes.io/zone", false),
            ("node-restriction.kubernetes.io/x", true),
            ("a.node-restriction.kubernetes.io/x", true),
            ("foo.kubernetes.io/x", true),
            ("x.k8s.io/y", true),
        ] {
            assert_eq!(restricted_label(key), refused, "{key}");
        }
    }
}
