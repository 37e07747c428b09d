//! What is told of each request beside its numbers: a line in the access log, and spans for a collector of traces.
//! Both are off unless they are asked for, and then no call waits for either.

pub mod context;
pub mod exporter;
pub mod span;
mod trip;

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::HeaderMap;
use tokio::sync::mpsc;

pub use self::trip::Trip;

use crate::config::Access;
use crate::config::base_url::BaseUrl;
use crate::proxy::client::Client;
use crate::trace::context::{Context, span_id};
use crate::trace::exporter::{Exporter, WAITING};
use crate::trace::span::{Attribute, Kind, Span};

/// Watches requests.
#[derive(Debug)]
pub struct Observer {
    pub access: Access,
    pub tracer: Option<Tracer>,
}

/// Makes spans. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tracer {
    spans: mpsc::Sender<Span>,
    /// So great a part of the traces that begin here is told.
    sampling: f64,
}

/// A piece of work that goes on.
#[derive(Debug)]
pub struct Open {
    tracer: Tracer,
    span: Span,
    began: Instant,
}

impl Tracer {
    /// A tracer, and what sends its spans to `endpoint`.
    pub fn new(
        endpoint: BaseUrl,
        sampling: f64,
        service: &'static str,
        client: Arc<Client>,
    ) -> (Self, Exporter) {
        let (sender, spans) = mpsc::channel(WAITING);
        (Self { spans: sender, sampling }, Exporter { client, endpoint, service, spans })
    }

    /// Where a request with `headers` belongs, and whether it belonged there before it came here.
    fn place(&self, headers: &HeaderMap) -> (Context, bool) {
        match Context::of(headers) {
            Some(context) => (context, true),
            None => (Context::fresh(self.sampling), false),
        }
    }

    /// Begins a piece of work on behalf of a request with `headers`; `None` if nobody wants to hear of it.
    pub fn begin(&self, headers: &HeaderMap, kind: Kind, name: String) -> Option<Open> {
        let (context, _) = self.place(headers);
        self.under(context, kind, name)
    }

    fn under(&self, context: Context, kind: Kind, name: String) -> Option<Open> {
        let span = Span {
            trace: context.trace,
            id: span_id(),
            parent: context.span,
            kind,
            name,
            began: SystemTime::now(),
            took: std::time::Duration::ZERO,
            attributes: Vec::new(),
            failure: None,
        };
        context.sampled.then(|| Open { tracer: self.clone(), span, began: Instant::now() })
    }

    fn tell(&self, span: Span) {
        // A collector that is too slow hears of fewer.
        let _ = self.spans.try_send(span);
    }
}

impl Open {
    /// A part of this piece of work.
    pub fn part(&self, kind: Kind, name: String) -> Option<Self> {
        self.tracer.under(self.context(), kind, name)
    }

    /// What others who work on it are told.
    pub fn context(&self) -> Context {
        Context { trace: self.span.trace, span: self.span.id, sampled: true }
    }

    pub fn note(&mut self, name: &'static str, value: impl Into<Attribute>) {
        self.span.attributes.push((name, value.into()));
    }

    /// It is over, and has failed if there is a `failure`.
    pub fn ended(self, failure: Option<String>) {
        let took = self.began.elapsed();
        self.tracer.tell(Span { took, failure, ..self.span });
    }
}
