//! Client of the provider's REST API, its JSON types, its server, and the process provider.

pub mod backend;
mod client;
pub mod error;
pub mod process;
pub mod server;
pub mod signals;
pub mod types;

pub use crate::client::*;
