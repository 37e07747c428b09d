//! The only place that maps failures to a status and a text for the client.

use std::sync::Arc;

use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use gateway_base::error_chain::ErrorChain;
use gateway_base::function::Function;
use gateway_http::client::body::RequestBodyError;
use gateway_http::client::codings::CodingError;
use gateway_http::client::upstream_body::ResponseBodyError;
use gateway_http::names::X_GATEWAY_REASON;
use gateway_http::{callback_chain, client};
use gateway_provider as provider;
use gateway_provider::signals::DOES_NOT_START;
use gateway_provider::types::StartFailure;
use gateway_queue as queue;

/// Why a request fails. The text contains no address and no secret.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    BadRequest(String),
    #[error("{0}")]
    TransferCoding(CodingError),
    #[error("method not allowed; allowed methods: {0}")]
    MethodNotAllowed(&'static str),
    #[error("no such path")]
    NoSuchPath,
    #[error("function {0} not found")]
    NoSuchFunction(Function),
    #[error("too many calls in flight")]
    Overloaded,
    #[error(
        "function {0} is starting, and its queue of waiting calls (cold_start_queue_limit) is full"
    )]
    ColdStartQueueFull(Function),
    #[error("function {0} is not ready: {1}")]
    NotReady(Function, String),
    /// The output of its processes is for operators only: see `Error::operator_details`.
    #[error("function {0} does not start")]
    DoesNotStart(Function, Arc<StartFailure>),
    #[error(
        "the provider has not confirmed that function {0} exists, and calls of {1} other unconfirmed functions are \
         queued already"
    )]
    UnconfirmedLimit(Function, usize),
    #[error("{0}")]
    Provider(String),
    #[error("the provider rejects the gateway's credentials: {0}")]
    CredentialsRefused(StatusCode),
    #[error("{0}")]
    Forbidden(&'static str),
    #[error("credentials are missing or wrong")]
    Unauthorized,
    #[error("{0}")]
    NotImplemented(String),
    #[error("the body exceeds {0} bytes")]
    TooLarge(usize),
    #[error("the call follows a chain of more than {} callbacks", callback_chain::MAX_LENGTH)]
    CallbackLoop,
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    NotFound(&'static str),
    #[error(transparent)]
    Queue(#[from] queue::Error),
    #[error(transparent)]
    Upstream(#[from] client::Error),
    #[error(transparent)]
    ResponseBody(#[from] ResponseBodyError),
    #[error(transparent)]
    Body(#[from] RequestBodyError),
}

impl Error {
    /// Returns the status of the error response.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) | Self::Body(RequestBodyError::Malformed) => {
                StatusCode::BAD_REQUEST
            }
            Self::TransferCoding(CodingError::Unsupported) => StatusCode::NOT_IMPLEMENTED,
            Self::TransferCoding(CodingError::NotChunked | CodingError::ChunkedTwice) => {
                StatusCode::BAD_REQUEST
            }
            Self::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::NoSuchPath | Self::NoSuchFunction(_) | Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::CallbackLoop => StatusCode::LOOP_DETECTED,
            Self::Queue(error) => queue_status(error),
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::Overloaded
            | Self::ColdStartQueueFull(_)
            | Self::NotReady(..)
            | Self::DoesNotStart(..)
            | Self::UnconfirmedLimit(..) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Provider(_) | Self::CredentialsRefused(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NotImplemented(_) => StatusCode::NOT_IMPLEMENTED,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Body(RequestBodyError::TimedOut) => StatusCode::REQUEST_TIMEOUT,
            Self::Body(RequestBodyError::ClientDisconnected) => client_closed_request(),
            Self::Upstream(error) => upstream_status(error),
            Self::ResponseBody(ResponseBodyError::Aborted(_)) => StatusCode::BAD_GATEWAY,
            Self::ResponseBody(ResponseBodyError::TimedOut) => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Returns the headers of the error response.
    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        match self {
            Self::Overloaded
            | Self::ColdStartQueueFull(_)
            | Self::NotReady(..)
            | Self::UnconfirmedLimit(..)
            | Self::Upstream(client::Error::Exhausted(_))
            | Self::Queue(
                queue::Error::Full
                | queue::Error::Unreachable
                | queue::Error::Unconfirmed
                | queue::Error::Failed,
            ) => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // The end of the body is unknown, and so is the start of the next request.
            Self::TransferCoding(_) => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Self::MethodNotAllowed(allow) => {
                headers.insert(ALLOW, HeaderValue::from_static(allow));
            }
            Self::DoesNotStart(..) => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("30"));
                headers.insert(X_GATEWAY_REASON, DOES_NOT_START);
            }
            Self::Unauthorized => {
                let realm = HeaderValue::from_static("Basic realm=\"Restricted\"");
                headers.insert(http::header::WWW_AUTHENTICATE, realm);
            }
            _ => {}
        }
        headers
    }

    /// Returns details that only operators may see.
    fn operator_details(&self) -> Option<String> {
        let Self::DoesNotStart(_, failure) = self else { return None };
        let StartFailure { starts, reason, last_output } = &**failure;
        let output = match last_output.as_str() {
            "" => "no output".to_owned(),
            line => format!("last line of its output: {line}"),
        };
        Some(format!("the last of {starts} starts ended with {reason}; {output}"))
    }

    /// Returns the error response. Its text has the call id, if there is one.
    pub fn response(&self, call_id: Option<&HeaderValue>) -> Response<String> {
        self.response_for(call_id, false)
    }

    /// Returns the error response. Its text has the call id, if there is one. `operator`: the client may see the
    /// details.
    pub fn response_for(&self, call_id: Option<&HeaderValue>, operator: bool) -> Response<String> {
        let status = self.status();
        let call_id = call_id.and_then(|id| id.to_str().ok());
        tracing::debug!(call_id, %status, error = %ErrorChain(self), "Request failed");
        let mut text = self.to_string();
        if let Some(details) = self.operator_details().filter(|_| operator) {
            text = format!("{text}: {details}");
        }
        let text = match call_id {
            Some(id) => format!("{text} (call {id})\n"),
            None => format!("{text}\n"),
        };
        let mut response = Response::new(text);
        *response.status_mut() = status;
        *response.headers_mut() = self.headers();
        response
    }
}

impl From<provider::Error> for Error {
    fn from(error: provider::Error) -> Self {
        match error {
            provider::Error::NoSuchFunction(function) => Self::NoSuchFunction(function),
            provider::Error::InvalidPath(path) => Self::BadRequest(format!("no such path: {path}")),
            provider::Error::CredentialsRefused(status) => Self::CredentialsRefused(status),
            provider::Error::Response(text) => Self::Provider(text),
            provider::Error::Upstream(error) => Self::Upstream(error),
            provider::Error::ResponseBody(error) => Self::ResponseBody(error),
        }
    }
}

/// Returns 499 (nginx): the client closed the connection before the response.
pub fn client_closed_request() -> StatusCode {
    StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST)
}

fn upstream_status(error: &client::Error) -> StatusCode {
    match error {
        client::Error::Timeout => StatusCode::GATEWAY_TIMEOUT,
        client::Error::RequestBody(RequestBodyError::Malformed) => StatusCode::BAD_REQUEST,
        client::Error::RequestBody(RequestBodyError::TimedOut) => StatusCode::REQUEST_TIMEOUT,
        client::Error::RequestBody(RequestBodyError::ClientDisconnected) => client_closed_request(),
        client::Error::InvalidTarget(_) => StatusCode::URI_TOO_LONG,
        client::Error::Exhausted(_) => StatusCode::SERVICE_UNAVAILABLE,
        client::Error::Connect(_)
        | client::Error::NotAllowed
        | client::Error::OwnAddress
        | client::Error::Closed(_)
        | client::Error::HeadTooLarge
        | client::Error::InvalidResponse(_)
        | client::Error::UnexpectedUpgrade => StatusCode::BAD_GATEWAY,
    }
}

fn queue_status(error: &queue::Error) -> StatusCode {
    match error {
        queue::Error::Full
        | queue::Error::Unreachable
        | queue::Error::Unconfirmed
        | queue::Error::Failed => StatusCode::SERVICE_UNAVAILABLE,
        queue::Error::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        queue::Error::Gone => StatusCode::NOT_FOUND,
        queue::Error::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
        queue::Error::HeadTooLarge(_) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
    }
}

impl axum::response::IntoResponse for Error {
    fn into_response(self) -> axum::response::Response {
        self.response(None).map(axum::body::Body::from)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    const CAUSE: &str = "invalid peer certificate: UnknownIssuer";

    fn tls_failed() -> client::Error {
        client::Error::Connect(io::Error::new(io::ErrorKind::InvalidData, CAUSE))
    }

    #[test]
    fn the_log_has_causes_that_the_response_does_not_have() {
        let error = Error::from(tls_failed());
        assert_eq!(error.to_string(), "cannot connect to the upstream: TLS failed");
        assert_eq!(error.response(None).into_body(), format!("{error}\n"));
        assert_eq!(ErrorChain(&error).to_string(), format!("{error}: {CAUSE}"));
    }

    #[test]
    fn the_output_of_a_function_is_for_operators_only() {
        let failure = StartFailure {
            starts: 3,
            reason: "exit status: 1".to_owned(),
            last_output: "no such key: s3cret".to_owned(),
        };
        let function = Function::parse("f", "fn").unwrap();
        let error = Error::DoesNotStart(function, failure.into());
        assert_eq!(error.response(None).into_body(), "function f.fn does not start\n");
        assert!(!ErrorChain(&error).to_string().contains("s3cret"));
        let cause_text = error.response_for(None, true);
        assert_eq!(
            (cause_text.status().as_u16(), &cause_text.headers()[X_GATEWAY_REASON]),
            (503, &DOES_NOT_START)
        );
        assert!(
            cause_text.body().contains("exit status: 1") && cause_text.body().contains("s3cret")
        );
    }

    #[test]
    fn a_cause_is_not_displayed_twice() {
        #[derive(Debug, thiserror::Error)]
        #[error("not sent: {0}")]
        struct Unsent(#[source] client::Error);
        let error = Unsent(tls_failed());
        assert_eq!(ErrorChain(&error).to_string(), format!("{error}: {CAUSE}"));
        assert_eq!(ErrorChain(&Error::Overloaded).to_string(), Error::Overloaded.to_string());
    }
}
