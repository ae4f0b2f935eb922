//! What `hack/real-kube` leaves behind: nothing, whether it is ended in order or was killed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Settings that a kubelet changes at its start.
const SYSCTLS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// What of a machine a cluster could leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    processes: BTreeSet<String>,
    mounts: Vec<String>,
    cgroups: BTreeSet<PathBuf>,
    bridges: BTreeSet<String>,
    sysctls: BTreeMap<&'static str, String>,
    folder: bool,
}

/// Folders of this name below another.
fn folders_named(root: &Path, name: &str, depth: usize, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name().to_string_lossy() == name {
            found.insert(entry.path());
        } else if depth > 0 {
            folders_named(&entry.path(), name, depth - 1, found);
        }
    }
}

impl Traces {
    fn of(folder: &Path) -> Self {
        let (name, text) = (folder.file_name().unwrap().to_str().unwrap(), folder.to_str().unwrap());
        let command_line = |entry: fs::DirEntry| {
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let is_ours = line.contains(text) || String::from_utf8_lossy(&environment).contains(text);
            // This test's own programs have ended by now.
            is_ours.then(|| format!("{} {line}", entry.file_name().to_string_lossy()))
        };
        let processes = fs::read_dir("/proc").unwrap().flatten().filter_map(command_line).collect();
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mut cgroups = BTreeSet::new();
        folders_named(Path::new("/sys/fs/cgroup"), name, 2, &mut cgroups);
        let bridges = fs::read_dir("/sys/class/net").unwrap().flatten();
        let read = |name| fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default();
        Self {
            processes,
            mounts: mounts.lines().filter(|line| line.contains(text)).map(str::to_owned).collect(),
            cgroups,
            bridges: bridges.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
            sysctls: SYSCTLS.into_iter().map(|name| (name, read(name))).collect(),
            folder: folder.exists(),
        }
    }
}

fn real_kube(folder: &Path, command: &str) -> Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hack/real-kube");
    let output = Command::new(script)
        .arg(command)
        .env("CCNODE_REAL_KUBE_DIR", folder)
        .env_remove("KUBECONFIG")
        .output()
        .context("hack/real-kube cannot be run")?;
    let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "hack/real-kube {command}: {}: {told}", output.status);
    Ok(told)
}

/// Ends the cluster whatever becomes of the test.
struct Ended<'a>(&'a Path);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let _ = real_kube(self.0, "down");
    }
}

/// Waits until nothing is there that was not there before: what was killed takes a moment to go.
fn until_as_before(folder: &Path, before: &Traces) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let now = Traces::of(folder);
        if now == *before {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "left behind: {now:#?} and not {before:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
#[ignore = "starts a cluster of its own: hack/test --real-kube"]
fn down_leaves_nothing_behind() -> Result<()> {
    let here = tempfile::tempdir_in("/run")?;
    let folder = here.path().join(format!("real-kube-{}", std::process::id()));
    let _ended = Ended(&folder);
    let before = Traces::of(&folder);
    ensure!(!before.folder && before.cgroups.is_empty() && before.processes.is_empty(), "{before:#?}");

    let told = real_kube(&folder, "up")?;
    let up = Traces::of(&folder);
    ensure!(up.processes.len() >= 6 && up.folder, "{told}: {up:#?}");
    // The network and the mounts of the cluster are its own.
    ensure!(up.bridges == before.bridges && up.mounts.is_empty(), "{up:#?}");
    let has_kubelet = !folder.join("no-kubelet").exists();
    ensure!(!has_kubelet || !up.cgroups.is_empty(), "{up:#?}");
    real_kube(&folder, "down")?;
    until_as_before(&folder, &before).context("after down")?;

    // The first process of the cluster is killed, and all of it with that; down tidies up.
    real_kube(&folder, "up")?;
    let holder: i32 = fs::read_to_string(folder.join("holder"))?.trim().parse()?;
    kill(Pid::from_raw(holder), Signal::SIGKILL)?;
    real_kube(&folder, "down")?;
    until_as_before(&folder, &before).context("after a kill and down")?;

    // Down twice is down once.
    real_kube(&folder, "down")?;
    until_as_before(&folder, &before)
}
