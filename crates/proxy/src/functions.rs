//! What the gateway knows about functions.

pub mod exists;
pub mod policy;
pub mod registry;
