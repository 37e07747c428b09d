//! Cancellation of a call that no process executes.
//!
//! A cancel marker is written first, and then the running lists are read. A receiver writes its list first, and then
//! reads the markers (`claims`). So at least one of them sees the other, and a cancelled call is never executed.
use std::time::Instant;

use async_nats::HeaderMap;
use bytes::Bytes;

use crate::ChangeOutcome;
use crate::jetstream::Shared;
use crate::jetstream::decide::cancel::{COMPLETION, Completion, Removal, removal, removal_timeout};
use crate::jetstream::error::NatsError;
use crate::jetstream::location::{CallLocation, Finished, Pending};
use crate::jetstream::results::cancelled;
use crate::jetstream::wire::message::Message;
use crate::jetstream::wire::subjects::{CALLS, CallSubject};
use crate::status::CallState;

/// Maximum number of lookups while the call moves between streams.
const MAX_LOOKUPS: usize = 3;

impl Shared {
    /// Cancels a call that is not running, or discards a dead letter.
    pub(super) async fn cancel(&self, id: &str) -> Result<ChangeOutcome, NatsError> {
        let mut tried_again = false;
        for _ in 0..MAX_LOOKUPS {
            match self.find(id).await? {
                None => return Ok(ChangeOutcome::NotFound),
                Some(CallLocation::Finished(Finished { final_record, .. }))
                    if tried_again && final_record.status.state == CallState::Cancelled =>
                {
                    return Ok(ChangeOutcome::Applied);
                }
                Some(CallLocation::Finished(Finished { final_record, .. })) => {
                    return Ok(ChangeOutcome::WrongState(final_record.status.state));
                }
                Some(CallLocation::DeadLetter(dead)) => {
                    if self.discard(id, dead, true).await? {
                        return Ok(ChangeOutcome::Applied);
                    }
                    tried_again = true;
                }
                // The cancelling process has died before the end of the cancellation.
                Some(CallLocation::Pending(pending)) if pending.message.is_tombstone() => {
                    self.complete_cancel(&pending.subject, &pending.message, pending.sequence)
                        .await?;
                    return Ok(ChangeOutcome::Applied);
                }
                Some(CallLocation::Pending(pending)) => {
                    if let Some(changed) = self.cancel_pending(&pending, true).await? {
                        return Ok(changed);
                    }
                }
            }
        }
        Ok(ChangeOutcome::WrongState(CallState::Running))
    }

    /// Removes an unfinished call that no process executes. Stores its final state if `store_final` is set. Returns
    /// `None` if the call has moved in the meantime.
    pub(super) async fn cancel_pending(
        &self,
        pending: &Pending,
        store_final: bool,
    ) -> Result<Option<ChangeOutcome>, NatsError> {
        let (api, call_ref) = (&self.api, pending.call_ref());
        let start = Instant::now();
        // From here on no receiver can claim the call. One that claimed it earlier has it on its running list.
        let marker = api.publish(
            self.subjects.cancel_marker(call_ref),
            HeaderMap::new(),
            Bytes::new(),
            Some(0),
        );
        let marker = match marker.await {
            Ok(stored) => stored.sequence,
            // Another process is cancelling the call, or has done so.
            Err(error) if error.is_conflict() => return Ok(None),
            Err(error) => return Err(error),
        };
        let changed = match self.running_calls().await {
            Ok(runs) if runs.contains_key(&call_ref) => {
                Ok(Some(ChangeOutcome::WrongState(CallState::Running)))
            }
            Ok(_) => self.remove_pending(pending, store_final, start).await,
            Err(error) => Err(error),
        };
        match changed {
            // The marker stays, for receivers that hold the call but have not claimed it.
            Ok(Some(ChangeOutcome::Applied)) => {
                self.remove_body(pending.message.chunked_body().as_ref()).await
            }
            // Otherwise the marker expires.
            Ok(_) => drop(api.delete(&self.subjects.claims, marker).await),
            // The cancellation may have succeeded nevertheless.
            Err(_) => {}
        }
        changed
    }

    /// Removes a call whose cancel marker was written after `start`.
    async fn remove_pending(
        &self,
        pending: &Pending,
        store_final: bool,
        start: Instant,
    ) -> Result<Option<ChangeOutcome>, NatsError> {
        let Pending { subject: CallSubject { function, id }, sequence, message, .. } = pending;
        if let Some((batch_ref, index)) = &pending.in_batch {
            let status = message.status().filter(|_| store_final).map(cancelled);
            let removed = self
                .remove_from_batch(batch_ref, *index, status, start + removal_timeout())
                .await?;
            return Ok(removed.then_some(ChangeOutcome::Applied));
        }
        let subject = self.subjects.call(CALLS, function, id);
        let stored = self.api.get_last(&self.subjects.calls, &subject).await?;
        let stored = stored.map(|stored| stored.sequence);
        let finished = self.is_finished(function, id, *sequence).await?;
        match removal(*sequence, stored, finished, start.elapsed()) {
            Removal::Allowed => {}
            Removal::Moved => return Ok(None),
            Removal::TooLate => return Err(NatsError::Unavailable),
        }
        let status = match message.status() {
            Some(status) if store_final => status,
            _ => {
                self.api.delete(&self.subjects.calls, *sequence).await?;
                return Ok(Some(ChangeOutcome::Applied));
            }
        };
        // This single step prevents the execution, even if this process dies afterwards. Any process can complete the
        // rest.
        let headers = message.tombstone(&cancelled(status), *sequence);
        let put = self.api.publish(subject, headers.clone(), Bytes::new(), Some(*sequence)).await;
        let stored = match put {
            Ok(stored) => stored.sequence,
            Err(error) if error.is_conflict() => return Ok(None),
            Err(error) => return Err(error),
        };
        let message = Message::from_stored(headers, Bytes::new());
        if let Err(error) = self.complete_cancel(&pending.subject, &message, stored).await {
            tracing::warn!(%error, call_id = id, "A cancelled call is not removed yet");
        }
        Ok(Some(ChangeOutcome::Applied))
    }

    /// Stores the final state of a cancelled call and removes its tombstone.
    pub(super) async fn complete_cancel(
        &self,
        call_subject: &CallSubject,
        message: &Message,
        sequence: u64,
    ) -> Result<(), NatsError> {
        let Some(status) = message.stored_status() else { return Ok(()) };
        for step in COMPLETION {
            match step {
                Completion::FinalRecord => {
                    let status = status.clone();
                    self.store_final_record(&call_subject.function, status, sequence).await?;
                }
                Completion::IdempotencyKey => {
                    if let Ok(Some(key)) = message.call().map(|call| call.options.idempotency_key) {
                        self.store_idempotency(&key, &call_subject.function, &call_subject.id)
                            .await?;
                    }
                }
                Completion::RemoveTombstone => {
                    self.api.delete(&self.subjects.calls, sequence).await?;
                }
            }
        }
        Ok(())
    }
}
