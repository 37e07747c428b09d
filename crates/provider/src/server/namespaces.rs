//! `/system/namespaces` and `/system/namespace/NAME`. The name is in the path, or in the body if the path has none.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use gateway_base::function::{DNS_LABEL_RULE, is_dns_label};

use crate::backend::Backend;
use crate::error::ApiError;
use crate::server::requests::{self, read_json_or_default};
use crate::types::Namespace;

pub(super) async fn list<B: Backend>(
    State(backend): State<B>,
) -> Result<Json<Vec<String>>, ApiError> {
    backend.namespaces().await.map(Json)
}

pub(super) async fn get<B: Backend>(
    State(backend): State<B>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<Json<Namespace>, ApiError> {
    let Namespace { name, .. } = read_namespace(name, body).await?;
    backend.namespace(&name).await.map(Json)
}

pub(super) async fn create<B: Backend>(
    State(backend): State<B>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let namespace = read_namespace(name, body).await?;
    if !is_dns_label(&namespace.name) {
        let reason = format!("{:?} is not a name of {DNS_LABEL_RULE}", namespace.name);
        return Err(ApiError::Invalid(reason));
    }
    backend.create_namespace(namespace).await.map(|()| StatusCode::CREATED)
}

pub(super) async fn update<B: Backend>(
    State(backend): State<B>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let namespace = read_namespace(name, body).await?;
    backend.update_namespace(namespace).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn delete<B: Backend>(
    State(backend): State<B>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let name = match name {
        Some(Path(name)) => {
            // Clients send a body as well, which is ignored.
            requests::read_body(body).await?;
            name
        }
        None => read_namespace(None, body).await?.name,
    };
    backend.delete_namespace(name).await.map(|()| StatusCode::ACCEPTED)
}

/// Reads the namespace from the body. A name in the path overrides the one in the body.
async fn read_namespace(name: Option<Path<String>>, body: Body) -> Result<Namespace, ApiError> {
    let sent: Namespace = read_json_or_default(body).await?;
    match name {
        Some(Path(name)) => Ok(Namespace { name, ..sent }),
        None if sent.name.is_empty() => Err(ApiError::Invalid(
            "the namespace's name is missing: add it to the path, or to the body as {\"name\":NAME}"
                .to_owned(),
        )),
        None => Ok(sent),
    }
}
