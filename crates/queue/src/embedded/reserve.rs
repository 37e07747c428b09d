//! Disk space reserved for the settlement of queued calls.
//!
//! A settlement needs space before it frees any, because the queue's file is copy-on-write. The reserve is a file of
//! allocated blocks beside it. When the disk is full, the reserve returns its space in steps, each for a write that
//! failed. It is refilled as soon as the disk has space. Operations that enqueue calls must not use it, nor commits
//! larger than [`Reserve::max_commit_bytes`].

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};

/// Maximum size of the reserve. It is at most an eighth of the disk.
const MAX_RESERVE_BYTES: u64 = 16 << 20;
/// Size of the steps in which the reserve shrinks and grows.
const STEP_BYTES: u64 = 1 << 20;
/// One commit may write this fraction of the reserve, since redb reuses the space that a commit freed two commits
/// later.
const MAX_COMMITS_IN_RESERVE: u64 = 8;
const MIN_COMMIT_BYTES: usize = 128 << 10;

/// The file `queue.reserve`.
#[derive(Debug)]
pub(super) struct Reserve {
    file: File,
    /// Allocated bytes.
    length: AtomicU64,
    /// Bytes to allocate.
    target: AtomicU64,
    /// Whether a write that fails for lack of space may use the reserve.
    usable: AtomicBool,
}

impl Reserve {
    /// Opens the reserve at `path`, and fills it as far as the disk has space.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let metadata = file.metadata()?;
        // A copied state directory may be sparse.
        let allocated = metadata.blocks() * 512;
        let length = if allocated >= metadata.len() { metadata.len() } else { 0 };
        if length == 0 {
            file.set_len(0)?;
        }
        let disk = fstatvfs(&file)?;
        let eighth = disk.f_blocks.saturating_mul(disk.f_frsize) / 8;
        let target = (eighth / STEP_BYTES * STEP_BYTES).clamp(STEP_BYTES, MAX_RESERVE_BYTES);
        let reserve = Self {
            file,
            length: AtomicU64::new(length),
            target: AtomicU64::new(target),
            usable: AtomicBool::new(true),
        };
        if length > target {
            reserve.shrink(length - target)?;
        }
        reserve.fill()?;
        Ok(reserve)
    }

    /// An empty reserve that must not be used.
    #[cfg(any(test, fuzzing))]
    pub(super) fn none(beside: &File) -> io::Result<Self> {
        let (length, target) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self { file: beside.try_clone()?, length, target, usable: AtomicBool::new(false) })
    }

    /// Returns whether the whole reserve is allocated.
    pub(super) fn is_full(&self) -> bool {
        self.length.load(Relaxed) >= self.target.load(Relaxed)
    }

    /// Returns whether less than half of the reserve is left, so that space must be saved.
    pub(super) fn is_low(&self) -> bool {
        self.length.load(Relaxed) < self.target.load(Relaxed) / 2
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length.load(Relaxed) == 0
    }

    /// Maximum number of bytes that one commit may write while the disk is full.
    pub(super) fn max_commit_bytes(&self) -> usize {
        let bytes = self.target.load(Relaxed) / MAX_COMMITS_IN_RESERVE;
        usize::try_from(bytes).unwrap_or(usize::MAX).max(MIN_COMMIT_BYTES)
    }

    /// Minimum of free bytes, besides a full reserve, that are required before calls are enqueued again.
    pub(super) fn margin(&self) -> u64 {
        self.target.load(Relaxed) / 4
    }

    /// Maximum of free bytes that are required before a call of any size is enqueued again.
    pub(super) fn target(&self) -> u64 {
        self.target.load(Relaxed)
    }

    /// Allows or forbids writes to use the reserve.
    pub(super) fn set_usable(&self, usable: bool) {
        self.usable.store(usable, Relaxed);
    }

    /// Free bytes on the disk for this process.
    pub(super) fn available(&self) -> u64 {
        let disk = fstatvfs(&self.file);
        disk.map_or(0, |disk| disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// Allocates missing blocks, as far as the disk has space. Returns whether the reserve is full.
    pub(super) fn fill(&self) -> io::Result<bool> {
        while !self.is_full() {
            let length = self.length.load(Relaxed);
            match allocate(&self.file, length, STEP_BYTES) {
                Ok(()) => self.length.store(length + STEP_BYTES, Relaxed),
                Err(error) => {
                    // A part of the step may have been allocated.
                    self.file.set_len(length)?;
                    match error.kind() {
                        // The file size limit (`ulimit -f`) is reached: the reserve cannot become larger.
                        io::ErrorKind::FileTooLarge => self.target.store(length, Relaxed),
                        _ if is_out_of_space(&error) => return Ok(false),
                        _ => return Err(error),
                    }
                }
            }
        }
        Ok(true)
    }

    /// Runs `write`, and repeats it with a step of the reserve each time it fails for lack of space.
    pub(super) fn retry_with<T>(&self, mut write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match write() {
                Err(error) if is_out_of_space(&error) && self.release() => {}
                done => return done,
            }
        }
    }

    /// Returns one step to the disk. Returns `false` if the reserve is empty or must not be used.
    fn release(&self) -> bool {
        let usable = self.usable.load(Relaxed) && !self.is_empty();
        usable && self.shrink(STEP_BYTES).is_ok()
    }

    fn shrink(&self, by: u64) -> io::Result<()> {
        let length = self.length.load(Relaxed).saturating_sub(by);
        self.file.set_len(length)?;
        self.length.store(length, Relaxed);
        // Some file systems free the space only on sync.
        self.file.sync_all()
    }
}

/// Returns whether `error` means that the disk or the user's quota is full.
pub(super) fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Allocates `length` bytes of `file` at `offset`.
fn allocate(file: &File, offset: u64, length: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), offset, length) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => {
            // Not supported by the file system: write zeros instead.
            let zeros = vec![0; usize::try_from(length).unwrap_or(0)];
            file.write_all_at(&zeros, offset)?;
            file.sync_data()
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> io::Error {
        io::Error::from(io::ErrorKind::StorageFull)
    }

    #[test]
    fn the_reserve_is_allocated_and_refilled() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.reserve");
        let reserve = Reserve::open(&path).unwrap();
        let allocated = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let whole = reserve.target();
        assert!(reserve.is_full() && allocated() >= whole, "{}", allocated());
        // Two failing writes use one step each.
        let mut failures = 2;
        let written = reserve.retry_with(|| {
            failures -= 1;
            if failures >= 0 { Err(full()) } else { Ok("written") }
        });
        assert_eq!(written.unwrap(), "written");
        assert!(!reserve.is_full() && allocated() < whole);
        assert!(reserve.fill().unwrap() && allocated() >= whole);
    }

    #[test]
    fn space_is_released_only_when_allowed_and_until_empty() {
        let directory = tempfile::tempdir().unwrap();
        let reserve = Reserve::open(&directory.path().join("queue.reserve")).unwrap();
        reserve.set_usable(false);
        assert!(reserve.retry_with(|| Err::<(), _>(full())).is_err() && reserve.is_full());
        reserve.set_usable(true);
        // Other errors do not release space.
        assert!(reserve.retry_with(|| Err::<(), _>(io::Error::other("broken"))).is_err());
        assert!(reserve.is_full());
        assert!(reserve.retry_with(|| Err::<(), _>(full())).is_err() && reserve.is_empty());
        assert!(reserve.is_low());
    }

    #[test]
    fn a_sparse_reserve_is_allocated() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.reserve");
        File::create(&path).unwrap().set_len(MAX_RESERVE_BYTES).unwrap();
        let reserve = Reserve::open(&path).unwrap();
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= reserve.target());
    }
}
