//! The headers of a callback: those of the function's response, and those that describe the call. No I/O.

use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, MAX_FORWARDS, ORIGIN, TRAILER,
    USER_AGENT,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::callback::CallbackPayload;
use crate::callback::target::CallbackTarget;
use gateway_http::call_id::USER_AGENT_VALUE;
use gateway_http::callback_chain::CALLBACK_MARK;
use gateway_http::headers::to_client;
use gateway_http::names::{
    IDEMPOTENCY_KEY, X_CALL_ID, X_CALLBACK_URL, X_DELAY_SECONDS, X_DURATION_SECONDS,
    X_EXPIRES_SECONDS, X_FUNCTION_STATUS, X_GATEWAY_CALLBACK, X_GATEWAY_CALLBACKS, X_MAX_ATTEMPTS,
    X_TRUNCATED,
};
use gateway_proxy::trace::context::{TRACEPARENT, TRACESTATE};

const X_FUNCTION_NAME: HeaderName = HeaderName::from_static("x-function-name");
const X_RETRY: HeaderName = HeaderName::from_static("x-retry");
const X_RETRY_MAX: HeaderName = HeaderName::from_static("x-retry-max");

/// Response headers that would have another meaning in a request: they frame the body, control a gateway, carry
/// credentials, or describe the request's origin.
static NOT_COPIED: [HeaderName; 17] = [
    AUTHORIZATION,
    CONTENT_LENGTH,
    COOKIE,
    EXPECT,
    FORWARDED,
    HOST,
    IDEMPOTENCY_KEY,
    MAX_FORWARDS,
    ORIGIN,
    TRACEPARENT,
    TRACESTATE,
    TRAILER,
    X_CALLBACK_URL,
    X_DELAY_SECONDS,
    X_EXPIRES_SECONDS,
    X_MAX_ATTEMPTS,
    X_TRUNCATED,
];

/// The same, by prefix.
const NOT_COPIED_FAMILIES: [&str; 8] = [
    "x-forwarded-",
    "x-gateway-",
    "x-http-method",
    "x-original-",
    "x-real-",
    "x-rewrite-",
    "sec-",
    "webhook-",
];

fn is_copied(name: &HeaderName) -> bool {
    // Servers that map header names to variables treat `-`, `_` and `.` alike.
    let plain = name.as_str().replace(['_', '.'], "-");
    !NOT_COPIED.iter().any(|one| one.as_str() == plain)
        && !NOT_COPIED_FAMILIES.iter().any(|start| plain.starts_with(start))
}

/// Builds the headers of a callback to `target`, without its signature.
pub(super) fn build(target: &CallbackTarget, payload: &CallbackPayload) -> HeaderMap {
    let mut response = payload.headers.clone();
    to_client(&mut response, false);
    let mut headers = HeaderMap::with_capacity(response.len() + 16);
    for (name, value) in &response {
        if is_copied(name) {
            headers.append(name, value.clone());
        }
    }
    if payload.truncated {
        headers.insert(X_TRUNCATED, HeaderValue::from_static("true"));
    }
    headers.insert(HOST, target.origin.host.clone());
    headers.insert(USER_AGENT, USER_AGENT_VALUE);
    if let Some(authorization) = &target.authorization {
        headers.insert(AUTHORIZATION, authorization.clone());
    }
    headers.extend(payload.trace.clone());
    headers.insert(X_GATEWAY_CALLBACK, CALLBACK_MARK);
    headers.insert(X_GATEWAY_CALLBACKS, payload.callbacks.saturating_add(1).into());
    headers.insert(X_CALL_ID, text(&payload.call_id));
    headers.insert(X_FUNCTION_NAME, text(&payload.function));
    headers.insert(X_FUNCTION_STATUS, payload.status.into());
    headers.insert(X_DURATION_SECONDS, text(&format!("{:.6}", payload.duration.as_secs_f64())));
    headers.insert(X_RETRY, payload.attempts.into());
    headers.insert(X_RETRY_MAX, payload.max_attempts.into());
    headers
}

/// Converts `value` to a header value; empty if it is not a valid one.
fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_and_credential_headers_are_not_copied() {
        for name in [
            "authorization",
            "cookie",
            "x-callback-url",
            "x-delay-seconds",
            "x-gateway-callbacks",
            "x-forwarded-host",
            "x-http-method-override",
            "sec-fetch-site",
            "webhook-signature",
            "x_callback_url",
            "x.forwarded_host",
            "x-rewrite-url",
        ] {
            assert!(!is_copied(&HeaderName::from_static(name)), "{name}");
        }
        for name in ["content-type", "set-cookie", "x-own", "retry-after", "etag", "location"] {
            assert!(is_copied(&HeaderName::from_static(name)), "{name}");
        }
    }
}
