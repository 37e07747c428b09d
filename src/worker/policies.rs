//! What functions say by their annotations of how they want to be retried.
//!
//! What was heard last holds for as long as the provider is away: a function that must not be called twice may be in
//! trouble for the same reason.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::error::Error;
use crate::function::Function;
use crate::provider::Provider;
use crate::queue::call::QueuedCall;
use crate::worker::retry::Policy;

/// Functions that are remembered.
const MOST: usize = 10_000;

/// How patiently the provider is asked.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// A changed annotation counts after this time.
    pub fresh: Duration,
    /// One question takes no longer.
    pub question: Duration,
    /// The pause before a provider that did not say is asked again.
    pub pause: Duration,
    /// So long it is asked for a function of which nothing was ever heard, before the default policy is used.
    pub patience: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            fresh: Duration::from_secs(10),
            question: Duration::from_secs(5),
            pause: Duration::from_secs(1),
            patience: Duration::from_secs(30),
        }
    }
}

/// Policies by function.
pub struct Policies {
    provider: Provider,
    pace: Pace,
    seen: Mutex<HashMap<Function, Arc<Entry>>>,
}

/// Locked while the provider is asked: one question at a time for each function.
type Entry = tokio::sync::Mutex<Known>;

/// What is known of one function.
#[derive(Default)]
struct Known {
    /// What was heard last, however long ago.
    policy: Option<Policy>,
    /// Nobody is asked before.
    until: Option<Instant>,
    /// Since when the provider does not say.
    silent: Option<Instant>,
}

impl Policies {
    pub fn new(provider: Provider) -> Self {
        Self::paced(provider, Pace::default())
    }

    pub fn paced(provider: Provider, pace: Pace) -> Self {
        let provider = Provider { timeout: provider.timeout.min(pace.question), ..provider };
        Self { provider, pace, seen: Mutex::default() }
    }

    /// The policy of the function of `call`: if the provider does not say, the last that is known. If none is, it is
    /// asked for a while, and only then the default one is used.
    pub async fn of(&self, call: &QueuedCall) -> Policy {
        let entry = self.entry(&call.function);
        let mut known = entry.lock().await;
        loop {
            if known.until.is_some_and(|until| Instant::now() < until) {
                return known.policy.clone().unwrap_or_default();
            }
            let error = match Box::pin(self.ask(&mut known, &call.function)).await {
                Ok(policy) => return policy,
                Err(error) => error,
            };
            let (id, function) = (&call.id, &call.function);
            let silent = *known.silent.get_or_insert_with(Instant::now);
            let patient = known.policy.is_none() && !matches!(error, Error::NoSuchFunction(_));
            if patient && silent.elapsed() < self.pace.patience {
                tracing::info!(call_id = id, %function, %error, "How it is to be retried is not known yet");
                sleep(self.pace.pause).await;
                continue;
            }
            let heard = known.policy.is_some();
            tracing::debug!(call_id = id, %function, %error, heard, "The last known policy of retries is used");
            known.until = Some(Instant::now() + self.pace.pause);
        }
    }

    /// Asks for the policy of `function` if nothing was ever heard of it. It may be too late once it is needed.
    pub async fn learn(&self, function: &Function) {
        let entry = self.entry(function);
        // Whoever has it locked is asking.
        if let Ok(mut known) = entry.try_lock()
            && known.policy.is_none()
            && let Err(error) = Box::pin(self.ask(&mut known, function)).await
        {
            tracing::debug!(%function, %error, "Nobody says how a function wants to be retried");
        }
    }

    async fn ask(&self, known: &mut Known, function: &Function) -> Result<Policy, Error> {
        let asked = timeout(self.pace.question, self.provider.status(function)).await;
        let status = asked.unwrap_or(Err(Error::Provider("no answer in time".to_owned())))?;
        let annotations = status.annotations.unwrap_or_default();
        let (policy, warnings) =
            Policy::default().annotated(|name| annotations.get(name).map(String::as_str));
        for warning in warnings {
            tracing::warn!(%function, warning, "An annotation is ignored");
        }
        tracing::debug!(%function, "How a function wants to be retried was heard");
        let until = Some(Instant::now() + self.pace.fresh);
        *known = Known { policy: Some(policy.clone()), until, silent: None };
        Ok(policy)
    }

    fn entry(&self, function: &Function) -> Arc<Entry> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = seen.get(function) {
            return Arc::clone(entry);
        }
        if seen.len() >= MOST {
            make_room(&mut seen);
        }
        Arc::clone(seen.entry(function.clone()).or_default())
    }
}

/// Forgets those that have nothing to say; if all have, those that nobody asks for now.
fn make_room(seen: &mut MutexGuard<'_, HashMap<Function, Arc<Entry>>>) {
    seen.retain(|_, entry| match entry.try_lock() {
        Ok(known) => known.policy.as_ref().is_some_and(|policy| *policy != Policy::default()),
        Err(_) => true,
    });
    if seen.len() >= MOST {
        seen.retain(|_, entry| Arc::strong_count(entry) > 1);
    }
}
