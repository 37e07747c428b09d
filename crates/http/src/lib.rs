//! HTTP server and client. Knows no function and no queue.

pub mod allowed_hosts;
pub mod call_id;
pub mod callback_chain;
pub mod client;
pub mod credentials;
pub mod deadlines;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod headers;
pub mod interim;
pub mod limit;
pub mod names;
pub mod self_wake;
pub mod server;
