//! Two connections that changed protocols, joined: bytes pass both ways until one side ends or both fall silent.

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

use crate::proxy::link::Link;
use crate::proxy::upstream_body::UpstreamBody;

/// A connection to the caller and one to the function, both about to change protocols.
pub struct Tunnel {
    caller: OnUpgrade,
    upstream: Option<Box<Link>>,
    /// Both sides silent for so long: the end.
    idle: Duration,
}

impl Tunnel {
    /// Joins `caller` with the upstream that agreed to change protocols in `answer`.
    pub fn new(caller: OnUpgrade, answer: &mut Response<UpstreamBody>, idle: Duration) -> Self {
        Self { caller, upstream: answer.body_mut().take_link(), idle }
    }

    /// Runs until the tunnel ends.
    pub async fn run(self) {
        let Some(upstream) = self.upstream else { return };
        match tokio::time::timeout(self.idle, self.caller).await {
            Ok(Ok(caller)) => relay(caller, *upstream, self.idle).await,
            Ok(Err(error)) => tracing::debug!(%error, "A change of protocols failed"),
            Err(_) => tracing::debug!("A change of protocols took too long"),
        }
    }
}

async fn relay(caller: Upgraded, upstream: Link, idle: Duration) {
    let active = Arc::new(AtomicBool::new(true));
    let (upstream, unread) = upstream.into_parts();
    let mut caller = Active::new(TokioIo::new(caller), Bytes::new(), &active);
    let mut upstream = Active::new(upstream, unread, &active);
    let silence = async {
        while active.swap(false, Relaxed) {
            tokio::time::sleep(idle).await;
        }
    };
    // Whichever ends first ends the tunnel; dropping the copy closes both sides.
    tokio::select! {
        copied = copy_bidirectional(&mut caller, &mut upstream) => {
            if let Err(error) = copied {
                tracing::debug!(%error, "A tunnel broke off");
            }
        }
        () = silence => tracing::debug!("A tunnel was silent for too long"),
    }
}

/// A stream that notes when bytes come in.
struct Active<S> {
    inner: S,
    /// What had been read before the change, and comes first.
    unread: Bytes,
    active: Arc<AtomicBool>,
}

impl<S> Active<S> {
    fn new(inner: S, unread: Bytes, active: &Arc<AtomicBool>) -> Self {
        Self { inner, unread, active: Arc::clone(active) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Active<S> {
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

impl<S: AsyncWrite + Unpin> AsyncWrite for Active<S> {
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
