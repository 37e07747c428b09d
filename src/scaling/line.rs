//! The requests that wait for one function to become ready, and the state that releases them.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::function::Function;
use crate::provider::types::StartFailure;

/// Queue of requests that wait for one function, and what the activation knows about it.
pub(super) struct Line {
    pub(super) function: Function,
    waiting: AtomicUsize,
    state: watch::Sender<State>,
    /// Latest reason why the function is not ready, for error messages.
    reason: Mutex<String>,
}

/// State of the function, written by the activation.
#[derive(Default)]
pub(super) struct State {
    /// The provider has confirmed that the function exists.
    exists: bool,
    /// Result of the last query, if the function was ready.
    answer: Option<Ready>,
    /// Send time of the latest request that received a sign that the function is not ready.
    doubted: Option<Instant>,
    over: Option<Over>,
}

/// State of the function for one waiting request.

#[derive(Clone, Debug)]
pub(super) enum Phase {
    Asking,
    Ready(Ready),
    Over(Over),
}

/// The function is ready.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    /// Time of the query with this result.
    pub(super) asked: Instant,
    /// Time at which it became ready, if the activation found it not ready before.
    pub(super) woken: Option<Instant>,
    /// Time of the last query that reported no available replica.
    pub(super) had_none: Option<Instant>,
}

/// Why the activation has ended without a ready function.
#[derive(Clone, Debug)]
pub(super) enum Over {
    NoSuchFunction,
    /// Its processes exit at their start, repeatedly.
    DoesNotStart(Arc<StartFailure>),
    Failed(Arc<str>),
    /// The provider rejects the credentials of this gateway. The requests are forwarded without a status.
    Unsaid,
}

/// A waiting request. Leaves the queue when dropped.
pub(super) struct Place {
    pub(super) line: Arc<Line>,
    /// Results of older queries do not apply to this request.
    since: Option<Instant>,
}

impl State {
    /// Returns the state for a request that accepts results of queries sent at `min_query_time` or later.
    fn phase_since(&self, since: Option<Instant>) -> Phase {
        match (&self.over, self.answer) {
            (Some(over), _) => Phase::Over(over.clone()),
            (None, Some(ready)) if since.is_none_or(|since| ready.asked >= since) => {
                Phase::Ready(ready)
            }
            (None, _) => Phase::Asking,
        }
    }

    /// Returns the state for a request that arrives now.
    fn phase(&self) -> Phase {
        self.phase_since(self.doubted)
    }

    fn is_ready(&self) -> bool {
        matches!(self.phase(), Phase::Ready(_))
    }
}

impl Line {
    pub(super) fn new(function: Function) -> Arc<Self> {
        Arc::new(Self {
            function,
            waiting: AtomicUsize::new(0),
            state: watch::Sender::default(),
            reason: Mutex::new("the provider has not reported its replicas".to_owned()),
        })
    }

    /// Joins the queue, which holds at most `limit` requests. The request accepts results of queries sent at
    /// `min_query_time` or later.
    pub(super) fn enter(self: &Arc<Self>, since: Option<Instant>, most: usize) -> Option<Place> {
        let entered = self.waiting.try_update(Relaxed, Relaxed, |n| (n < most).then_some(n + 1));
        entered.ok().map(|_| Place { line: Arc::clone(self), since })
    }

    pub(super) fn has_waiting(&self) -> bool {
        self.waiting.load(Relaxed) > 0
    }

    pub(super) fn phase(&self) -> Phase {
        self.state.borrow().phase()
    }

    pub(super) fn phase_since(&self, since: Option<Instant>) -> Phase {
        self.state.borrow().phase_since(since)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.state.borrow().is_ready()
    }

    /// Returns the last ready result, whether it is suspected or not.
    pub(super) fn answer(&self) -> Option<Ready> {
        self.state.borrow().answer
    }

    pub(super) fn doubted(&self) -> Option<Instant> {
        self.state.borrow().doubted
    }

    pub(super) fn is_doubted_since(&self, asked: Instant) -> bool {
        self.doubted() > Some(asked)
    }

    /// Records that a request sent at `sent` received a sign that the function is not ready.
    pub(super) fn doubt(&self, sent: Instant) {
        self.state.send_if_modified(|state| {
            let was_ready = state.is_ready();
            state.doubted = state.doubted.max(Some(sent));
            was_ready && !state.is_ready()
        });
    }

    /// Records that the provider has confirmed the function, ready or not.
    pub(super) fn exists(&self) {
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.exists, true));
    }

    /// Releases all requests that accept `readiness`. Returns whether requests that arrive now accept it; if not, the
    /// provider must be queried again. Each request waits for at most one query sent after its own suspicion.
    pub(super) fn release(&self, ready: Ready) -> bool {
        self.state.send_modify(|state| state.answer = Some(ready));
        self.is_ready()
    }

    /// Records that the function is not ready, and why.
    pub(super) fn withdraw(&self, reason: String) {
        self.state.send_if_modified(|state| state.answer.take().is_some());
        self.is_not_ready_since(reason);
    }

    /// Releases all requests with an error.
    pub(super) fn end(&self, over: Over) {
        self.state.send_modify(|state| state.over = Some(over));
    }

    /// Waits up to `time` for a suspicion. Returns whether there was one.
    pub(super) async fn is_doubted_within(&self, time: Duration) -> bool {
        let mut state = self.state.subscribe();
        let doubted = state.wait_for(|state| !state.is_ready());
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
    /// Waits for the result. Calls `on_confirmed` as soon as the provider has confirmed the function.
    pub(super) async fn settled(&self, exists: impl FnOnce()) -> Phase {
        let phase = |state: &State| state.phase_since(self.since);
        let mut state = self.line.state.subscribe();
        let known = state.wait_for(|state| state.exists || state.over.is_some()).await;
        if known.is_ok_and(|state| state.exists) {
            exists();
        }
        let settled = state.wait_for(|state| !matches!(phase(state), Phase::Asking)).await;
        // The sender is in the queue, which is held here, so the channel stays open.
        settled.map_or(Phase::Asking, |state| phase(&state))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.line.waiting.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Arc<Line> {
        Line::new(Function::parse("echo", "fn").unwrap())
    }

    fn ready(asked: Instant) -> Ready {
        Ready { asked, woken: None, had_none: None }
    }

    #[test]
    fn a_request_that_leaves_frees_its_slot() {
        let line = line();
        let first = line.enter(None, 2).unwrap();
        let _second = line.enter(None, 2).unwrap();
        assert!(line.enter(None, 2).is_none());
        drop(first);
        assert!(line.enter(None, 2).is_some());
        assert!(line.has_waiting());
    }

    #[test]
    fn a_suspicion_during_a_query_causes_another_query() {
        let (line, start) = (line(), Instant::now());
        line.doubt(start + Duration::from_millis(1));
        assert!(!line.release(ready(start)));
        assert!(!line.is_ready());
        assert!(line.release(ready(start + Duration::from_millis(2))));
        assert!(line.is_ready());
        line.doubt(start + Duration::from_millis(3));
        assert!(!line.is_ready());
    }

    #[test]
    fn a_request_sent_before_the_query_does_not_invalidate_its_result() {
        let (line, start) = (line(), Instant::now());
        assert!(line.release(ready(start + Duration::from_millis(1))));
        line.doubt(start);
        assert!(line.is_ready());
    }

    #[tokio::test]
    async fn a_request_is_released_by_its_result_despite_later_suspicions() {
        let (line, start) = (line(), Instant::now());
        line.exists();
        let at = |ms| start + Duration::from_millis(ms);
        let [early, late] = [1, 5].map(|ms| {
            line.doubt(at(ms));
            line.enter(Some(at(ms)), 10).unwrap()
        });
        assert!(!line.release(ready(at(3))));
        assert!(matches!(early.settled(|| ()).await, Phase::Ready(_)));
        assert!(matches!(line.phase_since(late.since), Phase::Asking));
        // The earlier result does not apply any more.
        line.withdraw("it is at zero".to_owned());
        assert!(matches!(line.phase_since(early.since), Phase::Asking));
        assert!(line.release(ready(at(6))));
        assert!(matches!(late.settled(|| ()).await, Phase::Ready(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiting_request_learns_immediately_whether_the_function_exists() {
        for exists in [true, false] {
            let (line, heard) = (line(), std::cell::Cell::new(false));
            let place = line.enter(None, 1).unwrap();
            let mut settled = std::pin::pin!(place.settled(|| heard.set(true)));
            if exists {
                line.exists();
                let long = Duration::from_secs(1);
                assert!(tokio::time::timeout(long, settled.as_mut()).await.is_err());
                assert!(heard.get());
            }
            line.end(Over::NoSuchFunction);
            assert!(matches!(settled.await, Phase::Over(Over::NoSuchFunction)));
            assert_eq!(heard.get(), exists);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_function_without_suspicions_stays_ready() {
        let (line, start) = (line(), Instant::now());
        assert!(line.release(ready(start)));
        assert!(!line.is_doubted_within(Duration::from_secs(5)).await);
        line.doubt(start + Duration::from_millis(1));
        assert!(line.is_doubted_within(Duration::from_secs(5)).await);
    }
}
