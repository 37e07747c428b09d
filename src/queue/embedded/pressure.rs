//! What the thread that writes does while the disk is full: it enqueues nothing, writes little at a time, and finds out
//! when there is room again.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::queue::embedded::reserve::Reserve;
use crate::queue::embedded::store::Store;
use crate::queue::embedded::writer::{Op, Settled};
use crate::queue::embedded::{Shared, finished, journal};

/// Nothing is enqueued for at least this time after the disk was full.
const PAUSE: Duration = Duration::from_secs(1);
/// How often the disk is looked at while it is full.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The shortest pause between two compactions, and the longest. While calls wait, it is the longest: their settlements
/// reuse the space inside the file.
const COMPACT_AFTER: Duration = Duration::from_secs(2);
const COMPACT_AT_LEAST_AFTER: Duration = Duration::from_secs(60);
/// A compaction is followed by a pause of this many times its own duration, so that it takes a small part of the time.
const PAUSE_FACTOR: u32 = 20;
/// The number of results that are removed at once to make room.
const FORGET_AT_ONCE: usize = 500;
/// A record of at most this length is kept as it is, however little room there is.
const SMALL: usize = 4 << 10;

/// What is known of a disk that is full.
pub(super) struct Pressure {
    pub(super) reserve: Arc<Reserve>,
    full: AtomicBool,
    state: Mutex<State>,
}

struct State {
    /// Room that must be there before calls are enqueued again.
    wanted: u64,
    not_before: Instant,
    looked_at: Instant,
    compacted_at: Instant,
    /// How long the last compaction took, and how long to wait before the next while no calls wait.
    took: Duration,
    pause: Duration,
    /// Results have been left out or forgotten since the disk is full.
    results_dropped: u64,
}

impl Pressure {
    pub(super) fn new(reserve: Reserve) -> Self {
        let now = Instant::now();
        let state = State {
            wanted: 0,
            not_before: now,
            looked_at: now,
            compacted_at: now,
            took: Duration::ZERO,
            pause: COMPACT_AFTER,
            results_dropped: 0,
        };
        let (reserve, full) = (Arc::new(reserve), AtomicBool::new(false));
        Self { reserve, full, state: Mutex::new(state) }
    }

    /// Whether nothing is enqueued, since the disk is full.
    pub(super) fn is_full(&self) -> bool {
        self.full.load(Relaxed)
    }

    /// The disk had no room for `bytes` that were to be enqueued, or the reserve is in use.
    pub(super) fn begin(&self, bytes: usize) {
        let mut state = self.state();
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX).saturating_mul(2);
        state.wanted = bytes.clamp(self.reserve.margin(), self.reserve.target());
        state.not_before = Instant::now() + PAUSE;
        (state.pause, state.compacted_at) = (COMPACT_AFTER, Instant::now());
        (state.took, state.results_dropped) = (Duration::ZERO, 0);
        if !self.full.swap(true, Relaxed) {
            tracing::warn!(
                available = self.reserve.available(),
                "The disk of the queue is full: no calls are queued until there is room"
            );
        }
    }

    fn end(&self) {
        if self.full.swap(false, Relaxed) {
            let results_dropped = self.state().results_dropped;
            tracing::info!(results_dropped, "The disk of the queue has room again");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first of `ops` that are small enough to be written together, at least one; `None` at the end. Large
    /// results that there is no room for are left out: the calls are settled all the same. Whether there is room is
    /// judged for each piece, since those before it may have used the reserve.
    pub(super) fn next_piece(&self, ops: &mut VecDeque<Op>) -> Option<Vec<Op>> {
        let part = self.reserve.part();
        let longest = if self.reserve.is_low() { SMALL } else { part };
        let (mut piece, mut length) = (Vec::new(), 0);
        while let Some(op) = ops.front_mut() {
            if shorten(op, longest) {
                self.state().results_dropped += 1;
            }
            length += op.length();
            if length > part && !piece.is_empty() {
                break;
            }
            piece.extend(ops.pop_front());
        }
        (!piece.is_empty()).then_some(piece)
    }
}

/// Leaves out the result that `op` would keep if its record is longer than `longest`; whether it has.
fn shorten(op: &mut Op, longest: usize) -> bool {
    let Op::Settle(_, settled, _) = op else { return false };
    match settled {
        Settled::Over { record, .. } if record.len() > longest => {
            let Some(shorter) = finished::without_result(record) else { return false };
            *record = shorter.into();
        }
        Settled::Dead { record, .. } if record.len() > longest => {
            let whole = Bytes::copy_from_slice(record);
            let Some(shorter) = finished::without_result(&whole) else { return false };
            *record = shorter;
        }
        _ => return false,
    }
    true
}

impl Shared {
    /// Whether nothing can be enqueued. Looks whether there is room again; called by the thread that writes.
    pub(super) fn has_no_room(&self) -> bool {
        let pressure = &self.pressure;
        if !pressure.is_full() {
            if pressure.reserve.is_full() {
                return false;
            }
            pressure.begin(0);
        }
        let due = {
            let mut state = pressure.state();
            let due = state.looked_at.elapsed() >= LOOK_EVERY;
            if due {
                state.looked_at = Instant::now();
            }
            due
        };
        if due {
            self.look_for_room();
        }
        pressure.is_full()
    }

    /// Fills the reserve, compacts the file if that may help, and ends the pressure if there is room.
    fn look_for_room(&self) {
        let pressure = &self.pressure;
        if self.refill() {
            return;
        }
        let busy = self.waiting().schedule.waiting() > 0;
        let began = Instant::now();
        {
            let state = pressure.state();
            let pause = if busy { COMPACT_AT_LEAST_AFTER } else { state.pause };
            if began < state.compacted_at + pause.max(state.took * PAUSE_FACTOR) {
                return;
            }
        }
        let before = pressure.reserve.available();
        self.compact();
        {
            let mut state = pressure.state();
            (state.compacted_at, state.took) = (Instant::now(), began.elapsed());
            let gained = pressure.reserve.available() > before;
            let longer = if gained { COMPACT_AFTER } else { state.pause * 2 };
            state.pause = longer.min(COMPACT_AT_LEAST_AFTER);
        }
        self.refill();
    }

    /// Fills the reserve; whether that, and what is left, is enough to enqueue calls again.
    fn refill(&self) -> bool {
        let pressure = &self.pressure;
        let filled = pressure.reserve.fill().unwrap_or_else(|error| {
            tracing::warn!(%error, "The space that is kept for settling calls cannot be allocated");
            false
        });
        let (wanted, not_before) = {
            let state = pressure.state();
            (state.wanted, state.not_before)
        };
        let enough =
            filled && Instant::now() >= not_before && pressure.reserve.available() >= wanted;
        if enough {
            self.restore_journal();
            pressure.end();
        }
        enough
    }

    /// Opens the file again if it has lost its journal to the reserve, and there is room for both.
    fn restore_journal(&self) {
        let store = self.store.read().unwrap_or_else(PoisonError::into_inner);
        let has_journal = store.as_ref().is_none_or(Store::has_journal);
        drop(store);
        if !has_journal && self.pressure.reserve.available() >= 2 * journal::LENGTH {
            self.close();
            // If it fails, the next change tries again.
            let _ = self.reopen();
        }
    }

    /// A call was settled or removed: a compaction may free space.
    pub(super) fn made_progress(&self) {
        self.pressure.state().pause = COMPACT_AFTER;
    }

    /// Forgets the oldest results before their time if space is so short that calls might not be settled.
    pub(super) fn forget_results(&self) {
        if !self.pressure.reserve.is_low() {
            return;
        }
        // A failure has been reported where it happened. What follows may succeed all the same.
        if let Ok(forgotten) = self.change(|change| change.forget_oldest(FORGET_AT_ONCE)) {
            self.pressure.state().results_dropped += forgotten;
        }
    }
}
