//! One connection to an upstream.
//!
//! A link has no task of its own: whoever uses it drives it, first for the head, then as the answer's body. So a call
//! crosses no channel between tasks and wakes nobody, and dropping the answer closes the connection, which is what a
//! caller who leaves should do to the function.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Bytes, BytesMut};
use http::{Response, StatusCode};
use http_body::Frame;
use tokio_util::io::poll_read_buf;

use crate::proxy::body::BodyError;
use crate::proxy::buffers;
use crate::proxy::stream::UpstreamStream;
use crate::proxy::upload::{self, Upload};
use crate::proxy::wire::Malformed;
use crate::proxy::wire::answer::{Head, MAX_HEAD, take_head};
use crate::proxy::wire::decoder::Decoder;
use crate::proxy::wire::interim;
use crate::watch::Watch;

/// What is read at once: little at first, more while a peer fills it. What waits to be written to a slow caller stays
/// within some 2 MiB.
const LEAST_READ: usize = 4 << 10;
const MOST_READ: usize = buffers::SIZE;

/// A connection to an upstream; at most one call at a time.
pub(super) struct Link {
    stream: UpstreamStream,
    upload: Upload,
    /// What has been read and not been taken.
    input: BytesMut,
    /// How much to read next.
    read_size: usize,
    /// So much of `input` is known to hold no whole head.
    looked_at: usize,
    /// The upstream takes no more of the request.
    deaf: bool,
    /// The upstream goes on after its answer.
    keep_alive: bool,
    /// The interim responses of this exchange.
    interim: interim::Budget,
}

/// Why an exchange failed before its answer began.
pub(super) enum Failure {
    /// The call's deadline passed.
    Expired,
    /// The connection was closed before any of the request was written: it can go another way.
    Unsent(Upload),
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
            looked_at: 0,
            deaf: false,
            keep_alive: true,
            interim: interim::Budget::default(),
        }
    }

    /// Takes `upload`, sends it, and waits for the head of the answer.
    pub(super) async fn exchange(
        &mut self,
        upload: &mut Upload,
        watch: &Watch,
    ) -> Result<Head, Failure> {
        self.upload = std::mem::take(upload);
        self.interim = interim::Budget::default();
        std::future::poll_fn(|cx| {
            if watch.call_expired() {
                return Poll::Ready(Err(Failure::Expired));
            }
            self.poll_exchange(cx, watch)
        })
        .await
    }

    fn poll_exchange(
        &mut self,
        cx: &mut Context<'_>,
        watch: &Watch,
    ) -> Poll<Result<Head, Failure>> {
        if self.upload.has_begun() {
            if let Poll::Ready(answered) = self.poll_head(cx, watch) {
                return Poll::Ready(answered);
            }
        } else if self.poll_fill(cx, 0).is_ready() {
            // It was closed while it idled, or speaks unasked: nothing that it says is an answer to this request.
            return Poll::Ready(Err(Failure::Unsent(self.upload.start_over())));
        }
        if let Err(error) = self.poll_upload(cx) {
            return Poll::Ready(Err(Failure::Body(error)));
        }
        if self.deaf && !self.upload.has_begun() {
            return Poll::Ready(Err(Failure::Unsent(self.upload.start_over())));
        }
        Poll::Pending
    }

    fn poll_head(&mut self, cx: &mut Context<'_>, watch: &Watch) -> Poll<Result<Head, Failure>> {
        loop {
            if may_be_whole(&self.input, self.looked_at) {
                let before = self.input.len();
                match take_head(&mut self.input, self.upload.is_head()) {
                    Ok(Some(head)) if head.is_interim() => {
                        if !self.interim.admit(before - self.input.len()) {
                            return Poll::Ready(Err(Failure::HeadTooLarge));
                        }
                        self.pass_on(&head.answer, watch);
                        self.looked_at = 0;
                        continue;
                    }
                    Ok(Some(head)) => {
                        if let Err(malformed) = head.body.check_beginning(&self.input) {
                            return Poll::Ready(Err(Failure::Malformed(malformed)));
                        }
                        self.begin_body(&head);
                        return Poll::Ready(Ok(head));
                    }
                    Ok(None) => {}
                    Err(malformed) if malformed.is_too_large() => {
                        return Poll::Ready(Err(Failure::HeadTooLarge));
                    }
                    Err(malformed) => return Poll::Ready(Err(Failure::Malformed(malformed))),
                }
            }
            self.looked_at = self.input.len();
            if self.input.len() >= MAX_HEAD {
                return Poll::Ready(Err(Failure::HeadTooLarge));
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

    /// Leaves an interim response to the client's connection, if there is one that takes it.
    fn pass_on(&self, head: &Response<()>, watch: &Watch) {
        if let Some(interim) = watch.interim().filter(|_| self.upload.wants_interim())
            && let Some(text) = interim::encode(head)
        {
            interim.push(&text);
        }
    }

    fn begin_body(&mut self, head: &Head) {
        self.keep_alive = head.keep_alive;
        self.looked_at = 0;
        if self.is_sent() && !may_not_have_been_called(head.answer.status()) {
            self.upload = Upload::default();
        }
        // The room of a huge head is not kept for as long as its body takes.
        if self.input.capacity() > 4 * MOST_READ {
            self.input = BytesMut::from(&self.input[..]);
        }
    }

    /// Whether the upstream has been sent all of the request.
    pub(super) fn is_sent(&self) -> bool {
        !self.deaf && self.upload.is_whole()
    }

    /// Whether the request that this link has sent can be had back.
    pub(super) fn can_give_back_request(&self) -> bool {
        self.upload.can_start_over()
    }

    /// The request, to be sent once more, after an answer that says that nobody has seen to it.
    pub(super) fn give_back_request(&mut self) -> Upload {
        // One that has not gone out whole never will: the link is of no use after this.
        self.deaf |= !self.upload.is_whole();
        self.upload.start_over()
    }

    /// The request, to be sent over another connection.
    pub(super) fn into_upload(mut self) -> Upload {
        self.upload.start_over()
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
        if self.stream.is_tls() {
            // Its failed write may have sent something all the same.
            self.upload.begin();
        }
        match self.upload.poll(&mut self.stream, cx) {
            Poll::Pending | Poll::Ready(Ok(())) => Ok(()),
            Poll::Ready(Err(upload::Failure::Body(error))) => Err(error),
            Poll::Ready(Err(upload::Failure::Io(error))) => {
                // Reading tells whether it has answered, or is gone.
                tracing::debug!(%error, "An upstream takes no more of a request");
                self.deaf = true;
                if self.upload.has_begun() {
                    self.upload.drop_body();
                }
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
            // A large answer is read into what this thread has used last.
            if size == MOST_READ && self.input.is_empty() && self.input.capacity() < size {
                buffers::renew(&mut self.input);
            }
            self.input.reserve(size);
        }
        let room = self.input.capacity() - self.input.len();
        let read = ready!(poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input))?;
        if read == room {
            self.read_size = (room * 2).min(MOST_READ);
        }
        Poll::Ready(Ok(read))
    }

    /// What has been read ahead.
    pub(super) fn input(&self) -> &[u8] {
        &self.input
    }

    /// Whether the link can take another call, now that its answer has ended.
    pub(super) fn is_reusable(&self) -> bool {
        self.keep_alive && self.is_sent() && self.input.is_empty()
    }

    /// Lets go of what an idle link does not need. Whether it is still open.
    pub(super) fn settle(&mut self) -> bool {
        self.read_size = LEAST_READ;
        self.upload = Upload::default();
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

    /// Whether the system has the peer's end, or words that nobody asked for, on a link that is idle.
    pub(super) fn has_news(&self) -> bool {
        self.stream.has_news()
    }

    /// The connection itself, and what has been read ahead on it.
    pub(super) fn into_parts(self) -> (UpstreamStream, Bytes) {
        (self.stream, self.input.freeze())
    }
}

/// Whether an answer with `status` may come from somebody who could not reach the function. Then the request may have to
/// be sent once more.
fn may_not_have_been_called(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE)
}

/// Whether `input` may hold a whole head, of which `looked_at` bytes did not. Without this, a head that comes byte by
/// byte would be parsed as often.
fn may_be_whole(input: &[u8], looked_at: usize) -> bool {
    if looked_at == 0 {
        return !input.is_empty();
    }
    let news = &input[looked_at.saturating_sub(3)..];
    news.windows(2).any(|two| two == b"\n\n") || news.windows(3).any(|three| three == b"\n\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_parsed_when_its_end_may_have_come() {
        let head = b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n";
        assert!(!may_be_whole(b"", 0));
        assert!(may_be_whole(&head[..1], 0));
        for end in 2..head.len() {
            assert!(!may_be_whole(&head[..end], end - 1), "{end}");
        }
        assert!(may_be_whole(head, head.len() - 1));
        assert!(may_be_whole(b"HTTP/1.1 200 OK\n\n", 16));
    }
}
