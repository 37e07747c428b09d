//! Workers among themselves.
//!
//! The server sends a message again whose end it has not heard of for `ack_wait`, perhaps to another worker; there is no
//! word for "still busy". So workers ask each other, over plain NATS, before they make a call that was sent before. One
//! answers whether the server knows it at that moment or not.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Message as NatsMessage;
use bytes::Bytes;
use futures_util::StreamExt as _;
use prost::Message;

use crate::queue::stan::Shared;
use crate::queue::stan::channels::Channel;
use crate::queue::stan::ledger::Key;
use crate::queue::stan::take::admit;

/// Who has a call says so within this time.
const ASKING: Duration = Duration::from_secs(1);
/// Before the questions are asked for again.
const AGAIN: Duration = Duration::from_secs(1);
const MINE: &[u8] = b"mine";
const DONE: &[u8] = b"done";

/// Whether somebody has a message.
#[derive(Clone, PartialEq, Eq, Message)]
struct Question {
    #[prost(uint32, tag = "1")]
    channel: u32,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(int64, tag = "3")]
    timestamp: i64,
}

impl From<Key> for Question {
    fn from(Key { channel, sequence, timestamp }: Key) -> Self {
        Self { channel: channel.number().try_into().unwrap_or(u32::MAX), sequence, timestamp }
    }
}

/// Where workers ask each other.
fn subject(shared: &Shared) -> String {
    let Shared { options, .. } = shared;
    let channel = shared.channel(Channel::CALLS);
    format!("_GATEWAY.stan.{}.{}.{channel}", options.cluster, options.group)
}

/// Answers other workers, until the queue stops.
pub(super) async fn answer_all(shared: &Shared) {
    let answering = async {
        loop {
            if let Ok(questions) = shared.nats.subscribe(subject(shared)).await {
                questions.for_each(|question| answer(shared, question)).await;
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    // Who is not answered makes the call himself.
    tokio::select! {
        () = shared.tasks.stopping.cancelled() => {}
        () = answering => {}
    }
}

/// Answers another worker; nobody is told of what is not here.
async fn answer(shared: &Shared, question: NatsMessage) {
    let (Some(reply), Ok(asked)) = (question.reply, Question::decode(question.payload)) else {
        return;
    };
    let Question { channel, sequence, timestamp } = asked;
    let Some(channel) = Channel::numbered(channel) else { return };
    let has = shared.ledger().has(Key { channel, sequence, timestamp });
    if let Some(done) = has {
        let word = Bytes::from_static(if done { DONE } else { MINE });
        // One who is not answered makes the call, at worst once more.
        let _ = shared.nats.send(reply.to_string(), word).await;
    }
}

/// Takes in a message that was sent before, unless another worker has it.
pub(super) async fn admit_if_free(shared: &Arc<Shared>, key: Key, data: Bytes) {
    let question = Question::from(key).encode_to_vec().into();
    match shared.nats.ask(subject(shared), question, ASKING).await {
        Ok(answer) if answer == DONE => shared.acknowledge(key).await,
        Ok(answer) if answer == MINE => shared.ledger().forget(key),
        _ => admit(shared, key, data),
    }
}
