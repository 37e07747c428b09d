//! Consumers of functions that have had no calls for long. Functions come and go, and each consumer costs all who look
//! for calls.

use std::time::Duration;

use async_nats::jetstream::consumer::Info;
use serde_json::json;

use crate::function::Function;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::pull::FEW;
use crate::queue::jetstream::server::{Fault, Server};
use crate::queue::jetstream::subject::{CALLS, consumed};
use crate::queue::now;

/// After so long without a call. It is far longer than anybody believes, unasked, that a consumer is there.
pub(super) const IDLE: Duration = Duration::from_secs(7 * 24 * 3600);

/// That a consumer is not there, as the server says it.
const NO_CONSUMER: u64 = 10014;

impl Shared {
    /// Removes consumers that have given nothing to anybody for `age`, and have nothing to give; how many there were.
    pub(super) async fn tidy_consumers(&self, age: Duration) -> Result<u64, Fault> {
        let (server, names) = (&self.server, &self.names);
        // To say what a consumer has to give, the server looks at every message.
        if server.messages(&names.calls).await? > FEW {
            return Ok(0);
        }
        let mut removed = 0;
        for consumer in server.consumers(&names.calls).await? {
            let Some(function) = consumed(&consumer.name) else { continue };
            if consumer.pending + consumer.given > 0 {
                continue;
            }
            let Some(known) = server.consumer_info(&names.calls, &consumer.name).await? else {
                continue;
            };
            if known.num_pending > 0 || unused(&known) < age {
                continue;
            }
            server.delete_consumer(&names.calls, &consumer.name).await?;
            self.consumers().doubt(&function);
            removed += 1;
            tracing::debug!(%function, "A consumer without calls was removed");
            // Somebody may have published a call meanwhile, and believe that it is there.
            if self.has_calls(&function).await? {
                self.consumer(&function).await?;
            }
        }
        Ok(removed)
    }

    /// Whether there are calls of a function, whoever has them.
    pub(super) async fn has_calls(&self, function: &Function) -> Result<bool, Fault> {
        let (server, names) = (&self.server, &self.names);
        let first = server.next(&names.calls, &names.of(CALLS, Some(function)), 1).await?;
        Ok(first.is_some())
    }
}

impl Server {
    /// All that the server knows of a consumer; `None` if it is not there.
    async fn consumer_info(&self, stream: &str, name: &str) -> Result<Option<Info>, Fault> {
        match self.api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({})).await {
            Ok(known) => Ok(Some(known)),
            Err(Fault::Refused(NO_CONSUMER, _)) => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Removes a consumer, unless it is not there.
    async fn delete_consumer(&self, stream: &str, name: &str) -> Result<(), Fault> {
        let what = format!("CONSUMER.DELETE.{stream}.{name}");
        match self.api::<serde_json::Value>(&what, &json!({})).await {
            Ok(_) | Err(Fault::Refused(NO_CONSUMER, _)) => Ok(()),
            Err(fault) => Err(fault),
        }
    }
}

/// For how long a consumer has given nothing to anybody, as far as its server knows.
fn unused(known: &Info) -> Duration {
    let last = known.delivered.last_active.unwrap_or(known.created);
    let last = u64::try_from(last.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
    Duration::from_millis(now().saturating_sub(last))
}
