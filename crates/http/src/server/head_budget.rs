//! A memory budget for all incomplete request heads of the process.
//!
//! Each head has a limit of its own, but many connections with a large head could exhaust the memory. Heads received
//! in one read, which are nearly all, are not charged.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};

use crate::deadlines::Signal;
use crate::server::connection_shard::{ConnectionKey, Shard};
use gateway_base::sync::lock_unpoisoned;

/// The budget of the process.
#[derive(Debug)]
pub struct HeadBudget {
    limit: usize,
    used: AtomicUsize,
    /// Bytes of heads that have been refused and not yet released.
    being_refused: AtomicUsize,
    /// The connections of all threads. Rank 3: each shard is locked under it, one at a time.
    shards: Mutex<Vec<Weak<Shard>>>,
}

impl Default for HeadBudget {
    /// The budget of ports without a setting: 64 MiB.
    fn default() -> Self {
        Self::new(64 << 20)
    }
}

impl HeadBudget {
    /// Limits incomplete heads to `limit` bytes together.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            used: AtomicUsize::new(0),
            being_refused: AtomicUsize::new(0),
            shards: Mutex::default(),
        }
    }

    pub(super) fn add_shard(&self, shard: &Arc<Shard>) {
        let mut shards = lock_unpoisoned(&self.shards);
        shards.retain(|shard| shard.strong_count() > 0);
        shards.push(Arc::downgrade(shard));
    }

    /// Records that the incomplete head of a connection has `size` bytes now. If the budget is exceeded, refuses the
    /// largest heads until the others are within it. Returns whether this head may grow.
    pub(super) fn charge(&self, connection: &ConnectionKey, size: usize) -> bool {
        {
            let mut connections = connection.shard.connections();
            let Some(entry) = connections.open.get_mut(&connection.key) else { return true };
            if entry.head_refused {
                return false;
            }
            self.used.fetch_add(size.saturating_sub(entry.head_bytes), Relaxed);
            entry.head_bytes = entry.head_bytes.max(size);
        }
        if !self.is_exceeded() {
            return true;
        }
        self.refuse_largest();
        let connections = connection.shard.connections();
        connections.open.get(&connection.key).is_none_or(|entry| !entry.head_refused)
    }

    /// Records that the head of a connection is complete, or that the connection ends.
    pub(super) fn release(&self, connection: &ConnectionKey) {
        let mut connections = connection.shard.connections();
        let Some(entry) = connections.open.get_mut(&connection.key) else { return };
        let head = std::mem::take(&mut entry.head_bytes);
        self.used.fetch_sub(head, Relaxed);
        if std::mem::take(&mut entry.head_refused) {
            self.being_refused.fetch_sub(head, Relaxed);
            // The signal is set under the same lock. It must not refuse the next head of this connection.
            entry.deadlines.take_signal(Signal::RefuseHead);
        }
    }

    fn is_exceeded(&self) -> bool {
        self.used.load(Relaxed).saturating_sub(self.being_refused.load(Relaxed)) > self.limit
    }

    /// Refuses heads, the largest first, until the others are within the budget.
    fn refuse_largest(&self) {
        // One thread at a time: two would refuse too many heads.
        let shards = lock_unpoisoned(&self.shards);
        while self.is_exceeded() {
            let mut largest: Option<(usize, Arc<Shard>, u64)> = None;
            for shard in shards.iter().filter_map(Weak::upgrade) {
                let found = {
                    let connections = shard.connections();
                    let heads = connections.open.iter().filter(|(_, entry)| !entry.head_refused);
                    heads.map(|(key, entry)| (entry.head_bytes, *key)).max()
                };
                let Some((head, key)) = found else { continue };
                if head > largest.as_ref().map_or(0, |(size, ..)| *size) {
                    largest = Some((head, shard, key));
                }
            }
            let Some((_, shard, key)) = largest else { return };
            let mut connections = shard.connections();
            // The head may be complete by now. Then the next iteration finds another.
            if let Some(entry) = connections.open.get_mut(&key)
                && entry.head_bytes > 0
            {
                entry.head_refused = true;
                self.being_refused.fetch_add(entry.head_bytes, Relaxed);
                entry.signal(Signal::RefuseHead);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deadlines::ConnectionDeadlines;
    use crate::server::registry::{ConnectionRegistry, RegistrationGuard, register};

    #[test]
    fn a_completed_head_clears_its_refusal() {
        let (registry, heads) = (ConnectionRegistry::default(), Arc::new(HeadBudget::new(100)));
        let shard = registry.add_shard(&heads);
        let deadlines = [(); 2].map(|()| Arc::new(ConnectionDeadlines::new()));
        let registrations = deadlines
            .each_ref()
            .map(|deadlines| RegistrationGuard(register(&shard, deadlines, &heads)));
        assert!(heads.charge(&registrations[0].0.connection, 60));
        assert!(heads.charge(&registrations[1].0.connection, 50));
        assert!(deadlines[0].has_signal(Signal::RefuseHead));
        heads.release(&registrations[0].0.connection);
        assert!(!deadlines[0].has_signal(Signal::RefuseHead), "the next head would be refused");
        // The next head is refused only for its own size.
        assert!(heads.charge(&registrations[0].0.connection, 50));
        assert!(
            !heads.charge(&registrations[0].0.connection, 51)
                && deadlines[0].has_signal(Signal::RefuseHead)
        );
    }

    #[test]
    fn the_largest_heads_are_refused_until_the_rest_is_within_the_budget() {
        let (registry, heads) = (ConnectionRegistry::default(), Arc::new(HeadBudget::new(100)));
        let shards = [registry.add_shard(&heads), registry.add_shard(&heads)];
        let deadlines: Vec<_> = (0..4).map(|_| Arc::new(ConnectionDeadlines::new())).collect();
        let mut registrations: Vec<_> = (0..4)
            .map(|number| {
                RegistrationGuard(register(&shards[number % 2], &deadlines[number], &heads))
            })
            .collect();
        let refused = || {
            (0..4).filter(|n| deadlines[*n].take_signal(Signal::RefuseHead)).collect::<Vec<usize>>()
        };
        assert!(heads.charge(&registrations[0].0.connection, 40));
        assert!(heads.charge(&registrations[1].0.connection, 50));
        assert!(heads.charge(&registrations[2].0.connection, 10));
        assert_eq!(refused(), [0; 0]);
        // A larger head is refused instead of this one.
        assert!(heads.charge(&registrations[3].0.connection, 5));
        assert_eq!(refused(), [1]);
        // A refused head does not count, even before it is released.
        assert!(heads.charge(&registrations[2].0.connection, 40));
        assert!(!heads.charge(&registrations[1].0.connection, 60), "it has been refused");
        // The growing head is the largest.
        assert!(!heads.charge(&registrations[3].0.connection, 80));
        assert_eq!(refused(), [3]);
        registrations.truncate(1);
        assert!(heads.charge(&registrations[0].0.connection, 100));
        heads.release(&registrations[0].0.connection);
        assert_eq!((heads.used.load(Relaxed), heads.being_refused.load(Relaxed)), (0, 0));
        drop(registrations);
        assert_eq!((heads.used.load(Relaxed), heads.being_refused.load(Relaxed)), (0, 0));
    }
}
