//! The stamps on a call: `X-Call-Id`, `X-Start-Time`, `X-Served-By`.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

pub const X_CALL_ID: HeaderName = HeaderName::from_static("x-call-id");
pub const X_START_TIME: HeaderName = HeaderName::from_static("x-start-time");
const X_SERVED_BY: HeaderName = HeaderName::from_static("x-served-by");

/// `<product>/<version>`
pub const PRODUCT: HeaderValue =
    HeaderValue::from_static(concat!("gateway/", env!("CARGO_PKG_VERSION")));

/// A call's id and the time it began.
#[derive(Clone, Debug)]
pub struct Stamps {
    pub call_id: HeaderValue,
    /// Unix time in nanoseconds.
    start_time: HeaderValue,
}

impl Stamps {
    /// Stamps a request: an id that the caller chose is kept, the time is ours.
    pub fn put_on(headers: &mut HeaderMap) -> Self {
        let call_id = match headers.get(&X_CALL_ID) {
            Some(id) if !id.is_empty() => id.clone(),
            _ => {
                let id = fresh_id();
                headers.insert(X_CALL_ID, id.clone());
                id
            }
        };
        let start_time = start_time();
        headers.insert(X_START_TIME, start_time.clone());
        Self { call_id, start_time }
    }

    /// Stamps the answer to the caller.
    pub fn put_on_answer(self, headers: &mut HeaderMap) {
        headers.insert(X_CALL_ID, self.call_id);
        headers.insert(X_START_TIME, self.start_time);
        headers.insert(X_SERVED_BY, PRODUCT);
    }
}

/// A UUID of version 4: nobody guesses it.
fn fresh_id() -> HeaderValue {
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let text = Uuid::new_v4().hyphenated().encode_lower(&mut text);
    header_value(text.as_bytes())
}

fn start_time() -> HeaderValue {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let nanos = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    header_value(itoa::Buffer::new().format(nanos).as_bytes())
}

/// A value that is cloned into the request and the answer alike.
fn header_value(text: &[u8]) -> HeaderValue {
    HeaderValue::from_maybe_shared(Bytes::copy_from_slice(text))
        .unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_id_is_kept_and_told() {
        let mut request = HeaderMap::new();
        request.insert(X_CALL_ID, HeaderValue::from_static("mine"));
        let stamps = Stamps::put_on(&mut request);
        assert_eq!(request[X_CALL_ID], "mine");
        let mut answer = HeaderMap::new();
        stamps.put_on_answer(&mut answer);
        assert_eq!(answer[X_CALL_ID], "mine");
        assert_eq!(answer[X_START_TIME], request[X_START_TIME]);
    }

    #[test]
    fn fresh_ids_are_uuids_and_differ() {
        let (a, b) = (fresh_id(), fresh_id());
        assert_ne!(a, b);
        let id = Uuid::parse_str(a.to_str().unwrap()).unwrap();
        assert_eq!(id.get_version_num(), 4);
    }

    #[test]
    fn a_start_time_is_nanoseconds_since_1970() {
        assert_eq!(start_time().len(), 19);
    }
}
