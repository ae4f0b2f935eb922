//! What this crate costs the host: a request to the firmware, a change of mode, and eight at once against one.
//!
//! All but the last are over virtual devices in model time, which takes no time of its own: what is measured is the driver's
//! work and the virtual device's. `device alone` is the latter: the same accesses at the same model times without the driver.
//! Compare numbers of one run only.

#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement that cannot go on has failed"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use gpu_firmware::Mode;
use lab_devices::{DeviceSpec, Model, ModelKind};

use common::{Gpu, ModelClock, Step, change};

const KINDS: [ModelKind; 4] = [ModelKind::H100, ModelKind::B200, ModelKind::RtxPro6000, ModelKind::Ls10];

fn spec(kind: ModelKind) -> DeviceSpec {
    DeviceSpec::new("gpu0", kind)
}

/// The modes between which a device of this kind goes back and forth.
fn other_mode(kind: ModelKind) -> Mode {
    if kind.is_switch() { Mode::Ppcie } else { Mode::On }
}

/// Makes these accesses.
fn replay(model: &mut Model, journal: &[Step]) {
    for (at, space, offset, value) in journal {
        if let Some(value) = value {
            model.write(*at, *space, *offset, &value.to_le_bytes());
        } else {
            let mut bytes = [0; 4];
            model.read(*at, *space, *offset, &mut bytes);
            black_box(bytes);
        }
    }
}

/// A device that has been on for as long as `Gpu::in_mode` lets it boot.
fn booted(kind: ModelKind) -> Model {
    let mut model = Model::new(spec(kind), Duration::ZERO);
    model.advance(Duration::from_secs(1));
    // Memory decoding, which the kernel turns on before the first access that is noted.
    model.write(Duration::from_secs(1), lab_devices::Space::Config, 0x4, &2_u32.to_le_bytes());
    model
}

/// The device's part of what made these accesses.
fn device_alone(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, kind: ModelKind, journal: &[Step]) {
    let replay = |mut model: Model| replay(&mut model, journal);
    group.bench_function(format!("{name}, device alone"), |bencher| {
        bencher.iter_batched(|| booted(kind), replay, BatchSize::SmallInput);
    });
}

/// One request and its answer, through each transport.
fn round_trips(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("round trip");
    for (name, kind) in [("EMEM", ModelKind::H100), ("MNOC", ModelKind::B200)] {
        let gpu = Gpu::in_mode(spec(kind), Mode::Off).quiet();
        let mut device = gpu.device();
        let requests = device.observe().unwrap().knobs.len();
        group.throughput(Throughput::Elements(requests as u64));
        group.bench_function(name, |bencher| bencher.iter(|| device.observe().unwrap()));

        let gpu = Gpu::in_mode(spec(kind), Mode::Off).quiet();
        let mut device = gpu.device();
        device.wait_boot().unwrap();
        gpu.note();
        device.observe().unwrap();
        let journal = gpu.journal();
        device_alone(&mut group, name, kind, &journal);
    }
    group.finish();
}

/// A whole change of mode and back: staging, reset, boot, verification.
fn transitions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("two changes");
    for kind in KINDS {
        let gpu = Gpu::in_mode(spec(kind), Mode::Off).quiet();
        let both = |gpu: &Gpu| {
            assert!(change(&[gpu], other_mode(kind)).all_verified());
            assert!(change(&[gpu], Mode::Off).all_verified());
        };
        group.bench_function(kind.name(), |bencher| bencher.iter(|| both(&gpu)));

        let gpu = Gpu::in_mode(spec(kind), Mode::Off).quiet();
        gpu.note();
        both(&gpu);
        let journal = gpu.journal();
        device_alone(&mut group, kind.name(), kind, &journal);
    }
    group.finish();
}

/// A change of mode in the machine's own time, of one device that boots in 300 ms and of eight like it at once.
fn together(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("one change in real time");
    group.sample_size(10);
    for count in [1, 8] {
        let gpus: Vec<Gpu> = (0..count)
            .map(|index| {
                Gpu::with_clock(spec(ModelKind::H100), ModelClock::real()).at(&format!("0000:{index:02x}:00.0")).quiet()
            })
            .collect();
        gpus[0].boot();
        let mut target = Mode::On;
        let mut run = |rounds: u64| {
            let gpus: Vec<&Gpu> = gpus.iter().collect();
            let start = Instant::now();
            for _ in 0..rounds {
                assert!(change(&gpus, target).all_verified());
                target = if target == Mode::On { Mode::Devtools } else { Mode::On };
            }
            start.elapsed()
        };
        group.bench_function(format!("{count} at once"), |bencher| bencher.iter_custom(&mut run));
    }
    group.finish();
}

criterion_group!(benches, round_trips, transitions, together);
criterion_main!(benches);
