//! Decides whether a call may be removed that no process executes. No I/O.

use std::time::Duration;

use crate::jetstream::wire::claims::CANCEL_MARKER_TTL;

/// What a cancellation does with a call that has its own message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jetstream) enum Removal {
    Allowed,
    /// The call has another message, or a final state.
    Moved,
    /// The cancel marker could expire before the removal ends.
    TooLate,
}

/// A step that completes the cancellation of a call with a tombstone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jetstream) enum Completion {
    FinalRecord,
    IdempotencyKey,
    RemoveTombstone,
}

/// The steps that complete a cancellation, in their order.
pub(in crate::jetstream) const COMPLETION: [Completion; 3] =
    [Completion::FinalRecord, Completion::IdempotencyKey, Completion::RemoveTombstone];

/// Time after the cancel marker was written in which the removal must be decided.
pub(in crate::jetstream) fn removal_timeout() -> Duration {
    CANCEL_MARKER_TTL / 2
}

/// Decides about a call with the message `sequence`. `stored` is the sequence of its message now, and `elapsed` the
/// time since the cancel marker was written.
pub(in crate::jetstream) fn removal(
    sequence: u64,
    stored: Option<u64>,
    finished: bool,
    elapsed: Duration,
) -> Removal {
    // The call may have been executed before the marker was written.
    if stored != Some(sequence) || finished {
        Removal::Moved
    } else if elapsed > removal_timeout() {
        Removal::TooLate
    } else {
        Removal::Allowed
    }
}
