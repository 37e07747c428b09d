//! The queue in a file of this process. It is durable without any other server.
//!
//! The file holds all pending calls. Memory holds only their numbers, and the state of running calls. A crash loses no
//! call that was not settled: it is executed again after the restart.
//!
//! Writes take one path: `writer` collects operations and commits them in one `write_txn`, through the storage backend
//! in `wal`. Reads go through a snapshot (`store`, `queries`). `schedule` selects the next call, and `state` tracks
//! running ones. `pressure` and `reserve` handle a full disk, `panic_guard` and `salvage` a damaged file.

mod access;
mod checksummed;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod id_codec;
mod job_store;
mod lease;
mod overlay;
mod packed;
mod panic_guard;
mod pressure;
mod queries;
mod reserve;
mod result_codec;
mod reverse_scan;
pub mod salvage;
mod schedule;
mod settle_write;
mod state;
mod store;
mod tables;
mod wal;
mod write_txn;
mod writer;

pub(super) use self::lease::Lease;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::call::{QueuedCall, UnixMillis};
use crate::embedded::id_codec::CallIdCodec;
use crate::embedded::packed::PackedBatch;
use crate::embedded::panic_guard::{catch_panic, is_corruption};
use crate::embedded::pressure::DiskPressure;
use crate::embedded::reserve::Reserve;
use crate::embedded::schedule::CallSeq;
use crate::embedded::state::{AttemptStart, QueueState};
use crate::embedded::store::Store;
use crate::embedded::writer::{PublishRequest, WriteOp};
use crate::reply_batch::{Reply, ReplyChannel};
use crate::{Condition, Delivery, Error, JobQueue, JobStore, MemoryPermit, Published, now};
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Maximum number of operations that wait for the writer thread.
const MAX_QUEUED_OPS: usize = 4096;
/// Maximum time between two checks for a due call.
const MAX_IDLE_WAIT: Duration = Duration::from_secs(1);
/// Time after which a publish fails with `Unreachable`.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(10);
const CLOSE_TIMEOUT: Duration = Duration::from_millis(1500);
/// Name of the file in the state directory.
const FILE_NAME: &str = "queue.redb";
/// Name of the file that reserves disk space for settlements.
const RESERVE_FILE_NAME: &str = "queue.reserve";
/// Maximum number of calls that one scan of the file returns.
const SCAN_BATCH_SIZE: usize = 1000;

/// Limits of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Maximum number of pending calls.
    pub max_pending: usize,
    /// Time in milliseconds for which records and responses of finished calls are kept.
    pub result_ttl: UnixMillis,
    /// Time in milliseconds for which an idempotency key is kept.
    pub idempotency_ttl: UnixMillis,
}

/// The queue. Cheap to clone. The file is closed when the last clone is dropped.
#[derive(Clone)]
pub struct Embedded {
    shared: Arc<Shared>,
    ops: mpsc::Sender<WriteOp>,
    /// Delivers replies in batches. Without it, each reply is sent on its own.
    replies: Option<ReplyChannel>,
}

struct Shared {
    path: PathBuf,
    /// `None` while the file is being reopened after a failure. Rank 2: acquired first. Held during a read of the file
    /// or a commit, which share it; only opening, closing and compaction lock it for writing.
    store: RwLock<Option<Store>>,
    /// `true` while `store` is being reopened, and a notification of the change to `false`.
    /// A leaf.
    opening: (Mutex<bool>, Condvar),
    /// Number of commits to the file, as far as this process knows.
    change_count: AtomicU64,
    pressure: DiskPressure,
    /// Whether the last write succeeded in time.
    usable: AtomicBool,
    /// The file is damaged and no longer used.
    damaged: AtomicBool,
    /// The waiting and running calls. A leaf; `store` may be held, and is not locked under it.
    state: Mutex<QueueState>,
    /// Notified when a call may have become runnable.
    ready: Notify,
    next_number: AtomicU64,
    ids: Arc<CallIdCodec>,
    limits: Limits,
}

impl Embedded {
    /// Opens the queue in `directory`, which is created if it does not exist.
    ///
    /// # Errors
    ///
    /// When the file cannot be created, is in use by another process, is damaged, or is not a queue. The message names
    /// the remedy.
    pub fn open(directory: &Path, limits: Limits) -> anyhow::Result<Self> {
        use anyhow::{Context, bail};
        ignore_file_size_signal();
        let path = directory.join(FILE_NAME);
        let name = path.display().to_string();
        // The files contain request bodies, which only their owner may read.
        let created = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        created.with_context(|| format!("cannot create {name}"))?;
        let reserve = Reserve::open(&directory.join(RESERVE_FILE_NAME));
        let pressure = DiskPressure::new(reserve.with_context(|| format!("cannot open {name}"))?);
        let store = match Store::open(&path, &pressure.reserve) {
            Err(error) if is_corruption(&error) => bail!("{}: {error}", access::remedy(&path)),
            store => store.with_context(|| format!("cannot open the queue {name}"))?,
        };
        let ids = store.ids();
        let mut state = QueueState::default();
        let next = catch_panic(|| store.read_all(|call| state.restore_call(call)));
        let next = next.with_context(|| format!("cannot read the queue {name}"))?;
        let watermark =
            store.watermark().with_context(|| format!("cannot read the queue {name}"))?;
        state.schedule.sort_by_number();
        let pending = state.schedule.pending();
        if pending > 0 {
            tracing::info!(pending, "Pending calls found in the queue's file");
        }
        let shared = Arc::new(Shared {
            path,
            store: RwLock::new(Some(store)),
            opening: Default::default(),
            change_count: AtomicU64::new(watermark.changes),
            pressure,
            usable: AtomicBool::new(true),
            damaged: AtomicBool::new(false),
            state: Mutex::new(state),
            ready: Notify::new(),
            next_number: AtomicU64::new(next),
            ids,
            limits,
        });
        let (ops, received) = mpsc::channel(MAX_QUEUED_OPS);
        let writer_shared = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("queue".to_owned())
            .spawn(move || writer::run(&writer_shared, received))
            .context("cannot start a thread")?;
        Ok(Self { shared, ops, replies: None })
    }

    /// Builds the delivery of a selected call. `stored` is its encoded form if it was cached. Returns `None` if the
    /// call is damaged.
    fn deliver(&self, mut lease: Lease, stored: Option<Bytes>) -> Result<Option<Delivery>, Error> {
        let number = lease.claim.selected.number;
        let stored = match stored {
            Some(stored) => Some(stored),
            None => self.shared.read_call(number)?,
        };
        let call = stored.as_ref().and_then(|stored| QueuedCall::decode(stored).ok());
        let Some(call) = call else {
            let id = stored.and_then(|stored| QueuedCall::extract_id(&stored));
            let id = id.or_else(|| {
                self.shared.read_snapshot(|snapshot| snapshot.id_unchecked(number)).ok()?
            });
            let mut state = self.shared.state();
            // The call is not requeued, but it no longer runs.
            state.end_execution(lease.claim);
            state.damaged.insert(number);
            let all = state.damaged.len();
            tracing::error!(call_id = id, number, all, "A queued call is damaged and set aside");
            return Ok(None);
        };
        if lease.claim.has_record {
            let progress = self.shared.read_snapshot(|snapshot| snapshot.record(number))?;
            lease.previous = progress.map_or((0, None), |record| (record.attempts, record.status));
        }
        let start = AttemptStart { attempts: lease.previous.0 + 1, started_at: lease.started_at };
        self.shared.state().start_attempt(lease.claim, start);
        Ok(Some(Delivery {
            call,
            attempts: lease.previous.0,
            body_missing: false,
            lease: crate::Lease::Embedded(lease),
        }))
    }

    async fn submit<T: Send + 'static>(
        &self,
        op: impl FnOnce(Reply<T>) -> WriteOp,
    ) -> Result<T, Error> {
        let (reply, result) = oneshot::channel();
        let reply = Reply::new(reply, self.replies.clone());
        self.ops.send(op(reply)).await.map_err(|_| Error::Failed)?;
        result.await.map_err(|_| Error::Failed)?
    }
}

impl JobQueue for Embedded {
    fn for_thread(&self) -> Self {
        Self { replies: Some(ReplyChannel::open()), ..self.clone() }
    }

    /// Such an id contains the call's number and needs no entry in the id index.
    fn new_call_id(&self, _function: &Function) -> String {
        self.shared.ids.encode(self.shared.next_number())
    }

    /// If the future is dropped, the writer still has the call. It drops calls whose client has gone when it begins a
    /// commit; a call of a commit that has begun is enqueued. The permit is held until then.
    async fn publish(
        &self,
        call: QueuedCall,
        permit: Option<MemoryPermit>,
    ) -> Result<Published, Error> {
        let request = self.shared.publish_request(call, permit);
        let published = self.submit(|reply| WriteOp::Publish(request, reply));
        tokio::time::timeout(PUBLISH_TIMEOUT, published).await.unwrap_or_else(|_| {
            self.shared.usable.store(false, Relaxed);
            Err(Error::Unreachable)
        })
    }

    /// If the future is dropped while it waits, nothing is lost: tokio passes a notification on that it has received.
    /// A selected call is held by its lease from then on, whose drop requeues it.
    async fn receive(&self, concurrency: usize) -> Result<Delivery, Error> {
        loop {
            let (selected, wait) = {
                let mut state = self.shared.state();
                let now = now();
                let selected = state.select(now, concurrency);
                let due = state.schedule.next_due().map_or(MAX_IDLE_WAIT, |due| {
                    Duration::from_millis(due.saturating_sub(now)).min(MAX_IDLE_WAIT)
                });
                (selected, due)
            };
            match selected {
                Some((claim, stored)) => {
                    // Several calls may be runnable for one notification.
                    self.shared.ready.notify_one();
                    let lease = Lease::new(self.clone(), claim);
                    if let Some(delivery) = self.deliver(lease, stored)? {
                        return Ok(delivery);
                    }
                }
                None => {
                    // After a timeout the schedule is checked again.
                    let _ = tokio::time::timeout(wait, self.shared.ready.notified()).await;
                }
            }
        }
    }

    fn store(&self) -> Result<Option<&dyn JobStore>, Error> {
        Ok(Some(self))
    }

    /// Returns whether the last access to the file succeeded.
    fn is_reachable(&self) -> bool {
        self.shared.usable.load(Relaxed)
    }

    fn condition(&self) -> Option<Condition> {
        if self.shared.damaged.load(Relaxed) {
            return Some(Condition::Damaged);
        }
        if self.shared.pressure.is_full() {
            return Some(Condition::DiskFull);
        }
        let set_aside = self.shared.state().damaged.len();
        (set_aside > 0).then_some(Condition::DamagedCalls)
    }

    async fn sweep_expired(&self) {
        // Failures have been logged, and the next run tries again.
        while let Ok(true) = self.submit(WriteOp::Expire).await {}
    }

    /// Closes the file after all pending operations. A file that was closed needs no repair when it is opened again.
    async fn close(&self) {
        let closed = tokio::time::timeout(CLOSE_TIMEOUT, self.submit(WriteOp::Close)).await;
        if !matches!(closed, Ok(Ok(()))) {
            tracing::warn!("The queue's file could not be closed in time");
        }
    }
}

/// Ignores the signal that a write beyond the file size limit (`ulimit -f`) raises and that would end the process. The
/// write fails with an error, like on a full disk.
fn ignore_file_size_signal() {
    let exceeded = rustix::process::Signal::XFSZ.as_raw();
    // If this fails, only that error is lost.
    let _ = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::from_raw(exceeded));
}

impl Shared {
    /// Reads the file on a thread that may block, also while the file is being reopened.
    async fn read_blocking<T: Send + 'static>(
        self: Arc<Self>,
        read: impl FnOnce(&Self) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let read = move || {
            self.wait_until_open();
            read(&self)
        };
        tokio::task::spawn_blocking(read).await.map_err(|_| Error::Failed)?
    }

    fn next_number(&self) -> CallSeq {
        self.next_number.fetch_add(1, Relaxed)
    }

    /// Converts `call` to the form in which it is written.
    fn publish_request(&self, call: QueuedCall, permit: Option<MemoryPermit>) -> PublishRequest {
        PublishRequest {
            label: call.function.to_string(),
            due: call.options.not_before.unwrap_or(0),
            encoded: call.encode(),
            number: (!call.options.chosen_id).then(|| self.ids.decode(&call.id)).flatten(),
            digest: call.options.digest,
            key: call.options.idempotency_key,
            id: call.id,
            _permit: permit,
        }
    }

    /// Returns `call` under a generated id, or `None` if it cannot be decoded.
    fn with_new_id(&self, call: &PublishRequest) -> Option<PublishRequest> {
        let id = self.ids.encode(self.next_number());
        let renamed = QueuedCall::decode(&call.encoded).ok()?.with_new_id(id);
        Some(self.publish_request(renamed, None))
    }

    fn state(&self) -> MutexGuard<'_, QueueState> {
        lock_unpoisoned(&self.state)
    }

    /// Reads an encoded call. Calls that were enqueued in the same batch are cached.
    fn read_call(&self, number: CallSeq) -> Result<Option<Bytes>, Error> {
        if let Some(call) = self.read_snapshot(|snapshot| snapshot.stored_call(number))? {
            return Ok(Some(call));
        }
        let Some(batch) = self.read_snapshot(|snapshot| snapshot.pending_batch(number))? else {
            return Ok(None);
        };
        let call = PackedBatch::new(&batch).get(number).map(|call| batch.slice_ref(call));
        self.state().batch_cache.add(batch);
        Ok(call)
    }
}

#[cfg(test)]
mod tests;
