//! Finds out whether one function can be called, and has it started if it is at zero: one driver for each line, however
//! many callers wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::error::Error;
use crate::scaling::Scaling;
use crate::scaling::fault::STARTING;
use crate::scaling::line::{Line, Over, Ready};
use crate::scaling::step::{Replicas, Step, next_step};

/// Between two questions: at first, and at most.
const SHORTEST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// A provider that can is asked to answer when the function is ready, or after this time.
const HOLD: Duration = Duration::from_secs(2);
/// A provider that has failed for so long is away: whoever waits is told.
const GIVE_UP: Duration = Duration::from_secs(2);
/// A provider that still shows no replicas after this time has not done what it was asked for.
const SCALE_AGAIN: Duration = Duration::from_secs(10);

/// What drives a line to its end.
pub(super) struct Driver {
    scaling: Arc<Scaling>,
    line: Arc<Line>,
    /// The line has been closed.
    closed: bool,
    /// The function was found not to be ready, and when it was then.
    cold: bool,
    woken: Option<Instant>,
    /// When the last question was put that was answered with no replica to call.
    had_none: Option<Instant>,
    scaled: Option<Instant>,
    /// Since when the provider fails.
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

    /// Asks until the function is ready and has proven so, or cannot be called, or nobody waits any more.
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

    /// Puts one question, and does what follows from the answer.
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
            // Its calls carry no credentials of the gateway, and can be made.
            Err(Error::CredentialsRefused(_)) if !self.cold => {
                self.close(Over::Unsaid);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        scaling.known.learn(function);
        line.exists();
        // One that is at zero may have been mended meanwhile: it is started first.
        if let Some(failure) = failure.filter(|_| replicas.available == 0 && replicas.wanted > 0) {
            scaling.known.found(function, false, asked);
            // Each call asks, for as long as that lasts.
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

    /// The function can be called, says the answer to the question put at `asked`.
    async fn ready(&mut self, asked: Instant) {
        if std::mem::take(&mut self.cold) {
            self.woken = Some(Instant::now());
            self.pause = SHORTEST_PAUSE;
        }
        self.scaled = None;
        let settled =
            self.line.release(Ready { asked, woken: self.woken, had_none: self.had_none });
        // One that was ready all the time has nothing to prove.
        let care = self.woken.map_or(Duration::ZERO, |at| STARTING.saturating_sub(at.elapsed()));
        let proven = settled && (care.is_zero() || !self.line.is_doubted_within(care).await);
        if proven {
            self.close_as_ready(asked);
        }
    }

    /// Closes the line, unless the function has been doubted meanwhile: whoever is in it then needs a driver.
    fn close_as_ready(&mut self, asked: Instant) {
        if self.scaling.remove(&self.line, Line::is_ready) {
            self.closed = true;
            self.scaling.known.found(&self.line.function, true, asked);
        }
    }

    fn failed(&mut self, error: &Error, asked: Instant) {
        let since = *self.failing.get_or_insert(asked);
        let reason = format!("the provider does not do what it is asked: {error}");
        if since.elapsed() >= GIVE_UP {
            let function = &self.line.function;
            tracing::warn!(function = %function, reason, "{function} cannot be called: {reason}");
            self.close(match error {
                // It may have become ready meanwhile.
                Error::CredentialsRefused(_) => Over::Unsaid,
                _ => Over::Failed(reason.into()),
            });
        } else {
            self.line.is_not_ready_since(reason);
        }
    }

    /// Closes the line if nobody waits, and nobody has had a doubt since the question put at `asked`: those who passed
    /// their answers on rely on the next one.
    fn close_if_abandoned(&mut self, asked: Instant) {
        let is_abandoned = |line: &Line| !line.has_waiting() && !line.is_doubted_since(asked);
        self.closed = self.closed || self.scaling.remove(&self.line, is_abandoned);
    }

    fn close(&mut self, over: Over) {
        // Whoever comes from here on is asked for anew.
        self.scaling.remove(&self.line, |_| true);
        self.line.end(over);
        self.closed = true;
    }
}

impl Drop for Driver {
    /// Nobody waits for a driver that is gone, whatever ended it.
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

    /// The driver of a line that was entered, with nothing done yet.
    fn driver(scaling: &Arc<Scaling>, function: &Function) -> Driver {
        let (line, is_new) = scaling.line(&mut scaling.lines(), function);
        assert!(is_new);
        Driver::new(Arc::clone(scaling), line)
    }

    fn ready(asked: Instant) -> Ready {
        Ready { asked, woken: None, had_none: None }
    }

    #[tokio::test]
    async fn a_line_that_is_doubted_at_its_end_keeps_its_driver() {
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
    async fn a_doubt_without_a_waiter_is_seen_to() {
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
