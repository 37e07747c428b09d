//! Reads settings from flags and variables, and collects all errors. No I/O.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::config::settings;
use gateway_base::base_url::{self, BaseUrl};
use gateway_base::duration;

/// An invalid or missing setting.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError {
    name: &'static str,
    value: Option<String>,
    expected: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{}: {value:?} is not {}", self.name, self.expected),
            None => write!(f, "{} is not set: expected {}", self.name, self.expected),
        }
    }
}

/// Looks up values: flags have precedence over variables, and variables over defaults. An empty value counts as unset.
pub struct SettingsReader<'a> {
    flag: &'a dyn Fn(&str) -> Option<String>,
    var: &'a dyn Fn(&str) -> Option<String>,
    errors: Vec<ConfigError>,
}

impl<'a> SettingsReader<'a> {
    /// Creates a reader of `flag` and `var`, which return values by the name of the setting.
    pub fn new(
        flag: &'a dyn Fn(&str) -> Option<String>,
        var: &'a dyn Fn(&str) -> Option<String>,
    ) -> Self {
        Self { flag, var, errors: Vec::new() }
    }

    /// Returns `value` if all settings read so far are valid.
    ///
    /// # Errors
    /// All invalid settings otherwise.
    pub fn finish<T>(self, value: T) -> Result<T, Vec<ConfigError>> {
        if self.errors.is_empty() { Ok(value) } else { Err(self.errors) }
    }

    /// Returns the value as text; empty if it is unset and has no default.
    pub fn text(&self, name: &str) -> String {
        let setting = settings::find(name);
        (self.flag)(name)
            .filter(|v| !v.trim().is_empty())
            .or_else(|| (self.var)(name).filter(|v| !v.trim().is_empty()))
            .map_or_else(|| setting.default.to_owned(), |v| v.trim().to_owned())
    }

    /// Returns an environment variable, which need not be a setting.
    pub fn environment_variable(&self, name: &str) -> Option<String> {
        (self.var)(name)
    }

    pub fn boolean(&mut self, name: &str) -> bool {
        self.parsed(name, "true or false", |text| match text.to_ascii_lowercase().as_str() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        })
        .unwrap_or_default()
    }

    pub fn duration(&mut self, name: &str) -> Duration {
        self.parsed(name, duration::EXPECTED, duration::parse).unwrap_or_default()
    }

    /// Reads a duration above zero.
    pub fn positive_duration(&mut self, name: &str) -> Duration {
        let expected = format!("{}, above zero", duration::EXPECTED);
        self.parsed(name, &expected, |text| duration::parse(text).filter(|d| !d.is_zero()))
            .unwrap_or_default()
    }

    /// Reads a whole number within `range`.
    pub fn count(&mut self, name: &str, range: std::ops::RangeInclusive<usize>) -> usize {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.parsed(name, &expected, |text| text.parse().ok().filter(|n| range.contains(n)))
            .unwrap_or_default()
    }

    pub fn port(&mut self, name: &str) -> u16 {
        self.parsed(name, "a port from 0 to 65535 (0: any free one)", |text| text.parse().ok())
            .unwrap_or_default()
    }

    pub fn address(&mut self, name: &str) -> IpAddr {
        self.parsed(name, "an IP address such as 0.0.0.0 or ::", |text| text.parse().ok())
            .unwrap_or(IpAddr::from([127, 0, 0, 1]))
    }

    pub fn url(&mut self, name: &str) -> Option<BaseUrl> {
        if self.text(name).is_empty() {
            return None;
        }
        self.parsed(name, base_url::EXPECTED, BaseUrl::parse)
    }

    /// Reads a value with `parse`. If that returns `None`, adds an error that says what was `expected`.
    pub fn parsed<T>(
        &mut self,
        name: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(name);
        let parsed = parse(&text);
        if parsed.is_none() {
            self.add_error(name, (!text.is_empty()).then_some(text), expected);
        }
        parsed
    }

    /// Adds an error. `value` is `None` if the setting is missing.
    pub fn add_error(&mut self, name: &str, value: Option<String>, expected: &str) {
        let name = settings::find(name).name;
        // Credentials in a URL are not printed.
        let value = value.map(|text| match text.rsplit_once('@') {
            Some((before, host)) if before.contains("://") => {
                let scheme = before.split("://").next().unwrap_or_default();
                format!("{scheme}://…@{host}")
            }
            _ => text,
        });
        self.errors.push(ConfigError { name, value, expected: expected.to_owned() });
    }
}
