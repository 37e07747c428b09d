//! The consumers, one per function: a cache of the existing ones, and their creation. Reading more than the name of a
//! consumer makes the server scan every message, so the ack timeout of each is read only once.
use std::collections::HashMap;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::ConsumerErrorKind;

use crate::jetstream::Shared;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::subjects::{self, CALLS};
use gateway_base::function::Function;

/// An entry that was not used for this time is no longer trusted: the consumer may have been garbage collected.
const CACHE_TTL: Duration = Duration::from_secs(3600);
/// Maximum number of messages in a queue that is scanned for functions without a consumer.
pub(super) const MAX_SCANNED_MESSAGES: u64 = 10_000;
/// Time limit for the announcement of a new consumer.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Cache of consumers.
#[derive(Default)]
pub(super) struct Consumers {
    /// Existing consumers as of `connection`, with the time of their last use or listing; time of the last listing.
    connection: u64,
    last_used: HashMap<Function, Instant>,
    listed_at: Option<Instant>,
    /// Ack timeouts of the consumers.
    leases: HashMap<Function, Duration>,
    /// Server id (new at each start of the server) for which the consumer was repaired.
    repaired_on: HashMap<Function, String>,
}

impl Consumers {
    /// Clears the cache for a new connection, which may lead to another server.
    pub(super) fn reset(&mut self, connection: u64) {
        (self.connection, self.listed_at) = (connection, None);
        self.last_used.clear();
    }

    /// Returns whether the consumer is cached, and marks it as used.
    fn contains(&mut self, function: &Function) -> bool {
        let Some(used) = self.last_used.get_mut(function) else { return false };
        let believed = used.elapsed() < CACHE_TTL;
        if believed {
            *used = Instant::now();
        }
        believed
    }

    /// Removes a consumer that may have been deleted or replaced.
    pub(super) fn invalidate(&mut self, function: &Function) {
        self.last_used.remove(function);
        self.leases.remove(function);
    }

    pub(super) fn is_repaired(&self, function: &Function, server: &str) -> bool {
        self.repaired_on.get(function).is_some_and(|repaired| repaired == server)
    }

    pub(super) fn mark_repaired(&mut self, function: &Function, server: String) {
        self.repaired_on.insert(function.clone(), server);
    }

    pub(super) fn lease(&self, function: &Function) -> Option<Duration> {
        self.leases.get(function).copied()
    }
}

impl Shared {
    /// Returns the functions with a consumer, at most `age` old, and whether the server was queried for them.
    pub(super) async fn functions(
        &self,
        age: Duration,
    ) -> Result<(Vec<Function>, bool), NatsError> {
        let connection = self.ready().await?.api.wait_connected().await?;
        {
            let consumers = self.consumers();
            let fresh = consumers.listed_at.is_some_and(|at| at.elapsed() <= age);
            if fresh && consumers.connection == connection {
                return Ok((consumers.last_used.keys().cloned().collect(), false));
            }
        }
        let names = self.api.consumer_names(&self.subjects.calls).await?;
        let found: Vec<_> =
            names.iter().filter_map(|name| subjects::function_of_consumer(name)).collect();
        let mut consumers = self.consumers();
        if consumers.connection == connection {
            let now = Instant::now();
            consumers.last_used = found.iter().map(|function| (function.clone(), now)).collect();
            consumers.listed_at = Some(now);
        }
        Ok((found, true))
    }

    /// Ensures that the consumer of `function` exists.
    pub(super) async fn ensure_consumer(&self, function: &Function) -> Result<(), NatsError> {
        let cached = {
            let mut consumers = self.consumers();
            self.api.current_connection() == Some(consumers.connection)
                && consumers.contains(function)
        };
        if cached { Ok(()) } else { Box::pin(self.find_or_create_consumer(function)).await }
    }

    async fn find_or_create_consumer(&self, function: &Function) -> Result<(), NatsError> {
        if !self.functions(Duration::ZERO).await?.0.contains(function) {
            let connection = self.api.wait_connected().await?;
            let lease = self.create_consumer(function).await?;
            {
                let mut consumers = self.consumers();
                if consumers.connection == connection {
                    consumers.last_used.insert(function.clone(), Instant::now());
                }
                consumers.leases.insert(function.clone(), lease);
            }
            // Receivers that miss the announcement find the consumer by discovery.
            let name = subjects::consumer_name(function).into();
            let sent = self.api.client.publish(self.subjects.new_consumers(), name);
            let _ = tokio::time::timeout(SEND_TIMEOUT, sent).await;
        }
        if self.pull_scheduler().add(function) {
            self.call_available.notify_one();
        }
        Ok(())
    }

    /// Ensures that the consumer of `function` exists and its ack timeout is known.
    pub(super) async fn ensure_lease(&self, function: &Function) -> Result<(), NatsError> {
        self.ensure_consumer(function).await?;
        if self.consumers().lease(function).is_none() {
            let lease = Box::pin(self.create_consumer(function)).await?;
            self.consumers().leases.insert(function.clone(), lease);
        }
        Ok(())
    }

    /// Gets or creates the consumer of `function`. Returns its ack timeout.
    async fn create_consumer(&self, function: &Function) -> Result<Duration, NatsError> {
        let (api, subjects, lease) = (&self.api, &self.subjects, self.options.lease);
        let name = subjects::consumer_name(function);
        let config = pull::Config {
            durable_name: Some(name.clone()),
            filter_subject: subjects.of_function(CALLS, Some(function)),
            ack_policy: AckPolicy::Explicit,
            ack_wait: lease,
            max_deliver: -1,
            // Delayed calls are unacknowledged as well, and must not block others.
            max_ack_pending: -1,
            ..pull::Config::default()
        };
        let stream = api.context.get_stream_no_info(&subjects.calls).await;
        let stream = stream.map_err(|_| NatsError::Unavailable)?;
        let created: PullConsumer =
            stream.get_or_create_consumer(&name, config).await.map_err(|error| {
                match error.kind() {
                    ConsumerErrorKind::JetStream(error) if error.code() != 503 => {
                        NatsError::Rejected(error.error_code().0, error.to_string())
                    }
                    _ => NatsError::Unavailable,
                }
            })?;
        Ok(created.cached_info().config.ack_wait.min(lease))
    }
}

impl Shared {
    /// Returns whether calls of a function exist, delivered or not.
    pub(super) async fn has_calls(&self, function: &Function) -> Result<bool, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let first =
            api.get_next(&subjects.calls, &subjects.of_function(CALLS, Some(function)), 1).await?;
        Ok(first.is_some())
    }
}
