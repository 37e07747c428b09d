//! How a function wants to be scaled, from its labels. No I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::duration;

type Labels = BTreeMap<String, String>;

const MIN: &str = "com.openfaas.scale.min";
const MAX: &str = "com.openfaas.scale.max";
const FACTOR: &str = "com.openfaas.scale.factor";
const ZERO: &str = "com.openfaas.scale.zero";
const ZERO_DURATION: &str = "com.openfaas.scale.zero-duration";
const TYPE: &str = "com.openfaas.scale.type";
const TARGET: &str = "com.openfaas.scale.target";
const PROPORTION: &str = "com.openfaas.scale.target-proportion";
const DOWN_WINDOW: &str = "com.openfaas.scale.down.window";

/// Labels that mean scaling by load, and nothing else.
const BY_LOAD: [&str; 6] = [ZERO, ZERO_DURATION, TYPE, TARGET, PROPORTION, DOWN_WINDOW];

/// The longest [`DOWN_WINDOW`]: what was recommended is remembered for as long.
const LONGEST_DOWN_WINDOW: Duration = Duration::from_secs(3600);

/// What a replica's load is measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Calls that begin in a second.
    Rps,
    /// Calls in flight.
    Capacity,
    /// Millicores, as the provider reports them.
    Cpu,
}

/// How a function wants to be scaled.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// `com.openfaas.scale.min`
    pub min: u64,
    /// `com.openfaas.scale.max`, never below `min`.
    pub max: u64,
    /// `com.openfaas.scale.zero`, `.zero-duration`: how long without a call until it goes to zero, if it may.
    pub zero_after: Option<Duration>,
    /// `com.openfaas.scale.type`
    pub kind: Kind,
    /// `com.openfaas.scale.target`: the load that a replica is meant for.
    pub target: f64,
    /// `com.openfaas.scale.target-proportion`: how much of it is to be used.
    pub proportion: f64,
    /// `com.openfaas.scale.down.window`: replicas go only when they were too many for so long.
    pub down_window: Duration,
}

/// A label whose value means nothing, and what holds instead.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BadLabel {
    pub label: &'static str,
    pub value: String,
    pub expected: &'static str,
    pub instead: String,
}

impl Kind {
    /// As the label and the metrics write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Rps => "rps",
            Self::Capacity => "capacity",
            Self::Cpu => "cpu",
        }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            min: 1,
            max: 20,
            zero_after: None,
            kind: Kind::Rps,
            target: 50.0,
            proportion: 0.9,
            down_window: Duration::ZERO,
        }
    }
}

impl Policy {
    /// Reads labels. One that means nothing counts as absent, and is reported.
    pub fn from_labels(labels: &Labels) -> (Self, Vec<BadLabel>) {
        let standard = Self::default();
        let mut read = Read { labels, bad: Vec::new() };
        let min = read.label(MIN, "a whole number", "1", |text| text.parse().ok());
        let min = min.unwrap_or(standard.min);
        let kind = read.label(TYPE, "rps, capacity or cpu", "rps", |text| match text {
            "rps" => Some(Kind::Rps),
            "capacity" => Some(Kind::Capacity),
            "cpu" => Some(Kind::Cpu),
            _ => None,
        });
        let zero = read.label(ZERO, "true or false", "false", |text| match text {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        });
        let after = read.label(ZERO_DURATION, duration::EXPECTED, "15m", duration::parse);
        let after = after.unwrap_or(Duration::from_secs(15 * 60));
        let target = read.label(TARGET, "a number above 0", "50", |text| {
            text.parse().ok().filter(|target: &f64| target.is_finite() && *target > 0.0)
        });
        let proportion = read.label(PROPORTION, "a number above 0 and at most 1", "0.90", |text| {
            text.parse().ok().filter(|part: &f64| *part > 0.0 && *part <= 1.0)
        });
        let down = read.label(DOWN_WINDOW, "a duration of at most 1h", "0s", |text| {
            duration::parse(text).filter(|window| *window <= LONGEST_DOWN_WINDOW)
        });
        // A function that may have more than the usual at least may have as many at most.
        let most = standard.max.max(min);
        let max =
            read.label(MAX, "a whole number, and not below the min", &most.to_string(), |t| {
                t.parse().ok().filter(|max| *max >= min.max(1))
            });
        let policy = Self {
            min,
            max: max.unwrap_or(most),
            zero_after: zero.unwrap_or(false).then_some(after),
            kind: kind.unwrap_or(standard.kind),
            target: target.unwrap_or(standard.target),
            proportion: proportion.unwrap_or(standard.proportion),
            down_window: down.unwrap_or(standard.down_window),
        };
        (policy, read.bad)
    }
}

/// Whether a function with these labels is scaled by its load: it says something about scaling, and has room for it.
/// One that only has bounds and `factor: 0`, which is how alerts are told to leave it alone, is left alone here too.
pub fn owns(labels: &Labels) -> bool {
    let has = |label: &&str| labels.contains_key(*label);
    let frozen = labels.get(FACTOR).is_some_and(|factor| factor.trim() == "0");
    let asked = BY_LOAD.iter().any(has) || (!frozen && [MIN, MAX].iter().any(has));
    if !asked {
        return false;
    }
    let (policy, _) = Policy::from_labels(labels);
    policy.max > policy.min || policy.zero_after.is_some()
}

/// Reads labels, and gathers those that mean nothing.
struct Read<'a> {
    labels: &'a Labels,
    bad: Vec<BadLabel>,
}

impl Read<'_> {
    fn label<T>(
        &mut self,
        label: &'static str,
        expected: &'static str,
        instead: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.labels.get(label)?;
        let parsed = parse(text.trim());
        if parsed.is_none() {
            // Labels come from whoever deploys; a log line is not the place for all they may write.
            let value = text.chars().take(64).collect();
            self.bad.push(BadLabel { label, value, expected, instead: instead.to_owned() });
        }
        parsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(list: &[(&str, &str)]) -> Labels {
        let label = |(name, value): &(&str, &str)| {
            (format!("com.openfaas.scale.{name}"), (*value).to_owned())
        };
        list.iter().map(label).collect()
    }

    #[test]
    fn labels_say_how_a_function_is_scaled() {
        let (policy, bad) = Policy::from_labels(&labels(&[
            ("min", "2"),
            ("max", " 7 "),
            ("zero", "true"),
            ("zero-duration", "90s"),
            ("type", "capacity"),
            ("target", "2.5"),
            ("target-proportion", "1"),
            ("down.window", "5m"),
        ]));
        assert_eq!(bad, []);
        let expect = Policy {
            min: 2,
            max: 7,
            zero_after: Some(Duration::from_secs(90)),
            kind: Kind::Capacity,
            target: 2.5,
            proportion: 1.0,
            down_window: Duration::from_secs(300),
        };
        assert_eq!(policy, expect);
    }

    #[test]
    fn a_label_that_means_nothing_counts_as_absent_and_is_reported() {
        for (name, value) in [
            ("min", "-1"),
            ("min", "two"),
            ("max", ""),
            ("max", "0"),
            ("max", "1.5"),
            ("zero", "yes"),
            ("zero-duration", "soon"),
            ("type", "memory"),
            ("target", "0"),
            ("target", "NaN"),
            ("target", "inf"),
            ("target", "-3"),
            ("target-proportion", "1.5"),
            ("target-proportion", "0"),
            ("target-proportion", "NaN"),
            ("down.window", "2h"),
        ] {
            let (policy, bad) = Policy::from_labels(&labels(&[(name, value)]));
            assert_eq!(policy, Policy::default(), "{name}: {value}");
            let [bad] = &bad[..] else { panic!("{name}: {value} gives {bad:?}") };
            assert!(bad.label.ends_with(name) && bad.value == value, "{bad:?}");
        }
    }

    #[test]
    fn the_most_are_never_below_the_least() {
        let bounds = |list: &[(&str, &str)]| {
            let (policy, bad) = Policy::from_labels(&labels(list));
            (policy.min, policy.max, bad.len())
        };
        assert_eq!(bounds(&[("min", "3"), ("max", "3")]), (3, 3, 0));
        assert_eq!(bounds(&[("min", "30")]), (30, 30, 0));
        assert_eq!(bounds(&[("min", "5"), ("max", "2")]), (5, 20, 1));
        assert_eq!(bounds(&[("min", "30"), ("max", "2")]), (30, 30, 1));
    }

    #[test]
    fn a_function_is_owned_when_it_says_something_and_has_room() {
        for (list, expect) in [
            (&[][..], false),
            (&[("factor", "20")], false),
            (&[("max", "5")], true),
            (&[("min", "2")], true),
            (&[("type", "capacity")], true),
            (&[("max", "1")], false),
            (&[("min", "4"), ("max", "4")], false),
            (&[("min", "4"), ("max", "4"), ("zero", "true")], true),
            (&[("max", "5"), ("factor", "0")], false),
            (&[("max", "5"), ("factor", "0"), ("type", "rps")], true),
            (&[("zero", "true"), ("factor", "0")], true),
        ] {
            assert_eq!(owns(&labels(list)), expect, "{list:?}");
        }
    }
}
