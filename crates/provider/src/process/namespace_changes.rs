//! Changes of namespaces.

use std::sync::Arc;

use crate::error::ApiError;
use crate::process::{DEFAULT_NAMESPACE, ProcessProvider};
use crate::types::Namespace;

impl ProcessProvider {
    pub(super) async fn create_namespace(
        self: &Arc<Self>,
        namespace: Namespace,
    ) -> Result<(), ApiError> {
        self.run_exclusively(move |provider| {
            if provider.table.has_namespace(&namespace.name) {
                let reason = format!("namespace {} exists already", namespace.name);
                return Err(ApiError::Conflict(reason));
            }
            provider.save_namespace(namespace)
        })
        .await
    }

    pub(super) async fn update_namespace(
        self: &Arc<Self>,
        namespace: Namespace,
    ) -> Result<(), ApiError> {
        self.run_exclusively(move |provider| {
            if !provider.table.has_namespace(&namespace.name) {
                return Err(ApiError::no_such_namespace(&namespace.name));
            }
            provider.save_namespace(namespace)
        })
        .await
    }

    /// Deletes a namespace without functions and secrets.
    pub(super) async fn delete_namespace(self: &Arc<Self>, name: String) -> Result<(), ApiError> {
        self.run_exclusively(move |provider| provider.remove_namespace(&name)).await
    }

    fn save_namespace(&self, namespace: Namespace) -> Result<(), ApiError> {
        self.store.save_namespace(&namespace)?;
        self.table.insert_namespace(namespace);
        Ok(())
    }

    fn remove_namespace(&self, name: &str) -> Result<(), ApiError> {
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
