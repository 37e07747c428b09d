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
use crate::limit::CallLimit;
use crate::queue::Condition;
use crate::serve::caller::Caller;
use crate::shutdown::Stages;
use crate::system::{Api, stream};

/// What readiness is made of.
pub struct Health {
    pub stages: Stages,
    pub limit: Arc<CallLimit>,
    provider: Mutex<ProviderState>,
    queue_away: AtomicBool,
    queue_condition: Mutex<Option<Condition>>,
}

/// How the provider was when it was asked last.
#[derive(Debug, PartialEq, Eq)]
enum ProviderState {
    NotAskedYet,
    Answers,
    Away(String),
}

/// The answer of `/_/ready`.
#[derive(Debug, Serialize)]
struct Readiness {
    ready: bool,
    reasons: Vec<String>,
    degraded: Vec<&'static str>,
}

impl Health {
    pub fn new(stages: Stages, limit: Arc<CallLimit>) -> Arc<Self> {
        let provider = Mutex::new(ProviderState::NotAskedYet);
        let (queue_away, queue_condition) = (AtomicBool::new(false), Mutex::new(None));
        Arc::new(Self { stages, limit, provider, queue_away, queue_condition })
    }

    /// Notes whether the provider has answered, and says so once when that has changed.
    pub fn provider_answered(&self, answered: Result<(), &Error>) {
        let state = match answered {
            Ok(()) => ProviderState::Answers,
            Err(error) => ProviderState::Away(error.to_string()),
        };
        let mut last = self.provider.lock().unwrap_or_else(PoisonError::into_inner);
        if *last == state {
            return;
        }
        match answered {
            Ok(()) => tracing::info!("The provider answers"),
            Err(error) => {
                tracing::warn!(reason = %Causes(error), "The provider does not answer: {error}");
            }
        }
        *last = state;
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
        let mut reasons = Vec::new();
        if self.stages.is_leaving() {
            reasons.push("this process is stopping".to_owned());
        }
        if self.limit.is_exhausted() {
            reasons.push("as many calls are in flight as max_calls allows".to_owned());
        }
        match &*self.provider.lock().unwrap_or_else(PoisonError::into_inner) {
            ProviderState::Answers => {}
            ProviderState::NotAskedYet => {
                reasons.push("starting: the provider has not been asked yet".to_owned());
            }
            ProviderState::Away(reason) => {
                reasons.push(format!("the provider does not answer: {reason}"));
            }
        }
        let mut degraded = if self.queue_away.load(Relaxed) { vec!["queue"] } else { Vec::new() };
        let condition = *self.queue_condition.lock().unwrap_or_else(PoisonError::into_inner);
        degraded.extend(condition.map(|condition| match condition {
            Condition::DiskFull => "queue: disk full",
        }));
        Readiness { ready: reasons.is_empty(), reasons, degraded }
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
