//! The head of a request, and how its body is framed.

use std::io::Write;

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use http_body::Body;

use crate::proxy::headers::may_trail;

/// How an upstream is told where a body ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::proxy) enum Framing {
    /// There is no body.
    #[default]
    Bare,
    /// Bytes that are still to come.
    Length(u64),
    Chunked,
}

impl Framing {
    /// How `body` is sent. A caller's own length is that of its body: it came framed by it.
    pub(in crate::proxy) fn of(method: &Method, headers: &HeaderMap, body: &impl Body) -> Self {
        match body.size_hint().exact() {
            // Some servers want to hear of a body that could be there but is not.
            Some(0) | None if body.is_end_stream() => {
                let says = matches!(*method, Method::POST | Method::PUT | Method::PATCH)
                    || headers.contains_key(CONTENT_LENGTH);
                if says { Self::Length(0) } else { Self::Bare }
            }
            Some(length) => Self::Length(length),
            None => Self::Chunked,
        }
    }
}

/// Path and query as they are sent.
pub(in crate::proxy) fn path_and_query(uri: &Uri) -> &str {
    uri.path_and_query().map_or("/", PathAndQuery::as_str)
}

/// Writes the first line of a request for HTTP/1.1. Its target comes in two parts.
pub(in crate::proxy) fn write_start(out: &mut Vec<u8>, method: &Method, target: [&str; 2]) {
    for part in [method.as_str(), " ", target[0], target[1], " HTTP/1.1\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// Writes a header, unless it says how the body is framed: that is for each connection to say.
pub(in crate::proxy) fn write_header(out: &mut Vec<u8>, name: &HeaderName, value: &HeaderValue) {
    if *name != CONTENT_LENGTH && *name != TRANSFER_ENCODING {
        write_line(out, name.as_str(), value.as_bytes());
    }
}

/// Writes how the body is framed, and the end of the head.
pub(in crate::proxy) fn write_end(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::Bare => {}
        Framing::Length(length) => {
            let mut digits = itoa::Buffer::new();
            write_line(out, "content-length", digits.format(length).as_bytes());
        }
        Framing::Chunked => write_line(out, "transfer-encoding", b"chunked"),
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes what precedes `length` bytes of a chunk.
pub(in crate::proxy) fn write_chunk_size(out: &mut Vec<u8>, length: usize) {
    // Writing to memory does not fail.
    let _ = write!(out, "{length:x}\r\n");
}

/// Writes the end of a chunked body.
pub(in crate::proxy) fn write_last_chunk(out: &mut Vec<u8>, trailers: &HeaderMap) {
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers.iter().filter(|(name, _)| may_trail(name)) {
        write_line(out, name.as_str(), value.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

fn write_line(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    for part in [name.as_bytes(), b": ", value, b"\r\n"] {
        out.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::{HeaderValue, Request};
    use http_body_util::channel::Channel;
    use http_body_util::{Empty, Full};

    use super::*;

    fn request(method: Method) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = "/function/echo?q=%20".parse().unwrap();
        request
    }

    #[track_caller]
    fn check(request: Request<()>, body: impl Body, expect: &str) {
        let (head, ()) = request.into_parts();
        let mut out = Vec::new();
        write_start(&mut out, &head.method, ["", path_and_query(&head.uri)]);
        head.headers.iter().for_each(|(name, value)| write_header(&mut out, name, value));
        write_end(&mut out, Framing::of(&head.method, &head.headers, &body));
        assert_eq!(String::from_utf8(out).unwrap(), expect);
    }

    #[test]
    fn a_request_without_body_says_nothing_of_one() {
        check(
            request(Method::GET),
            Empty::<Bytes>::new(),
            "GET /function/echo?q=%20 HTTP/1.1\r\n\r\n",
        );
    }

    #[test]
    fn a_method_that_expects_a_body_says_that_there_is_none() {
        check(
            request(Method::POST),
            Empty::<Bytes>::new(),
            "POST /function/echo?q=%20 HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        );
    }

    #[test]
    fn the_framing_is_our_own() {
        let mut sized = request(Method::PUT);
        sized.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("5"));
        sized.headers_mut().insert("x-kept", HeaderValue::from_static("a b"));
        check(
            sized,
            Full::new(Bytes::from_static(b"12345")),
            "PUT /function/echo?q=%20 HTTP/1.1\r\nx-kept: a b\r\ncontent-length: 5\r\n\r\n",
        );
        let mut streamed = request(Method::GET);
        streamed.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("gzip"));
        check(
            streamed,
            Channel::<Bytes>::new(1).1,
            "GET /function/echo?q=%20 HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n",
        );
    }

    #[test]
    fn trailers_that_frame_or_route_stay_here() {
        let trailers = HeaderMap::from_iter([
            (CONTENT_LENGTH, HeaderValue::from_static("5")),
            (http::header::HOST, HeaderValue::from_static("else.where")),
            (HeaderName::from_static("x-checksum"), HeaderValue::from_static("42")),
        ]);
        let mut out = Vec::new();
        write_last_chunk(&mut out, &trailers);
        assert_eq!(out, b"0\r\nx-checksum: 42\r\n\r\n");
    }
}
