//! Fuzz targets for messages on NATS Streaming, which other programs write.

use crate::stan::callback::CallbackUrl;
use crate::stan::message::{call_id_in, decode, encode};

/// A decoded call survives encoding and decoding.
pub(crate) fn message(data: &[u8]) {
    let _ = call_id_in(data);
    let Ok((call, progress)) = decode(data, "fn", || "fresh".to_owned(), 1) else { return };
    let written = encode(&call, &progress);
    let again = decode(&written, "fn", || "fresh".to_owned(), 1);
    let Ok((call_again, progress_again)) = again else { panic!("{again:?}") };
    assert_eq!(call_again.id, call.id);
    assert_eq!(call_again.function, call.function);
    assert_eq!(call_again.target, call.target);
    assert_eq!(call_again.body, call.body);
    assert_eq!(call_again.options.expires_at, call.options.expires_at);
    assert_eq!(call_again.options.max_attempts, call.options.max_attempts);
    assert_eq!(
        (progress_again.attempts, progress_again.not_before),
        (progress.attempts, progress.not_before)
    );
}

/// A parsed URL survives formatting and parsing.
pub(crate) fn callback_url(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(parts) = CallbackUrl::parse(text) else { return };
    let url = parts.to_url(Some(text));
    let again = CallbackUrl::parse(&url);
    assert_eq!(again.map(|parts| parts.to_url(Some(text))), Some(url), "{text:?}");
}
