//! Format of the log: records, each with a header and the pages of one commit.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bytes::{Buf, BufMut};
use ring::digest;

use crate::embedded::reserve::Reserve;

/// Maximum length of the pages of one record. A larger commit syncs the file instead.
pub(super) const MAX_RECORD_BYTES: usize = 4 << 20;
/// Records start at multiples of this: a disk that fails while it writes one does not damage the earlier ones.
pub(in crate::embedded) const BLOCK_BYTES: usize = 4096;
/// Length of a record header: the fields of [`RecordHeader`], and a checksum of the record without itself.
const RECORD_HEADER_BYTES: usize = 8 + 4 + 8 + 8 + CHECKSUM_BYTES;
const CHECKSUM_BYTES: usize = 4;
/// Header of a page: its offset in the file (8 bytes), and its length (4 bytes).
const PAGE_HEADER_BYTES: usize = 8 + 4;
/// Length of the part of the file that identifies its state.
const FILE_HEADER_BYTES: usize = 512;

/// Header of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RecordHeader {
    /// Epoch of the log.
    epoch: u64,
    /// Length of the pages.
    length: u32,
    /// Length of the queue's file after the commit.
    file: u64,
    /// Digest of the file's header at the start of the epoch.
    base_digest: u64,
}

impl RecordHeader {
    fn read(mut bytes: &[u8]) -> Option<Self> {
        let bytes = &mut bytes;
        Some(Self {
            epoch: bytes.try_get_u64().ok()?,
            length: bytes.try_get_u32().ok()?,
            file: bytes.try_get_u64().ok()?,
            base_digest: bytes.try_get_u64().ok()?,
        })
    }

    fn write(self, mut bytes: &mut [u8]) {
        bytes.put_u64(self.epoch);
        bytes.put_u32(self.length);
        bytes.put_u64(self.file);
        bytes.put_u64(self.base_digest);
    }
}

/// A record that is being built: space for the header, and pages.
#[derive(Debug, Default)]
pub(super) struct Record(Vec<u8>);

impl Record {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Length of the record with one more page.
    pub(super) fn length_with(&self, page: &[u8]) -> usize {
        self.0.len().max(RECORD_HEADER_BYTES) + PAGE_HEADER_BYTES + page.len()
    }

    /// Length of the record rounded up to whole blocks.
    pub(super) fn sealed_length(&self) -> usize {
        self.0.len().next_multiple_of(BLOCK_BYTES)
    }

    pub(super) fn add(&mut self, offset: u64, page: &[u8]) {
        if self.0.is_empty() {
            self.0.resize(RECORD_HEADER_BYTES, 0);
        }
        self.0.put_u64(offset);
        self.0.put_u32(u32::try_from(page.len()).unwrap_or(u32::MAX));
        self.0.put_slice(page);
    }

    /// Completes the record: pads the last block and writes the header.
    pub(super) fn seal(&mut self, epoch: u64, file: u64, base_digest: u64) -> &[u8] {
        self.0.resize(self.sealed_length(), 0);
        let length = u32::try_from(self.0.len() - RECORD_HEADER_BYTES).unwrap_or(u32::MAX);
        RecordHeader { epoch, length, file, base_digest }.write(&mut self.0);
        let sum = checksum(&self.0);
        self.0[RECORD_HEADER_BYTES - CHECKSUM_BYTES..RECORD_HEADER_BYTES]
            .copy_from_slice(&sum.to_be_bytes());
        &self.0
    }

    /// Starts the next record. `kept` bytes of memory are retained.
    pub(super) fn clear(&mut self, kept: usize) {
        self.0.clear();
        self.0.shrink_to(kept);
    }
}

/// Checksum of a record, without its checksum field.
fn checksum(record: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&record[..RECORD_HEADER_BYTES - CHECKSUM_BYTES]);
    sum.update(&record[RECORD_HEADER_BYTES..]);
    sum.finalize()
}

/// The start of the queue's file, which every commit changes.
#[derive(Debug)]
pub(in crate::embedded) struct FileHeader([u8; FILE_HEADER_BYTES]);

impl FileHeader {
    pub(in crate::embedded) fn of(file: &File) -> io::Result<Self> {
        let mut header = [0; FILE_HEADER_BYTES];
        let length = usize::try_from(file.metadata()?.len())
            .unwrap_or(FILE_HEADER_BYTES)
            .min(FILE_HEADER_BYTES);
        file.read_exact_at(&mut header[..length], 0)?;
        Ok(Self(header))
    }

    pub(super) fn change(&mut self, written: &[u8]) {
        let length = written.len().min(FILE_HEADER_BYTES);
        self.0[..length].copy_from_slice(&written[..length]);
    }

    pub(super) fn digest(&self) -> u64 {
        let digest = digest::digest(&digest::SHA256, &self.0);
        digest.as_ref().first_chunk().map_or(0, |first| u64::from_be_bytes(*first))
    }

    /// Returns whether the file was closed, so that its last commit is complete.
    pub(in crate::embedded) fn is_closed(&self) -> bool {
        /// Offset of redb's state byte, and the bit that means "not closed".
        const STATE: (usize, u8) = (9, 2);
        self.0[STATE.0] & STATE.1 == 0
    }

    fn begins_with(&self, written: &[u8]) -> bool {
        let length = written.len().min(FILE_HEADER_BYTES);
        self.0[..length] == written[..length]
    }
}

/// Writes the pages in `journal` to `file`. Returns whether there were any.
pub(super) fn replay(journal: &File, file: &File, reserve: &Reserve) -> io::Result<bool> {
    let Some(found) = records(journal, file)? else { return Ok(false) };
    // The length is set once: data that an earlier record cut off would be needed by a later one.
    if file.metadata()?.len() != found.length {
        reserve.retry_with(|| file.set_len(found.length))?;
    }
    found.pages(journal, |offset, page| reserve.retry_with(|| file.write_all_at(page, offset)))?;
    let records = found.starts.len();
    tracing::info!(
        records,
        "The queue's file was not closed: its last commits were restored from the journal"
    );
    Ok(true)
}

/// The records of a log that belong to a file.
pub(in crate::embedded) struct Records {
    starts: Vec<u64>,
    /// Length of the file after the last record.
    pub(in crate::embedded) length: u64,
}

/// Reads the records of `journal`, up to the first incomplete one. Returns `None` if there are none or they do not
/// belong to `file`.
pub(in crate::embedded) fn records(journal: &File, file: &File) -> io::Result<Option<Records>> {
    let header = FileHeader::of(file)?;
    let (mut starts, mut last, mut belongs_to_file) = (Vec::new(), None::<RecordHeader>, false);
    let mut start = 0;
    while let Some((head, record)) = record_at(journal, start)?
        && last.is_none_or(|last| last.epoch == head.epoch)
    {
        // The header is written last. So it is either the one before the first of these records, or that of one of
        // them.
        belongs_to_file |= head.base_digest == header.digest();
        belongs_to_file |=
            pages(&record).any(|(offset, page)| offset == 0 && header.begins_with(page));
        starts.push(start);
        start += record.len() as u64;
        last = Some(head);
    }
    let Some(last) = last else { return Ok(None) };
    if !belongs_to_file {
        tracing::warn!(
            "The queue's journal is ignored: it does not belong to the queue's file, which was changed without it"
        );
        return Ok(None);
    }
    Ok(Some(Records { starts, length: last.file }))
}

impl Records {
    /// Passes each page and its offset to `put`, the oldest first.
    pub(in crate::embedded) fn pages(
        &self,
        journal: &File,
        mut put: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        for start in &self.starts {
            let Some((_, record)) = record_at(journal, *start)? else { break };
            for (offset, page) in pages(&record).filter(|(offset, _)| *offset < self.length) {
                put(offset, page)?;
            }
        }
        Ok(())
    }
}

/// Reads the record at `start`; `None` if there is no valid one.
fn record_at(journal: &File, start: u64) -> io::Result<Option<(RecordHeader, Vec<u8>)>> {
    let left = journal.metadata()?.len().saturating_sub(start);
    if left < BLOCK_BYTES as u64 {
        return Ok(None);
    }
    let mut record = vec![0; BLOCK_BYTES];
    journal.read_exact_at(&mut record, start)?;
    let Some(head) = RecordHeader::read(&record) else { return Ok(None) };
    let length = head.length as usize + RECORD_HEADER_BYTES;
    if length > MAX_RECORD_BYTES + BLOCK_BYTES
        || !length.is_multiple_of(BLOCK_BYTES)
        || length as u64 > left
    {
        return Ok(None);
    }
    record.resize(length, 0);
    journal.read_exact_at(&mut record[BLOCK_BYTES..], start + BLOCK_BYTES as u64)?;
    let sum = checksum(&record).to_be_bytes();
    Ok((record[RECORD_HEADER_BYTES - CHECKSUM_BYTES..RECORD_HEADER_BYTES] == sum)
        .then_some((head, record)))
}

/// The pages in a record, with their offsets. The padding yields none.
fn pages(record: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut rest = &record[RECORD_HEADER_BYTES..];
    std::iter::from_fn(move || {
        let offset = rest.try_get_u64().ok()?;
        let length = rest.try_get_u32().ok()? as usize;
        let (page, others) = rest.split_at_checked(length).filter(|_| length > 0)?;
        rest = others;
        Some((offset, page))
    })
}
