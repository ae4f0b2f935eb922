//! One device against the lab's virtual one: the requests of the protocol's examples, every way between modes, faults.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod common;

use std::ops::ControlFlow;
use std::time::Duration;

use gpu_firmware::{Clock, Effective, Mode};
use lab_devices::{DeviceSpec, Firmware, ModelKind};

use common::{Gpu, modes};

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
        gpu.set_watched(mode, |gpu| assert_eq!(gpu.requests().join(" | "), expected, "{kind}")).unwrap();
        assert_eq!(gpu.status().status_word & 0x23, bits, "{kind}");
        gpu.assert_clean();
    }
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
            let result = gpu.set(from).and_then(|()| gpu.set(to));
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
        gpu.set(Mode::Off).unwrap();
        let error = gpu.set(Mode::On).unwrap_err();
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
        gpu.set(target).unwrap();
        gpu.assert_clean();
    }
}

#[test]
fn protected_pcie_is_seen_and_cleared() {
    let knobs = [(45, 1), (10, 2)].into();
    let gpu = Gpu::new(DeviceSpec { knobs, ..DeviceSpec::new("gpu0", ModelKind::H100) });
    let observed = gpu.device().observe().unwrap();
    assert_eq!((observed.effective, observed.configured), (Effective::Ppcie, Some(Mode::Ppcie)));
    gpu.set(Mode::Off).unwrap();
    assert_eq!(gpu.status().status_word, 0);
}

#[test]
fn faults_that_pass_are_sat_out() {
    for fault in ["boot-slow:4500", "fsp-late-reply:4000", "fsp-split-pointers", "pri-error-after-reset:3000"] {
        let gpu = Gpu::healthy();
        gpu.fault(fault);
        gpu.set(Mode::On).unwrap_or_else(|error| panic!("{fault}: {error}"));
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
            if at_boot { gpu.device().reset().and_then(|()| gpu.device().wait_boot()) } else { gpu.set(Mode::On) };
        let error = outcome.expect_err(fault);
        assert_eq!(error.code(), code, "{fault}: {error}");
        assert!(gpu.clock.now() < start + Duration::from_secs(17), "{fault}");
        gpu.clear_faults();
        // The next attempt needs no help: neither from a person nor from a restart.
        gpu.set(Mode::On).unwrap_or_else(|error| panic!("after {fault}: {error}"));
    }
}

#[test]
fn a_forbidden_change_is_explained() {
    let gpu = Gpu::new(DeviceSpec { knobs: [(7, 0)].into(), ..DeviceSpec::new("gpu0", ModelKind::H100) });
    assert_eq!(gpu.set(Mode::On).unwrap_err().code(), "InBandDenied");
    gpu.assert_clean();
}
