//! The memory that the bodies of queued calls take: of requests that are being enqueued, of calls that a worker holds, of
//! their responses until they are stored and reported. All share one budget.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::config::MAX_BODY;
use crate::queue::Room;

/// The unit in which it is counted.
const UNIT: usize = 1024;
/// All bodies together.
pub const LIMIT: usize = MAX_BODY;
/// A worker takes no call while less than this is free.
const LEAST: usize = 64 << 10;
/// A buffer grows by at most this, or a quarter of its length, more than is needed now.
const PIECE: usize = 256 << 10;

/// The budget. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BodyBudget(Arc<Semaphore>);

impl Default for BodyBudget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LIMIT / UNIT)))
    }
}

impl BodyBudget {
    fn units(bytes: usize) -> u32 {
        // What is larger than all there is gets all there is.
        u32::try_from(bytes.min(LIMIT).div_ceil(UNIT)).unwrap_or(u32::MAX)
    }

    /// Room for `bytes`, if there is as much.
    pub fn try_reserve(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0).try_acquire_many_owned(Self::units(bytes)).ok()
    }

    /// Waits for room for `bytes`. Cancel-safe.
    pub async fn reserve(&self, bytes: usize) -> Room {
        // The semaphore is never closed.
        Arc::clone(&self.0).acquire_many_owned(Self::units(bytes)).await.ok()
    }

    /// Waits until another call may be taken. Cancel-safe.
    pub async fn until_some_is_free(&self) {
        drop(self.reserve(LEAST).await);
    }
}

/// Gives back what `room` has beyond `bytes`.
pub fn shrink(room: &mut Room, bytes: usize) {
    let Some(permit) = room else { return };
    let kept = BodyBudget::units(bytes) as usize;
    drop(permit.split(permit.num_permits().saturating_sub(kept)));
}

/// A body that is being read, and its room.
pub struct BodyBuffer<'a> {
    budget: &'a BodyBudget,
    bytes: Vec<u8>,
    room: Room,
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
    pub async fn add_by(&mut self, data: &[u8], deadline: Instant) -> bool {
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
    pub async fn expect(&mut self, length: usize, deadline: Instant) {
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

    fn grow(&mut self, more: OwnedSemaphorePermit, by: usize) {
        let capacity = self.bytes.capacity() + by;
        self.bytes.reserve_exact(capacity - self.bytes.len());
        match &mut self.room {
            Some(room) => room.merge(more),
            None => self.room = Some(more),
        }
    }

    /// What was read. It has its room until that is dropped.
    pub fn finish(self) -> (Bytes, Room) {
        (self.bytes.into(), self.room)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_read_is_counted_until_its_room_is_dropped() {
        let budget = BodyBudget::default();
        let free = || budget.0.available_permits() * UNIT;
        let mut buffer = BodyBuffer::new(&budget);
        for _ in 0..1000 {
            assert!(buffer.try_add(&[b'x'; 10_000]));
        }
        let (bytes, mut room) = buffer.finish();
        assert_eq!(bytes.len(), 10_000_000);
        let taken = LIMIT - free();
        assert!((10_000_000..13_000_000).contains(&taken), "{taken}");
        shrink(&mut room, 2000);
        assert_eq!(LIMIT - free(), 2048);
        drop(room);
        assert_eq!(free(), LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_room_waits_for_a_while() {
        let budget = BodyBudget::default();
        let all = budget.try_reserve(LIMIT + 1).unwrap();
        assert!(budget.try_reserve(1).is_none());
        let mut buffer = BodyBuffer::new(&budget);
        assert!(!buffer.try_add(b"x"));
        assert!(!buffer.add_by(b"x", Instant::now() + Duration::from_secs(1)).await);
        let freed = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            drop(all);
        };
        let deadline = Instant::now() + Duration::from_secs(2);
        let (added, ()) = tokio::join!(buffer.add_by(b"x", deadline), freed);
        assert!(added && buffer.length() == 1);
    }
}
