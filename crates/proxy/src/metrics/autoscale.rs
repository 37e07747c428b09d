//! Metrics of the autoscaler.

use std::collections::HashSet;
use std::sync::Mutex;

use prometheus::{GaugeVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use gateway_base::sync::lock_unpoisoned;

/// State of one function that the autoscaler manages.
#[derive(Clone, Debug, PartialEq)]
pub struct ScaleSample {
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
    leader: IntGauge,
    members: IntGauge,
    /// Function and scaling type of the exported gauges. Rank 2: `counted` is locked under it.
    exported: Mutex<HashSet<(String, &'static str)>>,
    /// Function and reason of the exported decision counters. A leaf; `exported` may be held.
    counted: Mutex<HashSet<(String, &'static str)>>,
}

impl AutoscaleMetrics {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
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
            leader: IntGauge::new(
                "gateway_autoscale_leader",
                "1 if this gateway is the leader, which scales the functions.",
            )?,
            members: IntGauge::new(
                "gateway_autoscale_members",
                "Gateways whose load is added up.",
            )?,
            exported: Mutex::default(),
            counted: Mutex::default(),
        };
        registry.register(Box::new(metrics.desired.clone()))?;
        registry.register(Box::new(metrics.load.clone()))?;
        registry.register(Box::new(metrics.decisions.clone()))?;
        registry.register(Box::new(metrics.leader.clone()))?;
        registry.register(Box::new(metrics.members.clone()))?;
        Ok(metrics)
    }

    /// Sets whether this gateway is the leader, and the number of members.
    pub fn set_leadership(&self, leader: bool, members: usize) {
        self.leader.set(leader.into());
        self.members.set(i64::try_from(members).unwrap_or(i64::MAX));
    }

    /// Counts a change that the provider has accepted.
    pub fn record_decision(&self, label: &str, reason: &'static str) {
        self.decisions.with_label_values(&[label, reason]).inc();
        let mut counted = lock_unpoisoned(&self.counted);
        counted.insert((label.to_owned(), reason));
    }

    /// Sets the gauges of all managed functions, and removes those of all others.
    pub fn set_functions(&self, all: &[ScaleSample]) {
        let mut exported = lock_unpoisoned(&self.exported);
        let now: HashSet<_> =
            all.iter().map(|sample| (sample.label.clone(), sample.kind)).collect();
        let labels: HashSet<&str> = all.iter().map(|sample| sample.label.as_str()).collect();
        for (label, kind) in exported.difference(&now) {
            // A missing series is no error.
            let _ = self.load.remove_label_values(&[label.as_str(), kind]);
            if !labels.contains(label.as_str()) {
                let _ = self.desired.remove_label_values(&[label]);
            }
        }
        let mut counted = lock_unpoisoned(&self.counted);
        counted.retain(|(label, reason)| {
            let kept = all.is_empty() || labels.contains(label.as_str());
            if !kept {
                let _ = self.decisions.remove_label_values(&[label.as_str(), reason]);
            }
            kept
        });
        for sample in all {
            let desired = i64::try_from(sample.desired).unwrap_or(i64::MAX);
            self.desired.with_label_values(&[&sample.label]).set(desired);
            match sample.load {
                Some(load) => self.load.with_label_values(&[&*sample.label, sample.kind]).set(load),
                None => {
                    let _ = self.load.remove_label_values(&[&*sample.label, sample.kind]);
                }
            }
        }
        *exported = now;
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
        let sample = |name: &str, kind, load| ScaleSample {
            label: format!("{name}.fn"),
            kind,
            load,
            desired: 3,
        };
        metrics.set_functions(&[sample("a", "rps", Some(1.5)), sample("b", "cpu", None)]);
        metrics.record_decision("a.fn", "load");
        let line = "gateway_autoscale_load{function_name=\"a.fn\",scaling_type=\"rps\"} 1.5";
        assert!(text().contains(line), "{}", text());
        assert!(text().contains("gateway_autoscale_desired_replicas{function_name=\"b.fn\"} 3"));
        assert!(!text().contains("scaling_type=\"cpu\""));
        metrics.set_functions(&[sample("a", "capacity", Some(1.0)), sample("b", "cpu", None)]);
        assert!(!text().contains("scaling_type=\"rps\""), "{}", text());
        assert!(text().contains("reason=\"load\"} 1"));
        metrics.set_functions(&[sample("b", "cpu", None)]);
        assert!(!text().contains("a.fn"), "{}", text());
    }
}
