//! Decides where a call is, if several places have something of it. No I/O.

use crate::jetstream::wire::records::Outcome;

/// The place that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jetstream) enum Place {
    Message,
    DeadLetter,
    FinalRecord,
}

/// Returns the latest place of a call. The arguments are the sequence of its message, and the sequences of messages
/// that a dead letter and a final record name. Removals may be missing, so the highest sequence counts.
pub(in crate::jetstream) fn latest(
    message: Option<u64>,
    dead_letter: Option<u64>,
    final_record: Option<u64>,
) -> Option<Place> {
    let latest = [message, dead_letter, final_record].into_iter().flatten().max()?;
    if dead_letter == Some(latest) {
        Some(Place::DeadLetter)
    } else if final_record == Some(latest) {
        Some(Place::FinalRecord)
    } else {
        Some(Place::Message)
    }
}

/// Returns whether the call with the message `sequence` has a final state. The other arguments are those of [`latest`].
pub(in crate::jetstream) fn is_final(
    sequence: u64,
    dead_letter: Option<u64>,
    final_record: Option<u64>,
) -> bool {
    dead_letter == Some(sequence) || final_record == Some(sequence)
}

/// Place of a call that was published in a batch and has no final state in its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jetstream) enum PlaceInBatch {
    /// The call is in the batch.
    Batch,
    /// The call is about to get its own message, or has it.
    Splitting,
    /// The call has or had its own message.
    Elsewhere,
    Purged,
}

/// Returns the place of a call with this outcome. `in_batch` tells whether the batch exists and contains the call.
pub(in crate::jetstream) fn place_in_batch(
    outcome: Option<&Outcome>,
    in_batch: bool,
) -> PlaceInBatch {
    match outcome {
        Some(Outcome::Splitting) => PlaceInBatch::Splitting,
        Some(Outcome::Split) => PlaceInBatch::Elsewhere,
        Some(Outcome::Finished { .. } | Outcome::Purged) => PlaceInBatch::Purged,
        None if in_batch => PlaceInBatch::Batch,
        None => PlaceInBatch::Elsewhere,
    }
}
