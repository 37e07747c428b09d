//! Durations as Go writes them (`1m30s`, `700ms`, `1.5h`), or whole seconds (`60`). No I/O.

use std::time::Duration;

/// Units in nanoseconds. There are two characters for `µ`.
const UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Format that [`parse`] accepts, for messages.
pub const EXPECTED: &str = "a duration such as 1m30s, 700ms or 60 (whole seconds)";

/// Parses a duration that is not negative. Returns `None` for anything else, and above 292 years.
pub fn parse(text: &str) -> Option<Duration> {
    let text = text.strip_prefix('+').unwrap_or(text);
    if text.is_empty() {
        return None;
    }
    if text.bytes().all(|b| b.is_ascii_digit()) {
        let seconds: u64 = text.parse().ok()?;
        return i64::try_from(seconds.checked_mul(1_000_000_000)?)
            .is_ok()
            .then(|| Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let number_ends = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(number_ends);
        let unit_ends = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_ends);
        total = total.checked_add(nanoseconds(number, unit)?)?;
        rest = tail;
    }
    i64::try_from(total).is_ok().then(|| Duration::from_nanos(total))
}

/// Returns `number` (digits with at most one dot) times `unit`, in whole nanoseconds.
fn nanoseconds(number: &str, unit: &str) -> Option<u64> {
    let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut part: u64 = 0;
    let mut weight = *scale;
    for digit in fraction.bytes() {
        weight /= 10;
        part += u64::from(digit - b'0') * weight;
    }
    whole.checked_mul(*scale)?.checked_add(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Option<Duration>) {
        assert_eq!(parse(text), expect, "{text:?}");
    }

    #[test]
    fn go_durations_and_whole_seconds_are_parsed() {
        check("60", Some(Duration::from_secs(60)));
        check("0", Some(Duration::ZERO));
        check("0s", Some(Duration::ZERO));
        check("1m30s", Some(Duration::from_secs(90)));
        check("700ms", Some(Duration::from_millis(700)));
        check("1.5h", Some(Duration::from_secs(5400)));
        check(".5s", Some(Duration::from_millis(500)));
        check("1.s", Some(Duration::from_secs(1)));
        check("2µs3ns", Some(Duration::from_nanos(2003)));
        check("+1s", Some(Duration::from_secs(1)));
        check("0.0000000001s", Some(Duration::ZERO));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "", "+", "s", "1x", "-1s", "1 s", "1.2.3s", "1s2", ".", ".s", "1e3s", "ten", "1m 30s",
            "--1",
        ] {
            check(text, None);
        }
        check("99999999999999999999", None);
        check("9999999999h", None);
    }
}
