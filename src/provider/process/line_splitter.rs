//! Cuts output into lines, with a bound on a line's length. No I/O.

/// A longer line is cut: whoever writes without ever ending a line must not fill the memory.
const MAX_LINE_BYTES: usize = 16 << 10;

/// Output whose last line may not be whole yet.
#[derive(Debug, Default)]
pub(super) struct LineSplitter {
    partial: Vec<u8>,
}

impl LineSplitter {
    /// Takes more output, and hands out every line that is whole now.
    pub(super) fn push(&mut self, mut bytes: &[u8], mut line: impl FnMut(String)) {
        while !bytes.is_empty() {
            let room = MAX_LINE_BYTES - self.partial.len();
            let (taken, end) = match bytes.iter().take(room).position(|b| *b == b'\n') {
                Some(at) => (at, at + 1),
                None => (bytes.len().min(room), bytes.len().min(room)),
            };
            self.partial.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[end..];
            if end > taken || self.partial.len() == MAX_LINE_BYTES {
                line(self.take_line());
            }
        }
    }

    /// Hands out what has not been ended by a newline.
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
    fn lines_are_whole_however_they_come() {
        check(&[], &[]);
        check(&[b"a\nb"], &["a", "b"]);
        check(&[b"a", b"b\n", b"\n", b"c\r", b"\nd"], &["ab", "", "c", "d"]);
        check(&[b"\xff\n"], &["\u{fffd}"]);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let long = vec![b'x'; 2 * MAX_LINE_BYTES + 1];
        let full = "x".repeat(MAX_LINE_BYTES);
        check(&[&long], &[&full, &full, "x"]);
    }
}
