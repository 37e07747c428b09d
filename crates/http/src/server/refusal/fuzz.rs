//! Properties of refused request heads that the fuzzer checks.

use crate::server::refusal::{HeadOutcome, classify_too_large, has_long_target, response};

/// A head whose version is corrected differs in one byte, and is then one of HTTP/1.1; any other gets a response.
pub(crate) fn refused_head(data: &[u8]) {
    let _: HeadOutcome = classify_too_large(data);
    let _ = has_long_target(data);
    match HeadOutcome::from_version(data) {
        HeadOutcome::Corrected(corrected) => {
            let changed = corrected.iter().zip(data).filter(|(new, old)| new != old).count();
            assert!(changed == 1 && corrected.len() == data.len());
            assert!(matches!(HeadOutcome::from_version(&corrected), HeadOutcome::Refused(_)));
        }
        HeadOutcome::NeedsManyHeaders => panic!("a version does not need more headers"),
        HeadOutcome::Refused(error) => {
            let response = response(error, false);
            assert!(response.starts_with(b"HTTP/1.1 4") || response.starts_with(b"HTTP/1.1 5"));
        }
    }
}
