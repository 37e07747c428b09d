//! Bodies on their way to an upstream.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::echo::Mark;
use crate::watch::{BodyState, Watch};

/// The body of a request to an upstream.
pub enum RequestBody {
    /// A caller's, as it comes in.
    Caller(CallerBody),
    /// What is at hand already, mostly nothing.
    Full(Option<Bytes>),
    /// One that has come through the API's router.
    Api(axum::body::Body),
}

impl RequestBody {
    pub fn empty() -> Self {
        Self::Full(None)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Caller(body) => Pin::new(body).poll_frame(cx),
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Api(body) => Pin::new(body)
                .poll_frame(cx)
                .map_err(|error| BodyError::among(&error).unwrap_or(BodyError::Broken)),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Caller(body) => body.is_end_stream(),
            Self::Full(bytes) => bytes.is_none(),
            Self::Api(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Caller(body) => body.size_hint(),
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Api(body) => body.size_hint(),
        }
    }
}

/// Why a caller's body could not be read to its end. It travels through hyper's errors as their source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    #[error("the request's body is malformed")]
    Broken,
    #[error("the caller left before its request had come whole")]
    Left,
    #[error("the request's body did not come within read_timeout")]
    Slow,
}

impl BodyError {
    /// What hyper's `error` on a caller's body means.
    fn of(error: &hyper::Error) -> Self {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        let io = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
        match io.map(std::io::Error::kind) {
            Some(UnexpectedEof | ConnectionReset | BrokenPipe) => Self::Left,
            _ => Self::Broken,
        }
    }

    /// Finds one among the causes of `error`.
    pub fn among(error: &(dyn Error + 'static)) -> Option<Self> {
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

/// A caller's body: it must come whole in the time that the watch allows.
#[derive(Debug)]
pub struct CallerBody {
    inner: Incoming,
    watch: Arc<Watch>,
    /// It has been read to its end. From then on the watch may concern another request.
    ended: bool,
}

impl CallerBody {
    pub fn new(inner: Incoming, watch: Arc<Watch>) -> Self {
        let ended = inner.is_end_stream();
        if !ended {
            watch.body_begins();
        }
        Self { inner, watch, ended }
    }
}

impl Body for CallerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.watch.body_expired() {
            return Poll::Ready(Some(Err(BodyError::Slow)));
        }
        let before = Mark::now();
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Err(error))) = &polled {
            tracing::debug!(%error, "A caller's body broke off");
            self.watch.body_broke();
        }
        let is_last = match &polled {
            // After an error there is nothing more either.
            Poll::Ready(None) => self.watch.body_state() != BodyState::Broken,
            Poll::Ready(Some(Ok(frame))) => frame.is_trailers() || self.inner.is_end_stream(),
            Poll::Ready(Some(Err(_))) | Poll::Pending => self.inner.is_end_stream(),
        };
        if is_last {
            if !self.ended {
                self.ended = true;
                self.watch.body_ended();
            }
            // The wake tells hyper that it may bring more: there is no more.
            before.forget_since();
        }
        polled.map_err(|error| BodyError::of(&error))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for CallerBody {
    fn drop(&mut self) {
        if !self.ended {
            self.watch.body_dropped();
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
    use crate::echo::OwnWakes;

    /// Answers with the body of the request.
    async fn say(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let body = CallerBody::new(request.into_body(), Arc::new(Watch::new()));
        Ok(Response::new(Full::new(body.collect().await.unwrap().to_bytes())))
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[tokio::test]
    async fn a_request_that_has_come_whole_is_answered_in_one_poll() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 10);
        let mut http = http1::Builder::new().serve_connection(TokioIo::new(ours), service_fn(say));
        let (mut own, wakes) = (OwnWakes::default(), Arc::<Wakes>::default());
        let waker = Waker::from(Arc::clone(&wakes));
        for _ in 0..2 {
            let request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
            theirs.write_all(request).await.unwrap();
            let (woken, mut polls) = (wakes.0.load(Relaxed), 0);
            let polled = own.poll(&Context::from_waker(&waker), |cx| {
                polls += 1;
                Pin::new(&mut http).poll(cx)
            });
            assert!(polled.is_pending());
            assert_eq!((polls, wakes.0.load(Relaxed)), (1, woken));
            let mut answer = [0; 1 << 10];
            let read = theirs.read(&mut answer).now_or_never().unwrap().unwrap();
            assert!(answer[..read].ends_with(b"\r\n\r\nhello"));
        }
    }
}
