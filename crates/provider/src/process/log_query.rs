//! Parses and applies the query of `GET /system/logs`. No I/O.

use std::collections::VecDeque;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Deserialize;

use crate::process::logs::LogEntry;
use gateway_base::duration;

/// The unparsed query parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawLogQuery {
    pub(super) name: String,
    pub(super) namespace: String,
    tail: String,
    since: String,
    follow: String,
    instance: String,
}

/// Selects log lines.
#[derive(Debug, Default, PartialEq)]
pub(super) struct LogQuery {
    /// Maximum number of lines, counted from the end.
    tail: Option<usize>,
    since: Option<Timestamp>,
    instance: Option<String>,
    /// Includes future lines.
    pub(super) follow: bool,
}

impl RawLogQuery {
    /// Parses the parameters relative to the time `now`.
    ///
    /// # Errors
    /// Description of the first invalid parameter.
    pub(super) fn parse(self, now: Timestamp) -> Result<LogQuery, String> {
        let wrong = |name: &str, value: &str, expected: &str| {
            format!("{name}: {value:?} is not {expected}")
        };
        let tail = match self.tail.trim() {
            "" => None,
            text => {
                let tail: i64 = text.parse().map_err(|_| wrong("tail", text, "a whole number"))?;
                // A negative number, the default of clients, means all lines.
                usize::try_from(tail).ok()
            }
        };
        let since = match self.since.trim() {
            "" => None,
            text => {
                let expected = "a time (RFC 3339), or a duration back from now such as 10m";
                Some(parse_since(text, now).ok_or_else(|| wrong("since", text, expected))?)
            }
        };
        let follow = match self.follow.trim().to_ascii_lowercase().as_str() {
            "" | "0" | "f" | "false" => false,
            "1" | "t" | "true" => true,
            text => return Err(wrong("follow", text, "true or false")),
        };
        let instance = Some(self.instance).filter(|instance| !instance.is_empty());
        Ok(LogQuery { tail, since, instance, follow })
    }
}

impl LogQuery {
    /// Returns whether `line` matches, without regard to `tail`.
    pub(super) fn matches(&self, line: &LogEntry) -> bool {
        self.since.is_none_or(|since| line.at >= since)
            && self.instance.as_deref().is_none_or(|instance| instance == &*line.instance)
    }

    /// Returns the selected lines, oldest first.
    pub(super) fn select(&self, lines: &VecDeque<Arc<LogEntry>>) -> Vec<Arc<LogEntry>> {
        let wanted = lines.iter().rev().filter(|line| self.matches(line));
        let mut selected: Vec<_> = wanted.take(self.tail.unwrap_or(usize::MAX)).cloned().collect();
        selected.reverse();
        selected
    }
}

fn parse_since(text: &str, now: Timestamp) -> Option<Timestamp> {
    match duration::parse(text) {
        Some(ago) => now.checked_sub(ago).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn parse(since: &str, tail: &str, follow: &str) -> Result<LogQuery, String> {
        let text = |text: &str| text.to_owned();
        let raw = RawLogQuery {
            since: text(since),
            tail: text(tail),
            follow: text(follow),
            ..Default::default()
        };
        raw.parse(at(1_700_000_000))
    }

    #[test]
    fn parameters_are_parsed_in_the_formats_of_clients() {
        assert_eq!(parse("", "", "").unwrap(), LogQuery::default());
        assert_eq!(parse("", "-1", "0").unwrap(), LogQuery::default());
        assert_eq!(parse("", "0", "").unwrap().tail, Some(0));
        assert!(parse("", "", "true").unwrap().follow && parse("", "", "1").unwrap().follow);
        assert_eq!(parse("100s", "", "").unwrap().since, Some(at(1_699_999_900)));
        assert_eq!(parse("2023-11-14T22:13:20Z", "", "").unwrap().since, Some(at(1_700_000_000)));
        assert_eq!(
            parse("2023-11-14T23:13:20+01:00", "", "").unwrap().since,
            Some(at(1_700_000_000))
        );
        for (since, tail, follow) in [("noon", "", ""), ("", "many", ""), ("", "", "maybe")] {
            assert!(parse(since, tail, follow).unwrap_err().contains("is not"));
        }
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
        let selected = query.select(&lines);
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
