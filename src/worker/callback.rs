//! Callbacks: how a queued call ended, told to the URL that its caller gave.
//!
//! The URL is a stranger's, so each attempt resolves its host anew and connects to no address that `allow` refuses;
//! connections are not kept, redirects not followed, and nothing of the receiver's answer but its head is read.

pub mod signature;
pub mod target;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, EXPECT, HOST, RETRY_AFTER, TRAILER, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use uuid::Uuid;

use crate::call_id::{PRODUCT, X_CALL_ID};
use crate::config::Idle;
use crate::config::allow::Allow;
use crate::error::Causes;
use crate::proxy::body::RequestBody;
use crate::proxy::client::{self, Client, Tls};
use crate::proxy::headers;
use crate::proxy::upstream_body::UpstreamBody;
use crate::trace::context::{TRACEPARENT, TRACESTATE};
use crate::watch::Watch;
use crate::worker::callback::signature::Secret;
use crate::worker::callback::target::{Invalid, Target};
use crate::worker::retry;

const X_DURATION_SECONDS: HeaderName = HeaderName::from_static("x-duration-seconds");
const X_FUNCTION_STATUS: HeaderName = HeaderName::from_static("x-function-status");
const X_FUNCTION_NAME: HeaderName = HeaderName::from_static("x-function-name");
const X_RETRY: HeaderName = HeaderName::from_static("x-retry");
const X_RETRY_MAX: HeaderName = HeaderName::from_static("x-retry-max");
const X_TRUNCATED: HeaderName = HeaderName::from_static("x-truncated");
const X_CALLBACK_SIGNATURE: HeaderName = HeaderName::from_static("x-callback-signature");

/// No connection is kept: one that is used again would skip the judgement of its address.
const KEEP_NONE: Idle = Idle { all: 0, per_host: 0 };

/// How a call ended.
#[derive(Clone, Debug)]
pub struct Report {
    pub call_id: String,
    /// The function as its caller named it.
    pub function: String,
    /// What it answered; 503 if it was out of reach.
    pub status: u16,
    /// The headers of its answer, as they came.
    pub headers: HeaderMap,
    pub body: Bytes,
    /// The body was longer.
    pub truncated: bool,
    /// Since the call was taken from the queue.
    pub took: Duration,
    /// How often the function was called, and how often it would have been at most.
    pub attempts: u32,
    pub max_attempts: u32,
    /// The trace that the call belongs to, in headers.
    pub trace: HeaderMap,
}

/// How patiently a callback is sent.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// In all, the first one included.
    pub attempts: u32,
    /// For one attempt, from the look-up of the name to the head of the answer.
    pub timeout: Duration,
    /// The pause between two attempts doubles from the first to the second; less by chance.
    pub min_wait: Duration,
    pub max_wait: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            attempts: 6,
            timeout: Duration::from_secs(10),
            min_wait: Duration::from_secs(1),
            max_wait: Duration::from_secs(30),
        }
    }
}

/// Why a callback was not delivered. Says nothing about where it went.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("the callback was answered with {status} ({attempts} attempts)")]
    Answered { status: StatusCode, attempts: u32 },
    #[error("the callback could not be sent ({attempts} attempts): {last}")]
    Unsent {
        attempts: u32,
        #[source]
        last: client::Error,
    },
}

/// Sends callbacks.
pub struct Callbacks {
    client: Arc<Client>,
    allow: Arc<Allow>,
    secret: Option<Secret>,
    pace: Pace,
}

impl Callbacks {
    /// Callbacks to where `allow` permits, signed if there is a secret.
    pub fn new(allow: Allow, secret: Option<Secret>, pace: Pace, tls: Tls) -> Self {
        let allow = Arc::new(allow);
        let judge = Arc::clone(&allow);
        let client =
            Client::guarded(KEEP_NONE, tls, move |host, address| judge.permits(host, address));
        Self { client, allow, secret, pace }
    }

    /// Sends `report` to `url`, and returns once it has been taken, or will not be.
    ///
    /// # Errors
    /// When the receiver refuses it for good, may not be called, or took none of the attempts.
    pub async fn send(&self, url: &str, report: &Report) -> Result<(), Error> {
        let target = Target::parse(url, &self.allow)?;
        let headers = self.headers(&target, report);
        for attempts in 1.. {
            let outcome = self.attempt(&target, headers.clone(), report.body.clone()).await;
            let last_one = attempts >= self.pace.attempts;
            let asked = match outcome {
                Ok(answer) => match verdict(answer.status()) {
                    Verdict::Taken => return Ok(()),
                    Verdict::Again if !last_one => asked_pause(&answer),
                    Verdict::Again | Verdict::Refused => {
                        return Err(Error::Answered { status: answer.status(), attempts });
                    }
                },
                Err(client::Error::NotAllowed) => return Err(Invalid::NotAllowed.into()),
                Err(last) if last_one => return Err(Error::Unsent { attempts, last }),
                Err(error) => {
                    let id = &report.call_id;
                    tracing::debug!(call_id = id, %target, error = %Causes(&error), attempts, "A callback was not sent");
                    Duration::ZERO
                }
            };
            let Pace { min_wait, max_wait, .. } = self.pace;
            let pause = retry::backoff(min_wait, max_wait, attempts, random());
            tokio::time::sleep(pause.max(asked.min(max_wait))).await;
        }
        unreachable!("one attempt is the last")
    }

    async fn attempt(
        &self,
        target: &Target,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response<UpstreamBody>, client::Error> {
        let body = Some(body).filter(|body| !body.is_empty());
        let mut request = Request::new(RequestBody::Full(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = target.uri.clone();
        *request.headers_mut() = headers;
        let watch = Arc::new(Watch::new());
        watch.call_until(Instant::now() + self.pace.timeout);
        let answered = self.client.send(&target.origin, request, &watch);
        match tokio::time::timeout(self.pace.timeout, answered).await {
            Ok(answered) => answered,
            Err(_) => Err(client::Error::Timeout),
        }
    }

    /// The function's headers, made those of a request, with ours.
    fn headers(&self, target: &Target, report: &Report) -> HeaderMap {
        let mut headers = report.headers.clone();
        headers::to_caller(&mut headers, false);
        // What frames the body or steers a request is not the function's to say; nor is that a signature is ours.
        const NOT_THE_FUNCTIONS: [HeaderName; 7] = [
            CONTENT_LENGTH,
            TRAILER,
            EXPECT,
            X_CALLBACK_SIGNATURE,
            X_TRUNCATED,
            TRACEPARENT,
            TRACESTATE,
        ];
        for name in NOT_THE_FUNCTIONS {
            headers.remove(name);
        }
        if report.truncated {
            headers.insert(X_TRUNCATED, HeaderValue::from_static("true"));
        }
        headers.insert(HOST, target.origin.host.clone());
        headers.insert(USER_AGENT, PRODUCT);
        if let Some(authorization) = &target.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        if let Some(secret) = &self.secret {
            headers.insert(X_CALLBACK_SIGNATURE, secret.sign(&report.body));
        }
        headers.extend(report.trace.clone());
        headers.insert(X_CALL_ID, text(&report.call_id));
        headers.insert(X_FUNCTION_NAME, text(&report.function));
        headers.insert(X_FUNCTION_STATUS, report.status.into());
        headers.insert(X_DURATION_SECONDS, text(&format!("{:.6}", report.took.as_secs_f64())));
        headers.insert(X_RETRY, report.attempts.into());
        headers.insert(X_RETRY_MAX, report.max_attempts.into());
        headers
    }
}

/// What a receiver's answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Taken,
    Refused,
    Again,
}

fn verdict(status: StatusCode) -> Verdict {
    match status.as_u16() {
        200..300 => Verdict::Taken,
        408 | 425 | 429 => Verdict::Again,
        // Redirects are not followed: they could lead to where callbacks may not go.
        300..500 => Verdict::Refused,
        _ => Verdict::Again,
    }
}

/// The pause that the receiver asks for.
fn asked_pause(answer: &Response<UpstreamBody>) -> Duration {
    let value = answer.headers().get(RETRY_AFTER);
    value.and_then(|v| retry::parse_retry_after(v, SystemTime::now())).unwrap_or_default()
}

/// `value` as a header's, empty if it cannot be one.
fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// A number from 0 up to 1, by chance.
pub fn random() -> f64 {
    const BITS: u32 = 53;
    // Of a UUID of version 4 the last 62 bits are drawn.
    let drawn = Uuid::new_v4().as_u128() & ((1 << BITS) - 1);
    drawn as f64 / (1_u64 << BITS) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_final_or_not() {
        for (status, expect) in [
            (200, Verdict::Taken),
            (204, Verdict::Taken),
            (302, Verdict::Refused),
            (400, Verdict::Refused),
            (404, Verdict::Refused),
            (408, Verdict::Again),
            (410, Verdict::Refused),
            (425, Verdict::Again),
            (429, Verdict::Again),
            (500, Verdict::Again),
            (503, Verdict::Again),
        ] {
            assert_eq!(verdict(StatusCode::from_u16(status).unwrap()), expect, "{status}");
        }
    }

    #[test]
    fn chance_is_between_nothing_and_all() {
        let drawn: Vec<f64> = (0..100).map(|_| random()).collect();
        assert!(drawn.iter().all(|drawn| (0.0..1.0).contains(drawn)), "{drawn:?}");
        assert!(drawn.iter().any(|drawn| *drawn < 0.5) && drawn.iter().any(|drawn| *drawn > 0.5));
    }
}
