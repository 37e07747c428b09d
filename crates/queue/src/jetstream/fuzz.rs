//! Fuzz targets for data stored in JetStream, which other programs can write to.
use async_nats::HeaderMap;
use bytes::{Buf, Bytes};

use crate::call::QueuedCall;
use crate::jetstream::wire::final_record::{parse_final_record, parse_response_head};
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::message::Message;
use crate::jetstream::wire::records::BatchRecord;
use crate::jetstream::wire::tokens::{decode_token, encode_token};
use crate::jetstream::wire::{batch, subjects};
use crate::status::CallRecord;

/// A decoded batch contains exactly the calls of its key; anything else is rejected.
pub(crate) fn batch(data: &[u8]) {
    let mut rest = data;
    let Ok(length) = rest.try_get_u32() else { return };
    let Some(first) = rest.get(..length as usize) else { return };
    let Ok(head) = QueuedCall::decode_without_body(first) else { return };
    let Some(key) = BatchKey::from_id(&head.id) else { return };
    let decoded = batch::decode(Bytes::copy_from_slice(data), &head.function, key);
    if let Ok(calls) = decoded {
        assert_eq!(calls.len(), key.count());
        let decoded_again = batch::decode(batch::encode(&calls), &head.function, key);
        assert_eq!(decoded_again.ok(), Some(calls));
    }
}

/// A decoded record survives encoding and decoding.
pub(crate) fn record(data: &[u8]) {
    let Some(record) = BatchRecord::decode(Bytes::copy_from_slice(data)) else { return };
    record.final_records().for_each(drop);
    assert_eq!(BatchRecord::decode(record.encode()), Some(record));
}

/// Headers of any content are those of a call, or are rejected.
pub(crate) fn message(data: &[u8]) {
    const NAMES: [&str; 8] = [
        "Gateway-Version",
        "Gateway-Call",
        "Gateway-Progress",
        "Gateway-Body",
        "Gateway-Was",
        "Gateway-Revived",
        "Gateway-End",
        "Gateway-Answer",
    ];
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut headers = HeaderMap::new();
    for (name, value) in NAMES.into_iter().zip(text.split('\n')) {
        if !value.contains('\r') && !value.is_empty() {
            headers.insert(name, value);
        }
    }
    let _ = parse_final_record(&headers);
    let _ = parse_response_head(&headers).map(|head| head.into_response(Bytes::new()));
    let stored = Message::from_stored(headers, Bytes::from_static(b"body"));
    let _ = (
        stored.chunked_body(),
        stored.previous_seq(),
        stored.dead_letter_seq(),
        stored.is_tombstone(),
    );
    let letter = stored.undecodable_letter(&CallRecord::default(), 7, "faas.q.fn.echo.1");
    let letter = Message::from_stored(letter, Bytes::new());
    assert_eq!((letter.previous_seq(), letter.raw_subject()), (Some(7), Some("faas.q.fn.echo.1")));
    let redriven = Message::from_stored(letter.redriven(8), Bytes::from_static(b"body"));
    assert_eq!(redriven.call().ok(), stored.call().ok());
    if let Ok(call) = stored.call() {
        let _ = (stored.due_at(&call), stored.status(), stored.running_status(&call, 1));
        assert_eq!(Message::new(&call).call().ok(), Some(call));
    }
}

/// A subject names a call or nothing, and an encoded token can be decoded.
pub(crate) fn subject(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = (subjects::parse(text), subjects::call_count(text), decode_token(text));
    if let Some(function) = subjects::function_of_consumer(text) {
        assert_eq!(
            subjects::function_of_consumer(&subjects::consumer_name(&function)),
            Some(function)
        );
    }
    let token = encode_token(text);
    assert!(!token.contains(['.', '*', '>', ' ']));
    assert_eq!(decode_token(&token).as_deref(), Some(text));
}
