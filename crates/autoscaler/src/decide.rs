//! Computes the desired replicas of a function from observations. No I/O and no clock: the same observation and state
//! give the same decision.
//!
//! Load is the sum over all replicas, so it does not matter when a provider lists replicas that have just started.

use std::collections::VecDeque;
use std::time::Duration;

use gateway_proxy::functions::policy::scaling::ScalingPolicy;

/// Milliseconds since this process started to sample.
pub type MonotonicMillis = u64;

/// A request is repeated after this time if the provider does not list its effect.
const REQUEST_RETRY_INTERVAL: MonotonicMillis = 10_000;

/// Pause after a failed request: slightly less than a round, so that the next round retries.
const FAILURE_PAUSE: MonotonicMillis = 1500;

/// Observation of a function at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observation {
    pub now: MonotonicMillis,
    /// Replicas that the provider was asked to have.
    pub wanted: u64,
    /// Mean load over the stable window; `None` if unknown.
    pub stable_load: Option<f64>,
    /// Recent load: the mean over the panic window, or a higher load that was sustained for a moment.
    pub panic_load: Option<f64>,
    /// Calls are running or queued.
    pub busy: bool,
    /// Time that has certainly passed without a call; `None` if unknown.
    pub idle_for: Option<Duration>,
    /// All calls, and the decisions that followed from them, are known for a stable window. Otherwise no replica is
    /// removed, except when an idle function is scaled to zero.
    pub complete: bool,
}

/// Configuration of the autoscaler.
#[derive(Clone, Copy, Debug)]
pub struct AutoscaleRules {
    /// Stable window.
    pub window: MonotonicMillis,
    /// Requests can scale up functions at zero.
    pub zero_allowed: bool,
}

/// State of a function between decisions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecisionState {
    /// The load has doubled: no replica is removed before this time.
    panic_until: MonotonicMillis,
    /// Recommendations and their times, in decreasing order of replicas.
    recommendations: VecDeque<(MonotonicMillis, u64)>,
    pending: Option<PendingRequest>,
    /// Time of the last failed request.
    failed_at: Option<MonotonicMillis>,
}

/// A request to the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PendingRequest {
    at: MonotonicMillis,
    from: u64,
    to: u64,
}

/// Reason of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// At zero; the next request scales it up.
    ScaledToZero,
    /// Outside of the configured minimum and maximum.
    Bounds,
    /// Idle for long enough.
    Idle,
    /// Load over the stable window.
    Load,
    /// Doubled load.
    Panic,
    /// Scale-down is delayed.
    Stabilized,
}

/// Desired replicas of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub desired: u64,
    pub reason: Reason,
    /// A request must be sent to the provider.
    pub send_request: bool,
}

impl Reason {
    /// Returns the name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ScaledToZero => "scaled_to_zero",
            Self::Bounds => "bounds",
            Self::Idle => "idle",
            Self::Load => "load",
            Self::Panic => "panic",
            Self::Stabilized => "stabilization",
        }
    }
}

impl DecisionState {
    /// Records that the provider did not carry out the request.
    pub fn request_failed(&mut self, now: MonotonicMillis) {
        (self.pending, self.failed_at) = (None, Some(now));
    }

    /// Records that the request was not sent.
    pub fn request_dropped(&mut self) {
        self.pending = None;
    }
}

/// Computes the decision and the state for the next one.
pub fn decide(
    rules: AutoscaleRules,
    policy: &ScalingPolicy,
    observation: Observation,
    mut state: DecisionState,
) -> (Decision, DecisionState) {
    if observation.wanted == 0 {
        // Scale-up from zero is not done here, and makes the earlier state obsolete.
        let decision = Decision { desired: 0, reason: Reason::ScaledToZero, send_request: false };
        return (decision, DecisionState::default());
    }
    let (desired, reason) = match may_scale_to_zero(rules, policy, observation) {
        true => (0, Reason::Idle),
        false => by_load(rules, policy, observation, &mut state),
    };
    let is_repeated = state.pending.is_some_and(|pending| {
        (pending.from, pending.to) == (observation.wanted, desired)
            && observation.now.saturating_sub(pending.at) < REQUEST_RETRY_INTERVAL
    });
    let pausing =
        state.failed_at.is_some_and(|at| observation.now.saturating_sub(at) < FAILURE_PAUSE);
    let send_request = desired != observation.wanted && !is_repeated && !pausing;
    if send_request {
        state.pending =
            Some(PendingRequest { at: observation.now, from: observation.wanted, to: desired });
    }
    (Decision { desired, reason, send_request }, state)
}

/// Returns whether the function may be scaled to zero now: that is allowed, and the function is idle for long enough.
pub fn may_scale_to_zero(
    rules: AutoscaleRules,
    policy: &ScalingPolicy,
    observation: Observation,
) -> bool {
    let long_enough = |after| observation.idle_for.is_some_and(|idle_for| idle_for >= after);
    rules.zero_allowed && !observation.busy && policy.zero_after.is_some_and(long_enough)
}

fn by_load(
    rules: AutoscaleRules,
    policy: &ScalingPolicy,
    observation: Observation,
    state: &mut DecisionState,
) -> (u64, Reason) {
    let min = policy.min.max(1);
    let max = policy.max.max(min);
    let bounded = |replicas: u64| replicas.clamp(min, max);
    let wanted = bounded(observation.wanted);
    // Unknown load changes nothing.
    let needed =
        |load: Option<f64>| bounded(load.map_or(wanted, |load| replicas_for(policy, load)));
    let (stable_replicas, panic_replicas) =
        (needed(observation.stable_load), needed(observation.panic_load));
    if observation.panic_load.is_some() && panic_replicas >= wanted.saturating_mul(2) {
        state.panic_until = observation.now.saturating_add(rules.window);
    }
    let panicking = observation.now < state.panic_until;
    let recommended = if panicking { stable_replicas.max(panic_replicas) } else { stable_replicas };
    let highest = state.recommend(observation.now, recommended, policy.down_window);
    let floor = if panicking || !observation.complete { wanted } else { highest.min(wanted) };
    let desired = recommended.max(floor);
    let reason = if desired == wanted && wanted != observation.wanted {
        Reason::Bounds
    } else if desired > recommended {
        Reason::Stabilized
    } else if panicking && desired > stable_replicas {
        Reason::Panic
    } else {
        Reason::Load
    };
    (desired, reason)
}

/// Returns the number of replicas for which each has at most its share of the target.
fn replicas_for(policy: &ScalingPolicy, load: f64) -> u64 {
    // Tolerance for rounding errors just above a whole number.
    const HAIR: f64 = 1e-9;
    let replicas = (load / (policy.target * policy.proportion) - HAIR).ceil();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "what is out of range becomes the nearest that is in it"
    )]
    let replicas = replicas as u64;
    replicas
}

impl DecisionState {
    /// Adds a recommendation. Returns the highest one within `window`, including the new one.
    fn recommend(&mut self, now: MonotonicMillis, replicas: u64, window: Duration) -> u64 {
        // Lower or equal recommendations can never become the highest again.
        while self.recommendations.back().is_some_and(|(_, earlier)| *earlier <= replicas) {
            self.recommendations.pop_back();
        }
        self.recommendations.push_back((now, replicas));
        let window = u64::try_from(window.as_millis()).unwrap_or(MonotonicMillis::MAX);
        while self.recommendations.front().is_some_and(|(at, _)| now.saturating_sub(*at) > window) {
            self.recommendations.pop_front();
        }
        self.recommendations.front().map_or(replicas, |(_, highest)| *highest)
    }
}

#[cfg(test)]
mod tests;
