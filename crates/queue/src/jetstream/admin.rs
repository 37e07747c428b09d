//! Lists, purges and counts calls. These read the streams call by call: they serve operators and are not polled.

pub(super) mod counts;
mod list;
mod purge;
use std::collections::HashMap;

use async_nats::jetstream::message::StreamMessage;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::jetstream::Shared;
use crate::jetstream::batch::lookup::DecodedBatch;
use crate::jetstream::error::NatsError;
use crate::jetstream::location::Pending;
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::records::BatchRecord;
use crate::jetstream::wire::subjects;

/// Maximum number of concurrent requests to the server.
const MAX_CONCURRENT_QUERIES: usize = 32;
/// Maximum number of calls that are read per kind. A longer list is incomplete and is marked so.
const MAX_LISTED_CALLS: usize = 10_000;

impl Shared {
    /// Returns the last message of each subject that matches `filter`, for at most `max` calls, and whether the list
    /// is complete.
    async fn last_messages(
        &self,
        stream: &str,
        filter: &str,
        max: usize,
    ) -> Result<(Vec<StreamMessage>, bool), NatsError> {
        let all = self.api.subjects(stream, filter, max.saturating_add(1)).await?;
        let (found, mut calls) = (all.len(), 0);
        let subjects = all.into_iter().take_while(|subject| {
            let before = calls;
            calls += subjects::call_count(subject);
            before < max
        });
        let subjects: Vec<_> = subjects.collect();
        let complete = subjects.len() == found;
        if !complete {
            tracing::debug!(stream, found, max, "The queue has more calls than are read");
        }
        let messages = self.last_of_subjects(stream, subjects).await?;
        Ok((messages, complete))
    }

    /// Returns the last message of each of `subjects`.
    async fn last_of_subjects(
        &self,
        stream: &str,
        subjects: Vec<String>,
    ) -> Result<Vec<StreamMessage>, NatsError> {
        stream::iter(subjects)
            .map(|subject| async move { self.api.get_last(stream, &subject).await })
            .buffer_unordered(MAX_CONCURRENT_QUERIES)
            // A message that was removed in the meantime is skipped.
            .try_filter_map(|found| std::future::ready(Ok(found)))
            .try_collect()
            .await
    }

    /// Loads the records of those of `messages` that are batches.
    async fn batch_records(
        &self,
        messages: &[StreamMessage],
    ) -> Result<HashMap<BatchKey, BatchRecord>, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let batches = messages.iter().filter(|found| subjects::batch_key(&found.subject).is_some());
        let records = batches.filter_map(|found| subjects.batch_record(&found.subject));
        stream::iter(records.collect::<Vec<_>>())
            .map(|subject| async move { api.get_last(&subjects.batches, &subject).await })
            .buffer_unordered(MAX_CONCURRENT_QUERIES)
            .try_filter_map(|found| std::future::ready(Ok(found.and_then(decode_record))))
            .try_collect()
            .await
    }
}

/// Decodes a batch record, and the key of its batch.
fn decode_record(found: StreamMessage) -> Option<(BatchKey, BatchRecord)> {
    Some((subjects::batch_key(&found.subject)?, BatchRecord::decode(found.payload)?))
}

/// Returns the calls of a message that have no outcome in `records`.
fn pending_calls(found: StreamMessage, records: &HashMap<BatchKey, BatchRecord>) -> Vec<Pending> {
    match subjects::batch_key(&found.subject) {
        Some(key) => match DecodedBatch::new(found) {
            Some(batch) => batch.pending_calls(records.get(&key)).collect(),
            None => Vec::new(),
        },
        None => Pending::new(found).into_iter().collect(),
    }
}
