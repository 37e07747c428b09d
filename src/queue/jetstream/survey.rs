//! What is said of many calls at once. It is read from the streams call by call: for operators, not for every second.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use futures_util::{StreamExt, TryStreamExt, stream};

use async_nats::jetstream::message::StreamMessage;

use crate::function::Function;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::bundle::Record;
use crate::queue::jetstream::ids::Key;
use crate::queue::jetstream::message;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::state::{Dead, Ended, Found, Waiting};
use crate::queue::jetstream::subject::{self, CALLS, DEAD, ENDS, consumed, named};
use crate::queue::jetstream::together::Bundled;
use crate::queue::now;
use crate::queue::status::CallRecord;
use crate::queue::{CallPage, ChangeOutcome, Filter, Order, QueueDepth};

/// So many questions are on their way at a time.
const TOGETHER: usize = 32;
/// At most this many calls of a kind are looked at. A list of more is one of some of them, and says so.
const MOST: usize = 10_000;
/// So many calls at most are looked at one by one to count them. Of more, the consumers say how many there are: then
/// a call that is put off counts as delayed only after it was given to a worker, one that a worker has but has not
/// begun may do so too, and all is some seconds old.
const COUNTED: u64 = 200;

/// The counts of a large queue, and how long they are good enough.
pub(super) struct Counted {
    until: Instant,
    counts: HashMap<Function, QueueDepth>,
}

impl Shared {
    /// The last messages of all subjects that fit `filter`, with `most` calls at most, and whether these are all.
    async fn read(
        &self,
        stream: &str,
        filter: &str,
        most: usize,
    ) -> Result<(Vec<StreamMessage>, bool), Fault> {
        let all = self.server.subjects(stream, filter, most.saturating_add(1)).await?;
        let (found, mut calls) = (all.len(), 0);
        let subjects = all.into_iter().take_while(|subject| {
            let before = calls;
            calls += subject::calls(subject);
            before < most
        });
        let subjects: Vec<_> = subjects.collect();
        let complete = subjects.len() == found;
        if !complete {
            tracing::debug!(stream, found, most, "More calls than are looked at");
        }
        let messages = self.last_of(stream, subjects).await?;
        Ok((messages, complete))
    }

    /// The last message of each of `subjects`.
    async fn last_of(
        &self,
        stream: &str,
        subjects: Vec<String>,
    ) -> Result<Vec<StreamMessage>, Fault> {
        stream::iter(subjects)
            .map(|subject| async move { self.server.last(stream, &subject).await })
            .buffer_unordered(TOGETHER)
            // What is gone by now is not there.
            .try_filter_map(|found| std::future::ready(Ok(found)))
            .try_collect()
            .await
    }

    pub(super) async fn list(
        &self,
        filter: &Filter,
        after: Option<&str>,
        limit: usize,
    ) -> Result<CallPage, Fault> {
        let (mut all, complete) = self.all(filter).await?;
        all.sort_unstable_by(|a, b| compare(filter.order, a, b));
        let first = match after {
            Some(id) => match all.iter().position(|status| status.id == id) {
                Some(index) => index + 1,
                // A call that is not listed any more, because its state has changed, keeps its place in the order.
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

    /// All calls that `filter` means, in no order, and whether none of them may be missing.
    async fn all(&self, filter: &Filter) -> Result<(Vec<CallRecord>, bool), Fault> {
        let (names, function) = (&self.names, filter.function.as_ref());
        let means = |status: &CallRecord| {
            (status.dead_letter || self.is_kept(status))
                && filter.state.is_none_or(|state| state == status.state)
                && filter.dead_letter.is_none_or(|dead| dead == status.dead_letter)
        };
        let mut all: HashMap<String, (u64, CallRecord)> = HashMap::new();
        let (mut filed, mut complete) = (HashMap::new(), true);
        if filter.dead_letter != Some(true) {
            let (ends, are_all) = self.read(&names.notes, &names.of(ENDS, function), MOST).await?;
            complete &= are_all;
            for found in ends {
                if let Some(end) = message::end(&found.headers) {
                    all.insert(end.status.id.clone(), (end.sequence, end.status));
                } else if let Some((key, record)) = record(found) {
                    filed.insert(key, record);
                }
            }
        }
        if filter.dead_letter != Some(false) {
            let (dead, are_all) = self.read(&names.dead, &names.of(DEAD, function), MOST).await?;
            complete &= are_all;
            for found in dead {
                let Some(Dead { status, was, .. }) = Dead::new(found) else { continue };
                // A server that was killed may have kept it beyond its time.
                if all.get(&status.id).is_none_or(|(of, _)| *of < was) {
                    all.insert(status.id.clone(), (was, status));
                }
            }
        }
        if filter.dead_letter == Some(true) {
            let dead = all.into_values().map(|(_, status)| status).filter(means);
            return Ok((dead.collect(), complete));
        }
        let runs = self.runs().await?;
        let (waiting, are_all) = self.read(&names.calls, &names.of(CALLS, function), MOST).await?;
        complete &= are_all;
        let mut records = self.records(&waiting).await?;
        for (key, record) in filed {
            records.entry(key).or_insert_with(|| Record::of(record.sequence)).add(record);
        }
        for (_, end, _) in records.values().flat_map(Record::ends) {
            all.insert(end.status.id.clone(), (end.sequence, end.status));
        }
        for found in waiting {
            for waiting in each(found, &records) {
                let (id, sequence) = (&waiting.named.id, waiting.sequence);
                // One whose final state is there already will be gone in a moment.
                if all.get(id).is_some_and(|(of, _)| *of >= sequence) {
                    continue;
                }
                let status = waiting.status(runs.get(&waiting.place()).copied());
                all.extend(status.map(|status| (id.clone(), (sequence, status))));
            }
        }
        let all = all.into_values().map(|(_, status)| status).filter(means);
        Ok((all.collect(), complete))
    }

    /// Drops the calls that `filter` means and that do not run.
    pub(super) async fn purge_all(&self, filter: &Filter) -> Result<u64, Fault> {
        let mut purged = 0;
        loop {
            let (found, complete) = self.all(filter).await?;
            let gone: Vec<bool> = stream::iter(found)
                .map(|status| async move { self.purge_one(&status.id).await })
                .buffer_unordered(TOGETHER / 4)
                .try_collect()
                .await?;
            let gone = gone.into_iter().filter(|gone| *gone).count() as u64;
            purged += gone;
            if complete || gone == 0 {
                return Ok(purged);
            }
        }
    }

    /// Removes all trace of a call, unless it runs; whether it is gone.
    async fn purge_one(&self, id: &str) -> Result<bool, Fault> {
        let (server, names) = (&self.server, &self.names);
        let status = match self.find(id).await? {
            None => return Ok(false),
            Some(Found::Waiting(waiting)) if waiting.message.is_taken_back() => {
                return server.delete(&names.calls, waiting.sequence).await;
            }
            Some(Found::Waiting(waiting)) => {
                return Ok(self.withdraw(&waiting, false).await? == Some(ChangeOutcome::Applied));
            }
            Some(Found::Dead(dead)) => return self.drop_dead(id, dead, false).await,
            Some(Found::Ended(Ended { among: Some((which, slot)), end, .. })) => {
                self.purge_among(&which, slot).await?;
                end.status
            }
            Some(Found::Ended(Ended { end, .. })) => {
                // The message that it was may be there still, and without its final state it would be made again.
                server.delete(&names.calls, end.sequence).await?;
                end.status
            }
        };
        if let Some(function) = Function::parse(&status.function, "") {
            let end = server.last(&names.notes, &names.call(ENDS, &function, id)).await?;
            if let Some(end) = end {
                server.delete(&names.notes, end.sequence).await?;
            }
        }
        self.forget_answer(id, self.answer_at(id).await?).await?;
        Ok(true)
    }

    pub(super) async fn counts(&self) -> Result<Vec<(Function, QueueDepth)>, Fault> {
        let (server, names) = (&self.server, &self.names);
        let mut counts: HashMap<Function, QueueDepth> = HashMap::new();
        let dead = server.subjects(&names.dead, &names.of(DEAD, None), usize::MAX).await?;
        for named in dead.iter().filter_map(|subject| named(subject)) {
            counts.entry(named.function).or_default().dead_letters += 1;
        }
        if server.messages(&names.calls).await? <= COUNTED {
            self.count_each(&mut counts).await?;
        } else {
            for (function, counted) in self.count_seldom().await? {
                let dead = counts.get(&function).map_or(0, |counts| counts.dead_letters);
                counts.insert(function, QueueDepth { dead_letters: dead, ..counted });
            }
        }
        let mut all: Vec<_> =
            counts.into_iter().filter(|(_, counts)| *counts != QueueDepth::default()).collect();
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    /// Counts the calls that are not over by looking at each.
    async fn count_each(&self, counts: &mut HashMap<Function, QueueDepth>) -> Result<(), Fault> {
        let names = &self.names;
        let runs = self.runs().await?;
        let (found, _) = self.read(&names.calls, &names.of(CALLS, None), usize::MAX).await?;
        let records = self.records(&found).await?;
        for waiting in found.into_iter().flat_map(|found| each(found, &records)) {
            let running = runs.contains_key(&waiting.place());
            let Waiting { named, message, .. } = waiting;
            let Ok(call) = message.call() else { continue };
            if message.is_taken_back() {
                continue;
            }
            let counted = counts.entry(named.function).or_default();
            if running {
                counted.running += 1;
            } else if message.due(&call) > now() {
                counted.delayed += 1;
            } else {
                counted.pending += 1;
                let submitted = call.options.submitted_at;
                counted.oldest = Some(counted.oldest.map_or(submitted, |it| it.min(submitted)));
            }
        }
        Ok(())
    }

    /// What their consumers and takers say. The more there are, the longer the server is busy with that, and the more
    /// seldom it is asked: it has nothing else to do for a hundredth of the time at most.
    async fn count_seldom(&self) -> Result<HashMap<Function, QueueDepth>, Fault> {
        if let Some(Counted { until, counts }) = &*self.counted()
            && *until > Instant::now()
        {
            return Ok(counts.clone());
        }
        let (start, mut counts) = (Instant::now(), HashMap::new());
        self.count_all(&mut counts).await?;
        let until = Instant::now() + start.elapsed() * 100;
        *self.counted() = Some(Counted { until, counts: counts.clone() });
        Ok(counts)
    }

    fn counted(&self) -> MutexGuard<'_, Option<Counted>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn count_all(&self, counts: &mut HashMap<Function, QueueDepth>) -> Result<(), Fault> {
        let (server, names) = (&self.server, &self.names);
        let lists = self.lists().await?;
        let sizes = self.sizes().await?;
        for consumer in server.consumers(&names.calls).await? {
            let Some(function) = consumed(&consumer.name) else { continue };
            let running = lists.iter().map(|list| list.count(&consumer.name));
            let (running, in_messages) =
                running.fold((0, 0), |(a, b), (calls, messages)| (a + calls, b + messages));
            // A list is written anew when there is time.
            let running = if consumer.given == 0 { 0 } else { running };
            let messages = consumer.pending + consumer.given;
            let oldest = match messages {
                0 => None,
                _ => server.next(&names.calls, &names.of(CALLS, Some(&function)), 1).await?,
            };
            let oldest = oldest.and_then(|found| each(found, &HashMap::new()).into_iter().next());
            let oldest = oldest.and_then(|it| it.message.call().ok());
            let (of_calls, of_messages) = sizes.get(&function).copied().unwrap_or((1, 1));
            let all = u128::from(messages) * u128::from(of_calls) / u128::from(of_messages);
            let counted = counts.entry(function).or_default();
            counted.running = running as u64;
            counted.delayed = consumer.given.saturating_sub(in_messages as u64);
            let others = counted.running + counted.delayed;
            counted.pending = u64::try_from(all).unwrap_or(u64::MAX).saturating_sub(others);
            counted.oldest = oldest.map(|call| call.options.submitted_at);
        }
        Ok(())
    }

    /// How many calls of each function are in how many messages; of a large queue in some of them.
    async fn sizes(&self) -> Result<HashMap<Function, (u64, u64)>, Fault> {
        let (server, names) = (&self.server, &self.names);
        let mut sizes: HashMap<Function, (u64, u64)> = HashMap::new();
        for subject in server.subjects(&names.calls, &names.of(CALLS, None), MOST).await? {
            let Some(named) = named(&subject) else { continue };
            let (calls, messages) = sizes.entry(named.function).or_default();
            *calls += subject::calls(&subject) as u64;
            *messages += 1;
        }
        Ok(sizes)
    }

    /// The records of those of the messages that have several calls.
    async fn records(&self, messages: &[StreamMessage]) -> Result<HashMap<Key, Record>, Fault> {
        let (server, names) = (&self.server, &self.names);
        let bundled = messages.iter().filter(|found| subject::key(&found.subject).is_some());
        let subjects = bundled.filter_map(|found| names.record_of(&found.subject));
        stream::iter(subjects.collect::<Vec<_>>())
            .map(|subject| async move { server.last(&names.open, &subject).await })
            .buffer_unordered(TOGETHER)
            .try_filter_map(|found| std::future::ready(Ok(found.and_then(record))))
            .try_collect()
            .await
    }
}

/// The order of two calls in a list. Calls of the same millisecond are in the order of their ids.
fn compare(order: Order, a: &CallRecord, b: &CallRecord) -> Ordering {
    let oldest_first = (a.submitted_at, &a.id).cmp(&(b.submitted_at, &b.id));
    match order {
        Order::OldestFirst => oldest_first,
        Order::NewestFirst => oldest_first.reverse(),
    }
}

/// A record, and whose it is.
fn record(found: StreamMessage) -> Option<(Key, Record)> {
    Some((subject::key(&found.subject)?, Record::decode(found.payload)?))
}

/// The calls in a message, but for those that `records` says more of.
fn each(found: StreamMessage, records: &HashMap<Key, Record>) -> Vec<Waiting> {
    match subject::key(&found.subject) {
        Some(key) => match Bundled::new(found) {
            Some(bundled) => bundled.open(records.get(&key)).collect(),
            None => Vec::new(),
        },
        None => Waiting::new(found).into_iter().collect(),
    }
}
