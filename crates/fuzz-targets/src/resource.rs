//! The `resource` file of a function.

use std::cell::OnceCell;

use hw_probe::{Condition, Fault, Inventory};

use crate::room::{Room, function};

const SICK: &str = "0000:41:00.0";

thread_local! {
    static ROOM: OnceCell<Room> = const { OnceCell::new() };
}

/// Each of the first six lines is a BAR, is one without an address, or is a problem; nothing is made up.
pub fn resource(data: &[u8]) {
    ROOM.with(|cell| {
        let room = cell.get_or_init(|| {
            let room = Room::new();
            room.fake.gpu(SICK, 0x2330);
            room
        });
        room.fake.get(SICK).attr("resource", data);
        let now = Inventory::scan(&room.fake.root());
        room.check_healthy(&now);
        let sick = function(&now, SICK);
        let says = |words: &str| now.problems.iter().any(|problem| problem.message.starts_with(words));
        assert!(now.problems.iter().all(|problem| problem.bdf == Some(sick.bdf) && problem.message.len() < 512));
        let text = std::str::from_utf8(data).ok().filter(|text| text.len() <= 65_536);
        let lines: Vec<&str> = text.unwrap_or_default().trim_end().lines().collect();
        assert_eq!(
            text.is_none(),
            says("Is not text") || says("Cannot be read: more than 65536 bytes"),
            "{:?}",
            now.problems
        );
        let cut = format!("Has only {} of at least 6 lines", lines.len());
        assert_eq!(text.is_some() && lines.len() < 6, says(&cut), "{:?}", now.problems);
        for (number, line) in (0_u8..6).zip(lines) {
            let words: Vec<Option<u64>> =
                line.split_whitespace().map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()).collect();
            let bar = sick.bars.iter().find(|bar| bar.number == number);
            let is_problem = says(&format!("Line {number} is not a resource"));
            match (bar, words.as_slice()) {
                (Some(bar), [Some(start), Some(end), Some(flags)]) => {
                    assert_eq!((bar.start, Some(bar.size)), (*start, (end - start).checked_add(1)));
                    assert!(bar.start != 0 && bar.size != 0 && flags & 0x2000_0000 == 0 && !is_problem, "{bar:?}");
                }
                (None, [Some(start), Some(_), Some(flags)]) => {
                    assert!(*start == 0 || flags & 0x2000_0000 != 0 || is_problem, "{line:?} is dropped in silence");
                }
                (None, _) => assert!(is_problem, "{line:?} is dropped in silence"),
                (Some(bar), words) => panic!("{bar:?} is made of {words:?}"),
            }
        }
        assert!(sick.bars.is_sorted_by_key(|bar| bar.number) && sick.bars.len() <= 6);
        let has_bar0 = sick.bars.iter().any(|bar| bar.number == 0 && !bar.io);
        let condition = Condition::read(&room.fake.root(), sick);
        assert_eq!(condition.faults, if has_bar0 { vec![] } else { vec![Fault::NoBar0] });
    });
}
