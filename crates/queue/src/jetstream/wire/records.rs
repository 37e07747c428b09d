//! The record of a batch: the outcomes of its calls. No I/O.
use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::jetstream::wire::batch::{put_prefixed, take_prefixed};
use crate::jetstream::wire::call_ref::BatchIndex;
use crate::jetstream::wire::final_record::{FinalRecord, ResponseHead};
use crate::jetstream::wire::ids::{BatchKey, MAX_KEY_CALLS};
use crate::status::{CallRecord, StoredResponse};

/// Responses up to this size are stored in the batch record.
const MAX_INLINE_RESPONSE_BYTES: usize = 1024;

/// Failure reasons are truncated to this length.
const MAX_REASON_CHARS: usize = 500;

/// Outcomes of the calls of one batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::jetstream) struct BatchRecord {
    /// Sequence of the batch.
    pub(in crate::jetstream) sequence: u64,
    outcomes: BTreeMap<BatchIndex, Outcome>,
}

/// Outcome of a call in a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::jetstream) enum Outcome {
    /// The call is finished: [`FinalRecord`] as JSON, and the body of its response if that is stored inline.
    Finished { end: Bytes, body: Bytes },
    /// The call is about to get its own message, or already has it.
    Splitting,
    /// The call got its own message, which may have been removed since.
    Split,
    /// The call was purged.
    Purged,
}

impl Outcome {
    /// Outcome of a finished call. The response is included if it fits inline.
    pub(in crate::jetstream) fn finished(
        sequence: u64,
        mut status: CallRecord,
        response: Option<&StoredResponse>,
    ) -> Self {
        status.reason = status.reason.map(|reason| reason.chars().take(MAX_REASON_CHARS).collect());
        let response = response.filter(|response| Self::fits_inline(response));
        let head = response.map(|response| ResponseHead::new(response, 0));
        let end = FinalRecord { sequence, status, response: head };
        Self::Finished {
            end: serde_json::to_vec(&end).unwrap_or_default().into(),
            body: response.map_or_else(Bytes::new, |response| response.body.clone()),
        }
    }

    /// Returns whether `response` is small enough to be stored in the record.
    pub(in crate::jetstream) fn fits_inline(response: &StoredResponse) -> bool {
        let headers: usize = response.headers.iter().map(|(n, v)| n.len() + v.len() + 8).sum();
        response.body.len() + headers <= MAX_INLINE_RESPONSE_BYTES
    }

    fn final_record(&self) -> Option<FinalRecord> {
        match self {
            Self::Finished { end, .. } => serde_json::from_slice(end).ok(),
            Self::Splitting | Self::Split | Self::Purged => None,
        }
    }
}

impl BatchRecord {
    pub(in crate::jetstream) fn new(sequence: u64) -> Self {
        Self { sequence, outcomes: BTreeMap::new() }
    }

    pub(in crate::jetstream) fn get(&self, index: BatchIndex) -> Option<&Outcome> {
        self.outcomes.get(&index)
    }

    /// Sets the outcome of a call. Returns `false` if a different outcome is already set.
    pub(in crate::jetstream) fn set_outcome(
        &mut self,
        index: BatchIndex,
        outcome: Outcome,
    ) -> bool {
        let before = self.outcomes.get(&index);
        let goes_on = before == Some(&Outcome::Splitting) && outcome == Outcome::Split;
        let is_new = before.is_none() || goes_on;
        if is_new {
            self.outcomes.insert(index, outcome);
        }
        is_new
    }

    /// Marks all calls that were being split out as split.
    pub(in crate::jetstream) fn mark_all_split(&mut self) {
        let splitting =
            self.outcomes.values_mut().filter(|outcome| **outcome == Outcome::Splitting);
        splitting.for_each(|outcome| *outcome = Outcome::Split);
    }

    /// Merges a later record of the same batch into this one.
    pub(in crate::jetstream) fn merge(&mut self, later: Self) {
        if later.sequence == self.sequence {
            self.outcomes.extend(later.outcomes);
        }
    }

    /// Removes the final state of a call.
    pub(in crate::jetstream) fn purge(&mut self, index: BatchIndex) {
        self.outcomes.insert(index, Outcome::Purged);
    }

    /// Returns whether no outcome of the batch `key` can change any more.
    pub(in crate::jetstream) fn is_final(&self, key: BatchKey) -> bool {
        self.is_complete(key)
            && !self.outcomes.values().any(|outcome| *outcome == Outcome::Splitting)
    }

    /// Returns whether every call of the batch `key` has an outcome.
    pub(in crate::jetstream) fn is_complete(&self, key: BatchKey) -> bool {
        let indexes = self.outcomes.keys().filter(|index| usize::from(**index) < key.count());
        indexes.count() == key.count()
    }

    /// Returns the number of calls with an outcome.
    pub(in crate::jetstream) fn outcome_count(&self) -> usize {
        self.outcomes.len()
    }

    /// Returns the final states of finished calls, with the bodies of inline responses.
    pub(in crate::jetstream) fn final_records(
        &self,
    ) -> impl Iterator<Item = (BatchIndex, FinalRecord, Bytes)> {
        self.outcomes.iter().filter_map(|(index, outcome)| match outcome {
            Outcome::Finished { body, .. } => Some((*index, outcome.final_record()?, body.clone())),
            Outcome::Splitting | Outcome::Split | Outcome::Purged => None,
        })
    }

    /// Encodes the record: for each call its index, a tag, and the data of the outcome.
    pub(in crate::jetstream) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(4096);
        bytes.put_u64(self.sequence);
        for (index, outcome) in &self.outcomes {
            bytes.put_u8(*index);
            match outcome {
                Outcome::Purged => bytes.put_u8(TAG_PURGED),
                Outcome::Splitting => bytes.put_u8(TAG_SPLITTING),
                Outcome::Split => bytes.put_u8(TAG_SPLIT),
                Outcome::Finished { end, body } => {
                    bytes.put_u8(TAG_FINISHED);
                    put_prefixed(&mut bytes, end);
                    put_prefixed(&mut bytes, body);
                }
            }
        }
        bytes.freeze()
    }

    /// Returns the sequence of the batch of an encoded record, even if the rest cannot be decoded.
    pub(in crate::jetstream) fn decode_sequence(mut bytes: &[u8]) -> Option<u64> {
        bytes.try_get_u64().ok()
    }

    /// Decodes a record. Returns `None` for a truncated record or one with unknown tags, which a newer version has
    /// written.
    pub(in crate::jetstream) fn decode(mut bytes: Bytes) -> Option<Self> {
        let mut record = Self::new(bytes.try_get_u64().ok()?);
        while let Ok(index) = bytes.try_get_u8() {
            let outcome = match bytes.try_get_u8().ok()? {
                TAG_PURGED => Outcome::Purged,
                TAG_SPLITTING => Outcome::Splitting,
                TAG_SPLIT => Outcome::Split,
                TAG_FINISHED => Outcome::Finished {
                    end: take_prefixed(&mut bytes)?,
                    body: take_prefixed(&mut bytes)?,
                },
                _ => return None,
            };
            if usize::from(index) < MAX_KEY_CALLS {
                record.outcomes.insert(index, outcome);
            }
        }
        Some(record)
    }
}

const TAG_PURGED: u8 = 0;

const TAG_SPLITTING: u8 = 1;

const TAG_FINISHED: u8 = 2;

const TAG_SPLIT: u8 = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::wire::batch::tests::calls;
    use crate::jetstream::wire::ids::BatchKeys;
    use crate::status::CallState;

    #[test]
    fn an_outcome_is_recorded_once() {
        let key = BatchKeys::new().next(3, 1);
        let status = CallRecord { state: CallState::Failed, ..CallRecord::queued(&calls(key)[0]) };
        let response = StoredResponse {
            status: 500,
            headers: Vec::new(),
            body: Bytes::from_static(b"no"),
            truncated: false,
        };
        let mut record = BatchRecord::new(7);
        assert!(record.set_outcome(1, Outcome::finished(7, status.clone(), Some(&response))));
        assert!(
            record.set_outcome(2, Outcome::Splitting) && !record.set_outcome(1, Outcome::Splitting)
        );
        assert!(!record.is_complete(key));
        assert!(record.set_outcome(0, Outcome::Purged) && record.is_complete(key));
        assert_eq!(BatchRecord::decode(record.encode()), Some(record.clone()));
        assert!(!record.is_final(key));
        let mut later = BatchRecord::new(7);
        later.set_outcome(2, Outcome::Purged);
        let mut both = record.clone();
        both.merge(later);
        assert!(both.is_final(key) && both.get(0) == Some(&Outcome::Purged));
        assert!(record.set_outcome(2, Outcome::Split) && record.is_final(key));
        assert!(
            !record.set_outcome(2, Outcome::Splitting) && !record.set_outcome(0, Outcome::Split)
        );
        assert_eq!(BatchRecord::decode(record.encode()), Some(record.clone()));
        let (index, end, body) = record.final_records().next().unwrap();
        assert_eq!((index, end.status, &body[..]), (1, status, &b"no"[..]));
        record.purge(1);
        assert_eq!(record.final_records().count(), 0);
    }

    #[test]
    fn an_invalid_record_is_rejected() {
        let mut record = BatchRecord::new(7);
        record.set_outcome(
            1,
            Outcome::Finished { end: Bytes::from_static(b"{}"), body: Bytes::new() },
        );
        let whole = record.encode();
        for length in (0..8).chain(9..whole.len()) {
            assert_eq!(BatchRecord::decode(whole.slice(..length)), None, "{length}");
        }
        let later = [&whole[..8], &[3, 9]].concat();
        assert_eq!(BatchRecord::decode(later.into()), None);
    }
}
