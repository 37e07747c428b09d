//! A settlement in the form in which it is written. No I/O.

use bytes::Bytes;

use crate::call::UnixMillis;
use crate::embedded::id_codec::CallIdCodec;
use crate::embedded::result_codec;
use crate::status::{CallRecord, Settlement};

/// A settlement in the form in which it is written.
pub(super) enum SettleWrite {
    /// `record`: the encoded record and response. `needs_id_index`: the id does not contain the number.
    Finished {
        record: Bytes,
        needs_id_index: bool,
    },
    Retry {
        record_json: Vec<u8>,
        at: UnixMillis,
    },
    DeadLetter {
        record_json: Vec<u8>,
        record: Vec<u8>,
        label: String,
    },
}

impl SettleWrite {
    /// Encodes `settlement`, after which the record of the call is `status`.
    pub(super) fn new(status: &CallRecord, settlement: &Settlement) -> Self {
        let record_json = || serde_json::to_vec(status).unwrap_or_default();
        match settlement {
            Settlement::Finished { response, .. } => Self::Finished {
                record: result_codec::encode(status, response.as_ref()).into(),
                needs_id_index: requires_id_index(status),
            },
            Settlement::Retry { at, .. } => Self::Retry { record_json: record_json(), at: *at },
            Settlement::DeadLetter { response, .. } => Self::DeadLetter {
                record_json: record_json(),
                record: result_codec::encode(status, response.as_ref()),
                label: status.function.clone(),
            },
        }
    }
}

/// Returns whether the call needs an entry in the id index, since its id does not contain its number.
pub(super) fn requires_id_index(status: &CallRecord) -> bool {
    status.chosen_id || !CallIdCodec::may_contain_number(&status.id)
}
