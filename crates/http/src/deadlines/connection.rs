//! The deadlines of one connection of a client.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::deadlines::exchange::{ExchangeDeadlines, ExpiredExchange};
use crate::deadlines::signals::{Signal, SignalSet};
use crate::deadlines::{NEVER, nanos};

/// Idle time after which a connection hibernates. Busy connections never reach it; idle ones do not keep buffers for
/// long.
const HIBERNATE_AFTER: Duration = Duration::from_secs(2);
/// Time to send the response that reports a timeout.
const TIMEOUT_RESPONSE_GRACE: Duration = Duration::from_secs(5);

/// The state of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ConnectionState {
    /// No request is in progress.
    Idle = 0,
    /// Part of a request head has been received.
    ReadingHead = 1,
    /// A complete request head has been received, and its response has not been completed.
    InExchange = 2,
}

/// The kind of deadline that expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expired {
    /// No response can be sent any more: close the connection.
    Connection,
    /// The connection has been idle for `HIBERNATE_AFTER`: drop its buffers.
    HibernateDelay,
    /// The deadline of the exchange or of the request body. Its flag has been set: poll the code that waits.
    Exchange,
}

/// The deadlines and states of one connection, with those of its current exchange.
///
/// All users except those that call [`signal`](Self::signal) run in the task of the connection. The atomics only make
/// this type `Sync`; they order nothing. Times are nanoseconds since `base`, `NEVER` means no deadline.
#[derive(Debug)]
pub struct ConnectionDeadlines {
    base: Instant,
    state: AtomicU8,
    /// Deadline of the current state: hibernation or close while idle, the complete head while reading it. None during
    /// an exchange, which has its own.
    state_deadline: AtomicU64,
    /// Start of the current idle period.
    idle_since: AtomicU64,
    /// End of the idle timeout.
    close_at: AtomicU64,
    /// Deadline for progress of a blocked write to the client.
    write_deadline: AtomicU64,
    /// Time of the first byte of the current head.
    head_started_at: AtomicU64,
    /// Part of the last response may not have been written yet.
    response_unflushed: AtomicBool,
    signals: SignalSet,
    /// The current exchange, or the last one. HTTP/1 has one exchange at a time.
    exchange: Arc<ExchangeDeadlines>,
}

impl ConnectionDeadlines {
    /// An idle connection without deadlines.
    pub fn new() -> Self {
        Self::with_base(Instant::now())
    }

    /// The same, with times stored relative to `base`.
    pub fn with_base(base: Instant) -> Self {
        Self {
            base,
            state: AtomicU8::new(ConnectionState::Idle as u8),
            state_deadline: AtomicU64::new(NEVER),
            idle_since: AtomicU64::new(0),
            close_at: AtomicU64::new(NEVER),
            write_deadline: AtomicU64::new(NEVER),
            head_started_at: AtomicU64::new(0),
            response_unflushed: AtomicBool::new(false),
            signals: SignalSet::default(),
            // The client may get interim responses.
            exchange: Arc::new(
                ExchangeDeadlines::with_base(base).with_interim(Some(Arc::default())),
            ),
        }
    }

    /// Returns the deadlines of the current exchange, or of the last one.
    pub fn exchange(&self) -> &Arc<ExchangeDeadlines> {
        &self.exchange
    }

    pub fn state(&self) -> ConnectionState {
        match self.state.load(Relaxed) {
            0 => ConnectionState::Idle,
            1 => ConnectionState::ReadingHead,
            _ => ConnectionState::InExchange,
        }
    }

    /// The first bytes of a head have been received. The head must be complete within `read`.
    pub fn on_head_started(&self, read: Duration) {
        self.on_head_started_at(Instant::now(), read);
    }

    /// The same for bytes received at the time `at`.
    pub fn on_head_started_at(&self, at: Instant, read: Duration) {
        let now = at.saturating_duration_since(self.base);
        self.head_started_at.store(nanos(now), Relaxed);
        self.state.store(ConnectionState::ReadingHead as u8, Relaxed);
        self.state_deadline.store(nanos(now + read), Relaxed);
    }

    /// Requires the head being read to be complete within `limit` of its first byte, unless its deadline is earlier.
    pub fn limit_head_time(&self, limit: Duration) {
        let latest = self.head_started_at.load(Relaxed).saturating_add(nanos(limit));
        self.state_deadline.store(latest.min(self.state_deadline.load(Relaxed)), Relaxed);
    }

    /// A complete head has been received. Returns the time of its first byte, which saves another read of the clock.
    pub fn on_exchange_started(&self) -> Instant {
        let head_at = match self.state() {
            ConnectionState::ReadingHead => {
                Duration::from_nanos(self.head_started_at.load(Relaxed))
            }
            // A pipelined request, received together with the previous one.
            ConnectionState::Idle | ConnectionState::InExchange => self.base.elapsed(),
        };
        self.state.store(ConnectionState::InExchange as u8, Relaxed);
        self.state_deadline.store(NEVER, Relaxed);
        self.response_unflushed.store(true, Relaxed);
        // hyper reads a head only after the end of the previous body.
        self.exchange.start();
        self.base + head_at
    }

    /// The response is complete. The connection waits for another request for the time `idle` from `now`.
    pub fn on_exchange_finished(&self, now: Instant, idle: Duration) {
        self.state.store(ConnectionState::Idle as u8, Relaxed);
        self.start_idle(now.saturating_duration_since(self.base), idle);
        self.exchange.finish();
    }

    /// Starts the idle timeout at `now` (relative to the base).
    fn start_idle(&self, now: Duration, idle: Duration) {
        self.idle_since.store(nanos(now), Relaxed);
        self.state_deadline.store(nanos(now + idle.min(HIBERNATE_AFTER)), Relaxed);
        self.close_at.store(nanos(now + idle), Relaxed);
    }

    /// A write to the client would block. The client must accept some bytes within `write`.
    pub fn on_write_blocked(&self, write: Duration) {
        if self.write_deadline.load(Relaxed) == NEVER {
            self.write_deadline.store(nanos(self.base.elapsed() + write), Relaxed);
        }
    }

    /// The client accepted bytes. If they belong to a completed response, the idle timeout starts now.
    pub fn on_write_progress(&self, idle: Duration) {
        if self.is_write_blocked() {
            self.write_deadline.store(NEVER, Relaxed);
            if self.state() == ConnectionState::Idle {
                self.start_idle(self.base.elapsed(), idle);
            }
        }
    }

    /// Returns whether the last write to the client blocked.
    pub fn is_write_blocked(&self) -> bool {
        self.write_deadline.load(Relaxed) != NEVER
    }

    /// The deadline of the current state. A connection that still writes its last response is not idle.
    fn state_deadline(&self) -> u64 {
        let answering = self.state() == ConnectionState::Idle && self.is_write_blocked();
        if answering { NEVER } else { self.state_deadline.load(Relaxed) }
    }

    /// All responses are complete, and the connection lingers until the client closes it. It may be evicted
    /// immediately.
    pub fn on_linger_started(&self) {
        self.state.store(ConnectionState::Idle as u8, Relaxed);
        self.idle_since.store(0, Relaxed);
        self.write_deadline.store(NEVER, Relaxed);
    }

    /// The connection has changed protocols. Bytes are relayed like a body and never parsed as a head.
    pub fn on_protocol_switched(&self) {
        self.state.store(ConnectionState::InExchange as u8, Relaxed);
        self.exchange.on_protocol_switched();
    }

    /// Returns the state of a connection that waits for a head or for the rest of one, and since when it waits; `None`
    /// during an exchange or while a write is blocked.
    pub fn waiting_since(&self) -> Option<(ConnectionState, Instant)> {
        let state = self.state();
        let since = match state {
            ConnectionState::Idle if !self.is_write_blocked() => &self.idle_since,
            ConnectionState::ReadingHead => &self.head_started_at,
            ConnectionState::Idle | ConnectionState::InExchange => return None,
        };
        Some((state, self.base + Duration::from_nanos(since.load(Relaxed))))
    }

    /// Sets `signal` for the task of the connection. A caller in another task must also wake that task.
    pub fn signal(&self, signal: Signal) {
        self.signals.add(signal);
    }

    /// Returns whether any signal is set.
    pub fn has_signals(&self) -> bool {
        self.signals.any()
    }

    /// Returns whether `signal` is set.
    pub fn has_signal(&self, signal: Signal) -> bool {
        self.signals.has(signal)
    }

    /// Removes `signal`, and returns whether it was set.
    pub fn take_signal(&self, signal: Signal) -> bool {
        self.signals.take(signal)
    }

    /// hyper has written all its output.
    pub fn on_flushed(&self) {
        if self.state() != ConnectionState::InExchange {
            self.response_unflushed.store(false, Relaxed);
        }
    }

    /// Returns whether output written now belongs to no exchange: then it is a response that hyper made itself.
    pub fn is_between_exchanges(&self) -> bool {
        self.state() != ConnectionState::InExchange && !self.response_unflushed.load(Relaxed)
    }

    /// Returns the earliest deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        let next = self
            .state_deadline()
            .min(self.exchange.next_nanos())
            .min(self.write_deadline.load(Relaxed));
        (next != NEVER).then(|| self.base + Duration::from_nanos(next))
    }

    /// Sets the flags of all deadlines that expired by `now`. Returns what expired, if anything did.
    pub fn fire_expired(&self, now: Instant) -> Option<Expired> {
        let now = nanos(now.saturating_duration_since(self.base));
        if self.write_deadline.load(Relaxed) <= now {
            return Some(Expired::Connection);
        }
        let expired = match self.exchange.fire_expired(now, TIMEOUT_RESPONSE_GRACE) {
            ExpiredExchange::GraceOver => return Some(Expired::Connection),
            ExpiredExchange::Flagged => Some(Expired::Exchange),
            ExpiredExchange::Nothing => None,
        };
        if self.state_deadline() > now {
            return expired;
        }
        let close_at = self.close_at.load(Relaxed);
        if self.state() == ConnectionState::Idle && now < close_at {
            self.state_deadline.store(close_at, Relaxed);
            let hibernates = !self.exchange.has_outstanding_body();
            return hibernates.then_some(Expired::HibernateDelay);
        }
        Some(Expired::Connection)
    }
}

impl Default for ConnectionDeadlines {
    fn default() -> Self {
        Self::new()
    }
}
