//! Queue backend on NATS Streaming, compatible with Go gateways and Go workers.
//!
//! The main channel holds calls in the Go gateway's format. This gateway adds channels: `CHANNEL.later` and others
//! with this prefix hold delayed calls, and `CHANNEL.dead` holds dead letters. A call moves between channels by being
//! published to the next one before it is acknowledged in the previous one. NATS Streaming cannot look up a message,
//! so this backend supports no states, results, lists or cancelling.

mod accept;
mod callback;
mod channels;
mod client;
mod dedup;
mod execution_log;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod inflight;
mod lease;
mod members;
mod message;
mod nats;
mod ownership;
mod parking;
mod payload;
mod pending;
pub(super) mod probe;
mod proto;
mod subscribe;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;

pub(super) use self::lease::Lease;

use crate::call::QueuedCall;
use crate::stan::channels::{CHANNEL_COUNT, Channel};
use crate::stan::client::Client;
use crate::stan::dedup::Deduplicator;
use crate::stan::inflight::{Capacity, InflightTable};
use crate::stan::message::Progress;
use crate::stan::nats::{NatsConnection, NatsError};
use crate::stan::pending::ReceivedCall;
use crate::stan::subscribe::MAX_DELAYED;
use crate::tasks::Tasks;
use crate::{Delivery, Error, JobQueue, JobStore, MemoryPermit, Published, jetstream, now};
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Options in addition to those of the NATS connection.
#[derive(Clone, Debug)]
pub struct Options {
    /// Id of the cluster.
    pub cluster: String,
    /// Queue group: its workers share the calls.
    pub group: String,
    /// Name of this machine, part of the client ids, which must be unique in a cluster.
    pub host: String,
    /// Maximum delay between attempts to register with the cluster.
    pub reconnect_delay: Duration,
    /// Namespace of functions that are named without one.
    pub default_namespace: String,
    /// This process enqueues calls.
    pub publishes: bool,
}

/// The queue. Cheap to clone.
#[derive(Clone)]
pub struct Stan {
    shared: Arc<Shared>,
}

struct Shared {
    options: Options,
    connection: jetstream::Options,
    /// Names of the channels with calls, and of the channel with dead letters.
    channels: [String; CHANNEL_COUNT],
    dead_channel: String,
    /// Name of the channel with the execution log.
    log_channel: String,
    dedup: Deduplicator,
    nats: NatsConnection,
    publisher: Client,
    worker: Client,
    worker_started: AtomicBool,
    /// The messages that this worker holds. A leaf.
    inflight: Mutex<InflightTable<ReceivedCall>>,
    /// Notified when a call may have become runnable.
    ready: Notify,
    /// Notified when a channel may be congested.
    congested: [Notify; CHANNEL_COUNT],
    tasks: Tasks,
}

impl Stan {
    /// Starts to connect. If the server is unavailable, the queue becomes usable when the server does.
    ///
    /// # Errors
    /// When the options are invalid, for example a missing file or an invalid address.
    pub async fn open(connection: jetstream::Options, options: Options) -> anyhow::Result<Self> {
        let nats = NatsConnection::open(&connection).await?;
        let client = |role: &str| {
            let id = format!("faas-{role}-{}", client_id_part(&options.host));
            Client::new(nats.clone(), &options.cluster, id, options.reconnect_delay)
        };
        let tasks = Tasks::new();
        let (publisher, worker) = (client("publisher"), client("worker"));
        let shared = Arc::new(Shared {
            dead_channel: format!("{}.dead", connection.queue),
            log_channel: format!("{}.executed", connection.queue),
            dedup: Deduplicator::default(),
            channels: Channel::all().map(|channel| channel.name(&connection.queue)),
            options,
            connection,
            nats,
            publisher,
            worker,
            worker_started: AtomicBool::new(false),
            inflight: Mutex::new(InflightTable::new()),
            ready: Notify::new(),
            congested: [(); CHANNEL_COUNT].map(|()| Notify::new()),
            tasks,
        });
        tracing::info!(
            cluster = shared.options.cluster,
            "Queued calls are kept by NATS Streaming, which cannot look up a call: states, results, lists, \
             cancelling and Idempotency-Key are answered 501, and dead letters go to the channel {}",
            shared.dead_channel
        );
        if shared.options.publishes {
            let publishing = Arc::clone(&shared);
            shared.tasks.supervise_to_end("publisher", move || {
                let publishing = Arc::clone(&publishing);
                async move {
                    let stopping = &publishing.tasks.stopping;
                    publishing.publisher.run(stopping, |_| std::future::pending()).await;
                }
            });
        }
        Ok(Self { shared })
    }

    /// Returns the maximum size of a body whose message has headers of ordinary size.
    fn payload_limit(&self) -> usize {
        let whole = self.shared.nats.max_payload();
        // Base64 encodes three bytes as four.
        (whole - whole / 16).saturating_sub(ENVELOPE_BYTES) / 4 * 3
    }

    /// Enqueues `call`. Returns when the server has stored it.
    ///
    /// # Errors
    /// `Unreachable` and `TooLarge`: the call is not stored. `Unconfirmed`: it may be stored; if it is sent again with
    /// the same id, it is executed once. `Failed`: the server rejected it, or its response was invalid.
    async fn publish_call(&self, call: QueuedCall) -> Result<Published, Error> {
        let not_before = call.options.not_before;
        let data = message::encode(&call, &Progress { not_before, ..Progress::default() });
        if data.len() + ENVELOPE_BYTES > self.shared.nats.max_payload() {
            return Err(Error::TooLarge(self.payload_limit()));
        }
        let channel = match not_before {
            Some(at) => Channel::for_delay(at.saturating_sub(now())),
            None => Channel::CALLS,
        };
        let Shared { options, publisher, worker, .. } = &*self.shared;
        // A process that only executes calls has no publisher session. It enqueues only calls that callbacks request.
        let client = if options.publishes { publisher } else { worker };
        let stored = client.publish(self.shared.channel(channel), data).await;
        stored.map_err(|error| match error {
            NatsError::TooLarge => Error::TooLarge(self.payload_limit()),
            error => queue_error(error, &call),
        })?;
        Ok(Published { id: call.id, duplicate: false })
    }
}

impl JobQueue for Stan {
    fn new_call_id(&self, _function: &Function) -> String {
        uuid::Uuid::new_v4().to_string()
    }

    /// If the future is dropped after the message was sent, the server stores it: the call is executed, although its
    /// client does not learn that.
    async fn publish(
        &self,
        call: QueuedCall,
        _permit: Option<MemoryPermit>,
    ) -> Result<Published, Error> {
        // Boxed: this future is larger than those of the other backends, which are part of the future of each call.
        Box::pin(self.publish_call(call)).await
    }

    /// If the future is dropped, nothing is lost: a call leaves the table of messages when it is returned, without an
    /// await in between.
    async fn receive(&self, concurrency: usize) -> Result<Delivery, Error> {
        subscribe::receive(&self.shared, concurrency).await
    }

    /// The server redelivers pending calls to other workers.
    fn stop_receiving(&self) {
        self.shared.inflight().close();
    }

    fn store(&self) -> Result<Option<&dyn JobStore>, Error> {
        Ok(None)
    }

    /// Returns whether all required connections and sessions are usable.
    fn is_reachable(&self) -> bool {
        let Shared { nats, publisher, worker, options, worker_started, .. } = &*self.shared;
        nats.is_connected()
            && (!options.publishes || publisher.is_usable())
            && (!worker_started.load(Relaxed) || worker.is_usable())
    }

    fn reconnects(&self) -> u64 {
        self.shared.nats.connection_count().borrow().saturating_sub(1)
    }

    fn max_body_bytes(&self) -> Option<usize> {
        Some(self.payload_limit())
    }

    /// Closes the sessions. The server immediately redelivers unsettled calls to other workers.
    async fn close(&self) {
        self.shared.dedup.flush().await;
        self.shared.tasks.stop();
        let _ = tokio::time::timeout(STOP_TIMEOUT, self.shared.tasks.wait()).await;
        self.shared.nats.flush().await;
    }
}

/// Time for the background tasks to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of one channel's delayed calls in memory; the others stay in the channel.
const MAX_DELAYED_BYTES: usize = 16 << 20;
/// Space that is reserved in a message for ids, the channel name, and retry metadata.
const ENVELOPE_BYTES: usize = 1024;

impl Shared {
    fn inflight(&self) -> MutexGuard<'_, InflightTable<ReceivedCall>> {
        lock_unpoisoned(&self.inflight)
    }

    /// Returns the name of a channel.
    fn channel(&self, channel: Channel) -> &str {
        &self.channels[channel.number()]
    }

    /// Returns the server's redelivery timeout, in whole seconds.
    fn ack_wait(&self) -> Duration {
        Duration::from_secs(
            self.connection.lease.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX),
        )
    }

    /// Subscribes to calls at the first call of this function. `concurrency` is the maximum number of unacknowledged
    /// calls.
    fn start_worker(self: &Arc<Self>, concurrency: usize) {
        if self.worker_started.swap(true, Relaxed) {
            return;
        }
        self.inflight().set_capacity(Capacity {
            concurrency,
            max_delayed: MAX_DELAYED,
            max_delayed_bytes: MAX_DELAYED_BYTES,
        });
        for channel in Channel::all() {
            let shared = Arc::clone(self);
            self.tasks.supervise_to_end("parking", move || {
                let shared = Arc::clone(&shared);
                async move { parking::run_parking(&shared, channel).await }
            });
        }
        let shared = Arc::clone(self);
        self.tasks.supervise_to_end("ownership queries", move || {
            let shared = Arc::clone(&shared);
            async move { ownership::serve_queries(&shared).await }
        });
        let shared = Arc::clone(self);
        self.tasks.supervise_to_end("execution log writer", move || {
            let shared = Arc::clone(&shared);
            async move { dedup::run_writer(&shared).await }
        });
        let shared = Arc::clone(self);
        self.tasks.supervise_to_end("worker", move || {
            let shared = Arc::clone(&shared);
            async move {
                let stopping = &shared.tasks.stopping;
                let work = |session| subscribe::run_subscriptions(&shared, concurrency, session);
                shared.worker.run(stopping, work).await;
            }
        });
    }
}

/// Converts a NATS error about `call` to the queue's error.
fn queue_error(error: NatsError, call: &QueuedCall) -> Error {
    match error {
        NatsError::Unreachable | NatsError::NoResponders => Error::Unreachable,
        NatsError::Unconfirmed => Error::Unconfirmed,
        NatsError::TooLarge => Error::TooLarge(0),
        NatsError::Rejected(_) | NatsError::UnexpectedResponse => {
            tracing::warn!(
                call_id = call.id, function = %call.function, error = %error,
                "NATS Streaming rejected a call: {error}"
            );
            Error::Failed
        }
    }
}

/// Returns `host` with characters that are invalid in a client id replaced.
fn client_id_part(host: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    host.chars().map(|c| if allowed(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_characters_of_a_host_name_are_replaced() {
        assert_eq!(client_id_part("gateway-7f.example_1"), "gateway-7f_example_1");
        assert_eq!(client_id_part("höst:1"), "h_st_1");
    }
}
