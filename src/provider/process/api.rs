//! The provider's REST API.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, get, post};
use axum::{Json, Router};
use serde_json::json;

use crate::provider::process::call::{Call, CallError};
use crate::provider::process::requests::{NamespaceQuery, Query, StatusQuery, function, json};
use crate::provider::process::{Process, Refusal, log_api, namespaces, secret_api};
use crate::provider::types::{DeleteFunction, FunctionDeployment, FunctionStatus, ScaleRequest};

/// An answer is held back for no longer.
const MAX_PATIENCE: Duration = Duration::from_secs(30);

/// The whole API. Authentication is laid around it by whoever serves it.
pub fn router(process: Arc<Process>) -> Router {
    Router::new()
        .route("/function/{*path}", any(call))
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
        .route("/system/namespace/", namespace())
        .route("/system/namespace/{name}", namespace())
        .route("/system/logs", get(log_api::read))
        .route("/system/info", get(info))
        .route("/healthz", get(healthz))
        .fallback(|| async { Refusal::NotFound("no such path".to_owned()) })
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(process)
}

/// The router adds the methods that are, in `Allow`.
async fn method_not_allowed() -> (StatusCode, &'static str) {
    (StatusCode::METHOD_NOT_ALLOWED, "method not allowed here\n")
}

fn namespace() -> MethodRouter<Arc<Process>> {
    get(namespaces::get).post(namespaces::create).put(namespaces::update).delete(namespaces::delete)
}

async fn call(State(process): State<Arc<Process>>, request: Request) -> Response {
    let started = Instant::now();
    // As it was sent: what the router has decoded is not.
    let path = request.uri().path();
    let sent = path.strip_prefix("/function/").unwrap_or_default();
    let (name, path) = match sent.find('/') {
        Some(at) => (&sent[..at], sent[at..].to_owned()),
        None => (sent, "/".to_owned()),
    };
    let function = match function(name, "") {
        Ok(function) => function,
        Err(refusal) => return refusal.into_response(),
    };
    let Some(entry) = process.table.get(&function) else {
        return CallError::NotFound(function).into_response();
    };
    let (head, body) = request.into_parts();
    entry.call(&process.runner, Call { head, body, path, started }).await.into_response()
}

async fn list(
    State(process): State<Arc<Process>>,
    Query(query): Query<NamespaceQuery>,
) -> Json<Vec<FunctionStatus>> {
    Json(process.list(&query.or_default()))
}

async fn deploy(State(process): State<Arc<Process>>, body: Body) -> Result<StatusCode, Refusal> {
    let deployment: FunctionDeployment = json(body).await?;
    process.deploy(deployment).await.map(|()| StatusCode::ACCEPTED)
}

async fn update(State(process): State<Arc<Process>>, body: Body) -> Result<StatusCode, Refusal> {
    let deployment: FunctionDeployment = json(body).await?;
    process.update(deployment).await.map(|()| StatusCode::ACCEPTED)
}

async fn delete(
    State(process): State<Arc<Process>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let named: DeleteFunction = json(body).await?;
    if named.function_name.is_empty() {
        return Err(Refusal::Invalid("functionName is missing".to_owned()));
    }
    let function = match named.namespace.as_str() {
        "" => query.function(&named.function_name)?,
        namespace => function(&named.function_name, namespace)?,
    };
    process.delete(function).await.map(|()| StatusCode::ACCEPTED)
}

async fn status(
    State(process): State<Arc<Process>>,
    Path(name): Path<String>,
    Query(query): Query<StatusQuery>,
    headers: HeaderMap,
) -> Result<Json<FunctionStatus>, Refusal> {
    let function = query.function(&name)?;
    let mut entry = process.entry(&function)?;
    if let Some(patience) = patience(&headers) {
        entry.until_available(patience).await;
        // It may be another version by now, or gone.
        entry = process.entry(&function)?;
    }
    let mut status = entry.status();
    if query.wants_usage() {
        status.usage = Some(entry.workload.activity.usage().await);
    }
    Ok(Json(status))
}

/// For how long the answer may be held back until the function can be called (`Prefer: wait=SECONDS`, RFC 7240).
fn patience(headers: &HeaderMap) -> Option<Duration> {
    let preferences = headers.get("prefer")?.to_str().ok()?.split([',', ';']);
    let wait =
        preferences.filter_map(|preference| preference.trim().strip_prefix("wait=")).next()?;
    Some(Duration::from_secs(wait.trim().parse().ok()?).min(MAX_PATIENCE))
}

async fn scale(
    State(process): State<Arc<Process>>,
    Path(name): Path<String>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let wanted: ScaleRequest = json(body).await?;
    process.scale(query.function(&name)?, wanted.replicas).await?;
    Ok(StatusCode::ACCEPTED)
}

async fn info() -> impl IntoResponse {
    let sha = env!("GATEWAY_COMMIT");
    let version = json!({ "release": env!("CARGO_PKG_VERSION"), "sha": sha });
    Json(json!({ "provider": "process", "version": version, "orchestration": "process" }))
}

async fn healthz() -> &'static str {
    "OK"
}
