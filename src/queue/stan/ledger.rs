//! What a worker has of a channel's messages: which wait, which are being made, and which are done, so that one that the
//! server sends again is not made again. No I/O, no clock.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::queue::call::Millis;

/// Messages that are done and known to be so: the server may not have heard of it.
const REMEMBERED: usize = 16 * 1024;

/// What a message is known by. A server that has lost what it stored counts from one again; then the time differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    /// It is from the channel of calls whose time has not come.
    pub(super) later: bool,
    pub(super) sequence: u64,
    pub(super) timestamp: i64,
}

/// Where a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// It is being found out whether another worker has it.
    Asked,
    /// It waits for its time, or for a place.
    Waits(Millis, u64),
    Taken,
    Done,
}

/// What is to be done with a message that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// To be made.
    New,
    /// It was sent to somebody before, who may have it yet.
    SentBefore,
    /// Nothing: it is here, or there is no room for it, so that the server sends it again.
    Nothing,
    /// To be acknowledged again.
    Done,
}

/// The next message whose time has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<T> {
    Now(Key, T),
    NotBefore(Millis),
    Nothing,
}

struct Entry {
    /// Where its end is told: as of the last time it came.
    acks: String,
    place: Place,
}

/// The messages; `T` is what waits.
pub(super) struct Ledger<T> {
    entries: HashMap<Key, Entry>,
    line: BTreeMap<(Millis, u64), (Key, T)>,
    order: u64,
    done: VecDeque<Key>,
    /// Those that are not done and whose time had not come when they were stored.
    later: usize,
    /// Those that are not done, at most.
    most: usize,
}

impl<T> Ledger<T> {
    pub(super) fn new() -> Self {
        Self {
            entries: HashMap::new(),
            line: BTreeMap::new(),
            order: 0,
            done: VecDeque::new(),
            later: 0,
            most: 0,
        }
    }

    /// Has room for `most` messages that are not done.
    pub(super) fn make_room(&mut self, most: usize) {
        self.most = most;
    }

    /// Notes that a message came, whose end is to be told at `acks`.
    pub(super) fn arrives(&mut self, key: Key, sent_before: bool, acks: &str) -> Arrival {
        if let Some(entry) = self.entries.get_mut(&key) {
            acks.clone_into(&mut entry.acks);
            return if entry.place == Place::Done { Arrival::Done } else { Arrival::Nothing };
        }
        if self.entries.len() - self.done.len() >= self.most {
            return Arrival::Nothing;
        }
        self.entries.insert(key, Entry { acks: acks.to_owned(), place: Place::Asked });
        self.later += usize::from(key.later);
        if sent_before { Arrival::SentBefore } else { Arrival::New }
    }

    /// Has a message wait until `at`.
    pub(super) fn waits(&mut self, key: Key, at: Millis, message: T) {
        if let Some(entry) = self.entries.get_mut(&key) {
            self.order += 1;
            entry.place = Place::Waits(at, self.order);
            self.line.insert((at, self.order), (key, message));
        }
    }

    /// Takes the message that has waited longest since its time came.
    pub(super) fn next(&mut self, now: Millis) -> Next<T> {
        let Some(first) = self.line.first_entry() else { return Next::Nothing };
        if first.key().0 > now {
            return Next::NotBefore(first.key().0);
        }
        let (key, message) = first.remove();
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.place = Place::Taken;
        }
        Next::Now(key, message)
    }

    /// Takes the message that will wait longest, if it waits until after `now` and as many as `most` have come of those
    /// whose time had not: there is no room for others, whose time may come sooner.
    pub(super) fn surplus(&mut self, most: usize, now: Millis) -> Option<(Key, Millis, T)> {
        if self.later < most {
            return None;
        }
        let last = self.line.last_entry().filter(|last| last.key().0 > now)?;
        let at = last.key().0;
        let (key, message) = last.remove();
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.place = Place::Taken;
        }
        Some((key, at, message))
    }

    /// Notes that a message is done; where that is to be told.
    pub(super) fn done(&mut self, key: Key) -> Option<String> {
        let entry = self.entries.get_mut(&key)?;
        if entry.place != Place::Done {
            entry.place = Place::Done;
            self.later -= usize::from(key.later);
            self.done.push_back(key);
        }
        let acks = entry.acks.clone();
        if self.done.len() > REMEMBERED
            && let Some(oldest) = self.done.pop_front()
        {
            self.entries.remove(&oldest);
        }
        Some(acks)
    }

    /// Lets go of a message that is not done: the server sends it again, or another worker has it.
    pub(super) fn forget(&mut self, key: Key) {
        if self.entries.get(&key).is_some_and(|entry| entry.place != Place::Done) {
            self.entries.remove(&key);
            self.later -= usize::from(key.later);
        }
    }

    /// Whether a message is here, and not one that is only asked about; and whether it is done.
    pub(super) fn has(&self, key: Key) -> Option<bool> {
        match self.entries.get(&key)?.place {
            Place::Asked => None,
            Place::Waits(..) | Place::Taken => Some(false),
            Place::Done => Some(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(sequence: u64) -> Key {
        Key { later: false, sequence, timestamp: 1 }
    }

    fn later(sequence: u64) -> Key {
        Key { later: true, ..key(sequence) }
    }

    fn ledger() -> Ledger<&'static str> {
        let mut ledger = Ledger::new();
        ledger.make_room(3);
        ledger
    }

    #[test]
    fn what_is_here_does_not_come_twice() {
        let mut it = ledger();
        assert_eq!(it.arrives(key(1), false, "a"), Arrival::New);
        assert_eq!(it.has(key(1)), None);
        it.waits(key(1), 5, "one");
        assert_eq!(
            (it.arrives(key(1), true, "b"), it.has(key(1))),
            (Arrival::Nothing, Some(false))
        );
        assert_eq!(it.next(5), Next::Now(key(1), "one"));
        assert_eq!(it.arrives(key(1), true, "c"), Arrival::Nothing);
        // It is told where it came last.
        assert_eq!(it.done(key(1)).as_deref(), Some("c"));
        assert_eq!((it.arrives(key(1), true, "d"), it.has(key(1))), (Arrival::Done, Some(true)));
        assert_eq!(it.done(key(1)).as_deref(), Some("d"));
        it.forget(key(1));
        assert_eq!(it.has(key(1)), Some(true));
        assert_eq!(it.next(9), Next::Nothing);
    }

    #[test]
    fn a_server_that_counts_from_one_again_sends_other_messages() {
        let mut it = ledger();
        it.arrives(key(1), false, "a");
        it.done(key(1));
        assert_eq!(it.arrives(Key { timestamp: 2, ..key(1) }, false, "a"), Arrival::New);
        assert_eq!(it.arrives(later(1), false, "a"), Arrival::New);
    }

    #[test]
    fn what_is_let_go_of_comes_again() {
        let mut it = ledger();
        assert_eq!(it.arrives(key(1), true, "a"), Arrival::SentBefore);
        it.forget(key(1));
        assert_eq!(it.arrives(key(1), true, "a"), Arrival::SentBefore);
    }

    #[test]
    fn each_waits_for_its_time_and_then_in_turn() {
        let mut it = ledger();
        for (number, at) in [(1, 30), (2, 10), (3, 10)] {
            it.arrives(later(number), false, "a");
            it.waits(later(number), at, "x");
        }
        assert_eq!(it.next(9), Next::NotBefore(10));
        assert_eq!(it.next(10), Next::Now(later(2), "x"));
        assert_eq!(it.next(31), Next::Now(later(3), "x"));
        assert_eq!(it.next(31), Next::Now(later(1), "x"));
    }

    #[test]
    fn there_is_no_room_for_more_than_was_made() {
        let mut it = ledger();
        for number in 1..=3 {
            assert_eq!(it.arrives(key(number), false, "a"), Arrival::New);
        }
        assert_eq!(it.arrives(key(4), false, "a"), Arrival::Nothing);
        it.done(key(1));
        assert_eq!(it.arrives(key(4), false, "a"), Arrival::New);
    }

    #[test]
    fn what_waits_longest_makes_room_when_there_is_none() {
        let mut it = ledger();
        for (number, at) in [(1, 30), (2, 40)] {
            it.arrives(later(number), false, "a");
            it.waits(later(number), at, "x");
        }
        it.arrives(key(9), false, "a");
        assert_eq!((it.surplus(3, 5), it.surplus(2, 40)), (None, None));
        assert_eq!(it.surplus(2, 5), Some((later(2), 40, "x")));
        it.done(later(2));
        assert_eq!(it.surplus(2, 5), None);
    }

    #[test]
    fn no_more_is_remembered_than_there_is_room_for() {
        let mut it = ledger();
        for number in 0..REMEMBERED as u64 + 10 {
            it.arrives(key(number), false, "a");
            it.done(key(number));
        }
        assert_eq!(
            (it.entries.len(), it.has(key(9)), it.has(key(10))),
            (REMEMBERED, None, Some(true))
        );
    }
}
