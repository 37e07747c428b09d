//! Settings of scaling from zero. No I/O.

use crate::config::reader::SettingsReader;
use gateway_proxy::activator::ColdStart;

pub(super) fn parse(settings: &mut SettingsReader<'_>) -> ColdStart {
    ColdStart {
        timeout: settings.positive_duration("cold_start_timeout"),
        queue_limit: settings.count("cold_start_queue_limit", 1..=1_000_000),
    }
}

/// Parses the limits if `scale_from_zero` is set.
pub(super) fn parse_if_enabled(settings: &mut SettingsReader<'_>) -> Option<ColdStart> {
    let limits = parse(settings);
    settings.boolean("scale_from_zero").then_some(limits)
}
