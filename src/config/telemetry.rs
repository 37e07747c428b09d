//! Settings of log, access log and traces.

use http::{HeaderMap, HeaderName, HeaderValue};
use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::config::reader::{ConfigError, SettingsReader};
use gateway_proxy::trace::{AccessLogMode, TracingConfig};

/// Settings of the log, of all roles.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// `log_level`: a filter in the syntax of `tracing_subscriber::filter::Targets`.
    pub filter: String,
    /// `log_format`
    pub json: bool,
}

impl LogConfig {
    /// Parses `log_level` and `log_format`.
    ///
    /// # Errors
    /// All invalid settings, for the user.
    pub fn parse(mut settings: SettingsReader<'_>) -> Result<Self, Vec<ConfigError>> {
        let json = settings.parsed("log_format", "text or json", |text| match text {
            "text" => Some(false),
            "json" => Some(true),
            _ => None,
        });
        let expected =
            "error, warn, info, debug, trace or off; or target=level, separated by commas";
        let filter = settings.parsed("log_level", expected, |text| {
            let is_known = text.split(',').all(has_level) && text.parse::<Targets>().is_ok();
            is_known.then(|| text.to_owned())
        });
        settings.finish(Self { filter: filter.unwrap_or_default(), json: json.unwrap_or_default() })
    }
}

/// Returns whether a part of a filter is `level` or `target=level`. Any other word would be taken for a target, of
/// which everything is logged.
fn has_level(part: &str) -> bool {
    let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
    !level.is_empty() && level.parse::<LevelFilter>().is_ok()
}

/// `access_log`
pub(super) fn access_log(settings: &mut SettingsReader<'_>) -> AccessLogMode {
    let access = settings.parsed("access_log", "off, on or errors", |text| match text {
        "off" => Some(AccessLogMode::Off),
        "errors" => Some(AccessLogMode::Errors),
        "on" => Some(AccessLogMode::On),
        _ => None,
    });
    access.unwrap_or_default()
}

pub(super) fn tracing(settings: &mut SettingsReader<'_>) -> TracingConfig {
    let sampling = settings.parsed("otlp_sampling_ratio", "a number from 0 to 1", |text| {
        text.parse().ok().filter(|part| (0.0..=1.0).contains(part))
    });
    let headers = settings.text("otlp_headers");
    let headers = header_map(&headers).unwrap_or_else(|| {
        // The value is not printed, since it contains keys.
        let expected = "headers such as NAME=VALUE, separated by commas";
        settings.add_error("otlp_headers", Some("…".to_owned()), expected);
        HeaderMap::new()
    });
    let endpoint = settings.url("otlp_endpoint");
    TracingConfig { endpoint, headers, sampling_ratio: sampling.unwrap_or_default() }
}

/// `NAME=VALUE,NAME=VALUE` as headers.
fn header_map(text: &str) -> Option<HeaderMap> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let header = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let mut value = HeaderValue::from_str(value.trim()).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::from_bytes(name.trim().as_bytes()).ok()?, value))
    };
    pairs.map(header).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_parsed_as_pairs() {
        let headers = header_map("Authorization=Basic a=, x-scope = one ,").unwrap();
        assert_eq!(
            (&headers["authorization"], &headers["x-scope"]),
            (&"Basic a=".parse().unwrap(), &"one".parse().unwrap())
        );
        assert!(header_map("").unwrap().is_empty());
        assert!(header_map("no pair").is_none() && header_map("a b=c").is_none());
    }
}
