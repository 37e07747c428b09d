//! Receives calls, claims them and settles them.

pub(super) mod claims;
pub(super) mod consumer;
pub(super) mod lease;
pub(super) mod prefetch;
pub(super) mod pull_scheduler;
pub(super) mod rate;
