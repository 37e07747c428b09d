//! A delivered batch. Its calls are executed individually, and their outcomes are recorded together. The batch is
//! acknowledged when every call is finished or has its own message.
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{AcqRel, Acquire};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::AckKind;
use tokio::sync::oneshot;

use crate::call::QueuedCall;
use crate::jetstream::ack::{AckSubject, RETRY_INTERVAL, send_ack};
use crate::jetstream::batch::records::Revisioned;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::call_ref::{BatchIndex, BatchRef};
use crate::jetstream::wire::message::Message;
use crate::jetstream::wire::records::{BatchRecord, Outcome};
use crate::jetstream::{Shared, decide};
use gateway_base::sync::lock_unpoisoned;

/// Maximum time that the outcome of a call waits to be recorded together with others.
const MAX_OUTCOME_DELAY: Duration = Duration::from_millis(2);
/// Maximum number of attempts to release a call.
const MAX_RELEASE_ATTEMPTS: usize = 5;
/// Minimum interval between two in-progress acks of a batch.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// A batch that this process holds.
pub(in crate::jetstream) struct Batch {
    pub(in crate::jetstream) batch_ref: BatchRef,
    pub(in crate::jetstream) ack_subject: AckSubject,
    /// Time of the delivery, and the lease that it granted.
    received_at: Instant,
    lease: Duration,
    /// Number of calls that this process still holds.
    remaining: AtomicUsize,
    /// Outcomes of the calls. Rank 2: `pull_scheduler` of the queue is locked under it.
    inner: Mutex<Inner>,
}

struct Inner {
    record: Revisioned,
    /// The record is stored with the final states.
    archived: bool,
    pending: Vec<OutcomeUpdate>,
    /// A task is storing the record.
    writing: bool,
    /// A task will store the record after a delay.
    write_scheduled: bool,
    last_progress: Instant,
}

/// An outcome to be recorded, and the task that waits for it.
struct OutcomeUpdate {
    index: BatchIndex,
    outcome: Outcome,
    done: oneshot::Sender<Result<bool, NatsError>>,
}

impl Batch {
    pub(super) fn new(
        batch_ref: BatchRef,
        ack_subject: AckSubject,
        lease: Duration,
        record: Revisioned,
        remaining: usize,
    ) -> Arc<Self> {
        let inner = Mutex::new(Inner {
            record,
            archived: false,
            pending: Vec::new(),
            writing: false,
            write_scheduled: false,
            last_progress: Instant::now(),
        });
        let (received_at, remaining) = (Instant::now(), AtomicUsize::new(remaining));
        Arc::new(Self { batch_ref, ack_subject, received_at, lease, remaining, inner })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock_unpoisoned(&self.inner)
    }

    /// Records the outcome of a call. Returns `false` if another process has recorded a different one. Each write of
    /// the record costs a message: unless `immediately`, it is delayed for the outcomes of other calls of the batch.
    pub(in crate::jetstream) async fn record_outcome(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        index: BatchIndex,
        outcome: Outcome,
        immediately: bool,
    ) -> Result<bool, NatsError> {
        let (done, recorded) = oneshot::channel();
        {
            let mut inner = self.inner();
            inner.pending.push(OutcomeUpdate { index, outcome, done });
            self.schedule_write(&mut inner, shared, immediately);
        }
        recorded.await.unwrap_or(Err(NatsError::Unavailable))
    }

    /// Schedules a write of the pending outcomes; immediately if no more can be expected for now.
    fn schedule_write(
        self: &Arc<Self>,
        inner: &mut Inner,
        shared: &Arc<Shared>,
        immediately: bool,
    ) {
        if self.remaining.load(Acquire) == 0 {
            // The record is archived, or about to be: no task waits for these.
            inner.pending.clear();
            return;
        }
        let all = inner.pending.len() + inner.record.0.outcome_count()
            >= self.batch_ref.key.count()
            || shared.pull_scheduler().should_write_outcomes(inner.pending.len());
        if inner.writing || (inner.write_scheduled && !all && !immediately) {
            return;
        }
        let (shared, this) = (Arc::clone(shared), Arc::clone(self));
        let tasks = Arc::clone(&shared);
        if all || immediately {
            inner.writing = true;
            tasks.tasks.spawn_to_completion(async move { this.write_pending(&shared).await });
        } else {
            inner.write_scheduled = true;
            tasks.tasks.spawn_to_completion(async move {
                tokio::time::sleep(MAX_OUTCOME_DELAY).await;
                let mut inner = this.inner();
                inner.write_scheduled = false;
                if !inner.pending.is_empty() {
                    this.schedule_write(&mut inner, &shared, true);
                }
            });
        }
    }

    /// Stores the pending outcomes.
    async fn write_pending(self: &Arc<Self>, shared: &Arc<Shared>) {
        let (pending, (record, revision)) = {
            let mut inner = self.inner();
            (std::mem::take(&mut inner.pending), inner.record.clone())
        };
        let (outcomes, senders): (Vec<_>, Vec<_>) = pending
            .into_iter()
            .map(|OutcomeUpdate { index, outcome, done }| ((index, outcome), done))
            .unzip();
        let recorded = self.store_outcomes(shared, record, revision, &outcomes).await;
        let accepted = {
            let mut inner = self.inner();
            inner.writing = false;
            let accepted = recorded.map(|(record, accepted, archived)| {
                (inner.record, inner.archived) = (record, archived);
                accepted
            });
            if !inner.pending.is_empty() {
                self.schedule_write(&mut inner, shared, false);
            }
            accepted
        };
        for (number, done) in senders.into_iter().enumerate() {
            // The receiver may have been dropped.
            let _ =
                done.send(accepted.as_ref().map(|accepted| accepted[number]).map_err(Clone::clone));
        }
    }

    /// Stores outcomes. A record that is final is archived immediately; the last value tells whether it was.
    async fn store_outcomes(
        &self,
        shared: &Shared,
        record: BatchRecord,
        revision: u64,
        outcomes: &[(BatchIndex, Outcome)],
    ) -> Result<(Revisioned, Vec<bool>, bool), NatsError> {
        if let Some(last) = decide::batch::final_record(&record, self.batch_ref.key, outcomes) {
            shared.archive_record(&self.batch_ref, &last).await?;
            return Ok(((last, revision), vec![true; outcomes.len()], true));
        }
        let mut current = (record, revision);
        if revision == 0 {
            // Another process may receive this message as if it were the first delivery.
            shared.announce_dirty(self.batch_ref.key).await?;
        }
        if decide::batch::must_load(revision, self.received_at.elapsed(), self.lease) {
            current = shared.load_record(&self.batch_ref, true).await?;
        }
        let (record, accepted) =
            shared.update_record(&self.batch_ref, current, outcomes, None).await?;
        Ok((record, accepted, false))
    }

    /// Gives a call its own message, so that any worker can receive it. If that fails, the server redelivers the batch
    /// after its lease.
    pub(in crate::jetstream) async fn release(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        call: &QueuedCall,
        index: BatchIndex,
    ) {
        let headers = Message::new(call).original_headers();
        for pause in [RETRY_INTERVAL; MAX_RELEASE_ATTEMPTS] {
            match self.split_out(shared, call, index, headers.clone()).await {
                Ok(()) => return self.call_done(shared).await,
                Err(error) => {
                    tracing::debug!(%error, call_id = call.id, "Cannot split out a call");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// Gives a call its own message with these headers, unless it has an outcome.
    pub(in crate::jetstream) async fn split_out(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        call: &QueuedCall,
        index: BatchIndex,
        headers: HeaderMap,
    ) -> Result<(), NatsError> {
        // A process that receives the batch later checks whether the new message exists.
        if self.record_outcome(shared, index, Outcome::Splitting, true).await? {
            shared.publish_split(call, headers).await?;
            self.mark_split(shared, index);
        }
        Ok(())
    }

    /// Records that the call has its own message. This needs no write of its own: it is stored with the next outcome.
    pub(in crate::jetstream) fn mark_split(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        index: BatchIndex,
    ) {
        let (done, _) = oneshot::channel();
        let mut inner = self.inner();
        inner.pending.push(OutcomeUpdate { index, outcome: Outcome::Split, done });
        self.schedule_write(&mut inner, shared, false);
    }

    /// Counts down one call of the batch; the last one finishes it.
    pub(in crate::jetstream) async fn call_done(&self, shared: &Shared) {
        if self.remaining.fetch_sub(1, AcqRel) == 1 {
            self.finish(shared).await;
        }
    }

    /// Archives the record and acknowledges the batch. If the ack is lost, the next receiver finds the batch finished.
    pub(in crate::jetstream) async fn finish(&self, shared: &Shared) {
        let ((record, revision), archived) = {
            let inner = self.inner();
            (inner.record.clone(), inner.archived)
        };
        let record = decide::batch::closed(record);
        if !archived && let Err(error) = shared.archive_record(&self.batch_ref, &record).await {
            tracing::debug!(%error, "Cannot archive a batch record");
            return;
        }
        send_ack(&shared.api, &self.ack_subject.get(), AckKind::Ack).await;
        shared.dirty_batches().remove(self.batch_ref.key);
        if revision > 0
            && let Err(error) = shared.api.delete(&shared.subjects.batches, revision).await
        {
            // Garbage collection removes it later.
            tracing::debug!(%error, "Cannot remove the record of a finished batch");
        }
    }

    /// Extends the lease of the batch, unless that happened a moment ago.
    pub(in crate::jetstream) async fn in_progress(&self, shared: &Shared) {
        {
            let mut inner = self.inner();
            if inner.last_progress.elapsed() < PROGRESS_INTERVAL {
                return;
            }
            inner.last_progress = Instant::now();
        }
        send_ack(&shared.api, &self.ack_subject.get(), AckKind::Progress).await;
    }
}
