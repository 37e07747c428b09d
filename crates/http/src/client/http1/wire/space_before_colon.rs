//! Removes whitespace between the name of a field and its colon, as a proxy must do in a response (RFC 9112, 5.1).
//! httparse refuses such whitespace, or makes every response more expensive. It is therefore removed only after the
//! parser has failed.

/// Returns `text` without whitespace before the colons of the fields at its front; the text after their blank line is
/// unchanged. `None` if there is no such whitespace.
pub(super) fn remove_space_before_colons(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let (mut rest, mut removed) = (text, false);
    while !rest.is_empty() && !rest.starts_with(b"\r\n") && !rest.starts_with(b"\n") {
        let end = memchr::memchr(b'\n', rest).map_or(rest.len(), |at| at + 1);
        let (name, spaces) = name_and_space_lengths(&rest[..end]);
        let has_spaces = name > 0 && spaces > 0 && rest[name + spaces..end].starts_with(b":");
        removed |= has_spaces;
        out.extend_from_slice(&rest[..name]);
        out.extend_from_slice(&rest[if has_spaces { name + spaces } else { name }..end]);
        rest = &rest[end..];
    }
    out.extend_from_slice(rest);
    removed.then_some(out)
}

/// Returns whether the fields at the front of `text` end with a name and whitespace, which a colon may follow.
pub(super) fn may_precede_colon(text: &[u8]) -> bool {
    let mut line = text;
    while let Some(end) = memchr::memchr(b'\n', line) {
        if matches!(line[..end], [] | [b'\r']) {
            // All fields are complete.
            return false;
        }
        line = &line[end + 1..];
    }
    let (name, spaces) = name_and_space_lengths(line);
    name > 0 && spaces > 0 && name + spaces == line.len()
}

/// Returns the lengths of the name at the front of `line` and of the whitespace after it.
fn name_and_space_lengths(line: &[u8]) -> (usize, usize) {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t');
    let name = line.iter().position(|byte| is_space(byte) || *byte == b':').unwrap_or(line.len());
    (name, line[name..].iter().take_while(|byte| is_space(byte)).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Option<&str>) {
        let result = remove_space_before_colons(text.as_bytes());
        assert_eq!(result.as_deref(), expect.map(str::as_bytes), "{text:?}");
    }

    #[test]
    fn whitespace_before_colons_is_removed() {
        check("A : b\r\nC\t :\r\n\r\n", Some("A: b\r\nC:\r\n\r\n"));
        check("A: b\nC  : d : e\n\nF : g", Some("A: b\nC: d : e\n\nF : g"));
    }

    #[test]
    fn other_whitespace_stays() {
        for text in ["", "A: b\r\n\r\n", "A b: c\r\n", " : a\r\n", ": a\r\n", "A: b\r\n c : d\r\n"]
        {
            check(text, None);
        }
        check("\r\nA : b\r\n", None);
        check("A \r\n", None);
        // A colon may follow, or the rest of a malformed name.
        check("A: b\r\nC ", None);
    }

    #[test]
    fn a_colon_may_follow_a_name_and_whitespace() {
        for (text, expect) in [
            ("A: b\r\nC ", true),
            ("C\t ", true),
            ("C", false),
            ("C :", false),
            ("C d", false),
            (" ", false),
            ("", false),
            ("A \n", false),
            ("A b: c\r\n\r\nD ", false),
            ("A b: c\n\nD ", false),
        ] {
            assert_eq!(may_precede_colon(text.as_bytes()), expect, "{text:?}");
        }
    }
}
