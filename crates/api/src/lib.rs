//! What operators and clients of queued calls use: `/system/`, `/async-function/`, the page, health.

pub mod alerts;
pub mod async_api;
pub mod auth;
pub mod health;
pub mod logs;
pub mod router;
pub mod same_origin;
pub mod system;
pub mod ui;
