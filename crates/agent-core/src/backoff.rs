//! Waiting longer after every failure, and never in step with other nodes.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

/// Delays that double from a first to a last, each spread over its upper half at random.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    last: Duration,
    next: Duration,
}

impl Backoff {
    /// Delays from about `first` to about `last`.
    pub fn new(first: Duration, last: Duration) -> Self {
        Self { first, last: last.max(first), next: first }
    }

    /// The next delay: between half of it and all of it.
    pub fn next_delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = delay.saturating_mul(2).min(self.last);
        delay / 2 + jitter(delay / 2)
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A random part of `most`, so that a thousand nodes that saw the same event do not act in the same moment.
pub fn jitter(most: Duration) -> Duration {
    // Each RandomState has its own random keys; nothing here needs better randomness than that.
    let random = RandomState::new().build_hasher().finish();
    let fraction = f64::from(u32::try_from(random >> 32).unwrap_or(0)) / f64::from(u32::MAX);
    most.mul_f64(fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_within_their_bounds() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        for most in [1, 2, 4, 5, 5] {
            let delay = backoff.next_delay();
            let most = Duration::from_secs(most);
            assert!(delay >= most / 2 && delay <= most, "{delay:?} for {most:?}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= Duration::from_secs(1));
        assert_eq!(jitter(Duration::ZERO), Duration::ZERO);
        let spread: std::collections::HashSet<_> = (0..8).map(|_| jitter(Duration::from_secs(1))).collect();
        assert!(spread.len() > 1);
    }
}
