//! The deadlines of one exchange.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::deadlines::{NEVER, nanos};
use crate::interim::InterimQueue;

/// The state of a request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BodyState {
    /// The request has no body, or the body has been read completely.
    Complete = 0,
    /// The body has not been read completely, and nothing reads it. hyper discards the rest only if it is already
    /// received.
    Unread = 1,
    /// The body is being read.
    Reading = 2,
    /// The body ended early, or is malformed.
    Aborted = 3,
}

/// The deadlines and states of one exchange: a request and its response.
///
/// What waits for the peer checks [`is_expired`](Self::is_expired) each time it is polled. The owner of the timer, such as
/// the connection of the client, sets the flags. A client of an upstream without such an owner sets a timeout of its own.
///
/// The atomics only make this type `Sync`; they order nothing. Times are nanoseconds since `base`, `NEVER` means no
/// deadline.
#[derive(Debug)]
pub struct ExchangeDeadlines {
    base: Instant,
    /// Deadline of the response.
    deadline: AtomicU64,
    /// Deadline for the complete request body.
    body_deadline: AtomicU64,
    /// A [`BodyState`].
    body_state: AtomicU8,
    expired: AtomicBool,
    body_expired: AtomicBool,
    /// Queue of interim responses; `None` if no client accepts them.
    interim: Option<Arc<InterimQueue>>,
}

impl ExchangeDeadlines {
    /// An exchange without deadlines.
    pub fn new() -> Self {
        Self::with_base(Instant::now())
    }

    /// The same, with times stored relative to `base`.
    pub fn with_base(base: Instant) -> Self {
        Self {
            base,
            deadline: AtomicU64::new(NEVER),
            body_deadline: AtomicU64::new(NEVER),
            body_state: AtomicU8::new(BodyState::Complete as u8),
            expired: AtomicBool::new(false),
            body_expired: AtomicBool::new(false),
            interim: None,
        }
    }

    /// Sets the queue of interim responses for the client.
    pub fn with_interim(mut self, interim: Option<Arc<InterimQueue>>) -> Self {
        self.interim = interim;
        self
    }

    /// Queue of interim responses for the client.
    pub fn interim(&self) -> Option<&Arc<InterimQueue>> {
        self.interim.as_ref()
    }

    /// The exchange must be finished by `at`, or this deadline replaced.
    pub fn set_deadline(&self, at: Instant) {
        self.deadline.store(self.nanos_since_base(at), Relaxed);
    }

    /// Removes the deadline of the exchange.
    pub fn clear_deadline(&self) {
        self.deadline.store(NEVER, Relaxed);
    }

    /// The request body must be complete by `at`.
    pub fn set_body_deadline(&self, at: Instant) {
        self.body_deadline.store(self.nanos_since_base(at), Relaxed);
    }

    /// Removes the deadline of the request body, while nothing reads the body.
    pub fn clear_body_deadline(&self) {
        self.body_deadline.store(NEVER, Relaxed);
    }

    /// The head announced a body. Nothing reads it yet.
    pub fn on_body_announced(&self) {
        self.set_body_state(BodyState::Unread);
    }

    /// The request has a body, which will be read now.
    pub fn on_body_started(&self) {
        self.set_body_state(BodyState::Reading);
    }

    /// The request body has been read completely.
    pub fn on_body_finished(&self) {
        self.body_deadline.store(NEVER, Relaxed);
        self.set_body_state(BodyState::Complete);
    }

    /// The request body ended early, or is malformed.
    pub fn on_body_aborted(&self) {
        self.set_body_state(BodyState::Aborted);
    }

    /// The request body is not read any more.
    pub fn on_body_dropped(&self) {
        if self.body_state() == BodyState::Reading {
            self.set_body_state(BodyState::Unread);
        }
    }

    fn set_body_state(&self, state: BodyState) {
        self.body_state.store(state as u8, Relaxed);
    }

    pub fn body_state(&self) -> BodyState {
        match self.body_state.load(Relaxed) {
            0 => BodyState::Complete,
            1 => BodyState::Unread,
            2 => BodyState::Reading,
            _ => BodyState::Aborted,
        }
    }

    /// Returns whether bytes of the last request body may still arrive. They must not be parsed as another request.
    ///
    /// An unread body does not count: hyper continues after it only if it has discarded all of it.
    pub fn has_outstanding_body(&self) -> bool {
        self.body_state.load(Relaxed) >= BodyState::Reading as u8
    }

    /// Returns whether the deadline of the exchange has expired.
    pub fn is_expired(&self) -> bool {
        self.expired.load(Relaxed)
    }

    /// Returns whether the deadline of the request body has expired.
    pub fn body_expired(&self) -> bool {
        self.body_expired.load(Relaxed)
    }

    /// A new exchange starts; it has no body unless one is announced.
    pub(super) fn start(&self) {
        self.deadline.store(NEVER, Relaxed);
        self.expired.store(false, Relaxed);
        self.body_expired.store(false, Relaxed);
        self.set_body_state(BodyState::Complete);
    }

    /// The exchange has ended. The state of its request body remains: bytes of it may still arrive.
    pub(super) fn finish(&self) {
        self.deadline.store(NEVER, Relaxed);
        self.body_deadline.store(NEVER, Relaxed);
        self.expired.store(false, Relaxed);
        self.body_expired.store(false, Relaxed);
    }

    /// The connection has changed protocols. Bytes are relayed like a body and never parsed as a head.
    pub(super) fn on_protocol_switched(&self) {
        self.set_body_state(BodyState::Reading);
    }

    /// Returns the earliest deadline, in nanoseconds since the base.
    pub(super) fn next_nanos(&self) -> u64 {
        self.deadline.load(Relaxed).min(self.body_deadline.load(Relaxed))
    }

    /// Sets the flags of the deadlines that expired by `now` (nanoseconds since the base). `grace`: time to send the
    /// response that reports an expired exchange.
    pub(super) fn fire_expired(&self, now: u64, grace: Duration) -> ExpiredExchange {
        let mut expired = ExpiredExchange::Nothing;
        if self.body_deadline.load(Relaxed) <= now {
            self.body_deadline.store(NEVER, Relaxed);
            self.body_expired.store(true, Relaxed);
            expired = ExpiredExchange::Flagged;
        }
        if self.deadline.load(Relaxed) <= now {
            if self.expired.swap(true, Relaxed) {
                return ExpiredExchange::GraceOver;
            }
            self.deadline.store(now.saturating_add(nanos(grace)), Relaxed);
            expired = ExpiredExchange::Flagged;
        }
        expired
    }

    fn nanos_since_base(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.base))
    }
}

impl Default for ExchangeDeadlines {
    fn default() -> Self {
        Self::new()
    }
}

/// What has expired of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExpiredExchange {
    Nothing,
    /// A flag has been set.
    Flagged,
    /// The time to report an expired exchange has passed, too.
    GraceOver,
}
