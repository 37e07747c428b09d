//! Readiness of this process, with the reasons.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use serde::Serialize;

use gateway_base::error_chain::ErrorChain;
use gateway_base::shutdown::ShutdownPhases;
use gateway_base::sync::lock_unpoisoned;
use gateway_http::limit::ConcurrencyLimit;
use gateway_provider::Error;
use gateway_queue::Condition;

/// Inputs of the readiness check.
pub struct Readiness {
    pub phases: ShutdownPhases,
    pub limit: Arc<ConcurrencyLimit>,
    /// Result of the last poll of the provider. A leaf.
    provider: Mutex<ProviderState>,
    queue_unreachable: AtomicBool,
    /// Problem of a queue that is reachable. A leaf.
    queue_condition: Mutex<Option<Condition>>,
}

/// Result of the last poll of the provider.
#[derive(Debug, PartialEq, Eq)]
enum ProviderState {
    NotPolledYet,
    Reachable,
    /// Reachable, but it accepts only credentials that have been replaced.
    StaleCredentials,
    /// Reachable, but it accepts none of the known credentials.
    RejectsCredentials(String),
    /// Reachable, but it does not list its functions.
    ListFails(String),
    /// No response.
    Unreachable(String),
}

/// Body of the response to `/_/ready`.
#[derive(Debug, Serialize)]
pub struct ReadinessReport {
    pub ready: bool,
    /// Why this process is not ready or degraded.
    reasons: Vec<String>,
    degraded: Vec<&'static str>,
}

/// Reason of `ProviderState::StaleCredentials`.
const STALE_CREDENTIALS: &str = "the provider accepts only the previous credentials: they are tried for an hour after the change; \
     a provider that reads its files only at its start must be restarted";

impl ProviderState {
    /// Returns the state of a provider that returned `error` instead of its functions.
    fn from_error(error: &Error) -> Self {
        let reason = error.to_string();
        match error {
            Error::CredentialsRefused(_) => Self::RejectsCredentials(reason),
            Error::Response(_) => Self::ListFails(reason),
            _ => Self::Unreachable(reason),
        }
    }
}

impl Readiness {
    /// Creates the state of a process whose provider has not been polled yet.
    pub fn new(phases: ShutdownPhases, limit: Arc<ConcurrencyLimit>) -> Arc<Self> {
        let provider = Mutex::new(ProviderState::NotPolledYet);
        let (queue_unreachable, queue_condition) = (AtomicBool::new(false), Mutex::new(None));
        Arc::new(Self { phases, limit, provider, queue_unreachable, queue_condition })
    }

    /// Records that the provider listed its functions. `stale`: it accepts only credentials that have been replaced.
    pub fn record_provider_success(&self, stale: bool) {
        let state = if stale { ProviderState::StaleCredentials } else { ProviderState::Reachable };
        if self.set_provider_state(state) {
            match stale {
                false => tracing::info!("The provider responds"),
                true => tracing::warn!("Degraded: {STALE_CREDENTIALS}"),
            }
        }
    }

    /// Records that the provider did not list its functions.
    pub fn record_provider_failure(&self, error: &Error) {
        let state = ProviderState::from_error(error);
        let reachable = !matches!(state, ProviderState::Unreachable(_));
        if self.set_provider_state(state) {
            let reason = ErrorChain(error);
            match reachable {
                true => {
                    tracing::warn!(%reason, "The provider does not list its functions: {error}")
                }
                false => tracing::warn!(%reason, "The provider does not respond: {error}"),
            }
        }
    }

    /// Sets the state; returns whether it has changed.
    fn set_provider_state(&self, state: ProviderState) -> bool {
        let mut last = lock_unpoisoned(&self.provider);
        let changed = *last != state;
        *last = state;
        changed
    }

    /// Records whether the queue is reachable. Synchronous calls do not depend on it.
    pub fn set_queue_reachable(&self, reachable: bool) {
        if self.queue_unreachable.swap(!reachable, Relaxed) == reachable {
            match reachable {
                true => tracing::info!("The queue is reachable again"),
                false => tracing::warn!("The queue is unreachable"),
            }
        }
    }

    /// Records a problem of a queue that is reachable, or that it has none.
    pub fn set_queue_condition(&self, condition: Option<Condition>) {
        *lock_unpoisoned(&self.queue_condition) = condition;
    }

    /// Returns whether this process is ready, with the reasons.
    pub fn report(&self) -> ReadinessReport {
        let (mut reasons, mut degraded_reasons, mut degraded) =
            (Vec::new(), Vec::new(), Vec::new());
        if self.phases.is_announced() {
            reasons.push("this process is stopping".to_owned());
        }
        if self.limit.is_exhausted() {
            reasons.push("the limit of concurrent calls (max_calls) is reached".to_owned());
        }
        // A provider that responds at all can be called. Errors of the gateway's own queries only degrade: another
        // gateway would have the same provider, so sending clients there does not help.
        match &*lock_unpoisoned(&self.provider) {
            ProviderState::Reachable => {}
            ProviderState::NotPolledYet => {
                reasons.push("starting: the provider has not been polled yet".to_owned());
            }
            ProviderState::Unreachable(reason) => {
                reasons.push(format!("the provider does not respond: {reason}"));
            }
            ProviderState::StaleCredentials => {
                degraded.push("credentials");
                degraded_reasons.push(STALE_CREDENTIALS.to_owned());
            }
            ProviderState::RejectsCredentials(reason) => {
                degraded.push("credentials");
                degraded_reasons.push(reason.clone());
            }
            ProviderState::ListFails(reason) => {
                degraded.push("provider");
                degraded_reasons
                    .push(format!("the provider does not list its functions: {reason}"));
            }
        }
        if self.queue_unreachable.load(Relaxed) {
            degraded.push("queue");
        }
        let condition = *lock_unpoisoned(&self.queue_condition);
        degraded.extend(condition.map(|condition| match condition {
            Condition::DiskFull => "queue: disk full",
            Condition::DamagedCalls => "queue: damaged calls set aside",
            Condition::Damaged => "queue: file damaged",
        }));
        let ready = reasons.is_empty();
        reasons.append(&mut degraded_reasons);
        ReadinessReport { ready, reasons, degraded }
    }
}
