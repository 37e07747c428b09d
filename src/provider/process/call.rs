//! A call of a function, and why it can fail.

use std::io;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::header::RETRY_AFTER;
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use crate::function::Function;
use crate::provider::signals::{
    DOES_NOT_START, INTERNAL, NO_SUCH_FUNCTION, X_GATEWAY_REASON, X_OPENFAAS_INTERNAL,
};

const X_DURATION_SECONDS: HeaderName = HeaderName::from_static("x-duration-seconds");

/// A call on its way to a function.
pub(super) struct Call {
    pub(super) head: Parts,
    pub(super) body: Body,
    /// What stands behind the function's name, `/` at least.
    pub(super) path: String,
    pub(super) started: Instant,
}

/// Why a call has no answer of its function.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error("function {0} is not deployed")]
    NotFound(Function),
    #[error("function {0} is scaled to zero")]
    ScaledToZero(Function),
    #[error("function {0} has no replica that is ready")]
    NotReady(Function),
    #[error("function {0} does not start")]
    DoesNotStart(Function),
    #[error("function {0} has {1} calls in flight, which is all that max_inflight allows")]
    Busy(Function, u64),
    #[error(
        "function {0} cannot be started: {1} calls run here already, which is all that the provider allows"
    )]
    Full(Function, usize),
    #[error("function {0} cannot be started: {1}")]
    Start(Function, #[source] io::Error),
    #[error("function {0} was not done within its exec_timeout of {1:?}")]
    Timeout(Function, Duration),
    #[error("function {0} was stopped together with its provider")]
    Stopped(Function),
    #[error("the body of the call to {0} broke off")]
    Request(Function),
    #[error("function {0} gave no valid answer: {1}")]
    Replica(Function, #[source] anyhow::Error),
}

impl CallError {
    fn status(&self) -> StatusCode {
        match self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Full(..)
            | Self::ScaledToZero(_)
            | Self::NotReady(_)
            | Self::DoesNotStart(_)
            | Self::Stopped(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Busy(..) => StatusCode::TOO_MANY_REQUESTS,
            Self::Start(_, error) => match error.kind() {
                // All headers are given to the process in its environment, which the kernel limits.
                io::ErrorKind::ArgumentListTooLong => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                // The limit on processes is reached at the moment.
                io::ErrorKind::WouldBlock => StatusCode::SERVICE_UNAVAILABLE,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            },
            Self::Timeout(..) => StatusCode::GATEWAY_TIMEOUT,
            Self::Request(_) => StatusCode::BAD_REQUEST,
            Self::Replica(..) => StatusCode::BAD_GATEWAY,
        }
    }

    /// Whether the function had no part in it. Limits and timeouts are a watchdog's, and count as the function's; and one
    /// that broke off has seen the call.
    fn is_internal(&self) -> bool {
        !matches!(self, Self::Busy(..) | Self::Replica(..) | Self::Timeout(..) | Self::Request(_))
    }
}

impl IntoResponse for CallError {
    fn into_response(self) -> Response {
        tracing::debug!(error = %self, "Call failed");
        let mut response = (self.status(), format!("{self}\n")).into_response();
        let headers = response.headers_mut();
        if self.is_internal() {
            headers.insert(X_OPENFAAS_INTERNAL, INTERNAL);
        }
        match self {
            Self::DoesNotStart(_) => headers.insert(X_GATEWAY_REASON, DOES_NOT_START),
            Self::NotFound(_) => headers.insert(X_GATEWAY_REASON, NO_SUCH_FUNCTION),
            _ => None,
        };
        if matches!(
            response.status(),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        ) {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// Notes on an answer how long its function took, unless the function has done so.
pub(super) fn note_duration(response: &mut Response, took: Duration) {
    if let Ok(value) = HeaderValue::from_str(&format!("{:.6}", took.as_secs_f64())) {
        response.headers_mut().entry(X_DURATION_SECONDS).or_insert(value);
    }
}
