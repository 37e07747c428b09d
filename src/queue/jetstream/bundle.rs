//! Several calls in one message, and the record of which of them are over. No I/O.
//!
//! Calls of a function that come at the same time are stored together: what a message costs the server hardly depends on
//! its size. A call of them is known by its place among them, its slot.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::function::Function;
use crate::queue::call::{DecodeError, QueuedCall};
use crate::queue::jetstream::ids::{Key, MOST};
use crate::queue::jetstream::message::{AnswerHead, End};
use crate::queue::status::{CallRecord, StoredResponse};

/// So many calls go together at most: fewer than a worker makes at a time, for it is best if all of them are over before
/// that is noted.
pub(super) const TOGETHER: usize = 32;
/// Calls with larger bodies go alone.
pub(super) const LONGEST: usize = 8 << 10;
/// So many bytes of calls are together, about.
pub(super) const LARGEST: usize = 128 << 10;
/// An answer that is no larger is stored in the record.
const SMALL: usize = 1024;
/// Reasons are cut here.
const REASON: usize = 500;
/// A server that takes no messages of this size gets no calls together: their record must have room for all of them.
pub(super) const ROOM: usize = 512 << 10;

/// The call's place in its message.
pub(super) type Slot = u8;

/// A message, and which of the calls in it is meant, where it has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) sequence: u64,
    pub(super) slot: Option<Slot>,
}

impl Place {
    /// That of a call alone.
    pub(super) fn alone(sequence: u64) -> Self {
        Self { sequence, slot: None }
    }

    pub(super) fn among(sequence: u64, slot: Slot) -> Self {
        Self { sequence, slot: Some(slot) }
    }
}

/// As a token of a subject.
impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.slot {
            Some(slot) => write!(f, "{}-{slot}", self.sequence),
            None => write!(f, "{}", self.sequence),
        }
    }
}

/// What is stored of `calls`.
pub(super) fn encode(calls: &[QueuedCall]) -> Bytes {
    let encoded: Vec<Bytes> = calls.iter().map(QueuedCall::encode).collect();
    let length = encoded.iter().map(|call| 4 + call.len()).sum();
    let mut bytes = BytesMut::with_capacity(length);
    for call in encoded {
        put(&mut bytes, &call);
    }
    bytes.freeze()
}

/// The calls that `payload` holds, which are those of `function` under `key`.
///
/// # Errors
/// When it holds anything else.
pub(super) fn decode(
    mut payload: Bytes,
    function: &Function,
    key: Key,
) -> Result<Vec<QueuedCall>, DecodeError> {
    let mut calls = Vec::with_capacity(key.count());
    while payload.has_remaining() {
        let call = QueuedCall::decode(&piece(&mut payload).ok_or(DecodeError::Truncated)?)?;
        if call.function != *function || Key::of(&call.id) != Some(key) {
            return Err(DecodeError::InvalidField);
        }
        calls.push(call);
    }
    if calls.len() == key.count() { Ok(calls) } else { Err(DecodeError::Truncated) }
}

/// Which of the calls in a message are over, or somewhere else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// The number of their message.
    pub(super) sequence: u64,
    closed: BTreeMap<Slot, Closed>,
}

/// What has become of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Closed {
    /// It is over: [`End`] as JSON, and the body of its answer, if that is in it.
    Ended { end: Bytes, body: Bytes },
    /// It is about to be in a message of its own, or is in one.
    Moved,
    /// It has been in one, whatever has become of it.
    Placed,
    /// It was purged.
    Gone,
}

impl Closed {
    /// A final state, with an answer if there is one that is small.
    pub(super) fn ended(
        sequence: u64,
        mut status: CallRecord,
        answer: Option<&StoredResponse>,
    ) -> Self {
        status.reason = status.reason.map(|reason| reason.chars().take(REASON).collect());
        let answer = answer.filter(|answer| Self::holds(answer));
        let head = answer.map(|answer| AnswerHead::of(answer, 0));
        let end = End { sequence, status, answer: head };
        Self::Ended {
            end: serde_json::to_vec(&end).unwrap_or_default().into(),
            body: answer.map_or_else(Bytes::new, |answer| answer.body.clone()),
        }
    }

    /// Whether `answer` is small.
    pub(super) fn holds(answer: &StoredResponse) -> bool {
        let headers: usize = answer.headers.iter().map(|(n, v)| n.len() + v.len() + 8).sum();
        answer.body.len() + headers <= SMALL
    }

    fn end(&self) -> Option<End> {
        match self {
            Self::Ended { end, .. } => serde_json::from_slice(end).ok(),
            Self::Moved | Self::Placed | Self::Gone => None,
        }
    }
}

impl Record {
    pub(super) fn of(sequence: u64) -> Self {
        Self { sequence, closed: BTreeMap::new() }
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&Closed> {
        self.closed.get(&slot)
    }

    /// Notes what has become of a call; `false` if something is noted of it already.
    pub(super) fn close(&mut self, slot: Slot, closed: Closed) -> bool {
        let before = self.closed.get(&slot);
        let goes_on = before == Some(&Closed::Moved) && closed == Closed::Placed;
        let is_new = before.is_none() || goes_on;
        if is_new {
            self.closed.insert(slot, closed);
        }
        is_new
    }

    /// All that were to be in messages of their own are.
    pub(super) fn all_placed(&mut self) {
        let moved = self.closed.values_mut().filter(|closed| **closed == Closed::Moved);
        moved.for_each(|closed| *closed = Closed::Placed);
    }

    /// Adds what another record of the same message says, which was written later.
    pub(super) fn add(&mut self, later: Self) {
        if later.sequence == self.sequence {
            self.closed.extend(later.closed);
        }
    }

    /// Forgets the final state of a call.
    pub(super) fn purge(&mut self, slot: Slot) {
        self.closed.insert(slot, Closed::Gone);
    }

    /// Whether nothing more can become of any of the calls under `key`.
    pub(super) fn is_final(&self, key: Key) -> bool {
        self.is_whole(key) && !self.closed.values().any(|closed| *closed == Closed::Moved)
    }

    /// Whether something is noted of all calls under `key`.
    pub(super) fn is_whole(&self, key: Key) -> bool {
        let slots = self.closed.keys().filter(|slot| usize::from(**slot) < key.count());
        slots.count() == key.count()
    }

    /// Of how many calls that is noted.
    pub(super) fn closed(&self) -> usize {
        self.closed.len()
    }

    /// The final states of those that are over, with the bodies of small answers.
    pub(super) fn ends(&self) -> impl Iterator<Item = (Slot, End, Bytes)> {
        self.closed.iter().filter_map(|(slot, closed)| match closed {
            Closed::Ended { body, .. } => Some((*slot, closed.end()?, body.clone())),
            Closed::Moved | Closed::Placed | Closed::Gone => None,
        })
    }

    /// Slot, kind, and what belongs to it, one after the other.
    pub(super) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(4096);
        bytes.put_u64(self.sequence);
        for (slot, closed) in &self.closed {
            bytes.put_u8(*slot);
            match closed {
                Closed::Gone => bytes.put_u8(GONE),
                Closed::Moved => bytes.put_u8(MOVED),
                Closed::Placed => bytes.put_u8(PLACED),
                Closed::Ended { end, body } => {
                    bytes.put_u8(ENDED);
                    put(&mut bytes, end);
                    put(&mut bytes, body);
                }
            }
        }
        bytes.freeze()
    }

    /// The record that was written so; `None` if it was written by somebody who knows more kinds.
    pub(super) fn decode(mut bytes: Bytes) -> Option<Self> {
        let mut record = Self::of(bytes.try_get_u64().ok()?);
        while let Ok(slot) = bytes.try_get_u8() {
            let closed = match bytes.try_get_u8().ok()? {
                GONE => Closed::Gone,
                MOVED => Closed::Moved,
                PLACED => Closed::Placed,
                ENDED => Closed::Ended { end: piece(&mut bytes)?, body: piece(&mut bytes)? },
                _ => return None,
            };
            if usize::from(slot) < MOST {
                record.closed.insert(slot, closed);
            }
        }
        Some(record)
    }
}

const GONE: u8 = 0;
const MOVED: u8 = 1;
const ENDED: u8 = 2;
const PLACED: u8 = 3;

fn put(bytes: &mut BytesMut, piece: &[u8]) {
    bytes.put_u32(u32::try_from(piece.len()).unwrap_or(u32::MAX));
    bytes.put_slice(piece);
}

fn piece(bytes: &mut Bytes) -> Option<Bytes> {
    let length = bytes.try_get_u32().ok()? as usize;
    (length <= bytes.len()).then(|| bytes.split_to(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::call::CallOptions;
    use crate::queue::jetstream::ids::Keys;
    use crate::queue::status::CallState;

    fn calls(key: Key) -> Vec<QueuedCall> {
        let function = Function { name: "echo".to_owned(), namespace: "fn".to_owned() };
        let call = |body: &'static str| QueuedCall {
            id: key.id(&function),
            function: function.clone(),
            target: String::new(),
            headers: http::HeaderMap::new(),
            body: Bytes::from_static(body.as_bytes()),
            options: CallOptions::default(),
        };
        ["a", "", "c"].map(call).to_vec()
    }

    #[test]
    fn calls_come_out_as_they_went_in() {
        let key = Keys::new().next(3, 1);
        let calls = calls(key);
        let (payload, function) = (encode(&calls), &calls[0].function);
        assert_eq!(decode(payload.clone(), function, key).unwrap(), calls);
        let other = Function { name: "other".to_owned(), ..function.clone() };
        assert!(decode(payload.clone(), &other, key).is_err());
        assert!(decode(payload.clone(), function, Keys::new().next(3, 2)).is_err());
        for length in 0..payload.len() {
            assert!(decode(payload.slice(..length), function, key).is_err(), "{length}");
        }
    }

    #[test]
    fn a_record_says_once_what_became_of_a_call() {
        let key = Keys::new().next(3, 1);
        let status = CallRecord { state: CallState::Failed, ..CallRecord::queued(&calls(key)[0]) };
        let answer = StoredResponse {
            status: 500,
            headers: Vec::new(),
            body: Bytes::from_static(b"no"),
            truncated: false,
        };
        let mut record = Record::of(7);
        assert!(record.close(1, Closed::ended(7, status.clone(), Some(&answer))));
        assert!(record.close(2, Closed::Moved) && !record.close(1, Closed::Moved));
        assert!(!record.is_whole(key));
        assert!(record.close(0, Closed::Gone) && record.is_whole(key));
        assert_eq!(Record::decode(record.encode()), Some(record.clone()));
        assert!(!record.is_final(key));
        let mut later = Record::of(7);
        later.close(2, Closed::Gone);
        let mut both = record.clone();
        both.add(later);
        assert!(both.is_final(key) && both.get(0) == Some(&Closed::Gone));
        assert!(record.close(2, Closed::Placed) && record.is_final(key));
        assert!(!record.close(2, Closed::Moved) && !record.close(0, Closed::Placed));
        assert_eq!(Record::decode(record.encode()), Some(record.clone()));
        let (slot, end, body) = record.ends().next().unwrap();
        assert_eq!((slot, end.status, &body[..]), (1, status, &b"no"[..]));
        record.purge(1);
        assert_eq!(record.ends().count(), 0);
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let mut record = Record::of(7);
        record.close(1, Closed::Ended { end: Bytes::from_static(b"{}"), body: Bytes::new() });
        let whole = record.encode();
        for length in (0..8).chain(9..whole.len()) {
            assert_eq!(Record::decode(whole.slice(..length)), None, "{length}");
        }
        let later = [&whole[..8], &[3, 9]].concat();
        assert_eq!(Record::decode(later.into()), None);
    }

    #[test]
    fn a_place_is_one_token() {
        assert_eq!(Place::alone(12).to_string(), "12");
        assert_eq!(Place::among(12, 3).to_string(), "12-3");
    }
}
