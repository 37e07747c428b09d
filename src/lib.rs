//! An API gateway for functions.
//!
//! Modules in reading order: from those that every other module may use to those that combine the others.
//! ARCHITECTURE.md lists the allowed dependencies.

// Basics that every module may use.
pub mod allowed_hosts;
pub mod base_url;
pub mod call_id;
pub mod callback_chain;
pub mod config;
pub mod credentials;
pub mod deadlines;
pub mod duration;
pub mod error;
pub mod error_chain;
pub mod function;
pub mod functions;
pub mod interim;
pub mod limit;
pub mod metrics;
pub mod names;
pub mod self_wake;
pub mod shutdown;
pub mod sync;
pub mod telemetry;

// The provider, upstream connections, and the queue.
pub mod activator;
pub mod auth;
pub mod provider;
pub mod proxy;
pub mod queue;
pub mod readiness;
pub mod trace;

// Request handling and background services.
pub mod alerts;
pub mod async_api;
pub mod autoscale;
pub mod health;
pub mod invoke;
pub mod logs;
pub mod response_body;
pub mod system;
pub mod ui;
pub mod worker;

// Entry points: listeners, routes, command-line roles.
pub mod app;
pub mod healthcheck;
pub mod router;
pub mod same_origin;
pub mod serve;
pub mod service;
pub mod stack;

#[cfg(any(test, fuzzing))]
pub mod fuzzing;
