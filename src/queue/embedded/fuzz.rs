//! What the fuzzer checks of a queue's file and journal, which a failing disk may have changed.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::queue::embedded::journal::fuzz::replay_payload;
use crate::queue::embedded::rows::{Marks, Row};

/// Any bytes are a row, if an empty one.
pub(crate) fn packed_batch(data: &[u8]) {
    let row = Row::new(data);
    for (number, entry) in row.entries() {
        assert!(entry.len() <= data.len());
        let _ = row.get(number);
    }
    let marks = Marks::new(data);
    assert_eq!((0..data.len() * 8).filter(|index| marks.has(*index)).count(), marks.count());
}

/// A journal whose checksums are right, but whose content is not, changes at most its file, up to the length that it names.
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
