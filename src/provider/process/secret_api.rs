//! `/system/secrets`. Values go in and never come out.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;

use crate::provider::process::requests::{NamespaceQuery, Query, read_json};
use crate::provider::process::secrets::{decode_value, is_secret_name};
use crate::provider::process::{ApiError, ProcessProvider};
use crate::provider::types::Secret;

pub(super) async fn list(
    State(process): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
) -> Result<Json<Vec<Secret>>, ApiError> {
    let namespace = query.namespace_or_default();
    if !process.table.has_namespace(&namespace) {
        return Err(ApiError::no_such_namespace(&namespace));
    }
    let secrets = process.run_exclusively(move |process| {
        let names = process.launcher.secrets.names(&namespace)?;
        let secret = |name| Secret { name, namespace: namespace.clone(), ..Secret::default() };
        Ok(names.into_iter().map(secret).collect())
    });
    secrets.await.map(Json)
}

pub(super) async fn create(
    State(process): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let secret = read_secret(body, &query).await?;
    if !is_secret_name(&secret.name) {
        let reason = format!("{:?} is not a name of a-z, A-Z, 0-9, -, _ and .", secret.name);
        return Err(ApiError::Invalid(reason));
    }
    let create = move |process: &ProcessProvider| {
        let Secret { name, namespace, .. } = &secret;
        if !process.table.has_namespace(namespace) {
            return Err(ApiError::no_such_namespace(namespace));
        }
        if process.launcher.secrets.has(namespace, name) {
            let reason = format!("secret {name} exists already in namespace {namespace}");
            return Err(ApiError::Conflict(reason));
        }
        process.launcher.secrets.put(namespace, name, &decode_value(&secret)?)?;
        process.refresh_views(&secret)
    };
    process.run_exclusively(create).await.map(|()| StatusCode::CREATED)
}

pub(super) async fn update(
    State(process): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let secret = read_secret(body, &query).await?;
    let update = move |process: &ProcessProvider| {
        process.require_secret(&secret)?;
        process.launcher.secrets.put(&secret.namespace, &secret.name, &decode_value(&secret)?)?;
        process.refresh_views(&secret)
    };
    process.run_exclusively(update).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn delete(
    State(process): State<Arc<ProcessProvider>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let secret = read_secret(body, &query).await?;
    let delete = move |process: &ProcessProvider| {
        process.require_secret(&secret)?;
        process.launcher.secrets.remove(&secret.namespace, &secret.name)?;
        process.refresh_views(&secret)
    };
    process.run_exclusively(delete).await.map(|()| StatusCode::ACCEPTED)
}

/// The secret in the body, with its namespace filled in.
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
        // The namespace becomes part of a path, so it has to be a known one first.
        if self.table.has_namespace(namespace) && self.launcher.secrets.has(namespace, name) {
            return Ok(());
        }
        Err(ApiError::NotFound(format!("secret {name} does not exist in namespace {namespace}")))
    }

    /// Lets all functions that use `secret` see what has become of it.
    fn refresh_views(&self, secret: &Secret) -> Result<(), ApiError> {
        for entry in self.table.functions() {
            let workload = &entry.workload;
            if workload.function.namespace == secret.namespace
                && workload.spec.secrets.contains(&secret.name)
            {
                self.launcher.secrets.refresh_view(&workload.function, &workload.spec.secrets)?;
            }
        }
        Ok(())
    }
}
