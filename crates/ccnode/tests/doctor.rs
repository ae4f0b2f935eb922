//! What `ccnode doctor` says of a healthy node, and of the same node with one cause planted.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::Path;

use agent_core::hostfile::HostDir;
use agent_core::state::{DevicesFile, Origin, Transition, state_dir};
use ccnode::args::Args;
use ccnode::checks::{CHECKS, Exchanged, Facts, Finding, Outcome, examine};
use ccnode::pod_resources::Get;
use ccnode::source::Source;
use clap::Parser as _;
use hw_probe::testing::FakeSysfs;
use hw_probe::{Lockdown, Tee};
use kubelet_api::pod_resources as pr;
use serde_json::Value;
use tonic::{Request, Response, Status};

const GPU: &str = "0000:41:00.0";
const PORT: &str = "0000:40:01.0";
const PLUGIN_SOCKET: &str = "var/lib/kubelet/device-plugins/kubelet.sock";
const POD_RESOURCES: &str = "var/lib/kubelet/pod-resources/kubelet.sock";
const CDI: &str = "---\ncdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices:\n    - name: \"0\"\n      containerEdits:\n        deviceNodes:\n            - path: /dev/vfio/devices/vfio0\n";
const CONTAINERD: &str = "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.kata-qemu-nvidia-gpu-snp]\nruntime_type = \"io.containerd.kata-qemu-nvidia-gpu-snp.v2\"\n";
const CPU: &str = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu sev sev_es sev_snp\naddress sizes\t: 52 bits physical, 57 bits virtual\n";

/// Configuration space of a root port with this ACS control word.
fn port(control: u16) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[..4].copy_from_slice(&[0x36, 0x1b, 0x0c, 0x00]);
    bytes[0x06] = 0x10;
    bytes[0x34] = 0x40;
    bytes[0x40..0x44].copy_from_slice(&[0x10, 0, 4 << 4, 0]);
    bytes[0x100..0x104].copy_from_slice(&[0x0d, 0, 1, 0]);
    bytes[0x106..0x108].copy_from_slice(&control.to_le_bytes());
    bytes
}

fn listen(fake: &FakeSysfs, path: &str) {
    let path = fake.path().join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    // The file stays when the listener goes, which is all that matters where nobody is asked.
    drop(UnixListener::bind(path).unwrap());
}

/// A node on which everything is as it should be.
fn healthy() -> FakeSysfs {
    let fake = FakeSysfs::new();
    fake.tee(Tee::SevSnp).load_driver("vfio-pci").module("vfio_pci", false).module("kvm_amd", false);
    fake.file("proc/cpuinfo", CPU);
    fake.file("proc/cmdline", "amd_iommu=on quiet\n");
    fake.file("lib/modules/6.12.0-fake/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko:\n");
    fake.bridge(PORT).config(&port(0x1d));
    fake.below(PORT).gpu(GPU, 0x2330).group(5).driver_override("vfio-pci");
    fake.drivers_probe(GPU);
    fake.process(1, "systemd", "0::/init.scope\n", &[]);
    listen(&fake, PLUGIN_SOCKET);
    listen(&fake, POD_RESOURCES);
    fake.file("var/run/cdi/nvidia.com-pgpu.yaml", CDI);
    fake.file("etc/containerd/config.toml", CONTAINERD);
    fake
}

/// A change of modes is under way, of which cc-manager last wrote at this moment.
fn in_change(fake: &FakeSysfs, written_at: jiff::Timestamp) {
    let boot_id = ccnode::report::Report::read(&fake.root()).host.boot_id.unwrap();
    let origin = Origin { written_at, ..Origin::now(boot_id, None) };
    let transition = Transition { target: "on".into(), step: "drain".into(), started_at: jiff::Timestamp::UNIX_EPOCH };
    let folder = HostDir::open(state_dir(fake.path())).unwrap();
    DevicesFile { origin, transition: Some(transition), devices: Vec::new() }.store(&folder).unwrap();
}

/// The findings, where the kubelet answered `get`.
fn findings(fake: &FakeSysfs, get: Get) -> BTreeMap<&'static str, Finding> {
    let report = ccnode::report::Report::read(&fake.root());
    let exchanged = Exchanged::read(&fake.root(), &report);
    let found = examine(&Facts { report, get, has_node_files: true, exchanged });
    found.into_iter().map(|finding| (finding.id, finding)).collect()
}

#[test]
fn on_a_healthy_node_nothing_is_wrong() {
    for (id, finding) in findings(&healthy(), Get::Answers) {
        let has_none = ["gpu-firewall", "exchanged-files"].contains(&id);
        let expected = if has_none { Outcome::NotApplicable } else { Outcome::Ok };
        assert_eq!((finding.result, &finding.cure), (expected, &None), "{finding:?}");
        assert!(!finding.evidence.is_empty() && finding.evidence.iter().all(|line| !line.is_empty()), "{finding:?}");
    }
}

/// Check, what is planted, the result, words of the evidence, words of the cure.
type Case = (&'static str, fn(&FakeSysfs), Outcome, &'static str, &'static str);

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn each_planted_cause_is_named() {
    use Outcome::{Failed, NotApplicable, Ok, Warning};
    let cases: &[Case] = &[
        ("tee", |fake| _ = fake.tee(Tee::None), Failed, "neither a parameter", "turn SEV-SNP on"),
        (
            "tee",
            |fake| {
                fake.file("sys/module/kvm_amd/parameters/sev_snp", "N\n");
                fake.file("proc/cpuinfo", "vendor_id\t: AuthenticAMD\nflags\t: hypervisor\n");
            },
            Failed,
            "sys/module/kvm_amd/parameters/sev_snp says N",
            "virtual machine itself",
        ),
        (
            "tee",
            |fake| {
                fake.tee(Tee::None);
                fake.file("proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t: tdx_host_platform\n");
            },
            Failed,
            "flags tdx_host_platform",
            "turn TDX on",
        ),
        ("tee", |fake| _ = fake.tee(Tee::Tdx), Ok, "TDX: sys/module/kvm_intel/parameters/tdx says Y", ""),
        ("tee", |fake| _ = fake.tee(Tee::Tdx), Ok, "Versions: not readable in sysfs", ""),
        (
            "tee",
            |fake| fake.file("sys/devices/faux/tdx_host/version", "1.5.16\n"),
            Ok,
            "Versions: sys/devices/faux/tdx_host/version says 1.5.16",
            "",
        ),
        (
            "iommu",
            |fake| _ = fake.get(GPU).no_group(),
            Failed,
            "no IOMMU groups; kernel command line: amd_iommu=on",
            "AMD-Vi",
        ),
        ("iommu-group", |fake| _ = fake.get(GPU).no_group(), NotApplicable, "no IOMMU", ""),
        ("acs", |fake| _ = fake.get(GPU).no_group(), NotApplicable, "no IOMMU", ""),
        ("lockdown", |fake| _ = fake.lockdown(Lockdown::Integrity), Warning, "Active (integrity)", "vfio-pci"),
        (
            "lockdown",
            |fake| {
                fake.lockdown(Lockdown::Confidentiality);
                fake.unbind(GPU).unwrap();
            },
            Failed,
            "Active (confidentiality)",
            "bind the GPUs to vfio-pci",
        ),
        ("lockdown", |fake| _ = fake.lockdown(Lockdown::Unknown), NotApplicable, "no lockdown file", ""),
        (
            "nvidia-driver",
            |fake| _ = fake.get(GPU).driver("nvidia"),
            Failed,
            "0000:41:00.0: Bound to nvidia",
            "driver.enabled=false",
        ),
        (
            "nvidia-driver",
            |fake| _ = fake.get(GPU).driver("nouveau"),
            Failed,
            "0000:41:00.0: Bound to nouveau",
            "reboot",
        ),
        (
            "nvidia-driver",
            |fake| _ = fake.module("nvidia", false),
            Warning,
            "no GPU bound to it: nvidia",
            "keep it from loading",
        ),
        (
            "gpu-driver",
            |fake| _ = fake.get(GPU).driver("nvidia"),
            Failed,
            "H100 SXM is bound to nvidia",
            "vfio-manager",
        ),
        ("gpu-driver", |fake| fake.unbind(GPU).unwrap(), Warning, "H100 SXM has no driver", "vfio-manager"),
        (
            "vfio-driver",
            |fake| {
                fake.unbind(GPU).unwrap();
                fake.remove_file("sys/module/vfio_pci/initstate");
                std::fs::remove_dir_all(fake.path().join("sys/module/vfio_pci")).unwrap();
            },
            Warning,
            "On disk, not loaded",
            "modules-load.d",
        ),
        (
            "vfio-driver",
            |fake| {
                fake.unbind(GPU).unwrap();
                std::fs::remove_dir_all(fake.path().join("sys/module/vfio_pci")).unwrap();
                fake.file("lib/modules/6.12.0-fake/modules.dep", "");
            },
            Failed,
            "no module vfio_pci",
            "CONFIG_VFIO_PCI",
        ),
        (
            "vfio-nodes",
            |fake| {
                fake.remove_file("dev/iommu");
                fake.remove_file("dev/vfio/vfio");
            },
            Failed,
            "/dev/iommu absent, /dev/vfio/vfio absent",
            "mount the host's /dev",
        ),
        ("vfio-nodes", |fake| fake.remove_file("dev/iommu"), Ok, "/dev/iommu absent, /dev/vfio/vfio present", ""),
        (
            "address-width",
            |fake| fake.file("proc/cpuinfo", "address sizes\t: 40 bits physical, 48 bits virtual\n"),
            Failed,
            "0000:41:00.0: BAR0 ends at",
            "MMIO",
        ),
        ("address-width", |fake| fake.file("proc/cpuinfo", ""), NotApplicable, "does not tell", ""),
        (
            "gpu-bus",
            |fake| _ = fake.get(GPU).config(&[0xff; 4096]),
            Failed,
            "0000:41:00.0: Configuration space reads all ones",
            "power it off and on",
        ),
        ("gpu-security-fault", |fake| _ = fake.get(GPU).config(&[0xff; 4096]), NotApplicable, "No device answers", ""),
        ("gpu-bus", |fake| _ = fake.get(GPU).patch_config(0, &[1, 0]), Warning, "not ready yet", "wait"),
        ("gpu-bus", |fake| _ = fake.get(GPU).remove_attr("config"), Failed, "cannot be read", "power it off"),
        ("gpu-bus", |fake| _ = fake.get(GPU).patch_config(0x34, &[0xff]), Failed, "capability pointer", "power it off"),
        (
            "gpu-power",
            |fake| _ = fake.get(GPU).power("auto", "suspended", "D3cold"),
            Failed,
            "0000:41:00.0: The device is in D3cold",
            "d3cold_allowed",
        ),
        (
            "gpu-security-fault",
            |fake| _ = fake.get(GPU).patch_config(0x2b4, &[0, 0, 0, 0x40]),
            Failed,
            "security-fault word at 0x2b4 in configuration space is 0x40000000",
            "power the node off and on",
        ),
        ("gpu-bar0", |fake| _ = fake.get(GPU).bars(&[]), Failed, "BAR0 has no address", "Above 4G"),
        ("gpu-reset", |fake| _ = fake.get(GPU).reset_methods(""), Failed, "no way to reset", "reset_method"),
        (
            "gpu-model",
            |fake| _ = fake.below(PORT).gpu("0000:42:00.0", 0x9999),
            Warning,
            "0000:42:00.0: Device id 0x9999",
            "update ccnode",
        ),
        (
            "gpu-cc",
            |fake| _ = fake.below(PORT).gpu("0000:42:00.0", 0x20b0),
            Warning,
            "is older than Hopper",
            "keep confidential pods off",
        ),
        (
            "gpu-cc",
            |fake| _ = fake.get(GPU).attr("device", "0x20b0\n").patch_config(2, &[0xb0, 0x20]),
            Failed,
            "is older than Hopper",
            "H100",
        ),
        (
            "gpu-cc",
            |fake| _ = fake.below(PORT).gpu("0000:42:00.0", 0x2342).subsystem(0x10de, 0x16eb),
            Warning,
            "NVLink-C2C",
            "",
        ),
        (
            "exchanged-files",
            |fake| in_change(fake, jiff::Timestamp::now()),
            Ok,
            "Changing the mode to on (at drain, since 1970-01-01T00:00:00Z)",
            "",
        ),
        (
            "exchanged-files",
            |fake| in_change(fake, jiff::Timestamp::UNIX_EPOCH),
            Warning,
            "last written 1970-01-01T00:00:00Z",
            "remove /run/nvidia/ccnode/devices.json",
        ),
        (
            "exchanged-files",
            |fake| fake.file("run/nvidia/ccnode/bindings.json", "no JSON"),
            Failed,
            "bindings.json does not hold what it should",
            "remove a file that cannot be read",
        ),
        (
            "exchanged-files",
            |fake| fake.file("run/nvidia/ccnode", "no folder"),
            Failed,
            "run/nvidia/ccnode",
            "make /run/nvidia/ccnode a directory",
        ),
        (
            "iommu-group",
            |fake| {
                _ = fake
                    .below(PORT)
                    .function("0000:41:00.1", 0x10de, 0x22bd, 0x04_0300)
                    .group(5)
                    .driver("snd_hda_intel");
            },
            Failed,
            "0000:41:00.0: 0000:41:00.1 in its IOMMU group 5 is bound to snd_hda_intel",
            "bind them to vfio-pci",
        ),
        (
            "iommu-group",
            |fake| _ = fake.below(PORT).gpu("0000:42:00.0", 0x2330),
            Failed,
            "0000:42:00.0: Is in no IOMMU group",
            "",
        ),
        (
            "acs",
            |fake| {
                fake.get(PORT).config(&port(0x01));
                fake.below(PORT).function("0000:42:00.0", 0x8086, 0x1533, 0x02_0000).group(5);
            },
            Warning,
            "Shares its IOMMU group with 0000:42:00.0: 0000:40:01.0 lacks request-redirect and completion-redirect and upstream-forwarding",
            "turn ACS on",
        ),
        (
            "acs",
            |fake| _ = fake.below(PORT).function("0000:41:00.1", 0x10de, 0x22bd, 0x04_0300).group(5),
            Ok,
            "No GPU",
            "",
        ),
        ("gpu-link", |fake| _ = fake.get(GPU).attr("current_link_width", "8\n"), Warning, "8 of 16 lanes", "reseat"),
        ("gpu-link", |fake| _ = fake.get(GPU).attr("current_link_width", "0\n"), Failed, "link is down", "reseat"),
        (
            "holders",
            |fake| _ = fake.process(77, "nvidia-persiste", "0::/x\n", &["/dev/nvidia0"]),
            Warning,
            "/dev/nvidia0 is held by nvidia-persiste (pid 77)",
            "stop these processes",
        ),
        (
            "holders",
            |fake| {
                let pod = "0::/kubepods/pod0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0/x\n";
                fake.process(77, "qemu", pod, &["/dev/vfio/devices/vfio0"]);
            },
            Ok,
            "/dev/vfio/devices/vfio0 is held by qemu (pid 77, pod 0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0)",
            "",
        ),
        ("unreadable", |fake| _ = fake.get(GPU).attr("numa_node", "?"), Warning, "Is not a NUMA node", "as root"),
        (
            "unreadable",
            |fake| _ = fake.below(PORT).gpu("0000:42:00.0", 0x2330).attr("class", "?"),
            Failed,
            "0000:42:00.0/class: Is not a 24-bit class code",
            "as root",
        ),
        (
            "unreadable",
            |fake| _ = fake.below(PORT).gpu("0000:42:00.0", 0x2330).remove_attr("vendor"),
            Failed,
            "0000:42:00.0/vendor: Is missing",
            "as root",
        ),
        (
            "unreadable",
            |fake| {
                fake.below(PORT).function("0000:42:00.0", 0x8086, 0x1533, 0x02_0000).attr("class", "?");
            },
            Ok,
            "Nothing was in the way",
            "",
        ),
        (
            "iommu-group",
            |fake| {
                let audio = fake.below(PORT).function("0000:41:00.1", 0x10de, 0x22bd, 0x04_0300).group(5);
                audio.driver("snd_hda_intel").attr("class", "?");
            },
            Failed,
            "0000:41:00.1 in its IOMMU group 5 is bound to snd_hda_intel",
            "bind them to vfio-pci",
        ),
        ("kubelet-socket", |fake| fake.remove_file(PLUGIN_SOCKET), Failed, "is not there", "start the kubelet"),
        (
            "kubelet-socket",
            |fake| std::fs::remove_dir_all(fake.path().join("var/lib/kubelet")).unwrap(),
            Failed,
            "no kubelet has run here",
            "join the node",
        ),
        ("pod-resources-socket", |fake| fake.remove_file(POD_RESOURCES), Failed, "is not there", "start the kubelet"),
        (
            "pod-resources-socket",
            |fake| {
                fake.remove_file(POD_RESOURCES);
                fake.file(POD_RESOURCES, "");
            },
            Failed,
            "Is no socket",
            "",
        ),
        (
            "cdi-directory",
            |fake| std::fs::remove_dir_all(fake.path().join("var/run/cdi")).unwrap(),
            Failed,
            "/var/run/cdi is not there",
            "device plugin",
        ),
        (
            "cdi-files",
            |fake| fake.file("var/run/cdi/b.yaml", "x"),
            Failed,
            "/var/run/cdi/b.yaml: Is no CDI file",
            "repair or remove",
        ),
        (
            "cdi-files",
            |fake| fake.file("var/run/cdi/a.yaml", CDI),
            Failed,
            "which a.yaml defines, too",
            "repair or remove",
        ),
        ("cdi-files", |fake| fake.remove_file("var/run/cdi/nvidia.com-pgpu.yaml"), NotApplicable, "none", ""),
        (
            "kata-runtime",
            |fake| fake.file("etc/containerd/config.toml", "version = 3\n"),
            Warning,
            "No handler of Kata",
            "kata-deploy",
        ),
        ("kata-runtime", |fake| fake.remove_file("etc/containerd/config.toml"), Warning, "is not there", "kata-deploy"),
        ("kata-runtime", |fake| fake.file("etc/containerd/config.toml", "="), Warning, "Is no TOML", "config dump"),
    ];
    for (id, plant, result, evidence, cure) in cases {
        let fake = healthy();
        plant(&fake);
        let found = findings(&fake, Get::Answers).remove(id).unwrap();
        assert_eq!(found.result, *result, "{found:?}");
        assert!(found.evidence.iter().any(|line| line.contains(evidence)), "{evidence:?} is not in {found:?}");
        assert_eq!(found.cure.is_some(), matches!(found.result, Warning | Failed), "{found:?}");
        assert!(found.cure.as_deref().unwrap_or_default().contains(cure), "{cure:?} is not in {found:?}");
    }
    // The firewall and the kubelet's answer are planted otherwise, below.
    for check in &CHECKS {
        let planted =
            cases.iter().any(|case| case.0 == check.id) || ["gpu-firewall", "pod-resources-get"].contains(&check.id);
        assert!(planted, "no cause is planted for {}", check.id);
    }
}

#[test]
fn a_firewall_is_open_or_closed() {
    let fake = healthy();
    // A DVSEC(10de, 0) at 0xaf0, as GB10x has it (gpu-cc-protocol section 10.1).
    let gpu = fake.below(PORT).gpu("0000:42:00.0", 0x2901).group(6).patch_config(0x2f0, &0xaf01_0003_u32.to_le_bytes());
    gpu.patch_config(0xaf0, &0x0001_0023_u32.to_le_bytes()).patch_config(0xaf4, &[0xde, 0x10, 0, 0, 0, 0]);
    let result = || findings(&fake, Get::Answers)["gpu-firewall"].result;
    assert_eq!(result(), Outcome::Ok);
    gpu.patch_config(0xaf8, &[0, 0, 0x10, 0]);
    assert_eq!(result(), Outcome::Failed);
}

#[test]
fn the_kubelets_answer_is_judged() {
    let fake = healthy();
    let message = || "PodResources API Get method disabled".to_owned();
    for (get, result, words) in [
        (Get::Answers, Outcome::Ok, "answers"),
        (Get::Disabled { message: message() }, Outcome::Failed, "Get method disabled"),
        (Get::Fails { message: "x".into() }, Outcome::Warning, "No answer: x"),
        (Get::NotAsked { cause: "x".into() }, Outcome::NotApplicable, "Not asked: x"),
    ] {
        let found = findings(&fake, get).remove("pod-resources-get").unwrap();
        assert_eq!(found.result, result);
        assert!(found.evidence[0].contains(words), "{found:?}");
        let names_the_gate = found.cure.is_some_and(|cure| cure.contains("KubeletPodResourcesGet=true"));
        assert_eq!(names_the_gate, result == Outcome::Failed);
    }
}

/// A kubelet whose `Get` says this.
struct Kubelet(&'static str);

#[tonic::async_trait]
impl pr::pod_resources_lister_server::PodResourcesLister for Kubelet {
    async fn list(
        &self,
        _: Request<pr::ListPodResourcesRequest>,
    ) -> Result<Response<pr::ListPodResourcesResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn get_allocatable_resources(
        &self,
        _: Request<pr::AllocatableResourcesRequest>,
    ) -> Result<Response<pr::AllocatableResourcesResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn get(
        &self,
        _: Request<pr::GetPodResourcesRequest>,
    ) -> Result<Response<pr::GetPodResourcesResponse>, Status> {
        Err(Status::unknown(self.0))
    }
}

#[test]
fn a_kubelet_is_really_asked() {
    for (says, disabled) in [
        ("pod ccnode-doctor-asks in namespace default not found", false),
        ("PodResources API Get method disabled", true),
    ] {
        let fake = healthy();
        let path = fake.path().join(POD_RESOURCES);
        let (up, is_up) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = kubelet_api::socket::listen(&path).unwrap();
                up.send(()).unwrap();
                let service = pr::pod_resources_lister_server::PodResourcesListerServer::new(Kubelet(says));
                let router = tonic::transport::Server::builder().add_service(service);
                kubelet_api::socket::serve(router, listener, std::future::pending()).await.unwrap();
            });
        });
        is_up.recv().unwrap();
        let get = Facts::read(&Source::open(fake.path()).unwrap()).get;
        assert_eq!(get, if disabled { Get::Disabled { message: says.into() } } else { Get::Answers });
    }
}

/// Exit code, standard output, standard error.
fn doctor(root: &Path, more: &[&str], colour: bool) -> (u8, String, String) {
    let args = [&["ccnode", "doctor", "--root", root.to_str().unwrap()], more].concat();
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let code = ccnode::run(&Args::try_parse_from(args).unwrap(), &mut out, &mut notes, colour);
    (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
}

#[test]
fn the_exit_code_tells_the_outcome() {
    let fake = healthy();
    fake.remove_file(POD_RESOURCES);
    let (code, out, notes) = doctor(fake.path(), &[], false);
    assert_eq!((code, notes.as_str()), (1, ""), "{out}");
    assert!(out.ends_with("1 failed, 0 warnings, 24 ok, 3 not applicable\n"), "{out}");
    assert!(!out.contains('\u{1b}'));

    let (code, out, _) = doctor(fake.path(), &["--json"], true);
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["schema"], &answer["gpus"]), (1, &1.into(), &1.into()));
    assert_eq!(answer["summary"], serde_json::json!({"ok": 24, "warning": 0, "failed": 1, "not_applicable": 3}));
    let ids: Vec<&str> =
        answer["checks"].as_array().unwrap().iter().map(|check| check["id"].as_str().unwrap()).collect();
    assert_eq!(ids, CHECKS.iter().map(|check| check.id).collect::<Vec<_>>());

    let empty = tempfile::tempdir().unwrap();
    let (code, out, notes) = doctor(empty.path(), &[], false);
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(notes.starts_with("ccnode: "), "{notes}");
}

#[test]
fn a_node_that_is_ready_ends_with_0_and_so_does_one_without_gpus() {
    let hgx = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/hgx-h100");
    let (code, out, _) = doctor(&hgx, &[], false);
    assert_eq!(code, 0, "{out}");
    let fake = FakeSysfs::new();
    let (code, out, notes) = doctor(fake.path(), &[], false);
    assert_eq!(
        (code, out.as_str(), notes.as_str()),
        (0, "No NVIDIA GPU on this node: there is nothing to check\n", "")
    );
    let (code, out, _) = doctor(fake.path(), &["--json"], false);
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["gpus"], &answer["checks"]), (0, &0.into(), &serde_json::json!([])));
}

#[test]
fn a_node_that_cannot_be_read_is_no_node_without_gpus() {
    for blind in [
        |fake: &FakeSysfs| std::fs::remove_dir_all(fake.path().join("sys/bus")).unwrap(),
        |fake: &FakeSysfs| {
            _ = fake.gpu(GPU, 0x2330).remove_attr("device").remove_attr("class");
        },
        |fake: &FakeSysfs| _ = fake.gpu(GPU, 0x2330).attr("vendor", [0xff]),
    ] {
        let fake = FakeSysfs::new();
        blind(&fake);
        for more in [&[][..], &["--json"]] {
            let (code, out, notes) = doctor(fake.path(), more, false);
            assert_eq!((code, out.as_str()), (2, ""));
            assert!(notes.starts_with("ccnode: Cannot tell which GPUs this node has: sys/bus/pci/devices"), "{notes}");
        }
    }
}

#[test]
fn colour_is_for_terminals_and_what_files_say_has_no_control_characters() {
    let fake = healthy();
    fake.get(GPU).attr("numa_node", "\u{1b}[2J");
    fake.process(5, "evil\u{1b}[2J", "0::/\n", &["/dev/vfio/devices/vfio0"]);
    let (_, out, _) = doctor(fake.path(), &[], false);
    assert!(!out.contains('\u{1b}'), "{out}");
    let (_, out, _) = doctor(fake.path(), &[], true);
    assert!(out.contains("\u{1b}[32mok     \u{1b}[0m") && !out.contains("\u{1b}[2J"), "{out}");
}

#[test]
fn every_check_is_explained_and_documented() {
    let document = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/doctor.md")).unwrap();
    for check in &CHECKS {
        assert!(document.contains(&format!("| `{}` |", check.id)), "{} is not in docs/doctor.md", check.id);
        let (code, out, _) = doctor(Path::new("/"), &["--explain", check.id], false);
        assert_eq!(code, 0);
        assert!(out.starts_with(&format!("{}: {}\n\n", check.id, check.title)) && out.len() > 80, "{out}");
        assert!(!out.contains("  "), "{out}");
    }
    let (code, _, notes) = doctor(Path::new("/"), &["--explain", "luck"], false);
    assert_eq!(code, 2);
    assert!(notes.contains("There is no check \"luck\"; there are: tee, iommu"), "{notes}");
}

#[test]
fn every_chip_and_product_of_the_table_is_in_the_hardware_document() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = std::fs::read_to_string(folder.join("../../docs/hardware.md")).unwrap();
    let table = std::fs::read_to_string(folder.join("../hw-probe/data/devices.csv")).unwrap();
    let heads: Vec<&str> = table.lines().next().unwrap().split(',').collect();
    let column = |name: &str| heads.iter().position(|head| *head == name).unwrap();
    let (name, arch, chip) = (column("name"), column("arch"), column("chip"));
    let mut rows = 0;
    for line in table.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        rows += 1;
        if matches!(cells[arch], "hopper" | "blackwell" | "laguna" | "limerock") {
            assert!(document.contains(&cells[chip].to_uppercase()), "{line}");
            assert!(cells[name].starts_with("Generic-") || document.contains(cells[name]), "{line}");
        }
    }
    assert!(document.contains(&format!(": {rows} rows")), "{rows} rows");
}
