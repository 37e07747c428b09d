//! What makes queued calls, and reports how they ended.

pub mod callback;
pub mod retry;
