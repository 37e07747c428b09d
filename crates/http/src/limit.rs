//! The limit of concurrent calls, over all threads. Each thread caches a few permits, so that most calls modify no
//! counter that another thread writes. The permits of all threads come from, and return to, one pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A thread takes permits from the pool in chunks of `max / (divisor * threads)`, so that few are idle while other
/// threads need them.
const SHARD_CHUNK_DIVISOR: usize = 64;

/// The limit of one process.
#[derive(Debug)]
pub struct ConcurrencyLimit {
    max: usize,
    /// Permits in the pool.
    free: AtomicUsize,
    caches: Vec<Arc<PermitCache>>,
}

/// The permits of one thread.
#[derive(Debug, Default)]
pub struct PermitCache {
    /// Cached permits.
    cached: AtomicUsize,
    /// Permits held by calls.
    in_use: AtomicUsize,
}

impl ConcurrencyLimit {
    /// A limit of `max` concurrent calls for `threads` threads.
    pub fn new(max: usize, threads: usize) -> Arc<Self> {
        let caches = (0..threads).map(|_| Arc::default()).collect();
        Arc::new(Self { max, free: AtomicUsize::new(max), caches })
    }

    /// The permit cache of thread number `thread`.
    pub fn permit_cache(&self, thread: usize) -> Arc<PermitCache> {
        Arc::clone(&self.caches[thread % self.caches.len().max(1)])
    }

    /// Acquires a permit for one call, or returns `None` if none is available to this thread.
    pub fn try_acquire(self: &Arc<Self>, cache: &Arc<PermitCache>) -> Option<Permit> {
        if !try_subtract(&cache.cached, 1) {
            let chunk = (1..=self.chunk()).rev().find(|n| try_subtract(&self.free, *n))?;
            cache.cached.fetch_add(chunk - 1, Relaxed);
        }
        cache.in_use.fetch_add(1, Relaxed);
        Some(Permit { limit: Arc::clone(self), cache: Arc::clone(cache) })
    }

    /// Number of calls in flight.
    pub fn in_flight(&self) -> usize {
        self.caches.iter().map(|cache| cache.in_use.load(Relaxed)).sum()
    }

    /// Returns whether some thread would refuse a call now.
    pub fn is_exhausted(&self) -> bool {
        self.free.load(Relaxed) == 0
            && self.caches.iter().any(|cache| cache.cached.load(Relaxed) == 0)
    }

    fn chunk(&self) -> usize {
        (self.max / (SHARD_CHUNK_DIVISOR * self.caches.len().max(1))).max(1)
    }
}

/// A permit for one call in flight, released when dropped.
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
        // Up to two chunks stay cached, so that a steady load does not use the pool for every call.
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
        let permits: Vec<_> =
            [&a, &b, &a].into_iter().map(|cache| limit.try_acquire(cache).unwrap()).collect();
        assert!(limit.try_acquire(&a).is_none() && limit.try_acquire(&b).is_none());
        assert!(limit.is_exhausted());
        drop(permits);
        assert_eq!(limit.in_flight(), 0);
        let permits: Vec<_> = std::iter::from_fn(|| limit.try_acquire(&b)).collect();
        assert_eq!(permits.len(), 3);
    }

    #[test]
    fn one_thread_can_use_almost_all_of_a_large_limit() {
        let limit = ConcurrencyLimit::new(10_000, 2);
        let (a, b) = (limit.permit_cache(0), limit.permit_cache(1));
        drop(limit.try_acquire(&b));
        let permits: Vec<_> = std::iter::from_fn(|| limit.try_acquire(&a)).collect();
        assert!(permits.len() > 9_600 && permits.len() <= 10_000, "{}", permits.len());
        assert!(limit.is_exhausted());
        drop(permits);
        assert_eq!(limit.in_flight(), 0);
    }
}
