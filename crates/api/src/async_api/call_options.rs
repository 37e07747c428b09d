//! Options of a queued call, from request headers.

use http::{HeaderMap, HeaderName, HeaderValue};

use gateway_http::names::{
    IDEMPOTENCY_KEY, X_CALLBACK_URL, X_DELAY_SECONDS, X_EXPIRES_SECONDS, X_MAX_ATTEMPTS,
};
use gateway_proxy::error::Error;
use gateway_queue::call::{CallOptions, UnixMillis};
use gateway_worker::callback::target::CallbackTarget;

/// Maximum length of a chosen call id or idempotency key.
const MAX_NAME_BYTES: usize = 256;
/// Maximum delay and time to expiry that a client can request.
const MAX_SECONDS: u64 = 366 * 24 * 3600;
/// Parses the call options in `headers`.
pub(super) fn call_options(
    headers: &HeaderMap,
    chosen_id: bool,
    now: UnixMillis,
) -> Result<CallOptions, Error> {
    let later = |name: &HeaderName| -> Result<Option<UnixMillis>, Error> {
        Ok(number(headers, name, 0..=MAX_SECONDS)?.map(|seconds| now + seconds * 1000))
    };
    let attempts = number(headers, &X_MAX_ATTEMPTS, 1..=1000)?;
    Ok(CallOptions {
        callback: callback(headers)?,
        submitted_at: now,
        not_before: later(&X_DELAY_SECONDS)?.filter(|at| *at > now),
        expires_at: later(&X_EXPIRES_SECONDS)?,
        max_attempts: attempts.and_then(|attempts| u32::try_from(attempts).ok()),
        idempotency_key: name(headers, &IDEMPOTENCY_KEY)?,
        chosen_id,
        digest: None,
    })
}

fn number(
    headers: &HeaderMap,
    name: &HeaderName,
    range: std::ops::RangeInclusive<u64>,
) -> Result<Option<u64>, Error> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    match number.filter(|number| range.contains(number)) {
        Some(number) => Ok(Some(number)),
        None => Err(Error::BadRequest(format!(
            "{name} is not a whole number from {} to {}",
            range.start(),
            range.end()
        ))),
    }
}

/// Parses a header with a name that the client has chosen.
fn name(headers: &HeaderMap, header: &HeaderName) -> Result<Option<String>, Error> {
    headers.get(header).map(|value| name_text(value, header)).transpose()
}

/// Returns a header's value as a chosen name.
///
/// # Errors
/// Bad request when it is empty, too long, or has other than visible characters.
pub(super) fn name_text(value: &HeaderValue, header: &HeaderName) -> Result<String, Error> {
    match value.to_str() {
        Ok(text) if !text.is_empty() && text.len() <= MAX_NAME_BYTES => Ok(text.to_owned()),
        _ => Err(Error::BadRequest(format!(
            "{header} is empty, longer than {MAX_NAME_BYTES} bytes, or has other than visible characters"
        ))),
    }
}

fn callback(headers: &HeaderMap) -> Result<Option<String>, Error> {
    let Some(value) = headers.get(&X_CALLBACK_URL) else { return Ok(None) };
    // Only the syntax is checked here. The worker checks the address when it sends the callback.
    let is_one = |url: &&str| CallbackTarget::parse(url).is_ok();
    let url = value.to_str().ok().filter(is_one);
    let url = url.ok_or_else(|| {
        Error::BadRequest(format!("{X_CALLBACK_URL} is not an absolute http or https URL"))
    })?;
    Ok(Some(url.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_option_is_rejected() {
        let parse = |name: &'static str, value: &'static str| {
            let headers = HeaderMap::from_iter([(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )]);
            call_options(&headers, false, 1000)
        };
        assert_eq!(parse("x-delay-seconds", "2").unwrap().not_before, Some(3000));
        assert_eq!(parse("x-delay-seconds", "0").unwrap().not_before, None);
        assert_eq!(parse("x-max-attempts", "3").unwrap().max_attempts, Some(3));
        assert_eq!(parse("x-expires-seconds", "1").unwrap().expires_at, Some(2000));
        let callback = parse("x-callback-url", "https://a.example/x?y").unwrap().callback;
        assert_eq!(callback.as_deref(), Some("https://a.example/x?y"));
        for (name, value) in [
            ("x-delay-seconds", "-1"),
            ("x-delay-seconds", "soon"),
            ("x-max-attempts", "0"),
            ("x-callback-url", "http://[::1"),
            ("x-callback-url", "/relative"),
            ("x-callback-url", "ftp://a/b"),
            ("x-callback-url", "http://hooks:99999/"),
            ("x-callback-url", "http://u:%zz@hooks/"),
            ("idempotency-key", ""),
        ] {
            assert!(parse(name, value).is_err(), "{name}: {value}");
        }
    }
}
