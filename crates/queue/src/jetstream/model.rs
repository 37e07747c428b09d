//! A model test of the order of writes. Publishers, workers and cancellations run on a model of the server. Their next
//! step is chosen at random. Between any two requests, processes crash, are suspended, give up deliveries or settlements,
//! or lose requests and responses. The decisions are those of production (`decide`, `BatchRecord`, `RunningList`).
//!
//! It checks that no call is lost; that no call is executed twice at the same time, except after a lost lease; that none
//! is executed after its cancellation was confirmed; and that each ends in exactly one final state. The exceptions are
//! the known gaps of batches, which README.md of this backend lists.
//!
//! The test fails with each of these mutations:
//!
//! - `SeenMarkers::may_be_cancelled` returns `false`: a claim ignores cancel markers.
//! - `may_be_settled` returns `false`: a redelivered call is not looked up.
//! - `steps`: `Acknowledge` comes before `FinalRecord`, or before `DeadLetter`.
//! - `batch_steps`: a dead letter has no `Splitting`.
//! - `remaining` returns `Execute` for `Finished`, or `Nothing` for `Splitting`.
//! - `final_record` in `decide/batch.rs` does not check that the record is final.
//! - `COMPLETION` begins with `RemoveTombstone`.
//! - The server does not check revisions of calls, or of records.
//! - A cancellation does not read the running lists.

mod operations;
mod process;
mod requests;
mod server;
mod world;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use crate::jetstream::model::operations::{Found, cancel, find, publish_batch, publish_single};
use crate::jetstream::model::server::{CallId, LEASE, Payload, Stored, Subject};
use crate::jetstream::model::world::World;
use crate::jetstream::wire::records::{BatchRecord, Outcome};
use crate::status::CallState;

/// Number of random histories, and of steps in each.
const SEEDS: u64 = 400;
const STEPS: usize = 1200;
/// Number of processes at a time.
const PROCESSES: usize = 3;
/// Maximum number of rounds until all calls have ended.
const MAX_ROUNDS: usize = 3000;

#[test]
fn no_interleaving_loses_a_call_or_executes_it_wrongly() {
    for seed in 0..SEEDS {
        if run(seed, false).first_violation().is_some() {
            let world = run(seed, true);
            let violation = world.first_violation().unwrap_or_default();
            panic!("seed {seed}: {violation}\n{}", world.history());
        }
    }
}

fn run(seed: u64, with_history: bool) -> Rc<World> {
    let world = World::new(seed, with_history);
    let mut processes: Vec<usize> = (0..PROCESSES).collect();
    processes.iter().for_each(|number| process::start(&world, *number));
    let mut started = PROCESSES;
    for _ in 0..STEPS {
        match world.random(200) {
            0..2 => world.spawn(None, publish_single(Rc::clone(&world))),
            2..4 => world.spawn(None, publish_batch(Rc::clone(&world))),
            4..8 if !world.calls.borrow().is_empty() => {
                let call = world.random(world.calls.borrow().len());
                world.spawn(None, cancel(Rc::clone(&world), call));
            }
            8 => {
                let dead = world.random(PROCESSES);
                world.crash(processes[dead]);
                processes[dead] = started;
                process::start(&world, started);
                started += 1;
            }
            9 if world.random(3) == 0 => {
                // Longer, a cancel marker could expire before the process continues.
                let limit = LEASE.as_millis() as usize * 2;
                let time = Duration::from_millis(world.random(limit) as u64);
                world.stall(processes[world.random(PROCESSES)], time);
            }
            10..40 => world.advance(Duration::from_millis(world.random(120) as u64)),
            _ => world.poll_task(world.random(world.task_count())),
        }
    }
    world.chaos.set(false);
    let mut rounds = 0;
    while !(all_ended(&world) && rounds % 100 == 99) && rounds < MAX_ROUNDS {
        world.poll_all();
        rounds += 1;
    }
    check_ends(&world);
    world
}

fn all_ended(world: &World) -> bool {
    world.server.borrow().queued().is_empty()
}

/// Checks that each call has ended, in one final state, and in the one that was reported.
fn check_ends(world: &Rc<World>) {
    for subject in world.server.borrow().queued() {
        world.violation(format!("{subject:?} is never removed"));
    }
    let count = world.calls.borrow().len();
    for call in 0..count {
        let found = Rc::new(RefCell::new(None));
        let (this, result) = (Rc::clone(world), Rc::clone(&found));
        world.spawn(None, async move { *result.borrow_mut() = Some(find(&this, call).await) });
        while found.borrow().is_none() {
            world.poll_all();
        }
        let found = found.take().and_then(Result::ok).flatten();
        check_end(world, call, found);
    }
}

fn check_end(world: &World, call: CallId, found: Option<Found>) {
    let state = world.calls.borrow()[call].clone();
    let ends = ends(world, call);
    let end = match found {
        Some(Found::Finished(end)) => Some(end),
        Some(Found::DeadLetter) => Some(CallState::Failed),
        Some(Found::Pending(_)) | None => None,
    };
    // Both processes, or both executions, may have settled it.
    let may_differ = state.lease_lost || state.repeated;
    // One process splits it out of its batch and dies, the other one finishes the batch.
    let split_twice = state.lease_lost && state.batch.is_some();
    if state.published && end.is_none() && !split_twice {
        return world.violation(format!("call {call} is lost: {found:?}"));
    }
    if ends > 1 && !may_differ {
        world.violation(format!("call {call} has {ends} final states"));
    }
    if world.server.borrow().changed.contains(&call) && !may_differ {
        world.violation(format!("the final state of call {call} changes"));
    }
    if state.cancelled && end != Some(CallState::Cancelled) && !may_differ {
        world.violation(format!("call {call} was cancelled, and is {end:?}"));
    }
    if let Some(settled) = state.settled
        && end != Some(settled)
        && !may_differ
    {
        world.violation(format!("call {call} was reported as {settled:?}, and is {end:?}"));
    }
}

/// Returns the number of final states that are stored of a call.
fn ends(world: &World, call: CallId) -> usize {
    let (server, now) = (world.server.borrow(), world.now());
    let single = [Subject::DeadLetter(call), Subject::FinalRecord(call)];
    let single = single.into_iter().filter(|subject| server.get(*subject, now).is_some()).count();
    let Some((key, index)) = world.calls.borrow()[call].batch else { return single };
    let archived = match server.get(Subject::Archive(key), now) {
        Some(Stored { payload: Payload::Record(bytes), .. }) => BatchRecord::decode(bytes.clone()),
        _ => None,
    };
    let finished =
        archived.is_some_and(|record| matches!(record.get(index), Some(Outcome::Finished { .. })));
    single + usize::from(finished)
}
