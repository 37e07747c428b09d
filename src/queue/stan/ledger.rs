//! What a worker has of a channel's messages: which wait, which are being made, and which are done, so that one that the
//! server sends again is not made again. No I/O, no clock.
//!
//! The server sends the calls of all functions in one line, and no more than it was asked for. So a call whose function
//! has its share of the places is set aside after a while, into the channel of calls that are made later, where it holds
//! up nobody.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::function::Function;
use crate::queue::call::Millis;

/// Messages that are done and known to be so: the server may not have heard of it.
const REMEMBERED: usize = 16 * 1024;
/// A call that has waited for so long for its function's share may be set aside.
const LONG: Millis = 1000;
/// For so long after that the function's calls are set aside at once.
const SLOW: Millis = 10_000;

/// What a message is known by. A server that has lost what it stored counts from one again; then the time differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    /// It is from the channel of calls that are made later.
    pub(super) later: bool,
    pub(super) sequence: u64,
    pub(super) timestamp: i64,
}

/// Where a message is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// It is being found out whether another worker has it.
    Asked,
    /// It waits for its time, or for a place.
    Waits,
    Taken(Function),
    /// It is stored in another place.
    Leaves,
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

/// How much there is room for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Room {
    /// Calls that are made at a time; the server sends as many.
    pub(super) places: usize,
    /// Calls that are made later, and may wait here.
    pub(super) later: usize,
}

struct Entry {
    /// Where its end is told: as of the last time it came.
    acks: String,
    place: Place,
}

/// What waits, and whose call it is.
struct Waiting<T> {
    key: Key,
    function: Function,
    message: T,
}

/// The messages; `T` is what waits.
pub(super) struct Ledger<T> {
    entries: HashMap<Key, Entry>,
    line: BTreeMap<(Millis, u64), Waiting<T>>,
    order: u64,
    done: VecDeque<Key>,
    room: Room,
    /// Those that are not done, of either channel.
    open: [usize; 2],
    running: HashMap<Function, usize>,
    /// Functions whose calls are set aside, and until when.
    slow: HashMap<Function, Millis>,
}

impl<T> Ledger<T> {
    pub(super) fn new() -> Self {
        Self {
            entries: HashMap::new(),
            line: BTreeMap::new(),
            order: 0,
            done: VecDeque::new(),
            room: Room::default(),
            open: [0; 2],
            running: HashMap::new(),
            slow: HashMap::new(),
        }
    }

    pub(super) fn make_room(&mut self, room: Room) {
        self.room = room;
    }

    /// Notes that a message came, whose end is to be told at `acks`.
    pub(super) fn arrives(&mut self, key: Key, sent_before: bool, acks: &str) -> Arrival {
        if let Some(entry) = self.entries.get_mut(&key) {
            acks.clone_into(&mut entry.acks);
            return if entry.place == Place::Done { Arrival::Done } else { Arrival::Nothing };
        }
        // Twice as many as the server sends at a time: those of a session before are still here.
        if self.open.iter().sum::<usize>() >= 2 * (2 * self.room.places + self.room.later) {
            return Arrival::Nothing;
        }
        self.entries.insert(key, Entry { acks: acks.to_owned(), place: Place::Asked });
        self.open[usize::from(key.later)] += 1;
        if sent_before { Arrival::SentBefore } else { Arrival::New }
    }

    /// Has a call of `function` wait until `at`.
    pub(super) fn waits(&mut self, key: Key, function: Function, at: Millis, message: T) {
        if self.entries.contains_key(&key) {
            self.is_at(key, Place::Waits);
            self.order += 1;
            self.line.insert((at, self.order), Waiting { key, function, message });
        }
    }

    /// Takes the call that has waited longest since its time came, among those whose functions have not got their share:
    /// three quarters of the places that the others leave free, and always one.
    pub(super) fn next(&mut self, now: Millis) -> Next<T> {
        let due = self.line.iter().take_while(|((at, _), _)| *at <= now);
        let next = due.filter(|(_, it)| self.may_run(&it.function)).map(|(order, _)| *order).next();
        if let Some(Waiting { key, function, message }) = next.and_then(|it| self.line.remove(&it))
        {
            *self.running.entry(function.clone()).or_default() += 1;
            self.is_at(key, Place::Taken(function));
            return Next::Now(key, message);
        }
        match self.line.range((now + 1, 0)..).next() {
            Some(((at, _), _)) => Next::NotBefore(*at),
            None => Next::Nothing,
        }
    }

    fn may_run(&self, function: &Function) -> bool {
        let running = self.running.get(function).copied().unwrap_or_default();
        let free = self.room.places.saturating_sub(self.running.values().sum());
        running == 0 || running + 4 <= free * 3
    }

    /// Takes a call that holds others up, which the server does not send while it is here: one whose function has its
    /// share, or the one that waits longest for its time.
    pub(super) fn set_aside(&mut self, now: Millis) -> Option<(Key, Millis, T)> {
        let [calls, later] = self.open;
        let crowded = [calls >= self.room.places, later >= self.room.later];
        if !crowded.contains(&true) {
            return None;
        }
        self.slow.retain(|_, until| *until > now);
        let far = self.line.last_key_value().filter(|((at, _), _)| crowded[1] && *at > now + LONG);
        let order = match far {
            Some((order, _)) => *order,
            None => {
                let due = self.line.iter().take_while(|((at, _), _)| *at <= now);
                let (order, waiting) = due
                    .filter(|(_, it)| crowded[usize::from(it.key.later)])
                    .filter(|((at, _), it)| {
                        at + LONG <= now || self.slow.contains_key(&it.function)
                    })
                    .find(|(_, it)| !self.may_run(&it.function))?;
                let (order, function) = (*order, waiting.function.clone());
                self.slow.insert(function, now + SLOW);
                order
            }
        };
        let Waiting { key, message, .. } = self.line.remove(&order)?;
        self.is_at(key, Place::Leaves);
        Some((key, order.0, message))
    }

    /// Notes that a message is done; where that is to be told.
    pub(super) fn done(&mut self, key: Key) -> Option<String> {
        let acks = self.entries.get(&key)?.acks.clone();
        if self.is_at(key, Place::Done) != Some(Place::Done) {
            self.open[usize::from(key.later)] -= 1;
            self.done.push_back(key);
        }
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
            self.is_at(key, Place::Leaves);
            self.entries.remove(&key);
            self.open[usize::from(key.later)] -= 1;
        }
    }

    /// Notes where a message is; where it was.
    fn is_at(&mut self, key: Key, place: Place) -> Option<Place> {
        let was = std::mem::replace(&mut self.entries.get_mut(&key)?.place, place);
        if let Place::Taken(function) = &was
            && let Some(running) = self.running.get_mut(function)
        {
            *running -= 1;
            if *running == 0 {
                self.running.remove(function);
            }
        }
        Some(was)
    }

    /// Whether a message is here, and not one that is only asked about; and whether it is done.
    pub(super) fn has(&self, key: Key) -> Option<bool> {
        match self.entries.get(&key)?.place {
            Place::Asked => None,
            Place::Waits | Place::Taken(_) | Place::Leaves => Some(false),
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

    fn function(name: &str) -> Function {
        Function { name: name.to_owned(), namespace: "fn".to_owned() }
    }

    type Messages = Ledger<&'static str>;

    fn ledger() -> Messages {
        let mut ledger = Ledger::new();
        ledger.make_room(Room { places: 4, later: 2 });
        ledger
    }

    /// Has a new call wait, each of a function of its own.
    fn comes(it: &mut Messages, key: Key, at: Millis) {
        comes_of(it, &key.sequence.to_string(), key, at);
    }

    fn comes_of(it: &mut Messages, name: &str, key: Key, at: Millis) {
        assert_eq!(it.arrives(key, false, "a"), Arrival::New);
        it.waits(key, function(name), at, "x");
    }

    #[test]
    fn what_is_here_does_not_come_twice() {
        let mut it = ledger();
        assert_eq!(it.arrives(key(1), false, "a"), Arrival::New);
        assert_eq!(it.has(key(1)), None);
        it.waits(key(1), function("echo"), 5, "one");
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
            comes(&mut it, later(number), at);
        }
        assert_eq!(it.next(9), Next::NotBefore(10));
        assert_eq!(it.next(10), Next::Now(later(2), "x"));
        assert_eq!(it.next(31), Next::Now(later(3), "x"));
        assert_eq!(it.next(31), Next::Now(later(1), "x"));
    }

    #[test]
    fn there_is_room_for_so_many() {
        let mut it = ledger();
        for number in 1..=20 {
            assert_eq!(it.arrives(key(number), false, "a"), Arrival::New);
        }
        assert_eq!(it.arrives(key(21), false, "a"), Arrival::Nothing);
        it.done(key(1));
        assert_eq!(it.arrives(key(21), false, "a"), Arrival::New);
    }

    #[test]
    fn what_waits_longest_makes_room_when_there_is_none() {
        let mut it = ledger();
        comes(&mut it, later(1), 3000);
        assert_eq!(it.set_aside(5), None);
        comes(&mut it, later(2), 4000);
        assert_eq!(it.set_aside(3000), None);
        assert_eq!(it.set_aside(5), Some((later(2), 4000, "x")));
        it.done(later(2));
        assert_eq!(it.set_aside(5), None);
    }

    #[test]
    fn a_function_that_has_its_share_makes_room_for_others() {
        let mut it = ledger();
        for number in 1..=4 {
            comes_of(&mut it, "slow", key(number), 10);
        }
        let mut made = || match it.next(10) {
            Next::Now(key, _) => Some(key),
            Next::NotBefore(_) | Next::Nothing => None,
        };
        // Three quarters of the places.
        let taken = [made(), made(), made(), made()];
        assert_eq!(taken, [Some(key(1)), Some(key(2)), Some(key(3)), None]);
        // It may be quick: then it is not worth it.
        assert_eq!(it.set_aside(10 + LONG - 1), None);
        assert_eq!(it.set_aside(10 + LONG), Some((key(4), 10, "x")));
        it.done(key(4));
        assert_eq!(it.set_aside(10 + LONG), None);
        // The next that comes is set aside at once.
        comes_of(&mut it, "slow", key(5), 2000);
        assert_eq!(it.set_aside(2000), Some((key(5), 2000, "x")));
        it.done(key(5));
        comes_of(&mut it, "quick", key(6), 2001);
        assert_eq!(it.next(2001), Next::Now(key(6), "x"));
        // Once one of its calls has ended, it may have the place.
        comes_of(&mut it, "slow", key(7), 2002);
        assert_eq!(it.next(2002), Next::Nothing);
        it.done(key(1));
        it.done(key(6));
        assert_eq!(it.next(2002), Next::Now(key(7), "x"));
        it.forget(key(7));
        it.done(key(2));
        it.done(key(3));
        assert!(it.running.is_empty());
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
