//! What a node says, held against what its devices are.
//!
//! The versions of the server put both into one order. Before devices are changed, and after that, the server is asked for its
//! version; every state of the node comes with one. So it is known of each whether the devices were at rest when it was written,
//! and in which mode, however late it is told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_core::state::CcStatus;
use anyhow::{Result, ensure};
use gpu_firmware::Mode;
use http::Method;
use node_object::annotations;
use node_object::labels::{CC_MODE_STATE, CC_READY_STATE};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::agent::parts::{OPERANDS, ready_state};
use crate::real_kube::{Api, PATIENCE};

/// The devices from a moment on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Devices {
    /// They are changed, or in no mode that all of them have booted with.
    Changing,
    /// All are in this mode.
    In(Mode),
    /// The machine has booted anew under this id, with all of them in mode off. Until the agent's first write the node says what
    /// was so in the last boot, and that is nobody's fault.
    Booted(String),
}

/// What a node says with a version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    is_there: bool,
    uid: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

impl Said {
    fn of(node: &Value) -> Self {
        let map = |field: &str| {
            let map = node["metadata"][field].as_object().into_iter().flatten();
            map.map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned())).collect()
        };
        let uid = node["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        Self { is_there: true, uid, labels: map("labels"), annotations: map("annotations") }
    }

    fn label(&self, key: &str) -> &str {
        self.labels.get(key).map(String::as_str).unwrap_or_default()
    }

    /// Whether it says the same as far as agents write it.
    fn is_as(&self, other: &Self) -> bool {
        let ours = [CC_MODE_STATE, CC_READY_STATE].into_iter().chain(OPERANDS.iter().map(|(label, _)| *label));
        let noted = [annotations::TRANSITION, annotations::CC_STATUS];
        ours.into_iter().all(|label| self.labels.get(label) == other.labels.get(label))
            && noted.iter().all(|key| self.annotations.get(*key) == other.annotations.get(*key))
    }
}

/// Judges states of a node in the order of their versions.
#[derive(Debug)]
struct Judge {
    devices: Devices,
    boot: String,
    /// Whether the agent has written in this boot.
    is_this_boot: bool,
    before: Said,
    looks: usize,
    lies: Vec<String>,
}

impl Judge {
    fn new() -> Self {
        Self {
            devices: Devices::Changing,
            boot: String::new(),
            is_this_boot: false,
            before: Said::default(),
            looks: 0,
            lies: Vec::new(),
        }
    }

    fn sees_devices(&mut self, devices: &Devices) {
        self.devices = match devices {
            Devices::Booted(boot) => {
                boot.clone_into(&mut self.boot);
                self.is_this_boot = false;
                Devices::In(Mode::Off)
            }
            other => other.clone(),
        };
    }

    fn hears(&mut self, said: &Said) {
        let before = std::mem::replace(&mut self.before, said.clone());
        if !said.is_there {
            return;
        }
        let (state, ready) = (said.label(CC_MODE_STATE), said.label(CC_READY_STATE));
        if !self.is_this_boot {
            // Whoever makes a node is not the agent.
            if !before.is_there || before.is_as(said) {
                return;
            }
            self.is_this_boot = true;
            if !ready.is_empty() {
                self.lies.push(format!("the first write in a boot makes {CC_READY_STATE} {ready:?}"));
            }
        }
        self.looks += 1;
        let named = state.parse::<Mode>().ok();
        let is_true = |mode: Option<Mode>| mode.is_some_and(|mode| self.devices == Devices::In(mode));
        if !ready.is_empty() && !is_true(named.filter(|mode| ready_state(*mode) == ready)) {
            self.lies.push(format!("state {state:?} and ready {ready:?} while the devices are {:?}", self.devices));
        }
        // A status of this node and boot, with nothing under way: of a mode without a gate it alone speaks.
        let status = said.annotations.get(annotations::CC_STATUS);
        let status = status.and_then(|text| serde_json::from_str::<CcStatus>(text).ok());
        let Some(status) = status.filter(|status| status.node_uid == said.uid && status.boot_id == self.boot) else {
            return;
        };
        if status.result == "applied" && !said.annotations.contains_key(annotations::TRANSITION) {
            let wanted = status.wanted.parse::<Mode>().ok();
            if !is_true(wanted) || named != wanted || wanted.map(ready_state) != Some(ready) {
                let told = format!("{} applied, state {state:?} and ready {ready:?}", status.wanted);
                self.lies.push(format!("{told} while the devices are {:?}", self.devices));
            }
        }
    }
}

/// Where the versions are of what has been noted, and not been judged.
#[derive(Debug, Default)]
struct Noted {
    said: Vec<(u64, Said)>,
    devices: Vec<(u64, Devices)>,
}

/// What was told last.
#[derive(Clone, Debug, Default)]
struct Latest {
    version: u64,
    node: Arc<Value>,
}

#[derive(Debug)]
struct Shared {
    noted: Mutex<Noted>,
    judge: Mutex<Judge>,
    latest: watch::Sender<Latest>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Watches a node from the server itself.
pub(crate) struct Truth {
    witness: Witness,
    task: JoinHandle<()>,
}

/// Whoever notes what is so.
#[derive(Clone)]
pub(crate) struct Witness {
    api: Api,
    path: String,
    shared: Arc<Shared>,
}

const LIST: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1, application/json";
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json";

fn version_of(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().and_then(|text| text.parse().ok()).unwrap_or(0)
}

impl Truth {
    /// From now on; the machine has booted under this id, and its devices are off.
    pub(crate) async fn watch(api: &Api, node: &str, boot: &str) -> Result<Self> {
        let shared = Shared {
            noted: Mutex::default(),
            judge: Mutex::new(Judge::new()),
            latest: watch::Sender::new(Latest::default()),
        };
        let path = format!("/api/v1/nodes?fieldSelector=metadata.name%3D{node}");
        let witness = Witness { api: api.clone(), path, shared: Arc::new(shared) };
        let (_, node) = witness.asked().await?;
        witness.shared.hears(version_of(&node), node);
        witness.booted(boot).await?;
        let watches = witness.clone();
        Ok(Self { witness, task: tokio::spawn(async move { watches.follow().await }) })
    }

    pub(crate) fn witness(&self) -> Witness {
        self.witness.clone()
    }

    /// Waits until the node is told in a state of which this is true, and that is not older than a version.
    pub(crate) async fn until(&self, version: u64, is_so: impl Fn(&Value) -> bool) -> Result<Arc<Value>> {
        let mut latest = self.witness.shared.latest.subscribe();
        let reached = latest.wait_for(|latest| latest.version >= version && is_so(&latest.node));
        if let Ok(latest) = tokio::time::timeout(PATIENCE, reached).await {
            return Ok(Arc::clone(&latest?.node));
        }
        let Latest { version: told, node } = self.witness.shared.latest.borrow().clone();
        anyhow::bail!("told until version {told}, of {version} or later: {:#}", node["metadata"])
    }

    /// Judges everything that has been said until now; what was wrong.
    pub(crate) async fn verdict(&self) -> Result<()> {
        let (_, node) = self.witness.asked().await?;
        self.until(version_of(&node), |_| true).await?;
        self.witness.shared.judge()
    }

    /// The version that was told last.
    pub(crate) fn version(&self) -> u64 {
        self.witness.shared.latest.borrow().version
    }

    /// How many states of the node have been judged.
    pub(crate) fn looks(&self) -> usize {
        lock(&self.witness.shared.judge).looks
    }
}

impl Drop for Truth {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Witness {
    /// The server's version now, and the node, or null. A list without a version is of what etcd has at this moment.
    async fn asked(&self) -> Result<(u64, Value)> {
        let list = self.api.ask(Method::GET, &self.path, &[("accept", LIST)], Vec::new()).await?.is(200)?;
        Ok((version_of(&list), list["items"][0].clone()))
    }

    async fn note(&self, devices: Devices) -> Result<Value> {
        let (version, node) = self.asked().await?;
        ensure!(version > 0, "the list has no version");
        lock(&self.shared.noted).devices.push((version, devices));
        Ok(node)
    }

    /// The machine boots anew, with its devices in mode off.
    pub(crate) async fn booted(&self, boot: &str) -> Result<()> {
        self.note(Devices::Booted(boot.to_owned())).await.map(drop)
    }

    /// Devices begin to be changed in this moment: nobody may take the node for ready.
    pub(crate) async fn begin(&self) -> Result<()> {
        let node = self.note(Devices::Changing).await?;
        let ready = &node["metadata"]["labels"][CC_READY_STATE];
        ensure!(ready.is_null() || ready == "", "{CC_READY_STATE} is {ready} when devices begin to be changed");
        Ok(())
    }

    /// That is over, and all of them have booted with this mode.
    pub(crate) async fn end(&self, mode: Option<Mode>) -> Result<()> {
        self.note(mode.map_or(Devices::Changing, Devices::In)).await.map(drop)
    }

    /// Hears every state of the node, for ever.
    async fn follow(&self) {
        let mut version = self.shared.latest.borrow().version;
        loop {
            if self.watched(&mut version).await.is_err() {
                // A server that is away, or has forgotten the version: what is there now is a state, too.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                if let Ok((now, node)) = self.asked().await {
                    self.shared.hears(if node.is_null() { now } else { version_of(&node) }, node);
                    version = now;
                }
            }
        }
    }

    async fn watched(&self, version: &mut u64) -> Result<()> {
        let path = format!("{}&watch=true&resourceVersion={version}", self.path);
        let mut watch = self.api.watch_as(&path, METADATA).await?;
        while let Some(mut event) = watch.next().await? {
            ensure!(event["type"] != "ERROR", "{event:#}");
            *version = version_of(&event["object"]);
            let is_gone = event["type"] == "DELETED";
            self.shared.hears(*version, if is_gone { Value::Null } else { event["object"].take() });
        }
        Ok(())
    }
}

impl Shared {
    fn hears(&self, version: u64, node: Value) {
        let is_new = self.latest.borrow().version < version;
        if is_new {
            let said = if node.is_null() { Said::default() } else { Said::of(&node) };
            lock(&self.noted).said.push((version, said));
            self.latest.send_replace(Latest { version, node: Arc::new(node) });
        }
    }

    /// Judges what was noted, in the order of the versions. Devices were so before a state of the same version was not: that
    /// state is what was there when the version was asked for.
    fn judge(&self) -> Result<()> {
        let Noted { said, devices } = std::mem::take(&mut *lock(&self.noted));
        let (mut judge, mut devices) = (lock(&self.judge), devices.into_iter().peekable());
        for (version, said) in said {
            while let Some((_, devices)) = devices.next_if(|(noted, _)| *noted < version) {
                judge.sees_devices(&devices);
            }
            judge.hears(&said);
        }
        devices.for_each(|(_, devices)| judge.sees_devices(&devices));
        let lies = std::mem::take(&mut judge.lies);
        ensure!(lies.is_empty(), "lies: {lies:#?}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const BOOT: &str = "boot-1";

    fn node(state: &str, ready: &str, status: Option<&str>, is_under_way: bool) -> Said {
        let mut node = json!({"metadata": {"uid": "u", "labels": {CC_MODE_STATE: state, CC_READY_STATE: ready}, "annotations": {}}});
        if let Some(wanted) = status {
            let status = json!({"schema": 1, "nodeUid": "u", "bootId": BOOT, "wanted": wanted, "result": "applied"});
            node["metadata"]["annotations"][annotations::CC_STATUS] = status.to_string().into();
        }
        if is_under_way {
            node["metadata"]["annotations"][annotations::TRANSITION] = "{}".into();
        }
        Said::of(&node)
    }

    /// What is told of this state of a node, whose agent has written before in this boot, with these devices.
    fn lies(devices: &Devices, said: &Said) -> usize {
        let mut judge = Judge::new();
        judge.sees_devices(&Devices::Booted(BOOT.to_owned()));
        judge.hears(&node("", "", None, false));
        judge.hears(&node("off", "", None, false));
        judge.sees_devices(devices);
        judge.hears(said);
        judge.lies.len()
    }

    #[test]
    fn what_is_not_so_is_a_lie() {
        use Devices::{Changing, In};
        for (devices, said, is_true) in [
            (In(Mode::On), node("on", "true", Some("on"), false), true),
            (In(Mode::Off), node("off", "false", None, false), true),
            (In(Mode::Devtools), node("devtools", "", Some("devtools"), false), true),
            (In(Mode::Off), node("off", "", Some("off"), true), true),
            (Changing, node("on", "", Some("on"), true), true),
            (Changing, node("failed", "", None, false), true),
            (Changing, node("on", "true", None, false), false),
            (Changing, node("off", "false", None, true), false),
            (In(Mode::Off), node("on", "true", None, false), false),
            (In(Mode::Off), node("on", "false", None, false), false),
            (In(Mode::On), node("on", "false", None, false), false),
            (In(Mode::Devtools), node("devtools", "true", None, false), false),
            (In(Mode::Off), node("devtools", "", Some("devtools"), false), false),
            (In(Mode::On), node("off", "", Some("on"), false), false),
        ] {
            assert_eq!(lies(&devices, &said) == 0, is_true, "{devices:?}, {said:?}");
        }
    }

    #[test]
    fn what_the_last_boot_has_left_is_nobodys_lie_until_the_first_write_which_shuts_the_gate() {
        let left = node("on", "true", None, false);
        for (first, lies) in [(node("on", "", None, false), 0), (node("off", "false", None, false), 1)] {
            let mut judge = Judge::new();
            judge.hears(&left);
            judge.sees_devices(&Devices::Booted(BOOT.to_owned()));
            judge.hears(&left);
            // Somebody deletes it, and makes it again.
            judge.hears(&Said::default());
            judge.hears(&left);
            assert_eq!((judge.lies.len(), judge.looks), (0, 0));
            judge.hears(&first);
            assert_eq!((judge.lies.len(), judge.looks), (lies, 1), "{first:?}");
        }
    }
}
