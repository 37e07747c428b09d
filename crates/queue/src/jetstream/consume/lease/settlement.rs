//! Stores the settlement of a call.
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::call::QueuedCall;
use crate::jetstream::ack::RETRY_INTERVAL;
use crate::jetstream::batch::held::Batch;
use crate::jetstream::consume::lease::{EXECUTED, EXECUTING, Lease};
use crate::jetstream::consume::received::{Received, Source};
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::call_ref::BatchIndex;
use crate::jetstream::wire::final_record::{FinalRecord, ResponseHead, final_headers};
use crate::jetstream::wire::message::Message;
use crate::jetstream::wire::records::Outcome;
use crate::jetstream::wire::subjects::{CALLS, DEAD_LETTERS, FINAL_RECORDS};
use crate::status::{CallRecord, Settlement, StoredResponse};
use crate::{Error, Settle, now};

/// Responses up to this size are stored with the final state.
const MAX_INLINE_RESPONSE_BYTES: usize = 4096;

impl Lease {
    /// Stores a settlement. Each step may be repeated; only the last one removes the message of the call.
    async fn store_settlement(
        &self,
        status: &CallRecord,
        settlement: &Settlement,
    ) -> Result<(), NatsError> {
        let (shared, received) = (&self.shared, &self.received);
        shared.ready().await?;
        let (api, sequence, message) = (&shared.api, received.sequence, &received.message);
        if let Source::InBatch(batch, index) = &received.source {
            let index = *index;
            return self.store_in_batch(batch, index, status, settlement).await;
        }
        match settlement {
            Settlement::Finished { response, .. } => {
                self.store_final_record(status, response.as_ref()).await?
            }
            Settlement::DeadLetter { response, .. } => {
                Box::pin(shared.store_response(&received.call.id, response.as_ref())).await?;
                let headers = message.with_status(status, sequence);
                api.publish(self.subject(DEAD_LETTERS), headers, message.body.clone(), None)
                    .await?;
            }
            Settlement::Retry { .. } => {
                let headers = message.with_status(status, sequence);
                let (subject, body) = (self.subject(CALLS), message.body.clone());
                match api.publish(subject, headers, body, Some(sequence)).await {
                    // A conflict means that this was done before, or that another process holds the call now.
                    Err(error) if !error.is_conflict() => return Err(error),
                    _ => {}
                }
            }
        }
        if !matches!(settlement, Settlement::Retry { .. })
            && let Some(key) = &received.call.options.idempotency_key
        {
            let call = &received.call;
            Box::pin(shared.store_idempotency(key, &call.function, &call.id)).await?;
        }
        self.finish().await;
        if matches!(settlement, Settlement::Finished { .. })
            && let Some(chunked_body) = message.chunked_body()
        {
            Box::pin(shared.remove_body(Some(&chunked_body))).await;
        }
        Ok(())
    }

    /// Stores the settlement of a call in a batch.
    async fn store_in_batch(
        &self,
        batch: &Arc<Batch>,
        index: BatchIndex,
        status: &CallRecord,
        settlement: &Settlement,
    ) -> Result<(), NatsError> {
        let (shared, Received { call, sequence, .. }) = (&self.shared, &*self.received);
        match settlement {
            Settlement::Finished { response, .. } => {
                let response = response.as_ref();
                if !response.is_none_or(Outcome::fits_inline) {
                    shared.store_response(&call.id, response).await?;
                }
                let outcome = Outcome::finished(*sequence, status.clone(), response);
                // A process that has recorded something else has executed the call as well.
                batch.record_outcome(shared, index, outcome, false).await?;
            }
            Settlement::Retry { .. } => {
                let headers = Message::new(call).with_status(status, *sequence);
                batch.split_out(shared, call, index, headers).await?;
            }
            Settlement::DeadLetter { response, .. } => {
                shared.store_response(&call.id, response.as_ref()).await?;
                if batch.record_outcome(shared, index, Outcome::Splitting, true).await? {
                    // The call had no message of its own that could still exist.
                    let headers = Message::new(call).with_status(status, 0);
                    shared
                        .api
                        .publish(self.subject(DEAD_LETTERS), headers, call.body.clone(), None)
                        .await?;
                    batch.mark_split(shared, index);
                }
            }
        }
        self.finish().await;
        Ok(())
    }

    /// Stores the final state, with the response in it if that is small.
    async fn store_final_record(
        &self,
        status: &CallRecord,
        response: Option<&StoredResponse>,
    ) -> Result<(), NatsError> {
        let (shared, received) = (&self.shared, &self.received);
        let small = response.filter(|response| response.body.len() <= MAX_INLINE_RESPONSE_BYTES);
        if small.is_none() {
            Box::pin(shared.store_response(&received.call.id, response)).await?;
        }
        let final_record = FinalRecord {
            sequence: received.sequence,
            status: status.clone(),
            response: small.map(|response| ResponseHead::new(response, 0)),
        };
        let body = small.map_or_else(Bytes::new, |response| response.body.clone());
        let subject = self.subject(FINAL_RECORDS);
        shared.api.publish(subject, final_headers(&final_record), body, None).await?;
        match received.message.dead_letter_seq() {
            Some(chunk) => {
                Box::pin(shared.api.delete(&shared.subjects.dead_letters, chunk)).await.map(drop)
            }
            None => Ok(()),
        }
    }
}

impl Settle for Lease {
    /// Releases the concurrency slot, if the call has one.
    fn release_slot(&self) {
        let released = self.stage.compare_exchange(EXECUTING, EXECUTED, Relaxed, Relaxed);
        if released.is_ok() {
            self.shared.pull_scheduler().release_slot(self.function_index);
            self.shared.call_available.notify_one();
        }
    }

    /// Settles the call. While the server is unavailable, retries for the time of the lease: if the settlement is lost,
    /// the call is executed again.
    ///
    /// If the future is dropped, any of the writes may be stored, in their order (README.md of this backend). Dropping
    /// the delivery then returns the call to the queue, where it is executed again unless its final state, its dead
    /// letter or its outcome was stored. The outcome of a call in a batch is written by a task, also without this
    /// future. A call that was being split out of its batch is always executed again.
    ///
    /// # Errors
    /// [`Error::Gone`] when the call is already settled, [`Error::Unreachable`] when the server stays unavailable. The
    /// call may be executed again then.
    async fn settle(&self, _call: &QueuedCall, settlement: &Settlement) -> Result<(), Error> {
        if self.settled.load(Relaxed) {
            return Err(Error::Gone);
        }
        let status = self.running_status().settled(settlement, now());
        let patience = self.received.lease.max(Duration::from_secs(5));
        let start = Instant::now();
        loop {
            match Box::pin(self.store_settlement(&status, settlement)).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let error = Error::from(error);
                    if error != Error::Unreachable || start.elapsed() > patience {
                        return Err(error);
                    }
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }
}
