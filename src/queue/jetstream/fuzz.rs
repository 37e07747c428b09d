//! What the fuzzer checks of what is stored on JetStream, which other programs can write to.

use async_nats::HeaderMap;
use bytes::{Buf, Bytes};

use crate::queue::call::QueuedCall;
use crate::queue::jetstream::bundle::{self, Record};
use crate::queue::jetstream::ids::Key;
use crate::queue::jetstream::message::{self, Message, together_version};
use crate::queue::jetstream::subject;

/// A batch is exactly the calls that its key says, or it is refused.
pub(crate) fn batch(data: &[u8]) {
    let mut rest = data;
    let Ok(length) = rest.try_get_u32() else { return };
    let Some(first) = rest.get(..length as usize) else { return };
    let Ok(head) = QueuedCall::decode_without_body(first) else { return };
    let Some(key) = Key::of(&head.id) else { return };
    let decoded = bundle::decode(Bytes::copy_from_slice(data), &head.function, key);
    if let Ok(calls) = decoded {
        assert_eq!(calls.len(), key.count());
        let again = bundle::decode(bundle::encode(&calls), &head.function, key);
        assert_eq!(again.ok(), Some(calls));
    }
}

/// A record is written as one that says the same.
pub(crate) fn record(data: &[u8]) {
    let Some(record) = Record::decode(Bytes::copy_from_slice(data)) else { return };
    record.ends().for_each(drop);
    assert_eq!(Record::decode(record.encode()), Some(record));
}

/// Headers of any content are those of a call, or are refused.
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
    let _ = (together_version(Some(&headers)), message::end(&headers));
    let _ = message::answer_head(&headers).map(|head| head.with(Bytes::new()));
    let stored = Message::stored(headers, Bytes::from_static(b"body"));
    let _ = (stored.parts(), stored.was(), stored.dead_before(), stored.is_taken_back());
    if let Ok(call) = stored.call() {
        let _ = (stored.due(&call), stored.status(), stored.running(&call, 1));
        assert_eq!(Message::new(&call).call().ok(), Some(call));
    }
}

/// A subject names a call or nothing, and tokens lead back to their texts.
pub(crate) fn subject(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = (subject::named(text), subject::calls(text), subject::text(text));
    if let Some(function) = subject::consumed(text) {
        assert_eq!(subject::consumed(&subject::consumer(&function)), Some(function));
    }
    let token = subject::token(text);
    assert!(!token.contains(['.', '*', '>', ' ']));
    assert_eq!(subject::text(&token).as_deref(), Some(text));
}
