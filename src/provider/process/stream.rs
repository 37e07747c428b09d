//! A body that comes through a channel of a few chunks, and whose end has to be said.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame};
use tokio::sync::mpsc;

/// How many chunks may wait for whoever reads the body.
const BOUND: usize = 4;

#[derive(Debug)]
enum Part {
    Data(Bytes),
    End,
}

/// The writing end. Dropped without `end`, it breaks the body off.
#[derive(Clone, Debug)]
pub(super) struct Writer(mpsc::Sender<Part>);

/// Nobody reads the body any more.
#[derive(Debug)]
pub(super) struct Abandoned;

/// The body. Whatever `guard` does when dropped happens when the body is.
#[derive(Debug)]
pub(super) struct Stream<G> {
    first: Option<Bytes>,
    parts: mpsc::Receiver<Part>,
    ended: bool,
    _guard: G,
}

/// A body, and the way to write it.
pub(super) fn channel() -> (Writer, Stream<()>) {
    let (writer, parts) = mpsc::channel(BOUND);
    (Writer(writer), Stream { first: None, parts, ended: false, _guard: () })
}

impl Writer {
    /// Waits for room and writes.
    pub(super) async fn data(&self, data: Bytes) -> Result<(), Abandoned> {
        self.0.send(Part::Data(data)).await.map_err(|_| Abandoned)
    }

    /// Ends the body, so that it counts as whole.
    pub(super) async fn end(self) -> Result<(), Abandoned> {
        self.0.send(Part::End).await.map_err(|_| Abandoned)
    }

    /// Waits until nobody reads the body any more.
    pub(super) async fn abandoned(&self) {
        self.0.closed().await;
    }
}

/// What a reader finds next.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    Data(Bytes),
    End,
    BrokenOff,
}

impl<G> Stream<G> {
    /// The next chunk, for one who reads the body in place of a caller. Cancel-safe.
    pub(super) async fn next(&mut self) -> Next {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The rest of this body behind `first`, which has been read before; `guard` lives as long as it does.
    pub(super) fn behind<H>(self, first: Bytes, guard: H) -> Stream<H> {
        Stream { first: Some(first), parts: self.parts, ended: self.ended, _guard: guard }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        if let Some(data) = self.first.take() {
            return Poll::Ready(Next::Data(data));
        }
        if self.ended {
            return Poll::Ready(Next::End);
        }
        Poll::Ready(match ready!(self.parts.poll_recv(cx)) {
            Some(Part::Data(data)) => Next::Data(data),
            Some(Part::End) => {
                self.ended = true;
                Next::End
            }
            None => Next::BrokenOff,
        })
    }
}

impl<G: Unpin> Body for Stream<G> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        Poll::Ready(match ready!(self.poll_next(cx)) {
            Next::Data(data) => Some(Ok(Frame::data(data))),
            Next::End => None,
            Next::BrokenOff => Some(Err(io::Error::other("broken off by its source"))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.first.is_none()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_body_is_whole_only_if_its_end_was_said() {
        let (writer, stream) = channel();
        writer.data("b".into()).await.unwrap();
        writer.end().await.unwrap();
        let whole = stream.behind("a".into(), ()).collect().await.unwrap();
        assert_eq!(whole.to_bytes(), "ab");

        let (writer, stream) = channel();
        writer.data("b".into()).await.unwrap();
        drop(writer);
        assert!(stream.collect().await.is_err());
    }

    #[tokio::test]
    async fn a_writer_learns_that_nobody_reads() {
        let (writer, stream) = channel();
        drop(stream);
        writer.abandoned().await;
        assert!(writer.data("a".into()).await.is_err());
    }
}
