//! Settings of what wakes functions. No I/O.

use std::time::Duration;

use crate::config::reader::Reader;

/// How calls wait for a function that is not ready.
#[derive(Clone, Copy, Debug)]
pub struct ColdStart {
    /// `cold_start_timeout`
    pub timeout: Duration,
    /// `cold_start_queue_limit`: how many may wait for one function.
    pub queue: usize,
}

impl ColdStart {
    pub(super) fn parse(from: &mut Reader<'_>) -> Self {
        Self {
            timeout: from.positive_duration("cold_start_timeout"),
            queue: from.count("cold_start_queue_limit", 1..=1_000_000),
        }
    }

    /// `scale_from_zero`
    pub(super) fn if_asked_for(from: &mut Reader<'_>) -> Option<Self> {
        let limits = Self::parse(from);
        from.boolean("scale_from_zero").then_some(limits)
    }
}
