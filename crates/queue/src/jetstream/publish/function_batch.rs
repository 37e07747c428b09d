//! The calls of one function that wait to be published: which of them are sent next, and when. No I/O.
use crate::call::QueuedCall;
use crate::jetstream::wire::batch::{
    MAX_BATCH_BYTES, MAX_BATCHED_BODY_BYTES, MAX_CALLS_PER_BATCH, MIN_SERVER_PAYLOAD_BYTES,
};
use crate::reply_batch::Reply;
use crate::{MemoryPermit, Published};

/// After a batch of at least this size, the next one waits up to `batcher::BATCH_WAIT` for more calls, since each
/// message costs.
const BATCH_WAIT_THRESHOLD: usize = 8;

/// Maximum number of batches of a function in flight, when more calls arrive than one batch holds.
const MAX_IN_FLIGHT: usize = 8;

/// Calls with more metadata are published individually: if such a call is split out of its batch, its metadata must fit
/// into the headers of a message.
const MAX_METADATA_BYTES: usize = 16 << 10;

/// Approximate size of the metadata that does not depend on the request.
const FIXED_METADATA_BYTES: usize = 256;

pub(super) struct PendingPublish {
    pub(super) call: QueuedCall,
    pub(super) reply: Reply<Published>,
    /// Accounts for the memory of the body while the call is here.
    pub(super) permit: Option<MemoryPermit>,
}

/// The pending calls of one function.
#[derive(Default)]
pub(super) struct FunctionBatch {
    pub(super) pending: Vec<PendingPublish>,
    /// Number of batches in flight.
    pub(super) in_flight: usize,
    /// Size of the last batch: clients that got a response often send the next request soon.
    pub(super) last_batch_size: usize,
    /// A timer for the next batch is running.
    pub(super) wait_started: bool,
}

/// Returns whether a call may be part of a batch. Calls with a chosen id, an idempotency key or a delay may not, since
/// they are looked up or scheduled by their own subject.
pub(super) fn is_batchable(call: &QueuedCall, max_payload: usize) -> bool {
    let options = &call.options;
    !options.chosen_id
        && options.idempotency_key.is_none()
        && options.not_before.is_none()
        && call.body.len() <= MAX_BATCHED_BODY_BYTES
        && metadata_size(call) <= MAX_METADATA_BYTES
        && max_payload >= MIN_SERVER_PAYLOAD_BYTES
}

impl FunctionBatch {
    /// Returns whether another batch may be sent next to those in flight.
    pub(super) fn may_send(&self) -> bool {
        self.in_flight == 0
            || self.in_flight < MAX_IN_FLIGHT && self.pending.len() >= MAX_CALLS_PER_BATCH
    }

    /// Returns whether the next batch should wait: it is much smaller than the last one, which was large.
    pub(super) fn should_wait(&self) -> bool {
        self.last_batch_size >= BATCH_WAIT_THRESHOLD
            && self.pending.len() * 4 < self.last_batch_size * 3
    }

    /// Removes the calls of the next batch from the pending ones.
    pub(super) fn next_batch(&mut self) -> Vec<PendingPublish> {
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

#[cfg(test)]
pub(super) mod tests {
    use bytes::Bytes;
    use tokio::sync::oneshot;

    use super::*;
    use crate::Error;
    use crate::call::CallOptions;
    use gateway_base::function::Function;
    use gateway_http::names::X_CALL_ID;

    pub(in crate::jetstream::publish) fn pending(
        body: usize,
    ) -> (PendingPublish, oneshot::Receiver<Result<Published, Error>>) {
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
}
