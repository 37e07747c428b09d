//! `/system/secrets`. Responses never contain values.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;

use crate::process::requests::{NamespaceQuery, Query, read_json};
use crate::process::secrets::{decode_value, is_secret_name};
use crate::process::{ApiError, ProcessProvider};
use crate::types::Secret;

pub(super) async fn list(
    State(provider): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
) -> Result<Json<Vec<Secret>>, ApiError> {
    let namespace = query.namespace_or_default();
    if !provider.table.has_namespace(&namespace) {
        return Err(ApiError::no_such_namespace(&namespace));
    }
    let secrets = provider.run_exclusively(move |provider| {
        let names = provider.launcher.secrets.names(&namespace)?;
        let secret = |name| Secret { name, namespace: namespace.clone(), ..Secret::default() };
        Ok(names.into_iter().map(secret).collect())
    });
    secrets.await.map(Json)
}

pub(super) async fn create(
    State(provider): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let secret = read_secret(body, &query).await?;
    if !is_secret_name(&secret.name) {
        let reason = format!("{:?} is not a name of a-z, A-Z, 0-9, -, _ and .", secret.name);
        return Err(ApiError::Invalid(reason));
    }
    let create = move |provider: &ProcessProvider| {
        let Secret { name, namespace, .. } = &secret;
        if !provider.table.has_namespace(namespace) {
            return Err(ApiError::no_such_namespace(namespace));
        }
        if provider.launcher.secrets.has(namespace, name) {
            let reason = format!("secret {name} exists already in namespace {namespace}");
            return Err(ApiError::Conflict(reason));
        }
        provider.launcher.secrets.put(namespace, name, &decode_value(&secret)?)?;
        provider.refresh_views(&secret)
    };
    provider.run_exclusively(create).await.map(|()| StatusCode::CREATED)
}

pub(super) async fn update(
    State(provider): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let secret = read_secret(body, &query).await?;
    let update = move |provider: &ProcessProvider| {
        provider.require_secret(&secret)?;
        provider.launcher.secrets.put(&secret.namespace, &secret.name, &decode_value(&secret)?)?;
        provider.refresh_views(&secret)
    };
    provider.run_exclusively(update).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn delete(
    State(provider): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let secret = read_secret(body, &query).await?;
    let delete = move |provider: &ProcessProvider| {
        provider.require_secret(&secret)?;
        provider.launcher.secrets.remove(&secret.namespace, &secret.name)?;
        provider.refresh_views(&secret)
    };
    provider.run_exclusively(delete).await.map(|()| StatusCode::ACCEPTED)
}

/// Reads the secret in the body, and sets its namespace if it has none.
async fn read_secret(body: Body, query: &NamespaceQuery) -> Result<Secret, ApiError> {
    let mut secret: Secret = read_json(body).await?;
    if secret.namespace.is_empty() {
        secret.namespace = query.namespace_or_default();
    }
    if secret.name.is_empty() {
        return Err(ApiError::Invalid("the secret's name is missing".to_owned()));
    }
    Ok(secret)
}

impl ProcessProvider {
    fn require_secret(&self, secret: &Secret) -> Result<(), ApiError> {
        let Secret { name, namespace, .. } = secret;
        // The namespace becomes part of a path, so it is checked first.
        if self.table.has_namespace(namespace) && self.launcher.secrets.has(namespace, name) {
            return Ok(());
        }
        Err(ApiError::NotFound(format!("secret {name} does not exist in namespace {namespace}")))
    }

    /// Updates the views of all functions that use `secret`.
    fn refresh_views(&self, secret: &Secret) -> Result<(), ApiError> {
        for function in self.table.functions() {
            let workload = &function.workload;
            if workload.function.namespace == secret.namespace
                && workload.spec.secrets.contains(&secret.name)
            {
                self.launcher.secrets.refresh_view(&workload.function, &workload.spec.secrets)?;
            }
        }
        Ok(())
    }
}
