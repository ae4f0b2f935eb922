//! Where a command looks: at the running machine, at a tree of files, or at a bundle of another node.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use hw_probe::acs::Acs;
use hw_probe::record::{Entry, Recording};
use hw_probe::{Bdf, Fault, Holders, LockdownFinding, Problem, SysRoot};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::archive;
use crate::bundle::{LIVE, MANIFEST, Manifest, TREE};
use crate::checks::Exchanged;
use crate::node::NodeFiles;
use crate::pod_resources::Get;
use crate::report::{Ask, Report};

/// What only the node itself could tell: answers of processes and of the kernel that no file of the tree holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Live {
    /// Lockdown, which may have been inferred from an attempt.
    pub lockdown: LockdownFinding,
    /// Who held device nodes.
    pub holders: Holders,
    /// What the files of kubelet, CDI, containerd and Kata said.
    pub node: NodeFiles,
    /// Whether these files were to be seen at all.
    pub has_node_files: bool,
    /// What the kubelet answered.
    pub get: Get,
    /// What could not be read.
    pub problems: Vec<Problem>,
    /// Functions whose configuration space could not be read, and why.
    pub config_unreadable: BTreeMap<Bdf, String>,
    /// What the agents had written for each other; older bundles do not tell.
    #[serde(default)]
    pub exchanged: Option<Exchanged>,
}

/// What `--root` names.
#[derive(Debug)]
pub struct Source {
    root: SysRoot,
    live: Option<Live>,
    /// Holds the tree of a bundle.
    _folder: Option<TempDir>,
}

impl Source {
    /// Opens the root directory of a node or of a recorded tree, or a bundle, which is unpacked into a folder of its own.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        if path.is_file() {
            return Self::unpack(path);
        }
        ensure!(
            path.join("sys").is_dir(),
            "{}: There is no directory sys in it; --root takes the root directory of a node or of a recorded tree, or a bundle",
            path.display()
        );
        Ok(Self { root: SysRoot::at(path), live: None, _folder: None })
    }

    fn unpack(path: &Path) -> anyhow::Result<Self> {
        let unusable = || format!("{}: Is not a bundle that can be used", path.display());
        let mut entries = archive::read(path)?;
        let mut file = |name: &str| match entries.remove(name) {
            Some(Entry::File(content)) => Ok(content),
            _ => bail!("It has no file {name}"),
        };
        let manifest = file(MANIFEST).with_context(unusable)?;
        Manifest::check(&manifest).with_context(unusable)?;
        let live = file(LIVE).with_context(unusable)?;
        let live: Live =
            serde_json::from_slice(&live).with_context(|| format!("{LIVE} cannot be read")).with_context(unusable)?;
        let below =
            |(path, entry): (String, Entry)| Some((path.strip_prefix(TREE)?.strip_prefix('/')?.to_owned(), entry));
        let tree = Recording { entries: entries.into_iter().filter_map(below).collect(), left_out: Vec::new() };
        let folder = tempfile::Builder::new().prefix("ccnode-bundle-").tempdir();
        let folder = folder.context("No folder can be made to unpack the bundle in")?;
        tree.lay_out(folder.path()).context("The bundle cannot be unpacked")?;
        ensure!(folder.path().join("sys").is_dir(), "{}: There is no sys in this bundle", path.display());
        Ok(Self { root: SysRoot::at(folder.path()), live: Some(live), _folder: Some(folder) })
    }

    /// The tree.
    pub fn root(&self) -> &SysRoot {
        &self.root
    }

    /// What the node itself told, of a bundle.
    pub fn live(&self) -> Option<&Live> {
        self.live.as_ref()
    }

    /// Everything known of the node.
    pub fn report(&self, ask: &Ask) -> Report {
        let mut report = Report::asking(&self.root, ask);
        if let Some(live) = &self.live {
            live.lay_over(&mut report);
        }
        report
    }
}

impl Live {
    fn lay_over(&self, report: &mut Report) {
        let Self { lockdown, holders, node, has_node_files: _, get: _, problems, config_unreadable, exchanged: _ } =
            self;
        report.host_details.lockdown.clone_from(lockdown);
        report.holders.clone_from(holders);
        report.node.clone_from(node);
        for device in &mut report.devices {
            if let Some(why) = config_unreadable.get(&device.function.bdf) {
                for fault in &mut device.faults {
                    if let Fault::ConfigUnreadable { cause } = fault {
                        cause.clone_from(why);
                    }
                }
            }
            for port in &mut device.ports {
                if let (Acs::Unknown { cause }, Some(why)) = (&mut port.acs, config_unreadable.get(&port.bdf)) {
                    cause.clone_from(why);
                }
            }
        }
        // What could not be read there is missing here; what the node said of it is the better word.
        let told =
            |problem: &Problem| problems.iter().any(|live| (live.bdf, &live.path) == (problem.bdf, &problem.path));
        let own = std::mem::take(&mut report.problems).into_iter().filter(|problem| !told(problem));
        report.problems = problems.iter().cloned().chain(own).collect();
    }
}
