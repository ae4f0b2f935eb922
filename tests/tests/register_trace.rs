//! The register trace of each change of a GH100, word for word against the protocol's worked examples.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, around_reset, exchanges, node, registers_say, whole_trace};
use lab::Node;
use lab::node::CC_MODE;
use lab_devices::{Kind, Space, TraceEvent};

/// Examples 5, 7 and 6 of gpu-cc-protocol section 6.4, word for word. Example 6 leaves out values that are 0.
const ON_FROM_OFF: &str = "002D020C→0, 0002020C→0, 0004020C→0, 0022020C→0, 002D020C→0, 000A020C→0, 000A020D 2, \
                           0008020C→0, 0008020D 1, 0006020C→0";
const OFF_FROM_ON: &str = "002D020C→0, 000A020C→2, 000A020D 0, 0006020C→0, 0008020C→1, 0008020D 0";
const DEVTOOLS_FROM_OFF: &str = "002D020C, 0002020C, 0004020C, 0022020C, 002D020C, 000A020C→0, 0008020C→0, 0008020D 1, \
                                 0006020C→0, 0006020D 1";

/// The reads of permission knobs that allow what they guard, and the knobs that they guard (gpu-cc-protocol section 9,
/// number 16).
const PERMITTED: [(&str, &str); 4] =
    [("0005020C->1", "0006"), ("0007020C->1", "0008"), ("0009020C->1", "000A"), ("002C020C->1", "002D")];

/// What was said of `example`, in its notation. What ccnode says beyond it is left out, and it is only this: before the
/// first write, once each, the permissions of the knobs that the change sets; and after each write, the read that
/// confirms it (gpu-cc-protocol section 9, numbers 16 and 17). Both must be there.
fn in_the_words_of(example: &str, said: &[String]) -> Result<String> {
    let mut permitted = BTreeSet::new();
    let mut words: Vec<String> = Vec::new();
    let mut is_written = false;
    let mut rest = said.iter();
    while let Some(word) = rest.next() {
        if let Some((_, knob)) = PERMITTED.iter().find(|(read, _)| read == word) {
            ensure!(!is_written && permitted.insert(*knob), "{word} again, or after a write");
            continue;
        }
        words.push(word.replace("->", "→"));
        if let Some((knob, value)) = word.split_once("020D ") {
            is_written = true;
            ensure!(permitted.contains(knob), "{word}, and its permission was not looked at");
            let confirmation = rest.next();
            ensure!(confirmation == Some(&format!("{knob}020C->{value}")), "{word}, and then {confirmation:?}");
        }
    }
    for (word, wanted) in words.iter_mut().zip(example.split(", ")) {
        if !wanted.contains(['→', ' ']) {
            *word = word.trim_end_matches("→0").to_owned();
        }
    }
    Ok(words.join(", "))
}

/// Registers of EMEM channel 2 (gpu-cc-protocol section 4.8).
const EMEMC: u64 = 0x8f_2ad0;
const EMEMD: u64 = 0x8f_2ad4;
const QUEUE_HEAD: u64 = 0x8f_2c10;
const QUEUE_TAIL: u64 = 0x8f_2c14;
const MESSAGE_HEAD: u64 = 0x8f_2c90;
const MESSAGE_TAIL: u64 = 0x8f_2c94;

/// PMC_BOOT_0, boot scratch, recovery flag, CC status, and the transport.
const NAMED: [u64; 10] =
    [0, 0x2_00bc, 0x2_0120, 0x11_82cc, EMEMC, EMEMD, QUEUE_HEAD, QUEUE_TAIL, MESSAGE_HEAD, MESSAGE_TAIL];

/// What a GPU saw of a change: its name, the events until its reset, and those after it.
type Seen = (String, Vec<TraceEvent>, Vec<TraceEvent>);

/// A change to `mode`.
fn change(node: &Node, mode: &str, ready: &str) -> Result<Vec<Seen>> {
    node.guest.fleet().clear_trace();
    node.ask_for(mode)?;
    node.await_state(mode, ready, CHANGE)?;
    let events = whole_trace(node)?;
    node.gpus()
        .into_iter()
        .map(|name| {
            let (before, after) = around_reset(&events, &name)?;
            Ok((name, before, after))
        })
        .collect()
}

/// Every write to BAR0 is one of the transport's, with the words of the protocol: the request, its tail before its head, and
/// the acknowledgement of the reply.
fn only_the_transport_was_written(events: &[TraceEvent]) -> Result<()> {
    let writes: Vec<(u64, u64)> = events
        .iter()
        .filter(|event| event.kind == Kind::Write && event.space == Space::Bar0)
        .map(|event| (event.offset, event.value))
        .collect();
    let mut rest = writes.as_slice();
    while !rest.is_empty() {
        let word = u64::from(u32::MAX);
        let (request, after) = match rest {
            [(EMEMC, 0x0300_0800), (EMEMD, 0xC000_0000), (EMEMD, 0x1310_DE7E), (EMEMD, command), after @ ..] => {
                let value = usize::from(command & 0xff == 0x0d);
                ensure!(*command <= word && after.len() >= value, "cut short");
                (3 + value, &after[value..])
            }
            other => anyhow::bail!("not a request: {:x?}", &other[..other.len().min(6)]),
        };
        let tail = 0x800 + 4 * (u64::try_from(request)? - 1);
        let [(QUEUE_TAIL, t), (QUEUE_HEAD, 0x800), (EMEMC, 0x0300_0800), (MESSAGE_TAIL, 0x800), after @ ..] = after
        else {
            anyhow::bail!("after a request: {:x?}", &after[..after.len().min(6)]);
        };
        ensure!(*t == tail, "tail {t:#x}, wanted {tail:#x}");
        rest = after;
    }
    Ok(())
}

/// Everything that was read of BAR0 is a register that the protocol names (gpu-cc-protocol section 10.5) and the transport's
/// own, in aligned dwords; the other BARs were left alone.
fn only_named_registers_were_touched(events: &[TraceEvent]) -> Result<()> {
    for event in events.iter().filter(|event| matches!(event.kind, Kind::Read | Kind::Write)) {
        match event.space {
            Space::Config => {}
            Space::Bar0 => {
                let is_named = NAMED.contains(&event.offset);
                ensure!(is_named && event.width == 4 && event.offset % 4 == 0, "{event:?}");
            }
            Space::Bar2 | Space::Bar4 | Space::Device => anyhow::bail!("{event:?}"),
        }
    }
    Ok(())
}

#[test]
fn on_off_and_devtools_are_the_worked_examples() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    for (mode, ready, status, example) in [
        ("on", "true", 0x01, ON_FROM_OFF),
        ("off", "false", 0x00, OFF_FROM_ON),
        ("devtools", "", 0x03, DEVTOOLS_FROM_OFF),
    ] {
        for (name, before, after) in change(&node, mode, ready)? {
            let what = || format!("{name} on the way to {mode}");
            let said = exchanges(&before, &name);
            assert_eq!(in_the_words_of(example, &said).with_context(what)?, example, "{}: {said:?}", what());
            for events in [&before, &after] {
                only_the_transport_was_written(events).with_context(what)?;
                only_named_registers_were_touched(events).with_context(what)?;
            }
            let resets = after.iter().filter(|event| matches!(event.kind, Kind::Flr | Kind::BusReset)).count();
            assert_eq!(resets, 1, "{}", what());
            let booted = after.iter().find(|event| event.kind == Kind::Ready).context("it never booted")?;
            assert_eq!(booted.value & 0x23, status, "{}", what());
            // Nothing behind BAR0 is looked at before configuration space has answered, and nothing is set any more.
            let first = after.iter().find(|event| event.kind == Kind::Read).context("nothing was read")?;
            assert_eq!(first.space, Space::Config, "{}", what());
            let verified = exchanges(&after, &name);
            assert!(verified.len() >= 4 && verified.iter().all(|word| word.contains("020C->")), "{verified:?}");
        }
        registers_say(&node, mode)?;
    }
    Ok(())
}
