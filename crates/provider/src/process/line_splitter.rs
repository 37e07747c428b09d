//! Splits output into lines of bounded length. No I/O.

/// Maximum length of a line; longer ones are split. Bounds memory for output without newlines.
const MAX_LINE_BYTES: usize = 16 << 10;

/// Splits a stream of bytes into lines.
#[derive(Debug, Default)]
pub(super) struct LineSplitter {
    partial: Vec<u8>,
}

impl LineSplitter {
    /// Adds output, and calls `line` for each complete line.
    pub(super) fn push(&mut self, mut bytes: &[u8], mut line: impl FnMut(String)) {
        while !bytes.is_empty() {
            let space = MAX_LINE_BYTES - self.partial.len();
            let (length, end) = match bytes.iter().take(space).position(|b| *b == b'\n') {
                Some(at) => (at, at + 1),
                None => (bytes.len().min(space), bytes.len().min(space)),
            };
            self.partial.extend_from_slice(&bytes[..length]);
            bytes = &bytes[end..];
            if end > length || self.partial.len() == MAX_LINE_BYTES {
                line(self.take_line());
            }
        }
    }

    /// Calls `line` for the last line if it has no newline.
    pub(super) fn finish(&mut self, line: impl FnOnce(String)) {
        if !self.partial.is_empty() {
            line(self.take_line());
        }
    }

    fn take_line(&mut self) -> String {
        let line = self.partial.strip_suffix(b"\r").unwrap_or(&self.partial);
        let line = String::from_utf8_lossy(line).into_owned();
        self.partial.clear();
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(chunks: &[&[u8]], expect: &[&str]) {
        let mut got = Vec::new();
        let mut lines = LineSplitter::default();
        for chunk in chunks {
            lines.push(chunk, |line| got.push(line));
        }
        lines.finish(|line| got.push(line));
        assert_eq!(got, expect);
    }

    #[test]
    fn lines_do_not_depend_on_the_chunks() {
        check(&[], &[]);
        check(&[b"a\nb"], &["a", "b"]);
        check(&[b"a", b"b\n", b"\n", b"c\r", b"\nd"], &["ab", "", "c", "d"]);
        check(&[b"\xff\n"], &["\u{fffd}"]);
    }

    #[test]
    fn a_long_line_is_split() {
        let long = vec![b'x'; 2 * MAX_LINE_BYTES + 1];
        let full = "x".repeat(MAX_LINE_BYTES);
        check(&[&long], &[&full, &full, "x"]);
    }
}
