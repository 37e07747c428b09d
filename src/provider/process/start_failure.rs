//! How often the starts of a replica have failed in a row, and what the last failed one left behind. No I/O.

use std::time::Duration;

use crate::provider::types::StartFailure;

/// The number of failed starts in a row after which calls do not wait for the next one.
const FAILING_THRESHOLD: u64 = 3;
/// A replica that can be called for so long has been started.
const STARTED_AFTER: Duration = Duration::from_secs(5);
/// So much of the last line is told.
const MAX_OUTPUT_BYTES: usize = 512;

/// The failed starts of one replica.
#[derive(Debug, Default)]
pub(super) struct FailedStarts {
    consecutive: u64,
    last: Option<StartFailure>,
}

impl FailedStarts {
    /// A process has died, for `reason`. `ready_for`: how long it could be called; `last_output`: its last line.
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

    /// A replica could be called for `ready_for`: long enough, and its start was none that failed.
    pub(super) fn record_ready(&mut self, ready_for: Duration) {
        if ready_for >= STARTED_AFTER {
            *self = Self::default();
        }
    }

    /// The last failure, if there were enough of them that nobody should wait for another.
    pub(super) fn persistent(&self) -> Option<&StartFailure> {
        self.last.as_ref().filter(|last| last.starts >= FAILING_THRESHOLD)
    }
}

/// The start of `line`, without what could control a terminal.
fn printable(line: &str) -> String {
    let end = line.floor_char_boundary(MAX_OUTPUT_BYTES);
    line[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_failures_in_a_row_are_told_and_a_success_ends_the_row() {
        let mut starts = FailedStarts::default();
        for _ in 0..2 {
            starts.record_exit(Duration::ZERO, "exit status: 1", "no config");
            assert_eq!(starts.persistent(), None);
        }
        starts.record_exit(STARTED_AFTER / 2, "exit status: 2", "\u{1b}[31mno config");
        let told = starts.persistent().unwrap();
        assert_eq!((told.starts, told.reason.as_str()), (3, "exit status: 2"));
        assert_eq!(told.last_output, " [31mno config");
        starts.record_exit(STARTED_AFTER, "exit status: 1", "");
        assert_eq!(starts.persistent(), None);
        starts.record_exit(Duration::ZERO, "exit status: 1", "");
        assert_eq!(starts.persistent(), None);
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        assert_eq!(printable(&"ä".repeat(MAX_OUTPUT_BYTES)).len(), MAX_OUTPUT_BYTES);
        assert_eq!(
            printable(&format!("x{}", "ä".repeat(MAX_OUTPUT_BYTES))).len(),
            MAX_OUTPUT_BYTES - 1
        );
    }
}
