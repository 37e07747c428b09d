//! A request on its way through the gateway, as the access log and traces tell of it.

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

/// So much is told of what a caller may make as long as it likes.
const LONGEST_PATH: usize = 2048;
const LONGEST_ID: usize = 256;

/// A request that is watched. It is told of when this is dropped.
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
    /// `None`: the caller left before there was an answer.
    status: Option<StatusCode>,
    call_id: Option<HeaderValue>,
    /// Of the answer's body.
    bytes: u64,
    end: End,
}

/// The ids of what is told of it.
#[derive(Debug)]
struct Spans {
    tracer: Tracer,
    context: Context,
    server: u64,
    /// What the gateway does for it: a call, or a call put into the queue.
    inner: u64,
}

/// What the gateway does for it: when that began, and how long it took once it has ended.
#[derive(Debug)]
struct Inner {
    at: SystemTime,
    began: Instant,
    took: Option<Duration>,
}

/// In an answer: a call was put into the queue, which took so long.
#[derive(Clone, Copy, Debug)]
pub struct Stored(pub Duration);

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place<'a> {
    Function(&'a str),
    Queue(&'a str),
    Other(&'static str),
}

impl Observer {
    /// Watches `request`, which began at `began`; `None` if nobody wants to hear of it. The request says from here on
    /// which span it belongs to.
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
        // Nobody must miss the parent of what comes next.
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
    /// It is a call to a function, which begins now.
    pub fn calls(&mut self, id: &HeaderValue) {
        self.call_id = Some(id.clone());
        self.inner = Some(Inner { at: SystemTime::now(), began: Instant::now(), took: None });
    }

    /// The head of the answer is there.
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

    /// So much more of its body is.
    pub fn passed(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// How the answer ended.
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

    /// Why this went wrong, if it did. A caller who leaves may do so.
    fn failure(&self) -> Option<String> {
        match (self.end, self.status()) {
            (End::Broken, _) => Some("the function broke off".to_owned()),
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

    /// What the gateway does for a request there, and with which function.
    fn inner(self) -> Option<(Kind, &'static str, &'a str)> {
        match self {
            Self::Function(name) => Some((Kind::Client, "call", name)),
            Self::Queue(name) => Some((Kind::Producer, "publish", name)),
            Self::Other(_) => None,
        }
    }

    /// What is the same for all paths that lead there.
    fn route(self) -> &'static str {
        match self {
            Self::Function(_) => "/function/{name}",
            Self::Queue(_) => "/async-function/{name}",
            Self::Other(route) => route,
        }
    }
}

/// A method that is known; callers may choose any word.
fn method(method: &Method) -> &str {
    const KNOWN: [Method; 7] = [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::OPTIONS,
        Method::PATCH,
    ];
    if KNOWN.contains(method) { method.as_str() } else { "_OTHER" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_somewhere() {
        assert_eq!(Place::of("/function/echo.fn/a/b"), Place::Function("echo.fn"));
        assert_eq!(Place::of("/async-function/echo"), Place::Queue("echo"));
        assert_eq!(Place::of("/system/functions"), Place::Other("/system/"));
        assert_eq!(Place::of("/anything/else"), Place::Other("/"));
    }
}
