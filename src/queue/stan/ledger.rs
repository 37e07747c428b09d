//! What a worker has of a channel's messages: which wait, which are being made, and which are done, so that one that the
//! server sends again is not made again. No I/O, no clock.
//!
//! The server sends the calls of all functions in one line, and no more than it was asked for. So a call whose function
//! has its share of the places is set aside after a while, into the channel of calls that are made later, where it holds
//! up nobody.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::function::Function;
use crate::queue::call::UnixMillis;
use crate::queue::fair_share::may_start;
use crate::queue::stan::channels::{COUNT, Channel, NEAR};

/// Messages that are done and known to be so: the server may not have heard of it.
const REMEMBERED: usize = 16 * 1024;
/// A call that has waited for so long for its function's share may be set aside.
const LONG: UnixMillis = 1000;
/// For so long after that the function's calls are set aside at once.
const SLOW: UnixMillis = 10_000;

/// What a message is known by. A server that has lost what it stored counts from one again; then the time differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) channel: Channel,
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
    /// Nothing more can be done with it, and it must not be lost.
    Stays,
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
    NotBefore(UnixMillis),
    Nothing,
}

/// How much there is room for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Room {
    /// Calls that are made at a time; the server sends as many.
    pub(super) places: usize,
    /// Calls of one channel that are made later, and may wait here.
    pub(super) later: usize,
    /// The bytes of their messages. A single one may have more.
    pub(super) later_bytes: usize,
}

/// What of a channel is here and not done.
#[derive(Clone, Copy, Default)]
struct Open {
    messages: usize,
    bytes: usize,
}

struct Entry {
    /// Where its end is told: as of the last time it came.
    acks: String,
    place: Place,
    bytes: usize,
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
    line: BTreeMap<(UnixMillis, u64), Waiting<T>>,
    order: u64,
    done: VecDeque<Key>,
    room: Room,
    /// Those that are not done, by channel.
    open: [Open; COUNT],
    /// Nothing more is taken in.
    closed: bool,
    running: HashMap<Function, usize>,
    /// Functions whose calls are set aside, and until when.
    slow: HashMap<Function, UnixMillis>,
}

impl<T> Ledger<T> {
    pub(super) fn new() -> Self {
        Self {
            entries: HashMap::new(),
            line: BTreeMap::new(),
            order: 0,
            done: VecDeque::new(),
            room: Room::default(),
            open: [Open::default(); COUNT],
            closed: false,
            running: HashMap::new(),
            slow: HashMap::new(),
        }
    }

    pub(super) fn make_room(&mut self, room: Room) {
        self.room = room;
    }

    /// Takes nothing more in, and lets go of what waits: the server gives it to others.
    pub(super) fn close(&mut self) {
        self.closed = true;
        for Waiting { key, .. } in std::mem::take(&mut self.line).into_values() {
            self.forget(key);
        }
    }

    /// Notes that a message of so many `bytes` came, whose end is to be told at `acks`.
    pub(super) fn arrives(
        &mut self,
        key: Key,
        sent_before: bool,
        bytes: usize,
        acks: &str,
    ) -> Arrival {
        if let Some(entry) = self.entries.get_mut(&key) {
            acks.clone_into(&mut entry.acks);
            return if entry.place == Place::Done { Arrival::Done } else { Arrival::Nothing };
        }
        if self.closed || !self.has_room(key.channel, bytes) {
            return Arrival::Nothing;
        }
        self.entries.insert(key, Entry { acks: acks.to_owned(), place: Place::Asked, bytes });
        let open = &mut self.open[key.channel.number()];
        open.messages += 1;
        open.bytes += bytes;
        if sent_before { Arrival::SentBefore } else { Arrival::New }
    }

    fn has_room(&self, channel: Channel, bytes: usize) -> bool {
        let (open, Room { places, later, later_bytes }) = (self.open[channel.number()], self.room);
        // Twice as many as the server sends at a time: those of a session before are still here.
        match channel.is_later() {
            false => open.messages < 2 * places,
            true => {
                open.messages < 2 * (later + places)
                    && (open.messages == 0 || open.bytes + bytes <= later_bytes)
            }
        }
    }

    /// Has a call of `function` wait until `at`.
    pub(super) fn waits(&mut self, key: Key, function: Function, at: UnixMillis, message: T) {
        if self.closed {
            self.forget(key);
        } else if self.entries.contains_key(&key) {
            self.is_at(key, Place::Waits);
            self.order += 1;
            self.line.insert((at, self.order), Waiting { key, function, message });
        }
    }

    /// Takes the call that has waited longest since its time came, among those whose functions have not got their share:
    /// three quarters of the places that the others leave free, and always one.
    pub(super) fn next(&mut self, now: UnixMillis) -> Next<T> {
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
        may_start(running, self.running.values().sum(), self.room.places)
    }

    /// Takes a call of `channel` that holds others up, which the server does not send while it is here: one whose function
    /// has its share, or the one that waits longest for its time. The moment for which it is meant comes with it.
    pub(super) fn set_aside(
        &mut self,
        channel: Channel,
        now: UnixMillis,
    ) -> Option<(Key, UnixMillis, T)> {
        if !self.is_crowded(channel) {
            return None;
        }
        self.slow.retain(|_, until| *until > now);
        let order = match self.farthest(channel, now) {
            Some(order) => order,
            None => {
                let due = self.line.iter().take_while(|((at, _), _)| *at <= now);
                let (order, waiting) = due
                    .filter(|(_, it)| it.key.channel == channel)
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

    /// Nothing more may come of `channel` while all of it is here that is.
    fn is_crowded(&self, channel: Channel) -> bool {
        let (open, Room { places, later, later_bytes }) = (self.open[channel.number()], self.room);
        match channel.is_later() {
            false => open.messages >= places,
            true => open.messages >= later || open.bytes > later_bytes / 2,
        }
    }

    /// The call of `channel` that waits longest for its time, if that is far off.
    fn farthest(&self, channel: Channel, now: UnixMillis) -> Option<(UnixMillis, u64)> {
        let far = self.line.range((now + NEAR + 1, 0)..).rev();
        let mut far = far.filter(|(_, it)| channel.is_later() && it.key.channel == channel);
        far.next().map(|(order, _)| *order)
    }

    /// Notes that a message is done; where that is to be told.
    pub(super) fn done(&mut self, key: Key) -> Option<String> {
        let acks = self.entries.get(&key)?.acks.clone();
        if self.is_at(key, Place::Done) != Some(Place::Done) {
            self.lets_go(key);
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
            self.lets_go(key);
            self.entries.remove(&key);
        }
    }

    fn lets_go(&mut self, key: Key) {
        let bytes = self.entries.get(&key).map_or(0, |entry| entry.bytes);
        let open = &mut self.open[key.channel.number()];
        open.messages -= 1;
        open.bytes -= bytes;
    }

    /// Notes that a message is being stored in another place.
    pub(super) fn leaves(&mut self, key: Key) {
        self.is_at(key, Place::Leaves);
    }

    /// Holds on to a message that is neither made again nor done: the server has it for as long as this worker lives.
    pub(super) fn keep(&mut self, key: Key) {
        self.is_at(key, Place::Stays);
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
            Place::Waits | Place::Taken(_) | Place::Leaves | Place::Stays => Some(false),
            Place::Done => Some(true),
        }
    }
}

#[cfg(test)]
mod tests;
