//! Builds logs for the fuzzer: headers and checksums are correct, the content is not.

use std::fs::File;
use std::os::unix::fs::FileExt;

use bytes::Buf;

use crate::embedded::reserve::Reserve;
use crate::embedded::wal::record::{FileHeader, Record, replay};

/// Maximum file length in a fuzzed record, since a sparse file must not fill the memory that backs it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Replays a log with one record whose pages are taken from `data`.
pub(in crate::embedded) fn replay_payload(journal: &File, file: &File, mut data: &[u8]) {
    let Ok(length) = data.try_get_u32().map(|length| u64::from(length) % MAX_FILE_BYTES) else {
        return;
    };
    let Ok(header) = FileHeader::of(file) else { return };
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
    let now = file.metadata().map_or(0, |metadata| metadata.len());
    assert!(now >= length, "the file has {now} bytes, not {length}");
}
