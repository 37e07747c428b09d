//! How many calls may be in flight, over all threads. Each thread holds a few free places of its own, so that most
//! calls touch no number that another thread writes; all of a thread's places come from, and go back to, one pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A thread takes at most one part in so many of all places at once, so that few lie idle while others lack them.
const SHARD_CHUNK_DIVISOR: usize = 64;

/// The process's limit.
#[derive(Debug)]
pub struct ConcurrencyLimit {
    max: usize,
    /// Places that no thread holds.
    free: AtomicUsize,
    caches: Vec<Arc<PermitCache>>,
}

/// One thread's part of the limit.
#[derive(Debug, Default)]
pub struct PermitCache {
    /// Places held and not in use.
    cached: AtomicUsize,
    /// Places in use.
    in_use: AtomicUsize,
}

impl ConcurrencyLimit {
    /// `max` calls, over `threads` threads.
    pub fn new(max: usize, threads: usize) -> Arc<Self> {
        let caches = (0..threads).map(|_| Arc::default()).collect();
        Arc::new(Self { max, free: AtomicUsize::new(max), caches })
    }

    /// The part of thread number `thread`.
    pub fn permit_cache(&self, thread: usize) -> Arc<PermitCache> {
        Arc::clone(&self.caches[thread % self.caches.len().max(1)])
    }

    /// A place for a call; `None` when all are taken.
    pub fn try_acquire(self: &Arc<Self>, cache: &Arc<PermitCache>) -> Option<Permit> {
        if !try_subtract(&cache.cached, 1) {
            let chunk = (1..=self.chunk()).rev().find(|n| try_subtract(&self.free, *n))?;
            cache.cached.fetch_add(chunk - 1, Relaxed);
        }
        cache.in_use.fetch_add(1, Relaxed);
        Some(Permit { limit: Arc::clone(self), cache: Arc::clone(cache) })
    }

    /// How many calls are in flight.
    pub fn in_flight(&self) -> usize {
        self.caches.iter().map(|cache| cache.in_use.load(Relaxed)).sum()
    }

    /// Whether a thread would have to refuse a call now.
    pub fn is_exhausted(&self) -> bool {
        self.free.load(Relaxed) == 0
            && self.caches.iter().any(|cache| cache.cached.load(Relaxed) == 0)
    }

    fn chunk(&self) -> usize {
        (self.max / (SHARD_CHUNK_DIVISOR * self.caches.len().max(1))).max(1)
    }
}

/// A call's place; free again when dropped.
#[derive(Debug)]
pub struct Permit {
    limit: Arc<ConcurrencyLimit>,
    cache: Arc<PermitCache>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.cache.in_use.fetch_sub(1, Relaxed);
        let cached = self.cache.cached.fetch_add(1, Relaxed) + 1;
        let chunk = self.limit.chunk();
        // Twice a chunk may stay, so that a steady load does not go to the pool for every call.
        if cached >= 2 * chunk - 1 && try_subtract(&self.cache.cached, chunk) {
            self.limit.free.fetch_add(chunk, Relaxed);
        }
    }
}

fn try_subtract(from: &AtomicUsize, count: usize) -> bool {
    from.try_update(Relaxed, Relaxed, |n| n.checked_sub(count)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_limit_is_exact() {
        let limit = ConcurrencyLimit::new(3, 2);
        let (a, b) = (limit.permit_cache(0), limit.permit_cache(1));
        let places: Vec<_> =
            [&a, &b, &a].into_iter().map(|cache| limit.try_acquire(cache).unwrap()).collect();
        assert!(limit.try_acquire(&a).is_none() && limit.try_acquire(&b).is_none());
        assert!(limit.is_exhausted());
        drop(places);
        assert_eq!(limit.in_flight(), 0);
        let places: Vec<_> = std::iter::from_fn(|| limit.try_acquire(&b)).collect();
        assert_eq!(places.len(), 3);
    }

    #[test]
    fn a_large_limit_can_be_used_up_by_one_thread_but_for_few() {
        let limit = ConcurrencyLimit::new(10_000, 2);
        let (a, b) = (limit.permit_cache(0), limit.permit_cache(1));
        drop(limit.try_acquire(&b));
        let places: Vec<_> = std::iter::from_fn(|| limit.try_acquire(&a)).collect();
        assert!(places.len() > 9_600 && places.len() <= 10_000, "{}", places.len());
        assert!(limit.is_exhausted());
        drop(places);
        assert_eq!(limit.in_flight(), 0);
    }
}
