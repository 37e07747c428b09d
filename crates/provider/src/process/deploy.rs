//! Deploys functions: validates, saves and starts them.

use std::sync::Arc;

use crate::error::ApiError;
use crate::process::command::find_program;
use crate::process::spec::{FunctionSpec, Mode, initial_replicas};
use crate::process::store::SavedFunction;
use crate::process::{DEFAULT_NAMESPACE, MAX_PROCESSES_PER_FUNCTION, ProcessProvider};
use crate::types::FunctionDeployment;
use gateway_base::function::{DNS_LABEL_RULE, Function, is_dns_label};

impl ProcessProvider {
    /// Deploys a function, or replaces the function of the same name.
    ///
    /// # Errors
    /// `ApiError::Invalid` with the reason if the deployment cannot run here.
    pub async fn deploy(self: &Arc<Self>, deployment: FunctionDeployment) -> Result<(), ApiError> {
        self.run_exclusively(move |provider| {
            let function = provider.validate(&deployment)?;
            provider.save_and_start(&function, deployment)
        })
        .await
    }

    /// Deploys a function unless the same deployment is active already, which then continues undisturbed.
    /// Returns whether anything has changed.
    ///
    /// # Errors
    /// `ApiError::Invalid` with the reason if the deployment cannot run here.
    pub async fn deploy_if_changed(
        self: &Arc<Self>,
        deployment: FunctionDeployment,
    ) -> Result<bool, ApiError> {
        self.run_exclusively(move |provider| {
            let function = provider.validate(&deployment)?;
            if provider
                .table
                .get(&function)
                .is_some_and(|deployed| deployed.is_deployed_as(&deployment))
            {
                tracing::info!(function = %function, "{function} is unchanged");
                return Ok(false);
            }
            provider.save_and_start(&function, deployment).map(|()| true)
        })
        .await
    }

    /// Replaces an existing function.
    pub(crate) async fn update(
        self: &Arc<Self>,
        deployment: FunctionDeployment,
    ) -> Result<(), ApiError> {
        self.run_exclusively(move |provider| {
            let function = function_of(&deployment);
            provider.find(&function)?;
            provider.validate(&deployment)?;
            provider.save_and_start(&function, deployment)
        })
        .await
    }

    /// Validates a deployment, including its references to secrets.
    fn validate(&self, deployment: &FunctionDeployment) -> Result<Function, ApiError> {
        let function = self.validate_except_secrets(deployment)?;
        let missing = self.missing_secrets(deployment);
        if !missing.is_empty() {
            return Err(ApiError::Invalid(format!(
                "secrets that do not exist in namespace {}: {missing:?}",
                function.namespace
            )));
        }
        Ok(function)
    }

    /// Validates a deployment, except for the existence of its secrets.
    ///
    /// # Errors
    /// `ApiError::Invalid` with the reason.
    pub fn validate_except_secrets(
        &self,
        deployment: &FunctionDeployment,
    ) -> Result<Function, ApiError> {
        let function = function_of(deployment);
        if !is_dns_label(&function.name) {
            return Err(ApiError::Invalid(format!(
                "service: {:?} is not a name of {DNS_LABEL_RULE}",
                function.name
            )));
        }
        if !self.table.has_namespace(&function.namespace) {
            let reason = format!("namespace {} does not exist", function.namespace);
            return Err(ApiError::Invalid(reason));
        }
        let spec = FunctionSpec::parse(deployment).map_err(ApiError::Invalid)?;
        if let Some(directory) = spec.working_directory.as_ref().filter(|path| !path.is_dir()) {
            let reason = format!("workingDirectory: {} is not a directory", directory.display());
            return Err(ApiError::Invalid(reason));
        }
        let path = self.launcher.search_path(&spec);
        if find_program(&spec.argv[0], path).is_none() {
            return Err(ApiError::Invalid(format!(
                "envProcess: {:?} is not a program that can be run (PATH: {path})",
                spec.argv[0]
            )));
        }
        check_replicas(&spec, initial_replicas(deployment).map_err(ApiError::Invalid)?)?;
        Ok(function)
    }

    /// Saves and starts a function. A replaced function keeps its number of replicas, its logs and its creation time.
    fn save_and_start(
        &self,
        function: &Function,
        mut deployment: FunctionDeployment,
    ) -> Result<(), ApiError> {
        deployment.namespace.clone_from(&function.namespace);
        let initial = initial_replicas(&deployment).map_err(ApiError::Invalid)?;
        let old = self.table.get(function);
        let saved = SavedFunction {
            deployment,
            replicas: match &old {
                // A function at zero stays at zero; the next call starts the new version.
                Some(old) if old.replicas() == 0 => 0,
                Some(old) => old.replicas().max(initial),
                None => initial,
            },
            created_at: old.as_ref().map_or_else(current_time, |old| old.created_at.clone()),
        };
        let spec = FunctionSpec::parse(&saved.deployment).map_err(ApiError::Invalid)?;
        // The old version may be in fork mode, where the number of replicas is not limited.
        check_replicas(&spec, saved.replicas)?;
        self.launcher.secrets.refresh_view(function, &spec.secrets)?;
        self.store.save_function(function, &saved)?;
        self.start(function, spec, saved, old.as_deref());
        tracing::info!(function = %function, "Deployed {function}");
        Ok(())
    }
}

/// Returns name and namespace of the function in a deployment.
pub(super) fn function_of(deployment: &FunctionDeployment) -> Function {
    let namespace = match deployment.namespace.as_str() {
        "" => DEFAULT_NAMESPACE,
        namespace => namespace,
    };
    Function { name: deployment.service.clone(), namespace: namespace.to_owned() }
}

pub(super) fn check_replicas(spec: &FunctionSpec, replicas: u64) -> Result<(), ApiError> {
    match spec.mode {
        Mode::Http { .. } if replicas > MAX_PROCESSES_PER_FUNCTION => {
            Err(ApiError::Invalid(format!(
                "{replicas} replicas are more than the {MAX_PROCESSES_PER_FUNCTION} processes that a function may have"
            )))
        }
        Mode::Http { .. } | Mode::Fork(_) => Ok(()),
    }
}

/// Returns the current time in RFC 3339, in whole seconds.
fn current_time() -> String {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}
