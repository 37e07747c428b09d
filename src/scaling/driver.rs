//! Activation of one function: polls its status and scales it up from zero. One task per cold-start queue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::error::Error;
use crate::scaling::Scaling;
use crate::scaling::fault::STARTING;
use crate::scaling::line::{Line, Over, Ready};
use crate::scaling::step::{Replicas, Step, next_step};

/// Interval between two status queries: initial and maximum.
const SHORTEST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Long-poll time of a status query: a provider that supports it delays its response until the function is ready, for
/// at most this time.
const HOLD: Duration = Duration::from_secs(2);
/// Waiting requests fail after the provider has returned errors for this time.
const GIVE_UP: Duration = Duration::from_secs(2);
/// The scale request is repeated if the provider still reports no replicas after this time.
const SCALE_AGAIN: Duration = Duration::from_secs(10);

/// The task that serves one cold-start queue until the function is ready or cannot be called.
pub(super) struct Driver {
    scaling: Arc<Scaling>,
    line: Arc<Line>,
    /// The queue has been removed.
    closed: bool,
    /// Whether the last query found the function not ready; the time at which it became ready after that.
    cold: bool,
    woken: Option<Instant>,
    /// Time of the last query that reported no available replica.
    had_none: Option<Instant>,
    scaled: Option<Instant>,
    /// Time of the first of the consecutive provider errors.
    failing: Option<Instant>,
    pause: Duration,
}

impl Driver {
    pub(super) fn new(scaling: Arc<Scaling>, line: Arc<Line>) -> Self {
        Self {
            scaling,
            line,
            closed: false,
            cold: false,
            woken: None,
            had_none: None,
            scaled: None,
            failing: None,
            pause: SHORTEST_PAUSE,
        }
    }

    /// Polls until the function has been ready for the startup window, cannot be called, or no request waits.
    pub(super) async fn run(mut self) {
        while !self.closed {
            let asked = Instant::now();
            match self.turn(asked).await {
                Ok(()) => self.failing = None,
                Err(error) => self.failed(&error, asked),
            }
            self.close_if_abandoned(asked);
            if !self.closed {
                sleep(self.pause.saturating_sub(asked.elapsed())).await;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    /// Sends one status query and acts on the result.
    async fn turn(&mut self, asked: Instant) -> Result<(), Error> {
        let (scaling, line) = (Arc::clone(&self.scaling), Arc::clone(&self.line));
        let function = &line.function;
        let hold = if self.cold { HOLD } else { Duration::ZERO };
        let (replicas, failure) = match scaling.provider.status_wait_ready(function, hold).await {
            Ok(status) => (Replicas::from(&status), status.start_failure),
            Err(Error::NoSuchFunction(_)) => {
                scaling.known.found(function, false, asked);
                self.close(Over::NoSuchFunction);
                return Ok(());
            }
            // Requests of functions carry no gateway credentials, so they can be forwarded without a status.
            Err(Error::CredentialsRefused(_)) if !self.cold => {
                self.close(Over::Unsaid);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        scaling.known.learn(function);
        line.exists();
        // A failure of a function at zero replicas may be fixed by now: try to start it first.
        if let Some(failure) = failure.filter(|_| replicas.available == 0 && replicas.wanted > 0) {
            scaling.known.found(function, false, asked);
            // Every new request queries again while the failure lasts.
            if scaling.known.does_not_start(function, &failure.reason) {
                let (starts, reason, last_output) =
                    (failure.starts, &failure.reason, &failure.last_output);
                tracing::warn!(function = %function, starts, reason, last_output, "{function} does not start");
            }
            self.close(Over::DoesNotStart(failure.into()));
            return Ok(());
        }
        let scaled = self.scaled.is_some_and(|at| at.elapsed() < SCALE_AGAIN);
        let step = next_step(replicas, scaled);
        if step == Step::Call {
            self.ready(asked).await;
            return Ok(());
        }
        (self.cold, self.had_none) = (true, Some(asked));
        scaling.known.found(function, false, asked);
        line.withdraw("it has no replica that can be called".to_owned());
        if let Step::Scale(replicas) = step
            && line.has_waiting()
        {
            scaling.provider.scale(function, replicas).await?;
            self.scaled = Some(Instant::now());
            tracing::info!(function = %function, replicas, "Scaled {function} from zero to {replicas}");
        }
        Ok(())
    }

    /// Handles a query, sent at `queried_at`, that reported the function ready.
    async fn ready(&mut self, asked: Instant) {
        if std::mem::take(&mut self.cold) {
            self.woken = Some(Instant::now());
            self.pause = SHORTEST_PAUSE;
        }
        self.scaled = None;
        let settled =
            self.line.release(Ready { asked, woken: self.woken, had_none: self.had_none });
        // A function that was ready from the start needs no startup window.
        let care = self.woken.map_or(Duration::ZERO, |at| STARTING.saturating_sub(at.elapsed()));
        let proven = settled && (care.is_zero() || !self.line.is_doubted_within(care).await);
        if proven {
            self.close_as_ready(asked);
        }
    }

    /// Finishes, unless readiness was suspected in the meantime: requests in the queue then need this task.
    fn close_as_ready(&mut self, asked: Instant) {
        if self.scaling.remove(&self.line, Line::is_ready) {
            self.closed = true;
            self.scaling.known.found(&self.line.function, true, asked);
        }
    }

    fn failed(&mut self, error: &Error, asked: Instant) {
        let since = *self.failing.get_or_insert(asked);
        let reason = format!("the provider returned an error: {error}");
        if since.elapsed() >= GIVE_UP {
            let function = &self.line.function;
            tracing::warn!(function = %function, reason, "{function} cannot be called: {reason}");
            self.close(match error {
                // The function may have become ready in the meantime.
                Error::CredentialsRefused(_) => Over::Unsaid,
                _ => Over::Failed(reason.into()),
            });
        } else {
            self.line.is_not_ready_since(reason);
        }
    }

    /// Finishes if no request waits and none has reported a suspicion since the query sent at `queried_at`. Requests
    /// that returned their response without waiting rely on the next query.
    fn close_if_abandoned(&mut self, asked: Instant) {
        let is_abandoned = |line: &Line| !line.has_waiting() && !line.is_doubted_since(asked);
        self.closed = self.closed || self.scaling.remove(&self.line, is_abandoned);
    }

    fn close(&mut self, over: Over) {
        // Requests that arrive from here on start a new activation.
        self.scaling.remove(&self.line, |_| true);
        self.line.end(over);
        self.closed = true;
    }
}

impl Drop for Driver {
    /// Releases the waiting requests, whatever ended the task.
    fn drop(&mut self) {
        if !self.closed {
            self.close(Over::Failed("this gateway is stopping".into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function::Function;

    /// Returns the activation of a new queue, before its first query.
    fn driver(scaling: &Arc<Scaling>, function: &Function) -> Driver {
        let (line, is_new) = scaling.line(&mut scaling.lines(), function);
        assert!(is_new);
        Driver::new(Arc::clone(scaling), line)
    }

    fn ready(asked: Instant) -> Ready {
        Ready { asked, woken: None, had_none: None }
    }

    #[tokio::test]
    async fn an_activation_whose_function_is_suspected_at_its_end_continues() {
        let (scaling, function) = (Scaling::alone(1), Function::parse("echo", "fn").unwrap());
        let mut driver = driver(&scaling, &function);
        let asked = Instant::now();
        assert!(driver.line.release(ready(asked)));
        driver.line.doubt(Instant::now());
        driver.close_as_ready(asked);
        assert!(!driver.closed && scaling.lines().contains_key(&function));
        let asked = Instant::now();
        assert!(driver.line.release(ready(asked)));
        driver.close_as_ready(asked);
        assert!(driver.closed && !scaling.lines().contains_key(&function));
    }
    #[tokio::test]
    async fn a_suspicion_without_a_waiting_request_is_checked() {
        let (scaling, function) = (Scaling::alone(1), Function::parse("echo", "fn").unwrap());
        let mut driver = driver(&scaling, &function);
        let asked = Instant::now();
        scaling.doubt(&function, asked + Duration::from_millis(1));
        driver.close_if_abandoned(asked);
        assert!(!driver.closed);
        driver.close_if_abandoned(asked + Duration::from_millis(2));
        assert!(driver.closed && scaling.lines().is_empty());
    }
}
