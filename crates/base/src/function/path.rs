//! Check of the path after a function's name.

/// Returns whether a segment of `path` is `.` or `..`, plain or percent-encoded. It could escape `/function/NAME` when
/// the next server decodes the path.
pub fn has_dot_segment(path: &str) -> bool {
    // Fast path: most paths have no candidate.
    let bytes = path.as_bytes();
    let is_candidate = bytes.windows(2).any(|two| two == b"/.")
        || bytes.first() == Some(&b'.')
        || bytes.iter().any(|byte| b"%\\".contains(byte));
    is_candidate
        && decoded(path).split(['/', '\\']).any(|segment| segment == "." || segment == "..")
}

/// Decodes percent-encoded dots, slashes and backslashes only.
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
    fn dot_segments_are_found_in_every_encoding() {
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
            // The path of a queued message may have no leading slash.
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
