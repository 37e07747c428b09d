//! Decodes and buffers delivered messages.
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::Message as Delivered;

use crate::call::{QueuedCall, UnixMillis};
use crate::jetstream::Shared;
use crate::jetstream::ack::AckSubject;
use crate::jetstream::batch::unpack::BatchDelivery;
use crate::jetstream::consume::received::{Received, Source};
use crate::jetstream::consume::supervisor::supervise_leases;
use crate::jetstream::undecodable::{RawMessage, Reason};
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::message::{self, Message};
use crate::jetstream::wire::subjects::{self, CALLS};
use crate::now;

/// Maximum delay of one nak; a call with a longer delay is nak'ed again.
const MAX_NAK_DELAY: Duration = Duration::from_secs(24 * 3600);

/// A delivered message, and the consumer that delivered it.
struct Arrival {
    raw: RawMessage,
    function_index: usize,
    consumer: Arc<str>,
    lease: Duration,
}

/// Buffers a delivered call, or naks it if it is not due yet.
pub(super) async fn on_message(shared: &Arc<Shared>, message: async_nats::Message) {
    let delivered = Delivered { message, context: shared.api.context.clone() };
    let Some(reply) = delivered.reply.as_ref().map(ToString::to_string) else { return };
    let Ok(info) = delivered.info() else { return };
    let sequence = info.stream_sequence;
    let deliveries = u32::try_from(info.delivered).unwrap_or(1);
    let stored_at =
        UnixMillis::try_from(info.published.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
    let consumer: Arc<str> = info.consumer.into();
    let Some(function) = subjects::function_of_consumer(&consumer) else { return };
    let Some(function_index) = shared.pull_scheduler().index_of(&function) else { return };
    let key = subjects::batch_key(&delivered.subject);
    shared.pull_scheduler().on_message(
        function_index,
        subjects::call_count(&delivered.subject),
        Instant::now(),
    );
    // The lease has expired, but this process still holds the call: it must not be executed a second time.
    if let Some(received) = shared.claims.tracked(sequence) {
        received.update_ack_subject(reply);
        received.in_progress(shared).await;
        return;
    }
    let lease = shared.consumers().lease(&function);
    let lease = lease.unwrap_or(shared.options.lease);
    let delivered = delivered.message;
    let message = Message::from_stored(delivered.headers.unwrap_or_default(), delivered.payload);
    let subject = delivered.subject;
    let raw = RawMessage { message, subject, function, sequence, deliveries, stored_at };
    let arrival = Arrival { raw, function_index, consumer, lease };
    match key {
        Some(key) => {
            let (this, tasks) = (Arc::clone(shared), Arc::clone(shared));
            tasks.tasks.spawn(async move { arrival.buffer_batch(&this, key, reply).await });
        }
        None => arrival.buffer_single(shared, reply).await,
    }
}

impl Arrival {
    /// Buffers the unfinished calls of a batch.
    async fn buffer_batch(self, shared: &Arc<Shared>, key: BatchKey, reply: String) {
        let Self { raw, function_index, consumer, lease } = self;
        let (sequence, deliveries) = (raw.sequence, raw.deliveries);
        let delivery = BatchDelivery { raw, key, lease };
        let unpacked = delivery.unpack(shared, AckSubject::new(reply)).await;
        let Some(mut unpacked) = unpacked else { return };
        {
            let (mut scheduler, now) = (shared.pull_scheduler(), Instant::now());
            for (index, call) in std::mem::take(&mut unpacked.unfinished) {
                // A call in a batch has no headers of its own yet.
                let message = Message::from_stored(HeaderMap::new(), call.body.clone());
                let source = Source::InBatch(Arc::clone(&unpacked.batch), index);
                let consumer = Arc::clone(&consumer);
                let received =
                    Received { call, message, sequence, deliveries, source, consumer, lease };
                scheduler.push(function_index, received, now);
            }
        }
        shared.call_available.notify_one();
        supervise_leases(shared);
        unpacked.complete_splits(shared).await;
    }

    /// Buffers a call that has its own message.
    async fn buffer_single(self, shared: &Arc<Shared>, reply: String) {
        let Self { raw, function_index, consumer, lease } = self;
        let call = match decode_call(shared, &raw.message, &raw.subject) {
            Ok(call) => call,
            Err(reason) => {
                let (this, tasks) = (Arc::clone(shared), Arc::clone(shared));
                tasks.tasks.spawn(async move { raw.reject(&this, &reply, &reason).await });
                return;
            }
        };
        let RawMessage { message, sequence, deliveries, .. } = raw;
        let remaining = message.due_at(&call).saturating_sub(now());
        let source = Source::Single(AckSubject::new(reply));
        let received = Received { call, message, sequence, deliveries, source, consumer, lease };
        if remaining > 0 {
            let delay = Duration::from_millis(remaining).min(MAX_NAK_DELAY);
            received.nak(shared, Some(delay)).await;
            shared.call_available.notify_one();
            return;
        }
        shared.pull_scheduler().push(function_index, received, Instant::now());
        shared.call_available.notify_one();
        supervise_leases(shared);
    }
}

/// Decodes a call that has its own message. Its subject must be that of the call: otherwise another call could be
/// replaced or settled in its place.
fn decode_call(shared: &Shared, message: &Message, subject: &str) -> Result<QueuedCall, Reason> {
    let call = message.call().map_err(|error| Reason {
        newer: message::is_newer(&error, false),
        text: error.to_string(),
    })?;
    if shared.subjects.call(CALLS, &call.function, &call.id) == subject {
        Ok(call)
    } else {
        let text = format!("the message has the subject of another call: {subject}");
        Err(Reason { text, newer: false })
    }
}
