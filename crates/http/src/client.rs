//! Forwards the request of a client to an upstream, and the response to the client. Bodies are streamed, not collected.

pub mod balancer;
pub mod body;
mod buffer_pool;
pub mod codings;
mod dial;
pub mod egress_filter;
pub mod exchange_outcome;
pub mod failover;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub(crate) mod http1;
mod io;
mod pool;
mod sniff;
pub mod tunnel;
pub mod upstream_body;

pub use self::pool::*;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Version};
use hyper::upgrade::OnUpgrade;

use crate::call_id::RequestIds;
use crate::client::body::{RequestBody, RequestBodyError};
use crate::client::exchange_outcome::ExchangeOutcome;
use crate::client::http1::request_writer::RequestWriter;
use crate::client::http1::wire::request::{path_and_query, write_header, write_request_line};
use crate::client::tunnel::Tunnel;
use crate::client::upstream_body::UpstreamBody;
use crate::deadlines::ExchangeDeadlines;
use crate::headers;

/// Content types of responses without an end in sight. Their timeout applies to each pause, not to the whole response.
const STREAMING_CONTENT_TYPES: [&str; 5] = [
    "text/event-stream",
    "application/x-ndjson",
    "application/ndjson",
    "application/stream+json",
    "application/grpc",
];

/// Maximum number of times that one request is sent, if no upstream seems to have executed it. A connection that fails
/// before the first byte is written does not count.
pub const MAX_SENDS: u32 = 3;

/// The client of a request, and how long the request may take.
#[derive(Clone, Copy)]
pub struct RequestContext<'a> {
    /// The IP address of the client, for `X-Forwarded-For`.
    pub client_address: &'a HeaderValue,
    /// The deadlines of the exchange; the exchange ends when they expire.
    pub deadlines: &'a Arc<ExchangeDeadlines>,
    /// Start of the exchange.
    pub started_at: Instant,
    /// Maximum time from `started_at` to the last byte of the response; for a streaming response the longest pause.
    pub timeout: Duration,
    /// The request was sent by the client, not by the gateway itself: interim responses are forwarded to the client.
    pub is_client_request: bool,
}

/// A request of a client, ready to be sent.
pub struct OutgoingRequest {
    /// Empty while the request is in flight.
    /// Boxed, because it is moved several times before it is sent.
    writer: Box<RequestWriter>,
    /// The connection of a client that asks for a change of protocols.
    upgrade: Option<OnUpgrade>,
    idempotent: bool,
}

impl OutgoingRequest {
    /// Returns whether the method of the request is idempotent.
    pub fn is_idempotent(&self) -> bool {
        self.idempotent
    }

    /// Keeps the bytes of the request so that it can be sent again, as long as there are at most `limit` bytes.
    pub fn enable_replay(&mut self, limit: usize) {
        self.writer.enable_replay(limit);
    }

    /// Returns the length of the remaining body in bytes, if known.
    pub fn remaining_body_length(&self) -> Option<u64> {
        self.writer.remaining_body_length()
    }

    /// Reads the body into the replay buffer before the request is sent. Ready when the body ends or the buffer is
    /// full.
    ///
    /// # Errors
    /// When the body cannot be read: the request cannot be sent then.
    pub fn poll_buffer_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RequestBodyError>> {
        self.writer.poll_buffer_body(cx)
    }

    /// Recovers the request of `response` so that it can be sent again. Returns false if that is not possible.
    pub fn recover(&mut self, response: &mut Response<UpstreamBody>) -> bool {
        if !response.body().can_recover_request() {
            return false;
        }
        match response.body_mut().recover_request() {
            Some(writer) => *self.writer = writer,
            None => return false,
        }
        true
    }

    /// Returns whether the request of `response` can be recovered.
    pub fn can_recover(response: &Response<UpstreamBody>) -> bool {
        response.body().can_recover_request()
    }
}

/// A response of an upstream, with a tunnel if both sides change protocols.
pub struct UpstreamResponse {
    /// The response without hop-by-hop headers.
    pub response: Response<UpstreamBody>,
    /// The outcome according to the response head.
    pub outcome: ExchangeOutcome,
    /// To be run as a task, if both sides change protocols.
    pub tunnel: Option<Tunnel>,
}

/// Converts `request` into one to `origin`, with the same path and query. Sets the deadline of the exchange.
///
/// # Errors
/// `client::Error::InvalidTarget` when the path is too long. The client gets a 414.
pub fn prepare(
    origin: &Origin,
    mut request: Request<RequestBody>,
    request_ids: Option<&RequestIds>,
    context: RequestContext<'_>,
) -> Result<OutgoingRequest, Error> {
    context.deadlines.set_deadline(context.started_at + context.timeout);
    if !origin.path().is_empty() {
        origin.target(request.uri())?;
    }
    let body = std::mem::replace(request.body_mut(), RequestBody::empty());
    let (method, headers) = (request.method(), request.headers());
    let mut upgrade_protocol = None;
    let mut writer = Box::new(RequestWriter::with_head(method, headers, body, |out| {
        write_request_line(out, method, [origin.path(), path_and_query(request.uri())]);
        let put = |name: &HeaderName, value: &HeaderValue| write_header(out, name, value);
        upgrade_protocol =
            headers::to_upstream(headers, &origin.host, context.client_address, request_ids, put);
    }));
    if !context.is_client_request || request.version() < Version::HTTP_11 {
        // RFC 9110, 15.2.
        writer.discard_interim();
    }
    let idempotent = method.is_idempotent();
    let upgrade = upgrade_protocol.map(|_| hyper::upgrade::on(&mut request));
    Ok(OutgoingRequest { writer, upgrade, idempotent })
}

/// Sends a prepared request to `origin`, and returns when the head of the response has been received.
///
/// # Errors
/// `client::Error` when there is no response; its text may be shown to the client. After an error for which
/// `is_connect` returns true, `request` is unchanged and can be sent again.
pub async fn send(
    client: &Arc<Client>,
    origin: &Origin,
    request: &mut OutgoingRequest,
    context: RequestContext<'_>,
) -> Result<UpstreamResponse, Error> {
    let mut response = client.send_request(origin, &mut request.writer, context.deadlines).await?;
    let mut upgrade = None;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        // After a change in the middle of the request, the upstream would parse the rest as the new protocol.
        upgrade = request.upgrade.take().filter(|_| response.body().is_request_sent());
    }
    let outcome = ExchangeOutcome::from_head(&response, upgrade.is_some());
    if outcome == ExchangeOutcome::UnexpectedUpgrade {
        return Err(Error::UnexpectedUpgrade);
    }
    let tunnel = upgrade.map(|upgrade| Tunnel::new(upgrade, &mut response, context.timeout));
    match response.headers().get(CONTENT_TYPE) {
        Some(content_type) if is_streaming(content_type) => {
            response.body_mut().set_idle_timeout(context.timeout);
        }
        Some(_) => {}
        None => sniff_content_type(&mut response),
    }
    Ok(UpstreamResponse { response, outcome, tunnel })
}

/// Prepares and sends `request`, which is not an invocation of a function.
///
/// # Errors
/// Those of [`prepare`] and [`send`].
pub async fn forward(
    client: &Arc<Client>,
    origin: &Origin,
    request: Request<RequestBody>,
    context: RequestContext<'_>,
) -> Result<UpstreamResponse, Error> {
    send(client, origin, &mut prepare(origin, request, None, context)?, context).await
}

/// Sets the content type of a response that has none, if the start of its body was received together with its head.
fn sniff_content_type(response: &mut Response<UpstreamBody>) {
    if response.headers().contains_key(CONTENT_ENCODING) {
        return;
    }
    let content_type = match response.body().peek() {
        [] => return,
        beginning => sniff::content_type(beginning),
    };
    response.headers_mut().insert(CONTENT_TYPE, content_type);
}

fn is_streaming(content_type: &HeaderValue) -> bool {
    let content_type = content_type.as_bytes();
    STREAMING_CONTENT_TYPES.iter().any(|stream| {
        content_type.get(..stream.len()).is_some_and(|start| {
            start.eq_ignore_ascii_case(stream.as_bytes())
                && matches!(content_type.get(stream.len()), None | Some(b';' | b' ' | b'+' | b'-'))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(content_type: &'static str, expect: bool) {
        let value = HeaderValue::from_static(content_type);
        assert_eq!(is_streaming(&value), expect, "{content_type}");
    }

    #[test]
    fn streaming_responses_are_recognized_by_content_type() {
        check("text/event-stream", true);
        check("Text/Event-Stream; charset=utf-8", true);
        check("application/x-ndjson", true);
        check("application/grpc+proto", true);
        check("application/json", false);
        check("text/event-streams", false);
    }
}
