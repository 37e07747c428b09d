//! Routes of the provider's REST API.

use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, any, get, post};
use axum::{Json, Router};
use gateway_base::build_info::BuildInfo;
use gateway_http::names::FUNCTION_PREFIX;
use serde_json::json;

use crate::backend::{Backend, BackendInfo};
use crate::error::ApiError;
use crate::server::{functions, logs, namespaces, secrets};

/// Returns the routes of the whole API. The caller adds authentication.
pub fn router<B: Backend>(backend: B, build: BuildInfo) -> Router {
    let info = system_info(backend.info(), build);
    Router::new()
        .route(&format!("{FUNCTION_PREFIX}{{*path}}"), any(functions::invoke::<B>))
        .route("/system/functions", function_routes())
        .route("/system/function/{name}", get(functions::status::<B>))
        .route("/system/scale-function/{name}", post(functions::scale::<B>))
        .route("/system/secrets", secret_routes())
        .route("/system/namespaces", get(namespaces::list::<B>))
        .route("/system/namespace/", namespace_routes())
        .route("/system/namespace/{name}", namespace_routes())
        .route("/system/logs", get(logs::read::<B>))
        .route("/system/info", get(|| async { info }))
        .route("/healthz", get(|| async { "OK" }))
        .fallback(|| async { ApiError::NotFound("no such path".to_owned()) })
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(backend)
}

fn function_routes<B: Backend>() -> MethodRouter<B> {
    get(functions::list::<B>)
        .post(functions::deploy::<B>)
        .put(functions::update::<B>)
        .delete(functions::delete::<B>)
}

fn secret_routes<B: Backend>() -> MethodRouter<B> {
    get(secrets::list::<B>)
        .post(secrets::create::<B>)
        .put(secrets::update::<B>)
        .delete(secrets::delete::<B>)
}

fn namespace_routes<B: Backend>() -> MethodRouter<B> {
    get(namespaces::get::<B>)
        .post(namespaces::create::<B>)
        .put(namespaces::update::<B>)
        .delete(namespaces::delete::<B>)
}

/// The router adds the `Allow` header.
async fn method_not_allowed() -> (StatusCode, &'static str) {
    (StatusCode::METHOD_NOT_ALLOWED, "method not allowed here\n")
}

fn system_info(backend: BackendInfo, build: BuildInfo) -> impl IntoResponse + Clone {
    Json(json!({
        "provider": backend.provider,
        "version": { "release": build.release, "sha": build.commit },
        "orchestration": backend.orchestration,
    }))
}
