//! Retry policy of a function's queued calls, from its annotations. No I/O.

use std::time::Duration;

use crate::functions::policy::ValueReader;
use gateway_base::duration;

const ATTEMPTS: &str = "com.openfaas.retry.attempts";
const CODES: &str = "com.openfaas.retry.codes";
const MIN_WAIT_ANNOTATION: &str = "com.openfaas.retry.min_wait";
const MAX_WAIT_ANNOTATION: &str = "com.openfaas.retry.max_wait";

/// Maximum number of attempts that an annotation can set: more would keep a worker busy with a failing call.
const MAX_ATTEMPTS: u32 = 100;
/// Minimum of a configurable delay: a function that fails immediately must not be called in a tight loop.
const MIN_WAIT: Duration = Duration::from_millis(100);
const MAX_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Maximum number of attempts, their delays, and the statuses that are retried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Maximum number of attempts, including the first one; never 0.
    pub attempts: u32,
    /// Status codes after which the call is retried.
    pub codes: Vec<u16>,
    /// Maximum of the first delay.
    pub min_wait: Duration,
    /// Maximum of all delays, unless `Retry-After` asks for a longer one.
    pub max_wait: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 5,
            codes: vec![408, 429, 500, 502, 503, 504],
            min_wait: Duration::from_secs(10),
            max_wait: Duration::from_secs(120),
        }
    }
}

impl RetryPolicy {
    /// Reads annotations. Values outside the limits are clamped; 0 attempts count as one.
    pub(super) fn read(reader: &mut ValueReader<'_>) -> Self {
        let mut policy = Self::default();
        // An empty annotation counts as absent.
        let is_set =
            |reader: &ValueReader<'_>, name| reader.text(name).is_some_and(|t| !t.is_empty());
        if is_set(reader, ATTEMPTS)
            && let Some(attempts) =
                reader.read(ATTEMPTS, "a number of attempts", "5", |text| text.parse::<u32>().ok())
        {
            policy.attempts = attempts.clamp(1, MAX_ATTEMPTS);
        }
        policy.read_codes(reader);
        let waits = [
            (MIN_WAIT_ANNOTATION, "10s", &mut policy.min_wait),
            (MAX_WAIT_ANNOTATION, "2m", &mut policy.max_wait),
        ];
        for (name, fallback, wait) in waits {
            if is_set(reader, name)
                && let Some(parsed) =
                    reader.read(name, duration::EXPECTED, fallback, duration::parse)
            {
                *wait = parsed.clamp(MIN_WAIT, MAX_WAIT);
            }
        }
        policy.max_wait = policy.max_wait.max(policy.min_wait);
        policy
    }

    /// Reads the list of statuses; invalid ones are left out.
    fn read_codes(&mut self, reader: &mut ValueReader<'_>) {
        let Some(text) = reader.text(CODES) else { return };
        let mut codes = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.parse() {
                Ok(code) if (400..600).contains(&code) => codes.push(code),
                _ => reader.reject(CODES, part, "a status from 400 to 599", "the others"),
            }
        }
        if !codes.is_empty() {
            self.codes = codes;
        }
    }

    /// Returns this policy with at most `attempts` attempts.
    #[must_use]
    pub fn capped(mut self, attempts: Option<u32>) -> Self {
        self.attempts = self.attempts.min(attempts.unwrap_or(u32::MAX)).max(1);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::functions::policy::Values;

    #[test]
    fn each_annotation_overrides_one_value() {
        let read = |pairs: &[(&str, &'static str)]| {
            let name = |name: &str| format!("com.openfaas.retry.{name}");
            let values: Values =
                pairs.iter().map(|(n, value)| (name(n), (*value).to_owned())).collect();
            let mut reader = ValueReader::new("Annotation", &values);
            let RetryPolicy { attempts, codes, min_wait, max_wait } =
                RetryPolicy::read(&mut reader);
            let invalid = reader.invalid.len();
            (attempts, codes, min_wait.as_millis(), max_wait.as_millis(), invalid)
        };
        let default_codes = vec![408, 429, 500, 502, 503, 504];
        let cases: [(&[_], _); 10] = [
            (&[], (5, default_codes.clone(), 10_000, 120_000, 0)),
            (
                &[
                    ("attempts", "3"),
                    ("codes", "404, 503"),
                    ("min_wait", "1s"),
                    ("max_wait", "1m30s"),
                ],
                (3, vec![404, 503], 1000, 90_000, 0),
            ),
            (&[("attempts", "0")], (1, default_codes.clone(), 10_000, 120_000, 0)),
            (&[("attempts", "1000000")], (100, default_codes.clone(), 10_000, 120_000, 0)),
            (
                &[("attempts", "-1"), ("min_wait", "2s")],
                (5, default_codes.clone(), 2000, 120_000, 1),
            ),
            (&[("codes", "200,x,418,,700")], (5, vec![418], 10_000, 120_000, 3)),
            (&[("codes", "soon")], (5, default_codes.clone(), 10_000, 120_000, 1)),
            (
                &[("min_wait", "0s"), ("max_wait", "soon")],
                (5, default_codes.clone(), 100, 120_000, 1),
            ),
            (&[("min_wait", "5m")], (5, default_codes.clone(), 300_000, 300_000, 0)),
            (&[("max_wait", "9999h"), ("codes", " ")], (5, default_codes, 10_000, 86_400_000, 0)),
        ];
        for (annotations, expect) in cases {
            assert_eq!(read(annotations), expect, "{annotations:?}");
        }
    }

    #[test]
    fn the_lower_maximum_of_attempts_applies() {
        for (asked, expect) in [(None, 5), (Some(2), 2), (Some(9), 5), (Some(0), 1)] {
            assert_eq!(RetryPolicy::default().capped(asked).attempts, expect, "{asked:?}");
        }
    }
}
