//! Cold-start handling of one request: waits for its function, and decides on retries.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout_at};

use crate::error::Error;
use crate::function::Function;
use crate::scaling::fault::{Fault, Heard, Next, Repeat, after, is_sent_again};
use crate::scaling::line::{Over, Phase, Ready};
use crate::scaling::{Entered, Scaling};

/// Delay before the third and later attempts: minimum and maximum. A provider that rejects requests of a function it
/// reports as ready may be overloaded.
const SHORTEST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = Duration::from_millis(400);

/// A request that waits for its function, several times if necessary, until its deadline.
pub struct Passage {
    scaling: Arc<Scaling>,
    function: Function,
    /// Set when the request waits for the first time.
    until: Option<Instant>,
    /// Time at which the function became ready, if this request has waited for it.
    woken: Option<Instant>,
    /// Delay before the next attempt.
    pause: Duration,
}

impl Passage {
    pub(super) fn new(scaling: Arc<Scaling>, function: Function) -> Self {
        Self { scaling, function, until: None, woken: None, pause: Duration::ZERO }
    }

    /// Waits until the function is ready. Calls `on_confirmed` as soon as the provider has confirmed that the function
    /// exists, ready or not: until then the request is not counted under the function's name, so the autoscaler does
    /// not see it. If the provider rejects the gateway's credentials, `on_confirmed` is not called and the request
    /// proceeds.
    ///
    /// # Errors
    /// The function does not exist, does not start, is not ready in time, or its queue is full. The error is the
    /// response to the client.
    pub async fn ready(&mut self, exists: impl FnOnce()) -> Result<(), Error> {
        self.pass(None, exists).await.map(|_| ())
    }

    /// Handles `signal`, which the request sent at `sent` received. Returns whether the request is to be sent again; if
    /// so, the function is ready.
    ///
    /// # Errors
    /// As for [`wait_ready`](Self::wait_ready).
    pub async fn again(
        &mut self,
        fault: Fault,
        repeat: Repeat,
        sent: Instant,
    ) -> Result<bool, Error> {
        let woken = self.woken.or_else(|| self.scaling.woken(&self.function));
        match after(fault, repeat, woken.map(|at| at.elapsed())) {
            Next::Pass => Ok(false),
            Next::Ask => {
                self.scaling.doubt(&self.function, sent);
                Ok(false)
            }
            Next::Wait => {
                let ready = match self.pass(Some(sent), || ()).await {
                    // There is a response to return, so a full queue is no error.
                    Err(Error::LineFull(_)) if fault.has_answer() => return Ok(false),
                    passed => passed?,
                };
                let heard = Heard {
                    woken: ready.woken.map(|at| at.elapsed()),
                    had_none: ready.had_none.is_some_and(|asked| asked >= sent),
                };
                let again = is_sent_again(fault, repeat, heard);
                if again {
                    sleep(self.pause).await;
                    self.pause = (self.pause * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
                }
                Ok(again)
            }
        }
    }

    async fn pass(
        &mut self,
        doubt: Option<Instant>,
        exists: impl FnOnce(),
    ) -> Result<Ready, Error> {
        let place = match self.scaling.enter(&self.function, doubt)? {
            Entered::Ready(ready) => {
                exists();
                return Ok(self.note(ready));
            }
            Entered::Waiting(place) => place,
        };
        let time = self.scaling.limits.timeout;
        let until = *self.until.get_or_insert_with(|| Instant::now() + time);
        let settled = timeout_at(until.into(), place.settled(exists)).await;
        match settled.unwrap_or(Phase::Asking) {
            Phase::Ready(ready) => Ok(self.note(ready)),
            Phase::Over(Over::NoSuchFunction) => Err(Error::NoSuchFunction(self.function.clone())),
            Phase::Over(Over::DoesNotStart(failure)) => {
                Err(Error::DoesNotStart(self.function.clone(), failure))
            }
            Phase::Over(Over::Failed(reason)) => Err(self.not_ready(&reason)),
            Phase::Over(Over::Unsaid) => {
                Ok(Ready { asked: Instant::now(), woken: None, had_none: None })
            }
            Phase::Asking => {
                let reason = place.line.reason();
                Err(self.not_ready(&format!("{reason}, for {time:?} now")))
            }
        }
    }

    fn note(&mut self, ready: Ready) -> Ready {
        self.woken = ready.woken.or(self.woken);
        ready
    }

    fn not_ready(&self, reason: &str) -> Error {
        Error::NotReady(self.function.clone(), reason.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaling::fault::Way;

    #[tokio::test]
    async fn if_the_queue_is_full_the_response_at_hand_is_returned() {
        let scaling = Scaling::alone(0);
        let mut passage = scaling.passage(&Function::parse("echo", "fn").unwrap());
        let sent = Instant::now();
        assert!(!passage.again(Fault::Unavailable, Repeat::Unseen, sent).await.unwrap());
        let none = passage.again(Fault::Unreached(Way::Direct), Repeat::Unseen, sent).await;
        assert!(matches!(none, Err(Error::LineFull(_))));
    }
}
