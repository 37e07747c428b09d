//! How the queue's file is read and changed, and what happens when that fails.

use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::queue::Error;
use crate::queue::embedded::Shared;
use crate::queue::embedded::change::Change;
use crate::queue::embedded::guard::{drop_guarded, guarded, is_damage};
use crate::queue::embedded::store::{self, Mark, Store, View};

/// What is wrong with the file at `path`, and what to do about it.
pub(super) fn remedy(path: &Path) -> String {
    let file = path.display();
    format!(
        "the queue's file {file} is damaged; `gateway queue check {file}` counts what can be read. \
         To go on, stop the gateway, copy that with `gateway queue salvage {file} OUT`, move {file} and its \
         .journal aside, and move OUT to {file}"
    )
}

/// How long a reader waits for a file that is being opened again.
const OPENED_WITHIN: Duration = Duration::from_secs(10);

impl Shared {
    pub(super) fn view<T>(&self, read: impl FnOnce(&View) -> store::Result<T>) -> Result<T, Error> {
        if self.damaged.load(Relaxed) {
            return Err(Error::Failed);
        }
        let read = {
            let store = self.store.read().unwrap_or_else(PoisonError::into_inner);
            let store = store.as_ref().ok_or(Error::Failed)?;
            guarded(|| read(&store.view()?))
        };
        read.map_err(|error| self.failed(&error))
    }

    /// Waits while the file is opened again after a failure, for a limited time: then reading it fails.
    pub(super) fn await_open(&self) {
        let (opening, ended) = &self.opening;
        let opening = opening.lock().unwrap_or_else(PoisonError::into_inner);
        drop(ended.wait_timeout_while(opening, OPENED_WITHIN, |opening| *opening));
    }

    fn set_opening(&self, is_opening: bool) {
        let (opening, ended) = &self.opening;
        *opening.lock().unwrap_or_else(PoisonError::into_inner) = is_opening;
        if !is_opening {
            ended.notify_all();
        }
    }

    /// Changes the file; opens it again if it has failed before. Called by one thread alone.
    pub(super) fn change<T>(
        &self,
        change: impl FnOnce(&mut Change<'_>) -> store::Result<T>,
    ) -> Result<T, Error> {
        self.reopen()?;
        let count = self.changes.load(Relaxed) + 1;
        let mark = Mark { changes: count, next: self.next.load(Relaxed) };
        let changed = {
            let store = self.store.read().unwrap_or_else(PoisonError::into_inner);
            let store = store.as_ref().ok_or(Error::Failed)?;
            guarded(|| store.change(mark, change))
        };
        self.usable.store(changed.is_ok(), Relaxed);
        match changed {
            Ok(changed) => {
                self.changes.store(count, Relaxed);
                Ok(changed)
            }
            Err(error) => {
                // After a failure redb refuses everything until the file is opened again.
                self.close();
                Err(self.failed(&error))
            }
        }
    }

    /// Compacts the file. Nobody reads it meanwhile.
    pub(super) fn compact(&self) {
        let compacted = {
            let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
            guarded(|| Ok(store.as_mut().map(Store::compact)))
        };
        let failure = match compacted {
            Ok(None | Some(Ok(()))) => return,
            Ok(Some(Err(error))) => error.into(),
            Err(error) => error,
        };
        self.failed(&failure);
        self.close();
        // If it fails, the next change tries again.
        let _ = self.reopen();
    }

    /// Closes the file. The writer opens it again at once, or with the next change.
    pub(super) fn close(&self) {
        drop_guarded(self.take_store());
    }

    /// Closes the file for good.
    pub(super) fn end(&self) {
        let closed = guarded(|| self.take_store().map_or(Ok(()), Store::close));
        if let Err(error) = closed {
            // The journal has what the file lacks.
            tracing::warn!(%error, "The queue's file could not be closed: it is repaired at the next start");
        }
        self.set_opening(false);
    }

    fn take_store(&self) -> Option<Store> {
        self.set_opening(!self.damaged.load(Relaxed));
        self.store.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Opens the file if it is closed. A change that failed may be in it all the same: then all is read again.
    pub(super) fn reopen(&self) -> Result<(), Error> {
        let opened = self.open_if_closed();
        self.set_opening(false);
        opened
    }

    fn open_if_closed(&self) -> Result<(), Error> {
        if self.damaged.load(Relaxed) {
            self.close();
            return Err(Error::Failed);
        }
        // Who reads for long must not hold up every change.
        if self.store.read().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let failed = |error: redb::Error| self.failed(&error);
        let store = Store::open(&self.path, &self.pressure.reserve).map_err(failed)?;
        let changes = guarded(|| store.mark()).map_err(failed)?.changes;
        if changes != self.changes.load(Relaxed) {
            let mut found = Vec::new();
            let next = guarded(|| store.read_all(|call| found.push(call))).map_err(failed)?;
            self.next.fetch_max(next, Relaxed);
            self.waiting().rebuild(found);
            self.changes.store(changes, Relaxed);
        }
        *self.store.write().unwrap_or_else(PoisonError::into_inner) = Some(store);
        tracing::info!("The queue's file is open again");
        self.ready.notify_one();
        Ok(())
    }

    /// What to say of a failure. A file that is damaged is not used any more.
    fn failed(&self, error: &redb::Error) -> Error {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        if is_damage(error) {
            self.usable.store(false, Relaxed);
            if !self.damaged.swap(true, Relaxed) {
                tracing::error!(%error, "{}", remedy(&self.path));
            }
            return Error::Failed;
        }
        tracing::error!(%error, "The queue's file failed");
        match error {
            redb::Error::Io(error)
                if matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge) =>
            {
                Error::NoSpace
            }
            _ => Error::Failed,
        }
    }
}
