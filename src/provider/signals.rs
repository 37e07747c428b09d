//! What a provider says to a gateway beside its answers. docs/PROVIDER.md describes these for other implementations.
//! No I/O.
//!
//! A provider that passes on whatever its functions send lets a function say the same. So a gateway may wait less
//! because of these, or answer differently, but it never sends a call again on their word alone.

use http::{HeaderMap, HeaderName, HeaderValue};

/// In an error: the provider made it itself, without the function.
pub const X_OPENFAAS_INTERNAL: HeaderName = HeaderName::from_static("x-openfaas-internal");
/// Why a provider or a gateway answers with an error, as one word.
pub const X_GATEWAY_REASON: HeaderName = HeaderName::from_static("x-gateway-reason");

/// The value of `X-Gateway-Reason` where the function's processes end at their start.
pub const DOES_NOT_START: HeaderValue = HeaderValue::from_static("does-not-start");
/// The value of `X-Gateway-Reason` where there is no such function.
pub const NO_SUCH_FUNCTION: HeaderValue = HeaderValue::from_static("no-such-function");

/// The start of all names that gateways use among themselves.
const OURS: &str = "x-gateway-";

/// Removes from what a function sends all that only a provider or a gateway may say.
pub fn remove(headers: &mut HeaderMap) {
    let is_signal =
        |name: &HeaderName| *name == X_OPENFAAS_INTERNAL || name.as_str().starts_with(OURS);
    // Few answers have any.
    let found: Vec<HeaderName> = headers.keys().filter(|name| is_signal(name)).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

/// `proxy`, which is what this header has always said.
pub const INTERNAL: HeaderValue = HeaderValue::from_static("proxy");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_a_provider_may_say_is_removed_and_all_else_stays() {
        let mut headers = HeaderMap::new();
        for name in
            ["x-openfaas-internal", "x-gateway-reason", "x-gateway-callback", "x-gate", "etag"]
        {
            headers.append(name, HeaderValue::from_static("1"));
            headers.append(name, HeaderValue::from_static("2"));
        }
        remove(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["etag", "x-gate"]);
        assert_eq!(headers.len(), 4);
    }
}
