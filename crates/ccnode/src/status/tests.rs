use std::collections::BTreeMap;
use std::sync::Arc;

use agent_core::hostfile::HostDir;
use agent_core::state::{
    BindingRecord, BindingsFile, CcStatus, DEVICES_FILE, DeviceRecord, DeviceStatus, DevicesFile, FileProblem,
    Identity, Origin, Transition, UNITS_DIR, UNITS_FILE, UnitRecord, UnitsFile, state_dir,
};
use hw_probe::Inventory;
use hw_probe::testing::FakeSysfs;
use jiff::SignedDuration;
use node_object::{NodeState, annotations};
use serde_json::{Value, json};

use super::facts::{Manager, NodeFacts};
use super::judge::NO_PROOF;
use super::*;
use crate::agents::Agent;

const A: &str = "0000:41:00.0";
const B: &str = "0000:42:00.0";
const BOOT: &str = "11111111-2222-4333-8444-555555555555";
const VFIO: &str = "nvidia.com/gpu.deploy.vfio-manager";

fn now() -> Timestamp {
    "2026-05-04T12:00:00Z".parse().unwrap()
}

fn ago(seconds: i64) -> Timestamp {
    now() - SignedDuration::from_secs(seconds)
}

fn error(code: &str, message: &str) -> ErrorRecord {
    ErrorRecord { code: code.to_owned(), message: message.to_owned() }
}

/// Two GPUs on VFIO that are verified in mode on since three hours, and a node object that says so.
struct Scene {
    fake: FakeSysfs,
    file: Option<DevicesFile>,
    status: Option<CcStatus>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    manager: Manager,
    /// What a person without the host's files goes by.
    remote: bool,
    answer: Option<Answer>,
}

impl Scene {
    fn new(mode: &str) -> Self {
        let fake = FakeSysfs::new();
        for (number, bdf) in [(12, A), (13, B)] {
            fake.gpu(bdf, 0x2330).group(number).driver("vfio-pci");
        }
        let record = |gpu: &PciFunction| DeviceRecord {
            bdf: gpu.bdf,
            identity: Identity::of(gpu),
            configured_mode: Some(mode.to_owned()),
            active_mode: Some(mode.to_owned()),
            verified_at: Some(ago(3 * 3600)),
            usable: true,
            error: None,
        };
        let devices: Vec<DeviceRecord> = Inventory::scan(&fake.root()).gpus().map(record).collect();
        let status = CcStatus {
            schema: 1,
            node_uid: "uid-1".to_owned(),
            boot_id: BOOT.to_owned(),
            wanted: mode.to_owned(),
            result: "applied".to_owned(),
            since: Some(ago(3 * 3600)),
            error: None,
            holders: Vec::new(),
            devices: devices.iter().map(DeviceStatus::from).collect(),
        };
        let origin = Origin { written_at: ago(3 * 3600), ..Origin::now(BOOT, Some("uid-1".to_owned())) };
        let mut scene = Self {
            fake,
            file: Some(DevicesFile { origin, transition: None, devices }),
            status: Some(status),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            manager: Manager::Runs(Agent { pid: 77, name: "cc-manager".to_owned() }),
            remote: false,
            answer: None,
        };
        scene.label(labels::CC_MODE, mode);
        scene.label(labels::CC_MODE_STATE, mode);
        scene.label(labels::CC_READY_STATE, if mode == "off" { "false" } else { "true" });
        scene
    }

    fn label(&mut self, name: &str, value: &str) {
        self.labels.insert(name.to_owned(), value.to_owned());
    }

    fn file(&mut self) -> &mut DevicesFile {
        self.file.as_mut().unwrap()
    }

    fn status(&mut self) -> &mut CcStatus {
        self.status.as_mut().unwrap()
    }

    /// A change to the mode that did not begin, since twelve minutes, because of this.
    fn not_begun(&mut self, wanted: &str, holders: Vec<HolderRecord>) {
        self.label(labels::CC_MODE, wanted);
        let status = self.status();
        (status.wanted, status.result) = (wanted.to_owned(), "not-begun".to_owned());
        (status.since, status.holders) = (Some(ago(12 * 60)), holders);
        status.error = Some(error("InUse", "0000:41:00.0: In use: VFIO group 12 is held; stop the virtual machine"));
    }

    fn facts(&self) -> Facts {
        if let Some(file) = &self.file {
            file.store(&HostDir::open(state_dir(self.fake.path())).unwrap()).unwrap();
        }
        let mut annotations = self.annotations.clone();
        if let Some(status) = &self.status {
            let text = serde_json::to_string(status).unwrap();
            annotations.entry(annotations::CC_STATUS.to_owned()).or_insert(text);
        }
        let (uid, labels) = ("uid-1".to_owned(), self.labels.clone());
        let state = NodeState { uid, labels, annotations, ..NodeState::default() };
        let node = self.answer.clone().unwrap_or_else(|| Answer::Node(Box::new(NodeFacts::of(Arc::new(state)))));
        let host = Host::read(self.fake.path(), &self.fake.root());
        let host = (!self.remote).then(|| Host { manager: self.manager.clone(), ..host });
        Facts { now: now(), host, name: Some("n1".to_owned()), node, remarks: Vec::new() }
    }
}

fn holder(bdf: &str, pid: Option<u32>, pod: Option<&str>) -> HolderRecord {
    let comm = pid.map(|_| "qemu-system-x86".to_owned());
    HolderRecord { bdf: bdf.parse().unwrap(), pid, comm, pod: pod.map(ToOwned::to_owned) }
}

fn line(change: impl FnOnce(&mut Scene)) -> String {
    let mut scene = Scene::new("on");
    change(&mut scene);
    let text = human(&scene.facts());
    text.lines().next().unwrap().to_owned()
}

type Case = (&'static str, fn(&mut Scene), &'static str);

/// What was done to the scene, and the first line that comes of it.
const CASES: &[Case] = &[
    ("all is well", |_| (), "READY 3h: mode on, 2 GPUs verified"),
    ("off is ready, too", |scene| *scene = Scene::new("off"), "READY 3h: mode off, 2 GPUs verified"),
    ("the default is wanted", |scene| drop(scene.labels.remove(labels::CC_MODE)), "READY 3h: mode on, 2 GPUs verified"),
    (
        "a change on the host",
        |scene| {
            let (target, step) = ("off".to_owned(), "changing".to_owned());
            scene.file().transition = Some(Transition { target, step, started_at: ago(40) });
            scene.label(labels::CC_READY_STATE, "");
        },
        "CHANGING 40s: to mode off (changing)",
    ),
    (
        "a change on the node object",
        |scene| {
            let text = json!({"schema": 1, "nodeUid": "uid-1", "bootId": BOOT, "target": "off", "startedAt": ago(41)});
            scene.annotations.insert(annotations::TRANSITION.to_owned(), text.to_string());
        },
        "CHANGING 41s: to mode off",
    ),
    (
        "one of the boot before",
        |scene| {
            let text = json!({"bootId": "earlier", "target": "off", "startedAt": ago(9000)});
            scene.annotations.insert(annotations::TRANSITION.to_owned(), text.to_string());
        },
        "CHANGING 2h: to mode off, begun before this boot; cc-manager finishes it",
    ),
    (
        "one of another node of this name",
        |scene| {
            let text = json!({"nodeUid": "uid-0", "bootId": BOOT, "target": "off", "startedAt": ago(41)});
            scene.annotations.insert(annotations::TRANSITION.to_owned(), text.to_string());
        },
        "READY 3h: mode on, 2 GPUs verified",
    ),
    (
        "a change that was cut short",
        |scene| {
            let (target, step) = ("off".to_owned(), "changing".to_owned());
            scene.file().transition = Some(Transition { target, step, started_at: ago(125) });
            scene.manager = Manager::Gone;
        },
        "NOT READY 2m: a change to mode off was cut short, and cc-manager does not run here; do: start cc-manager, which \
             finishes it, or ccnode cleanup where it is gone for good",
    ),
    (
        "held by a pod",
        |scene| scene.not_begun("off", vec![holder(A, Some(4711), Some("ml/train-0"))]),
        "NOT READY 12m: 0000:41:00.0 held by ml/train-0 (pid 4711); do: kubectl delete pod -n ml train-0, or wait: mode off \
             follows when all are free",
    ),
    (
        "held by processes",
        |scene| scene.not_begun("off", vec![holder(A, Some(4711), None), holder(B, Some(4712), None)]),
        "NOT READY 12m: 0000:41:00.0 and 1 more held by pid 4711 (qemu-system-x86) and 1 other; do: stop what process 4711 \
             is, or wait: mode off follows when all are free",
    ),
    (
        "held by a pod whose name is none",
        |scene| scene.not_begun("off", vec![holder(A, None, Some("ml/$(reboot)"))]),
        "NOT READY 12m: 0000:41:00.0 held by ml/$(reboot); do: stop what uses it, or wait: mode off follows when all are free",
    ),
    (
        "held by somebody whom only this machine shows",
        |scene| {
            scene.fake.process(4713, "qemu-system-x86", "", &["/dev/vfio/13"]);
            scene.not_begun("off", Vec::new());
        },
        "NOT READY 12m: 0000:42:00.0 held by pid 4713 (qemu-system-x86); do: stop what process 4713 is, or wait: mode off \
             follows when all are free",
    ),
    (
        "held by somebody whom nobody sees",
        |scene| scene.not_begun("off", Vec::new()),
        "NOT READY 12m: 0000:41:00.0: In use: VFIO group 12 is held; stop the virtual machine",
    ),
    (
        "a device failed",
        |scene| {
            let status = scene.status();
            (status.result, status.since) = ("failed".to_owned(), Some(ago(3 * 86_400)));
            status.devices[1].error = Some(error("NoBar0", "0000:42:00.0: No BAR0; do this"));
            status.error = Some(error("NoBar0", "Not every device: 0000:42:00.0: No BAR0; do this"));
        },
        "NOT READY 3d: 0000:42:00.0: No BAR0; do this",
    ),
    (
        "a mode that is none",
        |scene| {
            scene.label(labels::CC_MODE, "onn");
            let status = scene.status();
            (status.wanted, status.result) = ("onn".to_owned(), "failed".to_owned());
            status.error = Some(error("UnknownMode", "Label asks for \"onn\"; set it"));
        },
        "NOT READY 3h: Label asks for \"onn\"; set it",
    ),
    (
        "failed without a word",
        |scene| scene.status().result = "failed".to_owned(),
        "NOT READY 3h: mode on is not applied, and cc-manager does not say why; do: see its log",
    ),
    (
        "a label that is not taken up",
        |scene| scene.label(labels::CC_MODE, "off"),
        "CHANGING: the label asks for mode off, and cc-manager still says \"on\"; do: wait for the hold-down and for devices \
             in use, or see cc-manager's log",
    ),
    (
        "a label that nobody takes up",
        |scene| {
            scene.label(labels::CC_MODE, "off");
            scene.manager = Manager::Gone;
        },
        "NOT READY: the label asks for mode off, and cc-manager still says \"on\" and does not run here; do: start cc-manager",
    ),
    (
        "a gate that is shut",
        |scene| scene.label(labels::CC_READY_STATE, ""),
        "NOT READY: every device is in mode on, and label nvidia.com/cc.ready.state says \"\"; do: wait for cc-manager, \
             which puts it right, or see its log",
    ),
    (
        "a gate for the other mode",
        |scene| scene.label(labels::CC_READY_STATE, "false"),
        "NOT READY: every device is in mode on, and label nvidia.com/cc.ready.state says \"false\"; do: wait for cc-manager, \
             which puts it right, or see its log",
    ),
    (
        "a state that was taken away",
        |scene| drop(scene.labels.remove(labels::CC_MODE_STATE)),
        "NOT READY: every device is in mode on, and label nvidia.com/cc.mode.state is absent; do: wait for cc-manager, which \
             puts it right, or see its log",
    ),
    (
        "a component left paused",
        |scene| scene.label(VFIO, "paused-for-cc-mode-change"),
        "NOT READY: nvidia.com/gpu.deploy.vfio-manager is paused although no change is under way; do: wait for cc-manager, \
             which puts it right, or see its log, or ccnode cleanup",
    ),
    (
        "nothing verified in this boot, and nobody to do it",
        |scene| {
            (scene.file, scene.status, scene.manager) = (None, None, Manager::Gone);
        },
        "NOT READY: cc-manager has told nothing of this node, and does not run here; do: start cc-manager",
    ),
    (
        "an agent that is silent",
        |scene| (scene.file, scene.status) = (None, None),
        "NOT READY: cc-manager has told nothing of this node; do: see the log of process 77 (cc-manager), and whether it \
             reaches the API server",
    ),
    (
        "labels of the boot before",
        |scene| {
            scene.status().boot_id = "earlier".to_owned();
            scene.file().origin.boot_id = "earlier".to_owned();
            scene.manager = Manager::NotSeen;
        },
        "NOT READY: cc-manager has told nothing of this boot; do: see whether it runs, and its log",
    ),
    (
        "nothing verified, and no API server",
        |scene| {
            (scene.file, scene.answer) = (None, Some(Answer::NotAsked("why".to_owned())));
            scene.manager = Manager::Gone;
        },
        "NOT READY: no device was verified in this boot, and cc-manager does not run here; do: start cc-manager",
    ),
    (
        "the file is gone under a dead agent",
        |scene| (scene.file, scene.manager) = (None, Manager::Gone),
        "NOT READY: no device was verified in this boot, and cc-manager does not run here; do: start cc-manager",
    ),
    ("the file is not mounted here", |scene| scene.file = None, "READY 3h: mode on, 2 GPUs verified"),
    (
        "no API server",
        |scene| scene.answer = Some(Answer::Failed("refused".to_owned())),
        "READY 3h: mode on, 2 GPUs verified",
    ),
    (
        "an error that only the host tells",
        |scene| {
            scene.file().devices[0].error = Some(error("BootTimeout", "0000:41:00.0: Did not boot; power-cycle"));
        },
        "NOT READY 3h: 0000:41:00.0: Did not boot; power-cycle",
    ),
    (
        "a device that is withheld",
        |scene| scene.file().devices[1].usable = false,
        "NOT READY 3h: 0000:42:00.0 is verified in mode on, which is not what is wanted; do: see cc-manager's log",
    ),
    (
        "a device that was let go",
        |scene| {
            let record = &mut scene.file().devices[1];
            (record.usable, record.verified_at) = (false, None);
        },
        "NOT READY 3h: 0000:42:00.0 is not verified; do: wait for cc-manager, or see its log",
    ),
    (
        "another device at the same address",
        |scene| scene.file().devices[1].identity.instance = Some(1),
        "NOT READY 3h: 0000:42:00.0 is not the device that was verified; do: wait for cc-manager, which looks again",
    ),
    (
        "a device that is new",
        |scene| drop(scene.file().devices.pop()),
        "NOT READY 3h: 0000:42:00.0 was not verified in this boot; do: wait for cc-manager, or see its log",
    ),
    (
        "a device that went",
        |scene| scene.fake.remove(B),
        "NOT READY: 0000:42:00.0 verified in this boot, and not there any more; do: ccnode doctor, and the kernel's log",
    ),
    (
        "all went",
        |scene| {
            scene.fake.remove(A);
            scene.fake.remove(B);
        },
        "NOT READY: 0000:41:00.0 and 1 more verified in this boot, and not there any more; do: ccnode doctor, and the \
             kernel's log",
    ),
    (
        "there was never any",
        |scene| {
            (scene.file, scene.status) = (None, None);
            scene.fake.remove(A);
            scene.fake.remove(B);
        },
        "NOT READY: there is no NVIDIA GPU or NVSwitch on this node; do: ccnode probe",
    ),
    (
        "only observed",
        |scene| {
            scene.status().result = "observed".to_owned();
            scene.status().error = Some(error("Observed", "Would be verified"));
        },
        "UNKNOWN 3h: cc-manager only observes this node (CCNODE_MODE=observe) and answers for nothing: Would be verified",
    ),
    (
        "a word from the future",
        |scene| scene.status().result = "half".to_owned(),
        "UNKNOWN 3h: cc-manager says \"half\", which this version of ccnode does not know; do: use its own",
    ),
    (
        "a schema from the future",
        |scene| scene.status().schema = 9,
        "UNKNOWN: Annotation ccnode.dev/cc-status has schema 9, which this version does not know; do: see cc-manager's log",
    ),
    (
        "words about another node of this name",
        |scene| scene.status().node_uid = "uid-0".to_owned(),
        "NOT READY: cc-manager has told nothing of this node; do: see the log of process 77 (cc-manager), and whether it \
             reaches the API server",
    ),
    ("from afar", |scene| scene.remote = true, "READY 3h: mode on, 2 devices verified"),
    (
        "from afar, held",
        |scene| {
            scene.remote = true;
            scene.not_begun("off", vec![holder(A, Some(1), Some("a/b"))]);
        },
        "NOT READY 12m: 0000:41:00.0 held by a/b (pid 1); do: kubectl delete pod -n a b, or wait: mode off follows when all \
             are free",
    ),
    (
        "from afar, of no device",
        |scene| {
            scene.remote = true;
            scene.status().devices.clear();
        },
        "NOT READY 3h: cc-manager tells of no device; do: ccnode probe on the node",
    ),
    (
        "from afar, and nobody answers",
        |scene| {
            scene.remote = true;
            scene.answer = Some(Answer::Failed("connection refused".to_owned()));
        },
        "UNKNOWN: neither host files nor node object can be seen: connection refused",
    ),
];

#[test]
fn the_first_line_is_the_verdict() {
    for (what, change, expected) in CASES {
        assert_eq!(line(change), *expected, "{what}");
    }
}

#[test]
fn what_cannot_be_read_is_unknown_and_said() {
    for content in ["", "{", "[]", "null", "{\"schema\":1}", "\u{1b}[2J", "{\"schema\":1,\"bootId\":7}"] {
        let mut scene = Scene::new("on");
        scene.file = None;
        HostDir::open(state_dir(scene.fake.path()))
            .unwrap()
            .write_atomic(DEVICES_FILE, content.as_bytes(), 0o644)
            .unwrap();
        let text = human(&scene.facts());
        // What is of no boot is of another.
        if content == "{\"schema\":1}" {
            assert!(text.starts_with("READY"), "{content:?}: {text}");
            continue;
        }
        assert!(text.starts_with("UNKNOWN: what was verified cannot be read: "), "{content:?}: {text}");
        assert!(!text.contains('\u{1b}'));
    }
}

#[test]
fn no_text_of_the_node_object_does_harm() {
    let hostile = "\u{1b}]0;x\u{7}\r\n\u{0}; rm -rf /\n".repeat(3);
    let texts = [
        String::new(),
        "null".to_owned(),
        "7".to_owned(),
        "[".repeat(5000),
        hostile.clone(),
        "{\"schema\":1}".to_owned(),
        "{\"schema\":-1}".to_owned(),
        format!("{{\"schema\":1,\"bootId\":\"{BOOT}\",\"since\":\"9999-12-30T00:00:00Z\",\"result\":\"applied\"}}"),
        json!({"schema": 1, "bootId": BOOT, "wanted": hostile, "result": hostile}).to_string(),
        json!({"schema": 1, "bootId": BOOT, "wanted": "on", "result": "failed",
            "error": {"code": hostile, "message": hostile}})
        .to_string(),
        json!({"schema": 1, "bootId": BOOT, "wanted": "on", "result": "not-begun", "holders": [
            {"bdf": A, "pid": 4_294_967_295_u32, "comm": hostile, "pod": format!("{hostile}/{hostile}")}]})
        .to_string(),
        json!({"target": hostile, "startedAt": "-009999-01-02T01:59:59Z", "bootId": hostile}).to_string(),
    ];
    let names = [annotations::CC_STATUS, annotations::TRANSITION];
    for (name, text) in names.iter().flat_map(|name| texts.iter().map(move |text| (name, text))) {
        for remote in [false, true] {
            let mut scene = Scene::new("on");
            scene.remote = remote;
            scene.annotations.insert((*name).to_owned(), text.clone());
            scene.label(labels::CC_MODE, &hostile);
            let facts = scene.facts();
            let (shown, data) = (human(&facts), as_json(&facts).unwrap());
            let is_clean = |text: &str| text.chars().all(|c| c == '\n' || !c.is_control());
            assert!(is_clean(&shown) && is_clean(&data), "{name} = {text:?}:\n{shown}");
            assert!(!shown.starts_with("READY"), "{name} = {text:?}:\n{shown}");
            let first = shown.lines().next().unwrap();
            assert!(["NOT READY", "CHANGING", "UNKNOWN"].iter().any(|word| first.starts_with(word)), "{first}");
            assert!(!first.contains("kubectl delete"), "{first}");
        }
    }
}

#[test]
fn the_table_tells_each_device() {
    let mut scene = Scene::new("off");
    let pod = "/kubepods.slice/kubepods-pod11111111_2222_4333_8444_555555555555.slice/x.scope";
    scene.fake.process(4711, "qemu-system-x86", "", &["/dev/vfio/12"]);
    scene.fake.process(4712, "qemu-system-x86", &format!("0::{pod}\n"), &["/dev/vfio/13"]);
    scene.fake.get(B).driver("nvidia");
    scene.not_begun("on", vec![holder(A, Some(4711), Some("ml/train-0"))]);
    scene.file().devices[0].error = Some(error("InUse", "0000:41:00.0: In use; stop it"));
    let shown = human(&scene.facts());
    let rows: Vec<Vec<&str>> = shown
        .lines()
        .skip(1)
        .take(3)
        .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect();
    let heads = vec!["BDF", "PRODUCT", "DRIVER", "CONFIGURED", "ACTIVE", "VERIFIED", "OFFERED", "HELD BY", "ERROR"];
    let first = vec![A, "H100 SXM", "vfio-pci", "off", "off", "3h ago", "yes", "ml/train-0 (pid 4711)", "InUse"];
    assert_eq!(rows[..2], [heads, first]);
    assert_eq!(rows[2][..7], [B, "H100 SXM", "nvidia", "off", "off", "3h ago", "no"]);
    assert!(rows[2][7].starts_with("pod 11111111-2222") && rows[2][7].ends_with("(pid 4712)"), "{shown}");
    let below: Vec<&str> = shown.lines().skip(4).collect();
    assert_eq!(
        below,
        [
            "0000:41:00.0: In use; stop it",
            "note: Label nvidia.com/cc.ready.state says \"false\" meanwhile: pods come here by it"
        ],
        "{shown}"
    );
}

#[test]
fn the_example_of_the_documentation_is_the_real_one() {
    let mut scene = Scene::new("off");
    scene.fake.process(4711, "qemu-system-x86", "", &["/dev/vfio/12"]);
    scene.not_begun("on", vec![holder(A, Some(4711), Some("ml/train-0"))]);
    let message = "0000:41:00.0: In use: VFIO group 12 is held by pid 4711 (qemu-system-x86); stop the virtual machine or program \
                   that uses the GPU, or bind the GPU to vfio-pci if a driver does";
    scene.file().devices[0].error = Some(error("InUse", message));
    let shown = human(&scene.facts());
    let page = include_str!("../../../../docs/status.md");
    assert!(page.contains(&format!("```\n{shown}```\n")), "docs/status.md does not show this:\n{shown}");
}

#[test]
fn the_notes_tell_what_the_verdict_goes_without() {
    let notes = |change: fn(&mut Scene)| {
        let mut scene = Scene::new("on");
        change(&mut scene);
        let text = human(&scene.facts());
        text.lines().filter_map(|line| line.strip_prefix("note: ").map(ToOwned::to_owned)).collect::<Vec<_>>()
    };
    // Wherever pods come by the label, and nowhere else.
    assert_eq!(notes(|_| ()), [NO_PROOF]);
    let cases: &[Case] = &[
        (
            "a dead agent",
            |scene| scene.manager = Manager::Gone,
            "cc-manager does not run here: nothing keeps this node in its mode",
        ),
        (
            "no file",
            |scene| scene.file = None,
            "devices.json is not to be seen here: modes are those of the node object",
        ),
        (
            "an old word",
            |scene| {
                scene.status().boot_id = "earlier".to_owned();
                scene.label(labels::CC_READY_STATE, "");
            },
            "What the node object says of the devices is of another boot",
        ),
        (
            "a device off VFIO",
            |scene| {
                scene.fake.get(B).driver("nvidia");
            },
            "0000:42:00.0: Not offered: its driver is nvidia, and vfio-manager binds it to VFIO",
        ),
    ];
    for (what, change, note) in cases {
        let told: Vec<String> = notes(*change).into_iter().filter(|note| note != NO_PROOF).collect();
        assert_eq!(told, [*note], "{what}");
    }
}

fn units_dir(scene: &Scene) -> HostDir {
    let folder = kubelet_api::PLUGIN_DIR.trim_start_matches('/');
    HostDir::open(scene.fake.path().join(folder).join(UNITS_DIR)).unwrap()
}

/// What the device plugin of the scene has told.
fn units_file() -> UnitsFile {
    let unit = |bdf: &str, node: &str| UnitRecord {
        resource: "nvidia.com/pgpu".to_owned(),
        id: bdf.to_owned(),
        bdf: bdf.parse().unwrap(),
        functions: vec![bdf.parse().unwrap()],
        nodes: vec![node.to_owned()],
        numa: vec![1],
        healthy: true,
        error: None,
        pod: None,
        remarks: Vec::new(),
    };
    let first = UnitRecord { pod: Some("ml/train-0".to_owned()), ..unit(A, "/dev/vfio/devices/vfio0") };
    let message = format!("{B} does not answer: it is off the bus, or its link is down");
    let second =
        UnitRecord { healthy: false, error: Some(error("dead", &message)), ..unit(B, "/dev/vfio/devices/vfio1") };
    UnitsFile {
        origin: Origin { written_at: ago(60), ..Origin::now(BOOT, None) },
        ids: "pci".to_owned(),
        ids_reason: "no pod has a device under a number".to_owned(),
        pods: "the kubelet's pod-resources service".to_owned(),
        blind: None,
        cdi_problems: Vec::new(),
        units: vec![first, second],
    }
}

#[test]
fn the_units_are_told_as_the_kubelet_was() {
    let scene = Scene::new("on");
    let mut file = units_file();
    file.store(&units_dir(&scene)).unwrap();
    let shown = human(&scene.facts());
    let below: Vec<&str> = shown.lines().skip(4).collect();
    assert_eq!(
        below,
        [
            "",
            "RESOURCE         ID            NODES                    NUMA  HEALTH   POD",
            "nvidia.com/pgpu  0000:41:00.0  /dev/vfio/devices/vfio0  1     healthy  ml/train-0",
            "nvidia.com/pgpu  0000:42:00.0  /dev/vfio/devices/vfio1  1     dead     -",
            "nvidia.com/pgpu 0000:42:00.0: 0000:42:00.0 does not answer: it is off the bus, or its link is down",
            &format!("note: {NO_PROOF}"),
        ],
        "{shown}"
    );
    file.ids = "iommu".to_owned();
    file.ids_reason = "pod x has device 0".to_owned();
    file.blind = Some("no hostPID".to_owned());
    let unreadable = error("cdi-broken", "Kata's Go runtime starts no pod");
    file.cdi_problems.push(FileProblem { path: "/etc/cdi/x.yaml".to_owned(), error: unreadable });
    file.units[0].remarks.push("The link has 4 of 16 lanes".to_owned());
    file.store(&units_dir(&scene)).unwrap();
    let mut facts = scene.facts();
    facts.host.as_mut().unwrap().plugin = Manager::Gone;
    let shown = human(&facts);
    for note in [
        "device-plugin does not run here",
        "0000:41:00.0: The link has 4 of 16 lanes",
        "by numbers: pod x has device 0",
        "in use: no hostPID",
    ] {
        assert!(shown.lines().any(|line| line.starts_with("note: ") && line.contains(note)), "{note}: {shown}");
    }
    let of_file = "/etc/cdi/x.yaml: Kata's Go runtime starts no pod (cdi-broken)";
    assert!(shown.lines().any(|line| line == of_file), "{shown}");
    let told: Value = serde_json::from_str(&as_json(&facts).unwrap()).unwrap();
    let kubelet = &told["kubelet"];
    assert_eq!(
        (&kubelet["answer"], &kubelet["plugin"], &kubelet["ids"]),
        (&json!("read"), &json!("gone"), &json!("iommu"))
    );
    assert_eq!(kubelet["units"][1]["error"]["code"], "dead");
    assert_eq!(kubelet["cdi_problems"][0]["path"], "/etc/cdi/x.yaml");
    assert_eq!(kubelet["cdi_problems"][0]["code"], "cdi-broken");
    assert_eq!(kubelet["units"][0]["pod"], "ml/train-0");
}

#[test]
fn units_that_are_not_seen_are_said_to_be_so() {
    let mut scene = Scene::new("on");
    let notes = |scene: &Scene, plugin: Manager| {
        let mut facts = scene.facts();
        facts.host.as_mut().unwrap().plugin = plugin;
        let text = human(&facts);
        text.lines()
            .filter_map(|line| line.strip_prefix("note: ").map(ToOwned::to_owned))
            .collect::<Vec<_>>()
            .join("; ")
    };
    let runs = || Manager::Runs(Agent { pid: 9, name: "nvidia-sandbox-".to_owned() });
    assert_eq!(notes(&scene, Manager::NotSeen), NO_PROOF);
    assert!(notes(&scene, runs()).contains("nvidia-sandbox- (pid 9) tells the kubelet is not to be seen"));
    // Of another boot, or no file of ours.
    let other = UnitsFile { origin: Origin::now("earlier", None), ..units_file() };
    other.store(&units_dir(&scene)).unwrap();
    assert!(notes(&scene, runs()).contains("is not to be seen"));
    let hostile = "{\"schema\":1,\"bootId\":\"11111111-2222-4333-8444-555555555555\",\"writtenAt\":\"\u{1b}\"}";
    units_dir(&scene).write_atomic(UNITS_FILE, hostile.as_bytes(), 0o644).unwrap();
    assert!(notes(&scene, runs()).contains("cannot be read"));
    scene.remote = true;
    assert!(!human(&scene.facts()).contains("cannot be read"));
}

#[test]
fn no_text_of_the_units_does_harm() {
    let scene = Scene::new("on");
    let hostile = "\u{1b}]0;x\u{7}\r\n\u{0}; rm -rf /\n".repeat(3);
    let mut file = units_file();
    for unit in &mut file.units {
        (unit.resource, unit.id, unit.pod) = (hostile.clone(), hostile.clone(), Some(hostile.clone()));
        (unit.nodes, unit.remarks) = (vec![hostile.clone()], vec![hostile.clone()]);
        unit.error = Some(error(&hostile, &hostile));
    }
    (file.ids_reason, file.pods, file.blind) = (hostile.clone(), hostile.clone(), Some(hostile.clone()));
    file.cdi_problems.push(FileProblem { path: hostile.clone(), error: error(&hostile, &hostile) });
    file.ids = "iommu".to_owned();
    file.store(&units_dir(&scene)).unwrap();
    let facts = scene.facts();
    for text in [human(&facts), as_json(&facts).unwrap()] {
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    }
}

/// Every field of the document, and no other.
#[test]
fn the_document_has_these_fields() {
    let mut scene = Scene::new("off");
    scene.fake.process(4711, "qemu-system-x86", "", &["/dev/vfio/12"]);
    scene.not_begun("on", vec![holder(A, Some(4711), Some("ml/train-0"))]);
    scene.label(VFIO, "paused-for-cc-mode-change");
    let origin = Origin { written_at: ago(60), ..Origin::now(BOOT, None) };
    let taken = BindingRecord {
        bdf: A.parse().unwrap(),
        identity: Identity::default(),
        driver: Some("nvidia".to_owned()),
        driver_override: None,
        taken_at: ago(60),
    };
    let dir = HostDir::open(state_dir(scene.fake.path())).unwrap();
    BindingsFile { origin, devices: vec![taken] }.store(&dir).unwrap();
    let facts = scene.facts();
    let told: Value = serde_json::from_str(&as_json(&facts).unwrap()).unwrap();
    let reason = "0000:41:00.0 held by ml/train-0 (pid 4711); do: kubectl delete pod -n ml train-0, or wait: mode on follows \
                  when all are free";
    let device = |bdf: &str, former: Value, held_by: Value| {
        json!({
            "bdf": bdf, "kind": "gpu", "product": "H100 SXM", "driver": "vfio-pci", "former_driver": former,
            "configured": "off", "active": "off", "verified_at": "2026-05-04T09:00:00Z", "offered": true,
            "held_by": held_by, "error": null,
        })
    };
    let holders = json!([{"bdf": A, "pid": 4711, "comm": "qemu-system-x86", "pod": "ml/train-0"}]);
    assert_eq!(
        told,
        json!({
            "schema": 1,
            "verdict": "not-ready",
            "since": "2026-05-04T11:48:00Z",
            "reason": reason,
            "line": format!("NOT READY 12m: {reason}"),
            "transition": null,
            "node": {
                "name": "n1", "answer": "seen", "trouble": null, "mode": "on", "mode_state": "off", "ready_state": "false",
                "paused": [VFIO], "wanted": "on", "result": "not-begun",
                "error": {"code": "InUse", "message": "0000:41:00.0: In use: VFIO group 12 is held; stop the virtual machine"},
            },
            "host": {
                "boot_id": BOOT, "cc_manager": "runs", "cc_manager_pid": 77, "records": "read",
                "records_at": "2026-05-04T09:00:00Z", "holders_limit": facts.host.as_ref().unwrap().holders.limit,
            },
            "devices": [device(A, "nvidia".into(), holders), device(B, Value::Null, json!([]))],
            "kubelet": {
                "answer": "absent", "trouble": null, "plugin": "not-seen", "written_at": null, "ids": null, "ids_reason": null,
                "pods": null, "blind": null, "cdi_problems": [], "units": [],
            },
            "remarks": ["Label nvidia.com/cc.ready.state says \"false\" meanwhile: pods come here by it"],
        })
    );
    scene.file().transition =
        Some(Transition { target: "on".to_owned(), step: "changing".to_owned(), started_at: ago(40) });
    let told: Value = serde_json::from_str(&as_json(&scene.facts()).unwrap()).unwrap();
    assert_eq!((&told["verdict"], &told["devices"][0]["offered"]), (&json!("changing"), &json!(false)));
    assert_eq!(told["transition"], json!({"target": "on", "step": "changing", "started_at": "2026-05-04T11:59:20Z"}));
}
