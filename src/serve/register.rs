//! The open connections of a port, so that one that is idle can make room for another.
//!
//! Nothing is noted here while a connection is used: what it does, its [`Watch`] knows. Only when there is no room left
//! all connections are looked at, and the oldest idle ones remembered for the next times.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::serve::heads::Heads;
use crate::watch::{Note, Stage, Watch};

/// A connection that has been idle for less keeps its place: its next request may be on its way.
const IDLE: Duration = Duration::from_secs(1);
/// How long one keeps its place while a head is on its way.
pub(super) const HEAD: Duration = Duration::from_secs(5);
/// How many idle connections are remembered after one look.
const REMEMBERED: usize = 256;

/// The connections of one port, on all threads.
#[derive(Debug, Default)]
pub(super) struct Register {
    shards: Mutex<Vec<Arc<Shard>>>,
    /// Those that were idle longest at the last look, the oldest at the end.
    candidates: Mutex<Vec<Candidate>>,
}

#[derive(Debug)]
struct Candidate {
    shard: Arc<Shard>,
    key: u64,
    since: Instant,
}

/// A connection that was told to close.
#[derive(Debug)]
pub(super) struct Leaving {
    shard: Arc<Shard>,
    key: u64,
    told: Instant,
}

impl Leaving {
    /// How long the task of a connection may take to heed what it was told, on a busy machine.
    const PATIENCE: Duration = Duration::from_secs(1);

    /// Whether the connection is still open, and may be expected to close. One that is needed again removes the note.
    pub(super) fn is_expected(&self) -> bool {
        let leaves = |entry: &Entry| entry.watch.has(Note::Leave);
        self.told.elapsed() < Self::PATIENCE
            && self.shard.lock().open.get(&self.key).is_some_and(leaves)
    }
}

/// The connections of one thread.
#[derive(Debug, Default)]
pub(super) struct Shard(Mutex<Connections>);

#[derive(Debug, Default)]
pub(super) struct Connections {
    next: u64,
    pub(super) open: HashMap<u64, Entry>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) watch: Arc<Watch>,
    /// Wakes the connection's task, once it has run.
    waker: Option<Waker>,
    /// How much of an incomplete head it holds, as far as that is counted.
    pub(super) head: usize,
    /// It has been told to give that up.
    pub(super) refused: bool,
}

impl Entry {
    /// Has the connection's task see to `note`.
    pub(super) fn tell(&self, note: Note) {
        self.watch.note(note);
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}

/// Since when the connection with this `watch` has done nothing that would be missed; `None` if it is needed.
pub(super) fn dispensable_since(watch: &Watch, now: Instant) -> Option<(Stage, Instant)> {
    let (stage, since) = watch.waits_since()?;
    let patience = if stage == Stage::Idle { IDLE } else { HEAD };
    (now.saturating_duration_since(since) >= patience).then_some((stage, since))
}

impl Register {
    /// Room for the connections of one more thread.
    pub(super) fn shard(&self, heads: &Heads) -> Arc<Shard> {
        let shard = Arc::<Shard>::default();
        heads.watch_over(&shard);
        lock(&self.shards).push(Arc::clone(&shard));
        shard
    }

    /// Has the connection closed that has been idle longest; without one, that whose head takes longest to come.
    /// Returns that connection, which ends when its task runs next.
    pub(super) fn make_room(&self) -> Option<Leaving> {
        let mut candidates = lock(&self.candidates);
        for looked in [false, true] {
            if looked {
                *candidates = self.look(Instant::now());
            }
            while let Some(candidate) = candidates.pop() {
                if candidate.close() {
                    let Candidate { shard, key, .. } = candidate;
                    return Some(Leaving { shard, key, told: Instant::now() });
                }
            }
        }
        None
    }

    fn look(&self, now: Instant) -> Vec<Candidate> {
        let (mut idle, mut heads) = (Vec::new(), Vec::new());
        for shard in lock(&self.shards).iter() {
            for (key, entry) in &shard.lock().open {
                let Some((stage, since)) = dispensable_since(&entry.watch, now) else { continue };
                let found = if stage == Stage::Idle { &mut idle } else { &mut heads };
                found.push(Candidate { shard: Arc::clone(shard), key: *key, since });
            }
        }
        let mut found = if idle.is_empty() { heads } else { idle };
        if found.len() > REMEMBERED {
            found.select_nth_unstable_by_key(REMEMBERED, |candidate| candidate.since);
            found.truncate(REMEMBERED);
        }
        found.sort_unstable_by_key(|candidate| std::cmp::Reverse(candidate.since));
        found
    }
}

impl Candidate {
    /// Closes the connection if it has done nothing since; whether that is so.
    fn close(&self) -> bool {
        let connections = self.shard.lock();
        let Some(entry) = connections.open.get(&self.key) else { return false };
        let waits = entry.watch.waits_since().is_some_and(|(_, since)| since == self.since);
        if waits {
            entry.tell(Note::Leave);
        }
        waits
    }
}

impl Shard {
    pub(super) fn lock(&self) -> MutexGuard<'_, Connections> {
        lock(&self.0)
    }

    /// Notes a connection that has just been accepted.
    pub(super) fn enter(self: &Arc<Self>, watch: &Arc<Watch>, heads: &Arc<Heads>) -> Arc<Seat> {
        let mut connections = self.lock();
        let key = connections.next;
        connections.next += 1;
        let entry = Entry { watch: Arc::clone(watch), waker: None, head: 0, refused: false };
        connections.open.insert(key, entry);
        Arc::new(Seat { shard: Arc::clone(self), heads: Arc::clone(heads), key })
    }
}

/// One connection in the register.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) shard: Arc<Shard>,
    pub(super) heads: Arc<Heads>,
    pub(super) key: u64,
}

impl Seat {
    /// Has `waker` woken when the connection is told something.
    pub(super) fn wake_by(&self, waker: &Waker) {
        if let Some(entry) = self.shard.lock().open.get_mut(&self.key) {
            entry.waker = Some(waker.clone());
        }
    }
}

/// Removes a connection from the register when it is dropped.
#[derive(Debug)]
pub(super) struct Seated(pub(super) Arc<Seat>);

impl Drop for Seated {
    fn drop(&mut self) {
        self.0.heads.end(&self.0);
        self.0.shard.lock().open.remove(&self.0.key);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(idle_for: Duration) -> Arc<Watch> {
        let watch = Arc::new(Watch::at(Instant::now() - Duration::from_secs(3600)));
        watch.call_ended(Instant::now() - idle_for, Duration::from_secs(7200));
        watch
    }

    fn is_told(watch: &Watch) -> bool {
        watch.takes(Note::Leave)
    }

    #[test]
    fn the_connection_that_has_been_idle_longest_is_closed_on_whichever_thread() {
        let (register, heads) = (Register::default(), Arc::new(Heads::new(1 << 20)));
        let shards = [register.shard(&heads), register.shard(&heads)];
        let ages = [30, 60, 10, 40].map(Duration::from_secs);
        let watches = ages.map(watch);
        let seats: Vec<_> = (0..4)
            .map(|number| Seated(shards[number % 2].enter(&watches[number], &heads)))
            .collect();
        for expect in [1, 3, 0, 2] {
            register.make_room();
            let told: Vec<_> = (0..4).filter(|number| is_told(&watches[*number])).collect();
            assert_eq!(told, [expect]);
            // As its task does.
            watches[expect].call_begins();
        }
        register.make_room();
        assert!(
            !watches.iter().any(|watch| is_told(watch)),
            "a connection in use was told to leave"
        );
        drop(seats);
        assert!(shards.iter().all(|shard| shard.lock().open.is_empty()));
    }

    #[test]
    fn one_that_was_remembered_as_idle_and_is_used_since_stays() {
        let (register, heads) = (Register::default(), Arc::new(Heads::new(1 << 20)));
        let shard = register.shard(&heads);
        let watches = [60, 50, 40].map(|seconds| watch(Duration::from_secs(seconds)));
        let seats = watches.each_ref().map(|watch| Seated(shard.enter(watch, &heads)));
        register.make_room();
        assert!(is_told(&watches[0]));
        watches[1].call_begins();
        register.make_room();
        assert_eq!(watches.each_ref().map(|watch| is_told(watch)), [false, false, true]);
        drop(seats);
    }

    #[test]
    fn young_connections_stay_and_slow_heads_go_when_nothing_is_idle() {
        let (register, heads) = (Register::default(), Arc::new(Heads::new(1 << 20)));
        let shard = register.shard(&heads);
        let young = watch(Duration::from_millis(10));
        let head = Arc::new(Watch::at(Instant::now() - Duration::from_secs(3600)));
        head.head_began(Instant::now() - 2 * HEAD, Duration::from_secs(60));
        let seats = [&young, &head].map(|watch| Seated(shard.enter(watch, &heads)));
        register.make_room();
        assert!(!is_told(&young) && is_told(&head));
        drop(seats);
    }
}
