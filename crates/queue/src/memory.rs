//! The memory budget for bodies of queued calls: of requests that are being enqueued, of calls that a worker holds, of
//! their responses until they are stored and reported. All share one budget.
//!
//! Large requests wait in a queue of their own. The first of them collects free memory, but leaves a reserve for small
//! requests, which therefore do not wait until the large one is served.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::MAX_ASYNC_BODY_BYTES;

/// Bytes per permit of the semaphore.
const BYTES_PER_PERMIT: usize = 1024;
/// Budget for all bodies together.
pub const MAX_TOTAL_BYTES: usize = MAX_ASYNC_BODY_BYTES;
/// A worker receives no call while less than this is free.
const MIN_FREE_BYTES_TO_RECEIVE: usize = 64 << 10;
/// A buffer grows by up to this, or a quarter of its length, more than is needed now.
const MAX_EXTRA_GROWTH_BYTES: usize = 256 << 10;

/// Memory that a waiting large request leaves free for small ones.
const SMALL_REQUEST_RESERVE_BYTES: usize = MAX_TOTAL_BYTES / 8;
/// Time for which it does so. Then it collects all free memory, since small requests could otherwise delay it without
/// limit.
const RESERVE_DURATION: Duration = Duration::from_secs(5);
/// Requests up to this size are small.
const MAX_SMALL_REQUEST_BYTES: usize = SMALL_REQUEST_RESERVE_BYTES / 16;

/// The budget. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BodyBudget(Arc<BudgetState>);

#[derive(Debug)]
struct BudgetState {
    free: Arc<Semaphore>,
    /// Has one permit, which the first of the waiting large requests holds.
    first_large: Semaphore,
    freed: FreedNotifier,
}

/// When dropped, wakes the first of the waiting large requests: memory may have been freed.
#[derive(Clone, Debug, Default)]
struct FreedNotifier(Arc<Notify>);

impl Drop for FreedNotifier {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// A share of the budget, held until it is dropped.
#[derive(Debug)]
pub struct MemoryPermit {
    // The fields are dropped in this order: the permits must be returned before the notification.
    permits: OwnedSemaphorePermit,
    freed: FreedNotifier,
}

impl MemoryPermit {
    /// Adds the share of `other` to this one.
    pub fn merge(&mut self, other: Self) {
        self.permits.merge(other.permits);
    }

    /// Returns all but `units` to the budget.
    fn retain_units(&mut self, units: usize) {
        let excess = self.permits.num_permits().saturating_sub(units);
        if excess > 0 {
            drop(self.permits.split(excess));
            self.freed.0.notify_one();
        }
    }
}

impl Default for BodyBudget {
    fn default() -> Self {
        let free = Arc::new(Semaphore::new(MAX_TOTAL_BYTES / BYTES_PER_PERMIT));
        Self(Arc::new(BudgetState {
            free,
            first_large: Semaphore::new(1),
            freed: FreedNotifier::default(),
        }))
    }
}

impl BodyBudget {
    fn units(bytes: usize) -> u32 {
        // A request above the limit gets the whole budget.
        u32::try_from(bytes.min(MAX_TOTAL_BYTES).div_ceil(BYTES_PER_PERMIT)).unwrap_or(u32::MAX)
    }

    fn permit(&self, permits: OwnedSemaphorePermit) -> MemoryPermit {
        MemoryPermit { permits, freed: self.0.freed.clone() }
    }

    fn try_units(&self, units: u32) -> Option<MemoryPermit> {
        let permits = Arc::clone(&self.0.free).try_acquire_many_owned(units);
        permits.ok().map(|permits| self.permit(permits))
    }

    /// Reserves `bytes` without waiting. Returns `None` if they are not available.
    pub fn try_reserve(&self, bytes: usize) -> Option<MemoryPermit> {
        let units = Self::units(bytes);
        // A large request must neither overtake those that wait nor use the reserve for small ones.
        let must_wait =
            bytes > MAX_SMALL_REQUEST_BYTES && self.0.first_large.available_permits() == 0;
        if must_wait
            && self.0.free.available_permits()
                < units as usize + SMALL_REQUEST_RESERVE_BYTES / BYTES_PER_PERMIT
        {
            return None;
        }
        self.try_units(units)
    }

    /// Reserves `bytes`, waiting until they are available. Cancel-safe.
    pub async fn reserve(&self, bytes: usize) -> Option<MemoryPermit> {
        let units = Self::units(bytes);
        if bytes > MAX_SMALL_REQUEST_BYTES {
            return self.collect(units).await;
        }
        // Dropped after the permits if this future is cancelled when it already has them.
        let freed = self.0.freed.clone();
        // The semaphores are never closed, so this cannot fail.
        let permits = Arc::clone(&self.0.free).acquire_many_owned(units).await.ok()?;
        Some(MemoryPermit { permits, freed })
    }

    /// Collects `units` after the large requests that came before.
    async fn collect(&self, units: u32) -> Option<MemoryPermit> {
        let _first_large = self.0.first_large.acquire().await.ok()?;
        let mut collected = self.try_units(0)?;
        let reserves_until = Instant::now() + RESERVE_DURATION;
        loop {
            let missing = (units as usize).saturating_sub(collected.permits.num_permits());
            if missing == 0 {
                return Some(collected);
            }
            let free = self.0.free.available_permits();
            let reserves = Instant::now() < reserves_until;
            let reserve = if reserves { SMALL_REQUEST_RESERVE_BYTES / BYTES_PER_PERMIT } else { 0 };
            let take = if free >= missing { missing } else { free.saturating_sub(reserve) };
            if take == 0 {
                // Memory freed since the check has stored its notification.
                let freed = self.0.freed.0.notified();
                if reserves {
                    let _ = timeout_at(reserves_until, freed).await;
                } else {
                    freed.await;
                }
                continue;
            }
            // Another request may have taken the memory in between.
            if let Some(more) = self.try_units(u32::try_from(take).unwrap_or(u32::MAX)) {
                collected.merge(more);
            }
        }
    }

    /// Waits until enough memory for another delivery is free. Cancel-safe.
    pub async fn wait_until_available(&self) {
        drop(self.reserve(MIN_FREE_BYTES_TO_RECEIVE).await);
    }
}

/// Returns the memory of `permit` beyond `bytes` to the budget.
pub fn shrink_permit(permit: &mut Option<MemoryPermit>, bytes: usize) {
    if let Some(permit) = permit {
        permit.retain_units(BodyBudget::units(bytes) as usize);
    }
}

/// A body that is being read, with its memory permit.
pub struct BodyBuffer<'a> {
    budget: &'a BodyBudget,
    bytes: Vec<u8>,
    permit: Option<MemoryPermit>,
}

impl<'a> BodyBuffer<'a> {
    pub fn new(budget: &'a BodyBudget) -> Self {
        Self { budget, bytes: Vec::new(), permit: None }
    }

    pub fn length(&self) -> usize {
        self.bytes.len()
    }

    /// Appends `data`. Returns `false` if there is not enough memory.
    pub fn try_add(&mut self, data: &[u8]) -> bool {
        if let Some(needed) = self.growth(data) {
            // Growth is proportional to the length, since a longer body is likely to go on. A `Content-Length` alone
            // reserves nothing.
            let length = self.bytes.len();
            let ahead = needed.max(length.min(MAX_EXTRA_GROWTH_BYTES.max(length / 4)));
            let reserve = |growth| Some((self.budget.try_reserve(growth)?, growth));
            let Some((more, growth)) = reserve(ahead).or_else(|| reserve(needed)) else {
                return false;
            };
            self.grow(more, growth);
        }
        self.bytes.extend_from_slice(data);
        true
    }

    /// Appends `data` when there is enough memory. Returns `false` if that does not happen before `deadline`.
    pub async fn add_before(&mut self, data: &[u8], deadline: Instant) -> bool {
        if self.try_add(data) {
            return true;
        }
        let growth = self.growth(data).unwrap_or(0);
        let Ok(Some(more)) = timeout_at(deadline, self.budget.reserve(growth)).await else {
            return false;
        };
        self.grow(more, growth);
        self.bytes.extend_from_slice(data);
        true
    }

    /// Waits until `length` bytes can be reserved for a body that is about to be read. After `deadline`, the body is
    /// read without a reservation.
    pub async fn reserve_expected(&mut self, length: usize, deadline: Instant) {
        let growth = length.saturating_sub(self.bytes.capacity());
        if growth > 0
            && let Ok(Some(more)) = timeout_at(deadline, self.budget.reserve(growth)).await
        {
            self.grow(more, growth);
        }
    }

    /// Bytes by which the buffer must grow to append `data`.
    fn growth(&self, data: &[u8]) -> Option<usize> {
        let (needs, has) = (self.bytes.len() + data.len(), self.bytes.capacity());
        needs.checked_sub(has).filter(|growth| *growth > 0)
    }

    fn grow(&mut self, more: MemoryPermit, by: usize) {
        let capacity = self.bytes.capacity() + by;
        self.bytes.reserve_exact(capacity - self.bytes.len());
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            None => self.permit = Some(more),
        }
    }

    /// Returns the body and its permit.
    pub fn finish(self) -> (Bytes, Option<MemoryPermit>) {
        (self.bytes.into(), self.permit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_counted_until_its_permit_is_dropped() {
        let budget = BodyBudget::default();
        let free = || budget.0.free.available_permits() * BYTES_PER_PERMIT;
        let mut buffer = BodyBuffer::new(&budget);
        for _ in 0..1000 {
            assert!(buffer.try_add(&[b'x'; 10_000]));
        }
        let (bytes, mut permit) = buffer.finish();
        assert_eq!(bytes.len(), 10_000_000);
        let taken = MAX_TOTAL_BYTES - free();
        assert!((10_000_000..13_000_000).contains(&taken), "{taken}");
        shrink_permit(&mut permit, 2000);
        assert_eq!(MAX_TOTAL_BYTES - free(), 2048);
        drop(permit);
        assert_eq!(free(), MAX_TOTAL_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_buffer_waits_for_memory_until_its_deadline() {
        let budget = BodyBudget::default();
        let all = budget.try_reserve(MAX_TOTAL_BYTES + 1).unwrap();
        assert!(budget.try_reserve(1).is_none());
        let mut buffer = BodyBuffer::new(&budget);
        assert!(!buffer.try_add(b"x"));
        assert!(!buffer.add_before(b"x", Instant::now() + Duration::from_secs(1)).await);
        let freed = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            drop(all);
        };
        let deadline = Instant::now() + Duration::from_secs(2);
        let (added, ()) = tokio::join!(buffer.add_before(b"x", deadline), freed);
        assert!(added && buffer.length() == 1);
    }

    const MIB: usize = 1 << 20;

    /// Polls `future` once and returns its output if it is ready.
    async fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = std::future::ready(()) => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn small_requests_do_not_wait_for_a_large_one() {
        let budget = BodyBudget::default();
        let held = budget.try_reserve(MAX_TOTAL_BYTES - 40 * MIB).unwrap();
        let mut large = std::pin::pin!(budget.reserve(100 * MIB));
        assert!(poll_once(&mut large).await.is_none());
        let small: Vec<_> = (0..10).map(|_| budget.try_reserve(MAX_SMALL_REQUEST_BYTES)).collect();
        assert!(small.iter().all(Option::is_some));
        let mut waits = std::pin::pin!(budget.reserve(MAX_SMALL_REQUEST_BYTES));
        assert!(poll_once(&mut waits).await.is_some());
        // Small requests get a share of freed memory as well.
        drop(held);
        let held = large.await.unwrap();
        assert_eq!(held.permits.num_permits() * BYTES_PER_PERMIT, 100 * MIB);
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_request_is_served_while_small_ones_come_and_go() {
        let budget = BodyBudget::default();
        let mut held: Vec<_> = (0..25).map(|_| budget.try_reserve(10 * MIB).unwrap()).collect();
        let mut large = std::pin::pin!(budget.reserve(100 * MIB));
        let mut small = std::collections::VecDeque::new();
        let served = loop {
            if let Some(served) = poll_once(&mut large).await {
                break served;
            }
            drop(held.pop().expect("it is served before the others are gone"));
            // There is always a small request, and none is refused.
            small.push_back(budget.try_reserve(MAX_SMALL_REQUEST_BYTES).expect("its share"));
            if small.len() > 10 {
                small.pop_front();
            }
        };
        assert!(served.is_some() && held.len() > 5, "{}", held.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_request_that_gives_up_leaves_what_it_collected_to_the_next() {
        let budget = BodyBudget::default();
        let held = budget.try_reserve(MAX_TOTAL_BYTES - 100 * MIB).unwrap();
        let later = Instant::now() + Duration::from_secs(1);
        let (first, second) = (budget.reserve(150 * MIB), budget.reserve(90 * MIB));
        let (gave_up, served) = tokio::join!(timeout_at(later, first), second);
        assert!(gave_up.is_err());
        assert_eq!(served.unwrap().permits.num_permits() * BYTES_PER_PERMIT, 90 * MIB);
        assert_eq!(budget.0.free.available_permits() * BYTES_PER_PERMIT, 100 * MIB);
        drop(held);
        assert!(budget.reserve(MAX_TOTAL_BYTES).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_try_reserve_leaves_the_reserve_for_small_requests() {
        let budget = BodyBudget::default();
        let held = budget.try_reserve(MAX_TOTAL_BYTES - 40 * MIB).unwrap();
        let mut large = std::pin::pin!(budget.reserve(100 * MIB));
        assert!(poll_once(&mut large).await.is_none());
        assert!(budget.try_reserve(MAX_SMALL_REQUEST_BYTES + 1).is_none());
        assert!(budget.try_reserve(MAX_SMALL_REQUEST_BYTES).is_some());
        drop(held);
        assert!(large.await.is_some());
        assert!(budget.try_reserve(MAX_SMALL_REQUEST_BYTES + 1).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn the_largest_request_is_served_despite_overlapping_small_ones() {
        let budget = BodyBudget::default();
        let mut small = budget.try_reserve(MAX_SMALL_REQUEST_BYTES);
        let mut large = std::pin::pin!(budget.reserve(MAX_TOTAL_BYTES));
        for _ in 0..4 {
            assert!(poll_once(&mut large).await.is_none());
            let next = budget.try_reserve(MAX_SMALL_REQUEST_BYTES);
            assert!(next.is_some());
            small = next;
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        tokio::time::advance(RESERVE_DURATION).await;
        // From now on the large request takes all freed memory.
        assert!(poll_once(&mut large).await.is_none());
        assert!(budget.try_reserve(MAX_SMALL_REQUEST_BYTES).is_none());
        drop(small);
        assert!(large.await.is_some());
    }
}
