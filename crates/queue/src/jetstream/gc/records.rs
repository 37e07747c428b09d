//! Garbage collection of records whose batches are gone.
use std::time::Duration;

use crate::jetstream::Shared;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::subjects::{self, BATCHES, CALLS, parse};
use crate::now;

impl Shared {
    /// Removes records older than `age` whose batches are gone. Returns the number of removed records.
    pub(in crate::jetstream) async fn collect_records(
        &self,
        age: Duration,
    ) -> Result<u64, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let mut removed = 0;
        for subject in api
            .subjects(&subjects.batches, &subjects.of_function(BATCHES, None), usize::MAX)
            .await?
        {
            let Some(found) = api.get_last(&subjects.batches, &subject).await? else { continue };
            let born = u128::try_from(found.time.unix_timestamp_nanos()).unwrap_or(0) / 1_000_000;
            let (key, call_subject) = (subjects::batch_key(&subject), parse(&subject));
            let (Some(key), Some(call_subject)) = (key, call_subject) else { continue };
            if u128::from(now()).saturating_sub(born) < age.as_millis() {
                continue;
            }
            let message = subjects.batch(CALLS, &call_subject.function, key);
            if api.get_last(&subjects.calls, &message).await?.is_none() {
                api.delete(&subjects.batches, found.sequence).await?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}
