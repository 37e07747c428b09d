//! What is told of what goes on: log, access log, traces.

use crate::config::base_url::BaseUrl;
use crate::config::reader::{Mistake, Reader};

/// How the process logs; every role has these.
#[derive(Clone, Debug)]
pub struct Log {
    /// `log_level`: a filter as `tracing_subscriber::EnvFilter` takes it.
    pub filter: String,
    /// `log_format`
    pub json: bool,
}

impl Log {
    pub fn parse(mut from: Reader<'_>) -> Result<Self, Vec<Mistake>> {
        let json = from.parsed("log_format", "text or json", |text| match text {
            "text" => Some(false),
            "json" => Some(true),
            _ => None,
        });
        let expected = "a level or filter such as info, debug or gateway=debug,info";
        let filter = from.parsed("log_level", expected, |text| {
            text.parse::<tracing_subscriber::filter::Targets>().ok().map(|_| text.to_owned())
        });
        from.finish(Self { filter: filter.unwrap_or_default(), json: json.unwrap_or_default() })
    }
}

/// Which requests get a line in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    #[default]
    Off,
    /// Those whose answer is 500 or above, or was cut short.
    Errors,
    On,
}

impl Access {
    pub(super) fn parse(from: &mut Reader<'_>) -> Self {
        let access = from.parsed("access_log", "off, on or errors", |text| match text {
            "off" => Some(Self::Off),
            "errors" => Some(Self::Errors),
            "on" => Some(Self::On),
            _ => None,
        });
        access.unwrap_or_default()
    }
}

/// Which requests are told to a collector of traces.
#[derive(Clone, Debug)]
pub struct Traces {
    /// `otlp_endpoint`
    pub endpoint: Option<BaseUrl>,
    /// `otlp_sampling`
    pub sampling: f64,
}

impl Traces {
    pub(super) fn parse(from: &mut Reader<'_>) -> Self {
        let sampling = from.parsed("otlp_sampling", "a number from 0 to 1", |text| {
            text.parse().ok().filter(|part| (0.0..=1.0).contains(part))
        });
        Self { endpoint: from.url("otlp_endpoint"), sampling: sampling.unwrap_or_default() }
    }
}
