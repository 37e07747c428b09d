//! Fuzz targets of settings.

use std::net::IpAddr;

use crate::base_url::BaseUrl;
use crate::duration;
use crate::worker::callback::allowlist::CallbackAllowlist;

/// A list is accepted or rejected; an accepted one decides on any address.
pub(crate) fn allow_list(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(allow) = CallbackAllowlist::parse(text) else { return };
    let addresses = ["127.0.0.1", "10.0.0.1", "::1", "::ffff:169.254.169.254", "64:ff9b::7f00:1"];
    for address in addresses {
        let address: IpAddr = address.parse().unwrap_or(IpAddr::from([0; 4]));
        let host = text.split(',').next().unwrap_or_default().trim();
        let _ = allow.permits(host, address);
    }
    // A list with one more entry permits no less.
    let wider = CallbackAllowlist::parse(&format!("{text},*"));
    assert!(wider.is_some_and(|all| all.permits("any.test", IpAddr::from([127, 0, 0, 1]))));
}

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
