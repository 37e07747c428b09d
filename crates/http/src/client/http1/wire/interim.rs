//! Interim responses that are forwarded to a client (RFC 9110, 15.2).

use http::header::{CONTENT_LENGTH, TRAILER};
use http::{Response, StatusCode};
use hyper::ext::ReasonPhrase;

/// Maximum number of interim responses in one exchange.
const MAX_INTERIM_RESPONSES: usize = 1000;
/// Maximum size of all their heads together. The final head has its own limit.
const MAX_INTERIM_BYTES: usize = super::response::MAX_HEAD_BYTES;

/// The interim responses of one exchange so far.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::client) struct InterimBudget {
    count: usize,
    bytes: usize,
}

impl InterimBudget {
    /// Counts an interim response whose head has `length` bytes. Returns whether it is within the limits.
    pub(in crate::client) fn charge(&mut self, length: usize) -> bool {
        self.count += 1;
        self.bytes += length;
        self.count <= MAX_INTERIM_RESPONSES && self.bytes <= MAX_INTERIM_BYTES
    }
}

/// Serializes `head`, whose hop-by-hop headers have been removed; `None` if it is not forwarded.
///
/// A 100 is not forwarded: a client that asked for it got one from the gateway, before its body was sent to the
/// upstream.
pub(in crate::client) fn encode(head: &Response<()>) -> Option<Vec<u8>> {
    let status = head.status();
    if status == StatusCode::CONTINUE {
        return None;
    }
    let reason = head.extensions().get::<ReasonPhrase>().map(ReasonPhrase::as_bytes);
    let reason = reason.or_else(|| status.canonical_reason().map(str::as_bytes));
    let mut text = Vec::with_capacity(256);
    for part in [
        b"HTTP/1.1 ".as_slice(),
        status.as_str().as_bytes(),
        b" ",
        reason.unwrap_or_default(),
        b"\r\n",
    ] {
        text.extend_from_slice(part);
    }
    // These headers describe a body, which an interim response does not have.
    let fields =
        head.headers().iter().filter(|(name, _)| ![CONTENT_LENGTH, TRAILER].contains(*name));
    for (name, value) in fields {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            text.extend_from_slice(part);
        }
    }
    text.extend_from_slice(b"\r\n");
    Some(text)
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::client::http1::wire::response::parse_head;

    #[track_caller]
    fn check(sent: &str, expect: Option<&str>) {
        let mut input = BytesMut::from(sent);
        let head = parse_head(&mut input, false).unwrap().unwrap();
        assert!(head.is_interim() && input.is_empty(), "{sent:?}");
        let text = encode(&head.response).map(|text| String::from_utf8(text).unwrap());
        assert_eq!(text.as_deref(), expect);
    }

    #[test]
    fn headers_are_forwarded_except_those_of_connection_and_body() {
        check(
            "HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nConnection: x-hop\r\nX-Hop: 1\r\n\
             Keep-Alive: timeout=5\r\nContent-Length: 5\r\nTrailer: x\r\nLink: </b>\r\n\r\n",
            Some("HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\nlink: </b>\r\n\r\n"),
        );
        check("HTTP/1.1 102\r\n\r\n", Some("HTTP/1.1 102 \r\n\r\n"));
        check("HTTP/1.0 199 Almost there\r\n\r\n", Some("HTTP/1.1 199 Almost there\r\n\r\n"));
    }

    #[test]
    fn a_100_is_not_forwarded() {
        check("HTTP/1.1 100 Continue\r\n\r\n", None);
    }

    #[test]
    fn the_number_and_size_of_interim_responses_are_limited() {
        let mut budget = InterimBudget::default();
        assert!((0..MAX_INTERIM_RESPONSES).all(|_| budget.charge(1)));
        assert!(!budget.charge(1));
        let mut budget = InterimBudget::default();
        assert!(budget.charge(MAX_INTERIM_BYTES) && !budget.charge(1));
    }
}
