//! `/system/namespaces`, and `/system/namespace/NAME`: the name stands in the path, or in the body where the path has
//! none.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use crate::provider::process::requests::{self, json_or_default};
use crate::provider::process::spec::is_label;
use crate::provider::process::{DEFAULT_NAMESPACE, Process, Refusal};
use crate::provider::types::Namespace;

pub(super) async fn list(State(process): State<Arc<Process>>) -> Json<Vec<String>> {
    Json(process.table.namespaces())
}

pub(super) async fn get(
    State(process): State<Arc<Process>>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<Json<Namespace>, Refusal> {
    let Namespace { name, .. } = read(name, body).await?;
    process.table.namespace(&name).map(Json).ok_or_else(|| Refusal::no_namespace(&name))
}

pub(super) async fn create(
    State(process): State<Arc<Process>>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let namespace = read(name, body).await?;
    if !is_label(&namespace.name) {
        let reason = format!("{:?} is not a name of at most 63 of a-z, 0-9 and -", namespace.name);
        return Err(Refusal::Invalid(reason));
    }
    let create = |process: &Process| {
        if process.table.has_namespace(&namespace.name) {
            let reason = format!("namespace {} exists already", namespace.name);
            return Err(Refusal::Conflict(reason));
        }
        process.save_namespace(namespace)
    };
    process.change(create).await.map(|()| StatusCode::CREATED)
}

pub(super) async fn update(
    State(process): State<Arc<Process>>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let namespace = read(name, body).await?;
    let update = |process: &Process| {
        if !process.table.has_namespace(&namespace.name) {
            return Err(Refusal::no_namespace(&namespace.name));
        }
        process.save_namespace(namespace)
    };
    process.change(update).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn delete(
    State(process): State<Arc<Process>>,
    name: Option<Path<String>>,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let name = match name {
        Some(Path(name)) => {
            // Clients send a body; it says nothing that the path does not.
            requests::read(body).await?;
            name
        }
        None => read(None, body).await?.name,
    };
    process.change(move |process| process.delete_namespace(&name)).await?;
    Ok(StatusCode::ACCEPTED)
}

/// The namespace in the body, under the name in the path if there is one.
async fn read(name: Option<Path<String>>, body: Body) -> Result<Namespace, Refusal> {
    let sent: Namespace = json_or_default(body).await?;
    match name {
        Some(Path(name)) => Ok(Namespace { name, ..sent }),
        None if sent.name.is_empty() => Err(Refusal::Invalid(
            "the namespace's name is missing: it stands in the path, or in the body as {\"name\":NAME}"
                .to_owned(),
        )),
        None => Ok(sent),
    }
}

impl Process {
    fn save_namespace(&self, namespace: Namespace) -> Result<(), Refusal> {
        self.store.save_namespace(&namespace)?;
        self.table.insert_namespace(namespace);
        Ok(())
    }

    /// Deletes a namespace that nothing lives in.
    fn delete_namespace(&self, name: &str) -> Result<(), Refusal> {
        if !self.table.has_namespace(name) {
            return Err(Refusal::no_namespace(name));
        }
        if name == DEFAULT_NAMESPACE {
            let reason = format!("{name} is the default namespace and cannot be deleted");
            return Err(Refusal::Conflict(reason));
        }
        let functions = self.list(name).len();
        let secrets = self.runner.secrets.names(name)?.len();
        if functions + secrets > 0 {
            return Err(Refusal::Conflict(format!(
                "namespace {name} is not empty: it has {functions} functions and {secrets} secrets"
            )));
        }
        self.store.remove_namespace(name)?;
        self.table.remove_namespace(name);
        Ok(())
    }
}
