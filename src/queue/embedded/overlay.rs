//! A queue's file that is looked at and not changed: what its journal has, and what redb writes, is laid over it.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use redb::{BackendError, StorageBackend};

use crate::queue::embedded::journal::record::{BLOCK, Header, records};

/// With what each file begins.
const MAGIC: [u8; 9] = *b"redb\x1a\x0a\xa9\x0d\x0a";
/// In a file's header: how it was left.
const STATE: usize = MAGIC.len();
/// Of that: it was not closed, and a commit of another process is not on the disk.
const UNCLEAN: u8 = 2 | 8;
/// Of that: which of the two last commits is the last.
const LAST: u8 = 1;
/// The most reads that lead to an entry: a deeper tree has a cycle.
const READS: usize = 1000;

/// The file.
#[derive(Debug)]
pub(super) struct Overlay {
    file: File,
    length: AtomicU64,
    blocks: Mutex<BTreeMap<u64, Vec<u8>>>,
    reads: Option<Arc<Reads>>,
    /// Nothing of the file's last commit is missing.
    is_whole: bool,
}

/// How often the file may be read before the next entry must have been found.
#[derive(Debug, Default)]
pub(super) struct Reads(AtomicUsize);

impl Reads {
    /// An entry was found.
    pub(super) fn begin(&self) {
        self.0.store(0, Relaxed);
    }
}

impl Overlay {
    /// The file at `path` as redb would find it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
            let text = "it is in use: stop the gateway first";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
        }
        let length = file.metadata()?.len();
        let is_closed = Header::of(&file)?.is_closed();
        let overlay = Self {
            file,
            length: AtomicU64::new(length),
            blocks: Mutex::default(),
            reads: None,
            is_whole: is_closed,
        };
        let has_records = match File::open(path.with_extension("journal")) {
            Ok(journal) => overlay.add_journal(&journal)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        Ok(Self { is_whole: is_closed || has_records, ..overlay })
    }

    /// Whether nothing of the file's last commit is missing, as when the queue is opened: redb must not undo that.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// The same, for who reads it however it was left and whatever is wrong with it; `before_last`: without the last
    /// commit.
    pub(super) fn open_as_it_is(path: &Path, before_last: bool) -> io::Result<(Self, Arc<Reads>)> {
        let (overlay, reads) = (Self::open(path)?, Arc::<Reads>::default());
        let mut header = vec![0; BLOCK];
        overlay.read_at(0, &mut header)?;
        header[..STATE].copy_from_slice(&MAGIC);
        header[STATE] &= !UNCLEAN;
        header[STATE] ^= if before_last { LAST } else { 0 };
        overlay.write_at(0, &header)?;
        Ok((Self { reads: Some(Arc::clone(&reads)), ..overlay }, reads))
    }

    /// Lays what the journal has over the file; whether there was anything.
    fn add_journal(&self, journal: &File) -> io::Result<bool> {
        let Some(records) = records(journal, &self.file)? else { return Ok(false) };
        self.length.store(records.length, Relaxed);
        records.pages(journal, |offset, page| self.write_at(offset, page))?;
        Ok(true)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        // What lies behind the file's own end is in the journal, or was never written.
        let own = self.file.metadata()?.len().saturating_sub(offset);
        let own = usize::try_from(own).unwrap_or(usize::MAX).min(out.len());
        self.file.read_exact_at(&mut out[..own], offset)?;
        out[own..].fill(0);
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let (size, end) = (BLOCK as u64, offset + out.len() as u64);
        for (start, block) in blocks.range(offset / size * size..end) {
            let from = offset.max(*start);
            let to = end.min(start + size);
            let place = |at: u64, base: u64| usize::try_from(at - base).unwrap_or(0);
            out[place(from, offset)..place(to, offset)]
                .copy_from_slice(&block[place(from, *start)..place(to, *start)]);
        }
        Ok(())
    }

    fn write_at(&self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        let size = BLOCK as u64;
        while !data.is_empty() {
            let start = offset / size * size;
            let at = usize::try_from(offset - start).unwrap_or(0);
            let (piece, rest) = data.split_at(data.len().min(BLOCK - at));
            let mut block = vec![0; BLOCK];
            if piece.len() < BLOCK {
                self.read_at(start, &mut block)?;
            }
            block[at..at + piece.len()].copy_from_slice(piece);
            self.blocks.lock().unwrap_or_else(PoisonError::into_inner).insert(start, block);
            (offset, data) = (offset + piece.len() as u64, rest);
        }
        Ok(())
    }
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.length.load(Relaxed))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if let Some(reads) = &self.reads
            && reads.0.fetch_add(1, Relaxed) >= READS
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a tree that has no end"));
        }
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.length.load(Relaxed)) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        self.read_at(offset, out)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.length.store(length, Relaxed);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_at(offset, data)
    }

    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn try_lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn unlock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn query_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(false)
    }
}
