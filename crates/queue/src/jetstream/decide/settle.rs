//! The order of the writes of a settlement. Each may be repeated. The message of the call is removed by the last one
//! that matters, so that a crash before it leads to a redelivery. No I/O.

use crate::status::Settlement;

/// A step of the settlement of a call that has its own message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jetstream) enum Step {
    /// Stores a response that is too large for the final record.
    Response,
    FinalRecord,
    /// Removes the dead letter that was redriven.
    RemoveRedriven,
    DeadLetter,
    /// Replaces the message by that of the next attempt.
    NextAttempt,
    /// Stores the entry of the idempotency key, if that is missing.
    IdempotencyKey,
    /// Acknowledges the message, which removes it.
    Acknowledge,
    RemoveBody,
}

/// A step of the settlement of a call in a batch. The end of the call in the batch follows all steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jetstream) enum BatchStep {
    /// Stores a response that is too large for the record.
    Response,
    /// Records the final state.
    Finished,
    /// Records that the call leaves the batch. If the record has another outcome, the other steps are skipped.
    Splitting,
    DeadLetter,
    /// Publishes the call as a message of its own.
    OwnMessage,
    /// Records that the call has left the batch.
    Split,
}

/// Returns the steps of a settlement in their order.
pub(in crate::jetstream) fn steps(settlement: &Settlement) -> &'static [Step] {
    match settlement {
        Settlement::Finished { .. } => &[
            Step::Response,
            Step::FinalRecord,
            Step::RemoveRedriven,
            Step::IdempotencyKey,
            Step::Acknowledge,
            Step::RemoveBody,
        ],
        Settlement::DeadLetter { .. } => {
            &[Step::Response, Step::DeadLetter, Step::IdempotencyKey, Step::Acknowledge]
        }
        Settlement::Retry { .. } => &[Step::NextAttempt, Step::Acknowledge],
    }
}

/// Returns the steps of the settlement of a call in a batch in their order.
pub(in crate::jetstream) fn batch_steps(settlement: &Settlement) -> &'static [BatchStep] {
    match settlement {
        Settlement::Finished { .. } => &[BatchStep::Response, BatchStep::Finished],
        Settlement::DeadLetter { .. } => {
            &[BatchStep::Response, BatchStep::Splitting, BatchStep::DeadLetter, BatchStep::Split]
        }
        Settlement::Retry { .. } => {
            &[BatchStep::Splitting, BatchStep::OwnMessage, BatchStep::Split]
        }
    }
}
