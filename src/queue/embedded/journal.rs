//! A journal before the queue's file. What makes a commit slow is that the pages it writes lie apart; here they are
//! written once more, in one piece, and that piece is what a commit waits for. The pages themselves reach the disk when
//! the system writes them, at the latest when the journal is full.
//!
//! Until then a power failure may lose any of them: then they are taken from the journal before the file is opened. The
//! file's header is written last, after the record that has it, so that it tells whether a journal belongs to a file:
//! to one that was changed without it, or another, it does not.
//!
//! A write to the journal or the file may need blocks that neither has: one of them can be sparse, or lie on a file
//! system that never overwrites a block. While the disk is full, those blocks come from the reserve.

mod flusher;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
pub(super) mod record;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};
use uuid::Uuid;

use crate::queue::embedded::journal::flusher::Flusher;
use crate::queue::embedded::journal::record::{BLOCK, Header, LARGEST, Record, replay};
use crate::queue::embedded::reserve::Reserve;

/// The journal's length. Nothing is written behind it, so that its own length is never to be made durable.
pub(super) const LENGTH: u64 = 32 << 20;
/// So often in a round the file is written to the disk beside the commits, so that little is left to wait for when the
/// journal is full.
const FLUSHES: u64 = 8;
/// So much room for the next record is kept.
const KEPT: usize = 256 << 10;

/// The queue's file, with its journal.
#[derive(Debug)]
pub(super) struct Journaled {
    file: FileBackend,
    /// `None`: there is no room for one.
    journal: Option<Mutex<Journal>>,
    reserve: Arc<Reserve>,
    /// Nothing of the file's last commit is missing.
    is_whole: bool,
}

#[derive(Debug)]
struct Journal {
    file: File,
    flusher: Flusher,
    reserve: Arc<Reserve>,
    /// Its length.
    room: u64,
    /// Where the next record goes.
    end: u64,
    /// Told from any other of all that ever was: what is behind the last record is of another.
    round: u64,
    record: Record,
    /// The commit is too large for a record.
    overflows: bool,
    /// The length of the queue's file.
    length: u64,
    /// The header of the queue's file, and the one that it is about to have.
    header: Header,
    next_header: Option<Vec<u8>>,
    /// What the header was when this round began.
    base: u64,
    /// Something went wrong: what is in the journal may be needed.
    broken: bool,
}

impl Journaled {
    /// Opens the file at `path`, and its journal beside it. What only the journal has is put where it belongs.
    pub(super) fn open(path: &Path, reserve: &Arc<Reserve>) -> io::Result<Self> {
        Self::open_with(path, LENGTH, reserve)
    }

    fn open_with(path: &Path, length: u64, reserve: &Arc<Reserve>) -> io::Result<Self> {
        let file = open(path)?;
        let beside = path.with_extension("journal");
        let journal = open(&beside)?;
        let is_whole = replay(&journal, &file, reserve)? || Header::of(&file)?.is_closed();
        // Whatever is in the file, of a process that was killed, is not undone any more.
        reserve.with(|| file.sync_all())?;
        if reserve.is_empty() && !reserve.fill()? {
            // The file is whole without its journal, and calls that are queued can be settled with its space.
            journal.set_len(0)?;
            reserve.fill()?;
        }
        let journal = if make_room(&journal, &beside, length)? {
            Some(Mutex::new(Journal::begin(journal, length, &file, reserve)?))
        } else {
            tracing::warn!(
                "There is no room for the queue's journal: without it, the queue is slow"
            );
            None
        };
        let file = FileBackend::new(file).map_err(io::Error::other)?;
        Ok(Self { file, journal, reserve: Arc::clone(reserve), is_whole })
    }

    /// Whether nothing of the file's last commit is missing: redb must not undo that.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whether there is a journal.
    pub(super) fn has_journal(&self) -> bool {
        self.journal.is_some()
    }

    fn journal(&self) -> Option<MutexGuard<'_, Journal>> {
        let journal = self.journal.as_ref()?;
        Some(journal.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl StorageBackend for Journaled {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)?;
        if offset == 0
            && let Some(journal) = self.journal()
            && let Some(header) = &journal.next_header
        {
            let length = out.len().min(header.len());
            out[..length].copy_from_slice(&header[..length]);
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let set = || self.reserve.with(|| self.file.set_len(length));
        let Some(mut journal) = self.journal() else { return set() };
        journal.length = length;
        journal.watch(set())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let write = || self.reserve.with(|| self.file.write(offset, data));
        let Some(mut journal) = self.journal() else { return write() };
        journal.note(offset, data);
        if offset == 0 {
            journal.next_header = Some(data.to_vec());
            return Ok(());
        }
        journal.watch(write())
    }

    fn sync_data(&self) -> io::Result<()> {
        let Some(mut journal) = self.journal() else {
            return self.file.sync_data();
        };
        let synced = journal.commit(&self.file);
        journal.watch(synced)
    }

    fn close(&self) -> io::Result<()> {
        let closed = match self.journal() {
            Some(mut journal) if !journal.broken => {
                let closed = journal.close(&self.file);
                journal.watch(closed)
            }
            _ => Ok(()),
        };
        // Its locks go, whatever became of the rest.
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

impl Journal {
    /// Begins a journal for `file`, all of which is on the disk.
    fn begin(journal: File, room: u64, file: &File, reserve: &Arc<Reserve>) -> io::Result<Self> {
        let header = Header::of(file)?;
        let mut journal = Self {
            file: journal,
            flusher: Flusher::start(file)?,
            reserve: Arc::clone(reserve),
            room,
            end: 0,
            round: 0,
            record: Record::default(),
            overflows: false,
            length: file.metadata()?.len(),
            base: header.digest(),
            header,
            next_header: None,
            broken: false,
        };
        journal.empty()?;
        Ok(journal)
    }

    /// Begins anew: all that is in the journal is in the file, and on the disk.
    fn empty(&mut self) -> io::Result<()> {
        self.reserve.with(|| self.file.write_all_at(&[0; BLOCK], 0))?;
        self.file.sync_data()?;
        (self.end, self.round) = (0, Uuid::new_v4().as_u64_pair().0);
        self.base = self.header.digest();
        Ok(())
    }

    fn note(&mut self, offset: u64, data: &[u8]) {
        let most = LARGEST.min(usize::try_from(self.room).unwrap_or(LARGEST) / 2);
        self.overflows |= self.record.length_with(data) > most;
        if !self.overflows {
            self.record.add(offset, data);
        }
    }

    /// Makes all that was noted durable.
    fn commit(&mut self, file: &FileBackend) -> io::Result<()> {
        self.flusher.check()?;
        if self.overflows {
            // The pages before the header: what is in the journal would not fit to a file with another.
            self.sync(file)?;
            self.empty()?;
            self.write_header(file)?;
            self.sync(file)?;
            self.base = self.header.digest();
        } else if !self.record.is_empty() {
            if self.end + self.record.sealed_length() as u64 > self.room {
                self.sync(file)?;
                self.empty()?;
            }
            let sealed = self.record.seal(self.round, self.length, self.base);
            self.reserve.with(|| self.file.write_all_at(sealed, self.end))?;
            self.file.sync_data()?;
            let (before, part) = (self.end, self.room / FLUSHES);
            self.end += sealed.len() as u64;
            self.write_header(file)?;
            if before / part != self.end / part {
                self.flusher.flush();
            }
        }
        self.overflows = false;
        self.record.clear(KEPT);
        Ok(())
    }

    fn write_header(&mut self, file: &FileBackend) -> io::Result<()> {
        if let Some(header) = self.next_header.take() {
            self.reserve.with(|| file.write(0, &header))?;
            self.header.change(&header);
        }
        Ok(())
    }

    fn close(&mut self, file: &FileBackend) -> io::Result<()> {
        self.flusher.check()?;
        self.write_header(file)?;
        self.sync(file)?;
        self.empty()
    }

    /// Waits until all of `file` is on the disk.
    fn sync(&self, file: &FileBackend) -> io::Result<()> {
        file.sync_data()?;
        self.flusher.finish()
    }

    fn watch<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        self.broken |= result.is_err();
        result
    }
}

/// Opens a file for this process alone, or makes one that is its owner's alone: it will have bodies in it.
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
        // redb locks its file in another way, too.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Gives the journal its length and its blocks: it is written to its end once. `false` if there is no room for that.
fn make_room(journal: &File, path: &Path, length: u64) -> io::Result<bool> {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let known = journal.metadata()?;
    // A copy of a state directory may be sparse.
    if known.len() == length && known.blocks() * 512 >= length {
        return Ok(true);
    }
    let zeros = vec![0; 1 << 20];
    for offset in (0..length).step_by(zeros.len()) {
        if let Err(error) = journal.write_all_at(&zeros, offset) {
            // It must not take what others could use.
            let _ = journal.set_len(0);
            let full = matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge);
            return if full { Ok(false) } else { Err(error) };
        }
    }
    journal.set_len(length)?;
    journal.sync_all()?;
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(true)
}

#[cfg(test)]
mod tests;
