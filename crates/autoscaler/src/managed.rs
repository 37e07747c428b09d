//! A function that the autoscaler manages: its state, and the warnings that were logged for it.

use std::collections::{HashSet, VecDeque};

use crate::cluster_view::FunctionInput;
use crate::decide::{AutoscaleRules, Decision, DecisionState, MonotonicMillis, Observation};
use gateway_base::function::Function;
use gateway_provider::Error;
use gateway_proxy::functions::policy::scaling::ScalingPolicy;

/// Retention of a function that is no longer listed; its namespace may be temporarily unavailable.
const MISSING_RETENTION: MonotonicMillis = 10 * 60_000;
/// A function that was not listed for this time may be a different one when it reappears.
const MAX_ABSENCE: MonotonicMillis = 10_000;

/// A function that the autoscaler manages.
#[derive(Debug, Default)]
pub(super) struct ManagedFunction {
    pub(super) label: String,
    pub(super) policy: ScalingPolicy,
    pub(super) wanted: u64,
    /// Time since when the function is known, and its replicas were changed only by this gateway.
    pub(super) since: MonotonicMillis,
    /// Replicas in the last list.
    listed_replicas: Option<u64>,
    /// Replicas that were requested and are not listed yet.
    expected_replicas: Option<u64>,
    /// Time since when the function is not listed.
    missing_since: Option<MonotonicMillis>,
    pub(super) state: DecisionState,
    /// CPU of all replicas in millicores, as reported by the provider.
    pub(super) cpu: VecDeque<(MonotonicMillis, f64)>,
    /// Warnings that were logged, and are not repeated.
    pub(super) warnings: HashSet<Warning>,
}

/// A warning that is logged once.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Warning {
    NeverScaledToZero,
    NoCpuUsage,
    ScaleFailed,
}

/// A change to send to the provider.
pub(super) struct Change {
    pub(super) function: Function,
    pub(super) observation: Observation,
    pub(super) decision: Decision,
}

impl ManagedFunction {
    /// Handles that the provider lists the function.
    pub(super) fn on_listed(&mut self, replicas: u64, now: MonotonicMillis) {
        let absent_long =
            self.missing_since.take().is_some_and(|at| now.saturating_sub(at) >= MAX_ABSENCE);
        let is_expected = self.expected_replicas == Some(replicas);
        if is_expected {
            self.expected_replicas = None;
        }
        // A provider may list requested replicas late.
        if absent_long || (self.listed_replicas != Some(replicas) && !is_expected) {
            self.since = now;
        }
        (self.listed_replicas, self.wanted) = (Some(replicas), replicas);
    }

    /// Handles that the provider does not list the function. Returns whether its state is kept.
    pub(super) fn on_missing(&mut self, now: MonotonicMillis) -> bool {
        now.saturating_sub(*self.missing_since.get_or_insert(now)) < MISSING_RETENTION
    }

    /// Returns whether the function is listed, and can be scaled.
    pub(super) fn is_present(&self) -> bool {
        self.missing_since.is_none()
    }

    /// Records a request for replicas. The provider may carry it out even if it responds with an error.
    pub(super) fn expect_replicas(&mut self, replicas: u64) {
        self.expected_replicas = Some(replicas);
    }

    /// Records the CPU usage reported by the provider.
    pub(super) fn record_cpu(&mut self, cpu: f64, now: MonotonicMillis) {
        if self.cpu.is_empty() {
            // The usage before is unknown, and a single value says little.
            self.since = now;
        }
        self.cpu.push_back((now, cpu));
    }

    /// Returns the input for the cluster view; `panic_window` is its duration.
    pub(super) fn input(
        &self,
        panic_window: MonotonicMillis,
        now: MonotonicMillis,
    ) -> FunctionInput<'_> {
        let cpu = (self.mean_cpu_since(0), self.mean_cpu_since(now.saturating_sub(panic_window)));
        let Self { label, policy, wanted, since, .. } = self;
        FunctionInput { label, policy, wanted: *wanted, cpu, since: *since }
    }

    /// Returns the mean CPU usage since a time.
    fn mean_cpu_since(&self, since: MonotonicMillis) -> Option<f64> {
        let values = || self.cpu.iter().filter(|(at, _)| *at >= since).map(|(_, cpu)| *cpu);
        let count = u32::try_from(values().count()).unwrap_or(u32::MAX);
        (count > 0).then(|| values().sum::<f64>() / f64::from(count))
    }

    pub(super) fn warn_once(&mut self, warning: Warning, log: impl FnOnce()) {
        if self.warnings.insert(warning) {
            log();
        }
    }

    pub(super) fn warn_if_never_scaled_to_zero(
        &mut self,
        function: &Function,
        rules: AutoscaleRules,
    ) {
        if self.policy.zero_after.is_some() && !rules.zero_allowed {
            self.warn_once(Warning::NeverScaledToZero, || {
                tracing::warn!(
                    function = %function,
                    "{function} is not scaled to zero: scale_from_zero is off, so no request could scale it up"
                );
            });
        }
    }

    /// Logs the result of a change.
    pub(super) fn log_change(&mut self, change: &Change, result: Result<(), Error>) {
        let Change { function, observation, decision } = change;
        let (from, to, reason) = (observation.wanted, decision.desired, decision.reason.as_str());
        match result {
            Ok(()) => {
                self.warnings.remove(&Warning::ScaleFailed);
                // The next list should show the same.
                self.wanted = to;
                tracing::info!(
                    function = %function, from, to, reason,
                    load = observation.stable_load, load_now = observation.panic_load,
                    scaling_type = self.policy.kind.as_str(),
                    target = self.policy.target * self.policy.proportion,
                    "Scaled {function} from {from} to {to}"
                );
            }
            Err(error) => self.warn_once(Warning::ScaleFailed, || {
                tracing::warn!(
                    function = %function, from, to, reason, %error,
                    "{function} cannot be scaled from {from} to {to}"
                );
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(all: &[(MonotonicMillis, u64)]) -> ManagedFunction {
        let mut managed = ManagedFunction::default();
        all.iter().for_each(|(now, replicas)| managed.on_listed(*replicas, *now));
        managed
    }

    #[test]
    fn a_change_by_another_client_resets_the_start_time() {
        assert_eq!(listed(&[(1000, 1), (3000, 1)]).since, 1000);
        assert_eq!(listed(&[(1000, 1), (3000, 2), (5000, 2)]).since, 3000);
        assert_eq!(listed(&[(1000, 0), (3000, 1)]).since, 3000);
    }

    #[test]
    fn a_requested_change_does_not_reset_the_start_time() {
        let mut managed = listed(&[(1000, 1)]);
        managed.expect_replicas(3);
        for (now, replicas, since) in [(3000, 1, 1000), (5000, 3, 1000), (7000, 1, 7000)] {
            managed.on_listed(replicas, now);
            assert_eq!(managed.since, since, "{now}");
        }
        // An earlier request for this number does not explain a later change.
        managed.on_listed(3, 9000);
        assert_eq!(managed.since, 9000);
    }

    #[test]
    fn an_unlisted_function_is_remembered_for_a_while() {
        let mut managed = listed(&[(1000, 1)]);
        assert!(
            managed.is_present()
                && managed.on_missing(3000)
                && managed.on_missing(5000)
                && !managed.is_present()
        );
        managed.on_listed(1, 7000);
        assert!(managed.is_present());
        assert_eq!(managed.since, 1000);
        // After this time it may have been deleted and deployed again.
        assert!(managed.on_missing(10_000) && managed.on_missing(600_000));
        managed.on_listed(1, 601_000);
        assert_eq!(managed.since, 601_000);
        assert!(managed.on_missing(700_000) && !managed.on_missing(1_300_000));
    }

    #[test]
    fn cpu_usage_counts_from_the_first_sample() {
        let mut managed = listed(&[(1000, 1)]);
        managed.record_cpu(500.0, 9000);
        managed.record_cpu(300.0, 11_000);
        assert_eq!(managed.input(2000, 12_000).cpu, (Some(400.0), Some(300.0)));
        assert_eq!(managed.since, 9000);
    }
}
