//! What this gateway knows of the load in the cluster, of the other gateways, and of how complete that is. No I/O.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::decide::{MonotonicMillis, Observation};
use crate::loads::{LoadHistory, LoadSample};
use crate::peers::{PEER_TIMEOUT, Peers};
use gateway_proxy::functions::policy::scaling::{Kind, ScalingPolicy};

/// Minimum panic window; the default is a tenth of the stable window.
const MIN_PANIC_WINDOW: MonotonicMillis = 2000;

/// Load that was sustained for this time counts in full: the mean alone would react slowly.
const SUSTAINED_LOAD_WINDOW: MonotonicMillis = 2000;

/// Number of stable windows for which a gateway without reports counts as missing: its calls are unknown meanwhile.
const MISSING_PEER_WINDOWS: MonotonicMillis = 4;

/// Load and membership of the cluster.
pub struct ClusterView {
    window: MonotonicMillis,
    history: LoadHistory,
    /// The other gateways, if they can be received.
    pub peers: Option<Peers>,
    connected: bool,
    /// The number of queued calls is known.
    queue_depth_known: bool,
    is_leader: bool,
    /// Time since when the calls of all gateways are known.
    complete_since: MonotonicMillis,
    /// Time since when this gateway is the leader.
    leader_since: MonotonicMillis,
}

/// One sample of this process.
pub struct Sample {
    pub now: MonotonicMillis,
    /// Duration of the sample.
    pub span: MonotonicMillis,
    pub own: HashMap<Arc<str>, LoadSample>,
    /// The connection to the other gateways is up.
    pub connected: bool,
    pub queue_depth_known: bool,
}

/// What the reconciler knows of a function.
#[derive(Clone, Copy, Debug)]
pub struct FunctionInput<'a> {
    pub label: &'a str,
    pub policy: &'a ScalingPolicy,
    /// Replicas that the provider was asked to have.
    pub wanted: u64,
    /// Mean CPU of all replicas in millicores, over the stable and the panic window.
    pub cpu: (Option<f64>, Option<f64>),
    /// Time since when the function is known, and its replicas were changed only by this gateway.
    pub since: MonotonicMillis,
}

/// Leadership of this gateway, and the size of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leadership {
    pub is_leader: bool,
    pub members: usize,
}

impl ClusterView {
    /// `peers` is `None` if other gateways cannot be received.
    pub fn new(window: MonotonicMillis, peers: Option<Peers>, now: MonotonicMillis) -> Self {
        Self {
            window,
            history: LoadHistory::new(window, now),
            peers,
            connected: false,
            queue_depth_known: false,
            is_leader: false,
            complete_since: now,
            leader_since: now,
        }
    }

    /// Adds a sample of this process, and the last reports of the other gateways for functions that exist.
    pub fn add_sample(&mut self, sample: Sample, exists: impl Fn(&str) -> bool) {
        let Sample { now, span, own: mut sum, connected, queue_depth_known } = sample;
        self.queue_depth_known = queue_depth_known;
        if let Some(peers) = &mut self.peers {
            peers.expire(now, self.window.saturating_mul(MISSING_PEER_WINDOWS));
            if peers.has_missing() {
                self.complete_since = now;
            }
            if connected != self.connected || span >= PEER_TIMEOUT {
                peers.reset(now);
                (self.connected, self.complete_since) = (connected, now);
            }
            for (label, load) in peers.loads(now).filter(|(label, _)| exists(label)) {
                sum.entry(label.into()).or_default().add(load);
            }
            for label in peers.take_called().into_iter().filter(|label| exists(label)) {
                self.history.record_call(&label.into(), now);
            }
        }
        if span >= PEER_TIMEOUT {
            // The process was suspended, and the load of that time is unknown.
            self.history.reset(now);
            self.complete_since = now;
            return;
        }
        self.history.record(now, span, &sum);
    }

    /// Removes functions that no longer exist.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.history.retain(exists);
    }

    /// Returns whether this gateway is the leader. Without a connection it is; `complete` then limits what it may do.
    pub fn update_leadership(&mut self, now: MonotonicMillis) -> Leadership {
        let (is_leader, members) = match &self.peers {
            Some(peers) if self.connected => (peers.is_leader(now), peers.member_count()),
            Some(_) | None => (true, 1),
        };
        if is_leader && !self.is_leader {
            // The state of the previous leader is unknown here.
            self.leader_since = now;
        }
        self.is_leader = is_leader;
        Leadership { is_leader, members }
    }

    /// Returns the observation of a function.
    pub fn observe(&self, input: FunctionInput<'_>, now: MonotonicMillis) -> Observation {
        let FunctionInput { label, policy, wanted, cpu, since } = input;
        let sees_all = self.queue_depth_known && (self.peers.is_none() || self.connected);
        let complete_since = self.complete_since.max(since).min(now);
        // The history must cover the recommendations of the scale-down window.
        let down_window = MonotonicMillis::try_from(policy.down_window.as_millis())
            .unwrap_or(MonotonicMillis::MAX);
        let needed = self.window.max(down_window);
        let mean = |window| self.history.mean(label, policy.kind, window, now);
        let (stable_load, panic_load) = match policy.kind {
            Kind::Cpu => cpu,
            Kind::Rps | Kind::Capacity => {
                let sustained =
                    self.history.min_over(label, policy.kind, SUSTAINED_LOAD_WINDOW, now);
                let panic_load = mean(panic_window(self.window)).map(|mean| mean.max(sustained));
                (mean(self.window), panic_load)
            }
        };
        Observation {
            now,
            wanted,
            stable_load,
            panic_load,
            busy: self.history.is_busy(label),
            idle_for: sees_all.then(|| {
                self.history.idle_for(label, now).min(Duration::from_millis(now - complete_since))
            }),
            complete: sees_all
                && now.saturating_sub(complete_since.max(self.leader_since)) >= needed,
        }
    }
}

/// Returns the panic window: a short window that detects a doubled load.
pub fn panic_window(window: MonotonicMillis) -> MonotonicMillis {
    (window / 10).max(MIN_PANIC_WINDOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::LoadReport;

    const WINDOW: MonotonicMillis = 10_000;

    /// A gateway and its clock.
    struct Gateway {
        view: ClusterView,
        now: MonotonicMillis,
    }

    impl Gateway {
        fn new(peers: bool) -> Self {
            let peers = peers.then(|| Peers::new("b".to_owned(), 0));
            Self { view: ClusterView::new(WINDOW, peers, 0), now: 0 }
        }

        /// Advances the clock by a second.
        fn second(&mut self, rps: f64, connected: bool) {
            self.pass(1000, rps, connected);
        }

        fn pass(&mut self, span: MonotonicMillis, rps: f64, connected: bool) {
            self.now += span;
            let own = HashMap::from([("echo".into(), LoadSample { rps, ..LoadSample::default() })]);
            let (now, queue_depth_known) = (self.now, true);
            self.view.add_sample(Sample { now, span, own, connected, queue_depth_known }, |l| {
                l == "echo"
            });
            self.view.update_leadership(now);
        }

        fn hear(&mut self, id: &str, rps: f64) {
            let load = LoadSample { rps, ..LoadSample::default() };
            let loads = ["echo", "stranger"].map(|label| (label.to_owned(), load)).into();
            let message = LoadReport { id: id.to_owned(), loads, ..LoadReport::default() };
            self.view.peers.as_mut().unwrap().on_report(message, self.now);
        }

        fn observation(&self) -> Observation {
            self.observation_with(&ScalingPolicy::default(), 0)
        }

        fn observation_with(&self, policy: &ScalingPolicy, since: MonotonicMillis) -> Observation {
            self.view.observe(FunctionInput { policy, since, ..input("echo", policy) }, self.now)
        }
    }

    fn input<'a>(label: &'a str, policy: &'a ScalingPolicy) -> FunctionInput<'a> {
        FunctionInput { label, policy, wanted: 1, cpu: (None, None), since: 0 }
    }

    #[test]
    fn a_single_gateway_leads_immediately_and_scales_down_after_a_window() {
        let mut gateway = Gateway::new(false);
        gateway.second(5.0, false);
        assert!(gateway.view.is_leader);
        assert_eq!(gateway.observation().stable_load, Some(5.0));
        assert!(!gateway.observation().complete);
        (0..10).for_each(|_| gateway.second(5.0, false));
        assert!(gateway.observation().complete);
    }

    #[test]
    fn loads_of_other_gateways_are_added_for_known_functions() {
        let mut gateway = Gateway::new(true);
        gateway.second(0.0, true);
        gateway.hear("c", 7.0);
        gateway.pass(500, 3.0, true);
        // Ten in the last half of 1.5 seconds.
        let panic_load = gateway.observation().panic_load.unwrap();
        assert!((panic_load - 10.0 / 3.0).abs() < 1e-9, "{panic_load}");
        let strange = gateway.view.observe(input("stranger", &ScalingPolicy::default()), 1500);
        assert_eq!((strange.panic_load, strange.busy), (Some(0.0), false));
    }

    #[test]
    fn a_new_leader_does_not_scale_down_for_a_window() {
        let mut gateway = Gateway::new(true);
        for _ in 0..20 {
            gateway.hear("a", 1.0);
            gateway.second(1.0, true);
            assert!(!gateway.view.is_leader);
        }
        let leaving = LoadReport { id: "a".to_owned(), leaving: true, ..LoadReport::default() };
        gateway.view.peers.as_mut().unwrap().on_report(leaving, gateway.now);
        gateway.second(1.0, true);
        assert!(gateway.view.is_leader);
        (0..9).for_each(|_| gateway.second(1.0, true));
        assert!(!gateway.observation().complete);
        gateway.second(1.0, true);
        assert!(gateway.observation().complete);
    }

    #[test]
    fn a_new_leader_waits_longer_if_the_old_one_is_missing() {
        let mut gateway = Gateway::new(true);
        for _ in 0..20 {
            gateway.hear("a", 1.0);
            gateway.second(1.0, true);
        }
        let mut silent = 0;
        while !gateway.view.is_leader {
            silent += 1;
            gateway.second(1.0, true);
        }
        assert!((2..=4).contains(&silent), "{silent}");
        for _ in 0..49 {
            assert!(!gateway.observation().complete);
            gateway.second(1.0, true);
        }
        gateway.second(1.0, true);
        assert!(gateway.observation().complete);
    }

    #[test]
    fn a_new_or_changed_function_is_neither_idle_nor_complete() {
        let mut gateway = Gateway::new(false);
        (0..30).for_each(|_| gateway.second(0.0, false));
        let standard = ScalingPolicy::default();
        let observation = |since| gateway.observation_with(&standard, since);
        assert!(observation(20_000).complete && !observation(20_001).complete);
        assert_eq!(observation(25_000).idle_for, Some(Duration::from_secs(5)));
        assert_eq!(observation(30_000).idle_for, Some(Duration::ZERO));
        assert_eq!(observation(99_000).idle_for, Some(Duration::ZERO));
    }

    #[test]
    fn completeness_covers_a_longer_down_window() {
        let mut gateway = Gateway::new(false);
        let slow =
            ScalingPolicy { down_window: Duration::from_secs(15), ..ScalingPolicy::default() };
        (0..14).for_each(|_| gateway.second(1.0, false));
        assert!(gateway.observation().complete && !gateway.observation_with(&slow, 0).complete);
        (0..2).for_each(|_| gateway.second(1.0, false));
        assert!(
            gateway.observation_with(&slow, 0).complete
                && !gateway.observation_with(&slow, 2000).complete
        );
    }

    #[test]
    fn a_disconnected_gateway_leads_but_does_not_scale_down() {
        let mut gateway = Gateway::new(true);
        gateway.hear("a", 1.0);
        for _ in 0..30 {
            gateway.second(1.0, false);
            assert!(gateway.view.is_leader && !gateway.observation().complete);
            assert_eq!(gateway.observation().idle_for, None);
        }
        // After a reconnect, the gateway first listens.
        gateway.second(1.0, true);
        assert!(!gateway.view.is_leader);
        (0..3).for_each(|_| gateway.second(1.0, true));
        assert!(gateway.view.is_leader);
    }

    #[test]
    fn load_sustained_for_two_seconds_counts_in_full() {
        let mut gateway = Gateway::new(false);
        gateway.view = ClusterView::new(60_000, None, 0);
        (0..10).for_each(|_| gateway.second(1.0, false));
        (0..3).for_each(|_| gateway.pass(500, 9.0, false));
        assert!(gateway.observation().panic_load.unwrap() < 9.0);
        gateway.pass(500, 9.0, false);
        assert_eq!(gateway.observation().panic_load, Some(9.0));
    }

    #[test]
    fn idle_time_starts_when_all_gateways_report() {
        let mut gateway = Gateway::new(true);
        gateway.second(0.0, true);
        for _ in 0..20 {
            gateway.hear("c", 0.0);
            gateway.second(0.0, true);
        }
        assert_eq!(gateway.observation().idle_for, Some(Duration::from_secs(20)));
        // The other gateway is silent, and its load is unknown.
        (0..2).for_each(|_| gateway.second(0.0, true));
        assert_eq!(gateway.observation().idle_for, Some(Duration::ZERO));
    }

    #[test]
    fn a_suspended_process_restarts_its_history() {
        let mut gateway = Gateway::new(true);
        (0..20).for_each(|_| gateway.second(1.0, true));
        assert!(gateway.view.is_leader && gateway.observation().complete);
        gateway.pass(5000, 1.0, true);
        assert!(!gateway.view.is_leader && !gateway.observation().complete);
        assert_eq!(gateway.observation().stable_load, None);
    }
}
