//! What the fuzzer checks of queued calls, whatever keeps them.

use bytes::Bytes;

use crate::queue::call::Call;

/// A stored call is stored again as the same call.
pub(crate) fn call(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let _ = (Call::id_in(data), Call::decode_head(data).is_ok());
    let Ok(call) = Call::decode(&bytes) else { return };
    assert!(call.digest().len() == 32);
    assert_eq!(Call::decode(&call.encode()).ok(), Some(call));
}
