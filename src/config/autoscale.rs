//! Settings of scaling by load. No I/O.

use std::time::Duration;

use crate::config::reader::SettingsReader;
use gateway_base::duration;

/// Settings of the autoscaler.
#[derive(Clone, Copy, Debug)]
pub struct Autoscale {
    /// `autoscale_window`
    pub window: Duration,
}

impl Autoscale {
    /// Returns `None` if functions are not scaled by load. `auto` is the value of `autoscale=auto`.
    pub(super) fn parse(settings: &mut SettingsReader<'_>, auto: bool) -> Option<Self> {
        let on = settings.parsed("autoscale", "auto, true or false", |text| match text {
            "auto" => Some(auto),
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        });
        let window = settings.parsed("autoscale_window", "a duration from 2s to 1h", |text| {
            let allowed = Duration::from_secs(2)..=Duration::from_secs(3600);
            duration::parse(text).filter(|window| allowed.contains(window))
        });
        on.unwrap_or_default().then_some(Self { window: window.unwrap_or_default() })
    }
}
