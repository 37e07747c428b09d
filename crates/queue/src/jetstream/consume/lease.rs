//! A delivered call: claimed, kept from other receivers while it is executed, and settled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use bytes::Bytes;

use crate::call::QueuedCall;
use crate::jetstream::Shared;
use crate::jetstream::batch::held::Batch;
use crate::jetstream::consume::claims::Claims;
use crate::jetstream::consume::consumer::{RETRY_INTERVAL, Received, Source};
use crate::jetstream::error::NatsError;
use crate::jetstream::publish::chunked_body;
use crate::jetstream::wire::batch::{BatchIndex, Outcome};
use crate::jetstream::wire::message::{
    FinalRecord, Message, ResponseHead, final_headers, response_headers,
};
use crate::jetstream::wire::subjects::{
    CALLS, CallSubject, DEAD_LETTERS, FINAL_RECORDS, RESPONSES, encode_token,
};
use crate::status::{CallRecord, Settlement, StoredResponse};
use crate::{Delivery, Error, PANIC_BACKOFF, Settle, now};

/// Redelivery delay of a call that is being cancelled: by then the cancellation has ended, or its process has died.
const CANCEL_RECHECK_DELAY: Duration = Duration::from_secs(1);
/// Maximum number of attempts to find a body; it may be missing only temporarily.
const MAX_BODY_LOOKUPS: u32 = 6;
/// Responses up to this size are stored with the final state.
const MAX_INLINE_RESPONSE_BYTES: usize = 4096;

/// Stage of a lease: the call is selected, but no receiver has it.
const CLAIMED: u8 = 0;
/// Stage of a lease: the call occupies a concurrency slot.
const EXECUTING: u8 = 1;
/// Stage of a lease: the call was executed, and its slot is free.
const EXECUTED: u8 = 2;

/// A delivered call that this process holds. Dropping it unsettled returns the call to the queue.
pub(crate) struct Lease {
    shared: Arc<Shared>,
    pub(in crate::jetstream) function_index: usize,
    pub(in crate::jetstream) received: Arc<Received>,
    /// Id of the claim.
    claim_id: u64,
    stage: AtomicU8,
    settled: AtomicBool,
    /// The body no longer exists.
    body_missing: bool,
    /// Minimum redelivery delay when the lease is dropped.
    nak_delay: Option<Duration>,
}

/// A call that has been claimed and that no receiver has yet.
pub(in crate::jetstream) struct ClaimedCall {
    call: QueuedCall,
    attempts: u32,
    lease: Box<Lease>,
}

impl ClaimedCall {
    /// Delivers the call to a receiver, which executes it in a concurrency slot.
    pub(in crate::jetstream) fn deliver(self) -> Delivery {
        let Self { call, attempts, lease } = self;
        lease.stage.store(EXECUTING, Relaxed);
        let body_missing = lease.body_missing;
        Delivery { call, attempts, body_missing, lease: crate::Lease::JetStream(lease) }
    }
}

impl Lease {
    pub(in crate::jetstream) fn new(
        shared: &Arc<Shared>,
        function_index: usize,
        received: Received,
    ) -> Self {
        let received = Arc::new(received);
        let claim_id = shared.claims.track(&received);
        Claims::supervise_leases(shared);
        let (stage, settled) = (AtomicU8::new(CLAIMED), AtomicBool::new(false));
        let (shared, nak_delay) = (Arc::clone(shared), Some(RETRY_INTERVAL));
        Self {
            shared,
            function_index,
            received,
            claim_id,
            stage,
            settled,
            body_missing: false,
            nak_delay,
        }
    }

    /// Claims the call. Returns `None` if it must not be executed, or not now.
    pub(in crate::jetstream) async fn claim(mut self) -> Result<Option<ClaimedCall>, NatsError> {
        let shared = Arc::clone(&self.shared);
        // The call may be settled, while its message exists because the settling process or the server died.
        let suspect =
            self.received.is_redelivered() || shared.api.predates_restart(self.received.sequence);
        if suspect && Box::pin(self.is_finished()).await? {
            if let Source::InBatch(batch, index) = &self.received.source {
                batch.record_outcome(&shared, *index, Outcome::Splitting, true).await?;
            }
            self.finish().await;
            return Ok(None);
        }
        if self.received.message.is_tombstone() {
            let Received { call, message, sequence, .. } = &*self.received;
            let call_subject = CallSubject { function: call.function.clone(), id: call.id.clone() };
            Box::pin(shared.complete_cancel(&call_subject, message, *sequence)).await?;
            self.finish().await;
            return Ok(None);
        }
        let mut call = self.received.call.clone();
        if let Some(chunked_body) = self.received.message.chunked_body() {
            let body =
                Box::pin(chunked_body::load(&shared.api, &shared.subjects, &chunked_body)).await?;
            if let Some(body) = body {
                shared.missing_body_counts.reset(&call.id);
                call.body = body;
            } else if self.is_body_lost().await? {
                self.body_missing = true;
            } else {
                return Ok(None);
            }
        }
        if !shared.claims.claim(&shared, self.claim_id).await? {
            self.nak_delay = Some(CANCEL_RECHECK_DELAY);
            return Ok(None);
        }
        self.nak_delay = None;
        let attempts = self.received.message.stored_status().map_or(0, |status| status.attempts);
        Ok(Some(ClaimedCall { call, attempts, lease: Box::new(self) }))
    }

    /// Returns whether the missing body was looked up often enough. If not, the call is redelivered later.
    async fn is_body_lost(&mut self) -> Result<bool, NatsError> {
        let Received { call, .. } = &*self.received;
        let (call_id, function, lookups) =
            (&call.id, &call.function, self.shared.missing_body_counts.increment(&call.id));
        if lookups < MAX_BODY_LOOKUPS {
            tracing::warn!(call_id, %function, lookups, "The body of a queued call is missing");
            self.nak_delay = Some(self.shared.options.lease / 3);
            return Ok(false);
        }
        // The process that executed the call in the meantime has removed the body.
        if Box::pin(self.is_finished()).await? {
            self.finish().await;
            return Ok(false);
        }
        tracing::error!(call_id, %function, "The body of a queued call is lost");
        Ok(true)
    }

    fn subject(&self, root: &str) -> String {
        let call = &self.received.call;
        self.shared.subjects.call(root, &call.function, &call.id)
    }

    /// Returns whether the call has a final state; for a call in a batch, whether it has its own message or a final
    /// state.
    async fn is_finished(&self) -> Result<bool, NatsError> {
        let call = &self.received.call;
        match &self.received.source {
            Source::Single(_) => {
                self.shared.is_finished(&call.function, &call.id, self.received.sequence).await
            }
            Source::InBatch(..) => self.shared.exists_elsewhere(call).await,
        }
    }

    /// Returns the state of the call while it is executed.
    fn running_status(&self) -> CallRecord {
        let since = self.shared.claims.claimed_at(self.claim_id).unwrap_or_else(now);
        let status = self.received.message.running_status(&self.received.call, since);
        // A call without its body is not executed.
        CallRecord { attempts: status.attempts - u32::from(self.body_missing), ..status }
    }

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

    /// Acknowledges the message. If the ack is lost, the next receiver finds the call finished.
    async fn finish(&self) {
        self.settled.store(true, Relaxed);
        self.shared.claims.untrack(&self.shared, self.claim_id, true);
        self.received.finish(&self.shared).await;
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

impl Shared {
    /// Stores a response, in several messages if it is large.
    pub(in crate::jetstream) async fn store_response(
        &self,
        id: &str,
        response: Option<&StoredResponse>,
    ) -> Result<(), NatsError> {
        let Some(response) = response else { return Ok(()) };
        let size = self.api.client.max_payload() / 2;
        let count = response.body.len().div_ceil(size.max(1)).max(1);
        // The first chunk is written last: it marks the response as complete.
        for chunk in (0..count).rev() {
            let range =
                response.body.len().min(chunk * size)..response.body.len().min((chunk + 1) * size);
            let headers =
                if chunk == 0 { response_headers(response, count) } else { HeaderMap::new() };
            let subject = self.subjects.chunk(RESPONSES, &encode_token(id), chunk);
            self.api.publish(subject, headers, response.body.slice(range), None).await?;
        }
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let settled = self.settled.load(Relaxed);
        self.shared.claims.untrack(&self.shared, self.claim_id, settled);
        if self.stage.load(Relaxed) == CLAIMED {
            self.shared.pull_scheduler().deselect(self.function_index);
            self.shared.call_available.notify_one();
        }
        self.release_slot();
        if settled {
            return;
        }
        let (shared, received) = (Arc::clone(&self.shared), Arc::clone(&self.received));
        let nak_delay = match std::thread::panicking() {
            true => Some(PANIC_BACKOFF.after(shared.panic_counts.increment(&received.call.id))),
            false => self.nak_delay,
        };
        self.shared
            .tasks
            .spawn_to_completion(async move { received.nak(&shared, nak_delay).await });
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.received.sequence).finish()
    }
}
