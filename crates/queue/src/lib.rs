//! Queued calls, and the queues that store them: a file, NATS JetStream, NATS Streaming.
//!
//! [`JobQueue`] is the interface of all backends: workers receive, execute and settle what was published. [`JobStore`]
//! is the interface of those that can look up calls. They keep finished calls for a limited time, so that clients can
//! read their state and response. [`Queue`] is the queue that a process has been configured with.

pub mod call;
mod delivery;
pub mod detector;
pub mod embedded;
mod error;
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
mod store;
mod tasks;
pub mod unconfirmed;

pub use crate::delivery::Delivery;
pub(crate) use crate::delivery::{Lease, PANIC_BACKOFF, Settle};
pub use crate::error::{Condition, Error};
pub use crate::memory::MemoryPermit;
pub use crate::queue::{Backend, JobQueue, MAX_ASYNC_BODY_BYTES, Published, Queue, now};
pub use crate::store::{CallPage, ChangeOutcome, Filter, JobStore, Order, QueueDepth};
