//! Ownership queries between workers.
//!
//! The server redelivers a message that is not acknowledged within `ack_wait`, perhaps to another worker, and has no
//! way to extend this time. So before a worker executes a redelivered call, it asks the other workers over plain NATS
//! whether one of them owns it. Workers answer even while they have no session.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Message as NatsMessage;
use bytes::Bytes;
use futures_util::StreamExt as _;
use prost::Message;

use crate::stan::Shared;
use crate::stan::accept::accept;
use crate::stan::channels::Channel;
use crate::stan::inflight::MessageKey;

/// Time to wait for the owner's response.
const QUERY_TIMEOUT: Duration = Duration::from_secs(1);
/// Delay before a failed subscription is retried.
const SUBSCRIBE_RETRY_INTERVAL: Duration = Duration::from_secs(1);
const OWNED: &[u8] = b"mine";
const FINISHED: &[u8] = b"done";

/// Asks whether a worker owns a message.
#[derive(Clone, PartialEq, Eq, Message)]
struct OwnershipQuery {
    #[prost(uint32, tag = "1")]
    channel: u32,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(int64, tag = "3")]
    timestamp: i64,
}

impl From<MessageKey> for OwnershipQuery {
    fn from(MessageKey { channel, sequence, timestamp }: MessageKey) -> Self {
        Self { channel: channel.number().try_into().unwrap_or(u32::MAX), sequence, timestamp }
    }
}

/// Returns the subject for ownership queries.
fn subject(shared: &Shared) -> String {
    let Shared { options, .. } = shared;
    let channel = shared.channel(Channel::CALLS);
    format!("_GATEWAY.stan.{}.{}.{channel}", options.cluster, options.group)
}

/// Answers queries of other workers until the queue stops.
pub(super) async fn serve_queries(shared: &Shared) {
    let serving = async {
        loop {
            if let Ok(queries) = shared.nats.subscribe(subject(shared)).await {
                queries.for_each(|query| answer_query(shared, query)).await;
            }
            tokio::time::sleep(SUBSCRIBE_RETRY_INTERVAL).await;
        }
    };
    // A worker that gets no response executes the call.
    tokio::select! {
        () = shared.tasks.stopping.cancelled() => {}
        () = serving => {}
    }
}

/// Answers a query, unless the message is not here.
async fn answer_query(shared: &Shared, query: NatsMessage) {
    let (Some(reply), Ok(query)) = (query.reply, OwnershipQuery::decode(query.payload)) else {
        return;
    };
    let OwnershipQuery { channel, sequence, timestamp } = query;
    let Some(channel) = Channel::from_number(channel) else { return };
    let is_finished = shared.inflight().is_finished(MessageKey { channel, sequence, timestamp });
    if let Some(finished) = is_finished {
        let response = Bytes::from_static(if finished { FINISHED } else { OWNED });
        // If the response is lost, the call is executed twice at worst.
        let _ = shared.nats.send(reply.to_string(), response).await;
    }
}

/// Accepts a redelivered message unless another worker owns it.
pub(super) async fn accept_unless_owned(shared: &Arc<Shared>, key: MessageKey, data: Bytes) {
    let query = OwnershipQuery::from(key).encode_to_vec().into();
    match shared.nats.request_raw(subject(shared), query, QUERY_TIMEOUT).await {
        Ok(response) if response == FINISHED => shared.acknowledge(key).await,
        Ok(response) if response == OWNED => shared.inflight().release(key),
        _ => accept(shared, key, data),
    }
}
