//! Calls that are made later: taken in durably, handed to workers, settled, and remembered for a while.

pub mod call;
pub mod detector;
pub mod embedded;
pub(crate) mod fair_share;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod jetstream;
pub mod memory;
mod reply_batch;
pub mod stan;
pub mod status;
mod tasks;

pub use self::memory::MemoryPermit;

use std::time::{SystemTime, UNIX_EPOCH};

use crate::function::Function;
use crate::queue::call::{QueuedCall, UnixMillis};
use crate::queue::detector::BackendDetector;
use crate::queue::embedded::Embedded;
use crate::queue::jetstream::JetStream;
use crate::queue::stan::Stan;
use crate::queue::status::{CallRecord, CallState, Settlement, StoredResponse};

/// A queue of calls. Cheap to clone.
#[derive(Clone)]
pub enum Queue {
    /// A file of this process.
    Embedded(Embedded),
    /// A NATS server with JetStream.
    JetStream(JetStream),
    /// NATS Streaming.
    Stan(Stan),
    /// One of the two, when it has been found out which.
    Detected(BackendDetector),
}

/// Why a queue does not do what it is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the queue is full")]
    Full,
    #[error("there is no room left on the disk of the queue")]
    NoSpace,
    #[error("the queue cannot be reached")]
    Unreachable,
    #[error(
        "the queue has not confirmed the call, which may be stored: sent again with the same X-Call-Id, it is executed once"
    )]
    Unconfirmed,
    #[error("the queue failed")]
    Failed,
    #[error("the body exceeds what the queue takes: {0} bytes")]
    TooLarge(usize),
    #[error("the headers and the target exceed what the queue takes: {0} bytes")]
    HeadTooLarge(usize),
    #[error("the call is not there any more")]
    Gone,
    #[error("the queue cannot do that: {0}")]
    Unsupported(&'static str),
}

/// What is wrong with a queue that can be used all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing is enqueued, but calls that are queued are executed.
    DiskFull,
    /// Some calls are damaged and set aside.
    DamagedCalls,
    /// The queue's file is damaged and is not used any more.
    Damaged,
}

/// A call that has been taken in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    pub id: String,
    /// It had been taken in before, under the same id or the same idempotency key.
    pub duplicate: bool,
}

/// A call that a worker has taken. One that is dropped without being settled is taken again.
#[derive(Debug)]
pub struct Delivery {
    pub call: QueuedCall,
    /// How often it has been made before.
    pub attempts: u32,
    /// It cannot be made: its body is not there any more.
    pub body_missing: bool,
    /// What its queue knows it by.
    handle: LeaseHandle,
}

/// What a queue knows a delivery by.
#[derive(Debug)]
enum LeaseHandle {
    Embedded(embedded::Lease),
    JetStream(Box<jetstream::Lease>),
    Stan(Box<stan::Lease>),
}

/// What NATS Streaming is not asked for.
const STATUS_UNSUPPORTED: Error =
    Error::Unsupported("NATS Streaming does not tell what became of a call");
const CHANGES_UNSUPPORTED: Error =
    Error::Unsupported("NATS Streaming does not give back what was queued");
const LISTING_UNSUPPORTED: Error =
    Error::Unsupported("NATS Streaming does not tell what is queued");

/// A page of a list of calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallPage {
    pub calls: Vec<CallRecord>,
    /// Whether every call was looked at. Otherwise some calls may be on no page.
    pub complete: bool,
}

/// What came of an attempt to cancel a call, or to try a dead one again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeOutcome {
    Applied,
    /// It is in a state that does not allow it.
    WrongState(CallState),
    NotFound,
}

/// Which calls are meant, and the order in which they are listed.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub state: Option<CallState>,
    pub function: Option<Function>,
    pub dead_letter: Option<bool>,
    pub order: Order,
}

/// The order of a list of calls: by the time at which they were submitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    OldestFirst,
    NewestFirst,
}

/// The calls of one function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueDepth {
    pub pending: u64,
    pub running: u64,
    pub delayed: u64,
    pub dead_letters: u64,
    /// When the oldest that waits was submitted.
    pub oldest: Option<UnixMillis>,
}

/// The time in milliseconds since 1970.
pub fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis::try_from(since.as_millis()).unwrap_or(UnixMillis::MAX)
}

impl Queue {
    /// This, or the queue that was found; there is none before.
    fn backend(&self) -> Result<&Self, Error> {
        match self {
            Self::Detected(detector) => detector.found().ok_or(Error::Unreachable),
            known => Ok(known),
        }
    }

    /// This queue, for one who asks much of it on the current thread and its runtime.
    #[must_use]
    pub fn for_thread(&self) -> Self {
        match self {
            Self::Embedded(queue) => Self::Embedded(queue.for_thread()),
            Self::JetStream(queue) => Self::JetStream(queue.for_thread()),
            Self::Detected(detector) => Self::Detected(detector.for_thread()),
            other => other.clone(),
        }
    }

    /// Whether the queue can be used at this moment, as far as is known.
    pub fn is_reachable(&self) -> bool {
        match self.backend() {
            Ok(Self::Embedded(queue)) => queue.is_usable(),
            Ok(Self::JetStream(queue)) => queue.is_reachable(),
            Ok(Self::Stan(queue)) => queue.is_reachable(),
            Ok(Self::Detected(_)) | Err(_) => false,
        }
    }

    /// What is wrong with the queue though it can be used, as far as is known.
    pub fn condition(&self) -> Option<Condition> {
        match self.backend() {
            Ok(Self::Embedded(queue)) => queue.condition(),
            _ => None,
        }
    }

    /// Finds out whether the queue can be used, where that is not known without asking.
    pub async fn probe(&self) {
        if let Ok(Self::JetStream(queue)) = self.backend() {
            queue.probe().await;
        }
    }

    /// How often the connection to the queue's server has come back.
    pub fn reconnects(&self) -> u64 {
        match self.backend() {
            Ok(Self::JetStream(queue)) => queue.reconnects(),
            Ok(Self::Stan(queue)) => queue.reconnects(),
            _ => 0,
        }
    }

    /// The largest body that the queue takes, if it has a say in that.
    pub fn max_body_bytes(&self) -> Option<usize> {
        match self.backend() {
            Ok(Self::Stan(queue)) => Some(queue.max_body_bytes()),
            _ => None,
        }
    }

    /// Forgets what has been kept for long enough. To be called every second or so.
    pub async fn sweep_expired(&self) {
        match self.backend() {
            Ok(Self::Embedded(queue)) => queue.sweep_expired().await,
            Ok(Self::JetStream(queue)) => queue.sweep_expired().await,
            Ok(Self::Stan(_) | Self::Detected(_)) | Err(_) => {}
        }
    }

    /// Ends what goes on by itself. All that was taken must have been settled or dropped.
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

    /// An id for a call of `function` whose caller has not chosen one.
    pub fn new_call_id(&self, function: &Function) -> String {
        match self.backend() {
            Ok(Self::Embedded(queue)) => queue.new_call_id(),
            Ok(Self::JetStream(_)) => JetStream::new_call_id(function),
            Ok(Self::Stan(_) | Self::Detected(_)) | Err(_) => uuid::Uuid::new_v4().to_string(),
        }
    }

    /// Takes `call` in. Returns when it is durable.
    pub async fn publish(&self, call: QueuedCall) -> Result<Published, Error> {
        self.publish_with_permit(call, None).await
    }

    /// The same; `room` is what the call takes of the memory, and is let go of with the call.
    pub async fn publish_with_permit(
        &self,
        call: QueuedCall,
        room: Option<MemoryPermit>,
    ) -> Result<Published, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.publish(call, room).await,
            Self::JetStream(queue) => queue.publish(call, room).await,
            Self::Stan(queue) => Box::pin(queue.publish(call)).await,
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// The next call whose time has come, for one who makes at most `places` calls at a time. Cancel-safe: a call that
    /// nobody received is taken again.
    pub async fn receive(&self, places: usize) -> Result<Delivery, Error> {
        if let Self::Detected(detector) = self {
            detector.until_found().await;
        }
        match self.backend()? {
            Self::Embedded(queue) => queue.receive(places).await,
            Self::JetStream(queue) => queue.receive(places).await,
            Self::Stan(queue) => queue.receive(places).await,
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Nobody here takes another call, though those that were taken are still being made.
    pub fn stop_receiving(&self) {
        if let Ok(Self::Stan(queue)) = self.backend() {
            queue.stop_receiving();
        }
    }

    /// Whether a call that was taken is to be executed. NATS Streaming may have stored it several times: then one of its
    /// messages is, and the others are over with this.
    ///
    /// # Errors
    /// When that cannot be found out. The call is taken again later.
    pub async fn claim(&self, delivery: &Delivery) -> Result<bool, Error> {
        match (self.backend()?, &delivery.handle) {
            (Self::Stan(queue), LeaseHandle::Stan(lease)) => Box::pin(queue.claim(lease)).await,
            _ => Ok(true),
        }
    }

    /// It is decided what becomes of the call, and whoever is to be called back has been: another call may have its
    /// place, though nothing is noted yet.
    pub fn release_slot(&self, delivery: &Delivery) {
        match &delivery.handle {
            LeaseHandle::Embedded(lease) => lease.release_slot(),
            LeaseHandle::JetStream(lease) => lease.release_slot(),
            // The server counts what is not acknowledged.
            LeaseHandle::Stan(_) => {}
        }
    }

    /// Says how a call that was taken goes on. Returns when that is durable.
    ///
    /// # Errors
    /// `Gone` when the call is no longer this delivery's; after any other it can be tried again.
    pub async fn settle(&self, delivery: &Delivery, settlement: &Settlement) -> Result<(), Error> {
        match (self.backend()?, &delivery.handle) {
            (Self::Embedded(queue), LeaseHandle::Embedded(lease)) => {
                queue.settle(lease, &delivery.call, settlement).await
            }
            (Self::JetStream(queue), LeaseHandle::JetStream(lease)) => {
                queue.settle(lease, settlement).await
            }
            (Self::Stan(queue), LeaseHandle::Stan(lease)) => {
                // Larger than the others, which are one with the future of the call.
                Box::pin(queue.settle(lease, settlement)).await
            }
            // It goes back to where it is from when it is dropped here.
            _ => Err(Error::Unsupported("settle a call of another queue")),
        }
    }

    /// The state of a call; `None` if it is not known, or not any more.
    pub async fn status(&self, id: &str) -> Result<Option<CallRecord>, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.status(id).await,
            Self::JetStream(queue) => queue.status(id).await,
            Self::Stan(_) => Err(STATUS_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// The stored answer of a finished call.
    pub async fn result(&self, id: &str) -> Result<Option<StoredResponse>, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.result(id).await,
            Self::JetStream(queue) => queue.result(id).await,
            Self::Stan(_) => Err(STATUS_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Takes back a call that has not been made yet.
    pub async fn cancel(&self, id: &str) -> Result<ChangeOutcome, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.cancel(id).await,
            Self::JetStream(queue) => queue.cancel(id).await,
            Self::Stan(_) => Err(CHANGES_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// Has a dead call tried again, with all its attempts.
    pub async fn redrive(&self, id: &str) -> Result<ChangeOutcome, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.redrive(id).await,
            Self::JetStream(queue) => queue.redrive(id).await,
            Self::Stan(_) => Err(CHANGES_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// At most `limit` calls that follow the one with the id `after` in the order of `filter`.
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

    /// Drops the calls that `filter` means and that do not run; how many there were.
    pub async fn purge(&self, filter: &Filter) -> Result<u64, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.purge(filter).await,
            Self::JetStream(queue) => queue.purge(filter).await,
            Self::Stan(_) => Err(LISTING_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }

    /// How many calls there are, by function.
    pub async fn depths(&self) -> Result<Vec<(Function, QueueDepth)>, Error> {
        match self.backend()? {
            Self::Embedded(queue) => queue.depths().await,
            Self::JetStream(queue) => queue.depths().await,
            Self::Stan(_) => Err(LISTING_UNSUPPORTED),
            Self::Detected(_) => Err(Error::Unreachable),
        }
    }
}
