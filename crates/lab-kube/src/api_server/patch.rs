//! The patch formats of the real server, on plain JSON.

use serde_json::{Map, Value};

use super::managed::{ListKind, list_kind};
use super::status::ApiError;

/// More operations than this in one JSON Patch are refused by the real server.
const MAX_OPERATIONS: usize = 10_000;
/// What the `copy` operations of one JSON Patch may add up to, in bytes.
const MAX_COPIED: usize = 3 * 1024 * 1024;

/// What the `Content-Type` of a PATCH says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PatchKind {
    Json,
    Merge,
    Strategic,
    Apply,
}

impl PatchKind {
    pub(crate) const ACCEPTED: [&str; 4] = [
        "application/json-patch+json",
        "application/merge-patch+json",
        "application/strategic-merge-patch+json",
        "application/apply-patch+yaml",
    ];

    pub(crate) fn of(content_type: &str) -> Option<Self> {
        match content_type.split(';').next().unwrap_or_default().trim() {
            "application/json-patch+json" => Some(Self::Json),
            "application/merge-patch+json" => Some(Self::Merge),
            "application/strategic-merge-patch+json" => Some(Self::Strategic),
            "application/apply-patch+yaml" => Some(Self::Apply),
            _ => None,
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(bytes).map_err(|e| ApiError::bad_request(format!("error decoding patch: {e}")))
}

/// Applies a JSON Patch, a merge patch or a strategic merge patch. Server-side apply is `managed::apply`.
pub(crate) fn apply(kind: PatchKind, object: &Value, bytes: &[u8]) -> Result<Value, ApiError> {
    let mut object = object.clone();
    match kind {
        PatchKind::Json => json(&mut object, bytes)?,
        PatchKind::Merge => {
            let patch = parse(bytes)?;
            if !patch.is_object() {
                return Err(ApiError::bad_request("Invalid JSON Patch"));
            }
            json_patch::merge(&mut object, &patch);
        }
        PatchKind::Strategic | PatchKind::Apply => {
            let patch = parse(bytes)?;
            let Value::Object(patch) = patch else {
                return Err(ApiError::bad_request("Invalid JSON document"));
            };
            strategic(&mut object, patch)?;
        }
    }
    Ok(object)
}

fn json(object: &mut Value, bytes: &[u8]) -> Result<(), ApiError> {
    let operations: Vec<json_patch::PatchOperation> =
        serde_json::from_slice(bytes).map_err(|e| ApiError::bad_request(format!("error decoding patch: {e}")))?;
    if operations.len() > MAX_OPERATIONS {
        return Err(ApiError::too_large(format!(
            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
            operations.len()
        )));
    }
    let mut copied = 0;
    for operation in &operations {
        if let json_patch::PatchOperation::Copy(copy) = operation {
            copied += object.pointer(copy.from.as_str()).map_or(0, |value| value.to_string().len());
            if copied > MAX_COPIED {
                return Err(ApiError::unprocessable());
            }
        }
        // The real server's library takes `test` for null as "not there", as long as the parent is there.
        if let json_patch::PatchOperation::Test(test) = operation
            && test.value.is_null()
        {
            let path = test.path.as_str();
            let parent = path.rfind('/').and_then(|at| object.pointer(&path[..at]));
            let absent = object.pointer(path).is_none_or(Value::is_null);
            if absent && parent.is_some_and(Value::is_object) {
                continue;
            }
        }
        json_patch::patch(object, std::slice::from_ref(operation)).map_err(|_| ApiError::unprocessable())?;
    }
    Ok(())
}

fn bad_format(text: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("Invalid strategic merge patch: {text}"))
}

/// Merges maps recursively and lists by their merge keys. `$setElementOrder` is accepted, the order is not kept.
fn strategic(object: &mut Value, patch: Map<String, Value>) -> Result<(), ApiError> {
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let mut patch = patch;
    match patch.remove("$patch").as_ref().map(|directive| directive.as_str().unwrap_or_default().to_owned()) {
        None => {}
        Some(directive) if directive == "merge" => {}
        Some(directive) if directive == "replace" => {
            *object = Value::Object(patch);
            return Ok(());
        }
        Some(directive) if directive == "delete" => {
            *object = Value::Object(Map::new());
            return Ok(());
        }
        Some(other) => return Err(bad_format(format!("unknown $patch directive {other:?}"))),
    }
    for (key, value) in patch {
        if let Some(directive) = key.strip_prefix('$') {
            match directive.split_once('/') {
                Some(("deleteFromPrimitiveList", field)) => {
                    let gone = value.as_array().ok_or_else(|| bad_format("a list is expected"))?;
                    if let Some(list) = object.get_mut(field).and_then(Value::as_array_mut) {
                        list.retain(|item| !gone.contains(item));
                    }
                }
                Some(("setElementOrder", _)) => {}
                _ => return Err(bad_format(format!("directive {key:?} is not supported here"))),
            }
            continue;
        }
        let Some(map) = object.as_object_mut() else { continue };
        match value {
            Value::Null => {
                map.remove(&key);
            }
            Value::Object(below) => strategic(map.entry(key).or_insert(Value::Null), below)?,
            Value::Array(items) => strategic_list(map, &key, items)?,
            scalar => {
                map.insert(key, scalar);
            }
        }
    }
    Ok(())
}

fn strategic_list(map: &mut Map<String, Value>, field: &str, items: Vec<Value>) -> Result<(), ApiError> {
    let keys: &[&str] = match list_kind(field) {
        ListKind::Atomic => {
            map.insert(field.to_owned(), Value::Array(items));
            return Ok(());
        }
        ListKind::Set => &[],
        // Strategic merge knows one key per list.
        ListKind::Keyed(keys) => &keys[..1],
    };
    let list = map.entry(field.to_owned()).or_insert_with(|| Value::Array(Vec::new()));
    let Some(list) = list.as_array_mut() else { return Err(bad_format(format!("{field:?} is no list"))) };
    let [key] = keys else {
        for item in items {
            if !list.contains(&item) {
                list.push(item);
            }
        }
        return Ok(());
    };
    if items.iter().any(|item| item["$patch"] == "replace") {
        *list = items.into_iter().filter(|item| item["$patch"] != "replace").collect();
        return Ok(());
    }
    for item in items {
        let Value::Object(item) = item else { return Err(bad_format(format!("{field:?} holds maps"))) };
        let Some(wanted) = item.get(*key).cloned() else {
            return Err(ApiError::unprocessable());
        };
        let at = list.iter().position(|have| have.get(key) == Some(&wanted));
        if item.get("$patch").is_some_and(|directive| directive == "delete") {
            list.retain(|have| have.get(key) != Some(&wanted));
            continue;
        }
        if let Some(at) = at {
            strategic(&mut list[at], item)?;
        } else {
            let mut fresh = Value::Object(Map::new());
            strategic(&mut fresh, item)?;
            list.push(fresh);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patched(kind: PatchKind, object: &Value, patch: &Value) -> Result<Value, u16> {
        apply(kind, object, &serde_json::to_vec(patch).expect("JSON")).map_err(|e| e.code)
    }

    #[test]
    fn json_patch_tests_and_fails_whole() {
        let object = json!({"metadata": {"labels": {"a": "1"}}});
        for (patch, expected) in [
            (
                json!([{"op": "test", "path": "/metadata/labels/a", "value": "1"},
                    {"op": "replace", "path": "/metadata/labels/a", "value": "2"}]),
                Ok("2"),
            ),
            (json!([{"op": "test", "path": "/metadata/labels/a", "value": "9"}]), Err(422)),
            (json!([{"op": "test", "path": "/metadata/labels/b", "value": null}]), Ok("1")),
            (json!([{"op": "test", "path": "/metadata/labels/a", "value": null}]), Err(422)),
            (json!([{"op": "test", "path": "/metadata/annotations/b", "value": null}]), Err(422)),
            (json!([{"op": "remove", "path": "/metadata/labels/b"}]), Err(422)),
            (json!([{"op": "replace", "path": "/metadata/labels/b", "value": "x"}]), Err(422)),
            (json!([{"op": "add", "path": "/metadata/annotations/b", "value": "x"}]), Err(422)),
            (json!({"op": "add"}), Err(400)),
        ] {
            let result = patched(PatchKind::Json, &object, &patch);
            assert_eq!(result.map(|o| o["metadata"]["labels"]["a"].clone()), expected.map(Into::into), "{patch}");
        }
    }

    #[test]
    fn strategic_merge_knows_maps_and_conditions() {
        let object = json!({
            "metadata": {"labels": {"a": "1", "b": "1"}},
            "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "r"}, {"type": "X", "status": "True"}]},
        });
        let patch = json!({
            "metadata": {"labels": {"a": null, "c": "3"}},
            "status": {
                "$setElementOrder/conditions": [{"type": "Ready"}],
                "conditions": [{"type": "Ready", "status": "False"}, {"type": "X", "$patch": "delete"}],
            },
        });
        assert_eq!(
            patched(PatchKind::Strategic, &object, &patch),
            Ok(json!({
                "metadata": {"labels": {"b": "1", "c": "3"}},
                "status": {"conditions": [{"type": "Ready", "status": "False", "reason": "r"}]},
            }))
        );
        for (patch, code) in [
            (json!({"status": {"conditions": [{"status": "True"}]}}), 422),
            (json!({"$retainKeys": ["a"]}), 400),
            (json!({"metadata": {"$patch": "explode"}}), 400),
            (json!([]), 400),
        ] {
            assert_eq!(patched(PatchKind::Strategic, &object, &patch), Err(code), "{patch}");
        }
    }
}
