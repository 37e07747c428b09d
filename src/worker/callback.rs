//! Callbacks: how a queued call ended, told to the URL that its caller gave.
//!
//! The client chooses the URL, so each attempt resolves its host again and connects to no address that `allow` refuses,
//! and to none of the gateway's own; connections are not kept, redirects not followed, and only the head of the
//! receiver's response is read. A callback to a function of the gateway itself needs no connection ([`local`]).

mod headers;
pub mod local;
pub mod own;
pub mod signature;
pub mod target;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::header::RETRY_AFTER;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use uuid::Uuid;

use crate::chain;
use crate::config::PoolLimits;
use crate::config::allowlist::CallbackAllowlist;
use crate::error::ErrorChain;
use crate::proxy::body::RequestBody;
use crate::proxy::client::{self, Client, Tls};
use crate::proxy::guard::{Guard, Refused};
use crate::proxy::upstream_body::UpstreamBody;
use crate::queue::now;
use crate::watch::Watch;
use crate::worker::callback::local::{Local, Wish};
use crate::worker::callback::own::{Own, Whose};
use crate::worker::callback::signature::Secret;
use crate::worker::callback::target::{Invalid, Target};
use crate::worker::retry;

/// No connection is kept: one that is used again would skip the judgement of its address.
const KEEP_NONE: PoolLimits = PoolLimits { total: 0, per_host: 0 };

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
    /// How many callbacks in a row led to the call.
    pub callbacks: u32,
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
    #[error("it would be one of a chain of more than {} callbacks", chain::MAX)]
    CallbackLoop,
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
    secrets: Vec<Secret>,
    pace: Pace,
    local: Option<Local>,
}

/// Where callbacks may connect to.
struct Destinations {
    allow: CallbackAllowlist,
    own: Own,
}

impl Guard for Destinations {
    fn admit<'a>(
        &'a self,
        host: &'a str,
        addresses: Vec<SocketAddr>,
    ) -> BoxFuture<'a, Result<Vec<SocketAddr>, Refused>> {
        Box::pin(async move {
            match self.own.whose(host, &addresses).await {
                Whose::Gateway => return Err(Refused::Own),
                Whose::Guarded => return Err(Refused::NotAllowed),
                Whose::Others => {}
            }
            let permitted = addresses.into_iter().filter(|it| self.allow.permits(host, it.ip()));
            let permitted: Vec<_> = permitted.collect();
            if permitted.is_empty() { Err(Refused::NotAllowed) } else { Ok(permitted) }
        })
    }
}

/// What a receiver said.
struct Reply {
    status: StatusCode,
    /// The pause that it asks for.
    pause: Duration,
}

impl Callbacks {
    /// Callbacks to where `allow` permits and that is not `own`, signed with each of `secrets`.
    pub fn new(
        allow: CallbackAllowlist,
        own: Own,
        secrets: Vec<Secret>,
        pace: Pace,
        tls: Tls,
    ) -> Self {
        let client = Client::guarded(KEEP_NONE, tls, Destinations { allow, own });
        Self { client, secrets, pace, local: None }
    }

    /// Has callbacks to functions of the gateway itself executed by `local`; without it they are refused.
    #[must_use]
    pub fn with_local(self, local: Local) -> Self {
        Self { local: Some(local), ..self }
    }

    /// Sends `report` to `url`, and returns once it has been taken, or will not be.
    ///
    /// # Errors
    /// When the receiver refuses it for good, may not be called, or took none of the attempts.
    pub async fn send(&self, url: &str, report: &Report) -> Result<(), Error> {
        let target = Target::parse(url)?;
        let mut headers = headers::of(&target, report);
        let mut queued_as = None;
        for attempts in 1.. {
            // The same message each time, sent at another time.
            let now = now() / 1000;
            signature::sign(&self.secrets, &report.call_id, now, &report.body, &mut headers);
            let outcome = match self.attempt(&target, headers.clone(), report.body.clone()).await {
                Ok(answer) => Ok(Reply { status: answer.status(), pause: asked_pause(&answer) }),
                Err(client::Error::NotAllowed) => return Err(Invalid::NotAllowed.into()),
                Err(client::Error::Own) => {
                    let (local, wish) = self.local(&target, report)?;
                    let body = report.body.clone();
                    let status = local.execute(&wish, &headers, body, &mut queued_as).await;
                    Ok(Reply { status, pause: Duration::ZERO })
                }
                Err(error) => Err(error),
            };
            let last_one = attempts >= self.pace.attempts;
            let asked = match outcome {
                Ok(Reply { status, pause }) => match verdict(status) {
                    Verdict::Taken => return Ok(()),
                    Verdict::Again if !last_one => pause,
                    Verdict::Again | Verdict::Refused => {
                        return Err(Error::Answered { status, attempts });
                    }
                },
                Err(last) if last_one => return Err(Error::Unsent { attempts, last }),
                Err(error) => {
                    let id = &report.call_id;
                    tracing::debug!(call_id = id, %target, error = %ErrorChain(&error), attempts, "A callback was not sent");
                    Duration::ZERO
                }
            };
            let Pace { min_wait, max_wait, .. } = self.pace;
            let pause = retry::backoff(min_wait, max_wait, attempts, random());
            tokio::time::sleep(pause.max(asked.min(max_wait))).await;
        }
        unreachable!("one attempt is the last")
    }

    /// What executes a callback to the gateway itself, and what that is.
    fn local<'a>(
        &'a self,
        target: &'a Target,
        report: &Report,
    ) -> Result<(&'a Local, Wish<'a>), Error> {
        let (Some(local), Some(wish)) = (&self.local, Wish::of(target)) else {
            return Err(Invalid::NotAllowed.into());
        };
        if report.callbacks >= chain::MAX { Err(Error::CallbackLoop) } else { Ok((local, wish)) }
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
        // A chain of callbacks that is too long: it does not become shorter.
        508 => Verdict::Refused,
        _ => Verdict::Again,
    }
}

/// The pause that the receiver asks for.
fn asked_pause(answer: &Response<UpstreamBody>) -> Duration {
    let value = answer.headers().get(RETRY_AFTER);
    value.and_then(|v| retry::parse_retry_after(v, SystemTime::now())).unwrap_or_default()
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
            (508, Verdict::Refused),
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
