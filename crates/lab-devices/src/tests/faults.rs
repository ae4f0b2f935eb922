//! Every fault, as a host sees it, and that it can be taken away.

use super::host::{BOOT_0, Bench, Bus, GB20X_BOOT, GPU_BOOT, GPU_STATUS, M_HEAD, M_TAIL, Q_HEAD, Q_TAIL};
use crate::fault::Part;
use crate::trace::Space;
use crate::{DeviceSpec, Fault, ModelKind, undecided};

#[test]
fn boot_never_completes_until_the_fault_is_gone() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::BootNeverCompletes);
    assert_eq!(bench.get(GPU_BOOT), 0xff, "a booted device is not touched");
    bench.flr();
    assert!(!bench.wait_for_boot(GPU_BOOT));
    bench.model.clear_faults(bench.now);
    assert!(bench.wait_for_boot(GPU_BOOT));
}

#[test]
fn boot_slow_adds_to_the_boot_time() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::BootSlow(2000));
    bench.flr();
    bench.wait(2299);
    assert_eq!(bench.get(GPU_BOOT), 0);
    bench.wait(1);
    assert_eq!(bench.get(GPU_BOOT), 0xff);
}

#[test]
fn bar_and_config_die_separately() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::BarAllOnes);
    assert_eq!([bench.get(BOOT_0), bench.config(0)], [u32::MAX, 0x2330_10de]);
    bench.model.clear_faults(bench.now);
    bench.fault(Fault::ConfigAllOnes);
    assert_eq!([bench.get(BOOT_0), bench.config(0), bench.config(0xf0)], [0x1800_00a1, u32::MAX, u32::MAX]);
    bench.write(Space::Config, 0x68, &[0, 0x80]);
    assert_eq!(bench.status().flrs, 0, "a dead config space takes no FLR");
    bench.model.clear_faults(bench.now);
    assert_eq!([bench.get(BOOT_0), bench.config(0)], [0x1800_00a1, 0x2330_10de]);
}

#[test]
fn no_reply_is_taken_and_acted_on() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::FspNoReply);
    assert_eq!(bench.write_knob(8, 1), "0008020D 1->?");
    assert_eq!(bench.get(Q_HEAD + 16), bench.get(Q_TAIL + 16), "the queue drained");
    assert_eq!(bench.status().knobs[&8], 1);
}

#[test]
fn a_stuck_queue_never_drains_and_can_be_emptied_by_force() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::FspQueueStuck);
    assert_eq!(bench.write_knob(8, 1), "0008020D 1->?");
    assert_eq!([bench.get(Q_HEAD + 16), bench.get(Q_TAIL + 16)], [0x800, 0x80c]);
    assert_eq!(bench.status().knobs[&8], 0);
    bench.model.clear_faults(bench.now);
    bench.put(Q_TAIL + 16, 0x800);
    bench.put(Q_HEAD + 16, 0x800);
    assert_eq!(bench.read_knob(8), "0008020C->1", "what waited was taken when the fault went");
}

#[test]
fn a_late_reply_comes_late_and_is_stale_by_then() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::FspLateReply(7000));
    assert_eq!(bench.write_knob(8, 1), "0008020D 1->?");
    assert_eq!(bench.get(Q_HEAD + 16), bench.get(Q_TAIL + 16), "taken at once");
    bench.model.clear_faults(bench.now);
    bench.wait(7000);
    assert_eq!([bench.get(M_HEAD + 16), bench.get(M_TAIL + 16)], [0x800, 0x810], "the stale reply lies there");
    assert_eq!(bench.receive(2).unwrap().len(), 5);
    assert_eq!(bench.read_knob(8), "0008020C->1");
}

#[test]
fn replies_can_be_short_mistyped_or_errors() {
    let code = |knob, code| Fault::FspErrorCode { knob, code };
    let cases: [(&[Fault], u32, &str); 6] = [
        (&[Fault::FspShortReply], 8, "0008020C->[C0000000, 1510DE7E, 00000003, 00000013]"),
        (&[code(Some(8), 0x202)], 8, "0008020C->!202"),
        (&[code(Some(8), 0x202)], 6, "0006020C->0"),
        (&[code(None, 0x202)], 48, "0030020C->!202"),
        (&[code(None, 0x202), code(Some(8), 0x9e)], 8, "0008020C->!9e"),
        (&[code(Some(8), 0x202), code(Some(8), 0x9f)], 8, "0008020C->!9f"),
    ];
    for (faults, knob, expected) in cases {
        let mut bench = Bench::gpu();
        for fault in faults {
            bench.fault(*fault);
        }
        assert_eq!(bench.read_knob(knob), expected, "{faults:?}");
    }
    let mut bench = Bench::gpu();
    bench.fault(Fault::FspMistypedReply);
    bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020c]);
    assert_eq!(bench.receive(2).unwrap()[1], 0x1410_de7e);
}

#[test]
fn an_error_code_keeps_a_write_from_happening() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::FspErrorCode { knob: Some(8), code: 0x202 });
    assert_eq!(bench.write_knob(8, 1), "0008020D 1->!202");
    assert_eq!(bench.status().knobs[&8], 0);
}

#[test]
fn split_pointers_show_the_tail_first() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::FspSplitPointers);
    bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020c]);
    bench.wait(1);
    assert_eq!([bench.get(M_HEAD + 16), bench.get(M_TAIL + 16)], [0, 0x814], "the head is still the reset value");
    assert_eq!([bench.get(M_HEAD + 16), bench.get(M_TAIL + 16)], [0x800, 0x814]);
}

#[test]
fn pri_errors_answer_for_a_while_after_a_reset() {
    let spec = DeviceSpec { faults: vec![Fault::PriErrorAfterReset(100)], ..DeviceSpec::new("gpu0", ModelKind::H100) };
    let mut bench = Bench::ready(spec);
    assert_eq!(bench.get(GPU_BOOT), 0xff);
    bench.flr();
    assert_eq!([bench.get(BOOT_0), bench.get(GPU_BOOT)], [undecided::PRI_ERROR; 2]);
    bench.wait(100);
    assert_eq!([bench.get(BOOT_0), bench.get(GPU_BOOT)], [0x1800_00a1, 0]);
}

#[test]
fn a_write_can_be_ignored_and_a_mode_can_stay() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::KnobWriteIgnored);
    assert_eq!([bench.write_knob(8, 1), bench.read_knob(8)], ["0008020D 1", "0008020C->0"]);
    bench.model.clear_faults(bench.now);
    bench.fault(Fault::ModeUnchangedAfterReset);
    assert_eq!(bench.write_knob(8, 1), "0008020D 1");
    bench.flr();
    bench.wait(400);
    assert_eq!([bench.get(GPU_BOOT), bench.get(GPU_STATUS)], [0xff, 0]);
    assert_eq!(bench.read_knob(8), "0008020C->1");
}

#[test]
fn a_device_falls_off_the_bus_at_once_or_later_in_part_or_whole() {
    for (part, bar, config) in [(Part::Bar0, true, false), (Part::Config, false, true), (Part::Both, true, true)] {
        let mut bench = Bench::gpu();
        bench.fault(Fault::OffBus { part, after: 0 });
        assert_eq!([bench.get(BOOT_0) == u32::MAX, bench.config(0) == u32::MAX], [bar, config], "{part:?}");
        let mut data = [0; 4];
        bench.read(Space::Bar2, 0, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
    let mut bench = Bench::gpu();
    bench.fault(Fault::OffBus { part: Part::Bar0, after: 3 });
    bench.config(0);
    let seen: Vec<u32> = (0..5).map(|_| bench.get(BOOT_0)).collect();
    assert_eq!(seen, [0x1800_00a1, 0x1800_00a1, 0x1800_00a1, u32::MAX, u32::MAX]);
    bench.fault(Fault::OffBus { part: Part::Both, after: 1 });
    assert_eq!([bench.config(0), bench.get(BOOT_0), bench.config(0)], [0x2330_10de, u32::MAX, u32::MAX]);
    bench.flr();
    bench.model.bus_reset(bench.now);
    assert_eq!((bench.config(0), bench.status().flrs), (u32::MAX, 0), "no reset reaches it or brings it back");
    // In the middle of an exchange: the queue registers read all ones.
    let mut bench = Bench::gpu();
    bench.fault(Fault::OffBus { part: Part::Both, after: 6 });
    bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020c]);
    assert_eq!([bench.get(M_HEAD + 16), bench.get(Q_HEAD + 16)], [u32::MAX; 2]);
}

#[test]
fn a_device_can_start_asleep_and_lose_its_power() {
    let spec = DeviceSpec { faults: vec![Fault::D3hotAtStart], ..DeviceSpec::new("gpu0", ModelKind::H100) };
    let mut bench = Bench::ready(spec);
    assert_eq!([bench.get(BOOT_0), bench.config(0x44) & 3], [u32::MAX, 3]);
    bench.write(Space::Config, 0x44, &[0]);
    assert_eq!([bench.get(BOOT_0), bench.get(GPU_BOOT)], [0x1800_00a1, 0xff]);
    let mut bench = Bench::gpu();
    bench.fault(Fault::D3cold);
    assert_eq!([bench.get(BOOT_0), bench.config(0)], [u32::MAX; 2]);
    bench.flr();
    assert_eq!(bench.status().flrs, 0);
    bench.model.clear_faults(bench.now);
    assert_eq!(bench.config(0), 0x2330_10de);
    bench.enable_memory();
    assert_eq!(bench.get(GPU_BOOT), 0, "power came, and it boots");
    assert!(bench.wait_for_boot(GPU_BOOT));
}

#[test]
fn a_device_may_not_come_back_from_a_reset() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::LostInReset);
    assert_eq!([bench.get(BOOT_0), bench.config(0)], [0x1800_00a1, 0x2330_10de], "not before it");
    bench.flr();
    assert_eq!([bench.get(BOOT_0), bench.config(0)], [u32::MAX; 2]);
    bench.model.bus_reset(bench.now);
    assert_eq!(bench.config(0), u32::MAX, "no other reset brings it back");
    bench.model.clear_faults(bench.now);
    bench.enable_memory();
    assert!(bench.wait_for_boot(GPU_BOOT));
    bench.flr();
    assert_eq!(bench.config(0), 0x2330_10de);
}

#[test]
fn recovery_shows_in_its_register_and_nothing_works() {
    for (kind, boot, register, sign) in [
        (ModelKind::H100, GPU_BOOT, 0x2_0120, 1 << 30),
        (ModelKind::Ls10, 0x6_60bc, 0x6_6120, 1 << 30),
        (ModelKind::B200, GPU_BOOT, 0x8a_a128, undecided::RECOVERY_ACTIVE),
        (ModelKind::RtxPro6000, GB20X_BOOT, 0x8a_a128, undecided::RECOVERY_ACTIVE),
    ] {
        let mut bench = Bench::of(kind);
        assert_eq!([bench.get(register), bench.config(0xaf8) >> 17 & 1], [0, 0], "{kind}");
        bench.fault(Fault::Recovery { blank: false });
        assert_eq!([bench.get(register), bench.get(boot)], [sign, 0], "{kind}");
        assert_eq!(bench.config(0xaf8) >> 17 & 1, u32::from(kind == ModelKind::B200), "{kind}");
        assert_ne!(bench.get(BOOT_0), 0, "{kind}");
        assert!(bench.read_knob(8).ends_with("->?"), "{kind}");
        bench.flr();
        assert!(!bench.wait_for_boot(boot), "{kind}");
        bench.model.clear_faults(bench.now);
        assert!(bench.wait_for_boot(boot), "{kind}");
        assert_eq!(bench.get(register), 0, "{kind}");
    }
    let mut bench = Bench::gpu();
    bench.fault(Fault::Recovery { blank: true });
    assert_eq!(bench.get(BOOT_0), 0);
}

#[test]
fn a_security_fault_locks_every_register_and_names_its_cause() {
    for (kind, word) in [(ModelKind::H100, 0x2b4), (ModelKind::RtxPro6000, 0x2b4), (ModelKind::Gb200, 0xb04)] {
        let mut bench = Bench::of(kind);
        assert_eq!(bench.config(word), 0, "{kind}");
        bench.fault(Fault::SecurityFault(0x4000_1000));
        assert_eq!([bench.get(BOOT_0), bench.get(0x8f_0320)], [0xbadf_0200; 2], "{kind}");
        assert_eq!(bench.config(word), 0x4000_1000, "{kind}");
        bench.flr();
        bench.wait(1000);
        assert_eq!(bench.get(BOOT_0), 0xbadf_0200, "{kind}: no reset helps");
        bench.assert_clean();
    }
}

#[test]
fn stale_and_doubled_replies_lie_in_the_mailbox() {
    for kind in [ModelKind::H100, ModelKind::Ls10, ModelKind::B200] {
        let mut bench = Bench::of(kind);
        let take = |bench: &mut Bench| if bench.by_mnoc() { bench.receive_mnoc() } else { bench.receive(2) };
        bench.fault(Fault::FspStaleReply);
        let stale = [0xc000_0000, 0x1510_de7e, 3, 0x13, 0, 1];
        assert_eq!(take(&mut bench).as_deref(), Some(&stale[..]), "{kind}: at once");
        assert_eq!(bench.read_knob(8), "0008020C->0", "{kind}: only once");
        bench.flr();
        bench.wait(400);
        assert_eq!(take(&mut bench).as_deref(), Some(&stale[..]), "{kind}: after each boot");
        bench.model.clear_faults(bench.now);
        bench.fault(Fault::FspDuplicateReply);
        assert_eq!(bench.write_knob(8, 1), "0008020D 1", "{kind}");
        assert_eq!(take(&mut bench).unwrap().len(), 5, "{kind}: once more");
        assert_eq!(take(&mut bench), None, "{kind}");
        bench.assert_clean();
    }
}

#[test]
fn garbage_permissions_and_the_invalid_state_can_be_had() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::FspCleanHighHalf);
    bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0007_020c]);
    assert_eq!(bench.receive(2).unwrap()[5], 1);
    bench.fault(Fault::PermissionKnobZero(Some(7)));
    let denied = format!("0008020D 1->!{:x}", undecided::DENIED_WRITE_ERROR);
    assert_eq!([bench.read_knob(7), bench.write_knob(8, 1)], ["0007020C->0", denied.as_str()]);
    assert_eq!([bench.read_knob(5), bench.write_knob(6, 0)], ["0005020C->1", "0006020D 0"]);
    bench.fault(Fault::PermissionKnobZero(None));
    assert_eq!([bench.read_knob(5), bench.read_knob(44)], ["0005020C->0", "002C020C->0"]);
    bench.model.clear_faults(bench.now);
    assert_eq!([bench.read_knob(7), bench.write_knob(8, 1)], ["0007020C->1", "0008020D 1"]);
    bench.fault(Fault::EffectiveState2);
    bench.flr();
    bench.wait(400);
    assert_eq!(bench.get(GPU_STATUS), 2);
    bench.model.clear_faults(bench.now);
    bench.flr();
    bench.wait(400);
    assert_eq!(bench.get(GPU_STATUS), 1);
}

#[test]
fn a_device_can_be_without_function_level_resets() {
    let mut bench = Bench::gpu();
    bench.fault(Fault::NoFlr);
    assert_eq!(bench.config(0x64) >> 28 & 1, 0);
    bench.flr();
    assert_eq!((bench.status().flrs, bench.get(GPU_BOOT)), (0, 0xff));
    bench.model.clear_faults(bench.now);
    assert_eq!(bench.config(0x64) >> 28 & 1, 1);
}
