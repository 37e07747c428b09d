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
use crate::jetstream::decide::settle::{BatchStep, Step, batch_steps, steps};
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
        for step in steps(settlement) {
            match step {
                Step::Response => self.store_large_response(settlement).await?,
                Step::FinalRecord => self.store_final_record(status, settlement).await?,
                Step::RemoveRedriven => {
                    if let Some(letter) = message.dead_letter_seq() {
                        let removed = api.delete(&shared.subjects.dead_letters, letter);
                        Box::pin(removed).await?;
                    }
                }
                Step::DeadLetter => {
                    let headers = message.with_status(status, sequence);
                    let (subject, body) = (self.subject(DEAD_LETTERS), message.body.clone());
                    api.publish(subject, headers, body, None).await?;
                }
                Step::NextAttempt => {
                    let headers = message.with_status(status, sequence);
                    let (subject, body) = (self.subject(CALLS), message.body.clone());
                    match api.publish(subject, headers, body, Some(sequence)).await {
                        // A conflict means that this was done before, or that another process holds the call now.
                        Err(error) if !error.is_conflict() => return Err(error),
                        _ => {}
                    }
                }
                Step::IdempotencyKey => {
                    let call = &received.call;
                    if let Some(key) = &call.options.idempotency_key {
                        Box::pin(shared.store_idempotency(key, &call.function, &call.id)).await?;
                    }
                }
                Step::Acknowledge => self.finish().await,
                Step::RemoveBody => {
                    Box::pin(shared.remove_body(message.chunked_body().as_ref())).await;
                }
            }
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
        for step in batch_steps(settlement) {
            match step {
                BatchStep::Response => self.store_large_response(settlement).await?,
                BatchStep::Finished => {
                    let response = response_of(settlement);
                    let outcome = Outcome::finished(*sequence, status.clone(), response);
                    // A process that has recorded something else has executed the call as well.
                    batch.record_outcome(shared, index, outcome, false).await?;
                }
                BatchStep::Splitting => {
                    if !batch.record_outcome(shared, index, Outcome::Splitting, true).await? {
                        break;
                    }
                }
                BatchStep::DeadLetter => {
                    // The call had no message of its own that could still exist.
                    let headers = Message::new(call).with_status(status, 0);
                    let (subject, body) = (self.subject(DEAD_LETTERS), call.body.clone());
                    shared.api.publish(subject, headers, body, None).await?;
                }
                BatchStep::OwnMessage => {
                    let headers = Message::new(call).with_status(status, *sequence);
                    shared.publish_split(call, headers).await?;
                }
                BatchStep::Split => batch.mark_split(shared, index),
            }
        }
        self.finish().await;
        Ok(())
    }

    /// Stores a response that is not stored with the final state.
    async fn store_large_response(&self, settlement: &Settlement) -> Result<(), NatsError> {
        let response = response_of(settlement);
        let is_inline = match (settlement, &self.received.source) {
            (Settlement::Finished { .. }, Source::Single(_)) => response.is_some_and(fits_inline),
            (Settlement::Finished { .. }, Source::InBatch(..)) => {
                response.is_some_and(Outcome::fits_inline)
            }
            _ => false,
        };
        match is_inline {
            true => Ok(()),
            false => Box::pin(self.shared.store_response(&self.received.call.id, response)).await,
        }
    }

    /// Stores the final state, with the response in it if that is small.
    async fn store_final_record(
        &self,
        status: &CallRecord,
        settlement: &Settlement,
    ) -> Result<(), NatsError> {
        let small = response_of(settlement).filter(|response| fits_inline(response));
        let final_record = FinalRecord {
            sequence: self.received.sequence,
            status: status.clone(),
            response: small.map(|response| ResponseHead::new(response, 0)),
        };
        let body = small.map_or_else(Bytes::new, |response| response.body.clone());
        let subject = self.subject(FINAL_RECORDS);
        self.shared.api.publish(subject, final_headers(&final_record), body, None).await.map(drop)
    }
}

fn response_of(settlement: &Settlement) -> Option<&StoredResponse> {
    match settlement {
        Settlement::Finished { response, .. } | Settlement::DeadLetter { response, .. } => {
            response.as_ref()
        }
        Settlement::Retry { .. } => None,
    }
}

/// Returns whether a response is stored with the final state of a call that has its own message.
fn fits_inline(response: &StoredResponse) -> bool {
    response.body.len() <= MAX_INLINE_RESPONSE_BYTES
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
