//! How many calls may be forked at once, by all functions together. Without a bound a burst of calls would become as
//! many processes, and the machine would go down with them.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Places for forked calls. Nobody waits for one.
#[derive(Debug)]
pub(super) struct ForkLimiter {
    semaphore: Arc<Semaphore>,
    pub(super) limit: usize,
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub(super) struct ForkPermit {
    _permit: OwnedSemaphorePermit,
}

impl ForkLimiter {
    pub(super) fn new(limit: usize) -> Self {
        Self { semaphore: Arc::new(Semaphore::new(limit)), limit }
    }

    /// Takes a place; `None` if there is none left.
    pub(super) fn try_acquire(&self) -> Option<ForkPermit> {
        Arc::clone(&self.semaphore)
            .try_acquire_owned()
            .ok()
            .map(|permit| ForkPermit { _permit: permit })
    }
}
