//! The end of a connection whose client may still be sending.
//!
//! To close a socket that holds unread data resets the connection, and the client loses the response that it has not
//! read yet. So the sending side is closed first, and what still comes is read and discarded for a while (RFC 9112, 9.6).

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::serve::caller::CallerStream;

/// How long a client may go on sending.
const LONGEST: Duration = Duration::from_secs(10);
/// How long it may pause.
const SILENCE: Duration = Duration::from_secs(2);
/// How much it may send.
const MOST: usize = 64 << 20;
/// What is left of these while the process stops.
const WHILE_STOPPING: Duration = Duration::from_secs(1);
/// How much is read at once.
const PIECE: usize = 16 << 10;

/// A connection on which nothing more will be answered; a future that ends when it can be closed.
pub(super) struct Linger {
    stream: CallerStream,
    shut_down: bool,
    /// How much more may come.
    left: usize,
    until: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Linger {
    /// Closes the sending side of `stream`, once what it still has to write is written.
    pub(super) fn new(stream: CallerStream) -> Self {
        let now = Instant::now();
        let timer = Box::pin(tokio::time::sleep_until(now + SILENCE));
        Self { stream, shut_down: false, left: MOST, until: now + LONGEST, timer }
    }

    /// The process stops: the client has little time left.
    pub(super) fn hurry(&mut self) {
        let until = Instant::now() + WHILE_STOPPING;
        if until < self.until {
            self.until = until;
            self.timer.as_mut().reset(until);
        }
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if !self.shut_down {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            self.shut_down = true;
            if self.stream.has_ended() {
                // Nothing more can come.
                return Poll::Ready(Err(std::io::ErrorKind::NotConnected.into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads what there is. Ready when nothing more can come, or too much has.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut piece = [0; PIECE];
        let mut came = false;
        loop {
            let mut read = ReadBuf::new(&mut piece);
            match self.stream.poll_discard(cx, &mut read) {
                Poll::Pending => break,
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Ready(Ok(())) => {}
            }
            let length = read.filled().len();
            if length == 0 || length > self.left {
                return Poll::Ready(());
            }
            self.left -= length;
            came = true;
        }
        if came {
            let silent = Instant::now() + SILENCE;
            self.timer.as_mut().reset(silent.min(self.until));
        }
        Poll::Pending
    }
}

impl Future for Linger {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if let Poll::Ready(Err(_)) = this.poll_finish(cx) {
            return Poll::Ready(());
        }
        if this.poll_discard(cx).is_ready() {
            return Poll::Ready(());
        }
        this.timer.as_mut().poll(cx)
    }
}
