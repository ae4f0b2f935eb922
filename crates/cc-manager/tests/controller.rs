//! The loop against an API server in memory, a fake sysfs, and a firmware that does as it is told.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, which have failed when these do")]

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use agent_core::metrics::Metrics;
use agent_core::readiness::Registry;
use agent_core::shutdown::Shutdown;
use agent_core::state::{DEVICES_FILE, DeviceRecord, DevicesFile, ErrorRecord};
use cc_manager::{Controller, DeviceFault, DeviceResult, Firmware, Pausing, Settings, Verified};
use gpu_firmware::{Cost, Mode};
use http::Method;
use hw_probe::testing::FakeSysfs;
use hw_probe::{Bdf, Inventory, PciFunction, Tee};
use kubelet_api::pod_resources;
use kubelet_api::pod_resources::pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer};
use node_object::testing::{FakeApi, Recorded};
use node_object::{Events, NodeClient, Timing, annotations, labels};
use tokio::task::JoinHandle;

const A: &str = "0000:41:00.0";
const B: &str = "0000:42:00.0";
const H100: u16 = 0x2331;
const A100: u16 = 0x20b5;
const UNKNOWN: u16 = 0x3f00;

/// What one call of the firmware is to do.
enum Script {
    /// Refuse ownership of this device.
    Refuse(&'static str, &'static str, bool),
    /// Fail this device, change the others.
    Fail(&'static str, &'static str),
    Panic,
    /// Wait until told to stop, and undo what was staged.
    StopWhenTold,
}

/// What one call of the firmware saw.
#[derive(Clone, Debug)]
struct Call {
    devices: Vec<String>,
    target: Mode,
    ready: Option<String>,
    file: serde_json::Value,
}

struct FakeFirmware {
    api: FakeApi,
    file: PathBuf,
    script: Mutex<VecDeque<Script>>,
    calls: Mutex<Vec<Call>>,
    looking_resets: AtomicBool,
    /// Ownership refused so far.
    refused: AtomicUsize,
    /// The gate at each look at the devices that changes nothing.
    looks: Mutex<Vec<Option<String>>>,
    /// What each device is in, as far as it was ever changed.
    modes: Mutex<BTreeMap<Bdf, Mode>>,
    held: Mutex<bool>,
    released: Condvar,
}

impl FakeFirmware {
    fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.released.notify_all();
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    fn looks(&self) -> Vec<Option<String>> {
        self.looks.lock().unwrap().clone()
    }

    fn script(&self, script: Script) {
        self.script.lock().unwrap().push_back(script);
    }
}

fn fault(bdf: Bdf, code: &str, busy: bool) -> DeviceFault {
    let message = format!("{bdf}: register 0x2000bc says {code}; do something");
    DeviceFault {
        bdf,
        busy,
        untouched: code == "Stopped",
        error: ErrorRecord { code: code.to_owned(), message },
        holders: Vec::new(),
    }
}

impl FakeFirmware {
    /// What the script says of ownership, if that is the next thing it has to say.
    fn refusal(&self) -> Option<DeviceFault> {
        let mut script = self.script.lock().unwrap();
        match script.front() {
            Some(Script::Refuse(bdf, code, busy)) => {
                let fault = fault(bdf.parse().unwrap(), code, *busy);
                script.pop_front();
                self.refused.fetch_add(1, Ordering::Relaxed);
                Some(fault)
            }
            _ => None,
        }
    }
}

impl Firmware for FakeFirmware {
    fn is_free(&self, _: &[PciFunction]) -> Result<Cost, Vec<DeviceFault>> {
        let cost = if self.looking_resets.load(Ordering::Relaxed) { Cost::Resets } else { Cost::Nothing };
        self.refusal().map_or(Ok(cost), |fault| Err(vec![fault]))
    }

    fn verify(&self, devices: &[PciFunction], target: Mode) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        if let Some(fault) = self.refusal() {
            return Err(vec![fault]);
        }
        self.looks.lock().unwrap().push(self.api.labels().get(labels::CC_READY_STATE).cloned());
        let modes = self.modes.lock().unwrap();
        let result = |device: &PciFunction| match modes.get(&device.bdf) {
            Some(mode) if *mode == target => {
                Ok(Verified { configured: target.to_string(), active: target.to_string(), at: jiff::Timestamp::now() })
            }
            _ => Err(fault(device.bdf, "VerifyFailed", false)),
        };
        Ok(devices.iter().map(|device| DeviceResult { bdf: device.bdf, result: result(device) }).collect())
    }

    fn apply(
        &self,
        devices: &[PciFunction],
        target: Mode,
        stop: &AtomicBool,
    ) -> Result<Vec<DeviceResult>, Vec<DeviceFault>> {
        self.calls.lock().unwrap().push(Call {
            devices: devices.iter().map(|device| device.bdf.to_string()).collect(),
            target,
            ready: self.api.labels().get(labels::CC_READY_STATE).cloned(),
            file: std::fs::read(&self.file)
                .map_or(serde_json::Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap()),
        });
        let mut held = self.held.lock().unwrap();
        while *held {
            held = self.released.wait(held).unwrap();
        }
        // Or a panic below would poison it for all further calls.
        drop(held);
        let script = self.script.lock().unwrap().pop_front();
        let failing = match script {
            Some(Script::Refuse(bdf, code, busy)) => return Err(vec![fault(bdf.parse().unwrap(), code, busy)]),
            Some(Script::Panic) => panic!("as told"),
            Some(Script::StopWhenTold) => {
                while !stop.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let stopped = |device: &PciFunction| DeviceResult {
                    bdf: device.bdf,
                    result: Err(fault(device.bdf, "Stopped", false)),
                };
                return Ok(devices.iter().map(stopped).collect());
            }
            Some(Script::Fail(bdf, code)) => Some((bdf, code)),
            None => None,
        };
        let result = |device: &PciFunction| match failing {
            Some((bdf, code)) if device.bdf.to_string() == bdf => Err(fault(device.bdf, code, false)),
            _ => {
                self.modes.lock().unwrap().insert(device.bdf, target);
                Ok(Verified { configured: target.to_string(), active: target.to_string(), at: jiff::Timestamp::now() })
            }
        };
        Ok(devices.iter().map(|device| DeviceResult { bdf: device.bdf, result: result(device) }).collect())
    }
}

struct World {
    here: tempfile::TempDir,
    sysfs: FakeSysfs,
    api: FakeApi,
    firmware: Arc<FakeFirmware>,
}

struct Agent {
    shutdown: Shutdown,
    readiness: Registry,
    metrics: Metrics,
    running: JoinHandle<()>,
}

impl Agent {
    async fn stop(self) {
        self.shutdown.trigger();
        tokio::time::timeout(Duration::from_secs(5), self.running).await.unwrap().unwrap();
    }
}

impl World {
    fn new(gpus: &[(&str, u16)]) -> Self {
        let here = tempfile::tempdir().unwrap();
        let sysfs = FakeSysfs::new();
        sysfs.tee(Tee::SevSnp);
        for (index, (bdf, device)) in gpus.iter().enumerate() {
            sysfs.gpu(*bdf, *device).group(u32::try_from(index).unwrap() + 1);
        }
        let api = FakeApi::new("n1");
        let firmware = Arc::new(FakeFirmware {
            api: api.clone(),
            file: here.path().join("state").join(DEVICES_FILE),
            script: Mutex::default(),
            calls: Mutex::default(),
            looking_resets: AtomicBool::default(),
            refused: AtomicUsize::default(),
            looks: Mutex::default(),
            modes: Mutex::default(),
            held: Mutex::new(false),
            released: Condvar::new(),
        });
        Self { here, sysfs, api, firmware }
    }

    fn start(&self) -> Agent {
        self.start_with("on", Duration::from_secs(30))
    }

    fn start_with(&self, default_mode: &str, resync: Duration) -> Agent {
        self.start_as(|settings| {
            default_mode.clone_into(&mut settings.default_mode);
            settings.resync = resync;
        })
    }

    fn start_as(&self, change: impl FnOnce(&mut Settings)) -> Agent {
        let node = NodeClient::new(self.api.client(), "n1", "test").with_timing(Timing {
            first_delay: Duration::from_millis(5),
            last_delay: Duration::from_millis(20),
            ..Timing::default()
        });
        let mut settings = Settings {
            default_mode: "on".to_owned(),
            readiness_file: self.readiness_file(),
            state_dir: self.here.path().join("state"),
            resync: Duration::from_secs(30),
            retry_min: Duration::from_millis(20),
            retry_max: Duration::from_millis(40),
            grace: Duration::from_millis(300),
            allowed: Mode::ALL.to_vec(),
            hold_without_tee: false,
            only_observe: false,
            hold_down: Duration::ZERO,
            release_poll: Duration::from_millis(20),
            pod_resources: PathBuf::new(),
            patch_pause: Duration::ZERO,
            pausing: Some(Pausing {
                namespace: "gpu-operator".to_owned(),
                patience: Duration::from_millis(500),
                others: Vec::new(),
            }),
            busy_wait: Duration::ZERO,
        };
        change(&mut settings);
        let root = self.sysfs.root();
        let (readiness, metrics, shutdown) = (Registry::default(), Metrics::new(), Shutdown::manual());
        let (events, sender) = Events::new(node.clone(), "cc-manager");
        let firmware = Arc::clone(&self.firmware);
        let controller = Controller::new(settings, node.clone(), firmware, root, events, &readiness, &metrics);
        let token = shutdown.clone();
        let running = tokio::spawn(async move {
            tokio::select! {
                never = node.watch() => match never {},
                () = sender.run() => {}
                () = controller.run(token) => {}
            }
        });
        Agent { shutdown, readiness, metrics, running }
    }

    fn readiness_file(&self) -> PathBuf {
        self.here.path().join("validations/.cc-manager-ctr-ready")
    }

    fn file(&self) -> Option<DevicesFile> {
        serde_json::from_slice(&std::fs::read(&self.firmware.file).ok()?).ok()
    }

    fn state(&self) -> (Option<String>, Option<String>) {
        let labels = self.api.labels();
        (labels.get(labels::CC_MODE_STATE).cloned(), labels.get(labels::CC_READY_STATE).cloned())
    }

    fn status(&self) -> serde_json::Value {
        let annotations = self.api.annotations();
        annotations
            .get(annotations::CC_STATUS)
            .map_or(serde_json::Value::Null, |text| serde_json::from_str(text).unwrap())
    }

    async fn until_state(&self, mode: &str, ready: &str) {
        until(&format!("{mode} {ready:?}"), || self.state() == (Some(mode.to_owned()), Some(ready.to_owned()))).await;
    }
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within 5 s: {what}");
}

async fn settle() {
    tokio::time::sleep(Duration::from_millis(120)).await;
}

#[tokio::test]
async fn the_label_becomes_the_mode_of_all_gpus() {
    let world = World::new(&[(A, H100), (B, H100)]);
    // Left by an earlier boot: nothing here may be believed.
    world.api.set_label(labels::CC_MODE_STATE, Some("on"));
    world.api.set_label(labels::CC_READY_STATE, Some("true"));
    world.api.set_label(labels::CC_MODE, Some("on"));
    let agent = world.start();
    until("devices are changed", || !world.firmware.calls().is_empty()).await;
    world.until_state("on", "true").await;

    let patches = world.api.patches();
    assert_eq!(patches.len(), 3, "one at boot, and two a transition: {patches:?}");
    assert_eq!(patches[0].body, serde_json::json!({"metadata": {"labels": {"nvidia.com/cc.ready.state": ""}}}));
    let changed = |patch: &node_object::testing::Recorded| -> Vec<String> {
        let operations = patch.body.as_array().unwrap().iter().filter(|operation| operation["op"] != "test");
        operations.map(|operation| format!("{} {}", operation["op"], operation["path"]).replace('"', "")).collect()
    };
    let names = "add /metadata/annotations|add /metadata/annotations/ccnode.dev~1transition";
    assert_eq!(changed(&patches[1]).join("|"), names);
    assert_eq!(
        changed(&patches[2]),
        [
            "add /metadata/labels/nvidia.com~1cc.ready.state",
            "add /metadata/annotations/ccnode.dev~1cc-status",
            "remove /metadata/annotations/ccnode.dev~1transition"
        ]
    );
    let calls = world.firmware.calls();
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].devices.clone(), calls[0].target), (vec![A.to_owned(), B.to_owned()], Mode::On));
    assert_eq!(calls[0].ready.as_deref(), Some(""), "the gate was shut when the devices were touched");
    assert_eq!(calls[0].file["transition"]["target"], "on");
    assert!(calls[0].file["devices"].as_array().unwrap().iter().all(|device| device["usable"] == false));

    let file = world.file().unwrap();
    assert!(file.transition.is_none() && file.devices.len() == 2);
    assert!(file.devices.iter().all(|device| device.usable && device.active_mode.as_deref() == Some("on")));
    assert_eq!(file.origin.node_uid.as_deref(), Some("uid-1"));
    let status = world.status();
    assert_eq!((&status["result"], &status["wanted"]), (&"applied".into(), &"on".into()));
    assert_eq!(status["devices"][1]["bdf"], B);
    assert_eq!(status["devices"][1]["activeMode"], "on");
    until("readiness file", || world.readiness_file().exists()).await;
    assert!(agent.readiness.is_ready());
    let metrics = agent.metrics.encode().unwrap();
    assert!(metrics.contains(r#"ccnode_cc_transitions_total{target="on",result="applied"} 1"#), "{metrics}");
    assert!(metrics.contains(r#"ccnode_cc_device_active_mode{device="0000:41:00.0",mode="on"} 1"#), "{metrics}");

    for (label, mode, ready) in [("devtools", "devtools", ""), ("off", "off", "false"), ("on", "on", "true")] {
        let before = world.api.patches().len();
        world.api.set_label(labels::CC_MODE, Some(label));
        world.until_state(mode, ready).await;
        assert_eq!(world.api.patches().len(), before + 2, "two patches a transition");
    }
    assert_eq!(world.firmware.calls().len(), 4);
    assert!(world.firmware.calls().iter().all(|call| call.ready.as_deref() == Some("")));
    world.api.set_label(labels::CC_MODE, None);
    settle().await;
    assert_eq!(world.firmware.calls().len(), 4, "the default is what is");
    agent.stop().await;
}

#[tokio::test]
async fn what_is_right_is_left_alone_across_restarts_and_resyncs() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start_with("on", Duration::from_millis(10));
    world.until_state("on", "true").await;
    settle().await;
    agent.stop().await;
    let patches = world.api.patches().len();
    let agent = world.start_with("on", Duration::from_millis(10));
    settle().await;
    agent.stop().await;
    assert_eq!((world.firmware.calls().len(), world.firmware.looks().len()), (1, 1), "touched once a boot");
    assert_eq!(world.api.patches().len(), patches, "nothing is written again");

    world.sysfs.file("proc/sys/kernel/random/boot_id", "99999999-2222-4333-8444-555555555555\n");
    let agent = world.start();
    until("verified again in the next boot", || world.firmware.looks().len() == 2).await;
    assert_eq!(world.firmware.looks()[1].as_deref(), Some(""), "the first act of a boot is to shut the gate");
    world.until_state("on", "true").await;
    agent.stop().await;
}

#[tokio::test]
async fn an_interrupted_transition_is_done_again() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start();
    world.until_state("on", "true").await;
    world.firmware.hold(true);
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("transition has begun", || world.firmware.calls().len() == 2).await;
    agent.stop().await;
    assert!(world.file().unwrap().transition.is_some());
    assert_eq!(world.state(), (Some("on".to_owned()), Some(String::new())), "no claim while nobody knows");
    world.firmware.hold(false);
    until("its thread is over", || world.firmware.modes.lock().unwrap().values().eq([&Mode::Off])).await;

    // Even back to the old mode: what was verified before the transition counts no more.
    world.api.set_label(labels::CC_MODE, Some("on"));
    let agent = world.start();
    until("done again", || world.firmware.calls().len() == 3).await;
    world.until_state("on", "true").await;
    agent.stop().await;
}

#[tokio::test]
async fn a_device_that_fails_is_named_and_tried_again_alone() {
    let world = World::new(&[(A, H100), (B, H100)]);
    for _ in 0..3 {
        world.firmware.script(Script::Fail(B, "BootTimeout"));
    }
    let agent = world.start();
    world.until_state("failed", "").await;
    let status = world.status();
    assert_eq!((&status["result"], &status["error"]["code"]), (&"failed".into(), &"BootTimeout".into()));
    assert!(status["error"]["message"].as_str().unwrap().contains("0000:42:00.0: register 0x2000bc"), "{status}");
    assert_eq!(status["devices"][0]["activeMode"], "on");
    assert_eq!(status["devices"][1]["activeMode"], serde_json::Value::Null);
    assert!(world.readiness_file().exists(), "the file follows even a failed attempt");
    let file = world.file().unwrap();
    assert!(file.devices[0].usable && !file.devices[1].usable);
    assert!(agent.readiness.is_ready(), "a dead GPU is no failure of the agent");

    world.until_state("on", "true").await;
    let calls = world.firmware.calls();
    assert_eq!(calls.len(), 4);
    assert!(calls[1..].iter().all(|call| call.devices == [B]), "{calls:?}");
    assert!(
        calls[1..].iter().all(|call| call.file["transition"].is_null() && call.file["devices"][0]["usable"] == true)
    );
    agent.stop().await;
}

#[tokio::test]
async fn a_device_in_use_changes_nothing_until_it_is_free() {
    let world = World::new(&[(A, H100), (B, H100)]);
    world.api.set_label(VFIO, Some("true"));
    let agent = world.start();
    world.until_state("on", "true").await;
    let calls = world.firmware.calls().len();
    for _ in 0..1000 {
        world.firmware.script(Script::Refuse(A, "InUse", true));
    }
    let gates: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = Arc::clone(&gates);
    world.api.on_change(move |labels: &BTreeMap<String, String>| {
        seen.lock().unwrap().push(format!("{:?} {:?}", labels.get(labels::CC_READY_STATE), labels.get(VFIO)));
    });
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("second attempt", || world.firmware.refused.load(Ordering::Relaxed) >= 2).await;
    until("told", || world.status()["result"] == "not-begun").await;
    let status = world.status();
    assert_eq!((&status["error"]["code"], &status["wanted"]), (&"InUse".into(), &"off".into()));
    assert_eq!(status["devices"][0]["error"]["code"], "InUse");
    assert_eq!(world.state(), (Some("on".to_owned()), Some("true".to_owned())));
    assert_eq!(world.offered(), [A, B], "nothing is withdrawn");
    assert!(gates.lock().unwrap().iter().all(|seen| seen == r#"Some("true") Some("true")"#), "{gates:?}");
    assert_eq!(world.firmware.calls().len(), calls, "nothing was begun");
    world.firmware.script.lock().unwrap().clear();
    world.until_state("off", "false").await;
    agent.stop().await;
}

#[tokio::test]
async fn devices_in_use_can_be_waited_for_with_the_node_withdrawn() {
    let world = World::new(&[(A, H100)]);
    world.api.set_label(VFIO, Some("true"));
    let waiting = |world: &World, busy_wait| world.start_as(|settings| settings.busy_wait = busy_wait);
    let agent = waiting(&world, Duration::from_mins(1));
    world.until_state("on", "true").await;
    for _ in 0..1000 {
        world.firmware.script(Script::Refuse(A, "InUse", true));
    }
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("withdrawn", || world.state() == (Some("on".to_owned()), Some(String::new()))).await;
    until("paused", || world.api.labels()[VFIO] == "paused-for-cc-mode-change").await;
    assert!(world.offered().is_empty());
    // Another wish ends the wait, and so does the end: everything is put back by the next round or the next start.
    world.api.set_label(labels::CC_MODE, Some("on"));
    world.until_state("on", "true").await;
    assert_eq!((world.api.labels()[VFIO].as_str(), world.offered()), ("true", vec![A.to_owned()]));
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("withdrawn again", || world.state() == (Some("on".to_owned()), Some(String::new()))).await;
    agent.stop().await;
    assert!(world.file().unwrap().transition.is_none());
    assert_eq!(world.state(), (Some("on".to_owned()), Some("true".to_owned())), "put back at the end");
    assert_eq!(world.api.labels()[VFIO], "true");

    let agent = waiting(&world, Duration::from_millis(50));
    until("given up", || world.status()["error"]["code"] == "InUse").await;
    world.until_state("on", "true").await;
    assert_eq!((world.api.labels()[VFIO].as_str(), world.offered()), ("true", vec![A.to_owned()]));
    assert_eq!(world.firmware.calls().len(), 1);
    agent.stop().await;
}

impl World {
    /// What the kernel says of a device's runtime power.
    fn power(&self, bdf: &str, status: &str) {
        let _ = self.sysfs.get(bdf.parse::<Bdf>().unwrap()).power("auto", status, "D0");
    }
}

#[tokio::test]
async fn a_device_that_was_let_go_is_looked_at_again_and_repaired() {
    let world = World::new(&[(A, H100), (B, H100)]);
    let agent = world.start_with("on", Duration::from_millis(50));
    world.until_state("on", "true").await;
    for (round, tampered) in [(1, false), (2, true)] {
        let (looks, calls, patches) =
            (world.firmware.looks().len(), world.firmware.calls().len(), world.api.patches().len());
        for status in ["suspended", "active", "suspended"] {
            world.power(A, status);
            settle().await;
            if status == "active" && tampered {
                // The guest changes the knobs, and the reset at the end of its life makes them effective.
                world.firmware.modes.lock().unwrap().insert(A.parse().unwrap(), Mode::Off);
            }
        }
        until("looked at", || world.firmware.looks().len() == looks + 1).await;
        world.until_state("on", "true").await;
        until("offered", || world.offered() == [A, B]).await;
        let begun = world.firmware.calls().split_off(calls);
        if tampered {
            assert_eq!((begun.len(), begun[0].devices.clone()), (1, vec![A.to_owned()]), "only that device");
            assert_eq!(begun[0].ready.as_deref(), Some(""));
        } else {
            assert!(begun.is_empty(), "nothing to repair");
            assert_eq!(world.api.patches().len() - patches, 1, "its time of verification alone");
        }
        let metrics = agent.metrics.encode().unwrap();
        assert!(metrics.contains(&format!("ccnode_cc_releases_total {round}")), "{metrics}");
        assert!(metrics.contains(&format!("ccnode_cc_drifts_total {}", u32::from(tampered))), "{metrics}");
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_use_that_nobody_saw_is_told_by_the_time_awake() {
    let world = World::new(&[(A, H100)]);
    let awake = |ms: u64| {
        let _ = world.sysfs.get(A).attr("power/runtime_active_time", format!("{ms}\n"));
    };
    world.power(A, "suspended");
    awake(40);
    let agent = world.start_with("on", Duration::from_millis(50));
    world.until_state("on", "true").await;
    settle().await;
    let looks = world.firmware.looks().len();
    settle().await;
    assert_eq!(world.firmware.looks().len(), looks, "nobody had it");
    awake(9040);
    until("looked at", || world.firmware.looks().len() == looks + 1).await;
    until("offered", || world.offered() == [A]).await;
    settle().await;
    assert_eq!(world.firmware.looks().len(), looks + 1, "once");
    agent.stop().await;
}

#[tokio::test]
async fn a_device_that_is_in_use_again_at_once_is_no_news() {
    let world = World::new(&[(A, H100), (B, H100)]);
    world.power(A, "suspended");
    let agent = world.start_with("on", Duration::from_millis(50));
    world.until_state("on", "true").await;
    settle().await;
    let (patches, refused) = (world.api.patches().len(), world.firmware.refused.load(Ordering::Relaxed));
    world.power(A, "active");
    settle().await;
    // Let go, and taken again before anybody could look.
    world.firmware.script(Script::Refuse(A, "InUse", true));
    world.power(A, "suspended");
    until("tried", || world.firmware.refused.load(Ordering::Relaxed) == refused + 1).await;
    world.power(A, "active");
    settle().await;
    assert_eq!(world.state(), (Some("on".to_owned()), Some("true".to_owned())), "the others are what they were");
    assert_eq!(world.offered(), [B], "and nobody else gets it unseen");
    assert!(world.status()["error"].is_null(), "{:#}", world.status());
    assert!(world.api.patches().len() <= patches + 1, "{:#?}", world.api.patches());
    world.power(A, "suspended");
    until("offered", || world.offered() == [A, B]).await;
    assert_eq!(world.firmware.calls().len(), 1, "nothing to repair");
    agent.stop().await;
}

#[tokio::test]
async fn a_change_that_waits_for_a_device_begins_when_it_is_let_go() {
    let world = World::new(&[(A, H100)]);
    world.power(A, "suspended");
    let agent = world.start_as(|settings| {
        settings.retry_min = Duration::from_mins(1);
        settings.retry_max = Duration::from_mins(1);
    });
    world.until_state("on", "true").await;
    world.power(A, "active");
    world.firmware.script(Script::Refuse(A, "InUse", true));
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("told", || world.status()["error"]["code"] == "InUse").await;
    settle().await;
    assert_eq!(world.firmware.calls().len(), 1);
    world.power(A, "suspended");
    world.until_state("off", "false").await;
    agent.stop().await;
}

/// Pod, resource, device.
type Given = (&'static str, &'static str, &'static str);

/// A kubelet that has given devices to pods.
#[derive(Clone, Default)]
struct FakeKubelet(Arc<Mutex<Vec<Given>>>);

#[tonic::async_trait]
impl PodResourcesLister for FakeKubelet {
    async fn list(
        &self,
        _: tonic::Request<pod_resources::ListPodResourcesRequest>,
    ) -> Result<tonic::Response<pod_resources::ListPodResourcesResponse>, tonic::Status> {
        let of = |&(pod, resource, device): &Given| pod_resources::PodResources {
            namespace: "ns".to_owned(),
            name: pod.to_owned(),
            containers: vec![pod_resources::ContainerResources {
                devices: vec![pod_resources::ContainerDevices {
                    resource_name: resource.to_owned(),
                    device_ids: vec![device.to_owned()],
                    topology: None,
                }],
                ..pod_resources::ContainerResources::default()
            }],
            ..pod_resources::PodResources::default()
        };
        let pod_resources = self.0.lock().unwrap().iter().map(of).collect();
        Ok(tonic::Response::new(pod_resources::ListPodResourcesResponse { pod_resources }))
    }

    async fn get_allocatable_resources(
        &self,
        _: tonic::Request<pod_resources::AllocatableResourcesRequest>,
    ) -> Result<tonic::Response<pod_resources::AllocatableResourcesResponse>, tonic::Status> {
        Err(tonic::Status::unimplemented(""))
    }

    async fn get(
        &self,
        _: tonic::Request<pod_resources::GetPodResourcesRequest>,
    ) -> Result<tonic::Response<pod_resources::GetPodResourcesResponse>, tonic::Status> {
        Err(tonic::Status::unimplemented(""))
    }
}

impl World {
    /// An agent beside a kubelet that can be asked, on a node that is in mode on.
    async fn start_beside_a_kubelet(&self) -> (FakeKubelet, Agent) {
        // A kubelet that has its pods names at least the agent's own.
        let kubelet = FakeKubelet(Arc::new(Mutex::new(vec![("cc-manager", "example.com/none", "")])));
        let socket = self.here.path().join("kubelet.sock");
        let listener = kubelet_api::socket::listen(&socket).unwrap();
        let router = tonic::transport::Server::builder().add_service(PodResourcesListerServer::new(kubelet.clone()));
        tokio::spawn(kubelet_api::socket::serve(router, listener, std::future::pending()));
        let agent = self.start_as(|settings| settings.pod_resources = socket);
        self.until_state("on", "true").await;
        (kubelet, agent)
    }
}

/// What the Events about pods that were admitted before a change say.
fn early_pods_told(world: &World) -> Vec<String> {
    let events = world.api.events().into_iter();
    events.filter(|(reason, _)| reason == "PodAdmittedBeforeChange").map(|(_, note)| note).collect()
}

#[tokio::test]
async fn a_pod_that_was_admitted_before_a_change_and_starts_after_it_is_told_of() {
    let world = World::new(&[(A, H100), (B, H100)]);
    let (kubelet, agent) = world.start_beside_a_kubelet().await;
    assert!(early_pods_told(&world).is_empty());

    // The kubelet admitted it while the plugin was withdrawing: known to nobody until the devices are owned.
    world.firmware.hold(true);
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("begun", || world.firmware.calls().len() == 2).await;
    kubelet.0.lock().unwrap().extend([("vm", "nvidia.com/pgpu", A), ("vm", "nvidia.com/pgpu", B)]);
    world.firmware.hold(false);
    world.until_state("off", "false").await;
    until("told", || !early_pods_told(&world).is_empty()).await;
    let notes = early_pods_told(&world);
    assert_eq!(notes.len(), 1, "once for a pod: {notes:?}");
    for part in ["ns/vm", "mode off", A, B] {
        assert!(notes[0].contains(part), "{part}: {notes:?}");
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_pod_is_told_of_the_change_of_its_own_device_though_that_of_another_has_failed() {
    let world = World::new(&[(A, H100), (B, H100)]);
    let (kubelet, agent) = world.start_beside_a_kubelet().await;
    world.firmware.script(Script::Fail(B, "BootTimeout"));
    world.firmware.hold(true);
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("begun", || world.firmware.calls().len() == 2).await;
    kubelet.0.lock().unwrap().extend([("vm", "nvidia.com/pgpu", A), ("other", "nvidia.com/pgpu", B)]);
    world.firmware.hold(false);
    world.until_state("failed", "").await;
    until("told", || !early_pods_told(&world).is_empty()).await;
    let notes = early_pods_told(&world);
    assert!(
        notes.len() == 1 && notes[0].contains("ns/vm") && notes[0].contains(A) && !notes[0].contains(B),
        "{notes:?}"
    );
    agent.stop().await;
}

#[tokio::test]
async fn a_gpu_that_a_pod_has_been_given_is_in_use_before_it_is_opened() {
    let world = World::new(&[(A, H100), (B, H100)]);
    let (kubelet, agent) = world.start_beside_a_kubelet().await;

    kubelet.0.lock().unwrap().extend([("vm", "nvidia.com/pgpu", A), ("web", "example.com/nic", B)]);
    let looks = world.firmware.looks().len();
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("told", || world.status()["error"]["code"] == "InUse").await;
    settle().await;
    let status = world.status();
    assert_eq!(status["holders"], serde_json::json!([{"bdf": A, "pod": "ns/vm"}]));
    assert!(status["error"]["message"].as_str().unwrap().contains("kubectl delete pod -n ns vm"), "{status:#}");
    assert_eq!(world.state(), (Some("on".to_owned()), Some("true".to_owned())), "nothing is withdrawn");
    assert_eq!((world.firmware.calls().len(), world.firmware.looks().len()), (1, looks), "and nothing touched");
    let metrics = agent.metrics.encode().unwrap();
    assert!(metrics.contains(&format!(r#"ccnode_cc_device_holders{{device="{A}"}} 1"#)), "{metrics}");

    kubelet.0.lock().unwrap().truncate(1);
    world.until_state("off", "false").await;
    assert!(world.status()["holders"].is_null());
    agent.stop().await;
}

#[tokio::test]
async fn whoever_asks_to_try_again_is_heard_at_once() {
    let world = World::new(&[(A, H100)]);
    world.firmware.script(Script::Fail(A, "BootTimeout"));
    let agent = world.start_as(|settings| {
        settings.retry_min = Duration::from_mins(1);
        settings.retry_max = Duration::from_mins(1);
    });
    world.until_state("failed", "").await;
    settle().await;
    assert_eq!(world.firmware.calls().len(), 1);
    world.api.set_annotation(annotations::RETRY, Some("now"));
    world.until_state("on", "true").await;
    assert_eq!(world.firmware.calls().len(), 2);
    settle().await;
    world.api.set_annotation(annotations::RETRY, None);
    settle().await;
    assert_eq!(world.firmware.calls().len(), 2, "there is nothing to try");
    agent.stop().await;
}

#[tokio::test]
async fn a_failure_that_goes_on_is_told_now_and_then_and_another_at_once() {
    let world = World::new(&[(A, H100)]);
    for code in ["BootTimeout", "OffBus", "FspBusy", "BootTimeout", "OffBus", "FspBusy"] {
        world.firmware.script(Script::Fail(A, code));
    }
    let agent = world.start_as(|settings| settings.patch_pause = Duration::from_hours(1));
    world.until_state("failed", "").await;
    let told = world.api.patches().len();
    world.until_state("on", "true").await;
    // Each failure is one patch however often it comes, and told as soon as it comes; the success is another.
    assert!(world.api.patches().len() <= told + 3, "{:#?}", world.api.patches());
    for code in ["BootTimeout", "OffBus", "FspBusy"] {
        let is_told = |patch: &Recorded| patch.body.to_string().contains(code);
        assert!(world.api.patches().iter().any(is_told), "{code} was never told");
    }
    assert_eq!(world.firmware.calls().len(), 7);
    let text = std::fs::read_to_string(world.here.path().join("state/transitions.jsonl")).unwrap();
    assert_eq!(text.lines().count(), 7, "the record has each of them");
    agent.stop().await;
}

#[tokio::test]
async fn a_device_that_is_held_and_not_open_is_not_taken_for_let_go() {
    let world = World::new(&[(A, H100)]);
    world.power(A, "suspended");
    let agent = world.start_as(|settings| {
        settings.retry_min = Duration::from_mins(1);
        settings.retry_max = Duration::from_mins(1);
    });
    world.until_state("on", "true").await;
    settle().await;
    for _ in 0..1000 {
        world.firmware.script(Script::Refuse(A, "InUse", true));
    }
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("told", || world.status()["error"]["code"] == "InUse").await;
    settle().await;
    assert_eq!(world.firmware.refused.load(Ordering::Relaxed), 1, "the next attempt comes with its delay");
    assert_eq!(
        (world.state(), world.offered()),
        ((Some("on".to_owned()), Some("true".to_owned())), vec![A.to_owned()])
    );
    // Its holder opens it, and lets go of it.
    world.firmware.script.lock().unwrap().clear();
    world.power(A, "active");
    settle().await;
    world.power(A, "suspended");
    world.until_state("off", "false").await;
    agent.stop().await;
}

#[tokio::test]
async fn what_happens_is_an_event_once_and_a_line_for_the_record() {
    let world = World::new(&[(A, H100), (B, H100)]);
    let agent = world.start();
    world.until_state("on", "true").await;
    for _ in 0..4 {
        world.firmware.script(Script::Fail(B, "BootTimeout"));
    }
    world.api.set_label(labels::CC_MODE, Some("off"));
    world.until_state("failed", "").await;
    world.until_state("off", "false").await;
    agent.stop().await;
    let reasons: Vec<String> = world.api.events().into_iter().map(|(reason, _)| reason).collect();
    let news = ["CCModeChanging", "CCModeChanged", "CCModeChanging", "BootTimeout"];
    assert_eq!(reasons[..4], news);
    assert_eq!(reasons.iter().filter(|reason| *reason == "BootTimeout").count(), 1, "{reasons:?}");
    assert!(world.api.events()[3].1.contains(B), "{:?}", world.api.events());

    let text = std::fs::read_to_string(world.here.path().join("state/transitions.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<String> =
        lines.iter().map(|line| format!("{} {} {}", line["from"], line["to"], line["result"])).collect();
    assert_eq!(told[..2], [r#"null "on" "applied""#, r#""on" "off" "failed""#]);
    assert_eq!(lines[1]["devices"][1]["error"], "BootTimeout");
    assert_eq!(lines[1]["devices"][0]["mode"], "off");
    assert_eq!(told.last().unwrap(), r#"null "off" "applied""#);
}

#[tokio::test]
async fn where_looking_resets_devices_it_is_part_of_a_change() {
    let world = World::new(&[(A, H100)]);
    world.firmware.looking_resets.store(true, Ordering::Relaxed);
    world.api.set_label(VFIO, Some("true"));
    let paused: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = Arc::clone(&paused);
    world.api.on_change(move |labels: &BTreeMap<String, String>| seen.lock().unwrap().push(labels[VFIO].clone()));
    let agent = world.start();
    world.until_state("on", "true").await;
    assert_eq!((world.firmware.calls().len(), world.firmware.looks().len()), (1, 0));
    assert!(paused.lock().unwrap().iter().any(|label| label == PAUSED));
    agent.stop().await;
}

#[tokio::test]
async fn a_label_that_flips_is_held_down() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start_as(|settings| settings.hold_down = Duration::from_millis(700));
    world.until_state("on", "true").await;
    let begun = std::time::Instant::now();
    for _ in 0..5 {
        for label in ["off", "on", "devtools"] {
            world.api.set_label(labels::CC_MODE, Some(label));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert_eq!(world.firmware.calls().len(), 1, "no reset yet");
    assert_eq!(world.offered(), [A], "and nothing is withdrawn meanwhile");
    world.until_state("devtools", "").await;
    assert!(begun.elapsed() > Duration::from_millis(400), "{:?}", begun.elapsed());
    assert_eq!(world.firmware.calls().len(), 2);
    agent.stop().await;
}

#[tokio::test]
async fn only_modes_that_are_allowed_are_obeyed() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start_as(|settings| settings.allowed = vec![Mode::On, Mode::Off]);
    world.until_state("on", "true").await;
    world.api.set_label(labels::CC_MODE, Some("devtools"));
    world.until_state("failed", "").await;
    assert_eq!(world.status()["error"]["code"], "ModeNotAllowed");
    world.api.set_label(labels::CC_MODE, Some("off"));
    world.until_state("off", "false").await;
    assert_eq!(world.firmware.calls().len(), 2);
    agent.stop().await;
}

#[tokio::test]
async fn a_node_that_lost_its_tee_is_held_or_follows_the_reference() {
    for (hold, label, state, ready) in [
        (true, None, "failed", ""),
        (true, Some("on"), "failed", ""),
        (true, Some("off"), "off", "false"),
        (false, None, "off", "false"),
    ] {
        let world = World::new(&[(A, H100)]);
        let agent = world.start();
        world.until_state("on", "true").await;
        agent.stop().await;
        // A new boot, after somebody has been in the firmware's setup.
        world.sysfs.tee(Tee::None);
        world.sysfs.file("proc/sys/kernel/random/boot_id", "99999999-2222-4333-8444-555555555555\n");
        world.api.set_label(labels::CC_MODE, label);
        let agent = world.start_as(|settings| settings.hold_without_tee = hold);
        world.until_state(state, ready).await;
        settle().await;
        assert_eq!(world.state(), (Some(state.to_owned()), Some(ready.to_owned())), "{hold} {label:?}");
        if state == "failed" {
            assert_eq!(world.status()["error"]["code"], "TEELost");
            assert_eq!(world.firmware.calls().len(), 1, "nothing was touched");
            agent.stop().await;
            let agent = world.start_as(|settings| settings.hold_without_tee = hold);
            settle().await;
            assert_eq!(world.status()["error"]["code"], "TEELost", "not even by a restart");
            assert_eq!(world.firmware.calls().len(), 1);
            agent.stop().await;
        } else {
            agent.stop().await;
        }
    }
}

#[tokio::test]
async fn whoever_only_observes_writes_nothing_that_others_read() {
    let world = World::new(&[(A, H100)]);
    world.api.set_label(labels::CC_MODE_STATE, Some("off"));
    world.api.set_label(labels::CC_READY_STATE, Some("false"));
    let before = world.api.labels();
    let agent = world.start_as(|settings| settings.only_observe = true);
    until("told", || world.status()["result"] == "observed").await;
    let message = world.status()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("brought to mode on") && message.contains(A), "{message}");
    world.api.set_label(labels::CC_MODE, Some("bananas"));
    until("told", || world.status()["error"]["code"] == "UnknownMode").await;
    world.api.set_label(labels::CC_MODE, None);
    until("told", || world.status()["wanted"] == "on").await;
    settle().await;
    assert_eq!((world.api.labels(), world.file()), (before, None));
    assert!(world.firmware.calls().is_empty() && world.firmware.looks().is_empty());
    agent.stop().await;
}

const VFIO: &str = "nvidia.com/gpu.deploy.vfio-manager";
const KATA: &str = "nvidia.com/gpu.deploy.kata-sandbox-device-plugin";
const PAUSED: &str = "paused-for-cc-mode-change";

#[tokio::test]
async fn components_are_paused_and_awaited_before_a_device_is_touched() {
    let world = World::new(&[(A, H100)]);
    for (label, value) in [(VFIO, "true"), (KATA, "true"), ("nvidia.com/gpu.deploy.sandbox-validator", "false")] {
        world.api.set_label(label, Some(value));
    }
    world.api.add_pod("gpu-operator", "vfio-1", &[("name", "nvidia-vfio-manager")]);
    world.api.add_pod("gpu-operator", "plugin-1", &[("app", "nvidia-kata-sandbox-device-plugin-daemonset")]);
    world.api.add_pod("gpu-operator", "cc-1", &[("name", "nvidia-cc-manager")]);
    world.api.set_allocatable("nvidia.com/pgpu", "1");
    let agent = world.start_as(|settings| settings.pausing.as_mut().unwrap().patience = Duration::from_mins(1));
    until("paused", || [VFIO, KATA].iter().all(|label| world.api.labels()[*label] == PAUSED)).await;
    let journal: serde_json::Value = serde_json::from_str(&world.api.annotations()[annotations::TRANSITION]).unwrap();
    assert_eq!((&journal["target"], &journal["labels"][VFIO]), (&"on".into(), &"true".into()));
    for end in ["vfio-1", "plugin-1"] {
        settle().await;
        assert!(world.firmware.calls().is_empty(), "{end} is still there");
        world.api.delete_pod("gpu-operator", end);
    }
    settle().await;
    assert!(world.firmware.calls().is_empty(), "the kubelet still offers a GPU");
    world.api.set_allocatable("nvidia.com/pgpu", "0");
    world.until_state("on", "true").await;
    let labels = world.api.labels();
    assert_eq!((labels[VFIO].as_str(), labels[KATA].as_str()), ("true", "true"));
    assert_eq!(labels["nvidia.com/gpu.deploy.sandbox-validator"], "false", "a person's choice is kept");
    assert!(!world.api.annotations().contains_key(annotations::TRANSITION));
    assert_eq!(world.firmware.calls()[0].ready.as_deref(), Some(""));
    agent.stop().await;
}

#[tokio::test]
async fn what_others_offer_beside_gpus_holds_up_no_change() {
    let world = World::new(&[(A, H100)]);
    world.api.set_label(KATA, Some("true"));
    for resource in ["nvidia.com/hostdev", "nvidia.com/rdma_shared_device_a", "nvidia.com/somebodys"] {
        world.api.set_allocatable(resource, "8");
    }
    let others = vec!["nvidia.com/somebodys".to_owned()];
    let agent = world.start_as(|settings| settings.pausing.as_mut().unwrap().others = others);
    world.until_state("on", "true").await;
    // What may be a GPU is waited for.
    world.api.set_allocatable("nvidia.com/cards", "1");
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("given up", || world.status()["error"]["code"] == "OperandsStillThere").await;
    let message = world.status()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("nvidia.com/cards: 1") && !message.contains("hostdev"), "{message}");
    assert!(message.contains("--other-resources"), "{message}");
    world.api.set_allocatable("nvidia.com/cards", "0");
    world.until_state("off", "false").await;
    agent.stop().await;
}

#[tokio::test]
async fn components_that_do_not_stop_end_the_attempt_and_run_again() {
    let world = World::new(&[(A, H100)]);
    world.api.set_label(VFIO, Some("true"));
    let agent = world.start();
    world.until_state("on", "true").await;
    world.api.add_pod("gpu-operator", "vfio-1", &[("name", "nvidia-vfio-manager")]);
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("given up", || world.status()["error"]["code"] == "OperandsStillThere").await;
    let message = world.status()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("vfio-1") && message.contains("gpu-operator"), "{message}");
    world.until_state("on", "true").await;
    assert_eq!((world.firmware.calls().len(), world.offered()), (1, vec![A.to_owned()]));
    until("runs again", || world.api.labels()[VFIO] == "true").await;
    world.api.delete_pod("gpu-operator", "vfio-1");
    world.until_state("off", "false").await;

    agent.stop().await;
}

#[tokio::test]
async fn what_a_crash_or_the_reference_left_paused_runs_again() {
    for (mode, calls) in [("on", 1), ("devtools", 2)] {
        let world = World::new(&[(A, H100)]);
        world.api.set_label(VFIO, Some("true"));
        let agent = world.start();
        world.until_state("on", "true").await;
        agent.stop().await;
        // As after a SIGKILL between the pausing and the end, or of NVIDIA's cc-manager, which writes no annotation.
        world.api.set_label(VFIO, Some(PAUSED));
        world.api.set_label(KATA, Some("paused-for-driver-upgrade_paused-for-cc-mode-change"));
        world.api.set_label(labels::CC_MODE, Some(mode));
        let agent = world.start();
        until("runs again", || world.api.labels()[VFIO] == "true").await;
        until("the other's marker stays", || world.api.labels()[KATA] == "paused-for-driver-upgrade").await;
        until("state", || world.state().0.as_deref() == Some(mode)).await;
        assert_eq!(world.firmware.calls().len(), calls);
        agent.stop().await;
    }
}

#[tokio::test]
async fn what_a_crash_left_paused_runs_again_whatever_is_wanted() {
    for gpus in [&[(A, H100)][..], &[]] {
        let world = World::new(gpus);
        world.api.set_label(VFIO, Some("paused-for-cc-mode-change"));
        world.api.set_annotation(annotations::TRANSITION, Some("{}"));
        let agent = world.start_with("", Duration::from_secs(30));
        until("taken up", || world.api.labels()[VFIO] == "true").await;
        assert!(!world.api.annotations().contains_key(annotations::TRANSITION));
        assert!(world.firmware.calls().is_empty());
        agent.stop().await;
    }
}

#[tokio::test]
async fn back_to_what_it_is_needs_no_device() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start();
    world.until_state("on", "true").await;
    for _ in 0..1000 {
        world.firmware.script(Script::Refuse(A, "InUse", true));
    }
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("told", || world.status()["result"] == "not-begun").await;
    world.api.set_label(labels::CC_MODE, Some("on"));
    until("told", || world.status()["result"] == "applied").await;
    world.until_state("on", "true").await;
    assert_eq!(world.firmware.calls().len(), 1);
    agent.stop().await;
}

#[tokio::test]
async fn in_a_new_boot_what_is_right_already_disturbs_nobody() {
    let world = World::new(&[(A, H100), (B, H100)]);
    world.api.set_label(VFIO, Some("true"));
    let agent = world.start();
    world.until_state("on", "true").await;
    agent.stop().await;
    world.sysfs.file("proc/sys/kernel/random/boot_id", "99999999-2222-4333-8444-555555555555\n");
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = Arc::clone(&seen);
    world.api.on_change(move |labels: &BTreeMap<String, String>| noted.lock().unwrap().push(labels[VFIO].clone()));
    let agent = world.start();
    until("verified again", || world.file().unwrap().origin.boot_id.starts_with("9999")).await;
    world.until_state("on", "true").await;
    assert_eq!(world.firmware.calls().len(), 1, "looked at, and not changed");
    assert!(seen.lock().unwrap().iter().all(|label| label == "true"), "{seen:?}");
    agent.stop().await;
}

#[tokio::test]
async fn a_refusal_that_is_no_matter_of_use_is_a_failure() {
    let world = World::new(&[(A, H100)]);
    world.firmware.script(Script::Refuse(A, "NoGroupFile", false));
    world.api.set_label(VFIO, Some("true"));
    let agent = world.start();
    world.until_state("failed", "").await;
    assert_eq!(world.api.patches().len(), 2, "the boot's first, and the failure: nobody was disturbed");
    world.until_state("on", "true").await;
    agent.stop().await;
}

#[tokio::test]
async fn a_panic_in_the_firmware_is_a_failure_of_its_devices() {
    let world = World::new(&[(A, H100)]);
    world.firmware.script(Script::Panic);
    let agent = world.start();
    world.until_state("failed", "").await;
    assert_eq!(world.status()["error"]["code"], "Interrupted");
    world.until_state("on", "true").await;
    agent.stop().await;
}

#[tokio::test]
async fn an_unknown_mode_touches_nothing() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start();
    world.until_state("on", "true").await;
    world.api.set_label(labels::CC_MODE, Some("bananas"));
    world.until_state("failed", "").await;
    let status = world.status();
    assert_eq!(status["error"]["code"], "UnknownMode");
    for part in ["nvidia.com/cc.mode", "bananas", "off, on, devtools, ppcie"] {
        assert!(status["error"]["message"].as_str().unwrap().contains(part), "{status}");
    }
    settle().await;
    assert_eq!(world.firmware.calls().len(), 1);
    world.api.set_label(labels::CC_MODE, Some("on"));
    world.until_state("on", "true").await;
    assert_eq!(world.firmware.calls().len(), 1, "the GPUs had been right all along");
    agent.stop().await;
}

#[tokio::test]
async fn the_latest_label_wins_after_the_change_under_way() {
    let world = World::new(&[(A, H100)]);
    let gates: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = Arc::clone(&gates);
    world.api.on_change(move |labels: &BTreeMap<String, String>| {
        seen.lock().unwrap().extend(labels.get(labels::CC_READY_STATE).cloned());
    });
    world.firmware.hold(true);
    let agent = world.start();
    until("first change is under way", || world.firmware.calls().len() == 1).await;
    for label in ["off", "devtools", "ppcie", "off"] {
        world.api.set_label(labels::CC_MODE, Some(label));
    }
    settle().await;
    world.firmware.hold(false);
    world.until_state("off", "false").await;
    let targets: Vec<Mode> = world.firmware.calls().iter().map(|call| call.target).collect();
    assert_eq!(targets, [Mode::On, Mode::Off]);
    assert!(gates.lock().unwrap().iter().all(|gate| gate != "true"), "the gate was never open on the way");
    agent.stop().await;
}

#[tokio::test]
async fn hardware_waits_for_the_gate_and_the_result_for_the_api_server() {
    let world = World::new(&[(A, H100)]);
    for status in [500, 403, 429] {
        world.api.fail_next(Method::PATCH, status);
    }
    let touched = Arc::clone(&world.firmware);
    touched.hold(true);
    let agent = world.start();
    until("device is being changed", || touched.calls().len() == 1).await;
    assert_eq!(world.api.patches().len(), 5, "three refused; the boot's first, and that which begins the change");
    assert_eq!(touched.calls()[0].ready.as_deref(), Some(""));
    touched.hold(false);
    world.until_state("on", "true").await;

    touched.hold(true);
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("second change", || touched.calls().len() == 2).await;
    for _ in 0..3 {
        world.api.fail_next(Method::PATCH, 503);
    }
    touched.hold(false);
    world.until_state("off", "false").await;
    assert_eq!(touched.calls().len(), 2, "a result that cannot be published is no reason to change devices again");
    agent.stop().await;
}

#[tokio::test]
async fn labels_changed_by_others_are_put_right() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start();
    world.until_state("on", "true").await;
    world.api.set_label(labels::CC_READY_STATE, Some("false"));
    world.until_state("on", "true").await;
    world.api.set_label(labels::CC_MODE_STATE, None);
    world.until_state("on", "true").await;
    assert_eq!(world.firmware.calls().len(), 1);
    agent.stop().await;
}

#[tokio::test]
async fn without_tee_the_default_is_off_and_the_label_is_obeyed() {
    let world = World::new(&[(A, H100)]);
    world.sysfs.tee(Tee::None);
    let agent = world.start();
    world.until_state("off", "false").await;
    world.api.set_label(labels::CC_MODE, Some("on"));
    world.until_state("on", "true").await;
    agent.stop().await;
}

#[tokio::test]
async fn mixed_nodes_fail_by_name_and_still_do_off() {
    let world = World::new(&[(A, H100), (B, A100)]);
    let agent = world.start();
    world.until_state("failed", "").await;
    let status = world.status();
    assert_eq!(status["error"]["code"], "Unsupported");
    assert!(status["error"]["message"].as_str().unwrap().contains(B), "{status}");
    assert!(world.firmware.calls().is_empty());
    world.api.set_label(labels::CC_MODE, Some("off"));
    world.until_state("off", "false").await;
    assert_eq!(world.firmware.calls()[0].devices, [A]);
    assert!(world.file().unwrap().devices.iter().all(|device| device.usable));
    agent.stop().await;
}

#[tokio::test]
async fn off_goes_on_without_a_gpu_that_nobody_knows_and_does_not_hide_it() {
    let world = World::new(&[(A, H100), (B, UNKNOWN)]);
    world.api.set_label(labels::CC_MODE, Some("off"));
    let agent = world.start();
    world.until_state("failed", "").await;
    assert_eq!(world.firmware.calls()[0].devices, [A]);
    let status = world.status();
    assert_eq!(status["error"]["code"], "UnknownDevice");
    let message = status["error"]["message"].as_str().unwrap();
    assert!(message.contains(B) && !message.contains(A), "{message}");
    assert_eq!(world.offered(), [A]);
    settle().await;
    assert_eq!(world.firmware.calls().len(), 1, "what is right is left alone");
    assert_eq!(world.offered(), [A]);
    agent.stop().await;
}

#[tokio::test]
async fn told_to_end_before_the_resets_it_leaves_everything_as_it_was() {
    let world = World::new(&[(A, H100), (B, H100)]);
    world.api.set_label(VFIO, Some("true"));
    let agent = world.start();
    world.until_state("on", "true").await;
    agent.stop().await;
    let before = world.file().unwrap();
    // While it stages, and while it waits for a component that does not go: the agent may be on its way out for good.
    for waits in [false, true] {
        let calls = world.firmware.calls().len();
        if waits {
            world.api.add_pod("gpu-operator", "vfio-1", &[("name", "nvidia-vfio-manager")]);
        } else {
            world.firmware.script(Script::StopWhenTold);
        }
        world.api.set_label(labels::CC_MODE, Some("off"));
        let agent = world.start_as(|settings| settings.pausing.as_mut().unwrap().patience = Duration::from_mins(1));
        until("begun", || world.api.labels()[VFIO] == PAUSED).await;
        until("under way", || world.firmware.calls().len() == calls + usize::from(!waits)).await;
        agent.stop().await;
        assert_eq!(world.firmware.calls().len(), calls + usize::from(!waits));
        let file = world.file().unwrap();
        assert!(file.transition.is_none());
        let offered = |file: &DevicesFile| {
            let of = |device: &DeviceRecord| (device.bdf, device.active_mode.clone(), device.usable);
            file.devices.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(offered(&file), offered(&before), "what was verified is still known, and offered");
        assert_eq!(world.state(), (Some("on".to_owned()), Some("true".to_owned())), "waits: {waits}");
        assert_eq!(world.api.labels()[VFIO], "true", "waits: {waits}");
        assert!(!world.api.annotations().contains_key(annotations::TRANSITION));
        assert_eq!(world.status()["error"]["code"], "Stopped");
        world.api.set_label(labels::CC_MODE, Some("on"));
    }

    // The label is set back before the next start: there is nothing to do but to say so.
    let calls = world.firmware.calls().len();
    let agent = world.start();
    until("told", || world.status()["result"] == "applied").await;
    world.until_state("on", "true").await;
    assert_eq!(world.firmware.calls().len(), calls);
    agent.stop().await;
}

#[tokio::test]
async fn a_gpu_that_stays_broken_is_no_news_at_every_attempt() {
    let world = World::new(&[(A, H100), (B, H100)]);
    for _ in 0..1000 {
        world.firmware.script(Script::Fail(B, "BootTimeout"));
    }
    let agent = world.start();
    world.until_state("failed", "").await;
    until("tried again", || world.firmware.calls().len() >= 3).await;
    let (calls, patches, events) = (world.firmware.calls().len(), world.api.patches().len(), world.api.events().len());
    until("tried many times", || world.firmware.calls().len() >= calls + 8).await;
    assert_eq!(world.api.patches().len(), patches);
    assert_eq!(world.api.events().len(), events);
    assert_eq!(world.offered(), [A]);
    agent.stop().await;
}

#[tokio::test]
async fn a_node_without_gpus_is_left_alone() {
    let world = World::new(&[]);
    let agent = world.start();
    until("readiness file", || world.readiness_file().exists()).await;
    assert_eq!(world.state(), (None, None));
    assert!(world.api.patches().is_empty());
    agent.stop().await;
}

#[tokio::test]
async fn unreadable_devices_are_a_failure_and_not_an_absence() {
    let world = World::new(&[]);
    std::fs::remove_dir_all(world.sysfs.path().join("sys/bus/pci/devices")).unwrap();
    let agent = world.start();
    world.until_state("failed", "").await;
    assert_eq!(world.status()["error"]["code"], "SysfsUnreadable");
    agent.stop().await;
}

#[tokio::test]
async fn no_device_is_touched_when_the_others_cannot_be_told() {
    let world = World::new(&[(A, H100)]);
    std::fs::write(world.here.path().join("state"), "a file where the directory should be").unwrap();
    let agent = world.start();
    until("told", || world.status()["error"]["code"] == "StateFile").await;
    settle().await;
    assert!(world.firmware.calls().is_empty());
    assert_eq!(world.state(), (None, Some(String::new())));
    std::fs::remove_file(world.here.path().join("state")).unwrap();
    world.until_state("on", "true").await;
    agent.stop().await;
}

#[tokio::test]
async fn a_node_that_is_absent_is_waited_for() {
    let world = World::new(&[(A, H100)]);
    world.api.delete_node();
    let agent = world.start();
    settle().await;
    assert!(world.firmware.calls().is_empty());
    assert_eq!(agent.readiness.pending(), ["first-attempt", "node-watch"]);
    world.api.create_node("uid-2");
    world.until_state("on", "true").await;
    assert_eq!(world.status()["nodeUid"], "uid-2");
    agent.stop().await;
}

#[tokio::test]
async fn a_node_object_that_is_made_again_is_told_what_is_known_of_this_boot() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start();
    world.until_state("on", "true").await;
    world.api.delete_node();
    world.api.create_node("uid-2");
    until("told", || world.status()["nodeUid"] == "uid-2").await;
    world.until_state("on", "true").await;
    until("filed", || world.file().unwrap().origin.node_uid.as_deref() == Some("uid-2")).await;
    assert_eq!((world.firmware.calls().len(), world.firmware.looks().len()), (1, 1), "no device is touched for it");
    agent.stop().await;
}

#[tokio::test]
async fn a_change_begins_again_on_a_node_object_that_is_made_again() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start();
    world.until_state("on", "true").await;
    world.api.set_allocatable("nvidia.com/pgpu", "1");
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("begun", || world.api.annotations().contains_key(annotations::TRANSITION)).await;
    world.api.delete_node();
    world.api.create_node("uid-2");
    world.api.set_label(labels::CC_MODE, Some("off"));
    world.until_state("off", "false").await;
    let gates: Vec<_> = world.firmware.calls().into_iter().map(|call| call.ready).collect();
    assert_eq!(gates, [Some(String::new()), Some(String::new())], "the new node's gate was shut for it");
    until("told", || world.status()["nodeUid"] == "uid-2").await;
    until("filed", || world.file().unwrap().origin.node_uid.as_deref() == Some("uid-2")).await;
    agent.stop().await;
}

#[tokio::test]
async fn shutdown_ends_at_once_when_idle_and_within_the_grace_otherwise() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start();
    world.until_state("on", "true").await;
    let begun = std::time::Instant::now();
    agent.stop().await;
    assert!(begun.elapsed() < Duration::from_millis(200), "{:?}", begun.elapsed());

    let agent = world.start();
    world.firmware.hold(true);
    world.api.set_label(labels::CC_MODE, Some("off"));
    until("change is under way", || world.firmware.calls().len() == 2).await;
    agent.shutdown.trigger();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!agent.running.is_finished(), "the change is given the grace");
    world.firmware.hold(false);
    world.until_state("off", "false").await;
    agent.stop().await;
}

impl World {
    /// The devices that a plugin that asks for cc-manager's word would offer now.
    fn offered(&self) -> Vec<String> {
        let Some(file) = self.file().filter(|file| file.transition.is_none()) else { return Vec::new() };
        let inventory = Inventory::scan(&self.sysfs.root());
        let usable = |gpu: &&PciFunction| file.record(gpu).is_some_and(|record| record.usable);
        inventory.gpus().filter(usable).map(|gpu| gpu.bdf.to_string()).collect()
    }

    /// Notes every moment in which the gate stands open for something that `devices.json` does not say of every device.
    fn note_lies(&self) -> Arc<Mutex<Vec<String>>> {
        let lies: Arc<Mutex<Vec<String>>> = Arc::default();
        let (seen, path) = (Arc::clone(&lies), self.firmware.file.clone());
        self.api.on_change(move |labels: &BTreeMap<String, String>| {
            let label = |name: &str| labels.get(name).map(String::as_str).unwrap_or_default();
            if label(labels::CC_READY_STATE).is_empty() {
                return;
            }
            let bytes = std::fs::read(&path).unwrap_or_default();
            let is_true = serde_json::from_slice::<DevicesFile>(&bytes).is_ok_and(|file| {
                let state = Some(label(labels::CC_MODE_STATE));
                let holds = |record: &agent_core::state::DeviceRecord| {
                    record.usable
                        && record.active_mode.as_deref() == state
                        && record.configured_mode.as_deref() == state
                };
                file.transition.is_none() && !file.devices.is_empty() && file.devices.iter().all(holds)
            });
            if !is_true {
                seen.lock().unwrap().push(format!("{labels:?} while {}", String::from_utf8_lossy(&bytes)));
            }
        });
        lies
    }
}

#[tokio::test]
async fn nothing_is_offered_that_is_not_verified_in_what_is_wanted_now() {
    // (what happens to a node that is verified in `off`, label, state, ready, error, what is offered, changes begun)
    type Event = fn(&World);
    type Case =
        (&'static str, Event, &'static str, (&'static str, &'static str), &'static str, &'static [&'static str]);
    let cases: [Case; 11] = [
        ("nothing", |_| {}, "off", ("off", "false"), "", &[A, B]),
        ("unknown mode", |_| {}, "bananas", ("failed", ""), "UnknownMode", &[]),
        ("impossible mode", |_| {}, "ppcie", ("failed", ""), "Unsupported", &[]),
        ("in use", |world| refuse_all(world, B, "InUse", true), "on", ("off", "false"), "InUse", &[A, B]),
        ("refused", |world| refuse_all(world, B, "NoGroupFile", false), "on", ("failed", ""), "NoGroupFile", &[]),
        ("one fails", |world| fail_all(world, B), "on", ("failed", ""), "BootTimeout", &[A]),
        ("one gone", |world| world.sysfs.remove(B.parse::<Bdf>().unwrap()), "off", ("off", "false"), "", &[A]),
        (
            "one that is not known",
            |world| {
                world.sysfs.gpu("0000:43:00.0", 0x9999).group(9);
            },
            "off",
            ("failed", ""),
            "UnknownDevice",
            &[A, B],
        ),
        (
            "one added that is in use",
            |world| {
                refuse_all(world, "0000:43:00.0", "InUse", true);
                world.sysfs.gpu("0000:43:00.0", H100).group(9);
            },
            "off",
            ("off", ""),
            "InUse",
            &[A, B],
        ),
        (
            "one replaced that is in use",
            |world| {
                refuse_all(world, B, "InUse", true);
                world.sysfs.remove(B.parse::<Bdf>().unwrap());
                // Keeps the file system from giving the same inode again.
                std::fs::write(world.sysfs.path().join("between"), "").unwrap();
                world.sysfs.gpu(B, H100).group(2);
            },
            "off",
            ("off", ""),
            "InUse",
            &[A],
        ),
        (
            "one that cannot be told apart",
            |world| {
                let _ = world.sysfs.get(B.parse::<Bdf>().unwrap()).attr("class", "nonsense\n");
            },
            "off",
            ("failed", ""),
            "SysfsUnreadable",
            &[],
        ),
    ];
    for (what, event, label, (state, ready), error, offered) in cases {
        let world = World::new(&[(A, H100), (B, H100)]);
        let lies = world.note_lies();
        world.api.set_label(labels::CC_MODE, Some("off"));
        let agent = world.start_with("on", Duration::from_millis(20));
        world.until_state("off", "false").await;
        assert_eq!(world.offered(), [A, B], "{what}");
        event(&world);
        world.api.set_label(labels::CC_MODE, Some(label));
        until(what, || world.status()["error"]["code"].as_str().unwrap_or_default() == error).await;
        until(what, || world.offered() == offered).await;
        settle().await;
        assert_eq!(world.offered(), offered, "{what}");
        assert_eq!(world.state(), (Some(state.to_owned()), Some(ready.to_owned())), "{what}");
        assert_eq!(*lies.lock().unwrap(), Vec::<String>::new(), "{what}");
        agent.stop().await;
    }
}

fn refuse_all(world: &World, bdf: &'static str, code: &'static str, busy: bool) {
    for _ in 0..1000 {
        world.firmware.script(Script::Refuse(bdf, code, busy));
    }
}

fn fail_all(world: &World, bdf: &'static str) {
    for _ in 0..1000 {
        world.firmware.script(Script::Fail(bdf, "BootTimeout"));
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_believed_is_replaced_by_what_is_verified_again() {
    for (what, content) in [
        ("absent", None),
        ("empty", Some(String::new())),
        ("malformed", Some("{\"schema\":1".to_owned())),
        ("of no schema", Some("{\"devices\":[]}".to_owned())),
    ] {
        let world = World::new(&[(A, H100)]);
        let agent = world.start();
        world.until_state("on", "true").await;
        agent.stop().await;
        let lies = world.note_lies();
        match content {
            None => std::fs::remove_file(&world.firmware.file).unwrap(),
            Some(text) => std::fs::write(&world.firmware.file, text).unwrap(),
        }
        let agent = world.start();
        until(what, || world.firmware.looks().len() == 2).await;
        assert_eq!(world.firmware.looks()[1].as_deref(), Some(""), "{what}");
        world.until_state("on", "true").await;
        assert_eq!(world.offered(), [A], "{what}");
        assert_eq!(*lies.lock().unwrap(), Vec::<String>::new(), "{what}");
        agent.stop().await;
    }
    // Of this boot, and said by a release that is too far away, or by one that is near.
    for (schema, changes) in [(0, 1), (2, 1), (3, 2)] {
        let world = World::new(&[(A, H100)]);
        let agent = world.start();
        world.until_state("on", "true").await;
        agent.stop().await;
        let mut file = serde_json::to_value(world.file().unwrap()).unwrap();
        file["schema"] = schema.into();
        file["news"] = "from the future".into();
        std::fs::write(&world.firmware.file, file.to_string()).unwrap();
        let agent = world.start();
        until("verified", || world.firmware.looks().len() == changes).await;
        world.until_state("on", "true").await;
        settle().await;
        assert_eq!((world.firmware.looks().len(), world.offered()), (changes, vec![A.to_owned()]), "schema {schema}");
        agent.stop().await;
    }
}

#[tokio::test]
async fn a_file_lost_at_run_time_comes_back_without_a_device_being_touched() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start_with("on", Duration::from_millis(20));
    world.until_state("on", "true").await;
    std::fs::write(&world.firmware.file, "nonsense").unwrap();
    until("file is back", || world.offered() == [A]).await;
    std::fs::remove_file(&world.firmware.file).unwrap();
    until("file is back", || world.offered() == [A]).await;
    assert_eq!(world.firmware.calls().len(), 1);
    agent.stop().await;
}

#[tokio::test]
async fn a_result_that_cannot_be_told_the_other_agents_opens_no_gate() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new(&[(A, H100)]);
    world.firmware.hold(true);
    let agent = world.start();
    until("change is under way", || world.firmware.calls().len() == 1).await;
    let state_dir = world.firmware.file.parent().unwrap();
    let mode = |bits| std::fs::set_permissions(state_dir, std::fs::Permissions::from_mode(bits)).unwrap();
    // A folder that everybody may write to is not written to.
    mode(0o777);
    world.firmware.hold(false);
    until("told", || world.status()["error"]["code"] == "StateFile").await;
    settle().await;
    assert_ne!(world.state().1.as_deref(), Some("true"));
    assert_eq!(world.offered(), Vec::<String>::new());
    mode(0o755);
    world.until_state("on", "true").await;
    assert_eq!(world.offered(), [A]);
    agent.stop().await;
}

#[tokio::test]
async fn a_result_that_nobody_wants_any_more_is_neither_published_nor_offered() {
    let world = World::new(&[(A, H100)]);
    let lies = world.note_lies();
    world.firmware.hold(true);
    let agent = world.start();
    until("change is under way", || world.firmware.calls().len() == 1).await;
    world.api.set_label(labels::CC_MODE, Some("off"));
    settle().await;
    // From now on the API server refuses: the next change cannot begin, and the result of this one is all there is.
    for _ in 0..1000 {
        world.api.fail_next(Method::PATCH, 403);
    }
    world.api.set_label(labels::CC_READY_STATE, Some("false"));
    world.firmware.hold(false);
    until("result is on disk", || world.file().is_some_and(|file| file.transition.is_none())).await;
    settle().await;
    assert_eq!(world.file().unwrap().devices[0].active_mode.as_deref(), Some("on"));
    assert_eq!(world.offered(), Vec::<String>::new());
    assert_eq!(world.firmware.calls().len(), 1);
    agent.stop().await;
    // The one lie is the test's own, which nobody could take back.
    assert_eq!(lies.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_gate_that_somebody_opens_during_a_change_is_shut_again() {
    let world = World::new(&[(A, H100)]);
    world.firmware.hold(true);
    let agent = world.start();
    until("change is under way", || world.firmware.calls().len() == 1).await;
    for status in [409, 500] {
        world.api.fail_next(Method::PATCH, status);
        world.api.set_label(labels::CC_READY_STATE, Some("true"));
        until("shut again", || world.state().1.as_deref() == Some("")).await;
    }
    world.firmware.hold(false);
    world.until_state("on", "true").await;
    assert_eq!(world.firmware.calls().len(), 1);
    agent.stop().await;
}

#[tokio::test]
async fn ten_flips_in_a_second_end_in_the_last() {
    for last in ["on", "off", "devtools"] {
        let world = World::new(&[(A, H100), (B, H100)]);
        let lies = world.note_lies();
        let agent = world.start();
        for flip in 0..10 {
            world.api.set_label(labels::CC_MODE, Some(["on", "off", "devtools"][flip % 3]));
            if flip % 4 == 0 {
                world.api.fail_next(Method::PATCH, [409, 422, 503][flip % 3]);
            }
            tokio::time::sleep(Duration::from_millis(7 * (flip as u64 % 4))).await;
        }
        world.api.set_label(labels::CC_MODE, Some(last));
        let ready = match last {
            "on" => "true",
            "off" => "false",
            _ => "",
        };
        world.until_state(last, ready).await;
        until("offered", || world.offered() == [A, B]).await;
        settle().await;
        assert_eq!(world.state(), (Some(last.to_owned()), Some(ready.to_owned())));
        assert_eq!(world.firmware.calls().last().unwrap().target.as_str(), last);
        assert_eq!(*lies.lock().unwrap(), Vec::<String>::new());
        agent.stop().await;
    }
}

#[tokio::test]
async fn gpus_that_are_all_gone_leave_no_promise_behind() {
    let world = World::new(&[(A, H100)]);
    let agent = world.start_with("on", Duration::from_millis(20));
    world.until_state("on", "true").await;
    world.sysfs.remove(A.parse::<Bdf>().unwrap());
    world.until_state("on", "").await;
    assert!(world.file().unwrap().devices.is_empty());
    settle().await;
    let patches = world.api.patches().len();
    settle().await;
    assert_eq!(world.api.patches().len(), patches);
    world.sysfs.gpu(A, H100).group(1);
    world.until_state("on", "true").await;
    assert_eq!(world.firmware.looks().len(), 2, "a device that comes back is looked at again");
    agent.stop().await;
}
