//! The thread that writes the file. Operations that arrive during a commit form the next one: one `fsync` for all
//! (group commit).

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::call::UnixMillis;
use crate::embedded::schedule::CallSeq;
use crate::embedded::settle_write::{SettleWrite, requires_id_index};
use crate::embedded::state::{Claim, QueueState};
use crate::embedded::tables::Result as StoreResult;
use crate::embedded::write_txn::WriteTxn;
use crate::embedded::{Shared, result_codec};
use crate::reply_batch::{Reply, ReplyBatch};
use crate::status::{CallRecord, CallState};
use crate::{ChangeOutcome, Error, MemoryPermit, Published, now};

/// Maximum number of operations per commit.
const MAX_OPS_PER_COMMIT: usize = 512;
/// Clients whose operations were committed together often send the next ones together. If far fewer operations have
/// arrived than in the last commit, the writer waits this long for more.
const BATCH_WAIT: Duration = Duration::from_micros(100);
/// Maximum number of expired entries that are removed per commit.
const MAX_EXPIRED_PER_COMMIT: usize = 1000;

/// A call to enqueue.
pub(super) struct PublishRequest {
    pub(super) id: String,
    /// The number contained in the id; `None` if the client chose the id.
    pub(super) number: Option<CallSeq>,
    pub(super) key: Option<String>,
    pub(super) label: String,
    pub(super) digest: Option<String>,
    pub(super) due: UnixMillis,
    pub(super) encoded: Bytes,
    /// Held until the call is written or refused, even if the client has gone.
    pub(super) _permit: Option<MemoryPermit>,
}

/// An operation of the writer.
pub(super) enum WriteOp {
    Publish(PublishRequest, Reply<Published>),
    Settle(Claim, SettleWrite, Reply<()>),
    Cancel(String, Reply<ChangeOutcome>),
    Redrive(String, Reply<ChangeOutcome>),
    /// Deletes calls that do not run, and their results.
    Purge(Vec<String>, Reply<u64>),
    /// Removes some expired entries. The reply says whether there are more.
    Expire(Reply<bool>),
    /// Closes the file and ends the writer.
    Close(Reply<()>),
}

impl WriteOp {
    /// Approximate number of bytes that the operation writes.
    pub(super) fn length(&self) -> usize {
        const KEY_BYTES: usize = 256;
        KEY_BYTES
            + match self {
                Self::Publish(call, _) => call.encoded.len(),
                Self::Settle(_, SettleWrite::Finished { record, .. }, _) => record.len(),
                Self::Settle(_, SettleWrite::Retry { record_json, .. }, _) => record_json.len(),
                Self::Settle(_, SettleWrite::DeadLetter { record_json, record, .. }, _) => {
                    record_json.len() + record.len()
                }
                _ => 0,
            }
    }

    fn fail(self, error: Error) {
        match self {
            Self::Publish(_, reply) => reply.send(Err(error)),
            Self::Settle(.., reply) => reply.send(Err(error)),
            Self::Cancel(_, reply) | Self::Redrive(_, reply) => reply.send(Err(error)),
            Self::Purge(_, reply) => reply.send(Err(error)),
            Self::Expire(reply) => reply.send(Err(error)),
            Self::Close(reply) => reply.send(Err(error)),
        }
    }
}

/// Runs the writer until all senders are gone or the file is closed.
pub(super) fn run(shared: &Arc<Shared>, mut ops: mpsc::Receiver<WriteOp>) {
    let _end = PanicGuard(shared);
    let mut last_batch_size = 0;
    while let Some(first) = ops.blocking_recv() {
        let mut batch = OpBatch::default();
        batch.add(first);
        batch.drain_ready(&mut ops);
        if batch.ops.len() * 2 < last_batch_size && batch.closing.is_none() {
            std::thread::sleep(BATCH_WAIT);
            batch.drain_ready(&mut ops);
        }
        last_batch_size = batch.ops.len();
        write(shared, batch.ops);
        if let Some(reply) = batch.closing {
            shared.close_finally();
            return reply.send(Ok(()));
        }
    }
}

/// Operations of one commit.
#[derive(Default)]
struct OpBatch {
    ops: Vec<WriteOp>,
    /// Set if the file is to be closed after the commit.
    closing: Option<Reply<()>>,
}

impl OpBatch {
    fn add(&mut self, op: WriteOp) {
        match op {
            WriteOp::Close(reply) => self.closing = Some(reply),
            op => self.ops.push(op),
        }
    }

    /// Adds operations that have arrived, up to the limit.
    fn drain_ready(&mut self, ops: &mut mpsc::Receiver<WriteOp>) {
        while self.ops.len() < MAX_OPS_PER_COMMIT && self.closing.is_none() {
            let Ok(op) = ops.try_recv() else { break };
            self.add(op);
        }
    }
}

/// Logs a panic of the thread. After that the process must be restarted to enqueue calls.
struct PanicGuard<'a>(&'a Shared);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.usable.store(false, Relaxed);
            tracing::error!(
                "The thread that writes the queue's file panicked: restart this process"
            );
        }
    }
}

fn write(shared: &Arc<Shared>, mut ops: Vec<WriteOp>) {
    // These clients have gone and would never learn that their call was enqueued.
    ops.retain(|op| !matches!(op, WriteOp::Publish(_, reply) if reply.is_closed()));
    let full = shared.is_disk_full();
    let refused = ops.extract_if(.., |op| full && matches!(op, WriteOp::Publish(..)));
    refused.for_each(|op| op.fail(Error::NoSpace));
    if !full {
        return commit(shared, ops);
    }
    let (mut ops, mut has_evicted) = (VecDeque::from(ops), false);
    while !ops.is_empty() {
        // Earlier chunks may have used the reserve.
        if !has_evicted && shared.pressure.reserve.is_low() {
            shared.evict_results();
            has_evicted = true;
        }
        if let Some(chunk) = shared.pressure.next_chunk(&mut ops) {
            commit(shared, chunk);
        }
    }
}

/// Writes `ops` in one transaction.
fn commit(shared: &Arc<Shared>, mut ops: Vec<WriteOp>) {
    if ops.is_empty() {
        return;
    }
    let length: usize = ops.iter().map(WriteOp::length).sum();
    let enqueues = ops.iter().any(|op| matches!(op, WriteOp::Publish(..)));
    let settles = ops.iter().any(|op| !matches!(op, WriteOp::Publish(..) | WriteOp::Expire(_)));
    let full = shared.pressure.is_full();
    // The reserve is for calls that are queued already. A large commit could use all of it and fail nevertheless, and
    // the queue's file would keep the space. Once the disk is known to be full, the commit is repeated in chunks.
    let is_small = length <= shared.pressure.reserve.max_commit_bytes();
    shared.pressure.reserve.set_usable(!enqueues && (full || is_small));
    let now = now();
    let mut cancelled = Vec::new();
    let changed = shared.write(|txn| {
        let cancelled = &mut cancelled;
        let mut transaction = Transaction { shared, now, added: HashSet::new(), cancelled, txn };
        ops.iter().map(|op| transaction.apply(op)).collect::<StoreResult<Vec<OpResult>>>()
    });
    shared.pressure.reserve.set_usable(true);
    match changed {
        Ok(applied) => {
            let (mut state, mut replies) = (shared.state(), ReplyBatch::default());
            for (op, applied) in ops.into_iter().zip(applied) {
                applied.apply_in_memory(op, &mut state, &mut replies);
            }
            drop(state);
            replies.send();
            shared.ready.notify_one();
            if full && settles {
                shared.on_space_freed();
            }
        }
        Err(error) => {
            tracing::error!(%error, calls = ops.len(), "The queue's file cannot be written");
            let mut state = shared.state();
            for (number, status) in cancelled {
                state.undo_cancel(number, &status);
            }
            drop(state);
            let disk_became_full = error == Error::NoSpace && !full;
            if disk_became_full {
                shared.pressure.enter(if enqueues { length } else { 0 });
                // Reopening the file takes time and does not help these calls.
                let refused = ops.extract_if(.., |op| matches!(op, WriteOp::Publish(..)));
                refused.for_each(|op| op.fail(Error::NoSpace));
            }
            // Reads need the file. If this fails, the next write tries again.
            let _ = shared.reopen();
            if disk_became_full {
                // Operations that enqueue nothing may use the reserve, and free space.
                return write(shared, ops);
            }
            ops.into_iter().for_each(|op| op.fail(error.clone()));
        }
    }
}

/// The operations of one commit.
struct Transaction<'a, 't> {
    shared: &'a Shared,
    now: UnixMillis,
    /// Calls that become pending when the transaction is committed.
    added: HashSet<CallSeq>,
    /// Calls removed from the schedule. They are restored if the commit fails.
    cancelled: &'a mut Vec<(CallSeq, CallRecord)>,
    txn: &'a mut WriteTxn<'t>,
}

/// The reply to an operation and its effect in memory, applied after the commit.
enum OpResult {
    Published(Result<Published, Error>),
    Added {
        number: CallSeq,
        id: String,
    },
    /// `ended`: the call was pending until this settlement.
    Settled {
        ended: bool,
    },
    Rejected(ChangeOutcome),
    Cancelled {
        number: CallSeq,
        label: String,
        was_dead: bool,
    },
    Redriven {
        number: CallSeq,
        label: String,
    },
    Purged(Vec<(CallSeq, String, bool)>),
    Expired {
        more: bool,
    },
}

impl Transaction<'_, '_> {
    fn apply(&mut self, op: &WriteOp) -> StoreResult<OpResult> {
        match op {
            WriteOp::Publish(call, _) => self.publish(call),
            WriteOp::Settle(claim, settled, _) => {
                let ended = self.settle(claim.selected.number, settled)?;
                Ok(OpResult::Settled { ended })
            }
            WriteOp::Cancel(id, _) => self.cancel(id),
            WriteOp::Redrive(id, _) => self.redrive(id),
            WriteOp::Purge(ids, _) => self.purge(ids),
            WriteOp::Close(_) => unreachable!("the file is not closed by a transaction"),
            WriteOp::Expire(_) => {
                let more = self.txn.sweep_expired(self.now, MAX_EXPIRED_PER_COMMIT)?;
                Ok(OpResult::Expired { more })
            }
        }
    }

    fn publish(&mut self, call: &PublishRequest) -> StoreResult<OpResult> {
        let duplicate = |id| Ok(OpResult::Published(Ok(Published { id, duplicate: true })));
        if let Some(key) = &call.key
            && let Some(id) = self.txn.id_for_key(key)?
        {
            return duplicate(id);
        }
        // A client may choose the id of an existing call.
        let first = if call.number.is_none() { self.txn.find(&call.id)? } else { None };
        let renamed = match first {
            Some((_, first)) if first.is_same_call(&call.label, call.digest.as_deref()) => {
                return duplicate(first.id);
            }
            Some(_) => Some(self.shared.with_new_id(call)),
            None => None,
        };
        let call = match &renamed {
            Some(None) => return Ok(OpResult::Published(Err(Error::Failed))),
            Some(Some(renamed)) => renamed,
            None => call,
        };
        if self.shared.state().schedule.pending() + self.added.len()
            >= self.shared.limits.max_pending
        {
            return Ok(OpResult::Published(Err(Error::Full)));
        }
        let number = call.number.unwrap_or_else(|| self.shared.next_number());
        self.added.insert(number);
        self.txn.add(number, &call.id, call.number.is_none(), &call.encoded)?;
        if let Some(key) = &call.key {
            self.txn.store_key(key, &call.id, self.now + self.shared.limits.idempotency_ttl)?;
        }
        Ok(OpResult::Added { number, id: call.id.clone() })
    }

    fn settle(&mut self, number: CallSeq, settled: &SettleWrite) -> StoreResult<bool> {
        match settled {
            SettleWrite::Finished { record, needs_id_index } => {
                let until = self.now + self.shared.limits.result_ttl;
                let has_record = self.shared.state().has_record(number);
                self.txn.finish(number, record.clone(), *needs_id_index, until, has_record)
            }
            SettleWrite::Retry { record_json, .. } => {
                self.txn.store_record(number, record_json).map(|()| false)
            }
            SettleWrite::DeadLetter { record_json, record, .. } => {
                self.txn.store_dead_letter(number, record_json, record).map(|()| false)
            }
        }
    }

    fn cancel(&mut self, id: &str) -> StoreResult<OpResult> {
        let Some((number, mut status)) = self.txn.find(id)? else {
            return self.cancel_undecodable(id);
        };
        if status.state.is_final() && !status.dead_letter {
            return Ok(OpResult::Rejected(ChangeOutcome::WrongState(status.state)));
        }
        // From here on the call is not delivered.
        if !status.dead_letter && !self.cancel_pending(number, &status) {
            return Ok(OpResult::Rejected(ChangeOutcome::WrongState(CallState::Running)));
        }
        let was_dead = std::mem::take(&mut status.dead_letter);
        (status.state, status.finished_at) = (CallState::Cancelled, Some(self.now));
        status.next_attempt_at = None;
        let until = self.now + self.shared.limits.result_ttl;
        let record = result_codec::encode(&status, None);
        self.txn.finish(number, record.into(), requires_id_index(&status), until, true)?;
        Ok(OpResult::Cancelled { number, label: status.function, was_dead })
    }

    /// Deletes a damaged call whose envelope cannot be decoded. No record of it is kept.
    fn cancel_undecodable(&mut self, id: &str) -> StoreResult<OpResult> {
        let number = self.shared.ids.decode(id);
        let damaged_number = number.filter(|number| self.shared.state().damaged.contains(number));
        let Some(number) = damaged_number else {
            return Ok(OpResult::Rejected(ChangeOutcome::NotFound));
        };
        self.txn.remove(number, id)?;
        Ok(OpResult::Cancelled { number, label: String::new(), was_dead: false })
    }

    /// Removes a pending call from the schedule. Returns `false` if it runs, or was enqueued by this transaction.
    fn cancel_pending(&mut self, number: CallSeq, status: &CallRecord) -> bool {
        if self.added.contains(&number) || !self.shared.state().cancel_pending(number, status) {
            return false;
        }
        self.cancelled.push((number, status.clone()));
        true
    }

    fn redrive(&mut self, id: &str) -> StoreResult<OpResult> {
        let Some((number, status)) = self.txn.find(id)? else {
            return Ok(OpResult::Rejected(ChangeOutcome::NotFound));
        };
        if !status.dead_letter {
            return Ok(OpResult::Rejected(ChangeOutcome::WrongState(
                self.shared.state().call_state(number, &status),
            )));
        }
        self.txn.remove_record(number)?;
        self.txn.remove_result(number)?;
        self.added.insert(number);
        Ok(OpResult::Redriven { number, label: status.function })
    }

    fn purge(&mut self, ids: &[String]) -> StoreResult<OpResult> {
        let mut purged = Vec::new();
        for id in ids {
            let Some((number, status)) = self.txn.find(id)? else { continue };
            let waits = !status.dead_letter && !status.state.is_final();
            if waits && !self.cancel_pending(number, &status) {
                continue;
            }
            self.txn.remove(number, id)?;
            purged.push((number, status.function, status.dead_letter));
        }
        Ok(OpResult::Purged(purged))
    }
}

impl OpResult {
    fn apply_in_memory(self, op: WriteOp, state: &mut QueueState, replies: &mut ReplyBatch) {
        match (op, self) {
            (WriteOp::Publish(_, reply), Self::Published(result)) => replies.push(reply, result),
            (WriteOp::Publish(call, reply), Self::Added { number, id }) => {
                state.enqueue(&call.label, number, call.due);
                replies.push(reply, Ok(Published { id, duplicate: false }));
            }
            (WriteOp::Settle(claim, settled, reply), Self::Settled { ended }) => {
                state.apply_settlement(claim, &settled, ended);
                replies.push(reply, Ok(()));
            }
            (WriteOp::Cancel(_, reply) | WriteOp::Redrive(_, reply), Self::Rejected(changed)) => {
                replies.push(reply, Ok(changed));
            }
            (WriteOp::Cancel(_, reply), Self::Cancelled { number, label, was_dead }) => {
                state.forget_record(number);
                state.remove_dead_letter(&label, was_dead);
                replies.push(reply, Ok(ChangeOutcome::Applied));
            }
            (WriteOp::Redrive(_, reply), Self::Redriven { number, label }) => {
                state.remove_dead_letter(&label, true);
                state.enqueue(&label, number, 0);
                replies.push(reply, Ok(ChangeOutcome::Applied));
            }
            (WriteOp::Purge(_, reply), Self::Purged(purged)) => {
                for (number, label, was_dead) in &purged {
                    state.forget_record(*number);
                    state.remove_dead_letter(label, *was_dead);
                }
                replies.push(reply, Ok(purged.len() as u64));
            }
            (WriteOp::Expire(reply), Self::Expired { more }) => replies.push(reply, Ok(more)),
            _ => unreachable!("each operation has its own result"),
        }
    }
}
