//! Changes (cancel, purge) of calls inside a batch.
use std::time::Instant;

use crate::jetstream::Shared;
use crate::jetstream::batch::records::MAX_RECORD_ATTEMPTS;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::call_ref::{BatchIndex, BatchRef};
use crate::jetstream::wire::records::Outcome;
use crate::jetstream::wire::subjects::{BATCHES, FINAL_RECORDS};
use crate::status::CallRecord;

impl Shared {
    /// Removes a call that no process executes, and that none can claim before `deadline`. Records its final state if
    /// `status` is given. Returns `false` if the call already has an outcome.
    pub(in crate::jetstream) async fn remove_from_batch(
        &self,
        batch_ref: &BatchRef,
        index: BatchIndex,
        status: Option<CallRecord>,
        deadline: Instant,
    ) -> Result<bool, NatsError> {
        let outcome = match status {
            Some(status) => Outcome::finished(batch_ref.sequence, status, None),
            None => Outcome::Purged,
        };
        self.announce_dirty(batch_ref.key).await?;
        let record = self.load_record(batch_ref, true).await?;
        let recorded =
            self.update_record(batch_ref, record, &[(index, outcome)], Some(deadline)).await?;
        let ((record, _), accepted) = recorded;
        let accepted = accepted == [true];
        if accepted && record.is_final(batch_ref.key) {
            // This was the last call. The open record stays until garbage collection: the holder of the batch may not
            // know yet.
            self.archive_record(batch_ref, &record).await?;
            self.api.delete(&self.subjects.calls, batch_ref.sequence).await?;
        }
        Ok(accepted)
    }

    /// Removes the final state of a call.
    pub(in crate::jetstream) async fn purge_from_batch(
        &self,
        batch_ref: &BatchRef,
        index: BatchIndex,
    ) -> Result<(), NatsError> {
        let subjects = &self.subjects;
        for (root, archived) in [(BATCHES, false), (FINAL_RECORDS, true)] {
            let subject = subjects.batch(root, &batch_ref.function, batch_ref.key);
            for attempt in 1.. {
                let found =
                    self.load_record_at(&subject, archived, Some(batch_ref.sequence)).await?;
                let found = found.filter(|(record, _)| record.sequence == batch_ref.sequence);
                let Some((mut record, revision)) = found else { break };
                record.purge(index);
                let headers = async_nats::HeaderMap::new();
                let stored =
                    self.api.publish(subject.clone(), headers, record.encode(), Some(revision));
                match stored.await {
                    Ok(_) => break,
                    Err(error) if error.is_conflict() && attempt < MAX_RECORD_ATTEMPTS => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}
