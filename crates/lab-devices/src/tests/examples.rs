//! The worked examples of gpu-cc-protocol section 6.4, word for word.

use std::collections::BTreeMap;

use super::host::{Bench, Bus, CONTROL, DATA, GPU_BOOT, GPU_STATUS, M_HEAD, M_TAIL, Q_HEAD, Q_TAIL};
use crate::{DeviceSpec, ModelKind};

const SWITCH_BOOT: u64 = 0x6_60bc;
const SWITCH_STATUS: u64 = 0x2_8c50;

#[test]
fn example_1_reading_a_knob_on_a_fresh_device() {
    for mut bench in [Bench::gpu(), Bench::switch()] {
        let at = |register: u64| register + 16;
        assert_eq!([bench.get(at(Q_HEAD)), bench.get(at(Q_TAIL))], [0, 0]);
        bench.put(at(CONTROL), 0x0300_0800);
        for word in [0xc000_0000, 0x1310_de7e, 0x0008_020c] {
            bench.put(at(DATA), word);
        }
        assert_eq!(bench.get(at(CONTROL)), 0x0300_080c, "the address moved by three dwords");
        bench.put(at(Q_TAIL), 0x808);
        bench.put(at(Q_HEAD), 0x800);
        assert_eq!([bench.get(at(M_HEAD)), bench.get(at(M_TAIL))], [0, 0], "not before the latency is over");
        assert_eq!(bench.get(at(Q_HEAD)), 0x800, "not taken yet");
        bench.wait(1);
        assert_eq!([bench.get(at(M_HEAD)), bench.get(at(M_TAIL))], [0x800, 0x814]);
        assert_eq!([bench.get(at(Q_HEAD)), bench.get(at(Q_TAIL))], [0x808, 0x808], "taken: head is tail");
        bench.put(at(CONTROL), 0x0300_0800);
        let reply: Vec<u32> = (0..6).map(|_| bench.get(at(DATA))).collect();
        assert_eq!(reply[..5], [0xc000_0000, 0x1510_de7e, 3, 0x13, 0]);
        assert_eq!(reply[5] & 0xffff, 0);
        assert_ne!(reply[5] >> 16, 0, "garbage in the high half");
        bench.put(at(M_TAIL), 0x800);
        assert_eq!(bench.get(at(M_HEAD)), bench.get(at(M_TAIL)), "acknowledged");
        bench.assert_clean();
    }
}

#[test]
fn example_2_writing_a_knob() {
    let mut bench = Bench::gpu();
    bench.send(2, &[0xc000_0000, 0x1310_de7e, 0x0008_020d, 1]);
    assert_eq!(bench.get(Q_TAIL + 16), 0x80c);
    bench.wait(1);
    assert_eq!(bench.get(M_TAIL + 16), 0x810, "five dwords");
    assert_eq!(bench.receive(2).unwrap(), [0xc000_0000, 0x1510_de7e, 3, 0x13, 0]);
    assert_eq!(bench.status().knobs[&8], 1);
    assert_eq!(bench.get(GPU_STATUS), 0, "a knob moves nothing before a reset");
    bench.assert_clean();
}

/// Examples 5 to 10: exchanges, and the status register after the reset that follows them.
#[test]
fn examples_5_to_10_mode_changes() {
    let off = BTreeMap::new();
    let on = BTreeMap::from([(8, 1), (10, 2)]);
    let ppcie = BTreeMap::from([(45, 1), (10, 2)]);
    let switch_ppcie = BTreeMap::from([(45, 1)]);
    let (gpu, switch) = ((ModelKind::H100, GPU_BOOT, GPU_STATUS), (ModelKind::Ls10, SWITCH_BOOT, SWITCH_STATUS));
    let cases = [
        (
            "5: CC on from off",
            gpu,
            &off,
            "002D020C->0, 0002020C->0, 0004020C->0, 0022020C->0, 002D020C->0, 000A020C->0, 000A020D 2, \
             0008020C->0, 0008020D 1, 0006020C->0",
            0x00,
            0x01,
        ),
        (
            "6: devtools from off",
            gpu,
            &off,
            "002D020C->0, 0002020C->0, 0004020C->0, 0022020C->0, 002D020C->0, 000A020C->0, 0008020C->0, \
             0008020D 1, 0006020C->0, 0006020D 1",
            0x00,
            0x03,
        ),
        (
            "7: off from on",
            gpu,
            &on,
            "002D020C->0, 000A020C->2, 000A020D 0, 0006020C->0, 0008020C->1, 0008020D 0",
            0x01,
            0x00,
        ),
        (
            "8: PPCIe on from off",
            gpu,
            &off,
            "0008020C->0, 0002020C->0, 0004020C->0, 0022020C->0, 0006020C->0, 0008020C->0, 000A020C->0, \
             000A020D 2, 002D020C->0, 002D020D 1",
            0x00,
            0x20,
        ),
        (
            "9: NVSwitch PPCIe on from off",
            switch,
            &off,
            "0008020C->0, 0002020C->0, 0004020C->0, 0022020C->0, 0006020C->0, 0008020C->0, 000A020C->0, \
             002D020C->0, 002D020D 1",
            0x00,
            0x01,
        ),
        (
            "10: PPCIe off from on",
            gpu,
            &ppcie,
            "0008020C->0, 000A020C->2, 000A020D 0, 002D020C->1, 002D020D 0",
            0x20,
            0x00,
        ),
        (
            "10: NVSwitch PPCIe off from on",
            switch,
            &switch_ppcie,
            "0008020C->0, 000A020C->0, 002D020C->1, 002D020D 0",
            0x01,
            0x00,
        ),
    ];
    for (name, (kind, boot, status), knobs, exchanges, before, after) in cases {
        let mut bench = Bench::ready(DeviceSpec { knobs: knobs.clone(), ..DeviceSpec::new("dev0", kind) });
        assert_eq!(bench.get(status), before, "{name}: before");
        bench.follow(exchanges);
        assert_eq!(bench.get(status), before, "{name}: staged only");
        bench.flr();
        assert!(bench.wait_for_boot(boot), "{name}");
        assert_eq!(bench.get(status), after, "{name}: after");
        bench.assert_clean();
        assert_eq!(bench.status().rpcs, u64::try_from(exchanges.split(", ").count()).unwrap());
    }
}

#[test]
fn replies_come_on_the_channel_that_asked() {
    let mut bench = Bench::gpu();
    // The only command of channel 1: couple the next bus reset.
    bench.send(1, &[0xc000_0000, 0x1310_de7e, 0x0001_0104]);
    assert_eq!(bench.receive(1).unwrap(), [0xc000_0000, 0x1510_de7e, 3, 0x13, 0]);
    assert_eq!(bench.read_knob(8), "0008020C->0");
    bench.assert_clean();
}

#[test]
fn a_knob_of_an_interrupted_tool_gives_the_invalid_state() {
    let spec = DeviceSpec { knobs: [(6, 1)].into(), ..DeviceSpec::new("gpu0", ModelKind::H200) };
    assert_eq!(Bench::ready(spec).get(GPU_STATUS), 2);
}
