//! Errors and degraded states of a queue.

/// Errors of queue operations.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the queue is full")]
    Full,
    #[error("the disk of the queue is full")]
    NoSpace,
    #[error("the queue cannot be reached")]
    Unreachable,
    #[error(
        "the queue has not confirmed the call, which may be stored: sent again with the same X-Call-Id, it is executed once"
    )]
    Unconfirmed,
    #[error("the queue failed")]
    Failed,
    #[error("the body exceeds the queue's limit: {0} bytes")]
    TooLarge(usize),
    #[error("the headers and the target exceed the queue's limit: {0} bytes")]
    HeadTooLarge(usize),
    #[error("the lease of the call was lost")]
    Gone,
}

/// Degraded states of a queue that still works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing is enqueued. Calls that are already queued are still executed.
    DiskFull,
    /// Some calls are damaged. They stay in the file and are not executed.
    DamagedCalls,
    /// The queue's file is damaged and no longer used.
    Damaged,
}
