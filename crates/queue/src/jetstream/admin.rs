//! Lists, purges and counts calls. These read the streams call by call: they serve operators and are not polled.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::MutexGuard;
use std::time::Instant;

use futures_util::{StreamExt, TryStreamExt, stream};

use async_nats::jetstream::message::StreamMessage;

use crate::jetstream::Shared;
use crate::jetstream::batch::state::DecodedBatch;
use crate::jetstream::error::NatsError;
use crate::jetstream::lookup::{CallLocation, DeadLetter, Finished, Pending};
use crate::jetstream::wire::batch::BatchRecord;
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::message;
use crate::jetstream::wire::subjects::{
    self, CALLS, DEAD_LETTERS, FINAL_RECORDS, function_of_consumer, parse,
};
use crate::status::CallRecord;
use crate::{CallPage, ChangeOutcome, Filter, Order, QueueDepth, now};
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Maximum number of concurrent requests to the server.
const MAX_CONCURRENT_QUERIES: usize = 32;
/// Maximum number of calls that are read per kind. A longer list is incomplete and is marked so.
const MAX_LISTED_CALLS: usize = 10_000;
/// Maximum number of calls that are counted exactly, one by one. Counts of a larger queue are estimated from the
/// consumers and are some seconds old. In an estimate, a delayed call counts as delayed only after its first delivery,
/// and a call that was delivered but not claimed may count as delayed.
const MAX_EXACT_COUNT: u64 = 200;

/// Estimated counts of a large queue, and the end of their validity.
pub(super) struct CountEstimate {
    valid_until: Instant,
    counts: HashMap<Function, QueueDepth>,
}

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

    pub(super) async fn list(
        &self,
        filter: &Filter,
        after: Option<&str>,
        limit: usize,
    ) -> Result<CallPage, NatsError> {
        let (mut all, complete) = self.matching_calls(filter).await?;
        all.sort_unstable_by(|a, b| compare(filter.order, a, b));
        let first = match after {
            Some(id) => match all.iter().position(|status| status.id == id) {
                Some(index) => index + 1,
                // A call whose state has changed may have left the list; its position in the order is still known.
                None => match self.status(id).await? {
                    Some(last) => {
                        all.partition_point(|status| compare(filter.order, status, &last).is_le())
                    }
                    None => all.len(),
                },
            },
            None => 0,
        };
        Ok(CallPage { calls: all.into_iter().skip(first).take(limit).collect(), complete })
    }

    /// Returns all calls that match `filter`, unordered, and whether the list is complete.
    async fn matching_calls(&self, filter: &Filter) -> Result<(Vec<CallRecord>, bool), NatsError> {
        let (subjects, function) = (&self.subjects, filter.function.as_ref());
        let matches = |status: &CallRecord| {
            (status.dead_letter || self.is_retained(status))
                && filter.state.is_none_or(|state| state == status.state)
                && filter.dead_letter.is_none_or(|dead| dead == status.dead_letter)
        };
        let mut all: HashMap<String, (u64, CallRecord)> = HashMap::new();
        let (mut archived, mut complete) = (HashMap::new(), true);
        if filter.dead_letter != Some(true) {
            let (final_records, are_all) = self
                .last_messages(
                    &subjects.results,
                    &subjects.of_function(FINAL_RECORDS, function),
                    MAX_LISTED_CALLS,
                )
                .await?;
            complete &= are_all;
            for found in final_records {
                if let Some(record) = message::parse_final_record(&found.headers) {
                    all.insert(record.status.id.clone(), (record.sequence, record.status));
                } else if let Some((key, record)) = decode_record(found) {
                    archived.insert(key, record);
                }
            }
        }
        if filter.dead_letter != Some(false) {
            let (dead, are_all) = self
                .last_messages(
                    &subjects.dead_letters,
                    &subjects.of_function(DEAD_LETTERS, function),
                    MAX_LISTED_CALLS,
                )
                .await?;
            complete &= are_all;
            for found in dead {
                let Some(DeadLetter { status, previous_seq, .. }) = DeadLetter::new(found) else {
                    continue;
                };
                // A server that was killed may have restored a dead letter that was removed.
                if all.get(&status.id).is_none_or(|(sequence, _)| *sequence < previous_seq) {
                    all.insert(status.id.clone(), (previous_seq, status));
                }
            }
        }
        if filter.dead_letter == Some(true) {
            let dead = all.into_values().map(|(_, status)| status).filter(matches);
            return Ok((dead.collect(), complete));
        }
        let claimed = self.running_calls().await?;
        let (pending, are_all) = self
            .last_messages(
                &subjects.calls,
                &subjects.of_function(CALLS, function),
                MAX_LISTED_CALLS,
            )
            .await?;
        complete &= are_all;
        let mut records = self.batch_records(&pending).await?;
        for (key, record) in archived {
            records.entry(key).or_insert_with(|| BatchRecord::new(record.sequence)).merge(record);
        }
        for (_, record, _) in records.values().flat_map(BatchRecord::final_records) {
            all.insert(record.status.id.clone(), (record.sequence, record.status));
        }
        for found in pending {
            for pending in pending_calls(found, &records) {
                let (id, sequence) = (&pending.subject.id, pending.sequence);
                // The call is finished, and its message is about to be removed.
                if all.get(id).is_some_and(|(finished, _)| *finished >= sequence) {
                    continue;
                }
                let status = pending.status(claimed.get(&pending.call_ref()).copied());
                all.extend(status.map(|status| (id.clone(), (sequence, status))));
            }
        }
        let all = all.into_values().map(|(_, status)| status).filter(matches);
        Ok((all.collect(), complete))
    }

    /// Removes all calls that match `filter` and are not running. Returns the number of removed calls.
    pub(super) async fn purge(&self, filter: &Filter) -> Result<u64, NatsError> {
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

    pub(super) async fn counts(&self) -> Result<Vec<(Function, QueueDepth)>, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let mut counts: HashMap<Function, QueueDepth> = HashMap::new();
        let dead = api
            .subjects(&subjects.dead_letters, &subjects.of_function(DEAD_LETTERS, None), usize::MAX)
            .await?;
        for call_subject in dead.iter().filter_map(|subject| parse(subject)) {
            counts.entry(call_subject.function).or_default().dead_letters += 1;
        }
        if api.message_count(&subjects.calls).await? <= MAX_EXACT_COUNT {
            self.count_exact(&mut counts).await?;
        } else {
            for (function, counted) in self.count_estimated().await? {
                let dead = counts.get(&function).map_or(0, |counts| counts.dead_letters);
                counts.insert(function, QueueDepth { dead_letters: dead, ..counted });
            }
        }
        let mut all: Vec<_> =
            counts.into_iter().filter(|(_, counts)| *counts != QueueDepth::default()).collect();
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    /// Counts the unfinished calls one by one.
    async fn count_exact(
        &self,
        counts: &mut HashMap<Function, QueueDepth>,
    ) -> Result<(), NatsError> {
        let subjects = &self.subjects;
        let claimed = self.running_calls().await?;
        let (found, _) = self
            .last_messages(&subjects.calls, &subjects.of_function(CALLS, None), usize::MAX)
            .await?;
        let records = self.batch_records(&found).await?;
        for pending in found.into_iter().flat_map(|found| pending_calls(found, &records)) {
            let running = claimed.contains_key(&pending.call_ref());
            let Pending { subject: call_subject, message, .. } = pending;
            let Ok(call) = message.call() else { continue };
            if message.is_tombstone() {
                continue;
            }
            let counted = counts.entry(call_subject.function).or_default();
            if running {
                counted.running += 1;
            } else if message.due_at(&call) > now() {
                counted.delayed += 1;
            } else {
                counted.pending += 1;
                let submitted = call.options.submitted_at;
                counted.oldest =
                    Some(counted.oldest.map_or(submitted, |oldest| oldest.min(submitted)));
            }
        }
        Ok(())
    }

    /// Returns counts that are estimated from the consumers and the running lists. The time that an estimate takes on
    /// the server grows with the queue, so it is repeated only after 100 times its duration.
    async fn count_estimated(&self) -> Result<HashMap<Function, QueueDepth>, NatsError> {
        if let Some(CountEstimate { valid_until, counts }) = &*self.count_estimate()
            && *valid_until > Instant::now()
        {
            return Ok(counts.clone());
        }
        let (start, mut counts) = (Instant::now(), HashMap::new());
        self.estimate_counts(&mut counts).await?;
        let valid_until = Instant::now() + start.elapsed() * 100;
        *self.count_estimate() = Some(CountEstimate { valid_until, counts: counts.clone() });
        Ok(counts)
    }

    fn count_estimate(&self) -> MutexGuard<'_, Option<CountEstimate>> {
        lock_unpoisoned(&self.count_estimate)
    }

    async fn estimate_counts(
        &self,
        counts: &mut HashMap<Function, QueueDepth>,
    ) -> Result<(), NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let lists = self.running_lists().await?;
        let batch_sizes = self.batch_sizes().await?;
        for consumer in api.consumers(&subjects.calls).await? {
            let Some(function) = function_of_consumer(&consumer.name) else { continue };
            let running = lists.iter().map(|list| list.count(&consumer.name));
            let (running, in_messages) =
                running.fold((0, 0), |(a, b), (calls, messages)| (a + calls, b + messages));
            // The running list may be outdated: without unacknowledged messages nothing runs.
            let running = if consumer.ack_pending == 0 { 0 } else { running };
            let messages = consumer.pending + consumer.ack_pending;
            let oldest = match messages {
                0 => None,
                _ => {
                    api.get_next(&subjects.calls, &subjects.of_function(CALLS, Some(&function)), 1)
                        .await?
                }
            };
            let oldest =
                oldest.and_then(|found| pending_calls(found, &HashMap::new()).into_iter().next());
            let oldest = oldest.and_then(|pending| pending.message.call().ok());
            let (of_calls, of_messages) = batch_sizes.get(&function).copied().unwrap_or((1, 1));
            let all = u128::from(messages) * u128::from(of_calls) / u128::from(of_messages);
            let counted = counts.entry(function).or_default();
            counted.running = running as u64;
            counted.delayed = consumer.ack_pending.saturating_sub(in_messages as u64);
            let others = counted.running + counted.delayed;
            counted.pending = u64::try_from(all).unwrap_or(u64::MAX).saturating_sub(others);
            counted.oldest = oldest.map(|call| call.options.submitted_at);
        }
        Ok(())
    }

    /// Returns the number of calls and of messages of each function; of a large queue, of a part of the messages.
    async fn batch_sizes(&self) -> Result<HashMap<Function, (u64, u64)>, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let mut batch_sizes: HashMap<Function, (u64, u64)> = HashMap::new();
        for subject in api
            .subjects(&subjects.calls, &subjects.of_function(CALLS, None), MAX_LISTED_CALLS)
            .await?
        {
            let Some(call_subject) = parse(&subject) else { continue };
            let (calls, messages) = batch_sizes.entry(call_subject.function).or_default();
            *calls += subjects::call_count(&subject) as u64;
            *messages += 1;
        }
        Ok(batch_sizes)
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

/// Returns the order of two calls in a list. Calls of the same millisecond are ordered by id.
fn compare(order: Order, a: &CallRecord, b: &CallRecord) -> Ordering {
    let oldest_first = (a.submitted_at, &a.id).cmp(&(b.submitted_at, &b.id));
    match order {
        Order::OldestFirst => oldest_first,
        Order::NewestFirst => oldest_first.reverse(),
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
