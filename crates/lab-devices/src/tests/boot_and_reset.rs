//! The way from a reset to working, and what each kind of reset clears.

use std::time::Duration;

use super::host::{BOOT_0, Bench, Bus, CONTROL, DATA, GPU_BOOT, GPU_STATUS, Q_HEAD, Q_TAIL};
use crate::trace::Space;
use crate::{BootState, DeviceSpec, ModelKind};

const FLR_SCRATCH: u64 = 0x1458;
const BUS_SCRATCH: u64 = 0x9_1288;

#[test]
fn boot_takes_its_time_and_ends_at_0xff() {
    let mut bench = Bench::new(DeviceSpec::new("gpu0", ModelKind::H100));
    assert_eq!([bench.get(BOOT_0), bench.get(GPU_BOOT)], [0x1800_00a1, 0]);
    assert_eq!(bench.status().boot, BootState::Booting);
    bench.wait(299);
    assert_eq!(bench.get(GPU_BOOT), 0);
    bench.wait(1);
    assert_eq!(bench.get(GPU_BOOT), 0xff);
    assert_eq!(bench.status().boot, BootState::Ready);
    let mut switch = Bench::switch();
    assert_eq!([switch.get(BOOT_0), switch.get(0x6_60bc)], [0x0070_00a1, 0xff]);
}

#[test]
fn config_space_may_come_back_late() {
    let spec = DeviceSpec { config_retry: Duration::from_millis(100), ..DeviceSpec::new("gpu0", ModelKind::H100) };
    let mut bench = Bench::ready(spec);
    bench.flr();
    assert_eq!([bench.config(0), bench.config(4), bench.config(0x68)], [0xffff_0001, u32::MAX, u32::MAX]);
    assert_eq!(bench.get(BOOT_0), u32::MAX);
    assert_eq!(bench.status().boot, BootState::ConfigRetry);
    bench.wait(100);
    bench.enable_memory();
    assert_eq!([bench.config(0), bench.get(BOOT_0), bench.get(GPU_BOOT)], [0x2330_10de, 0x1800_00a1, 0]);
    bench.wait(300);
    assert_eq!(bench.get(GPU_BOOT), 0xff);
}

#[test]
fn knobs_outlive_every_reset_and_the_mode_follows_at_the_next_boot() {
    let mut bench = Bench::gpu();
    assert_eq!(bench.write_knob(8, 1), "0008020D 1");
    bench.flr();
    assert_eq!(bench.get(GPU_STATUS), 0, "until booted, the register keeps what it had");
    bench.wait(300);
    assert_eq!(bench.get(GPU_STATUS), 1);
    assert_eq!(bench.write_knob(6, 1), "0006020D 1");
    bench.model.bus_reset(bench.now);
    bench.enable_memory();
    bench.wait(300);
    assert_eq!(bench.get(GPU_STATUS), 3);
    bench.model.power_on(bench.now);
    bench.enable_memory();
    assert_eq!(bench.get(GPU_STATUS), 0, "power was away");
    bench.wait(300);
    assert_eq!(bench.get(GPU_STATUS), 3);
    assert_eq!([bench.status().flrs, bench.status().bus_resets], [1, 1]);
}

#[test]
fn an_flr_clears_the_mailbox_and_its_scratch_and_a_bus_reset_the_other_scratch_too() {
    let mut bench = Bench::gpu();
    bench.put(FLR_SCRATCH, 1);
    bench.put(BUS_SCRATCH, 1);
    assert_eq!(bench.read_knob(8), "0008020C->0");
    bench.flr();
    let mailbox = [CONTROL, DATA, Q_HEAD, Q_TAIL].map(|register| bench.get(register + 16));
    assert_eq!(mailbox, [0; 4]);
    assert_eq!([bench.get(FLR_SCRATCH), bench.get(BUS_SCRATCH)], [0, 1]);
    bench.put(FLR_SCRATCH, 1);
    bench.model.bus_reset(bench.now);
    bench.enable_memory();
    assert_eq!([bench.get(FLR_SCRATCH), bench.get(BUS_SCRATCH)], [0, 0]);
}

#[test]
fn a_request_that_a_reset_overtakes_is_forgotten() {
    let mut bench = Bench::gpu();
    bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020d, 1]);
    bench.flr();
    bench.wait(400);
    assert_eq!(bench.receive(2), None);
    assert_eq!([u64::from(bench.status().knobs[&8]), bench.status().rpcs], [0, 0]);
}

#[test]
fn bar0_is_all_ones_without_memory_decode_and_in_d3hot() {
    let mut bench = Bench::gpu();
    bench.write(Space::Config, 0x04, &[0, 0]);
    assert_eq!(bench.get(BOOT_0), u32::MAX);
    bench.put(BUS_SCRATCH, 7);
    bench.enable_memory();
    assert_eq!([bench.get(BOOT_0), bench.get(BUS_SCRATCH)], [0x1800_00a1, 0], "the write did not arrive");
    bench.write(Space::Config, 0x44, &[0x03]);
    assert_eq!([bench.get(BOOT_0), bench.config(0x44) & 3], [u32::MAX, 3]);
    bench.write(Space::Config, 0x44, &[0x00]);
    assert_eq!([bench.get(BOOT_0), bench.get(GPU_BOOT)], [0x1800_00a1, 0xff], "waking is no reset");
    bench.assert_clean();
    assert_eq!(bench.status().flrs, 0);
}

#[test]
fn knobs_of_an_earlier_run_are_taken_before_the_boot_ends() {
    let mut bench = Bench::new(DeviceSpec::new("gpu0", ModelKind::H100));
    assert_eq!(bench.model.restore_knobs(&[(8, 1), (48, 1), (10, 2)].into()), [48]);
    bench.wait(300);
    assert_eq!(bench.get(GPU_STATUS), 1);
    assert_eq!(bench.read_knob(10), "000A020C->2");
}

#[test]
fn time_that_runs_backwards_changes_nothing() {
    let mut bench = Bench::gpu();
    assert_eq!(bench.get(GPU_BOOT), 0xff);
    bench.now = Duration::ZERO;
    assert_eq!(bench.get(GPU_BOOT), 0xff);
    bench.now = Duration::MAX;
    assert_eq!(bench.get(GPU_BOOT), 0xff);
    bench.flr();
    assert_eq!(bench.status().flrs, 1);
}
