//! How many calls may be forked at once, by all functions together. Without a bound a burst of calls would become as
//! many processes, and the machine would go down with them.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Places for forked calls. Nobody waits for one.
#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    pub(super) all: usize,
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Places {
    pub(super) fn new(all: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(all)), all }
    }

    /// Takes a place; `None` if there is none left.
    pub(super) fn take(&self) -> Option<Place> {
        Arc::clone(&self.free).try_acquire_owned().ok().map(|permit| Place { _permit: permit })
    }
}
