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

use std::time::{SystemTime, UNIX_EPOCH};

use crate::function::Function;
use crate::queue::call::{QueuedCall, UnixMillis};
use crate::queue::detector::Discovery;
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
    Discovered(Discovery),
}

/// Why a queue does not do what it is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the queue is full")]
    Full,
    #[error("there is no room left on the disk of the queue")]
    NoSpace,
    #[error("the queue cannot be reached")]
    Away,
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

/// A part of the memory that bodies may take.
pub type Room = Option<memory::Reservation>;

/// A call that has been taken in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    pub id: String,
    /// It had been taken in before, under the same id or the same idempotency key.
    pub repeated: bool,
}

/// A call that a worker has taken. One that is dropped without being settled is taken again.
#[derive(Debug)]
pub struct Delivery {
    pub call: QueuedCall,
    /// How often it has been made before.
    pub attempts: u32,
    /// It cannot be made: its body is not there any more.
    pub lost: bool,
    /// What its queue knows it by.
    handle: Handle,
}

/// What a queue knows a delivery by.
#[derive(Debug)]
enum Handle {
    Embedded(embedded::Lease),
    JetStream(Box<jetstream::Lease>),
    Stan(Box<stan::Lease>),
}

/// What NATS Streaming is not asked for.
const UNTOLD: Error = Error::Unsupported("NATS Streaming does not tell what became of a call");
const FIXED: Error = Error::Unsupported("NATS Streaming does not give back what was queued");
const UNLISTED: Error = Error::Unsupported("NATS Streaming does not tell what is queued");

/// A page of a list of calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub calls: Vec<CallRecord>,
    /// Whether every call was looked at. Otherwise some calls may be on no page.
    pub complete: bool,
}

/// What came of an attempt to cancel a call, or to try a dead one again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    Yes,
    /// It is in a state that does not allow it.
    No(CallState),
    Unknown,
}

/// Which calls are meant, and the order in which they are listed.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub state: Option<CallState>,
    pub function: Option<Function>,
    pub dead: Option<bool>,
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
pub struct Counts {
    pub pending: u64,
    pub running: u64,
    pub delayed: u64,
    pub dead: u64,
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
    fn known(&self) -> Result<&Self, Error> {
        match self {
            Self::Discovered(detector) => detector.found().ok_or(Error::Away),
            known => Ok(known),
        }
    }

    /// This queue, for one who asks much of it on the current thread and its runtime.
    #[must_use]
    pub fn for_thread(&self) -> Self {
        match self {
            Self::Embedded(queue) => Self::Embedded(queue.for_thread()),
            Self::JetStream(queue) => Self::JetStream(queue.for_thread()),
            Self::Discovered(detector) => Self::Discovered(detector.for_thread()),
            other => other.clone(),
        }
    }

    /// Whether the queue can be used at this moment, as far as is known.
    pub fn is_reachable(&self) -> bool {
        match self.known() {
            Ok(Self::Embedded(queue)) => queue.is_usable(),
            Ok(Self::JetStream(queue)) => queue.is_reachable(),
            Ok(Self::Stan(queue)) => queue.is_reachable(),
            Ok(Self::Discovered(_)) | Err(_) => false,
        }
    }

    /// What is wrong with the queue though it can be used, as far as is known.
    pub fn condition(&self) -> Option<Condition> {
        match self.known() {
            Ok(Self::Embedded(queue)) => queue.condition(),
            _ => None,
        }
    }

    /// Finds out whether the queue can be used, where that is not known without asking.
    pub async fn look(&self) {
        if let Ok(Self::JetStream(queue)) = self.known() {
            queue.look().await;
        }
    }

    /// How often the connection to the queue's server has come back.
    pub fn reconnects(&self) -> u64 {
        match self.known() {
            Ok(Self::JetStream(queue)) => queue.reconnects(),
            Ok(Self::Stan(queue)) => queue.reconnects(),
            _ => 0,
        }
    }

    /// The largest body that the queue takes, if it has a say in that.
    pub fn max_body(&self) -> Option<usize> {
        match self.known() {
            Ok(Self::Stan(queue)) => Some(queue.max_body()),
            _ => None,
        }
    }

    /// Forgets what has been kept for long enough. To be called every second or so.
    pub async fn expire(&self) {
        match self.known() {
            Ok(Self::Embedded(queue)) => queue.expire().await,
            Ok(Self::JetStream(queue)) => queue.expire().await,
            Ok(Self::Stan(_) | Self::Discovered(_)) | Err(_) => {}
        }
    }

    /// Ends what goes on by itself. All that was taken must have been settled or dropped.
    pub async fn stop(&self) {
        if let Self::Discovered(detector) = self {
            detector.stop().await;
        }
        match self.known() {
            Ok(Self::Embedded(queue)) => queue.close().await,
            Ok(Self::JetStream(queue)) => queue.stop().await,
            Ok(Self::Stan(queue)) => queue.stop().await,
            Ok(Self::Discovered(_)) | Err(_) => {}
        }
    }

    /// An id for a call of `function` whose caller has not chosen one.
    pub fn fresh_id(&self, function: &Function) -> String {
        match self.known() {
            Ok(Self::Embedded(queue)) => queue.fresh_id(),
            Ok(Self::JetStream(_)) => JetStream::fresh_id(function),
            Ok(Self::Stan(_) | Self::Discovered(_)) | Err(_) => uuid::Uuid::new_v4().to_string(),
        }
    }

    /// Takes `call` in. Returns when it is durable.
    pub async fn publish(&self, call: QueuedCall) -> Result<Published, Error> {
        self.publish_with(call, None).await
    }

    /// The same; `room` is what the call takes of the memory, and is let go of with the call.
    pub async fn publish_with(&self, call: QueuedCall, room: Room) -> Result<Published, Error> {
        match self.known()? {
            Self::Embedded(queue) => queue.publish(call, room).await,
            Self::JetStream(queue) => queue.publish(call, room).await,
            Self::Stan(queue) => Box::pin(queue.publish(call)).await,
            Self::Discovered(_) => Err(Error::Away),
        }
    }

    /// The next call whose time has come, for one who makes at most `places` calls at a time. Cancel-safe: a call that
    /// nobody received is taken again.
    pub async fn take(&self, places: usize) -> Result<Delivery, Error> {
        if let Self::Discovered(detector) = self {
            detector.until_found().await;
        }
        match self.known()? {
            Self::Embedded(queue) => queue.take(places).await,
            Self::JetStream(queue) => queue.take(places).await,
            Self::Stan(queue) => queue.take(places).await,
            Self::Discovered(_) => Err(Error::Away),
        }
    }

    /// Nobody here takes another call, though those that were taken are still being made.
    pub fn take_no_more(&self) {
        if let Ok(Self::Stan(queue)) = self.known() {
            queue.take_no_more();
        }
    }

    /// Whether a call that was taken is to be executed. NATS Streaming may have stored it several times: then one of its
    /// messages is, and the others are over with this.
    ///
    /// # Errors
    /// When that cannot be found out. The call is taken again later.
    pub async fn begin(&self, delivery: &Delivery) -> Result<bool, Error> {
        match (self.known()?, &delivery.handle) {
            (Self::Stan(queue), Handle::Stan(lease)) => Box::pin(queue.begin(lease)).await,
            _ => Ok(true),
        }
    }

    /// It is decided what becomes of the call, and whoever is to be called back has been: another call may have its
    /// place, though nothing is noted yet.
    pub fn answered(&self, delivery: &Delivery) {
        match &delivery.handle {
            Handle::Embedded(lease) => lease.answered(),
            Handle::JetStream(lease) => lease.answered(),
            // The server counts what is not acknowledged.
            Handle::Stan(_) => {}
        }
    }

    /// Says how a call that was taken goes on. Returns when that is durable.
    ///
    /// # Errors
    /// `Gone` when the call is no longer this delivery's; after any other it can be tried again.
    pub async fn settle(&self, delivery: &Delivery, settlement: &Settlement) -> Result<(), Error> {
        match (self.known()?, &delivery.handle) {
            (Self::Embedded(queue), Handle::Embedded(lease)) => {
                queue.settle(lease, &delivery.call, settlement).await
            }
            (Self::JetStream(queue), Handle::JetStream(lease)) => {
                queue.settle(lease, settlement).await
            }
            (Self::Stan(queue), Handle::Stan(lease)) => {
                // Larger than the others, which are one with the future of the call.
                Box::pin(queue.settle(lease, settlement)).await
            }
            // It goes back to where it is from when it is dropped here.
            _ => Err(Error::Unsupported("settle a call of another queue")),
        }
    }

    /// The state of a call; `None` if it is not known, or not any more.
    pub async fn status(&self, id: &str) -> Result<Option<CallRecord>, Error> {
        match self.known()? {
            Self::Embedded(queue) => queue.status(id).await,
            Self::JetStream(queue) => queue.status(id).await,
            Self::Stan(_) => Err(UNTOLD),
            Self::Discovered(_) => Err(Error::Away),
        }
    }

    /// The stored answer of a finished call.
    pub async fn answer(&self, id: &str) -> Result<Option<StoredResponse>, Error> {
        match self.known()? {
            Self::Embedded(queue) => queue.answer(id).await,
            Self::JetStream(queue) => queue.answer(id).await,
            Self::Stan(_) => Err(UNTOLD),
            Self::Discovered(_) => Err(Error::Away),
        }
    }

    /// Takes back a call that has not been made yet.
    pub async fn cancel(&self, id: &str) -> Result<Changed, Error> {
        match self.known()? {
            Self::Embedded(queue) => queue.cancel(id).await,
            Self::JetStream(queue) => queue.cancel(id).await,
            Self::Stan(_) => Err(FIXED),
            Self::Discovered(_) => Err(Error::Away),
        }
    }

    /// Has a dead call tried again, with all its attempts.
    pub async fn revive(&self, id: &str) -> Result<Changed, Error> {
        match self.known()? {
            Self::Embedded(queue) => queue.revive(id).await,
            Self::JetStream(queue) => queue.revive(id).await,
            Self::Stan(_) => Err(FIXED),
            Self::Discovered(_) => Err(Error::Away),
        }
    }

    /// At most `limit` calls that follow the one with the id `after` in the order of `filter`.
    pub async fn list(
        &self,
        filter: &Filter,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Listed, Error> {
        match self.known()? {
            Self::Embedded(queue) => {
                let calls = queue.list(filter, after, limit).await?;
                Ok(Listed { calls, complete: true })
            }
            Self::JetStream(queue) => queue.list(filter, after, limit).await,
            Self::Stan(_) => Err(UNLISTED),
            Self::Discovered(_) => Err(Error::Away),
        }
    }

    /// Drops the calls that `filter` means and that do not run; how many there were.
    pub async fn purge(&self, filter: &Filter) -> Result<u64, Error> {
        match self.known()? {
            Self::Embedded(queue) => queue.purge(filter).await,
            Self::JetStream(queue) => queue.purge(filter).await,
            Self::Stan(_) => Err(UNLISTED),
            Self::Discovered(_) => Err(Error::Away),
        }
    }

    /// How many calls there are, by function.
    pub async fn counts(&self) -> Result<Vec<(Function, Counts)>, Error> {
        match self.known()? {
            Self::Embedded(queue) => queue.counts().await,
            Self::JetStream(queue) => queue.counts().await,
            Self::Stan(_) => Err(UNLISTED),
            Self::Discovered(_) => Err(Error::Away),
        }
    }
}
