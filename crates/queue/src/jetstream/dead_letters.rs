//! Dead letters: calls that failed for good. They can be discarded or redriven.
use crate::ChangeOutcome;
use crate::jetstream::Shared;
use crate::jetstream::error::NatsError;
use crate::jetstream::location::{CallLocation, DeadLetter, Finished};
use crate::jetstream::results::cancelled;
use crate::jetstream::wire::subjects::FINAL_RECORDS;
use crate::status::CallState;
use gateway_base::function::Function;

impl Shared {
    /// Discards a dead letter, and stores its final state if `store_final` is set. Returns `false` if another process
    /// has discarded or redriven it.
    pub(super) async fn discard(
        &self,
        id: &str,
        dead_letter: DeadLetter,
        store_final: bool,
    ) -> Result<bool, NatsError> {
        let Some(function) = Function::parse(&dead_letter.status.function, "") else {
            return Ok(false);
        };
        let call_subject = dead_letter.call_subject(&self.subjects, &function);
        let DeadLetter { status, message, sequence, previous_seq } = dead_letter;
        let (api, subjects) = (&self.api, &self.subjects);
        let (response, final_subject) =
            (self.response_sequence(id).await?, subjects.call(FINAL_RECORDS, &function, id));
        let final_seq = api
            .get_last(&subjects.results, &final_subject)
            .await?
            .map_or(0, |found| found.sequence);
        if api.get(&subjects.dead_letters, sequence).await?.is_none() {
            return Ok(false);
        }
        if store_final {
            let stored = self
                .store_final_record_over(
                    &function,
                    cancelled(status),
                    previous_seq,
                    Some(final_seq),
                )
                .await;
            match stored {
                Ok(()) => {}
                // The call was redriven and is finished.
                Err(error) if error.is_conflict() => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        // The original message may still exist: the process that settled the call, or the server, died too early.
        self.remove_original(previous_seq).await?;
        // A concurrent redrive needs the body.
        if !api.delete(&subjects.dead_letters, sequence).await? {
            return Ok(false);
        }
        // A redrive publishes the call before it removes the dead letter, and cancels the call if the dead letter was
        // already removed.
        if api.get_last(&subjects.calls, &call_subject).await?.is_some() {
            return Ok(false);
        }
        if !store_final && final_seq > 0 {
            api.delete(&subjects.results, final_seq).await?;
        }
        self.remove_response(id, response).await?;
        self.remove_body(message.chunked_body().as_ref()).await;
        Ok(true)
    }

    pub(super) async fn redrive(&self, id: &str) -> Result<ChangeOutcome, NatsError> {
        let dead_letter = match self.find(id).await? {
            None => return Ok(ChangeOutcome::NotFound),
            Some(CallLocation::Finished(Finished { final_record, .. })) => {
                return Ok(ChangeOutcome::WrongState(final_record.status.state));
            }
            Some(CallLocation::Pending(pending)) => {
                let status = pending.status(pending.claimed_at);
                return Ok(status.map_or(ChangeOutcome::NotFound, |status| {
                    ChangeOutcome::WrongState(status.state)
                }));
            }
            Some(CallLocation::DeadLetter(dead_letter)) => dead_letter,
        };
        let Some(function) = Function::parse(&dead_letter.status.function, "") else {
            return Ok(ChangeOutcome::NotFound);
        };
        let subject = dead_letter.call_subject(&self.subjects, &function);
        let DeadLetter { message, sequence, previous_seq, .. } = dead_letter;
        self.ensure_consumer(&function).await?;
        // The original message may still exist: the process that settled the call, or the server, died too early.
        self.remove_original(previous_seq).await?;
        let response = self.response_sequence(id).await?;
        if self.api.get(&self.subjects.dead_letters, sequence).await?.is_none() {
            // Another process has redriven the call, and it may be finished.
            let status = self.status(id).await?;
            return Ok(status.map_or(ChangeOutcome::NotFound, |status| {
                ChangeOutcome::WrongState(status.state)
            }));
        }
        let (headers, body) = (message.redriven(sequence), message.body.clone());
        let stored = match self.api.publish(subject, headers, body, Some(0)).await {
            Ok(stored) => stored.sequence,
            // Another process has redriven the call.
            Err(error) if error.is_conflict() => {
                return Ok(ChangeOutcome::WrongState(CallState::Queued));
            }
            Err(error) => return Err(error),
        };
        // The call is redriven even if the rest fails. The dead letter is removed when the call finishes at the latest.
        let rest = async {
            self.remove_response(id, response).await?;
            self.api.delete(&self.subjects.dead_letters, sequence).await
        };
        match rest.await {
            Ok(true) => {}
            // The call was discarded in the meantime, perhaps with its body, or it is already finished.
            Ok(false) => {
                if self.api.delete(&self.subjects.calls, stored).await? {
                    self.remove_body(message.chunked_body().as_ref()).await;
                    return Ok(ChangeOutcome::WrongState(CallState::Cancelled));
                }
            }
            Err(error) => {
                tracing::warn!(%error, call_id = id, "A redriven call is still listed as a dead letter");
            }
        }
        Ok(ChangeOutcome::Applied)
    }

    /// Removes the original message of a dead letter, if it had its own.
    async fn remove_original(&self, previous_seq: u64) -> Result<(), NatsError> {
        match previous_seq {
            0 => Ok(()),
            previous_seq => self.api.delete(&self.subjects.calls, previous_seq).await.map(drop),
        }
    }
}
