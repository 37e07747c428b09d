//! Formats of what is stored on the server. No I/O.

pub(super) mod batch;
pub(super) mod ids;
pub(super) mod message;
pub(super) mod subjects;
