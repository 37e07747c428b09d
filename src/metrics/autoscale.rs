//! Metrics of the autoscaler.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use prometheus::{GaugeVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

/// State of one function that the autoscaler manages.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaled {
    /// `function_name`
    pub label: String,
    /// `scaling_type`
    pub kind: &'static str,
    /// Load over the stable window, if known.
    pub load: Option<f64>,
    pub desired: u64,
}

/// The metrics of the autoscaler.
pub struct AutoscaleMetrics {
    desired: IntGaugeVec,
    load: GaugeVec,
    decisions: IntCounterVec,
    acting: IntGauge,
    gateways: IntGauge,
    /// Function and scaling type of the exported gauges.
    shown: Mutex<HashSet<(String, &'static str)>>,
    /// Function and reason of the exported decision counters.
    counted: Mutex<HashSet<(String, &'static str)>>,
}

impl AutoscaleMetrics {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let it = Self {
            desired: IntGaugeVec::new(
                Opts::new(
                    "gateway_autoscale_desired_replicas",
                    "Replicas that the function should have.",
                ),
                &["function_name"],
            )?,
            load: GaugeVec::new(
                Opts::new(
                    "gateway_autoscale_load",
                    "Load of all replicas together, over the stable window.",
                ),
                &["function_name", "scaling_type"],
            )?,
            decisions: IntCounterVec::new(
                Opts::new(
                    "gateway_autoscale_decisions_total",
                    "Changes of replicas that the provider has accepted.",
                ),
                &["function_name", "reason"],
            )?,
            acting: IntGauge::new(
                "gateway_autoscale_leader",
                "1 if this gateway is the leader, which scales the functions.",
            )?,
            gateways: IntGauge::new(
                "gateway_autoscale_members",
                "Gateways whose load is added up.",
            )?,
            shown: Mutex::default(),
            counted: Mutex::default(),
        };
        registry.register(Box::new(it.desired.clone()))?;
        registry.register(Box::new(it.load.clone()))?;
        registry.register(Box::new(it.decisions.clone()))?;
        registry.register(Box::new(it.acting.clone()))?;
        registry.register(Box::new(it.gateways.clone()))?;
        Ok(it)
    }

    /// Sets whether this gateway is the leader, and the number of members.
    pub fn stands(&self, acting: bool, gateways: usize) {
        self.acting.set(acting.into());
        self.gateways.set(i64::try_from(gateways).unwrap_or(i64::MAX));
    }

    /// Counts a change that the provider has accepted.
    pub fn scaled(&self, label: &str, reason: &'static str) {
        self.decisions.with_label_values(&[label, reason]).inc();
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.insert((label.to_owned(), reason));
    }

    /// Sets the gauges of all managed functions, and removes those of all others.
    pub fn sees(&self, all: &[Scaled]) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let now: HashSet<_> = all.iter().map(|it| (it.label.clone(), it.kind)).collect();
        let labels: HashSet<&str> = all.iter().map(|it| it.label.as_str()).collect();
        for (label, kind) in shown.difference(&now) {
            // A missing series is no error.
            let _ = self.load.remove_label_values(&[label.as_str(), kind]);
            if !labels.contains(label.as_str()) {
                let _ = self.desired.remove_label_values(&[label]);
            }
        }
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.retain(|(label, reason)| {
            let kept = all.is_empty() || labels.contains(label.as_str());
            if !kept {
                let _ = self.decisions.remove_label_values(&[label.as_str(), reason]);
            }
            kept
        });
        for it in all {
            let desired = i64::try_from(it.desired).unwrap_or(i64::MAX);
            self.desired.with_label_values(&[&it.label]).set(desired);
            match it.load {
                Some(load) => self.load.with_label_values(&[&*it.label, it.kind]).set(load),
                None => {
                    let _ = self.load.remove_label_values(&[&*it.label, it.kind]);
                }
            }
        }
        *shown = now;
    }
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;

    use super::*;

    #[test]
    fn metrics_of_an_unmanaged_function_are_removed() {
        let registry = Registry::new();
        let metrics = AutoscaleMetrics::register(&registry).unwrap();
        let text = || TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        let scaled =
            |name: &str, kind, load| Scaled { label: format!("{name}.fn"), kind, load, desired: 3 };
        metrics.sees(&[scaled("a", "rps", Some(1.5)), scaled("b", "cpu", None)]);
        metrics.scaled("a.fn", "load");
        let line = "gateway_autoscale_load{function_name=\"a.fn\",scaling_type=\"rps\"} 1.5";
        assert!(text().contains(line), "{}", text());
        assert!(text().contains("gateway_autoscale_desired_replicas{function_name=\"b.fn\"} 3"));
        assert!(!text().contains("scaling_type=\"cpu\""));
        metrics.sees(&[scaled("a", "capacity", Some(1.0)), scaled("b", "cpu", None)]);
        assert!(!text().contains("scaling_type=\"rps\""), "{}", text());
        assert!(text().contains("reason=\"load\"} 1"));
        metrics.sees(&[scaled("b", "cpu", None)]);
        assert!(!text().contains("a.fn"), "{}", text());
    }
}
