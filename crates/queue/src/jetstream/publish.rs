//! Publishes calls: one by one, or several in one message.

pub(super) mod batcher;
pub(super) mod capacity;
pub(super) mod chunked_body;
mod function_batch;
mod idempotency;
mod send;
mod single;
