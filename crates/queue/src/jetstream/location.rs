//! Where a call was found. No I/O.
use async_nats::jetstream::message::StreamMessage;
use bytes::Bytes;

use crate::call::UnixMillis;
use crate::jetstream::wire::call_ref::{BatchIndex, BatchRef, CallRef};
use crate::jetstream::wire::final_record::FinalRecord;
use crate::jetstream::wire::message::Message;
use crate::jetstream::wire::subjects::{self, CALLS, CallSubject, Subjects, parse};
use crate::status::CallRecord;
use gateway_base::function::Function;

/// Location of a call.
pub(super) enum CallLocation {
    /// The call is unfinished.
    Pending(Pending),
    DeadLetter(DeadLetter),
    Finished(Finished),
}

/// A finished call.
pub(super) struct Finished {
    pub(super) final_record: FinalRecord,
    /// Body of the response, if it is stored with the final state.
    pub(super) body: Bytes,
    /// The batch in which the call was published, and its index there.
    pub(super) in_batch: Option<(BatchRef, BatchIndex)>,
}

/// An unfinished call.
pub(super) struct Pending {
    pub(super) subject: CallSubject,
    pub(super) sequence: u64,
    pub(super) message: Message,
    /// Time of the claim, if the call is claimed.
    pub(super) claimed_at: Option<UnixMillis>,
    /// The batch that contains the call, and its index there.
    pub(super) in_batch: Option<(BatchRef, BatchIndex)>,
}

/// A call that failed for good.
pub(super) struct DeadLetter {
    pub(super) status: CallRecord,
    pub(super) message: Message,
    pub(super) sequence: u64,
    /// Sequence of the original message of the call.
    pub(super) previous_seq: u64,
}

impl CallLocation {
    /// Returns the stored state of the call.
    pub(super) fn status(&self) -> Option<CallRecord> {
        match self {
            Self::Pending(pending) => pending.status(None),
            Self::DeadLetter(dead) => Some(dead.status.clone()),
            Self::Finished(finished) => Some(finished.final_record.status.clone()),
        }
    }
}

impl Pending {
    /// Returns `None` if the message is not that of a single call.
    pub(super) fn new(found: StreamMessage) -> Option<Self> {
        if subjects::batch_key(&found.subject).is_some() {
            return None;
        }
        let message = Message::from_stored(found.headers, found.payload);
        let (call_subject, sequence) = (parse(&found.subject)?, found.sequence);
        Some(Self { subject: call_subject, sequence, message, claimed_at: None, in_batch: None })
    }

    pub(super) fn index(&self) -> Option<BatchIndex> {
        self.in_batch.as_ref().map(|(_, index)| *index)
    }

    pub(super) fn call_ref(&self) -> CallRef {
        CallRef { sequence: self.sequence, index: self.index() }
    }

    /// Returns the state of the call; running if it was claimed at `claimed_at`.
    pub(super) fn status(&self, claimed_at: Option<UnixMillis>) -> Option<CallRecord> {
        match claimed_at {
            Some(claimed_at) => {
                Some(self.message.running_status(&self.message.call().ok()?, claimed_at))
            }
            None => self.message.status(),
        }
    }
}

impl DeadLetter {
    pub(super) fn new(found: StreamMessage) -> Option<Self> {
        let message = Message::from_stored(found.headers, found.payload);
        let (status, previous_seq) =
            (message.stored_status()?, message.previous_seq().unwrap_or(0));
        Some(Self { status, message, sequence: found.sequence, previous_seq })
    }

    /// Returns the subject on which the message is published again.
    pub(super) fn call_subject(&self, subjects: &Subjects, function: &Function) -> String {
        match self.message.raw_subject() {
            // Other programs can write dead letters, too.
            Some(subject) if subjects.is_message_of(function, subject) => subject.to_owned(),
            _ => subjects.call(CALLS, function, &self.status.id),
        }
    }
}
