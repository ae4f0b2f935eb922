//! Every fault of an API server at every request of a change: the node gets where it is to be once the fault is over, and no
//! label is ever false.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod in_process;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use gpu_firmware::Mode;
use in_process::{AGENT, Change, Kept, NODE, PATIENCE, Point, ROUND_TRIP, Request, When, World};
use lab_kube::api_server::{Fault, FaultAction};
use node_object::labels::CC_MODE;

/// What happens to a request, or while it waits for its answer.
#[derive(Clone, Debug)]
enum Kind {
    /// This happens to so many requests from this one on.
    Fault(FaultAction, usize),
    /// The answer never comes.
    NoAnswer(When),
    /// Every running watch ends in order.
    WatchesClosed,
    /// Every connection is cut.
    ConnectionsCut,
    /// The server goes away and comes back.
    Away,
    /// Watches from before this moment get 410, and every running one is cut.
    Compacted,
    /// The node is deleted, and made again under another UID by its kubelet, with these of its labels.
    Recreated(Kept),
}

/// The faults of any request.
fn kinds() -> Vec<Kind> {
    let status = |code| FaultAction::Status { code, retry_after: None };
    let once = |action| Kind::Fault(action, 1);
    vec![
        once(FaultAction::CutBefore),
        once(FaultAction::CutAfterCommit),
        once(status(409)),
        once(status(410)),
        once(status(429)),
        once(status(500)),
        once(status(503)),
        Kind::Fault(status(503), 7),
        once(FaultAction::SlowBody { chunk: 200, pause: Duration::from_millis(1) }),
        once(FaultAction::CutBodyAfter(100)),
        Kind::NoAnswer(When::BeforeEffect),
        Kind::NoAnswer(When::BeforeAnswer),
        Kind::WatchesClosed,
        Kind::ConnectionsCut,
        Kind::Away,
        Kind::Compacted,
        Kind::Recreated(Kept::Mode),
        Kind::Recreated(Kept::All),
    ]
}

/// Those of watches alone.
fn kinds_of_watches() -> Vec<Kind> {
    let once = |action| Kind::Fault(action, 1);
    vec![
        once(FaultAction::WatchGone),
        once(FaultAction::WatchCut { after_events: 0 }),
        once(FaultAction::WatchCut { after_events: 1 }),
        // So far back that earlier changes are told again.
        once(FaultAction::StaleBookmark { after_events: 0, behind: 60 }),
        once(FaultAction::StaleBookmark { after_events: 1, behind: 60 }),
        once(FaultAction::StaleBookmark { after_events: 1, behind: 1 }),
    ]
}

/// How long an answer is waited for that never comes.
const NO_ANSWER: Duration = Duration::from_millis(250);

/// Makes a change with this fault at the request of this number, counted among watches if `of_watches`.
fn change(world: &mut World, change: Change, kind: &Kind, number: usize, of_watches: bool) -> Result<()> {
    world.prepare(change)?;
    let hold = match kind {
        Kind::Fault(action, times) => {
            let fault = Fault::new(action.clone()).user(AGENT).skip(number).times(*times);
            world.slow_down(matches!(action, FaultAction::StaleBookmark { .. }));
            let fault = world.api.inject(if of_watches { fault.verb("watch") } else { fault });
            let agent = world.start(None)?;
            let struck = world.api.wait_for(PATIENCE, |view| (view.fault_hits(fault) > 0).then_some(()));
            struck.context("the fault has not struck")?;
            world.until_settled(change.to)?;
            world.is_still_followed(change.to)?;
            world.slow_down(false);
            world.kill(agent)?;
            return world.nothing_false_was_said();
        }
        Kind::NoAnswer(when) => *when,
        _ => When::BeforeEffect,
    };
    let point = Point::Request(number, hold);
    let answer = if matches!(kind, Kind::NoAnswer(_)) { NO_ANSWER } else { PATIENCE };
    let agent = world.start_with(Some(point), answer)?;
    world.until_stopped(&agent, point)?;
    match kind {
        Kind::Fault(..) => {}
        Kind::NoAnswer(_) => {
            let given_up = world.api.wait_for(PATIENCE, |view| (view.held() == 0).then_some(()));
            given_up.context("it waits for ever")?;
        }
        Kind::WatchesClosed => world.api.close_watches(),
        Kind::ConnectionsCut => world.api.cut_connections(),
        Kind::Away => {
            world.api.set_down(true);
            std::thread::sleep(Duration::from_millis(20));
            world.api.set_down(false);
        }
        Kind::Compacted => {
            world.api.compact();
            world.api.cut_connections();
        }
        Kind::Recreated(Kept::All) => drop(world.api.replace_node(NODE)?),
        Kind::Recreated(Kept::Mode) => {
            world.api.delete("nodes", "", NODE, None)?;
            world.api.add_node(NODE, &[(CC_MODE, change.to.as_str())])?;
        }
    }
    world.api.release();
    world.until_settled(change.to)?;
    world.is_still_followed(change.to)?;
    world.kill(agent)?;
    world.nothing_false_was_said()
}

#[derive(Debug, Default)]
struct Counts {
    requests: usize,
    struck: usize,
    looks: usize,
    failures: Vec<String>,
}

/// These faults at every request of every change, in turns that lead back to where they began.
fn matrix(kinds: &[(Kind, bool)]) -> Result<Counts> {
    let mut world = World::settled()?;
    let mut todo = Vec::new();
    let mut counts = Counts::default();
    for change in ROUND_TRIP {
        let extent = world.extent(change).with_context(|| format!("{change:?} in peace"))?;
        counts.requests += extent.requests;
        let of_kind = move |(kind, of_watches): (Kind, bool)| {
            let requests = if of_watches { extent.watches } else { extent.requests };
            (0..requests).map(move |number| (kind.clone(), number, of_watches))
        };
        todo.push(kinds.iter().cloned().flat_map(of_kind));
    }
    loop {
        let turn: Vec<_> = todo.iter_mut().map(Iterator::next).collect();
        if turn.iter().all(Option::is_none) {
            break;
        }
        for (wanted, fault) in ROUND_TRIP.into_iter().zip(turn) {
            let Some((kind, number, of_watches)) = fault else {
                world.extent(wanted)?;
                continue;
            };
            counts.struck += 1;
            if let Err(error) = change(&mut world, wanted, &kind, number, of_watches) {
                counts.failures.push(format!("{wanted:?}, {kind:?} at {number}, of watches {of_watches}: {error:#}"));
                ensure!(counts.failures.len() < 5, "{:#?}", counts.failures);
                counts.looks += world.looks();
                world = World::settled()?;
                world.extent(Change { is_new_boot: false, ..wanted })?;
            }
        }
    }
    counts.looks += world.looks();
    Ok(counts)
}

#[test]
fn whatever_the_api_server_does_the_node_gets_there_and_never_lies() -> Result<()> {
    let any: Vec<_> = kinds().into_iter().map(|kind| (kind, false)).collect();
    let watches = kinds_of_watches().into_iter().map(|kind| (kind, true));
    let all: Vec<_> = any.into_iter().chain(watches).collect();
    // Two at a time.
    let (even, odd): (Vec<_>, Vec<_>) = all.iter().cloned().enumerate().partition(|(index, _)| index % 2 == 0);
    let only = |kinds: Vec<(usize, (Kind, bool))>| kinds.into_iter().map(|(_, kind)| kind).collect::<Vec<_>>();
    let (even, odd) = (only(even), only(odd));
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| matrix(&even));
        let second = matrix(&odd);
        (first.join(), second)
    });
    let (first, second) = (first.map_err(|_| anyhow!("a thread panicked"))??, second?);
    let failures = [first.failures, second.failures].concat();
    println!(
        "faults: {} requests x {} kinds, and {} kinds of watches = {}, {} failures; labels and devices compared {} times",
        first.requests,
        kinds().len(),
        kinds_of_watches().len(),
        first.struck + second.struck,
        failures.len(),
        first.looks + second.looks
    );
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(first.requests, second.requests, "each change takes the same requests every time");
    assert!(first.struck + second.struck >= first.requests * kinds().len(), "every kind at every request");
    Ok(())
}

#[test]
fn requests_of_a_change_are_these() -> Result<()> {
    const CHANGES: [Mode; 4] = [Mode::On, Mode::Off, Mode::Devtools, Mode::Off];
    // The node is looked at once, and in each change once more for what it offers.
    const WANTED: [(&str, &str, usize); 6] = [
        ("create", "events", 2 * CHANGES.len()),
        ("list", "nodes", 1 + CHANGES.len()),
        ("list", "pods", CHANGES.len()),
        ("patch", "nodes", 2 * CHANGES.len()),
        ("watch", "nodes", 1 + CHANGES.len()),
        ("watch", "pods", CHANGES.len()),
    ];
    let mut world = World::settled()?;
    let before = world.requests_since(0).len();
    let agent = world.start(None)?;
    world.until_watched(before)?;
    for to in CHANGES {
        world.prepare(Change { to, is_new_boot: false })?;
        world.until_settled(to)?;
    }
    let counts = |requests: &[Request]| {
        let mut counts = BTreeMap::new();
        for Request { verb, resource, .. } in requests {
            *counts.entry((verb.clone(), resource.clone())).or_insert(0) += 1;
        }
        counts.into_iter().map(|((verb, resource), count)| (verb, resource, count)).collect::<Vec<_>>()
    };
    let total = WANTED.iter().map(|(.., count)| count).sum::<usize>();
    // Events may come after the result.
    world.until_requested(before + total)?;
    world.terminate(agent)?;
    let found = counts(&world.requests_since(before));
    let wanted = WANTED.map(|(verb, resource, count)| (verb.to_owned(), resource.to_owned(), count));
    assert_eq!(found, wanted, "a start and {} changes", CHANGES.len());
    world.nothing_false_was_said()
}
