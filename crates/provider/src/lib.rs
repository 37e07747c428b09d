//! Client of the provider's REST API, its JSON types, and the process provider.

mod client;
pub mod process;
pub mod signals;
pub mod types;

pub use crate::client::*;
