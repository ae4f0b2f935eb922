//! What a machine has of `hack/real-kube`: while it runs nobody beside it can reach it, and when it has ended, in order or not,
//! nothing of it is left.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod real_kube;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use real_kube::{Api, IMAGE, NODE};
use serde_json::json;

/// Settings that a kubelet changes at its start.
const SYSCTLS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// Folders in which kubelet and containerd write, whatever their root folders are, unless they are kept from it.
const WRITTEN: [&str; 6] = [
    "/var/log/pods",
    "/var/log/containers",
    "/var/lib/kubelet",
    "/run/containerd",
    "/opt/containerd",
    "/usr/libexec/kubernetes",
];

/// Values that no kubelet sets and that harm nobody: by these it shows that a setting was noted and put back.
const ODD: [(&str, &str); 5] = [
    ("vm/overcommit_memory", "0"),
    ("kernel/panic", "7"),
    ("kernel/panic_on_oops", "0"),
    ("kernel/keys/root_maxkeys", "999983"),
    ("kernel/keys/root_maxbytes", "24999983"),
];

fn sysctl(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}

/// The machine's settings, which are put back whatever becomes of the test.
struct Settings(Vec<(&'static str, String)>);

impl Settings {
    /// Gives them odd values.
    fn odd() -> Result<Self> {
        let mut settings = Self(Vec::new());
        for (name, value) in ODD {
            settings.0.push((name, fs::read_to_string(sysctl(name)).context(name)?));
            fs::write(sysctl(name), value).context(name)?;
        }
        Ok(settings)
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (name, value) in &self.0 {
            let _ = fs::write(sysctl(name), value);
        }
    }
}

/// What of a machine a cluster could leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    processes: BTreeSet<String>,
    mounts: Vec<String>,
    cgroups: BTreeSet<PathBuf>,
    bridges: BTreeSet<String>,
    sysctls: BTreeMap<&'static str, String>,
    /// What is in the folders that a kubelet writes, and when it was changed last: one that was made and removed shows, too.
    written: BTreeMap<PathBuf, SystemTime>,
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

/// A file, or a folder and all that is in it, with the time of each one's last change.
fn changes(path: &Path, found: &mut BTreeMap<PathBuf, SystemTime>) {
    let Ok(metadata) = fs::symlink_metadata(path) else { return };
    found.insert(path.to_owned(), metadata.modified().unwrap());
    if metadata.is_dir() {
        fs::read_dir(path).into_iter().flatten().flatten().for_each(|entry| changes(&entry.path(), found));
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
        let read = |name| fs::read_to_string(sysctl(name)).unwrap_or_default();
        let mut written = BTreeMap::new();
        for folder in WRITTEN {
            changes(Path::new(folder), &mut written);
        }
        Self {
            processes,
            mounts: mounts.lines().filter(|line| line.contains(text)).map(str::to_owned).collect(),
            cgroups,
            bridges: bridges.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
            sysctls: SYSCTLS.into_iter().map(|name| (name, read(name))).collect(),
            written,
            folder: folder.exists(),
        }
    }
}

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../hack/real-kube");

/// Runs a program that is the script or ends in it. Returns its exit status and what it said.
fn run_script(folder: &Path, program: &str, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new(program);
    command.args(arguments).env("CCNODE_REAL_KUBE_DIR", folder).env_remove("CCNODE_REAL_KUBE_FOREIGN");
    let output = command.output().context(program.to_owned())?;
    let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok((output.status.code(), told))
}

fn hack_real_kube(folder: &Path, command: &str) -> Result<String> {
    let (code, told) = run_script(folder, SCRIPT, &[command])?;
    ensure!(code == Some(0), "hack/real-kube {command}: {code:?}: {told}");
    Ok(told)
}

/// Ends the cluster whatever becomes of the test.
struct Ended<'a>(&'a Path);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let _ = hack_real_kube(self.0, "down");
    }
}

/// Runs a pod in the cluster of a folder, and with it what a pod brings: a sandbox, shims, cgroups.
fn run_a_pod(folder: &Path) -> Result<()> {
    let holder: u32 = holder(folder)?.as_raw().try_into()?;
    let kubeconfig = fs::read_to_string(folder.join("admin.kubeconfig"))?;
    // The network of a process is that of its thread: this test's own stays the machine's.
    let thread = std::thread::spawn(move || -> Result<()> {
        setns(fs::File::open(format!("/proc/{holder}/ns/net"))?, CloneFlags::CLONE_NEWNET)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (api, pods) = (Api::new(&kubeconfig).await?, "/api/v1/namespaces/default/pods");
            // Without it a pod is refused, and a controller makes it after a while.
            let account = "/api/v1/namespaces/default/serviceaccounts/default";
            api.until(account, |answer| (answer.code == 200).then_some(())).await?;
            let container = json!({"name": "main", "image": IMAGE, "imagePullPolicy": "Never"});
            let pod = json!({
                "metadata": {"name": "left"},
                "spec": {
                    "nodeName": NODE, "hostNetwork": true, "automountServiceAccountToken": false,
                    "tolerations": [{"operator": "Exists"}], "containers": [container],
                },
            });
            api.post(pods, &pod).await?.is(201)?;
            let path = format!("{pods}/left");
            api.until(&path, |answer| (answer.body["status"]["phase"] == "Running").then_some(())).await
        })
    });
    thread.join().map_err(|_| anyhow::anyhow!("who makes the pod panicked"))?
}

/// The first process of the cluster's namespaces.
fn holder(folder: &Path) -> Result<Pid> {
    let noted = fs::read_to_string(folder.join("holder"))?;
    let number = noted.split_whitespace().next().context("no process is noted")?;
    Ok(Pid::from_raw(number.parse()?))
}

/// A process of somebody else's in a cgroup of the cluster, as long as this lives.
struct Stray {
    cgroup: PathBuf,
    process: Child,
}

impl Stray {
    /// In the first that takes a process before it is told its processors.
    fn within(cgroups: &BTreeSet<PathBuf>) -> Result<Self> {
        let cgroup = cgroups.iter().find(|cgroup| !cgroup.starts_with("/sys/fs/cgroup/cpuset")).context("no cgroup")?;
        let below = cgroup.join("stray");
        fs::create_dir(&below)?;
        let stray = Self { cgroup: cgroup.clone(), process: Command::new("sleep").arg("600").spawn()? };
        fs::write(below.join("cgroup.procs"), stray.process.id().to_string())?;
        Ok(stray)
    }
}

impl Drop for Stray {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
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

/// The node's address, on a bridge that is attached to nothing.
const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 254, 77, 1);

/// An address and a port as the kernel shows them: words of four bytes, each in the machine's order.
fn address(shown: &str) -> Result<(IpAddr, u16)> {
    let (address, port) = shown.split_once(':').with_context(|| shown.to_owned())?;
    let mut bytes = Vec::new();
    for start in (0..address.len()).step_by(8) {
        bytes.extend(u32::from_str_radix(&address[start..start + 8], 16)?.to_ne_bytes());
    }
    let address = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(bytes) => Ipv4Addr::from(bytes).into(),
        Err(_) => Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice())?).to_canonical(),
    };
    Ok((address, u16::from_str_radix(port, 16)?))
}

/// Where a process listens by TCP, or may be sent something by UDP.
fn listens(process: &Path) -> Result<BTreeSet<(&'static str, IpAddr, u16)>> {
    // Others than listening TCP sockets have somebody at the other end.
    const LISTENS: &str = "0A";
    let mut sockets = BTreeSet::new();
    for open in fs::read_dir(process.join("fd"))?.flatten() {
        // A descriptor may have been closed meanwhile.
        let target = fs::read_link(open.path()).unwrap_or_default();
        let inode = target.to_str().and_then(|name| name.strip_prefix("socket:[")?.strip_suffix(']'));
        sockets.extend(inode.map(str::to_owned));
    }
    let mut found = BTreeSet::new();
    for protocol in ["tcp", "tcp6", "udp", "udp6"] {
        let table = fs::read_to_string(process.join("net").join(protocol))?;
        for line in table.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (local, state, inode) = (fields[1], fields[3], fields[9]);
            if sockets.contains(inode) && (protocol.starts_with("udp") || state == LISTENS) {
                let (address, port) = address(local)?;
                found.insert((protocol, address, port));
            }
        }
    }
    Ok(found)
}

#[test]
#[ignore = "needs a real cluster: hack/test --real-kube"]
fn nothing_listens_beyond_loopback_and_a_bridge_that_is_attached_to_nothing() -> Result<()> {
    let folder = real_kube::real()?;
    let first = PathBuf::from(format!("/proc/{}", holder(&folder)?));
    let namespace = |process: &Path, kind: &str| fs::read_link(process.join("ns").join(kind));
    let (of_cluster, of_machine) = (namespace(&first, "pid")?, namespace(Path::new("/proc/self"), "net")?);
    let mut all = BTreeSet::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        if !namespace(&entry.path(), "pid").is_ok_and(|found| found == of_cluster) {
            continue;
        }
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim().to_owned();
        // Some that are listed have ended since.
        let (Ok(network), Ok(found)) = (namespace(&entry.path(), "net"), listens(&entry.path())) else { continue };
        ensure!(network != of_machine, "{name} is in the machine's own network");
        all.extend(found.into_iter().map(|listener| (name.clone(), listener)));
    }
    println!("{all:#?}");
    // Each of these is looked for, so that an empty answer means nothing.
    let kubelet = (!folder.join("no-kubelet").exists()).then_some(("kubelet", 10250));
    let of_control_plane =
        [("kube-apiserver", 6443), ("etcd", 2379), ("kube-scheduler", 10259), ("kube-controller", 10257)];
    for (name, port) in of_control_plane.into_iter().chain(kubelet) {
        let is_there = all.iter().any(|(found, listener)| found == name && listener.2 == port);
        ensure!(is_there, "{name} does not listen at {port}: {all:#?}");
    }
    let is_inside = |address: &IpAddr| address.is_loopback() || *address == IpAddr::V4(NODE_ADDRESS);
    let outside: Vec<_> = all.iter().filter(|(_, (_, address, _))| !is_inside(address)).collect();
    ensure!(outside.is_empty(), "these can be reached from beyond: {outside:#?}");

    let attached = real_kube::script(&["exec", "ip", "link", "show", "master", "real-kube"])?;
    ensure!(attached.is_empty(), "attached to the bridge: {attached}");
    Ok(())
}

#[test]
#[ignore = "starts a cluster of its own: hack/test --real-kube"]
fn down_leaves_nothing_behind() -> Result<()> {
    let here = tempfile::tempdir_in("/run")?;
    let folder = here.path().join(format!("real-kube-{}", std::process::id()));
    // Settings last: they are put back after the cluster has ended, which puts back the odd ones.
    let _settings = Settings::odd()?;
    let _ended = Ended(&folder);
    let before = Traces::of(&folder);
    ensure!(!before.folder && before.cgroups.is_empty() && before.processes.is_empty(), "{before:#?}");

    let told = hack_real_kube(&folder, "up")?;
    let up = Traces::of(&folder);
    ensure!(up.processes.len() >= 6 && up.folder, "{told}: {up:#?}");
    // The network, the mounts and the folders of the cluster are its own, also while it runs.
    let is_apart = |up: &Traces| up.bridges == before.bridges && up.mounts.is_empty() && up.written == before.written;
    ensure!(is_apart(&up), "{up:#?} and not {before:#?}");
    let has_kubelet = !folder.join("no-kubelet").exists();
    if has_kubelet {
        ensure!(!up.cgroups.is_empty(), "{up:#?}");
        // Without that, nothing would have to be put back.
        let unchanged: Vec<_> = ODD.iter().filter(|(name, _)| up.sysctls[name] == before.sysctls[name]).collect();
        ensure!(unchanged.is_empty(), "the kubelet leaves {unchanged:?} as they were");
        run_a_pod(&folder)?;
        let with_a_pod = Traces::of(&folder);
        ensure!(with_a_pod.processes.iter().any(|line| line.contains("containerd-shim")), "{with_a_pod:#?}");
        ensure!(is_apart(&with_a_pod), "{with_a_pod:#?} and not {before:#?}");
    }
    hack_real_kube(&folder, "down")?;
    until_as_before(&folder, &before).context("after down")?;

    // The first process of the cluster is killed, and all of it with that; down tidies up.
    hack_real_kube(&folder, "up")?;
    kill(holder(&folder)?, Signal::SIGKILL)?;
    // First somebody is in the way of one step, which is told, and the others are taken all the same.
    if has_kubelet {
        let stray = Stray::within(&up.cgroups)?;
        let (code, told) = run_script(&folder, SCRIPT, &["down"])?;
        ensure!(code == Some(1) && told.contains(&format!("the cgroup {} cannot", stray.cgroup.display())), "{told}");
        let now = Traces::of(&folder);
        ensure!(now.cgroups == BTreeSet::from([stray.cgroup.clone()]) && now.folder, "{now:#?}");
        ensure!(now.processes.is_empty() && now.sysctls == before.sysctls, "{now:#?} and not {before:#?}");
    }
    hack_real_kube(&folder, "down")?;
    until_as_before(&folder, &before).context("after a kill and down")?;

    // Down twice is down once.
    hack_real_kube(&folder, "down")?;
    until_as_before(&folder, &before)
}

#[test]
#[ignore = "starts a cluster of its own: hack/test --real-kube"]
fn where_no_cgroup_can_be_made_the_control_plane_runs_alone() -> Result<()> {
    /// Whoever is started by it sees cgroups that are read-only.
    const READ_ONLY: &str = r#"
        for place in $(awk '$3 ~ /^cgroup/ { print $2 }' /proc/mounts); do mount -o remount,bind,ro "$place" || exit; done
        exec "$0" up
    "#;
    let here = tempfile::tempdir_in("/run")?;
    let folder = here.path().join(format!("real-kube-{}", std::process::id()));
    let _ended = Ended(&folder);
    let before = Traces::of(&folder);
    let arguments = ["--mount", "--propagation", "private", "bash", "-c", READ_ONLY, SCRIPT];
    let (code, up) = run_script(&folder, "unshare", &arguments)?;
    ensure!(code == Some(0) && up.contains("WITHOUT A KUBELET: the cgroup /sys/fs/cgroup/"), "{code:?}: {up}");
    let (code, status) = run_script(&folder, SCRIPT, &["status"])?;
    ensure!(code == Some(3) && status.contains("no kubelet: the cgroup /sys/fs/cgroup/"), "{code:?}: {status}");
    let (now, settings) = (Traces::of(&folder), &before.sysctls);
    ensure!(now.cgroups.is_empty() && now.sysctls == *settings, "{now:#?} and not {before:#?}");
    hack_real_kube(&folder, "down")?;
    until_as_before(&folder, &before)
}
