//! Clients: they publish and cancel calls, in the order of production.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Instant;

use crate::jetstream::decide::cancel::{Removal, removal, removal_timeout};
use crate::jetstream::decide::location::{Place, PlaceInBatch, is_final, latest, place_in_batch};
use crate::jetstream::model::requests::{
    announce_dirty, archive, complete_cancel, final_sequences, finished, load_record, update_record,
};
use crate::jetstream::model::server::{CallId, Fault, Payload, Stored, Subject};
use crate::jetstream::model::world::{Call, World};
use crate::jetstream::wire::call_ref::{BatchIndex, CallRef};
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::records::BatchRecord;
use crate::status::CallState;

/// Maximum number of lookups while the call moves.
const MAX_LOOKUPS: usize = 3;

/// Where a call was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Pending(Pending),
    DeadLetter,
    Finished(CallState),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    sequence: u64,
    tombstone: bool,
    in_batch: Option<(BatchKey, BatchIndex)>,
}

/// Publishes a call that has its own message.
pub(super) async fn publish_single(world: Rc<World>) {
    let call = add_call(&world, None);
    let message = Payload::Call { due: world.now() };
    let stored = world.publish(Subject::Call(call), message, Some(0)).await;
    world.calls.borrow_mut()[call].published = stored.is_ok();
}

/// Publishes several calls as a batch.
pub(super) async fn publish_batch(world: Rc<World>) {
    let count = 2 + world.random(3);
    let first = world.calls.borrow().len();
    let token = format!("+{:012x}", first << 6 | (count - 1));
    let Some(key) = BatchKey::from_token(&token) else { return };
    let calls: Vec<_> =
        (0..count as BatchIndex).map(|index| add_call(&world, Some((key, index)))).collect();
    let stored = world.publish(Subject::Batch(key), Payload::Batch(calls.clone()), Some(0)).await;
    for call in calls {
        world.calls.borrow_mut()[call].published = stored.is_ok();
    }
}

fn add_call(world: &World, batch: Option<(BatchKey, BatchIndex)>) -> CallId {
    let mut calls = world.calls.borrow_mut();
    calls.push(Call { batch, ..Call::default() });
    calls.len() - 1
}

/// Cancels a call.
pub(super) async fn cancel(world: Rc<World>, call: CallId) {
    world.log(|| format!("call {call} shall be cancelled"));
    let cancelled = try_cancel(&world, call).await;
    world.log(|| format!("call {call} cancelled: {cancelled:?}"));
    if cancelled == Ok(true) {
        world.calls.borrow_mut()[call].cancelled = true;
    }
}

async fn try_cancel(world: &World, call: CallId) -> Result<bool, Fault> {
    for _ in 0..MAX_LOOKUPS {
        match find(world, call).await? {
            Some(Found::Pending(pending)) if pending.tombstone => {
                complete_cancel(world, call, pending.sequence).await?;
                return Ok(true);
            }
            Some(Found::Pending(pending)) => {
                if let Some(changed) = cancel_pending(world, call, pending).await? {
                    return Ok(changed);
                }
            }
            None | Some(Found::DeadLetter | Found::Finished(_)) => return Ok(false),
        }
    }
    Ok(false)
}

/// Cancels an unfinished call. Returns `None` if it has moved.
async fn cancel_pending(
    world: &World,
    call: CallId,
    pending: Pending,
) -> Result<Option<bool>, Fault> {
    let index = pending.in_batch.map(|(_, index)| index);
    let call_ref = CallRef { sequence: pending.sequence, index };
    let start = world.now();
    let marker = match world.publish(Subject::Marker(call_ref), Payload::Marker, Some(0)).await {
        Ok(marker) => marker,
        Err(Fault::Conflict) => return Ok(None),
        Err(fault) => return Err(fault),
    };
    let changed = match running_calls(world).await {
        Ok(running) if running.contains(&call_ref) => Ok(Some(false)),
        Ok(_) => remove_pending(world, call, pending, start).await,
        Err(fault) => Err(fault),
    };
    match changed {
        Ok(Some(true)) | Err(_) => {}
        Ok(_) => drop(world.delete(Subject::Marker(call_ref), marker).await),
    }
    changed
}

async fn running_calls(world: &World) -> Result<BTreeSet<CallRef>, Fault> {
    let lists = world.request(|server, now| Ok(server.lists(now))).await?;
    let mut running = BTreeSet::new();
    for list in lists {
        if let Some(Stored { payload: Payload::List(list), .. }) = world.get(list).await? {
            running.extend(list.call_refs().map(|(call_ref, _)| call_ref));
        }
    }
    Ok(running)
}

async fn remove_pending(
    world: &World,
    call: CallId,
    pending: Pending,
    start: Instant,
) -> Result<Option<bool>, Fault> {
    let sequence = pending.sequence;
    if let Some((key, index)) = pending.in_batch {
        let outcome = finished(sequence, call, CallState::Cancelled);
        announce_dirty(world, key);
        let record = load_record(world, key, sequence, true).await?;
        let deadline = Some(start + removal_timeout());
        let outcomes = [(index, outcome)];
        let ((record, _), accepted) =
            update_record(world, key, sequence, record, &outcomes, deadline).await?;
        if accepted == [true] && record.is_final(key) {
            archive(world, key, &record).await?;
            world.delete(Subject::Batch(key), sequence).await?;
        }
        return Ok((accepted == [true]).then_some(true));
    }
    let stored = world.get(Subject::Call(call)).await?.map(|stored| stored.sequence);
    let (dead, finished) = final_sequences(world, call).await?;
    let finished = is_final(sequence, dead, finished);
    match removal(sequence, stored, finished, world.now() - start) {
        Removal::Allowed => {}
        Removal::Moved => return Ok(None),
        Removal::TooLate => return Err(Fault::Unavailable),
    }
    match world.publish(Subject::Call(call), Payload::Tombstone, Some(sequence)).await {
        Ok(tombstone) => drop(complete_cancel(world, call, tombstone).await),
        Err(Fault::Conflict) => return Ok(None),
        Err(fault) => return Err(fault),
    }
    Ok(Some(true))
}

/// Finds a call.
pub(super) async fn find(world: &World, call: CallId) -> Result<Option<Found>, Fault> {
    let batch = world.calls.borrow()[call].batch;
    let Some((key, index)) = batch else { return find_single(world, call).await };
    let message = world.get(Subject::Batch(key)).await?.map(|stored| stored.sequence);
    let mut record = None::<BatchRecord>;
    for subject in [Subject::Record(key), Subject::Archive(key)] {
        if let Some(Stored { payload: Payload::Record(bytes), .. }) = world.get(subject).await?
            && let Some(found) = BatchRecord::decode(bytes)
        {
            match &mut record {
                Some(record) => record.merge(found),
                None => record = Some(found),
            }
        }
    }
    let in_batch = Some((key, index));
    let pending =
        message.map(|sequence| Found::Pending(Pending { sequence, tombstone: false, in_batch }));
    let moving = match record {
        None => match pending {
            Some(pending) => return Ok(Some(pending)),
            None => None,
        },
        Some(record) => {
            let mut records = record.final_records();
            let id = call.to_string();
            if let Some((_, end, _)) = records.find(|(_, end, _)| end.status.id == id) {
                return Ok(Some(Found::Finished(end.status.state)));
            }
            let outcome = message.and_then(|_| record.get(index));
            match place_in_batch(outcome, message.is_some()) {
                PlaceInBatch::Batch => return Ok(pending),
                PlaceInBatch::Splitting => pending,
                PlaceInBatch::Elsewhere => None,
                PlaceInBatch::Purged => return Ok(None),
            }
        }
    };
    Ok(find_single(world, call).await?.or(moving))
}

async fn find_single(world: &World, call: CallId) -> Result<Option<Found>, Fault> {
    for _ in 0..2 {
        let pending = world.get(Subject::Call(call)).await?;
        let (dead, finished) = final_sequences(world, call).await?;
        let sequence = pending.as_ref().map(|stored| stored.sequence);
        match latest(sequence, dead, finished) {
            Some(Place::DeadLetter) => return Ok(Some(Found::DeadLetter)),
            Some(Place::FinalRecord) => {
                let record = world.get(Subject::FinalRecord(call)).await?;
                return Ok(record.and_then(|stored| match stored.payload {
                    Payload::FinalRecord { state, .. } => Some(Found::Finished(state)),
                    _ => None,
                }));
            }
            Some(Place::Message) => {
                return Ok(pending.map(|Stored { sequence, payload, .. }| {
                    let tombstone = matches!(payload, Payload::Tombstone);
                    Found::Pending(Pending { sequence, tombstone, in_batch: None })
                }));
            }
            None => {}
        }
    }
    Ok(None)
}
