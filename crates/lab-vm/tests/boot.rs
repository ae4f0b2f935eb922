//! A guest boots for real: kernel, VFIO, the virtual devices, programs put in.
//!
//! Skipped, with a message, where the artifacts are not in the cache or `CCNODE_LAB=off`; with `CCNODE_LAB=require` artifacts
//! that are missing are a failure.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's way of failing")]

use std::fs;
use std::path::Path;
use std::process::Command as HostCommand;
use std::time::{Duration, Instant};

use lab_devices::Kind;
use lab_vm::{
    Add, AgentError, Artifacts, Cache, Command, Guest, GuestBuilder, GuestError, Kernel, Status, Topology, Wanted,
};
use nix::sys::signal::Signal;
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);

/// The artifacts, or why there is nothing to test with.
fn artifacts(kernel: Kernel) -> Option<Artifacts> {
    let setting = std::env::var("CCNODE_LAB").unwrap_or_default();
    if setting == "off" {
        eprintln!("skipped: CCNODE_LAB=off");
        return None;
    }
    let cache = Cache::from_env().unwrap();
    let found = Artifacts::present(&cache, &Wanted::kernel(kernel));
    if found.is_none() {
        let missing = format!("{} lacks the {kernel} kernel; fill it with: cargo lab prepare", cache.path().display());
        assert_ne!(setting, "require", "{missing}");
        eprintln!("skipped: {missing}");
    }
    found
}

fn builder(kernel: Kernel, topology: &str) -> Option<GuestBuilder> {
    let topology = Topology::load(topology).unwrap();
    let builder = GuestBuilder::new(artifacts(kernel)?, topology);
    Some(builder.kernel(kernel).agent(env!("CARGO_BIN_EXE_lab-guest")))
}

fn boot(builder: GuestBuilder) -> Guest {
    let guest = builder.boot().unwrap();
    eprintln!("{} booted: {:?}", guest.kernel_release(), guest.boot_times());
    guest
}

fn text(guest: &Guest, script: &str) -> String {
    let output = guest.shell(script, SOON).unwrap();
    assert!(output.success(), "{script}: {:?} {}{}", output.status, output.text(), output.error_text());
    output.text()
}

const BIND: &str = "
    set -e
    for d in /sys/bus/pci/devices/*; do
        case $(cat $d/vendor):$(cat $d/class) in 0x10de:0x0302*|0x10de:0x0680*) ;; *) continue;; esac
        echo vfio-pci > $d/driver_override
        echo ${d##*/} > /sys/bus/pci/drivers_probe
        echo ${d##*/} $(basename $(readlink $d/driver)) $(basename $(readlink $d/iommu_group)) \
            $(ls $d/vfio-dev 2>/dev/null || true)
    done";

#[test]
fn two_gpus_are_bound_reset_and_seen_in_the_trace() {
    let Some(builder) = builder(Kernel::Iommufd, "h100x2") else { return };
    let guest = boot(builder.hostname("node-1"));
    assert_eq!(text(&guest, "hostname; cat /sys/bus/pci/devices/*/vendor | grep -c 0x10de"), "node-1\n2");

    let lines = text(&guest, BIND);
    let fields: Vec<Vec<&str>> = lines.lines().map(|line| line.split_ascii_whitespace().collect()).collect();
    let [first, second] = fields.as_slice() else { panic!("{lines}") };
    assert_ne!(first[2], second[2], "one IOMMU group each");
    for (device, name) in [(first, "gpu0"), (second, "gpu1")] {
        let [bdf, driver, group, cdev] = device.as_slice() else { panic!("{lines}") };
        assert_eq!((*driver, guest.bdf(name).unwrap().as_str()), ("vfio-pci", *bdf));
        text(&guest, &format!("test -c /dev/vfio/{group} && test -c /dev/vfio/devices/{cdev} && test -c /dev/iommu"));
        assert_eq!(text(&guest, &format!("ls /sys/bus/pci/devices/{bdf}/iommu_group/devices")), *bdf);
    }

    guest.fleet().clear_trace();
    text(&guest, &format!("echo 1 > /sys/bus/pci/devices/{}/reset", first[0]));
    let trace = guest.fleet().trace();
    let resets: Vec<&str> = trace.iter().filter(|event| event.kind == Kind::Flr).map(|event| &*event.device).collect();
    assert_eq!(resets, ["gpu0"]);
}

#[test]
fn processes_files_and_signals_work() {
    let Some(builder) = builder(Kernel::Iommufd, "h100x2") else { return };
    let mut guest = boot(builder);

    // Streams apart, codes and signals told apart.
    let output = guest.shell("echo out; echo err >&2; exit 7", SOON).unwrap();
    assert_eq!(
        (output.text().as_str(), output.error_text().as_str(), output.status),
        ("out", "err", Some(Status::Exited(7)))
    );
    assert_eq!(guest.shell("kill -9 $$", SOON).unwrap().status, Some(Status::Signaled(9)));
    let error = guest.run(&["no-such-program"], SOON).unwrap_err();
    assert!(matches!(&error, GuestError::Agent(AgentError::Failed { errno: Some(2), .. })), "{error}");

    // Environment, folder, standard input.
    let command = Command::shell("echo $A $PWD $PATH; cat").env("A", "b c").cwd("/tmp").stdin();
    let process = guest.spawn(command).unwrap();
    process.write_stdin(b"more").unwrap();
    process.close_stdin().unwrap();
    assert!(process.wait(SOON).unwrap().success());
    assert_eq!(process.output().text(), "b c /tmp /bin:/sbin:/usr/bin:/usr/sbin\nmore");

    // A signal reaches the whole tree; a time limit ends it.
    let process =
        guest.spawn(Command::shell("trap 'echo bye; exit 3' TERM; (sleep 300; echo no) & echo up; wait")).unwrap();
    process.wait_output(SOON, |text| text.contains("up\n")).unwrap();
    process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(process.wait(SOON).unwrap(), Status::Exited(3));
    assert_eq!(process.output().text(), "up\nbye");
    let error = guest.shell("echo begun; sleep 300 & sleep 300", Duration::from_secs(1)).unwrap_err();
    assert!(matches!(&error, GuestError::Timeout { written, .. } if written == "begun\n"), "{error}");
    // Killed and reaped, all of them.
    let patience = Instant::now() + SOON;
    while text(&guest, "pgrep sleep || echo none") != "none" {
        assert!(Instant::now() < patience, "{}", text(&guest, "ps"));
    }
    // What outlives its parent does not hold up the parent's end.
    let start = Instant::now();
    assert!(guest.shell("sleep 100 & echo $!", SOON).unwrap().success());
    assert!(start.elapsed() < Duration::from_secs(10));

    // Files both ways, larger than a line.
    let content: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[1]).collect();
    guest.put_file(&content, "/a/b/file", 0o751).unwrap();
    assert_eq!(guest.get_file("/a/b/file").unwrap(), content);
    assert_eq!(text(&guest, "stat -c '%a %s' /a/b/file; ls -A /a/b"), "751 300000\nfile");
    let error = guest.get_file("/a/none").unwrap_err();
    assert!(error.to_string().contains("/a/none"), "{error}");
    assert!(guest.put_file(b"", "/proc/none/x", 0o644).is_err());

    // What a node has.
    assert!(text(&guest, "cat /sys/kernel/security/lockdown").contains("[none]"));
    for folder in ["/sys/fs/cgroup", "/sys/kernel/debug", "/sys/kernel/tracing", "/dev/pts", "/dev/shm", "/run", "/tmp"]
    {
        assert!(text(&guest, "cut -d' ' -f2 /proc/mounts").lines().any(|line| line == folder), "{folder}");
    }
    assert_eq!(text(&guest, "ls /sys/bus/pci/drivers | grep -x vfio-pci"), "vfio-pci");
    text(&guest, "modprobe nvgrace-gpu-vfio-pci && grep -q nvgrace /proc/modules");

    // The host is in reach.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let process = guest.spawn(Command::shell(&format!("echo hello | nc -w 5 10.0.2.2 {port}"))).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut heard = [0; 6];
    std::io::Read::read_exact(&mut stream, &mut heard).unwrap();
    assert_eq!(&heard, b"hello\n");
    drop(stream);
    process.wait(SOON).unwrap();

    // Control connection; power.
    assert_eq!(guest.qmp(&json!({ "execute": "query-status" })).unwrap()["status"], "running");
    assert!(matches!(guest.bdf("gpu9"), Err(GuestError::NoDevice(_))));
    let obeys = guest.spawn(Command::new(["sleep", "300"])).unwrap();
    let start = Instant::now();
    guest.reboot().unwrap();
    eprintln!("power off and boot again: {:?}, {:?}", start.elapsed(), guest.boot_times());
    assert_eq!(obeys.wait(SOON).unwrap(), Status::Signaled(15));
    assert_eq!(text(&guest, "ls -A /a 2>/dev/null | wc -l"), "0");
    let cut_off = guest.spawn(Command::new(["sleep", "300"])).unwrap();
    guest.power_cut();
    assert!(matches!(cut_off.wait(SOON), Err(AgentError::Gone)));
    assert!(!guest.is_running());
    assert!(matches!(guest.shell("true", SOON), Err(GuestError::Off)));
}

/// Copies a file or folder to the same place below `root`, links to files resolved as the loader would.
fn copy(path: &Path, root: &Path) {
    let place = root.join(path.strip_prefix("/").unwrap());
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    let flags = if path.is_dir() { "-a" } else { "-L" };
    assert!(HostCommand::new("cp").arg(flags).arg(path).arg(&place).status().unwrap().success(), "{}", path.display());
}

/// A dynamic program of this host, with all it needs, as a folder for the guest: how to call it, and what it prints.
fn dynamic_program(root: &Path) -> Option<(Vec<String>, &'static str)> {
    let find = |name: &str| Path::new("/usr/bin").join(name).canonicalize().ok();
    let (program, script, expected) = if let Some(python) = find("python3") {
        let library = Path::new("/usr/lib").join(python.file_name()?);
        copy(&library, root);
        // Most of it, and never asked for.
        for name in ["test", "idlelib", "tkinter", "__pycache__", "dist-packages", "lib2to3"] {
            let _ = fs::remove_dir_all(root.join(library.strip_prefix("/").unwrap()).join(name));
        }
        let script =
            "import hashlib, json, os; print(json.dumps([os.getpid() > 1, hashlib.sha256(b'').hexdigest()[:8]]))";
        (python, ["-c", script], "[true, \"e3b0c442\"]")
    } else {
        (find("perl")?, ["-e", "print 6 * 7"], "42")
    };
    let mut programs = vec![program.clone()];
    for module in
        fs::read_dir(Path::new("/usr/lib").join(program.file_name()?).join("lib-dynload")).into_iter().flatten()
    {
        programs.push(module.unwrap().path());
    }
    let listed = HostCommand::new("ldd").args(&programs).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let mut libraries: Vec<&Path> = listed
        .split_ascii_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(Path::new)
        .chain([program.as_path()])
        .collect();
    libraries.sort();
    libraries.dedup();
    for file in libraries {
        copy(file, root);
    }
    let [flag, script] = script.map(str::to_owned);
    Some((vec![program.display().to_string(), flag, script], expected))
}

#[test]
fn a_dynamic_program_of_the_host_runs_when_added() {
    let Some(builder) = builder(Kernel::Iommufd, "h100x2") else { return };
    let folder = tempfile::tempdir().unwrap();
    let Some((argv, expected)) = dynamic_program(folder.path()) else {
        eprintln!("skipped: neither Python nor Perl on this host");
        return;
    };
    let guest = boot(builder.overlay(Add { host: folder.path().into(), guest: "/".into() }));
    let output = guest.run(&argv, SOON).unwrap();
    assert_eq!(output.text(), expected, "{}", output.error_text());
    // The guest's own links are still there.
    assert_eq!(text(&guest, "readlink /lib64; readlink /bin"), "usr/lib64\nusr/bin");
}

#[test]
fn the_board_has_its_groups_and_numa_nodes() {
    let Some(builder) = builder(Kernel::Iommufd, "hgx-h100") else { return };
    let guest = boot(builder);
    let lines = text(&guest, BIND);
    let groups: std::collections::BTreeSet<_> = lines.lines().map(|line| line.split(' ').nth(2).unwrap()).collect();
    assert_eq!((lines.lines().count(), groups.len()), (12, 12), "{lines}");
    for (name, node) in
        [("gpu0", "0"), ("gpu3", "0"), ("gpu4", "1"), ("gpu7", "1"), ("nvswitch1", "0"), ("nvswitch3", "1")]
    {
        let bdf = guest.bdf(name).unwrap();
        assert_eq!(text(&guest, &format!("cat /sys/bus/pci/devices/{bdf}/numa_node")), node, "{name} {bdf}");
        text(&guest, &format!("test -f /sys/bus/pci/devices/{bdf}/resource0"));
    }
}

#[test]
fn the_stock_kernel_has_groups_and_no_iommufd() {
    let Some(builder) = builder(Kernel::Stock, "h100x2") else { return };
    let guest = boot(builder);
    let lines = text(&guest, BIND);
    assert_eq!(lines.lines().filter(|line| line.contains(" vfio-pci ")).count(), 2, "{lines}");
    assert_eq!(text(&guest, "ls /dev/vfio | wc -l; ls /dev/iommu 2>/dev/null | wc -l"), "3\n0");
}

#[test]
fn the_kernel_without_groups_has_device_files_only() {
    let Some(builder) = builder(Kernel::NoGroup, "h100x2") else { return };
    let guest = boot(builder);
    let lines = text(&guest, BIND);
    assert_eq!(lines.lines().filter(|line| line.contains(" vfio-pci ")).count(), 2, "{lines}");
    assert_eq!(text(&guest, "ls /dev/vfio; ls /dev/vfio/devices | wc -l; test -c /dev/iommu"), "devices\n2");
}

#[test]
fn modules_can_wait_for_modprobe() {
    let Some(builder) = builder(Kernel::Iommufd, "h100x2") else { return };
    let guest = boot(builder.without_vfio_modules());
    assert_eq!(text(&guest, "test -e /sys/bus/pci/drivers/vfio-pci || echo absent"), "absent");
    assert_eq!(
        text(&guest, "modprobe vfio-pci && ls -d /sys/bus/pci/drivers/vfio-pci"),
        "/sys/bus/pci/drivers/vfio-pci"
    );
}

#[test]
fn a_guest_whose_clock_is_behind_gets_its_hosts_time() {
    let Some(builder) = builder(Kernel::Iommufd, "h100x2") else { return };
    // The host says that it is 2100; the first word counts.
    let guest = boot(builder.append("lab.time=4102444800"));
    assert_eq!(text(&guest, "date -u +%Y"), "2100");
}

#[test]
fn lockdown_still_loads_our_modules() {
    let Some(builder) = builder(Kernel::Iommufd, "h100x2") else { return };
    let guest = boot(builder.append("lockdown=integrity"));
    assert!(text(&guest, "cat /sys/kernel/security/lockdown").contains("[integrity]"));
    assert_eq!(text(&guest, BIND).lines().count(), 2);
}

#[test]
fn a_boot_that_fails_shows_the_console() {
    let Some(builder) = builder(Kernel::Iommufd, "h100x2") else { return };
    let error = builder.append("rdinit=/no-such-init").boot().err().unwrap();
    assert!(matches!(error, GuestError::Ended { .. }), "{error}");
    assert!(error.to_string().contains("Kernel panic"), "{error}");
}
