//! Queued calls as messages of a channel, those of the Go gateway included. No I/O.
//!
//! What the Go gateway's format has no member for goes into headers of our own, which the function is not told and which
//! a Go worker takes for any others.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Value};

use crate::call_id::{X_CALL_ID, X_START_TIME};
use crate::function::{Function, has_dot_segment};
use crate::proxy::headers::end_to_end;
use crate::queue::call::{CallOptions, MAX_HEADERS, QueuedCall, UnixMillis};
use crate::queue::stan::callback::{CallbackUrl, escaped};
use crate::queue::stan::payload::{Payload, canonical};

const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_CALLBACK_URL: HeaderName = HeaderName::from_static("x-callback-url");
/// What a client wants of its call. Our gateways heed these headers; Go gateways pass them on.
const X_DELAY_SECONDS: HeaderName = HeaderName::from_static("x-delay-seconds");
const X_EXPIRES_SECONDS: HeaderName = HeaderName::from_static("x-expires-seconds");
const X_MAX_ATTEMPTS: HeaderName = HeaderName::from_static("x-max-attempts");
const REQUESTED: [HeaderName; 3] = [X_DELAY_SECONDS, X_EXPIRES_SECONDS, X_MAX_ATTEMPTS];
/// The longest delay and life that can be asked for, in seconds, and the most attempts.
const LONGEST: u64 = 366 * 24 * 3600;
const MOST_REQUESTED: u32 = 1000;
const ATTEMPTS: HeaderName = HeaderName::from_static("x-gateway-attempts");
const NOT_BEFORE: HeaderName = HeaderName::from_static("x-gateway-not-before");
const EXPIRES_AT: HeaderName = HeaderName::from_static("x-gateway-expires-at");
const MAX_ATTEMPTS: HeaderName = HeaderName::from_static("x-gateway-max-attempts");
const REASON: HeaderName = HeaderName::from_static("x-gateway-reason");
const MOVES: HeaderName = HeaderName::from_static("x-gateway-moves");
const OURS: [HeaderName; 6] = [ATTEMPTS, NOT_BEFORE, EXPIRES_AT, MAX_ATTEMPTS, REASON, MOVES];

/// No call is made so often: a message of somebody else's says what it likes.
const MOST_ATTEMPTS: u32 = 1_000_000;

/// Why a message is no call.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    #[error("it is not JSON of the kind that is queued")]
    Json(#[from] serde_json::Error),
    #[error("its body is not base64")]
    Body(#[from] base64::DecodeError),
    #[error("its {0} is not valid")]
    Invalid(&'static str),
}

/// How far a call has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// How often it has been made.
    pub(super) attempts: u32,
    /// It is not made before.
    pub(super) not_before: Option<UnixMillis>,
    /// Why it was given up.
    pub(super) reason: Option<String>,
    /// How often it was moved to another channel, or back from the dead: tells its messages from duplicates of them.
    pub(super) moves: u32,
    /// Members of its message that mean nothing to us, and may to others.
    pub(super) others: Map<String, Value>,
}

/// The message that `call` is.
pub(super) fn encode(call: &QueuedCall, progress: &Progress) -> Bytes {
    let mut headers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in &call.headers {
        if !OURS.contains(name) && *name != CONTENT_LENGTH {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            headers.entry(canonical(name.as_str())).or_default().push(value);
        }
    }
    let mut say = |name: &HeaderName, value: Option<String>| {
        if let Some(value) = value {
            headers.insert(canonical(name.as_str()), vec![value]);
        }
    };
    say(&CONTENT_LENGTH, Some(call.body.len().to_string()));
    say(&X_CALL_ID, Some(call.id.clone()));
    say(&ATTEMPTS, some(progress.attempts).filter(|_| progress.attempts > 0));
    say(&MOVES, some(progress.moves).filter(|_| progress.moves > 0));
    say(&NOT_BEFORE, progress.not_before.and_then(some));
    say(&REASON, progress.reason.clone());
    say(&EXPIRES_AT, call.options.expires_at.and_then(some));
    say(&MAX_ATTEMPTS, call.options.max_attempts.and_then(some));
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
        callback_url: call.options.callback.as_deref().and_then(CallbackUrl::of),
        others: progress.others.clone(),
    };
    payload.to_json()
}

/// The call that a message is, and how far it has come. `fresh_id` is its id if it has none. It was `stored_at`: that is
/// when it was submitted if it does not say, and its delay counts from there.
pub(super) fn decode(
    message: &[u8],
    default_namespace: &str,
    fresh_id: impl FnOnce() -> String,
    stored_at: UnixMillis,
) -> Result<(QueuedCall, Progress), Unreadable> {
    let mut payload = Payload::of_json(message)?;
    let function = Function::parse(&payload.function, default_namespace);
    let function = function.ok_or(Unreadable::Invalid("function"))?;
    let mut headers = headers(&payload)?;
    let progress = Progress {
        attempts: number::<u32>(&headers, &ATTEMPTS).unwrap_or_default().min(MOST_ATTEMPTS),
        not_before: number(&headers, &NOT_BEFORE),
        reason: headers.get(&REASON).map(|it| String::from_utf8_lossy(it.as_bytes()).into_owned()),
        moves: number(&headers, &MOVES).unwrap_or_default(),
        others: std::mem::take(&mut payload.others),
    };
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let written = text(&X_CALLBACK_URL);
    let callback = payload.callback_url.as_ref().map(|url| url.url(written));
    let nanoseconds: Option<u64> = number(&headers, &X_START_TIME);
    let id = text(&X_CALL_ID).filter(|id| !id.is_empty()).map_or_else(fresh_id, str::to_owned);
    let after = |name: &HeaderName| -> Option<UnixMillis> {
        let seconds = number::<u64>(&headers, name).filter(|seconds| *seconds <= LONGEST)?;
        Some(stored_at.saturating_add(seconds * 1000))
    };
    let most = number(&headers, &X_MAX_ATTEMPTS).filter(|it| (1..=MOST_REQUESTED).contains(it));
    let options = CallOptions {
        callback,
        submitted_at: nanoseconds.map_or(stored_at, |time| time / 1_000_000),
        not_before: after(&X_DELAY_SECONDS).filter(|at| *at > stored_at),
        expires_at: number(&headers, &EXPIRES_AT).or_else(|| after(&X_EXPIRES_SECONDS)),
        max_attempts: number(&headers, &MAX_ATTEMPTS).or(most),
        ..CallOptions::default()
    };
    for name in OURS.into_iter().chain(REQUESTED) {
        headers.remove(name);
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(X_CALL_ID, id);
    }
    let target = target(&payload)?;
    let body = STANDARD.decode(payload.body.unwrap_or_default())?.into();
    Ok((QueuedCall { id, function, target, headers, body, options }, progress))
}

/// The id that a message names which is no call that can be made: for the log.
pub(super) fn id_in(message: &[u8]) -> Option<String> {
    let mut headers = Payload::of_json(message).ok()?.header?.into_iter();
    let (_, ids) = headers.find(|(name, _)| name.eq_ignore_ascii_case(X_CALL_ID.as_str()))?;
    ids.into_iter().next()
}

fn some(value: impl Display) -> Option<String> {
    Some(value.to_string())
}

fn number<T: FromStr>(headers: &HeaderMap, name: &HeaderName) -> Option<T> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// The headers that are meant for the function.
fn headers(payload: &Payload) -> Result<HeaderMap, Unreadable> {
    let mut headers = HeaderMap::new();
    if payload.header.iter().flatten().map(|(_, values)| values.len()).sum::<usize>() > MAX_HEADERS
    {
        return Err(Unreadable::Invalid("number of headers"));
    }
    for (name, values) in payload.header.iter().flatten() {
        let name = HeaderName::from_bytes(name.as_bytes());
        let name = name.map_err(|_| Unreadable::Invalid("header"))?;
        for value in values {
            let value = HeaderValue::from_bytes(value.as_bytes());
            headers.append(&name, value.map_err(|_| Unreadable::Invalid("header"))?);
        }
    }
    // Nothing is to be changed over to.
    if end_to_end(&mut headers).is_some() {
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

/// Path and query behind the function's name. The Go gateway decodes the path, so it may have anything in it.
fn target(payload: &Payload) -> Result<String, Unreadable> {
    let path =
        escaped(&payload.path, |byte| byte.is_ascii_graphic() && !b"?#\"<>\\^`{|}".contains(&byte));
    let separator = if path.is_empty() || path.starts_with('/') { "" } else { "/" };
    let query = escaped(&payload.query_string, |byte| byte.is_ascii_graphic() && byte != b'#');
    let mark = if query.is_empty() { "" } else { "?" };
    if has_dot_segment(&path) {
        return Err(Unreadable::Invalid("path"));
    }
    Ok(format!("{separator}{path}{mark}{query}"))
}

#[cfg(test)]
mod tests;
