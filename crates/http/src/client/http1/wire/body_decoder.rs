//! Decodes the body of a response according to its framing.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};
use httparse::Status;

use crate::client::http1::wire::ParseError;
use crate::client::http1::wire::space_before_colon::{
    may_precede_colon, remove_space_before_colons,
};
use crate::headers::is_allowed_trailer;

/// Maximum length of a chunk-size line with its extensions, and of all trailers.
const MAX_LINE_BYTES: usize = 16 << 10;
const MAX_TRAILERS: usize = 100;
/// Data up to this size is copied: to share the read buffer costs more, and keeps the whole buffer allocated.
const COPY_THRESHOLD_BYTES: usize = 4 << 10;

/// The decoder of a body, and its position in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::client) enum BodyDecoder {
    /// A body with the given number of bytes left, at least one.
    Length(u64),
    Chunked(ChunkState),
    /// The body ends with its connection.
    UntilClose,
    Done,
}

/// The position in a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::client) enum ChunkState {
    Size,
    /// In the data of a chunk, with the given number of bytes left, at least one.
    Data(u64),
    /// Before the line end that follows the data of a chunk.
    DataEnd,
    Trailers,
}

impl BodyDecoder {
    pub(in crate::client) fn length(length: u64) -> Self {
        if length == 0 { Self::Done } else { Self::Length(length) }
    }

    pub(in crate::client) fn chunked() -> Self {
        Self::Chunked(ChunkState::Size)
    }

    pub(in crate::client) fn is_done(&self) -> bool {
        *self == Self::Done
    }

    pub(in crate::client) fn size_hint(&self) -> SizeHint {
        match self {
            Self::Length(length) => SizeHint::with_exact(*length),
            Self::Done => SizeHint::with_exact(0),
            Self::Chunked(_) | Self::UntilClose => SizeHint::default(),
        }
    }

    /// Returns a lower bound of the number of bytes left.
    pub(in crate::client) fn remaining_hint(&self) -> u64 {
        match self {
            Self::Length(length) | Self::Chunked(ChunkState::Data(length)) => *length,
            Self::Chunked(_) | Self::UntilClose | Self::Done => 0,
        }
    }

    /// Returns the content at the front of `input`, at most one chunk. Only before the first `decode_frame`.
    pub(in crate::client) fn peek<'a>(&self, input: &'a [u8]) -> &'a [u8] {
        match self {
            Self::Done => &[],
            Self::Length(length) => {
                let length = usize::try_from(*length).unwrap_or(usize::MAX);
                &input[..input.len().min(length)]
            }
            Self::UntilClose => input,
            Self::Chunked(_) => match httparse::parse_chunk_size(input) {
                Ok(Status::Complete((start, length))) => {
                    let length = usize::try_from(length).unwrap_or(usize::MAX);
                    &input[start..input.len().min(start.saturating_add(length))]
                }
                _ => &[],
            },
        }
    }

    /// Checks the first chunk size, if received, so that an invalid body is detected before its head is forwarded.
    pub(in crate::client) fn check_first_chunk(&self, input: &[u8]) -> Result<(), ParseError> {
        match self {
            Self::Chunked(ChunkState::Size) if !input.is_empty() => {
                parse_chunk_size(input).map(|_| ())
            }
            _ => Ok(()),
        }
    }

    /// The connection has been closed. Returns whether the body is complete.
    pub(in crate::client) fn on_eof(&mut self) -> bool {
        if *self == Self::UntilClose {
            *self = Self::Done;
        }
        self.is_done()
    }

    /// Removes the next frame from the front of `input`; `None` while there is none, or when the body is complete.
    pub(in crate::client) fn decode_frame(
        &mut self,
        input: &mut BytesMut,
    ) -> Result<Option<Frame<Bytes>>, ParseError> {
        match self {
            Self::Done => Ok(None),
            Self::UntilClose => Ok(take_data(input, u64::MAX)),
            Self::Length(left) => {
                let frame = take_data(input, *left);
                *self = Self::length(*left - data_length(frame.as_ref()));
                Ok(frame)
            }
            Self::Chunked(chunk) => {
                let mut at = *chunk;
                let frame = self.decode_chunked(&mut at, input)?;
                if !self.is_done() {
                    *self = Self::Chunked(at);
                }
                Ok(frame)
            }
        }
    }

    /// Decodes up to the end of the first data, and also the end of the body if nothing else follows. The last data and
    /// the end of the body are then sent to the client together.
    fn decode_chunked(
        &mut self,
        at: &mut ChunkState,
        input: &mut BytesMut,
    ) -> Result<Option<Frame<Bytes>>, ParseError> {
        let mut frame = None;
        while !input.is_empty() {
            match *at {
                ChunkState::Data(_) if frame.is_some() => break,
                // Errors after the data are reported by the next call.
                ChunkState::Trailers if frame.is_some() && !input.starts_with(b"\r\n") => break,
                ChunkState::Data(left) => {
                    frame = take_data(input, left);
                    let left = left - data_length(frame.as_ref());
                    *at = if left == 0 { ChunkState::DataEnd } else { ChunkState::Data(left) };
                }
                ChunkState::Trailers => {
                    let Some(trailers) = take_trailers(input)? else { break };
                    *self = Self::Done;
                    let trailers = (!trailers.is_empty()).then(|| Frame::trailers(trailers));
                    return Ok(frame.or(trailers));
                }
                ChunkState::Size | ChunkState::DataEnd => match at.parse_line(input) {
                    Ok(Some(next)) => *at = next,
                    Ok(None) => break,
                    Err(_) if frame.is_some() => break,
                    Err(error) => return Err(error),
                },
            }
        }
        Ok(frame)
    }
}

impl ChunkState {
    /// Removes the next line, and returns the state after it.
    fn parse_line(self, input: &mut BytesMut) -> Result<Option<Self>, ParseError> {
        if self == Self::Size {
            return Ok(take_chunk_size(input)?.map(|size| match size {
                0 => Self::Trailers,
                size => Self::Data(size),
            }));
        }
        match &input[..] {
            [b'\r', b'\n', ..] => {
                input.advance(2);
                Ok(Some(Self::Size))
            }
            [b'\r'] => Ok(None),
            _ => Err(ParseError::Chunk),
        }
    }
}

fn data_length(frame: Option<&Frame<Bytes>>) -> u64 {
    frame.and_then(Frame::data_ref).map_or(0, |data| data.len() as u64)
}

/// Removes data of at most `limit` bytes.
fn take_data(input: &mut BytesMut, limit: u64) -> Option<Frame<Bytes>> {
    let length = input.len().min(usize::try_from(limit).unwrap_or(usize::MAX));
    if length == 0 {
        return None;
    }
    let data = if length <= COPY_THRESHOLD_BYTES || length <= input.capacity() / 4 {
        let data = Bytes::copy_from_slice(&input[..length]);
        input.advance(length);
        data
    } else if length == input.len() {
        std::mem::take(input).freeze()
    } else {
        input.split_to(length).freeze()
    };
    Some(Frame::data(data))
}

fn take_chunk_size(input: &mut BytesMut) -> Result<Option<u64>, ParseError> {
    Ok(parse_chunk_size(input)?.map(|(length, size)| {
        input.advance(length);
        size
    }))
}

/// Parses the chunk-size line at the front of `input`. Returns the length of the line and the size of the chunk; `None`
/// while the line is incomplete.
fn parse_chunk_size(input: &[u8]) -> Result<Option<(usize, u64)>, ParseError> {
    // httparse accepts an empty line as a size of zero.
    if !input[0].is_ascii_hexdigit() {
        return Err(ParseError::Chunk);
    }
    match httparse::parse_chunk_size(input) {
        Ok(Status::Complete((length, size)))
            if length <= MAX_LINE_BYTES && has_no_control_chars(&input[..length - 2]) =>
        {
            Ok(Some((length, size)))
        }
        Ok(Status::Partial) if input.len() <= MAX_LINE_BYTES => {
            let line = input.strip_suffix(b"\r").unwrap_or(input);
            if has_no_control_chars(line) { Ok(None) } else { Err(ParseError::Chunk) }
        }
        Ok(_) | Err(_) => Err(ParseError::Chunk),
    }
}

/// Returns whether a chunk-size line has no control characters. httparse accepts them in an extension, where another
/// recipient may accept a bare LF as the end of the line.
fn has_no_control_chars(line: &[u8]) -> bool {
    line.iter().all(|byte| *byte == b'\t' || !byte.is_ascii_control())
}

fn take_trailers(input: &mut BytesMut) -> Result<Option<HeaderMap>, ParseError> {
    if input.starts_with(b"\r\n") {
        input.advance(2);
        return Ok(Some(HeaderMap::new()));
    }
    let result = match parse_trailers(input) {
        Err(ParseError::Head(httparse::Error::HeaderName)) => {
            let lines = &input[..input.len().min(MAX_LINE_BYTES + 1)];
            if let Some(tight) = remove_space_before_colons(lines) {
                let rest = input.split_off(lines.len());
                input.clear();
                input.extend_from_slice(&tight);
                input.unsplit(rest);
            }
            parse_trailers(input)
        }
        result => result,
    };
    match result {
        Ok(Status::Complete((length, trailers))) if length <= MAX_LINE_BYTES => {
            input.advance(length);
            Ok(Some(trailers))
        }
        Ok(Status::Partial) if input.len() <= MAX_LINE_BYTES => Ok(None),
        Err(ParseError::Head(httparse::Error::HeaderName))
            if input.len() <= MAX_LINE_BYTES && may_precede_colon(input) =>
        {
            Ok(None)
        }
        Ok(_) | Err(_) => Err(ParseError::Trailers),
    }
}

fn parse_trailers(input: &[u8]) -> Result<Status<(usize, HeaderMap)>, ParseError> {
    let mut room = [httparse::EMPTY_HEADER; MAX_TRAILERS];
    let Status::Complete((length, lines)) = httparse::parse_headers(input, &mut room)? else {
        return Ok(Status::Partial);
    };
    let mut trailers = HeaderMap::new();
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes());
        let value = HeaderValue::from_bytes(line.value);
        let (Ok(name), Ok(value)) = (name, value) else { return Err(ParseError::Trailers) };
        if is_allowed_trailer(&name) {
            trailers.append(name, value);
        }
    }
    Ok(Status::Complete((length, trailers)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `text` in pieces of `size` bytes. Returns the data, the trailers and the rest.
    fn decode(
        mut decoder: BodyDecoder,
        text: &[u8],
        size: usize,
    ) -> (Vec<u8>, Option<HeaderMap>, Vec<u8>) {
        let (mut input, mut data, mut trailers) = (BytesMut::new(), Vec::new(), None);
        for piece in text.chunks(size) {
            input.extend_from_slice(piece);
            while let Some(frame) = decoder.decode_frame(&mut input).unwrap() {
                match frame.into_data() {
                    Ok(piece) => data.extend_from_slice(&piece),
                    Err(frame) => trailers = frame.into_trailers().ok(),
                }
            }
        }
        assert!(decoder.is_done(), "not done");
        (data, trailers, input.to_vec())
    }

    #[test]
    fn a_body_of_known_length_ends_there() {
        for size in 1..8 {
            let (data, _, left) = decode(BodyDecoder::length(5), b"12345HTTP", size);
            assert_eq!((&data[..], &left[..]), (&b"12345"[..], &b"HTTP"[..]));
        }
        assert!(BodyDecoder::length(0).is_done());
    }

    #[test]
    fn chunks_are_decoded_however_they_are_split() {
        let text =
            b"4\r\nWiki\r\n6;ext=\"a\"\r\npedia \r\n0E\r\nin \r\n\r\nchunks.\r\n0\r\n\r\nHTTP";
        for size in 1..text.len() {
            let (data, trailers, left) = decode(BodyDecoder::chunked(), text, size);
            assert_eq!(data, b"Wikipedia in \r\n\r\nchunks.");
            assert_eq!((trailers, &left[..]), (None, &b"HTTP"[..]));
        }
    }

    #[test]
    fn whitespace_before_the_colon_of_a_trailer_is_removed() {
        let text = b"0\r\nX-One : 1\r\nX-Two\t : 2 : 3\r\n\r\nX : 4";
        for size in 1..text.len() {
            let (_, trailers, left) = decode(BodyDecoder::chunked(), text, size);
            let trailers = trailers.unwrap();
            assert_eq!([&trailers["x-one"], &trailers["x-two"]], ["1", "2 : 3"]);
            assert_eq!(left, b"X : 4");
        }
    }

    #[test]
    fn trailers_after_the_last_chunk_are_decoded() {
        let text =
            b"1\r\na\r\n000\r\nX-Checksum: 42\r\nContent-Length: 3\r\nx-checksum \t: 43\r\n\r\n";
        for size in 1..text.len() {
            let (data, trailers, left) = decode(BodyDecoder::chunked(), text, size);
            let trailers = trailers.unwrap();
            assert_eq!((&data[..], left.len(), trailers.len()), (&b"a"[..], 0, 2));
            assert_eq!(trailers.get_all("x-checksum").iter().collect::<Vec<_>>(), ["42", "43"]);
        }
    }

    #[test]
    fn the_end_is_decoded_together_with_the_last_data() {
        let mut input = BytesMut::from("4\r\ndata\r\n0\r\n\r\n");
        let mut decoder = BodyDecoder::chunked();
        let frame = decoder.decode_frame(&mut input).unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "data");
        assert!(decoder.is_done());
    }

    #[test]
    fn invalid_chunks_and_trailers_are_refused() {
        let refused = |text: &str| {
            let mut decoder = BodyDecoder::chunked();
            let mut input = BytesMut::from(text);
            loop {
                match decoder.decode_frame(&mut input) {
                    Ok(Some(_)) => {}
                    Ok(None) => return false,
                    Err(_) => return true,
                }
            }
        };
        for text in [
            "\r\n",
            "x\r\n",
            "-1\r\n",
            "+1\r\na",
            "1 2\r\n",
            "1\nb",
            "1;a\nb",
            "1;a\nb\r\na\r\n",
            "1;a\0b",
            "1;\"\x7f\"\r\na\r\n",
            "1;a\r\r\n",
            "11111111111111111\r\n",
            "1\r\nab\r\n",
            "1\r\na\n0\r\n",
            "0\r\nno colon\r\n\r\n",
        ] {
            assert!(refused(text), "{text:?}");
        }
        assert!(refused(&format!("1;{}", "x".repeat(MAX_LINE_BYTES))));
        assert!(refused(&format!("0\r\na: {}", "x".repeat(MAX_LINE_BYTES))));
        assert!(!refused("ffffffffffffffff\r\na"));
    }

    #[test]
    fn peek_returns_only_received_content() {
        let check = |decoder: BodyDecoder, input: &'static [u8], expect: &[u8]| {
            assert_eq!(decoder.peek(input), expect, "{decoder:?}");
        };
        check(BodyDecoder::length(4), b"datamore", b"data");
        check(BodyDecoder::length(u64::MAX), b"data", b"data");
        check(BodyDecoder::chunked(), b"4;x=y\r\ndata\r\n0\r\n\r\n", b"data");
        check(BodyDecoder::chunked(), b"ffff\r\ndata", b"data");
        check(BodyDecoder::UntilClose, b"data", b"data");
        for nothing in [&b""[..], b"4", b"4\r\n", b"x\r\n", b"0\r\n\r\n"] {
            check(BodyDecoder::chunked(), nothing, b"");
        }
        check(BodyDecoder::Done, b"data", b"");
    }

    #[test]
    fn a_body_without_a_length_ends_with_its_connection() {
        let mut input = BytesMut::from("all of it");
        let mut decoder = BodyDecoder::UntilClose;
        assert!(decoder.decode_frame(&mut input).unwrap().is_some());
        assert!(decoder.on_eof() && decoder.is_done());
        assert!(!BodyDecoder::Length(1).on_eof());
        assert!(!BodyDecoder::chunked().on_eof());
    }

    #[test]
    fn large_data_is_not_copied() {
        let mut input = BytesMut::with_capacity(1 << 16);
        input.resize(1 << 16, b'x');
        let start = input.as_ptr();
        let frame = BodyDecoder::length(1 << 16).decode_frame(&mut input).unwrap().unwrap();
        assert_eq!(frame.data_ref().unwrap().as_ptr(), start);
    }
}
