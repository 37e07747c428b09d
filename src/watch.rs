//! What one exchange waits for, and until when.
//!
//! A connection has several deadlines but one timer: each party notes its deadline here, the connection's task keeps
//! the timer at the earliest of them and arms it again only when it fires or an earlier one is noted. So a call
//! costs a few stores, and the timer wheel is touched every few seconds.
//! The task that owns the timer notices what is overdue; the parties learn of it from here when they are polled next.

mod notes;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::interim::InterimQueue;
pub use crate::watch::notes::Note;
use crate::watch::notes::Notes;

const NEVER: u64 = u64::MAX;

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Between two requests.
    Idle = 0,
    /// Some of a request's head has come.
    Head = 1,
    /// A request is being answered.
    Call = 2,
}

/// Which deadline has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    /// Nothing can be said to the peer any more: its connection is to be closed.
    Connection,
    /// The connection has been idle for a while, and may be for longer: it should hold as little as it can.
    Rest,
    /// The party that is waiting has been told, through its flag.
    Party,
}

/// What has become of the body of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BodyState {
    /// There is none, or it has been read to its end.
    Read = 0,
    /// It has not been read to its end, and is not wanted. hyper reads what is left of it only if that has been received.
    Unread = 1,
    /// It is being read.
    InUse = 2,
    /// It ended before its end, or was malformed.
    Broken = 3,
}

/// The deadlines of one exchange. All parties run in one task; the atomics are there to make this `Sync`, not to
/// order anything.
#[derive(Debug)]
pub struct Watch {
    base: Instant,
    stage: AtomicU8,
    /// While idle or reading a head: the connection's own deadline. During a call: the call's.
    until: AtomicU64,
    /// Since when the connection has been idle, if it is.
    idle_at: AtomicU64,
    /// When an idle connection is closed.
    close_at: AtomicU64,
    /// The caller's body must have come whole.
    body_until: AtomicU64,
    /// The caller must take some of its answer.
    stalled_until: AtomicU64,
    /// A [`BodyState`].
    body: AtomicU8,
    /// When the first byte of the head came.
    head_at: AtomicU64,
    call_expired: AtomicBool,
    body_expired: AtomicBool,
    /// Some of the last call's response may still have to be written.
    responding: AtomicBool,
    notes: Notes,
    /// Where interim responses wait for the client, if there is one that takes them.
    interim: Option<Arc<InterimQueue>>,
}

impl Watch {
    /// A watch that waits for nothing yet.
    pub fn new() -> Self {
        Self::at(Instant::now())
    }

    /// One whose times are counted from `base`.
    pub fn at(base: Instant) -> Self {
        Self {
            base,
            stage: AtomicU8::new(Stage::Idle as u8),
            until: AtomicU64::new(NEVER),
            idle_at: AtomicU64::new(0),
            close_at: AtomicU64::new(NEVER),
            body_until: AtomicU64::new(NEVER),
            stalled_until: AtomicU64::new(NEVER),
            body: AtomicU8::new(BodyState::Read as u8),
            head_at: AtomicU64::new(0),
            call_expired: AtomicBool::new(false),
            body_expired: AtomicBool::new(false),
            responding: AtomicBool::new(false),
            notes: Notes::default(),
            interim: None,
        }
    }

    /// The same, with a client that takes interim responses.
    pub fn with_interim(mut self, interim: Option<Arc<InterimQueue>>) -> Self {
        self.interim = interim;
        self
    }

    /// Where interim responses wait for the client.
    pub fn interim(&self) -> Option<&Arc<InterimQueue>> {
        self.interim.as_ref()
    }

    pub fn stage(&self) -> Stage {
        match self.stage.load(Relaxed) {
            0 => Stage::Idle,
            1 => Stage::Head,
            _ => Stage::Call,
        }
    }

    /// Bytes have come while the connection was idle: the head must be whole by `read` from now.
    pub fn head_begins(&self, read: Duration) {
        self.head_began(Instant::now(), read);
    }

    /// The same for bytes that came at `at`.
    pub fn head_began(&self, at: Instant, read: Duration) {
        let now = at.saturating_duration_since(self.base);
        self.head_at.store(nanos(now), Relaxed);
        self.stage.store(Stage::Head as u8, Relaxed);
        self.until.store(nanos(now + read), Relaxed);
    }

    /// The head that is being read must be complete `limit` after its first byte came, unless it must be so earlier.
    pub fn head_within(&self, limit: Duration) {
        let latest = self.head_at.load(Relaxed).saturating_add(nanos(limit));
        self.until.store(latest.min(self.until.load(Relaxed)), Relaxed);
    }

    /// A whole head has come. Returns when its first byte did, so that the call need not read the clock again.
    pub fn call_begins(&self) -> Instant {
        let head_at = match self.stage() {
            Stage::Head => Duration::from_nanos(self.head_at.load(Relaxed)),
            // A pipelined request: it was read together with the one before.
            Stage::Idle | Stage::Call => self.base.elapsed(),
        };
        self.stage.store(Stage::Call as u8, Relaxed);
        self.until.store(NEVER, Relaxed);
        self.responding.store(true, Relaxed);
        // hyper reads a head only behind the end of the body before it.
        self.set_body(BodyState::Read);
        self.base + head_at
    }

    /// The call must be over, or have gone on, by `at`.
    pub fn call_until(&self, at: Instant) {
        self.until.store(self.since_base(at), Relaxed);
    }

    /// The deadline of what the call did so far concerns it no longer.
    pub fn call_goes_on(&self) {
        self.until.store(NEVER, Relaxed);
    }

    /// The caller's body must have come whole by `at`.
    pub fn body_until(&self, at: Instant) {
        self.body_until.store(self.since_base(at), Relaxed);
    }

    /// Nobody reads the caller's body for the moment, so it need not come.
    pub fn body_goes_on(&self) {
        self.body_until.store(NEVER, Relaxed);
    }

    /// The request has a body. Nothing reads it yet.
    pub fn body_announced(&self) {
        self.set_body(BodyState::Unread);
    }

    /// The request has a body, which is about to be read.
    pub fn body_begins(&self) {
        self.set_body(BodyState::InUse);
    }

    /// The caller's body has been read to its end.
    pub fn body_ended(&self) {
        self.body_until.store(NEVER, Relaxed);
        self.set_body(BodyState::Read);
    }

    /// The caller's body ended before its end, or was malformed.
    pub fn body_broke(&self) {
        self.set_body(BodyState::Broken);
    }

    /// The caller's body is no longer wanted.
    pub fn body_dropped(&self) {
        if self.body_state() == BodyState::InUse {
            self.set_body(BodyState::Unread);
        }
    }

    fn set_body(&self, state: BodyState) {
        self.body.store(state as u8, Relaxed);
    }

    pub fn body_state(&self) -> BodyState {
        match self.body.load(Relaxed) {
            0 => BodyState::Read,
            1 => BodyState::Unread,
            2 => BodyState::InUse,
            _ => BodyState::Broken,
        }
    }

    /// Whether some of the last request is still to be read: that must not be taken for another request. If hyper goes on
    /// after a body that was not wanted, it has read all of it.
    pub fn body_outstanding(&self) -> bool {
        self.body.load(Relaxed) >= BodyState::InUse as u8
    }

    /// The call has ended; the connection waits for another until `idle` from `now`.
    pub fn call_ended(&self, now: Instant, idle: Duration) {
        self.stage.store(Stage::Idle as u8, Relaxed);
        self.idles(now.saturating_duration_since(self.base), idle);
        self.body_until.store(NEVER, Relaxed);
        self.call_expired.store(false, Relaxed);
        self.body_expired.store(false, Relaxed);
    }

    /// Since `now` (from the base on) nothing is under way.
    fn idles(&self, now: Duration, idle: Duration) {
        self.idle_at.store(nanos(now), Relaxed);
        self.until.store(nanos(now + idle.min(REST_AFTER)), Relaxed);
        self.close_at.store(nanos(now + idle), Relaxed);
    }

    /// The caller took nothing of what was written; it has until `write` from now to take some.
    pub fn write_stalls(&self, write: Duration) {
        if self.stalled_until.load(Relaxed) == NEVER {
            self.stalled_until.store(nanos(self.base.elapsed() + write), Relaxed);
        }
    }

    /// The caller has taken some. If that was of an answer that has ended already, the connection idles from now.
    pub fn write_goes_on(&self, idle: Duration) {
        if self.is_stalled() {
            self.stalled_until.store(NEVER, Relaxed);
            if self.stage() == Stage::Idle {
                self.idles(self.base.elapsed(), idle);
            }
        }
    }

    /// Whether the caller takes nothing of what has been written.
    pub fn is_stalled(&self) -> bool {
        self.stalled_until.load(Relaxed) != NEVER
    }

    /// The deadline of what the connection is doing. One whose caller still takes its last answer is not idle.
    fn until(&self) -> u64 {
        let answering = self.stage() == Stage::Idle && self.is_stalled();
        if answering { NEVER } else { self.until.load(Relaxed) }
    }

    /// All has been answered, and only the end of the connection is waited for. Nothing is missed if it comes at once.
    pub fn lingers(&self) {
        self.stage.store(Stage::Idle as u8, Relaxed);
        self.idle_at.store(0, Relaxed);
        self.stalled_until.store(NEVER, Relaxed);
    }

    /// The connection has changed protocols. What comes and goes is passed on as the body of a call is: nothing in it is
    /// a head, however it looks.
    pub fn protocol_changed(&self) {
        self.stage.store(Stage::Call as u8, Relaxed);
        self.set_body(BodyState::InUse);
    }

    /// What the connection waits for while no request is under way, and since when: a head, or the rest of one.
    pub fn waits_since(&self) -> Option<(Stage, Instant)> {
        let stage = self.stage();
        let since = match stage {
            Stage::Idle if !self.is_stalled() => &self.idle_at,
            Stage::Head => &self.head_at,
            Stage::Idle | Stage::Call => return None,
        };
        Some((stage, self.base + Duration::from_nanos(since.load(Relaxed))))
    }

    /// Tells the connection's task something. Who does so from another task wakes it, too.
    pub fn note(&self, note: Note) {
        self.notes.add(note);
    }

    /// Whether the task has been told anything.
    pub fn has_notes(&self) -> bool {
        self.notes.any()
    }

    /// Whether the task has been told this.
    pub fn has(&self, note: Note) -> bool {
        self.notes.has(note)
    }

    /// Whether the task has been told this, once for each time.
    pub fn takes(&self, note: Note) -> bool {
        self.notes.take(note)
    }

    /// All that hyper had to write has been written.
    pub fn flushed(&self) {
        if self.stage() != Stage::Call {
            self.responding.store(false, Relaxed);
        }
    }

    /// Whether what is written now belongs to no call: then hyper writes it by itself.
    pub fn is_between_calls(&self) -> bool {
        self.stage() != Stage::Call && !self.responding.load(Relaxed)
    }

    /// Whether the call's deadline has passed.
    pub fn call_expired(&self) -> bool {
        self.call_expired.load(Relaxed)
    }

    /// Whether the deadline for the caller's body has passed.
    pub fn body_expired(&self) -> bool {
        self.body_expired.load(Relaxed)
    }

    /// The earliest deadline, if there is any.
    pub fn due(&self) -> Option<Instant> {
        let due =
            self.until().min(self.body_until.load(Relaxed)).min(self.stalled_until.load(Relaxed));
        (due != NEVER).then(|| self.base + Duration::from_nanos(due))
    }

    /// Tells the parties whose deadlines have passed by `now`; `None` if there are none.
    pub fn expire(&self, now: Instant) -> Option<Overdue> {
        let now = self.since_base(now);
        if self.stalled_until.load(Relaxed) <= now {
            return Some(Overdue::Connection);
        }
        let mut overdue = None;
        if self.body_until.load(Relaxed) <= now {
            self.body_until.store(NEVER, Relaxed);
            self.body_expired.store(true, Relaxed);
            overdue = Some(Overdue::Party);
        }
        if self.until() <= now {
            let close_at = self.close_at.load(Relaxed);
            if self.stage() == Stage::Idle && now < close_at {
                self.until.store(close_at, Relaxed);
                return (!self.body_outstanding()).then_some(Overdue::Rest);
            }
            if self.stage() != Stage::Call || self.call_expired() {
                return Some(Overdue::Connection);
            }
            self.call_expired.store(true, Relaxed);
            // The party gets a moment to say what happened; then the connection is closed.
            self.until.store(now.saturating_add(nanos(LAST_WORDS)), Relaxed);
            overdue = Some(Overdue::Party);
        }
        overdue
    }

    fn since_base(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.base))
    }
}

impl Default for Watch {
    fn default() -> Self {
        Self::new()
    }
}

/// Long enough that a busy connection is never put to rest, short enough that idle ones do not pile up.
const REST_AFTER: Duration = Duration::from_secs(2);
/// How long a call may take to answer that it is out of time.
const LAST_WORDS: Duration = Duration::from_secs(5);

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(NEVER - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_earliest_deadline_counts() {
        let watch = Watch::new();
        assert_eq!(watch.due(), None);
        let start = watch.call_begins();
        watch.call_until(start + 3 * SECOND);
        watch.body_until(start + 2 * SECOND);
        assert_eq!(watch.due(), Some(start + 2 * SECOND));
        watch.body_ended();
        assert_eq!(watch.due(), Some(start + 3 * SECOND));
    }

    #[test]
    fn an_overdue_call_is_told_first_and_cut_later() {
        let watch = Watch::new();
        let start = watch.call_begins();
        watch.call_until(start + SECOND);
        assert_eq!(watch.expire(start), None);
        assert_eq!(watch.expire(start + SECOND), Some(Overdue::Party));
        assert!(watch.call_expired() && !watch.body_expired());
        assert_eq!(watch.expire(start + 2 * SECOND), None);
        assert_eq!(watch.expire(start + 7 * SECOND), Some(Overdue::Connection));
    }

    #[test]
    fn an_idle_connection_and_a_slow_head_are_closed() {
        let watch = Watch::new();
        let now = Instant::now();
        watch.call_ended(now, SECOND);
        assert_eq!(watch.expire(now + 2 * SECOND), Some(Overdue::Connection));
        watch.call_ended(now, 60 * SECOND);
        assert_eq!(watch.expire(now + 3 * SECOND), Some(Overdue::Rest));
        assert_eq!(watch.expire(now + 4 * SECOND), None);
        assert_eq!(watch.expire(now + 60 * SECOND), Some(Overdue::Connection));
        watch.head_begins(SECOND);
        assert_eq!(watch.stage(), Stage::Head);
        assert_eq!(watch.expire(Instant::now() + 2 * SECOND), Some(Overdue::Connection));
    }

    #[test]
    fn a_caller_that_takes_nothing_is_cut_and_one_that_takes_some_is_not() {
        let watch = Watch::new();
        watch.write_stalls(SECOND);
        watch.write_goes_on(SECOND);
        assert_eq!(watch.expire(Instant::now()), None);
        watch.write_stalls(SECOND);
        assert_eq!(watch.expire(Instant::now() + 2 * SECOND), Some(Overdue::Connection));
    }

    #[test]
    fn a_connection_rests_only_when_its_request_has_come_whole() {
        let watch = Watch::new();
        let start = watch.call_begins();
        watch.body_begins();
        watch.call_ended(start, 60 * SECOND);
        assert_eq!(watch.expire(start + 3 * SECOND), None);
        watch.body_ended();
        watch.call_ended(start, 60 * SECOND);
        assert_eq!(watch.expire(start + 3 * SECOND), Some(Overdue::Rest));
        watch.call_begins();
        watch.call_ended(start, 60 * SECOND);
        assert_eq!(watch.expire(start + 3 * SECOND), Some(Overdue::Rest));
    }

    #[test]
    fn a_caller_that_takes_its_answer_slowly_is_not_idle() {
        let watch = Watch::new();
        watch.call_begins();
        watch.write_stalls(10 * SECOND);
        let ended = Instant::now();
        watch.call_ended(ended, 4 * SECOND);
        assert_eq!(watch.expire(ended + 3 * SECOND), None, "put to rest with an answer in hand");
        assert_eq!(watch.expire(ended + 5 * SECOND), None);
        watch.write_goes_on(SECOND);
        assert_eq!(watch.expire(ended), None);
        assert_eq!(watch.expire(ended + 5 * SECOND), Some(Overdue::Connection));
    }
}
