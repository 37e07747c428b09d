//! Purges calls.
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::jetstream::Shared;
use crate::jetstream::admin::MAX_CONCURRENT_QUERIES;
use crate::jetstream::error::NatsError;
use crate::jetstream::location::{CallLocation, Finished};
use crate::jetstream::wire::subjects::FINAL_RECORDS;
use crate::{ChangeOutcome, Filter};
use gateway_base::function::Function;

impl Shared {
    /// Removes all calls that match `filter` and are not running. Returns the number of removed calls.
    pub(in crate::jetstream) async fn purge(&self, filter: &Filter) -> Result<u64, NatsError> {
        let mut purged = 0;
        loop {
            let (found, complete) = self.matching_calls(filter).await?;
            let gone: Vec<bool> = stream::iter(found)
                .map(|status| async move { self.purge_one(&status.id).await })
                .buffer_unordered(MAX_CONCURRENT_QUERIES / 4)
                .try_collect()
                .await?;
            let gone = gone.into_iter().filter(|gone| *gone).count() as u64;
            purged += gone;
            if complete || gone == 0 {
                return Ok(purged);
            }
        }
    }

    /// Removes everything that is stored of a call, unless the call is running. Returns whether the call was removed.
    async fn purge_one(&self, id: &str) -> Result<bool, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let status = match self.find(id).await? {
            None => return Ok(false),
            Some(CallLocation::Pending(pending)) if pending.message.is_tombstone() => {
                return api.delete(&subjects.calls, pending.sequence).await;
            }
            Some(CallLocation::Pending(pending)) => {
                return Ok(
                    self.cancel_pending(&pending, false).await? == Some(ChangeOutcome::Applied)
                );
            }
            Some(CallLocation::DeadLetter(dead)) => return self.discard(id, dead, false).await,
            Some(CallLocation::Finished(Finished {
                in_batch: Some((batch_ref, index)),
                final_record,
                ..
            })) => {
                self.purge_from_batch(&batch_ref, index).await?;
                final_record.status
            }
            Some(CallLocation::Finished(Finished { final_record, .. })) => {
                // The original message may still exist, and without the final state the call would be executed again.
                api.delete(&subjects.calls, final_record.sequence).await?;
                final_record.status
            }
        };
        if let Some(function) = Function::parse(&status.function, "") {
            let final_record = api
                .get_last(&subjects.results, &subjects.call(FINAL_RECORDS, &function, id))
                .await?;
            if let Some(final_record) = final_record {
                api.delete(&subjects.results, final_record.sequence).await?;
            }
        }
        self.remove_response(id, self.response_sequence(id).await?).await?;
        Ok(true)
    }
}
