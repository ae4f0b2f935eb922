//! A bundle of a node, and what `probe` and `doctor` make of it elsewhere.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use ccnode::args::Args;
use clap::Parser as _;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use hw_probe::testing::FakeSysfs;
use hw_probe::{Lockdown, Tee};
use serde_json::{Value, json};

const GPU: &str = "0000:41:00.0";
const UUID: &str = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0";

fn run(line: &[&str]) -> (u8, String, String) {
    let args = Args::try_parse_from([&["ccnode"], line].concat()).unwrap();
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let code = ccnode::run(&args, &mut out, &mut notes, false);
    (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
}

fn json_of(command: &str, root: &Path) -> Value {
    let (code, out, notes) = run(&[command, "--json", "--root", root.to_str().unwrap()]);
    assert!(code < 2, "{notes}");
    serde_json::from_str(&out).unwrap()
}

/// Bundles the tree; returns the archive's path and the warnings.
fn bundle(root: &Path, folder: &Path) -> (PathBuf, String) {
    let path = folder.join("node.tar.gz");
    let (code, out, notes) = run(&["bundle", "--output", path.to_str().unwrap(), "--root", root.to_str().unwrap()]);
    assert_eq!((code, out), (0, format!("{}\n", path.display())), "{notes}");
    (path, notes)
}

/// The files of an archive, by an independent reading.
fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(GzDecoder::new(fs::File::open(path).unwrap()));
    let mut files = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        files.insert(name, content);
    }
    files
}

fn parsed(files: &BTreeMap<String, Vec<u8>>, name: &str) -> Value {
    serde_json::from_slice(&files[name]).unwrap()
}

fn without_boot(mut report: Value) -> Value {
    report["host"]["boot_id"] = Value::Null;
    report
}

fn hgx() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/hgx-h100")
}

#[test]
fn the_replay_of_a_baseboard_is_the_baseboard() {
    let folder = tempfile::tempdir().unwrap();
    let (path, notes) = bundle(&hgx(), folder.path());
    assert_eq!(notes, "");
    let report = json_of("probe", &path);
    assert_eq!(report["devices"].as_array().unwrap().len(), 12);
    assert_eq!(report, without_boot(json_of("probe", &hgx())));
    assert_eq!(json_of("doctor", &path), json_of("doctor", &hgx()));
    let files = files(&path);
    assert_eq!(parsed(&files, "probe.json"), report);
    assert_eq!(parsed(&files, "doctor.json"), json_of("doctor", &hgx()));
    let manifest = parsed(&files, "manifest.json");
    assert_eq!((&manifest["schema"], &manifest["left_out"]), (&json!(1), &json!([])));
    assert_eq!((&manifest["ccnode"], &manifest["kernel"]), (&json!(env!("CARGO_PKG_VERSION")), &json!("6.12.0-fake")));
    // Other commands that read take it as well.
    let (code, out, _) = run(&["probe", "--root", path.to_str().unwrap()]);
    assert_eq!((code, out.lines().count()), (0, 14), "{out}");
    let target = folder.path().join("features");
    let (code, ..) = run(&["probe", "--nfd", "--nfd-dir", target.to_str().unwrap(), "--root", path.to_str().unwrap()]);
    assert_eq!(code, 0);
    assert!(fs::read_to_string(target.join("ccnode")).unwrap().contains("ccnode.dev/gpu.count=8\n"));
}

#[test]
fn the_same_node_makes_the_same_bytes_for_its_owner_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = bundle(&hgx(), folder.path());
    let first = fs::read(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    bundle(&hgx(), folder.path());
    assert!(fs::read(&path).unwrap() == first, "not the same bytes");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something else was left");
    let nowhere = folder.path().join("no/such/folder.tar.gz");
    let (code, _, notes) = run(&["bundle", "--output", nowhere.to_str().unwrap(), "--root", hgx().to_str().unwrap()]);
    assert!(code == 1 && notes.contains("The bundle cannot be written"), "{notes}");
}

/// A node with something wrong everywhere.
fn sick() -> FakeSysfs {
    let fake = FakeSysfs::new();
    fake.tee(Tee::None).lockdown(Lockdown::Unknown).module("nvidia", false).module("vfio_pci", false);
    fake.file("sys/module/kvm_amd/parameters/sev_snp", "N\n");
    fake.file("proc/cpuinfo", "vendor_id\t: AuthenticAMD\nflags\t\t: fpu sev\naddress sizes\t: 40 bits physical\n");
    fake.file("proc/cmdline", "iommu=pt lockdown=integrity quiet\n");
    fake.file("lib/modules/6.12.0-fake/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko:\n");
    fake.bridge("0000:40:01.0").config(&[0; 4096]);
    fake.below("0000:40:01.0").gpu(GPU, 0x2330).group(5).driver("vfio-pci").cdev(0);
    fake.function("0000:42:00.0", 0x8086, 0x1533, 0x02_0000).group(5).driver("igb");
    fake.gpu("0000:51:00.0", 0x2330).group(6).config(&[0xff; 4096]).driver("nvidia");
    fake.gpu("0000:52:00.0", 0x2335).group(7).power("auto", "suspended", "D3cold");
    fake.gpu("0000:53:00.0", 0x2335).group(8).patch_config(0x2b4, &[1]).reset_methods("");
    fake.gpu("0000:54:00.0", 0x9999).group(9).bars(&[]).attr("numa_node", "?");
    fake.gpu("0000:55:00.0", 0x2bb5).class(0x03_0000).group(10).attr("current_link_width", "4\n");
    fake.gpu("0000:56:00.0", 0x2901).group(11).attr("resource", vec![b'x'; 70_000]);
    let config = fake.gpu("0000:57:00.0", 0x2330).group(12).remove_attr("config").path().join("config");
    fs::create_dir(config).unwrap();
    fake.process(9, "nvidia-smi", "0::/x\n", &["/dev/nvidia0"]);
    fake.process(10, "qemu", "0::/y\n", &["/dev/vfio/devices/vfio0"]);
    let sockets = fake.path().join("var/lib/kubelet/device-plugins");
    fs::create_dir_all(&sockets).unwrap();
    drop(UnixListener::bind(sockets.join("kubelet.sock")).unwrap());
    fake.file("var/run/cdi/bad.yaml", "cdiVersion: 1.0.0\nkind: nvidia.com/pgpu\ndevices: [{name: x}]\n");
    fake.file("etc/containerd/config.toml", "version = 2\n");
    fake
}

#[test]
fn doctor_names_the_same_causes_elsewhere() {
    let fake = sick();
    let folder = tempfile::tempdir().unwrap();
    let (path, notes) = bundle(fake.path(), folder.path());
    assert!(notes.contains("files could not be read"), "{notes}");
    let mut expected = json_of("doctor", fake.path());
    let got = json_of("doctor", &path);
    for check in expected["checks"].as_array_mut().unwrap() {
        if check["id"] == "holders" {
            // Processes are told by their name alone.
            let lines = ["/dev/nvidia0 is held by nvidia-smi", "/dev/vfio/devices/vfio0 is held by qemu"];
            check["evidence"] = json!(lines);
        }
    }
    let failed = |answer: &Value| {
        let checks = answer["checks"].as_array().unwrap().iter();
        checks
            .filter(|check| check["result"] == "failed")
            .map(|check| check["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    for id in [
        "tee",
        "nvidia-driver",
        "address-width",
        "gpu-bus",
        "gpu-power",
        "gpu-security-fault",
        "gpu-bar0",
        "gpu-reset",
        "gpu-driver",
        "iommu-group",
        "pod-resources-socket",
        "cdi-files",
    ] {
        assert!(failed(&expected).contains(&id.to_owned()), "{id} is not planted: {expected:#}");
    }
    assert_eq!(got, expected);
    let mut report = without_boot(json_of("probe", fake.path()));
    for holder in report["holders"]["list"].as_array_mut().unwrap() {
        (holder["pid"], holder["cgroup"]) = (Value::Null, Value::Null);
    }
    assert_eq!(json_of("probe", &path), report);
    let left_out = parsed(&files(&path), "manifest.json")["left_out"].to_string();
    for words in ["0000:56:00.0/resource", "0000:57:00.0/config", "D3cold"] {
        assert!(left_out.contains(words), "{words}: {left_out}");
    }
}

#[test]
fn nothing_that_was_planted_gets_into_the_archive() {
    let fake = sick();
    let secrets = [
        "hunter2",
        "rack4-node17",
        "10.20.30.40",
        "fd00:aa::77",
        "52:54:00:ab:cd:ef",
        UUID,
        "sk9fJ2kLmQ8rT4vWx7Yz",
        "1652823054321",
        "kubeadm-cert-content",
        "eyJhbGciOiJSUzI1NiJ9",
        "planted-cmd",
        "ROMSECRET",
    ];
    let all = secrets.join(" ");
    fake.file("proc/sys/kernel/hostname", "rack4-node17\n");
    fake.file("etc/hostname", "rack4-node17.example.com\n");
    fake.file("etc/machine-id", UUID);
    fake.file("proc/sys/kernel/random/boot_id", format!("{UUID}\n"));
    fake.file("etc/kubernetes/admin.conf", &all);
    fake.file("var/lib/kubelet/kubeconfig", &all);
    fake.file("sys/class/dmi/id/product_serial", &all);
    fake.file(
        "proc/cmdline",
        format!("root=UUID={UUID} password=hunter2 ip=10.20.30.40 vfio.token=hunter2 iommu=pt {all}"),
    );
    fake.file("proc/cpuinfo", format!("vendor_id\t: AuthenticAMD\nserial\t: {all}\nflags\t: sev {all}\n"));
    let pod = format!("0::/kubepods.slice/kubepods-pod{}.slice/{all}\n", UUID.replace('-', "_"));
    fake.process(99, "rack4-node17", &pod, &["/dev/vfio/7"]);
    fake.file("proc/99/cmdline", "planted-cmd\0--token=hunter2");
    fake.file("proc/99/environ", &all);
    let name = format!("GPU-{UUID}");
    fake.file("var/run/cdi/rack4-node17.yaml", format!("cdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ncontainerEdits: {{env: [\"PASSWORD=hunter2 {all}\"]}}\ndevices: [{{name: {name}, containerEdits: {{env: [A=hunter2]}}}}]\n"));
    fake.file("var/run/cdi/broken.yaml", format!("cdiVersion: hunter2\n{all}: [\n"));
    fake.file("var/run/cdi/typed.yaml", "cdiVersion: 0.5.0\nkind: [hunter2]\n");
    fake.file("etc/containerd/config.toml", format!("version = 2\nimports = [\"/etc/containerd/10.20.30.40.toml\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.x.auth]\npassword = \"hunter2 {all}\"\n"));
    fake.file("etc/containerd/10.20.30.40.toml", "hunter2 hunter2\n");
    let gpu = fake.get("0000:53:00.0");
    gpu.attr("vpd", &all).attr("rom", "ROMSECRET").attr("driver_override", "token=hunter2\n");
    gpu.patch_config(0x2f4, b"SERIALNR").attr("current_link_width", "52:54:00:ab:cd:ef");
    symlink("/etc/kubernetes/admin.conf", gpu.path().join("supplier:pci:0000:99:00.0")).unwrap();
    fake.file("sys/module/vfio_pci/parameters/secret", &all);
    fake.file("dev/nvidia0", &all);

    // All of it is where the commands look, or could.
    let (_, seen, _) = run(&["probe", "--json", "--root", fake.path().to_str().unwrap()]);
    for secret in ["hunter2", "rack4-node17", "10.20.30.40", "52:54:00:ab:cd:ef", UUID] {
        assert!(seen.contains(secret), "{secret} is not seen even by probe");
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = bundle(fake.path(), folder.path());
    for (name, content) in files(&path) {
        let text = format!("{name} {}", String::from_utf8_lossy(&content));
        for secret in secrets.iter().chain(&["SERIALNR", "admin.conf", "kubepods"]) {
            // The attribute itself is the kernel's word, and was made up here.
            let planted = name.ends_with("/current_link_width") && *secret == "52:54:00:ab:cd:ef";
            assert!(planted || !text.contains(secret), "{secret} in {text}");
        }
    }
    // What is left is still of use.
    let report = json_of("probe", &path);
    assert_eq!(report["devices"].as_array().unwrap().len(), 8);
    let text = report.to_string();
    for word in [
        "GPU-<uuid>",
        "<host>.yaml",
        "/etc/containerd/<ip>.toml",
        "Is no TOML",
        "Is no CDI file",
        "<secret>",
        "iommu=pt",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn what_only_the_node_could_tell_comes_with_it() {
    let fake = FakeSysfs::new();
    fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci");
    fs::create_dir_all(fake.path().join("var/lib/kubelet/pod-resources")).unwrap();
    let socket = fake.path().join("var/lib/kubelet/pod-resources/kubelet.sock");
    drop(UnixListener::bind(socket).unwrap());
    symlink("/run", fake.path().join("var/run")).unwrap();
    fs::create_dir_all(fake.path().join("run/cdi")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = bundle(fake.path(), folder.path());
    let answer = json_of("doctor", &path);
    let check = |id: &str| answer["checks"].as_array().unwrap().iter().find(|check| check["id"] == id).unwrap().clone();
    assert_eq!(check("pod-resources-socket")["result"], "ok");
    // Nobody listened, and nobody is asked again.
    assert_eq!(check("pod-resources-get")["result"], "warning");
    assert_eq!(check("cdi-directory")["evidence"][0], "/run/cdi: 0 files");
}

#[test]
fn what_is_no_bundle_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.tar.gz");
    let at = path.to_str().unwrap();
    let pack = |list: &[(&str, &str)]| {
        let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (name, content) in list {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    };
    let manifest = r#"{"kind":"ccnode-bundle","schema":1}"#;
    let live = String::from_utf8(files(&bundle(&hgx(), folder.path()).0)["live.json"].clone()).unwrap();
    for (bytes, words) in [
        (b"text".to_vec(), "no gzipped tar"),
        (pack(&[]), "no file manifest.json"),
        (pack(&[("manifest.json", "{")]), "manifest.json cannot be read"),
        (pack(&[("manifest.json", r#"{"kind":"photos","schema":1}"#)]), "of something else"),
        (
            pack(&[("manifest.json", r#"{"kind":"ccnode-bundle","schema":2}"#)]),
            "has schema 2, and this ccnode reads schema 1",
        ),
        (pack(&[("manifest.json", manifest)]), "no file live.json"),
        (pack(&[("manifest.json", manifest), ("live.json", "[]")]), "live.json cannot be read"),
        (pack(&[("manifest.json", manifest), ("live.json", &live)]), "no sys in this bundle"),
    ] {
        fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
        for command in ["probe", "doctor"] {
            let (code, out, notes) = run(&[command, "--root", at]);
            assert_eq!((code, out.as_str()), (if command == "probe" { 1 } else { 2 }, ""), "{notes}");
            assert!(notes.starts_with(&format!("ccnode: {at}: ")) && notes.contains(words), "{words}: {notes}");
        }
    }
    let (bundle, _) = bundle(&hgx(), folder.path());
    let bundle = bundle.to_str().unwrap();
    for (line, words) in
        [(&["probe", "--watch"][..], "does not change"), (&["bundle", "--output", at][..], "a bundle already")]
    {
        let (code, _, notes) = run(&[line, &["--root", bundle]].concat());
        assert!(code == 1 && notes.contains(words), "{notes}");
    }
    let (_, out, _) = run(&["probe", "--json", "--registers", "--root", bundle]);
    let report: Value = serde_json::from_str(&out).unwrap();
    let gpu = &report["devices"].as_array().unwrap()[4];
    assert_eq!((&gpu["registers"]["state"], &gpu["cc"]["mode"]), (&json!("not-read"), &Value::Null), "{gpu}");
}
