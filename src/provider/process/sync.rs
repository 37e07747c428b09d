//! Locks that are held for a few lines and never across an await.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`. What it guards is never left half changed, so a panic of another holder spoils nothing.
pub(super) fn lock_unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
