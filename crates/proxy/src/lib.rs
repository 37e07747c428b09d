//! A synchronous call, from its accepted request to its measured response.

pub mod activator;
pub mod error;
pub mod function_source;
pub mod functions;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod invoke;
pub mod metrics;
pub mod readiness;
pub mod response_body;
pub mod routing;
pub mod service;
pub mod trace;
