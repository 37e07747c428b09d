//! Log lines, and their selection by a query. No I/O.

use std::collections::VecDeque;
use std::sync::Arc;

use jiff::Timestamp;

use crate::backend::LogQuery;
use crate::types::LogLine;
use gateway_base::function::Function;

/// One log line.
#[derive(Debug)]
pub(super) struct LogEntry {
    pub(super) at: Timestamp,
    pub(super) instance: Arc<str>,
    pub(super) text: String,
}

impl LogEntry {
    /// Converts this entry for the API.
    pub(super) fn to_log_line(&self, function: &Function) -> LogLine {
        LogLine {
            name: function.name.clone(),
            namespace: function.namespace.clone(),
            instance: self.instance.to_string(),
            timestamp: self.at.to_string(),
            text: self.text.clone(),
        }
    }

    /// Returns whether `query` selects this line, without regard to `tail`.
    pub(super) fn matches(&self, query: &LogQuery) -> bool {
        query.since.is_none_or(|since| self.at >= since)
            && query.instance.as_deref().is_none_or(|instance| instance == &*self.instance)
    }
}

/// Returns the selected entries, oldest first.
pub(super) fn select(query: &LogQuery, entries: &VecDeque<Arc<LogEntry>>) -> Vec<Arc<LogEntry>> {
    let matching = entries.iter().rev().filter(|entry| entry.matches(query));
    let mut selected: Vec<_> = matching.take(query.tail.unwrap_or(usize::MAX)).cloned().collect();
    selected.reverse();
    selected
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[track_caller]
    fn check(tail: Option<usize>, since: Option<i64>, instance: Option<&str>, expect: &[&str]) {
        let line = |at: Timestamp, instance: &str, text: &str| {
            Arc::new(LogEntry { at, instance: instance.into(), text: text.to_owned() })
        };
        let lines = VecDeque::from([
            line(at(1), "a", "one"),
            line(at(2), "b", "two"),
            line(at(3), "a", "three"),
        ]);
        let instance = instance.map(str::to_owned);
        let query = LogQuery { tail, since: since.map(at), instance, follow: false };
        let selected = select(&query, &lines);
        assert_eq!(selected.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn lines_are_selected_by_count_time_and_instance() {
        check(None, None, None, &["one", "two", "three"]);
        check(Some(2), None, None, &["two", "three"]);
        check(Some(0), None, None, &[]);
        check(Some(9), Some(2), None, &["two", "three"]);
        check(None, Some(4), None, &[]);
        check(Some(1), None, Some("b"), &["two"]);
        check(Some(1), Some(1), Some("a"), &["three"]);
    }
}
