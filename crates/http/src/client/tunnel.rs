//! Relays bytes between two connections that changed protocols, until one side ends or both are idle for too long.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};

use crate::client::http1::connection::Http1Connection;
use crate::client::upstream_body::UpstreamBody;

/// The connections to the client and to the function, both about to change protocols.
pub struct Tunnel {
    client: OnUpgrade,
    upstream: Option<Box<Http1Connection>>,
    /// The tunnel is closed after this time without data.
    idle_timeout: Duration,
}

impl Tunnel {
    /// Joins `client` with the upstream that accepted the change of protocols in `response`.
    pub fn new(
        client: OnUpgrade,
        response: &mut Response<UpstreamBody>,
        idle_timeout: Duration,
    ) -> Self {
        Self { client, upstream: response.body_mut().take_connection(), idle_timeout }
    }

    /// Runs until the tunnel ends.
    pub async fn run(self) {
        let Some(upstream) = self.upstream else { return };
        match tokio::time::timeout(self.idle_timeout, self.client).await {
            Ok(Ok(client)) => relay(client, *upstream, self.idle_timeout).await,
            Ok(Err(error)) => tracing::debug!(%error, "A change of protocols failed"),
            Err(_) => tracing::debug!("A change of protocols took too long"),
        }
    }
}

async fn relay(client: Upgraded, upstream: Http1Connection, idle_timeout: Duration) {
    let active = Arc::new(AtomicBool::new(true));
    let (upstream, unread) = upstream.into_parts();
    let mut client = ActivityIo::new(TokioIo::new(client), Bytes::new(), &active);
    let mut upstream = ActivityIo::new(upstream, unread, &active);
    let idle_timer = async {
        while active.swap(false, Relaxed) {
            tokio::time::sleep(idle_timeout).await;
        }
    };
    // The first branch that completes ends the tunnel; dropping the other closes both connections.
    tokio::select! {
        copied = copy_bidirectional(&mut client, &mut upstream) => {
            if let Err(error) = copied {
                tracing::debug!(%error, "A tunnel failed");
            }
        }
        () = idle_timer => tracing::debug!("A tunnel was idle for too long"),
    }
}

/// A stream that records received data as activity.
struct ActivityIo<S> {
    inner: S,
    /// Data received before the change of protocols; read first.
    unread: Bytes,
    active: Arc<AtomicBool>,
}

impl<S> ActivityIo<S> {
    fn new(inner: S, unread: Bytes, active: &Arc<AtomicBool>) -> Self {
        Self { inner, unread, active: Arc::clone(active) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ActivityIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.unread.is_empty() {
            let count = self.unread.len().min(buf.remaining());
            buf.put_slice(&self.unread.split_to(count));
            return Poll::Ready(Ok(()));
        }
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        if polled.is_ready() {
            self.active.store(true, Relaxed);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ActivityIo<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
