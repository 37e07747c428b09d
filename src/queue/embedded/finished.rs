//! What is stored of a call that is over: the length of the JSON, the JSON, the body of the answer. No I/O.

use bytes::{BufMut, Bytes};
use serde::{Deserialize, Serialize};

use crate::queue::status::{CallRecord, StoredResponse};

/// The head of a stored answer.
#[derive(Serialize, Deserialize)]
struct AnswerHead {
    status: u16,
    headers: Vec<(String, String)>,
    #[serde(default)]
    truncated: bool,
}

/// The head of an answer that is about to be stored.
#[derive(Serialize)]
struct AnswerHeadRef<'a> {
    status: u16,
    headers: &'a [(String, String)],
    truncated: bool,
}

/// All but the answer's body.
#[derive(Serialize, Deserialize)]
struct Head<S, A> {
    status: S,
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    answer: Option<A>,
}

fn none<A>() -> Option<A> {
    None
}

pub(super) fn encode(status: &CallRecord, answer: Option<&StoredResponse>) -> Vec<u8> {
    let head = answer.map(|answer| AnswerHeadRef {
        status: answer.status,
        headers: &answer.headers,
        truncated: answer.truncated,
    });
    let head = Head { status, answer: head };
    let body = answer.map_or(&[][..], |answer| &answer.body);
    let mut bytes = Vec::with_capacity(512 + body.len());
    bytes.put_u32(0);
    // Writing to memory does not fail.
    let _ = serde_json::to_writer(&mut bytes, &head);
    let length = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    bytes.put_slice(body);
    bytes
}

/// `record` without the result's body and headers.
pub(super) fn without_result(record: &Bytes) -> Option<Vec<u8>> {
    let (status, _) = decode(record)?;
    Some(encode(&status, None))
}

pub(super) fn decode(bytes: &Bytes) -> Option<(CallRecord, Option<StoredResponse>)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    let head: Head<CallRecord, AnswerHead> = serde_json::from_slice(rest.get(..length)?).ok()?;
    let body = bytes.slice(4 + length..);
    let answer = head.answer.map(|answer| StoredResponse {
        status: answer.status,
        headers: answer.headers,
        body,
        truncated: answer.truncated,
    });
    Some((head.status, answer))
}
