//! Repairs the state of a consumer after a server crash.
//!
//! The server stores messages immediately, but not their removal nor the state of consumers. So a consumer may wait for
//! acks of messages that no longer exist: it tries to redeliver each of them before anything new, and proceeds by only
//! one with each pull. Also, finished messages may reappear that the consumer never delivers, since it regards them as
//! acknowledged.
use std::collections::HashSet;

use async_nats::jetstream::AckKind;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::jetstream::Shared;
use crate::jetstream::batch::lookup::DecodedBatch;
use crate::jetstream::error::NatsError;
use crate::jetstream::location::Pending;
use crate::jetstream::wire::subjects::{CALLS, consumer_name};
use gateway_base::function::Function;

/// Maximum number of delivered messages that are checked: running and delayed calls.
const MAX_MESSAGES_CHECKED: usize = 10_000;
/// Maximum number of sequences, the latest ones, that are checked for missing messages.
const MAX_SEQUENCES_CHECKED: u64 = 100_000;
/// Maximum number of concurrent requests to the server.
const MAX_CONCURRENT_QUERIES: usize = 32;

impl Shared {
    /// Repairs the consumer of `function`, once per start of the server.
    pub(super) async fn repair_consumer(&self, function: &Function) -> Result<(), NatsError> {
        let api = self.api.client.server_info().server_id;
        if self.consumers().is_repaired(function, &api) {
            return Ok(());
        }
        Box::pin(self.repair_consumer_now(function)).await?;
        self.consumers().mark_repaired(function, api);
        Ok(())
    }

    async fn repair_consumer_now(&self, function: &Function) -> Result<(), NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let consumer = api.consumer_state(&subjects.calls, &consumer_name(function)).await?;
        let (mut existing, mut finished, mut stale) = (HashSet::new(), Vec::new(), 0);
        let (of_function, mut next) = (subjects.of_function(CALLS, Some(function)), 1);
        while existing.len() < MAX_MESSAGES_CHECKED
            && let Some(found) = api.get_next(&subjects.calls, &of_function, next).await?
            && found.sequence <= consumer.delivered
        {
            existing.insert(found.sequence);
            next = found.sequence + 1;
            match DecodedBatch::new(found.clone()) {
                Some(batch) if self.is_stale(&batch).await? => {
                    api.delete(&subjects.calls, batch.batch_ref.sequence).await?;
                    stale += 1;
                }
                Some(_) => {}
                None => finished.extend(Pending::new(found)),
            }
        }
        let finished = stream::iter(finished).map(|pending| async move {
            let (sequence, id) = (pending.sequence, &pending.subject.id);
            if self.is_finished(function, id, sequence).await? {
                api.delete(&subjects.calls, sequence).await?;
                return Ok::<_, NatsError>(1);
            }
            Ok(0)
        });
        let finished: Vec<usize> =
            finished.buffer_unordered(MAX_CONCURRENT_QUERIES).try_collect().await?;
        let finished = finished.into_iter().sum::<usize>() + stale;
        // The consumer regards all up to its ack floor as acknowledged.
        let unacked =
            existing.iter().filter(|sequence| **sequence > consumer.ack_floor).count() as u64;
        let missing = consumer.ack_pending.saturating_sub(unacked);
        if missing > 0 {
            let first = (consumer.ack_floor + 1)
                .max(consumer.delivered.saturating_sub(MAX_SEQUENCES_CHECKED));
            let sequences =
                (first..=consumer.delivered).filter(|sequence| !existing.contains(sequence));
            self.ack_missing(function, sequences).await?;
        }
        if missing > 0 || finished > 0 {
            tracing::info!(%function, finished, missing, "Repaired a consumer after a server crash");
        }
        Ok(())
    }

    /// Acknowledges those of the messages that do not exist. For an existing message, the server would remove it, even
    /// if it belongs to another function.
    async fn ack_missing(
        &self,
        function: &Function,
        sequences: impl Iterator<Item = u64>,
    ) -> Result<(), NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let prefix = format!("$JS.ACK.{}.{}.1", subjects.calls, consumer_name(function));
        let missing = stream::iter(sequences).map(|sequence| async move {
            let found = api.get(&subjects.calls, sequence).await?;
            Ok::<_, NatsError>(found.is_none().then_some(sequence))
        });
        let mut missing = std::pin::pin!(missing.buffer_unordered(MAX_CONCURRENT_QUERIES));
        while let Some(sequence) = missing.try_next().await? {
            let Some(sequence) = sequence else { continue };
            // The server ignores the delivery count, consumer sequence and timestamp.
            let subject = format!("{prefix}.{sequence}.0.0.0");
            let sent = api.client.publish(subject, Bytes::from(AckKind::Ack)).await;
            sent.map_err(|_| NatsError::Unavailable)?;
        }
        Ok(())
    }
}
