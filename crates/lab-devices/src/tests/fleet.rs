//! Devices behind sockets, driven through the vfio-user client.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vfio_user::Client;

use super::host::{BOOT_0, Bus, GPU_BOOT, GPU_STATUS};
use crate::trace::{self, Kind, Space, TraceEvent};
use crate::{BootState, DeviceSpec, Fault, Fleet, FleetConfig, FleetError, ModelKind};

impl Bus for Client {
    fn read(&mut self, space: Space, offset: u64, data: &mut [u8]) {
        self.region_read(region(space), offset, data).unwrap();
    }

    fn write(&mut self, space: Space, offset: u64, data: &[u8]) {
        self.region_write(region(space), offset, data).unwrap();
    }

    fn wait(&mut self, ms: u64) {
        thread::sleep(Duration::from_millis(ms));
    }
}

fn region(space: Space) -> u32 {
    match space {
        Space::Bar0 => 0,
        Space::Bar2 => 2,
        Space::Bar4 => 4,
        Space::Config | Space::Device => 7,
    }
}

fn quick(name: &str, model: ModelKind) -> DeviceSpec {
    DeviceSpec { boot: Duration::from_millis(20), ..DeviceSpec::new(name, model) }
}

fn config(folder: &Path, devices: Vec<DeviceSpec>) -> FleetConfig {
    FleetConfig { socket_dir: folder.join("sockets"), devices, knob_file: None, trace_file: None }
}

fn connect(fleet: &Fleet, name: &str) -> Client {
    let mut client = Client::new(fleet.socket(name).unwrap()).unwrap();
    client.enable_memory();
    client
}

/// Closing is seen by the server a moment later.
fn wait_for_event(fleet: &Fleet, wanted: impl Fn(&TraceEvent) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !fleet.trace().iter().any(&wanted) {
        assert!(Instant::now() < deadline, "no such event in 10 s");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_mode_change_end_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let config = FleetConfig {
        knob_file: Some(folder.path().join("knobs.json")),
        trace_file: Some(folder.path().join("trace.jsonl")),
        ..config(folder.path(), vec![quick("gpu0", ModelKind::H100), quick("nvsw0", ModelKind::Ls10)])
    };
    let fleet = Fleet::start(config.clone()).unwrap();
    assert_eq!(fleet.names(), ["gpu0", "nvsw0"]);

    let mut gpu = connect(&fleet, "gpu0");
    let sizes: Vec<u64> = (0..9).map(|index| gpu.region(index).unwrap().size).collect();
    assert_eq!(sizes, [16 << 20, 0, 64 << 20, 0, 32 << 20, 0, 0, 4096, 0]);
    let mut whole = vec![0; 4096];
    gpu.region_read(7, 0, &mut whole).unwrap();
    assert_eq!(whole[..4], [0xde, 0x10, 0x30, 0x23], "QEMU reads config space in one go");

    assert!(gpu.wait_for_boot(GPU_BOOT));
    fleet.clear_trace();
    let exchanges = "002D020C->0, 0002020C->0, 0004020C->0, 0022020C->0, 002D020C->0, 000A020C->0, 000A020D 2, \
                     0008020C->0, 0008020D 1, 0006020C->0";
    gpu.follow(exchanges);
    gpu.flr();
    assert!(gpu.wait_for_boot(GPU_BOOT));
    assert_eq!(gpu.get(GPU_STATUS), 1);

    let status = fleet.status("gpu0").unwrap();
    assert_eq!((status.boot, status.status_word, status.flrs, status.rpcs), (BootState::Ready, 1, 1, 10));
    assert_eq!((status.stray, status.host_errors), (vec![], vec![]));

    let events = fleet.trace();
    let seen: Vec<String> = trace::rpcs(&events, "gpu0").iter().map(ToString::to_string).collect();
    assert_eq!(seen.join(", "), exchanges);
    let own: Vec<String> =
        events.iter().filter(|e| e.kind == Kind::Rpc).map(|e| e.note.as_deref().unwrap().to_owned()).collect();
    assert_eq!(own.join(", "), exchanges, "the device's own view of the exchanges is the same");
    assert!(trace::rpcs(&events, "nvsw0").is_empty());
    let kinds: Vec<Kind> = events
        .iter()
        .filter(|e| &*e.device == "gpu0")
        .map(|e| e.kind)
        .filter(|k| matches!(k, Kind::Flr | Kind::Ready))
        .collect();
    assert_eq!(kinds, [Kind::Flr, Kind::Ready]);

    drop(gpu);
    drop(fleet);
    let lines = fs::read_to_string(folder.path().join("trace.jsonl")).unwrap();
    let read_back: Vec<TraceEvent> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(trace::rpcs(&read_back, "gpu0").len(), 10);
    assert!(!folder.path().join("sockets/gpu0.sock").exists());

    // The knob file carries the mode into the next run.
    let fleet = Fleet::start(config).unwrap();
    let mut gpu = connect(&fleet, "gpu0");
    assert!(gpu.wait_for_boot(GPU_BOOT));
    assert_eq!(gpu.get(GPU_STATUS), 1);
    assert_eq!(fleet.status("gpu0").unwrap().knobs[&10], 2);
}

#[test]
fn a_bus_reset_is_told_from_an_flr() {
    let folder = tempfile::tempdir().unwrap();
    let fleet = Fleet::start(config(folder.path(), vec![quick("gpu0", ModelKind::H200)])).unwrap();
    let mut gpu = connect(&fleet, "gpu0");
    gpu.reset().unwrap();
    assert_eq!(gpu.get(BOOT_0), u32::MAX, "memory decode is off after a bus reset");
    gpu.enable_memory();
    assert_eq!(gpu.get(BOOT_0), 0x1800_00a1);
    gpu.flr();
    let status = fleet.status("gpu0").unwrap();
    assert_eq!((status.flrs, status.bus_resets), (1, 1));
}

#[test]
fn a_closed_connection_power_cycles_the_device_and_the_next_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let fleet = Fleet::start(config(folder.path(), vec![quick("gpu0", ModelKind::H100)])).unwrap();
    let mut gpu = connect(&fleet, "gpu0");
    assert!(gpu.wait_for_boot(GPU_BOOT));
    gpu.put(0x9_1288, 1);
    assert_eq!(gpu.write_knob(8, 1), "0008020D 1");
    fleet.clear_trace();
    drop(gpu);
    wait_for_event(&fleet, |event| event.kind == Kind::PowerOn);
    let mut gpu = connect(&fleet, "gpu0");
    assert!(gpu.wait_for_boot(GPU_BOOT));
    assert_eq!([gpu.get(0x9_1288), gpu.get(GPU_STATUS)], [0, 1]);
}

#[test]
fn faults_can_be_set_while_the_device_runs() {
    let folder = tempfile::tempdir().unwrap();
    let fleet = Fleet::start(config(folder.path(), vec![quick("gpu0", ModelKind::H100)])).unwrap();
    let mut gpu = connect(&fleet, "gpu0");
    fleet.set_fault("gpu0", Fault::BarAllOnes).unwrap();
    assert_eq!(gpu.get(BOOT_0), u32::MAX);
    assert_eq!(fleet.status("gpu0").unwrap().faults, [Fault::BarAllOnes]);
    fleet.clear_faults("gpu0").unwrap();
    assert_eq!(gpu.get(BOOT_0), 0x1800_00a1);
    assert!(matches!(fleet.set_fault("gpu9", Fault::BarAllOnes), Err(FleetError::UnknownDevice(_))));
}

#[test]
fn a_peer_that_talks_nonsense_costs_only_its_connection() {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    let folder = tempfile::tempdir().unwrap();
    let fleet = Fleet::start(config(folder.path(), vec![quick("gpu0", ModelKind::H100)])).unwrap();
    // A greeting of version data that is not terminated; then bytes of no meaning at all.
    let mut greeting = vec![0, 0, 1, 0, 22, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    greeting.extend(b"{}");
    for bytes in [greeting, vec![0xff; 64]] {
        fleet.clear_trace();
        let mut stream = UnixStream::connect(fleet.socket("gpu0").unwrap()).unwrap();
        stream.write_all(&bytes).unwrap();
        drop(stream);
        wait_for_event(&fleet, |event| event.kind == Kind::PowerOn);
    }
    assert_eq!(connect(&fleet, "gpu0").config(0), 0x2330_10de);
}

#[test]
fn stale_sockets_are_replaced_and_live_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), vec![quick("gpu0", ModelKind::H100)]);
    fs::create_dir_all(&config.socket_dir).unwrap();
    let path = config.socket_dir.join("gpu0.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let fleet = Fleet::start(config.clone()).unwrap();
    assert!(matches!(Fleet::start(config.clone()), Err(FleetError::SocketInUse { .. })));
    assert_eq!(connect(&fleet, "gpu0").config(0), 0x2330_10de, "the first fleet is unharmed");
    drop(fleet);
    fs::write(&path, "not a socket").unwrap();
    assert!(matches!(Fleet::start(config), Err(FleetError::SocketInUse { .. })));
    assert!(path.exists());
}

#[test]
fn a_fleet_that_cannot_be_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let gpu = quick("gpu0", ModelKind::H100);
    let twice = config(folder.path(), vec![gpu.clone(), gpu.clone()]);
    assert!(matches!(Fleet::start(twice), Err(FleetError::DuplicateName(name)) if name == "gpu0"));
    let bad = config(folder.path(), vec![DeviceSpec { name: "a/b".into(), ..gpu.clone() }]);
    assert!(matches!(Fleet::start(bad), Err(FleetError::Spec(_))));
    let long = config(&folder.path().join("x".repeat(100)), vec![gpu]);
    assert!(matches!(Fleet::start(long), Err(FleetError::PathTooLong { .. })));
}

#[test]
fn stopping_an_idle_fleet_takes_no_time() {
    let folder = tempfile::tempdir().unwrap();
    let devices = (0..12).map(|index| quick(&format!("gpu{index}"), ModelKind::H100)).collect();
    let fleet = Fleet::start(config(folder.path(), devices)).unwrap();
    let start = Instant::now();
    drop(fleet);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}
