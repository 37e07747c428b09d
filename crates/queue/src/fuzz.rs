//! Fuzz targets for queued calls of any backend.

use bytes::Bytes;

use crate::call::QueuedCall;

/// Checks that a decoded call survives another round of encoding.
pub(crate) fn call(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let _ = (QueuedCall::extract_id(data), QueuedCall::decode_without_body(data).is_ok());
    let Ok(call) = QueuedCall::decode(&bytes) else { return };
    assert!(call.digest().len() == 32);
    assert_eq!(QueuedCall::decode(&call.encode()).ok(), Some(call));
}
