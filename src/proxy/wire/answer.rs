//! The head of an answer.

use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use httparse::Status;
use hyper::ext::ReasonPhrase;

use crate::proxy::codings::is_chunked;
use crate::proxy::headers::{Kind, announce_upgrade, named_by_connection, take_named};
use crate::proxy::wire::Malformed;
use crate::proxy::wire::decoder::Decoder;
use crate::proxy::wire::spaces::{may_be_before_colon, without_spaces};

/// The most headers of an answer.
const MAX_HEADERS: usize = 100;
/// The largest head of an answer.
pub(in crate::proxy) const MAX_HEAD: usize = 1 << 20;

/// The head of an answer, and what follows from it.
#[derive(Debug)]
pub(in crate::proxy) struct Head {
    pub(in crate::proxy) answer: Response<()>,
    pub(in crate::proxy) body: Decoder,
    /// The connection can carry another request when this answer has ended.
    pub(in crate::proxy) keep_alive: bool,
}

impl Head {
    /// Whether it is that of an interim response, which another follows.
    pub(in crate::proxy) fn is_interim(&self) -> bool {
        let status = self.answer.status();
        status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
    }
}

/// Takes the head of a response (`to_head`: to HEAD) from the front of `input`; `None` while it is not there as a whole.
pub(in crate::proxy) fn take_head(
    input: &mut BytesMut,
    to_head: bool,
) -> Result<Option<Head>, Malformed> {
    if input.is_empty() {
        return Ok(None);
    }
    let config = httparse::ParserConfig::default();
    loop {
        let mut room = [const { MaybeUninit::uninit() }; MAX_HEADERS];
        let mut parsed = httparse::Response::new(&mut []);
        match config.parse_response_with_uninit_headers(&mut parsed, input, &mut room) {
            Ok(Status::Complete(length)) if length <= MAX_HEAD => {
                let head = assemble(&parsed, &input[..length], to_head)?;
                input.advance(length);
                return Ok(Some(head));
            }
            Ok(Status::Complete(_)) => return Err(Malformed::TooLarge),
            Ok(Status::Partial) => return Ok(None),
            Err(httparse::Error::HeaderName) if remove_spaces(input) => {}
            Err(httparse::Error::HeaderName) if may_be_before_colon(fields(input)) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes whitespace before colons from the head at the front of `input`. Whether there was any.
#[cold]
fn remove_spaces(input: &mut BytesMut) -> bool {
    let fields = fields(input);
    let start = input.len() - fields.len();
    let Some(fields) = without_spaces(fields) else { return false };
    input.truncate(start);
    input.extend_from_slice(&fields);
    true
}

/// What follows the first line of `input`. Empty lines may precede it.
fn fields(input: &[u8]) -> &[u8] {
    let start = input.iter().position(|byte| !b"\r\n".contains(byte)).unwrap_or(input.len());
    let line = &input[start..];
    &line[memchr::memchr(b'\n', line).map_or(line.len(), |at| at + 1)..]
}

/// Takes the final head; those of interim responses are skipped.
#[cfg(any(test, fuzzing))]
pub(in crate::proxy) fn take_final(
    input: &mut BytesMut,
    to_head: bool,
) -> Result<Option<Head>, Malformed> {
    while let Some(head) = take_head(input, to_head)? {
        if !head.is_interim() {
            return Ok(Some(head));
        }
    }
    Ok(None)
}

fn assemble(
    parsed: &httparse::Response<'_, '_>,
    text: &[u8],
    to_head: bool,
) -> Result<Head, Malformed> {
    let mut answer = Response::new(());
    let status =
        parsed.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(Malformed::Status)?;
    *answer.status_mut() = status;
    keep_reason(&mut answer, parsed.reason.unwrap_or_default());
    // One copy that all values share, so that the buffer is free for what comes next.
    let shared = Bytes::copy_from_slice(text);
    let mut says = Says::default();
    let headers = answer.headers_mut();
    // Some more are added on the way.
    headers.reserve(parsed.headers.len() + 4);
    for header in &*parsed.headers {
        let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| Malformed::Header)?;
        let start = header.value.as_ptr().addr() - text.as_ptr().addr();
        let value = shared.slice(start..start + header.value.len());
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| Malformed::Header)?;
        if let Some(value) = says.take(Kind::of(&name), value) {
            headers.append(name, value);
        }
    }
    let is_1_0 = parsed.version == Some(0);
    let bodiless = status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || to_head;
    let length = says.length()?;
    let body = says.framing(length, bodiless, is_1_0)?;
    let switches = status == StatusCode::SWITCHING_PROTOCOLS;
    let keep_alive = says.keeps_alive(is_1_0) && body != Decoder::UntilClose && !switches;
    says.settle(headers, length, status);
    Ok(Head { answer, body, keep_alive })
}

/// Keeps a reason phrase that is not the usual one.
fn keep_reason(answer: &mut Response<()>, reason: &str) {
    if Some(reason) != answer.status().canonical_reason()
        && let Ok(reason) = ReasonPhrase::try_from(reason.as_bytes())
    {
        answer.extensions_mut().insert(reason);
    }
}

/// What the head of an answer says of its connection and its body's frame: no matter of the caller's.
///
/// Most responses have one Content-Length and none of the others, and need no memory for it.
#[derive(Default)]
struct Says {
    /// The first one.
    length: Option<HeaderValue>,
    others: Vec<(Kind, HeaderValue)>,
}

impl Says {
    /// Takes a header in; gives back one that is for the caller.
    fn take(&mut self, kind: Kind, value: HeaderValue) -> Option<HeaderValue> {
        match kind {
            Kind::ContentLength if self.length.is_none() => self.length = Some(value),
            Kind::Connection | Kind::Upgrade | Kind::TransferEncoding | Kind::ContentLength => {
                self.others.push((kind, value));
            }
            kind if kind.is_hop_by_hop() => {}
            _ => return Some(value),
        }
        None
    }

    /// All of one kind; of Content-Length, those behind the first.
    fn all(&self, kind: Kind) -> impl Iterator<Item = &HeaderValue> {
        self.others.iter().filter(move |(of, _)| *of == kind).map(|(_, value)| value)
    }

    fn has(&self, kind: Kind) -> bool {
        self.all(kind).next().is_some()
    }

    /// How the body is framed (RFC 9112, 6.3).
    fn framing(
        &self,
        length: Option<u64>,
        bodiless: bool,
        is_1_0: bool,
    ) -> Result<Decoder, Malformed> {
        if is_chunked(self.all(Kind::TransferEncoding))? {
            // HTTP/1.0 has no transfer codings, so the sender may mean something else.
            return match (is_1_0, bodiless) {
                (true, _) => Err(Malformed::VersionWithCoding),
                (false, true) => Ok(Decoder::Done),
                (false, false) => Ok(Decoder::chunked()),
            };
        }
        Ok(match length {
            _ if bodiless => Decoder::Done,
            Some(length) => Decoder::length(length),
            None => Decoder::UntilClose,
        })
    }

    /// The one length that all headers agree on. One beside a coding counts for nothing.
    fn length(&self) -> Result<Option<u64>, Malformed> {
        let mut length = None;
        if self.has(Kind::TransferEncoding) {
            return Ok(length);
        }
        for value in self.length.iter().chain(self.all(Kind::ContentLength)) {
            for text in value.as_bytes().split(|byte| *byte == b',') {
                let number = parse_length(text.trim_ascii()).ok_or(Malformed::Length)?;
                if length.is_some_and(|length| length != number) {
                    return Err(Malformed::Length);
                }
                length = Some(number);
            }
        }
        Ok(length)
    }

    /// Whether the peer goes on after this answer.
    fn keeps_alive(&self, is_1_0: bool) -> bool {
        let says = |what: &str| {
            self.all(Kind::Connection).any(|value| {
                let mut options = value.as_bytes().split(|byte| *byte == b',');
                options.any(|option| option.trim_ascii().eq_ignore_ascii_case(what.as_bytes()))
            })
        };
        // A peer that gives both may mean another end than the one that is seen here (RFC 9112, 6.3).
        let ambiguous = self.length.is_some() && self.has(Kind::TransferEncoding);
        !ambiguous && !says("close") && (!is_1_0 || says("keep-alive"))
    }

    /// Puts right what the caller is to know of all this, and takes out what it is not.
    fn settle(mut self, headers: &mut HeaderMap, length: Option<u64>, status: StatusCode) {
        let named = named_by_connection(self.all(Kind::Connection));
        take_named(headers, &named);
        if let (Some(length), Some(first)) = (length, self.length.take()) {
            let is_plain = !self.has(Kind::ContentLength) && !first.as_bytes().contains(&b',');
            let value = if is_plain { first } else { length.into() };
            headers.insert(CONTENT_LENGTH, value);
        }
        match status {
            StatusCode::SWITCHING_PROTOCOLS if named.contains(&UPGRADE) => {
                if let Some(upgrade) = self.all(Kind::Upgrade).last() {
                    announce_upgrade(headers, upgrade);
                }
            }
            // The protocols that are required are what the response is about (RFC 9110, 15.5.22).
            StatusCode::UPGRADE_REQUIRED if self.has(Kind::Upgrade) => {
                headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
                for upgrade in self.all(Kind::Upgrade) {
                    headers.append(UPGRADE, upgrade.clone());
                }
            }
            _ => {}
        }
    }
}

fn parse_length(text: &[u8]) -> Option<u64> {
    // `parse` would take a sign.
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::codings::CodingError;

    fn take(text: &str) -> Result<Option<Head>, Malformed> {
        take_final(&mut BytesMut::from(text), false)
    }

    #[track_caller]
    fn check(text: &str, body: Decoder, keep_alive: bool) {
        let head = take(text).unwrap().unwrap();
        assert_eq!((&head.body, head.keep_alive), (&body, keep_alive), "{text}");
    }

    #[track_caller]
    fn refuses(text: &str, expect: Malformed) {
        assert_eq!(take(text).unwrap_err(), expect, "{text}");
    }

    #[test]
    fn a_body_ends_where_its_head_says() {
        check("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", Decoder::length(7), true);
        check("HTTP/1.1 200 OK\r\nContent-Length: 7, 7\r\n\r\n", Decoder::length(7), true);
        check("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n", Decoder::chunked(), true);
        check("HTTP/1.1 200 OK\r\n\r\n", Decoder::UntilClose, false);
        check("HTTP/1.1 204 No\r\nContent-Length: 7\r\n\r\n", Decoder::Done, true);
        check("HTTP/1.1 304 No\r\n\r\n", Decoder::Done, true);
        check("HTTP/1.1 101 Go\r\n\r\n", Decoder::Done, false);
    }

    #[test]
    fn a_peer_says_whether_it_goes_on() {
        let sized = |version: &str, connection: &str| {
            format!("HTTP/{version} 200 OK\r\nContent-Length: 7\r\n{connection}\r\n")
        };
        check(&sized("1.0", ""), Decoder::length(7), false);
        check(&sized("1.0", "Connection: Keep-Alive\r\n"), Decoder::length(7), true);
        check(&sized("1.1", "Connection: x, Close\r\n"), Decoder::length(7), false);
        check(&sized("1.1", "Connection: close\r\nConnection: x\r\n"), Decoder::length(7), false);
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        refuses("HTTP/1.1 200 OK\r\nContent-Length: 7, 8\r\n\r\n", Malformed::Length);
        refuses(
            "HTTP/1.1 200 OK\r\nContent-Length: 7\r\nContent-Length: 8\r\n\r\n",
            Malformed::Length,
        );
        refuses("HTTP/1.1 200 OK\r\nContent-Length: +7\r\n\r\n", Malformed::Length);
        refuses("HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n", Malformed::Length);
        refuses(
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
            Malformed::Length,
        );
        for (coding, expect) in [
            ("gzip, chunked", CodingError::Unsupported),
            ("identity", CodingError::NotChunked),
            ("chunked, chunked", CodingError::ChunkedTwice),
            ("xchunked", CodingError::NotChunked),
            ("chunked\r\nTransfer-Encoding: chunked", CodingError::ChunkedTwice),
        ] {
            let head = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\n");
            refuses(&head, Malformed::TransferEncoding(expect));
        }
        refuses(
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            Malformed::VersionWithCoding,
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
                head = head.or_else(|| take_final(&mut input, false).unwrap());
            }
            let head = head.unwrap();
            assert_eq!(
                (&head.answer.headers()["a"], head.body),
                (&"b : c".parse().unwrap(), Decoder::chunked())
            );
            assert_eq!(&input[..], b"D : e");
        }
        for text in ["A b: c", " : b", "A \x01: b", ": b"] {
            refuses(
                &format!("HTTP/1.1 200 OK\r\nC : d\r\n{text}\r\n\r\nbody "),
                Malformed::Head(httparse::Error::HeaderName),
            );
        }
    }

    #[test]
    fn a_head_of_a_mebibyte_is_taken_and_a_larger_one_is_not() {
        for (more, expect) in [(0, None), (1, Some(Malformed::TooLarge))] {
            let frame = "HTTP/1.1 200 OK\r\nA: \r\n\r\n".len();
            let value = "x".repeat(MAX_HEAD - frame + more);
            let taken = take(&format!("HTTP/1.1 200 OK\r\nA: {value}\r\n\r\n"));
            assert_eq!(taken.err(), expect);
        }
    }

    #[test]
    fn a_426_says_which_protocols_are_required() {
        let upgrades = |status: &str| {
            let lines =
                "Connection: Upgrade\r\nUpgrade: a\r\nUpgrade: b/1\r\nContent-Length: 0\r\n";
            let head = take(&format!("HTTP/1.1 {status}\r\n{lines}\r\n")).unwrap().unwrap();
            let headers = head.answer.headers();
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
    fn chunks_outrank_a_length() {
        let head =
            take("HTTP/1.1 200 OK\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n");
        let head = head.unwrap().unwrap();
        assert_eq!((head.body, head.keep_alive), (Decoder::chunked(), false));
        assert!(!head.answer.headers().contains_key(CONTENT_LENGTH));
    }

    #[test]
    fn a_head_is_taken_whole_however_it_comes_and_what_follows_stays() {
        let text = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 X\r\nA: b\r\n\r\n\
                    HTTP/1.1 200 Fine\r\nX-A: 1\r\nx-a: 2\r\n\r\nbody";
        for end in 0..text.len() - "body".len() {
            let mut input = BytesMut::from(&text[..end]);
            assert!(take_final(&mut input, false).unwrap().is_none(), "{end}");
        }
        let mut input = BytesMut::from(text);
        let head = take_final(&mut input, false).unwrap().unwrap();
        assert_eq!(input, "body");
        let values: Vec<_> = head.answer.headers().get_all("x-a").iter().collect();
        assert_eq!(values, ["1", "2"]);
        let reason = head.answer.extensions().get::<ReasonPhrase>().unwrap();
        assert_eq!(reason.as_bytes(), b"Fine");
    }

    #[test]
    fn an_answer_to_head_has_no_body() {
        let mut input = BytesMut::from("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n");
        let head = take_final(&mut input, true).unwrap().unwrap();
        assert_eq!(head.body, Decoder::Done);
        assert_eq!(head.answer.headers()[CONTENT_LENGTH], "7");
    }
}
