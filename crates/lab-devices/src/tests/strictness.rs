//! What a host may not do is seen, answered as hardware might, and survives in the record.

use proptest::prelude::{Just, Strategy, any, prop};
use proptest::{prop_assert_eq, prop_oneof, proptest};

use super::host::{
    BLACKWELL_STATUS, BOOT_0, Bench, Bus, CONTROL, DATA, GB20X_BOOT, GPU_BOOT, GPU_STATUS, M_HEAD, M_TAIL, Q_HEAD,
    Q_TAIL, RECV_INFO, RECV_WDATA, SEND_INFO, SEND_RDATA,
};
use crate::fault::Part;
use crate::model::StrayAccess;
use crate::trace::Space;
use crate::{DeviceSpec, Fault, Firmware, HostError, ModelKind, undecided};

#[test]
fn unlisted_registers_read_a_pri_error_and_are_recorded() {
    let mut gpu = Bench::gpu();
    let mut switch = Bench::switch();
    // PMC_BOOT_42, the other chip's registers, the driver's and (on the switch) the coupling channel.
    for offset in [0xa00, 0x6_60bc, 0x2_8c50, 0x8f_2c00, 0x8f_2c20, 0xff_fffc] {
        assert_eq!(gpu.get(offset), undecided::PRI_ERROR, "{offset:#x}");
    }
    for offset in [0xa00, GPU_BOOT, GPU_STATUS, 0x1458, 0x8f_2c08, 0x1ff_fffc] {
        assert_eq!(switch.get(offset), undecided::PRI_ERROR, "{offset:#x}");
    }
    assert_eq!([gpu.status().stray_count, switch.status().stray_count], [6, 6]);
    gpu.put(GPU_STATUS, 1);
    assert_eq!(gpu.get(GPU_STATUS), 0);
    let expected = StrayAccess { space: Space::Bar0, offset: GPU_STATUS, written: Some(1) };
    assert_eq!(gpu.status().stray.last(), Some(&expected));
}

#[test]
fn registers_that_the_reference_touches_exist() {
    let mut gpu = Bench::gpu();
    for (offset, value) in [(0x8f_012c, 0x1100), (0x8f_0278, 0x0200_0200), (0x8f_0abc, 0x20), (0x2_24fc, 0)] {
        assert_eq!(gpu.get(offset), value, "{offset:#x}");
    }
    for offset in [0x8f_0320, 0x8f_0324, 0x8f_0328, 0x8f_032c, 0x2_0120] {
        gpu.get(offset);
    }
    gpu.put(0x12_004c, 4);
    gpu.put(0x12_2204, 2);
    gpu.assert_clean();
    let mut switch = Bench::switch();
    for offset in [0x8f_012c, 0x8f_0278, 0x8f_0abc, 0x8f_0320, 0x6_6120, 0x2_84e0, 0x2_851c] {
        switch.get(offset);
    }
    switch.put(0xdfe0, 1);
    switch.put(0x9_1288, 1);
    assert_eq!([switch.get(0xdfe0), switch.get(0x9_1288)], [1, 1]);
    switch.assert_clean();
}

#[test]
fn the_list_of_strays_is_bounded_and_the_count_is_not() {
    let mut gpu = Bench::gpu();
    for _ in 0..1000 {
        gpu.get(4);
    }
    assert_eq!((gpu.status().stray_count, gpu.status().stray.len()), (1000, 256));
}

type Breach = fn(&mut Bench);

#[test]
fn breaches_of_the_mailbox_protocol_are_recorded() {
    let request = [0xc000_0000, 0x1310_de7e, 0x0008_020c];
    let cases: [(Breach, HostError); 8] = [
        (
            |bench| {
                bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020c]);
                bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020c]);
            },
            HostError::RequestBeforeConsumption { channel: 2 },
        ),
        (
            |bench| {
                bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020c]);
                bench.wait(1);
                bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020c]);
            },
            HostError::ResponseNotConsumed { channel: 2 },
        ),
        (
            |bench| {
                bench.flr();
                bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020c]);
            },
            HostError::RequestBeforeBoot { channel: 2 },
        ),
        (
            |bench| {
                bench.put(Q_TAIL + 16, 0x7fc);
                bench.put(Q_HEAD + 16, 0x800);
            },
            HostError::BadQueuePointers { channel: 2, head: 0x800, tail: 0x7fc },
        ),
        (
            |bench| {
                bench.put(CONTROL + 16, 0x400);
                bench.put(DATA + 16, 1);
            },
            HostError::OutsideWindow { channel: 2, address: 0x400 },
        ),
        (
            |bench| {
                bench.send(2, &[0xc000_0000, 0x1510_de7e, 0x0008_020c]);
                assert_eq!(bench.receive(2), None);
            },
            HostError::BadRequest { channel: 2, words: vec![request[0], 0x1510_de7e, request[2]] },
        ),
        (
            |bench| assert_eq!(bench.prc(0x0008_030c, None), "0008030C->!beef"),
            HostError::BadRequest { channel: 2, words: vec![request[0], request[1], 0x0008_030c] },
        ),
        (
            |bench| assert_eq!(bench.prc(0x0008_020d, Some(0x1_0001)), "0008020D 10001->!beef"),
            HostError::BadRequest { channel: 2, words: vec![request[0], request[1], 0x0008_020d, 0x1_0001] },
        ),
    ];
    for (breach, error) in cases {
        let mut bench = Bench::gpu();
        breach(&mut bench);
        assert_eq!(bench.status().host_errors, [error]);
    }
}

#[test]
fn a_doorbell_without_a_request_is_ignored() {
    let mut bench = Bench::gpu();
    // What a host does that finds the queues in disorder: tail and head to the base, both queues.
    for register in [Q_TAIL, Q_HEAD, M_TAIL, M_HEAD] {
        bench.put(register + 16, 0x800);
    }
    bench.wait(10);
    assert_eq!(bench.status().rpcs, 0);
    assert_eq!(bench.read_knob(8), "0008020C->0");
    bench.assert_clean();
}

#[test]
fn a_head_written_before_its_tail_sends_what_the_old_tail_covers() {
    let mut bench = Bench::gpu();
    assert_eq!(bench.read_knob(8), "0008020C->0");
    bench.put(CONTROL + 16, 0x0300_0800);
    for word in [0xc000_0000, 0x1310_de7e, 0x0008_020d, 1] {
        bench.put(DATA + 16, word);
    }
    bench.put(Q_HEAD + 16, 0x800);
    bench.put(Q_TAIL + 16, 0x80c);
    bench.wait(1);
    bench.receive(2);
    let words = vec![0xc000_0000, 0x1310_de7e, 0x0008_020d];
    assert_eq!(bench.status().host_errors, [HostError::BadRequest { channel: 2, words }]);
    assert_eq!(bench.status().knobs[&8], 0, "a write without its value writes nothing");
}

#[test]
fn knobs_that_the_firmware_lacks_answer_0x1e3() {
    let old = DeviceSpec { firmware: Firmware::Old, ..DeviceSpec::new("gpu0", ModelKind::H100) };
    let lacking = DeviceSpec { absent_knobs: [34].into(), ..DeviceSpec::new("gpu0", ModelKind::H100) };
    let switch = DeviceSpec::new("nvsw0", ModelKind::Ls10);
    for (spec, knob, there) in [
        (&old, 45, false),
        (&old, 44, false),
        (&old, 8, true),
        (&lacking, 34, false),
        (&switch, 7, false),
        (&switch, 45, true),
    ] {
        let mut bench = Bench::ready(spec.clone());
        let [read, write] = [bench.read_knob(knob), bench.write_knob(knob, 0)];
        assert_eq!([!read.ends_with("->!1e3"), !write.ends_with("->!1e3")], [there; 2], "knob {knob}: {read}, {write}");
        bench.assert_clean();
    }
    let mut gpu = Bench::gpu();
    assert_eq!(
        [gpu.read_knob(47), gpu.read_knob(48), gpu.read_knob(0)],
        ["002F020C->0", "0030020C->!1e3", "0000020C->!1e3"]
    );
}

#[test]
fn permission_knobs_deny_writes_with_the_code_of_choice() {
    let spec =
        DeviceSpec { knobs: [(7, 0)].into(), denied_write_error: 0x77, ..DeviceSpec::new("gpu0", ModelKind::H100) };
    let mut bench = Bench::ready(spec);
    assert_eq!([bench.read_knob(7), bench.write_knob(8, 1)], ["0007020C->0", "0008020D 1->!77"]);
    assert_eq!([bench.read_knob(5), bench.write_knob(6, 1)], ["0005020C->1", "0006020D 1"]);
    assert_eq!(bench.write_knob(7, 1), "0007020D 1->!77", "permissions are changed out-of-band");
    assert_eq!([bench.status().knobs[&7], bench.status().knobs[&8]], [0, 0]);
    bench.assert_clean();
}

#[test]
fn accesses_of_every_width_are_served_and_the_odd_ones_recorded() {
    let mut bench = Bench::gpu();
    let mut eight = [0; 8];
    bench.read(Space::Bar0, 0x8f_0320, &mut eight);
    assert_eq!(eight, [0; 8]);
    let mut two = [0; 2];
    bench.read(Space::Bar0, 2, &mut two);
    assert_eq!(two, [0x00, 0x18]);
    let mut one = [0];
    bench.read(Space::Bar0, 0, &mut one);
    assert_eq!(one, [0xa1]);
    bench.write(Space::Bar0, 0x9_1288, &0x1122_3344_u32.to_le_bytes());
    bench.write(Space::Bar0, 0x9_1289, &[0xaa]);
    assert_eq!(bench.get(0x9_1288), 0x1122_aa44);
    bench.write(Space::Bar0, 0x8f_2ac0 + 16, &[0x00, 0x08, 0x00, 0x03, 1, 2, 3, 4]);
    assert_eq!(bench.get(CONTROL + 16), 0x0300_0804, "an eight-byte store is two dwords");
    let mut end = [0; 8];
    bench.read(Space::Bar0, (16 << 20) - 4, &mut end);
    assert_eq!(end[4..], [0xff; 4]);
    assert_eq!(bench.status().host_error_count, 6);
}

#[test]
fn the_other_bars_hold_nothing() {
    let mut bench = Bench::gpu();
    for space in [Space::Bar2, Space::Bar4] {
        let mut data = [0; 4];
        bench.read(space, 0x100, &mut data);
        assert_eq!(data, [0xff; 4]);
        bench.write(space, 0x100, &[1]);
    }
    assert_eq!(bench.status().stray_count, 4);
}

/// Offsets near what exists, and anywhere.
fn offsets() -> impl Strategy<Value = u64> {
    let known = [
        BOOT_0,
        GPU_BOOT,
        GPU_STATUS,
        0x04,
        0x44,
        0x68,
        0x1458,
        CONTROL + 16,
        DATA + 16,
        Q_HEAD + 16,
        Q_TAIL + 16,
        M_HEAD + 16,
        M_TAIL + 16,
        CONTROL + 8,
        DATA + 8,
        Q_HEAD + 8,
        Q_TAIL + 8,
        GB20X_BOOT,
        BLACKWELL_STATUS,
        0xaf8,
        0x2b8,
        RECV_INFO,
        RECV_WDATA,
        SEND_INFO,
        SEND_RDATA,
    ];
    prop_oneof![
        8 => prop::sample::select(known.to_vec()),
        2 => prop::sample::select(known.to_vec()).prop_flat_map(|base| (0..8_u64).prop_map(move |by| base + by)),
        1 => any::<u64>(),
    ]
}

fn faults() -> impl Strategy<Value = Fault> {
    prop::sample::select(vec![
        Fault::BootNeverCompletes,
        Fault::BootSlow(u64::MAX),
        Fault::FspLateReply(u64::MAX),
        Fault::FspLateReply(3),
        Fault::FspShortReply,
        Fault::FspSplitPointers,
        Fault::FspQueueStuck,
        Fault::PriErrorAfterReset(u64::MAX),
        Fault::ConfigAllOnes,
        Fault::OffBus { part: Part::Both, after: 9 },
        Fault::D3cold,
        Fault::D3hotAtStart,
        Fault::Recovery { blank: true },
        Fault::SecurityFault(u32::MAX),
        Fault::FirewallStuck,
        Fault::FspStaleReply,
        Fault::FspDuplicateReply,
        Fault::PermissionKnobZero(None),
        Fault::MnocCreditGap(u64::MAX),
        Fault::MnocSendError,
    ])
}

#[derive(Clone, Debug)]
enum Step {
    Read(bool, u64, usize),
    Write(bool, u64, Vec<u8>),
    Request(Vec<u32>),
    Wait(u64),
    BusReset,
    Fault(Fault),
    ClearFaults,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let pointers = prop::sample::select(vec![
        0x400_u32,
        0x7fc,
        0x800,
        0x808,
        0x814,
        0xbfc,
        0xc00,
        0x0300_0800,
        0x0010_0000,
        0x0010_000c,
        0x0010_0005,
        u32::MAX,
    ]);
    let step = prop_oneof![
        6 => (any::<bool>(), offsets(), 0..40_usize).prop_map(|(bar, at, width)| Step::Read(bar, at, width)),
        4 => (any::<bool>(), offsets(), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(bar, at, data)| Step::Write(bar, at, data)),
        6 => (offsets(), pointers).prop_map(|(at, value)| Step::Write(true, at, value.to_le_bytes().to_vec())),
        3 => prop::collection::vec(prop_oneof![any::<u32>(), 0x0001_020c..0x0030_020d_u32], 1..5)
            .prop_map(Step::Request),
        3 => (0..500_u64).prop_map(Step::Wait),
        1 => prop_oneof![Just(Step::BusReset), faults().prop_map(Step::Fault), Just(Step::ClearFaults)],
    ];
    prop::collection::vec(step, 0..200)
}

/// One model of each register map, its boot register, and the number of its knobs.
const DRIVEN: [(ModelKind, u64, usize); 4] = [
    (ModelKind::Ls10, 0x6_60bc, 8),
    (ModelKind::H200, GPU_BOOT, 47),
    (ModelKind::Gb300, GPU_BOOT, 45),
    (ModelKind::RtxPro6000, GB20X_BOOT, 45),
];

proptest! {
    #[test]
    fn no_sequence_of_accesses_breaks_a_device(steps in steps(), kind in prop::sample::select(DRIVEN.map(|(kind, ..)| kind).to_vec())) {
        let mut bench = Bench::ready(DeviceSpec::new("dev0", kind));
        for step in steps {
            let space = |bar| if bar { Space::Bar0 } else { Space::Config };
            match step {
                Step::Read(bar, at, width) => bench.read(space(bar), at, &mut vec![0; width]),
                Step::Write(bar, at, data) => bench.write(space(bar), at, &data),
                Step::Request(words) if bench.by_mnoc() => drop(bench.send_mnoc(&words)),
                Step::Request(words) => bench.send(2, &words),
                Step::Wait(ms) => bench.wait(ms),
                Step::BusReset => {
                    bench.model.bus_reset(bench.now);
                    bench.enable_memory();
                }
                Step::Fault(fault) => bench.fault(fault),
                Step::ClearFaults => bench.model.clear_faults(bench.now),
            }
        }
        // Whatever was done to it, a power cycle heals it.
        bench.model.clear_faults(bench.now);
        bench.model.power_on(bench.now);
        bench.enable_memory();
        bench.wait(400);
        let (_, boot, knobs) = DRIVEN.into_iter().find(|(driven, ..)| *driven == kind).unwrap();
        prop_assert_eq!(bench.get(boot), 0xff);
        prop_assert_eq!(bench.prc(0x0009_020c, None).contains("->"), true);
        prop_assert_eq!(bench.status().knobs.len(), knobs);
    }
}
