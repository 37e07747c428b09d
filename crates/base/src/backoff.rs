//! Delays between attempts that double up to a maximum. No I/O.

use std::time::Duration;

/// Bounds of the delay before the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The delay after the first failed attempt.
    pub min: Duration,
    /// The longest delay.
    pub max: Duration,
}

impl Backoff {
    pub const fn new(min: Duration, max: Duration) -> Self {
        Self { min, max }
    }

    /// The delay after `failures` failed attempts in a row: `min`, doubled with each further failure, at most `max`.
    pub fn after(self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.min.saturating_mul(1 << doublings).min(self.max)
    }

    /// The delay that follows `delay`: twice as long, at least `min` and at most `max`.
    pub fn next(self, delay: Duration) -> Duration {
        // Not `clamp`, which panics if a setting makes `max` less than `min`.
        delay.saturating_mul(2).max(self.min).min(self.max)
    }

    /// The delay after `failures` failed attempts with full jitter: the part `random` (0 to 1) of [`Self::after`], so
    /// that clients that failed together do not retry together. At least a tenth of `min`.
    pub fn jittered(self, failures: u32, random: f64) -> Duration {
        let ceiling = self.after(failures);
        let drawn = Duration::try_from_secs_f64(ceiling.as_secs_f64() * random).unwrap_or(ceiling);
        drawn.min(ceiling).max(self.min / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const BACKOFF: Backoff = Backoff::new(Duration::from_secs(10), Duration::from_secs(120));

    #[test]
    fn delays_double_up_to_the_maximum() {
        for (failures, seconds) in
            [(0, 10), (1, 10), (2, 20), (3, 40), (4, 80), (5, 120), (60, 120), (u32::MAX, 120)]
        {
            assert_eq!(BACKOFF.after(failures), seconds * SECOND, "{failures}");
        }
        for (delay, next) in [(0, 10), (10, 20), (40, 80), (80, 120), (120, 120)] {
            assert_eq!(BACKOFF.next(delay * SECOND), next * SECOND, "{delay}");
        }
        assert_eq!(BACKOFF.next(Duration::MAX), BACKOFF.max);
        let reversed = Backoff::new(BACKOFF.max, BACKOFF.min);
        assert_eq!((reversed.after(3), reversed.next(SECOND)), (BACKOFF.min, BACKOFF.min));
    }

    #[test]
    fn jitter_shortens_a_delay_to_no_less_than_a_tenth_of_the_minimum() {
        for (random, expect) in [
            (0.0, SECOND),
            (0.01, SECOND),
            (0.25, 5 * SECOND),
            (0.5, 10 * SECOND),
            (1.0, 20 * SECOND),
            // Not a part, but no reason to panic.
            (f64::NAN, 20 * SECOND),
            (-1.0, 20 * SECOND),
            (7.0, 20 * SECOND),
        ] {
            assert_eq!(BACKOFF.jittered(2, random), expect, "{random}");
        }
    }
}
