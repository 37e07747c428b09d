//! The one thread that changes the file. What comes while it writes is written together next: one `fsync` for all.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::queue::call::UnixMillis;
use crate::queue::embedded::change::Change;
use crate::queue::embedded::ids::Ids;
use crate::queue::embedded::schedule::Number;
use crate::queue::embedded::store::Result as StoreResult;
use crate::queue::embedded::waiting::{Held, Waiting};
use crate::queue::embedded::{Shared, finished};
use crate::queue::reply_batch::{Reply, ReplyBatch};
use crate::queue::status::{CallRecord, CallState, Settlement};
use crate::queue::{ChangeOutcome, Error, MemoryPermit, Published, now};

/// So many changes are made durable together, at most.
const TOGETHER: usize = 512;
/// A commit has a price of its own, and those who were answered together ask again together: if there are far fewer than
/// the last time, so long is waited for the others.
const GATHER: Duration = Duration::from_micros(100);
/// So much of what has expired is forgotten at once.
const EXPIRE_AT_ONCE: usize = 1000;

/// A call as it is taken in.
pub(super) struct Incoming {
    pub(super) id: String,
    /// The number that was given out with the id; none if its caller chose it.
    pub(super) number: Option<Number>,
    pub(super) key: Option<String>,
    pub(super) label: String,
    pub(super) digest: Option<String>,
    pub(super) due: UnixMillis,
    pub(super) encoded: Bytes,
    /// Held until the call is written or refused, however long that takes and whoever still waits for it.
    pub(super) _room: Option<MemoryPermit>,
}

/// How a call goes on, as it is written.
pub(super) enum Settled {
    /// With what is kept of it. `chosen`: it has no number in its id.
    Over {
        record: Bytes,
        chosen: bool,
    },
    Retry {
        note: Vec<u8>,
        at: UnixMillis,
    },
    Dead {
        note: Vec<u8>,
        record: Vec<u8>,
        label: String,
    },
}

impl Settled {
    /// `settlement`, by which a call comes to `status`.
    pub(super) fn new(status: &CallRecord, settlement: &Settlement) -> Self {
        let note = || serde_json::to_vec(status).unwrap_or_default();
        match settlement {
            Settlement::Finished { response: answer, .. } => Self::Over {
                record: finished::encode(status, answer.as_ref()).into(),
                chosen: is_chosen(status),
            },
            Settlement::Retry { at, .. } => Self::Retry { note: note(), at: *at },
            Settlement::DeadLetter { response: answer, .. } => Self::Dead {
                note: note(),
                record: finished::encode(status, answer.as_ref()),
                label: status.function.clone(),
            },
        }
    }
}

/// Whether a call is found by a table of ids, since its own has no number in it.
fn is_chosen(status: &CallRecord) -> bool {
    status.chosen_id || !Ids::looks_numbered(&status.id)
}

/// A change of the file.
pub(super) enum Op {
    Publish(Incoming, Reply<Published>),
    Settle(Held, Settled, Reply<()>),
    Cancel(String, Reply<ChangeOutcome>),
    Revive(String, Reply<ChangeOutcome>),
    /// Removes calls that do not run, all trace of them.
    Purge(Vec<String>, Reply<u64>),
    /// Forgets what has been kept for long enough, or some of it; whether there is more.
    Expire(Reply<bool>),
    /// Closes the file; nothing comes after it.
    Close(Reply<()>),
}

impl Op {
    /// How much it writes, roughly.
    pub(super) fn length(&self) -> usize {
        const KEYS: usize = 256;
        KEYS + match self {
            Self::Publish(call, _) => call.encoded.len(),
            Self::Settle(_, Settled::Over { record, .. }, _) => record.len(),
            Self::Settle(_, Settled::Retry { note, .. }, _) => note.len(),
            Self::Settle(_, Settled::Dead { note, record, .. }, _) => note.len() + record.len(),
            _ => 0,
        }
    }

    fn fails(self, error: Error) {
        match self {
            Self::Publish(_, reply) => reply.send(Err(error)),
            Self::Settle(.., reply) => reply.send(Err(error)),
            Self::Cancel(_, reply) | Self::Revive(_, reply) => reply.send(Err(error)),
            Self::Purge(_, reply) => reply.send(Err(error)),
            Self::Expire(reply) => reply.send(Err(error)),
            Self::Close(reply) => reply.send(Err(error)),
        }
    }
}

/// Writes until nobody is left who could ask for it.
pub(super) fn run(shared: &Arc<Shared>, mut ops: mpsc::Receiver<Op>) {
    let _end = End(shared);
    let mut usual = 0;
    while let Some(first) = ops.blocking_recv() {
        let mut batch = Gathered::default();
        batch.add(first);
        batch.add_all(&mut ops);
        if batch.together.len() * 2 < usual && batch.closing.is_none() {
            std::thread::sleep(GATHER);
            batch.add_all(&mut ops);
        }
        usual = batch.together.len();
        write(shared, batch.together);
        if let Some(reply) = batch.closing {
            shared.end();
            return reply.send(Ok(()));
        }
    }
}

/// What is written together.
#[derive(Default)]
struct Gathered {
    together: Vec<Op>,
    /// The file is to be closed then.
    closing: Option<Reply<()>>,
}

impl Gathered {
    fn add(&mut self, op: Op) {
        match op {
            Op::Close(reply) => self.closing = Some(reply),
            op => self.together.push(op),
        }
    }

    /// Adds what has come, as far as there is room.
    fn add_all(&mut self, ops: &mut mpsc::Receiver<Op>) {
        while self.together.len() < TOGETHER && self.closing.is_none() {
            let Ok(op) = ops.try_recv() else { break };
            self.add(op);
        }
    }
}

/// Says so when the thread ends by a panic: from then on nothing is taken in, until the process starts anew.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.usable.store(false, Relaxed);
            tracing::error!(
                "The thread that writes the queue's file panicked: restart this process"
            );
        }
    }
}

fn write(shared: &Arc<Shared>, mut ops: Vec<Op>) {
    // Nobody has heard that these were taken in, and nobody would.
    ops.retain(|op| !matches!(op, Op::Publish(_, reply) if reply.is_closed()));
    let full = shared.has_no_room();
    let refused = ops.extract_if(.., |op| full && matches!(op, Op::Publish(..)));
    refused.for_each(|op| op.fails(Error::NoSpace));
    if !full {
        return write_together(shared, ops);
    }
    let (mut ops, mut has_forgotten) = (VecDeque::from(ops), false);
    while !ops.is_empty() {
        // Pieces that were written before may have used the reserve.
        if !has_forgotten && shared.pressure.reserve.is_low() {
            shared.forget_results();
            has_forgotten = true;
        }
        if let Some(piece) = shared.pressure.next_piece(&mut ops) {
            write_together(shared, piece);
        }
    }
}

/// Writes `ops` in one change.
fn write_together(shared: &Arc<Shared>, mut ops: Vec<Op>) {
    if ops.is_empty() {
        return;
    }
    let length: usize = ops.iter().map(Op::length).sum();
    let enqueues = ops.iter().any(|op| matches!(op, Op::Publish(..)));
    let settles = ops.iter().any(|op| !matches!(op, Op::Publish(..) | Op::Expire(_)));
    let full = shared.pressure.is_full();
    // The reserve is for calls that are queued already. A large change could use up all of it and fail all the same, and
    // the space would belong to the queue's file from then on. It is repeated in pieces once the disk is known to be full.
    let is_small = length <= shared.pressure.reserve.part();
    shared.pressure.reserve.allow(!enqueues && (full || is_small));
    let now = now();
    let mut withdrawn = Vec::new();
    let changed = shared.change(|change| {
        let withdrawn = &mut withdrawn;
        let mut batch = Batch { shared, now, added: HashSet::new(), withdrawn, change };
        ops.iter().map(|op| batch.apply(op)).collect::<StoreResult<Vec<Applied>>>()
    });
    shared.pressure.reserve.allow(true);
    match changed {
        Ok(applied) => {
            let (mut waiting, mut outbox) = (shared.waiting(), ReplyBatch::default());
            for (op, applied) in ops.into_iter().zip(applied) {
                applied.take_effect(op, &mut waiting, &mut outbox);
            }
            drop(waiting);
            outbox.send();
            shared.ready.notify_one();
            if full && settles {
                shared.made_progress();
            }
        }
        Err(error) => {
            tracing::error!(%error, calls = ops.len(), "The queue's file cannot be written");
            let mut waiting = shared.waiting();
            for (number, status) in withdrawn {
                waiting.restore(number, &status);
            }
            drop(waiting);
            let has_filled = error == Error::NoSpace && !full;
            if has_filled {
                shared.pressure.begin(if enqueues { length } else { 0 });
                // To open the file again takes its time, and does not help these.
                let refused = ops.extract_if(.., |op| matches!(op, Op::Publish(..)));
                refused.for_each(|op| op.fails(Error::NoSpace));
            }
            // What is there can be read meanwhile. If that fails, the next change tries again.
            let _ = shared.reopen();
            if has_filled {
                // What enqueues nothing has the reserve, and frees space.
                return write(shared, ops);
            }
            ops.into_iter().for_each(|op| op.fails(error.clone()));
        }
    }
}

/// Changes that become durable together.
struct Batch<'a, 't> {
    shared: &'a Shared,
    now: UnixMillis,
    /// Calls that wait once this batch is durable, and not before.
    added: HashSet<Number>,
    /// Calls that are not handed out any more. They are again if this batch fails.
    withdrawn: &'a mut Vec<(Number, CallRecord)>,
    change: &'a mut Change<'t>,
}

/// What to answer, and what changes in memory, once the batch is durable.
enum Applied {
    Published(Result<Published, Error>),
    Added {
        number: Number,
        id: String,
    },
    /// `ended`: by that, and not before.
    Settled {
        ended: bool,
    },
    ChangeOutcome(ChangeOutcome),
    Cancelled {
        number: Number,
        label: String,
        was_dead: bool,
    },
    Revived {
        number: Number,
        label: String,
    },
    Purged(Vec<(Number, String, bool)>),
    Expired {
        more: bool,
    },
}

impl Batch<'_, '_> {
    fn apply(&mut self, op: &Op) -> StoreResult<Applied> {
        match op {
            Op::Publish(call, _) => self.publish(call),
            Op::Settle(held, settled, _) => {
                let ended = self.settle(held.picked.number, settled)?;
                Ok(Applied::Settled { ended })
            }
            Op::Cancel(id, _) => self.cancel(id),
            Op::Revive(id, _) => self.redrive(id),
            Op::Purge(ids, _) => self.purge(ids),
            Op::Close(_) => unreachable!("it is no change"),
            Op::Expire(_) => {
                let more = self.change.sweep_expired(self.now, EXPIRE_AT_ONCE)?;
                Ok(Applied::Expired { more })
            }
        }
    }

    fn publish(&mut self, call: &Incoming) -> StoreResult<Applied> {
        let repeated = |id| Ok(Applied::Published(Ok(Published { id, duplicate: true })));
        if let Some(key) = &call.key
            && let Some(id) = self.change.keyed(key)?
        {
            return repeated(id);
        }
        // A caller may choose the id of a call that is there, made here or not.
        let first = if call.number.is_none() { self.change.find(&call.id)? } else { None };
        let renamed = match first {
            Some((_, first)) if first.is_same_call(&call.label, call.digest.as_deref()) => {
                return repeated(first.id);
            }
            Some(_) => Some(self.shared.renamed(call)),
            None => None,
        };
        let call = match &renamed {
            Some(None) => return Ok(Applied::Published(Err(Error::Failed))),
            Some(Some(renamed)) => renamed,
            None => call,
        };
        if self.shared.waiting().schedule.waiting() + self.added.len()
            >= self.shared.limits.max_pending
        {
            return Ok(Applied::Published(Err(Error::Full)));
        }
        let number = call.number.unwrap_or_else(|| self.shared.next_number());
        self.added.insert(number);
        self.change.add(number, &call.id, call.number.is_none(), &call.encoded)?;
        if let Some(key) = &call.key {
            self.change.remember_key(
                key,
                &call.id,
                self.now + self.shared.limits.idempotency_ttl,
            )?;
        }
        Ok(Applied::Added { number, id: call.id.clone() })
    }

    fn settle(&mut self, number: Number, settled: &Settled) -> StoreResult<bool> {
        match settled {
            Settled::Over { record, chosen } => {
                let until = self.now + self.shared.limits.result_ttl;
                let noted = self.shared.waiting().is_noted(number);
                self.change.finish(number, record.clone(), *chosen, until, noted)
            }
            Settled::Retry { note, .. } => self.change.note(number, note).map(|()| false),
            Settled::Dead { note, record, .. } => {
                self.change.keep_answer(number, note, record).map(|()| false)
            }
        }
    }

    fn cancel(&mut self, id: &str) -> StoreResult<Applied> {
        let Some((number, mut status)) = self.change.find(id)? else {
            return self.cancel_unreadable(id);
        };
        if status.state.is_final() && !status.dead_letter {
            return Ok(Applied::ChangeOutcome(ChangeOutcome::WrongState(status.state)));
        }
        // From here on nobody takes it.
        if !status.dead_letter && !self.withdraw(number, &status) {
            return Ok(Applied::ChangeOutcome(ChangeOutcome::WrongState(CallState::Running)));
        }
        let was_dead = std::mem::take(&mut status.dead_letter);
        (status.state, status.finished_at) = (CallState::Cancelled, Some(self.now));
        status.next_attempt_at = None;
        let until = self.now + self.shared.limits.result_ttl;
        let record = finished::encode(&status, None);
        self.change.finish(number, record.into(), is_chosen(&status), until, true)?;
        Ok(Applied::Cancelled { number, label: status.function, was_dead })
    }

    /// Removes a call that is set aside and whose head cannot be read: nothing is left that could be kept of it.
    fn cancel_unreadable(&mut self, id: &str) -> StoreResult<Applied> {
        let number = self.shared.ids.number_in(id);
        let set_aside = number.filter(|it| self.shared.waiting().damaged.contains(it));
        let Some(number) = set_aside else {
            return Ok(Applied::ChangeOutcome(ChangeOutcome::NotFound));
        };
        self.change.remove(number, id)?;
        Ok(Applied::Cancelled { number, label: String::new(), was_dead: false })
    }

    /// Sees to it that a waiting call is not handed out; `false` if it runs, or is only about to wait.
    fn withdraw(&mut self, number: Number, status: &CallRecord) -> bool {
        if self.added.contains(&number) || !self.shared.waiting().withdraw(number, status) {
            return false;
        }
        self.withdrawn.push((number, status.clone()));
        true
    }

    fn redrive(&mut self, id: &str) -> StoreResult<Applied> {
        let Some((number, status)) = self.change.find(id)? else {
            return Ok(Applied::ChangeOutcome(ChangeOutcome::NotFound));
        };
        if !status.dead_letter {
            return Ok(Applied::ChangeOutcome(ChangeOutcome::WrongState(
                self.shared.waiting().state(number, &status),
            )));
        }
        self.change.forget_progress(number)?;
        self.change.drop_answer(number)?;
        self.added.insert(number);
        Ok(Applied::Revived { number, label: status.function })
    }

    fn purge(&mut self, ids: &[String]) -> StoreResult<Applied> {
        let mut purged = Vec::new();
        for id in ids {
            let Some((number, status)) = self.change.find(id)? else { continue };
            let waits = !status.dead_letter && !status.state.is_final();
            if waits && !self.withdraw(number, &status) {
                continue;
            }
            self.change.remove(number, id)?;
            purged.push((number, status.function, status.dead_letter));
        }
        Ok(Applied::Purged(purged))
    }
}

impl Applied {
    fn take_effect(self, op: Op, waiting: &mut Waiting, outbox: &mut ReplyBatch) {
        match (op, self) {
            (Op::Publish(_, reply), Self::Published(answer)) => outbox.push(reply, answer),
            (Op::Publish(call, reply), Self::Added { number, id }) => {
                waiting.add(&call.label, number, call.due);
                outbox.push(reply, Ok(Published { id, duplicate: false }));
            }
            (Op::Settle(held, settled, reply), Self::Settled { ended }) => {
                waiting.settled(held, &settled, ended);
                outbox.push(reply, Ok(()));
            }
            (Op::Cancel(_, reply) | Op::Revive(_, reply), Self::ChangeOutcome(changed)) => {
                outbox.push(reply, Ok(changed));
            }
            (Op::Cancel(_, reply), Self::Cancelled { number, label, was_dead }) => {
                waiting.forget(number);
                waiting.buried(&label, was_dead);
                outbox.push(reply, Ok(ChangeOutcome::Applied));
            }
            (Op::Revive(_, reply), Self::Revived { number, label }) => {
                waiting.buried(&label, true);
                waiting.add(&label, number, 0);
                outbox.push(reply, Ok(ChangeOutcome::Applied));
            }
            (Op::Purge(_, reply), Self::Purged(purged)) => {
                for (number, label, was_dead) in &purged {
                    waiting.forget(*number);
                    waiting.buried(label, *was_dead);
                }
                outbox.push(reply, Ok(purged.len() as u64));
            }
            (Op::Expire(reply), Self::Expired { more }) => outbox.push(reply, Ok(more)),
            _ => unreachable!("each change has its own effect"),
        }
    }
}
