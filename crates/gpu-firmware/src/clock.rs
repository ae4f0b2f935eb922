//! Time as the crate sees it, so that tests of waits do not wait.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A monotonic clock that can also pass the time.
pub trait Clock: Send + Sync {
    /// Time since some fixed moment.
    fn now(&self) -> Duration;

    /// Returns when `duration` has passed.
    fn sleep(&self, duration: Duration);
}

/// The machine's monotonic clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// A wait for a condition: how long at most, and how long between two looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    /// No look begins later than this after the first.
    pub(crate) timeout: Duration,
    /// Longest pause between two looks. The first pauses are shorter, so that a quick answer is seen quickly.
    pub(crate) interval: Duration,
}

/// A first pause this many times shorter than the interval, doubling up to it.
const FIRST_PAUSE_DIVISOR: u32 = 64;

impl Wait {
    pub(crate) const fn new(timeout: Duration, interval: Duration) -> Self {
        Self { timeout, interval }
    }

    /// Looks until `look` finds something or fails. `Ok(None)` when time ran out; there is always at least one look,
    /// and the wait is overrun by one pause and one look at most.
    pub(crate) fn poll<T, E>(
        self,
        clock: &dyn Clock,
        mut look: impl FnMut() -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        let start = clock.now();
        let mut pause = self.interval / FIRST_PAUSE_DIVISOR;
        loop {
            let late = clock.now().saturating_sub(start) >= self.timeout;
            if let Some(found) = look()? {
                return Ok(Some(found));
            }
            if late {
                return Ok(None);
            }
            clock.sleep(pause);
            pause = (pause * 2).min(self.interval);
        }
    }
}

/// Whole milliseconds, for messages.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeClock;

    #[test]
    fn a_wait_looks_at_least_once_and_never_pauses_longer_than_its_interval() {
        let clock = FakeClock::default();
        let wait = Wait::new(Duration::from_millis(100), Duration::from_millis(10));
        let mut looks = Vec::new();
        let found: Result<Option<()>, ()> = wait.poll(&clock, || {
            looks.push(clock.now());
            Ok(None)
        });
        assert_eq!(found, Ok(None));
        assert!(looks.windows(2).all(|pair| pair[1] <= pair[0] + wait.interval), "{looks:?}");
        let last = *looks.last().unwrap();
        assert!(last >= wait.timeout && last < wait.timeout + wait.interval, "{last:?}");

        let none = Wait::new(Duration::ZERO, Duration::from_millis(10));
        assert_eq!(none.poll(&clock, || Ok::<_, ()>(Some(7))), Ok(Some(7)));
        assert_eq!(none.poll(&clock, || Err::<Option<()>, _>("broken")), Err("broken"));
    }
}
