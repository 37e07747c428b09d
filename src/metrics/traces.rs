//! What becomes of spans that nobody takes.

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

/// Spans that no collector has heard of.
#[derive(Clone, Debug)]
pub struct SpansDropped {
    crowded: IntCounter,
    refused: IntCounter,
}

impl SpansDropped {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let dropped = IntCounterVec::new(
            Opts::new("gateway_spans_dropped_total", "Spans that no collector of traces has."),
            &["reason"],
        )?;
        registry.register(Box::new(dropped.clone()))?;
        let of = |reason| dropped.get_metric_with_label_values(&[reason]);
        Ok(Self { crowded: of("queue_full")?, refused: of("refused")? })
    }

    /// More came than the collector takes.
    pub fn crowded_out(&self) {
        self.crowded.inc();
    }

    /// The collector was away, or refused so many.
    pub fn refused(&self, spans: u64) {
        self.refused.inc_by(spans);
    }
}
