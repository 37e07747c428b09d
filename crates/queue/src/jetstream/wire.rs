//! Formats of what is stored on the server. No I/O.

pub(super) mod batch;
pub(super) mod call_ref;
pub(super) mod claims;
pub(super) mod final_record;
pub(super) mod ids;
pub(super) mod message;
pub(super) mod records;
pub(super) mod subjects;
pub(super) mod tokens;
use serde::Serialize;

/// Serializes `value` as one line: JSON escapes line breaks.
pub(in crate::jetstream) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
