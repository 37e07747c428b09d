//! Lists calls.
use std::cmp::Ordering;
use std::collections::HashMap;

use crate::jetstream::Shared;
use crate::jetstream::admin::{MAX_LISTED_CALLS, decode_record, pending_calls};
use crate::jetstream::error::NatsError;
use crate::jetstream::location::DeadLetter;
use crate::jetstream::wire::final_record::parse_final_record;
use crate::jetstream::wire::records::BatchRecord;
use crate::jetstream::wire::subjects::{CALLS, DEAD_LETTERS, FINAL_RECORDS};
use crate::status::CallRecord;
use crate::{CallPage, Filter, Order};

impl Shared {
    pub(in crate::jetstream) async fn list(
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
    pub(super) async fn matching_calls(
        &self,
        filter: &Filter,
    ) -> Result<(Vec<CallRecord>, bool), NatsError> {
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
                if let Some(record) = parse_final_record(&found.headers) {
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
}

/// Returns the order of two calls in a list. Calls of the same millisecond are ordered by id.
fn compare(order: Order, a: &CallRecord, b: &CallRecord) -> Ordering {
    let oldest_first = (a.submitted_at, &a.id).cmp(&(b.submitted_at, &b.id));
    match order {
        Order::OldestFirst => oldest_first,
        Order::NewestFirst => oldest_first.reverse(),
    }
}
