//! Every fault, as a host sees it, and that it can be taken away.

use super::host::{BOOT_0, Bench, Bus, GPU_BOOT, GPU_STATUS, M_HEAD, M_TAIL, Q_HEAD, Q_TAIL};
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
