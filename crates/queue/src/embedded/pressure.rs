//! Handling of a full disk by the writer thread: it enqueues nothing, commits in small chunks, and detects when there
//! is space again.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::embedded::reserve::Reserve;
use crate::embedded::settle_write::SettleWrite;
use crate::embedded::store::Store;
use crate::embedded::writer::WriteOp;
use crate::embedded::{Shared, result_codec, wal};
use gateway_base::backoff::Backoff;
use gateway_base::sync::{lock_unpoisoned, read_unpoisoned};

/// Minimum time without enqueueing after the disk was full.
const MIN_FULL_DURATION: Duration = Duration::from_secs(1);
/// Interval of checks while the disk is full.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// Minimum and maximum interval between compactions. While calls are pending, the maximum applies: their settlements
/// reuse space inside the file.
const COMPACTION_BACKOFF: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(60));
/// The pause after a compaction is at least this multiple of its duration, so that compactions take a small part of the
/// time.
const COMPACTION_REST_FACTOR: u32 = 20;
/// Maximum number of results that are evicted at a time.
const MAX_EVICTED_RESULTS: usize = 500;
/// Results up to this length are kept even if the reserve is low.
const SMALL_RESULT_BYTES: usize = 4 << 10;

/// State of a full disk.
pub(super) struct DiskPressure {
    pub(super) reserve: Arc<Reserve>,
    full: AtomicBool,
    /// A leaf.
    state: Mutex<PressureState>,
}

struct PressureState {
    /// Free bytes that are required before calls are enqueued again.
    required_bytes: u64,
    not_before: Instant,
    checked_at: Instant,
    compacted_at: Instant,
    /// Duration of the last compaction, and pause before the next one while no calls are pending.
    last_compaction: Duration,
    pause: Duration,
    /// Number of results dropped since the disk is full.
    results_dropped: u64,
}

impl DiskPressure {
    pub(super) fn new(reserve: Reserve) -> Self {
        let now = Instant::now();
        let state = PressureState {
            required_bytes: 0,
            not_before: now,
            checked_at: now,
            compacted_at: now,
            last_compaction: Duration::ZERO,
            pause: COMPACTION_BACKOFF.min,
            results_dropped: 0,
        };
        let (reserve, full) = (Arc::new(reserve), AtomicBool::new(false));
        Self { reserve, full, state: Mutex::new(state) }
    }

    /// Returns whether the disk is full, so that nothing is enqueued.
    pub(super) fn is_full(&self) -> bool {
        self.full.load(Relaxed)
    }

    /// Enters the state: the disk had no space for `bytes` to enqueue, or the reserve is in use.
    pub(super) fn enter(&self, bytes: usize) {
        let mut state = self.state();
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX).saturating_mul(2);
        state.required_bytes = bytes.clamp(self.reserve.margin(), self.reserve.target());
        state.not_before = Instant::now() + MIN_FULL_DURATION;
        (state.pause, state.compacted_at) = (COMPACTION_BACKOFF.min, Instant::now());
        (state.last_compaction, state.results_dropped) = (Duration::ZERO, 0);
        if !self.full.swap(true, Relaxed) {
            tracing::warn!(
                available = self.reserve.available(),
                "The disk of the queue is full: no calls are queued until there is free space"
            );
        }
    }

    fn leave(&self) {
        if self.full.swap(false, Relaxed) {
            let results_dropped = self.state().results_dropped;
            tracing::info!(results_dropped, "The disk of the queue has free space again");
        }
    }

    fn state(&self) -> MutexGuard<'_, PressureState> {
        lock_unpoisoned(&self.state)
    }

    /// Removes the first operations of `ops` that fit into one commit, at least one. Returns `None` at the end. Large
    /// results are dropped if the reserve is low; their calls are settled nevertheless. This is checked for each chunk,
    /// since earlier ones may have used the reserve.
    pub(super) fn next_chunk(&self, ops: &mut VecDeque<WriteOp>) -> Option<Vec<WriteOp>> {
        let max_bytes = self.reserve.max_commit_bytes();
        let max_record_bytes = if self.reserve.is_low() { SMALL_RESULT_BYTES } else { max_bytes };
        let (mut chunk, mut length) = (Vec::new(), 0);
        while let Some(op) = ops.front_mut() {
            if drop_large_result(op, max_record_bytes) {
                self.state().results_dropped += 1;
            }
            length += op.length();
            if length > max_bytes && !chunk.is_empty() {
                break;
            }
            chunk.extend(ops.pop_front());
        }
        (!chunk.is_empty()).then_some(chunk)
    }
}

/// Drops the response in `op` if its record exceeds the limit. Returns whether it did.
fn drop_large_result(op: &mut WriteOp, max_record_bytes: usize) -> bool {
    let WriteOp::Settle(_, settled, _) = op else { return false };
    match settled {
        SettleWrite::Finished { record, .. } if record.len() > max_record_bytes => {
            let Some(shorter) = result_codec::without_result(record) else { return false };
            *record = shorter.into();
        }
        SettleWrite::DeadLetter { record, .. } if record.len() > max_record_bytes => {
            let whole = Bytes::copy_from_slice(record);
            let Some(shorter) = result_codec::without_result(&whole) else { return false };
            *record = shorter;
        }
        _ => return false,
    }
    true
}

impl Shared {
    /// Returns whether the disk is full. Checks from time to time whether there is space again. Only the writer thread
    /// calls this.
    pub(super) fn is_disk_full(&self) -> bool {
        let pressure = &self.pressure;
        if !pressure.is_full() {
            if pressure.reserve.is_full() {
                return false;
            }
            pressure.enter(0);
        }
        let due = {
            let mut state = pressure.state();
            let due = state.checked_at.elapsed() >= CHECK_INTERVAL;
            if due {
                state.checked_at = Instant::now();
            }
            due
        };
        if due {
            self.try_recover();
        }
        pressure.is_full()
    }

    /// Refills the reserve, compacts the file if that may help, and leaves the state if there is enough space.
    fn try_recover(&self) {
        let pressure = &self.pressure;
        if self.refill_reserve() {
            return;
        }
        let busy = self.state().schedule.pending() > 0;
        let began = Instant::now();
        {
            let state = pressure.state();
            let pause = if busy { COMPACTION_BACKOFF.max } else { state.pause };
            if began
                < state.compacted_at + pause.max(state.last_compaction * COMPACTION_REST_FACTOR)
            {
                return;
            }
        }
        let before = pressure.reserve.available();
        self.compact();
        {
            let mut state = pressure.state();
            (state.compacted_at, state.last_compaction) = (Instant::now(), began.elapsed());
            let gained = pressure.reserve.available() > before;
            state.pause = match gained {
                true => COMPACTION_BACKOFF.min,
                false => COMPACTION_BACKOFF.next(state.pause),
            };
        }
        self.refill_reserve();
    }

    /// Refills the reserve. Leaves the state, and returns `true`, if there is enough space to enqueue calls.
    fn refill_reserve(&self) -> bool {
        let pressure = &self.pressure;
        let filled = pressure.reserve.fill().unwrap_or_else(|error| {
            tracing::warn!(%error, "The disk space reserved for settling calls cannot be allocated");
            false
        });
        let (required_bytes, not_before) = {
            let state = pressure.state();
            (state.required_bytes, state.not_before)
        };
        let enough = filled
            && Instant::now() >= not_before
            && pressure.reserve.available() >= required_bytes;
        if enough {
            self.reopen_with_wal();
            pressure.leave();
        }
        enough
    }

    /// Reopens the file with a log if it had given up its log to the reserve, and there is space for both.
    fn reopen_with_wal(&self) {
        let store = read_unpoisoned(&self.store);
        let has_wal = store.as_ref().is_none_or(Store::has_wal);
        drop(store);
        if !has_wal && self.pressure.reserve.available() >= 2 * wal::WAL_BYTES {
            self.close();
            // If this fails, the next write tries again.
            let _ = self.reopen();
        }
    }

    /// Called when a call was settled or deleted: a compaction may free space.
    pub(super) fn on_space_freed(&self) {
        self.pressure.state().pause = COMPACTION_BACKOFF.min;
    }

    /// Evicts the oldest results before they expire if the reserve is low, so that calls can still be settled.
    pub(super) fn evict_results(&self) {
        if !self.pressure.reserve.is_low() {
            return;
        }
        // A failure has been logged. The following commits may succeed nevertheless.
        if let Ok(forgotten) = self.write(|txn| txn.evict_oldest_results(MAX_EVICTED_RESULTS)) {
            self.pressure.state().results_dropped += forgotten;
        }
    }
}
