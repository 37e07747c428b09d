//! Calls that share one message with others.

mod changes;
pub(super) mod dirty_batches;
pub(super) mod held;
pub(super) mod lookup;
pub(super) mod records;
pub(super) mod unpack;
