//! Settings of scaling from zero. No I/O.

use std::time::Duration;

use crate::config::reader::Reader;

/// Limits for calls that wait for a function to become ready.
#[derive(Clone, Copy, Debug)]
pub struct ColdStart {
    /// `cold_start_timeout`
    pub timeout: Duration,
    /// `cold_start_queue_limit`: maximum number of calls that wait for one function.
    pub queue: usize,
}

impl ColdStart {
    pub(super) fn parse(from: &mut Reader<'_>) -> Self {
        Self {
            timeout: from.positive_duration("cold_start_timeout"),
            queue: from.count("cold_start_queue_limit", 1..=1_000_000),
        }
    }

    /// Parses the limits if `scale_from_zero` is set.
    pub(super) fn if_asked_for(from: &mut Reader<'_>) -> Option<Self> {
        let limits = Self::parse(from);
        from.boolean("scale_from_zero").then_some(limits)
    }
}
