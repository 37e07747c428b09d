//! Two connections that changed protocols, joined: bytes pass both ways until one side ends or both fall silent.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Response;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};

use crate::proxy::link::Link;
use crate::proxy::upstream_body::UpstreamBody;

/// A connection to the caller and one to the function, both about to change protocols.
pub struct Tunnel {
    caller: OnUpgrade,
    upstream: OnUpgrade,
    /// Carries `upstream` to the change.
    link: Option<Box<Link>>,
    /// Both sides silent for so long: the end.
    idle: Duration,
}

impl Tunnel {
    /// Joins `caller` with the upstream that agreed to change protocols in `answer`.
    pub fn new(caller: OnUpgrade, answer: &mut Response<UpstreamBody>, idle: Duration) -> Self {
        let upstream = hyper::upgrade::on(&mut *answer);
        Self { caller, upstream, link: answer.body_mut().take_link(), idle }
    }

    /// Runs until the tunnel ends.
    pub async fn run(self) {
        if let Some(link) = self.link {
            link.finish().await;
        }
        let joined = async {
            let (caller, upstream) = (self.caller.await?, self.upstream.await?);
            Ok::<_, hyper::Error>((caller, upstream))
        };
        match tokio::time::timeout(self.idle, joined).await {
            Ok(Ok((caller, upstream))) => relay(caller, upstream, self.idle).await,
            Ok(Err(error)) => tracing::debug!(%error, "A change of protocols failed"),
            Err(_) => tracing::debug!("A change of protocols took too long"),
        }
    }
}

async fn relay(caller: Upgraded, upstream: Upgraded, idle: Duration) {
    let active = Arc::new(AtomicBool::new(true));
    let mut caller = Active { inner: TokioIo::new(caller), active: Arc::clone(&active) };
    let mut upstream = Active { inner: TokioIo::new(upstream), active: Arc::clone(&active) };
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
struct Active {
    inner: TokioIo<Upgraded>,
    active: Arc<AtomicBool>,
}

impl AsyncRead for Active {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        if polled.is_ready() {
            self.active.store(true, Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Active {
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
