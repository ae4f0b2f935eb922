//! This crate against the lab's virtual GPU, in one process and in model time. The two were written apart from each
//! other, from the same protocol specification: what one of them misread shows here.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gpu_firmware::{Access, BackEnd, Bar0, Clock, Device, Effective, Error, Fault, Mode, Reset};
use hw_probe::testing::FakeSysfs;
use hw_probe::{Inventory, PciFunction};
use lab_devices::model::ModelEvent;
use lab_devices::{DeviceSpec, DeviceStatus, Firmware, Model, ModelKind, Space};

/// Model time, which passes when somebody sleeps.
#[derive(Clone, Default)]
struct ModelClock(Arc<AtomicU64>);

impl Clock for ModelClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }

    fn sleep(&self, duration: Duration) {
        self.0.fetch_add(u64::try_from(duration.as_nanos()).unwrap(), Ordering::SeqCst);
    }
}

/// A virtual GPU and the little that the kernel does around it.
#[derive(Clone)]
struct Gpu {
    kind: ModelKind,
    model: Arc<Mutex<Model>>,
    clock: ModelClock,
}

const COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u32 = 0x2;
/// DEVCTL of the PCI Express capability, which a real H200 has at 0x60 (h200-observed).
const DEVCTL: u64 = 0x68;
const INITIATE_FLR: u32 = 1 << 15;

impl Gpu {
    /// One that has just been powered up, with these faults.
    fn new(spec: DeviceSpec) -> Self {
        let (kind, clock) = (spec.model, ModelClock::default());
        let gpu = Self { kind, model: Arc::new(Mutex::new(Model::new(spec, clock.now()))), clock };
        gpu.model.lock().unwrap().power_on(Duration::ZERO);
        gpu
    }

    fn healthy() -> Self {
        Self::new(DeviceSpec::new("gpu0", ModelKind::H100))
    }

    fn read(&self, space: Space, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.model.lock().unwrap().read(self.clock.now(), space, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, space: Space, offset: u64, value: u32) {
        self.model.lock().unwrap().write(self.clock.now(), space, offset, &value.to_le_bytes());
    }

    fn device(&self) -> Device {
        Device::with_back_end(&function(self.kind), Box::new(self.clone()), Arc::new(self.clock.clone())).unwrap()
    }

    fn fault(&self, text: &str) {
        self.model.lock().unwrap().set_fault(self.clock.now(), text.parse().unwrap());
    }

    fn clear_faults(&self) {
        self.model.lock().unwrap().clear_faults(self.clock.now());
    }

    fn status(&self) -> DeviceStatus {
        self.model.lock().unwrap().status(self.clock.now())
    }

    /// The requests since the last call: dword 2, and what was written or answered.
    fn requests(&self) -> Vec<String> {
        let text = |event| match event {
            ModelEvent::Rpc { request, reply, .. } => Some(match (request.get(3), reply.as_deref()) {
                (Some(value), _) => format!("{:08X} {value}", request[2]),
                (None, Some([_, _, _, _, 0, value])) => format!("{:08X}->{}", request[2], value & 0xffff),
                (None, Some([_, _, _, _, error, ..])) => format!("{:08X}!{error:x}", request[2]),
                (None, reply) => panic!("{request:x?} {reply:x?}"),
            }),
            _ => None,
        };
        self.model.lock().unwrap().take_events().into_iter().filter_map(|(_, event)| text(event)).collect()
    }

    /// Stages, resets, waits and verifies.
    fn change(&self, mode: Mode) -> Result<(), Error> {
        self.change_watched(mode, |_| {})
    }

    /// The same; `staged` is called before the reset.
    fn change_watched(&self, mode: Mode, staged: impl FnOnce(&Self)) -> Result<(), Error> {
        let mut device = self.device();
        device.stage(mode, &mut |_| ControlFlow::Continue(()))?;
        staged(self);
        device.reset()?;
        device.wait_boot()?;
        device.verify(mode).map(drop)
    }

    fn assert_clean(&self) {
        let status = self.status();
        assert_eq!((status.stray_count, status.host_error_count), (0, 0), "{status:#?}");
    }
}

impl Bar0 for Gpu {
    fn read32(&self, register: u32) -> Result<u32, Fault> {
        Ok(self.read(Space::Bar0, register.into()))
    }

    fn write32(&self, register: u32, value: u32) -> Result<(), Fault> {
        self.write(Space::Bar0, register.into(), value);
        Ok(())
    }
}

impl Reset for Gpu {
    /// What the kernel does: FLR, and COMMAND as it was.
    fn reset(&mut self) -> Result<(), Fault> {
        let command = self.read(Space::Config, COMMAND);
        self.write(Space::Config, DEVCTL, self.read(Space::Config, DEVCTL) | INITIATE_FLR);
        while self.read(Space::Config, 0) & 0xffff == 1 {
            self.clock.sleep(Duration::from_millis(10));
        }
        self.write(Space::Config, COMMAND, command);
        Ok(())
    }
}

impl BackEnd for Gpu {
    fn access(&self) -> Access {
        Access::Sysfs
    }

    fn config32(&self, offset: u16) -> Result<u32, Fault> {
        Ok(self.read(Space::Config, offset.into()))
    }

    fn bar0(&mut self) -> Result<Box<dyn Bar0>, Fault> {
        self.write(Space::Config, COMMAND, self.read(Space::Config, COMMAND) | COMMAND_MEMORY);
        Ok(Box::new(self.clone()))
    }
}

/// The device as a scan would tell of it.
fn function(kind: ModelKind) -> PciFunction {
    static SCANNED: Mutex<BTreeMap<ModelKind, PciFunction>> = Mutex::new(BTreeMap::new());
    let scan = || {
        let sysfs = FakeSysfs::new();
        let function = sysfs.function("0000:41:00.0", kind.vendor_id(), kind.device_id(), kind.class());
        let bdf = function.subsystem(kind.vendor_id(), kind.subsystem_id()).bdf();
        Inventory::scan(&sysfs.root()).get(bdf).unwrap().clone()
    };
    SCANNED.lock().unwrap().entry(kind).or_insert_with(scan).clone()
}

#[test]
fn cc_on_off_and_devtools_are_examples_5_6_and_7() {
    let on = "002D020C->0 | 0002020C->0 | 0004020C->0 | 0022020C->0 | 002D020C->0 | 000A020C->0 | 0009020C->1 | \
              0007020C->1 | 0005020C->1 | 000A020D 2 | 000A020C->2 | 0008020C->0 | 0008020D 1 | 0008020C->1 | 0006020C->0";
    let off = "002D020C->0 | 000A020C->2 | 0009020C->1 | 0005020C->1 | 0007020C->1 | 000A020D 0 | 000A020C->0 | 0006020C->0 | 0008020C->1 | 0008020D 0 | 0008020C->0";
    let devtools = "002D020C->0 | 0002020C->0 | 0004020C->0 | 0022020C->0 | 002D020C->0 | 000A020C->0 | 0008020C->0 | \
                    0007020C->1 | 0005020C->1 | 0008020D 1 | 0008020C->1 | 0006020C->0 | 0006020D 1 | 0006020C->1";
    let gpu = Gpu::healthy();
    for (mode, expected, bits) in [(Mode::On, on, 1), (Mode::Off, off, 0), (Mode::Devtools, devtools, 3)] {
        let mut device = gpu.device();
        let before = device.effective().unwrap();
        let staged = device.stage(mode, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(gpu.requests().join(" | "), expected, "{mode}");
        assert!(staged.reset_needed);
        assert_eq!(device.effective().unwrap(), before, "knobs take effect at the reset");
        device.reset().unwrap();
        device.wait_boot().unwrap();
        let observed = device.verify(mode).unwrap();
        assert_eq!((observed.configured, observed.boot0), (Some(mode), 0x1800_00a1));
        assert_eq!(gpu.status().status_word, bits);
        gpu.requests();
    }
    assert_eq!(gpu.status().flrs, 3);
    gpu.assert_clean();
}

#[test]
fn blackwell_is_example_11_and_the_switch_example_9() {
    let table = [
        (
            ModelKind::B200,
            Mode::On,
            "0008020C->0 | 0007020C->1 | 0005020C->1 | 0008020D 1 | 0008020C->1 | 0006020C->0",
            1,
        ),
        (
            ModelKind::RtxPro6000,
            Mode::Devtools,
            "0008020C->0 | 0007020C->1 | 0005020C->1 | 0008020D 1 | 0008020C->1 | 0006020C->0 | 0006020D 1 | 0006020C->1",
            3,
        ),
        // The lab's switch knows no other permission than 44.
        (
            ModelKind::Ls10,
            Mode::Ppcie,
            "0008020C->0 | 0002020C->0 | 0004020C->0 | 0022020C->0 | 0006020C->0 | 0008020C->0 | 000A020C->0 | \
             002D020C->0 | 002C020C->1 | 002D020D 1 | 002D020C->1",
            1,
        ),
    ];
    for (kind, mode, expected, bits) in table {
        let gpu = Gpu::new(DeviceSpec::new("gpu0", kind));
        gpu.change_watched(mode, |gpu| assert_eq!(gpu.requests().join(" | "), expected, "{kind}")).unwrap();
        assert_eq!(gpu.status().status_word & 0x23, bits, "{kind}");
        gpu.assert_clean();
    }
}

/// The modes that devices of this kind have of their own.
fn modes(kind: ModelKind) -> Vec<Mode> {
    let all = if kind.is_switch() { &[Mode::Off, Mode::Ppcie][..] } else { &Mode::ALL };
    let support = gpu_firmware::Support::of(&function(kind)).unwrap();
    all.iter().copied().filter(|mode| support.target(*mode).is_ok()).collect()
}

#[test]
fn every_way_between_modes_works_and_breaks_no_rule_of_the_device() {
    let kinds = [ModelKind::H100, ModelKind::H200, ModelKind::B200, ModelKind::B300, ModelKind::RtxPro6000];
    let mut ways = 0;
    for kind in kinds.into_iter().chain([ModelKind::Gb200, ModelKind::Gb300, ModelKind::Ls10]) {
        let modes = modes(kind);
        for (firmware, from, to) in [Firmware::Current, Firmware::Old]
            .into_iter()
            .flat_map(|firmware| modes.iter().map(move |from| (firmware, *from)))
            .flat_map(|(firmware, from)| modes.iter().map(move |to| (firmware, from, *to)))
        {
            let is_old = firmware == Firmware::Old && [from, to].contains(&Mode::Ppcie);
            let gpu = Gpu::new(DeviceSpec { firmware, bmsai: kind.has_c2c(), ..DeviceSpec::new("gpu0", kind) });
            let result = gpu.change(from).and_then(|()| gpu.change(to));
            if is_old {
                assert_eq!(result.unwrap_err().code(), "KnobUnsupported", "{kind} {from} -> {to}");
                continue;
            }
            result.unwrap_or_else(|error| panic!("{kind} {from} -> {to}: {error}"));
            let staged = gpu.device().stage(to, &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!((staged.written.len(), staged.reset_needed), (0, false), "{kind} {from} -> {to}");
            gpu.assert_clean();
            ways += 1;
        }
    }
    println!("{ways} ways between modes");
    // With firmware of both kinds: Hopper has four modes, one of which old firmware lacks, Blackwell three, LS10 two.
    assert_eq!(ways, 2 * (16 + 9) + 5 * 2 * 9 + (4 + 1));
}

#[test]
fn boards_with_c2c_obey_the_firmware_s_bit() {
    for kind in [ModelKind::Gb200, ModelKind::Gb300] {
        let gpu = Gpu::new(DeviceSpec::new("gpu0", kind));
        gpu.change(Mode::Off).unwrap();
        let error = gpu.change(Mode::On).unwrap_err();
        assert!(error.code() == "Unsupported" && error.to_string().contains("status bit 8"), "{error}");
        gpu.assert_clean();
    }
    assert_eq!(modes(ModelKind::Gh200), [Mode::Off]);
}

#[test]
fn any_initial_knobs_converge() {
    for bits in 0..1_u16 << 7 {
        let knobs = [2, 4, 6, 8, 34, 45].into_iter().enumerate().map(|(index, knob)| (knob, bits >> index & 1));
        let knobs = knobs.chain([(10, (bits >> 6) * 2)]).collect();
        let gpu = Gpu::new(DeviceSpec { knobs, ..DeviceSpec::new("gpu0", ModelKind::H100) });
        let target = [Mode::Off, Mode::On, Mode::Devtools][usize::from(bits % 3)];
        gpu.change(target).unwrap();
        gpu.assert_clean();
    }
}

#[test]
fn protected_pcie_is_seen_and_cleared() {
    let knobs = [(45, 1), (10, 2)].into();
    let gpu = Gpu::new(DeviceSpec { knobs, ..DeviceSpec::new("gpu0", ModelKind::H100) });
    let observed = gpu.device().observe().unwrap();
    assert_eq!((observed.effective, observed.configured), (Effective::Ppcie, Some(Mode::Ppcie)));
    gpu.change(Mode::Off).unwrap();
    assert_eq!(gpu.status().status_word, 0);
}

#[test]
fn faults_that_pass_are_sat_out() {
    for fault in ["boot-slow:4500", "fsp-late-reply:4000", "fsp-split-pointers", "pri-error-after-reset:3000"] {
        let gpu = Gpu::healthy();
        gpu.fault(fault);
        gpu.change(Mode::On).unwrap_or_else(|error| panic!("{fault}: {error}"));
        gpu.assert_clean();
    }
}

#[test]
fn faults_that_stay_have_their_own_errors_in_time_and_are_survived() {
    let table = [
        ("boot-never-completes", "BootTimeout"),
        ("boot-slow:9000", "BootTimeout"),
        ("bar-all-ones", "Bar0Dead"),
        ("config-all-ones", "OffBus"),
        ("fsp-no-reply", "FspNoResponse"),
        ("fsp-late-reply:7000", "FspNoResponse"),
        ("fsp-short-reply", "FspProtocol"),
        ("fsp-mistyped-reply", "FspProtocol"),
        ("fsp-error-code:*:0x202", "FspError"),
        ("fsp-error-code:8:0x1e3", "KnobUnsupported"),
        ("fsp-queue-stuck", "FspNoResponse"),
        ("knob-write-ignored", "KnobMismatch"),
        ("mode-unchanged-after-reset", "VerifyFailed"),
    ];
    for (fault, code) in table {
        let gpu = Gpu::healthy();
        gpu.device().wait_boot().unwrap();
        gpu.fault(fault);
        let start = gpu.clock.now();
        let at_boot = fault.starts_with("boot");
        let outcome =
            if at_boot { gpu.device().reset().and_then(|()| gpu.device().wait_boot()) } else { gpu.change(Mode::On) };
        let error = outcome.expect_err(fault);
        assert_eq!(error.code(), code, "{fault}: {error}");
        assert!(gpu.clock.now() < start + Duration::from_secs(17), "{fault}");
        gpu.clear_faults();
        // The next attempt needs no help: neither from a person nor from a restart.
        gpu.change(Mode::On).unwrap_or_else(|error| panic!("after {fault}: {error}"));
    }
}

#[test]
fn a_forbidden_change_is_explained() {
    let gpu = Gpu::new(DeviceSpec { knobs: [(7, 0)].into(), ..DeviceSpec::new("gpu0", ModelKind::H100) });
    assert_eq!(gpu.change(Mode::On).unwrap_err().code(), "InBandDenied");
    gpu.assert_clean();
}
