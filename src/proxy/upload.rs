//! A request on its way to an upstream: its head, and its body as it comes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::request::Parts;
use http::{HeaderMap, Method};
use http_body::{Body, Frame};
use tokio::io::AsyncWrite;

use crate::proxy::MAX_SENDS;
use crate::proxy::body::{BodyError, RequestBody};
use crate::proxy::wire::request::{
    Framing, path_and_query, write_chunk_size, write_end, write_header, write_last_chunk,
    write_start,
};

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
    /// How often it was sent before, in whole or in part.
    sends: u32,
    /// All that there has been of the request so far is still in `ready`.
    kept: bool,
    /// Up to so many bytes of it stay there while more of the body comes.
    keeps: usize,
    /// The body broke off. Told as often as it is asked for, lest a part be taken for the whole.
    failed: Option<BodyError>,
    is_head: bool,
    repeatable: bool,
    /// Interim responses to it are passed on.
    wants_interim: bool,
}

impl Upload {
    /// The request that `head` and `body` make. `head` is as it is to be sent.
    pub(super) fn new(head: &Parts, body: RequestBody) -> Self {
        Self::write(&head.method, &head.headers, body, |out| {
            write_start(out, &head.method, ["", path_and_query(&head.uri)]);
            head.headers.iter().for_each(|(name, value)| write_header(out, name, value));
        })
    }

    /// A request with this method and body; `headers` say what it was framed by. `write_head` writes its head, but for
    /// the end.
    pub(super) fn write(
        method: &Method,
        headers: &HeaderMap,
        body: RequestBody,
        write_head: impl FnOnce(&mut Vec<u8>),
    ) -> Self {
        let framing = Framing::of(method, headers, &body);
        let bodiless = matches!(framing, Framing::Bare | Framing::Length(0));
        let short = match framing {
            Framing::Length(length) => usize::try_from(length).unwrap_or(0),
            Framing::Bare | Framing::Chunked => 0,
        };
        let gathered = if short <= ENOUGH { short } else { 0 };
        let mut ready = Vec::with_capacity(USUAL_HEAD + gathered);
        write_head(&mut ready);
        write_end(&mut ready, framing);
        Self {
            ready,
            body: (!bodiless).then_some(body),
            framing,
            kept: true,
            is_head: *method == Method::HEAD,
            repeatable: bodiless && method.is_idempotent(),
            wants_interim: true,
            ..Self::default()
        }
    }

    /// Whether the answer will have no body, whatever it says.
    pub(super) fn is_head(&self) -> bool {
        self.is_head
    }

    /// Drops the interim responses to this request.
    pub(super) fn drop_interim(&mut self) {
        self.wants_interim = false;
    }

    /// Whether interim responses to it are passed on, if there is a client.
    pub(super) fn wants_interim(&self) -> bool {
        self.wants_interim
    }

    /// Whether the request can be sent once more: it has no body, and its method promises that twice is as once.
    pub(super) fn is_repeatable(&self) -> bool {
        self.repeatable
    }

    /// Keeps the request to be sent once more, for as long as it has no more than `most` bytes. Without this, one that
    /// is small and comes in one piece is kept all the same, since that costs nothing.
    pub(super) fn keep(&mut self, most: usize) {
        self.keeps = most;
    }

    /// How long what is left of the body is, if that is known.
    pub(super) fn body_length(&self) -> Option<u64> {
        self.body.as_ref().map_or(Some(0), |body| body.size_hint().exact())
    }

    /// Whether the request can be sent from its beginning, should it turn out that nobody has seen to it.
    pub(super) fn can_start_over(&self) -> bool {
        let may_be_sent = self.sends + u32::from(self.begun) < MAX_SENDS;
        let is_there = (self.repeatable || self.kept) && !self.ready.is_empty();
        is_there && may_be_sent && self.failed.is_none()
    }

    /// Takes in what comes of the body before it can be sent, as far as it is kept. Ready when there is no more to do.
    pub(super) fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        while self.keeps > 0 && self.body.is_some() && self.frame.is_empty() {
            if let Err(error) = ready!(self.poll_body(cx)) {
                (self.body, self.failed) = (None, Some(error));
                return Poll::Ready(Err(error));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes the request out, to be sent from its beginning. Only for one that is kept, or has not begun.
    pub(super) fn start_over(&mut self) -> Self {
        let upload = std::mem::take(self);
        let sends = upload.sends + u32::from(upload.begun);
        Self { written: 0, begun: false, unflushed: false, sends, ..upload }
    }

    /// Sends no more of the body.
    pub(super) fn drop_body(&mut self) {
        // What is kept is not all of it then.
        self.kept &= self.body.take().is_none();
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
        // What is kept may have been written.
        let written = if self.keeps > 0 { self.written } else { 0 };
        self.ready.len() - written < ENOUGH
    }

    /// Whether `ready`, now written, stays as it is: it may have to be sent once more.
    fn stays(&self) -> bool {
        let most = if self.body.is_some() { self.keeps } else { self.keeps.max(2 * ENOUGH) };
        self.repeatable || (self.kept && self.ready.len() <= most)
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
        if !self.has_unwritten() && !self.stays() {
            self.kept = false;
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
        if self.keeps > 0 && self.ready.len() + data.len() > self.keeps {
            self.keep_no_more();
        }
        if chunked {
            write_chunk_size(&mut self.ready, data.len());
        } else if let Framing::Length(left) = &mut self.framing {
            *left = left.checked_sub(data.len() as u64).ok_or(BodyError::Broken)?;
        }
        if data.len() > ENOUGH && self.keeps == 0 {
            (self.frame, self.in_chunk, self.kept) = (data, chunked, false);
        } else {
            self.ready.extend_from_slice(&data);
            if chunked {
                self.ready.extend_from_slice(b"\r\n");
            }
        }
        Ok(())
    }

    /// It has become too long to be kept.
    fn keep_no_more(&mut self) {
        self.ready.drain(..self.written);
        (self.written, self.keeps, self.kept) = (0, 0, false);
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
    async fn what_is_kept_can_be_sent_twice_and_what_is_too_long_cannot() {
        let limit = 4 * ENOUGH;
        for (length, again) in [(1, true), (ENOUGH + 1, true), (3 * ENOUGH, true), (limit, false)] {
            for ahead in [false, true] {
                let (mut sender, body) = channel();
                let data = "z".repeat(length);
                sender.send_data(Bytes::from(data.clone())).await.unwrap();
                drop(sender);
                let mut upload = Upload::new(&post(), body);
                upload.keep(limit);
                if ahead {
                    let _ = poll_fn(|cx| Poll::Ready(upload.poll_ahead(cx))).await;
                }
                for time in 0..if again { 2 } else { 1 } {
                    let (mut ours, theirs) = duplex(1 << 20);
                    poll_fn(|cx| upload.poll(&mut ours, cx)).await.unwrap();
                    drop(ours);
                    let expect = format!("{length:x}\r\n{data}\r\n0\r\n\r\n");
                    assert!(written(theirs).await == expect, "{length}, {ahead}, {time}");
                    assert_eq!(upload.can_start_over(), again, "{length}, {ahead}");
                    upload = upload.start_over();
                }
            }
        }
    }

    #[tokio::test]
    async fn half_a_request_is_sent_from_its_beginning_when_it_is_kept() {
        let (mut sender, body) = channel();
        let mut upload = Upload::new(&post(), body);
        upload.keep(1 << 10);
        sender.send_data(Bytes::from_static(b"first")).await.unwrap();
        let (mut ours, theirs) = duplex(1 << 20);
        poll_fn(|cx| Poll::Ready(upload.poll(&mut ours, cx).is_pending())).await;
        drop(ours);
        assert_eq!(written(theirs).await, "5\r\nfirst\r\n");
        let mut upload = upload.start_over();
        sender.send_data(Bytes::from_static(b"second")).await.unwrap();
        drop(sender);
        let (mut ours, theirs) = duplex(1 << 20);
        poll_fn(|cx| upload.poll(&mut ours, cx)).await.unwrap();
        drop(ours);
        assert_eq!(written(theirs).await, "5\r\nfirst\r\n6\r\nsecond\r\n0\r\n\r\n");
    }

    #[tokio::test]
    async fn a_request_is_sent_three_times_at_most_and_a_failed_connection_is_no_sending() {
        let body = RequestBody::Full(Some(Bytes::from_static(b"small")));
        let mut upload = Upload::new(&post(), body);
        for times_sent in 1..=MAX_SENDS {
            // Nobody was there.
            upload = upload.start_over();
            let (mut ours, _theirs) = duplex(1 << 20);
            poll_fn(|cx| upload.poll(&mut ours, cx)).await.unwrap();
            assert_eq!(upload.can_start_over(), times_sent < 3, "{times_sent}");
            upload = upload.start_over();
        }
    }

    #[tokio::test]
    async fn a_small_request_is_kept_unasked() {
        let body = RequestBody::Full(Some(Bytes::from_static(b"small")));
        let mut upload = Upload::new(&post(), body);
        let (mut ours, _theirs) = duplex(1 << 20);
        poll_fn(|cx| upload.poll(&mut ours, cx)).await.unwrap();
        assert!(upload.can_start_over() && !Upload::default().can_start_over());
        let body = RequestBody::Full(Some(Bytes::from("x".repeat(3 * ENOUGH))));
        let mut upload = Upload::new(&post(), body);
        poll_fn(|cx| upload.poll(&mut ours, cx)).await.unwrap();
        assert!(!upload.can_start_over());
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
