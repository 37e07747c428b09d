//! Transfer codings in `Transfer-Encoding` (RFC 9112, 6.1 and 6.3), with one rule for requests and responses. No I/O.

use http::HeaderValue;

/// Why a message with given transfer codings is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodingError {
    #[error("the final transfer coding is not chunked, so the end of the body is unknown")]
    NotChunked,
    #[error("the transfer coding chunked is applied twice")]
    ChunkedTwice,
    #[error("the only transfer coding that is supported is chunked")]
    Unsupported,
}

/// Returns whether the body is chunked. The values of all header lines form one list; empty elements are ignored.
///
/// # Errors
/// When the list is not empty and anything other than `chunked`: the message must be refused. A coding that is removed
/// from the header but not decoded would reach the other side as content.
pub fn is_chunked<'a>(
    lines: impl IntoIterator<Item = &'a HeaderValue>,
) -> Result<bool, CodingError> {
    let (mut lines, mut codings, mut chunked, mut last_is_chunked) =
        (lines.into_iter(), 0, 0, false);
    let Some(first) = lines.next() else { return Ok(false) };
    let elements = std::iter::once(first)
        .chain(lines)
        .flat_map(|line| line.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii));
    for coding in elements.filter(|element| !element.is_empty()) {
        last_is_chunked = coding.eq_ignore_ascii_case(b"chunked");
        codings += 1;
        chunked += usize::from(last_is_chunked);
    }
    match (last_is_chunked, chunked, codings) {
        (false, ..) => Err(CodingError::NotChunked),
        (true, 1, 1) => Ok(true),
        (true, 1, _) => Err(CodingError::Unsupported),
        (true, ..) => Err(CodingError::ChunkedTwice),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(lines: &[&'static str], expect: Result<bool, CodingError>) {
        let lines: Vec<_> = lines.iter().map(|line| HeaderValue::from_static(line)).collect();
        assert_eq!(is_chunked(&lines), expect, "{lines:?}");
    }

    #[test]
    fn chunked_alone_is_accepted() {
        check(&[], Ok(false));
        for lines in
            [&["chunked"][..], &["Chunked"], &["\tchunked "], &[", ,chunked"], &["", "chunked"]]
        {
            check(lines, Ok(true));
        }
    }

    #[test]
    fn a_final_coding_other_than_chunked_is_refused() {
        for lines in [
            &[""][..],
            &[","],
            &["gzip"],
            &["identity"],
            &["chunked, gzip"],
            &["chunked", "gzip"],
            &["chunked;q=1"],
            &["\"chunked\""],
            &["xchunked"],
            &["chunked gzip"],
            &["chunked, chunked, gzip"],
        ] {
            check(lines, Err(CodingError::NotChunked));
        }
    }

    #[test]
    fn chunked_is_applied_once() {
        for lines in [
            &["chunked, chunked"][..],
            &["chunked", "CHUNKED"],
            &["gzip, chunked, chunked"],
            &["chunked, gzip, chunked"],
        ] {
            check(lines, Err(CodingError::ChunkedTwice));
        }
    }

    #[test]
    fn no_other_coding_is_supported() {
        for lines in [
            &["gzip, chunked"][..],
            &["gzip", "chunked"],
            &["identity,chunked"],
            &["a,b,c;d=e,chunked"],
        ] {
            check(lines, Err(CodingError::Unsupported));
        }
    }
}
