//! `/system/functions`, `/system/function/NAME`, `/system/scale-function/NAME`, and calls of functions.

use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use gateway_http::names::FUNCTION_PREFIX;

use crate::backend::{Backend, Invocation};
use crate::error::ApiError;
use crate::server::requests::{
    NamespaceQuery, Query, StatusQuery, namespace_or_default, parse_function, read_json,
};
use crate::types::{DeleteFunction, FunctionDeployment, FunctionStatus, ScaleRequest};

/// Maximum time that a status response is delayed.
const MAX_STATUS_WAIT: Duration = Duration::from_secs(30);

pub(super) async fn invoke<B: Backend>(State(backend): State<B>, request: Request) -> Response {
    let started = Instant::now();
    // The raw path: the router's parameters are percent-decoded.
    let path = request.uri().path();
    let sent = path.strip_prefix(FUNCTION_PREFIX).unwrap_or_default();
    let (name, path) = match sent.find('/') {
        Some(at) => (&sent[..at], sent[at..].to_owned()),
        None => (sent, "/".to_owned()),
    };
    let function = match parse_function(name, "", backend.default_namespace()) {
        Ok(function) => function,
        Err(error) => return error.into_response(),
    };
    let (head, body) = request.into_parts();
    backend.invoke(function, Invocation { head, body, path, started }).await
}

pub(super) async fn list<B: Backend>(
    State(backend): State<B>,
    Query(query): Query<NamespaceQuery>,
) -> Result<Json<Vec<FunctionStatus>>, ApiError> {
    let namespace = namespace_or_default(query.namespace, &backend);
    backend.list(&namespace).await.map(Json)
}

pub(super) async fn deploy<B: Backend>(
    State(backend): State<B>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let deployment: FunctionDeployment = read_json(body).await?;
    backend.deploy(deployment).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn update<B: Backend>(
    State(backend): State<B>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let deployment: FunctionDeployment = read_json(body).await?;
    backend.update(deployment).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn delete<B: Backend>(
    State(backend): State<B>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let target: DeleteFunction = read_json(body).await?;
    if target.function_name.is_empty() {
        return Err(ApiError::Invalid("functionName is missing".to_owned()));
    }
    // The namespace in the body overrides that in the query.
    let namespace = match target.namespace.as_str() {
        "" => &query.namespace,
        namespace => namespace,
    };
    let function = parse_function(&target.function_name, namespace, backend.default_namespace())?;
    backend.delete(function).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn status<B: Backend>(
    State(backend): State<B>,
    Path(name): Path<String>,
    Query(query): Query<StatusQuery>,
    headers: HeaderMap,
) -> Result<Json<FunctionStatus>, ApiError> {
    let function = parse_function(&name, &query.namespace, backend.default_namespace())?;
    if let Some(max_wait) = preferred_wait(&headers) {
        backend.watch(&function, max_wait).await?;
    }
    backend.status(&function, query.wants_usage()).await.map(Json)
}

/// Returns how long the response may be delayed until the function is ready (`Prefer: wait=SECONDS`, RFC 7240).
fn preferred_wait(headers: &HeaderMap) -> Option<Duration> {
    let preferences = headers.get("prefer")?.to_str().ok()?.split([',', ';']);
    let wait =
        preferences.filter_map(|preference| preference.trim().strip_prefix("wait=")).next()?;
    Some(Duration::from_secs(wait.trim().parse().ok()?).min(MAX_STATUS_WAIT))
}

pub(super) async fn scale<B: Backend>(
    State(backend): State<B>,
    Path(name): Path<String>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let requested: ScaleRequest = read_json(body).await?;
    let function = parse_function(&name, &query.namespace, backend.default_namespace())?;
    backend.scale(function, requested.replicas).await.map(|()| StatusCode::ACCEPTED)
}
