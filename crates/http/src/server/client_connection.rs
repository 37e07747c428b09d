//! The client's side of a connection: its handle for the service, and its socket, which reports the start of heads and
//! blocked writes to the deadlines.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::HeaderValue;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, Take};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::task::TaskTracker;

use crate::deadlines::{ConnectionDeadlines, ConnectionState, Signal};
use crate::interim::InterimQueue;
use crate::server::Timeouts;
use crate::server::registry::Registration;
use gateway_base::sync::lock_unpoisoned;

/// The client of a connection, and the deadlines of the connection. Each connection passes one to its service.
#[derive(Clone, Debug)]
pub struct ClientConnection {
    /// The address of the client.
    pub address: SocketAddr,
    /// The address without its port, for `X-Forwarded-For`.
    pub forwarded_for: HeaderValue,
    /// The deadlines of the connection and its current exchange.
    pub deadlines: Arc<ConnectionDeadlines>,
    /// Tracks all connections and tunnels of the listener.
    tasks: TaskTracker,
    /// The permit of this connection among `max_connections`.
    permit: Arc<OwnedSemaphorePermit>,
    /// Rank 2: the hook locks the connection of the response body. Only the task of this connection polls it.
    blocked_write_hook: Arc<Mutex<Option<BlockedWriteHook>>>,
}

/// Work that continues while the client accepts no more of its response.
struct BlockedWriteHook(Box<dyn FnMut(&mut Context<'_>) + Send>);

impl std::fmt::Debug for BlockedWriteHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockedWriteHook")
    }
}

impl ClientConnection {
    pub(super) fn new(
        address: SocketAddr,
        tasks: TaskTracker,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        // An IPv4 client of an IPv6 socket is shown with its IPv4 address.
        let ip = address.ip().to_canonical();
        let forwarded_for = HeaderValue::from_str(&ip.to_string())
            .unwrap_or_else(|_| HeaderValue::from_static("unknown"));
        let deadlines = Arc::new(ConnectionDeadlines::new());
        let permit = Arc::new(permit);
        Self {
            address,
            forwarded_for,
            deadlines,
            tasks,
            permit,
            blocked_write_hook: Arc::default(),
        }
    }

    /// Sets a hook that the task of the connection polls while the response write is blocked. hyper does not poll the
    /// response body then, but the rest of the request must still be sent to the upstream.
    pub fn on_write_blocked(&self, drive: impl FnMut(&mut Context<'_>) + Send + 'static) {
        let mut slot = lock_unpoisoned(&self.blocked_write_hook);
        *slot = Some(BlockedWriteHook(Box::new(drive)));
    }

    pub(super) fn poll_blocked_write_hook(&self, cx: &mut Context<'_>) {
        let mut slot = lock_unpoisoned(&self.blocked_write_hook);
        if let Some(BlockedWriteHook(drive)) = &mut *slot {
            drive(cx);
        }
    }

    /// Spawns a task that outlives the request, such as the tunnel of a changed protocol. Like a connection, the task
    /// holds the permit, and shutdown waits for it.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let permit = Arc::clone(&self.permit);
        self.tasks.spawn(async move {
            task.await;
            drop(permit);
        });
    }
}

/// The socket of a client. Reports heads, body data and writes to the deadlines of the connection.
#[derive(Debug)]
pub struct ClientIo {
    tcp: Take<TcpStream>,
    /// Data that has been pushed back, to be read again first.
    pushed_back: Bytes,
    /// Number of lines of the current head so far.
    head_lines: usize,
    /// The current head is that of a HEAD request, according to its first bytes.
    is_head_request: bool,
    /// hyper accepts the maximum number of headers.
    many_headers: bool,
    /// Data to write before any output of hyper.
    queued_output: Bytes,
    /// hyper is writing; nothing or a part of its output has been written.
    mid_write: bool,
    interim: Arc<InterimQueue>,
    /// hyper has refused a request head. Its response was discarded.
    hyper_refused: bool,
    /// The peer has closed its side, or the connection has failed.
    read_closed: bool,
    /// Size of the current head so far.
    head_bytes: usize,
    /// The part of `head_bytes` that has been charged to the head budget.
    counted_bytes: usize,
    registration: Arc<Registration>,
    deadlines: Arc<ConnectionDeadlines>,
    timeouts: Timeouts,
}

/// Maximum size of a read. hyper increases its read buffer while the client fills it, and up to 16 reads, each of which
/// keeps its whole buffer, may wait for the upstream. This limits a fast client of a slow upstream to about 2 MiB.
const MAX_READ_BYTES: u64 = 64 << 10;

/// Maximum size of a read of a head that was not complete after its first read.
const MAX_HEAD_READ_BYTES: u64 = 16 << 10;

/// Maximum size of a read of the next request during an exchange.
const MAX_PIPELINED_READ_BYTES: u64 = 8 << 10;

/// Incomplete heads up to this size, the smallest read buffer of hyper, are not charged to the head budget.
const UNCOUNTED_HEAD_BYTES: usize = 8 << 10;

/// Responses up to this size are joined into one buffer before the write.
const MAX_JOINED_WRITE_BYTES: usize = 1 << 10;

/// The first bytes of a HEAD request.
pub(super) const HEAD_METHOD: &[u8] = b"HEAD ";

/// Number of headers that hyper parses without an allocation. A higher limit would cost every request an eighth of its
/// exchange, so the limit is raised only for connections that need it.
pub(super) const DEFAULT_MAX_HEADERS: usize = 100;

/// Counts the line ends in `read`; stops early once there are more than `DEFAULT_MAX_HEADERS` in a long read.
fn count_lines(read: &[u8]) -> usize {
    /// A longer read contains a body after its head, usually with few line ends.
    const LONG_READ_BYTES: usize = 1 << 10;
    let ends = memchr::memchr_iter(b'\n', read);
    // Counting everything is faster for a head, and slower for a body without line ends.
    if read.len() > LONG_READ_BYTES {
        ends.take(DEFAULT_MAX_HEADERS + 1).count()
    } else {
        ends.count()
    }
}

impl ClientIo {
    pub(super) fn new(
        tcp: TcpStream,
        deadlines: Arc<ConnectionDeadlines>,
        timeouts: Timeouts,
        registration: Arc<Registration>,
    ) -> Self {
        let interim = deadlines.exchange().interim().cloned().unwrap_or_default();
        Self {
            tcp: tcp.take(MAX_READ_BYTES),
            pushed_back: Bytes::new(),
            head_lines: 0,
            is_head_request: false,
            many_headers: false,
            queued_output: Bytes::new(),
            mid_write: false,
            interim,
            hyper_refused: false,
            read_closed: false,
            head_bytes: 0,
            counted_bytes: 0,
            registration,
            deadlines,
            timeouts,
        }
    }

    /// Pushes `bytes` back, to be read again before anything else.
    pub(super) fn push_back(&mut self, bytes: &Bytes) {
        // Always a copy, because `bytes` keeps its whole buffer allocated.
        self.pushed_back = Bytes::from([bytes, &self.pushed_back[..]].concat());
    }

    /// Records that hyper accepts the maximum number of headers.
    pub(super) fn allow_many_headers(&mut self) {
        self.many_headers = true;
    }

    pub(super) fn allows_many_headers(&self) -> bool {
        self.many_headers
    }

    /// Returns whether the last head is that of a HEAD request.
    pub(super) fn last_head_is_head_request(&self) -> bool {
        self.is_head_request
    }

    /// Queues `bytes` to be written before any output of hyper.
    pub(super) fn queue_output(&mut self, bytes: &Bytes) {
        self.queued_output = bytes.clone();
    }

    /// Returns whether hyper ended with `error` because of a request head while no response was being written, and
    /// clears that state.
    pub(super) fn take_refusal(&mut self, error: &hyper::Error) -> bool {
        // hyper writes no response to the preface of HTTP/2.
        let preface = error.is_parse_version_h2() && self.deadlines.is_between_exchanges();
        std::mem::take(&mut self.hyper_refused) || preface
    }

    /// Returns whether output of hyper that starts with `text` refuses a request head.
    fn is_hyper_refusal(&self, text: &[u8]) -> bool {
        self.deadlines.is_between_exchanges() && text.starts_with(b"HTTP/1.")
    }

    /// Writes `queued_output`.
    fn poll_write_queued(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.queued_output.is_empty() {
            let result = Pin::new(self.tcp.get_mut()).poll_write(cx, &self.queued_output);
            match ready!(self.record_write(result))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.queued_output.advance(written),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Returns whether output of hyper can be written unchanged, as is usual.
    fn is_plain_write(&mut self) -> bool {
        if !self.queued_output.is_empty() {
            return false;
        }
        let begins = !self.mid_write;
        if begins && (self.interim.has_queued() || self.deadlines.is_between_exchanges()) {
            return false;
        }
        self.mid_write = true;
        true
    }

    /// Prepares a write of hyper that is not plain. Returns `Some(length)` if the output is discarded.
    #[cold]
    fn poll_before_write(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<Option<usize>>> {
        if !self.mid_write {
            if bufs.first().is_some_and(|first| self.is_hyper_refusal(first)) {
                self.hyper_refused = true;
                return Poll::Ready(Ok(Some(bufs.iter().map(|buf| buf.len()).sum())));
            }
            self.mid_write = true;
            if self.interim.has_queued() {
                // The final response starts with this write.
                self.queued_output =
                    [&self.queued_output[..], &self.interim.take()].concat().into();
            }
        }
        self.poll_write_queued(cx).map_ok(|()| None)
    }

    /// Writes interim responses while hyper has no output.
    #[cold]
    fn poll_write_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_write_queued(cx))?;
            if !self.interim.has_queued() {
                return Poll::Ready(Ok(()));
            }
            // If they are late, their final response has just been written together with the end of the previous
            // response.
            let (late, heads) = (self.interim.is_final_ready(), self.interim.take());
            if !late {
                self.queued_output = heads.into();
            }
        }
    }

    /// Counts the lines of data read between two exchanges or in a head. Returns whether hyper may parse the data.
    fn check_head_lines(&mut self, stage: ConnectionState, read: &[u8]) -> bool {
        if stage == ConnectionState::Idle {
            self.on_head_started(0);
            self.is_head_request = read.starts_with(HEAD_METHOD);
        }
        self.head_lines += count_lines(read);
        self.head_bytes += read.len();
        if self.many_headers || self.head_lines <= DEFAULT_MAX_HEADERS {
            return true;
        }
        self.pushed_back = Bytes::copy_from_slice(read);
        self.deadlines.signal(Signal::ManyHeaders);
        false
    }

    /// A head has started, of which `read` bytes are passed to hyper without a count of lines.
    fn on_head_started(&mut self, read: usize) {
        if self.deadlines.take_signal(Signal::CountedHead) {
            // The previous head was completed in the same poll.
            self.registration.release_head();
        }
        self.deadlines.on_head_started(self.timeouts.read);
        (self.head_lines, self.head_bytes, self.counted_bytes) = (0, read, 0);
    }

    /// Charges the current head to the head budget. Returns whether it may grow.
    fn count_head(&mut self) -> bool {
        if self.counted_bytes == self.head_bytes {
            return true;
        }
        self.counted_bytes = self.head_bytes;
        self.deadlines.signal(Signal::CountedHead);
        self.registration.charge_head(self.head_bytes)
    }

    /// Waits until data or a close can be read.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.pushed_back.is_empty() {
            return Poll::Ready(());
        }
        // Readiness alone is not enough: the runtime reports a new socket as ready until the first attempt.
        let mut byte = [0];
        self.tcp.get_ref().poll_peek(cx, &mut ReadBuf::new(&mut byte)).map(|_| ())
    }

    /// Returns whether the client has closed its side, or the connection has failed.
    pub(super) fn is_read_closed(&self) -> bool {
        self.read_closed
    }

    /// Reads data that is discarded.
    pub(super) fn poll_discard(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(self.tcp.get_mut()).poll_read(cx, buf)
    }

    fn record_write(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match result {
            Poll::Pending => self.deadlines.on_write_blocked(self.timeouts.write),
            Poll::Ready(_) => self.deadlines.on_write_progress(self.timeouts.idle),
        }
        result
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.pushed_back.is_empty() {
            if self.deadlines.state() == ConnectionState::Idle {
                let pushed_back = self.pushed_back.len();
                self.on_head_started(pushed_back);
            }
            let count = self.pushed_back.len().min(buf.remaining());
            buf.put_slice(&self.pushed_back.split_to(count));
            return Poll::Ready(Ok(()));
        }
        let (stage, in_body) =
            (self.deadlines.state(), self.deadlines.exchange().has_outstanding_body());
        if stage == ConnectionState::ReadingHead
            && self.head_bytes > UNCOUNTED_HEAD_BYTES
            && !self.count_head()
        {
            self.deadlines.signal(Signal::RefuseHead);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        // Read little where the data may contain several requests or an incomplete head.
        self.tcp.set_limit(match stage {
            ConnectionState::ReadingHead => MAX_HEAD_READ_BYTES,
            ConnectionState::InExchange if !in_body => MAX_PIPELINED_READ_BYTES,
            ConnectionState::Idle | ConnectionState::InExchange => MAX_READ_BYTES,
        });
        let before = buf.filled().len();
        let result = Pin::new(&mut self.tcp).poll_read(cx, buf);
        if buf.filled().len() == before {
            self.read_closed |= result.is_ready();
        } else if stage != ConnectionState::InExchange
            && !in_body
            && !self.check_head_lines(stage, &buf.filled()[before..])
        {
            buf.set_filled(before);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        result
    }
}

impl AsyncWrite for ClientIo {
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
        self.record_write(result)
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
            // `send` is cheaper than `writev` by more than the copy of a small response costs.
            [only] => tcp.poll_write(cx, only),
            _ if bufs.iter().map(|buf| buf.len()).sum::<usize>() <= MAX_JOINED_WRITE_BYTES => {
                let (mut joined, mut length) = ([0; MAX_JOINED_WRITE_BYTES], 0);
                for buf in bufs {
                    joined[length..length + buf.len()].copy_from_slice(buf);
                    length += buf.len();
                }
                tcp.poll_write(cx, &joined[..length])
            }
            _ => tcp.poll_write_vectored(cx, bufs),
        };
        self.record_write(result)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes only when it has no more output.
        self.mid_write = false;
        self.deadlines.on_flushed();
        if self.interim.has_queued() || !self.queued_output.is_empty() {
            ready!(self.poll_write_interim(cx))?;
        }
        Pin::new(self.tcp.get_mut()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.hyper_refused {
            // A response to the refused head follows.
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_write_queued(cx))?;
        Pin::new(self.tcp.get_mut()).poll_shutdown(cx)
    }
}
