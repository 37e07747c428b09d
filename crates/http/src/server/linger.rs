//! Lingering close of a connection whose client may still be sending.
//!
//! A close of a socket with unread data resets the connection, and the client loses a response that it has not read.
//! Therefore the sending side is closed first, and further data is read and discarded for a limited time (RFC 9112,
//! 9.6).

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::server::client_connection::ClientIo;

/// Maximum time for which data is discarded.
const MAX_LINGER_TIME: Duration = Duration::from_secs(10);
/// Maximum pause between two pieces of data.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Maximum amount of discarded data.
const MAX_DISCARDED_BYTES: usize = 64 << 20;
/// Maximum time during shutdown.
const DRAINING_LINGER_TIME: Duration = Duration::from_secs(1);
/// Size of a read.
const READ_BYTES: usize = 16 << 10;

/// A connection without further responses; a future that completes when it can be closed.
pub(super) struct Linger {
    stream: ClientIo,
    shut_down: bool,
    /// The amount of data that may still be discarded.
    remaining: usize,
    deadline: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Linger {
    /// Closes the sending side of `stream` after its pending output has been written.
    pub(super) fn new(stream: ClientIo) -> Self {
        let now = Instant::now();
        let timer = Box::pin(tokio::time::sleep_until(now + MAX_PAUSE));
        Self {
            stream,
            shut_down: false,
            remaining: MAX_DISCARDED_BYTES,
            deadline: now + MAX_LINGER_TIME,
            timer,
        }
    }

    /// Shortens the remaining time, because the process shuts down.
    pub(super) fn shorten(&mut self) {
        let deadline = Instant::now() + DRAINING_LINGER_TIME;
        if deadline < self.deadline {
            self.deadline = deadline;
            self.timer.as_mut().reset(deadline);
        }
    }

    fn poll_shutdown_write(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if !self.shut_down {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            self.shut_down = true;
            if self.stream.is_read_closed() {
                // The client has closed its side: no more data can arrive.
                return Poll::Ready(Err(std::io::ErrorKind::NotConnected.into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads and discards available data. Ready when the client has closed its side or sent too much.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut buffer = [0; READ_BYTES];
        let mut received = false;
        loop {
            let mut read = ReadBuf::new(&mut buffer);
            match self.stream.poll_discard(cx, &mut read) {
                Poll::Pending => break,
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Ready(Ok(())) => {}
            }
            let length = read.filled().len();
            if length == 0 || length > self.remaining {
                return Poll::Ready(());
            }
            self.remaining -= length;
            received = true;
        }
        if received {
            let pause_deadline = Instant::now() + MAX_PAUSE;
            self.timer.as_mut().reset(pause_deadline.min(self.deadline));
        }
        Poll::Pending
    }
}

impl Future for Linger {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if let Poll::Ready(Err(_)) = this.poll_shutdown_write(cx) {
            return Poll::Ready(());
        }
        if this.poll_discard(cx).is_ready() {
            return Poll::Ready(());
        }
        this.timer.as_mut().poll(cx)
    }
}
