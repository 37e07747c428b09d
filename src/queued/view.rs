//! What callers and operators are shown of queued calls.

use axum::body::Body;
use axum::response::Response;
use http::{HeaderName, HeaderValue, StatusCode};
use jiff::Timestamp;
use serde::Serialize;

use crate::queue::call::UnixMillis;
use crate::queue::status::{self, CallRecord, StoredResponse};

/// In an answer: the function's own status.
const X_FUNCTION_STATUS: HeaderName = HeaderName::from_static("x-function-status");
/// In an answer: its body was longer than what is kept.
pub(super) const X_TRUNCATED: HeaderName = HeaderName::from_static("x-truncated");

/// The state of a call, as JSON. Times are RFC 3339.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
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
    /// It can be tried again on request.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dead: bool,
}

impl<'a> State<'a> {
    pub fn of(status: &'a CallRecord) -> Self {
        Self {
            call_id: &status.id,
            function: &status.function,
            state: word(status.state),
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

/// A state as it is written.
pub fn word(state: status::CallState) -> &'static str {
    match state {
        status::CallState::Queued => "queued",
        status::CallState::Running => "running",
        status::CallState::Retrying => "retrying",
        status::CallState::Succeeded => "succeeded",
        status::CallState::Failed => "failed",
        status::CallState::Cancelled => "cancelled",
    }
}

/// The state that `word` names.
pub fn state(word: &str) -> Option<status::CallState> {
    use status::CallState::{Cancelled, Failed, Queued, Retrying, Running, Succeeded};
    [Queued, Running, Retrying, Succeeded, Failed, Cancelled]
        .into_iter()
        .find(|state| self::word(*state) == word)
}

fn time(at: UnixMillis) -> Option<String> {
    let at = Timestamp::from_millisecond(i64::try_from(at).ok()?).ok()?;
    Some(format!("{at:.3}"))
}

/// A stored answer, as the function gave it; its status is told beside it, since this one says that there is an answer.
pub fn answer(answer: StoredResponse) -> Response {
    let mut response = Response::new(Body::from(answer.body));
    let headers = response.headers_mut();
    for (name, value) in &answer.headers {
        let name = HeaderName::from_bytes(name.as_bytes());
        let value = HeaderValue::from_str(value);
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    headers.remove(http::header::CONTENT_LENGTH);
    headers.insert(X_FUNCTION_STATUS, HeaderValue::from(answer.status));
    if answer.truncated {
        headers.insert(X_TRUNCATED, HeaderValue::from_static("true"));
    }
    *response.status_mut() = StatusCode::OK;
    response
}
