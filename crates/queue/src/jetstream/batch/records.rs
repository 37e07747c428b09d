//! Stored records of batches: loading, updating with optimistic concurrency, archiving.
use std::time::Instant;

use async_nats::HeaderMap;

use crate::call::QueuedCall;
use crate::jetstream::Shared;
use crate::jetstream::decide::batch::next_record;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::call_ref::{BatchIndex, BatchRef};
use crate::jetstream::wire::records::{BatchRecord, Outcome};
use crate::jetstream::wire::subjects::{BATCHES, CALLS, FINAL_RECORDS};

/// Maximum number of attempts to update a record that other processes update as well.
pub(in crate::jetstream) const MAX_RECORD_ATTEMPTS: usize = 32;

/// A stored record and its sequence; the sequence is 0 if none is stored.
pub(in crate::jetstream) type Revisioned = (BatchRecord, u64);

impl Shared {
    /// Loads the record of a batch. `archived` adds the archived record: the batch may be finished, or about to be.
    pub(in crate::jetstream) async fn load_record(
        &self,
        batch_ref: &BatchRef,
        archived: bool,
    ) -> Result<Revisioned, NatsError> {
        let BatchRef { function, key, sequence } = batch_ref;
        let open = self
            .load_record_at(&self.subjects.batch(BATCHES, function, *key), false, Some(*sequence))
            .await?;
        let (mut record, revision) = open.unwrap_or_else(|| (BatchRecord::new(*sequence), 0));
        if record.sequence != *sequence {
            // It belongs to an earlier message.
            record = BatchRecord::new(*sequence);
        }
        if archived {
            let subject = self.subjects.batch(FINAL_RECORDS, function, *key);
            if let Some((archived, _)) =
                self.load_record_at(&subject, true, Some(*sequence)).await?
            {
                record.merge(archived);
            }
        }
        Ok((record, revision))
    }

    /// Loads the record on `subject`, which may contain wildcards. If it cannot be decoded but belongs to another
    /// message than `sequence`, it counts as empty.
    pub(in crate::jetstream) async fn load_record_at(
        &self,
        subject: &str,
        archived: bool,
        sequence: Option<u64>,
    ) -> Result<Option<Revisioned>, NatsError> {
        let stream = if archived { &self.subjects.results } else { &self.subjects.batches };
        let Some(found) = self.api.get_last(stream, subject).await? else { return Ok(None) };
        let other = || {
            let of = BatchRecord::decode_sequence(&found.payload)?;
            sequence.is_some_and(|sequence| sequence != of).then(|| BatchRecord::new(of))
        };
        let record = BatchRecord::decode(found.payload.clone()).or_else(other);
        Ok(Some((record.ok_or(NatsError::UnreadableRecord)?, found.sequence)))
    }

    /// Updates the record of a batch with optimistic concurrency. Returns for each outcome whether it is now the
    /// recorded one. Does not start an attempt after `deadline`.
    pub(in crate::jetstream) async fn update_record(
        &self,
        batch_ref: &BatchRef,
        current: Revisioned,
        outcomes: &[(BatchIndex, Outcome)],
        deadline: Option<Instant>,
    ) -> Result<(Revisioned, Vec<bool>), NatsError> {
        let (mut record, mut revision) = current;
        for _ in 0..MAX_RECORD_ATTEMPTS {
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Err(NatsError::Unavailable);
            }
            let (next, accepted) = next_record(&record, outcomes);
            if next == record {
                return Ok(((record, revision), accepted));
            }
            match self.store_record(batch_ref, &next, revision).await {
                Ok(revision) => return Ok(((next, revision), accepted)),
                Err(error) if error.is_conflict() => {
                    (record, revision) = self.load_record(batch_ref, true).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Err(NatsError::Unavailable)
    }

    /// Stores a record that replaces the one with the sequence `replaces`.
    async fn store_record(
        &self,
        batch_ref: &BatchRef,
        record: &BatchRecord,
        replaces: u64,
    ) -> Result<u64, NatsError> {
        let subject = self.subjects.batch(BATCHES, &batch_ref.function, batch_ref.key);
        let stored =
            self.api.publish(subject, HeaderMap::new(), record.encode(), Some(replaces)).await?;
        Ok(stored.sequence)
    }

    /// Stores the outcomes of a batch that is about to be removed, for as long as results are kept.
    pub(in crate::jetstream) async fn archive_record(
        &self,
        batch_ref: &BatchRef,
        record: &BatchRecord,
    ) -> Result<(), NatsError> {
        let subject = self.subjects.batch(FINAL_RECORDS, &batch_ref.function, batch_ref.key);
        self.api.publish(subject, HeaderMap::new(), record.encode(), None).await.map(drop)
    }

    /// Publishes a call of a batch as its own message, unless that exists.
    pub(in crate::jetstream) async fn publish_split(
        &self,
        call: &QueuedCall,
        headers: HeaderMap,
    ) -> Result<(), NatsError> {
        let subject = self.subjects.call(CALLS, &call.function, &call.id);
        match self.api.publish(subject, headers, call.body.clone(), Some(0)).await {
            Err(error) if !error.is_conflict() => Err(error),
            _ => Ok(()),
        }
    }
}
