//! `ccnode cleanup` over fake trees and a stand-in of the API server.

#![allow(clippy::panic, clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use agent_core::hostfile::HostDir;
use agent_core::state::{BindingRecord, BindingsFile, DevicesFile, Identity, Origin, Transition, state_dir};
use ccnode::args::{Args, Command};
use ccnode::cleanup;
use ccnode::mode::Terminal;
use clap::Parser as _;
use gpu_firmware::{DeviceLock, Places};
use hw_probe::testing::FakeSysfs;
use jiff::Timestamp;
use lab_kube::api_server::{ApiServer, ApiServerConfig, Fault, FaultAction, Rule};
use node_object::{annotations, labels};

const A: &str = "0000:41:00.0";
const BOOT: &str = "11111111-2222-4333-8444-555555555555";
const NODE: &str = "gpu-7";
const VFIO: &str = "nvidia.com/gpu.deploy.vfio-manager";
const KATA: &str = "nvidia.com/gpu.deploy.kata-sandbox-device-plugin";
const READINESS: &str = "run/nvidia/validations/.cc-manager-ctr-ready";

const FEATURES: &str = "etc/kubernetes/node-feature-discovery/features.d";
const VALIDATIONS: &str = "run/nvidia/validations";
/// As the device plugin writes it.
const CDI: &str = "---\ncdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices:\n    - name: \"0000:41:00.0\"\n      \
    containerEdits:\n        deviceNodes:\n            - path: /dev/vfio/12\n";

/// A node whose cc-manager was killed in the middle of a change and taken away.
struct Bench {
    fake: FakeSysfs,
    api: ApiServer,
}

impl Bench {
    fn new() -> Self {
        let fake = FakeSysfs::new();
        fake.gpu(A, 0x2330).group(12).driver("vfio-pci");
        fake.file("proc/sys/kernel/hostname", NODE);
        fake.process(1, "init", "", &[]);
        fs::create_dir_all(fake.path().join("proc/1/ns")).unwrap();
        std::os::unix::fs::symlink("pid:[4026531836]", fake.path().join("proc/1/ns/pid")).unwrap();
        let api = ApiServer::start(ApiServerConfig::default()).unwrap();
        let labels = [
            (labels::CC_MODE, "on"),
            (labels::CC_MODE_STATE, "off"),
            (labels::CC_READY_STATE, ""),
            (VFIO, "paused-for-cc-mode-change"),
            (KATA, "pre-installed_paused-for-cc-mode-change"),
            ("nvidia.com/gpu.deploy.sandbox-validator", "false"),
            ("example.com/other", "stays"),
        ];
        api.add_node(NODE, &labels).unwrap();
        for name in [annotations::CC_STATUS, annotations::TRANSITION, "example.com/other"] {
            api.set_annotation(NODE, name, Some("{}")).unwrap();
        }
        let token = api.add_identity("person", &[], Rule::cluster_admin());
        fs::write(fake.path().join("kubeconfig"), api.kubeconfig(&token, "127.0.0.1")).unwrap();
        let (target, step, started_at) = ("on".to_owned(), "changing".to_owned(), Timestamp::now());
        let transition = Some(Transition { target, step, started_at });
        let bench = Self { fake, api };
        let dir = bench.dir();
        DevicesFile { origin: Origin::now(BOOT, None), transition, devices: Vec::new() }.store(&dir).unwrap();
        for name in ["transitions.jsonl", ".devices.json.7.0000abcd.0.tmp", "somebody-elses"] {
            dir.write_atomic(name, b"", 0o644).unwrap();
        }
        let units = bench.fake.path().join("var/lib/kubelet/device-plugins/ccnode");
        HostDir::open(units).unwrap().write_atomic("units.json", b"", 0o644).unwrap();
        for folder in [VALIDATIONS, FEATURES, "var/run/cdi", "etc/cdi"] {
            HostDir::open(bench.fake.path().join(folder)).unwrap();
        }
        bench.fake.file(READINESS, "");
        bench
    }

    fn dir(&self) -> HostDir {
        HostDir::open(state_dir(self.fake.path())).unwrap()
    }

    /// vfio-manager's record of the GPU.
    fn taken(&self, boot: &str) {
        let taken = BindingRecord {
            bdf: A.parse().unwrap(),
            identity: Identity::default(),
            driver: Some("nvidia".into()),
            driver_override: None,
            taken_at: Timestamp::now(),
        };
        BindingsFile { origin: Origin::now(boot, None), devices: vec![taken] }.store(&self.dir()).unwrap();
    }

    /// Exit code, standard output and standard error.
    fn run(&self, terminal: &Terminal, line: &[&str]) -> (u8, String, String) {
        let (root, kubeconfig) = (self.fake.path(), self.fake.path().join("kubeconfig"));
        let common =
            ["ccnode", "cleanup", "--root", root.to_str().unwrap(), "--kubeconfig", kubeconfig.to_str().unwrap()];
        let args = Args::try_parse_from([&common, line].concat()).unwrap();
        let Command::Cleanup(args) = &args.command else { panic!("another command") };
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        let code = cleanup::run(args, &mut out, &mut notes, terminal).unwrap_or_else(|error| {
            notes.extend(format!("{error:#}\n").into_bytes());
            ccnode::COULD_NOT_RUN
        });
        (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
    }

    fn clean(&self, line: &[&str]) -> (u8, String, String) {
        self.run(&Terminal::default(), &[line, &["--yes"]].concat())
    }

    /// Everything that a cleanup could change.
    fn all(&self) -> (BTreeMap<String, String>, BTreeMap<String, String>, Vec<PathBuf>) {
        let mut files: Vec<PathBuf> = ["run/nvidia/ccnode", "run/nvidia/validations"]
            .iter()
            .flat_map(|folder| fs::read_dir(self.fake.path().join(folder)).unwrap())
            .map(|entry| entry.unwrap().path().strip_prefix(self.fake.path()).unwrap().to_owned())
            .collect();
        files.sort_unstable();
        (self.api.labels(NODE), self.api.annotations(NODE), files)
    }
}

#[test]
fn what_we_left_goes_and_what_others_said_stays() {
    let bench = Bench::new();
    let (code, out, notes) = bench.clean(&[]);
    assert_eq!(code, 0, "{out}{notes}");
    let (labels, annotations, files) = bench.all();
    let expected = [
        (labels::CC_MODE, "on"),
        (labels::CC_READY_STATE, ""),
        (VFIO, "true"),
        (KATA, "pre-installed"),
        ("nvidia.com/gpu.deploy.sandbox-validator", "false"),
        ("example.com/other", "stays"),
    ];
    assert_eq!(labels, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    assert_eq!(annotations.keys().collect::<Vec<_>>(), ["example.com/other"]);
    assert_eq!(files, [PathBuf::from("run/nvidia/ccnode/somebody-elses")]);
    assert!(notes.contains("A change to mode on was cut short"), "{notes}");
    assert!(out.contains(&format!("label {VFIO}: \"paused-for-cc-mode-change\" -> \"true\"")), "{out}");
    assert_eq!(bench.api.count("patch", "nodes"), 1, "all in one patch");
    // Twice is once.
    let (code, out, notes) = bench.clean(&[]);
    assert_eq!((code, out.as_str(), notes.as_str()), (0, "Nothing to clean up\n", ""));
    assert_eq!(bench.api.count("patch", "nodes"), 1);
}

#[test]
fn nothing_is_done_before_somebody_has_said_yes() {
    let bench = Bench::new();
    let before = bench.all();
    let (code, out, _) = bench.run(&Terminal::default(), &["--dry-run"]);
    assert_eq!(code, 0, "{out}");
    let files = ["devices.json", "transitions.jsonl", ".tmp", "device-plugins/ccnode/units.json", READINESS];
    for words in ["annotation ccnode.dev/cc-status: removed"].iter().chain(&files) {
        assert!(out.contains(words), "{words}: {out}");
    }
    let (code, _, notes) = bench.run(&Terminal::default(), &[]);
    assert_eq!((code, notes.contains("--yes")), (2, true), "{notes}");
    let no = Terminal { ask: Some(|| Ok("n\n".to_owned())), live: false };
    let (code, _, notes) = bench.run(&no, &[]);
    assert_eq!((code, notes.contains("Not confirmed")), (2, true), "{notes}");
    assert_eq!(bench.all(), before);
    let yes = Terminal { ask: Some(|| Ok("y\n".to_owned())), live: false };
    assert_eq!(bench.run(&yes, &[]).0, 0);
    assert_ne!(bench.all(), before);
}

#[test]
fn while_anybody_is_at_work_nothing_is_done() {
    for name in ["cc-manager", "k8s-cc-manager", "vfio-manager", "device-plugin"] {
        let bench = Bench::new();
        let before = bench.all();
        bench.fake.process(7, name, "", &[]);
        for line in [&[][..], &["--force"], &["--offline"]] {
            let (code, _, notes) = bench.clean(line);
            assert_eq!((code, notes.contains(&format!("Process 7 is {name}"))), (2, true), "{notes}");
        }
        assert_eq!(bench.all(), before);
    }
    // Where not every process is seen, somebody must answer for it.
    let bench = Bench::new();
    fs::remove_file(bench.fake.path().join("proc/1/ns/pid")).unwrap();
    let (code, _, notes) = bench.clean(&[]);
    assert_eq!((code, notes.contains("hostPID")), (2, true), "{notes}");
    // A device that is being changed by `ccnode mode set`.
    let places = Places::at(bench.fake.root(), "ccnode mode set");
    let lock = DeviceLock::take(A.parse().unwrap(), &places).unwrap();
    let before = bench.all();
    let (code, _, notes) = bench.clean(&["--force"]);
    assert_eq!((code, notes.contains("Locked by pid") && notes.contains(A)), (2, true), "{notes}");
    assert_eq!(bench.all(), before);
    drop(lock);
    assert_eq!(bench.clean(&["--force"]).0, 0);
    assert!(state_dir(bench.fake.path()).join("locks").join(A).exists(), "a lock on a removed file excludes nobody");
}

#[test]
fn the_record_of_former_drivers_is_kept_while_it_is_needed() {
    let bench = Bench::new();
    let there = |bench: &Bench| bench.dir().exists("bindings.json").unwrap();
    bench.taken(BOOT);
    let (code, out, notes) = bench.clean(&[]);
    assert_eq!(code, 0, "{out}{notes}");
    assert!(there(&bench) && notes.contains("bindings.json is kept: 0000:41:00.0 is still on VFIO"), "{notes}");
    bench.dir().write_atomic("bindings.json", b"{", 0o644).unwrap();
    let (code, _, notes) = bench.clean(&[]);
    assert_eq!((code, there(&bench), notes.contains("is kept")), (0, true, true), "{notes}");
    assert_eq!(bench.clean(&["--force"]).0, 0);
    assert!(!there(&bench));
    // Of another boot, and of a device that was given back, it says nothing any more.
    bench.taken("another");
    assert_eq!((bench.clean(&[]).0, there(&bench)), (0, false));
    bench.taken(BOOT);
    bench.fake.get(A).driver("nvidia");
    assert_eq!((bench.clean(&[]).0, there(&bench)), (0, false));
    assert_eq!(bench.fake.get(A).read("driver_override").trim(), "(null)", "no binding is changed");
}

#[test]
fn another_machines_node_object_is_left_alone() {
    let bench = Bench::new();
    bench.fake.file("proc/sys/kernel/hostname", "laptop");
    let before = bench.all();
    let (code, _, notes) = bench.clean(&["--node", NODE]);
    assert_eq!((code, notes.contains("Nothing here says that this machine is node gpu-7")), (2, true), "{notes}");
    let (code, _, notes) = bench.clean(&["--node", "gpu-8"]);
    assert_eq!((code, notes.contains("gpu-8 does not exist")), (2, true), "{notes}");
    assert_eq!(bench.all(), before);
    // The boot id proves it, whatever the name.
    let status = format!("{{\"schema\":1,\"bootId\":\"{BOOT}\"}}");
    bench.api.set_annotation(NODE, annotations::CC_STATUS, Some(&status)).unwrap();
    assert_eq!(bench.clean(&["--node", NODE]).0, 0);
    assert_eq!(bench.api.labels(NODE)[VFIO], "true");
}

#[test]
fn the_state_labels_of_somebody_else_are_left_alone() {
    let bench = Bench::new();
    for name in [annotations::CC_STATUS, annotations::TRANSITION] {
        bench.api.set_annotation(NODE, name, None).unwrap();
    }
    assert_eq!(bench.clean(&[]).0, 0);
    let labels = bench.api.labels(NODE);
    assert_eq!((labels[labels::CC_MODE_STATE].as_str(), labels[VFIO].as_str()), ("off", "true"));
}

#[test]
fn what_fails_is_named_and_the_rest_is_done() {
    let bench = Bench::new();
    // Nobody answers: nothing is begun, unless the host alone is asked for.
    bench.api.set_down(true);
    let before = bench.all();
    let (code, _, notes) = bench.clean(&[]);
    assert_eq!((code, notes.contains("--offline")), (2, true), "{notes}");
    assert_eq!(bench.all(), before);
    bench.api.set_down(false);
    // The patch is refused: the files go, and the exit code says that the node object is left.
    bench.api.inject(Fault::new(FaultAction::Status { code: 403, retry_after: None }).verb("patch"));
    let (code, out, notes) = bench.clean(&[]);
    assert_eq!(code, 1, "{out}{notes}");
    assert!(
        out.ends_with("Not everything could be cleaned up\n") && notes.contains("forbids us to patch node"),
        "{notes}"
    );
    let after = bench.all();
    assert_eq!((&after.0, &after.1), (&before.0, &before.1));
    assert_eq!(after.2, [PathBuf::from("run/nvidia/ccnode/somebody-elses")]);
    bench.api.clear_faults();
    assert_eq!(bench.clean(&[]).0, 0);
    assert_eq!(bench.api.labels(NODE)[VFIO], "true");
}

#[test]
fn the_host_alone_is_cleaned_up_without_an_api_server() {
    let bench = Bench::new();
    let before = bench.all();
    let (code, out, _) = bench.clean(&["--offline"]);
    assert_eq!((code, out.contains("node gpu-7")), (0, false), "{out}");
    let after = bench.all();
    assert_eq!((&after.0, &after.1, after.2.len()), (&before.0, &before.1, 1));
    assert!(bench.api.requests().is_empty());
}

#[test]
fn agents_that_are_ending_are_waited_for() {
    let bench = Bench::new();
    bench.fake.process(7, "cc-manager", "", &[]);
    let process = bench.fake.path().join("proc/7");
    let (code, _, notes) = bench.clean(&["--wait", "10ms"]);
    assert_eq!((code, notes.contains("Process 7 is cc-manager")), (2, true), "{notes}");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(300));
            fs::remove_dir_all(process).unwrap();
        });
        let (code, out, notes) = bench.clean(&["--wait", "10m"]);
        assert_eq!(code, 0, "{out}{notes}");
    });
}

#[test]
fn a_pod_knows_its_node_also_where_nothing_of_ours_is_left_on_it() {
    let bench = Bench::new();
    bench.fake.file("proc/sys/kernel/hostname", "pod");
    let line = ["--node", NODE, "--node-is-here"];
    assert_eq!(bench.clean(&line).0, 0);
    let after = bench.all();
    assert_eq!(after.1.keys().collect::<Vec<_>>(), ["example.com/other"]);
    // Begun anew, as a pod is whose node came back.
    let (code, out, notes) = bench.clean(&line);
    assert_eq!((code, out.as_str()), (0, "Nothing to clean up\n"), "{notes}");
    let (code, _, notes) = bench.clean(&line[..2]);
    assert_eq!((code, notes.contains("Nothing here says")), (2, true), "{notes}");
}

#[test]
fn nodes_that_are_not_clean_are_waited_for_and_named() {
    let bench = Bench::new();
    bench.api.add_node("gpu-8", &[]).unwrap();
    bench.api.add_node("gpu-9", &[]).unwrap();
    bench.api.set_annotation("gpu-9", annotations::CC_STATUS, Some("{}")).unwrap();
    let wait = |time: &str| bench.run(&Terminal::default(), &["--await-nodes", "--wait", time]);
    let before = bench.all();
    let (code, out, notes) = wait("1ms");
    let told = "gpu-7 is not cleaned up; run ccnode cleanup on it\ngpu-9 is not cleaned up; run ccnode cleanup on it\n";
    assert_eq!((code, out.as_str()), (1, told), "{notes}");
    assert_eq!(bench.all(), before, "it cleans up nothing itself");
    assert_eq!(bench.clean(&[]).0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // After the first answer.
            bench.api.wait_for(std::time::Duration::from_mins(1), |view| {
                let lists = view.requests().iter().filter(|record| record.verb == "list" && record.resource == "nodes");
                (lists.count() > 2).then_some(())
            });
            bench.api.set_annotation("gpu-9", annotations::CC_STATUS, None).unwrap();
        });
        let (code, out, notes) = wait("10m");
        assert_eq!((code, out.as_str()), (0, "Every node is cleaned up\n"), "{notes}");
    });
    // Nobody who answers knows.
    bench.api.set_down(true);
    let (code, _, notes) = wait("1ms");
    assert_eq!((code, notes.contains("it is not known which nodes are cleaned up")), (2, true), "{notes}");
}

/// The names in a folder.
fn names(bench: &Bench, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(bench.fake.path().join(folder)).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

#[test]
fn files_of_ours_in_folders_of_all_go_and_others_of_the_same_name_stay() {
    let bench = Bench::new();
    let other = CDI.replace("/dev/vfio/12", "/dev/nvidia0").replace("pgpu", "gpu");
    let switches = CDI.replace("pgpu", "nvswitch");
    let workload = format!("{VALIDATIONS}/workload-type");
    let ready = format!("{VALIDATIONS}/vfio-pci-ready");
    for (path, text) in [
        ("var/run/cdi/nvidia.com-pgpu.yaml", CDI),
        ("var/run/cdi/.nvidia.com-pgpu.yaml.7.0000abcd.0.tmp", ""),
        ("var/run/cdi/nvidia.com-gpu.yaml", &other),
        ("var/run/cdi/nvidia.yaml", CDI),
        ("etc/cdi/nvidia.com-nvswitch.yaml", &switches),
        (&format!("{FEATURES}/ccnode"), "# Written by ccnode\nccnode.dev/gpu.count=1\n"),
        (&format!("{FEATURES}/.ccnode.7.0000abcd.0.tmp"), ""),
        (&format!("{FEATURES}/others"), "# Written by ccnode\n"),
        (&workload, "vm-passthrough\n"),
        (&ready, ""),
    ] {
        bench.fake.file(path, text);
    }
    let (code, out, notes) = bench.clean(&[]);
    assert_eq!((code, notes.matches("warning").count()), (0, 0), "{out}{notes}");
    assert_eq!(names(&bench, "var/run/cdi"), ["nvidia.com-gpu.yaml", "nvidia.yaml"]);
    assert!(names(&bench, "etc/cdi").is_empty());
    assert_eq!(names(&bench, FEATURES), ["others"]);
    assert_eq!(names(&bench, VALIDATIONS), ["vfio-pci-ready", "workload-type"], "they may be the validator's");
    // What somebody else has put in the place of ours.
    bench.fake.file(format!("{FEATURES}/ccnode"), "example.com/x=1\n");
    bench.fake.file(&workload, "container\n");
    let (code, out, notes) = bench.clean(&["--status-files"]);
    assert_eq!(code, 0, "{out}{notes}");
    assert_eq!(
        (names(&bench, VALIDATIONS), names(&bench, FEATURES)),
        (vec!["workload-type".into()], vec!["ccnode".into(), "others".into()])
    );
    bench.fake.file(&workload, "vm-passthrough\n");
    assert_eq!(bench.clean(&["--status-files"]).0, 0);
    assert!(names(&bench, VALIDATIONS).is_empty());
    // A folder that anybody may write to is named, and the rest is done.
    bench.fake.file(READINESS, "");
    bench.fake.file("var/run/cdi/nvidia.com-pgpu.yaml", CDI);
    let folder = bench.fake.path().join("var/run/cdi");
    fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let (code, _, notes) = bench.clean(&[]);
    assert_eq!((code, notes.contains("var/run/cdi") && notes.contains("is kept")), (0, true), "{notes}");
    assert!(names(&bench, VALIDATIONS).is_empty() && folder.join("nvidia.com-pgpu.yaml").exists());
}
