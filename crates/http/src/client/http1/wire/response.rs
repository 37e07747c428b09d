//! Parses the head of a response.

use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use httparse::Status;
use hyper::ext::ReasonPhrase;

use crate::client::codings::is_chunked;
use crate::client::http1::wire::ParseError;
use crate::client::http1::wire::body_decoder::BodyDecoder;
use crate::client::http1::wire::space_before_colon::{
    may_precede_colon, remove_space_before_colons,
};
use crate::headers::{HeaderKind, connection_options, remove_connection_named, set_upgrade};

/// Maximum number of headers in a response.
const MAX_HEADERS: usize = 100;
/// Maximum size of a response head.
pub(in crate::client) const MAX_HEAD_BYTES: usize = 1 << 20;

/// The head of a response, and the framing derived from it.
#[derive(Debug)]
pub(in crate::client) struct ResponseHead {
    pub(in crate::client) response: Response<()>,
    pub(in crate::client) body: BodyDecoder,
    /// The connection can be used for another request after this response.
    pub(in crate::client) keep_alive: bool,
}

impl ResponseHead {
    /// Returns whether this is an interim response, which another response follows.
    pub(in crate::client) fn is_interim(&self) -> bool {
        let status = self.response.status();
        status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
    }
}

/// Removes the head of a response from the front of `input`; `None` while the head is incomplete. `to_head`: the
/// response to a HEAD request.
pub(in crate::client) fn parse_head(
    input: &mut BytesMut,
    to_head: bool,
) -> Result<Option<ResponseHead>, ParseError> {
    if input.is_empty() {
        return Ok(None);
    }
    let config = httparse::ParserConfig::default();
    loop {
        let mut headers = [const { MaybeUninit::uninit() }; MAX_HEADERS];
        let mut parsed = httparse::Response::new(&mut []);
        match config.parse_response_with_uninit_headers(&mut parsed, input, &mut headers) {
            Ok(Status::Complete(length)) if length <= MAX_HEAD_BYTES => {
                let head = build_head(&parsed, &input[..length], to_head)?;
                input.advance(length);
                return Ok(Some(head));
            }
            Ok(Status::Complete(_)) => return Err(ParseError::TooLarge),
            Ok(Status::Partial) => return Ok(None),
            Err(httparse::Error::HeaderName) if remove_space(input) => {}
            Err(httparse::Error::HeaderName) if may_precede_colon(field_lines(input)) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes whitespace before colons from the head at the front of `input`. Returns whether there was any.
#[cold]
fn remove_space(input: &mut BytesMut) -> bool {
    let fields = field_lines(input);
    let start = input.len() - fields.len();
    let Some(fields) = remove_space_before_colons(fields) else { return false };
    input.truncate(start);
    input.extend_from_slice(&fields);
    true
}

/// Returns the text after the first line of `input`. Empty lines may precede that line.
fn field_lines(input: &[u8]) -> &[u8] {
    let start = input.iter().position(|byte| !b"\r\n".contains(byte)).unwrap_or(input.len());
    let line = &input[start..];
    &line[memchr::memchr(b'\n', line).map_or(line.len(), |at| at + 1)..]
}

/// Removes the final head from the front of `input`, and skips heads of interim responses.
#[cfg(any(test, fuzzing))]
pub(in crate::client) fn parse_final_head(
    input: &mut BytesMut,
    to_head: bool,
) -> Result<Option<ResponseHead>, ParseError> {
    while let Some(head) = parse_head(input, to_head)? {
        if !head.is_interim() {
            return Ok(Some(head));
        }
    }
    Ok(None)
}

fn build_head(
    parsed: &httparse::Response<'_, '_>,
    text: &[u8],
    to_head: bool,
) -> Result<ResponseHead, ParseError> {
    let mut response = Response::new(());
    let status =
        parsed.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(ParseError::Status)?;
    *response.status_mut() = status;
    keep_reason_phrase(&mut response, parsed.reason.unwrap_or_default());
    // One copy for all values, so that the read buffer can be reused.
    let shared = Bytes::copy_from_slice(text);
    let mut framing = FramingHeaders::default();
    let headers = response.headers_mut();
    // Reserve space for headers that the gateway adds later.
    headers.reserve(parsed.headers.len() + 4);
    for header in &*parsed.headers {
        let name =
            HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| ParseError::Header)?;
        let start = header.value.as_ptr().addr() - text.as_ptr().addr();
        let value = shared.slice(start..start + header.value.len());
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| ParseError::Header)?;
        if let Some(value) = framing.capture(HeaderKind::of(&name), value) {
            headers.append(name, value);
        }
    }
    let is_1_0 = parsed.version == Some(0);
    let bodiless = status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || to_head;
    let length = framing.content_length()?;
    let body = framing.body_decoder(length, bodiless, is_1_0)?;
    let switches = status == StatusCode::SWITCHING_PROTOCOLS;
    let keep_alive = framing.keep_alive(is_1_0) && body != BodyDecoder::UntilClose && !switches;
    framing.apply_to(headers, length, status);
    Ok(ResponseHead { response, body, keep_alive })
}

/// Keeps a reason phrase that differs from the standard one.
fn keep_reason_phrase(response: &mut Response<()>, reason: &str) {
    if Some(reason) != response.status().canonical_reason()
        && let Ok(reason) = ReasonPhrase::try_from(reason.as_bytes())
    {
        response.extensions_mut().insert(reason);
    }
}

/// The headers of a response that concern its connection and the framing of its body. They are not forwarded as
/// received.
///
/// Most responses have one Content-Length and none of the others, so that no vector is allocated.
#[derive(Default)]
struct FramingHeaders {
    /// The first Content-Length.
    content_length: Option<HeaderValue>,
    others: Vec<(HeaderKind, HeaderValue)>,
}

impl FramingHeaders {
    /// Keeps a header for connection or framing; returns any other, which is forwarded.
    fn capture(&mut self, kind: HeaderKind, value: HeaderValue) -> Option<HeaderValue> {
        match kind {
            HeaderKind::ContentLength if self.content_length.is_none() => {
                self.content_length = Some(value)
            }
            HeaderKind::Connection
            | HeaderKind::Upgrade
            | HeaderKind::TransferEncoding
            | HeaderKind::ContentLength => {
                self.others.push((kind, value));
            }
            kind if kind.is_hop_by_hop() => {}
            _ => return Some(value),
        }
        None
    }

    /// Returns all values of one kind; for Content-Length, those after the first.
    fn values(&self, kind: HeaderKind) -> impl Iterator<Item = &HeaderValue> {
        self.others.iter().filter(move |(of, _)| *of == kind).map(|(_, value)| value)
    }

    fn has(&self, kind: HeaderKind) -> bool {
        self.values(kind).next().is_some()
    }

    /// Returns the decoder of the body (RFC 9112, 6.3).
    fn body_decoder(
        &self,
        length: Option<u64>,
        bodiless: bool,
        is_1_0: bool,
    ) -> Result<BodyDecoder, ParseError> {
        if is_chunked(self.values(HeaderKind::TransferEncoding))? {
            // HTTP/1.0 has no transfer codings, so the framing is ambiguous.
            return match (is_1_0, bodiless) {
                (true, _) => Err(ParseError::CodingInHttp10),
                (false, true) => Ok(BodyDecoder::Done),
                (false, false) => Ok(BodyDecoder::chunked()),
            };
        }
        Ok(match length {
            _ if bodiless => BodyDecoder::Done,
            Some(length) => BodyDecoder::length(length),
            None => BodyDecoder::UntilClose,
        })
    }

    /// Returns the length on which all Content-Length headers agree; `None` if there is a transfer coding.
    fn content_length(&self) -> Result<Option<u64>, ParseError> {
        let mut length = None;
        if self.has(HeaderKind::TransferEncoding) {
            return Ok(length);
        }
        for value in self.content_length.iter().chain(self.values(HeaderKind::ContentLength)) {
            for text in value.as_bytes().split(|byte| *byte == b',') {
                let number =
                    parse_content_length(text.trim_ascii()).ok_or(ParseError::ContentLength)?;
                if length.is_some_and(|length| length != number) {
                    return Err(ParseError::ContentLength);
                }
                length = Some(number);
            }
        }
        Ok(length)
    }

    /// Returns whether the upstream keeps the connection open after this response.
    fn keep_alive(&self, is_1_0: bool) -> bool {
        let has_option = |what: &str| {
            self.values(HeaderKind::Connection).any(|value| {
                let mut options = value.as_bytes().split(|byte| *byte == b',');
                options.any(|option| option.trim_ascii().eq_ignore_ascii_case(what.as_bytes()))
            })
        };
        // With both headers, the peer may assume another end of the body (RFC 9112, 6.3).
        let ambiguous = self.content_length.is_some() && self.has(HeaderKind::TransferEncoding);
        !ambiguous && !has_option("close") && (!is_1_0 || has_option("keep-alive"))
    }

    /// Sets the framing headers that are forwarded to the client, and removes headers named by `Connection`.
    fn apply_to(mut self, headers: &mut HeaderMap, length: Option<u64>, status: StatusCode) {
        let named = connection_options(self.values(HeaderKind::Connection));
        remove_connection_named(headers, &named);
        if let (Some(length), Some(first)) = (length, self.content_length.take()) {
            let is_plain =
                !self.has(HeaderKind::ContentLength) && !first.as_bytes().contains(&b',');
            let value = if is_plain { first } else { length.into() };
            headers.insert(CONTENT_LENGTH, value);
        }
        match status {
            StatusCode::SWITCHING_PROTOCOLS if named.contains(&UPGRADE) => {
                if let Some(upgrade) = self.values(HeaderKind::Upgrade).last() {
                    set_upgrade(headers, upgrade);
                }
            }
            // The response must name the required protocols (RFC 9110, 15.5.22).
            StatusCode::UPGRADE_REQUIRED if self.has(HeaderKind::Upgrade) => {
                headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
                for upgrade in self.values(HeaderKind::Upgrade) {
                    headers.append(UPGRADE, upgrade.clone());
                }
            }
            _ => {}
        }
    }
}

fn parse_content_length(text: &[u8]) -> Option<u64> {
    // `parse` would accept a sign.
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::codings::CodingError;

    fn parse(text: &str) -> Result<Option<ResponseHead>, ParseError> {
        parse_final_head(&mut BytesMut::from(text), false)
    }

    #[track_caller]
    fn check(text: &str, body: BodyDecoder, keep_alive: bool) {
        let head = parse(text).unwrap().unwrap();
        assert_eq!((&head.body, head.keep_alive), (&body, keep_alive), "{text}");
    }

    #[track_caller]
    fn refuses(text: &str, expect: ParseError) {
        assert_eq!(parse(text).unwrap_err(), expect, "{text}");
    }

    #[test]
    fn the_head_determines_the_framing_of_the_body() {
        check("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", BodyDecoder::length(7), true);
        check("HTTP/1.1 200 OK\r\nContent-Length: 7, 7\r\n\r\n", BodyDecoder::length(7), true);
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n",
            BodyDecoder::chunked(),
            true,
        );
        check("HTTP/1.1 200 OK\r\n\r\n", BodyDecoder::UntilClose, false);
        check("HTTP/1.1 204 No\r\nContent-Length: 7\r\n\r\n", BodyDecoder::Done, true);
        check("HTTP/1.1 304 No\r\n\r\n", BodyDecoder::Done, true);
        check("HTTP/1.1 101 Go\r\n\r\n", BodyDecoder::Done, false);
    }

    #[test]
    fn the_connection_header_determines_keep_alive() {
        let sized = |version: &str, connection: &str| {
            format!("HTTP/{version} 200 OK\r\nContent-Length: 7\r\n{connection}\r\n")
        };
        check(&sized("1.0", ""), BodyDecoder::length(7), false);
        check(&sized("1.0", "Connection: Keep-Alive\r\n"), BodyDecoder::length(7), true);
        check(&sized("1.1", "Connection: x, Close\r\n"), BodyDecoder::length(7), false);
        check(
            &sized("1.1", "Connection: close\r\nConnection: x\r\n"),
            BodyDecoder::length(7),
            false,
        );
    }

    #[test]
    fn ambiguous_or_invalid_heads_are_refused() {
        refuses("HTTP/1.1 200 OK\r\nContent-Length: 7, 8\r\n\r\n", ParseError::ContentLength);
        refuses(
            "HTTP/1.1 200 OK\r\nContent-Length: 7\r\nContent-Length: 8\r\n\r\n",
            ParseError::ContentLength,
        );
        refuses("HTTP/1.1 200 OK\r\nContent-Length: +7\r\n\r\n", ParseError::ContentLength);
        refuses("HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n", ParseError::ContentLength);
        refuses(
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
            ParseError::ContentLength,
        );
        for (coding, expect) in [
            ("gzip, chunked", CodingError::Unsupported),
            ("identity", CodingError::NotChunked),
            ("chunked, chunked", CodingError::ChunkedTwice),
            ("xchunked", CodingError::NotChunked),
            ("chunked\r\nTransfer-Encoding: chunked", CodingError::ChunkedTwice),
        ] {
            let head = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\n");
            refuses(&head, ParseError::TransferEncoding(expect));
        }
        refuses(
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            ParseError::CodingInHttp10,
        );
        refuses("HTTP/1.1 200 OK\r\nA b: c\r\n\r\n", httparse::Error::HeaderName.into());
        refuses("SSH-2.0-x\r\n", httparse::Error::Version.into());
    }

    #[test]
    fn whitespace_before_a_colon_is_removed() {
        let text = "HTTP/1.1 200 OK : x\r\nA : b : c\r\nTransfer-Encoding \t: chunked\r\n\r\nD : e";
        for size in 1..text.len() {
            let (mut input, mut head) = (BytesMut::new(), None);
            for piece in text.as_bytes().chunks(size) {
                input.extend_from_slice(piece);
                head = head.or_else(|| parse_final_head(&mut input, false).unwrap());
            }
            let head = head.unwrap();
            assert_eq!(
                (&head.response.headers()["a"], head.body),
                (&"b : c".parse().unwrap(), BodyDecoder::chunked())
            );
            assert_eq!(&input[..], b"D : e");
        }
        for text in ["A b: c", " : b", "A \x01: b", ": b"] {
            refuses(
                &format!("HTTP/1.1 200 OK\r\nC : d\r\n{text}\r\n\r\nbody "),
                ParseError::Head(httparse::Error::HeaderName),
            );
        }
    }

    #[test]
    fn a_head_of_one_mebibyte_is_accepted_and_a_larger_one_refused() {
        for (more, expect) in [(0, None), (1, Some(ParseError::TooLarge))] {
            let frame = "HTTP/1.1 200 OK\r\nA: \r\n\r\n".len();
            let value = "x".repeat(MAX_HEAD_BYTES - frame + more);
            let taken = parse(&format!("HTTP/1.1 200 OK\r\nA: {value}\r\n\r\n"));
            assert_eq!(taken.err(), expect);
        }
    }

    #[test]
    fn a_426_names_the_required_protocols() {
        let upgrades = |status: &str| {
            let lines =
                "Connection: Upgrade\r\nUpgrade: a\r\nUpgrade: b/1\r\nContent-Length: 0\r\n";
            let head = parse(&format!("HTTP/1.1 {status}\r\n{lines}\r\n")).unwrap().unwrap();
            let headers = head.response.headers();
            assert_eq!(headers.contains_key(CONNECTION), headers.contains_key(UPGRADE));
            headers
                .get_all(UPGRADE)
                .iter()
                .map(|value| value.to_str().unwrap().to_owned())
                .collect()
        };
        let all: [Vec<String>; 2] = [upgrades("426 Upgrade Required"), upgrades("200 OK")];
        assert_eq!(all, [vec!["a".to_owned(), "b/1".to_owned()], vec![]]);
    }

    #[test]
    fn a_transfer_coding_overrides_a_content_length() {
        let head =
            parse("HTTP/1.1 200 OK\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n");
        let head = head.unwrap().unwrap();
        assert_eq!((head.body, head.keep_alive), (BodyDecoder::chunked(), false));
        assert!(!head.response.headers().contains_key(CONTENT_LENGTH));
    }

    #[test]
    fn only_a_complete_head_is_removed_from_the_input() {
        let text = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 X\r\nA: b\r\n\r\n\
                    HTTP/1.1 200 Fine\r\nX-A: 1\r\nx-a: 2\r\n\r\nbody";
        for end in 0..text.len() - "body".len() {
            let mut input = BytesMut::from(&text[..end]);
            assert!(parse_final_head(&mut input, false).unwrap().is_none(), "{end}");
        }
        let mut input = BytesMut::from(text);
        let head = parse_final_head(&mut input, false).unwrap().unwrap();
        assert_eq!(input, "body");
        let values: Vec<_> = head.response.headers().get_all("x-a").iter().collect();
        assert_eq!(values, ["1", "2"]);
        let reason = head.response.extensions().get::<ReasonPhrase>().unwrap();
        assert_eq!(reason.as_bytes(), b"Fine");
    }

    #[test]
    fn a_response_to_head_has_no_body() {
        let mut input = BytesMut::from("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n");
        let head = parse_final_head(&mut input, true).unwrap().unwrap();
        assert_eq!(head.body, BodyDecoder::Done);
        assert_eq!(head.response.headers()[CONTENT_LENGTH], "7");
    }
}
