//! Callbacks: the result of a queued call, sent to the URL that its client has given.
//!
//! The client chooses the URL. So each attempt resolves its host again, and connects to no address that the allow-list
//! denies and to none of the gateway's own. Connections are not reused, redirects are not followed, and only the head
//! of the receiver's response is read. A callback to a function of the gateway itself needs no connection ([`local`]).

pub mod allowlist;
mod headers;
pub mod local;
pub mod own_addresses;
pub mod signature;
pub mod target;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::header::RETRY_AFTER;
use http::{HeaderMap, Method, Request, Response, StatusCode};

use crate::callback::allowlist::CallbackAllowlist;
use crate::callback::local::{LocalCall, LocalExecutor};
use crate::callback::own_addresses::{AddressOwner, OwnAddresses};
use crate::callback::signature::Secret;
use crate::callback::target::{CallbackTarget, CallbackUrlError};
use crate::retry;
use gateway_base::backoff::Backoff;
use gateway_base::error_chain::ErrorChain;
use gateway_http::callback_chain;
use gateway_http::client::body::RequestBody;
use gateway_http::client::egress_filter::{AddressDenied, EgressFilter};
use gateway_http::client::upstream_body::UpstreamBody;
use gateway_http::client::{self, Client, PoolLimits, Tls};
use gateway_http::deadlines::ExchangeDeadlines;
use gateway_queue::now;

/// Connections are not reused: the address filter checks each new connection.
const NO_IDLE_CONNECTIONS: PoolLimits = PoolLimits { total: 0, per_host: 0 };

/// The result of a call, as a callback reports it.
#[derive(Clone, Debug)]
pub struct CallbackPayload {
    pub call_id: String,
    /// The function, by its full name.
    pub function: String,
    /// Status of the function's response; 503 if the function was unreachable.
    pub status: u16,
    /// Headers of the function's response, unfiltered.
    pub headers: HeaderMap,
    pub body: Bytes,
    /// The body is incomplete.
    pub truncated: bool,
    /// Time since the call was received from the queue.
    pub duration: Duration,
    /// Number of attempts made, and their maximum.
    pub attempts: u32,
    pub max_attempts: u32,
    /// Number of callbacks in a row that have led to the call.
    pub callbacks: u32,
    /// Trace context headers.
    pub trace: HeaderMap,
}

/// Timeout and retries of a callback.
#[derive(Clone, Copy, Debug)]
pub struct CallbackRetry {
    /// Maximum number of attempts, including the first one.
    pub attempts: u32,
    /// Timeout of one attempt, from the name resolution to the head of the response.
    pub timeout: Duration,
    /// Delays between attempts, which have jitter.
    pub backoff: Backoff,
}

impl Default for CallbackRetry {
    fn default() -> Self {
        Self {
            attempts: 6,
            timeout: Duration::from_secs(10),
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(30)),
        }
    }
}

/// Why a callback was not delivered. Does not reveal its destination.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] CallbackUrlError),
    #[error("it would exceed the maximum of {} callbacks in a row", callback_chain::MAX_LENGTH)]
    CallbackLoop,
    #[error("the callback was answered with {status} ({attempts} attempts)")]
    UnexpectedStatus { status: StatusCode, attempts: u32 },
    #[error("the callback could not be sent ({attempts} attempts): {last}")]
    NotSent {
        attempts: u32,
        #[source]
        last: client::Error,
    },
}

/// Sends callbacks.
pub struct CallbackSender {
    client: Arc<Client>,
    secrets: Vec<Secret>,
    retry: CallbackRetry,
    local: Option<LocalExecutor>,
}

/// Filters the addresses that callbacks connect to.
struct Destinations {
    allow: CallbackAllowlist,
    own: OwnAddresses,
}

impl EgressFilter for Destinations {
    fn filter<'a>(
        &'a self,
        host: &'a str,
        addresses: Vec<SocketAddr>,
    ) -> BoxFuture<'a, Result<Vec<SocketAddr>, AddressDenied>> {
        Box::pin(async move {
            match self.own.owner_of(host, &addresses).await {
                AddressOwner::Gateway => return Err(AddressDenied::OwnAddress),
                AddressOwner::Protected => return Err(AddressDenied::NotAllowed),
                AddressOwner::Other => {}
            }
            let permitted =
                addresses.into_iter().filter(|address| self.allow.permits(host, address.ip()));
            let permitted: Vec<_> = permitted.collect();
            if permitted.is_empty() { Err(AddressDenied::NotAllowed) } else { Ok(permitted) }
        })
    }
}

/// The receiver's response.
struct ReceiverResponse {
    status: StatusCode,
    /// The delay that it requests by `Retry-After`.
    delay: Duration,
}

impl CallbackSender {
    /// Creates a sender. Callbacks connect only to addresses that `allow` permits and that are not `own`, and are
    /// signed with each of `secrets`.
    pub fn new(
        allow: CallbackAllowlist,
        own: OwnAddresses,
        secrets: Vec<Secret>,
        retry: CallbackRetry,
        tls: Tls,
    ) -> Self {
        let client =
            Client::with_egress_filter(NO_IDLE_CONNECTIONS, tls, Destinations { allow, own });
        Self { client, secrets, retry, local: None }
    }

    /// Executes callbacks to functions of the gateway itself by `local`. Without it, they are rejected.
    #[must_use]
    pub fn with_local(self, local: LocalExecutor) -> Self {
        Self { local: Some(local), ..self }
    }

    /// Sends `payload` to `url`, with retries. Returns when the receiver has accepted it.
    ///
    /// # Errors
    /// When the URL is invalid or not allowed, the receiver rejects the callback, or all attempts have failed.
    pub async fn send(&self, url: &str, payload: &CallbackPayload) -> Result<(), Error> {
        let target = CallbackTarget::parse(url)?;
        let mut headers = headers::build(&target, payload);
        let mut queued_as = None;
        for attempts in 1.. {
            // Each attempt has the same message id and body, but its own timestamp.
            let now = now() / 1000;
            signature::sign(&self.secrets, &payload.call_id, now, &payload.body, &mut headers);
            let outcome = match self.attempt(&target, headers.clone(), payload.body.clone()).await {
                Ok(response) => Ok(ReceiverResponse {
                    status: response.status(),
                    delay: requested_delay(&response),
                }),
                Err(client::Error::NotAllowed) => return Err(CallbackUrlError::NotAllowed.into()),
                Err(client::Error::OwnAddress) => {
                    let (local, local_call) = self.local(&target, payload)?;
                    let body = payload.body.clone();
                    let status = local.execute(&local_call, &headers, body, &mut queued_as).await;
                    Ok(ReceiverResponse { status, delay: Duration::ZERO })
                }
                Err(error) => Err(error),
            };
            let last_one = attempts >= self.retry.attempts;
            let requested = match outcome {
                Ok(ReceiverResponse { status, delay }) => match verdict(status) {
                    Verdict::Accepted => return Ok(()),
                    Verdict::Retry if !last_one => delay,
                    Verdict::Retry | Verdict::Rejected => {
                        return Err(Error::UnexpectedStatus { status, attempts });
                    }
                },
                Err(last) if last_one => return Err(Error::NotSent { attempts, last }),
                Err(error) => {
                    let id = &payload.call_id;
                    tracing::debug!(
                        call_id = id, %target, error = %ErrorChain(&error), attempts,
                        "An attempt to send a callback failed"
                    );
                    Duration::ZERO
                }
            };
            let backoff = self.retry.backoff;
            let delay = backoff.jittered(attempts, fastrand::f64());
            tokio::time::sleep(delay.max(requested.min(backoff.max))).await;
        }
        unreachable!("the loop returns at the last attempt")
    }

    /// Returns the executor for a callback to the gateway itself, and the parsed call.
    fn local<'a>(
        &'a self,
        target: &'a CallbackTarget,
        payload: &CallbackPayload,
    ) -> Result<(&'a LocalExecutor, LocalCall<'a>), Error> {
        let (Some(local), Some(local_call)) = (&self.local, LocalCall::parse(target)) else {
            return Err(CallbackUrlError::NotAllowed.into());
        };
        if payload.callbacks >= callback_chain::MAX_LENGTH {
            Err(Error::CallbackLoop)
        } else {
            Ok((local, local_call))
        }
    }

    async fn attempt(
        &self,
        target: &CallbackTarget,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response<UpstreamBody>, client::Error> {
        let body = Some(body).filter(|body| !body.is_empty());
        let mut request = Request::new(RequestBody::Full(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = target.uri.clone();
        *request.headers_mut() = headers;
        let deadlines = Arc::new(ExchangeDeadlines::new());
        deadlines.set_deadline(Instant::now() + self.retry.timeout);
        let sent = self.client.send(&target.origin, request, &deadlines);
        match tokio::time::timeout(self.retry.timeout, sent).await {
            Ok(sent) => sent,
            Err(_) => Err(client::Error::Timeout),
        }
    }
}

/// The meaning of the receiver's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Accepted,
    Rejected,
    Retry,
}

fn verdict(status: StatusCode) -> Verdict {
    match status.as_u16() {
        200..300 => Verdict::Accepted,
        408 | 425 | 429 => Verdict::Retry,
        // Redirects are not followed: they could lead to an address that is not allowed.
        300..500 => Verdict::Rejected,
        // Too many callbacks in a row: a retry would fail, too.
        508 => Verdict::Rejected,
        _ => Verdict::Retry,
    }
}

/// Returns the delay that the receiver requests.
fn requested_delay(response: &Response<UpstreamBody>) -> Duration {
    let value = response.headers().get(RETRY_AFTER);
    value.and_then(|v| retry::parse_retry_after(v, SystemTime::now())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_decides_whether_a_callback_is_retried() {
        for (status, expect) in [
            (200, Verdict::Accepted),
            (204, Verdict::Accepted),
            (302, Verdict::Rejected),
            (400, Verdict::Rejected),
            (404, Verdict::Rejected),
            (408, Verdict::Retry),
            (410, Verdict::Rejected),
            (425, Verdict::Retry),
            (429, Verdict::Retry),
            (500, Verdict::Retry),
            (503, Verdict::Retry),
            (508, Verdict::Rejected),
        ] {
            assert_eq!(verdict(StatusCode::from_u16(status).unwrap()), expect, "{status}");
        }
    }
}
