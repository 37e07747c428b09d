//! Response headers that a provider sends to the gateway. docs/PROVIDER.md specifies them for other providers. No I/O.
//!
//! A provider that forwards all headers of its functions lets a function forge them. So the gateway may shorten a wait
//! or change a response because of these headers, but it never retries a request based on them alone.

use http::{HeaderMap, HeaderName, HeaderValue};

use gateway_http::names::{RESERVED_HEADER_PREFIX, X_OPENFAAS_INTERNAL};

/// Value of `X-Gateway-Reason`: the function's processes exit during startup.
pub const DOES_NOT_START: HeaderValue = HeaderValue::from_static("does-not-start");
/// Value of `X-Gateway-Reason`: the function does not exist.
pub const NO_SUCH_FUNCTION: HeaderValue = HeaderValue::from_static("no-such-function");

/// Removes headers of a function's response that only a provider or gateway may set.
pub fn remove_reserved(headers: &mut HeaderMap) {
    let is_signal = |name: &HeaderName| {
        *name == X_OPENFAAS_INTERNAL || name.as_str().starts_with(RESERVED_HEADER_PREFIX)
    };
    // Few responses have any.
    let found: Vec<HeaderName> = headers.keys().filter(|name| is_signal(name)).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

/// Value of `X-OpenFaaS-Internal`, for compatibility with OpenFaaS.
pub const INTERNAL: HeaderValue = HeaderValue::from_static("proxy");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_reserved_headers_are_removed() {
        let mut headers = HeaderMap::new();
        for name in
            ["x-openfaas-internal", "x-gateway-reason", "x-gateway-callback", "x-gate", "etag"]
        {
            headers.append(name, HeaderValue::from_static("1"));
            headers.append(name, HeaderValue::from_static("2"));
        }
        remove_reserved(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["etag", "x-gate"]);
        assert_eq!(headers.len(), 4);
    }
}
