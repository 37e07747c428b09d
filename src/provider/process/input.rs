//! The request's body on its way to a process's standard input.

use std::time::Duration;

use axum::body::Body;
use http_body_util::BodyExt;
use tokio::io::AsyncWriteExt;
use tokio::process::ChildStdin;
use tokio::time::timeout;

/// How much of a body that nobody wants is still read, and how long that may take.
const MAX_DISCARDED_BYTES: usize = 16 << 20;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);

/// Passes the body on as the process takes it: a chunk is read from the caller when the one before has been written.
pub(super) struct StdinForwarder {
    /// `None` once the process takes no more.
    stdin: Option<ChildStdin>,
    /// `None` once it has been read whole.
    body: Option<Body>,
}

/// The body broke off before its end: what the process has been given is not the request.
#[derive(Debug)]
pub(super) struct RequestAborted;

impl StdinForwarder {
    pub(super) fn new(stdin: Option<ChildStdin>, body: Body) -> Self {
        Self { stdin, body: Some(body) }
    }

    /// Passes on the whole body. A process need not read it; then the rest is only read.
    pub(super) async fn forward(&mut self) -> Result<(), RequestAborted> {
        while let Some(body) = &mut self.body {
            let Some(frame) = body.frame().await else {
                self.body = None;
                break;
            };
            let Ok(data) = frame.map_err(|_| RequestAborted)?.into_data() else { continue };
            if let Some(stdin) = &mut self.stdin
                && stdin.write_all(&data).await.is_err()
            {
                self.stdin = None;
            }
        }
        // Closed, so that the process sees the end.
        self.stdin = None;
        Ok(())
    }

    /// Reads what is left when the process has ended: a caller that first sends all and then reads the answer would
    /// find its connection reset instead.
    pub(super) async fn discard(mut self) {
        self.stdin = None;
        let Some(mut body) = self.body else { return };
        let discarding = async {
            let mut left = MAX_DISCARDED_BYTES;
            while let Some(Ok(frame)) = body.frame().await {
                let size = frame.data_ref().map_or(0, |data| data.len());
                let Some(rest) = left.checked_sub(size) else { return };
                left = rest;
            }
        };
        // A caller that sends for longer is cut off, which it may be.
        let _ = timeout(DISCARD_TIMEOUT, discarding).await;
    }
}
