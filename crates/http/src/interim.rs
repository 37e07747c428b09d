//! Interim responses (1xx) from an upstream to the client that waits for the final response.
//!
//! hyper's server cannot send them. The task that drives both connections therefore queues their heads here, and the
//! client's stream writes them while hyper has nothing to write. Only the final response must arrive: interim responses
//! that exceed the limit, or come too late, are dropped.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use gateway_base::sync::lock_unpoisoned;

/// Maximum number of bytes that wait for a client that does not read.
pub const MAX_QUEUED_BYTES: usize = 64 << 10;

const EMPTY: u8 = 0;
/// Heads wait to be written.
const QUEUED: u8 = 1;
/// Heads wait, and the final response of their exchange is ready.
const FINAL_READY: u8 = 2;

/// Heads of interim responses that wait to be written to one client. Both ends are in one task; the atomic makes the
/// check for queued heads cheap.
#[derive(Debug, Default)]
pub struct InterimQueue {
    state: AtomicU8,
    /// The bytes to write. A leaf.
    heads: Mutex<Vec<u8>>,
}

impl InterimQueue {
    /// Queues the head of a response, unless the limit is reached.
    pub fn push(&self, head: &[u8]) {
        let mut heads = lock_unpoisoned(&self.heads);
        if self.is_final_ready() {
            heads.clear();
        }
        if heads.len() + head.len() <= MAX_QUEUED_BYTES {
            heads.extend_from_slice(head);
            self.state.store(QUEUED, Relaxed);
        }
    }

    /// Called when the final response of the exchange is ready.
    pub fn final_response_ready(&self) {
        if self.has_queued() {
            self.state.store(FINAL_READY, Relaxed);
        }
    }

    /// Returns whether any heads are queued.
    pub fn has_queued(&self) -> bool {
        self.state.load(Relaxed) != EMPTY
    }

    /// Returns whether the queued heads must be written before the final response, or be dropped.
    pub fn is_final_ready(&self) -> bool {
        self.state.load(Relaxed) == FINAL_READY
    }

    /// Removes and returns all queued heads.
    pub fn take(&self) -> Vec<u8> {
        self.state.store(EMPTY, Relaxed);
        std::mem::take(&mut *lock_unpoisoned(&self.heads))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_returned_once_and_in_order() {
        let interim = InterimQueue::default();
        assert!(!interim.has_queued());
        interim.final_response_ready();
        assert!(!interim.is_final_ready());
        interim.push(b"one ");
        interim.push(b"two");
        assert!(interim.has_queued() && !interim.is_final_ready());
        interim.final_response_ready();
        assert!(interim.is_final_ready());
        assert_eq!(interim.take(), b"one two");
        assert!(!interim.has_queued() && !interim.is_final_ready());
    }

    #[test]
    fn heads_beyond_the_limit_or_of_an_earlier_exchange_are_dropped() {
        let interim = InterimQueue::default();
        interim.push(&vec![b'x'; MAX_QUEUED_BYTES + 1]);
        assert!(!interim.has_queued());
        interim.push(&vec![b'x'; MAX_QUEUED_BYTES - 1]);
        interim.push(b"two");
        assert_eq!(interim.take().len(), MAX_QUEUED_BYTES - 1);
        interim.push(b"earlier");
        interim.final_response_ready();
        interim.push(b"later");
        assert!(!interim.is_final_ready());
        assert_eq!(interim.take(), b"later");
    }
}
