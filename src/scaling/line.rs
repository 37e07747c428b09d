//! The callers that wait for one function, and what they are told.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::function::Function;
use crate::provider::types::StartFailure;

/// A function that is being asked about, or has become ready just now.
pub(super) struct Line {
    pub(super) function: Function,
    waiting: AtomicUsize,
    state: watch::Sender<State>,
    /// Why the function is not ready, as far as is known.
    reason: Mutex<String>,
}

/// What is known of the function.
#[derive(Default)]
pub(super) struct State {
    /// The provider has answered for it.
    exists: bool,
    /// What was answered last, if that was that it can be called.
    answer: Option<Ready>,
    /// The last of the calls that met a sign that it is not ready was sent then.
    doubted: Option<Instant>,
    over: Option<Over>,
}

/// What a caller is told.

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
    /// When the last question was put that was answered with no replica to call.
    pub(super) had_none: Option<Instant>,
}

/// Nobody is asked any more.
#[derive(Clone, Debug)]
pub(super) enum Over {
    NoSuchFunction,
    /// Its processes end at their start, again and again.
    DoesNotStart(Arc<StartFailure>),
    Failed(Arc<str>),
    /// The provider answers, but refuses to say: it refuses the credentials of this gateway.
    Unsaid,
}

/// One of those that wait, until this is dropped.
pub(super) struct Place {
    pub(super) line: Arc<Line>,
    /// Answers to older questions say nothing to this one.
    since: Option<Instant>,
}

impl State {
    /// What this means for a caller who takes answers to questions put at `since` or later.
    fn phase_since(&self, since: Option<Instant>) -> Phase {
        match (&self.over, self.answer) {
            (Some(over), _) => Phase::Over(over.clone()),
            (None, Some(ready)) if since.is_none_or(|since| ready.asked >= since) => {
                Phase::Ready(ready)
            }
            (None, _) => Phase::Asking,
        }
    }

    /// What this means for a caller who comes now.
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
            reason: Mutex::new("the provider has not said how many replicas it has".to_owned()),
        })
    }

    /// A place among at most `most`, for a caller who takes answers to questions put at `since` or later.
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

    /// What was answered last, doubted or not.
    pub(super) fn answer(&self) -> Option<Ready> {
        self.state.borrow().answer
    }

    pub(super) fn doubted(&self) -> Option<Instant> {
        self.state.borrow().doubted
    }

    pub(super) fn is_doubted_since(&self, asked: Instant) -> bool {
        self.doubted() > Some(asked)
    }

    /// A call that was sent at `sent` has met a sign that the function is not ready.
    pub(super) fn doubt(&self, sent: Instant) {
        self.state.send_if_modified(|state| {
            let was_ready = state.is_ready();
            state.doubted = state.doubted.max(Some(sent));
            was_ready && !state.is_ready()
        });
    }

    /// The provider has answered for the function, ready or not.
    pub(super) fn exists(&self) {
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.exists, true));
    }

    /// Lets all callers go who take the answer `ready`. Whether those do who come now; else the question must be put
    /// again. However many doubts come meanwhile, each caller waits for one question at most that is put after his.
    pub(super) fn release(&self, ready: Ready) -> bool {
        self.state.send_modify(|state| state.answer = Some(ready));
        self.is_ready()
    }

    /// The function cannot be called now, for this reason.
    pub(super) fn withdraw(&self, reason: String) {
        self.state.send_if_modified(|state| state.answer.take().is_some());
        self.is_not_ready_since(reason);
    }

    /// Lets all callers go.
    pub(super) fn end(&self, over: Over) {
        self.state.send_modify(|state| state.over = Some(over));
    }

    /// Waits whether the function is doubted within `time`.
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
    /// Waits for what its caller is told. `exists` is called as soon as the provider has answered for the function.
    pub(super) async fn settled(&self, exists: impl FnOnce()) -> Phase {
        let phase = |state: &State| state.phase_since(self.since);
        let mut state = self.line.state.subscribe();
        let known = state.wait_for(|state| state.exists || state.over.is_some()).await;
        if known.is_ok_and(|state| state.exists) {
            exists();
        }
        let settled = state.wait_for(|state| !matches!(phase(state), Phase::Asking)).await;
        // The sender is in the line, which is held here: the channel stays open.
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
    fn whoever_leaves_frees_a_place() {
        let line = line();
        let first = line.enter(None, 2).unwrap();
        let _second = line.enter(None, 2).unwrap();
        assert!(line.enter(None, 2).is_none());
        drop(first);
        assert!(line.enter(None, 2).is_some());
        assert!(line.has_waiting());
    }

    #[test]
    fn a_doubt_during_a_question_has_it_put_again() {
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
    fn a_call_that_was_sent_before_the_question_casts_no_doubt_on_its_answer() {
        let (line, start) = (line(), Instant::now());
        assert!(line.release(ready(start + Duration::from_millis(1))));
        line.doubt(start);
        assert!(line.is_ready());
    }

    #[tokio::test]
    async fn whoever_is_answered_goes_however_many_doubts_have_come_since() {
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
        // What was answered before does not hold any more.
        line.withdraw("it is at zero".to_owned());
        assert!(matches!(line.phase_since(early.since), Phase::Asking));
        assert!(line.release(ready(at(6))));
        assert!(matches!(late.settled(|| ()).await, Phase::Ready(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_hears_at_once_that_the_function_exists_and_never_of_one_that_does_not() {
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
    async fn a_function_that_nobody_doubts_stays_ready() {
        let (line, start) = (line(), Instant::now());
        assert!(line.release(ready(start)));
        assert!(!line.is_doubted_within(Duration::from_secs(5)).await);
        line.doubt(start + Duration::from_millis(1));
        assert!(line.is_doubted_within(Duration::from_secs(5)).await);
    }
}
