//! Request heads that hyper refuses. Its own responses do not name the error, so the client gets a response of this
//! module instead. A minor version that hyper does not know is corrected, and the request is served.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::time::SystemTime;

use bytes::Bytes;
use http::StatusCode;

use crate::server::client_connection::DEFAULT_MAX_HEADERS;
use crate::server::connection::{MAX_HEAD_BYTES, MAX_HEADERS};

/// Maximum length of a request target that hyper accepts.
const MAX_TARGET_BYTES: usize = (64 << 10) - 2;

/// Why a request head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("the head of the request exceeds {MAX_HEAD_BYTES} bytes")]
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

impl HeadError {
    /// Returns the status of the error response.
    pub fn status(self) -> StatusCode {
        match self {
            Self::TooLarge | Self::TooManyHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::OutOfMemory => StatusCode::SERVICE_UNAVAILABLE,
            Self::TargetTooLong => StatusCode::URI_TOO_LONG,
            Self::UnsupportedVersion => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            Self::Version
            | Self::Method
            | Self::Target
            | Self::Header
            | Self::ContentLength
            | Self::TransferEncoding
            | Self::TransferEncodingInHttp10
            | Self::Malformed => StatusCode::BAD_REQUEST,
        }
    }

    /// Returns whether the same request may succeed later.
    pub fn may_retry(self) -> bool {
        matches!(self, Self::OutOfMemory)
    }
}

/// How to proceed with a request head that hyper has refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeadOutcome {
    /// Parse these bytes instead.
    Corrected(Bytes),
    /// Parse it again with a higher limit of headers. Its lines were not counted, because it arrived during an
    /// exchange.
    NeedsManyHeaders,
    Refused(HeadError),
}

impl HeadOutcome {
    /// Classifies `error` of hyper; `unparsed` is the data that hyper has read and not parsed.
    pub(super) fn from_hyper(error: &hyper::Error, unparsed: &[u8]) -> Self {
        if error.is_parse_version_h2() {
            return Self::Refused(HeadError::UnsupportedVersion);
        }
        if error.is_parse_too_large() {
            return match classify_too_large(unparsed) {
                Self::Refused(HeadError::ContentLength) if has_long_target(unparsed) => {
                    Self::Refused(HeadError::TargetTooLong)
                }
                outcome => outcome,
            };
        }
        // hyper has no methods for these errors. A test compares the texts with those of hyper.
        Self::Refused(match error.to_string().as_str() {
            "invalid HTTP version parsed" => return Self::from_version(unparsed),
            "invalid HTTP method parsed" => HeadError::Method,
            "invalid URI" => HeadError::Target,
            "invalid HTTP header parsed" => HeadError::Header,
            "invalid content-length parsed" => HeadError::ContentLength,
            "invalid transfer-encoding parsed" => HeadError::TransferEncoding,
            "unexpected transfer-encoding parsed" => HeadError::TransferEncodingInHttp10,
            _ => HeadError::Malformed,
        })
    }

    /// A higher minor version is served as 1.1 (RFC 9112, 2.3); another major version is another protocol.
    fn from_version(head: &[u8]) -> Self {
        let Some(at) = version_range(head) else { return Self::Refused(HeadError::Version) };
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
            // An incomplete version.
            [b'H', b'T', b'T', b'P', b'/', b'0' | b'2'..=b'9']
            | [b'H', b'T', b'T', b'P', b'/', b'0' | b'2'..=b'9', b'.'] => {
                Self::Refused(HeadError::UnsupportedVersion)
            }
            _ => Self::Refused(HeadError::Version),
        }
    }
}

/// Returns the range of the version in a request line at the front of `head`.
fn version_range(head: &[u8]) -> Option<Range<usize>> {
    let start = head.iter().position(|byte| !b"\r\n".contains(byte))?;
    let end = memchr::memchr(b'\n', &head[start..]).map_or(head.len(), |at| start + at);
    let line = &head[start..end];
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut spaces = memchr::memchr_iter(b' ', line).skip(1);
    let from = spaces.next()? + 1;
    Some(start + from..start + line.len())
}

/// Returns whether the request line at the front of `head` has a target that is longer than hyper accepts.
fn has_long_target(head: &[u8]) -> bool {
    let start = head.iter().position(|byte| !b"\r\n".contains(byte)).unwrap_or(head.len());
    let line = &head[start..];
    let line = &line[..memchr::memchr(b'\n', line).unwrap_or(line.len())];
    let mut spaces = memchr::memchr_iter(b' ', line);
    let target = spaces.next().zip(spaces.next());
    target.is_some_and(|(before, behind)| behind - before - 1 > MAX_TARGET_BYTES)
}

fn is_request_line(text: &[u8]) -> bool {
    version_range(text).is_some_and(|at| text[at].starts_with(b"HTTP/"))
}

/// Classifies an error that hyper reports as too large: the head at the front of `unparsed`, or the Content-Length of a
/// head that hyper has already removed.
///
/// Counts lines without httparse: a second use of its parser prevents the compiler from inlining the first, which is
/// on the path of every request.
fn classify_too_large(unparsed: &[u8]) -> HeadOutcome {
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
    HeadOutcome::Refused(match end {
        // This is a body: hyper has removed the head.
        _ if lines > 0 && !is_request_line(unparsed) => HeadError::ContentLength,
        // One of the lines is the request line.
        _ if lines > MAX_HEADERS + 1 => HeadError::TooManyHeaders,
        Some(end) if end > MAX_HEAD_BYTES => HeadError::TooLarge,
        None if unparsed.len() >= MAX_HEAD_BYTES => HeadError::TooLarge,
        _ if lines > DEFAULT_MAX_HEADERS => return HeadOutcome::NeedsManyHeaders,
        Some(_) | None => HeadError::ContentLength,
    })
}

/// Returns the response for `error` as bytes; without a body in reply to HEAD (`to_head`; RFC 9110, 9.3.2).
pub(super) fn response(error: HeadError, to_head: bool) -> Bytes {
    let (status, body) = (error.status(), format!("{error}\n"));
    tracing::debug!(%status, %error, "Request failed");
    let (code, reason) = (status.as_str(), status.canonical_reason().unwrap_or_default());
    let retry_after = if error.may_retry() { "retry-after: 1\r\n" } else { "" };
    let (length, date) = (body.len(), httpdate::fmt_http_date(SystemTime::now()));
    let mut text = format!(
        "HTTP/1.1 {code} {reason}\r\ncontent-type: text/plain; charset=utf-8\r\n{retry_after}connection: close\r\n\
         content-length: {length}\r\ndate: {date}\r\n\r\n"
    );
    if !to_head {
        text.push_str(&body);
    }
    text.into()
}
