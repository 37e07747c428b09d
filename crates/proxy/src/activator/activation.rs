//! Activation of one function: polls its status and scales it up from zero. One task per cold-start queue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::activator::Activator;
use crate::activator::cold_start_queue::{ActivationError, ColdStartQueue, Readiness};
use crate::activator::step::{ReplicaCounts, Step, next_step};
use crate::activator::unavailable::STARTUP_WINDOW;
use gateway_base::backoff::Backoff;
use gateway_provider::Error;

/// Interval between two status queries: initial and maximum.
const POLL_BACKOFF: Backoff = Backoff::new(Duration::from_millis(25), Duration::from_millis(100));
/// Long-poll time of a status query: a provider that supports it delays its response until the function is ready, for
/// at most this time.
const LONG_POLL: Duration = Duration::from_secs(2);
/// Waiting requests fail after the provider has returned errors for this time.
const PROVIDER_DOWN_AFTER: Duration = Duration::from_secs(2);
/// The scale request is repeated if the provider still reports no replicas after this time.
const SCALE_RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// The task that serves one cold-start queue until the function is ready or cannot be called.
pub(super) struct Activation {
    activator: Arc<Activator>,
    queue: Arc<ColdStartQueue>,
    /// The queue has been removed.
    finished: bool,
    /// The last query found the function not ready.
    not_ready: bool,
    /// Time at which the function became ready, if it was not ready before.
    ready_since: Option<Instant>,
    /// Time of the last query that reported no available replica.
    no_replica_at: Option<Instant>,
    /// Time of the last scale request.
    scaled_at: Option<Instant>,
    /// Time of the first of the consecutive provider errors.
    failing_since: Option<Instant>,
    poll_interval: Duration,
}

impl Activation {
    pub(super) fn new(activator: Arc<Activator>, queue: Arc<ColdStartQueue>) -> Self {
        Self {
            activator,
            queue,
            finished: false,
            not_ready: false,
            ready_since: None,
            no_replica_at: None,
            scaled_at: None,
            failing_since: None,
            poll_interval: POLL_BACKOFF.min,
        }
    }

    /// Polls until the function has been ready for the startup window, cannot be called, or no request waits.
    pub(super) async fn run(mut self) {
        while !self.finished {
            let queried_at = Instant::now();
            match self.poll_once(queried_at).await {
                Ok(()) => self.failing_since = None,
                Err(error) => self.on_error(&error, queried_at),
            }
            self.finish_if_unused(queried_at);
            if !self.finished {
                sleep(self.poll_interval.saturating_sub(queried_at.elapsed())).await;
                self.poll_interval = POLL_BACKOFF.next(self.poll_interval);
            }
        }
    }

    /// Sends one status query and acts on the result.
    async fn poll_once(&mut self, queried_at: Instant) -> Result<(), Error> {
        let (activator, queue) = (Arc::clone(&self.activator), Arc::clone(&self.queue));
        let function = &queue.function;
        let hold = if self.not_ready { LONG_POLL } else { Duration::ZERO };
        let (replicas, failure) = match activator.provider.status_wait_ready(function, hold).await {
            Ok(status) => {
                let policy = activator.registry.record_status(function, &status);
                (ReplicaCounts::new(&status, policy.scaling.min), status.start_failure)
            }
            Err(Error::NoSuchFunction(_)) => {
                activator.registry.set_ready(function, false, queried_at);
                self.finish(ActivationError::NoSuchFunction);
                return Ok(());
            }
            // Requests of functions carry no gateway credentials, so they can be forwarded without a status.
            Err(Error::CredentialsRefused(_)) if !self.not_ready => {
                self.finish(ActivationError::StatusUnknown);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        queue.set_confirmed();
        // A failure of a function at zero replicas may be fixed by now: try to start it first.
        if let Some(failure) = failure.filter(|_| replicas.available == 0 && replicas.desired > 0) {
            activator.registry.set_ready(function, false, queried_at);
            // Every new request queries again while the failure lasts.
            if activator.registry.record_start_failure(function, &failure.reason) {
                let (starts, reason, last_output) =
                    (failure.starts, &failure.reason, &failure.last_output);
                tracing::warn!(function = %function, starts, reason, last_output, "{function} does not start");
            }
            self.finish(ActivationError::DoesNotStart(failure.into()));
            return Ok(());
        }
        let scaled = self.scaled_at.is_some_and(|at| at.elapsed() < SCALE_RETRY_INTERVAL);
        let step = next_step(replicas, scaled);
        if step == Step::Call {
            self.on_ready(queried_at).await;
            return Ok(());
        }
        (self.not_ready, self.no_replica_at) = (true, Some(queried_at));
        activator.registry.set_ready(function, false, queried_at);
        queue.mark_not_ready("it has no replica that can be called".to_owned());
        if let Step::Scale(replicas) = step
            && queue.has_waiting()
        {
            activator.provider.scale(function, replicas).await?;
            self.scaled_at = Some(Instant::now());
            tracing::info!(function = %function, replicas, "Scaled {function} from zero to {replicas}");
        }
        Ok(())
    }

    /// Handles a query, sent at `queried_at`, that reported the function ready.
    async fn on_ready(&mut self, queried_at: Instant) {
        if std::mem::take(&mut self.not_ready) {
            self.ready_since = Some(Instant::now());
            self.poll_interval = POLL_BACKOFF.min;
        }
        self.scaled_at = None;
        let is_accepted = self.queue.mark_ready(Readiness {
            queried_at,
            ready_since: self.ready_since,
            no_replica_at: self.no_replica_at,
        });
        // A function that was ready from the start needs no startup window.
        let remaining = self
            .ready_since
            .map_or(Duration::ZERO, |at| STARTUP_WINDOW.saturating_sub(at.elapsed()));
        let proven =
            is_accepted && (remaining.is_zero() || !self.queue.wait_suspected(remaining).await);
        if proven {
            self.finish_ready(queried_at);
        }
    }

    /// Finishes, unless readiness was suspected in the meantime: requests in the queue then need this task.
    fn finish_ready(&mut self, queried_at: Instant) {
        if self.activator.remove_if(&self.queue, ColdStartQueue::is_ready) {
            self.finished = true;
            self.activator.registry.set_ready(&self.queue.function, true, queried_at);
        }
    }

    fn on_error(&mut self, error: &Error, queried_at: Instant) {
        let since = *self.failing_since.get_or_insert(queried_at);
        let reason = format!("the provider returned an error: {error}");
        if since.elapsed() >= PROVIDER_DOWN_AFTER {
            let function = &self.queue.function;
            tracing::warn!(function = %function, reason, "{function} cannot be called: {reason}");
            self.finish(match error {
                // The function may have become ready in the meantime.
                Error::CredentialsRefused(_) => ActivationError::StatusUnknown,
                _ => ActivationError::NotReady(reason.into()),
            });
        } else {
            self.queue.set_reason(reason);
        }
    }

    /// Finishes if no request waits and none has reported a suspicion since the query sent at `queried_at`. Requests
    /// that returned their response without waiting rely on the next query.
    fn finish_if_unused(&mut self, queried_at: Instant) {
        let is_unused =
            |queue: &ColdStartQueue| !queue.has_waiting() && !queue.is_suspected_since(queried_at);
        self.finished = self.finished || self.activator.remove_if(&self.queue, is_unused);
    }

    fn finish(&mut self, error: ActivationError) {
        // Requests that arrive from here on start a new activation.
        self.activator.remove_if(&self.queue, |_| true);
        self.queue.fail(error);
        self.finished = true;
    }
}

impl Drop for Activation {
    /// Releases the waiting requests, whatever ended the task.
    fn drop(&mut self) {
        if !self.finished {
            self.finish(ActivationError::NotReady("this gateway is stopping".into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gateway_base::function::Function;

    /// Returns the activation of a new queue, before its first query.
    fn activation(activator: &Arc<Activator>, function: &Function) -> Activation {
        let (queue, is_new) = activator.queue_for(&mut activator.queues(), function);
        assert!(is_new);
        Activation::new(Arc::clone(activator), queue)
    }

    fn readiness(queried_at: Instant) -> Readiness {
        Readiness { queried_at, ready_since: None, no_replica_at: None }
    }

    #[tokio::test]
    async fn an_activation_whose_function_is_suspected_at_its_end_continues() {
        let (activator, function) =
            (Activator::with_unreachable_provider(1), Function::parse("echo", "fn").unwrap());
        let mut activation = activation(&activator, &function);
        let queried_at = Instant::now();
        assert!(activation.queue.mark_ready(readiness(queried_at)));
        activation.queue.suspect(Instant::now());
        activation.finish_ready(queried_at);
        assert!(!activation.finished && activator.queues().contains_key(&function));
        let queried_at = Instant::now();
        assert!(activation.queue.mark_ready(readiness(queried_at)));
        activation.finish_ready(queried_at);
        assert!(activation.finished && !activator.queues().contains_key(&function));
    }

    #[tokio::test]
    async fn a_suspicion_without_a_waiting_request_is_checked() {
        let (activator, function) =
            (Activator::with_unreachable_provider(1), Function::parse("echo", "fn").unwrap());
        let mut activation = activation(&activator, &function);
        let queried_at = Instant::now();
        activator.suspect(&function, queried_at + Duration::from_millis(1));
        activation.finish_if_unused(queried_at);
        assert!(!activation.finished);
        activation.finish_if_unused(queried_at + Duration::from_millis(2));
        assert!(activation.finished && activator.queues().is_empty());
    }
}
