//! What `ccnode probe` prints, over fake trees and the generated one that is kept with the sources.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::path::{Path, PathBuf};

use ccnode::args::Args;
use clap::Parser as _;
use hw_probe::testing::FakeSysfs;
use hw_probe::{Lockdown, Tee};
use serde_json::{Value, json};

/// Standard output and standard error of a command line that ends with 0; else standard error.
fn run(line: &[&str]) -> Result<(String, String), String> {
    let args = Args::try_parse_from([&["ccnode"], line].concat()).unwrap();
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let code = ccnode::run(&args, &mut out, &mut notes, false);
    let notes = String::from_utf8(notes).unwrap();
    if code == ccnode::SUCCESS { Ok((String::from_utf8(out).unwrap(), notes)) } else { Err(notes) }
}

fn probe(root: &Path, json: bool) -> Result<(String, String), String> {
    let root = root.to_str().unwrap();
    let line = ["probe", "--root", root, "--json"];
    run(if json { &line } else { &line[..3] })
}

fn hgx() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/hgx-h100")
}

#[test]
fn what_a_tree_says_of_its_kernel_does_not_reach_the_terminal_as_it_is() {
    let sysfs = FakeSysfs::new();
    sysfs.file("proc/sys/kernel/osrelease", "6.1\u{1b}[2J\n");
    let (out, _) = probe(sysfs.path(), false).unwrap();
    assert!(out.contains("kernel 6.1") && !out.contains('\u{1b}'), "{out:?}");
}

#[test]
fn the_hgx_tree_has_8_gpus_and_4_switches() {
    let (out, notes) = probe(&hgx(), true).unwrap();
    assert_eq!(notes, "");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["schema"], 1);
    assert_eq!(report["problems"], json!([]));
    assert_eq!((&report["host"]["tee"], &report["host"]["iommu"]), (&json!("sev-snp"), &json!("on")));

    let devices = report["devices"].as_array().unwrap();
    // BDF, kind, NUMA node, IOMMU group, VFIO node
    let expected: [(&str, &str, u32, u32, Option<&str>); 12] = [
        ("0000:05:00.0", "nvswitch", 0, 3, None),
        ("0000:06:00.0", "nvswitch", 0, 5, None),
        ("0000:07:00.0", "nvswitch", 0, 7, None),
        ("0000:08:00.0", "nvswitch", 0, 9, None),
        ("0000:18:00.0", "gpu", 0, 13, Some("vfio0")),
        ("0000:19:00.0", "gpu", 0, 15, Some("vfio1")),
        ("0000:42:00.0", "gpu", 0, 19, Some("vfio2")),
        ("0000:43:00.0", "gpu", 0, 21, Some("vfio3")),
        ("0000:9a:00.0", "gpu", 1, 25, Some("vfio4")),
        ("0000:9b:00.0", "gpu", 1, 27, Some("vfio5")),
        ("0000:c2:00.0", "gpu", 1, 31, Some("vfio6")),
        ("0000:c3:00.0", "gpu", 1, 33, Some("vfio7")),
    ];
    assert_eq!(devices.len(), expected.len());
    for (device, (bdf, kind, numa, group, vfio)) in devices.iter().zip(expected) {
        let gpu = kind == "gpu";
        assert_eq!((&device["bdf"], &device["kind"]), (&json!(bdf), &json!(kind)));
        assert_eq!(device["name"], if gpu { "H100" } else { "NVSwitch_gen3" }, "{bdf}");
        let text = if gpu { "GH100 [H100 SXM5 80GB]" } else { "GH100 [H100 NVSwitch]" };
        assert_eq!(device["pci_ids_name"], text, "{bdf}");
        assert_eq!(device["model"]["form_factor"], if gpu { json!("sxm") } else { Value::Null }, "{bdf}");
        assert_eq!(device["model"]["ppcie"], true, "{bdf}");
        assert_eq!((&device["numa_node"], &device["iommu_group"]), (&json!(numa), &json!(group)), "{bdf}");
        assert_eq!(device["driver"], if gpu { json!("vfio-pci") } else { Value::Null }, "{bdf}");
        assert_eq!(device["vfio_cdev"]["name"], vfio.map_or(Value::Null, |name| json!(name)), "{bdf}");
        assert_eq!(device["group_members"], json!([bdf]), "{bdf}");
        assert_eq!(device["liveness"], "answers", "{bdf}");
        assert_eq!(device["upstream"].as_array().unwrap().len(), 3, "{bdf}");
    }

    let (table, notes) = probe(&hgx(), false).unwrap();
    assert_eq!(notes, "");
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 14, "{table}");
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(lines[1]), words("BDF PRODUCT KIND DRIVER GROUP VFIO NUMA POWER CC PPCIE"));
    assert_eq!(words(lines[2]), words("0000:05:00.0 NVSwitch_gen3 nvswitch - 3 - 0 D0 no yes"));
    assert_eq!(words(lines[13]), words("0000:c3:00.0 H100 SXM gpu vfio-pci 33 vfio7 1 D3hot suspended yes yes"));
}

#[test]
fn the_hgx_tree_is_what_its_generator_makes() {
    let fake = FakeSysfs::new();
    fake.hgx_h100();
    let told = |root: &Path| {
        let mut report: Value = serde_json::from_str(&probe(root, true).unwrap().0).unwrap();
        for device in report["devices"].as_array_mut().unwrap() {
            // Every tree has its own.
            device.as_object_mut().unwrap().remove("instance");
        }
        report
    };
    assert_eq!(told(&hgx()), told(fake.path()));
}

#[test]
fn every_field_of_the_json_is_documented() {
    fn keys(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    found.push(key.clone());
                    keys(value, found);
                }
            }
            Value::Array(values) => values.iter().for_each(|value| keys(value, found)),
            _ => {}
        }
    }
    let fake = FakeSysfs::new();
    fake.hgx_h100();
    fake.gpu("0000:01:00.0", 0x2901).group(40).attr("modalias", [0xff]);
    fake.function("0000:01:00.1", 0x10de, 0x22e8, 0x04_0300).group(40).driver("snd_hda_intel");
    fake.gpu("0000:e2:00.0", 0x9999).patch_config(0, &[0x86, 0x80]);
    fake.gpu("0000:e3:00.0", 0x2330).patch_config(0x2b4, &[1]);
    fake.gpu("0000:e4:00.0", 0x2330).remove_attr("config");
    fake.gpu("0000:e5:00.0", 0x2330).remove_attr("class");
    fake.process(7, "qemu", "0::/\n", &["/dev/vfio/3"]);
    fake.file("var/run/cdi/a.yaml", "x");
    let (out, _) = probe(fake.path(), true).unwrap();
    let mut found = Vec::new();
    keys(&serde_json::from_str(&out).unwrap(), &mut found);
    assert!(found.contains(&"group_blockers".to_owned()) && found.contains(&"message".to_owned()));
    let document =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/probe-json.md")).unwrap();
    for key in found {
        assert!(document.contains(&format!("`{key}`")), "{key} is not in docs/probe-json.md");
    }
}

#[test]
fn a_node_without_gpus_says_so() {
    let fake = FakeSysfs::new();
    fake.function("0000:00:1f.0", 0x8086, 0x7a04, 0x06_0100);
    let (out, notes) = probe(fake.path(), false).unwrap();
    let expected = "Host: kernel 6.12.0-fake, TEE none, lockdown none, IOMMU off, /dev/iommu present, /dev/vfio/vfio present\n\
                    No NVIDIA device on this node; cargo lab demo shows ccnode on virtual ones\n";
    assert_eq!((out.as_str(), notes.as_str()), (expected, ""));
    let (out, _) = probe(fake.path(), true).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["devices"], json!([]));
}

#[test]
fn a_device_of_which_it_cannot_be_told_what_it_is_is_told() {
    let fake = FakeSysfs::new();
    fake.gpu("0000:41:00.0", 0x2330).group(4).driver("nvidia").attr("class", "?");
    fake.function("0000:42:00.0", 0x8086, 0x1533, 0x02_0000).attr("class", "?");
    let (out, notes) = probe(fake.path(), false).unwrap();
    let lines: Vec<&str> = out.lines().skip(1).collect();
    assert_eq!(
        lines,
        [
            "It cannot be told whether this node has an NVIDIA device",
            "0000:41:00.0: It cannot be told what this is: class cannot be read; vendor 0x10de; device 0x2330; bound to nvidia"
        ]
    );
    assert!(notes.contains("0000:41:00.0/class: Is not"), "{notes}");
    let report: Value = serde_json::from_str(&probe(fake.path(), true).unwrap().0).unwrap();
    let expected = json!([{ "bdf": "0000:41:00.0", "vendor": 0x10de, "device": 0x2330, "class": null, "driver": "nvidia", "iommu_group": 4 }]);
    assert_eq!((&report["unclassified"], &report["devices"]), (&expected, &json!([])));
}

#[test]
fn a_root_without_sys_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for json in [false, true] {
        let error = probe(dir.path(), json).unwrap_err();
        assert!(
            error.starts_with(&format!("ccnode: {}: There is no directory sys in it", dir.path().display())),
            "{error}"
        );
    }
}

#[test]
fn what_stands_in_the_way_is_told_with_its_cure() {
    let fake = FakeSysfs::new();
    fake.tee(Tee::Tdx).lockdown(Lockdown::Integrity).without_iommufd();
    fake.gpu("0000:01:00.0", 0x2bb5).class(0x03_0000).group(4).driver("vfio-pci").consumer_of_audio(&fake);
    fake.gpu("0000:02:00.0", 0x2330).group(5).config(&[0xff; 4096]).driver("nvidia");
    fake.gpu("0000:03:00.0", 0x31c2).attr("numa_node", "\u{1b}[2J").patch_config(0, &[0x01, 0x00]);
    let (out, notes) = probe(fake.path(), false).unwrap();
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].contains("TEE TDX, lockdown integrity, IOMMU on, /dev/iommu absent"), "{out}");
    let has = |words: &[&str]| lines.iter().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(has(&["0000:01:00.0", "gpu", "vfio-pci", "group 4", "yes", "no"]), "{out}");
    assert!(
        has(&["0000:01:00.0: VFIO cannot take IOMMU group 4 while 0000:01:00.1 in it is bound to snd_hda_intel"]),
        "{out}"
    );
    assert!(has(&["0000:02:00.0: Configuration space reads all ones"]), "{out}");
    assert!(has(&["0000:03:00.0: The device is not ready yet"]), "{out}");
    assert!(has(&["0000:03:00.0", "GB300", "unknown"]), "{out}");
    assert!(has(&["Lockdown: BARs cannot be mapped"]), "{out}");
    assert!(!out.contains('\u{1b}') && !notes.contains('\u{1b}'));
    assert!(
        notes.starts_with("warning: 0000:03:00.0: sys/bus/pci/devices/0000:03:00.0/numa_node: Is not a NUMA node"),
        "{notes}"
    );
    assert_eq!(notes.lines().count(), 1, "{notes}");
}

trait Audio {
    fn consumer_of_audio(self, fake: &FakeSysfs);
}

impl Audio for hw_probe::testing::FakeFunction<'_> {
    /// Gives a graphics card its audio function, in its IOMMU group, as the kernel would bind it.
    fn consumer_of_audio(self, fake: &FakeSysfs) {
        fake.function("0000:01:00.1", 0x10de, 0x22e8, 0x04_0300).group(4).driver("snd_hda_intel");
        self.consumer("0000:01:00.1");
    }
}

#[test]
fn yaml_says_what_json_says() {
    let fake = FakeSysfs::new();
    fake.hgx_h100();
    let (json, _) = probe(fake.path(), true).unwrap();
    let (yaml, _) = run(&["probe", "--yaml", "--root", fake.path().to_str().unwrap()]).unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(serde_saphyr::from_str::<Value>(&yaml).unwrap(), json);
}

#[test]
fn a_feature_file_is_written_where_asked() {
    let folder = tempfile::tempdir().unwrap();
    let root = hgx();
    let line = ["probe", "--nfd", "--nfd-dir", folder.path().to_str().unwrap(), "--root", root.to_str().unwrap()];
    let (out, notes) = run(&line).unwrap();
    let path = folder.path().join("ccnode");
    assert_eq!((out, notes), (format!("{}\n", path.display()), String::new()));
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains("ccnode.dev/gpu.product=H100-SXM\n"), "{text}");
    let error = run(&["probe", "--nfd", "--nfd-dir", "relative", "--root", root.to_str().unwrap()]).unwrap_err();
    assert!(error.starts_with("ccnode: The folder of feature files cannot be used"), "{error}");
}

#[test]
fn completions_and_the_manual_name_every_command() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let (script, _) = run(&["completions", shell]).unwrap();
        assert!(
            script.contains("probe")
                && script.contains("doctor")
                && script.contains("status")
                && script.contains("explain"),
            "{shell}"
        );
    }
    let (page, _) = run(&["man"]).unwrap();
    for word in [
        ".TH ccnode",
        "ccnode\\-probe",
        "ccnode\\-doctor",
        "ccnode\\-status",
        "ccnode\\-cleanup",
        "ccnode\\-drain\\-holders",
        "\\-\\-explain",
        "\\-\\-watch",
    ] {
        assert!(page.contains(word), "{word}: {page}");
    }
}
