//! A request on its way to an upstream: its head, and its body as it comes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::request::Parts;
use http::{HeaderMap, Method};
use http_body::{Body, Frame};
use tokio::io::AsyncWrite;

use crate::proxy::body::{BodyError, RequestBody};
use crate::proxy::wire::request::{Framing, write_chunk_size, write_head, write_last_chunk};

/// So much is gathered before it is written. Larger frames are written where they are.
const ENOUGH: usize = 8 << 10;
/// Room for most heads.
const USUAL_HEAD: usize = 512;

/// Why a request cannot be sent on.
#[derive(Debug)]
pub(super) enum Failure {
    /// The upstream takes no more. It may have answered all the same.
    Io(io::Error),
    Body(BodyError),
}

/// A request on its way: its head as bytes, its body as it comes. The default is one that is out.
#[derive(Default)]
pub(super) struct Upload {
    /// What can be written, from `written` on.
    ready: Vec<u8>,
    written: usize,
    /// A large frame that follows `ready`.
    frame: Bytes,
    /// `frame` ends a chunk.
    in_chunk: bool,
    /// The rest of the body; gone when it has ended.
    body: Option<RequestBody>,
    framing: Framing,
    /// Something was written and may be held up inside the stream.
    unflushed: bool,
    /// Some of the request may have reached the upstream.
    begun: bool,
    /// The body broke off. Told as often as it is asked for, lest a part be taken for the whole.
    failed: Option<BodyError>,
    is_head: bool,
    repeatable: bool,
}

impl Upload {
    /// The request that `head` and `body` make. `head` is as it is to be sent.
    pub(super) fn new(head: &Parts, body: RequestBody) -> Self {
        let framing = Framing::of(head, &body);
        let bodiless = matches!(framing, Framing::Bare | Framing::Length(0));
        let short = match framing {
            Framing::Length(length) => usize::try_from(length).unwrap_or(0),
            Framing::Bare | Framing::Chunked => 0,
        };
        let gathered = if short <= ENOUGH { short } else { 0 };
        let mut ready = Vec::with_capacity(USUAL_HEAD + gathered);
        write_head(&mut ready, head, framing);
        Self {
            ready,
            body: (!bodiless).then_some(body),
            framing,
            is_head: head.method == Method::HEAD,
            repeatable: bodiless && head.method.is_idempotent(),
            ..Self::default()
        }
    }

    /// Whether the answer will have no body, whatever it says.
    pub(super) fn is_head(&self) -> bool {
        self.is_head
    }

    /// Whether the request can be sent once more: it has no body, and its method promises that twice is as once.
    pub(super) fn is_repeatable(&self) -> bool {
        self.repeatable
    }

    /// Takes the request out, to be sent from its beginning. Only for one that is repeatable, or has not begun.
    pub(super) fn start_over(&mut self) -> Self {
        let upload = std::mem::take(self);
        Self { written: 0, begun: false, unflushed: false, ..upload }
    }

    /// Sends no more of the body.
    pub(super) fn drop_body(&mut self) {
        self.body = None;
    }

    /// Notes that some of the request may reach the upstream from now on.
    pub(super) fn begin(&mut self) {
        self.begun = true;
    }

    /// Whether any of the request may have reached the upstream.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// Whether all of the request is out.
    pub(super) fn is_whole(&self) -> bool {
        self.failed.is_none() && self.body.is_none() && !self.has_unwritten() && !self.unflushed
    }

    /// Writes what can be written; ready when all of it is.
    pub(super) fn poll<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Failure>> {
        if let Some(error) = self.failed {
            return Poll::Ready(Err(Failure::Body(error)));
        }
        let mut body_waits = false;
        loop {
            if self.body.is_some() && !body_waits && self.frame.is_empty() && self.has_room() {
                match self.poll_body(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => {
                        (self.body, self.failed) = (None, Some(error));
                        return Poll::Ready(Err(Failure::Body(error)));
                    }
                    Poll::Pending => body_waits = true,
                }
            } else if self.has_unwritten() {
                ready!(self.poll_write(stream, cx)).map_err(Failure::Io)?;
            } else {
                if self.unflushed {
                    ready!(Pin::new(stream).poll_flush(cx)).map_err(Failure::Io)?;
                    self.unflushed = false;
                }
                return if self.body.is_some() { Poll::Pending } else { Poll::Ready(Ok(())) };
            }
        }
    }

    fn has_room(&self) -> bool {
        self.ready.len() < ENOUGH
    }

    fn has_unwritten(&self) -> bool {
        self.written < self.ready.len() || !self.frame.is_empty()
    }

    fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = Pin::new(stream);
        let ready = &self.ready[self.written..];
        let written = if self.frame.is_empty() {
            ready!(stream.poll_write(cx, ready))?
        } else {
            let both = [io::IoSlice::new(ready), io::IoSlice::new(&self.frame)];
            ready!(stream.poll_write_vectored(cx, &both))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        (self.begun, self.unflushed) = (true, true);
        let of_ready = written.min(ready.len());
        self.written += of_ready;
        self.frame.advance(written - of_ready);
        // What may have to be sent once more is kept.
        if !self.has_unwritten() && !self.repeatable {
            self.ready.clear();
            // The room of a huge head is not kept for as long as its body takes.
            self.ready.shrink_to(2 * ENOUGH);
            self.written = 0;
            self.frame = Bytes::new();
            if std::mem::take(&mut self.in_chunk) {
                self.ready.extend_from_slice(b"\r\n");
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes one frame of the body.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let Some(body) = &mut self.body else { return Poll::Ready(Ok(())) };
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx)).transpose()?;
        let ended = frame.is_none() || body.is_end_stream();
        match frame.map(Frame::into_data) {
            Some(Ok(data)) => self.push(data)?,
            Some(Err(frame)) => return Poll::Ready(self.end(frame.into_trailers().ok())),
            None => {}
        }
        // The end of a large chunk goes before that of the body.
        Poll::Ready(if ended && self.frame.is_empty() { self.end(None) } else { Ok(()) })
    }

    fn push(&mut self, data: Bytes) -> Result<(), BodyError> {
        // An empty chunk would be the last.
        if data.is_empty() {
            return Ok(());
        }
        let chunked = self.framing == Framing::Chunked;
        if chunked {
            write_chunk_size(&mut self.ready, data.len());
        } else if let Framing::Length(left) = &mut self.framing {
            *left = left.checked_sub(data.len() as u64).ok_or(BodyError::Broken)?;
        }
        if data.len() > ENOUGH {
            (self.frame, self.in_chunk) = (data, chunked);
        } else {
            self.ready.extend_from_slice(&data);
            if chunked {
                self.ready.extend_from_slice(b"\r\n");
            }
        }
        Ok(())
    }

    fn end(&mut self, trailers: Option<HeaderMap>) -> Result<(), BodyError> {
        self.body = None;
        match self.framing {
            Framing::Length(1..) => return Err(BodyError::Broken),
            Framing::Length(0) | Framing::Bare => {}
            Framing::Chunked => write_last_chunk(&mut self.ready, &trailers.unwrap_or_default()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use axum::body::Body as ApiBody;
    use http::{HeaderName, HeaderValue, Request};
    use http_body_util::channel::{Channel, Sender};
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};

    use super::*;

    fn post() -> Parts {
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        request.into_parts().0
    }

    fn channel() -> (Sender<Bytes, io::Error>, RequestBody) {
        let (sender, body) = Channel::<Bytes, io::Error>::new(4);
        (sender, RequestBody::Api(ApiBody::new(body)))
    }

    async fn written(mut stream: DuplexStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    /// Sends `body` through a pipe that takes `room` bytes at once; what arrives behind the head.
    async fn sent(body: RequestBody, room: usize) -> String {
        let (mut ours, theirs) = duplex(room);
        let mut upload = Upload::new(&post(), body);
        let sends = async move {
            poll_fn(|cx| upload.poll(&mut ours, cx)).await.unwrap();
            assert!(upload.is_whole() && upload.has_begun());
        };
        tokio::join!(written(theirs), sends).0
    }

    #[tokio::test]
    async fn a_body_arrives_whole_through_any_pipe() {
        for length in [1, ENOUGH, ENOUGH + 1, 3 * ENOUGH] {
            for room in [7, ENOUGH, 1 << 20] {
                let data = "x".repeat(length);
                let body = RequestBody::Full(Some(data.clone().into()));
                assert!(sent(body, room).await == data, "{length} through {room}");
            }
        }
    }

    #[tokio::test]
    async fn chunks_large_and_small_arrive_and_so_does_the_end() {
        for room in [7, 1 << 20] {
            let (mut sender, body) = channel();
            let large = "y".repeat(ENOUGH + 1);
            for data in ["one", "", &large] {
                sender.send_data(Bytes::from(data.to_owned())).await.unwrap();
            }
            let name = HeaderName::from_static("x-checksum");
            let trailers = HeaderMap::from_iter([(name, HeaderValue::from_static("42"))]);
            sender.send_trailers(trailers).await.unwrap();
            drop(sender);
            let size = ENOUGH + 1;
            let expect = format!("3\r\none\r\n{size:x}\r\n{large}\r\n0\r\nx-checksum: 42\r\n\r\n");
            assert!(sent(body, room).await == expect, "through {room}");
        }
    }

    #[tokio::test]
    async fn what_there_is_goes_out_while_more_is_awaited() {
        let (mut sender, body) = channel();
        let (mut ours, mut theirs) = duplex(1 << 20);
        let mut upload = Upload::new(&post(), body);
        sender.send_data(Bytes::from_static(b"first")).await.unwrap();
        poll_fn(|cx| Poll::Ready(upload.poll(&mut ours, cx).is_pending())).await;
        let mut seen = Vec::new();
        while !seen.ends_with(b"first\r\n") {
            theirs.read_buf(&mut seen).await.unwrap();
        }
        assert!(!upload.is_whole());
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_not_ended() {
        let (sender, body) = channel();
        sender.abort(io::Error::other("gone"));
        let (mut ours, _theirs) = duplex(1 << 20);
        let mut upload = Upload::new(&post(), body);
        let failure = poll_fn(|cx| upload.poll(&mut ours, cx)).await.unwrap_err();
        assert!(matches!(failure, Failure::Body(BodyError::Broken)), "{failure:?}");
        // Nor is it later, when the body says nothing more.
        assert!(poll_fn(|cx| upload.poll(&mut ours, cx)).await.is_err());
        assert!(!upload.is_whole());
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_is_an_error_and_the_rest_can_be_had() {
        let (mut ours, theirs) = duplex(1 << 20);
        drop(theirs);
        let mut upload =
            Upload::new(&post(), RequestBody::Full(Some(Bytes::from("x".repeat(3 * ENOUGH)))));
        let failure = poll_fn(|cx| upload.poll(&mut ours, cx)).await.unwrap_err();
        assert!(matches!(failure, Failure::Io(_)), "{failure:?}");
        assert!(!upload.has_begun());
    }
}
