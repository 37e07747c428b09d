//! What the fuzzer checks of what clients and functions tell a worker.

use std::time::SystemTime;

use http::HeaderValue;

use crate::worker::callback::target::Target;
use crate::worker::retry;

/// A callback's URL is read or refused. Neither its credentials nor its path are shown.
pub(crate) fn callback_url(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(target) = Target::parse(text) else { return };
    let shown = target.to_string();
    assert!(
        !shown.contains('@') && shown.matches('/').count() == 2,
        "{text:?} is shown as {shown:?}"
    );
}

/// Any `Retry-After` is a pause, or nothing.
pub(crate) fn retry_after(data: &[u8]) {
    if let Ok(value) = HeaderValue::from_bytes(data) {
        let _ = retry::parse_retry_after(&value, SystemTime::UNIX_EPOCH);
    }
}
