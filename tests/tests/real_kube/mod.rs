//! A cluster to ask, real or the stand-in, and the identities that ask. `hack/real-kube env` tells where the real one is.

#![allow(dead_code, reason = "each of the test files uses its own part of this")]

#[allow(unused_macros, unused_imports, reason = "not every file of tests has a contract")]
pub(crate) mod contract;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use kube::client::Body;
use kubelet_api::device_plugin as dp;
use lab_kube::api_server::{ApiServer, ApiServerConfig, Rule};
use lab_kube::kubelet::toy::{self, Toy};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tonic::Status;

/// Time for anything to come about. A kubelet of 1.20 takes a minute now and then until it confirms the end of a pod.
pub(crate) const PATIENCE: Duration = Duration::from_mins(3);

pub(crate) const MERGE: &str = "application/merge-patch+json";
pub(crate) const STRATEGIC: &str = "application/strategic-merge-patch+json";
pub(crate) const JSON: &str = "application/json-patch+json";

/// The image that `hack/real-kube` makes.
pub(crate) const IMAGE: &str = "ccnode.dev/pause:1";

/// The node of its kubelet.
pub(crate) const NODE: &str = "gpu-1";

/// What `hack/real-kube env` says, as the environment has it.
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Where the real cluster is. A test that is asked for it, and finds none, fails: it is not run by default.
pub(crate) fn real() -> Result<PathBuf> {
    variable("CCNODE_REAL_KUBE").context("no real cluster: eval \"$(hack/real-kube env)\" after hack/real-kube up")
}

/// The folder of the real kubelet: its sockets are in `device-plugins` and `pod-resources`.
pub(crate) fn kubelet_folder() -> Result<PathBuf> {
    real()?;
    variable("CCNODE_REAL_KUBELET_DIR").context("the real cluster has no kubelet here")
}

/// Makes VFIO group nodes for the containers of the real kubelet, in the `/dev` that only they see: each is a `/dev/null`.
pub(crate) fn make_vfio_nodes(groups: impl IntoIterator<Item = u32>) -> Result<()> {
    let nodes = groups.into_iter().map(|group| group.to_string()).chain(["vfio".to_owned()]);
    for node in nodes {
        script(&["exec", "sh", "-c", &format!("[ -e /dev/vfio/{node} ] || mknod /dev/vfio/{node} c 1 3")])?;
    }
    Ok(())
}

/// A plugin that wants everything that a kubelet can ask, over devices that are all `/dev/null`.
pub(crate) fn plugin(devices: &[(&str, bool)]) -> Toy {
    let mut toy = Toy::new(devices);
    toy.options = dp::DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true };
    toy.nodes = |id| vec![["/dev/null".to_owned(), format!("/dev/contract-{id}")]];
    toy
}

/// Asks the kubelet of a folder to take such a plugin.
pub(crate) async fn register(folder: &Path, version: &str, endpoint: &str, resource: &str) -> Result<(), Status> {
    toy::register(folder, version, endpoint, resource, Some(plugin(&[]).options)).await
}

/// The script by which the real cluster is run.
pub(crate) fn script(args: &[&str]) -> Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hack/real-kube");
    let mut command = Command::new(script);
    if let Some(folder) = variable("CCNODE_REAL_KUBE").filter(|folder| folder.is_absolute()) {
        command.env("CCNODE_REAL_KUBE_DIR", folder);
    }
    let output = command.args(args).output().context("hack/real-kube cannot be run")?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "hack/real-kube {args:?} ended with {}: {told}", output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Runs a test in the network namespace of the real cluster, if it has one of its own.
pub(crate) fn run<T>(test: impl Future<Output = Result<T>>) -> Result<T> {
    if let Some(path) = variable("CCNODE_REAL_KUBE_NET") {
        let file = File::open(&path).with_context(|| format!("{}: the cluster has ended", path.display()))?;
        setns(file, CloneFlags::CLONE_NEWNET).context("the cluster's network namespace cannot be entered")?;
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(test)
}

/// An answer of the API server.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) body: Value,
}

impl Answer {
    /// The reason of a refusal.
    pub(crate) fn reason(&self) -> &str {
        self.body["reason"].as_str().unwrap_or_default()
    }

    /// Fails unless this is the code.
    pub(crate) fn is(self, code: u16) -> Result<Value> {
        ensure!(self.code == code, "{} and not {code}: {:#}", self.code, self.body);
        Ok(self.body)
    }

    /// Fails unless it is refused with this code and reason, in a Status that says the same.
    pub(crate) fn refused(self, code: u16, reason: &str) -> Result<Value> {
        let says = (self.code, &self.body["kind"], &self.body["status"], &self.body["code"], self.reason());
        let wanted = (code, &json!("Status"), &json!("Failure"), &json!(code), reason);
        ensure!(says == wanted, "{} {} and not {code} {reason}: {:#}", self.code, self.reason(), self.body);
        Ok(self.body)
    }
}

/// One identity at the API server.
#[derive(Clone)]
pub(crate) struct Api(kube::Client);

impl Api {
    /// By a kubeconfig's text.
    pub(crate) async fn new(kubeconfig: &str) -> Result<Self> {
        let file = kube::config::Kubeconfig::from_yaml(kubeconfig)?;
        let mut config =
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await?;
        config.default_retry = false;
        Ok(Self(kube::Client::try_from(config)?))
    }

    pub(crate) fn client(&self) -> kube::Client {
        self.0.clone()
    }

    async fn request(&self, request: Request<Vec<u8>>) -> Result<http::Response<Body>> {
        let sent = self.0.send(request.map(Body::from));
        Ok(tokio::time::timeout(PATIENCE, sent).await.context("no answer")??)
    }

    /// A request with these headers.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Result<Answer> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.request(request.body(body)?).await?;
        let code = response.status().as_u16();
        let bytes =
            tokio::time::timeout(PATIENCE, response.into_body().collect()).await.context("no body")??.to_bytes();
        let body = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        Ok(Answer { code, body })
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Answer> {
        self.ask(Method::GET, path, &[], Vec::new()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        self.ask(Method::POST, path, &[("content-type", "application/json")], serde_json::to_vec(body)?).await
    }

    pub(crate) async fn patch(&self, path: &str, kind: &str, body: &Value) -> Result<Answer> {
        self.ask(Method::PATCH, path, &[("content-type", kind)], serde_json::to_vec(body)?).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<Answer> {
        self.ask(Method::DELETE, path, &[], Vec::new()).await
    }

    /// Deletes at once, whatever grace a pod has, and waits until it is gone.
    pub(crate) async fn delete_now(&self, path: &str) -> Result<()> {
        let options = json!({"gracePeriodSeconds": 0}).to_string().into_bytes();
        self.ask(Method::DELETE, path, &[("content-type", "application/json")], options).await?;
        self.until(path, |answer| (answer.code == 404).then_some(())).await
    }

    /// Asks again and again until the answer is as wanted.
    pub(crate) async fn until<T>(&self, path: &str, is_so: impl Fn(&Answer) -> Option<T>) -> Result<T> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let answer = self.get(path).await?;
            if let Some(found) = is_so(&answer) {
                return Ok(found);
            }
            ensure!(tokio::time::Instant::now() < deadline, "{path} stays {:#}", answer.body);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub(crate) async fn watch(&self, path: &str) -> Result<Watch> {
        self.watch_as(path, "application/json").await
    }

    /// The same, of objects in a form of one's choice.
    pub(crate) async fn watch_as(&self, path: &str, form: &str) -> Result<Watch> {
        let response = self.request(Request::get(path).header("accept", form).body(Vec::new())?).await?;
        let code = response.status();
        ensure!(code == StatusCode::OK, "{path}: {code}");
        Ok(Watch { body: response.into_body(), read: Vec::new() })
    }
}

/// A watch, as the server sends it.
pub(crate) struct Watch {
    body: Body,
    read: Vec<u8>,
}

impl Watch {
    /// The next event; none when the server has ended the watch in order.
    pub(crate) async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.context("the watch is silent")?;
            match frame {
                None => {
                    ensure!(self.read.is_empty(), "the watch ends within an event");
                    return Ok(None);
                }
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.read.extend_from_slice(&data);
                    }
                }
            }
        }
    }

    /// The next event that this is true of.
    pub(crate) async fn until(&mut self, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut seen = Vec::new();
        loop {
            let event = self.next().await?.with_context(|| format!("the watch ends after {seen:#?}"))?;
            if is_so(&event) {
                return Ok(event);
            }
            seen.push(event);
            ensure!(seen.len() < 1000, "nothing of what was waited for in {seen:#?}");
        }
    }
}

/// An identity with rules of its own.
pub(crate) struct Account {
    pub(crate) user: String,
    pub(crate) api: Api,
    pub(crate) kubeconfig: String,
    namespace: String,
    name: String,
    token: String,
}

/// The name of the disruption budget that is made for a pod.
pub(crate) fn budget(pod: &str) -> String {
    format!("{pod}-budget")
}

/// What an account has asked, from our server's audit log: verb and resource, the code of a refusal, and how often.
pub(crate) fn audited(account: &Account) -> Result<BTreeMap<String, usize>> {
    let log = std::fs::read_to_string(real()?.join("logs/audit.log")).context("the audit log")?;
    let mut counts = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains(&account.user)) {
        let Ok(entry) = serde_json::from_str::<Value>(line) else { continue };
        let is_begin = entry["stage"] == if entry["verb"] == "watch" { "ResponseStarted" } else { "ResponseComplete" };
        if entry["user"]["username"] != account.user.as_str() || !is_begin {
            continue;
        }
        let (verb, resource) = (entry["verb"].as_str(), entry["objectRef"]["resource"].as_str());
        let code = entry["responseStatus"]["code"].as_u64().filter(|code| *code >= 300);
        let refused = code.map(|code| format!(", {code}")).unwrap_or_default();
        let what = format!("{} {}{refused}", verb.unwrap_or_default(), resource.unwrap_or_default());
        *counts.entry(what).or_default() += 1;
    }
    Ok(counts)
}

enum Back {
    Real { is_ours: bool },
    StandIn(Box<ApiServer>),
}

/// A cluster with somebody who may do everything.
pub(crate) struct Cluster {
    back: Back,
    pub(crate) url: String,
    /// The authority of its certificate, as a kubeconfig has it.
    ca: String,
    pub(crate) admin: Api,
    pub(crate) admin_kubeconfig: String,
    /// The second number of its version.
    pub(crate) minor: u32,
    /// Distinguishes what is made here from what others have made.
    tag: String,
    made: AtomicU32,
}

impl Cluster {
    /// The stand-in, on its own.
    pub(crate) async fn stand_in(config: ApiServerConfig) -> Result<Self> {
        let server = ApiServer::start(config)?;
        let token = server.add_identity("system:admin", &["system:masters"], Rule::cluster_admin());
        let kubeconfig = server.kubeconfig(&token, "127.0.0.1");
        Self::with(Back::StandIn(Box::new(server)), &kubeconfig).await
    }

    /// The real one.
    pub(crate) async fn real() -> Result<Self> {
        let place = real()?;
        let path = variable("CCNODE_REAL_KUBECONFIG").context("CCNODE_REAL_KUBECONFIG is not set")?;
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Self::with(Back::Real { is_ours: place != Path::new("foreign") }, &text).await
    }

    async fn with(back: Back, kubeconfig: &str) -> Result<Self> {
        static ALL: AtomicU32 = AtomicU32::new(0);
        let admin = Api::new(kubeconfig).await?;
        let file = kube::config::Kubeconfig::from_yaml(kubeconfig)?;
        let cluster = file.clusters.into_iter().find_map(|named| named.cluster).context("no cluster")?;
        let url = cluster.server.context("no server")?;
        let ca = match (cluster.certificate_authority_data, cluster.certificate_authority) {
            (Some(data), _) => data,
            (None, Some(path)) => {
                let data = serde_json::to_value(k8s_openapi::ByteString(std::fs::read(path)?))?;
                data.as_str().unwrap_or_default().to_owned()
            }
            (None, None) => String::new(),
        };
        let version = admin.get("/version").await?.is(200)?;
        let minor = version["minor"].as_str().unwrap_or_default();
        let minor = minor.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().context("the server's version")?;
        let now = jiff::Timestamp::now().as_millisecond() % 1_000_000_000;
        let tag = format!("{}-{now}-{}", std::process::id(), ALL.fetch_add(1, Ordering::Relaxed));
        let admin_kubeconfig = kubeconfig.to_owned();
        Ok(Self { back, url, ca, admin, admin_kubeconfig, minor, tag, made: AtomicU32::new(0) })
    }

    pub(crate) fn is_real(&self) -> bool {
        matches!(self.back, Back::Real { .. })
    }

    /// Whether its keys are at hand, and its parts may be restarted.
    pub(crate) fn is_ours(&self) -> bool {
        !matches!(self.back, Back::Real { is_ours: false })
    }

    /// The stand-in's own handle.
    pub(crate) fn server(&self) -> Option<&ApiServer> {
        match &self.back {
            Back::Real { .. } => None,
            Back::StandIn(server) => Some(server),
        }
    }

    /// A name that nobody else has taken.
    pub(crate) fn fresh(&self, what: &str) -> String {
        format!("{what}-{}-{}", self.tag, self.made.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) async fn namespace(&self) -> Result<String> {
        let name = self.fresh("contract");
        self.admin.post("/api/v1/namespaces", &json!({"metadata": {"name": name}})).await?.is(201)?;
        Ok(name)
    }

    /// A namespace of this name.
    pub(crate) async fn namespace_named(&self, name: &str) -> Result<()> {
        let answer = self.admin.post("/api/v1/namespaces", &json!({"metadata": {"name": name}})).await?;
        ensure!([201, 409].contains(&answer.code), "namespace {name}: {:#}", answer.body);
        Ok(())
    }

    /// A node that no kubelet keeps. Returns its path and its name.
    pub(crate) async fn node(&self, labels: &[(&str, &str)]) -> Result<(String, String)> {
        let name = self.fresh("node");
        let labels: BTreeMap<_, _> = labels.iter().copied().collect();
        self.admin.post("/api/v1/nodes", &json!({"metadata": {"name": name, "labels": labels}})).await?.is(201)?;
        Ok((format!("/api/v1/nodes/{name}"), name))
    }

    fn kubeconfig(&self, user: &Value) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": self.url, "certificate-authority-data": self.ca}}],
            "users": [{"name": "c", "user": user}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        })
        .to_string()
    }

    /// Who sends this token.
    pub(crate) async fn bearer(&self, token: &str) -> Result<Api> {
        Api::new(&self.kubeconfig(&json!({"token": token}))).await
    }

    /// Who sends none.
    pub(crate) async fn anonymous(&self) -> Result<Api> {
        Api::new(&self.kubeconfig(&json!({}))).await
    }

    /// A service account in a namespace, with these rules.
    pub(crate) async fn account(&self, namespace: &str, rules: &[Rule]) -> Result<Account> {
        self.account_named(namespace, &self.fresh("account"), rules).await
    }

    /// The same, by its name.
    pub(crate) async fn account_named(&self, namespace: &str, name: &str, rules: &[Rule]) -> Result<Account> {
        let name = name.to_owned();
        let token = match &self.back {
            Back::StandIn(server) => {
                let user = format!("system:serviceaccount:{namespace}:{name}");
                let groups = ["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")];
                server.add_identity(&user, &groups, rules.to_vec())
            }
            Back::Real { .. } => {
                let accounts = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
                self.admin.post(&accounts, &json!({"metadata": {"name": name}})).await?.is(201)?;
                self.bind(namespace, &name, rules).await?;
                self.token(namespace, &name).await?
            }
        };
        self.known(namespace, name, token).await
    }

    async fn known(&self, namespace: &str, name: String, token: String) -> Result<Account> {
        let user = format!("system:serviceaccount:{namespace}:{name}");
        let kubeconfig = self.kubeconfig(&json!({"token": token}));
        let api = Api::new(&kubeconfig).await?;
        Ok(Account { user, api, kubeconfig, namespace: namespace.to_owned(), name, token })
    }

    /// A token of a service account of the real cluster.
    async fn token(&self, namespace: &str, name: &str) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token");
        let request = json!({"spec": {"audiences": [], "expirationSeconds": 3600}});
        let token = self.admin.post(&path, &request).await?.is(201)?;
        Ok(token["status"]["token"].as_str().context("no token")?.to_owned())
    }

    /// Makes an object as a manifest has it, and its namespace; one that is there already gets the manifest's content.
    pub(crate) async fn apply(&self, manifest: &Value) -> Result<()> {
        let text = |path: &str| manifest.pointer(path).and_then(Value::as_str).unwrap_or_default();
        let (version, kind, name) = (text("/apiVersion"), text("/kind"), text("/metadata/name"));
        let root = if version.contains('/') { "/apis" } else { "/api" };
        let place = match text("/metadata/namespace") {
            "" => String::new(),
            namespace => {
                self.namespace_named(namespace).await?;
                format!("namespaces/{namespace}/")
            }
        };
        let path = format!("{root}/{version}/{place}{}s", kind.to_lowercase());
        let made = self.admin.post(&path, manifest).await?;
        if made.code != 409 {
            return made.is(201).map(drop).with_context(|| format!("{kind} {name}"));
        }
        self.admin.patch(&format!("{path}/{name}"), MERGE, manifest).await?.is(200).map(drop)
    }

    /// The service account of this name, which somebody has made with its rights.
    pub(crate) async fn account_of(&self, namespace: &str, name: &str) -> Result<Account> {
        let token = self.token(namespace, name).await?;
        self.known(namespace, name.to_owned(), token).await
    }

    /// Gives a service account more rules.
    pub(crate) async fn grant(&self, account: &Account, rules: &[Rule]) -> Result<()> {
        self.bind(&account.namespace, &account.name, rules).await
    }

    /// Gives a service account its rules: those of one namespace by a Role, the others by a ClusterRole.
    async fn bind(&self, namespace: &str, name: &str, rules: &[Rule]) -> Result<()> {
        const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
        let role_name = self.fresh("role");
        let mut of_place: BTreeMap<Option<&str>, Vec<Value>> = BTreeMap::new();
        for rule in rules {
            of_place.entry(rule.namespace.as_deref()).or_default().push(json!({
                "apiGroups": rule.api_groups, "resources": rule.resources, "verbs": rule.verbs,
                "resourceNames": rule.resource_names,
            }));
        }
        for (place, rules) in of_place {
            let (path, kind) = match place {
                Some(place) => (format!("{RBAC}/namespaces/{place}/"), "Role"),
                None => (format!("{RBAC}/"), "ClusterRole"),
            };
            let plural = kind.to_lowercase();
            let role = json!({"metadata": {"name": role_name}, "rules": rules});
            self.admin.post(&format!("{path}{plural}s"), &role).await?.is(201)?;
            let binding = json!({
                "metadata": {"name": role_name},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role_name},
                "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
            });
            self.admin.post(&format!("{path}{plural}bindings"), &binding).await?.is(201)?;
        }
        Ok(())
    }

    /// Makes the server forget every version before now: the real one begins with what is there when it starts anew.
    pub(crate) async fn forget(&self) -> Result<()> {
        match &self.back {
            Back::StandIn(server) => server.compact(),
            Back::Real { is_ours: true } => {
                script(&["stop", "apiserver"])?;
                script(&["start", "apiserver"])?;
                self.until_ready().await?;
            }
            Back::Real { .. } => bail!("a foreign cluster is not ours to restart"),
        }
        Ok(())
    }

    /// The group version of evictions and disruption budgets.
    pub(crate) fn policy(&self) -> &'static str {
        if self.minor < 22 { "policy/v1beta1" } else { "policy/v1" }
    }

    /// A disruption budget by which all pods of this label are needed, of which there is one that is ready.
    pub(crate) async fn forbid_disruptions(&self, namespace: &str, app: &str, pod: &str) -> Result<()> {
        if let Some(server) = self.server() {
            server.block_eviction(namespace, pod, None, None);
            return Ok(());
        }
        let place = self.budgets(namespace);
        let path = format!("{place}/{}", budget(pod));
        let budget = json!({
            "metadata": {"name": budget(pod)},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": app}}},
        });
        self.admin.post(&place, &budget).await?.is(201)?;
        // Until the controller has counted the pods, evictions are refused for another reason.
        let is_counted = |found: &Value| {
            found["status"]["observedGeneration"] == found["metadata"]["generation"]
                && found["status"]["currentHealthy"] == 1
        };
        self.admin.until(&path, |answer| is_counted(&answer.body).then_some(())).await
    }

    /// Disruptions of the pod are allowed again.
    pub(crate) async fn allow_disruptions(&self, namespace: &str, pod: &str) -> Result<()> {
        if let Some(server) = self.server() {
            server.allow_evictions();
            return Ok(());
        }
        self.admin.delete_now(&format!("{}/{}", self.budgets(namespace), budget(pod))).await
    }

    fn budgets(&self, namespace: &str) -> String {
        format!("/apis/{}/namespaces/{namespace}/poddisruptionbudgets", self.policy())
    }

    /// Waits until the server is there again.
    pub(crate) async fn until_ready(&self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !self.admin.get("/readyz").await.is_ok_and(|answer| answer.code == 200) {
            ensure!(tokio::time::Instant::now() < deadline, "the API server does not come back");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// The same account, by a token whose time is over.
    pub(crate) async fn expired(&self, account: &Account) -> Result<Api> {
        match &self.back {
            Back::StandIn(server) => {
                let token = server.reissue(&account.token).context("unknown token")?;
                server.expire_token(&token);
                self.bearer(&token).await
            }
            Back::Real { is_ours: true } => {
                let token = script(&["token", &account.namespace, &account.name, "-60"])?;
                self.bearer(&token).await
            }
            Back::Real { .. } => bail!("the key of a foreign cluster is not ours"),
        }
    }

    /// A kubelet's identity and its node.
    pub(crate) async fn kubelet(&self) -> Result<(Api, String)> {
        let (kubeconfig, node) = match &self.back {
            Back::StandIn(server) => {
                let (_, node) = self.node(&[]).await?;
                let token =
                    server.add_identity(&format!("system:node:{node}"), &["system:nodes"], Rule::kubelet(&node));
                (server.kubeconfig(&token, "127.0.0.1"), node)
            }
            Back::Real { is_ours: true } => {
                // Where no kubelet runs, nobody has made its node.
                self.admin.post("/api/v1/nodes", &json!({"metadata": {"name": NODE}})).await?;
                (std::fs::read_to_string(real()?.join("kubelet.kubeconfig"))?, NODE.to_owned())
            }
            Back::Real { .. } => bail!("a foreign cluster's kubelet tells nobody its token"),
        };
        Ok((Api::new(&kubeconfig).await?, node))
    }
}
