//! An API server in memory that knows one node and its pods, for tests. It answers list and watch of both, merge patch and
//! JSON Patch of the node's metadata, records every request, and fails on demand.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame};
use kube::client::Body;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

/// One request as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// Method.
    pub method: String,
    /// Path and query.
    pub uri: String,
    /// `accept` header.
    pub accept: String,
    /// `content-type` header.
    pub content_type: String,
    /// Body, if it is JSON.
    pub body: Value,
}

/// The server. Clones are the same server.
#[derive(Clone, Debug)]
pub struct FakeApi(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    name: String,
    node: Option<Value>,
    version: u64,
    requests: Vec<Recorded>,
    faults: VecDeque<(Method, u16)>,
    watchers: Vec<mpsc::UnboundedSender<String>>,
    /// By namespace and name.
    pods: BTreeMap<(String, String), Value>,
    pod_watchers: Vec<mpsc::UnboundedSender<String>>,
    hook: Option<Hook>,
}

/// Called with the node's labels after every change of them.
struct Hook(Box<OnChange>);

type OnChange = dyn FnMut(&BTreeMap<String, String>) + Send;

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

type ResponseBody = UnsyncBoxBody<Bytes, Infallible>;

impl FakeApi {
    /// A server with the node `name`, which has UID `uid-1` and no labels.
    pub fn new(name: &str) -> Self {
        let node = json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": name, "uid": "uid-1", "resourceVersion": "100"}});
        Self(Arc::new(Mutex::new(Inner {
            name: name.to_owned(),
            node: Some(node),
            version: 100,
            requests: Vec::new(),
            faults: VecDeque::new(),
            watchers: Vec::new(),
            pods: BTreeMap::new(),
            pod_watchers: Vec::new(),
            hook: None,
        })))
    }

    /// A kube client whose requests end here.
    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        });
        kube::Client::new(service, "default")
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets or removes a label, as a person would.
    pub fn set_label(&self, name: &str, value: Option<&str>) {
        self.lock().edit("labels", name, value);
    }

    /// Runs a pod on the node, with these labels.
    pub fn add_pod(&self, namespace: &str, name: &str, labels: &[(&str, &str)]) {
        let mut inner = self.lock();
        inner.version += 1;
        let labels: BTreeMap<&str, &str> = labels.iter().copied().collect();
        let version = inner.version.to_string();
        let uid = format!("pod-{version}");
        let pod = json!({"metadata": {"name": name, "namespace": namespace, "uid": uid, "labels": labels, "resourceVersion": version}});
        inner.tell_pods("ADDED", &pod);
        inner.pods.insert((namespace.to_owned(), name.to_owned()), pod);
    }

    /// Ends a pod.
    pub fn delete_pod(&self, namespace: &str, name: &str) {
        let mut inner = self.lock();
        if let Some(mut pod) = inner.pods.remove(&(namespace.to_owned(), name.to_owned())) {
            inner.version += 1;
            pod["metadata"]["resourceVersion"] = inner.version.to_string().into();
            inner.tell_pods("DELETED", &pod);
        }
    }

    /// Sets what the kubelet says of a resource.
    pub fn set_allocatable(&self, resource: &str, quantity: &str) {
        let mut inner = self.lock();
        let Some(mut node) = inner.node.clone() else { return };
        node["status"]["allocatable"][resource] = quantity.into();
        inner.store(node);
    }

    /// Sets or removes an annotation, as a person would.
    pub fn set_annotation(&self, name: &str, value: Option<&str>) {
        self.lock().edit("annotations", name, value);
    }

    /// All labels.
    pub fn labels(&self) -> BTreeMap<String, String> {
        self.lock().entries("labels")
    }

    /// All annotations.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        self.lock().entries("annotations")
    }

    /// Everything that was asked so far.
    pub fn requests(&self) -> Vec<Recorded> {
        self.lock().requests.clone()
    }

    /// The events among [`FakeApi::requests`] that were taken: reason and note.
    pub fn events(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let inner = self.lock();
        let posted = inner.requests.iter().filter(|request| request.method == "POST");
        posted.map(|request| (text(&request.body["reason"]), text(&request.body["note"]))).collect()
    }

    /// The patches among [`FakeApi::requests`].
    pub fn patches(&self) -> Vec<Recorded> {
        self.lock().requests.iter().filter(|request| request.method == "PATCH").cloned().collect()
    }

    /// Makes the next request of this method fail with this HTTP status; may be called several times.
    pub fn fail_next(&self, method: Method, status: u16) {
        self.lock().faults.push_back((method, status));
    }

    /// Calls `hook` with all labels after every change of the node.
    pub fn on_change(&self, hook: impl FnMut(&BTreeMap<String, String>) + Send + 'static) {
        self.lock().hook = Some(Hook(Box::new(hook)));
    }

    /// Deletes the node.
    pub fn delete_node(&self) {
        let mut inner = self.lock();
        if let Some(mut node) = inner.node.take() {
            inner.version += 1;
            node["metadata"]["resourceVersion"] = inner.version.to_string().into();
            inner.tell("DELETED", &node);
        }
    }

    /// Creates the node anew under another UID.
    pub fn create_node(&self, uid: &str) {
        let mut inner = self.lock();
        inner.version += 1;
        let node = json!({"metadata": {"name": inner.name, "uid": uid, "resourceVersion": inner.version.to_string()}});
        inner.tell("ADDED", &node);
        inner.node = Some(node);
    }

    /// Ends all watches, as an API server does that restarts.
    pub fn close_watches(&self) {
        self.lock().watchers.clear();
    }

    /// Sends a raw line into all watches.
    pub fn send_watch_line(&self, line: &str) {
        self.lock().watchers.retain(|watcher| watcher.send(format!("{line}\n")).is_ok());
    }

    /// How many watches are open.
    pub fn open_watches(&self) -> usize {
        let mut inner = self.lock();
        inner.watchers.retain(|watcher| !watcher.is_closed());
        inner.watchers.len()
    }

    async fn answer(&self, request: Request<Body>) -> Response<ResponseBody> {
        let (parts, body) = request.into_parts();
        let bytes = body.collect_bytes().await.unwrap_or_default();
        let header =
            |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        let body: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        let recorded = Recorded {
            method: parts.method.to_string(),
            uri: parts.uri.to_string(),
            accept: header("accept"),
            content_type: header("content-type"),
            body: body.clone(),
        };
        let mut inner = self.lock();
        let content_type = recorded.content_type.clone();
        inner.requests.push(recorded);
        if let Some(index) = inner.faults.iter().position(|(method, _)| *method == parts.method) {
            let status = inner.faults.remove(index).map_or(500, |(_, status)| status);
            return failure(status, "asked to fail");
        }
        let query = parts.uri.query().unwrap_or_default();
        match (&parts.method, parts.uri.path()) {
            (&Method::GET, "/api/v1/nodes") if query.contains("watch=true") => inner.watch(query),
            (&Method::GET, "/api/v1/nodes") => {
                let items: Vec<&Value> = inner.node.iter().collect();
                respond(200, &json!({"metadata": {"resourceVersion": inner.version.to_string()}, "items": items}))
            }
            (&Method::GET, path) if path.ends_with("/pods") && query.contains("watch=true") => {
                let (sender, body) = stream();
                inner.pod_watchers.push(sender);
                Response::new(body)
            }
            (&Method::GET, path) if path.ends_with("/pods") => {
                let namespace = path.trim_start_matches("/api/v1/namespaces/").trim_end_matches("/pods");
                let items: Vec<&Value> =
                    inner.pods.iter().filter(|((of, _), _)| of == namespace).map(|(_, pod)| pod).collect();
                respond(200, &json!({"metadata": {"resourceVersion": inner.version.to_string()}, "items": items}))
            }
            (&Method::POST, "/apis/events.k8s.io/v1/namespaces/default/events") => respond(201, &body),
            (&Method::PATCH, path) if path == format!("/api/v1/nodes/{}", inner.name) => {
                inner.patch(&content_type, &body)
            }
            _ => failure(404, "not found"),
        }
    }
}

impl Inner {
    fn entries(&self, field: &str) -> BTreeMap<String, String> {
        let entries = self.node.as_ref().and_then(|node| node["metadata"][field].as_object());
        entries
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
            .collect()
    }

    fn edit(&mut self, field: &str, name: &str, value: Option<&str>) {
        let Some(mut node) = self.node.clone() else { return };
        let entries = &mut node["metadata"][field];
        if entries.is_null() {
            *entries = Value::Object(Map::new());
        }
        if let Some(entries) = entries.as_object_mut() {
            match value {
                Some(value) => drop(entries.insert(name.to_owned(), value.into())),
                None => drop(entries.remove(name)),
            }
        }
        self.store(node);
    }

    fn store(&mut self, mut node: Value) {
        if self.node.as_ref() == Some(&node) {
            return;
        }
        self.version += 1;
        node["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.tell("MODIFIED", &node);
        self.node = Some(node);
        let labels = self.entries("labels");
        if let Some(Hook(hook)) = &mut self.hook {
            hook(&labels);
        }
    }

    fn tell(&mut self, kind: &str, node: &Value) {
        let line = format!("{}\n", json!({"type": kind, "object": node}));
        self.watchers.retain(|watcher| watcher.send(line.clone()).is_ok());
    }

    fn tell_pods(&mut self, kind: &str, pod: &Value) {
        let line = format!("{}\n", json!({"type": kind, "object": pod}));
        self.pod_watchers.retain(|watcher| watcher.send(line.clone()).is_ok());
    }

    fn watch(&mut self, query: &str) -> Response<ResponseBody> {
        let from = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")).unwrap_or_default();
        let (sender, body) = stream();
        // Events between the version asked for and now are told by the newest state alone.
        if let Some(node) = &self.node
            && from != self.version.to_string()
        {
            let _ = sender.send(format!("{}\n", json!({"type": "MODIFIED", "object": node})));
        }
        self.watchers.push(sender);
        Response::new(body)
    }

    fn patch(&mut self, content_type: &str, patch: &Value) -> Response<ResponseBody> {
        let Some(mut node) = self.node.clone() else { return failure(404, "node not found") };
        let applied = match content_type {
            "application/merge-patch+json" => {
                merge(&mut node, patch);
                Ok(())
            }
            "application/json-patch+json" => apply(&mut node, patch),
            _ => return failure(415, "unsupported media type"),
        };
        match applied {
            Ok(()) => {
                self.store(node);
                respond(200, self.node.as_ref().unwrap_or(&Value::Null))
            }
            Err(message) => failure(422, &message),
        }
    }
}

/// A body that goes on for as long as somebody sends lines into it.
fn stream() -> (mpsc::UnboundedSender<String>, ResponseBody) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let lines = futures::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|line: String| (line, receiver))
    });
    let body = StreamBody::new(lines.map(|line| Ok::<_, Infallible>(Frame::data(Bytes::from(line)))));
    (sender, body.boxed_unsync())
}

/// RFC 7386.
fn merge(target: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Some(target) = target.as_object_mut() else { return };
    for (name, value) in patch {
        if value.is_null() {
            target.remove(name);
        } else {
            merge(target.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

/// The part of RFC 6902 that is used: test, add and remove of members of objects.
fn apply(target: &mut Value, operations: &Value) -> Result<(), String> {
    for operation in operations.as_array().ok_or("not a list")? {
        let path = operation["path"].as_str().ok_or("no path")?;
        let (parent, name) = path.rsplit_once('/').ok_or("no parent")?;
        let name = name.replace("~1", "/").replace("~0", "~");
        let parent =
            target.pointer_mut(parent).and_then(Value::as_object_mut).ok_or(format!("{path} has no parent"))?;
        match operation["op"].as_str() {
            Some("test") if parent.get(&name) == Some(&operation["value"]) => {}
            Some("test") => return Err(format!("testing value {path} failed")),
            Some("add") => drop(parent.insert(name, operation["value"].clone())),
            Some("remove") => drop(parent.remove(&name).ok_or(format!("{path} is absent"))?),
            _ => return Err(format!("operation {operation} is not known")),
        }
    }
    Ok(())
}

fn respond(status: u16, body: &Value) -> Response<ResponseBody> {
    let lines = futures::stream::iter([Ok::<_, Infallible>(Frame::data(Bytes::from(body.to_string())))]);
    let mut response = Response::new(StreamBody::new(lines).boxed_unsync());
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    response
}

fn failure(status: u16, message: &str) -> Response<ResponseBody> {
    respond(
        status,
        &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "message": message, "reason": ""}),
    )
}
