//! The memory that the bodies of queued calls take: of requests that are being enqueued, of calls that a worker holds, of
//! their responses until they are stored and reported. All share one budget.
//!
//! Large requests wait in a line of their own. The first of them collects free memory, and leaves a share for small ones:
//! these do not wait until there is room for it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::config::MAX_ASYNC_BODY_BYTES;

/// The unit in which it is counted.
const UNIT: usize = 1024;
/// All bodies together.
pub const MAX_TOTAL_BYTES: usize = MAX_ASYNC_BODY_BYTES;
/// A worker takes no call while less than this is free.
const LEAST: usize = 64 << 10;
/// A buffer grows by at most this, or a quarter of its length, more than is needed now.
const PIECE: usize = 256 << 10;

/// A large request that waits leaves this much free.
const SHARE: usize = MAX_TOTAL_BYTES / 8;
/// It does so for this time, and then takes all free memory. Otherwise small ones could keep it waiting for ever.
const SHARES_FOR: Duration = Duration::from_secs(5);
/// Requests above this size are large.
const SMALL: usize = SHARE / 16;

/// The budget. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BodyBudget(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    free: Arc<Semaphore>,
    /// One permit: its holder is the first of the large requests that wait.
    first: Semaphore,
    freed: Freed,
}

/// Tells the first of the large requests that wait, when it is dropped, that there may be more room.
#[derive(Clone, Debug, Default)]
struct Freed(Arc<Notify>);

impl Drop for Freed {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// A part of the budget, until it is dropped.
#[derive(Debug)]
pub struct MemoryPermit {
    // Dropped in this order: there is more room once the permits are back.
    permits: OwnedSemaphorePermit,
    freed: Freed,
}

impl MemoryPermit {
    /// Adds `other` to this.
    pub fn merge(&mut self, other: Self) {
        self.permits.merge(other.permits);
    }

    /// Gives back all but `units`.
    fn keep(&mut self, units: usize) {
        let excess = self.permits.num_permits().saturating_sub(units);
        if excess > 0 {
            drop(self.permits.split(excess));
            self.freed.0.notify_one();
        }
    }
}

impl Default for BodyBudget {
    fn default() -> Self {
        let free = Arc::new(Semaphore::new(MAX_TOTAL_BYTES / UNIT));
        Self(Arc::new(Budget { free, first: Semaphore::new(1), freed: Freed::default() }))
    }
}

impl BodyBudget {
    fn units(bytes: usize) -> u32 {
        // What is larger than all there is gets all there is.
        u32::try_from(bytes.min(MAX_TOTAL_BYTES).div_ceil(UNIT)).unwrap_or(u32::MAX)
    }

    fn reservation(&self, permits: OwnedSemaphorePermit) -> MemoryPermit {
        MemoryPermit { permits, freed: self.0.freed.clone() }
    }

    fn try_units(&self, units: u32) -> Option<MemoryPermit> {
        let permits = Arc::clone(&self.0.free).try_acquire_many_owned(units);
        permits.ok().map(|permits| self.reservation(permits))
    }

    /// Room for `bytes`, if there is as much.
    pub fn try_reserve(&self, bytes: usize) -> Option<MemoryPermit> {
        let units = Self::units(bytes);
        // A large request must not overtake those that wait, nor use the share of the small ones.
        let is_line = bytes > SMALL && self.0.first.available_permits() == 0;
        if is_line && self.0.free.available_permits() < units as usize + SHARE / UNIT {
            return None;
        }
        self.try_units(units)
    }

    /// Waits for room for `bytes`. Cancel-safe.
    pub async fn reserve(&self, bytes: usize) -> Option<MemoryPermit> {
        let units = Self::units(bytes);
        if bytes > SMALL {
            return self.collect(units).await;
        }
        // Dropped behind the permits if this is cancelled when it has been given them.
        let freed = self.0.freed.clone();
        // The semaphores are never closed.
        let permits = Arc::clone(&self.0.free).acquire_many_owned(units).await.ok()?;
        Some(MemoryPermit { permits, freed })
    }

    /// Waits for `units` behind the large requests that came before.
    async fn collect(&self, units: u32) -> Option<MemoryPermit> {
        let _first = self.0.first.acquire().await.ok()?;
        let mut collected = self.try_units(0)?;
        let shares_until = Instant::now() + SHARES_FOR;
        loop {
            let missing = (units as usize).saturating_sub(collected.permits.num_permits());
            if missing == 0 {
                return Some(collected);
            }
            let free = self.0.free.available_permits();
            let shares = Instant::now() < shares_until;
            let share = if shares { SHARE / UNIT } else { 0 };
            let takes = if free >= missing { missing } else { free.saturating_sub(share) };
            if takes == 0 {
                // What was freed since then has left its notification.
                let freed = self.0.freed.0.notified();
                if shares {
                    let _ = timeout_at(shares_until, freed).await;
                } else {
                    freed.await;
                }
                continue;
            }
            // Another may have taken it by now; then there is less.
            if let Some(more) = self.try_units(u32::try_from(takes).unwrap_or(u32::MAX)) {
                collected.merge(more);
            }
        }
    }

    /// Waits until another call may be taken. Cancel-safe.
    pub async fn wait_until_available(&self) {
        drop(self.reserve(LEAST).await);
    }
}

/// Gives back what `room` has beyond `bytes`.
pub fn shrink_permit(room: &mut Option<MemoryPermit>, bytes: usize) {
    if let Some(reservation) = room {
        reservation.keep(BodyBudget::units(bytes) as usize);
    }
}

/// A body that is being read, and its room.
pub struct BodyBuffer<'a> {
    budget: &'a BodyBudget,
    bytes: Vec<u8>,
    room: Option<MemoryPermit>,
}

impl<'a> BodyBuffer<'a> {
    pub fn new(budget: &'a BodyBudget) -> Self {
        Self { budget, bytes: Vec::new(), room: None }
    }

    pub fn length(&self) -> usize {
        self.bytes.len()
    }

    /// Adds `data`; `false` if there is no room for it.
    pub fn try_add(&mut self, data: &[u8]) -> bool {
        if let Some(needed) = self.growth(data) {
            // The more there is, the more is likely to come. What is only announced gets no room.
            let length = self.bytes.len();
            let ahead = needed.max(length.min(PIECE.max(length / 4)));
            let reserve = |growth| Some((self.budget.try_reserve(growth)?, growth));
            let Some((more, growth)) = reserve(ahead).or_else(|| reserve(needed)) else {
                return false;
            };
            self.grow(more, growth);
        }
        self.bytes.extend_from_slice(data);
        true
    }

    /// Adds `data` as soon as there is room for it; `false` if there is none by `deadline`.
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

    /// Waits until there is room for `length` bytes, which are about to come. If there is none by `deadline`, they get
    /// what there is when they come.
    pub async fn reserve_expected(&mut self, length: usize, deadline: Instant) {
        let growth = length.saturating_sub(self.bytes.capacity());
        if growth > 0
            && let Ok(Some(more)) = timeout_at(deadline, self.budget.reserve(growth)).await
        {
            self.grow(more, growth);
        }
    }

    /// By how much the buffer must grow to take `data`, if at all.
    fn growth(&self, data: &[u8]) -> Option<usize> {
        let (needs, has) = (self.bytes.len() + data.len(), self.bytes.capacity());
        needs.checked_sub(has).filter(|growth| *growth > 0)
    }

    fn grow(&mut self, more: MemoryPermit, by: usize) {
        let capacity = self.bytes.capacity() + by;
        self.bytes.reserve_exact(capacity - self.bytes.len());
        match &mut self.room {
            Some(room) => room.merge(more),
            None => self.room = Some(more),
        }
    }

    /// What was read. It has its room until that is dropped.
    pub fn finish(self) -> (Bytes, Option<MemoryPermit>) {
        (self.bytes.into(), self.room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_counted_until_its_room_is_dropped() {
        let budget = BodyBudget::default();
        let free = || budget.0.free.available_permits() * UNIT;
        let mut buffer = BodyBuffer::new(&budget);
        for _ in 0..1000 {
            assert!(buffer.try_add(&[b'x'; 10_000]));
        }
        let (bytes, mut room) = buffer.finish();
        assert_eq!(bytes.len(), 10_000_000);
        let taken = MAX_TOTAL_BYTES - free();
        assert!((10_000_000..13_000_000).contains(&taken), "{taken}");
        shrink_permit(&mut room, 2000);
        assert_eq!(MAX_TOTAL_BYTES - free(), 2048);
        drop(room);
        assert_eq!(free(), MAX_TOTAL_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_room_waits_for_a_while() {
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

    /// Polls `future` until it waits; what it returned, if it did.
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
        let small: Vec<_> = (0..10).map(|_| budget.try_reserve(SMALL)).collect();
        assert!(small.iter().all(Option::is_some));
        let mut waits = std::pin::pin!(budget.reserve(SMALL));
        assert!(poll_once(&mut waits).await.is_some());
        // Small ones have a share of freed memory, too.
        drop(held);
        let held = large.await.unwrap();
        assert_eq!(held.permits.num_permits() * UNIT, 100 * MIB);
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
            // There are always some of them, and none is refused.
            small.push_back(budget.try_reserve(SMALL).expect("its share"));
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
        assert_eq!(served.unwrap().permits.num_permits() * UNIT, 90 * MIB);
        assert_eq!(budget.0.free.available_permits() * UNIT, 100 * MIB);
        drop(held);
        assert!(budget.reserve(MAX_TOTAL_BYTES).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_request_that_does_not_wait_leaves_the_share_of_small_ones() {
        let budget = BodyBudget::default();
        let held = budget.try_reserve(MAX_TOTAL_BYTES - 40 * MIB).unwrap();
        let mut large = std::pin::pin!(budget.reserve(100 * MIB));
        assert!(poll_once(&mut large).await.is_none());
        assert!(budget.try_reserve(SMALL + 1).is_none());
        assert!(budget.try_reserve(SMALL).is_some());
        drop(held);
        assert!(large.await.is_some());
        assert!(budget.try_reserve(SMALL + 1).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn the_largest_request_is_served_though_small_ones_overlap() {
        let budget = BodyBudget::default();
        let mut small = budget.try_reserve(SMALL);
        let mut large = std::pin::pin!(budget.reserve(MAX_TOTAL_BYTES));
        for _ in 0..4 {
            assert!(poll_once(&mut large).await.is_none());
            let next = budget.try_reserve(SMALL);
            assert!(next.is_some());
            small = next;
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        tokio::time::advance(SHARES_FOR).await;
        // From now on it takes all freed memory.
        assert!(poll_once(&mut large).await.is_none());
        assert!(budget.try_reserve(SMALL).is_none());
        drop(small);
        assert!(large.await.is_some());
    }
}
