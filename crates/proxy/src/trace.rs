//! Access log and traces: a log line and spans for each request. Both are off by default, and no call waits for either.

pub mod config;
pub mod context;
pub mod exporter;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod request_span;
pub mod span;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::HeaderMap;
use tokio::sync::mpsc;
use uuid::Uuid;

pub use self::config::{AccessLogMode, TracingConfig};
pub use self::request_span::{PublishTiming, RequestSpan};

use crate::metrics::traces::SpansDropped;
use crate::trace::context::{Context, new_span_id};
use crate::trace::exporter::{Exporter, QUEUE_CAPACITY};
use crate::trace::span::{AttributeValue, Span, SpanKind};
use gateway_base::base_url::BaseUrl;
use gateway_http::client::Client;

/// Starts the request spans: access log and tracing.
#[derive(Debug)]
pub struct RequestObserver {
    pub access_log: AccessLogMode,
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
pub struct ActiveSpan {
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
        let (sender, spans) = mpsc::channel(QUEUE_CAPACITY);
        let TracingConfig { headers, sampling_ratio: sampling, .. } = config;
        let exporter_dropped = dropped.clone();
        let exporter =
            Exporter { client, endpoint, headers, service, dropped: exporter_dropped, spans };
        (Self { spans: sender, dropped, sampling }, exporter)
    }

    /// Returns the trace context of a request, and whether the request had one.
    fn context_for(&self, headers: &HeaderMap) -> (Context, bool) {
        match Context::extract(headers) {
            Some(context) => (context, true),
            None => (Context::new_root(self.sampling), false),
        }
    }

    /// Starts a span for the queued call `id`; `None` if its trace is not sampled. A call without a trace context gets
    /// a trace whose id is derived from its own, so that all its attempts belong to one trace.
    pub fn start_span(
        &self,
        id: &str,
        headers: &HeaderMap,
        name: &'static str,
    ) -> Option<ActiveSpan> {
        let context = Context::extract(headers).unwrap_or_else(|| match Uuid::parse_str(id) {
            Ok(id) => Context::from_call_id(id, self.sampling),
            Err(_) => Context::new_root(self.sampling),
        });
        self.child(context, SpanKind::Consumer, name)
    }

    /// Starts a child span of `context`; `None` if its trace is not sampled.
    pub fn child(
        &self,
        context: Context,
        kind: SpanKind,
        name: &'static str,
    ) -> Option<ActiveSpan> {
        if !context.sampled {
            return None;
        }
        let span = Span {
            trace: context.trace,
            id: new_span_id(),
            parent: context.span,
            kind,
            name: name.into(),
            began: SystemTime::now(),
            took: Duration::ZERO,
            attributes: Vec::new(),
            failure: Some("it was interrupted".to_owned()),
        };
        Some(ActiveSpan { tracer: self.clone(), span: Some(span), began: Instant::now() })
    }

    fn export(&self, span: Span) {
        // If the queue of the exporter is full, the span is dropped.
        if self.spans.try_send(span).is_err() {
            self.dropped.queue_full();
        }
    }
}

impl ActiveSpan {
    /// Returns the trace context for child spans.
    pub fn context(&self) -> Option<Context> {
        let span = self.span.as_ref()?;
        Some(Context { trace: span.trace, span: span.id, sampled: true })
    }

    /// Adds an attribute to the span.
    pub fn set_attribute(&mut self, name: &'static str, value: impl Into<AttributeValue>) {
        if let Some(span) = &mut self.span {
            span.attributes.push((name, value.into()));
        }
    }

    /// Ends the span, as failed if there is a `failure`.
    pub fn finish(mut self, failure: Option<String>) {
        if let Some(span) = &mut self.span {
            span.failure = failure;
        }
    }
}

impl Drop for ActiveSpan {
    /// A span that was not ended is exported, too: other spans may be its children.
    fn drop(&mut self) {
        if let Some(span) = self.span.take() {
            self.tracer.export(Span { took: self.began.elapsed(), ..span });
        }
    }
}
