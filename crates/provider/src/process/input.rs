//! Forwards the request body to the standard input of a process.

use std::time::Duration;

use axum::body::Body;
use http_body_util::BodyExt;
use tokio::io::AsyncWriteExt;
use tokio::process::ChildStdin;
use tokio::time::timeout;

/// Limits in bytes and time for discarding the rest of a request body.
const MAX_DISCARDED_BYTES: usize = 16 << 20;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);

/// Forwards the body with backpressure: it reads the next chunk from the client after the process has read the last
/// one.
pub(super) struct StdinForwarder {
    /// `None` after the process has closed its standard input.
    stdin: Option<ChildStdin>,
    /// `None` after the body has been read to its end.
    body: Option<Body>,
}

/// The request body was aborted: the process has received only a part of it.
#[derive(Debug)]
pub(super) struct RequestAborted;

impl StdinForwarder {
    pub(super) fn new(stdin: Option<ChildStdin>, body: Body) -> Self {
        Self { stdin, body: Some(body) }
    }

    /// Forwards the whole body. If the process closes its input, the rest of the body is read and discarded.
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
        // Closes the pipe, so that the process reads the end of its input.
        self.stdin = None;
        Ok(())
    }

    /// Discards the rest of the body after the process has exited: a client that sends the whole request before it
    /// reads the response would otherwise get a connection reset.
    pub(super) async fn discard(mut self) {
        self.stdin = None;
        let Some(mut body) = self.body else { return };
        let discarding = async {
            let mut remaining = MAX_DISCARDED_BYTES;
            while let Some(Ok(frame)) = body.frame().await {
                let size = frame.data_ref().map_or(0, |data| data.len());
                let Some(after) = remaining.checked_sub(size) else { return };
                remaining = after;
            }
        };
        // Beyond the limits the connection is closed.
        let _ = timeout(DISCARD_TIMEOUT, discarding).await;
    }
}
