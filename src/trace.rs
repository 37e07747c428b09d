//! Access log and traces: a log line and spans for each request. Both are off by default, and no call waits for either.

pub mod context;
pub mod exporter;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod span;
mod trip;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::HeaderMap;
use tokio::sync::mpsc;
use uuid::Uuid;

pub use self::trip::{Stored, Trip};

use crate::config::base_url::BaseUrl;
use crate::config::{AccessLogMode, TracingConfig};
use crate::metrics::traces::SpansDropped;
use crate::proxy::client::Client;
use crate::trace::context::{Context, span_id};
use crate::trace::exporter::{Exporter, WAITING};
use crate::trace::span::{Attribute, Kind, Span};

/// Starts the request spans: access log and tracing.
#[derive(Debug)]
pub struct Observer {
    pub access: AccessLogMode,
    pub tracer: Option<Tracer>,
}

/// Creates spans and sends them to the exporter. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tracer {
    spans: mpsc::Sender<Span>,
    dropped: SpansDropped,
    /// Ratio, from 0 to 1, of the traces started here that are exported.
    sampling: f64,
}

/// A span that has not ended. It is exported when dropped.
#[derive(Debug)]
pub struct Open {
    tracer: Tracer,
    /// `None` once exported.
    span: Option<Span>,
    began: Instant,
}

impl Tracer {
    /// Creates a tracer, and the exporter that sends its spans to `endpoint` as `service`.
    pub fn new(
        endpoint: BaseUrl,
        config: TracingConfig,
        service: &'static str,
        client: Arc<Client>,
        dropped: SpansDropped,
    ) -> (Self, Exporter) {
        let (sender, spans) = mpsc::channel(WAITING);
        let TracingConfig { headers, sampling_ratio: sampling, .. } = config;
        let refused = dropped.clone();
        let exporter = Exporter { client, endpoint, headers, service, dropped: refused, spans };
        (Self { spans: sender, dropped, sampling }, exporter)
    }

    /// Returns the trace context of a request, and whether the request had one.
    fn place(&self, headers: &HeaderMap) -> (Context, bool) {
        match Context::of(headers) {
            Some(context) => (context, true),
            None => (Context::fresh(self.sampling), false),
        }
    }

    /// Starts a span for the queued call `id`; `None` if its trace is not sampled. A call without a trace context gets
    /// a trace whose id is derived from its own, so that all its attempts belong to one trace.
    pub fn begin(&self, id: &str, headers: &HeaderMap, name: &'static str) -> Option<Open> {
        let context = Context::of(headers).unwrap_or_else(|| match Uuid::parse_str(id) {
            Ok(id) => Context::of_id(id, self.sampling),
            Err(_) => Context::fresh(self.sampling),
        });
        self.under(context, Kind::Consumer, name)
    }

    /// Starts a child span of `context`; `None` if its trace is not sampled.
    pub fn under(&self, context: Context, kind: Kind, name: &'static str) -> Option<Open> {
        if !context.sampled {
            return None;
        }
        let span = Span {
            trace: context.trace,
            id: span_id(),
            parent: context.span,
            kind,
            name: name.into(),
            began: SystemTime::now(),
            took: Duration::ZERO,
            attributes: Vec::new(),
            failure: Some("it was interrupted".to_owned()),
        };
        Some(Open { tracer: self.clone(), span: Some(span), began: Instant::now() })
    }

    fn tell(&self, span: Span) {
        // If the queue of the exporter is full, the span is dropped.
        if self.spans.try_send(span).is_err() {
            self.dropped.crowded_out();
        }
    }
}

impl Open {
    /// Returns the trace context for child spans.
    pub fn context(&self) -> Option<Context> {
        let span = self.span.as_ref()?;
        Some(Context { trace: span.trace, span: span.id, sampled: true })
    }

    pub fn note(&mut self, name: &'static str, value: impl Into<Attribute>) {
        if let Some(span) = &mut self.span {
            span.attributes.push((name, value.into()));
        }
    }

    /// Ends the span, as failed if there is a `failure`.
    pub fn ended(mut self, failure: Option<String>) {
        if let Some(span) = &mut self.span {
            span.failure = failure;
        }
    }
}

impl Drop for Open {
    /// A span that was not ended is exported, too: other spans may be its children.
    fn drop(&mut self) {
        if let Some(span) = self.span.take() {
            self.tracer.tell(Span { took: self.began.elapsed(), ..span });
        }
    }
}
