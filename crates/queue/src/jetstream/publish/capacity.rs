//! Limits the number of calls in the queue. The server counts messages, which may be batches. A large queue is counted
//! by its subjects; that takes the server some time, so it is done rarely.
use std::collections::HashSet;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::Error;
use crate::jetstream::Shared;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::ids;
use crate::jetstream::wire::subjects::{self, BATCHES, CALLS};
use gateway_base::sync::lock_unpoisoned;

/// After a full count, the next one waits for this multiple of its duration.
const RECOUNT_PAUSE_FACTOR: u32 = 20;
/// Maximum number of batch records that are read to subtract finished calls.
const MAX_RECORDS_READ: u64 = 100;
/// An older count is refreshed.
const MAX_COUNT_AGE: Duration = Duration::from_secs(2);
/// Maximum time that a publish waits for a recount.
const RESERVE_TIMEOUT: Duration = Duration::from_millis(500);

/// The last count and the calls added since.
pub(in crate::jetstream) struct Capacity {
    /// A leaf. A permit is counted in `added` and `in_flight` under it, so that both belong to the same count.
    last_count: Mutex<CallCount>,
    /// Calls that this process has published since the count, or is publishing.
    added: AtomicU64,
    /// Calls of those that are in flight: a count may or may not include them.
    in_flight: AtomicU64,
    /// Serializes counts.
    count_slot: Semaphore,
}

#[derive(Clone, Copy)]
struct CallCount {
    /// Upper bound of the number of calls at that time.
    upper_bound: u64,
    /// Time of the count, and earliest time of the next one; `None` before the first count.
    times: Option<(Instant, Instant)>,
}

/// Reserved capacity for calls that are in flight.
pub(in crate::jetstream) struct CapacityPermit<'a> {
    capacity: &'a Capacity,
    calls: u64,
}

impl Drop for CapacityPermit<'_> {
    fn drop(&mut self) {
        self.capacity.in_flight.fetch_sub(self.calls, Relaxed);
    }
}

impl Capacity {
    pub(in crate::jetstream) fn new() -> Self {
        let count = Mutex::new(CallCount { upper_bound: 0, times: None });
        Self {
            last_count: count,
            added: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            count_slot: Semaphore::new(1),
        }
    }

    fn last_count(&self) -> MutexGuard<'_, CallCount> {
        lock_unpoisoned(&self.last_count)
    }

    /// Reserves capacity if the last count leaves enough.
    fn try_reserve(&self, calls: u64, limit: u64) -> Option<CapacityPermit<'_>> {
        let count = self.last_count();
        let existing = count.upper_bound.saturating_add(self.added.load(Relaxed));
        if count.times.is_none() || existing.saturating_add(calls) > limit {
            return None;
        }
        self.added.fetch_add(calls, Relaxed);
        self.in_flight.fetch_add(calls, Relaxed);
        Some(CapacityPermit { capacity: self, calls })
    }
}

impl Shared {
    /// Reserves capacity for this many calls until they are stored. Publishes of other gateways since the last count
    /// are not seen, so the limit may be exceeded by them.
    ///
    /// # Errors
    /// [`Error::Full`] when there is no capacity: the client may retry later. [`Error::Unreachable`] when the server
    /// does not respond.
    pub(in crate::jetstream) async fn reserve(
        &self,
        calls: usize,
    ) -> Result<CapacityPermit<'_>, Error> {
        let (calls, limit) = (calls as u64, self.options.limits.max_pending as u64);
        match self.capacity.try_reserve(calls, limit) {
            Some(permit) => Ok(permit),
            None => Box::pin(self.recount_and_reserve(calls, limit)).await,
        }
    }

    async fn recount_and_reserve(
        &self,
        calls: u64,
        limit: u64,
    ) -> Result<CapacityPermit<'_>, Error> {
        let slot = tokio::time::timeout(RESERVE_TIMEOUT, self.capacity.count_slot.acquire()).await;
        let counted = self.capacity.last_count().times.is_some();
        let _slot = slot.map_err(|_| if counted { Error::Full } else { Error::Unreachable })?;
        // A count by another task may have found capacity.
        if let Some(permit) = self.capacity.try_reserve(calls, limit) {
            return Ok(permit);
        }
        let times = self.capacity.last_count().times;
        if let Some((_, next)) = times {
            let wait = next.saturating_duration_since(Instant::now());
            if wait > RESERVE_TIMEOUT {
                return Err(Error::Full);
            }
            tokio::time::sleep(wait).await;
        }
        self.recount(limit).await?;
        self.capacity.try_reserve(calls, limit).ok_or(Error::Full)
    }

    /// Refreshes an old count, since other gateways publish as well. Call it about every second.
    pub(in crate::jetstream) async fn recount_if_old(&self) -> Result<(), NatsError> {
        let times = self.capacity.last_count().times;
        let due =
            times.is_some_and(|(at, next)| at.elapsed() > MAX_COUNT_AGE && next < Instant::now());
        match self.capacity.count_slot.try_acquire() {
            Ok(_slot) if due => self.recount(self.options.limits.max_pending as u64).await,
            _ => Ok(()),
        }
    }

    async fn recount(&self, limit: u64) -> Result<(), NatsError> {
        let start = Instant::now();
        let stored = {
            let _guard = self.capacity.last_count();
            self.capacity.added.load(Relaxed) - self.capacity.in_flight.load(Relaxed)
        };
        let (upper_bound, listed) = self.count_upper_bound(limit).await?;
        let mut count = self.capacity.last_count();
        let pause = if listed { start.elapsed() * RECOUNT_PAUSE_FACTOR } else { Duration::ZERO };
        let now = Instant::now();
        *count = CallCount { upper_bound, times: Some((now, now + pause)) };
        self.capacity.added.fetch_sub(stored, Relaxed);
        Ok(())
    }

    /// Returns an upper bound of the number of calls, and whether all subjects were listed for it. The listing is
    /// skipped if the number of messages alone proves that the limit is not reached.
    async fn count_upper_bound(&self, limit: u64) -> Result<(u64, bool), NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let messages = api.message_count(&subjects.calls).await?;
        let upper_bound = messages.saturating_mul(ids::MAX_KEY_CALLS as u64);
        if upper_bound < limit {
            return Ok((upper_bound, false));
        }
        let stored =
            api.subjects(&subjects.calls, &subjects.of_function(CALLS, None), usize::MAX).await?;
        let all: usize = stored.iter().map(|subject| subjects::call_count(subject)).sum();
        if (all as u64) < limit || api.message_count(&subjects.batches).await? > MAX_RECORDS_READ {
            return Ok((all as u64, true));
        }
        // Batches that still exist may contain finished calls.
        let open = api
            .subjects(&subjects.batches, &subjects.of_function(BATCHES, None), usize::MAX)
            .await?;
        let existing: HashSet<_> =
            stored.iter().filter_map(|subject| subjects.batch_record(subject)).collect();
        let mut finished = 0;
        for subject in open.iter().filter(|subject| existing.contains(*subject)) {
            finished += match self.load_record_at(subject, false, None).await {
                Ok(Some((record, _))) => record.outcome_count(),
                Ok(None) | Err(NatsError::UnreadableRecord) => 0,
                Err(error) => return Err(error),
            };
        }
        Ok((all.saturating_sub(finished) as u64, true))
    }
}
