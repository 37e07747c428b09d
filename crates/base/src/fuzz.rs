//! Fuzz targets of settings.

use crate::base_url::BaseUrl;
use crate::duration;

/// A base URL is displayed as a URL that parses to the same value.
pub(crate) fn base_url(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(url) = BaseUrl::parse(text) else { return };
    assert_eq!(BaseUrl::parse(&url.to_string()).as_ref(), Some(&url), "{text:?}");
    assert!(!url.host().is_empty() && !url.path.ends_with('/'), "{text:?}");
    let _ = url.port();
}

/// A duration written in nanoseconds parses to the same value.
pub(crate) fn duration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(parsed) = duration::parse(text) else { return };
    let again = duration::parse(&format!("{}ns", parsed.as_nanos()));
    assert_eq!(again, Some(parsed), "{text:?}");
}
