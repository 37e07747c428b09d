//! A model of the server: streams with one message per subject, revision checks, and one consumer with leases.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::jetstream::wire::call_ref::CallRef;
use crate::jetstream::wire::claims::{CANCEL_MARKER_TTL, RunningList};
use crate::jetstream::wire::ids::BatchKey;
use crate::status::CallState;

/// Ack timeout of the consumer.
pub(super) const LEASE: Duration = Duration::from_secs(6);

/// Number of a call.
pub(super) type CallId = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    Call(CallId),
    Batch(BatchKey),
    DeadLetter(CallId),
    FinalRecord(CallId),
    Archive(BatchKey),
    Record(BatchKey),
    List(usize),
    Marker(CallRef),
}

#[derive(Clone, Debug)]
pub(super) enum Payload {
    /// A call with the time at which it is due.
    Call {
        due: Instant,
    },
    Tombstone,
    Batch(Vec<CallId>),
    DeadLetter {
        previous_seq: u64,
    },
    FinalRecord {
        sequence: u64,
        state: CallState,
    },
    Record(Bytes),
    List(RunningList),
    Marker,
}

#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) sequence: u64,
    pub(super) payload: Payload,
    at: Instant,
}

/// The expected last sequence was wrong, or no response arrived: then the write may have succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Conflict,
    Unavailable,
}

/// A message that the consumer has delivered.
#[derive(Clone, Debug)]
pub(super) struct Delivered {
    pub(super) subject: Subject,
    pub(super) payload: Payload,
    pub(super) sequence: u64,
    pub(super) deliveries: u32,
    /// Another process still holds the message, but has not extended its lease.
    pub(super) lease_lost: bool,
}

/// A message of the consumer.
#[derive(Clone, Copy)]
struct Delivery {
    count: u32,
    /// Time of the next delivery.
    next: Instant,
    /// The process to which the message was delivered, unless that has returned it or has died.
    holder: Option<usize>,
}

/// All streams in one: a sequence is unique, and the subject tells the stream. Only claims need their own sequence.
#[derive(Default)]
pub(super) struct Server {
    last: u64,
    last_claim: u64,
    messages: BTreeMap<Subject, Stored>,
    deliveries: BTreeMap<u64, Delivery>,
    /// Calls whose final record was replaced by one with another state.
    pub(super) changed: BTreeSet<CallId>,
}

fn is_queued(subject: Subject) -> bool {
    matches!(subject, Subject::Call(_) | Subject::Batch(_))
}

fn is_claim(subject: Subject) -> bool {
    matches!(subject, Subject::List(_) | Subject::Marker(_))
}

impl Server {
    /// Returns the last message of a subject. Messages about claims expire.
    pub(super) fn get(&self, subject: Subject, now: Instant) -> Option<&Stored> {
        let max_age = LEASE * 2 + CANCEL_MARKER_TTL;
        self.messages.get(&subject).filter(|stored| !is_claim(subject) || now - stored.at < max_age)
    }

    /// Stores a message that replaces the last one of its subject.
    pub(super) fn publish(
        &mut self,
        subject: Subject,
        payload: Payload,
        expected: Option<u64>,
        now: Instant,
    ) -> Result<u64, Fault> {
        let last = self.get(subject, now).map_or(0, |stored| stored.sequence);
        if expected.is_some_and(|expected| expected != last) {
            return Err(Fault::Conflict);
        }
        if let (Subject::FinalRecord(call), Payload::FinalRecord { state, .. }) =
            (subject, &payload)
            && let Some(Stored { payload: Payload::FinalRecord { state: before, .. }, .. }) =
                self.get(subject, now)
            && before != state
        {
            self.changed.insert(call);
        }
        let counter = if is_claim(subject) { &mut self.last_claim } else { &mut self.last };
        *counter += 1;
        let sequence = *counter;
        if let Some(replaced) = self.messages.insert(subject, Stored { sequence, payload, at: now })
            && matches!(subject, Subject::Call(_) | Subject::Batch(_))
        {
            self.deliveries.remove(&replaced.sequence);
        }
        if matches!(subject, Subject::Call(_) | Subject::Batch(_)) {
            self.deliveries.insert(sequence, Delivery { count: 0, next: now, holder: None });
        }
        Ok(sequence)
    }

    /// Removes the message `sequence` of a subject.
    pub(super) fn delete(&mut self, subject: Subject, sequence: u64) {
        if self.messages.get(&subject).is_some_and(|stored| stored.sequence == sequence) {
            self.messages.remove(&subject);
            if is_queued(subject) {
                self.deliveries.remove(&sequence);
            }
        }
    }

    /// Returns the sequence of the latest cancel marker.
    pub(super) fn latest_marker(&self, now: Instant) -> Option<u64> {
        let markers = self.messages.keys().filter(|subject| matches!(subject, Subject::Marker(_)));
        markers.filter_map(|subject| Some(self.get(*subject, now)?.sequence)).max()
    }

    /// Returns the subjects of all running lists.
    pub(super) fn lists(&self, now: Instant) -> Vec<Subject> {
        let lists = self.messages.keys().filter(|subject| matches!(subject, Subject::List(_)));
        lists.copied().filter(|subject| self.get(*subject, now).is_some()).collect()
    }

    /// Returns the keys of all stored records of batches.
    pub(super) fn records(&self) -> BTreeSet<BatchKey> {
        let keys = self.messages.keys().filter_map(|subject| match subject {
            Subject::Record(key) => Some(*key),
            _ => None,
        });
        keys.collect()
    }

    /// Returns the subjects of all messages of calls and batches.
    pub(super) fn queued(&self) -> Vec<Subject> {
        let queued = self
            .messages
            .keys()
            .filter(|subject| matches!(subject, Subject::Call(_) | Subject::Batch(_)));
        queued.copied().collect()
    }

    /// Delivers a message that waits, if there is one. `pick` chooses among them.
    pub(super) fn deliver(
        &mut self,
        now: Instant,
        holder: usize,
        pick: impl FnOnce(usize) -> usize,
    ) -> Option<Delivered> {
        let waiting: Vec<u64> = self
            .deliveries
            .iter()
            .filter(|(_, delivery)| delivery.next <= now)
            .map(|(sequence, _)| *sequence)
            .collect();
        if waiting.is_empty() {
            return None;
        }
        let sequence = waiting[pick(waiting.len())];
        let delivery = self.deliveries.get_mut(&sequence)?;
        let lease_lost = delivery.holder.is_some();
        let count = delivery.count + 1;
        *delivery = Delivery { count, next: now + LEASE, holder: Some(holder) };
        let deliveries = delivery.count;
        let (subject, stored) = self
            .messages
            .iter()
            .find(|(subject, stored)| is_queued(**subject) && stored.sequence == sequence)?;
        let (subject, payload) = (*subject, stored.payload.clone());
        Some(Delivered { subject, payload, sequence, deliveries, lease_lost })
    }

    /// Acknowledges a message, which removes it.
    pub(super) fn ack(&mut self, sequence: u64) {
        self.deliveries.remove(&sequence);
        self.messages.retain(|subject, stored| {
            !matches!(subject, Subject::Call(_) | Subject::Batch(_)) || stored.sequence != sequence
        });
    }

    /// Returns a message, which is delivered again after `delay`.
    pub(super) fn nak(&mut self, sequence: u64, delay: Duration, now: Instant) {
        if let Some(delivery) = self.deliveries.get_mut(&sequence) {
            (delivery.next, delivery.holder) = (now + delay, None);
        }
    }

    /// Handles the death of a process. Its messages are delivered again when their leases expire.
    pub(super) fn forget_holder(&mut self, process: usize) {
        let held = self.deliveries.values_mut().filter(|delivery| delivery.holder == Some(process));
        held.for_each(|delivery| delivery.holder = None);
    }

    /// Extends the lease of a message.
    pub(super) fn in_progress(&mut self, sequence: u64, now: Instant) {
        if let Some(delivery) = self.deliveries.get_mut(&sequence)
            && delivery.holder.is_some()
        {
            delivery.next = now + LEASE;
        }
    }
}
