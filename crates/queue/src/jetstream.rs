//! The queue on a NATS server with JetStream.
//!
//! A call is one message from its publish to its end. The message records the number of attempts and the earliest time
//! of the next one. A retry replaces the message in one step, so a crash never loses a call; at worst the call is
//! executed twice. Calls of one function that arrive at the same time share one message (a batch) until they finish or
//! are split out of it. Claims, final states, responses and idempotency keys are stored before the message is removed,
//! never after.
//!
//! `jetstream/README.md` has the states of a call, the stored formats, the order of all writes, and what a crash after
//! each of them leaves behind.

mod ack;
mod admin;
mod api;
mod batch;
mod cancel;
mod consume;
mod consumers;
mod dead_letters;
mod decide;
mod error;
mod failure_counts;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod gc;
mod job_queue;
mod job_store;
mod location;
mod lookup;
#[cfg(test)]
mod model;
mod options;
mod publish;
mod repair;
mod results;
mod running_calls;
mod streams;
mod undecodable;
mod wire;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::{Notify, OnceCell, Semaphore};

pub(super) use self::consume::lease::Lease;
pub use self::options::{Auth, Options};
pub use self::wire::tokens::encode_token;

use crate::call::QueuedCall;
use crate::jetstream::admin::counts::CountEstimate;
use crate::jetstream::api::JetStreamApi;
use crate::jetstream::batch::dirty_batches::DirtyBatches;
use crate::jetstream::consume::claims::Claims;
use crate::jetstream::consume::prefetch::Prefetched;
use crate::jetstream::consume::pull_scheduler::PullScheduler;
use crate::jetstream::consume::received::Received;
use crate::jetstream::consumers::Consumers;
use crate::jetstream::error::NatsError;
use crate::jetstream::failure_counts::FailureCounts;
use crate::jetstream::gc::bodies::StoredBody;
use crate::jetstream::publish::batcher::Batcher;
use crate::jetstream::publish::capacity::Capacity;
use crate::jetstream::wire::ids::BatchKeys;
use crate::jetstream::wire::subjects::Subjects;
use crate::reply_batch::ReplyChannel;
use crate::tasks::Tasks;
use crate::{Error, Published};
use gateway_base::sync::lock_unpoisoned;

/// Time limit of a publish: of a small body, and of a body that needs several messages.
const PUBLISH_TIMEOUT: Duration = Duration::from_millis(1900);
const LARGE_PUBLISH_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit of a status or result query.
const QUERY_TIMEOUT: Duration = Duration::from_millis(1900);
/// Interval between two checks of streams that could not be used.
const INCOMPATIBLE_RECHECK: Duration = Duration::from_secs(5);

/// The JetStream backend of the queue. Clones share one connection.
#[derive(Clone)]
pub struct JetStream {
    shared: Arc<Shared>,
    /// Delivers the results of publishes to the thread that waits for them; only threads that publish much have one.
    reply_channel: Option<ReplyChannel>,
}

struct Shared {
    options: Options,
    subjects: Subjects,
    api: JetStreamApi,
    /// Buffered calls, and pulls in progress. A leaf; `prefetched` or a batch may be held.
    pull_scheduler: Mutex<PullScheduler<Received>>,
    /// Claimed calls without a receiver. Rank 2: `pull_scheduler` is locked under it.
    prefetched: Mutex<Prefetched>,
    claims: Claims,
    /// Subject prefix under which pulled messages arrive.
    inbox: OnceCell<String>,
    /// Cache of the consumers on the server. A leaf.
    consumers: Mutex<Consumers>,
    batcher: Batcher,
    batch_keys: BatchKeys,
    capacity: Capacity,
    /// A leaf.
    dirty_batches: Mutex<DirtyBatches>,
    /// Number of times a body was not found, by call id.
    missing_body_counts: FailureCounts,
    /// Number of panics of the worker, by call id.
    panic_counts: FailureCounts,
    /// Last estimate of the counts of a large queue. A leaf.
    count_estimate: Mutex<Option<CountEstimate>>,
    /// Serializes searches by id alone: the server then scans every subject.
    search_slot: Semaphore,
    /// Time of the last function discovery, and the connection it used. A leaf.
    last_discovery: Mutex<Option<(Instant, u64)>>,
    /// Why a stream could not be used, and the time at which that was found. A leaf.
    incompatible: Mutex<Option<(Instant, Arc<str>)>>,
    /// Time of the last garbage collection. Rank 2: `gc_cursor` is locked under it.
    last_gc: Mutex<Instant>,
    /// The last body that an unfinished collection has checked. A leaf.
    gc_cursor: Mutex<Option<StoredBody>>,
    /// Notified when a call may be available.
    call_available: Notify,
    tasks: Tasks,
}

impl JetStream {
    /// Starts to connect and returns immediately. While the server is unavailable, operations of the queue fail; they
    /// work once it is reachable.
    ///
    /// # Errors
    /// When a file of the options cannot be read, or a server address is invalid. The caller should report a
    /// configuration error.
    pub async fn open(options: Options) -> anyhow::Result<Self> {
        if options.in_memory {
            tracing::warn!(
                "Queued calls are stored in the memory of NATS: they are lost when its servers stop"
            );
        }
        let api = JetStreamApi::open(&options).await?;
        let shared = Shared {
            subjects: Subjects::new(&options.queue),
            options,
            api,
            pull_scheduler: Mutex::new(PullScheduler::new()),
            prefetched: Mutex::default(),
            claims: Claims::new(),
            inbox: OnceCell::new(),
            consumers: Mutex::default(),
            batcher: Batcher::new(),
            batch_keys: BatchKeys::new(),
            capacity: Capacity::new(),
            dirty_batches: Mutex::default(),
            missing_body_counts: FailureCounts::default(),
            panic_counts: FailureCounts::default(),
            count_estimate: Mutex::default(),
            search_slot: Semaphore::new(1),
            last_discovery: Mutex::default(),
            incompatible: Mutex::default(),
            last_gc: Mutex::new(Instant::now()),
            gc_cursor: Mutex::default(),
            call_available: Notify::new(),
            tasks: Tasks::new(),
        };
        let shared = Arc::new(shared);
        Batcher::start(&shared);
        Ok(Self { shared, reply_channel: None })
    }

    /// Waits for the server for a moment, and checks that the streams of the queue can be used.
    ///
    /// # Errors
    /// When a stream has settings that the queue cannot work with. The text names the setting and the remedy. An
    /// unavailable server is no error.
    pub async fn check_streams(&self) -> anyhow::Result<()> {
        match self.shared.ready().await {
            Err(error @ NatsError::Incompatible(_)) => Err(error.into()),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Removes bodies older than `age` that no call refers to, batch records without a batch, and consumers unused for
    /// `idle`. They are left behind when a process or a server is killed. Call it about every hour. Returns the number
    /// of removed bodies.
    ///
    /// # Errors
    /// When the server is unavailable or rejects a request. The next run continues where this one stopped.
    pub async fn collect_garbage(&self, age: Duration, idle: Duration) -> Result<u64, Error> {
        let shared = self.shared.ready().await?;
        shared.collect_records(age).await?;
        let removed = shared.collect_bodies(age).await?;
        shared.collect_consumers(idle).await?;
        Ok(removed)
    }
}

impl Shared {
    fn pull_scheduler(&self) -> MutexGuard<'_, PullScheduler<Received>> {
        lock_unpoisoned(&self.pull_scheduler)
    }

    fn prefetched(&self) -> MutexGuard<'_, Prefetched> {
        lock_unpoisoned(&self.prefetched)
    }

    fn consumers(&self) -> MutexGuard<'_, Consumers> {
        lock_unpoisoned(&self.consumers)
    }

    /// Waits until the server is connected and all streams of the queue exist.
    async fn ready(&self) -> Result<&Self, NatsError> {
        match self.api.current_connection() {
            Some(connection) if self.api.is_initialized(connection) => Ok(self),
            // Boxed, here and elsewhere: a rare branch must not enlarge the future of every call.
            _ => Box::pin(self.initialize()).await,
        }
    }

    /// Publishes a call; fails with [`Error::Unreachable`] after the time limit.
    async fn publish_with_timeout(&self, call: &QueuedCall) -> Result<Published, Error> {
        with_timeout(self.publish_timeout(call), self.publish(call)).await
    }

    fn publish_timeout(&self, call: &QueuedCall) -> Duration {
        if self.api.fits_in_payload(0, call.body.len()) {
            PUBLISH_TIMEOUT
        } else {
            LARGE_PUBLISH_TIMEOUT
        }
    }

    async fn initialize(&self) -> Result<&Self, NatsError> {
        let connection = self.api.wait_connected().await?;
        if !self.api.is_initialized(connection) {
            if let Some((at, reason)) = &*lock_unpoisoned(&self.incompatible)
                && at.elapsed() < INCOMPATIBLE_RECHECK
            {
                return Err(NatsError::Incompatible(Arc::clone(reason)));
            }
            // Several tasks may run this at the same time: it is idempotent.
            let last = streams::ensure_streams(&self.api, &self.subjects, &self.options).await;
            let last = last.inspect_err(|error| self.note_incompatible(error))?;
            self.api.mark_initialized(connection, last);
            self.consumers().reset(connection);
        }
        Ok(self)
    }

    /// Logs that a stream cannot be used, and delays the next check.
    fn note_incompatible(&self, error: &NatsError) {
        let NatsError::Incompatible(reason) = error else { return };
        let mut incompatible = lock_unpoisoned(&self.incompatible);
        if incompatible.as_ref().is_none_or(|(_, logged)| logged != reason) {
            tracing::error!("The queue cannot be used: {reason}");
        }
        *incompatible = Some((Instant::now(), Arc::clone(reason)));
    }
}

fn with_timeout<T>(
    deadline: Duration,
    task: impl Future<Output = Result<T, Error>>,
) -> impl Future<Output = Result<T, Error>> {
    // Not `async`: that would double the size of the future.
    tokio::time::timeout(deadline, task).map(|done| done.unwrap_or(Err(Error::Unreachable)))
}
