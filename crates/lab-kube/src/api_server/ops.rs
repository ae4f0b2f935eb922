//! The verbs that write: admission, validation, ownership and commit, in the real server's order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::auth::User;
use super::managed::{self, Writer};
use super::patch::{self, PatchKind};
use super::resources::{RequestInfo, ResourceType};
use super::status::{ApiError, FieldError};
use super::store::{Budget, Ending, Key, State, name_suffix, new_uid, timestamp};
use super::validate;

/// Who writes, in whose name, and with which options.
#[derive(Debug)]
pub(crate) struct Writing<'a> {
    pub(crate) user: &'a User,
    pub(crate) manager: String,
    pub(crate) dry_run: bool,
    /// `fieldValidation=Strict`: unknown fields are errors.
    pub(crate) strict: bool,
    /// The test's own hand: no admission.
    pub(crate) privileged: bool,
}

/// The object a write is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) rt: &'static ResourceType,
    pub(crate) subresource: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
}

impl Target<'_> {
    fn key(&self) -> Key {
        (self.rt.storage, self.namespace.to_owned(), self.name.to_owned())
    }
}

/// What DELETE was asked.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeleteOptions {
    pub(crate) grace: Option<i64>,
    pub(crate) uid: Option<String>,
    pub(crate) version: Option<String>,
}

impl DeleteOptions {
    /// From the body's fields; the query's `gracePeriodSeconds` counts where the body has none.
    pub(crate) fn read(body: &Value, query_grace: Option<i64>) -> Result<Self, ApiError> {
        if !body.is_null() && !body.is_object() {
            return Err(ApiError::bad_request("DeleteOptions are expected"));
        }
        if let Some(kind) = body["kind"].as_str()
            && kind != "DeleteOptions"
        {
            return Err(ApiError::bad_request(format!("{kind} in the body cannot be handled as DeleteOptions")));
        }
        let grace = body["gracePeriodSeconds"].as_i64().or(query_grace);
        if grace.is_some_and(|grace| grace < 0) {
            let error = FieldError::invalid("gracePeriodSeconds", "-1", "must be greater than or equal to 0");
            return Err(ApiError::invalid("DeleteOptions", "", &[error]));
        }
        let text = |key: &str| body["preconditions"][key].as_str().map(str::to_owned);
        Ok(Self { grace, uid: text("uid"), version: text("resourceVersion") })
    }
}

/// How a DELETE ended.
#[derive(Debug)]
pub(crate) enum Deleted {
    /// The object is gone.
    Gone(Arc<Value>),
    /// The object is marked and stays until its grace or its finalizers are over.
    Marked(Arc<Value>),
}

/// Fills in kind and apiVersion, and refuses another kind.
fn check_kind(rt: &ResourceType, body: Value) -> Result<Map<String, Value>, ApiError> {
    let Value::Object(mut object) = body else {
        return Err(ApiError::bad_request(format!(
            "the object provided is unrecognized (must be of type {}): couldn't get version/kind; json parse error: \
             json: cannot unmarshal into Go value of type struct",
            rt.kind
        )));
    };
    let api_version = rt.api_version();
    let text = |field: &str| object.get(field).and_then(Value::as_str).filter(|t| !t.is_empty()).map(str::to_owned);
    let (kind, version) = (text("kind"), text("apiVersion"));
    if kind.as_ref().is_some_and(|kind| kind != rt.kind) || version.as_ref().is_some_and(|v| *v != api_version) {
        return Err(ApiError::bad_request(format!(
            "{} in version \"{}\" cannot be handled as a {}: no kind registered",
            kind.as_deref().unwrap_or(rt.kind),
            version.as_deref().unwrap_or(&api_version),
            rt.kind
        )));
    }
    object.insert("kind".into(), rt.kind.into());
    object.insert("apiVersion".into(), api_version.into());
    if object.get("metadata").is_none_or(Value::is_null) {
        object.insert("metadata".into(), json!({}));
    }
    if object.get("metadata").is_some_and(|meta| !meta.is_object()) {
        return Err(ApiError::bad_request(format!(
            "{} in version \"{}\" cannot be handled as a {}: json: cannot unmarshal into Go struct field \
             .metadata of type v1.ObjectMeta",
            rt.kind, rt.version, rt.kind
        )));
    }
    Ok(object)
}

/// The first field that the typed form has lost, for strict field validation.
fn lost_field(given: &Value, kept: &Value, path: &str) -> Option<String> {
    match (given, kept) {
        (Value::Object(given), kept) => given.iter().find_map(|(key, value)| {
            let at = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            match kept.get(key) {
                Some(below) => lost_field(value, below, &at),
                None if value.is_null() || value == &json!({}) || value == &json!([]) => None,
                None => Some(at),
            }
        }),
        (Value::Array(given), Value::Array(kept)) => {
            given.iter().zip(kept).enumerate().find_map(|(i, (a, b))| lost_field(a, b, &format!("{path}[{i}]")))
        }
        _ => None,
    }
}

fn typed(rt: &ResourceType, writing: &Writing<'_>, object: Value) -> Result<Value, String> {
    let given = writing.strict.then(|| object.clone());
    let typed = rt.canonical(object)?;
    if let Some(field) = given.and_then(|given| lost_field(&given, &typed, "")) {
        return Err(format!("strict decoding error: unknown field \"{field}\""));
    }
    Ok(typed)
}

fn not_decoded(rt: &ResourceType, why: &str) -> ApiError {
    ApiError::bad_request(format!(
        "{} in version \"{}\" cannot be handled as a {}: {why}",
        rt.kind, rt.version, rt.kind
    ))
}

fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

impl State {
    pub(crate) fn create(
        &mut self,
        writing: &Writing<'_>,
        rt: &'static ResourceType,
        namespace: &str,
        body: Value,
    ) -> Result<Arc<Value>, ApiError> {
        let object = check_kind(rt, body)?;
        let mut object = typed(rt, writing, Value::Object(object)).map_err(|why| not_decoded(rt, &why))?;
        object = rt.to_stored(object);
        if !text(&object, "resourceVersion").is_empty() {
            return Err(ApiError::unknown("resourceVersion should not be set on objects to be created"));
        }
        let named = text(&object, "namespace");
        if rt.namespaced && !named.is_empty() && named != namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        if text(&object, "name").is_empty() && !text(&object, "generateName").is_empty() {
            let name = format!("{}{}", text(&object, "generateName"), name_suffix());
            object["metadata"]["name"] = name.into();
        }
        if let Some(meta) = object["metadata"].as_object_mut() {
            for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "managedFields", "selfLink"] {
                meta.remove(field);
            }
            meta.insert("uid".into(), new_uid().into());
            meta.insert("creationTimestamp".into(), timestamp(0).into());
            if rt.namespaced {
                meta.insert("namespace".into(), namespace.into());
            } else {
                meta.remove("namespace");
            }
        }
        prepare_new(rt, &mut object);
        let name = text(&object, "name").to_owned();
        if rt.namespaced {
            self.check_namespace(rt, namespace, &name)?;
        }
        if !writing.privileged
            && let (Some(node), "nodes") = (writing.user.node(), rt.storage)
        {
            validate::node_restriction(node, &name, None, &object)
                .map_err(|why| ApiError::forbidden(rt.gr(), &name, &why))?;
        }
        let mut errors = validate::metadata(rt, &object);
        errors.extend(validate::create(rt, &object));
        if !errors.is_empty() {
            return Err(ApiError::invalid(rt.kind, &name, &errors));
        }
        let key = (rt.storage, if rt.namespaced { namespace.to_owned() } else { String::new() }, name.clone());
        if self.objects.contains_key(&key) {
            return Err(ApiError::already_exists(rt.gr(), &name));
        }
        managed::update(None, &mut object, writer(rt, writing, "", &timestamp(0)));
        if writing.dry_run {
            return Ok(Arc::new(object));
        }
        Ok(self.commit(key, Some(object), &writing.user.name))
    }

    fn check_namespace(&self, rt: &ResourceType, namespace: &str, name: &str) -> Result<(), ApiError> {
        let Some(row) = ResourceType::stored("namespaces") else { return Ok(()) };
        let Some(have) = self.get(row, "", namespace) else {
            return Err(ApiError::not_found(row.gr(), namespace));
        };
        if have["status"]["phase"] == "Terminating" {
            let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
            return Err(ApiError::forbidden(rt.gr(), name, &why));
        }
        Ok(())
    }

    pub(crate) fn found(&self, target: Target<'_>) -> Result<Arc<Value>, ApiError> {
        self.objects.get(&target.key()).cloned().ok_or_else(|| ApiError::not_found(target.rt.gr(), target.name))
    }

    /// PUT. Tells whether the object was created by it.
    pub(crate) fn update(
        &mut self,
        writing: &Writing<'_>,
        target: Target<'_>,
        body: Value,
    ) -> Result<(Arc<Value>, bool), ApiError> {
        let rt = target.rt;
        let object = check_kind(rt, body)?;
        let mut object = typed(rt, writing, Value::Object(object)).map_err(|why| not_decoded(rt, &why))?;
        let (name, namespace) = (text(&object, "name"), text(&object, "namespace"));
        if name != target.name {
            return Err(ApiError::bad_request(if name.is_empty() {
                "name must be provided".to_owned()
            } else {
                format!("the name of the object ({name}) does not match the name on the URL ({})", target.name)
            }));
        }
        if rt.namespaced && !namespace.is_empty() && namespace != target.namespace {
            return Err(ApiError::bad_request(format!(
                "the namespace of the object ({namespace}) does not match the namespace on the request ({})",
                target.namespace
            )));
        }
        let old = match self.found(target) {
            Err(_) if rt.create_on_update && target.subresource.is_empty() => {
                if !text(&object, "resourceVersion").is_empty() || !text(&object, "uid").is_empty() {
                    return Err(ApiError::not_found(rt.gr(), target.name));
                }
                let probe = RequestInfo {
                    verb: "create".into(),
                    group: rt.group.into(),
                    namespace: target.namespace.into(),
                    resource: rt.resource.into(),
                    name: target.name.into(),
                    ..RequestInfo::default()
                };
                if !writing.privileged {
                    writing.user.authorize(&probe)?;
                }
                return self.create(writing, rt, target.namespace, object).map(|o| (o, true));
            }
            found => found?,
        };
        let uid = text(&object, "uid");
        if !uid.is_empty() && uid != text(&old, "uid") {
            let why =
                format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {}", text(&old, "uid"));
            return Err(ApiError::conflict(rt.gr(), target.name, &why));
        }
        if rt.namespaced {
            object["metadata"]["namespace"] = target.namespace.into();
        }
        let object = rt.to_stored(object);
        self.finish(writing, target, &old, object).map(|object| (object, false))
    }

    /// PATCH in every format. Tells whether the object was created by it (server-side apply only).
    pub(crate) fn patch(
        &mut self,
        writing: &Writing<'_>,
        target: Target<'_>,
        kind: PatchKind,
        bytes: &[u8],
        force: bool,
    ) -> Result<(Arc<Value>, bool), ApiError> {
        if kind == PatchKind::Apply {
            return self.apply(writing, target, bytes, force);
        }
        let rt = target.rt;
        let old = self.found(target)?;
        let patched = patch::apply(kind, &rt.to_wire(&old), bytes)?;
        let invalid =
            |why: &str| ApiError::invalid("", "", &[FieldError::invalid("patch", String::from_utf8_lossy(bytes), why)]);
        if !patched.is_object() || !patched["metadata"].is_object() {
            return Err(invalid("the patch leaves no object"));
        }
        if patched["kind"] != rt.kind || patched["apiVersion"] != rt.api_version() {
            return Err(ApiError::bad_request(format!(
                "{} in version {} cannot be handled as a {}: no kind registered",
                patched["kind"], patched["apiVersion"], rt.kind
            )));
        }
        let patched = typed(rt, writing, patched).map_err(|why| invalid(&why))?;
        let patched = rt.to_stored(patched);
        self.finish(writing, target, &old, patched).map(|object| (object, false))
    }

    fn apply(
        &mut self,
        writing: &Writing<'_>,
        target: Target<'_>,
        bytes: &[u8],
        force: bool,
    ) -> Result<(Arc<Value>, bool), ApiError> {
        let rt = target.rt;
        let config: Value =
            serde_json::from_slice(bytes).map_err(|e| ApiError::bad_request(format!("error decoding YAML: {e}")))?;
        for field in ["apiVersion", "kind"] {
            if config[field].as_str().unwrap_or_default().is_empty() {
                let shown = if field == "kind" { "Kind" } else { field };
                return Err(ApiError::bad_request(format!("Object '{shown}' is missing in '{config}'")));
            }
        }
        let mut config = Value::Object(check_kind(rt, config)?);
        let name = text(&config, "name");
        if name != target.name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                target.name
            )));
        }
        if config["metadata"].get("managedFields").is_some_and(|m| !m.is_null()) {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        let old = match self.found(target) {
            Err(_) if target.subresource.is_empty() => {
                let probe = RequestInfo {
                    verb: "create".into(),
                    group: rt.group.into(),
                    namespace: target.namespace.into(),
                    resource: rt.resource.into(),
                    name: target.name.into(),
                    ..RequestInfo::default()
                };
                if !writing.privileged {
                    writing.user.authorize(&probe)?;
                }
                return self.create_by_apply(writing, target, &config);
            }
            found => found?,
        };
        let version = text(&config, "resourceVersion");
        if !version.is_empty() && version != text(&old, "resourceVersion") {
            return Err(ApiError::modified(rt.gr(), target.name));
        }
        if let Some(object) = config.as_object_mut() {
            // What the other endpoint owns is not applied here and not owned.
            object.remove(if target.subresource == "status" { "spec" } else { "status" });
        }
        let live = rt.to_wire(&old);
        let time = timestamp(0);
        let merged = managed::apply(&live, &config, writer(rt, writing, target.subresource, &time), force)
            .map_err(|conflicts| ApiError::apply_conflict(&conflicts))?;
        let merged = typed(rt, writing, merged).map_err(|why| {
            ApiError::bad_request(format!(
                "failed to create typed patch object ({}; {}, Kind={}): {why}",
                target.name,
                rt.api_version(),
                rt.kind
            ))
        })?;
        self.finish_as(writing, target, &old, rt.to_stored(merged), true).map(|object| (object, false))
    }

    fn create_by_apply(
        &mut self,
        writing: &Writing<'_>,
        target: Target<'_>,
        config: &Value,
    ) -> Result<(Arc<Value>, bool), ApiError> {
        let rt = target.rt;
        let dry = Writing {
            user: writing.user,
            manager: writing.manager.clone(),
            dry_run: true,
            strict: writing.strict,
            privileged: writing.privileged,
        };
        let mut object = (*self.create(&dry, rt, target.namespace, config.clone())?).clone();
        if let Some(meta) = object["metadata"].as_object_mut() {
            meta.remove("managedFields");
        }
        let time = timestamp(0);
        let object = managed::apply(&object, config, writer(rt, writing, "", &time), true)
            .map_err(|conflicts| ApiError::apply_conflict(&conflicts))?;
        let object = rt.to_stored(object);
        if writing.dry_run {
            return Ok((Arc::new(object), true));
        }
        Ok((self.commit(target.key(), Some(object), &writing.user.name), true))
    }

    fn finish(
        &mut self,
        writing: &Writing<'_>,
        target: Target<'_>,
        old: &Arc<Value>,
        new: Value,
    ) -> Result<Arc<Value>, ApiError> {
        self.finish_as(writing, target, old, new, false)
    }

    /// Everything between a decoded update and its commit. `applied`: managedFields are done already.
    fn finish_as(
        &mut self,
        writing: &Writing<'_>,
        target: Target<'_>,
        old: &Arc<Value>,
        mut new: Value,
        applied: bool,
    ) -> Result<Arc<Value>, ApiError> {
        let rt = target.rt;
        let version = text(&new, "resourceVersion");
        if !version.is_empty() && version != text(old, "resourceVersion") {
            return Err(ApiError::modified(rt.gr(), target.name));
        }
        keep_system_fields(old, &mut new);
        split_subresource(target, old, &mut new);
        if !writing.privileged
            && let (Some(node), "nodes") = (writing.user.node(), rt.storage)
        {
            validate::node_restriction(node, target.name, Some(old), &new)
                .map_err(|why| ApiError::forbidden(rt.gr(), target.name, &why))?;
        }
        let mut errors = validate::metadata(rt, &new);
        errors.extend(validate::update(rt, old, &new));
        if !errors.is_empty() {
            return Err(ApiError::invalid(rt.kind, target.name, &errors));
        }
        if !applied {
            managed::update(Some(old), &mut new, writer(rt, writing, target.subresource, &timestamp(0)));
        }
        if new == **old {
            return Ok(Arc::clone(old));
        }
        if writing.dry_run {
            return Ok(Arc::new(new));
        }
        let finalized = !new["metadata"]["deletionTimestamp"].is_null()
            && new["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
            && new["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty);
        let object = self.commit(target.key(), Some(new), &writing.user.name);
        if finalized {
            return Ok(self.commit(target.key(), None, &writing.user.name));
        }
        Ok(object)
    }

    pub(crate) fn delete(
        &mut self,
        writing: &Writing<'_>,
        target: Target<'_>,
        options: &DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        let old = self.found(target)?;
        for (wanted, field, words) in
            [(&options.uid, "uid", "UID"), (&options.version, "resourceVersion", "ResourceVersion")]
        {
            if let Some(wanted) = wanted
                && wanted != text(&old, field)
            {
                let why = format!(
                    "Precondition failed: {words} in precondition: {wanted}, {words} in object meta: {}",
                    text(&old, field)
                );
                return Err(ApiError::conflict(target.rt.gr(), target.name, &why));
            }
        }
        let grace = if target.rt.storage == "pods" { pod_grace(&old, options.grace) } else { 0 };
        let held = old["metadata"]["finalizers"].as_array().is_some_and(|list| !list.is_empty());
        if grace == 0 && !held {
            if writing.dry_run {
                return Ok(Deleted::Gone(old));
            }
            if target.rt.storage == "namespaces" {
                let inside: Vec<Key> = self.objects.keys().filter(|key| key.1 == target.name).cloned().collect();
                for key in inside {
                    self.commit(key, None, &writing.user.name);
                }
            }
            return Ok(Deleted::Gone(self.commit(target.key(), None, &writing.user.name)));
        }
        let already = old["metadata"]["deletionGracePeriodSeconds"].as_i64();
        if already.is_some_and(|already| already <= grace) {
            return Ok(Deleted::Marked(old));
        }
        let mut new = (*old).clone();
        new["metadata"]["deletionTimestamp"] = timestamp(grace).into();
        new["metadata"]["deletionGracePeriodSeconds"] = grace.into();
        if writing.dry_run {
            return Ok(Deleted::Marked(Arc::new(new)));
        }
        let uid = text(&new, "uid").to_owned();
        let marked = self.commit(target.key(), Some(new), &writing.user.name);
        if let Some(after) = self.pods_end_after
            && target.rt.storage == "pods"
        {
            let wait = after.min(Duration::from_secs(u64::try_from(grace).unwrap_or(0)));
            self.endings.push(Ending { due: Instant::now() + wait, key: target.key(), uid });
        }
        Ok(Deleted::Marked(marked))
    }

    /// Ends the pods whose imaginary kubelet has had its time; tells whether there were any.
    pub(crate) fn end_pods(&mut self) -> bool {
        let now = Instant::now();
        let (due, later): (Vec<Ending>, Vec<Ending>) =
            std::mem::take(&mut self.endings).into_iter().partition(|ending| ending.due <= now);
        self.endings = later;
        let mut any = false;
        for ending in due {
            if self.objects.get(&ending.key).is_some_and(|pod| text(pod, "uid") == ending.uid) {
                self.commit(ending.key, None, "system:node:lab");
                any = true;
            }
        }
        any
    }

    pub(crate) fn evict(&mut self, writing: &Writing<'_>, target: Target<'_>, body: &Value) -> Result<(), ApiError> {
        let wrong = |field: &str, expected: &[&str]| {
            body.get(field).and_then(Value::as_str).is_some_and(|have| !expected.contains(&have))
        };
        if !body.is_object() || wrong("kind", &["Eviction"]) || wrong("apiVersion", &["policy/v1", "policy/v1beta1"]) {
            return Err(ApiError::bad_request("the object provided is unrecognized (must be of type Eviction)"));
        }
        if body["metadata"]["name"].as_str() != Some(target.name) {
            return Err(ApiError::bad_request("name in URL does not match name in Eviction object"));
        }
        let options = DeleteOptions::read(&body["deleteOptions"], None)?;
        let pod = self.found(target)?;
        let phase = pod["status"]["phase"].as_str().unwrap_or_default();
        let exempt =
            ["Succeeded", "Failed", "Pending"].contains(&phase) || !pod["metadata"]["deletionTimestamp"].is_null();
        if !exempt && let Some(budget) = self.blocking_budget(target) {
            let cause = json!({
                "reason": "DisruptionBudget",
                "message": format!("The disruption budget {} needs 1 healthy pods and has 1 currently", budget.name),
            });
            return Err(ApiError::too_many_requests(
                "Cannot evict pod as it would violate the pod's disruption budget.",
                budget.retry_after,
                vec![cause],
            ));
        }
        self.delete(writing, target, &options).map(|_| ())
    }

    fn blocking_budget(&mut self, target: Target<'_>) -> Option<Budget> {
        let at = self
            .budgets
            .iter()
            .position(|b| b.namespace == target.namespace && b.pod == target.name && b.refusals != Some(0))?;
        if let Some(left) = &mut self.budgets[at].refusals {
            *left -= 1;
        }
        Some(self.budgets[at].clone())
    }
}

/// The grace period of a pod's deletion, by the real server's rules.
fn pod_grace(pod: &Value, asked: Option<i64>) -> i64 {
    let scheduled = !pod["spec"]["nodeName"].as_str().unwrap_or_default().is_empty();
    let over = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if !scheduled || over {
        return 0;
    }
    asked.or(pod["spec"]["terminationGracePeriodSeconds"].as_i64()).unwrap_or(30)
}

fn writer<'a>(rt: &ResourceType, writing: &'a Writing<'_>, subresource: &'a str, time: &'a str) -> Writer<'a> {
    // The group versions are few; their names live as long as the program.
    let api_version = if rt.group.is_empty() { "v1" } else { "events.k8s.io/v1" };
    Writer { manager: &writing.manager, api_version, subresource, time }
}

/// What the real server sets on new objects.
fn prepare_new(rt: &ResourceType, object: &mut Value) {
    match rt.storage {
        "pods" => {
            object["status"] = json!({"phase": "Pending"});
            if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
                for (field, value) in [
                    ("restartPolicy", json!("Always")),
                    ("terminationGracePeriodSeconds", json!(30)),
                    ("dnsPolicy", json!("ClusterFirst")),
                    ("schedulerName", json!("default-scheduler")),
                    ("enableServiceLinks", json!(true)),
                ] {
                    spec.entry(field).or_insert(value);
                }
            }
        }
        "namespaces" => {
            object["spec"] = json!({"finalizers": ["kubernetes"]});
            object["status"] = json!({"phase": "Active"});
            let name = object["metadata"]["name"].clone();
            object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
        }
        _ => {}
    }
}

/// Puts back what clients leave out and may not change by leaving it out.
fn keep_system_fields(old: &Value, new: &mut Value) {
    for field in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        let kept = &old["metadata"][field];
        let empty = new["metadata"].get(field).is_none_or(|v| v.is_null() || v == "");
        if empty && !kept.is_null() {
            new["metadata"][field] = kept.clone();
        }
    }
    new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
}

/// The main endpoint leaves the status alone, and the status endpoint everything but metadata and status.
fn split_subresource(target: Target<'_>, old: &Value, new: &mut Value) {
    if !target.rt.subresources.contains(&"status") {
        return;
    }
    let Some(object) = new.as_object_mut() else { return };
    let mut restore = |field: &str| {
        match old.get(field) {
            Some(value) => object.insert(field.to_owned(), value.clone()),
            None => object.remove(field),
        };
    };
    if target.subresource == "status" {
        restore("spec");
        if target.rt.storage == "pods" {
            let owners = old["metadata"].get("ownerReferences").cloned();
            if let Some(meta) = new["metadata"].as_object_mut() {
                match owners {
                    Some(owners) => meta.insert("ownerReferences".into(), owners),
                    None => meta.remove("ownerReferences"),
                };
            }
        }
    } else {
        restore("status");
    }
}
