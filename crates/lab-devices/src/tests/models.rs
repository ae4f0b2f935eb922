//! What tells the models apart beyond the register maps of those that talk.

use super::host::{BOOT_0, Bench, Bus, GPU_BOOT, GPU_STATUS};
use crate::{DeviceSpec, Fault, ModelKind, undecided};

#[test]
fn a_chip_without_firmware_to_talk_to_has_its_boot_register_only() {
    for (kind, boot_0) in [
        (ModelKind::A100, 0x1700_00a1),
        (ModelKind::Lr10, 0x0060_00a1),
        (ModelKind::UnknownGpu, undecided::UNKNOWN_GPU_BOOT_0),
    ] {
        let mut bench = Bench::of(kind);
        assert_eq!(bench.get(BOOT_0), boot_0, "{kind}");
        bench.assert_clean();
        for offset in [GPU_BOOT, GPU_STATUS, 0x590, 0x2_8c50, 0x8f_2ad0, 0x8f_1f84, 0x8f_0320] {
            assert_eq!(bench.get(offset), undecided::PRI_ERROR, "{kind} {offset:#x}");
        }
        assert_eq!((bench.status().stray_count, bench.status().knobs.len()), (7, 0));
        bench.flr();
        assert_eq!((bench.get(BOOT_0), bench.status().flrs), (boot_0, 1));
    }
}

#[test]
fn what_is_no_gpu_answers_in_config_space_and_has_a_small_bar() {
    for (kind, id, size) in
        [(ModelKind::Nic, 0x10d3_8086, 128 << 10), (ModelKind::RtxPro6000Audio, 0x22e8_10de, 16 << 10)]
    {
        let mut bench = Bench::of(kind);
        assert_eq!([bench.config(0), bench.config(0x10)], [id, 0], "a 32-bit BAR that is not prefetchable");
        assert_eq!(bench.get(BOOT_0), undecided::OTHER_FUNCTION_READ);
        let sizes: Vec<u64> = (0..6).map(|index| bench.model.spec().bar_size(index)).collect();
        assert_eq!(sizes, [size, 0, 0, 0, 0, 0], "{kind}");
        assert!(!kind.is_gpu() && !kind.is_switch());
    }
}

#[test]
fn a_grace_hopper_is_a_hopper_with_a_link_to_its_cpu() {
    let mut bench = Bench::of(ModelKind::Gh200);
    assert_eq!([bench.get(BOOT_0), bench.get(GPU_BOOT), bench.get(0x1498)], [0x1800_00a1, 0xff, 0xff]);
    assert_eq!(bench.read_knob(45), "002D020C->0");
    bench.assert_clean();
}

#[test]
fn boot_0_can_be_set() {
    let spec = DeviceSpec { boot_0: Some(0x1b00_00a1), ..DeviceSpec::new("gpu0", ModelKind::RtxPro6000) };
    assert_eq!(Bench::ready(spec).get(BOOT_0), 0x1b00_00a1);
}

#[test]
fn faults_belong_to_devices_that_can_have_them() {
    for (fault, can, cannot) in [
        (Fault::FirewallStuck, ModelKind::B200, ModelKind::H100),
        (Fault::MnocSendError, ModelKind::RtxPro6000, ModelKind::Ls10),
        (Fault::FspSplitPointers, ModelKind::Ls10, ModelKind::B300),
        (Fault::Recovery { blank: true }, ModelKind::Gh200, ModelKind::B200),
        (Fault::BootNeverCompletes, ModelKind::Gb200, ModelKind::A100),
        (Fault::EffectiveState2, ModelKind::H100, ModelKind::Ls10),
        (Fault::PriErrorAfterReset(1), ModelKind::A100, ModelKind::Nic),
    ] {
        assert!(fault.applies_to(can), "{fault} {can}");
        let spec = DeviceSpec { faults: vec![fault], ..DeviceSpec::new("dev0", cannot) };
        let error = spec.validate().unwrap_err().to_string();
        assert_eq!(error, format!("Virtual device dev0: a {cannot} cannot have the fault {fault}"));
    }
}
