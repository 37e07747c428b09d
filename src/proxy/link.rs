//! One connection to an upstream.
//!
//! A link has no task of its own: whoever uses it drives it, first for the head, then as the answer's body. So a call
//! crosses no channel between tasks and wakes nobody, and dropping the answer closes the connection, which is what a
//! caller who leaves should do to the function.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Bytes, BytesMut};
use http::Method;
use http::request::Parts;
use http_body::Frame;
use tokio_util::io::poll_read_buf;

use crate::proxy::body::{BodyError, RequestBody};
use crate::proxy::stream::UpstreamStream;
use crate::proxy::upload::{self, Upload};
use crate::proxy::wire::Malformed;
use crate::proxy::wire::answer::{Head, take_head};
use crate::proxy::wire::decoder::Decoder;
use crate::watch::Watch;

/// The largest head of an answer.
const MAX_HEAD: usize = 1 << 20;
/// What is read at once: little at first, more while a peer fills it. What waits to be written to a slow caller stays
/// within some 2 MiB.
const LEAST_READ: usize = 4 << 10;
const MOST_READ: usize = 64 << 10;

/// A connection to an upstream; at most one call at a time.
pub(super) struct Link {
    stream: UpstreamStream,
    upload: Upload,
    /// What has been read and not been taken.
    input: BytesMut,
    /// How much to read next.
    read_size: usize,
    /// The upstream takes no more of the request.
    deaf: bool,
    /// The upstream goes on after its answer.
    keep_alive: bool,
}

/// Why an exchange failed before its answer began.
pub(super) enum Failure {
    /// The call's deadline passed.
    Expired,
    /// The connection was closed before any of the request was written: it can go another way.
    Unsent(RequestBody),
    /// The connection was closed, or broke, without an answer.
    Closed(io::Error),
    Malformed(Malformed),
    HeadTooLarge,
    Body(BodyError),
}

/// Why an answer ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the rest of the request did not come")]
    Request(#[source] BodyError),
}

impl Link {
    pub(super) fn new(stream: UpstreamStream) -> Self {
        Self {
            stream,
            upload: Upload::default(),
            input: BytesMut::new(),
            read_size: LEAST_READ,
            deaf: false,
            keep_alive: true,
        }
    }

    /// Sends `body` behind `head`, and waits for the head of the answer.
    pub(super) async fn exchange(
        &mut self,
        head: &Parts,
        body: RequestBody,
        watch: &Watch,
    ) -> Result<Head, Failure> {
        self.upload.begin(head, body);
        std::future::poll_fn(|cx| {
            if watch.call_expired() {
                return Poll::Ready(Err(Failure::Expired));
            }
            self.poll_exchange(cx, &head.method)
        })
        .await
    }

    fn poll_exchange(
        &mut self,
        cx: &mut Context<'_>,
        method: &Method,
    ) -> Poll<Result<Head, Failure>> {
        // Before anything is written, since a connection that was closed while it idled shows it here.
        if let Poll::Ready(answered) = self.poll_head(cx, method) {
            return Poll::Ready(if self.upload.has_begun() {
                answered
            } else {
                Err(Failure::Unsent(self.upload.abandon()))
            });
        }
        match self.poll_upload(cx) {
            Err(error) => Poll::Ready(Err(Failure::Body(error))),
            Ok(()) => Poll::Pending,
        }
    }

    fn poll_head(&mut self, cx: &mut Context<'_>, method: &Method) -> Poll<Result<Head, Failure>> {
        loop {
            if !self.input.is_empty() {
                match take_head(&mut self.input, method) {
                    Ok(Some(head)) => {
                        self.keep_alive = head.keep_alive;
                        return Poll::Ready(Ok(head));
                    }
                    Ok(None) if self.input.len() < MAX_HEAD => {}
                    Ok(None) => return Poll::Ready(Err(Failure::HeadTooLarge)),
                    Err(malformed) if malformed.is_too_large() => {
                        return Poll::Ready(Err(Failure::HeadTooLarge));
                    }
                    Err(malformed) => return Poll::Ready(Err(Failure::Malformed(malformed))),
                }
            }
            match ready!(self.poll_fill(cx, 0)) {
                Ok(0) => {
                    return Poll::Ready(Err(Failure::Closed(io::ErrorKind::UnexpectedEof.into())));
                }
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(Failure::Closed(error))),
            }
        }
    }

    /// The next frame of the answer's body, as `decoder` finds it. The rest of the request goes on meanwhile.
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        decoder: &mut Decoder,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if let Err(error) = self.poll_upload(cx) {
            return Poll::Ready(Some(Err(Broken::Request(error))));
        }
        loop {
            if let Some(frame) = decoder.take_frame(&mut self.input)? {
                return Poll::Ready(Some(Ok(frame)));
            }
            if decoder.is_done() {
                return Poll::Ready(None);
            }
            if ready!(self.poll_fill(cx, decoder.expects()))? == 0 {
                return Poll::Ready(if decoder.close() {
                    None
                } else {
                    Some(Err(Broken::Io(io::ErrorKind::UnexpectedEof.into())))
                });
            }
        }
    }

    /// Sends on what there is of the request.
    pub(super) fn poll_upload(&mut self, cx: &mut Context<'_>) -> Result<(), BodyError> {
        if self.deaf || self.upload.is_whole() {
            return Ok(());
        }
        match self.upload.poll(&mut self.stream, cx) {
            Poll::Pending | Poll::Ready(Ok(())) => Ok(()),
            Poll::Ready(Err(upload::Failure::Body(error))) => Err(error),
            Poll::Ready(Err(upload::Failure::Io(error))) => {
                // Reading tells whether it has answered, or is gone.
                tracing::debug!(%error, "An upstream takes no more of a request");
                self.deaf = true;
                self.upload.abandon();
                Ok(())
            }
        }
    }

    /// Reads some more, knowing that `expected` bytes are to come at least.
    fn poll_fill(&mut self, cx: &mut Context<'_>, expected: u64) -> Poll<io::Result<usize>> {
        let expected = usize::try_from(expected).unwrap_or(MOST_READ);
        let size = expected.clamp(self.read_size, MOST_READ);
        if self.input.capacity() - self.input.len() < size.min(LEAST_READ) || self.input.is_empty()
        {
            self.input.reserve(size);
        }
        let room = self.input.capacity() - self.input.len();
        let read = ready!(poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input))?;
        if read == room {
            self.read_size = (room * 2).min(MOST_READ);
        }
        Poll::Ready(Ok(read))
    }

    /// Whether the link can take another call, now that its answer has ended.
    pub(super) fn is_reusable(&self) -> bool {
        self.keep_alive && !self.deaf && self.upload.is_whole() && self.input.is_empty()
    }

    /// Lets go of what an idle link does not need. Whether it is still open.
    pub(super) fn settle(&mut self) -> bool {
        self.upload.shrink();
        self.read_size = LEAST_READ;
        self.input = BytesMut::with_capacity(1);
        let read = poll_read_buf(
            Pin::new(&mut self.stream),
            &mut Context::from_waker(Waker::noop()),
            &mut self.input,
        );
        self.input = BytesMut::new();
        // Its end, or words that nobody asked for.
        read.is_pending()
    }

    /// The connection itself, and what has been read ahead on it.
    pub(super) fn into_parts(self) -> (UpstreamStream, Bytes) {
        (self.stream, self.input.freeze())
    }
}
