//! What this gateway knows at a moment: what functions were doing, who else is there, and how far that can be relied
//! on. No I/O.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::autoscale::decide::{Millis, Seen};
use crate::autoscale::loads::{Load, Loads};
use crate::autoscale::peers::{GONE, Peers};
use crate::autoscale::policy::{Kind, Policy};

/// The shortest panic window; otherwise it is a tenth of the stable one.
const SHORTEST_PANIC: Millis = 2000;

/// Load that has held for so long counts in full, whatever was before: a mean alone would be slow to see it.
const HELD: Millis = 2000;

/// Calls of a gateway that has fallen silent may go unseen for so many windows. One more is then to be seen whole.
const PATIENCE: Millis = 4;

/// What is known. Others are heard between samples.
pub struct View {
    window: Millis,
    loads: Loads,
    /// The other gateways, where there is a way to hear of them.
    pub peers: Option<Peers>,
    connected: bool,
    /// It is known what the queue holds.
    knows_queue: bool,
    acts: bool,
    /// Since when every call was seen by a gateway that was heard.
    seen_since: Millis,
    /// Since when this gateway acts.
    acts_since: Millis,
}

/// What one sample brings.
pub struct Sampled {
    pub now: Millis,
    /// How long it is for.
    pub span: Millis,
    pub own: HashMap<Arc<str>, Load>,
    /// The others can be heard.
    pub connected: bool,
    pub knows_queue: bool,
}

/// A function, as far as others than this view know it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub label: &'a str,
    pub policy: &'a Policy,
    /// Replicas that the provider was told to have.
    pub wanted: u64,
    /// Its means of CPU over the windows.
    pub cpu: (Option<f64>, Option<f64>),
    /// Since when it is known here, and nobody else has changed its replicas.
    pub since: Millis,
}

/// Whether this gateway acts, of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub acts: bool,
    pub gateways: usize,
}

impl View {
    /// `peers`: the others, if they can be heard at all.
    pub fn new(window: Millis, peers: Option<Peers>, now: Millis) -> Self {
        Self {
            window,
            loads: Loads::new(window, now),
            peers,
            connected: false,
            knows_queue: false,
            acts: false,
            seen_since: now,
            acts_since: now,
        }
    }

    /// Takes a sample in, with what the others have said last of functions that exist.
    pub fn sampled(&mut self, sampled: Sampled, exists: impl Fn(&str) -> bool) {
        let Sampled { now, span, own: mut sum, connected, knows_queue } = sampled;
        self.knows_queue = knows_queue;
        if let Some(peers) = &mut self.peers {
            peers.expire(now, self.window.saturating_mul(PATIENCE));
            if peers.misses_any() {
                self.seen_since = now;
            }
            if connected != self.connected || span >= GONE {
                peers.begin_anew(now);
                (self.connected, self.seen_since) = (connected, now);
            }
            for (label, load) in peers.loads(now).filter(|(label, _)| exists(label)) {
                sum.entry(label.into()).or_default().add(load);
            }
            for label in peers.take_called().into_iter().filter(|label| exists(label)) {
                self.loads.called(&label.into(), now);
            }
        }
        if span >= GONE {
            // This process stood still. What it would have seen is not known.
            self.loads.begin_anew(now);
            self.seen_since = now;
            return;
        }
        self.loads.add(now, span, &sum);
    }

    /// Lets go of functions that are no more.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.loads.retain(exists);
    }

    /// Whether this gateway is the one that acts. One that cannot hear the others does, as far as `whole` lets it.
    pub fn stand(&mut self, now: Millis) -> Standing {
        let (acts, gateways) = match &self.peers {
            Some(peers) if self.connected => (peers.acts(now), peers.count()),
            Some(_) | None => (true, 1),
        };
        if acts && !self.acts {
            // Whoever did so before remembers what is not remembered here.
            self.acts_since = now;
        }
        self.acts = acts;
        Standing { acts, gateways }
    }

    /// What is seen of a function.
    pub fn seen(&self, subject: Subject<'_>, now: Millis) -> Seen {
        let Subject { label, policy, wanted, cpu, since } = subject;
        let sees_all = self.knows_queue && (self.peers.is_none() || self.connected);
        let seen_since = self.seen_since.max(since).min(now);
        // What is remembered reaches back as far as what was recommended is to be heeded.
        let down_window = Millis::try_from(policy.down_window.as_millis()).unwrap_or(Millis::MAX);
        let needed = self.window.max(down_window);
        let mean = |window| self.loads.mean(label, policy.kind, window, now);
        let (stable, sudden) = match policy.kind {
            Kind::Cpu => cpu,
            Kind::Rps | Kind::Capacity => {
                let held = self.loads.least(label, policy.kind, HELD, now);
                let sudden = mean(panic_window(self.window)).map(|mean| mean.max(held));
                (mean(self.window), sudden)
            }
        };
        Seen {
            now,
            wanted,
            stable,
            sudden,
            busy: self.loads.is_busy(label),
            quiet: sees_all
                .then(|| self.loads.quiet(label, now).min(Duration::from_millis(now - seen_since))),
            whole: sees_all && now.saturating_sub(seen_since.max(self.acts_since)) >= needed,
        }
    }
}

/// The window over which load that doubles is noticed.
pub fn panic_window(window: Millis) -> Millis {
    (window / 10).max(SHORTEST_PANIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autoscale::peers::Message;

    const WINDOW: Millis = 10_000;

    /// A gateway, and its clock.
    struct Gateway {
        view: View,
        now: Millis,
    }

    impl Gateway {
        fn new(peers: bool) -> Self {
            let peers = peers.then(|| Peers::new("b".to_owned(), 0));
            Self { view: View::new(WINDOW, peers, 0), now: 0 }
        }

        /// A second passes.
        fn second(&mut self, rps: f64, connected: bool) {
            self.pass(1000, rps, connected);
        }

        fn pass(&mut self, span: Millis, rps: f64, connected: bool) {
            self.now += span;
            let own = HashMap::from([("echo".into(), Load { rps, ..Load::default() })]);
            let (now, knows_queue) = (self.now, true);
            self.view.sampled(Sampled { now, span, own, connected, knows_queue }, |l| l == "echo");
            self.view.stand(now);
        }

        fn hear(&mut self, id: &str, rps: f64) {
            let load = Load { rps, ..Load::default() };
            let loads = ["echo", "stranger"].map(|label| (label.to_owned(), load)).into();
            let message = Message { id: id.to_owned(), loads, ..Message::default() };
            self.view.peers.as_mut().unwrap().hear(message, self.now);
        }

        fn seen(&self) -> Seen {
            self.seen_with(&Policy::default(), 0)
        }

        fn seen_with(&self, policy: &Policy, since: Millis) -> Seen {
            self.view.seen(Subject { policy, since, ..subject("echo", policy) }, self.now)
        }
    }

    fn subject<'a>(label: &'a str, policy: &'a Policy) -> Subject<'a> {
        Subject { label, policy, wanted: 1, cpu: (None, None), since: 0 }
    }

    #[test]
    fn one_gateway_alone_acts_at_once_and_takes_away_after_a_window() {
        let mut alone = Gateway::new(false);
        alone.second(5.0, false);
        assert!(alone.view.acts);
        assert_eq!(alone.seen().stable, Some(5.0));
        assert!(!alone.seen().whole);
        (0..10).for_each(|_| alone.second(5.0, false));
        assert!(alone.seen().whole);
    }

    #[test]
    fn what_the_others_see_is_added_unless_the_function_is_unknown() {
        let mut gateway = Gateway::new(true);
        gateway.second(0.0, true);
        gateway.hear("c", 7.0);
        gateway.pass(500, 3.0, true);
        // Ten in the last half second of one and a half.
        let sudden = gateway.seen().sudden.unwrap();
        assert!((sudden - 10.0 / 3.0).abs() < 1e-9, "{sudden}");
        let strange = gateway.view.seen(subject("stranger", &Policy::default()), 1500);
        assert_eq!((strange.sudden, strange.busy), (Some(0.0), false));
    }

    #[test]
    fn who_takes_over_takes_nothing_away_for_a_window() {
        let mut gateway = Gateway::new(true);
        for _ in 0..20 {
            gateway.hear("a", 1.0);
            gateway.second(1.0, true);
            assert!(!gateway.view.acts);
        }
        let leaving = Message { id: "a".to_owned(), leaving: true, ..Message::default() };
        gateway.view.peers.as_mut().unwrap().hear(leaving, gateway.now);
        gateway.second(1.0, true);
        assert!(gateway.view.acts);
        (0..9).for_each(|_| gateway.second(1.0, true));
        assert!(!gateway.seen().whole);
        gateway.second(1.0, true);
        assert!(gateway.seen().whole);
    }

    #[test]
    fn who_takes_over_from_one_that_is_missing_takes_nothing_away_for_longer() {
        let mut gateway = Gateway::new(true);
        for _ in 0..20 {
            gateway.hear("a", 1.0);
            gateway.second(1.0, true);
        }
        let mut silent = 0;
        while !gateway.view.acts {
            silent += 1;
            gateway.second(1.0, true);
        }
        assert!((2..=4).contains(&silent), "{silent}");
        for _ in 0..49 {
            assert!(!gateway.seen().whole);
            gateway.second(1.0, true);
        }
        gateway.second(1.0, true);
        assert!(gateway.seen().whole);
    }

    #[test]
    fn a_function_that_is_new_or_was_changed_is_neither_quiet_nor_seen_whole() {
        let mut gateway = Gateway::new(false);
        (0..30).for_each(|_| gateway.second(0.0, false));
        let standard = Policy::default();
        let seen = |since| gateway.seen_with(&standard, since);
        assert!(seen(20_000).whole && !seen(20_001).whole);
        assert_eq!(seen(25_000).quiet, Some(Duration::from_secs(5)));
        assert_eq!(seen(30_000).quiet, Some(Duration::ZERO));
        assert_eq!(seen(99_000).quiet, Some(Duration::ZERO));
    }

    #[test]
    fn a_longer_down_window_is_to_be_seen_whole() {
        let mut gateway = Gateway::new(false);
        let slow = Policy { down_window: Duration::from_secs(15), ..Policy::default() };
        (0..14).for_each(|_| gateway.second(1.0, false));
        assert!(gateway.seen().whole && !gateway.seen_with(&slow, 0).whole);
        (0..2).for_each(|_| gateway.second(1.0, false));
        assert!(gateway.seen_with(&slow, 0).whole && !gateway.seen_with(&slow, 2000).whole);
    }

    #[test]
    fn who_cannot_hear_the_others_acts_but_takes_nothing_away() {
        let mut gateway = Gateway::new(true);
        gateway.hear("a", 1.0);
        for _ in 0..30 {
            gateway.second(1.0, false);
            assert!(gateway.view.acts && !gateway.seen().whole);
            assert_eq!(gateway.seen().quiet, None);
        }
        // They can be heard again: it listens first.
        gateway.second(1.0, true);
        assert!(!gateway.view.acts);
        (0..3).for_each(|_| gateway.second(1.0, true));
        assert!(gateway.view.acts);
    }

    #[test]
    fn load_that_has_held_for_two_seconds_counts_in_full() {
        let mut gateway = Gateway::new(false);
        gateway.view = View::new(60_000, None, 0);
        (0..10).for_each(|_| gateway.second(1.0, false));
        (0..3).for_each(|_| gateway.pass(500, 9.0, false));
        assert!(gateway.seen().sudden.unwrap() < 9.0);
        gateway.pass(500, 9.0, false);
        assert_eq!(gateway.seen().sudden, Some(9.0));
    }

    #[test]
    fn silence_counts_since_all_are_heard() {
        let mut gateway = Gateway::new(true);
        gateway.second(0.0, true);
        for _ in 0..20 {
            gateway.hear("c", 0.0);
            gateway.second(0.0, true);
        }
        assert_eq!(gateway.seen().quiet, Some(Duration::from_secs(20)));
        // The other one falls silent: nobody knows what it does.
        (0..2).for_each(|_| gateway.second(0.0, true));
        assert_eq!(gateway.seen().quiet, Some(Duration::ZERO));
    }

    #[test]
    fn a_process_that_stood_still_begins_anew() {
        let mut gateway = Gateway::new(true);
        (0..20).for_each(|_| gateway.second(1.0, true));
        assert!(gateway.view.acts && gateway.seen().whole);
        gateway.pass(5000, 1.0, true);
        assert!(!gateway.view.acts && !gateway.seen().whole);
        assert_eq!(gateway.seen().stable, None);
    }
}
