//! Numbers of queued calls.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry,
};

/// Functions that are shown one by one: names that nobody vouches for may be queued while the provider is away.
const MOST: usize = 1000;

/// How often a connection to NATS has come back: that of a gateway, and that of a worker.
pub const GATEWAY_RECONNECTS: &str = "gateway_nats_reconnect_total";
pub const WORKER_RECONNECTS: &str = "queue_worker_nats_reconnect_total";

/// What the queue holds of one function.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// `function_name`
    pub label: String,
    pub pending: u64,
    pub running: u64,
    pub delayed: u64,
    pub dead: u64,
    /// How long the oldest that waits has waited.
    pub oldest: Duration,
}

/// The families of one queue.
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
    shown: Mutex<HashSet<String>>,
}

impl QueueMetrics {
    /// Registers the families of the queue called `name`; `reconnects` is the one of its connection, if it has one.
    pub(super) fn register(
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
                let counter = IntCounter::new(family, "Connections to NATS after the first")?;
                registry.register(Box::new(counter.clone()))?;
                Some(counter)
            }
            None => None,
        };
        Ok(Self {
            name: name.to_owned(),
            submitted: counter(
                "queue_worker_messages_submitted_total",
                "Calls taken into the queue",
            )?,
            processed: counter(
                "queue_worker_messages_processed_total",
                "Queued calls that were settled for good",
            )?,
            attempts: counter("gateway_queue_attempts_total", "Attempts at queued calls")?,
            retries: counter("gateway_queue_retries_total", "Attempts that will be repeated")?,
            dead_letters: counter(
                "gateway_queue_dead_letters_total",
                "Queued calls that were given up",
            )?,
            publish_seconds,
            reconnects,
            gauges: [
                gauge("queue_worker_pending_messages", "Queued calls that could be made now")?,
                gauge("queue_worker_function_invocation_inflight", "Queued calls being made")?,
                gauge("gateway_queue_delayed_messages", "Queued calls whose time has not come")?,
                gauge(
                    "gateway_queue_dead_letter_messages",
                    "Queued calls that were given up and are kept",
                )?,
                gauge(
                    "gateway_queue_oldest_age_seconds",
                    "Age of the oldest call that could be made",
                )?,
            ],
            shown: Mutex::default(),
        })
    }

    /// A call was taken in, and durable after `took`.
    pub fn submitted(&self, took: Duration) {
        self.submitted.inc();
        self.publish_seconds.observe(took.as_secs_f64());
    }

    /// A call is over.
    pub fn processed(&self) {
        self.processed.inc();
    }

    /// A call is made, for the first time or once more.
    pub fn attempted(&self) {
        self.attempts.inc();
    }

    /// A call will be made again.
    pub fn retried(&self) {
        self.retries.inc();
    }

    /// A call was given up.
    pub fn buried(&self) {
        self.processed.inc();
        self.dead_letters.inc();
    }

    /// So often the connection to the queue's server has come back so far.
    pub fn reconnected(&self, times: u64) {
        if let Some(reconnects) = &self.reconnects {
            reconnects.inc_by(times.saturating_sub(reconnects.get()));
        }
    }

    /// What the queue holds now.
    pub fn holds(&self, mut lines: Vec<Line>) {
        lines.sort_unstable_by_key(|line| std::cmp::Reverse(line.pending + line.dead));
        lines.truncate(MOST);
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let now: HashSet<String> = lines.iter().map(|line| line.label.clone()).collect();
        for gone in shown.difference(&now) {
            for gauge in &self.gauges {
                // One that is not there need not be removed.
                let _ = gauge.remove_label_values(&[&self.name, gone]);
            }
        }
        for line in &lines {
            let values =
                [line.pending, line.running, line.delayed, line.dead, line.oldest.as_secs()];
            for (gauge, value) in self.gauges.iter().zip(values) {
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                gauge.with_label_values(&[&self.name, &line.label]).set(value);
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
    fn a_function_without_calls_is_not_shown_any_more() {
        let registry = Registry::new();
        let metrics = QueueMetrics::register(&registry, "q", None).unwrap();
        let text = || TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        metrics.holds(vec![Line { label: "echo.fn".to_owned(), pending: 2, ..Line::default() }]);
        let line = "queue_worker_pending_messages{function_name=\"echo.fn\",queue_name=\"q\"} 2";
        assert!(text().contains(line), "{}", text());
        metrics.holds(Vec::new());
        assert!(!text().contains("echo.fn"), "{}", text());
        metrics.submitted(Duration::from_millis(1));
        assert!(text().contains("queue_worker_messages_submitted_total{queue_name=\"q\"} 1"));
    }
}
