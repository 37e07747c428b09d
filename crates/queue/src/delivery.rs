//! A received call, from its receipt to its settlement.

use std::time::Duration;

use crate::call::QueuedCall;
use crate::status::Settlement;
use crate::{Error, embedded, jetstream, stan};
use gateway_base::backoff::Backoff;

/// Delay before a call is delivered again that made its worker panic: it may do so again.
pub(crate) const PANIC_BACKOFF: Backoff =
    Backoff::new(Duration::from_secs(1), Duration::from_secs(1024));

/// A call that a worker has received. If it is dropped without being settled, the queue delivers it again.
#[derive(Debug)]
pub struct Delivery {
    pub call: QueuedCall,
    /// Number of earlier executions.
    pub attempts: u32,
    /// The call cannot be executed, because its body no longer exists.
    pub body_missing: bool,
    pub(crate) lease: Lease,
}

impl Delivery {
    /// Claims the execution of the call. Returns `false` if the call must not be executed: NATS Streaming may have
    /// stored it several times, and then only one of its messages is executed. The others are finished by this.
    ///
    /// If the future is dropped, the claim may be recorded or not. Drop the delivery then: the call is delivered again,
    /// and a recorded claim does not prevent its execution.
    ///
    /// # Errors
    ///
    /// When the claim cannot be decided. Drop the delivery: the call is delivered again later.
    pub async fn claim(&self) -> Result<bool, Error> {
        match &self.lease {
            Lease::Embedded(lease) => lease.claim().await,
            Lease::JetStream(lease) => lease.claim().await,
            Lease::Stan(lease) => lease.claim().await,
        }
    }

    /// Releases the concurrency slot of a call whose execution and callback are complete, before its settlement is
    /// durable.
    pub fn release_slot(&self) {
        match &self.lease {
            Lease::Embedded(lease) => lease.release_slot(),
            Lease::JetStream(lease) => lease.release_slot(),
            Lease::Stan(lease) => lease.release_slot(),
        }
    }

    /// Settles the call. Returns when the settlement is durable.
    ///
    /// If the future is dropped, the settlement may be stored or not. Drop the delivery then, and do not settle it again:
    /// the first settlement may still be on its way. The call is delivered again unless the settlement was stored in
    /// time, so it may be executed twice; it is never lost.
    ///
    /// # Errors
    ///
    /// `Gone` when the lease was lost: another worker owns the call now. `TooLarge` when the response is too large to
    /// be stored. After any other error the caller may retry.
    pub async fn settle(&self, settlement: &Settlement) -> Result<(), Error> {
        match &self.lease {
            Lease::Embedded(lease) => lease.settle(&self.call, settlement).await,
            Lease::JetStream(lease) => lease.settle(&self.call, settlement).await,
            Lease::Stan(lease) => lease.settle(&self.call, settlement).await,
        }
    }
}

/// What each backend does with a call that it has delivered. The contracts are those of [`Delivery`]'s methods. An
/// implementation that is dropped unsettled returns the call to its queue.
pub(crate) trait Settle: Send + Sync {
    fn claim(&self) -> impl Future<Output = Result<bool, Error>> + Send {
        std::future::ready(Ok(true))
    }

    fn release_slot(&self);

    /// `call` is the delivered call, whose body may have been dropped.
    fn settle(
        &self,
        call: &QueuedCall,
        settlement: &Settlement,
    ) -> impl Future<Output = Result<(), Error>> + Send;
}

/// The lease of a delivered call. An enum and not a trait object, so that the embedded queue allocates neither the
/// lease nor the future of its settlement.
#[derive(Debug)]
pub(crate) enum Lease {
    Embedded(embedded::Lease),
    JetStream(Box<jetstream::Lease>),
    Stan(Box<stan::Lease>),
}
