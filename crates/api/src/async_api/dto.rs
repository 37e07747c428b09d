//! Queued calls as JSON and as responses, for clients and operators.

use axum::body::Body;
use axum::response::Response;
use http::{HeaderName, HeaderValue, StatusCode};
use jiff::Timestamp;
use serde::Serialize;

use gateway_http::names::{X_FUNCTION_STATUS, X_TRUNCATED};
use gateway_queue::call::UnixMillis;
use gateway_queue::status::{self, CallRecord, StoredResponse};

/// A call's state as JSON. Times are in RFC 3339.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CallStateDto<'a> {
    call_id: &'a str,
    function: &'a str,
    state: &'static str,
    attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    submitted_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finished_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_attempt_at: Option<String>,
    /// The call is a dead letter, which can be redriven.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dead: bool,
}

impl<'a> CallStateDto<'a> {
    pub fn of(status: &'a CallRecord) -> Self {
        Self {
            call_id: &status.id,
            function: &status.function,
            state: state_name(status.state),
            attempts: status.attempts,
            status: status.status,
            reason: status.reason.as_deref(),
            submitted_at: time(status.submitted_at),
            started_at: status.started_at.and_then(time),
            finished_at: status.finished_at.and_then(time),
            next_attempt_at: status.next_attempt_at.and_then(time),
            dead: status.dead_letter,
        }
    }
}

/// Returns the name of a state.
pub fn state_name(state: status::CallState) -> &'static str {
    match state {
        status::CallState::Queued => "queued",
        status::CallState::Running => "running",
        status::CallState::Retrying => "retrying",
        status::CallState::Succeeded => "succeeded",
        status::CallState::Failed => "failed",
        status::CallState::Cancelled => "cancelled",
    }
}

/// Returns the state with the given name.
pub fn parse_state(name: &str) -> Option<status::CallState> {
    use status::CallState::{Cancelled, Failed, Queued, Retrying, Running, Succeeded};
    [Queued, Running, Retrying, Succeeded, Failed, Cancelled]
        .into_iter()
        .find(|state| state_name(*state) == name)
}

fn time(at: UnixMillis) -> Option<String> {
    let at = Timestamp::from_millisecond(i64::try_from(at).ok()?).ok()?;
    Some(format!("{at:.3}"))
}

/// Returns a stored response as the function sent it. Its status is in a header, since the status of this response
/// says that there is a result.
pub fn result_response(stored: StoredResponse) -> Response {
    let mut response = Response::new(Body::from(stored.body));
    let headers = response.headers_mut();
    for (name, value) in &stored.headers {
        let name = HeaderName::from_bytes(name.as_bytes());
        let value = HeaderValue::from_str(value);
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    headers.remove(http::header::CONTENT_LENGTH);
    headers.insert(X_FUNCTION_STATUS, HeaderValue::from(stored.status));
    if stored.truncated {
        headers.insert(X_TRUNCATED, HeaderValue::from_static("true"));
    }
    *response.status_mut() = StatusCode::OK;
    response
}
