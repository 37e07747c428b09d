//! The worker's subscriptions: receives messages, and returns calls that are due.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use prost::Message as _;

use crate::stan::channels::Channel;
use crate::stan::client::Session;
use crate::stan::inflight::{ArrivalAction, MessageKey, NextCall};
use crate::stan::lease::Lease;
use crate::stan::nats::NatsError;
use crate::stan::pending::ReceivedCall;
use crate::stan::proto::{Delivered, START_AT_FIRST, Subscribe, Subscribed};
use crate::stan::{Shared, accept, dedup, ownership};
use crate::{Delivery, Error, now};

/// Timeout of a subscription request.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Delay before a rejected subscription is retried.
const SUBSCRIBE_RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum number of delayed calls of one channel in memory; the others stay in the channel.
pub(super) const MAX_DELAYED: usize = 256;

/// Waits for the next runnable call.
pub(super) async fn receive(shared: &Arc<Shared>, concurrency: usize) -> Result<Delivery, Error> {
    shared.start_worker(concurrency);
    loop {
        let ready = shared.ready.notified();
        let next = shared.inflight().next(now());
        let wait = match next {
            NextCall::Ready(key, ReceivedCall { call, progress }) => {
                // There may be more calls and more receivers.
                shared.ready.notify_one();
                let attempts = progress.attempts;
                let lease = Lease::new(Arc::clone(shared), key, call.clone(), progress);
                return Ok(Delivery {
                    call,
                    attempts,
                    body_missing: false,
                    lease: crate::Lease::Stan(Box::new(lease)),
                });
            }
            NextCall::NotBefore(at) => Duration::from_millis(at.saturating_sub(now()) + 1),
            NextCall::Empty => Duration::MAX,
        };
        let _ = tokio::time::timeout(wait, ready).await;
    }
}

/// Subscribes to all channels and accepts their messages. Returns the error that ended this.
pub(super) async fn run_subscriptions(
    shared: &Arc<Shared>,
    concurrency: usize,
    session: Arc<Session>,
) -> NatsError {
    let served = async {
        let calls = subscribe(shared, Channel::CALLS, concurrency, &session).await?;
        let [_, delayed @ ..] = Channel::all();
        let delayed = delayed.map(|channel| {
            consume_with_retry(shared, channel, MAX_DELAYED + concurrency, &session)
        });
        // The branches end only with the connection; accepted messages are in the table.
        tokio::select! {
            error = dedup::follow_log(shared, &session) => return Err(error),
            () = consume(shared, Channel::CALLS, calls) => {}
            _ = join_all(delayed) => {}
        }
        Err(NatsError::Unreachable)
    };
    match served.await {
        Ok(never) => never,
        Err(error) => error,
    }
}

/// A subscription: its deliveries and the subject for acknowledgements.
struct Subscription {
    deliveries: async_nats::Subscriber,
    ack_subject: String,
}

async fn subscribe(
    shared: &Shared,
    channel: Channel,
    max_in_flight: usize,
    session: &Session,
) -> Result<Subscription, NatsError> {
    let inbox = shared.nats.inbox();
    let deliveries = shared.nats.subscribe(inbox.clone()).await?;
    let channel = shared.channel(channel).to_owned();
    let request = Subscribe {
        client_id: shared.worker.id().to_owned(),
        durable_name: channel.replace('.', "_"),
        channel,
        group: shared.options.group.clone(),
        inbox,
        max_in_flight: i32::try_from(max_in_flight).unwrap_or(i32::MAX),
        ack_wait: i32::try_from(shared.ack_wait().as_secs()).unwrap_or(i32::MAX),
        start_position: START_AT_FIRST,
        ..Subscribe::default()
    };
    let subject = &session.server.subscribe;
    let subscribed: Subscribed = shared.nats.request(subject, &request, SUBSCRIBE_TIMEOUT).await?;
    match subscribed.error.as_str() {
        "" => Ok(Subscription { deliveries, ack_subject: subscribed.ack_inbox }),
        error => Err(NatsError::Rejected(error.to_owned())),
    }
}

/// Consumes a channel that is not required by the others, since the server may limit the number of channels. Retries a
/// rejected subscription.
async fn consume_with_retry(
    shared: &Arc<Shared>,
    channel: Channel,
    max_in_flight: usize,
    session: &Session,
) {
    let mut last_logged = None;
    loop {
        match subscribe(shared, channel, max_in_flight, session).await {
            Ok(subscription) => return consume(shared, channel, subscription).await,
            Err(error) => {
                if last_logged.as_ref() != Some(&error) {
                    let channel = shared.channel(channel);
                    tracing::warn!(
                        channel, error = %error,
                        "NATS Streaming rejects the subscription to a channel of delayed calls: {error}"
                    );
                    last_logged = Some(error);
                }
                tokio::time::sleep(SUBSCRIBE_RETRY_INTERVAL).await;
            }
        }
    }
}

/// Handles all deliveries of a subscription.
async fn consume(shared: &Arc<Shared>, channel: Channel, mut subscription: Subscription) {
    while let Some(message) = subscription.deliveries.next().await {
        let Ok(delivered) = Delivered::decode(message.payload) else {
            tracing::error!("A delivery of NATS Streaming cannot be decoded");
            continue;
        };
        let Delivered { sequence, timestamp, redelivered, data, .. } = delivered;
        let key = MessageKey { channel, sequence, timestamp };
        let arrival =
            shared.inflight().on_message(key, redelivered, data.len(), &subscription.ack_subject);
        match arrival {
            ArrivalAction::Accept => accept::accept(shared, key, data),
            ArrivalAction::CheckOwner => {
                let querying = Arc::clone(shared);
                shared.tasks.spawn_to_completion(async move {
                    ownership::accept_unless_owned(&querying, key, data).await
                });
            }
            ArrivalAction::Ignore => {}
            ArrivalAction::AckAgain => shared.acknowledge(key).await,
        }
    }
}
