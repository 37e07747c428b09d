//! Basics without HTTP: names of functions, durations, shutdown, locks.

pub mod backoff;
pub mod base_url;
pub mod build_info;
pub mod duration;
pub mod error_chain;
pub mod function;
#[cfg(any(test, fuzzing))]
mod fuzz;
pub mod fuzzing;
pub mod shutdown;
pub mod sync;
