//! How far a change is, device by device, while it runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gpu_firmware::{Effective, KnobWrite, Milestone, Observer, Progress};
use hw_probe::{Bdf, PciFunction};

use crate::printable;
use crate::report::product;

/// Columns that a terminal is sure to have.
const COLUMNS: usize = 79;

/// What has happened with one device.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Way {
    /// The mode that it booted with before.
    pub(super) before: Option<Effective>,
    /// Knobs that were written, in order.
    pub(super) written: Vec<KnobWrite>,
    /// Resets that the kernel has made.
    pub(super) resets: usize,
    /// Time until the last thing that happened.
    pub(super) took: Duration,
}

/// Shows the progress of every device, and remembers it: a line a device that is written over, or a line an event.
pub(super) struct Board<'a, W> {
    state: Mutex<State<'a, W>>,
    /// How often we were asked to stop.
    pub(super) asked: AtomicUsize,
    start: Instant,
}

struct State<'a, W> {
    out: &'a mut W,
    live: bool,
    is_drawn: bool,
    resets_begun: bool,
    rows: BTreeMap<Bdf, Row>,
}

#[derive(Default)]
struct Row {
    product: String,
    text: String,
    way: Way,
}

impl<'a, W: Write + Send> Board<'a, W> {
    pub(super) fn new(out: &'a mut W, live: bool, functions: &[PciFunction]) -> Self {
        let row = |function: &PciFunction| Row { product: product(function), ..Row::default() };
        let rows = functions.iter().map(|function| (function.bdf, row(function))).collect();
        let state = State { out, live, is_drawn: false, resets_begun: false, rows };
        Self { state: Mutex::new(state), asked: AtomicUsize::new(0), start: Instant::now() }
    }

    fn lock(&self) -> MutexGuard<'_, State<'a, W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells that somebody asked to stop, for the `number`th time.
    pub(super) fn asked_to_stop(&self, number: usize) {
        let mut state = self.lock();
        let text = match (number, state.resets_begun) {
            (1, false) => "Stopping: knobs that were written get their former values again, and nothing is reset",
            (1, true) => {
                "Too late to stop: resets are under way, are not interrupted, and the change goes on to its end"
            }
            _ => "Resets under way are not interrupted, and neither is putting knobs back; every wait has a deadline",
        };
        state.say(text);
    }

    /// What has happened with each device.
    pub(super) fn ways(&self) -> BTreeMap<Bdf, Way> {
        self.lock().rows.iter().map(|(bdf, row)| (*bdf, row.way.clone())).collect()
    }
}

impl<W: Write + Send> Observer for Board<'_, W> {
    fn progress(&self, progress: &Progress) {
        let took = self.start.elapsed();
        let mut state = self.lock();
        let Some(row) = state.rows.get_mut(&progress.bdf) else { return };
        let way = &mut row.way;
        way.took = took;
        let mut begins_reset = false;
        match &progress.what {
            // Staged a second time, after a reset for its mailbox, it is no longer as it was.
            Milestone::Staged { effective, .. } if way.resets == 0 => way.before = Some(*effective),
            Milestone::Written(write) => way.written.push(*write),
            Milestone::ResetBegun | Milestone::BusResetBegun { .. } => begins_reset = true,
            Milestone::ResetDone => way.resets += 1,
            _ => {}
        }
        // The text of a progress begins with the address.
        let text = progress.to_string();
        row.text = printable(text.split_once(": ").map_or(&*text, |(_, what)| what));
        state.resets_begun |= begins_reset;
        if state.live {
            state.draw();
        } else {
            let row = state.rows.get(&progress.bdf).map(|row| row.text.clone()).unwrap_or_default();
            let line = format!("{:7.3} s  {}  {row}", took.as_secs_f64(), progress.bdf);
            state.line(&line);
        }
    }

    fn is_stopping(&self) -> bool {
        self.asked.load(Ordering::SeqCst) > 0
    }
}

impl<W: Write> State<'_, W> {
    /// A terminal that has gone away does not end the change.
    fn line(&mut self, line: &str) {
        let _ = writeln!(self.out, "{line}").and_then(|()| self.out.flush());
    }

    fn say(&mut self, text: &str) {
        if self.live && self.is_drawn {
            // Above the devices' lines.
            let _ = write!(self.out, "\u{1b}[{}A\u{1b}[J", self.rows.len());
            self.is_drawn = false;
            self.line(text);
            self.paint();
        } else {
            self.line(text);
        }
    }

    fn draw(&mut self) {
        if self.is_drawn {
            let _ = write!(self.out, "\u{1b}[{}A", self.rows.len());
        }
        self.paint();
    }

    fn paint(&mut self) {
        let width = self.rows.values().map(|row| row.product.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for (bdf, row) in &self.rows {
            let line = format!("{bdf}  {:width$}  {:6.1} s  {}", row.product, row.way.took.as_secs_f64(), row.text);
            let cut: String = line.chars().take(COLUMNS).collect();
            // A string takes any text.
            let _ = writeln!(text, "\u{1b}[2K{cut}");
        }
        self.is_drawn = true;
        let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use gpu_firmware::{Error, Fault, Knob};
    use hw_probe::Inventory;
    use hw_probe::testing::FakeSysfs;

    use super::*;

    const A: &str = "0000:41:00.0";
    const B: &str = "0000:42:00.0";

    /// What is shown of these events, and what is remembered of the first device.
    fn show(live: bool, events: &[(&str, Milestone)], asked: &[usize]) -> (String, Way) {
        let fake = FakeSysfs::new();
        let _ = (fake.gpu(A, 0x2330), fake.gpu(B, 0x2330));
        let functions: Vec<PciFunction> = Inventory::scan(&fake.root()).gpus().cloned().collect();
        let mut out = Vec::new();
        let board = Board::new(&mut out, live, &functions);
        for (bdf, what) in events {
            board.progress(&Progress { bdf: bdf.parse().unwrap(), at: SystemTime::now(), what: what.clone() });
        }
        for number in asked {
            board.asked_to_stop(*number);
        }
        let way = board.ways()[&A.parse().unwrap()].clone();
        (String::from_utf8(out).unwrap(), way)
    }

    fn events() -> Vec<(&'static str, Milestone)> {
        let write = KnobWrite { knob: Knob::CCM, from: 0, to: 1 };
        let staged = |effective| Milestone::Staged { effective, writes: 1, reset_needed: true };
        vec![
            (A, Milestone::Begun),
            (A, Milestone::Written(write)),
            (B, Milestone::Begun),
            (A, staged(Effective::Off)),
            (A, Milestone::ResetBegun),
            (A, Milestone::ResetDone),
            (A, staged(Effective::On)),
            (B, Milestone::Failed { error: Error::new(B.parse().unwrap(), Fault::NoBar0) }),
        ]
    }

    #[test]
    fn plain_lines_tell_every_event_once() {
        let (text, way) = show(false, &events(), &[]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), events().len());
        assert!(lines[1].ends_with(" s  0000:41:00.0  knob CCM (8) 0 -> 1"), "{}", lines[1]);
        assert!(lines[7].contains("0000:42:00.0  failed: No BAR0"), "{}", lines[7]);
        assert!(!text.contains('\u{1b}'));
        assert_eq!((way.before, way.resets, way.written.len()), (Some(Effective::Off), 1, 1), "as it was at first");
    }

    #[test]
    fn a_terminal_has_a_line_a_device() {
        let (text, _) = show(true, &events(), &[1]);
        assert_eq!(text.matches("\u{1b}[2A").count(), events().len(), "each event but the first, and the remark");
        // What is said once may be longer: it is never written over.
        for line in text.lines().filter(|line| !line.contains("Too late")) {
            assert!(line.replace("\u{1b}[2K", "").replace("\u{1b}[2A", "").chars().count() <= COLUMNS, "{line}");
        }
        let last: Vec<&str> = text.lines().rev().take(2).collect();
        assert!(last[1].contains(A) && last[0].contains("failed: No BAR0"), "{last:?}");
        let remark = text.lines().rev().nth(2).unwrap();
        assert!(remark.contains("Too late to stop"), "{remark}");
    }

    #[test]
    fn what_stopping_means_depends_on_the_resets() {
        let early = &events()[..4];
        for (events, number, words) in [
            (early, 1, "Stopping: knobs"),
            (&events()[..], 1, "Too late to stop"),
            (early, 2, "Resets under way are not interrupted"),
        ] {
            let (text, _) = show(false, events, &[number]);
            assert!(text.lines().last().unwrap().starts_with(words), "{text}");
        }
    }
}
