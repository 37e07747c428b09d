//! One connection to an upstream.
//!
//! A link has no task of its own: whoever uses it drives it, first for the head, then as the answer's body. So a call
//! crosses no channel between tasks and wakes nobody, and dropping the answer closes the connection, which is what a
//! caller who leaves should do to the function.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, Take};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::proxy::body::RequestBody;
use crate::watch::Watch;

/// Room for the largest head of an answer, and for as much of a body as is passed on at once.
const MAX_BUFFER: usize = 1 << 20;
/// The most that is read at once: what waits to be written to a slow caller stays within some 2 MiB, as on its side.
/// TLS hands out less by itself.
const READ_AT_ONCE: u64 = 64 << 10;

/// A connection to an upstream; at most one call at a time.
pub(super) struct Link {
    sender: SendRequest<RequestBody>,
    connection: Connection,
}

#[expect(clippy::large_enum_variant, reason = "a link is boxed as a whole")]
enum Connection {
    Open(http1::Connection<TokioIo<UpstreamStream>, RequestBody>),
    /// Open, and ready to change protocols.
    Upgradable(Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>),
    Closed,
}

/// Why an exchange failed before its answer began.
pub(super) enum Failure {
    /// The call's deadline passed.
    Expired,
    /// The connection was closed before the request was written: it can go another way.
    Unsent(Box<Request<RequestBody>>),
    Http(hyper::Error),
}

impl Link {
    pub(super) async fn handshake(stream: UpstreamStream) -> Result<Self, hyper::Error> {
        let (sender, connection) =
            http1::Builder::new().max_buf_size(MAX_BUFFER).handshake(TokioIo::new(stream)).await?;
        Ok(Self { sender, connection: Connection::Open(connection) })
    }

    /// Has the link carry an answer that changes protocols.
    pub(super) fn allow_upgrade(&mut self) {
        self.connection = match std::mem::replace(&mut self.connection, Connection::Closed) {
            Connection::Open(open) => Connection::Upgradable(Box::pin(open.with_upgrades())),
            other => other,
        };
    }

    /// Sends `request` and waits for the head of its answer.
    pub(super) async fn exchange(
        &mut self,
        request: Request<RequestBody>,
        watch: &Watch,
    ) -> Result<Response<Incoming>, Failure> {
        let answer = self.sender.try_send_request(request);
        let mut answer = std::pin::pin!(answer);
        std::future::poll_fn(|cx| {
            if watch.call_expired() {
                return Poll::Ready(Err(Failure::Expired));
            }
            self.drive(cx);
            // The answer comes out of `drive` alone, so nobody need be woken for it.
            answer.as_mut().poll(&mut Context::from_waker(Waker::noop())).map_err(Failure::from)
        })
        .await
    }

    /// Lets the connection read and write what it can.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) {
        let polled = match &mut self.connection {
            Connection::Open(connection) => Pin::new(connection).poll(cx),
            Connection::Upgradable(connection) => connection.as_mut().poll(cx),
            Connection::Closed => return,
        };
        if polled.is_ready() {
            self.connection = Connection::Closed;
        }
    }

    /// Lets go of the task that drove it last; whether the link can take another call.
    pub(super) fn settle(&mut self) -> bool {
        self.drive(&mut Context::from_waker(Waker::noop()));
        !matches!(self.connection, Connection::Closed) && self.sender.is_ready()
    }

    /// Drives the connection to its end: the way to an upgraded one.
    pub(super) async fn finish(self) {
        if let Connection::Upgradable(connection) = self.connection {
            let _ = connection.await;
        }
    }
}

impl From<TrySendError<Request<RequestBody>>> for Failure {
    fn from(mut error: TrySendError<Request<RequestBody>>) -> Self {
        match error.take_message() {
            Some(request) => Self::Unsent(Box::new(request)),
            None => Self::Http(error.into_error()),
        }
    }
}

/// A socket to an upstream, with or without TLS.
#[derive(Debug)]
pub(super) enum UpstreamStream {
    Plain(Take<TcpStream>),
    Tls(Box<TlsStream<TcpStream>>),
}

impl UpstreamStream {
    pub(super) fn plain(tcp: TcpStream) -> Self {
        Self::Plain(tcp.take(READ_AT_ONCE))
    }
}

impl AsyncRead for UpstreamStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(tcp) => {
                tcp.set_limit(READ_AT_ONCE);
                Pin::new(tcp).poll_read(cx, buf)
            }
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Plain(tcp) => Pin::new(tcp.get_mut()).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Plain(tcp) => Pin::new(tcp.get_mut()).poll_write_vectored(cx, bufs),
            Self::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(tcp) => Pin::new(tcp.get_mut()).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(tcp) => Pin::new(tcp.get_mut()).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
