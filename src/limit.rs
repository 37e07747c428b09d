//! How many calls may be in flight, over all threads. Each thread holds a few free places of its own, so that most
//! calls touch no number that another thread writes; all of a thread's places come from, and go back to, one pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A thread takes at most one part in so many of all places at once, so that few lie idle while others lack them.
const PARTS: usize = 64;

/// The process's limit.
#[derive(Debug)]
pub struct CallLimit {
    max: usize,
    /// Places that no thread holds.
    free: AtomicUsize,
    shares: Vec<Arc<Share>>,
}

/// One thread's part of the limit.
#[derive(Debug, Default)]
pub struct Share {
    /// Places held and not in use.
    spare: AtomicUsize,
    /// Places in use.
    used: AtomicUsize,
}

impl CallLimit {
    /// `max` calls, over `threads` threads.
    pub fn new(max: usize, threads: usize) -> Arc<Self> {
        let shares = (0..threads).map(|_| Arc::default()).collect();
        Arc::new(Self { max, free: AtomicUsize::new(max), shares })
    }

    /// The part of thread number `thread`.
    pub fn share(&self, thread: usize) -> Arc<Share> {
        Arc::clone(&self.shares[thread % self.shares.len().max(1)])
    }

    /// A place for a call; `None` when all are taken.
    pub fn enter(self: &Arc<Self>, share: &Arc<Share>) -> Option<Place> {
        if !take(&share.spare, 1) {
            let chunk = (1..=self.chunk()).rev().find(|n| take(&self.free, *n))?;
            share.spare.fetch_add(chunk - 1, Relaxed);
        }
        share.used.fetch_add(1, Relaxed);
        Some(Place { limit: Arc::clone(self), share: Arc::clone(share) })
    }

    /// How many calls are in flight.
    pub fn in_flight(&self) -> usize {
        self.shares.iter().map(|share| share.used.load(Relaxed)).sum()
    }

    /// Whether a thread would have to refuse a call now.
    pub fn is_exhausted(&self) -> bool {
        self.free.load(Relaxed) == 0
            && self.shares.iter().any(|share| share.spare.load(Relaxed) == 0)
    }

    fn chunk(&self) -> usize {
        (self.max / (PARTS * self.shares.len().max(1))).max(1)
    }
}

/// A call's place; free again when dropped.
#[derive(Debug)]
pub struct Place {
    limit: Arc<CallLimit>,
    share: Arc<Share>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.share.used.fetch_sub(1, Relaxed);
        let spare = self.share.spare.fetch_add(1, Relaxed) + 1;
        let chunk = self.limit.chunk();
        // Twice a chunk may stay, so that a steady load does not go to the pool for every call.
        if spare >= 2 * chunk - 1 && take(&self.share.spare, chunk) {
            self.limit.free.fetch_add(chunk, Relaxed);
        }
    }
}

fn take(from: &AtomicUsize, count: usize) -> bool {
    from.try_update(Relaxed, Relaxed, |n| n.checked_sub(count)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_limit_is_exact() {
        let limit = CallLimit::new(3, 2);
        let (a, b) = (limit.share(0), limit.share(1));
        let places: Vec<_> =
            [&a, &b, &a].into_iter().map(|share| limit.enter(share).unwrap()).collect();
        assert!(limit.enter(&a).is_none() && limit.enter(&b).is_none());
        assert!(limit.is_exhausted());
        drop(places);
        assert_eq!(limit.in_flight(), 0);
        let places: Vec<_> = std::iter::from_fn(|| limit.enter(&b)).collect();
        assert_eq!(places.len(), 3);
    }

    #[test]
    fn a_large_limit_can_be_used_up_by_one_thread_but_for_few() {
        let limit = CallLimit::new(10_000, 2);
        let (a, b) = (limit.share(0), limit.share(1));
        drop(limit.enter(&b));
        let places: Vec<_> = std::iter::from_fn(|| limit.enter(&a)).collect();
        assert!(places.len() > 9_600 && places.len() <= 10_000, "{}", places.len());
        assert!(limit.is_exhausted());
        drop(places);
        assert_eq!(limit.in_flight(), 0);
    }
}
