//! Batches publishes: while messages of a function are in flight, new calls of it are collected, and sent as one batch
//! next. A call that arrives alone is sent immediately.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::FutureExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

use crate::call::QueuedCall;
use crate::jetstream::Shared;
use crate::jetstream::publish::function_batch::{FunctionBatch, PendingPublish, is_batchable};
use crate::jetstream::publish::send::{send_batch, send_single};
use crate::reply_batch::{Reply, ReplyChannel};
use crate::{Error, MemoryPermit, Published};
use gateway_base::function::Function;

/// Capacity of the channel to the batcher.
const QUEUE_CAPACITY: usize = 1024;
const BATCH_WAIT: Duration = Duration::from_micros(500);

/// Collects the calls of all threads. One task on the runtime of the connection sends them.
pub(in crate::jetstream) struct Batcher {
    sender: mpsc::Sender<PendingPublish>,
    /// Rank 1: locked by the task that sends, until it ends. A restarted task takes over.
    receiver: Arc<AsyncMutex<mpsc::Receiver<PendingPublish>>>,
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
    ///
    /// If the future is dropped, a call that waits to be sent is not sent. A call that was sent may be stored.
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
