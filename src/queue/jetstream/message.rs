//! What is stored on the server, and how it is read again. No I/O.

use std::collections::{BTreeMap, BTreeSet};

use async_nats::HeaderMap;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::queue::call::{DecodeError, Envelope, QueuedCall, UnixMillis};
use crate::queue::jetstream::bundle::Place;
use crate::queue::status::{CallRecord, CallState, StoredResponse};

/// All of a call but its body.
const CALL: &str = "Gateway-Call";
/// Raised when an older gateway could not make the call rightly.
const VERSION_NAME: &str = "Gateway-Version";
const VERSION: u8 = 1;
/// That of a message with several calls.
const VERSION_TOGETHER: u8 = 2;
/// [`CallRecord`] of a call that has been made before, or that is dead.
const PROGRESS: &str = "Gateway-Progress";
/// [`Parts`], when the body is not in the message.
const BODY: &str = "Gateway-Body";
/// Of a dead call: the number of the message that it was.
const WAS: &str = "Gateway-Was";
/// Of a call that was dead and is tried again: the number of the message that says so.
const REVIVED: &str = "Gateway-Revived";
/// The server knows a repeated message by this header.
const MESSAGE_ID: &str = "Nats-Msg-Id";
/// [`End`].
const END: &str = "Gateway-End";
/// The first part of an answer says what it is.
const ANSWER: &str = "Gateway-Answer";
/// Reasons are cut here, so that a call does not outgrow its message.
const REASON: usize = 1000;

/// Where a body is that is not in its message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) count: usize,
}

/// A call's message.
#[derive(Clone, Debug)]
pub(super) struct Message {
    headers: HeaderMap,
    pub(super) body: Bytes,
}

/// The calls that somebody makes at this moment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct List {
    /// By the names of consumers: the number of each call's message, and since when it is made.
    pub(super) calls: BTreeMap<String, Vec<(u64, UnixMillis)>>,
    /// The same of calls in messages with several: which ones, as the bits of their slots.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) together: BTreeMap<String, Vec<(u64, UnixMillis, u64)>>,
}

impl List {
    /// Adds calls of a consumer, all of which are made since then.
    pub(super) fn add(&mut self, consumer: &str, place: Place, since: UnixMillis) {
        match place.slot {
            None => {
                let calls = self.calls.entry(consumer.to_owned()).or_default();
                calls.push((place.sequence, since));
            }
            Some(slot) => {
                let groups = self.together.entry(consumer.to_owned()).or_default();
                let bit = 1_u64.checked_shl(slot.into()).unwrap_or_default();
                let ours = groups.iter_mut().find(|it| (it.0, it.1) == (place.sequence, since));
                match ours {
                    Some((.., bits)) => *bits |= bit,
                    None => groups.push((place.sequence, since, bit)),
                }
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.calls.is_empty() && self.together.is_empty()
    }

    /// All of them, and since when they are made.
    pub(super) fn places(&self) -> impl Iterator<Item = (Place, UnixMillis)> {
        let alone = self.calls.values().flatten();
        let alone = alone.map(|(sequence, since)| (Place::alone(*sequence), *since));
        let among = self.together.values().flatten().flat_map(|(sequence, since, bits)| {
            let slots = (0..64).filter(move |slot| bits >> slot & 1 == 1);
            slots.map(|slot| (Place::among(*sequence, slot), *since))
        });
        alone.chain(among)
    }

    /// How many calls of a consumer are on it, and in how many messages.
    pub(super) fn count(&self, consumer: &str) -> (usize, usize) {
        let alone = self.calls.get(consumer).map_or(0, Vec::len);
        let groups = self.together.get(consumer).map_or(&[][..], Vec::as_slice);
        let among: u32 = groups.iter().map(|(.., bits)| bits.count_ones()).sum();
        let messages: BTreeSet<u64> = groups.iter().map(|(sequence, ..)| *sequence).collect();
        (alone + among as usize, alone + messages.len())
    }
}

/// The final state of a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct End {
    /// The number of the message that the call was.
    pub(super) sequence: u64,
    pub(super) status: CallRecord,
    /// The head of the answer whose body is this message's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) answer: Option<AnswerHead>,
}

/// The head of a stored answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct AnswerHead {
    status: u16,
    headers: Vec<(String, String)>,
    #[serde(default)]
    truncated: bool,
    pub(super) parts: usize,
}

impl Message {
    /// The message of a call that was not made yet.
    pub(super) fn new(call: &QueuedCall) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(VERSION_NAME, VERSION.to_string());
        headers.insert(CALL, json(&call.envelope()).as_str());
        Self { headers, body: call.body.clone() }
    }

    pub(super) fn stored(headers: HeaderMap, body: Bytes) -> Self {
        Self { headers, body }
    }

    /// The headers, with an id by which the server knows a second one.
    pub(super) fn named(&self, id: &str) -> HeaderMap {
        let mut headers = self.headers.clone();
        headers.insert(MESSAGE_ID, id);
        headers
    }

    /// The same call with its body elsewhere.
    #[must_use]
    pub(super) fn with_parts(mut self, parts: &Parts) -> Self {
        self.headers.insert(BODY, json(parts).as_str());
        self.body = Bytes::new();
        self
    }

    /// The same call after it was made, and was the message `was` then.
    pub(super) fn progressed(&self, status: &CallRecord, was: u64) -> HeaderMap {
        let mut status = status.clone();
        status.reason = status.reason.map(|reason| reason.chars().take(REASON).collect());
        let mut headers = self.fresh();
        headers.insert(PROGRESS, json(&status).as_str());
        headers.insert(WAS, was.to_string());
        if let Some(number) = self.headers.get(REVIVED) {
            headers.insert(REVIVED, number.clone());
        }
        headers
    }

    /// The same call, which was dead, once more from the beginning. `number` is that of the message of the dead call.
    pub(super) fn revived(&self, number: u64) -> HeaderMap {
        let mut headers = self.fresh();
        headers.insert(REVIVED, number.to_string());
        headers
    }

    /// The message to remove when the call is over, should it be there still.
    pub(super) fn dead_before(&self) -> Option<u64> {
        self.headers.get(REVIVED)?.as_str().parse().ok()
    }

    /// What is left of a call that is taken back: it is not made, whoever is given it.
    pub(super) fn taken_back(&self, status: &CallRecord, was: u64) -> HeaderMap {
        let mut headers = self.progressed(status, was);
        headers.insert(BODY, "");
        headers
    }

    /// Whether its call is taken back, and not to be made.
    pub(super) fn is_taken_back(&self) -> bool {
        self.progress().is_some_and(|status| status.state == CallState::Cancelled)
    }

    /// The same call as if it had never been made.
    pub(super) fn fresh(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for name in [VERSION_NAME, CALL, BODY] {
            if let Some(value) = self.headers.get(name) {
                headers.insert(name, value.clone());
            }
        }
        headers
    }

    /// How large the headers are, nearly.
    pub(super) fn head(&self) -> usize {
        self.headers.get(CALL).map_or(0, |meta| meta.as_str().len()) + 512
    }

    pub(super) fn parts(&self) -> Option<Parts> {
        serde_json::from_str(self.headers.get(BODY)?.as_str()).ok()
    }

    pub(super) fn progress(&self) -> Option<CallRecord> {
        serde_json::from_str(self.headers.get(PROGRESS)?.as_str()).ok()
    }

    /// Of a dead call: the number of the message that it was.
    pub(super) fn was(&self) -> Option<u64> {
        self.headers.get(WAS)?.as_str().parse().ok()
    }

    /// The call, with what is in the message as its body.
    ///
    /// # Errors
    /// When the message holds none, or one of a version to come.
    pub(super) fn call(&self) -> Result<QueuedCall, DecodeError> {
        must_be(&self.headers, VERSION)?;
        let meta = self.headers.get(CALL).ok_or(DecodeError::Truncated)?;
        let meta: Envelope<'_> = serde_json::from_str(meta.as_str())?;
        QueuedCall::from_envelope(meta, self.body.clone())
    }

    /// The state of the call while nobody makes it.
    pub(super) fn status(&self) -> Option<CallRecord> {
        self.progress().or_else(|| self.call().ok().map(|call| CallRecord::queued(&call)))
    }

    /// The state of `call` while it is made.
    pub(super) fn running(&self, call: &QueuedCall, since: UnixMillis) -> CallRecord {
        let (attempts, status) =
            self.progress().map_or((0, None), |known| (known.attempts, known.status));
        CallRecord {
            state: CallState::Running,
            attempts: attempts + 1,
            status,
            started_at: Some(since),
            ..CallRecord::queued(call)
        }
    }

    /// When the call can be made, at the earliest.
    pub(super) fn due(&self, call: &QueuedCall) -> UnixMillis {
        match self.progress() {
            Some(CallRecord { state: CallState::Cancelled, .. }) => 0,
            Some(CallRecord { next_attempt_at: Some(again), .. }) => again,
            _ => call.options.not_before.unwrap_or(0),
        }
    }
}

/// Those of a message with several calls.
pub(super) fn together_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(VERSION_NAME, VERSION_TOGETHER.to_string());
    headers
}

/// Whether a message with several calls is of the version that is known here.
///
/// # Errors
/// When it is not.
pub(super) fn together_version(headers: Option<&HeaderMap>) -> Result<(), DecodeError> {
    must_be(headers.ok_or(DecodeError::Truncated)?, VERSION_TOGETHER)
}

fn must_be(headers: &HeaderMap, known: u8) -> Result<(), DecodeError> {
    let version = headers.get(VERSION_NAME).and_then(|it| it.as_str().parse().ok());
    match version.ok_or(DecodeError::Truncated)? {
        version if version == known => Ok(()),
        version => Err(DecodeError::UnsupportedVersion(version)),
    }
}

/// The head of `answer`, whose body is stored in so many parts.
pub(super) fn answer_headers(answer: &StoredResponse, parts: usize) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(ANSWER, json(&AnswerHead::of(answer, parts)).as_str());
    headers
}

/// The headers of a final state.
pub(super) fn end_headers(end: &End) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(END, json(end).as_str());
    headers
}

pub(super) fn end(headers: &HeaderMap) -> Option<End> {
    serde_json::from_str(headers.get(END)?.as_str()).ok()
}

pub(super) fn answer_head(headers: &HeaderMap) -> Option<AnswerHead> {
    serde_json::from_str(headers.get(ANSWER)?.as_str()).ok()
}

impl AnswerHead {
    pub(super) fn of(answer: &StoredResponse, parts: usize) -> Self {
        let StoredResponse { status, headers, truncated, .. } = answer;
        Self { status: *status, headers: headers.clone(), truncated: *truncated, parts }
    }

    pub(super) fn with(self, body: Bytes) -> StoredResponse {
        let Self { status, headers, truncated, .. } = self;
        StoredResponse { status, headers, body, truncated }
    }
}

/// `value` on one line: JSON escapes line ends.
pub(super) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::function::Function;
    use crate::queue::call::CallOptions;

    fn call() -> QueuedCall {
        let mut headers = http::HeaderMap::new();
        headers.append("x-a", HeaderValue::from_bytes(b"\xff\xfe").unwrap());
        QueuedCall {
            id: "id-1".to_owned(),
            function: Function { name: "echo".to_owned(), namespace: "dev".to_owned() },
            target: "/p?x=1".to_owned(),
            headers,
            body: Bytes::from_static(b"\x00\xffbody"),
            options: CallOptions { submitted_at: 5, not_before: Some(9), ..CallOptions::default() },
        }
    }

    #[test]
    fn a_call_comes_out_as_it_went_in() {
        let message = Message::new(&call());
        assert_eq!(message.call().unwrap(), call());
        assert_eq!((message.due(&call()), message.progress()), (9, None));
        let status =
            CallRecord { attempts: 2, next_attempt_at: Some(20), ..CallRecord::queued(&call()) };
        let later = Message::stored(message.progressed(&status, 7), message.body);
        assert_eq!(later.call().unwrap(), call());
        assert_eq!((later.progress(), later.was()), (Some(status), Some(7)));
        assert_eq!(later.due(&call()), 20);
        let again = Message::stored(later.fresh(), later.body);
        assert_eq!((again.progress(), again.was(), again.call().unwrap()), (None, None, call()));
    }

    #[test]
    fn a_body_may_be_elsewhere() {
        let parts = Parts { name: "n".to_owned(), count: 3 };
        let message = Message::new(&call()).with_parts(&parts);
        assert_eq!((message.parts(), message.body.len()), (Some(parts), 0));
        assert!(Message::stored(message.fresh(), Bytes::new()).parts().is_some());
    }

    #[test]
    fn a_list_says_which_calls_are_made_and_since_when() {
        let mut list = List::default();
        let places = [
            (Place::alone(7), 1),
            (Place::among(8, 0), 1),
            (Place::among(8, 63), 1),
            (Place::among(8, 5), 2),
        ];
        for (place, since) in places {
            list.add("fn,echo", place, since);
        }
        let read: List = serde_json::from_str(&json(&list)).unwrap();
        assert_eq!(read.places().collect::<BTreeSet<_>>(), BTreeSet::from(places));
        assert_eq!((read.count("fn,echo"), read.count("other")), ((4, 2), (0, 0)));
        let before: List = serde_json::from_str(r#"{"calls":{"fn,echo":[[7,1]]}}"#).unwrap();
        assert_eq!(before.places().collect::<Vec<_>>(), [(Place::alone(7), 1)]);
    }

    #[test]
    fn what_is_no_call_is_refused() {
        let mut headers = Message::new(&call()).headers;
        headers.insert(VERSION_NAME, "2");
        let later = Message::stored(headers, Bytes::new());
        assert!(matches!(later.call(), Err(DecodeError::UnsupportedVersion(2))));
        let foreign = Message::stored(HeaderMap::new(), Bytes::new());
        assert!(foreign.call().is_err() && foreign.status().is_none());
    }
}
