//! Headers that mark callbacks and count how many callbacks in a row have led to a request. No I/O.

use http::{HeaderMap, HeaderValue};

use crate::names::X_GATEWAY_CALLBACKS;

/// Value of [`X_GATEWAY_CALLBACK`](crate::names::X_GATEWAY_CALLBACK).
pub const CALLBACK_MARK: HeaderValue = HeaderValue::from_static("1");

/// Maximum number of callbacks in a row. Stops functions that call each other in an endless loop.
pub const MAX_LENGTH: u32 = 8;

/// Returns the number of callbacks that have led to a request with `headers`.
///
/// With several values the largest counts. A value that is not a number counts as above the maximum: a client can
/// lengthen its chain, but not reset the count.
pub fn length(headers: &HeaderMap) -> u32 {
    let number = |value: &HeaderValue| value.to_str().ok()?.trim().parse().ok();
    let values = headers.get_all(X_GATEWAY_CALLBACKS).iter();
    values.map(|value| number(value).unwrap_or(u32::MAX)).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_value_counts_and_an_invalid_value_exceeds_the_maximum() {
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
            assert!(length_of(&[value]) > MAX_LENGTH, "{value:?}");
        }
    }
}
