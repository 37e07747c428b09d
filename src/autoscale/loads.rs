//! What functions were doing of late: two samples a second, over all gateways. No I/O.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::autoscale::decide::Millis;
use crate::autoscale::policy::Kind;

/// What a function was doing for a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Load {
    /// Calls that began, in a second.
    pub rps: f64,
    /// Calls in flight, on average.
    pub in_flight: f64,
    /// Queued calls that are made, or could be.
    pub queued: u64,
}

/// Everything that is remembered, by label.
#[derive(Debug)]
pub struct Loads {
    window: Millis,
    /// When the watch began.
    since: Millis,
    tracks: HashMap<Arc<str>, Track>,
}

#[derive(Debug, Default)]
struct Track {
    samples: VecDeque<Sample>,
    last_call: Millis,
    busy: bool,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Millis,
    /// For how long it was so.
    span: Millis,
    load: Load,
}

impl Load {
    /// What counts for `kind`; `None` if it is not seen from here.
    fn of(&self, kind: Kind) -> Option<f64> {
        match kind {
            Kind::Rps => Some(self.rps),
            Kind::Capacity => Some(self.in_flight),
            Kind::Cpu => None,
        }
    }

    /// Whether there is a call of any kind.
    pub fn is_some(&self) -> bool {
        self.rps > 0.0 || self.in_flight > 0.0 || self.queued > 0
    }

    /// Whether the numbers are numbers. They may come from outside.
    pub fn is_sound(&self) -> bool {
        [self.rps, self.in_flight].into_iter().all(|number| number.is_finite() && number >= 0.0)
    }

    /// Adds what another gateway sees. A queue that is shared is seen by all.
    pub fn add(&mut self, other: &Self) {
        self.rps += other.rps;
        self.in_flight += other.in_flight;
        self.queued = self.queued.max(other.queued);
    }
}

impl Loads {
    /// Watches from `now` on, and remembers for `window`.
    pub fn new(window: Millis, now: Millis) -> Self {
        Self { window, since: now, tracks: HashMap::new() }
    }

    /// Forgets what was: it does not lead up to `now`.
    pub fn begin_anew(&mut self, now: Millis) {
        self.since = now;
        for track in self.tracks.values_mut() {
            track.samples.clear();
        }
    }

    /// Notes what was during the `span` before `now`. A function that is not among `loads` did nothing.
    pub fn add(&mut self, now: Millis, span: Millis, loads: &HashMap<Arc<str>, Load>) {
        for track in self.tracks.values_mut() {
            track.busy = false;
        }
        for (label, load) in loads.iter().filter(|(_, load)| load.is_some()) {
            let track = self.tracks.entry(Arc::clone(label)).or_default();
            track.samples.push_back(Sample { at: now, span, load: *load });
            track.last_call = now;
            track.busy = true;
        }
        let forgotten = now.saturating_sub(self.window);
        for track in self.tracks.values_mut() {
            while track.samples.front().is_some_and(|sample| sample.at <= forgotten) {
                track.samples.pop_front();
            }
        }
    }

    /// There was a call of this function, whatever the samples say.
    pub fn called(&mut self, label: &Arc<str>, now: Millis) {
        self.tracks.entry(Arc::clone(label)).or_default().last_call = now;
    }

    /// Keeps only the functions that `exists` knows.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.tracks.retain(|label, _| exists(label));
    }

    /// The mean load over the last `window`, or since the watch began; `None` before there was anything to see.
    pub fn mean(&self, label: &str, kind: Kind, window: Millis, now: Millis) -> Option<f64> {
        Load::default().of(kind)?;
        let watched = now.saturating_sub(self.since).min(window);
        if watched == 0 {
            return None;
        }
        let begin = now - watched;
        let samples = self.tracks.get(label).map(|track| &track.samples);
        #[expect(clippy::cast_precision_loss, reason = "far from 2^53 milliseconds")]
        let sum: f64 = samples
            .into_iter()
            .flatten()
            .filter_map(|sample| {
                let inside = sample.at.saturating_sub(begin).min(sample.span);
                Some(sample.load.of(kind)? * inside as f64)
            })
            .sum();
        #[expect(clippy::cast_precision_loss, reason = "far from 2^53 milliseconds")]
        let mean = sum / watched as f64;
        // The sum of nothing is -0.0, which nobody wants to read.
        Some(mean + 0.0)
    }

    /// The least load over the last `window`: what has held for so long, and was not but a moment's.
    pub fn least(&self, label: &str, kind: Kind, window: Millis, now: Millis) -> f64 {
        let begin = now.saturating_sub(window);
        let Some(track) = self.tracks.get(label) else { return 0.0 };
        let (mut least, mut covered) = (f64::INFINITY, 0);
        // The newest first: older ones than it takes are not looked at.
        for sample in track.samples.iter().rev().take_while(|sample| sample.at > begin) {
            least = least.min(sample.load.of(kind).unwrap_or_default());
            covered += sample.span;
        }
        // A sample that is not there was one of nothing. Timers are not exact.
        if covered * 10 >= window * 9 { least } else { 0.0 }
    }

    /// Whether calls ran or waited at the last sample.
    pub fn is_busy(&self, label: &str) -> bool {
        self.tracks.get(label).is_some_and(|track| track.busy)
    }

    /// For how long there has been no call, as far as was watched.
    pub fn quiet(&self, label: &str, now: Millis) -> Duration {
        let last = self.tracks.get(label).map_or(0, |track| track.last_call);
        Duration::from_millis(now.saturating_sub(last.max(self.since)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(rps: f64, in_flight: f64) -> HashMap<Arc<str>, Load> {
        HashMap::from([("echo".into(), Load { rps, in_flight, queued: 0 })])
    }

    #[track_caller]
    fn check(loads: &Loads, kind: Kind, window: Millis, now: Millis, expect: f64) {
        let mean = loads.mean("echo", kind, window, now).unwrap();
        assert!((mean - expect).abs() < 1e-9, "{mean} is not {expect}");
    }

    #[test]
    fn a_mean_counts_what_was_watched_and_the_silence_in_it() {
        let mut loads = Loads::new(60_000, 0);
        assert_eq!(loads.mean("echo", Kind::Rps, 6000, 0), None);
        for second in 1..=4 {
            loads.add(second * 1000, 1000, &one(10.0, 2.0));
        }
        check(&loads, Kind::Rps, 6000, 4000, 10.0);
        check(&loads, Kind::Capacity, 6000, 4000, 2.0);
        for second in 5..=8 {
            loads.add(second * 1000, 1000, &HashMap::new());
        }
        check(&loads, Kind::Rps, 6000, 8000, 20.0 / 6.0);
        check(&loads, Kind::Rps, 60_000, 8000, 5.0);
        check(&loads, Kind::Rps, 6000, 60_000, 0.0);
        assert_eq!(loads.mean("echo", Kind::Cpu, 6000, 8000), None);
        let nothing = loads.mean("never", Kind::Rps, 6000, 8000).unwrap();
        assert_eq!(nothing.to_string(), "0");
    }

    #[test]
    fn a_sample_at_the_windows_edge_counts_in_part() {
        let mut loads = Loads::new(60_000, 0);
        loads.add(2000, 2000, &one(10.0, 0.0));
        loads.add(4000, 2000, &HashMap::new());
        check(&loads, Kind::Rps, 3000, 4000, 10.0 / 3.0);
    }

    #[test]
    fn only_what_has_held_counts_as_the_least() {
        let mut loads = Loads::new(60_000, 0);
        let add = |loads: &mut Loads, at, rps| loads.add(at, 500, &one(rps, 0.0));
        let least = |loads: &Loads, now| loads.least("echo", Kind::Rps, 2000, now);
        for half in 1..=3 {
            add(&mut loads, half * 500, 9.0);
        }
        assert!(least(&loads, 1500).abs() < 1e-9, "not for long enough");
        add(&mut loads, 2000, 7.0);
        assert!((least(&loads, 2000) - 7.0).abs() < 1e-9);
        add(&mut loads, 2500, 0.0);
        for half in 6..=8 {
            add(&mut loads, half * 500, 9.0);
        }
        assert!(least(&loads, 4000).abs() < 1e-9, "it paused");
        add(&mut loads, 4500, 8.0);
        assert!((least(&loads, 4500) - 8.0).abs() < 1e-9);
        assert!(loads.least("other", Kind::Rps, 2000, 4500).abs() < 1e-9);
    }

    #[test]
    fn silence_begins_with_the_last_call_or_with_the_watch() {
        let mut loads = Loads::new(60_000, 5000);
        assert_eq!(loads.quiet("echo", 7000), Duration::from_secs(2));
        loads.add(8000, 1000, &one(1.0, 0.0));
        assert!(loads.is_busy("echo") && !loads.is_busy("other"));
        loads.add(9000, 1000, &HashMap::new());
        assert!(!loads.is_busy("echo"));
        assert_eq!(loads.quiet("echo", 9000), Duration::from_secs(1));
        loads.called(&"echo".into(), 9500);
        assert_eq!(loads.quiet("echo", 10_000), Duration::from_millis(500));
        // What was before a gap says nothing about the gap.
        loads.begin_anew(20_000);
        assert_eq!(loads.quiet("echo", 21_000), Duration::from_secs(1));
    }

    #[test]
    fn what_left_the_window_is_forgotten() {
        let mut loads = Loads::new(3000, 0);
        for second in 1..=100 {
            loads.add(second * 1000, 1000, &one(1.0, 1.0));
        }
        assert_eq!(loads.tracks["echo"].samples.len(), 3);
        loads.retain(|_| false);
        assert!(loads.tracks.is_empty());
    }
}
