//! Receives calls, claims them and settles them.

mod arrival;
pub(super) mod claims;
mod consumer;
mod discovery;
pub(super) mod lease;
pub(super) mod prefetch;
pub(super) mod pull_scheduler;
mod rate;
pub(super) mod receive;
pub(super) mod received;
mod supervisor;
