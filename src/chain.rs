//! The headers of a callback, and how many callbacks in a row have led to a call. No I/O.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Marks a callback. The API refuses requests that have it, whatever the value.
pub const X_GATEWAY_CALLBACK: HeaderName = HeaderName::from_static("x-gateway-callback");
/// How many callbacks in a row have led to a request.
pub const X_GATEWAY_CALLBACKS: HeaderName = HeaderName::from_static("x-gateway-callbacks");
pub const YES: HeaderValue = HeaderValue::from_static("1");

/// The longest chain of callbacks. Functions that call each other without end stop here.
pub const MAX: u32 = 8;

/// The number of callbacks that have led to a request with `headers`.
///
/// Of several values the largest counts, and one that is not a number counts as too many: a client can lengthen its
/// chain, but not begin the count again.
pub fn length(headers: &HeaderMap) -> u32 {
    let number = |value: &HeaderValue| value.to_str().ok()?.trim().parse().ok();
    let values = headers.get_all(X_GATEWAY_CALLBACKS).iter();
    values.map(|value| number(value).unwrap_or(u32::MAX)).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_number_counts_and_what_is_none_is_too_large() {
        let length_of = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(X_GATEWAY_CALLBACKS, HeaderValue::from_static(value));
            }
            length(&headers)
        };
        assert_eq!(length_of(&[]), 0);
        assert_eq!(length_of(&["3"]), 3);
        assert_eq!(length_of(&["0", "8", "1"]), 8);
        for value in ["", "-1", "many", "99999999999999999999", "1, 2"] {
            assert!(length_of(&[value]) > MAX, "{value:?}");
        }
    }
}
