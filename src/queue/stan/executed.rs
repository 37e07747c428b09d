//! The executions of the last hour, as the queue's log of executions tells them. No I/O, no clock.
//!
//! NATS Streaming stores a message that is published twice as two messages. Before a worker executes a call it writes a claim
//! into the log: this message executes this step of this call. All workers read the log in the same order, and the first
//! claim of a step holds: another message of the same step is a duplicate. A claim names the message and not the worker,
//! so a message whose worker has died is executed by the next worker that gets it.

use std::collections::{HashMap, VecDeque};

use ring::digest::{Context, SHA256};

use crate::queue::call::{QueuedCall, UnixMillis};
use crate::queue::stan::ledger::Key;

/// For how long an execution is remembered.
pub(super) const REMEMBERED: UnixMillis = 3_600_000;
/// However far apart the clocks of the server and of this machine are, an execution is remembered for this time at least:
/// a claim that was forgotten before its call is executed would be written again and again.
const LEAST: UnixMillis = 120_000;
/// Executions that are remembered, some 50 bytes each; the oldest are forgotten first.
const MOST: usize = 900_000;
/// The first byte of a message of the log.
const VERSION: u8 = 1;
/// The bytes of a record in the log: the step and its owner.
const RECORD: usize = 24;

/// One step on the way of a call: an attempt, or a move to another channel. Duplicates of a call have the same steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Step([u8; 16]);

/// The message that executes a step; [`Owner::NOBODY`] when the step is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner(u64);

/// A claim, or the end of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) step: Step,
    pub(super) owner: Owner,
}

/// What the log says of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claimed {
    NotYet,
    ByThis,
    /// By another message, or it is over.
    ByAnother,
}

impl Step {
    /// `attempts` and `moves` say how far the call has come. Workers of different groups have nothing to do with each other.
    pub(super) fn of(call: &QueuedCall, attempts: u32, moves: u32, group: &str) -> Self {
        let mut context = Context::new(&SHA256);
        let (digest, attempts, moves) = (call.digest(), attempts.to_string(), moves.to_string());
        for part in [group, &call.id, &digest, &attempts, &moves] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
        Self(context.finish().as_ref().first_chunk().copied().unwrap_or_default())
    }
}

impl Owner {
    /// The step is over.
    pub(super) const NOBODY: Self = Self(0);

    pub(super) fn of(key: Key) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(&(key.channel.number() as u64).to_be_bytes());
        context.update(&key.sequence.to_be_bytes());
        context.update(&key.timestamp.to_be_bytes());
        let start = context.finish().as_ref().first_chunk().copied().unwrap_or_default();
        Self(u64::from_be_bytes(start) | 1)
    }
}

/// A message of the log.
pub(super) fn encode(records: &[Record]) -> Vec<u8> {
    let mut message = Vec::with_capacity(1 + records.len() * RECORD);
    message.push(VERSION);
    for Record { step, owner } in records {
        message.extend_from_slice(&step.0);
        message.extend_from_slice(&owner.0.to_be_bytes());
    }
    message
}

/// The records of a message; none of one that is not understood.
pub(super) fn decode(message: &[u8]) -> impl Iterator<Item = Record> {
    let records = message.strip_prefix(&[VERSION]).unwrap_or_default().chunks_exact(RECORD);
    records.filter_map(|record| {
        let (step, owner) = record.split_first_chunk()?;
        let owner = Owner(u64::from_be_bytes(owner.try_into().ok()?));
        Some(Record { step: Step(*step), owner })
    })
}

/// The executions.
#[derive(Default)]
pub(super) struct Executed {
    steps: HashMap<[u8; 16], Owner>,
    /// The same, oldest first, with the second in which each was claimed.
    order: VecDeque<([u8; 16], u32)>,
}

impl Executed {
    /// Notes a record that is read at the time `now`, and was written at the time `at` of another clock.
    pub(super) fn apply(&mut self, record: Record, at: UnixMillis, now: UnixMillis) {
        use std::collections::hash_map::Entry;
        let at = at.clamp(now.saturating_sub(REMEMBERED - LEAST), now);
        match self.steps.entry(record.step.0) {
            Entry::Vacant(entry) => {
                entry.insert(record.owner);
                self.order.push_back((record.step.0, seconds(at)));
            }
            Entry::Occupied(mut entry) => {
                if record.owner == Owner::NOBODY {
                    entry.insert(Owner::NOBODY);
                }
            }
        }
        if self.order.len() > MOST {
            self.forget_oldest();
        }
    }

    /// Forgets what is older than an hour.
    pub(super) fn expire(&mut self, now: UnixMillis) {
        let until = seconds(now.saturating_sub(REMEMBERED));
        while self.order.front().is_some_and(|(_, at)| *at < until) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((step, _)) = self.order.pop_front() {
            self.steps.remove(&step);
        }
    }

    pub(super) fn claimed(&self, step: Step, owner: Owner) -> Claimed {
        match self.steps.get(&step.0) {
            None => Claimed::NotYet,
            Some(known) if *known == owner => Claimed::ByThis,
            Some(_) => Claimed::ByAnother,
        }
    }
}

fn seconds(at: UnixMillis) -> u32 {
    u32::try_from(at / 1000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function::Function;
    use crate::queue::call::CallOptions;
    use crate::queue::stan::channels::Channel;

    fn owner(sequence: u64) -> Owner {
        Owner::of(Key { channel: Channel::CALLS, sequence, timestamp: 1 })
    }

    fn step(id: &str, body: &'static str, attempts: u32, moves: u32) -> Step {
        let call = QueuedCall {
            id: id.to_owned(),
            function: Function { name: "echo".to_owned(), namespace: "fn".to_owned() },
            target: String::new(),
            headers: http::HeaderMap::new(),
            body: bytes::Bytes::from_static(body.as_bytes()),
            options: CallOptions::default(),
        };
        Step::of(&call, attempts, moves, "faas")
    }

    #[test]
    fn the_first_claim_of_a_step_holds_until_an_hour_has_passed() {
        let (mut it, one) = (Executed::default(), step("a", "x", 0, 0));
        assert_eq!(it.claimed(one, owner(1)), Claimed::NotYet);
        it.apply(Record { step: one, owner: owner(1) }, 5000, 5000);
        it.apply(Record { step: one, owner: owner(2) }, 6000, 6000);
        assert_eq!(it.claimed(one, owner(1)), Claimed::ByThis);
        assert_eq!(it.claimed(one, owner(2)), Claimed::ByAnother);
        // A message whose step is over is not executed again, either.
        it.apply(Record { step: one, owner: Owner::NOBODY }, 7000, 7000);
        assert_eq!(it.claimed(one, owner(1)), Claimed::ByAnother);
        it.expire(5000 + REMEMBERED);
        assert_eq!(it.claimed(one, owner(1)), Claimed::ByAnother);
        it.expire(6000 + REMEMBERED);
        assert_eq!(it.claimed(one, owner(1)), Claimed::NotYet);
        assert!(it.steps.is_empty() && it.order.is_empty());
    }

    #[test]
    fn clocks_that_differ_neither_lose_a_claim_nor_keep_it_for_ever() {
        let one = step("a", "x", 0, 0);
        let now = 10 * REMEMBERED;
        for at in [0, now - 2 * REMEMBERED, now, now + 5 * REMEMBERED] {
            let mut it = Executed::default();
            it.apply(Record { step: one, owner: owner(1) }, at, now);
            it.expire(now + LEAST);
            assert_eq!(it.claimed(one, owner(1)), Claimed::ByThis, "{at}");
            it.expire(now + REMEMBERED + 1000);
            assert_eq!(it.claimed(one, owner(1)), Claimed::NotYet, "{at}");
        }
    }

    #[test]
    fn attempts_moves_and_other_calls_under_the_same_id_are_steps_of_their_own() {
        let one = step("a", "x", 0, 0);
        assert_eq!(one, step("a", "x", 0, 0));
        for other in [step("b", "x", 0, 0), step("a", "y", 0, 0), step("a", "x", 1, 0)] {
            assert_ne!(one, other);
        }
        assert_ne!(step("a", "x", 0, 1), step("a", "x", 1, 0));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut it = Executed::default();
        let step = |number: u128| Step(number.to_be_bytes());
        for number in 0..=MOST as u128 {
            it.apply(Record { step: step(number), owner: owner(1) }, 1, 1);
        }
        assert_eq!((it.steps.len(), it.order.len()), (MOST, MOST));
        assert_eq!(it.claimed(step(0), owner(1)), Claimed::NotYet);
        assert_eq!(it.claimed(step(1), owner(1)), Claimed::ByThis);
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        let records: Vec<Record> = (0..3)
            .map(|number| Record { step: step("a", "x", number, 0), owner: owner(number.into()) })
            .collect();
        let message = encode(&records);
        assert_eq!(decode(&message).collect::<Vec<_>>(), records);
        for message in [&b""[..], b"\x02xxxxxxxxxxxxxxxxxxxxxxxx", b"\x01short"] {
            assert_eq!(decode(message).count(), 0, "{message:?}");
        }
    }
}
