//! A process that is killed at any moment of a change of mode: no reset that follows makes anything forbidden effective, and
//! the next change reaches its target.
//!
//! Of what changes something, these are in reach of a process: register writes, memory decoding, resets, opening and
//! closing. The power state and the files around a device are the kernel's; killing a process between them is for a real
//! kernel.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use gpu_firmware::{Access, Knob, KnobState, Mode, forbidden};
use lab_devices::{DeviceSpec, Firmware, ModelKind};

use common::{Gpu, change, fleet, knob_states};

/// What happens to a device when the process that drives it dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// Nothing: the process had no VFIO device open.
    Alone,
    /// It is reset at once: the kernel closes the VFIO device.
    Reset,
    /// It is reset when its firmware has done what it was asked for: somebody opens it with VFIO, a virtual machine perhaps.
    ResetLater,
}

/// Longer than the firmware takes for a request.
const LATER: Duration = Duration::from_millis(10);

#[derive(Default)]
struct Counts {
    transitions: usize,
    kill_points: u64,
    deaths: usize,
    boots: usize,
    /// Boots with the decoupler alone, of which nobody knows what the firmware makes.
    decoupler_alone: usize,
    states: BTreeSet<String>,
}

/// Every kill point of every change between two modes of one device.
fn interrupt(spec: &DeviceSpec, modes: &[Mode], access: Access) -> Counts {
    let mut counts = Counts::default();
    let deaths: &[Death] =
        if access == Access::Vfio { &[Death::Reset] } else { &[Death::Alone, Death::Reset, Death::ResetLater] };
    for (from, to) in modes.iter().flat_map(|from| modes.iter().map(move |to| (*from, *to))) {
        let fresh = || Gpu::in_mode(spec.clone(), from).by(access);
        let whole = fresh();
        let outcome = change(&[&whole], to);
        assert!(outcome.all_verified(), "{} {from} -> {to}: {outcome:?}", spec.model);
        let points = whole.changes();
        assert!(points >= 2, "at least the firmware was asked");
        for (point, death) in (0..points).flat_map(|point| deaths.iter().map(move |death| (point, *death))) {
            let told = format!("{} {from} -> {to}, {access:?}, killed at {point} of {points}, {death:?}", spec.model);
            let gpu = fresh();
            // Its first boot is none that a change has to do with.
            gpu.latched();
            gpu.dies_at(point);
            let _ = change(&[&gpu], to);
            assert!(gpu.succeed(), "{told}: it lives");
            if death == Death::ResetLater {
                gpu.clock.pass(LATER);
            }
            if death != Death::Alone {
                gpu.function_reset();
                gpu.boot();
            }
            let status = gpu.status();
            counts.states.insert(format!("{:?} {:x} {:?}", status.knobs, status.status_word, status.boot));
            // Where the firmware has not yet done what it was asked for when the next change begins, it does it meanwhile.
            let outcome = change(&[&gpu], to);
            assert!(outcome.all_verified(), "{told}: {outcome:?}");
            if access == Access::Vfio {
                gpu.boot();
            }
            for vector in gpu.latched() {
                assert_eq!(forbidden(&vector), None, "{told}: {vector:?} became effective");
                counts.boots += 1;
                counts.decoupler_alone += usize::from(is_decoupler_alone(&vector));
            }
            gpu.assert_clean();
            counts.deaths += 1;
        }
        counts.transitions += 1;
        counts.kill_points += points;
    }
    let Counts { transitions, kill_points, deaths, boots, decoupler_alone, states } = &counts;
    let (kind, firmware, states) = (spec.model, spec.firmware, states.len());
    println!(
        "{kind} with {firmware:?} firmware by {access:?}: {transitions} transitions, {kill_points} kill points, {deaths} \
         deaths, {states} states left behind, {boots} boots, {decoupler_alone} of them with the decoupler alone"
    );
    counts
}

fn is_decoupler_alone(vector: &[KnobState]) -> bool {
    let is_on = |knob| vector.iter().any(|state| state.knob == knob && state.value > Some(0));
    is_on(Knob::BAR0_DECOUPLER) && !is_on(Knob::CCM) && !is_on(Knob::PPCIE)
}

/// The devices of the fleet that are like this one, each way.
fn matrix(of: impl Fn(&DeviceSpec) -> bool) -> Vec<Counts> {
    let devices: Vec<_> = fleet().into_iter().filter(|(spec, _)| of(spec)).collect();
    assert!(!devices.is_empty());
    let ways = devices.iter().flat_map(|device| [Access::Sysfs, Access::Vfio].map(|access| (device, access)));
    ways.map(|((spec, modes), access)| interrupt(spec, modes, access)).collect()
}

#[test]
fn hopper_survives_every_death() {
    let all = matrix(|spec| spec.model == ModelKind::H100 && spec.firmware == Firmware::Current);
    assert!(all.iter().all(|counts| counts.transitions == 16 && counts.states.len() > 4));
    assert!(all[0].states.len() > 16, "without a reset there are states between the modes");
    // This is met on the way to `on` and to protected PCIe, and nothing here relies on what firmware makes of it.
    assert!(all.iter().all(|counts| counts.decoupler_alone > 0));
}

#[test]
fn hopper_with_old_firmware_survives_every_death() {
    let all = matrix(|spec| spec.model == ModelKind::H100 && spec.firmware == Firmware::Old);
    assert!(all.iter().all(|counts| counts.transitions == 9));
}

#[test]
fn blackwell_survives_every_death() {
    let all = matrix(|spec| matches!(spec.model, ModelKind::B200 | ModelKind::RtxPro6000));
    assert!(all.len() == 4 && all.iter().all(|counts| counts.transitions == 9 && counts.decoupler_alone == 0));
}

#[test]
fn the_switch_survives_every_death() {
    let all = matrix(|spec| spec.model == ModelKind::Ls10);
    assert_eq!(all.iter().map(|counts| counts.transitions).collect::<Vec<_>>(), [4, 4, 1, 1]);
}

/// What the matrix looks for would be found: a device that boots with the knobs that an interrupted other tool left behind.
#[test]
fn a_forbidden_boot_is_noticed() {
    for knobs in [[(6, 1)].into(), [(8, 1), (45, 1)].into()] {
        let gpu = Gpu::new(DeviceSpec { knobs, ..DeviceSpec::new("gpu0", ModelKind::H100) });
        gpu.boot();
        assert!(gpu.latched().iter().any(|vector| forbidden(vector).is_some()));
        assert!(forbidden(&knob_states(&gpu.status().knobs)).is_some());
    }
}
