//! Format of stored messages. No I/O.

mod letters;
use async_nats::HeaderMap;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::call::{DecodeError, Envelope, QueuedCall, UnixMillis};
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::{batch, json};
use crate::status::{CallRecord, CallState};
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

#[cfg(test)]
pub(super) mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::call::CallOptions;

    pub(in crate::jetstream::wire) fn call() -> QueuedCall {
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
    fn an_invalid_message_is_rejected() {
        let mut headers = Message::new(&call()).headers;
        headers.insert(VERSION_HEADER, "2");
        let later = Message::from_stored(headers, Bytes::new());
        assert!(matches!(later.call(), Err(DecodeError::UnsupportedVersion(2))));
        let foreign = Message::from_stored(HeaderMap::new(), Bytes::new());
        assert!(foreign.call().is_err() && foreign.status().is_none());
    }
}
