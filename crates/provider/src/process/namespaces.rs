//! `/system/namespaces` and `/system/namespace/NAME`. The name is in the path, or in the body if the path has none.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use crate::process::requests::{self, read_json_or_default};
use crate::process::spec::is_dns_label;
use crate::process::{ApiError, DEFAULT_NAMESPACE, ProcessProvider};
use crate::types::Namespace;

pub(super) async fn list(State(provider): State<Arc<ProcessProvider>>) -> Json<Vec<String>> {
    Json(provider.table.namespaces())
}

pub(super) async fn get(
    State(provider): State<Arc<ProcessProvider>>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<Json<Namespace>, ApiError> {
    let Namespace { name, .. } = read_namespace(name, body).await?;
    provider.table.namespace(&name).map(Json).ok_or_else(|| ApiError::no_such_namespace(&name))
}

pub(super) async fn create(
    State(provider): State<Arc<ProcessProvider>>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let namespace = read_namespace(name, body).await?;
    if !is_dns_label(&namespace.name) {
        let reason = format!("{:?} is not a name of at most 63 of a-z, 0-9 and -", namespace.name);
        return Err(ApiError::Invalid(reason));
    }
    let create = |provider: &ProcessProvider| {
        if provider.table.has_namespace(&namespace.name) {
            let reason = format!("namespace {} exists already", namespace.name);
            return Err(ApiError::Conflict(reason));
        }
        provider.save_namespace(namespace)
    };
    provider.run_exclusively(create).await.map(|()| StatusCode::CREATED)
}

pub(super) async fn update(
    State(provider): State<Arc<ProcessProvider>>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let namespace = read_namespace(name, body).await?;
    let update = |provider: &ProcessProvider| {
        if !provider.table.has_namespace(&namespace.name) {
            return Err(ApiError::no_such_namespace(&namespace.name));
        }
        provider.save_namespace(namespace)
    };
    provider.run_exclusively(update).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn delete(
    State(provider): State<Arc<ProcessProvider>>,
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
    provider.run_exclusively(move |provider| provider.delete_namespace(&name)).await?;
    Ok(StatusCode::ACCEPTED)
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

impl ProcessProvider {
    fn save_namespace(&self, namespace: Namespace) -> Result<(), ApiError> {
        self.store.save_namespace(&namespace)?;
        self.table.insert_namespace(namespace);
        Ok(())
    }

    /// Deletes a namespace without functions and secrets.
    fn delete_namespace(&self, name: &str) -> Result<(), ApiError> {
        if !self.table.has_namespace(name) {
            return Err(ApiError::no_such_namespace(name));
        }
        if name == DEFAULT_NAMESPACE {
            let reason = format!("{name} is the default namespace and cannot be deleted");
            return Err(ApiError::Conflict(reason));
        }
        let functions = self.list(name).len();
        let secrets = self.launcher.secrets.names(name)?.len();
        if functions + secrets > 0 {
            return Err(ApiError::Conflict(format!(
                "namespace {name} is not empty: it has {functions} functions and {secrets} secrets"
            )));
        }
        self.store.remove_namespace(name)?;
        self.table.remove_namespace(name);
        Ok(())
    }
}
