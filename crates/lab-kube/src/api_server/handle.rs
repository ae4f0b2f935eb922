//! The handle that ordinary test threads hold, and the thread behind it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::auth::{Rule, User};
use super::faults::{Fault, FaultId};
use super::ops::{DeleteOptions, Deleted, Target, Writing};
use super::patch::PatchKind;
use super::resources::ResourceType;
use super::store::{Budget, HistoryEntry, OnNodeWrite, RequestRecord, State, Token, View, random};
use super::{ApiServerConfig, ApiServerError, Counted, Shared, SharedRef, serve, tls};

/// The three files that a pod finds under `/var/run/secrets/kubernetes.io/serviceaccount`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccountFiles {
    /// `ca.crt`
    pub ca_crt: String,
    /// `token`
    pub token: String,
    /// `namespace`
    pub namespace: String,
}

/// A running server. Dropping it cuts every connection and ends its thread.
#[derive(Debug)]
pub struct ApiServer {
    shared: SharedRef,
    address: SocketAddr,
    ca: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// The hand of the test itself: everything is allowed, nothing is admitted twice.
fn test_user() -> User {
    User { name: "system:admin".to_owned(), groups: vec!["system:masters".to_owned()], rules: Rule::cluster_admin() }
}

fn test_writing(user: &User) -> Writing<'_> {
    Writing { user, manager: "lab".to_owned(), dry_run: false, strict: false, privileged: true }
}

fn row(resource: &str) -> Result<&'static ResourceType, ApiServerError> {
    ResourceType::stored(resource).ok_or_else(|| ApiServerError::UnknownResource(resource.to_owned()))
}

impl ApiServer {
    /// Binds, makes the certificates and starts serving on a thread of its own.
    pub fn start(config: ApiServerConfig) -> Result<Self, ApiServerError> {
        let failed = |address, source| ApiServerError::Listen { address, source };
        let asked = config.address;
        let (ca, acceptor) = tls::make(&config.names)?;
        let listener = std::net::TcpListener::bind(asked).map_err(|e| failed(asked, e))?;
        listener.set_nonblocking(true).map_err(|e| failed(asked, e))?;
        let address = listener.local_addr().map_err(|e| failed(asked, e))?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| failed(asked, e))?;
        let state = State::new(config.window, config.pods_end_after);
        let shared = Arc::new(Shared {
            changed: tokio::sync::watch::Sender::new(state.version),
            state: Mutex::new(state),
            config,
            rang: Condvar::new(),
            closing: tokio::sync::watch::Sender::new(0),
            cutting: tokio::sync::watch::Sender::new(0),
            releasing: tokio::sync::watch::Sender::new(0),
            down: AtomicBool::new(false),
        });
        let (stop, stopped) = oneshot::channel();
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("api-server".to_owned())
            .spawn(move || runtime.block_on(run(for_thread, listener, acceptor, stopped)))
            .map_err(|e| failed(asked, e))?;
        Ok(Self { shared, address, ca, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate authority in PEM.
    pub fn ca(&self) -> &str {
        &self.ca
    }

    /// `https://HOST:PORT`; use `127.0.0.1` on this machine and `10.0.2.2` in a guest.
    pub fn url(&self, host: &str) -> String {
        if host.contains(':') {
            format!("https://[{host}]:{}", self.address.port())
        } else {
            format!("https://{host}:{}", self.address.port())
        }
    }

    // -- identities ------------------------------------------------------------------------------------------------

    /// Makes a user and returns a bearer token for it. Groups are the user's besides `system:authenticated`.
    pub fn add_identity(&self, user: &str, groups: &[&str], rules: Vec<Rule>) -> String {
        let mut groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        groups.push("system:authenticated".to_owned());
        self.issue(Arc::new(User { name: user.to_owned(), groups, rules }))
    }

    fn issue(&self, user: Arc<User>) -> String {
        let token = format!("lab.{:016x}{:016x}", random(), random());
        self.shared.lock().tokens.insert(token.clone(), Token { user, expired: false });
        token
    }

    /// Another token for the user of this one, as a refreshed service account token is; None for an unknown token.
    pub fn reissue(&self, token: &str) -> Option<String> {
        let user = self.shared.lock().tokens.get(token).map(|known| Arc::clone(&known.user))?;
        Some(self.issue(user))
    }

    /// Requests with this token get 401 from now on. Running watches go on, as on the real server.
    pub fn expire_token(&self, token: &str) {
        if let Some(known) = self.shared.lock().tokens.get_mut(token) {
            known.expired = true;
        }
    }

    /// Replaces the rules of the user of this token.
    pub fn set_rules(&self, token: &str, rules: Vec<Rule>) {
        if let Some(known) = self.shared.lock().tokens.get_mut(token) {
            known.user = Arc::new(User { rules, ..(*known.user).clone() });
        }
    }

    /// A kubeconfig for this token and for a client that reaches the server as `host`.
    pub fn kubeconfig(&self, token: &str, host: &str) -> String {
        // ByteString serializes as base64, which is all that is needed here.
        let ca = serde_json::to_value(k8s_openapi::ByteString(self.ca.clone().into_bytes())).unwrap_or_default();
        let ca = ca.as_str().unwrap_or_default();
        let url = self.url(host);
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\nclusters:\n- name: lab\n  cluster:\n    \
             server: {url}\n    certificate-authority-data: {ca}\nusers:\n- name: lab\n  user:\n    token: {token}\n\
             contexts:\n- name: lab\n  context:\n    cluster: lab\n    user: lab\n"
        )
    }

    /// What in-cluster configuration reads. Besides, the client needs `KUBERNETES_SERVICE_HOST` and
    /// `KUBERNETES_SERVICE_PORT` in its environment.
    pub fn service_account_files(&self, token: &str, namespace: &str) -> ServiceAccountFiles {
        ServiceAccountFiles { ca_crt: self.ca.clone(), token: token.to_owned(), namespace: namespace.to_owned() }
    }

    // -- objects ---------------------------------------------------------------------------------------------------

    fn write<T>(&self, act: impl FnOnce(&mut State, &Writing<'_>) -> T) -> T {
        let user = test_user();
        let result = act(&mut self.shared.lock(), &test_writing(&user));
        self.shared.tell();
        result
    }

    /// Creates an object, by the rules that hold for clients, except that a status given is kept.
    pub fn create(&self, resource: &str, object: Value) -> Result<Value, ApiServerError> {
        let rt = row(resource)?;
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let status = object.get("status").cloned();
        self.write(|state, writing| {
            let made = state.create(writing, rt, &namespace, object)?;
            let Some(status) = status.filter(|_| rt.subresources.contains(&"status")) else {
                return Ok((*made).clone());
            };
            let mut with_status = (*made).clone();
            with_status["status"] = status;
            let name = made["metadata"]["name"].as_str().unwrap_or_default();
            let target = Target { rt, subresource: "status", namespace: &namespace, name };
            Ok((*state.update(writing, target, with_status)?.0).clone())
        })
    }

    /// One object in the core group's form; `namespace` is empty for nodes and namespaces.
    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        self.view(|view| view.get(resource, namespace, name).cloned())
    }

    /// All objects of a resource.
    pub fn list(&self, resource: &str) -> Vec<Value> {
        self.view(|view| view.list(resource).into_iter().cloned().collect())
    }

    /// A merge patch by the test's own hand. `resource` may carry `/status`.
    pub fn merge(&self, resource: &str, namespace: &str, name: &str, patch: &Value) -> Result<Value, ApiServerError> {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let target = Target { rt: row(resource)?, subresource, namespace, name };
        let bytes = patch.to_string();
        self.write(|state, writing| {
            let (object, _) = state.patch(writing, target, PatchKind::Merge, bytes.as_bytes(), false)?;
            Ok((*object).clone())
        })
    }

    /// Deletes an object; `grace` as in `DeleteOptions`. Tells whether it is gone (and not only marked).
    pub fn delete(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        grace: Option<u32>,
    ) -> Result<bool, ApiServerError> {
        let target = Target { rt: row(resource)?, subresource: "", namespace, name };
        let options = DeleteOptions { grace: grace.map(i64::from), ..DeleteOptions::default() };
        self.write(|state, writing| Ok(matches!(state.delete(writing, target, &options)?, Deleted::Gone(_))))
    }

    /// A node with these labels.
    pub fn add_node(&self, name: &str, labels: &[(&str, &str)]) -> Result<Value, ApiServerError> {
        let labels: Map<String, Value> = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
        self.create("nodes", json!({"metadata": {"name": name, "labels": labels}}))
    }

    /// A running pod on a node, with these labels. The namespace is made if it is not there.
    pub fn add_pod(
        &self,
        namespace: &str,
        name: &str,
        node: &str,
        labels: &[(&str, &str)],
    ) -> Result<Value, ApiServerError> {
        if self.get("namespaces", "", namespace).is_none() {
            self.create("namespaces", json!({"metadata": {"name": namespace}}))?;
        }
        let labels: Map<String, Value> = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
        self.create(
            "pods",
            json!({
                "metadata": {"name": name, "namespace": namespace, "labels": labels},
                "spec": {"nodeName": node, "containers": [{"name": "main", "image": "none"}]},
                "status": {"phase": "Running"},
            }),
        )
    }

    /// Ends a marked pod, as the kubelet does when its containers have stopped.
    pub fn finish_pod_deletion(&self, namespace: &str, name: &str) -> Result<(), ApiServerError> {
        self.delete("pods", namespace, name, Some(0)).map(|_| ())
    }

    /// Sets a node's label, or removes it.
    pub fn set_label(&self, node: &str, key: &str, value: Option<&str>) -> Result<(), ApiServerError> {
        let mut labels = Map::new();
        labels.insert(key.to_owned(), value.map_or(Value::Null, Into::into));
        self.merge("nodes", "", node, &json!({"metadata": {"labels": labels}})).map(|_| ())
    }

    /// Sets a node's annotation, or removes it.
    pub fn set_annotation(&self, node: &str, key: &str, value: Option<&str>) -> Result<(), ApiServerError> {
        let mut annotations = Map::new();
        annotations.insert(key.to_owned(), value.map_or(Value::Null, Into::into));
        self.merge("nodes", "", node, &json!({"metadata": {"annotations": annotations}})).map(|_| ())
    }

    /// A node's labels.
    pub fn labels(&self, node: &str) -> BTreeMap<String, String> {
        self.view(|view| view.labels(node))
    }

    /// A node's annotations.
    pub fn annotations(&self, node: &str) -> BTreeMap<String, String> {
        self.view(|view| view.annotations(node))
    }

    /// Deletes a node and creates it again under the same name and labels: another UID. Returns the new UID.
    pub fn replace_node(&self, node: &str) -> Result<String, ApiServerError> {
        let labels = self.labels(node);
        self.delete("nodes", "", node, None)?;
        let labels: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let made = self.add_node(node, &labels)?;
        Ok(made["metadata"]["uid"].as_str().unwrap_or_default().to_owned())
    }

    /// Evictions of this pod get 429 with this `Retry-After` (the real server sends none), `refusals` times or for good.
    pub fn block_eviction(&self, namespace: &str, pod: &str, retry_after: Option<u32>, refusals: Option<usize>) {
        self.shared.lock().budgets.push(Budget {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            name: format!("{pod}-budget"),
            retry_after,
            refusals,
        });
    }

    /// Evictions are allowed again.
    pub fn allow_evictions(&self) {
        self.shared.lock().budgets.clear();
    }

    // -- looking and waiting ---------------------------------------------------------------------------------------

    /// Looks at the store; nothing changes meanwhile.
    pub fn view<T>(&self, look: impl FnOnce(View<'_>) -> T) -> T {
        look(View(&self.shared.lock()))
    }

    /// Looks again after every write and every request until there is an answer, or None when the time is over.
    pub fn wait_for<T>(&self, timeout: Duration, mut look: impl FnMut(View<'_>) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = look(View(&state)) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            state = self.shared.rang.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Every state a node's labels and annotations have had.
    pub fn history(&self, node: &str) -> Vec<HistoryEntry> {
        self.view(|view| view.history(node).to_vec())
    }

    /// Calls this at every write of a node, in the order of the writes and before anybody can see the next one. It must not
    /// ask the server for anything.
    pub fn on_node_write(&self, look: impl FnMut(&HistoryEntry) + Send + 'static) {
        self.shared.lock().on_node_write = Some(OnNodeWrite(Box::new(look)));
    }

    /// Every request answered (or cut) so far.
    pub fn requests(&self) -> Vec<RequestRecord> {
        self.view(|view| view.requests().to_vec())
    }

    /// How many requests were made of this verb and resource (`nodes`, `pods/eviction`).
    pub fn count(&self, verb: &str, resource: &str) -> usize {
        self.view(|view| view.requests().iter().filter(|r| r.verb == verb && r.resource == resource).count())
    }

    /// Forgets the requests so far.
    pub fn clear_requests(&self) {
        self.shared.lock().requests.clear();
    }

    /// The version of the last write.
    pub fn resource_version(&self) -> u64 {
        self.view(|view| view.resource_version())
    }

    // -- faults ----------------------------------------------------------------------------------------------------

    /// Adds a fault. Of several that fit a request, the first added strikes.
    pub fn inject(&self, fault: Fault) -> FaultId {
        self.shared.lock().faults.add(fault)
    }

    /// Stops all faults.
    pub fn clear_faults(&self) {
        self.shared.lock().faults.clear();
    }

    /// How often a fault has struck.
    pub fn fault_hits(&self, id: FaultId) -> usize {
        self.shared.lock().faults.hits(id)
    }

    /// Lets every held request go on.
    pub fn release(&self) {
        self.shared.releasing.send_modify(|count| *count += 1);
    }

    /// From now on a watch from any version before the present one gets 410; running watches go on.
    pub fn compact(&self) {
        let mut state = self.shared.lock();
        state.compacted = state.version;
    }

    /// Ends every running watch, in order, as a server does that shuts down gracefully.
    pub fn close_watches(&self) {
        self.shared.closing.send_modify(|count| *count += 1);
    }

    /// Cuts every open connection.
    pub fn cut_connections(&self) {
        self.shared.cutting.send_modify(|count| *count += 1);
    }

    /// Goes away (connections are cut, new ones closed at once) or comes back, with port and store unchanged.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::SeqCst);
        if down {
            self.cut_connections();
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // The thread may have ended by itself, which is as good.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Accepts until told to stop; every connection is a task of the set and ends with it.
async fn run(
    shared: SharedRef,
    listener: std::net::TcpListener,
    acceptor: TlsAcceptor,
    mut stopped: oneshot::Receiver<()>,
) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "The listener cannot be used");
            return;
        }
    };
    let mut connections = JoinSet::new();
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    loop {
        tokio::select! {
            _ = &mut stopped => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if !shared.down.load(Ordering::SeqCst) => {
                    connections.spawn(connection(Arc::clone(&shared), stream, acceptor.clone()));
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "A connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            _ = tick.tick() => {
                let ended = shared.lock().end_pods();
                if ended {
                    shared.tell();
                }
            }
        }
    }
}

async fn connection(shared: SharedRef, stream: tokio::net::TcpStream, acceptor: TlsAcceptor) {
    let mut cutting = shared.cutting.subscribe();
    let _open = Counted::begin(&shared, |state| &mut state.connections);
    // Watches are many small writes.
    let _ = stream.set_nodelay(true);
    let serve = async {
        let tls = match tokio::time::timeout(Duration::from_secs(10), acceptor.accept(stream)).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
            Err(_) => return tracing::debug!("TLS handshake took too long"),
        };
        let service = service_fn(|request| serve::handle(Arc::clone(&shared), request));
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(30))
            .serve_connection(TokioIo::new(tls), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "Connection ended");
        }
    };
    tokio::select! {
        () = serve => {}
        _ = cutting.changed() => {}
    }
}
