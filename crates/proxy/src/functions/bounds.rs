//! Scaling limits of a function, from its labels. No I/O.

use std::collections::BTreeMap;

/// Scaling limits of a function, from its labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleBounds {
    /// `com.openfaas.scale.min`
    pub min: u64,
    /// `com.openfaas.scale.max`
    pub max: u64,
    /// `com.openfaas.scale.factor`: percent of `max` added by each alert; 0 disables scaling by alerts.
    pub factor: u64,
}

impl ScaleBounds {
    /// Reads the labels. A missing or invalid label has its default.
    pub fn from_labels(labels: &BTreeMap<String, String>) -> Self {
        let label = |name: &str, default| {
            labels.get(name).and_then(|text| text.trim().parse().ok()).unwrap_or(default)
        };
        Self {
            min: label("com.openfaas.scale.min", 1),
            max: label("com.openfaas.scale.max", 20),
            factor: label("com.openfaas.scale.factor", 10).min(100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_labels_have_their_default() {
        let labels = BTreeMap::from([
            ("com.openfaas.scale.min".to_owned(), "two".to_owned()),
            ("com.openfaas.scale.max".to_owned(), " 7 ".to_owned()),
            ("com.openfaas.scale.factor".to_owned(), "900".to_owned()),
        ]);
        assert_eq!(ScaleBounds::from_labels(&labels), ScaleBounds { min: 1, max: 7, factor: 100 });
    }
}
