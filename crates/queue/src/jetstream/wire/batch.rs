//! Several calls in one message (a batch), and the record of their outcomes. No I/O.
//!
//! Calls of one function that arrive at the same time are stored in one message: the cost of a message on the server
//! hardly depends on its size. A call is identified by its index within the batch.
use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::call::{DecodeError, QueuedCall};
use crate::jetstream::wire::ids::BatchKey;
use gateway_base::function::Function;

/// Maximum number of calls per batch. Smaller than the concurrency of a worker, since it is cheapest to record the
/// outcomes of all calls of a batch at once.
pub(in crate::jetstream) const MAX_CALLS_PER_BATCH: usize = 32;
/// Calls with larger bodies are published individually.
pub(in crate::jetstream) const MAX_BATCHED_BODY_BYTES: usize = 8 << 10;
/// Approximate maximum size of a batch.
pub(in crate::jetstream) const MAX_BATCH_BYTES: usize = 128 << 10;
/// Minimum `max_payload` of a server for batching: the record of a batch must hold the outcomes of all its calls.
pub(in crate::jetstream) const MIN_SERVER_PAYLOAD_BYTES: usize = 512 << 10;

/// Encodes `calls` as the payload of a batch.
pub(in crate::jetstream) fn encode(calls: &[QueuedCall]) -> Bytes {
    let encoded: Vec<Bytes> = calls.iter().map(QueuedCall::encode).collect();
    let length = encoded.iter().map(|call| 4 + call.len()).sum();
    let mut bytes = BytesMut::with_capacity(length);
    for call in encoded {
        put_prefixed(&mut bytes, &call);
    }
    bytes.freeze()
}

/// Decodes the payload of the batch `key` of `function`.
///
/// # Errors
/// When the payload is truncated, or does not contain exactly the calls of this batch. The message must not be
/// executed.
pub(in crate::jetstream) fn decode(
    mut payload: Bytes,
    function: &Function,
    key: BatchKey,
) -> Result<Vec<QueuedCall>, DecodeError> {
    let mut calls = Vec::with_capacity(key.count());
    while payload.has_remaining() {
        let call = QueuedCall::decode(&take_prefixed(&mut payload).ok_or(DecodeError::Truncated)?)?;
        if call.function != *function || BatchKey::from_id(&call.id) != Some(key) {
            return Err(DecodeError::InvalidField);
        }
        calls.push(call);
    }
    if calls.len() == key.count() { Ok(calls) } else { Err(DecodeError::Truncated) }
}

pub(super) fn put_prefixed(bytes: &mut BytesMut, data: &[u8]) {
    bytes.put_u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
    bytes.put_slice(data);
}

pub(super) fn take_prefixed(bytes: &mut Bytes) -> Option<Bytes> {
    let length = bytes.try_get_u32().ok()? as usize;
    (length <= bytes.len()).then(|| bytes.split_to(length))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::call::CallOptions;
    use crate::jetstream::wire::ids::BatchKeys;

    pub(in crate::jetstream::wire) fn calls(key: BatchKey) -> Vec<QueuedCall> {
        let function = Function { name: "echo".to_owned(), namespace: "fn".to_owned() };
        let call = |body: &'static str| QueuedCall {
            id: key.new_call_id(&function),
            function: function.clone(),
            target: String::new(),
            headers: http::HeaderMap::new(),
            body: Bytes::from_static(body.as_bytes()),
            options: CallOptions::default(),
        };
        ["a", "", "c"].map(call).to_vec()
    }

    #[test]
    fn calls_survive_encoding_and_decoding() {
        let key = BatchKeys::new().next(3, 1);
        let calls = calls(key);
        let (payload, function) = (encode(&calls), &calls[0].function);
        assert_eq!(decode(payload.clone(), function, key).unwrap(), calls);
        let other = Function { name: "other".to_owned(), ..function.clone() };
        assert!(decode(payload.clone(), &other, key).is_err());
        assert!(decode(payload.clone(), function, BatchKeys::new().next(3, 2)).is_err());
        for length in 0..payload.len() {
            assert!(decode(payload.slice(..length), function, key).is_err(), "{length}");
        }
    }
}
