//! Garbage collection of consumers without recent calls. Functions come and go, and each consumer makes discovery more
//! expensive.

use std::time::Duration;

use async_nats::jetstream::consumer::Info;
use serde_json::json;

use crate::jetstream::Shared;
use crate::jetstream::api::JetStreamApi;
use crate::jetstream::consume::consumer::MAX_SCANNED_MESSAGES;
use crate::jetstream::error::{CONSUMER_NOT_FOUND, NatsError};
use crate::jetstream::wire::subjects::{CALLS, function_of_consumer};
use crate::now;
use gateway_base::function::Function;

/// A consumer is removed after this time without a call. It is far longer than an entry of the consumer cache is
/// trusted.
pub(super) const CONSUMER_IDLE_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

impl Shared {
    /// Removes consumers that have delivered nothing for `age` and have nothing pending. Returns the number of removed
    /// consumers.
    pub(super) async fn collect_consumers(&self, age: Duration) -> Result<u64, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        // To report what is pending, the server scans every message.
        if api.message_count(&subjects.calls).await? > MAX_SCANNED_MESSAGES {
            return Ok(0);
        }
        let mut removed = 0;
        for consumer in api.consumers(&subjects.calls).await? {
            let Some(function) = function_of_consumer(&consumer.name) else { continue };
            if consumer.pending + consumer.ack_pending > 0 {
                continue;
            }
            let Some(info) = api.consumer_info(&subjects.calls, &consumer.name).await? else {
                continue;
            };
            if info.num_pending > 0 || idle_time(&info) < age {
                continue;
            }
            api.delete_consumer(&subjects.calls, &consumer.name).await?;
            self.consumers().invalidate(&function);
            removed += 1;
            tracing::debug!(%function, "Removed an unused consumer");
            // Another process may have published a call in the meantime, and still have the consumer in its cache.
            if self.has_calls(&function).await? {
                self.ensure_consumer(&function).await?;
            }
        }
        Ok(removed)
    }

    /// Returns whether calls of a function exist, delivered or not.
    pub(super) async fn has_calls(&self, function: &Function) -> Result<bool, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let first =
            api.get_next(&subjects.calls, &subjects.of_function(CALLS, Some(function)), 1).await?;
        Ok(first.is_some())
    }
}

impl JetStreamApi {
    /// Returns the state of a consumer, or `None` if it does not exist.
    async fn consumer_info(&self, stream: &str, name: &str) -> Result<Option<Info>, NatsError> {
        match self.call_api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({})).await {
            Ok(info) => Ok(Some(info)),
            Err(NatsError::Rejected(CONSUMER_NOT_FOUND, _)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a consumer; a missing one is no error.
    async fn delete_consumer(&self, stream: &str, name: &str) -> Result<(), NatsError> {
        let endpoint = format!("CONSUMER.DELETE.{stream}.{name}");
        match self.call_api::<serde_json::Value>(&endpoint, &json!({})).await {
            Ok(_) | Err(NatsError::Rejected(CONSUMER_NOT_FOUND, _)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Returns the time since a consumer delivered a message, as far as its server knows.
fn idle_time(info: &Info) -> Duration {
    let last = info.delivered.last_active.unwrap_or(info.created);
    let last = u64::try_from(last.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
    Duration::from_millis(now().saturating_sub(last))
}
