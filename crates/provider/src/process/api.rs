//! Routes and handlers of the provider's REST API.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, get, post};
use axum::{Json, Router};
use gateway_base::build_info::BuildInfo;
use serde_json::json;

use crate::process::invocation::{Invocation, InvocationError};
use crate::process::requests::{NamespaceQuery, Query, StatusQuery, parse_function, read_json};
use crate::process::{ApiError, ProcessProvider, log_api, namespaces, secret_api};
use crate::types::{DeleteFunction, FunctionDeployment, FunctionStatus, ScaleRequest};

/// Maximum time that a status response is delayed.
const MAX_STATUS_WAIT: Duration = Duration::from_secs(30);

/// Returns the routes of the whole API. The server adds authentication.
pub fn router(provider: Arc<ProcessProvider>, build: BuildInfo) -> Router {
    Router::new()
        .route("/function/{*path}", any(invoke))
        .route("/system/functions", get(list).post(deploy).put(update).delete(delete))
        .route("/system/function/{name}", get(status))
        .route("/system/scale-function/{name}", post(scale))
        .route(
            "/system/secrets",
            get(secret_api::list)
                .post(secret_api::create)
                .put(secret_api::update)
                .delete(secret_api::delete),
        )
        .route("/system/namespaces", get(namespaces::list))
        .route("/system/namespace/", namespace_routes())
        .route("/system/namespace/{name}", namespace_routes())
        .route("/system/logs", get(log_api::read))
        .route("/system/info", get(move || info(build)))
        .route("/healthz", get(healthz))
        .fallback(|| async { ApiError::NotFound("no such path".to_owned()) })
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(provider)
}

/// The router adds the `Allow` header.
async fn method_not_allowed() -> (StatusCode, &'static str) {
    (StatusCode::METHOD_NOT_ALLOWED, "method not allowed here\n")
}

fn namespace_routes() -> MethodRouter<Arc<ProcessProvider>> {
    get(namespaces::get).post(namespaces::create).put(namespaces::update).delete(namespaces::delete)
}

async fn invoke(State(provider): State<Arc<ProcessProvider>>, request: Request) -> Response {
    let started = Instant::now();
    // The raw path: the router's parameters are percent-decoded.
    let path = request.uri().path();
    let sent = path.strip_prefix("/function/").unwrap_or_default();
    let (name, path) = match sent.find('/') {
        Some(at) => (&sent[..at], sent[at..].to_owned()),
        None => (sent, "/".to_owned()),
    };
    let function = match parse_function(name, "") {
        Ok(function) => function,
        Err(error) => return error.into_response(),
    };
    let Some(deployed) = provider.table.get(&function) else {
        return InvocationError::NotFound(function).into_response();
    };
    let (head, body) = request.into_parts();
    deployed
        .invoke(&provider.launcher, Invocation { head, body, path, started })
        .await
        .into_response()
}

async fn list(
    State(provider): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
) -> Json<Vec<FunctionStatus>> {
    Json(provider.list(&query.namespace_or_default()))
}

async fn deploy(
    State(provider): State<Arc<ProcessProvider>>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let deployment: FunctionDeployment = read_json(body).await?;
    provider.deploy(deployment).await.map(|()| StatusCode::ACCEPTED)
}

async fn update(
    State(provider): State<Arc<ProcessProvider>>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let deployment: FunctionDeployment = read_json(body).await?;
    provider.update(deployment).await.map(|()| StatusCode::ACCEPTED)
}

async fn delete(
    State(provider): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let target: DeleteFunction = read_json(body).await?;
    if target.function_name.is_empty() {
        return Err(ApiError::Invalid("functionName is missing".to_owned()));
    }
    let function = match target.namespace.as_str() {
        "" => query.parse_function(&target.function_name)?,
        namespace => parse_function(&target.function_name, namespace)?,
    };
    provider.delete(function).await.map(|()| StatusCode::ACCEPTED)
}

async fn status(
    State(provider): State<Arc<ProcessProvider>>,
    Path(name): Path<String>,
    Query(query): Query<StatusQuery>,
    headers: HeaderMap,
) -> Result<Json<FunctionStatus>, ApiError> {
    let function = query.parse_function(&name)?;
    let mut deployed = provider.find(&function)?;
    if let Some(max_wait) = preferred_wait(&headers) {
        deployed.wait_available(max_wait).await;
        // The function may have been replaced or deleted during the wait.
        deployed = provider.find(&function)?;
    }
    let mut status = deployed.status();
    if query.wants_usage() {
        status.usage = Some(deployed.workload.activity.usage().await);
    }
    Ok(Json(status))
}

/// Returns how long the response may be delayed until the function is ready (`Prefer: wait=SECONDS`, RFC 7240).
fn preferred_wait(headers: &HeaderMap) -> Option<Duration> {
    let preferences = headers.get("prefer")?.to_str().ok()?.split([',', ';']);
    let wait =
        preferences.filter_map(|preference| preference.trim().strip_prefix("wait=")).next()?;
    Some(Duration::from_secs(wait.trim().parse().ok()?).min(MAX_STATUS_WAIT))
}

async fn scale(
    State(provider): State<Arc<ProcessProvider>>,
    Path(name): Path<String>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let wanted: ScaleRequest = read_json(body).await?;
    provider.scale(query.parse_function(&name)?, wanted.replicas).await?;
    Ok(StatusCode::ACCEPTED)
}

async fn info(build: BuildInfo) -> impl IntoResponse {
    let version = json!({ "release": build.release, "sha": build.commit });
    Json(json!({ "provider": "process", "version": version, "orchestration": "process" }))
}

async fn healthz() -> &'static str {
    "OK"
}
