//! Asks the provider for all its functions, again and again: the replica gauges, the names that exist, and whether
//! the provider answers at all come from here.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use tokio_util::sync::CancellationToken;

use crate::auth::Credentials;
use crate::autoscale::policy::Policy;
use crate::error::Error;
use crate::function::Function;
use crate::health::Health;
use crate::metrics::{Metrics, Replicas};
use crate::provider::Provider;
use crate::provider::types::FunctionSummary;

const ASK_EVERY: Duration = Duration::from_secs(5);
/// While the provider is away, so that its return is seen soon.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// What the poll needs.
#[derive(Clone)]
pub struct Poll {
    pub provider: Provider,
    pub default_namespace: Arc<str>,
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    /// Whether the gauges of replicas are to be filled.
    pub shows_replicas: bool,
}

impl Poll {
    /// Polls until `stopping`.
    pub async fn run(self, stopping: CancellationToken) {
        loop {
            // Both branches are cancel-safe: a poll that is cut short has changed nothing.
            let pause = tokio::select! {
                () = stopping.cancelled() => return,
                pause = self.poll() => pause,
            };
            tokio::select! {
                () = stopping.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Asks once; returns how long to wait until the next time.
    async fn poll(&self) -> Duration {
        let asked = Instant::now();
        let credentials = self.provider.credentials.as_deref();
        // The provider may have read the current ones by now.
        credentials.inspect(|it| it.prefer_current());
        match self.functions().await {
            Ok(functions) => {
                let is_behind = credentials.is_some_and(Credentials::are_ahead_of_provider);
                self.health.provider_answered(is_behind);
                self.report(&functions, asked);
                ASK_EVERY
            }
            Err(error) => {
                self.health.provider_failed(&error);
                ASK_AGAIN
            }
        }
    }

    /// The functions of every namespace that the provider lists.
    ///
    /// # Errors
    /// When the provider does not answer, refuses the credentials, or lists the functions of no namespace.
    pub async fn functions(&self) -> Result<Vec<FunctionSummary>, Error> {
        let namespaces = match self.provider.namespaces().await {
            Ok(namespaces) => namespaces,
            // A provider need not have namespaces, but it must be there.
            Err(Error::Provider(_) | Error::CredentialsRefused(StatusCode::FORBIDDEN)) => {
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        if namespaces.is_empty() {
            return self.provider.functions("").await;
        }
        let (mut all, mut refusal, mut listed) = (Vec::new(), None, false);
        for namespace in &namespaces {
            match self.provider.functions(namespace).await {
                Ok(mut functions) => {
                    listed = true;
                    for function in &mut functions {
                        function.namespace.get_or_insert_with(|| namespace.clone());
                    }
                    all.append(&mut functions);
                }
                // It did answer: one namespace that is closed to us says nothing about the others.
                Err(
                    error @ (Error::Provider(_) | Error::CredentialsRefused(StatusCode::FORBIDDEN)),
                ) => {
                    tracing::debug!(namespace, %error, "The functions of {namespace} cannot be listed");
                    refusal = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        match refusal {
            Some(error) if !listed => Err(error),
            _ => Ok(all),
        }
    }

    fn report(&self, functions: &[FunctionSummary], asked: Instant) {
        // A provider that knows no namespaces lists the same functions for each.
        let named: BTreeMap<Function, &FunctionSummary> =
            functions.iter().filter_map(|f| Some((self.name(f)?, f))).collect();
        let warm: HashMap<Function, bool> =
            named.iter().map(|(name, f)| (name.clone(), f.available_replicas > 0)).collect();
        self.metrics.known.listed(&warm, asked);
        self.metrics.forget_deleted(Instant::now());
        if self.shows_replicas {
            let replicas = named.iter().map(|(name, f)| replicas(name, f));
            self.metrics.replicas_reported(replicas.collect());
        }
    }

    /// The function that a status is of; `None` if its name is none.
    pub fn name(&self, status: &FunctionSummary) -> Option<Function> {
        let namespace = match status.namespace.as_deref() {
            None | Some("") => self.default_namespace.to_string(),
            Some(namespace) => namespace.to_owned(),
        };
        // The name alone: a dot in it divides nothing here.
        let valid = |text: &str| text.bytes().all(crate::function::is_name_byte);
        (!status.name.is_empty() && valid(&status.name) && valid(&namespace))
            .then(|| Function { name: status.name.clone(), namespace })
    }
}

fn replicas(name: &Function, status: &FunctionSummary) -> Replicas {
    let labels = status.labels.clone().unwrap_or_default();
    let (policy, _) = Policy::from_labels(&labels);
    Replicas {
        label: name.to_string(),
        wanted: status.replicas,
        ready: status.available_replicas,
        min: policy.min,
        scaling_type: policy.kind.word().to_owned(),
        target: policy.target,
    }
}
