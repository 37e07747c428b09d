//! A client of the provider's REST API, and the types it speaks.

pub mod types;
