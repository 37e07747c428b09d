//! Reconciliation: lists the functions, decides for each, and sends the changes to the provider.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use tokio::time::timeout;

use crate::cluster_view::{ClusterView, panic_window};
use crate::decide::{AutoscaleRules, MonotonicMillis, decide, may_scale_to_zero};
use crate::managed::{Change, ManagedFunction, Warning};
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;
use gateway_proxy::function_source::ProviderPoller;
use gateway_proxy::functions::policy::scaling::Kind;
use gateway_proxy::metrics::autoscale::{AutoscaleMetrics, ScaleSample};
use gateway_queue::ingress::QueueIngress;

/// Time limit for listing all functions.
const LIST_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for reading the usage of all functions.
const USAGE_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for counting the queued calls.
const COUNT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for all changes of a round.
const CHANGES_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of functions for which unlisted ones are remembered.
const MAX_REMEMBERED_FUNCTIONS: usize = 20_000;
/// Maximum number of concurrent requests to the provider.
const MAX_CONCURRENT_REQUESTS: usize = 8;

/// State between rounds.
pub struct Reconciler {
    pub poller: ProviderPoller,
    pub gauges: AutoscaleMetrics,
    pub ingress: Option<Arc<QueueIngress>>,
    pub rules: AutoscaleRules,
    /// The same as `view` of the sample loop.
    pub view: Arc<Mutex<ClusterView>>,
    pub started_at: Instant,
    functions: HashMap<Function, ManagedFunction>,
}

impl Reconciler {
    pub fn new(
        poller: ProviderPoller,
        gauges: AutoscaleMetrics,
        ingress: Option<Arc<QueueIngress>>,
        rules: AutoscaleRules,
        view: Arc<Mutex<ClusterView>>,
        started_at: Instant,
    ) -> Self {
        Self { poller, gauges, ingress, rules, view, started_at, functions: HashMap::new() }
    }

    /// Returns whether a function needs more replicas before the next round.
    pub fn is_urgent(&self) -> bool {
        let (view, now) = (lock_unpoisoned(&self.view), self.now());
        let by_calls =
            |managed: &&ManagedFunction| managed.is_present() && managed.policy.kind != Kind::Cpu;
        self.functions.values().filter(by_calls).any(|managed| {
            let observation =
                view.observe(managed.input(panic_window(self.rules.window), now), now);
            let (decision, _) =
                decide(self.rules, &managed.policy, observation, managed.state.clone());
            decision.send_request && decision.desired > managed.wanted
        })
    }

    /// Another gateway is the leader: the state would be outdated when it is needed again.
    pub fn step_down(&mut self) {
        if !self.functions.is_empty() {
            self.functions.clear();
            self.gauges.set_functions(&[]);
        }
    }

    /// Runs one round. Changes nothing if the provider does not respond.
    pub async fn reconcile(&mut self) {
        match timeout(LIST_TIMEOUT, self.poller.functions()).await {
            Ok(Ok(listed)) => {
                let registry = &self.poller.metrics.function_registry;
                let listed: HashMap<Function, _> = listed
                    .iter()
                    .filter_map(|status| Some((self.poller.function_of(status)?, status)))
                    .map(|(function, status)| {
                        let policy = registry.record_status(&function, status);
                        (function, (policy, status.replicas))
                    })
                    .filter(|(_, (policy, _))| policy.scaled_by_load)
                    .collect();
                let now = self.now();
                let has_room = self.functions.len() < MAX_REMEMBERED_FUNCTIONS;
                self.functions.retain(|function, managed| {
                    listed.contains_key(function) || (managed.on_missing(now) && has_room)
                });
                for (function, (policy, replicas)) in listed {
                    let managed = self.functions.entry(function.clone()).or_default();
                    managed.label = function.to_string();
                    managed.policy = policy.scaling.clone();
                    managed.on_listed(replicas, now);
                    managed.warn_if_never_scaled_to_zero(&function, self.rules);
                }
            }
            // The provider poller logs the failure.
            Ok(Err(_)) | Err(_) => return,
        }
        self.poll_cpu_usage().await;
        let changes = self.decide_all();
        self.apply(changes).await;
    }

    /// Reads the usage of the functions that are scaled by CPU.
    async fn poll_cpu_usage(&mut self) {
        let by_cpu = |managed: &&ManagedFunction| {
            managed.is_present() && managed.policy.kind == Kind::Cpu && managed.wanted > 0
        };
        let functions: Vec<Function> = self
            .functions
            .iter()
            .filter(|(_, managed)| by_cpu(managed))
            .map(|(function, _)| function.clone())
            .collect();
        if functions.is_empty() {
            return;
        }
        let request = |function: Function| {
            let provider = self.poller.provider.clone();
            async move {
                let usage = provider.usage(&function).await;
                (function, usage)
            }
        };
        // A usage that is not reported in time is unknown.
        let results = run_concurrently(functions.into_iter().map(request), USAGE_TIMEOUT).await;
        let (now, window) = (self.now(), self.rules.window);
        for (function, result) in results {
            let Some(managed) = self.functions.get_mut(&function) else { continue };
            match result {
                Ok(Some(usage)) if usage.cpu.is_finite() && usage.cpu >= 0.0 => {
                    managed.record_cpu(usage.cpu, now);
                    managed.warnings.remove(&Warning::NoCpuUsage);
                }
                Ok(_) => managed.warn_once(Warning::NoCpuUsage, || {
                    tracing::warn!(
                        function = %function,
                        "{function} is not scaled by cpu: the provider does not report its usage"
                    );
                }),
                Err(error) => {
                    tracing::debug!(function = %function, %error, "Cannot read the usage of {function}");
                }
            }
        }
        for managed in self.functions.values_mut() {
            managed.cpu.retain(|(at, _)| now.saturating_sub(*at) < window);
        }
    }

    /// Decides for every function. Returns the changes to send.
    fn decide_all(&mut self) -> Vec<Change> {
        let (rules, now) = (self.rules, self.now());
        let view = lock_unpoisoned(&self.view);
        let (mut changes, mut samples) = (Vec::new(), Vec::new());
        for (function, managed) in
            self.functions.iter_mut().filter(|(_, managed)| managed.is_present())
        {
            let observation = view.observe(managed.input(panic_window(rules.window), now), now);
            let (decision, state) =
                decide(rules, &managed.policy, observation, std::mem::take(&mut managed.state));
            managed.state = state;
            samples.push(ScaleSample {
                label: managed.label.clone(),
                kind: managed.policy.kind.as_str(),
                load: observation.stable_load,
                desired: decision.desired,
            });
            if decision.send_request {
                managed.expect_replicas(decision.desired);
                changes.push(Change { function: function.clone(), observation, decision });
            }
        }
        drop(view);
        self.gauges.set_functions(&samples);
        changes
    }

    /// Sends `changes` to the provider.
    async fn apply(&mut self, changes: Vec<Change>) {
        let mut unfinished: HashSet<Function> =
            changes.iter().map(|change| change.function.clone()).collect();
        let queued = match changes.iter().any(|change| change.decision.desired == 0) {
            true => self.queued_calls().await,
            false => Some(Arc::default()),
        };
        let this = &*self;
        let send = |change: Change| {
            let queued = queued.clone();
            async move {
                let Change { function, decision, .. } = &change;
                let (provider, registry) =
                    (&this.poller.provider, &this.poller.metrics.function_registry);
                let to_zero = decision.desired == 0;
                if to_zero {
                    // From here on a request checks for readiness first, and is counted before that.
                    registry.invalidate(Some(&function.name));
                    if this.has_calls(function, queued.as_deref()) {
                        return (change, None);
                    }
                }
                let result = provider.scale(function, decision.desired).await;
                if to_zero {
                    // A readiness that was recorded in the meantime may be outdated.
                    registry.invalidate(Some(&function.name));
                }
                (change, Some(result))
            }
        };
        let results = run_concurrently(changes.into_iter().map(send), CHANGES_TIMEOUT).await;
        let now = self.now();
        for (change, result) in results {
            let Some(managed) = self.functions.get_mut(&change.function) else { continue };
            match result {
                Some(Ok(())) => {
                    self.gauges.record_decision(&managed.label, change.decision.reason.as_str())
                }
                Some(Err(_)) => managed.state.request_failed(now),
                None => managed.state.request_dropped(),
            }
            if let Some(result) = result {
                managed.log_change(&change, result);
            }
            unfinished.remove(&change.function);
        }
        // Unfinished changes are tried again in a later round.
        for function in unfinished {
            if let Some(managed) = self.functions.get_mut(&function) {
                managed.state.request_failed(now);
            }
        }
    }

    /// Counts the queued calls by function; `None` if that fails.
    async fn queued_calls(&self) -> Option<Arc<HashMap<Arc<str>, u64>>> {
        let Some(ingress) = &self.ingress else { return Some(Arc::default()) };
        match timeout(COUNT_TIMEOUT, ingress.update_depths()).await {
            Ok(Ok(())) => ingress.pending_by_function(),
            Ok(Err(_)) | Err(_) => None,
        }
    }

    /// Returns whether `function` may have a call now, or had one since the decision to scale it to zero: other changes
    /// may have been sent before.
    fn has_calls(&self, function: &Function, queued: Option<&HashMap<Arc<str>, u64>>) -> bool {
        let Some(managed) = self.functions.get(function) else { return true };
        let (label, now) = (managed.label.as_str(), self.now());
        let may_be_idle = {
            let view = lock_unpoisoned(&self.view);
            let observation =
                view.observe(managed.input(panic_window(self.rules.window), now), now);
            may_scale_to_zero(self.rules, &managed.policy, observation)
        };
        // A call may have arrived since the last sample.
        !may_be_idle
            || queued.is_none_or(|queued| queued.contains_key(label))
            || self
                .poller
                .metrics
                .function_loads()
                .get(label)
                .is_some_and(|managed| managed.in_flight > 0)
    }

    fn now(&self) -> MonotonicMillis {
        MonotonicMillis::try_from(self.started_at.elapsed().as_millis())
            .unwrap_or(MonotonicMillis::MAX)
    }
}

/// Runs `questions` concurrently, for at most `patience`. Returns the results that were available in time.
async fn run_concurrently<T>(
    questions: impl Iterator<Item = impl Future<Output = T>>,
    patience: Duration,
) -> Vec<T> {
    let questions: Vec<_> = questions.collect();
    let mut results = Vec::new();
    let finished =
        stream::iter(questions).buffer_unordered(MAX_CONCURRENT_REQUESTS).for_each(|result| {
            results.push(result);
            std::future::ready(())
        });
    let _ = timeout(patience, finished).await;
    results
}
