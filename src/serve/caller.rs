//! The caller's side of a connection: its socket, watched for beginning heads and stalled writes.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::HeaderValue;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, Take};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::task::TaskTracker;

use crate::config::Timeouts;
use crate::interim::InterimQueue;
use crate::serve::register::Seat;
use crate::watch::{Note, Stage, Watch};

/// Who calls, and the watch over its connection. Handed to the service once for each connection.
#[derive(Clone, Debug)]
pub struct Caller {
    pub address: SocketAddr,
    /// The address without its port, for `X-Forwarded-For`.
    pub forwarded_for: HeaderValue,
    pub watch: Arc<Watch>,
    connections: TaskTracker,
    /// Its place among the connections that may be open.
    place: Arc<OwnedSemaphorePermit>,
    while_blocked: Arc<Mutex<Option<WhileBlocked>>>,
}

/// What goes on while the caller takes nothing of its answer.
struct WhileBlocked(Box<dyn FnMut(&mut Context<'_>) + Send>);

impl std::fmt::Debug for WhileBlocked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WhileBlocked")
    }
}

impl Caller {
    pub(super) fn new(
        address: SocketAddr,
        connections: TaskTracker,
        place: OwnedSemaphorePermit,
    ) -> Self {
        // A caller over IPv4 is one, whatever kind of socket listens.
        let ip = address.ip().to_canonical();
        let forwarded_for = HeaderValue::from_str(&ip.to_string())
            .unwrap_or_else(|_| HeaderValue::from_static("unknown"));
        let watch = Arc::new(Watch::new().with_interim(Some(Arc::default())));
        let place = Arc::new(place);
        Self { address, forwarded_for, watch, connections, place, while_blocked: Arc::default() }
    }

    /// Has `drive` polled by the connection's task whenever the caller takes nothing of its answer: hyper asks for
    /// no more of the answer then, but the rest of the request must go on.
    pub fn while_blocked(&self, drive: impl FnMut(&mut Context<'_>) + Send + 'static) {
        let mut slot = self.while_blocked.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(WhileBlocked(Box::new(drive)));
    }

    pub(super) fn drive_blocked(&self, cx: &mut Context<'_>) {
        let mut slot = self.while_blocked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(WhileBlocked(drive)) = &mut *slot {
            drive(cx);
        }
    }

    /// Runs what outlives the request on the connection, such as a changed protocol. It is waited for, cut and
    /// counted as connections are.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let place = Arc::clone(&self.place);
        self.connections.spawn(async move {
            task.await;
            drop(place);
        });
    }
}

/// A caller's socket that tells the watch what it sees.
#[derive(Debug)]
pub struct CallerStream {
    tcp: Take<TcpStream>,
    /// What was read before, and is to be read again.
    unread: Bytes,
    /// Lines of the head that is being read, so far.
    lines: usize,
    /// The head that is being read is that of a HEAD request, as far as its first piece shows.
    is_head: bool,
    /// Whether hyper has been given room for as many headers as are allowed.
    roomy: bool,
    /// Written before anything of hyper's.
    output: Bytes,
    /// hyper has something to write, of which nothing or a part has been written.
    writing: bool,
    interim: Arc<InterimQueue>,
    /// hyper has refused the head of a request. Its response was not written.
    refused: bool,
    /// The peer has closed its side, or the connection has failed.
    ended: bool,
    /// How much of the head that is being read has come.
    head: usize,
    /// How much of it is counted.
    counted: usize,
    seat: Arc<Seat>,
    watch: Arc<Watch>,
    timeouts: Timeouts,
}

/// The most that is read at once. hyper reads into ever larger buffers while a peer fills them, and up to sixteen such
/// reads, each keeping the whole of its buffer, may wait to be written: this bounds what a fast peer before a slow one
/// costs, to 2 MiB or so.
const READ_AT_ONCE: u64 = 64 << 10;

/// What is read at once of a head that did not come in one read.
const HEAD_AT_ONCE: u64 = 16 << 10;

/// What is read at once of the next request while one is answered.
const AHEAD: u64 = 8 << 10;

/// Incomplete heads of up to this size are not counted: it is the least that hyper reads into.
const ONE_READ: usize = 8 << 10;

/// Answers of up to this size are written from one piece.
const SMALL: usize = 1 << 10;

/// How a HEAD request begins.
pub(super) const HEAD: &[u8] = b"HEAD ";

/// Heads with fewer lines fit the room that hyper has on its stack. To make room for more costs every head an eighth
/// of what its whole call does, so it is made when it is needed.
pub(super) const FEW_LINES: usize = 100;

/// How many lines end in `read`, or that there are more than a few.
fn lines(read: &[u8]) -> usize {
    /// What is longer has a body behind its head, mostly one with few lines.
    const LONG: usize = 1 << 10;
    let ends = memchr::memchr_iter(b'\n', read);
    // To count all at once is the faster way for a head, and the slower one for a body without lines.
    if read.len() > LONG { ends.take(FEW_LINES + 1).count() } else { ends.count() }
}

impl CallerStream {
    pub(super) fn new(
        tcp: TcpStream,
        watch: Arc<Watch>,
        timeouts: Timeouts,
        seat: Arc<Seat>,
    ) -> Self {
        let interim = watch.interim().cloned().unwrap_or_default();
        Self {
            tcp: tcp.take(READ_AT_ONCE),
            unread: Bytes::new(),
            lines: 0,
            is_head: false,
            roomy: false,
            output: Bytes::new(),
            writing: false,
            interim,
            refused: false,
            ended: false,
            head: 0,
            counted: 0,
            seat,
            watch,
            timeouts,
        }
    }

    /// Has `bytes` come once more, before all others.
    pub(super) fn read_again(&mut self, bytes: &Bytes) {
        // A copy, even of nothing: the original holds on to its buffer.
        self.unread = Bytes::from([bytes, &self.unread[..]].concat());
    }

    /// hyper has room for as many headers as are allowed.
    pub(super) fn has_room(&mut self) {
        self.roomy = true;
    }

    pub(super) fn is_roomy(&self) -> bool {
        self.roomy
    }

    /// Whether the head that came last is that of a HEAD request.
    pub(super) fn head_is_of_head(&self) -> bool {
        self.is_head
    }

    /// Has `bytes` written before anything of hyper's.
    pub(super) fn write_first(&mut self, bytes: &Bytes) {
        self.output = bytes.clone();
    }

    /// Whether hyper has ended with `error` because of the head of a request, and no response is being written. Asked
    /// once.
    pub(super) fn takes_refusal(&mut self, error: &hyper::Error) -> bool {
        // To the preface of HTTP/2 it writes no response.
        let preface = error.is_parse_version_h2() && self.watch.is_between_calls();
        std::mem::take(&mut self.refused) || preface
    }

    /// Whether hyper, which is about to write what begins with `text`, refuses the head of a request.
    fn is_refusal(&self, text: &[u8]) -> bool {
        self.watch.is_between_calls() && text.starts_with(b"HTTP/1.")
    }

    /// Writes `output`.
    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_empty() {
            let result = Pin::new(self.tcp.get_mut()).poll_write(cx, &self.output);
            match ready!(self.wrote(result))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.output.advance(written),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Whether what hyper is about to write is written as it is, as it mostly is.
    fn is_plain_write(&mut self) -> bool {
        if !self.output.is_empty() {
            return false;
        }
        let begins = !self.writing;
        if begins && (self.interim.has_queued() || self.watch.is_between_calls()) {
            return false;
        }
        self.writing = true;
        true
    }

    /// Sees to what hyper is about to write if it is not a plain write. `Some`: it is not to be written.
    #[cold]
    fn poll_before_write(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<Option<usize>>> {
        if !self.writing {
            if bufs.first().is_some_and(|first| self.is_refusal(first)) {
                self.refused = true;
                return Poll::Ready(Ok(Some(bufs.iter().map(|buf| buf.len()).sum())));
            }
            self.writing = true;
            if self.interim.has_queued() {
                // The final response begins here.
                self.output = [&self.output[..], &self.interim.take()].concat().into();
            }
        }
        self.poll_output(cx).map_ok(|()| None)
    }

    /// Writes interim responses while hyper has nothing to write.
    #[cold]
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_output(cx))?;
            if !self.interim.has_queued() {
                return Poll::Ready(Ok(()));
            }
            // If they are late, their final response has just been written, together with the end of the one before.
            let (late, heads) = (self.interim.is_final_ready(), self.interim.take());
            if !late {
                self.output = heads.into();
            }
        }
    }

    /// Sees to what has just been read, between two calls or in a head. Whether hyper may have it.
    fn admit(&mut self, stage: Stage, read: &[u8]) -> bool {
        if stage == Stage::Idle {
            self.head_begins(0);
            self.is_head = read.starts_with(HEAD);
        }
        self.lines += lines(read);
        self.head += read.len();
        if self.roomy || self.lines <= FEW_LINES {
            return true;
        }
        self.unread = Bytes::copy_from_slice(read);
        self.watch.note(Note::Room);
        false
    }

    /// Some of a head has come, of which `read` bytes will be seen only by hyper.
    fn head_begins(&mut self, read: usize) {
        if self.watch.takes(Note::LargeHead) {
            // The one before came whole in the same turn.
            self.seat.heads.end(&self.seat);
        }
        self.watch.head_begins(self.timeouts.read);
        (self.lines, self.head, self.counted) = (0, read, 0);
    }

    /// Counts what has come of a head that does not fit one read. Whether more may come.
    fn head_grows(&mut self) -> bool {
        if self.counted == self.head {
            return true;
        }
        self.counted = self.head;
        self.watch.note(Note::LargeHead);
        self.seat.heads.grows(&self.seat, self.head)
    }

    /// Waits until there is something to read, the end among it.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.unread.is_empty() {
            return Poll::Ready(());
        }
        // Readiness alone is not enough: a fresh socket counts as ready until it has been tried.
        let mut byte = [0];
        self.tcp.get_ref().poll_peek(cx, &mut ReadBuf::new(&mut byte)).map(|_| ())
    }

    /// Whether the peer has closed its side, or the connection has failed.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads what is only to be discarded.
    pub(super) fn poll_discard(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(self.tcp.get_mut()).poll_read(cx, buf)
    }

    fn wrote(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match result {
            Poll::Pending => self.watch.write_stalls(self.timeouts.write),
            Poll::Ready(_) => self.watch.write_goes_on(self.timeouts.idle),
        }
        result
    }
}

impl AsyncRead for CallerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.unread.is_empty() {
            if self.watch.stage() == Stage::Idle {
                let unread = self.unread.len();
                self.head_begins(unread);
            }
            let count = self.unread.len().min(buf.remaining());
            buf.put_slice(&self.unread.split_to(count));
            return Poll::Ready(Ok(()));
        }
        let (stage, in_body) = (self.watch.stage(), self.watch.body_outstanding());
        if stage == Stage::Head && self.head > ONE_READ && !self.head_grows() {
            self.watch.note(Note::Refuse);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        // Little where it may be more than one request, or an incomplete head.
        self.tcp.set_limit(match stage {
            Stage::Head => HEAD_AT_ONCE,
            Stage::Call if !in_body => AHEAD,
            Stage::Idle | Stage::Call => READ_AT_ONCE,
        });
        let before = buf.filled().len();
        let result = Pin::new(&mut self.tcp).poll_read(cx, buf);
        if buf.filled().len() == before {
            self.ended |= result.is_ready();
        } else if stage != Stage::Call && !in_body && !self.admit(stage, &buf.filled()[before..]) {
            buf.set_filled(before);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        result
    }
}

impl AsyncWrite for CallerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.is_plain_write()
            && let Some(taken) = ready!(self.poll_before_write(cx, &[io::IoSlice::new(buf)]))?
        {
            return Poll::Ready(Ok(taken));
        }
        let result = Pin::new(self.tcp.get_mut()).poll_write(cx, buf);
        self.wrote(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if !self.is_plain_write()
            && let Some(taken) = ready!(self.poll_before_write(cx, bufs))?
        {
            return Poll::Ready(Ok(taken));
        }
        let tcp = Pin::new(self.tcp.get_mut());
        let result = match bufs {
            // `send` costs the kernel less than `writev`, by more than it takes to copy a small answer.
            [only] => tcp.poll_write(cx, only),
            _ if bufs.iter().map(|buf| buf.len()).sum::<usize>() <= SMALL => {
                let (mut joined, mut length) = ([0; SMALL], 0);
                for buf in bufs {
                    joined[length..length + buf.len()].copy_from_slice(buf);
                    length += buf.len();
                }
                tcp.poll_write(cx, &joined[..length])
            }
            _ => tcp.poll_write_vectored(cx, bufs),
        };
        self.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper has nothing more to write, or it would not flush.
        self.writing = false;
        self.watch.flushed();
        if self.interim.has_queued() || !self.output.is_empty() {
            ready!(self.poll_interim(cx))?;
        }
        Pin::new(self.tcp.get_mut()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.refused {
            // There is a response to come.
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_output(cx))?;
        Pin::new(self.tcp.get_mut()).poll_shutdown(cx)
    }
}
