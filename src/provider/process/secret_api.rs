//! `/system/secrets`. Values go in and never come out.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;

use crate::provider::process::requests::{NamespaceQuery, Query, json};
use crate::provider::process::secrets::{is_secret_name, value};
use crate::provider::process::{Process, Refusal};
use crate::provider::types::Secret;

pub(super) async fn list(
    State(process): State<Arc<Process>>,
    Query(query): Query<NamespaceQuery>,
) -> Result<Json<Vec<Secret>>, Refusal> {
    let namespace = query.or_default();
    if !process.table.has_namespace(&namespace) {
        return Err(Refusal::no_namespace(&namespace));
    }
    let secrets = process.change(move |process| {
        let names = process.runner.secrets.names(&namespace)?;
        let secret = |name| Secret { name, namespace: namespace.clone(), ..Secret::default() };
        Ok(names.into_iter().map(secret).collect())
    });
    secrets.await.map(Json)
}

pub(super) async fn create(
    State(process): State<Arc<Process>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let secret = read(body, &query).await?;
    if !is_secret_name(&secret.name) {
        let reason = format!("{:?} is not a name of a-z, A-Z, 0-9, -, _ and .", secret.name);
        return Err(Refusal::Invalid(reason));
    }
    let create = move |process: &Process| {
        let Secret { name, namespace, .. } = &secret;
        if !process.table.has_namespace(namespace) {
            return Err(Refusal::no_namespace(namespace));
        }
        if process.runner.secrets.has(namespace, name) {
            let reason = format!("secret {name} exists already in namespace {namespace}");
            return Err(Refusal::Conflict(reason));
        }
        process.runner.secrets.put(namespace, name, &value(&secret)?)?;
        process.refresh_views(&secret)
    };
    process.change(create).await.map(|()| StatusCode::CREATED)
}

pub(super) async fn update(
    State(process): State<Arc<Process>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let secret = read(body, &query).await?;
    let update = move |process: &Process| {
        process.require(&secret)?;
        process.runner.secrets.put(&secret.namespace, &secret.name, &value(&secret)?)?;
        process.refresh_views(&secret)
    };
    process.change(update).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn delete(
    State(process): State<Arc<Process>>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let secret = read(body, &query).await?;
    let delete = move |process: &Process| {
        process.require(&secret)?;
        process.runner.secrets.remove(&secret.namespace, &secret.name)?;
        process.refresh_views(&secret)
    };
    process.change(delete).await.map(|()| StatusCode::ACCEPTED)
}

/// The secret in the body, with its namespace filled in.
async fn read(body: Body, query: &NamespaceQuery) -> Result<Secret, Refusal> {
    let mut secret: Secret = json(body).await?;
    if secret.namespace.is_empty() {
        secret.namespace = query.or_default();
    }
    if secret.name.is_empty() {
        return Err(Refusal::Invalid("the secret's name is missing".to_owned()));
    }
    Ok(secret)
}

impl Process {
    fn require(&self, secret: &Secret) -> Result<(), Refusal> {
        let Secret { name, namespace, .. } = secret;
        // The namespace becomes part of a path, so it has to be a known one first.
        if self.table.has_namespace(namespace) && self.runner.secrets.has(namespace, name) {
            return Ok(());
        }
        Err(Refusal::NotFound(format!("secret {name} does not exist in namespace {namespace}")))
    }

    /// Lets all functions that use `secret` see what has become of it.
    fn refresh_views(&self, secret: &Secret) -> Result<(), Refusal> {
        for entry in self.table.entries() {
            let workload = &entry.workload;
            if workload.function.namespace == secret.namespace
                && workload.spec.secrets.contains(&secret.name)
            {
                self.runner.secrets.refresh_view(&workload.function, &workload.spec.secrets)?;
            }
        }
        Ok(())
    }
}
