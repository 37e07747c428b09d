//! What the fuzzer checks of queued calls, whatever keeps them.

use bytes::Bytes;

use crate::queue::call::QueuedCall;

/// A stored call is stored again as the same call.
pub(crate) fn call(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let _ = (QueuedCall::extract_id(data), QueuedCall::decode_without_body(data).is_ok());
    let Ok(call) = QueuedCall::decode(&bytes) else { return };
    assert!(call.digest().len() == 32);
    assert_eq!(QueuedCall::decode(&call.encode()).ok(), Some(call));
}
