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

use crate::limit::Permit;
use crate::metrics::calls::{Call, End};
use crate::proxy::ending::Ending;
use crate::proxy::upstream_body::UpstreamBody;
use crate::trace::Trip;
use crate::watch::Watch;

type BoxError = Box<dyn Error + Send + Sync>;

/// Where the body comes from.
pub enum Content {
    /// Streamed from an upstream.
    Upstream(UpstreamBody),
    /// In memory; `None` once it has been sent.
    Full(Option<Bytes>),
    /// From the API's router.
    Api(axum::body::Body),
}

/// An invocation that ends with its response body.
pub struct InFlight {
    pub call: Call,
    pub place: Permit,
}

/// A response body that is tracked to its end.
pub struct Answer {
    content: Content,
    in_flight: Option<InFlight>,
    watch: Arc<Watch>,
    /// Idle timeout of the client's connection after this response.
    idle: Duration,
    end: End,
    trip: Option<Box<Trip>>,
}

impl Answer {
    pub fn new(
        content: Content,
        in_flight: Option<InFlight>,
        watch: Arc<Watch>,
        idle: Duration,
    ) -> Self {
        Self { content, in_flight, watch, idle, end: End::Left, trip: None }
    }

    /// Attaches the request span, which ends with this body.
    pub fn watched_by(&mut self, trip: Box<Trip>) {
        self.trip = Some(trip);
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = match &mut self.content {
            Content::Upstream(body) => match Pin::new(body).poll_frame(cx) {
                Poll::Ready(Some(Err(failure))) => {
                    self.end = match Ending::of_body(&failure) {
                        Ending::TimedOut => End::TimedOut,
                        _ => End::Broken,
                    };
                    Poll::Ready(Some(Err(failure.into())))
                }
                polled => polled.map_err(Into::into),
            },
            Content::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Content::Api(body) => match Pin::new(body).poll_frame(cx) {
                Poll::Ready(Some(Err(error))) => {
                    self.end = End::Broken;
                    Poll::Ready(Some(Err(error.into())))
                }
                polled => polled.map_err(Into::into),
            },
        };
        if matches!(polled, Poll::Ready(None)) {
            self.end = End::Whole;
        }
        if let (Some(trip), Poll::Ready(Some(Ok(frame)))) = (&mut self.trip, &polled) {
            trip.passed(frame.data_ref().map_or(0, Bytes::len));
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Upstream(body) => body.is_end_stream(),
            Content::Full(bytes) => bytes.is_none(),
            Content::Api(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Upstream(body) => body.size_hint(),
            Content::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64)
            }
            Content::Api(body) => body.size_hint(),
        }
    }
}

impl Drop for Answer {
    /// hyper drops a body after its last frame, or when the connection is closed.
    fn drop(&mut self) {
        let now = Instant::now();
        // The text of a response to HEAD is never polled.
        let nothing_missing = self.is_end_stream() || matches!(self.content, Content::Full(_));
        if self.end == End::Left && nothing_missing {
            self.end = End::Whole;
        }
        if let Content::Upstream(body) = &mut self.content {
            body.release(now);
        }
        if let Some(InFlight { call, place }) = self.in_flight.take() {
            call.ended(self.end, now);
            drop(place);
        }
        if let Some(trip) = self.trip.take() {
            trip.ended(self.end);
        }
        self.watch.call_ended(now, self.idle);
    }
}
