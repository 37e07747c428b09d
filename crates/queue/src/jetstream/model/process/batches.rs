//! A batch that a process holds.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::jetstream::decide;
use crate::jetstream::decide::batch::{Remaining, remaining};
use crate::jetstream::decide::claim::may_be_settled;
use crate::jetstream::decide::settle::{BatchStep, batch_steps};
use crate::jetstream::model::process::{Process, RETRY_INTERVAL, Received, Source};
use crate::jetstream::model::requests::{
    Revisioned, announce_dirty, archive, exists_elsewhere, finished, load_record, next_attempt,
    update_record,
};
use crate::jetstream::model::server::{CallId, Fault, LEASE, Payload, Subject};
use crate::jetstream::model::world::{Ack, World, wait_for};
use crate::jetstream::wire::call_ref::BatchIndex;
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::records::{BatchRecord, Outcome};
use crate::status::Settlement;

const MAX_RELEASE_ATTEMPTS: usize = 5;
type Recorded = Rc<Cell<Option<Result<bool, Fault>>>>;

pub(in crate::jetstream::model) struct HeldBatch {
    key: BatchKey,
    sequence: u64,
    received_at: Instant,
    remaining: Cell<usize>,
    record: RefCell<Revisioned>,
    archived: Cell<bool>,
    pending: RefCell<Vec<(BatchIndex, Outcome, Recorded)>>,
    writing: Cell<bool>,
}

/// Handles a delivered batch.
pub(in crate::jetstream::model) async fn receive_batch(
    process: &Rc<Process>,
    key: BatchKey,
    sequence: u64,
    deliveries: u32,
    calls: Vec<CallId>,
) {
    let world = &process.world;
    let received_at = world.now();
    let suspect = may_be_settled(deliveries, false);
    let is_dirty =
        || world.dirty.borrow().get(&process.number).is_some_and(|keys| keys.contains(&key));
    let record = match suspect || is_dirty() {
        true => load_record(world, key, sequence, suspect).await,
        false => Ok((BatchRecord::new(sequence), 0)),
    };
    let Ok(record) = record else {
        return world.ack(sequence, Ack::Nak(RETRY_INTERVAL)).await;
    };
    let (mut unfinished, mut splitting) = (Vec::new(), Vec::new());
    for (index, call) in (0..).zip(calls) {
        match remaining(&record.0, index) {
            Remaining::Execute => unfinished.push((index, call)),
            Remaining::CompleteSplit => splitting.push((index, call)),
            Remaining::Nothing => {}
        }
    }
    let batch = Rc::new(HeldBatch {
        key,
        sequence,
        received_at,
        remaining: Cell::new(unfinished.len() + splitting.len()),
        record: RefCell::new(record),
        archived: Cell::new(false),
        pending: RefCell::default(),
        writing: Cell::new(false),
    });
    if batch.remaining.get() == 0 {
        return batch.finish(world).await;
    }
    for (index, call) in unfinished {
        let source = Source::InBatch(Rc::clone(&batch), index);
        process.hold(Received { call, sequence, deliveries, tombstone: false, source });
    }
    for (index, call) in splitting {
        if complete_split(world, call).await.is_ok() {
            batch.mark_split(process, index);
            batch.call_done(process).await;
        }
    }
}

async fn complete_split(world: &World, call: CallId) -> Result<(), Fault> {
    if exists_elsewhere(world, call).await? {
        return Ok(());
    }
    publish_split(world, call, Payload::Call { due: world.now() }).await
}

async fn publish_split(world: &World, call: CallId, message: Payload) -> Result<(), Fault> {
    match world.publish(Subject::Call(call), message, Some(0)).await {
        Err(Fault::Unavailable) => Err(Fault::Unavailable),
        Ok(_) | Err(Fault::Conflict) => Ok(()),
    }
}

/// Stores the settlement of a call in a batch.
pub(in crate::jetstream::model) async fn settle_in_batch(
    process: &Rc<Process>,
    batch: &Rc<HeldBatch>,
    index: BatchIndex,
    call: CallId,
    settlement: &Settlement,
) -> Result<(), Fault> {
    let world = &process.world;
    for step in batch_steps(settlement) {
        match step {
            BatchStep::Response => {}
            BatchStep::Finished => {
                let (state, _) = settlement.outcome();
                let outcome = finished(batch.sequence, call, state);
                batch.record_outcome(process, index, outcome).await?;
            }
            BatchStep::Splitting => {
                if !batch.record_splitting(process, index).await? {
                    break;
                }
            }
            BatchStep::DeadLetter => {
                let letter = Payload::DeadLetter { previous_seq: 0 };
                world.publish(Subject::DeadLetter(call), letter, None).await?;
            }
            BatchStep::OwnMessage => publish_split(world, call, next_attempt(world)).await?,
            BatchStep::Split => batch.mark_split(process, index),
        }
    }
    Ok(())
}

impl HeldBatch {
    pub(in crate::jetstream::model) async fn record_splitting(
        self: &Rc<Self>,
        process: &Rc<Process>,
        index: BatchIndex,
    ) -> Result<bool, Fault> {
        self.record_outcome(process, index, Outcome::Splitting).await
    }

    async fn record_outcome(
        self: &Rc<Self>,
        process: &Rc<Process>,
        index: BatchIndex,
        outcome: Outcome,
    ) -> Result<bool, Fault> {
        let done = Rc::new(Cell::new(None));
        self.pending.borrow_mut().push((index, outcome, Rc::clone(&done)));
        self.schedule_write(process);
        wait_for(|| done.get()).await
    }

    fn mark_split(self: &Rc<Self>, process: &Rc<Process>, index: BatchIndex) {
        self.pending.borrow_mut().push((index, Outcome::Split, Rc::default()));
        self.schedule_write(process);
    }

    fn schedule_write(self: &Rc<Self>, process: &Rc<Process>) {
        if self.remaining.get() == 0 {
            self.pending.borrow_mut().clear();
        } else if !self.writing.replace(true) {
            let (this, process_) = (Rc::clone(self), Rc::clone(process));
            process.spawn(async move {
                // Outcomes of other calls may join.
                process_.world.sleep(Duration::from_millis(2)).await;
                this.write_pending(&process_).await;
            });
        }
    }

    async fn write_pending(self: &Rc<Self>, process: &Rc<Process>) {
        let pending = std::mem::take(&mut *self.pending.borrow_mut());
        let outcomes: Vec<_> =
            pending.iter().map(|(index, outcome, _)| (*index, outcome.clone())).collect();
        let recorded = self.store_outcomes(&process.world, &outcomes).await;
        self.writing.set(false);
        for (number, (.., done)) in pending.into_iter().enumerate() {
            done.set(Some(recorded.as_ref().map(|accepted| accepted[number]).map_err(|f| *f)));
        }
        if !self.pending.borrow().is_empty() {
            self.schedule_write(process);
        }
    }

    async fn store_outcomes(
        &self,
        world: &World,
        outcomes: &[(BatchIndex, Outcome)],
    ) -> Result<Vec<bool>, Fault> {
        let (record, revision) = self.record.borrow().clone();
        if let Some(last) = decide::batch::final_record(&record, self.key, outcomes) {
            archive(world, self.key, &last).await?;
            *self.record.borrow_mut() = (last, revision);
            self.archived.set(true);
            return Ok(vec![true; outcomes.len()]);
        }
        let mut current = (record, revision);
        if revision == 0 {
            announce_dirty(world, self.key);
        }
        if decide::batch::must_load(revision, world.now() - self.received_at, LEASE) {
            current = load_record(world, self.key, self.sequence, true).await?;
        }
        let (record, accepted) =
            update_record(world, self.key, self.sequence, current, outcomes, None).await?;
        *self.record.borrow_mut() = record;
        self.archived.set(false);
        Ok(accepted)
    }

    /// Gives a call its own message.
    pub(in crate::jetstream::model) async fn release(
        self: &Rc<Self>,
        process: &Rc<Process>,
        index: BatchIndex,
        call: CallId,
    ) {
        let world = &process.world;
        for _ in 0..MAX_RELEASE_ATTEMPTS {
            let split = async {
                if self.record_splitting(process, index).await? {
                    publish_split(world, call, Payload::Call { due: world.now() }).await?;
                    self.mark_split(process, index);
                }
                Ok::<_, Fault>(())
            };
            if split.await.is_ok() {
                return self.call_done(process).await;
            }
            world.sleep(RETRY_INTERVAL).await;
        }
    }

    pub(in crate::jetstream::model) async fn call_done(self: &Rc<Self>, process: &Rc<Process>) {
        self.remaining.set(self.remaining.get() - 1);
        if self.remaining.get() == 0 {
            self.finish(&process.world).await;
        }
    }

    async fn finish(&self, world: &World) {
        let (record, revision) = self.record.borrow().clone();
        let record = decide::batch::closed(record);
        if !self.archived.get() && archive(world, self.key, &record).await.is_err() {
            return;
        }
        world.ack(self.sequence, Ack::Done).await;
        if revision > 0 {
            let _ = world.delete(Subject::Record(self.key), revision).await;
        }
    }
}
