//! The callers that wait for one function, and what they are told.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::function::Function;

/// A function that is being asked about, or has become ready just now.
pub(super) struct Line {
    pub(super) function: Function,
    waiting: AtomicUsize,
    state: watch::Sender<State>,
    /// Why the function is not ready, as far as is known.
    reason: Mutex<String>,
}

/// What the callers are told.
pub(super) struct State {
    pub(super) phase: Phase,
    /// How often somebody had reason to think that the function is not ready.
    doubts: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    Asking,
    Ready(Ready),
    Over(Over),
}

/// The function can be called.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    /// When the question was put that this is the answer to.
    pub(super) asked: Instant,
    /// When it became ready, if it was not at first.
    pub(super) woken: Option<Instant>,
}

/// The function cannot be called.
#[derive(Clone, Debug)]
pub(super) enum Over {
    NoSuchFunction,
    Failed(Arc<str>),
}

/// One of those that wait, until this is dropped.
pub(super) struct Place(Arc<Line>);

impl Line {
    pub(super) fn new(function: Function) -> Arc<Self> {
        let state = State { phase: Phase::Asking, doubts: 0 };
        Arc::new(Self {
            function,
            waiting: AtomicUsize::new(0),
            state: watch::Sender::new(state),
            reason: Mutex::new("the provider has not said how many replicas it has".to_owned()),
        })
    }

    /// A place among at most `most`.
    pub(super) fn enter(self: &Arc<Self>, most: usize) -> Option<Place> {
        let entered = self.waiting.try_update(Relaxed, Relaxed, |n| (n < most).then_some(n + 1));
        entered.ok().map(|_| Place(Arc::clone(self)))
    }

    pub(super) fn has_waiting(&self) -> bool {
        self.waiting.load(Relaxed) > 0
    }

    pub(super) fn phase(&self) -> Phase {
        self.state.borrow().phase.clone()
    }

    pub(super) fn follow(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    pub(super) fn doubts(&self) -> u64 {
        self.state.borrow().doubts
    }

    /// Somebody has met a sign that the function is not ready.
    pub(super) fn doubt(&self) {
        self.state.send_modify(|state| {
            state.doubts += 1;
            if let Phase::Ready(_) = state.phase {
                state.phase = Phase::Asking;
            }
        });
    }

    /// Lets all callers go, unless there have been more doubts than `doubts`: then the question must be put again.
    pub(super) fn release(&self, ready: Ready, doubts: u64) -> bool {
        self.state.send_if_modified(|state| {
            let holds = state.doubts == doubts;
            if holds {
                state.phase = Phase::Ready(ready);
            }
            holds
        })
    }

    /// Lets all callers go, with bad news.
    pub(super) fn end(&self, over: Over) {
        self.state.send_modify(|state| state.phase = Phase::Over(over));
    }

    /// Waits whether the function is doubted within `time`.
    pub(super) async fn is_doubted_within(&self, time: Duration) -> bool {
        let mut state = self.follow();
        let doubted = state.wait_for(|state| matches!(state.phase, Phase::Asking));
        tokio::time::timeout(time, doubted).await.is_ok()
    }

    pub(super) fn is_not_ready_since(&self, reason: String) {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    pub(super) fn reason(&self) -> String {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Place {
    pub(super) fn line(&self) -> &Line {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Arc<Line> {
        Line::new(Function::parse("echo", "fn").unwrap())
    }

    fn ready() -> Ready {
        Ready { asked: Instant::now(), woken: None }
    }

    #[test]
    fn whoever_leaves_frees_a_place() {
        let line = line();
        let first = line.enter(2).unwrap();
        let _second = line.enter(2).unwrap();
        assert!(line.enter(2).is_none());
        drop(first);
        assert!(line.enter(2).is_some());
        assert!(line.has_waiting());
    }

    #[test]
    fn a_doubt_during_a_question_has_it_put_again() {
        let line = line();
        let doubts = line.doubts();
        line.doubt();
        assert!(!line.release(ready(), doubts));
        assert!(matches!(line.phase(), Phase::Asking));
        assert!(line.release(ready(), line.doubts()));
        assert!(matches!(line.phase(), Phase::Ready(_)));
        line.doubt();
        assert!(matches!(line.phase(), Phase::Asking));
    }

    #[tokio::test(start_paused = true)]
    async fn a_function_that_nobody_doubts_stays_ready() {
        let line = line();
        assert!(line.release(ready(), 0));
        assert!(!line.is_doubted_within(Duration::from_secs(5)).await);
        line.doubt();
        assert!(line.is_doubted_within(Duration::from_secs(5)).await);
    }
}
