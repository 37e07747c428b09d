//! Metric of dropped spans.

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

/// Counters of spans that were not exported.
#[derive(Clone, Debug)]
pub struct SpansDropped {
    crowded: IntCounter,
    refused: IntCounter,
}

impl SpansDropped {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let dropped = IntCounterVec::new(
            Opts::new("gateway_spans_dropped_total", "Spans that were not exported."),
            &["reason"],
        )?;
        registry.register(Box::new(dropped.clone()))?;
        let of = |reason| dropped.get_metric_with_label_values(&[reason]);
        Ok(Self { crowded: of("queue_full")?, refused: of("refused")? })
    }

    /// Counts a span dropped because the export queue is full.
    pub fn crowded_out(&self) {
        self.crowded.inc();
    }

    /// Counts spans that the collector rejected, or that could not be sent to it.
    pub fn refused(&self, spans: u64) {
        self.refused.inc_by(spans);
    }
}
