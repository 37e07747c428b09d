//! What the gateway knows about functions.

pub mod bounds;
pub mod exists;
pub mod policy;
