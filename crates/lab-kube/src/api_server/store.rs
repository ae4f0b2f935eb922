//! The objects, their versions, the events for watches, and everything a scenario can look at.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use serde_json::{Value, json};

use super::auth::User;
use super::faults::{FaultId, Faults};
use super::resources::ResourceType;

/// Storage, namespace (empty for cluster-wide objects) and name.
pub(crate) type Key = (&'static str, String, String);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChangeKind {
    Added,
    Modified,
    Deleted,
}

/// One write, as watches see it.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) version: u64,
    pub(crate) key: Key,
    pub(crate) kind: ChangeKind,
    pub(crate) object: Arc<Value>,
    pub(crate) previous: Option<Arc<Value>>,
}

/// One state of a node's metadata, in the order of writes.
#[derive(Debug, Clone, PartialEq)]
pub struct HistoryEntry {
    /// The resourceVersion of the write.
    pub resource_version: u64,
    /// When it was written.
    pub time: SystemTime,
    /// The same, on the monotonic clock.
    pub at: Instant,
    /// Who wrote it.
    pub user: String,
    /// The node's UID.
    pub uid: String,
    /// The labels after the write.
    pub labels: BTreeMap<String, String>,
    /// The annotations after the write.
    pub annotations: BTreeMap<String, String>,
    /// This write deleted the node.
    pub deleted: bool,
}

/// One request and how it ended.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestRecord {
    /// When it came in.
    pub time: SystemTime,
    /// The user of its token; `system:anonymous` without one, empty if the token was refused.
    pub user: String,
    /// The `User-Agent` header.
    pub user_agent: String,
    /// The HTTP method.
    pub method: String,
    /// The path as sent.
    pub path: String,
    /// The query as sent.
    pub query: String,
    /// The API verb, as RBAC names it.
    pub verb: String,
    /// The API group, empty for core.
    pub group: String,
    /// The resource with its subresource, such as `nodes/status`; empty if the path names none.
    pub resource: String,
    /// The namespace, if any.
    pub namespace: String,
    /// The object's name, if any.
    pub name: String,
    /// The `Accept` header.
    pub accept: String,
    /// The `Content-Type` header.
    pub content_type: String,
    /// The HTTP code of the answer; 0 if the connection was cut instead.
    pub code: u16,
    /// The request's body: JSON, or text if it was none, or null if there was none.
    pub body: Value,
}

/// A watch that is open.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpenWatch {
    /// Whose it is.
    pub user: String,
    /// The resource.
    pub resource: String,
    /// Whether it is told of the objects' metadata alone.
    pub metadata_only: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) user: Arc<User>,
    pub(crate) expired: bool,
}

/// A disruption budget that a scenario has set.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) name: String,
    pub(crate) retry_after: Option<u32>,
    pub(crate) refusals: Option<usize>,
}

/// A pod that an imaginary kubelet will end.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    pub(crate) due: Instant,
    pub(crate) key: Key,
    pub(crate) uid: String,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) version: u64,
    /// Watches from before this version get 410.
    pub(crate) compacted: u64,
    pub(crate) window: usize,
    pub(crate) objects: BTreeMap<Key, Arc<Value>>,
    pub(crate) changes: VecDeque<Change>,
    pub(crate) history: BTreeMap<String, Vec<HistoryEntry>>,
    pub(crate) requests: Vec<RequestRecord>,
    /// By a number of their own.
    pub(crate) watches: BTreeMap<u64, OpenWatch>,
    pub(crate) next_watch: u64,
    pub(crate) tokens: HashMap<String, Token>,
    pub(crate) faults: Faults,
    pub(crate) budgets: Vec<Budget>,
    pub(crate) endings: Vec<Ending>,
    pub(crate) pods_end_after: Option<std::time::Duration>,
    /// Requests that wait to be released.
    pub(crate) held: usize,
    /// Connections that are open.
    pub(crate) connections: usize,
    pub(crate) on_node_write: Option<OnNodeWrite>,
}

/// Called with every new state of a node.
pub(crate) struct OnNodeWrite(pub(crate) Box<dyn FnMut(&HistoryEntry) + Send>);

impl std::fmt::Debug for OnNodeWrite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnNodeWrite")
    }
}

/// A random number; the seed of a new hasher is one.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

pub(crate) fn new_uid() -> String {
    let (a, b) = (random(), random());
    format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        a >> 32,
        (a >> 16) & 0xffff,
        a & 0xfff,
        0x8000 | ((b >> 48) & 0x3fff),
        b & 0xffff_ffff_ffff
    )
}

/// The suffix of `generateName`, from the real server's alphabet.
pub(crate) fn name_suffix() -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut left = random();
    (0..5)
        .map(|_| {
            let at = usize::try_from(left % ALPHABET.len() as u64).unwrap_or(0);
            left /= ALPHABET.len() as u64;
            char::from(ALPHABET[at])
        })
        .collect()
}

/// A time as the API writes it, to the second.
pub(crate) fn timestamp(plus_seconds: i64) -> String {
    let second = jiff::Timestamp::now().as_second().saturating_add(plus_seconds);
    jiff::Timestamp::from_second(second).map_or_else(|_| String::new(), |time| time.to_string())
}

fn text_map(value: &Value) -> BTreeMap<String, String> {
    value
        .as_object()
        .map(|map| map.iter().map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect())
        .unwrap_or_default()
}

impl State {
    /// Counts a watch as open, and says under which number.
    pub(crate) fn opened(&mut self, watch: OpenWatch) -> u64 {
        self.next_watch += 1;
        self.watches.insert(self.next_watch, watch);
        self.next_watch
    }

    pub(crate) fn new(window: usize, pods_end_after: Option<std::time::Duration>) -> Self {
        let mut state = Self {
            version: 1000,
            compacted: 1000,
            window: window.max(1),
            objects: BTreeMap::new(),
            changes: VecDeque::new(),
            history: BTreeMap::new(),
            requests: Vec::new(),
            watches: BTreeMap::new(),
            next_watch: 0,
            tokens: HashMap::new(),
            faults: Faults::default(),
            budgets: Vec::new(),
            endings: Vec::new(),
            pods_end_after,
            held: 0,
            connections: 0,
            on_node_write: None,
        };
        for name in ["default", "kube-node-lease", "kube-public", "kube-system"] {
            let namespace = json!({
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {
                    "name": name,
                    "uid": new_uid(),
                    "creationTimestamp": timestamp(0),
                    "labels": {"kubernetes.io/metadata.name": name},
                },
                "spec": {"finalizers": ["kubernetes"]},
                "status": {"phase": "Active"},
            });
            state.commit(("namespaces", String::new(), name.to_owned()), Some(namespace), "system:apiserver");
        }
        state.compacted = state.version;
        state
    }

    pub(crate) fn get(&self, rt: &ResourceType, namespace: &str, name: &str) -> Option<&Arc<Value>> {
        self.objects.get(&(rt.storage, namespace.to_owned(), name.to_owned()))
    }

    /// Writes (or with None deletes) an object under a new version and tells the watches.
    pub(crate) fn commit(&mut self, key: Key, object: Option<Value>, user: &str) -> Arc<Value> {
        self.version += 1;
        let previous = self.objects.get(&key).cloned();
        let kind = match (&object, &previous) {
            (None, _) => ChangeKind::Deleted,
            (Some(_), None) => ChangeKind::Added,
            (Some(_), Some(_)) => ChangeKind::Modified,
        };
        let mut value = object.unwrap_or_else(|| previous.as_deref().cloned().unwrap_or_default());
        value["metadata"]["resourceVersion"] = self.version.to_string().into();
        let value = Arc::new(value);
        if kind == ChangeKind::Deleted {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key.clone(), Arc::clone(&value));
        }
        if key.0 == "nodes" {
            let meta = &value["metadata"];
            let entry = HistoryEntry {
                resource_version: self.version,
                time: SystemTime::now(),
                at: Instant::now(),
                user: user.to_owned(),
                uid: meta["uid"].as_str().unwrap_or_default().to_owned(),
                labels: text_map(&meta["labels"]),
                annotations: text_map(&meta["annotations"]),
                deleted: kind == ChangeKind::Deleted,
            };
            if let Some(OnNodeWrite(look)) = &mut self.on_node_write {
                look(&entry);
            }
            self.history.entry(key.2.clone()).or_default().push(entry);
        }
        self.changes.push_back(Change { version: self.version, key, kind, object: Arc::clone(&value), previous });
        while self.changes.len() > self.window {
            if let Some(gone) = self.changes.pop_front() {
                self.compacted = self.compacted.max(gone.version);
            }
        }
        value
    }

    /// The objects as they were at a version; None once that is compacted away.
    pub(crate) fn at_version(&self, version: u64) -> Option<BTreeMap<Key, Arc<Value>>> {
        if version < self.compacted {
            return None;
        }
        let mut objects = self.objects.clone();
        for change in self.changes.iter().rev().take_while(|change| change.version > version) {
            match &change.previous {
                Some(previous) => objects.insert(change.key.clone(), Arc::clone(previous)),
                None => objects.remove(&change.key),
            };
        }
        Some(objects)
    }
}

/// What a scenario sees of the server at one moment; nothing changes while it looks.
#[derive(Debug, Clone, Copy)]
pub struct View<'a>(pub(crate) &'a State);

impl<'a> View<'a> {
    /// One object by plural resource name, in the core group's form; `namespace` is empty for nodes.
    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<&'a Value> {
        let rt = ResourceType::stored(resource)?;
        self.0.get(rt, namespace, name).map(AsRef::as_ref)
    }

    /// All objects of a resource, ordered by namespace and name.
    pub fn list(&self, resource: &str) -> Vec<&'a Value> {
        self.0.objects.iter().filter(|((storage, ..), _)| *storage == resource).map(|(_, o)| o.as_ref()).collect()
    }

    /// A node's label.
    pub fn label(&self, node: &str, key: &str) -> Option<&'a str> {
        self.get("nodes", "", node)?["metadata"]["labels"][key].as_str()
    }

    /// A node's annotation.
    pub fn annotation(&self, node: &str, key: &str) -> Option<&'a str> {
        self.get("nodes", "", node)?["metadata"]["annotations"][key].as_str()
    }

    /// A node's labels; empty if there is no such node.
    pub fn labels(&self, node: &str) -> BTreeMap<String, String> {
        self.get("nodes", "", node).map(|object| text_map(&object["metadata"]["labels"])).unwrap_or_default()
    }

    /// A node's annotations; empty if there is no such node.
    pub fn annotations(&self, node: &str) -> BTreeMap<String, String> {
        self.get("nodes", "", node).map(|object| text_map(&object["metadata"]["annotations"])).unwrap_or_default()
    }

    /// Every state the node's labels and annotations have had, oldest first.
    pub fn history(&self, node: &str) -> &'a [HistoryEntry] {
        self.0.history.get(node).map_or(&[], Vec::as_slice)
    }

    /// Every answered request, in the order of answers. A watch is recorded when it begins.
    pub fn requests(&self) -> &'a [RequestRecord] {
        &self.0.requests
    }

    /// The watches that are open now, in the order of their opening. One that its client has closed is told as soon as the
    /// connection says so.
    pub fn open_watches(&self) -> Vec<&'a OpenWatch> {
        self.0.watches.values().collect()
    }

    /// How often a fault has struck.
    pub fn fault_hits(&self, id: FaultId) -> usize {
        self.0.faults.hits(id)
    }

    /// How many connections are open. Of a client that has none, no request is under way any more.
    pub fn connections(&self) -> usize {
        self.0.connections
    }

    /// How many requests wait to be released.
    pub fn held(&self) -> usize {
        self.0.held
    }

    /// The version of the last write.
    pub fn resource_version(&self) -> u64 {
        self.0.version
    }
}
