//! The request of a client, which the dispatcher sends.

use std::task::Poll;
use std::time::Instant;

use tokio::sync::SemaphorePermit;

use crate::activator::unavailable::{RetrySafety, UnavailableSignal};
use crate::activator::{Activator, MAX_REPLAY_BODY};
use crate::error::Error;
use crate::invoke::Invoker;
use crate::invoke::dispatcher::{InvocationRequest, SendResult};
use gateway_http::client::{self, Origin, OutgoingRequest, UpstreamResponse};
use gateway_http::server::client_connection::ClientConnection;

/// A prepared request with the connection of its client.
pub(super) struct ClientRequest<'a> {
    pub(super) invoker: &'a Invoker,
    pub(super) connection: &'a ClientConnection,
    pub(super) prepared: &'a mut OutgoingRequest,
    /// Start of the exchange. `None` after a wait, which does not count: the exchange starts when it is sent.
    pub(super) started_at: Option<Instant>,
}

impl InvocationRequest for ClientRequest<'_> {
    async fn send(&mut self, origin: &Origin) -> SendResult {
        let started_at = self.started_at.take().unwrap_or_else(Instant::now);
        let context = self.invoker.request_context(self.connection, started_at);
        client::send(&self.invoker.client, origin, self.prepared, context).await
    }

    async fn retry_safety(&mut self, _: UnavailableSignal, is_intact: bool) -> RetrySafety {
        match is_intact {
            false => RetrySafety::None,
            true if self.prepared.is_idempotent() => RetrySafety::Idempotent,
            true => RetrySafety::IfNotDelivered,
        }
    }

    /// Meanwhile the deadlines of the exchange are suspended, and the request body is read into its buffer: otherwise a
    /// disconnect of the client would not be noticed.
    async fn wait<T: Send>(
        &mut self,
        ready: impl Future<Output = Result<T, Error>> + Send,
    ) -> Result<T, Error> {
        let deadlines = self.connection.deadlines.exchange();
        deadlines.clear_deadline();
        let has_body = deadlines.has_outstanding_body();
        if has_body {
            deadlines.clear_body_deadline();
        }
        self.started_at = None;
        let mut ready = std::pin::pin!(ready);
        let waited = std::future::poll_fn(|cx| {
            if let Poll::Ready(waited) = ready.as_mut().poll(cx) {
                return Poll::Ready(waited);
            }
            match self.prepared.poll_buffer_body(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(Error::Body(error))),
                Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
            }
        })
        .await;
        let (now, timeouts) = (Instant::now(), &self.invoker.timeouts);
        deadlines.set_deadline(now + timeouts.upstream);
        if has_body && deadlines.has_outstanding_body() {
            deadlines.set_body_deadline(now + timeouts.read);
        }
        waited
    }

    fn keep_for_retry<'a>(&mut self, activator: &'a Activator) -> Option<SemaphorePermit<'a>> {
        let reservation = activator.reserve_replay(self.prepared.remaining_body_length());
        if reservation.is_some() {
            self.prepared.enable_replay(MAX_REPLAY_BODY);
        }
        reservation
    }

    fn recover(&mut self, response: &mut UpstreamResponse) -> bool {
        self.prepared.recover(&mut response.response)
    }
}
