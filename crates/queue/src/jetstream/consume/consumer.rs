//! Receives calls from the server. Each function has its own consumer, which is pulled only while a receiver waits for
//! a call.
use std::sync::Arc;

use async_nats::{StatusCode, Subscriber};
use futures_util::StreamExt;
use serde_json::json;
use tokio::sync::Mutex as AsyncMutex;

use crate::jetstream::Shared;
use crate::jetstream::ack::{RETRY_INTERVAL, SEND_TIMEOUT};
use crate::jetstream::consume::arrival::on_message;
use crate::jetstream::consume::pull_scheduler::pulls::WantedPull;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::subjects;
use gateway_base::function::Function;

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
pub(super) async fn subscribe_all(shared: &Arc<Shared>) -> Result<String, NatsError> {
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

/// A subscription that a restarted task takes over. Rank 1: a task locks it until it ends.
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
