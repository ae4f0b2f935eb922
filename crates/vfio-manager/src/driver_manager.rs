//! `driver-manager`: what the operator runs before vfio-manager (operator-contract section 6.10). It takes NVIDIA's and
//! nouveau's modules out of the kernel where nobody uses them, clears away what a driver container left, and lifts the pauses
//! that a crashed predecessor left on the node. It touches no binding: that is the reference's hazard, which unbinds the GPUs
//! of running virtual machines.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use hw_probe::SysRoot;
use nix::kmod::{DeleteModuleFlags, delete_module};
use nix::mount::{MntFlags, umount2};
use serde::Serialize;
use tracing::info;

use crate::args::{DriverCommand, DriverManagerArgs};
use crate::driver::on_host;

/// NVIDIA's modules and nouveau.
const MODULES: [&str; 9] = [
    "nvidia_drm",
    "nvidia_modeset",
    "nvidia_uvm",
    "nvidia_peermem",
    "nvidia_fs",
    "nvidia_vgpu_vfio",
    "gdrdrv",
    "nvidia",
    "nouveau",
];

/// Where a driver container mounts its root, and where it writes its process id.
const DRIVER_ROOT: &str = "/run/nvidia/driver";
const PID_FILE: &str = "run/nvidia/nvidia-driver.pid";

/// Where a host has programs.
const PROGRAM_FOLDERS: [&str; 6] = ["usr/bin", "usr/local/bin", "bin", "usr/sbin", "sbin", "opt/bin"];

/// Time in which nvidia-smi must answer.
const SMI_DEADLINE: Duration = Duration::from_secs(10);

/// Why nothing is done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The host has a driver of its own, at work.
    #[error(
        "The host has its own NVIDIA driver ({version}), which keeps the GPUs: this node cannot give them to virtual machines; \
         uninstall the driver on the host, or set nvidia.com/gpu.workload.config=container"
    )]
    HostDriver {
        /// What nvidia-smi says.
        version: String,
    },
    /// Whether the host has a driver of its own cannot be told.
    #[error(
        "nvidia-smi on the host has not answered in {seconds} s; the GPU or its driver hangs: look for it in the kernel log"
    )]
    HostDriverHangs {
        /// How long it was waited for.
        seconds: u64,
    },
    /// A module is in use.
    #[error("Module {module} is in use{}: stop what uses it; nothing was unloaded", by(.held_by))]
    ModuleInUse {
        /// The module.
        module: String,
        /// Modules and processes, as far as they are seen.
        held_by: Vec<String>,
    },
    /// The kernel does not let go of a module.
    #[error("Module {module} cannot be unloaded: {reason}")]
    Unload {
        /// The module.
        module: String,
        /// The kernel's answer.
        reason: String,
    },
}

fn by(held_by: &[String]) -> String {
    if held_by.is_empty() { String::new() } else { format!(" by {}", held_by.join(", ")) }
}

impl DriverError {
    /// The stable code of the error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::HostDriver { .. } => "HostDriver",
            Self::HostDriverHangs { .. } => "HostDriverHangs",
            Self::ModuleInUse { .. } => "ModuleInUse",
            Self::Unload { .. } => "ModuleNotUnloaded",
        }
    }
}

/// A loaded module.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Module {
    name: String,
    /// How often it is used, by modules and by processes.
    count: usize,
    /// The modules that use it.
    taken_by: BTreeSet<String>,
}

/// What is on the node.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// What the host's own driver says of its version.
    host_driver: Option<String>,
    modules: Vec<Module>,
    /// Processes that have files of NVIDIA's driver open, as far as they are seen.
    processes: Vec<String>,
    /// Mounts at and below the driver's root, the last first.
    mounts: Vec<PathBuf>,
    pid_file: Option<PathBuf>,
}

/// What is done, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Act {
    Unload(String),
    Unmount(PathBuf),
    Remove(PathBuf),
}

/// What is to be done on the node, or why nothing is: before the first act, so that nothing is half done.
fn plan(seen: &Seen) -> Result<Vec<Act>, DriverError> {
    if let Some(version) = &seen.host_driver {
        return Err(DriverError::HostDriver { version: version.clone() });
    }
    let mut left = seen.modules.clone();
    let mut acts = Vec::new();
    // Users first. A module that only modules use which go away is free then.
    while !left.is_empty() {
        let Some(at) = left.iter().position(|module| module.taken_by.is_empty()) else { break };
        let module = left.remove(at);
        for other in &mut left {
            if other.taken_by.remove(&module.name) {
                other.count = other.count.saturating_sub(1);
            }
        }
        if module.count > 0 {
            return Err(DriverError::ModuleInUse { module: module.name, held_by: seen.processes.clone() });
        }
        acts.push(Act::Unload(module.name));
    }
    if let Some(module) = left.into_iter().next() {
        let held_by = module.taken_by.into_iter().map(|user| format!("module {user}")).collect();
        return Err(DriverError::ModuleInUse { module: module.name, held_by });
    }
    acts.extend(seen.mounts.iter().cloned().map(Act::Unmount));
    acts.extend(seen.pid_file.iter().cloned().map(Act::Remove));
    Ok(acts)
}

fn look(root: &SysRoot, host_driver: Option<String>) -> Seen {
    let holders = hw_probe::holders(root).list;
    let of_nvidia = holders.iter().filter(|holder| holder.node.starts_with("/dev/nvidia"));
    let processes: BTreeSet<String> =
        of_nvidia.map(|holder| format!("pid {} ({})", holder.pid.unwrap_or_default(), holder.comm)).collect();
    let pid_file = root.join(PID_FILE);
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    Seen {
        host_driver,
        modules: MODULES.iter().filter_map(|name| module(root, name)).collect(),
        processes: processes.into_iter().collect(),
        mounts: mounts_of_driver(&mounts),
        pid_file: pid_file.exists().then_some(pid_file),
    }
}

/// The module, where it is loaded and can be unloaded (what is built in has no reference count).
fn module(root: &SysRoot, name: &str) -> Option<Module> {
    let folder = root.join("sys/module").join(name);
    let count = fs::read_to_string(folder.join("refcnt")).ok()?.trim().parse().ok()?;
    let taken_by = fs::read_dir(folder.join("holders")).into_iter().flatten().flatten();
    let taken_by = taken_by.map(|user| user.file_name().to_string_lossy().into_owned()).collect();
    Some(Module { name: name.to_owned(), count, taken_by })
}

/// The mount points at and below the driver's root, the last mounted first (proc_pid_mountinfo(5): the fifth word, in which a
/// space is `\040`).
fn mounts_of_driver(text: &str) -> Vec<PathBuf> {
    let unescaped = |word: &str| word.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\");
    let points = text.lines().filter_map(|line| Some(PathBuf::from(unescaped(line.split(' ').nth(4)?))));
    let mut points: Vec<PathBuf> = points.filter(|point| point.starts_with(DRIVER_ROOT)).collect();
    points.reverse();
    points
}

/// The version of a driver that is installed on the host and at work.
fn host_driver(host_root: &Path) -> Result<Option<String>, DriverError> {
    let program = PROGRAM_FOLDERS.iter().map(|folder| Path::new("/").join(folder).join("nvidia-smi"));
    let beneath = |path: &PathBuf| host_root.join(path.strip_prefix("/").unwrap_or(path)).exists();
    let Some(program) = program.into_iter().find(beneath) else { return Ok(None) };
    let mut command = on_host(host_root, &program.to_string_lossy());
    let child = command
        .args(["--query-gpu=driver_version", "--format=csv,noheader"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    // There, and of no use.
    let Ok(mut child) = child else { return Ok(None) };
    let deadline = Instant::now() + SMI_DEADLINE;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= deadline {
            // Killing can only fail when it has just ended, which is as good.
            let _ = child.kill();
            return Err(DriverError::HostDriverHangs { seconds: SMI_DEADLINE.as_secs() });
        }
        thread::sleep(Duration::from_millis(20));
    }
    let Ok(output) = child.wait_with_output() else { return Ok(None) };
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default().trim();
    // Without a loaded driver it prints a sentence, and fails.
    let is_version = line.starts_with(|c: char| c.is_ascii_digit()) && line.len() < 32;
    Ok((output.status.success() && is_version).then(|| line.to_owned()))
}

/// Does one of the acts on the running machine.
fn perform(act: &Act) -> Result<(), DriverError> {
    match act {
        Act::Unload(module) => {
            let failed = |reason: String| DriverError::Unload { module: module.clone(), reason };
            let name = CString::new(module.as_str()).map_err(|error| failed(error.to_string()))?;
            match delete_module(&name, DeleteModuleFlags::O_NONBLOCK) {
                Ok(()) | Err(nix::errno::Errno::ENOENT) => Ok(()),
                Err(errno) => Err(failed(format!("{errno}; look for what uses it"))),
            }
        }
        Act::Unmount(path) => {
            // What is busy or gone already does not keep the GPUs.
            if let Err(errno) = umount2(path, MntFlags::MNT_DETACH) {
                tracing::warn!(path = %path.display(), %errno, "cannot be unmounted");
            }
            Ok(())
        }
        Act::Remove(path) => {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "cannot be removed");
                }
                _ => {}
            }
            Ok(())
        }
    }
}

/// Runs the command.
pub(crate) fn run(
    DriverManagerArgs { command, host_root, node_name, kubeconfig }: DriverManagerArgs,
) -> anyhow::Result<ExitCode> {
    let host_root = agent_core::host_root(Some(host_root.unwrap_or_else(|| PathBuf::from("/host"))));
    let root = SysRoot::host();
    let planned = host_driver(&host_root).and_then(|driver| plan(&look(&root, driver)));
    let acts = planned.inspect_err(|error| tracing::error!(code = error.code(), "{error}"))?;
    let texts: Vec<String> = acts.iter().map(text).collect();
    let texts = if texts.is_empty() { "nothing".into() } else { texts.join("; ") };
    if command == DriverCommand::PreflightCheck {
        println!("To be done: {texts}");
        return Ok(ExitCode::SUCCESS);
    }
    for act in &acts {
        info!(event = "driver_removed", "{}", text(act));
        perform(act).inspect_err(|error| tracing::error!(code = error.code(), "{error}"))?;
    }
    println!("Done: {texts}. All bindings are as they were");
    let Some(node) = node_name.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()) else {
        println!("Without NODE_NAME no label of the node is looked at");
        return Ok(ExitCode::SUCCESS);
    };
    lift(&node, kubeconfig.as_deref()).with_context(|| {
        format!("The pauses that another driver-manager may have left on node {node} cannot be looked at")
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(feature = "node-labels")]
fn lift(node: &str, kubeconfig: Option<&Path>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let lifted = runtime.block_on(crate::pauses::lift(node, kubeconfig))?;
    if !lifted.is_empty() {
        println!("Pauses left by another driver-manager are lifted: {}", lifted.join(", "));
    }
    Ok(())
}

#[cfg(not(feature = "node-labels"))]
#[expect(clippy::unnecessary_wraps, reason = "the same as with the feature")]
fn lift(_: &str, _: Option<&Path>) -> anyhow::Result<()> {
    println!("This build knows no API server: no label of the node is looked at");
    Ok(())
}

fn text(act: &Act) -> String {
    match act {
        Act::Unload(module) => format!("unload {module}"),
        Act::Unmount(path) => format!("unmount {}", path.display()),
        Act::Remove(path) => format!("remove {}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;
    use std::os::unix::fs::PermissionsExt;

    fn loaded(fake: &FakeSysfs, name: &str, count: usize, taken_by: &[&str]) {
        fake.file(format!("sys/module/{name}/refcnt"), format!("{count}\n"));
        fs::create_dir_all(fake.path().join(format!("sys/module/{name}/holders"))).unwrap();
        for user in taken_by {
            fake.file(format!("sys/module/{name}/holders/{user}"), "");
        }
    }

    fn planned(fake: &FakeSysfs) -> Result<Vec<String>, DriverError> {
        plan(&look(&fake.root(), None)).map(|acts| acts.iter().map(text).collect())
    }

    #[test]
    fn on_a_node_for_virtual_machines_there_is_nothing_to_do() {
        let fake = FakeSysfs::new();
        fake.hgx_h100();
        assert_eq!(planned(&fake), Ok(vec![]));
        // Built into the kernel: no reference count, and nothing to unload.
        fake.module("nouveau", true);
        assert_eq!(planned(&fake), Ok(vec![]));
    }

    #[test]
    fn modules_go_users_first_and_then_what_a_driver_container_left() {
        let fake = FakeSysfs::new();
        loaded(&fake, "nvidia", 2, &["nvidia_uvm", "nvidia_modeset"]);
        loaded(&fake, "nvidia_modeset", 1, &["nvidia_drm"]);
        loaded(&fake, "nvidia_drm", 0, &[]);
        loaded(&fake, "nvidia_uvm", 0, &[]);
        loaded(&fake, "nouveau", 0, &[]);
        fake.file("run/nvidia/nvidia-driver.pid", "1234\n");
        let mounts = "22 1 0:20 / / rw - ext4 /dev/a rw\n\
                      40 22 0:40 / /run/nvidia/driver rw - overlay overlay rw\n\
                      41 40 0:41 / /run/nvidia/driver/a\\040b rw - tmpfs tmpfs rw\n\
                      42 22 0:42 / /run/nvidia/driver-else rw - tmpfs tmpfs rw\n";
        fake.file("proc/self/mountinfo", mounts);
        let pid_file = format!("remove {}", fake.path().join(PID_FILE).display());
        assert_eq!(
            planned(&fake).unwrap(),
            [
                "unload nvidia_drm",
                "unload nvidia_modeset",
                "unload nvidia_uvm",
                "unload nvidia",
                "unload nouveau",
                "unmount /run/nvidia/driver/a b",
                "unmount /run/nvidia/driver",
                pid_file.as_str(),
            ]
        );
    }

    #[test]
    fn what_is_in_use_is_named_and_nothing_is_unloaded() {
        let fake = FakeSysfs::new();
        fake.process(9, "nvidia-persiste", "0::/x\n", &["/dev/nvidia0"]);
        loaded(&fake, "nvidia", 3, &["nvidia_uvm"]);
        loaded(&fake, "nvidia_uvm", 0, &[]);
        let error = planned(&fake).unwrap_err();
        assert_eq!(error.code(), "ModuleInUse");
        assert!(error.to_string().contains("Module nvidia is in use by pid 9 (nvidia-persiste)"), "{error}");
        // By a module that is none of NVIDIA's.
        loaded(&fake, "nvidia", 2, &["nvidia_uvm", "beegfs"]);
        let error = planned(&fake).unwrap_err().to_string();
        assert!(error.contains("Module nvidia is in use by module beegfs"), "{error}");
    }

    #[test]
    fn a_driver_of_the_hosts_own_is_refused_at_once() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(host_driver(root.path()), Ok(None));
        let seen = Seen { host_driver: Some("570.86".into()), ..Seen::default() };
        let error = plan(&seen).unwrap_err();
        assert_eq!(error.code(), "HostDriver");
        assert!(error.to_string().contains("570.86") && error.to_string().contains("uninstall"), "{error}");
        // There, and not at work: on the root itself, so that no chroot is needed for the test.
        let program = root.path().join("usr/bin/nvidia-smi");
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        fs::write(&program, "#!/bin/sh\nexit 9\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(host_driver(root.path()), Ok(None));
    }
}
