//! Interim responses (1xx) on their way from an upstream to the client that waits for the final one.
//!
//! hyper's server cannot send them. So the task that drives both sides leaves their heads here, and the client's
//! stream writes them while hyper has nothing to write. Only the final response must arrive: what has no room, or comes
//! too late, is dropped.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// The most that waits for a client that takes nothing.
pub const MAX_QUEUED_BYTES: usize = 64 << 10;

const EMPTY: u8 = 0;
/// Some wait to be written.
const QUEUED: u8 = 1;
/// Some wait, and the final response of their exchange is there.
const FINAL_READY: u8 = 2;

/// Heads of interim responses that wait to be written to one client. Both ends are in one task; the atomic makes the
/// question whether there are any cheap.
#[derive(Debug, Default)]
pub struct InterimQueue {
    state: AtomicU8,
    heads: Mutex<Vec<u8>>,
}

impl InterimQueue {
    /// Adds the head of a response, unless too much is waiting.
    pub fn push(&self, head: &[u8]) {
        let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_final_ready() {
            heads.clear();
        }
        if heads.len() + head.len() <= MAX_QUEUED_BYTES {
            heads.extend_from_slice(head);
            self.state.store(QUEUED, Relaxed);
        }
    }

    /// The final response of the exchange is there.
    pub fn final_response_ready(&self) {
        if self.has_queued() {
            self.state.store(FINAL_READY, Relaxed);
        }
    }

    /// Whether there is anything.
    pub fn has_queued(&self) -> bool {
        self.state.load(Relaxed) != EMPTY
    }

    /// Whether what there is must precede the final response, or be dropped.
    pub fn is_final_ready(&self) -> bool {
        self.state.load(Relaxed) == FINAL_READY
    }

    /// Takes all there is.
    pub fn take(&self) -> Vec<u8> {
        self.state.store(EMPTY, Relaxed);
        std::mem::take(&mut *self.heads.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_taken_once_and_in_order() {
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
    fn what_is_too_much_is_dropped_and_so_is_what_an_earlier_exchange_has_left() {
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
