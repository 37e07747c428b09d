//! What the fuzzer checks of heads of requests that hyper refuses.

use crate::serve::refusal::{Outcome, has_long_target, response, too_large};

/// A head whose version is corrected differs in one byte, and is then one of HTTP/1.1; any other gets a response.
pub(crate) fn refused_head(data: &[u8]) {
    let _: Outcome = too_large(data);
    let _ = has_long_target(data);
    match Outcome::of_version(data) {
        Outcome::Corrected(corrected) => {
            let changed = corrected.iter().zip(data).filter(|(new, old)| new != old).count();
            assert!(changed == 1 && corrected.len() == data.len());
            assert!(matches!(Outcome::of_version(&corrected), Outcome::Refused(_)));
        }
        Outcome::NeedsRoom => panic!("a version needs no room"),
        Outcome::Refused(error) => {
            let response = response(error, false);
            assert!(response.starts_with(b"HTTP/1.1 4") || response.starts_with(b"HTTP/1.1 5"));
        }
    }
}
