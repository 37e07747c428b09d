//! Fuzz targets for the queue's file and its log, which a failing disk may have changed.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::embedded::packed::{Bitmap, PackedBatch};
use crate::embedded::wal::fuzz::replay_payload;

/// Checks that any bytes can be parsed as a batch.
pub(crate) fn packed_batch(data: &[u8]) {
    let row = PackedBatch::new(data);
    for (number, entry) in row.entries() {
        assert!(entry.len() <= data.len());
        let _ = row.get(number);
    }
    let marks = Bitmap::new(data);
    assert_eq!((0..data.len() * 8).filter(|index| marks.has(*index)).count(), marks.count());
}

/// Checks that a log with correct checksums but invalid content changes only its file, within the length that it names.
pub(crate) fn wal(data: &[u8]) {
    let (Ok(journal), Ok(file)) = (temporary(), temporary()) else { return };
    let written = file.write_all_at(&[7; 1024], 0);
    if written.is_ok() {
        replay_payload(&journal, &file, data);
    }
}

fn temporary() -> std::io::Result<File> {
    use rustix::fs::{MemfdFlags, memfd_create};
    Ok(memfd_create("journal", MemfdFlags::CLOEXEC)?.into())
}
