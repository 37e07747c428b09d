//! Requests of several kinds of processes, in the order of production.

use std::time::{Duration, Instant};

use crate::jetstream::decide::batch::next_record;
use crate::jetstream::decide::cancel::{COMPLETION, Completion};
use crate::jetstream::model::server::{CallId, Fault, Payload, Subject};
use crate::jetstream::model::world::World;
use crate::jetstream::wire::call_ref::BatchIndex;
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::records::{BatchRecord, Outcome};
use crate::status::{CallRecord, CallState};

const MAX_RECORD_ATTEMPTS: usize = 32;

/// A record and its sequence.
pub(super) type Revisioned = (BatchRecord, u64);

/// Returns the sequences that the dead letter and the final record of a call name.
pub(super) async fn final_sequences(
    world: &World,
    call: CallId,
) -> Result<(Option<u64>, Option<u64>), Fault> {
    let dead = world.get(Subject::DeadLetter(call)).await?;
    let dead = dead.and_then(|stored| match stored.payload {
        Payload::DeadLetter { previous_seq } => Some(previous_seq),
        _ => None,
    });
    let finished = world.get(Subject::FinalRecord(call)).await?;
    let finished = finished.and_then(|stored| match stored.payload {
        Payload::FinalRecord { sequence, .. } => Some(sequence),
        _ => None,
    });
    Ok((dead, finished))
}

/// Returns whether a call of a batch has or had its own message.
pub(super) async fn exists_elsewhere(world: &World, call: CallId) -> Result<bool, Fault> {
    for subject in [Subject::Call(call), Subject::DeadLetter(call), Subject::FinalRecord(call)] {
        if world.get(subject).await?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the message of the next attempt of a call.
pub(super) fn next_attempt(world: &World) -> Payload {
    Payload::Call { due: world.now() + Duration::from_millis(world.random(3000) as u64) }
}

/// Stores the final state of a cancelled call and removes its tombstone.
pub(super) async fn complete_cancel(
    world: &World,
    call: CallId,
    sequence: u64,
) -> Result<(), Fault> {
    for step in COMPLETION {
        match step {
            Completion::FinalRecord => {
                let record = Payload::FinalRecord { sequence, state: CallState::Cancelled };
                world.publish(Subject::FinalRecord(call), record, None).await?;
            }
            Completion::IdempotencyKey => {}
            Completion::RemoveTombstone => world.delete(Subject::Call(call), sequence).await?,
        }
    }
    Ok(())
}

pub(super) async fn archive(
    world: &World,
    key: BatchKey,
    record: &BatchRecord,
) -> Result<(), Fault> {
    let record = Payload::Record(record.encode());
    world.publish(Subject::Archive(key), record, None).await.map(drop)
}

/// Announces to all processes that a call of a batch is about to be removed.
pub(super) fn announce_dirty(world: &World, key: BatchKey) {
    for keys in world.dirty.borrow_mut().values_mut() {
        keys.insert(key);
    }
}

async fn get_record(world: &World, subject: Subject) -> Result<Option<Revisioned>, Fault> {
    let stored = world.get(subject).await?;
    Ok(stored.and_then(|stored| match stored.payload {
        Payload::Record(bytes) => Some((BatchRecord::decode(bytes)?, stored.sequence)),
        _ => None,
    }))
}

/// Loads the record of a batch, with the archived one if `archived` is set.
pub(super) async fn load_record(
    world: &World,
    key: BatchKey,
    sequence: u64,
    archived: bool,
) -> Result<Revisioned, Fault> {
    let open = get_record(world, Subject::Record(key)).await?;
    let (mut record, revision) = open.unwrap_or_else(|| (BatchRecord::new(sequence), 0));
    if archived && let Some((archived, _)) = get_record(world, Subject::Archive(key)).await? {
        record.merge(archived);
    }
    Ok((record, revision))
}

/// Updates the record of a batch. Returns for each outcome whether it is now the recorded one.
pub(super) async fn update_record(
    world: &World,
    key: BatchKey,
    sequence: u64,
    current: Revisioned,
    outcomes: &[(BatchIndex, Outcome)],
    deadline: Option<Instant>,
) -> Result<(Revisioned, Vec<bool>), Fault> {
    let (mut record, mut revision) = current;
    for _ in 0..MAX_RECORD_ATTEMPTS {
        if deadline.is_some_and(|deadline| world.now() > deadline) {
            return Err(Fault::Unavailable);
        }
        let (next, accepted) = next_record(&record, outcomes);
        if next == record {
            return Ok(((record, revision), accepted));
        }
        let payload = Payload::Record(next.encode());
        match world.publish(Subject::Record(key), payload, Some(revision)).await {
            Ok(revision) => return Ok(((next, revision), accepted)),
            Err(Fault::Conflict) => {
                (record, revision) = load_record(world, key, sequence, true).await?;
            }
            Err(fault) => return Err(fault),
        }
    }
    Err(Fault::Unavailable)
}

/// The outcome of a finished call.
pub(super) fn finished(sequence: u64, call: CallId, state: CallState) -> Outcome {
    let status = CallRecord { id: call.to_string(), state, ..CallRecord::default() };
    Outcome::finished(sequence, status, None)
}
