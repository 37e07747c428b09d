//! Requests from other code to the task of a connection. Usually none is pending; one load shows that.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// A request to the task of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Signal {
    /// The head being read has more headers than hyper's default limit: restart hyper with a higher limit.
    ManyHeaders = 1,
    /// The head being read is charged to the head budget: release it when the head is complete.
    CountedHead = 2,
    /// Refuse the head being read, because the head budget is exhausted.
    RefuseHead = 4,
    /// Close the connection if it is still idle or still waits for a head: another connection needs its permit.
    Evict = 8,
}

/// The pending signals, one bit each.
#[derive(Debug, Default)]
pub(super) struct SignalSet(AtomicU8);

impl SignalSet {
    pub(super) fn add(&self, signal: Signal) {
        self.0.fetch_or(signal as u8, Relaxed);
    }

    pub(super) fn any(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    pub(super) fn has(&self, signal: Signal) -> bool {
        self.0.load(Relaxed) & signal as u8 != 0
    }

    /// Removes `signal`, and returns whether it was set.
    pub(super) fn take(&self, signal: Signal) -> bool {
        self.has(signal) && self.0.fetch_and(!(signal as u8), Relaxed) & signal as u8 != 0
    }
}
