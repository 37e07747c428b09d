//! What comes after an attempt at a call: it is over, or it is made again, some time later. No I/O, no clock; chance
//! is handed in.

use std::time::{Duration, SystemTime};

use http::HeaderValue;

use crate::config::duration;

const ATTEMPTS: &str = "com.openfaas.retry.attempts";
const CODES: &str = "com.openfaas.retry.codes";
const MIN_WAIT: &str = "com.openfaas.retry.min_wait";
const MAX_WAIT: &str = "com.openfaas.retry.max_wait";

/// More attempts than this keep a worker busy with what does not work.
const MOST_ATTEMPTS: u32 = 100;
/// Less of a pause is none: a function that fails at once would be called in a tight loop.
const SHORTEST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 60 * 60);
/// What a function may ask for by `Retry-After`.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60 * 60);

/// How often a call is made, and after which answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// In all, the first one included; never 0.
    pub attempts: u32,
    /// The statuses after which it is made again.
    pub codes: Vec<u16>,
    /// The first pause is at most this.
    pub min_wait: Duration,
    /// No pause is longer, unless the function asks for it.
    pub max_wait: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            attempts: 5,
            codes: vec![408, 429, 500, 502, 503, 504],
            min_wait: Duration::from_secs(10),
            max_wait: Duration::from_secs(120),
        }
    }
}

impl Policy {
    /// This policy with what a function's annotations say instead, and a warning for each value that says nothing
    /// usable. A value beyond a limit is brought to it; no attempts count as one.
    #[must_use]
    pub fn annotated<'a>(
        mut self,
        annotation: impl Fn(&str) -> Option<&'a str>,
    ) -> (Self, Vec<String>) {
        let mut warnings = Vec::new();
        let value = |name| annotation(name).map(str::trim).filter(|value| !value.is_empty());
        let mut warn = |name: &str, value: &str, expected: &str| {
            warnings.push(format!("{name}: {value:?} is not {expected}"));
        };
        if let Some(text) = value(ATTEMPTS) {
            match text.parse::<u32>() {
                Ok(attempts) => self.attempts = attempts.clamp(1, MOST_ATTEMPTS),
                Err(_) => warn(ATTEMPTS, text, "a number of attempts"),
            }
        }
        if let Some(text) = value(CODES) {
            let mut codes = Vec::new();
            for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
                match part.parse() {
                    Ok(code) if (400..600).contains(&code) => codes.push(code),
                    _ => warn(CODES, part, "a status from 400 to 599"),
                }
            }
            if !codes.is_empty() {
                self.codes = codes;
            }
        }
        for (name, wait) in [(MIN_WAIT, &mut self.min_wait), (MAX_WAIT, &mut self.max_wait)] {
            let Some(text) = value(name) else { continue };
            match duration::parse(text) {
                Some(parsed) => *wait = parsed.clamp(SHORTEST_WAIT, LONGEST_WAIT),
                None => warn(name, text, duration::EXPECTED),
            }
        }
        self.max_wait = self.max_wait.max(self.min_wait);
        (self, warnings)
    }

    /// This policy for a caller that wants no more than `attempts`, if it said so.
    #[must_use]
    pub fn at_most(mut self, attempts: Option<u32>) -> Self {
        self.attempts = self.attempts.min(attempts.unwrap_or(u32::MAX)).max(1);
        self
    }
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// `None`: the function was out of reach.
    pub status: Option<u16>,
    /// How long the function asks to be left alone.
    pub retry_after: Option<Duration>,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is over, and well.
    Succeeded,
    /// It is over: the answer is an error that another attempt would not change.
    Failed,
    /// It is made again, not before this time has passed.
    RetryIn(Duration),
    /// It goes to the dead letters: the last attempt failed, too.
    Bury,
}

/// Decides what comes after the attempt that ended with `outcome`, the last of `attempts_made`.
///
/// An answer below 400 is a success, a redirect included: what it means is for the caller to say.
pub fn decide(policy: &Policy, attempts_made: u32, outcome: Outcome, random: f64) -> Decision {
    match outcome.status {
        Some(status) if policy.codes.contains(&status) => {}
        Some(..400) => return Decision::Succeeded,
        Some(_) => return Decision::Failed,
        None => {}
    }
    if attempts_made >= policy.attempts {
        return Decision::Bury;
    }
    let floor = outcome.retry_after.unwrap_or_default().min(LONGEST_RETRY_AFTER);
    let pause = backoff(policy.min_wait, policy.max_wait, attempts_made, random);
    Decision::RetryIn(pause.max(floor))
}

/// The pause after the attempt number `attempts_made`: full jitter, that is `random` (0 to 1) of a ceiling that doubles
/// from `min` to `max`. At least a tenth of `min`, since a pause of nothing spares nobody.
pub fn backoff(min: Duration, max: Duration, attempts_made: u32, random: f64) -> Duration {
    let doublings = attempts_made.saturating_sub(1).min(31);
    let ceiling = min.saturating_mul(1 << doublings).min(max);
    let drawn = Duration::try_from_secs_f64(ceiling.as_secs_f64() * random).unwrap_or(ceiling);
    drawn.min(ceiling).max(min / 10)
}

/// How long `Retry-After` asks for, be it in seconds or by a date, which is a pause of nothing when it has passed.
pub fn parse_retry_after(value: &HeaderValue, now: SystemTime) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[track_caller]
    fn check(made: u32, status: Option<u16>, expect: Decision) {
        let outcome = Outcome { status, retry_after: None };
        assert_eq!(decide(&Policy::default(), made, outcome, 1.0), expect, "{status:?}");
    }

    #[test]
    fn an_answer_ends_a_call_or_has_it_made_again() {
        check(1, Some(200), Decision::Succeeded);
        check(1, Some(302), Decision::Succeeded);
        check(5, Some(202), Decision::Succeeded);
        for status in [400, 404, 409, 501] {
            check(1, Some(status), Decision::Failed);
        }
        for status in [408, 429, 500, 502, 503, 504] {
            check(1, Some(status), Decision::RetryIn(10 * SECOND));
        }
        check(1, None, Decision::RetryIn(10 * SECOND));
    }

    #[test]
    fn the_last_attempt_is_followed_by_none() {
        check(4, Some(500), Decision::RetryIn(80 * SECOND));
        check(5, Some(500), Decision::Bury);
        check(6, None, Decision::Bury);
        check(5, Some(404), Decision::Failed);
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let (min, max) = (10 * SECOND, 120 * SECOND);
        for (made, seconds) in
            [(0, 10), (1, 10), (2, 20), (3, 40), (4, 80), (5, 120), (60, 120), (u32::MAX, 120)]
        {
            assert_eq!(backoff(min, max, made, 1.0), seconds * SECOND, "{made}");
        }
    }

    #[test]
    fn chance_takes_of_a_pause_what_it_will_but_for_a_tenth_of_the_shortest() {
        let pause = |random| backoff(10 * SECOND, 120 * SECOND, 2, random);
        for (random, expect) in [
            (0.0, SECOND),
            (0.01, SECOND),
            (0.25, 5 * SECOND),
            (0.5, 10 * SECOND),
            (1.0, 20 * SECOND),
            // No chance at all, but no reason to panic.
            (f64::NAN, 20 * SECOND),
            (-1.0, 20 * SECOND),
            (7.0, 20 * SECOND),
        ] {
            assert_eq!(pause(random), expect, "{random}");
        }
    }

    #[test]
    fn a_function_may_ask_for_a_longer_pause_up_to_an_hour() {
        for (asked, expect) in [(0, 10), (5, 10), (300, 300), (3600, 3600), (u64::MAX, 3600)] {
            let retry_after = Some(Duration::from_secs(asked));
            let outcome = Outcome { status: Some(503), retry_after };
            let got = decide(&Policy::default(), 1, outcome, 1.0);
            assert_eq!(got, Decision::RetryIn(expect * SECOND), "{asked}");
        }
    }

    #[test]
    fn annotations_override_one_by_one() {
        let read = |pairs: &[(&str, &'static str)]| {
            let find = |name: &str| {
                pairs.iter().find(|(n, _)| name == format!("com.openfaas.retry.{n}")).map(|p| p.1)
            };
            let (policy, warnings) = Policy::default().annotated(find);
            let Policy { attempts, codes, min_wait, max_wait } = policy;
            (attempts, codes, min_wait.as_millis(), max_wait.as_millis(), warnings.len())
        };
        let usual = vec![408, 429, 500, 502, 503, 504];
        let cases: [(&[_], _); 10] = [
            (&[], (5, usual.clone(), 10_000, 120_000, 0)),
            (
                &[
                    ("attempts", "3"),
                    ("codes", "404, 503"),
                    ("min_wait", "1s"),
                    ("max_wait", "1m30s"),
                ],
                (3, vec![404, 503], 1000, 90_000, 0),
            ),
            (&[("attempts", "0")], (1, usual.clone(), 10_000, 120_000, 0)),
            (&[("attempts", "1000000")], (100, usual.clone(), 10_000, 120_000, 0)),
            (&[("attempts", "-1"), ("min_wait", "2s")], (5, usual.clone(), 2000, 120_000, 1)),
            (&[("codes", "200,x,418,,700")], (5, vec![418], 10_000, 120_000, 3)),
            (&[("codes", "soon")], (5, usual.clone(), 10_000, 120_000, 1)),
            (&[("min_wait", "0s"), ("max_wait", "soon")], (5, usual.clone(), 100, 120_000, 1)),
            (&[("min_wait", "5m")], (5, usual.clone(), 300_000, 300_000, 0)),
            (&[("max_wait", "9999h"), ("codes", " ")], (5, usual, 10_000, 86_400_000, 0)),
        ];
        for (annotations, expect) in cases {
            assert_eq!(read(annotations), expect, "{annotations:?}");
        }
    }

    #[test]
    fn the_lower_count_of_attempts_holds() {
        for (asked, expect) in [(None, 5), (Some(2), 2), (Some(9), 5), (Some(0), 1)] {
            assert_eq!(Policy::default().at_most(asked).attempts, expect, "{asked:?}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        // Sun, 06 Nov 1994 08:49:37 GMT
        let now = SystemTime::UNIX_EPOCH + 784_111_777 * SECOND;
        for (text, expect) in [
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("99999999999999999999999", Some(u64::MAX)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
        ] {
            let value = HeaderValue::from_static(text);
            let expect = expect.map(Duration::from_secs);
            assert_eq!(parse_retry_after(&value, now), expect, "{text:?}");
        }
    }
}
