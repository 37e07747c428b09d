//! Batches publishes: while messages of a function are in flight, new calls of it are collected, and sent as one batch
//! next. A call that arrives alone is sent immediately.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{FutureExt as _, join_all};
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

use crate::call::QueuedCall;
use crate::jetstream::publish::capacity::CapacityPermit;
use crate::jetstream::wire::batch::{
    self, MAX_BATCH_BYTES, MAX_BATCHED_BODY_BYTES, MAX_CALLS_PER_BATCH, MIN_SERVER_PAYLOAD_BYTES,
};
use crate::jetstream::wire::message::batch_headers;
use crate::jetstream::wire::subjects::CALLS;
use crate::jetstream::{PUBLISH_TIMEOUT, Shared, with_timeout};
use crate::reply_batch::{Reply, ReplyBatch, ReplyChannel};
use crate::{Error, MemoryPermit, Published, now};
use gateway_base::function::Function;
use gateway_http::names::X_CALL_ID;

/// Capacity of the channel to the batcher.
const QUEUE_CAPACITY: usize = 1024;
/// After a batch of at least this size, the next one waits up to [`BATCH_WAIT`] for more calls, since each message
/// costs.
const BATCH_WAIT_THRESHOLD: usize = 8;
const BATCH_WAIT: Duration = Duration::from_micros(500);
/// Maximum number of batch keys that are tried when another process generates the same ones.
const MAX_KEY_ATTEMPTS: usize = 5;
/// Maximum number of batches of a function in flight, when more calls arrive than one batch holds.
const MAX_IN_FLIGHT: usize = 8;
/// Calls with more metadata are published individually: if such a call is split out of its batch, its metadata must fit
/// into the headers of a message.
const MAX_METADATA_BYTES: usize = 16 << 10;
/// Approximate size of the metadata that does not depend on the request.
const FIXED_METADATA_BYTES: usize = 256;

/// Collects the calls of all threads. One task on the runtime of the connection sends them.
pub(in crate::jetstream) struct Batcher {
    sender: mpsc::Sender<PendingPublish>,
    receiver: Arc<AsyncMutex<mpsc::Receiver<PendingPublish>>>,
}

struct PendingPublish {
    call: QueuedCall,
    reply: Reply<Published>,
    /// Accounts for the memory of the body while the call is here.
    permit: Option<MemoryPermit>,
}

/// The pending calls of one function.
#[derive(Default)]
struct FunctionBatch {
    pending: Vec<PendingPublish>,
    /// Number of batches in flight.
    in_flight: usize,
    /// Size of the last batch: clients that got a response often send the next request soon.
    last_batch_size: usize,
    /// A timer for the next batch is running.
    wait_started: bool,
}

/// Events that the batcher waits for.
enum BatcherEvent {
    /// A batch of this function was stored or rejected.
    BatchCompleted(Function),
    /// The wait for more calls of this function is over.
    WaitElapsed(Function),
    /// A single call was stored or rejected.
    SingleCompleted,
}

impl Batcher {
    pub(in crate::jetstream) fn new() -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_CAPACITY);
        Self { sender, receiver: Arc::new(AsyncMutex::new(receiver)) }
    }

    /// Starts the batcher; it runs until the queue is stopped.
    pub(in crate::jetstream) fn start(shared: &Arc<Shared>) {
        let all = Arc::clone(shared);
        shared.tasks.supervise("publishing", move || run(Arc::clone(&all)));
    }

    /// Publishes a call through the batcher. The result is delivered through `reply_channel`.
    pub(in crate::jetstream) async fn publish(
        &self,
        call: QueuedCall,
        permit: Option<MemoryPermit>,
        reply_channel: ReplyChannel,
    ) -> Result<Published, Error> {
        let (reply, result) = oneshot::channel();
        let pending =
            PendingPublish { call, reply: Reply::new(reply, Some(reply_channel)), permit };
        match self.sender.try_send(pending) {
            Ok(()) => {}
            // Boxed: otherwise every future would contain the call twice.
            Err(TrySendError::Full(pending)) => {
                Box::pin(self.sender.send(pending)).await.map_err(|_| Error::Unreachable)?;
            }
            Err(TrySendError::Closed(_)) => return Err(Error::Unreachable),
        }
        result.await.unwrap_or(Err(Error::Unreachable))
    }
}

/// Returns whether a call may be part of a batch. Calls with a chosen id, an idempotency key or a delay may not, since
/// they are looked up or scheduled by their own subject.
fn is_batchable(call: &QueuedCall, max_payload: usize) -> bool {
    let options = &call.options;
    !options.chosen_id
        && options.idempotency_key.is_none()
        && options.not_before.is_none()
        && call.body.len() <= MAX_BATCHED_BODY_BYTES
        && metadata_size(call) <= MAX_METADATA_BYTES
        && max_payload >= MIN_SERVER_PAYLOAD_BYTES
}

async fn run(shared: Arc<Shared>) {
    let mut receiver = shared.batcher.receiver.lock().await;
    let mut batches: HashMap<Function, FunctionBatch> = HashMap::new();
    let mut in_flight = FuturesUnordered::new();
    loop {
        let mut changed = Vec::new();
        tokio::select! {
            pending = receiver.recv() => {
                let Some(pending) = pending else { return };
                let more = std::iter::from_fn(|| receiver.try_recv().ok());
                for pending in std::iter::once(pending).chain(more.take(QUEUE_CAPACITY)) {
                    if !is_batchable(&pending.call, shared.api.client.max_payload()) {
                        let completed = BatcherEvent::SingleCompleted;
                        in_flight.push(send_single(&shared, pending).map(|()| completed).boxed());
                        continue;
                    }
                    let function = pending.call.function.clone();
                    let batch = batches.entry(function.clone()).or_default();
                    if !changed.contains(&function) {
                        changed.push(function);
                    }
                    batch.pending.push(pending);
                }
            }
            Some(event) = in_flight.next() => {
                match event {
                    BatcherEvent::BatchCompleted(function) => {
                        if let Some(batch) = batches.get_mut(&function) {
                            batch.in_flight -= 1;
                        }
                        changed.push(function);
                    }
                    BatcherEvent::WaitElapsed(function) => {
                        if let Some(batch) = batches.get_mut(&function) {
                            batch.wait_started = false;
                            if batch.in_flight == 0 {
                                batch.last_batch_size = 0;
                            }
                        }
                        changed.push(function);
                    }
                    BatcherEvent::SingleCompleted => {}
                }
            }
        }
        for function in changed {
            let Some(batch) = batches.get_mut(&function) else { continue };
            while batch.may_send() {
                if batch.should_wait() {
                    if !std::mem::replace(&mut batch.wait_started, true) {
                        let (elapsed, function) =
                            (tokio::time::sleep(BATCH_WAIT), function.clone());
                        in_flight
                            .push(elapsed.map(|()| BatcherEvent::WaitElapsed(function)).boxed());
                    }
                    break;
                }
                let next = batch.next_batch();
                if next.is_empty() {
                    break;
                }
                (batch.last_batch_size, batch.in_flight) = (next.len(), batch.in_flight + 1);
                let completed = BatcherEvent::BatchCompleted(function.clone());
                in_flight
                    .push(send_batch(&shared, function.clone(), next).map(|()| completed).boxed());
            }
            if batch.pending.is_empty() && batch.in_flight == 0 && !batch.wait_started {
                batches.remove(&function);
            }
        }
    }
}

async fn send_single(shared: &Shared, pending: PendingPublish) {
    // A call whose caller is gone is dropped: its acceptance was never reported.
    if !pending.reply.is_closed() {
        pending.reply.send(shared.publish_with_timeout(&pending.call).await);
    }
}

impl FunctionBatch {
    /// Returns whether another batch may be sent next to those in flight.
    fn may_send(&self) -> bool {
        self.in_flight == 0
            || self.in_flight < MAX_IN_FLIGHT && self.pending.len() >= MAX_CALLS_PER_BATCH
    }

    /// Returns whether the next batch should wait: it is much smaller than the last one, which was large.
    fn should_wait(&self) -> bool {
        self.last_batch_size >= BATCH_WAIT_THRESHOLD
            && self.pending.len() * 4 < self.last_batch_size * 3
    }

    /// Removes the calls of the next batch from the pending ones.
    fn next_batch(&mut self) -> Vec<PendingPublish> {
        // A call whose caller is gone is dropped: its acceptance was never reported.
        self.pending.retain(|pending| !pending.reply.is_closed());
        let mut size = 0;
        let fits = |pending: &&PendingPublish| {
            size += stored_size(&pending.call);
            size <= MAX_BATCH_BYTES
        };
        let count = self.pending.iter().take(MAX_CALLS_PER_BATCH).take_while(fits).count().max(1);
        self.pending.drain(..count.min(self.pending.len())).collect()
    }
}

/// Returns the maximum stored size of a call in bytes.
fn stored_size(call: &QueuedCall) -> usize {
    call.body.len() + metadata_size(call)
}

/// Returns the maximum stored size of a call without its body, in bytes.
fn metadata_size(call: &QueuedCall) -> usize {
    let headers: usize = call.headers.iter().map(|(n, v)| n.as_str().len() + v.len() + 8).sum();
    let callback = call.options.callback.as_ref().map_or(0, String::len);
    // JSON escaping may double the length.
    2 * (headers + call.target.len() + callback) + FIXED_METADATA_BYTES
}

/// Publishes calls of `function` and delivers the results.
async fn send_batch(shared: &Shared, function: Function, pending: Vec<PendingPublish>) {
    let (calls, replies): (Vec<_>, Vec<_>) =
        pending.into_iter().map(|publish| (publish.call, (publish.reply, publish.permit))).unzip();
    let published = match &calls[..] {
        [call] => vec![shared.publish_with_timeout(call).await],
        _ => match with_timeout(PUBLISH_TIMEOUT, shared.reserve_when_ready(calls.len())).await {
            Ok(_permit) => {
                let count = calls.len();
                match with_timeout(PUBLISH_TIMEOUT, shared.publish_batch(&function, calls)).await {
                    Ok(ids) => ids.into_iter().map(published).collect(),
                    Err(error) => vec![Err(error); count],
                }
            }
            // There may be capacity for some of them.
            Err(Error::Full) => {
                join_all(calls.iter().map(|call| shared.publish_with_timeout(call))).await
            }
            Err(error) => vec![Err(error); calls.len()],
        },
    };
    let mut batch = ReplyBatch::default();
    replies.into_iter().zip(published).for_each(|((reply, _), result)| batch.push(reply, result));
    batch.send();
}

fn published(id: String) -> Result<Published, Error> {
    Ok(Published { id, duplicate: false })
}

impl Shared {
    /// Reserves capacity once the server is available.
    async fn reserve_when_ready(&self, calls: usize) -> Result<CapacityPermit<'_>, Error> {
        self.ready().await?.reserve(calls).await
    }

    /// Publishes several calls of `function` as one batch, under new ids.
    async fn publish_batch(
        &self,
        function: &Function,
        mut calls: Vec<QueuedCall>,
    ) -> Result<Vec<String>, Error> {
        // The consumer must exist first: without it no worker would pull the calls.
        self.ensure_consumer(function).await?;
        for attempt in 1.. {
            let key = self.batch_keys.next(calls.len(), now());
            calls =
                calls.into_iter().map(|call| with_id(call, key.new_call_id(function))).collect();
            let subject = self.subjects.batch(CALLS, function, key);
            let stored = self.api.publish(subject, batch_headers(), batch::encode(&calls), Some(0));
            match stored.await {
                Ok(_) => break,
                Err(error) if error.is_conflict() && attempt < MAX_KEY_ATTEMPTS => {
                    self.batch_keys.change_node();
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(calls.into_iter().map(|call| call.id).collect())
    }
}

/// Returns the call with a new id, also in the header that tells its function the id.
fn with_id(mut call: QueuedCall, id: String) -> QueuedCall {
    if let Some(header) = call.headers.get_mut(&X_CALL_ID)
        && let Ok(id) = http::HeaderValue::from_str(&id)
    {
        *header = id;
    }
    call.with_new_id(id)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::call::CallOptions;

    fn pending(body: usize) -> (PendingPublish, oneshot::Receiver<Result<Published, Error>>) {
        let (reply, result) = oneshot::channel();
        let call = QueuedCall {
            id: "first".to_owned(),
            function: Function { name: "echo".to_owned(), namespace: "fn".to_owned() },
            target: String::new(),
            headers: http::HeaderMap::from_iter([(
                X_CALL_ID,
                http::HeaderValue::from_static("first"),
            )]),
            body: Bytes::from(vec![0; body]),
            options: CallOptions::default(),
        };
        (PendingPublish { call, reply: Reply::new(reply, None), permit: None }, result)
    }

    #[test]
    fn a_batch_contains_as_many_calls_as_fit_without_abandoned_ones() {
        let mut batch = FunctionBatch::default();
        let (small, replies): (Vec<_>, Vec<_>) = (0..70).map(|_| pending(10)).unzip();
        batch.pending.extend(small);
        let next: Vec<usize> =
            std::iter::from_fn(|| Some(batch.next_batch().len())).take(3).collect();
        assert_eq!(next, [MAX_CALLS_PER_BATCH, MAX_CALLS_PER_BATCH, 70 - 2 * MAX_CALLS_PER_BATCH]);
        drop(replies);
        let (gone, _) = pending(10);
        batch.pending.push(gone);
        assert_eq!(batch.next_batch().len(), 0);
        let (large, replies): (Vec<_>, Vec<_>) =
            (0..3).map(|_| pending(MAX_BATCH_BYTES / 2 - 400)).unzip();
        batch.pending.extend(large);
        let next: Vec<usize> =
            std::iter::from_fn(|| Some(batch.next_batch().len())).take(3).collect();
        assert_eq!(next, [2, 1, 0]);
        drop(replies);
    }

    #[test]
    fn a_function_receives_the_new_id_of_a_batched_call() {
        let (PendingPublish { call, .. }, _) = pending(0);
        let call = with_id(call, "second".to_owned());
        assert_eq!(
            (call.id.as_str(), &call.headers[X_CALL_ID]),
            ("second", &"second".parse().unwrap())
        );
    }
}
