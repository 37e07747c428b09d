//! Batches changed (cancel, purge) before their first delivery. Each change is announced to all receivers, so a
//! receiver does not need to load the record of every batch.
use std::collections::HashSet;
use std::sync::MutexGuard;
use std::time::Duration;

use bytes::Bytes;

use crate::jetstream::Shared;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::subjects::{self, BATCHES};
use gateway_base::sync::lock_unpoisoned;

/// Time limit for an announcement.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of tracked batches. Above it, the record of every batch is loaded.
const MAX_TRACKED_KEYS: usize = 100_000;

/// Batches that may have a record.
#[derive(Default)]
pub(in crate::jetstream) struct DirtyBatches {
    /// Connection on which all records were listed and announcements are received since; 0 for none.
    connection: u64,
    keys: HashSet<BatchKey>,
}

impl DirtyBatches {
    /// Returns whether a record of the batch `key` may exist, as far as this process knows on `connection`.
    pub(in crate::jetstream) fn may_be_dirty(
        &self,
        key: BatchKey,
        connection: Option<u64>,
    ) -> bool {
        connection != Some(self.connection) || self.keys.contains(&key)
    }

    /// Adds a batch whose change was announced.
    pub(in crate::jetstream) fn mark_dirty(&mut self, key: BatchKey) {
        if self.keys.len() < MAX_TRACKED_KEYS {
            self.keys.insert(key);
        } else {
            *self = Self::default();
        }
    }

    /// Removes a finished batch.
    pub(in crate::jetstream) fn remove(&mut self, key: BatchKey) {
        self.keys.remove(&key);
    }
}

impl Shared {
    pub(in crate::jetstream) fn dirty_batches(&self) -> MutexGuard<'_, DirtyBatches> {
        lock_unpoisoned(&self.dirty_batches)
    }

    /// Lists the existing records: their announcements may have been sent before this process received on `connection`.
    pub(in crate::jetstream) async fn load_dirty_batches(
        &self,
        connection: u64,
    ) -> Result<(), NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let records = api
            .subjects(&subjects.batches, &subjects.of_function(BATCHES, None), MAX_TRACKED_KEYS)
            .await?;
        let mut dirty = self.dirty_batches();
        dirty.keys.extend(records.iter().filter_map(|subject| subjects::batch_key(subject)));
        dirty.connection = if dirty.keys.len() < MAX_TRACKED_KEYS { connection } else { 0 };
        Ok(())
    }

    /// Announces that a call of the batch `key` is about to be removed. A receiver that gets this too late sees the
    /// cancel marker.
    pub(in crate::jetstream) async fn announce_dirty(
        &self,
        key: BatchKey,
    ) -> Result<(), NatsError> {
        let sent = self.api.client.publish(self.subjects.dirty_batches(), Bytes::from(key.token()));
        let sent = tokio::time::timeout(SEND_TIMEOUT, sent).await;
        sent.ok().and_then(Result::ok).ok_or(NatsError::Unavailable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::wire::ids::BatchKeys;

    #[test]
    fn a_batch_may_be_dirty_while_announcements_are_missed() {
        let keys = BatchKeys::new();
        let (one, two) = (keys.next(2, 1), keys.next(2, 2));
        let mut dirty = DirtyBatches::default();
        assert!(dirty.may_be_dirty(one, Some(1)), "nothing was read yet");
        dirty.connection = 1;
        assert!(!dirty.may_be_dirty(one, Some(1)));
        dirty.mark_dirty(one);
        assert!(dirty.may_be_dirty(one, Some(1)) && !dirty.may_be_dirty(two, Some(1)));
        assert!(
            dirty.may_be_dirty(two, Some(2)) && dirty.may_be_dirty(two, None),
            "another connection"
        );
        dirty.remove(one);
        assert!(!dirty.may_be_dirty(one, Some(1)));
        (0..=MAX_TRACKED_KEYS).for_each(|at| dirty.mark_dirty(keys.next(1, at as u64)));
        assert!(dirty.may_be_dirty(two, Some(1)), "there are too many to know");
    }
}
