//! What operators and clients of queued calls use: `/system/`, `/async-function/`, the page, health.

pub mod alerts;
pub mod async_api;
pub mod auth;
mod body;
pub mod health;
pub mod logs;
pub mod router;
pub mod same_origin;
pub mod state;
pub mod system;
pub mod ui;
