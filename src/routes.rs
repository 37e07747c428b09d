//! The URL tables of the public and the internal port, and the service of a proxy thread. The tables are the API
//! reference.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod host;
mod request;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, options, post};
use http::header::UPGRADE;
use http::{Method, Request, StatusCode, Version};
use hyper::body::{Body, Incoming};
use hyper::service::{Service, service_fn};
use tower::ServiceExt;

use crate::allowed_hosts::InternalHosts;
use crate::async_api::{admin, unsupported_method};
use crate::deadlines::BodyState;
use crate::error::Error;
use crate::function::has_dot_segment;
use crate::invoke::{self, Invoker};
use crate::metrics::Metrics;
use crate::proxy::body::ClientBody;
use crate::readiness::Readiness;
use crate::response_body::{BodySource, TrackedBody, early};
use crate::routes::request::{EarlyResponse, adapt_to_http_1_0, check, set_connection_close};
use crate::serve::client_connection::ClientConnection;
use crate::shutdown::ShutdownPhases;
use crate::system::{self, ApiState};
use crate::trace::{RequestObserver, RequestSpan};
use crate::{alerts, async_api, auth, health, logs, metrics, same_origin, ui};

/// Router of the public port. Requests to functions and calls to enqueue are matched before, in
/// [`GatewayService::classify`].
pub fn api(api: Arc<ApiState>) -> Router {
    let system = Router::new()
        .route(
            "/system/functions",
            get(system::list).post(system::change).put(system::change).delete(system::change),
        )
        .route("/system/function/{name}", get(system::proxy_named))
        .route("/system/scale-function/{name}", post(system::scale))
        .route(
            "/system/secrets",
            get(system::proxy).post(system::proxy).put(system::proxy).delete(system::proxy),
        )
        .route("/system/namespaces", get(system::proxy))
        // The name is in the body.
        .route(
            "/system/namespace/",
            get(system::proxy).post(system::proxy).put(system::proxy).delete(system::proxy),
        )
        .route(
            "/system/namespace/{name}",
            get(system::proxy_named)
                .post(system::proxy_named)
                .put(system::proxy_named)
                .delete(system::proxy_named),
        )
        .route("/system/info", get(system::info))
        .route("/system/telemetry", get(system::proxy))
        .route("/system/logs", get(logs::logs))
        .route("/system/alert", post(alerts::alert))
        .route("/system/queues", get(admin::queues))
        .route("/system/queues/purge", post(admin::purge))
        .route("/system/calls", get(admin::calls))
        .route("/system/calls/{id}", delete(admin::cancel))
        .route("/system/calls/{id}/retry", post(admin::retry))
        .route_layer(from_fn_with_state(Arc::clone(&api), auth::guard))
        .route_layer(from_fn_with_state(api.allowed_hosts, same_origin::guard))
        .route_layer(from_fn_with_state(Arc::clone(&api.metrics), metrics::count_request));
    let page = Router::new()
        .route("/ui/", get(ui::page))
        .route("/ui/{file}", get(ui::file))
        .route_layer(from_fn_with_state(Arc::clone(&api), auth::guard));
    let calls = get(async_api::status).delete(async_api::cancel).options(async_api::preflight);
    let results = get(async_api::result).options(async_api::preflight);
    let queued = Router::new()
        .route(
            "/async-function/{name}",
            calls.fallback(|| unsupported_method("POST, GET, HEAD, DELETE, OPTIONS")),
        )
        .route(
            "/async-function/{name}/",
            options(async_api::preflight).fallback(|| unsupported_method("POST, OPTIONS")),
        )
        .route(
            "/async-function/{name}/{*rest}",
            results.fallback(|| unsupported_method("POST, GET, HEAD, OPTIONS")),
        )
        .route_layer(from_fn(async_api::cors))
        .route_layer(from_fn_with_state(Arc::clone(&api.metrics), metrics::count_request));
    let public = Router::new()
        .route("/", get(ui::redirect))
        .route("/ui", get(ui::redirect))
        .route("/healthz", get(health::provider))
        .route("/_/healthz", get(health::live))
        .route("/_/ready", get(health::ready));
    Router::new()
        .merge(system)
        .merge(page)
        .merge(queued)
        .merge(public)
        .fallback(|| async { Error::NoSuchPath })
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(api)
}

/// Router of the internal (metrics) port.
pub fn internal(metrics: Arc<Metrics>, hosts: InternalHosts) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .route_layer(from_fn_with_state(Arc::new(hosts), same_origin::guard_internal))
        .route("/healthz", get(|| async { "OK" }))
        // For probes: this port responds when the public one has reached its connection limit.
        .route("/_/healthz", get(health::live))
        .fallback(|| async { Error::NoSuchPath })
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(metrics)
}

/// Router of a worker's port.
pub fn worker(metrics: Arc<Metrics>, hosts: InternalHosts, readiness: Arc<Readiness>) -> Router {
    internal(metrics, hosts)
        .route("/_/ready", get(|| async move { health::readiness_response(&readiness) }))
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> Response {
    const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
    match metrics.render() {
        Ok(text) => ([(http::header::CONTENT_TYPE, TEXT)], text).into_response(),
        Err(error) => {
            Error::Provider(format!("cannot render the metrics: {error}")).into_response()
        }
    }
}

/// The router adds `Allow`.
async fn method_not_allowed() -> (StatusCode, &'static str) {
    (StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
}

/// HTTP service of the public port. One per proxy thread.
pub struct GatewayService {
    pub invoker: Invoker,
    pub api: Arc<ApiState>,
    /// The router made by [`api`].
    pub router: Router,
    pub phases: ShutdownPhases,
    /// Access log and traces, if enabled.
    pub observer: Option<Arc<RequestObserver>>,
}

/// A classified request, before its response.
pub struct AcceptedRequest {
    dispatch: Dispatch,
    /// The client uses HTTP/1.0.
    is_http_1_0: bool,
    span: Option<Box<RequestSpan>>,
}

/// What handles a request.
enum Dispatch {
    Invoke(invoke::PreparedInvocation),
    /// Enqueue a call; the route under which it is counted.
    Enqueue(Box<Request<Incoming>>, &'static str),
    /// A request to the API, whose head has been checked.
    Api(Box<Request<Incoming>>),
    Reject(Box<http::Response<TrackedBody>>),
}

impl GatewayService {
    /// Checks and classifies a request. Does not wait.
    pub fn classify(
        &self,
        connection: &ClientConnection,
        mut request: Request<Incoming>,
    ) -> AcceptedRequest {
        let began = connection.deadlines.on_exchange_started();
        let is_http_1_0 = request.version() < Version::HTTP_11;
        let observer = self.observer.as_ref();
        let mut span =
            observer.and_then(|observer| observer.start(connection.address, &mut request, began));
        let dispatch = self.dispatch(connection, request, began);
        if let (Dispatch::Invoke(prepared), Some(span)) = (&dispatch, &mut span) {
            span.on_invocation(prepared.call_id());
        }
        AcceptedRequest { dispatch, is_http_1_0, span }
    }

    fn dispatch(
        &self,
        connection: &ClientConnection,
        mut request: Request<Incoming>,
        began: Instant,
    ) -> Dispatch {
        if !request.body().is_end_stream() {
            connection.deadlines.on_body_announced();
            connection.deadlines.set_body_deadline(began + self.invoker.timeouts.read);
        }
        let checked = check(&mut request).and_then(|()| check_path(request.uri().path()));
        let is_call = request.uri().path().starts_with("/function/");
        match checked {
            Err(EarlyResponse::Error(error)) if is_call => {
                Dispatch::Reject(self.invoker.reject(connection, &error, request.headers()))
            }
            Err(early) => {
                Dispatch::Reject(Box::new(self.track_body(connection, early.into_response())))
            }
            Ok(()) if is_call => self
                .invoker
                .prepare(connection, request, began)
                .map_or_else(Dispatch::Reject, Dispatch::Invoke),
            Ok(()) => match async_api::route(request.method(), request.uri().path()) {
                Some(route) => Dispatch::Enqueue(Box::new(request), route),
                None => Dispatch::Api(Box::new(request)),
            },
        }
    }

    /// Executes the request and returns the response.
    pub async fn respond(
        &self,
        connection: &ClientConnection,
        accepted: AcceptedRequest,
    ) -> Result<http::Response<TrackedBody>, Infallible> {
        let AcceptedRequest { dispatch, is_http_1_0, mut span } = accepted;
        let mut response = match dispatch {
            Dispatch::Invoke(prepared) => {
                self.invoker.execute(connection, prepared, &mut span).await
            }
            // Boxed, so that the rare case does not enlarge the future of every invocation.
            Dispatch::Enqueue(request, route) => self
                .track_body(connection, Box::pin(self.enqueue(connection, *request, route)).await),
            Dispatch::Api(request) => {
                self.track_body(connection, Box::pin(self.call_api(connection, *request)).await)
            }
            Dispatch::Reject(response) => *response,
        };
        if connection.deadlines.body_state() != BodyState::Complete
            && early::must_close(&connection.deadlines, &mut response).await
        {
            set_connection_close(response.headers_mut());
        }
        if let Some(interim) = connection.deadlines.interim() {
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

    async fn enqueue(
        &self,
        connection: &ClientConnection,
        request: Request<Incoming>,
        route: &'static str,
    ) -> Response {
        let began = Instant::now();
        let response =
            async_api::submit(&self.api, connection, api_request(connection, request)).await;
        let metrics = &self.api.metrics;
        metrics.record_api_request(&Method::POST, route, response.status(), began.elapsed());
        response
    }

    async fn call_api(
        &self,
        connection: &ClientConnection,
        request: Request<Incoming>,
    ) -> Response {
        let mut request = api_request(connection, request);
        request.extensions_mut().insert(connection.clone());
        self.router.clone().oneshot(request).await.unwrap_or_else(|never| match never {})
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

fn api_request(
    connection: &ClientConnection,
    request: Request<Incoming>,
) -> Request<axum::body::Body> {
    let deadlines = Arc::clone(&connection.deadlines);
    let mut request = request.map(|body| axum::body::Body::new(ClientBody::new(body, deadlines)));
    // The API supports no change of protocols.
    request.headers_mut().remove(UPGRADE);
    request
}

/// Returns a service that handles all requests of a connection with `router` only.
pub fn router_service(
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
        let checked = check(&mut request);
        let (router, deadlines) = (router.clone(), Arc::clone(&connection.deadlines));
        async move {
            let mut request = request
                .map(|body| axum::body::Body::new(ClientBody::new(body, Arc::clone(&deadlines))));
            if let Some(interim) = deadlines.interim().filter(|_| !is_http_1_0) {
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
            if deadlines.body_state() != BodyState::Complete
                && early::must_close(&deadlines, &mut response).await
            {
                set_connection_close(response.headers_mut());
            }
            if let Some(interim) = deadlines.interim() {
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
