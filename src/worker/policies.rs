//! What functions say by their annotations of how they want to be retried, remembered for a moment.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::function::Function;
use crate::provider::Provider;
use crate::worker::retry::Policy;

/// A changed annotation counts after this time.
const FRESH: Duration = Duration::from_secs(10);
/// A provider that did not say is asked again after this time.
const UNKNOWN: Duration = Duration::from_secs(1);
/// Functions that are remembered; there are rarely more that fail at a time.
const MOST: usize = 1000;

/// Policies by function.
pub struct Policies {
    provider: Provider,
    /// Until when each holds.
    seen: Mutex<HashMap<Function, (Instant, Policy)>>,
}

impl Policies {
    pub fn new(provider: Provider) -> Self {
        Self { provider, seen: Mutex::default() }
    }

    /// The policy of `function`; the default one while the provider does not say.
    pub async fn of(&self, function: &Function) -> Policy {
        let now = Instant::now();
        if let Some((until, policy)) = self.seen().get(function)
            && now < *until
        {
            return policy.clone();
        }
        let (policy, holds) = match self.provider.status(function).await {
            Ok(status) => {
                let annotations = status.annotations.unwrap_or_default();
                let (policy, warnings) =
                    Policy::default().annotated(|name| annotations.get(name).map(String::as_str));
                for warning in warnings {
                    tracing::warn!(%function, warning, "An annotation is ignored");
                }
                (policy, FRESH)
            }
            Err(error) => {
                tracing::debug!(%function, %error, "The default policy of retries is used");
                (Policy::default(), UNKNOWN)
            }
        };
        let mut seen = self.seen();
        if seen.len() >= MOST {
            seen.clear();
        }
        seen.insert(function.clone(), (now + holds, policy.clone()));
        policy
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, HashMap<Function, (Instant, Policy)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
