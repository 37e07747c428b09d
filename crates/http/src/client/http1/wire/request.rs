//! Writes the head of a request and the framing of its body.

use std::io::Write;

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use http_body::Body;

use crate::headers::is_allowed_trailer;

/// The framing of a request body: how the upstream finds its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::client) enum Framing {
    /// No body.
    #[default]
    NoBody,
    /// A body of known length, with the given number of bytes left to send.
    Length(u64),
    Chunked,
}

impl Framing {
    /// Selects the framing for `body`. The length that a client sent is that of its body, because hyper used it as
    /// framing.
    pub(in crate::client) fn of(method: &Method, headers: &HeaderMap, body: &impl Body) -> Self {
        match body.size_hint().exact() {
            // Some servers require a Content-Length for methods that usually have a body.
            Some(0) | None if body.is_end_stream() => {
                let sends_length = matches!(*method, Method::POST | Method::PUT | Method::PATCH)
                    || headers.contains_key(CONTENT_LENGTH);
                if sends_length { Self::Length(0) } else { Self::NoBody }
            }
            Some(length) => Self::Length(length),
            None => Self::Chunked,
        }
    }
}

/// Returns path and query as they are sent.
pub(in crate::client) fn path_and_query(uri: &Uri) -> &str {
    uri.path_and_query().map_or("/", PathAndQuery::as_str)
}

/// Writes the request line for HTTP/1.1. The target is the concatenation of two parts.
pub(in crate::client) fn write_request_line(out: &mut Vec<u8>, method: &Method, target: [&str; 2]) {
    for part in [method.as_str(), " ", target[0], target[1], " HTTP/1.1\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// Writes a header, unless it concerns the framing, which each connection determines itself.
pub(in crate::client) fn write_header(out: &mut Vec<u8>, name: &HeaderName, value: &HeaderValue) {
    if *name != CONTENT_LENGTH && *name != TRANSFER_ENCODING {
        write_field(out, name.as_str(), value.as_bytes());
    }
}

/// Writes the framing header and the end of the head.
pub(in crate::client) fn write_head_end(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::NoBody => {}
        Framing::Length(length) => {
            let mut digits = itoa::Buffer::new();
            write_field(out, "content-length", digits.format(length).as_bytes());
        }
        Framing::Chunked => write_field(out, "transfer-encoding", b"chunked"),
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes the chunk-size line of a chunk of `length` bytes.
pub(in crate::client) fn write_chunk_size(out: &mut Vec<u8>, length: usize) {
    // Writes to memory do not fail.
    let _ = write!(out, "{length:x}\r\n");
}

/// Writes the last chunk and the trailers of a chunked body.
pub(in crate::client) fn write_last_chunk(out: &mut Vec<u8>, trailers: &HeaderMap) {
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers.iter().filter(|(name, _)| is_allowed_trailer(name)) {
        write_field(out, name.as_str(), value.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

fn write_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
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
        write_request_line(&mut out, &head.method, ["", path_and_query(&head.uri)]);
        head.headers.iter().for_each(|(name, value)| write_header(&mut out, name, value));
        write_head_end(&mut out, Framing::of(&head.method, &head.headers, &body));
        assert_eq!(String::from_utf8(out).unwrap(), expect);
    }

    #[test]
    fn a_get_without_body_has_no_content_length() {
        check(
            request(Method::GET),
            Empty::<Bytes>::new(),
            "GET /function/echo?q=%20 HTTP/1.1\r\n\r\n",
        );
    }

    #[test]
    fn a_post_without_body_has_a_content_length_of_zero() {
        check(
            request(Method::POST),
            Empty::<Bytes>::new(),
            "POST /function/echo?q=%20 HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        );
    }

    #[test]
    fn the_framing_is_determined_by_the_gateway() {
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
    fn trailers_for_framing_or_routing_are_removed() {
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
