//! Executes queued calls: receives, invokes, retries, calls back, settles.

pub mod attempt;
pub mod callback;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod retry;
pub mod retry_policies;
mod settlement_limit;
mod worker;

pub use crate::worker::*;
