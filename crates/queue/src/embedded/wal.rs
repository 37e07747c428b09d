//! A write-ahead log for the queue's file, stored as `queue.journal`. A commit of redb is slow because its pages are
//! scattered over the file. The log stores them once more, contiguously, and a commit only waits for that write. The
//! pages themselves reach the disk when the system writes them, at the latest when the log is full.
//!
//! Until then a power failure may lose any of them. They are restored from the log before the file is opened. The
//! file's header is written last, after the log record that contains it, so that it shows whether a log belongs to a
//! file. It does not if the file was changed without the log, or is a different file.
//!
//! A write to the log or the file may need blocks that neither has: one of them may be sparse, or be on a file system
//! that never overwrites a block. While the disk is full, those blocks come from the reserve.

mod flusher;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
pub(super) mod record;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};
use uuid::Uuid;

use crate::embedded::reserve::Reserve;
use crate::embedded::wal::flusher::Flusher;
use crate::embedded::wal::record::{BLOCK_BYTES, FileHeader, MAX_RECORD_BYTES, Record, replay};
use gateway_base::sync::lock_unpoisoned;

/// Length of the log. Nothing is written beyond it, so that its length never has to be synced.
pub(super) const WAL_BYTES: u64 = 32 << 20;
/// Number of background syncs of the file per epoch, so that little is left to sync when the log is full.
const FLUSHES_PER_EPOCH: u64 = 8;
/// Memory that is kept for the next record.
const RETAINED_BUFFER_BYTES: usize = 256 << 10;

/// The storage backend of redb: the queue's file and its log.
#[derive(Debug)]
pub(super) struct WalBackend {
    file: FileBackend,
    /// `None` if there is no disk space for a log. Rank 3: `store` of the queue and locks of redb may be held. Held
    /// during a write or a sync.
    wal: Option<Mutex<Wal>>,
    reserve: Arc<Reserve>,
    /// The file's last commit is complete.
    is_complete: bool,
}

#[derive(Debug)]
struct Wal {
    file: File,
    flusher: Flusher,
    reserve: Arc<Reserve>,
    /// Its length in bytes.
    capacity: u64,
    /// Offset of the next record.
    end: u64,
    /// Random number of this pass through the log. A record of another epoch ends the log.
    epoch: u64,
    record: Record,
    /// The commit is too large for a record.
    exceeds_record: bool,
    /// Length of the queue's file.
    length: u64,
    /// The header of the queue's file, and the one that the next commit writes.
    header: FileHeader,
    next_header: Option<Vec<u8>>,
    /// Digest of the header at the start of this epoch.
    base_digest: u64,
    /// A write failed. The log is kept, because the file may need it.
    poisoned: bool,
}

impl WalBackend {
    /// Opens the file at `path` and its log. Commits that only the log has are restored.
    pub(super) fn open(path: &Path, reserve: &Arc<Reserve>) -> io::Result<Self> {
        Self::open_with(path, WAL_BYTES, reserve)
    }

    fn open_with(path: &Path, length: u64, reserve: &Arc<Reserve>) -> io::Result<Self> {
        let file = open(path)?;
        let journal_path = path.with_extension("journal");
        let journal = open(&journal_path)?;
        let is_complete = replay(&journal, &file, reserve)? || FileHeader::of(&file)?.is_closed();
        // A process that was killed may have left unsynced pages in the file.
        reserve.retry_with(|| file.sync_all())?;
        if reserve.is_empty() && !reserve.fill()? {
            // The file is complete without the log, whose space is needed to settle calls.
            journal.set_len(0)?;
            reserve.fill()?;
        }
        let wal = if preallocate(&journal, &journal_path, length)? {
            Some(Mutex::new(Wal::start(journal, length, &file, reserve)?))
        } else {
            tracing::warn!(
                "There is no room for the queue's journal: without it, the queue is slow"
            );
            None
        };
        let file = FileBackend::new(file).map_err(io::Error::other)?;
        Ok(Self { file, wal, reserve: Arc::clone(reserve), is_complete })
    }

    /// Returns whether the file's last commit is complete, so that redb must not roll it back.
    pub(super) fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Returns whether there is a log.
    pub(super) fn has_wal(&self) -> bool {
        self.wal.is_some()
    }

    fn wal(&self) -> Option<MutexGuard<'_, Wal>> {
        let wal = self.wal.as_ref()?;
        Some(lock_unpoisoned(wal))
    }
}

impl StorageBackend for WalBackend {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)?;
        if offset == 0
            && let Some(wal) = self.wal()
            && let Some(header) = &wal.next_header
        {
            let length = out.len().min(header.len());
            out[..length].copy_from_slice(&header[..length]);
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let set = || self.reserve.retry_with(|| self.file.set_len(length));
        let Some(mut wal) = self.wal() else { return set() };
        wal.length = length;
        wal.track_error(set())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let write = || self.reserve.retry_with(|| self.file.write(offset, data));
        let Some(mut wal) = self.wal() else { return write() };
        wal.record_write(offset, data);
        if offset == 0 {
            wal.next_header = Some(data.to_vec());
            return Ok(());
        }
        wal.track_error(write())
    }

    fn sync_data(&self) -> io::Result<()> {
        let Some(mut wal) = self.wal() else {
            return self.file.sync_data();
        };
        let synced = wal.commit(&self.file);
        wal.track_error(synced)
    }

    fn close(&self) -> io::Result<()> {
        let closed = match self.wal() {
            Some(mut wal) if !wal.poisoned => {
                let closed = wal.close(&self.file);
                wal.track_error(closed)
            }
            _ => Ok(()),
        };
        // Close the file even after an error: this releases its locks.
        self.file.close()?;
        closed
    }

    fn try_lock_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(from, to)
    }

    fn try_lock_shared_range(
        &self,
        from: Bound<u64>,
        to: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(from, to)
    }

    fn lock_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(from, to)
    }

    fn lock_shared_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(from, to)
    }

    fn unlock_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(from, to)
    }

    fn query_lock_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(from, to)
    }
}

impl Wal {
    /// Starts a log for `file`, which must be synced.
    fn start(
        journal: File,
        capacity: u64,
        file: &File,
        reserve: &Arc<Reserve>,
    ) -> io::Result<Self> {
        let header = FileHeader::of(file)?;
        let mut journal = Self {
            file: journal,
            flusher: Flusher::start(file)?,
            reserve: Arc::clone(reserve),
            capacity,
            end: 0,
            epoch: 0,
            record: Record::default(),
            exceeds_record: false,
            length: file.metadata()?.len(),
            base_digest: header.digest(),
            header,
            next_header: None,
            poisoned: false,
        };
        journal.reset()?;
        Ok(journal)
    }

    /// Starts a new epoch. All pages in the log must be in the file and synced.
    fn reset(&mut self) -> io::Result<()> {
        self.reserve.retry_with(|| self.file.write_all_at(&[0; BLOCK_BYTES], 0))?;
        self.file.sync_data()?;
        (self.end, self.epoch) = (0, Uuid::new_v4().as_u64_pair().0);
        self.base_digest = self.header.digest();
        Ok(())
    }

    fn record_write(&mut self, offset: u64, data: &[u8]) {
        let max_bytes =
            MAX_RECORD_BYTES.min(usize::try_from(self.capacity).unwrap_or(MAX_RECORD_BYTES) / 2);
        self.exceeds_record |= self.record.length_with(data) > max_bytes;
        if !self.exceeds_record {
            self.record.add(offset, data);
        }
    }

    /// Makes the recorded writes durable.
    fn commit(&mut self, file: &FileBackend) -> io::Result<()> {
        self.flusher.check()?;
        if self.exceeds_record {
            // The pages are synced before the header is written: the log would not belong to a file with another
            // header.
            self.sync(file)?;
            self.reset()?;
            self.write_header(file)?;
            self.sync(file)?;
            self.base_digest = self.header.digest();
        } else if !self.record.is_empty() {
            if self.end + self.record.sealed_length() as u64 > self.capacity {
                self.sync(file)?;
                self.reset()?;
            }
            let sealed = self.record.seal(self.epoch, self.length, self.base_digest);
            self.reserve.retry_with(|| self.file.write_all_at(sealed, self.end))?;
            self.file.sync_data()?;
            let (before, part) = (self.end, self.capacity / FLUSHES_PER_EPOCH);
            self.end += sealed.len() as u64;
            self.write_header(file)?;
            if before / part != self.end / part {
                self.flusher.flush();
            }
        }
        self.exceeds_record = false;
        self.record.clear(RETAINED_BUFFER_BYTES);
        Ok(())
    }

    fn write_header(&mut self, file: &FileBackend) -> io::Result<()> {
        if let Some(header) = self.next_header.take() {
            self.reserve.retry_with(|| file.write(0, &header))?;
            self.header.change(&header);
        }
        Ok(())
    }

    fn close(&mut self, file: &FileBackend) -> io::Result<()> {
        self.flusher.check()?;
        self.write_header(file)?;
        self.sync(file)?;
        self.reset()
    }

    /// Syncs `file`, and waits for a background sync in progress.
    fn sync(&self, file: &FileBackend) -> io::Result<()> {
        file.sync_data()?;
        self.flusher.wait_for_sync()
    }

    fn track_error<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        self.poisoned |= result.is_err();
        result
    }
}

/// Opens a file exclusively, or creates one that only its owner can read: it will contain request bodies.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file =
        options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let text = format!("{} is in use by another process", path.display());
            Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
        }
        // Not fatal: redb locks its file by other means as well.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Allocates all blocks of the log by writing it once. Returns `false` if there is no disk space for it.
fn preallocate(journal: &File, path: &Path, length: u64) -> io::Result<bool> {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let metadata = journal.metadata()?;
    // A copied state directory may be sparse.
    if metadata.len() == length && metadata.blocks() * 512 >= length {
        return Ok(true);
    }
    let zeros = vec![0; 1 << 20];
    for offset in (0..length).step_by(zeros.len()) {
        if let Err(error) = journal.write_all_at(&zeros, offset) {
            // The space is returned for other uses.
            let _ = journal.set_len(0);
            let full = matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge);
            return if full { Ok(false) } else { Err(error) };
        }
    }
    journal.set_len(length)?;
    journal.sync_all()?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(true)
}

#[cfg(test)]
mod tests;
