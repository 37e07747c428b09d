//! What is told of each request beside its numbers: a line in the access log, and spans for a collector of traces.
//! Both are off unless they are asked for, and then no call waits for either.

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

/// Watches requests.
#[derive(Debug)]
pub struct Observer {
    pub access: AccessLogMode,
    pub tracer: Option<Tracer>,
}

/// Makes spans. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tracer {
    spans: mpsc::Sender<Span>,
    dropped: SpansDropped,
    /// So great a part of the traces that begin here is told.
    sampling: f64,
}

/// A piece of work that goes on.
#[derive(Debug)]
pub struct Open {
    tracer: Tracer,
    /// `None` once it has been told.
    span: Option<Span>,
    began: Instant,
}

impl Tracer {
    /// A tracer, and what sends its spans to `endpoint` as `service`.
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

    /// Where a request with `headers` belongs, and whether it belonged there before it came here.
    fn place(&self, headers: &HeaderMap) -> (Context, bool) {
        match Context::of(headers) {
            Some(context) => (context, true),
            None => (Context::fresh(self.sampling), false),
        }
    }

    /// Begins work on the queued call `id` with `headers`; `None` if nobody wants to hear of it. All that is done for a
    /// call without a trace belongs to one.
    pub fn begin(&self, id: &str, headers: &HeaderMap, name: &'static str) -> Option<Open> {
        let context = Context::of(headers).unwrap_or_else(|| match Uuid::parse_str(id) {
            Ok(id) => Context::of_id(id, self.sampling),
            Err(_) => Context::fresh(self.sampling),
        });
        self.under(context, Kind::Consumer, name)
    }

    /// Begins a part of the work that `context` tells of.
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
            failure: Some("it was cut short".to_owned()),
        };
        Some(Open { tracer: self.clone(), span: Some(span), began: Instant::now() })
    }

    fn tell(&self, span: Span) {
        // A collector that is too slow hears of fewer.
        if self.spans.try_send(span).is_err() {
            self.dropped.crowded_out();
        }
    }
}

impl Open {
    /// What others who work on it are told.
    pub fn context(&self) -> Option<Context> {
        let span = self.span.as_ref()?;
        Some(Context { trace: span.trace, span: span.id, sampled: true })
    }

    pub fn note(&mut self, name: &'static str, value: impl Into<Attribute>) {
        if let Some(span) = &mut self.span {
            span.attributes.push((name, value.into()));
        }
    }

    /// It is over, and has failed if there is a `failure`.
    pub fn ended(mut self, failure: Option<String>) {
        if let Some(span) = &mut self.span {
            span.failure = failure;
        }
    }
}

impl Drop for Open {
    /// One that did not come to its end is told of all the same: others may be its parts.
    fn drop(&mut self) {
        if let Some(span) = self.span.take() {
            self.tracer.tell(Span { took: self.began.elapsed(), ..span });
        }
    }
}
