//! Changes of secrets. Functions that use a secret see its new value at the same path.

use std::sync::Arc;

use crate::backend::SecretValue;
use crate::error::ApiError;
use crate::process::ProcessProvider;
use crate::process::secrets::is_secret_name;

impl ProcessProvider {
    /// Returns the names of the secrets in a namespace.
    pub(super) async fn secret_names(
        self: &Arc<Self>,
        namespace: String,
    ) -> Result<Vec<String>, ApiError> {
        self.run_exclusively(move |provider| {
            if !provider.table.has_namespace(&namespace) {
                return Err(ApiError::no_such_namespace(&namespace));
            }
            Ok(provider.launcher.secrets.names(&namespace)?)
        })
        .await
    }

    pub(super) async fn create_secret(
        self: &Arc<Self>,
        secret: SecretValue,
    ) -> Result<(), ApiError> {
        if !is_secret_name(&secret.name) {
            let reason = format!("{:?} is not a name of a-z, A-Z, 0-9, -, _ and .", secret.name);
            return Err(ApiError::Invalid(reason));
        }
        self.run_exclusively(move |provider| {
            let SecretValue { name, namespace, value } = &secret;
            if !provider.table.has_namespace(namespace) {
                return Err(ApiError::no_such_namespace(namespace));
            }
            if provider.launcher.secrets.has(namespace, name) {
                let reason = format!("secret {name} exists already in namespace {namespace}");
                return Err(ApiError::Conflict(reason));
            }
            provider.launcher.secrets.put(namespace, name, value)?;
            provider.refresh_views(namespace, name)
        })
        .await
    }

    pub(super) async fn update_secret(
        self: &Arc<Self>,
        secret: SecretValue,
    ) -> Result<(), ApiError> {
        self.run_exclusively(move |provider| {
            let SecretValue { name, namespace, value } = &secret;
            provider.require_secret(namespace, name)?;
            provider.launcher.secrets.put(namespace, name, value)?;
            provider.refresh_views(namespace, name)
        })
        .await
    }

    pub(super) async fn delete_secret(
        self: &Arc<Self>,
        namespace: String,
        name: String,
    ) -> Result<(), ApiError> {
        self.run_exclusively(move |provider| {
            provider.require_secret(&namespace, &name)?;
            provider.launcher.secrets.remove(&namespace, &name)?;
            provider.refresh_views(&namespace, &name)
        })
        .await
    }

    fn require_secret(&self, namespace: &str, name: &str) -> Result<(), ApiError> {
        // The namespace becomes part of a path, so it is checked first.
        if self.table.has_namespace(namespace) && self.launcher.secrets.has(namespace, name) {
            return Ok(());
        }
        Err(ApiError::NotFound(format!("secret {name} does not exist in namespace {namespace}")))
    }

    /// Updates the views of all functions that use the secret `name`.
    fn refresh_views(&self, namespace: &str, name: &str) -> Result<(), ApiError> {
        for function in self.table.functions() {
            let workload = &function.workload;
            if workload.function.namespace == namespace
                && workload.spec.secrets.iter().any(|secret| secret == name)
            {
                self.launcher.secrets.refresh_view(&workload.function, &workload.spec.secrets)?;
            }
        }
        Ok(())
    }
}
