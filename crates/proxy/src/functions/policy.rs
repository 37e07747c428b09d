//! Policies of a function, from its labels and annotations. The only parser of these. No I/O.

pub mod retry;
pub mod scaling;

use std::collections::BTreeMap;

use self::retry::RetryPolicy;
use self::scaling::ScalingPolicy;

/// Labels or annotations.
pub type Values = BTreeMap<String, String>;

/// Prefix of the names that have a meaning for the gateway.
pub(super) const PREFIX: &str = "com.openfaas.";

/// Policies of a function.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FunctionPolicy {
    pub scaling: ScalingPolicy,
    /// The function is scaled by load, not by alerts.
    pub scaled_by_load: bool,
    pub retry: RetryPolicy,
}

/// A label or annotation with an invalid value, and the value used instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidValue {
    /// `Label` or `Annotation`
    pub kind: &'static str,
    pub name: &'static str,
    pub value: String,
    pub expected: &'static str,
    pub fallback: String,
}

impl FunctionPolicy {
    /// Reads labels and annotations. Invalid values count as absent, and are returned.
    pub fn parse(labels: &Values, annotations: &Values) -> (Self, Vec<InvalidValue>) {
        let (mut labels_reader, mut annotations_reader) =
            (ValueReader::new("Label", labels), ValueReader::new("Annotation", annotations));
        let scaling = ScalingPolicy::read(&mut labels_reader);
        let policy = Self {
            scaled_by_load: scaling::is_managed(labels, &scaling),
            scaling,
            retry: RetryPolicy::read(&mut annotations_reader),
        };
        let mut invalid = labels_reader.invalid;
        invalid.append(&mut annotations_reader.invalid);
        (policy, invalid)
    }
}

/// Reads values and collects invalid ones.
struct ValueReader<'a> {
    kind: &'static str,
    values: &'a Values,
    invalid: Vec<InvalidValue>,
}

impl<'a> ValueReader<'a> {
    fn new(kind: &'static str, values: &'a Values) -> Self {
        Self { kind, values, invalid: Vec::new() }
    }

    /// Returns the value called `name` without surrounding spaces.
    fn text(&self, name: &str) -> Option<&'a str> {
        self.values.get(name).map(|text| text.trim())
    }

    fn read<T>(
        &mut self,
        name: &'static str,
        expected: &'static str,
        fallback: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(name)?;
        let parsed = parse(text);
        if parsed.is_none() {
            self.reject(name, text, expected, fallback);
        }
        parsed
    }

    fn reject(&mut self, name: &'static str, text: &str, expected: &'static str, fallback: &str) {
        // Values are user input, so the logged part is limited.
        let value = text.chars().take(64).collect();
        let (kind, fallback) = (self.kind, fallback.to_owned());
        self.invalid.push(InvalidValue { kind, name, value, expected, fallback });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_labels_and_annotations_are_reported_with_what_is_used_instead() {
        let values = |name: &str| Values::from([(name.to_owned(), "many".to_owned())]);
        let (policy, invalid) = FunctionPolicy::parse(
            &values("com.openfaas.scale.max"),
            &values("com.openfaas.retry.attempts"),
        );
        assert_eq!(policy, FunctionPolicy { scaled_by_load: true, ..FunctionPolicy::default() });
        let found: Vec<_> =
            invalid.iter().map(|invalid| (invalid.kind, invalid.fallback.as_str())).collect();
        assert_eq!(found, [("Label", "20"), ("Annotation", "5")]);
    }
}
