//! Settings of scaling from zero. No I/O.

use std::time::Duration;

use crate::config::reader::SettingsReader;

/// Limits for calls that wait for a function to become ready.
#[derive(Clone, Copy, Debug)]
pub struct ColdStart {
    /// `cold_start_timeout`
    pub timeout: Duration,
    /// `cold_start_queue_limit`: maximum number of calls that wait for one function.
    pub queue_limit: usize,
}

impl ColdStart {
    pub(super) fn parse(settings: &mut SettingsReader<'_>) -> Self {
        Self {
            timeout: settings.positive_duration("cold_start_timeout"),
            queue_limit: settings.count("cold_start_queue_limit", 1..=1_000_000),
        }
    }

    /// Parses the limits if `scale_from_zero` is set.
    pub(super) fn parse_if_enabled(settings: &mut SettingsReader<'_>) -> Option<Self> {
        let limits = Self::parse(settings);
        settings.boolean("scale_from_zero").then_some(limits)
    }
}
