//! A journal before the queue's file. What makes a commit slow is that the pages it writes lie apart; here they are
//! written once more, in one piece, and that piece is what a commit waits for. The pages themselves reach the disk when
//! the system writes them, at the latest when the journal is full.
//!
//! Until then a power failure may lose any of them: then they are taken from the journal before the file is opened.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::BufMut;
use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};
use uuid::Uuid;

/// The journal's length. Nothing is written behind it, so that its own length is never to be made durable.
const LENGTH: u64 = 32 << 20;
/// What one commit may write to it. One that writes more waits for its pages.
const LARGEST: usize = 4 << 20;
/// Records begin at multiples of this: a disk that fails while it writes one leaves those before as they are.
const BLOCK: usize = 4096;
/// A record's head: the round of the journal, the length of what follows, the length of the file, a checksum of all.
const HEAD: usize = 8 + 4 + 8 + 4;
/// Before a page, in a record: where it is in the file, and its length.
const PLACE: usize = 8 + 4;
/// So much room for the next record is kept.
const KEPT: usize = 256 << 10;

/// The queue's file, with its journal.
#[derive(Debug)]
pub(super) struct Journaled {
    file: FileBackend,
    /// `None`: there is no room for one.
    journal: Option<Mutex<Journal>>,
}

#[derive(Debug)]
struct Journal {
    file: File,
    /// Where the next record goes.
    end: u64,
    /// Told from any other of all that ever was: what is behind the last record is of another.
    round: u64,
    /// The next record, but for its head.
    record: Vec<u8>,
    /// The commit is too large for a record.
    overflows: bool,
    /// The length of the queue's file.
    length: u64,
    /// Something went wrong: what is in the journal may be needed.
    broken: bool,
}

impl Journaled {
    /// Opens the file at `path`, and its journal beside it. What only the journal has is put where it belongs.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        let journal = match Journal::open(&path.with_extension("journal"), &file) {
            Ok(journal) => Some(Mutex::new(journal)),
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                tracing::warn!(%error, "There is no room for the queue's journal: it will be slow");
                None
            }
            Err(error) => return Err(error),
        };
        let file = FileBackend::new(file).map_err(io::Error::other)?;
        Ok(Self { file, journal })
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
        self.file.read(offset, out)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let Some(mut journal) = self.journal() else { return self.file.set_len(length) };
        journal.length = length;
        journal.watch(self.file.set_len(length))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let Some(mut journal) = self.journal() else { return self.file.write(offset, data) };
        journal.note(offset, data);
        journal.watch(self.file.write(offset, data))
    }

    fn sync_data(&self) -> io::Result<()> {
        let Some(mut journal) = self.journal() else { return self.file.sync_data() };
        let synced = journal.commit(&self.file);
        journal.watch(synced)
    }

    fn close(&self) -> io::Result<()> {
        if let Some(mut journal) = self.journal()
            && !journal.broken
        {
            let synced = self.file.sync_data().and_then(|()| journal.empty());
            journal.watch(synced)?;
        }
        self.file.close()
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
    fn open(path: &Path, file: &File) -> io::Result<Self> {
        let journal = open(path)?;
        match journal.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let text = format!("{} is in use by another process", path.display());
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
            // The queue's file is locked, too, where that can be.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
        if journal.metadata()?.len() == LENGTH {
            replay(&journal, file)?;
        } else {
            make_room(&journal, path)?;
        }
        let mut journal = Self {
            length: file.metadata()?.len(),
            file: journal,
            end: 0,
            round: 0,
            record: Vec::new(),
            overflows: false,
            broken: false,
        };
        journal.empty()?;
        Ok(journal)
    }

    /// Begins anew: nothing that is in the journal is needed any more.
    fn empty(&mut self) -> io::Result<()> {
        self.file.write_all_at(&[0; BLOCK], 0)?;
        self.file.sync_data()?;
        self.begin();
        Ok(())
    }

    fn begin(&mut self) {
        (self.end, self.round) = (0, Uuid::new_v4().as_u64_pair().0);
    }

    fn note(&mut self, offset: u64, data: &[u8]) {
        if self.record.is_empty() {
            self.record.resize(HEAD, 0);
        }
        self.overflows |= self.record.len() + PLACE + data.len() > LARGEST;
        if !self.overflows {
            self.record.put_u64(offset);
            self.record.put_u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
            self.record.put_slice(data);
        }
    }

    /// Makes all that was noted durable.
    fn commit(&mut self, file: &FileBackend) -> io::Result<()> {
        if self.overflows {
            file.sync_data()?;
            // What is in the journal is older.
            self.empty()?;
        } else if !self.record.is_empty() {
            self.seal();
            if self.end + self.record.len() as u64 > LENGTH {
                file.sync_data()?;
                self.begin();
                self.seal();
            }
            self.file.write_all_at(&self.record, self.end)?;
            self.file.sync_data()?;
            self.end += self.record.len() as u64;
        }
        self.overflows = false;
        self.record.clear();
        self.record.shrink_to(KEPT);
        Ok(())
    }

    /// Writes the record's head, and has it end where another may begin.
    fn seal(&mut self) {
        self.record.resize(self.record.len().next_multiple_of(BLOCK), 0);
        let length = u32::try_from(self.record.len() - HEAD).unwrap_or(u32::MAX);
        let mut head = [0; HEAD];
        let (round, rest) = head.split_at_mut(8);
        round.copy_from_slice(&self.round.to_be_bytes());
        rest[..4].copy_from_slice(&length.to_be_bytes());
        rest[4..12].copy_from_slice(&self.length.to_be_bytes());
        self.record[..HEAD].copy_from_slice(&head);
        let sum = checksum(&self.record);
        self.record[HEAD - 4..HEAD].copy_from_slice(&sum.to_be_bytes());
    }

    fn watch<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        self.broken |= result.is_err();
        result
    }
}

/// Opens a file, or makes one that is its owner's alone: it will have bodies in it.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Of a record, but for the checksum itself.
fn checksum(record: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&record[..HEAD - 4]);
    sum.update(&record[HEAD..]);
    sum.finalize()
}

/// Writes the journal to its end once, so that its blocks are its own from then on.
fn make_room(journal: &File, path: &Path) -> io::Result<()> {
    let zeros = vec![0; 1 << 20];
    for offset in (0..LENGTH).step_by(zeros.len()) {
        if let Err(error) = journal.write_all_at(&zeros, offset) {
            // It must not take what others could use.
            let _ = journal.set_len(0);
            return Err(error);
        }
    }
    journal.set_len(LENGTH)?;
    journal.sync_all()?;
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

/// Puts into `file` what the records of `journal` hold, up to the first that is not whole.
fn replay(journal: &File, file: &File) -> io::Result<()> {
    let (mut start, mut round, mut records) = (0, None, 0);
    while let Some(record) = record_at(journal, start)? {
        let (of_round, rest) = record.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
        if *round.get_or_insert(*of_round) != *of_round {
            break;
        }
        let length = rest[4..12].try_into().map_or(0, u64::from_be_bytes);
        if file.metadata()?.len() != length {
            file.set_len(length)?;
        }
        let mut pages = &record[HEAD..];
        while let Some((offset, data, rest)) = page(pages) {
            file.write_all_at(data, offset)?;
            pages = rest;
        }
        start += record.len() as u64;
        records += 1;
    }
    if records > 0 {
        file.sync_all()?;
        tracing::info!(
            records,
            "The queue's file was not closed: its last changes were looked after"
        );
    }
    Ok(())
}

/// The record that begins at `start`; `None` if what is there is none.
fn record_at(journal: &File, start: u64) -> io::Result<Option<Vec<u8>>> {
    if start + BLOCK as u64 > LENGTH {
        return Ok(None);
    }
    let mut record = vec![0; BLOCK];
    journal.read_exact_at(&mut record, start)?;
    let length = record[8..12].try_into().map_or(0, u32::from_be_bytes) as usize + HEAD;
    if length > LARGEST + BLOCK || !length.is_multiple_of(BLOCK) || start + length as u64 > LENGTH {
        return Ok(None);
    }
    record.resize(length, 0);
    journal.read_exact_at(&mut record[BLOCK..], start + BLOCK as u64)?;
    let sum = record[HEAD - 4..HEAD].try_into().map_or(0, u32::from_be_bytes);
    Ok((sum == checksum(&record)).then_some(record))
}

/// The first page in what is left of a record, and the rest of it.
fn page(pages: &[u8]) -> Option<(u64, &[u8], &[u8])> {
    let (offset, rest) = pages.split_first_chunk::<8>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    // What fills up the last block is no page.
    let (data, rest) = rest.split_at_checked(length).filter(|_| length > 0)?;
    Some((u64::from_be_bytes(*offset), data, rest))
}

#[cfg(test)]
mod tests;
