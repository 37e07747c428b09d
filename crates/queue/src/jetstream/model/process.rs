//! A worker process: it receives calls, claims, executes and settles them, in the order of production.

mod batches;
mod claims;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use crate::jetstream::decide::claim::{Action, action, may_be_settled};
use crate::jetstream::decide::location::is_final;
use crate::jetstream::decide::settle::{Step, steps};
use crate::jetstream::model::process::batches::{HeldBatch, receive_batch, settle_in_batch};
use crate::jetstream::model::process::claims::{Claims, extend_leases};
use crate::jetstream::model::requests::{
    complete_cancel, exists_elsewhere, final_sequences, next_attempt,
};
use crate::jetstream::model::server::{CallId, Delivered, Fault, LEASE, Payload, Subject};
use crate::jetstream::model::world::{Ack, World, yield_now};
use crate::jetstream::wire::call_ref::{BatchIndex, CallRef};
use crate::status::{CallState, Settlement};

/// Pause after a failure.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// Redelivery delay of a call that is being cancelled.
const CANCEL_RECHECK_DELAY: Duration = Duration::from_secs(1);
/// Maximum time between the delivery of a call and its claim.
const PREFETCH_TTL: Duration = Duration::from_secs(1);
/// Maximum number of calls that a process holds.
const MAX_HELD: usize = 4;

pub(super) struct Process {
    pub(super) world: Rc<World>,
    pub(super) number: usize,
    claims: RefCell<Claims>,
}

/// The message that contains a call.
#[derive(Clone)]
pub(super) enum Source {
    Single,
    InBatch(Rc<HeldBatch>, BatchIndex),
}

/// A call that was delivered to a process.
#[derive(Clone)]
pub(super) struct Received {
    pub(super) call: CallId,
    pub(super) sequence: u64,
    pub(super) deliveries: u32,
    pub(super) tombstone: bool,
    pub(super) source: Source,
}

impl Received {
    fn call_ref(&self) -> CallRef {
        match &self.source {
            Source::Single => CallRef::single(self.sequence),
            Source::InBatch(_, index) => CallRef::in_batch(self.sequence, *index),
        }
    }
}

/// Starts a process.
pub(super) fn start(world: &Rc<World>, number: usize) {
    world.log(|| format!("process {number} starts"));
    let records = world.server.borrow().records();
    world.dirty.borrow_mut().insert(number, records);
    let process = Rc::new(Process { world: Rc::clone(world), number, claims: RefCell::default() });
    process.spawn(receive(Rc::clone(&process)));
    process.spawn(extend_leases(Rc::clone(&process)));
}

async fn receive(process: Rc<Process>) {
    loop {
        yield_now().await;
        if process.claims.borrow().count() >= MAX_HELD {
            continue;
        }
        if let Some(delivered) = process.world.deliver(process.number) {
            process.on_message(delivered).await;
        }
    }
}

impl Process {
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.world.spawn(Some(self.number), task);
    }

    async fn on_message(self: &Rc<Self>, delivered: Delivered) {
        let Delivered { subject, payload, sequence, deliveries, .. } = delivered;
        if self.claims.borrow().holds(sequence) {
            return self.world.ack(sequence, Ack::Progress).await;
        }
        let tombstone = matches!(payload, Payload::Tombstone);
        match (subject, payload) {
            (Subject::Batch(key), Payload::Batch(calls)) => {
                let this = Rc::clone(self);
                self.spawn(async move {
                    receive_batch(&this, key, sequence, deliveries, calls).await;
                });
            }
            (Subject::Call(_), Payload::Call { due }) if due > self.world.now() => {
                let delay = due - self.world.now();
                self.world.ack(sequence, Ack::Nak(delay)).await;
            }
            (Subject::Call(call), _) => {
                let source = Source::Single;
                self.hold(Received { call, sequence, deliveries, tombstone, source });
            }
            _ => {}
        }
    }

    /// Handles a call that can be executed.
    pub(super) fn hold(self: &Rc<Self>, received: Received) {
        let (this, arrived_at) = (Rc::clone(self), self.world.now());
        self.spawn(async move {
            yield_now().await;
            if this.world.now() - arrived_at > PREFETCH_TTL {
                return this.give_back(&received, Duration::ZERO).await;
            }
            this.handle(received).await;
        });
    }

    async fn handle(self: &Rc<Self>, received: Received) {
        let claim_id = self.track(&received);
        let delay = match self.claim(&received, claim_id).await {
            Ok(Some(true)) => self.execute(&received, claim_id).await,
            Ok(Some(false)) => Some(CANCEL_RECHECK_DELAY),
            Ok(None) => None,
            Err(_) => Some(RETRY_INTERVAL),
        };
        if let Some(delay) = delay {
            self.untrack(claim_id, false);
            self.give_back(&received, delay).await;
        }
    }

    /// Claims a call. Returns whether it may be executed now, or `None` if nothing is left to do.
    async fn claim(
        self: &Rc<Self>,
        received: &Received,
        claim_id: u64,
    ) -> Result<Option<bool>, Fault> {
        let suspect = may_be_settled(received.deliveries, false);
        let finished = suspect && self.is_finished(received).await?;
        match action(finished, received.tombstone) {
            Action::Finish => {
                if let Source::InBatch(batch, index) = &received.source {
                    batch.record_splitting(self, *index).await?;
                }
                self.finish(received, claim_id).await;
                Ok(None)
            }
            Action::CompleteCancel => {
                complete_cancel(&self.world, received.call, received.sequence).await?;
                self.finish(received, claim_id).await;
                Ok(None)
            }
            Action::Claim => self.add_to_list(claim_id).await.map(Some),
        }
    }

    async fn is_finished(&self, received: &Received) -> Result<bool, Fault> {
        let (world, call) = (&self.world, received.call);
        if let Source::InBatch(..) = received.source {
            return exists_elsewhere(world, call).await;
        }
        let (dead, finished) = final_sequences(world, call).await?;
        Ok(is_final(received.sequence, dead, finished))
    }

    /// Executes a claimed call and settles it. Returns the redelivery delay if the delivery is given up.
    async fn execute(self: &Rc<Self>, received: &Received, claim_id: u64) -> Option<Duration> {
        let world = &self.world;
        let execution = world.begin(received.call, self.number);
        world.sleep(world.execution_time()).await;
        world.end(execution);
        if world.mishap(20) {
            world.log(|| format!("process {} drops call {}", self.number, received.call));
            return Some(Duration::ZERO);
        }
        let settlement = settlement(world);
        let start = world.now();
        loop {
            let settled = self.settle(received, claim_id, &settlement);
            match world.drop_sometimes(settled).await {
                // A settlement that has begun to acknowledge is not given back.
                None if !self.is_tracked(claim_id) => return None,
                None => return Some(Duration::ZERO),
                Some(Ok(())) => return None,
                Some(Err(_)) if world.now() - start > LEASE => return Some(Duration::ZERO),
                Some(Err(_)) => world.sleep(RETRY_INTERVAL).await,
            }
        }
    }

    async fn settle(
        self: &Rc<Self>,
        received: &Received,
        claim_id: u64,
        settlement: &Settlement,
    ) -> Result<(), Fault> {
        let (world, call, sequence) = (&self.world, received.call, received.sequence);
        let (state, _) = settlement.outcome();
        match &received.source {
            Source::InBatch(batch, index) => {
                settle_in_batch(self, batch, *index, call, settlement).await?;
                self.finish(received, claim_id).await;
            }
            Source::Single => {
                for step in steps(settlement) {
                    match step {
                        Step::FinalRecord => {
                            let record = Payload::FinalRecord { sequence, state };
                            world.publish(Subject::FinalRecord(call), record, None).await?;
                        }
                        Step::DeadLetter => {
                            let letter = Payload::DeadLetter { previous_seq: sequence };
                            world.publish(Subject::DeadLetter(call), letter, None).await?;
                        }
                        Step::NextAttempt => {
                            let next = next_attempt(world);
                            let stored =
                                world.publish(Subject::Call(call), next, Some(sequence)).await;
                            if stored == Err(Fault::Unavailable) {
                                return Err(Fault::Unavailable);
                            }
                        }
                        Step::Acknowledge => self.finish(received, claim_id).await,
                        // Nothing of these is in the model.
                        Step::Response
                        | Step::RemoveRedriven
                        | Step::IdempotencyKey
                        | Step::RemoveBody => {}
                    }
                }
            }
        }
        if state.is_final() {
            world.calls.borrow_mut()[call].settled = Some(state);
        }
        Ok(())
    }

    async fn finish(self: &Rc<Self>, received: &Received, claim_id: u64) {
        self.untrack(claim_id, true);
        match &received.source {
            Source::Single => self.world.ack(received.sequence, Ack::Done).await,
            Source::InBatch(batch, _) => batch.call_done(self).await,
        }
    }

    async fn give_back(self: &Rc<Self>, received: &Received, delay: Duration) {
        match &received.source {
            Source::Single => self.world.ack(received.sequence, Ack::Nak(delay)).await,
            Source::InBatch(batch, index) => {
                self.world.sleep(delay.min(LEASE / 3)).await;
                batch.release(self, *index, received.call).await;
            }
        }
    }
}

/// Picks how an execution ends.
fn settlement(world: &World) -> Settlement {
    let finished = |state| Settlement::Finished {
        state,
        status: None,
        reason: None,
        response: None,
        executed: true,
    };
    match world.random(8) {
        0 | 1 => Settlement::Retry { at: 0, status: None, reason: None },
        2 => Settlement::DeadLetter { status: None, reason: None, response: None },
        3 => finished(CallState::Failed),
        _ => finished(CallState::Succeeded),
    }
}
