//! The messages that a worker has received: pending, executing, and finished ones, so that a redelivered message is
//! not executed again. No I/O, no clock.
//!
//! The server delivers the calls of all functions in one sequence, up to the requested number of unacknowledged ones.
//! So a call whose function has used up its share of the concurrency is parked after a while: it is moved to a channel
//! of delayed calls, where it blocks no others.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::call::UnixMillis;
use crate::fair_share::may_start;
use crate::stan::channels::{CHANNEL_COUNT, Channel, NEAR_MILLIS};
use gateway_base::function::Function;

/// Maximum number of finished messages to remember, whose acknowledgements may have been lost.
const MAX_FINISHED_KEYS: usize = 16 * 1024;
/// A call that has waited this long for its function's share (in milliseconds) may be parked.
const PARK_AFTER: UnixMillis = 1000;
/// Time (in milliseconds) for which further calls of such a function are parked immediately.
const PARKING_PERIOD: UnixMillis = 10_000;

/// Identity of a message. A server that has lost its data starts at sequence number 1 again; then the timestamp
/// differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct MessageKey {
    pub(super) channel: Channel,
    pub(super) sequence: u64,
    pub(super) timestamp: i64,
}

/// State of a received message.
#[derive(Clone, Debug, PartialEq, Eq)]
enum MessageState {
    /// Other workers are being asked whether one of them owns it.
    CheckingOwner,
    /// It waits until it is due, or for a free slot.
    Pending,
    Executing(Function),
    /// It is being moved to another channel.
    Moving,
    /// It can neither be executed nor stored elsewhere, but must not be lost.
    Stuck,
    Finished,
}

/// The action for a message that has been delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ArrivalAction {
    /// Accept it for execution.
    Accept,
    /// It was delivered before, and another worker may own it.
    CheckOwner,
    /// Ignore it: it is already here, or the capacity is exhausted, so that the server redelivers it.
    Ignore,
    /// Acknowledge it again.
    AckAgain,
}

/// The next runnable call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NextCall<T> {
    Ready(MessageKey, T),
    NotBefore(UnixMillis),
    Empty,
}

/// Limits of the table.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Capacity {
    /// Maximum number of parallel executions, and of unacknowledged calls in the main channel.
    pub(super) concurrency: usize,
    /// Maximum number of delayed calls of one channel in memory.
    pub(super) max_delayed: usize,
    /// Maximum total size of their messages in bytes. A single message may exceed it.
    pub(super) max_delayed_bytes: usize,
}

/// Unfinished messages of one channel.
#[derive(Clone, Copy, Default)]
struct Outstanding {
    messages: usize,
    bytes: usize,
}

struct Entry {
    /// The subject for acknowledgements, as of the last delivery.
    ack_subject: String,
    state: MessageState,
    bytes: usize,
}

/// A pending message and its function.
struct PendingMessage<T> {
    key: MessageKey,
    function: Function,
    message: T,
}

/// All received messages. `T` is the content of a pending one.
pub(super) struct InflightTable<T> {
    entries: HashMap<MessageKey, Entry>,
    pending: BTreeMap<(UnixMillis, u64), PendingMessage<T>>,
    last_order: u64,
    finished: VecDeque<MessageKey>,
    capacity: Capacity,
    /// Unfinished messages, by channel.
    outstanding: [Outstanding; CHANNEL_COUNT],
    /// No more messages are accepted.
    closed: bool,
    running: HashMap<Function, usize>,
    /// Functions whose calls are parked immediately, and until when.
    congesting: HashMap<Function, UnixMillis>,
}

impl<T> InflightTable<T> {
    pub(super) fn new() -> Self {
        Self {
            entries: HashMap::new(),
            pending: BTreeMap::new(),
            last_order: 0,
            finished: VecDeque::new(),
            capacity: Capacity::default(),
            outstanding: [Outstanding::default(); CHANNEL_COUNT],
            closed: false,
            running: HashMap::new(),
            congesting: HashMap::new(),
        }
    }

    pub(super) fn set_capacity(&mut self, capacity: Capacity) {
        self.capacity = capacity;
    }

    /// Stops accepting messages and releases the pending ones: the server redelivers them to other workers.
    pub(super) fn close(&mut self) {
        self.closed = true;
        for PendingMessage { key, .. } in std::mem::take(&mut self.pending).into_values() {
            self.release(key);
        }
    }

    /// Records the delivery of a message of size `bytes`, which is to be acknowledged on `ack_subject`.
    pub(super) fn on_message(
        &mut self,
        key: MessageKey,
        redelivered: bool,
        bytes: usize,
        ack_subject: &str,
    ) -> ArrivalAction {
        if let Some(entry) = self.entries.get_mut(&key) {
            ack_subject.clone_into(&mut entry.ack_subject);
            return if entry.state == MessageState::Finished {
                ArrivalAction::AckAgain
            } else {
                ArrivalAction::Ignore
            };
        }
        if self.closed || !self.has_capacity(key.channel, bytes) {
            return ArrivalAction::Ignore;
        }
        self.entries.insert(
            key,
            Entry {
                ack_subject: ack_subject.to_owned(),
                state: MessageState::CheckingOwner,
                bytes,
            },
        );
        let outstanding = &mut self.outstanding[key.channel.number()];
        outstanding.messages += 1;
        outstanding.bytes += bytes;
        if redelivered { ArrivalAction::CheckOwner } else { ArrivalAction::Accept }
    }

    fn has_capacity(&self, channel: Channel, bytes: usize) -> bool {
        let (outstanding, Capacity { concurrency, max_delayed, max_delayed_bytes }) =
            (self.outstanding[channel.number()], self.capacity);
        // Twice the number of unacknowledged messages: those of a previous session are still here.
        match channel.is_delayed() {
            false => outstanding.messages < 2 * concurrency,
            true => {
                outstanding.messages < 2 * (max_delayed + concurrency)
                    && (outstanding.messages == 0 || outstanding.bytes + bytes <= max_delayed_bytes)
            }
        }
    }

    /// Adds a call of `function` that is due at `at` to the pending ones.
    pub(super) fn enqueue(
        &mut self,
        key: MessageKey,
        function: Function,
        at: UnixMillis,
        message: T,
    ) {
        if self.closed {
            self.release(key);
        } else if self.entries.contains_key(&key) {
            self.set_state(key, MessageState::Pending);
            self.last_order += 1;
            self.pending.insert((at, self.last_order), PendingMessage { key, function, message });
        }
    }

    /// Removes and returns the call that has been due for the longest time, among functions within their share: three
    /// quarters of the slots that other functions leave free, and at least one.
    pub(super) fn next(&mut self, now: UnixMillis) -> NextCall<T> {
        let due = self.pending.iter().take_while(|((at, _), _)| *at <= now);
        let next = due
            .filter(|(_, waiting)| self.may_start(&waiting.function))
            .map(|(order, _)| *order)
            .next();
        if let Some(PendingMessage { key, function, message }) =
            next.and_then(|order| self.pending.remove(&order))
        {
            *self.running.entry(function.clone()).or_default() += 1;
            self.set_state(key, MessageState::Executing(function));
            return NextCall::Ready(key, message);
        }
        match self.pending.range((now + 1, 0)..).next() {
            Some(((at, _), _)) => NextCall::NotBefore(*at),
            None => NextCall::Empty,
        }
    }

    fn may_start(&self, function: &Function) -> bool {
        let running = self.running.get(function).copied().unwrap_or_default();
        may_start(running, self.running.values().sum(), self.capacity.concurrency)
    }

    /// Removes and returns a call of `channel` that keeps the server from delivering others: one whose function has
    /// used up its share, or the one that is due last. Also returns its due time.
    pub(super) fn park(
        &mut self,
        channel: Channel,
        now: UnixMillis,
    ) -> Option<(MessageKey, UnixMillis, T)> {
        if !self.is_congested(channel) {
            return None;
        }
        self.congesting.retain(|_, until| *until > now);
        let order = match self.latest_due(channel, now) {
            Some(order) => order,
            None => {
                let due = self.pending.iter().take_while(|((at, _), _)| *at <= now);
                let (order, waiting) = due
                    .filter(|(_, waiting)| waiting.key.channel == channel)
                    .filter(|((at, _), waiting)| {
                        at + PARK_AFTER <= now || self.congesting.contains_key(&waiting.function)
                    })
                    .find(|(_, waiting)| !self.may_start(&waiting.function))?;
                let (order, function) = (*order, waiting.function.clone());
                self.congesting.insert(function, now + PARKING_PERIOD);
                order
            }
        };
        let PendingMessage { key, message, .. } = self.pending.remove(&order)?;
        self.set_state(key, MessageState::Moving);
        Some((key, order.0, message))
    }

    /// Returns whether the server may deliver no more messages of `channel` until one is finished.
    fn is_congested(&self, channel: Channel) -> bool {
        let (outstanding, Capacity { concurrency, max_delayed, max_delayed_bytes }) =
            (self.outstanding[channel.number()], self.capacity);
        match channel.is_delayed() {
            false => outstanding.messages >= concurrency,
            true => {
                outstanding.messages >= max_delayed || outstanding.bytes > max_delayed_bytes / 2
            }
        }
    }

    /// Returns the call of `channel` that is due last, if it is not due soon.
    fn latest_due(&self, channel: Channel, now: UnixMillis) -> Option<(UnixMillis, u64)> {
        let far = self.pending.range((now + NEAR_MILLIS + 1, 0)..).rev();
        let mut far =
            far.filter(|(_, waiting)| channel.is_delayed() && waiting.key.channel == channel);
        far.next().map(|(order, _)| *order)
    }

    /// Marks a message as finished. Returns the subject for its acknowledgement.
    pub(super) fn finish(&mut self, key: MessageKey) -> Option<String> {
        let ack_subject = self.entries.get(&key)?.ack_subject.clone();
        if self.set_state(key, MessageState::Finished) != Some(MessageState::Finished) {
            self.subtract_outstanding(key);
            self.finished.push_back(key);
        }
        if self.finished.len() > MAX_FINISHED_KEYS
            && let Some(oldest) = self.finished.pop_front()
        {
            self.entries.remove(&oldest);
        }
        Some(ack_subject)
    }

    /// Forgets an unfinished message: the server redelivers it, or another worker owns it.
    pub(super) fn release(&mut self, key: MessageKey) {
        if self.entries.get(&key).is_some_and(|entry| entry.state != MessageState::Finished) {
            self.set_state(key, MessageState::Moving);
            self.subtract_outstanding(key);
            self.entries.remove(&key);
        }
    }

    fn subtract_outstanding(&mut self, key: MessageKey) {
        let bytes = self.entries.get(&key).map_or(0, |entry| entry.bytes);
        let outstanding = &mut self.outstanding[key.channel.number()];
        outstanding.messages -= 1;
        outstanding.bytes -= bytes;
    }

    /// Marks a message as being moved to another channel.
    pub(super) fn mark_moving(&mut self, key: MessageKey) {
        self.set_state(key, MessageState::Moving);
    }

    /// Keeps a message that is neither executed again nor finished: the server keeps it as long as this worker lives.
    pub(super) fn mark_stuck(&mut self, key: MessageKey) {
        self.set_state(key, MessageState::Stuck);
    }

    /// Sets the state of a message. Returns the previous one.
    fn set_state(&mut self, key: MessageKey, state: MessageState) -> Option<MessageState> {
        let previous = std::mem::replace(&mut self.entries.get_mut(&key)?.state, state);
        if let MessageState::Executing(function) = &previous
            && let Some(running) = self.running.get_mut(function)
        {
            *running -= 1;
            if *running == 0 {
                self.running.remove(function);
            }
        }
        Some(previous)
    }

    /// Returns whether a message is finished; `None` if it is not here, or if its owner is still being looked up.
    pub(super) fn is_finished(&self, key: MessageKey) -> Option<bool> {
        match self.entries.get(&key)?.state {
            MessageState::CheckingOwner => None,
            MessageState::Pending
            | MessageState::Executing(_)
            | MessageState::Moving
            | MessageState::Stuck => Some(false),
            MessageState::Finished => Some(true),
        }
    }
}

#[cfg(test)]
mod tests;
