//! The node as programs expect to find it: file systems, modules, network, names.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::Pid;

/// How the machine is to end.
pub(crate) struct Power {
    pub(crate) reboot: bool,
    pub(crate) grace: Duration,
}

struct Mount {
    target: &'static str,
    kind: &'static str,
    data: &'static str,
    /// Not every kernel has it: absence is no problem.
    optional: bool,
}

const MOUNTS: &[Mount] = &[
    Mount { target: "/proc", kind: "proc", data: "", optional: false },
    Mount { target: "/sys", kind: "sysfs", data: "", optional: false },
    Mount { target: "/dev", kind: "devtmpfs", data: "mode=755", optional: false },
    Mount { target: "/dev/pts", kind: "devpts", data: "mode=620,ptmxmode=666", optional: false },
    Mount { target: "/dev/shm", kind: "tmpfs", data: "mode=1777", optional: false },
    Mount { target: "/run", kind: "tmpfs", data: "mode=755", optional: false },
    Mount { target: "/tmp", kind: "tmpfs", data: "mode=1777", optional: false },
    Mount { target: "/sys/kernel/security", kind: "securityfs", data: "", optional: true },
    Mount { target: "/sys/kernel/debug", kind: "debugfs", data: "", optional: true },
    Mount { target: "/sys/kernel/tracing", kind: "tracefs", data: "", optional: true },
    Mount { target: "/sys/fs/cgroup", kind: "cgroup2", data: "", optional: true },
];

/// Prepares the node and says what went wrong on the way.
pub(crate) fn prepare() -> Vec<String> {
    let mut problems = Vec::new();
    for entry in MOUNTS {
        if let Err(problem) = mount_one(entry) {
            problems.push(problem);
        }
    }
    for (link, target) in
        [("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "fd/0"), ("/dev/stdout", "fd/1"), ("/dev/stderr", "fd/2")]
    {
        // Already there on some kernels; nothing depends on who made it.
        let _ = symlink(target, link);
    }
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let option =
        |name: &str| command_line.split_ascii_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let hostname = option("lab.hostname").unwrap_or("lab");
    if let Err(error) = fs::write("/proc/sys/kernel/hostname", hostname) {
        problems.push(format!("Host name {hostname} cannot be set: {error}"));
    }
    if let Some(time) = option("lab.time") {
        catch_up(time).unwrap_or_else(|problem| problems.push(problem));
    }
    load_modules(option("lab.modules") != Some("none"), &mut problems);
    network(&mut problems);
    for problem in &problems {
        eprintln!("lab-guest: {problem}");
    }
    problems
}

fn mount_one(entry: &Mount) -> Result<(), String> {
    let Mount { target, kind, data, optional } = *entry;
    // An image may bring files of its own for /run and /tmp; the root is in memory anyway.
    let memory_anyway = matches!(target, "/run" | "/tmp");
    if memory_anyway && fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some()) {
        return Ok(());
    }
    if !optional {
        fs::create_dir_all(target).map_err(|error| format!("Folder {target} cannot be made: {error}"))?;
    }
    match mount(Some(kind), target, Some(kind), MsFlags::empty(), Some(data)) {
        Ok(()) => Ok(()),
        // ENODEV: the kernel lacks the file system. ENOENT: it lacks the place. EBUSY: mounted by the kernel itself.
        Err(Errno::ENODEV | Errno::ENOENT | Errno::EBUSY) if optional => Ok(()),
        Err(error) => Err(format!("{kind} cannot be mounted at {target}: {error}")),
    }
}

/// Sets the clock if it is behind the host's time, in seconds since 1970.
fn catch_up(time: &str) -> Result<(), String> {
    let seconds: u32 = time.parse().map_err(|error| format!("lab.time={time} is no time: {error}"))?;
    if SystemTime::now() >= UNIX_EPOCH + Duration::from_secs(seconds.into()) {
        return Ok(());
    }
    let now = TimeSpec::new(seconds.into(), 0);
    clock_settime(ClockId::CLOCK_REALTIME, now).map_err(|error| format!("The clock cannot be set to {time}: {error}"))
}

/// Loads what `/etc/lab/modules` lists, in its order. A line is `base PATH` or `vfio PATH`; the image holds only lines
/// for modules that its kernel has, so every failure counts.
fn load_modules(vfio: bool, problems: &mut Vec<String>) {
    let list = match fs::read_to_string("/etc/lab/modules") {
        Ok(list) => list,
        Err(error) => {
            problems.push(format!("Module list /etc/lab/modules cannot be read: {error}"));
            return;
        }
    };
    for line in list.lines() {
        let Some((stage, path)) = line.split_once(' ') else { continue };
        if stage == "vfio" && !vfio {
            continue;
        }
        let file = match fs::File::open(path) {
            Ok(file) => file,
            Err(error) => {
                problems.push(format!("Module {path} cannot be read: {error}"));
                continue;
            }
        };
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => problems.push(format!("Module {path} cannot be loaded: {error}")),
        }
    }
}

/// QEMU's user network: the host is 10.0.2.2.
fn network(problems: &mut Vec<String>) {
    // The card appears when its driver has probed, shortly after the module is in.
    let deadline = Instant::now() + Duration::from_secs(5);
    while !Path::new("/sys/class/net/eth0").exists() {
        if Instant::now() >= deadline {
            problems.push("Network card eth0 did not appear within 5 s".to_owned());
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    for words in [
        &["ifconfig", "lo", "127.0.0.1", "netmask", "255.0.0.0", "up"][..],
        &["ifconfig", "eth0", "10.0.2.15", "netmask", "255.255.255.0", "up"],
        &["route", "add", "default", "gw", "10.0.2.2"],
    ] {
        let status = Command::new("/usr/bin/busybox").args(words).stdin(Stdio::null()).status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => problems.push(format!("{} failed: {status}", words.join(" "))),
            Err(error) => problems.push(format!("{} cannot be run: {error}", words.join(" "))),
        }
    }
}

/// Whether anything but init runs. Kernel threads and the dead have no program.
fn programs_run() -> bool {
    fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let process = name.to_string_lossy().parse::<u32>().is_ok_and(|pid| pid > 1);
        process && fs::read_link(entry.path().join("exe")).is_ok()
    })
}

/// Ends every process, then the machine. Returns only if the kernel refuses.
pub(crate) fn power(power: &Power) {
    let everyone = Pid::from_raw(-1);
    if kill(everyone, Signal::SIGTERM).is_ok() {
        let deadline = Instant::now() + power.grace;
        // The reaper collects them; only their absence matters here.
        while Instant::now() < deadline && programs_run() {
            thread::sleep(Duration::from_millis(10));
        }
        let _ = kill(everyone, Signal::SIGKILL);
    }
    nix::unistd::sync();
    let mode = if power.reboot { RebootMode::RB_AUTOBOOT } else { RebootMode::RB_POWER_OFF };
    let Err(error) = reboot(mode);
    eprintln!("lab-guest: the machine does not end: {error}");
}
