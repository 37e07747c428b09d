//! Limits the number of forked calls of all functions. Without a limit, a burst of calls would start as many processes
//! and exhaust the machine.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Permits for forked calls. Acquiring one never waits.
#[derive(Debug)]
pub(super) struct ForkLimiter {
    semaphore: Arc<Semaphore>,
    pub(super) limit: usize,
}

/// A permit, released on drop.
#[derive(Debug)]
pub(super) struct ForkPermit {
    _permit: OwnedSemaphorePermit,
}

impl ForkLimiter {
    pub(super) fn new(limit: usize) -> Self {
        Self { semaphore: Arc::new(Semaphore::new(limit)), limit }
    }

    /// Acquires a permit; `None` if the limit is reached.
    pub(super) fn try_acquire(&self) -> Option<ForkPermit> {
        Arc::clone(&self.semaphore)
            .try_acquire_owned()
            .ok()
            .map(|permit| ForkPermit { _permit: permit })
    }
}
