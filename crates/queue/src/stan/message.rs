//! Encoding and decoding of queued calls as channel messages, including those of the Go gateway. No I/O.
//!
//! Data for which the Go gateway's format has no member is in additional headers. They are not passed to the function,
//! and a Go worker treats them as ordinary headers.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Value};

use crate::call::{CallOptions, MAX_HEADERS, QueuedCall, UnixMillis};
use crate::stan::callback::{CallbackUrl, percent_encode};
use crate::stan::payload::{Payload, canonical_header_name};
use gateway_base::function::{Function, has_dot_segment};
use gateway_http::headers::keep_end_to_end;
use gateway_http::names::{
    X_CALL_ID, X_CALLBACK_URL, X_DELAY_SECONDS, X_EXPIRES_SECONDS, X_FORWARDED_HOST,
    X_MAX_ATTEMPTS, X_START_TIME,
};

const OPTION_HEADERS: [HeaderName; 3] = [X_DELAY_SECONDS, X_EXPIRES_SECONDS, X_MAX_ATTEMPTS];
/// Maximum delay and time to expiry that can be requested, in seconds, and maximum number of attempts.
const MAX_SECONDS: u64 = 366 * 24 * 3600;
const MAX_REQUESTED_ATTEMPTS: u32 = 1000;
const ATTEMPTS: HeaderName = HeaderName::from_static("x-gateway-attempts");
const NOT_BEFORE: HeaderName = HeaderName::from_static("x-gateway-not-before");
const EXPIRES_AT: HeaderName = HeaderName::from_static("x-gateway-expires-at");
const MAX_ATTEMPTS: HeaderName = HeaderName::from_static("x-gateway-max-attempts");
const REASON: HeaderName = HeaderName::from_static("x-gateway-reason");
const MOVES: HeaderName = HeaderName::from_static("x-gateway-moves");
const GATEWAY_HEADERS: [HeaderName; 6] =
    [ATTEMPTS, NOT_BEFORE, EXPIRES_AT, MAX_ATTEMPTS, REASON, MOVES];

/// Maximum of the stored number of attempts: other programs can write any number.
const MAX_STORED_ATTEMPTS: u32 = 1_000_000;

/// Why a message cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub(super) enum DecodeError {
    #[error("the message is not a queued call in JSON")]
    Json(#[from] serde_json::Error),
    #[error("the body is not base64")]
    Body(#[from] base64::DecodeError),
    #[error("invalid {0}")]
    Invalid(&'static str),
}

/// Progress of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Number of attempts so far.
    pub(super) attempts: u32,
    /// It is not executed before this time.
    pub(super) not_before: Option<UnixMillis>,
    /// Why it became a dead letter.
    pub(super) reason: Option<String>,
    /// Number of moves to another channel and of redrives: distinguishes its messages from their duplicates.
    pub(super) moves: u32,
    /// Members of its message that this gateway does not know, but others may.
    pub(super) unknown_members: Map<String, Value>,
}

/// Encodes `call` as a message.
pub(super) fn encode(call: &QueuedCall, progress: &Progress) -> Bytes {
    let mut headers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in &call.headers {
        if !GATEWAY_HEADERS.contains(name) && *name != CONTENT_LENGTH {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            headers.entry(canonical_header_name(name.as_str())).or_default().push(value);
        }
    }
    let mut set = |name: &HeaderName, value: Option<String>| {
        if let Some(value) = value {
            headers.insert(canonical_header_name(name.as_str()), vec![value]);
        }
    };
    set(&CONTENT_LENGTH, Some(call.body.len().to_string()));
    set(&X_CALL_ID, Some(call.id.clone()));
    set(&ATTEMPTS, to_text(progress.attempts).filter(|_| progress.attempts > 0));
    set(&MOVES, to_text(progress.moves).filter(|_| progress.moves > 0));
    set(&NOT_BEFORE, progress.not_before.and_then(to_text));
    set(&REASON, progress.reason.clone());
    set(&EXPIRES_AT, call.options.expires_at.and_then(to_text));
    set(&MAX_ATTEMPTS, call.options.max_attempts.and_then(to_text));
    let host = call.headers.get(X_FORWARDED_HOST).and_then(|host| host.to_str().ok());
    let (path, query) = call.target.split_once('?').unwrap_or((&call.target, ""));
    let payload = Payload {
        header: Some(headers),
        host: host.unwrap_or_default().to_owned(),
        body: (!call.body.is_empty()).then(|| STANDARD.encode(&call.body)),
        method: "POST".to_owned(),
        path: path.to_owned(),
        query_string: query.to_owned(),
        function: call.function.to_string(),
        callback_url: call.options.callback.as_deref().and_then(CallbackUrl::parse),
        unknown_members: progress.unknown_members.clone(),
    };
    payload.to_json()
}

/// Decodes a call and its progress. `fresh_id` supplies an id if the message has none. `stored_at` is the time of
/// submission if the message has none, and the start of a requested delay.
///
/// # Errors
/// When the message is not a valid call.
pub(super) fn decode(
    message: &[u8],
    default_namespace: &str,
    fresh_id: impl FnOnce() -> String,
    stored_at: UnixMillis,
) -> Result<(QueuedCall, Progress), DecodeError> {
    let mut payload = Payload::from_json(message)?;
    let function = Function::parse(&payload.function, default_namespace);
    let function = function.ok_or(DecodeError::Invalid("function"))?;
    let mut headers = function_headers(&payload)?;
    let progress = Progress {
        attempts: parse_header::<u32>(&headers, &ATTEMPTS)
            .unwrap_or_default()
            .min(MAX_STORED_ATTEMPTS),
        not_before: parse_header(&headers, &NOT_BEFORE),
        reason: headers
            .get(&REASON)
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()),
        moves: parse_header(&headers, &MOVES).unwrap_or_default(),
        unknown_members: std::mem::take(&mut payload.unknown_members),
    };
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let written = text(&X_CALLBACK_URL);
    let callback = payload.callback_url.as_ref().map(|url| url.to_url(written));
    let nanoseconds: Option<u64> = parse_header(&headers, &X_START_TIME);
    let id = text(&X_CALL_ID).filter(|id| !id.is_empty()).map_or_else(fresh_id, str::to_owned);
    let after = |name: &HeaderName| -> Option<UnixMillis> {
        let seconds =
            parse_header::<u64>(&headers, name).filter(|seconds| *seconds <= MAX_SECONDS)?;
        Some(stored_at.saturating_add(seconds * 1000))
    };
    let requested_attempts = parse_header(&headers, &X_MAX_ATTEMPTS)
        .filter(|attempts| (1..=MAX_REQUESTED_ATTEMPTS).contains(attempts));
    let options = CallOptions {
        callback,
        submitted_at: nanoseconds.map_or(stored_at, |time| time / 1_000_000),
        not_before: after(&X_DELAY_SECONDS).filter(|at| *at > stored_at),
        expires_at: parse_header(&headers, &EXPIRES_AT).or_else(|| after(&X_EXPIRES_SECONDS)),
        max_attempts: parse_header(&headers, &MAX_ATTEMPTS).or(requested_attempts),
        ..CallOptions::default()
    };
    for name in GATEWAY_HEADERS.into_iter().chain(OPTION_HEADERS) {
        headers.remove(name);
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(X_CALL_ID, id);
    }
    let target = target(&payload)?;
    let body = STANDARD.decode(payload.body.unwrap_or_default())?.into();
    Ok((QueuedCall { id, function, target, headers, body, options }, progress))
}

/// Returns the call id in a message that cannot be decoded, for logs.
pub(super) fn call_id_in(message: &[u8]) -> Option<String> {
    let mut headers = Payload::from_json(message).ok()?.header?.into_iter();
    let (_, ids) = headers.find(|(name, _)| name.eq_ignore_ascii_case(X_CALL_ID.as_str()))?;
    ids.into_iter().next()
}

fn to_text(value: impl Display) -> Option<String> {
    Some(value.to_string())
}

fn parse_header<T: FromStr>(headers: &HeaderMap, name: &HeaderName) -> Option<T> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// Returns the headers for the function.
fn function_headers(payload: &Payload) -> Result<HeaderMap, DecodeError> {
    let mut headers = HeaderMap::new();
    if payload.header.iter().flatten().map(|(_, values)| values.len()).sum::<usize>() > MAX_HEADERS
    {
        return Err(DecodeError::Invalid("number of headers"));
    }
    for (name, values) in payload.header.iter().flatten() {
        let name = HeaderName::from_bytes(name.as_bytes());
        let name = name.map_err(|_| DecodeError::Invalid("header"))?;
        for value in values {
            let value = HeaderValue::from_bytes(value.as_bytes());
            headers.append(&name, value.map_err(|_| DecodeError::Invalid("header"))?);
        }
    }
    // A queued call cannot switch protocols.
    if keep_end_to_end(&mut headers).is_some() {
        headers.remove(http::header::UPGRADE);
        headers.remove(http::header::CONNECTION);
    }
    headers.remove(CONTENT_LENGTH);
    headers.remove(HOST);
    if let Ok(host) = HeaderValue::from_str(&payload.host)
        && !host.is_empty()
    {
        headers.entry(X_FORWARDED_HOST).or_insert(host);
    }
    Ok(headers)
}

/// Returns path and query after the function's name. The Go gateway decodes the path, so it may contain any character.
fn target(payload: &Payload) -> Result<String, DecodeError> {
    let path = percent_encode(&payload.path, |byte| {
        byte.is_ascii_graphic() && !b"?#\"<>\\^`{|}".contains(&byte)
    });
    let separator = if path.is_empty() || path.starts_with('/') { "" } else { "/" };
    let query =
        percent_encode(&payload.query_string, |byte| byte.is_ascii_graphic() && byte != b'#');
    let mark = if query.is_empty() { "" } else { "?" };
    if has_dot_segment(&path) {
        return Err(DecodeError::Invalid("path"));
    }
    Ok(format!("{separator}{path}{mark}{query}"))
}

#[cfg(test)]
mod tests;
