//! Format of final states and of responses. No I/O.
use async_nats::HeaderMap;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::jetstream::wire::json;
use crate::status::{CallRecord, StoredResponse};

/// [`FinalRecord`].
const FINAL_HEADER: &str = "Gateway-End";

/// Head of a response; only the first chunk has it.
const RESPONSE_HEADER: &str = "Gateway-Answer";

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
