//! The checks of a Standard Webhooks receiver.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;

use crate::support::connection::Head;

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Timestamp of the message.
pub(crate) fn timestamp(head: &Head) -> u64 {
    head.header("webhook-timestamp").expect("a timestamp").parse().unwrap()
}

/// Asserts that the message `id` with `body` is recent and signed with each of `secrets`, in this order.
#[track_caller]
pub(crate) fn assert_signed(head: &Head, id: &str, body: &[u8], secrets: &[&[u8]]) {
    assert_eq!(head.header("webhook-id"), Some(id));
    let timestamp = timestamp(head);
    assert!(timestamp.abs_diff(unix_seconds()) < 60, "{timestamp}");
    let message = [format!("{id}.{timestamp}.").as_bytes(), body].concat();
    let sign = |secret: &&[u8]| {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        format!("v1,{}", STANDARD.encode(hmac::sign(&key, &message)))
    };
    let expect: Vec<_> = secrets.iter().map(sign).collect();
    assert_eq!(head.header("webhook-signature"), Some(expect.join(" ").as_str()));
}
