//! Fuzz targets for input that a worker gets from clients and functions.

use std::time::SystemTime;

use http::HeaderValue;

use crate::worker::callback::target::CallbackTarget;
use crate::worker::retry;

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
