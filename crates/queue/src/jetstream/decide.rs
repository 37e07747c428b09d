//! Decisions about calls as pure functions: which write is next, and which process may go on. The model test (`model`)
//! runs the same functions. No I/O.

pub(super) mod batch;
pub(super) mod cancel;
pub(super) mod claim;
pub(super) mod location;
pub(super) mod settle;
