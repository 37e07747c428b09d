//! Scaling policy of a function, from its labels. No I/O.

use std::time::Duration;

use crate::functions::policy::{ValueReader, Values};
use gateway_base::duration;

const MIN: &str = "com.openfaas.scale.min";
const MAX: &str = "com.openfaas.scale.max";
const FACTOR: &str = "com.openfaas.scale.factor";
const ZERO: &str = "com.openfaas.scale.zero";
const ZERO_DURATION: &str = "com.openfaas.scale.zero-duration";
const TYPE: &str = "com.openfaas.scale.type";
const TARGET: &str = "com.openfaas.scale.target";
const PROPORTION: &str = "com.openfaas.scale.target-proportion";
const DOWN_WINDOW: &str = "com.openfaas.scale.down.window";

/// Labels that only apply to scaling by load.
const BY_LOAD: [&str; 6] = [ZERO, ZERO_DURATION, TYPE, TARGET, PROPORTION, DOWN_WINDOW];

/// Maximum of [`DOWN_WINDOW`]: recommendations are kept for that time.
const MAX_DOWN_WINDOW: Duration = Duration::from_secs(3600);

/// Measure of the load of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Calls started per second.
    Rps,
    /// Calls in flight.
    Capacity,
    /// Millicores, as the provider reports them.
    Cpu,
}

/// Scaling policy of a function.
#[derive(Clone, Debug, PartialEq)]
pub struct ScalingPolicy {
    /// `com.openfaas.scale.min`
    pub min: u64,
    /// `com.openfaas.scale.max`, never below `min`.
    pub max: u64,
    /// `com.openfaas.scale.factor`: percent of `max` that an alert adds, at most 100; 0 disables scaling by alerts.
    pub factor: u64,
    /// `com.openfaas.scale.zero`, `.zero-duration`: idle time until the function is scaled to zero; `None` if that is
    /// not allowed.
    pub zero_after: Option<Duration>,
    /// `com.openfaas.scale.type`
    pub kind: Kind,
    /// `com.openfaas.scale.target`: target load of a replica.
    pub target: f64,
    /// `com.openfaas.scale.target-proportion`: proportion of the target to use.
    pub proportion: f64,
    /// `com.openfaas.scale.down.window`: replicas are removed only if they were not needed for this time.
    pub down_window: Duration,
}

impl Kind {
    /// Returns the name in labels and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rps => "rps",
            Self::Capacity => "capacity",
            Self::Cpu => "cpu",
        }
    }
}

impl Default for ScalingPolicy {
    fn default() -> Self {
        Self {
            min: 1,
            max: 20,
            factor: 10,
            zero_after: None,
            kind: Kind::Rps,
            target: 50.0,
            proportion: 0.9,
            down_window: Duration::ZERO,
        }
    }
}

impl ScalingPolicy {
    /// Reads labels.
    pub(super) fn read(reader: &mut ValueReader<'_>) -> Self {
        let default = Self::default();
        let min = reader.read(MIN, "a whole number", "1", |text| text.parse().ok());
        let min = min.unwrap_or(default.min);
        let factor = reader.read(FACTOR, "a whole number", "10", |text| text.parse().ok());
        let kind = reader.read(TYPE, "rps, capacity or cpu", "rps", |text| match text {
            "rps" => Some(Kind::Rps),
            "capacity" => Some(Kind::Capacity),
            "cpu" => Some(Kind::Cpu),
            _ => None,
        });
        let zero = reader.read(ZERO, "true or false", "false", |text| match text {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        });
        let after = reader.read(ZERO_DURATION, duration::EXPECTED, "15m", duration::parse);
        let after = after.unwrap_or(Duration::from_secs(15 * 60));
        let target = reader.read(TARGET, "a number above 0", "50", |text| {
            text.parse().ok().filter(|target: &f64| target.is_finite() && *target > 0.0)
        });
        let proportion =
            reader.read(PROPORTION, "a number above 0 and at most 1", "0.90", |text| {
                text.parse().ok().filter(|part: &f64| *part > 0.0 && *part <= 1.0)
            });
        let down = reader.read(DOWN_WINDOW, "a duration of at most 1h", "0s", |text| {
            duration::parse(text).filter(|window| *window <= MAX_DOWN_WINDOW)
        });
        // A minimum above the default maximum raises the maximum.
        let default_max = default.max.max(min);
        let max = reader.read(
            MAX,
            "a whole number, and not below the min",
            &default_max.to_string(),
            |t| t.parse().ok().filter(|max| *max >= min.max(1)),
        );
        Self {
            min,
            max: max.unwrap_or(default_max),
            factor: factor.unwrap_or(default.factor).min(100),
            zero_after: zero.unwrap_or(false).then_some(after),
            kind: kind.unwrap_or(default.kind),
            target: target.unwrap_or(default.target),
            proportion: proportion.unwrap_or(default.proportion),
            down_window: down.unwrap_or(default.down_window),
        }
    }
}

/// Returns whether a function with these labels is scaled by load: a label requests it, and the bounds leave room.
/// Functions with only bounds and `factor: 0`, which disables scaling by alerts, are not scaled here either.
pub(super) fn is_managed(labels: &Values, policy: &ScalingPolicy) -> bool {
    let has = |label: &&str| labels.contains_key(*label);
    let disabled = labels.get(FACTOR).is_some_and(|factor| factor.trim() == "0");
    let requested = BY_LOAD.iter().any(has) || (!disabled && [MIN, MAX].iter().any(has));
    requested && (policy.max > policy.min || policy.zero_after.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::functions::policy::InvalidValue;

    fn parse(labels: &Values) -> (ScalingPolicy, Vec<InvalidValue>) {
        let mut reader = ValueReader::new("Label", labels);
        (ScalingPolicy::read(&mut reader), reader.invalid)
    }

    fn labels(list: &[(&str, &str)]) -> Values {
        let label = |(name, value): &(&str, &str)| {
            (format!("com.openfaas.scale.{name}"), (*value).to_owned())
        };
        list.iter().map(label).collect()
    }

    #[test]
    fn labels_define_the_policy() {
        let (policy, invalid) = parse(&labels(&[
            ("min", "2"),
            ("max", " 7 "),
            ("factor", "900"),
            ("zero", "true"),
            ("zero-duration", "90s"),
            ("type", "capacity"),
            ("target", "2.5"),
            ("target-proportion", "1"),
            ("down.window", "5m"),
        ]));
        assert_eq!(invalid, []);
        let expect = ScalingPolicy {
            min: 2,
            max: 7,
            factor: 100,
            zero_after: Some(Duration::from_secs(90)),
            kind: Kind::Capacity,
            target: 2.5,
            proportion: 1.0,
            down_window: Duration::from_secs(300),
        };
        assert_eq!(policy, expect);
    }

    #[test]
    fn an_invalid_label_counts_as_absent_and_is_reported() {
        for (name, value) in [
            ("min", "-1"),
            ("min", "two"),
            ("max", ""),
            ("max", "0"),
            ("max", "1.5"),
            ("factor", "-1"),
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
            let (policy, invalid) = parse(&labels(&[(name, value)]));
            assert_eq!(policy, ScalingPolicy::default(), "{name}: {value}");
            let [invalid] = &invalid[..] else { panic!("{name}: {value} gives {invalid:?}") };
            assert!(invalid.name.ends_with(name) && invalid.value == value, "{invalid:?}");
        }
    }

    #[test]
    fn the_maximum_is_never_below_the_minimum() {
        let bounds = |list: &[(&str, &str)]| {
            let (policy, invalid) = parse(&labels(list));
            (policy.min, policy.max, invalid.len())
        };
        assert_eq!(bounds(&[("min", "3"), ("max", "3")]), (3, 3, 0));
        assert_eq!(bounds(&[("min", "30")]), (30, 30, 0));
        assert_eq!(bounds(&[("min", "5"), ("max", "2")]), (5, 20, 1));
        assert_eq!(bounds(&[("min", "30"), ("max", "2")]), (30, 30, 1));
    }

    #[test]
    fn a_function_is_managed_when_labels_request_it_and_the_bounds_leave_room() {
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
            let labels = labels(list);
            assert_eq!(is_managed(&labels, &parse(&labels).0), expect, "{list:?}");
        }
    }
}
