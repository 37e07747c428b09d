//! Receives calls from the server. Each function has its own consumer, which is pulled only while a receiver waits for
//! a call.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_nats::jetstream::{AckKind, Message as Delivered};
use async_nats::{StatusCode, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::json;
use tokio::sync::Mutex as AsyncMutex;

use crate::call::{QueuedCall, UnixMillis};
use crate::jetstream::Shared;
use crate::jetstream::api::JetStreamApi;
use crate::jetstream::batch::held::{Batch, BatchDelivery};
use crate::jetstream::consume::claims::Claims;
use crate::jetstream::consume::pull_scheduler::WantedPull;
use crate::jetstream::error::NatsError;
use crate::jetstream::undecodable::{RawMessage, Reason};
use crate::jetstream::wire::batch::{BatchIndex, CallRef};
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::message::{self, Message};
use crate::jetstream::wire::subjects::{self, CALLS};
use crate::now;
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Interval between searches for new functions; a receiver that waits checks again after it.
pub(in crate::jetstream) const DISCOVERY_INTERVAL: Duration = Duration::from_secs(1);
/// Time limit for sending an ack or a pull.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of messages in a queue that is scanned for functions without a consumer.
pub(in crate::jetstream) const MAX_SCANNED_MESSAGES: u64 = 10_000;
/// Pause after a failure.
pub(in crate::jetstream) const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// Maximum delay of one nak; a call with a longer delay is nak'ed again.
const MAX_NAK_DELAY: Duration = Duration::from_secs(24 * 3600);

/// A call that was delivered to this process.
pub(in crate::jetstream) struct Received {
    pub(in crate::jetstream) call: QueuedCall,
    /// The message of the call; for a call in a batch, the message that it would have on its own.
    pub(in crate::jetstream) message: Message,
    pub(in crate::jetstream) sequence: u64,
    /// Number of deliveries of the message so far, to any process.
    pub(in crate::jetstream) deliveries: u32,
    pub(in crate::jetstream) source: Source,
    /// Name of the consumer that delivered the message.
    pub(in crate::jetstream) consumer: Arc<str>,
    /// Time until the server redelivers the message without an in-progress ack.
    pub(in crate::jetstream) lease: Duration,
}

/// The message that contains the call.
pub(in crate::jetstream) enum Source {
    /// A message of its own.
    Single(AckSubject),
    /// A batch, and the index of the call within it.
    InBatch(Arc<Batch>, BatchIndex),
}

/// Subject for acks of a message; each redelivery replaces it.
pub(in crate::jetstream) struct AckSubject(Mutex<String>);

impl AckSubject {
    pub(in crate::jetstream) fn new(reply: String) -> Self {
        Self(Mutex::new(reply))
    }

    pub(in crate::jetstream) fn get(&self) -> String {
        lock_unpoisoned(&self.0).clone()
    }
}

impl Received {
    /// Returns whether the message was delivered before, to any process.
    pub(in crate::jetstream) fn is_redelivered(&self) -> bool {
        self.deliveries > 1
    }

    pub(in crate::jetstream) fn call_ref(&self) -> CallRef {
        match &self.source {
            Source::Single(_) => CallRef::single(self.sequence),
            Source::InBatch(_, index) => CallRef::in_batch(self.sequence, *index),
        }
    }

    /// Acknowledges the call: it is finished or has another message.
    pub(in crate::jetstream) async fn finish(&self, shared: &Shared) {
        match &self.source {
            Source::Single(ack_subject) => {
                send_ack(&shared.api, &ack_subject.get(), AckKind::Ack).await
            }
            Source::InBatch(bundle, _) => bundle.call_done(shared).await,
        }
    }

    /// Returns the call to the queue; it is redelivered after `delay`.
    pub(in crate::jetstream) async fn nak(&self, shared: &Arc<Shared>, delay: Option<Duration>) {
        match &self.source {
            Source::Single(ack_subject) => {
                send_ack(&shared.api, &ack_subject.get(), AckKind::Nak(delay)).await;
            }
            Source::InBatch(bundle, index) => {
                // Meanwhile nothing extends the lease of the batch.
                tokio::time::sleep(delay.unwrap_or_default().min(self.lease / 3)).await;
                bundle.release(shared, &self.call, *index).await;
            }
        }
    }

    pub(in crate::jetstream) async fn in_progress(&self, shared: &Shared) {
        match &self.source {
            Source::Single(ack_subject) => {
                send_ack(&shared.api, &ack_subject.get(), AckKind::Progress).await;
            }
            Source::InBatch(bundle, _) => bundle.in_progress(shared).await,
        }
    }

    /// Replaces the ack subject after a redelivery.
    pub(in crate::jetstream) fn update_ack_subject(&self, reply: String) {
        let ack_subject = match &self.source {
            Source::Single(ack_subject) => ack_subject,
            Source::InBatch(bundle, _) => &bundle.ack_subject,
        };
        *lock_unpoisoned(&ack_subject.0) = reply;
    }
}

/// Sends an ack, nak or in-progress ack. If it is lost, the server redelivers the message after the lease.
pub(in crate::jetstream) async fn send_ack(api: &JetStreamApi, reply: &str, kind: AckKind) {
    let sent = api.client.publish(reply.to_owned(), Bytes::from(kind));
    let _ = tokio::time::timeout(SEND_TIMEOUT, sent).await;
}

/// Searches for functions whose calls other processes have published, at most once per interval.
pub(in crate::jetstream) fn discover_functions(shared: &Arc<Shared>) {
    let mut last_discovery = lock_unpoisoned(&shared.last_discovery);
    let connection = match *last_discovery {
        Some((at, _)) if at.elapsed() < DISCOVERY_INTERVAL => return,
        Some((_, connection)) => connection,
        None => 0,
    };
    *last_discovery = Some((Instant::now(), connection));
    drop(last_discovery);
    let this = Arc::clone(shared);
    shared.tasks.spawn(async move {
        // From the first search on, other processes announce new consumers, so their calls need not wait for the next
        // search. If the server is unavailable, the next search subscribes.
        let _ = this.inbox.get_or_try_init(|| subscribe_all(&this)).await;
        let Ok((found, connection)) = find_functions(&this, connection).await else { return };
        *lock_unpoisoned(&this.last_discovery) = Some((Instant::now(), connection));
        let new = found.iter().filter(|function| this.pull_scheduler().add(function)).count();
        if new > 0 {
            this.call_available.notify_one();
        }
    });
}

/// Returns the functions with a consumer, and the number of the connection. On a connection other than `last`, also
/// returns functions that have calls but no consumer: it may have been removed.
async fn find_functions(shared: &Shared, last: u64) -> Result<(Vec<Function>, u64), NatsError> {
    let connection = shared.api.wait_connected().await?;
    let Shared { api, subjects, .. } = shared.ready().await?;
    let (mut found, _) = shared.functions(Duration::ZERO).await?;
    let all_calls = subjects.of_function(CALLS, None);
    if connection != last {
        // Responses to pulls on an earlier connection are lost.
        shared.pull_scheduler().reset_pulls();
        if shared.inbox.initialized() {
            shared.load_dirty_batches(connection).await?;
        }
        if api.message_count(&subjects.calls).await? <= MAX_SCANNED_MESSAGES {
            let calls = api.subjects(&subjects.calls, &all_calls, usize::MAX).await?;
            found.extend(calls.iter().filter_map(|call| Some(subjects::parse(call)?.function)));
        }
    }
    // A call that no consumer delivers eventually becomes the oldest message.
    let oldest = api.get_next(&subjects.calls, &all_calls, 1).await?;
    found.extend(oldest.and_then(|call| Some(subjects::parse(&call.subject)?.function)));
    Ok((found, connection))
}

/// Pulls calls of a function.
pub(in crate::jetstream) async fn pull_calls(shared: Arc<Shared>, wanted: WantedPull) {
    if let Err(error) = send_pull(&shared, &wanted).await {
        tracing::debug!(%error, function = %wanted.function, "Cannot pull calls");
        retry_pull(&shared, wanted.function_index, wanted.number, &wanted.function).await;
    }
}

async fn send_pull(shared: &Arc<Shared>, wanted: &WantedPull) -> Result<(), NatsError> {
    let Shared { api, subjects, .. } = shared.ready().await?;
    shared.ensure_lease(&wanted.function).await?;
    shared.repair_consumer(&wanted.function).await?;
    let inbox = shared.inbox.get_or_try_init(|| subscribe_all(shared)).await?;
    let consumer = subjects::consumer_name(&wanted.function);
    let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{consumer}", subjects.calls);
    let reply = format!("{inbox}.{}.{}", wanted.function_index, wanted.number);
    let request =
        json!({ "batch": wanted.max_messages, "expires": wanted.expiry().as_nanos() as u64 });
    let sent = api.client.publish_with_reply(subject, reply, request.to_string().into());
    let sent = tokio::time::timeout(SEND_TIMEOUT, sent).await;
    sent.ok().and_then(Result::ok).ok_or(NatsError::Unavailable)
}

/// Allows the pull to be repeated after a pause. The consumer is looked up again first.
async fn retry_pull(shared: &Shared, function_index: usize, number: u64, function: &Function) {
    shared.consumers().invalidate(function);
    tokio::time::sleep(RETRY_INTERVAL).await;
    shared.pull_scheduler().pull_completed(function_index, number);
    shared.call_available.notify_one();
}

/// Subscribes to pulled messages and to announcements of other processes. Returns the subject prefix of pulled
/// messages.
async fn subscribe_all(shared: &Arc<Shared>) -> Result<String, NatsError> {
    let inbox = shared.api.client.new_inbox();
    let subscribe = async |subject: String| {
        let subscriber =
            tokio::time::timeout(SEND_TIMEOUT, shared.api.client.subscribe(subject)).await;
        subscriber.ok().and_then(Result::ok).ok_or(NatsError::Unavailable)
    };
    let calls = subscribe(format!("{inbox}.>")).await?;
    let new_consumers = subscribe(shared.subjects.new_consumers()).await?;
    let dirty_batches = subscribe(shared.subjects.dirty_batches()).await?;
    let [calls, new_consumers, dirty_batches] =
        [calls, new_consumers, dirty_batches].map(AsyncMutex::new).map(Arc::new);
    let this = Arc::clone(shared);
    shared.tasks.supervise("dirty batches", move || {
        receive_dirty_batches(Arc::clone(&this), Arc::clone(&dirty_batches))
    });
    let this = Arc::clone(shared);
    shared.tasks.supervise("calls", move || receive_calls(Arc::clone(&this), Arc::clone(&calls)));
    let this = Arc::clone(shared);
    shared.tasks.supervise("new consumers", move || {
        receive_new_consumers(Arc::clone(&this), Arc::clone(&new_consumers))
    });
    Ok(inbox)
}

/// A subscription that a restarted task takes over.
type SharedSubscriber = Arc<AsyncMutex<Subscriber>>;

async fn receive_calls(shared: Arc<Shared>, calls: SharedSubscriber) {
    let mut calls = calls.lock().await;
    while let Some(message) = calls.next().await {
        match message.status {
            None => on_message(&shared, message).await,
            Some(StatusCode::IDLE_HEARTBEAT) => {}
            Some(status) => {
                let mut tokens = message.subject.rsplit('.');
                let number = tokens.next().and_then(|token| token.parse().ok());
                let function_index = tokens.next().and_then(|token| token.parse().ok());
                let (Some(number), Some(function_index)) = (number, function_index) else {
                    continue;
                };
                on_pull_status(
                    &shared,
                    function_index,
                    number,
                    status,
                    message.description.as_deref(),
                );
            }
        }
    }
}

/// Handles the end of a pull, mostly because it has expired.
fn on_pull_status(
    shared: &Arc<Shared>,
    function_index: usize,
    number: u64,
    status: StatusCode,
    description: Option<&str>,
) {
    if [StatusCode::TIMEOUT, StatusCode::NOT_FOUND].contains(&status) {
        shared.pull_scheduler().pull_completed(function_index, number);
        shared.call_available.notify_one();
        return;
    }
    let Some(function) = shared.pull_scheduler().function(function_index) else { return };
    tracing::debug!(%status, description, function = %function, "The server ended a pull");
    let this = Arc::clone(shared);
    shared.tasks.spawn(async move {
        // Without calls, the consumer may have been garbage collected. If a call is published, discovery adds it again.
        if matches!(this.has_calls(&function).await, Ok(false)) {
            this.consumers().invalidate(&function);
            return this.pull_scheduler().retire(function_index);
        }
        retry_pull(&this, function_index, number, &function).await;
    });
}

/// Receives announcements of new consumers.
async fn receive_new_consumers(shared: Arc<Shared>, new_consumers: SharedSubscriber) {
    let mut new_consumers = new_consumers.lock().await;
    while let Some(message) = new_consumers.next().await {
        let name = std::str::from_utf8(&message.payload).ok();
        let function = name.and_then(subjects::function_of_consumer);
        if let Some(function) = function {
            shared.pull_scheduler().on_consumer_created(&function);
            shared.call_available.notify_one();
        }
    }
}

/// Receives announcements of batches that other processes change.
async fn receive_dirty_batches(shared: Arc<Shared>, dirty_batches: SharedSubscriber) {
    let mut dirty_batches = dirty_batches.lock().await;
    while let Some(message) = dirty_batches.next().await {
        let key = std::str::from_utf8(&message.payload).ok().and_then(BatchKey::from_token);
        key.into_iter().for_each(|key| shared.dirty_batches().mark_dirty(key));
    }
}

/// Buffers a delivered call, or naks it if it is not due yet.
async fn on_message(shared: &Arc<Shared>, message: async_nats::Message) {
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
    if let Some(key) = key {
        let subject = delivered.subject;
        let raw = RawMessage { message, subject, function, sequence, deliveries, stored_at };
        let delivery = BatchDelivery { raw, key, function_index, consumer, lease };
        let (this, tasks) = (Arc::clone(shared), Arc::clone(shared));
        tasks.tasks.spawn(async move { delivery.unpack(&this, AckSubject::new(reply)).await });
        return;
    }
    let call = match decode_call(shared, &message, &delivered.subject) {
        Ok(call) => call,
        Err(reason) => {
            let subject = delivered.subject;
            let raw = RawMessage { message, subject, function, sequence, deliveries, stored_at };
            let (this, tasks) = (Arc::clone(shared), Arc::clone(shared));
            tasks.tasks.spawn(async move { raw.reject(&this, &reply, &reason).await });
            return;
        }
    };
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
    Claims::supervise_leases(shared);
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
