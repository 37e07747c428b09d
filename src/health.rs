//! Liveness and readiness of this process, with the reasons.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::RETRY_AFTER;
use serde::Serialize;

use crate::error::{Causes, Error};
use crate::limit::ConcurrencyLimit;
use crate::queue::Condition;
use crate::serve::caller::Caller;
use crate::shutdown::Stages;
use crate::system::{Api, stream};

/// Inputs of the readiness check.
pub struct Health {
    pub stages: Stages,
    pub limit: Arc<ConcurrencyLimit>,
    provider: Mutex<ProviderState>,
    queue_away: AtomicBool,
    queue_condition: Mutex<Option<Condition>>,
}

/// Result of the last poll of the provider.
#[derive(Debug, PartialEq, Eq)]
enum ProviderState {
    NotAskedYet,
    Answers,
    /// Reachable, but it accepts only credentials that have been replaced.
    IsBehind,
    /// Reachable, but it accepts none of the known credentials.
    RefusesCredentials(String),
    /// Reachable, but it does not list its functions.
    Fails(String),
    /// No response.
    Away(String),
}

/// Body of the response to `/_/ready`.
#[derive(Debug, Serialize)]
struct Readiness {
    ready: bool,
    /// Why this process is not ready or degraded.
    reasons: Vec<String>,
    degraded: Vec<&'static str>,
}

/// Reason of `ProviderState::StaleCredentials`.
const BEHIND: &str = "the provider accepts only the previous credentials: they are tried for an hour after the change; \
                      a provider that reads its files only at its start must be restarted";

impl ProviderState {
    /// Returns the state of a provider that returned `error` instead of its functions.
    fn after(error: &Error) -> Self {
        let reason = error.to_string();
        match error {
            Error::CredentialsRefused(_) => Self::RefusesCredentials(reason),
            Error::Provider(_) => Self::Fails(reason),
            _ => Self::Away(reason),
        }
    }
}

impl Health {
    pub fn new(stages: Stages, limit: Arc<ConcurrencyLimit>) -> Arc<Self> {
        let provider = Mutex::new(ProviderState::NotAskedYet);
        let (queue_away, queue_condition) = (AtomicBool::new(false), Mutex::new(None));
        Arc::new(Self { stages, limit, provider, queue_away, queue_condition })
    }

    /// Records that the provider listed its functions. `stale`: it accepts only credentials that have been replaced.
    pub fn provider_answered(&self, is_behind: bool) {
        let state = if is_behind { ProviderState::IsBehind } else { ProviderState::Answers };
        if self.provider_is(state) {
            match is_behind {
                false => tracing::info!("The provider responds"),
                true => tracing::warn!("Degraded: {BEHIND}"),
            }
        }
    }

    /// Records that the provider did not list its functions.
    pub fn provider_failed(&self, error: &Error) {
        let state = ProviderState::after(error);
        let answers = !matches!(state, ProviderState::Away(_));
        if self.provider_is(state) {
            let reason = Causes(error);
            match answers {
                true => {
                    tracing::warn!(%reason, "The provider does not list its functions: {error}")
                }
                false => tracing::warn!(%reason, "The provider does not respond: {error}"),
            }
        }
    }

    /// Sets the state; returns whether it has changed.
    fn provider_is(&self, state: ProviderState) -> bool {
        let mut last = self.provider.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = *last != state;
        *last = state;
        changes
    }

    /// Records whether the queue is reachable. Synchronous calls do not depend on it.
    pub fn queue_is(&self, reachable: bool) {
        if self.queue_away.swap(!reachable, Relaxed) == reachable {
            match reachable {
                true => tracing::info!("The queue is reachable again"),
                false => tracing::warn!("The queue is unreachable"),
            }
        }
    }

    /// Records a problem of a queue that is reachable, or that it has none.
    pub fn queue_has(&self, condition: Option<Condition>) {
        *self.queue_condition.lock().unwrap_or_else(PoisonError::into_inner) = condition;
    }

    /// Returns the response to a readiness probe: 200 or 503, with a JSON body that lists the reasons.
    pub fn answer(&self) -> Response {
        let readiness = self.readiness();
        if readiness.ready {
            return Json(readiness).into_response();
        }
        (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "1")], Json(readiness)).into_response()
    }

    fn readiness(&self) -> Readiness {
        let (mut reasons, mut flaws, mut degraded) = (Vec::new(), Vec::new(), Vec::new());
        if self.stages.is_leaving() {
            reasons.push("this process is stopping".to_owned());
        }
        if self.limit.is_exhausted() {
            reasons.push("the limit of concurrent calls (max_calls) is reached".to_owned());
        }
        // A provider that responds at all can be called. Errors of the gateway's own queries only degrade: another
        // gateway would have the same provider, so sending clients there does not help.
        match &*self.provider.lock().unwrap_or_else(PoisonError::into_inner) {
            ProviderState::Answers => {}
            ProviderState::NotAskedYet => {
                reasons.push("starting: the provider has not been polled yet".to_owned());
            }
            ProviderState::Away(reason) => {
                reasons.push(format!("the provider does not respond: {reason}"));
            }
            ProviderState::IsBehind => {
                degraded.push("credentials");
                flaws.push(BEHIND.to_owned());
            }
            ProviderState::RefusesCredentials(reason) => {
                degraded.push("credentials");
                flaws.push(reason.clone());
            }
            ProviderState::Fails(reason) => {
                degraded.push("provider");
                flaws.push(format!("the provider does not list its functions: {reason}"));
            }
        }
        if self.queue_away.load(Relaxed) {
            degraded.push("queue");
        }
        let condition = *self.queue_condition.lock().unwrap_or_else(PoisonError::into_inner);
        degraded.extend(condition.map(|condition| match condition {
            Condition::DiskFull => "queue: disk full",
            Condition::DamagedCalls => "queue: damaged calls set aside",
            Condition::Damaged => "queue: file damaged",
        }));
        let ready = reasons.is_empty();
        reasons.append(&mut flaws);
        Readiness { ready, reasons, degraded }
    }
}

/// `GET /_/healthz`: this process alone.
pub async fn live() -> &'static str {
    "OK"
}

/// `GET /_/ready`
pub async fn ready(State(api): State<Arc<Api>>) -> Response {
    api.health.answer()
}

/// `GET /healthz`: the provider's health.
pub async fn provider(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    api.send(&caller, &api.provider.origin, request).await.map(stream).into_response()
}
