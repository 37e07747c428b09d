//! Decodes a delivered batch.
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::AckKind;

use crate::call::QueuedCall;
use crate::jetstream::Shared;
use crate::jetstream::ack::{AckSubject, RETRY_INTERVAL, send_ack};
use crate::jetstream::batch::held::Batch;
use crate::jetstream::decide::batch::{Remaining, remaining};
use crate::jetstream::decide::claim::may_be_settled;
use crate::jetstream::error::NatsError;
use crate::jetstream::undecodable::{RawMessage, Reason};
use crate::jetstream::wire::call_ref::{BatchIndex, BatchRef};
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::message::{self, Message};
use crate::jetstream::wire::records::BatchRecord;

/// A batch as it was delivered.
pub(in crate::jetstream) struct BatchDelivery {
    pub(in crate::jetstream) raw: RawMessage,
    pub(in crate::jetstream) key: BatchKey,
    pub(in crate::jetstream) lease: Duration,
}

/// The unfinished calls of a delivered batch.
pub(in crate::jetstream) struct UnpackedBatch {
    pub(in crate::jetstream) batch: Arc<Batch>,
    /// Calls without an outcome: they can be executed.
    pub(in crate::jetstream) unfinished: Vec<(BatchIndex, QueuedCall)>,
    /// Calls that another process has begun to split out.
    splitting: Vec<(BatchIndex, QueuedCall)>,
}

impl BatchDelivery {
    /// Decodes the batch. Returns `None` if it has no unfinished call, or not for this process. A batch that cannot be
    /// decoded becomes a dead letter.
    pub(in crate::jetstream) async fn unpack(
        self,
        shared: &Arc<Shared>,
        ack_subject: AckSubject,
    ) -> Option<UnpackedBatch> {
        let Self { raw, key, lease } = self;
        let (sequence, deliveries) = (raw.sequence, raw.deliveries);
        let batch_ref = BatchRef { function: raw.function.clone(), key, sequence };
        let calls = match raw.message.batch(&batch_ref.function, key) {
            Ok(calls) => calls,
            Err(error) => {
                let newer = message::is_newer(&error, true);
                let reason = Reason { text: error.to_string(), newer };
                raw.reject(shared, &ack_subject.get(), &reason).await;
                return None;
            }
        };
        // Before the first delivery, only a cancellation or a purge can have changed the record.
        let suspect = may_be_settled(deliveries, shared.api.predates_restart(sequence));
        let dirty = suspect
            || shared.dirty_batches().may_be_dirty(batch_ref.key, shared.api.current_connection());
        let record = match dirty {
            true => shared.load_record(&batch_ref, suspect).await,
            false => Ok((BatchRecord::new(batch_ref.sequence), 0)),
        };
        let record = match record {
            Ok(record) => record,
            Err(error @ NatsError::UnreadableRecord) => {
                // The record may be damaged, or of a newer version.
                let text = format!("{error}: some of its calls may have been executed");
                let reason = Reason { text, newer: true };
                raw.reject(shared, &ack_subject.get(), &reason).await;
                return None;
            }
            Err(error) => {
                tracing::debug!(%error, "Cannot load the record of a delivered batch");
                let nak = AckKind::Nak(Some(RETRY_INTERVAL));
                send_ack(&shared.api, &ack_subject.get(), nak).await;
                return None;
            }
        };
        let (mut unfinished, mut splitting) = (Vec::new(), Vec::new());
        for (index, call) in (0..).zip(calls) {
            match remaining(&record.0, index) {
                Remaining::Execute => unfinished.push((index, call)),
                Remaining::CompleteSplit => splitting.push((index, call)),
                Remaining::Nothing => {}
            }
        }
        let batch =
            Batch::new(batch_ref, ack_subject, lease, record, splitting.len() + unfinished.len());
        if splitting.is_empty() && unfinished.is_empty() {
            batch.finish(shared).await;
            return None;
        }
        Some(UnpackedBatch { batch, unfinished, splitting })
    }
}

impl UnpackedBatch {
    /// Publishes calls that were being split out, where that has not been done: the process that began it may have
    /// died.
    pub(in crate::jetstream) async fn complete_splits(self, shared: &Arc<Shared>) {
        let Self { batch, splitting, .. } = self;
        for (index, call) in splitting {
            let published = async {
                if shared.exists_elsewhere(&call).await? {
                    return Ok(());
                }
                shared.publish_split(&call, Message::new(&call).original_headers()).await
            };
            match published.await {
                Ok(()) => {
                    batch.mark_split(shared, index);
                    batch.call_done(shared).await;
                }
                Err(error) => {
                    tracing::debug!(%error, call_id = call.id, "Cannot split out a call");
                }
            }
        }
    }
}
