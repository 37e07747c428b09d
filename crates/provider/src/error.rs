//! Errors of backends, and their responses.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use crate::signals::NO_SUCH_FUNCTION;
use gateway_http::names::X_GATEWAY_REASON;

/// Why a request to a provider failed. The text is the response body.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    NotFound(String),
    #[error("function {0} is not deployed")]
    NoSuchFunction(String),
    #[error("{0}")]
    Conflict(String),
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    #[error("the body did not arrive in time")]
    TooSlow,
    #[error("{0:#}")]
    Internal(#[from] anyhow::Error),
}

impl ApiError {
    /// The namespace does not exist.
    pub(crate) fn no_such_namespace(namespace: &str) -> Self {
        Self::NotFound(format!("namespace {namespace} does not exist"))
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::NotFound(_) | Self::NoSuchFunction(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl From<std::io::Error> for ApiError {
    fn from(error: std::io::Error) -> Self {
        Self::Internal(error.into())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        match &self {
            Self::Internal(error) => {
                tracing::error!(error = format!("{error:#}"), "Request failed")
            }
            error => tracing::debug!(%error, "Request rejected"),
        }
        let mut response = (self.status(), format!("{self}\n")).into_response();
        if matches!(self, Self::NoSuchFunction(_)) {
            response.headers_mut().insert(X_GATEWAY_REASON, NO_SUCH_FUNCTION);
        }
        response
    }
}
