//! Forwards a request to a function that may not be ready: waits for readiness, and retries requests that were not
//! delivered.

use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use crate::activator::unavailable::{Hop, RetrySafety, UnavailableSignal};
use crate::activator::{Activator, MAX_REPLAY_BODY};
use crate::error::Error;
use crate::invoke::Invoker;
use crate::metrics::calls::InFlightRecorder;
use gateway_http::client::exchange_outcome::ExchangeOutcome;
use gateway_http::client::{self, Origin, OutgoingRequest, UpstreamResponse};
use gateway_http::server::client_connection::ClientConnection;

/// Reason why a function is not called directly if the provider cannot confirm it.
const UNCONFIRMED_REASON: &str = "the provider rejects the gateway's credentials";

/// Result of sending a request.
type SendResult = Result<UpstreamResponse, client::Error>;

/// Where a request is sent.
#[derive(Clone, Copy)]
pub(super) struct UpstreamTarget<'a> {
    pub(super) origin: &'a Origin,
    pub(super) hop: Hop,
}

/// The provider as target.
pub(super) fn via_provider(origin: &Origin) -> UpstreamTarget<'_> {
    UpstreamTarget { origin, hop: Hop::Provider }
}

impl UpstreamTarget<'_> {
    /// Returns the sign of unavailability in `result`, if there is one.
    fn unavailable_signal(&self, result: &SendResult) -> Option<UnavailableSignal> {
        let outcome = match result {
            Ok(forwarded) => forwarded.outcome,
            Err(error) => ExchangeOutcome::from_error(error),
        };
        UnavailableSignal::from_outcome(outcome, self.hop)
    }
}

impl Invoker {
    /// Forwards a request to a function that is not ready, or that has just given a sign of unavailability. `result`:
    /// result of the first attempt, if the request was sent already.
    ///
    /// # Errors
    /// The function cannot be called, or the last attempt failed. The error is the response to the client.
    pub(super) async fn forward_with_activation(
        &self,
        activator: &Arc<Activator>,
        connection: &ClientConnection,
        recorder: &mut InFlightRecorder,
        target: UpstreamTarget<'_>,
        prepared: &mut OutgoingRequest,
        mut result: Option<SendResult>,
    ) -> Result<UpstreamResponse, Error> {
        let mut cold_start = activator.start_wait(recorder.function());
        // Without a reservation the body is streamed and cannot be sent again, which is rarely necessary.
        let reservation = activator.reserve_replay(prepared.remaining_body_length());
        if reservation.is_some() {
            prepared.enable_replay(MAX_REPLAY_BODY);
        }
        if result.is_none() {
            // Confirming counts the invocation as in flight, so the autoscaler does not scale its function to zero.
            let ready = cold_start.wait_ready(|| recorder.confirm(&self.shard));
            self.wait(connection, prepared, ready).await?;
            // The provider has not confirmed the name, which could lead to any host.
            if target.hop == Hop::Function && recorder.is_unregistered() {
                return Err(Error::NotReady(
                    recorder.function().clone(),
                    UNCONFIRMED_REASON.to_owned(),
                ));
            }
        }
        let mut began = recorder.began;
        loop {
            let mut outcome = match result.take() {
                Some(outcome) => outcome,
                None => {
                    began = Instant::now();
                    let context = self.request_context(connection, began);
                    client::send(&self.client, target.origin, prepared, context).await
                }
            };
            let Some(signal) = target.unavailable_signal(&outcome) else { return Ok(outcome?) };
            // A request that has reached its maximum number of attempts cannot be recovered either.
            let safety = match &outcome {
                Ok(forwarded) if !OutgoingRequest::can_recover(&forwarded.response) => {
                    RetrySafety::None
                }
                Ok(_) | Err(_) if prepared.is_idempotent() => RetrySafety::Idempotent,
                Ok(_) | Err(_) => RetrySafety::IfNotDelivered,
            };
            let retry = cold_start.should_retry(signal, safety, began);
            if !self.wait(connection, prepared, retry).await? {
                return Ok(outcome?);
            }
            if let Ok(forwarded) = &mut outcome
                && !prepared.recover(&mut forwarded.response)
            {
                return Ok(outcome?);
            }
        }
    }

    /// Waits for the activator. Meanwhile the deadlines of the exchange are suspended, and the request body is read
    /// into its buffer: otherwise a disconnect of the client would not be noticed.
    async fn wait<T>(
        &self,
        connection: &ClientConnection,
        prepared: &mut OutgoingRequest,
        ready: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let deadlines = &connection.deadlines;
        deadlines.clear_exchange_deadline();
        let has_body = deadlines.has_outstanding_body();
        if has_body {
            deadlines.clear_body_deadline();
        }
        let mut ready = std::pin::pin!(ready);
        let waited = std::future::poll_fn(|cx| {
            if let Poll::Ready(waited) = ready.as_mut().poll(cx) {
                return Poll::Ready(waited);
            }
            match prepared.poll_buffer_body(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(Error::Body(error))),
                Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
            }
        })
        .await;
        let now = Instant::now();
        deadlines.set_exchange_deadline(now + self.timeouts.upstream);
        if has_body && deadlines.has_outstanding_body() {
            deadlines.set_body_deadline(now + self.timeouts.read);
        }
        waited
    }
}
