//! Counts calls by function and state.
use std::collections::HashMap;
use std::sync::MutexGuard;
use std::time::Instant;

use crate::jetstream::Shared;
use crate::jetstream::admin::{MAX_LISTED_CALLS, pending_calls};
use crate::jetstream::error::NatsError;
use crate::jetstream::location::Pending;
use crate::jetstream::wire::subjects::{self, CALLS, DEAD_LETTERS, function_of_consumer, parse};
use crate::{QueueDepth, now};
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Maximum number of calls that are counted exactly, one by one. Counts of a larger queue are estimated from the
/// consumers and are some seconds old. In an estimate, a delayed call counts as delayed only after its first delivery,
/// and a call that was delivered but not claimed may count as delayed.
const MAX_EXACT_COUNT: u64 = 200;

/// Estimated counts of a large queue, and the end of their validity.
pub(in crate::jetstream) struct CountEstimate {
    valid_until: Instant,
    counts: HashMap<Function, QueueDepth>,
}

impl Shared {
    pub(in crate::jetstream) async fn counts(
        &self,
    ) -> Result<Vec<(Function, QueueDepth)>, NatsError> {
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
}
