//! Configuration space: of a GPU of each kind and of a port above one.

use std::cell::OnceCell;

use hw_probe::acs::{Acs, Ports};
use hw_probe::config::{ConfigSpace, Liveness, SIZE};
use hw_probe::{Condition, Fault, Inventory, NVIDIA};

use crate::room::{HEALTHY, Room, function};

/// One of each place of the security-fault word and of the BAR firewall.
const SICK: [(&str, u16); 3] = [("0000:41:00.0", 0x2330), ("0000:42:00.0", 0x2901), ("0000:43:00.0", 0x2bb5)];
const PORT: &str = "0000:50:00.0";
const BELOW: &str = "0000:51:00.0";

thread_local! {
    static ROOM: OnceCell<(Room, Inventory)> = const { OnceCell::new() };
}

fn room() -> (Room, Inventory) {
    let room = Room::new();
    for (bdf, device) in SICK {
        room.fake.gpu(bdf, device);
    }
    room.fake.bridge(PORT);
    room.fake.below(PORT).gpu(BELOW, 0x2330);
    let inventory = Inventory::scan(&room.fake.root());
    (room, inventory)
}

/// The walks over the capabilities of these bytes end and tell the truth, and what is made of them has its reasons.
pub fn config(data: &[u8]) {
    let config = ConfigSpace::from_bytes(data);
    assert_eq!(config.as_bytes(), &data[..data.len().min(SIZE)]);
    check_capabilities(&config);
    ROOM.with(|cell| {
        let (room, inventory) = cell.get_or_init(room);
        for (bdf, _) in SICK {
            room.fake.get(bdf).config(data);
            check_condition(&Condition::read(&room.fake.root(), function(inventory, bdf)), data);
        }
        room.fake.get(PORT).config(data);
        let ports = Ports::default().above(&room.fake.root(), function(inventory, BELOW));
        assert_eq!(ports.len(), 1);
        if let Acs::Off { missing } = &ports[0].acs {
            assert!((1..=4).contains(&missing.len()));
        }
        let healthy = function(inventory, HEALTHY);
        assert!(Condition::read(&room.fake.root(), healthy).faults.is_empty());
    });
}

fn check_capabilities(config: &ConfigSpace) {
    let found = config.capabilities();
    let mut offsets: Vec<_> = found.iter().map(|capability| capability.offset).collect();
    offsets.sort_unstable();
    offsets.dedup();
    assert_eq!(offsets.len(), found.len(), "a capability is told twice: {found:?}");
    for capability in &found {
        let start = if capability.is_extended { 0x100 } else { 0x40 };
        assert!(capability.offset >= start && capability.offset % 4 == 0, "{capability:?}");
        assert!(capability.is_extended || capability.offset < 0x100, "{capability:?}");
        let id = if capability.is_extended {
            config.u16(capability.offset)
        } else {
            config.u8(capability.offset).map(u16::from)
        };
        assert!(id == Some(capability.id) && capability.id != 0, "{capability:?}, where {id:?} is written");
    }
    let first = |id: u16, is_extended: bool| {
        let mut like = found.iter().filter(|found| found.id == id && found.is_extended == is_extended);
        like.next().map(|found| found.offset)
    };
    for id in 0..=u8::MAX {
        assert_eq!(config.capability(id), first(id.into(), false).filter(|_| id != 0));
        assert_eq!(config.extended_capability(id.into()), first(id.into(), true).filter(|_| id != 0));
    }
    if let Some(offset) = config.vsec(1, 1) {
        assert_eq!(config.u32(offset + 4).map(|word| word & 0xf_ffff), Some(0x1_0001));
    }
    if let Some(offset) = config.dvsec(NVIDIA, 0) {
        assert_eq!((config.u16(offset + 4), config.u16(offset + 8)), (Some(NVIDIA), Some(0)));
    }
}

fn check_condition(condition: &Condition, data: &[u8]) {
    let word = |at: usize| Some(u16::from_le_bytes(data.get(at..at + 2)?.try_into().ok()?));
    let codes: Vec<_> = condition.faults.iter().map(Fault::code).collect();
    let first = codes.first().copied();
    let (liveness, reason) = match word(0) {
        None => (None, Some("config-unreadable")),
        Some(0xffff) => (Some(Liveness::Silent), Some("off-bus")),
        Some(NVIDIA) if word(0xf0) == Some(0xffff) => (Some(Liveness::Silent), Some("off-bus")),
        Some(NVIDIA) if data.len() < 64 => (None, Some("config-unreadable")),
        Some(NVIDIA) => (Some(Liveness::Answers), None),
        Some(1) => (Some(Liveness::Other(1)), Some("not-ready")),
        Some(other) => (Some(Liveness::Other(other)), Some("other-device")),
    };
    assert_eq!(condition.liveness, liveness, "{codes:?}");
    if reason.is_some() {
        assert_eq!(first, reason);
        assert_eq!(codes.len(), 1, "more is said than is known: {codes:?}");
    }
    for fault in &condition.faults {
        assert!(!fault.to_string().is_empty());
        match fault {
            Fault::SecurityFault { word, offset } => {
                let at = usize::from(*offset);
                assert!(*word != 0 && data.get(at..at + 4) == Some(&word.to_le_bytes()[..]), "{fault:?}");
            }
            Fault::ConfigBroken => assert_eq!(data.get(0x34), Some(&0xff)),
            _ => {}
        }
    }
}
