//! Metric of dropped spans.

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

/// Counters of spans that were not exported.
#[derive(Clone, Debug)]
pub struct SpansDropped {
    queue_overflows: IntCounter,
    export_failures: IntCounter,
}

impl SpansDropped {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let dropped = IntCounterVec::new(
            Opts::new("gateway_spans_dropped_total", "Spans that were not exported."),
            &["reason"],
        )?;
        registry.register(Box::new(dropped.clone()))?;
        let of = |reason| dropped.get_metric_with_label_values(&[reason]);
        Ok(Self { queue_overflows: of("queue_full")?, export_failures: of("refused")? })
    }

    /// Counts a span dropped because the export queue is full.
    pub fn queue_full(&self) {
        self.queue_overflows.inc();
    }

    /// Counts spans that the collector rejected, or that could not be sent to it.
    pub fn export_failed(&self, spans: u64) {
        self.export_failures.inc_by(spans);
    }
}
