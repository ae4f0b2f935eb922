//! A whole node: bytes become a tree in which functions, links and files of the host are missing, cut off, huge, binary,
//! loops or something else than files, and one of them may go away while it is read.

use std::cell::OnceCell;
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use ccnode::args::Args;
use clap::Parser as _;
use hw_probe::testing::{FakeFunction, interrupted};
use hw_probe::{Bdf, Condition, DRIVER_UNREADABLE, HostDetails, Inventory, acs::Ports, holders};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::room::{HEALTHY, Room};

/// Where the folders of the sick functions are. Nothing is ever written through a link, which may lead to the healthy one.
const SICK: &str = "sys/devices/sick";
const BUS: &str = "sys/bus/pci/devices";
const GROUPS: &str = "sys/kernel/iommu_groups";

const ADDRESSES: [&str; 4] = ["0000:41:00.0", "0000:41:00.1", "0000:42:00.0", "10000:e1:00.0"];

/// Names on the bus besides those.
const ENTRIES: [&[u8]; 6] =
    [b"rubbish", b"0000:4A:00.0", b"\xff\xfe", b"0000:41:20.0", b"00000:43:00.0", b"0000:44:00.0"];

/// What a scan reads of a function as text, other than of its link.
const ATTRIBUTES: [&str; 14] = [
    "vendor",
    "device",
    "class",
    "revision",
    "subsystem_vendor",
    "subsystem_device",
    "power/control",
    "power/runtime_status",
    "power_state",
    "driver_override",
    "numa_node",
    "resource",
    "reset_method",
    "modalias",
];

const OTHERS: [&str; 14] = [
    "config",
    "driver",
    "iommu_group",
    "physfn",
    "reset",
    "vfio-dev/vfio7/dev",
    "vfio-dev/vfio",
    "consumer:pci:0000:41:00.1",
    "consumer:pci:x",
    "current_link_speed",
    "current_link_width",
    "max_link_speed",
    "max_link_width",
    "power",
];

/// Files of the host, all in folders that the healthy devices have no part in.
const HOST: [&str; 28] = [
    "proc/sys/kernel/osrelease",
    "proc/sys/kernel/random/boot_id",
    "proc/cmdline",
    "proc/cpuinfo",
    "proc/77/fd/3",
    "proc/77/comm",
    "proc/77/cgroup",
    "proc/self/ns/pid",
    "sys/kernel/security/lockdown",
    "sys/kernel/iommu_groups/5/name",
    "sys/kernel/iommu_groups/5/devices",
    "sys/kernel/iommu_groups/x",
    "sys/module/kvm_amd/parameters/sev_snp",
    "sys/module/kvm_intel/parameters/tdx",
    "sys/module/vfio_pci/initstate",
    "sys/module/nvidia",
    "lib/modules/6.12.0-fake/modules.dep",
    "lib/modules/6.12.0-fake/modules.builtin",
    "lib/modules",
    "etc/containerd/config.toml",
    "etc/containerd",
    "var/run/cdi/a.yaml",
    "var/run/cdi/b.json",
    "etc/cdi/nvidia.yaml",
    "var/lib/kubelet/device-plugins",
    "var/lib/kubelet/pod-resources/kubelet.sock",
    "run/nvidia/ccnode/devices.json",
    "etc/cdi",
];

/// Texts that stand in such files.
const WORDS: [&str; 24] = [
    "0x10de\n",
    "0x2330\n",
    "0x030200\n",
    "0xffff\n",
    "-1\n",
    "4294967295\n",
    "511:7\n",
    "(null)\n",
    "D3cold\n",
    "vfio-pci\n",
    "flr bus\n",
    "Y\n",
    "none [integrity] confidentiality\n",
    "6.12.0-fake\n",
    "../../../etc\n",
    "vfio-noiommu\n",
    "0::/kubepods/pod0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0/x\n",
    "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/x.ko\n",
    "flags\t: sev sev_es\naddress sizes\t: 46 bits physical, 57 bits virtual\n",
    "iommu=pt lockdown=integrity vfio-pci.ids=10de:2330\n",
    "0x0000000000001000 0x0000000000001fff 0x0000000000040200\n",
    "---\ncdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices:\n  - name: \"0\"\n",
    "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\"]\nenable_cdi = false\n",
    "{\"cdiVersion\": \"0.5.0\", \"kind\": \"nvidia.com/pgpu\", \"devices\": [{\"name\": \"0\"}]}",
];

/// Where links lead.
const LINKS: [&str; 14] = [
    ".",
    "..",
    "/",
    "/dev/null",
    "/dev/zero",
    "/proc/self/exe",
    "gone",
    "../0000:41:00.0",
    "../../../bus/pci/devices/0000:01:00.0",
    "../../../bus/pci/drivers/vfio-pci",
    "../../../kernel/iommu_groups/1",
    "../../../kernel/iommu_groups/99999999999",
    "/dev/vfio/12",
    "\u{fffd}\u{1b}[2J",
];

/// A scan of a few functions takes milliseconds; the kernel is never waited for here.
const PATIENCE: Duration = Duration::from_secs(10);

/// What all strings of such a node together can come to, with room: 64 KiB for each attribute.
const MOST_JSON: usize = 32 << 20;

type Files = Vec<(PathBuf, Vec<u8>)>;

struct Stage {
    room: Room,
    /// The files of one whole function of each kind.
    templates: [Files; 4],
}

thread_local! {
    static STAGE: OnceCell<Stage> = const { OnceCell::new() };
}

fn stage() -> Stage {
    let room = Room::new();
    let template = |made: FakeFunction<'_>| {
        let folder = fs::canonicalize(made.path()).expect("The function was just made");
        let mut files = Vec::new();
        collect(&folder, Path::new(""), &mut files);
        room.fake.remove(made.bdf());
        files
    };
    let at = ADDRESSES[0];
    let templates = [
        template(room.fake.gpu(at, 0x2330)),
        template(room.fake.gpu(at, 0x2901)),
        template(room.fake.nvswitch(at)),
        template(room.fake.function(at, 0x8086, 0x1533, 0x02_0000)),
    ];
    Stage { room, templates }
}

fn collect(folder: &Path, below: &Path, files: &mut Files) {
    for entry in fs::read_dir(folder.join(below)).expect("A folder can be listed").flatten() {
        let path = below.join(entry.file_name());
        match entry.file_type().expect("A file has a type") {
            kind if kind.is_dir() => collect(folder, &path, files),
            kind if kind.is_file() => files.push((path.clone(), fs::read(folder.join(&path)).expect("It can be read"))),
            _ => {}
        }
    }
}

/// The input, read from its start; zeros follow its end.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn below(&mut self, count: usize) -> usize {
        usize::from(self.byte()) % count
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

/// Whatever the tree is like: the healthy devices are told as ever, what is broken has a reason, and the look ends soon.
pub fn tree(data: &[u8]) {
    STAGE.with(|cell| {
        let stage = cell.get_or_init(stage);
        let root = stage.room.fake.path();
        clear(root);
        let mut bytes = Bytes(data);
        let flags = bytes.byte();
        let (moment, which) = (bytes.byte(), bytes.of(&ADDRESSES));
        for (number, address) in ADDRESSES.iter().enumerate() {
            let kind = usize::from(flags >> (2 * number)) & 3;
            if number == 0 || kind != 3 {
                build(root, address, &stage.templates[kind]);
            }
        }
        for _ in 0..24 {
            if bytes.0.is_empty() {
                break;
            }
            plant(root, &mut bytes, &stage.templates[0]);
        }
        look(&stage.room, moment, which);
        clear(root);
    });
}

/// Takes away all that a run has made.
fn clear(root: &Path) {
    for folder in [SICK, "proc", "lib", "etc", "var", "run", "sys/module", "sys/kernel/security", "removed", "vanished"]
    {
        remove(&root.join(folder));
    }
    for (folder, kept) in [(BUS, &[HEALTHY, "0000:00:01.0"][..]), (GROUPS, &["1"][..])] {
        for entry in fs::read_dir(root.join(folder)).expect("The bus can be listed").flatten() {
            if !kept.iter().any(|kept| entry.file_name() == *kept) {
                remove(&entry.path());
            }
        }
    }
}

fn remove(path: &Path) {
    let Ok(data) = fs::symlink_metadata(path) else { return };
    let removed = if data.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Makes room at a place below the root, in a real folder: links and files on the way give way.
fn place(root: &Path, at: &Path) -> PathBuf {
    let mut path = root.to_owned();
    for part in at.parent().into_iter().flat_map(Path::components) {
        let Component::Normal(part) = part else { panic!("{} is no plain path", at.display()) };
        path.push(part);
        if !fs::symlink_metadata(&path).is_ok_and(|data| data.is_dir()) {
            remove(&path);
            fs::create_dir(&path).expect("A folder can be made");
        }
    }
    path.push(at.file_name().expect("A place has a name"));
    remove(&path);
    path
}

fn build(root: &Path, address: &str, files: &Files) {
    for (name, content) in files {
        write(&place(root, &Path::new(SICK).join(address).join(name)), content);
    }
    let entry = place(root, &Path::new(BUS).join(address));
    symlink(format!("../../../devices/sick/{address}"), entry).expect("A link can be made");
}

fn write(path: &Path, content: &[u8]) {
    fs::write(path, content).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Makes one thing in the tree other than it should be.
fn plant(root: &Path, bytes: &mut Bytes<'_>, template: &Files) {
    let at = match bytes.below(8) {
        number @ 0..=3 => {
            let function = Path::new(SICK).join(ADDRESSES[number]);
            let name = if bytes.byte() < 128 { bytes.of(&ATTRIBUTES) } else { bytes.of(&OTHERS) };
            function.join(name)
        }
        4 => Path::new(BUS).join(bytes.of(&ADDRESSES)),
        5 => Path::new(BUS).join(OsStr::from_bytes(bytes.of(&ENTRIES))),
        _ => PathBuf::from(bytes.of(&HOST)),
    };
    let what = bytes.below(14);
    let path = place(root, &at);
    let usual = || {
        let name = at.components().skip(4).collect::<PathBuf>();
        template.iter().find(|(known, _)| *known == name).map_or(&[][..], |(_, content)| content)
    };
    match what {
        0 => {}
        1 => write(&path, b""),
        2..=4 => {
            let length = bytes.byte().into();
            write(&path, bytes.take(length));
        }
        5 => {
            let file = fs::File::create(&path).expect("A file can be made");
            file.set_len(1 << (16 + bytes.below(24))).expect("A sparse file can be made");
        }
        6 => symlink(path.file_name().expect("A place has a name"), &path).expect("A link can be made"),
        7 | 8 => symlink(bytes.of(&LINKS), &path).expect("A link can be made"),
        9 => fs::create_dir(&path).expect("A folder can be made"),
        10 => mkfifo(&path, Mode::S_IRWXU).expect("A pipe can be made"),
        11 => write(&path, &vec![bytes.byte(); 65_000 + 8 * usize::from(bytes.byte())]),
        12 => write(&path, bytes.of(&WORDS).as_bytes()),
        _ => {
            // As it should be, but cut off or with some bytes changed.
            let mut content = usual().to_vec();
            if bytes.byte() < 128 {
                content.truncate(usize::from(bytes.byte()) * content.len() / 255);
            } else {
                for _ in 0..=bytes.below(8) {
                    let at = usize::from(u16::from_le_bytes([bytes.byte(), bytes.byte()]));
                    let value = bytes.byte();
                    let length = content.len().max(1);
                    if let Some(byte) = content.get_mut(at % length) {
                        *byte = value;
                    }
                }
            }
            write(&path, &content);
        }
    }
}

fn look(room: &Room, moment: u8, which: &'static str) {
    let start = Instant::now();
    let at = room.fake.root();
    let mut left = moment;
    let folder = room.fake.path().to_owned();
    // Half of all inputs leave the tree alone while it is read.
    let vanishes = moment >= 128;
    let vanish = move || {
        left = left.saturating_sub(1);
        if vanishes && left == 127 {
            remove(&folder.join(BUS).join(which));
            let gone = place(&folder, Path::new("vanished"));
            // It may never have been there.
            let _ = fs::rename(folder.join(SICK).join(which), gone);
        }
    };
    let before = Inventory::scan(&at);
    let now = interrupted(vanish, || Inventory::scan(&at));
    room.check_healthy(&before);
    room.check_healthy(&now);
    let changes = Inventory::diff(&before, &now);
    assert_eq!(changes.is_empty(), before == now, "{changes:?}");
    let after = if vanishes {
        Inventory::scan(&at)
    } else {
        assert_eq!(before, now, "two looks at one tree differ");
        now
    };
    check_inventory(&after);
    check_nothing_is_silent(room.fake.path(), &after);
    for function in &after.functions {
        let condition = Condition::read(&at, function);
        assert!(condition.liveness.is_some() || !condition.faults.is_empty(), "{condition:?} of {function:?}");
        let ports = Ports::default().above(&at, function);
        assert_eq!(ports.len(), function.upstream.len());
    }
    let details = HostDetails::read(&at, &after);
    assert_eq!(details.modules.len(), 9);
    let _ = holders(&at);
    check_programs(room.fake.path(), moment);
    assert!(start.elapsed() < PATIENCE, "the look took {:?}", start.elapsed());
}

fn check_inventory(inventory: &Inventory) {
    let bdfs: Vec<Bdf> = inventory.functions.iter().map(|function| function.bdf).collect();
    assert!(bdfs.windows(2).all(|pair| pair[0] < pair[1]), "{bdfs:?}");
    for problem in &inventory.problems {
        assert!(!problem.path.is_empty() && !problem.message.is_empty() && problem.message.len() < 4096, "{problem:?}");
    }
    let text = serde_json::to_string(inventory).expect("An inventory has a JSON form");
    assert!(text.len() < MOST_JSON, "an inventory of {} bytes", text.len());
    let mut told: Inventory = serde_json::from_str(&text).expect("An inventory's JSON can be read");
    // Of one boot alone, and so not part of it.
    for (told, function) in told.functions.iter_mut().zip(&inventory.functions) {
        told.instance = function.instance;
    }
    assert_eq!(told, *inventory);
}

/// Every entry of the bus is a function, gone, or has a reason; so has every file that is there and is no text.
fn check_nothing_is_silent(root: &Path, inventory: &Inventory) {
    let has_reason = |path: &str| inventory.problems.iter().any(|problem| problem.path == path);
    for entry in fs::read_dir(root.join(BUS)).expect("The bus can be listed").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(bdf) = name.parse::<Bdf>().ok().filter(|bdf| bdf.to_string() == name) else {
            assert!(has_reason(BUS), "{name:?} is dropped in silence");
            continue;
        };
        let folder = format!("{BUS}/{bdf}");
        if fs::metadata(root.join(&folder)).is_err_and(|error| error.kind() == ErrorKind::NotFound) {
            assert!(inventory.get(bdf).is_none());
            continue;
        }
        let concerns = |problem: &&hw_probe::Problem| problem.bdf == Some(bdf);
        let Some(function) = inventory.get(bdf) else {
            assert!(inventory.problems.iter().any(|problem| concerns(&problem)), "{bdf} is dropped in silence");
            continue;
        };
        for name in ATTRIBUTES {
            let path = format!("{folder}/{name}");
            assert!(is_text(&root.join(&path)) || has_reason(&path), "{path} is skipped in silence");
        }
        if function.driver.as_deref() == Some(DRIVER_UNREADABLE) {
            assert!(has_reason(&format!("{folder}/driver")));
        }
        let real = fs::canonicalize(root.join(&folder)).expect("A function that is told has a folder");
        assert!(real.file_name() == Some(OsStr::new(&bdf.to_string())) || has_reason(&folder), "{}", real.display());
    }
}

/// Whether the file is a text of an attribute's size, or not there.
fn is_text(path: &Path) -> bool {
    match fs::metadata(path) {
        Err(error) => error.kind() == ErrorKind::NotFound,
        Ok(data) => {
            data.is_file() && data.len() <= 65_536 && fs::read(path).is_ok_and(|bytes| String::from_utf8(bytes).is_ok())
        }
    }
}

/// A bundle of such a tree can be made, and tells the same of the healthy GPU.
fn check_bundle(folder: &str, healthy: &serde_json::Value) {
    let target = tempfile::tempdir().expect("A temporary folder can be made");
    let archive = target.path().join("node.tar.gz");
    let archive = archive.to_str().expect("The path is text");
    let run = |words: &[&str]| {
        let args = Args::try_parse_from([&["ccnode"], words].concat()).expect("The command line is right");
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        let code = ccnode::run(&args, &mut out, &mut notes, false);
        assert_eq!(code, ccnode::SUCCESS, "{words:?}: {}", String::from_utf8_lossy(&notes));
        out
    };
    run(&["bundle", "--output", archive, "--root", folder]);
    let replayed = run(&["probe", "--json", "--root", archive]);
    let replayed: serde_json::Value = serde_json::from_slice(&replayed).expect("It prints JSON");
    let devices = replayed["devices"].as_array().expect("probe tells devices");
    assert_eq!(devices.iter().find(|device| device["bdf"] == HEALTHY), Some(healthy));
}

/// What a person gets of such a tree, by one of the ways to ask.
fn check_programs(folder: &Path, way: u8) {
    let words = [&["probe", "--json"][..], &["doctor", "--json"], &["probe"], &["doctor"]][usize::from(way) % 4];
    let folder = folder.to_str().expect("The path is text");
    let args = Args::try_parse_from([&["ccnode"], words, &["--root", folder]].concat());
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let code = ccnode::run(&args.expect("The command line is right"), &mut out, &mut notes, false);
    let out = String::from_utf8(out).expect("Output is text");
    let notes = String::from_utf8(notes).expect("Notes are text");
    assert!(code == ccnode::SUCCESS || words[0] == "doctor" && code == ccnode::FAILED, "{words:?}: {code}: {notes}");
    if words.len() == 1 {
        let obeyed = |text: &str| text.chars().any(|c| c.is_control() && c != '\n');
        assert!(!obeyed(&out) && !obeyed(&notes), "{words:?} prints what a terminal obeys: {out:?} {notes:?}");
        assert!(words[0] == "doctor" || out.lines().any(|line| line.starts_with(HEALTHY) && line.contains("H100")));
        return;
    }
    let answer: serde_json::Value = serde_json::from_str(&out).expect("It prints JSON");
    if words[0] == "probe" {
        let devices = answer["devices"].as_array().expect("probe tells devices");
        let healthy = devices.iter().find(|device| device["bdf"] == HEALTHY).expect("The healthy GPU is told");
        assert_eq!(
            [&healthy["name"], &healthy["liveness"], &healthy["driver"], &healthy["faults"]],
            [&"H100".into(), &"answers".into(), &"vfio-pci".into(), &serde_json::json!([])]
        );
        check_bundle(folder, healthy);
    } else {
        for check in answer["checks"].as_array().expect("doctor tells checks") {
            let is_bad = check["result"] == "failed" || check["result"] == "warning";
            assert!(!is_bad || check["cure"].as_str().is_some_and(|cure| !cure.is_empty()), "{check}");
            assert!(check["evidence"].as_array().is_some_and(|lines| !lines.is_empty()), "{check}");
        }
    }
}
