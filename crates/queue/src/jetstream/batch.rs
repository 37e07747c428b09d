//! Calls that share one message with others.

pub(super) mod dirty_batches;
pub(super) mod held;
pub(super) mod records;
pub(super) mod state;
