//! The HTTP service of a proxy thread: checks a request, classifies it, and returns its response.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod host;
mod request;

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::response::{IntoResponse, Response};
use futures_util::future::{BoxFuture, LocalBoxFuture};
use http::header::UPGRADE;
use http::{Request, StatusCode, Version};
use hyper::body::{Body, Incoming};
use hyper::service::{Service, service_fn};
use tower::ServiceExt;

use crate::error::Error;
use crate::invoke::{self, Invoker};
use crate::response_body::{BodySource, TrackedBody, early};
use crate::routing::RouteMatch;
use crate::service::request::{EarlyResponse, adapt_to_http_1_0, check, set_connection_close};
use crate::trace::{RequestObserver, RequestSpan};
use gateway_base::function::has_dot_segment;
use gateway_base::shutdown::ShutdownPhases;
use gateway_http::client::body::ClientBody;
use gateway_http::deadlines::BodyState;
use gateway_http::server::Server;
use gateway_http::server::client_connection::ClientConnection;

/// Handles requests that are no synchronous calls.
pub trait Fallback: Send + Sync {
    /// Returns the response to a request whose head has been checked. Boxed, so that the rare case does not enlarge the
    /// future of every invocation.
    fn respond<'a>(
        &'a self,
        connection: &'a ClientConnection,
        request: Request<axum::body::Body>,
        route: RouteMatch,
    ) -> BoxFuture<'a, Response>;
}

/// HTTP service of the public port. One per proxy thread.
pub struct GatewayService {
    pub invoker: Invoker,
    pub fallback: Box<dyn Fallback>,
    pub phases: ShutdownPhases,
    /// Access log and traces, if enabled.
    pub observer: Option<Arc<RequestObserver>>,
}

/// A classified request, before its response.
struct AcceptedRequest {
    dispatch: Dispatch,
    /// The client uses HTTP/1.0.
    is_http_1_0: bool,
    span: Option<Box<RequestSpan>>,
}

/// What handles a request.
#[expect(
    clippy::large_enum_variant,
    reason = "most requests are invocations, and a box costs each of them an allocation"
)]
enum Dispatch {
    Invoke(invoke::PreparedInvocation),
    /// Any other request, whose head has been checked.
    Fallback(Box<Request<Incoming>>, RouteMatch),
    Reject(Box<http::Response<TrackedBody>>),
}

impl GatewayService {
    /// Serves `listener` with `server` until shutdown. Boxed, so that this crate compiles all of the connection's code.
    ///
    /// # Errors
    /// When the listener cannot be registered with the runtime: nothing is served.
    pub fn serve(
        self: Arc<Self>,
        server: Server,
        listener: TcpListener,
    ) -> LocalBoxFuture<'static, io::Result<()>> {
        Box::pin(server.run(listener, move |connection| {
            let context = Arc::new((Arc::clone(&self), connection));
            service_fn(move |request: Request<Incoming>| {
                let context = Arc::clone(&context);
                let accepted = context.0.classify(&context.1, request);
                async move { context.0.respond(&context.1, accepted).await }
            })
        }))
    }

    /// Checks and classifies a request. Does not wait.
    fn classify(
        &self,
        connection: &ClientConnection,
        mut request: Request<Incoming>,
    ) -> AcceptedRequest {
        let began = connection.deadlines.on_exchange_started();
        let is_http_1_0 = request.version() < Version::HTTP_11;
        let route = RouteMatch::of(request.uri().path());
        let observer = self.observer.as_ref();
        let mut span = observer
            .and_then(|observer| observer.start(connection.address, &mut request, route, began));
        let dispatch = self.dispatch(connection, request, route, began);
        if let (Dispatch::Invoke(prepared), Some(span)) = (&dispatch, &mut span) {
            span.on_invocation(prepared.call_id());
        }
        AcceptedRequest { dispatch, is_http_1_0, span }
    }

    fn dispatch(
        &self,
        connection: &ClientConnection,
        mut request: Request<Incoming>,
        route: RouteMatch,
        began: Instant,
    ) -> Dispatch {
        if !request.body().is_end_stream() {
            connection.deadlines.exchange().on_body_announced();
            connection.deadlines.exchange().set_body_deadline(began + self.invoker.timeouts.read);
        }
        let checked =
            check(&mut request, route.is_call()).and_then(|()| check_path(request.uri().path()));
        match checked {
            Err(EarlyResponse::Error(error)) if route.is_call() => {
                Dispatch::Reject(self.invoker.reject(connection, &error, request.headers()))
            }
            Err(early) => {
                Dispatch::Reject(Box::new(self.track_body(connection, early.into_response())))
            }
            Ok(()) if route.is_call() => self
                .invoker
                .prepare(connection, request, route, began)
                .map_or_else(Dispatch::Reject, Dispatch::Invoke),
            Ok(()) => Dispatch::Fallback(Box::new(request), route),
        }
    }

    /// Executes the request and returns the response.
    async fn respond(
        &self,
        connection: &ClientConnection,
        accepted: AcceptedRequest,
    ) -> Result<http::Response<TrackedBody>, Infallible> {
        let AcceptedRequest { dispatch, is_http_1_0, mut span } = accepted;
        let mut response = match dispatch {
            Dispatch::Invoke(prepared) => {
                self.invoker.execute(connection, prepared, &mut span).await
            }
            Dispatch::Fallback(request, route) => {
                let request = fallback_request(connection, *request);
                let response = self.fallback.respond(connection, request, route).await;
                self.track_body(connection, response)
            }
            Dispatch::Reject(response) => *response,
        };
        if connection.deadlines.exchange().body_state() != BodyState::Complete
            && early::must_close(&connection.deadlines, &mut response).await
        {
            set_connection_close(response.headers_mut());
        }
        if let Some(interim) = connection.deadlines.exchange().interim() {
            // No await follows: interim responses that come later are no longer written.
            interim.final_response_ready();
        }
        if let Some(mut span) = span {
            span.on_response(&response);
            response.body_mut().set_span(span);
        }
        // In a 101, `Connection` names the new protocol.
        if self.phases.is_announced() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            set_connection_close(response.headers_mut());
        }
        if is_http_1_0 {
            adapt_to_http_1_0(&mut response);
        }
        Ok(response)
    }

    fn track_body(
        &self,
        connection: &ClientConnection,
        response: Response,
    ) -> http::Response<TrackedBody> {
        let (deadlines, idle) = (&connection.deadlines, self.invoker.timeouts.idle);
        response
            .map(|body| TrackedBody::new(BodySource::Api(body), None, Arc::clone(deadlines), idle))
    }
}

fn fallback_request(
    connection: &ClientConnection,
    request: Request<Incoming>,
) -> Request<axum::body::Body> {
    let exchange = Arc::clone(connection.deadlines.exchange());
    let mut request = request.map(|body| axum::body::Body::new(ClientBody::new(body, exchange)));
    // Only functions support a change of protocols.
    request.headers_mut().remove(UPGRADE);
    request
}

/// Serves `listener` with `server` until shutdown. All requests are handled by `router`. Boxed as in
/// [`GatewayService::serve`].
///
/// # Errors
/// When the listener cannot be registered with the runtime: nothing is served.
pub fn serve_router(
    router: Router,
    server: Server,
    listener: TcpListener,
) -> BoxFuture<'static, io::Result<()>> {
    let idle = server.timeouts.idle;
    Box::pin(server.run(listener, move |connection| router_service(&router, connection, idle)))
}

/// Returns a service that handles all requests of a connection with `router` only.
fn router_service(
    router: &Router,
    connection: ClientConnection,
    idle: Duration,
) -> impl Service<
    Request<Incoming>,
    Response = http::Response<TrackedBody>,
    Error = Infallible,
    Future: Send,
> + Send
+ use<> {
    let router = router.clone();
    service_fn(move |mut request: Request<Incoming>| {
        connection.deadlines.on_exchange_started();
        let is_http_1_0 = request.version() < Version::HTTP_11;
        let is_call = RouteMatch::of(request.uri().path()).is_call();
        let checked = check(&mut request, is_call);
        let (router, deadlines) = (router.clone(), Arc::clone(&connection.deadlines));
        async move {
            let mut request = request.map(|body| {
                axum::body::Body::new(ClientBody::new(body, Arc::clone(deadlines.exchange())))
            });
            if let Some(interim) = deadlines.exchange().interim().filter(|_| !is_http_1_0) {
                // For functions that the handlers call.
                request.extensions_mut().insert(Arc::clone(interim));
            }
            let mut response = match checked {
                Ok(()) => router.oneshot(request).await.unwrap_or_else(|never| match never {}),
                Err(early) => early.into_response(),
            }
            .map(|body| {
                TrackedBody::new(BodySource::Api(body), None, Arc::clone(&deadlines), idle)
            });
            if deadlines.exchange().body_state() != BodyState::Complete
                && early::must_close(&deadlines, &mut response).await
            {
                set_connection_close(response.headers_mut());
            }
            if let Some(interim) = deadlines.exchange().interim() {
                // No await follows, as in [`GatewayService::respond`].
                interim.final_response_ready();
            }
            if is_http_1_0 {
                adapt_to_http_1_0(&mut response);
            }
            Ok(response)
        }
    })
}

/// Rejects a path that could escape `/function/NAME`.
fn check_path(path: &str) -> Result<(), EarlyResponse> {
    if has_dot_segment(path) {
        return Err(Error::BadRequest("the path has a dot segment".to_owned()).into());
    }
    Ok(())
}
