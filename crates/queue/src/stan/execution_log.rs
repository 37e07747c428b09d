//! The executions of the last hour, read from the queue's execution log. No I/O, no clock.
//!
//! NATS Streaming stores a message that is published twice as two messages. Before a worker executes a call, it writes
//! a claim to the log: this message executes this step of this call. All workers read the log in the same order, and
//! the first claim of a step wins: another message of the same step is a duplicate. A claim names the message, not the
//! worker, so after a worker's death the next worker that receives the message executes it.

use std::collections::{HashMap, VecDeque};

use ring::digest::{Context, SHA256};

use crate::call::{QueuedCall, UnixMillis};
use crate::stan::inflight::MessageKey;

/// Time (in milliseconds) for which an execution is remembered.
pub(super) const RETENTION: UnixMillis = 3_600_000;
/// Minimum of that time, whatever the difference between the clocks of the server and this machine: a claim that
/// expires before its call is executed would be written forever.
const MIN_RETENTION: UnixMillis = 120_000;
/// Maximum number of remembered executions, about 50 bytes each; the oldest are dropped first.
const MAX_STEPS: usize = 900_000;
/// Format version, the first byte of a log message.
const VERSION: u8 = 1;
/// Size of a record in bytes: step and owner.
const RECORD_BYTES: usize = 24;

/// Identity of a step of a call: an attempt, or a move to another channel. Duplicates of a call have the same steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Step([u8; 16]);

/// The message that executes a step; [`Owner::FINISHED`] after the step has finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner(u64);

/// A log record: a claim, or the end of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) step: Step,
    pub(super) owner: Owner,
}

/// State of a step in the log, from the view of one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClaimState {
    Unclaimed,
    ByThis,
    /// Claimed by another message, or finished.
    ByAnother,
}

impl Step {
    /// `attempts` and `moves` identify the step. Workers of different groups are independent.
    pub(super) fn new(call: &QueuedCall, attempts: u32, moves: u32, group: &str) -> Self {
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
    /// Marks a finished step.
    pub(super) const FINISHED: Self = Self(0);

    pub(super) fn from_key(key: MessageKey) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(&(key.channel.number() as u64).to_be_bytes());
        context.update(&key.sequence.to_be_bytes());
        context.update(&key.timestamp.to_be_bytes());
        let start = context.finish().as_ref().first_chunk().copied().unwrap_or_default();
        Self(u64::from_be_bytes(start) | 1)
    }
}

/// Encodes a log message.
pub(super) fn encode(records: &[Record]) -> Vec<u8> {
    let mut message = Vec::with_capacity(1 + records.len() * RECORD_BYTES);
    message.push(VERSION);
    for Record { step, owner } in records {
        message.extend_from_slice(&step.0);
        message.extend_from_slice(&owner.0.to_be_bytes());
    }
    message
}

/// Decodes the records of a log message; none if its version is unknown.
pub(super) fn decode(message: &[u8]) -> impl Iterator<Item = Record> {
    let records = message.strip_prefix(&[VERSION]).unwrap_or_default().chunks_exact(RECORD_BYTES);
    records.filter_map(|record| {
        let (step, owner) = record.split_first_chunk()?;
        let owner = Owner(u64::from_be_bytes(owner.try_into().ok()?));
        Some(Record { step: Step(*step), owner })
    })
}

/// The known executions.
#[derive(Default)]
pub(super) struct ExecutionLog {
    steps: HashMap<[u8; 16], Owner>,
    /// The same steps, oldest first, with the time of the claim in seconds.
    order: VecDeque<([u8; 16], u32)>,
}

impl ExecutionLog {
    /// Applies a record that was read at `now`, and written at `at` by the server's clock.
    pub(super) fn apply(&mut self, record: Record, at: UnixMillis, now: UnixMillis) {
        use std::collections::hash_map::Entry;
        let at = at.clamp(now.saturating_sub(RETENTION - MIN_RETENTION), now);
        match self.steps.entry(record.step.0) {
            Entry::Vacant(entry) => {
                entry.insert(record.owner);
                self.order.push_back((record.step.0, seconds(at)));
            }
            Entry::Occupied(mut entry) => {
                if record.owner == Owner::FINISHED {
                    entry.insert(Owner::FINISHED);
                }
            }
        }
        if self.order.len() > MAX_STEPS {
            self.forget_oldest();
        }
    }

    /// Drops executions older than an hour.
    pub(super) fn expire(&mut self, now: UnixMillis) {
        let until = seconds(now.saturating_sub(RETENTION));
        while self.order.front().is_some_and(|(_, at)| *at < until) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((step, _)) = self.order.pop_front() {
            self.steps.remove(&step);
        }
    }

    pub(super) fn claim_state(&self, step: Step, owner: Owner) -> ClaimState {
        match self.steps.get(&step.0) {
            None => ClaimState::Unclaimed,
            Some(claimant) if *claimant == owner => ClaimState::ByThis,
            Some(_) => ClaimState::ByAnother,
        }
    }
}

fn seconds(at: UnixMillis) -> u32 {
    u32::try_from(at / 1000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::CallOptions;
    use crate::stan::channels::Channel;
    use gateway_base::function::Function;

    fn owner(sequence: u64) -> Owner {
        Owner::from_key(MessageKey { channel: Channel::CALLS, sequence, timestamp: 1 })
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
        Step::new(&call, attempts, moves, "faas")
    }

    #[test]
    fn the_first_claim_of_a_step_wins_for_an_hour() {
        let (mut log, one) = (ExecutionLog::default(), step("a", "x", 0, 0));
        assert_eq!(log.claim_state(one, owner(1)), ClaimState::Unclaimed);
        log.apply(Record { step: one, owner: owner(1) }, 5000, 5000);
        log.apply(Record { step: one, owner: owner(2) }, 6000, 6000);
        assert_eq!(log.claim_state(one, owner(1)), ClaimState::ByThis);
        assert_eq!(log.claim_state(one, owner(2)), ClaimState::ByAnother);
        // A message whose step has finished is not executed again.
        log.apply(Record { step: one, owner: Owner::FINISHED }, 7000, 7000);
        assert_eq!(log.claim_state(one, owner(1)), ClaimState::ByAnother);
        log.expire(5000 + RETENTION);
        assert_eq!(log.claim_state(one, owner(1)), ClaimState::ByAnother);
        log.expire(6000 + RETENTION);
        assert_eq!(log.claim_state(one, owner(1)), ClaimState::Unclaimed);
        assert!(log.steps.is_empty() && log.order.is_empty());
    }

    #[test]
    fn clock_differences_neither_lose_a_claim_nor_keep_it_forever() {
        let one = step("a", "x", 0, 0);
        let now = 10 * RETENTION;
        for at in [0, now - 2 * RETENTION, now, now + 5 * RETENTION] {
            let mut log = ExecutionLog::default();
            log.apply(Record { step: one, owner: owner(1) }, at, now);
            log.expire(now + MIN_RETENTION);
            assert_eq!(log.claim_state(one, owner(1)), ClaimState::ByThis, "{at}");
            log.expire(now + RETENTION + 1000);
            assert_eq!(log.claim_state(one, owner(1)), ClaimState::Unclaimed, "{at}");
        }
    }

    #[test]
    fn attempts_moves_and_different_calls_with_the_same_id_are_different_steps() {
        let one = step("a", "x", 0, 0);
        assert_eq!(one, step("a", "x", 0, 0));
        for other in [step("b", "x", 0, 0), step("a", "y", 0, 0), step("a", "x", 1, 0)] {
            assert_ne!(one, other);
        }
        assert_ne!(step("a", "x", 0, 1), step("a", "x", 1, 0));
    }

    #[test]
    fn the_number_of_remembered_steps_is_limited() {
        let mut log = ExecutionLog::default();
        let step = |number: u128| Step(number.to_be_bytes());
        for number in 0..=MAX_STEPS as u128 {
            log.apply(Record { step: step(number), owner: owner(1) }, 1, 1);
        }
        assert_eq!((log.steps.len(), log.order.len()), (MAX_STEPS, MAX_STEPS));
        assert_eq!(log.claim_state(step(0), owner(1)), ClaimState::Unclaimed);
        assert_eq!(log.claim_state(step(1), owner(1)), ClaimState::ByThis);
    }

    #[test]
    fn encoded_records_are_decoded() {
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
