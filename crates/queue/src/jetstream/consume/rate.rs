//! Estimates the arrival rate of calls of a function, and from it the number of calls to prefetch. No I/O.
use std::time::{Duration, Instant};

/// Measuring interval.
const WINDOW: Duration = Duration::from_millis(100);
/// Calls that arrive within this time are prefetched.
const PREFETCH_HORIZON: Duration = Duration::from_millis(30);
/// Maximum number of prefetched calls.
const MAX_PREFETCH: usize = 64;

/// Arrival rate of one function.
#[derive(Debug, Default)]
pub(in crate::jetstream) struct ArrivalRate {
    /// Start of the current window, and the number of calls in it.
    window_start: Option<Instant>,
    count: u32,
    last_arrival: Option<Instant>,
    /// Calls per second in the previous window.
    per_second: f64,
}

impl ArrivalRate {
    /// Records the arrival of a call.
    pub(in crate::jetstream) fn record(&mut self, now: Instant) {
        let since = *self.window_start.get_or_insert(now);
        self.count += 1;
        self.last_arrival = Some(now);
        let elapsed = now.saturating_duration_since(since);
        if elapsed >= WINDOW {
            self.per_second = f64::from(self.count) / elapsed.as_secs_f64();
            (self.window_start, self.count) = (Some(now), 0);
        }
    }

    /// Returns whether a call arrived recently.
    pub(in crate::jetstream) fn is_active(&self, now: Instant) -> bool {
        self.last_arrival.is_some_and(|last| now.saturating_duration_since(last) < 3 * WINDOW)
    }

    /// Returns the number of calls to prefetch beyond the free slots.
    pub(in crate::jetstream) fn prefetch(&self, now: Instant) -> usize {
        if !self.is_active(now) {
            return 0;
        }
        // Rounded down: calls of a slow function are not prefetched.
        ((self.per_second * PREFETCH_HORIZON.as_secs_f64()) as usize).min(MAX_PREFETCH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_calls_of_a_fast_function_are_prefetched() {
        let start = Instant::now();
        for (every, ahead) in [(100, MAX_PREFETCH), (1_000, 30), (10_000, 3), (50_000, 0)] {
            let (mut pace, every) = (ArrivalRate::default(), Duration::from_micros(every));
            assert!(!pace.is_active(start));
            let mut now = start;
            while now < start + WINDOW * 5 {
                pace.record(now);
                now += every;
            }
            assert!(pace.is_active(now));
            assert!(pace.prefetch(now).abs_diff(ahead) <= 1, "{every:?}: {}", pace.prefetch(now));
            assert_eq!(
                (pace.is_active(now + WINDOW * 3), pace.prefetch(now + WINDOW * 3)),
                (false, 0)
            );
        }
    }
}
