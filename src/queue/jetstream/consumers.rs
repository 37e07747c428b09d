//! The consumers, one for each function: which of them are there, and how they are made. What the server says of a
//! consumer beside its name costs it a look at every call, so it is asked for that once.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::ConsumerErrorKind;

use crate::function::Function;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{self, CALLS};

/// A consumer that was not used for so long may have been removed.
const BELIEVED: Duration = Duration::from_secs(3600);
/// That a consumer has been made is said within this time.
const AT_ONCE: Duration = Duration::from_secs(1);

/// What is known of the consumers.
#[derive(Default)]
pub(super) struct Consumers {
    /// Those that are there, as of one connection, when they were used or seen last, and when all were listed.
    connection: u64,
    there: HashMap<Function, Instant>,
    listed: Option<Instant>,
    /// For how long a call is its taker's.
    leases: HashMap<Function, Duration>,
    /// Since which start of the server they were seen to be right.
    mended: HashMap<Function, String>,
}

impl Consumers {
    /// There is a new connection, perhaps to another server.
    pub(super) fn forget(&mut self, connection: u64) {
        (self.connection, self.listed) = (connection, None);
        self.there.clear();
    }

    /// Whether a consumer is there, which is used now.
    fn knows(&mut self, function: &Function) -> bool {
        let Some(used) = self.there.get_mut(function) else { return false };
        let believed = used.elapsed() < BELIEVED;
        if believed {
            *used = Instant::now();
        }
        believed
    }

    /// It may be gone, or may be another.
    pub(super) fn doubt(&mut self, function: &Function) {
        self.there.remove(function);
        self.leases.remove(function);
    }

    pub(super) fn is_mended(&self, function: &Function, server: &str) -> bool {
        self.mended.get(function).is_some_and(|mended| mended == server)
    }

    pub(super) fn mended(&mut self, function: &Function, server: String) {
        self.mended.insert(function.clone(), server);
    }

    pub(super) fn lease(&self, function: &Function) -> Option<Duration> {
        self.leases.get(function).copied()
    }
}

impl Shared {
    /// The functions with a consumer, as they were not longer than `age` ago, and whether the server was asked now.
    pub(super) async fn functions(&self, age: Duration) -> Result<(Vec<Function>, bool), Fault> {
        let connection = self.ready().await?.server.connection().await?;
        {
            let consumers = self.consumers();
            let fresh = consumers.listed.is_some_and(|at| at.elapsed() <= age);
            if fresh && consumers.connection == connection {
                return Ok((consumers.there.keys().cloned().collect(), false));
            }
        }
        let names = self.server.names(&self.names.calls).await?;
        let found: Vec<_> = names.iter().filter_map(|name| subject::consumed(name)).collect();
        let mut consumers = self.consumers();
        if consumers.connection == connection {
            let now = Instant::now();
            consumers.there = found.iter().map(|function| (function.clone(), now)).collect();
            consumers.listed = Some(now);
        }
        Ok((found, true))
    }

    /// Sees that there is a consumer for `function`.
    pub(super) async fn consumer(&self, function: &Function) -> Result<(), Fault> {
        let known = {
            let mut consumers = self.consumers();
            self.server.connected() == Some(consumers.connection) && consumers.knows(function)
        };
        if known { Ok(()) } else { Box::pin(self.find_consumer(function)).await }
    }

    async fn find_consumer(&self, function: &Function) -> Result<(), Fault> {
        if !self.functions(Duration::ZERO).await?.0.contains(function) {
            let connection = self.server.connection().await?;
            let made = self.ask_consumer(function).await?;
            {
                let mut consumers = self.consumers();
                if consumers.connection == connection {
                    consumers.there.insert(function.clone(), Instant::now());
                }
                consumers.leases.insert(function.clone(), made);
            }
            // Takers that miss it find the consumer when they look around.
            let name = subject::consumer(function).into();
            let said = self.server.client.publish(self.names.news(), name);
            let _ = tokio::time::timeout(AT_ONCE, said).await;
        }
        if self.lines().add(function) {
            self.ready.notify_one();
        }
        Ok(())
    }

    /// Sees that there is a consumer for `function`, and that it is known for how long a call is its taker's.
    pub(super) async fn lease(&self, function: &Function) -> Result<(), Fault> {
        self.consumer(function).await?;
        if self.consumers().lease(function).is_none() {
            let lease = Box::pin(self.ask_consumer(function)).await?;
            self.consumers().leases.insert(function.clone(), lease);
        }
        Ok(())
    }

    /// The consumer of `function`, made if it is not there: for how long a call is its taker's.
    async fn ask_consumer(&self, function: &Function) -> Result<Duration, Fault> {
        let (server, names, lease) = (&self.server, &self.names, self.options.lease);
        let name = subject::consumer(function);
        let config = pull::Config {
            durable_name: Some(name.clone()),
            filter_subject: names.of(CALLS, Some(function)),
            ack_policy: AckPolicy::Explicit,
            ack_wait: lease,
            max_deliver: -1,
            // Delayed calls count among these, and must not hold up the others.
            max_ack_pending: -1,
            ..pull::Config::default()
        };
        let stream = server.context.get_stream_no_info(&names.calls).await;
        let stream = stream.map_err(|_| Fault::Away)?;
        let made: PullConsumer =
            stream.get_or_create_consumer(&name, config).await.map_err(|error| {
                match error.kind() {
                    ConsumerErrorKind::JetStream(error) if error.code() != 503 => {
                        Fault::Refused(error.error_code().0, error.to_string())
                    }
                    _ => Fault::Away,
                }
            })?;
        Ok(made.cached_info().config.ack_wait.min(lease))
    }
}
