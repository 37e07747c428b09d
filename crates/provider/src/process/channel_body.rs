//! A response body that is written through a bounded channel and has to be finished explicitly.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame};
use tokio::sync::mpsc;

/// Maximum number of buffered chunks.
const CHANNEL_CAPACITY: usize = 4;

#[derive(Debug)]
enum Chunk {
    Data(Bytes),
    End,
}

/// The writing end. Dropping it without `finish` aborts the body.
#[derive(Clone, Debug)]
pub(super) struct BodyWriter(mpsc::Sender<Chunk>);

/// The reader has dropped the body.
#[derive(Debug)]
pub(super) struct ReaderGone;

/// The body. Dropping it drops its guard.
#[derive(Debug)]
pub(super) struct ChannelBody<G> {
    prefix: Option<Bytes>,
    chunks: mpsc::Receiver<Chunk>,
    finished: bool,
    _guard: G,
}

/// Creates a body and its writer.
pub(super) fn channel() -> (BodyWriter, ChannelBody<()>) {
    let (writer, chunks) = mpsc::channel(CHANNEL_CAPACITY);
    (BodyWriter(writer), ChannelBody { prefix: None, chunks, finished: false, _guard: () })
}

impl BodyWriter {
    /// Writes a chunk; waits while the channel is full.
    ///
    /// # Errors
    /// The reader has dropped the body.
    pub(super) async fn write(&self, data: Bytes) -> Result<(), ReaderGone> {
        self.0.send(Chunk::Data(data)).await.map_err(|_| ReaderGone)
    }

    /// Marks the body as complete.
    ///
    /// # Errors
    /// The reader has dropped the body.
    pub(super) async fn finish(self) -> Result<(), ReaderGone> {
        self.0.send(Chunk::End).await.map_err(|_| ReaderGone)
    }
}

/// Result of a read from the channel.
#[derive(Debug, PartialEq)]
pub(super) enum BodyEvent {
    Data(Bytes),
    End,
    Aborted,
}

impl<G> ChannelBody<G> {
    /// Reads the next chunk before the body is sent to a client. Cancel-safe.
    pub(super) async fn next(&mut self) -> BodyEvent {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Prepends `prefix`, which has been read before, and attaches `guard` to the body.
    pub(super) fn with_prefix<H>(self, prefix: Bytes, guard: H) -> ChannelBody<H> {
        ChannelBody {
            prefix: Some(prefix),
            chunks: self.chunks,
            finished: self.finished,
            _guard: guard,
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<BodyEvent> {
        if let Some(data) = self.prefix.take() {
            return Poll::Ready(BodyEvent::Data(data));
        }
        if self.finished {
            return Poll::Ready(BodyEvent::End);
        }
        Poll::Ready(match ready!(self.chunks.poll_recv(cx)) {
            Some(Chunk::Data(data)) => BodyEvent::Data(data),
            Some(Chunk::End) => {
                self.finished = true;
                BodyEvent::End
            }
            None => BodyEvent::Aborted,
        })
    }
}

impl<G: Unpin> Body for ChannelBody<G> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        Poll::Ready(match ready!(self.poll_next(cx)) {
            BodyEvent::Data(data) => Some(Ok(Frame::data(data))),
            BodyEvent::End => None,
            BodyEvent::Aborted => Some(Err(io::Error::other("aborted by its writer"))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.finished && self.prefix.is_none()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_body_is_complete_only_if_its_writer_finished_it() {
        let (writer, stream) = channel();
        writer.write("b".into()).await.unwrap();
        writer.finish().await.unwrap();
        let whole = stream.with_prefix("a".into(), ()).collect().await.unwrap();
        assert_eq!(whole.to_bytes(), "ab");

        let (writer, stream) = channel();
        writer.write("b".into()).await.unwrap();
        drop(writer);
        assert!(stream.collect().await.is_err());
    }

    #[tokio::test]
    async fn a_writer_notices_that_the_body_was_dropped() {
        let (writer, stream) = channel();
        drop(stream);
        assert!(writer.write("a".into()).await.is_err());
    }
}
