//! Fuzz targets for input that a worker gets from clients and functions.

use std::net::IpAddr;
use std::time::SystemTime;

use http::HeaderValue;

use crate::callback::allowlist::CallbackAllowlist;
use crate::callback::target::CallbackTarget;
use crate::retry;

/// A callback URL is parsed or rejected. Its display form shows neither credentials nor path.
pub(crate) fn callback_url(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(target) = CallbackTarget::parse(text) else { return };
    let shown = target.to_string();
    assert!(
        !shown.contains('@') && shown.matches('/').count() == 2,
        "{text:?} is shown as {shown:?}"
    );
}

/// Any `Retry-After` is parsed or rejected.
pub(crate) fn retry_after(data: &[u8]) {
    if let Ok(value) = HeaderValue::from_bytes(data) {
        let _ = retry::parse_retry_after(&value, SystemTime::UNIX_EPOCH);
    }
}

/// A list is accepted or rejected; an accepted one decides on any address.
pub(crate) fn callback_allowlist(data: &[u8]) {
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
