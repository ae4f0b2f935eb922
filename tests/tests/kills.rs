//! cc-manager killed or told to end at every step of a change, before and after each of its requests and between the steps
//! of its firmware: the next start brings the node to what is wanted, and no label is ever false.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod in_process;

use anyhow::{Context, Result, anyhow, ensure};
use gpu_firmware::Mode;
use in_process::{Change, Extent, Point, ROUND_TRIP, When, World};

/// How an agent is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// SIGKILL.
    Kill,
    /// SIGTERM, and all the time it asks for.
    Terminate,
}

#[derive(Debug, Default)]
struct Counts {
    at_requests: usize,
    at_steps: usize,
    /// Those after which another mode was wanted.
    to_elsewhere: usize,
    looks: usize,
    failures: Vec<String>,
}

fn points(extent: Extent) -> Vec<Point> {
    let requests = (0..extent.requests)
        .flat_map(|number| [When::BeforeEffect, When::BeforeAnswer].map(|when| Point::Request(number, when)));
    requests.chain((0..extent.steps).map(Point::Step)).collect()
}

/// What happens to the node while no agent is there.
#[derive(Clone, Copy, Debug)]
struct Meanwhile {
    /// Somebody else resets the devices.
    is_reset: bool,
    /// This mode is wanted instead, until the node is in it.
    elsewhere: Option<Mode>,
}

/// Makes a change with an agent that is ended at `point`, and another that finishes.
fn change(world: &mut World, change: Change, point: Point, end: End, meanwhile: Meanwhile) -> Result<()> {
    world.prepare(change)?;
    let agent = world.start(Some(point))?;
    world.until_stopped(&agent, point)?;
    match end {
        End::Kill => world.kill(agent)?,
        End::Terminate => world.terminate(agent)?,
    }
    if meanwhile.is_reset {
        world.reset_devices();
    }
    if let Some(elsewhere) = meanwhile.elsewhere {
        go_to(world, elsewhere)?;
    }
    go_to(world, change.to)?;
    world.nothing_false_was_said()
}

/// Makes a change in peace.
fn go_to(world: &mut World, mode: Mode) -> Result<()> {
    world.prepare(Change { to: mode, is_new_boot: false })?;
    let agent = world.start(None)?;
    world.until_settled(mode)?;
    world.kill(agent)
}

/// All points of all changes, in turns that lead back to where they began.
fn matrix(end: End) -> Result<Counts> {
    let mut world = World::settled()?;
    let mut todo = Vec::new();
    for change in ROUND_TRIP {
        let points = points(world.extent(change).with_context(|| format!("{change:?} in peace"))?);
        todo.push(points.into_iter().flat_map(|point| [(point, false), (point, true)]));
    }
    let mut counts = Counts::default();
    loop {
        let turn: Vec<Option<(Point, bool)>> = todo.iter_mut().map(Iterator::next).collect();
        if turn.iter().all(Option::is_none) {
            break;
        }
        let mut from = Mode::Off;
        for (wanted, point) in ROUND_TRIP.into_iter().zip(turn) {
            let before = std::mem::replace(&mut from, wanted.to);
            let Some((point, is_back)) = point else {
                go_to(&mut world, wanted.to)?;
                continue;
            };
            match point {
                Point::Request(..) => counts.at_requests += 1,
                Point::Step(_) => counts.at_steps += 1,
            }
            let other = if before == wanted.to { Mode::Devtools } else { before };
            let is_reset = (counts.at_requests + counts.at_steps) % 2 == 0;
            let meanwhile = Meanwhile { is_reset, elsewhere: is_back.then_some(other) };
            counts.to_elsewhere += usize::from(is_back);
            if let Err(error) = change(&mut world, wanted, point, end, meanwhile) {
                counts.failures.push(format!("{wanted:?}, {end:?} at {point:?}, {meanwhile:?}: {error:#}"));
                ensure!(counts.failures.len() < 5, "{:#?}", counts.failures);
                counts.looks += world.looks();
                world = World::settled()?;
                go_to(&mut world, wanted.to)?;
            }
        }
    }
    counts.looks += world.looks();
    Ok(counts)
}

#[test]
fn ended_anywhere_the_next_start_finishes() -> Result<()> {
    let (killed, terminated) = std::thread::scope(|scope| {
        let killed = scope.spawn(|| matrix(End::Kill));
        let terminated = matrix(End::Terminate);
        (killed.join(), terminated)
    });
    let (killed, terminated) = (killed.map_err(|_| anyhow!("a thread panicked"))??, terminated?);
    let failures = [killed.failures, terminated.failures].concat();
    println!(
        "kills: {} at requests, {} at firmware steps, {} by SIGTERM, {} failures; after {} of them another mode was wanted; \
         labels and devices compared {} times",
        killed.at_requests,
        killed.at_steps,
        terminated.at_requests + terminated.at_steps,
        failures.len(),
        killed.to_elsewhere + terminated.to_elsewhere,
        killed.looks + terminated.looks
    );
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(killed.at_requests >= 200 && killed.at_steps >= 160, "too few points for a whole matrix");
    Ok(())
}
