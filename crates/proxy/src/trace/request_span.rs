//! One request, as recorded by the access log and by traces.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::header::USER_AGENT;
use http::{HeaderValue, Method, Request, Response, StatusCode};

use crate::error::client_closed_request;
use crate::metrics::calls::Outcome;
use crate::routing::{Destination, RouteMatch};
use crate::trace::config::AccessLogMode;
use crate::trace::context::{Context, new_span_id};
use crate::trace::span::{Span, SpanKind, truncate};
use crate::trace::{RequestObserver, Tracer};
use gateway_http::names::{SYSTEM_PREFIX, X_CALL_ID};

/// Maximum bytes of values that a client controls.
const MAX_PATH_BYTES: usize = 2048;
const MAX_ID_BYTES: usize = 256;

/// Record of a request. Writes the access log and exports the spans when dropped.
#[derive(Debug)]
pub struct RequestSpan {
    observer: Arc<RequestObserver>,
    method: Method,
    path: String,
    route: RouteMatch,
    peer: SocketAddr,
    user_agent: Option<HeaderValue>,
    began: Instant,
    started_at: SystemTime,
    ids: Option<SpanIds>,
    inner: Option<InnerSpan>,
    /// `None` if the client disconnected before the response.
    status: Option<StatusCode>,
    call_id: Option<HeaderValue>,
    /// Bytes of the response body.
    bytes: u64,
    outcome: Outcome,
}

/// Ids of the spans of a request.
#[derive(Debug)]
struct SpanIds {
    tracer: Tracer,
    context: Context,
    server: u64,
    /// Id of the inner span: an invocation, or an enqueue.
    inner: u64,
}

/// Start of the inner operation, and its duration once it has ended.
#[derive(Debug)]
struct InnerSpan {
    started_at: SystemTime,
    began: Instant,
    took: Option<Duration>,
}

/// Response extension: time it took to enqueue the call.
#[derive(Clone, Copy, Debug)]
pub struct PublishTiming(pub Duration);

impl RequestObserver {
    /// Starts the record of `request`, received at `began`; `None` if neither access log nor tracing applies to it.
    /// Sets the trace context of the request.
    pub fn start<B>(
        self: &Arc<Self>,
        peer: SocketAddr,
        request: &mut Request<B>,
        route: RouteMatch,
        began: Instant,
    ) -> Option<Box<RequestSpan>> {
        let ids = self.tracer.as_ref().and_then(|tracer| SpanIds::start(tracer, request, route));
        if ids.is_none() && self.access_log == AccessLogMode::Off {
            return None;
        }
        Some(Box::new(RequestSpan {
            observer: Arc::clone(self),
            method: request.method().clone(),
            path: truncate(request.uri().path(), MAX_PATH_BYTES).to_owned(),
            route,
            peer,
            user_agent: request.headers().get(USER_AGENT).cloned(),
            began,
            started_at: SystemTime::now(),
            ids,
            inner: None,
            status: None,
            call_id: None,
            bytes: 0,
            outcome: Outcome::ClientDisconnected,
        }))
    }
}

impl SpanIds {
    fn start<B>(tracer: &Tracer, request: &mut Request<B>, route: RouteMatch) -> Option<Self> {
        let (context, continued) = tracer.context_for(request.headers());
        let (server, inner) = (new_span_id(), new_span_id());
        // Downstream spans need a parent that is exported.
        let parent = match (context.sampled, route.destination) {
            (true, Destination::Api) => server,
            (true, _) => inner,
            (false, _) if continued => return None,
            (false, _) => server,
        };
        context.child(parent).inject(request.headers_mut(), continued);
        context.sampled.then(|| Self { tracer: tracer.clone(), context, server, inner })
    }
}

impl RequestSpan {
    /// The request is an invocation, which starts now.
    pub fn on_invocation(&mut self, id: &HeaderValue) {
        self.call_id = Some(id.clone());
        self.inner =
            Some(InnerSpan { started_at: SystemTime::now(), began: Instant::now(), took: None });
    }

    /// The response head is available.
    pub fn on_response<B>(&mut self, response: &Response<B>) {
        self.status = Some(response.status());
        if let Some(id) = response.headers().get(X_CALL_ID) {
            self.call_id = Some(id.clone());
        }
        if let Some(InnerSpan { began, took, .. }) = &mut self.inner {
            *took = Some(began.elapsed());
        }
        if let Some(PublishTiming(took)) = response.extensions().get() {
            let now = SystemTime::now();
            let started_at = now.checked_sub(*took).unwrap_or(now);
            self.inner = Some(InnerSpan { started_at, began: Instant::now(), took: Some(*took) });
        }
    }

    /// Counts bytes of the response body.
    pub fn add_response_bytes(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// Ends the span with the outcome of the response.
    pub fn finish(mut self: Box<Self>, outcome: Outcome) {
        self.outcome = outcome;
    }

    fn status(&self) -> u16 {
        self.status.unwrap_or_else(client_closed_request).as_u16()
    }

    fn call_id(&self) -> &str {
        let id = self.call_id.as_ref().and_then(|id| id.to_str().ok());
        truncate(id.unwrap_or_default(), MAX_ID_BYTES)
    }

    /// Returns why the request failed, if it did. A client that disconnects is no failure.
    fn failure(&self) -> Option<String> {
        match (self.outcome, self.status()) {
            (Outcome::UpstreamAborted, _) => Some("the function aborted the response".to_owned()),
            (Outcome::TimedOut, _) => Some("the function did not finish in time".to_owned()),
            (_, status @ 500..) => Some(format!("status {status}")),
            _ => None,
        }
    }

    fn write_access_log(&self, failure: Option<&str>) {
        match (self.observer.access_log, failure) {
            (AccessLogMode::Off, _) | (AccessLogMode::Errors, None) => return,
            (AccessLogMode::On, _) | (AccessLogMode::Errors, Some(_)) => {}
        }
        let text = |value: &Option<HeaderValue>| {
            value
                .as_ref()
                .and_then(|v| v.to_str().ok())
                .map(|v| truncate(v, MAX_ID_BYTES).to_owned())
        };
        tracing::info!(
            target: "access",
            method = truncate(self.method.as_str(), MAX_ID_BYTES),
            path = self.path,
            status = self.status(),
            seconds = self.began.elapsed().as_secs_f64(),
            bytes = self.bytes,
            end = match self.outcome {
                Outcome::Complete => "whole",
                Outcome::UpstreamAborted => "broken",
                Outcome::TimedOut => "timeout",
                Outcome::ClientDisconnected => "left",
            },
            call_id = self.call_id(),
            peer = %self.peer,
            user_agent = text(&self.user_agent),
            failure,
            "Request"
        );
    }

    fn export_spans(&self, ids: &SpanIds, failure: Option<&str>) {
        let template = route_template(self.route.destination, &self.path);
        let mut attributes = vec![
            ("http.request.method", method(&self.method).into()),
            ("url.path", self.path.as_str().into()),
            ("http.response.status_code", self.status().into()),
        ];
        if !self.call_id().is_empty() {
            attributes.push(("gateway.call_id", self.call_id().into()));
        }
        let mut server_span = Span {
            trace: ids.context.trace,
            id: ids.server,
            parent: ids.context.span,
            kind: SpanKind::Server,
            name: format!("{} {}", method(&self.method), template).into(),
            began: self.started_at,
            took: self.began.elapsed(),
            failure: failure.map(str::to_owned),
            attributes,
        };
        if let (Some(inner), Some((kind, name))) = (&self.inner, inner_span(self.route.destination))
        {
            let mut inner_span = Span {
                id: ids.inner,
                parent: ids.server,
                kind,
                name: name.into(),
                began: inner.started_at,
                took: inner.took.unwrap_or_else(|| inner.began.elapsed()),
                ..server_span.clone()
            };
            inner_span.attributes.push(("faas.invoked_name", self.route.name(&self.path).into()));
            ids.tracer.export(inner_span);
        }
        server_span.attributes.push(("http.route", template.into()));
        server_span.attributes.push(("client.address", self.peer.ip().to_string().as_str().into()));
        ids.tracer.export(server_span);
    }
}

impl Drop for RequestSpan {
    fn drop(&mut self) {
        let failure = self.failure();
        self.write_access_log(failure.as_deref());
        if let Some(ids) = self.ids.take() {
            self.export_spans(&ids, failure.as_deref());
        }
    }
}

/// Returns the inner span of a request: kind and name.
fn inner_span(destination: Destination) -> Option<(SpanKind, &'static str)> {
    match destination {
        Destination::Function => Some((SpanKind::Client, "call")),
        Destination::Queue => Some((SpanKind::Producer, "publish")),
        Destination::Api => None,
    }
}

/// Returns the route template of `path`.
fn route_template(destination: Destination, path: &str) -> &'static str {
    match destination {
        Destination::Function => "/function/{name}",
        Destination::Queue => "/async-function/{name}",
        Destination::Api => {
            let known = [SYSTEM_PREFIX, "/ui/", "/_/", "/healthz"];
            known.into_iter().find(|start| path.starts_with(start)).unwrap_or("/")
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
    fn the_template_of_a_route_is_bounded() {
        let template = |path| route_template(RouteMatch::of(path).destination, path);
        assert_eq!(template("/function/echo.fn/a/b"), "/function/{name}");
        assert_eq!(template("/async-function/echo"), "/async-function/{name}");
        assert_eq!(template("/system/functions"), "/system/");
        assert_eq!(template("/anything/else"), "/");
    }
}
