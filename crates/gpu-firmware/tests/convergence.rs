//! From every knob vector and every mode that a device can have booted with, each target is reached in one change, and a
//! second one has nothing to do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod common;

use std::collections::BTreeMap;

use gpu_firmware::{Knob, Mode, vector};
use lab_devices::{DeviceSpec, ModelKind};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use common::{Gpu, change, chip, fleet};

type Knobs = BTreeMap<u16, u16>;

/// Every assignment of these values.
fn assignments(values: &[(u16, Vec<u16>)]) -> Vec<Knobs> {
    values.iter().fold(vec![Knobs::new()], |starts, (knob, values)| {
        let with = |start: Knobs, value: u16| start.into_iter().chain([(*knob, value)]).collect();
        starts.into_iter().flat_map(|start| values.iter().map(move |value| with(start.clone(), *value))).collect()
    })
}

/// The knobs of a device that have to do with modes and that its firmware knows, with every value that is known of them.
fn values(spec: &DeviceSpec) -> Vec<(u16, Vec<u16>)> {
    let known = spec.knob_ids();
    let all = [2, 4, 6, 8, 10, 34, 45].into_iter().filter(|knob| known.contains(knob));
    // The first public release of the vendor's tool wrote 1 to the decoupler (gpu-cc-protocol section 4.10). Blackwell's
    // newer rules leave it and the unnamed knobs alone, so what they hold makes no difference there.
    let is_blackwell = !matches!(spec.model, ModelKind::H100 | ModelKind::Ls10);
    let value = |knob| match knob {
        10 if is_blackwell => vec![0, 2],
        10 => vec![0, 1, 2],
        2 | 4 | 34 | 45 if is_blackwell => vec![0],
        _ => vec![0, 1],
    };
    all.map(|knob| (knob, value(knob))).collect()
}

/// The knobs that make each of the modes a device can boot with, states that no mode has among them.
fn boots(spec: &DeviceSpec) -> Vec<Knobs> {
    let known = spec.knob_ids();
    let of: &[u16] = if spec.model.is_switch() { &[45] } else { &[6, 8, 45] };
    let of: Vec<_> = of.iter().filter(|knob| known.contains(knob)).map(|knob| (*knob, vec![0, 1])).collect();
    assignments(&of)
}

/// A device that booted with the knobs `boot` and then got the knobs `pending`, brought to `target`.
fn converge(spec: &DeviceSpec, boot: &Knobs, pending: &Knobs, target: Mode) {
    let told = || format!("{} booted with {boot:?}, pending {pending:?}, to {target}", spec.model);
    let gpu = Gpu::new(DeviceSpec { knobs: boot.clone(), ..spec.clone() });
    gpu.boot();
    let word = gpu.status().status_word;
    gpu.set_knobs(pending);
    assert_eq!(gpu.status().status_word, word, "{}", told());
    let before = gpu.status().knobs;

    let outcome = change(&[&gpu], target);
    let done = outcome.devices[0].result.as_ref().unwrap_or_else(|error| panic!("{}: {error}", told()));
    assert_eq!(done.effective, target, "{}", told());
    let status = gpu.status();
    // Every knob of the target's vector has its value, and no other knob was touched.
    let mut expected = before.clone();
    let known = vector(chip(spec.model), target).into_iter().filter(|(knob, _)| before.contains_key(&knob.0));
    expected.extend(known.map(|(Knob(knob), value)| (knob, value)));
    assert_eq!(status.knobs, expected, "{}", told());
    let needed = before != expected || !is_word_of(spec, target, word);
    assert_eq!((done.was_reset, status.flrs), (needed, u64::from(needed)), "{}", told());
    assert!(is_word_of(spec, target, status.status_word), "{}: {:x}", told(), status.status_word);

    let again = change(&[&gpu], target);
    let done = again.devices[0].result.as_ref().unwrap_or_else(|error| panic!("{}: {error}", told()));
    assert_eq!((done.written.len(), done.was_reset), (0, false), "{}: twice changes nothing", told());
    gpu.assert_clean();
}

/// Whether a status word is that of a mode, as gpu-cc-protocol section 3 has it and regardless of the driver.
fn is_word_of(spec: &DeviceSpec, mode: Mode, word: u32) -> bool {
    let mask = if spec.model == ModelKind::H100 { 0x23 } else { 0x3 };
    let expected = match (spec.model.is_switch(), mode) {
        (false, Mode::On) | (true, Mode::Ppcie) => 1,
        (false, Mode::Devtools) => 3,
        (false, Mode::Ppcie) => 0x20,
        _ => 0,
    };
    word & mask == expected
}

/// All of a device's vectors, boots and targets; the number of changes.
fn exhaust(spec: &DeviceSpec, modes: &[Mode]) -> usize {
    let (pending, boots) = (assignments(&values(spec)), boots(spec));
    for target in modes {
        for boot in &boots {
            for pending in &pending {
                converge(spec, boot, pending, *target);
            }
        }
    }
    let (vectors, words, targets) = (pending.len(), boots.len(), modes.len());
    println!("{} with {:?} firmware: {vectors} vectors x {words} boots x {targets} targets", spec.model, spec.firmware);
    vectors * words * targets
}

/// Those of the fleet that are like this one.
fn device(of: impl Fn(&DeviceSpec) -> bool) -> Vec<(DeviceSpec, Vec<Mode>)> {
    let devices: Vec<_> = fleet().into_iter().filter(|(spec, _)| of(spec)).collect();
    assert!(!devices.is_empty());
    devices
}

fn total(devices: &[(DeviceSpec, Vec<Mode>)]) -> usize {
    devices.iter().map(|(spec, modes)| exhaust(spec, modes)).sum()
}

#[test]
fn hopper_from_everywhere() {
    // By firmware: 2^6 * 3 vectors, 8 boots, 4 modes; without protected PCIe 2^5 * 3, 4 and 3.
    assert_eq!(total(&device(|spec| spec.model == ModelKind::H100)), 192 * 8 * 4 + 96 * 4 * 3);
}

#[test]
fn blackwell_and_the_switch_from_everywhere() {
    let devices = device(|spec| spec.model != ModelKind::H100);
    // Three Blackwells, and the switch by firmware: what one without protected PCIe boots with is always off.
    assert_eq!(total(&devices), 3 * (8 * 4 * 3) + 192 * 2 * 2 + 96);
    let hidden = |(spec, modes): (DeviceSpec, _)| (DeviceSpec { decoupler_in_status: false, ..spec }, modes);
    let hidden: Vec<_> = devices.into_iter().filter(|(spec, _)| !spec.model.is_switch()).map(hidden).collect();
    assert_eq!(total(&hidden), 3 * (8 * 4 * 3), "the same if the status word does not show the decoupler");
}

/// Values that no tool is known to write: nothing but the target counts.
#[test]
fn strange_values_converge_too() {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) };
    let devices = fleet();
    let cases = (0..devices.len(), prop::collection::vec(any::<u16>(), 7), 0..3_usize, 0..8_usize);
    let outcome = TestRunner::new_with_rng(config, rng).run(&cases, |(device, strange, target, boot)| {
        let (spec, modes) = &devices[device];
        let boots = boots(spec);
        let pending = values(spec).into_iter().zip(strange).map(|((knob, _), value)| (knob, value)).collect();
        converge(spec, &boots[boot % boots.len()], &pending, modes[target % modes.len()]);
        Ok(())
    });
    outcome.unwrap();
}
