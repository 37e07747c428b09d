//! The process provider from outside: its REST API over a socket, and its processes.

#![expect(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test that cannot go on panics, in helpers too; and nothing here has a public"
)]

mod api;
mod fork;
mod fork_limits;
mod http_mode;
mod logs;
mod secrets;
mod state;
mod support;
