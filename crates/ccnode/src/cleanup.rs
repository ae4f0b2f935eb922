//! `ccnode cleanup`: takes away what our agents have left on a node, for when they are gone for good. No mode and no binding
//! is changed.

use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use agent_core::hostfile::{HostDir, HostFileError};
use agent_core::state::{BINDINGS_FILE, BindingsFile, DEVICES_FILE, DevicesFile, UNITS_FILE, state_dir};
use agent_core::text::chain;
use agent_core::{cdi, features, validations};
use anyhow::{Context as _, bail, ensure};
use gpu_firmware::{DeviceLock, Places};
use hw_probe::{Bdf, Inventory, SysRoot};
use node_object::{Change, NodeClient, NodeError, NodeState, annotations, labels, operands};

use crate::agents::{self, Agent};
use crate::cluster::{self, ClusterArgs, Named};
use crate::mode::Terminal;
use crate::mode::manager::READINESS_FILE;
use crate::node::run_cdi;
use crate::source::Source;
use crate::status::{says_boot, units_folder};
use crate::{FAILED, SUCCESS, printable};

/// cc-manager's record of changes, beside `devices.json`.
const TRANSITIONS_FILE: &str = "transitions.jsonl";

/// What is in the folders that are ours alone.
const STATE_FILES: [&str; 4] = [DEVICES_FILE, BINDINGS_FILE, TRANSITIONS_FILE, UNITS_FILE];

/// Longest file that is read to see whether it is ours, in bytes.
const LONGEST: u64 = 64 << 10;

/// How often it is looked whether an agent still runs.
const LOOK: Duration = Duration::from_millis(200);

/// How often the API server is asked for all nodes.
const ASK: Duration = Duration::from_secs(2);

/// The labels and annotations that the change of the node object is made from.
const READ_LABELS: [&str; 2] = [labels::CC_MODE_STATE, labels::CC_READY_STATE];
const READ_ANNOTATIONS: [&str; 2] = [annotations::CC_STATUS, annotations::TRANSITION];

/// Flags of `ccnode cleanup`.
#[derive(Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct CleanupArgs {
    /// Only print what would be done.
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask.
    #[arg(long, short)]
    pub yes: bool,
    /// Do it although it cannot be seen whether an agent runs, and remove the record of former drivers, too.
    #[arg(long)]
    pub force: bool,
    /// Remove the files of vfio-manager's --status-files, too: those of the GPU Operator's validator are the same to the byte, so
    /// only where it does not run.
    #[arg(long)]
    pub status_files: bool,
    /// Wait this long for agents that still run here to end; with --await-nodes, for the nodes.
    #[arg(long, value_name = "TIME", value_parser = agent_core::text::duration)]
    pub wait: Option<Duration>,
    /// The node that is named is this machine: a pod knows it from its manifest, and need not find it out.
    #[arg(long, requires = "node")]
    pub node_is_here: bool,
    /// Clean up nothing here, but wait until each node's object is clean, and name those that are not.
    #[arg(long, conflicts_with_all = ["dry_run", "yes", "force", "status_files", "offline", "node_is_here"])]
    pub await_nodes: bool,
    /// The node object.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Use sys, proc and run below this directory: a host's root mounted into a container.
    #[arg(long, value_name = "DIR", env = "CCNODE_ROOT", default_value = "/")]
    pub root: PathBuf,
}

/// Runs the command; the exit code.
pub fn run(
    args: &CleanupArgs,
    out: &mut impl Write,
    notes: &mut impl Write,
    terminal: &Terminal,
) -> anyhow::Result<u8> {
    let CleanupArgs { dry_run, yes, force, status_files, wait, node_is_here, await_nodes, cluster, root } = args;
    let wait = wait.unwrap_or_default();
    if *await_nodes {
        return nodes_clean(cluster, wait, out);
    }
    let source = Source::open(&root.canonicalize().unwrap_or_else(|_| root.clone()))?;
    ensure!(source.live().is_none(), "{}: In a bundle there is nothing to clean up", root.display());
    let root = source.root();
    let path = root.join("");
    let deadline = Instant::now() + wait;
    while agents::running(&path, agents::ALL).is_some() && Instant::now() < deadline {
        thread::sleep(LOOK);
    }
    nobody_is_at_work(&path, *force)?;
    let _locks = locks(root)?;
    let inventory = Inventory::scan(root);
    let runtime = cluster::runtime()?;
    let boot_id = inventory.host.boot_id.as_deref();
    let node = if cluster.offline { None } else { runtime.block_on(find(&path, cluster, *node_is_here, boot_id))? };
    let host = Leftovers::find(root, &inventory, *force, *status_files)?;

    let mut plan = String::new();
    if let Some((client, state)) = &node {
        // A string takes any text.
        for line in lines(&change(state), state) {
            let _ = writeln!(plan, "node {}: {line}", client.name());
        }
    }
    for (dir, name) in &host.files {
        let _ = writeln!(plan, "remove {}", dir.path().join(name).display());
    }
    for kept in &host.kept {
        writeln!(notes, "warning: {}", printable(kept))?;
    }
    if plan.is_empty() {
        writeln!(out, "Nothing to clean up")?;
        return Ok(SUCCESS);
    }
    out.write_all(plan.lines().map(|line| printable(line) + "\n").collect::<String>().as_bytes())?;
    out.flush()?;
    if *dry_run {
        return Ok(SUCCESS);
    }
    if !yes {
        terminal.confirm(notes)?;
    }

    let mut troubles: Vec<String> = Vec::new();
    for (dir, name) in &host.files {
        troubles.extend(dir.remove(name).err().map(|error| chain(&error)));
    }
    // Last: a node whose object is clean has nothing left, as those take it who wait for it.
    if let Some((client, _)) = &node {
        let read: Vec<&str> = operands::labels().chain(READ_LABELS).collect();
        // Both at once or none: a gate is never left open over a node that nobody watches.
        let updated = runtime.block_on(client.update((&read, &READ_ANNOTATIONS), change));
        troubles.extend(updated.err().map(|error| error.line()));
    }
    for trouble in &troubles {
        writeln!(notes, "{}", printable(trouble))?;
    }
    if let Some(target) = host.cut_short {
        let told =
            format!("A change to mode {target} was cut short: ccnode mode get --own tells what the devices are in");
        writeln!(notes, "note: {}", printable(&told))?;
    }
    writeln!(out, "{}", if troubles.is_empty() { "Cleaned up" } else { "Not everything could be cleaned up" })?;
    Ok(if troubles.is_empty() { SUCCESS } else { FAILED })
}

/// Waits until no node has an annotation of ours; those that still have one are named.
fn nodes_clean(cluster: &ClusterArgs, wait: Duration, out: &mut impl Write) -> anyhow::Result<u8> {
    let runtime = cluster::runtime()?;
    let deadline = Instant::now() + wait;
    loop {
        let nodes = runtime.block_on(async {
            let client = node_object::connect(cluster.kubeconfig.as_deref()).await?;
            node_object::nodes(&client, cluster::PATIENCE).await
        });
        let is_late = Instant::now() >= deadline;
        match nodes {
            Ok(nodes) => {
                let is_left = |state: &NodeState| READ_ANNOTATIONS.iter().any(|name| state.annotation(name).is_some());
                let left: Vec<String> =
                    nodes.into_iter().filter(|(_, state)| is_left(state)).map(|(name, _)| name).collect();
                if left.is_empty() {
                    writeln!(out, "Every node is cleaned up")?;
                    return Ok(SUCCESS);
                }
                if is_late {
                    for name in left {
                        writeln!(out, "{} is not cleaned up; run ccnode cleanup on it", printable(&name))?;
                    }
                    return Ok(FAILED);
                }
            }
            Err(error) if is_late => bail!("{}; it is not known which nodes are cleaned up", error.line()),
            Err(_) => {}
        }
        thread::sleep(ASK);
    }
}

/// Refuses while an agent could write again what is removed.
fn nobody_is_at_work(path: &Path, force: bool) -> anyhow::Result<()> {
    if let Some(Agent { pid, name }) = agents::running(path, agents::ALL) {
        bail!(
            "Process {pid} is {name}, which would write again what is removed, so nothing is done; uninstall it first"
        );
    }
    ensure!(
        force || agents::sees_all(path),
        "It cannot be seen whether an agent runs, so nothing is done; run as root in the host's PID namespace (hostPID), or \
         give --force if none does"
    );
    Ok(())
}

/// Takes the lock of every device that ever had one, so that nobody is at a device now or begins meanwhile. The files stay: a
/// lock on a removed file would exclude nobody.
fn locks(root: &SysRoot) -> anyhow::Result<Vec<DeviceLock>> {
    let places = Places::at(root.clone(), "ccnode cleanup");
    let Ok(entries) = fs::read_dir(state_dir(&root.join("")).join("locks")) else { return Ok(Vec::new()) };
    let names = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<Bdf>().ok());
    let take =
        |bdf| DeviceLock::take(bdf, &places).map_err(|error| anyhow::anyhow!("{}; nothing is done", error.line()));
    names.map(take).collect()
}

/// The node object; none where there is none.
async fn find(
    path: &Path,
    cluster: &ClusterArgs,
    node_is_here: bool,
    boot_id: Option<&str>,
) -> anyhow::Result<Option<(NodeClient, Arc<NodeState>)>> {
    let Named { name, is_ours } = Named::of(path, cluster.node.as_deref());
    let is_ours = is_ours || node_is_here;
    let name = name.context("Nothing tells this node's name; give --node, or --offline for the host's files alone")?;
    let asked = async {
        let client = cluster::client(&name, cluster.kubeconfig.as_deref()).await?;
        let state = client.get().await?;
        Ok::<_, NodeError>((client, state))
    };
    match asked.await {
        Ok((_, state)) if !is_ours && !says_boot(&state, boot_id) => bail!(
            "Nothing here says that this machine is node {name}, so nothing is done; run it on that node, or without --node"
        ),
        Ok(found) => Ok(Some(found)),
        Err(NodeError::Absent { .. }) if is_ours => Ok(None),
        Err(error) => bail!("{}; nothing is done; --offline is for the host's files alone", error.line()),
    }
}

/// What is to become of the node object: components run again, what was said of the devices is taken back, and what a person
/// asked for stays. The state labels are ours only where an annotation of ours says so.
fn change(node: &NodeState) -> Change {
    let change = operands::take_up(node, Change::new());
    if READ_ANNOTATIONS.iter().all(|name| node.annotation(name).is_none()) {
        return change;
    }
    let change = READ_ANNOTATIONS.iter().fold(change, |change, name| change.without_annotation(*name));
    let change = change.without_label(labels::CC_MODE_STATE);
    // Empty rather than absent: nobody may take the node for one whose gate was never shut.
    match node.label(labels::CC_READY_STATE) {
        Some(_) => change.label(labels::CC_READY_STATE, ""),
        None => change,
    }
}

/// The change in words.
fn lines(change: &Change, node: &NodeState) -> Vec<String> {
    let Change { labels, annotations } = change.missing_from(node);
    let labels = labels.iter().map(|(name, value)| {
        let before = node.label(name).unwrap_or_default();
        match value {
            Some(value) => format!("label {name}: {before:?} -> {value:?}"),
            None => format!("label {name}: {before:?} -> removed"),
        }
    });
    let annotations = annotations.keys().map(|name| format!("annotation {name}: removed"));
    labels.chain(annotations).collect()
}

/// Files of ours on the host.
#[derive(Debug, Default)]
struct Leftovers {
    /// To be removed: folder and name.
    files: Vec<(Rc<HostDir>, String)>,
    /// What is kept, and why.
    kept: Vec<String>,
    /// The mode that a change was to bring when it was cut short.
    cut_short: Option<String>,
}

impl Leftovers {
    fn find(root: &SysRoot, inventory: &Inventory, force: bool, status_files: bool) -> anyhow::Result<Self> {
        let mut found = Self::default();
        for folder in [root.join(run_cdi(root)), root.join("etc/cdi")] {
            let looked = found.add_cdi_files(&folder);
            found.note(looked);
        }
        let looked = found.add_ours(&root.join(features::FOLDER), features::FILE, |text| {
            text.starts_with(features::HEADER.as_bytes())
        });
        found.note(looked);
        if status_files {
            let (folder, workload) = (root.join(validations::FOLDER), format!("{}\n", validations::VM_PASSTHROUGH));
            let looked = found
                .add_ours(&folder, validations::WORKLOAD_FILE, |text| text == workload.as_bytes())
                .and_then(|()| found.add_ours(&folder, validations::READY_FILE, <[u8]>::is_empty));
            found.note(looked);
        }
        let root = &root.join("");
        let boot_id = inventory.host.boot_id.as_deref().unwrap_or_default();
        if let Some(dir) = HostDir::open_existing(state_dir(root))? {
            let dir = Rc::new(dir);
            let journal = DevicesFile::load(&dir, boot_id).ok().flatten().and_then(|file| file.transition);
            found.cut_short = journal.map(|transition| transition.target);
            found.add(&dir, DEVICES_FILE)?;
            found.add(&dir, TRANSITIONS_FILE)?;
            match still_bound(&dir, inventory, boot_id).filter(|_| !force) {
                Some(why) if dir.exists(BINDINGS_FILE)? => found.kept.push(why),
                _ => found.add(&dir, BINDINGS_FILE)?,
            }
            for name in unfinished(dir.path(), &STATE_FILES) {
                found.add(&dir, &name)?;
            }
        }
        if let Some(dir) = HostDir::open_existing(units_folder(root))? {
            let dir = Rc::new(dir);
            found.add(&dir, UNITS_FILE)?;
            for name in unfinished(dir.path(), &STATE_FILES) {
                found.add(&dir, &name)?;
            }
        }
        let readiness = root.join(READINESS_FILE);
        if let (Some(folder), Some(name)) = (readiness.parent(), readiness.file_name().and_then(|name| name.to_str()))
            && let Some(dir) = HostDir::open_existing(folder)?
        {
            found.add(&Rc::new(dir), name)?;
        }
        Ok(found)
    }

    /// A folder that others have, too, and that our agents would not have written to as it is.
    fn note(&mut self, looked: Result<(), HostFileError>) {
        self.kept.extend(looked.err().map(|error| format!("{}; what is there is kept", chain(&error))));
    }

    /// CDI files of the device plugin's shape, and what a writer of them did not live to rename.
    fn add_cdi_files(&mut self, folder: &Path) -> Result<(), HostFileError> {
        let Some(dir) = HostDir::open_existing(folder)?.map(Rc::new) else { return Ok(()) };
        for name in names(dir.path()) {
            let is_ours = match cdi::class_and_rest(&name) {
                Some((class, "")) => holds(&dir, &name, cdi::LONGEST, |text| {
                    let kind = format!("{}/{class}", cdi::VENDOR);
                    std::str::from_utf8(text).is_ok_and(|text| cdi::is_ours(&kind, text))
                }),
                _ => name
                    .strip_prefix('.')
                    .and_then(cdi::class_and_rest)
                    .is_some_and(|(_, rest)| rest.split('.').next_back() == Some("tmp")),
            };
            if is_ours {
                self.add(&dir, &name)?;
            }
        }
        Ok(())
    }

    /// One file where it is as we write it, and what its writer did not live to rename.
    fn add_ours(&mut self, folder: &Path, name: &str, is_ours: impl Fn(&[u8]) -> bool) -> Result<(), HostFileError> {
        let Some(dir) = HostDir::open_existing(folder)?.map(Rc::new) else { return Ok(()) };
        if holds(&dir, name, LONGEST, is_ours) {
            self.add(&dir, name)?;
        }
        for name in unfinished(dir.path(), &[name]) {
            self.add(&dir, &name)?;
        }
        Ok(())
    }

    fn add(&mut self, dir: &Rc<HostDir>, name: &str) -> Result<(), HostFileError> {
        if dir.exists(name)? {
            self.files.push((Rc::clone(dir), name.to_owned()));
        }
        Ok(())
    }
}

/// Why the record of former drivers is still needed.
fn still_bound(dir: &HostDir, inventory: &Inventory, boot_id: &str) -> Option<String> {
    let path = dir.path().join(BINDINGS_FILE);
    let cure = "do: vfio-manage unbind --all first, or --force";
    let file = match BindingsFile::load(dir, boot_id) {
        Ok(file) => file?,
        Err(error) => return Some(format!("{} is kept: {}; {cure}", path.display(), chain(&error))),
    };
    let is_bound = |bdf: Bdf| inventory.get(bdf).is_some_and(hw_probe::PciFunction::is_vfio_bound);
    let bound = file.devices.iter().map(|record| record.bdf).find(|bdf| is_bound(*bdf))?;
    let what = format!("{bound} is still on VFIO, and it tells which driver it had");
    Some(format!("{} is kept: {what}; {cure}", path.display()))
}

/// Whether a file is one that only root or we can write, and has such a content.
fn holds(dir: &HostDir, name: &str, most: u64, is_ours: impl Fn(&[u8]) -> bool) -> bool {
    dir.read(name, most).is_ok_and(|found| found.is_some_and(|text| is_ours(&text)))
}

/// Names of what is in a folder.
fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// Those of `files` that a writer did not live to rename.
fn unfinished(path: &Path, files: &[&str]) -> Vec<String> {
    let is_one = |name: &String| {
        let rest = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp"));
        rest.is_some_and(|rest| {
            files.iter().any(|own| rest.strip_prefix(own).is_some_and(|rest| rest.starts_with('.')))
        })
    };
    names(path).into_iter().filter(is_one).collect()
}
