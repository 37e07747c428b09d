//! What a connection's task is told by others. There is rarely anything, which one look shows.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// One thing to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Note {
    /// The head that is being read has more headers than hyper has room for.
    Room = 1,
    /// The head that is being read is counted, since it is large.
    LargeHead = 2,
    /// The head that is being read is to be refused.
    Refuse = 4,
    /// The connection is to be closed if it is not needed.
    Leave = 8,
}

#[derive(Debug, Default)]
pub(super) struct Notes(AtomicU8);

impl Notes {
    pub(super) fn add(&self, note: Note) {
        self.0.fetch_or(note as u8, Relaxed);
    }

    pub(super) fn any(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    pub(super) fn has(&self, note: Note) -> bool {
        self.0.load(Relaxed) & note as u8 != 0
    }

    pub(super) fn take(&self, note: Note) -> bool {
        self.has(note) && self.0.fetch_and(!(note as u8), Relaxed) & note as u8 != 0
    }
}
