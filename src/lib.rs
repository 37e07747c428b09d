//! An API gateway for functions.
//!
//! The map of the house, in reading order: down from what everybody may know to where the rooms are introduced to
//! each other. ARCHITECTURE.md says who may know whom.

// What every room may know.
pub mod call_id;
pub mod chain;
pub mod config;
pub mod echo;
pub mod error;
pub mod function;
pub mod interim;
pub mod limit;
pub mod metrics;
pub mod shutdown;
pub mod telemetry;
pub mod watch;

// The provider, and the way to it.
pub mod activator;
pub mod auth;
pub mod provider;
pub mod proxy;
pub mod queue;
pub mod trace;

// What is done with a request.
pub mod alerts;
pub mod autoscale;
pub mod health;
pub mod invoke;
pub mod logs;
pub mod queued;
pub mod response_body;
pub mod system;
pub mod ui;
pub mod worker;

// The doors, and the house.
pub mod app;
pub mod healthcheck;
pub mod routes;
pub mod same_origin;
pub mod serve;
pub mod stack;

#[cfg(any(test, fuzzing))]
pub mod fuzzing;
