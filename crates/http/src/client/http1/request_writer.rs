//! Writes a request to an upstream: its head, and its body as it is received.

#[cfg(test)]
mod tests;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::request::Parts;
use http::{HeaderMap, Method};
use http_body::{Body, Frame};
use tokio::io::AsyncWrite;

use crate::client::MAX_SENDS;
use crate::client::body::{RequestBody, RequestBodyError};
use crate::client::http1::wire::request::{
    Framing, path_and_query, write_chunk_size, write_head_end, write_header, write_last_chunk,
    write_request_line,
};

/// Smaller frames are copied into one buffer up to this size. Larger frames are written without a copy.
const COALESCE_LIMIT: usize = 8 << 10;
/// Initial capacity for a head; most heads fit.
const TYPICAL_HEAD_BYTES: usize = 512;

/// Why a request cannot be sent.
#[derive(Debug)]
pub(super) enum WriteError {
    /// The upstream accepts no more data. It may have responded nevertheless.
    Io(io::Error),
    Body(RequestBodyError),
}

/// A request that is being sent: its head as bytes, and its body. The default value is a request that has been sent.
#[derive(Default)]
pub struct RequestWriter {
    /// Data to write, of which the first `written` bytes have been written.
    buffer: Vec<u8>,
    written: usize,
    /// A large frame to write after `buffer`.
    frame: Bytes,
    /// `frame` is the data of a chunk: a line end must follow.
    frame_ends_chunk: bool,
    /// The rest of the body; `None` after its end.
    body: Option<RequestBody>,
    framing: Framing,
    /// Data was written that the stream may still buffer.
    needs_flush: bool,
    /// Part of the request may have reached the upstream.
    started: bool,
    /// Number of earlier sends, complete or partial.
    previous_sends: u32,
    /// `buffer` contains the request from its first byte.
    replayable: bool,
    /// Maximum size of `buffer` while it keeps written data for a replay; 0 if no replay was requested.
    replay_limit: usize,
    /// The body failed. Every later poll returns this error, so that a partial body is never taken for a complete one.
    body_error: Option<RequestBodyError>,
    is_head: bool,
    safe_to_resend: bool,
    /// Interim responses are forwarded.
    forwards_interim: bool,
}

impl RequestWriter {
    /// Creates a request from `head`, which is sent unchanged, and `body`.
    pub fn new(head: &Parts, body: RequestBody) -> Self {
        Self::with_head(&head.method, &head.headers, body, |out| {
            write_request_line(out, &head.method, ["", path_and_query(&head.uri)]);
            head.headers.iter().for_each(|(name, value)| write_header(out, name, value));
        })
    }

    /// Creates a request with this method and body. `headers` are those received from the client; they determine the
    /// framing. `write_head` writes the head without its end.
    pub fn with_head(
        method: &Method,
        headers: &HeaderMap,
        body: RequestBody,
        write_head: impl FnOnce(&mut Vec<u8>),
    ) -> Self {
        let framing = Framing::of(method, headers, &body);
        let bodiless = matches!(framing, Framing::NoBody | Framing::Length(0));
        let short = match framing {
            Framing::Length(length) => usize::try_from(length).unwrap_or(0),
            Framing::NoBody | Framing::Chunked => 0,
        };
        let inlined = if short <= COALESCE_LIMIT { short } else { 0 };
        let mut buffer = Vec::with_capacity(TYPICAL_HEAD_BYTES + inlined);
        write_head(&mut buffer);
        write_head_end(&mut buffer, framing);
        Self {
            buffer,
            body: (!bodiless).then_some(body),
            framing,
            replayable: true,
            is_head: *method == Method::HEAD,
            safe_to_resend: bodiless && method.is_idempotent(),
            forwards_interim: true,
            ..Self::default()
        }
    }

    /// Returns whether this is a HEAD request, whose response has no body.
    pub(super) fn is_head(&self) -> bool {
        self.is_head
    }

    /// Discards interim responses to this request.
    pub fn discard_interim(&mut self) {
        self.forwards_interim = false;
    }

    /// Returns whether interim responses are forwarded to the client.
    pub(super) fn forwards_interim(&self) -> bool {
        self.forwards_interim
    }

    /// Returns whether the request has no body and an idempotent method, so that it can be sent again at any time.
    pub fn is_safe_to_resend(&self) -> bool {
        self.safe_to_resend
    }

    /// Keeps the bytes of the request for a replay, as long as there are at most `limit` bytes. A small request that is
    /// received in one piece is kept in any case, because that costs nothing.
    pub fn enable_replay(&mut self, limit: usize) {
        self.replay_limit = limit;
    }

    /// Returns the length of the remaining body in bytes, if known.
    pub fn remaining_body_length(&self) -> Option<u64> {
        self.body.as_ref().map_or(Some(0), |body| body.size_hint().exact())
    }

    /// Returns whether the request can be sent again from its first byte.
    pub(super) fn can_rewind(&self) -> bool {
        let may_be_sent = self.previous_sends + u32::from(self.started) < MAX_SENDS;
        let is_there = (self.safe_to_resend || self.replayable) && !self.buffer.is_empty();
        is_there && may_be_sent && self.body_error.is_none()
    }

    /// Reads the body into the replay buffer before the request is sent. Ready when the body ends or the buffer is
    /// full.
    ///
    /// # Errors
    /// When the client's body ends early, is malformed, or exceeds its deadline. The request must not be sent then.
    pub fn poll_buffer_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RequestBodyError>> {
        while self.replay_limit > 0 && self.body.is_some() && self.frame.is_empty() {
            if let Err(error) = ready!(self.poll_read_body(cx)) {
                (self.body, self.body_error) = (None, Some(error));
                return Poll::Ready(Err(error));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes the request, to be sent again from its first byte. Requires `can_rewind()`, or that nothing was sent.
    pub(super) fn rewind(&mut self) -> Self {
        let writer = std::mem::take(self);
        let previous_sends = writer.previous_sends + u32::from(writer.started);
        Self { written: 0, started: false, needs_flush: false, previous_sends, ..writer }
    }

    /// Discards the rest of the body.
    pub(super) fn discard_body(&mut self) {
        // The kept part is not the whole request any more.
        self.replayable &= self.body.take().is_none();
    }

    /// Records that part of the request may reach the upstream from now on.
    pub(super) fn mark_started(&mut self) {
        self.started = true;
    }

    /// Returns whether part of the request may have reached the upstream.
    pub(super) fn has_started(&self) -> bool {
        self.started
    }

    /// Returns whether the whole request has been written and flushed.
    pub(super) fn is_complete(&self) -> bool {
        self.body_error.is_none()
            && self.body.is_none()
            && !self.has_unwritten()
            && !self.needs_flush
    }

    /// Writes as much as possible. Ready when the whole request has been written and flushed.
    pub(super) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), WriteError>> {
        if let Some(error) = self.body_error {
            return Poll::Ready(Err(WriteError::Body(error)));
        }
        let mut body_waits = false;
        loop {
            if self.body.is_some()
                && !body_waits
                && self.frame.is_empty()
                && self.has_buffer_space()
            {
                match self.poll_read_body(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => {
                        (self.body, self.body_error) = (None, Some(error));
                        return Poll::Ready(Err(WriteError::Body(error)));
                    }
                    Poll::Pending => body_waits = true,
                }
            } else if self.has_unwritten() {
                ready!(self.poll_write(stream, cx)).map_err(WriteError::Io)?;
            } else {
                if self.needs_flush {
                    ready!(Pin::new(stream).poll_flush(cx)).map_err(WriteError::Io)?;
                    self.needs_flush = false;
                }
                return if self.body.is_some() { Poll::Pending } else { Poll::Ready(Ok(())) };
            }
        }
    }

    fn has_buffer_space(&self) -> bool {
        // Data kept for a replay may have been written already.
        let written = if self.replay_limit > 0 { self.written } else { 0 };
        self.buffer.len() - written < COALESCE_LIMIT
    }

    /// Returns whether `buffer` keeps its data, which has been written, for a replay.
    fn retains(&self) -> bool {
        let limit = if self.body.is_some() {
            self.replay_limit
        } else {
            self.replay_limit.max(2 * COALESCE_LIMIT)
        };
        self.safe_to_resend || (self.replayable && self.buffer.len() <= limit)
    }

    fn has_unwritten(&self) -> bool {
        self.written < self.buffer.len() || !self.frame.is_empty()
    }

    fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = Pin::new(stream);
        let buffer = &self.buffer[self.written..];
        let written = if self.frame.is_empty() {
            ready!(stream.poll_write(cx, buffer))?
        } else {
            let both = [io::IoSlice::new(buffer), io::IoSlice::new(&self.frame)];
            ready!(stream.poll_write_vectored(cx, &both))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        (self.started, self.needs_flush) = (true, true);
        let from_buffer = written.min(buffer.len());
        self.written += from_buffer;
        self.frame.advance(written - from_buffer);
        if !self.has_unwritten() && !self.retains() {
            self.replayable = false;
            self.buffer.clear();
            // Do not keep the buffer of a huge head while the body is sent.
            self.buffer.shrink_to(2 * COALESCE_LIMIT);
            self.written = 0;
            self.frame = Bytes::new();
            if std::mem::take(&mut self.frame_ends_chunk) {
                self.buffer.extend_from_slice(b"\r\n");
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads one frame of the body.
    fn poll_read_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RequestBodyError>> {
        let Some(body) = &mut self.body else { return Poll::Ready(Ok(())) };
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx)).transpose()?;
        let ended = frame.is_none() || body.is_end_stream();
        match frame.map(Frame::into_data) {
            Some(Ok(data)) => self.push_data(data)?,
            Some(Err(frame)) => return Poll::Ready(self.finish_body(frame.into_trailers().ok())),
            None => {}
        }
        // The line end of a large chunk precedes the end of the body.
        Poll::Ready(if ended && self.frame.is_empty() { self.finish_body(None) } else { Ok(()) })
    }

    fn push_data(&mut self, data: Bytes) -> Result<(), RequestBodyError> {
        // An empty chunk would end the body.
        if data.is_empty() {
            return Ok(());
        }
        let chunked = self.framing == Framing::Chunked;
        if self.replay_limit > 0 && self.buffer.len() + data.len() > self.replay_limit {
            self.disable_replay();
        }
        if chunked {
            write_chunk_size(&mut self.buffer, data.len());
        } else if let Framing::Length(left) = &mut self.framing {
            *left = left.checked_sub(data.len() as u64).ok_or(RequestBodyError::Malformed)?;
        }
        if data.len() > COALESCE_LIMIT && self.replay_limit == 0 {
            (self.frame, self.frame_ends_chunk, self.replayable) = (data, chunked, false);
        } else {
            self.buffer.extend_from_slice(&data);
            if chunked {
                self.buffer.extend_from_slice(b"\r\n");
            }
        }
        Ok(())
    }

    /// Stops keeping data for a replay, because the request is too long.
    fn disable_replay(&mut self) {
        self.buffer.drain(..self.written);
        (self.written, self.replay_limit, self.replayable) = (0, 0, false);
    }

    fn finish_body(&mut self, trailers: Option<HeaderMap>) -> Result<(), RequestBodyError> {
        self.body = None;
        match self.framing {
            Framing::Length(1..) => return Err(RequestBodyError::Malformed),
            Framing::Length(0) | Framing::NoBody => {}
            Framing::Chunked => write_last_chunk(&mut self.buffer, &trailers.unwrap_or_default()),
        }
        Ok(())
    }
}
