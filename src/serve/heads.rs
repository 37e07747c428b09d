//! One budget for all request heads that have not come whole.
//!
//! Each is bounded by itself, too, but many connections with a large one would use up the memory. Heads that come in one
//! read are not counted, which is nearly all of them.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::serve::register::{Seat, Shard};
use crate::watch::Note;

/// The budget of a process.
#[derive(Debug)]
pub struct Heads {
    most: usize,
    used: AtomicUsize,
    /// What connections hold that have been told to give it up.
    leaving: AtomicUsize,
    /// All connections of the process.
    shards: Mutex<Vec<Weak<Shard>>>,
}

impl Default for Heads {
    /// For ports that have no setting of their own: 64 MiB.
    fn default() -> Self {
        Self::new(64 << 20)
    }
}

impl Heads {
    /// Incomplete heads have at most `most` bytes together.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            used: AtomicUsize::new(0),
            leaving: AtomicUsize::new(0),
            shards: Mutex::default(),
        }
    }

    pub(super) fn watch_over(&self, shard: &Arc<Shard>) {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        shards.retain(|shard| shard.strong_count() > 0);
        shards.push(Arc::downgrade(shard));
    }

    /// Notes that the incomplete head on `seat` has `size` bytes now. Beyond the budget the largest heads are refused
    /// until the rest is within it. Whether this one may go on.
    pub(super) fn grows(&self, seat: &Seat, size: usize) -> bool {
        {
            let mut connections = seat.shard.lock();
            let Some(entry) = connections.open.get_mut(&seat.key) else { return true };
            if entry.refused {
                return false;
            }
            self.used.fetch_add(size.saturating_sub(entry.head), Relaxed);
            entry.head = entry.head.max(size);
        }
        if !self.is_over() {
            return true;
        }
        self.refuse_largest();
        seat.shard.lock().open.get(&seat.key).is_none_or(|entry| !entry.refused)
    }

    /// Notes that the head on `seat` has come whole, or that its connection ends.
    pub(super) fn end(&self, seat: &Seat) {
        let mut connections = seat.shard.lock();
        let Some(entry) = connections.open.get_mut(&seat.key) else { return };
        let head = std::mem::take(&mut entry.head);
        self.used.fetch_sub(head, Relaxed);
        if std::mem::take(&mut entry.refused) {
            self.leaving.fetch_sub(head, Relaxed);
            // The note is added under the same lock. It must not reach the next head on this connection.
            entry.watch.takes(Note::Refuse);
        }
    }

    fn is_over(&self) -> bool {
        self.used.load(Relaxed).saturating_sub(self.leaving.load(Relaxed)) > self.most
    }

    /// Tells connections to give up their heads, the largest first, until the others are within the budget.
    fn refuse_largest(&self) {
        // One thread at a time: two would refuse twice as much.
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        while self.is_over() {
            let mut largest: Option<(usize, Arc<Shard>, u64)> = None;
            for shard in shards.iter().filter_map(Weak::upgrade) {
                let found = {
                    let connections = shard.lock();
                    let heads = connections.open.iter().filter(|(_, entry)| !entry.refused);
                    heads.map(|(key, entry)| (entry.head, *key)).max()
                };
                let Some((head, key)) = found else { continue };
                if head > largest.as_ref().map_or(0, |(most, ..)| *most) {
                    largest = Some((head, shard, key));
                }
            }
            let Some((_, shard, key)) = largest else { return };
            let mut connections = shard.lock();
            // It may have come whole meanwhile. Then the next round finds another.
            if let Some(entry) = connections.open.get_mut(&key)
                && entry.head > 0
            {
                entry.refused = true;
                self.leaving.fetch_add(entry.head, Relaxed);
                entry.tell(Note::Refuse);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::register::{Register, Seated};
    use crate::watch::Watch;

    #[test]
    fn a_head_that_came_whole_takes_its_refusal_along() {
        let (register, heads) = (Register::default(), Arc::new(Heads::new(100)));
        let shard = register.shard(&heads);
        let watches = [(); 2].map(|()| Arc::new(Watch::new()));
        let seats = watches.each_ref().map(|watch| Seated(shard.enter(watch, &heads)));
        assert!(heads.grows(&seats[0].0, 60));
        assert!(heads.grows(&seats[1].0, 50));
        assert!(watches[0].has(Note::Refuse));
        heads.end(&seats[0].0);
        assert!(!watches[0].has(Note::Refuse), "the next head would be refused");
        // That head is refused only for its own size.
        assert!(heads.grows(&seats[0].0, 50));
        assert!(!heads.grows(&seats[0].0, 51) && watches[0].has(Note::Refuse));
    }

    #[test]
    fn the_largest_heads_are_refused_until_the_rest_is_within_the_budget() {
        let (register, heads) = (Register::default(), Arc::new(Heads::new(100)));
        let shards = [register.shard(&heads), register.shard(&heads)];
        let watches: Vec<_> = (0..4).map(|_| Arc::new(Watch::new())).collect();
        let mut seats: Vec<_> = (0..4)
            .map(|number| Seated(shards[number % 2].enter(&watches[number], &heads)))
            .collect();
        let refused = || (0..4).filter(|n| watches[*n].takes(Note::Refuse)).collect::<Vec<usize>>();
        assert!(heads.grows(&seats[0].0, 40));
        assert!(heads.grows(&seats[1].0, 50));
        assert!(heads.grows(&seats[2].0, 10));
        assert_eq!(refused(), [0; 0]);
        // Another, larger one makes room for this one.
        assert!(heads.grows(&seats[3].0, 5));
        assert_eq!(refused(), [1]);
        // What is told to go counts no more, even before it is gone.
        assert!(heads.grows(&seats[2].0, 40));
        assert!(!heads.grows(&seats[1].0, 60), "it has been refused");
        // The largest is the one that grows.
        assert!(!heads.grows(&seats[3].0, 80));
        assert_eq!(refused(), [3]);
        seats.truncate(1);
        assert!(heads.grows(&seats[0].0, 100));
        heads.end(&seats[0].0);
        assert_eq!((heads.used.load(Relaxed), heads.leaving.load(Relaxed)), (0, 0));
        drop(seats);
        assert_eq!((heads.used.load(Relaxed), heads.leaving.load(Relaxed)), (0, 0));
    }
}
