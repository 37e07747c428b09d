//! The path of every invocation, synchronous or queued: wait until the function is ready, send the request, send it
//! again if it was not delivered, and register the function once a response proves that it exists.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::SemaphorePermit;

use crate::activator::Activator;
use crate::activator::unavailable::{Hop, RetrySafety, UnavailableSignal};
use crate::error::Error;
use crate::metrics::calls::{InFlightRecorder, Shard};
use gateway_http::client::exchange_outcome::ExchangeOutcome;
use gateway_http::client::{self, Origin, OutgoingRequest, UpstreamResponse};

/// Reason why a function is not called directly if the provider cannot confirm it.
const UNCONFIRMED_REASON: &str = "the provider rejects the gateway's credentials";

/// Result of sending a request.
pub type SendResult = Result<UpstreamResponse, client::Error>;

/// Where a request is sent.
#[derive(Clone, Copy)]
pub struct UpstreamTarget<'a> {
    pub origin: &'a Origin,
    pub hop: Hop,
}

/// A request to a function that can be sent several times.
pub trait InvocationRequest: Send {
    /// Sends the request, and returns when the head of the response has been received.
    ///
    /// # Errors
    /// When there is no response.
    fn send(&mut self, origin: &Origin) -> impl Future<Output = SendResult> + Send;

    /// Returns whether the request, whose last exchange has given `signal`, may be sent again. `is_intact`: the exchange
    /// has kept all bytes of the request. One that has reached its maximum number of attempts keeps none.
    fn retry_safety(
        &mut self,
        signal: UnavailableSignal,
        is_intact: bool,
    ) -> impl Future<Output = RetrySafety> + Send;

    /// Waits for `ready`, and meanwhile for what ends the request early.
    ///
    /// # Errors
    /// Those of `ready`, or why the request has ended.
    fn wait<T: Send>(
        &mut self,
        ready: impl Future<Output = Result<T, Error>> + Send,
    ) -> impl Future<Output = Result<T, Error>> + Send;

    /// Keeps the bytes of the request for another attempt, within the memory budget of `activator`.
    fn keep_for_retry<'a>(&mut self, activator: &'a Activator) -> Option<SemaphorePermit<'a>>;

    /// Takes the request back from its response. Returns whether it can be sent again.
    fn recover(&mut self, response: &mut UpstreamResponse) -> bool;
}

/// Sends invocations. One per thread that invokes functions.
#[derive(Clone)]
pub struct Dispatcher {
    /// Cold starts, if enabled.
    pub activator: Option<Arc<Activator>>,
    pub shard: Arc<Shard>,
}

impl UpstreamTarget<'_> {
    /// Returns the sign of unavailability in `result`, if there is one.
    fn unavailable_signal(&self, result: &SendResult) -> Option<UnavailableSignal> {
        UnavailableSignal::from_outcome(classify(result), self.hop)
    }
}

/// Returns how an exchange ended.
pub fn classify(result: &SendResult) -> ExchangeOutcome {
    match result {
        Ok(response) => response.outcome,
        Err(error) => ExchangeOutcome::from_error(error),
    }
}

impl Dispatcher {
    /// Sends `request` to its function. `recorder` counts the invocation.
    ///
    /// # Errors
    /// The function cannot be called, or the last attempt failed. The error is the response to the client.
    pub async fn dispatch<R: InvocationRequest>(
        &self,
        recorder: &mut InFlightRecorder,
        target: UpstreamTarget<'_>,
        request: &mut R,
        needs_confirmed_readiness: bool,
    ) -> Result<UpstreamResponse, Error> {
        let response = match &self.activator {
            None => request.send(target.origin).await?,
            Some(activator) => {
                let mut result = None;
                if recorder.is_ready() && !needs_confirmed_readiness {
                    result = Some(request.send(target.origin).await);
                }
                match result {
                    Some(result) if target.unavailable_signal(&result).is_none() => result?,
                    // Boxed, so that the rare case does not enlarge the future of every invocation.
                    result => {
                        let activation =
                            self.with_activation(activator, recorder, target, request, result);
                        Box::pin(activation).await?
                    }
                }
            }
        };
        if recorder.is_unregistered() && response.outcome.confirms_existence() {
            recorder.confirm(&self.shard);
        }
        Ok(response)
    }

    /// Sends a request to a function that is not ready, or that has just given a sign of unavailability. `result`:
    /// result of the first attempt, if the request was sent already.
    async fn with_activation<R: InvocationRequest>(
        &self,
        activator: &Arc<Activator>,
        recorder: &mut InFlightRecorder,
        target: UpstreamTarget<'_>,
        request: &mut R,
        mut result: Option<SendResult>,
    ) -> Result<UpstreamResponse, Error> {
        let mut cold_start = activator.start_wait(recorder.function());
        // Without a reservation the body is streamed and cannot be sent again, which is rarely necessary.
        let _reservation = request.keep_for_retry(activator);
        if result.is_none() {
            // Confirming counts the invocation as in flight, so the autoscaler does not scale its function to zero.
            request.wait(cold_start.wait_ready(|| recorder.confirm(&self.shard))).await?;
            // The provider has not confirmed the name, which could lead to any host.
            if target.hop == Hop::Function && recorder.is_unregistered() {
                let function = recorder.function().clone();
                return Err(Error::NotReady(function, UNCONFIRMED_REASON.to_owned()));
            }
        }
        let mut sent_at = recorder.began;
        loop {
            let mut outcome = match result.take() {
                Some(outcome) => outcome,
                None => {
                    sent_at = Instant::now();
                    request.send(target.origin).await
                }
            };
            let Some(signal) = target.unavailable_signal(&outcome) else { return Ok(outcome?) };
            let is_intact = outcome
                .as_ref()
                .map_or(true, |response| OutgoingRequest::can_recover(&response.response));
            let safety = request.retry_safety(signal, is_intact).await;
            if !request.wait(cold_start.should_retry(signal, safety, sent_at)).await? {
                return Ok(outcome?);
            }
            if let Ok(response) = &mut outcome
                && !request.recover(response)
            {
                return Ok(outcome?);
            }
        }
    }
}
