//! Recent load of functions: two samples a second, summed over all gateways. No I/O.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::decide::MonotonicMillis;
use gateway_proxy::functions::policy::scaling::Kind;

/// Load of a function in one sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadSample {
    /// Calls started per second.
    pub rps: f64,
    /// Mean number of calls in flight.
    pub in_flight: f64,
    /// Queued calls that are running or runnable.
    pub queued: u64,
}

/// Load history of all functions, by label.
#[derive(Debug)]
pub struct LoadHistory {
    window: MonotonicMillis,
    /// Start of the history.
    history_start: MonotonicMillis,
    functions: HashMap<Arc<str>, FunctionHistory>,
}

#[derive(Debug, Default)]
struct FunctionHistory {
    samples: VecDeque<TimedSample>,
    last_call: MonotonicMillis,
    busy: bool,
}

#[derive(Clone, Copy, Debug)]
struct TimedSample {
    at: MonotonicMillis,
    /// Duration of the sample.
    span: MonotonicMillis,
    load: LoadSample,
}

impl LoadSample {
    /// Returns the load measured by `kind`, or `None` if it is not sampled here.
    fn for_kind(&self, kind: Kind) -> Option<f64> {
        match kind {
            Kind::Rps => Some(self.rps),
            Kind::Capacity => Some(self.in_flight),
            Kind::Cpu => None,
        }
    }

    /// Returns whether there is any call.
    pub fn is_active(&self) -> bool {
        self.rps > 0.0 || self.in_flight > 0.0 || self.queued > 0
    }

    /// Returns whether all values are valid; they may come from another process.
    pub fn is_valid(&self) -> bool {
        [self.rps, self.in_flight].into_iter().all(|number| number.is_finite() && number >= 0.0)
    }

    /// Adds the load seen by another gateway. All gateways see the same queue, so its calls are not summed.
    pub fn add(&mut self, other: &Self) {
        self.rps += other.rps;
        self.in_flight += other.in_flight;
        self.queued = self.queued.max(other.queued);
    }
}

impl LoadHistory {
    /// Creates a history that starts at `now` and covers `window`.
    pub fn new(window: MonotonicMillis, now: MonotonicMillis) -> Self {
        Self { window, history_start: now, functions: HashMap::new() }
    }

    /// Restarts the history at `now`, after a gap.
    pub fn reset(&mut self, now: MonotonicMillis) {
        self.history_start = now;
        for history in self.functions.values_mut() {
            history.samples.clear();
        }
    }

    /// Records the loads during the `span` before `now`. Functions missing in `loads` had none.
    pub fn record(
        &mut self,
        now: MonotonicMillis,
        span: MonotonicMillis,
        loads: &HashMap<Arc<str>, LoadSample>,
    ) {
        for history in self.functions.values_mut() {
            history.busy = false;
        }
        for (label, load) in loads.iter().filter(|(_, load)| load.is_active()) {
            let history = self.functions.entry(Arc::clone(label)).or_default();
            history.samples.push_back(TimedSample { at: now, span, load: *load });
            history.last_call = now;
            history.busy = true;
        }
        let expired_at = now.saturating_sub(self.window);
        for history in self.functions.values_mut() {
            while history.samples.front().is_some_and(|sample| sample.at <= expired_at) {
                history.samples.pop_front();
            }
        }
    }

    /// Records that a function was called, even if no sample shows it.
    pub fn record_call(&mut self, label: &Arc<str>, now: MonotonicMillis) {
        self.functions.entry(Arc::clone(label)).or_default().last_call = now;
    }

    /// Removes functions for which `exists` is false.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.functions.retain(|label, _| exists(label));
    }

    /// Returns the mean load over the last `window`, or since the start of the history. `None` if the history is empty.
    pub fn mean(
        &self,
        label: &str,
        kind: Kind,
        window: MonotonicMillis,
        now: MonotonicMillis,
    ) -> Option<f64> {
        LoadSample::default().for_kind(kind)?;
        let watched = now.saturating_sub(self.history_start).min(window);
        if watched == 0 {
            return None;
        }
        let begin = now - watched;
        let samples = self.functions.get(label).map(|history| &history.samples);
        #[expect(clippy::cast_precision_loss, reason = "far from 2^53 milliseconds")]
        let sum: f64 = samples
            .into_iter()
            .flatten()
            .filter_map(|sample| {
                let inside = sample.at.saturating_sub(begin).min(sample.span);
                Some(sample.load.for_kind(kind)? * inside as f64)
            })
            .sum();
        #[expect(clippy::cast_precision_loss, reason = "far from 2^53 milliseconds")]
        let mean = sum / watched as f64;
        // An empty sum is -0.0; adding 0.0 makes it 0.0 for display.
        Some(mean + 0.0)
    }

    /// Returns the minimum load over the last `window`: load that was sustained.
    pub fn min_over(
        &self,
        label: &str,
        kind: Kind,
        window: MonotonicMillis,
        now: MonotonicMillis,
    ) -> f64 {
        let begin = now.saturating_sub(window);
        let Some(history) = self.functions.get(label) else { return 0.0 };
        let (mut min, mut covered) = (f64::INFINITY, 0);
        // From the newest sample backwards, only as far as needed.
        for sample in history.samples.iter().rev().take_while(|sample| sample.at > begin) {
            min = min.min(sample.load.for_kind(kind).unwrap_or_default());
            covered += sample.span;
        }
        // A missing sample means no load; the tolerance is for inexact timers.
        if covered * 10 >= window * 9 { min } else { 0.0 }
    }

    /// Returns whether calls were running or queued in the last sample.
    pub fn is_busy(&self, label: &str) -> bool {
        self.functions.get(label).is_some_and(|history| history.busy)
    }

    /// Returns the time without a call, at most since the start of the history.
    pub fn idle_for(&self, label: &str, now: MonotonicMillis) -> Duration {
        let last = self.functions.get(label).map_or(0, |history| history.last_call);
        Duration::from_millis(now.saturating_sub(last.max(self.history_start)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(rps: f64, in_flight: f64) -> HashMap<Arc<str>, LoadSample> {
        HashMap::from([("echo".into(), LoadSample { rps, in_flight, queued: 0 })])
    }

    #[track_caller]
    fn check(
        loads: &LoadHistory,
        kind: Kind,
        window: MonotonicMillis,
        now: MonotonicMillis,
        expect: f64,
    ) {
        let mean = loads.mean("echo", kind, window, now).unwrap();
        assert!((mean - expect).abs() < 1e-9, "{mean} is not {expect}");
    }

    #[test]
    fn a_mean_covers_the_history_including_idle_time() {
        let mut loads = LoadHistory::new(60_000, 0);
        assert_eq!(loads.mean("echo", Kind::Rps, 6000, 0), None);
        for second in 1..=4 {
            loads.record(second * 1000, 1000, &one(10.0, 2.0));
        }
        check(&loads, Kind::Rps, 6000, 4000, 10.0);
        check(&loads, Kind::Capacity, 6000, 4000, 2.0);
        for second in 5..=8 {
            loads.record(second * 1000, 1000, &HashMap::new());
        }
        check(&loads, Kind::Rps, 6000, 8000, 20.0 / 6.0);
        check(&loads, Kind::Rps, 60_000, 8000, 5.0);
        check(&loads, Kind::Rps, 6000, 60_000, 0.0);
        assert_eq!(loads.mean("echo", Kind::Cpu, 6000, 8000), None);
        let nothing = loads.mean("never", Kind::Rps, 6000, 8000).unwrap();
        assert_eq!(nothing.to_string(), "0");
    }

    #[test]
    fn a_sample_at_the_edge_of_the_window_counts_partially() {
        let mut loads = LoadHistory::new(60_000, 0);
        loads.record(2000, 2000, &one(10.0, 0.0));
        loads.record(4000, 2000, &HashMap::new());
        check(&loads, Kind::Rps, 3000, 4000, 10.0 / 3.0);
    }

    #[test]
    fn the_minimum_is_the_sustained_load() {
        let mut loads = LoadHistory::new(60_000, 0);
        let add = |loads: &mut LoadHistory, at, rps| loads.record(at, 500, &one(rps, 0.0));
        let min = |loads: &LoadHistory, now| loads.min_over("echo", Kind::Rps, 2000, now);
        for half in 1..=3 {
            add(&mut loads, half * 500, 9.0);
        }
        assert!(min(&loads, 1500).abs() < 1e-9, "not for long enough");
        add(&mut loads, 2000, 7.0);
        assert!((min(&loads, 2000) - 7.0).abs() < 1e-9);
        add(&mut loads, 2500, 0.0);
        for half in 6..=8 {
            add(&mut loads, half * 500, 9.0);
        }
        assert!(min(&loads, 4000).abs() < 1e-9, "it paused");
        add(&mut loads, 4500, 8.0);
        assert!((min(&loads, 4500) - 8.0).abs() < 1e-9);
        assert!(loads.min_over("other", Kind::Rps, 2000, 4500).abs() < 1e-9);
    }

    #[test]
    fn idle_time_starts_with_the_last_call_or_the_history() {
        let mut loads = LoadHistory::new(60_000, 5000);
        assert_eq!(loads.idle_for("echo", 7000), Duration::from_secs(2));
        loads.record(8000, 1000, &one(1.0, 0.0));
        assert!(loads.is_busy("echo") && !loads.is_busy("other"));
        loads.record(9000, 1000, &HashMap::new());
        assert!(!loads.is_busy("echo"));
        assert_eq!(loads.idle_for("echo", 9000), Duration::from_secs(1));
        loads.record_call(&"echo".into(), 9500);
        assert_eq!(loads.idle_for("echo", 10_000), Duration::from_millis(500));
        // The time before a gap does not count.
        loads.reset(20_000);
        assert_eq!(loads.idle_for("echo", 21_000), Duration::from_secs(1));
    }

    #[test]
    fn samples_outside_the_window_are_removed() {
        let mut loads = LoadHistory::new(3000, 0);
        for second in 1..=100 {
            loads.record(second * 1000, 1000, &one(1.0, 1.0));
        }
        assert_eq!(loads.functions["echo"].samples.len(), 3);
        loads.retain(|_| false);
        assert!(loads.functions.is_empty());
    }
}
