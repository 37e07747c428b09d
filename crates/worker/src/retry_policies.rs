//! Cache of the functions' retry policies, which are read from their annotations.
//!
//! While the provider is unavailable, the last known policy applies: a function that must not be executed twice may be
//! failing for the same reason.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::retry::RetryPolicy;
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;
use gateway_provider::{Error, Provider};
use gateway_queue::call::QueuedCall;

/// Maximum number of cached functions.
const MAX_CACHED_FUNCTIONS: usize = 10_000;

/// Timing of the requests to the provider.
#[derive(Clone, Copy, Debug)]
pub struct CacheTiming {
    /// Lifetime of a cached policy. A changed annotation takes effect after this time.
    pub ttl: Duration,
    /// Timeout of one request.
    pub query_timeout: Duration,
    /// Delay before a failed request is retried.
    pub retry_interval: Duration,
    /// Time after which a function whose policy was never fetched gets the default policy.
    pub give_up_after: Duration,
}

impl Default for CacheTiming {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(10),
            query_timeout: Duration::from_secs(5),
            retry_interval: Duration::from_secs(1),
            give_up_after: Duration::from_secs(30),
        }
    }
}

/// Retry policies by function.
pub struct RetryPolicyCache {
    provider: Provider,
    timing: CacheTiming,
    entries: Mutex<HashMap<Function, Arc<Entry>>>,
}

/// Locked during a request to the provider, so that there is one at a time for each function.
type Entry = tokio::sync::Mutex<CachedPolicy>;

/// The cached policy of one function.
#[derive(Default)]
struct CachedPolicy {
    /// The last fetched policy, however old.
    policy: Option<RetryPolicy>,
    /// No request is sent before this time.
    valid_until: Option<Instant>,
    /// Time of the first failure since the last success.
    failing_since: Option<Instant>,
}

impl RetryPolicyCache {
    /// Creates a cache with the default timing.
    pub fn new(provider: Provider) -> Self {
        Self::with_timing(provider, CacheTiming::default())
    }

    /// Creates a cache with the given timing.
    pub fn with_timing(provider: Provider, timing: CacheTiming) -> Self {
        let provider = Provider { timeout: provider.timeout.min(timing.query_timeout), ..provider };
        Self { provider, timing, entries: Mutex::default() }
    }

    /// Returns the retry policy of the function of `call`. If the provider is unavailable, returns the last known
    /// policy. If there is none, retries for a while, then returns the default policy.
    pub async fn get(&self, call: &QueuedCall) -> RetryPolicy {
        let entry = self.entry(&call.function);
        let mut cached = entry.lock().await;
        loop {
            if cached.valid_until.is_some_and(|valid_until| Instant::now() < valid_until) {
                return cached.policy.clone().unwrap_or_default();
            }
            let error = match Box::pin(self.fetch(&mut cached, &call.function)).await {
                Ok(policy) => return policy,
                Err(error) => error,
            };
            let (id, function) = (&call.id, &call.function);
            let failing_since = *cached.failing_since.get_or_insert_with(Instant::now);
            let may_retry = cached.policy.is_none() && !matches!(error, Error::NoSuchFunction(_));
            if may_retry && failing_since.elapsed() < self.timing.give_up_after {
                tracing::info!(call_id = id, %function, %error, "The retry policy of a queued call is not known yet");
                sleep(self.timing.retry_interval).await;
                continue;
            }
            let is_known = cached.policy.is_some();
            tracing::debug!(
                call_id = id, %function, %error, is_known,
                "Using the last known or the default retry policy"
            );
            cached.valid_until = Some(Instant::now() + self.timing.retry_interval);
        }
    }

    /// Fetches the policy of `function` if it was never fetched: the provider may be unavailable when it is needed.
    pub async fn prefetch(&self, function: &Function) {
        let entry = self.entry(function);
        // The task that holds the lock is fetching the policy.
        if let Ok(mut cached) = entry.try_lock()
            && cached.policy.is_none()
            && let Err(error) = Box::pin(self.fetch(&mut cached, function)).await
        {
            tracing::debug!(%function, %error, "The retry policy of a function cannot be fetched");
        }
    }

    async fn fetch(
        &self,
        cached: &mut CachedPolicy,
        function: &Function,
    ) -> Result<RetryPolicy, Error> {
        let response = timeout(self.timing.query_timeout, self.provider.status(function)).await;
        let status = response.unwrap_or(Err(Error::Response("no response in time".to_owned())))?;
        let annotations = status.annotations.unwrap_or_default();
        let (policy, warnings) = RetryPolicy::default()
            .with_annotations(|name| annotations.get(name).map(String::as_str));
        for warning in warnings {
            tracing::warn!(%function, warning, "Ignoring an invalid annotation");
        }
        tracing::debug!(%function, "The retry policy of a function was fetched");
        let valid_until = Some(Instant::now() + self.timing.ttl);
        *cached = CachedPolicy { policy: Some(policy.clone()), valid_until, failing_since: None };
        Ok(policy)
    }

    fn entry(&self, function: &Function) -> Arc<Entry> {
        let mut entries = lock_unpoisoned(&self.entries);
        if let Some(entry) = entries.get(function) {
            return Arc::clone(entry);
        }
        if entries.len() >= MAX_CACHED_FUNCTIONS {
            evict(&mut entries);
        }
        Arc::clone(entries.entry(function.clone()).or_default())
    }
}

/// Removes functions with the default policy; if that is not enough, all that are not in use.
fn evict(entries: &mut MutexGuard<'_, HashMap<Function, Arc<Entry>>>) {
    entries.retain(|_, entry| match entry.try_lock() {
        Ok(cached) => {
            cached.policy.as_ref().is_some_and(|policy| *policy != RetryPolicy::default())
        }
        Err(_) => true,
    });
    if entries.len() >= MAX_CACHED_FUNCTIONS {
        entries.retain(|_, entry| Arc::strong_count(entry) > 1);
    }
}
