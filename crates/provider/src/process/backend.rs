//! The process provider as a backend of the provider's REST server.

use std::sync::Arc;
use std::time::Duration;

use axum::response::{IntoResponse, Response};

use crate::backend::{Backend, BackendInfo, Invocation, LogQuery, LogStream, SecretValue};
use crate::error::ApiError;
use crate::process::invocation::InvocationError;
use crate::process::{DEFAULT_NAMESPACE, ProcessProvider, log_stream};
use crate::types::{FunctionDeployment, FunctionStatus, Namespace};
use gateway_base::function::Function;

impl Backend for Arc<ProcessProvider> {
    fn info(&self) -> BackendInfo {
        BackendInfo { provider: "process", orchestration: "process" }
    }

    fn default_namespace(&self) -> &str {
        DEFAULT_NAMESPACE
    }

    async fn deploy(&self, deployment: FunctionDeployment) -> Result<(), ApiError> {
        ProcessProvider::deploy(self, deployment).await
    }

    async fn update(&self, deployment: FunctionDeployment) -> Result<(), ApiError> {
        ProcessProvider::update(self, deployment).await
    }

    async fn delete(&self, function: Function) -> Result<(), ApiError> {
        ProcessProvider::delete(self, function).await
    }

    async fn scale(&self, function: Function, replicas: u64) -> Result<(), ApiError> {
        ProcessProvider::scale(self, function, replicas).await
    }

    async fn list(&self, namespace: &str) -> Result<Vec<FunctionStatus>, ApiError> {
        Ok(ProcessProvider::list(self, namespace))
    }

    async fn status(&self, function: &Function, usage: bool) -> Result<FunctionStatus, ApiError> {
        let deployed = self.find(function)?;
        let mut status = deployed.status();
        if usage {
            status.usage = Some(deployed.workload.activity.usage().await);
        }
        Ok(status)
    }

    async fn watch(&self, function: &Function, max_wait: Duration) -> Result<(), ApiError> {
        self.find(function)?.wait_available(max_wait).await;
        Ok(())
    }

    async fn invoke(&self, function: Function, invocation: Invocation) -> Response {
        match self.table.get(&function) {
            Some(deployed) => deployed.invoke(&self.launcher, invocation).await.into_response(),
            None => InvocationError::NotFound(function).into_response(),
        }
    }

    async fn logs(&self, function: &Function, query: LogQuery) -> Result<LogStream, ApiError> {
        let deployed = self.find(function)?;
        let stopping = self.launcher.tasks.stopping.clone();
        let logs = &deployed.workload.logs;
        Ok(Box::pin(log_stream::stream(function.clone(), logs, query, stopping)))
    }

    async fn secrets(&self, namespace: &str) -> Result<Vec<String>, ApiError> {
        self.secret_names(namespace.to_owned()).await
    }

    async fn create_secret(&self, secret: SecretValue) -> Result<(), ApiError> {
        ProcessProvider::create_secret(self, secret).await
    }

    async fn update_secret(&self, secret: SecretValue) -> Result<(), ApiError> {
        ProcessProvider::update_secret(self, secret).await
    }

    async fn delete_secret(&self, namespace: String, name: String) -> Result<(), ApiError> {
        ProcessProvider::delete_secret(self, namespace, name).await
    }

    async fn namespaces(&self) -> Result<Vec<String>, ApiError> {
        Ok(self.table.namespaces())
    }

    async fn namespace(&self, name: &str) -> Result<Namespace, ApiError> {
        self.table.namespace(name).ok_or_else(|| ApiError::no_such_namespace(name))
    }

    async fn create_namespace(&self, namespace: Namespace) -> Result<(), ApiError> {
        ProcessProvider::create_namespace(self, namespace).await
    }

    async fn update_namespace(&self, namespace: Namespace) -> Result<(), ApiError> {
        ProcessProvider::update_namespace(self, namespace).await
    }

    async fn delete_namespace(&self, name: String) -> Result<(), ApiError> {
        ProcessProvider::delete_namespace(self, name).await
    }
}
