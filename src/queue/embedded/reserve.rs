//! Disk space that is kept for settling calls that are queued already.
//!
//! A settlement needs space before it frees any: the queue's file is copied on write. So a file of allocated blocks lies
//! beside it. When the disk is full, the reserve gives its space back in steps, each for a write that failed. It is
//! filled again as soon as the disk has room. What enqueues calls must not use it, nor a change larger than
//! [`Reserve::part`].

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};

/// The size of the reserve. It is an eighth of the disk where that is less.
const LENGTH: u64 = 16 << 20;
/// The steps in which the reserve shrinks and grows.
const STEP: u64 = 1 << 20;
/// One change writes at most this part of the reserve, since redb reuses what a change has freed two changes later.
const PART: u64 = 8;
const SMALLEST_PART: usize = 128 << 10;

/// The file `queue.reserve`.
#[derive(Debug)]
pub(super) struct Reserve {
    file: File,
    /// How much is allocated now.
    length: AtomicU64,
    /// How much is to be allocated.
    target: AtomicU64,
    /// Whether a write that fails for want of space may use it.
    usable: AtomicBool,
}

impl Reserve {
    /// Opens the reserve at `path`, and fills it as far as the disk has room.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let known = file.metadata()?;
        // A copy of a state directory may be sparse.
        let allocated = known.blocks() * 512;
        let length = if allocated >= known.len() { known.len() } else { 0 };
        if length == 0 {
            file.set_len(0)?;
        }
        let disk = fstatvfs(&file)?;
        let eighth = disk.f_blocks.saturating_mul(disk.f_frsize) / 8;
        let target = (eighth / STEP * STEP).clamp(STEP, LENGTH);
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

    /// No reserve, for a check that needs none.
    #[cfg(any(test, fuzzing))]
    pub(super) fn none(beside: &File) -> io::Result<Self> {
        let (length, target) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self { file: beside.try_clone()?, length, target, usable: AtomicBool::new(false) })
    }

    /// Whether all of it is allocated.
    pub(super) fn is_full(&self) -> bool {
        self.length.load(Relaxed) >= self.target.load(Relaxed)
    }

    /// Whether so much of it is in use that space has to be saved.
    pub(super) fn is_low(&self) -> bool {
        self.length.load(Relaxed) < self.target.load(Relaxed) / 2
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length.load(Relaxed) == 0
    }

    /// How much one change may write while the disk is full.
    pub(super) fn part(&self) -> usize {
        let part = self.target.load(Relaxed) / PART;
        usize::try_from(part).unwrap_or(usize::MAX).max(SMALLEST_PART)
    }

    /// Room that the disk must have beside a full reserve before calls are enqueued again.
    pub(super) fn margin(&self) -> u64 {
        self.target.load(Relaxed) / 4
    }

    /// The most that is waited for before a call of any size is enqueued again.
    pub(super) fn target(&self) -> u64 {
        self.target.load(Relaxed)
    }

    /// Says whether writes may use the reserve from now on.
    pub(super) fn allow(&self, usable: bool) {
        self.usable.store(usable, Relaxed);
    }

    /// What the disk has left for this process.
    pub(super) fn available(&self) -> u64 {
        let disk = fstatvfs(&self.file);
        disk.map_or(0, |disk| disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// Allocates what is missing, as far as the disk has room; whether the reserve is full now.
    pub(super) fn fill(&self) -> io::Result<bool> {
        while !self.is_full() {
            let length = self.length.load(Relaxed);
            match allocate(&self.file, length, STEP) {
                Ok(()) => self.length.store(length + STEP, Relaxed),
                Err(error) => {
                    // A part of the step may have been allocated.
                    self.file.set_len(length)?;
                    match error.kind() {
                        // No file may become larger (`ulimit -f`): this is all there can be.
                        io::ErrorKind::FileTooLarge => self.target.store(length, Relaxed),
                        _ if is_out_of_space(&error) => return Ok(false),
                        _ => return Err(error),
                    }
                }
            }
        }
        Ok(true)
    }

    /// Does `write`, and repeats it with a part of the reserve each time that it fails for want of space.
    pub(super) fn with<T>(&self, mut write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match write() {
                Err(error) if is_out_of_space(&error) && self.release() => {}
                done => return done,
            }
        }
    }

    /// Gives a step back to the disk; `false` if there is nothing to give, or it must not be given.
    fn release(&self) -> bool {
        let usable = self.usable.load(Relaxed) && !self.is_empty();
        usable && self.shrink(STEP).is_ok()
    }

    fn shrink(&self, by: u64) -> io::Result<()> {
        let length = self.length.load(Relaxed).saturating_sub(by);
        self.file.set_len(length)?;
        self.length.store(length, Relaxed);
        // Some file systems have the space only then.
        self.file.sync_all()
    }
}

/// Whether `error` says that the disk, or what this user may have of it, is full.
pub(super) fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Has the disk allocate `length` bytes of `file` from `offset` on.
fn allocate(file: &File, offset: u64, length: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), offset, length) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => {
            // Bytes that are written are allocated everywhere.
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
    fn its_blocks_are_allocated_and_it_is_refilled() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.reserve");
        let reserve = Reserve::open(&path).unwrap();
        let allocated = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let whole = reserve.target();
        assert!(reserve.is_full() && allocated() >= whole, "{}", allocated());
        // Two writes that fail take a step each.
        let mut failures = 2;
        let written = reserve.with(|| {
            failures -= 1;
            if failures >= 0 { Err(full()) } else { Ok("written") }
        });
        assert_eq!(written.unwrap(), "written");
        assert!(!reserve.is_full() && allocated() < whole);
        assert!(reserve.fill().unwrap() && allocated() >= whole);
    }

    #[test]
    fn it_gives_nothing_to_what_may_not_use_it_and_no_more_than_there_is() {
        let directory = tempfile::tempdir().unwrap();
        let reserve = Reserve::open(&directory.path().join("queue.reserve")).unwrap();
        reserve.allow(false);
        assert!(reserve.with(|| Err::<(), _>(full())).is_err() && reserve.is_full());
        reserve.allow(true);
        // Another failure is no reason to give space away.
        assert!(reserve.with(|| Err::<(), _>(io::Error::other("broken"))).is_err());
        assert!(reserve.is_full());
        assert!(reserve.with(|| Err::<(), _>(full())).is_err() && reserve.is_empty());
        assert!(reserve.is_low());
    }

    #[test]
    fn a_sparse_file_is_no_reserve() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.reserve");
        File::create(&path).unwrap().set_len(LENGTH).unwrap();
        let reserve = Reserve::open(&path).unwrap();
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= reserve.target());
    }
}
