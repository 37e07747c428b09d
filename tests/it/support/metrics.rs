//! The gateway's metrics, as Prometheus reads them.

/// One scrape.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) text: String,
}

impl Metrics {
    /// Sum of the series `name` that have all of `labels`; `None` if there is none.
    pub(crate) fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let wanted: Vec<_> = labels.iter().map(|(n, v)| format!("{n}=\"{v}\"")).collect();
        let values: Vec<f64> = self
            .series()
            .filter(|(series, _)| series.split('{').next() == Some(name))
            .filter(|(series, _)| wanted.iter().all(|label| series.contains(label)))
            .map(|(_, value)| value.parse().unwrap())
            .collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// Number of calls of `function` that ended with `code`.
    pub(crate) fn calls(&self, function: &str, code: &str) -> u64 {
        let labels = [("function_name", function), ("code", code)];
        self.get("gateway_function_invocation_total", &labels).unwrap_or_default() as u64
    }

    /// Number of calls of `function` in flight.
    pub(crate) fn in_flight(&self, function: &str) -> f64 {
        let labels = [("function_name", function)];
        self.get("gateway_function_invocation_inflight", &labels).unwrap_or_default()
    }

    /// Number of series.
    pub(crate) fn len(&self) -> usize {
        self.series().count()
    }

    fn series(&self) -> impl Iterator<Item = (&str, &str)> {
        self.text.lines().filter(|line| !line.starts_with('#')).filter_map(|l| l.rsplit_once(' '))
    }
}
