//! What is in the journal: the pages of a commit after a head, one record after the other.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bytes::{Buf, BufMut};
use ring::digest;

use crate::queue::embedded::reserve::Reserve;

/// What one commit may write to the journal. One that writes more waits for its pages.
pub(super) const LARGEST: usize = 4 << 20;
/// Records begin at multiples of this: a disk that fails while it writes one leaves those before as they are.
pub(in crate::queue::embedded) const BLOCK: usize = 4096;
/// A head's length: that of a [`Head`], and of a checksum of all but itself.
const HEAD: usize = 8 + 4 + 8 + 8 + SUM;
const SUM: usize = 4;
/// Before a page: where it is in the file, and its length.
const PLACE: usize = 8 + 4;
/// So much of a file is told by its header.
const HEADER: usize = 512;

/// What a record says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    /// The round of the journal that it was written in.
    round: u64,
    /// The length of what follows the head.
    length: u32,
    /// The length of the queue's file.
    file: u64,
    /// The digest of the file's header when the round began.
    base: u64,
}

impl Head {
    fn read(mut bytes: &[u8]) -> Option<Self> {
        let bytes = &mut bytes;
        Some(Self {
            round: bytes.try_get_u64().ok()?,
            length: bytes.try_get_u32().ok()?,
            file: bytes.try_get_u64().ok()?,
            base: bytes.try_get_u64().ok()?,
        })
    }

    fn write(self, mut bytes: &mut [u8]) {
        bytes.put_u64(self.round);
        bytes.put_u32(self.length);
        bytes.put_u64(self.file);
        bytes.put_u64(self.base);
    }
}

/// A record that is being made: room for a head, and pages.
#[derive(Debug, Default)]
pub(super) struct Record(Vec<u8>);

impl Record {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How long it would be with one page more.
    pub(super) fn length_with(&self, page: &[u8]) -> usize {
        self.0.len().max(HEAD) + PLACE + page.len()
    }

    /// How long it is when it ends where another may begin.
    pub(super) fn sealed_length(&self) -> usize {
        self.0.len().next_multiple_of(BLOCK)
    }

    pub(super) fn add(&mut self, offset: u64, page: &[u8]) {
        if self.0.is_empty() {
            self.0.resize(HEAD, 0);
        }
        self.0.put_u64(offset);
        self.0.put_u32(u32::try_from(page.len()).unwrap_or(u32::MAX));
        self.0.put_slice(page);
    }

    /// Writes the head, and fills the last block.
    pub(super) fn seal(&mut self, round: u64, file: u64, base: u64) -> &[u8] {
        self.0.resize(self.sealed_length(), 0);
        let length = u32::try_from(self.0.len() - HEAD).unwrap_or(u32::MAX);
        Head { round, length, file, base }.write(&mut self.0);
        let sum = checksum(&self.0);
        self.0[HEAD - SUM..HEAD].copy_from_slice(&sum.to_be_bytes());
        &self.0
    }

    /// Begins the next one; `kept`: so much room stays.
    pub(super) fn clear(&mut self, kept: usize) {
        self.0.clear();
        self.0.shrink_to(kept);
    }
}

/// Of a record, but for the checksum itself.
fn checksum(record: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&record[..HEAD - SUM]);
    sum.update(&record[HEAD..]);
    sum.finalize()
}

/// The beginning of the queue's file, which every commit changes.
#[derive(Debug)]
pub(in crate::queue::embedded) struct Header([u8; HEADER]);

impl Header {
    pub(in crate::queue::embedded) fn of(file: &File) -> io::Result<Self> {
        let mut header = [0; HEADER];
        let length = usize::try_from(file.metadata()?.len()).unwrap_or(HEADER).min(HEADER);
        file.read_exact_at(&mut header[..length], 0)?;
        Ok(Self(header))
    }

    pub(super) fn change(&mut self, written: &[u8]) {
        let length = written.len().min(HEADER);
        self.0[..length].copy_from_slice(&written[..length]);
    }

    pub(super) fn digest(&self) -> u64 {
        let digest = digest::digest(&digest::SHA256, &self.0);
        digest.as_ref().first_chunk().map_or(0, |first| u64::from_be_bytes(*first))
    }

    /// Whether the file was closed, so that nothing of its last commit is missing.
    pub(in crate::queue::embedded) fn is_closed(&self) -> bool {
        /// Where redb says so, and the bit that says otherwise.
        const STATE: (usize, u8) = (9, 2);
        self.0[STATE.0] & STATE.1 == 0
    }

    fn begins_with(&self, written: &[u8]) -> bool {
        let length = written.len().min(HEADER);
        self.0[..length] == written[..length]
    }
}

/// Puts into `file` what the records of `journal` hold; whether there was anything.
pub(super) fn replay(journal: &File, file: &File, reserve: &Reserve) -> io::Result<bool> {
    let Some(found) = records(journal, file)? else { return Ok(false) };
    // Once: what was cut off by an earlier record would have to be there for a later one.
    if file.metadata()?.len() != found.length {
        reserve.with(|| file.set_len(found.length))?;
    }
    found.pages(journal, |offset, page| reserve.with(|| file.write_all_at(page, offset)))?;
    let records = found.starts.len();
    tracing::info!(records, "The queue's file was not closed: its last changes were looked after");
    Ok(true)
}

/// Records of a journal that belong to a file.
pub(in crate::queue::embedded) struct Records {
    starts: Vec<u64>,
    /// The length of the file after the last of them.
    pub(in crate::queue::embedded) length: u64,
}

/// The records of `journal`, up to the first that is not whole, if they are of `file`.
pub(in crate::queue::embedded) fn records(
    journal: &File,
    file: &File,
) -> io::Result<Option<Records>> {
    let header = Header::of(file)?;
    let (mut starts, mut last, mut is_ours) = (Vec::new(), None::<Head>, false);
    let mut start = 0;
    while let Some((head, record)) = record_at(journal, start)?
        && last.is_none_or(|last| last.round == head.round)
    {
        // The header is written last, so it is the one before the first of these, or that of one of them.
        is_ours |= head.base == header.digest();
        is_ours |= pages(&record).any(|(offset, page)| offset == 0 && header.begins_with(page));
        starts.push(start);
        start += record.len() as u64;
        last = Some(head);
    }
    let Some(last) = last else { return Ok(None) };
    if !is_ours {
        tracing::warn!(
            "The queue's journal is not its file's, which was changed without it, and is left alone"
        );
        return Ok(None);
    }
    Ok(Some(Records { starts, length: last.file }))
}

impl Records {
    /// Gives each page in them, and where it is in the file, to `put`, the newest last.
    pub(in crate::queue::embedded) fn pages(
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

/// The record that begins at `start`; `None` if what is there is none.
fn record_at(journal: &File, start: u64) -> io::Result<Option<(Head, Vec<u8>)>> {
    let left = journal.metadata()?.len().saturating_sub(start);
    if left < BLOCK as u64 {
        return Ok(None);
    }
    let mut record = vec![0; BLOCK];
    journal.read_exact_at(&mut record, start)?;
    let Some(head) = Head::read(&record) else { return Ok(None) };
    let length = head.length as usize + HEAD;
    if length > LARGEST + BLOCK || !length.is_multiple_of(BLOCK) || length as u64 > left {
        return Ok(None);
    }
    record.resize(length, 0);
    journal.read_exact_at(&mut record[BLOCK..], start + BLOCK as u64)?;
    let sum = checksum(&record).to_be_bytes();
    Ok((record[HEAD - SUM..HEAD] == sum).then_some((head, record)))
}

/// The pages in a record, and where they are in the file. What fills up the last block is none.
fn pages(record: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut rest = &record[HEAD..];
    std::iter::from_fn(move || {
        let offset = rest.try_get_u64().ok()?;
        let length = rest.try_get_u32().ok()? as usize;
        let (page, others) = rest.split_at_checked(length).filter(|_| length > 0)?;
        rest = others;
        Some((offset, page))
    })
}
