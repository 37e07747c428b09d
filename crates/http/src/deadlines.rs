//! Deadlines of connections and exchanges, behind one timer per connection.
//!
//! Each part of the code that has a deadline (request head, exchange, request body, response write) stores it here.
//! The connection's task arms its timer for the earliest deadline. It re-arms the timer only when the timer fires or an
//! earlier deadline is stored. An exchange therefore costs a few stores, and the timer wheel is touched every few
//! seconds. When the timer fires, the task calls [`ConnectionDeadlines::fire_expired`], which sets a flag for each
//! expired deadline; the code concerned reads its flag when it is polled next.

mod connection;
mod exchange;
mod signals;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use crate::deadlines::connection::{ConnectionDeadlines, ConnectionState, Expired};
pub use crate::deadlines::exchange::{BodyState, ExchangeDeadlines};
pub use crate::deadlines::signals::Signal;

const NEVER: u64 = u64::MAX;

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(NEVER - 1)
}
