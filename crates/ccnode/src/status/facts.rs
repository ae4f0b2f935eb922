//! What `ccnode status` goes by: files of the host, processes, and the node object. Nothing is opened, woken or reset.

use std::path::Path;
use std::sync::Arc;

use agent_core::hostfile::HostDir;
use agent_core::state::{BindingsFile, CcStatus, DevicesFile, HolderRecord, SCHEMA, StateError, state_dir};
use agent_core::text::chain;
use hw_probe::{Bdf, Holders, Inventory, PciFunction, SysRoot};
use jiff::Timestamp;
use node_object::{NodeState, annotations};
use serde::Deserialize;

use super::units::Units;
use crate::agents::{self, Agent};
use crate::cluster::{self, ClusterArgs, Named};

/// All that is known.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) now: Timestamp,
    /// This machine; none where the node object may be another's.
    pub(super) host: Option<Host>,
    /// Name of the node object, where something tells it.
    pub(super) name: Option<String>,
    pub(super) node: Answer,
    /// What is to be told of the sources.
    pub(super) remarks: Vec<String>,
}

/// What files and processes say.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) boot_id: Option<String>,
    /// Every GPU and NVSwitch, by address.
    pub(super) parts: Vec<PciFunction>,
    /// Why there may be more.
    pub(super) blind: Option<String>,
    pub(super) records: Records,
    pub(super) bindings: Option<BindingsFile>,
    pub(super) holders: Holders,
    pub(super) manager: Manager,
    /// What the kubelet is told.
    pub(super) units: Units,
    /// Whether a device plugin runs.
    pub(super) plugin: Manager,
}

/// `devices.json` of this boot.
#[derive(Clone, Debug)]
pub(super) enum Records {
    Read(DevicesFile),
    Absent,
    Unreadable(String),
}

/// Whether an agent runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Manager {
    Runs(Agent),
    /// All processes are seen, and it is none of them.
    Gone,
    /// Not every process is seen.
    NotSeen,
}

impl Manager {
    /// Looks for an agent under these names.
    fn find(root: &Path, names: &[&str]) -> Self {
        match agents::running(root, names) {
            Some(agent) => Self::Runs(agent),
            None if agents::sees_all(root) => Self::Gone,
            None => Self::NotSeen,
        }
    }

    /// What documents call it.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Runs(_) => "runs",
            Self::Gone => "gone",
            Self::NotSeen => "not-seen",
        }
    }
}

/// What became of asking the API server.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    NotAsked(String),
    Failed(String),
    Node(Box<NodeFacts>),
}

/// The node object.
#[derive(Clone, Debug)]
pub(super) struct NodeFacts {
    pub(super) state: Arc<NodeState>,
    /// What cc-manager says of the node; none when it has said nothing.
    pub(super) status: Result<Option<CcStatus>, String>,
    pub(super) transition: Result<Option<Journal>, String>,
}

/// The part of `ccnode.dev/transition` that matters here.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Journal {
    #[serde(default)]
    node_uid: String,
    #[serde(default)]
    pub(super) boot_id: String,
    pub(super) target: String,
    pub(super) started_at: Timestamp,
}

impl Facts {
    /// Reads all; the API server is waited for 5 seconds at most.
    pub(super) fn read(root: &SysRoot, cluster: &ClusterArgs, remote: bool) -> anyhow::Result<Self> {
        let ClusterArgs { node: asked, kubeconfig, offline } = cluster;
        let path = root.join("");
        let named = Named::of(&path, asked.as_deref());
        let node = match &named.name {
            _ if *offline => Answer::NotAsked("it was not asked (--offline)".to_owned()),
            None => Answer::NotAsked("nothing tells this node's name; give --node".to_owned()),
            Some(name) => cluster::runtime()?.block_on(ask(name, kubeconfig.as_deref())),
        };
        let mut facts = Self { now: Timestamp::now(), host: None, name: named.name, node, remarks: Vec::new() };
        if !remote {
            let host = Host::read(&path, root);
            // Two machines are never mixed: a name that is not known here needs the boot id for its proof.
            if named.is_ours || *offline || facts.is_of(&host) {
                facts.host = Some(host);
            } else {
                let name = facts.name.as_deref().unwrap_or_default();
                facts.remarks.push(format!(
                    "Nothing here says that this machine is node {name}: the node object alone was looked at"
                ));
            }
        }
        match &facts.node {
            Answer::NotAsked(why) | Answer::Failed(why) if facts.host.is_some() => {
                facts.remarks.push(format!("By the host's files alone, so that the wanted mode is not known: {why}"));
            }
            _ => {}
        }
        Ok(facts)
    }

    /// Whether the node object speaks of the boot that this machine is in.
    fn is_of(&self, host: &Host) -> bool {
        self.node().is_some_and(|node| says_boot(&node.state, host.boot_id.as_deref()))
    }

    /// The node object.
    pub(super) fn node(&self) -> Option<&NodeFacts> {
        if let Answer::Node(node) = &self.node { Some(node) } else { None }
    }

    /// What cc-manager says on the node object, of whatever boot.
    pub(super) fn status(&self) -> Option<&CcStatus> {
        self.node()?.status.as_ref().ok()?.as_ref()
    }

    /// The same, if it is of this boot as far as that can be told.
    pub(super) fn current_status(&self) -> Option<&CcStatus> {
        let status = self.status()?;
        let is_current = self.host.as_ref().is_none_or(|host| host.boot_id.as_ref() == Some(&status.boot_id));
        is_current.then_some(status)
    }
}

async fn ask(name: &str, kubeconfig: Option<&Path>) -> Answer {
    let asked = async { cluster::client(name, kubeconfig).await?.get().await };
    match tokio::time::timeout(cluster::PATIENCE, asked).await {
        Ok(Ok(state)) => Answer::Node(Box::new(NodeFacts::of(state))),
        Ok(Err(error)) => Answer::Failed(error.line()),
        Err(_) => Answer::Failed(format!("no answer within {} s", cluster::PATIENCE.as_secs())),
    }
}

impl NodeFacts {
    pub(super) fn of(state: Arc<NodeState>) -> Self {
        let status = parse::<CcStatus>(&state, annotations::CC_STATUS).and_then(|status| match status {
            Some(status) if status.schema.abs_diff(SCHEMA) > 1 => Err(format!(
                "Annotation {} has schema {}, which this version does not know",
                annotations::CC_STATUS,
                status.schema
            )),
            // That of another node under the same name says nothing.
            status => Ok(status.filter(|status| status.node_uid.is_empty() || status.node_uid == state.uid)),
        });
        let transition = parse::<Journal>(&state, annotations::TRANSITION)
            .map(|journal| journal.filter(|journal| journal.node_uid.is_empty() || journal.node_uid == state.uid));
        Self { state, status, transition }
    }
}

/// Whether a node object speaks of this boot: then it is the one of this machine.
pub(crate) fn says_boot(state: &NodeState, boot_id: Option<&str>) -> bool {
    let status = parse::<CcStatus>(state, annotations::CC_STATUS).ok().flatten();
    status.is_some_and(|status| !status.boot_id.is_empty() && Some(&*status.boot_id) == boot_id)
}

fn parse<T: for<'a> Deserialize<'a>>(state: &NodeState, name: &str) -> Result<Option<T>, String> {
    let cannot = |error| format!("Annotation {name} cannot be understood: {error}");
    state.annotation(name).map(|text| serde_json::from_str(text).map_err(cannot)).transpose()
}

impl Host {
    pub(super) fn read(path: &Path, root: &SysRoot) -> Self {
        let inventory = Inventory::scan(root);
        let mut parts: Vec<PciFunction> = inventory.gpus().chain(inventory.nvswitches()).cloned().collect();
        parts.sort_by_key(|function| function.bdf);
        let boot_id = inventory.host.boot_id.clone();
        let records = match load(path, boot_id.as_deref(), DevicesFile::load) {
            Ok(Some(file)) => Records::Read(file),
            Ok(None) => Records::Absent,
            Err(why) => Records::Unreadable(why),
        };
        Self {
            parts,
            blind: inventory.doubts().next().map(|problem| format!("{}: {}", problem.path, problem.message)),
            records,
            // Without it nothing but the former drivers is unknown.
            bindings: load(path, boot_id.as_deref(), BindingsFile::load).ok().flatten(),
            holders: hw_probe::holders(root),
            manager: Manager::find(path, agents::CC_MANAGER),
            units: Units::read(path, boot_id.as_deref()),
            plugin: Manager::find(path, agents::DEVICE_PLUGIN),
            boot_id,
        }
    }

    /// The records of this boot.
    pub(super) fn file(&self) -> Option<&DevicesFile> {
        if let Records::Read(file) = &self.records { Some(file) } else { None }
    }

    /// The processes that are seen to hold VFIO's nodes of a device.
    pub(super) fn holders_of(&self, function: &PciFunction) -> Vec<HolderRecord> {
        let group = function.iommu_group.map(|group| format!("/dev/vfio/{group}"));
        let cdev = function.vfio_cdev.as_ref().map(|cdev| format!("/dev/vfio/devices/{}", cdev.name));
        let is_its = |node: &String| Some(node) == group.as_ref() || Some(node) == cdev.as_ref();
        let its = self.holders.list.iter().filter(|holder| is_its(&holder.node));
        let mut its: Vec<HolderRecord> = its
            .map(|holder| HolderRecord {
                bdf: function.bdf,
                pid: holder.pid,
                comm: Some(holder.comm.clone()),
                pod: holder.pod_uid.as_ref().map(|uid| format!("pod {uid}")),
            })
            .collect();
        its.sort_unstable();
        its.dedup();
        its
    }

    /// Devices that were verified in this boot and are not there any more.
    pub(super) fn gone(&self) -> Vec<Bdf> {
        let records = self.file().map(|file| file.devices.as_slice()).unwrap_or_default();
        let is_there = |bdf: Bdf| self.parts.iter().any(|part| part.bdf == bdf);
        records.iter().map(|record| record.bdf).filter(|bdf| !is_there(*bdf)).collect()
    }
}

fn load<T>(
    root: &Path,
    boot_id: Option<&str>,
    load: impl Fn(&HostDir, &str) -> Result<Option<T>, StateError>,
) -> Result<Option<T>, String> {
    let Some(boot_id) = boot_id else { return Err("The kernel's boot id cannot be read".to_owned()) };
    match HostDir::open_existing(state_dir(root)) {
        Ok(Some(dir)) => load(&dir, boot_id).map_err(|error| chain(&error)),
        Ok(None) => Ok(None),
        Err(error) => Err(chain(&error)),
    }
}
