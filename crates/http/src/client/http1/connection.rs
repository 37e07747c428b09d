//! One HTTP/1.1 connection to an upstream.
//!
//! A connection has no task of its own. The code that uses it drives it: first until the response head is there, then
//! as the response body. An exchange therefore crosses no channel between tasks and wakes no other task. When the
//! response is dropped, for example because the client disconnected, the connection is closed, and the function
//! notices.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Bytes, BytesMut};
use http::{Response, StatusCode};
use http_body::Frame;
use tokio_util::io::poll_read_buf;

use crate::client::body::RequestBodyError;
use crate::client::buffer_pool;
use crate::client::http1::request_writer::{self, RequestWriter};
use crate::client::http1::wire::body_decoder::BodyDecoder;
use crate::client::http1::wire::response::{MAX_HEAD_BYTES, ResponseHead, parse_head};
use crate::client::http1::wire::{ParseError, interim};
use crate::client::io::MaybeTlsStream;
use crate::deadlines::ExchangeDeadlines;

/// Size of the first read. Later reads are larger as long as the upstream fills them, up to `MAX_READ_BYTES`. This
/// keeps the data that waits for a slow client within about 2 MiB.
const MIN_READ_BYTES: usize = 4 << 10;
/// Maximum size of a read.
const MAX_READ_BYTES: usize = buffer_pool::BUFFER_BYTES;

/// An HTTP/1.1 connection to an upstream, with at most one exchange at a time.
pub(in crate::client) struct Http1Connection {
    stream: MaybeTlsStream,
    request: RequestWriter,
    /// Data received and not yet parsed.
    read_buffer: BytesMut,
    /// Size of the next read.
    read_size: usize,
    /// Length of the part of `read_buffer` that is known to contain no complete head.
    scanned: usize,
    /// The upstream accepts no more of the request.
    write_closed: bool,
    /// The upstream keeps the connection open after its response.
    keep_alive: bool,
    /// Limits the interim responses of this exchange.
    interim_budget: interim::InterimBudget,
}

/// Why an exchange failed before its response head was received.
pub enum ExchangeError {
    /// The deadline of the exchange expired.
    Expired,
    /// The connection was closed before any of the request was written: it can be sent over another connection.
    NotSent(RequestWriter),
    /// The connection was closed or failed without a response.
    Closed(io::Error),
    InvalidResponse(ParseError),
    HeadTooLarge,
    RequestBody(RequestBodyError),
}

/// Why a response ended early.
#[derive(Debug, thiserror::Error)]
pub enum ResponseAborted {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error(transparent)]
    InvalidResponse(#[from] ParseError),
    #[error("the rest of the request was not received")]
    Request(#[source] RequestBodyError),
}

impl Http1Connection {
    pub(in crate::client) fn new(stream: MaybeTlsStream) -> Self {
        Self {
            stream,
            request: RequestWriter::default(),
            read_buffer: BytesMut::new(),
            read_size: MIN_READ_BYTES,
            scanned: 0,
            write_closed: false,
            keep_alive: true,
            interim_budget: interim::InterimBudget::default(),
        }
    }

    /// Takes `request`, sends it, and returns when the head of the response has been received.
    pub(in crate::client) async fn send_request(
        &mut self,
        request: &mut RequestWriter,
        deadlines: &ExchangeDeadlines,
    ) -> Result<ResponseHead, ExchangeError> {
        self.request = std::mem::take(request);
        self.interim_budget = interim::InterimBudget::default();
        std::future::poll_fn(|cx| {
            if deadlines.is_expired() {
                return Poll::Ready(Err(ExchangeError::Expired));
            }
            self.poll_send_request(cx, deadlines)
        })
        .await
    }

    fn poll_send_request(
        &mut self,
        cx: &mut Context<'_>,
        deadlines: &ExchangeDeadlines,
    ) -> Poll<Result<ResponseHead, ExchangeError>> {
        if self.request.has_started() {
            if let Poll::Ready(result) = self.poll_read_head(cx, deadlines) {
                return Poll::Ready(result);
            }
        } else if self.poll_fill_buffer(cx, 0).is_ready() {
            // The upstream closed the idle connection, or sent data that cannot be a response to this request.
            return Poll::Ready(Err(ExchangeError::NotSent(self.request.rewind())));
        }
        if let Err(error) = self.poll_write_request(cx) {
            return Poll::Ready(Err(ExchangeError::RequestBody(error)));
        }
        if self.write_closed && !self.request.has_started() {
            return Poll::Ready(Err(ExchangeError::NotSent(self.request.rewind())));
        }
        Poll::Pending
    }

    fn poll_read_head(
        &mut self,
        cx: &mut Context<'_>,
        deadlines: &ExchangeDeadlines,
    ) -> Poll<Result<ResponseHead, ExchangeError>> {
        loop {
            if may_be_complete(&self.read_buffer, self.scanned) {
                let before = self.read_buffer.len();
                match parse_head(&mut self.read_buffer, self.request.is_head()) {
                    Ok(Some(head)) if head.is_interim() => {
                        if !self.interim_budget.charge(before - self.read_buffer.len()) {
                            return Poll::Ready(Err(ExchangeError::HeadTooLarge));
                        }
                        self.forward_interim(&head.response, deadlines);
                        self.scanned = 0;
                        continue;
                    }
                    Ok(Some(head)) => {
                        if let Err(error) = head.body.check_first_chunk(&self.read_buffer) {
                            return Poll::Ready(Err(ExchangeError::InvalidResponse(error)));
                        }
                        self.start_body(&head);
                        return Poll::Ready(Ok(head));
                    }
                    Ok(None) => {}
                    Err(error) if error.is_too_large() => {
                        return Poll::Ready(Err(ExchangeError::HeadTooLarge));
                    }
                    Err(error) => {
                        return Poll::Ready(Err(ExchangeError::InvalidResponse(error)));
                    }
                }
            }
            self.scanned = self.read_buffer.len();
            if self.read_buffer.len() >= MAX_HEAD_BYTES {
                return Poll::Ready(Err(ExchangeError::HeadTooLarge));
            }
            match ready!(self.poll_fill_buffer(cx, 0)) {
                Ok(0) => {
                    return Poll::Ready(Err(ExchangeError::Closed(
                        io::ErrorKind::UnexpectedEof.into(),
                    )));
                }
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(ExchangeError::Closed(error))),
            }
        }
    }

    /// Queues an interim response for the client, if a client accepts it.
    fn forward_interim(&self, head: &Response<()>, deadlines: &ExchangeDeadlines) {
        if let Some(interim) = deadlines.interim().filter(|_| self.request.forwards_interim())
            && let Some(text) = interim::encode(head)
        {
            interim.push(&text);
        }
    }

    fn start_body(&mut self, head: &ResponseHead) {
        self.keep_alive = head.keep_alive;
        self.scanned = 0;
        if self.is_request_sent() && !may_need_resend(head.response.status()) {
            self.request = RequestWriter::default();
        }
        // Do not keep the buffer of a huge head while the body is received.
        if self.read_buffer.capacity() > 4 * MAX_READ_BYTES {
            self.read_buffer = BytesMut::from(&self.read_buffer[..]);
        }
    }

    /// Returns whether the whole request has been sent.
    pub(in crate::client) fn is_request_sent(&self) -> bool {
        !self.write_closed && self.request.is_complete()
    }

    /// Returns whether the request sent over this connection can be recovered.
    pub(in crate::client) fn can_recover_request(&self) -> bool {
        self.request.can_rewind()
    }

    /// Returns the request so that it can be sent again, after a response that shows that it was not executed.
    pub(in crate::client) fn recover_request(&mut self) -> RequestWriter {
        // An incomplete request will never be completed, so the connection cannot be reused.
        self.write_closed |= !self.request.is_complete();
        self.request.rewind()
    }

    /// Returns the request so that it can be sent over another connection.
    pub(in crate::client) fn into_request(mut self) -> RequestWriter {
        self.request.rewind()
    }

    /// Returns the next frame of the response body, and continues to send the request.
    pub(in crate::client) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        decoder: &mut BodyDecoder,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        if let Err(error) = self.poll_write_request(cx) {
            return Poll::Ready(Some(Err(ResponseAborted::Request(error))));
        }
        loop {
            if let Some(frame) = decoder.decode_frame(&mut self.read_buffer)? {
                return Poll::Ready(Some(Ok(frame)));
            }
            if decoder.is_done() {
                return Poll::Ready(None);
            }
            if ready!(self.poll_fill_buffer(cx, decoder.remaining_hint()))? == 0 {
                return Poll::Ready(if decoder.on_eof() {
                    None
                } else {
                    Some(Err(ResponseAborted::Io(io::ErrorKind::UnexpectedEof.into())))
                });
            }
        }
    }

    /// Continues to send the request.
    pub(in crate::client) fn poll_write_request(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Result<(), RequestBodyError> {
        if self.write_closed || self.request.is_complete() {
            return Ok(());
        }
        if self.stream.is_tls() {
            // A failed write through TLS may still have sent data.
            self.request.mark_started();
        }
        match self.request.poll_send(&mut self.stream, cx) {
            Poll::Pending | Poll::Ready(Ok(())) => Ok(()),
            Poll::Ready(Err(request_writer::WriteError::Body(error))) => Err(error),
            Poll::Ready(Err(request_writer::WriteError::Io(error))) => {
                // The next read shows whether the upstream has responded or closed the connection.
                tracing::debug!(%error, "An upstream accepts no more of a request");
                self.write_closed = true;
                if self.request.has_started() {
                    self.request.discard_body();
                }
                Ok(())
            }
        }
    }

    /// Reads more data, of which at least `expected` bytes belong to the current body.
    fn poll_fill_buffer(&mut self, cx: &mut Context<'_>, expected: u64) -> Poll<io::Result<usize>> {
        let expected = usize::try_from(expected).unwrap_or(MAX_READ_BYTES);
        let size = expected.clamp(self.read_size, MAX_READ_BYTES);
        if self.read_buffer.capacity() - self.read_buffer.len() < size.min(MIN_READ_BYTES)
            || self.read_buffer.is_empty()
        {
            // Large responses use a buffer that this thread used recently.
            if size == MAX_READ_BYTES
                && self.read_buffer.is_empty()
                && self.read_buffer.capacity() < size
            {
                buffer_pool::replace(&mut self.read_buffer);
            }
            self.read_buffer.reserve(size);
        }
        let room = self.read_buffer.capacity() - self.read_buffer.len();
        let read = ready!(poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.read_buffer))?;
        if read == room {
            self.read_size = (room * 2).min(MAX_READ_BYTES);
        }
        Poll::Ready(Ok(read))
    }

    /// Data received and not yet parsed.
    pub(in crate::client) fn buffered_input(&self) -> &[u8] {
        &self.read_buffer
    }

    /// Returns whether the connection can be used for another exchange after the end of this response.
    pub(in crate::client) fn is_reusable(&self) -> bool {
        self.keep_alive && self.is_request_sent() && self.read_buffer.is_empty()
    }

    /// Frees buffers that an idle connection does not need. Returns whether the connection is still open and silent.
    pub(in crate::client) fn prepare_idle(&mut self) -> bool {
        self.read_size = MIN_READ_BYTES;
        self.request = RequestWriter::default();
        self.read_buffer = BytesMut::with_capacity(1);
        let read = poll_read_buf(
            Pin::new(&mut self.stream),
            &mut Context::from_waker(Waker::noop()),
            &mut self.read_buffer,
        );
        self.read_buffer = BytesMut::new();
        // Ready means a close, an error, or unexpected data.
        read.is_pending()
    }

    /// Returns whether the socket of this idle connection has unexpected data or has been closed.
    pub(in crate::client) fn is_readable(&self) -> bool {
        self.stream.is_readable()
    }

    /// Returns the stream and the data received and not yet parsed.
    pub(in crate::client) fn into_parts(self) -> (MaybeTlsStream, Bytes) {
        (self.stream, self.read_buffer.freeze())
    }
}

/// Returns whether a response with `status` may come from a proxy that could not reach the function. In that case the
/// request may have to be sent again.
fn may_need_resend(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE)
}

/// Returns whether `input` may contain a complete head, given that its first `scanned` bytes do not. Without this
/// check, a head received byte by byte would be parsed once for each byte.
fn may_be_complete(input: &[u8], scanned: usize) -> bool {
    if scanned == 0 {
        return !input.is_empty();
    }
    let unscanned = &input[scanned.saturating_sub(3)..];
    unscanned.windows(2).any(|two| two == b"\n\n")
        || unscanned.windows(3).any(|three| three == b"\n\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_parsed_only_when_it_may_be_complete() {
        let head = b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n";
        assert!(!may_be_complete(b"", 0));
        assert!(may_be_complete(&head[..1], 0));
        for end in 2..head.len() {
            assert!(!may_be_complete(&head[..end], end - 1), "{end}");
        }
        assert!(may_be_complete(head, head.len() - 1));
        assert!(may_be_complete(b"HTTP/1.1 200 OK\n\n", 16));
    }
}
