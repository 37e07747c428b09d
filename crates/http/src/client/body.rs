//! Bodies of requests to upstreams.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::deadlines::{BodyState, ExchangeDeadlines};
use crate::self_wake::WakeCheckpoint;

/// The body of a request to an upstream.
pub enum RequestBody {
    /// The body of a client's request, streamed.
    Client(ClientBody),
    /// A body that is complete in memory; often empty.
    Full(Option<Bytes>),
    /// A body that passed through the router of the API.
    Api(axum::body::Body),
}

impl RequestBody {
    /// A body of length zero.
    pub fn empty() -> Self {
        Self::Full(None)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        match &mut *self {
            Self::Client(body) => Pin::new(body).poll_frame(cx),
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Api(body) => Pin::new(body).poll_frame(cx).map_err(|error| {
                RequestBodyError::find_in_chain(&error).unwrap_or(RequestBodyError::Malformed)
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Client(body) => body.is_end_stream(),
            Self::Full(bytes) => bytes.is_none(),
            Self::Api(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Client(body) => body.size_hint(),
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Api(body) => body.size_hint(),
        }
    }
}

/// Why the request body of a client could not be read completely. hyper's errors carry it as their source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestBodyError {
    #[error("the request body is malformed")]
    Malformed,
    #[error("the client disconnected before its request was complete")]
    ClientDisconnected,
    #[error("the request body was not complete within read_timeout")]
    TimedOut,
}

impl RequestBodyError {
    /// Classifies an error of hyper while it read the body of a client's request.
    fn from_hyper(error: &hyper::Error) -> Self {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        let io = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
        match io.map(std::io::Error::kind) {
            Some(UnexpectedEof | ConnectionReset | BrokenPipe) => Self::ClientDisconnected,
            _ => Self::Malformed,
        }
    }

    /// Finds a `RequestBodyError` in the chain of `error` and its sources.
    pub fn find_in_chain(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(found) = error.downcast_ref::<Self>() {
                return Some(*found);
            }
            cause = error.source();
        }
        None
    }
}

/// The body of a client's request. It must be complete within the body deadline of `deadlines`.
#[derive(Debug)]
pub struct ClientBody {
    inner: Incoming,
    deadlines: Arc<ExchangeDeadlines>,
    /// The body has been read completely. From then on `deadlines` may belong to the next request.
    finished: bool,
}

impl ClientBody {
    /// Wraps a body of hyper. `deadlines` are those of its connection.
    pub fn new(inner: Incoming, deadlines: Arc<ExchangeDeadlines>) -> Self {
        let finished = inner.is_end_stream();
        if !finished {
            deadlines.on_body_started();
        }
        Self { inner, deadlines, finished }
    }
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = RequestBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        if self.deadlines.body_expired() {
            return Poll::Ready(Some(Err(RequestBodyError::TimedOut)));
        }
        let before = WakeCheckpoint::now();
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Err(error))) = &polled {
            tracing::debug!(%error, "The body of a client's request ended early");
            self.deadlines.on_body_aborted();
        }
        let is_last = match &polled {
            // hyper also returns `None` after an error.
            Poll::Ready(None) => self.deadlines.body_state() != BodyState::Aborted,
            Poll::Ready(Some(Ok(frame))) => frame.is_trailers() || self.inner.is_end_stream(),
            Poll::Ready(Some(Err(_))) | Poll::Pending => self.inner.is_end_stream(),
        };
        if is_last {
            if !self.finished {
                self.finished = true;
                self.deadlines.on_body_finished();
            }
            // This wake-up asks hyper for more of the body, but the body is complete.
            before.discard_later();
        }
        polled.map_err(|error| RequestBodyError::from_hyper(&error))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for ClientBody {
    fn drop(&mut self) {
        if !self.finished {
            self.deadlines.on_body_dropped();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::task::{Wake, Waker};

    use futures_util::FutureExt;
    use http::{Request, Response};
    use http_body_util::{BodyExt, Full};
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::self_wake::SelfWakeCoalescer;

    /// Responds with the body of the request.
    async fn echo_body(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let body = ClientBody::new(request.into_body(), Arc::new(ExchangeDeadlines::new()));
        Ok(Response::new(Full::new(body.collect().await.unwrap().to_bytes())))
    }

    #[derive(Default)]
    struct WakeCounter(AtomicUsize);

    impl Wake for WakeCounter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[tokio::test]
    async fn a_complete_request_is_answered_in_one_poll() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 10);
        let mut http =
            http1::Builder::new().serve_connection(TokioIo::new(ours), service_fn(echo_body));
        let (mut coalescer, counter) =
            (SelfWakeCoalescer::default(), Arc::<WakeCounter>::default());
        let waker = Waker::from(Arc::clone(&counter));
        for _ in 0..2 {
            let request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
            theirs.write_all(request).await.unwrap();
            let (woken, mut polls) = (counter.0.load(Relaxed), 0);
            let polled = coalescer.poll(&Context::from_waker(&waker), |cx| {
                polls += 1;
                Pin::new(&mut http).poll(cx)
            });
            assert!(polled.is_pending());
            assert_eq!((polls, counter.0.load(Relaxed)), (1, woken));
            let mut response = [0; 1 << 10];
            let read = theirs.read(&mut response).now_or_never().unwrap().unwrap();
            assert!(response[..read].ends_with(b"\r\n\r\nhello"));
        }
    }
}
