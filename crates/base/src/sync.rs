//! Locking, also after a thread has panicked while it held the lock. For data that is valid after each single change: a
//! panic in one request then does not fail all later ones. `docs/LOCKS.md` lists all locks and their order.

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Locks `mutex`.
pub fn lock_unpoisoned<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks `lock` for reading, together with other readers.
pub fn read_unpoisoned<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Locks `lock` for writing, alone.
pub fn write_unpoisoned<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_usable_after_its_holder_panicked() {
        let (mutex, lock) = (Mutex::new(1), RwLock::new(2));
        let panicked = std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let _guards = (lock_unpoisoned(&mutex), write_unpoisoned(&lock));
                panic!("while it holds the locks");
            });
            holder.join().is_err()
        });
        assert!(panicked && mutex.is_poisoned() && lock.is_poisoned());
        assert_eq!((*lock_unpoisoned(&mutex), *read_unpoisoned(&lock)), (1, 2));
        *write_unpoisoned(&lock) = 3;
        assert_eq!(*read_unpoisoned(&lock), 3);
    }
}
