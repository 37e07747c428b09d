//! Metrics of queued calls.

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry,
};

use gateway_base::sync::lock_unpoisoned;

/// Maximum functions with gauges of their own. Unconfirmed names may be queued while the provider is unreachable.
const MAX_FUNCTIONS: usize = 1000;

/// Counters of NATS reconnections: of a gateway, and of a worker.
pub const GATEWAY_RECONNECTS: &str = "gateway_nats_reconnect_total";
pub const WORKER_RECONNECTS: &str = "queue_worker_nats_reconnect_total";

/// Queue depth of one function.
#[derive(Clone, Debug, Default)]
pub struct DepthGauges {
    /// `function_name`
    pub label: String,
    pub pending: u64,
    pub running: u64,
    pub delayed: u64,
    pub dead_letters: u64,
    /// Age of the oldest pending call.
    pub oldest_age: Duration,
}

/// The metrics of one queue.
pub struct QueueMetrics {
    name: String,
    submitted: IntCounter,
    processed: IntCounter,
    attempts: IntCounter,
    retries: IntCounter,
    dead_letters: IntCounter,
    publish_seconds: Histogram,
    reconnects: Option<IntCounter>,
    gauges: [IntGaugeVec; 5],
    /// Functions with gauges. A leaf.
    exported: Mutex<HashSet<String>>,
}

impl QueueMetrics {
    /// Registers the metrics of the queue `name`. `reconnects`: name of its counter of reconnections, if it has one.
    ///
    /// # Errors
    /// The registry has a metric of the same name already.
    pub fn register(
        registry: &Registry,
        name: &str,
        reconnects: Option<&str>,
    ) -> Result<Self, prometheus::Error> {
        let counter = |family: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let vec = IntCounterVec::new(Opts::new(family, help), &["queue_name"])?;
            registry.register(Box::new(vec.clone()))?;
            vec.get_metric_with_label_values(&[name])
        };
        let gauge = |family: &str, help: &str| -> Result<IntGaugeVec, prometheus::Error> {
            let vec = IntGaugeVec::new(Opts::new(family, help), &["queue_name", "function_name"])?;
            registry.register(Box::new(vec.clone()))?;
            Ok(vec)
        };
        let publish_seconds = Histogram::with_opts(
            HistogramOpts::new(
                "gateway_queue_publish_seconds",
                "Time until a queued call was durable",
            )
            .buckets(vec![
                0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
            ]),
        )?;
        registry.register(Box::new(publish_seconds.clone()))?;
        let reconnects = match reconnects {
            Some(family) => {
                let counter = IntCounter::new(family, "Reconnections to NATS")?;
                registry.register(Box::new(counter.clone()))?;
                Some(counter)
            }
            None => None,
        };
        Ok(Self {
            name: name.to_owned(),
            submitted: counter("queue_worker_messages_submitted_total", "Enqueued calls")?,
            processed: counter("queue_worker_messages_processed_total", "Finished queued calls")?,
            attempts: counter("gateway_queue_attempts_total", "Attempts at queued calls")?,
            retries: counter("gateway_queue_retries_total", "Attempts that will be repeated")?,
            dead_letters: counter(
                "gateway_queue_dead_letters_total",
                "Queued calls that became dead letters",
            )?,
            publish_seconds,
            reconnects,
            gauges: [
                gauge("queue_worker_pending_messages", "Pending calls that are due")?,
                gauge("queue_worker_function_invocation_inflight", "Queued calls being executed")?,
                gauge("gateway_queue_delayed_messages", "Pending calls that are not due yet")?,
                gauge("gateway_queue_dead_letter_messages", "Dead letters in the queue")?,
                gauge(
                    "gateway_queue_oldest_age_seconds",
                    "Age of the oldest pending call that is due",
                )?,
            ],
            exported: Mutex::default(),
        })
    }

    /// Counts an enqueued call, durable after `took`.
    pub fn submitted(&self, took: Duration) {
        self.submitted.inc();
        self.publish_seconds.observe(took.as_secs_f64());
    }

    /// Counts a finished call.
    pub fn processed(&self) {
        self.processed.inc();
    }

    /// Counts an attempt.
    pub fn attempted(&self) {
        self.attempts.inc();
    }

    /// Counts an attempt that will be repeated.
    pub fn retried(&self) {
        self.retries.inc();
    }

    /// Counts a dead letter.
    pub fn dead_lettered(&self) {
        self.processed.inc();
        self.dead_letters.inc();
    }

    /// Sets the total number of reconnections so far.
    pub fn reconnected(&self, times: u64) {
        if let Some(reconnects) = &self.reconnects {
            reconnects.inc_by(times.saturating_sub(reconnects.get()));
        }
    }

    /// Sets the gauges to the current depths.
    pub fn set_depths(&self, mut depths: Vec<DepthGauges>) {
        depths.sort_unstable_by_key(|depth| std::cmp::Reverse(depth.pending + depth.dead_letters));
        depths.truncate(MAX_FUNCTIONS);
        let mut exported = lock_unpoisoned(&self.exported);
        let now: HashSet<String> = depths.iter().map(|depth| depth.label.clone()).collect();
        for removed in exported.difference(&now) {
            for gauge in &self.gauges {
                // A missing series is no error.
                let _ = gauge.remove_label_values(&[&self.name, removed]);
            }
        }
        for depth in &depths {
            let values = [
                depth.pending,
                depth.running,
                depth.delayed,
                depth.dead_letters,
                depth.oldest_age.as_secs(),
            ];
            for (gauge, value) in self.gauges.iter().zip(values) {
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                gauge.with_label_values(&[&self.name, &depth.label]).set(value);
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
    fn gauges_of_a_function_without_calls_are_removed() {
        let registry = Registry::new();
        let metrics = QueueMetrics::register(&registry, "q", None).unwrap();
        let text = || TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        metrics.set_depths(vec![DepthGauges {
            label: "echo.fn".to_owned(),
            pending: 2,
            ..DepthGauges::default()
        }]);
        let sample = "queue_worker_pending_messages{function_name=\"echo.fn\",queue_name=\"q\"} 2";
        assert!(text().contains(sample), "{}", text());
        metrics.set_depths(Vec::new());
        assert!(!text().contains("echo.fn"), "{}", text());
        metrics.submitted(Duration::from_millis(1));
        assert!(text().contains("queue_worker_messages_submitted_total{queue_name=\"q\"} 1"));
    }
}
