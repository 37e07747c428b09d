//! The URL tables of the public and the internal port. The tables are the API reference.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, options, post};
use futures_util::future::BoxFuture;
use http::{Method, Request, StatusCode};
use tower::ServiceExt;

use crate::async_api::{admin, unsupported_method};
use crate::state::ApiState;
use crate::system;
use crate::{alerts, async_api, auth, health, logs, same_origin, ui};
use gateway_http::allowed_hosts::InternalHosts;
use gateway_http::server::client_connection::ClientConnection;
use gateway_proxy::error::Error;
use gateway_proxy::metrics;
use gateway_proxy::metrics::Metrics;
use gateway_proxy::readiness::Readiness;
use gateway_proxy::routing::{Destination, RouteMatch};
use gateway_proxy::service::Fallback;

/// Handles all requests of the public port that are no synchronous calls. One per proxy thread.
pub struct ApiService {
    api: Arc<ApiState>,
    router: Router,
}

impl ApiService {
    /// Creates the service of a thread.
    pub fn new(api: ApiState) -> Self {
        let api = Arc::new(api);
        Self { router: public(Arc::clone(&api)), api }
    }

    async fn enqueue(
        &self,
        connection: &ClientConnection,
        request: Request<Body>,
        route: RouteMatch,
        label: &'static str,
    ) -> Response {
        let began = Instant::now();
        let response = async_api::submit(&self.api, connection, request, route).await;
        let (metrics, status) = (&self.api.metrics, response.status());
        metrics.record_api_request(&Method::POST, label, status, began.elapsed());
        response
    }
}

impl Fallback for ApiService {
    fn respond<'a>(
        &'a self,
        connection: &'a ClientConnection,
        mut request: Request<Body>,
        route: RouteMatch,
    ) -> BoxFuture<'a, Response> {
        // Calls to enqueue skip the router, whose matching costs more than one comparison.
        if route.destination == Destination::Queue
            && let Some(label) =
                async_api::enqueue_label(request.method(), request.uri().path(), route)
        {
            return Box::pin(self.enqueue(connection, request, route, label));
        }
        request.extensions_mut().insert(connection.clone());
        let response = self.router.clone().oneshot(request);
        Box::pin(async { response.await.unwrap_or_else(|never| match never {}) })
    }
}

/// Router of the public port. Synchronous calls are matched before, in
/// [`GatewayService`](gateway_proxy::service::GatewayService), and calls to enqueue in [`ApiService`].
fn public(api: Arc<ApiState>) -> Router {
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
    let open = Router::new()
        .route("/", get(ui::redirect))
        .route("/ui", get(ui::redirect))
        .route("/healthz", get(health::provider))
        .route("/_/healthz", get(health::live))
        .route("/_/ready", get(health::ready));
    Router::new()
        .merge(system)
        .merge(page)
        .merge(queued)
        .merge(open)
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
