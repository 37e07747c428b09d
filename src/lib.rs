//! An API gateway for functions.
//!
//! The map of the house, in reading order. ARCHITECTURE.md says who may know whom.

// What every room may know.
pub mod config;
pub mod function;
pub mod shutdown;
pub mod telemetry;
pub mod watch;

// The provider, and the way to it.
pub mod provider;

// The doors.
pub mod serve;
