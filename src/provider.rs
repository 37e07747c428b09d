//! A client of the provider's REST API, the types it speaks, and a provider of our own.

pub mod process;
pub mod types;
