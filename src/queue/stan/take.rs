//! The worker's side: what the server delivers, until somebody has a place for it.
//!
//! The server sends a message again whose end it has not heard of for `ack_wait`, perhaps to another worker; there is no
//! word for "still busy". So workers ask each other, over plain NATS, before they make a call that was sent before.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Message as NatsMessage;
use bytes::Bytes;
use futures_util::StreamExt as _;
use prost::Message;

use crate::queue::call::{Call, Millis};
use crate::queue::stan::client::Session;
use crate::queue::stan::lease::Lease;
use crate::queue::stan::ledger::{Arrival, Key, Next};
use crate::queue::stan::message::{self, Progress};
use crate::queue::stan::nats::Fault;
use crate::queue::stan::proto::{Ack, Delivered, FIRST, Subscribe, Subscribed};
use crate::queue::stan::{Shared, message::Unreadable};
use crate::queue::{Delivery, Error, Handle, now};

/// Subscribing takes no longer.
const SUBSCRIBING: Duration = Duration::from_secs(5);
/// Who has a call says so within this time.
const ASKING: Duration = Duration::from_secs(1);
/// Between looks at what has waited for long.
const LOOK: Duration = Duration::from_millis(500);
/// Calls whose time has not come that wait here; others wait in the channel.
pub(super) const LATER: usize = 256;
/// Between calls that are sent back to the end of their channel: first, how that grows, and at last.
const SENDING_BACK: Duration = Duration::from_millis(10);
const SLOWER: f64 = 1.005;
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const MINE: &[u8] = b"mine";
const DONE: &[u8] = b"done";

/// A call that came and waits.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) call: Call,
    pub(super) attempts: u32,
}

/// Whether somebody has a message.
#[derive(Clone, PartialEq, Eq, Message)]
struct Question {
    #[prost(bool, tag = "1")]
    later: bool,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(int64, tag = "3")]
    timestamp: i64,
}

impl From<Key> for Question {
    fn from(key: Key) -> Self {
        Self { later: key.later, sequence: key.sequence, timestamp: key.timestamp }
    }
}

/// The next call whose time has come.
pub(super) async fn take(shared: &Arc<Shared>, places: usize) -> Result<Delivery, Error> {
    shared.start_worker(places);
    loop {
        let ready = shared.ready.notified();
        let next = shared.ledger().next(now());
        let wait = match next {
            Next::Now(key, Arrived { call, attempts }) => {
                // There may be more, and others who take.
                shared.ready.notify_one();
                let lease = Lease::new(Arc::clone(shared), key, call.clone(), attempts);
                return Ok(Delivery { call, attempts, handle: Handle::Stan(Box::new(lease)) });
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
        let questions = shared.nats.subscribe(shared.questions()).await?;
        let calls = follow(shared, false, places, &session).await?;
        let later = follow(shared, true, LATER + places, &session).await?;
        // None of them ends but with the connection; what they had taken in is in the ledger.
        tokio::select! {
            () = questions.for_each(|question| answer(shared, question)) => {}
            () = receive(shared, false, calls) => {}
            () = receive(shared, true, later) => {}
            () = set_aside(shared) => {}
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
    later: bool,
    most: usize,
    session: &Session,
) -> Result<Subscription, Fault> {
    let inbox = shared.nats.inbox();
    let deliveries = shared.nats.subscribe(inbox.clone()).await?;
    let channel = shared.channel(later).to_owned();
    let request = Subscribe {
        client_id: shared.worker.id().to_owned(),
        durable_name: channel.replace('.', "_"),
        channel,
        group: shared.options.group.clone(),
        inbox,
        max_in_flight: i32::try_from(most).unwrap_or(i32::MAX),
        ack_wait: i32::try_from(shared.lease().as_secs()).unwrap_or(i32::MAX),
        start_position: FIRST,
    };
    let subject = &session.server.subscribe;
    let subscribed: Subscribed = shared.nats.request(subject, &request, SUBSCRIBING).await?;
    match subscribed.error.as_str() {
        "" => Ok(Subscription { deliveries, acks: subscribed.ack_inbox }),
        error => Err(Fault::Refused(error.to_owned())),
    }
}

async fn receive(shared: &Arc<Shared>, later: bool, mut subscription: Subscription) {
    while let Some(message) = subscription.deliveries.next().await {
        let Ok(delivered) = Delivered::decode(message.payload) else {
            tracing::error!("What NATS Streaming delivers is not understood");
            continue;
        };
        let Delivered { sequence, timestamp, redelivered, data, .. } = delivered;
        let key = Key { later, sequence, timestamp };
        let arrival = shared.ledger().arrives(key, redelivered, &subscription.acks);
        match arrival {
            Arrival::New => admit(shared, key, data),
            Arrival::SentBefore => {
                let asking = Arc::clone(shared);
                shared.tasks.spawn(async move { admit_if_free(&asking, key, data).await });
            }
            Arrival::Nothing => {}
            Arrival::Done => shared.acknowledge(key).await,
        }
    }
}

/// Takes in a message that was sent before, unless another worker has it.
async fn admit_if_free(shared: &Arc<Shared>, key: Key, data: Bytes) {
    let question = Question::from(key).encode_to_vec().into();
    match shared.nats.ask(shared.questions(), question, ASKING).await {
        Ok(answer) if answer == DONE => shared.acknowledge(key).await,
        Ok(answer) if answer == MINE => shared.ledger().forget(key),
        _ => admit(shared, key, data),
    }
}

/// Answers another worker; nobody is told of what is not here.
async fn answer(shared: &Shared, question: NatsMessage) {
    let (Some(reply), Ok(asked)) = (question.reply, Question::decode(question.payload)) else {
        return;
    };
    let Question { later, sequence, timestamp } = asked;
    let has = shared.ledger().has(Key { later, sequence, timestamp });
    if let Some(done) = has {
        let word = Bytes::from_static(if done { DONE } else { MINE });
        // One who is not answered makes the call, at worst once more.
        let _ = shared.nats.send(reply.to_string(), word).await;
    }
}

fn admit(shared: &Arc<Shared>, key: Key, data: Bytes) {
    let options = &shared.options;
    let decoded = message::decode(&data, &options.default_namespace, fresh_id, now());
    let (call, progress) = match decoded {
        Ok(decoded) => decoded,
        Err(error) => {
            // Whatever becomes of the session, this comes to an end.
            let aside = Arc::clone(shared);
            return shared.tasks.spawn(async move { put_aside(&aside, key, data, &error).await });
        }
    };
    // What was never tried has no time; a stranger's word for it would keep a place for ever.
    let (attempts, at) = match key.later {
        true => (progress.attempts, progress.not_before.unwrap_or_default().max(1)),
        false => (0, now()),
    };
    shared.wait(key, at, Arrived { call, attempts });
}

fn fresh_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// A message that nobody can read is kept where the dead are.
async fn put_aside(shared: &Shared, key: Key, data: Bytes, error: &Unreadable) {
    let sequence = key.sequence;
    let kept = shared.worker.publish(&shared.dead, data).await;
    match kept {
        Ok(()) => {
            let dead = &shared.dead;
            tracing::error!(%error, sequence, "A message that is no call was put into {dead}");
            shared.acknowledge(key).await;
        }
        Err(fault) => {
            tracing::error!(%error, sequence, %fault, "A message that is no call cannot be put aside");
            shared.ledger().forget(key);
        }
    }
}

/// Stores what holds others up at the end of the channel of calls that are made later.
async fn set_aside(shared: &Shared) {
    let mut pause = SENDING_BACK;
    loop {
        let quiet = tokio::time::timeout(LOOK, shared.crowded.notified()).await.is_err();
        let mut sent_back = false;
        loop {
            let aside = shared.ledger().set_aside(now());
            let Some((key, at, Arrived { call, attempts })) = aside else { break };
            let _kept = Unsettled { shared, key };
            let progress = Progress { attempts, not_before: Some(at), reason: None };
            let encoded = message::encode(&call, &progress);
            match shared.worker.publish(&shared.later, encoded).await {
                Ok(()) => shared.acknowledge(key).await,
                Err(_) => break,
            }
            // What comes from there and goes there again fills the server's disk: less and less often, if it goes on.
            if key.later {
                tokio::time::sleep(pause).await;
                pause = pause.mul_f64(SLOWER).min(LONGEST_PAUSE);
                sent_back = true;
            }
        }
        if quiet && !sent_back {
            pause = SENDING_BACK;
        }
    }
}

/// A message on its way. If it does not get there, the server sends it again.
struct Unsettled<'a> {
    shared: &'a Shared,
    key: Key,
}

impl Drop for Unsettled<'_> {
    fn drop(&mut self) {
        self.shared.ledger().forget(self.key);
    }
}

impl Shared {
    /// Where workers ask each other.
    fn questions(&self) -> String {
        let Self { options, .. } = self;
        format!("_GATEWAY.stan.{}.{}.{}", options.cluster, options.group, self.channel(false))
    }

    /// Has a call wait until `at`.
    pub(super) fn wait(&self, key: Key, at: Millis, arrived: Arrived) {
        self.ledger().waits(key, arrived.call.function.clone(), at, arrived);
        self.ready.notify_one();
        self.crowded.notify_one();
    }

    /// Tells the server that a message is done. If it does not hear of it, it sends the message again.
    pub(super) async fn acknowledge(&self, key: Key) {
        let acks = self.ledger().done(key);
        // Its function may have a place for another.
        self.ready.notify_one();
        if let Some(acks) = acks {
            let channel = self.channel(key.later).to_owned();
            let ack = Ack { channel, sequence: key.sequence };
            let _ = self.nats.send(acks, ack.encode_to_vec().into()).await;
        }
    }
}
