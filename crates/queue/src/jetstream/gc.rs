//! Garbage collection of consumers without recent calls. Functions come and go, and each consumer makes discovery more
//! expensive.

pub(super) mod bodies;
mod records;
use std::time::Duration;

use async_nats::jetstream::consumer::Info;

use crate::jetstream::Shared;
use crate::jetstream::consumers::MAX_SCANNED_MESSAGES;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::subjects::function_of_consumer;
use crate::now;

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
}

/// Returns the time since a consumer delivered a message, as far as its server knows.
fn idle_time(info: &Info) -> Duration {
    let last = info.delivered.last_active.unwrap_or(info.created);
    let last = u64::try_from(last.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
    Duration::from_millis(now().saturating_sub(last))
}
