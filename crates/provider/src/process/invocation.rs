//! Errors of invocations.

use std::io;
use std::time::Duration;

use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use crate::signals::{DOES_NOT_START, INTERNAL, NO_SUCH_FUNCTION};
use gateway_base::function::Function;
use gateway_http::names::{X_DURATION_SECONDS, X_GATEWAY_REASON, X_OPENFAAS_INTERNAL};

/// An invocation that has no response of its function.
#[derive(Debug, thiserror::Error)]
pub(super) enum InvocationError {
    #[error("function {0} is not deployed")]
    NotFound(Function),
    #[error("function {0} is scaled to zero")]
    ScaledToZero(Function),
    #[error("function {0} has no ready replica")]
    NotReady(Function),
    #[error("function {0} does not start")]
    DoesNotStart(Function),
    #[error("function {0} has {1} calls in flight, the limit of its max_inflight")]
    TooManyInFlight(Function, u64),
    #[error("function {0} cannot be started: {1} calls are running, the limit of the provider")]
    ForkLimitReached(Function, usize),
    #[error("function {0} cannot be started: {1}")]
    StartFailed(Function, #[source] io::Error),
    #[error("function {0} did not finish within its exec_timeout of {1:?}")]
    Timeout(Function, Duration),
    #[error("function {0} was stopped: the provider is shutting down")]
    Stopped(Function),
    #[error("the request body of the call to {0} was aborted")]
    RequestAborted(Function),
    #[error("function {0} sent no valid response: {1}")]
    InvalidResponse(Function, #[source] anyhow::Error),
}

impl InvocationError {
    fn status(&self) -> StatusCode {
        match self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::ForkLimitReached(..)
            | Self::ScaledToZero(_)
            | Self::NotReady(_)
            | Self::DoesNotStart(_)
            | Self::Stopped(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::TooManyInFlight(..) => StatusCode::TOO_MANY_REQUESTS,
            Self::StartFailed(_, error) => match error.kind() {
                // The environment has all request headers, and the kernel limits its size.
                io::ErrorKind::ArgumentListTooLong => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                // The system's limit of processes is reached.
                io::ErrorKind::WouldBlock => StatusCode::SERVICE_UNAVAILABLE,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            },
            Self::Timeout(..) => StatusCode::GATEWAY_TIMEOUT,
            Self::RequestAborted(_) => StatusCode::BAD_REQUEST,
            Self::InvalidResponse(..) => StatusCode::BAD_GATEWAY,
        }
    }

    /// Returns whether the provider created the error without the function. Limits and timeouts are those of a watchdog
    /// and count as the function's; and with an aborted request or response the function may have received the call.
    fn is_internal(&self) -> bool {
        !matches!(
            self,
            Self::TooManyInFlight(..)
                | Self::InvalidResponse(..)
                | Self::Timeout(..)
                | Self::RequestAborted(_)
        )
    }
}

impl IntoResponse for InvocationError {
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

/// Adds the duration of the invocation to a response, unless the function has set the header.
pub(super) fn set_duration_header(response: &mut Response, took: Duration) {
    if let Ok(value) = HeaderValue::from_str(&format!("{:.6}", took.as_secs_f64())) {
        response.headers_mut().entry(X_DURATION_SECONDS).or_insert(value);
    }
}
