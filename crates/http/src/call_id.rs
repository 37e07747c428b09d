//! Headers that identify a call: `X-Call-Id`, `X-Start-Time`, `X-Served-By`.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use uuid::Uuid;

use crate::names::{X_CALL_ID, X_SERVED_BY, X_START_TIME};

/// `<product>/<version>`
pub const USER_AGENT_VALUE: HeaderValue =
    HeaderValue::from_static(concat!("gateway/", env!("CARGO_PKG_VERSION")));

/// Id and start time of a call.
#[derive(Clone, Debug)]
pub struct RequestIds {
    pub call_id: HeaderValue,
    /// Unix time in nanoseconds.
    pub start_time: HeaderValue,
}

impl RequestIds {
    /// Takes the id of the request, or creates one. The start time is always the gateway's.
    pub fn from_headers(headers: &HeaderMap) -> Self {
        // Both values share one buffer, which the request and the response reference.
        let mut text = [0; ID_LENGTH + TIME_LENGTH];
        let client_id = headers.get(&X_CALL_ID).filter(|id| !id.is_empty()).cloned();
        let id_length = if client_id.is_some() { 0 } else { write_new_id(&mut text) };
        let length = id_length + write_start_time(&mut text[id_length..]);
        let text = Bytes::copy_from_slice(&text[..length]);
        let call_id = client_id.unwrap_or_else(|| header_value(text.slice(..id_length)));
        Self { call_id, start_time: header_value(text.slice(id_length..)) }
    }

    /// Sets the headers of the response to the client.
    pub fn apply_to_response(self, headers: &mut HeaderMap) {
        headers.insert(X_CALL_ID, self.call_id);
        headers.insert(X_START_TIME, self.start_time);
        headers.insert(X_SERVED_BY, USER_AGENT_VALUE);
    }
}

const ID_LENGTH: usize = uuid::fmt::Hyphenated::LENGTH;
/// Maximum digits of a 64-bit number.
const TIME_LENGTH: usize = 20;

/// Writes a random (version 4) UUID; returns its length.
fn write_new_id(out: &mut [u8]) -> usize {
    Uuid::new_v4().hyphenated().encode_lower(out).len()
}

/// Writes the time in nanoseconds since 1970; returns its length.
fn write_start_time(out: &mut [u8]) -> usize {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)).as_bytes();
    out[..digits.len()].copy_from_slice(digits);
    digits.len()
}

fn header_value(text: Bytes) -> HeaderValue {
    HeaderValue::from_maybe_shared(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_the_client_is_kept_and_returned() {
        let mut request = HeaderMap::new();
        request.insert(X_CALL_ID, HeaderValue::from_static("mine"));
        let ids = RequestIds::from_headers(&request);
        assert_eq!(ids.call_id, "mine");
        let start_time = ids.start_time.clone();
        let mut response = HeaderMap::new();
        ids.apply_to_response(&mut response);
        assert_eq!(response[X_CALL_ID], "mine");
        assert_eq!(response[X_START_TIME], start_time);
    }

    #[test]
    fn new_ids_are_distinct_uuids() {
        let id = || RequestIds::from_headers(&HeaderMap::new()).call_id;
        let (a, b) = (id(), id());
        assert_ne!(a, b);
        let id = Uuid::parse_str(a.to_str().unwrap()).unwrap();
        assert_eq!(id.get_version_num(), 4);
    }

    #[test]
    fn a_start_time_is_nanoseconds_since_1970() {
        assert_eq!(RequestIds::from_headers(&HeaderMap::new()).start_time.len(), 19);
    }
}
