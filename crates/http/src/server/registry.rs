//! The registry of open connections of a port, from which idle connections are evicted when there is no permit left.
//!
//! Nothing is stored here while a connection is used: its [`ConnectionDeadlines`] contain its state. Only an eviction inspects
//! all connections. It keeps those that have been idle longest as candidates for the next evictions.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::deadlines::{ConnectionDeadlines, ConnectionState, Signal};
use crate::server::connection_shard::{ConnectionKey, Entry, Shard};
use crate::server::head_budget::HeadBudget;
use gateway_base::sync::lock_unpoisoned;

/// A connection that has been idle for less is not evicted, because its next request may be in transit.
const IDLE_GRACE: Duration = Duration::from_secs(1);
/// A connection that has waited for the rest of a head for less is not evicted.
pub(super) const HEAD_GRACE: Duration = Duration::from_secs(5);
/// Maximum number of candidates kept for later evictions.
const MAX_CANDIDATES: usize = 256;

/// The connections of one port, on all threads.
#[derive(Debug, Default)]
pub(super) struct ConnectionRegistry {
    /// The connections of each thread. Rank 3: `candidates` may be held. Each shard is locked under it, one at a time.
    shards: Mutex<Vec<Arc<Shard>>>,
    /// The connections that had been idle longest at the last inspection, the oldest last. Rank 2: acquired first, and
    /// held during an eviction.
    candidates: Mutex<Vec<EvictionCandidate>>,
}

#[derive(Debug)]
struct EvictionCandidate {
    shard: Arc<Shard>,
    key: u64,
    since: Instant,
}

/// An eviction in progress.
#[derive(Debug)]
pub(super) struct Eviction {
    shard: Arc<Shard>,
    key: u64,
    signalled_at: Instant,
}

impl Eviction {
    /// Time for the task of a connection to handle the signal, on a busy machine.
    const TIMEOUT: Duration = Duration::from_secs(1);

    /// Returns whether the connection is still open and expected to close. A connection with a new request removes the
    /// signal.
    pub(super) fn is_pending(&self) -> bool {
        let is_evicted = |entry: &Entry| entry.deadlines.has_signal(Signal::Evict);
        self.signalled_at.elapsed() < Self::TIMEOUT
            && self.shard.connections().open.get(&self.key).is_some_and(is_evicted)
    }
}

/// Returns the state of an evictable connection, and since when it waits; `None` if it must not be evicted.
pub(super) fn evictable_since(
    deadlines: &ConnectionDeadlines,
    now: Instant,
) -> Option<(ConnectionState, Instant)> {
    let (state, since) = deadlines.waiting_since()?;
    let grace = if state == ConnectionState::Idle { IDLE_GRACE } else { HEAD_GRACE };
    (now.saturating_duration_since(since) >= grace).then_some((state, since))
}

impl ConnectionRegistry {
    /// Adds a shard for the connections of a thread.
    pub(super) fn add_shard(&self, head_budget: &HeadBudget) -> Arc<Shard> {
        let shard = Arc::<Shard>::default();
        head_budget.add_shard(&shard);
        lock_unpoisoned(&self.shards).push(Arc::clone(&shard));
        shard
    }

    /// Evicts the connection that has been idle longest, or without one, the connection that has waited longest for the
    /// rest of a head. The connection closes when its task is polled next.
    pub(super) fn evict_one(&self) -> Option<Eviction> {
        let mut candidates = lock_unpoisoned(&self.candidates);
        for refreshed in [false, true] {
            if refreshed {
                *candidates = self.find_candidates(Instant::now());
            }
            while let Some(candidate) = candidates.pop() {
                if candidate.evict() {
                    let EvictionCandidate { shard, key, .. } = candidate;
                    return Some(Eviction { shard, key, signalled_at: Instant::now() });
                }
            }
        }
        None
    }

    fn find_candidates(&self, now: Instant) -> Vec<EvictionCandidate> {
        let (mut idle, mut reading_heads) = (Vec::new(), Vec::new());
        for shard in lock_unpoisoned(&self.shards).iter() {
            for (key, entry) in &shard.connections().open {
                let Some((state, since)) = evictable_since(&entry.deadlines, now) else { continue };
                let found =
                    if state == ConnectionState::Idle { &mut idle } else { &mut reading_heads };
                found.push(EvictionCandidate { shard: Arc::clone(shard), key: *key, since });
            }
        }
        let mut found = if idle.is_empty() { reading_heads } else { idle };
        if found.len() > MAX_CANDIDATES {
            found.select_nth_unstable_by_key(MAX_CANDIDATES, |candidate| candidate.since);
            found.truncate(MAX_CANDIDATES);
        }
        found.sort_unstable_by_key(|candidate| std::cmp::Reverse(candidate.since));
        found
    }
}

impl EvictionCandidate {
    /// Evicts the connection if its state has not changed since. Returns whether it was evicted.
    fn evict(&self) -> bool {
        let connections = self.shard.connections();
        let Some(entry) = connections.open.get(&self.key) else { return false };
        let waits = entry.deadlines.waiting_since().is_some_and(|(_, since)| since == self.since);
        if waits {
            entry.signal(Signal::Evict);
        }
        waits
    }
}

/// Registers a connection that has been accepted.
pub(super) fn register(
    shard: &Arc<Shard>,
    deadlines: &Arc<ConnectionDeadlines>,
    head_budget: &Arc<HeadBudget>,
) -> Arc<Registration> {
    let connection = shard.insert(deadlines);
    Arc::new(Registration { connection, head_budget: Arc::clone(head_budget) })
}

/// A registered connection, and the budget to which its head is charged.
#[derive(Debug)]
pub(super) struct Registration {
    pub(super) connection: ConnectionKey,
    head_budget: Arc<HeadBudget>,
}

impl Registration {
    /// Charges the incomplete head of the connection; see [`HeadBudget::charge`].
    pub(super) fn charge_head(&self, size: usize) -> bool {
        self.head_budget.charge(&self.connection, size)
    }

    /// Releases the head of the connection; see [`HeadBudget::release`].
    pub(super) fn release_head(&self) {
        self.head_budget.release(&self.connection);
    }
}

/// Removes the connection from the registry on drop.
#[derive(Debug)]
pub(super) struct RegistrationGuard(pub(super) Arc<Registration>);

impl Drop for RegistrationGuard {
    fn drop(&mut self) {
        self.0.release_head();
        let ConnectionKey { shard, key } = &self.0.connection;
        shard.connections().open.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle_deadlines(idle_for: Duration) -> Arc<ConnectionDeadlines> {
        let deadlines =
            Arc::new(ConnectionDeadlines::with_base(Instant::now() - Duration::from_secs(3600)));
        deadlines.on_exchange_finished(Instant::now() - idle_for, Duration::from_secs(7200));
        deadlines
    }

    fn is_signalled(deadlines: &ConnectionDeadlines) -> bool {
        deadlines.take_signal(Signal::Evict)
    }

    #[test]
    fn the_longest_idle_connection_of_all_threads_is_evicted() {
        let (registry, heads) = (ConnectionRegistry::default(), Arc::new(HeadBudget::new(1 << 20)));
        let shards = [registry.add_shard(&heads), registry.add_shard(&heads)];
        let ages = [30, 60, 10, 40].map(Duration::from_secs);
        let deadlines = ages.map(idle_deadlines);
        let registrations: Vec<_> = (0..4)
            .map(|number| {
                RegistrationGuard(register(&shards[number % 2], &deadlines[number], &heads))
            })
            .collect();
        for expect in [1, 3, 0, 2] {
            registry.evict_one();
            let evicted: Vec<_> =
                (0..4).filter(|number| is_signalled(&deadlines[*number])).collect();
            assert_eq!(evicted, [expect]);
            // As the task of the connection does.
            deadlines[expect].on_exchange_started();
        }
        registry.evict_one();
        assert!(
            !deadlines.iter().any(|deadlines| is_signalled(deadlines)),
            "a connection in use was evicted"
        );
        drop(registrations);
        assert!(shards.iter().all(|shard| shard.connections().open.is_empty()));
    }

    #[test]
    fn a_candidate_that_is_used_since_is_not_evicted() {
        let (registry, heads) = (ConnectionRegistry::default(), Arc::new(HeadBudget::new(1 << 20)));
        let shard = registry.add_shard(&heads);
        let deadlines = [60, 50, 40].map(|seconds| idle_deadlines(Duration::from_secs(seconds)));
        let registrations = deadlines
            .each_ref()
            .map(|deadlines| RegistrationGuard(register(&shard, deadlines, &heads)));
        registry.evict_one();
        assert!(is_signalled(&deadlines[0]));
        deadlines[1].on_exchange_started();
        registry.evict_one();
        assert_eq!(
            deadlines.each_ref().map(|deadlines| is_signalled(deadlines)),
            [false, false, true]
        );
        drop(registrations);
    }

    #[test]
    fn a_slow_head_is_evicted_when_no_connection_is_idle_for_long() {
        let (registry, heads) = (ConnectionRegistry::default(), Arc::new(HeadBudget::new(1 << 20)));
        let shard = registry.add_shard(&heads);
        let young = idle_deadlines(Duration::from_millis(10));
        let head =
            Arc::new(ConnectionDeadlines::with_base(Instant::now() - Duration::from_secs(3600)));
        head.on_head_started_at(Instant::now() - 2 * HEAD_GRACE, Duration::from_secs(60));
        let registrations =
            [&young, &head].map(|deadlines| RegistrationGuard(register(&shard, deadlines, &heads)));
        registry.evict_one();
        assert!(!is_signalled(&young) && is_signalled(&head));
        drop(registrations);
    }
}
