//! A read-only view of a queue's file: the pages of its log and the writes of redb are kept in memory.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use redb::{BackendError, StorageBackend};

use crate::embedded::wal::record::{BLOCK_BYTES, FileHeader, records};
use gateway_base::sync::lock_unpoisoned;

/// The start of each redb file.
const MAGIC: [u8; 9] = *b"redb\x1a\x0a\xa9\x0d\x0a";
/// Offset of the state byte in the header.
const STATE_OFFSET: usize = MAGIC.len();
/// Bits of the state: the file was not closed, and a commit of another process is not on the disk.
const UNCLEAN_BITS: u8 = 2 | 8;
/// Bit of the state: which of the two commit slots is the latest.
const LAST_COMMIT_BIT: u8 = 1;
/// Maximum number of reads per entry. A deeper tree has a cycle.
const MAX_READS_PER_ENTRY: usize = 1000;

/// The file, with its overlaid blocks.
#[derive(Debug)]
pub(super) struct Overlay {
    file: File,
    length: AtomicU64,
    /// Changed blocks by offset. A leaf; locks of redb may be held.
    blocks: Mutex<BTreeMap<u64, Vec<u8>>>,
    read_budget: Option<Arc<ReadBudget>>,
    /// The file's last commit is complete.
    is_complete: bool,
}

/// Number of reads since the last entry was found.
#[derive(Debug, Default)]
pub(super) struct ReadBudget(AtomicUsize);

impl ReadBudget {
    /// Called when an entry was found.
    pub(super) fn reset(&self) {
        self.0.store(0, Relaxed);
    }
}

impl Overlay {
    /// Opens the file at `path`, with the records of its log.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
            let text = "it is in use: stop the gateway first";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
        }
        let length = file.metadata()?.len();
        let is_closed = FileHeader::of(&file)?.is_closed();
        let overlay = Self {
            file,
            length: AtomicU64::new(length),
            blocks: Mutex::default(),
            read_budget: None,
            is_complete: is_closed,
        };
        let has_records = match File::open(path.with_extension("journal")) {
            Ok(journal) => overlay.add_journal(&journal)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        Ok(Self { is_complete: is_closed || has_records, ..overlay })
    }

    /// Returns whether the file's last commit is complete, so that redb must not roll it back.
    pub(super) fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// As [`Self::open`], but marks the file as closed, so that damaged files can be read. `before_last` selects the
    /// commit before the last one.
    pub(super) fn open_unchecked(
        path: &Path,
        before_last: bool,
    ) -> io::Result<(Self, Arc<ReadBudget>)> {
        let (overlay, read_budget) = (Self::open(path)?, Arc::<ReadBudget>::default());
        let mut header = vec![0; BLOCK_BYTES];
        overlay.read_at(0, &mut header)?;
        header[..STATE_OFFSET].copy_from_slice(&MAGIC);
        header[STATE_OFFSET] &= !UNCLEAN_BITS;
        header[STATE_OFFSET] ^= if before_last { LAST_COMMIT_BIT } else { 0 };
        overlay.write_at(0, &header)?;
        Ok((Self { read_budget: Some(Arc::clone(&read_budget)), ..overlay }, read_budget))
    }

    /// Overlays the pages of the log. Returns whether there were any.
    fn add_journal(&self, journal: &File) -> io::Result<bool> {
        let Some(records) = records(journal, &self.file)? else { return Ok(false) };
        self.length.store(records.length, Relaxed);
        records.pages(journal, |offset, page| self.write_at(offset, page))?;
        Ok(true)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        // Data beyond the end of the file is in the log, or was never written.
        let own = self.file.metadata()?.len().saturating_sub(offset);
        let own = usize::try_from(own).unwrap_or(usize::MAX).min(out.len());
        self.file.read_exact_at(&mut out[..own], offset)?;
        out[own..].fill(0);
        let blocks = lock_unpoisoned(&self.blocks);
        let (size, end) = (BLOCK_BYTES as u64, offset + out.len() as u64);
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
        let size = BLOCK_BYTES as u64;
        while !data.is_empty() {
            let start = offset / size * size;
            let at = usize::try_from(offset - start).unwrap_or(0);
            let (piece, rest) = data.split_at(data.len().min(BLOCK_BYTES - at));
            let mut block = vec![0; BLOCK_BYTES];
            if piece.len() < BLOCK_BYTES {
                self.read_at(start, &mut block)?;
            }
            block[at..at + piece.len()].copy_from_slice(piece);
            lock_unpoisoned(&self.blocks).insert(start, block);
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
        if let Some(read_budget) = &self.read_budget
            && read_budget.0.fetch_add(1, Relaxed) >= MAX_READS_PER_ENTRY
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the tree has a cycle"));
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
