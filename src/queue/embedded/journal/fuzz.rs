//! Builds journals for the fuzzer: their heads and checksums are right, what follows is not.

use std::fs::File;
use std::os::unix::fs::FileExt;

use bytes::Buf;

use crate::queue::embedded::journal::record::{Header, Record, replay};
use crate::queue::embedded::reserve::Reserve;

/// The longest file that a fuzzed record names: a sparse file may not fill the memory that stands for the disk.
const LONGEST_FILE: u64 = 1 << 20;

/// Replays a journal of one record that holds pages cut out of `data`.
pub(in crate::queue::embedded) fn replay_payload(journal: &File, file: &File, mut data: &[u8]) {
    let Ok(length) = data.try_get_u32().map(|it| u64::from(it) % LONGEST_FILE) else { return };
    let Ok(header) = Header::of(file) else { return };
    let mut record = Record::default();
    while let (Ok(offset), Ok(size)) = (data.try_get_u32(), data.try_get_u8()) {
        let (page, rest) = data.split_at(usize::from(size).min(data.len()));
        record.add(u64::from(offset), page);
        data = rest;
    }
    if record.is_empty() {
        return;
    }
    let sealed = record.seal(1, length, header.digest());
    if journal.write_all_at(sealed, 0).is_err() {
        return;
    }
    let replayed = Reserve::none(file).and_then(|reserve| replay(journal, file, &reserve));
    if let Err(error) = replayed {
        panic!("{error}");
    }
    let now = file.metadata().map_or(0, |it| it.len());
    assert!(now >= length, "the file has {now} bytes, not {length}");
}
