//! The worker's side: what the server delivers, until somebody has a place for it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use prost::Message as _;

use crate::queue::call::{QueuedCall, UnixMillis};
use crate::queue::stan::channels::Channel;
use crate::queue::stan::client::Session;
use crate::queue::stan::lease::Lease;
use crate::queue::stan::ledger::{Arrival, Key, Next};
use crate::queue::stan::message::{self, Progress, Unreadable};
use crate::queue::stan::nats::Fault;
use crate::queue::stan::proto::{Ack, Delivered, FIRST, Subscribe, Subscribed};
use crate::queue::stan::{Shared, aside, once, peers};
use crate::queue::{Delivery, Error, LeaseHandle, now};

/// Subscribing takes no longer.
const SUBSCRIBING: Duration = Duration::from_secs(5);
/// Before a channel that the server refuses is asked for again.
const AGAIN: Duration = Duration::from_secs(5);
/// Calls of one channel whose time has not come that wait here; others wait in the channel.
pub(super) const LATER: usize = 256;

/// A call that came and waits.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) call: QueuedCall,
    pub(super) progress: Progress,
}

/// The next call whose time has come.
pub(super) async fn take(shared: &Arc<Shared>, places: usize) -> Result<Delivery, Error> {
    shared.start_worker(places);
    loop {
        let ready = shared.ready.notified();
        let next = shared.ledger().next(now());
        let wait = match next {
            Next::Now(key, Arrived { call, progress }) => {
                // There may be more, and others who take.
                shared.ready.notify_one();
                let attempts = progress.attempts;
                let lease = Lease::new(Arc::clone(shared), key, call.clone(), progress);
                return Ok(Delivery {
                    call,
                    attempts,
                    body_missing: false,
                    handle: LeaseHandle::Stan(Box::new(lease)),
                });
            }
            Next::NotBefore(at) => Duration::from_millis(at.saturating_sub(now()) + 1),
            Next::Nothing => Duration::MAX,
        };
        let _ = tokio::time::timeout(wait, ready).await;
    }
}

/// Has the server deliver, and takes in what comes; returns what went wrong.
pub(super) async fn serve(shared: &Arc<Shared>, places: usize, session: Arc<Session>) -> Fault {
    let served = async {
        let calls = follow(shared, Channel::CALLS, places, &session).await?;
        let [_, later @ ..] = Channel::all();
        let later = later.map(|channel| keep_following(shared, channel, LATER + places, &session));
        // None of them ends but with the connection; what they had taken in is in the ledger.
        tokio::select! {
            fault = once::follow(shared, &session) => return Err(fault),
            () = receive(shared, Channel::CALLS, calls) => {}
            _ = join_all(later) => {}
        }
        Err(Fault::Away)
    };
    match served.await {
        Ok(never) => never,
        Err(fault) => fault,
    }
}

/// What a subscription is: where it is delivered to, and where the ends are told.
struct Subscription {
    deliveries: async_nats::Subscriber,
    acks: String,
}

async fn follow(
    shared: &Shared,
    channel: Channel,
    most: usize,
    session: &Session,
) -> Result<Subscription, Fault> {
    let inbox = shared.nats.inbox();
    let deliveries = shared.nats.subscribe(inbox.clone()).await?;
    let channel = shared.channel(channel).to_owned();
    let request = Subscribe {
        client_id: shared.worker.id().to_owned(),
        durable_name: channel.replace('.', "_"),
        channel,
        group: shared.options.group.clone(),
        inbox,
        max_in_flight: i32::try_from(most).unwrap_or(i32::MAX),
        ack_wait: i32::try_from(shared.lease().as_secs()).unwrap_or(i32::MAX),
        start_position: FIRST,
        ..Subscribe::default()
    };
    let subject = &session.server.subscribe;
    let subscribed: Subscribed = shared.nats.request(subject, &request, SUBSCRIBING).await?;
    match subscribed.error.as_str() {
        "" => Ok(Subscription { deliveries, acks: subscribed.ack_inbox }),
        error => Err(Fault::Refused(error.to_owned())),
    }
}

/// The same for a channel without which the others go on: a server may not allow so many.
async fn keep_following(shared: &Arc<Shared>, channel: Channel, most: usize, session: &Session) {
    let mut told = None;
    loop {
        match follow(shared, channel, most, session).await {
            Ok(subscription) => return receive(shared, channel, subscription).await,
            Err(fault) => {
                if told.as_ref() != Some(&fault) {
                    let channel = shared.channel(channel);
                    tracing::warn!(
                        channel, error = %fault,
                        "NATS Streaming delivers nothing of a channel of calls that are made later: {fault}"
                    );
                    told = Some(fault);
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn receive(shared: &Arc<Shared>, channel: Channel, mut subscription: Subscription) {
    while let Some(message) = subscription.deliveries.next().await {
        let Ok(delivered) = Delivered::decode(message.payload) else {
            tracing::error!("What NATS Streaming delivers is not understood");
            continue;
        };
        let Delivered { sequence, timestamp, redelivered, data, .. } = delivered;
        let key = Key { channel, sequence, timestamp };
        let arrival = shared.ledger().arrives(key, redelivered, data.len(), &subscription.acks);
        match arrival {
            Arrival::New => admit(shared, key, data),
            Arrival::SentBefore => {
                let asking = Arc::clone(shared);
                shared.tasks.spawn_to_completion(async move {
                    peers::admit_if_free(&asking, key, data).await
                });
            }
            Arrival::Nothing => {}
            Arrival::Done => shared.acknowledge(key).await,
        }
    }
}

pub(super) fn admit(shared: &Arc<Shared>, key: Key, data: Bytes) {
    let options = &shared.options;
    // Its gateway may not have said when the call was submitted; the server says when it was stored.
    let stored_at = UnixMillis::try_from(key.timestamp / 1_000_000).unwrap_or_default();
    let decoded = message::decode(&data, &options.default_namespace, fresh_id, stored_at);
    let (call, progress) = match decoded {
        Ok(decoded) => decoded,
        Err(error) => {
            // Whatever becomes of the session, this comes to an end.
            let aside = Arc::clone(shared);
            return shared
                .tasks
                .spawn_to_completion(async move { put_aside(&aside, key, data, &error).await });
        }
    };
    if key.channel.is_later() {
        let at = progress.not_before.unwrap_or_default().max(1);
        return shared.wait(key, at, Arrived { call, progress });
    }
    // What gateways queue has not been executed, whatever its headers say: clients can write those, too. Only one that was
    // dead has a reason, and is another call than before.
    let moves = progress.reason.as_ref().map_or(0, |_| progress.moves.saturating_add(1));
    let progress = Progress { moves, others: progress.others, ..Progress::default() };
    match call.options.not_before.filter(|at| *at > now()) {
        Some(at) => aside::move_to_later(shared, key, at, Arrived { call, progress }),
        None => shared.wait(key, now(), Arrived { call, progress }),
    }
}

fn fresh_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// A message that nobody can read is kept where the dead are.
async fn put_aside(shared: &Shared, key: Key, data: Bytes, error: &Unreadable) {
    let (id, sequence) = (message::id_in(&data), key.sequence);
    let kept = shared.worker.publish_patiently(&shared.dead, data).await;
    match kept {
        Ok(()) => {
            let dead = &shared.dead;
            tracing::error!(call_id = id, %error, sequence, "A message that is no call was put into {dead}");
            shared.acknowledge(key).await;
        }
        Err(fault) => {
            tracing::error!(call_id = id, %error, sequence, %fault, "A message that is no call cannot be put aside");
            shared.ledger().forget(key);
        }
    }
}

impl Shared {
    /// Has a call wait until `at`.
    pub(super) fn wait(&self, key: Key, at: UnixMillis, arrived: Arrived) {
        self.ledger().waits(key, arrived.call.function.clone(), at, arrived);
        self.ready.notify_one();
        self.crowded[key.channel.number()].notify_one();
    }

    /// Tells the server that a message is done. If it does not hear of it, it sends the message again.
    pub(super) async fn acknowledge(&self, key: Key) {
        let acks = self.ledger().done(key);
        // Its function may have a place for another.
        self.ready.notify_one();
        if let Some(acks) = acks {
            let channel = self.channel(key.channel).to_owned();
            let ack = Ack { channel, sequence: key.sequence };
            let _ = self.nats.send(acks, ack.encode_to_vec().into()).await;
        }
    }
}
