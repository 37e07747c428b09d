//! Retry policies of the functions of queued calls. The registry of functions knows those that the provider has listed;
//! this module queries the provider for others.
//!
//! While the provider is unavailable, the last known policy applies: a function that must not be executed twice may be
//! failing for the same reason.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;
use gateway_provider::{Error, Provider};
use gateway_proxy::functions::policy::FunctionPolicy;
use gateway_proxy::functions::policy::retry::RetryPolicy;
use gateway_proxy::functions::registry::FunctionRegistry;
use gateway_queue::call::QueuedCall;

/// Maximum number of functions whose policy could not be queried, and is not queried again for a while.
const MAX_FAILING_FUNCTIONS: usize = 10_000;

/// Timing of the requests to the provider.
#[derive(Clone, Copy, Debug)]
pub struct QueryTiming {
    /// Timeout of one request.
    pub timeout: Duration,
    /// Delay before a failed request is retried.
    pub retry_interval: Duration,
    /// Time after which a function whose policy was never reported gets the default policy.
    pub give_up_after: Duration,
}

impl Default for QueryTiming {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(5),
            retry_interval: Duration::from_secs(1),
            give_up_after: Duration::from_secs(30),
        }
    }
}

/// Retry policies by function.
pub struct RetryPolicies {
    registry: Arc<FunctionRegistry>,
    provider: Provider,
    timing: QueryTiming,
    /// Functions whose policy is being queried, or could not be queried. A leaf; a [`Query`] may be held.
    queries: Mutex<HashMap<Function, Arc<Query>>>,
}

/// Locked during a request to the provider, so that there is one at a time for each function. Rank 1: acquired
/// first, and held across awaits.
type Query = tokio::sync::Mutex<QueryState>;

/// Failures of the queries of one function.
#[derive(Default)]
struct QueryState {
    /// Time of the first failure.
    failing_since: Option<Instant>,
    /// The default policy applies until this time, without a query.
    default_until: Option<Instant>,
}

impl RetryPolicies {
    /// Returns the policies in `registry`, and those that `provider` reports.
    pub fn new(registry: Arc<FunctionRegistry>, provider: Provider) -> Self {
        Self::with_timing(registry, provider, QueryTiming::default())
    }

    /// Does the same as `new`, with the given timing.
    pub fn with_timing(
        registry: Arc<FunctionRegistry>,
        provider: Provider,
        timing: QueryTiming,
    ) -> Self {
        let provider = Provider { timeout: provider.timeout.min(timing.timeout), ..provider };
        Self { registry, provider, timing, queries: Mutex::default() }
    }

    /// Returns the retry policy of the function of `call`. If the provider has not reported it and is unavailable,
    /// retries for a while, then returns the default policy.
    pub async fn get(&self, call: &QueuedCall) -> RetryPolicy {
        let function = &call.function;
        if let Some(policy) = self.registry.policy(function) {
            return policy.retry.clone();
        }
        let query = self.query_of(function);
        let mut state = query.lock().await;
        loop {
            // The task that held the lock may have queried it.
            if let Some(policy) = self.registry.policy(function) {
                return policy.retry.clone();
            }
            if state.default_until.is_some_and(|until| Instant::now() < until) {
                return RetryPolicy::default();
            }
            let error = match Box::pin(self.fetch(function)).await {
                Ok(policy) => {
                    self.forget_query(function);
                    return policy.retry.clone();
                }
                Err(error) => error,
            };
            let (id, failing_since) =
                (&call.id, *state.failing_since.get_or_insert_with(Instant::now));
            if !matches!(error, Error::NoSuchFunction(_))
                && failing_since.elapsed() < self.timing.give_up_after
            {
                tracing::info!(call_id = id, %function, %error, "The retry policy of a queued call is not known yet");
                sleep(self.timing.retry_interval).await;
                continue;
            }
            tracing::debug!(call_id = id, %function, %error, "Using the default retry policy");
            state.default_until = Some(Instant::now() + self.timing.retry_interval);
        }
    }

    /// Queries the policy of `function` if it was never reported: the provider may be unavailable when it is needed.
    pub async fn prefetch(&self, function: &Function) {
        if self.registry.policy(function).is_some() {
            return;
        }
        let query = self.query_of(function);
        // The task that holds the lock is querying the policy.
        let Ok(_state) = query.try_lock() else { return };
        match Box::pin(self.fetch(function)).await {
            Ok(_) => self.forget_query(function),
            Err(error) => {
                tracing::debug!(%function, %error, "The retry policy of a function cannot be fetched");
            }
        }
    }

    async fn fetch(&self, function: &Function) -> Result<Arc<FunctionPolicy>, Error> {
        let response = timeout(self.timing.timeout, self.provider.status(function)).await;
        let status = response.unwrap_or(Err(Error::Response("no response in time".to_owned())))?;
        tracing::debug!(%function, "The retry policy of a function was fetched");
        Ok(self.registry.record_status(function, &status))
    }

    /// Removes the state of the queries of a function whose policy is in the registry now.
    fn forget_query(&self, function: &Function) {
        lock_unpoisoned(&self.queries).remove(function);
    }

    fn query_of(&self, function: &Function) -> Arc<Query> {
        let mut queries = lock_unpoisoned(&self.queries);
        if queries.len() >= MAX_FAILING_FUNCTIONS && !queries.contains_key(function) {
            queries.retain(|_, query| Arc::strong_count(query) > 1);
        }
        Arc::clone(queries.entry(function.clone()).or_default())
    }
}
