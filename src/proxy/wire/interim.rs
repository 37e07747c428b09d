//! Interim responses, as a client gets them (RFC 9110, 15.2).

use http::header::{CONTENT_LENGTH, TRAILER};
use http::{Response, StatusCode};
use hyper::ext::ReasonPhrase;

/// The most that one exchange may have.
const MAX_COUNT: usize = 1000;
/// What all their heads may have together. A final head has as much again.
const MAX_BYTES: usize = super::answer::MAX_HEAD;

/// How many there were in one exchange.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::proxy) struct Budget {
    count: usize,
    bytes: usize,
}

impl Budget {
    /// Counts one more, whose head has `length` bytes. Whether it may come.
    pub(in crate::proxy) fn admit(&mut self, length: usize) -> bool {
        self.count += 1;
        self.bytes += length;
        self.count <= MAX_COUNT && self.bytes <= MAX_BYTES
    }
}

/// `head` as it is passed on, if it is. Its fields about the connection have been removed.
///
/// A 100 is not: the client got one from here if it asked for it, before anything of its body was sent on.
pub(in crate::proxy) fn encode(head: &Response<()>) -> Option<Vec<u8>> {
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
    // There is no body that these could be about.
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
    use crate::proxy::wire::answer::take_head;

    #[track_caller]
    fn check(sent: &str, expect: Option<&str>) {
        let mut input = BytesMut::from(sent);
        let head = take_head(&mut input, false).unwrap().unwrap();
        assert!(head.is_interim() && input.is_empty(), "{sent:?}");
        let text = encode(&head.answer).map(|text| String::from_utf8(text).unwrap());
        assert_eq!(text.as_deref(), expect);
    }

    #[test]
    fn fields_pass_but_for_those_about_the_connection_and_a_body() {
        check(
            "HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nConnection: x-hop\r\nX-Hop: 1\r\n\
             Keep-Alive: timeout=5\r\nContent-Length: 5\r\nTrailer: x\r\nLink: </b>\r\n\r\n",
            Some("HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\nlink: </b>\r\n\r\n"),
        );
        check("HTTP/1.1 102\r\n\r\n", Some("HTTP/1.1 102 \r\n\r\n"));
        check("HTTP/1.0 199 Almost there\r\n\r\n", Some("HTTP/1.1 199 Almost there\r\n\r\n"));
    }

    #[test]
    fn a_100_is_not_passed_on() {
        check("HTTP/1.1 100 Continue\r\n\r\n", None);
    }

    #[test]
    fn there_are_not_more_than_are_reasonable() {
        let mut budget = Budget::default();
        assert!((0..MAX_COUNT).all(|_| budget.admit(1)));
        assert!(!budget.admit(1));
        let mut budget = Budget::default();
        assert!(budget.admit(MAX_BYTES) && !budget.admit(1));
    }
}
