//! Decides how the record of a batch changes, and what remains to be done with its calls. No I/O.

use std::time::Duration;

use crate::jetstream::wire::call_ref::BatchIndex;
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::records::{BatchRecord, Outcome};

/// What remains to be done with a call of a delivered batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jetstream) enum Remaining {
    Execute,
    /// Another process has begun to split the call out.
    CompleteSplit,
    Nothing,
}

/// Returns what remains to be done with a call.
pub(in crate::jetstream) fn remaining(record: &BatchRecord, index: BatchIndex) -> Remaining {
    match record.get(index) {
        None => Remaining::Execute,
        Some(Outcome::Splitting) => Remaining::CompleteSplit,
        Some(Outcome::Finished { .. } | Outcome::Split | Outcome::Purged) => Remaining::Nothing,
    }
}

/// Returns the record with outcomes of the process that holds the batch, if they are the last ones: it is then archived
/// at once, without being stored beside the batch.
pub(in crate::jetstream) fn final_record(
    record: &BatchRecord,
    key: BatchKey,
    outcomes: &[(BatchIndex, Outcome)],
) -> Option<BatchRecord> {
    let mut next = record.clone();
    let all_new = outcomes.iter().all(|(index, outcome)| next.set_outcome(*index, outcome.clone()));
    (all_new && next.is_final(key)).then_some(next)
}

/// Returns the record with these outcomes, and for each whether it is now the recorded one.
pub(in crate::jetstream) fn next_record(
    record: &BatchRecord,
    outcomes: &[(BatchIndex, Outcome)],
) -> (BatchRecord, Vec<bool>) {
    let mut next = record.clone();
    let mut accepted = Vec::with_capacity(outcomes.len());
    for (index, outcome) in outcomes {
        // An earlier write may have succeeded although its response was lost.
        accepted
            .push(next.set_outcome(*index, outcome.clone()) || next.get(*index) == Some(outcome));
    }
    (next, accepted)
}

/// Returns whether the record must be loaded before the first outcome is stored: the lease may have expired, and
/// another process may have finished the batch.
pub(in crate::jetstream) fn must_load(revision: u64, held: Duration, lease: Duration) -> bool {
    revision == 0 && held > lease / 2
}

/// Returns the record to archive when the process that holds the batch has finished all its calls.
pub(in crate::jetstream) fn closed(mut record: BatchRecord) -> BatchRecord {
    record.mark_all_split();
    record
}
