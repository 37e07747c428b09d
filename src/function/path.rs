//! What stands behind a function's name in a path.

/// Whether a segment of `path` is `.` or `..`, however dots and slashes are written: it could lead out of
/// `/function/NAME` when the next server decodes it.
pub fn has_dot_segment(path: &str) -> bool {
    // Most paths have neither; they are done with one walk.
    let bytes = path.as_bytes();
    let odd = bytes.windows(2).any(|two| two == b"/.")
        || bytes.first() == Some(&b'.')
        || bytes.iter().any(|byte| b"%\\".contains(byte));
    odd && decoded(path).split(['/', '\\']).any(|segment| segment == "." || segment == "..")
}

/// `path` with dots and slashes decoded, and nothing else.
fn decoded(path: &str) -> String {
    let mut decoded = path.to_ascii_lowercase();
    for (code, character) in [("%2e", "."), ("%2f", "/"), ("%5c", "\\")] {
        decoded = decoded.replace(code, character);
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_segments_are_seen_however_they_are_written() {
        for path in [
            "/function/a/..",
            "/a/../b",
            "/a/./b",
            "/a/%2e%2E/b",
            "/a/.%2e",
            "/..",
            "/a/..\\b",
            "/a/..%2f..%2Fb",
            "/a%5C..%5cb",
            // A message of the queue may have a path without its slash.
            "..",
            "./b",
            "%2e%2e/b",
        ] {
            assert!(has_dot_segment(path), "{path}");
        }
        for path in [
            "",
            "/",
            "/function/a.b/c.json",
            "/a/...",
            "/a/..b",
            "/a/.well-known",
            "/a//b",
            "/a/%2f",
            ".a",
            "a.",
        ] {
            assert!(!has_dot_segment(path), "{path}");
        }
    }
}
