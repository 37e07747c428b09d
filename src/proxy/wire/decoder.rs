//! The body of an answer, taken out of its frame.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};
use httparse::Status;

use crate::proxy::headers::may_trail;
use crate::proxy::wire::Malformed;
use crate::proxy::wire::spaces::{may_be_before_colon, without_spaces};

/// The longest line with a chunk's size, extensions included, and the longest trailers.
const MAX_LINES: usize = 16 << 10;
const MAX_TRAILERS: usize = 100;
/// Pieces of up to this size are copied: to share a buffer costs more, and keeps all of it.
const SMALL: usize = 4 << 10;

/// Where in a body we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum Decoder {
    /// So many bytes are to come, at least one.
    Length(u64),
    Chunked(Chunk),
    /// The body ends with its connection.
    UntilClose,
    Done,
}

/// Where in a chunked body we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum Chunk {
    Size,
    /// So many bytes of it are to come, at least one.
    Data(u64),
    /// The end of the line behind its data.
    End,
    Trailers,
}

impl Decoder {
    pub(in crate::proxy) fn length(length: u64) -> Self {
        if length == 0 { Self::Done } else { Self::Length(length) }
    }

    pub(in crate::proxy) fn chunked() -> Self {
        Self::Chunked(Chunk::Size)
    }

    pub(in crate::proxy) fn is_done(&self) -> bool {
        *self == Self::Done
    }

    pub(in crate::proxy) fn size_hint(&self) -> SizeHint {
        match self {
            Self::Length(length) => SizeHint::with_exact(*length),
            Self::Done => SizeHint::with_exact(0),
            Self::Chunked(_) | Self::UntilClose => SizeHint::default(),
        }
    }

    /// How many more bytes belong to this body for certain.
    pub(in crate::proxy) fn expects(&self) -> u64 {
        match self {
            Self::Length(length) | Self::Chunked(Chunk::Data(length)) => *length,
            Self::Chunked(_) | Self::UntilClose | Self::Done => 0,
        }
    }

    /// The content at the front of `input`, before any of it has been taken; no more of it than one chunk.
    pub(in crate::proxy) fn beginning<'a>(&self, input: &'a [u8]) -> &'a [u8] {
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

    /// Checks what has come of the body before any of it is taken: one that cannot be read is known before its head is
    /// passed on.
    pub(in crate::proxy) fn check_beginning(&self, input: &[u8]) -> Result<(), Malformed> {
        match self {
            Self::Chunked(Chunk::Size) if !input.is_empty() => parse_size(input).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// The connection has been closed. Whether the body is whole.
    pub(in crate::proxy) fn close(&mut self) -> bool {
        if *self == Self::UntilClose {
            *self = Self::Done;
        }
        self.is_done()
    }

    /// Takes the next frame from the front of `input`; `None` while there is none, or when the body is done.
    pub(in crate::proxy) fn take_frame(
        &mut self,
        input: &mut BytesMut,
    ) -> Result<Option<Frame<Bytes>>, Malformed> {
        match self {
            Self::Done => Ok(None),
            Self::UntilClose => Ok(take(input, u64::MAX)),
            Self::Length(left) => {
                let frame = take(input, *left);
                *self = Self::length(*left - length_of(frame.as_ref()));
                Ok(frame)
            }
            Self::Chunked(chunk) => {
                let mut at = *chunk;
                let frame = self.take_chunked(&mut at, input)?;
                if !self.is_done() {
                    *self = Self::Chunked(at);
                }
                Ok(frame)
            }
        }
    }

    /// Goes on to the end of the first data, and over the end of the body if that is all that follows: so the last
    /// data and the end go out together.
    fn take_chunked(
        &mut self,
        at: &mut Chunk,
        input: &mut BytesMut,
    ) -> Result<Option<Frame<Bytes>>, Malformed> {
        let mut frame = None;
        while !input.is_empty() {
            match *at {
                Chunk::Data(_) if frame.is_some() => break,
                // What is wrong behind the data is found again when it is their turn.
                Chunk::Trailers if frame.is_some() && !input.starts_with(b"\r\n") => break,
                Chunk::Data(left) => {
                    frame = take(input, left);
                    let left = left - length_of(frame.as_ref());
                    *at = if left == 0 { Chunk::End } else { Chunk::Data(left) };
                }
                Chunk::Trailers => {
                    let Some(trailers) = take_trailers(input)? else { break };
                    *self = Self::Done;
                    let trailers = (!trailers.is_empty()).then(|| Frame::trailers(trailers));
                    return Ok(frame.or(trailers));
                }
                Chunk::Size | Chunk::End => match at.take_line(input) {
                    Ok(Some(next)) => *at = next,
                    Ok(None) => break,
                    Err(_) if frame.is_some() => break,
                    Err(malformed) => return Err(malformed),
                },
            }
        }
        Ok(frame)
    }
}

impl Chunk {
    /// Takes the line that is next, and says what follows it.
    fn take_line(self, input: &mut BytesMut) -> Result<Option<Self>, Malformed> {
        if self == Self::Size {
            return Ok(take_size(input)?.map(|size| match size {
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
            _ => Err(Malformed::Chunk),
        }
    }
}

fn length_of(frame: Option<&Frame<Bytes>>) -> u64 {
    frame.and_then(Frame::data_ref).map_or(0, |data| data.len() as u64)
}

/// Takes data of at most `most` bytes.
fn take(input: &mut BytesMut, most: u64) -> Option<Frame<Bytes>> {
    let length = input.len().min(usize::try_from(most).unwrap_or(usize::MAX));
    if length == 0 {
        return None;
    }
    let data = if length <= SMALL || length <= input.capacity() / 4 {
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

fn take_size(input: &mut BytesMut) -> Result<Option<u64>, Malformed> {
    Ok(parse_size(input)?.map(|(length, size)| {
        input.advance(length);
        size
    }))
}

/// The line with a chunk's size at the front of `input`: its length, and the size. `None` while it is not there.
fn parse_size(input: &[u8]) -> Result<Option<(usize, u64)>, Malformed> {
    // httparse takes an empty line for a size of zero.
    if !input[0].is_ascii_hexdigit() {
        return Err(Malformed::Chunk);
    }
    match httparse::parse_chunk_size(input) {
        Ok(Status::Complete((length, size)))
            if length <= MAX_LINES && is_plain(&input[..length - 2]) =>
        {
            Ok(Some((length, size)))
        }
        Ok(Status::Partial) if input.len() <= MAX_LINES => {
            let line = input.strip_suffix(b"\r").unwrap_or(input);
            if is_plain(line) { Ok(None) } else { Err(Malformed::Chunk) }
        }
        Ok(_) | Err(_) => Err(Malformed::Chunk),
    }
}

/// Whether a line with a chunk's size has no control characters. httparse takes any in an extension, and others may
/// take a bare LF there for the end of the line.
fn is_plain(line: &[u8]) -> bool {
    line.iter().all(|byte| *byte == b'\t' || !byte.is_ascii_control())
}

fn take_trailers(input: &mut BytesMut) -> Result<Option<HeaderMap>, Malformed> {
    if input.starts_with(b"\r\n") {
        input.advance(2);
        return Ok(Some(HeaderMap::new()));
    }
    let result = match parse_trailers(input) {
        Err(Malformed::Head(httparse::Error::HeaderName)) => {
            let lines = &input[..input.len().min(MAX_LINES + 1)];
            if let Some(tight) = without_spaces(lines) {
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
        Ok(Status::Complete((length, trailers))) if length <= MAX_LINES => {
            input.advance(length);
            Ok(Some(trailers))
        }
        Ok(Status::Partial) if input.len() <= MAX_LINES => Ok(None),
        Err(Malformed::Head(httparse::Error::HeaderName))
            if input.len() <= MAX_LINES && may_be_before_colon(input) =>
        {
            Ok(None)
        }
        Ok(_) | Err(_) => Err(Malformed::Trailers),
    }
}

fn parse_trailers(input: &[u8]) -> Result<Status<(usize, HeaderMap)>, Malformed> {
    let mut room = [httparse::EMPTY_HEADER; MAX_TRAILERS];
    let Status::Complete((length, lines)) = httparse::parse_headers(input, &mut room)? else {
        return Ok(Status::Partial);
    };
    let mut trailers = HeaderMap::new();
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes());
        let value = HeaderValue::from_bytes(line.value);
        let (Ok(name), Ok(value)) = (name, value) else { return Err(Malformed::Trailers) };
        if may_trail(&name) {
            trailers.append(name, value);
        }
    }
    Ok(Status::Complete((length, trailers)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `text` in pieces of `size`; returns the data, the trailers and what is left.
    fn decode(
        mut decoder: Decoder,
        text: &[u8],
        size: usize,
    ) -> (Vec<u8>, Option<HeaderMap>, Vec<u8>) {
        let (mut input, mut data, mut trailers) = (BytesMut::new(), Vec::new(), None);
        for piece in text.chunks(size) {
            input.extend_from_slice(piece);
            while let Some(frame) = decoder.take_frame(&mut input).unwrap() {
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
            let (data, _, left) = decode(Decoder::length(5), b"12345HTTP", size);
            assert_eq!((&data[..], &left[..]), (&b"12345"[..], &b"HTTP"[..]));
        }
        assert!(Decoder::length(0).is_done());
    }

    #[test]
    fn chunks_are_taken_apart_however_they_come() {
        let text =
            b"4\r\nWiki\r\n6;ext=\"a\"\r\npedia \r\n0E\r\nin \r\n\r\nchunks.\r\n0\r\n\r\nHTTP";
        for size in 1..text.len() {
            let (data, trailers, left) = decode(Decoder::chunked(), text, size);
            assert_eq!(data, b"Wikipedia in \r\n\r\nchunks.");
            assert_eq!((trailers, &left[..]), (None, &b"HTTP"[..]));
        }
    }

    #[test]
    fn whitespace_before_the_colon_of_a_trailer_is_removed() {
        let text = b"0\r\nX-One : 1\r\nX-Two\t : 2 : 3\r\n\r\nX : 4";
        for size in 1..text.len() {
            let (_, trailers, left) = decode(Decoder::chunked(), text, size);
            let trailers = trailers.unwrap();
            assert_eq!([&trailers["x-one"], &trailers["x-two"]], ["1", "2 : 3"]);
            assert_eq!(left, b"X : 4");
        }
    }

    #[test]
    fn trailers_follow_the_last_chunk() {
        let text =
            b"1\r\na\r\n000\r\nX-Checksum: 42\r\nContent-Length: 3\r\nx-checksum \t: 43\r\n\r\n";
        for size in 1..text.len() {
            let (data, trailers, left) = decode(Decoder::chunked(), text, size);
            let trailers = trailers.unwrap();
            assert_eq!((&data[..], left.len(), trailers.len()), (&b"a"[..], 0, 2));
            assert_eq!(trailers.get_all("x-checksum").iter().collect::<Vec<_>>(), ["42", "43"]);
        }
    }

    #[test]
    fn the_end_comes_along_with_the_last_data() {
        let mut input = BytesMut::from("4\r\ndata\r\n0\r\n\r\n");
        let mut decoder = Decoder::chunked();
        let frame = decoder.take_frame(&mut input).unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "data");
        assert!(decoder.is_done());
    }

    #[test]
    fn nonsense_is_refused() {
        let refused = |text: &str| {
            let mut decoder = Decoder::chunked();
            let mut input = BytesMut::from(text);
            loop {
                match decoder.take_frame(&mut input) {
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
        assert!(refused(&format!("1;{}", "x".repeat(MAX_LINES))));
        assert!(refused(&format!("0\r\na: {}", "x".repeat(MAX_LINES))));
        assert!(!refused("ffffffffffffffff\r\na"));
    }

    #[test]
    fn the_beginning_is_what_came_of_the_content_and_no_more() {
        let check = |decoder: Decoder, input: &'static [u8], expect: &[u8]| {
            assert_eq!(decoder.beginning(input), expect, "{decoder:?}");
        };
        check(Decoder::length(4), b"datamore", b"data");
        check(Decoder::length(u64::MAX), b"data", b"data");
        check(Decoder::chunked(), b"4;x=y\r\ndata\r\n0\r\n\r\n", b"data");
        check(Decoder::chunked(), b"ffff\r\ndata", b"data");
        check(Decoder::UntilClose, b"data", b"data");
        for nothing in [&b""[..], b"4", b"4\r\n", b"x\r\n", b"0\r\n\r\n"] {
            check(Decoder::chunked(), nothing, b"");
        }
        check(Decoder::Done, b"data", b"");
    }

    #[test]
    fn a_body_without_a_length_ends_with_its_connection() {
        let mut input = BytesMut::from("all of it");
        let mut decoder = Decoder::UntilClose;
        assert!(decoder.take_frame(&mut input).unwrap().is_some());
        assert!(decoder.close() && decoder.is_done());
        assert!(!Decoder::Length(1).close());
        assert!(!Decoder::chunked().close());
    }

    #[test]
    fn a_large_piece_is_not_copied() {
        let mut input = BytesMut::with_capacity(1 << 16);
        input.resize(1 << 16, b'x');
        let start = input.as_ptr();
        let frame = Decoder::length(1 << 16).take_frame(&mut input).unwrap().unwrap();
        assert_eq!(frame.data_ref().unwrap().as_ptr(), start);
    }
}
