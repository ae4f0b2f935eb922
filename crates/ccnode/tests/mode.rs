//! `ccnode mode` over fake trees: what it says, and what it refuses before it touches anything.

#![allow(clippy::panic, clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_core::hostfile::HostDir;
use agent_core::state::{DeviceRecord, DevicesFile, Identity, Origin, Transition, state_dir};
use ccnode::args::{Args, Command};
use ccnode::mode::{self, Terminal};
use clap::Parser as _;
use hw_probe::Inventory;
use hw_probe::testing::FakeSysfs;
use serde_json::{Value, json};

const A: &str = "0000:41:00.0";
const B: &str = "0000:42:00.0";
const H100: u16 = 0x2330;
const A100: u16 = 0x20b0;
const BOOT: &str = "11111111-2222-3333-4444-555555555555";

/// Exit code, standard output and standard error.
fn run_on(terminal: &Terminal, root: &Path, line: &[&str]) -> (u8, String, String) {
    let root = root.to_str().unwrap();
    let args = Args::try_parse_from([&["ccnode", "mode"], line, &["--root", root]].concat()).unwrap();
    let Command::Mode { command } = &args.command else { panic!("another command") };
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let result = mode::run(command, &mut out, &mut notes, terminal);
    let notes = String::from_utf8(notes).unwrap();
    let (code, notes) = match result {
        Ok(code) => (code, notes),
        Err(error) => (ccnode::COULD_NOT_RUN, format!("{notes}{error:#}\n")),
    };
    (code, String::from_utf8(out).unwrap(), notes)
}

fn run(root: &Path, line: &[&str]) -> (u8, String, String) {
    run_on(&Terminal::default(), root, line)
}

fn json(root: &Path, line: &[&str]) -> (u8, Value) {
    let (code, out, notes) = run(root, &[line, &["--json"]].concat());
    (code, serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{notes}")))
}

/// A node with these GPUs, no driver bound.
fn tree(gpus: &[(&str, u16)]) -> FakeSysfs {
    let fake = FakeSysfs::new();
    for (index, (bdf, device)) in gpus.iter().enumerate() {
        fake.gpu(*bdf, *device).group(u32::try_from(index).unwrap() + 12);
    }
    fake.file("proc/sys/kernel/random/boot_id", BOOT);
    fs::create_dir_all(fake.path().join("run")).unwrap();
    fake
}

/// Records that say that every GPU was verified in this mode.
fn record(fake: &FakeSysfs, mode: &str, change: impl FnOnce(&mut DevicesFile)) {
    let inventory = Inventory::scan(&fake.root());
    let devices = inventory.gpus().map(|gpu| DeviceRecord {
        bdf: gpu.bdf,
        identity: Identity::of(gpu),
        configured_mode: Some(mode.into()),
        active_mode: Some(mode.into()),
        verified_at: Some(jiff::Timestamp::UNIX_EPOCH),
        usable: true,
        error: None,
    });
    let mut file = DevicesFile { origin: Origin::now(BOOT, None), transition: None, devices: devices.collect() };
    change(&mut file);
    file.store(&HostDir::open(state_dir(fake.path())).unwrap()).unwrap();
}

fn records(fake: &FakeSysfs) -> DevicesFile {
    DevicesFile::load(&HostDir::open(state_dir(fake.path())).unwrap(), BOOT).unwrap().unwrap()
}

fn hgx() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/hgx-h100")
}

#[test]
fn the_plan_of_the_documentation_is_the_real_one() {
    let (code, out, notes) = run(&hgx(), &["plan", "ppcie"]);
    assert_eq!((code, notes.as_str()), (0, ""));
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/mode.md")).unwrap();
    assert!(page.contains(&format!("```\n{out}```\n")), "docs/mode.md does not show this:\n{out}");
}

#[test]
fn every_error_has_a_row_in_the_documentation() {
    let source = include_str!("../../gpu-firmware/src/error.rs");
    let codes = source.split("pub const fn code(").nth(1).unwrap().split("\n    }\n").next().unwrap();
    let codes: Vec<&str> = codes.lines().filter_map(|line| line.split("=> \"").nth(1)?.split('"').next()).collect();
    assert!(codes.len() > 30 && codes.contains(&"InUse"), "{codes:?}");
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/troubleshooting.md")).unwrap();
    let page = page.split("## Codes of devices").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    for code in &codes {
        assert_eq!(rows.iter().filter(|row| row == &code).count(), 1, "{code} in docs/troubleshooting.md");
    }
    let left: Vec<&&str> = rows.iter().filter(|row| !codes.contains(row)).collect();
    assert!(left.is_empty(), "docs/troubleshooting.md explains codes that no error has: {left:?}");
}

#[test]
fn a_record_is_shown_as_of_its_time_and_only_while_it_holds() {
    let fake = tree(&[(A, H100)]);
    fake.get(A).driver("vfio-pci").power("auto", "suspended", "D3hot");
    let fact = |name: &str| json(fake.path(), &["get"]).1["devices"][0][name].clone();
    let reason = |name: &str| fact(name)["reason"].as_str().unwrap().to_owned();
    assert!(reason("active").contains("asleep") && reason("active").contains("no record of this boot"));

    record(&fake, "on", |_| {});
    for name in ["active", "configured"] {
        assert_eq!(
            fact(name),
            json!({ "value": "on", "source": "record", "at": "1970-01-01T00:00:00Z", "reason": null })
        );
    }
    assert!(reason("knobs").contains("--own"));
    let (code, out, _) = run(fake.path(), &["get"]);
    assert_eq!(code, 0);
    assert!(out.contains("on      record of 1970-01-01 00:00:00 UTC"), "{out}");

    for (change, words) in [
        (
            (|file| file.devices[0].identity.ids = "10de:2331".into()) as fn(&mut DevicesFile),
            "no record of this device",
        ),
        (|file| file.devices[0].verified_at = None, "not verified in this boot"),
        (|file| file.devices[0].active_mode = Some("turbo".into()), "\"turbo\""),
        (|file| file.origin.boot_id = "another".into(), "no record of this boot"),
        (
            |file| {
                let started_at = jiff::Timestamp::UNIX_EPOCH;
                file.transition = Some(Transition { target: "off".into(), step: "changing".into(), started_at });
            },
            "a change to off was begun",
        ),
    ] {
        record(&fake, "on", change);
        assert!(reason("active").contains(words), "{words}: {}", reason("active"));
        assert_eq!(fact("configured")["value"], Value::Null);
    }
    fake.file("run/nvidia/ccnode/devices.json", "nonsense");
    assert!(reason("active").contains("cannot be read"), "{}", reason("active"));
}

#[test]
fn the_mode_of_an_idle_device_is_read_from_its_register() {
    let fake = tree(&[(A, H100)]);
    let gpu = fake.get(A).resource_file(0, 16 << 20).power("on", "active", "D0");
    fake.process(1, "init", "0::/\n", &[]);
    let file = fs::File::options().write(true).open(gpu.path().join("resource0")).unwrap();
    for (register, word) in [(0, 0x1800_00a1_u32), (0x2_00bc, 0xff), (0x11_82cc, 2)] {
        std::os::unix::fs::FileExt::write_all_at(&file, &word.to_le_bytes(), register).unwrap();
    }
    record(&fake, "on", |_| {});
    let (_, answer) = json(fake.path(), &["get"]);
    let active = &answer["devices"][0]["active"];
    // It is fresher than the record, which still tells what the device was set to.
    assert_eq!((&active["value"], &active["source"]), (&json!("invalid-devtools-only"), &json!("register")));
    assert_eq!(answer["devices"][0]["configured"]["source"], "record");
}

#[test]
fn users_are_named_without_a_touch() {
    let fake = tree(&[(A, H100), (B, H100)]);
    fake.get(A).driver("nvidia");
    fake.get(B).driver("vfio-pci");
    fake.process(77, "qemu-system-x86", "0::/\n", &["/dev/vfio/13"]);
    let (code, answer) = json(fake.path(), &["get"]);
    assert_eq!(code, 0);
    let errors = [0, 1].map(|index| answer["devices"][index]["error"].clone());
    assert_eq!((&errors[0]["code"], &errors[0]["driver"]), (&json!("InUse"), &json!("nvidia")));
    assert_eq!(errors[1]["holders"], json!([{ "pid": 77, "comm": "qemu-system-x86" }]));
    assert!(errors.iter().all(|error| error["remedy"].as_str().unwrap().contains("vfio-pci")));
    let (code, out, _) = run(fake.path(), &["plan", "on"]);
    assert_eq!(code, 1);
    assert!(out.contains("in the way: In use: driver nvidia is bound"), "{out}");
    assert!(out.contains("by pid 77 (qemu-system-x86)"), "{out}");
    let (code, answer) = json(fake.path(), &["set", "on", "--yes"]);
    assert_eq!((code, &answer["begun"]), (2, &json!(false)));
    assert_eq!(answer["devices"][0]["error"]["code"], "InUse");
}

#[test]
fn a_plan_from_a_record_has_values_and_one_from_nothing_has_conditions() {
    let fake = tree(&[(A, H100), (B, A100)]);
    let a = ["--device", A];
    let (code, answer) = json(fake.path(), &[&["plan", "on"], &a[..]].concat());
    let device = &answer["devices"][0];
    assert_eq!((code, &answer["possible"], &device["reset"]), (0, &json!(true), &json!("if-needed")));
    let ccm = |device: &Value| device["writes"].as_array().unwrap().iter().find(|write| write["knob"] == 8).cloned();
    assert_eq!(
        ccm(device),
        Some(json!({
            "knob": 8, "name": "CCM", "from": null, "to": 1, "reason": "turns confidential computing on"
        }))
    );
    record(&fake, "off", |_| {});
    let (_, answer) = json(fake.path(), &[&["plan", "on"], &a[..]].concat());
    assert_eq!(ccm(&answer["devices"][0]).unwrap()["from"], 0);
    assert_eq!(answer["devices"][0]["reset"], "yes");
    assert!(answer["cc_manager"].as_str().unwrap().contains("devices.json"));
    let (_, out, notes) = run(fake.path(), &[&["plan", "on"], &a[..]].concat());
    assert!(out.contains("now: off (verified 1970-01-01 00:00:00 UTC)") && out.contains("CCM (8) 0 -> 1"), "{out}");
    assert!(notes.contains("kubectl label node"), "{notes}");
    let (_, out, _) = run(fake.path(), &[&["plan", "off"], &a[..]].concat());
    assert!(out.contains("nothing to do, if it still is as it was verified"), "{out}");

    let (code, out, _) = run(fake.path(), &["plan", "on"]);
    assert_eq!(code, 1);
    assert!(out.contains("40GB]: refused") && out.contains("so none is touched"), "{out}");
    let (code, out, _) = run(fake.path(), &["plan", "off"]);
    assert_eq!(code, 0);
    assert!(out.contains("always off, nothing to do"), "{out}");
}

#[test]
fn what_makes_no_sense_ends_with_2_and_touches_nothing() {
    let fake = tree(&[(A, H100), (B, A100)]);
    let empty = FakeSysfs::new();
    for (root, line, words) in [
        (fake.path(), &["set", "ppcie", "--yes", "--device", A][..], "leave --device out"),
        (fake.path(), &["plan", "ppcie", "--device", A], "leave --device out"),
        (fake.path(), &["set", "on", "--yes", "--device", "0000:99:00.0"], "0000:99:00.0: There is no GPU"),
        (fake.path(), &["get", "--device", "0000:99:00.0"], "0000:99:00.0: There is no GPU"),
        (fake.path(), &["set", "on", "--yes"], "0000:42:00.0: "),
        (fake.path(), &["set", "on", "--device", A], "no terminal"),
        (empty.path(), &["set", "on", "--yes"], "No NVIDIA GPU"),
        (empty.path(), &["plan", "on"], "No NVIDIA GPU"),
    ] {
        let (code, _, notes) = run(root, line);
        assert_eq!(code, 2, "{line:?}: {notes}");
        assert!(notes.contains(words), "{line:?}: {notes}");
        assert!(!root.join("run/nvidia").exists(), "{line:?} has taken a lock");
    }
    assert_eq!(run(empty.path(), &["get"]).0, 0);
    for line in [&["set"][..], &["set", "enabled"], &["plan", "On"], &["set", "on", "--device", "41:00.0"], &["reset"]]
    {
        assert!(Args::try_parse_from([&["ccnode", "mode"], line].concat()).is_err(), "{line:?}");
    }
    // One device that cannot be told apart may be a GPU in whatever mode.
    fake.get(B).remove_attr("vendor");
    let (code, _, notes) = run(fake.path(), &["set", "on", "--yes"]);
    assert!(code == 2 && notes.contains("Cannot tell which devices"), "{notes}");
}

#[test]
fn cc_managers_node_is_left_to_it() {
    let fake = tree(&[(A, H100)]);
    fake.file("proc/sys/kernel/hostname", "gpu-node\n");
    fake.process(9, "cc-manager", "0::/\n", &[]);
    let (code, _, notes) = run(fake.path(), &["set", "devtools", "--yes"]);
    assert_eq!(code, 2);
    assert!(notes.contains("(process 9 is cc-manager)"), "{notes}");
    assert!(notes.contains("kubectl label node gpu-node nvidia.com/cc.mode=devtools --overwrite"), "{notes}");
    assert!(!fake.path().join("run/nvidia").exists());
}

#[test]
fn only_a_yes_is_a_yes_and_a_failure_is_told_whole() {
    let fake = tree(&[(A, H100)]);
    record(&fake, "off", |_| {});
    let line = ["set", "on", "--standalone"];
    for ask in [|| Ok(String::new()), || Ok("no\n".to_owned()), || Ok("maybe\n".to_owned())] {
        let (code, out, notes) = run_on(&Terminal { ask: Some(ask), live: false }, fake.path(), &line);
        assert!(code == 2 && notes.contains("Not confirmed"), "{notes}");
        assert!(out.contains("CCM (8) 0 -> 1"), "the plan was shown: {out}");
    }
    let deaf: fn() -> io::Result<String> = || Err(io::Error::other("gone"));
    let (code, _, notes) = run_on(&Terminal { ask: Some(deaf), live: false }, fake.path(), &line);
    assert!(code == 2 && notes.contains("gone"), "{notes}");
    assert!(records(&fake).devices[0].usable, "nothing has happened yet");

    // The fake device has no BAR0 to map.
    fake.get(A).bars(&[]).power("on", "active", "D0");
    let terminal = Terminal { ask: Some(|| Ok("y\n".to_owned())), live: false };
    let (code, out, notes) = run_on(&terminal, fake.path(), &line);
    assert_eq!(code, 1, "{out}{notes}");
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    let row = rows.iter().rfind(|row| row.first() == Some(&A) && row.len() > 4).unwrap();
    let error_line = out.lines().find(|line| line.starts_with("0000:41:00.0: ")).unwrap();
    assert!(error_line.contains("; "), "cause and cure: {error_line}");
    assert!(out.contains("Mode on: not every device is verified"), "{out}");
    assert!(notes.contains("0000:41:00.0  begun") && notes.contains("0000:41:00.0  failed: "), "{notes}");
    let record = records(&fake).devices.remove(0);
    assert_eq!((record.active_mode, record.verified_at, record.usable), (None, None, false));
    assert_eq!(record.error.unwrap().code, *row.last().unwrap());

    let (code, answer) = json(fake.path(), &[&line[..], &["--yes"]].concat());
    let device = &answer["devices"][0];
    assert_eq!((code, &answer["begun"], &answer["verified"]), (1, &json!(true), &json!(false)));
    assert_eq!((&device["result"], &device["error"]["code"]), (&json!("failed"), &json!(row.last().unwrap())));
    assert!(device["error"]["message"].is_string() && device["error"]["remedy"].is_string());
}
