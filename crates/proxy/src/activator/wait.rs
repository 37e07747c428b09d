//! Cold-start handling of one request: waits for its function, and decides on retries.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout_at};

use crate::activator::cold_start_queue::{ActivationError, Readiness, WaitState};
use crate::activator::unavailable::{
    ProviderReport, RetryAction, RetrySafety, UnavailableSignal, decide, is_retried,
};
use crate::activator::{Activator, Admission};
use crate::error::Error;
use gateway_base::backoff::Backoff;
use gateway_base::function::Function;

/// Delay before the third and later attempts: minimum and maximum. A provider that rejects requests of a function it
/// reports as ready may be overloaded.
const RETRY_BACKOFF: Backoff = Backoff::new(Duration::from_millis(25), Duration::from_millis(400));

/// A request that waits for its function, several times if necessary, until its deadline.
pub struct ColdStartWait {
    activator: Arc<Activator>,
    function: Function,
    /// Set when the request waits for the first time.
    deadline: Option<Instant>,
    /// Time at which the function became ready, if this request has waited for it.
    ready_since: Option<Instant>,
    /// Delay before the next attempt.
    retry_delay: Duration,
}

impl ColdStartWait {
    pub(super) fn new(activator: Arc<Activator>, function: Function) -> Self {
        Self { activator, function, deadline: None, ready_since: None, retry_delay: Duration::ZERO }
    }

    /// Waits until the function is ready. Calls `on_confirmed` as soon as the provider has confirmed that the function
    /// exists, ready or not: until then the request is not counted under the function's name, so the autoscaler does
    /// not see it. If the provider rejects the gateway's credentials, `on_confirmed` is not called and the request
    /// proceeds.
    ///
    /// # Errors
    /// The function does not exist, does not start, is not ready in time, or its queue is full. The error is the
    /// response to the client.
    pub async fn wait_ready(&mut self, on_confirmed: impl FnOnce()) -> Result<(), Error> {
        self.wait(None, on_confirmed).await.map(|_| ())
    }

    /// Handles `signal`, which the request sent at `sent` received. Returns whether the request is to be sent again; if
    /// so, the function is ready.
    ///
    /// # Errors
    /// As for [`wait_ready`](Self::wait_ready).
    pub async fn should_retry(
        &mut self,
        signal: UnavailableSignal,
        safety: RetrySafety,
        sent: Instant,
    ) -> Result<bool, Error> {
        let ready_since = self.ready_since.or_else(|| self.activator.ready_since(&self.function));
        match decide(signal, safety, ready_since.map(|at| at.elapsed())) {
            RetryAction::Return => Ok(false),
            RetryAction::ReturnAndRecheck => {
                self.activator.suspect(&self.function, sent);
                Ok(false)
            }
            RetryAction::WaitAndRetry => {
                let ready = match self.wait(Some(sent), || ()).await {
                    // There is a response to return, so a full queue is no error.
                    Err(Error::ColdStartQueueFull(_)) if signal.has_response() => return Ok(false),
                    result => result?,
                };
                let report = ProviderReport {
                    ready_for: ready.ready_since.map(|at| at.elapsed()),
                    had_no_replica: ready
                        .no_replica_at
                        .is_some_and(|queried_at| queried_at >= sent),
                };
                let retry = is_retried(signal, safety, report);
                if retry {
                    sleep(self.retry_delay).await;
                    self.retry_delay = RETRY_BACKOFF.next(self.retry_delay);
                }
                Ok(retry)
            }
        }
    }

    async fn wait(
        &mut self,
        suspect_since: Option<Instant>,
        on_confirmed: impl FnOnce(),
    ) -> Result<Readiness, Error> {
        let pending = match self.activator.join(&self.function, suspect_since)? {
            Admission::Ready(ready) => {
                on_confirmed();
                return Ok(self.record(ready));
            }
            Admission::Waiting(pending) => pending,
        };
        let time = self.activator.limits.timeout;
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + time);
        let waited = timeout_at(deadline.into(), pending.wait(on_confirmed)).await;
        match waited.unwrap_or(WaitState::Pending) {
            WaitState::Ready(ready) => Ok(self.record(ready)),
            WaitState::Failed(ActivationError::NoSuchFunction) => {
                Err(Error::NoSuchFunction(self.function.clone()))
            }
            WaitState::Failed(ActivationError::DoesNotStart(failure)) => {
                Err(Error::DoesNotStart(self.function.clone(), failure))
            }
            WaitState::Failed(ActivationError::NotReady(reason)) => Err(self.not_ready(&reason)),
            WaitState::Failed(ActivationError::StatusUnknown) => {
                Ok(Readiness { queried_at: Instant::now(), ready_since: None, no_replica_at: None })
            }
            WaitState::Pending => {
                let reason = pending.queue.reason();
                Err(self.not_ready(&format!("{reason}, for {time:?} now")))
            }
        }
    }

    fn record(&mut self, ready: Readiness) -> Readiness {
        self.ready_since = ready.ready_since.or(self.ready_since);
        ready
    }

    fn not_ready(&self, reason: &str) -> Error {
        Error::NotReady(self.function.clone(), reason.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activator::unavailable::Hop;

    #[tokio::test]
    async fn if_the_queue_is_full_the_response_at_hand_is_returned() {
        let activator = Activator::with_unreachable_provider(0);
        let mut cold_start = activator.start_wait(&Function::parse("echo", "fn").unwrap());
        let sent = Instant::now();
        assert!(
            !cold_start
                .should_retry(
                    UnavailableSignal::ServiceUnavailable,
                    RetrySafety::IfNotDelivered,
                    sent
                )
                .await
                .unwrap()
        );
        let none = cold_start
            .should_retry(
                UnavailableSignal::ConnectFailed(Hop::Function),
                RetrySafety::IfNotDelivered,
                sent,
            )
            .await;
        assert!(matches!(none, Err(Error::ColdStartQueueFull(_))));
    }
}
