//! Encoding of finished calls: length of the head, head as JSON, body of the response. No I/O.

use bytes::{BufMut, Bytes};
use serde::{Deserialize, Serialize};

use crate::status::{CallRecord, StoredResponse};

/// Status and headers of a stored response.
#[derive(Serialize, Deserialize)]
struct ResponseHead {
    status: u16,
    headers: Vec<(String, String)>,
    #[serde(default)]
    truncated: bool,
}

/// As [`ResponseHead`], borrowed for encoding.
#[derive(Serialize)]
struct ResponseHeadRef<'a> {
    status: u16,
    headers: &'a [(String, String)],
    truncated: bool,
}

/// The head: record and response head.
#[derive(Serialize, Deserialize)]
struct RecordHead<S, A> {
    status: S,
    #[serde(rename = "answer", default = "none", skip_serializing_if = "Option::is_none")]
    response: Option<A>,
}

fn none<A>() -> Option<A> {
    None
}

pub(super) fn encode(status: &CallRecord, response: Option<&StoredResponse>) -> Vec<u8> {
    let head = response.map(|response| ResponseHeadRef {
        status: response.status,
        headers: &response.headers,
        truncated: response.truncated,
    });
    let head = RecordHead { status, response: head };
    let body = response.map_or(&[][..], |response| &response.body);
    let mut bytes = Vec::with_capacity(512 + body.len());
    bytes.put_u32(0);
    // Writing to memory does not fail.
    let _ = serde_json::to_writer(&mut bytes, &head);
    let length = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    bytes.put_slice(body);
    bytes
}

/// Encodes `record` again without its response.
pub(super) fn without_result(record: &Bytes) -> Option<Vec<u8>> {
    let (status, _) = decode(record)?;
    Some(encode(&status, None))
}

pub(super) fn decode(bytes: &Bytes) -> Option<(CallRecord, Option<StoredResponse>)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    let head: RecordHead<CallRecord, ResponseHead> =
        serde_json::from_slice(rest.get(..length)?).ok()?;
    let body = bytes.slice(4 + length..);
    let response = head.response.map(|response| StoredResponse {
        status: response.status,
        headers: response.headers,
        body,
        truncated: response.truncated,
    });
    Some((head.status, response))
}
