//! Format of stored messages. No I/O.

use std::collections::{BTreeMap, BTreeSet};

use async_nats::HeaderMap;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::call::{DecodeError, Envelope, QueuedCall, UnixMillis};
use crate::jetstream::wire::batch::{self, CallRef};
use crate::jetstream::wire::ids::BatchKey;
use crate::status::{CallRecord, CallState, StoredResponse};
use gateway_base::function::Function;

/// The call without its body.
const CALL_HEADER: &str = "Gateway-Call";
/// Format version. It is incremented when older gateways could not execute the call correctly.
const VERSION_HEADER: &str = "Gateway-Version";
const VERSION: u8 = 1;
/// Format version of a batch.
const BATCH_VERSION: u8 = 2;
/// [`CallRecord`] of a call that was executed before, or is a dead letter.
const STATUS_HEADER: &str = "Gateway-Progress";
/// [`ChunkedBody`], if the body is not in the message.
const BODY_REF_HEADER: &str = "Gateway-Body";
/// Of a dead letter: sequence of the original message.
const PREVIOUS_SEQ_HEADER: &str = "Gateway-Was";
/// Of a redriven call: sequence of the dead letter.
const REDRIVEN_FROM_HEADER: &str = "Gateway-Revived";
/// Of a dead letter that could not be decoded: subject of the original message. All other headers that are not named
/// here are those of the message.
const RAW_SUBJECT_HEADER: &str = "Gateway-Subject";
/// Headers with this prefix are instructions to the server.
const SERVER_HEADER_PREFIX: &str = "nats-";
/// The server detects duplicate messages by this header.
const MESSAGE_ID_HEADER: &str = "Nats-Msg-Id";
/// [`FinalRecord`].
const FINAL_HEADER: &str = "Gateway-End";
/// Head of a response; only the first chunk has it.
const RESPONSE_HEADER: &str = "Gateway-Answer";
/// Failure reasons are truncated to this length, so that a call does not outgrow its message.
const MAX_REASON_CHARS: usize = 1000;

/// Reference to a body that is stored in chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::jetstream) struct ChunkedBody {
    pub(in crate::jetstream) name: String,
    pub(in crate::jetstream) count: usize,
}

/// Message of a call.
#[derive(Clone, Debug)]
pub(in crate::jetstream) struct Message {
    headers: HeaderMap,
    pub(in crate::jetstream) body: Bytes,
}

/// The calls that one receiver has claimed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(in crate::jetstream) struct RunningList {
    /// By consumer name: sequence of each call's message, and time of the claim.
    pub(in crate::jetstream) calls: BTreeMap<String, Vec<(u64, UnixMillis)>>,
    /// The same for calls in batches, with a bit set of their indexes.
    #[serde(default, rename = "together", skip_serializing_if = "BTreeMap::is_empty")]
    pub(in crate::jetstream) batched: BTreeMap<String, Vec<(u64, UnixMillis, u64)>>,
}

impl RunningList {
    /// Adds a call that was claimed at `since`.
    pub(in crate::jetstream) fn add(
        &mut self,
        consumer: &str,
        call_ref: CallRef,
        since: UnixMillis,
    ) {
        match call_ref.index {
            None => {
                let calls = self.calls.entry(consumer.to_owned()).or_default();
                calls.push((call_ref.sequence, since));
            }
            Some(index) => {
                let groups = self.batched.entry(consumer.to_owned()).or_default();
                let bit = 1_u64.checked_shl(index.into()).unwrap_or_default();
                let group = groups
                    .iter_mut()
                    .find(|group| (group.0, group.1) == (call_ref.sequence, since));
                match group {
                    Some((.., bits)) => *bits |= bit,
                    None => groups.push((call_ref.sequence, since, bit)),
                }
            }
        }
    }

    pub(in crate::jetstream) fn is_empty(&self) -> bool {
        self.calls.is_empty() && self.batched.is_empty()
    }

    /// Returns all calls and the times of their claims.
    pub(in crate::jetstream) fn call_refs(&self) -> impl Iterator<Item = (CallRef, UnixMillis)> {
        let single = self.calls.values().flatten();
        let single = single.map(|(sequence, since)| (CallRef::single(*sequence), *since));
        let in_batch = self.batched.values().flatten().flat_map(|(sequence, since, bits)| {
            let indexes = (0..64).filter(move |index| bits >> index & 1 == 1);
            indexes.map(|index| (CallRef::in_batch(*sequence, index), *since))
        });
        single.chain(in_batch)
    }

    /// Returns the number of calls of a consumer, and the number of their messages.
    pub(in crate::jetstream) fn count(&self, consumer: &str) -> (usize, usize) {
        let single = self.calls.get(consumer).map_or(0, Vec::len);
        let groups = self.batched.get(consumer).map_or(&[][..], Vec::as_slice);
        let in_batch: u32 = groups.iter().map(|(.., bits)| bits.count_ones()).sum();
        let messages: BTreeSet<u64> = groups.iter().map(|(sequence, ..)| *sequence).collect();
        (single + in_batch as usize, single + messages.len())
    }
}

/// Final state of a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::jetstream) struct FinalRecord {
    /// Sequence of the call's message.
    pub(in crate::jetstream) sequence: u64,
    pub(in crate::jetstream) status: CallRecord,
    /// Head of the response whose body is the payload of this message.
    #[serde(default, rename = "answer", skip_serializing_if = "Option::is_none")]
    pub(in crate::jetstream) response: Option<ResponseHead>,
}

/// Head of a stored response.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::jetstream) struct ResponseHead {
    status: u16,
    headers: Vec<(String, String)>,
    #[serde(default)]
    truncated: bool,
    #[serde(rename = "parts")]
    pub(in crate::jetstream) chunks: usize,
}

impl Message {
    /// Returns the message of a call that was not executed yet.
    pub(in crate::jetstream) fn new(call: &QueuedCall) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(VERSION_HEADER, VERSION.to_string());
        headers.insert(CALL_HEADER, json(&call.envelope()).as_str());
        Self { headers, body: call.body.clone() }
    }

    pub(in crate::jetstream) fn from_stored(headers: HeaderMap, body: Bytes) -> Self {
        Self { headers, body }
    }

    /// Returns the headers with a message id for duplicate detection.
    pub(in crate::jetstream) fn with_message_id(&self, id: &str) -> HeaderMap {
        let mut headers = self.headers.clone();
        headers.insert(MESSAGE_ID_HEADER, id);
        headers
    }

    /// Returns the message with a reference to its body instead of the body.
    #[must_use]
    pub(in crate::jetstream) fn with_chunked_body(mut self, parts: &ChunkedBody) -> Self {
        self.headers.insert(BODY_REF_HEADER, json(parts).as_str());
        self.body = Bytes::new();
        self
    }

    /// Returns the headers of a call after an attempt; `previous_seq` is the sequence of its message during the
    /// attempt.
    pub(in crate::jetstream) fn with_status(
        &self,
        status: &CallRecord,
        previous_seq: u64,
    ) -> HeaderMap {
        let mut status = status.clone();
        status.reason = status.reason.map(|reason| reason.chars().take(MAX_REASON_CHARS).collect());
        let mut headers = self.original_headers();
        headers.insert(STATUS_HEADER, json(&status).as_str());
        headers.insert(PREVIOUS_SEQ_HEADER, previous_seq.to_string());
        if let Some(number) = self.headers.get(REDRIVEN_FROM_HEADER) {
            headers.insert(REDRIVEN_FROM_HEADER, number.clone());
        }
        headers
    }

    /// Returns the headers of the dead letter of a message that cannot be decoded.
    pub(in crate::jetstream) fn undecodable_letter(
        &self,
        status: &CallRecord,
        previous_seq: u64,
        subject: &str,
    ) -> HeaderMap {
        let mut headers = self.foreign_headers();
        headers.insert(STATUS_HEADER, json(status).as_str());
        headers.insert(PREVIOUS_SEQ_HEADER, previous_seq.to_string());
        headers.insert(RAW_SUBJECT_HEADER, subject);
        headers
    }

    /// Of the dead letter of a message that could not be decoded: returns the subject of the message.
    pub(in crate::jetstream) fn raw_subject(&self) -> Option<&str> {
        Some(self.headers.get(RAW_SUBJECT_HEADER)?.as_str())
    }

    /// Returns the headers without those for the server and those of a dead letter.
    fn foreign_headers(&self) -> HeaderMap {
        let added = [STATUS_HEADER, PREVIOUS_SEQ_HEADER, RAW_SUBJECT_HEADER, REDRIVEN_FROM_HEADER];
        let mut headers = HeaderMap::new();
        for (name, values) in self.headers.iter() {
            let name_text: &str = name.as_ref();
            let is_for_server = name_text
                .get(..SERVER_HEADER_PREFIX.len())
                .is_some_and(|prefix| prefix.eq_ignore_ascii_case(SERVER_HEADER_PREFIX));
            if !is_for_server && !added.contains(&name_text) {
                values.iter().for_each(|value| headers.append(name.clone(), value.clone()));
            }
        }
        headers
    }

    /// Returns the headers of a redriven call, which starts with no attempts. `number` is the sequence of the dead
    /// letter.
    pub(in crate::jetstream) fn redriven(&self, number: u64) -> HeaderMap {
        let mut headers = match self.raw_subject() {
            Some(_) => self.foreign_headers(),
            None => self.original_headers(),
        };
        headers.insert(REDRIVEN_FROM_HEADER, number.to_string());
        headers
    }

    /// Returns the sequence of the dead letter to remove when the redriven call is finished.
    pub(in crate::jetstream) fn dead_letter_seq(&self) -> Option<u64> {
        self.headers.get(REDRIVEN_FROM_HEADER)?.as_str().parse().ok()
    }

    /// Returns the headers of a cancelled call: no receiver executes it.
    pub(in crate::jetstream) fn tombstone(
        &self,
        status: &CallRecord,
        previous_seq: u64,
    ) -> HeaderMap {
        let mut headers = self.with_status(status, previous_seq);
        headers.insert(BODY_REF_HEADER, "");
        headers
    }

    /// Returns whether the call is cancelled and must not be executed.
    pub(in crate::jetstream) fn is_tombstone(&self) -> bool {
        self.stored_status().is_some_and(|status| status.state == CallState::Cancelled)
    }

    /// Returns the headers of the call without the traces of attempts.
    pub(in crate::jetstream) fn original_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for name in [VERSION_HEADER, CALL_HEADER, BODY_REF_HEADER] {
            if let Some(value) = self.headers.get(name) {
                headers.insert(name, value.clone());
            }
        }
        headers
    }

    /// Returns the approximate size of the headers in bytes.
    pub(in crate::jetstream) fn head_size(&self) -> usize {
        self.headers.get(CALL_HEADER).map_or(0, |meta| meta.as_str().len()) + 512
    }

    pub(in crate::jetstream) fn chunked_body(&self) -> Option<ChunkedBody> {
        serde_json::from_str(self.headers.get(BODY_REF_HEADER)?.as_str()).ok()
    }

    pub(in crate::jetstream) fn stored_status(&self) -> Option<CallRecord> {
        serde_json::from_str(self.headers.get(STATUS_HEADER)?.as_str()).ok()
    }

    /// Of a dead letter: returns the sequence of the original message.
    pub(in crate::jetstream) fn previous_seq(&self) -> Option<u64> {
        self.headers.get(PREVIOUS_SEQ_HEADER)?.as_str().parse().ok()
    }

    /// Decodes the call; its body is the payload of the message.
    ///
    /// # Errors
    /// When the headers are missing or invalid, or of a newer version. The call must be left to newer gateways.
    pub(in crate::jetstream) fn call(&self) -> Result<QueuedCall, DecodeError> {
        check_version(&self.headers, VERSION)?;
        let meta = self.headers.get(CALL_HEADER).ok_or(DecodeError::Truncated)?;
        let meta: Envelope<'_> = serde_json::from_str(meta.as_str())?;
        QueuedCall::from_envelope(meta, self.body.clone())
    }

    /// Decodes the batch `key` of `function`.
    ///
    /// # Errors
    /// When the version is missing or different, or the payload is not that of this batch.
    pub(in crate::jetstream) fn batch(
        &self,
        function: &Function,
        key: BatchKey,
    ) -> Result<Vec<QueuedCall>, DecodeError> {
        check_version(&self.headers, BATCH_VERSION)?;
        batch::decode(self.body.clone(), function, key)
    }

    /// Returns the state of the call while no process executes it.
    pub(in crate::jetstream) fn status(&self) -> Option<CallRecord> {
        self.stored_status().or_else(|| self.call().ok().map(|call| CallRecord::queued(&call)))
    }

    /// Returns the state of `call` while it is executed.
    pub(in crate::jetstream) fn running_status(
        &self,
        call: &QueuedCall,
        since: UnixMillis,
    ) -> CallRecord {
        let (attempts, status) = self
            .stored_status()
            .map_or((0, None), |supported| (supported.attempts, supported.status));
        CallRecord {
            state: CallState::Running,
            attempts: attempts + 1,
            status,
            started_at: Some(since),
            ..CallRecord::queued(call)
        }
    }

    /// Returns the earliest time at which the call may be executed.
    pub(in crate::jetstream) fn due_at(&self, call: &QueuedCall) -> UnixMillis {
        match self.stored_status() {
            Some(CallRecord { state: CallState::Cancelled, .. }) => 0,
            Some(CallRecord { next_attempt_at: Some(again), .. }) => again,
            _ => call.options.not_before.unwrap_or(0),
        }
    }
}

/// Returns the headers of a batch.
pub(in crate::jetstream) fn batch_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(VERSION_HEADER, BATCH_VERSION.to_string());
    headers
}

/// Returns whether a newer gateway may be able to decode the headers of a call, or of a batch.
pub(in crate::jetstream) fn is_newer(error: &DecodeError, is_batch: bool) -> bool {
    let supported = if is_batch { BATCH_VERSION } else { VERSION };
    matches!(error, DecodeError::UnsupportedVersion(version) if *version > supported)
}

fn check_version(headers: &HeaderMap, supported: u8) -> Result<(), DecodeError> {
    let version = headers.get(VERSION_HEADER).and_then(|value| value.as_str().parse().ok());
    match version.ok_or(DecodeError::Truncated)? {
        version if version == supported => Ok(()),
        version => Err(DecodeError::UnsupportedVersion(version)),
    }
}

/// Returns the headers of a response whose body is stored in `parts` chunks.
pub(in crate::jetstream) fn response_headers(response: &StoredResponse, parts: usize) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(RESPONSE_HEADER, json(&ResponseHead::new(response, parts)).as_str());
    headers
}

/// Returns the headers of a final state.
pub(in crate::jetstream) fn final_headers(end: &FinalRecord) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(FINAL_HEADER, json(end).as_str());
    headers
}

pub(in crate::jetstream) fn parse_final_record(headers: &HeaderMap) -> Option<FinalRecord> {
    serde_json::from_str(headers.get(FINAL_HEADER)?.as_str()).ok()
}

pub(in crate::jetstream) fn parse_response_head(headers: &HeaderMap) -> Option<ResponseHead> {
    serde_json::from_str(headers.get(RESPONSE_HEADER)?.as_str()).ok()
}

impl ResponseHead {
    pub(in crate::jetstream) fn new(response: &StoredResponse, parts: usize) -> Self {
        let StoredResponse { status, headers, truncated, .. } = response;
        Self { status: *status, headers: headers.clone(), truncated: *truncated, chunks: parts }
    }

    pub(in crate::jetstream) fn into_response(self, body: Bytes) -> StoredResponse {
        let Self { status, headers, truncated, .. } = self;
        StoredResponse { status, headers, body, truncated }
    }
}

/// Serializes `value` as one line: JSON escapes line breaks.
pub(in crate::jetstream) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::call::CallOptions;

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
    fn a_call_survives_encoding_and_decoding() {
        let message = Message::new(&call());
        assert_eq!(message.call().unwrap(), call());
        assert_eq!((message.due_at(&call()), message.stored_status()), (9, None));
        let status =
            CallRecord { attempts: 2, next_attempt_at: Some(20), ..CallRecord::queued(&call()) };
        let later = Message::from_stored(message.with_status(&status, 7), message.body);
        assert_eq!(later.call().unwrap(), call());
        assert_eq!((later.stored_status(), later.previous_seq()), (Some(status), Some(7)));
        assert_eq!(later.due_at(&call()), 20);
        let again = Message::from_stored(later.original_headers(), later.body);
        assert_eq!(
            (again.stored_status(), again.previous_seq(), again.call().unwrap()),
            (None, None, call())
        );
    }

    #[test]
    fn a_message_can_refer_to_a_chunked_body() {
        let parts = ChunkedBody { name: "n".to_owned(), count: 3 };
        let message = Message::new(&call()).with_chunked_body(&parts);
        assert_eq!((message.chunked_body(), message.body.len()), (Some(parts), 0));
        assert!(
            Message::from_stored(message.original_headers(), Bytes::new()).chunked_body().is_some()
        );
    }

    #[test]
    fn a_running_list_contains_calls_and_times_of_their_claims() {
        let mut list = RunningList::default();
        let call_refs = [
            (CallRef::single(7), 1),
            (CallRef::in_batch(8, 0), 1),
            (CallRef::in_batch(8, 63), 1),
            (CallRef::in_batch(8, 5), 2),
        ];
        for (call_ref, since) in call_refs {
            list.add("fn,echo", call_ref, since);
        }
        let read: RunningList = serde_json::from_str(&json(&list)).unwrap();
        assert_eq!(read.call_refs().collect::<BTreeSet<_>>(), BTreeSet::from(call_refs));
        assert_eq!((read.count("fn,echo"), read.count("other")), ((4, 2), (0, 0)));
        let before: RunningList = serde_json::from_str(r#"{"calls":{"fn,echo":[[7,1]]}}"#).unwrap();
        assert_eq!(before.call_refs().collect::<Vec<_>>(), [(CallRef::single(7), 1)]);
    }

    #[test]
    fn an_undecodable_message_keeps_its_headers_as_a_dead_letter() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (VERSION_HEADER, "9"),
            ("Of-Tomorrow", "1"),
            ("Of-Tomorrow", "2"),
            ("nats-msg-id", "x"),
            (PREVIOUS_SEQ_HEADER, "3"),
        ] {
            headers.append(name, value);
        }
        let message = Message::from_stored(headers, Bytes::from_static(b"raw"));
        let status = CallRecord::queued(&call());
        let letter = message.undecodable_letter(&status, 7, "faas.q.fn.echo.1");
        let letter = Message::from_stored(letter, message.body);
        assert_eq!((letter.stored_status(), letter.previous_seq()), (Some(status), Some(7)));
        assert_eq!(letter.raw_subject(), Some("faas.q.fn.echo.1"));
        let redriven = Message::from_stored(letter.redriven(8), letter.body);
        assert_eq!((redriven.stored_status(), redriven.raw_subject()), (None, None));
        assert_eq!(redriven.dead_letter_seq(), Some(8));
        assert_eq!(redriven.headers.get_all("Of-Tomorrow").count(), 2);
        assert_eq!(redriven.headers.get("nats-msg-id"), None);
        assert!(is_newer(&redriven.call().unwrap_err(), false));
    }

    #[test]
    fn an_invalid_message_is_rejected() {
        let mut headers = Message::new(&call()).headers;
        headers.insert(VERSION_HEADER, "2");
        let later = Message::from_stored(headers, Bytes::new());
        assert!(matches!(later.call(), Err(DecodeError::UnsupportedVersion(2))));
        let foreign = Message::from_stored(HeaderMap::new(), Bytes::new());
        assert!(foreign.call().is_err() && foreign.status().is_none());
    }
}
