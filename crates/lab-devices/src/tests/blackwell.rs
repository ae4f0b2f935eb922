//! Blackwell GPUs: mailbox, firewall, status and boot registers (gpu-cc-protocol sections 4.9, 5, 6.4, 10.4 and 10.5).

use std::time::Duration;

use super::host::{
    BLACKWELL_STATUS, BOOT_0, Bench, Bus, GB20X_BOOT, GPU_BOOT, RECV_INFO, RECV_WDATA, SEND_INFO, SEND_RDATA,
};
use crate::trace::{self, Kind, Space, TraceEvent};
use crate::{BootState, DeviceSpec, Fault, Firmware, HostError, ModelKind, undecided};

/// A model, its boot register, and where its BAR firewall shows: dword of config space and bit.
const CHIPS: [(ModelKind, u64, u64, u32); 5] = [
    (ModelKind::B200, GPU_BOOT, 0xaf8, 20),
    (ModelKind::B300, GPU_BOOT, 0xaf8, 20),
    (ModelKind::Gb200, GPU_BOOT, 0xaf8, 20),
    (ModelKind::Gb300, GPU_BOOT, 0xaf8, 20),
    (ModelKind::RtxPro6000, GB20X_BOOT, 0x2b8, 24),
];

const READY: u32 = 1 << 24;
const ERROR: u32 = 1 << 25;
const CREDIT: u32 = 1 << 26;

#[test]
fn example_3_reading_a_knob() {
    for (kind, ..) in CHIPS {
        let mut bench = Bench::ready(DeviceSpec { knobs: [(8, 1)].into(), ..DeviceSpec::new("gpu0", kind) });
        assert_eq!(bench.get(RECV_INFO) & (READY | ERROR), READY);
        bench.put(RECV_INFO, 0x0010_000c);
        assert_eq!(bench.get(RECV_INFO) & (READY | CREDIT), CREDIT, "data is awaited");
        for word in [0xc000_0000, 0x1310_de7e, 0x0008_020c] {
            bench.put(RECV_WDATA, word);
        }
        assert_eq!(bench.get(RECV_INFO) & ERROR, 0);
        assert_eq!(bench.get(SEND_INFO), 0, "not before the latency is over");
        bench.wait(1);
        assert_eq!(bench.get(SEND_INFO), 0x0100_0018, "24 bytes");
        let reply: Vec<u32> = (0..6).map(|_| bench.get(SEND_RDATA)).collect();
        assert_eq!(reply[..5], [0xc000_0000, 0x1510_de7e, 3, 0x13, 0]);
        assert_eq!(reply[5] & 0xffff, 1);
        assert_ne!(reply[5] >> 16, 0, "garbage in the high half");
        assert_eq!([bench.get(SEND_INFO), bench.get(RECV_INFO) & READY], [0, READY], "drained, and idle");
        bench.assert_clean();
    }
}

#[test]
fn example_4_writing_a_knob() {
    let mut bench = Bench::of(ModelKind::B200);
    bench.put(RECV_INFO, 0x0010_0010);
    for word in [0xc000_0000, 0x1310_de7e, 0x0008_020d, 1] {
        bench.put(RECV_WDATA, word);
    }
    bench.wait(1);
    assert_eq!(bench.get(SEND_INFO), 0x0100_0014, "20 bytes");
    assert_eq!(bench.receive_mnoc().unwrap(), [0xc000_0000, 0x1510_de7e, 3, 0x13, 0]);
    assert_eq!([u32::from(bench.status().knobs[&8]), bench.get(BLACKWELL_STATUS)], [1, 0]);
    bench.assert_clean();
}

/// Example 11, and its like for the other changes of section 6.2 in their newer form.
#[test]
fn example_11_mode_changes() {
    let cases = [
        ("11: CC on from off", vec![], "0008020C->0, 0008020D 1, 0006020C->0", 0, 1),
        ("devtools from off", vec![], "0008020C->0, 0008020D 1, 0006020C->0, 0006020D 1", 0, 3),
        ("off from on", vec![(8, 1)], "0006020C->0, 0008020C->1, 0008020D 0", 1, 0),
        ("off from devtools", vec![(8, 1), (6, 1)], "0006020C->1, 0006020D 0, 0008020C->1, 0008020D 0", 3, 0),
    ];
    for (kind, boot, ..) in CHIPS {
        for (name, knobs, exchanges, before, after) in &cases {
            let knobs = knobs.iter().copied().collect();
            let mut bench = Bench::ready(DeviceSpec { knobs, ..DeviceSpec::new("gpu0", kind) });
            assert_eq!(bench.get(BLACKWELL_STATUS), *before, "{kind} {name}: before");
            bench.follow(exchanges);
            assert_eq!(bench.get(BLACKWELL_STATUS), *before, "{kind} {name}: staged only");
            bench.flr();
            assert!(bench.wait_for_boot(boot), "{kind} {name}");
            assert_eq!(bench.get(BLACKWELL_STATUS) & 3, *after, "{kind} {name}: after");
            bench.assert_clean();
        }
    }
}

#[test]
fn the_firewall_comes_down_before_the_boot_and_shows_in_config_space() {
    for (kind, boot, dword, bit) in CHIPS {
        let spec = DeviceSpec { config_retry: Duration::from_millis(10), ..DeviceSpec::new("gpu0", kind) };
        let mut bench = Bench::ready(spec);
        assert_eq!(bench.config(dword) >> bit & 1, 0, "{kind}: down while it works");
        bench.flr();
        assert_eq!(bench.status().boot, BootState::ConfigRetry);
        bench.wait(10);
        bench.enable_memory();
        assert_eq!(bench.status().boot, BootState::Firewalled);
        assert_eq!([bench.config(dword) >> bit & 1, bench.get(BOOT_0), bench.get(boot)], [1, u32::MAX, u32::MAX]);
        bench.put(RECV_INFO, 0x0010_000c);
        bench.wait(50);
        assert_eq!([bench.config(dword) >> bit & 1, bench.get(boot)], [0, 0], "{kind}: open, and booting");
        assert_eq!(bench.get(RECV_INFO) & READY, READY, "{kind}: what was written meanwhile did not arrive");
        assert_ne!(bench.get(BOOT_0), 0);
        bench.wait(299);
        assert_eq!([bench.get(boot), bench.get(BLACKWELL_STATUS)], [0, 0]);
        bench.wait(1);
        assert_eq!(bench.get(boot), 0xff);
        assert_eq!(bench.status().boot, BootState::Ready);
        bench.assert_clean();
    }
}

#[test]
fn the_firewall_can_stay_up_and_read_as_anything() {
    for (kind, boot, dword, bit) in CHIPS {
        let mut bench = Bench::ready(DeviceSpec { firewall_read: 0xbadf_1234, ..DeviceSpec::new("gpu0", kind) });
        bench.fault(Fault::FirewallStuck);
        assert_eq!(bench.get(boot), 0xff, "a booted device is not touched");
        bench.flr();
        bench.wait(60_000);
        assert_eq!([bench.config(dword) >> bit & 1, bench.get(boot)], [1, 0xbadf_1234], "{kind}");
        bench.model.clear_faults(bench.now);
        assert_eq!([bench.config(dword) >> bit & 1, bench.get(boot)], [0, 0xff], "{kind}");
    }
}

#[test]
fn the_status_word_has_the_decoupler_and_what_c2c_parts_say() {
    let status = |spec: DeviceSpec| Bench::ready(spec).get(BLACKWELL_STATUS);
    let with = |kind, knobs: &[(u16, u16)]| DeviceSpec {
        knobs: knobs.iter().copied().collect(),
        ..DeviceSpec::new("gpu0", kind)
    };
    assert_eq!(status(with(ModelKind::B200, &[(8, 1), (10, 2)])), 0b101);
    assert_eq!(status(with(ModelKind::B200, &[(8, 1), (10, 1)])), 0b001, "2 is the value of the decoupler");
    let hidden = DeviceSpec { decoupler_in_status: false, ..with(ModelKind::B200, &[(10, 2)]) };
    assert_eq!(status(hidden), 0);
    assert_eq!(status(with(ModelKind::RtxPro6000, &[(6, 1)])), 0b010, "the invalid state");
    for kind in [ModelKind::Gb200, ModelKind::Gb300] {
        assert_eq!(status(with(kind, &[])), 0);
        assert_eq!(status(DeviceSpec { bmsai: true, ..with(kind, &[(8, 1)]) }), 0x101);
        assert_eq!(Bench::of(kind).get(0x1498), 0xff, "the link to the CPU is up");
    }
    assert_eq!(Bench::of(ModelKind::B200).get(0x1498), undecided::PRI_ERROR, "no such link");
}

#[test]
fn old_firmware_lacks_the_unnamed_knobs_and_all_lack_protected_pcie() {
    for (firmware, knob, there) in [
        (Firmware::Current, 8, true),
        (Firmware::Current, 2, true),
        (Firmware::Current, 34, true),
        (Firmware::Current, 45, false),
        (Firmware::Current, 44, false),
        (Firmware::Old, 8, true),
        (Firmware::Old, 10, true),
        (Firmware::Old, 2, false),
        (Firmware::Old, 4, false),
        (Firmware::Old, 34, false),
        (Firmware::Old, 45, false),
    ] {
        let mut bench = Bench::ready(DeviceSpec { firmware, ..DeviceSpec::new("gpu0", ModelKind::B300) });
        let answer = bench.read_knob(knob);
        assert_eq!(!answer.ends_with("->!1e3"), there, "{firmware:?}: {answer}");
        bench.assert_clean();
    }
}

#[test]
fn registers_of_the_other_chips_and_of_emem_are_not_there() {
    let others = [0x8f_2ad0, 0x8f_2c10, 0x11_82cc, 0x2_0120, 0x9_1288, 0x1458, 0x8f_1f90, 0x8f_1e00, 0xa00];
    for (kind, boot) in [(ModelKind::B200, GB20X_BOOT), (ModelKind::RtxPro6000, GPU_BOOT)] {
        let mut bench = Bench::of(kind);
        for offset in others.into_iter().chain([boot]) {
            assert_eq!(bench.get(offset), undecided::PRI_ERROR, "{kind} {offset:#x}");
        }
        assert_eq!(bench.status().stray_count, 10);
        for (offset, value) in [(0x8f_012c, 0x1100), (0x8f_0278, 0x0200_0200), (0x8f_0abc, 0x20), (0x2_24fc, 0)] {
            assert_eq!(bench.get(offset), value, "{kind} {offset:#x}");
        }
        for register in [0x8f_0320, 0x8f_032c] {
            bench.get(register);
        }
        assert_eq!(bench.get(0x8a_a128) & 0xff, 0, "not in recovery");
        assert_eq!(bench.status().stray_count, 10);
        bench.put(SEND_RDATA, 1);
        bench.put(SEND_INFO, 5);
        bench.put(SEND_INFO, 1 << 31);
        assert_eq!(bench.status().stray_count, 12, "only the interrupt bits of the info registers may be written");
    }
}

type Breach = fn(&mut Bench);

#[test]
fn breaches_of_the_mailbox_protocol_are_recorded() {
    const READ: [u32; 3] = [0xc000_0000, 0x1310_de7e, 0x0008_020c];
    let cases: [(Breach, HostError); 8] = [
        (
            |bench| {
                bench.put(RECV_INFO, 0x0010_000c);
                bench.put(RECV_INFO, 0x0010_000c);
            },
            HostError::MnocNotReady { port: 0 },
        ),
        (|bench| bench.put(RECV_INFO, 0x0010_0000), HostError::MnocBadSize { port: 0, size: 0 }),
        (|bench| bench.put(RECV_INFO, 0x0010_1044), HostError::MnocBadSize { port: 0, size: 0x1044 }),
        (|bench| bench.put(RECV_WDATA, 1), HostError::MnocUnexpectedData { port: 0 }),
        (
            |bench| {
                bench.fault(Fault::MnocCreditGap(5));
                bench.put(RECV_INFO, 0x0010_000c);
                bench.put(RECV_WDATA, READ[0]);
            },
            HostError::MnocNoCredit { port: 0 },
        ),
        (|bench| assert_eq!(bench.get(SEND_RDATA), undecided::MNOC_EMPTY_READ), HostError::MnocEmptyRead { port: 0 }),
        (
            |bench| {
                assert!(bench.send_mnoc(&READ));
                bench.wait(1);
                assert!(bench.send_mnoc(&READ));
            },
            HostError::ResponseNotConsumed { channel: 0 },
        ),
        (
            |bench| {
                bench.flr();
                bench.wait(50);
                assert!(bench.send_mnoc(&READ));
            },
            HostError::RequestBeforeBoot { channel: 0 },
        ),
    ];
    for (breach, error) in cases {
        let mut bench = Bench::of(ModelKind::B200);
        breach(&mut bench);
        assert_eq!(bench.status().host_errors, [error]);
    }
}

#[test]
fn a_size_that_is_no_multiple_of_four_is_rounded_up_and_a_long_message_is_given_credit_by_blocks() {
    let mut bench = Bench::of(ModelKind::B200);
    bench.put(RECV_INFO, 0x0010_000a);
    for word in [0xc000_0000, 0x1310_de7e, 0x0008_020c] {
        bench.put(RECV_WDATA, word);
    }
    assert_eq!(bench.receive_mnoc().unwrap().len(), 6);
    bench.assert_clean();
    bench.fault(Fault::MnocCreditGap(7));
    bench.put(RECV_INFO, 0x0010_0088);
    for index in 0..34 {
        if index % 16 == 0 {
            assert_eq!(bench.get(RECV_INFO) & CREDIT, 0, "block at {index}");
            bench.wait(7);
        }
        assert_eq!(bench.get(RECV_INFO) & CREDIT, CREDIT, "dword {index}");
        bench.put(RECV_WDATA, 0);
    }
    bench.wait(1);
    let words = vec![0; 34];
    assert_eq!(bench.status().host_errors, [HostError::BadRequest { channel: 0, words }]);
}

#[test]
fn errors_of_the_mailbox() {
    let mut bench = Bench::of(ModelKind::RtxPro6000);
    bench.fault(Fault::MnocReceiveError);
    assert_eq!(bench.get(RECV_INFO) & ERROR, ERROR);
    bench.model.clear_faults(bench.now);
    assert_eq!(bench.get(RECV_INFO) & ERROR, 0);
    bench.fault(Fault::MnocSendError);
    assert_eq!(bench.read_knob(8), "0008020C->?");
    assert_eq!(bench.get(SEND_INFO), ERROR);
    bench.model.clear_faults(bench.now);
    assert_eq!(bench.read_knob(8), "0008020C->0");
    assert_eq!(bench.get(SEND_INFO), 0, "the next reply cleared it");
    bench.fault(Fault::FspQueueStuck);
    assert_eq!(bench.write_knob(8, 1), "0008020D 1->?");
    let ready = bench.get(RECV_INFO) & READY != 0;
    assert_eq!(ready, undecided::MNOC_READY_WHILE_REQUEST_WAITS, "what waits is never taken");
    bench.fault(Fault::MnocCreditGap(1000));
    bench.flr();
    bench.wait(400);
    assert_eq!(bench.get(RECV_INFO) & READY, READY, "a reset empties the mailbox");
    assert!(!bench.send_mnoc(&[1, 2, 3]), "no credit");
}

#[test]
fn a_trace_of_mailbox_accesses_becomes_exchanges() {
    let mut bench = Bench::of(ModelKind::B200);
    bench.fault(Fault::FspDuplicateReply);
    let mut events: Vec<TraceEvent> = Vec::new();
    let mut note = |kind, offset, value: u32| {
        let (device, space, value) = ("gpu0".into(), Space::Bar0, u64::from(value));
        let micros = events.len() as u64;
        events.push(TraceEvent { micros, device, kind, space, offset, width: 4, value, note: None });
    };
    for (command, value) in [(0x0008_020c, None), (0x0008_020d, Some(1))] {
        let request: Vec<u32> = [0xc000_0000, 0x1310_de7e, command].into_iter().chain(value).collect();
        let announce = 1 << 20 | u32::try_from(request.len() * 4).unwrap();
        for (offset, word) in [(RECV_INFO, announce)].into_iter().chain(request.iter().map(|word| (RECV_WDATA, *word)))
        {
            bench.put(offset, word);
            note(Kind::Write, offset, word);
        }
        bench.wait(1);
        // The reply, and its double.
        for _ in 0..2 {
            let info = bench.get(SEND_INFO);
            note(Kind::Read, SEND_INFO, info);
            for _ in 0..(info & 0xf_ffff) / 4 {
                note(Kind::Read, SEND_RDATA, bench.get(SEND_RDATA));
            }
        }
    }
    let found: Vec<String> = trace::rpcs(&events, "gpu0").iter().map(ToString::to_string).collect();
    assert_eq!(found, ["0008020C->0", "0008020D 1"]);
    bench.assert_clean();
}
