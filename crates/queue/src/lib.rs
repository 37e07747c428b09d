//! Queued calls, and the queues that store them: a file, NATS JetStream, NATS Streaming.

pub mod call;
pub mod detector;
pub mod embedded;
pub mod fair_share;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod ingress;
pub mod jetstream;
pub mod memory;
pub mod metrics;
mod queue;
mod reply_batch;
pub mod stan;
pub mod status;
mod tasks;
pub mod unconfirmed;

pub use crate::memory::MemoryPermit;
pub(crate) use crate::queue::LeaseHandle;
pub use crate::queue::*;
