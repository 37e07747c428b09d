//! The response body on its way to the client. Its end triggers the rest of the exchange: the invocation is recorded,
//! the upstream connection returns to its pool, and the client's connection waits for the next request.

pub mod early;

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::metrics::calls::{InFlightRecorder, Outcome};
use crate::trace::RequestSpan;
use gateway_http::client::exchange_outcome::ExchangeOutcome;
use gateway_http::client::upstream_body::UpstreamBody;
use gateway_http::deadlines::ConnectionDeadlines;
use gateway_http::limit::Permit;

type BoxError = Box<dyn Error + Send + Sync>;

/// Where the body comes from.
pub enum BodySource {
    /// Streamed from an upstream.
    Upstream(UpstreamBody),
    /// In memory; `None` once it has been sent.
    Full(Option<Bytes>),
    /// From the API's router.
    Api(axum::body::Body),
}

/// An invocation that ends with its response body.
pub struct InFlight {
    pub recorder: InFlightRecorder,
    pub permit: Permit,
}

/// A response body that is tracked to its end.
pub struct TrackedBody {
    source: BodySource,
    in_flight: Option<InFlight>,
    deadlines: Arc<ConnectionDeadlines>,
    /// Idle timeout of the client's connection after this response.
    idle_timeout: Duration,
    outcome: Outcome,
    span: Option<Box<RequestSpan>>,
}

impl TrackedBody {
    /// Creates a body that ends `in_flight`, if given, and then the exchange of `deadlines`.
    pub fn new(
        source: BodySource,
        in_flight: Option<InFlight>,
        deadlines: Arc<ConnectionDeadlines>,
        idle_timeout: Duration,
    ) -> Self {
        Self {
            source,
            in_flight,
            deadlines,
            idle_timeout,
            outcome: Outcome::ClientDisconnected,
            span: None,
        }
    }

    /// Attaches the request span, which ends with this body.
    pub fn set_span(&mut self, span: Box<RequestSpan>) {
        self.span = Some(span);
    }
}

impl Body for TrackedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = match &mut self.source {
            BodySource::Upstream(body) => match Pin::new(body).poll_frame(cx) {
                Poll::Ready(Some(Err(failure))) => {
                    self.outcome = match ExchangeOutcome::from_body_error(&failure) {
                        ExchangeOutcome::TimedOut => Outcome::TimedOut,
                        _ => Outcome::UpstreamAborted,
                    };
                    Poll::Ready(Some(Err(failure.into())))
                }
                polled => polled.map_err(Into::into),
            },
            BodySource::Full(bytes) => {
                Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes))))
            }
            BodySource::Api(body) => match Pin::new(body).poll_frame(cx) {
                Poll::Ready(Some(Err(error))) => {
                    self.outcome = Outcome::UpstreamAborted;
                    Poll::Ready(Some(Err(error.into())))
                }
                polled => polled.map_err(Into::into),
            },
        };
        if matches!(polled, Poll::Ready(None)) {
            self.outcome = Outcome::Complete;
        }
        if let (Some(span), Poll::Ready(Some(Ok(frame)))) = (&mut self.span, &polled) {
            span.add_response_bytes(frame.data_ref().map_or(0, Bytes::len));
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            BodySource::Upstream(body) => body.is_end_stream(),
            BodySource::Full(bytes) => bytes.is_none(),
            BodySource::Api(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            BodySource::Upstream(body) => body.size_hint(),
            BodySource::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64)
            }
            BodySource::Api(body) => body.size_hint(),
        }
    }
}

impl Drop for TrackedBody {
    /// hyper drops a body after its last frame, or when the connection is closed.
    fn drop(&mut self) {
        let now = Instant::now();
        // The text of a response to HEAD is never polled.
        let nothing_missing = self.is_end_stream() || matches!(self.source, BodySource::Full(_));
        if self.outcome == Outcome::ClientDisconnected && nothing_missing {
            self.outcome = Outcome::Complete;
        }
        if let BodySource::Upstream(body) = &mut self.source {
            body.release(now);
        }
        if let Some(InFlight { recorder, permit }) = self.in_flight.take() {
            recorder.finish(self.outcome, now);
            drop(permit);
        }
        if let Some(span) = self.span.take() {
            span.finish(self.outcome);
        }
        self.deadlines.on_exchange_finished(now, self.idle_timeout);
    }
}
