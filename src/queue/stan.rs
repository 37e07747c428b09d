//! The queue on NATS Streaming, shared with Go gateways and Go workers.
//!
//! The channel has calls as the Go gateway writes them. Beside it are some of our own: `CHANNEL.later` and those whose names
//! begin so have calls whose time has not come, and `CHANNEL.dead` those that failed for good. A call goes from one to
//! another by being stored there before it is acknowledged here. Nothing can be looked up in a channel, so there are no states, no results,
//! no lists, and no taking back.

mod aside;
mod callback;
mod channels;
mod client;
mod executed;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod lease;
mod ledger;
mod members;
mod message;
mod nats;
mod once;
mod payload;
mod peers;
pub(super) mod probe;
mod proto;
mod take;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

pub(super) use self::lease::Lease;

use crate::queue::call::QueuedCall;
use crate::queue::jetstream;
use crate::queue::stan::channels::{COUNT, Channel};
use crate::queue::stan::client::Client;
use crate::queue::stan::ledger::{Ledger, Room};
use crate::queue::stan::message::Progress;
use crate::queue::stan::nats::{Fault, Nats};
use crate::queue::stan::once::Once;
use crate::queue::stan::take::{Arrived, LATER};
use crate::queue::status::Settlement;
use crate::queue::tasks::Tasks;
use crate::queue::{Delivery, Error, Published, now};

/// What is needed beside a connection to NATS.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cluster's id.
    pub cluster: String,
    /// Workers of one group share the calls.
    pub group: String,
    /// The name of this machine, part of the clients' ids: a cluster has each id but once.
    pub host: String,
    /// The longest pause between attempts to reach the cluster.
    pub reconnect_delay: Duration,
    /// Where a function lives whose caller did not say.
    pub default_namespace: String,
    /// Calls are taken in here.
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
    /// The names of the channels of calls, and of the one of what was given up.
    channels: [String; COUNT],
    dead: String,
    /// The channel of what was executed.
    log: String,
    once: Once,
    nats: Nats,
    publisher: Client,
    worker: Client,
    works: AtomicBool,
    ledger: Mutex<Ledger<Arrived>>,
    /// Somebody may find a call now.
    ready: Notify,
    /// Some of a channel may hold others up.
    crowded: [Notify; COUNT],
    tasks: Tasks,
}

impl Stan {
    /// Begins to connect. The server may be away: then the queue comes to life when the server does.
    ///
    /// # Errors
    /// When the options cannot be: a file that is not there, an address that is none.
    pub async fn open(connection: jetstream::Options, options: Options) -> anyhow::Result<Self> {
        let nats = Nats::open(&connection).await?;
        let client = |role: &str| {
            let id = format!("faas-{role}-{}", part_of_id(&options.host));
            Client::new(nats.clone(), &options.cluster, id, options.reconnect_delay)
        };
        let tasks = Tasks::new();
        let (publisher, worker) = (client("publisher"), client("worker"));
        let shared = Arc::new(Shared {
            dead: format!("{}.dead", connection.queue),
            log: format!("{}.executed", connection.queue),
            once: Once::default(),
            channels: Channel::all().map(|channel| channel.name(&connection.queue)),
            options,
            connection,
            nats,
            publisher,
            worker,
            works: AtomicBool::new(false),
            ledger: Mutex::new(Ledger::new()),
            ready: Notify::new(),
            crowded: [(); COUNT].map(|()| Notify::new()),
            tasks,
        });
        tracing::info!(
            cluster = shared.options.cluster,
            "Queued calls are kept by NATS Streaming, which cannot tell what became of one: states, results, lists, \
             cancelling and Idempotency-Key are answered 501, and calls that fail for good go to the channel {}",
            shared.dead
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

    /// Signs off: what was taken and not settled goes to others at once.
    pub async fn stop(&self) {
        self.shared.once.flush().await;
        self.shared.tasks.stop();
        let _ = tokio::time::timeout(STOP, self.shared.tasks.wait()).await;
        self.shared.nats.flush().await;
    }

    pub(super) fn is_reachable(&self) -> bool {
        let Shared { nats, publisher, worker, options, works, .. } = &*self.shared;
        nats.is_connected()
            && (!options.publishes || publisher.is_usable())
            && (!works.load(Relaxed) || worker.is_usable())
    }

    pub(super) fn reconnects(&self) -> u64 {
        self.shared.nats.connections().borrow().saturating_sub(1)
    }

    /// The largest body that fits into a message beside headers of the usual size.
    pub(super) fn max_body_bytes(&self) -> usize {
        let whole = self.shared.nats.max_payload();
        // Base64 makes four bytes of three.
        (whole - whole / 16).saturating_sub(ENVELOPE) / 4 * 3
    }

    pub(super) async fn publish(&self, call: QueuedCall) -> Result<Published, Error> {
        if call.options.idempotency_key.is_some() {
            return Err(Error::Unsupported("NATS Streaming does not know a call again"));
        }
        let not_before = call.options.not_before;
        let data = message::encode(&call, &Progress { not_before, ..Progress::default() });
        if data.len() + ENVELOPE > self.shared.nats.max_payload() {
            return Err(Error::TooLarge(self.max_body_bytes()));
        }
        let channel = match not_before {
            Some(at) => Channel::later(at.saturating_sub(now())),
            None => Channel::CALLS,
        };
        let Shared { options, publisher, worker, .. } = &*self.shared;
        // A process that only executes calls has no publisher: what it queues are calls that callbacks ask for.
        let client = if options.publishes { publisher } else { worker };
        let stored = client.publish(self.shared.channel(channel), data).await;
        stored.map_err(|fault| match fault {
            Fault::TooLarge => Error::TooLarge(self.max_body_bytes()),
            fault => told(fault, &call),
        })?;
        Ok(Published { id: call.id, duplicate: false })
    }

    pub(super) async fn receive(&self, places: usize) -> Result<Delivery, Error> {
        take::take(&self.shared, places).await
    }

    /// Takes no more: the server gives to others what nobody has taken here.
    pub(super) fn stop_receiving(&self) {
        self.shared.ledger().close();
    }

    pub(super) async fn claim(&self, lease: &Lease) -> Result<bool, Error> {
        lease.begin().await
    }

    pub(super) async fn settle(&self, lease: &Lease, settlement: &Settlement) -> Result<(), Error> {
        lease.settle(settlement).await
    }
}

/// How long what goes on may take to end.
const STOP: Duration = Duration::from_secs(2);
/// Bytes of calls of one channel that are made later, and wait here: others wait in the channel.
const LATER_BYTES: usize = 16 << 20;
/// What a message has beside the call: ids, the channel, and what is noted of the call later.
const ENVELOPE: usize = 1024;

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger<Arrived>> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of a channel.
    fn channel(&self, channel: Channel) -> &str {
        &self.channels[channel.number()]
    }

    /// How long the server waits before it sends a call again: whole seconds.
    fn lease(&self) -> Duration {
        Duration::from_secs(
            self.connection.lease.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX),
        )
    }

    /// Has calls delivered, `places` at a time, from the first time on that somebody wants one.
    fn start_worker(self: &Arc<Self>, places: usize) {
        if self.works.swap(true, Relaxed) {
            return;
        }
        self.ledger().make_room(Room { places, later: LATER, later_bytes: LATER_BYTES });
        for channel in Channel::all() {
            let crowded = Arc::clone(self);
            self.tasks.supervise_to_end("room", move || {
                let crowded = Arc::clone(&crowded);
                async move { aside::make_room(&crowded, channel).await }
            });
        }
        let answering = Arc::clone(self);
        self.tasks.supervise_to_end("peers", move || {
            let answering = Arc::clone(&answering);
            async move { peers::answer_all(&answering).await }
        });
        let writing = Arc::clone(self);
        self.tasks.supervise_to_end("log of executions", move || {
            let writing = Arc::clone(&writing);
            async move { once::write_all(&writing).await }
        });
        let working = Arc::clone(self);
        self.tasks.supervise_to_end("worker", move || {
            let working = Arc::clone(&working);
            async move {
                let stopping = &working.tasks.stopping;
                let work = |session| take::serve(&working, places, session);
                working.worker.run(stopping, work).await;
            }
        });
    }
}

/// What is said of a fault with `call` to whoever uses the queue.
fn told(fault: Fault, call: &QueuedCall) -> Error {
    match fault {
        Fault::Away | Fault::Nobody => Error::Unreachable,
        Fault::Unconfirmed => Error::Unconfirmed,
        Fault::TooLarge => Error::TooLarge(0),
        Fault::Refused(_) | Fault::Odd => {
            tracing::warn!(
                call_id = call.id, function = %call.function, error = %fault,
                "NATS Streaming does not store a call: {fault}"
            );
            Error::Failed
        }
    }
}

/// `host` with all that an id may not have replaced.
fn part_of_id(host: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    host.chars().map(|c| if allowed(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_name_is_made_part_of_an_id() {
        assert_eq!(part_of_id("gateway-7f.example_1"), "gateway-7f_example_1");
        assert_eq!(part_of_id("höst:1"), "h_st_1");
    }
}
