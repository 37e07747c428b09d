//! Settings of tracing and of the access log.

use http::HeaderMap;

use gateway_base::base_url::BaseUrl;

/// Requests that are logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessLogMode {
    #[default]
    Off,
    /// Status 500 and above, and responses that were cut short.
    Errors,
    On,
}

/// Settings of traces.
#[derive(Clone)]
pub struct TracingConfig {
    /// `otlp_endpoint`
    pub endpoint: Option<BaseUrl>,
    /// `otlp_headers`
    pub headers: HeaderMap,
    /// `otlp_sampling_ratio`
    pub sampling_ratio: f64,
}

impl std::fmt::Debug for TracingConfig {
    /// Omits the headers, which contain keys.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TracingConfig").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}
