//! The targets over the seeds that are kept with the sources, and over mutations of those that are the same in every run.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::fs;
use std::path::{Path, PathBuf};

use fuzz_targets::{TARGETS, Target};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

/// The seeds of a target, by name.
fn seeds(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let mut seeds: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    seeds.sort();
    assert!(seeds.len() >= 5, "{} has {} seeds only", folder.display(), seeds.len());
    seeds
}

/// One change of an input.
#[derive(Clone, Debug)]
enum Edit {
    Set(usize, u8),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
    Cut(usize),
    Repeat(usize, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = 0..8192_usize;
    let telling = prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(b'\n'), Just(b'*'), Just(b'0')];
    prop_oneof![
        4 => (at.clone(), telling).prop_map(|(at, byte)| Edit::Set(at, byte)),
        2 => (at.clone(), proptest::collection::vec(any::<u8>(), 1..24)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        1 => (at.clone(), 1..64_usize).prop_map(|(at, count)| Edit::Remove(at, count)),
        1 => at.clone().prop_map(Edit::Cut),
        1 => (at, 1..64_usize).prop_map(|(at, count)| Edit::Repeat(at, count)),
    ]
}

fn apply(input: &mut Vec<u8>, edit: &Edit) {
    let within = |at: usize| at % (input.len() + 1);
    match edit {
        Edit::Set(at, byte) => {
            let at = within(*at);
            if let Some(old) = input.get_mut(at) {
                *old = *byte;
            }
        }
        Edit::Insert(at, bytes) => {
            let at = within(*at);
            input.splice(at..at, bytes.iter().copied());
        }
        Edit::Remove(at, count) => {
            let at = within(*at);
            let end = (at + count).min(input.len());
            input.drain(at..end);
        }
        Edit::Cut(at) => input.truncate(within(*at)),
        Edit::Repeat(at, count) => {
            let at = within(*at);
            let end = (at + count).min(input.len());
            let again = input[at..end].to_vec();
            input.splice(at..at, again);
        }
    }
}

/// Runs a target over its seeds and this many mutations.
fn run(name: &str, mutations: u32) {
    let &(_, target): &Target = TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let seeds = seeds(name);
    for (path, seed) in &seeds {
        eprintln!("{}", path.display());
        target(seed);
    }
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(mutations) };
    let mut runner = TestRunner::new_with_rng(config, rng);
    let inputs = (0..seeds.len(), proptest::collection::vec(edit(), 1..6));
    let outcome = runner.run(&inputs, |(seed, edits)| {
        let mut input = seeds[seed].1.clone();
        for edit in &edits {
            apply(&mut input, edit);
        }
        target(&input);
        Ok(())
    });
    outcome.unwrap();
    let most_mib = peak_mib();
    assert!(most_mib < 512, "{name} took {most_mib} MiB of memory");
}

/// The most memory that this process ever had.
fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

#[test]
fn what_the_kubelet_asks() {
    run("kubelet", 6000);
}

#[test]
fn the_kubelets_book() {
    run("checkpoint", 20_000);
}

#[test]
fn config_space() {
    run("config", 1500);
}

#[test]
fn devices_that_lie() {
    run("firmware", 6000);
}

/// Honest for so many reads, then so many lies, then honest again.
#[test]
fn a_lie_at_any_point_of_a_conversation() {
    let lie = (0xa1..=0xff_u8, any::<u8>(), any::<u8>());
    let inputs = (any::<u8>(), 0..400_usize, proptest::collection::vec(lie, 1..8));
    let inputs = inputs.prop_map(|(setup, honest, lies)| {
        let lies = lies.into_iter().flat_map(|(kind, one, two)| [kind, one, two]);
        [setup, 0].into_iter().chain(std::iter::repeat_n(0, honest)).chain(lies).collect::<Vec<u8>>()
    });
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(6000) };
    let outcome = TestRunner::new_with_rng(config, rng).run(&inputs, |input| {
        fuzz_targets::firmware(&input);
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn modalias_and_its_list() {
    run("modalias", 20_000);
}

#[test]
fn resource_files() {
    run("resource", 1000);
}

#[test]
fn whole_trees() {
    run("tree", 300);
}

#[test]
fn uevents() {
    run("uevent", 20_000);
}

#[test]
fn every_target_has_seeds_and_no_seeds_are_left_over() {
    let mut folders: Vec<String> = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    folders.sort();
    assert_eq!(folders, TARGETS.map(|(name, _)| name.to_owned()));
}
