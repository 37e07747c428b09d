//! Access to the queue's file, and recovery from failures.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::Error;
use crate::embedded::Shared;
use crate::embedded::panic_guard::{catch_panic, drop_catching_panic, is_corruption};
use crate::embedded::store::{Snapshot, Store, Watermark};
use crate::embedded::tables;
use crate::embedded::write_txn::WriteTxn;
use gateway_base::sync::{lock_unpoisoned, read_unpoisoned, write_unpoisoned};

/// Describes the damage of the file at `path` and its remedy.
pub(super) fn remedy(path: &Path) -> String {
    let file = path.display();
    format!(
        "the queue's file {file} is damaged; `gateway queue check {file}` counts what can be read. \
         To go on, stop the gateway, copy that with `gateway queue salvage {file} OUT`, move {file} and its \
         .journal aside, and move OUT to {file}"
    )
}

/// Time for which a reader waits for a file that is being reopened.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

impl Shared {
    pub(super) fn read_snapshot<T>(
        &self,
        read: impl FnOnce(&Snapshot) -> tables::Result<T>,
    ) -> Result<T, Error> {
        if self.damaged.load(Relaxed) {
            return Err(Error::Failed);
        }
        let read = {
            let store = read_unpoisoned(&self.store);
            let store = store.as_ref().ok_or(Error::Failed)?;
            catch_panic(|| read(&store.snapshot()?))
        };
        read.map_err(|error| self.to_queue_error(&error))
    }

    /// Waits while the file is being reopened after a failure. After a timeout, reading it fails.
    pub(super) fn wait_until_open(&self) {
        let (opening, ended) = &self.opening;
        let opening = lock_unpoisoned(opening);
        drop(ended.wait_timeout_while(opening, OPEN_TIMEOUT, |opening| *opening));
    }

    fn set_opening(&self, is_opening: bool) {
        let (opening, ended) = &self.opening;
        *lock_unpoisoned(opening) = is_opening;
        if !is_opening {
            ended.notify_all();
        }
    }

    /// Runs a write transaction. Reopens the file first if it failed before. Only the writer thread calls this.
    pub(super) fn write<T>(
        &self,
        txn: impl FnOnce(&mut WriteTxn<'_>) -> tables::Result<T>,
    ) -> Result<T, Error> {
        self.reopen()?;
        let count = self.change_count.load(Relaxed) + 1;
        let watermark = Watermark { changes: count, next: self.next_number.load(Relaxed) };
        let changed = {
            let store = read_unpoisoned(&self.store);
            let store = store.as_ref().ok_or(Error::Failed)?;
            catch_panic(|| store.write(watermark, txn))
        };
        self.usable.store(changed.is_ok(), Relaxed);
        match changed {
            Ok(changed) => {
                self.change_count.store(count, Relaxed);
                Ok(changed)
            }
            Err(error) => {
                // After a failure redb refuses all access until the file is reopened.
                self.close();
                Err(self.to_queue_error(&error))
            }
        }
    }

    /// Compacts the file. Readers are locked out meanwhile.
    pub(super) fn compact(&self) {
        let compacted = {
            let mut store = write_unpoisoned(&self.store);
            catch_panic(|| Ok(store.as_mut().map(Store::compact)))
        };
        let failure = match compacted {
            Ok(None | Some(Ok(()))) => return,
            Ok(Some(Err(error))) => error.into(),
            Err(error) => error,
        };
        self.to_queue_error(&failure);
        self.close();
        // If this fails, the next write tries again.
        let _ = self.reopen();
    }

    /// Closes the file. The writer reopens it, at the latest for the next write.
    pub(super) fn close(&self) {
        drop_catching_panic(self.take_store());
    }

    /// Closes the file; it is not reopened.
    pub(super) fn close_finally(&self) {
        let closed = catch_panic(|| self.take_store().map_or(Ok(()), Store::close));
        if let Err(error) = closed {
            // The log has what the file lacks.
            tracing::warn!(%error, "The queue's file could not be closed: it is repaired at the next start");
        }
        self.set_opening(false);
    }

    fn take_store(&self) -> Option<Store> {
        self.set_opening(!self.damaged.load(Relaxed));
        write_unpoisoned(&self.store).take()
    }

    /// Reopens the file if it is closed. A failed commit may be in it nevertheless: then all state is rebuilt from the
    /// file.
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
        // A read lock is enough here: a long read must not delay every write.
        if read_unpoisoned(&self.store).is_some() {
            return Ok(());
        }
        let failed = |error: redb::Error| self.to_queue_error(&error);
        let store = Store::open(&self.path, &self.pressure.reserve).map_err(failed)?;
        let changes = catch_panic(|| store.watermark()).map_err(failed)?.changes;
        if changes != self.change_count.load(Relaxed) {
            let mut calls = Vec::new();
            let next = catch_panic(|| store.read_all(|call| calls.push(call))).map_err(failed)?;
            self.next_number.fetch_max(next, Relaxed);
            self.state().rebuild(calls);
            self.change_count.store(changes, Relaxed);
        }
        *write_unpoisoned(&self.store) = Some(store);
        tracing::info!("The queue's file is open again");
        self.ready.notify_one();
        Ok(())
    }

    /// Converts a storage error, and logs it. A damaged file is not used any more.
    fn to_queue_error(&self, error: &redb::Error) -> Error {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        if is_corruption(error) {
            self.usable.store(false, Relaxed);
            if !self.damaged.swap(true, Relaxed) {
                tracing::error!(%error, "{}", remedy(&self.path));
            }
            return Error::Failed;
        }
        tracing::error!(%error, "Access to the queue's file failed");
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
