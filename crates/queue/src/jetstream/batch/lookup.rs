//! Lookup of calls inside a batch.
//!
//! The record of a batch stores which of its calls have an outcome. It exists as long as the batch. Before the batch is
//! removed, the record is archived with the final states, and kept as long as they are.
use async_nats::jetstream::message::StreamMessage;

use crate::call::QueuedCall;
use crate::jetstream::Shared;
use crate::jetstream::decide::location::{PlaceInBatch, place_in_batch};
use crate::jetstream::error::NatsError;
use crate::jetstream::location::{CallLocation, Finished, Pending};
use crate::jetstream::wire::batch;
use crate::jetstream::wire::call_ref::{BatchIndex, BatchRef};
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::message::Message;
use crate::jetstream::wire::records::{BatchRecord, Outcome};
use crate::jetstream::wire::subjects::{
    self, BATCHES, CALLS, CallSubject, DEAD_LETTERS, FINAL_RECORDS, parse,
};
use gateway_base::function::Function;

/// Location of a call that was published in a batch.
pub(in crate::jetstream) enum InBatch {
    Found(CallLocation),
    /// The call has its own message, or is about to get it: then it is still in the batch, too.
    Split(Option<Pending>),
    /// Everything stored of the call was removed.
    Purged,
    /// Neither the batch nor a record of it exists.
    NotFound,
}

/// A decoded batch.
pub(in crate::jetstream) struct DecodedBatch {
    pub(in crate::jetstream) batch_ref: BatchRef,
    pub(in crate::jetstream) calls: Vec<QueuedCall>,
}

impl DecodedBatch {
    /// Returns `None` if the message is no batch, or cannot be decoded.
    pub(in crate::jetstream) fn new(found: StreamMessage) -> Option<Self> {
        let key = subjects::batch_key(&found.subject)?;
        let function = parse(&found.subject)?.function;
        let calls = batch::decode(found.payload, &function, key).ok()?;
        Some(Self { batch_ref: BatchRef { function, key, sequence: found.sequence }, calls })
    }

    /// Returns the calls without an outcome in `record`.
    pub(in crate::jetstream) fn pending_calls(
        self,
        record: Option<&BatchRecord>,
    ) -> impl Iterator<Item = Pending> {
        let Self { batch_ref, calls } = self;
        let record = record.filter(|record| record.sequence == batch_ref.sequence);
        let calls = (0..).zip(calls);
        let open = calls
            .filter(move |(index, _)| record.is_none_or(|record| record.get(*index).is_none()));
        open.map(move |(index, call)| pending_call(&batch_ref, index, &call))
    }
}

fn pending_call(batch_ref: &BatchRef, index: BatchIndex, call: &QueuedCall) -> Pending {
    let call_subject = CallSubject { function: call.function.clone(), id: call.id.clone() };
    Pending {
        subject: call_subject,
        sequence: batch_ref.sequence,
        message: Message::new(call),
        claimed_at: None,
        in_batch: Some((batch_ref.clone(), index)),
    }
}

impl Shared {
    /// Returns whether the call has or had its own message: in the queue, as a dead letter, or as a final state.
    pub(in crate::jetstream) async fn exists_elsewhere(
        &self,
        call: &QueuedCall,
    ) -> Result<bool, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let locations = [
            (&subjects.calls, CALLS),
            (&subjects.dead_letters, DEAD_LETTERS),
            (&subjects.results, FINAL_RECORDS),
        ];
        for (stream, root) in locations {
            let subject = subjects.call(root, &call.function, &call.id);
            if api.get_last(stream, &subject).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Finds the call `id` of the batch `key`. The message is read first: if it is gone, the record is complete.
    pub(in crate::jetstream) async fn find_in_batch(
        &self,
        function: Option<&Function>,
        key: BatchKey,
        id: &str,
    ) -> Result<InBatch, NatsError> {
        let subjects = &self.subjects;
        let subject = |root| match function {
            Some(function) => subjects.batch(root, function, key),
            None => subjects.by_key(root, key),
        };
        let message = self.api.get_last(&subjects.calls, &subject(CALLS)).await?;
        let message = message.and_then(DecodedBatch::new);
        // The order matters: the record is archived before it is removed. A record of another message is ignored.
        let sequence = message.as_ref().map(|message| message.batch_ref.sequence);
        let is_of_message =
            |record: &BatchRecord| sequence.is_none_or(|sequence| record.sequence == sequence);
        let open = self.load_record_at(&subject(BATCHES), false, sequence).await?;
        let mut record = open.map(|(record, _)| record).filter(is_of_message);
        if let Some((archived, _)) =
            self.load_record_at(&subject(FINAL_RECORDS), true, sequence).await?
            && is_of_message(&archived)
        {
            match &mut record {
                Some(record) => record.merge(archived),
                None => record = Some(archived),
            }
        }
        let function = message.as_ref().map(|message| message.batch_ref.function.clone());
        let in_message = message.and_then(|DecodedBatch { batch_ref, calls }| {
            let index = calls.iter().position(|call| call.id == id)?;
            let index = BatchIndex::try_from(index).ok()?;
            Some(pending_call(&batch_ref, index, &calls[usize::from(index)]))
        });
        let index = in_message.as_ref().and_then(Pending::index);
        let Some(record) = record else { return self.pending_in_batch(in_message).await };
        let finished =
            record.final_records().find(|(_, final_record, _)| final_record.status.id == id);
        if let Some((index, final_record, body)) = finished {
            let from_status = || Function::parse(&final_record.status.function, "");
            let Some(function) = function.or_else(from_status) else {
                return Ok(InBatch::NotFound);
            };
            if !self.is_retained(&final_record.status) {
                return Ok(InBatch::Purged);
            }
            let batch_ref = BatchRef { function, key, sequence: record.sequence };
            return Ok(InBatch::Found(CallLocation::Finished(Finished {
                final_record,
                body,
                in_batch: Some((batch_ref, index)),
            })));
        }
        let outcome = index.and_then(|index| record.get(index));
        match place_in_batch(outcome, index.is_some()) {
            PlaceInBatch::Batch => self.pending_in_batch(in_message).await,
            PlaceInBatch::Splitting => Ok(InBatch::Split(in_message)),
            PlaceInBatch::Elsewhere => Ok(InBatch::Split(None)),
            PlaceInBatch::Purged => Ok(InBatch::Purged),
        }
    }

    async fn pending_in_batch(&self, pending: Option<Pending>) -> Result<InBatch, NatsError> {
        let Some(mut pending) = pending else { return Ok(InBatch::NotFound) };
        pending.claimed_at = self.running_calls().await?.get(&pending.call_ref()).copied();
        Ok(InBatch::Found(CallLocation::Pending(pending)))
    }

    /// Returns whether a batch exists only because a killed server lost its removal: each of its calls is finished or
    /// has its own message. Its consumer may regard the batch as acknowledged and never deliver it.
    pub(in crate::jetstream) async fn is_stale(
        &self,
        batch: &DecodedBatch,
    ) -> Result<bool, NatsError> {
        let DecodedBatch { batch_ref, calls } = batch;
        let record = match self.load_record(batch_ref, true).await {
            Ok((record, _)) => record,
            // A newer version wrote this record.
            Err(NatsError::UnreadableRecord) => return Ok(false),
            Err(error) => return Err(error),
        };
        if !record.is_complete(batch_ref.key) {
            return Ok(false);
        }
        for (index, call) in (0..).zip(calls) {
            if record.get(index) == Some(&Outcome::Splitting)
                && !self.exists_elsewhere(call).await?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
