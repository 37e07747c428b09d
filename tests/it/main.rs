//! All integration tests, one binary: the real gateway, real sockets, real processes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod conformance;
mod house;
mod process_provider;
