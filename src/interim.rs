//! Interim responses (1xx) on their way from an upstream to the client that waits for the final one.
//!
//! hyper's server cannot send them. So the task that drives both sides leaves their heads here, and the client's
//! stream writes them while hyper has nothing to write. Only the final response must arrive: what has no room, or comes
//! too late, is dropped.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// The most that waits for a client that takes nothing.
pub const MAX_WAITING: usize = 64 << 10;

const EMPTY: u8 = 0;
/// Some wait to be written.
const WAITING: u8 = 1;
/// Some wait, and the final response of their exchange is there.
const LATE: u8 = 2;

/// Heads of interim responses that wait to be written to one client. Both ends are in one task; the atomic makes the
/// question whether there are any cheap.
#[derive(Debug, Default)]
pub struct Interim {
    state: AtomicU8,
    heads: Mutex<Vec<u8>>,
}

impl Interim {
    /// Adds the head of a response, unless too much is waiting.
    pub fn push(&self, head: &[u8]) {
        let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_late() {
            heads.clear();
        }
        if heads.len() + head.len() <= MAX_WAITING {
            heads.extend_from_slice(head);
            self.state.store(WAITING, Relaxed);
        }
    }

    /// The final response of the exchange is there.
    pub fn end(&self) {
        if self.is_waiting() {
            self.state.store(LATE, Relaxed);
        }
    }

    /// Whether there is anything.
    pub fn is_waiting(&self) -> bool {
        self.state.load(Relaxed) != EMPTY
    }

    /// Whether what there is must precede the final response, or be dropped.
    pub fn is_late(&self) -> bool {
        self.state.load(Relaxed) == LATE
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
        let interim = Interim::default();
        assert!(!interim.is_waiting());
        interim.end();
        assert!(!interim.is_late());
        interim.push(b"one ");
        interim.push(b"two");
        assert!(interim.is_waiting() && !interim.is_late());
        interim.end();
        assert!(interim.is_late());
        assert_eq!(interim.take(), b"one two");
        assert!(!interim.is_waiting() && !interim.is_late());
    }

    #[test]
    fn what_is_too_much_is_dropped_and_so_is_what_an_earlier_exchange_has_left() {
        let interim = Interim::default();
        interim.push(&vec![b'x'; MAX_WAITING + 1]);
        assert!(!interim.is_waiting());
        interim.push(&vec![b'x'; MAX_WAITING - 1]);
        interim.push(b"two");
        assert_eq!(interim.take().len(), MAX_WAITING - 1);
        interim.push(b"earlier");
        interim.end();
        interim.push(b"later");
        assert!(!interim.is_late());
        assert_eq!(interim.take(), b"later");
    }
}
