//! The queue in a file of this process: durable without any other server.
//!
//! What waits is in the file; in memory are only the numbers of the calls, and what is being made. A process that dies
//! leaves every call that was not settled: it is made again after the restart.

mod access;
mod change;
mod finished;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod guard;
mod ids;
mod journal;
mod look;
mod newest;
mod overlay;
mod pressure;
mod reserve;
mod rows;
pub mod salvage;
mod schedule;
mod sealed;
mod store;
mod tables;
mod waiting;
mod writer;

pub(super) use self::waiting::Lease;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::function::Function;
use crate::queue::call::{QueuedCall, UnixMillis};
use crate::queue::embedded::guard::{guarded, is_damage};
use crate::queue::embedded::ids::Ids;
use crate::queue::embedded::look::following;
use crate::queue::embedded::pressure::Pressure;
use crate::queue::embedded::reserve::Reserve;
use crate::queue::embedded::rows::Row;
use crate::queue::embedded::schedule::Number;
use crate::queue::embedded::store::Store;
use crate::queue::embedded::waiting::{Began, Waiting};
use crate::queue::embedded::writer::{Incoming, Op, Settled};
use crate::queue::reply_batch::{Reply, ReplyChannel};
use crate::queue::status::{CallRecord, Settlement, StoredResponse};
use crate::queue::{
    ChangeOutcome, Condition, Delivery, Error, Filter, LeaseHandle, MemoryPermit, Order, Published,
    QueueDepth, now,
};

/// Changes that wait for the one thread that makes them.
const WAITING_CHANGES: usize = 4096;
/// Nobody waits longer than this for the next call without looking again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A disk that takes longer to keep a call is away.
const PUBLISH: Duration = Duration::from_secs(10);
/// What the disk gets to close the file.
const CLOSE: Duration = Duration::from_millis(1500);
/// The file, in the state directory.
const FILE: &str = "queue.redb";
/// The space that is kept for settling calls, beside it.
const RESERVE: &str = "queue.reserve";
/// How many calls one look through the file reads.
const SCAN: usize = 1000;

/// What a queue keeps, and how much.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Calls that wait.
    pub max_pending: usize,
    /// How long state and answer of a finished call are kept, in milliseconds.
    pub result_ttl: UnixMillis,
    /// How long an idempotency key stands for its call.
    pub idempotency_ttl: UnixMillis,
}

/// The queue. Cheap to clone; the file is closed when the last clone is gone.
#[derive(Clone)]
pub struct Embedded {
    shared: Arc<Shared>,
    ops: mpsc::Sender<Op>,
    /// Where answers are given; they are given one by one where there is none.
    desk: Option<ReplyChannel>,
}

struct Shared {
    path: PathBuf,
    /// `None` while the file cannot be opened again after a failure.
    store: RwLock<Option<Store>>,
    /// Whether `store` is being opened again, and a notification when it no longer is.
    opening: (Mutex<bool>, Condvar),
    /// How often the file has been changed, as far as is known here.
    changes: AtomicU64,
    pressure: Pressure,
    /// Whether the last change was made, and in time.
    usable: AtomicBool,
    /// The file is damaged, and is not used any more.
    damaged: AtomicBool,
    waiting: Mutex<Waiting>,
    /// Somebody may find a call now.
    ready: Notify,
    next: AtomicU64,
    ids: Arc<Ids>,
    limits: Limits,
}

impl Embedded {
    /// Opens the queue in `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// When the file cannot be made, is in use, or is no queue.
    pub fn open(directory: &Path, limits: Limits) -> anyhow::Result<Self> {
        use anyhow::{Context, bail};
        survive_limits();
        let path = directory.join(FILE);
        let name = path.display().to_string();
        // Bodies are nobody else's to read.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.with_context(|| format!("cannot make {name}"))?;
        let reserve = Reserve::open(&directory.join(RESERVE));
        let pressure = Pressure::new(reserve.with_context(|| format!("cannot open {name}"))?);
        let store = match Store::open(&path, &pressure.reserve) {
            Err(error) if is_damage(&error) => bail!("{}: {error}", access::remedy(&path)),
            store => store.with_context(|| format!("cannot open the queue {name}"))?,
        };
        let ids = store.ids();
        let mut waiting = Waiting::default();
        let next = guarded(|| store.read_all(|call| waiting.found(call)));
        let next = next.with_context(|| format!("cannot read the queue {name}"))?;
        let mark = store.mark().with_context(|| format!("cannot read the queue {name}"))?;
        waiting.schedule.put_in_order();
        let pending = waiting.schedule.waiting();
        if pending > 0 {
            tracing::info!(pending, "Queued calls found");
        }
        let shared = Arc::new(Shared {
            path,
            store: RwLock::new(Some(store)),
            opening: Default::default(),
            changes: AtomicU64::new(mark.changes),
            pressure,
            usable: AtomicBool::new(true),
            damaged: AtomicBool::new(false),
            waiting: Mutex::new(waiting),
            ready: Notify::new(),
            next: AtomicU64::new(next),
            ids,
            limits,
        });
        let (ops, received) = mpsc::channel(WAITING_CHANGES);
        let writes = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("queue".to_owned())
            .spawn(move || writer::run(&writes, received))
            .context("cannot start a thread")?;
        Ok(Self { shared, ops, desk: None })
    }

    /// This queue, for one who asks much of it on the current thread and its runtime.
    pub(super) fn for_thread(&self) -> Self {
        Self { desk: Some(ReplyChannel::open()), ..self.clone() }
    }

    /// Whether the file could be used when it was used last.
    pub(super) fn is_usable(&self) -> bool {
        self.shared.usable.load(Relaxed)
    }

    /// What is wrong with the queue though it can be used.
    pub(super) fn condition(&self) -> Option<Condition> {
        if self.shared.damaged.load(Relaxed) {
            return Some(Condition::Damaged);
        }
        if self.shared.pressure.is_full() {
            return Some(Condition::DiskFull);
        }
        let set_aside = self.shared.waiting().damaged.len();
        (set_aside > 0).then_some(Condition::DamagedCalls)
    }

    /// Closes the file once all that was asked for is done: it need not be repaired when it is opened again.
    pub async fn close(&self) {
        let closed = tokio::time::timeout(CLOSE, self.ask(Op::Close)).await;
        if !matches!(closed, Ok(Ok(()))) {
            tracing::warn!("The queue's file could not be closed in time");
        }
    }

    /// An id for a call that is about to be published. Calls with one of these are found without a table of ids.
    pub(super) fn new_call_id(&self) -> String {
        self.shared.ids.make(self.shared.next_number())
    }

    pub(super) async fn publish(
        &self,
        call: QueuedCall,
        room: Option<MemoryPermit>,
    ) -> Result<Published, Error> {
        let incoming = self.shared.incoming(call, room);
        let published = self.ask(|reply| Op::Publish(incoming, reply));
        tokio::time::timeout(PUBLISH, published).await.unwrap_or_else(|_| {
            self.shared.usable.store(false, Relaxed);
            Err(Error::Unreachable)
        })
    }

    pub(super) async fn receive(&self, places: usize) -> Result<Delivery, Error> {
        loop {
            let (picked, wait) = {
                let mut waiting = self.shared.waiting();
                let now = now();
                let picked = waiting.pick(now, places);
                let due = waiting.schedule.next_due().map_or(LOOK_AGAIN, |due| {
                    Duration::from_millis(due.saturating_sub(now)).min(LOOK_AGAIN)
                });
                (picked, due)
            };
            match picked {
                Some((held, stored)) => {
                    // More may be there than one was told of.
                    self.shared.ready.notify_one();
                    let lease = Lease::new(Arc::clone(&self.shared), held);
                    if let Some(delivery) = self.deliver(lease, stored)? {
                        return Ok(delivery);
                    }
                }
                None => {
                    // Running out is no reason to fail: it is the time to look again.
                    let _ = tokio::time::timeout(wait, self.shared.ready.notified()).await;
                }
            }
        }
    }

    /// The call that was picked, of which `stored` was at hand; `None` if it is gone.
    fn deliver(&self, mut lease: Lease, stored: Option<Bytes>) -> Result<Option<Delivery>, Error> {
        let number = lease.held.picked.number;
        let stored = match stored {
            Some(stored) => Some(stored),
            None => self.shared.read(number)?,
        };
        let call = stored.as_ref().and_then(|stored| QueuedCall::decode(stored).ok());
        let Some(call) = call else {
            let id = stored.and_then(|stored| QueuedCall::extract_id(&stored));
            let id = id.or_else(|| self.shared.view(|view| view.id_as_it_is(number)).ok()?);
            let mut waiting = self.shared.waiting();
            // It is not given back, but it does not run either.
            waiting.ended(lease.held);
            waiting.damaged.insert(number);
            let all = waiting.damaged.len();
            tracing::error!(call_id = id, number, all, "A queued call is damaged and set aside");
            return Ok(None);
        };
        if lease.held.noted {
            let progress = self.shared.view(|view| view.progress(number))?;
            lease.before = progress.map_or((0, None), |known| (known.attempts, known.status));
        }
        let began = Began { attempts: lease.before.0 + 1, at: lease.at };
        self.shared.waiting().begin(lease.held, began);
        Ok(Some(Delivery {
            call,
            attempts: lease.before.0,
            body_missing: false,
            handle: LeaseHandle::Embedded(lease),
        }))
    }

    pub(super) async fn settle(
        &self,
        lease: &Lease,
        call: &QueuedCall,
        settlement: &Settlement,
    ) -> Result<(), Error> {
        if !self.shared.waiting().is_held(lease.held) {
            return Err(Error::Gone);
        }
        let (attempts, status) = lease.before;
        let running = CallRecord { status, ..CallRecord::queued(call) };
        let running = Began { attempts: attempts + 1, at: lease.at }.of(running);
        let status = running.settled(settlement, now());
        let settled = Settled::new(&status, settlement);
        self.ask(|reply| Op::Settle(lease.held, settled, reply)).await
    }

    pub(super) async fn status(&self, id: &str) -> Result<Option<CallRecord>, Error> {
        let (shared, id) = (Arc::clone(&self.shared), id.to_owned());
        shared.blocking(move |shared| shared.status(&id)).await
    }

    pub(super) async fn result(&self, id: &str) -> Result<Option<StoredResponse>, Error> {
        let (shared, id) = (Arc::clone(&self.shared), id.to_owned());
        shared
            .blocking(move |shared| {
                shared.view(|view| {
                    let Some(number) = view.number(&id)? else { return Ok(None) };
                    Ok(view.finished(number)?.and_then(|(_, answer)| answer))
                })
            })
            .await
    }

    pub(super) async fn cancel(&self, id: &str) -> Result<ChangeOutcome, Error> {
        self.ask(|reply| Op::Cancel(id.to_owned(), reply)).await
    }

    pub(super) async fn redrive(&self, id: &str) -> Result<ChangeOutcome, Error> {
        self.ask(|reply| Op::Revive(id.to_owned(), reply)).await
    }

    pub(super) async fn list(
        &self,
        filter: &Filter,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<CallRecord>, Error> {
        let (shared, filter) = (Arc::clone(&self.shared), filter.clone());
        let after = after.map(str::to_owned);
        shared
            .blocking(move |shared| {
                let first = match (&after, filter.order) {
                    // No call follows one that is not known.
                    (Some(id), order) => {
                        shared.view(|view| view.number(id))?.and_then(|last| following(order, last))
                    }
                    (None, Order::OldestFirst) => Some(0),
                    (None, Order::NewestFirst) => Some(Number::MAX),
                };
                let found = shared.find(&filter, first, limit)?;
                Ok(found.into_iter().map(|(_, status)| status).collect())
            })
            .await
    }

    pub(super) async fn purge(&self, filter: &Filter) -> Result<u64, Error> {
        let (mut purged, mut first) = (0, Some(0));
        loop {
            let shared = Arc::clone(&self.shared);
            let filter = Filter { order: Order::OldestFirst, ..filter.clone() };
            let found = shared.blocking(move |shared| shared.find(&filter, first, SCAN)).await?;
            let Some((last, _)) = found.last() else { return Ok(purged) };
            first = last.checked_add(1);
            let ids = found.into_iter().map(|(_, status)| status.id).collect();
            purged += self.ask(|reply| Op::Purge(ids, reply)).await?;
        }
    }

    pub(super) async fn depths(&self) -> Result<Vec<(Function, QueueDepth)>, Error> {
        let shared = Arc::clone(&self.shared);
        shared.blocking(|shared| shared.depths()).await
    }

    /// Forgets what has been kept for long enough. To be called every second or so.
    pub async fn sweep_expired(&self) {
        // A failure has been told where it happened; this is tried again soon.
        while let Ok(true) = self.ask(Op::Expire).await {}
    }

    async fn ask<T: Send + 'static>(&self, op: impl FnOnce(Reply<T>) -> Op) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let reply = Reply::new(reply, self.desk.clone());
        self.ops.send(op(reply)).await.map_err(|_| Error::Failed)?;
        answer.await.map_err(|_| Error::Failed)?
    }
}

/// Has a file that may grow no further (`ulimit -f`) be an error like a full disk: by default the signal that comes
/// with it ends the process.
fn survive_limits() {
    let exceeded = rustix::process::Signal::XFSZ.as_raw();
    // Without it, there is only that error less.
    let _ = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::from_raw(exceeded));
}

impl Shared {
    /// Reads the file on a thread that may wait for the disk, and for a file that is being opened again.
    async fn blocking<T: Send + 'static>(
        self: Arc<Self>,
        read: impl FnOnce(&Self) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let read = move || {
            self.await_open();
            read(&self)
        };
        tokio::task::spawn_blocking(read).await.map_err(|_| Error::Failed)?
    }

    fn next_number(&self) -> Number {
        self.next.fetch_add(1, Relaxed)
    }

    /// `call` as it is written, and nothing else of it.
    fn incoming(&self, call: QueuedCall, room: Option<MemoryPermit>) -> Incoming {
        Incoming {
            label: call.function.to_string(),
            due: call.options.not_before.unwrap_or(0),
            encoded: call.encode(),
            number: (!call.options.chosen_id).then(|| self.ids.number_in(&call.id)).flatten(),
            digest: call.options.digest,
            key: call.options.idempotency_key,
            id: call.id,
            _room: room,
        }
    }

    /// `call` under an id that is made here; `None` if it cannot be read.
    fn renamed(&self, call: &Incoming) -> Option<Incoming> {
        let id = self.ids.make(self.next_number());
        let renamed = QueuedCall::decode(&call.encoded).ok()?.with_new_id(id);
        Some(self.incoming(renamed, None))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is stored of a call. The calls that were taken in with it will be at hand.
    fn read(&self, number: Number) -> Result<Option<Bytes>, Error> {
        if let Some(call) = self.view(|view| view.call(number))? {
            return Ok(Some(call));
        }
        let Some(row) = self.view(|view| view.row(number))? else { return Ok(None) };
        let call = Row::new(&row).get(number).map(|call| row.slice_ref(call));
        self.waiting().recent.add(row);
        Ok(call)
    }
}

#[cfg(test)]
mod tests;
