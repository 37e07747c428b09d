//! Liveness of this process, and its readiness with reasons.

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

/// What readiness is made of.
pub struct Health {
    pub stages: Stages,
    pub limit: Arc<ConcurrencyLimit>,
    provider: Mutex<ProviderState>,
    queue_away: AtomicBool,
    queue_condition: Mutex<Option<Condition>>,
}

/// How the provider was when it was asked last.
#[derive(Debug, PartialEq, Eq)]
enum ProviderState {
    NotAskedYet,
    Answers,
    /// It accepts only credentials that were replaced.
    IsBehind,
    /// It accepts none of the credentials that are known.
    RefusesCredentials(String),
    /// It answers, but does not list its functions.
    Fails(String),
    /// It does not answer.
    Away(String),
}

/// The answer of `/_/ready`.
#[derive(Debug, Serialize)]
struct Readiness {
    ready: bool,
    /// Why it is not ready, or degraded.
    reasons: Vec<String>,
    degraded: Vec<&'static str>,
}

/// What is said of a provider that has not read the changed credentials yet.
const BEHIND: &str = "the provider accepts the previous credentials only: they are tried for an hour after the change; \
                      a provider that reads its files only when it starts must be restarted";

impl ProviderState {
    /// What `error`, in place of the list of functions, says of the provider.
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

    /// Notes that the provider has listed its functions, and whether it accepts only credentials that were replaced.
    pub fn provider_answered(&self, is_behind: bool) {
        let state = if is_behind { ProviderState::IsBehind } else { ProviderState::Answers };
        if self.provider_is(state) {
            match is_behind {
                false => tracing::info!("The provider answers"),
                true => tracing::warn!("Degraded: {BEHIND}"),
            }
        }
    }

    /// Notes that the provider has not listed its functions.
    pub fn provider_failed(&self, error: &Error) {
        let state = ProviderState::after(error);
        let answers = !matches!(state, ProviderState::Away(_));
        if self.provider_is(state) {
            let reason = Causes(error);
            match answers {
                true => {
                    tracing::warn!(%reason, "The provider does not list its functions: {error}")
                }
                false => tracing::warn!(%reason, "The provider does not answer: {error}"),
            }
        }
    }

    /// Notes `state`. Whether it is another than before.
    fn provider_is(&self, state: ProviderState) -> bool {
        let mut last = self.provider.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = *last != state;
        *last = state;
        changes
    }

    /// Notes whether the queue can be reached. Calls go on without it.
    pub fn queue_is(&self, reachable: bool) {
        if self.queue_away.swap(!reachable, Relaxed) == reachable {
            match reachable {
                true => tracing::info!("The queue can be reached again"),
                false => tracing::warn!("The queue cannot be reached"),
            }
        }
    }

    /// Notes what is wrong with a queue that can be reached.
    pub fn queue_has(&self, condition: Option<Condition>) {
        *self.queue_condition.lock().unwrap_or_else(PoisonError::into_inner) = condition;
    }

    /// Whether this process is ready, and why not.
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
            reasons.push("as many calls are in flight as max_calls allows".to_owned());
        }
        // A provider that answers at all can be called: what it thinks of this gateway's own questions is no reason to
        // send clients elsewhere, where it is the same.
        match &*self.provider.lock().unwrap_or_else(PoisonError::into_inner) {
            ProviderState::Answers => {}
            ProviderState::NotAskedYet => {
                reasons.push("starting: the provider has not been asked yet".to_owned());
            }
            ProviderState::Away(reason) => {
                reasons.push(format!("the provider does not answer: {reason}"));
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
