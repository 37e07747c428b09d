//! How fast calls of a function come, and so how many are worth having ahead. No I/O.

use std::time::{Duration, Instant};

/// It is measured over so long.
const WINDOW: Duration = Duration::from_millis(100);
/// What comes within this time is asked for ahead.
const AHEAD: Duration = Duration::from_millis(30);
/// At most so many.
const MOST: usize = 64;

/// The pace of one function.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// The beginning of the window, and how many have come in it.
    since: Option<Instant>,
    count: u32,
    last: Option<Instant>,
    /// Calls a second, in the window before.
    rate: f64,
}

impl Pace {
    /// One more has come.
    pub(super) fn came(&mut self, now: Instant) {
        let since = *self.since.get_or_insert(now);
        self.count += 1;
        self.last = Some(now);
        let took = now.saturating_duration_since(since);
        if took >= WINDOW {
            self.rate = f64::from(self.count) / took.as_secs_f64();
            (self.since, self.count) = (Some(now), 0);
        }
    }

    /// Whether any have come lately.
    pub(super) fn flows(&self, now: Instant) -> bool {
        self.last.is_some_and(|last| now.saturating_duration_since(last) < 3 * WINDOW)
    }

    /// How many are worth having that cannot be made yet.
    pub(super) fn ahead(&self, now: Instant) -> usize {
        if !self.flows(now) {
            return 0;
        }
        // Rounded down: a slow function has none ahead.
        ((self.rate * AHEAD.as_secs_f64()) as usize).min(MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quick_function_has_calls_ahead_and_a_slow_one_none() {
        let start = Instant::now();
        for (every, ahead) in [(100, MOST), (1_000, 30), (10_000, 3), (50_000, 0)] {
            let (mut pace, every) = (Pace::default(), Duration::from_micros(every));
            assert!(!pace.flows(start));
            let mut now = start;
            while now < start + WINDOW * 5 {
                pace.came(now);
                now += every;
            }
            assert!(pace.flows(now));
            assert!(pace.ahead(now).abs_diff(ahead) <= 1, "{every:?}: {}", pace.ahead(now));
            assert_eq!((pace.flows(now + WINDOW * 3), pace.ahead(now + WINDOW * 3)), (false, 0));
        }
    }
}
