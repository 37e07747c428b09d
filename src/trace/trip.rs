//! One request, as recorded by the access log and by traces.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::header::USER_AGENT;
use http::{HeaderValue, Method, Request, Response, StatusCode};

use crate::call_id::X_CALL_ID;
use crate::config::AccessLogMode;
use crate::error::client_left;
use crate::metrics::calls::End;
use crate::trace::context::{Context, span_id};
use crate::trace::span::{Kind, Span, cut};
use crate::trace::{Observer, Tracer};

/// Maximum bytes of values that a client controls.
const LONGEST_PATH: usize = 2048;
const LONGEST_ID: usize = 256;

/// Record of a request. Writes the access log and exports the spans when dropped.
#[derive(Debug)]
pub struct Trip {
    observer: Arc<Observer>,
    method: Method,
    path: String,
    peer: SocketAddr,
    user_agent: Option<HeaderValue>,
    began: Instant,
    at: SystemTime,
    spans: Option<Spans>,
    inner: Option<Inner>,
    /// `None` if the client disconnected before the response.
    status: Option<StatusCode>,
    call_id: Option<HeaderValue>,
    /// Bytes of the response body.
    bytes: u64,
    end: End,
}

/// Ids of the spans of a request.
#[derive(Debug)]
struct Spans {
    tracer: Tracer,
    context: Context,
    server: u64,
    /// Id of the inner span: an invocation, or an enqueue.
    inner: u64,
}

/// Start of the inner operation, and its duration once it has ended.
#[derive(Debug)]
struct Inner {
    at: SystemTime,
    began: Instant,
    took: Option<Duration>,
}

/// Response extension: time it took to enqueue the call.
#[derive(Clone, Copy, Debug)]
pub struct Stored(pub Duration);

/// Kind of route of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place<'a> {
    Function(&'a str),
    Queue(&'a str),
    Other(&'static str),
}

impl Observer {
    /// Starts the record of `request`, received at `began`; `None` if neither access log nor tracing applies to it.
    /// Sets the trace context of the request.
    pub fn begin<B>(
        self: &Arc<Self>,
        peer: SocketAddr,
        request: &mut Request<B>,
        began: Instant,
    ) -> Option<Box<Trip>> {
        let spans = self.tracer.as_ref().and_then(|tracer| Spans::put_on(tracer, request));
        if spans.is_none() && self.access == AccessLogMode::Off {
            return None;
        }
        Some(Box::new(Trip {
            observer: Arc::clone(self),
            method: request.method().clone(),
            path: cut(request.uri().path(), LONGEST_PATH).to_owned(),
            peer,
            user_agent: request.headers().get(USER_AGENT).cloned(),
            began,
            at: SystemTime::now(),
            spans,
            inner: None,
            status: None,
            call_id: None,
            bytes: 0,
            end: End::Left,
        }))
    }
}

impl Spans {
    fn put_on<B>(tracer: &Tracer, request: &mut Request<B>) -> Option<Self> {
        let (context, continued) = tracer.place(request.headers());
        let (server, inner) = (span_id(), span_id());
        // Downstream spans need a parent that is exported.
        let parent = match (context.sampled, Place::of(request.uri().path())) {
            (true, Place::Other(_)) => server,
            (true, _) => inner,
            (false, _) if continued => return None,
            (false, _) => server,
        };
        context.under(parent).put_on(request.headers_mut(), continued);
        context.sampled.then(|| Self { tracer: tracer.clone(), context, server, inner })
    }
}

impl Trip {
    /// The request is an invocation, which starts now.
    pub fn calls(&mut self, id: &HeaderValue) {
        self.call_id = Some(id.clone());
        self.inner = Some(Inner { at: SystemTime::now(), began: Instant::now(), took: None });
    }

    /// The response head is available.
    pub fn answered<B>(&mut self, answer: &Response<B>) {
        self.status = Some(answer.status());
        if let Some(id) = answer.headers().get(X_CALL_ID) {
            self.call_id = Some(id.clone());
        }
        if let Some(Inner { began, took, .. }) = &mut self.inner {
            *took = Some(began.elapsed());
        }
        if let Some(Stored(took)) = answer.extensions().get() {
            let now = SystemTime::now();
            let at = now.checked_sub(*took).unwrap_or(now);
            self.inner = Some(Inner { at, began: Instant::now(), took: Some(*took) });
        }
    }

    /// Counts bytes of the response body.
    pub fn passed(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// Ends the span with the outcome of the response.
    pub fn ended(mut self: Box<Self>, end: End) {
        self.end = end;
    }

    fn status(&self) -> u16 {
        self.status.unwrap_or_else(client_left).as_u16()
    }

    fn call_id(&self) -> &str {
        let id = self.call_id.as_ref().and_then(|id| id.to_str().ok());
        cut(id.unwrap_or_default(), LONGEST_ID)
    }

    /// Returns why the request failed, if it did. A client that disconnects is no failure.
    fn failure(&self) -> Option<String> {
        match (self.end, self.status()) {
            (End::Broken, _) => Some("the function aborted the response".to_owned()),
            (End::TimedOut, _) => Some("the function did not finish in time".to_owned()),
            (_, status @ 500..) => Some(format!("status {status}")),
            _ => None,
        }
    }

    fn log(&self, failure: Option<&str>) {
        match (self.observer.access, failure) {
            (AccessLogMode::Off, _) | (AccessLogMode::Errors, None) => return,
            (AccessLogMode::On, _) | (AccessLogMode::Errors, Some(_)) => {}
        }
        let text = |value: &Option<HeaderValue>| {
            value.as_ref().and_then(|v| v.to_str().ok()).map(|v| cut(v, LONGEST_ID).to_owned())
        };
        tracing::info!(
            target: "access",
            method = cut(self.method.as_str(), LONGEST_ID),
            path = self.path,
            status = self.status(),
            seconds = self.began.elapsed().as_secs_f64(),
            bytes = self.bytes,
            end = match self.end {
                End::Whole => "whole",
                End::Broken => "broken",
                End::TimedOut => "timeout",
                End::Left => "left",
            },
            call_id = self.call_id(),
            peer = %self.peer,
            user_agent = text(&self.user_agent),
            failure,
            "Request"
        );
    }

    fn tell(&self, spans: &Spans, failure: Option<&str>) {
        let place = Place::of(&self.path);
        let mut attributes = vec![
            ("http.request.method", method(&self.method).into()),
            ("url.path", self.path.as_str().into()),
            ("http.response.status_code", self.status().into()),
        ];
        if !self.call_id().is_empty() {
            attributes.push(("gateway.call_id", self.call_id().into()));
        }
        let mut whole = Span {
            trace: spans.context.trace,
            id: spans.server,
            parent: spans.context.span,
            kind: Kind::Server,
            name: format!("{} {}", method(&self.method), place.route()).into(),
            began: self.at,
            took: self.began.elapsed(),
            failure: failure.map(str::to_owned),
            attributes,
        };
        if let (Some(inner), Some((kind, name, function))) = (&self.inner, place.inner()) {
            let mut part = Span {
                id: spans.inner,
                parent: spans.server,
                kind,
                name: name.into(),
                began: inner.at,
                took: inner.took.unwrap_or_else(|| inner.began.elapsed()),
                ..whole.clone()
            };
            part.attributes.push(("faas.invoked_name", function.into()));
            spans.tracer.tell(part);
        }
        whole.attributes.push(("http.route", place.route().into()));
        whole.attributes.push(("client.address", self.peer.ip().to_string().as_str().into()));
        spans.tracer.tell(whole);
    }
}

impl Drop for Trip {
    fn drop(&mut self) {
        let failure = self.failure();
        self.log(failure.as_deref());
        if let Some(spans) = self.spans.take() {
            self.tell(&spans, failure.as_deref());
        }
    }
}

impl<'a> Place<'a> {
    fn of(path: &'a str) -> Self {
        let name = |rest: &'a str| rest.split('/').next().unwrap_or_default();
        if let Some(rest) = path.strip_prefix("/function/") {
            return Self::Function(name(rest));
        }
        if let Some(rest) = path.strip_prefix("/async-function/") {
            return Self::Queue(name(rest));
        }
        let others = ["/system/", "/ui/", "/_/", "/healthz"];
        let other = others.into_iter().find(|start| path.starts_with(start));
        Self::Other(other.unwrap_or("/"))
    }

    /// Returns the inner span of such a request: kind, name, and the function's name.
    fn inner(self) -> Option<(Kind, &'static str, &'a str)> {
        match self {
            Self::Function(name) => Some((Kind::Client, "call", name)),
            Self::Queue(name) => Some((Kind::Producer, "publish", name)),
            Self::Other(_) => None,
        }
    }

    /// Returns the route template.
    fn route(self) -> &'static str {
        match self {
            Self::Function(_) => "/function/{name}",
            Self::Queue(_) => "/async-function/{name}",
            Self::Other(route) => route,
        }
    }
}

/// Returns the method, or `_OTHER` for unknown ones: clients may send any token.
fn method(method: &Method) -> &str {
    const METHODS: [Method; 7] = [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::OPTIONS,
        Method::PATCH,
    ];
    if METHODS.contains(method) { method.as_str() } else { "_OTHER" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_a_route_kind() {
        assert_eq!(Place::of("/function/echo.fn/a/b"), Place::Function("echo.fn"));
        assert_eq!(Place::of("/async-function/echo"), Place::Queue("echo"));
        assert_eq!(Place::of("/system/functions"), Place::Other("/system/"));
        assert_eq!(Place::of("/anything/else"), Place::Other("/"));
    }
}
