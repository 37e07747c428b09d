//! An API gateway for functions: the program, its settings and its roles. ARCHITECTURE.md describes the crates below.

pub mod app;
pub mod config;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod healthcheck;
pub mod stack;
pub mod telemetry;
