//! How often the driver looks while it waits, how long it sleeps, and how many requests a change takes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod common;

use std::time::Duration;

use gpu_firmware::{Clock, Mode};
use lab_devices::{DeviceSpec, ModelKind};

use common::{CONFIG, Gpu, change, fleet};

const MS: Duration = Duration::from_millis(1);

/// The poll interval that the protocol names for waits in which a register is looked at last (gpu-cc-protocol sections 4.8,
/// 4.9, 5.1 and 5.2).
fn interval(register: u32) -> Duration {
    match register {
        // The command queue of EMEM channel 2, and the mailbox of MNOC port 0.
        0x8f_2c10 | 0x8f_2c14 | 0x8f_1f04 | 0x8f_1f84 => MS,
        // EMEM's message queue; BOOT_0, boot scratch, recovery, status.
        0x8f_2c90 | 0x8f_2c94 | CONFIG | 0 | 0x2_00bc | 0xad_00bc | 0x6_60bc | 0x2_0120 | 0x8a_a128 | 0x6_6120
        | 0x11_82cc | 0x590 | 0x2_8c50 => 10 * MS,
        other => panic!("nothing is known that is waited for by looking at {other:#x}"),
    }
}

/// A change of mode of a device that is slow in every way that it may be.
fn slow_change(spec: &DeviceSpec, modes: &[Mode], faults: &[&str]) -> Gpu {
    let gpu = Gpu::in_mode(spec.clone(), modes[0]);
    for fault in faults {
        gpu.fault(fault);
    }
    let target = *modes.last().unwrap();
    let outcome = change(&[&gpu], target);
    assert!(outcome.all_verified(), "{} -> {target} with {faults:?}: {outcome:?}", spec.model);
    gpu.assert_clean();
    gpu
}

#[test]
fn no_sleep_is_longer_than_the_protocol_s_poll_interval() {
    for (spec, modes) in fleet() {
        for faults in [&[][..], &["boot-slow:4000"], &["fsp-late-reply:2000"], &["pri-error-after-reset:3000"]] {
            let gpu = slow_change(&spec, &modes, faults);
            let longest = gpu.clock.longest_sleeps();
            for (register, slept) in &longest {
                assert!(*slept <= interval(*register), "{} {faults:?}: {slept:?} after {register:#x}", spec.model);
            }
            // And where there is long to wait the whole interval is slept: nothing is looked at without pause.
            if faults.first().is_some_and(|fault| fault.starts_with("boot")) && modes.len() > 1 {
                assert_eq!(longest.values().max(), Some(&(10 * MS)), "{} {faults:?}", spec.model);
            }
        }
    }
}

/// Reads in a second that a slow device takes longer than a quick one, and how long that is.
#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn reads_a_second(slow: &Gpu, quick: &Gpu) -> (f64, f64) {
    let waited = slow.clock.now().as_secs_f64() - quick.clock.now().as_secs_f64();
    (slow.reads().abs_diff(quick.reads()) as f64 / waited, waited)
}

#[test]
fn no_wait_is_a_busy_loop() {
    for (spec, modes) in fleet().into_iter().filter(|(_, modes)| modes.len() > 1) {
        let is_mnoc = !matches!(spec.model, ModelKind::H100 | ModelKind::Ls10);
        let quick = slow_change(&spec, &modes, &[]);
        let slow_firewall = DeviceSpec { firewall: Duration::from_secs(4), ..spec.clone() };
        let mut table = vec![
            // One register each 10 ms.
            ("boot-slow:4000", slow_change(&spec, &modes, &["boot-slow:4000"]), 101.0),
            // The queue's two pointers each 10 ms, or the mailbox's one register each millisecond.
            (
                "fsp-late-reply:2000",
                slow_change(&spec, &modes, &["fsp-late-reply:2000"]),
                if is_mnoc { 1010.0 } else { 205.0 },
            ),
        ];
        if is_mnoc {
            // The firewall's bit each 10 ms, with the walk to it: ten words or so.
            table.push(("a slow firewall", slow_change(&slow_firewall, &modes, &[]), 1100.0));
        }
        for (what, slow, most) in table {
            let (rate, waited) = reads_a_second(&slow, &quick);
            println!("{} {what}: {rate:.0} reads a second over {waited:.1} s", spec.model);
            assert!(waited > 3.9 && rate <= most, "{} {what}: {rate} over {waited}", spec.model);
        }
    }
    // Configuration space that is not ready yet: its first word each 10 ms.
    let config_retry = Duration::from_secs(4);
    let gpu = Gpu::new(DeviceSpec { config_retry, ..DeviceSpec::new("gpu0", ModelKind::H100) });
    gpu.device().wait_boot().unwrap();
    assert!(gpu.clock.now() > config_retry && gpu.reads() < 500, "{}", gpu.reads());
}

/// What a change asks the firmware for: as many requests as the protocol's examples, one more for each write to read it
/// back, and the permissions of what is to be written, read once before the first write.
#[test]
fn staging_costs_what_the_examples_cost_and_the_read_backs() {
    use Mode::{Devtools, Off, On, Ppcie};
    use ModelKind::{B200, H100, Ls10};
    // By example: requests, writes among them; then the permissions, and what the complete vectors of section 6.3 add: off
    // clears CC as well, and does not look at CCM first.
    let table = [
        ("5", H100, Off, On, 10, 2, 3, 0),
        ("6", H100, Off, Devtools, 10, 2, 2, 0),
        ("7", H100, On, Off, 6, 2, 3, 0),
        ("8", H100, Off, Ppcie, 10, 2, 2, 0),
        ("9", Ls10, Off, Ppcie, 9, 1, 1, 0),
        ("10", H100, Ppcie, Off, 5, 2, 4, 1),
        ("10", Ls10, Ppcie, Off, 4, 1, 4, 1),
        ("11", B200, Off, On, 3, 1, 2, 0),
    ];
    println!(
        "| example | device | change | requests there | writes | permissions | complete vector | requests | verification |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (example, kind, from, to, requests, writes, permissions, complete) in table {
        let gpu = Gpu::in_mode(DeviceSpec::new("gpu0", kind), from);
        let mut staging = Vec::new();
        gpu.set_watched(to, |gpu| staging = gpu.requests()).unwrap();
        let verification = gpu.requests().len();
        let knob = |request: &String| u16::from_str_radix(&request[..4], 16).unwrap();
        let is_permission = |knob| matches!(knob, 1 | 3 | 5 | 7 | 9 | 33 | 44);
        let found = (
            staging.len(),
            staging.iter().filter(|request| request.contains(' ')).count(),
            staging.iter().filter(|request| is_permission(knob(request))).count(),
        );
        let all = requests + writes + permissions + complete;
        println!(
            "| {example} | {kind} | {from} to {to} | {requests} | {writes} | {permissions} | {complete} | {all} | {verification} |"
        );
        assert_eq!(found, (all, writes, permissions), "example {example}: {staging:?}");
        assert_eq!(verification, common::vector_knobs(kind), "example {example}");
    }
}
