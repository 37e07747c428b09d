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
    pub(super) fn parse(settings: &mut Reader<'_>) -> Self {
        Self {
            timeout: settings.positive_duration("cold_start_timeout"),
            queue: settings.count("cold_start_queue_limit", 1..=1_000_000),
        }
    }

    /// Parses the limits if `scale_from_zero` is set.
    pub(super) fn if_asked_for(settings: &mut Reader<'_>) -> Option<Self> {
        let limits = Self::parse(settings);
        settings.boolean("scale_from_zero").then_some(limits)
    }
}
