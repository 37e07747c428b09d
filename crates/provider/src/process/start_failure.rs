//! Counts consecutive failed starts of a replica, and keeps the last failure. No I/O.

use std::time::Duration;

use crate::types::StartFailure;

/// Number of consecutive failed starts after which calls do not wait for the next one.
const FAILING_THRESHOLD: u64 = 3;
/// Ready time after which a start counts as successful.
const STARTED_AFTER: Duration = Duration::from_secs(5);
/// Maximum length in bytes of the reported last line.
const MAX_OUTPUT_BYTES: usize = 512;

/// The failed starts of one replica.
#[derive(Debug, Default)]
pub(super) struct FailedStarts {
    consecutive: u64,
    last: Option<StartFailure>,
}

impl FailedStarts {
    /// Records the exit of a process that was ready for the time `ready_for`, with its last output line.
    pub(super) fn record_exit(&mut self, ready_for: Duration, reason: &str, last_output: &str) {
        self.record_ready(ready_for);
        if ready_for >= STARTED_AFTER {
            return;
        }
        self.consecutive += 1;
        self.last = Some(StartFailure {
            starts: self.consecutive,
            reason: reason.to_owned(),
            last_output: printable(last_output),
        });
    }

    /// Resets the count if a replica was ready for at least `STARTED_AFTER`.
    pub(super) fn record_ready(&mut self, ready_for: Duration) {
        if ready_for >= STARTED_AFTER {
            *self = Self::default();
        }
    }

    /// Returns the last failure if `FAILING_THRESHOLD` is reached.
    pub(super) fn persistent(&self) -> Option<&StartFailure> {
        self.last.as_ref().filter(|last| last.starts >= FAILING_THRESHOLD)
    }
}

/// Truncates `line`, and replaces control characters, which could affect a terminal.
fn printable(line: &str) -> String {
    let end = line.floor_char_boundary(MAX_OUTPUT_BYTES);
    line[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_reported_from_the_third_on_until_a_success() {
        let mut starts = FailedStarts::default();
        for _ in 0..2 {
            starts.record_exit(Duration::ZERO, "exit status: 1", "no config");
            assert_eq!(starts.persistent(), None);
        }
        starts.record_exit(STARTED_AFTER / 2, "exit status: 2", "\u{1b}[31mno config");
        let failure = starts.persistent().unwrap();
        assert_eq!((failure.starts, failure.reason.as_str()), (3, "exit status: 2"));
        assert_eq!(failure.last_output, " [31mno config");
        starts.record_exit(STARTED_AFTER, "exit status: 1", "");
        assert_eq!(starts.persistent(), None);
        starts.record_exit(Duration::ZERO, "exit status: 1", "");
        assert_eq!(starts.persistent(), None);
    }

    #[test]
    fn a_long_line_is_truncated_between_characters() {
        assert_eq!(printable(&"ä".repeat(MAX_OUTPUT_BYTES)).len(), MAX_OUTPUT_BYTES);
        assert_eq!(
            printable(&format!("x{}", "ä".repeat(MAX_OUTPUT_BYTES))).len(),
            MAX_OUTPUT_BYTES - 1
        );
    }
}
