//! Health endpoints: liveness and readiness of this process, and health of the provider.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::RETRY_AFTER;

use crate::state::ApiState;
use crate::system::stream_response;
use gateway_http::server::client_connection::ClientConnection;
use gateway_proxy::readiness::Readiness;

/// Returns the response to a readiness probe: 200 or 503, with a JSON body that lists the reasons.
pub fn readiness_response(readiness: &Readiness) -> Response {
    let report = readiness.report();
    if report.ready {
        return Json(report).into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "1")], Json(report)).into_response()
}

/// `GET /_/healthz`: this process alone.
pub async fn live() -> &'static str {
    "OK"
}

/// `GET /_/ready`
pub async fn ready(State(api): State<Arc<ApiState>>) -> Response {
    readiness_response(&api.readiness)
}

/// `GET /healthz`: the provider's health.
pub async fn provider(
    State(api): State<Arc<ApiState>>,
    Extension(connection): Extension<ClientConnection>,
    request: Request,
) -> Response {
    api.send(&connection, &api.provider.origin, request).await.map(stream_response).into_response()
}
