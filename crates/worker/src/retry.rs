//! Decides after an attempt whether the call is finished or retried, and when. No I/O and no clock; random numbers are
//! passed in.

use std::time::{Duration, SystemTime};

use http::HeaderValue;

use gateway_base::backoff::Backoff;
use gateway_proxy::functions::policy::retry::RetryPolicy;

/// Maximum delay that a function can request by `Retry-After`.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60 * 60);

/// The result of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Status of the response; `None` if the function was unreachable.
    pub status: Option<u16>,
    /// Delay that the function requests by `Retry-After`.
    pub retry_after: Option<Duration>,
}

/// The next step of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It has succeeded.
    Succeeded,
    /// It has failed: the response is an error that another attempt would not change.
    Failed,
    /// It is retried, not before this delay has passed.
    RetryIn(Duration),
    /// It becomes a dead letter: its last attempt has failed.
    DeadLetter,
}

/// Decides what to do after the last of `attempts_made` attempts, which ended with `outcome`.
///
/// A response below 400 is a success, including redirects, which the client may interpret.
pub fn decide(policy: &RetryPolicy, attempts_made: u32, outcome: Outcome, random: f64) -> Decision {
    match outcome.status {
        Some(status) if policy.codes.contains(&status) => {}
        Some(..400) => return Decision::Succeeded,
        Some(_) => return Decision::Failed,
        None => {}
    }
    if attempts_made >= policy.attempts {
        return Decision::DeadLetter;
    }
    let floor = outcome.retry_after.unwrap_or_default().min(MAX_RETRY_AFTER);
    let backoff = Backoff::new(policy.min_wait, policy.max_wait);
    let delay = backoff.jittered(attempts_made, random);
    Decision::RetryIn(delay.max(floor))
}

/// Parses `Retry-After`, in seconds or as a date. A date in the past is a delay of zero.
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
    fn check(attempts_made: u32, status: Option<u16>, expect: Decision) {
        let outcome = Outcome { status, retry_after: None };
        assert_eq!(
            decide(&RetryPolicy::default(), attempts_made, outcome, 1.0),
            expect,
            "{status:?}"
        );
    }

    #[test]
    fn the_status_decides_whether_a_call_is_retried() {
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
    fn no_retry_follows_the_last_attempt() {
        check(4, Some(500), Decision::RetryIn(80 * SECOND));
        check(5, Some(500), Decision::DeadLetter);
        check(6, None, Decision::DeadLetter);
        check(5, Some(404), Decision::Failed);
    }

    #[test]
    fn retry_after_extends_the_delay_up_to_an_hour() {
        for (asked, expect) in [(0, 10), (5, 10), (300, 300), (3600, 3600), (u64::MAX, 3600)] {
            let retry_after = Some(Duration::from_secs(asked));
            let outcome = Outcome { status: Some(503), retry_after };
            let got = decide(&RetryPolicy::default(), 1, outcome, 1.0);
            assert_eq!(got, Decision::RetryIn(expect * SECOND), "{asked}");
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
