//! What functions say by their annotations of how they want to be retried, remembered for a moment.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::function::Function;
use crate::provider::Provider;
use crate::worker::retry::Policy;

/// A changed annotation counts after this time.
const FRESH: Duration = Duration::from_secs(10);
/// Functions that are remembered; there are rarely more that fail at a time.
const MOST: usize = 1000;

/// Policies by function.
pub struct Policies {
    provider: Provider,
    seen: Mutex<HashMap<Function, (Instant, Policy)>>,
}

impl Policies {
    pub fn new(provider: Provider) -> Self {
        Self { provider, seen: Mutex::default() }
    }

    /// The policy of `function`; the default one while the provider does not say.
    pub async fn of(&self, function: &Function) -> Policy {
        let now = Instant::now();
        if let Some((since, policy)) = self.seen().get(function)
            && now.duration_since(*since) < FRESH
        {
            return policy.clone();
        }
        let policy = match self.provider.status(function).await {
            Ok(status) => {
                let annotations = status.annotations.unwrap_or_default();
                let (policy, warnings) =
                    Policy::default().annotated(|name| annotations.get(name).map(String::as_str));
                for warning in warnings {
                    tracing::warn!(%function, warning, "An annotation is ignored");
                }
                policy
            }
            Err(error) => {
                tracing::debug!(%function, %error, "The default policy of retries is used");
                Policy::default()
            }
        };
        let mut seen = self.seen();
        if seen.len() >= MOST {
            seen.clear();
        }
        seen.insert(function.clone(), (now, policy.clone()));
        policy
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, HashMap<Function, (Instant, Policy)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
