//! The register trace of each change of a GH100, word for word against the protocol's worked examples.

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, around_reset, exchanges, node};
use lab::Node;
use lab::node::CC_MODE;
use lab_devices::{Kind, Space, TraceEvent};

/// Examples 5, 6 and 7 of gpu-cc-protocol section 6.4. ccnode adds to each write the read that confirms it.
const ON_FROM_OFF: [&str; 12] = [
    "002D020C->0",
    "0002020C->0",
    "0004020C->0",
    "0022020C->0",
    "002D020C->0",
    "000A020C->0",
    "000A020D 2",
    "000A020C->2",
    "0008020C->0",
    "0008020D 1",
    "0008020C->1",
    "0006020C->0",
];
const DEVTOOLS_FROM_OFF: [&str; 12] = [
    "002D020C->0",
    "0002020C->0",
    "0004020C->0",
    "0022020C->0",
    "002D020C->0",
    "000A020C->0",
    "0008020C->0",
    "0008020D 1",
    "0008020C->1",
    "0006020C->0",
    "0006020D 1",
    "0006020C->1",
];
const OFF_FROM_ON: [&str; 8] = [
    "002D020C->0",
    "000A020C->2",
    "000A020D 0",
    "000A020C->0",
    "0006020C->0",
    "0008020C->1",
    "0008020D 0",
    "0008020C->0",
];

/// Registers of EMEM channel 2 (gpu-cc-protocol section 4.8).
const EMEMC: u64 = 0x8f_2ad0;
const EMEMD: u64 = 0x8f_2ad4;
const QUEUE_HEAD: u64 = 0x8f_2c10;
const QUEUE_TAIL: u64 = 0x8f_2c14;
const MESSAGE_TAIL: u64 = 0x8f_2c94;

/// What a GPU saw of a change: its name, the events until its reset, and those after it.
type Seen = (String, Vec<TraceEvent>, Vec<TraceEvent>);

/// A change to `mode`.
fn change(node: &Node, mode: &str, ready: &str) -> Result<Vec<Seen>> {
    node.guest.fleet().clear_trace();
    node.ask_for(mode)?;
    node.await_state(mode, ready, CHANGE)?;
    let events = node.trace();
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

#[test]
fn on_off_and_devtools_are_the_worked_examples() -> Result<()> {
    let Some(mut node) = node("h100x2", &[(CC_MODE, "off")])? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE)?;
    for (mode, ready, status, example) in [
        ("on", "true", 0x01, &ON_FROM_OFF[..]),
        ("off", "false", 0x00, &OFF_FROM_ON[..]),
        ("devtools", "", 0x03, &DEVTOOLS_FROM_OFF[..]),
    ] {
        for (name, before, after) in change(&node, mode, ready)? {
            assert_eq!(exchanges(&before, &name), example, "{name} on the way to {mode}");
            only_the_transport_was_written(&before).with_context(|| format!("{name} on the way to {mode}"))?;
            let resets = after.iter().filter(|event| event.kind == Kind::Flr).count();
            assert_eq!(resets, 1, "{name} on the way to {mode}");
            let booted = after.iter().find(|event| event.kind == Kind::Ready).context("it never booted")?;
            assert_eq!(booted.value & 0x23, status, "{name} on the way to {mode}");
            // Nothing behind BAR0 is looked at before configuration space has answered.
            let first = after.iter().find(|event| event.kind == Kind::Read).context("nothing was read")?;
            assert_eq!(first.space, Space::Config, "{name} on the way to {mode}");
            only_the_transport_was_written(&after).with_context(|| format!("{name} after the reset to {mode}"))?;
        }
    }
    Ok(())
}
