//! The requests that wait for one function to become ready, and the state that releases them.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;
use gateway_provider::types::StartFailure;

/// Queue of requests that wait for one function, and what the activation knows about it.
pub(super) struct ColdStartQueue {
    pub(super) function: Function,
    waiting: AtomicUsize,
    state: watch::Sender<State>,
    /// Latest reason why the function is not ready, for error messages. A leaf.
    reason: Mutex<String>,
}

/// State of the function, written by the activation.
#[derive(Default)]
pub(super) struct State {
    /// The provider has confirmed that the function exists.
    confirmed: bool,
    /// Result of the last query, if the function was ready.
    readiness: Option<Readiness>,
    /// Send time of the latest request that received a sign that the function is not ready.
    suspected_at: Option<Instant>,
    error: Option<ActivationError>,
}

/// State of the function for one waiting request.
#[derive(Clone, Debug)]
pub(super) enum WaitState {
    Pending,
    Ready(Readiness),
    Failed(ActivationError),
}

/// The function is ready.
#[derive(Clone, Copy, Debug)]
pub(super) struct Readiness {
    /// Time of the query with this result.
    pub(super) queried_at: Instant,
    /// Time at which it became ready, if the activation found it not ready before.
    pub(super) ready_since: Option<Instant>,
    /// Time of the last query that reported no available replica.
    pub(super) no_replica_at: Option<Instant>,
}

/// Why the activation has ended without a ready function.
#[derive(Clone, Debug)]
pub(super) enum ActivationError {
    NoSuchFunction,
    /// Its processes exit at their start, repeatedly.
    DoesNotStart(Arc<StartFailure>),
    NotReady(Arc<str>),
    /// The provider rejects the credentials of this gateway. The requests are forwarded without a status.
    StatusUnknown,
}

/// A waiting request. Leaves the queue when dropped.
pub(super) struct PendingWait {
    pub(super) queue: Arc<ColdStartQueue>,
    /// Results of older queries do not apply to this request.
    min_query_time: Option<Instant>,
}

impl State {
    /// Returns the state for a request that accepts results of queries sent at `min_query_time` or later.
    fn wait_state_since(&self, min_query_time: Option<Instant>) -> WaitState {
        match (&self.error, self.readiness) {
            (Some(error), _) => WaitState::Failed(error.clone()),
            (None, Some(ready))
                if min_query_time
                    .is_none_or(|min_query_time| ready.queried_at >= min_query_time) =>
            {
                WaitState::Ready(ready)
            }
            (None, _) => WaitState::Pending,
        }
    }

    /// Returns the state for a request that arrives now.
    fn wait_state(&self) -> WaitState {
        self.wait_state_since(self.suspected_at)
    }

    fn is_ready(&self) -> bool {
        matches!(self.wait_state(), WaitState::Ready(_))
    }
}

impl ColdStartQueue {
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
    pub(super) fn join(
        self: &Arc<Self>,
        min_query_time: Option<Instant>,
        limit: usize,
    ) -> Option<PendingWait> {
        let joined = self.waiting.try_update(Relaxed, Relaxed, |n| (n < limit).then_some(n + 1));
        joined.ok().map(|_| PendingWait { queue: Arc::clone(self), min_query_time })
    }

    pub(super) fn has_waiting(&self) -> bool {
        self.waiting.load(Relaxed) > 0
    }

    pub(super) fn wait_state(&self) -> WaitState {
        self.state.borrow().wait_state()
    }

    pub(super) fn wait_state_since(&self, min_query_time: Option<Instant>) -> WaitState {
        self.state.borrow().wait_state_since(min_query_time)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.state.borrow().is_ready()
    }

    /// Returns the last ready result, whether it is suspected or not.
    pub(super) fn last_readiness(&self) -> Option<Readiness> {
        self.state.borrow().readiness
    }

    pub(super) fn suspected_at(&self) -> Option<Instant> {
        self.state.borrow().suspected_at
    }

    pub(super) fn is_suspected_since(&self, queried_at: Instant) -> bool {
        self.suspected_at() > Some(queried_at)
    }

    /// Records that a request sent at `sent` received a sign that the function is not ready.
    pub(super) fn suspect(&self, sent: Instant) {
        self.state.send_if_modified(|state| {
            let was_ready = state.is_ready();
            state.suspected_at = state.suspected_at.max(Some(sent));
            was_ready && !state.is_ready()
        });
    }

    /// Records that the provider has confirmed the function, ready or not.
    pub(super) fn set_confirmed(&self) {
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.confirmed, true));
    }

    /// Releases all requests that accept `readiness`. Returns whether requests that arrive now accept it; if not, the
    /// provider must be queried again. Each request waits for at most one query sent after its own suspicion.
    pub(super) fn mark_ready(&self, readiness: Readiness) -> bool {
        self.state.send_modify(|state| state.readiness = Some(readiness));
        self.is_ready()
    }

    /// Records that the function is not ready, and why.
    pub(super) fn mark_not_ready(&self, reason: String) {
        self.state.send_if_modified(|state| state.readiness.take().is_some());
        self.set_reason(reason);
    }

    /// Releases all requests with an error.
    pub(super) fn fail(&self, error: ActivationError) {
        self.state.send_modify(|state| state.error = Some(error));
    }

    /// Waits up to `time` for a suspicion. Returns whether there was one.
    pub(super) async fn wait_suspected(&self, time: Duration) -> bool {
        let mut state = self.state.subscribe();
        let suspected = state.wait_for(|state| !state.is_ready());
        tokio::time::timeout(time, suspected).await.is_ok()
    }

    pub(super) fn set_reason(&self, reason: String) {
        *lock_unpoisoned(&self.reason) = reason;
    }

    pub(super) fn reason(&self) -> String {
        lock_unpoisoned(&self.reason).clone()
    }
}

impl PendingWait {
    /// Waits for the result. Calls `on_confirmed` as soon as the provider has confirmed the function.
    pub(super) async fn wait(&self, on_confirmed: impl FnOnce()) -> WaitState {
        let wait_state = |state: &State| state.wait_state_since(self.min_query_time);
        let mut state = self.queue.state.subscribe();
        let decided = state.wait_for(|state| state.confirmed || state.error.is_some()).await;
        if decided.is_ok_and(|state| state.confirmed) {
            on_confirmed();
        }
        let waited = state.wait_for(|state| !matches!(wait_state(state), WaitState::Pending)).await;
        // The sender is in the queue, which is held here, so the channel stays open.
        waited.map_or(WaitState::Pending, |state| wait_state(&state))
    }
}

impl Drop for PendingWait {
    fn drop(&mut self) {
        self.queue.waiting.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> Arc<ColdStartQueue> {
        ColdStartQueue::new(Function::parse("echo", "fn").unwrap())
    }

    fn ready(queried_at: Instant) -> Readiness {
        Readiness { queried_at, ready_since: None, no_replica_at: None }
    }

    #[test]
    fn a_request_that_leaves_frees_its_slot() {
        let queue = queue();
        let first = queue.join(None, 2).unwrap();
        let _second = queue.join(None, 2).unwrap();
        assert!(queue.join(None, 2).is_none());
        drop(first);
        assert!(queue.join(None, 2).is_some());
        assert!(queue.has_waiting());
    }

    #[test]
    fn a_suspicion_during_a_query_causes_another_query() {
        let (queue, start) = (queue(), Instant::now());
        queue.suspect(start + Duration::from_millis(1));
        assert!(!queue.mark_ready(ready(start)));
        assert!(!queue.is_ready());
        assert!(queue.mark_ready(ready(start + Duration::from_millis(2))));
        assert!(queue.is_ready());
        queue.suspect(start + Duration::from_millis(3));
        assert!(!queue.is_ready());
    }

    #[test]
    fn a_request_sent_before_the_query_does_not_invalidate_its_result() {
        let (queue, start) = (queue(), Instant::now());
        assert!(queue.mark_ready(ready(start + Duration::from_millis(1))));
        queue.suspect(start);
        assert!(queue.is_ready());
    }

    #[tokio::test]
    async fn a_request_is_released_by_its_result_despite_later_suspicions() {
        let (queue, start) = (queue(), Instant::now());
        queue.set_confirmed();
        let at = |ms| start + Duration::from_millis(ms);
        let [early, late] = [1, 5].map(|ms| {
            queue.suspect(at(ms));
            queue.join(Some(at(ms)), 10).unwrap()
        });
        assert!(!queue.mark_ready(ready(at(3))));
        assert!(matches!(early.wait(|| ()).await, WaitState::Ready(_)));
        assert!(matches!(queue.wait_state_since(late.min_query_time), WaitState::Pending));
        // The earlier result does not apply any more.
        queue.mark_not_ready("it is at zero".to_owned());
        assert!(matches!(queue.wait_state_since(early.min_query_time), WaitState::Pending));
        assert!(queue.mark_ready(ready(at(6))));
        assert!(matches!(late.wait(|| ()).await, WaitState::Ready(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiting_request_learns_immediately_whether_the_function_exists() {
        for exists in [true, false] {
            let (queue, notified) = (queue(), std::cell::Cell::new(false));
            let pending = queue.join(None, 1).unwrap();
            let mut waited = std::pin::pin!(pending.wait(|| notified.set(true)));
            if exists {
                queue.set_confirmed();
                let long = Duration::from_secs(1);
                assert!(tokio::time::timeout(long, waited.as_mut()).await.is_err());
                assert!(notified.get());
            }
            queue.fail(ActivationError::NoSuchFunction);
            assert!(matches!(waited.await, WaitState::Failed(ActivationError::NoSuchFunction)));
            assert_eq!(notified.get(), exists);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_function_without_suspicions_stays_ready() {
        let (queue, start) = (queue(), Instant::now());
        assert!(queue.mark_ready(ready(start)));
        assert!(!queue.wait_suspected(Duration::from_secs(5)).await);
        queue.suspect(start + Duration::from_millis(1));
        assert!(queue.wait_suspected(Duration::from_secs(5)).await);
    }
}
