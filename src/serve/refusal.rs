//! Heads of requests that hyper refuses by itself: its responses say nothing, so the client gets one from here that
//! says what was wrong. A minor version that hyper does not know is corrected instead.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::ops::Range;
use std::time::SystemTime;

use bytes::Bytes;

use crate::error::Error;
use crate::serve::connection::{MAX_HEAD, MAX_HEADERS};

/// Why the head of a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("the head of the request exceeds {MAX_HEAD} bytes")]
    TooLarge,
    #[error(
        "incomplete request heads use all that max_head_memory allows, and this one is the largest"
    )]
    OutOfMemory,
    #[error("the request has more than {MAX_HEADERS} headers")]
    TooManyHeaders,
    #[error("the target of the request is too long")]
    TargetTooLong,
    #[error("this server speaks HTTP/1.1 and HTTP/1.0, not the version of the request")]
    UnsupportedVersion,
    #[error("the HTTP version of the request is malformed")]
    Version,
    #[error("the method of the request is malformed")]
    Method,
    #[error("the target of the request is malformed")]
    Target,
    #[error("a header line of the request is malformed")]
    Header,
    #[error("Content-Length is malformed, too large, or given twice with different values")]
    ContentLength,
    #[error("the final transfer coding is not chunked, so the end of the body is unknown")]
    TransferEncoding,
    #[error("the request has Transfer-Encoding, which HTTP/1.0 does not define")]
    TransferEncodingInHttp10,
    #[error("the head of the request is malformed")]
    Malformed,
}

/// What becomes of a request that hyper does not take.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is read once more, as these bytes.
    Corrected(Bytes),
    Refused(HeadError),
}

impl Outcome {
    /// After `error` of hyper's; `unparsed` is what it has read and not taken.
    pub(super) fn of(error: &hyper::Error, unparsed: &[u8]) -> Self {
        if error.is_parse_version_h2() {
            return Self::Refused(HeadError::UnsupportedVersion);
        }
        Self::Refused(match error.to_string().as_str() {
            "invalid HTTP version parsed" => return Self::of_version(unparsed),
            "message head is too large" => too_large(unparsed),
            "URI too long" => HeadError::TargetTooLong,
            "invalid HTTP method parsed" => HeadError::Method,
            "invalid URI" => HeadError::Target,
            "invalid HTTP header parsed" => HeadError::Header,
            "invalid content-length parsed" => HeadError::ContentLength,
            "invalid transfer-encoding parsed" => HeadError::TransferEncoding,
            "unexpected transfer-encoding parsed" => HeadError::TransferEncodingInHttp10,
            _ => HeadError::Malformed,
        })
    }

    /// A higher minor version is 1.1 to a server that knows no more (RFC 9112, 2.3); another major one is another
    /// protocol.
    fn of_version(head: &[u8]) -> Self {
        let Some(at) = version(head) else { return Self::Refused(HeadError::Version) };
        match head[at.clone()] {
            [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'2'..=b'9'] => {
                let mut corrected = head.to_vec();
                corrected[at.end - 1] = b'1';
                Self::Corrected(corrected.into())
            }
            [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
                if major.is_ascii_digit() && minor.is_ascii_digit() =>
            {
                Self::Refused(HeadError::UnsupportedVersion)
            }
            // The rest of it has not come.
            [b'H', b'T', b'T', b'P', b'/', b'0' | b'2'..=b'9']
            | [b'H', b'T', b'T', b'P', b'/', b'0' | b'2'..=b'9', b'.'] => {
                Self::Refused(HeadError::UnsupportedVersion)
            }
            _ => Self::Refused(HeadError::Version),
        }
    }
}

/// Where the version stands in a request line at the front of `head`.
fn version(head: &[u8]) -> Option<Range<usize>> {
    let start = head.iter().position(|byte| !b"\r\n".contains(byte))?;
    let end = memchr::memchr(b'\n', &head[start..]).map_or(head.len(), |at| start + at);
    let line = &head[start..end];
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut spaces = memchr::memchr_iter(b' ', line).skip(1);
    let from = spaces.next()? + 1;
    Some(start + from..start + line.len())
}

/// What hyper calls too large: the head at the front of `unparsed`, or a length in one that it has taken already.
///
/// Lines are counted without httparse: a second use of its parser keeps the compiler from inlining the first, which
/// every request passes.
fn too_large(unparsed: &[u8]) -> HeadError {
    // Empty lines may precede a request line.
    let start = unparsed.iter().position(|byte| !b"\r\n".contains(byte)).unwrap_or(unparsed.len());
    let (mut lines, mut end) = (0, None);
    let mut from = start;
    while let Some(length) = memchr::memchr(b'\n', &unparsed[from..]) {
        let line = &unparsed[from..from + length];
        from += length + 1;
        if line.is_empty() || line == b"\r" {
            end = Some(from);
            break;
        }
        lines += 1;
    }
    match end {
        // One line is the request line.
        _ if lines > MAX_HEADERS + 1 => HeadError::TooManyHeaders,
        Some(end) if end > MAX_HEAD => HeadError::TooLarge,
        None if unparsed.len() >= MAX_HEAD => HeadError::TooLarge,
        Some(_) | None => HeadError::ContentLength,
    }
}

/// The whole response that says so; in reply to HEAD (`to_head`) without its body (RFC 9110, 9.3.2).
pub(super) fn response(error: HeadError, to_head: bool) -> Bytes {
    let (head, body) = Error::Head(error).answer(None).into_parts();
    let reason = head.status.canonical_reason().unwrap_or_default();
    let date = httpdate::fmt_http_date(SystemTime::now());
    let mut text = format!("HTTP/1.1 {} {reason}\r\n", head.status.as_str()).into_bytes();
    for (name, value) in &head.headers {
        text.extend_from_slice(name.as_str().as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    let length = body.len();
    text.extend_from_slice(format!("content-length: {length}\r\ndate: {date}\r\n\r\n").as_bytes());
    if !to_head {
        text.extend_from_slice(body.as_bytes());
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(head: &str, expect: Result<&'static str, HeadError>) {
        let expect = match expect {
            Ok(corrected) => Outcome::Corrected(Bytes::from_static(corrected.as_bytes())),
            Err(error) => Outcome::Refused(error),
        };
        assert_eq!(Outcome::of_version(head.as_bytes()), expect, "{head:?}");
    }

    #[test]
    fn a_higher_minor_version_is_corrected_where_it_stands() {
        check("GET / HTTP/1.2\r\nA: HTTP/1.3\r\n\r\n", Ok("GET / HTTP/1.1\r\nA: HTTP/1.3\r\n\r\n"));
        check("\r\nGET /HTTP/1.2 HTTP/1.9\n\n", Ok("\r\nGET /HTTP/1.2 HTTP/1.1\n\n"));
        check("GET / HTTP/1.7", Ok("GET / HTTP/1.1"));
    }

    #[test]
    fn other_versions_are_refused() {
        for version in ["HTTP/2.0", "HTTP/0.9", "HTTP/9.9", "HTTP/2.1", "HTTP/2"] {
            check(&format!("GET / {version}\r\n\r\n"), Err(HeadError::UnsupportedVersion));
        }
        check("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Err(HeadError::UnsupportedVersion));
        for version in ["http/1.1", "HTTP/1.23", "HTTP/1,2", "HTTP/1.x", "x HTTP/1.2", ""] {
            check(&format!("GET / {version}\r\n\r\n"), Err(HeadError::Version));
        }
        check("GET /\r\nA b HTTP/1.2\r\n", Err(HeadError::Version));
        check("", Err(HeadError::Version));
    }

    #[test]
    fn what_is_too_large_is_found_out() {
        let head = |count: usize| {
            format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count)).into_bytes()
        };
        assert_eq!(too_large(&head(MAX_HEADERS + 1)), HeadError::TooManyHeaders);
        assert_eq!(too_large(&head(1)), HeadError::ContentLength);
        assert_eq!(too_large(b""), HeadError::ContentLength);
        assert_eq!(too_large(&vec![b'x'; MAX_HEAD]), HeadError::TooLarge);
        let large = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(MAX_HEAD));
        assert_eq!(too_large(large.as_bytes()), HeadError::TooLarge);
    }

    #[test]
    fn a_response_is_whole_and_closes() {
        let text = response(HeadError::Method, false);
        let text = std::str::from_utf8(&text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{head}");
        assert!(
            head.contains("connection: close\r\n") && head.contains("content-type: text/plain")
        );
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}");
        assert_eq!(body, "the method of the request is malformed\n");
    }
}
