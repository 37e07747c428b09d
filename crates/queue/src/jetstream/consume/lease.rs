//! A delivered call: claimed, kept from other receivers while it is executed, and settled.

mod settlement;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU8};
use std::time::Duration;

use crate::Settle;
use crate::call::QueuedCall;
use crate::jetstream::Shared;
use crate::jetstream::ack::RETRY_INTERVAL;
use crate::jetstream::consume::received::{Received, Source};
use crate::jetstream::decide::claim::{Action, action, may_be_settled};
use crate::jetstream::error::NatsError;
use crate::jetstream::publish::chunked_body;
use crate::jetstream::wire::records::Outcome;
use crate::jetstream::wire::subjects::CallSubject;
use crate::status::CallRecord;
use crate::{Delivery, PANIC_BACKOFF, now};

/// Redelivery delay of a call that is being cancelled: by then the cancellation has ended, or its process has died.
const CANCEL_RECHECK_DELAY: Duration = Duration::from_secs(1);
/// Maximum number of attempts to find a body; it may be missing only temporarily.
const MAX_BODY_LOOKUPS: u32 = 6;
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
        let Received { call, message, sequence, deliveries, source, .. } = &*self.received;
        let suspect = may_be_settled(*deliveries, shared.api.predates_restart(*sequence));
        let finished = suspect && Box::pin(self.is_finished()).await?;
        match action(finished, message.is_tombstone()) {
            Action::Finish => {
                if let Source::InBatch(batch, index) = source {
                    batch.record_outcome(&shared, *index, Outcome::Splitting, true).await?;
                }
                self.finish().await;
                return Ok(None);
            }
            Action::CompleteCancel => {
                let (function, id) = (call.function.clone(), call.id.clone());
                let call_subject = CallSubject { function, id };
                Box::pin(shared.complete_cancel(&call_subject, message, *sequence)).await?;
                self.finish().await;
                return Ok(None);
            }
            Action::Claim => {}
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

    /// Acknowledges the message. If the ack is lost, the next receiver finds the call finished.
    async fn finish(&self) {
        self.settled.store(true, Relaxed);
        self.shared.claims.untrack(&self.shared, self.claim_id, true);
        self.received.finish(&self.shared).await;
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
