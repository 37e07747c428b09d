//! Executes queued calls: receives, invokes, retries, calls back, settles.

pub mod attempt_result;
pub mod callback;
pub mod function_client;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod retry;
pub mod retry_policies;
mod settlement_limit;
mod worker;

pub use crate::worker::*;
