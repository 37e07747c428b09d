//! Detects the content type of a response without `Content-Type` from its first bytes, as browsers do (WHATWG, MIME
//! Sniffing). Clients of the gateway that this one replaces rely on the type. No I/O.

use http::HeaderValue;

/// Number of bytes that are inspected.
const MAX_SNIFFED_BYTES: usize = 512;
/// Tags at the start of an HTML document.
const HTML_TAGS: [&str; 17] = [
    "<!doctype html",
    "<html",
    "<head",
    "<script",
    "<iframe",
    "<h1",
    "<div",
    "<font",
    "<table",
    "<a",
    "<style",
    "<title",
    "<b",
    "<body",
    "<br",
    "<p",
    "<!--",
];
/// First bytes of other types.
const SIGNATURES: [(&[u8], &str); 12] = [
    (b"%PDF-", "application/pdf"),
    (b"%!PS-Adobe-", "application/postscript"),
    (b"\xfe\xff", "text/plain; charset=utf-16be"),
    (b"\xff\xfe", "text/plain; charset=utf-16le"),
    (b"\xef\xbb\xbf", TEXT_PLAIN),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"BM", "image/bmp"),
    (b"\x1f\x8b\x08", "application/x-gzip"),
    (b"PK\x03\x04", "application/zip"),
];
const TEXT_PLAIN: &str = "text/plain; charset=utf-8";

/// Returns the type of content that starts with `beginning`.
pub(super) fn content_type(beginning: &[u8]) -> HeaderValue {
    HeaderValue::from_static(sniff(&beginning[..beginning.len().min(MAX_SNIFFED_BYTES)]))
}

fn sniff(beginning: &[u8]) -> &'static str {
    let text = beginning.trim_ascii_start();
    if HTML_TAGS.iter().any(|tag| starts_with_tag(text, tag)) {
        return "text/html; charset=utf-8";
    }
    if text.starts_with(b"<?xml") {
        return "text/xml; charset=utf-8";
    }
    let signature = SIGNATURES.iter().find(|(signature, _)| beginning.starts_with(signature));
    match signature {
        Some((_, kind)) => kind,
        None if beginning.starts_with(b"RIFF") && beginning.get(8..14) == Some(b"WEBPVP") => {
            "image/webp"
        }
        None if beginning.iter().any(is_binary_byte) => "application/octet-stream",
        None => TEXT_PLAIN,
    }
}

fn starts_with_tag(text: &[u8], tag: &str) -> bool {
    let is_tag =
        text.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag.as_bytes()));
    is_tag && (tag == "<!--" || matches!(text.get(tag.len()), Some(b' ' | b'>')))
}

/// Returns whether `byte` does not occur in text.
fn is_binary_byte(byte: &u8) -> bool {
    matches!(byte, 0x00..=0x08 | 0x0b | 0x0e..=0x1a | 0x1c..=0x1f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(beginning: &[u8], expect: &str) {
        assert_eq!(sniff(beginning), expect, "{}", beginning.escape_ascii());
    }

    #[test]
    fn text_is_detected() {
        for text in
            ["warm", "{\"json\": true}", "a\tb\r\nc\x0c\x1b[0m", "größer", "<unknown>", "<bold>"]
        {
            check(text.as_bytes(), TEXT_PLAIN);
        }
        check(b"\xef\xbb\xbfwith a mark", TEXT_PLAIN);
    }

    #[test]
    fn markup_is_detected_by_its_first_tag() {
        for page in
            ["<!DOCTYPE HTML>", " \r\n<html>", "<P>", "<a href=x>", "<!-- x", "<Body class=x>"]
        {
            check(page.as_bytes(), "text/html; charset=utf-8");
        }
        check(b"<?xml version=\"1.0\"?>", "text/xml; charset=utf-8");
        check(b"<p", TEXT_PLAIN);
    }

    #[test]
    fn binary_formats_are_detected_by_their_signatures() {
        check(b"%PDF-1.7", "application/pdf");
        check(b"\x89PNG\r\n\x1a\n....", "image/png");
        check(b"RIFF\x01\x02\x03\x04WEBPVP8 ", "image/webp");
        check(b"PK\x03\x04", "application/zip");
    }

    #[test]
    fn unknown_binary_content_is_an_octet_stream() {
        check(b"\x00\x01", "application/octet-stream");
        check(b"RIFF\x00", "application/octet-stream");
        // Later bytes are not inspected.
        let mut long = vec![b'x'; MAX_SNIFFED_BYTES];
        long.push(0);
        assert_eq!(content_type(&long), TEXT_PLAIN);
    }
}
