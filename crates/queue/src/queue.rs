//! Asynchronous calls: durable queues of calls that workers receive, execute and settle.
//!
//! [`Queue`] is the interface of all backends: a file of this process (`embedded`), NATS JetStream (`jetstream`) and
//! NATS Streaming (`stan`). Finished calls are kept for a limited time, so that clients can read their state and
//! response.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::call::{QueuedCall, UnixMillis};
use crate::detector::BackendDetector;
use crate::embedded::{self, Embedded};
use crate::jetstream::{self, JetStream};
use crate::memory::MemoryPermit;
use crate::stan::{self, Stan};
use crate::status::{CallRecord, CallState, Settlement, StoredResponse};
use gateway_base::function::Function;

/// Maximum of `max_async_body_bytes`, and of the memory for all bodies that are being stored.
pub const MAX_ASYNC_BODY_BYTES: usize = 256 << 20;

/// A queue of calls. Cheap to clone.
#[derive(Clone)]
pub enum Queue {
    /// A file owned by this process.
    Embedded(Embedded),
    /// NATS JetStream.
    JetStream(JetStream),
    /// NATS Streaming.
    Stan(Stan),
    /// JetStream or NATS Streaming, whichever the server turns out to run.
    Detected(BackendDetector),
}

/// Errors of queue operations.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the queue is full")]
    Full,
    #[error("the disk of the queue is full")]
    NoSpace,
    #[error("the queue cannot be reached")]
    Unreachable,
    #[error(
        "the queue has not confirmed the call, which may be stored: sent again with the same X-Call-Id, it is executed once"
    )]
    Unconfirmed,
    #[error("the queue failed")]
    Failed,
    #[error("the body exceeds the queue's limit: {0} bytes")]
    TooLarge(usize),
    #[error("the headers and the target exceed the queue's limit: {0} bytes")]
    HeadTooLarge(usize),
    #[error("the lease of the call was lost")]
    Gone,
    #[error("the queue does not support this: {0}")]
    Unsupported(&'static str),
}

/// Degraded states of a queue that still works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing is enqueued. Calls that are already queued are still executed.
    DiskFull,
    /// Some calls are damaged. They stay in the file and are not executed.
    DamagedCalls,
    /// The queue's file is damaged and no longer used.
    Damaged,
}

/// A call that has been enqueued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    pub id: String,
    /// The call had already been enqueued under the same id or the same idempotency key.
    pub duplicate: bool,
}

/// A call that a worker has received. If it is dropped without being settled, the queue delivers it again.
#[derive(Debug)]
pub struct Delivery {
    pub call: QueuedCall,
    /// Number of earlier executions.
    pub attempts: u32,
    /// The call cannot be executed, because its body no longer exists.
    pub body_missing: bool,
    /// Backend part of the delivery.
    pub(crate) handle: LeaseHandle,
}

/// Backend part of a delivery.
#[derive(Debug)]
pub(crate) enum LeaseHandle {
    Embedded(embedded::Lease),
    JetStream(Box<jetstream::Lease>),
    Stan(Box<stan::Lease>),
}

/// Operations that NATS Streaming does not offer.
const STATUS_UNSUPPORTED: Error =
    Error::Unsupported("NATS Streaming does not store the state of calls");
const CHANGES_UNSUPPORTED: Error = Error::Unsupported("NATS Streaming cannot change queued calls");
const LISTING_UNSUPPORTED: Error = Error::Unsupported("NATS Streaming cannot list queued calls");

/// One page of a list of calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallPage {
    pub calls: Vec<CallRecord>,
    /// `false` if the list was cut short: some calls may then appear on no page.
    pub complete: bool,
}

/// Result of a request to cancel a call or to redrive a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeOutcome {
    Applied,
    /// The call is in a state that does not allow the change.
    WrongState(CallState),
    NotFound,
}

/// Selects and orders calls.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub state: Option<CallState>,
    pub function: Option<Function>,
    pub dead_letter: Option<bool>,
    pub order: Order,
}

/// Order of a list of calls, by the time of submission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    OldestFirst,
    NewestFirst,
}

/// Number of calls of one function, by state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueDepth {
    pub pending: u64,
    pub running: u64,
    pub delayed: u64,
    pub dead_letters: u64,
    /// Submission time of the oldest pending call.
    pub oldest: Option<UnixMillis>,
}

/// The current time in milliseconds since 1970.
pub fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis::try_from(since.as_millis()).unwrap_or(UnixMillis::MAX)
}

impl Queue {
    /// The backend in use.
    ///
    /// # Errors
    ///
    /// `Unreachable` while the backend has not been detected yet.
    fn backend(&self) -> Result<&Self, Error> {
        match self {
            Self::Detected(detector) => detector.detected().ok_or(Error::Unreachable),
            backend => Ok(backend),
        }
    }

    /// A handle for a thread that uses the queue often. It must be called on the runtime of that thread, where replies
    /// are then delivered in batches.
    #[must_use]
    pub fn for_thread(&self) -> Self {
        match self {
            Self::Embedded(queue) => Self::Embedded(queue.for_thread()),
            Self::JetStream(queue) => Self::JetStream(queue.for_thread()),
            Self::Detected(detector) => Self::Detected(detector.for_thread()),
            other => other.clone(),
        }
    }

    /// Returns whether the backend was reachable when it was last used or probed.
    pub fn is_reachable(&self) -> bool {
        match self.backend() {
            Ok(Self::Embedded(queue)) => queue.is_usable(),
            Ok(Self::JetStream(queue)) => queue.is_reachable(),
            Ok(Self::Stan(queue)) => queue.is_reachable(),
            Ok(Self::Detected(_)) | Err(_) => false,
        }
    }

    /// Returns the degraded state of the queue, if any.
    pub fn condition(&self) -> Option<Condition> {
        match self.backend() {
            Ok(Self::Embedded(queue)) => queue.condition(),
            _ => None,
        }
    }

    /// Probes the backend. Only JetStream needs it; the others know their state without asking.
    pub async fn probe(&self) {
        if let Ok(Self::JetStream(queue)) = self.backend() {
            queue.probe().await;
        }
    }

    /// Number of reconnects to the queue's server.
    pub fn reconnects(&self) -> u64 {
        match self.backend() {
            Ok(Self::JetStream(queue)) => queue.reconnects(),
            Ok(Self::Stan(queue)) => queue.reconnects(),
            _ => 0,
        }
    }

    /// Largest body in bytes that the backend accepts, if it has a limit of its own.
    pub fn max_body_bytes(&self) -> Option<usize> {
        match self.backend() {
            Ok(Self::Stan(queue)) => Some(queue.max_body_bytes()),
            _ => None,
        }
    }

    /// Removes results and idempotency keys whose time to live has passed. The caller runs it about once a second.
    pub async fn sweep_expired(&self) {
        match self.backend() {
            Ok(Self::Embedded(queue)) => queue.sweep_expired().await,
            Ok(Self::JetStream(queue)) => queue.sweep_expired().await,
            Ok(Self::Stan(_) | Self::Detected(_)) | Err(_) => {}
        }
    }

    /// Stops the background tasks of the queue. All deliveries must have been settled or dropped before.
    pub async fn stop(&self) {
        if let Self::Detected(detector) = self {
            detector.stop().await;
        }
        match self.backend() {
            Ok(Self::Embedded(queue)) => queue.close().await,
            Ok(Self::JetStream(queue)) => queue.stop().await,
            Ok(Self::Stan(queue)) => queue.stop().await,
            Ok(Self::Detected(_)) | Err(_) => {}
        }
    }

    /// Generates an id for a call of `function`. The id is a UUID that the backend can look up without an index.
    pub fn new_call_id(&self, function: &Function) -> String {
        match self.backend() {
            Ok(Self::Embedded(queue)) => queue.new_call_id(),
            Ok(Self::JetStream(_)) => JetStream::new_call_id(function),
            Ok(Self::Stan(_) | Self::Detected(_)) | Err(_) => uuid::Uuid::new_v4().to_string(),
        }
    }

    /// Enqueues `call`. Returns when the call is durable.
    ///
    /// # Errors
    ///
    /// `Full` and `NoSpace` when the call does not fit; the client should retry later. `TooLarge` and `HeadTooLarge`
    /// when it never will. `Unreachable` and `Failed` when nothing was enqueued. `Unconfirmed` when the call may have
    /// been stored: publishing it again under the same id is safe.
    pub async fn publish(&self, call: QueuedCall) -> Result<Published, Error> {
        self.publish_with_permit(call, None).await
    }

    /// As [`Self::publish`]. The queue drops `permit`, the memory permit of the body, together with its copy of the
    /// call.
    ///
    /// # Errors
    ///
    /// As [`Self::publish`].
    pub async fn publish_with_permit(
        &self,
        call: QueuedCall,
        permit: Option<MemoryPermit>,
    ) -> Result<Published, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.publish(call, permit).await,
            Self::JetStream(queue) => queue.publish(call, permit).await,
            Self::Stan(queue) => Box::pin(queue.publish(call)).await,
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Waits for the next call that is due. `concurrency` is the number of calls that the receiver executes in
    /// parallel; it bounds the share of each function. Cancel-safe: a call that was selected but not returned is
    /// delivered again.
    ///
    /// # Errors
    ///
    /// When the backend fails. The receiver should retry after a pause.
    pub async fn receive(&self, concurrency: usize) -> Result<Delivery, Error> {
        if let Self::Detected(detector) = self {
            detector.wait_until_detected().await;
        }
        match self.backend()? {
            Self::Embedded(queue) => queue.receive(concurrency).await,
            Self::JetStream(queue) => queue.receive(concurrency).await,
            Self::Stan(queue) => queue.receive(concurrency).await,
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Stops receiving. Calls that have been received are not affected.
    pub fn stop_receiving(&self) {
        if let Ok(Self::Stan(queue)) = self.backend() {
            queue.stop_receiving();
        }
    }

    /// Claims the execution of a delivery. Returns `false` if the call must not be executed: NATS Streaming may have
    /// stored it several times, and then only one of its messages is executed. The others are finished by this.
    ///
    /// # Errors
    ///
    /// When the claim cannot be decided. The call is delivered again later.
    pub async fn claim(&self, delivery: &Delivery) -> Result<bool, Error> {
        match (self.backend()?, &delivery.handle) {
            (Self::Stan(queue), LeaseHandle::Stan(lease)) => Box::pin(queue.claim(lease)).await,
            _ => Ok(true),
        }
    }

    /// Releases the concurrency slot of a delivery whose execution and callback are complete, before its settlement is
    /// durable.
    pub fn release_slot(&self, delivery: &Delivery) {
        match &delivery.handle {
            LeaseHandle::Embedded(lease) => lease.release_slot(),
            LeaseHandle::JetStream(lease) => lease.release_slot(),
            // The server limits unacknowledged messages itself.
            LeaseHandle::Stan(_) => {}
        }
    }

    /// Settles a delivery. Returns when the settlement is durable.
    ///
    /// # Errors
    ///
    /// `Gone` when the lease was lost: another worker owns the call now. After any other error the caller may retry.
    pub async fn settle(&self, delivery: &Delivery, settlement: &Settlement) -> Result<(), Error> {
        match (self.backend()?, &delivery.handle) {
            (Self::Embedded(queue), LeaseHandle::Embedded(lease)) => {
                queue.settle(lease, &delivery.call, settlement).await
            }
            (Self::JetStream(queue), LeaseHandle::JetStream(lease)) => {
                queue.settle(lease, settlement).await
            }
            (Self::Stan(queue), LeaseHandle::Stan(lease)) => {
                // Boxed: this future is larger than those of the other backends, which are part of the future of each
                // call.
                Box::pin(queue.settle(lease, settlement)).await
            }
            // The delivery belongs to another queue, which redelivers the call when the delivery is dropped.
            _ => Err(Error::Unsupported("settling a call of another queue")),
        }
    }

    /// Returns the record of a call, or `None` if the id is unknown or no longer kept.
    ///
    /// # Errors
    ///
    /// When the backend fails, or does not store records (`Unsupported`).
    pub async fn status(&self, id: &str) -> Result<Option<CallRecord>, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.status(id).await,
            Self::JetStream(queue) => queue.status(id).await,
            Self::Stan(_) => Err(STATUS_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Returns the stored response of a finished call, if one was kept.
    ///
    /// # Errors
    ///
    /// As [`Self::status`].
    pub async fn result(&self, id: &str) -> Result<Option<StoredResponse>, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.result(id).await,
            Self::JetStream(queue) => queue.result(id).await,
            Self::Stan(_) => Err(STATUS_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Cancels a call that is not running.
    ///
    /// # Errors
    ///
    /// When the backend fails, or cannot cancel (`Unsupported`). The caller may retry.
    pub async fn cancel(&self, id: &str) -> Result<ChangeOutcome, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.cancel(id).await,
            Self::JetStream(queue) => queue.cancel(id).await,
            Self::Stan(_) => Err(CHANGES_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Enqueues a dead letter again, with all its attempts.
    ///
    /// # Errors
    ///
    /// As [`Self::cancel`].
    pub async fn redrive(&self, id: &str) -> Result<ChangeOutcome, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.redrive(id).await,
            Self::JetStream(queue) => queue.redrive(id).await,
            Self::Stan(_) => Err(CHANGES_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Lists at most `limit` calls after the one with the id `after`, in the order of `filter`.
    ///
    /// # Errors
    ///
    /// When the backend fails, or cannot list calls (`Unsupported`).
    pub async fn list(
        &self,
        filter: &Filter,
        after: Option<&str>,
        limit: usize,
    ) -> Result<CallPage, Error> {
        match self.backend()? {
            Self::Embedded(queue) => {
                let calls = queue.list(filter, after, limit).await?;
                Ok(CallPage { calls, complete: true })
            }
            Self::JetStream(queue) => queue.list(filter, after, limit).await,
            Self::Stan(_) => Err(LISTING_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Deletes the calls that match `filter` and do not run. Returns their number.
    ///
    /// # Errors
    ///
    /// As [`Self::list`]. Some calls may have been deleted.
    pub async fn purge(&self, filter: &Filter) -> Result<u64, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.purge(filter).await,
            Self::JetStream(queue) => queue.purge(filter).await,
            Self::Stan(_) => Err(LISTING_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Counts the calls of each function by state.
    ///
    /// # Errors
    ///
    /// As [`Self::list`].
    pub async fn depths(&self) -> Result<Vec<(Function, QueueDepth)>, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.depths().await,
            Self::JetStream(queue) => queue.depths().await,
            Self::Stan(_) => Err(LISTING_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }
}
