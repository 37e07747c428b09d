//! Feeds the registry: polls the provider's list of functions. Source of the replica gauges, of the function registry, and of the
//! provider's health.

use futures_util::future::BoxFuture;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use tokio_util::sync::CancellationToken;

use crate::functions::policy::scaling::ScalingPolicy;
use crate::metrics::{Metrics, ReplicaGauges};
use crate::readiness::Readiness;
use gateway_base::function::Function;
use gateway_http::credentials::Credentials;
use gateway_provider::types::FunctionSummary;
use gateway_provider::{Error, Provider};

/// Interval between two polls.
const POLL_INTERVAL: Duration = Duration::from_secs(5);
/// Interval while the provider is unreachable, so that its recovery is noticed soon.
const UNREACHABLE_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Polls the provider's list of functions.
#[derive(Clone)]
pub struct ProviderPoller {
    pub provider: Provider,
    pub default_namespace: Arc<str>,
    pub metrics: Arc<Metrics>,
    pub readiness: Arc<Readiness>,
    /// Whether replica gauges are exported.
    pub exports_replicas: bool,
}

impl ProviderPoller {
    /// Polls until `stopping` is cancelled.
    pub fn run(self, stopping: CancellationToken) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            loop {
                // Both branches are cancel-safe: a cancelled poll has changed nothing.
                let pause = tokio::select! {
                    () = stopping.cancelled() => return,
                    pause = self.poll_once() => pause,
                };
                tokio::select! {
                    () = stopping.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        })
    }

    /// Polls once; returns the time until the next poll.
    async fn poll_once(&self) -> Duration {
        let queried_at = Instant::now();
        let credentials = self.provider.credentials.as_deref();
        // The provider may have loaded the current credentials by now.
        credentials.inspect(|credentials| credentials.prefer_current());
        match self.functions().await {
            Ok(functions) => {
                let stale = credentials.is_some_and(Credentials::provider_accepts_replaced_only);
                self.readiness.record_provider_success(stale);
                self.record(&functions, queried_at);
                POLL_INTERVAL
            }
            Err(error) => {
                self.readiness.record_provider_failure(&error);
                UNREACHABLE_POLL_INTERVAL
            }
        }
    }

    /// Returns the functions of all namespaces that the provider lists.
    ///
    /// # Errors
    /// The provider does not respond, rejects the credentials, or lists the functions of no namespace.
    pub async fn functions(&self) -> Result<Vec<FunctionSummary>, Error> {
        let namespaces = match self.provider.namespaces().await {
            Ok(namespaces) => namespaces,
            // Namespaces are optional, but the provider must respond.
            Err(Error::Response(_) | Error::CredentialsRefused(StatusCode::FORBIDDEN)) => {
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        if namespaces.is_empty() {
            return self.provider.functions("").await;
        }
        let (mut all, mut failure, mut any_listed) = (Vec::new(), None, false);
        for namespace in &namespaces {
            match self.provider.functions(namespace).await {
                Ok(mut functions) => {
                    any_listed = true;
                    for function in &mut functions {
                        function.namespace.get_or_insert_with(|| namespace.clone());
                    }
                    all.append(&mut functions);
                }
                // The provider responded: a namespace that cannot be listed is no evidence about the others.
                Err(
                    error @ (Error::Response(_) | Error::CredentialsRefused(StatusCode::FORBIDDEN)),
                ) => {
                    tracing::debug!(namespace, %error, "The functions of {namespace} cannot be listed");
                    failure = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        match failure {
            Some(error) if !any_listed => Err(error),
            _ => Ok(all),
        }
    }

    fn record(&self, functions: &[FunctionSummary], queried_at: Instant) {
        // A provider without namespaces lists the same functions for each namespace.
        let named: BTreeMap<Function, &FunctionSummary> =
            functions.iter().filter_map(|f| Some((self.function_of(f)?, f))).collect();
        self.metrics.function_registry.apply_listing(&named, queried_at);
        self.metrics.remove_deleted(Instant::now());
        if self.exports_replicas {
            let registry = &self.metrics.function_registry;
            let policy = |name| registry.policy(name).unwrap_or_default();
            let replicas =
                named.iter().map(|(name, f)| replica_gauges(name, f, &policy(name).scaling));
            self.metrics.set_replicas(replicas.collect());
        }
    }

    /// Returns the function that `status` describes; `None` if its name is invalid.
    pub fn function_of(&self, status: &FunctionSummary) -> Option<Function> {
        let namespace = match status.namespace.as_deref() {
            None | Some("") => self.default_namespace.to_string(),
            Some(namespace) => namespace.to_owned(),
        };
        // The name may contain dots, which do not separate a namespace here.
        let valid = |text: &str| text.bytes().all(gateway_base::function::is_name_byte);
        (!status.name.is_empty() && valid(&status.name) && valid(&namespace))
            .then(|| Function { name: status.name.clone(), namespace })
    }
}

fn replica_gauges(
    name: &Function,
    status: &FunctionSummary,
    policy: &ScalingPolicy,
) -> ReplicaGauges {
    ReplicaGauges {
        label: name.to_string(),
        desired: status.replicas,
        ready: status.available_replicas,
        min: policy.min,
        scaling_type: policy.kind.as_str().to_owned(),
        target: policy.target,
    }
}
