//! The interface of queues, and the queue of this process.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::call::{QueuedCall, UnixMillis};
use crate::detector::BackendDetector;
use crate::embedded::Embedded;
use crate::jetstream::JetStream;
use crate::memory::MemoryPermit;
use crate::stan::Stan;
use crate::{Condition, Delivery, Error, JobStore};
use gateway_base::function::Function;

/// Maximum of `max_async_body_bytes`, and of the memory for all bodies that are being stored.
pub const MAX_ASYNC_BODY_BYTES: usize = 256 << 20;

/// A call that has been enqueued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    pub id: String,
    /// The call had already been enqueued under the same id or the same idempotency key.
    pub duplicate: bool,
}

/// A durable queue of calls. Clones are cheap and share the queue.
pub trait JobQueue: Clone + Send + Sync + 'static {
    /// A handle for a thread that uses the queue often. It must be called on the runtime of that thread, where replies
    /// are then delivered in batches.
    #[must_use]
    fn for_thread(&self) -> Self {
        self.clone()
    }

    /// Generates an id for a call of `function`. The id is a UUID that the backend can look up without an index.
    fn new_call_id(&self, function: &Function) -> String;

    /// Enqueues `call`. Returns when the call is durable. The queue drops `permit`, the memory permit of the body,
    /// together with its copy of the call.
    ///
    /// A queue without a [store](Self::store) ignores the idempotency key of `call`: it cannot find duplicates.
    ///
    /// If the future is dropped, the call may be enqueued or not, as after [`Error::Unconfirmed`].
    ///
    /// # Errors
    ///
    /// `Full` and `NoSpace` when the call does not fit; the client should retry later. `TooLarge` and `HeadTooLarge`
    /// when it never will. `Unreachable` and `Failed` when nothing was enqueued. `Unconfirmed` when the call may have
    /// been stored: publishing it again under the same id is safe.
    fn publish(
        &self,
        call: QueuedCall,
        permit: Option<MemoryPermit>,
    ) -> impl Future<Output = Result<Published, Error>> + Send;

    /// Waits for the next call that is due. `concurrency` is the number of calls that the receiver executes in
    /// parallel; it bounds the share of each function.
    ///
    /// Cancel-safe: if the future is dropped, a call that was selected but not returned is delivered again.
    ///
    /// # Errors
    ///
    /// When the backend fails. The receiver should retry after a pause.
    fn receive(&self, concurrency: usize) -> impl Future<Output = Result<Delivery, Error>> + Send;

    /// Stops receiving. Calls that have been received are not affected.
    fn stop_receiving(&self) {}

    /// The stored calls; `None` if this queue cannot look up a call.
    ///
    /// # Errors
    ///
    /// `Unreachable` while the backend has not been detected yet.
    fn store(&self) -> Result<Option<&dyn JobStore>, Error>;

    /// Returns whether the backend was reachable when it was last used or probed.
    fn is_reachable(&self) -> bool;

    /// Returns the degraded state of the queue, if any.
    fn condition(&self) -> Option<Condition> {
        None
    }

    /// Probes the backend and updates [`Self::is_reachable`]. Only JetStream needs it; the others know their state
    /// without asking.
    fn probe(&self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// Number of reconnects to the queue's server.
    fn reconnects(&self) -> u64 {
        0
    }

    /// Largest body in bytes that the backend accepts, if it has a limit of its own.
    fn max_body_bytes(&self) -> Option<usize> {
        None
    }

    /// Removes results and idempotency keys whose time to live has passed. The caller runs it about once a second.
    fn sweep_expired(&self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// Stops the background tasks of the queue and closes it. All deliveries must have been settled or dropped before.
    fn close(&self) -> impl Future<Output = ()> + Send;
}

/// A backend that is known. An enum and not a trait object, whose futures would cost each call an allocation.
#[derive(Clone)]
pub enum Backend {
    /// A file owned by this process.
    Embedded(Embedded),
    /// NATS JetStream.
    JetStream(JetStream),
    /// NATS Streaming.
    Stan(Stan),
}

/// Evaluates an expression for the queue of any backend.
macro_rules! each_backend {
    ($backend:expr, $queue:ident => $result:expr) => {
        match $backend {
            Backend::Embedded($queue) => $result,
            Backend::JetStream($queue) => $result,
            Backend::Stan($queue) => $result,
        }
    };
}

/// The queue of this process.
#[derive(Clone)]
pub enum Queue {
    Known(Backend),
    /// JetStream or NATS Streaming, whichever the server turns out to run.
    Detected(BackendDetector),
}

impl Queue {
    /// The backend in use; `None` while it has not been detected yet.
    fn backend(&self) -> Option<&Backend> {
        match self {
            Self::Known(backend) => Some(backend),
            Self::Detected(detector) => detector.detected(),
        }
    }
}

impl Backend {
    /// As [`JobQueue::for_thread`].
    #[must_use]
    pub(crate) fn for_thread(&self) -> Self {
        match self {
            Self::Embedded(queue) => Self::Embedded(queue.for_thread()),
            Self::JetStream(queue) => Self::JetStream(queue.for_thread()),
            Self::Stan(queue) => Self::Stan(queue.for_thread()),
        }
    }
}

impl JobQueue for Queue {
    fn for_thread(&self) -> Self {
        match self {
            Self::Known(backend) => Self::Known(backend.for_thread()),
            Self::Detected(detector) => Self::Detected(detector.for_thread()),
        }
    }

    fn new_call_id(&self, function: &Function) -> String {
        match self.backend() {
            Some(backend) => each_backend!(backend, queue => queue.new_call_id(function)),
            None => uuid::Uuid::new_v4().to_string(),
        }
    }

    async fn publish(
        &self,
        call: QueuedCall,
        permit: Option<MemoryPermit>,
    ) -> Result<Published, Error> {
        let backend = self.backend().ok_or(Error::Unreachable)?;
        each_backend!(backend, queue => queue.publish(call, permit).await)
    }

    async fn receive(&self, concurrency: usize) -> Result<Delivery, Error> {
        if let Self::Detected(detector) = self {
            detector.wait_until_detected().await;
        }
        let backend = self.backend().ok_or(Error::Unreachable)?;
        each_backend!(backend, queue => queue.receive(concurrency).await)
    }

    fn stop_receiving(&self) {
        if let Some(backend) = self.backend() {
            each_backend!(backend, queue => queue.stop_receiving());
        }
    }

    fn store(&self) -> Result<Option<&dyn JobStore>, Error> {
        let backend = self.backend().ok_or(Error::Unreachable)?;
        each_backend!(backend, queue => queue.store())
    }

    fn is_reachable(&self) -> bool {
        self.backend().is_some_and(|backend| each_backend!(backend, queue => queue.is_reachable()))
    }

    fn condition(&self) -> Option<Condition> {
        each_backend!(self.backend()?, queue => queue.condition())
    }

    async fn probe(&self) {
        if let Some(backend) = self.backend() {
            each_backend!(backend, queue => queue.probe().await);
        }
    }

    fn reconnects(&self) -> u64 {
        self.backend().map_or(0, |backend| each_backend!(backend, queue => queue.reconnects()))
    }

    fn max_body_bytes(&self) -> Option<usize> {
        each_backend!(self.backend()?, queue => queue.max_body_bytes())
    }

    async fn sweep_expired(&self) {
        if let Some(backend) = self.backend() {
            each_backend!(backend, queue => queue.sweep_expired().await);
        }
    }

    async fn close(&self) {
        if let Self::Detected(detector) = self {
            detector.stop().await;
        }
        if let Some(backend) = self.backend() {
            each_backend!(backend, queue => queue.close().await);
        }
    }
}

/// The current time in milliseconds since 1970.
pub fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis::try_from(since.as_millis()).unwrap_or(UnixMillis::MAX)
}
